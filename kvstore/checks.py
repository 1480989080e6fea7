"""Checksums of cached blocks in the pool, so that one that isn't what was written is seen before it is shared: pure integers.

    put    a block is cached: its checksum is wanted
    end    it was made, unless the block was freed meanwhile
    known  a sequence is about to share blocks: what theirs must be

A block that is shared while its first sequence still runs has none yet; it gets one when that is over.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from kvstore.pool import BlockPool


class Checks:
    """Of one pool."""

    def __init__(self, pool: BlockPool) -> None:
        """Hears of blocks that become free, after whoever did before."""
        self._sums: dict[int, int] = {}
        self._wanted: dict[int, None] = {}
        self._under_way: set[int] = set()
        self._watched: list[set[int]] = []
        self._heard_first = pool.on_free
        pool.on_free = self._on_free

    @property
    def is_wanted(self) -> bool:
        """Whether a checksum is to be made."""
        return bool(self._wanted)

    def put(self, blocks: Iterable[int]) -> None:
        """They are cached, and stay as they are."""
        self._wanted |= dict.fromkeys(block for block in blocks if block not in self._sums)

    def set(self, block: int, checksum: int) -> None:
        """It is known what a block must have."""
        self._sums[block] = checksum
        self._wanted.pop(block, None)

    def begin(self, count: int) -> list[int]:
        """So many blocks whose checksums are to be made now."""
        blocks = list(islice(self._wanted, count))
        for block in blocks:
            del self._wanted[block]
        self._under_way.update(blocks)
        return blocks

    def end(self, block: int, checksum: int) -> None:
        """It was made."""
        if block in self._under_way:
            self._under_way.discard(block)
            self._sums[block] = checksum

    def known(self, blocks: Sequence[int]) -> dict[int, int]:
        """Those of these blocks that have one, and what it is."""
        return {block: self._sums[block] for block in blocks if block in self._sums}

    @contextmanager
    def watch(self, blocks: Iterable[int]) -> Iterator[Collection[int]]:
        """Those of these blocks that haven't been freed since it began."""
        stay = set(blocks)
        self._watched.append(stay)
        try:
            yield stay
        finally:
            self._watched = [other for other in self._watched if other is not stay]

    def _on_free(self, block: int) -> None:
        self._heard_first(block)
        self._sums.pop(block, None)
        self._wanted.pop(block, None)
        self._under_way.discard(block)
        for stay in self._watched:
            stay.discard(block)
