"""Cached shards: what sequences that are over left here, for others that begin with the same tokens.

A cached shard has whole blocks alone, each of a run's first tokens, whichever positions these are. Nothing is ever written to
them again, so any number of sequences may attend to them where they lie:

    run of a live sequence     | 0 1 2 3 | 4 12 13 14 | 15 16 . . |       block_size 4
    cached                     | 0 1 2 3 | 4 12 13 14 |
    shared up to position 14   | 0 1 2 3 |                                14 is in the second block

Where there are tiers below the pool (`kvstore.tiers`), a block that has to make room and has a copy there lives on in it.
Blocks leave a run from its end, so what is below follows what is in the pool; what is lost between splits the run:

    run     | in the pool | below ......... |              read up again: the first below is the last in the pool
    lost                  | below | x | below |   ──>   | in the pool | below |   and   | below |

A sequence is *spare* while others that are cached have all that it has here, too. On another instance it may have more, that
is of use only with this; so some of them stay, but no more than `MOST_SPARE`: else each that began with the same few blocks
would be known for as long as these are.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from kvstore.anchor import Anchor
from kvstore.pool import BlockPool
from kvstore.ranges import Ranges, first_tokens, join_ranges, split_tokens
from kvstore.tiers import Tiers

MOST_SUNK_RUNS = 4
"""Runs of one cached sequence that lie below altogether: each is one run more for who shares it. The shortest go."""

MOST_SPARE = 256
"""Spare sequences that stay cached, the most recently used ones."""


class CachedRun:
    """Whole blocks of one run: the first in the pool, those that follow below."""

    __slots__ = ("_sunk_ranges", "block_ids", "num_copied", "ranges", "sunk")

    def __init__(self, ranges: Ranges, block_ids: list[int]) -> None:
        self.ranges = ranges
        """Positions in the pool."""
        self.block_ids = block_ids
        self.num_copied = 0
        """So many of the last blocks in the pool are known to have a copy."""
        self.sunk: list[int] = []
        """Keys of copies, the last position's first."""
        self._sunk_ranges: Ranges = []
        """Their positions, the last ones first."""

    @property
    def start(self) -> int:
        """Position of its first token. Raises IndexError if it has none."""
        return self.ranges[0][0] if self.ranges else self._sunk_ranges[-1][0]

    @property
    def sunk_ranges(self) -> Ranges:
        """Positions below, ascending."""
        return self._sunk_ranges[::-1]

    @property
    def all_ranges(self) -> Ranges:
        """Ascending."""
        return join_ranges(self.ranges, self.sunk_ranges)

    def pop(self, block_size: int) -> int:
        """Forget the last block in the pool, which is returned."""
        self._take_last(block_size)
        return self.block_ids.pop()

    def sink(self, block_size: int, key: int) -> int:
        """The last block in the pool, which is returned, lies below from now on, as this copy."""
        for start, end in reversed(self._take_last(block_size)):
            if self._sunk_ranges and self._sunk_ranges[-1][0] == end:
                self._sunk_ranges[-1] = start, self._sunk_ranges[-1][1]
            else:
                self._sunk_ranges.append((start, end))
        self.sunk.append(key)
        return self.block_ids.pop()

    def rise(self, block_size: int, block: int) -> int:
        """The first one below, whose key is returned, is this block of the pool from now on."""
        first, rest = split_tokens(self.sunk_ranges, block_size)
        self.ranges = join_ranges(self.ranges, first)
        self._sunk_ranges = rest[::-1]
        self.block_ids.append(block)
        self.num_copied += 1
        return self.sunk.pop()

    def split(self, block_size: int, key: int | None) -> "CachedRun | None":
        """Lose a copy (None: the one that would follow the last block in the pool): what follows it, as a run of its own."""
        near = 0 if key is None else len(self.sunk) - 1 - self.sunk.index(key)
        lost = 0 if key is None else 1
        far = CachedRun([], [])
        stays, rest = split_tokens(self.sunk_ranges, near * block_size)
        far._sunk_ranges = split_tokens(rest, lost * block_size)[1][::-1]
        far.sunk = self.sunk[: len(self.sunk) - near - lost]
        self._sunk_ranges = stays[::-1]
        self.sunk = self.sunk[len(self.sunk) - near :]
        return far if far.sunk else None

    def forget_copies(self) -> list[int]:
        """There is nothing below any more: the keys of what lay there alone."""
        lost, self.sunk, self._sunk_ranges = self.sunk, [], []
        self.num_copied = 0
        return lost

    def split_in_pool(self, block_size: int, block: int) -> "CachedRun | None":
        """Lose a block of the pool: what follows it, there and below, as a run of its own."""
        near = self.block_ids.index(block)
        self.ranges, rest = split_tokens(self.ranges, near * block_size)
        far = CachedRun(split_tokens(rest, block_size)[1], self.block_ids[near + 1 :])
        far.num_copied = min(self.num_copied, len(far.block_ids))
        far.sunk, far._sunk_ranges = self.sunk, self._sunk_ranges
        self.block_ids = self.block_ids[:near]
        self.num_copied, self.sunk, self._sunk_ranges = 0, [], []
        return far if far.block_ids or far.sunk else None

    def _take_last(self, block_size: int) -> Ranges:
        """The positions of the last block in the pool, ascending."""
        taken: Ranges = []
        count = block_size
        while count:
            start, end = self.ranges.pop()
            if end - start > count:
                self.ranges.append((start, end - count))
                start = end - count
            taken.append((start, end))
            count -= end - start
        self.num_copied = max(0, self.num_copied - 1)
        return taken[::-1]


