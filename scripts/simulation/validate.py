"""The same trace for real, on the CPU, and simulated with step times that were measured in the same service.

1. A service of a few instances is asked for single requests, again and again: what a step and a row take, a message, the host's
   work between two steps, and what it costs when rows travel (`Sweep`, `fit`).
2. It replays the trace, and counts what its steps took together, those of prompts and those of decodes.
3. The trace is simulated. A machine is not as fast at all times, least of all one that others use, so all coefficients are
   scaled until the steps that are simulated take as long together as was counted, and decodes beside prompts until theirs have
   their part of it (`level`). Who waits for whom, what runs beside what, and when each token comes is the simulator's.
"""

import asyncio
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec
from _replay import Timing, replay
from _trace import Arrival

from gmanager import AsyncClient, Counters, SamplingParams
from simulation.service import Outcome, Setting, simulate
from simulation.times import LaneTimes, Load, Profile

SHORT = 16
SHARED = 1024
"""Tokens of a prompt that all instances share."""
ANSWER = 24
REPEATS = 6
"""Of each measurement; medians count: others may use the machine, as they do during the replay."""
COUNTERS_LAG_S = 2.0
"""Instances tell their counters once a second."""
LEVELLINGS, LEVEL = 24, 0.01
"""How often, and how near, relative, it is looked for that steps take what was counted."""
MOST_BESIDE = 16.0
"""Largest factor by which prompts may slow decodes down."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the sweep found, s."""

    round_trip: float
    """To the first token of a short prompt, beyond its step."""
    between: float
    """From one token of a decode to the next."""
    step: float
    """Of these, what the step itself took."""
    alone: float
    """To the first token of a prompt of `SHARED` tokens."""
    shared_prefill: float
    """The same of one that all instances prefill together."""
    shared_between: float
    """From one token to the next of a decode that follows it."""


class Sweep:
    """Measures a service that nobody else uses."""

    def __init__(self, client: AsyncClient, instances: int, vocab_size: int) -> None:
        self._client = client
        self._instances = instances
        self._vocab_size = vocab_size
        self._num_asked = 0

    async def measure(self) -> Measured:
        """Everything, in turns, so that no kind of request has the quiet moments to itself."""
        await self._ask([(64, 8)] * self._instances)  # whatever is made with the first requests
        short: list[float] = []
        between: list[float] = []
        step: list[float] = []
        alone: list[float] = []
        shared: list[float] = []
        shared_between: list[float] = []
        for _ in range(REPEATS):
            before = await self._counters()
            (came,) = await self._ask([(SHORT, ANSWER)])
            after = await self._counters()
            steps = after.steps - before.steps
            step.append((after.step_us - before.step_us) / 1e6 / max(1, steps))
            short.append(came[0] - step[-1])
            between.append(statistics.median(b - a for a, b in pairwise(came)))
            alone += [came[0] for came in await self._ask([(SHARED, 1)])]
            (came,) = await self._ask([(SHARED, ANSWER)], is_shared=True)
            shared.append(came[0])
            shared_between.append(statistics.median(b - a for a, b in pairwise(came)))
        return Measured(
            round_trip=max(0.0, statistics.median(short)),
            between=statistics.median(between),
            step=statistics.median(step),
            alone=statistics.median(alone),
            shared_prefill=statistics.median(shared),
            shared_between=statistics.median(shared_between),
        )

    async def _counters(self) -> Counters:
        """Of all instances, now: they tell them once a second."""
        await asyncio.sleep(COUNTERS_LAG_S)
        return (await self._client.stats()).counters

    async def _ask(self, lengths: Sequence[tuple[int, int]], *, is_shared: bool = False) -> list[list[float]]:
        """Requests at once, (prompt, answer) each: when each token came, s after all were sent."""
        loop = asyncio.get_running_loop()
        start = loop.time()

        async def one(number: int, prompt_tokens: int, max_tokens: int) -> list[float]:
            prompt = [(number * 7919 + i * 31) % self._vocab_size for i in range(prompt_tokens)]
            params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
            came: list[float] = []
            async for chunk in self._client.generate(prompt, params, spread="all" if is_shared else 1):
                came += [loop.time() - start] * len(chunk.token_ids)
            return came

        first, self._num_asked = self._num_asked, self._num_asked + len(lengths)  # no prompt twice: it would be cached
        return await asyncio.gather(*(one(first + i, *pair) for i, pair in enumerate(lengths)))


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A trace that a service was asked for."""

    timings: list[Timing]
    prefill_s: float
    """What the lanes' steps took on all instances together."""
    decode_s: float


