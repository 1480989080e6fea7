"""What keeps all stages busy: slices of a prompt that cost the same, and sequences dealt to groups."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instance.pipelining import SLICES, deal, slice_rows
from instance.step import FAR


def slices(tokens: int, **how: int) -> list[tuple[int, int]]:
    """`(start, rows)` of a prompt that begins at 0."""
    found: list[tuple[int, int]] = []
    at = 0
    while at < tokens:
        rows = slice_rows(at, tokens - at, **how)
        found.append((at, rows))
        at += rows
    assert at == tokens
    return found


def cost(start: int, rows: int, reach: int) -> float:
    return rows * (1 + (start + rows / 2) / reach)


@given(
    tokens=st.integers(1, 300_000),
    stages=st.integers(2, 5),
    most=st.integers(1, 10_000),
    reach=st.integers(1, 100_000) | st.just(FAR),
    grain=st.integers(1, 3000),
)
def test_no_slice_costs_more_than_its_part(tokens: int, stages: int, most: int, reach: int, grain: int) -> None:
    if cost(0, tokens, reach) / grain > 3000 or tokens / most > 3000:
        return  # takes long
    found = slices(tokens, stages=stages, most=most, reach=reach, grain=grain)
    costs = [cost(start, rows, reach) for start, rows in found]
    rows = [rows for _, rows in found]
    quarter = max(1, grain // 4)
    row = 1 + tokens / reach
    limit = max(grain, sum(costs) / (SLICES * stages))
    assert max(rows) <= most
    assert max(costs) <= limit + (quarter + 1) * row
    assert all(count == most or count % quarter == 0 for count in rows[:-1])
    assert all(later <= earlier + quarter for earlier, later in pairwise(rows)), "they shrink"
    if len(found) > 1 and sum(costs) > 2 * limit:  # else the rest of two may be any part
        assert all(its > limit / 2 - row or count == most for its, count in zip(costs[:-1], rows[:-1], strict=True))


def test_a_long_prompt_fills_two_stages() -> None:
    """128K tokens of an 8B shape on two H200: stages wait for one part in fourteen, and no slice is of few rows."""
    found = slices(131_072, stages=2, most=8192, reach=30_000, grain=2048)
    assert 2 * SLICES <= len(found) < 3 * SLICES
    assert found[0][1] == 8192 and all(rows > 4000 for _, rows in found[:-1])
    costs = [cost(start, rows, 30_000) for start, rows in found]
    serial = 2 * sum(costs)
    assert serial / (sum(costs) + max(costs)) > 1.85


def test_short_prompts_and_single_stages_are_not_cut() -> None:
    assert slice_rows(0, 300, stages=2, most=8192, reach=16_000, grain=2048) == 300
    assert slice_rows(100, 9000, stages=1, most=512, reach=10, grain=1) == 9000
    assert [rows for _, rows in slices(1000, stages=2, most=512, reach=FAR, grain=100)] == [125, *[100] * 8, 75]


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_sequences_go_in_turn_in_as_many_groups_as_there_are_stages(count: int, stages: int) -> None:
    last: dict[int, int] = {}
    groups = []
    for step in range(12):
        group = deal(range(count), last, step=step, stages=stages, total=count)
        assert group and len(group) <= -(-count // stages)
        last |= dict.fromkeys(group, step)
        groups.append(group)
    turns = min(stages, count)
    for step in range(turns, 12):
        if count % stages == 0 or count < stages:
            assert groups[step] == groups[step - turns]
        assert all(groups[step].isdisjoint(groups[step - back]) for back in range(1, turns))
    rows = Counter(seq for group in groups for seq in group)
    assert max(rows.values()) - min(rows.values()) <= 1


def test_who_comes_or_is_ready_late_joins_the_smaller_group() -> None:
    assert deal([1, 2, 3], {1: 4, 2: 4}, step=5, stages=2, total=3) == {3}
    assert deal([1, 2, 3], {1: 4, 2: 3}, step=5, stages=2, total=3) == {3, 2}
    assert deal([1], {1: 4}, step=5, stages=2, total=1) == {1}
    assert deal([], {}, step=5, stages=2, total=1) == set()
    assert deal([4, 5], {}, step=0, stages=1, total=2) == {4, 5}
