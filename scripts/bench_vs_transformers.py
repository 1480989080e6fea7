#!/usr/bin/env python3
"""The service beside `transformers.generate` on the same cores: one prompt, one answer, float32, greedy.

Transformers runs with SDPA and all threads; the service with two instances that share the cores and pools of which none holds
the prompt. Both are warm and loaded; they take turns, and the ratios are medians over the pairs. Run `scripts/quickstart` once
before: it makes .venv and fetches the model.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _setup import CACHE, ROOT, ensure_venv

INSTANCES = 2


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer."""

    ttft_s: float
    total_s: float
    token_ids: list[int]

    @property
    def tpot_s(self) -> float:
        """Mean time between tokens after the first."""
        return (self.total_s - self.ttft_s) / (len(self.token_ids) - 1)


class Alone:
    """transformers in this process."""

    def __init__(self, model: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        # transformers' stubs give generate() a self of another type
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
        self._model.generation_config.eos_token_id = None  # as the service's ignore_eos

    def answer(self, prompt: list[int], new: int) -> Timing:
        import torch

        ids = torch.tensor([prompt])
        clock = _Clock()
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                streamer=clock,
                pad_token_id=0,
            )
        return Timing(clock.first - clock.began, time.perf_counter() - clock.began, out[0, len(prompt) :].tolist())


class _Clock:
    """A streamer that notes when the first token came; `put` gets the prompt first."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.first = 0.0
        self._puts = 0

    def put(self, value: object) -> None:
        self._puts += 1
        if self._puts == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        """Nothing is open."""


async def served(client: Any, prompt: list[int], new: int) -> Timing:
    """Submit to last token."""
    from gmanager import SamplingParams

    began = time.perf_counter()
    first = 0.0
    ids: list[int] = []
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    async for chunk in client.generate(prompt, params):
        first = first or time.perf_counter()
        ids += chunk.token_ids
    return Timing(first - began, time.perf_counter() - began, ids)


async def compare(args: argparse.Namespace) -> int:
    """Measure and print. Returns 1 if the answers differ or the total is over the bound."""

    from gmanager import AsyncClient
    from gmanager.cli.assets import HAYSTACK, MODEL, fetch
    from gmanager.cli.needle import Prompts, read_haystack
    from gmanager.cli.service import ServiceConfig, running
    from instance.checkpoint import resolve_checkpoint
    from instance.load import load_text_assets

    cores = len(os.sched_getaffinity(0))
    model = resolve_checkpoint(str(fetch(MODEL, CACHE / "model")[0]), cache_dir=CACHE / "converted")
    haystack = read_haystack(fetch(HAYSTACK, CACHE / "haystack")[0].parent)
    prompts = Prompts(load_text_assets(model), haystack)
    prompt = prompts.make(args.prompt_tokens, 50).token_ids
    config = ServiceConfig(
        model=str(model),
        instances=INSTANCES,
        kv_tokens=args.kv_tokens,
        threads=max(1, cores // INSTANCES),
        chunk_tokens=args.chunk_tokens,
        logs=args.out,
    )
    pairs: list[tuple[Timing, Timing]] = []
    alone = Alone(model, cores)
    async with running(config) as service, AsyncClient(service.address) as client:
        for turn in range(-1, args.pairs):
            # in a thread: the client's heartbeats go on
            ours = await served(client, prompt, args.new_tokens)
            theirs = await asyncio.to_thread(alone.answer, prompt, args.new_tokens)
            if ours.token_ids != theirs.token_ids:
                print(f"the answers differ: {ours.token_ids} and {theirs.token_ids}", file=sys.stderr)
                return 1
            if turn >= 0:  # the first pair warms up
                pairs.append((ours, theirs))
                show(f"pair {turn + 1}", ours, theirs)
    total = statistics.median(a.total_s / b.total_s for a, b in pairs)
    prefill = statistics.median(a.ttft_s / b.ttft_s for a, b in pairs)
    tpot = statistics.median(a.tpot_s / b.tpot_s for a, b in pairs)
    print(f"median ratios, service / transformers: total {total:.3f}, prefill {prefill:.3f}, TPOT {tpot:.3f}")
    return 0 if total <= args.bound else 1


def show(name: str, ours: Timing, theirs: Timing) -> None:
    def row(t: Timing) -> str:
        return f"total {t.total_s:6.2f} s, prefill {t.ttft_s:6.2f} s, TPOT {t.tpot_s * 1e3:5.1f} ms"

    print(f"{name}: service {row(ours)} | transformers {row(theirs)} | ratio {ours.total_s / theirs.total_s:.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=32, help="at least 2")
    parser.add_argument("--kv-tokens", type=int, default=2304, help="of each of the two instances")
    parser.add_argument("--chunk-tokens", type=int, help="as the instances' flag")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--bound", type=float, default=1.25, help="largest ratio of total times that counts as success")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the service's logs")
    args = parser.parse_args()
    ensure_venv()
    return asyncio.run(compare(args))


if __name__ == "__main__":
    sys.exit(main())
