"""What instances are asked for before anything begins: one reservation at a time in a cell, for an admission or a home move.

begin ──Reserve, ReserveNext──> all Granted: over, and what it was for begins
            │
            └── NotGranted, or nobody wants it any more: give_up ──Drop──> nothing is held
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from gmanager.cluster.cell import Cell
from gmanager.cluster.events import Emit, Send
from gmanager.cluster.homes import Homes
from gmanager.cluster.placement import Placement
from gmanager.cluster.prefixes import first_gap
from gmanager.cluster.request import Request
from gmanager.cluster.reuse import Reuse
from gmanager.cluster.running import Running
from gmanager.wire.messages import Drop, Reserve, ReserveNext


@dataclass(slots=True, eq=False)
class Reservation:
    """Blocks that were asked for and aren't used yet."""

    seq: int
    blocks: dict[int, int]
    """rank -> most that it takes there, with what it shares; a move takes one, or none if there is room for a token."""
    request: Request
    placement: Placement | None
    """Of an admission; None for the move of a sequence's home."""
    reuse: Reuse | None = None
    """What the admission shares."""
    granted: dict[int, int] = field(default_factory=dict)
    """rank -> how many were added there."""

    def validate(self, outstanding: Mapping[int, Mapping[int, int]]) -> None:
        """Raises RuntimeError if the views (rank -> seq -> blocks) don't know of it, or it should be over."""
        open_ranks = [rank for rank in self.blocks if rank not in self.granted]
        for rank in open_ranks:
            if outstanding[rank].get(self.seq) != self.blocks[rank]:
                raise RuntimeError(f"reservation {self.seq}: the view of instance {rank} knows nothing of it")
        if not open_ranks:
            raise RuntimeError(f"reservation {self.seq} is granted and still open")
        is_right = self.request.is_running if self.placement is None else self.request.state == "reserving"
        if not is_right:
            raise RuntimeError(f"reservation {self.seq} is of a request that is {self.request.state}")


class Reservations:
    """Of one cell, through all its epochs. Pure: what is to be done is emitted."""

    def __init__(self, cell: Cell, running: Running, homes: Homes, emit: Emit) -> None:
        self.open: Reservation | None = None
        """The one that instances have yet to answer."""
        self._cell = cell
        self._running = running
        self._homes = homes
        self._emit = emit

    def of(self, seq: int) -> Reservation | None:
        """The open one, if it is this sequence's."""
        return self.open if self.open is not None and self.open.seq == seq else None

    @property
    def admitted(self) -> Request | None:
        """Whom the open one is to admit; None: nobody."""
        return None if self.open is None or self.open.placement is None else self.open.request

    def begin(self, reservation: Reservation) -> None:
        """Ask the instances."""
        self.open = reservation
        for rank, blocks in reservation.blocks.items():
            member = self._cell.members[rank]
            member.outstanding[reservation.seq] = blocks
            self._emit(Send(member.peer, self._asking(reservation, rank)))

    def _asking(self, reservation: Reservation, rank: int) -> Reserve | ReserveNext:
        """What an instance is asked for."""
        if reservation.placement is None:
            return ReserveNext(epoch=self._cell.epoch, seq=reservation.seq)
        blocks = self._cell.taken(reservation.placement.blocks.get(rank, 0))
        reserve = Reserve(epoch=self._cell.epoch, seq=reservation.seq, blocks=blocks)
        reuse = reservation.reuse
        if reuse is None or rank not in reuse.parts:
            return reserve
        row = first_gap(reuse.parts) if self._cell.spec.windows else 0
        return replace(reserve, source=reuse.source, shared=[list(run) for run in reuse.parts[rank]], row=row)

    def grant(self, reservation: Reservation, rank: int, blocks: int) -> bool:
        """An instance gives so many. Whether that was the last answer: then it is open no more."""
        reservation.granted[rank] = blocks
        if len(reservation.granted) < len(reservation.blocks):
            return False
        self.open = None
        return True

    def give_up(self) -> None:
        """Give back what was granted, and what will be: a Drop that follows a Reserve undoes it."""
        reservation, self.open = self.open, None
        if reservation is None:
            raise RuntimeError("there is no reservation to give up")
        sequence = self._running.get(reservation.seq) if reservation.placement is None else None
        if sequence is not None:
            self._homes.rest(sequence)
        for rank in reservation.blocks:
            member = self._cell.members[rank]
            asked = reservation.seq in member.outstanding
            # On a participant a Drop would take the blocks that its share needs: it gets one once all is released.
            if (asked or rank in reservation.granted) and not (sequence and rank in sequence.participants):
                self._emit(Send(member.peer, Drop(epoch=self._cell.epoch, seq=reservation.seq)))
                if not asked:
                    member.hear_free(member.free_blocks + reservation.granted[rank])

    def suspend(self) -> None:
        """The epoch is over: nobody will answer."""
        self.open = None

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other."""
        if self.open is not None:
            self.open.validate({member.rank: member.outstanding for member in self._cell.members})
