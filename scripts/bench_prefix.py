#!/usr/bin/env python3
"""What it saves that KV of prompts stays for others that begin with the same tokens, and what it costs where none do.

    first     time to the first token of a question about a document, which is computed and lies on all instances
    second    of another question about the same one
    cold      of that question where nothing is known of the document, under a salt of its own: the tokens must be the same

Then prompts that have nothing in common run at two cells in turns, `on` that caches and `off` that doesn't, and it is compared
how many tokens each gives in a second.

Exit code 0, 1 if tokens differ, KV was copied or a stream failed, 2 if something could not be started.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from _cell import config_of, parser_of, run_within
from _measure import show

from gmanager import AsyncClient, SamplingParams
from gmanager.cli.service import running


@dataclass(frozen=True, slots=True)
class Asked:
    ttft_s: float
    tokens: list[int]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Round:
    document_tokens: int
    cached_tokens: int
    """Of the second question."""
    first_s: float
    second_s: float
    cold_s: float
    same_tokens: bool

    @property
    def ratio(self) -> float:
        return self.cold_s / self.second_s


async def ask(client: AsyncClient, ids: list[int], args: argparse.Namespace, salt: str) -> Asked:
    """One question. `salt`: of those that may share."""
    params = SamplingParams(max_tokens=args.new_tokens, temperature=0, ignore_eos=True)
    tokens: list[int] = []
    ttft, cached, begun = 0.0, 0, time.monotonic()
    async for chunk in client.generate(ids, params, spread="all", cache_salt=salt):
        if chunk.token_ids and not tokens:
            ttft = time.monotonic() - begun
        tokens += chunk.token_ids
        cached = chunk.cached_tokens
    return Asked(ttft, tokens, cached)


async def one_document(client: AsyncClient, args: argparse.Namespace, seed: int, tokens: int) -> Round:
    rng = random.Random(seed)

    def drawn(count: int) -> list[int]:
        return [rng.randrange(args.vocab_size) for _ in range(count)]

    document = drawn(max(1, tokens - args.question_tokens))
    salt = f"document {seed}"
    first = await ask(client, document + drawn(args.question_tokens), args, salt)
    question = document + drawn(args.question_tokens)
    second = await ask(client, question, args, salt)
    cold = await ask(client, question, args, f"{salt}, cold")
    return Round(len(document), second.cached_tokens, first.ttft_s, second.ttft_s, cold.ttft_s, second.tokens == cold.tokens)


async def tokens_per_s(client: AsyncClient, prompts: Sequence[list[int]], args: argparse.Namespace) -> float:
    """Prompt tokens and generated ones, of all prompts at once."""
    params = SamplingParams(max_tokens=args.new_tokens, temperature=0, ignore_eos=True)

    async def one(ids: list[int]) -> int:
        return len(ids) + sum([len(chunk.token_ids) async for chunk in client.generate(ids, params)])

    begun = time.monotonic()
    total = sum(await asyncio.gather(*(one(ids) for ids in prompts)))
    return total / (time.monotonic() - begun)


async def without_reuse(on: AsyncClient, off: AsyncClient, args: argparse.Namespace) -> list[dict[str, float]]:
    """The same new prompts at both, in turns, whoever is first; the first round of each is not counted."""
    rng = random.Random(1)
    found: list[dict[str, float]] = []
    for number in range(args.throughput_rounds + 1):
        prompts = [[rng.randrange(args.vocab_size) for _ in range(args.short_tokens)] for _ in range(args.requests)]
        turns = [("on", on), ("off", off)] if number % 2 else [("off", off), ("on", on)]
        rates = {name: await tokens_per_s(client, prompts, args) for name, client in turns}
        if number:
            found.append({"on": rates["on"], "off": rates["off"], "ratio": rates["on"] / rates["off"]})
    return found


def main() -> int:
    parser = parser_of(__doc__, prompt_tokens=4096)
    parser.add_argument("--question-tokens", type=int, default=32, help="of a prompt: what follows the document")
    parser.add_argument("--new-tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--requests", type=int, default=16, help="without reuse: at once")
    parser.add_argument("--short-tokens", type=int, default=256, help="without reuse: of each prompt")
    parser.add_argument("--throughput-rounds", type=int, default=5, help="without reuse: of each cell; 0: none")
    args = parser.parse_args()
    if not 0 < args.question_tokens < args.prompt_tokens:
        parser.error(f"a document needs more than its question's {args.question_tokens} tokens, got {args.prompt_tokens}")

    async def measure(logs: Path) -> bool:
        async with running(config_of(args, logs)) as service, AsyncClient(service.address) as on:
            await one_document(on, args, args.rounds, args.prompt_tokens // 8)  # warms up
            rounds = [await one_document(on, args, seed, args.prompt_tokens) for seed in range(args.rounds)]
            copied = (await on.stats()).counters.blocks_copied
            if rounds:
                told = [asdict(each) | {"ratio": each.ratio} for each in rounds]
                show(told, "a document asked about twice, s to the first token")
                print(f"cold over second: {statistics.median(each.ratio for each in rounds):.1f}; blocks copied: {copied}")
            if args.throughput_rounds:
                second_logs = logs / "off"
                second_logs.mkdir()
                config = config_of(args, second_logs, prefix_cache=False)
                async with running(config) as without, AsyncClient(without.address) as off:
                    turns = await without_reuse(on, off, args)
                show(turns, "nothing in common, tokens/s")
                print(f"cache on over off: {statistics.median(turn['ratio'] for turn in turns):.3f}")
        return all(each.same_tokens for each in rounds) and not copied

    return run_within(measure)


if __name__ == "__main__":
    sys.exit(main())
