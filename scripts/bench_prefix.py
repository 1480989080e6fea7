#!/usr/bin/env python3
"""What it saves that KV of prompts stays for others that begin with the same tokens, and what it costs where none do.

    first     time to the first token of a question about a document, which is computed and lies on all instances
    second    of another question about the same one
    cold      of that question where nothing is known of the document, under a salt of its own: the tokens must be the same

Then prompts that have nothing in common run at two cells in turns, `on` that caches and `off` that doesn't, and it is compared
how many tokens each gives in a second.

With --tier-rounds a document is asked about, in a cell with tiers below its pools, first `cold`, then while it lies in the
`pool`, and again once others have driven it out, from `host` memory; and in a cell with a disk alone from the `disk`.

Exit code 0, 1 if tokens differ, KV was copied or a stream failed, 2 if something could not be started.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
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


async def ask(client: AsyncClient, ids: list[int], args: argparse.Namespace, salt: str | None = None) -> Asked:
    """One question. `salt`: of those that may share; None: with all that have none."""
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


@dataclass(frozen=True, slots=True)
class TierRound:
    """Seconds to the first token of a question about one document, by where its KV was."""

    below: str
    cold_s: float
    pool_s: float
    below_s: float
    read_tokens: int
    """From below."""
    same_tokens: bool


async def from_below(client: AsyncClient, args: argparse.Namespace, seed: int, below: str) -> TierRound:
    """A document is asked about, again, driven out by others and asked about once more. `below`: what there is."""
    rng = random.Random(1000 + seed)

    def drawn(count: int) -> list[int]:
        return [rng.randrange(args.vocab_size) for _ in range(count)]

    document = drawn(args.prompt_tokens - args.question_tokens)
    question = document + drawn(args.question_tokens)
    cold = await ask(client, question, args)
    pool = await ask(client, question, args)
    room = sum(instance.total_tokens for instance in (await client.stats()).instances)
    for _ in range(1 + -(-room // args.prompt_tokens)):
        await until_copied(client)
        await ask(client, drawn(args.prompt_tokens), args)
    before = (await client.stats()).counters.tier_tokens
    again = await ask(client, question, args)
    await asyncio.sleep(1.5)  # counters come with beats
    read = (await client.stats()).counters.tier_tokens - before
    return TierRound(below, cold.ttft_s, pool.ttft_s, again.ttft_s, read, cold.tokens == pool.tokens == again.tokens)


async def until_copied(client: AsyncClient) -> None:
    """Wait until all that is cached has a copy, a minute at most."""
    async with asyncio.timeout(60):
        while not all(i.host_tokens + i.disk_tokens >= i.cached_tokens for i in (await client.stats()).instances):
            await asyncio.sleep(0.1)


async def tier_rounds(args: argparse.Namespace, logs: Path) -> list[TierRound]:
    """For each kind of tier a cell of its own."""
    rounds: list[TierRound] = []
    for below, flags in (("host", {"host_memory": args.tier_size}), ("disk", {"disk": f"{args.disk}:{args.tier_size}"})):
        folder = logs / below
        folder.mkdir()
        async with running(config_of(args, folder, **flags)) as service, AsyncClient(service.address) as client:
            await one_document(client, args, args.rounds, args.prompt_tokens // 8)  # warms up
            rounds += [await from_below(client, args, seed, below) for seed in range(args.tier_rounds)]
    return rounds


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
    parser.add_argument("--tier-rounds", type=int, default=0, help="documents that are driven out of the pools, for each tier")
    parser.add_argument("--tier-size", default="2G", metavar="SIZE", help="of host memory, or of the disk, of each instance")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="directory of the disk's file")
    args = parser.parse_args()
    if not 0 < args.question_tokens < args.prompt_tokens:
        parser.error(f"a document needs more than its question's {args.question_tokens} tokens, got {args.prompt_tokens}")

    async def measure(logs: Path) -> bool:
        rounds: list[Round] = []
        copied = 0
        async with running(config_of(args, logs)) as service, AsyncClient(service.address) as on:
            if args.rounds:
                await one_document(on, args, args.rounds, args.prompt_tokens // 8)  # warms up
                rounds = [await one_document(on, args, seed, args.prompt_tokens) for seed in range(args.rounds)]
                copied = (await on.stats()).counters.blocks_copied
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
        tiers = await tier_rounds(args, logs) if args.tier_rounds else []
        if tiers:
            show([asdict(each) for each in tiers], "a document driven out of the pools, s to the first token")
            for below in ("host", "disk"):
                ratio = statistics.median(each.cold_s / each.below_s for each in tiers if each.below == below)
                print(f"cold over {below}: {ratio:.1f}")
        return all(each.same_tokens for each in [*rounds, *tiers]) and not copied

    return run_within(measure)


if __name__ == "__main__":
    sys.exit(main())
