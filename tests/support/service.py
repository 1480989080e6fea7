"""A gManager in this process and a cell of the farm's instances, for one test."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from gmanager import AsyncClient
from gmanager.config import GManagerConfig
from gmanager.server import Server
from tests.support.farm import NUM_GPUS, Farm, Setup


@dataclass
class Service:
    client: AsyncClient
    server: Server
    size: int
    block_size: int


@asynccontextmanager
async def serve(farm: Farm, size: int, setup: Setup, **config: Any) -> AsyncIterator[Service]:
    """Ready when entered; when left, every request must have ended and every pool be empty. `config`: of the gManager."""
    if setup.device == "cuda" and 1 < NUM_GPUS < size * setup.ranks:
        pytest.skip(f"needs {size} GPUs")
    server = Server(GManagerConfig(**({"bind": "tcp://127.0.0.1:*", "max_queue_wait_s": 60} | config)))
    server.start()
    running = asyncio.create_task(server.run())
    try:
        async with farm.serve(size, setup, server.address), AsyncClient(server.address) as client:
            await ready(client)
            yield Service(client, server, size, setup.block_size)
            await at_rest(client)
    finally:
        server.stop()
        await running


async def ready(client: AsyncClient) -> None:
    async with asyncio.timeout(60):
        while not any(cell.state == "ready" for cell in (await client.stats()).cells):
            await asyncio.sleep(0.02)


async def at_rest(client: AsyncClient) -> None:
    """Wait until no request lives and no block is held. A leak fails by the deadline."""
    async with asyncio.timeout(10):
        while True:
            stats = await client.stats()
            live = [name for name, r in stats.requests.items() if r.state != "finished"]
            if not live and all(i.used_tokens == 0 for i in stats.instances):
                return
            await asyncio.sleep(0.02)
