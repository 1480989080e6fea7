"""Block moves in a cell: runs of sequences that leave an instance, since it is drained or for a gain.

    offering ──RunOffered──> reserving ──Granted──> copying ──Copied──> flipping ──RunMoved──> over
        │ nothing is there        │ NotGranted        │ why not             │ Released
        │                         └─ nothing has changed: Drop ─────────────┴──> over
        └──> the instance leaves the sequence's participants

- An instance has a part in one move at a time, so the transfers of two never wait for each other.
- A run is moved only while its sequence decodes elsewhere, and a token has come of its present home: so no step writes to it,
  and all that it holds is written. Its home doesn't move meanwhile.
- Blocks of a copy are reserved as a number of its own: what becomes of the sequence meanwhile is nothing to them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from gmanager.cluster.cell import Cell
from gmanager.cluster.events import Emit, Log, Send
from gmanager.cluster.member import Member
from gmanager.cluster.placement import InstanceView, choose_holder
from gmanager.cluster.sequence import Sequence as SequenceState
from gmanager.wire.messages import Copied, CopyRun, Drop, FlipRun, OfferRun, Reserve, RunMoved, RunOffered

MAX_COPIES = 3
"""Tries to copy a run, until it is left to be computed again."""


class Ground(Protocol):
    """What moves need of the cell's sequences."""

    num_dropped: int
    num_moves_failed: int

    def next_number(self) -> int: ...

    def views(self) -> list[InstanceView]: ...

    def join(self, sequence: SequenceState, rank: int) -> None:
        """An instance takes part from now on."""

    def part(self, sequence: SequenceState, rank: int) -> None:
        """An instance holds nothing of it any more."""


@dataclass(slots=True)
class Move:
    """One run on its way."""

    number: int
    sequence: SequenceState
    source: int
    wanted: int | None
    """Where it is to go; None: wherever there is room."""
    stage: Literal["offering", "reserving", "copying", "flipping"] = "offering"
    target: int = -1
    ranges: list[tuple[int, int]] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    is_vain: bool = False
    """Its sequence is gone."""


