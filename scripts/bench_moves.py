#!/usr/bin/env python3
"""What it costs a decode that KV is copied beside its steps.

In each round a long sequence decodes over all instances; then one of them, not its home, is drained, so that the part of the KV
that lies there is copied to the others, `--copy-tokens` beside each step.

    before    steps between tokens while nothing moves
    beside    the same from the drain until all is copied
    after     the drained instance is gone; it is started again for the next round

The tokens must be those of the same prompt with no move at all.

Exit code 0, 1 if tokens differ or a stream failed, 2 if something could not be started.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, field
from itertools import pairwise

from _cell import parser_of, run_with_cell, until_whole
from _measure import show

from gmanager import AsyncClient, Chunk, DistattnError, SamplingParams
from gmanager.cli.service import BLOCK_SIZE, Service

POLL_S = 0.05
"""Between two looks at how much has been copied."""


@dataclass(slots=True)
class Read:
    """Tokens of a stream, and when each came."""

    tokens: list[int] = field(default_factory=list)
    came: list[float] = field(default_factory=list)

    async def take(self, stream: AsyncGenerator[Chunk, None], count: int) -> None:
        """All that comes, until there are so many."""
        while len(self.tokens) < count:
            chunk = await anext(stream)
            self.tokens += chunk.token_ids
            self.came += [time.monotonic()] * len(chunk.token_ids)

    def steps_ms(self, since: float, until: float) -> list[float]:
        """Between neighbouring tokens in that time."""
        return [1000 * (b - a) for a, b in pairwise(at for at in self.came if since <= at <= until)]


@dataclass(frozen=True, slots=True)
class Round:
    copied_blocks: int
    steps_before: int
    steps_beside: int
    before_ms: float
    """Median."""
    beside_ms: float
    p90_before_ms: float
    p90_beside_ms: float
    same_tokens: bool

    @property
    def ratio(self) -> float:
        return self.beside_ms / self.before_ms


async def one_round(service: Service, client: AsyncClient, args: argparse.Namespace, seed: int) -> Round:
    rng = random.Random(seed)
    ids = [rng.randrange(args.vocab_size) for _ in range(args.prompt_tokens)]
    params = SamplingParams(max_tokens=args.new_tokens, temperature=0, ignore_eos=True)
    still, moved = Read(), Read()
    await still.take(client.generate(ids, params, spread="all"), args.new_tokens)

    stream = client.generate(ids, params, spread="all", request_id=f"moved {seed}")
    await moved.take(stream, args.new_tokens // 3)
    begun = moved.came[args.new_tokens // 12]  # the first steps follow the prompt's
    stats = await client.stats()
    request, copied_before = stats.requests[f"moved {seed}"], stats.counters.blocks_copied
    victim = max((rank for rank in request.kv_tokens if rank != request.home), key=lambda rank: request.kv_tokens[rank])
    blocks = -(-request.kv_tokens[victim] // BLOCK_SIZE[args.device])
    drained_at = time.monotonic()
    draining = asyncio.create_task(client.drain(victim))
    reading = asyncio.create_task(moved.take(stream, args.new_tokens))
    while (await client.stats()).counters.blocks_copied - copied_before < blocks and not reading.done():
        await asyncio.sleep(POLL_S)
    copied_at = time.monotonic()
    await asyncio.gather(reading, draining)
    copied = (await client.stats()).counters.blocks_copied - copied_before
    await until_whole(client, args.instances - 1)
    service.instances[victim].restart()
    await until_whole(client, args.instances)
    before, beside = moved.steps_ms(begun, drained_at), moved.steps_ms(drained_at, copied_at)
    if len(beside) < 10 or copied < blocks:
        raise DistattnError(f"{copied} of {blocks} blocks were copied beside {len(beside)} steps: more --new-tokens are needed")
    return Round(
        copied,
        len(before),
        len(beside),
        statistics.median(before),
        statistics.median(beside),
        statistics.quantiles(before, n=10)[-1],
        statistics.quantiles(beside, n=10)[-1],
        moved.tokens == still.tokens,
    )


def main() -> int:
    parser = parser_of(__doc__, prompt_tokens=2048)
    parser.add_argument("--new-tokens", type=int, default=180, help="of each stream: a third comes before the drain")
    parser.add_argument("--copy-tokens", type=int, default=16, help="of the instances: KV that is copied beside each step")
    args = parser.parse_args()
    if args.instances < 3 or args.rounds < 1 or args.new_tokens < 60:
        parser.error(
            "at least three instances, one round and 60 new tokens are needed, got "
            f"{args.instances}, {args.rounds} and {args.new_tokens}"
        )

    async def measure(service: Service, client: AsyncClient) -> bool:
        rounds = [await one_round(service, client, args, seed) for seed in range(args.rounds)]
        show([asdict(each) | {"ratio": each.ratio} for each in rounds], "a step while KV is copied, ms")
        print(f"step beside a copy over step before it: {statistics.median(each.ratio for each in rounds):.3f}")
        return all(each.same_tokens for each in rounds)

    return run_with_cell(args, measure, copy_tokens=args.copy_tokens)


if __name__ == "__main__":
    sys.exit(main())
