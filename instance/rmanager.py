"""rManager: grants, reserves and frees the blocks of this instance's own pool, and keeps account for the gManager.

KV outlives an epoch:

    settle    the epoch is over: what is certain stays, as shards that are *dormant*, which no step names
    keep      the next epoch begins: all but these are freed
    wake      a sequence is admitted again with what is left of it; or `discard`: it isn't

A run that moves to another instance:

    there   reserve    as a number of its own, not the sequence's, which may end while its KV is being copied
            note_copy  it is here, and right
            adopt      in the step that flips it: it is the sequence's
    here    detach     in the same step: no later step reads it
            let_go     that step has run: its blocks are free
"""

from collections.abc import Iterable, Sequence

from kvstore.shard import Shard, ShardTable


class RManager:
    """Alone decides over its blocks. "No room" is an answer (False), misuse raises.

    Every change of what a sequence holds here is noted, and told to the gManager as a delta (`take_changes`).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.shards = ShardTable(num_blocks, block_size)
        self._changed: dict[int, None] = {}
        self._dormant: dict[int, None] = {}
        self._copies: dict[int, list[tuple[int, int]]] = {}
        """move -> positions of the copy that is here."""
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

    def ranges(self, seq: int) -> list[list[tuple[int, int]]]:
        """Those of each run of a sequence."""
        return [list(run.ranges) for run in self.shards[seq].runs] if seq in self.shards else []

    def drop(self, seq: int) -> None:
        """Give a reservation back, if no KV has been written to it. A dormant shard keeps its KV."""
        if seq in self._dormant:
            self._note_freed(self.shards.free_spare(seq))
        elif seq in self.shards and not self.shards[seq].num_tokens:
            self.free(seq)

    def free(self, seq: int) -> None:
        """Give all blocks of a sequence back, if it has any."""
        if seq in self.shards:
            self.shards.free(seq)
            self._dormant.pop(seq, None)
            self._copies.pop(seq, None)
            self._changed[seq] = None
            self.freed = True

    def note_copy(self, move: int, ranges: Sequence[tuple[int, int]]) -> None:
        """What is reserved as `move` holds a copy of tokens at these positions. Nothing happens if it was dropped."""
        if move in self.shards:
            self._copies[move] = list(ranges)

    def adopt(self, move: int, seq: int) -> bool:
        """A copy becomes a run of its sequence. False: there is none. Raises ValueError as `ShardTable.adopt`."""
        ranges = self._copies.pop(move, None)
        if ranges is None:
            return False
        self.shards.adopt(move, seq, ranges)
        self._changed[seq] = None
        return True

    def detach(self, move: int, seq: int, start: int) -> None:
        """A run is another instance's from the present step on. Raises KeyError if there is none that begins there."""
        self.shards.detach(move, seq, start)
        self._changed[seq] = None

    def let_go(self, move: int) -> None:
        """No step reads a detached run any more. Raises KeyError if there is none."""
        self.shards.let_go(move)
        self.freed = True

    def settle(self, uncertain: Iterable[tuple[int, int]]) -> dict[int, list[list[tuple[int, int]]]]:
        """End an epoch: what each sequence keeps here, as the ranges of each run. Nothing else is reserved any more.

        `uncertain`: (seq, position) of tokens that may not be written. They go, with those behind them in their runs. What was
        detached and not let go stays here, too: whoever adopted it may be lost.
        """
        self._changed |= dict.fromkeys(self.shards.attach_again())
        for seq, position in uncertain:
            if seq in self.shards:
                self._note_freed(self.shards.take_back(seq, position))
                self._changed[seq] = None
        for seq in list(self.shards):
            if self.shards[seq].num_tokens:
                self._note_freed(self.shards.free_spare(seq))
            else:
                self.free(seq)
        self._dormant = dict.fromkeys(self.shards)
        return {seq: self.ranges(seq) for seq in self._dormant}

    def keep(self, seqs: Iterable[int]) -> None:
        """Free all dormant shards but those of these sequences."""
        wanted = set(seqs)
        for seq in [seq for seq in self._dormant if seq not in wanted]:
            self.free(seq)

    def discard(self, seq: int) -> None:
        """Free a sequence's shard if it is dormant."""
        if seq in self._dormant:
            self.free(seq)

    def wake(self, seq: int, end: int, starts: Iterable[int] | None = None) -> None:
        """A sequence goes on: if its shard is dormant, it is one like any other again, without positions from `end` on.

        `starts`: where the runs that stay begin, if another instance has the others, too; None: all stay.
        """
        if seq in self._dormant:
            del self._dormant[seq]
            self._note_freed(self.shards.cut(seq, end))
            if starts is not None and seq in self.shards:
                self._note_freed(self.shards.keep_runs(seq, set(starts)))
            self._changed[seq] = None

    def take_changes(self) -> dict[int, int]:
        """seq -> tokens held now, of those that changed since the last call."""
        changed = {seq: self.shards[seq].num_tokens if seq in self.shards else 0 for seq in self._changed}
        self._changed = {}
        self.freed = False
        return changed

    def validate(self) -> None:
        """The shards add up, and those that are dormant hold KV. Raises RuntimeError otherwise."""
        self.shards.validate()
        empty = [seq for seq in self._dormant if seq not in self.shards or not self.shards[seq].num_tokens]
        if empty:
            raise RuntimeError(f"sequences {empty} are dormant and hold nothing")

    def _note_freed(self, blocks: int) -> None:
        self.freed = self.freed or blocks > 0
