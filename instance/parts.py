"""One rank's part of a model, read from the checkpoint without ever holding the whole.

The model is made as if it were a smaller one, with as many layers, heads and inner dims as this rank has, so its layers run as
they are. What is theirs alone is summed behind `o_proj` and `down_proj`, and logits are gathered behind the head.

Embeddings, the last norm and the head are of the first stage. Those behind it have made-up ones of a few tokens, so that they
too can be run by themselves and compared with transformers' own layers; in a step rows of the stage before come in their place.
"""

import copy
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from instance.checkpoint import CheckpointError, some_of, weight_files
from instance.context import AttentionContext
from instance.errors import UnsupportedModel
from instance.layers import has_dense_parts
from instance.split import Place, Split, split_of, stages_of

_SUMMED = ("o_proj", "down_proj")

_MADE_UP = 64
"""Tokens of a stage without embeddings."""
_MADE_UP_SIZE = 0.02
"""Of each number of theirs, as models are commonly initialised with."""
_LAYER = re.compile(r"(\blayers\.)(\d+)\.")
"""In the name of a weight."""


def part_of_config(config: PretrainedConfig, place: Place) -> tuple[PretrainedConfig, Split]:
    """The config of that rank's smaller model, and what it has of the whole. Raises UnsupportedModel, with the numbers, for a
    model that so many can't share."""
    text = config.get_text_config()
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    if place.stages > 1 and len(kinds) > 1:
        raise UnsupportedModel(
            f"{config.model_type}: --pp {place.stages} takes models whose layers all see alike, as yet, and this one's are of "
            f"{len(kinds)} kinds ({', '.join(kinds)})"
        )
    try:
        heads, inner = int(text.num_attention_heads), int(text.intermediate_size)
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        vocabulary = int(text.vocab_size) if place.stage == 0 else _MADE_UP
        split = split_of(place, heads=heads, kv_heads=kv_heads, inner=inner, vocabulary=vocabulary)
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
    if place.stages > 1:
        part.num_hidden_layers = len(layers)
        if kinds:
            part.layer_types = text.layer_types[layers.start : layers.stop]
    if place.stage:
        part.vocab_size, part.tie_word_embeddings = vocabulary, False
        part.bos_token_id = part.eos_token_id = part.pad_token_id = None
    return smaller, split


def layers_of_stage(config: PretrainedConfig, place: Place) -> range:
    """Which of the whole model's layers that rank has. Raises ValueError, with the numbers, if they don't fit."""
    text = config.get_text_config()
    return stages_of(place, int(text.num_hidden_layers))[place.stage]


def has_dense_layers(config: PretrainedConfig, attention: str) -> bool:
    """Whether the model of that config has `instance.layers.has_dense_parts`. `attention`: name of the attention function."""
    return has_dense_parts(_empty(config, torch.float32, torch.device("meta"), attention))


def empty_part(
    config: PretrainedConfig, place: Place, dtype: torch.dtype, device: torch.device, attention: str
) -> tuple[PreTrainedModel, Split]:
    """That rank's part of a model, whose weights are whatever is in memory. `attention`: name of the attention function.

    Raises UnsupportedModel for layers that have other parts than Llama's or Gemma's and a dense MLP.
    """
    smaller, split = part_of_config(config, place)
    module = _empty(smaller, dtype, device, attention)
    if not has_dense_parts(module):
        raise UnsupportedModel(
            f"{config.model_type}: {place.flags} splits layers that have the parts of Llama's or Gemma's and a dense MLP, "
            "and this model's have others"
        )
    if place.parts > 1:
        _split_head(module, split)
    return module, split


def load_part(
    path: Path, config: PretrainedConfig, place: Place, dtype: torch.dtype, device: torch.device, attention: str
) -> PreTrainedModel:
    """That rank's part of a resolved checkpoint, as `empty_part`.

    Raises UnsupportedModel, and CheckpointError if a weight is missing or has another shape than the config says.
    """
    module, split = empty_part(config, place, dtype, device, attention)
    embeddings: Any = module.get_input_embeddings()
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    wanted = dict(module.named_parameters())
    if place.stage:
        _make_up_ends(module)
        ends = {id(weight) for weight in _ends(module)}
        wanted = {name: weight for name, weight in wanted.items() if id(weight) not in ends}
    first = layers_of_stage(config, place).start
    sources = {name: _name_in_whole(name, first) for name in wanted}
    if module.config.get_text_config().tie_word_embeddings:
        (whole,) = (name for name, weight in wanted.items() if weight is embeddings.weight)
        sources |= {name: whole for name, weight in wanted.items() if weight is head.weight}
    head_dim = int(module.config.get_text_config().head_dim)
    with torch.no_grad(), ExitStack() as opened:
        files = [opened.enter_context(safe_open(file, framework="pt")) for file in weight_files(path)]
        stored: dict[str, Any] = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118
        if missing := set(sources.values()) - stored.keys():
            raise CheckpointError(f"{path} lacks {len(missing)} of the weights that its config asks for: {some_of(missing)}")
        for name, weight in wanted.items():
            source, ranges, own = sources[name], _ranges(name, split, head_dim), weight
            if weight is head.weight and place.parts > 1:
                ranges, own = (split.vocabulary, None), weight[: len(split.vocabulary)]
                weight[len(own) :] = 0
            own.copy_(_read(stored[source], source, own.shape, ranges, split))
    module.train(False)
    return module


