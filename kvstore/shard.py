"""Which tokens of which sequence lie in which blocks of this instance: pure integers, no tensors.

A shard is one or several *runs*. A run packs its tokens into blocks of its own in ascending position, whichever positions
they are:

    positions   0 .. 4        12 .. 17            (tokens [5, 12) lie on other instances)
    ranges     [0, 5)        [12, 18)
    blocks     | 0 1 2 3 | 4 12 13 14 | 15 16 17 . |      block_size 4: 11 tokens, 1 more fits

So the tokens of a run that a row at position p may see are a *prefix* of it, and one number per row and run says which
(in layers with windows or chunks a slice, and two). A position range is no run of its own: a prompt prefilled with others
leaves hundreds of ranges on an instance, which would each waste part of a block, and weigh in every notice. A run wastes less
than one block, and a shard has a second one only where tokens came out of order:

    runs   [0, 18): 0 .. 4, 12 .. 17        [5, 9): 5 .. 8       tokens [5, 9) came when 17 was here

Which run tokens continue follows from where the runs end alone (`continued`), so all that know this derive the same.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise

from kvstore.pool import BlockPool
from kvstore.prefix import PrefixCache, first_tokens
from kvstore.tiers import Tiers


def continued(ends: Sequence[int], start: int) -> int | None:
    """Which of the runs that end there a token at `start` goes on with: the last to end at or before it. None: a new one.

    So no more runs come to be than must (patience sorting).
    """
    best: int | None = None
    last = -1
    for i, end in enumerate(ends):
        if last < end <= start:
            best, last = i, end
    return best


class Run:
    """Tokens that lie in ascending position: token i is at `block_ids[i // block_size]`, offset `i % block_size`.

    `[start, end)` holds the positions of all of them, not every position in it is one of theirs.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.block_ids: list[int] = []
        self.num_tokens = 0
        # [start, end) are positions whose KV is written here (or will be, by a step that was accepted)
        self.ranges: list[tuple[int, int]] = []
        self._before: list[int] = []
        """For each range: tokens of the ranges before it."""

    @property
    def start(self) -> int:
        """Position of the first token. Raises IndexError if there is none."""
        return self.ranges[0][0]

    @property
    def end(self) -> int:
        """One more than the position of the last token. Raises IndexError if there is none."""
        return self.ranges[-1][1]

    def blocks_for(self, count: int) -> int:
        """How many more blocks so many more tokens take."""
        return -(-(self.num_tokens + count) // self.block_size) - len(self.block_ids)

    def append(self, start: int, end: int) -> list[int]:
        """Take positions `[start, end)`, which follow all that it has, into blocks that are there: their slots."""
        if self.ranges and self.ranges[-1][1] == start:
            self.ranges[-1] = (self.ranges[-1][0], end)
        else:
            self.ranges.append((start, end))
            self._before.append(self.num_tokens)
        first = self.num_tokens
        self.num_tokens += end - start
        size = self.block_size
        return [self.block_ids[i // size] * size + i % size for i in range(first, self.num_tokens)]

    @classmethod
    def of(cls, block_size: int, ranges: Sequence[tuple[int, int]], block_ids: Sequence[int]) -> "Run":
        """Tokens at these positions, ascending, that were written into these blocks. Raises ValueError if the blocks are too
        few or too many for them."""
        run = cls(block_size)
        tokens = sum(end - start for start, end in ranges)
        if not tokens or -(-tokens // block_size) != len(block_ids):
            raise ValueError(f"{tokens} tokens don't take {len(block_ids)} blocks of {block_size}")
        run.block_ids = list(block_ids)
        for start, end in ranges:
            run.append(start, end)
        return run

    def cut(self, position: int) -> list[int]:
        """Forget the tokens at `position` and after it: the blocks that the others don't take."""
        kept = bisect_left(self.ranges, (position,))
        del self.ranges[kept:], self._before[kept:]
        self.num_tokens = 0
        if self.ranges:
            start, end = self.ranges[-1]
            self.ranges[-1] = (start, min(end, position))
            self.num_tokens = self._before[-1] + self.end - start
        used = -(-self.num_tokens // self.block_size)
        freed = self.block_ids[used:]
        del self.block_ids[used:]
        return freed

    def kv_lens(self, start: int, end: int) -> list[int]:
        """For each position p of `[start, end)`: how many tokens here have a position <= p."""
        lens: list[int] = []
        p = start
        for i in range(max(0, bisect_right(self.ranges, (start, start)) - 1), len(self.ranges)):
            a, b = self.ranges[i]
            held = self._before[i]
            if p < a:  # rows before this range see what came before it
                lens += [held] * (min(a, end) - p)
                p = min(a, end)
            if p < min(b, end):  # rows inside see one more each
                lens += range(held + p - a + 1, held + min(b, end) - a + 1)
                p = min(b, end)
            if p == end:
                return lens
        return lens + [self.num_tokens] * (end - p)

    def overlaps(self, start: int, end: int) -> bool:
        """Whether it has a token at one of the positions `[start, end)`."""
        last = bisect_left(self.ranges, (end,)) - 1  # range to begin before `end`
        return last >= 0 and self.ranges[last][1] > start


class Shard:
    """The part of one sequence that lies here."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.runs: list[Run] = []
        """In the order in which they were opened; none is empty."""
        self.spare: list[int] = []
        """Blocks that are reserved, in the order in which runs will take them."""
        self.newest_block: int | None = None
        """One of its blocks, behind which the next should lie."""

    @property
    def num_tokens(self) -> int:
        return sum(run.num_tokens for run in self.runs)

    @property
    def block_ids(self) -> list[int]:
        """All its blocks."""
        return [block for run in self.runs for block in run.block_ids] + self.spare

    def can_append(self, start: int, end: int) -> bool:
        """Whether its blocks hold positions `[start, end)`, too."""
        return self._run_for(start).blocks_for(end - start) <= len(self.spare)

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
        run.block_ids += self.spare[:blocks]
        del self.spare[:blocks]
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

    def take_spare(self) -> list[int]:
        """The blocks that no run has taken: they are reserved no longer."""
        freed, self.spare = self.spare, []
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
        return Run(self.block_size) if index is None else self.runs[index]


class ShardTable:
    """All shards of one instance, those that are cached, and the pool they draw on."""

    def __init__(self, num_blocks: int, block_size: int, tiers: Tiers | None = None) -> None:
        """`tiers`: below the pool; None: there are none. Raises ValueError unless the numbers are positive."""
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(self.pool, block_size, tiers)
        self.reading: set[int] = set()
        """Blocks into which copies are being read."""
        self.block_size = block_size
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
        """Give the sequence's shard (new, if there is none) that many more blocks; cached ones are evicted for it where they
        must be. Ask `can_reserve` first."""
        if blocks > self.pool.num_free:
            self.cache.evict(blocks - self.pool.num_free)
        shard = self._shards.get(seq) or Shard(self.block_size)
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

    def retire(self, seq: int) -> int:
        """The sequence is over: its whole blocks are cached, the others freed: how many. Raises KeyError if it has none."""
        shard = self._shards.pop(seq)
        freed = len(self.pool.free(shard.spare))
        return freed + self.cache.put(seq, [(run.ranges, run.block_ids) for run in shard.runs])

    def share(self, seq: int, source: int, runs: Sequence[Sequence[tuple[int, int]]]) -> bool:
        """Let a new sequence have whole blocks of another's, live or cached, which are the first tokens of its runs at exactly
        these positions. False: it hasn't got them (any more).

        Raises ValueError if something of `seq` is here.
        """
        if seq in self._shards:
            raise ValueError(f"sequence {seq} is here already and can't begin with blocks of {source}")
        theirs: dict[int, tuple[list[tuple[int, int]], list[int]]] = {}
        if source in self.cache:
            theirs = {run.start: (run.ranges, run.block_ids) for run in self.cache.runs(source) if run.block_ids}
        elif source in self._shards:
            theirs = {run.start: (run.ranges, run.block_ids) for run in self._shards[source].runs}
        shard = Shard(self.block_size)
        for wanted in runs:
            tokens = sum(end - start for start, end in wanted)
            ranges, block_ids = theirs.pop(wanted[0][0] if wanted else -1, ([], []))
            if not tokens or tokens % self.block_size or first_tokens(ranges, tokens) != list(wanted):
                return False
            shard.runs.append(Run.of(self.block_size, wanted, block_ids[: tokens // self.block_size]))
        if not shard.runs:
            return False
        self.pool.share(shard.block_ids)
        if source in self.cache:
            self.cache.touch(source)
        shard.find_newest_block()
        self._shards[seq] = shard
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

    def adopt(self, move: int, seq: int, ranges: Sequence[tuple[int, int]]) -> None:
        """What is reserved as `move` holds tokens of a sequence at these positions now: it becomes that one's newest run.

        Raises KeyError if nothing is reserved, ValueError if it is too little or too much, or one of the positions is here.
        """
        blocks = self._shards[move].spare
        run = Run.of(self.block_size, ranges, blocks)
        shard = self._shards.get(seq) or Shard(self.block_size)
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
        self.pool.free(run.block_ids + spare)

    def attach_again(self) -> list[int]:
        """Undo what was detached and not let go: the sequences. Whose positions have come here again since is let go."""
        detached, self._detached = self._detached, {}
        for seq, run, spare in detached.values():
            shard = self._shards.get(seq) or Shard(self.block_size)
            self.pool.free(spare)
            if any(other.overlaps(start, end) for other in shard.runs for start, end in run.ranges):
                self.pool.free(run.block_ids)
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
        return self._give_back(seq, [block for run in gone for block in run.block_ids])

    def cut(self, seq: int, position: int) -> int:
        """Forget the sequence's tokens at `position` and after it: how many blocks that frees. Raises KeyError if it has
        nothing here; a shard that is left without a block goes."""
        return self._give_back(seq, self._shards[seq].cut(position))

    def take_back(self, seq: int, position: int) -> int:
        """As `Shard.take_back`, otherwise as `cut`."""
        return self._give_back(seq, self._shards[seq].take_back(position))

    def free_spare(self, seq: int) -> int:
        """Free the blocks that the sequence has reserved and not used, otherwise as `cut`."""
        return self._give_back(seq, self._shards[seq].take_spare())

    def _give_back(self, seq: int, block_ids: Sequence[int]) -> int:
        self.pool.free(block_ids)
        if not self._shards[seq].block_ids:
            del self._shards[seq]
        return len(block_ids)

    def validate(self) -> None:
        """The pool knows who refers to each block; only full ones have several; no position is in two runs; and no run has more
        or fewer blocks than its tokens take. Raises RuntimeError otherwise."""
        held = [block for shard in self._shards.values() for block in shard.block_ids]
        held += [block for _, run, spare in self._detached.values() for block in run.block_ids + spare]
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
