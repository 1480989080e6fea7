#!/usr/bin/env python3
"""Steps of one instance on one GPU: random weights of the Llama-3.1-8B shape (or of `--shape`), bf16, no service around it.

Decode: sequences whose KV is random (std 0.5) instead of prefilled. `step` is what the loop of an instance reaches (propose,
derive, launch, commit, two deep), by the host's clock over many steps; `graph` the same step's captured graph replayed alone,
by device events; their difference is what the host's work costs. `products` is the step's matrix products alone in a graph, and
`no attention` the captured step without its attention kernels. `floor` is (weights + KV) over the copy bandwidth of this run:
of experts those that so many rows go to, each as likely as the others, of KV what rows see in each layer.
Sampling: the step of 64 rows with what requests may ask of it, over the same step without, in turns.
Prefill: whole prompts of random tokens through the same loop; `alone` are the products and attention of its steps, one after
the other, without what lies between them.
Beside: decodes in their lane while a prompt runs in the other, over each alone (`--decode-processors`, `--mixed-chunk-tokens`).
"""

import argparse
import itertools
import statistics
import sys
from array import array
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import torch
from _dummy import BLOCK, bytes_read, bytes_seen, make_model, make_storage
from _loop import Loop
from _measure import Row, copy_bandwidth, event_ms, graph_ms, matmul_tflops, p99, show, write_json
from llguidance import LLMatcher, LLTokenizer

from distattn.attention import DistAttention
from distattn.exchange import Exchange
from distattn.layout import Layout, read_run
from distattn.shape import PackedRows
from gmanager.wire.messages import TextAssets
from instance.config import GPU_MIXED_CHUNK_TOKENS
from instance.layers import Mixture
from instance.model import Model
from instance.processors import queues_of_their_own
from instance.sharing import SPLITS
from kernels.launch import num_processors
from kernels.layer_ops import linear
from kernels.products import SCHEMES
from kvstore.run import Run
from kvstore.storage import KVStorage

DECODES = ((1, 1024), (1, 32768), (1, 131072), (1, 524288), (64, 1024), (64, 8192))
ROWS = (1, 8, 64)
PARTS = ("products", "decode", "sampling", "prefill", "beside")
PREFILLS = (32768, 131072)
STEPS = 60

SAMPLING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "penalties": ({}, {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}),
    "biases": ({}, {"logit_bias": dict.fromkeys(range(100), 1.0), "min_tokens": 1 << 20, "stop_token_ids": [2]}),
    "bad words": ({}, {"bad_words": [[5], [7, 8], [9, 10, 11]]}),
    "random": ({}, {"temperature": 1.0}),
    "min_p": ({"temperature": 1.0}, {"temperature": 1.0, "min_p": 0.05}),
}
"""What is asked for: without, and with."""
TURNS = 5
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    },
}


class NoAttention:
    """Stores KV as a step does, and attends to nothing."""

    def __init__(self, model: Model, storage: KVStorage, rows: int) -> None:
        self._heads = model.shape.num_heads
        self._storage = storage
        self._slots_T = torch.arange(rows, dtype=torch.int32, device=model.device)

    def run(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        raise RuntimeError("the model is not fused")

    def run_packed(self, layer: int, rows: PackedRows) -> torch.Tensor:
        return rows.rotate_and_store(self._heads, self._storage.layer(layer), self._slots_T, "triton")

    def store_packed(self, layer: int, rows: PackedRows) -> None:
        self.run_packed(layer, rows)


def products_ms(model: Model, rows: int) -> float:
    """Milliseconds of a step's matrix products alone, by the faster of torch's and ours for each shape."""
    assert model.fused is not None  # checked in main
    weights = model.fused.matrices()
    dtype = model.shape.dtype
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1], dtype=dtype, device="cuda") for weight in weights}

    def run(backend: str) -> float:
        return graph_ms(lambda: [linear(inputs[w.shape[1]], w, backend=backend) for w in weights], calls=1)

    return min(run("torch"), run("triton"))


def no_attention_ms(model: Model, storage: KVStorage, rows: int) -> float:
    ids_T = torch.arange(rows, device="cuda")
    model.context.attention = NoAttention(model, storage, rows)
    try:
        return graph_ms(lambda: model.forward(ids_T, ids_T, ids_T), calls=1)
    finally:
        model.context.attention = None


