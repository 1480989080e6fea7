"""Of which smaller model a rank's part is: its config, and whether the layers that this makes are the whole model's.

A stage's layers are made by themselves, so their numbers begin anew. What a config says of layers by their number is shifted or
cut (`_of_layers`); whether that was all is seen in the layers.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights

from instance.errors import UnsupportedModel
from instance.split import Place, Split, inner_shares, split_of, stages_of
from kernels.experts import PACKED_BLOCK

_MADE_UP = 64
"""Tokens of a stage without embeddings."""
_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""What a config may have for each layer."""
_OTHER = {"layer_idx", "training"}
"""What of a layer tells nothing of what it computes."""


def part_of_config(config: PretrainedConfig, place: Place) -> tuple[PretrainedConfig, Split]:
    """The config of that rank's smaller model, and what it has of the whole. Raises UnsupportedModel, with the numbers, for a
    model that so many can't share."""
    text = config.get_text_config()
    try:
        heads, inner = int(text.num_attention_heads), int(text.intermediate_size)
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        vocabulary = int(text.vocab_size) if place.stage == 0 else _MADE_UP
        split = split_of(
            place, heads=heads, kv_heads=kv_heads, inner=inner, vocabulary=vocabulary, expert_inner=expert_inner(text)
        )
        layers = layers_of_stage(config, place)
    except (AttributeError, TypeError) as error:
        raise UnsupportedModel(f"{config.model_type}: {place.flags} can't split it: {error}") from error
    except ValueError as error:
        raise UnsupportedModel(f"{config.model_type}: {error} ({place.flags})") from error
    smaller = copy.deepcopy(config)
    part = smaller.get_text_config()
    part.head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    part.num_attention_heads, part.num_key_value_heads = len(split.heads), len(split.kv_heads)
    part.intermediate_size = len(split.inner)
    if hasattr(text, "moe_intermediate_size"):
        part.moe_intermediate_size = len(split.expert_inner)
    if place.stages > 1:
        part.num_hidden_layers = len(layers)
        _of_layers(part, layers)
    if place.stage:
        part.vocab_size, part.tie_word_embeddings = vocabulary, False
        part.bos_token_id = part.eos_token_id = part.pad_token_id = None
    return smaller, split


def _of_layers(part: Any, layers: range) -> None:
    """Let a config say of a stage's layers what it says of these in the whole."""
    for name in _BY_LAYER:
        if getattr(part, name, None):
            setattr(part, name, getattr(part, name)[layers.start : layers.stop])
    if hasattr(part, "mlp_only_layers"):  # which have no experts, beside that each n-th has some
        dense = [i for i in layers if i in (part.mlp_only_layers or ()) or (i + 1) % part.decoder_sparse_step]
        part.mlp_only_layers, part.decoder_sparse_step = [i - layers.start for i in dense], 1
    if hasattr(part, "first_k_dense_replace"):  # so many have none
        part.first_k_dense_replace = max(0, (part.first_k_dense_replace or 0) - layers.start)
    for name in ("moe_layer_start_index", "moe_layer_end_index"):
        if hasattr(part, name):
            setattr(part, name, (getattr(part, name) or 0) - layers.start)


def refuse_other_layers(config: PretrainedConfig, place: Place, whole: PreTrainedModel, attention: str) -> None:
    """Make the layers of all stages, without values: by their number or by how many there are, they may be others than those of
    the `whole`. `attention`: name of the attention function. Raises UnsupportedModel, on all ranks alike.
    """
    nowhere = torch.device("meta")
    layers: Any = whole.get_decoder().layers  # type: ignore[no-untyped-call]
    wanted = [dict(_looks(layer)) for layer in layers]
    for stage in range(place.stages):
        its = replace(place, part=0, parts=1, stage=stage)
        smaller, _ = part_of_config(config, its)
        base: Any = empty_model(smaller, torch.float32, nowhere, attention).get_decoder()  # type: ignore[no-untyped-call]
        for number, layer in zip(layers_of_stage(config, its), base.layers, strict=True):
            if (looks := dict(_looks(layer))) != wanted[number]:
                part = next(name for name in {**wanted[number], **looks} if looks.get(name) != wanted[number].get(name))
                raise UnsupportedModel(
                    f"{config.model_type}: {place.flags} can't split it: layer {number} has another {part} in stage {stage} "
                    "than in the whole model"
                )


def _looks(layer: nn.Module) -> Iterator[tuple[str, object]]:
    """All of a layer that has a name and can be compared."""
    for name, module in layer.named_modules():
        yield name or "kind", type(module).__qualname__
        for key, value in vars(module).items():
            if isinstance(value, int | float | str | list | tuple) and key not in _OTHER and not key.startswith("_"):
                yield f"{name}.{key}".lstrip("."), value
    for name, tensor in itertools.chain(layer.named_parameters(), layer.named_buffers()):
        yield name, tuple(tensor.shape)


def refuse_torn_blocks(config: PretrainedConfig, place: Place) -> None:
    """Raises UnsupportedModel, on all ranks alike, if some rank's part of packed experts would begin or end within a block."""
    inner = expert_inner(config.get_text_config())
    ends = [end for its in inner_shares(inner, place.parts) for end in (its.start, its.stop)]
    if place.parts > 1 and any(end % PACKED_BLOCK for end in ends):
        raise UnsupportedModel(
            f"{config.model_type}: {inner} inner dims of packed experts, in blocks of {PACKED_BLOCK}, can't be split between "
            f"{place.parts} ranks ({place.flags})"
        )


def expert_inner(text: Any) -> int:
    """Dims between gate and down of an expert; of a model without experts any number."""
    return int(getattr(text, "moe_intermediate_size", None) or text.intermediate_size)


def layers_of_stage(config: PretrainedConfig, place: Place) -> range:
    """Which of the whole model's layers that rank has. Raises ValueError, with the numbers, if they don't fit."""
    text = config.get_text_config()
    return stages_of(place, int(text.num_hidden_layers))[place.stage]


def head_widths(text: Any) -> dict[str, int]:
    """Of the projections of attention, how many rows (of `o_proj` columns) a head has."""
    if getattr(text, "kv_lora_rank", None):
        nope, value = int(text.qk_nope_head_dim), int(text.v_head_dim)
        query = nope + int(text.qk_rope_head_dim)
        return {"q_proj": query, "q_b_proj": query, "kv_b_proj": nope + value, "o_proj": value}
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), head_dim)


def empty_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device, attention: str) -> PreTrainedModel:
    """A model whose weights are whatever is in memory; buffers are as they should be."""
    auto: Any = AutoModelForCausalLM  # its from_config has no types
    with device, no_init_weights():
        module: PreTrainedModel = auto.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
        module.tie_weights()  # which is a part of what isn't done here, too
    _keep_wide(module, dtype)
    return module


def _keep_wide(module: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give what the model wants in fp32, whatever the others are, that type: what routers add to their scores, say."""
    plan = module._get_dtype_plan(dtype)
    if not plan:
        return
    wanted, pattern_of, _ = build_glob_alternation(list(plan))
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if (found := wanted.search(name)) is not None:
            tensor.data = tensor.data.to(plan[pattern_of[found.lastgroup or ""]])
