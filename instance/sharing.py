"""How many of a GPU's processors each lane gets for its next step: pure.

Alone, a lane has all of them. While both have work the decode lane has one of a few fixed numbers, the prefill lane the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distattn.layout import Layout

SPLITS = (24,)
"""Processors that the decode lane may have; multiples of 8, in which the driver gives them (docs/performance.md)."""

STRETCH = 3
"""How many times as long as alone a decode step may take beside a prompt."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a decode step asks of an instance."""

    rows: int = 0
    kv_tokens: int = 0

    @staticmethod
    def of(layout: Layout) -> "Load":
        """Own rows and those of others that are served, with what they read here."""
        readings = (*layout.own, *layout.others)
        return Load(layout.num_rows + layout.num_received, sum(reading.num_pairs for reading in readings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of a model on a GPU."""

    weight_bytes: int
    token_bytes: int
    """KV of one token, all layers."""
    flops_per_row: int
    """Of a row's products."""
    whole_bandwidth: float = 4.2e12
    """Bytes a second that all processors read. One H200."""
    processor_bandwidth: float = 6.0e10
    """And one of few."""
    processor_flops: float = 4.0e12
    """Operations a second of one processor in products of few rows, bf16."""

    def step_s(self, load: Load, processors: int) -> float:
        """Seconds of a decode step, by the roofline model (Williams, Waterman and Patterson, 2009)."""
        read = self.weight_bytes + load.kv_tokens * self.token_bytes
        memory = read / min(self.whole_bandwidth, processors * self.processor_bandwidth)
        return max(memory, load.rows * self.flops_per_row / (processors * self.processor_flops))


class Sharing:
    """The lanes of one instance. A number of processors that is given holds until the lane's next step."""

    def __init__(self, total: int, splits: Sequence[int], costs: Costs) -> None:
        """`splits`: what the decode lane may have while both have work, ascending; none: both have `total`."""
        self._total = total
        self._splits = tuple(splits)
        self._costs = costs
        self._load = Load()
        self._split = 0
        """The decode lane's part while the prefill lane has work; 0: all."""

    @property
    def stretch(self) -> float:
        """How many times as long a decode step that reads nothing but weights takes beside a prompt as alone."""
        if not self._splits:
            return 1.0
        return self._costs.step_s(Load(), self._choose(Load())) / self._costs.step_s(Load(), self._total)

    def for_prefill(self, *, decodes_meanwhile: bool) -> int:
        """Processors of the next prefill step; `decodes_meanwhile`: whether the decode lane has work, or will have."""
        self._split = self._choose(self._load) if decodes_meanwhile and self._splits else 0
        return self._total - self._split

    def for_decode(self, load: Load, *, prefill_is_busy: bool) -> int:
        """Processors of the next decode step."""
        self._load = load
        return self._split if prefill_is_busy and self._split else self._total

    def _choose(self, load: Load) -> int:
        """The fewest with which a decode step is not stretched beyond `STRETCH`; else the most."""
        allowed = STRETCH * self._costs.step_s(load, self._total)
        enough = (split for split in self._splits if self._costs.step_s(load, split) <= allowed)
        return next(enough, self._splits[-1])
