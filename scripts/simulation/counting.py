"""What each member of a party does in a step, counted: `distattn.layout.lay_out` without its lists, once for all members.

It is the same for every member but for what its own runs hold, so who sees what is found once a step; the numbers of tokens
that rows attend to are sums of arithmetic series. `tests/scripts/test_simulate.py` compares it with the real one.
"""

from collections.abc import Mapping, Sequence

from distattn.layout import Holding, Layout, Reading, Span
from kvstore.run import Run
from kvstore.shard import ShardTable
from kvstore.sight import FULL, Sight


class Counting:
    """In place of `lay_out`, for all members of a cell."""

    def __init__(self) -> None:
        self._spans: Sequence[Span] = ()
        self._own_rows: dict[int, int] = {}
        self._seen: dict[int, list[Span]] = {}
        """rank -> spans that see something there, its own among them."""
        self._dispatched: dict[int, dict[int, int]] = {}
        self._received: dict[int, dict[int, int]] = {}

    def __call__(
        self,
        spans: Sequence[Span],
        holdings: Mapping[int, Sequence[Holding]],
        shards: ShardTable,
        rank: int,
        sight: Sight = FULL,
        table: int = 0,
    ) -> Layout:
        """The part of `rank` in a step, with one reading that has all that its rows and others attend to there.

        Raises ValueError for layers in which rows don't see all before them.
        """
        if sight != FULL or table:
            raise ValueError(f"rows that see only {sight} are not counted")
        if spans is not self._spans:
            self._look_through(spans, holdings)
        attended = sum(
            attended_by(run, span.start, span.stop)
            for span in self._seen.get(rank, ())
            for run in shards[span.seq].runs
            if run.start < span.stop
        )
        return Layout(
            num_rows=self._own_rows.get(rank, 0),
            own=[Reading(0, 0, (), (attended,))] if attended else [],
            dispatched_rows=[],
            dispatched=self._dispatched.get(rank, {}),
            received=self._received.get(rank, {}),
            others=[],
        )

    def _look_through(self, spans: Sequence[Span], holdings: Mapping[int, Sequence[Holding]]) -> None:
        self._spans = spans  # kept, so that no other list has its identity
        self._own_rows, self._seen, self._dispatched, self._received = {}, {}, {}, {}
        for span in spans:
            rows, home = span.stop - span.start, span.rank
            self._own_rows[home] = self._own_rows.get(home, 0) + rows
            for holding in holdings[span.seq]:
                if not holding.is_seen(0, span.stop - 1):
                    continue
                self._seen.setdefault(holding.rank, []).append(span)
                if holding.rank != home:
                    sent = self._dispatched.setdefault(home, {})
                    sent[holding.rank] = sent.get(holding.rank, 0) + rows
                    came = self._received.setdefault(holding.rank, {})
                    came[home] = came.get(home, 0) + rows


def attended_by(run: Run, start: int, stop: int) -> int:
    """The sum of `run.kv_lens(start, stop)`: how many tokens of it the rows at these positions see together."""
    total = 0
    for first, end in run.ranges:
        if first >= stop:
            break
        if start >= end - 1:  # every row sees all of it
            total += (stop - start) * (end - first)
            continue
        inside = max(first, start)
        last = min(end, stop)
        total += (last - inside) * (inside - first + 1 + last - first) // 2 + (stop - last) * (end - first)
    return total
