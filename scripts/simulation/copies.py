"""Copies of KV from one instance to another, as `distattn.transfer` paces them, without the KV.

Each block waits for the target's budget, a word to the source, the source's budget, and a word back; then it passes. Who steps
brings the budgets (`StepBudget`, the real one): so many tokens for each step, all at once while an instance is idle.
"""

from collections.abc import Callable
from dataclasses import dataclass

from distattn.budget import PATIENCE_S, StepBudget
from gmanager.wire import messages as m
from simulation.clock import Act, Clock
from simulation.times import Profile

PASSED_TOKEN_S = 1e-6
"""Seconds in which a token's KV passes once both ends are ready: 128 KB at 130 GB/s."""


@dataclass(slots=True)
class _End:
    """One instance's end: the gManager sees to it that it has a part in one copy at a time."""

    budget: StepBudget
    waiting: Act | None = None
    """What is done once its budget allows another block."""


class Copies:
    """Those of one cell."""

    def __init__(self, clock: Clock, profile: Profile) -> None:
        self.follows_s: list[float] = []
        """Of each run that was copied from what was its home: from when the home moved until the KV had followed."""
        self._clock = clock
        self._profile = profile
        self._ends: dict[int, _End] = {}
        self._left_s: dict[tuple[int, int], float] = {}
        """(sequence, rank) -> when it ceased to be the home."""

    def enter(self, rank: int) -> None:
        """An instance takes part."""
        profile = self._profile
        self._ends[rank] = _End(StepBudget(profile.copy_tokens, profile.decode_steps))

    def tell(self, rank: int, steps: int, *, is_busy: bool) -> None:
        """As `StepBudget.tell`, of an instance."""
        end = self._ends[rank]
        end.budget.tell(steps, is_busy=is_busy)
        if end.waiting is not None and end.budget.try_take(self._profile.block_size):
            self._go_on(end)

    def note_left(self, seq: int, rank: int) -> None:
        """Its home moves away from an instance."""
        self._left_s[seq, rank] = self._clock.now

    def begin(self, asked: m.CopyRun, on_copied: Callable[[float], None]) -> None:
        """Copy a run; `on_copied` is called with the seconds that it took."""
        began = self._clock.now
        link_s, size = self._profile.link_s, self._profile.block_size
        pass_s = PASSED_TOKEN_S * size * self._profile.decode_steps
        source, target = self._ends[asked.source], self._ends[asked.target]
        left = -(-sum(end - start for start, end in asked.ranges) // size)

        def be_ready() -> None:
            if left:
                self._take(target, lambda: self._clock.after(link_s, hear_ready))
                return
            moved_s = self._left_s.get((asked.seq, asked.source))
            if moved_s is not None:
                self.follows_s.append(self._clock.now - moved_s)
            on_copied(self._clock.now - began)

        def hear_ready() -> None:
            self._take(source, lambda: self._clock.after(link_s + pass_s, have_passed))

        def have_passed() -> None:
            nonlocal left
            left -= 1
            be_ready()

        be_ready()

    def _take(self, end: _End, then: Act) -> None:
        """Do something once the budget allows a block, after `PATIENCE_S` in any case."""
        size = self._profile.block_size
        if end.budget.try_take(size):
            then()
            return
        end.waiting = then

        def lose_patience() -> None:
            if end.waiting is then:
                end.budget.try_take(size, is_patient=False)
                self._go_on(end)

        self._clock.after(PATIENCE_S, lose_patience)

    @staticmethod
    def _go_on(end: _End) -> None:
        then, end.waiting = end.waiting, None
        if then is not None:
            then()
