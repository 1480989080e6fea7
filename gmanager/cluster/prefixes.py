"""Which sequences of a cell begin with which tokens, and what of their KV lies where: an index, pure.

    add     a sequence is admitted: its tokens are known
    tell    an instance says what of it can be shared there; nothing: it is gone there
    end     it is over, and may have left something: its generated tokens count, too
    inherit an epoch begins: what of those that are over its members have kept

It holds a sequence as long as it runs, or something of it is left; and digests of it only as far as there is KV. Members are
named by their ids, which last longer than an epoch.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from gmanager.cluster.chain import Chain
from gmanager.cluster.request import Runs, count_tokens, held_once

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


@dataclass(frozen=True, slots=True)
class Match:
    """A sequence that begins as another does, and what of that can be shared."""

    source: int
    parts: dict[int, Runs]
    """id of a member -> for each run there whole blocks of its first tokens."""

    @property
    def tokens(self) -> int:
        return sum(map(count_tokens, self.parts.values()))


@dataclass(slots=True, eq=False)
class _Entry:
    chain: Chain
    is_live: bool = True
    runs: dict[int, Runs] = field(default_factory=dict)
    """id of a member -> what of it can be shared there, as last told."""
    num_listed: int = 0
    """So many first digests are found by others."""


class Prefixes:
    """Those of one cell."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._entries: dict[int, _Entry] = {}
        """In order of admission."""
        self._by_digest: dict[bytes, dict[int, None]] = {}

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

    def tell(self, seq: int, member: int, runs: Runs) -> bool:
        """What can be shared of a sequence on an instance. False: nobody will ask for that, as the sequence is not known (any
        more)."""
        entry = self._entries.get(seq)
        if entry is None:
            return not runs
        if runs:
            entry.runs[member] = runs
        else:
            entry.runs.pop(member, None)
        self._list(seq, entry)
        return seq in self._entries or not runs

    def end(self, seq: int, generated: bytes) -> list[int]:
        """A sequence is over. `generated`: the tokens that followed those with which it was admitted, packed. Returns members
        that keep something of it for nothing: it has no full block."""
        entry = self._entries.get(seq)
        if entry is None or not entry.is_live:
            return []
        entry.is_live = False
        entry.chain.extend(generated)
        self._list(seq, entry)
        return [] if seq in self._entries else sorted(entry.runs)

    def contradict(self, seq: int, member: int, asked: Runs) -> None:
        """An instance hasn't got that of a sequence. If it has not said since what it has instead, it has nothing."""
        entry = self._entries.get(seq)
        told = [] if entry is None else entry.runs.get(member, ())
        if all(any(whole_blocks(run, part[-1][1], self._block_size) == list(part) for run in told) for part in asked):
            self.tell(seq, member, ())

    def suspend(self) -> None:
        """The epoch is over: what runs begins anew, with another number or the same."""
        for seq in [seq for seq, entry in self._entries.items() if entry.is_live]:
            self._remove(seq)

    def inherit(self, kept: Mapping[int, Mapping[int, Runs]]) -> None:
        """All of the next epoch's members have said what they have of sequences that are over: id -> seq -> runs."""
        for seq, entry in list(self._entries.items()):
            entry.runs = {member: seqs[seq] for member, seqs in kept.items() if seqs.get(seq)}
            self._list(seq, entry)

    def find(self, chain: Chain, end: int, without: Iterable[int] = ()) -> list[Match]:
        """What can be shared of those that begin with most of the tokens before position `end`: most tokens first, newer ones
        before older, one for each set of members. `without`: members of which nothing is wanted."""
        digests = chain.digests
        # whoever has a digest has all those before it
        count = bisect_left(range(len(digests)), True, key=lambda i: digests[i] not in self._by_digest)
        if not count:
            return []
        end = min(end, count * self._block_size)
        left_out = set(without)
        found: dict[frozenset[int], Match] = {}
        for seq in islice(reversed(self._by_digest[digests[count - 1]]), MOST_WEIGHED):
            match = Match(seq, self._shareable(self._entries[seq], end, left_out))
            where = frozenset(match.parts)
            if match.parts and (where not in found or match.tokens > found[where].tokens):
                found[where] = match
        return sorted(found.values(), key=lambda match: (-match.tokens, -match.source))

    def _shareable(self, entry: _Entry, end: int, left_out: set[int]) -> dict[int, Runs]:
        parts: dict[int, Runs] = {}
        for member, runs in sorted(entry.runs.items()):
            whole = [part for run in runs if (part := whole_blocks(run, end, self._block_size))]
            if whole and member not in left_out:
                parts[member] = whole
        return held_once(parts)

    def _list(self, seq: int, entry: _Entry) -> None:
        """Let it be found by its digests, as far as there is KV of it; forget it if there is none, and will be none."""
        last = max((run[-1][1] for runs in entry.runs.values() for run in runs), default=0)
        listed = min(len(entry.chain.digests), -(-last // self._block_size))
        for digest in entry.chain.digests[entry.num_listed : listed]:
            self._by_digest.setdefault(digest, {})[seq] = None
        for digest in entry.chain.digests[listed : entry.num_listed]:
            seqs = self._by_digest[digest]
            del seqs[seq]
            if not seqs:
                del self._by_digest[digest]
        entry.num_listed = listed
        if not entry.is_live and not listed:
            del self._entries[seq]

    def _remove(self, seq: int) -> None:
        entry = self._entries[seq]
        entry.is_live, entry.runs = False, {}
        self._list(seq, entry)

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other."""
        listed: dict[bytes, set[int]] = {}
        for seq, entry in self._entries.items():
            for digest in entry.chain.digests[: entry.num_listed]:
                listed.setdefault(digest, set()).add(seq)
            if not entry.is_live and not entry.runs:
                raise RuntimeError(f"sequence {seq} is over, has left nothing, and is known")
        if listed != {digest: set(seqs) for digest, seqs in self._by_digest.items()}:
            raise RuntimeError("sequences are not found by the digests that they have")
