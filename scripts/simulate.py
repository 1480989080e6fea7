#!/usr/bin/env python3
"""Simulate a service under a trace: what decides is the service's own code, only clock, messages and devices are made up.

    simulate.py run       throughput, latencies, goodput and KV use by policy, over rates, numbers of instances or traces
    simulate.py search    how many instances should prefill and how many decode (DistServe's placement search)
    simulate.py validate  the same trace for real, on the CPU, and simulated with step times that were measured there
    simulate.py times     write the step times that are simulated, to be edited and given back with --times

A trace is what `bench_serve.py` takes: a file in our own form or in Mooncake's, or the name of a built-in one; or `mix:N`, mix
N of `make_trace.py`. Policies are the gManager's (`--policy`; `split:N`: N instances prefill, else half of them), its
`--spread` under the policy that is its default (auto, all, or a number), `separate` (each instance a cell of its own, which
shares nothing) and `large` (one instance with all memory, whose devices share every step). Step times are those of an 8B model
on H200s unless --times says others. docs/simulator.md says what is real, and how near it comes.

Exit code 0, 1 if `validate` found the two too far apart, 2 if something can't be simulated or started, 130 if
interrupted.
"""

import argparse
import asyncio
import datetime
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
from _setup import ROOT
from _trace import BLOCK_TOKENS, TRACES, TraceError
from _validation import Round
from bench_serve import Objectives, versions
from simulation.cases import MIX, Case, Result, arrivals_of, at_rate, run_all
from simulation.instance import SimulationError
from simulation.plots import draw
from simulation.search import MOST_REQUESTS, Search, Split, Tried
from simulation.service import DEFAULT_POLICY, LARGE, SEPARATE, Setting
from simulation.times import H200_8B, Profile, TimesError, read_stats, read_times, write_times

from gmanager import DistattnError
from gmanager.cli.process import ServiceError
from gmanager.config import PolicyName

REPORT = "simulate.json"
POLICIES = [*get_args(PolicyName), SEPARATE, LARGE]
PICTURE = "simulate.png"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """simulate.json."""

    schema: int = 2
    """1 had the times between tokens under the name of TPOT."""
    date: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    arguments: dict[str, Any]
    profile: Profile
    results: list[Result] = []
    splits: list[Split] = []
    """Of `search`, the best first."""
    tried: list[Tried] = []
    rounds: list[Round] = []
    """Of `validate`."""


# --- run --------------------------------------------------------------------------------------------------------------


def cases_of(args: argparse.Namespace, profile: Profile) -> list[Case]:
    """One for each trace, rate, number of instances and policy. Raises TraceError, and ValueError for a bad setting."""
    objectives = Objectives(ttft_s=args.slo_ttft, tpot_s=args.slo_tpot)
    traces = {source: arrivals_from(args, source) for source in args.trace}
    cases = []
    for source, rate, instances, policy in itertools.product(args.trace, args.rates, args.instances, args.policies):
        cases.append(
            Case(
                setting=setting_of(args, profile, instances, policy),
                trace=source,
                rate=rate,
                arrivals=at_rate(traces[source], rate),
                objectives=objectives,
            )
        )
    return cases


def arrivals_from(args: argparse.Namespace, source: str) -> list[Any]:
    return arrivals_of(
        source,
        requests=args.requests,
        seed=args.seed,
        scale=args.scale,
        turns=args.turns,
        block_tokens=args.block_tokens,
    )


def setting_of(args: argparse.Namespace, profile: Profile, instances: int, policy: str) -> Setting:
    """`split` compares prompts with decode steps, and a coarse one stands for many: its grain is always 1."""
    return Setting(
        profile=profile,
        instances=instances,
        policy=policy,
        grain=1 if policy.partition(":")[0] == "split" else args.grain,
        max_queue_wait_s=args.max_queue_wait,
        limit_s=args.limit,
        prefix_cache=not args.no_prefix_cache,
    )


def run(args: argparse.Namespace, profile: Profile) -> Report:
    cases = cases_of(args, profile)
    results = []
    for result in run_all(cases, args.jobs):
        results.append(result)
        told = "" if result.rate is None else f", {result.rate:g}/s"
        print(
            f"{result.trace}{told}, {result.instances} instances, {result.policy}: {result.simulated_s:,.1f} s simulated in "
            f"{result.wall_s:.1f} s",
            flush=True,
        )
    print_results(results)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(results, args.out / PICTURE, profile.name)
    print(f"written: {args.out / PICTURE}")
    return report_of(args, profile, results=results)


