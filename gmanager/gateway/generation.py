"""One HTTP request's calls of the service: all its choices at once, and their chunks in the order in which they come."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from gmanager.client import AsyncClient, Chunk, Spread
from gmanager.gateway.answers import Choice, Envelope, Json, Prompt, Usage
from gmanager.gateway.errors import ApiError, translate
from gmanager.wire.errors import DistattnError
from gmanager.wire.messages import SamplingParams

KEEP_ALIVE_S = 15.0
"""A stream that has nothing to tell says so: before the first token of a long prompt minutes may pass, and what stands between
closes connections that are silent."""

_Item = tuple[Choice, Chunk] | ApiError | None
"""None: one choice has ended."""


@dataclass(slots=True, kw_only=True)
class Generation:
    """`len(params)` choices for each prompt."""

    client: AsyncClient
    envelope: Envelope
    prompts: Sequence[Prompt]
    params: Sequence[SamplingParams]
    spread: Spread
    drops_tokens: bool
    """Only the prompts count: what is generated is no part of the answer."""
    usage: Usage = field(default_factory=Usage)
    _items: deque[_Item] = field(default_factory=deque)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _num_open: int = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The choices run inside; what still runs at the end is aborted."""
        self.usage.prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        tasks = [
            asyncio.create_task(self._pump(Choice(i * len(self.params) + j, prompt), params))
            for i, prompt in enumerate(self.prompts)
            for j, params in enumerate(self.params)
        ]
        self._num_open = len(tasks)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def begun(self, timeout_s: float) -> None:
        """Until there is something to tell, or the time is over. Raises ApiError if that is an error."""
        if await self._wait(timeout_s) and isinstance(self._items[0], ApiError):
            raise self._items[0]

    async def whole(self) -> Json:
        """The answer, once all choices have ended. Raises ApiError if one fails."""
        choices: dict[int, Choice] = {}
        chunks: dict[int, list[Chunk]] = {}
        while self._num_open:
            await self._wait(None)
            for choice, chunk in self._take():
                choices[choice.index] = choice
                chunks.setdefault(choice.index, []).append(chunk)
        shape = self.envelope.shape
        return self.envelope.whole([shape.whole(choices[i], chunks[i]) for i in sorted(chunks)], self.usage)

    async def events(self, *, with_usage: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events, as it comes. An error is the last event, and no `[DONE]` follows it."""
        shape = self.envelope.shape
        opened: set[int] = set()
        while self._num_open:
            if not await self._wait(KEEP_ALIVE_S):
                yield b": waiting\n\n"
                continue
            events: list[bytes] = []
            try:
                for choice, chunk in self._take():
                    if choice.index not in opened:
                        opened.add(choice.index)
                        if (opening := shape.opening(choice)) is not None:
                            events.append(_event(self.envelope.chunk([opening])))
                    events.append(_event(self.envelope.chunk([shape.delta(choice, chunk)])))
            except ApiError as error:
                yield b"".join([*events, _event(error.body())])
                return
            yield b"".join(events)
        usage = [_event(self.envelope.chunk([], self.usage))] if with_usage else []
        yield b"".join([*usage, b"data: [DONE]\n\n"])

    async def _pump(self, choice: Choice, params: SamplingParams) -> None:
        """One choice's chunks, until it ends."""
        name = f"{self.envelope.name}-{choice.index}"
        last: _Item = None
        try:
            chunks = self.client.generate(
                choice.prompt.token_ids,
                params,
                request_id=name,
                spread=self.spread,
                model=self.envelope.model,
                wait_for_cell=False,
            )
            async with aclosing(chunks):
                async for chunk in chunks:
                    if chunk.finish_reason != "error":  # the exception that follows says why
                        if not self.drops_tokens:
                            self.usage.completion_tokens += len(chunk.token_ids)
                        self._put((choice, chunk))
        except DistattnError as error:
            last = translate(error)
        except ValueError as error:  # text that no message can hold
            last = ApiError(400, str(error))
        self._put(last)

    def _put(self, item: _Item) -> None:
        self._items.append(item)
        self._news.set()

    async def _wait(self, timeout_s: float | None) -> bool:
        """Until there is an item; False: the time is over."""
        if not self._items:
            self._news.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
            except TimeoutError:
                return False
        return True

    def _take(self) -> "list[tuple[Choice, Chunk]]":
        """All that has come. Raises ApiError when that is next."""
        taken: list[tuple[Choice, Chunk]] = []
        while self._items:
            item = self._items[0]
            if isinstance(item, ApiError):
                if taken:
                    break
                self._num_open = 0
                raise item
            self._items.popleft()
            if item is None:
                self._num_open -= 1
            else:
                taken.append(item)
        return taken


def _event(content: Json) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
