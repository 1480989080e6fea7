"""What is left of sequences' KV when an instance is lost: the next epoch goes on from there, as if nothing had happened."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmanager.cluster.prefixes import first_gap
from gmanager.wire.messages import Admit, KeptPart, SequenceParams, Share, pack_tokens
from instance.plan import Pace
from instance.rmanager import RManager
from instance.scheduler import Scheduler
from instance.step import StepMismatch
from kvstore.sight import Sight
from tests.instance.scheduler_support import WINDOWS, FakeCell, Runs, positions_of, token_at


def cut(runs: Runs, end: int) -> Runs:
    """Without positions from `end` on."""
    cut_ = [[(a, min(b, end)) for a, b in run if a < end] for run in runs]
    return [run for run in cut_ if run]


def draw_shares(data: st.DataObject, tokens: int, size: int) -> list[Share]:
    """Of so many tokens, over some of the instances; the home has one at least."""
    ranks = data.draw(st.permutations(range(size)))[: data.draw(st.integers(1, min(size, tokens)))]
    cuts = sorted(data.draw(st.permutations(range(1, tokens)))[: len(ranks) - 1])
    edges = [0, *cuts, tokens]
    return [Share(rank=r, tokens=b - a) for r, a, b in zip(ranks, edges, edges[1:], strict=False)]


def draw_cell(data: st.DataObject, size: int, windows: Sequence[Sight] = ()) -> FakeCell:
    return FakeCell(
        size,
        blocks=400,
        block_size=data.draw(st.sampled_from([1, 4, 16])),
        chunk_tokens=data.draw(st.sampled_from([1, 7, 64])),
        attends=True,
        windows=windows,
    )


def goes_on(data: st.DataObject, cell: FakeCell) -> Callable[[int], None]:
    """Steps of a cell, whole rounds or in any order."""
    in_any_order = data.draw(st.booleans())

    def go_on(most: int) -> None:
        for _ in range(data.draw(st.integers(0, most * (4 if in_any_order else 1)))):
            if not in_any_order:
                cell.round()
            elif moves := cell.moves_on():
                data.draw(st.sampled_from(moves))()

    return go_on


def admit_again(
    data: st.DataObject,
    cell: FakeCell,
    seq: int,
    kept: Sequence[Mapping[int, Runs]],
    tokens: int,
    max_tokens: int,
    go_on: Callable[[int], None],
) -> int:
    """A sequence with so many tokens goes on from what each rank has kept: how many are computed again."""
    parts: list[KeptPart] = []
    taken: set[int] = set()
    for rank, all_ in enumerate(kept):
        runs = [run for run in cut(all_.get(seq, []), tokens - 1) if taken.isdisjoint(positions_of([run])[0])]
        if runs and data.draw(st.integers(0, 9)):
            parts.append(KeptPart(rank=rank, runs=runs))
            taken.update(p for run in positions_of(runs) for p in run)  # a run may be here and where it was to go
    since = max((cell.instances[part.rank].rmanager.since(seq) for part in parts), default=0)
    if since > first_gap({part.rank: part.runs for part in parts}):
        parts = []
    for rank in set(cell.members) - {part.rank for part in parts}:
        cell.instances[rank].rmanager.discard(seq)
    missing = tokens - sum(len(run) for part in parts for run in positions_of(part.runs))
    assert cell.admit(seq, draw_shares(data, missing, len(kept)), max_tokens, [], parts, lambda: go_on(2))
    return missing


def check_ends(cell: FakeCell, wanted: Mapping[int, tuple[int, int]]) -> None:
    """All sequences (seq -> prompt's length, tokens to generate) have run to their ends, and nothing is left of them."""
    for _ in range(5000):
        if not (moves := cell.moves_on()):
            break
        moves[0]()
    cell.drain()
    for seq, (length, max_tokens) in wanted.items():
        assert cell.outputs[seq] == {i: token_at(seq, length + i) for i in range(max_tokens)}
        for instance in cell.instances:
            instance.rmanager.drop(seq)  # reserved for a move that never came
    cell.drop_copies()
    assert cell.finished == dict.fromkeys(wanted, "length")
    assert not cell.needs
    cell.check_empty()


@settings(max_examples=150)
@given(st.data())
def test_a_sequence_goes_on_from_any_of_its_kv(data: st.DataObject) -> None:
    """Pieces of it lie anywhere, in runs of any order, and the rest is in no place."""
    size = data.draw(st.integers(1, 3))
    cell = draw_cell(data, size)
    wanted: dict[int, tuple[int, int]] = {}
    for seq in range(1, data.draw(st.integers(1, 3)) + 1):
        lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
        edges = [0, *(sum(lengths[: i + 1]) for i in range(len(lengths)))]
        wanted[seq] = (edges[-1], data.draw(st.integers(1, 6)))
        pieces = list(pairwise(edges))
        for start, end in data.draw(st.permutations(pieces)):
            rank = data.draw(st.integers(-1, size - 1))
            if rank < 0:
                continue  # of a lost instance
            instance = cell.instances[rank]
            assert instance.rmanager.reserve(seq, end - start)
            slots = instance.rmanager.append(seq, start, end)
            instance.kv |= zip(slots, ((seq, p) for p in range(start, end)), strict=True)
            instance.certain |= {(seq, p) for p in range(start, end)}
    kept = cell.lose(data.draw(st.permutations(cell.instances)), list(wanted))
    go_on = goes_on(data, cell)
    missing = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("instance.scheduler.MAX_GAPS", data.draw(st.sampled_from([1, 2, 32])))
        for seq, (length, max_tokens) in wanted.items():
            missing += admit_again(data, cell, seq, kept, length, max_tokens, go_on)
            go_on(4)
        check_ends(cell, wanted)
    assert sum(instance.scheduler.tally.tokens_prefilled for instance in cell.instances) == missing


@settings(max_examples=200)
@given(st.data())
def test_losses_change_no_token(data: st.DataObject) -> None:
    """Steps are under way when an instance goes; those left have other ranks then, and sequences other shares and homes."""
    cell = draw_cell(data, data.draw(st.integers(2, 3)), data.draw(st.sampled_from(WINDOWS)))
    go_on = goes_on(data, cell)
    wanted: dict[int, tuple[int, int]] = {}

    def newcomers() -> int:
        """They come, homes move; how many tokens they have."""
        come = data.draw(st.integers(0 if wanted else 1, 2))
        for seq in range(len(wanted) + 1, len(wanted) + 1 + come):
            wanted[seq] = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 10))
            length, max_tokens = wanted[seq]
            assert cell.admit(seq, draw_shares(data, length, len(cell.members)), max_tokens, [])
            go_on(6)
            live = [seq for seq in wanted if seq not in cell.finished]
            if live and data.draw(st.booleans()):
                cell.move(data.draw(st.sampled_from(live)), data.draw(st.sampled_from(cell.members)))
            for moved in live:
                if data.draw(st.booleans()):
                    source, target = data.draw(st.permutations(cell.members))[:2] if len(cell.members) > 1 else (0, 0)
                    cell.copy(moved, source, target, data.draw(st.integers(0, 2)))
                if data.draw(st.booleans()):
                    cell.flip(moved)
        go_on(6)
        return sum(length for length, _ in list(wanted.values())[-come:]) if come else 0

    missing = newcomers()
    for _ in range(data.draw(st.integers(1, len(cell.members) - 1))):
        left = data.draw(st.permutations(cell.instances))[1:]
        keep = [seq for seq in wanted if seq not in cell.finished and data.draw(st.integers(0, 9))]
        kept = cell.lose(left, keep, are_heard=data.draw(st.booleans()))
        missing = 0
        for seq, (length, max_tokens) in wanted.items():
            known = len(cell.outputs[seq])
            if seq not in cell.finished:
                missing += admit_again(data, cell, seq, kept, length + known, max_tokens - known, go_on)
            for instance in cell.instances:
                instance.rmanager.discard(seq)
        missing += newcomers()
    check_ends(cell, wanted)
    assert sum(instance.scheduler.tally.tokens_prefilled for instance in cell.instances) == missing


