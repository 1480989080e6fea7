"""Who gets which part of what: pure functions over numbers.

A block holds `block_size` tokens of KV on one instance. Every participant of a sequence reserves the blocks of its
share plus one *spare*, into which generation grows where the home is.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from gmanager.config import Spread
from gmanager.wire.messages import Refusal, Role, Share

LONG_PROMPT = 8192
"""Tokens from which on a prompt may be spread over several instances by itself, to be prefilled in parallel. vLLM and SGLang
users measured what a static split costs: -22 % throughput at 1K tokens, +68 % at 8K (DESIGN, "From the papers")."""

PARALLEL_EFFICIENCY = 0.9
"""Of several instances that prefill one prompt: two H200 take 5.52 s for 128K tokens of the 8B shape, one takes 9.73 to 10.06
(docs/performance.md)."""

LEAST_SHARE = 2048
"""Tokens that each of several instances computes of a prompt, at least: each more is one more that its rows visit."""

FEW = 8
"""Numbers of instances up to which each is weighed; beyond, only twice as many each time, and the most."""

KEPT_FREE = 8
"""One of so many instances is for prompts that are not long."""

MOST_WEIGHED = 64
"""Prompts that wait and are looked at, to decide how many instances one is spread over."""

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
    max_homes: int
    """Most of them that it can decode at once."""
    backlog: int = 0
    """Prompt tokens that it still has to compute, as `prompt_work` counts them."""
    role: Role = "mixed"
    """What it was started for."""
    rows: int = 0
    """Sequences that decode here: rows of its own in a decode step."""
    held: int = 0
    """Tokens of KV here that these steps attend to, rows of other homes included."""
    sent: int = 0
    """Rows that go to other instances in such a step, once for each."""
    served: int = 0
    """Rows of other homes that come here."""
    coming: int = 0
    """Tokens of KV that sequences at home here will soon have here, beyond what they have: `Sequence.coming`."""


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
    home: int
    priority: int = 0
    """Lower goes first."""
    left: int = 1
    """Tokens that it may still generate."""


def place(
    views: Sequence[InstanceView],
    *,
    tokens: int,
    block_size: int,
    spread: Spread,
    waiting: Sequence[int] = (),
    reach: int = LONG_PROMPT,
    aside: int = 0,
) -> Placement | None:
    """Participants and shares for a prompt, or None if it doesn't fit now. `waiting`: tokens of those behind it; `reach`: as
    `prompt_work` has it. `aside`: blocks that each participant must have left.

    'auto' is one where it fits (every further participant costs each step an exchange), but as many as `degree` says for a
    prompt of LONG_PROMPT tokens or more; those that have least to prefill take part, of those with room for an even share.
    If there are too few of these the number is the least that memory needs, as it is at least for any other `spread`. A
    number or 'all' is a promise (but never more than there are instances, or blocks in the prompt): if too few instances
    have room the prompt waits. Then those with most free blocks take part.

    The home is the first of them, by prompts or by blocks, that can decode another sequence (ties: most free blocks, because
    generation grows there, fewest homes, lowest rank). Shares are even to one block, unless one is capped by what is free
    less the spare. All are whole blocks but the home's, which takes the remainder:

        10 tokens in blocks of 4 on 2 instances      home [0 .. 5]   other [4 tokens]    (6 and 4)
    """
    num_blocks = -(-tokens // block_size)
    rooms = sorted((view for view in views if view.free_blocks > 1 + aside), key=lambda v: (-v.free_blocks, v.homes, v.rank))
    home = next((view for view in rooms if view.homes < view.max_homes), None)
    if home is None or not num_blocks:
        return None
    chosen = _least_busy(rooms, tokens, num_blocks, waiting, reach, aside) if spread == "auto" else None
    if chosen is None:
        able = sum(view.total_blocks > 1 for view in views)
        wanted = able if spread == "all" else 1 if spread == "auto" else spread
        others = (view for view in rooms if view is not home)
        chosen = _roomiest([home, *others], min(wanted, able, num_blocks), num_blocks, aside)
    if chosen is None:
        return None
    by_room = sorted(chosen, key=lambda view: -view.free_blocks)
    sizes = dict(zip(by_room, _even_shares([view.free_blocks - 1 - aside for view in by_room], num_blocks), strict=True))
    return share_out({view.rank: sizes[view] for view in chosen}, tokens, block_size)


def share_out(blocks: Mapping[int, int], tokens: int, block_size: int) -> Placement:
    """So many blocks for each participant, the home first, which hold the tokens exactly: its last one may be part full. Each
    reserves a spare one, too."""
    padding = sum(blocks.values()) * block_size - tokens
    shares = [Share(rank=rank, tokens=count * block_size) for rank, count in blocks.items()]
    shares[0] = Share(rank=shares[0].rank, tokens=shares[0].tokens - padding)
    return Placement(shares, {rank: count + 1 for rank, count in blocks.items()})


def place_rest(
    views: Sequence[InstanceView],
    *,
    missing: int,
    kept: Mapping[int, tuple[int, int]],
    block_size: int,
    spread: Spread,
    waiting: Sequence[int] = (),
    reach: int = LONG_PROMPT,
) -> Placement | None:
    """As `place`, for a sequence of whose KV some is left: `missing` tokens are to be computed. `kept`: rank -> (tokens, runs).

    What one instance computes is computed where most of the sequence lies, if there is room: what nothing was lost of stays
    where it was. Tokens that fill gaps may open one run more on an instance and leave a part-filled block behind in each of
    those that it has, so it reserves as many blocks more.
    """
    more = {rank: runs for rank, (_, runs) in kept.items()}
    less = {v.rank: replace(v, free_blocks=max(0, v.free_blocks - more[v.rank])) for v in views if v.rank in kept}
    placement = None
    if (spread in ("auto", 1) and missing < LONG_PROMPT) or missing <= block_size:
        by_tokens = sorted(less.values(), key=lambda view: (-kept[view.rank][0], view.rank))
        fits = (place([view], tokens=missing, block_size=block_size, spread=1, aside=1) for view in by_tokens)
        placement = next((one for one in fits if one is not None), None)
    if placement is None:
        views = [less.get(view.rank, view) for view in views]
        placement = place(views, tokens=missing, block_size=block_size, spread=spread, waiting=waiting, reach=reach, aside=1)
    if placement is None:
        return None
    return Placement(placement.shares, {rank: blocks + 1 + more.get(rank, 0) for rank, blocks in placement.blocks.items()})


def _least_busy(
    rooms: Sequence[InstanceView], tokens: int, num_blocks: int, waiting: Sequence[int], reach: int, aside: int
) -> list[InstanceView] | None:
    """As many of `rooms` as `degree` says, with least to prefill, the home first. None: no number of them holds even shares."""
    options: dict[int, list[InstanceView]] = {}
    kept_free = [] if tokens < LONG_PROMPT else _kept_free(rooms)
    most = 1 if tokens < LONG_PROMPT else min(len(rooms) - len(kept_free), num_blocks, tokens // LEAST_SHARE)
    for count in _weighed(most):
        least = -(-num_blocks // count) + aside
        able = [view for view in rooms if view.free_blocks > least and view.rank not in kept_free]
        able.sort(key=lambda view: view.backlog // LONG_PROMPT)  # less than that is no reason against more room
        home = next((view for view in able if view.homes < view.max_homes), None)
        if home is not None and len(able) >= count:
            options[count] = [home, *(view for view in able if view is not home)]
    if not options:
        return None
    backlogs = {count: [view.backlog for view in able] for count, able in options.items()}
    count = degree(tokens, waiting, backlogs, reach)
    return options[count][:count]


def _weighed(most: int) -> list[int]:
    """Of 1 to `most` those numbers of instances that are looked at."""
    doubled = takewhile(lambda count: count < most, (FEW << power for power in range(1, 32)))
    return [*range(1, min(most, FEW) + 1), *doubled, *([most] if most > FEW else [])]


def _kept_free(rooms: Sequence[InstanceView]) -> list[int]:
    """Ranks that no long prompt goes to unless memory wants it: one in KEPT_FREE, those with least to prefill.

    Who shares an instance with a long prompt waits for its chunks. Simulated, 32 H200s, a request a second of which 15 % are of
    32K to 1500K tokens: with long prompts everywhere the median first token came after 6.7 s; with an eighth of the instances
    kept free after 0.022 s, and 1.1 times as many requests were completed; with a quarter, 0.8 times as many as with an eighth.
    """
    by_backlog = sorted(rooms, key=lambda view: (view.backlog // LONG_PROMPT, view.rank))
    return [view.rank for view in by_backlog[: len(rooms) // KEPT_FREE]]


def _roomiest(rooms: Sequence[InstanceView], wanted: int, num_blocks: int, aside: int) -> list[InstanceView] | None:
    """The first `wanted`, or as many as memory needs; None if they have too little."""
    needed = _least_for_memory([view.free_blocks - 1 - aside for view in rooms], num_blocks)
    if needed is None or max(wanted, needed) > len(rooms):
        return None
    return list(rooms[: max(wanted, needed)])


def prompt_work(tokens: int, reach: int) -> float:
    """What prefilling so many tokens costs, in tokens at the beginning of a prompt.

    n + n^2 / (2 reach): attending to `reach` tokens costs as much as all else of a row (LoongServe fits a + b n + c n^2).
    """
    return tokens + tokens**2 / (2 * reach)


def degree(tokens: int, waiting: Sequence[int], backlogs: Mapping[int, Sequence[float]], reach: int) -> int:
    """How many instances should prefill a prompt together, so that it and the long ones that wait end soonest.

    `backlogs`: for each number that there is a choice of, what those have to do that can take an even share.

    If each of them is run by k instances of m, longest first on those that are free first (LPT; Graham 1969), it takes k of
    them work / (k e), e = `PARALLEL_EFFICIENCY` for k > 1. Of all k the one with which the last ends first; of equals the
    largest. Four prompts of the same length on two instances: one each, 2 w against 4 w / 2e. Three: 2 w against 3 w / 2e, so
    the first is spread. A short prompt is run by one.
    """
    if tokens < LONG_PROMPT:
        return 1
    long = [tokens, *(length for length in waiting if length >= LONG_PROMPT)][:MOST_WEIGHED]
    works = sorted((prompt_work(length, reach) for length in long), reverse=True)
    return min(sorted(backlogs, reverse=True), key=lambda count: _last_end(works, backlogs[count], count))


def _last_end(works: Sequence[float], backlogs: Sequence[float], count: int) -> float:
    """When all is done if each of `works` is run by `count` instances together."""
    free = sorted(backlogs)
    for work in works:
        end = free[count - 1] + (work if count == 1 else work / (count * PARALLEL_EFFICIENCY))
        free = sorted([end] * count + free[count:])
    return free[-1]


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
    *,
    prompt: int,
    max_tokens: int | None,
    max_context: int,
    most_held: int,
    cell: str,
    total_blocks: Sequence[int],
    block_size: int,
) -> Refusal | None:
    """Why a request can't be served even when it is alone in the cell, with the arithmetic; None if it can. `most_held`: tokens
    of one sequence, by the cell's policy: all that its instances hold (`most_tokens`), or what one of them does.

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
    if tokens <= most_held:
        return None
    sizes = [blocks * block_size for blocks in total_blocks]
    count = f"{len(sizes)} instance{'s' if len(sizes) != 1 else ''}"
    if len(set(sizes)) == 1:
        detail = f"{count} x {sizes[0]:,}"
    else:
        shown = " + ".join(f"{size:,}" for size in sizes[:8])
        detail = f"{count}: {shown}{' + ...' if len(sizes) > 8 else ''}"
    if most_held < most_tokens(total_blocks, block_size):
        why = f"the policy keeps a request inside one instance, and the largest holds {most_held:,} ({detail})"
        return Refusal("never", f"{arithmetic}: needs {tokens:,} tokens of KV; {why}")
    return Refusal(
        "never",
        f"{arithmetic}: needs {tokens:,} tokens of KV; cell '{cell}' holds {sum(sizes):,} ({detail}), "
        f"less one spare block of {block_size} on each",
    )


