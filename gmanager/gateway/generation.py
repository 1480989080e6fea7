"""One HTTP request's calls of the service: all its choices at once, each handed on as soon as it comes."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gmanager.client import AsyncClient, Chunk
from gmanager.gateway.answers import Choice, Form, Prompt, Usage
from gmanager.gateway.aside import aside
from gmanager.gateway.errors import ApiError, translate
from gmanager.wire.errors import DistattnError
from gmanager.wire.messages import SamplingParams

Emit = Callable[[Choice, Chunk], Awaitable[None]]


@dataclass(slots=True, kw_only=True)
class Generation:
    """`len(params)` choices for each prompt."""

    client: AsyncClient
    model: str
    """As the service calls it."""
    form: Form
    prompts: Sequence[Prompt]
    params: Sequence[SamplingParams]
    service: Mapping[str, Any]
    """How the service is to treat each: arguments of `AsyncClient.generate`."""
    drops_tokens: bool
    """Only the prompts count: what is generated is no part of the answer."""
    usage: Usage = field(default_factory=Usage)

    async def deliver(self, emit: Emit) -> None:
        """Run it, and hand on every chunk of every choice, each choice's in order. Raises ApiError if one fails.

        What still runs when this ends, however it ends, is aborted.
        """
        self.usage.prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        choices = [
            asyncio.create_task(self._run(Choice(i * len(self.params) + j, prompt), params, emit))
            for i, prompt in enumerate(self.prompts)
            for j, params in enumerate(self.params)
        ]
        try:
            await asyncio.gather(*choices)
        finally:
            for task in choices:
                task.cancel()
            await asyncio.gather(*choices, return_exceptions=True)

    async def whole(self) -> bytes:
        """The answer as JSON, once all choices have ended. Raises ApiError if one fails."""
        choices: dict[int, Choice] = {}
        chunks: dict[int, list[Chunk]] = {}

        async def collect(choice: Choice, chunk: Chunk) -> None:
            choices[choice.index] = choice
            chunks.setdefault(choice.index, []).append(chunk)

        await self.deliver(collect)

        def answer() -> bytes:
            return msgspec.json.encode(self.form.whole([(choices[i], chunks[i]) for i in sorted(chunks)], self.usage))

        return await aside(self.usage.total_tokens, answer)

    async def _run(self, choice: Choice, params: SamplingParams, emit: Emit) -> None:
        """One choice, until it ends. Raises ApiError."""
        try:
            chunks = self.client.generate(
                choice.prompt.token_ids,
                params,
                request_id=self.form.request_id(choice.index),
                model=self.model,
                wait_for_cell=False,
                **self.service,
            )
            async with aclosing(chunks):
                async for chunk in chunks:
                    if chunk.finish_reason == "error":
                        continue  # the exception that follows says why
                    if not self.drops_tokens:
                        self.usage.completion_tokens += len(chunk.token_ids)
                    await emit(choice, chunk)
        except DistattnError as error:
            raise translate(error, choice.prompt.field) from error
        except ValueError as error:  # text that no message can hold
            raise ApiError(400, str(error)) from error
