#!/usr/bin/env python3
"""Write a trace of requests in the form that Mooncake publishes, to replay with `bench_serve.py --trace FILE`.

The same arguments write the same bytes on every machine. Arrivals are a Poisson process; lengths are log-uniform in the ranges
of the mix, so that each doubling is as likely as the next. Hash ids are numbered as they appear, as Mooncake's are.

The nine mixes are made after the nine traces on which Infinite-LLM was measured (Lin et al., arXiv 2401.02669): contexts from a
few to 2,000K tokens, three traces of short ranges, six with ever more long requests. What differs: the ranges, the shares and
the log-uniform lengths of each mix are ours, not the numbers of the paper's table, and prompts are random tokens, not texts of
data sets. So the figures of a mix compare services with each other, not with the paper's.
"""

import argparse
import decimal
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice, pairwise
from pathlib import Path

import msgspec
from _trace import BLOCK_TOKENS, K, TraceLine


@dataclass(frozen=True, slots=True)
class Mix:
    """Prompt lengths of a trace, in tokens."""

    short: tuple[int, int]
    """Shortest and longest of the short prompts."""
    long: tuple[int, int] = (0, 0)
    """The same of the long ones."""
    long_share: float = 0.0
    """How many of the prompts are long."""


MIXES = (
    Mix((64, 2 * K)),
    Mix((64, 8 * K)),
    Mix((64, 32 * K)),
    Mix((64, 8 * K), (32 * K, 128 * K), 0.01),
    Mix((64, 8 * K), (32 * K, 256 * K), 0.02),
    Mix((64, 8 * K), (32 * K, 512 * K), 0.05),
    Mix((64, 8 * K), (32 * K, 1000 * K), 0.10),
    Mix((64, 8 * K), (32 * K, 1500 * K), 0.15),
    Mix((64, 8 * K), (32 * K, 2000 * K), 0.20),
)
ANSWER = (16, 512)
"""Tokens of an answer."""
QUESTION = (16, 256)
"""Tokens of a question about a document."""


@dataclass(frozen=True, slots=True)
class Burst:
    """`factor` times as many requests come in [start_s, start_s + seconds)."""

    start_s: float
    seconds: float
    factor: float

    @classmethod
    def parse(cls, text: str) -> "Burst":
        """Of START:SECONDS:FACTOR. Raises ValueError."""
        parts = text.split(":")
        if len(parts) != 3:
            raise ValueError(f"a burst reads START:SECONDS:FACTOR, got {text}")
        burst = cls(*map(float, parts))
        if not (burst.start_s >= 0 and burst.seconds > 0 and burst.factor > 0 and math.isfinite(sum(map(float, parts)))):
            raise ValueError(f"a burst starts at 0 or later; its seconds and its factor are positive; got {text}")
        return burst


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is written. Raises ValueError for numbers that make no sense."""

    mix: int
    """Place in `MIXES`."""
    requests: int = 100
    rate: float = 1.0
    """Requests per second outside bursts; later questions about a document come on top."""
    seed: int = 0
    scale: float = 1.0
    """Times the lengths of prompts."""
    answer_scale: float = 1.0
    """Times the lengths of answers."""
    bursts: tuple[Burst, ...] = ()
    turns: int = 1
    """Questions about each long prompt, which is then a document."""
    think_s: float = 10.0
    """Mean time from one question about a document to the next."""
    block_tokens: int = BLOCK_TOKENS
    """What a hash id stands for."""

    def __post_init__(self) -> None:
        if not 0 <= self.mix < len(MIXES):
            raise ValueError(f"the mix must be 0 to {len(MIXES) - 1}, got {self.mix}")
        whole = (("--requests", self.requests), ("--turns", self.turns), ("--block-tokens", self.block_tokens))
        for flag, number in whole:
            if number < 1:
                raise ValueError(f"{flag} must be at least 1, got {number}")
        real = (("rate", self.rate), ("scale", self.scale), ("answer-scale", self.answer_scale), ("think", self.think_s))
        for flag, value in real:
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"--{flag} must be positive, got {value}")
        if self.turns > 1 and not MIXES[self.mix].long_share:
            raise ValueError(f"--turns {self.turns} asks about long prompts, and mix {self.mix} has none")
        for one, other in pairwise(sorted(self.bursts, key=lambda burst: burst.start_s)):
            if one.start_s + one.seconds > other.start_s:
                raise ValueError(f"the bursts at {one.start_s:g} s and {other.start_s:g} s overlap")


# --- chance -----------------------------------------------------------------------------------------------------------

EXACT = decimal.Context(prec=28)
"""Rounds logarithms and exponentials the same on every machine, as libm doesn't have to."""


