"""Which tokens of which sequence lie in which blocks of this instance: pure integers, no tensors.

A shard is one or several *runs* (`kvstore.run`), and blocks that are reserved for what follows.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate, islice, pairwise

from kvstore.anchor import Anchor, Window, sees_whole_from
from kvstore.pool import BlockPool
from kvstore.prefix import PrefixCache
from kvstore.ranges import Ranges, first_tokens
from kvstore.run import Run, continued
from kvstore.sight import Sight
from kvstore.tiers import Tiers


class Shard:
    """The part of one sequence that lies here."""

    def __init__(self, block_size: int, num_windows: int = 0) -> None:
        self.block_size = block_size
        self._num_windows = num_windows
        self.runs: list[Run] = []
        """In the order in which they were opened; none is empty."""
        self.spare: list[int] = []
        """Blocks that are reserved, in the order in which runs will take them."""
        self.stale: list[int] = []
        """Blocks that no row to come sees, but perhaps one under way, and that others have, too."""
        self.newest_block: int | None = None
        """One of its blocks, behind which the next should lie."""

    @property
    def num_tokens(self) -> int:
        return sum(run.num_tokens for run in self.runs)

    @property
    def block_ids(self) -> list[int]:
        """All its blocks."""
        return [block for run in self.runs for block in run.all_blocks] + self.spare + self.stale

    def can_append(self, start: int, end: int) -> bool:
        """Whether its blocks hold positions `[start, end)`, too."""
        return self.lacks_for(start, end) <= 0

    def lacks_for(self, start: int, end: int) -> int:
        """How many blocks more than it has positions `[start, end)` take; none or fewer: they fit."""
        return self._run_for(start).blocks_for(end - start) - len(self.spare)

    def append(self, start: int, end: int) -> list[int]:
        """Take positions `[start, end)` into the run that they continue, or a new one; returns their slots
        (`block id * block_size + offset`).

        Raises ValueError if it has one of them, RuntimeError if the blocks don't hold them.
        """
        if start >= end or any(run.overlaps(start, end) for run in self.runs):
            raise ValueError(f"positions [{start}, {end}) can't join {[(run.start, run.end) for run in self.runs]}")
        run = self._run_for(start)
        blocks = run.blocks_for(end - start)
        if blocks > len(self.spare):
            room = (len(run.block_ids) + len(self.spare)) * self.block_size
            raise RuntimeError(f"{end - start} tokens don't fit: {run.num_tokens} of {room} in use")
        run.take(end - start, self.spare)
        if not run.num_tokens:
            self.runs.append(run)
        return run.append(start, end)

    def cut(self, position: int) -> list[int]:
        """Forget the tokens at `position` and after it: the blocks that no run takes any more."""
        return self._cut_runs(self.runs, position)

    def take_back(self, position: int) -> list[int]:
        """Forget the token at `position` and those that came after it in its run, if it is here: the blocks that no run
        takes any more.

        Later tokens of a run can't stay without it: they are packed behind it.
        """
        return self._cut_runs([run for run in self.runs if run.overlaps(position, position + 1)], position)

    def take_spare(self, but: int = 0) -> list[int]:
        """The blocks that no run has taken, but so many, and those that none sees: they are reserved no longer."""
        freed = self.spare[but:] + self.stale
        del self.spare[but:]
        self.stale = []
        self.find_newest_block()
        return freed

    def _cut_runs(self, runs: Sequence[Run], position: int) -> list[int]:
        freed = [block for run in runs for block in run.cut(position)]
        self.runs = [run for run in self.runs if run.num_tokens]
        self.find_newest_block()
        return freed

    def find_newest_block(self) -> None:
        """After blocks have come or gone."""
        ids = self.block_ids
        self.newest_block = ids[-1] if ids else None

    def _run_for(self, start: int) -> Run:
        """An empty one if none is continued."""
        index = continued([run.end for run in self.runs], start)
        return Run(self.block_size, self._num_windows) if index is None else self.runs[index]


class ShardTable:
    """All shards of one instance, those that are cached, and the pool they draw on."""

    def __init__(self, num_blocks: int, block_size: int, tiers: Tiers | None = None, windows: Sequence[Sight] = ()) -> None:
        """`tiers`: below the pool; None: there are none. `windows`: what rows see by each table behind the first.

        Raises ValueError unless the numbers are positive.
        """
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(self.pool, block_size, tiers)
        self.reading: set[int] = set()
        """Blocks into which copies are being read."""
        self.block_size = block_size
        self.windows = tuple(windows)
        self._shards: dict[int, Shard] = {}
        self._detached: dict[int, tuple[int, Run, list[int]]] = {}
        """move -> a run that is another instance's now, its sequence, and blocks that were spare beside it: steps that read
        them may still run."""

    def __contains__(self, seq: int) -> bool:
        return seq in self._shards

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[int]:
        """The sequences of which something is here, blocks that are only reserved included."""
        return iter(self._shards)

    def __getitem__(self, seq: int) -> Shard:
        return self._shards[seq]

    @property
    def num_free(self) -> int:
        """Blocks that can be reserved, those included that are cached and that nobody uses."""
        return self.pool.num_free + self.pool.num_evictable

    def can_reserve(self, blocks: int) -> bool:
        return blocks <= self.num_free

    def reserve(self, seq: int, blocks: int) -> None:
        """Give the sequence's shard (new, if there is none) that many more blocks, for any table; cached ones are evicted for
        it where they must be. Ask `can_reserve` first."""
        if blocks > self.pool.num_free:
            self.cache.evict(blocks - self.pool.num_free)
        shard = self._shards.get(seq) or self._new_shard()
        shard.spare += (ids := self.pool.allocate(blocks, shard.newest_block))
        shard.newest_block = ids[-1] if ids else shard.newest_block
        self._shards[seq] = shard

    def take_for_reading(self, blocks: int, after: int | None) -> list[int]:
        """That many blocks, for copies that are read from below; cached ones make room. Ask `can_reserve` first."""
        if blocks > self.pool.num_free:
            self.cache.evict(blocks - self.pool.num_free)
        taken = self.pool.allocate(blocks, after)
        self.reading.update(taken)
        return taken

    def end_reading(self, blocks: Iterable[int]) -> None:
        """Nothing of use came to them: they are free."""
        given = list(blocks)
        self.reading.difference_update(given)
        self.pool.free(given)

    def free(self, seq: int) -> None:
        """Give all blocks of the sequence back. Raises KeyError if it has none here."""
        self.pool.free(self._shards.pop(seq).block_ids)

    def append(self, seq: int, start: int, end: int) -> list[int]:
        """As `Shard.append`. Raises RuntimeError if the block to be written is another sequence's, too."""
        shard = self._shards[seq]
        slots = shard.append(start, end)
        if self.pool.refs(slots[0] // self.block_size) > 1:  # those that follow it were spare
            raise RuntimeError(f"sequence {seq} would write positions [{start}, {end}) into a block that others have")
        return slots

    def window_slots(self, seq: int, start: int, end: int) -> list[list[int]]:
        """Where the tokens at `[start, end)`, which were appended last, go in each table behind the first."""
        run = next(run for run in self._shards[seq].runs if run.end == end)
        return [run.slots(table, end - start) for table in range(1, 1 + len(self.windows))]

    def trim(self, seq: int, position: int, *, recycles: bool) -> int:
        """Free the blocks of the sequence of which rows from `position` on see nothing: how many. `recycles`: they are reserved
        for it instead, until `free_spare`: rows under way may still see them, and only what follows these writes there."""
        shard = self._shards[seq]
        given = [block for run in shard.runs for block in run.trim(self.windows, position)]
        if not recycles:
            return len(self.pool.free(given))
        for block in given:
            (shard.spare if self.pool.refs(block) == 1 else shard.stale).append(block)
        return 0

    def seen_whole_from(self, seq: int) -> int:
        """The first row of the sequence that sees nothing of it that was trimmed here, nor does any after it."""
        return max((run.seen_whole_from(self.windows) for run in self._shards[seq].runs), default=0)

    def retire(self, seq: int) -> int:
        """The sequence is over: its whole blocks are cached, the others freed: how many. Raises KeyError if it has none.

        Where there are windows, what lies behind its anchor is of use to nobody.
        """
        shard = self._shards.pop(seq)
        freed = len(self.pool.free(shard.take_spare()))
        if not self.windows:
            return freed + self.cache.put(seq, [(run.ranges, run.block_ids) for run in shard.runs])
        self._lengthen_anchor(seq, shard)
        anchors = self.cache.anchors(seq)
        freed += len(self.pool.free(block for run in shard.runs for window in run.windows for block in window.block_ids))
        if not anchors:
            return freed + len(self.pool.free(block for run in shard.runs for block in run.block_ids))
        runs: list[tuple[Ranges, list[int]]] = []
        for run in shard.runs:  # one that came from another instance behind the anchor is none of its
            count = run.count_before(anchors[-1].end) if run.start in anchors[-1].windows else 0
            blocks = -(-count // self.block_size)
            freed += len(self.pool.free(run.block_ids[blocks:]))
            runs.append((first_tokens(run.ranges, count), run.block_ids[:blocks]))
        return freed + self.cache.put(seq, runs)

    def _lengthen_anchor(self, seq: int, shard: Shard) -> None:
        """If all that follows the last anchor of a sequence is still here, let it be part of it."""
        anchors = self.cache.anchors(seq)
        if not anchors:
            return
        anchor = anchors[-1]
        windows: dict[int, list[Window]] = {}
        since = anchor.since
        for run in shard.runs:
            whole = run.num_tokens // self.block_size
            before = anchor.windows.get(run.start) or [Window(window.first) for window in run.windows]
            if any(window.first > kept.stop for kept, window in zip(before, run.windows, strict=True)):
                return
            windows[run.start] = [
                Window(kept.first, kept.block_ids + window.block_ids[kept.stop - window.first : max(0, whole - window.first)])
                for kept, window in zip(before, run.windows, strict=True)
            ]
            since = max(since, sees_whole_from(run.ranges, windows[run.start], self.windows, self.block_size))
        end = max(run.end for run in shard.runs)
        if since <= end:
            self.cache.lengthen_anchor(seq, Anchor(windows, since, end))

    def set_anchor(self, seq: int, end: int) -> None:
        """Keep what is here of windows before position `end`, for those that begin as the sequence does."""
        self.cache.add_anchor(seq, self._anchor_of(seq, end, 0))

    def set_branch(self, seq: int, end: int) -> bool:
        """Keep what a row at position `end` sees in windows, or a block before as only whole ones are shared, and no more: the
        sequence, whose prompt is being computed, may need its blocks for what follows and gets others instead. False: there are
        none, or some of it is gone."""
        anchor = self._anchor_of(seq, end, max(0, end - self.block_size))
        blocks = sum(1 for _ in anchor.block_ids())
        if anchor.since > end or not self.can_reserve(blocks):
            return False
        self.cache.add_anchor(seq, anchor)
        self.reserve(seq, blocks)
        return True

    def _anchor_of(self, seq: int, end: int, row: int) -> Anchor:
        """Of what is in windows before position `end`, without what rows from `row` on don't see."""
        windows: dict[int, list[Window]] = {}
        since = 0
        for run in self._shards[seq].runs:
            whole = run.count_before(end) // self.block_size
            its: list[Window] = []
            for sight, window in zip(self.windows, run.windows, strict=True):
                first = max(window.first, run.count_before(sight.first(row)) // self.block_size)
                its.append(window.part(first, max(first, min(window.stop, whole))) or Window(first))
            since = max(since, sees_whole_from(run.ranges, its, self.windows, self.block_size))
            windows[run.start] = its
        return Anchor(windows, since, end)

    def share(self, seq: int, source: int, runs: Sequence[Sequence[tuple[int, int]]], row: int | None = None) -> bool:
        """Let a new sequence have whole blocks of another's, live or cached, which are the first tokens of its runs at exactly
        these positions. `row`: the first that it computes; None: the one behind these. False: it hasn't got them (any more).

        Raises ValueError if something of `seq` is here.
        """
        if seq in self._shards:
            raise ValueError(f"sequence {seq} is here already and can't begin with blocks of {source}")
        theirs: dict[int, tuple[Ranges, list[int]]] = {}
        if source in self.cache:
            theirs = {run.start: (run.ranges, run.block_ids) for run in self.cache.runs(source) if run.block_ids}
        elif source in self._shards:
            theirs = {run.start: (run.ranges, run.block_ids) for run in self._shards[source].runs}
        shard = self._new_shard()
        for wanted in runs:
            tokens = sum(end - start for start, end in wanted)
            ranges, block_ids = theirs.pop(wanted[0][0] if wanted else -1, ([], []))
            if not tokens or tokens % self.block_size or first_tokens(ranges, tokens) != list(wanted):
                return False
            shard.runs.append(Run.of(self.block_size, wanted, block_ids[: tokens // self.block_size]))
        if not shard.runs or not self._share_windows(shard, source, row):
            return False
        self.pool.share(shard.block_ids)
        if self.windows:  # who comes next finds the newest first
            windows = {run.start: [Window(window.first, window.block_ids) for window in run.windows] for run in shard.runs}
            since = max(run.seen_whole_from(self.windows) for run in shard.runs)
            self.cache.add_anchor(seq, Anchor(windows, since, max(row or 0, *(run.end for run in shard.runs))))
        if source in self.cache:
            self.cache.touch(source)
        shard.find_newest_block()
        self._shards[seq] = shard
        return True

    def _share_windows(self, shard: Shard, source: int, row: int | None) -> bool:
        """Let a new shard have all of an anchor of another's that belongs to its runs: rows may fill gaps between them first.
        False: those behind them would see something that is gone."""
        if not self.windows:
            return True
        end = max(run.end for run in shard.runs)
        row = end if row is None else row
        anchor = next((anchor for anchor in self.cache.anchors(source) if anchor.since <= row and end <= anchor.end), None)
        if anchor is None:
            return False
        for run in shard.runs:
            parts = [window.part(window.first, len(run.block_ids)) for window in anchor.windows.get(run.start, ())]
            run.windows = [part for part in parts if part is not None]
            if len(run.windows) < len(self.windows):
                return False
        return True

    def shared_end(self, seq: int) -> int:
        """One more than the last position of the sequence that lies in a block which others have, too; 0 if none does."""
        ends = [0]
        for run in self._shards[seq].runs:
            shared = sum(self.pool.refs(block) > 1 for block in run.block_ids)
            if shared:
                ends.append(first_tokens(run.ranges, shared * self.block_size)[-1][1])
        return max(ends)

    def find_run(self, seq: int, start: int) -> Run | None:
        """The sequence's run here that begins at position `start`."""
        shard = self._shards.get(seq)
        return next((run for run in shard.runs if run.start == start), None) if shard is not None else None

    def adopt(self, move: int, seq: int, ranges: Sequence[tuple[int, int]], firsts: Sequence[int] = ()) -> None:
        """What is reserved as `move` holds tokens of a sequence at these positions now: it becomes that one's newest run.
        `firsts`: the first block of each table behind the first; the reserved ones are those of one table after the other.

        Raises KeyError if nothing is reserved, ValueError if it is too little or too much, or one of the positions is here.
        """
        blocks = self._shards[move].spare
        run = self._run_of(ranges, blocks, firsts)
        shard = self._shards.get(seq) or self._new_shard()
        if any(other.overlaps(start, end) for other in shard.runs for start, end in ranges):
            raise ValueError(f"sequence {seq} has some of the positions {ranges} already")
        del self._shards[move]
        shard.runs.append(run)
        shard.newest_block = shard.newest_block if shard.newest_block is not None else blocks[-1]
        self._shards[seq] = shard

    def detach(self, move: int, seq: int, start: int) -> None:
        """The sequence's run from position `start` is no part of its shard any more; its blocks stay until `let_go`. With the
        last run what is reserved for the sequence goes as well.

        Raises KeyError if it has none such here.
        """
        run = self.find_run(seq, start)
        if run is None:
            raise KeyError(f"sequence {seq} has no run from position {start}")
        shard = self._shards[seq]
        shard.runs.remove(run)
        spare = [] if shard.runs else shard.take_spare()
        shard.find_newest_block()
        if not shard.block_ids:
            del self._shards[seq]
        self._detached[move] = seq, run, spare

    def let_go(self, move: int) -> None:
        """Give the blocks of a detached run back. Raises KeyError if there is none."""
        _, run, spare = self._detached.pop(move)
        self.pool.free(run.all_blocks + spare)

    def attach_again(self) -> list[int]:
        """Undo what was detached and not let go: the sequences. Whose positions have come here again since is let go."""
        detached, self._detached = self._detached, {}
        for seq, run, spare in detached.values():
            shard = self._shards.get(seq) or self._new_shard()
            self.pool.free(spare)
            if any(other.overlaps(start, end) for other in shard.runs for start, end in run.ranges):
                self.pool.free(run.all_blocks)
                continue
            shard.runs.append(run)
            shard.find_newest_block()
            self._shards[seq] = shard
        return [seq for seq, _, _ in detached.values()]

    def keep_runs(self, seq: int, starts: Collection[int]) -> int:
        """Free the sequence's runs that begin at other positions than these: how many blocks. Otherwise as `cut`."""
        shard = self._shards[seq]
        gone = [run for run in shard.runs if run.start not in starts]
        shard.runs = [run for run in shard.runs if run.start in starts]
        shard.find_newest_block()
        return self._give_back(seq, [block for run in gone for block in run.all_blocks])

    def cut(self, seq: int, position: int) -> int:
        """Forget the sequence's tokens at `position` and after it: how many blocks that frees. Raises KeyError if it has
        nothing here; a shard that is left without a block goes."""
        return self._give_back(seq, self._shards[seq].cut(position))

    def take_back(self, seq: int, position: int) -> int:
        """As `Shard.take_back`, otherwise as `cut`."""
        return self._give_back(seq, self._shards[seq].take_back(position))

    def free_spare(self, seq: int, but: int = 0) -> int:
        """Free the blocks that the sequence has reserved and not used, but so many; otherwise as `cut`."""
        return self._give_back(seq, self._shards[seq].take_spare(but))

    def _new_shard(self) -> Shard:
        return Shard(self.block_size, len(self.windows))

    def _run_of(self, ranges: Sequence[tuple[int, int]], blocks: Sequence[int], firsts: Sequence[int]) -> Run:
        """A run of which all tables' blocks are listed one after the other. Raises ValueError if they are too few or many."""
        tokens = sum(end - start for start, end in ranges)
        stop = -(-tokens // self.block_size)
        counts = [stop, *(max(0, stop - first) for first in firsts)]
        if len(firsts) != len(self.windows) or sum(counts) != len(blocks):
            tables = f" in tables from {[0, *firsts]}" if self.windows else ""
            raise ValueError(f"{tokens} tokens don't take {len(blocks)} blocks of {self.block_size}{tables}")
        left = iter(blocks)
        first, *others = [list(islice(left, count)) for count in counts]
        return Run.of(self.block_size, ranges, first, [Window(*window) for window in zip(firsts, others, strict=True)])

    def _give_back(self, seq: int, block_ids: Sequence[int]) -> int:
        self.pool.free(block_ids)
        if not self._shards[seq].block_ids:
            del self._shards[seq]
        return len(block_ids)

    def validate(self) -> None:
        """The pool knows who refers to each block; only full ones have several; no position is in two runs; and no run has more
        or fewer blocks than its tokens take. Raises RuntimeError otherwise."""
        held = [block for shard in self._shards.values() for block in shard.block_ids]
        held += [block for _, run, spare in self._detached.values() for block in run.all_blocks + spare]
        held += self.reading
        self.pool.validate(Counter(held), self.cache.refs())
        self.cache.validate()
        for seq, shard in self._shards.items():
            if any(self.pool.refs(block) > 1 for block in shard.spare):
                raise RuntimeError(f"sequence {seq}: blocks {shard.spare} are its spare ones, and another's")
            for run in shard.runs:
                if run.num_tokens % self.block_size and self.pool.refs(run.block_ids[-1]) > 1:
                    raise RuntimeError(f"sequence {seq}: block {run.block_ids[-1]} is another's, too, and not full")
                tokens = sum(end - start for start, end in run.ranges)
                before = list(accumulate([0, *(end - start for start, end in run.ranges[:-1])]))
                if before != run._before:
                    raise RuntimeError(f"sequence {seq}: {run._before} tokens before ranges {run.ranges}")
                if not tokens or tokens != run.num_tokens or run.blocks_for(0) or not _are_apart(run.ranges):
                    raise RuntimeError(
                        f"sequence {seq}: ranges {run.ranges}, {run.num_tokens} tokens in {len(run.block_ids)} blocks"
                    )
            if not _are_apart(sorted(piece for run in shard.runs for piece in run.ranges)):
                raise RuntimeError(f"sequence {seq}: runs {[run.ranges for run in shard.runs]} overlap")


def _are_apart(ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether each range ends at or before the next begins."""
    return all(a <= b for a, b in pairwise(edge for piece in ranges for edge in piece))
