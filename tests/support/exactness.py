"""A greedy request of the service beside transformers' own run: ids equal, every logprob within the tolerance."""

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path

from gmanager import AsyncClient, SamplingParams
from tests.support.tiny import Expected, reference

NEW = 12
LOGPROB_TOLERANCE = 5e-4
# Two greedy runs whose logprobs differ by at most the tolerance can only part where the best two are closer than twice that.
LEAST_MARGIN = 2 * LOGPROB_TOLERANCE

_numbers = itertools.count()

MIXED_LENGTHS = (3, 150, 40, 1, 97, 64, 17, 120)


class Differs(AssertionError):
    """The service said something else than transformers."""


def clear_prompt(path: Path, make: Callable[[int], list[int]], new: int) -> list[int]:
    """The first of `make(0)`, `make(1)`, ... whose greedy continuation is no close call, where rounding could decide."""
    for attempt in range(20):
        ids = make(attempt)
        if reference(path, tuple(ids), new).margin > LEAST_MARGIN:
            return ids
    raise AssertionError(f"20 prompts, and each has a margin of at most {LEAST_MARGIN}")


def prompt(path: Path, length: int, *, new: int = NEW, seed: int = 0) -> list[int]:
    """A prompt for the tiny models.

    Its reference is computed here, in the caller's loop. Where several are needed make them before the service begins: its
    gManager lives in the same loop, and instances give up one that is silent for 5 s.
    """
    return clear_prompt(
        path, lambda attempt: [(i * i * 31 + i * 17 + seed * 7919 + attempt * 101 + length) % 256 for i in range(length)], new
    )


async def ask(
    client: AsyncClient,
    path: Path,
    ids: list[int],
    *,
    new: int = NEW,
    spread: int | str | None = None,
    move: bool = False,
) -> str:
    """One greedy request, compared with the reference; with `move`, its home moves after five tokens. Returns its id."""
    expected = reference(path, tuple(ids), new)
    assert expected.margin > LEAST_MARGIN, "a closer call than rounding allows"
    request_id = f"r-{next(_numbers)}"
    tokens: list[int] = []
    logprobs: list[float] = []
    moving: asyncio.Task[None] | None = None
    params = SamplingParams(max_tokens=new, temperature=0, logprobs=0, ignore_eos=True)
    async for chunk in client.generate(ids, params, request_id=request_id, spread=spread):  # type: ignore[arg-type]
        assert chunk.index == len(tokens)
        tokens += chunk.token_ids
        logprobs += [p.logprob for p in chunk.logprobs or []]
        if move and len(tokens) >= 5 and moving is None:
            moving = asyncio.create_task(move_on(client, request_id))
    check(tokens, logprobs, expected)
    if moving is not None:
        await moving
        assert (await client.stats()).requests[request_id].home_moves >= 1
    return request_id


async def move_on(client: AsyncClient, request_id: str) -> None:
    """Move a request's home to the next instance."""
    stats = await client.stats()
    home = stats.requests[request_id].home
    assert home is not None
    await client.move_home(request_id, (home + 1) % len(stats.instances))


def check(tokens: list[int], logprobs: list[float], expected: Expected) -> None:
    worst = max((abs(a - b) for a, b in zip(logprobs, expected.logprobs, strict=True)), default=0.0)
    if worst > LOGPROB_TOLERANCE or tokens != expected.token_ids:
        raise Differs(f"{tokens} instead of {expected.token_ids}, logprobs differ by up to {worst}")


async def ask_mixed(client: AsyncClient, path: Path, prompts: list[list[int]]) -> None:
    """All of them at once, spread over all, one and as the service likes; some arrive while others decode."""

    async def later(i: int, ids: list[int]) -> None:
        await asyncio.sleep(0.02 * i)
        await ask(client, path, ids, spread=("all", 1, None)[i % 3])

    await asyncio.gather(*(later(i, ids) for i, ids in enumerate(prompts)))
