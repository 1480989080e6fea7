"""The service's statistics as Prometheus reads them, in vLLM's names and units under our own prefix.

Everything is made from one `Stats`, so all values of a scrape belong together. Instances are told apart by `cell` and `rank`;
what only the gManager knows (requests, tokens, times) has no such labels.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gmanager.wire.messages import CellPerformance, Counters, Histogram, InstanceStats, LanePerformance, RequestState, Stats

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of what `render` returns."""

PREFIX = "distattn:"

WAITING: tuple[RequestState, ...] = ("queued", "reserving", "preempted")
RUNNING: tuple[RequestState, ...] = ("prefill", "decode", "moving")

Samples = Iterable[tuple[tuple[str, ...], float]]
"""Label values and value of each."""

_PLACE = ("cell", "rank")

_COUNTED = {
    "steps": "Steps that the instance had a part in.",
    "rows": "Rows of tokens that ran through the model.",
    "rows_dispatched": "Query rows sent to other instances, once a step and receiver.",
    "split_steps": "Decode steps whose dense layers were split between instances.",
    "tokens_prefilled": "Prompt tokens computed, those of preempted requests again.",
    "tokens_generated": "Tokens sampled for the sequences at home here.",
    "home_moves": "Sequences that came here to be at home.",
    "blocks_copied": "Blocks of KV copied to other instances.",
    "blocks_evicted": "Blocks of cached KV that had to make room.",
    "tier_bytes_down": "Bytes of cached KV copied to host memory or disk.",
    "tier_bytes_up": "Bytes of cached KV read from there into the pool.",
    "tier_tokens": "Tokens whose KV was read from host memory or disk instead of being computed.",
    "blocks_corrupt": "Cached blocks that were not what was written, and are computed again.",
    "slots_failed": "Slots of host memory or disk that could not be written.",
    "copies_failed": "Blocks that were not copied below the pool or back, as the device had no memory for that.",
    "query_bytes": "Bytes of queries sent to other instances.",
    "partial_bytes": "Bytes of partial attention states sent to other instances.",
    "kv_bytes": "Bytes of KV sent to other instances.",
}
"""Fields of `Counters` that are an instance's own, and their help."""


