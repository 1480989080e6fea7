"""What keeps all stages of an instance busy: how long slices of a prompt are, and which sequences decode together. Pure.

A step goes from stage to stage, and the next follows it. A long prompt is cut into slices, which need nothing of each other but
KV, and so are in the stages one behind the other. A sequence's next row needs the token before; so sequences are dealt to as
many groups as there are stages, and while one group is in the second stage another is in the first.

Sources: PipeLLM and HPipe, for slices that shrink as what they attend to grows; GPipe's micro-batches (arXiv 1811.06965).
"""

from collections.abc import Mapping, Sequence
from math import isqrt

SLICES = 8
"""For each stage, of a prompt that is long enough: what stages wait for at its beginning and its end is then an eighth of what
each computes between, for two stages a sixteenth in all."""


def under_way(stages: int) -> int:
    """Most steps of a lane that have begun and aren't over: one in each stage, and one that is made ready meanwhile."""
    return stages + 1


def slice_rows(start: int, rows: int, *, stages: int, most: int, reach: int, grain: int) -> int:
    """Rows of the next slice of a prompt of which `rows` are left, from position `start` on.

    A row costs 1, and as much again for `reach` tokens before it:

        cost(start, rows) = rows + rows x (start + rows / 2) / reach

    Where slices go through stages that take as long for each, one behind the other, all of them take as long as one stage for
    all slices, and the other stages for the dearest (a flow shop with equal machines). So the dearest is a part of the whole,
    those that may cost as much cost the same, and those that can't, as they have the `most` rows that a step takes, are left
    as large as they can be: few rows are multiplied and attend at less of a device's speed. `grain`: rows that cost as much as
    fewer; slices are of whole quarters of it, which are few tiles of attention. What is cut off leaves the same slices, so
    nothing of them needs to be known from step to step.
    """
    if stages == 1 or rows <= 1:
        return rows
    end = start + rows
    whole, left = _cost(0, end, reach), _cost(start, rows, reach)  # times 2 reach, so that they are integers
    limit = max(2 * reach * grain, whole // (SLICES * stages))
    at = reach + start
    count = -(-left // (limit + 2 * at))  # a row more does no harm, and what divides is divided
    even = 1 + isqrt(at * at + -(-left // count) - 1) - at  # rounded up
    quarter = max(1, grain // 4)
    return min(rows, most, -(-even // quarter) * quarter)


def _cost(start: int, rows: int, reach: int) -> int:
    return rows * (2 * reach + 2 * start + rows)


def deal(ready: Sequence[int], last_steps: Mapping[int, int], *, step: int, stages: int, total: int) -> set[int]:
    """Of the sequences that are `ready` those that have a row in a step: an even part of `total` sequences that decode.

    First those that none of the steps which may be in the stages has a row of; if there are only others, those whose last one
    is longest ago. `last_steps`: the number of the step in which each had its last row, of those that had one.
    """
    if stages == 1:
        return set(ready)
    oldest = min((last_steps.get(seq, -stages) for seq in ready), default=0)
    newest = max(oldest, step - stages)
    free = [seq for seq in ready if last_steps.get(seq, -stages) <= newest]
    return set(sorted(free, key=lambda seq: last_steps.get(seq, -stages))[: -(-total // stages)])