class Moves:
    """Those of one epoch. Pure: what is to be done is emitted; methods return whether something has changed."""

    def __init__(self, cell: Cell, ground: Ground, emit: Emit) -> None:
        self._cell = cell
        self._ground = ground
        self._emit = emit
        self._moves: dict[int, Move] = {}
        """Under way, by number."""
        self.num_ended = 0
        self._homeless: set[tuple[int, int]] = set()
        """(sequence, rank) of runs that no instance had room for, until one may have again."""
        self._failures: dict[tuple[int, int], int] = {}
        """The same, and how many copies failed."""

    @property
    def is_idle(self) -> bool:
        return not self._moves

    def concerns(self, sequence: SequenceState) -> bool:
        """Whether a run of it is on its way."""
        return any(move.sequence is sequence for move in self._moves.values())

    def takes_part(self, rank: int) -> bool:
        """Whether an instance has a part in a move."""
        return any(rank in (move.source, move.target, move.wanted) for move in self._moves.values())

    def is_reserving(self, number: int) -> bool:
        """Whether an answer to a Reserve of this number is one to a move."""
        return number in self._moves

    def start(self, in_order: Sequence[SequenceState]) -> None:
        """Begin the next moves away from instances that are drained, if there are any to begin."""
        for sequence in in_order:
            for rank in sequence.participants:
                is_leaving = self._cell.members[rank].is_draining and (sequence.number, rank) not in self._homeless
                if is_leaving and self.can_begin(sequence, rank):
                    self.begin(sequence, rank)

    def can_begin(self, sequence: SequenceState, rank: int) -> bool:
        """Whether a run of a sequence may be copied away from an instance now."""
        failures = self._failures.get((sequence.number, rank), 0)
        is_still = sequence.is_written and sequence.moving_to is None and not sequence.ending
        is_free = not (self.concerns(sequence) or self.takes_part(rank))
        return is_free and is_still and rank != sequence.home and failures < MAX_COPIES

    def begin(self, sequence: SequenceState, source: int, target: int | None = None) -> None:
        """Copy a run of a sequence from an instance to another. `target`: None: to one that has room. Ask `can_begin` first,
        and whether the target has a part in another."""
        number = self._ground.next_number()
        self._moves[number] = Move(number, sequence, source, wanted=target)
        asked = OfferRun(epoch=self._cell.epoch, move=number, seq=sequence.number)
        self._emit(Send(self._cell.members[source].peer, asked))

    def room_came(self) -> None:
        """Blocks are free, or will be."""
        self._homeless.clear()

    def on_offered(self, member: Member, offered: RunOffered) -> bool:
        move = self._expected(offered.move, "offering", member.rank, "source")
        if move is None:
            return False
        sequence = move.sequence
        if move.is_vain or sequence.ending:
            return self._end(move)
        if not offered.ranges:
            self._ground.part(sequence, move.source)
            return self._end(move)
        tokens = sum(end - start for start, end in offered.ranges)
        length = -(-tokens // self._cell.spec.block_size)
        if len(offered.firsts) != len(self._cell.spec.windows) or not all(0 <= first <= length for first in offered.firsts):
            self._ground.num_dropped += 1
            return self._end(move)
        target = move.wanted
        if target is None:
            free = [view for view in self._ground.views() if not self.takes_part(view.rank)]
            target = choose_holder(free, blocks=length, holders=sequence.participants)
        if target is None:
            self._homeless.add((sequence.number, move.source))
            return self._end(move)
        move.stage, move.target, move.ranges, move.firsts = "reserving", target, offered.ranges, offered.firsts
        blocks = length + sum(length - first for first in offered.firsts)
        self._cell.members[target].outstanding[move.number] = blocks
        self._tell(target, Reserve(epoch=self._cell.epoch, seq=move.number, blocks=blocks))
        return False

    def on_granted(self, number: int) -> bool:
        """The answer that `is_reserving` expects."""
        move = self._moves[number]
        if move.is_vain or move.sequence.ending:
            return self._end(move, drop=True)
        move.stage = "copying"
        asked = CopyRun(
            epoch=self._cell.epoch,
            move=move.number,
            seq=move.sequence.number,
            source=move.source,
            target=move.target,
            ranges=move.ranges,
            firsts=move.firsts,
        )
        self._tell(move.source, asked)
        self._tell(move.target, asked)
        return False

    def on_not_granted(self, number: int) -> bool:
        return self._end(self._moves[number])

    def on_copied(self, member: Member, copied: Copied) -> bool:
        move = self._expected(copied.move, "copying", member.rank, "target")
        if move is None:
            return False
        sequence = move.sequence
        if copied.error is not None:
            self._ground.num_moves_failed += 1
            key = sequence.number, move.source
            self._failures[key] = self._failures.get(key, 0) + 1
            fields = {"move": move.number, "sequence": sequence.number, "tries": self._failures[key], "reason": copied.error}
            self._emit(Log(logging.ERROR, "copy of KV failed", fields))
        else:
            self._cell.performance.take_copy(sum(end - start for start, end in move.ranges), copied.us)
        if copied.error is not None or move.is_vain or sequence.ending:
            return self._end(move, drop=True)
        move.stage = "flipping"
        self._ground.join(sequence, move.target)
        told = FlipRun(
            epoch=self._cell.epoch,
            move=move.number,
            seq=sequence.number,
            source=move.source,
            target=move.target,
            start=move.ranges[0][0],
        )
        self._tell(sequence.home, told)
        return False

    def on_moved(self, member: Member, moved: RunMoved) -> bool:
        move = self._expected(moved.move, "flipping", member.rank, "home")
        if move is None:
            return False
        return self._end(move)

    def forget(self, sequence: SequenceState) -> None:
        """It is released: its copy, if there is one, is nobody's."""
        for move in [move for move in self._moves.values() if move.sequence is sequence]:
            move.is_vain = True
            if move.stage == "flipping":
                self._end(move, drop=True)

    def _expected(self, number: int, stage: str, rank: int, who: Literal["source", "target", "home"]) -> Move | None:
        """The move, if that is what it waits for."""
        move = self._moves.get(number)
        if move is not None and move.stage == stage:
            ranks = {"source": move.source, "target": move.target, "home": move.sequence.home}
            if ranks[who] == rank:
                return move
        self._ground.num_dropped += 1
        return None

    def _end(self, move: Move, *, drop: bool = False) -> bool:
        del self._moves[move.number]
        self.num_ended += 1
        if move.target >= 0:
            self._homeless.clear()  # one that had a part in it may have room
        if drop:
            self._tell(move.target, Drop(epoch=self._cell.epoch, seq=move.number))
        return True

    def _tell(self, rank: int, message: Reserve | CopyRun | FlipRun | Drop) -> None:
        self._emit(Send(self._cell.members[rank].peer, message))
