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

A prefix that several sequences have:

    publish   a prompt is written: its whole blocks can be shared from now on, while its sequence goes on
    retire    the sequence is over: its shard is *cached*, so its blocks stay for others until room is needed
    share     a new sequence begins with blocks of one that is live or cached; `drop` undoes it until the sequence wakes
"""

from collections.abc import Iterable, Sequence

from gmanager.wire.footprint import ANCHOR_TOKENS, anchor_tokens
from kvstore.anchor import NEVER
from kvstore.ranges import whole_blocks
from kvstore.shard import Shard, ShardTable
from kvstore.sight import Sight
from kvstore.tiers import Tiers

UNSURE_ROWS = 4
"""Rows of a sequence that decodes which may have to be computed again when the epoch ends: those on their way here and, one
step further at most, on another instance of its party."""


class RManager:
    """Alone decides over its blocks. "No room" is an answer (False), misuse raises.

    Every change of what a sequence holds here is noted, and told to the gManager as a delta (`take_changes`).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        tiers: Tiers | None = None,
        windows: Sequence[Sight] = (),
        chunk_tokens: int = ANCHOR_TOKENS,
    ) -> None:
        """`tiers`: below the pool; None: there are none. `windows`: what rows see by each table of blocks behind the first;
        `chunk_tokens`: most rows of a step that are computed here, for which there is room in each of these."""
        self.shards = ShardTable(num_blocks, block_size, tiers, windows)
        self._changed: dict[int, None] = {}
        self._dormant: dict[int, None] = {}
        self._copies: dict[int, tuple[list[tuple[int, int]], list[int]]] = {}
        """move -> positions of the copy that is here, and the first block of each table behind the first."""
        self.caches = False
        """Whether what sequences leave here is kept for others."""
        self._prompts: dict[int, int] = {}
        """Sequences of whose prompts steps may be under way, and from which position on what rows see is kept for others."""
        self._branches: dict[int, int] = {}
        """Of these: before which position others began alike, if what rows see there is to be kept, too."""
        self._anchor_tokens = anchor_tokens(chunk_tokens)
        self._pinned: dict[int, None] = {}
        """Sequences that share blocks of others, and have not begun."""
        self._published: dict[int, int] = {}
        """Of live sequences: before which position their blocks may be shared."""
        self._renewed: dict[int, None] = {}
        """Sequences of which something else can be shared than the gManager was told."""
        self.freed = False
        """Whether blocks were freed since the last `take_changes`."""

    @property
    def free_blocks(self) -> int:
        """Those included that are cached, and used by nobody."""
        return self.shards.num_free

    @property
    def cached_blocks(self) -> int:
        """Of the free ones."""
        return self.shards.pool.num_evictable

    @property
    def evicted_blocks(self) -> int:
        """Of cached sequences, so far."""
        return self.shards.cache.num_evicted

    def reserve(self, seq: int, blocks: int) -> bool:
        """Set `blocks` more blocks aside for a sequence, all or nothing."""
        if not self.shards.can_reserve(blocks):
            return False
        self.shards.reserve(seq, blocks)
        return True

    def reserve_next(self, seq: int) -> int | None:
        """Make sure of room for a token behind all that is here of a sequence. How many blocks that took; None: it can't."""
        shard = self.shard(seq)
        lacks = self._lacks_for(seq, 0 if shard is None else max((run.end for run in shard.runs), default=0))
        return lacks if not lacks or self.reserve(seq, lacks) else None

    def has_room(self, seq: int, position: int) -> bool:
        """Whether `grant` would make some."""
        return self._lacks_for(seq, position) <= self.free_blocks

    def grant(self, seq: int, position: int) -> bool:
        """Make room for a token of a sequence, with a new block in each table if the last of the run that it continues is
        full."""
        lacks = self._lacks_for(seq, position)
        return not lacks or self.reserve(seq, lacks)

    def _lacks_for(self, seq: int, position: int) -> int:
        """How many blocks more than are reserved a token takes."""
        if seq not in self.shards:
            return 1 + len(self.shards.windows)
        return max(0, self.shards[seq].lacks_for(position, position + 1))

    def trim(self, seq: int, position: int) -> None:
        """Rows from `position` on are all that will come of a sequence: free the blocks of windows that none of them sees.

        While its prompt is computed they are reserved for the rest of it. Then some more rows are seen to: those that are under
        way, and such as may have to be computed again.
        """
        if self.shards.windows and seq in self.shards:
            in_prompt = seq in self._prompts
            first = min(position, self._prompts[seq]) if in_prompt else max(0, position - UNSURE_ROWS)
            if (branch := self._branches.get(seq)) is not None:
                if branch <= position:
                    self.shards.set_branch(seq, self._branches.pop(seq))
                else:  # its last tokens may not fill a block, and be shared
                    first = min(first, max(0, branch - self.shards.block_size))
            self.shards.trim(seq, first, recycles=in_prompt)  # not noted: at each block, and the next Beat tells

    def append(self, seq: int, start: int, stop: int) -> list[int]:
        """Slots for positions `[start, stop)` in the first table. Raises as `ShardTable.append`."""
        self._changed[seq] = None
        if self.shards.windows and (lacks := self.shards[seq].lacks_for(start, stop)) > 0:
            self.reserve(seq, lacks)  # several runs waste part of a block each, in each table
        return self.shards.append(seq, start, stop)

    def in_prompt(self, seq: int) -> bool:
        """Whether steps of its prompt may be under way."""
        return seq in self._prompts

    def end_prompt(self, seq: int) -> None:
        """All of it is written: what was reserved for it is free but for one token's blocks."""
        self._prompts.pop(seq, None)
        self._branches.pop(seq, None)
        if self.shards.windows and seq in self.shards:
            self._note_freed(self.shards.free_spare(seq, but=1 + len(self.shards.windows)))

    def shard(self, seq: int) -> Shard | None:
        return self.shards[seq] if seq in self.shards else None

    def ranges(self, seq: int) -> list[list[tuple[int, int]]]:
        """Those of each run of a sequence."""
        return [list(run.ranges) for run in self.shards[seq].runs] if seq in self.shards else []

    def drop(self, seq: int) -> None:
        """Give a reservation back, if its sequence has not begun. A dormant shard keeps its KV."""
        if seq in self._dormant:
            self._note_freed(self.shards.free_spare(seq))
        elif seq in self._pinned or (seq in self.shards and not self.shards[seq].num_tokens):
            self.free(seq)

    def free(self, seq: int) -> None:
        """Give all blocks of a sequence back, if it has any."""
        if seq in self.shards:
            self.shards.free(seq)
            self._end(seq)

    def _end(self, seq: int, *, keeps_anchor: bool = False) -> None:
        if not keeps_anchor:
            self.shards.cache.drop_anchors(seq)
        self._dormant.pop(seq, None)
        self._prompts.pop(seq, None)
        self._branches.pop(seq, None)
        self._copies.pop(seq, None)
        self._pinned.pop(seq, None)
        if self._published.pop(seq, None) is not None:
            self._renewed[seq] = None
        self._changed[seq] = None
        self.freed = True

    # --- what others may begin with -----------------------------------------------------------------------------------

    def publish(self, seq: int, end: int) -> None:
        """What is here of a sequence before position `end` is written, and stays as it is."""
        if self.caches and seq in self.shards:
            self._published[seq] = end
            self._renewed[seq] = None
            if self.shards.windows:
                self.shards.set_anchor(seq, end)

    def retire(self, seq: int) -> None:
        """A sequence is over, and all that is here of it is written: keep what can be of use, free the rest."""
        if not self.caches or seq not in self.shards:
            self.free(seq)
            return
        self.shards.retire(seq)
        self._end(seq, keeps_anchor=True)
        if seq in self.shards.cache:
            self._renewed[seq] = None

    def share(self, seq: int, source: int, runs: Sequence[Sequence[tuple[int, int]]], row: int | None = None) -> bool:
        """Let a new sequence begin with whole blocks of another: so many first tokens of its runs. `row`: the first that it
        computes. False: that is not here, or may not be shared. Raises as `ShardTable.share`."""
        last = max((piece[1] for run in runs for piece in run), default=0)
        if source in self.shards and last > self._published.get(source, 0):
            return False
        if not self.shards.share(seq, source, runs, row):
            return False
        self._pinned[seq] = self._changed[seq] = None
        return True

    def shares(self, seq: int) -> list[int] | None:
        """The blocks of others with which a sequence is to begin that has not begun; None: there is no such."""
        return self.shards[seq].block_ids if seq in self._pinned else None

    def take_reusable(self) -> dict[int, list[list[tuple[int, int]]]]:
        """seq -> for each run the positions that can be shared now, or once they are read from `below`, of those for which that
        has changed since the last call."""
        self._renewed |= dict.fromkeys(self.shards.cache.take_changed())
        renewed, self._renewed = self._renewed, {}
        return {seq: self._reusable(seq) for seq in renewed}

    def cached(self) -> dict[int, list[list[tuple[int, int]]]]:
        """The same of all cached sequences, least recently used first; nothing has changed since."""
        self.take_reusable()
        return {seq: self._reusable(seq) for seq in self.shards.cache}

    def below(self, seq: int) -> list[int]:
        """How many of the last tokens of each run that can be shared lie below the pool; none: all are in it."""
        size = self.shards.block_size
        counts = [len(run.sunk) * size for run in self.shards.cache.runs_of(seq)]
        return counts if any(counts) else []

    def since(self, seq: int) -> int:
        """The first row that can follow what can be shared of a sequence, or what is kept of it: those before it would see more
        than is left."""
        anchors = self.shards.cache.anchors(seq)
        if anchors:
            return anchors[-1].since
        return self.shards.seen_whole_from(seq) if seq in self.shards else 0

    def branches(self, seq: int) -> list[tuple[int, int]]:
        """Further back rows can follow what can be shared of a sequence where they are in one of these ranges: the first, and
        one that follows all of it."""
        return [(anchor.since, anchor.end) for anchor in self.shards.cache.anchors(seq)[:-1]]

    def _reusable(self, seq: int) -> list[list[tuple[int, int]]]:
        if seq in self.shards.cache:
            return [run.all_ranges for run in self.shards.cache.runs(seq)]
        if self.shards.windows and not self.shards.cache.anchors(seq):
            return []
        end = self._published.get(seq, 0)
        whole = (whole_blocks(run, end, self.shards.block_size) for run in self.ranges(seq))
        return [run for run in whole if run]

    # --- runs that move -----------------------------------------------------------------------------------------------

    def note_copy(self, move: int, ranges: Sequence[tuple[int, int]], firsts: Sequence[int] = ()) -> None:
        """What is reserved as `move` holds a copy of tokens at these positions. `firsts`: as `ShardTable.adopt`. Nothing
        happens if it was dropped."""
        if move in self.shards:
            self._copies[move] = list(ranges), list(firsts)

    def adopt(self, move: int, seq: int) -> bool:
        """A copy becomes a run of its sequence. False: there is none. Raises ValueError as `ShardTable.adopt`."""
        copy = self._copies.pop(move, None)
        if copy is None:
            return False
        self.shards.adopt(move, seq, *copy)
        self._changed[seq] = None
        return True

    def detach(self, move: int, seq: int, start: int) -> None:
        """A run is another instance's from the present step on. Raises KeyError if there is none that begins there."""
        self.shards.detach(move, seq, start)
        self._changed[seq] = None
        if seq in self._published:
            self._renewed[seq] = None
            if seq not in self.shards:
                del self._published[seq]
                self.shards.cache.drop_anchors(seq)

    def let_go(self, move: int) -> None:
        """No step reads a detached run any more. Raises KeyError if there is none."""
        self.shards.let_go(move)
        self.freed = True

    # --- epochs -------------------------------------------------------------------------------------------------------

    def settle(self, uncertain: Iterable[tuple[int, int]]) -> dict[int, list[list[tuple[int, int]]]]:
        """End an epoch: what each sequence keeps here, as the ranges of each run. Nothing else is reserved any more.

        `uncertain`: (seq, position) of tokens that may not be written. They go, with those behind them in their runs. What was
        detached and not let go stays here, too: whoever adopted it may be lost. Cached shards stay as they are.
        """
        for seq in list(self._pinned):
            self.free(seq)
        for seq in self.shards:
            self.shards.cache.drop_anchors(seq)
        self._published.clear()
        self._prompts.clear()
        self._branches.clear()
        self._changed |= dict.fromkeys(self.shards.attach_again())
        for seq, position in uncertain:
            if seq in self.shards:
                self._note_freed(self.shards.take_back(seq, position))
                self._changed[seq] = None
                if seq in self.shards and self.shards.seen_whole_from(seq) == NEVER:
                    self.free(seq)
        for seq in list(self.shards):
            if self.shards[seq].num_tokens:
                self._note_freed(self.shards.free_spare(seq))
            else:
                self.free(seq)
        self._dormant = dict.fromkeys(self.shards)
        return {seq: self.ranges(seq) for seq in self._dormant}

    def shared_ends(self) -> dict[int, int]:
        """Of dormant sequences: one more than the last position in a block that others have, too. They can't be cut before."""
        ends = {seq: self.shards.shared_end(seq) for seq in self._dormant}
        return {seq: end for seq, end in ends.items() if end}

    def keep(self, seqs: Iterable[int]) -> None:
        """Free all dormant and cached shards but those of these sequences."""
        wanted = set(seqs)
        for seq in [seq for seq in [*self._dormant, *self.shards.cache] if seq not in wanted]:
            self.discard(seq)

    def discard(self, seq: int) -> None:
        """Free a sequence's shard if it is dormant or cached."""
        if seq in self._dormant:
            self.free(seq)
        elif seq in self.shards.cache:
            self._note_freed(self.shards.cache.remove(seq))

    def wake(self, seq: int, end: int, starts: Iterable[int] | None = None, branch: int = 0) -> None:
        """A sequence begins, or goes on: then its shard is dormant, and is one like any other again, without positions from
        `end` on.

        `starts`: where the runs that stay begin, if another instance has the others, too; None: all stay. `branch`: before
        which position others began alike that it could not begin with; 0: none did. Raises ValueError if
        that would cut a block which others have.
        """
        self._pinned.pop(seq, None)
        self._prompts[seq] = max(0, end - self._anchor_tokens)
        if branch and self.caches and self.reserve(seq, len(self.shards.windows)):  # a block more in each table than else
            self._branches[seq] = branch
        if seq in self._dormant:
            if (shared := self.shards.shared_end(seq)) > end:
                raise ValueError(f"sequence {seq} shares its blocks up to position {shared}, and can't be cut at {end}")
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
        gone = [seq for seq in [*self._pinned, *self._published] if seq not in self.shards]
        gone += [seq for seq in self.shards.cache.anchored if seq not in self.shards and seq not in self.shards.cache]
        both = [seq for seq in self.shards if seq in self.shards.cache]
        if gone or both or (len(self.shards.cache) and not self.caches):
            raise RuntimeError(f"sequences {gone} hold nothing, {both} are cached and go on; caching: {self.caches}")

    def _note_freed(self, blocks: int) -> None:
        self.freed = self.freed or blocks > 0
