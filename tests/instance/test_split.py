"""Which part of a model each rank has: together all of it, once, and each with whole groups of heads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instance.split import Place, dealt, split_of


@given(st.integers(0, 500), st.integers(1, 20))
def test_things_are_dealt_out_evenly_and_in_order(count: int, among: int) -> None:
    hands = dealt(count, among)
    assert [thing for hand in hands for thing in hand] == list(range(count))
    sizes = [len(hand) for hand in hands]
    assert sorted(sizes, reverse=True) == sizes and sizes[0] - sizes[-1] <= 1


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 400), st.integers(1, 1000), st.data())
def test_the_parts_are_the_whole(kv_heads: int, group: int, inner: int, vocabulary: int, data: st.DataObject) -> None:
    heads = kv_heads * group
    parts = data.draw(st.integers(1, min(heads, inner)))
    splits = [
        split_of(Place(part, parts), heads=heads, kv_heads=kv_heads, inner=inner, vocabulary=vocabulary)
        for part in range(parts)
    ]
    assert [head for split in splits for head in split.heads] == list(range(heads))
    assert [dim for split in splits for dim in split.inner] == list(range(inner))
    assert [token for split in splits for token in split.vocabulary] == list(range(vocabulary))
    assert [split.is_first for split in splits] == [True] + [False] * (parts - 1)
    for split in splits:
        assert split.inner
        assert {head // group for head in split.heads} == set(split.kv_heads)
        assert len(split.heads) % len(split.kv_heads) == 0, "all KV heads of a rank have as many query heads"
        assert len(split.vocabulary) <= split.padded
    assert splits[0].padded * parts >= vocabulary
    assert len(splits[0].kv_heads) == max(len(split.kv_heads) for split in splits), "the first has most KV"
    if parts <= kv_heads:
        assert [head for split in splits for head in split.kv_heads] == list(range(kv_heads))


def test_inner_dims_go_by_tiles_where_they_can() -> None:
    of = {part: split_of(Place(part, 3), heads=32, kv_heads=8, inner=14336, vocabulary=128256) for part in range(3)}
    assert [len(split.inner) for split in of.values()] == [38 * 128, 37 * 128, 37 * 128]
    assert [len(split.kv_heads) for split in of.values()] == [3, 3, 2]


def test_more_ranks_than_heads_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="it has 4 query heads and 128 inner dims, which 5 parts can't share"):
        split_of(Place(0, 5), heads=4, kv_heads=2, inner=128, vocabulary=100)
    with pytest.raises(ValueError, match="part 2 of 2"):
        Place(2, 2)
