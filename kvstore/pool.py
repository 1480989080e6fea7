"""Ids of the blocks of one instance, and who refers to each: pure integers, no tensors.

A block is free, used by one or several sequences, or cached by such as are over; or the last two at once.

    free ──allocate──> used by one ──share──> used by several, when it is full: it is never written again
      ^                  │     ^
      ├──free (the last)─┤   share
      │                cache   │
      │                  v     │
      └────forget────── cached ┘      evictable while nobody uses it
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from operator import add


class BlockPool:
    """Hands out block ids, in runs of consecutive ids as long as it can.

    Consecutive blocks are read without a gather on CPU (`kernels.paged_attention`), so the free ids are kept as
    maximal runs `[start, stop)`, ascending, and a request is served from the first run that holds it whole.
    """

    def __init__(self, num_blocks: int) -> None:
        """Raises ValueError unless `num_blocks` is positive."""
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.num_evictable = 0
        self._starts = [0]
        self._stops = [num_blocks]
        self._uses = [0] * num_blocks
        self._cached = [0] * num_blocks
        self.on_free: Callable[[int], object] = lambda block: None
        """Hears of each block that becomes free: what lay there is nobody's any more."""

    def can_allocate(self, count: int) -> bool:
        return count <= self.num_free

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` free ids; the run that follows block `after` is preferred, so that a growing shard stays consecutive.

        Raises ValueError for a negative count and RuntimeError if fewer are free: ask `can_allocate` first.
        """
        if count < 0:
            raise ValueError(f"can't allocate {count} blocks")
        if not self.can_allocate(count):
            raise RuntimeError(f"{count} blocks asked, {self.num_free} of {self.num_blocks} free")
        taken: list[int] = []
        if after is not None and count and (run := self._run_starting_at(after + 1)) is not None:
            taken += self._take(run, count)
        while len(taken) < count:
            taken += self._take(self._best_run(count - len(taken), grows=after is not None), count - len(taken))
        for block in taken:
            self._uses[block] = 1
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """Somebody else uses them, too. Raises RuntimeError for one that is free."""
        for block in block_ids:
            if not self.refs(block):
                raise RuntimeError(f"block {block} of a pool of {self.num_blocks} is not in use")
            self.num_evictable -= not self._uses[block]
            self._uses[block] += 1

    def free(self, block_ids: Iterable[int]) -> list[int]:
        """One that used them does so no longer: those that are free now. Raises RuntimeError for one that nobody uses or that
        was never ours."""
        freed: list[int] = []
        for block in sorted(block_ids):
            if not (0 <= block < self.num_blocks and self._uses[block]):
                raise RuntimeError(f"block {block} of a pool of {self.num_blocks} is not in use")
            self._uses[block] -= 1
            if not self.refs(block):
                self._give(block)
                freed.append(block)
            else:
                self.num_evictable += not self._uses[block]
        return freed

    def cache(self, block_ids: Iterable[int]) -> None:
        """One that used them is over, and leaves them to whoever wants them. Raises RuntimeError for one that nobody uses."""
        for block in block_ids:
            if not self._uses[block]:
                raise RuntimeError(f"block {block} of a pool of {self.num_blocks} is not in use")
            self._uses[block] -= 1
            self._cached[block] += 1
            self.num_evictable += not self._uses[block]

    def cache_too(self, block_ids: Iterable[int]) -> None:
        """They are left to whoever wants them, while those that use them go on. Raises RuntimeError for one that is free."""
        for block in block_ids:
            if not self.refs(block):
                raise RuntimeError(f"block {block} of a pool of {self.num_blocks} is not in use")
            self._cached[block] += 1

    def forget(self, block_ids: Iterable[int]) -> list[int]:
        """A cached sequence has them no more: those that are free now. Raises RuntimeError for one that none has."""
        freed: list[int] = []
        for block in sorted(block_ids):
            if not self._cached[block]:
                raise RuntimeError(f"block {block} of a pool of {self.num_blocks} is not cached")
            self._cached[block] -= 1
            if not self.refs(block):
                self.num_evictable -= 1
                self._give(block)
                freed.append(block)
        return freed

    def refs(self, block: int) -> int:
        """By how many sequences it is used or cached."""
        return self._uses[block] + self._cached[block]

    def cached_refs(self, block: int) -> int:
        """By how many sequences that are over it is cached."""
        return self._cached[block]

    def is_evictable(self, block: int) -> bool:
        """Whether it is cached, and nobody uses it."""
        return not self._uses[block] and self._cached[block] > 0

    def validate(self, uses: Counter[int] | None = None, cached: Counter[int] | None = None) -> None:
        """Runs are ascending, apart, inside the pool, and add up; so do references, which are these if they are given. Raises
        RuntimeError otherwise."""
        if uses is not None and self._by_block(uses) != self._uses:
            raise RuntimeError(f"blocks are used by {uses}, counted were {self._uses}")
        if cached is not None and self._by_block(cached) != self._cached:
            raise RuntimeError(f"blocks are cached by {cached}, counted were {self._cached}")
        free = [block for start, stop in zip(self._starts, self._stops, strict=True) for block in range(start, stop)]
        if free != [block for block, refs in enumerate(map(add, self._uses, self._cached)) if not refs]:
            raise RuntimeError(f"free are {free}, but blocks are used {self._uses} and cached {self._cached}")
        evictable = sum(held > 0 for used, held in zip(self._uses, self._cached, strict=True) if not used)
        if evictable != self.num_evictable:
            raise RuntimeError(f"{evictable} blocks are evictable, {self.num_evictable} were counted")
        bounds = [edge for run in zip(self._starts, self._stops, strict=True) for edge in run]
        apart = all(a < b for a, b in pairwise(bounds))
        total = sum(self._stops) - sum(self._starts)
        if not apart or (bounds and not 0 <= bounds[0] < bounds[-1] <= self.num_blocks) or total != self.num_free:
            raise RuntimeError(f"pool of {self.num_blocks} blocks is inconsistent: runs {bounds}, {self.num_free} free")

    def _by_block(self, counted: Counter[int]) -> list[int]:
        """A count for each block. Raises RuntimeError if others were counted."""
        by_block = [0] * self.num_blocks
        for block, count in counted.items():
            if not 0 <= block < self.num_blocks:
                raise RuntimeError(f"block {block} was counted, of a pool of {self.num_blocks}")
            by_block[block] = count
        return by_block

    def _run_starting_at(self, block: int) -> int | None:
        run = bisect_left(self._starts, block)
        return run if run < len(self._starts) and self._starts[run] == block else None

    def _best_run(self, count: int, *, grows: bool) -> int:
        """The first run that holds `count`; for a shard that grows block by block, the longest: room to go on in."""
        lengths = [stop - start for start, stop in zip(self._starts, self._stops, strict=True)]
        if not grows:
            for run, length in enumerate(lengths):
                if length >= count:
                    return run
        return max(range(len(lengths)), key=lengths.__getitem__)

    def _take(self, run: int, count: int) -> list[int]:
        start = self._starts[run]
        stop = min(start + count, self._stops[run])
        if stop == self._stops[run]:
            del self._starts[run], self._stops[run]
        else:
            self._starts[run] = stop
        self.num_free -= stop - start
        return list(range(start, stop))

    def _give(self, block: int) -> None:
        run = bisect_left(self._starts, block)
        before = run - 1
        joins_before = before >= 0 and self._stops[before] == block
        joins_after = run < len(self._starts) and self._starts[run] == block + 1
        if joins_before and joins_after:
            self._stops[before] = self._stops[run]
            del self._starts[run], self._stops[run]
        elif joins_before:
            self._stops[before] = block + 1
        elif joins_after:
            self._starts[run] = block
        else:
            self._starts.insert(run, block)
            self._stops.insert(run, block + 1)
        self.num_free += 1
        self.on_free(block)
