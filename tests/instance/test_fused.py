"""Fused layers compute what transformers' own compute, and take only models that they can."""

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from distattn.shape import PackedRows
from instance.fused import OwnRow
from instance.load import random_model
from instance.model import Model
from tests.support.tiny import SIZES

CPU = torch.device("cpu")
IDS = torch.tensor([3, 4, 5, 6])
POSITIONS = torch.tensor([0, 1, 9, 400])
ROWS = torch.tensor([3, 1])
KNOWN: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2, biases": (Qwen2Config, {}),
    "qwen3, head norms": (Qwen3Config, {"head_dim": 16}),
    "llama, biases everywhere": (LlamaConfig, {"attention_bias": True}),
    "llama, GELU": (LlamaConfig, {"hidden_act": "gelu"}),
    "mixtral, weights in fp32": (MixtralConfig, {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "gemma, norms that add one": (GemmaConfig, {"head_dim": 16}),
    "gemma2, norms of what is added, capped logits": (Gemma2Config, {"head_dim": 16, "final_logit_softcapping": 2.0}),
    "qwen3_moe, experts": (
        Qwen3MoeConfig,
        {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "qwen3_moe, other weights, dense layers": (
        Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": False,
            "mlp_only_layers": [0],
        },
    ),
    "gpt_oss, experts with biases, sinks": (
        GptOssConfig,
        {"head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "gemma3, head norms, two kinds of rotary": (
        Gemma3TextConfig,
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama, another activation": (LlamaConfig, {"hidden_act": "relu"}),
    "mixtral, another activation of experts": (MixtralConfig, {"num_local_experts": 6, "hidden_act": "gelu"}),
    "granite, scaled residuals": (GraniteConfig, {"residual_multiplier": 0.5}),
    "granite, scaled logits": (GraniteConfig, {"logits_scaling": 8.0}),
    "granite, scaled embeddings": (GraniteConfig, {"embedding_multiplier": 12.0}),
    "smollm3, layers without rotary": (SmolLM3Config, {"pad_token_id": 0, "num_hidden_layers": 4}),
    "phi, other parts": (PhiConfig, {}),
}


def make(kind: tuple[Any, dict[str, Any]], dtype: torch.dtype) -> Model:
    model = random_model(kind[0](**(SIZES | kind[1])), dtype, CPU, seed=1)
    for name, parameter in model.module.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model


def logits(model: Model) -> torch.Tensor:
    model.context.attention = OwnRow(model.shape, "torch")
    with torch.inference_mode():
        return model.forward(IDS, POSITIONS, ROWS).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KNOWN)
def test_outputs_are_unchanged_and_no_weight_is_held_twice(kind: str, dtype: torch.dtype) -> None:
    model = make(KNOWN[kind], dtype)
    want, print_before, bytes_before = logits(model), model.fingerprint(), model.weight_bytes()
    model.fuse("torch")
    assert model.fused is not None
    got = logits(model)
    assert float((got - want).norm() / want.norm()) < (1e-6 if dtype == torch.float32 else 0.03)
    assert model.fingerprint() == print_before
    assert model.weight_bytes() == bytes_before
    attention = model.module.get_decoder().layers[0].self_attn
    assert attention.k_proj.weight.untyped_storage().data_ptr() == attention.q_proj.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_compute_anything_else_stay_as_they_are(kind: str) -> None:
    model = make(OTHERS[kind], torch.float32)
    want = logits(model)
    model.fuse("torch")
    assert model.fused is None
    assert torch.equal(logits(model), want)


class Recorder(OwnRow):
    """Remembers the rows that each layer was given."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.shape, "torch")
        self.rows: dict[int, torch.Tensor] = {}
        self.attended: list[int] = []

    def run_packed(self, layer: int, rows: PackedRows) -> torch.Tensor:
        self.rows[layer] = rows.qkv_TE
        self.attended.append(layer)
        return super().run_packed(layer, rows)

    def store_packed(self, layer: int, rows: PackedRows) -> None:
        self.rows[layer] = rows.qkv_TE


@pytest.mark.parametrize("kind", ["llama", "gemma2, norms of what is added, capped logits"])
def test_a_last_layer_that_only_stores_is_given_the_same_keys_and_values(kind: str) -> None:
    model = make(KNOWN[kind], torch.float32)
    model.fuse("torch")
    full, short = Recorder(model), Recorder(model)
    with torch.inference_mode():
        model.context.attention = full
        model.forward(IDS, POSITIONS, ROWS)
        model.context.attention = short
        model.store(IDS, POSITIONS)
    assert short.attended == [0]
    for layer in (0, 1):
        assert torch.equal(full.rows[layer], short.rows[layer])
