"""How long texts a model takes, by its config and the scaling that a flag asks for."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.wire.scaling import MAX_FACTOR, Kind, Lengths, RopeScaling, lengths, parse_scaling

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("text", "scaling"),
    [
        ("yarn:4", RopeScaling("yarn", 4)),
        (" YaRN:2.5 ", RopeScaling("yarn", 2.5)),
        ("linear:2", RopeScaling("linear", 2)),
        ("dynamic:1024", RopeScaling("dynamic", 1024)),
        ("none", RopeScaling("none")),
    ],
)
def test_flags_are_read(text: str, scaling: RopeScaling) -> None:
    assert parse_scaling(text) == scaling
    assert parse_scaling(str(scaling)) == scaling


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ntk:4", "must be yarn:F, linear:F, dynamic:F or none, got 'ntk:4'"),
        ("", "must be yarn:F, linear:F, dynamic:F or none, got ''"),
        ("4", "must be yarn:F, linear:F, dynamic:F or none, got '4'"),
        ("longrope:4", "must be yarn:F, linear:F, dynamic:F or none, got 'longrope:4'"),
        ("yarn", "yarn needs a factor, as yarn:4, got 'yarn'"),
        ("yarn:long", "yarn needs a factor, as yarn:4, got 'yarn:long'"),
        ("yarn:1", "the factor of yarn must be more than 1 and at most 1024, got 1"),
        ("linear:-2", "the factor of linear must be more than 1 and at most 1024, got -2"),
        ("yarn:nan", "the factor of yarn must be more than 1 and at most 1024, got nan"),
        ("dynamic:inf", "the factor of dynamic must be more than 1 and at most 1024, got inf"),
        ("none:2", "scaling none has no factor, got 2"),
    ],
)
def test_other_flags_are_refused_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match="--rope-scaling") as refusal:
        parse_scaling(text)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "scaling", "found"),
    [
        ({}, None, None),
        ({"max_position_embeddings": None}, None, None),
        ({"max_position_embeddings": 128}, None, Lengths(128, 128)),
        ({"max_position_embeddings": 128}, "yarn:4", Lengths(512, 512)),
        ({"max_position_embeddings": 128}, "linear:1.5", Lengths(192, 192)),
        ({"max_position_embeddings": 128}, "dynamic:2", Lengths(256, 256)),
        ({"max_position_embeddings": 128}, "none", Lengths(128, 128)),
        # a config that states the length with scaling, and one that states that before it
        ({"max_position_embeddings": 128, "rope_scaling": YARN}, None, Lengths(128, 128)),
        ({"max_position_embeddings": 32, "rope_parameters": YARN}, None, Lengths(128, 128)),
        ({"max_position_embeddings": 32, "rope_scaling": {"type": "yarn", "factor": None}}, None, Lengths(32, 32)),
        ({"max_position_embeddings": 32, "rope_scaling": {"type": "yarn", "factor": 4.0}}, None, Lengths(128, 128)),
        # all begin from what the model was trained with before its own scaling
        ({"max_position_embeddings": 128, "rope_scaling": YARN}, "yarn:8", Lengths(256, 256)),
        ({"max_position_embeddings": 128, "rope_scaling": LLAMA3}, "none", Lengths(16, 16)),
        ({"max_position_embeddings": 128, "rope_scaling": LLAMA3}, "linear:4", Lengths(64, 64)),
        ({"max_position_embeddings": 128, "original_max_position_embeddings": 32, "rope_scaling": {"type": "longrope"}},
         "yarn:2", Lengths(64, 64)),
        # frequencies as trained up to that length, others for who asks for more
        ({"max_position_embeddings": 128, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, None, Lengths(128, 256)),
        ({"max_position_embeddings": 128, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "none", Lengths(128, 128)),
    ],
)  # fmt: skip
def test_how_long_texts_may_be(config: dict[str, Any], scaling: str | None, found: Lengths | None) -> None:
    assert lengths(config, None if scaling is None else parse_scaling(scaling)) == found


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "has no max_position_embeddings to scale"),
        ({"max_position_embeddings": 128, "rope_scaling": {"type": "linear", "factor": 4.0}}, "rotary scaling 'linear'"),
        ({"max_position_embeddings": 128, "rope_parameters": {"full_attention": YARN}}, "kinds of layers"),
    ],
)
def test_what_can_not_be_scaled_is_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="--rope-scaling") as refusal:
        lengths(config, RopeScaling("yarn", 2))
    assert sentence in str(refusal.value)


@given(
    st.sampled_from(["yarn", "linear", "dynamic"]),
    st.floats(1, MAX_FACTOR, exclude_min=True, allow_nan=False),
    st.integers(1, 2**24),
)
def test_a_scaled_model_takes_no_more_than_its_factor_says_and_never_less_than_before(
    kind: Kind, factor: float, tokens: int
) -> None:
    found = lengths({"max_position_embeddings": tokens}, RopeScaling(kind, factor))
    assert found is not None
    assert tokens <= found.usual == found.most <= tokens * factor < math.inf
    assert found.most + 1 > tokens * factor
