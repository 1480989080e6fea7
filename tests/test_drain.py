"""Instances that are emptied while they serve. Real processes, on loopback only."""

import asyncio
import signal
import time
from pathlib import Path

import pytest

from gmanager import CallFailed
from gmanager.cluster.moves import MAX_COPIES
from gmanager.config import GManagerConfig
from tests.support.farm import DEVICE, Farm, Setup
from tests.support.processes import Processes, client_of, until_ready
from tests.support.service import at_rest, serve
from tests.support.tiny import make_long_model
from tests.test_lifecycle import here, until
from tests.test_membership import Stream, cell_of, text

LOAD = 8
NEW = 250


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that takes long texts."""
    return make_long_model(tmp_path_factory.mktemp("models"))


async def test_a_drain_under_load_changes_no_token(started: Processes, model: Path) -> None:
    """One of three that eight requests are spread over: their KV there is moved, and nothing is prefilled again."""
    texts = [text(model, 150 + 40 * i, NEW, i) for i in range(LOAD)]
    async with here(GManagerConfig(bind="tcp://127.0.0.1:*")) as server:
        instances = cell_of(started, 3, server.address, model)
        await until_ready(server.address)
        async with client_of(server.address) as client:
            streams = [Stream(client, f"s{i}", ids, NEW, "all") for i, (ids, _) in enumerate(texts)]
            for stream in streams:
                await stream.reach(10)
            before = await until(client, lambda s: all(1 in s.requests[f"s{i}"].kv_tokens for i in range(LOAD)))
            moment = time.monotonic()
            await client.drain(1)
            took = time.monotonic() - moment
            assert not any(stream.task.done() for stream in streams), "there is no load any more"
            assert await instances[1].exit_code() == 0
            for stream, (_, expected) in zip(streams, texts, strict=True):
                await stream.is_right(expected)
            pauses = [stream.pause_after(moment) for stream in streams]
            print(f"drained in {took:.2f} s; longest pause {max(pauses):.2f} s")
            assert max(pauses) < (3 if DEVICE == "cpu" else 10)
            stats = await until(client, lambda s: len(s.instances) == 2 and s.cells[0].state == "ready")
            assert [i.rank for i in stats.instances] == [0, 2]
            moved = sum(before.requests[f"s{i}"].kv_tokens[1] for i in range(LOAD))
            assert "event=drained" in instances[1].text
            stats = await until(client, lambda s: s.counters.blocks_copied >= moved // 16)
            again = stats.counters.tokens_prefilled - sum(len(ids) for ids, _ in texts)
            print(
                f"{moved} tokens lay there, {stats.counters.blocks_copied} blocks were copied, {again} tokens prefilled again"
            )
            assert again <= 4 * LOAD, "at most the newest tokens, whose rows were under way"
            with pytest.raises(CallFailed, match=r"there is no instance 1; cell 'main' has 0, 2"):
                await client.drain(1)
            await at_rest(client)


@pytest.mark.parametrize("garbled", [1, 10**6], ids=["once", "always"])
async def test_blocks_that_arrive_otherwise_are_not_read(farm: Farm, model: Path, garbled: int) -> None:
    """A bit flips on the way. Once: that copy is found to be wrong, and the next one is right. Always: all three are, and what
    lay there is computed again."""
    ids, expected = text(model, 300, NEW)
    async with serve(farm, 3, Setup(model=model, kv_tokens=2048)) as service:
        client = service.client
        stream = Stream(client, "s", ids, NEW, "all")
        await stream.reach(10)
        stats = await until(client, lambda s: len(s.requests["s"].kv_tokens) == 3 and s.counters.tokens_prefilled >= 300)
        seen = stats.requests["s"]
        assert seen.home is not None
        leaves = (seen.home + 1) % 3
        await farm.workers[leaves].ask("garble", garbled)
        try:
            await client.drain(leaves)
            assert not stream.task.done(), "it was drained only when all was over"
            await stream.is_right(expected)
        finally:
            await farm.workers[leaves].ask("garble", 0)
        failed = 1 if garbled == 1 else MAX_COPIES
        stats = await until(client, lambda s: s.counters.tokens_generated >= NEW - 4)
        assert stats.counters.moves_failed == failed
        again = stats.counters.tokens_prefilled - 300
        assert again <= 4 if failed < MAX_COPIES else seen.kv_tokens[leaves] <= again <= seen.kv_tokens[leaves] + 4


async def test_what_has_no_room_elsewhere_is_computed_again(started: Processes, model: Path) -> None:
    """Of 38 blocks on each of the others 7 are free, and the run that is to go has 10."""
    texts = [text(model, length, 100, length) for length in (300, 301, 480)]
    async with here(GManagerConfig(bind="tcp://127.0.0.1:*")) as server:
        instances = cell_of(started, 3, server.address, model, "--kv-tokens", "608")
        await until_ready(server.address)
        async with client_of(server.address) as client:
            streams = []
            for name, (ids, _) in zip("abc", texts, strict=True):
                streams.append(Stream(client, name, ids, 100, "all" if name == "c" else 1))
                await streams[-1].reach(3)
            requests = (await client.stats()).requests
            (third,) = {0, 1, 2} - {requests["a"].home, requests["b"].home}
            await client.drain(third)
            assert await instances[third].exit_code() == 0
            for stream, (_, expected) in zip(streams, texts, strict=True):
                await stream.is_right(expected)
            # of the last beats, which the one that left didn't live to send
            least = 300 + 301 + 2 * 160 + 160
            await until(client, lambda s: sum(i.counters.tokens_prefilled for i in s.instances) >= least)
            await at_rest(client)


async def test_sigterm_empties_an_instance_and_the_last_one_leaves_at_once(started: Processes, model: Path) -> None:
    ids, expected = text(model, 400, 200)
    async with here(GManagerConfig(bind="tcp://127.0.0.1:*")) as server:
        instances = cell_of(started, 2, server.address, model)
        await until_ready(server.address)
        async with client_of(server.address) as client:
            stream = Stream(client, "s", ids, 200, "all")
            await stream.reach(10)
            for _ in range(2):  # as torchrun does
                instances[1].signal(signal.SIGTERM)
                await asyncio.sleep(0.05)
            assert await instances[1].exit_code(25) == 0
            await stream.is_right(expected)
            stats = await until(client, lambda s: len(s.instances) == 1 and s.cells[0].state == "ready")
            assert 400 <= stats.counters.tokens_prefilled <= 404
            assert stats.counters.blocks_copied > 0
            with pytest.raises(CallFailed, match="instance 0 is the last of cell 'main'"):
                await client.drain(0)
            await at_rest(client)
        moment = time.monotonic()
        instances[0].signal(signal.SIGTERM)
        assert await instances[0].exit_code() == 0
        assert time.monotonic() - moment < 3


async def test_one_that_can_not_be_emptied_ends_when_its_grace_time_is_over(started: Processes, model: Path) -> None:
    """The other one stands still, and so takes nothing over: what is lost then is computed again."""
    ids, expected = text(model, 300, 200)
    async with here(GManagerConfig(bind="tcp://127.0.0.1:*", instance_lease_s=60)) as server:
        instances = cell_of(started, 2, server.address, model, "--grace-s", "1")
        await until_ready(server.address)
        async with client_of(server.address) as client:
            stream = Stream(client, "s", ids, 200, "all")
            await stream.reach(10)
            instances[0].signal(signal.SIGSTOP)
            try:
                instances[1].signal(signal.SIGTERM)
                assert await instances[1].exit_code() == 0
            finally:
                instances[0].signal(signal.SIGCONT)
            await instances[1].says("asks to be drained")
            assert "event=drained" not in instances[1].text
            await stream.is_right(expected)
            await at_rest(client)
