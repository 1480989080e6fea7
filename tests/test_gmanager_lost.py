"""A gManager that is killed, and another at the same address: the instances go on. Real processes, on loopback only."""

import asyncio
import json
import re
import resource
import signal
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from gmanager import AsyncClient, RequestRefused, SamplingParams
from tests.support.exactness import LOGPROB_TOLERANCE
from tests.support.farm import DEVICE
from tests.support.processes import Processes, Started, client_of, free_port, until_ready
from tests.support.service import at_rest
from tests.support.tiny import make_long_model
from tests.test_lifecycle import answers, run, two, until, until_decoding
from tests.test_membership import Stream, text

NEW = 600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_long_model(tmp_path_factory.mktemp("models"))


async def test_without_a_journal_the_same_instances_serve_the_next(started: Processes, model: Path) -> None:
    """What ran is lost with who knew of it, and so is its KV; nothing is loaded again."""
    address = f"tcp://127.0.0.1:{free_port()}"
    gmanager = started.gmanager(bind=address)
    instances = two(started, address, model)
    await until_ready(address)
    async with client_of(address) as client:
        running = asyncio.create_task(run(client, "r", 200, spread="all"))
        await until_decoding(client, "r")
        gmanager.signal(signal.SIGKILL)
        await asyncio.gather(running, return_exceptions=True)
    started.gmanager(bind=address)
    await until_ready(address)
    for instance in instances:
        await instance.says("gManager lost")
        assert instance.poll() is None
    async with client_of(address) as client:
        await answers(client, model)
        stats = await until(client, lambda s: len(s.instances) == 2 and s.cells[0].epoch > 1)
        assert sorted(i.rank for i in stats.instances) == [0, 1]
        await at_rest(client)


@pytest.mark.parametrize("journal", [False, True])
async def test_a_gmanager_that_stands_still_goes_on(started: Processes, model: Path, tmp_path: Path, journal: bool) -> None:
    """For so long that the instances take it for gone: they hang up, and come again with what they have."""
    texts = [text(model, 40 + 3 * seed, NEW, seed) for seed in range(4)]
    address = f"tcp://127.0.0.1:{free_port()}"
    more = ("--journal", str(tmp_path / "journal")) if journal else ()
    gmanager = started.gmanager(*more, bind=address)
    instances = two(started, address, model)
    await until_ready(address)
    async with client_of(address) as client:
        streams = [Stream(client, f"s{i}", ids, NEW, "all" if i % 2 else 1) for i, (ids, _) in enumerate(texts)]
        for stream in streams:
            await stream.reach(10)
        gmanager.signal(signal.SIGSTOP)
        try:
            for instance in instances:
                await instance.says("gManager lost")
        finally:
            gmanager.signal(signal.SIGCONT)
        for stream, (_, expected) in zip(streams, texts, strict=True):
            await stream.is_right(expected)
        stats = await client.stats()
        assert stats.counters.tokens_prefilled <= sum(len(ids) for ids, _ in texts) + 8, "their KV was kept"
        assert [instance.poll() for instance in instances] == [None, None]
        await at_rest(client)


async def _lose_again_and_again(started: Processes, model: Path, journal: Path, *, streams: int, new: int, times: int) -> None:
    texts = [text(model, 40 + 3 * seed, new, seed) for seed in range(8)]
    address = f"tcp://127.0.0.1:{free_port()}"
    gmanager = started.gmanager("--journal", str(journal), bind=address)
    room = str(2 * streams * (64 + new))
    instances = two(started, address, model, "--kv-tokens", room)
    await until_ready(address)
    async with client_of(address) as client:
        running = [Stream(client, f"s{i}", texts[i % len(texts)][0], new, "all" if i % 3 else 1) for i in range(streams)]
        for time in range(times):
            await running[0].reach((time + 1) * new // (times + 1))
            assert not running[0].task.done(), "it is to be killed in mid-stream"
            gmanager.signal(signal.SIGKILL)
            await gmanager.exit_code()
            gmanager = started.gmanager("--journal", str(journal), bind=address)
        for i, stream in enumerate(running):
            await stream.is_right(texts[i % len(texts)][1])
        prompts = sum(len(texts[i % len(texts)][0]) for i in range(streams))
        different = sum(len(ids) for ids, _ in texts[:streams])  # those that have the same may share it
        stats = await until(client, lambda s: s.counters.tokens_prefilled >= different)
        # each admission has one row anew; a token that was on its way may cost another
        assert stats.counters.tokens_prefilled <= prompts + 3 * streams * times
        await at_rest(client)
    assert [instance.poll() for instance in instances] == [None, None], "the same processes"


async def test_streams_go_on_with_the_next_gmanager(started: Processes, model: Path, tmp_path: Path) -> None:
    """Nothing lost, doubled or reordered, with transformers' tokens; KV is kept."""
    await _lose_again_and_again(started, model, tmp_path / "journal", streams=24, new=160 if DEVICE == "cpu" else 640, times=2)


@pytest.mark.slow
async def test_a_hundred_streams_and_ten_gmanagers(started: Processes, model: Path, tmp_path: Path) -> None:
    await _lose_again_and_again(started, model, tmp_path / "journal", streams=100, new=400, times=10)


class Journalled:
    """gManagers with one journal, at one address, one after the other."""

    def __init__(self, started: Processes, journal: Path) -> None:
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self._started = started
        self._journal = journal
        self.process = self._start()

    def _start(self) -> Started:
        return self._started.gmanager("--journal", str(self._journal), bind=self.address)

    async def lose(self) -> None:
        """kill -9, and the next one."""
        self.process.signal(signal.SIGKILL)
        await self.process.exit_code()
        self.process = self._start()

    def fill_disk(self) -> None:
        """The journal's log can't grow any more, and a transaction needs that. Not for those that follow."""
        size = self._journal.with_name(f"{self._journal.name}-wal").stat().st_size
        self._limit(size)

    def clear_disk(self) -> None:
        self._limit(resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)[1])

    def _limit(self, size: int) -> None:
        hard = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, hard))


