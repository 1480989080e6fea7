#!/usr/bin/env python3
"""TTFT, TPOT, ITL and throughput of a service under a trace of requests: one that runs (--gmanager) or one started for it.

A trace is a file of JSON lines in one of two forms, or the name of a built-in one. Our own form:

    {"at_s": 0.5, "prompt_tokens": 1024, "max_tokens": 128, "name": "short"}

`at_s`: when it arrives, seconds after the start. With "after_first_tokens": true it is seconds after all requests without that
word have had their first token. And the form that Mooncake publishes, which `make_trace.py` writes:

    {"timestamp": 500, "input_length": 1024, "output_length": 128, "hash_ids": [0, 1]}

`timestamp`: milliseconds. A hash id stands for `--block-tokens` of the prompt, the same id for the same tokens; requests that
begin as one before them did are the group "again". Prompts are random token ids, another seed makes others; answers are greedy
and don't end before their length. Times are those that the client sees, from when a request was due, so that a late client
hides nothing. ITL is any time between consecutive tokens of one request, TPOT their mean in a request, which is what an
objective is about. Completed requests and goodput are per second from the first that was due to the last token of all.

Exit code 0, 1 if a request failed or was not finished in time, 2 if something could not be started, 130 if interrupted.
"""

import argparse
import asyncio
import datetime
import importlib.metadata
import math
import os
import platform
import signal
import statistics
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from _replay import Timing, replay
from _setup import CACHE, ROOT
from _trace import BLOCK_TOKENS, TRACES, Arrival, TraceError, read_trace

from gmanager import AsyncClient, CellStats, DistattnError
from gmanager.cli.assets import MODEL, FetchError, fetch
from gmanager.cli.needle import processor
from gmanager.cli.process import NO_BARS, ServiceError
from gmanager.cli.service import SLACK, ServiceConfig

REPORT = "bench_serve.json"


COUNTERS_LAG_S = 2.0
"""Instances tell their counters once a second."""


class BenchError(Exception):
    """The service can't be measured."""


