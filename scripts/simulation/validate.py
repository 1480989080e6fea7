"""The same trace for real, on the CPU, and simulated with step times that were measured in the same service.

1. A service of a few instances is asked for single requests, again and again: what a step and a row take, a message, the host's
   work between two steps, what it costs when rows travel, and how much longer decodes take beside prompts (`Sweep`, `fit`).
2. It replays the trace, and counts what its steps took together.
3. The trace is simulated. A machine is not as fast at all times, least of all one that others use, so all coefficients are
   scaled until the steps that are simulated take as long together as was counted (`level`). Who waits for whom, what runs
   beside what, and when each token comes is the simulator's.
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
MOST_BESIDE, BESIDE, BESIDES = 16.0, 0.02, 12
"""Largest factor by which prompts slow decodes down, how near it is looked for, relative, and how often."""
LEVELLINGS = 16
LEVEL = 0.01
"""How far, relative, the sum of all steps may be from what was counted."""


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
    crowded: float
    """From one token to the next where each instance decodes and prefills at once, over the time that these prompts take.

    Means: a lane's waits for the other are rare and long.
    """


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
        crowded: list[float] = []
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
            crowded.append(crowding(await self._ask(crowd(self._instances))))
        return Measured(
            round_trip=max(0.0, statistics.median(short)),
            between=statistics.median(between),
            step=statistics.median(step),
            alone=statistics.median(alone),
            shared_prefill=statistics.median(shared),
            shared_between=statistics.median(shared_between),
            crowded=statistics.median(crowded),
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


def crowd(instances: int) -> list[tuple[int, int]]:
    """(prompt, answer) of requests at once that give each instance an answer and a prompt to work on."""
    return [(SHORT, ANSWER)] * instances + [(SHARED, 1)] * instances


def crowding(came: Sequence[Sequence[float]]) -> float:
    """`Measured.crowded`, of when the tokens of a crowd came: of the answers those until the first prompt was done."""
    half = len(came) // 2
    prompts = [each[0] for each in came[half:]]
    gaps = [b - a for each in came[:half] for a, b in pairwise(each) if a < min(prompts)]
    return statistics.fmean(gaps) / statistics.fmean(prompts) if gaps else 0.0


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A trace that a service was asked for."""

    timings: list[Timing]
    step_s: float
    """What steps took on all instances together, both lanes."""


async def replay_counted(client: AsyncClient, trace: Sequence[Arrival], vocab_size: int, timeout_s: float) -> Replayed:
    """Replay a trace. Raises DistattnError."""
    await asyncio.sleep(COUNTERS_LAG_S)
    before = (await client.stats()).counters.step_us
    timings = await replay(client, trace, vocab_size, timeout_s=timeout_s)
    await asyncio.sleep(COUNTERS_LAG_S)
    return Replayed(timings=timings, step_s=((await client.stats()).counters.step_us - before) / 1e6)


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
    profile = msgspec.structs.replace(
        profile,
        prefill=msgspec.structs.replace(profile.prefill, exchange=prefill_exchange_s),
        decode=msgspec.structs.replace(profile.decode, exchange=exchange_s),
    )
    return beside(profile, measured.crowded, instances)


def beside(profile: Profile, crowded: float, instances: int) -> Profile:
    """With the factor by which a decode step takes longer beside a prompt of its own instance than its share of the cores says.

    Only the proportion to the prompts is fitted: how busy the cores are with other things is `level`'s.
    """
    trace = [Arrival(at_s=0, prompt_tokens=prompt, max_tokens=answer) for prompt, answer in crowd(instances)]
    for _ in range(BESIDES):
        timings = simulate(Setting(profile=profile, instances=instances), trace).timings
        simulated = crowding([timing.token_s for timing in timings])
        if not crowded or not simulated:
            return profile
        factor = max(1.0, min(profile.decode_beside * crowded / simulated, MOST_BESIDE))
        if abs(factor / profile.decode_beside - 1) < BESIDE:
            return profile
        profile = msgspec.structs.replace(profile, decode_beside=factor)
    return profile


def scaled(profile: Profile, factor: float) -> Profile:
    """All steps so many times as long."""
    return msgspec.structs.replace(
        profile,
        prefill=profile.prefill.scaled(fixed=factor, row=factor, attended=factor),
        decode=profile.decode.scaled(fixed=factor, row=factor, attended=factor),
    )


def level(profile: Profile, instances: int, trace: Sequence[Arrival], step_s: float) -> tuple[Profile, Outcome]:
    """The profile scaled so that the trace's steps take as long together as was counted, and what comes of it.

    Longer steps get into each other's way more, so the sum grows faster than the factor; it is looked for by halving.
    """
    factor, low, high = 1.0, 0.0, math.inf
    for _ in range(LEVELLINGS):
        outcome = simulate(Setting(profile=scaled(profile, factor), instances=instances), trace)
        if not outcome.step_s or abs(step_s / outcome.step_s - 1) < LEVEL:
            break
        if outcome.step_s < step_s:
            low = factor
        else:
            high = factor
        if low and high < math.inf:
            factor = math.sqrt(low * high)
        else:
            factor *= step_s / outcome.step_s
    return scaled(profile, factor), outcome
