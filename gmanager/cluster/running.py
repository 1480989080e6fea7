"""The sequences that run in a cell's epoch: who takes part in each, and what instances look like with them.

What a placement looks at costs as much as has changed since the last, not as much as runs: each sequence's part of its
instances' loads is remembered, and counted anew only when something of it has changed (`touch`).
"""

from bisect import insort
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from gmanager.cluster.cell import Cell
from gmanager.cluster.events import Emit, Send
from gmanager.cluster.member import Member
from gmanager.cluster.parties import Parties
from gmanager.cluster.placement import InstanceView
from gmanager.cluster.sequence import Sequence
from gmanager.wire.messages import Drop


@dataclass(frozen=True, slots=True)
class _Load:
    """What one sequence is to its instances."""

    home: int
    """Where it decodes, or is about to."""
    backlog: Mapping[int, int]
    """rank -> what is left to compute of its prompt."""
    decodes_over: Mapping[int, int] | None
    """rank -> tokens there that each of its rows attends to; None while its prompt runs."""
    is_ending: bool
    lacks_block: bool
    coming: int
    """Tokens of KV that its home will soon have of it, beyond what it has."""


def in_order(sequences: Iterable[Sequence]) -> list[Sequence]:
    """By priority, then age of their requests: in which they get blocks."""
    return sorted(sequences, key=lambda sequence: (sequence.request.priority, sequence.request.number))


@dataclass(frozen=True, slots=True)
class _Decodes:
    """What the sequences that decode are to each instance, by rank; as `InstanceView` has it."""

    rows: list[int]
    held: list[int]
    sent: list[int]
    served: list[int]

    @classmethod
    def of(cls, size: int) -> "_Decodes":
        return cls([0] * size, [0] * size, [0] * size, [0] * size)

    def add(self, home: int, over: Mapping[int, int], sign: int) -> None:
        """A sequence at this home, whose rows attend to so many tokens at each rank."""
        self.rows[home] += sign
        for rank, tokens in over.items():
            self.held[rank] += sign * tokens
            if rank != home:
                self.sent[home] += sign
                self.served[rank] += sign


