"""Answers as server-sent events, and what happens when whoever asked is gone."""

import asyncio
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from typing import TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gmanager.client import Chunk
from gmanager.gateway.answers import Choice, Json
from gmanager.gateway.errors import ApiError
from gmanager.gateway.generation import Generation

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
"""A stream that has nothing to tell says so: before the first token of a long prompt minutes may pass, and what stands between
closes connections that are silent."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class EventStream(Response):
    """A generation that runs: its chunks as they come, then `[DONE]`. An error after the beginning is the last event.

    Each choice writes its own events: a queue between would cost each token another turn of the loop.
    """

    def __init__(self, generation: Generation, running: AsyncExitStack, *, with_usage: bool) -> None:
        """`running`: closed at the end, and with it the generation."""
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        self.status_code = 200
        self.background = None
        self.raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self._generation = generation
        self._running = running
        self._with_usage = with_usage
        self._opened: set[int] = set()
        self._is_silent = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._running:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            keeping_alive = asyncio.create_task(self._keep_alive(send))
            try:
                await unless_gone(receive, self._stream(send))
            except ClientGone:
                return
            finally:
                keeping_alive.cancel()
                await asyncio.gather(keeping_alive, return_exceptions=True)

    async def _stream(self, send: Send) -> None:
        envelope, shape = self._generation.envelope, self._generation.envelope.shape

        async def emit(choice: Choice, chunk: Chunk) -> None:
            events = [_event(envelope.chunk([shape.delta(choice, chunk)]))]
            if choice.index not in self._opened:
                self._opened.add(choice.index)
                if (opening := shape.opening(choice)) is not None:
                    events.insert(0, _event(envelope.chunk([opening])))
            self._is_silent = False
            await _write(send, b"".join(events))

        try:
            await self._generation.deliver(emit)
        except ApiError as error:
            await _write(send, _event(error.body()), more=False)
            return
        usage = _event(envelope.chunk([], self._generation.usage)) if self._with_usage else b""
        await _write(send, usage + b"data: [DONE]\n\n", more=False)

    async def _keep_alive(self, send: Send) -> None:
        while True:
            self._is_silent = True
            await asyncio.sleep(KEEP_ALIVE_S)
            if self._is_silent:
                await _write(send, b": waiting\n\n")


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`. Raises what `work` raises, and ClientGone, with `work` cancelled, if the connection is closed."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _write(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


def _event(content: Json) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
