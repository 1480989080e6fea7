"""The needle benchmark of `distattn needle`, and beside it, if asked, what transformers alone answers to the same tokens."""

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from _arguments import add_benchmark_arguments, check_benchmark_arguments
from _setup import CACHE

from gmanager import AsyncClient, DistattnError
from gmanager.cli.assets import HAYSTACK, FetchError, fetch
from gmanager.cli.needle import Case, PromptError, Reference, Result, Task, benchmark


def with_references(
    model: Path, cases: Sequence[Case], results: Sequence[Result], progress: Callable[[], None]
) -> list[Result]:
    """The results with transformers' own answers beside them (float32, SDPA, greedy)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers' stubs give generate() a self of another type
    module: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(model)
    by_place = {(case.context, case.depth): case for case in cases}
    compared = []
    for result in results:
        case = by_place[result.context, result.depth]
        ids = torch.tensor([case.token_ids])
        with torch.inference_mode():
            out = module.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(result.token_ids), do_sample=False
            )
        new = out[0, len(case.token_ids) :].tolist()
        answer = str(tokenizer.decode(new, skip_special_tokens=True))
        compared.append(msgspec.structs.replace(result, reference=Reference(answer, new, case.secret in answer)))
        progress()
    return compared


def task_of(args: argparse.Namespace, model: Path | None, haystack: Path, device: str) -> Task:
    """What the arguments ask for. `model`: of the reference."""
    return Task(
        contexts=args.contexts,
        depths=args.depths,
        max_tokens=args.max_tokens,
        haystack=haystack,
        out=args.out,
        device=device,
        reference=None if args.reference == "none" or model is None else partial(with_references, model),
    )


async def served_model(address: str) -> str:
    """What the service's instances were told to serve. Raises PromptError if there are none."""
    async with AsyncClient(address) as client:
        cells = (await client.stats()).cells
    if not cells:
        raise PromptError("the service has no cell yet: start instances")
    return cells[0].model


def main() -> int:
    parser = argparse.ArgumentParser("needle.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gmanager", required=True, help="address of a running service")
    parser.add_argument("--model", help="of the reference: a directory, a hub id or a GGUF file (default: as the service says)")
    parser.add_argument("--haystack", type=Path, help="folder of .txt files (default: Paul Graham's essays, fetched once)")
    parser.add_argument("--cache-dir", type=Path, help="where converted checkpoints are kept")
    add_benchmark_arguments(parser, out=Path("results"))
    args = parser.parse_args()
    check_benchmark_arguments(parser, args)
    from instance.checkpoint import CheckpointError, resolve_checkpoint

    try:
        model = None
        if args.reference != "none":
            model = resolve_checkpoint(args.model or asyncio.run(served_model(args.gmanager)), cache_dir=args.cache_dir)
        haystack = args.haystack or fetch(HAYSTACK, CACHE / "haystack")[0].parent
        return asyncio.run(benchmark(args.gmanager, task_of(args, model, haystack, "as the service runs")))
    except (PromptError, CheckpointError, FetchError, DistattnError) as error:
        print(f"needle.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
