"""Which tokens of which sequence lie in which blocks of this instance: pure integers, no tensors.

A shard packs its tokens into its blocks in the order they were written, and they are written in ascending position:

    positions   0 .. 4        12 .. 17            (tokens [5, 12) lie on other instances)
    ranges     [0, 5)        [12, 18)
    blocks     | 0 1 2 3 | 4 12 13 14 | 15 16 17 . |      block_size 4: 11 tokens, capacity 12

So the tokens a row at position p may see are a *prefix* of the shard, and one number per row (`kv_len`) says which.
"""

from collections.abc import Sequence

from kvstore.pool import BlockPool


class Shard:
    """The part of one sequence that lies here."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.block_ids: list[int] = []
        self.num_tokens = 0
        # [start, end) are positions whose KV is written here (or will be, by a step that was accepted)
        self.ranges: list[tuple[int, int]] = []

    @property
    def capacity(self) -> int:
        """Tokens that its blocks hold."""
        return len(self.block_ids) * self.block_size

    @property
    def first(self) -> int:
        """Position of its first token. Raises IndexError if it is empty."""
        return self.ranges[0][0]

    def can_append(self, count: int) -> bool:
        return self.num_tokens + count <= self.capacity

    def append(self, start: int, end: int) -> list[int]:
        """Take positions `[start, end)`; returns their slots (`block id * block_size + offset`).

        Raises ValueError if they are not above all positions held, RuntimeError if the blocks don't hold them.
        """
        if start >= end or (self.ranges and start < self.ranges[-1][1]):
            raise ValueError(f"positions [{start}, {end}) can't follow {self.ranges[-1:]}")
        if not self.can_append(end - start):
            raise RuntimeError(f"{end - start} tokens don't fit: {self.num_tokens} of {self.capacity} in use")
        if self.ranges and self.ranges[-1][1] == start:
            self.ranges[-1] = (self.ranges[-1][0], end)
        else:
            self.ranges.append((start, end))
        first = self.num_tokens
        self.num_tokens += end - start
        size = self.block_size
        return [self.block_ids[i // size] * size + i % size for i in range(first, self.num_tokens)]

    def kv_lens(self, start: int, end: int) -> list[int]:
        """For each position p of `[start, end)`: how many tokens here have a position <= p."""
        lens: list[int] = []
        held = 0
        p = start
        for a, b in self.ranges:
            if p < a:  # rows before this range see what came before it
                lens += [held] * (min(a, end) - p)
                p = min(a, end)
            if p < min(b, end):  # rows inside see one more each
                lens += range(held + p - a + 1, held + min(b, end) - a + 1)
                p = min(b, end)
            if p == end:
                return lens
            held += b - a
        return lens + [held] * (end - p)


class ShardTable:
    """All shards of one instance and the pool they draw on."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Raises ValueError unless both are positive."""
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self._shards: dict[int, Shard] = {}

    def __contains__(self, seq: int) -> bool:
        return seq in self._shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, seq: int) -> Shard:
        return self._shards[seq]

    def can_reserve(self, blocks: int) -> bool:
        return self.pool.can_allocate(blocks)

    def reserve(self, seq: int, blocks: int) -> None:
        """Give the sequence's shard (new, if there is none) that many more blocks. Ask `can_reserve` first."""
        shard = self._shards.get(seq) or Shard(self.block_size)
        after = shard.block_ids[-1] if shard.block_ids else None
        shard.block_ids += self.pool.allocate(blocks, after)
        self._shards[seq] = shard

    def free(self, seq: int) -> None:
        """Give all blocks of the sequence back. Raises KeyError if it has none here."""
        self.pool.free(self._shards.pop(seq).block_ids)

    def validate(self) -> None:
        """Every block is in one shard or free, and no shard holds more than its blocks do. Raises RuntimeError otherwise."""
        self.pool.validate()
        held: Sequence[int] = [block for shard in self._shards.values() for block in shard.block_ids]
        if len(set(held)) != len(held) or len(held) + self.pool.num_free != self.pool.num_blocks:
            raise RuntimeError(f"{len(held)} blocks held, {self.pool.num_free} free of {self.pool.num_blocks}")
        for seq, shard in self._shards.items():
            tokens = sum(end - start for start, end in shard.ranges)
            if tokens != shard.num_tokens or tokens > shard.capacity:
                raise RuntimeError(f"sequence {seq}: ranges {shard.ranges}, {shard.num_tokens} of {shard.capacity} tokens")
