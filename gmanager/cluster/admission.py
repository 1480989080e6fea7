"""Who of those that wait is admitted next, and where: from the queue to a reservation, and from that to what runs."""

from itertools import islice

from gmanager.cluster.backfill import Backfill
from gmanager.cluster.cell import Cell
from gmanager.cluster.events import Emit, SendAll
from gmanager.cluster.placement import Placement
from gmanager.cluster.request import Request, count_tokens
from gmanager.cluster.requests import Requests
from gmanager.cluster.reservations import Reservation, Reservations
from gmanager.cluster.reuse import Reuses
from gmanager.cluster.running import Running
from gmanager.cluster.sequence import Sequence, told_of
from gmanager.cluster.waiting import Waiting
from gmanager.wire.messages import Admit, KeptPart

MAX_BACKFILLED = 4
"""Of those that may go before the next in the queue, for how many room is looked for at a time."""


class Admission:
    """Of one cell, through all its epochs. Pure: what is to be done is emitted."""

    def __init__(
        self,
        cell: Cell,
        requests: Requests,
        waiting: Waiting,
        running: Running,
        reuses: Reuses,
        reservations: Reservations,
        emit: Emit,
    ) -> None:
        self._cell = cell
        self._requests = requests
        self._waiting = waiting
        self._running = running
        self._reuses = reuses
        self._reservations = reservations
        self._emit = emit
        self._backfill = Backfill(cell, running, waiting, requests)

    # --- a reservation ------------------------------------------------------------------------------------------------

    def begin(self) -> bool:
        """Reserve for the next that there is room for. Whether another may come next at once, as this one waits for what it is
        to share, which another computes or which is read from below."""
        if not self._waiting or self._running.lacks_blocks:
            return False
        first = self._waiting.next(self._reuses.waits)
        if first is None or self._is_asked_for(first):
            return False
        waits = self._find_place(first)
        if waits is not None:
            return waits
        if not self._running and not self._running.blocks_come:
            self._waiting.give_up_kept(last=first)
            return False
        for other in islice(self._backfill.before(first, self._reuses.waits), MAX_BACKFILLED):
            if not self._is_asked_for(other) and (waits := self._find_place(other)) is not None:
                return waits
        return False

    def _find_place(self, request: Request) -> bool | None:
        """Reserve what it takes, if there is room. None: there is none. That may be better in a moment, and is waited for, as
        is what has to be read or computed first: then True, as who comes next need not wait for that, nor for its turn."""
        place, now = self._waiting.placer(request), self._requests.now
        placement, reuse = self._reuses.choose(request, self._running.views(), place, now)
        if reuse is not None and reuse.below:
            self._reuses.read(request, reuse, now)
            return True
        if self._reuses.should_wait(request, reuse, now):
            return True
        if placement is None:
            return None
        is_better_later = self._cell.policy.waits_for_even and not (request.kept or reuse or placement.is_even)
        if is_better_later and self._running.blocks_come:
            return False
        self._waiting.take(request)
        self._requests.change(request, "reserve")
        number = request.seq if request.kept else self._running.next_number()
        blocks = {rank: self._cell.taken(length) for rank, length in placement.blocks.items()}
        if reuse is not None:
            blocks = reuse.with_pinned(blocks)
        self._reservations.begin(Reservation(number, blocks, request, placement, reuse))
        return False

    def _is_asked_for(self, request: Request) -> bool:
        """Whether answers to an earlier Reserve for what is left of it are yet to come, which would be taken for those to
        the next: a new sequence has a new number, this one keeps its own."""
        return bool(request.kept) and any(request.seq in member.outstanding for member in self._cell.members)

    # --- a sequence ---------------------------------------------------------------------------------------------------

    def admit(self, reservation: Reservation, placement: Placement) -> Sequence:
        """All is granted: let it run."""
        request, reuse = reservation.request, reservation.reuse
        home = placement.shares[0].rank
        kept, request.kept = request.kept if reuse is None else reuse.parts, {}
        participants = sorted({*placement.blocks, *kept})
        sequence = Sequence(reservation.seq, request, home, participants, placement.shares)
        sequence.kept = {rank: count_tokens(runs) for rank, runs in kept.items()}
        sequence.held = dict(sequence.kept)
        if request.params.prompt_logprobs is not None and not request.is_scored:
            sequence.unscored = request.prompt_tokens - 1
            request.scores.clear()
        self._running.add(sequence)
        request.seq = sequence.number
        request.home, request.gave_way_at = self._cell.id_of(home), None
        request.held = {self._cell.id_of(rank): tokens for rank, tokens in sequence.kept.items()}
        self._reuses.admit(sequence.number, request, reuse, placement.shares)
        self._requests.admit(request, 0 if reuse is None else reuse.tokens)
        self._running.regroup(sequence)
        admit = Admit(
            epoch=self._cell.epoch,
            seq=sequence.number,
            arrival=request.number,
            token_ids=request.packed(),
            shares=placement.shares,
            params=request.sequence_params(self._cell.eos_token_ids),
            kept=[KeptPart(rank=rank, runs=[list(run) for run in runs]) for rank, runs in sorted(kept.items())],
            branch=0 if kept and reuse is None else self._reuses.branch(request, reuse),
        )
        self._emit(SendAll(tuple(self._cell.members[rank].peer for rank in sequence.participants), admit))
        told = {
            "home": self._cell.id_of(home),
            "kv_tokens": {self._cell.id_of(share.rank): share.tokens for share in placement.shares},
        }
        if kept:
            told["kept" if reuse is None else "shared"] = {
                self._cell.id_of(rank): tokens for rank, tokens in sequence.kept.items()
            }
        self._emit(told_of(sequence, "request admitted", **told))
        return sequence
