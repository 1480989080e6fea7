"""A gateway in this process, at a port of its own."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from gmanager.gateway.app import make_app
from gmanager.gateway.backend import Backend
from gmanager.gateway.config import GatewayConfig


@asynccontextmanager
async def gateway(service_address: str, **config: Any) -> AsyncIterator[str]:
    """Serves the gManager at that address; yields the base URL, `http://127.0.0.1:PORT`, once it knows what is served."""
    settings = GatewayConfig(gmanager=service_address, **config)
    backend = Backend(service_address, aliases=settings.aliases)
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(make_app(settings, backend), log_config=None, access_log=False, timeout_graceful_shutdown=1)
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(10):
                while not (server.started and backend.is_connected):
                    await asyncio.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
