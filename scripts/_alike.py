"""A checkpoint whose layers all have the first one's weights: written in the time of a copy, where drawing takes minutes."""

import copy
import json
import re
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from kernels.products import quantise

_FIRST = re.compile(r"\blayers\.0\.")
_AT_ONCE = 8
"""Files that are written."""
_DRAWN = 0.02
"""Standard deviation of weights, where a config doesn't say it."""
_PIECE = 64 * 2**20
"""Bytes that are copied at a time."""
_FP8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
}
"""As llm-compressor writes it."""


def write_alike(config: PretrainedConfig, folder: Path, *, device: torch.device, fp8: bool) -> Any:
    """The weights and the config; a model of one such layer, for what else belongs to a checkpoint.

    `fp8`: linear layers in e4m3, with a scale for each feature out. Raises ValueError for a model whose layers differ,
    and for experts in fp8.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if len(kinds) > 1 or getattr(text, "first_k_dense_replace", None):
        raise ValueError(f"{config.model_type}: its layers can't be alike, they are of several kinds")
    one = copy.deepcopy(config)
    one.get_text_config().num_hidden_layers = 1
    # a product with what transformers draws (0.02) makes a row of 8,192 numbers 1.8 times as large: after 80 layers bf16's
    # rounding is 0.22 of the logits, which an instance refuses
    drawn = getattr(text, "initializer_range", _DRAWN)
    one.get_text_config().initializer_range = min(drawn, text.hidden_size**-0.5)
    if kinds:
        one.get_text_config().layer_types = text.layer_types[:1]
    auto: Any = AutoModelForCausalLM  # its from_config has no types
    with device:
        model = auto.from_config(one, dtype=config.dtype, trust_remote_code=False)
    stored = {name: weight.cpu().contiguous() for name, weight in model.state_dict().items()}
    if text.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    layer = {name: weight for name, weight in stored.items() if _FIRST.search(name)}
    if fp8 and any(weight.dim() > 2 for weight in layer.values()):
        raise ValueError(f"{config.model_type}: experts aren't written in fp8")
    rest = {name: weight for name, weight in stored.items() if name not in layer}
    if fp8:
        layer = _in_fp8(layer)
        config.quantization_config = _FP8
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"model-layer-{number:04d}.safetensors" for number in range(text.num_hidden_layers)]
    save_file(rest, folder / "model-rest.safetensors", {"format": "pt"})
    save_file(layer, files[0], {"format": "pt"})
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda number: _copy(files[0], files[number], number), range(1, len(files))))
    places = dict.fromkeys(rest, "model-rest.safetensors")
    for number, file in enumerate(files):
        places |= {_FIRST.sub(f"layers.{number}.", name): file.name for name in layer}
    total = sum(weight.nbytes for weight in rest.values()) + len(files) * sum(weight.nbytes for weight in layer.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    return model


def _in_fp8(layer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, weight in layer.items():
        if weight.dim() == 2:
            matrix = quantise(weight, "fp8")
            found |= {name: matrix.weight_NE, f"{name}_scale": matrix.scale_NG}
        else:
            found[name] = weight
    return found


def _copy(first: Path, target: Path, number: int) -> None:
    """The first layer's file as that layer's: names stand in a header, in front of the weights."""
    with first.open("rb") as source, target.open("wb") as made:
        (length,) = struct.unpack("<Q", source.read(8))
        header = _FIRST.sub(f"layers.{number}.", source.read(length).decode().rstrip())
        padded = header.encode().ljust(-(-len(header) // 8) * 8)
        made.write(struct.pack("<Q", len(padded)) + padded)
        shutil.copyfileobj(source, made, _PIECE)