async def replay_counted(client: AsyncClient, trace: Sequence[Arrival], vocab_size: int, timeout_s: float) -> Replayed:
    """Replay a trace. Raises DistattnError."""
    await asyncio.sleep(COUNTERS_LAG_S)
    before = (await client.stats()).counters
    timings = await replay(client, trace, vocab_size, timeout_s=timeout_s)
    await asyncio.sleep(COUNTERS_LAG_S)
    after = (await client.stats()).counters
    step_s, decode_s = (after.step_us - before.step_us) / 1e6, (after.decode_us - before.decode_us) / 1e6
    return Replayed(timings=timings, prefill_s=step_s - decode_s, decode_s=decode_s)


def fit(base: Profile, measured: Measured, instances: int) -> Profile:
    """`base` with what was measured.

    A row is as many operations whether it is a prompt's or a decode's, and attends to `reach` tokens at the cost of the rest of
    it: so a prompt says what all rows take, and a decode of one row what a step takes besides.
    """
    steps = -(-SHARED // base.chunk_tokens)
    prompt_s = measured.alone - measured.round_trip - steps * measured.step
    row = max(1e-9, prompt_s / (SHARED + SHARED**2 / (2 * base.reach)))
    # the Reserve, its answer and the Admit, and a message more at either end of both ways of the client
    link_s = max(1e-4, (measured.round_trip - measured.between) / 6)
    host_s = max(1e-4, measured.between - measured.step)
    profile = msgspec.structs.replace(
        base,
        prefill=LaneTimes(base=measured.step, row=row, attended=row / base.reach),
        decode=LaneTimes(base=max(0.0, measured.step - row), row=row, attended=row / base.reach),
        link_s=link_s,
        host_s=host_s,
        meet_s=host_s + 2 * link_s,
    )
    step_s = profile.decode.of(Load(1, SHARED // instances, 0, 0))
    exchange_s = max(0.0, measured.shared_between - max(step_s, measured.between))
    alone = Arrival(at_s=0, prompt_tokens=SHARED, max_tokens=1)
    (shared,) = simulate(Setting(profile=profile, instances=instances, policy="all"), [alone]).timings
    shared_steps = -(-SHARED // (base.chunk_tokens * instances))
    prefill_exchange_s = max(0.0, measured.shared_prefill - (shared.ttft_s or 0.0)) / shared_steps
    return msgspec.structs.replace(
        profile,
        prefill=msgspec.structs.replace(profile.prefill, exchange=prefill_exchange_s),
        decode=msgspec.structs.replace(profile.decode, exchange=exchange_s),
    )


def scaled(profile: Profile, factor: float) -> Profile:
    """All steps so many times as long."""
    return msgspec.structs.replace(
        profile,
        prefill=profile.prefill.scaled(fixed=factor, row=factor, attended=factor),
        decode=profile.decode.scaled(fixed=factor, row=factor, attended=factor),
    )


def level(
    profile: Profile, instances: int, trace: Sequence[Arrival], *, prefill_s: float, decode_s: float
) -> tuple[Profile, Outcome]:
    """The profile with which the trace's steps take as long together as was counted, and decodes as much of it; and what comes
    of it.

    Two numbers are looked for at once: what all steps are scaled by, in half steps (longer ones get into each other's way more,
    so the sum grows faster than the number), and by how much prompts slow decodes down. Where decodes took less than they do
    undisturbed their part stays too large.
    """
    for _ in range(LEVELLINGS):
        outcome = simulate(Setting(profile=profile, instances=instances), trace)
        simulated_s = outcome.prefill_s + outcome.decode_s
        if not outcome.prefill_s or not outcome.decode_s:
            break
        longer = (prefill_s + decode_s) / simulated_s
        slower = decode_s / prefill_s / (outcome.decode_s / outcome.prefill_s)
        beside = max(1.0, min(profile.decode_beside * slower, MOST_BESIDE))
        if abs(longer - 1) < LEVEL and abs(beside / profile.decode_beside - 1) < LEVEL:
            break
        profile = msgspec.structs.replace(scaled(profile, math.sqrt(longer)), decode_beside=beside)
    return profile, outcome
