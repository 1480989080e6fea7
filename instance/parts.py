"""One rank's part of a model, read from the checkpoint without ever holding the whole.

The model is made as if it were a smaller one, with as many layers, heads and inner dims as this rank has, so its layers run as
they are. What is theirs alone is summed behind `o_proj` and `down_proj`, and logits are gathered behind the head.

Embeddings, the last norm and the head are of the first stage. Those behind it have made-up ones of a few tokens, so that they
too can be run by themselves and compared with transformers' own layers; in a step rows of the stage before come in their place.
"""

import copy
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from gmanager.wire.logs import get_logger
from instance.checkpoint import CheckpointError, some_of, stored_tensors, weight_files
from instance.context import AttentionContext
from instance.errors import UnsupportedModel
from instance.layers import has_dense_parts
from instance.quantised import QuantisedLinear, is_tied, linears_of, quantise_head, quantised_parts, replace_part
from instance.split import Place, Split, split_of, stages_of
from instance.stored import Form, begins_block, part_of_matrix, place_stored, stored_matrices
from kernels.products import Kind, Quantised, dequantise, quantise

log = get_logger("instance")

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
    module, split = _with_whole_head(config, place, dtype, device, attention)
    if place.parts > 1:
        _split_head(module, split)
    return module, split


def _with_whole_head(
    config: PretrainedConfig, place: Place, dtype: torch.dtype, device: torch.device, attention: str
) -> tuple[PreTrainedModel, Split]:
    smaller, split = part_of_config(config, place)
    module = _empty(smaller, dtype, device, attention)
    if not has_dense_parts(module):
        raise UnsupportedModel(
            f"{config.model_type}: {place.flags} splits layers that have the parts of Llama's or Gemma's and a dense MLP, "
            "and this model's have others"
        )
    return module, split


def load_part(
    path: Path,
    config: PretrainedConfig,
    place: Place,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    bits: Form | Kind | None = None,
) -> PreTrainedModel:
    """That rank's part of a resolved checkpoint, as `empty_part`. `bits`: in which form of 8 bits its linear layers are stored,
    or what they become as they are read; None: neither.

    Raises UnsupportedModel, and CheckpointError if a weight is missing or has another shape than the config says.
    """
    # what isn't touched of a host's memory takes none: no more of a layer of 8 bits is ever there than is read of it
    around = device if bits is None else torch.device("cpu")
    module, split = _with_whole_head(config, place, dtype, around, attention)
    with torch.no_grad(), ExitStack() as opened:
        source = _Source(path, opened, split, module, layers_of_stage(config, place).start, bits)
        not_stored = {id(weight) for weight in (_ends(module) if place.stage else _tied(module))}
        source.refuse_missing(name for name, weight in module.named_parameters() if id(weight) not in not_stored)
        if bits is not None:
            _place_linears(module, source, bits, device)
            module.to(device)  # type: ignore[arg-type]
        if place.parts > 1:
            _split_head(module, split)
        if place.stage:
            _make_up_ends(module)
        _fill(module, source, split, made_up=_ends(module) if place.stage else [])
        if isinstance(bits, str):
            quantise_head(module, device)
    module.train(False)
    return module


def place_part_by_config(module: PreTrainedModel, config: PretrainedConfig, place: Place, form: Form) -> None:
    """Give a rank's part on `meta`, of the model of that config, the weights that `load_part` would."""
    _, split = part_of_config(config, place)
    text, head_dim = config.get_text_config(), int(module.config.get_text_config().head_dim)
    wide = {"o_proj": text.num_attention_heads * head_dim, "down_proj": text.intermediate_size}
    first = layers_of_stage(config, place).start
    for name, linear in _but_head(module).items():
        _, columns = _ranges(f"{name}.weight", split, head_dim)
        fits = columns is None or begins_block(form, columns, wide[name.rpartition(".")[2]])
        if fits and form.is_of(_name_in_whole(name, first)):
            place_stored(module, name, linear, form)


