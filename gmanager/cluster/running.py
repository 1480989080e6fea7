"""The sequences that run in a cell's epoch: who takes part in each, and what instances look like with them."""

from bisect import insort
from collections.abc import Collection

from gmanager.cluster.cell import Cell
from gmanager.cluster.events import Emit, Send
from gmanager.cluster.parties import Parties
from gmanager.cluster.policy import InstanceView
from gmanager.cluster.sequence import Sequence
from gmanager.wire.messages import Drop


class Running:
    """Those of one epoch after the other. Pure: what is to be done is emitted."""

    def __init__(self, cell: Cell, emit: Emit) -> None:
        self.num_dropped = 0
        """Messages that meant nothing here."""
        self._cell = cell
        self._emit = emit
        self._numbers = 0
        self._sequences: dict[int, Sequence] = {}
        self._parties = Parties(cell.epoch, cell.size)

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, number: int) -> Sequence:
        return self._sequences[number]

    def get(self, number: int) -> Sequence | None:
        return self._sequences.get(number)

    def all(self) -> Collection[Sequence]:
        """In order of admission."""
        return self._sequences.values()

    def in_order(self) -> list[Sequence]:
        """By priority, then age of their requests: in which they get blocks."""
        return sorted(self._sequences.values(), key=lambda sequence: (sequence.request.priority, sequence.request.number))

    # --- numbers ------------------------------------------------------------------------------------------------------

    def next_number(self) -> int:
        """Of a sequence or a move: no two have the same, in all epochs."""
        self._numbers += 1
        return self._numbers

    def pass_number(self, number: int) -> None:
        """It was given by another gManager."""
        self._numbers = max(self._numbers, number)

    # --- who takes part -----------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """It is about to run."""
        self._sequences[sequence.number] = sequence

    def remove(self, sequence: Sequence) -> None:
        """It is released everywhere; who was asked for a block and may know nothing of that gives it back."""
        del self._sequences[sequence.number]
        for rank in sequence.participants:
            if rank != sequence.home:
                self._cell.members[rank].is_freeing = True
        for rank in sequence.asked:
            self._drop(sequence, rank)
        self.regroup()

    def clear(self) -> None:
        """The epoch is over, or the next one begins."""
        self._sequences.clear()
        self._parties = Parties(self._cell.epoch, self._cell.size)

    def join(self, sequence: Sequence, rank: int) -> None:
        """An instance takes part in a sequence from now on."""
        if rank not in sequence.participants:
            insort(sequence.participants, rank)
            self.regroup()

    def part(self, sequence: Sequence, rank: int) -> None:
        """An instance holds nothing of a sequence any more: what it has reserved for it goes, too."""
        member = self._cell.members[rank]
        sequence.participants.remove(rank)
        sequence.held.pop(rank, None)
        if sequence.is_current:
            sequence.request.held.pop(member.id, None)
        member.is_freeing = True
        self._drop(sequence, rank)
        self.regroup()

    def regroup(self) -> None:
        """Tell instances whose party changes."""
        news = self._parties.regroup(sequence.participants for sequence in self._sequences.values())
        if news is not None:
            ranks, regroup = news
            for rank in ranks:
                self._emit(Send(self._cell.members[rank].peer, regroup))

    def _drop(self, sequence: Sequence, rank: int) -> None:
        self._emit(Send(self._cell.members[rank].peer, Drop(epoch=self._cell.epoch, seq=sequence.number)))

    # --- for others to see --------------------------------------------------------------------------------------------

    @property
    def num_current(self) -> int:
        """Requests that run."""
        return sum(sequence.is_current for sequence in self._sequences.values())

    @property
    def blocks_come(self) -> bool:
        """Whether more blocks are about to be free than is known."""
        freeing = any(member.is_freeing for member in self._cell.members)
        return freeing or any(sequence.ending for sequence in self._sequences.values())

    @property
    def lacks_blocks(self) -> bool:
        """Whether one waits for a block."""
        return any(sequence.needs_block and not sequence.ending for sequence in self._sequences.values())

    def homes(self) -> list[int]:
        """Per rank: sequences whose home it is, or is about to be."""
        homes = [0] * self._cell.size
        for sequence in self._sequences.values():
            homes[sequence.home if sequence.moving_to is None else sequence.moving_to] += 1
        return homes

    def views(self) -> list[InstanceView]:
        """What placement sees of each instance."""
        homes, backlogs = self.homes(), [0.0] * self._cell.size
        for sequence in self._sequences.values():
            for rank, work in sequence.backlog(self._cell.spec.reach).items():
                backlogs[rank] += work
        return [
            InstanceView(
                rank=m.rank,
                free_blocks=0 if m.is_draining else m.free,
                total_blocks=0 if m.is_draining else m.spec.num_blocks,
                homes=homes[m.rank],
                max_homes=0 if m.is_draining else m.spec.decode_rows,
                backlog=backlogs[m.rank],
            )
            for m in self._cell.members
        ]

    def lent_and_borrowed(self) -> tuple[list[int], list[int]]:
        """Per rank: tokens it holds for other homes, and tokens that others hold for its sequences."""
        lent, borrowed = [0] * self._cell.size, [0] * self._cell.size
        for sequence in self._sequences.values():
            for rank, tokens in sequence.held.items():
                if rank != sequence.home:
                    lent[rank] += tokens
                    borrowed[sequence.home] += tokens
        return lent, borrowed

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other."""
        self._parties.validate(sequence.participants for sequence in self._sequences.values())
        for sequence in self._sequences.values():
            sequence.validate()
