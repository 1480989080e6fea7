"""What is counted of requests: buckets for any values, and literal events through a cluster with a clock."""

from bisect import bisect_left
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.cluster.events import Encoded, PeerWasLost, Send, StopFound
from gmanager.observed import REQUEST_BOUNDS_S, TPOT_BOUNDS_S, TTFT_BOUNDS_S, Buckets
from gmanager.wire import messages as m
from gmanager.wire.codec import Decoder, encode
from tests.gmanager.cluster_support import CLIENT, Driver, beat, outputs, peer, running, serving, submit

seconds = st.floats(min_value=0, max_value=1e5)
some_bounds = st.lists(seconds, min_size=1, max_size=8, unique=True).map(sorted)


def seen(driver: Driver) -> m.Observations:
    """What a client is told, over the wire."""
    (answer,) = driver.say(CLIENT, m.GetStats(call=1))
    assert isinstance(answer, Send)
    reply = Decoder[m.ToClient](m.ToClient).decode(encode(answer.message))
    assert isinstance(reply, m.StatsReply)
    return reply.stats.observed


def values(histogram: m.Histogram) -> tuple[int, float]:
    return histogram.count, round(histogram.total, 6)


def bucket(histogram: m.Histogram, value: float) -> int:
    return histogram.counts[bisect_left(histogram.bounds, value)]


@given(some_bounds, st.lists(seconds))
def test_every_value_is_in_one_bucket(bounds: list[float], values: list[float]) -> None:
    buckets = Buckets(bounds)
    for value in values:
        buckets.add(value)
    histogram = buckets.histogram()
    assert histogram.count == len(values)
    assert histogram.total == pytest.approx(sum(values))
    for i, bound in enumerate(bounds):
        assert sum(histogram.counts[: i + 1]) == sum(value <= bound for value in values), "cumulated, as Prometheus has it"


@pytest.mark.parametrize("bounds", [TTFT_BOUNDS_S, TPOT_BOUNDS_S, REQUEST_BOUNDS_S])
def test_bounds_ascend(bounds: tuple[float, ...]) -> None:
    assert all(low < high for low, high in pairwise(bounds))
    assert Buckets(bounds).histogram().counts == [0] * (len(bounds) + 1)


