"""What rows read, over all instances of a step: the layouts' meaning in plain lists."""

from collections import Counter
from collections.abc import Mapping, Sequence

from distattn.layout import Layout, Reading

Token = tuple[int, int]
"""Sequence and position."""


def read_by_rows(
    layouts: Sequence[Layout], tokens: Sequence[Mapping[int, Token]], block_size: int
) -> list[list[Counter[Token]]]:
    """For each rank and each of its own rows: how often it reads which tokens, here and at others.

    `tokens`: what is in each slot of each rank; a slot without one raises KeyError.
    """

    def read(rank: int, readings: Sequence[Reading], num_rows: int) -> list[Counter[Token]]:
        found: list[Counter[Token]] = [Counter() for _ in range(num_rows)]
        for reading in readings:
            slots = [block * block_size + offset for block in reading.block_ids for offset in range(block_size)]
            starts = reading.starts or (0,) * reading.num_rows
            for row, (start, count) in enumerate(zip(starts, reading.kv_lens, strict=True)):
                found[reading.first_row + row].update(tokens[rank][slot] for slot in slots[start:count])
        return found

    served = [read(rank, layout.others, layout.num_received) for rank, layout in enumerate(layouts)]
    got: list[list[Counter[Token]]] = []
    for rank, layout in enumerate(layouts):
        rows = read(rank, layout.own, layout.num_rows)
        at = 0
        for peer, count in layout.dispatched.items():
            sent = layout.dispatched_rows[at : at + count]
            at += count
            assert len(set(sent)) == count, "a row goes to a holder once"
            received = layouts[peer].received
            assert received[rank] == count
            first = sum(n for other, n in received.items() if other < rank)
            for row, part in zip(sent, served[peer][first : first + count], strict=True):
                rows[row].update(part)
        assert at == len(layout.dispatched_rows)
        got.append(rows)
    return got
