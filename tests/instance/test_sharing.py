"""How lanes share a GPU's processors: numbers in, numbers out."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distattn.layout import Layout, Reading
from instance.errors import InstanceError
from instance.processors import check_parts
from instance.sharing import SPLITS, STRETCH, Costs, Load, Sharing

TOTAL = 132
LLAMA_8B = Costs(weight_bytes=16_060_522_496, token_bytes=131_072, flops_per_row=16_060_522_496)
BUSY = Load(rows=32, kv_tokens=32 * 8192)


def test_a_lane_alone_has_all_processors() -> None:
    sharing = Sharing(TOTAL, SPLITS, LLAMA_8B)
    assert sharing.for_decode(BUSY, prefill_is_busy=False) == TOTAL
    assert sharing.for_prefill(decodes_meanwhile=False) == TOTAL
    assert sharing.for_decode(BUSY, prefill_is_busy=True) == TOTAL, "the prompt has all of them: no part is free"


def test_while_both_have_work_their_parts_are_all_there_is() -> None:
    sharing = Sharing(TOTAL, SPLITS, LLAMA_8B)
    sharing.for_decode(BUSY, prefill_is_busy=False)
    rest = sharing.for_prefill(decodes_meanwhile=True)
    assert rest == TOTAL - 24
    assert sharing.for_decode(BUSY, prefill_is_busy=True) == 24
    assert sharing.for_decode(BUSY, prefill_is_busy=False) == TOTAL, "the prompt is over"


def test_a_part_that_leaves_prompts_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=TOTAL))
    assert check_parts([8, 120], torch.device("cuda")) == TOTAL
    with pytest.raises(InstanceError, match="--decode-processors 128 leaves prompts none: the GPU has 132"):
        check_parts([24, 128], torch.device("cuda"))


def test_a_gpu_that_can_not_be_divided_is_whole_for_both() -> None:
    sharing = Sharing(TOTAL, (), LLAMA_8B)
    assert sharing.for_prefill(decodes_meanwhile=True) == TOTAL
    assert sharing.for_decode(BUSY, prefill_is_busy=True) == TOTAL


@given(st.integers(1, 256), st.integers(0, 2_000_000), st.sets(st.sampled_from(range(8, 97, 8)), min_size=1, max_size=4))
def test_the_fewest_that_hold_the_bound(rows: int, kv_tokens: int, splits: set[int]) -> None:
    sharing = Sharing(TOTAL, sorted(splits), LLAMA_8B)
    load = Load(rows, kv_tokens)
    sharing.for_decode(load, prefill_is_busy=False)
    chosen = TOTAL - sharing.for_prefill(decodes_meanwhile=True)
    bound = STRETCH * LLAMA_8B.step_s(load, TOTAL)
    assert chosen in splits
    assert LLAMA_8B.step_s(load, chosen) <= bound or chosen == max(splits)
    assert all(LLAMA_8B.step_s(load, split) > bound for split in splits if split < chosen)


@pytest.mark.parametrize(
    ("load", "chosen"), [(Load(1, 8192), 24), (BUSY, 24), (Load(64, 64 * 8192), 24), (Load(256, 256 * 128), 40)]
)
def test_many_rows_need_more_than_memory_does(load: Load, chosen: int) -> None:
    sharing = Sharing(TOTAL, (24, 40), LLAMA_8B)
    sharing.for_decode(load, prefill_is_busy=False)
    assert TOTAL - sharing.for_prefill(decodes_meanwhile=True) == chosen


def test_a_load_counts_what_others_read_here_too() -> None:
    own, others = Reading(0, 1, (1, 2), (100,)), Reading(0, 1, (3,), (40,))
    layout = Layout(num_rows=1, own=[own], dispatched_rows=[], dispatched={}, received={1: 1}, others=[others])
    assert Load.of(layout) == Load(rows=2, kv_tokens=140)
    alone = Layout(num_rows=1, own=[own], dispatched_rows=[], dispatched={}, received={}, others=[])
    assert Load.of(alone) == Load(rows=1, kv_tokens=100)
