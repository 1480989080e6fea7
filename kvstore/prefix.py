"""Cached shards: what sequences that are over left here, for others that begin with the same tokens.

A cached shard has whole blocks alone, each of a run's first tokens, whichever positions these are. Nothing is ever written to
them again, so any number of sequences may attend to them where they lie:

    run of a live sequence     | 0 1 2 3 | 4 12 13 14 | 15 16 . . |       block_size 4
    cached                     | 0 1 2 3 | 4 12 13 14 |
    shared up to position 14   | 0 1 2 3 |                                14 is in the second block
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from kvstore.pool import BlockPool

Ranges = list[tuple[int, int]]


def first_tokens(ranges: Sequence[tuple[int, int]], count: int) -> Ranges:
    """The first `count` positions of ranges."""
    first: Ranges = []
    for start, end in ranges:
        if count <= 0:
            break
        first.append((start, min(end, start + count)))
        count -= end - start
    return first


def whole_blocks(ranges: Sequence[tuple[int, int]], end: int, block_size: int) -> Ranges:
    """The positions before `end` of a run that lie in blocks which have no others, and are full.

    The gManager comes to the same (`gmanager.cluster.prefixes`).
    """
    before = sum(max(0, min(stop, end) - start) for start, stop in ranges)
    return first_tokens(ranges, before - before % block_size)


class CachedRun:
    """Whole blocks of one run."""

    __slots__ = ("block_ids", "ranges")

    def __init__(self, ranges: Ranges, block_ids: list[int]) -> None:
        self.ranges = ranges
        self.block_ids = block_ids

    def pop(self, block_size: int) -> int:
        """Forget the last block, which is returned."""
        count = block_size
        while count:
            start, end = self.ranges.pop()
            if end - start > count:
                self.ranges.append((start, end - count))
            count -= min(count, end - start)
        return self.block_ids.pop()


class PrefixCache:
    """The cached shards of one instance, least recently used first."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.num_evicted = 0
        """Blocks that had to make room."""
        self._pool = pool
        self._block_size = block_size
        self._shards: dict[int, list[CachedRun]] = {}
        self._changed: dict[int, None] = {}

    def __contains__(self, seq: int) -> bool:
        return seq in self._shards

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[int]:
        return iter(self._shards)

    def runs(self, seq: int) -> Sequence[CachedRun]:
        """Raises KeyError if nothing of it is cached."""
        return self._shards[seq]

    def put(self, seq: int, runs: Sequence[tuple[Ranges, list[int]]]) -> int:
        """Keep what a sequence has used till now: the ranges of each run and its blocks. Those that aren't full are freed: how
        many blocks that were."""
        kept: list[CachedRun] = []
        freed = 0
        for ranges, block_ids in runs:
            tokens = sum(end - start for start, end in ranges)
            whole = tokens // self._block_size
            freed += len(self._pool.free(block_ids[whole:]))
            if whole:
                self._pool.cache(block_ids[:whole])
                kept.append(CachedRun(first_tokens(ranges, whole * self._block_size), block_ids[:whole]))
        if kept:
            self._shards[seq] = kept
        return freed

    def touch(self, seq: int) -> None:
        """It is of use: the last to be evicted."""
        self._shards[seq] = self._shards.pop(seq)

    def remove(self, seq: int) -> int:
        """Forget a sequence: how many blocks are free with that."""
        return len(self._pool.forget([block for run in self._shards.pop(seq) for block in run.block_ids]))

    def evict(self, blocks: int) -> None:
        """Let that many blocks be free: those of the sequence that is least recently used, later positions first, then of the
        next. Raises RuntimeError if not so many are evictable."""
        if blocks > self._pool.num_evictable:
            raise RuntimeError(f"{blocks} blocks are to be evicted, {self._pool.num_evictable} can be")
        self.num_evicted += blocks
        while blocks > 0:
            seq, runs = next(iter(self._shards.items()))
            self._changed[seq] = None
            while runs and blocks > 0:
                last = max(runs, key=lambda run: run.ranges[-1])
                blocks -= len(self._pool.forget([last.pop(self._block_size)]))
                if not last.block_ids:
                    runs.remove(last)
            if not runs:
                del self._shards[seq]

    def take_evicted(self) -> list[int]:
        """Sequences of which something was evicted since the last call."""
        changed, self._changed = self._changed, {}
        return list(changed)

    def refs(self) -> Counter[int]:
        """How many cached shards have each block."""
        return Counter(block for runs in self._shards.values() for run in runs for block in run.block_ids)

    def validate(self) -> None:
        """Every cached run has the blocks that its tokens fill. Raises RuntimeError otherwise."""
        for seq, runs in self._shards.items():
            for run in runs:
                tokens = sum(end - start for start, end in run.ranges)
                if not run.block_ids or tokens != len(run.block_ids) * self._block_size:
                    raise RuntimeError(f"cached sequence {seq}: {len(run.block_ids)} blocks for {run.ranges}")
            if not runs:
                raise RuntimeError(f"sequence {seq} is cached and has nothing")
