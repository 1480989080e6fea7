#!/usr/bin/env python3
"""How a cell scales: the same parts on 1, 2, 4 and 8 GPUs, random weights of the Llama-3.1-8B shape (or of `--shape`).

    scripts/bench_scaling.py --gpus 1 2 --parts capacity prefill tpot overhead
    scripts/bench_scaling.py --gpus 4 8 --device cpu        # a dry run: instances on the CPU, Gloo, a tiny model

    capacity   tokens of KV that the cell holds
    prefill    seconds of prompts that all GPUs share
    tpot       steps of one row whose KV lies on all GPUs, filled without a prefill; their attention part
    overhead   steps of 64 rows on each GPU, nothing shared
    trace      tokens per second of a trace of short and long prompts (`make_trace.py`), through the service
    needles    keys found by the retrieval model in a haystack that fills the cell, through the service

Each part runs `bench_cell.py`, `bench_serve.py` or `bench_retrieval.py` in processes of its own; those of `bench_cell.py` share
one start. Every part says how long it took, and is written at once: --out is gone on with if it is there, so that parts and
numbers of GPUs may be measured one after the other, on machines that are lent for minutes. `--parts` without a name only
compares and draws what the file holds. What the programs print lies in the folder `scaling` beside it.

Exit code 0, 1 if a part failed or a needle was not found, 2 if nothing could be started, 130 if interrupted.
"""

import argparse
import datetime
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import make_trace
import msgspec
from _arguments import LARGEST, tokens_or_largest
from _measure import Row, show
from _scaling import FIGURES, Measured, Report, ScalingError, draw, read, table, write
from _setup import ROOT
from bench_serve import REPORT, gpus, versions
from make_dummy_model import SHAPES

