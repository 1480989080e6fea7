"""Traces of requests: the two forms of their files, the built-in ones, and the prompts that they stand for.

Mooncake's form (arXiv 2407.00079; github.com/kvcache-ai/Mooncake publishes traces in it), one JSON object a line:

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ..., 2353, 2354]}

`timestamp`: when it arrives, ms. Each hash id stands for 512 tokens of the prompt, the last for those that are left: prompts
that begin with the same ids begin with the same tokens.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

BLOCK_TOKENS = 512
"""What a hash id stands for in the traces that Mooncake publishes."""


class TraceError(ValueError):
    """The trace can't be used; the message says which line, and why."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request that comes; one line of a trace in our own form. Raises ValueError for numbers that make no sense."""

    at_s: float
    prompt_tokens: int
    max_tokens: int
    name: str = "requests"
    """Of the group whose figures it counts in."""
    after_first_tokens: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.at_s) and self.at_s >= 0):
            raise ValueError(f"at_s must be at least 0, got {self.at_s}")
        if self.prompt_tokens < 1 or self.max_tokens < 1:
            raise ValueError(f"prompt_tokens and max_tokens must be at least 1, got {self.prompt_tokens} and {self.max_tokens}")


class BlockArrival(Arrival, frozen=True, kw_only=True):
    """One whose prompt is told by blocks, so that it may begin as another does."""

    hash_ids: list[int]
    """Of each `block_tokens` of the prompt; the last of them may stand for fewer."""
    block_tokens: int


class TraceLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of a trace in Mooncake's form. Raises ValueError for numbers that make no sense."""

    timestamp: int | float
    """Milliseconds."""
    input_length: int
    output_length: int
    hash_ids: list[int]

    def __post_init__(self) -> None:
        if not (math.isfinite(self.timestamp) and self.timestamp >= 0):
            raise ValueError(f"timestamp must be at least 0, got {self.timestamp}")
        if self.input_length < 1 or self.output_length < 1:
            raise ValueError(
                f"input_length and output_length must be at least 1, got {self.input_length} and {self.output_length}"
            )


def _at_once(count: int, prompt_tokens: int, max_tokens: int, name: str, *, after: bool = False) -> list[Arrival]:
    one = Arrival(at_s=0, prompt_tokens=prompt_tokens, max_tokens=max_tokens, name=name, after_first_tokens=after)
    return [one] * count


K = 1024
TRACES = {
    "mixed": [*_at_once(64, K, 128, "short"), *_at_once(4, 128 * K, 64, "long")],
    "decode32": _at_once(32, 8 * K, 256, "decode"),
    "prefill-beside-decode": [*_at_once(32, 8 * K, 512, "decode"), *_at_once(1, 128 * K, 1, "prefill", after=True)],
}


# --- reading ----------------------------------------------------------------------------------------------------------


def read_trace(source: str, scale: float = 1.0, block_tokens: int = BLOCK_TOKENS) -> list[Arrival]:
    """A built-in trace by name, or that of a file in either form, its tokens times `scale`. Raises TraceError.

    `block_tokens`: what a hash id stands for in the file. It is scaled too, so that what was shared stays so.
    """
    trace = TRACES.get(source) or _read_file(Path(source), block_tokens)
    if all(arrival.after_first_tokens for arrival in trace):
        raise TraceError(f"{source}: all requests wait for the first tokens of others, and there are none")
    return trace if scale == 1 else [_scaled(arrival, scale) for arrival in trace]


