"""Requests that wait for a cell's memory, and what is left of their KV from the epoch before.

running ──take_back──> waiting ──inherit──> with what its members have kept ──take──> admitted: only the rest is computed
                          │                        └── give_up_kept, discard: without ── take ──> all of it is computed
                          └── withdraw, give_up_broken ──> ended
"""

import logging
from bisect import insort
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

from gmanager.cluster.cell import Cell
from gmanager.cluster.events import Emit, Log, Send
from gmanager.cluster.placement import LONG_PROMPT, MOST_WEIGHED, InstanceView, Placement
from gmanager.cluster.policies import Outlook, Policy, Prompt
from gmanager.cluster.prefixes import first_gap
from gmanager.cluster.request import Request, count_tokens, cut, held_once
from gmanager.cluster.requests import Requests
from gmanager.cluster.reuse import Reuse
from gmanager.cluster.sequence import SOON
from gmanager.wire.messages import Discard, Unheard

MAX_BREAKS = 3
"""Epochs that may break while a request runs, or with which one that computes it may be lost, and no token of it come, until
it is given up."""


class Waiting:
    """The queue of one cell, through all its epochs. Pure: what is to be done is emitted."""

    def __init__(self, cell: Cell, requests: Requests, emit: Emit) -> None:
        self._cell = cell
        self._requests = requests
        self._emit = emit
        self._queue: list[Request] = []
        """By precedence: priority and arrival."""
        self._first: Request | None = None
        """Who was next when last asked, ..."""
        self._next_since = 0.0
        """... and since when."""
        self._came_from: dict[int, int] = {}
        """While the membership changes: request -> sequence as which it ran, whose KV may be kept; 0: none."""

    def __len__(self) -> int:
        return len(self._queue)

    # --- who waits ----------------------------------------------------------------------------------------------------

    def add(self, request: Request, now: float, change: Literal["enqueue", "deny", "release", "interrupt"]) -> None:
        """Behind all that precede it."""
        self._requests.change(request, change)
        request.waiting_since = now
        insort(self._queue, request, key=lambda waiting: waiting.precedence)

    def next(self, but: Collection[int] = ()) -> Request | None:
        """The first that the present members could hold all of, alone. The cell may have been larger when one that they can't
        came, and be again. `but`: numbers of requests that wait for something else."""
        first = next((request for request in self._queue if request.number not in but and self._may_fit(request)), None)
        if first is not self._first:
            self._first, self._next_since = first, self._requests.now
        return first

    def first(self, count: int) -> list[Request]:
        """So many, by precedence."""
        return self._queue[:count]

    @property
    def numbers(self) -> Iterable[int]:
        """Of all of them."""
        return (request.number for request in self._queue)

    def waited_s(self, request: Request) -> float:
        """How long it has been the next."""
        return self._requests.now - self._next_since if request is self._first else 0.0

    def behind(self, request: Request, most: int, but: Collection[int] = ()) -> list[Request]:
        """Of those that wait behind one, the first. `but`: as `next`."""
        others = self._queue[self._queue.index(request) + 1 :]
        return list(islice((other for other in others if other.number not in but and self._may_fit(other)), most))

    def ahead_of(self, request: Request) -> list[Request]:
        """Those that precede it, whether it waits here (yet) or not."""
        return [other for other in self._queue if other.precedence < request.precedence and self._may_fit(other)]

    def _may_fit(self, request: Request) -> bool:
        most = self._cell.most_held(self._cell.lasting_blocks)
        generated = len(request.tokens)
        return request.prompt_tokens + max(request.max_tokens, generated + bool(generated)) <= most

    def placer(self, request: Request) -> "Placer":
        """Where its next admission would lie. What else the policy sees is looked up once, however many ways are tried."""
        left = next((member.rank for member in self._cell.members if member.id == request.gave_way_at), None)
        return Placer(self._cell.policy, request, self.outlook((), request), self.waited_s(request), left)

    def outlook(self, views: Sequence[InstanceView], request: Request | None = None) -> Outlook:
        """What a policy sees. `request`: that is to be placed."""
        spec, queue = self._cell.spec, self._queue
        # how much waits behind a short prompt doesn't matter
        is_long = request is not None and request.missing_tokens >= LONG_PROMPT
        behind = (
            waits.missing_tokens for waits in queue if is_long and request is not None and waits.precedence > request.precedence
        )
        return Outlook(
            views=views,
            block_size=spec.block_size,
            chunk_tokens=spec.chunk_tokens,
            reach=spec.reach,
            costs=self._cell.performance.costs,
            waiting=list(islice(filter(LONG_PROMPT.__le__, behind), MOST_WEIGHED)),
            num_waiting=len(queue),
            mean_tokens=sum(waits.num_tokens for waits in queue[:MOST_WEIGHED]) // max(1, min(len(queue), MOST_WEIGHED)),
        )

    def take(self, request: Request) -> None:
        """It waits no longer, and brings what is left of its KV."""
        self._queue.remove(request)

    def withdraw(self, request: Request) -> None:
        """It has ended."""
        self._queue.remove(request)
        self.discard(request)

    # --- what is left of their KV -------------------------------------------------------------------------------------

    @property
    def kept_seqs(self) -> Collection[int]:
        """Whose KV waits on instances for an admission."""
        return {request.seq for request in self._queue if request.kept}

    def discard(self, request: Request) -> None:
        """What is left of its KV isn't wanted any more, whether it is in the queue or not."""
        if self._cell.phase != "suspending":
            for rank in request.kept:
                member = self._cell.members[rank]
                self._emit(Send(member.peer, Discard(epoch=self._cell.epoch, seq=request.seq)))
                member.is_freeing = True
        request.kept = {}
        request.held = {}

    def give_up_kept(self, last: Request | None = None) -> bool:
        """Free what is left of the KV of the last in the queue, of `last` only if no other has any. Whether there was any."""
        kept = [request for request in self._queue if request.kept]
        victim = next((request for request in reversed(kept) if request is not last), last if last in kept else None)
        if victim is None:
            return False
        fields = {"request": victim.id, "number": victim.number, "tokens": victim.num_tokens - victim.missing_tokens}
        self._emit(Log(logging.INFO, "kept KV given up", fields))
        self.discard(victim)
        return True

    # --- changes of membership ----------------------------------------------------------------------------------------

    def suspend(self) -> None:
        """The epoch is over: note whose KV is left of it, or of one before."""
        for request in self._queue:
            self._came_from.setdefault(request.number, request.seq if request.kept else 0)

    def take_back(self, request: Request, seq: int, waiting_since: float, taken_part: Collection[int] = ()) -> None:
        """It ran or was about to when the epoch ended. `seq`: sequence whose KV may be kept for it; 0: none. `taken_part`: ids
        of its participants."""
        self._came_from[request.number] = seq
        self.add(request, waiting_since, "interrupt")
        request.was_interrupted, request.taken_part = True, frozenset(taken_part)
        self._requests.fail_move(request, f"request {request.id!r} has no home now: the cell's membership changes")
        request.home = None
        request.held = {}
        request.kept = {}

    def blame(self, lost: int) -> None:
        """The instance of this id is lost: by each that it took part in, perhaps."""
        for request in self._queue:
            if request.was_interrupted and lost in request.taken_part:
                request.breaks += 1
                request.taken_part = frozenset()

    def take_unheard(self, request: Request, unheard: Unheard) -> None:
        """Tokens that were generated while there was no gManager. Those that it has are passed over, and those that don't
        follow are generated again."""
        start = len(request.tokens) - unheard.index
        if start < 0 or request.lacks_scores:
            return
        logprobs = None if unheard.logprobs is None else unheard.logprobs[start:]
        token_ids, logprobs, reason = request.wanted_of(unheard.token_ids[start:], logprobs, unheard.finish_reason)
        if reason is not None:
            self._requests.finish(request, reason, token_ids=token_ids, logprobs=logprobs)
            self.withdraw(request)
        elif token_ids:
            self._requests.deliver(request, token_ids, logprobs)

    def reclaim(self, came_from: Mapping[int, int]) -> None:
        """KV that was kept for another gManager: request -> sequence as which it ran."""
        for request in self._queue:
            if request.is_restored and request.number in came_from and not request.lacks_scores:
                self._came_from[request.number] = came_from[request.number]

    def inherit(self) -> None:
        """All members of the next epoch are known, and what they have kept (`Member.kept`)."""
        for request in self._queue:
            if request.params.max_tokens is None:  # as many as there is room for: now more or fewer
                request.max_tokens = self._cell.room(request.prompt_tokens)
            seq = self._came_from.get(request.number, 0)
            request.breaks += self._cell.broke is not None and request.was_interrupted
            request.was_interrupted = False
            last = request.num_tokens - 1  # whose row is computed anew, for the token that follows
            kept = {
                member.rank: cut((member.kept or {}).get(seq, ()), last)
                for member in self._cell.members
                if last >= member.shared_ends.get(seq, 0)
            }
            request.kept = held_once(kept)
            since = max((self._cell.members[rank].since.get(seq, 0) for rank in request.kept), default=0)
            if since > first_gap(request.kept):
                request.kept = {}  # what is missing would see more of it than is left, in layers with windows
            request.seq = seq
            request.held = {self._cell.id_of(rank): count_tokens(runs) for rank, runs in request.kept.items()}
        for member in self._cell.members:
            kept_seqs = {request.seq for request in self._queue if member.rank in request.kept}
            said = member.kept or {}
            member.kept = {seq: runs for seq, runs in said.items() if seq in kept_seqs}
            if len(member.kept) < len(said):  # it frees the others with the JoinEpoch
                member.is_freeing = True
        self._came_from.clear()
        self._give_up_broken()

    def _give_up_broken(self) -> None:
        """Those that may be what breaks epochs."""
        for request in [request for request in self._queue if request.breaks >= MAX_BREAKS]:
            self.withdraw(request)
            what = f"{request.breaks} epochs of cell '{self._cell.name}' broke while the request ran"
            error = f"{what}; the last: {self._cell.loss or self._cell.broke}"
            self._requests.finish(request, "error", error=error)

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other."""
        order = [request.precedence for request in self._queue]
        if order != sorted(set(order)):
            raise RuntimeError("the queue is not in order of precedence")
        for request in self._queue:
            if request.state != "queued" or not request.prompt:
                raise RuntimeError(f"request {request.number} waits and is {request.state}")


class Placer:
    """Where a request's next admission would lie: what `gmanager.cluster.reuse` has as `Places`."""

    def __init__(self, policy: Policy, request: Request, outlook: Outlook, waited_s: float, left: int | None) -> None:
        """`left`: the instance at which it gave way."""
        self._policy = policy
        self._request = request
        self._outlook = outlook
        self._waited_s = waited_s
        self._left = left

    def __call__(self, views: Sequence[InstanceView], reuse: Reuse | None) -> Placement | None:
        return self._policy.place(self._prompt(reuse), replace(self._outlook, views=self._with_reserve(views)))

    def reaches_for(self, views: Sequence[InstanceView], reuse: Reuse, placement: Placement, far: Collection[int]) -> bool:
        tokens = {rank: count_tokens(reuse.parts[rank]) for rank in far}
        return self._policy.reaches_for(self._prompt(reuse), placement, tokens, replace(self._outlook, views=views))

    def _prompt(self, reuse: Reuse | None) -> Prompt:
        request = self._request
        there = request.kept if reuse is None else reuse.parts
        return Prompt(
            missing=request.num_tokens - sum(map(count_tokens, there.values())),
            kept={rank: (count_tokens(runs), len(runs)) for rank, runs in there.items()},
            spread=request.spread,
            waited_s=self._waited_s,
            is_shared=reuse is not None,
            left=request.left,
        )

    def _with_reserve(self, views: Sequence[InstanceView]) -> Sequence[InstanceView]:
        """Where it gave way, what those at home there and itself generate next needs room, too, or it would give way again, in
        a moment. With nobody there it needs no more than any other."""
        if self._left is None or not views[self._left].homes:
            return views
        seen, view, outlook = list(views), views[self._left], self._outlook
        room = outlook.room_at(view) - outlook.blocks_for(min(SOON, self._request.left))
        seen[self._left] = replace(view, free_blocks=max(0, room))
        return seen
