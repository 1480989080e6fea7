"""What policies decide: by numbers alone, and in a cluster that is driven by events."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.cluster.events import Deliver, Send
from gmanager.cluster.performance import guess
from gmanager.cluster.placement import Candidate, InstanceView, Placement
from gmanager.cluster.policies import (
    POLICIES,
    Elastic,
    Infinite,
    Loong,
    NewHolder,
    NewHome,
    Outlook,
    Prompt,
    SequenceView,
    Split,
    Static,
)
from gmanager.cluster.policies.elastic import SOONER_S, WAITS_S
from gmanager.cluster.policies.gain import after, best_of
from gmanager.cluster.unsettled import MAX_ASKED, view_of
from gmanager.config import GManagerConfig, PolicyName
from gmanager.wire import messages as m
from gmanager.wire.messages import Role
from tests.gmanager.cluster_support import (
    CLIENT,
    Driver,
    beat,
    cancel,
    granted,
    outputs,
    peer,
    pong,
    request_stats,
    reserve,
    reserve_next,
    running,
    serving,
    submit,
)
from tests.gmanager.test_placement import views


def outlook(free: list[int], *, total: int = 40, waiting: list[int] | None = None) -> Outlook:
    return Outlook(
        views=views(free, total), block_size=4, chunk_tokens=64, reach=8192, costs=guess(8192), waiting=waiting or []
    )


def test_each_name_is_a_policy() -> None:
    assert set(POLICIES) == set(get_args(PolicyName))
    with pytest.raises(ValueError, match="policy must be one of elastic, static.*, got 'dynamic'"):
        GManagerConfig(policy="dynamic")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 300), st.sampled_from(["auto", "all", 3]))
def test_static_keeps_a_request_inside_one_instance(free: list[int], tokens: int, spread: object) -> None:
    placement = Static().place(Prompt(missing=tokens, spread=spread), outlook(free))  # type: ignore[arg-type]
    blocks = -(-tokens // 4) + 1
    if placement is None:
        assert max(free) < blocks
    else:
        (share,) = placement.shares
        assert share.tokens == tokens
        assert placement.blocks == {share.rank: blocks}
        assert free[share.rank] >= blocks


def test_static_preempts_at_the_home_that_has_no_room() -> None:
    running = [Candidate(1, 1, 90, 0), Candidate(2, 2, 10, 1), Candidate(3, 3, 50, 0), Candidate(4, 4, 70, 0)]
    assert Static().victim(running, 0) == 3
    assert Static().victim(running, 1) is None, "it is alone there: it goes itself"
    crowded = [InstanceView(rank=r, free_blocks=n, total_blocks=40, homes=1, max_homes=4) for r, n in enumerate((0, 30))]
    assert Static().next_home(crowded, 0) is None
    assert Static().last_resort(crowded, 0) is None


def test_static_refuses_what_no_instance_holds_alone() -> None:
    """8 blocks of 4 on each of two: 28 tokens in one with a block to spare, 56 in both."""
    for policy, most in (("static", 28), ("elastic", 56)):
        driver = serving(8, 8, policy=policy)
        driver.say(CLIENT, submit("fits", most - 4, max_tokens=4))
        assert request_stats(driver, "fits").state == "reserving"
        (refusal,) = driver.say(CLIENT, submit("too long", most - 3, max_tokens=4))
        assert isinstance(refusal, Deliver)
        assert refusal.refusal == "never"
        assert ("inside one instance, and the largest holds 28" in (refusal.error or "")) == (policy == "static")


# --- what moves -------------------------------------------------------------------------------------------------------

COSTS = guess(8192)


def cell(*instances: InstanceView, waiting: int = 0, mean_tokens: int = 0) -> Outlook:
    return Outlook(
        views=instances,
        block_size=64,
        chunk_tokens=8192,
        reach=32_768,
        costs=COSTS,
        num_waiting=waiting,
        mean_tokens=mean_tokens,
    )


def instance(rank: int, **more: Any) -> InstanceView:
    fields = {"free_blocks": 1000, "total_blocks": 2000, "homes": more.get("rows", 0), "max_homes": 256}
    return InstanceView(rank=rank, **(fields | more))


def sequence(held: dict[int, int], *, home: int = 0, **more: Any) -> SequenceView:
    fields: dict[str, Any] = {"seq": 7, "left": 1000, "can_move": True, "copyable": set(held) - {home}}
    return SequenceView(home=home, held=held, **(fields | more))


def test_elastic_brings_home_what_costs_more_to_visit() -> None:
    """A short sequence on two instances: an exchange costs more than its KV. A long one is read faster by both."""
    near = cell(instance(0, rows=1, held=1000, sent=1), instance(1, held=1000, served=1))
    assert Elastic().improve([sequence({0: 1000, 1: 1000})], near) == NewHolder(7, 1, 0)
    assert Elastic().improve([sequence({0: 1000, 1: 1000}, left=1)], near) is None, "it ends before the copy would"
    assert Elastic().improve([sequence({0: 1000, 1: 1000}, copyable=())], near) is None
    full = cell(instance(0, rows=1, held=1000, sent=1, free_blocks=17), instance(1, held=1000, served=1))
    assert Elastic().improve([sequence({0: 1000, 1: 1000})], full) is None, "16 blocks, and 2 in reserve"
    far = cell(instance(0, rows=1, held=300_000, sent=1), instance(1, held=300_000, served=1))
    assert Elastic().improve([sequence({0: 300_000, 1: 300_000})], far) is None


def test_homes_go_to_the_holder_that_has_less_to_do() -> None:
    shared = sequence({0: 10_000, 1: 10_000}, copyable=())
    for rows, wanted in ((60, NewHome(7, 1)), (7, None)):
        apart = cell(instance(0, rows=rows, held=50_000, sent=1), instance(1, held=10_000, served=1))
        assert Elastic().improve([shared], apart) == wanted
        assert Loong().improve([shared], apart) == wanted
        assert Loong().improve([replace(shared, can_move=False)], apart) is None
    slower = cell(instance(0, rows=60, sent=1), instance(1, rows=20, held=10**6, served=1))
    assert Loong().improve([shared], slower) is None, "that one has more to read than rows"


def test_infinite_lets_a_debtor_go_when_others_wait() -> None:
    """A long sequence fills instance 0, on which nothing else fits; instance 1 is half empty."""
    debtor = instance(0, rows=1, held=100_000, free_blocks=3, total_blocks=1600)
    creditor = instance(1, rows=40, held=40_000, free_blocks=2500, total_blocks=3200)
    long = sequence({0: 100_000}, copyable=())
    assert Infinite().improve([long], cell(debtor, creditor, waiting=0)) is None, "nothing waits"
    assert Infinite().improve([long], cell(debtor, creditor, waiting=100, mean_tokens=1000)) == NewHome(7, 1)
    small = instance(1, rows=40, held=40_000, free_blocks=1000, total_blocks=3200)
    assert Infinite().improve([long], cell(debtor, small, waiting=100, mean_tokens=1000)) is None, "its KV could not follow"
    few = [instance(0, rows=20, held=100_000, free_blocks=3), instance(1, rows=20, held=100_000, free_blocks=2500)]
    little = cell(*few, waiting=1, mean_tokens=1000)
    assert Infinite().improve([sequence({0: 20_000}, copyable=())], little) is None, "one more of 41 is no twentieth"
    # what it left behind follows
    left = sequence({0: 100_000, 1: 10}, home=1)
    assert Infinite().improve([left], cell(debtor, creditor)) == NewHolder(7, 0, 1)


def test_the_largest_gain_is_taken_and_of_equals_the_first() -> None:
    moves = [NewHome(seq, 1) for seq in range(4)]
    assert best_of(zip((0.1, 0.3, 0.3, 0.0), moves, strict=True)) == moves[1]
    assert best_of([(0.0, moves[0])]) is None
    assert best_of([]) is None


def test_infinite_looks_at_debtors_while_others_wait() -> None:
    crowd = [instance(0, rows=1, free_blocks=3), instance(1, rows=1), instance(2, rows=256, free_blocks=3), instance(3)]
    for waiting, debtors in ((0, []), (10, [0]), (100, [0, 1])):
        assert list(Infinite().looks_at(cell(*crowd, waiting=waiting, mean_tokens=1000))) == debtors
    full = [replace(view, free_blocks=3, homes=1) for view in crowd]
    assert list(Infinite().looks_at(cell(*full, waiting=100, mean_tokens=1000))) == [], "nobody has memory to spare"


def test_all_that_may_be_moved_have_their_turn_and_none_waits_for_all_others() -> None:
    asked: list[list[int]] = []

    class Asked(Infinite):
        def looks_at(self, outlook: Outlook) -> Collection[int]:
            return [0]

        def improve(self, sequences: Sequence[SequenceView], outlook: Outlook) -> None:
            asked.append([sequence.seq for sequence in sequences])

    driver = serving(1000, policy="infinite")
    driver.cluster._cells["main"].policy = Asked()
    for i in range(MAX_ASKED + 6):
        running(driver, f"r{i}", prompt=[i] * 4, generated=1, max_tokens=9)
    assert asked == [[i] for i in range(1, MAX_ASKED + 7)], "each when its first token comes"
    asked.clear()
    driver.wait(1, peer(0))
    assert asked == [[*range(1, MAX_ASKED + 1)]]
    running(driver, "new", prompt=[99] * 4, generated=1, max_tokens=9)
    assert asked[1:] == [[*range(MAX_ASKED + 1, MAX_ASKED + 7)], [MAX_ASKED + 7]], "something has changed"
    asked.clear()
    driver.wait(2, peer(0))
    assert sorted({seq for seqs in asked for seq in seqs}) == [*range(1, MAX_ASKED + 8)]
    assert max(map(len, asked)) == MAX_ASKED


def test_infinite_fills_local_memory_first() -> None:
    placed = Infinite().place(Prompt(missing=64 * 30), cell(instance(0, free_blocks=11), instance(1, free_blocks=21, rows=1)))
    assert placed is not None
    assert {share.rank: share.tokens for share in placed.shares} == {0: 640, 1: 1280}
    assert placed.shares[0].rank == 0, "fewest homes"
    whole = Infinite().place(Prompt(missing=64 * 15), cell(instance(0, free_blocks=11), instance(1, free_blocks=21, rows=1)))
    assert whole is not None
    assert [share.rank for share in whole.shares] == [1], "it fits there"
    assert Infinite().place(Prompt(missing=64 * 31), cell(instance(0, free_blocks=11), instance(1, free_blocks=21))) is None


def test_loong_spreads_a_prompt_as_far_as_that_is_much_faster() -> None:
    idle = [instance(rank) for rank in range(8)]
    degrees = []
    for tokens in (100, 4000, 100_000):
        placed = Loong().place(Prompt(missing=tokens), cell(*idle))
        assert placed is not None
        degrees.append(len(placed.shares))
    assert degrees[0] == 1
    assert degrees == sorted(degrees)
    assert degrees[-1] == 8
    busy = [instance(0), *(instance(rank, backlog=10**6) for rank in range(1, 8))]
    placed = Loong().place(Prompt(missing=4000), cell(*busy))
    assert placed is not None
    assert len(placed.shares) == 1, "the others have much to do"


def test_split_computes_here_and_decodes_there() -> None:
    there = [instance(0, role="prefill"), instance(1, role="decode", rows=5), instance(2, role="decode", rows=3)]
    placed = Split().place(Prompt(missing=20_000), cell(*there))
    assert placed is not None
    assert [share.rank for share in placed.shares] == [0]
    assert Split().improve([sequence({0: 20_000}, copyable=())], cell(*there)) == NewHome(7, 2)
    assert Split().improve([sequence({0: 20_000, 2: 1}, home=2)], cell(*there)) == NewHolder(7, 0, 2)
    full = [there[0], *(replace(view, free_blocks=100) for view in there[1:])]
    assert Split().improve([sequence({0: 20_000}, copyable=())], cell(*full)) is None, "back-pressure: it waits for room"
    cheap = Split().place(Prompt(missing=100), cell(*there))
    assert cheap is not None
    assert cheap.shares[0].rank in (1, 2), "computed where it will decode"
    huge = Split().place(Prompt(missing=64 * 2100), cell(*(replace(v, free_blocks=2000) for v in there)))
    assert huge is not None
    assert len(huge.shares) > 1, "no prefill instance holds it"


def test_who_was_sent_a_home_needs_room_for_what_follows_it() -> None:
    """20,000 tokens are 313 blocks. One that was sent there before has as many elsewhere, which follow."""
    for coming, homes, wanted in ((0, 0, 1), (20_000, 1, 1), (64 * 683, 1, 1), (64 * 683, 2, None), (64 * 684, 1, None)):
        there = instance(1, role="decode", coming=coming, homes=homes)
        found = Split().improve([sequence({0: 20_000}, copyable=(), growth=64)], cell(instance(0, role="prefill"), there))
        assert found == (None if wanted is None else NewHome(7, wanted)), (coming, homes)
        short = sequence({0: 20_000}, copyable=(), growth=0)
        assert Split().improve([short], cell(instance(0, role="prefill"), replace(there, coming=0))) == NewHome(7, 1)
    debtor = instance(0, rows=1, held=100_000, free_blocks=3, total_blocks=1600)
    creditor = instance(1, rows=40, held=40_000, free_blocks=2500, total_blocks=3200, coming=64 * 1000)
    crowd = cell(debtor, creditor, waiting=100, mean_tokens=1000)
    assert Infinite().improve([sequence({0: 100_000}, copyable=())], crowd) is None
    assert Infinite().improve([sequence({0: 50_000}, copyable=())], crowd) == NewHome(7, 1)


def test_a_decode_instance_is_not_sent_more_than_it_will_hold() -> None:
    """1,900 blocks there. Each of two has 1,000, which are still where they were computed when both begin to decode."""
    driver = Driver(policy="split")
    driver.ready_cell(5000, 1900, roles=("prefill", "decode"), max_context=100_000)
    driver.say(CLIENT, m.Hello(protocol=m.PROTOCOL))
    for token in (5, 6):
        running(driver, f"r{token}", prompt=[token] * 4000, max_tokens=8)
    driver.say(peer(0), beat(2998, {1: 4000, 2: 4000}))
    assert reserve_next(1, 1) in driver.say(peer(0), outputs(1, 0, [9]))
    driver.say(peer(1), granted(1, 1, 1899))
    driver.say(peer(0), m.HomeMoved(epoch=1, seq=1, home=1))
    acts = driver.say(peer(0), outputs(2, 0, [9]))
    assert reserve_next(1, 2) not in acts, "there are 1,899 blocks, of which 1,000 are the first one's"
    view = driver.cluster._cells.sequences["main"]._running.views()[1]
    assert (view.free_blocks, view.coming) == (1899, 4000 + 8)


def test_roles_that_say_nothing_are_told() -> None:
    assert Split().wrong_with(["prefill", "decode", "mixed"]) is None
    assert Split().wrong_with(["decode", "decode"]) == "policy split has no instance with --role prefill, or mixed: all do both"
    assert Split().wrong_with(["mixed", "mixed"]) == "policy split has no instance with a --role: all do both"
    assert Elastic().wrong_with(["mixed", "decode"]) == "policy elastic knows no roles, and these have some: decode"
    assert Elastic().wrong_with(["mixed"]) is None
    lonely = [instance(0, role="decode"), instance(1, role="decode")]
    assert Split().place(Prompt(missing=20_000), cell(*lonely)) is not None
    assert Split().improve([sequence({0: 20_000}, copyable=())], cell(*lonely)) is None


numbers = st.integers(0, 2000)


@given(
    st.sampled_from(sorted(POLICIES)),
    st.lists(st.tuples(numbers, numbers, st.sampled_from(get_args(Role)), numbers), min_size=2, max_size=5),
    st.lists(st.dictionaries(st.integers(0, 4), st.integers(1, 10**6), min_size=1), max_size=4),
    st.data(),
)
def test_what_is_wanted_can_be_asked_for(
    name: str, rooms: list[tuple[int, int, Role, int]], held: list[dict[int, int]], data: st.DataObject
) -> None:
    """A placement fits and is whole; a relocation goes to another instance with room, and only of what may move."""
    views = [
        instance(rank, free_blocks=min(free, 2000), rows=rows % 256, role=role, held=at)
        for rank, (free, rows, role, at) in enumerate(rooms)
    ]
    outlook = cell(*views, waiting=data.draw(numbers), mean_tokens=data.draw(numbers))
    missing = data.draw(st.integers(1, 500_000))
    placed = POLICIES[name]().place(Prompt(missing=missing), outlook)
    if placed is not None:
        assert sum(share.tokens for share in placed.shares) == missing
        assert all(share.tokens > 0 for share in placed.shares)
        assert all(0 < blocks <= views[rank].free_blocks for rank, blocks in placed.blocks.items())
        assert views[placed.shares[0].rank].homes < 256
    sequences = []
    for number, parts in enumerate(held):
        there = {rank % len(views): tokens for rank, tokens in parts.items()}
        home = min(there)
        may = data.draw(st.booleans())
        copyable = set(there) - {home} if may else ()
        sequences.append(sequence(there, home=home, seq=number, can_move=may, copyable=copyable))
    found = POLICIES[name]().improve(sequences, outlook)
    if isinstance(found, NewHome):
        moved = sequences[found.seq]
        assert moved.can_move
        assert found.to != moved.home
        assert views[found.to].free_blocks > 0
    elif found is not None:
        moved = sequences[found.seq]
        assert found.source in moved.copyable
        assert found.to != found.source
        assert -(-moved.held[found.source] // 64) <= views[found.to].free_blocks


def test_who_gives_way_is_whoever_is_cheaper_than_stepping_together() -> None:
    """A home is full. 1,000 tokens take 0.1 s to compute again, an exchange 2 ms on two instances for each token left."""
    wanting = Candidate(1, 1, 5000, 0, left=1000)
    young = Candidate(2, 2, 1000, 0, left=10)
    alone = cell(instance(0, rows=2, held=6000), instance(1))
    assert Elastic().gives_way(wanting, [wanting, young], 1, alone) == 2
    assert Elastic().gives_way(wanting, [wanting], 1, alone) is None, "there is no other"
    assert Elastic().gives_way(replace(wanting, left=10), [wanting, young], 1, alone) is None, "it ends soon"
    long = replace(young, tokens=100_000)
    assert Elastic().gives_way(wanting, [wanting, long], 1, alone) is None, "that takes longer"
    shared = cell(instance(0, rows=90, sent=80), instance(1, rows=90, served=80))
    again = replace(young, tokens=4000)
    assert Elastic().gives_way(wanting, [wanting, again], 1, shared) == 2, "or they would exchange rows for ever"
    few = cell(instance(0, rows=2, held=6000), instance(1, rows=2))
    busy = cell(few.views[0], instance(1, rows=2, backlog=10**6))
    slowed = replace(COSTS, decode=replace(COSTS.decode, beside=2.6))
    soon = replace(wanting, left=20)
    assert Elastic().gives_way(soon, [soon, young], 1, replace(few, costs=slowed)) is None
    assert Elastic().gives_way(soon, [soon, young], 1, replace(busy, costs=slowed)) == 2, "all would step beside its prompt"
    assert Infinite().gives_way(wanting, [wanting, young], 1, alone) is None


@pytest.mark.parametrize("policy", ["elastic", "loong"])
def test_a_home_that_is_full_preempts_who_is_cheap_to_compute_again(policy: str) -> None:
    """Two at instance 0, which has no block left; instance 1 has two. Under `elastic` the younger one gives way, under `loong`
    the one that wants a block moves."""
    driver = serving(8, 2, policy=policy)
    for name in ("old", "young"):
        running(driver, name, 8, generated=1, max_tokens=20)
    acts = driver.say(peer(0), beat(0, {1: 9, 2: 9}), m.NeedBlock(epoch=1, seq=1))
    if policy == "elastic":
        assert acts == [pong(0), cancel(0, 2)]
        assert request_stats(driver, "young").state == "preempted"
    else:
        assert acts == [pong(0), reserve_next(1, 1)]


def test_nobody_gives_way_to_a_lower_priority_at_a_full_home() -> None:
    """The one that wants a block comes after the other, though it is older; it moves."""
    driver = serving(8, 2)
    running(driver, "low", 8, generated=1, max_tokens=20, priority=5)
    running(driver, "high", 8, generated=1, max_tokens=20)
    acts = driver.say(peer(0), beat(0, {1: 9, 2: 9}), m.NeedBlock(epoch=1, seq=1))
    assert acts == [pong(0), reserve_next(1, 1)]


def test_a_short_prompt_waits_rather_than_slow_all_down() -> None:
    """No instance alone has room for 20 blocks: it is spread where those that step together then lose less than it gains."""
    busy = cell(instance(0, free_blocks=15, rows=4, held=4000), instance(1, free_blocks=12, rows=4, held=4000))
    slow = replace(COSTS, decode=replace(COSTS.decode, exchange_s=0.006))
    prompt = Prompt(missing=64 * 20)
    assert Elastic().place(prompt, replace(busy, costs=slow)) is None
    assert Loong().place(prompt, replace(busy, costs=slow)) is not None
    few = [replace(view, rows=2) for view in busy.views]
    assert Elastic().place(prompt, cell(*few)) is not None, "a fifth more, and five rows for four"
    assert Elastic().place(prompt, busy) is None, "a fifth more, and nine for eight"
    beside = replace(COSTS, decode=replace(COSTS.decode, beside=2.6))
    assert Elastic().place(prompt, replace(cell(few[0], replace(few[1], backlog=9000)), costs=beside)) is None, "a prompt runs"
    assert Elastic().place(Prompt(missing=64 * 20, spread=2), replace(busy, costs=slow)) is not None, "it was asked for"
    assert Elastic().place(replace(prompt, waited_s=WAITS_S), replace(busy, costs=slow)) is not None, "it has waited"
    elsewhere = cell(*busy.views, instance(2, free_blocks=19), instance(3, free_blocks=18))
    placed = Elastic().place(prompt, replace(elsewhere, costs=slow))
    assert placed is not None
    assert set(placed.blocks) == {2, 3}, "nobody decodes there"
    idle = cell(instance(0, free_blocks=15), instance(1, free_blocks=12))
    assert Elastic().place(prompt, replace(idle, costs=slow)) is not None, "nobody is slowed down"
    long = Prompt(missing=64 * 900)
    roomy = cell(*(replace(view, free_blocks=1000) for view in busy.views))
    for waiting, degree in ((0, 2), (1, 2), (2, 1)):
        placed = Elastic().place(long, replace(roomy, costs=slow, num_waiting=waiting))
        assert placed is not None
        assert len(placed.blocks) == degree, "its first token comes sooner, unless others wait for theirs"
    # alone it takes 20 s or 5, and half of that on two
    soon = replace(slow, prefill=replace(slow.prefill, step_s=0.0, row_s=4 * SOONER_S / long.missing, attended_s=0.0))
    for row_s, degree in ((soon.prefill.row_s, 2), (soon.prefill.row_s / 4, 1)):
        costs = replace(soon, prefill=replace(soon.prefill, row_s=row_s))
        placed = Elastic().place(long, replace(roomy, costs=costs))
        assert placed is not None
        assert len(placed.blocks) == degree, "by so little nobody is slowed down"
    small = cell(*(replace(view, total_blocks=18) for view in busy.views))
    assert Elastic().place(prompt, replace(small, costs=slow)) is not None, "no instance ever holds it"


def test_what_is_shared_from_afar_costs_less_than_it_would_to_compute_it() -> None:
    """2,000 tokens take 0.2 s to compute, an exchange 2 ms of both for each token that is generated."""
    placement = Placement([m.Share(rank=0, tokens=100)], {0: 3})
    prompt = Prompt(missing=100, kept={1: (2000, 1)}, is_shared=True, left=1000)
    for far, left, rows, wanted in (
        (2000, 1000, 90, False),
        (2000, 1000, 0, False),
        (2000, 10, 0, True),
        (300_000, 100, 0, True),
        (300_000, 10_000, 90, False),
    ):
        asked = replace(prompt, kept={1: (far, 1)}, left=left)
        for tied in (0, 1):  # what others lose is no less if they are tied by others already
            views = cell(instance(0, rows=4, held=4000, sent=tied), instance(1, rows=rows, held=1000 * rows, served=tied))
            assert Elastic().reaches_for(asked, placement, {1: far}, views) == wanted, (far, left, rows)
        assert Elastic().reaches_for(replace(asked, spread=1), placement, {1: far}, views)
        assert Loong().reaches_for(asked, placement, {1: far}, views)
    # spread over two, it would tie those together, wherever some of it lies: as one of which nothing lies anywhere
    busy = cell(instance(0, free_blocks=15, rows=4, held=4000), instance(1, free_blocks=12, rows=4, held=4000))
    long = Prompt(missing=64 * 16, kept={1: (640, 1)})
    assert Elastic().place(long, busy) is not None, "its own KV, of which it would lose some"
    assert Elastic().place(replace(long, is_shared=True), busy) is None


def test_a_beginning_that_lies_where_others_are_busy_is_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instance 0 decodes one that begins so, and has no room for more."""
    monkeypatch.setattr("gmanager.cluster.reuse.FAR_TOKENS", 4)
    driver = serving(20, 20)
    running(driver, "doc", prompt=list(range(40)), max_tokens=2, generated=1)
    driver.say(peer(0), m.Cached(epoch=1, shards=[m.KeptShard(seq=1, runs=[[(0, 36)]])]), beat(3))
    (asked,) = driver.say(CLIENT, submit("late", prompt=[*range(40), 8], max_tokens=100))
    assert asked == reserve(1, 2, 12)


