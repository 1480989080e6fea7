"""Where rows may go on that begin as another sequence did, in layers that see but a window or a chunk: pure integers.

Of the blocks of such layers a sequence keeps only what its next rows see. One that begins alike goes on where the two part, and
there sees other blocks. So of the end of each prompt what rows see there is kept, with some tokens before it, as an *anchor*:

    table 0   | 0 1 2 3 | 4 5 6 7 | 8 9 a b | c d . . |     the prompt is 14 tokens, a window sees 4
    anchor              | 4 5 6 7 | 8 9 a b |               whoever parts at 8 or later, up to 12, can go on

A sequence may have others before that: where it parted itself from one that it could not begin with, as others may again, and
where it began with another's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvstore.ranges import Ranges, first_tokens
from kvstore.sight import Sight

NEVER = 2**62
"""More than any position."""


class Window:
    """The blocks of one table behind the first: those of a run from `first` on."""

    __slots__ = ("block_ids", "first")

    def __init__(self, first: int = 0, block_ids: Sequence[int] = ()) -> None:
        self.first = first
        self.block_ids = list(block_ids)

    @property
    def stop(self) -> int:
        return self.first + len(self.block_ids)

    def part(self, first: int, stop: int) -> "Window | None":
        """Blocks `[first, stop)` of the run; None if one of them is gone."""
        if first >= stop:
            return Window(max(0, stop))
        if first < self.first or stop > self.stop:
            return None
        return Window(first, self.block_ids[first - self.first : stop - self.first])


@dataclass(frozen=True, slots=True)
class Anchor:
    """What is kept of one sequence on one instance."""

    windows: Mapping[int, Sequence[Window]]
    """First position of a run -> its blocks in each table behind the first."""
    since: int
    """The first row that sees nothing which is gone, nor does any after it."""
    end: int
    """One more than the last position that it has blocks for, or that lies elsewhere and ends before."""

    def block_ids(self) -> Iterator[int]:
        for windows in self.windows.values():
            for window in windows:
                yield from window.block_ids


def sees_whole_from(ranges: Ranges, windows: Sequence[Window], sights: Sequence[Sight], block_size: int) -> int:
    """The first row that sees nothing of a run that is gone from the tables behind the first, nor does any after it. `ranges`:
    the run's positions."""
    rows = [0]
    tokens = sum(end - start for start, end in ranges)
    for sight, window in zip(sights, windows, strict=True):
        if window.first * block_size > tokens:  # the run was cut before what is left: no token can be put behind it
            rows.append(NEVER)
        elif window.first:
            rows.append(sight.sees_from(first_tokens(ranges, window.first * block_size)[-1][1]))
    return max(rows)
