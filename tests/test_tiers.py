"""What had to make room in the pools comes back from host memory and disk: real processes, beside transformers' own runs.

A pool's blocks are poisoned before they are written, so what is read that isn't there is seen.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from gmanager.wire.messages import Counters, InstanceStats
from tests.support.farm import Farm, Setup
from tests.support.service import Service, serve
from tests.support.tiny import make_model
from tests.test_prefix_reuse import ask, question

BLOCK = 16
DOCUMENTS = [[(i * i * (31 + 2 * n) + i * 17 + n) % 256 for i in range(150)] for n in range(4)]
POOL = 16 * BLOCK
"""Of each instance: room for one document and its question."""
BLOCK_BYTES = 8192
"""Of all layers of the model here."""
WHOLE = 9 * BLOCK
"""Tokens of a document in whole blocks."""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _reading_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gManager runs in this process. So small a model computes a document in milliseconds, on some machines sooner than it
    is read: here it is to be read in any case."""
    monkeypatch.setattr("gmanager.cluster.reuse.LEAST_TOKEN_S", 1e6)


async def instances(service: Service) -> list[InstanceStats]:
    return (await service.client.stats()).instances


async def counters(service: Service) -> Counters:
    return (await service.client.stats()).counters


async def until_copied(service: Service) -> None:
    """All that is cached has a copy below."""
    async with asyncio.timeout(20):
        while not all(i.host_tokens + i.disk_tokens >= i.cached_tokens for i in await instances(service)):
            await asyncio.sleep(0.05)


@asynccontextmanager
async def evicted(farm: Farm, llama: Path, size: int, **tiers: object) -> AsyncIterator[Service]:
    """A cell that has been asked about a document, and then about others, which have taken its room."""
    setup = Setup(model=llama, kv_tokens=POOL, chunk_tokens=64, **tiers)  # type: ignore[arg-type]
    async with serve(farm, size, setup) as service:
        for n, document in enumerate(DOCUMENTS):
            for _ in range(size):  # once for each that may be home
                await ask(service, llama, question(llama, document, 30, n), spread="all")
            await until_copied(service)
        assert (await counters(service)).blocks_evicted >= WHOLE // BLOCK
        assert not (await counters(service)).tier_tokens
        yield service


MEMORY = 2**20
"""Each tier's: 64 blocks or more."""


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("where", ["host", "disk", "both"])
async def test_a_document_that_had_to_make_room_is_read_and_not_computed(
    farm: Farm, llama: Path, size: int, where: Literal["host", "disk", "both"], tmp_path: Path
) -> None:
    tiers: dict[str, object] = {}
    if where != "disk":
        tiers |= {"host_memory": MEMORY if where == "host" else 6 * BLOCK_BYTES}
    if where != "host":
        tiers |= {"disk": tmp_path, "disk_bytes": 2 * MEMORY}
    async with evicted(farm, llama, size, **tiers) as service:
        again = await ask(service, llama, question(llama, DOCUMENTS[0], 31, 7), spread="all")
        assert again.cached_tokens >= WHOLE - (size - 1) * BLOCK, "but for the last block of each run"
        counted = await counters(service)
        assert counted.tier_tokens and not counted.blocks_corrupt
        assert counted.tier_bytes_up * BLOCK == counted.tier_tokens * BLOCK_BYTES
        assert all(
            (i.host_tokens > 0, i.disk_tokens > 0) == (where != "disk", where != "host") for i in await instances(service)
        )


@pytest.mark.parametrize("where", ["host", "disk"])
async def test_what_was_spoiled_below_is_computed_again(
    farm: Farm, llama: Path, where: Literal["host", "disk"], tmp_path: Path
) -> None:
    tiers: dict[str, object] = {"host_memory": MEMORY} if where == "host" else {"disk": tmp_path, "disk_bytes": 2 * MEMORY}
    async with evicted(farm, llama, 1, **tiers) as service:
        await farm.workers[0].ask("spoil", where)
        again = await ask(service, llama, question(llama, DOCUMENTS[0], 31, 7))
        assert again.cached_tokens == 0
        counted = await counters(service)
        assert counted.blocks_corrupt >= WHOLE // BLOCK and not counted.tier_tokens
        after = await ask(service, llama, question(llama, DOCUMENTS[0], 32, 8))
        assert after.cached_tokens == WHOLE


async def test_what_was_spoiled_in_the_pool_is_computed_again_where_that_is_checked(farm: Farm, llama: Path) -> None:
    async with serve(farm, 1, Setup(model=llama, kv_tokens=2 * POOL, check_cache=True)) as service:
        await ask(service, llama, question(llama, DOCUMENTS[0], 30, 0), cached=0)
        await ask(service, llama, question(llama, DOCUMENTS[0], 30, 1), cached=WHOLE)
        await farm.workers[0].ask("spoil", "pool")
        await ask(service, llama, question(llama, DOCUMENTS[0], 30, 2), cached=0)
        assert (await counters(service)).blocks_corrupt
        await ask(service, llama, question(llama, DOCUMENTS[0], 30, 3), cached=WHOLE)
