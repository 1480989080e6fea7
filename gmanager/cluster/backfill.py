"""Who may go before the next in the queue while that one waits for room: pure.

    the next  ├──────── waits until these have ended ────────┤ runs
    another         ├─ prompt ─┤── its tokens ──┤              before that: it takes nothing from the next

That is EASY backfilling, as schedulers of parallel machines do it (Lifka, JSSPP 1995). When the next would find room is known
from when those that run are expected to end; how long another takes likewise. Expectations may be wrong, so nobody waits at
the head of the queue for more than `PATIENCE_S` while others go before it.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gmanager.cluster.cell import Cell
from gmanager.cluster.placement import InstanceView
from gmanager.cluster.policies.gain import step_s
from gmanager.cluster.request import Request
from gmanager.cluster.requests import Requests
from gmanager.cluster.running import Running
from gmanager.cluster.waiting import Waiting

PATIENCE_S = 60.0
"""Longest that others go before the next in the queue."""
MAX_ENDINGS = 256
"""Sequences that end soonest, which are looked at."""
MAX_TRIED = 16
"""Of those that wait behind the next, how many are looked at."""
REFRESH_S = 1.0
"""After which it is looked anew when the next may find room: with 10,000 that run that takes tens of milliseconds."""


@dataclass(frozen=True, slots=True)
class Ending:
    """A sequence that is expected to end."""

    in_s: float
    seq: int
    home: int
    blocks: Mapping[int, int]
    """rank -> what is free then."""


def room_in(fits: Callable[[Sequence[InstanceView]], bool], views: Sequence[InstanceView], endings: Sequence[Ending]) -> float:
    """Seconds until there is room for what has none now, at the earliest: until the first number of endings, soonest first,
    after which it fits; if it doesn't even after the last, until that one."""
    few, enough = 0, len(endings)
    while enough - few > 1:
        middle = (few + enough) // 2
        if fits(_after(views, endings[:middle])):
            enough = middle
        else:
            few = middle
    return endings[enough - 1].in_s if endings else 0.0


def _after(views: Sequence[InstanceView], endings: Sequence[Ending]) -> list[InstanceView]:
    free: Counter[int] = Counter()
    homes: Counter[int] = Counter(ending.home for ending in endings)
    for ending in endings:
        free.update(ending.blocks)
    seen = list(views)
    for rank in sorted(free.keys() | homes.keys()):  # others are as they are
        view = views[rank]
        seen[rank] = replace(
            view,
            free_blocks=min(view.total_blocks, view.free_blocks + free[rank]),
            homes=max(0, view.homes - homes[rank]),
            rows=max(0, view.rows - homes[rank]),
            coming=view.coming * max(0, view.homes - homes[rank]) // max(1, view.homes),
        )
    return seen


class Backfill:
    """Of one cell, through all its epochs."""

    def __init__(self, cell: Cell, running: Running, waiting: Waiting, requests: Requests) -> None:
        self._cell = cell
        self._running = running
        self._waiting = waiting
        self._requests = requests
        self._next: Request | None = None
        """Of whom this is known:"""
        self._looked_at = 0.0
        self._room_at = 0.0
        """When it may find room."""

    def before(self, first: Request, but: Collection[int] = ()) -> Iterator[Request]:
        """Those that may be admitted before the next in the queue, for which there is no room now, in order of precedence.
        `but`: as `Waiting.next`."""
        now = self._requests.now
        if self._waiting.waited_s(first) >= PATIENCE_S:
            return
        others = self._waiting.behind(first, MAX_TRIED, but)
        if not others:
            return
        views = self._running.views()
        costs, chunk = self._cell.performance.costs, self._cell.spec.chunk_tokens
        steps_s = [step_s(view if view.rows else replace(view, rows=1), costs) for view in views]
        if first is not self._next or now - self._looked_at >= REFRESH_S:
            self._next, self._looked_at, self._room_at = first, now, now + self._room_in(first, views, steps_s)
        slowest = max(steps_s)
        for other in others:
            prompt_s = costs.prefill_s(other.missing_tokens, chunk=chunk, beside=True)
            if now + prompt_s + other.left * slowest <= self._room_at:
                yield other

    def _room_in(self, first: Request, views: Sequence[InstanceView], steps_s: Sequence[float]) -> float:
        place, size = self._waiting.placer(first), self._cell.spec.block_size
        running = (
            (0.0 if sequence.ending else sequence.left * steps_s[sequence.home], sequence.number)
            for sequence in self._running.all()
        )
        soonest = [
            Ending(in_s, number, sequence.home, {rank: -(-tokens // size) for rank, tokens in sequence.held.items()})
            for in_s, number in sorted(running)[:MAX_ENDINGS]
            for sequence in (self._running[number],)
        ]
        return room_in(lambda then: place(then, None) is not None, views, soonest)