class Running:
    """Those of one epoch after the other. Pure: what is to be done is emitted."""

    def __init__(self, cell: Cell, emit: Emit) -> None:
        self.num_dropped = 0
        """Messages that meant nothing here."""
        self.num_moves_failed = 0
        self._cell = cell
        self._emit = emit
        self._numbers = 0
        self._sequences: dict[int, Sequence] = {}
        self._parties = Parties(cell.epoch, cell.size, cell.helpers)
        self._shared: dict[int, Sequence] = {}
        """Those with more than one participant, which make parties."""
        self._loads: dict[int, _Load] = {}
        self._touched: dict[int, None] = {}
        """Those whose load may be another than `_loads` has."""
        self._homes = [0] * cell.size
        self._coming = [0] * cell.size
        self._backlogs = [0] * cell.size
        self._decodes = _Decodes.of(cell.size)
        self._prefilling: list[dict[int, _Load]] = [{} for _ in range(cell.size)]
        """By rank: those with something of their prompt to compute there, by number."""
        self._views: list[InstanceView] = []
        self._seen: list[tuple[Member, int, bool, tuple[int, ...]]] = []
        """Of each: what it was made of, beside what a member is for good."""
        self._num_ending = 0
        self._num_lacking = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, number: int) -> Sequence:
        return self._sequences[number]

    def get(self, number: int) -> Sequence | None:
        return self._sequences.get(number)

    def all(self) -> Collection[Sequence]:
        """In order of admission."""
        return self._sequences.values()

    @property
    def shared(self) -> Collection[Sequence]:
        """Those that lie on several instances."""
        return self._shared.values()

    def in_order(self) -> list[Sequence]:
        """By priority, then age of their requests: in which they get blocks."""
        return in_order(self._sequences.values())

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
        self.touch(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It is released everywhere; who was asked for a block and may know nothing of that gives it back."""
        del self._sequences[sequence.number]
        self.touch(sequence)
        for rank in sequence.participants:
            if rank != sequence.home:
                self._cell.members[rank].is_freeing = True
        for rank in sequence.asked:
            self._drop(sequence, rank)
        if self._shared.pop(sequence.number, None) is not None:
            self._regroup()

    def clear(self) -> None:
        """The epoch is over, or the next one begins."""
        self._sequences.clear()
        self._shared.clear()
        self._loads.clear()
        self._touched.clear()
        self._homes, self._backlogs = [0] * self._cell.size, [0] * self._cell.size
        self._coming = [0] * self._cell.size
        self._decodes = _Decodes.of(self._cell.size)
        self._prefilling = [{} for _ in range(self._cell.size)]
        self._views, self._seen = [], []
        self._num_ending = self._num_lacking = 0
        self._parties = Parties(self._cell.epoch, self._cell.size, self._cell.helpers)

    def join(self, sequence: Sequence, rank: int) -> None:
        """An instance takes part in a sequence from now on."""
        if rank not in sequence.participants:
            insort(sequence.participants, rank)
            self.regroup(sequence)

    def part(self, sequence: Sequence, rank: int) -> None:
        """An instance holds nothing of a sequence any more: what it has reserved for it goes, too."""
        member = self._cell.members[rank]
        sequence.participants.remove(rank)
        sequence.held.pop(rank, None)
        if sequence.is_current:
            sequence.request.held.pop(member.id, None)
        member.is_freeing = True
        self._drop(sequence, rank)
        self.touch(sequence)
        self.regroup(sequence)

    def regroup(self, sequence: Sequence) -> None:
        """Its participants are others: tell instances whose party changes."""
        before = self._shared.pop(sequence.number, None)
        if len(sequence.participants) > 1:
            self._shared[sequence.number] = sequence
        if before is not None or not self._parties.hold(sequence.participants):
            self._regroup()

    def _regroup(self) -> None:
        news = self._parties.regroup(sequence.participants for sequence in self._shared.values())
        if news is not None:
            ranks, regroup = news
            for rank in ranks:
                self._emit(Send(self._cell.members[rank].peer, regroup))

    def _drop(self, sequence: Sequence, rank: int) -> None:
        self._emit(Send(self._cell.members[rank].peer, Drop(epoch=self._cell.epoch, seq=sequence.number)))

    # --- for others to see --------------------------------------------------------------------------------------------

    @property
    def blocks_come(self) -> bool:
        """Whether more blocks are about to be free than is known."""
        self._count()
        return self._num_ending > 0 or any(member.is_freeing for member in self._cell.members)

    @property
    def lacks_blocks(self) -> bool:
        """Whether one waits for a block."""
        self._count()
        return self._num_lacking > 0

    def homes(self, rank: int) -> int:
        """Sequences whose home an instance is, or is about to be."""
        self._count()
        return self._homes[rank]

    def views(self) -> list[InstanceView]:
        """What placement sees of each instance: made anew of those of which something has changed."""
        self._count()
        members, decodes = self._cell.members, self._decodes
        sums = decodes.rows, decodes.held, decodes.sent, decodes.served
        loads = list(zip(self._homes, self._backlogs, self._coming, *sums, strict=True))
        seen = [(m, m.free, m.is_draining, loads[m.rank]) for m in members]
        if len(self._seen) != len(seen):
            self._views, self._seen = list(map(self._view_of, members)), seen
        else:
            for place, (now, before) in enumerate(zip(seen, self._seen, strict=True)):
                if now != before:
                    self._views[place] = self._view_of(members[place])
            self._seen = seen
        return list(self._views)

    def _view_of(self, member: Member) -> InstanceView:
        rank = member.rank
        return InstanceView(
            rank=rank,
            free_blocks=0 if member.is_draining else member.room,
            total_blocks=0 if member.is_draining else member.size,
            homes=self._homes[rank],
            max_homes=0 if member.is_draining else member.spec.decode_rows,
            backlog=self._backlogs[rank],
            role=member.register.role,
            rows=self._decodes.rows[rank],
            held=self._decodes.held[rank],
            sent=self._decodes.sent[rank],
            served=self._decodes.served[rank],
            coming=self._coming[rank],
        )

    def backlogs(self, at: Iterable[int], *, but: Sequence | None = None) -> list[Mapping[int, int]]:
        """Of each prompt that runs `at` one of these ranks, `but` that one: rank -> what is left to compute there.

        Takes as long as there are prompts at these ranks, not as many as run.
        """
        self._count()
        loads = {number: load for rank in at for number, load in self._prefilling[rank].items()}
        return [load.backlog for number, load in loads.items() if but is None or number != but.number]

    def touch(self, sequence: Sequence) -> None:
        """Something has changed that its load depends on: where it is at home, what is held of its prompt, how far it is."""
        self._touched[sequence.number] = None

    def _count(self) -> None:
        """Bring the sums up to date."""
        for number in self._touched:
            if (old := self._loads.pop(number, None)) is not None:
                self._add(old, -1)
                for rank in old.backlog:
                    del self._prefilling[rank][number]
            if (sequence := self._sequences.get(number)) is not None:
                new = self._loads[number] = self._load_of(sequence)
                self._add(new, 1)
                for rank in new.backlog:
                    self._prefilling[rank][number] = new
        self._touched.clear()

    def _add(self, load: _Load, sign: int) -> None:
        self._homes[load.home] += sign
        self._coming[load.home] += sign * load.coming
        self._num_ending += sign * load.is_ending
        self._num_lacking += sign * load.lacks_block
        for rank, work in load.backlog.items():
            self._backlogs[rank] += sign * work
        if load.decodes_over is not None:
            self._decodes.add(load.home, load.decodes_over, sign)

    def _load_of(self, sequence: Sequence) -> _Load:
        return _Load(
            home=sequence.next_home,
            backlog=sequence.backlog(self._cell.spec.reach),
            decodes_over=sequence.decodes_over(),
            is_ending=sequence.ending,
            lacks_block=sequence.needs_block and not sequence.ending,
            coming=sequence.coming(),
        )

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
        self._count()
        for sequence in self._sequences.values():
            sequence.validate()
            if self._loads[sequence.number] != self._load_of(sequence):
                raise RuntimeError(f"sequence {sequence.number} is {self._load_of(sequence)}: {self._loads[sequence.number]}")
        if len(self._loads) > len(self._sequences) or sum(self._homes) != len(self._sequences):
            raise RuntimeError(f"{len(self._sequences)} sequences run, counted are {self._homes}")
        if self.views() != list(map(self._view_of, self._cell.members)):
            raise RuntimeError(f"of instances is seen {self.views()}, made of {self._seen}")
        prompts = [(rank, number) for number, load in self._loads.items() for rank in load.backlog]
        found = [(rank, number) for rank, at_rank in enumerate(self._prefilling) for number in at_rank]
        if sorted(prompts) != sorted(found):
            raise RuntimeError(f"prompts run at {prompts}, found are {found}")
