"""What goes below the pool and comes back: beside a model of all bytes, whatever is evicted, broken or freed meanwhile."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.kv_blocks import FP8
from kvstore.checksum import checksum_of
from kvstore.format import KVFormat
from kvstore.prefix import MOST_SPARE, CachedRun
from kvstore.ranges import join_ranges, split_tokens, whole_blocks
from kvstore.shard import ShardTable
from kvstore.storage import KVStorage
from kvstore.tier_jobs import MARGIN_BLOCKS, TierJobs
from kvstore.tier_storage import TierStorage, slot_bytes
from kvstore.tiers import Copying, Fault, Place, Tiers
from tests.support.farm import DEVICE

Ranges = list[tuple[int, int]]

ascending = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=7).map(
    lambda steps: [
        (sum(g + n for g, n in steps[:i]) + gap, sum(g + n for g, n in steps[:i]) + gap + length)
        for i, (gap, length) in enumerate(steps)
        if gap or not i  # else it would be one with the range before it
    ]
)


def positions_of(ranges: Ranges) -> list[int]:
    return [p for start, end in ranges for p in range(start, end)]


@given(ascending, st.integers(0, 70))
def test_ranges_are_split_where_told_and_join_again(ranges: Ranges, count: int) -> None:
    first, rest = split_tokens(ranges, count)
    assert positions_of(first) == positions_of(ranges)[:count]
    assert positions_of(rest) == positions_of(ranges)[count:]
    assert positions_of(join_ranges(first, rest)) == positions_of(ranges)
    assert all(start < end for start, end in [*first, *rest])


@given(ascending, st.sampled_from([1, 3, 4]), st.data())
def test_a_run_sinks_from_its_end_and_rises_again(ranges: Ranges, size: int, data: st.DataObject) -> None:
    whole = whole_blocks(ranges, 1000, size)
    positions = positions_of(whole)
    blocks = len(positions) // size
    run = CachedRun(list(whole), list(range(blocks)))
    for _ in range(data.draw(st.integers(0, 20))):
        if run.block_ids and data.draw(st.booleans()):
            block = run.block_ids[-1]
            assert run.sink(size, 100 + block) == block
        elif run.sunk:
            key = run.sunk[-1]
            assert run.rise(size, key - 100) == key
        in_pool = len(run.block_ids) * size
        assert positions_of(run.ranges) == positions[:in_pool]
        assert positions_of(run.sunk_ranges) == positions[in_pool:]
        assert positions_of(run.all_ranges) == positions
        assert not blocks or run.start == positions[0]
    in_pool = len(run.block_ids)
    if run.sunk:
        lost = data.draw(st.integers(in_pool, blocks - 1))
        far = run.split(size, 100 + lost)
        assert positions_of(run.all_ranges) == positions[: lost * size]
        assert (far is None) == (lost == blocks - 1)
        if far is not None:
            assert positions_of(far.sunk_ranges) == positions[(lost + 1) * size :]
            assert far.sunk == [100 + block for block in reversed(range(lost + 1, blocks))]


class Bytes:
    """What lies where: in place of `TierStorage`, with an object for the bytes of each block."""

    def __init__(self) -> None:
        self.at: dict[Place, object] = {}
        self.checksums: dict[object, int] = {}

    def checksum(self, what: object) -> int:
        return self.checksums.setdefault(what, len(self.checksums))

    def copy(self, item: Copying, fault: Fault | None) -> int | Fault:
        if fault is not None:
            return fault
        self.at[item.target] = self.at.get(item.source, object())
        return self.checksum(self.at[item.target])


SLOTS = st.sampled_from([(0, 0), (3, 0), (0, 4), (2, 3), (20, 0), (6, 20)])


@settings(max_examples=300)
@given(SLOTS, st.sampled_from([1, 2, 5]), st.data())
def test_what_comes_back_is_what_was_there(slots: tuple[int, int], batch: int, data: st.DataObject) -> None:
    """Sequences come, share, end and are forgotten; blocks are copied down, evicted and read again, and some copies broken.
    What is shared holds at each position what was written there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvstore.prefix.MOST_SPARE", data.draw(st.sampled_from([1, 2, 256])))
        _come_and_go(slots, batch, data)


