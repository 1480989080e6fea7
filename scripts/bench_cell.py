#!/usr/bin/env python3
"""GPUs as one cell: steps, exchange and prefill of the Llama-3.1-8B shape (or of `--shape`) with random weights, bf16.

    python -m torch.distributed.run --standalone --nproc-per-node 2 scripts/bench_cell.py

Each process is an instance without its service (`scripts/_loop.py`). Decodes run on random KV (std 0.5) that no prefill wrote.
`step` is by the host's clock over many steps, medians; `floor` is (weights + KV of the fullest GPU) over the copy bandwidth of
this run. The attention part of a step is what it takes longer than one of 64 tokens at home. Rank 0 prints and writes, after
each part. Without GPUs the processes are instances on the CPU, with Gloo: to try this out, no measure of anything.
"""

import argparse
import math
import os
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed
from _arguments import LARGEST, tokens_or_largest
from _dummy import BLOCK, bytes_read, make_model, make_storage, pool_tokens
from _loop import Cell, Loop
from _measure import Row, copy_bandwidth, p99, show, write_json

from instance.cell import open_store
from instance.elastic_tp import SplitRule
from instance.model import Model
from instance.processors import queues_of_their_own

dist: Any = torch.distributed  # its stubs lack TCPStore

STEPS = 40
WARM = 8
ANSWER = STEPS + 2 * WARM
CPU_COPY = 10.0
"""GB/s that stand in for a GPU's where there is none."""


