#!/usr/bin/env python3
"""Two GPUs as one cell: steps, exchange and prefill of the Llama-3.1-8B shape (or of `--shape`) with random weights, bf16.

    python -m torch.distributed.run --nproc-per-node 2 scripts/bench_cell.py

Each process is an instance without its service (`scripts/_loop.py`). Decodes run on random KV (std 0.5) that no prefill wrote.
`step` is by the host's clock over many steps, medians; `floor` is (weights + KV of the fuller GPU) over the copy bandwidth that
this run measures. Rank 0 prints and writes.
"""

import argparse
import os
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed
from _dummy import bytes_read, make_model, make_storage, pool_tokens
from _loop import Cell, Loop
from _measure import Row, copy_bandwidth, p99, show, write_json

from instance.cell import open_store
from instance.processors import queues_of_their_own

dist: Any = torch.distributed  # its stubs lack TCPStore

STEPS = 40
WARM = 8
ANSWER = STEPS + 2 * WARM


@dataclass
class Bench:
    """One member of the cell."""

    loop: Loop
    cell: Cell
    rank: int
    copy: float
    weights: int
    token: int
    vocab: int
    scale: float

    def tokens(self, count: int) -> int:
        """`count`, scaled down where it is only tried out."""
        return max(64, int(count * self.scale) // 64 * 64)

    def step_ms(self) -> float:
        """Median of the steps of what is placed; then all of it is gone."""
        ends = self.loop.steps(STEPS)
        between = [b - a for a, b in pairwise(ends[WARM:])]
        self.loop.drain()
        self.cell.barrier()
        return 1e3 * statistics.median(between)

    def floor_ms(self, kv_tokens: int) -> float:
        return (self.weights + kv_tokens * self.token) / self.copy / 1e6

    def together(self) -> None:
        self.loop.join([0, 1])

    def apart(self) -> None:
        self.loop.join([self.rank])


def long_rows(bench: Bench) -> list[Row]:
    """One row of a long sequence, half of its KV on each GPU, beside one GPU that holds it all (where it fits)."""
    rows: list[Row] = []
    for name, total in (("512K", 524288), ("1M", 1048576), ("1.5M", 1572864)):
        tokens = bench.tokens(total)
        row: Row = {"tokens": name}
        if tokens + 4096 < bench.loop.free_tokens and total <= 524288:
            bench.apart()
            bench.loop.place(0, [tokens if r == bench.rank else 0 for r in range(2)], ANSWER)
            row["one GPU ms"] = bench.step_ms()
        bench.together()
        bench.loop.place(0, [tokens // 2, tokens - tokens // 2], ANSWER)
        row["two GPUs ms"] = step = bench.step_ms()
        row["floor ms"] = floor = bench.floor_ms(tokens // 2)
        row["step / floor"] = step / floor
        rows.append(row)
    bench.apart()
    bench.loop.place(0, [64 if r == bench.rank else 0 for r in range(2)], ANSWER)
    base = bench.step_ms()
    rows[0]["attention, one / two"] = (rows[0]["one GPU ms"] - base) / (rows[0]["two GPUs ms"] - base)
    return rows


def exchange(bench: Bench) -> list[Row]:
    """What dispatch and combine add to a step: rows with a few tokens of KV elsewhere, beside the same all at home."""
    rows: list[Row] = []
    for count in (1, 64):
        bench.apart()
        for seq in range(count):
            bench.loop.place(seq, [128 if r == bench.rank else 0 for r in range(2)], ANSWER)
        alone = bench.step_ms()
        bench.together()
        for seq in range(count):
            bench.loop.place(seq, [64, 64], ANSWER)  # all homes on rank 1
        shared = bench.step_ms()
        layers = bench.loop.storage.num_layers
        rows.append({"rows": count, "at home ms": alone, "shared ms": shared, "us per layer": 1e3 * (shared - alone) / layers})
    return rows


def undisturbed(bench: Bench) -> list[Row]:
    """Rank 1 decodes 64 rows while rank 0 prefills, sharing nothing."""
    bench.apart()
    count, tokens = 64, bench.tokens(4096)

    def decode_ms() -> float:
        for seq in range(count):
            bench.loop.place(seq, [0, tokens], ANSWER)
        ends = bench.loop.steps(STEPS)
        bench.loop.drain()
        return 1e3 * statistics.median(b - a for a, b in pairwise(ends[WARM:]))

    alone = busy = 0.0
    if bench.rank == 1:
        alone = decode_ms()
    bench.cell.barrier()
    if bench.rank == 0:
        prefill_s(bench, 1 << 20, bench.tokens(131072), [1, 0])
    else:
        busy = decode_ms()
    bench.cell.barrier()
    times = torch.tensor([alone, busy], device=bench.loop.storage.data_L2BPKD.device)
    bench.cell.groups["decode"].group.allreduce([times]).wait()  # type: ignore[attr-defined]
    alone, busy = times.tolist()
    return [{"rows": count, "alone ms": alone, "beside a prefill ms": busy, "ratio": busy / alone}]


def prefill_s(bench: Bench, seq: int, tokens: int, parts: list[int], steps: list[float] | None = None) -> float:
    """Seconds from the first step of a prompt to its end; `parts`: who takes part. `steps` gets those between decodes."""
    prompt = array("I", torch.randint(bench.vocab, (tokens,), generator=torch.Generator().manual_seed(1)).tolist())
    shares = [tokens * part // sum(parts) for part in parts]
    shares[0] += tokens - sum(shares)
    begin = time.perf_counter()
    bench.loop.admit(seq, prompt, shares, 1)
    ends = bench.loop.finish(seq)
    if steps is not None:
        steps += [b - a for a, b in pairwise(ends["decode"])]
    return time.perf_counter() - begin


def prefills(bench: Bench, lengths: list[int]) -> list[Row]:
    rows: list[Row] = []
    for length in lengths:
        tokens = bench.tokens(length)
        bench.together()
        seconds = prefill_s(bench, 1 << 20, tokens, [1, 1])
        bench.cell.barrier()
        bench.loop.drain()
        rows.append({"tokens": tokens, "s": seconds})
    return rows


def mixed(bench: Bench) -> list[Row]:
    """32 rows at 8K, 16 at home on each GPU, while a prompt of 128K is prefilled by both."""
    count, tokens, prompt = 32, bench.tokens(8192), bench.tokens(131072)

    def place() -> None:
        bench.together()
        for seq in range(count):
            bench.loop.place(seq, [tokens, 0] if seq % 2 else [0, tokens], 2000)

    place()
    ends = bench.loop.steps(STEPS)
    alone = [b - a for a, b in pairwise(ends[WARM:])]
    bench.loop.drain()
    bench.cell.barrier()
    place()
    bench.loop.steps(WARM)
    times: list[float] = []
    seconds = prefill_s(bench, 1 << 20, prompt, [1, 1], times)
    bench.cell.barrier()
    bench.loop.drain()
    bench.cell.barrier()
    bench.together()
    undisturbed_s = prefill_s(bench, 1 << 21, prompt, [1, 1])
    bench.cell.barrier()
    bench.loop.drain()
    before, beside = p99(alone), p99(times)
    return [
        {
            "rows": count, "P99 alone ms": 1e3 * before, "P99 beside ms": 1e3 * beside,
            "P99 ratio": beside / before, "prefill alone s": undisturbed_s, "prefill beside s": seconds,
            "prefill ratio": seconds / undisturbed_s, "steps": len(times),
        }
    ]  # fmt: skip


PARTS: dict[str, tuple[str, Callable[[Bench], list[Row]]]] = {
    "exchange": ("Dispatch and combine", exchange),
    "long": ("One row of a long sequence", long_rows),
    "mixed": ("Decodes beside a prefill of both GPUs", mixed),
    "undisturbed": ("Two GPUs that share nothing", undisturbed),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_cell.json"))
    parser.add_argument("--shape", default="llama-3.1-8b", help="of make_dummy_model.py, or a config.json")
    parser.add_argument("--kv-tokens", type=int, help="of each GPU (default: what --kv-memory 0.92 gives)")
    parser.add_argument("--chunk-tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="*", choices=(*PARTS, "prefill"), default=(*PARTS, "prefill"))
    parser.add_argument("--prefill", type=int, nargs="*", default=[131072], help="prompt lengths")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths, to try this out")
    queues_of_their_own()
    args = parser.parse_args()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size != 2:
        print("bench_cell: start it with python -m torch.distributed.run --nproc-per-node 2", file=sys.stderr)
        return 2
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = make_model(args.shape, device)
    capacity = pool_tokens(model, args.chunk_tokens, size) if device.type == "cuda" else args.kv_tokens
    storage = make_storage(model, args.kv_tokens or capacity)
    copy = copy_bandwidth() if device.type == "cuda" else 10.0
    meeting = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    stores = []  # to be kept as long as the group
    if rank == 0:
        kept, address = open_store("127.0.0.1", 60)
        stores.append(kept)
        meeting.set("address", address)
    cell = Cell.meet(meeting.get("address").decode(), rank, size, device)
    loop = Loop(model, storage, chunk_tokens=args.chunk_tokens, cell=cell)
    bench = Bench(loop, cell, rank, copy, round(bytes_read(model)), model.token_bytes(), model.vocab_size, args.scale)
    report: Row = {
        "copy_GB/s": copy,
        "KV tokens of each GPU": capacity,
        "arguments": {key: str(value) for key, value in vars(args).items()},
    }
    for part in args.only:
        title, measure = PARTS[part] if part in PARTS else ("Prefill on two GPUs", lambda b: prefills(b, args.prefill))
        report[part] = measure(bench)
        if rank == 0:
            show(report[part], title)
            write_json(args.out, report)
    cell.barrier()
    loop.close()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of the loop may still wait for the other process
