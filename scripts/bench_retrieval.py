#!/usr/bin/env python3
"""Needles at any length, found exactly: the service's integrity, with the constructed model of `make_retrieval_model.py`.

Starts a service whose instances share every sequence, and asks for keys of haystacks in which every block has its own: at
given depths, and with `--questions` for random ones and those on both sides of borders between instances. An answer is right if
all its tokens are. Prints a table, writes JSON, and ends with 1 if one answer was wrong or a sequence did not lie on all
instances, with 130 if it was interrupted.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from _measure import Row, show, write_json
from _retrieval import Haystack, make_haystack
from bench_serve import interruptible
from make_retrieval_model import write

from gmanager import AsyncClient, SamplingParams
from gmanager.cli.service import KV_DTYPES, ServiceConfig, running

CHUNKS = 8
"""Of so many chunks the borders are asked about."""


@dataclass
class Asked:
    """What came of some questions to one haystack."""

    right: int
    of: int
    seconds: float
    held: dict[int, int]
    """Tokens by instance, of the last question."""


def at_depths(haystack: Haystack, depths: list[float]) -> list[int]:
    return [min(haystack.num_keys - 1, int(haystack.num_keys * depth)) for depth in depths]


def at_borders(haystack: Haystack, parts: int, chunk_tokens: int) -> list[int]:
    """Blocks on both sides of where one instance's tokens end and another's begin, of some chunks all along the haystack.

    `instance.step.split_chunk`: a chunk of `parts * chunk_tokens` is cut into spans of half as many, two of each instance.
    """
    half, whole = chunk_tokens // 2, parts * chunk_tokens
    starts = range(0, len(haystack.tokens) - whole, whole)
    chosen = starts[:: max(1, len(starts) // CHUNKS)]
    places = [start + half * (2 * i + 1) for start in chosen for i in range(parts)]
    blocks = {(place - 1) // haystack.block + side for place in places for side in (-1, 0, 1)}
    return [index for index in sorted(blocks) if 0 <= index < haystack.num_keys]


async def ask(client: AsyncClient, haystack: Haystack, questions: list[int], at_once: int) -> Asked:
    """Each question with its whole haystack, some of them at once."""
    gate = asyncio.Semaphore(at_once)
    tokens = haystack.tokens.tolist()
    held: dict[int, int] = {}

    async def one(index: int) -> bool:
        want = haystack.answer(index)
        async with gate:
            request_id = f"block-{index}-{time.time_ns()}"
            params = SamplingParams(temperature=0, max_tokens=len(want), ignore_eos=True)
            chunks = client.generate(tokens + haystack.question(index), params, request_id=request_id)
            got = [token async for chunk in chunks for token in chunk.token_ids]
            held.update((await client.stats()).requests[request_id].kv_tokens)
        if got != want:
            print(f"{len(tokens):,} tokens, block {index} of {haystack.num_keys:,}: {got} instead of {want}", file=sys.stderr)
        return got == want

    begin = time.perf_counter()
    right = sum(await asyncio.gather(*(one(index) for index in questions)))
    return Asked(right, len(questions), time.perf_counter() - begin, held)


async def measure(args: argparse.Namespace, folder: Path) -> int:
    """The exit code."""
    config = ServiceConfig(
        model=str(folder),
        instances=args.instances,
        kv_tokens=args.kv_tokens,
        kv_memory=None if args.kv_tokens else 0.92,
        device=args.device,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        spread="all",
        chunk_tokens=args.chunk_tokens,
        logs=args.out.parent / "logs",
    )
    rows: list[Row] = []
    async with running(config) as service, AsyncClient(service.address) as client:
        for length in args.contexts:
            haystack = make_haystack(length, block=args.block, seed=args.seed)
            questions = at_depths(haystack, args.depths)
            if args.questions:
                rng = np.random.default_rng(args.seed)
                some = rng.choice(haystack.num_keys, min(args.questions, haystack.num_keys), replace=False)
                questions = sorted({*questions, *at_borders(haystack, args.instances, args.chunk_tokens), *some.tolist()})
            asked = await ask(client, haystack, questions, args.at_once)
            rows.append(
                {
                    "tokens": length,
                    "keys": haystack.num_keys,
                    "asked": asked.of,
                    "right": asked.right,
                    "s a question": asked.seconds / asked.of,
                    "KV by instance": " + ".join(f"{count:,}" for _, count in sorted(asked.held.items())),
                    "instances": len(asked.held),
                }
            )
            write_json(args.out, {"rows": rows, "arguments": {key: str(value) for key, value in vars(args).items()}})
    show(rows, "Needles found")
    return int(any(row["right"] < row["asked"] or row["instances"] < args.instances for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/bench_retrieval.json"))
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 65536, 524288, 1572864], help="tokens of haystacks")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--questions", type=int, default=0, help="random keys beside those at the depths and at the borders")
    parser.add_argument("--at-once", type=int, default=1, help="questions that run at the same time")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--kv-tokens", type=int, help="of each instance; needed on the CPU")
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto", help="how KV is stored")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), getattr(torch, args.dtype))
        return asyncio.run(interruptible(measure(args, Path(folder))))


if __name__ == "__main__":
    sys.exit(main())
