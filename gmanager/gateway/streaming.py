"""Answers as server-sent events, and what happens when whoever asked is gone."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gmanager.client import Chunk
from gmanager.gateway.answers import Choice
from gmanager.gateway.aside import aside
from gmanager.gateway.errors import ApiError
from gmanager.gateway.generation import Generation

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
"""A stream that has nothing to tell says so: before the first token of a long prompt minutes may pass, and what stands between
closes connections that are silent."""

HEADERS_AFTER_S = 1.0
"""A stream's status is decided by its first token, or after so long without one: what is refused is refused within
milliseconds, and a client should not wait minutes to hear that its long prompt was taken."""


class ClientGone(ApiError):
    """Nobody waits for the answer any more, nor reads this one; but the access log tells it."""

    def __init__(self) -> None:
        super().__init__(499, "the client has closed the connection")


class EventStream(Response):
    """A generation: its chunks as they come, in the form of its route. An error before the beginning is the whole answer
    (`ApiError` is raised), one after it the last event.

    Each choice writes its own events, and the first of them the headers: another task between would cost tokens, and the first
    one several times, a turn of a loop that writes those of all other streams meanwhile.
    """

    def __init__(self, generation: Generation) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        self._generation = generation
        self._has_begun = False
        self._beginning = asyncio.Lock()
        self._is_silent = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keeping_alive = asyncio.create_task(self._keep_alive(send))
        try:
            await unless_gone(receive, self._stream(send))
        except ClientGone:
            if not self._has_begun:
                raise
        finally:
            keeping_alive.cancel()
            await asyncio.gather(keeping_alive, return_exceptions=True)

    async def _stream(self, send: Send) -> None:
        form, usage = self._generation.form, self._generation.usage

        async def emit(choice: Choice, chunk: Chunk) -> None:
            num_tokens = len(chunk.token_ids) + len(chunk.prompt_logprobs or ())
            if events := await aside(num_tokens, lambda: form.events(choice, chunk, usage)):
                await self._write(send, events)

        try:
            await self._generation.deliver(emit)
        except ApiError as error:
            if not self._has_begun:
                raise
            await self._write(send, form.failure(error), more=False)
            return
        await self._write(send, form.end(usage), more=False)

    async def _begin(self, send: Send) -> None:
        if self._has_begun:
            return
        async with self._beginning:
            if not self._has_begun:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                self._has_begun = True

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        self._is_silent = False
        await self._begin(send)
        await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _keep_alive(self, send: Send) -> None:
        await asyncio.sleep(HEADERS_AFTER_S)
        await self._begin(send)
        while True:
            self._is_silent = True
            await asyncio.sleep(KEEP_ALIVE_S)
            if self._is_silent:
                await self._write(send, b": waiting\n\n")


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
