"""Which rows of a step go where: pure integers, derived alike on every member of a party.

For one instance and step:

    own rows          span a | span b | span c        computed here, in the step's order
    dispatched rows   b c (to rank 1) | a c (to rank 2)         to every holder of a sequence that a span can see
    received rows     from rank 1 | from rank 2                 rows of others that see KV held here

Sender and receiver walk the same spans in the same order, so no lengths travel.
"""

from collections.abc import Mapping, Sequence

import msgspec

from kvstore.shard import ShardTable


class Span(msgspec.Struct, frozen=True):
    """Rows of one sequence, positions `[start, stop)`, computed on one instance in one step."""

    seq: int
    rank: int
    start: int
    stop: int


class Holding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one instance holds of a sequence: the position of its first token, and how many."""

    rank: int
    first: int
    tokens: int


class Reading(msgspec.Struct, frozen=True):
    """Consecutive rows that attend to the shard in `block_ids`; row `first_row + i` sees its first `kv_lens[i]` tokens."""

    first_row: int
    num_rows: int
    block_ids: tuple[int, ...]
    kv_lens: tuple[int, ...]


class Layout(msgspec.Struct, frozen=True):
    """One instance's part of a step's attention."""

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


def lay_out(spans: Sequence[Span], holdings: Mapping[int, Sequence[Holding]], shards: ShardTable, rank: int) -> Layout:
    """The part of `rank` in a step.

    `holdings[seq]` says who holds what of a sequence once this step has written its KV; `shards` are this rank's, with this
    step's tokens appended.
    """

    def sees(span: Span, holder: int) -> bool:
        return any(h.rank == holder and h.tokens and h.first < span.stop for h in holdings[span.seq])

    def read(span: Span, first_row: int) -> Reading:
        shard = shards[span.seq]
        lens = shard.kv_lens(span.start, span.stop)
        blocks = -(-lens[-1] // shard.block_size)
        return Reading(first_row, span.stop - span.start, tuple(shard.block_ids[:blocks]), tuple(lens))

    ranks = sorted({h.rank for held in holdings.values() for h in held} | {span.rank for span in spans})
    own: list[Reading] = []
    rows: dict[int, list[int]] = {}
    num_rows = 0
    for span in spans:
        if span.rank != rank:
            continue
        if sees(span, rank):
            own.append(read(span, num_rows))
        stop = num_rows + span.stop - span.start
        for holder in ranks:
            if holder != rank and sees(span, holder):
                rows.setdefault(holder, []).extend(range(num_rows, stop))
        num_rows = stop

    others: list[Reading] = []
    received: dict[int, int] = {}
    num_received = 0
    for peer in ranks:
        before = num_received
        for span in spans:
            if span.rank == peer != rank and sees(span, rank):
                others.append(read(span, num_received))
                num_received += span.stop - span.start
        if num_received > before:
            received[peer] = num_received - before

    return Layout(
        num_rows=num_rows,
        own=own,
        dispatched_rows=[row for holder in sorted(rows) for row in rows[holder]],
        dispatched={holder: len(rows[holder]) for holder in sorted(rows)},
        received=received,
        others=others,
    )
