"""A cell that changes while it serves: instances that are lost, and that come. Real processes, on loopback only."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count, pairwise
from pathlib import Path
from typing import Literal

import pytest

from gmanager import AsyncClient, SamplingParams, Stats
from gmanager.config import GManagerConfig
from gmanager.wire.channel import ZmqTransport
from instance.config import InstanceConfig, Launch
from instance.errors import InstanceError
from instance.start import load, make_instance
from tests.support.exactness import LOGPROB_TOLERANCE, clear_prompt
from tests.support.farm import DEVICE
from tests.support.processes import Processes, Started, address_of, client_of, until_ready
from tests.support.service import at_rest
from tests.support.tiny import Expected, make_long_model, make_model, reference
from tests.test_lifecycle import flags, here, until

LONG = 4096
NEW = 250
LOAD = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that takes long texts."""
    return make_long_model(tmp_path_factory.mktemp("models"))


def text(model: Path, length: int, new: int, seed: int = 0) -> tuple[list[int], Expected]:
    """A prompt, and what transformers alone says after it. To be made before a gManager runs in this process."""
    ids = clear_prompt(
        model, lambda attempt: [(i * i * 31 + i * 17 + seed * 7919 + attempt * 101 + length) % 256 for i in range(length)], new
    )
    return ids, reference(model, tuple(ids), new)


class Stream:
    """A request that runs, and when its tokens came."""

    def __init__(self, client: AsyncClient, name: str, ids: list[int], new: int, spread: Literal["all", "auto", 1]) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.came: list[float] = []
        self.moved = asyncio.Event()
        self.task = asyncio.create_task(self._run(client, name, ids, new, spread))

    async def _run(self, client: AsyncClient, name: str, ids: list[int], new: int, spread: Literal["all", "auto", 1]) -> None:
        params = SamplingParams(max_tokens=new, temperature=0, logprobs=0, ignore_eos=True)
        async for chunk in client.generate(ids, params, request_id=name, spread=spread):
            assert chunk.index == len(self.tokens)
            self.tokens += chunk.token_ids
            self.logprobs += [p.logprob for p in chunk.logprobs or []]
            self.came += [time.monotonic()] * len(chunk.token_ids)

    async def reach(self, count: int) -> None:
        async with asyncio.timeout(60):
            while len(self.tokens) < count and not self.task.done():
                await asyncio.sleep(0.002)

    async def is_right(self, expected: Expected) -> None:
        async with asyncio.timeout(60):
            await self.task
        assert self.tokens == expected.token_ids
        assert self.logprobs == pytest.approx(expected.logprobs, abs=LOGPROB_TOLERANCE)

    def pause_after(self, moment: float) -> float:
        """The longest time between two tokens since then, seconds."""
        since = [at for at in self.came if at > moment]
        return max(b - a for a, b in pairwise([moment, *since]))


@asynccontextmanager
async def streams_meanwhile(client: AsyncClient, ids: list[int], expected: Expected) -> AsyncIterator[None]:
    """Streams over all instances, one after the other and each of them right: one is under way all the time."""
    over = False

    def begun(turn: int) -> Stream:
        return Stream(client, f"meanwhile {turn}", ids, len(expected.token_ids), "all")

    async def go_on(stream: Stream) -> None:
        for turn in count(1):
            await stream.is_right(expected)
            if over:
                return
            stream = begun(turn)

    first = begun(0)
    await first.reach(5)
    going_on = asyncio.create_task(go_on(first))
    try:
        yield
    finally:
        over = True
        await going_on


def cell_of(started: Processes, size: int, address: str, model: Path, *more: str) -> list[Started]:
    return [started.instance(*flags(address, model, *more), rank=rank, world_size=size) for rank in range(size)]


async def counted(client: AsyncClient, name: str, at_least: int) -> Stats:
    """Statistics, once the instances' beats have brought that much of a counter."""
    return await until(client, lambda stats: getattr(stats.counters, name) >= at_least)


