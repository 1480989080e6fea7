"""A gManager that is killed, and another at the same address: the instances go on. Real processes, on loopback only."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.processes import Processes, client_of, free_port, processes, until_ready
from tests.support.service import at_rest
from tests.support.tiny import make_long_model
from tests.test_lifecycle import answers, run, two, until, until_decoding


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_long_model(tmp_path_factory.mktemp("models"))


@pytest.fixture
async def started(tmp_path: Path) -> AsyncIterator[Processes]:
    async with processes(tmp_path) as ours:
        yield ours


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
