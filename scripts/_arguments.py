"""What the benchmark and the quickstart are told. Standard library only: it is read before anything is installed."""

import argparse
from pathlib import Path

LARGEST = 0
"""In the place of a number of tokens: as many as fit."""


def add_benchmark_arguments(parser: argparse.ArgumentParser, out: Path) -> None:
    """Which needles are asked for, and where the answers go."""
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096], help="prompt tokens, template included")
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 50, 90], help="percent of the text before the needle")
    parser.add_argument("--max-tokens", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--out", type=Path, default=out, help="folder of needle.json and needle.png")
    parser.add_argument("--reference", choices=("none", "transformers"), default="none", help="also ask transformers alone")


def check_benchmark_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with exit code 2 for contexts or depths that make no sense."""
    if min(args.contexts) < 1:
        parser.error(f"--contexts must be at least 1, got {min(args.contexts)}")
    if args.max_tokens < 1:
        parser.error(f"--max-tokens must be at least 1, got {args.max_tokens}")
    wrong = [depth for depth in args.depths if not 0 <= depth <= 100]
    if wrong:
        parser.error(f"--depths are percentages, got {wrong[0]}")


def tokens_or_largest(text: str) -> int:
    """A number of tokens, or `LARGEST` for the word. For argparse: raises ArgumentTypeError."""
    if text == "largest":
        return LARGEST
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, or largest, got {text}")
    return int(text)
