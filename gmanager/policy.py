"""Who gets which part of what: pure functions over numbers.

A block holds `block_size` tokens of KV on one instance. Every participant of a sequence reserves the blocks of its
share plus one *spare*, into which generation grows where the home is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gmanager.config import Spread
from gmanager.wire.messages import Refusal, Share

LONG_PROMPT = 8192
"""Tokens from which on a prompt is spread over all instances by itself, to be prefilled in parallel. vLLM and SGLang
users measured what a static split costs: -22 % throughput at 1K tokens, +68 % at 8K (DESIGN, "From the papers")."""

RESERVE_BLOCKS = 2
"""Free blocks an instance must have to be chosen as a new home: one to receive, one to stay, so homes don't bounce."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceView:
    """What is known of one instance of a cell."""

    rank: int
    free_blocks: int
    """As last heard, less what is being reserved."""
    total_blocks: int
    homes: int
    """Sequences whose home it is."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a prompt's KV is to be born."""

    shares: list[Share]
    """The home's first."""
    blocks: dict[int, int]
    """rank -> blocks to reserve."""

    @property
    def is_even(self) -> bool:
        """Whether no share is smaller than another because memory capped it."""
        return max(self.blocks.values()) - min(self.blocks.values()) <= 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A running sequence that could be preempted."""

    seq: int
    arrival: int
    tokens: int


def place(views: Sequence[InstanceView], *, tokens: int, block_size: int, spread: Spread) -> Placement | None:
    """Participants and shares for a prompt, or None if it doesn't fit now.

    The number of participants is the least that memory needs, and at least what `spread` says (never more than there
    are instances, or blocks in the prompt). A number or 'all' is a promise: if too few instances have room the prompt
    waits. 'auto' is 1 where it fits (every further participant costs each step an exchange), but all that have room
    for a prompt of LONG_PROMPT tokens or more.

    The instances with most free blocks take part; the home is the one with most, because generation grows there (ties:
    fewest homes, lowest rank). Shares are even to one block, unless one is capped by what is free less the spare. All
    are whole blocks but the home's, which takes the remainder:

        10 tokens in blocks of 4 on 2 instances      home [0 .. 5]   other [4 tokens]    (6 and 4)
    """
    num_blocks = -(-tokens // block_size)
    rooms = sorted(((view.free_blocks - 1, -view.homes, -view.rank) for view in views if view.free_blocks > 1), reverse=True)
    able = sum(view.total_blocks > 1 for view in views)
    wanted = min(_least_participants(spread, tokens, able, len(rooms)), able, num_blocks)
    needed = _least_for_memory([cap for cap, _, _ in rooms], num_blocks)
    if needed is None or not num_blocks:
        return None
    count = max(wanted, needed)
    if count > len(rooms):
        return None
    chosen = rooms[:count]
    sizes = _even_shares([cap for cap, _, _ in chosen], num_blocks)
    padding = num_blocks * block_size - tokens
    shares = [
        Share(rank=-rank, tokens=size * block_size - (padding if i == 0 else 0))
        for i, ((_, _, rank), size) in enumerate(zip(chosen, sizes, strict=True))
    ]
    return Placement(shares, {share.rank: size + 1 for share, size in zip(shares, sizes, strict=True)})


def _least_participants(spread: Spread, tokens: int, able: int, with_room: int) -> int:
    if spread == "all":
        return able
    if spread == "auto":
        return with_room if tokens >= LONG_PROMPT else 1
    return spread


def _least_for_memory(caps: Sequence[int], num_blocks: int) -> int | None:
    """How many of `caps`, largest first, hold `num_blocks` together."""
    held = 0
    for count, cap in enumerate(caps, 1):
        held += cap
        if held >= num_blocks:
            return count
    return None


def _even_shares(caps: Sequence[int], num_blocks: int) -> list[int]:
    """`num_blocks` over participants with these caps, largest first, which hold them: even to one unless capped.

    The smallest cap chooses first and rounds down, so the first participant never gets fewer than another.
    """
    sizes: list[int] = []
    left = num_blocks
    for others, cap in zip(range(len(caps), 0, -1), reversed(caps), strict=True):
        sizes.append(min(cap, left // others))
        left -= sizes[-1]
    return sizes[::-1]


def why_never(
    *, prompt: int, max_tokens: int | None, max_context: int, cell: str, total_blocks: Sequence[int], block_size: int
) -> Refusal | None:
    """Why a request can't be served even when it is alone in the cell, with the arithmetic; None if it can.

    Alone, all of its tokens must find a place when each instance keeps one block that may stay empty. That is enough
    to finish: a prompt is placed with one spare block per participant, a home that has no block left has filled its
    own, so with at most one empty block on each other instance there is a free one as long as tokens are left to
    write. (A client that moves the home to and fro can leave more blocks part empty; then the request is placed anew,
    see `Sequences`.)
    """
    tokens = prompt + (1 if max_tokens is None else max_tokens)
    made = "at least one to generate" if max_tokens is None else f"max_tokens of {max_tokens:,}"
    arithmetic = f"prompt of {prompt:,} + {made} = {tokens:,} tokens"
    if tokens > max_context:
        return Refusal("too_long", f"{arithmetic}; the model takes at most {max_context:,}")
    if tokens <= most_tokens(total_blocks, block_size):
        return None
    sizes = [blocks * block_size for blocks in total_blocks]
    count = f"{len(sizes)} instance{'s' if len(sizes) != 1 else ''}"
    if len(set(sizes)) == 1:
        detail = f"{count} x {sizes[0]:,}"
    else:
        shown = " + ".join(f"{size:,}" for size in sizes[:8])
        detail = f"{count}: {shown}{' + ...' if len(sizes) > 8 else ''}"
    return Refusal(
        "never",
        f"{arithmetic}: needs {tokens:,} tokens of KV; cell '{cell}' holds {sum(sizes):,} ({detail}), "
        f"less one spare block of {block_size} on each",
    )


def most_tokens(total_blocks: Sequence[int], block_size: int) -> int:
    """The longest sequence, prompt and generated, that instances with so many blocks each hold together."""
    return block_size * sum(max(0, blocks - 1) for blocks in total_blocks)


def choose_target(views: Iterable[InstanceView], *, home: int, reserve: int = RESERVE_BLOCKS) -> int | None:
    """The next home of a sequence: the instance with most free blocks of those with at least `reserve`, but not `home`.

    Ties: fewest homes, lowest rank. None if there is none.
    """
    rooms = [(-view.free_blocks, view.homes, view.rank) for view in views if view.rank != home and view.free_blocks >= reserve]
    return min(rooms)[2] if rooms else None


def choose_victim(running: Iterable[Candidate]) -> int | None:
    """The sequence to preempt: of all but the oldest the one with fewest tokens, which is cheapest to recompute.

    Ties: the youngest. None if there are fewer than two.
    """
    by_age = sorted(running, key=lambda candidate: candidate.arrival)
    younger = [(candidate.tokens, -candidate.arrival, candidate.seq) for candidate in by_age[1:]]
    return min(younger)[2] if younger else None
