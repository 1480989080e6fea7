"""How many instances should prefill and how many decode: DistServe's placement search (Zhong et al., OSDI 2024, algorithm 2).

Each phase is simulated alone, as there: prompts whose answer is their first token, on the instances that prefill; answers whose
prompts take no time, on those that decode. The goodput of a phase is the highest rate at which the asked part of its requests
meets its objective; a request that waits for memory to decode is late for its tokens. So what travels between the two is not
counted, and neither is the memory that the KV of decoding requests takes where it was prefilled.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from _replay import Timing
from _trace import Arrival, BlockArrival
from bench_serve import Objectives

from simulation.cases import at_rate
from simulation.service import Setting, simulate
from simulation.times import LaneTimes, Load

Phase = Literal["prefill", "decode", "both"]

NOTHING = LaneTimes(row=0.0, attended=0.0)
FIRST_STEP, LONGEST_STEP = 1.25, 16.0
"""By how much a rate is changed at first while none is known that is too high, or none that is low enough; then the square of
that each time, up to the latter. Guesses are near, and a rate that is far too high takes long to simulate."""
PRECISION = 0.05
"""Of a rate that is looked for, relative."""
LASTS = 20
"""How many times as long as a request may take a simulation lasts, so that a rate which is too high makes requests late: ..."""
MOST_REQUESTS = 4000
"""... unless it would take more than these. Then it lasts shorter, and a rate may pass that is a little too high."""
LEAST_LASTS = 0.5
"""A rate that holds when so many come in so short a time is taken for one without end."""
LEAST_RATE = 1e-4
"""Requests per second; a phase that doesn't hold so few holds none."""


class Tried(msgspec.Struct, frozen=True):
    """A phase at a rate."""

    phase: Phase
    instances: int
    rate: float
    attained: float
    """Part of the requests that met the objective; of those that were still to end when too many had not, all."""


