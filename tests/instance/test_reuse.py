"""A sequence that begins with blocks of another: what its scheduler and rManager make of it, step by step."""

import pytest

from gmanager.wire.messages import KeptPart, Share
from instance.step import StepMismatch
from tests.instance.scheduler_support import FakeCell, token_at


def caching(size: int, blocks: int) -> FakeCell:
    cell = FakeCell(size, blocks=blocks, block_size=4, chunk_tokens=64)
    for instance in cell.instances:
        instance.rmanager.caches = True
    return cell


def two_spans() -> FakeCell:
    """Sequence 1, 14 tokens of which the second instance has computed 8 to 11 and the first the rest."""
    cell = caching(2, 12)
    assert cell.admit(1, [Share(rank=0, tokens=10), Share(rank=1, tokens=4)], 6, [])
    return cell


def reusable(cell: FakeCell) -> list[dict[int, list[list[tuple[int, int]]]]]:
    return [instance.rmanager.take_reusable() for instance in cell.instances]


def share(cell: FakeCell, seq: int, parts: dict[int, list[list[tuple[int, int]]]]) -> list[KeptPart]:
    """As instances do it with a Reserve."""
    for rank, runs in parts.items():
        assert cell.instances[rank].rmanager.share(seq, 1, runs)
    return [KeptPart(rank=rank, runs=runs) for rank, runs in parts.items()]


def test_a_prompt_can_be_shared_when_its_last_row_has_run_and_not_before() -> None:
    cell = two_spans()
    assert reusable(cell) == [{}, {}]
    told = [{}, {}]
    while not any(told):
        assert not cell.outputs[1]
        assert not any(i.rmanager.share(9, 1, [[(0, 4)]]) for i in cell.instances)
        assert cell.round()
        told = reusable(cell)
    while not all(told):
        cell.round()
        told = [one or more for one, more in zip(told, reusable(cell), strict=True)]
    positions = sorted(p for part in told for run in part[1] for a, b in run for p in range(a, b))
    assert len(positions) in (8, 12) and max(positions) <= 12
    assert len(cell.outputs[1]) <= 1


def test_only_what_lacks_is_computed_and_nothing_is_written_twice() -> None:
    cell = two_spans()
    while cell.round():
        pass
    for instance in cell.instances:
        instance.rmanager.validate()
        assert instance.rmanager.free_blocks == 12
        assert not len(instance.rmanager.shards), "all that is left is cached"
    left = {rank: part[1] for rank, part in enumerate(reusable(cell)) if part}
    whole = sum(b - a for runs in left.values() for run in runs for a, b in run)
    assert whole == 16, "14 of its prompt and 5 of its answer in whole blocks"
    prefilled = sum(i.scheduler.tally.tokens_prefilled for i in cell.instances)
    kept = share(cell, 2, left)
    assert cell.admit(2, [Share(rank=1, tokens=5)], 7, [], kept=kept)
    shared = [{b for run in i.rmanager.shards[2].runs for b in run.block_ids} for i in cell.instances]
    while cell.round():
        written = [
            {b for run in i.rmanager.shards[2].runs for b in run.block_ids} if 2 in i.rmanager.shards else set()
            for i in cell.instances
        ]
        assert all(not now or before <= now for before, now in zip(shared, written, strict=True))
        for instance in cell.instances:
            instance.rmanager.validate()
    assert sum(i.scheduler.tally.tokens_prefilled for i in cell.instances) == prefilled + 5
    assert [cell.outputs[2][i] for i in range(7)] == [token_at(2, 16 + 5 + i) for i in range(7)]
    assert all(1 in i.rmanager.shards.cache and 2 in i.rmanager.shards.cache for i in cell.instances)
    cell.check_empty()


def test_what_is_cancelled_before_its_prompt_is_computed_leaves_nothing() -> None:
    cell = FakeCell(2, blocks=12, block_size=4, chunk_tokens=2)
    for instance in cell.instances:
        instance.rmanager.caches = True
    assert cell.admit(1, [Share(rank=0, tokens=10), Share(rank=1, tokens=4)], 6, [])
    cell.round()
    cell.instances[0].scheduler.cancel(1)
    while cell.round():
        pass
    assert [i.rmanager.shards.pool.num_free for i in cell.instances] == [12, 12]
    assert reusable(cell) == [{}, {}]
    cell.check_empty()


def test_what_is_told_must_be_what_was_granted() -> None:
    cell = two_spans()
    while cell.round():
        pass
    left = {rank: part[1] for rank, part in enumerate(reusable(cell)) if part}
    share(cell, 2, left)
    wrong = [KeptPart(rank=rank, runs=[[(0, 4)]]) for rank in left]
    with pytest.raises(StepMismatch, match="is told that it has kept"):
        cell.admit(2, [Share(rank=0, tokens=5)], 7, [], kept=wrong)
