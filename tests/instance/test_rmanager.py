"""What an instance holds through the ends of epochs, beside a model of it in plain dicts."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instance.rmanager import RManager


@dataclass
class Modelled:
    """A shard."""

    runs: list[list[int]] = field(default_factory=list)
    """Positions, in the order of their blocks."""
    spare: int = 0
    is_dormant: bool = False

    def blocks(self, size: int) -> int:
        return self.spare + sum(-(-len(run) // size) for run in self.runs)

    def append(self, positions: list[int], size: int) -> None:
        """Into the run to end last before them."""
        before = self.blocks(size)
        open_ = [run for run in self.runs if run[-1] < positions[0]]
        if not open_:
            open_ = [[]]
            self.runs += open_
        max(open_, key=lambda run: run[-1:]).extend(positions)
        self.spare -= self.blocks(size) - before

    def keep(self, run_positions: list[list[int]]) -> None:
        self.runs = [run for run in run_positions if run]


def ranges(positions: list[int]) -> list[tuple[int, int]]:
    edges = [p for p in positions if p - 1 not in positions], [p + 1 for p in positions if p + 1 not in positions]
    return list(zip(*edges, strict=True))


@given(st.data())
def test_kv_through_epochs(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 3, 4]))
    rmanager = RManager(60, size)
    model: dict[int, Modelled] = {}
    told: dict[int, int] = {}
    for _ in range(data.draw(st.integers(0, 30))):
        seq = data.draw(st.sampled_from([1, 2, 3]))
        shard = model.get(seq)
        match data.draw(
            st.sampled_from(["reserve"] * 2 + ["append"] * 5 + ["settle"] * 2 + ["keep", "discard", "wake", "drop"])
        ):
            case "reserve":
                blocks = data.draw(st.integers(0, 4))
                if rmanager.reserve(seq, blocks):
                    model.setdefault(seq, Modelled()).spare += blocks
            case "append" if shard is not None and not shard.is_dormant:
                start = data.draw(st.integers(0, 40))
                positions = list(range(start, start + data.draw(st.integers(1, 6))))
                if not {p for run in shard.runs for p in run} & set(positions):
                    if not rmanager.shards[seq].can_append(start, positions[-1] + 1):
                        continue
                    rmanager.append(seq, start, positions[-1] + 1)
                    shard.append(positions, size)
            case "settle":
                places = st.tuples(st.sampled_from([1, 2, 3]), st.integers(0, 45))
                uncertain = [
                    (s, p) for s, p in data.draw(st.lists(places, max_size=4)) if s in model and not model[s].is_dormant
                ]
                kept = rmanager.settle(uncertain)
                for s, one in model.items():
                    gone = {p for other, p in uncertain if other == s}
                    one.keep([run[: next((i for i, p in enumerate(run) if p in gone), len(run))] for run in one.runs])
                    one.spare, one.is_dormant = 0, True
                model = {s: one for s, one in model.items() if one.runs}
                assert kept == {s: [ranges(run) for run in one.runs] for s, one in model.items()}
            case "keep":
                wanted = data.draw(st.lists(st.sampled_from([1, 2, 3])))
                rmanager.keep(wanted)
                model = {s: one for s, one in model.items() if s in wanted or not one.is_dormant}
            case "discard":
                rmanager.discard(seq)
                if shard is not None and shard.is_dormant:
                    del model[seq]
            case "wake":
                end = data.draw(st.integers(0, 45))
                rmanager.wake(seq, end)
                if shard is not None and shard.is_dormant:
                    shard.keep([[p for p in run if p < end] for run in shard.runs])
                    shard.is_dormant = False
                    if not shard.blocks(size):
                        del model[seq]
            case "drop":
                rmanager.drop(seq)
                if shard is not None and shard.is_dormant:
                    shard.spare = 0
                elif shard is not None and not shard.runs:
                    del model[seq]
        rmanager.validate()
        assert list(rmanager.shards) == list(model)
        assert all(rmanager.ranges(s) == [ranges(run) for run in one.runs] for s, one in model.items())
        used = {s: one.blocks(size) for s, one in model.items()}
        assert {s: len(rmanager.shards[s].block_ids) for s in model} == used
        told |= rmanager.take_changes()
        assert {s: n for s, n in told.items() if n} == {s: n for s, one in model.items() if (n := sum(map(len, one.runs)))}
        free = rmanager.free_blocks
        assert free == 60 - sum(used.values())


def test_what_frees_blocks_says_so() -> None:
    """Somebody may wait for them."""
    rmanager = RManager(8, 4)

    def freed() -> bool:
        was, _ = rmanager.freed, rmanager.take_changes()
        return was

    assert rmanager.reserve(1, 3)
    rmanager.append(1, 0, 6)
    assert rmanager.settle([]) == {1: [[(0, 6)]]}
    assert freed()
    rmanager.drop(1)
    assert not freed()
    assert rmanager.reserve(1, 1)
    rmanager.drop(1)
    assert freed()
    rmanager.keep([1])
    assert not freed()
    rmanager.wake(1, 5)
    assert not freed(), "its block is still in use"
    rmanager.drop(1)
    rmanager.discard(1)
    assert rmanager.ranges(1) == [[(0, 5)]], "it isn't dormant any more"
    assert rmanager.settle([(1, 4)]) == {1: [[(0, 4)]]}
    assert freed()
    rmanager.discard(1)
    assert freed()
    rmanager.validate()
    rmanager._dormant[1] = None
    with pytest.raises(RuntimeError, match=r"sequences \[1\] are dormant and hold nothing"):
        rmanager.validate()


def test_a_run_moves_from_one_pool_to_another() -> None:
    """Its blocks stay where they were until the step that flips it has run; those of the copy aren't the sequence's before."""
    here, there = RManager(8, 4), RManager(8, 4)
    here.reserve(1, 3)
    here.append(1, 0, 10)
    assert there.reserve(50, 3)
    assert not there.adopt(50, 1), "nothing was copied"
    there.note_copy(50, here.ranges(1)[0])
    there.note_copy(51, [(0, 4)])
    there.take_changes()
    here.take_changes()
    assert there.adopt(50, 1)
    here.detach(50, 1, 0)
    assert (here.take_changes(), there.take_changes()) == ({1: 0}, {1: 10})
    assert here.free_blocks == 5
    here.validate()
    here.let_go(50)
    assert here.freed
    assert here.free_blocks == 8
    there.drop(50)
    assert there.ranges(1) == [[(0, 10)]]
    for account in (here, there):
        account.free(1)
        account.validate()
        assert account.free_blocks == 8


def test_a_copy_that_nobody_adopts_goes() -> None:
    account = RManager(8, 4)
    for move in (50, 51):
        account.reserve(move, 2)
        account.note_copy(move, [(0, 8)])
    account.drop(50)
    assert not account.adopt(50, 1)
    assert account.settle([]) == {}
    assert not account.adopt(51, 1)
    assert account.free_blocks == 8


def test_an_epoch_that_ends_in_a_flip_leaves_the_run_here() -> None:
    account = RManager(8, 4)
    account.reserve(1, 3)
    account.append(1, 0, 6)
    account.detach(50, 1, 0)
    assert account.settle([]) == {1: [[(0, 6)]]}
    account.wake(1, 20, [])
    account.validate()
    assert account.free_blocks == 8
