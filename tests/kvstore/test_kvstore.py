"""Pool, shards and storage: block accounting and the prefix rule, over random histories."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.kv_blocks import FP8
from kvstore.format import KVFormat
from kvstore.pool import BlockPool
from kvstore.run import Run, continued
from kvstore.shard import Shard, ShardTable
from kvstore.storage import KVStorage


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_pool_never_loses_or_doubles_a_block(num_blocks: int, history: list[tuple[bool, int]]) -> None:
    pool = BlockPool(num_blocks)
    held: list[list[int]] = []
    for give_back, count in history:
        if give_back and held:
            pool.free(held.pop(count % len(held)))
        elif pool.can_allocate(count):
            held.append(pool.allocate(count, after=held[-1][-1] if held and held[-1] else None))
            assert len(held[-1]) == count
        else:
            with pytest.raises(RuntimeError, match=f"{count} blocks asked, {pool.num_free}"):
                pool.allocate(count)
        pool.validate()
        flat = [block for ids in held for block in ids]
        assert len(set(flat)) == len(flat) == num_blocks - pool.num_free
    for ids in held:
        pool.free(ids)
    assert pool.allocate(num_blocks) == list(range(num_blocks))


def test_pool_prefers_consecutive_ids() -> None:
    pool = BlockPool(10)
    first, second = pool.allocate(2), pool.allocate(3)
    assert (first, second) == ([0, 1], [2, 3, 4])
    pool.free(first)
    assert pool.allocate(4) == [5, 6, 7, 8]  # not 0, 1 and two others
    assert pool.allocate(1, after=4) == [0]  # 5 is taken: the longest free run
    with pytest.raises(RuntimeError, match="block 9"):
        pool.free([9])


@st.composite
def runs(draw: st.DrawFn) -> tuple[Run, list[int]]:
    """A run of random ascending ranges, and the positions it holds."""
    run = Run(draw(st.sampled_from([1, 3, 16])))
    run.block_ids = list(range(100))
    positions: list[int] = []
    at = 0
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=8)):
        run.append(at + gap, at + gap + length)
        positions += range(at + gap, at + gap + length)
        at += gap + length
    return run, positions


@given(runs(), st.integers(0, 80), st.integers(0, 30))
def test_visible_tokens_are_a_prefix(made: tuple[Run, list[int]], start: int, length: int) -> None:
    run, positions = made
    want = [sum(held <= p for held in positions) for p in range(start, start + length)]
    assert run.kv_lens(start, start + length) == want
    assert run.overlaps(start, start + length + 1) == any(start <= held <= start + length for held in positions)


def test_slots_follow_the_blocks() -> None:
    shard = Shard(4)
    shard.spare = [7, 2]
    assert shard.append(0, 3) == [28, 29, 30]
    assert shard.append(10, 13) == [31, 8, 9]
    (run,) = shard.runs
    assert run.ranges == [(0, 3), (10, 13)]
    with pytest.raises(ValueError, match=r"\[12, 14\)"):
        shard.append(12, 14)
    with pytest.raises(RuntimeError, match="3 tokens don't fit: 6 of 8"):
        shard.append(13, 16)


def test_what_comes_out_of_order_is_a_run_of_its_own() -> None:
    """As after a loss: what others held of the prompt is computed again, in ascending order, beside what is here."""
    shard = Shard(4)
    shard.spare = [0, 1, 2, 3, 4]
    shard.append(0, 5)
    shard.append(12, 18)
    assert shard.append(5, 7) == [12, 13]
    assert shard.append(8, 10) == [14, 15]
    assert [run.ranges for run in shard.runs] == [[(0, 5), (12, 18)], [(5, 7), (8, 10)]]
    assert not shard.can_append(7, 9 + 4), "a third run"
    assert shard.append(18, 19) == [11], "the run that ends last goes on"
    assert shard.append(10, 11) == [16]
    with pytest.raises(ValueError, match=r"\[10, 12\) can't join \[\(0, 19\), \(5, 11\)\]"):
        shard.append(10, 12)
    with pytest.raises(RuntimeError, match="1 tokens don't fit: 0 of 0 in use"):
        shard.append(7, 8)


@given(st.data())
def test_shards_of_any_history(data: st.DataObject) -> None:
    """Tokens in any order, runs and shards that go; nothing is lost, and no more runs come to be than must."""
    size = data.draw(st.sampled_from([1, 3, 4]))
    table = ShardTable(40, size)
    written: dict[int, dict[int, int]] = {1: {}, 2: {}}
    """For each sequence: position -> slot."""
    for _ in range(data.draw(st.integers(0, 25))):
        seq = data.draw(st.sampled_from([1, 2]))
        places = written[seq]
        match data.draw(st.sampled_from(["append"] * 6 + ["cut", "take back", "spare", "free run", "free"])):
            case "append":
                start = data.draw(st.integers(0, 60))
                end = start + data.draw(st.integers(1, 9))
                missing = -(-(end - start) // size)
                if (seq not in table or not table[seq].can_append(start, end)) and table.can_reserve(missing):
                    table.reserve(seq, missing)
                if seq not in table:
                    continue
                if any(p in places for p in range(start, end)):
                    with pytest.raises(ValueError, match="can't join"):
                        table[seq].append(start, end)
                elif not table[seq].can_append(start, end):
                    with pytest.raises(RuntimeError, match="don't fit"):
                        table[seq].append(start, end)
                else:
                    places |= dict(zip(range(start, end), table[seq].append(start, end), strict=True))
            case "cut" if seq in table:
                at, free = data.draw(st.integers(0, 60)), table.pool.num_free
                freed = table.cut(seq, at)
                assert freed == table.pool.num_free - free
                written[seq] = {p: slot for p, slot in places.items() if p < at}
            case "take back" if seq in table:
                at = data.draw(st.integers(0, 60))
                behind = [(run, p) for run in table[seq].runs for a, b in run.ranges for p in range(a, b)]
                gone = next((run for run, p in behind if p == at), None)
                table.take_back(seq, at)
                for run, p in behind:
                    if run is gone and p >= at:
                        del places[p]
            case "spare" if seq in table:
                before = len(table[seq].spare), table.pool.num_free
                assert table.free_spare(seq) == before[0] == table.pool.num_free - before[1]
                assert seq not in table or not table[seq].spare
            case "free run" if seq in table and table[seq].runs:
                picked = data.draw(st.sampled_from(table[seq].runs))
                spare = len(picked.block_ids) + (len(table[seq].spare) if len(table[seq].runs) == 1 else 0)
                table.detach(99, seq, picked.start)
                table.validate()
                free = table.pool.num_free
                table.let_go(99)
                assert table.pool.num_free == free + spare
                for start, end in picked.ranges:
                    for p in range(start, end):
                        del places[p]
            case "free" if seq in table:
                table.free(seq)
                places.clear()
        table.validate()
        for held in (written[s] for s in written if s in table):
            assert len(set(held.values())) == len(held)
        for s, held in written.items():
            found: dict[int, int] = {}
            for run in table[s].runs if s in table else ():
                positions = [p for a, b in run.ranges for p in range(a, b)]
                assert positions == sorted(positions)
                assert (run.start, run.end) == (positions[0], positions[-1] + 1)
                found |= {p: run.block_ids[i // size] * size + i % size for i, p in enumerate(positions)}
            assert found == held


@given(st.permutations(range(12)))
def test_runs_are_as_few_as_can_be(order: list[int]) -> None:
    """As many as the longest descent: each of its tokens needs one of its own (Dilworth)."""
    shard = Shard(1)
    shard.spare = list(range(12))
    longest: list[int] = []
    for i, position in enumerate(order):
        shard.append(position, position + 1)
        longest.append(1 + max((longest[j] for j in range(i) if order[j] > position), default=0))
    assert len(shard.runs) == max(longest)


def test_which_run_goes_on() -> None:
    assert continued([], 5) is None
    assert continued([6], 5) is None
    assert continued([0], 0) == 0
    assert continued([9, 3, 5, 4], 5) == 2


def test_table_gives_everything_back() -> None:
    table = ShardTable(8, 4)
    table.reserve(1, 2)
    table.reserve(2, 3)
    table.reserve(1, 1)
    table[1].append(0, 11)
    table.validate()
    assert not table.can_reserve(3)
    table.free(1)
    table.free(2)
    table.validate()
    assert len(table) == 0
    assert table.can_reserve(8)
    with pytest.raises(KeyError):
        table.free(1)


def test_a_run_that_goes_leaves_the_others() -> None:
    table = ShardTable(8, 4)
    table.reserve(1, 5)
    for start, end in [(20, 25), (3, 8), (25, 26)]:
        table[1].append(start, end)
    assert [run.block_ids for run in table[1].runs] == [[0, 1], [2, 3]]
    table.detach(7, 1, 20)
    assert table.pool.num_free == 3, "steps may read it still"
    table.validate()
    table.let_go(7)
    table.validate()
    assert [(run.start, run.end) for run in table[1].runs] == [(3, 8)]
    assert table.pool.num_free == 5
    with pytest.raises(KeyError, match="no run from position 20"):
        table.detach(7, 1, 20)
    table[1].append(20, 23)
    assert len(table[1].runs) == 1
    table[1].runs[0].num_tokens -= 1
    with pytest.raises(RuntimeError, match="7 tokens in 2 blocks"):
        table.validate()


def test_a_run_that_is_adopted_comes_last() -> None:
    table = ShardTable(8, 4)
    table.reserve(1, 2)
    table[1].append(20, 23)
    table.reserve(7, 2)
    copied = list(table[7].block_ids)
    table.adopt(7, 1, [(0, 3), (5, 9)])
    table.validate()
    assert 7 not in table
    assert [run.ranges for run in table[1].runs] == [[(20, 23)], [(0, 3), (5, 9)]]
    assert table[1].runs[1].block_ids == copied
    assert table[1].runs[1].kv_lens(4, 7) == [3, 4, 5]
    table[1].append(23, 24)
    assert table[1].runs[0].num_tokens == 4
    table.reserve(8, 1)
    with pytest.raises(ValueError, match="5 tokens don't take 1 blocks"):
        table.adopt(8, 1, [(30, 35)])
    with pytest.raises(ValueError, match="already"):
        table.adopt(8, 1, [(8, 10)])
    with pytest.raises(KeyError):
        table.adopt(9, 1, [(30, 31)])
    assert len(table[8].spare) == 1, "nothing has changed"
    table.validate()


def test_what_is_detached_can_be_attached_again() -> None:
    table = ShardTable(8, 4)
    table.reserve(1, 3)
    for start, end in [(20, 25), (3, 6)]:
        table[1].append(start, end)
    table.detach(7, 1, 20)
    table.detach(8, 1, 3)
    assert 1 not in table
    assert table.pool.num_free == 5
    table.validate()
    table.reserve(1, 1)
    table[1].append(4, 5)  # it has come again
    assert table.attach_again() == [1, 1]
    table.validate()
    assert [run.ranges for run in table[1].runs] == [[(4, 5)], [(20, 25)]]
    assert table.keep_runs(1, {20}) == 1
    table.validate()
    table.free(1)
    assert table.pool.num_free == 8


def test_what_is_cut_or_taken_back_is_room_for_others() -> None:
    table = ShardTable(8, 4)
    table.reserve(1, 5)
    for start, end in [(0, 5), (12, 18), (5, 9), (18, 19)]:
        table[1].append(start, end)
    assert [run.block_ids for run in table[1].runs] == [[0, 1, 2], [3]]
    assert table.take_back(1, 13) == 1, "18 went, too: it lay behind it"
    assert [run.ranges for run in table[1].runs] == [[(0, 5), (12, 13)], [(5, 9)]]
    assert table.take_back(1, 13) == 0
    assert table.cut(1, 5) == 1
    assert [run.ranges for run in table[1].runs] == [[(0, 5)]]
    assert table[1].append(7, 8) == [5]
    assert table.free_spare(1) == 1
    table.validate()
    table.reserve(1, 1)
    assert table[1].block_ids == [0, 1, 2], "the next block lies behind the last"
    assert table.cut(1, 0) == 2
    assert 1 in table, "a block is reserved"
    assert table.free_spare(1) == 1
    assert 1 not in table
    assert table.can_reserve(8)
    with pytest.raises(KeyError):
        table.cut(1, 0)


def test_storage_is_what_it_says() -> None:
    storage = KVStorage(
        num_layers=3,
        num_blocks=5,
        block_size=16,
        num_kv_heads=2,
        head_dim=8,
        format=KVFormat(torch.float32),
        device=torch.device("cpu"),
    )
    assert storage.nbytes == 5 * storage.block_bytes == 3 * 2 * 5 * 16 * 2 * 8 * 4
    assert storage.layer(1).shape == (2, 5, 16, 2, 8)
    assert storage.layer(1).untyped_storage().data_ptr() == storage.data_L2BPKD.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="at least 1"):
        KVStorage(
            num_layers=0,
            num_blocks=5,
            block_size=16,
            num_kv_heads=2,
            head_dim=8,
            format=KVFormat(torch.float32),
            device=torch.device("cpu"),
        )
    with pytest.raises(MemoryError, match="need"):
        KVStorage(
            num_layers=1 << 20,
            num_blocks=1 << 20,
            block_size=64,
            num_kv_heads=2,
            head_dim=64,
            format=KVFormat(torch.float32),
            device=torch.device("cpu"),
        )


def test_kv_of_8_bits_holds_twice_the_tokens() -> None:
    """But for its scales: one for each layer, keys and values, and head of a block, or of each of its tokens."""
    sizes = {"num_layers": 32, "parts": 2, "block_size": 64, "num_kv_heads": 8, "head_dim": 128}
    plain, fp8, int8 = KVFormat(torch.bfloat16), KVFormat(FP8), KVFormat(torch.int8)
    assert (plain.has_scales, fp8.has_scales, int8.has_scales) == (False, True, True)
    assert int8.block_bytes(**sizes) == 32 * 2 * 8 * 64 * (128 + 2)
    assert plain.block_bytes(**sizes) / int8.block_bytes(**sizes) > 1.95
    assert plain.block_bytes(**sizes) == 32 * 2 * 64 * 8 * 128 * 2
    assert fp8.block_bytes(**sizes) == 32 * 2 * 8 * (64 * 128 + 4)
    assert plain.block_bytes(**sizes) / fp8.block_bytes(**sizes) > 1.95
    small = {"num_layers": 3, "block_size": 4, "num_kv_heads": 2, "device": torch.device("cpu")}
    storage = KVStorage(num_blocks=5, head_dim=8, format=fp8, **small)  # type: ignore[arg-type]
    assert storage.nbytes == 5 * storage.block_bytes
    assert storage.scales(1) is not None
    assert storage.scales(1).shape == (2, 5, 2, 1)  # type: ignore[union-attr]
    of_tokens = KVStorage(num_blocks=5, head_dim=8, format=int8, **small)  # type: ignore[arg-type]
    assert of_tokens.nbytes == 5 * of_tokens.block_bytes
    assert of_tokens.scales(1).shape == (2, 5, 2, 4)  # type: ignore[union-attr]
    assert of_tokens.scales(1).dtype == torch.float16  # type: ignore[union-attr]
    of_tokens.fill_(float("nan"))
    assert bool(of_tokens.scales(1).isnan().all()) and bool((of_tokens.data_L2BPKD == 127).all())  # type: ignore[union-attr]
    of_tokens.fill_(0.0)
    assert not of_tokens.data_L2BPKD.any() and not of_tokens.scales(1).any()  # type: ignore[union-attr]
    small["block_size"], small["num_layers"] = 1, 1
    with pytest.raises(ValueError, match="must be of a multiple of 4 bytes, got 22"):
        KVStorage(num_blocks=5, head_dim=7, parts=1, format=fp8, **small)  # type: ignore[arg-type]
