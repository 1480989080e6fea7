"""Which tokens a row sees in one group of layers, and so which of them are needed no longer: pure integers."""

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from kvstore.run import Run


class Sight(msgspec.Struct, frozen=True):
    """Which tokens a row sees in one group of layers: those from position `first(p)` up to its own, p. All, unless there is a
    window or a chunk."""

    window: int = 0
    """The row and so many less one before it."""
    chunk: int = 0
    """The row and those before it in the same chunk, which begin at multiples of this."""

    def __post_init__(self) -> None:
        if min(self.window, self.chunk) < 0 or (self.window and self.chunk):
            raise ValueError(
                f"layers have a window or chunks of at least 1 token, got window {self.window}, chunk {self.chunk}"
            )

    @property
    def span(self) -> int:
        """Most tokens that a row sees; 0: there is no bound."""
        return self.window or self.chunk

    def first(self, position: int) -> int:
        """The first position that a row at `position` sees; never falls as that grows."""
        if self.chunk:
            return position - position % self.chunk
        return max(0, position + 1 - self.window) if self.window else 0

    def hidden(self, run: "Run", start: int, stop: int) -> tuple[int, ...]:
        """For each position of `[start, stop)`: how many tokens of the run lie before what a row there sees. Empty: none of
        any."""
        if self.window:
            lens = run.kv_lens(start - self.window, stop - self.window)
        elif self.chunk:
            lens = []
            for first in range(self.first(start), stop, self.chunk):
                before = run.count_before(first)
                lens += [before] * (min(stop, first + self.chunk) - max(start, first))
        else:
            return ()
        return tuple(lens) if lens[-1] else ()

    def sees_from(self, position: int) -> int:
        """The first row that sees nothing before `position`, nor does any after it."""
        if self.chunk:
            return -(-position // self.chunk) * self.chunk
        return position + self.window - 1 if self.window and position else 0


FULL = Sight()
