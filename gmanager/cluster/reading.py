"""Requests that wait for KV which lies below the pools of instances, in host memory or on disk, to be read into them.

    queued ──begin: Fetch──> is read; others go before it ──Fetched of all, or too late──> queued, and sees what is there
      └──── MOST_READING are read: waits for its turn; others go before it ────────────────────┘

Who needs what is read just now waits for the same reading, and takes no turn of its own.

It takes no blocks that anybody reserves: what was read is cached like what requests leave, so it makes room for those that run
if they need it. Then the request finds less, and reads once more or computes it.

How long reading takes is guessed until an instance has said it, and again some time after: one that was slow once may not be so
for ever. One that took too long takes at least as long as was waited, whatever was known before. One that nobody waits for any
more is stopped (StopFetch), and its answer counts when it comes.
"""

from bisect import insort
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from gmanager.cluster.cell import Cell
from gmanager.cluster.events import Emit, Send
from gmanager.cluster.member import Member
from gmanager.cluster.request import Request
from gmanager.wire.messages import Fetch, Fetched, StopFetch

READ_S = 10e-6
"""Of a token, until it is known: 128 KiB at 13 GB/s."""
NUM_READS = 8
"""Newest ones of an instance whose median counts."""
FORGOTTEN_S = 60.0
"""After which one counts no more."""
MOST_READING = 4
"""Beginnings that are read at once in a cell; who needs another one waits for its turn."""
MOST_READS = 2
"""Times that one request is read for until it computes what lacks."""
PATIENCE_S, PATIENCE = 5.0, 4.0
"""A request waits for nothing longer than so many seconds and so many times what it should take."""
MOST_LATE = 64
"""Fetches that nobody waits for any more, and whose answer still counts."""
MAX_READ_US = 3600 * 10**6


def deadline(now: float, takes_s: float) -> float:
    """Until when a request waits for what should take so long."""
    return now + PATIENCE_S + PATIENCE * takes_s


Key = tuple[int, int]
"""(id of a member, number of the fetch)."""


@dataclass(slots=True)
class _Fetch:
    """One that isn't answered."""

    source: int
    end: int
    tokens: int
    """Most that it can bring."""
    begun: float
    requests: dict[int, None] = field(default_factory=dict)
    """Numbers of those that wait for it."""


@dataclass(slots=True)
class _Wait:
    until: float
    fetches: dict[Key, None] = field(default_factory=dict)
    """That aren't answered."""


