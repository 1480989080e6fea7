"""A cell that changes while it serves, as a whole: whatever happens in whatever order, each request ends with the tokens that
follow its prompt, each once and in order, or with one error that says why it had to; and nothing is left of it.

See `tests.support.whole_cell` for what is real (all that decides) and what is played.
"""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.sight import FULL, Sight
from kvstore.tiers import Tier
from tests.support.whole_cell import WholeCell, whole_cell

MOST_INSTANCES = 5
MOST_TOKENS = 80
"""To be generated. Of so many, whether there is room for them or not; fewer are asked for only if there seems to be."""

Happening = tuple[Any, ...]
"""What happens, and how. Numbers choose among what there is, whatever their size."""

which = st.integers(0, 7)
LETS = st.tuples(st.just("let"), st.integers(1, 60), st.integers(0, 999))
SUBMITS = st.tuples(
    st.just("submit"),
    st.integers(1, 40),
    st.integers(1, MOST_TOKENS),
    st.sampled_from(["all", "auto", 1, 2]),
    st.booleans(),
    st.integers(0, 9),
)
TIMES = st.tuples(st.just("time"), st.integers(1, 8), st.integers(0, 60), st.integers(0, 999))
OTHERS: dict[str, st.SearchStrategy[Happening]] = {
    "cancel": st.tuples(st.just("cancel"), which),
    "move": st.tuples(st.just("move"), which, which),
    "drain": st.tuples(st.just("drain"), which),
    "leave": st.tuples(st.just("leave"), which),
    "join": st.tuples(st.just("join"), st.integers(2, 24)),
    "kill": st.tuples(st.just("kill"), which, st.booleans()),
    "cut": st.tuples(st.just("cut"), which),
    "hold": st.tuples(st.just("hold"), which),
    "lose gManager": st.tuples(st.just("lose gManager")),
    "break": st.tuples(st.just("break"), which),
}
TIERS: st.SearchStrategy[dict[Tier, int]] = st.sampled_from(
    [{}, {"host": 60}, {"disk": 60}, {"host": 5, "disk": 60}, {"host": 6}]
)
SIGHTS = st.sampled_from([Sight(window=1), Sight(window=6), Sight(window=17), Sight(chunk=8), Sight(chunk=11)])
SIZES = st.sampled_from([[40, 40, 40], [20, 20, 20], [6, 6], [24, 5, 12], [9], [12, 12, 12, 12]])


def happenings(least: int, most: int) -> st.SearchStrategy[list[Happening]]:
    """Of some kinds: what is rare among all of them is not in an example that has few."""

    def of(kinds: set[str]) -> st.SearchStrategy[list[Happening]]:
        often = [LETS, LETS, LETS, SUBMITS, SUBMITS, TIMES]
        return st.lists(st.one_of(*often, *(OTHERS[kind] for kind in sorted(kinds))), min_size=least, max_size=most)

    return st.sets(st.sampled_from(list(OTHERS)), min_size=1).flatmap(of)