def decode(loop: Loop, rows: int, tokens: int, model: Model, copy: float) -> Row:
    graphs = loop.runners["decode"].graphs[num_processors(model.device)]
    for seq in range(rows):
        loop.place(seq, [tokens], STEPS + 40)
    ends = loop.steps(STEPS)
    between = [b - a for a, b in pairwise(ends[10:])]
    # the tables of the last step are still in place
    graph = event_ms(graphs.graph(rows).replay, repeats=15)
    loop.drain()
    read = bytes_read(model, rows) + rows * bytes_seen(model, tokens)
    step = 1e3 * statistics.median(between)
    floor = read / copy / 1e6
    return {
        "rows": rows, "tokens": tokens, "step ms": step, "P99": 1e3 * p99(between),
        "graph ms": graph, "host's part": (step - graph) / step, "floor ms": floor, "step / floor": step / floor,
    }  # fmt: skip


def sampling(loop: Loop, rows: int, tokens: int, tokenizer: Path | None) -> list[Row]:
    """Medians over turns, each of which runs both sides."""
    found: list[Row] = []
    cases = dict(SAMPLING)
    if tokenizer is not None:
        (bracket,) = LLTokenizer(tokenizer.read_text()).tokenize_str("[")
        grammar = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
        cases["JSON schema"] = {}, {"token": bracket, "grammar": grammar}
    numbers = itertools.count()  # a sequence keeps its number and what it asks for
    for name, sides in cases.items():
        times: tuple[list[float], list[float]] = [], []
        for _ in range(TURNS):
            for side, asked in enumerate(sides):
                for _ in range(rows):
                    loop.place(next(numbers), [tokens], STEPS + 40, **asked)
                ends = loop.steps(STEPS)
                loop.drain()
                times[side].append(1e3 * statistics.median(b - a for a, b in pairwise(ends[10:])))
        without, given = (statistics.median(side) for side in times)
        found.append(
            {"asked": name, "rows": rows, "tokens": tokens, "ms": given, "without ms": without, "ratio": given / without}
        )
    return found


def prefill(loop: Loop, tokens: int, vocab: int) -> Row:
    prompt = array("I", torch.randint(vocab, (tokens,)).tolist())
    loop.admit(1 << 20, prompt, [tokens], 1)
    ends = loop.finish(1 << 20)["prefill"]
    steps = [b - a for a, b in pairwise(ends)]
    return {"tokens": tokens, "s": ends[-1], "first step s": ends[0], "last step s": steps[-1] if steps else None}