class Reading:
    """Of one cell, through all its epochs. Pure: what is to be done is emitted."""

    def __init__(self, cell: Cell, emit: Emit) -> None:
        self._cell = cell
        self._emit = emit
        self._waits: dict[int, _Wait] = {}
        """By number of the request."""
        self._turns: list[tuple[tuple[float, int], int]] = []
        """(precedence, number) of those that wait for their turn, in that order."""
        self._fetches: dict[Key, _Fetch] = {}
        """That somebody waits for."""
        self._late: dict[Key, _Fetch] = {}
        """That nobody waits for any more."""
        self._rates: dict[int, deque[tuple[float, float]]] = {}
        """id of a member -> (when it was heard, seconds of a token) of its newest reads."""
        self._num_fetches = 0

    @property
    def numbers(self) -> Collection[int]:
        """Of the requests that wait, for what is read or for their turn. As many have their turn as may begin."""
        return {*self._waits, *(number for _, number in self._turns[self._num_free :])}

    def is_read_for(self, request: Request) -> bool:
        """Whether what it needs is read now."""
        return request.number in self._waits

    @property
    def _num_free(self) -> int:
        return max(0, MOST_READING - len({(fetch.source, fetch.end) for fetch in self._fetches.values()}))

    def begin(self, request: Request, source: int, end: int, below: Mapping[int, int], now: float) -> None:
        """Have so many tokens of another sequence before a position read for it, or let it wait for its turn. `below`: by id
        of a member."""
        under_way = {key[0]: key for key, fetch in self._fetches.items() if fetch.source == source and fetch.end >= end}
        if not self._num_free and not below.keys() <= under_way.keys():
            insort(self._turns, (request.precedence, request.number))
            return
        seconds = max(self.token_s(number, now) * tokens for number, tokens in below.items())
        wait = self._waits[request.number] = _Wait(deadline(now, seconds))
        request.num_reads += 1
        for member in self._cell.members:
            if member.id in below:
                key = under_way.get(member.id)
                if key is None:
                    key = member.id, self._send(member, source, end, into_pool=True)
                    self._fetches[key] = _Fetch(source, end, below[member.id], now)
                self._fetches[key].requests[request.number] = None
                wait.fetches[key] = None

    def take_turn(self, request: Request) -> None:
        """It is looked at anew: if it still needs a turn it will say so."""
        self._turns = [turn for turn in self._turns if turn[1] != request.number]

    def lift(self, source: int, end: int, below: Iterable[int]) -> None:
        """Have it brought from disk to host memory, for one that has to wait for room. `below`: ids of members."""
        wanted = set(below)
        for member in self._cell.members:
            if member.id in wanted:
                self._send(member, source, end, into_pool=False)

    def _send(self, member: Member, source: int, end: int, *, into_pool: bool) -> int:
        self._num_fetches += 1
        fetch = Fetch(epoch=self._cell.epoch, fetch=self._num_fetches, source=source, end=end, into_pool=into_pool)
        self._emit(Send(member.peer, fetch))
        return self._num_fetches

    def _stop(self, member_id: int, number: int) -> None:
        """Nobody waits for a fetch any more."""
        for member in self._cell.members:
            if member.id == member_id:
                self._emit(Send(member.peer, StopFetch(epoch=self._cell.epoch, fetch=number)))

    def on_fetched(self, member: Member, fetched: Fetched, now: float) -> bool:
        """An instance has read. False: nobody has ever waited for that."""
        key = member.id, fetched.fetch
        fetch = self._fetches.pop(key, None) or self._late.pop(key, None)
        if fetch is None:
            return False
        tokens = min(fetched.blocks * self._cell.spec.block_size, fetch.tokens)
        if tokens > 0 and 0 < fetched.us <= MAX_READ_US:
            self._note(member.id, now, fetched.us / 1e6 / tokens)
        for number in fetch.requests:
            wait = self._waits[number]
            del wait.fetches[key]
            if not wait.fetches:
                del self._waits[number]
        return True

    def _note(self, number: int, now: float, token_s: float) -> None:
        self._rates.setdefault(number, deque(maxlen=NUM_READS)).append((now, token_s))

    def token_s(self, number: int, now: float) -> float:
        """Seconds in which an instance reads a token."""
        recent = [seconds for heard, seconds in self._rates.get(number, ()) if now - heard <= FORGOTTEN_S]
        return median(recent) if recent else READ_S

    def end_overdue(self, now: float) -> bool:
        """Whether some wait no longer."""
        overdue = [number for number, wait in self._waits.items() if now > wait.until]
        for number in overdue:
            for key in self._waits[number].fetches:
                fetch = self._fetches[key]
                self._rates.pop(key[0], None)
                self._note(key[0], now, (now - fetch.begun) / fetch.tokens)
            self.forget(number)
        return bool(overdue)

    def forget(self, number: int) -> None:
        """A request waits no longer."""
        self._turns = [turn for turn in self._turns if turn[1] != number]
        wait = self._waits.pop(number, None)
        for key in wait.fetches if wait is not None else ():
            fetch = self._fetches[key]
            del fetch.requests[number]
            if not fetch.requests:
                self._late[key] = self._fetches.pop(key)
                self._stop(*key)
                if len(self._late) > MOST_LATE:
                    del self._late[next(iter(self._late))]

    def suspend(self) -> None:
        """The epoch is over, and nothing is answered any more."""
        self._waits.clear()
        self._turns.clear()
        self._fetches.clear()
        self._late.clear()

    def validate(self, queued: Iterable[int]) -> None:
        """Raises RuntimeError if one waits that isn't queued, or for nothing."""
        waiting = set(queued)
        turns = [number for _, number in self._turns]
        if not waiting >= {*self._waits, *turns} or len(set(turns)) < len(turns) or self._turns != sorted(self._turns):
            raise RuntimeError(f"requests {list(self._waits)} and {turns} wait for reading, of {sorted(waiting)} in the queue")
        waits = {(number, key) for number, wait in self._waits.items() for key in wait.fetches}
        if waits != {(number, key) for key, fetch in self._fetches.items() for number in fetch.requests}:
            raise RuntimeError(f"requests {list(self._waits)} wait for others than {self._fetches}")
        if not all(wait.fetches for wait in self._waits.values()) or not all(f.requests for f in self._fetches.values()):
            raise RuntimeError(f"requests {list(self._waits)} wait for nothing, or {self._fetches} are nobody's")
