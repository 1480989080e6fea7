"""Traces of requests, and their replay against a service: when each token of each request came."""

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from gmanager import AsyncClient, DistattnError, SamplingParams


class TraceError(ValueError):
    """The trace can't be used; the message says which line, and why."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of a trace. Raises ValueError for numbers that make no sense."""

    at_s: float
    prompt_tokens: int
    max_tokens: int
    name: str = "requests"
    """Of the group whose figures it counts in."""
    after_first_tokens: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.at_s) and self.at_s >= 0):
            raise ValueError(f"at_s must be at least 0, got {self.at_s}")
        if self.prompt_tokens < 1 or self.max_tokens < 1:
            raise ValueError(f"prompt_tokens and max_tokens must be at least 1, got {self.prompt_tokens} and {self.max_tokens}")


def _at_once(count: int, prompt_tokens: int, max_tokens: int, name: str, *, after: bool = False) -> list[Arrival]:
    one = Arrival(at_s=0, prompt_tokens=prompt_tokens, max_tokens=max_tokens, name=name, after_first_tokens=after)
    return [one] * count


K = 1024
TRACES = {
    "mixed": [*_at_once(64, K, 128, "short"), *_at_once(4, 128 * K, 64, "long")],
    "decode32": _at_once(32, 8 * K, 256, "decode"),
    "prefill-beside-decode": [*_at_once(32, 8 * K, 512, "decode"), *_at_once(1, 128 * K, 1, "prefill", after=True)],
}


def read_trace(source: str, scale: float = 1.0) -> list[Arrival]:
    """A built-in trace by name, or that of a file, its tokens times `scale`. Raises TraceError."""
    trace = TRACES.get(source) or _read_file(Path(source))
    if all(arrival.after_first_tokens for arrival in trace):
        raise TraceError(f"{source}: all requests wait for the first tokens of others, and there are none")
    return trace if scale == 1 else [_scaled(arrival, scale) for arrival in trace]


def _read_file(file: Path) -> list[Arrival]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise TraceError(f"{file} is neither a file that can be read nor one of {', '.join(TRACES)}: {error}") from error
    trace: list[Arrival] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            trace.append(msgspec.json.decode(line, type=Arrival))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TraceError(f"{file}, line {number}: {error}") from error
    if not trace:
        raise TraceError(f"{file} has no requests")
    return trace


def _scaled(arrival: Arrival, scale: float) -> Arrival:
    """At least one token each, and two of an answer that has more than one: else there is no time between tokens."""
    return msgspec.structs.replace(
        arrival,
        prompt_tokens=max(1, round(arrival.prompt_tokens * scale)),
        max_tokens=max(min(2, arrival.max_tokens), round(arrival.max_tokens * scale)),
    )


# --- replay -----------------------------------------------------------------------------------------------------------


class Timing(msgspec.Struct, kw_only=True):
    """What became of one request. Seconds after the start of the replay."""

    arrival: Arrival
    due_s: float | None = None
    """None: it never was."""
    token_s: list[float] = []
    """When each token came."""
    error: str | None = None
    """Why it is not finished."""

    @property
    def ttft_s(self) -> float | None:
        return self.token_s[0] - self.due_s if self.due_s is not None and self.token_s else None

    @property
    def total_s(self) -> float | None:
        """From due to last token, if all tokens have come."""
        return self.token_s[-1] - self.due_s if self.due_s is not None and self.token_s and self.error is None else None

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
    prompts = [make_prompt(arrival.prompt_tokens, vocab_size, seed, i) for i, arrival in enumerate(trace)]
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


def make_prompt(length: int, vocab_size: int, seed: int, index: int) -> list[int]:
    """Token ids that depend on seed and index alone, so that no two prompts begin alike."""
    return random.Random(f"{seed}/{index}").choices(range(vocab_size), k=length)


async def _ask(client: AsyncClient, timing: Timing, prompt: list[int], gate: _Gate, clock: Callable[[], float]) -> None:
    arrival = timing.arrival
    timing.due_s = arrival.at_s + (await gate.wait() if arrival.after_first_tokens else 0)
    await asyncio.sleep(max(0, timing.due_s - clock()))
    params = SamplingParams(max_tokens=arrival.max_tokens, temperature=0, ignore_eos=True)
    opens = not arrival.after_first_tokens
    try:
        async for chunk in client.generate(prompt, params):
            timing.token_s += [clock()] * len(chunk.token_ids)
            if opens and timing.token_s:
                opens = False
                gate.pass_one(clock())
        if len(timing.token_s) != arrival.max_tokens:
            timing.error = f"ended after {len(timing.token_s)} of {arrival.max_tokens} tokens"
    except DistattnError as error:
        timing.error = f"{type(error).__name__}: {error}"
    finally:
        if opens:
            gate.pass_one(clock())