def _read_file(file: Path, block_tokens: int) -> list[Arrival]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise TraceError(f"{file} is neither a file that can be read nor one of {', '.join(TRACES)}: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise TraceError(f"{file} has no requests")
    form: type[TraceLine | Arrival] = TraceLine if _is_mooncakes(numbered[0][1]) else Arrival
    trace: list[Arrival] = []
    for number, line in numbered:
        try:
            read = msgspec.json.decode(line, type=form)
            trace.append(_of_blocks(read, block_tokens) if isinstance(read, TraceLine) else read)
        except (msgspec.DecodeError, ValueError) as error:
            raise TraceError(f"{file}, line {number}: {error}") from error
    return _named(trace)


def trace_of(lines: Sequence[TraceLine], block_tokens: int = BLOCK_TOKENS) -> list[Arrival]:
    """The requests of lines in Mooncake's form. Raises ValueError as `read_trace` would of a file."""
    return _named([_of_blocks(line, block_tokens) for line in lines])


def _is_mooncakes(line: bytes) -> bool:
    """Whether a line has words of that form and none of ours. The first says what the others must be."""
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError, RecursionError):
        return False  # bad in either form
    ours, theirs = (fields.keys() & set(form.__struct_fields__) for form in (Arrival, TraceLine))
    return bool(theirs) and not ours


def _of_blocks(line: TraceLine, block_tokens: int) -> BlockArrival:
    """Raises ValueError if the hash ids don't stand for as many tokens as the prompt has."""
    count = len(line.hash_ids)
    if count != -(-line.input_length // block_tokens):
        fewest, most = max(0, count - 1) * block_tokens + (count > 0), count * block_tokens
        raise ValueError(
            f"{count:,} hash_ids of {block_tokens:,} tokens stand for {fewest:,} to {most:,} tokens; "
            f"input_length is {line.input_length:,}"
        )
    return BlockArrival(
        at_s=line.timestamp / 1e3,
        prompt_tokens=line.input_length,
        max_tokens=line.output_length,
        hash_ids=line.hash_ids,
        block_tokens=block_tokens,
    )


def _named(trace: Sequence[Arrival]) -> list[Arrival]:
    """Where prompts begin alike, those that come first are named "first" and the others "again"; all others as they were."""
    seen: set[int] = set()
    again: set[int] = set()
    for i in sorted(range(len(trace)), key=lambda i: trace[i].at_s):
        if isinstance(arrival := trace[i], BlockArrival):
            if arrival.hash_ids[0] in seen:
                again.add(i)
            seen.add(arrival.hash_ids[0])
    if not again:
        return list(trace)
    return [msgspec.structs.replace(arrival, name="again" if i in again else "first") for i, arrival in enumerate(trace)]


def _scaled(arrival: Arrival, scale: float) -> Arrival:
    """At least one token each, and two of an answer that has more than one: else there is no time between tokens."""
    scaled = msgspec.structs.replace(
        arrival,
        prompt_tokens=max(1, round(arrival.prompt_tokens * scale)),
        max_tokens=max(min(2, arrival.max_tokens), round(arrival.max_tokens * scale)),
    )
    if not isinstance(scaled, BlockArrival):
        return scaled
    block_tokens = max(1, round(scaled.block_tokens * scale))
    full = len(scaled.hash_ids) - 1
    tail = min(block_tokens, max(1, round((arrival.prompt_tokens - full * scaled.block_tokens) * scale)))
    return msgspec.structs.replace(scaled, prompt_tokens=full * block_tokens + tail, block_tokens=block_tokens)


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompt_of(arrival: Arrival, vocab_size: int, seed: int, index: int) -> list[int]:
    """Token ids in [0, vocab_size): those of its blocks, which depend on seed and hash id; else on seed and `index` alone."""
    if not isinstance(arrival, BlockArrival):
        return make_prompt(arrival.prompt_tokens, vocab_size, seed, index)
    prompt: list[int] = []
    for hash_id in arrival.hash_ids:
        length = min(arrival.block_tokens, arrival.prompt_tokens - len(prompt))
        prompt += _random_tokens(f"{seed}/block/{hash_id}", length, vocab_size)
    return prompt


def make_prompt(length: int, vocab_size: int, seed: int, index: int) -> list[int]:
    """Token ids that depend on seed and index alone, so that no two prompts begin alike."""
    return _random_tokens(f"{seed}/{index}", length, vocab_size)


def _random_tokens(seed: str, length: int, vocab_size: int) -> list[int]:
    """The shorter one of a seed is the beginning of the longer."""
    return random.Random(seed).choices(range(vocab_size), k=length)
