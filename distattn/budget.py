"""How much KV may be copied beside steps. Without torch: what only adds up time paces its copies by the same."""

import threading

PATIENCE_S = 1.0
"""Longest that a block waits for its budget. Beside a step of a second one block more is nothing, and so whoever waits for a
word knows how long that may honestly take."""


class TransferEnded(Exception):
    """The epoch ended while a copy was under way."""


class StepBudget:
    """How much may be copied beside steps: so many tokens of KV for each step that runs, all at once while none runs; and a
    block each `PATIENCE_S`, however long steps take.

    What steps bring is saved up, but no more than one step of prompts brings and the block that waits takes: beside any steps
    in a row no more is copied than they bring and that. Who copies beside each step loses nothing.

    Shared by the thread that copies (`take`) and the loop that steps (`tell`).
    """

    def __init__(self, tokens_per_step: int, prompt_weight: int = 1) -> None:
        """`prompt_weight`: as how many steps one of prompts counts. Raises ValueError unless both are positive."""
        if min(tokens_per_step, prompt_weight) < 1:
            raise ValueError(f"a budget must be at least 1 token a step, got {tokens_per_step} x {prompt_weight}")
        self.tokens_per_step = tokens_per_step
        self.prompt_weight = prompt_weight
        self._changed = threading.Condition()
        self._left = 0
        self._most = tokens_per_step * prompt_weight
        """What may be saved up."""
        self._steps = 0
        self._is_busy = False
        self._is_over = False

    def tell(self, steps: int, *, is_busy: bool) -> None:
        """So many steps have run by now; `is_busy`: one is running."""
        with self._changed:
            self._left = min(self._most, self._left + (steps - self._steps) * self.tokens_per_step)
            self._steps, self._is_busy = steps, is_busy
            self._changed.notify_all()

    def take(self, tokens: int) -> None:
        """Wait until a block of so many tokens may be copied. Raises TransferEnded after `end`."""
        with self._changed:
            self._most = tokens + self.tokens_per_step * self.prompt_weight
            self._changed.wait_for(lambda: self._is_over or not self._is_busy or self._left >= tokens, PATIENCE_S)
            if self._is_over:
                raise TransferEnded("the epoch ended")
            self._left = max(0, self._left - tokens)

    def try_take(self, tokens: int, *, is_patient: bool = True) -> bool:
        """As `take`, without waiting: whether so many tokens may be copied now. After `end` nothing steps, and they may.

        `is_patient`: False once they have waited for `PATIENCE_S`: they may.
        """
        with self._changed:
            self._most = tokens + self.tokens_per_step * self.prompt_weight
            may = self._is_over or not (self._is_busy and is_patient) or self._left >= tokens
            if may:
                self._left = max(0, self._left - tokens)
            return may

    def end(self) -> None:
        """Let go of who waits."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
