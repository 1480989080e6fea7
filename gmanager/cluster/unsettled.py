"""Sequences that decode and that a policy may want to move: those of which something is new, until it wants nothing more.

first token ─┐
new home     ├─> news ─┐
a run moved ─┘         ├─improve──> a relocation, after which it is unsettled again
a second ────> again ──┘      └───> settled: nothing is gained, until something changes
"""

from collections.abc import Callable, Iterable

from gmanager.cluster.cell import Cell
from gmanager.cluster.moves import Moves
from gmanager.cluster.policies import Outlook, Relocation, SequenceView
from gmanager.cluster.sequence import Sequence

MAX_ASKED = 64
"""Sequences that a policy is asked about at once: a decision takes milliseconds in a large cell. The others have their turn
when something has changed, or a second has passed."""


class Unsettled:
    """Those of one cell's epoch."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._news: dict[int, Sequence] = {}
        """Those of which something is new."""
        self._again: dict[int, Sequence] = {}
        """Those of which nothing is, but time has passed; who has waited longest first."""
        self._wait: dict[int, Sequence] = {}
        """Those that may want to be copied, once what is under way is."""
        self._num_ended = 0
        """Moves that had ended when these were last asked about."""

    def __len__(self) -> int:
        return len(self._news) + len(self._again)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Something of these is new."""
        self._news |= self._ours(sequences)

    def look_again(self, sequences: Iterable[Sequence]) -> None:
        """Time has passed."""
        self._again |= self._ours(sequences)

    def _ours(self, sequences: Iterable[Sequence]) -> dict[int, Sequence]:
        """Those that a policy may move: who asked for a number of instances has it."""
        if not self._cell.policy.relocates:
            return {}
        return {sequence.number: sequence for sequence in sequences if sequence.request.spread == "auto"}

    def clear(self) -> None:
        """The epoch is over."""
        self._news.clear()
        self._again.clear()
        self._wait.clear()
        self._num_ended = 0

    def ask(self, moves: Moves, outlook: Callable[[], Outlook]) -> tuple[Sequence, Relocation] | None:
        """What is best moved now, of those that decode and have waited longest; what is not is settled."""
        if moves.num_ended != self._num_ended:
            self._num_ended = moves.num_ended
            self._again |= self._wait
            self._wait.clear()
        asked: list[Sequence] = []
        while len(asked) < MAX_ASKED and len(self):
            sequence = next(iter((self._news or self._again).values()))
            self._forget(sequence)
            if sequence.is_current and sequence.received and not sequence.ending:
                asked.append(sequence)
        asked.sort(key=lambda sequence: sequence.request.number)
        views = [view_of(sequence, moves) for sequence in asked]
        relocation = self._cell.policy.improve(views, outlook()) if views else None
        if relocation is not None:
            self.add(asked)
            return next((s, relocation) for s in asked if s.number == relocation.seq)
        if not moves.is_idle:
            self._wait |= {sequence.number: sequence for sequence in asked}
        return None

    def _forget(self, sequence: Sequence) -> None:
        self._news.pop(sequence.number, None)
        self._again.pop(sequence.number, None)


def view_of(sequence: Sequence, moves: Moves) -> SequenceView:
    """What a policy sees of it."""
    request = sequence.request
    is_free = sequence.is_written and sequence.moving_to is None and not moves.concerns(sequence)
    home_is_free = not moves.takes_part(sequence.home)
    return SequenceView(
        seq=sequence.number,
        home=sequence.home,
        held={rank: tokens for rank, tokens in sequence.held.items() if tokens},
        left=sequence.left,
        growth=sequence.growth,
        can_move=is_free and request.move_call is None,
        copyable=[rank for rank in sequence.participants if home_is_free and moves.can_begin(sequence, rank)],
    )