@pytest.mark.parametrize("victim", ["home", "another"])
async def test_a_loss_costs_only_what_was_lost(started: Processes, model: Path, victim: str) -> None:
    """One of three holders is killed in mid-decode: the stream goes on, right; only the lost part is computed again."""
    ids, expected = text(model, LONG, NEW)
    async with here(GManagerConfig(bind="tcp://127.0.0.1:*")) as server:
        instances = cell_of(started, 3, server.address, model, "--chunk-tokens", "256")
        await until_ready(server.address)
        async with client_of(server.address) as client:
            stream = Stream(client, "long", ids, NEW, "all")
            await stream.reach(20)
            await counted(client, "tokens_prefilled", LONG)
            before = (await until(client, lambda s: sorted(s.requests["long"].kv_tokens) == [0, 1, 2])).requests["long"]
            assert before.home is not None
            lost = before.home if victim == "home" else (before.home + 1) % 3
            instances[lost].signal(signal.SIGKILL)
            await stream.is_right(expected)
            stats = await until(client, lambda s: s.cells[0].state == "ready" and len(s.instances) == 2)
            assert sorted(i.rank for i in stats.instances) == [r for r in range(3) if r != lost]
            assert [instances[r].poll() for r in range(3) if r != lost] == [None, None], "the survivors are the same processes"
            # A home's count has rows whose tokens weren't told yet, of one step or two: nobody computes these again.
            await counted(client, "tokens_prefilled", LONG + before.kv_tokens[lost] - 2)
            await at_rest(client)  # what they told of that has all come
            again = (await client.stats()).counters.tokens_prefilled - LONG
            assert again <= 0.4 * sum(before.kv_tokens.values())


@pytest.mark.parametrize("more", [(), ("--elastic-tp", "8")], ids=["each its own rows", "shared dense layers"])
async def test_who_touched_nothing_of_it_goes_on(started: Processes, model: Path, more: tuple[str, ...]) -> None:
    """A stream that lay wholly on a survivor pauses for the change alone; one on the lost instance is computed again. So it is
    where that one was computing a part of all steps."""
    texts = [text(model, 300, 400, seed) for seed in range(3)]
    async with here(GManagerConfig(bind="tcp://127.0.0.1:*")) as server:
        instances = cell_of(started, 3, server.address, model, *more)
        await until_ready(server.address)
        async with client_of(server.address) as client:
            streams = [Stream(client, f"s{i}", ids, 400, 1) for i, (ids, _) in enumerate(texts)]
            for stream in streams:
                await stream.reach(30)
            homes = [(await client.stats()).requests[f"s{i}"].home for i in range(3)]
            assert sorted(home for home in homes if home is not None) == [0, 1, 2]
            moment = time.monotonic()
            instances[1].signal(signal.SIGKILL)
            for stream, (_, expected) in zip(streams, texts, strict=True):
                await stream.is_right(expected)
            assert bool((await client.stats()).counters.split_steps) == bool(more)
            pauses = {home: stream.pause_after(moment) for home, stream in zip(homes, streams, strict=True)}
            print("seconds to the next token, by home:", pauses)
            assert max(pauses[0], pauses[2]) < 3
            await at_rest(client)


async def test_an_instance_joins_a_cell_that_serves(started: Processes, model: Path) -> None:
    """Eight streams at any time go on as without it, and then it is used."""
    ids, expected = text(model, 300, 300)
    wide, after = text(model, 200, 12, 7)
    streams: list[Stream] = []
    has_come = asyncio.Event()

    async def go_on(client: AsyncClient, number: int) -> None:
        for turn in count():
            streams.append(stream := Stream(client, f"{number}, turn {turn}", ids, 300, 1))
            await stream.is_right(expected)
            if has_come.is_set():
                return

    async with here(GManagerConfig(bind="tcp://127.0.0.1:*")) as server:
        started.instance(*flags(server.address, model, "--cell-size", "1"), rank=0, world_size=1)
        await until_ready(server.address)
        async with client_of(server.address) as client:
            going_on = [asyncio.create_task(go_on(client, number)) for number in range(LOAD)]
            await until(client, lambda s: sum(r.state == "decode" for r in s.requests.values()) == LOAD)
            moment = time.monotonic()
            started.instance(*flags(server.address, model, "--cell-size", "1"), rank=0, world_size=1)
            await until(client, lambda s: len(s.instances) == 2 and s.cells[0].state == "ready")
            has_come.set()
            await asyncio.gather(*going_on)
            pauses = [stream.pause_after(max(moment, stream.came[0])) for stream in streams if stream.came[-1] > moment]
            print("longest pauses, s:", [round(pause, 2) for pause in pauses])
            assert len(pauses) >= LOAD and max(pauses) < 3
            both = Stream(client, "both", wide, 12, "all")
            await both.is_right(after)
            assert sorted((await client.stats()).requests["both"].kv_tokens) == [0, 1]
            await at_rest(client)


