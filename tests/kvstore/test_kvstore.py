"""Pool, shards and storage: block accounting and the prefix rule, over random histories."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore.pool import BlockPool
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
def shards(draw: st.DrawFn) -> tuple[Shard, list[int]]:
    """A shard of random ascending ranges, and the positions it holds."""
    shard = Shard(draw(st.sampled_from([1, 3, 16])))
    shard.block_ids = list(range(100))
    positions: list[int] = []
    at = 0
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=8)):
        shard.append(at + gap, at + gap + length)
        positions += range(at + gap, at + gap + length)
        at += gap + length
    return shard, positions


@given(shards(), st.integers(0, 80), st.integers(0, 30))
def test_visible_tokens_are_a_prefix(made: tuple[Shard, list[int]], start: int, length: int) -> None:
    shard, positions = made
    want = [sum(held <= p for held in positions) for p in range(start, start + length)]
    assert shard.kv_lens(start, start + length) == want


def test_slots_follow_the_blocks() -> None:
    shard = Shard(4)
    shard.block_ids = [7, 2]
    assert shard.append(0, 3) == [28, 29, 30]
    assert shard.append(10, 13) == [31, 8, 9]
    assert shard.ranges == [(0, 3), (10, 13)]
    with pytest.raises(ValueError, match=r"\[5, 6\)"):
        shard.append(5, 6)
    with pytest.raises(RuntimeError, match="3 tokens don't fit: 6 of 8"):
        shard.append(13, 16)


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


def test_storage_is_what_it_says() -> None:
    storage = KVStorage(
        num_layers=3,
        num_blocks=5,
        block_size=16,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
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
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
    with pytest.raises(MemoryError, match="need"):
        KVStorage(
            num_layers=1 << 20,
            num_blocks=1 << 20,
            block_size=64,
            num_kv_heads=2,
            head_dim=64,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
