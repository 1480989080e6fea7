"""Tokens of one sequence that lie one after the other in blocks of this instance: pure integers, no tensors.

A *run* packs its tokens into blocks of its own in ascending position, whichever positions
they are:

    positions   0 .. 4        12 .. 17            (tokens [5, 12) lie on other instances)
    ranges     [0, 5)        [12, 18)
    blocks     | 0 1 2 3 | 4 12 13 14 | 15 16 17 . |      block_size 4: 11 tokens, 1 more fits

So the tokens of a run that a row at position p may see are a *prefix* of it, and one number per row and run says which
(in layers with windows or chunks a slice, and two). A position range is no run of its own: a prompt prefilled with others
leaves hundreds of ranges on an instance, which would each waste part of a block, and weigh in every notice. A run wastes less
than one block, and a shard has a second one only where tokens came out of order:

    runs   [0, 18): 0 .. 4, 12 .. 17        [5, 9): 5 .. 8       tokens [5, 9) came when 17 was here

Which run tokens continue follows from where the runs end alone (`continued`), so all that know this derive the same.

Where some layers see but a window or a chunk (`kvstore.sight`), their KV lies in blocks of its own: a run has a *table* of
blocks for the layers that see all, and others for the rest, from which the first blocks go when no later row sees them:

    table 0   | 0 1 2 3 | 4 5 6 7 | 8 9 . . |
    table 1   .         | 4 5 6 7 | 8 9 . . |      a window of 4 tokens, the next row is at 10

All blocks are of one pool, and which table a reserved one is for is open until it is taken.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from kvstore.anchor import Window, sees_whole_from
from kvstore.sight import Sight


def continued(ends: Sequence[int], start: int) -> int | None:
    """Which of the runs that end there a token at `start` goes on with: the last to end at or before it. None: a new one.

    So no more runs come to be than must (patience sorting).
    """
    best: int | None = None
    last = -1
    for i, end in enumerate(ends):
        if last < end <= start:
            best, last = i, end
    return best


class Run:
    """Tokens that lie in ascending position: token i is at `block_ids[i // block_size]`, offset `i % block_size`.

    `[start, end)` holds the positions of all of them, not every position in it is one of theirs.
    """

    def __init__(self, block_size: int, num_windows: int = 0) -> None:
        self.block_size = block_size
        self.block_ids: list[int] = []
        self.windows = [Window() for _ in range(num_windows)]
        self.num_tokens = 0
        # [start, end) are positions whose KV is written here (or will be, by a step that was accepted)
        self.ranges: list[tuple[int, int]] = []
        self._before: list[int] = []
        """For each range: tokens of the ranges before it."""

    @property
    def start(self) -> int:
        """Position of the first token. Raises IndexError if there is none."""
        return self.ranges[0][0]

    @property
    def end(self) -> int:
        """One more than the position of the last token. Raises IndexError if there is none."""
        return self.ranges[-1][1]

    @property
    def all_blocks(self) -> list[int]:
        """Those of all tables."""
        return self.block_ids + [block for window in self.windows for block in window.block_ids]

    def blocks_for(self, count: int) -> int:
        """How many more blocks so many more tokens take, in all tables."""
        stop = -(-(self.num_tokens + count) // self.block_size)
        blocks = stop - len(self.block_ids)
        for window in self.windows:
            blocks += stop - window.stop
        return blocks

    def take(self, count: int, spare: list[int]) -> None:
        """Move those blocks here from others that are enough. The first table has the first of them, so that its blocks
        are consecutive."""
        stop = -(-(self.num_tokens + count) // self.block_size)
        blocks = stop - len(self.block_ids)
        self.block_ids += spare[:blocks]
        del spare[:blocks]
        for window in self.windows:
            window.block_ids += [spare.pop() for _ in range(stop - window.stop)]

    def table(self, index: int) -> tuple[int, list[int]]:
        """The first block of a table that is here, and the blocks."""
        if not index:
            return 0, self.block_ids
        window = self.windows[index - 1]
        return window.first, window.block_ids

    def slots(self, table: int, count: int) -> list[int]:
        """Of the last `count` tokens in a table."""
        first, block_ids = self.table(table)
        size = self.block_size
        tokens = range(self.num_tokens - count - first * size, self.num_tokens - first * size)
        return [block_ids[i // size] * size + i % size for i in tokens]

    def trim(self, sights: Sequence[Sight], position: int) -> list[int]:
        """Give the blocks of windows away of which rows from `position` on see nothing. A part-filled block stays: more may
        come."""
        given: list[int] = []
        for sight, window in zip(sights, self.windows, strict=True):
            hidden = self.count_before(sight.first(position)) // self.block_size - window.first
            if hidden > 0:
                given += window.block_ids[:hidden]
                del window.block_ids[:hidden]
                window.first += hidden
        return given

    def seen_whole_from(self, sights: Sequence[Sight]) -> int:
        """The first row that sees nothing which was trimmed, nor does any after it."""
        return sees_whole_from(self.ranges, self.windows, sights, self.block_size)

    def append(self, start: int, end: int) -> list[int]:
        """Take positions `[start, end)`, which follow all that it has, into blocks that are there: their slots."""
        if self.ranges and self.ranges[-1][1] == start:
            self.ranges[-1] = (self.ranges[-1][0], end)
        else:
            self.ranges.append((start, end))
            self._before.append(self.num_tokens)
        self.num_tokens += end - start
        return self.slots(0, end - start)

    @classmethod
    def of(
        cls,
        block_size: int,
        ranges: Sequence[tuple[int, int]],
        block_ids: Sequence[int],
        windows: Sequence[Window] = (),
    ) -> "Run":
        """Tokens at these positions, ascending, that were written into these blocks. Raises ValueError if the blocks are too
        few or too many for them."""
        run = cls(block_size)
        run.windows = list(windows)
        tokens = sum(end - start for start, end in ranges)
        if not tokens or -(-tokens // block_size) != len(block_ids):
            raise ValueError(f"{tokens} tokens don't take {len(block_ids)} blocks of {block_size}")
        run.block_ids = list(block_ids)
        for start, end in ranges:
            run.append(start, end)
        return run

    def cut(self, position: int) -> list[int]:
        """Forget the tokens at `position` and after it: the blocks that the others don't take."""
        kept = bisect_left(self.ranges, (position,))
        del self.ranges[kept:], self._before[kept:]
        self.num_tokens = 0
        if self.ranges:
            start, end = self.ranges[-1]
            self.ranges[-1] = (start, min(end, position))
            self.num_tokens = self._before[-1] + self.end - start
        used = -(-self.num_tokens // self.block_size)
        freed = self.block_ids[used:]
        del self.block_ids[used:]
        for window in self.windows:
            kept = max(0, used - window.first)
            freed += window.block_ids[kept:]
            del window.block_ids[kept:]
        return freed

    def count_before(self, position: int) -> int:
        """How many tokens here have a position less than this."""
        last = bisect_left(self.ranges, (position,)) - 1
        return 0 if last < 0 else self._before[last] + min(self.ranges[last][1], position) - self.ranges[last][0]

    def kv_lens(self, start: int, end: int) -> list[int]:
        """For each position p of `[start, end)`: how many tokens here have a position <= p."""
        lens: list[int] = []
        p = start
        for i in range(max(0, bisect_right(self.ranges, (start, start)) - 1), len(self.ranges)):
            a, b = self.ranges[i]
            held = self._before[i]
            if p < a:  # rows before this range see what came before it
                lens += [held] * (min(a, end) - p)
                p = min(a, end)
            if p < min(b, end):  # rows inside see one more each
                lens += range(held + p - a + 1, held + min(b, end) - a + 1)
                p = min(b, end)
            if p == end:
                return lens
        return lens + [self.num_tokens] * (end - p)

    def overlaps(self, start: int, end: int) -> bool:
        """Whether it has a token at one of the positions `[start, end)`."""
        last = bisect_left(self.ranges, (end,)) - 1  # range to begin before `end`
        return last >= 0 and self.ranges[last][1] > start
