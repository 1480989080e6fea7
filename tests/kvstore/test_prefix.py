"""Blocks that several sequences have, and cached ones: over random histories beside a model of it in plain dicts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.pool import BlockPool
from kvstore.prefix import CachedRun
from kvstore.ranges import first_tokens, whole_blocks
from kvstore.shard import ShardTable

Ranges = list[tuple[int, int]]


def positions_of(ranges: Ranges) -> list[int]:
    return [p for start, end in ranges for p in range(start, end)]


ascending = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=7).map(
    lambda steps: [
        (sum(g + n for g, n in steps[:i]) + gap, sum(g + n for g, n in steps[:i]) + gap + length)
        for i, (gap, length) in enumerate(steps)
    ]
)


@given(ascending, st.integers(0, 90), st.sampled_from([1, 3, 4, 16]))
def test_whole_blocks_are_those_full_of_what_comes_before(ranges: Ranges, end: int, block_size: int) -> None:
    positions = positions_of(ranges)
    whole = [positions[i : i + block_size] for i in range(0, len(positions), block_size)]
    want = [p for block in whole if len(block) == block_size and block[-1] < end for p in block]
    found = whole_blocks(ranges, end, block_size)
    assert positions_of(found) == want
    assert all(start < stop for start, stop in found)
    assert whole_blocks(found, end, block_size) == found


@given(ascending, st.sampled_from([1, 3, 4]))
def test_the_last_block_of_a_cached_run_goes_first(ranges: Ranges, block_size: int) -> None:
    whole = whole_blocks(ranges, 1000, block_size)
    blocks = len(positions_of(whole)) // block_size
    run = CachedRun(list(whole), list(range(blocks)))
    for left in reversed(range(blocks)):
        assert run.pop(block_size) == left
        assert run.ranges == first_tokens(whole, left * block_size)


@given(
    st.integers(1, 12), st.lists(st.tuples(st.sampled_from(["take", "share", "free", "cache", "forget"]), st.integers(0, 11)))
)
def test_pool_counts_who_refers_to_a_block(num_blocks: int, history: list[tuple[str, int]]) -> None:
    pool = BlockPool(num_blocks)
    uses, cached = [0] * num_blocks, [0] * num_blocks
    for what, n in history:
        block = n % num_blocks
        match what:
            case "take" if pool.can_allocate(1):
                (block,) = pool.allocate(1)
                assert not uses[block] and not cached[block]
                uses[block] = 1
            case "take":
                assert all(u or c for u, c in zip(uses, cached, strict=True))
            case "share" if uses[block] or cached[block]:
                pool.share([block])
                uses[block] += 1
            case "free" if uses[block]:
                uses[block] -= 1
                assert pool.free([block]) == [block] * (not uses[block] and not cached[block])
            case "cache" if uses[block]:
                pool.cache([block])
                uses[block] -= 1
                cached[block] += 1
            case "forget" if cached[block]:
                cached[block] -= 1
                assert pool.forget([block]) == [block] * (not uses[block] and not cached[block])
            case _:
                with pytest.raises(RuntimeError, match=f"block {block} of a pool of {num_blocks} is not"):
                    getattr(pool, what)([block])
        pool.validate()
        assert pool.num_free == sum(not u and not c for u, c in zip(uses, cached, strict=True))
        assert pool.num_evictable == sum(not u and c > 0 for u, c in zip(uses, cached, strict=True))


@given(st.data())
def test_blocks_that_are_shared_stay_as_they_are(data: st.DataObject) -> None:
    """Whatever comes and goes, what a sequence has at a position is what was written there for it or the one it shares with."""
    size = data.draw(st.sampled_from([1, 3, 4]))
    table = ShardTable(data.draw(st.integers(4, 30)), size)
    memory: dict[int, object] = {}
    """slot -> what was written there last."""
    live: dict[int, dict[int, object]] = {}
    """seq -> position -> what must lie there."""
    over: dict[int, dict[int, object]] = {}
    """The same of those that are cached; more may be gone than is known."""
    for number in range(1, data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["new", "append", "append", "share", "share", "retire", "retire", "free"])):
            case "new" if table.can_reserve(1):
                table.reserve(number, 1)
                live[number] = {}
            case "append" if live:
                seq = data.draw(st.sampled_from(sorted(live)))
                start = data.draw(st.integers(0, 30))
                end = start + data.draw(st.integers(1, 3 * size))
                if any(p in live[seq] for p in range(start, end)):
                    continue
                blocks = -(-(end - start) // size)
                if not table[seq].can_append(start, end) and table.can_reserve(blocks):
                    table.reserve(seq, blocks)
                if table[seq].can_append(start, end):
                    for position, slot in zip(range(start, end), table.append(seq, start, end), strict=True):
                        memory[slot] = live[seq][position] = object()
            case "share" if live or over:
                source = data.draw(st.sampled_from(sorted({*live, *over})))
                end = data.draw(st.integers(0, 40))
                if source in table.cache:
                    runs = [run.ranges for run in table.cache.runs(source)]
                else:
                    runs = [run.ranges for run in table[source].runs] if source in table else []
                wanted = [part for run in runs if (part := whole_blocks(run, end, size))]
                free = table.num_free
                assert table.share(number, source, wanted) == bool(wanted)
                if wanted:
                    known = live.get(source) or over.get(source) or {}
                    live[number] = {p: known[p] for run in wanted for p in positions_of(run)}
                    assert table.shared_end(number) == max(live[number]) + 1
                    assert free - table.num_free <= len(live[number]) // size
            case "retire" if live:
                seq = data.draw(st.sampled_from(sorted(live)))
                table.retire(seq)
                over[seq] = live.pop(seq)
            case "free" if live:
                seq = data.draw(st.sampled_from(sorted(live)))
                table.free(seq)
                del live[seq]
        table.validate()
        over = {seq: there for seq, there in over.items() if seq in table.cache}
        for seq, there in (live | over).items():
            cached = [(run.ranges, run.block_ids) for run in table.cache.runs(seq)] if seq in over else []
            runs_here = cached or [(run.ranges, run.block_ids) for run in table[seq].runs]
            found: dict[int, object] = {}
            for ranges, ids in runs_here:
                slots = [block * size + i for block in ids for i in range(size)]
                found |= {p: memory[slot] for p, slot in zip(positions_of(ranges), slots, strict=False)}
            assert found == there if seq in live else found.items() <= there.items()
    for seq in live:
        table.retire(seq)
    assert table.num_free == table.pool.num_blocks, "all that is cached can make room"
    table.reserve(0, table.pool.num_blocks)
    assert not len(table.cache)
    table.validate()


def cached(table: ShardTable, *seqs: int) -> list[list[Ranges]]:
    return [[run.ranges for run in table.cache.runs(seq)] if seq in table.cache else [] for seq in seqs]


def test_the_least_recently_used_is_evicted_first_and_from_its_end() -> None:
    table = ShardTable(8, 4)
    for seq, tokens in ((1, 14), (2, 12)):
        table.reserve(seq, -(-tokens // 4))
        table.append(seq, 0, tokens)
    assert table.retire(1) == 1, "the block that is not full"
    assert table.retire(2) == 0
    assert (table.pool.num_free, table.num_free) == (2, 8)
    assert table.share(3, 1, [[(0, 4)]]), "which is of use, so it is the last to go"
    assert table.num_free == 7
    table.reserve(4, 4)
    assert cached(table, 1, 2) == [[[(0, 12)]], [[(0, 4)]]]
    assert table.cache.take_changed() == [2]
    table.reserve(4, 2)
    assert cached(table, 1, 2) == [[[(0, 8)]], []]
    assert table.cache.take_changed() == [2, 1]
    assert not table.can_reserve(2), "one block is in use"
    table.reserve(4, 1)
    assert cached(table, 1) == [[[(0, 4)]]]
    with pytest.raises(RuntimeError, match="1 blocks are to be evicted, 0 can be"):
        table.reserve(4, 1)
    table.free(3)
    assert table.can_reserve(1)
    assert table.cache.num_evicted == 5
    table.validate()


def test_runs_of_a_sequence_are_evicted_by_position() -> None:
    table = ShardTable(4, 2)
    table.reserve(1, 4)
    table.append(1, 4, 8)
    table.append(1, 0, 4)
    table.retire(1)
    for left in ([[(4, 6)], [(0, 4)]], [[(0, 4)]], [[(0, 2)]], []):
        table.reserve(9, 1)
        assert cached(table, 1) == [left]


def test_only_what_is_there_is_shared() -> None:
    table = ShardTable(8, 4)
    table.reserve(1, 3)
    table.append(1, 0, 10)
    assert not table.share(2, 1, [[(0, 12)]]), "it has ten"
    assert not table.share(2, 1, [[(0, 6)]]), "no whole blocks"
    assert not table.share(2, 1, [[(1, 5)]]), "not the first of its run"
    assert not table.share(2, 1, [[(0, 4)], [(0, 4)]]), "twice"
    assert not table.share(2, 1, [[]])
    assert not table.share(2, 1, [])
    assert not table.share(2, 7, [[(0, 4)]]), "not here"
    assert 2 not in table
    assert table.share(2, 1, [[(0, 8)]])
    with pytest.raises(ValueError, match="sequence 2 is here already"):
        table.share(2, 1, [[(0, 8)]])
    table.reserve(2, 1)
    assert table.append(2, 8, 9) == [12], "a block of its own"
    table.free(1)
    assert table.shared_end(2) == 0
    table.validate()


def test_what_others_have_is_not_written() -> None:
    table = ShardTable(8, 4)
    table.reserve(1, 2)
    table.append(1, 0, 8)
    assert table.share(2, 1, [[(0, 8)]])
    table.cut(1, 6)  # nobody does that: it is what `shared_end` is for
    with pytest.raises(RuntimeError, match=r"sequence 1 would write positions \[6, 7\) into a block that others have"):
        table.append(1, 6, 7)
