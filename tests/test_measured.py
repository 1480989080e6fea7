"""What real instances and a gManager measure of real requests."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gmanager import AsyncClient, Counters, LanePerformance, SamplingParams, Stats
from tests.support.exactness import NEW, ask, prompt
from tests.support.farm import Farm, Setup
from tests.support.service import serve
from tests.support.tiny import make_model

pytestmark = pytest.mark.asyncio

BEATS_S = 5
"""Counters come with the instances' next beats, once a second."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


async def until(client: AsyncClient, is_so: Callable[[Stats], bool]) -> Stats:
    async with asyncio.timeout(BEATS_S):
        while not is_so(stats := await client.stats()):
            await asyncio.sleep(0.05)
    return stats


async def test_two_instances_that_share_requests(farm: Farm, llama: Path) -> None:
    lengths = (200, 90, 33)
    prompts = [prompt(llama, length, seed=i) for i, length in enumerate(lengths)]
    async with serve(farm, 2, Setup(model=llama)) as service:
        client = service.client
        began = time.monotonic()
        for ids in prompts:
            await ask(client, llama, ids, spread="all")
        elapsed = time.monotonic() - began
        generated = NEW * len(prompts)
        computed = sum(lengths)  # by both: each has told of its part
        stats = await until(
            client, lambda s: (s.counters.tokens_generated, s.counters.tokens_prefilled) == (generated, computed)
        )

    observed = stats.observed
    of_each = (observed.queue_s, observed.ttft_s, observed.tpot_s, observed.e2e_s)
    assert [histogram.count for histogram in of_each] == [len(prompts)] * 4
    assert 0 < observed.queue_s.total < observed.ttft_s.total < observed.e2e_s.total < elapsed
    assert observed.tpot_s.total * (NEW - 1) == pytest.approx(observed.e2e_s.total - observed.ttft_s.total)
    assert observed.finished == {"stop": 0, "length": len(prompts), "abort": 0, "error": 0}
    assert (observed.prompt_tokens, observed.generated_tokens) == (sum(lengths), generated)

    for instance in stats.instances:
        counters = instance.counters
        assert counters.step_us > counters.attention_us > 0
        assert counters.exchange_us > 0
        assert counters.exchange_us + counters.attention_us < counters.step_us < elapsed * 1e6
        assert 0 < counters.decode_us < counters.step_us
        assert counters.notice_us > 0
        assert counters.rows_dispatched > 0
        assert counters.query_bytes % counters.rows_dispatched == 0, "as many bytes for each, in all layers"


async def test_an_instance_alone_waits_for_nobody(farm: Farm, llama: Path) -> None:
    async with serve(farm, 1, Setup(model=llama)) as service:
        await ask(service.client, llama, prompt(llama, 100))
        stats = await until(service.client, lambda s: s.counters.tokens_generated == NEW)
        counters: Counters = stats.counters
    assert counters.step_us > counters.attention_us > 0
    assert counters.exchange_us == counters.rows_dispatched == counters.query_bytes == 0


async def test_steps_are_predicted(farm: Farm, llama: Path) -> None:
    """Of both lanes, with and without rows that travel."""
    async with serve(farm, 2, Setup(model=llama)) as service:
        client = service.client
        stats = await until(client, lambda s: all(lane.samples for lane in lanes_of(s)))
        assert stats.counters.steps == 0, "what was measured before the first request is no step"
        assert all(instance.counters.step_us == 0 for instance in stats.instances)
        for turn in range(10):  # predicted are those that come after a fit
            measured = [lane.samples for lane in lanes_of(stats)]
            for i, spread in enumerate(("all", 1, "all")):
                await ask(client, llama, prompt(llama, 60 + 70 * i, seed=3 * turn + i), spread=spread)
            stats = await until(client, has_more_than(measured))
            if turn and all(lane.error is not None for lane in lanes_of(stats)):
                break
    for lane in lanes_of(stats):
        assert lane.error is not None
        assert 0 <= lane.error < 10
        assert lane.step_us + lane.row_us > 0
        assert lane.beside >= 1
    assert all(1 / 16 <= instance.slowness <= 16 for instance in stats.instances)


def lanes_of(stats: Stats) -> list[LanePerformance]:
    performance = stats.cells[0].performance
    assert performance is not None
    return [performance.prefill, performance.decode]


def has_more_than(samples: list[int]) -> Callable[[Stats], bool]:
    """Of each lane."""
    return lambda stats: all(lane.samples > before for lane, before in zip(lanes_of(stats), samples, strict=True))


async def test_a_stop_string_ends_the_count(farm: Farm, llama: Path) -> None:
    """What runs over the stop string reaches nobody and is not counted."""
    async with serve(farm, 1, Setup(model=llama)) as service:
        ids = prompt(llama, 20, new=30)
        text = ""
        async for chunk in service.client.generate(ids, SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)):
            text += chunk.text
        before = (await service.client.stats()).observed
        stopping = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, stop=text[5:7])
        got = [chunk async for chunk in service.client.generate(ids, stopping)]
        observed = (await service.client.stats()).observed
    assert got[-1].finish_reason == "stop"
    assert observed.finished["stop"] == 1
    assert observed.generated_tokens - before.generated_tokens == sum(len(chunk.token_ids) for chunk in got) < 30
