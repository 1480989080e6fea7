"""What is copied next between the pool and the tiers below it: pure integers; `kvstore.tier_storage` moves the bytes.

    fetch   copies of a sequence that somebody asks about, into the pool: before all else
    lift    the same from disk to host memory, for somebody who waits: the pool has no room yet
    sum     checksums of cached blocks, if they are to be compared when they are shared (`kvstore.checks`)
    down    cached blocks that have no copy, those first that are evicted first; as long as a tier has free slots all of them
    move    the least recently used of host memory to the disk, to make room there

When all slots are taken the least recently used copies make way, but only for blocks that are soon to be evicted: else blocks
that stay in the pool would drive out what is below and nowhere else. A copy of what is in the pool stays.

One job at a time. Whatever becomes of blocks and sequences while it runs, what it brings counts only if it still fits.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvstore.checks import Checks
from kvstore.ranges import whole_blocks
from kvstore.shard import ShardTable
from kvstore.tiers import Copying, Fault, Place, Tier

MARGIN_BLOCKS = 2
"""Of the pool, that reading leaves to sequences that run: what is being read into can't make room for them."""
AHEAD_PART = 8
"""One of so many blocks of the pool counts as soon to be evicted, less those that are free."""

Kind = Literal["up", "move", "sum", "down"]


@dataclass(frozen=True, slots=True)
class Job:
    """Blocks that are copied one after the other."""

    kind: Kind
    items: tuple[Copying, ...]


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of a fetch."""

    number: int
    blocks: int
    """That were read: others may have been in the pool for another sequence."""


@dataclass(slots=True)
class TierCounts:
    """Blocks, since the beginning."""

    down: int = 0
    """Copied from the pool."""
    up: int = 0
    """Read into the pool, and right."""
    corrupt: int = 0
    """Read and not what was written, or not readable at all."""
    unwritable: int = 0
    """Slots that could not be written."""
    no_memory: int = 0
    """Not copied, as the device had no memory for that."""


@dataclass(slots=True)
class _Fetch:
    number: int
    seq: int
    end: int
    left: int
    """Blocks that it may still read: no more than there were when it began."""
    own: int
    """Evictable blocks of the sequence itself: they don't make room for it."""
    num_read: int = 0


@dataclass(slots=True)
class _Lift:
    seq: int
    keys: list[int] = field(default_factory=list)
    """On disk, those of the last positions first."""