SCRIPTS = Path(__file__).resolve().parent
K = 1024
OF_CELL = {"capacity": None, "prefill": "prefill", "tpot": "long", "overhead": "apart"}
"""Parts of `bench_cell.py`, by its names."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "shape": "llama-3.1-8b", "kv_tokens": None, "chunk_tokens": 8192, "scale": 1.0, "needle_tokens": 875_000,
        "needle_chunk_tokens": 2048,
    },
    "cpu": {
        "shape": "tiny", "kv_tokens": 16384, "chunk_tokens": 256, "scale": 1 / 64, "needle_tokens": 2048,
        "needle_chunk_tokens": 256,
    },
}  # fmt: skip
ENDING_S = 60.0
"""How long a program that was asked to end may take."""


class PartFailed(Exception):
    """A part could not be measured; the message says why."""


@dataclass
class Bench:
    """One run of this program."""

    args: argparse.Namespace
    report: Report
    scratch: Path
    """For what isn't kept: the model."""
    failed: list[str] = field(default_factory=list)

    @property
    def logs(self) -> Path:
        folder: Path = self.args.out.parent / "scaling"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def program(self, name: str, *command: str) -> float:
        """Run one of Python's programs: its seconds. Raises PartFailed if it fails or takes too long."""
        log = self.logs / f"{name}.log"
        begin = time.perf_counter()
        with log.open("wb") as output:
            running = subprocess.Popen(
                [sys.executable, *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,  # Ctrl-C is for us: who is told twice to end may not come to it
            )
            try:
                code = running.wait(self.args.timeout)
            except subprocess.TimeoutExpired:
                raise PartFailed(f"not finished after {self.args.timeout:g} s; see {log}") from None
            finally:
                _end(running)
        if code:
            lines = log.read_text(errors="replace").splitlines() or [""]
            own = [line for line in lines if line.startswith(("bench_", "make_"))]  # torchrun has the last word
            raise PartFailed(f"exit code {code}: {(own or lines)[-1][:200]}; see {log}")
        return time.perf_counter() - begin

    def note(self, part: str, num_gpus: int, rows: list[Row], seconds: float) -> None:
        """Write and tell what a part gave."""
        self.report.add(
            Measured(
                part=part,
                gpus=num_gpus,
                rows=rows,
                seconds=seconds,
                date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                arguments={name: str(value) for name, value in vars(self.args).items()},
                hardware=gpus() if self.args.device == "cuda" else f"{len(os.sched_getaffinity(0))} CPU cores",
            )
        )
        write(self.args.out, self.report)
        self.say(num_gpus, part, f"{seconds:.1f} s")

    def say(self, num_gpus: int, what: str, outcome: str) -> None:
        print(f"{num_gpus} x {self.args.device}, {what}: {outcome}", flush=True)

    # --- parts --------------------------------------------------------------------------------------------------------

    def cell(self, num_gpus: int, parts: Sequence[str]) -> None:
        """Those of `bench_cell.py`, of which each that came to its end is kept. Raises PartFailed."""
        args, name = self.args, f"cell-{num_gpus}"
        out = self.logs / f"{name}.json"
        out.unlink(missing_ok=True)
        asked = [own for part in parts if (own := OF_CELL[part]) is not None]
        flags = ["--device", args.device, "--shape", args.shape, "--chunk-tokens", str(args.chunk_tokens), "--out", str(out)]
        flags += ["--scale", repr(args.scale), "--prefill", *map(str, args.prefill), "--only", *asked]
        flags += ["--long", *("largest" if tokens == LARGEST else str(tokens) for tokens in args.tpot)]
        if args.kv_tokens is not None:
            flags += ["--kv-tokens", str(args.kv_tokens)]
        torchrun = ["-m", "instance.torchrun", "--standalone", "--nproc-per-node", str(num_gpus)]
        begin = time.perf_counter()
        try:
            self.program(name, *torchrun, str(SCRIPTS / "bench_cell.py"), *flags)
        finally:
            if out.exists():
                self._take(msgspec.json.decode(out.read_bytes()), num_gpus, parts, time.perf_counter() - begin)

    def _take(self, found: Row, num_gpus: int, parts: Sequence[str], elapsed_s: float) -> None:
        """What the file of a cell holds, and of the time that it ran what is left beside its parts."""
        seconds = found["seconds"]
        start_s = elapsed_s - sum(seconds.values())
        self.say(num_gpus, "start and end of the cell", f"{start_s:.1f} s")
        for part in parts:
            own = OF_CELL[part]
            if own is None:
                rows = [{"tokens": found["KV tokens of the cell"], "of each": found["KV tokens of each GPU"]}]
                self.note(part, num_gpus, rows, start_s)
            elif own in seconds:
                self.note(part, num_gpus, found[own], seconds[own])

    def trace(self, num_gpus: int) -> None:
        """Raises PartFailed; requests that failed are told, and are no reason to."""
        args = self.args
        name = f"of mix {args.mix}, {args.requests} requests at {args.rate:g}/s, lengths x {args.scale:.4g}"
        file, out = self.logs / "trace.jsonl", self.logs / f"trace-{num_gpus}"
        settings = make_trace.Settings(
            mix=args.mix, requests=args.requests, rate=args.rate, scale=args.scale, answer_scale=args.scale
        )
        make_trace.write(make_trace.make_trace(settings), file)
        model = args.model or self.scratch / "model"
        if not (model / "tokenizer.json").exists():  # it is written last
            seconds = self.program("model", str(SCRIPTS / "make_dummy_model.py"), args.shape, str(model))
            self.say(num_gpus, "writing the model", f"{seconds:.1f} s")
        (out / REPORT).unlink(missing_ok=True)
        flags = ["--model", str(model), "--instances", str(num_gpus), "--device", args.device, "--trace", str(file)]
        flags += ["--timeout", repr(args.timeout / 2), "--out", str(out)]  # the service has to start and end, too
        if args.kv_tokens is not None:
            flags += ["--kv-tokens", str(args.kv_tokens)]
        begin = time.perf_counter()
        try:
            self.program(f"trace-{num_gpus}", str(SCRIPTS / "bench_serve.py"), *flags)
        except PartFailed:
            if not (out / REPORT).exists():
                raise
        group = msgspec.json.decode((out / REPORT).read_bytes())["groups"][-1]
        row = {
            "trace": name, "requests": group["count"], "failed": group["failed"], "total s": group["total_s"],
            "tokens/s": (group["prompt_tokens_per_s"] or 0) + (group["output_tokens_per_s"] or 0),
            "completed/s": group["completed_per_s"], "TTFT s p50": group["ttft_p50_s"], "TPOT s p50": group["tpot_p50_s"],
        }  # fmt: skip
        self.note("trace", num_gpus, [row], time.perf_counter() - begin)
        if group["failed"]:
            raise PartFailed(f"{group['failed']} of {group['count']} requests failed; see {self.logs}/trace-{num_gpus}.log")

    def needles(self, num_gpus: int) -> None:
        """Raises PartFailed, also if one was not found."""
        args, name = self.args, f"needles-{num_gpus}"
        out = self.logs / f"{name}.json"
        out.unlink(missing_ok=True)
        # no instance has room for much more than its part
        own = args.needle_tokens + 4 * args.needle_chunk_tokens
        flags = ["--instances", str(num_gpus), "--contexts", str(args.needle_tokens * num_gpus), "--kv-tokens", str(own)]
        flags += ["--chunk-tokens", str(args.needle_chunk_tokens), "--device", args.device, "--out", str(out)]
        flags += ["--dtype", "bfloat16" if args.device == "cuda" else "float32"]
        begin = time.perf_counter()
        try:
            self.program(name, str(SCRIPTS / "bench_retrieval.py"), *flags)
        finally:
            if out.exists():
                self.note("needles", num_gpus, msgspec.json.decode(out.read_bytes())["rows"], time.perf_counter() - begin)

    def run(self) -> None:
        """All parts on all numbers of GPUs; what fails is told, and the others go on."""
        args = self.args
        of_cell = [part for part in OF_CELL if part in args.parts]
        rest: dict[str, Callable[[int], None]] = {"trace": self.trace, "needles": self.needles}
        for num_gpus in args.gpus:
            if of_cell:
                self._try(num_gpus, ", ".join(of_cell), lambda n: self.cell(n, of_cell))
            for part, measure in rest.items():
                if part in args.parts:
                    self._try(num_gpus, part, measure)

    def _try(self, num_gpus: int, what: str, measure: Callable[[int], None]) -> None:
        try:
            measure(num_gpus)
        except PartFailed as failure:
            self.failed.append(f"{num_gpus} x {self.args.device}, {what}: {failure}")
            print(f"bench_scaling: {self.failed[-1]}", file=sys.stderr, flush=True)


def _end(running: "subprocess.Popen[bytes]") -> None:
    """Stop a program, and with it what it started: all of them do so when they are asked to end."""
    if running.poll() is not None:
        return
    running.send_signal(signal.SIGTERM)
    try:
        running.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "bench_scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8], help="of each cell, one after the other (1 2 4 8)")
    parser.add_argument("--parts", nargs="*", choices=tuple(FIGURES), default=list(FIGURES), help="(all)")
    parser.add_argument("--device", choices=tuple(DEFAULTS), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench_scaling.json", help="beside it: the same as .png")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each program that is started (%(default)g)")
    sizes = parser.add_argument_group("sizes", "defaults in brackets: on GPUs, on the CPU")

    def of_device(flag: str, kind: type, about: str) -> None:
        values = ", ".join(str(DEFAULTS[device][flag[2:].replace("-", "_")]) for device in DEFAULTS)
        sizes.add_argument(flag, type=kind, help=f"{about} ({values})")

    of_device("--shape", str, "of make_dummy_model.py, or a config.json")
    of_device("--kv-tokens", int, "of each instance of cells and trace; None: what --kv-memory 0.92 gives")
    of_device("--chunk-tokens", int, "of prefills")
    of_device("--scale", float, "times the lengths of prefill, tpot, overhead and trace")
    of_device("--needle-tokens", int, "of the haystack, for each GPU")
    of_device("--needle-chunk-tokens", int, "of its prefill")
    sizes.add_argument("--prefill", type=int, nargs="*", default=[128 * K, 512 * K, K * K], help="of prompts (128K 512K 1M)")
    sizes.add_argument(
        "--tpot",
        type=tokens_or_largest,
        nargs="*",
        default=[128 * K, K * K, LARGEST],
        help="tokens of the row, or largest: what fits (128K 1M largest)",
    )
    sizes.add_argument("--mix", type=int, default=5, help="of make_trace.py (%(default)d)")
    sizes.add_argument("--requests", type=int, default=100, help="of the trace (%(default)d)")
    sizes.add_argument("--rate", type=float, default=50.0, help="of the trace, requests per second (%(default)g)")
    sizes.add_argument("--model", type=Path, help="a directory for the trace's checkpoint, kept; or one that is there")
    args = parser.parse_args(words)
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with exit code 2 for what makes no sense."""
    counts = {"gpus": args.gpus, "prefill": args.prefill, "requests": [args.requests], "chunk_tokens": [args.chunk_tokens]}
    counts |= {name: [getattr(args, name)] for name in ("needle_tokens", "needle_chunk_tokens")}
    for name, values in counts.items():
        if values and min(values) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {min(values)}")
    for name in ("scale", "rate", "timeout"):
        if not (math.isfinite(value := getattr(args, name)) and value > 0):
            parser.error(f"--{name} must be positive, got {value}")
    if not 0 <= args.mix < len(make_trace.MIXES):
        parser.error(f"--mix must be 0 to {len(make_trace.MIXES) - 1}, got {args.mix}")
    if args.kv_tokens is not None and args.kv_tokens < 64:
        parser.error(f"--kv-tokens must be at least a block of 64, got {args.kv_tokens}")
    if args.shape not in SHAPES and not Path(args.shape).exists():
        parser.error(f"--shape {args.shape} is neither a file nor one of {', '.join(SHAPES)}")
    if args.device == "cuda" and args.parts:
        import torch

        found = torch.cuda.device_count()
        if found < max(args.gpus):
            parser.error(f"--gpus {max(args.gpus)}: found {found} (--device cpu tries it out)")


def main() -> int:
    args = parse()
    fresh = Report(shape=args.shape, device=args.device, versions=versions())
    try:
        report = read(args.out, fresh)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(args, report, Path(scratch))
            bench.run()
        show(table(report.figures), f"Scaling: {args.shape} on {args.device}")
        missing = draw(report, args.out.with_suffix(".png"))
        print(f"written: {args.out}" + (f"; no plot: {missing}" if missing else f", {args.out.with_suffix('.png')}"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ScalingError, OSError) as error:
        print(f"bench_scaling: {error}", file=sys.stderr)
        return 2
    return 1 if bench.failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what runs, as Ctrl-C does
    sys.exit(main())
