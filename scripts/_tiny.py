"""Tiny random models with a byte-level tokenizer, written to disk: for tests, and to measure what is not the model."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Glm4MoeConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 300

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

_LATENTS: dict[str, Any] = _SIZES | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        **_SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16),
    "mistral": MistralConfig(**_SIZES, sliding_window=None),
    # windows in all layers; in some, with a soft cap, and with sinks; chunks in some; latents
    "mistral-window": MistralConfig(**_SIZES, sliding_window=23),
    "gemma2": Gemma2Config(**_SIZES, head_dim=16, sliding_window=23, query_pre_attn_scalar=24, attn_logit_softcapping=2.0),
    "gpt-oss": GptOssConfig(
        **_SIZES, **_EXPERTS, head_dim=16, sliding_window=23, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    ),
    # experts: in all layers, in some, and beside one that all rows go to
    "mixtral": MixtralConfig(**_SIZES, **_EXPERTS),
    "qwen3-moe": Qwen3MoeConfig(**_SIZES, moe_intermediate_size=48, num_experts=6, num_experts_per_tok=2, mlp_only_layers=[0]),
    "glm4-moe": Glm4MoeConfig(
        **_SIZES,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        use_qk_norm=True,
    ),
    "llama4": Llama4TextConfig(
        **_SIZES,
        **_EXPERTS,
        head_dim=16,
        intermediate_size_mlp=128,
        attention_chunk_size=23,
        no_rope_layers=[1, 0],
        layer_types=["chunked_attention", "full_attention"],
        floor_scale=16,
        attn_scale=0.5,
    ),
    "deepseek": DeepseekV3Config(**_LATENTS, q_lora_rank=24),
    "deepseek-v2": DeepseekV2Config(**_LATENTS, q_lora_rank=None),
}


def make_model(kind: str, path: Path, *, seed: int = 0, **other: Any) -> Path:
    """Write a tiny random model of a kind in `CONFIGS` with a byte-level tokenizer to `path`. `other`: fields of its config."""
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM  # its from_config has no types
    config = CONFIGS[kind]
    if other:
        given = config.to_dict() | other
        if "num_hidden_layers" in other and "layer_types" not in other:
            given.pop("layer_types", None)  # it names one for each layer
        config = type(config).from_dict(given)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # zeros would not show a lost bias
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_tokenizer(vocabulary: int = 256) -> PreTrainedTokenizerFast:
    """Bytes as tokens 0..255, and a chat template; tokens beyond are read as `<|300|>` and never written.

    Raises ValueError for a vocabulary that is too small.
    """
    if vocabulary < 256:
        raise ValueError(f"a vocabulary of {vocabulary} tokens is too small for 256 bytes")
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<|{i}|>" for i in range(256, vocabulary))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast_of: Any = PreTrainedTokenizerFast  # it has no types
    fast: PreTrainedTokenizerFast = fast_of(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    return fast
