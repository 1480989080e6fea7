"""Derivation of steps: what must hold for any notices."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.layout import HeldRun, Holding, Span
from gmanager.wire.messages import Share
from instance.step import FAR, MAX_PROMPTS, STRETCH, Decode, Notice, Prefill, Step, StepMismatch, derive, split_chunk


def notice(rank: int, **fields: object) -> Notice:
    empty: dict[str, object] = {
        name: []
        for name in ("ready", "decodes", "prefills", "released", "cancels", "handoffs", "last_tokens", "flips", "groupings")
    }
    pace = {"budget": 64, "paced_budget": 64, "reach": FAR, "grain": 1}
    same: dict[str, object] = {"epoch": 1, "lane": "prefill", "party": 2, "step": 3, "digest": [], **pace}
    same |= {"both_lanes": False}
    return Notice(rank=rank, **(same | empty | fields))  # type: ignore[arg-type]


@given(st.integers(0, 50), st.lists(st.tuples(st.integers(0, 120), st.integers(0, 120)), min_size=1, max_size=5))
def test_chunks_cover_a_prefix_once_within_caps(start: int, participants: list[tuple[int, int]]) -> None:
    shares = [tokens for tokens, _ in participants]
    shares[0] += 1  # the home always has the last token to take
    room = [min(tokens, budget) for tokens, (_, budget) in zip(shares, participants, strict=True)]
    caps = [min(room[0], shares[0] - 1), *room[1:]] if len(room) > 1 else room
    end = start + sum(shares)
    spans = split_chunk(start, end, caps, room)
    edges = [start] + [b for _, _, b in spans]
    assert [a for _, a, _ in spans] == edges[:-1]  # contiguous, ascending
    assert edges[-1] <= end
    taken = [sum(b - a for p, a, b in spans if p == i) for i in range(len(shares))]
    assert all(t <= cap for t, cap in zip(taken, room, strict=True))
    if edges[-1] == end:
        assert spans[-1][0] == 0  # the last row is the home's
    elif len(shares) > 1:
        assert taken[0] < shares[0]


def test_causal_work_is_even() -> None:
    spans = split_chunk(0, 4096, [4096, 4096], [4096, 4096])
    assert spans == [(0, 0, 1024), (1, 1024, 3072), (0, 3072, 4096)]  # spans 1 and 2 of 4 are neighbours
    work = [sum((a + b) / 2 * (b - a) for p, a, b in spans if p == i) for i in (0, 1)]
    assert work[0] == work[1]


@given(st.data())
def test_prompts_are_prefilled_exactly_and_none_starves(data: st.DataObject) -> None:
    """Play whole prefills of several prompts over several instances; every token is computed once, by whose share it is."""
    size = data.draw(st.integers(1, 4))
    budgets = [data.draw(st.integers(1, 40)) for _ in range(size)]
    reach, grain = data.draw(st.sampled_from([1, 30, FAR])), data.draw(st.sampled_from([1, 16]))
    is_paced = data.draw(st.booleans())
    prompts = {}
    for seq in range(data.draw(st.integers(1, 4))):
        ranks = data.draw(st.permutations(range(size)))[: data.draw(st.integers(1, size))]
        shares = [Share(rank=r, tokens=data.draw(st.integers(1, 60))) for r in ranks]
        prompts[seq] = (shares, sum(s.tokens for s in shares))
    left = {seq: {s.rank: s.tokens for s in shares} for seq, (shares, _) in prompts.items()}
    at = dict.fromkeys(prompts, 0)
    holdings: dict[int, list[Holding]] = {seq: [] for seq in prompts}
    for _ in itertools.count():
        waiting = [seq for seq in prompts if at[seq] < prompts[seq][1]]
        if not waiting:
            break
        notices = [
            notice(
                rank,
                budget=budgets[rank],
                paced_budget=(budgets[rank] + 1) // 2,
                reach=reach,
                grain=grain,
                both_lanes=is_paced and rank == size - 1,
                ready=[seq for seq in waiting if rank in left[seq]],
                prefills=[
                    Prefill(
                        seq=seq,
                        arrival=seq,
                        gaps=[(at[seq], prompts[seq][1])],
                        shares=[Share(rank=r, tokens=t) for r, t in left[seq].items()],
                        holdings=holdings[seq],
                    )
                    for seq in waiting
                    if prompts[seq][0][0].rank == rank
                ],
            )
            for rank in range(size)
        ]
        step = derive(data.draw(st.permutations(notices)))
        assert step == derive(notices)
        spans = [span for span in step.spans if span.seq in prompts]
        assert spans, "some prompt always goes on"
        for rank in range(size):
            assert sum(s.stop - s.start for s in spans if s.rank == rank) <= budgets[rank]
        for span in spans:
            assert span.start == at[span.seq]
            at[span.seq] = span.stop
            left[span.seq][span.rank] -= span.stop - span.start
            assert left[span.seq][span.rank] >= 0
        for seq in {s.seq for s in spans}:
            holdings[seq] = step.holdings[seq]
            assert (seq in step.sampled) == (at[seq] == prompts[seq][1])
    for seq, (shares, length) in prompts.items():
        assert at[seq] == length
        assert {h.rank: h.tokens for h in holdings[seq]} == {s.rank: s.tokens for s in shares}


def test_a_short_prompt_gets_through_beside_a_long_one() -> None:
    def prefill(seq: int, end: int) -> Prefill:
        return Prefill(seq=seq, arrival=seq, gaps=[(0, end)], shares=[Share(rank=0, tokens=end)], holdings=[])

    step = derive([notice(0, budget=64, ready=[1, 2, 3], prefills=[prefill(1, 1000), prefill(2, 500), prefill(3, 20)])])
    assert step.spans == [Span(3, 0, 0, 20), Span(2, 0, 0, 44)]
    assert step.sampled == [3]


def test_holdings_that_all_know_are_not_repeated() -> None:
    held = [Holding(0, [HeldRun(0, 5, 5)])]
    row = Decode(seq=1, position=5)
    said = derive([notice(0, lane="decode", decodes=[Decode(seq=1, position=5, holdings=held)])])
    assert derive([notice(0, lane="decode", decodes=[row])], {1: held}) == said
    with pytest.raises(StepMismatch, match="rank 0 doesn't say who holds what of sequence 1, and nobody did"):
        derive([notice(0, lane="decode", decodes=[row])])


def test_a_chunk_waits_for_all_participants() -> None:
    prefill = Prefill(
        seq=1, arrival=1, gaps=[(0, 20)], shares=[Share(rank=0, tokens=10), Share(rank=1, tokens=10)], holdings=[]
    )
    home = notice(0, ready=[1], prefills=[prefill])
    assert derive([home, notice(1)]).is_empty()
    assert derive([home, notice(1, ready=[1])]).spans[-1] == Span(1, 0, 15, 20)


def test_members_that_differ_stop() -> None:
    rows = [Decode(seq=1, position=5, holdings=[Holding(0, [HeldRun(0, 5, 5)])])]
    a = derive([notice(0, decodes=rows)])
    b = derive([notice(0, released=[1], decodes=rows)])
    assert a.holdings == {1: [Holding(0, [HeldRun(0, 6, 6)])]}
    with pytest.raises(StepMismatch, match=r"ranks 0 and 1 .* step 3 of party 2: released differ"):
        derive([notice(0, digest=a.digest()), notice(1, digest=b.digest())])
    with pytest.raises(StepMismatch, match="rank 1 is in step 4, rank 0 in 3"):
        derive([notice(0), notice(1, step=4)])
    assert a.digest() == derive([notice(0, decodes=rows)]).digest()
    assert Step.__struct_fields__[4] == "released"


def test_prompts_are_paced_beside_decodes_and_more_so_further_on() -> None:
    """A row after `reach` tokens costs two: 60 rows at the beginning, 30 there, one at least whatever came before."""
    home = [Share(rank=0, tokens=10_000)]

    pace = {"budget": 500, "paced_budget": 60, "reach": 1000}

    def rows(start: int, *, both_lanes: bool) -> int:
        waiting = Prefill(seq=1, arrival=1, gaps=[(start, 10_000)], shares=home, holdings=[])
        step = derive([notice(0, ready=[1], prefills=[waiting], both_lanes=both_lanes, **pace)])
        return sum(span.stop - span.start for span in step.spans)

    assert [rows(start, both_lanes=True) for start in (0, 1000, 5000)] == [60, 30, 10]
    assert rows(1000, both_lanes=False) == 500
    late = Prefill(seq=1, arrival=1, gaps=[(900_000, 999_999)], shares=[Share(rank=0, tokens=99_999)], holdings=[])
    step = derive([notice(0, ready=[1], prefills=[late], both_lanes=True, **pace)])
    assert sum(span.stop - span.start for span in step.spans if span.seq == 1) == 1


def test_what_is_computed_again_is_a_run_beside_those_that_come_later() -> None:
    """Rank 1 is gone with [8, 12) and [16, 20); the rows that compute them again run where later positions lie already."""
    held = [Holding(0, [HeldRun(0, 16, 12)]), Holding(2, [HeldRun(20, 24, 4)])]
    shares = [Share(rank=2, tokens=2), Share(rank=0, tokens=2)]
    gap = Prefill(seq=1, arrival=1, gaps=[(8, 12)], shares=shares, holdings=held)
    step = derive([notice(0, ready=[1]), notice(2, ready=[1], prefills=[gap])])
    assert step.spans == [Span(1, 2, 8, 9), Span(1, 0, 9, 11), Span(1, 2, 11, 12)]
    again = [HeldRun(9, 11, 2), HeldRun(8, 12, 2)]
    assert step.holdings[1] == [Holding(0, [HeldRun(0, 16, 12), again[0]]), Holding(2, [HeldRun(20, 24, 4), again[1]])]
    row = derive([notice(2, decodes=[Decode(seq=1, position=24, holdings=step.holdings[1])])])
    assert row.holdings[1][1] == Holding(2, [HeldRun(20, 25, 5), again[1]])


def test_a_chunk_goes_through_several_gaps() -> None:
    """Of the last row the home keeps one token; of those of other gaps it may have any."""

    def step(budget: int, shares: list[Share], later: int = 0) -> Step:
        gaps = Prefill(seq=1, arrival=1, gaps=[(4, 8), (20, 22), (30, 31)], shares=shares, holdings=[], later=later)
        return derive([notice(0, budget=budget, ready=[1], prefills=[gaps]), notice(1, budget=budget, ready=[1])])

    alone = [Share(rank=0, tokens=7)]
    assert step(64, alone).spans == [Span(1, 0, 4, 8), Span(1, 0, 20, 22), Span(1, 0, 30, 31)]
    assert step(64, alone).sampled == [1]
    assert step(5, alone).spans == [Span(1, 0, 4, 8), Span(1, 0, 20, 21)]
    assert step(5, alone).sampled == []
    both = [Share(rank=0, tokens=1), Share(rank=1, tokens=6)]
    assert step(64, both).spans == [Span(1, 1, 4, 8), Span(1, 1, 20, 22), Span(1, 0, 30, 31)]
    later = step(64, [Share(rank=0, tokens=2), Share(rank=1, tokens=6)], later=1)
    assert sum(span.stop - span.start for span in later.spans if span.rank == 0) == 1, "one is for the last row"
    assert later.sampled == []


def test_rows_of_a_later_gap_cost_what_they_do_there() -> None:
    """Ten at the beginning for ten; then 30 are left, where a row costs three."""
    gaps = Prefill(seq=1, arrival=1, gaps=[(0, 10), (2000, 2100)], shares=[Share(rank=0, tokens=110)], holdings=[])
    pace = {"budget": 500, "paced_budget": 40, "reach": 1000, "both_lanes": True}
    step = derive([notice(0, ready=[1], prefills=[gaps], **pace)])
    assert step.spans == [Span(1, 0, 0, 10), Span(1, 0, 2000, 2010)]


def test_the_rows_left_say_which_prompt_is_short() -> None:
    """Not where they lie: the long one has little left to compute."""
    gaps = [(1000, 1010), (9000, 9010)]
    long = Prefill(seq=1, arrival=1, gaps=gaps, shares=[Share(rank=0, tokens=20)], holdings=[])
    short = Prefill(seq=2, arrival=2, gaps=[(0, 40)], shares=[Share(rank=0, tokens=40)], holdings=[])
    step = derive([notice(0, budget=30, ready=[1, 2], prefills=[long, short])])
    assert [(span.seq, span.start) for span in step.spans][:2] == [(1, 1000), (1, 9000)]
    more = msgspec.structs.replace(long, shares=[Share(rank=0, tokens=50)], later=30)
    step = derive([notice(0, budget=30, ready=[1, 2], prefills=[more, short])])
    assert step.spans[0].seq == 2


def test_holdings_are_told_in_few_bytes() -> None:
    """Of a sequence of a million tokens over two instances, prefilled in any number of chunks."""
    held = [Holding(rank, [HeldRun(rank * 4096, 1_000_000, 500_000)]) for rank in range(2)]
    encoded = msgspec.msgpack.encode(held)
    assert len(encoded) < 40
    assert msgspec.msgpack.decode(encoded, type=list[Holding]) == held


def test_rows_beside_decodes_come_in_grains() -> None:
    """To the nearest, and one at least; but never more than a step may have, or than the prompt has."""

    def rows(start: int, end: int = 10_000, budget: int = 500) -> int:
        waiting = Prefill(seq=1, arrival=1, gaps=[(start, end)], shares=[Share(rank=0, tokens=end - start)], holdings=[])
        pace = {"budget": budget, "paced_budget": 300, "reach": 1000, "grain": 128}
        step = derive([notice(0, ready=[1], prefills=[waiting], both_lanes=True, **pace)])
        return sum(span.stop - span.start for span in step.spans if span.seq == 1)

    assert [rows(start) for start in (0, 400, 600, 1000, 9000)] == [256, 256, 128, 128, 128]
    assert rows(0, end=200) == 200
    assert rows(0, budget=250) == 250


def test_a_step_has_rows_of_so_many_prompts_at_most() -> None:
    """Each may end in it, and its logits take memory: `MAX_SAMPLES` of the scheduler counts on this."""
    waiting = [
        Prefill(seq=i, arrival=i, gaps=[(0, 1)], shares=[Share(rank=0, tokens=1)], holdings=[]) for i in range(MAX_PROMPTS + 9)
    ]
    step = derive([notice(0, budget=5000, ready=[p.seq for p in waiting], prefills=waiting)])
    assert len(step.spans) == len(step.sampled) == MAX_PROMPTS
    assert 0 in step.sampled, "of those with the same slack the oldest goes first"


@given(st.data())
def test_a_prompts_wait_is_bounded_whatever_comes(data: st.DataObject) -> None:
    """When it has waited for STRETCH times its own steps, none that comes goes before it; and the first is promised half."""
    budget = data.draw(st.integers(1, 30))
    sizes = data.draw(st.lists(st.lists(st.integers(1, 60), max_size=3), min_size=1, max_size=40))
    came = {(step, i): size for step, each in enumerate(sizes) for i, size in enumerate(each)}
    names = {name: seq for seq, name in enumerate(sorted(came))}
    at = dict.fromkeys(came, 0)
    ended: dict[tuple[int, int], int] = {}
    for now in itertools.count():
        waiting = [name for name in came if name[0] <= now and name not in ended]
        if not waiting and now >= len(sizes):
            break
        prefills = [
            Prefill(
                seq=names[name],
                arrival=names[name],
                gaps=[(at[name], came[name])],
                shares=[Share(rank=0, tokens=came[name] - at[name])],
                holdings=[],
                waited=now - name[0],
            )
            for name in waiting
        ]
        step = derive([notice(0, budget=budget, ready=list(names.values()), prefills=prefills)])
        rows = {span.seq: span.stop for span in step.spans}
        for name in waiting:
            at[name] = rows.get(names[name], at[name])
            if at[name] == came[name]:
                ended[name] = now
    for name, size in came.items():
        late = name[0] + STRETCH * size // budget + 1
        before = [came[other] for other in came if other[0] <= late]
        assert ended[name] <= late + sum(-(-size // -(-budget // 2)) for size in before)


@pytest.mark.parametrize("is_paced", [False, True])
def test_a_short_prompt_that_comes_goes_before_a_long_one_until_that_is_late(is_paced: bool) -> None:
    """Both take as many steps as their rows need, though a paced step would pay for more of them."""
    pace = {"budget": 64, "paced_budget": 192, "reach": 1000, "both_lanes": is_paced}

    def spans(waited: int) -> dict[int, int]:
        long = Prefill(seq=1, arrival=1, gaps=[(0, 640)], shares=[Share(rank=0, tokens=640)], holdings=[], waited=waited)
        short = Prefill(seq=2, arrival=2, gaps=[(0, 62)], shares=[Share(rank=0, tokens=62)], holdings=[])
        return {span.seq: span.stop for span in derive([notice(0, ready=[1, 2], prefills=[long, short], **pace)]).spans}

    assert spans(STRETCH * 9) == {2: 62, 1: 2}
    assert spans(STRETCH * 10) == {2: 32, 1: 32}
