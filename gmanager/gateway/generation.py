"""One HTTP request's calls of the service: all its choices at once, each handed on as soon as it comes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from gmanager.client import AsyncClient, Chunk, Spread
from gmanager.gateway.answers import Choice, Envelope, Json, Prompt, Usage
from gmanager.gateway.errors import ApiError, translate
from gmanager.wire.errors import DistattnError
from gmanager.wire.messages import SamplingParams

Emit = Callable[[Choice, Chunk], Awaitable[None]]


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
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _begun: asyncio.Event = field(default_factory=asyncio.Event)
    _error: ApiError | None = None
    _emit: "asyncio.Future[Emit] | None" = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The choices run inside; what still runs at the end is aborted."""
        self.usage.prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        self._emit = asyncio.get_running_loop().create_future()
        self._tasks = [
            asyncio.create_task(self._run(Choice(i * len(self.params) + j, prompt), params, self._emit))
            for i, prompt in enumerate(self.prompts)
            for j, params in enumerate(self.params)
        ]
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def begun(self, timeout_s: float) -> None:
        """Until a choice has something to tell, or the time is over. Raises ApiError if that is an error."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._begun.wait()
        except TimeoutError:
            return
        if self._error is not None:
            raise self._error

    async def deliver(self, emit: Emit) -> None:
        """Hand on every chunk of every choice, each choice's in order, until all have ended. Raises ApiError if one fails."""
        if self._emit is None:
            raise RuntimeError("it isn't running")
        self._emit.set_result(emit)
        await asyncio.gather(*self._tasks)

    async def whole(self) -> Json:
        """The answer, once all choices have ended. Raises ApiError if one fails."""
        choices: dict[int, Choice] = {}
        chunks: dict[int, list[Chunk]] = {}

        async def collect(choice: Choice, chunk: Chunk) -> None:
            choices[choice.index] = choice
            chunks.setdefault(choice.index, []).append(chunk)

        await self.deliver(collect)
        shape = self.envelope.shape
        return self.envelope.whole([shape.whole(choices[i], chunks[i]) for i in sorted(chunks)], self.usage)

    async def _run(self, choice: Choice, params: SamplingParams, emitting: "asyncio.Future[Emit]") -> None:
        """One choice, until it ends. Raises ApiError."""
        try:
            chunks = self.client.generate(
                choice.prompt.token_ids,
                params,
                request_id=f"{self.envelope.name}-{choice.index}",
                spread=self.spread,
                model=self.envelope.model,
                wait_for_cell=False,
            )
            async with aclosing(chunks):
                async for chunk in chunks:
                    if chunk.finish_reason == "error":
                        continue  # the exception that follows says why
                    if not self.drops_tokens:
                        self.usage.completion_tokens += len(chunk.token_ids)
                    self._begun.set()
                    emit = await asyncio.shield(emitting) if not emitting.done() else emitting.result()
                    await emit(choice, chunk)
        except (DistattnError, ValueError) as error:
            # ValueError: text that no message can hold
            self._error = translate(error) if isinstance(error, DistattnError) else ApiError(400, str(error))
            self._begun.set()
            raise self._error from error
