"""What the model layer takes, and what it refuses by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    OPTConfig,
)

from instance.errors import UnsupportedModel
from instance.load import load_model, load_text_assets, random_model
from instance.memory import NoAttention
from instance.model import Model
from tests.support.tiny import CONFIGS, make_model

SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}


DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}


def load(config: Any) -> Model:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="distattn")
    return Model(model.eval())


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (Gemma3TextConfig(**SMALL, rope_parameters={"full_attention": LONGROPE, "sliding_attention": DEFAULT}), "'longrope'"),
        (FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16), "keep a state"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(config: Any, name: str, tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    load_model(tmp_path, torch.float32, torch.device("cpu"))  # registers the attention function
    with pytest.raises(UnsupportedModel, match=name):
        load(config)


def test_attention_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    model = load_model(make_model("llama", tmp_path), torch.float32, torch.device("cpu"))
    module: Any = model.module
    module.model.layers[1].self_attn.is_causal = False
    with pytest.raises(UnsupportedModel, match="not causal"):
        Model(module)


def test_rows_that_mix_outside_attention_are_refused(tmp_path: Path) -> None:
    """As a state or a convolution over the rows would: in a step they are of different sequences."""

    class Convolution(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.roll(1, dims=1)

    module: Any = load_model(make_model("llama", tmp_path), torch.float32, torch.device("cpu")).module
    module.model.layers[0].mlp = Convolution()
    with pytest.raises(UnsupportedModel, match="something beside attention mixes"):
        Model(module)


@pytest.mark.parametrize(
    "config", [GPT2Config, GPTNeoXConfig, OPTConfig, CohereConfig, GraniteConfig], ids=lambda c: c.__name__
)
def test_logits_of_chosen_rows_are_those_that_transformers_gives_them(config: Any) -> None:
    """Whatever stands between the last hidden states and the logits; GPT-2 takes its tokens by place, OPT skips its base."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    more = {"logits_scaling": 8.0} if config is GraniteConfig else {}
    model = random_model(config(max_position_embeddings=64, **sizes, **more), torch.float32, torch.device("cpu"), seed=1)
    ids, places, rows = torch.tensor([5, 6, 7, 8]), torch.arange(4), torch.tensor([2, 0])
    model.context.attention = NoAttention(model.shape)
    with torch.inference_mode():
        want = model.module(input_ids=ids[None], position_ids=places[None], use_cache=False).logits[0, rows]
        torch.testing.assert_close(model.logits(model.run(ids, places), rows), want)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_known_shapes_load(kind: str, tmp_path: Path) -> None:
    model = load_model(make_model(kind, tmp_path), torch.float32, torch.device("cpu"))
    heads = (4, 1, 48) if kind.startswith("deepseek") else (4, 2, 16)
    assert (model.shape.num_heads, model.shape.num_kv_heads, model.shape.head_dim) == heads
    assert model.max_context == 512
    again = load_model(tmp_path, torch.float32, torch.device("cpu"))
    assert again.fingerprint() == model.fingerprint()
    with torch.no_grad():
        next(iter(again.module.parameters())).view(-1)[0] += 1
    assert again.fingerprint() != model.fingerprint()


def test_text_assets(tmp_path: Path) -> None:
    assets = load_text_assets(make_model("llama", tmp_path))
    assert '"ByteLevel"' in assets.tokenizer_json
    assert assets.chat_template is not None
    assert assets.eos_token_ids == []


def test_the_model_runs_only_inside_a_step(tmp_path: Path) -> None:
    model = load_model(make_model("llama", tmp_path), torch.float32, torch.device("cpu"))
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="outside a step"):
        model.forward(zero, zero, zero)
