"""Rotary frequencies that the service chooses are those of transformers with the same `rope_parameters`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gmanager.wire.scaling import RopeScaling, lengths
from instance.errors import UnsupportedModel
from instance.exact import paged_logits, refuse_inexact
from instance.load import load_model, random_model
from instance.model import Model
from tests.instance.test_models import EXACT, SIZES
from tests.support.tiny import make_model

CPU = torch.device("cpu")
TRAINED, TOKENS, BLOCK = 32, 60, 16
YARN4 = RopeScaling("yarn", 4)
DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN: dict[str, Any] = DEFAULT | {
    "rope_type": "yarn",
    "factor": 2.0,
    "beta_fast": 8.0,
    "truncate": False,
    "attention_factor": 3.0,
    "original_max_position_embeddings": 16,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": TRAINED,
}


def config_of(kind: str, rope: dict[str, Any] | None, longest: int = TRAINED) -> Any:
    more = {} if rope is None else {"rope_parameters": dict(rope)}
    return AutoConfig.for_model(kind, **(SIZES | EXACT[kind] | {"max_position_embeddings": longest} | more))


def make(kind: str, rope: dict[str, Any] | None, scaling: RopeScaling, **more: Any) -> Model:
    return strengthened(random_model(config_of(kind, rope), torch.float32, CPU, seed=1, scaling=scaling, **more))


def strengthened(model: Model) -> Model:
    """With larger weights: as made, attention hardly shows, and its frequencies less."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.module.named_parameters():
            weight.normal_(1.0 if "norm" in name and "bias" not in name else 0.0, 0.2, generator=generator)
    return model


def transformers_alone(model: Model, config: Any, text: torch.Tensor) -> torch.Tensor:
    untouched: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    untouched.load_state_dict(model.module.state_dict())
    with torch.inference_mode():
        logits: torch.Tensor = untouched(input_ids=text, use_cache=False).logits
    return logits.log_softmax(-1)


