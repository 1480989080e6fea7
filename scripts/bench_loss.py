#!/usr/bin/env python3
"""What a loss costs: an instance of a cell is killed while a sequence decodes that has a part of its KV there.

    kill -9 ──> next token of a stream that has nothing there          the pause of the change itself
            └─> next token of the long sequence                        the same, and the lost range computed again

In each round the second, less the first, is compared with the time that a prompt of the lost range's length takes on the
instances that are left, beside the same stream. (The lost range attends to all of the sequence before it, that prompt only to
itself.) The killed instance is started again for the next round.

Exit code 0, 1 if a stream failed or went wrong, 2 if something could not be started.
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass

from _cell import parser_of, run_with_cell, until_whole
from _measure import show

from gmanager import AsyncClient, Chunk, DistattnError, SamplingParams
from gmanager.cli.service import Service

ENDLESS = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
AFTER = 8
"""Tokens of the long stream before the kill."""
PAUSE_S = 0.3
"""Longer than a step of either stream, and shorter than any change of membership."""


async def read(stream: AsyncGenerator[Chunk, None], count: int) -> float:
    """Read so many tokens; when the last of them came."""
    async for chunk in stream:
        count -= len(chunk.token_ids)
        if count <= 0:
            return time.monotonic()
    raise DistattnError("a stream ended before its time")


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds."""

    lost_tokens: int
    apart: float
    """From the kill to the next token of the stream that had nothing there."""
    long: float
    """The same of the other."""
    alone: float
    """A prompt as long as what was lost, to its first token."""

    @property
    def ratio(self) -> float:
        return (self.long - self.apart) / self.alone


async def one_round(service: Service, client: AsyncClient, args: argparse.Namespace, seed: int) -> Round:
    rng = random.Random(seed)
    ids = [rng.randrange(args.vocab_size) for _ in range(args.prompt_tokens)]
    apart = client.generate(ids[:64], ENDLESS, spread=1, request_id=f"apart {seed}")
    await read(apart, 1)
    home = (await client.stats()).requests[f"apart {seed}"].home
    long = client.generate(ids, ENDLESS, spread="all", request_id=f"long {seed}")
    await read(long, AFTER)
    held = (await client.stats()).requests[f"long {seed}"].kv_tokens
    victim = max((rank for rank in held if rank != home), key=lambda rank: held[rank])
    process = service.instances[victim]
    reading = asyncio.gather(*(asyncio.create_task(_next(stream)) for stream in (apart, long)))
    os.kill(process.pid, signal.SIGKILL)  # a torchrun, and its instance with it
    killed = time.monotonic()
    waits = [at - killed for at in await reading]
    await long.aclose()
    await until_whole(client, args.instances - 1)
    one = SamplingParams(max_tokens=1, temperature=0)
    alone = client.generate(ids[: held[victim]], one, spread="all", cache_salt="of its own")  # else it is known already
    begun = time.monotonic()
    took = await read(alone, 1) - begun
    await alone.aclose()
    await apart.aclose()
    process.restart()
    await until_whole(client, args.instances)
    return Round(held[victim], waits[0], waits[1], took)


async def _next(stream: AsyncGenerator[Chunk, None]) -> float:
    """When the first token comes after the pause: what was on its way comes before."""
    last = time.monotonic()
    while (at := await read(stream, 1)) - last < PAUSE_S:
        last = at
    return at


def main() -> int:
    args = parser_of(__doc__, prompt_tokens=4096).parse_args()
    if args.instances < 2 or args.rounds < 1:
        sys.exit(f"bench_loss: at least two instances and one round are needed, got {args.instances} and {args.rounds}")

    async def measure(service: Service, client: AsyncClient) -> bool:
        rounds = [await one_round(service, client, args, seed) for seed in range(args.rounds)]
        show([asdict(each) | {"ratio": each.ratio} for each in rounds], "seconds from kill -9 to the next token")
        apart = statistics.median(each.apart for each in rounds)
        print(f"pause {apart:.2f} s; repair {statistics.median(each.ratio for each in rounds):.2f} times the lost range alone")
        return True

    return run_with_cell(args, measure)


if __name__ == "__main__":
    sys.exit(main())