def exponential(rng: random.Random) -> float:
    """Of mean 1."""
    return -float(EXACT.ln(decimal.Decimal(1 - rng.random())))


def log_uniform(rng: random.Random, low: int, high: int) -> int:
    """In [low, high]."""
    ratio = EXACT.ln(EXACT.divide(decimal.Decimal(high), decimal.Decimal(low)))
    factor = EXACT.exp(EXACT.multiply(ratio, decimal.Decimal(rng.random())))
    return min(high, int(EXACT.multiply(factor, decimal.Decimal(low))))


def arrival_times(rng: random.Random, rate: float, bursts: tuple[Burst, ...]) -> Iterator[float]:
    """Seconds after the start, without end: a Poisson process whose rate changes when a burst starts and ends."""
    changes: list[tuple[float, float]] = []
    """Until when a rate holds, and the rate."""
    for burst in sorted(bursts, key=lambda burst: burst.start_s):
        changes += [(burst.start_s, rate), (burst.start_s + burst.seconds, rate * burst.factor)]
    now = 0.0
    for end_s, rate_now in [*changes, (math.inf, rate)]:
        # nothing is remembered: what is left of a gap when the rate changes is as long as a new one
        while (next_s := now + exponential(rng) / rate_now) < end_s:
            now = next_s
            yield now
        now = end_s


# --- the trace --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Question:
    """A request before its blocks have numbers."""

    at_s: float
    prompt_tokens: int
    max_tokens: int
    document: int
    """Which one it begins with, of the trace."""
    document_blocks: int


