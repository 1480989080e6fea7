"""What is counted of requests over the gManager's life: pure, times in seconds of the cluster's clock.

    Submit ──queue──> Admit ──────> first token ──TPOT x (tokens - 1)──> last token ──> final answer
      └───────────────── TTFT ───────────┘                                                  │
      └──────────────────────────────── end to end ─────────────────────────────────────────┘

A preempted request waits and is admitted again, and is counted once.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import get_args

from gmanager.wire.messages import FinishReason, Histogram, Observations, RefusalReason

# vLLM's, so that its dashboards fit; before them what an idle service of short requests needs.
TTFT_BOUNDS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TPOT_BOUNDS_S = (
    *(0.001, 0.0025, 0.005, 0.0075),  # one H200 takes 5 ms for a token of an 8B model
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BOUNDS_S = (
    *(0.001, 0.01, 0.03, 0.1),
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Buckets:
    """How many values fell into each range `(bounds[i-1], bounds[i]]`, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: ascending; what is larger than the last has a range of its own."""
        self._bounds = list(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def histogram(self) -> Histogram:
        """As it goes over the wire."""
        return Histogram(bounds=list(self._bounds), counts=list(self._counts), total=self._total)


class Observed:
    """Histograms and counts of all requests since the gManager has started."""

    def __init__(self) -> None:
        self.queue_s = Buckets(REQUEST_BOUNDS_S)
        self.ttft_s = Buckets(TTFT_BOUNDS_S)
        self.tpot_s = Buckets(TPOT_BOUNDS_S)
        self.e2e_s = Buckets(REQUEST_BOUNDS_S)
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        # every reason has its count from the start: a rate over a series that appears later misses its first event
        self.finished: dict[FinishReason, int] = dict.fromkeys(get_args(FinishReason), 0)
        self.refused: dict[RefusalReason, int] = dict.fromkeys(get_args(RefusalReason), 0)
        self.met_slo = 0
        self.missed_ttft = 0
        self.missed_tpot = 0

    def observations(self) -> Observations:
        """As they go over the wire."""
        return Observations(
            queue_s=self.queue_s.histogram(),
            ttft_s=self.ttft_s.histogram(),
            tpot_s=self.tpot_s.histogram(),
            e2e_s=self.e2e_s.histogram(),
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            finished=dict(self.finished),
            refused=dict(self.refused),
            met_slo=self.met_slo,
            missed_ttft=self.missed_ttft,
            missed_tpot=self.missed_tpot,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
        )
