"""The replay of a trace against a service: when each token of each request came."""

import asyncio
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
from _trace import Arrival, prompt_of

from gmanager import AsyncClient, DistattnError, RequestRefused, SamplingParams


class Timing(msgspec.Struct, kw_only=True):
    """What became of one request. Seconds after the start of the replay."""

    arrival: Arrival
    due_s: float | None = None
    """None: it never was."""
    token_s: list[float] = []
    """When each token came."""
    error: str | None = None
    """Why it is not finished."""
    refused: str | None = None
    """The reason, if it never started because the service said no."""

    @property
    def ttft_s(self) -> float | None:
        return self.token_s[0] - self.due_s if self.due_s is not None and self.token_s else None

    @property
    def total_s(self) -> float | None:
        """From due to last token, if all tokens have come."""
        return self.token_s[-1] - self.due_s if self.due_s is not None and self.token_s and self.error is None else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time between its tokens, if all have come and there are two at least."""
        if self.error is not None or len(self.token_s) < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)

    def gaps_s(self, start: float = -math.inf, end: float = math.inf) -> list[float]:
        """Times between consecutive tokens, of those gaps that end in [start, end]."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False) if start <= b <= end]


@dataclass
class _Gate:
    """Opens once `left` requests have had their first token, or have ended without."""

    left: int
    opened_s: float = 0
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def pass_one(self, now: float) -> None:
        self.left -= 1
        if self.left == 0:
            self.opened_s = now
            self._open.set()

    async def wait(self) -> float:
        """When it opened."""
        await self._open.wait()
        return self.opened_s


async def replay(
    client: AsyncClient, trace: Sequence[Arrival], vocab_size: int, *, seed: int = 0, timeout_s: float = 600
) -> list[Timing]:
    """Send the requests of a trace when they are due, and note when their tokens come; in the trace's order.

    A request that fails, or has not ended after `timeout_s`, has an `error`; those still running are aborted. `vocab_size`:
    prompts hold random ids in [0, vocab_size).
    """
    # before the first is due, and beside the client's own work: a long trace takes a while
    prompts = await asyncio.to_thread(_prompts, trace, vocab_size, seed)
    timings = [Timing(arrival=arrival) for arrival in trace]
    gate = _Gate(sum(not arrival.after_first_tokens for arrival in trace))
    loop = asyncio.get_running_loop()
    start = loop.time()

    def clock() -> float:
        return loop.time() - start

    tasks = [asyncio.create_task(_ask(client, *pair, gate, clock)) for pair in zip(timings, prompts, strict=True)]
    try:
        await asyncio.wait(tasks, timeout=timeout_s)
        for timing, task in zip(timings, tasks, strict=True):
            if not task.done():
                timing.error = f"not finished after {timeout_s:g} s"
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
    return timings


def _prompts(trace: Sequence[Arrival], vocab_size: int, seed: int) -> "list[array[int]]":
    """4 bytes a token, where a list takes 36."""
    return [array("I", prompt_of(arrival, vocab_size, seed, i)) for i, arrival in enumerate(trace)]


async def _ask(client: AsyncClient, timing: Timing, prompt: "array[int]", gate: _Gate, clock: Callable[[], float]) -> None:
    arrival = timing.arrival
    timing.due_s = arrival.at_s + (await gate.wait() if arrival.after_first_tokens else 0)
    await asyncio.sleep(max(0, timing.due_s - clock()))
    params = SamplingParams(max_tokens=arrival.max_tokens, temperature=0, ignore_eos=True)
    opens = not arrival.after_first_tokens
    try:
        async for chunk in client.generate(prompt.tolist(), params):
            timing.token_s += [clock()] * len(chunk.token_ids)
            if opens and timing.token_s:
                opens = False
                gate.pass_one(clock())
        if len(timing.token_s) != arrival.max_tokens:
            timing.error = f"ended after {len(timing.token_s)} of {arrival.max_tokens} tokens"
    except DistattnError as error:
        if isinstance(error, RequestRefused) and not timing.token_s:
            timing.refused = error.reason
        timing.error = f"{type(error).__name__}: {error}"
    finally:
        if opens:
            gate.pass_one(clock())
