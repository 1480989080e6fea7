"""What rows see, by rules that transformers makes its masks from."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AttentionMaskInterface, LlamaConfig
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from instance.sights import Rule, ruled_as, smaller
from kvstore.sight import FULL, Sight

STAND_IN = torch.zeros((1, 1, 2, 2), dtype=torch.bool)


def sight(rule: Any, size: int | None, context: int | None) -> Sight | None:
    return Rule(STAND_IN, rule, size).sight(context)


@given(st.integers(1, 300), st.integers(1, 700))
def test_transformers_windows_and_chunks_are_known(size: int, context: int) -> None:
    """One that hides nothing from the longest text is none."""
    assert sight(causal_mask_function, None, context) == FULL
    window = FULL if size >= context else Sight(window=size)
    assert sight(sliding_window_causal_mask_function(size), size, context) == window
    chunks = chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))
    # of one token, both are the same
    assert sight(chunks, size, context) == (FULL if size >= context else Sight(window=1) if size == 1 else Sight(chunk=size))


@given(st.integers(2, 300), st.integers(4, 700))
def test_another_rule_is_none_of_these(size: int, context: int) -> None:
    """A window or chunk of another size than is said, keys after the query, and what hides more."""
    assume(size < context - 1)
    padding = torch.zeros(1, dtype=torch.int64)
    for other in (size - 1, size + 1):
        assert sight(sliding_window_causal_mask_function(other), size, context) is None
        assert sight(chunked_causal_mask_function(other, padding), size, context) is None
    for rule in (
        or_masks(sliding_window_causal_mask_function(size), lambda b, h, q, kv: kv == 0),  # a first token that all see
        or_masks(causal_mask_function, lambda b, h, q, kv: kv == q + 1),
        and_masks(causal_mask_function, lambda b, h, q, kv: (kv < 1) | (kv > 1)),
        and_masks(sliding_window_causal_mask_function(size), lambda b, h, q, kv: kv != q),
    ):
        assert sight(rule, size, context) is None


def test_a_window_of_a_long_text_is_known() -> None:
    """Of which not every place is tried."""
    for size in (4096, 131072):
        assert sight(sliding_window_causal_mask_function(size), size, 10_000_000) == Sight(window=size)
        assert sight(sliding_window_causal_mask_function(size), size, None) == Sight(window=size)
        assert sight(sliding_window_causal_mask_function(size + 1), size, 10_000_000) is None


def test_masks_are_asked_for_only_meanwhile() -> None:
    with ruled_as("distattn-test") as rules:
        made = AttentionMaskInterface()["distattn-test"](
            batch_size=1, q_length=2, kv_length=2, mask_function=causal_mask_function, device=torch.device("cpu")
        )
        found = rules.of(made)
        assert found is not None
        assert found.sight(100) == FULL
        assert rules.of(made.clone()) is None
        assert rules.of(None) is None
    assert "distattn-test" not in AttentionMaskInterface()


def test_windows_are_smaller_only_meanwhile() -> None:
    config: Any = LlamaConfig()
    config.sliding_window, config.attention_chunk_size = 4096, 5
    with pytest.raises(RuntimeError, match="in between"), smaller(config, 8):
        assert (config.sliding_window, config.attention_chunk_size) == (8, 5)
        raise RuntimeError("in between")
    assert (config.sliding_window, config.attention_chunk_size) == (4096, 5)
    config.sliding_window = None
    with smaller(config, 8):
        assert config.sliding_window is None
