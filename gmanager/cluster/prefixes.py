"""Which sequences of a cell begin with which tokens, and what of their KV lies where: an index, pure.

    add     a sequence is admitted: its tokens are known
    tell    an instance says what of it can be shared there; nothing: it is gone there
    end     it is over, and may have left something: its generated tokens count, too
    inherit an epoch begins: what of those that are over its members have kept

It holds a sequence as long as it runs, or something of it is left; and digests of it only as far as there is KV. Members are
named by their ids, which last longer than an epoch.

What lies below an instance's pool, in host memory or on disk, follows what of its run is in the pool. It can be shared only
once it has been read, so there are two lists of digests: of what is in pools, and of all there is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from gmanager.cluster.beginnings import Beginnings
from gmanager.cluster.chain import Chain
from gmanager.cluster.request import Runs, count_tokens, held_once
from gmanager.wire.messages import KeptShard

Ranges = Sequence[tuple[int, int]]

FAR = 2**62
"""More than any position."""

MOST_WEIGHED = 8
"""Sequences with the longest common beginning that are looked at, the newest first."""


def whole_blocks(ranges: Sequence[tuple[int, int]], end: int, block_size: int) -> list[tuple[int, int]]:
    """The positions before `end` of a run that lie in blocks which have no others, and are full.

    Instances come to the same (`kvstore.prefix`).
    """
    left = sum(max(0, min(stop, end) - start) for start, stop in ranges)
    left -= left % block_size
    whole: list[tuple[int, int]] = []
    for start, stop in ranges:
        if left <= 0:
            break
        whole.append((start, min(stop, start + left)))
        left -= stop - start
    return whole


def are_ranges(runs: Runs, most_tokens: int) -> bool:
    """Whether that is what one instance could have of a sequence: each run ascends, and all together are not too many."""
    for run in runs:
        edges = [edge for start, end in run for edge in (start, end)]
        if not edges or edges[0] < 0 or any(start >= end for start, end in run) or edges != sorted(edges):
            return False
    return count_tokens(runs) <= most_tokens


def is_shareable(shard: KeptShard, most_tokens: int) -> bool:
    """Whether that can be what an instance says of a cached sequence."""
    if not are_ranges(shard.runs, most_tokens) or len(shard.below) > len(shard.runs) or shard.since < 0:
        return False
    return all(0 <= below <= count_tokens([run]) for below, run in zip(shard.below, shard.runs, strict=False))


@dataclass(frozen=True, slots=True)
class Held:
    """What of a sequence can be shared on one instance."""

    runs: Runs
    """All of each run."""
    in_pool: Runs
    """The first tokens of those of which some are in the pool."""
    follow: Ranges = ()
    """Rows that can follow it, the last ones included; none: all can."""

    @classmethod
    def of(cls, runs: Runs, below: Sequence[int] = (), follow: Ranges = ()) -> "Held":
        """`below`: how many of the last tokens of each run aren't in the pool; none: all are."""
        if not any(below):
            return cls(runs, runs, follow)
        sunk = [*below, *[0] * (len(runs) - len(below))]
        tokens = [count_tokens([run]) - lies_below for run, lies_below in zip(runs, sunk, strict=True)]
        return cls(runs, [_first(run, count) for run, count in zip(runs, tokens, strict=True) if count], follow)

    @property
    def has_below(self) -> bool:
        return count_tokens(self.in_pool) < count_tokens(self.runs)


_NOTHING = Held((), ())


@dataclass(frozen=True, slots=True)
class Match:
    """A sequence that begins as another does, and what of that can be shared."""

    source: int
    parts: dict[int, Runs]
    """id of a member -> for each run there whole blocks of its first tokens."""
    below: dict[int, int] = field(default_factory=dict)
    """id of a member -> tokens of these that are to be read into its pool first."""
    is_whole: bool = False
    """Whether all of it is needed: rows go on behind it, and see something of it that lies nowhere else."""

    @property
    def tokens(self) -> int:
        return sum(map(count_tokens, self.parts.values()))


@dataclass(slots=True, eq=False)
class _Entry:
    chain: Chain
    is_live: bool = True
    held: dict[int, Held] = field(default_factory=dict)
    """id of a member -> what of it can be shared there, as last told."""


