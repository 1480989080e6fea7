"""How long steps and copies of a cell take: a model that is fitted to steps as they run, and says what others would take.

    step = step_s + row_s * rows + attended_s * attended + moved_s * moved (+ exchange_s, if moved)

`rows`: that run through the model here. `attended`: tokens of KV that all rows read here, summed over the rows, those of other
instances among them. `moved`: rows that were sent to others or came from them, once for each receiver. The lanes differ: rows
of a decode step wait for the weights, those of a prompt for arithmetic. So each has its own coefficients, all at least 0: no
prediction is negative, and none falls with more rows or more KV.

Before a step has run there is a guess; a cell's first instances measure some (`instance.calibrate`); from then on all instances
say how long theirs took. Those of one cell may be made differently: each has a factor of its own.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import median
from typing import Literal

from gmanager.cluster.fitting import fit
from gmanager.wire.messages import StepSample

Lane = Literal["prefill", "decode"]
LANES: tuple[Lane, Lane] = ("prefill", "decode")
"""As a sample numbers them."""

MAX_STEP_US = 3600 * 10**6
MAX_ROWS = 2**24
MAX_ATTENDED = 2**53
"""Beyond these limits a sample is no step's: it isn't taken."""

NUM_RECENT = 256
"""Samples of a lane that are fitted, the newest ones."""
NUM_BUCKETS, PER_BUCKET = 64, 4
"""Older ones that are kept, too: some of each size, so that a step that is rare is not forgotten."""
MIN_NEW = 32
"""Samples with which a lane is fitted again, or as many as there were before: one tells how fast the machine is, ..."""
REFIT_S = 5.0
"""... and if so much time has passed."""
MIN_ALONE, MIN_BESIDE = 16, 8
"""Steps of a lane that ran alone, and beside the other lane's, with which the two are told apart."""
MAX_FACTOR = 16.0
"""By which an instance or a neighbour can slow a step down."""
NUM_ERRORS = 128
"""Newest predictions whose error is told."""
NUM_COMPARED, MIN_COMPARED = 32, 8
"""Newest steps that say how fast one instance is, and fewest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """Of one lane's steps, in seconds; each at least 0. Raises ValueError otherwise."""

    step_s: float
    """Of any step."""
    row_s: float
    attended_s: float
    """Of a token that a row attends to."""
    moved_s: float
    """Of a row that is sent, or comes."""
    exchange_s: float
    """Of a step in which any is."""
    beside: float = 1.0
    """How many times longer a step takes while the other lane runs, too; at least 1."""

    def __post_init__(self) -> None:
        if not all(0 <= c < float("inf") for c in self.coefficients) or not 1 <= self.beside <= MAX_FACTOR:
            raise ValueError(f"costs must be finite, at least 0, and those beside others 1 to {MAX_FACTOR:g} times: {self}")

    @property
    def coefficients(self) -> tuple[float, float, float, float, float]:
        """In the order of `Step.features`."""
        return self.step_s, self.row_s, self.attended_s, self.moved_s, self.exchange_s

    def predict(self, *, rows: float, attended: float, moved: float = 0, steps: float = 1) -> float:
        """Seconds of so many steps with so many rows in all, that run alone."""
        per_step = self.step_s + (self.exchange_s if moved else 0.0)
        return per_step * steps + self.row_s * rows + self.attended_s * attended + self.moved_s * moved


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of everything that takes time in a cell, on an instance as fast as most of it."""

    prefill: StepCosts
    decode: StepCosts
    copied_s: float
    """Of a token whose KV is copied to another instance."""

    def __post_init__(self) -> None:
        if not 0 <= self.copied_s < float("inf"):
            raise ValueError(f"a cost must be finite and at least 0: {self}")

    def decode_step_s(self, rows: int, held_here: int, sent: int = 0, served: int = 0, *, beside: bool = False) -> float:
        """Seconds of a decode step on an instance with so many rows of its own. `held_here`: tokens that all rows, those that
        it serves among them, attend to here. `sent`, `served`: rows that go to others and come from them. `beside`: while a
        prompt runs."""
        seconds = self.decode.predict(rows=rows, attended=held_here, moved=sent + served)
        return seconds * self.decode.beside if beside else seconds

    def prefill_s(self, tokens: int, prefix: int = 0, degree: int = 1, *, chunk: int, beside: bool = False) -> float:
        """Seconds in which `degree` instances compute so many tokens behind a prefix whose KV is there, each `chunk` rows a
        step. `beside`: while others decode.

        Each computes a part, and attends to its part of the KV for all of them: n/k rows, and (n s + n (n+1) / 2) / k tokens
        attended to here. Every row travels to the others, and one for it back, in the steps of all.
        """
        if tokens <= 0:
            return 0.0
        share = tokens / degree
        steps = -(-tokens // (degree * chunk))
        attended = (tokens * prefix + tokens * (tokens + 1) / 2) / degree
        moved = 2 * (degree - 1) * share
        seconds = self.prefill.predict(rows=share, attended=attended, moved=moved, steps=steps)
        return seconds * self.prefill.beside if beside else seconds

    def transfer_s(self, tokens: int) -> float:
        """Seconds in which the KV of so many tokens is copied from one instance to another."""
        return self.copied_s * tokens


def guess(reach: int) -> Costs:
    """What is believed before anything has run: a GPU that is busy with a model of some billion parameters. `reach`: of the
    model (`InstanceSpec.reach`)."""
    row_s = 100e-6
    return Costs(
        prefill=StepCosts(step_s=5e-3, row_s=row_s, attended_s=row_s / reach, moved_s=2e-6, exchange_s=2e-3),
        decode=StepCosts(step_s=10e-3, row_s=50e-6, attended_s=30e-9, moved_s=2e-6, exchange_s=2e-3),
        copied_s=10e-6,  # 128 KiB at 13 GB/s
    )


@dataclass(frozen=True, slots=True)
class Step:
    """One that has run."""

    rows: int
    attended: int
    moved: int
    beside: bool
    seconds: float

    @classmethod
    def of(cls, sample: StepSample) -> "Step | None":
        """None: no step can be so."""
        counts = (sample.rows, sample.sent, sample.served)
        is_sound = (
            sample.lane in (0, 1)
            and all(0 <= count <= MAX_ROWS for count in counts)
            and sample.rows + sample.served > 0
            and 0 <= sample.attended <= MAX_ATTENDED
            and 0 < sample.us <= MAX_STEP_US
        )
        if not is_sound:
            return None
        return cls(sample.rows, sample.attended, sample.sent + sample.served, sample.beside, sample.us / 1e6)

    @property
    def features(self) -> tuple[float, float, float, float, float]:
        return 1.0, float(self.rows), float(self.attended), float(self.moved), float(self.moved > 0)

    @property
    def bucket(self) -> tuple[int, int, int, bool]:
        """The same of steps of about one size."""
        return self.rows.bit_length(), self.attended.bit_length(), self.moved.bit_length(), self.beside


class _Lane:
    """What is known of one lane's steps."""

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs
        self.num_samples = 0
        """That have come."""
        self.is_guess = True
        """Whether nothing is known: its costs are made up."""
        self.errors: deque[float] = deque(maxlen=NUM_ERRORS)
        """Relative ones of predictions that were made before the step was known; guesses are none."""
        self._recent: deque[Step] = deque()
        self._older: dict[tuple[int, int, int, bool], tuple[Step, ...]] = {}
        """By size; that of which the last one came longest ago is first."""
        self._num_new = 0
        self._fitted_at: float | None = None

    def predict(self, step: Step) -> float:
        """What the step should have taken on an instance as fast as most."""
        seconds = self.costs.predict(rows=step.rows, attended=step.attended, moved=step.moved)
        return seconds * self.costs.beside if step.beside else seconds

    def take(self, step: Step) -> None:
        self.num_samples += 1
        self._num_new += 1
        if len(self._recent) == NUM_RECENT:
            before = self._recent.popleft()
            kept = self._older.pop(before.bucket, ())
            self._older[before.bucket] = (*kept, before)[-PER_BUCKET:]
            if len(self._older) > NUM_BUCKETS:
                del self._older[next(iter(self._older))]
        self._recent.append(step)

    def refit(self, now: float) -> bool:
        """Whether the costs are new ones."""
        if self._num_new < min(MIN_NEW, max(1, self.num_samples - self._num_new)):
            return False
        if self._fitted_at is not None and now - self._fitted_at < REFIT_S:
            return False
        self._num_new, self._fitted_at, self.is_guess = 0, now, False
        steps = [*chain.from_iterable(self._older.values()), *self._recent]
        alone, others = [s for s in steps if not s.beside], [s for s in steps if s.beside]
        beside = self.costs.beside
        if len(alone) >= MIN_ALONE and len(others) >= MIN_BESIDE:
            costs = self._fitted(alone, 1.0)
            ratios = [_ratio(s.seconds, costs.predict(rows=s.rows, attended=s.attended, moved=s.moved)) for s in others]
            beside = _bounded(median(ratios), 1.0)
        self.costs = self._fitted(steps, beside)
        return True

    def _fitted(self, steps: Sequence[Step], beside: float) -> StepCosts:
        """Costs that explain the steps, if others beside them cost that factor."""
        seconds = [step.seconds / beside if step.beside else step.seconds for step in steps]
        found = fit([step.features for step in steps], seconds, self.costs.coefficients)
        step_s, row_s, attended_s, moved_s, exchange_s = found
        return StepCosts(
            step_s=step_s, row_s=row_s, attended_s=attended_s, moved_s=moved_s, exchange_s=exchange_s, beside=beside
        )