class PrefixCache:
    """The cached shards of one instance, least recently used first."""

    def __init__(self, pool: BlockPool, block_size: int, tiers: Tiers | None = None) -> None:
        """`tiers`: below the pool; None: there are none."""
        self.num_evicted = 0
        """Blocks that had to make room, those that have a copy below included."""
        self.tiers = Tiers() if tiers is None else tiers
        self._pool = pool
        self._block_size = block_size
        self._shards: dict[int, list[CachedRun]] = {}
        self._in_pool: dict[int, None] = {}
        """Those of which something is in the pool, in the same order."""
        self._uncopied: dict[int, None] = {}
        """Of these, those of which some block in the pool may have no copy, likewise."""
        self._changed: dict[int, None] = {}
        self._spare: dict[int, None] = {}
        """Those that were spare when last looked at, least recently used first."""
        self._anchors: dict[int, list[Anchor]] = {}
        """Of cached sequences and of such as run, those that end first before others."""
        self.on_cached: Callable[[Sequence[int]], object] = lambda blocks: None
        """Hears of blocks of sequences that are over."""
        pool.on_free = self.tiers.on_free

    def __contains__(self, seq: int) -> bool:
        return seq in self._shards

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[int]:
        return iter(self._shards)

    def runs(self, seq: int) -> Sequence[CachedRun]:
        """Raises KeyError if nothing of it is cached."""
        return self._shards[seq]

    def runs_of(self, seq: int) -> Sequence[CachedRun]:
        """None if nothing of it is cached."""
        return self._shards.get(seq, ())

    def anchors(self, seq: int) -> Sequence[Anchor]:
        """What is kept of it for layers that don't see all."""
        return self._anchors.get(seq, ())

    @property
    def anchored(self) -> Iterable[int]:
        """Sequences that have one."""
        return self._anchors

    def add_anchor(self, seq: int, anchor: Anchor) -> None:
        """Of one that uses these blocks, behind all that it has."""
        self._pool.cache_too(anchor.block_ids())
        self._anchors.setdefault(seq, []).append(anchor)

    def lengthen_anchor(self, seq: int, anchor: Anchor) -> None:
        """In place of the last, all of whose blocks it has. Raises KeyError if there is none."""
        self._pool.cache_too(anchor.block_ids())
        self._pool.forget(self._anchors[seq].pop().block_ids())
        self._anchors[seq].append(anchor)

    def drop_anchors(self, seq: int) -> int:
        """If there are any: how many blocks are free with that."""
        anchors = self._anchors.pop(seq, [])
        if anchors:
            self._changed[seq] = None
        return len(self._pool.forget([block for anchor in anchors for block in anchor.block_ids()]))

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
                self.on_cached(block_ids[:whole])
                kept.append(CachedRun(first_tokens(ranges, whole * self._block_size), block_ids[:whole]))
        if kept:
            self._shards[seq] = kept
            self._in_pool[seq] = None
            self._uncopied[seq] = None
            self._weigh(seq)
        else:
            freed += self.drop_anchors(seq)
        return freed

    def touch(self, seq: int) -> None:
        """It is of use: the last to be evicted, in the pool and below."""
        for order in (self._in_pool, self._uncopied, self._spare):
            if seq in order:
                del order[seq]
                order[seq] = None
        runs = self._shards[seq] = self._shards.pop(seq)
        if not self.tiers.is_off:
            for run in runs:
                copies = (self.tiers.copy_of(block) for block in reversed(run.block_ids))
                self.tiers.touch([*run.sunk, *(key for key in copies if key is not None)])

    def remove(self, seq: int) -> int:
        """Forget a sequence: how many blocks are free with that."""
        runs = self._shards.pop(seq)
        for known in (self._in_pool, self._uncopied, self._spare):
            known.pop(seq, None)
        for run in runs:
            self._release(seq, run)
        freed = len(self._pool.forget([block for run in runs for block in run.block_ids]))
        return freed + self.drop_anchors(seq)

    def evict(self, blocks: int) -> None:
        """Let that many blocks be free: those of the sequence that is least recently used, later positions first, then of the
        next. What has an anchor goes as a whole: who begins alike would go on where it ends, or a little before. Those of
        sequences that run go last. Raises RuntimeError if not so many are evictable."""
        if blocks > self._pool.num_evictable:
            raise RuntimeError(f"{blocks} blocks are to be evicted, {self._pool.num_evictable} can be")
        self.num_evicted += blocks
        while blocks > 0:
            seq = next(iter(self._in_pool or self._anchors))
            self._changed[seq] = None
            if seq in self._anchors:
                blocks -= self.remove(seq) if seq in self._shards else self.drop_anchors(seq)
                continue
            runs = self._shards[seq]
            in_pool = [run for run in runs if run.block_ids]
            while in_pool and blocks > 0:
                last = max(in_pool, key=lambda run: run.ranges[-1])
                blocks -= self._evict_last(seq, last)
                if not last.block_ids:
                    in_pool.remove(last)
            self._tidy(seq)

    def _evict_last(self, seq: int, run: CachedRun) -> int:
        """The last block of a run in the pool: how many are free with that."""
        key = self.tiers.copy_of(run.block_ids[-1])
        if key is not None:
            self.tiers.hold(key, seq)
            return len(self._pool.forget([run.sink(self._block_size, key)]))
        far = run.split(self._block_size, None)
        if far is not None:
            self._shards[seq].append(far)
        return len(self._pool.forget([run.pop(self._block_size)]))

    # --- below --------------------------------------------------------------------------------------------------------

    @property
    def has_uncopied(self) -> bool:
        """Whether some block in the pool may have no copy."""
        return bool(self._uncopied)

    def next_uncopied(self) -> int | None:
        """Of the blocks that have no copy, and of which none is being made, the first to be evicted."""
        while self._uncopied:
            seq = next(iter(self._uncopied))
            runs = [run for run in self._shards[seq] if run.block_ids]
            for run in sorted(runs, key=lambda run: run.ranges[-1], reverse=True):
                while run.num_copied < len(run.block_ids):
                    block = run.block_ids[-1 - run.num_copied]
                    if not self.tiers.has_copy(block):
                        return block
                    run.num_copied += 1
            del self._uncopied[seq]
        return None

    def look_again(self) -> None:
        """Copies of blocks in the pool were lost: look for those that have none."""
        self._uncopied = dict(self._in_pool)
        for seq in self._uncopied:
            for run in self._shards[seq]:
                run.num_copied = 0

    def count_uncopied(self, ahead: int, most: int) -> int:
        """How many blocks of the sequences of which some are among the next `ahead` of the pool to be evicted have no copy:
        `most` if there are more."""
        count = 0
        for seq in self._in_pool:
            if ahead <= 0 or count >= most:
                break
            runs = self._shards[seq]
            ahead -= sum(len(run.block_ids) for run in runs)
            if seq in self._uncopied:
                left = (block for run in runs for block in run.block_ids[: len(run.block_ids) - run.num_copied])
                count += sum(1 for _ in islice((block for block in left if not self.tiers.has_copy(block)), most - count))
        return count

    def num_evictable(self, seq: int) -> int:
        """Blocks of one cached sequence that nobody uses."""
        return sum(self._pool.is_evictable(block) for run in self._shards[seq] for block in run.block_ids)

    def next_sunk(self, seq: int, end: int) -> CachedRun | None:
        """A run whose first block below has only positions before `end`; None: there is none, or nothing of it is here."""
        for run in self._shards.get(seq, ()):
            if run.sunk and first_tokens(run.sunk_ranges, self._block_size)[-1][1] <= end:
                return run
        return None

    def rise(self, seq: int, key: int, block: int) -> bool:
        """A block of the pool, cached from now on, holds what the sequence had below as this copy, next to what it has in the
        pool. False: it has not."""
        run = next((run for run in self._shards.get(seq, ()) if run.sunk and run.sunk[-1] == key), None)
        if run is None:
            return False
        self._pool.cache([block])
        self.tiers.attach(key, block)
        run.rise(self._block_size, block)
        self.tiers.release(key, seq)
        self._changed[seq] = None
        if seq not in self._in_pool:
            self._in_pool[seq] = None
        return True

    def lose(self, key: int) -> None:
        """A copy is no more: whatever was there alone is lost."""
        if self.tiers.block_of(key) is not None:
            self.look_again()
        for seq in self.tiers.drop(key):
            run = next((run for run in self.runs_of(seq) if key in run.sunk), None)
            if run is None:  # as others lost it, too, this one was spare
                continue
            self._changed[seq] = None
            far = run.split(self._block_size, key)
            if far is not None:
                self._shards[seq].append(far)
            self._tidy(seq)

    def lose_tiers(self) -> None:
        """All that lies below is no more, and nothing will."""
        for seq in list(self._shards):
            for run in self.runs_of(seq):  # of those before it one more may have been spare, and this the one too many
                lost = run.forget_copies()
                if lost:
                    self._changed[seq] = None
                for key in lost:
                    self.tiers.release(key, seq)
            if seq in self._shards:
                self._tidy(seq)
        self._uncopied.clear()
        self.tiers.shut()

    def lose_block(self, block: int) -> None:
        """A block of the pool is not what was written: no cached sequence has it any more."""
        for seq in [seq for seq, runs in self._shards.items() if any(block in run.block_ids for run in runs)]:
            run = next((run for run in self.runs_of(seq) if block in run.block_ids), None)
            if run is None:  # likewise
                continue
            self._changed[seq] = None
            far = run.split_in_pool(self._block_size, block)
            if far is not None:
                self._shards[seq].append(far)
            self._pool.forget([block])
            self._tidy(seq)

    def _tidy(self, seq: int) -> None:
        """Of runs that lie below altogether keep the longest; forget runs, and a sequence, of which nothing is left."""
        runs = self._shards[seq]
        sunk = sorted((run for run in runs if not run.block_ids and run.sunk), key=lambda run: -len(run.sunk))
        for run in sunk[MOST_SUNK_RUNS:]:
            self._release(seq, run)
        runs[:] = [run for run in runs if run.block_ids or run.sunk]
        if not any(run.block_ids for run in runs):
            self._in_pool.pop(seq, None)
            self._uncopied.pop(seq, None)
        if runs:
            self._weigh(seq)
        else:
            del self._shards[seq]
            self._spare.pop(seq, None)

    def _weigh(self, seq: int) -> None:
        """If a sequence is spare, note it, and forget the one for which that are too many."""
        self._spare.pop(seq, None)
        if seq in self._anchors or not self._is_spare(seq):
            return
        self._spare[seq] = None
        if len(self._spare) > MOST_SPARE:
            oldest = next(iter(self._spare))
            if self._is_spare(oldest):
                self._changed[oldest] = None
                self.remove(oldest)
            else:
                del self._spare[oldest]

    def _is_spare(self, seq: int) -> bool:
        """Whether other cached sequences have all that it has. What it alone has are its last blocks: these come first."""
        refs = self._pool.cached_refs
        for run in self._shards[seq]:
            for key in run.sunk:
                num_seqs, blocks = self.tiers.holders(key)
                if num_seqs < 2 and not any(map(refs, blocks)):
                    return False
            if any(refs(block) < 2 for block in reversed(run.block_ids)):
                return False
        return True

    def _release(self, seq: int, run: CachedRun) -> None:
        for key in run.sunk:
            self.tiers.release(key, seq)
        run.sunk.clear()

    def take_changed(self) -> list[int]:
        """Sequences of which something was evicted, lost below or read up since the last call."""
        changed, self._changed = self._changed, {}
        return list(changed)

    def refs(self) -> Counter[int]:
        """How many cached shards and anchors have each block."""
        refs = Counter(block for runs in self._shards.values() for run in runs for block in run.block_ids)
        refs.update(block for anchors in self._anchors.values() for anchor in anchors for block in anchor.block_ids())
        return refs

    def validate(self) -> None:
        """Every cached run has the blocks that its tokens fill, in the pool or below. Raises RuntimeError otherwise."""
        for seq, runs in self._shards.items():
            for run in runs:
                tokens = [sum(end - start for start, end in ranges) for ranges in (run.ranges, run.sunk_ranges)]
                if tokens != [len(run.block_ids) * self._block_size, len(run.sunk) * self._block_size] or not sum(tokens):
                    there = f"{run.ranges} and {run.sunk_ranges} below"
                    raise RuntimeError(f"cached sequence {seq}: {len(run.block_ids)} + {len(run.sunk)} blocks for {there}")
                if not all(self.tiers.has_copy(block) for block in run.block_ids[len(run.block_ids) - run.num_copied :]):
                    raise RuntimeError(f"cached sequence {seq}: {run.num_copied} of its last blocks have no copy")
            if not runs:
                raise RuntimeError(f"sequence {seq} is cached and has nothing")
        if len(self._spare) > MOST_SPARE or not self._spare.keys() <= self._shards.keys():
            raise RuntimeError(f"spare are {list(self._spare)}, cached {list(self._shards)}")
        in_pool = [seq for seq, runs in self._shards.items() if any(run.block_ids for run in runs)]
        if self._in_pool.keys() != set(in_pool) or not self._uncopied.keys() <= self._in_pool.keys():
            raise RuntimeError(f"in the pool are {in_pool}, known {list(self._in_pool)}, uncopied {list(self._uncopied)}")
        self.tiers.validate({seq: {key for run in runs for key in run.sunk} for seq, runs in self._shards.items()})
