"""Which rows of a step go where: pure integers, derived alike on every member of a party.

For one instance and step:

    own rows          span a | span b | span c        computed here, in the step's order
    dispatched rows   b c (to rank 1) | a c (to rank 2)         to every holder of a sequence that a span can see
    received rows     from rank 1 | from rank 2                 rows of others that see KV held here

Sender and receiver walk the same spans in the same order, so no lengths travel. A row goes to a holder once, however many runs
(`kvstore.run`) it sees there: the holder merges what it reads of each. That a row sees something of a run follows from the
run's first position and its last, which everybody knows; how much of it, only the holder needs to know.

A model's layers fall into *groups* by what a row sees there (`Sight`), and each group has a layout of its own: a holder of
which no row sees anything in the layers of a window is sent none of theirs.
"""

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from kvstore.run import Run, continued
from kvstore.shard import ShardTable
from kvstore.sight import FULL, Sight


class Span(msgspec.Struct, frozen=True):
    """Rows of one sequence, positions `[start, stop)`, computed on one instance in one step."""

    seq: int
    rank: int
    start: int
    stop: int


class HeldRun(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """What is told of a run: it has so many tokens in `[start, end)`, the first and the last of these positions among them.

    Not which: that would be hundreds of ranges after a long prompt, in every notice.
    """

    start: int
    end: int
    tokens: int


class Holding(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one instance holds of a sequence: runs, in the order in which they were opened; one at least."""

    rank: int
    runs: list[HeldRun]

    @property
    def tokens(self) -> int:
        return sum(run.tokens for run in self.runs)

    def is_seen(self, first: int, last: int) -> bool:
        """Whether rows at positions up to `last` that see tokens from `first` on may see any of it: what a run has between its
        ends only its holder knows."""
        for run in self.runs:  # noqa: SIM110  # there may be thousands of rows in a step
            if run.start <= last and run.end > first:
                return True
        return False


def held_after(holdings: Sequence[Holding], spans: Sequence[Span]) -> list[Holding]:
    """Holdings after the spans have written their KV, by rank. Each instance's `Shard.append` comes to the same."""
    if len(spans) == 1:  # a row that decodes; there may be thousands of them in a step
        (span,) = spans
        for i, holding in enumerate(holdings):
            if holding.rank == span.rank and len(holding.runs) == 1 and (run := holding.runs[0]).end <= span.start:
                grown = HeldRun(run.start, span.stop, run.tokens + span.stop - span.start)
                return [*holdings[:i], Holding(span.rank, [grown]), *holdings[i + 1 :]]
    after = {holding.rank: holding for holding in holdings}
    for span in spans:
        held = after.get(span.rank)
        runs = [] if held is None else held.runs.copy()
        index = continued([run.end for run in runs], span.start)
        if index is None:
            runs.append(HeldRun(span.start, span.stop, span.stop - span.start))
        else:
            run = runs[index]
            runs[index] = HeldRun(run.start, span.stop, run.tokens + span.stop - span.start)
        after[span.rank] = Holding(span.rank, runs)
    return [after[rank] for rank in sorted(after)]


def run_from(holdings: Sequence[Holding], rank: int, start: int) -> HeldRun | None:
    """The run of `rank` that begins at position `start`."""
    held = (run for holding in holdings if holding.rank == rank for run in holding.runs)
    return next((run for run in held if run.start == start), None)


def held_after_flip(holdings: Sequence[Holding], source: int, target: int, start: int) -> list[Holding]:
    """Holdings once the run of `source` that begins at position `start` is the newest one of `target`, by rank.

    Raises KeyError if there is none. `ShardTable.detach` and `adopt` come to the same.
    """
    run = run_from(holdings, source, start)
    if run is None:
        raise KeyError(f"rank {source} has no run from position {start}")
    held = {holding.rank: holding.runs for holding in holdings}
    held[source] = [other for other in held[source] if other != run]
    held[target] = [*held.get(target, ()), run]
    return [Holding(rank, held[rank]) for rank in sorted(held) if held[rank]]


class Reading(msgspec.Struct, frozen=True):
    """Consecutive rows that attend to the run in `block_ids`; row `first_row + i` sees its tokens `[starts[i], kv_lens[i])`, or
    without starts the first `kv_lens[i]`. Blocks that no row sees anything of are left out at both ends.

    Rows that see several runs have as many readings, one after the other, of the same rows.
    """

    first_row: int
    num_rows: int
    block_ids: tuple[int, ...]
    kv_lens: tuple[int, ...]
    starts: tuple[int, ...] = ()

    @property
    def num_pairs(self) -> int:
        """Of a row and a token that it sees."""
        return sum(self.kv_lens) - sum(self.starts)


class Layout(msgspec.Struct, frozen=True):
    """One instance's part of a step's attention, in one group of layers."""

    num_rows: int
    own: list[Reading]
    dispatched_rows: list[int]
    """Own rows to send, those for the lowest rank first; a row goes to each holder it needs."""
    dispatched: dict[int, int]
    """rank -> how many of `dispatched_rows` go there."""
    received: dict[int, int]
    """rank -> how many rows come from there, in this order."""
    others: list[Reading]
    """What the received rows read here; `first_row` counts received rows."""

    @property
    def num_received(self) -> int:
        return sum(self.received.values())


def read_run(run: Run, first_row: int, start: int, stop: int, sight: Sight, table: int = 0) -> Reading | None:
    """What rows at the positions `[start, stop)` read of a run, in one of its tables of blocks; None if it is nothing."""
    if run.start >= stop:
        return None
    size, lens = run.block_size, run.kv_lens(start, stop)
    gone, block_ids = run.table(table)
    hidden = sight.hidden(run, start, stop) if sight.window or sight.chunk else ()
    if not hidden:
        return Reading(first_row, stop - start, tuple(block_ids[: -(-lens[-1] // size)]), tuple(lens))
    if hidden == tuple(lens):
        return None
    begin = hidden[0] // size
    blocks, skipped = tuple(block_ids[begin - gone : -(-lens[-1] // size) - gone]), begin * size
    starts = tuple(n - skipped for n in hidden) if hidden[-1] > skipped else ()
    return Reading(first_row, stop - start, blocks, tuple(n - skipped for n in lens), starts)


def lay_out(
    spans: Sequence[Span],
    holdings: Mapping[int, Sequence[Holding]],
    shards: ShardTable,
    rank: int,
    sight: Sight = FULL,
    table: int = 0,
) -> Layout:
    """The part of `rank` in a step, in layers where rows see by `sight` what lies in a table of blocks.

    `holdings[seq]` says who holds what of a sequence once this step has written its KV; `shards` are this rank's, with this
    step's tokens appended.
    """

    def read(span: Span, first_row: int) -> Iterator[Reading]:
        for run in shards[span.seq].runs:
            reading = read_run(run, first_row, span.start, span.stop, sight, table)
            if reading is not None:
                yield reading

    own: list[Reading] = []
    rows: dict[int, list[int]] = {}
    num_rows = 0
    served: dict[int, list[Span]] = {}
    for span in spans:
        first = sight.first(span.start)
        seen = [holding.rank for holding in holdings[span.seq] if holding.is_seen(first, span.stop - 1)]
        if span.rank != rank:
            if rank in seen:
                served.setdefault(span.rank, []).append(span)
            continue
        stop = num_rows + span.stop - span.start
        for holder in seen:
            if holder == rank:
                own += read(span, num_rows)
            else:
                rows.setdefault(holder, []).extend(range(num_rows, stop))
        num_rows = stop

    others: list[Reading] = []
    received: dict[int, int] = {}
    num_received = 0
    for peer in sorted(served):
        received[peer] = sum(span.stop - span.start for span in served[peer])
        for span in served[peer]:
            others += read(span, num_received)
            num_received += span.stop - span.start

    return Layout(
        num_rows=num_rows,
        own=own,
        dispatched_rows=[row for holder in sorted(rows) for row in rows[holder]],
        dispatched={holder: len(rows[holder]) for holder in sorted(rows)},
        received=received,
        others=others,
    )