# --- figures ----------------------------------------------------------------------------------------------------------


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of the requests of one name. None: there was nothing to measure."""

    name: str
    count: int
    failed: int
    """All that are not complete."""
    refused: int
    """Those of the failed that the service said no to."""
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    """Of the requests' means."""
    tpot_p99_s: float | None
    itl_p50_s: float | None
    """Of all times between tokens: a long answer counts for more."""
    itl_p99_s: float | None
    request_p50_s: float | None
    """From due to last token."""
    request_p99_s: float | None
    total_s: float | None
    """From the first that was due to the last token of all."""
    prompt_tokens_per_s: float | None
    """Over `total_s`; of prompts whose first token has come."""
    output_tokens_per_s: float | None
    completed_per_s: float | None
    """Requests that got all their tokens, over `total_s`."""
    goodput_per_s: float | None
    """Those of them that met the objectives; None without objectives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Objectives:
    """What a request must reach to count as goodput. None: anything will do. Raises ValueError if one can't be reached."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    """Mean time between its tokens."""

    def __post_init__(self) -> None:
        for flag, value in (("--slo-ttft", self.ttft_s), ("--slo-tpot", self.tpot_s)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{flag} must be positive, got {value}")

    def __bool__(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    def met_by(self, timing: Timing) -> bool:
        """Only a complete request can."""
        if timing.error is not None or timing.ttft_s is None:
            return False
        slow = self.tpot_s is not None and timing.tpot_s is not None and timing.tpot_s > self.tpot_s
        return not slow and (self.ttft_s is None or timing.ttft_s <= self.ttft_s)


NO_OBJECTIVES = Objectives()


def percentile(values: Sequence[float], percent: int) -> float | None:
    """Linear between the two nearest; None of nothing."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def summarise(timings: Sequence[Timing], objectives: Objectives = NO_OBJECTIVES) -> list[Group]:
    """A group for each name, in order of appearance, and one of all.

    If some came after the first tokens of the others: also the others "beside" them, from when these were due until they had
    their own first tokens.
    """
    names = list(dict.fromkeys(timing.arrival.name for timing in timings))
    groups = [_group(name, [t for t in timings if t.arrival.name == name], objectives) for name in names]
    late = [t for t in timings if t.arrival.after_first_tokens and t.ttft_s is not None]
    if late:
        early = [t for t in timings if not t.arrival.after_first_tokens]
        name = " beside ".join("/".join(dict.fromkeys(t.arrival.name for t in some)) for some in (early, late))
        window = min(t.due_s for t in late if t.due_s is not None), max(t.token_s[0] for t in late)
        groups.append(_group(name, early, objectives, window))
    if len(names) > 1:
        groups.append(_group("all", timings, objectives))
    return groups


def _group(name: str, timings: Sequence[Timing], objectives: Objectives, window: tuple[float, float] | None = None) -> Group:
    """With a `window`, only what came in it counts, and only the times between tokens are measured."""
    start, end = window or (-math.inf, math.inf)
    gaps = [gap for t in timings for gap in t.gaps_s(start, end)]
    ttfts = [] if window else [t.ttft_s for t in timings if t.ttft_s is not None]
    tpots = [] if window else [t.tpot_s for t in timings if t.tpot_s is not None]
    totals = [] if window else [t.total_s for t in timings if t.total_s is not None]
    came = [at for t in timings for at in t.token_s if start <= at <= end]
    begun = start if window else min((t.due_s for t in timings if t.due_s is not None), default=0.0)
    elapsed = (end if window else max(came)) - begun if came else None
    prompts = 0 if window else sum(t.arrival.prompt_tokens for t in timings if t.token_s)
    return Group(
        name=name,
        count=len(timings),
        failed=sum(t.error is not None for t in timings),
        refused=sum(t.refused is not None for t in timings),
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p99_s=percentile(ttfts, 99),
        tpot_p50_s=percentile(tpots, 50),
        tpot_p99_s=percentile(tpots, 99),
        itl_p50_s=percentile(gaps, 50),
        itl_p99_s=percentile(gaps, 99),
        request_p50_s=percentile(totals, 50),
        request_p99_s=percentile(totals, 99),
        total_s=elapsed,
        prompt_tokens_per_s=prompts / elapsed if elapsed and prompts else None,
        output_tokens_per_s=len(came) / elapsed if elapsed else None,
        completed_per_s=sum(t.error is None for t in timings) / elapsed if elapsed and not window else None,
        goodput_per_s=sum(map(objectives.met_by, timings)) / elapsed if elapsed and objectives and not window else None,
    )


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """bench_serve.json."""

    schema: int = 2
    """1 had the times between tokens under the name of TPOT."""
    date: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    hardware: dict[str, str]
    cell: CellStats
    arguments: dict[str, Any]
    groups: list[Group]
    counters: dict[str, int]
    """What the service counted from the start of the replay to its end."""
    requests: list[Timing]


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter to speed, as installed here."""
    found = {"python": platform.python_version()}
    for package in ("distattn", "torch", "triton", "transformers", "pyzmq", "msgspec"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # where only the client is installed
    return found


def gpus(folder: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """Names of this machine's GPUs, from the driver: asking CUDA would take memory from the service."""
    names = [
        line.partition(":")[2].strip()
        for file in sorted(folder.glob("*/information"))
        for line in file.read_text().splitlines()
        if line.startswith("Model:")
    ]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"


def print_table(title: str, groups: Sequence[Group]) -> None:
    from rich.console import Console
    from rich.table import Table

    def shown(value: float | None, factor: float, digits: int) -> str:
        return "-" if value is None else f"{value * factor:,.{digits}f}"

    table = Table(title=title)
    table.add_column("requests")
    for name in ("count", "failed", "refused", "TTFT s p50", "p99", "TPOT ms p50", "p99", "ITL ms p50", "p99"):
        table.add_column(name, justify="right")
    for name in ("request s p50", "p99", "total s", "prompt tok/s", "output tok/s", "completed/s", "goodput/s"):
        table.add_column(name, justify="right")
    for g in groups:
        seconds = [
            shown(g.ttft_p50_s, 1, 3),
            shown(g.ttft_p99_s, 1, 3),
            shown(g.tpot_p50_s, 1e3, 2),
            shown(g.tpot_p99_s, 1e3, 2),
            shown(g.itl_p50_s, 1e3, 2),
            shown(g.itl_p99_s, 1e3, 2),
        ]
        seconds += [shown(g.request_p50_s, 1, 3), shown(g.request_p99_s, 1, 3), shown(g.total_s, 1, 3)]
        rates = [shown(g.prompt_tokens_per_s, 1, 0), shown(g.output_tokens_per_s, 1, 1)]
        rates += [shown(g.completed_per_s, 1, 3), shown(g.goodput_per_s, 1, 3)]
        table.add_row(g.name, str(g.count), str(g.failed), str(g.refused), *seconds, *rates)
    Console(width=None if sys.stdout.isatty() else 210).print(table)


# --- the program ------------------------------------------------------------------------------------------------------


async def measure(address: str, trace: Sequence[Arrival], args: argparse.Namespace, device: str) -> int:
    """Replay, print and write. Returns the exit code: 1 if a request is not finished. Raises BenchError, DistattnError."""
    async with AsyncClient(address) as client:
        before = await client.stats()
        cell = next((cell for cell in before.cells if cell.state == "ready"), None)
        if cell is None:
            raise BenchError(f"no cell is ready at {address}")
        vocab_size = args.vocab_size or await asyncio.to_thread(vocabulary, cell.model)
        prompts = sum(arrival.prompt_tokens for arrival in trace)
        print(
            f"{len(trace)} requests, {prompts:,} prompt tokens; {cell.size} instances, {cell.total_tokens:,} tokens of KV",
            flush=True,
        )
        timings = await replay(client, trace, vocab_size, seed=args.seed, timeout_s=args.timeout)
        await asyncio.sleep(COUNTERS_LAG_S)
        after = await client.stats()
    counted = [msgspec.structs.asdict(stats.counters) for stats in (before, after)]
    report = Report(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
        hardware={"processor": processor(), "cores": str(os.cpu_count()), "gpus": gpus(), "device": device},
        cell=cell,
        arguments={name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        groups=summarise(timings, Objectives(ttft_s=args.slo_ttft, tpot_s=args.slo_tpot)),
        counters={name: counted[1][name] - count for name, count in counted[0].items()},
        requests=timings,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / REPORT).write_bytes(msgspec.json.encode(report))
    print_table(f"{args.trace}, scale {args.scale:g}: {cell.model}", report.groups)
    print(f"written: {args.out / REPORT}")
    failed = [timing for timing in timings if timing.error is not None]
    for timing in failed[:10]:
        print(f"failed: {timing.arrival.name}, {timing.arrival.prompt_tokens:,} tokens: {timing.error}", file=sys.stderr)
    if len(failed) > 10:
        print(f"... and {len(failed) - 10} more", file=sys.stderr)
    return 1 if failed else 0


def vocabulary(model: str) -> int:
    """Tokens of a model, by the name that the service knows it by. Raises BenchError."""
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(model).get_text_config().vocab_size)
    except (OSError, ValueError, AttributeError) as error:
        raise BenchError(
            f"{model}, as the service calls it, is not to be found from here; say --vocab-size: {error}"
        ) from error


async def serve_and_measure(trace: Sequence[Arrival], args: argparse.Namespace) -> int:
    """With a service of its own. Raises FetchError, ServiceError and what `measure` raises."""
    import torch
    from rich.console import Console

    from gmanager.cli.progress import progress, shown_running
    from instance.checkpoint import CheckpointError, resolve_checkpoint

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.device_count() >= args.instances else "cpu"
    model = args.model or str((await asyncio.to_thread(fetch, MODEL, CACHE / "model"))[0])
    console = Console(stderr=True, highlight=False)
    try:
        with progress(console) as tell:
            tell(f"looking for {model}, and if it is a GGUF file converting it once")
            path = await asyncio.to_thread(resolve_checkpoint, model, cache_dir=CACHE / "converted")
    except CheckpointError as error:
        raise BenchError(str(error)) from error
    kv_tokens = args.kv_tokens
    if device == "cpu" and kv_tokens is None:  # all of it at once
        kv_tokens = -(-sum(a.prompt_tokens + a.max_tokens + SLACK for a in trace) // args.instances)
    try:
        config = ServiceConfig(
            model=str(path),
            instances=args.instances,
            kv_tokens=kv_tokens,
            kv_memory=args.kv_memory,
            device=device,
            dtype=args.dtype or ("float32" if device == "cpu" else "auto"),
            threads=max(1, len(os.sched_getaffinity(0)) // args.instances),
            spread=args.spread,
            policy=args.policy,
            roles=() if args.roles is None else tuple(args.roles.split(",")),
            chunk_tokens=args.chunk_tokens,
            slo_ttft_s=args.slo_ttft if args.refuse else None,
            slo_tpot_s=args.slo_tpot if args.refuse else None,
            logs=args.out,
        )
    except ValueError as error:
        raise BenchError(str(error)) from error
    print(f"starting a gManager and {config.instances} instances ({device})", flush=True)
    async with shown_running(config, console) as service:
        return await service.during(measure(service.address, trace, args, device))


async def interruptible(work: Coroutine[Any, Any, int]) -> int:
    """SIGTERM and SIGINT end the work like an exception, so that what was started is stopped."""
    working = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, working.cancel)
    try:
        return await working
    except asyncio.CancelledError:
        print("interrupted", file=sys.stderr)
        return 130


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "bench_serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gmanager", help="address of a running service (default: one is started)")
    parser.add_argument("--trace", default="mixed", help=f"a file, or {', '.join(TRACES)} (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="times the tokens of each request (%(default)g)")
    parser.add_argument(
        "--block-tokens", type=int, default=BLOCK_TOKENS, help="what a hash id of the file stands for (%(default)d)"
    )
    parser.add_argument("--slo-ttft", type=float, help="seconds to the first token that count as goodput")
    parser.add_argument("--slo-tpot", type=float, help="seconds between tokens, in a request's mean, that count as goodput")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (%(default)d)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the whole trace (%(default)g)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help=f"folder of {REPORT} and the service's logs")
    parser.add_argument("--vocab-size", type=int, help="tokens of the model, where its files can't be found from here")
    own = parser.add_argument_group("a service that is started")
    own.add_argument("--model", help="a directory, a hub id or a GGUF file (default: SmolLM2-135M-Instruct)")
    own.add_argument("--instances", type=int, default=2)
    own.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    own.add_argument("--dtype", help="of the instances (float32 on CPU, the checkpoint's own on GPU)")
    own.add_argument("--kv-tokens", type=int, help="of each instance (on CPU: enough for the whole trace; on GPU: what fits)")
    own.add_argument("--kv-memory", type=float, help="as the instances' flag")
    own.add_argument("--chunk-tokens", type=int, help="as the instances' flag")
    own.add_argument("--spread", default="auto", help="as the gManager's flag")
    own.add_argument("--policy", default="elastic", help="as the gManager's flag")
    own.add_argument("--roles", help="of each instance, with commas between, for the policy split")
    own.add_argument("--refuse", action="store_true", help="it has the objectives, too, and refuses who would miss them")
    args = parser.parse_args()
    for flag, value in (("--scale", args.scale), ("--timeout", args.timeout)):
        if not (math.isfinite(value) and value > 0):
            parser.error(f"{flag} must be positive, got {value}")
    whole = (("--instances", args.instances), ("--vocab-size", args.vocab_size), ("--block-tokens", args.block_tokens))
    for flag, value in whole:
        if value is not None and value < 1:
            parser.error(f"{flag} must be at least 1, got {value}")
    try:
        Objectives(ttft_s=args.slo_ttft, tpot_s=args.slo_tpot)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    args = parse()
    os.environ.update(NO_BARS)  # before whoever draws them is imported
    try:
        trace = read_trace(args.trace, args.scale, args.block_tokens)
        work = measure(args.gmanager, trace, args, "as the service runs") if args.gmanager else serve_and_measure(trace, args)
        return asyncio.run(interruptible(work))
    except (TraceError, BenchError, FetchError, ServiceError, DistattnError) as error:
        print(f"bench_serve.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