def render(stats: Stats, answers: Mapping[tuple[str, int], int]) -> bytes:
    """The text of a scrape. `answers`: the gateway's own, by path and status. Content type: `CONTENT_TYPE`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(stats, answers))
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, stats: Stats, answers: Mapping[tuple[str, int], int]) -> None:
        self._stats = stats
        self._answers = answers

    def collect(self) -> Iterable[Metric]:
        yield from _requests(self._stats)
        yield from _cells(self._stats)
        yield from _costs(self._stats)
        yield from _memory(self._stats.instances)
        yield from _work(self._stats.instances)
        yield _dropped(self._stats)
        answers = [((path, str(status)), count) for (path, status), count in sorted(self._answers.items())]
        yield _counter("http_requests", "Requests that this gateway has answered.", answers, ["path", "status"])


def _requests(stats: Stats) -> Iterator[Metric]:
    states = Counter(request.state for request in stats.requests.values())
    yield _gauge("num_requests_running", "Requests that compute.", [((), sum(states[state] for state in RUNNING))])
    yield _gauge(
        "num_requests_waiting", "Requests that wait for a cell or for memory.", [((), sum(states[s] for s in WAITING))]
    )
    by_state = [((state,), states[state]) for state in (*WAITING, *RUNNING)]
    yield _gauge("num_requests", "Requests that have not ended.", by_state, ["state"])
    observed = stats.observed
    yield _histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", observed.ttft_s)
    yield _histogram(
        "request_time_per_output_token_seconds", "Mean time between the tokens of a request that has ended.", observed.tpot_s
    )
    yield _histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", observed.e2e_s)
    yield _histogram("request_queue_time_seconds", "From a request's arrival to its first admission.", observed.queue_s)
    yield _counter("prompt_tokens", "Tokens of the prompts of admitted requests.", [((), observed.prompt_tokens)])
    queries, hits = [((), observed.prefix_queries)], [((), observed.prefix_hits)]
    yield _counter("prefix_cache_queries", "Tokens of prompts whose KV was looked for.", queries)
    yield _counter("prefix_cache_hits", "Tokens of prompts whose KV was there.", hits)
    yield _counter("generation_tokens", "Tokens that requests were given.", [((), observed.generated_tokens)])
    finished = [((reason,), count) for reason, count in observed.finished.items()]
    yield _counter("request_success", "Requests that have ended, by why.", finished, ["finished_reason"])
    refused = [((reason,), count) for reason, count in observed.refused.items()]
    yield _counter("requests_refused", "Requests that never started, by why.", refused, ["reason"])
    yield _counter("requests_met_slo", "Requests that met their objectives.", [((), observed.met_slo)])
    missed = [(("ttft",), observed.missed_ttft), (("tpot",), observed.missed_tpot)]
    help_text = "Requests that were served and missed an objective; one may have missed both."
    yield _counter("requests_missed_slo", help_text, missed, ["objective"])
    yield _counter(
        "num_preemptions", "Times that a request gave its memory back to others.", [((), stats.counters.preemptions)]
    )
    help_text = "Runs of KV that were not what was sent, or never came: copied anew."
    yield _counter("moves_failed", help_text, [((), stats.counters.moves_failed)])


def _cells(stats: Stats) -> Iterator[Metric]:
    info = [((c.name, c.model, str(c.size), str(c.epoch), c.state), 1) for c in stats.cells]
    yield _gauge("cell_info", "Cells, and the models that they serve.", info, ["cell", "model", "size", "epoch", "state"])


def _costs(stats: Stats) -> Iterator[Metric]:
    lanes = [(c.name, name, lane) for c in stats.cells if c.performance is not None for name, lane in _lanes(c.performance)]
    costs = [((cell, name, part), s) for cell, name, lane in lanes for part, s in _cost_parts(lane).items()]
    help_text = (
        "What a step takes by what was measured: of itself, a row, a token attended to, a row that travels, an exchange."
    )
    yield _gauge("step_cost_seconds", help_text, costs, ["cell", "lane", "part"])
    errors = [((cell, name), lane.error) for cell, name, lane in lanes if lane.error is not None]
    help_text = "By which part of a step's time predictions are off, the median."
    yield _gauge("step_prediction_error_ratio", help_text, errors, ["cell", "lane"])
    samples = [((cell, name), lane.samples) for cell, name, lane in lanes]
    yield _counter("step_samples", "Steps whose times were heard of.", samples, ["cell", "lane"])
    slowness = [(_place(i), i.slowness) for i in stats.instances]
    yield _gauge("step_slowness_ratio", "How many times longer an instance's steps take than its cell's.", slowness, _PLACE)


def _lanes(performance: CellPerformance) -> list[tuple[str, LanePerformance]]:
    return [("prefill", performance.prefill), ("decode", performance.decode)]


def _cost_parts(lane: LanePerformance) -> dict[str, float]:
    """Seconds."""
    return {
        "step": lane.step_us / 1e6,
        "row": lane.row_us / 1e6,
        "attended": lane.attended_ns / 1e9,
        "moved": lane.moved_us / 1e6,
        "exchange": lane.exchange_us / 1e6,
    }


def _memory(instances: list[InstanceStats]) -> Iterator[Metric]:
    usage = [(_place(i), i.used_tokens / i.total_tokens if i.total_tokens else 0) for i in instances]
    yield _gauge("kv_cache_usage_perc", "Part of an instance's KV memory that is in use; 1 is all.", usage, _PLACE)
    kinds = ("used", "free", "total", "lent", "borrowed", "cached", "host", "disk")
    tokens = [((*_place(i), kind), getattr(i, f"{kind}_tokens")) for i in instances for kind in kinds]
    help_text = (
        "Tokens of KV: used (lent ones too) + free = total; cached: of the free ones, those whose KV is kept for others; "
        "lent to sequences at home elsewhere; borrowed from others; with a copy in host memory, on disk."
    )
    yield _gauge("kv_tokens", help_text, tokens, [*_PLACE, "kind"])


def _work(instances: list[InstanceStats]) -> Iterator[Metric]:
    for name, help_text in _COUNTED.items():
        yield _counter(name, help_text, [(_place(i), getattr(i.counters, name)) for i in instances], _PLACE)
    parts = [((*_place(i), part), s) for i in instances for part, s in _step_parts(i.counters).items()]
    help_text = "Time in which the device ran steps: waiting for others' rows, attention, the rest; on a GPU all is the rest."
    yield _counter("step_seconds", help_text, parts, [*_PLACE, "part"])
    waits = [(_place(i), i.counters.notice_us / 1e6) for i in instances]
    help_text = "Time in which an instance waited for the notices of its party, mostly while its device was busy."
    yield _counter("notice_wait_seconds", help_text, waits, _PLACE)


def _step_parts(counters: Counters) -> dict[str, float]:
    """Seconds of each; together, all of the steps' time."""
    exchange, attention = counters.exchange_us, counters.attention_us
    rest = max(0, counters.step_us - exchange - attention)
    return {"exchange": exchange / 1e6, "attention": attention / 1e6, "rest": rest / 1e6}


def _dropped(stats: Stats) -> Metric:
    of_instances = [(_place(i), i.counters.dropped_messages) for i in stats.instances]
    own = max(0, stats.counters.dropped_messages - sum(count for _, count in of_instances))
    # a sum over instances would fall when one leaves, and Prometheus take what is left for new
    help_text = "Messages that came too late, or can't be; without a cell: the gManager's own."
    return _counter("dropped_messages", help_text, [(("", ""), own), *of_instances], _PLACE)


def _place(instance: InstanceStats) -> tuple[str, str]:
    return instance.cell, str(instance.rank)


def _gauge(name: str, help_text: str, samples: Samples, labels: Iterable[str] = ()) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, help_text, labels=list(labels))
    for label_values, value in samples:
        family.add_metric(label_values, value)
    return family


def _counter(name: str, help_text: str, samples: Samples, labels: Iterable[str] = ()) -> CounterMetricFamily:
    """Its samples are called `NAME_total`."""
    family = CounterMetricFamily(PREFIX + name, help_text, labels=list(labels))
    for label_values, value in samples:
        family.add_metric(label_values, value)
    return family


def _histogram(name: str, help_text: str, histogram: Histogram) -> HistogramMetricFamily:
    bounds = [str(bound) for bound in histogram.bounds] + ["+Inf"]
    buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(PREFIX + name, help_text, buckets=buckets, sum_value=histogram.total)