def test_only_what_went_with_the_lost_is_computed_again() -> None:
    """Of two chunks over two instances and the rows that follow; what the last step wrote isn't certain."""
    cell = FakeCell(2, blocks=20, block_size=4, chunk_tokens=8, attends=True)
    assert cell.admit(1, [Share(rank=0, tokens=16), Share(rank=1, tokens=16)], 20, [])
    while len(cell.outputs[1]) < 6:
        cell.round()
    (kept,) = cell.lose(cell.instances[:1], [1])
    assert kept == {1: [[(0, 4), (12, 20), (28, 37)]]}, "the token at 37 is known, its row was under way"
    part = KeptPart(rank=0, runs=kept[1])
    assert cell.admit(1, [Share(rank=0, tokens=17)], 14, [], [part])
    (instance,) = cell.instances
    home = instance.scheduler._homes[1]
    chunks: list[list[int]] = []
    for start in (4, 20, 37):
        assert (home.position, home.in_prefill) == (start, True)
        cell.round()
        chunks.append([position for _, position in instance.running["prefill"][-1].rows])
    assert chunks == [[*range(4, 12)], [*range(20, 28)], [37]]
    assert (home.position, home.in_prefill) == (38, False)
    check_ends(cell, {1: (32, 20)})


def test_a_token_is_not_certain_behind_one_that_is_not() -> None:
    """The new home's lane for rows may be ahead of its lane for prompts, in telling which steps have run."""
    rmanager = RManager(10, 4)
    assert rmanager.reserve(1, 3)
    rmanager.append(1, 2, 4)
    rmanager.append(1, 6, 9)
    rmanager.append(1, 0, 1)
    assert rmanager.settle([(1, 6), (2, 0)]) == {1: [[(2, 4)], [(0, 1)]]}


