"""How long steps took, for the gManager's model of that: pure. A step leaves its layout here; who takes the samples counts."""

from collections import deque
from dataclasses import dataclass, field

from distattn.layout import Layout
from gmanager.wire.messages import MAX_STEP_SAMPLES, StepSample
from instance.sharing import Load
from instance.step import LANES, Lane

_PER_LANE = MAX_STEP_SAMPLES // len(LANES)


@dataclass(slots=True)
class _Flying:
    """A step that is queued on the device, or runs there."""

    layout: Layout
    others_ended: int
    """Steps of the other lane that had ended before it began."""
    follows: bool
    """Whether it was queued behind another."""

    @property
    def is_idle(self) -> bool:
        return not (self.layout.num_rows or self.layout.num_received)


@dataclass(frozen=True, slots=True)
class _Ended:
    layout: Layout
    us: int
    beside: bool


@dataclass(slots=True)
class _Lane:
    flying: deque[_Flying] = field(default_factory=deque)
    """In the order of their launch; the first one runs."""
    num_ended: int = 0
    """Steps, idle ones left out."""
    ended_ns: int = 0
    """When the last one was known to have ended."""
    newest: deque[_Ended] = field(default_factory=lambda: deque(maxlen=_PER_LANE))
    """Not taken yet."""


class StepLog:
    """The newest steps of both lanes, within one epoch. Those in which an instance had nothing to do are left out."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, _Lane] = {lane: _Lane() for lane in LANES}

    def launched(self, lane: Lane, layout: Layout) -> None:
        """A step is queued behind those before it."""
        flying = self._lanes[lane].flying
        flying.append(_Flying(layout, self._other(lane).num_ended, bool(flying)))

    def ended(self, lane: Lane, step_ns: int, now_ns: int) -> None:
        """The lane's first step has run, on the device in so many nanoseconds.

        If it was queued behind another it took as long as from that one's end till now: what it waited for the others of its
        party is part of what it costs to step together.
        """
        its, other = self._lanes[lane], self._other(lane)
        step = its.flying.popleft()
        took_ns = max(step_ns, now_ns - its.ended_ns) if step.follows else step_ns
        its.ended_ns = now_ns
        if its.flying:
            its.flying[0].others_ended = other.num_ended  # it begins now
        if not step.is_idle:
            its.num_ended += 1
            beside = any(not flying.is_idle for flying in other.flying) or other.num_ended > step.others_ended
            self.note(lane, step.layout, took_ns, beside=beside)

    def note(self, lane: Lane, layout: Layout, step_ns: int, *, beside: bool = False) -> None:
        """A step has run. `beside`: while the other lane ran, too."""
        if step_ns >= 1000:
            self._lanes[lane].newest.append(_Ended(layout, step_ns // 1000, beside))

    def take(self) -> list[StepSample]:
        """Of the newest steps since the last call, at most as many as a Beat may have."""
        samples = [_sample(lane, ended) for lane in LANES for ended in self._lanes[lane].newest]
        for its in self._lanes.values():
            its.newest.clear()
        return samples

    def _other(self, lane: Lane) -> _Lane:
        (other,) = (its for name, its in self._lanes.items() if name != lane)
        return other


def _sample(lane: Lane, ended: _Ended) -> StepSample:
    layout = ended.layout
    return StepSample(
        lane=int(lane == "decode"),
        rows=layout.num_rows,
        attended=Load.of(layout).kv_tokens,
        sent=len(layout.dispatched_rows),
        served=layout.num_received,
        us=ended.us,
        beside=ended.beside,
    )
