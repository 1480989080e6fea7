"""Requests that begin as others did: what of their KV is there, and whether it is worth going where it lies.

Prefixes.find ──> Reuse: what is shared where ──place_rest──> option ┐
                  (another sequence, other members) ...         option ├── cheapest ──> Reserve with what is to be shared
                  more, once it is read from below ...          option │      └── or Fetch of what is below, and then again
                  none of it ─────────────────────place──────> option ┘
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from gmanager.cluster.cell import Cell
from gmanager.cluster.events import Emit, Send
from gmanager.cluster.following import Following
from gmanager.cluster.member import Member
from gmanager.cluster.placement import InstanceView, Placement, prompt_work
from gmanager.cluster.prefixes import Match, Prefixes, follow_of, is_shareable
from gmanager.cluster.reading import MOST_READS, Reading
from gmanager.cluster.request import Request, Runs, count_tokens
from gmanager.wire.footprint import anchor_tokens
from gmanager.wire.messages import Cached, Discard, Share, pack_tokens

FAR_TOKENS = 512
"""So many must lie on an instance that computes nothing of a request, to be attended to there: each of its steps needs an
exchange with it. That takes 0.7 ms a step (32 layers of 23 us), in which an H200 prefills 18 tokens: so 512 are 28 steps."""

HOME_TOKENS = 32
"""What one more sequence that decodes there is held against a home, in tokens to prefill: a beginning that all requests have
must not make one instance the home of all."""

LEAST_BRANCH = 512
"""Tokens that others must have begun with, and that are computed again, for what is seen where they part to be kept."""

LEAST_TOKEN_S = 1e-9
"""Of a token that is computed, whatever was measured: so reading is weighed against something."""

MOST_HOMES = 4
"""Holders of a beginning, the least crowded ones, that are weighed as homes."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a request can share of one other sequence."""

    source: int
    parts: dict[int, Runs]
    """rank -> for each run there whole blocks of its first tokens."""
    pinned: dict[int, int]
    """rank -> blocks there that are free no longer when they are shared."""
    below: dict[int, int] = field(default_factory=dict)
    """rank -> tokens of these that are to be read into the pool there first."""
    is_whole: bool = False
    """Whether it is of no use without one of them."""

    @property
    def tokens(self) -> int:
        return sum(map(count_tokens, self.parts.values()))

    def without(self, ranks: Collection[int]) -> "Reuse":
        """What others than these hold."""
        parts = {rank: runs for rank, runs in self.parts.items() if rank not in ranks}
        below = {rank: tokens for rank, tokens in self.below.items() if rank in parts}
        return Reuse(self.source, {} if self.is_whole else parts, {rank: self.pinned[rank] for rank in parts}, below)

    @property
    def end(self) -> int:
        """One more than the last position that is shared."""
        return max(run[-1][1] for runs in self.parts.values() for run in runs)

    def with_pinned(self, blocks: Mapping[int, int]) -> dict[int, int]:
        """rank -> what a placement and this take there together, those that compute nothing included."""
        return {rank: blocks.get(rank, 0) + self.pinned.get(rank, 0) for rank in sorted({*blocks, *self.parts})}

    def seen_by(self, views: Sequence[InstanceView]) -> list[InstanceView]:
        """Instances as they are once it is shared."""
        seen = list(views)
        for rank in filter(self.pinned.get, self.pinned):
            seen[rank] = replace(views[rank], free_blocks=max(0, views[rank].free_blocks - self.pinned[rank]))
        return seen


Option = tuple[Placement, Reuse | None]


class Places(Protocol):
    """Where a request may lie."""

    def __call__(self, views: Sequence[InstanceView], reuse: Reuse | None) -> Placement | None:
        """With what it shares, and as instances are then; None if nowhere."""

    def reaches_for(self, views: Sequence[InstanceView], reuse: Reuse, placement: Placement, far: Collection[int]) -> bool:
        """Whether what these ranks hold of it, which compute nothing, is worth that they take part in each of its steps."""