def _come_and_go(slots: tuple[int, int], batch: int, data: st.DataObject) -> None:
    size = 2
    table = ShardTable(data.draw(st.integers(4, 14)), size, Tiers({"host": slots[0], "disk": slots[1]}))
    jobs = TierJobs(table, batch)
    store = Bytes()
    contents: dict[int, list[object]] = {}
    """seq -> for each block of the run that it had, what was written."""
    live: set[int] = set()
    asked = 0
    under_way = None
    for number in range(1, data.draw(st.integers(1, 60))):
        known = sorted(seq for seq in contents if seq in table.cache)
        match data.draw(
            st.sampled_from(
                ["new", "new", "end", "end", "share", "fetch", "stop", "lift", "discard", "break", "off", *["job"] * 8]
            )
        ):
            case "new":
                blocks = data.draw(st.integers(1, 6))
                if table.can_reserve(blocks):
                    table.reserve(number, blocks)
                    slots_of = table.append(number, 0, blocks * size)
                    contents[number] = [object() for _ in range(blocks)]
                    for block, what in zip(dict.fromkeys(slot // size for slot in slots_of), contents[number], strict=True):
                        store.at[Place("pool", block)] = what
                    live.add(number)
            case "end" if live:
                seq = data.draw(st.sampled_from(sorted(live)))
                live.discard(seq)
                (table.retire if data.draw(st.booleans()) else table.free)(seq)
            case "share" if known:
                source = data.draw(st.sampled_from(known))
                wanted = [list(run.ranges) for run in table.cache.runs(source) if run.ranges]
                assert table.share(number, source, wanted) == bool(wanted)
                if wanted:
                    contents[number] = []
                    for run in table[number].runs:
                        for i, block in enumerate(run.block_ids):
                            what = contents[source][run.start // size + i]
                            assert store.at[Place("pool", block)] is what
                    contents[number] = (
                        contents[source][: table[number].runs[0].num_tokens // size] if wanted[0][0][0] == 0 else []
                    )
                    if contents[number] and len(table[number].runs) == 1:
                        live.add(number)
                    else:
                        table.free(number)
                        del contents[number]
            case "stop":
                jobs.stop_fetch(data.draw(st.integers(0, asked)))
            case "fetch" if known:
                asked += 1
                jobs.fetch(asked, data.draw(st.sampled_from(known)), data.draw(st.integers(0, 14)))
            case "lift" if known:
                jobs.lift(data.draw(st.sampled_from(known)), data.draw(st.integers(0, 14)))
            case "discard" if known:
                table.cache.remove(data.draw(st.sampled_from(known)))
            case "off" if number > 20:
                jobs.turn_off()
                assert not any(table.cache.tiers.num_copies(tier) for tier in ("host", "disk"))
            case "break" if below := sorted((p.where, p.slot) for p in store.at if p.where != "pool"):
                where, slot = data.draw(st.sampled_from(below))
                store.at[Place(where, slot)] = object()
            case "job" if under_way is None:
                under_way = jobs.next()
            case "job":
                faults: dict[str, list[Fault | None]] = {
                    "up": [None, None, None, "unreadable", "no_memory"],
                    "move": [None, None, None, "unreadable", "unwritable", "no_memory"],
                    "down": [None, None, None, "unwritable", "no_memory"],
                }
                of_kind = [store.copy(i, data.draw(st.sampled_from(faults[under_way.kind]))) for i in under_way.items]
                jobs.end(of_kind)
                under_way = None
        table.validate()
    if under_way is not None:
        jobs.end([store.copy(item, None) for item in under_way.items])
    while (job := jobs.next()) is not None:
        jobs.end([store.copy(item, None) for item in job.items])
    table.validate()
    assert not table.reading
    for seq in [*live, *table.cache]:
        table.free(seq) if seq in table else table.cache.remove(seq)
    table.validate()
    assert table.pool.num_free == table.pool.num_blocks
    assert not any(table.cache.tiers.num_copies(tier) for tier in ("host", "disk"))


class Line:
    """A table, its tiers and jobs, with bytes that are objects."""

    def __init__(self, blocks: int, host: int = 0, disk: int = 0, batch: int = 4) -> None:
        self.table = ShardTable(blocks, 1, Tiers({"host": host, "disk": disk}))
        self.jobs = TierJobs(self.table, batch)
        self.store = Bytes()

    def run(self) -> list[str]:
        """All that there is to do; which kinds that was."""
        kinds = []
        while (job := self.jobs.next()) is not None:
            kinds.append(job.kind)
            self.jobs.end([self.store.copy(item, None) for item in job.items])
        self.table.validate()
        return kinds

    def leave(self, seq: int, tokens: int) -> None:
        """A sequence that is over, and has left that much."""
        self.table.reserve(seq, tokens)
        for slot in self.table.append(seq, 0, tokens):
            self.store.at[Place("pool", slot)] = (seq, slot)
        self.table.retire(seq)

    def take(self, seq: int, tokens: int) -> None:
        """One that runs, and needs that much."""
        self.table.reserve(seq, tokens)

    def in_pool(self, seq: int) -> int:
        return sum(len(run.block_ids) for run in self.table.cache.runs_of(seq))

    def below(self, seq: int) -> int:
        return sum(len(run.sunk) for run in self.table.cache.runs_of(seq))


def test_what_is_evicted_lives_on_below_and_comes_back() -> None:
    line = Line(10, host=20)
    line.leave(1, 6)
    assert line.run() == ["down", "down"]
    line.take(2, 8)
    assert (line.in_pool(1), line.below(1)) == (2, 4)
    assert not line.table.share(3, 1, [[(0, 6)]]), "only what is in the pool can be shared"
    line.table.free(2)
    line.jobs.fetch(7, 1, 5)
    assert line.run() == ["up"]
    assert (line.in_pool(1), line.below(1)) == (5, 1)
    assert [(f.number, f.blocks) for f in line.jobs.take_fetched()] == [(7, 3)]
    assert line.table.share(3, 1, [[(0, 5)]])
    assert line.run() == [], "what has come back needs no other copy"


def test_what_was_not_copied_in_time_is_lost_as_without_tiers() -> None:
    line = Line(10, host=20)
    line.leave(1, 6)
    line.take(2, 8)
    assert (line.in_pool(1), line.below(1)) == (2, 0)


def test_reading_leaves_room_to_those_that_run_and_takes_none_of_its_own() -> None:
    line = Line(10, host=20)
    line.leave(1, 8)
    line.run()
    line.take(2, 9)
    assert (line.in_pool(1), line.below(1)) == (1, 7)
    line.jobs.fetch(1, 1, 8)
    line.run()
    assert line.in_pool(1) == 1, f"a margin of {MARGIN_BLOCKS} is kept free"
    line.table.free(2)
    line.take(3, 4)
    line.jobs.fetch(2, 1, 8)
    line.run()
    assert line.in_pool(1) == 6 - MARGIN_BLOCKS
    assert [f.blocks for f in line.jobs.take_fetched()] == [0, 3]


def test_what_nobody_waits_for_is_read_no_further() -> None:
    """One block is being read for the first, nothing for the second."""
    line = Line(20, host=20, batch=1)
    for seq in (1, 2):
        line.leave(seq, 6)
        line.run()
    line.take(3, 20)
    assert (line.in_pool(1), line.in_pool(2)) == (0, 0)
    line.table.free(3)
    line.jobs.fetch(1, 1, 6)
    line.jobs.fetch(2, 2, 6)
    job = line.jobs.next()
    assert job is not None
    line.jobs.stop_fetch(1)
    line.jobs.stop_fetch(2)
    line.jobs.end([line.store.copy(item, None) for item in job.items])
    line.run()
    assert (line.in_pool(1), line.in_pool(2)) == (1, 0)
    assert sorted((f.number, f.blocks) for f in line.jobs.take_fetched()) == [(1, 1), (2, 0)]


def test_a_document_that_many_asked_about_is_copied_once_and_read_once() -> None:
    line = Line(16, host=30)
    line.leave(1, 6)
    line.run()
    for seq in (2, 3):
        assert line.table.share(seq, 1, [[(0, 6)]])
        line.table.reserve(seq, 1)
        (slot,) = line.table.append(seq, 6, 7)
        line.store.at[Place("pool", slot)] = (seq, slot)
        line.table.retire(seq)
    line.run()
    assert line.jobs.counts.down == 8
    line.take(4, 16)
    assert [line.below(seq) for seq in (1, 2, 3)] == [6, 7, 7]
    line.table.free(4)
    for number, seq in enumerate((2, 3)):
        line.jobs.fetch(number, seq, 7)
    line.run()
    assert [f.blocks for f in line.jobs.take_fetched()] == [7, 1], "the others are in the pool by then"
    assert line.jobs.counts.up == 8
    assert line.table.pool.num_free == 8


def test_host_memory_makes_room_on_disk_and_a_wish_brings_it_back() -> None:
    line = Line(10, host=4, disk=8)
    line.leave(1, 6)
    assert set(line.run()) == {"down", "move"}
    tiers = line.table.cache.tiers
    assert (tiers.num_copies("host"), tiers.num_copies("disk")) == (2, 4)
    line.take(2, 10)
    assert line.below(1) == 6
    line.jobs.lift(1, 3)
    assert line.run() == ["move"]
    keys = line.table.cache.runs(1)[0].sunk[::-1]
    assert [tiers.tier_of(key) for key in keys[:3]] == ["host"] * 3
    line.table.free(2)
    line.jobs.fetch(1, 1, 6)
    assert line.run() == ["up", "up"]
    assert line.in_pool(1) == 6


def test_what_stays_in_the_pool_does_not_drive_out_what_is_below_alone() -> None:
    line = Line(16, host=4, batch=2)
    line.leave(1, 4)
    line.run()
    line.take(2, 16)
    line.table.free(2)
    line.leave(3, 8)
    assert line.run() == []
    assert line.below(1) == 4
    line.take(4, 8)
    assert line.run() == ["down"] * 2, "now it is soon to be evicted"
    assert line.below(1) == 0


@pytest.mark.parametrize("host", [0, 128])
@pytest.mark.parametrize("own", [0, 2], ids=["the same", "with more"])
def test_of_those_that_begin_alike_no_more_are_known_than_there_is_room_for(host: int, own: int) -> None:
    line = Line(64, host=host, batch=16)
    line.leave(1, 6)
    source = 1
    for seq in range(2, 10_000):
        assert line.table.share(seq, source, [[(0, 4)]])
        if own:
            line.table.reserve(seq, own)
            line.table.append(seq, 4, 4 + own)
        line.table.retire(seq)
        source = seq  # the gManager takes the newest
        if not seq % 8:
            while (job := line.jobs.next()) is not None:
                line.jobs.end([item.checksum or 7 for item in job.items])
        assert len(line.table.cache) <= MOST_SPARE + 64 + host + 4
    line.table.validate()
    told = line.table.cache.take_changed()
    assert 9_000 in told and 9_000 not in line.table.cache, "the gManager hears that it is no more"
    assert line.table.share(10_000, source, [[(0, 4)]])


def test_full_tiers_make_room_for_a_whole_job() -> None:
    line = Line(32, host=8, disk=16, batch=4)
    for seq in range(1, 25):
        line.leave(seq, 2)
        line.run()
    tiers = line.table.cache.tiers
    assert (tiers.num_copies("host"), tiers.num_copies("disk")) == (8, 16)
    for seq in range(30, 42):
        line.leave(seq, 2)
    copied = line.jobs.counts.down
    kinds = line.run()
    assert set(kinds) == {"down", "move"}
    assert len(kinds) <= -(-2 * (line.jobs.counts.down - copied) // 4), "no job is of less than a batch"
    assert line.jobs.counts.down > copied


def test_a_sequence_that_runs_on_does_not_keep_others_from_below() -> None:
    line = Line(64, host=32)
    line.leave(1, 4)
    line.run()
    assert line.table.share(2, 1, [[(0, 4)]])
    for seq in range(10, 110):
        line.leave(seq, 2)
        line.run()
    assert line.jobs.counts.down >= 100, "the oldest copies are those of blocks that are in use"
    assert line.below(1) == 4, "once it ends they are there still"


def test_tiers_that_are_lost_may_leave_more_that_are_spare_than_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.prefix.MOST_SPARE", 1)
    line = Line(10, host=20)
    line.leave(1, 6)
    assert line.table.share(2, 1, [[(0, 5)]])
    line.table.retire(2)  # spare: all that it has the first has, too
    line.run()
    line.table.cache.evict(1)
    assert (line.below(1), line.below(2)) == (1, 0)
    line.jobs.turn_off()  # with what was below gone the first is spare as well, and drives out the second
    line.table.validate()
    assert [seq for seq in (1, 2) if seq in line.table.cache] == [1]


def test_a_broken_copy_is_a_hole() -> None:
    line = Line(10, host=20, batch=2)
    line.leave(1, 7)
    line.run()
    line.take(2, 10)
    third = line.table.cache.runs(1)[0].sunk[::-1][2]
    place = next(Place("host", slot) for slot in range(20) if line.store.at.get(Place("host", slot)) == (1, 2))
    line.store.at[place] = "something else"
    line.table.free(2)
    line.jobs.fetch(1, 1, 7)
    line.run()
    assert line.jobs.counts.corrupt == 1
    assert [run.all_ranges for run in line.table.cache.runs(1)] == [[(0, 2)], [(3, 7)]]
    assert line.table.share(3, 1, [[(0, 2)], [(3, 7)]])
    assert not line.table.cache.tiers.is_on(third, "host")


# --- bytes


def storage(blocks: int = 6, parts: int = 2, dtype: torch.dtype = torch.bfloat16) -> KVStorage:
    made = KVStorage(
        num_layers=2,
        num_blocks=blocks,
        block_size=4,
        num_kv_heads=2,
        head_dim=8,
        parts=parts,
        format=KVFormat(dtype),
        device=torch.device(DEVICE),
    )
    made.data_L2BPKD.copy_(40 * torch.randn(made.data_L2BPKD.shape).clamp(-3, 3))
    if made.scales_L2BKX is not None:
        made.scales_L2BKX.copy_(torch.rand(made.scales_L2BKX.shape))
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8, torch.int8])
@pytest.mark.parametrize("parts", [2, 1], ids=["keys and values", "latents"])
def test_bytes_come_back_through_all_tiers(parts: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """With their scales, if they have some."""
    pool = storage(parts=parts, dtype=dtype)
    tiers = TierStorage(pool, host_slots=2, disk_slots=3, folder=tmp_path)
    assert not list(tmp_path.iterdir()), "the file has no name"
    before = pool.pack(1)
    assert (before.numel(), pool.scales_L2BKX is None) == (pool.block_bytes, dtype == torch.bfloat16)
    (checksum,) = tiers.copy([Copying(1, Place("pool", 1), Place("host", 0), None)])
    assert checksum == checksum_of(before)
    assert tiers.copy([Copying(1, Place("host", 0), Place("disk", 2), checksum)]) == [checksum]
    tiers.host_SN.zero_()
    assert tiers.copy([Copying(1, Place("disk", 2), Place("host", 1), checksum)]) == [checksum]
    assert tiers.copy([Copying(1, Place("host", 1), Place("pool", 4), checksum)]) == [checksum]
    assert tiers.copy([Copying(1, Place("disk", 2), Place("pool", 5), checksum)]) == [checksum]
    assert torch.equal(pool.pack(4), before)
    assert torch.equal(pool.pack(5), before)
    for tensor in (pool.data_L2BPKD.view(torch.uint8), *([] if pool.scales_L2BKX is None else [pool.scales_L2BKX])):
        assert torch.equal(tensor[:, :, 4], tensor[:, :, 1])
        assert not torch.equal(tensor[:, :, 4], tensor[:, :, 2])
    (direct,) = tiers.copy([Copying(2, Place("pool", 1), Place("disk", 0), None)])
    assert direct == checksum
    tiers.close()
    assert tiers.copy([Copying(2, Place("disk", 0), Place("pool", 5), checksum)]) == ["unreadable"]
    assert tiers.copy([Copying(2, Place("pool", 1), Place("disk", 0), None)]) == ["unwritable"]


@pytest.mark.parametrize("what", ["a bit of KV", "the header", "another block's slot", "torn"])
def test_what_is_wrong_on_disk_is_seen(tmp_path: Path, what: str) -> None:
    pool = storage()
    tiers = TierStorage(pool, disk_slots=2, folder=tmp_path)
    assert tiers.file is not None
    first, second = tiers.copy([Copying(n, Place("pool", n), Place("disk", n), None) for n in (0, 1)])
    assert isinstance(first, int) and isinstance(second, int) and first != second
    if what == "torn":
        tiers.file.cut(slot_bytes(pool.block_bytes) + 100)
    elif what == "a bit of KV":
        tiers.file.spoil(1, 300, b"?")
    elif what == "the header":
        tiers.file.spoil(1, 9, b"?")
    else:
        tiers.copy([Copying(7, Place("pool", 0), Place("disk", 1), None)])
    (right, wrong) = tiers.copy([Copying(n, Place("disk", n), Place("pool", 4), (first, second)[n]) for n in (0, 1)])
    assert right == first
    assert wrong != second


@pytest.mark.parametrize(("dtype", "at"), [(torch.bfloat16, 77), (FP8, 77), (FP8, -1), (torch.int8, -1)])
def test_a_bit_that_flips_in_host_memory_is_seen(dtype: torch.dtype, at: int) -> None:
    tiers = TierStorage(storage(dtype=dtype), host_slots=1)
    (checksum,) = tiers.copy([Copying(1, Place("pool", 1), Place("host", 0), None)])
    tiers.host_SN[0, at] ^= 4
    assert isinstance(checksum, int)
    assert tiers.copy([Copying(1, Place("host", 0), Place("pool", 0), checksum)]) != [checksum]


def test_what_the_device_has_no_memory_for_is_not_copied_and_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = storage()
    tiers = TierStorage(kv, host_slots=3)
    down = [Copying(key, Place("pool", key), Place("host", key), None) for key in range(2)]
    sums = tiers.copy(down)
    before = kv.data_L2BPKD.clone()

    def too_little(*_: object) -> int:
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr("kvstore.tier_storage.checksum_of", too_little)
        assert tiers.copy(down) == ["no_memory"] * 2
    assert torch.equal(kv.data_L2BPKD, before)
    assert tiers.copy(down) == sums


def test_no_memory_is_no_fault_of_a_copy_or_a_slot() -> None:
    line = Line(10, host=20)
    line.leave(1, 6)
    job = line.jobs.next()
    assert job is not None and job.kind == "down"
    line.jobs.end(["no_memory"] * 4)
    assert line.run() == ["down", "down"]
    line.take(2, 10)
    line.table.free(2)
    line.jobs.fetch(1, 1, 6)
    job = line.jobs.next()
    assert job is not None and job.kind == "up"
    line.jobs.end(["no_memory"] * 4)
    line.run()
    assert (line.in_pool(1), line.below(1)) == (2, 4), "it goes on with the others"
    line.jobs.fetch(2, 1, 6)
    line.run()
    assert line.in_pool(1) == 6
    counts = line.jobs.counts
    assert (counts.no_memory, counts.corrupt, counts.unwritable) == (8, 0, 0)


def test_a_disk_without_the_room_is_an_error_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"bytes \(1,000,000,000,000 blocks\) can't be had in"):
        TierStorage(storage(), disk_slots=10**12, folder=tmp_path)
    with pytest.raises(OSError, match="No such file"):
        TierStorage(storage(), disk_slots=1, folder=tmp_path / "nowhere")


def test_tiers_without_slots_are_off() -> None:
    assert Tiers().is_off and not Tiers({"disk": 1}).is_off
    with pytest.raises(ValueError, match="negative"):
        Tiers({"host": -1})
    with pytest.raises(ValueError, match="at least 1 block"):
        TierJobs(ShardTable(1, 1), 0)