async def test_an_http_stream_goes_on_in_the_same_response(started: Processes, model: Path, tmp_path: Path) -> None:
    """Through a gateway that lives on: each token once."""
    ids, expected = text(model, 100, 400)
    gmanager = Journalled(started, tmp_path / "journal")
    instances = two(started, gmanager.address, model)
    door = started.python("gateway", "-m", "gmanager.gateway", "--gmanager", gmanager.address, "--bind", "127.0.0.1:0")
    url = (await door.says(r"(http://127\S+)"))[1]
    await door.says("event=connected")
    await until_ready(gmanager.address)
    asked = {"model": str(model), "prompt": ids, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    asked |= {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True, "logprobs": 1}
    events: list[dict[str, Any]] = []
    tokens: list[int] = []
    logprobs: list[float] = []
    was_killed = False
    async with (
        httpx.AsyncClient(base_url=url, timeout=60) as http,
        http.stream("POST", "/v1/completions", json=asked) as answer,
    ):
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            events.append(json.loads(line.removeprefix("data: ")))
            for choice in events[-1]["choices"]:
                tokens += choice["token_ids"]
                if choice["logprobs"]:
                    logprobs += choice["logprobs"]["token_logprobs"]
            if len(tokens) >= 50 and not was_killed:
                was_killed = True
                assert len(tokens) < 200, "it is to be killed in mid-stream"
                await gmanager.lose()
    assert tokens == expected.token_ids
    assert logprobs == pytest.approx(expected.logprobs, abs=LOGPROB_TOLERANCE)
    assert len({event["id"] for event in events}) == 1, "one response"
    assert events[-1]["usage"]["completion_tokens"] == 400
    assert [instance.poll() for instance in instances] == [None, None]
    async with client_of(gmanager.address) as client:
        await at_rest(client)


async def refused(client: AsyncClient) -> str:
    """Why a new request is refused, which must be for now."""
    with pytest.raises(RequestRefused) as refusal:
        await anext(client.generate([1, 2, 3], SamplingParams(max_tokens=1)))
    assert refusal.value.reason == "not_ready"
    return str(refusal.value)


FULL = r"no new requests are taken: the journal can't be written \(.*disk.*\)"


async def test_with_a_full_disk_what_runs_goes_on_and_what_is_new_is_refused(
    started: Processes, model: Path, tmp_path: Path
) -> None:
    """Until there is room again: then what the journal lacks is written, as the next gManager shows."""
    ids, expected = text(model, 100, 300)
    gmanager = Journalled(started, tmp_path / "journal")
    two(started, gmanager.address, model)
    await until_ready(gmanager.address)
    async with client_of(gmanager.address) as client:
        stream = Stream(client, "s", ids, 300, "all")
        await stream.reach(20)
        gmanager.fill_disk()
        await gmanager.process.says("journal can't be written: requests that run go on without it, new ones are refused")
        assert re.fullmatch(FULL, await refused(client))
        assert not stream.task.done()
        await stream.is_right(expected)
        assert re.fullmatch(FULL, await refused(client))
        gmanager.clear_disk()
        await gmanager.process.says("journal is written again")
        await Stream(client, "new", ids, 300, "all").is_right(expected)
    await gmanager.lose()
    await until_ready(gmanager.address)
    async with client_of(gmanager.address) as client:
        kept = [token async for chunk in client.attach("s") for token in chunk.token_ids]
        assert kept == expected.token_ids
        await at_rest(client)


async def test_a_gmanager_that_is_lost_while_its_disk_is_full(started: Processes, model: Path, tmp_path: Path) -> None:
    """Its client has tokens that nobody has written down: they are generated again, and come out the same."""
    ids, expected = text(model, 100, 600)
    gmanager = Journalled(started, tmp_path / "journal")
    two(started, gmanager.address, model)
    await until_ready(gmanager.address)
    async with client_of(gmanager.address) as client:
        stream = Stream(client, "s", ids, 600, "all")
        await stream.reach(20)
        gmanager.fill_disk()
        await gmanager.process.says("journal can't be written")
        await stream.reach(len(stream.tokens) + 100)
        assert not stream.task.done(), "it is to be killed in mid-stream"
        await gmanager.lose()
        await stream.is_right(expected)
        await at_rest(client)
