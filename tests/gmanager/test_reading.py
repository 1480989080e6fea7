"""Requests that begin with what lies below the pools: when it is read for them, who goes first meanwhile, and what becomes of
them when it isn't there, comes late or not at all.

Blocks have 4 tokens, `doc` has 12.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.cluster.chain import Chain, seed_of
from gmanager.cluster.events import Action, Send
from gmanager.cluster.prefixes import Held, Prefixes
from gmanager.cluster.reading import MOST_READING, MOST_READS, PATIENCE_S
from gmanager.wire import messages as m
from tests.gmanager.cluster_support import CLIENT, Driver, beat, dropped, granted, kept, peer, running, serving
from tests.gmanager.test_reuse import DOC, admits, ask, finish, lacks, sharing, with_doc

Runs = list[list[tuple[int, int]]]
AGAIN = [*DOC, 7, 8]


def below(seq: int, runs: Runs, *tokens: int) -> m.Cached:
    """What is told of a sequence of which so many tokens of each run lie below."""
    return m.Cached(epoch=1, shards=[m.KeptShard(seq=seq, runs=runs, below=list(tokens))])


def fetch(number: int, source: int = 1, end: int = 12, rank: int = 0, **more: bool) -> Send:
    return Send(peer(rank), m.Fetch(epoch=1, fetch=number, source=source, end=end, **more))


def stop_fetch(number: int) -> Send:
    return Send(peer(0), m.StopFetch(epoch=1, fetch=number))


def fetched(number: int, blocks: int, us: int = 10) -> m.Fetched:
    return m.Fetched(epoch=1, fetch=number, blocks=blocks, us=us)


def sunk(*blocks: int, tokens: int = 8) -> Driver:
    """A cell of which instance 0 has `doc` as sequence 1, the last tokens of it below."""
    driver = with_doc(*blocks)
    driver.say(peer(0), below(1, [[(0, 12)]], tokens))
    return driver


def test_what_is_below_is_read_before_anything_is_reserved() -> None:
    driver = sunk(20)
    assert driver.say(CLIENT, ask("again", AGAIN, max_tokens=2)) == [fetch(1)]
    assert driver.cluster.stats().requests["again"].state == "queued"
    driver.say(peer(0), below(1, [[(0, 12)]]))
    assert driver.say(peer(0), fetched(1, 2)) == [sharing(0, 2, 4, 1, [[(0, 12)]])]
    (admit,) = admits(driver.say(peer(0), granted(2, 4, 14)))
    assert admit.kept == [m.KeptPart(rank=0, runs=[[(0, 12)]])]
    assert driver.cluster.stats().observed.prefix_hits == 12


def test_who_comes_next_does_not_wait_for_what_is_read() -> None:
    driver = sunk(20)
    driver.say(CLIENT, ask("again", AGAIN))
    assert driver.say(CLIENT, ask("other", [1, 2, 3])) == [Send(peer(0), m.Reserve(epoch=1, seq=2, blocks=2))]


def test_only_what_is_wanted_of_it_is_read() -> None:
    """It asks for eight tokens of twelve, of which four are in the pool."""
    driver = sunk(20)
    assert driver.say(CLIENT, ask("part", [*DOC[:9], 1, 2])) == [fetch(1, end=8)]


def test_what_finds_no_room_is_read_once_more_and_then_computed() -> None:
    driver = sunk(20)
    driver.say(CLIENT, ask("again", AGAIN))
    for number in range(1, MOST_READS):
        assert driver.say(peer(0), fetched(number, 0)) == [fetch(number + 1)]
    assert driver.say(peer(0), fetched(MOST_READS, 0)) == [sharing(0, 2, 6, 1, [[(0, 4)]])]


def test_a_reading_that_does_not_end_is_waited_for_once() -> None:
    """Whatever was known before: it takes longer than to compute what is below."""
    driver = sunk(20)
    driver.say(CLIENT, ask("again", AGAIN))
    computed = sharing(0, 2, 6, 1, [[(0, 4)]])
    assert computed not in driver.wait(int(PATIENCE_S), peer(0), CLIENT)
    acts = driver.wait(2, peer(0), CLIENT)
    assert computed in acts and stop_fetch(1) in acts
    driver.say(peer(0), granted(2, 6, 14))
    before = dropped(driver)
    driver.say(peer(0), fetched(1, 2), fetched(1, 2), fetched(77, 2))
    assert dropped(driver) == before + 2, "the first was late, and counts"
    assert driver.say(CLIENT, ask("next", AGAIN)) == [sharing(0, 3, 6, 1, [[(0, 4)]])], "it is not read for the next, either"
    driver.say(peer(0), granted(3, 6, 8))
    driver.wait(61, peer(0), CLIENT)
    assert driver.say(CLIENT, ask("later", AGAIN)) == [fetch(2)], "it may be faster now"


def test_an_answer_that_comes_late_says_how_long_reading_takes() -> None:
    driver = sunk(20)
    driver.say(CLIENT, ask("again", AGAIN))
    driver.say(CLIENT, m.Abort(call=1, request_id="again"))
    driver.say(peer(0), fetched(1, 2, us=3600 * 10**6))
    assert driver.say(CLIENT, ask("next", AGAIN)) == [sharing(0, 2, 6, 1, [[(0, 4)]])]


def test_who_is_cancelled_waits_no_longer() -> None:
    driver = sunk(20)
    driver.say(CLIENT, ask("again", AGAIN))
    driver.say(CLIENT, ask("too", AGAIN))
    assert stop_fetch(1) not in driver.say(CLIENT, m.Abort(call=1, request_id="again")), "another waits"
    assert stop_fetch(1) in driver.say(CLIENT, m.Abort(call=2, request_id="too"))
    driver.say(peer(0), below(1, [[(0, 12)]]), fetched(1, 2))
    assert driver.say(CLIENT, ask("next", AGAIN)) == [sharing(0, 2, 4, 1, [[(0, 12)]])]


def test_those_that_need_the_same_wait_for_one_reading() -> None:
    driver = sunk(40)
    assert driver.say(CLIENT, ask("first", AGAIN)) == [fetch(1)]
    for number in range(MOST_READING):
        assert driver.say(CLIENT, ask(f"r{number}", [*DOC, 5, number])) == []
    assert driver.say(CLIENT, ask("other", [1, 2, 3])) == [Send(peer(0), m.Reserve(epoch=1, seq=2, blocks=2))]
    driver.say(peer(0), granted(2, 2, 38))
    driver.say(CLIENT, m.Abort(call=1, request_id="first"))
    driver.say(peer(0), below(1, [[(0, 12)]]))
    assert driver.say(peer(0), fetched(1, 2)) == [sharing(0, 3, 4, 1, [[(0, 12)]])], "for the others it is read all the same"
    for seq in range(3, 3 + MOST_READING):
        assert driver.cluster.stats().requests[f"r{seq - 3}"].state == "reserving"
        driver.say(peer(0), granted(seq, 4, 30))


def many_sunk(count: int) -> Driver:
    """A cell that has so many documents below. The first token of number n is 100 n."""
    driver = serving(200)
    for seq in range(1, count + 1):
        running(driver, f"doc{seq}", prompt=long_ago(seq), max_tokens=3, generated=2)
        finish(driver, seq, 3, runs=[[(0, 12)]])
        driver.say(peer(0), beat(200 - seq))
        driver.say(peer(0), below(seq, [[(0, 12)]], 8))
    return driver


def long_ago(seq: int) -> list[int]:
    return list(range(100 * seq, 100 * seq + 12))


def test_who_waits_for_a_turn_to_be_read_for_holds_nobody_up() -> None:
    driver = many_sunk(MOST_READING + 2)
    for seq in range(1, MOST_READING + 1):
        assert driver.say(CLIENT, ask(f"again{seq}", [*long_ago(seq), 7])) == [fetch(seq, source=seq)]
    for seq in (MOST_READING + 1, MOST_READING + 2):
        assert driver.say(CLIENT, ask(f"again{seq}", [*long_ago(seq), 7])) == []
    same = ask("same", [*long_ago(1), 7])
    assert driver.say(CLIENT, same) == [], "what it needs is read already: it takes no turn"
    number = MOST_READING + 3
    assert driver.say(CLIENT, ask("short", [1, 2, 3])) == [Send(peer(0), m.Reserve(epoch=1, seq=number, blocks=2))]
    driver.say(peer(0), granted(number, 2, 38))
    driver.say(peer(0), below(1, [[(0, 12)]]))
    turn = driver.say(peer(0), fetched(1, 2))
    assert turn[0] == sharing(0, number + 1, 4, 1, [[(0, 12)]]), "who has it precedes who has a turn now"
    turn = driver.say(peer(0), granted(number + 1, 4, 30))
    turn += driver.say(peer(0), granted(number + 2, 4, 28))
    assert fetch(MOST_READING + 1, source=MOST_READING + 1) in turn
    assert fetch(MOST_READING + 2, source=MOST_READING + 2) not in turn
    driver.say(CLIENT, m.Abort(call=1, request_id=f"again{MOST_READING + 2}"))


def test_what_takes_longer_to_read_than_to_compute_is_computed() -> None:
    driver = sunk(20)
    driver.say(CLIENT, ask("again", AGAIN))
    driver.say(peer(0), below(1, [[(0, 12)]]), fetched(1, 2, us=3600 * 10**6))
    driver.say(peer(0), granted(2, 4, 14))
    driver.say(peer(0), below(1, [[(0, 12)]], 8))
    asked = driver.say(CLIENT, ask("slow", AGAIN))
    assert asked == [sharing(0, 3, 6, 1, [[(0, 4)]])]
    driver.say(peer(0), granted(3, 6, 8))
    driver.wait(61, peer(0), CLIENT)
    assert driver.say(CLIENT, ask("later", AGAIN)) == [fetch(2)], "it may be faster now"


def test_what_lies_on_two_is_read_on_both() -> None:
    driver = with_doc(200, 200)
    driver.say(peer(0), below(1, [[(0, 4)]], 4))
    driver.say(peer(1), m.Cached(epoch=1, shards=[m.KeptShard(seq=1, runs=[[(4, 12)]], below=[8])]))
    prompt = [*DOC, *range(600)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gmanager.cluster.reuse.FAR_TOKENS", 1)
        assert driver.say(CLIENT, ask("again", prompt, spread="all")) == [fetch(1), fetch(2, rank=1)]
        driver.say(peer(0), below(1, [[(0, 4)]]))
        assert driver.say(peer(0), fetched(1, 1)) == []
        driver.say(peer(1), below(1, [[(4, 12)]]))
        assert driver.cluster.stats().requests["again"].state == "queued"


def test_an_instance_that_has_lost_it_meanwhile_is_believed() -> None:
    driver = sunk(20)
    driver.say(CLIENT, ask("again", AGAIN))
    driver.say(peer(0), m.Cached(epoch=1, shards=[m.KeptShard(seq=1, runs=[])]))
    assert driver.say(peer(0), fetched(1, 0)) == [Send(peer(0), m.Reserve(epoch=1, seq=2, blocks=5))]


def test_what_was_evicted_between_reading_and_reserving_is_read_again() -> None:
    driver = sunk(20)
    driver.say(CLIENT, ask("again", AGAIN))
    driver.say(peer(0), below(1, [[(0, 12)]]), fetched(1, 2))
    driver.say(peer(0), below(1, [[(0, 12)]], 12))
    assert driver.say(peer(0), lacks(2, 20)) == [fetch(2)]


def test_those_that_wait_for_room_have_it_lifted_from_disk() -> None:
    driver = sunk(8)
    on_disk = m.Beat(epoch=1, free_blocks=8, held_tokens={}, counters=m.Counters(), disk_blocks=2)
    driver.say(peer(0), on_disk)
    driver.say(CLIENT, ask("large", list(range(900, 922)), max_tokens=4))
    driver.say(peer(0), granted(2, 7, 1))
    lifted = driver.say(CLIENT, ask("again", AGAIN, max_tokens=2))
    assert lifted == [fetch(1, end=13, into_pool=False)]
    full = m.Beat(epoch=1, free_blocks=1, held_tokens={}, counters=m.Counters(), disk_blocks=2)
    assert driver.say(peer(0), full) == [Send(peer(0), m.Pong())], "once"
    assert driver.say(peer(0), on_disk) == [Send(peer(0), m.Pong()), fetch(2)], "now there is room"


def test_what_is_below_outlasts_an_epoch() -> None:
    driver = sunk(20, 20)
    driver.lose(1)
    shard = m.KeptShard(seq=1, runs=[[(0, 12)]], below=[8])
    driver.say(peer(0), m.Kept(epoch=1, free_blocks=20, shards=[], cached=[shard]))
    driver.join(2, peer(0))
    assert driver.say(CLIENT, ask("again", AGAIN)) == [Send(peer(0), m.Fetch(epoch=2, fetch=1, source=1, end=12))]


def test_an_epoch_that_ends_ends_all_reading() -> None:
    driver = sunk(20, 20)
    driver.say(CLIENT, ask("again", AGAIN))
    driver.lose(1)
    driver.say(peer(0), kept(20))
    assert driver.cluster.stats().requests["again"].state == "queued"
    actions: list[Action] = driver.join(2, peer(0))
    assert Send(peer(0), m.Reserve(epoch=2, seq=2, blocks=5)) in actions


@pytest.mark.parametrize("tokens", [[-4], [13], [4, 4]], ids=str)
def test_an_instance_that_has_more_below_than_there_is_can_not_go_on(tokens: list[int]) -> None:
    driver = serving(20, 20)
    driver.say(peer(0), below(1, [[(0, 12)]], *tokens))
    assert any("sent what can't be read: runs must ascend" in str(log.fields) for log in driver.logs)


ascending = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=4).map(
    lambda steps: [
        (sum(g + n for g, n in steps[:i]) + g, sum(g + n for g, n in steps[: i + 1])) for i, (g, n) in enumerate(steps)
    ]
)


@given(st.lists(ascending, max_size=3), st.data())
def test_what_is_in_the_pool_are_the_first_tokens_of_each_run(runs: Runs, data: st.DataObject) -> None:
    positions = [[p for start, end in run for p in range(start, end)] for run in runs]
    tokens = [data.draw(st.integers(0, len(its))) for its in positions]
    held = Held.of(runs, tokens)
    in_pool = [[p for start, end in run for p in range(start, end)] for run in held.in_pool]
    assert in_pool == [its[: len(its) - n] for its, n in zip(positions, tokens, strict=True) if n < len(its)]
    assert held.has_below == any(tokens)


def test_the_longest_beginning_in_pools_is_found_beside_a_longer_one_below() -> None:
    index = Prefixes(2)
    seed = seed_of("model")
    index.add(1, Chain(seed, 2, m.pack_tokens([7] * 12)))
    index.add(2, Chain(seed, 2, m.pack_tokens([7] * 8)))
    for seq in (1, 2):
        index.end(seq, b"")
    index.add(3, Chain(seed, 2, m.pack_tokens([7] * 12)))
    index.tell(3, 0, [[(0, 12)]], [12])
    index.add(4, Chain(seed, 2, m.pack_tokens([7] * 8)))
    index.tell(4, 0, [[(0, 8)]])
    wanted = Chain(seed, 2, m.pack_tokens([7] * 14))
    assert [(match.source, match.tokens) for match in index.find(wanted, 13)] == [(4, 8)]
    (match,) = index.find(wanted, 13, with_below=True)
    assert (match.source, match.tokens, match.below) == (3, 12, {0: 12})
    assert index.has_below
    index.tell(3, 0, [])
    assert not index.has_below
    index.validate()