def most_tokens(total_blocks: Sequence[int], block_size: int) -> int:
    """The longest sequence, prompt and generated, that instances with so many blocks each hold together."""
    return block_size * sum(max(0, blocks - 1) for blocks in total_blocks)


def choose_target(views: Iterable[InstanceView], *, home: int, reserve: int = RESERVE_BLOCKS) -> int | None:
    """The next home of a sequence: the instance with most free blocks of those with at least `reserve` that can decode
    another sequence, but not `home`.

    Ties: fewest homes, lowest rank. None if there is none.
    """
    rooms = [
        (-view.free_blocks, view.homes, view.rank)
        for view in views
        if view.rank != home and view.free_blocks >= reserve and view.homes < view.max_homes
    ]
    return min(rooms)[2] if rooms else None


def choose_holder(views: Iterable[InstanceView], *, blocks: int, holders: Collection[int]) -> int | None:
    """Where a run of so many blocks goes that has to leave its instance: of those with room to one that holds something of the
    sequence already, because each more holder is one more for its rows to visit; then to the one with most free blocks.

    Ties: lowest rank. None if there is none.
    """
    rooms = [(view.rank not in holders, -view.free_blocks, view.rank) for view in views if view.free_blocks >= blocks]
    return min(rooms)[2] if rooms else None


def choose_victim(running: Iterable[Candidate]) -> int | None:
    """The sequence to preempt: of all but the first, which is the oldest of the highest priority, those of the lowest priority,
    and of these the one with fewest tokens, which is cheapest to recompute.

    Ties: the youngest. None if there are fewer than two. So whichever of them needs room, no other gives way to one of a lower
    priority than its own.
    """
    in_order = sorted(running, key=lambda candidate: (candidate.priority, candidate.arrival))
    others = [(-candidate.priority, candidate.tokens, -candidate.arrival, candidate.seq) for candidate in in_order[1:]]
    return min(others)[3] if others else None