@dataclass
class Bench:
    """One member of the cell."""

    loop: Loop
    cell: Cell
    copy: float
    weights: int
    token: int
    vocab: int
    scale: float
    room: int = 0
    """Tokens that one sequence may have on each of the GPUs, beside its answer."""

    def __post_init__(self) -> None:
        # a shard takes a block more than its tokens need, for what is written next
        self.room = int(min(self.cell.gather(self.loop.free_tokens))) - ANSWER - 2 * BLOCK

    @property
    def rank(self) -> int:
        return self.cell.rank

    @property
    def size(self) -> int:
        return self.cell.size

    def tokens(self, count: int) -> int:
        """`count`, scaled down where it is only tried out; the largest that fits, for `LARGEST`."""
        if count == LARGEST:
            return self.room // BLOCK * BLOCK * self.size
        return max(64, int(count * self.scale) // 64 * 64)

    def evenly(self, tokens: int) -> list[int]:
        """Of a sequence on each GPU, the last of which has what is left over."""
        part = tokens // self.size
        return [part] * (self.size - 1) + [tokens - part * (self.size - 1)]

    def fits(self, tokens: int) -> bool:
        """Whether the whole cell holds a sequence of so many."""
        return max(self.evenly(tokens)) <= self.room

    def alone(self, tokens: int) -> list[int]:
        """All of a sequence here."""
        return [tokens if rank == self.rank else 0 for rank in range(self.size)]

    def place(self, tokens: Sequence[Sequence[int]], max_tokens: int = ANSWER) -> None:
        """Sequences from 0 on, which have so much on each rank. All call this: nobody steps before all know them."""
        for seq, parts in enumerate(tokens):
            self.loop.place(seq, parts, max_tokens)
        self.wait()

    def wait(self) -> None:
        """Until all are here, and know what was placed or admitted before."""
        self.cell.gather(0)

    def times(self) -> list[float]:
        """Seconds of the steps of what is placed."""
        return [b - a for a, b in pairwise(self.loop.steps(STEPS)[WARM:])]

    def rest(self) -> None:
        """End all that runs, on all GPUs."""
        self.loop.drain()
        self.cell.barrier()

    def step_ms(self) -> float:
        """Median of the steps of what is placed; then all of it is gone."""
        times = self.times()
        self.rest()
        return 1e3 * statistics.median(times)

    def floor_ms(self, kv_tokens: int) -> float:
        return (self.weights + kv_tokens * self.token) / self.copy / 1e6

    def together(self) -> None:
        self.loop.join(range(self.size))

    def apart(self) -> None:
        self.loop.join([self.rank])


def long_rows(bench: Bench, lengths: Sequence[int]) -> list[Row]:
    """One row of a sequence whose KV lies on all GPUs, beside one GPU that holds it all (where it fits)."""

    def at_home_ms(tokens: int) -> float:
        bench.apart()
        bench.place([bench.alone(tokens)])
        return bench.step_ms()

    rows: list[Row] = []
    base = at_home_ms(64)
    for length in lengths:
        tokens = bench.tokens(length)
        if not bench.fits(tokens):
            rows.append({"tokens": tokens, "room": bench.room * bench.size})
            continue
        row: Row = {"tokens": tokens, "largest": True} if length == LARGEST else {"tokens": tokens}
        if tokens <= bench.room:
            row["one GPU ms"] = at_home_ms(tokens)
        if bench.size > 1:
            bench.together()
            bench.place([bench.evenly(tokens)])
            row["all GPUs ms"] = bench.step_ms()
        step = row["all GPUs ms"] if bench.size > 1 else row["one GPU ms"]
        floor = bench.floor_ms(max(bench.evenly(tokens)))
        row |= {"floor ms": floor, "step / floor": step / floor, "attention ms": step - base}
        if bench.size > 1 and "one GPU ms" in row:
            row["attention, one / all"] = (row["one GPU ms"] - base) / (step - base)
        rows.append(row)
    return rows


def elastic(bench: Bench, lengths: Sequence[int]) -> list[Row]:
    """Steps whose feeds and head all GPUs share (`--elastic-tp`), beside steps of which each GPU computes its own rows: first
    what is all at home on one of them, then one row of sequences whose KV lies on all."""

    def at_home(tokens: int) -> list[int]:
        return [0] * (bench.size - 1) + [tokens]

    rows: list[Row] = []
    short = bench.tokens(1024)
    lengths = [its for its in map(bench.tokens, lengths) if bench.fits(its)]
    cases = [(count, short, at_home(short)) for count in (1, 8, 16, 32, 64)]
    cases += [(1, tokens, bench.evenly(tokens)) for tokens in (short, *lengths)]
    bench.together()
    costs = bench.loop.measure_feeds()
    for count, tokens, places in cases:
        took = {}
        for is_split in (False, True):
            bench.loop.split(SplitRule(count, least_members=bench.size) if is_split else None)
            bench.wait()
            bench.place([places] * count)
            took[is_split] = bench.step_ms()
        bench.loop.split(None)
        its_rows = [0] * (bench.size - 1) + [count]
        predicted = costs.split(count, bench.size) / max(map(costs.whole, its_rows))
        rows.append(
            {"rows": count, "tokens": tokens, "on all": places[0] > 0, "own rows ms": took[False], "split ms": took[True],
             "split / own": took[True] / took[False], "predicted, no KV": predicted}
        )  # fmt: skip
    return rows


def exchange(bench: Bench) -> list[Row]:
    """What dispatch and combine add to a step: rows with a few tokens of KV elsewhere, beside the same all at home."""
    rows: list[Row] = []
    for count in (1, 64):
        bench.apart()
        bench.place([bench.alone(64 * bench.size)] * count)
        alone = bench.step_ms()
        bench.together()
        bench.place([[64] * bench.size] * count)  # all homes on the last rank
        shared = bench.step_ms()
        layers = bench.loop.storage.num_layers
        rows.append({"rows": count, "at home ms": alone, "shared ms": shared, "us per layer": 1e3 * (shared - alone) / layers})
    return rows


def nothing_shared(bench: Bench) -> list[Row]:
    """Steps of one GPU while the others wait, and of all at once, each with rows of its own. The slowest GPU counts."""
    count, tokens = 64, bench.tokens(4096)
    bench.apart()

    def decode_ms(ranks: Sequence[int]) -> float:
        takes_part = bench.rank in ranks
        bench.place([bench.alone(tokens)] * count if takes_part else [])
        own = 1e3 * statistics.median(bench.times()) if takes_part else 0.0
        bench.rest()
        return max(bench.cell.gather(own))

    alone, all_ = decode_ms([bench.size - 1]), decode_ms(range(bench.size))
    return [{"rows": count, "tokens": tokens, "one ms": alone, "all ms": all_, "ratio": all_ / alone}]


def undisturbed(bench: Bench) -> list[Row]:
    """The last rank decodes 64 rows while each of the others prefills a prompt, sharing nothing."""
    bench.apart()
    count, tokens = 64, bench.tokens(4096)
    decodes = bench.rank == bench.size - 1
    elsewhere = [0] * (bench.size - 1)

    def decode_ms() -> float:
        for seq in range(count):
            bench.loop.place(seq, [*elsewhere, tokens], ANSWER)
        times = bench.times()
        bench.loop.drain()
        return 1e3 * statistics.median(times)

    alone = busy = 0.0
    if decodes:
        alone = decode_ms()
    bench.cell.barrier()
    if decodes:
        busy = decode_ms()
    else:
        bench.loop.admit(1 << 20, prompt_of(bench, bench.tokens(131072)), bench.alone(bench.tokens(131072)), 1)
        bench.loop.finish(1 << 20)
    bench.cell.barrier()
    alone, busy = (max(bench.cell.gather(ms)) for ms in (alone, busy))
    return [{"rows": count, "alone ms": alone, "beside prefills ms": busy, "ratio": busy / alone}]


def prompt_of(bench: Bench, tokens: int) -> "array[int]":
    return array("I", torch.randint(bench.vocab, (tokens,), generator=torch.Generator().manual_seed(1)).tolist())


def prefill_s(bench: Bench, seq: int, tokens: int, steps: list[float] | None = None) -> float:
    """Seconds from the first step of a prompt that all share to its end. `steps` gets those between decodes."""
    shares = bench.evenly(tokens)[::-1]  # rank 0 is its home
    bench.loop.admit(seq, prompt_of(bench, tokens), shares, 1)
    bench.wait()
    begin = time.perf_counter()
    ends = bench.loop.finish(seq)
    if steps is not None:
        steps += [b - a for a, b in pairwise(ends["decode"])]
    return time.perf_counter() - begin


def prefills(bench: Bench, lengths: Sequence[int]) -> list[Row]:
    rows: list[Row] = []
    for length in lengths:
        tokens = bench.tokens(length)
        if not bench.fits(tokens):
            rows.append({"tokens": tokens, "room": bench.room * bench.size})
            continue
        bench.together()
        seconds = prefill_s(bench, 1 << 20, tokens)
        bench.cell.barrier()
        bench.rest()
        rows.append({"tokens": tokens, "s": seconds})
    return rows


def mixed(bench: Bench) -> list[Row]:
    """16 rows at 8K at home on each GPU, while a prompt of 128K is prefilled by all."""
    count, tokens, prompt = 16 * bench.size, bench.tokens(8192), bench.tokens(131072)

    def place() -> None:
        bench.together()
        homes = (seq % bench.size for seq in range(count))
        bench.place([[tokens if rank == home else 0 for rank in range(bench.size)] for home in homes], 2000)

    place()
    alone = bench.times()
    bench.rest()
    place()
    bench.loop.steps(WARM)
    times: list[float] = []
    seconds = prefill_s(bench, 1 << 20, prompt, times)
    bench.cell.barrier()
    bench.rest()
    bench.together()
    undisturbed_s = prefill_s(bench, 1 << 21, prompt)
    bench.cell.barrier()
    bench.rest()
    before, beside = p99(alone), p99(times)
    return [
        {
            "rows": count, "P99 alone ms": 1e3 * before, "P99 beside ms": 1e3 * beside,
            "P99 ratio": beside / before, "prefill alone s": undisturbed_s, "prefill beside s": seconds,
            "prefill ratio": seconds / undisturbed_s, "steps": len(times),
        }
    ]  # fmt: skip


Part = Callable[[Bench], list[Row]]
PARTS: dict[str, tuple[str, Part]] = {
    "exchange": ("Dispatch and combine", exchange),
    "mixed": ("Decodes beside a prefill of all GPUs", mixed),
    "apart": ("Decodes that share nothing", nothing_shared),
    "undisturbed": ("Decodes on one GPU while the others prefill", undisturbed),
}
OF_LENGTHS = {
    "long": ("One row of a long sequence", long_rows),
    "prefill": ("Prefill on all GPUs", prefills),
    "elastic": ("Dense layers shared by all GPUs", elastic),
}
OF_SEVERAL = ("exchange", "undisturbed", "elastic")
"""They need two GPUs at least."""


def parse(size: int, words: Sequence[str] | None = None) -> argparse.Namespace:
    """For a cell of so many GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*PARTS, *OF_LENGTHS)
    parser.add_argument("--out", type=Path, default=Path("bench_cell.json"))
    parser.add_argument("--shape", default="llama-3.1-8b", help="of make_dummy_model.py, or a config.json")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto: GPUs if there are any)")
    parser.add_argument("--kv-tokens", type=int, help="of each GPU (default: what --kv-memory 0.92 gives)")
    parser.add_argument("--chunk-tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="*", choices=names, help="none: only what the pools hold (default: all)")
    parser.add_argument("--prefill", type=int, nargs="*", default=[131072], help="prompt lengths")
    parser.add_argument(
        "--long", type=tokens_or_largest, nargs="*", default=[524288, 1048576, 1572864], help="tokens, or largest: what fits"
    )
    parser.add_argument("--elastic", type=int, nargs="*", default=[131072, 524288, 1048576], help="tokens of shared rows")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths, to try this out")
    args = parser.parse_args(words)
    for flag, count in (("--kv-tokens", args.kv_tokens), ("--chunk-tokens", args.chunk_tokens)):
        if count is not None and count < BLOCK:
            parser.error(f"{flag} must be at least {BLOCK}, got {count}")
    if not (math.isfinite(args.scale) and args.scale > 0):
        parser.error(f"--scale must be positive, got {args.scale}")
    if args.prefill and min(args.prefill) < 1:
        parser.error(f"--prefill must be at least 1, got {min(args.prefill)}")
    alone = [name for name in args.only or () if size == 1 and name in OF_SEVERAL]
    if alone:
        parser.error(f"{alone[0]} needs two GPUs at least, this is 1: start it with torch.distributed.run --nproc-per-node 2")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and "elastic" in (args.only or ()):
        parser.error("elastic needs GPUs: it measures captured steps")
    if args.only is None:
        unfit = [*(OF_SEVERAL if size == 1 else ()), *(("elastic",) if args.device == "cpu" else ())]
        args.only = [name for name in names if name not in unfit]
    if args.device == "cpu" and args.kv_tokens is None:
        parser.error("on the CPU it needs --kv-tokens")
    found = torch.cuda.device_count()
    if args.device == "cuda" and found < size:
        parser.error(f"{size} processes need as many GPUs, found {found}")
    return args


def meet(rank: int, size: int, device: torch.device) -> tuple[Cell, object]:
    """The cell of all that torch.distributed.run started, and what must be kept as long as it."""
    meeting = dist.TCPStore(os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"]), is_master=False)
    kept: object = meeting
    if rank == 0:
        kept, address = open_store("127.0.0.1", 60)
        meeting.set("address", address)
    return Cell.meet(meeting.get("address").decode(), rank, size, device), kept


def start(args: argparse.Namespace, rank: int, size: int) -> tuple[Bench, int, object]:
    """This member, once all have come; the tokens of KV that its GPU holds; and what must be kept."""
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model: Model = make_model(args.shape, device)
    if "elastic" in args.only and (model.fused is None or not model.fused.can_share):
        print(f"{args.shape}: elastic is left out: its dense layers can't be split")
        args.only.remove("elastic")
    capacity = pool_tokens(model, args.chunk_tokens, size) if device.type == "cuda" else args.kv_tokens
    storage = make_storage(model, args.kv_tokens or capacity)
    copy = copy_bandwidth() if device.type == "cuda" else CPU_COPY
    cell, kept = meet(rank, size, device)
    loop = Loop(model, storage, chunk_tokens=args.chunk_tokens, cell=cell, shares_feeds="elastic" in args.only)
    return Bench(loop, cell, copy, round(bytes_read(model)), model.token_bytes(), model.vocab_size, args.scale), capacity, kept


def main() -> int:
    if "RANK" not in os.environ:
        print("bench_cell: start it with python -m torch.distributed.run --standalone --nproc-per-node 2", file=sys.stderr)
        return 2
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    queues_of_their_own()
    args = parse(size)
    bench, capacity, _kept = start(args, rank, size)
    capacities = [int(tokens) for tokens in bench.cell.gather(capacity)]
    report: Row = {
        "copy_GB/s": bench.copy,
        "GPUs": size,
        "KV tokens of each GPU": min(capacities),
        "KV tokens of the cell": sum(capacities),
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "seconds": {},
    }
    if rank == 0:
        print(f"{size} x {args.device}: {sum(capacities):,} tokens of KV", flush=True)
        write_json(args.out, report)
    measures: dict[str, tuple[str, Part]] = PARTS | {
        name: (title, partial(measure, lengths=getattr(args, name))) for name, (title, measure) in OF_LENGTHS.items()
    }
    for part in args.only:
        begun = time.perf_counter()
        title, measure = measures[part]
        try:
            report[part] = measure(bench)
        except ValueError as error:  # the pool is too small
            print(f"bench_cell: {part}: {error}", file=sys.stderr)
            return 1
        report["seconds"][part] = time.perf_counter() - begun
        if rank == 0:
            show(report[part], f"{title}, {size} x {args.device} ({report['seconds'][part]:.1f} s)")
            sys.stdout.flush()
            write_json(args.out, report)
    bench.cell.barrier()
    bench.loop.close()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of the loop may still wait for the other process
