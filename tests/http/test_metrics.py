"""A scrape, read by prometheus_client's own parser, beside the `Stats` that it was made of."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gmanager.gateway.metrics import CONTENT_TYPE, PREFIX, render
from gmanager.observed import REQUEST_BOUNDS_S, TPOT_BOUNDS_S, TTFT_BOUNDS_S, Buckets
from gmanager.wire import messages as m
from tests.gmanager.cluster_support import outputs, peer, running, serving

DOCS = Path(__file__).resolve().parents[2] / "docs" / "operate.md"

BUSY = m.Counters(
    steps=10,
    rows=300,
    rows_dispatched=40,
    split_steps=4,
    tokens_prefilled=280,
    tokens_generated=20,
    home_moves=2,
    query_bytes=4096,
    partial_bytes=8192,
    kv_bytes=0,
    step_us=5_000_000,
    exchange_us=1_000_000,
    attention_us=2_500_000,
    notice_us=250_000,
    dropped_messages=1,
)
IDLE = m.Counters(steps=3, dropped_messages=2)
AWKWARD = 'a "model"\nwith \\ all'

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def histogram(bounds: tuple[float, ...], *values: float) -> m.Histogram:
    buckets = Buckets(bounds)
    for value in values:
        buckets.add(value)
    return buckets.histogram()


def request(state: m.RequestState) -> m.RequestStats:
    return m.RequestStats(
        state=state,
        cell="main",
        home=0,
        kv_tokens={0: 5},
        prompt_tokens=5,
        generated_tokens=0,
        home_moves=0,
        preemptions=0,
    )


def instance(rank: int, used: int, counters: m.Counters) -> m.InstanceStats:
    return m.InstanceStats(
        cell="main",
        rank=rank,
        total_tokens=1000,
        used_tokens=used,
        free_tokens=1000 - used,
        lent_tokens=100 * rank,
        borrowed_tokens=100 * (1 - rank),
        counters=counters,
        slowness=1 + 1.5 * rank,
    )


OBSERVED = m.Observations(
    queue_s=histogram(REQUEST_BOUNDS_S, 0.0004, 0.2, 2000.0, 9000.0),
    ttft_s=histogram(TTFT_BOUNDS_S, 0.05, 0.05, 2000.0),
    tpot_s=histogram(TPOT_BOUNDS_S, 0.005, 0.02),
    e2e_s=histogram(REQUEST_BOUNDS_S, 1.0, 3000.0),
    prompt_tokens=1_000_000,
    generated_tokens=77,
    finished={"stop": 4, "length": 3, "abort": 2, "error": 1},
    refused={"invalid": 1, "too_long": 2, "never": 3, "model": 4, "full": 5, "not_ready": 6},
    prefix_queries=900_000,
    prefix_hits=300_000,
)
STATES: list[m.RequestState] = [
    "queued",
    "queued",
    "reserving",
    "prefill",
    "decode",
    "decode",
    "moving",
    "preempted",
    "finished",
]
PERFORMANCE = m.CellPerformance(
    prefill=m.LanePerformance(
        step_us=5000, row_us=40, attended_ns=3, moved_us=2, exchange_us=1000, beside=1.5, samples=7, error=0.125
    ),
    decode=m.LanePerformance(
        step_us=9000, row_us=20, attended_ns=30, moved_us=1, exchange_us=500, beside=2, samples=0, error=None
    ),
    copied_us=10,
)
STATS = m.Stats(
    epoch=3,
    cells=[
        m.CellStats(
            name="main",
            epoch=3,
            state="ready",
            size=2,
            model=AWKWARD,
            block_size=16,
            max_context=8192,
            total_tokens=2000,
            performance=PERFORMANCE,
        )
    ],
    instances=[instance(0, 750, BUSY), instance(1, 0, IDLE)],
    requests={f"r{i}": request(state) for i, state in enumerate(STATES)},
    counters=m.Counters(steps=13, preemptions=7, dropped_messages=13),
    observed=OBSERVED,
)


ANSWERS = {("/v1/completions", 200): 5, ("/v1/completions", 429): 2, ("other", 404): 1}


def scrape(stats: m.Stats) -> Samples:
    """Samples by name (less our prefix) and labels; none may come twice."""
    samples: Samples = {}
    for family in text_string_to_metric_families(render(stats, ANSWERS).decode()):
        assert family.documentation
        assert family.type in ("gauge", "counter", "histogram")
        for sample in family.samples:
            assert sample.name.startswith(PREFIX)
            key = (sample.name.removeprefix(PREFIX), frozenset(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


@pytest.fixture(scope="module")
def samples() -> Samples:
    return scrape(STATS)


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def values(samples: Samples, name: str, label: str) -> dict[str, float]:
    """Of all samples of a name with this one label."""
    return {dict(labels)[label]: value for (sample, labels), value in samples.items() if sample == name}


def test_requests(samples: Samples) -> None:
    assert value(samples, "num_requests_running") == 4
    assert value(samples, "num_requests_waiting") == 4
    by_state = {"queued": 2, "reserving": 1, "prefill": 1, "decode": 2, "moving": 1, "preempted": 1}
    assert values(samples, "num_requests", "state") == by_state
    assert values(samples, "request_success_total", "finished_reason") == OBSERVED.finished
    assert values(samples, "requests_refused_total", "reason") == OBSERVED.refused
    assert value(samples, "prompt_tokens_total") == 1_000_000
    assert value(samples, "generation_tokens_total") == 77
    assert value(samples, "prefix_cache_queries_total") == 900_000
    assert value(samples, "prefix_cache_hits_total") == 300_000
    assert value(samples, "num_preemptions_total") == 7


def test_buckets_are_cumulative(samples: Samples) -> None:
    for name, made in (
        ("time_to_first_token_seconds", OBSERVED.ttft_s),
        ("request_time_per_output_token_seconds", OBSERVED.tpot_s),
        ("e2e_request_latency_seconds", OBSERVED.e2e_s),
        ("request_queue_time_seconds", OBSERVED.queue_s),
    ):
        buckets = {float(le): count for le, count in values(samples, f"{name}_bucket", "le").items()}
        assert list(buckets) == [*made.bounds, math.inf]
        assert list(buckets.values()) == [sum(made.counts[: i + 1]) for i in range(len(made.counts))]
        assert value(samples, f"{name}_count") == buckets[math.inf] == made.count
        assert value(samples, f"{name}_sum") == pytest.approx(made.total)
    queue = {float(le): count for le, count in values(samples, "request_queue_time_seconds_bucket", "le").items()}
    assert [queue[bound] for bound in (0.001, 0.1, 0.3, 1920.0, 7680.0, math.inf)] == [1, 1, 2, 2, 3, 4]


def test_memory_and_cells(samples: Samples) -> None:
    first, second = {"cell": "main", "rank": "0"}, {"cell": "main", "rank": "1"}
    assert value(samples, "kv_cache_usage_perc", **first) == 0.75
    assert value(samples, "kv_cache_usage_perc", **second) == 0
    kinds = {"used": 750, "free": 250, "total": 1000, "lent": 0, "borrowed": 100}
    assert {kind: value(samples, "kv_tokens", kind=kind, **first) for kind in kinds} == kinds
    assert value(samples, "kv_tokens", kind="lent", **second) == 100
    assert value(samples, "cell_info", cell="main", model=AWKWARD, size="2", epoch="3", state="ready") == 1


def test_work(samples: Samples) -> None:
    for name in (
        *("steps", "rows", "rows_dispatched", "split_steps", "tokens_prefilled", "tokens_generated", "home_moves"),
        *("blocks_copied", "query_bytes", "partial_bytes", "kv_bytes"),
    ):
        for rank, counters in enumerate((BUSY, IDLE)):
            assert value(samples, f"{name}_total", cell="main", rank=str(rank)) == getattr(counters, name)
    parts = {"exchange": 1.0, "attention": 2.5, "rest": 1.5}
    told = {part: value(samples, "step_seconds_total", cell="main", rank="0", part=part) for part in parts}
    assert told == parts
    assert sum(told.values()) * 1e6 == BUSY.step_us
    assert value(samples, "notice_wait_seconds_total", cell="main", rank="0") == 0.25


def test_what_steps_cost(samples: Samples) -> None:
    parts = {"step": 5e-3, "row": 40e-6, "attended": 3e-9, "moved": 2e-6, "exchange": 1e-3}
    told = {part: value(samples, "step_cost_seconds", cell="main", lane="prefill", part=part) for part in parts}
    assert told == pytest.approx(parts)
    assert values(samples, "step_prediction_error_ratio", "lane") == {"prefill": 0.125}, "of decodes none is known"
    assert values(samples, "step_samples_total", "lane") == {"prefill": 7, "decode": 0}
    assert values(samples, "step_slowness_ratio", "rank") == {"0": 1, "1": 2.5}


def test_the_gmanagers_own_dropped_messages(samples: Samples) -> None:
    dropped = {rank: value(samples, "dropped_messages_total", cell="main", rank=rank) for rank in ("0", "1")}
    assert dropped == {"0": 1, "1": 2}
    assert value(samples, "dropped_messages_total", cell="", rank="") == 10


def test_a_service_with_no_instances_has_its_series() -> None:
    """A rate over a series that appears with its first event misses that event."""
    before = scrape(serving().cluster.stats())
    driver = serving(8)
    running(driver, "r", max_tokens=1)
    driver.say(peer(0), outputs(1, 0, [9], finish_reason="length", held=[]))
    after = scrape(driver.cluster.stats())
    new = {name for name, labels in after.keys() - before.keys() if "cell" not in dict(labels)}
    assert not new
    assert value(before, "request_success_total", finished_reason="length") == 0
    assert value(after, "request_success_total", finished_reason="length") == 1
    assert value(after, "time_to_first_token_seconds_count") == 1


@given(st.builds(m.Counters, **dict.fromkeys(m.Counters.__struct_fields__, st.integers(-(2**63), 2**64 - 1))))
def test_an_instance_that_has_gone_mad_can_be_scraped(counters: m.Counters) -> None:
    stats = m.Stats(epoch=1, cells=[], instances=[instance(0, 5, counters)], requests={}, counters=BUSY, observed=OBSERVED)
    assert value(scrape(stats), "step_seconds_total", cell="main", rank="0", part="rest") >= 0


def test_content_type() -> None:
    assert CONTENT_TYPE.startswith("text/plain; version=")


def test_answers_of_the_gateway(samples: Samples) -> None:
    for (path, status), count in ANSWERS.items():
        assert value(samples, "http_requests_total", path=path, status=str(status)) == count


def test_docs_name_all_of_them_and_no_others(samples: Samples) -> None:
    section = DOCS.read_text().partition("## Metrics")[2].partition("## Logs")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named == {re.sub(r"_(bucket|sum|count)$", "", name) for name, _ in samples}