class _Source:
    """A checkpoint as one rank reads it: its part of each weight, and no more."""

    def __init__(
        self, folder: Path, opened: ExitStack, split: Split, part: PreTrainedModel, first_layer: int, bits: Form | Kind | None
    ) -> None:
        """Raises CheckpointError if weights of 8 bits aren't of the form that is said."""
        files = [opened.enter_context(safe_open(file, framework="pt")) for file in weight_files(folder)]
        self._stored: dict[str, Any] = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118
        self._folder = folder
        self._split = split
        self._head_dim = int(part.config.get_text_config().head_dim)
        self._first_layer = first_layer
        self._form = bits if isinstance(bits, Form) else None
        self._matrices = set() if self._form is None else stored_matrices(folder, self._form, stored_tensors(folder))

    def refuse_missing(self, names: Iterable[str]) -> None:
        """Raises CheckpointError if it lacks one of these weights."""
        if missing := {self._whole(name) for name in names} - self._stored.keys():
            raise CheckpointError(
                f"{self._folder} lacks {len(missing)} of the weights that its config asks for: {some_of(missing)}"
            )

    def matrix(self, name: str) -> Quantised | None:
        """The weight of the linear layer of that name, if it is stored in 8 bits, and blocks end where this part does."""
        base = self._whole(name)
        if self._form is None or base not in self._matrices:
            return None
        weight, scale = self._stored[f"{base}.weight"], self._stored[f"{base}.{self._form.scale}"]
        num_out, num_in = weight.get_shape()
        rows, columns = _ranges(f"{name}.weight", self._split, self._head_dim)
        if columns is not None and not begins_block(self._form, columns, num_in):
            return None
        return part_of_matrix(weight, scale, self._form, rows or range(num_out), columns or range(num_in))

    def read(self, name: str, weight: torch.Tensor, rows: range | None = None) -> torch.Tensor:
        """What a plain weight of that name is to hold. `rows`: of it, if the name doesn't tell.

        Raises CheckpointError if what is stored has another shape.
        """
        whole = self._whole(name)
        own_rows, columns = _ranges(name, self._split, self._head_dim)
        rows = rows or own_rows
        part: torch.Tensor
        if self._form is not None and (base := whole.removesuffix(".weight")) in self._matrices:
            stored, scale = self._stored[whole], self._stored[f"{base}.{self._form.scale}"]
            num_out, num_in = stored.get_shape()
            matrix = part_of_matrix(stored, scale, self._form, rows or range(num_out), range(num_in))
            part = dequantise(matrix, weight.dtype, backend="torch")
        else:
            stored = self._stored[whole]
            part = stored[rows.start : rows.stop] if rows is not None else stored[:]
        if columns is not None:
            part = part[:, columns.start : columns.stop]
        if part.shape != weight.shape:
            raise CheckpointError(
                f"{whole} is {tuple(stored.get_shape())}, of which {tuple(weight.shape)} should be this rank's"
            )
        if whole.endswith(".bias") and whole.split(".")[-2] in _SUMMED and not self._split.is_first:
            return torch.zeros_like(part)
        return part

    def _whole(self, name: str) -> str:
        """What a weight or a layer is called in the whole model."""
        return _name_in_whole(name, self._first_layer)


def _place_linears(module: PreTrainedModel, source: _Source, bits: Form | Kind, device: torch.device) -> None:
    """Give a part, but for its head, the linear layers of 8 bits that it is to have."""
    layers = _but_head(module)
    for name, linear in layers.items():
        matrix: Quantised | None
        if isinstance(bits, Form):
            matrix = source.matrix(name)
        else:
            matrix = quantise(source.read(f"{name}.weight", linear.weight).to(device, linear.weight.dtype), bits)
        if matrix is not None and matrix.shape != linear.weight.shape:
            raise CheckpointError(f"{name} is {tuple(matrix.shape)} here, and should be {tuple(linear.weight.shape)}")
        if matrix is not None:
            on_device = Quantised(matrix.weight_NE.to(device).contiguous(), matrix.scale_NG.to(device), matrix.group)
            replace_part(module, name, QuantisedLinear(on_device, linear.bias))
    matrices = len(quantised_parts(module))
    log.info("weights of 8 bits, in this part", matrices=matrices, plain=len(layers) - matrices)


def _fill(module: PreTrainedModel, source: _Source, split: Split, *, made_up: list[torch.Tensor]) -> None:
    """Read all weights that are plain and not made up."""
    embeddings: Any = module.get_input_embeddings()
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    done = {id(weight) for part in quantised_parts(module) for weight in (part.weight, part.weight_scale)}
    done |= {id(weight) for weight in made_up}
    wanted = {name: weight for name, weight in module.named_parameters() if id(weight) not in done}
    (of_embeddings,) = [name for name, weight in wanted.items() if weight is embeddings.weight] or [""]
    for name, weight in wanted.items():
        if weight is head.weight and weight is not embeddings.weight:
            own = weight[: len(split.vocabulary)]
            weight[len(own) :] = 0
            own.copy_(source.read(of_embeddings if is_tied(module) else name, own, split.vocabulary))
        else:
            weight.copy_(source.read(name, weight))


def _tied(module: PreTrainedModel) -> list[torch.Tensor]:
    """The weight of a head that is one with the embeddings."""
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    embeddings: Any = module.get_input_embeddings()
    return [head.weight] if is_tied(module) and head.weight is not embeddings.weight else []


def _but_head(module: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of a part, but for its head."""
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    return {name: linear for name, linear in linears_of(module).items() if linear is not head}


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
