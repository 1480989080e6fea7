"""Devices: steps that run beside each other and slow each other down, and steps that wait for each other's rows."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from instance.step import Lane
from simulation.clock import Clock
from simulation.times import Profile


@dataclass(eq=False, slots=True)
class Part:
    """What one instance does in a step of a lane."""

    device: "Device"
    lane: Lane
    work_s: float
    """How long it takes alone."""
    group: "Group"
    is_over: bool = False
    """Its result is known: the whole group has run."""
    on_over: Callable[[], None] | None = None
    """Who waits for the result."""
    left_s: float = 0.0
    """Of `work_s`, when its rate changed last."""
    since: float = 0.0
    rate: float = 0.0
    """0: it doesn't run (any more)."""
    first_s: float = 0.0
    """Since when it is the first of its lane's queue."""
    took_s: float = 0.0
    """From then until it was over."""
    changes: int = 0
    """Of the rate: what was said about its end before the last one is not true any more."""


@dataclass(eq=False, slots=True)
class Group:
    """Parts of one step that exchange rows in each layer, and so run together: from when the last can begin until the last has
    done its work."""

    parts: list[Part] = field(default_factory=list)
    absent: int = 0
    """Whose device has earlier steps to run."""
    running: int = 0


class Device:
    """Of one instance: a queue of steps for each lane."""

    def __init__(self, processor: "Processor") -> None:
        self._processor = processor
        self._queues: dict[Lane, deque[Part]] = {"prefill": deque(), "decode": deque()}
        self.working: dict[Lane, Part | None] = {"prefill": None, "decode": None}
        """What each lane has the processor for."""
        self.busy_s = 0.0
        """What steps took that were done, each as if alone and without waits, both lanes' summed."""
        self.occupied_s: dict[Lane, float] = {"prefill": 0.0, "decode": 0.0}
        """What they took: as instances count `step_us` and `decode_us`."""

    def launch(self, part: Part) -> None:
        """Queue a part; `run_together` begins it once it is its turn everywhere."""
        self._queues[part.lane].append(part)
        part.first_s = self._processor.now
        part.group.absent += len(self._queues[part.lane]) > 1

    def end(self, part: Part) -> None:
        """It is over: the next of its lane is there."""
        queue = self._queues[part.lane]
        queue.popleft()
        if queue:
            queue[0].first_s = self._processor.now
            following = queue[0].group
            following.absent -= 1
            self._processor.begin(following)


class Processor:
    """What the lanes of one device share, or all devices of one machine."""

    def __init__(self, clock: Clock, profile: Profile) -> None:
        self._clock = clock
        self._profile = profile
        self._is_shared = profile.cores is not None
        self._active: list[Part] = []

    @property
    def now(self) -> float:
        return self._clock.now

    def begin(self, group: Group) -> None:
        """Run it, if all of it is there. All its parts are launched."""
        if group.absent:
            return
        group.running = len(group.parts)
        for part in group.parts:
            part.device._processor._add(part)

    def _add(self, part: Part) -> None:
        part.left_s, part.since = part.work_s, self._clock.now
        part.device.working[part.lane] = part
        self._active.append(part)
        self._set_rates()

    def _work_is_done(self, part: Part, change: int) -> None:
        if part.changes != change:
            return
        part.device.busy_s += part.work_s
        part.rate = 0.0
        if self._is_shared:  # who waits for rows leaves the cores to others; on a GPU kernels wait
            self._drop(part)
        group = part.group
        group.running -= 1
        if group.running:
            return
        for each in group.parts:
            each.is_over = True
            each.took_s = self._clock.now - each.first_s
            each.device.occupied_s[each.lane] += each.took_s if each.work_s else 0.0
            if not self._is_shared:
                each.device._processor._drop(each)
        for each in group.parts:
            each.device.end(each)
        for each in group.parts:
            if each.on_over is not None:
                each.on_over()

    def _drop(self, part: Part) -> None:
        part.device.working[part.lane] = None
        self._active.remove(part)
        self._set_rates()

    def _set_rates(self) -> None:
        """Of all that runs, after one more or one less does."""
        now, profile = self._clock.now, self._profile
        cores = profile.cores
        share = 1.0 if cores is None else min(1.0, cores / max(1.0, len(self._active) + profile.others))
        for part in self._active:
            if part.changes and not part.rate:
                continue  # it has done its work, and waits
            other: Lane = "decode" if part.lane == "prefill" else "prefill"
            rate = share if part.device.working[other] is None else share / profile.beside(part.lane)
            if rate == part.rate:
                continue
            part.left_s = max(0.0, part.left_s - part.rate * (now - part.since))
            part.since, part.rate = now, rate
            part.changes += 1
            self._clock.after(part.left_s / rate, _Ending(self, part, part.changes))


@dataclass(frozen=True, slots=True)
class _Ending:
    """When a part's work is done, if nothing changes."""

    processor: Processor
    part: Part
    change: int

    def __call__(self) -> None:
        self.processor._work_is_done(self.part, self.change)


def run_together(parts: Sequence[Part]) -> None:
    """Launch parts that exchange rows; they begin when it is their turn on all their devices."""
    group = parts[0].group
    group.parts = list(parts)
    for part in parts:
        part.device.launch(part)
    parts[0].device._processor.begin(group)