class Split(msgspec.Struct, frozen=True):
    """So many instances for each phase, and the highest rates that these hold."""

    prefill: int
    decode: int
    prefill_rate: float
    decode_rate: float

    @property
    def rate(self) -> float:
        """Of both together."""
        return min(self.prefill_rate, self.decode_rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What is looked for. Raises ValueError for objectives that leave a phase without one."""

    setting: Setting
    """Of all instances together; its policy places prompts among those of a phase."""
    arrivals: Sequence[Arrival]
    ttft_s: float
    tpot_s: float
    attain: float = 0.9
    """Part of the requests that must meet the objective."""
    most_requests: int = MOST_REQUESTS
    """Of one simulation, if the trace has no more."""
    tell: Callable[[Tried], None] = lambda tried: None
    """Hears of each simulation."""
    _found: dict[tuple[Phase, int], float] = field(default_factory=dict)
    """Goodputs."""

    def __post_init__(self) -> None:
        if not 0 < self.attain <= 1:
            raise ValueError(f"attain must be in (0, 1], got {self.attain}")
        if self.most_requests < 1:
            raise ValueError(f"a simulation has 1 request at least, got {self.most_requests}")
        Objectives(ttft_s=self.ttft_s, tpot_s=self.tpot_s)

    def goodput(self, phase: Phase, instances: int) -> float:
        """The highest rate at which so many instances meet the objective of a phase, to `PRECISION`; infinite if there is none
        that they don't.

        Raises SimulationError or RuntimeError as a simulation does.
        """
        key = phase, instances
        if key not in self._found:
            near = {
                count: rate / count for (which, count), rate in self._found.items() if which == phase and 0 < rate < math.inf
            }
            closest = min(near, key=lambda count: (abs(math.log(count / instances)), count), default=None)
            each = self._guess(phase) if closest is None else near[closest]
            self._found[key] = self._look_for(phase, instances, instances * each)
        return self._found[key]

    def _guess(self, phase: Phase) -> float:
        """Requests per second that an instance may hold: prompts one after the other, or as many answers at once as keep the
        time between tokens."""
        profile, count = self.setting.profile, len(self.arrivals)
        prompts = [arrival.prompt_tokens for arrival in self.arrivals]
        answer = sum(arrival.max_tokens for arrival in self.arrivals) / count
        prefill_s = sum(profile.prefill_s(Load(n, n * (n + 1) // 2, 0, 0)) for n in prompts) / count
        one_s = profile.decode_s(Load(1, round(sum(prompts) / count + answer / 2), 0, 0))
        each_s = max(1e-9, one_s - profile.decode.base)  # what one more answer adds to a step
        at_once = max(1.0, (self.tpot_s - profile.decode.base) / each_s)
        rates = {"prefill": 1 / max(1e-9, prefill_s), "decode": at_once / (self.tpot_s * answer)}
        return min(rates.values()) / 2 if phase == "both" else rates[phase]

    def _look_for(self, phase: Phase, instances: int, rate: float) -> float:
        """As `goodput`, from a first guess on."""
        low, high, step = 0.0, math.inf, FIRST_STEP
        while math.isinf(high) or high - low > PRECISION * high:
            if self._attains(phase, instances, rate):
                low = rate
            else:
                high = rate
            if high < LEAST_RATE:
                return 0.0
            if math.isinf(high) and rate * self._lasts_s(phase) * LEAST_LASTS / LASTS > self._most():
                return math.inf
            if low and not math.isinf(high):
                rate = (low + high) / 2
                continue
            rate = low * step if low else high / step
            step = min(step**2, LONGEST_STEP)
        return low

    def best(self) -> list[Split]:
        """Splits of all instances that were looked at, the best first.

        More instances hold a higher rate: so the best is where the rates of the phases cross, and a bisection finds it.
        """
        total = self.setting.instances
        seen: dict[int, Split] = {}

        def split(prefill: int) -> Split:
            if prefill not in seen:
                rates = self.goodput("prefill", prefill), self.goodput("decode", total - prefill)
                seen[prefill] = Split(prefill, total - prefill, *rates)
            return seen[prefill]

        low, high = 1, total - 1
        while low < high:
            middle = (low + high) // 2
            tried = split(middle)
            if tried.prefill_rate < tried.decode_rate:
                low = middle + 1
            else:
                high = middle
        split(low)
        if low > 1:
            split(low - 1)
        return sorted(seen.values(), key=lambda each: (-each.rate, each.prefill))

    def fewest(self, phase: Phase, rate: float) -> int | None:
        """The fewest instances that hold a rate in a phase, of at most as many as there are; None: all are too few."""
        total = self.setting.instances
        low, high = 1, total
        if not self._attains(phase, total, rate):
            return None
        while low < high:
            middle = (low + high) // 2
            if self._attains(phase, middle, rate):
                high = middle
            else:
                low = middle + 1
        return low

    def _lasts_s(self, phase: Phase) -> float:
        """Seconds that requests should come for: `LASTS` times as long as the phase of one may take."""
        answer = sum(arrival.max_tokens for arrival in self.arrivals) / len(self.arrivals)
        may_take = {"prefill": self.ttft_s, "decode": self.tpot_s * answer, "both": self.ttft_s + self.tpot_s * answer}
        return LASTS * may_take[phase]

    def _most(self) -> int:
        """Requests of a simulation: all of the trace at least."""
        return max(len(self.arrivals), self.most_requests)

    def _attains(self, phase: Phase, instances: int, rate: float) -> bool:
        num_requests = max(len(self.arrivals), math.ceil(rate * self._lasts_s(phase)))
        arrivals = at_rate(repeated(self.arrivals, min(self._most(), num_requests)), rate)
        profile = self.setting.profile
        if phase == "prefill":
            arrivals = [msgspec.structs.replace(arrival, max_tokens=1) for arrival in arrivals]
        elif phase == "decode":
            profile = msgspec.structs.replace(profile, prefill=NOTHING, decode_beside=1.0)
        setting = Setting(
            profile=profile,
            instances=instances,
            policy=self.setting.policy,
            grain=self.setting.grain,
            max_queue_wait_s=self.setting.max_queue_wait_s,
            limit_s=self.setting.limit_s,
            prefix_cache=self.setting.prefix_cache,
        )
        late_at_most = (1 - self.attain) * len(arrivals)
        phase_of = {"prefill": self._is_late_to_begin, "decode": self._is_late_to_end, "both": self._is_late}
        is_late = phase_of[phase]

        def is_vain(timings: Sequence[Timing], now: float) -> bool:
            return sum(is_late(timing, now) for timing in timings) > late_at_most

        outcome = simulate(setting, arrivals, is_vain)
        late = sum(timing.error is not None or is_late(timing, outcome.ended_s) for timing in outcome.timings)
        self.tell(Tried(phase, instances, rate, 1 - late / len(arrivals)))
        return late <= late_at_most

    def _is_late_to_begin(self, timing: Timing, now: float) -> bool:
        if timing.due_s is None:
            return False
        return (timing.token_s[0] if timing.token_s else now) - timing.due_s > self.ttft_s

    def _is_late_to_end(self, timing: Timing, now: float) -> bool:
        """A request waits for memory to decode as it does for its tokens: both count."""
        if timing.due_s is None:
            return False
        tokens = timing.arrival.max_tokens
        ended_s = timing.token_s[-1] if len(timing.token_s) == tokens else now
        return ended_s - timing.due_s > self.tpot_s * tokens

    def _is_late(self, timing: Timing, now: float) -> bool:
        if self._is_late_to_begin(timing, now):
            return True
        tokens = timing.arrival.max_tokens
        if not timing.token_s or tokens == 1:
            return False
        ended_s = timing.token_s[-1] if len(timing.token_s) == tokens else now
        return ended_s - timing.token_s[0] > self.tpot_s * (tokens - 1)


def repeated(arrivals: Sequence[Arrival], count: int) -> list[Arrival]:
    """So many requests: the trace again and again, one right after the other, with prompts of its own each time."""
    length_s = max(arrival.at_s for arrival in arrivals) * (1 + 1 / len(arrivals))
    ids = 1 + max((max(a.hash_ids, default=0) for a in arrivals if isinstance(a, BlockArrival)), default=0)
    some: list[Arrival] = []
    for i in range(count):
        turn, place = divmod(i, len(arrivals))
        arrival = arrivals[place]
        if isinstance(arrival, BlockArrival):
            arrival = msgspec.structs.replace(arrival, hash_ids=[each + turn * ids for each in arrival.hash_ids])
        some.append(msgspec.structs.replace(arrival, at_s=arrival.at_s + turn * length_s))
    return some
