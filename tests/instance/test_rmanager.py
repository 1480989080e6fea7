"""What an instance holds through the ends of epochs, beside a model of it in plain dicts."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instance.rmanager import RManager
from kvstore.tier_jobs import TierJobs
from kvstore.tiers import Tiers


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


def written(rmanager: RManager, seq: int, tokens: int) -> None:
    """A sequence whose first tokens are all here."""
    assert rmanager.reserve(seq, -(-tokens // rmanager.shards.block_size))
    rmanager.append(seq, 0, tokens)


def caching(num_blocks: int, block_size: int = 4) -> RManager:
    rmanager = RManager(num_blocks, block_size)
    rmanager.caches = True
    return rmanager


def test_a_prompt_is_shared_once_it_is_written_and_after_its_sequence_has_ended() -> None:
    rmanager = caching(10)
    written(rmanager, 1, 11)
    assert not rmanager.share(2, 1, [[(0, 8)]]), "it may not be written"
    rmanager.publish(1, 10)
    assert rmanager.take_reusable() == {1: [[(0, 8)]]}
    assert rmanager.share(2, 1, [[(0, 8)]])
    assert rmanager.free_blocks == 7
    rmanager.append(1, 11, 12)
    assert not rmanager.share(3, 1, [[(0, 12)]]), "the last is no part of the prompt"
    rmanager.take_changes()
    rmanager.retire(1)
    assert rmanager.freed and rmanager.take_changes() == {1: 0}
    assert rmanager.take_reusable() == {1: [[(0, 12)]]}
    assert (rmanager.free_blocks, rmanager.cached_blocks) == (8, 1)
    rmanager.validate()
    rmanager.drop(2)
    assert (rmanager.free_blocks, rmanager.cached_blocks) == (10, 3)
    rmanager.discard(1)
    assert rmanager.shards.pool.num_free == 10
    rmanager.validate()


def test_a_reuse_is_undone_until_its_sequence_begins() -> None:
    rmanager = caching(4)
    written(rmanager, 1, 8)
    rmanager.retire(1)
    assert rmanager.share(2, 1, [[(0, 8)]]) and rmanager.reserve(2, 1)
    rmanager.drop(2)
    assert rmanager.shard(2) is None
    assert rmanager.share(3, 1, [[(0, 4)]]) and rmanager.reserve(3, 1)
    rmanager.wake(3, 8)
    rmanager.drop(3)
    assert rmanager.ranges(3) == [[(0, 4)]], "it has begun"
    assert not rmanager.reserve(4, 3)
    assert rmanager.reserve(4, 2), "what only the cached one has makes room"
    assert rmanager.take_reusable() == {1: [[(0, 4)]]}
    assert rmanager.evicted_blocks == 1
    rmanager.validate()


def test_cached_shards_outlast_an_epoch_if_they_are_wanted() -> None:
    rmanager = caching(12)
    for seq in (1, 2):
        written(rmanager, seq, 8)
        rmanager.retire(seq)
    written(rmanager, 3, 6)
    rmanager.publish(3, 5)
    assert rmanager.share(4, 1, [[(0, 8)]]), "admitted"
    rmanager.wake(4, 9)
    assert rmanager.share(5, 1, [[(0, 8)]]), "not admitted when the epoch ends"
    assert rmanager.settle([]) == {3: [[(0, 6)]], 4: [[(0, 8)]]}
    assert rmanager.cached() == {2: [[(0, 8)]], 1: [[(0, 8)]]}, "1 was of use after 2"
    assert rmanager.take_reusable() == {}
    assert rmanager.shared_ends() == {4: 8}
    assert not rmanager.share(6, 3, [[(0, 4)]]), "nobody knows of it in the next epoch"
    rmanager.keep([1, 4])
    assert rmanager.cached() == {1: [[(0, 8)]]}
    assert rmanager.ranges(3) == []
    with pytest.raises(ValueError, match="shares its blocks up to position 8, and can't be cut at 7"):
        rmanager.wake(4, 7)
    rmanager.wake(4, 8)
    rmanager.validate()


def test_without_caching_nothing_is_kept() -> None:
    rmanager = RManager(4, 4)
    written(rmanager, 1, 8)
    rmanager.publish(1, 7)
    assert not rmanager.share(2, 1, [[(0, 4)]])
    rmanager.retire(1)
    assert rmanager.take_reusable() == {}
    assert rmanager.shards.pool.num_free == 4
    rmanager.validate()


def test_what_lies_below_is_told_and_not_shared() -> None:
    rmanager = RManager(4, 4, Tiers({"host": 4}))
    rmanager.caches = True
    written(rmanager, 1, 12)
    rmanager.retire(1)
    jobs = TierJobs(rmanager.shards, batch=8)
    down = jobs.next()
    assert down is not None and len(down.items) == 3
    jobs.end([7, 8, 9])
    assert rmanager.take_reusable() == {1: [[(0, 12)]]}
    assert rmanager.below(1) == []
    assert rmanager.reserve(2, 3)
    assert rmanager.take_reusable() == {1: [[(0, 12)]]}
    assert rmanager.below(1) == [8]
    assert not rmanager.share(3, 1, [[(0, 12)]])
    assert rmanager.share(3, 1, [[(0, 4)]])
    assert rmanager.shares(3) == rmanager.shards[3].block_ids
    rmanager.keep([])
    assert rmanager.shards.cache.tiers.num_copies("host") == 1, "that of the block which is shared"
    rmanager.validate()