def make_trace(settings: Settings) -> list[TraceLine]:
    """The requests in the order in which they come."""
    drawn = sorted(_questions(settings), key=lambda question: question.at_s)[: settings.requests]
    numbers = count()
    documents: dict[int, list[int]] = {}
    lines: list[TraceLine] = []
    for question in drawn:
        if question.document not in documents:
            documents[question.document] = list(islice(numbers, question.document_blocks))
        own = -(-question.prompt_tokens // settings.block_tokens) - question.document_blocks
        lines.append(
            TraceLine(
                timestamp=int(question.at_s * 1e3),
                input_length=question.prompt_tokens,
                output_length=question.max_tokens,
                hash_ids=documents[question.document] + list(islice(numbers, own)),
            )
        )
    return lines


def _questions(settings: Settings) -> Iterator[_Question]:
    """As many prompts as are asked for, and later questions on top: the first so many of all are then there."""
    mix = MIXES[settings.mix]
    rng = random.Random(f"make_trace/{settings.seed}")  # its random() is promised to stay the same; its other methods are not
    lots = [rng.random() for _ in range(settings.requests)]
    longs = math.ceil(mix.long_share * settings.requests)  # at least one, however few requests
    is_long = set(sorted(range(settings.requests), key=lots.__getitem__)[:longs])
    block = settings.block_tokens

    def drawn(low_high: tuple[int, int], scale: float, least: int) -> int:
        return max(least, round(log_uniform(rng, *low_high) * scale))

    for i, start_s in enumerate(islice(arrival_times(rng, settings.rate, settings.bursts), settings.requests)):
        prompt_tokens = drawn(mix.long if i in is_long else mix.short, settings.scale, 1)
        if i not in is_long or settings.turns == 1:
            yield _Question(start_s, prompt_tokens, drawn(ANSWER, settings.answer_scale, 2), i, 0)
            continue
        document_blocks = max(1, round(prompt_tokens / block))  # whole ones: all of the document is shared
        at_s = start_s
        for _ in range(settings.turns):
            asked = document_blocks * block + drawn(QUESTION, settings.scale, 1)
            yield _Question(at_s, asked, drawn(ANSWER, settings.answer_scale, 2), i, document_blocks)
            at_s += exponential(rng) * settings.think_s


def described(lines: list[TraceLine]) -> str:
    """One sentence of figures."""
    seen: set[int] = set()
    repeated = 0
    for line in lines:
        repeated += len(seen.intersection(line.hash_ids))
        seen.update(line.hash_ids)
    lengths = sorted(line.input_length for line in lines)
    return (
        f"{len(lines):,} requests in {lines[-1].timestamp / 1e3:,.1f} s; prompts of {lengths[0]:,} to {lengths[-1]:,} tokens, "
        f"median {lengths[len(lengths) // 2]:,}, {sum(lengths):,} in all; {sum(line.output_length for line in lines):,} tokens "
        f"of answers; {repeated / (repeated + len(seen)):.0%} of the blocks had come before"
    )


# --- the program ------------------------------------------------------------------------------------------------------


def table() -> str:
    """The mixes, for --help."""

    def k(tokens: int) -> str:
        return f"{tokens // K}K" if tokens >= K else str(tokens)

    rows = [
        f"  {number}  {k(mix.short[0])} to {k(mix.short[1])}"
        + (f"; {mix.long_share:.0%} {k(mix.long[0])} to {k(mix.long[1])}" if mix.long_share else "")
        for number, mix in enumerate(MIXES)
    ]
    return "\n".join(("mixes, tokens of prompts (K = 1024):", *rows))


def parse() -> tuple[Settings, Path]:
    parser = argparse.ArgumentParser(
        "make_trace.py", description=__doc__, epilog=table(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mix", metavar="MIX", type=int, help=f"0 to {len(MIXES) - 1}, as below")
    parser.add_argument("out", metavar="FILE", type=Path)
    parser.add_argument("--requests", type=int, default=100, help="lines of the trace (%(default)d)")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second, on average (%(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and lengths (%(default)d)")
    parser.add_argument("--scale", type=float, default=1.0, help="times the lengths of prompts (%(default)g)")
    parser.add_argument("--answer-scale", type=float, help="times the lengths of answers (as --scale)")
    parser.add_argument("--burst", action="append", default=[], metavar="START:SECONDS:FACTOR", help="of the rate; repeatable")
    parser.add_argument("--turns", type=int, default=1, help="questions about each long prompt (%(default)d)")
    parser.add_argument("--think", type=float, default=10.0, help="mean seconds between them (%(default)g)")
    parser.add_argument("--block-tokens", type=int, default=BLOCK_TOKENS, help="of a hash id (%(default)d)")
    args = parser.parse_args()
    try:
        settings = Settings(
            mix=args.mix,
            requests=args.requests,
            rate=args.rate,
            seed=args.seed,
            scale=args.scale,
            answer_scale=args.scale if args.answer_scale is None else args.answer_scale,
            bursts=tuple(map(Burst.parse, args.burst)),
            turns=args.turns,
            think_s=args.think,
            block_tokens=args.block_tokens,
        )
    except ValueError as error:
        parser.error(str(error))
    return settings, args.out


def write(lines: list[TraceLine], file: Path) -> None:
    """Raises OSError."""
    file.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def main() -> int:
    settings, file = parse()
    lines = make_trace(settings)
    try:
        write(lines, file)
    except OSError as error:
        print(f"make_trace.py: {error}", file=sys.stderr)
        return 2
    print(described(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
