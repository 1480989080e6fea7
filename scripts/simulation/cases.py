"""A trace under several policies, rates and numbers of instances, and what came of it."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import msgspec
from _trace import BLOCK_TOKENS, Arrival, TraceError, read_trace, trace_of
from bench_serve import Group, Objectives, percentile, summarise
from make_trace import Settings, make_trace

from simulation.service import Outcome, Setting, simulate

MIX = "mix:"
"""What a trace is called that `make_trace` writes."""
CURVE_POINTS = 400
"""Most points of a curve in a report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One simulation."""

    setting: Setting
    trace: str
    rate: float | None
    """Requests per second, on average; None: as the trace says."""
    arrivals: Sequence[Arrival]
    objectives: Objectives


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a case."""

    trace: str
    rate: float | None
    policy: str
    instances: int
    grain: int
    figures: Group
    """Of all requests."""
    groups: list[Group]
    """Of those of each name, if there are several."""
    kv_use: float
    """Mean over time of the part of all blocks that hold KV or are reserved."""
    kv_use_most: float
    kv_curve: list[tuple[float, float]]
    """(second, part)."""
    preemptions: int
    home_moves: int
    prefix_queries: int
    """Prompt tokens that were looked for among what was kept."""
    prefix_hits: int
    """Those that were found."""
    followed: int
    """Runs that were copied from what was their home: of as many homes that moved the KV followed before the end."""
    follow_p50_s: float | None
    """From when the home moved until it had followed; None: of none."""
    follow_p99_s: float | None
    rounds: int
    """Steps of parties."""
    busy: float
    """Part of the time that a device ran a step, on average; both lanes at once count twice."""
    simulated_s: float
    wall_s: float
    """That the simulation took."""


def run(case: Case) -> Result:
    """Simulate it. Raises SimulationError, or RuntimeError for books that contradict each other."""
    outcome = simulate(case.setting, case.arrivals)
    groups = summarise(outcome.timings, case.objectives)
    return Result(
        trace=case.trace,
        rate=case.rate,
        policy=case.setting.policy,
        instances=case.setting.instances,
        grain=case.setting.grain,
        figures=msgspec.structs.replace(groups[-1], name="all"),
        groups=groups[:-1],
        kv_use=outcome.mean_kv_use,
        kv_use_most=max((use for _, use in outcome.kv_use), default=0.0),
        kv_curve=_thinned(outcome),
        preemptions=outcome.preemptions,
        home_moves=outcome.home_moves,
        prefix_queries=outcome.prefix_queries,
        prefix_hits=outcome.prefix_hits,
        followed=len(outcome.follows_s),
        follow_p50_s=percentile(outcome.follows_s, 50),
        follow_p99_s=percentile(outcome.follows_s, 99),
        rounds=outcome.rounds,
        busy=outcome.busy,
        simulated_s=outcome.ended_s,
        wall_s=outcome.wall_s,
    )


def run_all(cases: Sequence[Case], jobs: int = 1) -> Iterator[Result]:
    """In their order, so many at a time in processes of their own. Raises as `run`."""
    if jobs == 1:
        yield from map(run, cases)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(run, cases)


def _thinned(outcome: Outcome) -> list[tuple[float, float]]:
    step = -(-len(outcome.kv_use) // CURVE_POINTS) or 1
    return [(round(at, 3), round(use, 6)) for at, use in outcome.kv_use[::step]]


# --- traces -----------------------------------------------------------------------------------------------------------


def arrivals_of(
    source: str,
    *,
    requests: int = 200,
    seed: int = 0,
    scale: float = 1.0,
    turns: int = 1,
    block_tokens: int = BLOCK_TOKENS,
) -> list[Arrival]:
    """Of `mix:N`, which `make_trace` draws (at one request per second), or as `read_trace` has it. Raises TraceError.

    `requests`, `seed` and `turns` are a mix's alone.
    """
    if not source.startswith(MIX):
        return read_trace(source, scale, block_tokens)
    try:
        mix = int(source.removeprefix(MIX))
        settings = Settings(
            mix=mix,
            requests=requests,
            seed=seed,
            scale=scale,
            answer_scale=scale,
            turns=turns,
            block_tokens=block_tokens,
        )
    except ValueError as error:
        raise TraceError(f"{source}: {error}") from error
    return trace_of(make_trace(settings), block_tokens)


def at_rate(arrivals: Sequence[Arrival], rate: float | None) -> list[Arrival]:
    """The same requests, faster or slower, so that so many come in a second on average. Raises TraceError."""
    if rate is None:
        return list(arrivals)
    last_s = max(arrival.at_s for arrival in arrivals)
    if not last_s:
        raise TraceError("all requests of the trace come at once: it has no rate that could be changed")
    factor = len(arrivals) / last_s / rate
    return [msgspec.structs.replace(arrival, at_s=arrival.at_s * factor) for arrival in arrivals]