class PerformanceModel:
    """Of one cell."""

    def __init__(self, reach: int) -> None:
        """`reach`: of its model."""
        self._costs = guess(reach)
        self._lanes: dict[Lane, _Lane] = {"prefill": _Lane(self._costs.prefill), "decode": _Lane(self._costs.decode)}
        self._copies: deque[float] = deque(maxlen=NUM_COMPARED)
        """Seconds per token of the newest ones."""
        self._steps: dict[int, deque[tuple[Lane, Step]]] = {}
        """id of an instance -> its newest ones."""
        self._factors: dict[int, float] = {}
        """id of an instance -> how many times longer these took than predicted."""

    @property
    def costs(self) -> Costs:
        """As they are believed to be now."""
        return self._costs

    @property
    def is_guess(self) -> bool:
        """Whether nothing has been heard of some lane's steps."""
        return any(lane.is_guess and not lane.num_samples for lane in self._lanes.values())

    def restore(self, costs: Costs) -> None:
        """Begin with what such a cell was found to cost before."""
        self._lanes["prefill"].costs, self._lanes["decode"].costs = costs.prefill, costs.decode
        self._costs = costs
        for lane in self._lanes.values():
            lane.is_guess = False

    def take(self, instance: int, samples: Iterable[StepSample]) -> int:
        """Steps that have run on an instance. Returns how many of them can't have been."""
        wrong = 0
        for sample in samples:
            step = Step.of(sample)
            if step is None:
                wrong += 1
                continue
            name = LANES[sample.lane]
            lane = self._lanes[name]
            if not lane.is_guess:
                lane.errors.append(abs(lane.predict(step) * self.factor(instance) / step.seconds - 1))
            lane.take(step)
            self._steps.setdefault(instance, deque(maxlen=NUM_COMPARED)).append((name, step))
        self._compare(instance)
        return wrong

    def take_copy(self, tokens: int, us: int) -> None:
        """The KV of so many tokens was copied. Ignored if that can't be."""
        if tokens > 0 and 0 < us <= MAX_STEP_US:
            self._copies.append(us / 1e6 / tokens)
            self._costs = replace(self._costs, copied_s=median(self._copies))

    def forget(self, instance: int) -> None:
        """It is no member any more."""
        self._steps.pop(instance, None)
        self._factors.pop(instance, None)

    def refit(self, now: float) -> bool:
        """Fit anew what has enough new samples, and hasn't been fitted just now: milliseconds. Whether anything was."""
        changed = [lane.refit(now) for lane in self._lanes.values()]
        if any(changed):
            prefill, decode = (self._lanes[name].costs for name in LANES)
            self._costs = replace(self._costs, prefill=prefill, decode=decode)
            for instance in self._steps:
                self._compare(instance)
        return any(changed)

    def _compare(self, instance: int) -> None:
        """Its newest steps with what they should have taken."""
        steps = self._steps.get(instance, ())
        if len(steps) >= MIN_COMPARED:
            ratios = [_ratio(step.seconds, self._lanes[lane].predict(step)) for lane, step in steps]
            self._factors[instance] = _bounded(median(ratios), 1 / MAX_FACTOR)

    def factor(self, instance: int) -> float:
        """How many times longer steps of this instance take than most instances'. It is shown, and no policy weighs it."""
        return self._factors.get(instance, 1.0)

    def num_samples(self, lane: Lane) -> int:
        """Steps that have been heard of."""
        return self._lanes[lane].num_samples

    def error(self, lane: Lane) -> float | None:
        """Median of how far the newest predictions were off, as a part of the time that the step took then; None: there is
        none yet."""
        errors = self._lanes[lane].errors
        return median(errors) if errors else None


def _ratio(seconds: float, predicted: float) -> float:
    return seconds / predicted if predicted > 0 else MAX_FACTOR


def _bounded(factor: float, least: float) -> float:
    return max(least, min(factor, MAX_FACTOR))