SAME: dict[str, tuple[str, dict[str, Any] | None, RopeScaling, dict[str, Any], int]] = {
    "yarn": ("llama", DEFAULT, YARN4, {"rope_type": "yarn", "factor": 4.0}, TRAINED),
    "linear": ("llama", DEFAULT, RopeScaling("linear", 2), {"rope_type": "linear", "factor": 2.0}, TRAINED),
    "part-of-heads": ("phi", None, YARN4, {"rope_type": "yarn", "factor": 4.0}, TRAINED),
    "windows": ("gpt_oss", None, YARN4, {"rope_type": "yarn", "factor": 4.0}, TRAINED),
    "latent": ("deepseek_v3", DEFAULT, YARN4, {"rope_type": "yarn", "factor": 4.0}, TRAINED),
    "for-llama3": ("llama", LLAMA3, RopeScaling("yarn", 5), {"rope_type": "yarn", "factor": 5.0}, 16),
    "for-another-yarn": (
        "llama",
        YARN,
        RopeScaling("yarn", 5),
        {"rope_type": "yarn", "factor": 5.0, "beta_fast": 8.0, "truncate": False},
        16,
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_scaled_frequencies_are_transformers_own(case: str) -> None:
    """Of texts that are longer than the model's own limit, and steps of a few rows."""
    kind, rope, scaling, parameters, trained = SAME[case]
    model = make(kind, rope, scaling)
    assert model.max_context == int(trained * scaling.factor)
    theirs = config_of(kind, None, longest=model.max_context)
    kept = {key: value for key, value in theirs.rope_parameters.items() if key in ("rope_theta", "partial_rotary_factor")}
    theirs.rope_parameters = kept | parameters | {"original_max_position_embeddings": trained}
    text = torch.randint(3, 97, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    want = transformers_alone(model, theirs, text)
    got = paged_logits(model, text.tolist(), [0], [7] * TOKENS, block_size=BLOCK, backend="torch").log_softmax(-1)
    assert float((got - want).abs().max()) < 5e-4
    unscaled = transformers_alone(model, config_of(kind, rope, longest=model.max_context), text)
    assert float((unscaled - want).abs().max()) > 5e-3  # else the frequencies would hardly show
    assert refuse_inexact(model, kind, block_size=BLOCK, backend="torch") < 1e-4
    assert model.rotary == str(scaling)


def test_none_takes_a_models_own_scaling_away() -> None:
    model = make("llama", LLAMA3, RopeScaling("none"))
    text = torch.randint(3, 97, (1, 16), generator=torch.Generator().manual_seed(3))
    want = transformers_alone(model, config_of("llama", DEFAULT), text)
    got = paged_logits(model, text.tolist(), [0], [7] * 16, block_size=BLOCK, backend="torch").log_softmax(-1)
    assert float((got - want).abs().max()) < 5e-4
    assert (model.max_context, model.rotary) == (16, "none")


@pytest.mark.parametrize("max_context", [None, 40])
def test_dynamic_has_the_frequencies_of_the_longest_text_that_is_served(max_context: int | None) -> None:
    scaling = RopeScaling("dynamic", 2)
    model = make("llama", DEFAULT, scaling, max_context=max_context)
    longest = max_context or 2 * TRAINED
    assert model.max_context == longest
    assert model.rotary == f"dynamic:2 with the frequencies of texts of {longest} tokens"
    text = torch.randint(3, 97, (1, longest), generator=torch.Generator().manual_seed(3))
    want = transformers_alone(model, config_of("llama", DEFAULT | {"rope_type": "dynamic", "factor": 2.0}), text)
    got = paged_logits(model, text.tolist(), [0], [7] * longest, block_size=BLOCK, backend="torch").log_softmax(-1)
    assert float((got - want).abs().max()) < 5e-4


def test_a_models_own_dynamic_may_be_asked_for_longer_texts() -> None:
    config = config_of("llama", DEFAULT | {"rope_type": "dynamic", "factor": 2.0})
    assert random_model(config, torch.float32, CPU, seed=1).max_context == TRAINED
    assert random_model(config, torch.float32, CPU, seed=1, max_context=64).max_context == 64
    with pytest.raises(UnsupportedModel, match="--max-context 65 is more than the 64 tokens that llama takes"):
        random_model(config, torch.float32, CPU, seed=1, max_context=65)


@pytest.mark.parametrize("stated", [{}, {"original_max_position_embeddings": TRAINED}])
def test_lengths_are_the_same_by_a_stored_config_and_by_transformers(stated: dict[str, Any]) -> None:
    """Which fills in what isn't stated: `distattn up` reads the one, an instance the other."""
    rope = DEFAULT | {"rope_type": "yarn", "factor": 4.0} | stated
    stored = {"max_position_embeddings": TRAINED, "rope_parameters": dict(rope)}
    for scaling in (None, RopeScaling("yarn", 2), RopeScaling("none")):
        found = lengths(stored, scaling)
        assert found is not None
        model = random_model(config_of("llama", rope), torch.float32, CPU, seed=1, scaling=scaling)
        assert found.usual == model.max_context


@pytest.mark.parametrize(("longest", "factors"), [(TRAINED, "short"), (TRAINED + 1, "long")])
def test_which_factors_of_longrope_are_chosen_is_told(longest: int, factors: str) -> None:
    own = {"rope_parameters": dict(LONGROPE), "original_max_position_embeddings": TRAINED}
    config = AutoConfig.for_model("phi3", **(SIZES | EXACT["phi3"] | own))
    model = random_model(config, torch.float32, CPU, seed=1, max_context=longest)
    assert model.rotary == f"longrope with the {factors} factors, those of texts of {longest} tokens"


def test_longrope_can_be_replaced() -> None:
    """Its length before scaling stands beside its parameters, where transformers reads it first."""
    own = {"rope_parameters": dict(LONGROPE), "original_max_position_embeddings": TRAINED}
    config = AutoConfig.for_model("phi3", **(SIZES | EXACT["phi3"] | own))
    model = strengthened(random_model(config, torch.float32, CPU, seed=1, scaling=RopeScaling("yarn", 2)))
    theirs = AutoConfig.for_model("phi3", **(SIZES | EXACT["phi3"] | {"max_position_embeddings": 64}))
    theirs.original_max_position_embeddings = TRAINED
    theirs.rope_parameters = DEFAULT | {
        "rope_type": "yarn",
        "factor": 2.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": TRAINED,
    }
    text = torch.randint(3, 97, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    want = transformers_alone(model, theirs, text)
    got = paged_logits(model, text.tolist(), [0], [7] * TOKENS, block_size=BLOCK, backend="torch").log_softmax(-1)
    assert float((got - want).abs().max()) < 5e-4
    assert model.max_context == 64


@pytest.mark.parametrize(
    ("kind", "rope", "scaling", "sentence"),
    [
        ("gpt2", None, YARN4, "gpt2 has no rotary embedding that --rope-scaling yarn:4 could scale"),
        ("llama", DEFAULT | {"rope_type": "linear", "factor": 2.0}, YARN4, "llama: --rope-scaling: its config has"),
        ("gemma3_text", None, YARN4, "gemma3_text: --rope-scaling: its kinds of layers have rotary frequencies of their own"),
    ],
)
def test_what_can_not_be_scaled_is_refused(kind: str, rope: dict[str, Any] | None, scaling: RopeScaling, sentence: str) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        make(kind, rope, scaling)
    assert str(refusal.value).startswith(sentence)
    assert "\n" not in str(refusal.value)


def test_layers_that_ignore_their_config_are_refused() -> None:
    module = make("llama", DEFAULT, YARN4).module
    for part in module.modules():
        if hasattr(part, "rope_type"):
            part.rope_type = "default"  # type: ignore[assignment]
    with pytest.raises(UnsupportedModel, match="rotary embedding of its layers is to be yarn, and is default"):
        Model(module, None, YARN4)


def test_limits_are_checked_before_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_model("qwen2", tmp_path)
    monkeypatch.setattr("instance.load.load_whole", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UnsupportedModel, match="--max-context 513 is more than the 512 tokens that qwen2 takes$"):
        load_model(path, None, CPU, 513)
    sentence = "--max-context 2,049 is more than the 2,048 tokens that qwen2 takes with --rope-scaling yarn:4"
    with pytest.raises(UnsupportedModel, match=sentence):
        load_model(path, None, CPU, 2049, YARN4)


def test_a_loaded_model_is_scaled_as_if_its_config_said_so(tmp_path: Path) -> None:
    """And is another one than without, to its cell."""
    path = make_model("qwen2", tmp_path)
    scaled, plain = load_model(path, None, CPU, None, YARN4), load_model(path, None, CPU)
    assert (scaled.max_context, plain.max_context) == (2048, 512)
    config = json.loads((path / "config.json").read_text())
    rope = config["rope_parameters"] | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    (path / "config.json").write_text(json.dumps(config | {"rope_parameters": rope, "max_position_embeddings": 2048}))
    told = load_model(path, None, CPU)
    assert told.module.config.rope_parameters == scaled.module.config.rope_parameters
    assert (told.max_context, told.rotary, scaled.rotary) == (2048, None, "yarn:4")
    assert scaled.fingerprint() != plain.fingerprint()
    assert scaled.fuse("torch") is None