def happen(cell: WholeCell, what: Happening) -> None:
    """One thing, if there is what it needs."""
    living, connections = cell.living, [each for each in cell.network.connections if not each.up_is_over]
    match what:
        case "let", turns, seed:
            cell.let(turns, seed)
        case "submit", length, max_tokens, spread, depends_on_past, begins:
            length = min(length, 1 + cell.capacity * length // 100)
            if max_tokens < MOST_TOKENS:
                max_tokens = max(1, min(max_tokens, cell.capacity - length))
            cell.submit(length, max_tokens, spread, depends_on_past=depends_on_past, begins=begins)
        case "cancel", n if cell.open:
            cell.cancel(cell.open[n % len(cell.open)])
        case "move", n, to if cell.open:
            cell.move_home(cell.open[n % len(cell.open)], cell.member(to))
        case "drain", n:
            cell.drain(cell.member(n))
        case "join", blocks if len(living) < MOST_INSTANCES:
            cell.start(blocks)
        case "kill", n, keeps_last if len(living) > (n < 6):  # seldom the last
            cell.kill(living[n % len(living)], keeps_last=keeps_last)
        case "cut", n if connections:
            connections[n % len(connections)].cut()
        case "hold", n if living:
            living[n % len(living)].is_held ^= True
        case "leave", n if len(living) > (n < 6):
            cell.leave(living[n % len(living)])
        case "break", n if living and (tiers := living[n % len(living)].tiers) is not None:
            tiers.breaks ^= True
            cell.spoil_cached(living[n % len(living)], n)
        case ("lose gManager",):
            cell.lose_gmanager()
        case "time", seconds, turns, seed:  # none: an instance lets the others wait, and is expelled in the end
            for second in range(seconds):
                cell.pass_time(1.0)
                cell.let(turns, seed + second)


def play(
    sizes: list[int],
    whats: list[Happening],
    seed: int = 0,
    tier_slots: Mapping[Tier, int] | None = None,
    sight: Sight = FULL,
) -> WholeCell:
    with whole_cell(sizes, seed, tier_slots, sight) as cell:
        cell.let(200, 0)
        for what in whats:
            happen(cell, what)
            cell.validate()
        cell.rest()
    return cell


def _asked(begins: st.SearchStrategy[int]) -> st.SearchStrategy[Happening]:
    spread: st.SearchStrategy[Any] = st.sampled_from(["all", "auto", 1, 2])
    return st.tuples(st.just("submit"), st.integers(20, 40), st.integers(1, 12), spread, st.booleans(), begins)


ASKED_AGAIN = st.one_of(
    *(_asked(st.integers(1, 9)), _asked(st.integers(1, 9)), _asked(st.just(0)), LETS, LETS, LETS, LETS, TIMES),
    *(OTHERS["break"], OTHERS["cancel"]),
)


@given(
    st.sampled_from([[14, 14], [12], [20, 20, 20], [11, 11, 11]]),
    st.lists(ASKED_AGAIN, min_size=40, max_size=100),
    st.integers(0, 99),
    st.sampled_from([{"host": 60}, {"disk": 60}, {"host": 5, "disk": 60}, {"host": 6}, {"host": 30, "disk": 10}]),
)
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
def test_requests_end_right_whatever_is_driven_out_and_read_again(
    sizes: list[int], whats: list[Happening], seed: int, tier_slots: dict[Tier, int]
) -> None:
    play(sizes, whats, seed, tier_slots)


@given(SIZES, happenings(15, 60), st.integers(0, 99), TIERS)
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_requests_end_right_whatever_happens(
    sizes: list[int], whats: list[Happening], seed: int, tier_slots: dict[Tier, int]
) -> None:
    play(sizes, whats, seed, tier_slots)


@given(SIZES, st.one_of(happenings(15, 60), st.lists(ASKED_AGAIN, min_size=30, max_size=60)), st.integers(0, 99), SIGHTS)
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_requests_end_right_whatever_happens_where_a_layer_sees_but_a_window(
    sizes: list[int], whats: list[Happening], seed: int, sight: Sight
) -> None:
    play(sizes, whats, seed, sight=sight)


def test_one_that_was_forgotten_while_it_waited_comes_as_a_new_one() -> None:
    """The first that the gManager hears again of one that was expelled is a Ping, which could be a client's: the instance
    ended with "refused: the first message must be Hello or Register, not Ping"."""
    lets: list[Happening] = [("let", 1, 0)] * 9
    play([40, 40, 40], [*lets, ("cancel", 0), ("cancel", 0), ("join", 2), *lets[:2], ("time", 6, 0, 0)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(SIZES, happenings(20, 80), st.integers(0, 99), TIERS)
@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
def test_requests_end_right_whatever_happens_for_long(
    sizes: list[int], whats: list[Happening], seed: int, tier_slots: dict[Tier, int]
) -> None:
    play(sizes, whats, seed, tier_slots)


def test_a_play_reaches_what_it_is_for() -> None:
    """One of each kind, at a time at which it matters."""
    long: Happening = ("submit", 40, 75, "all", True, 0)
    short: Happening = ("submit", 9, 60, 1, False, 0)
    cell = play(
        [30, 30, 30],
        [
            *(long, short, ("let", 40, 1), ("move", 0, 2), ("let", 20, 2)),
            *(("join", 30), ("let", 60, 3), ("time", 1, 60, 4), short),
            *(("drain", 1), ("let", 60, 5), ("let", 60, 6), ("let", 60, 7)),
            *(long, long, short, ("let", 60, 8), ("kill", 0, False), ("let", 40, 9), ("time", 3, 60, 10)),
            *(("cancel", 1), ("let", 20, 11), ("lose gManager",), ("let", 40, 12), ("time", 3, 60, 13)),
            *(("join", 30), long, ("let", 60, 14), ("hold", 1), ("time", 8, 60, 15), ("hold", 1), ("time", 2, 60, 16)),
            *(("cut", 0), ("let", 60, 17), ("leave", 0)),
        ],
    )
    seen = cell.seen
    assert seen["HomeMoved"] and seen["RunMoved"] and seen["WasDrained"], seen
    assert seen["admitted again with gaps"] and seen["kept tokens"] > 50, seen
    assert seen["gManager lost"] and seen["instance is back"], seen
    assert seen["instance left"] > 1 and seen["instance comes"], seen
    assert seen["ended: length"] and seen["ended: abort"], seen


def test_a_play_shares_what_requests_left() -> None:
    """Beginnings are shared while their requests run and after, make room for others, and outlast losses; some clients leave
    meanwhile."""
    document: Happening = ("submit", 40, 20, "all", False, 0)
    question: Happening = ("submit", 44, 12, "all", False, 2)
    short: Happening = ("submit", 44, 12, 1, True, 2)
    turn: Happening = ("submit", 70, 12, "auto", False, 3)
    other: Happening = ("submit", 40, 70, "all", False, 0)
    cell = play(
        [30, 30, 30],
        [
            *(document, ("let", 60, 1), ("let", 60, 2), question, short, ("let", 60, 3), ("let", 60, 4), ("let", 60, 5)),
            *(turn, question, ("let", 30, 6), ("cancel", 0), short, ("let", 60, 7), ("let", 60, 8)),
            *(other, other, other, ("let", 60, 9), ("let", 60, 10), ("let", 60, 11), ("time", 2, 60, 12)),
            *(document, ("let", 60, 13), ("let", 60, 14), question, ("let", 20, 15), ("join", 30), ("let", 60, 16)),
            *(short, turn, ("let", 60, 17), ("kill", 0, True), ("let", 60, 18), ("time", 3, 60, 19), question, short),
            *(("let", 60, 20), ("lose gManager",), ("let", 60, 21), ("time", 3, 60, 22), question, short, ("let", 60, 23)),
        ],
    )
    seen = cell.seen
    assert seen["tokens to be shared"] > 300, seen
    assert seen["shared where nothing is computed"], seen
    assert seen["cached when an epoch ended"], seen
    assert sum(process.instance._rmanager.evicted_blocks for process in cell.processes) > 10
    observed = cell.cluster.stats().observed
    assert 0 < observed.prefix_hits < observed.prefix_queries


def test_a_play_reads_what_had_to_make_room() -> None:
    """Documents drive each other out of small pools, and are asked about again; some copies are broken."""
    documents: list[Happening] = [("submit", 40, 8, "all", False, 0), ("submit", 40, 8, 1, False, 0)]
    lets: list[Happening] = [("let", 60, turn) for turn in range(12)]
    again: list[Happening] = [("submit", 44, 6, "auto", False, 4), *lets, ("submit", 44, 6, "all", False, 6), *lets]
    rounds: list[Happening] = [what for document in documents * 3 for what in (document, *lets)]
    for slots in ({"host": 60}, {"disk": 60}, {"host": 6, "disk": 60}):
        cell = play([14, 14], [*rounds, *again, *again, ("break", 0), ("break", 1), *rounds, *again, *again], 3, slots)
        assert cell.seen["Fetch"] and cell.seen["blocks fetched"] > 5, cell.seen
        counters = cell.cluster.stats().counters
        assert counters.tier_tokens and counters.tier_bytes_down and counters.blocks_corrupt + counters.slots_failed, counters


def test_a_play_finds_what_is_wrong_in_a_pool_before_it_is_shared() -> None:
    document: Happening = ("submit", 40, 8, "all", False, 0)
    again: Happening = ("submit", 44, 6, "auto", False, 2)
    lets: list[Happening] = [("let", 60, turn) for turn in range(8)]
    cell = play([30, 30], [document, *lets, ("break", 0), ("break", 1), again, *lets, again, *lets], seed=1)
    assert cell.checks_cache and cell.seen["spoiled in a pool"] and cell.seen["lacks source"], cell.seen
    assert cell.cluster.stats().counters.blocks_corrupt == cell.seen["spoiled in a pool"]
    assert cell.cluster.stats().observed.prefix_hits