class Reuses:
    """Of one cell, through all its epochs. Pure: what is to be done is emitted."""

    def __init__(self, cell: Cell, emit: Emit) -> None:
        self._cell = cell
        self._emit = emit
        self._prefixes = Prefixes(cell.spec.block_size)
        self.reading = Reading(cell, emit)
        most_apart = anchor_tokens(cell.spec.chunk_tokens) if cell.spec.windows else None
        self.following = Following(cell.spec.block_size, most_apart)
        self._admitted: dict[int, tuple[int, Reuse | None]] = {}
        """seq -> how many tokens had been generated for its request when it was admitted, and what it shares."""
        self._sharing: dict[int, dict[int, Counter[int]]] = {}
        """source -> rank -> how many of these share so many of its blocks there."""

    @property
    def has_below(self) -> bool:
        """Whether something lies below the pool of an instance."""
        return self._prefixes.has_below

    # --- what there is ------------------------------------------------------------------------------------------------

    @property
    def waits(self) -> Collection[int]:
        """Numbers of the requests that wait for what they will share."""
        return {*self.reading.numbers, *self.following.numbers}

    def is_coming(self, request: Request) -> bool:
        """Whether what it will share is read or computed now."""
        return self.reading.is_read_for(request) or request.number in self.following.numbers

    def forget(self, number: int) -> None:
        """A request waits for nothing any more: it has ended."""
        self.reading.forget(number)
        self.following.forget(number)

    def end_overdue(self, now: float) -> bool:
        """Whether some wait no longer for what they would have shared."""
        reading, following = self.reading.end_overdue(now), self.following.end_overdue(now)
        return reading or following

    def admit(self, seq: int, request: Request, reuse: Reuse | None, shares: Iterable[Share]) -> None:
        """A sequence begins, with all tokens that its request has. `shares`: who computes how many of them."""
        self.following.forget(request.number)
        chain = request.chain
        request.num_reads, request.was_lifted = 0, False
        if chain is not None:
            self._lengthen(request)
            self._prefixes.add(seq, chain)
            self._admitted[seq] = len(request.tokens), reuse
            self._count(self._sharing, reuse)
            computed = ((self._cell.id_of(share.rank), share.tokens) for share in shares)
            self.following.begin(seq, chain, request.num_tokens, computed)

    def end(self, seq: int, request: Request) -> None:
        """A sequence is released."""
        self.following.end(seq)
        generated, reuse = self._admitted.pop(seq, (0, None))
        if reuse is not None:
            self._uncount(reuse)
        for number in self._prefixes.end(seq, pack_tokens(request.tokens[generated:])):
            self._discard(number, seq)

    def _count(self, sharing: dict[int, dict[int, Counter[int]]], reuse: Reuse | None) -> None:
        """One more shares that."""
        if reuse is None:
            return
        for rank, runs in reuse.parts.items():
            blocks = count_tokens(runs) // self._cell.spec.block_size
            sharing.setdefault(reuse.source, {}).setdefault(rank, Counter())[blocks] += 1

    def _uncount(self, reuse: Reuse) -> None:
        """One fewer does."""
        by_rank = self._sharing[reuse.source]
        for rank, runs in reuse.parts.items():
            numbers, blocks = by_rank[rank], count_tokens(runs) // self._cell.spec.block_size
            numbers[blocks] -= 1
            if not numbers[blocks]:
                del numbers[blocks]
            if not numbers:
                del by_rank[rank]
        if not by_rank:
            del self._sharing[reuse.source]

    def hear(self, member: Member, cached: Cached) -> bool:
        """What of sequences can be shared on an instance. False: it can't be."""
        most = member.spec.num_blocks * self._cell.spec.block_size
        if not all(is_shareable(shard, most) for shard in cached.shards):
            return False
        for shard in cached.shards:
            if not self._prefixes.tell(shard.seq, member.id, shard.runs, shard.below, follow_of(shard)):
                self._discard(member.id, shard.seq)
            self.following.told(shard.seq, member.id)
        return True

    def contradict(self, member: Member, reuse: Reuse) -> None:
        """An instance says that it hasn't what was to be shared. If it has not said since what it has, it has nothing."""
        self._prefixes.contradict(reuse.source, member.id, reuse.parts.get(member.rank, ()))

    def suspend(self) -> None:
        """The epoch is over."""
        self._prefixes.suspend()
        self.reading.suspend()
        self.following.suspend()
        self._admitted.clear()
        self._sharing.clear()

    def inherit(self) -> None:
        """All members of the next epoch are known, and what they have kept (`Member.cached`)."""
        self._prefixes.inherit({member.id: member.cached for member in self._cell.members})
        wanted = self._prefixes.over
        for member in self._cell.members:
            said, member.cached = member.cached, {seq: held for seq, held in member.cached.items() if seq in wanted}
            member.is_freeing |= len(member.cached) < len(said)  # it frees the others with the JoinEpoch

    def _discard(self, number: int, seq: int) -> None:
        for member in self._cell.members:
            if member.id == number:
                self._emit(Send(member.peer, Discard(epoch=self._cell.epoch, seq=seq)))

    # --- what of it is used -------------------------------------------------------------------------------------------

    def choose(
        self,
        request: Request,
        views: Sequence[InstanceView],
        place: Places,
        now: float,
    ) -> tuple[Placement | None, Reuse | None]:
        """Where a request is computed soonest, None if it fits nowhere now; and what it shares there, some of which may have to
        be read first."""
        self.reading.take_turn(request)
        plain = place(views, None)
        options: list[Option] = []
        for reuse in self._find(request):
            for seen in _by_home(views, reuse):
                option = self._place(reuse, seen, place)
                if option is not None:
                    options.append(option)
        if plain is not None:
            options.append((plain, None))
        reach, tokens = self._cell.spec.reach, request.num_tokens

        def cost(option: Option) -> float:
            return _cost(option, views, tokens, reach) + self._read_cost(option[1], now)

        return min(options, key=cost, default=(None, None))

    def _read_cost(self, reuse: Reuse | None, now: float) -> float:
        """How long what is below is read, in tokens at the beginning of a prompt."""
        if reuse is None or not reuse.below:
            return 0.0
        members, prefill = self._cell.members, self._cell.performance.costs.prefill
        seconds = max(self.reading.token_s(members[rank].id, now) * tokens for rank, tokens in reuse.below.items())
        return seconds / max(prefill.row_s + prefill.step_s / self._cell.spec.chunk_tokens, LEAST_TOKEN_S)

    def read(self, request: Request, reuse: Reuse, now: float) -> None:
        """Have what is below read, for a request that waits for it; or let it wait for its turn."""
        below = {self._cell.id_of(rank): tokens for rank, tokens in reuse.below.items()}
        self.reading.begin(request, reuse.source, reuse.end, below, now)

    def lift(self, request: Request) -> None:
        """What is on disk of what it begins with is soon wanted."""
        request.was_lifted = True
        for match in self._matches(request, with_below=True)[:1]:
            on_disk = [m.id for m in self._cell.members if m.disk_blocks and m.id in match.below]
            self.reading.lift(match.source, request.num_tokens - 1, on_disk)

    def should_wait(self, request: Request, reuse: Reuse | None, now: float) -> bool:
        """Whether a request waits, for a prompt that is computed just now to be shared. `reuse`: what is there already."""
        if not _may_share(request):
            return False
        found = self.following.worth_waiting(request, 0 if reuse is None else reuse.tokens)
        if found is not None:
            seq, tokens = found
            takes_s = self._cell.performance.costs.prefill_s(tokens, chunk=self._cell.spec.chunk_tokens)
            self.following.wait(request, seq, now, takes_s)
        return found is not None

    def branch(self, request: Request, reuse: Reuse | None) -> int:
        """Before which position a request that is admitted began as others did, and could not begin with what they left, where
        layers have windows; 0: none."""
        if not self._cell.spec.windows or request.chain is None:
            return 0
        common = min(self._prefixes.common(request.chain), request.num_tokens - 1)
        return common if common >= (0 if reuse is None else reuse.end) + LEAST_BRANCH else 0

    def known(self, request: Request) -> int:
        """Tokens of it that it could share now, or once they are read."""
        return max((reuse.tokens for reuse in self._find(request)), default=0)

    def _find(self, request: Request) -> list[Reuse]:
        """What it could share."""
        matches = self._matches(request, with_below=False)
        if self._prefixes.has_below and request.num_reads < MOST_READS:
            matches += [match for match in self._matches(request, with_below=True) if match.below]
        rank_of = {member.id: member.rank for member in self._cell.members} if matches else {}
        return [self._as_reuse(match, rank_of) for match in matches]

    def _matches(self, request: Request, *, with_below: bool) -> list[Match]:
        """Those that begin as it does; the last token's row is computed anew, for the token that follows."""
        if request.chain is None or not _may_share(request) or not len(self._prefixes):
            return []
        self._lengthen(request)
        draining = [member.id for member in self._cell.members if member.is_draining]
        return self._prefixes.find(request.chain, request.num_tokens - 1, draining, with_below=with_below)

    def _as_reuse(self, match: Match, rank_of: dict[int, int]) -> Reuse:
        parts = {rank_of[number]: runs for number, runs in match.parts.items()}
        below = {rank_of[number]: tokens for number, tokens in match.below.items()}
        size = self._cell.spec.block_size
        blocks = {rank: count_tokens(runs) // size for rank, runs in parts.items()}
        # in windows, what is seen there: nobody may use that just now
        anchors = {rank: self._cell.taken(n) - n for rank, n in blocks.items()}
        if self._prefixes.is_live(match.source):
            return Reuse(match.source, parts, anchors, is_whole=match.is_whole)
        shared = {rank: max(numbers) for rank, numbers in self._sharing.get(match.source, {}).items()}
        # what others share of it is in the pool, and used anyhow
        pinned = {
            rank: anchors[rank] + max(0, n - min(shared.get(rank, 0), n - below.get(rank, 0) // size))
            for rank, n in blocks.items()
        }
        return Reuse(match.source, parts, pinned, below, match.is_whole)

    @staticmethod
    def _place(reuse: Reuse, views: Sequence[InstanceView], place: Places) -> Option | None:
        """Without those parts for which another instance would have to take part, if they are not worth that."""
        while reuse.parts:
            seen = reuse.seen_by(views)
            placement = place(seen, reuse)
            if placement is None:
                return None
            if reuse.is_whole:  # less of it is nothing
                return placement, reuse
            far = [rank for rank in reuse.parts if rank not in placement.blocks]
            vain = [rank for rank in far if count_tokens(reuse.parts[rank]) < FAR_TOKENS]
            if not vain and far and not place.reaches_for(seen, reuse, placement, far):
                vain = far
            if not vain:
                return placement, reuse
            reuse = reuse.without(vain)
        return None

    def _lengthen(self, request: Request) -> None:
        """Let its chain have all its tokens."""
        chain = request.chain
        if chain is not None and chain.num_tokens < request.num_tokens:
            chain.extend(pack_tokens(request.tokens[chain.num_tokens - request.prompt_tokens :]))

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other."""
        self._prefixes.validate()
        sharing: dict[int, dict[int, Counter[int]]] = {}
        for _, reuse in self._admitted.values():
            self._count(sharing, reuse)
        if sharing != self._sharing:
            raise RuntimeError(f"shared are {sharing}, counted {self._sharing}")


def _may_share(request: Request) -> bool:
    """Whether it may begin with what others have computed: not if it brings KV of its own, or each of its rows is needed."""
    return request.chain is not None and not request.kept and not request.lacks_scores


def _by_home(views: Sequence[InstanceView], reuse: Reuse) -> Iterator[Sequence[InstanceView]]:
    """Instances as they are; then as if each of the least crowded holders were the only one of them that can be home: placement
    takes the one that holds most, which would be the same for all who share."""
    yield views
    if len(reuse.parts) < 2:
        return
    holders = sorted((views[rank] for rank in reuse.parts), key=lambda view: (view.homes, view.rank))
    closed = list(views)
    for view in holders:
        closed[view.rank] = replace(view, max_homes=0)
    for home in holders[:MOST_HOMES]:
        yield [*closed[: home.rank], home, *closed[home.rank + 1 :]]


def _cost(option: Option, views: Sequence[InstanceView], tokens: int, reach: int) -> float:
    """When its prompt is computed, by what is to be computed before it and of it, and how crowded its home is; in tokens."""
    placement, _ = option
    missing = sum(share.tokens for share in placement.shares)
    work = prompt_work(tokens, reach) - prompt_work(tokens - missing, reach)
    backlog = max(views[share.rank].backlog for share in placement.shares)
    return backlog + work / len(placement.shares) + HOME_TOKENS * views[placement.shares[0].rank].homes