def test_a_long_context_has_its_bucket() -> None:
    """A prompt of millions of tokens is prefilled in most of an hour."""
    assert max(REQUEST_BOUNDS_S) > 3600
    assert max(TTFT_BOUNDS_S) > 2400


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"bounds": [1.0, 2.0], "counts": [0, 0], "total": 0.0}, "2 bounds have 3 counts, got 2"),
        ({"bounds": [2.0, 2.0], "counts": [0, 0, 0], "total": 0.0}, r"bounds must ascend, got \[2.0, 2.0\]"),
        ({"bounds": [1.0], "counts": [0, -1], "total": 0.0}, "counts must not be negative, got -1"),
    ],
)
def test_a_histogram_of_parts_that_dont_belong_together(parts: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        m.Histogram(**parts)


def test_one_request() -> None:
    driver = Driver()
    driver.say(CLIENT, m.Hello(protocol=m.PROTOCOL))
    driver.say(CLIENT, submit("r", 8, max_tokens=4))
    driver.wait(2, CLIENT)
    driver.grant(driver.ready_cell(8))
    assert values(seen(driver).queue_s) == (1, 2.0)
    assert seen(driver).prompt_tokens == 8
    driver.wait(3, CLIENT, peer(0))
    assert values(seen(driver).ttft_s) == (0, 0.0)
    driver.say(peer(0), outputs(1, 0, [9]))
    driver.now += 0.5
    driver.say(peer(0), outputs(1, 1, [9, 9]))
    assert seen(driver).generated_tokens == 3
    assert values(seen(driver).tpot_s) == values(seen(driver).e2e_s) == (0, 0.0)
    driver.now += 1
    driver.say(peer(0), outputs(1, 3, [9], finish_reason="length", held=[]))
    observed = seen(driver)
    assert values(observed.queue_s) == (1, 2.0)
    assert values(observed.ttft_s) == (1, 5.0)
    assert values(observed.tpot_s) == (1, 0.5), "1.5 s for the three tokens after the first"
    assert values(observed.e2e_s) == (1, 6.5)
    assert bucket(observed.queue_s, 2.0) == bucket(observed.ttft_s, 5.0) == bucket(observed.e2e_s, 6.5) == 1
    assert observed.finished == {"stop": 0, "length": 1, "abort": 0, "error": 0}
    assert (observed.prompt_tokens, observed.generated_tokens) == (8, 4)
    assert set(observed.refused.values()) == {0}


def test_one_token_has_no_time_per_token() -> None:
    driver = serving(8)
    running(driver, "r", max_tokens=1)
    driver.say(peer(0), outputs(1, 0, [9], finish_reason="length", held=[]))
    observed = seen(driver)
    assert (observed.ttft_s.count, observed.tpot_s.count, observed.e2e_s.count) == (1, 0, 1)


def test_ends_of_all_kinds() -> None:
    driver = serving(16)
    running(driver, "aborted", generated=2)
    running(driver, "stopped", generated=1)
    running(driver, "broken")
    driver.say(CLIENT, m.Abort(call=1, request_id="aborted"))
    driver.handle(StopFound(2, 1, driver.now))
    driver.handle(PeerWasLost(peer(0), "gone", driver.now))
    observed = seen(driver)
    assert observed.finished == {"stop": 1, "length": 0, "abort": 1, "error": 1}
    assert observed.e2e_s.count == 3
    assert (observed.ttft_s.count, observed.tpot_s.count) == (2, 1)


@pytest.mark.parametrize("ended", [False, True])
def test_tokens_after_a_stop_string_are_not_counted(ended: bool) -> None:
    """Whether the request still runs when the string is found, or its last token held it."""
    driver = serving(8)
    running(driver, "r", generated=1)
    end: dict[str, Any] = {"finish_reason": "length", "held": []} if ended else {}
    driver.say(peer(0), outputs(1, 1, [9, 9, 9], **end))
    driver.handle(StopFound(1, 2, driver.now))
    observed = seen(driver)
    assert observed.generated_tokens == 2
    assert observed.finished == {"stop": 1, "length": 0, "abort": 0, "error": 0}
    assert (observed.ttft_s.count, observed.e2e_s.count) == (1, 1)


def test_refusals_by_reason() -> None:
    driver = serving(8, max_queue=1)
    driver.say(CLIENT, submit("long", 2000))
    driver.say(CLIENT, submit("large", 800))
    driver.say(CLIENT, submit("which", model="other"))
    driver.say(CLIENT, submit("wrong", prompt=[9999]))
    driver.say(CLIENT, m.Submit(request_id="empty", params=m.SamplingParams(), text="x"))
    driver.handle(Encoded(4, driver.now, error="no text"))
    running(driver, "runs", 20, max_tokens=1)
    driver.say(CLIENT, submit("waits", 16, max_tokens=1))
    driver.say(CLIENT, submit("one too many", 16, max_tokens=1))
    observed = seen(driver)
    none = dict.fromkeys(("not_ready", "unknown", "overloaded", "unreachable"), 0)
    assert observed.refused == none | {"invalid": 2, "too_long": 1, "never": 1, "model": 1, "full": 1}
    assert observed.queue_s.count == 1
    assert observed.e2e_s.count == sum(observed.finished.values()) == 0


def test_nobody_ready() -> None:
    driver = Driver()
    driver.say(CLIENT, m.Hello(protocol=m.PROTOCOL))
    driver.say(CLIENT, submit("r", wait_for_cell=False))
    assert seen(driver).refused["not_ready"] == 1


def test_a_preempted_request_counts_once() -> None:
    driver = serving(8)
    running(driver, "old", 12, generated=1)
    running(driver, "young", 12, generated=2)
    driver.now += 1
    driver.say(peer(0), m.NeedBlock(epoch=1, seq=1))
    driver.now += 1
    driver.free[peer(0)] = 4
    driver.say(peer(0), m.Released(epoch=1, seq=2, generated=2), beat(4, {2: 0}))
    driver.say(peer(0), outputs(1, 1, [9], finish_reason="length", held=[]))
    driver.free[peer(0)] = 8
    again = driver.say(peer(0), m.Released(epoch=1, seq=1, generated=2), beat(8, {1: 0}))
    driver.grant(again)
    assert driver.cluster.stats().requests["young"].preemptions == 1
    assert driver.cluster.stats().requests["young"].state == "prefill"
    driver.now += 1
    driver.say(peer(0), outputs(3, 0, [9], finish_reason="length", held=[]))
    observed = seen(driver)
    assert (observed.queue_s.count, observed.ttft_s.count, observed.e2e_s.count) == (2, 2, 2)
    assert (observed.prompt_tokens, observed.generated_tokens) == (24, 5)
    assert values(observed.tpot_s) == (2, 2.0 + 1.5)
