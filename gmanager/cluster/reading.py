"""Requests that wait for KV which lies below the pools of instances, in host memory or on disk, to be read into them.

    queued ──begin: Fetch──> is read; others go before it ──Fetched of all, or too late──> queued, and sees what is there

It takes no blocks that anybody reserves: what was read is cached like what requests leave, so it makes room for those that run
if they need it. Then the request finds less, and reads once more or computes it.

How long reading takes is guessed until an instance has said it, and again some time after: one that was slow once may not be so
for ever.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from gmanager.cluster.cell import Cell, Member
from gmanager.cluster.events import Emit, Send
from gmanager.cluster.request import Request
from gmanager.wire.messages import Fetch, Fetched

READ_S = 10e-6
"""Of a token, until it is known: 128 KiB at 13 GB/s."""
NUM_READS = 8
"""Newest ones of an instance whose median counts."""
FORGOTTEN_S = 60.0
"""After which one counts no more."""
MOST_READING = 4
"""Requests of a cell that are read for at once; who comes next waits for one of them."""
MOST_READS = 2
"""Times that one request is read for until it computes what lacks."""
PATIENCE_S, PATIENCE = 5.0, 4.0
"""A request waits for no reading longer than so many seconds and so many times what it should take."""
MAX_READ_US = 3600 * 10**6


@dataclass(slots=True)
class _Wait:
    until: float
    fetches: set[tuple[int, int]] = field(default_factory=set)
    """(id of a member, number of the fetch) that aren't answered."""


class Reading:
    """Of one cell, through all its epochs. Pure: what is to be done is emitted."""

    def __init__(self, cell: Cell, emit: Emit) -> None:
        self._cell = cell
        self._emit = emit
        self._waits: dict[int, _Wait] = {}
        """By number of the request."""
        self._tokens: dict[tuple[int, int], int] = {}
        """Of each fetch that isn't answered: most that it can bring."""
        self._rates: dict[int, deque[tuple[float, float]]] = {}
        """id of a member -> (when it was heard, seconds of a token) of its newest reads."""
        self._num_fetches = 0

    @property
    def numbers(self) -> Collection[int]:
        """Of the requests that wait for it."""
        return self._waits.keys()

    @property
    def is_full(self) -> bool:
        """Whether the next must wait for one of those before it."""
        return len(self._waits) >= MOST_READING

    def begin(self, request: Request, source: int, end: int, below: Mapping[int, int], now: float) -> None:
        """Have so many tokens of another sequence before a position read for it. `below`: by id of a member."""
        seconds = max(self.token_s(number, now) * tokens for number, tokens in below.items())
        wait = self._waits[request.number] = _Wait(now + PATIENCE_S + PATIENCE * seconds)
        request.num_reads += 1
        for member in self._cell.members:
            if member.id in below:
                fetch = self._send(member, source, end, into_pool=True)
                wait.fetches.add((member.id, fetch))
                self._tokens[member.id, fetch] = below[member.id]

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

    def on_fetched(self, member: Member, fetched: Fetched, now: float) -> bool:
        """An instance has read. False: nobody has waited for that."""
        key = member.id, fetched.fetch
        most = self._tokens.pop(key, None)
        if most is None:
            return False
        tokens = min(fetched.blocks * self._cell.spec.block_size, most)
        if tokens > 0 and 0 < fetched.us <= MAX_READ_US:
            rates = self._rates.setdefault(member.id, deque(maxlen=NUM_READS))
            rates.append((now, fetched.us / 1e6 / tokens))
        for number, wait in list(self._waits.items()):
            wait.fetches.discard(key)
            if not wait.fetches:
                del self._waits[number]
        return True

    def token_s(self, number: int, now: float) -> float:
        """Seconds in which an instance reads a token."""
        recent = [seconds for heard, seconds in self._rates.get(number, ()) if now - heard <= FORGOTTEN_S]
        return median(recent) if recent else READ_S

    def end_overdue(self, now: float) -> bool:
        """Whether some wait no longer."""
        overdue = [number for number, wait in self._waits.items() if now > wait.until]
        for number in overdue:
            self.forget(number)
        return bool(overdue)

    def forget(self, number: int) -> None:
        """A request waits no longer."""
        wait = self._waits.pop(number, None)
        for key in sorted(wait.fetches) if wait is not None else ():
            self._tokens.pop(key, None)

    def suspend(self) -> None:
        """The epoch is over, and nothing is answered any more."""
        self._waits.clear()
        self._tokens.clear()

    def validate(self, queued: Iterable[int]) -> None:
        """Raises RuntimeError if one waits that isn't queued, or for nothing."""
        waiting = set(queued)
        wrong = [
            number for number, wait in self._waits.items() if number not in waiting or not wait.fetches <= self._tokens.keys()
        ]
        if wrong or any(not wait.fetches for wait in self._waits.values()):
            raise RuntimeError(f"requests {wrong or list(self._waits)} wait for what nobody reads for them")