def print_results(results: Sequence[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    def shown(value: float | None, factor: float, digits: int) -> str:
        return "-" if value is None else f"{value * factor:,.{digits}f}"

    table = Table(title="simulated")
    for name in ("trace", "rate", "instances", "policy"):
        table.add_column(name)
    for name in ("failed", "refused", "completed/s", "goodput/s", "prompt tok/s", "output tok/s", "TTFT s p50", "p99"):
        table.add_column(name, justify="right")
    for name in ("TPOT ms p50", "p99", "ITL ms p50", "p99", "KV %", "most", "prefix %", "preempted"):
        table.add_column(name, justify="right")
    for name in ("homes moved", "followed", "after s p50", "busy %"):
        table.add_column(name, justify="right")
    for result in results:
        g = result.figures
        case = [
            Path(result.trace).name,
            "-" if result.rate is None else f"{result.rate:g}",
            str(result.instances),
            result.policy,
        ]
        rates = [shown(g.completed_per_s, 1, 3), shown(g.goodput_per_s, 1, 3)]
        rates += [shown(g.prompt_tokens_per_s, 1, 0), shown(g.output_tokens_per_s, 1, 1)]
        seconds = [
            shown(g.ttft_p50_s, 1, 3),
            shown(g.ttft_p99_s, 1, 3),
            shown(g.tpot_p50_s, 1e3, 2),
            shown(g.tpot_p99_s, 1e3, 2),
            shown(g.itl_p50_s, 1e3, 2),
            shown(g.itl_p99_s, 1e3, 2),
        ]
        kv = [shown(result.kv_use, 100, 1), shown(result.kv_use_most, 100, 1)]
        found = result.prefix_hits / result.prefix_queries if result.prefix_queries else None
        kv += [shown(found, 100, 1), str(result.preemptions), str(result.home_moves)]
        kv += [str(result.followed), shown(result.follow_p50_s, 1, 2)]
        table.add_row(*case, str(g.failed), str(g.refused), *rates, *seconds, *kv, shown(result.busy, 100, 0))
    Console(width=None if sys.stdout.isatty() else 280).print(table)


# --- search -----------------------------------------------------------------------------------------------------------


def search(args: argparse.Namespace, profile: Profile) -> Report:
    tried: list[Tried] = []

    def tell(one: Tried) -> None:
        tried.append(one)
        print(f"{one.phase} on {one.instances} at {one.rate:.3g}/s: {one.attained:.1%} meet the objective", flush=True)

    arrivals = arrivals_from(args, args.trace)

    def search_of(policy: str) -> Search:
        return Search(
            setting=setting_of(args, profile, args.instances, policy),
            arrivals=arrivals,
            ttft_s=args.slo_ttft,
            tpot_s=args.slo_tpot,
            attain=args.attain,
            most_requests=args.most_requests,
            tell=tell,
        )

    looked_for = search_of(args.policy)
    splits = looked_for.best() if args.instances > 1 else []
    together = looked_for.goodput("both", args.instances)
    as_policy = search_of(f"split:{splits[0].prefill}").goodput("both", args.instances) if splits else 0.0
    print()
    for split in splits:
        print(
            f"{split.prefill} prefill, {split.decode} decode: {split.rate:.3g} requests/s "
            f"({split.prefill_rate:.3g} and {split.decode_rate:.3g})"
        )
    print(f"all {args.instances} do both: {together:.3g} requests/s")
    if splits:
        best = splits[0]
        print(
            f"best numbers: {best.prefill} prefill, {best.decode} decode; with all that they share, as split: {as_policy:.3g}"
        )
    if args.rate is not None:
        needed = {phase: looked_for.fewest(phase, args.rate) for phase in ("prefill", "decode")}
        said = [f"{count or f'more than {args.instances}'} {phase}" for phase, count in needed.items()]
        print(f"for {args.rate:g} requests/s: {', '.join(said)}")
    return report_of(args, profile, splits=splits, tried=tried)


# --- validate ---------------------------------------------------------------------------------------------------------


COMPARED = {
    "completed requests/s": "completed_per_s",
    "output tokens/s": "output_tokens_per_s",
    "TTFT s p50": "ttft_p50_s",
    "TTFT s p99": "ttft_p99_s",
    "TPOT s p50": "tpot_p50_s",
    "ITL s p50": "itl_p50_s",
    "request s p50": "request_p50_s",
}
"""What is shown of both sides."""
JUDGED = ("completed requests/s", "TTFT s p50")


def validate(args: argparse.Namespace, profile: Profile) -> Report:
    """Raises Apart if the simulation is too far from the service, and what `_validation.validate` raises."""
    from _validation import validate as compare

    trace = at_rate(arrivals_from(args, args.trace), args.rate)
    work = compare(
        trace, instances=args.instances, kv_tokens=args.kv_tokens, rounds=args.rounds, folder=args.out / "validation"
    )
    measured, rounds = asyncio.run(work)
    print(f"measured: {measured}")
    for number, one in enumerate(rounds, 1):
        slower = f"decodes {one.profile.decode_beside:.2f} times as long beside prompts"
        print(f"round {number}: steps took {one.prefill_s:,.1f} and {one.decode_s:,.1f} s together; {slower}")
        for name, field in COMPARED.items():
            real, simulated = getattr(one.real, field), getattr(one.simulated, field)
            ratio = f"{simulated / real:.3f}" if real and simulated is not None else "-"
            print(f"  {name:22} real {real or 0:10.4f}   simulated {simulated or 0:10.4f}   {ratio}")
    medians = {name: statistics.median(ratios_of(rounds, COMPARED[name])) for name in JUDGED}
    far = [f"{name}: {median:.3f} in the median" for name, median in medians.items() if abs(median - 1) > args.within]
    print(", ".join(f"{name}: {median:.3f}" for name, median in medians.items()), "in the median")
    report = report_of(args, profile, rounds=rounds)
    if far:
        write(args, report)
        raise Apart(f"simulated over real is off by more than {args.within:.0%}: {'; '.join(far)}")
    return report


class Apart(Exception):
    """The simulation is too far from the service."""


def ratios_of(rounds: Sequence[Round], field: str) -> list[float]:
    """Simulated over real, of each round; infinite where one side has nothing."""
    sides = [(getattr(one.simulated, field), getattr(one.real, field)) for one in rounds]
    return [simulated / real if simulated and real else math.inf for simulated, real in sides]


# --- reports ----------------------------------------------------------------------------------------------------------


def write(args: argparse.Namespace, report: Report) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / REPORT).write_bytes(msgspec.json.encode(report))
    print(f"written: {args.out / REPORT}")


def report_of(args: argparse.Namespace, profile: Profile, **parts: Any) -> Report:
    said = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return Report(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
        arguments={name: value for name, value in said.items() if name != "work"},
        profile=profile,
        **parts,
    )


# --- the program ------------------------------------------------------------------------------------------------------


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("simulate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, work: Any, about: str) -> argparse.ArgumentParser:
        one: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
        one.set_defaults(work=work)
        one.add_argument("--times", type=Path, metavar="FILE", help="step times and memory of an instance (default: H200, 8B)")
        one.add_argument("--kv-tokens", type=int, help="of each instance (as the times say)")
        return one

    def shared(one: argparse.ArgumentParser) -> None:
        one.add_argument("--requests", type=int, default=200, help="of a mix (%(default)d)")
        one.add_argument("--seed", type=int, default=0, help="of a mix (%(default)d)")
        one.add_argument("--turns", type=int, default=1, help="questions about each long prompt of a mix (%(default)d)")
        one.add_argument("--scale", type=float, default=1.0, help="times the tokens of each request (%(default)g)")
        one.add_argument("--block-tokens", type=int, default=BLOCK_TOKENS, help="what a hash id stands for (%(default)d)")
        one.add_argument(
            "--grain", type=int, default=1, help="tokens simulated as one, to be faster; not of split (%(default)d)"
        )
        one.add_argument("--max-queue-wait", type=float, default=600.0, help="as the gManager's flag (%(default)g)")
        one.add_argument("--no-prefix-cache", action="store_true", help="as the gManager's --prefix-cache off")
        one.add_argument(
            "--limit", type=float, default=100_000.0, help="simulated seconds after which to give up (%(default)g)"
        )
        one.add_argument("--out", type=Path, default=ROOT / "results", help=f"folder of {REPORT} and {PICTURE}")

    names = f"a file, {MIX}N or one of {', '.join(TRACES)}"
    one = command("run", run, "throughput, latencies, goodput and KV use by policy")
    one.add_argument("--trace", nargs="+", default=[f"{MIX}5"], help=f"{names} (mix:5)")
    one.add_argument("--rates", nargs="+", type=float, default=[None], help="requests per second, on average (as in the trace)")
    one.add_argument("--instances", nargs="+", type=int, default=[8], help="1 to 1024 (8)")
    one.add_argument("--policies", nargs="+", default=POLICIES, help=f"({' '.join(POLICIES)})")
    one.add_argument("--slo-ttft", type=float, help="seconds to the first token that count as goodput")
    one.add_argument("--slo-tpot", type=float, help="seconds between tokens, in a request's mean, that count as goodput")
    one.add_argument("--jobs", type=int, default=1, help="simulations at a time (%(default)d)")
    shared(one)
    one = command("search", search, "how many instances should prefill and how many decode")
    one.add_argument("--trace", default=f"{MIX}5", help=f"{names} (%(default)s)")
    one.add_argument("--instances", type=int, default=8, help="of both kinds together (%(default)d)")
    one.add_argument("--policy", default=DEFAULT_POLICY, help="among the instances of a kind (%(default)s)")
    one.add_argument("--slo-ttft", type=float, required=True, help="seconds to the first token")
    one.add_argument("--slo-tpot", type=float, required=True, help="seconds between tokens, in a request's mean")
    one.add_argument("--attain", type=float, default=0.9, help="part of the requests that must meet them (%(default)g)")
    one.add_argument("--most-requests", type=int, default=MOST_REQUESTS, help="of one simulation (%(default)d)")
    one.add_argument("--rate", type=float, help="also say the fewest instances of each kind for so many requests per second")
    shared(one)
    one = command("validate", validate, "the same trace for real, on the CPU, and simulated")
    one.add_argument("--trace", default=f"{MIX}2", help=f"{names} (%(default)s)")
    one.add_argument("--rate", type=float, help="requests per second, on average (as in the trace)")
    one.add_argument("--instances", type=int, default=3, help="to start (%(default)d)")
    one.add_argument("--rounds", type=int, default=3, help="the trace is replayed so often; medians count (%(default)d)")
    one.add_argument("--within", type=float, default=0.15, help="how far throughput and median TTFT may be off (%(default)g)")
    shared(one)
    one.set_defaults(requests=160, scale=0.04, kv_tokens=4096)
    one = command("times", write_profile, "write the step times, to be edited")
    one.add_argument("--out", type=Path, default=ROOT / "results" / "times.json", help="the file")
    one.add_argument("--stats", type=Path, metavar="FILE", help="take them from what `distattn status --json` printed")
    args = parser.parse_args(words)
    check(parser, args)
    return args


COUNTS = ("instances", "requests", "turns", "block_tokens", "grain", "jobs", "kv_tokens", "rounds", "most_requests")
POSITIVE = ("scale", "max_queue_wait", "limit", "rate", "rates", "within")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with exit code 2 for numbers that make no sense."""
    counts = {
        name: value if isinstance(value, list) else [value]
        for name, value in vars(args).items()
        if name in COUNTS and value is not None
    }
    for name, values in counts.items():
        if min(values) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {min(values)}")
    if max(counts.get("instances", [1])) > 1024:
        parser.error(f"--instances is at most 1024, got {max(counts['instances'])}")
    for name in POSITIVE:
        value = getattr(args, name, None)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and not (math.isfinite(each) and each > 0):
                parser.error(f"--{name.replace('_', '-')} must be positive, got {each}")


def write_profile(args: argparse.Namespace, profile: Profile) -> None:
    if args.stats is not None:
        profile = read_stats(args.stats, profile)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_times(profile, args.out)
    print(f"written: {args.out}")


def main() -> int:
    args = parse()
    try:
        profile = H200_8B if args.times is None else read_times(args.times)
        if args.kv_tokens is not None:
            profile = msgspec.structs.replace(profile, kv_tokens=args.kv_tokens)
        report = args.work(args, profile)
        if report is not None:
            write(args, report)
    except Apart as apart:
        print(f"simulate.py: {apart}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=sys.stderr)
        return 130
    except (ServiceError, DistattnError, TimesError, TraceError, SimulationError, ValueError, OSError) as error:
        print(f"simulate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