class TierJobs:
    """Of one instance's blocks."""

    def __init__(self, shards: ShardTable, batch: int, checks: Checks | None = None) -> None:
        """`batch`: blocks of a job. `checks`: None: what is in the pool isn't checked. Raises ValueError unless the batch is
        positive."""
        if batch < 1:
            raise ValueError(f"a job must be at least 1 block, got {batch}")
        self.counts = TierCounts()
        self.checks = checks
        if checks is not None:
            shards.cache.on_cached = checks.put
        self._shards = shards
        self._cache = shards.cache
        self._tiers = shards.cache.tiers
        self.batch = batch
        self._asked: deque[tuple[int, int, int]] = deque()
        self._fetch: _Fetch | None = None
        self._lifts: deque[_Lift] = deque()
        self._fetched: list[Fetched] = []
        self._job: Job | None = None

    # --- what is asked for --------------------------------------------------------------------------------------------

    def fetch(self, number: int, seq: int, end: int) -> None:
        """Read into the pool what is below of a cached sequence before a position. `take_fetched` says when that is over."""
        self._asked.append((number, seq, end))

    def stop_fetch(self, number: int) -> None:
        """Nobody waits for that any more: what is being read is the last of it."""
        if self._fetch is not None and self._fetch.number == number:
            self._fetch.left = 0
        self._fetched += [Fetched(number, 0) for asked, _, _ in self._asked if asked == number]
        self._asked = deque(asked for asked in self._asked if asked[0] != number)

    def lift(self, seq: int, end: int) -> None:
        """Bring what of it is on disk to host memory."""
        if seq not in self._cache or not self._tiers.num_slots["host"] or self._tiers.is_off:
            return
        self._cache.touch(seq)
        keys: list[int] = []
        for run in self._cache.runs(seq):
            count = _blocks_before(run.sunk_ranges, end, self._shards.block_size)
            keys += (key for key in run.sunk[len(run.sunk) - count :] if self._tiers.tier_of(key) == "disk")
        self._lifts.append(_Lift(seq, keys))

    def forget_asked(self) -> None:
        """Nobody waits any more for what was asked for."""
        self._asked.clear()
        self._lifts.clear()
        self._fetched.clear()
        self._fetch = None

    def turn_off(self) -> None:
        """Use the tiers no more: what lies there is lost, and who asks for it is told at once. A job that is under way may
        still end; nothing comes of it."""
        self._lifts.clear()
        self._cache.lose_tiers()
        if self._fetch is not None:
            self._fetched.append(Fetched(self._fetch.number, self._fetch.num_read))
            self._fetch = None
        self.refuse_asked()

    def refuse_asked(self) -> None:
        """Nothing is read for those that have asked."""
        self._fetched += [Fetched(number, 0) for number, _, _ in self._asked]
        self._asked.clear()

    def forget_counts(self) -> None:
        """Begin to count anew."""
        self.counts = TierCounts()

    def take_fetched(self) -> list[Fetched]:
        """Of those that are over since the last call."""
        fetched, self._fetched = self._fetched, []
        return fetched

    @property
    def has_more(self) -> bool:
        """Whether there may be something to do that nobody waits for."""
        is_wanted = self.checks is not None and self.checks.is_wanted
        return is_wanted or (not self._tiers.is_off and self._cache.has_uncopied)

    @property
    def is_busy(self) -> bool:
        """Whether a job is under way."""
        return self._job is not None

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def next(self) -> Job | None:
        """What is to be done now; None: nothing. Raises RuntimeError before the end of the last one."""
        return self.next_asked() or self._begin_job(self._next_sum() or self._next_down())

    def next_asked(self) -> Job | None:
        """The same of what somebody waits for."""
        if self._job is not None:
            raise RuntimeError(f"a job is under way: {self._job}")
        return self._begin_job(self._next_up() or self._next_lift())

    def _begin_job(self, job: Job | None) -> Job | None:
        self._job = job
        return job

    def end(self, results: Sequence[int | Fault]) -> None:
        """The job is done. `results`: for each block the checksum of what came, or why nothing did."""
        job, self._job = self._job, None
        if job is None:
            raise RuntimeError("no job is under way")
        self.counts.no_memory += sum(result == "no_memory" for result in results)
        for item, result in zip(job.items, results, strict=True):
            if job.kind == "up":
                self._end_up(item, result)
            elif job.kind == "move":
                self._end_move(item, result)
            elif job.kind == "sum":
                self._end_sum(item, result)
            else:
                self._end_down(item, result)

    def _next_up(self) -> Job | None:
        while self._fetch is not None or self._asked:
            if self._fetch is None:
                self._fetch = self._begin_fetch(*self._asked.popleft())
            if items := self._read_next(self._fetch):
                return Job("up", tuple(items))
            self._fetched.append(Fetched(self._fetch.number, self._fetch.num_read))
            self._fetch = None
        return None

    def _begin_fetch(self, number: int, seq: int, end: int) -> _Fetch:
        left = own = 0
        if seq in self._cache:
            self._cache.touch(seq)
            ranges = [run.sunk_ranges for run in self._cache.runs(seq)]
            left = sum(_blocks_before(run, end, self._shards.block_size) for run in ranges)
            own = self._cache.num_evictable(seq)
        return _Fetch(number, seq, end, left, own)

    def _read_next(self, fetch: _Fetch) -> list[Copying]:
        """The next blocks that can be read into the pool. What is there for another sequence need not be."""
        while fetch.left > 0 and (run := self._cache.next_sunk(fetch.seq, fetch.end)) is not None:
            there = self._tiers.block_of(run.sunk[-1])
            if there is None:
                break
            self._shards.pool.share([there])
            self._rise(fetch, run.sunk[-1], there)
            fetch.left -= 1
        else:
            return []
        count = _blocks_before(run.sunk_ranges, fetch.end, self._shards.block_size)
        count = min(count, self.batch, fetch.left, self._shards.num_free - fetch.own - MARGIN_BLOCKS)
        if count <= 0:
            return []
        blocks = self._shards.take_for_reading(count, run.block_ids[-1] if run.block_ids else None)
        items: list[Copying] = []
        again = self._cache.next_sunk(fetch.seq, fetch.end)  # it may have had to make room itself
        if again is run:
            for key, block in zip(reversed(run.sunk), blocks, strict=False):
                if self._tiers.block_of(key) is not None:
                    break
                items.append(self._tiers.begin_up(key, block))
        self._shards.end_reading(blocks[len(items) :])
        fetch.left -= len(items)
        return items

    def _rise(self, fetch: _Fetch | None, key: int, block: int) -> bool:
        """A block that this has a reference to is the sequence's, if that still has a place for it."""
        if fetch is None or not self._cache.rise(fetch.seq, key, block):
            self._shards.pool.free([block])
            return False
        fetch.own += self._shards.pool.is_evictable(block)
        return True

    def _end_up(self, item: Copying, result: int | Fault) -> None:
        self._shards.reading.discard(item.target.slot)
        is_there = self._tiers.end_up(item)
        if self._fetch is not None and isinstance(result, int):
            self._fetch.num_read += 1
        if result == item.checksum:
            if self._rise(self._fetch, item.key, item.target.slot):
                self.counts.up += 1
                if self.checks is not None and item.checksum is not None:
                    self.checks.set(item.target.slot, item.checksum)
            return
        self._shards.pool.free([item.target.slot])
        if result == "no_memory":
            return
        self.counts.corrupt += 1
        if is_there:
            self._cache.lose(item.key)

    def _next_lift(self) -> Job | None:
        while self._lifts:
            keys = self._lifts[0].keys
            room = self._tiers.num_free("host")
            if not room and keys and (move := self._move_to_disk(without=self._lifts[0].seq)) is not None:
                return move
            items: list[Copying] = []
            while keys and len(items) < min(self.batch, room):
                key = keys.pop()  # the first positions first
                if self._tiers.is_on(key, "disk") and self._tiers.block_of(key) is None:
                    items.append(self._tiers.begin_move(key, "host"))
            if items:
                return Job("move", tuple(items))
            self._lifts.popleft()
        return None

    def _next_sum(self) -> Job | None:
        blocks = [] if self.checks is None else self.checks.begin(self.batch)
        return Job("sum", tuple(as_it_is(block) for block in blocks)) if blocks else None

    def _end_sum(self, item: Copying, result: int | Fault) -> None:
        if self.checks is not None and isinstance(result, int):
            self.checks.end(item.source.slot, result)

    def lose_block(self, block: int) -> None:
        """A cached block of the pool is not what was written."""
        self.counts.corrupt += 1
        self._cache.lose_block(block)

    def _next_down(self) -> Job | None:
        if self._tiers.is_off:
            return None
        self._make_way()
        items: list[Copying] = []
        while (found := self._cache.next_uncopied()) is not None:
            if len(items) == self.batch or not self._tiers.num_free(self._tiers.first):
                break
            items.append(self._tiers.begin_down(found))
        if items:
            return Job("down", tuple(items))
        return self._move_to_disk() if found is not None and self._has_second else None

    @property
    def _has_second(self) -> bool:
        """Whether what is in the first tier can go to another."""
        return self._tiers.first == "host" and self._tiers.num_slots["disk"] > 0

    def _move_to_disk(self, without: int | None = None) -> Job | None:
        """The least recently used of host memory, into free slots. `without`: a sequence whose copies are wanted there."""
        wanted = set() if without is None else {key for run in self._cache.runs_of(without) for key in run.sunk}
        count = min(self.batch, self._tiers.num_free("disk"))
        keys = [key for key in self._tiers.oldest("host", count) if key not in wanted]
        items = tuple(self._tiers.begin_move(key, "disk") for key in keys)
        return Job("move", items) if items else None

    def _make_way(self) -> None:
        """Lose the least recently used copies, for blocks that are soon to be evicted and have none: for a job at once."""
        pool = self._shards.pool
        ahead = max(self.batch, pool.num_blocks // AHEAD_PART) - pool.num_free
        tiers: list[Tier] = ["host", "disk"] if self._has_second else [self._tiers.first]
        lacks = self._cache.count_uncopied(ahead, self.batch) - sum(map(self._tiers.num_free, tiers))
        for key in self._tiers.oldest_alone(tiers[-1], max(0, lacks)):
            if self._tiers.is_on(key, tiers[-1]):  # else it went with one before it
                self._cache.lose(key)

    def _end_down(self, item: Copying, result: int | Fault) -> None:
        block = item.source.slot
        if self._tiers.is_off:
            self._tiers.end_down(item, None)
            return
        if isinstance(result, int):
            sums = {} if self.checks is None else self.checks.known([block])
            if sums.get(block, result) == result:
                self.counts.down += self._tiers.end_down(item, result)
                return
            is_there = self._tiers.has_copy(block)
            self._tiers.end_down(item, None)
            if is_there:  # it was not freed and used otherwise meanwhile
                self.lose_block(block)
            return
        self._tiers.end_down(item, None, is_sound=result != "unwritable")
        self.counts.unwritable += result == "unwritable"
        self._cache.look_again()

    def _end_move(self, item: Copying, result: int | Fault) -> None:
        fault = None if isinstance(result, int) else result
        self._tiers.end_move(item, fault)
        self.counts.unwritable += fault == "unwritable"
        if fault == "unreadable":
            self.counts.corrupt += 1
            if self._tiers.is_on(item.key, "host") or self._tiers.is_on(item.key, "disk"):
                self._cache.lose(item.key)


def as_it_is(block: int) -> Copying:
    """To look what a block of the pool has."""
    return Copying(0, Place("pool", block), Place("pool", block), None)


def _blocks_before(ranges: Sequence[tuple[int, int]], end: int, block_size: int) -> int:
    """Whole blocks of a run whose positions all are before one."""
    return sum(stop - start for start, stop in whole_blocks(ranges, end, block_size)) // block_size