def test_one_that_gave_way_comes_again_as_soon_as_there_is_room() -> None:
    """Not only when another has ended, as after a preemption for want of any room in the cell. But there is no room for what
    both generate next: 19 tokens each."""
    driver = serving(20, 2)
    for name in ("old", "young"):
        running(driver, name, 8, generated=1, max_tokens=20)
    assert driver.say(peer(0), beat(0, {1: 9, 2: 9}), m.NeedBlock(epoch=1, seq=1)) == [pong(0), cancel(0, 2)]
    driver.say(peer(0), beat(6), m.Released(epoch=1, seq=2, generated=1))
    acts = driver.say(peer(0), outputs(1, 1, [9]), beat(13))
    assert request_stats(driver, "young").state == "preempted", "3 blocks and one to spare, 5 more each, 1 may be part full"
    assert not any(isinstance(act, Send) and isinstance(act.message, m.Reserve) for act in acts)
    assert driver.say(peer(0), beat(15))[1:] == [reserve(0, 3, 4)]


def test_one_that_gave_way_goes_elsewhere_or_waits_till_nobody_is_there() -> None:
    """What it has computed is still there, so that it needs four blocks beside those that it shares: it came back, and gave way
    again."""
    cached = m.Cached(epoch=1, shards=[m.KeptShard(seq=2, runs=[[(0, 8)]])])
    for elsewhere, wanted in ((2, []), (6, [reserve(1, 3, 4)])):
        driver = serving(20, elsewhere)
        for name in ("old", "young"):
            running(driver, name, 8, generated=1, max_tokens=20)
        driver.say(peer(0), beat(0, {1: 9, 2: 9}), m.NeedBlock(epoch=1, seq=1))
        driver.say(peer(0), cached, beat(9), m.Released(epoch=1, seq=2, generated=1))
        assert driver.say(peer(0), outputs(1, 1, [9]))[1:] == wanted
    driver.say(peer(1), m.NotGranted(epoch=1, seq=3, free_blocks=2))
    assert request_stats(driver, "young").state == "preempted"
    driver.say(peer(0), outputs(1, 2, [2], finish_reason="stop"))
    acts = driver.say(peer(0), m.Released(epoch=1, seq=1, generated=3))
    assert acts == [Send(peer(0), m.Reserve(epoch=1, seq=4, blocks=4, source=2, shared=[[(0, 8)]]))]


