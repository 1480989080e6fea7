"""How fast a cell is, from what its requests took: pure, times in seconds. What is older counts less.

Work is counted as `placement.prompt_work` does, in tokens at the beginning of a prompt. Until `LEAST` of a kind were measured
nothing is known of it, and whoever asks is told so.
"""

from math import sqrt
from typing import Protocol

LEAST = 2
"""Measured values from which on something is said: the first may have warmed something up, and a crowd at the start of a
service doesn't wait to be measured (on two CPU cores 16 prompts of 256 tokens came before 4 had their first tokens)."""
FEW, MANY = 32, 256
"""Measured values in which an older one's weight falls to 1/e: of requests, and of steps."""
RIDGE = 0.01
"""Of what is asked of the samples, so much is asked of the simpler line: enough to decide where they don't."""
OUTLIER = 4.0
"""A value that is so many times as large or as small as expected counts as that."""
MOST_ERROR = 2.0


class Predictor(Protocol):
    """What a cell takes. None: that is not known (yet)."""

    def prefill_s(self, work: float) -> float | None:
        """Seconds in which so much work of prompts is done at the instance that has most of it."""

    def decode_step_s(self, rows: int) -> float | None:
        """Seconds of a step in which an instance decodes so many rows."""


class Line:
    """y = a + b x, with a, b >= 0, by least squares of errors relative to the line itself: so that a short prompt's overhead
    counts as much as a long one's length. Where the samples don't tell (they all have the same x) it goes through the origin,
    or is flat."""

    def __init__(self, *, memory: int, is_flat: bool) -> None:
        self.count = 0
        self._memory = memory
        self._is_flat = is_flat
        self._mean_x = self._mean_y = 0.0
        # of samples (1, x, y), divided by how large y is there beside its mean: sums of products
        self._uu = self._uv = self._vv = self._uy = self._vy = 0.0

    def add(self, x: float, y: float) -> None:
        """A sample; x > 0, y > 0."""
        expected, mean = self.at(x), self.at(self._mean_x)
        if expected and mean:
            y = min(max(y, expected / OUTLIER), expected * OUTLIER)
            size = expected / mean
        else:
            size = y / (self._mean_y or y)
        self.count += 1
        share = 1 / min(self.count, self._memory)
        self._mean_x += share * (x - self._mean_x)
        self._mean_y += share * (y - self._mean_y)
        keep, u, v, y = 1 - 1 / self._memory, 1 / size, x / size, y / size
        self._uu, self._uv, self._vv = keep * self._uu + u * u, keep * self._uv + u * v, keep * self._vv + v * v
        self._uy, self._vy = keep * self._uy + u * y, keep * self._vy + v * y

    def at(self, x: float) -> float | None:
        """None: there are too few samples."""
        if self.count < LEAST:
            return None
        uu, vv = self._uu * (1 + RIDGE * (not self._is_flat)), self._vv * (1 + RIDGE * self._is_flat)
        determinant = uu * vv - self._uv**2
        a = (self._uy * vv - self._vy * self._uv) / determinant if determinant else 0.0
        b = (self._vy * uu - self._uy * self._uv) / determinant if determinant else 0.0
        if b <= 0:
            return self._uy / self._uu
        return self._vy / self._vv * x if a <= 0 else a + b * x


class Measured:
    """A `Predictor` from what requests took to their first token, and what steps took: with all that lies between steps, of
    which the performance model of the cell knows nothing."""

    def __init__(self) -> None:
        self._prefill = Line(memory=FEW, is_flat=False)
        self._decode = Line(memory=MANY, is_flat=True)

    def prefill_s(self, work: float) -> float | None:
        """As `Predictor`."""
        return self._prefill.at(work)

    def decode_step_s(self, rows: int) -> float | None:
        """As `Predictor`."""
        return self._decode.at(rows)

    def hear_prefill(self, work: float, seconds: float) -> None:
        """So much work was done in that time."""
        if seconds > 0:
            self._prefill.add(work, seconds)

    def hear_steps(self, rows: float, seconds: float) -> None:
        """Steps of so many rows took so long each."""
        if seconds > 0:
            self._decode.add(rows, seconds)


class Margin:
    """By how much more than expected things take."""

    def __init__(self) -> None:
        self._squares = 0.0

    def hear(self, expected: float | None, took: float) -> None:
        """Nothing is learned from what was not expected."""
        if expected:
            over = min(max(took / expected - 1, 0.0), MOST_ERROR)
            self._squares += (over * over - self._squares) / FEW

    @property
    def factor(self) -> float:
        """For what is expected: one root of the mean square of the excess more."""
        return 1 + sqrt(self._squares)


class Least:
    """Of the values of late: a larger one moves it up a little."""

    def __init__(self) -> None:
        self.value: float | None = None
        """None: there was none."""

    def hear(self, value: float) -> None:
        if self.value is None or value < self.value:
            self.value = value
        else:
            self.value += (value - self.value) / MANY


class Mean:
    """Of the last values."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = 0.0

    def hear(self, value: float) -> None:
        self._count += 1
        self._mean += (value - self._mean) / min(self._count, FEW)

    @property
    def value(self) -> float | None:
        """None: there are too few."""
        return self._mean if self._count >= LEAST else None
