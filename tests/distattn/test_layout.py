"""Which rows read which tokens where, beside a list of everything: over runs in any order on several instances."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.layout import HeldRun, Holding, Layout, Span, held_after, lay_out
from kvstore.shard import ShardTable
from kvstore.sight import Sight
from tests.distattn.layout_support import read_by_rows

SIZE = 3


class Cell:
    """Shards of all ranks, and which token is in each slot."""

    def __init__(self, block_size: int) -> None:
        self.shards = [ShardTable(400, block_size) for _ in range(SIZE)]
        self.tokens: list[dict[int, tuple[int, int]]] = [{} for _ in range(SIZE)]
        """rank: slot -> (seq, position)"""
        self.holdings: dict[int, list[Holding]] = {}

    def write(self, span: Span) -> None:
        shards = self.shards[span.rank]
        shards.reserve(span.seq, -(-(span.stop - span.start) // shards.block_size))
        slots = shards[span.seq].append(span.start, span.stop)
        self.tokens[span.rank] |= {slot: (span.seq, p) for slot, p in zip(slots, range(span.start, span.stop), strict=True)}
        self.holdings[span.seq] = held_after(self.holdings.get(span.seq, []), [span])


@st.composite
def cells(draw: st.DrawFn) -> tuple[Cell, list[Span]]:
    """Sequences whose past came in any order, and spans of the next rows: in gaps of that, or after it."""
    cell = Cell(draw(st.sampled_from([1, 4])))
    spans: list[Span] = []
    for seq in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        parts = [
            Span(seq, draw(st.integers(0, SIZE - 1)), end - length, end) for length, end in zip(lengths, ends, strict=True)
        ]
        order = draw(st.permutations(parts))
        count = draw(st.integers(0, len(parts)))
        for span in order[:count]:
            cell.write(span)
        spans += sorted(order[count : count + 3], key=lambda span: span.start)
    for span in spans:
        cell.write(span)
    return cell, draw(st.permutations(spans))


@given(cells())
def test_every_row_reads_all_that_it_may_once(made: tuple[Cell, list[Span]]) -> None:
    cell, spans = made
    layouts: list[Layout] = []
    for rank, shards in enumerate(cell.shards):
        shards.validate()
        for seq, holdings in cell.holdings.items():
            told = [run for holding in holdings if holding.rank == rank for run in holding.runs]
            runs = shards[seq].runs if seq in shards else []
            assert told == [HeldRun(run.start, run.end, run.num_tokens) for run in runs]
        layouts.append(lay_out(spans, cell.holdings, shards, rank))
    read = read_by_rows(layouts, cell.tokens, cell.shards[0].block_size)
    held = [token for tokens in cell.tokens for token in tokens.values()]
    for rank, got in enumerate(read):
        rows = [(span.seq, p) for span in spans if span.rank == rank for p in range(span.start, span.stop)]
        assert got == [Counter((s, p) for s, p in held if s == seq and p <= position) for seq, position in rows]


@given(cells(), st.sampled_from(["window", "chunk"]), st.integers(1, 40))
def test_every_row_reads_what_is_in_its_sight_once(made: tuple[Cell, list[Span]], kind: str, size: int) -> None:
    """Of no block more than it takes, and a holder of which a step's rows certainly see nothing is sent none of them."""
    cell, spans = made
    sight = Sight(**{kind: size})
    places = {p for tokens in cell.tokens for _, p in tokens.values()}
    first = {p: max(0, p - size + 1) if kind == "window" else p // size * size for p in places}
    assert all(sight.first(p) == at for p, at in first.items())
    layouts = [lay_out(spans, cell.holdings, shards, rank, sight) for rank, shards in enumerate(cell.shards)]
    block_size = cell.shards[0].block_size
    for a, layout in enumerate(layouts):
        for b, other in enumerate(layouts):
            assert layout.dispatched.get(b, 0) == other.received.get(a, 0)
        for reading in (*layout.own, *layout.others):
            starts = reading.starts or (0,) * reading.num_rows
            assert min(starts) < block_size
            assert (len(reading.block_ids) - 1) * block_size < max(reading.kv_lens) <= len(reading.block_ids) * block_size
            assert any(start < count for start, count in zip(starts, reading.kv_lens, strict=True))
    read = read_by_rows(layouts, cell.tokens, block_size)
    held = [token for tokens in cell.tokens for token in tokens.values()]
    for rank, got in enumerate(read):
        rows = [(span.seq, p) for span in spans if span.rank == rank for p in range(span.start, span.stop)]
        assert got == [Counter((s, p) for s, p in held if s == seq and first[at] <= p <= at) for seq, at in rows]


def test_a_holder_of_what_lies_before_the_window_is_not_asked() -> None:
    cell = Cell(4)
    cell.write(Span(1, 0, 0, 20))
    cell.write(Span(1, 1, 20, 30))
    spans = [Span(1, 1, 29, 30)]
    for window, holders in [(9, {}), (10, {}), (11, {0: 1}), (0, {0: 1})]:
        layout = lay_out(spans, cell.holdings, cell.shards[1], 1, Sight(window=window))
        assert layout.dispatched == holders
        assert lay_out(spans, cell.holdings, cell.shards[0], 0, Sight(window=window)).num_received == sum(holders.values())


@pytest.mark.parametrize("sizes", [{"window": -1}, {"chunk": -1}, {"window": 4, "chunk": 4}])
def test_what_no_layer_sees_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a window or chunks"):
        Sight(**sizes)


def test_readings_of_the_same_rows_follow_each_other() -> None:
    """Two runs whose positions lie between each other's, and one whose positions all come after the rows."""
    cell = Cell(4)
    for start, stop in [(20, 30), (4, 6), (10, 12), (0, 3), (6, 7)]:
        cell.write(Span(1, 0, start, stop))
    cell.write(Span(1, 1, 12, 14))
    assert cell.holdings[1] == [
        Holding(0, [HeldRun(20, 30, 10), HeldRun(4, 12, 4), HeldRun(0, 7, 4)]),
        Holding(1, [HeldRun(12, 14, 2)]),
    ]
    spans = [Span(1, 1, 12, 14)]
    others = lay_out(spans, cell.holdings, cell.shards[0], 0).others
    assert [(r.first_row, r.num_rows, r.kv_lens) for r in others] == [(0, 2, (4, 4)), (0, 2, (4, 4))]
    assert others[0].block_ids != others[1].block_ids
