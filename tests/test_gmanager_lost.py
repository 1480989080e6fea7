"""A gManager that is killed, and another at the same address: the instances go on. Real processes, on loopback only."""

import asyncio
import signal
from pathlib import Path

import pytest

from tests.support.processes import Processes, client_of, free_port, until_ready
from tests.support.service import at_rest
from tests.support.tiny import make_long_model
from tests.test_lifecycle import answers, run, two, until, until_decoding
from tests.test_membership import Stream, text


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
        stats = await until(client, lambda s: s.counters.tokens_prefilled >= prompts)
        # each admission has one row anew; a token that was on its way may cost another
        assert stats.counters.tokens_prefilled <= prompts + 3 * streams * times
        await at_rest(client)
    assert [instance.poll() for instance in instances] == [None, None], "the same processes"


async def test_streams_go_on_with_the_next_gmanager(started: Processes, model: Path, tmp_path: Path) -> None:
    """Nothing lost, doubled or reordered, with transformers' tokens; KV is kept."""
    await _lose_again_and_again(started, model, tmp_path / "journal", streams=24, new=160, times=2)


@pytest.mark.slow
async def test_a_hundred_streams_and_ten_gmanagers(started: Processes, model: Path, tmp_path: Path) -> None:
    await _lose_again_and_again(started, model, tmp_path / "journal", streams=100, new=400, times=10)