class Prefixes:
    """Those of one cell."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._entries: dict[int, _Entry] = {}
        """In order of admission."""
        self._in_pool = Beginnings()
        self._all = Beginnings()
        self._sunk: set[tuple[int, int]] = set()
        """(sequence, member) of which something lies below."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, seq: int) -> bool:
        return seq in self._entries

    @property
    def over(self) -> set[int]:
        """Sequences that are over, and have left something."""
        return {seq for seq, entry in self._entries.items() if not entry.is_live}

    def is_live(self, seq: int) -> bool:
        """Whether its blocks are in use anyhow."""
        return seq in self._entries and self._entries[seq].is_live

    def add(self, seq: int, chain: Chain) -> None:
        """A sequence is admitted with these tokens."""
        self._entries[seq] = _Entry(chain.copy())

    @property
    def has_below(self) -> bool:
        """Whether something lies below the pool of a member."""
        return bool(self._sunk)

    def tell(self, seq: int, member: int, runs: Runs, below: Sequence[int] = (), follow: Ranges = ()) -> bool:
        """What can be shared of a sequence on an instance, as `Held.of` has it. False: nobody will ask for that, as the
        sequence is not known (any more)."""
        entry = self._entries.get(seq)
        if entry is None:
            return not runs
        self._set(seq, entry, member, Held.of(runs, below, follow))
        self._list(seq, entry)
        return seq in self._entries or not runs

    def common(self, chain: Chain) -> int:
        """With how many of a sequence's first tokens others began, whether or not these can be shared."""
        count, _ = self._in_pool.longest(chain.digests)
        return count * self._block_size

    def _set(self, seq: int, entry: _Entry, member: int, held: Held) -> None:
        self._sunk.discard((seq, member))
        entry.held.pop(member, None)
        if held.runs:
            entry.held[member] = held
            if held.has_below:
                self._sunk.add((seq, member))

    def end(self, seq: int, generated: bytes) -> list[int]:
        """A sequence is over. `generated`: the tokens that followed those with which it was admitted, packed. Returns members
        that keep something of it for nothing: it has no full block."""
        entry = self._entries.get(seq)
        if entry is None or not entry.is_live:
            return []
        entry.is_live = False
        entry.chain.extend(generated)
        self._list(seq, entry)
        return [] if seq in self._entries else sorted(entry.held)

    def contradict(self, seq: int, member: int, asked: Runs) -> None:
        """An instance hasn't got that of a sequence. If it has not said since what it has instead, it has nothing."""
        entry = self._entries.get(seq)
        held = None if entry is None else entry.held.get(member)
        told = () if held is None else held.in_pool
        if all(any(whole_blocks(run, part[-1][1], self._block_size) == list(part) for run in told) for part in asked):
            self.tell(seq, member, ())

    def suspend(self) -> None:
        """The epoch is over: what runs begins anew, with another number or the same."""
        for seq in [seq for seq, entry in self._entries.items() if entry.is_live]:
            self._remove(seq)

    def inherit(self, kept: Mapping[int, Mapping[int, Held]]) -> None:
        """All of the next epoch's members have said what they have of sequences that are over: id -> seq -> that."""
        for seq, entry in list(self._entries.items()):
            for member in [*entry.held, *kept]:
                self._set(seq, entry, member, kept.get(member, {}).get(seq, _NOTHING))
            self._list(seq, entry)

    def find(self, chain: Chain, end: int, without: Iterable[int] = (), *, with_below: bool = False) -> list[Match]:
        """What can be shared of those that begin with most of the tokens before position `end`: most tokens first, newer ones
        before older, one for each set of members. `without`: members of which nothing is wanted. `with_below`: what must be
        read first counts, too."""
        count, seqs = (self._all if with_below else self._in_pool).longest(chain.digests)
        end = min(end, count * self._block_size)
        left_out = set(without)
        found: dict[frozenset[int], Match] = {}
        for seq in islice(seqs, MOST_WEIGHED):
            match = self._shareable(seq, end, left_out, with_below=with_below)
            where = frozenset(match.parts)
            if match.parts and (where not in found or match.tokens > found[where].tokens):
                found[where] = match
        return sorted(found.values(), key=lambda match: (-match.tokens, -match.source))

    def _shareable(self, seq: int, end: int, left_out: set[int], *, with_below: bool) -> Match:
        all_held = {member: held for member, held in sorted(self._entries[seq].held.items()) if member not in left_out}
        parts: dict[int, Runs] = {}
        for member, held in all_held.items():
            runs = held.runs if with_below else held.in_pool
            if whole := [part for run in runs if (part := whole_blocks(run, end, self._block_size))]:
                parts[member] = whole
        parts = held_once(parts)
        follow = {member: all_held[member].follow for member in parts if all_held[member].follow}
        if follow:
            parts = _followed(parts, follow, self._block_size)
        if not with_below:
            return Match(seq, parts, is_whole=bool(follow))
        below: dict[int, int] = {}
        for member, runs in parts.items():
            in_pool = {run[0][0]: count_tokens([run]) for run in all_held[member].in_pool}
            lacks = sum(max(0, count_tokens([run]) - in_pool.get(run[0][0], 0)) for run in runs)
            if lacks:
                below[member] = lacks
        return Match(seq, parts, below, is_whole=bool(follow))

    def _list(self, seq: int, entry: _Entry) -> None:
        """Let it be found by its digests, as far as there is KV of it; forget it if there is none, and will be none."""
        for listing, runs in (
            (self._in_pool, [run for held in entry.held.values() for run in held.in_pool]),
            (self._all, [run for held in entry.held.values() for run in held.runs]),
        ):
            last = max((run[-1][1] for run in runs), default=0)
            listing.note(seq, entry.chain.digests, min(entry.chain.num_blocks, -(-last // self._block_size)))
        if not entry.is_live and seq not in self._all.num_listed:
            self._sunk -= {(seq, member) for member in entry.held}
            del self._entries[seq]

    def _remove(self, seq: int) -> None:
        entry = self._entries[seq]
        entry.is_live = False
        for member in list(entry.held):
            self._set(seq, entry, member, _NOTHING)
        self._list(seq, entry)

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other."""
        for seq, entry in self._entries.items():
            if not entry.is_live and not entry.held:
                raise RuntimeError(f"sequence {seq} is over, has left nothing, and is known")
        for listing in (self._in_pool, self._all):
            listing.validate({seq: entry.chain for seq, entry in self._entries.items()})
        if self._sunk != {(s, m) for s, entry in self._entries.items() for m, held in entry.held.items() if held.has_below}:
            raise RuntimeError(f"something is said to lie below of {sorted(self._sunk)}")


def first_gap(parts: Mapping[int, Runs]) -> int:
    """The first position that none of the parts has."""
    end = 0
    for start, stop in sorted(piece for runs in parts.values() for run in runs for piece in run):
        if start > end:
            break
        end = max(end, stop)
    return end


def follow_of(shard: KeptShard) -> Ranges:
    """As `Held` has it."""
    return (*shard.branches, (shard.since, FAR)) if shard.since or shard.branches else ()


def _followed(parts: dict[int, Runs], follow: Mapping[int, Ranges], block_size: int) -> dict[int, Runs]:
    """The most of them, in whole blocks and without a gap, that a row can follow. `follow`: for each member, if not all can."""
    ends = sorted({last for ranges in follow.values() for _, last in ranges}, reverse=True)
    for end in ends:
        left = _without_gaps(parts, end, block_size)
        row = first_gap(left)
        if left and all(any(a <= row <= b for a, b in follow.get(member, [(0, FAR)])) for member in left):
            return left
    return {}


def _without_gaps(parts: dict[int, Runs], end: int, block_size: int) -> dict[int, Runs]:
    """What of them before a position, in whole blocks, lies before the first gap that is left then."""
    while parts:
        cut = {member: [whole_blocks(run, end, block_size) for run in runs] for member, runs in parts.items()}
        parts = {member: whole for member, runs in cut.items() if (whole := [run for run in runs if run])}
        gap = first_gap(parts)
        if gap == end:
            break
        end = gap
    return parts


def _first(run: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The first so many positions of a run."""
    return whole_blocks(run, _position_after(run, count), 1)


def _position_after(run: Sequence[tuple[int, int]], count: int) -> int:
    """One more than the position of the run's token of that number, from 1 on."""
    for start, end in run:
        if count <= end - start:
            return start + count
        count -= end - start
    return run[-1][1]