def admit(**fields: object) -> Admit:
    """Of six tokens, of which rank 0 has kept the third and the fourth."""
    usual: dict[str, object] = {"kept": [KeptPart(rank=0, runs=[[(2, 4)]])], "shares": [Share(rank=0, tokens=4)]}
    params = SequenceParams(max_tokens=1, temperature=0, top_k=0, top_p=1, seed=0, stop_token_ids=[], logprobs=None)
    usual |= {"epoch": 2, "seq": 1, "arrival": 1, "token_ids": pack_tokens(range(6)), "params": params}
    return Admit(**(usual | fields))  # type: ignore[arg-type]


def waking() -> Scheduler:
    rmanager = RManager(10, 4)
    assert rmanager.reserve(1, 1)
    rmanager.append(1, 2, 4)
    rmanager.settle([])
    return Scheduler(epoch=2, rank=0, pace=Pace(8, 8), rmanager=rmanager)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"kept": []}, "6 tokens, of which 0 were kept, 4 are shared out and 6 are missing"),
        ({"kept": [KeptPart(rank=0, runs=[[(2, 3)], [(3, 4)]])]}, r"told that it has kept \[\[\(2, 3\)\], \[\(3, 4\)\]\]"),
        ({"token_ids": pack_tokens(range(4))}, r"it has kept \[\[\(2, 3\)\]\]"),
        ({"shares": [Share(rank=0, tokens=3)]}, "6 tokens, of which 2 were kept, 3 are shared out and 4 are missing"),
        (
            {"kept": [KeptPart(rank=0, runs=[[(2, 4)]]), KeptPart(rank=1, runs=[[(3, 4)]])]},
            "6 tokens, of which 3 were kept, 4 are shared out and 4 are missing",
        ),
        (
            {
                "kept": [KeptPart(rank=0, runs=[[(2, 4)]]), KeptPart(rank=1, runs=[[(4, 6)]])],
                "shares": [Share(rank=0, tokens=2)],
            },
            r"missing, in \[\(0, 2\)\]",
        ),
    ],
)
def test_what_is_told_must_be_here_and_complete(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(StepMismatch, match=reason):
        waking().admit(admit(**fields))


def test_no_prompt_is_scored_in_part() -> None:
    params = SequenceParams(
        max_tokens=1, temperature=0, top_k=0, top_p=1, seed=0, stop_token_ids=[], logprobs=None, prompt_logprobs=0
    )
    with pytest.raises(StepMismatch, match="2 tokens were kept, and log-probabilities of all are wanted"):
        waking().admit(admit(params=params))


def test_what_waits_for_an_instance_that_has_not_heard_goes_on_when_it_has() -> None:
    """Rank 1 has no share, and KV beyond what the sequence goes on with: only its Admit tells it so."""
    cell = FakeCell(2, blocks=20, block_size=4, chunk_tokens=64, attends=True)
    for instance, (start, end) in zip(cell.instances, [(0, 4), (4, 9)], strict=True):
        assert instance.rmanager.reserve(1, 2)
        slots = instance.rmanager.append(1, start, end)
        instance.kv |= zip(slots, ((1, p) for p in range(start, end)), strict=True)
        instance.certain |= {(1, p) for p in range(start, end)}
    cell.lose(cell.instances, [1])
    parts = [KeptPart(rank=0, runs=[[(0, 4)]]), KeptPart(rank=1, runs=[[(4, 6)]])]
    prefilled: list[int] = []

    def step() -> None:
        for _ in range(4):
            cell.round()
        prefilled.append(cell.instances[0].scheduler.tally.tokens_prefilled)

    assert cell.admit(1, [Share(rank=0, tokens=1)], 3, [], parts, step)
    assert prefilled == [0, 1]
    check_ends(cell, {1: (7, 3)})


def test_a_sequence_that_wakes_can_be_cancelled() -> None:
    cell = FakeCell(2, blocks=20, block_size=4, chunk_tokens=1, attends=True)
    assert cell.admit(1, [Share(rank=0, tokens=6), Share(rank=1, tokens=6)], 3, [])
    for _ in range(5):
        cell.round()
    kept = cell.lose(cell.instances, [1])
    parts = [KeptPart(rank=rank, runs=all_[1]) for rank, all_ in enumerate(kept)]
    missing = 12 - sum(len(run) for part in parts for run in positions_of(part.runs))
    assert 0 < missing < 12
    assert cell.admit(1, [Share(rank=1, tokens=missing)], 3, [], parts)
    cell.round()
    for instance in cell.instances:  # neither may know that the other tells it, too
        instance.scheduler.cancel(1)
    cell.drain()
    assert 1 in cell.released
    assert not cell.outputs[1]
    cell.check_empty()
