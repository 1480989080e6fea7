"""Sequences that decode and that a policy may want to move: those of which something is new, until it wants nothing more.

first token ─┐
new home     ├─> unsettled ──improve──> a relocation, after which it is unsettled again
a run moved ─┘                    └───> settled: nothing is gained, until something changes
"""

from collections.abc import Callable, Iterable
from itertools import islice

from gmanager.cluster.cell import Cell
from gmanager.cluster.moves import Moves
from gmanager.cluster.policies import Outlook, Relocation, SequenceView
from gmanager.cluster.sequence import Sequence

MAX_ASKED = 64
"""Sequences that a policy is asked about at once, the oldest: a decision takes milliseconds in a large cell."""


class Unsettled:
    """Those of one cell's epoch."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._sequences: dict[int, Sequence] = {}
        self._wait: dict[int, Sequence] = {}
        """Those that may want to be copied, once what is under way is."""
        self._num_ended = 0
        """Moves that had ended when these were last asked about."""

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Something of these is new."""
        if self._cell.policy.relocates:
            # who asked for a number of instances has it
            ours = (sequence for sequence in sequences if sequence.request.spread == "auto")
            self._sequences |= {sequence.number: sequence for sequence in ours}

    def clear(self) -> None:
        """The epoch is over."""
        self._sequences.clear()
        self._wait.clear()
        self._num_ended = 0

    def ask(self, moves: Moves, outlook: Callable[[], Outlook]) -> tuple[Sequence, Relocation] | None:
        """What is best moved now, of the oldest; what is not is settled."""
        if moves.num_ended != self._num_ended:
            self._num_ended = moves.num_ended
            self._sequences |= self._wait
            self._wait.clear()
        while self._sequences:
            oldest = sorted(self._sequences.values(), key=lambda sequence: sequence.request.number)
            asked = list(islice(oldest, MAX_ASKED))
            decode = (s for s in asked if s.is_current and s.received and not s.ending)
            views = [view_of(sequence, moves) for sequence in decode]
            relocation = self._cell.policy.improve(views, outlook()) if views else None
            if relocation is not None:
                return self._sequences[relocation.seq], relocation
            for sequence in asked:
                del self._sequences[sequence.number]
                if not moves.is_idle and sequence.is_current:
                    self._wait[sequence.number] = sequence
        return None


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
