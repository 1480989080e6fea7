"""Which part of a model each rank has: together all of it, once, and each with whole groups of heads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instance.split import Place, dealt, split_of, stages_of


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


@given(st.integers(1, 12), st.integers(1, 200))
def test_stages_have_all_layers_in_order_and_the_last_ones_more(stages: int, num_layers: int) -> None:
    if stages > num_layers:
        with pytest.raises(ValueError, match=f"it has {num_layers} layers, which {stages} stages can't share"):
            stages_of(Place(stages=stages), num_layers)
        return
    found = stages_of(Place(stages=stages), num_layers)
    assert [layer for layers in found for layer in layers] == list(range(num_layers))
    sizes = [len(layers) for layers in found]
    assert sorted(sizes) == sizes and sizes[-1] - sizes[0] <= 1


def test_stages_have_the_layers_that_are_asked_for() -> None:
    assert stages_of(Place(stages=2, layers=(20, 12)), 32) == [range(20), range(20, 32)]
    with pytest.raises(ValueError, match="it has 32 layers, and --pp-layers 20,13 are 33"):
        stages_of(Place(stages=2, layers=(20, 13)), 32)
    for layers in ((20, 12), (32, 0, 0)):
        with pytest.raises(ValueError, match=r"--pp-layers .* are not the layers of 3 stages"):
            Place(stages=3, layers=layers)
    with pytest.raises(ValueError, match="stage 3 of 3"):
        Place(stage=3, stages=3)


def test_ranks_of_a_stage_come_one_after_the_other() -> None:
    places = [Place(part, 2, stage, 3) for stage in range(3) for part in range(2)]
    assert [place.rank for place in places] == list(range(6))
    assert {place.ranks for place in places} == {6}
    assert [place.is_last for place in places] == [False] * 4 + [True] * 2
    assert (Place(0, 2).flags, Place(stages=3).flags, Place(0, 2, 0, 3).flags) == ("--tp 2", "--pp 3", "--tp 2 --pp 3")