def test_what_ends_is_not_moved() -> None:
    """It is preempted, and something of it is new: the gManager ended with "which 'move' does not follow"."""
    driver = serving(30, 30, 30, policy="split")
    admitted = running(driver, "r", 8, generated=1, max_tokens=20)
    (admit,) = [a.message for a in admitted if isinstance(a, Send) and isinstance(a.message, m.Admit)]
    sequences = driver.cluster._cells.sequences["main"]
    sequence = sequences._running[admit.seq]
    assert view_of(sequence, sequences._moves).can_move
    sequence.ending = True
    sequences._unsettled.add([sequence])
    assert sequences._unsettled.ask(sequences._moves, lambda: cell(instance(0), instance(1))) is None


def test_how_many_tokens_are_expected_is_no_more_than_was_seen_if_nobody_said() -> None:
    for max_tokens, left in ((20, 18), (None, 256)):
        driver = serving(200, 200, policy="loong")
        running(driver, "r", 8, generated=2, max_tokens=max_tokens)
        (sequence,) = driver.cluster._cells.sequences["main"]._running.all()
        assert sequence.left == left


def test_what_a_copy_changes_is_counted_without_the_home() -> None:
    """A run that goes to the home is one holder less to visit; to one that has nothing yet, as many as before."""
    views = dict(enumerate((instance(0, rows=1, held=30, sent=2), instance(1, held=10, served=1), instance(2), instance(3))))
    shared = sequence({0: 10, 1: 10, 2: 10})
    assert after(views, shared, NewHolder(7, 1, 0))[0].sent == 1
    assert after(views, shared, NewHolder(7, 1, 2))[0].sent == 1
    moved = after(views, shared, NewHolder(7, 1, 3))
    assert moved[0].sent == 2
    assert (moved[1].served, moved[3].served, moved[3].held) == (0, 1, 10)
