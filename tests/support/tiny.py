"""What transformers alone says of tiny random models."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _tiny import CONFIGS, VOCAB, make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = [
    "CONFIGS",
    "SIZES",
    "VOCAB",
    "Expected",
    "make_long_model",
    "make_model",
    "make_tokenizer",
    "prompt_reference",
    "reference",
]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 512,
}
"""Of models that are made of a config alone: no tokenizer fits them."""

MAX_CONTEXT = 32768
"""Of a model that takes long texts."""


def make_long_model(folder: Path, max_context: int = MAX_CONTEXT) -> Path:
    """A tiny Llama that takes texts of so many tokens."""
    path = make_model("llama", folder / "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": max_context}))
    return path


@dataclass(frozen=True)
class Expected:
    """Greedy continuation by transformers alone."""

    token_ids: list[int]
    logprobs: list[float]
    margin: float
    """Smallest lead of the likeliest token over the next: ids can only differ if rounding exceeds it."""


@functools.cache
def reference(path: Path, prompt: tuple[int, ...], max_tokens: int) -> Expected:
    """The model alone, in float32 on the CPU, with transformers' own attention and cache."""
    model = _load(path)
    ids: list[int] = []
    logprobs: list[float] = []
    margin = float("inf")
    cache = None
    with torch.inference_mode():
        for _ in range(max_tokens):
            new = ids[-1:] or prompt
            out = model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            logits = out.logits[0, -1]
            top = logits.topk(2)
            margin = min(margin, float(top.values[0] - top.values[1]))
            logprobs.append(float(logits.log_softmax(-1)[top.indices[0]]))
            ids.append(int(top.indices[0]))
    return Expected(ids, logprobs, margin)


def prompt_reference(path: Path, prompt: list[int]) -> torch.Tensor:
    """Log-probabilities `[T - 1, V]` of what may follow each token of the prompt but the last, as `reference` computes them."""
    with torch.inference_mode():
        logits: torch.Tensor = _load(path)(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1)


@functools.cache
def _load(path: Path) -> Any:
    # torch's own attention knows neither caps nor sinks
    plain = AutoConfig.from_pretrained(path).model_type in ("gemma2", "gpt_oss")
    attention = "eager" if plain else "sdpa"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention).eval()
