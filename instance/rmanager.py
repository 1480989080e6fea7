"""rManager: grants, reserves and frees the blocks of this instance's own pool, and keeps account for the gManager."""

from kvstore.shard import Shard, ShardTable


class RManager:
    """Alone decides over its blocks. "No room" is an answer (False), misuse raises.

    Every change of what a sequence holds here is noted, and told to the gManager as a delta (`take_changes`).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.shards = ShardTable(num_blocks, block_size)
        self._changed: dict[int, None] = {}
        self.freed = False
        """Whether blocks were freed since the last `take_changes`."""

    @property
    def free_blocks(self) -> int:
        return self.shards.pool.num_free

    def reserve(self, seq: int, blocks: int) -> bool:
        """Set `blocks` more blocks aside for a sequence, all or nothing."""
        if not self.shards.can_reserve(blocks):
            return False
        self.shards.reserve(seq, blocks)
        return True

    def reserve_next(self, seq: int) -> int | None:
        """Make sure of room for a token behind all that is here of a sequence. How many blocks that took; None: it can't."""
        shard = self.shard(seq)
        if shard is not None:
            end = max((run.end for run in shard.runs), default=0)
            if shard.can_append(end, end + 1):
                return 0
        return 1 if self.reserve(seq, 1) else None

    def grant(self, seq: int, position: int) -> bool:
        """Make room for a token of a sequence, with a new block if the last of the run that it continues is full."""
        if seq in self.shards and self.shards[seq].can_append(position, position + 1):
            return True
        return self.reserve(seq, 1)

    def append(self, seq: int, start: int, stop: int) -> list[int]:
        """Slots for positions `[start, stop)`. Raises as `Shard.append`."""
        self._changed[seq] = None
        return self.shards[seq].append(start, stop)

    def shard(self, seq: int) -> Shard | None:
        return self.shards[seq] if seq in self.shards else None

    def drop(self, seq: int) -> None:
        """Give a reservation back, if no KV has been written to it."""
        if seq in self.shards and not self.shards[seq].num_tokens:
            self.free(seq)

    def free(self, seq: int) -> None:
        """Give all blocks of a sequence back, if it has any."""
        if seq in self.shards:
            self.shards.free(seq)
            self._changed[seq] = None
            self.freed = True

    def take_changes(self) -> dict[int, int]:
        """seq -> tokens held now, of those that changed since the last call."""
        changed = {seq: self.shards[seq].num_tokens if seq in self.shards else 0 for seq in self._changed}
        self._changed = {}
        self.freed = False
        return changed