def bind_stage(module: PreTrainedModel, context: AttentionContext) -> None:
    """Let rows come in and go out where a stage begins and ends, for as long as the thread's `context` has some: in place of
    what the embeddings give, and before the last norm."""
    base: Any = module.get_decoder()  # type: ignore[no-untyped-call]

    def come_in(_layer: object, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        rows_TE = context.rows_TE
        return None if rows_TE is None else (rows_TE.unsqueeze(0), *inputs[1:])

    def go_out(_norm: object, inputs: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        return inputs[0] if context.is_stage else out

    base.layers[0].register_forward_pre_hook(come_in)
    base.norm.register_forward_hook(go_out)


def bind_team(module: PreTrainedModel, vocab_size: int, context: AttentionContext) -> None:
    """Let the ranks' parts meet where the module runs: by the team of the thread's `context`."""

    def summed(_module: object, _inputs: object, out: torch.Tensor) -> torch.Tensor:
        return context.members().sum(out)

    def gathered(_module: object, _inputs: object, out: torch.Tensor) -> torch.Tensor:
        logits_SV = context.members().gather(out.reshape(-1, out.shape[-1]))[:, :vocab_size]
        return logits_SV.reshape(*out.shape[:-1], vocab_size)

    for name, part in module.named_modules():
        if name.rpartition(".")[2] in _SUMMED:
            part.register_forward_hook(summed)
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    head.register_forward_hook(gathered)


def _ends(module: PreTrainedModel) -> list[torch.Tensor]:
    """The weights of embeddings, last norm and head."""
    base: Any = module.get_decoder()  # type: ignore[no-untyped-call]
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    return [weight for part in (base.embed_tokens, base.norm, head) for weight in part.parameters()]


def _make_up_ends(module: PreTrainedModel) -> None:
    """The same on all ranks."""
    seeded = torch.Generator().manual_seed(0)
    for weight in _ends(module):
        values = torch.randn(weight.shape, generator=seeded) * _MADE_UP_SIZE
        weight.data.copy_(values if weight.dim() > 1 else values + 1)  # a norm's


def _name_in_whole(name: str, first_layer: int) -> str:
    """What a weight of a stage is called in the whole model."""
    return _LAYER.sub(lambda found: f"{found[1]}{int(found[2]) + first_layer}.", name, count=1)


def _empty(config: PretrainedConfig, dtype: torch.dtype, device: torch.device, attention: str) -> PreTrainedModel:
    """A model whose weights are whatever is in memory; buffers are as they should be."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, no_init_weights():
            auto: Any = AutoModelForCausalLM  # its from_config has no types
            module: PreTrainedModel = auto.from_config(config, attn_implementation=attention, trust_remote_code=False)
    finally:
        torch.set_default_dtype(default)
    return module


def _ranges(name: str, split: Split, head_dim: int) -> tuple[range | None, range | None]:
    """Rows and columns of a whole weight that are this rank's; None: all."""

    def of(heads: range) -> range:
        return range(heads.start * head_dim, heads.stop * head_dim)

    match name.split(".")[-2:]:
        case ["q_proj", _]:
            return of(split.heads), None
        case ["k_proj" | "v_proj", _]:
            return of(split.kv_heads), None
        case ["o_proj", "weight"]:
            return None, of(split.heads)
        case ["gate_proj" | "up_proj", _]:
            return split.inner, None
        case ["down_proj", "weight"]:
            return None, split.inner
        case [_, "sinks"]:
            return split.heads, None
        case _:
            return None, None


def _read(stored: Any, name: str, shape: torch.Size, ranges: tuple[range | None, range | None], split: Split) -> torch.Tensor:
    """This rank's part of a stored weight, of which no more is read than its rows. Raises CheckpointError if that is of another
    shape."""
    rows, columns = ranges
    part: torch.Tensor = stored[rows.start : rows.stop] if rows is not None else stored[:]
    if columns is not None:
        part = part[:, columns.start : columns.stop]
    if part.shape != shape:
        raise CheckpointError(f"{name} is {tuple(stored.get_shape())}, of which {tuple(shape)} should be this rank's")
    if name.endswith(".bias") and name.split(".")[-2] in _SUMMED and not split.is_first:
        return torch.zeros_like(part)
    return part


def _split_head(module: PreTrainedModel, split: Split) -> None:
    """Let the head have this rank's rows: `[padded, E]`. Of a tied one they are a view of the embeddings, and no parameter,
    unless the last rank has fewer rows than the others."""
    whole: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    embeddings: Any = module.get_input_embeddings()
    if whole.bias is not None:
        raise UnsupportedModel(f"{module.config.model_type}: its head has a bias, which --tp doesn't split")
    head = nn.Linear(whole.in_features, split.padded, bias=False, device="meta")
    if whole.weight is embeddings.weight and len(split.vocabulary) == split.padded:
        del head.weight
        head.weight = embeddings.weight.data[split.vocabulary.start : split.vocabulary.stop]
    else:
        rows_NE = torch.empty((split.padded, whole.in_features), dtype=whole.weight.dtype, device=whole.weight.device)
        head.weight = nn.Parameter(rows_NE, requires_grad=False)
    module.set_output_embeddings(head)  # type: ignore[no-untyped-call]
