"""Positions of tokens as ascending ranges `[start, end)`: pure integers."""

from collections.abc import Sequence

Ranges = list[tuple[int, int]]


def first_tokens(ranges: Sequence[tuple[int, int]], count: int) -> Ranges:
    """The first `count` positions of ranges."""
    first: Ranges = []
    for start, end in ranges:
        if count <= 0:
            break
        first.append((start, min(end, start + count)))
        count -= end - start
    return first


def whole_blocks(ranges: Sequence[tuple[int, int]], end: int, block_size: int) -> Ranges:
    """The positions before `end` of a run that lie in blocks which have no others, and are full.

    The gManager comes to the same (`gmanager.cluster.prefixes`).
    """
    before = sum(max(0, min(stop, end) - start) for start, stop in ranges)
    return first_tokens(ranges, before - before % block_size)


def split_tokens(ranges: Sequence[tuple[int, int]], count: int) -> tuple[Ranges, Ranges]:
    """The first `count` positions of ranges, and the others."""
    first = first_tokens(ranges, count)
    rest = list(ranges[max(0, len(first) - 1) :])
    if first:
        end = first[-1][1]
        rest = [(end, rest[0][1]), *rest[1:]] if end < rest[0][1] else rest[1:]
    return first, rest


def join_ranges(first: Sequence[tuple[int, int]], then: Sequence[tuple[int, int]]) -> Ranges:
    """Ranges that follow others, as one list."""
    if first and then and first[-1][1] == then[0][0]:
        return [*first[:-1], (first[-1][0], then[0][1]), *then[1:]]
    return [*first, *then]