def alone_s(model: Model, storage: KVStorage, tokens: int, chunk: int) -> float:
    """Seconds of the products and attention of a prompt's steps, without all that is between them."""
    assert model.fused is not None  # checked in main
    rows, seconds = min(chunk, tokens), 0.0
    x_TE = torch.randn(rows, model.fused.matrices()[0].shape[1], dtype=model.shape.dtype, device="cuda")
    *matrices, _head = model.fused.matrices()
    inputs = {weight.shape[1]: x_TE.new_empty(rows, weight.shape[1]).normal_() for weight in matrices}
    with torch.inference_mode():
        for weight in matrices:
            seconds += event_ms(lambda w=weight: linear(inputs[w.shape[1]], w, backend="triton"), repeats=1)  # type: ignore[misc]
        for feed in model.fused.feeds():
            if isinstance(feed, Mixture):
                seconds += event_ms(lambda f=feed: f.run(x_TE, None, "triton"), repeats=1)  # type: ignore[misc]
        seconds *= tokens / rows
        attention = DistAttention(storage, model.shape, Exchange(None, model.device), backend="triton")  # type: ignore[arg-type]
        attention.use_tiles(rows)
        run = Run.of(BLOCK, [(0, tokens)], range(tokens // BLOCK))
        q_THD = x_TE.new_empty(rows, model.shape.num_heads, model.shape.head_dim).normal_()
        kv_TKD = x_TE.new_empty(rows, model.shape.num_kv_heads, model.shape.head_dim).normal_()
        counts = Counter(model.shape.group(layer) for layer in range(model.num_layers))
        for start in range(0, tokens, rows):
            readings = [read_run(run, 0, start, start + rows, sight) for sight in model.shape.sights]
            layouts = [Layout(rows, [] if r is None else [r], [], {}, {}, []) for r in readings]
            attention.plan(layouts, [list(range(start, start + rows))])
            for group, count in counts.items():
                layer = next(i for i in range(model.num_layers) if model.shape.group(i) == group)
                seconds += count * event_ms(lambda i=layer: attention.run(i, q_THD, kv_TKD, kv_TKD), repeats=1)  # type: ignore[misc]
    return seconds / 1e3


def beside(loop: Loop, rows: int, tokens: int, prompt: int, vocab: int) -> Row:
    """Decode steps beside the prefill of a prompt, over those before it; the prefill over the same alone."""
    alone = prefill(loop, prompt, vocab)["s"]
    for seq in range(rows):
        loop.place(seq, [tokens], 4000)
    ends = loop.steps(STEPS)
    before = [b - a for a, b in pairwise(ends[10:])]
    loop.admit(1 << 21, array("I", torch.randint(vocab, (prompt,)).tolist()), [prompt], 1)
    lanes = loop.finish(1 << 21)
    between = [b - a for a, b in pairwise(lanes["decode"])]
    loop.drain()
    return {
        "rows": rows, "tokens": tokens, "step alone ms": 1e3 * statistics.median(before), "P99 alone ms": 1e3 * p99(before),
        "step ms": 1e3 * statistics.median(between), "P99 ms": 1e3 * p99(between), "P99 ratio": p99(between) / p99(before),
        "prompt": prompt, "prefill alone s": alone, "prefill s": lanes["prefill"][-1],
        "prefill ratio": lanes["prefill"][-1] / alone, "steps": len(between),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_step.json"))
    parser.add_argument("--shape", default="llama-3.1-8b", help="of make_dummy_model.py, or a config.json")
    parser.add_argument("--quantize", choices=list(SCHEMES), help="weights of linear layers")
    parser.add_argument("--kv-tokens", type=int, default=64 * 8192 + 64 * 256)
    parser.add_argument("--kv-blocks", type=int, default=0, help=f"of {BLOCK} tokens, instead: where layers have windows")
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS), help="of a step without attention")
    parser.add_argument(
        "--decodes", nargs="*", default=[f"{rows}x{tokens}" for rows, tokens in DECODES], help="steps: rows x tokens of each"
    )
    parser.add_argument("--chunk-tokens", type=int, default=8192)
    parser.add_argument("--mixed-chunk-tokens", type=int, default=GPU_MIXED_CHUNK_TOKENS)
    parser.add_argument("--decode-processors", type=int, nargs="*", default=list(SPLITS))
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, to measure structured output with")
    parser.add_argument("--prefill", type=int, nargs="*", default=list(PREFILLS), help="prompt lengths")
    queues_of_their_own()
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_step: needs a GPU", file=sys.stderr)
        return 2
    copy, matmul = copy_bandwidth(), matmul_tflops()
    torch.cuda.empty_cache()
    model = make_model(args.shape, torch.device("cuda", 0), args.quantize)
    storage = make_storage(model, args.kv_tokens, args.kv_blocks)
    report: Row = {
        "copy_GB/s": copy,
        "matmul_TFLOP/s": matmul,
        "arguments": vars(args) | {"out": str(args.out), "tokenizer": str(args.tokenizer)},
    }
    print(f"copy {copy:.0f} GB/s, 8192^3 product {matmul:.0f} TFLOP/s, {model.weight_bytes():,} bytes")
    if "products" in args.only and model.fused is not None:
        report["without attention"] = []
        for rows in args.rows:
            products, whole = products_ms(model, rows), no_attention_ms(model, storage, rows)
            row = {"rows": rows, "products ms": products, "no attention ms": whole, "ratio": whole / products}
            report["without attention"].append(row)
        show(report["without attention"], "A decode step without attention")
        write_json(args.out, report)
    assets = None
    if args.tokenizer is not None:
        assets = TextAssets(tokenizer_json=args.tokenizer.read_text(), chat_template=None, special_tokens={}, eos_token_ids=[2])
    loop = Loop(
        model,
        storage,
        chunk_tokens=args.chunk_tokens,
        mixed_chunk_tokens=args.mixed_chunk_tokens,
        decode_processors=args.decode_processors,
        assets=assets,
    )
    if "decode" in args.only:
        report["decode"] = []
        for rows, tokens in (map(int, case.split("x")) for case in args.decodes):
            if args.kv_blocks or rows * (tokens + 256) <= args.kv_tokens:
                report["decode"].append(decode(loop, rows, tokens, model, copy))
                write_json(args.out, report)
        show(report["decode"], "Decode steps")
    if "sampling" in args.only:
        report["sampling"] = sampling(loop, 64, 1024, args.tokenizer)
        write_json(args.out, report)
        show(report["sampling"], "Sampling")
    if "prefill" in args.only:
        report["prefill"] = []
        for tokens in args.prefill:
            row = prefill(loop, tokens, model.vocab_size)
            loop.drain()
            if model.fused is not None:
                row["alone s"] = alone_s(model, storage, tokens, args.chunk_tokens)
                row["s / alone"] = row["s"] / row["alone s"]
            report["prefill"].append(row)
            write_json(args.out, report)
        show(report["prefill"], f"Prefill in chunks of {args.chunk_tokens}")
    if "beside" in args.only:
        report["beside"] = [beside(loop, 32, 8192, 131072, model.vocab_size)]
        write_json(args.out, report)
        show(report["beside"], f"Decodes beside a prompt, on {args.decode_processors} processors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
