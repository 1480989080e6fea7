"""What happens next: acts at moments, those of the same moment in the order in which they were said."""

import heapq
from collections.abc import Callable

Act = Callable[[], None]


class Clock:
    """Time stands still while an act is done."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the start."""
        self.num_acts = 0
        """That were done."""
        self._acts: list[tuple[float, int, Act]] = []
        self._said = 0

    def at(self, when: float, act: Act) -> None:
        """Do something at a moment. Raises ValueError if that is over."""
        if when < self.now:
            raise ValueError(f"it is {self.now:.9f} s, and something is to happen at {when:.9f} s")
        self._said += 1
        heapq.heappush(self._acts, (when, self._said, act))

    def after(self, seconds: float, act: Act) -> None:
        """Do something so much later."""
        self.at(self.now + seconds, act)

    def step(self) -> None:
        """Do what comes next. Raises IndexError if there is nothing."""
        self.now, _, act = heapq.heappop(self._acts)
        self.num_acts += 1
        act()