async def test_a_joiner_that_differs_is_refused_and_streams_go_on(started: Processes, model: Path, tmp_path: Path) -> None:
    """One with another model, in a process of its own, and one here, which runs the same model's layers the other way."""
    other = make_model("llama", tmp_path / "other", seed=1)
    ids, expected = text(model, 100, 250)
    address = await address_of(started.gmanager())
    cell_of(started, 2, address, model)
    launch = Launch(rank=0, local_rank=0, world_size=1, run_id="joiner")
    sizes = {"kv_tokens": 512, "block_size": 16, "chunk_tokens": 64, "cell_size": 2, "threads": 1}
    config = InstanceConfig(gmanager=address, model=str(model), device=DEVICE, dtype="float32", launch=launch, **sizes)
    loaded = load(config)
    if loaded.model.fused is None:
        assert loaded.model.fuse(config.backend) is None
    else:
        loaded.model.unfuse()
    joiner = make_instance(config, loaded, ZmqTransport())
    await until_ready(address)
    async with client_of(address) as client:
        async with streams_meanwhile(client, ids, expected):
            stranger = started.instance(*flags(address, other, "--cell-size", "2"), run_id="stranger")
            with pytest.raises(
                InstanceError, match="refused this instance: its way to run layers is .*, that of cell 'main' is "
            ):
                await asyncio.wait_for(joiner.run(), 60)
            assert await stranger.exit_code(60) == 1
            await stranger.says(
                r"the gManager refused this instance: its model is \S+ \(\w+\), that of cell 'main' is \S+ \(\w+\)"
            )
            stats = await client.stats()
            assert (stats.epoch, len(stats.instances), stats.cells[0].state) == (1, 2, "ready"), "nothing has changed"
        await at_rest(client)


@pytest.mark.parametrize("stands_s", [1, pytest.param(17, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shares", [False, True])
async def test_one_that_stood_still_is_expelled_and_comes_again(
    started: Processes, model: Path, shares: bool, stands_s: float
) -> None:
    """SIGSTOP for longer than its lease, with and without a share in a stream."""
    ids, expected = text(model, 300, 200)
    async with here(GManagerConfig(bind="tcp://127.0.0.1:*", instance_lease_s=2.5)) as server:
        instances = cell_of(started, 2, server.address, model)
        await until_ready(server.address)
        async with client_of(server.address) as client:
            stream = Stream(client, "s", ids, len(expected.token_ids), "all" if shares else 1)
            await stream.reach(20)
            home = (await client.stats()).requests["s"].home
            assert home is not None
            stopped = instances[1 - home]
            stopped.signal(signal.SIGSTOP)
            try:
                if not shares:  # nothing of the other is asked for: it doesn't wait for the lease to end
                    before = len(stream.tokens)
                    await stream.reach(before + 20)
                    assert len((await client.stats()).instances) == 2
                await until(client, lambda s: len(s.instances) == 1 and s.cells[0].state == "ready")
                await asyncio.sleep(stands_s)
            finally:
                stopped.signal(signal.SIGCONT)
            await until(client, lambda s: len(s.instances) == 2 and s.cells[0].state == "ready")
            await stream.is_right(expected)
            assert [i.poll() for i in instances] == [None, None], "the same processes"
            await at_rest(client)


@pytest.mark.parametrize("losses", [3, pytest.param(20, marks=pytest.mark.slow)])
async def test_losses_in_a_row(started: Processes, model: Path, losses: int) -> None:
    """Each in mid-decode of a stream over all three; another comes in its place."""
    ids, expected = text(model, 600, 150)
    async with here(GManagerConfig(bind="tcp://127.0.0.1:*")) as server:
        living = dict(enumerate(cell_of(started, 3, server.address, model)))
        await until_ready(server.address)
        pauses: list[float] = []
        async with client_of(server.address) as client:
            for turn in range(losses):
                stream = Stream(client, f"turn {turn}", ids, 150, "all")
                await stream.reach(20 + 5 * turn)
                lost = turn % 3
                moment = time.monotonic()
                living[lost].signal(signal.SIGKILL)
                await stream.is_right(expected)
                pauses.append(stream.pause_after(moment))
                await until(client, lambda s: len(s.instances) == 2 and s.cells[0].state == "ready")
                living[lost] = started.instance(*flags(server.address, model, "--cell-size", "3"), run_id=f"again {turn}")
                await until(client, lambda s: len(s.instances) == 3 and s.cells[0].state == "ready")
            print("longest pauses, s:", [round(pause, 2) for pause in pauses])
            await at_rest(client)
