#!/usr/bin/env python3
"""What each stage of `--pp` takes for a prompt, where devices differ: here CPUs with so many threads each.

    bench_stages.py --threads 2,1 --layers 15,15 20,10

Each stage's part of the model is loaded by itself and computes its layers of the prompt's slices, from the rows that the stage
before has left, over a pool of its own: what runs in a step, without the ways between. For each choice of layers the seconds
of each stage, by the fastest of the rounds, which take turns; stages that take as long keep each other busy (`--pp-layers`).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import torch
from _measure import Row, facts, show
from _setup import CACHE

from distattn.attention import DistAttention
from distattn.layout import Layout, read_run
from gmanager.cli.assets import MODEL, fetch
from instance.checkpoint import resolve_checkpoint
from instance.load import load_model
from instance.model import Model
from instance.pipelining import slice_rows
from instance.split import Place
from instance.step import FAR
from kvstore.run import Run
from kvstore.sight import FULL

CPU = torch.device("cpu")
BLOCK = 16


class Stage:
    """One part of a model, with a pool for one sequence."""

    def __init__(self, path: Path, place: Place, threads: int, tokens: int) -> None:
        self._threads = threads
        self._model: Model = load_model(path, torch.float32, CPU, place=place)
        nowhere: Any = None  # nothing is exchanged
        storage = self._model.make_storage(-(-tokens // BLOCK), BLOCK)
        self._attention = DistAttention(storage, self._model.shape, nowhere, backend="torch")

    def run(self, ids: Sequence[int], slices: Sequence[range], rows: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """What goes on of each slice."""
        torch.set_num_threads(self._threads)
        model, out = self._model, []
        model.context.attention = self._attention
        with torch.inference_mode():
            for its, before in zip(slices, rows, strict=True):
                table = tuple(range(-(-its.stop // BLOCK)))
                read = read_run(Run.of(BLOCK, [(0, its.stop)], table), 0, its.start, its.stop, FULL)
                self._attention.plan([Layout(len(its), [] if read is None else [read], [], {}, {}, [])], [list(its)])
                given = None if before is None else before.clone()
                rows_TE = model.run_stage(torch.tensor(ids[its.start : its.stop]), torch.tensor(list(its)), given)
                assert rows_TE is not None
                out.append(rows_TE)
        return out


def measure(path: Path, layers: tuple[int, ...], threads: Sequence[int], tokens: int, chunk: int, rounds: int) -> list[float]:
    """Seconds of each stage."""
    slices, start = [], 0
    while start < tokens:
        rows = slice_rows(start, tokens - start, stages=len(layers), most=chunk, reach=FAR, grain=1)
        slices.append(range(start, start + rows))
        start += rows
    ids = torch.randint(1000, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    places = [Place(stage=i, stages=len(layers), layers=layers) for i in range(len(layers))]
    stages = [Stage(path, place, count, tokens) for place, count in zip(places, threads, strict=True)]
    took: list[list[float]] = [[] for _ in stages]
    for _ in range(1 + rounds):  # in the first memory is allocated
        rows_of_slices: Sequence[torch.Tensor | None] = [None] * len(slices)
        for stage, its in zip(stages, took, strict=True):
            began = time.perf_counter()
            rows_of_slices = stage.run(ids, slices, rows_of_slices)
            its.append(time.perf_counter() - began)
    return [min(its[1:]) for its in took]


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory, a hub id or a GGUF file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--threads", type=numbers, default=(2, 1), help="of each stage (2,1)")
    parser.add_argument("--layers", type=numbers, nargs="+", required=True, help="of each stage, one choice or several")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt (1024)")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="most rows of a slice (256)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    path = resolve_checkpoint(args.model or str(fetch(MODEL, CACHE / "model")[0]), cache_dir=CACHE / "converted")
    rows: list[Row] = []
    for layers in args.layers:
        if len(layers) != len(args.threads):
            parser.error(f"--layers {','.join(map(str, layers))} are of {len(layers)} stages, --threads of {len(args.threads)}")
        took = measure(path, layers, args.threads, args.tokens, args.chunk_tokens, args.rounds)
        per_layer = [seconds / count for seconds, count in zip(took, layers, strict=True)]
        even = [1 / its / sum(1 / other for other in per_layer) * sum(layers) for its in per_layer]
        rows.append(
            {
                "layers": ",".join(map(str, layers)),
                **{f"stage {i}, s": seconds for i, seconds in enumerate(took)},
                "longest over mean": max(took) / statistics.mean(took),
                "even would be": ", ".join(f"{its:.1f}" for its in even),
            }
        )
    print(facts())
    show(rows, f"{args.tokens} tokens, threads {args.threads}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
