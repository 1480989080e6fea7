"""One rank's part of a model, read from the checkpoint without ever holding the whole.

The model is made as if it were a smaller one, with as many layers, heads and inner dims as this rank has, so its layers run as
they are. What is theirs alone is summed behind `o_proj`, `down_proj` and experts (`instance.expert_parts`), and logits are
gathered behind the head.

Embeddings, the last norm and the head are of the first stage. Those behind it have made-up ones of a few tokens, so that they
too can be run by themselves and compared with transformers' own layers; in a step rows of the stage before come in their place.
"""

import itertools
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from gmanager.wire.logs import get_logger
from instance.checkpoint import CheckpointError, some_of, stored_tensors
from instance.context import AttentionContext
from instance.errors import UnsupportedModel
from instance.expert_parts import ExpertLayout, expert_layouts, give_memory, slice_of, stored_names
from instance.latent import LatentDims
from instance.layers import are_experts, can_be_split, has_dense_parts
from instance.part_config import (
    empty_model,
    expert_inner,
    head_widths,
    layers_of_stage,
    part_of_config,
    refuse_other_layers,
    refuse_torn_blocks,
)
from instance.quantised import QuantisedLinear, is_tied, linears_but_head, quantise_head, quantised_parts, replace_part
from instance.split import Place, Split
from instance.stored import (
    Form,
    PackedExperts,
    block_start,
    pack_experts,
    part_of_matrix,
    place_stored,
    slices_of,
    stored_matrices,
)
from kernels.products import Quantised, Scheme, dequantise, quantise

log = get_logger("instance")

_SUMMED = ("o_proj", "down_proj")
_OF_KV_HEADS = ("k_proj", "v_proj")
_OF_MLP = ("gate_proj", "up_proj", "down_proj")
_SHARED = "shared_experts"
"""An MLP of as many experts, that all rows go to."""

_MADE_UP_SIZE = 0.02
"""Of each number of embeddings that a stage hasn't, as models are commonly initialised with."""
_LAYER = re.compile(r"(\blayers\.)(\d+)\.")
"""In the name of a weight."""


@dataclass(frozen=True, slots=True)
class Bits:
    """Of which weights are of fewer bits than rows."""

    linears: Form | Scheme | None = None
    """In which form of 8 bits linear layers are stored, or what they become as they are read; None: neither."""
    packs_experts: bool = False
    """Whether experts are stored packed, and stay so."""

    @property
    def are_plain(self) -> bool:
        """Whether all are of the type of rows."""
        return self.linears is None and not self.packs_experts


PLAIN = Bits()


def has_dense_layers(config: PretrainedConfig, attention: str) -> bool:
    """Whether the model of that config has `instance.layers.has_dense_parts`. `attention`: name of the attention function."""
    return has_dense_parts(empty_model(config, torch.float32, torch.device("meta"), attention))


def empty_part(
    config: PretrainedConfig, place: Place, dtype: torch.dtype, device: torch.device, attention: str
) -> PreTrainedModel:
    """That rank's part of a model, whose weights are whatever is in memory. `attention`: name of the attention function.

    Raises UnsupportedModel for layers that have other parts than Llama's, Gemma's or DeepSeek's.
    """
    module, split = _with_whole_head(config, place, dtype, device, attention)
    if place.parts > 1:
        _split_head(module, split)
    return module


def _with_whole_head(
    config: PretrainedConfig, place: Place, dtype: torch.dtype, device: torch.device, attention: str
) -> tuple[PreTrainedModel, Split]:
    """As `empty_part`, but for the head."""
    smaller, split = part_of_config(config, place)
    module = empty_model(smaller, dtype, device, attention)
    # all ranks look at the whole model, and come to the same
    whole = module if place.stages == 1 else empty_model(config, torch.float32, torch.device("meta"), attention)
    if not can_be_split(whole, lambda attention: LatentDims.of(attention) is not None):
        raise UnsupportedModel(
            f"{config.model_type}: {place.flags} splits layers that have the parts of Llama's, Gemma's or DeepSeek's, and this "
            "model's have others"
        )
    if place.stages > 1:
        refuse_other_layers(config, place, whole, attention)
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    if place.parts > 1 and head.bias is not None:
        raise UnsupportedModel(f"{config.model_type}: its head has a bias, which {place.flags} doesn't split")
    return module, split


def load_part(
    path: Path,
    config: PretrainedConfig,
    place: Place,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    bits: Bits = PLAIN,
) -> PreTrainedModel:
    """That rank's part of a resolved checkpoint, as `empty_part`. `bits`: in which forms its weights are.

    Raises UnsupportedModel, and CheckpointError if a weight is missing or has another shape than the config says.
    """
    # what isn't touched of a host's memory takes none: no more of a layer of fewer bits is ever there than is read of it
    first_device = device if bits.are_plain else torch.device("cpu")
    module, split = _with_whole_head(config, place, dtype, first_device, attention)
    with torch.no_grad(), ExitStack() as opened:
        if bits.packs_experts:
            pack_part(module, config, place)
            give_memory(module, device)
        source = _Source(path, opened, module, config, place, bits.linears)
        ends = {id(weight) for weight in _ends(module)} if place.stage else set()
        source.refuse_missing(name for name, weight in module.named_parameters() if id(weight) not in ends)
        source.refuse_missing(_stored_buffers(module))
        if bits.linears is not None:
            _place_linears(module, source, bits.linears, device)
        module.to(device)  # type: ignore[arg-type]
        if place.parts > 1:
            _split_head(module, split)  # on its device: it may be a view of the embeddings
        if place.stage:
            _make_up_ends(module)
        _fill(module, source, made_up=_ends(module) if place.stage else [])
        if isinstance(bits.linears, str):
            quantise_head(module, device)
    module.train(False)
    return module


def place_part_by_config(module: PreTrainedModel, config: PretrainedConfig, place: Place, form: Form | PackedExperts) -> None:
    """Give a rank's part on `meta`, of the model of that config, the weights that `load_part` would."""
    if isinstance(form, PackedExperts):
        pack_part(module, config, place)
        return
    shape = _Whole(module, config, place)
    for name, linear in linears_but_head(module).items():
        if form.is_of(shape.name(name)) and shape.keeps_blocks(name, form):
            place_stored(module, name, linear, form)


def pack_part(module: PreTrainedModel, config: PretrainedConfig, place: Place) -> None:
    """Give the experts of a rank's part the places of packed weights, on `meta`. Raises UnsupportedModel, on all ranks alike,
    and CheckpointError."""
    refuse_torn_blocks(config, place)
    pack_experts(module)


class _Whole:
    """The whole model, as a rank has its part of it."""

    def __init__(self, module: PreTrainedModel, config: PretrainedConfig, place: Place) -> None:
        """`module`: that is to hold the part."""
        text = config.get_text_config()
        self._heads = int(text.num_attention_heads)
        self._kv_heads = int(getattr(text, "num_key_value_heads", None) or self._heads)
        self._inner = int(text.intermediate_size)
        self._widths = head_widths(text)
        self._first_layer = layers_of_stage(config, place).start
        self._vocab_size = int(text.vocab_size)
        self._expert_inner = expert_inner(text)
        self._splits = [part_of_config(config, replace(place, part=part))[1] for part in range(place.parts)]
        self.split = self._splits[place.part]
        """What this rank has."""
        base = module.get_decoder()  # type: ignore[no-untyped-call]
        self._inside = next(f"{name}." for name, part in module.named_modules() if part is base)
        """What names of the decoder begin with. What is beside it, a tower that sees pictures, is whole on all ranks."""
        shared = [part.gate_proj for name, part in module.named_modules() if name.endswith(f".{_SHARED}")]
        self._shared = shared[0].out_features // len(self.split.expert_inner) if shared else 0
        """So many experts are in one MLP."""

    def name(self, own: str) -> str:
        """What a weight or a layer is called there."""
        return _name_in_whole(own, self._first_layer) if own.startswith(self._inside) else own

    def ranges(self, name: str) -> tuple[range | None, range | None]:
        """Rows and columns of a weight that are this rank's; None: all."""
        found = self._split_by(name, self.split)
        if found is None:
            return None, None
        *_, parent, own = name.split(".")
        if parent not in _SUMMED:
            return found[0], None
        return None, found[0] if own == "weight" else None

    def shape(self, name: str, part: torch.Size) -> tuple[int, ...]:
        """Of a weight of which this rank's part has that shape."""
        (rows, columns), found = self.ranges(name), self._split_by(name, self.split)
        size = 0 if found is None else found[1]
        return (part[0] if rows is None else size, *(part[1:] if columns is None else (size,)))

    def _split_by(self, name: str, split: Split) -> tuple[range, int] | None:
        """Which are that part's of the rows of a weight (of the columns, where parts are summed), of how many; None: it isn't
        split."""
        *before, parent, own = name.split(".")
        if not name.startswith(self._inside):
            return None
        if own == "sinks":
            its, count, width = split.heads, self._heads, 1
        elif parent in _OF_KV_HEADS and parent in self._widths:
            its, count, width = split.kv_heads, self._kv_heads, self._widths[parent]
        elif parent in self._widths:
            its, count, width = split.heads, self._heads, self._widths[parent]
        elif parent in _OF_MLP and before[-1] == _SHARED:
            its, count, width = split.expert_inner, self._expert_inner, self._shared
        elif parent in _OF_MLP:
            its, count, width = split.inner, self._inner, 1
        else:
            return None
        return range(its.start * width, its.stop * width), count * width

    def keeps_blocks(self, name: str, form: Form) -> bool:
        """Whether no rank's part of a layer's features in begins within a block of the form. All ranks must come to the same:
        how many rows they warm up with depends on it."""
        if name.rpartition(".")[2] not in _SUMMED:
            return True
        parts = [self._split_by(f"{name}.weight", split) for split in self._splits]
        return all(its is None or block_start(form, its[0].start, its[1]) == its[0].start for its in parts)


class _Source(_Whole):
    """Its checkpoint, of whose weights no more than a part is read."""

    def __init__(
        self,
        folder: Path,
        opened: ExitStack,
        module: PreTrainedModel,
        config: PretrainedConfig,
        place: Place,
        bits: Form | Scheme | None,
    ) -> None:
        """`module`: that is to hold the part. Raises CheckpointError if weights of 8 bits aren't of the form that is said, and
        UnsupportedModel."""
        super().__init__(module, config, place)
        self._stored = slices_of(folder, opened)
        self._folder = folder
        self._layouts = expert_layouts(module)
        self._names = stored_names(module, self._stored)
        """By what a weight is called in the whole model, what it is made of."""
        self._form = bits if isinstance(bits, Form) else None
        self._matrices = set() if self._form is None else stored_matrices(folder, self._form, stored_tensors(folder))

    def refuse_missing(self, names: Iterable[str]) -> None:
        """Raises CheckpointError if it lacks one of these weights."""
        if missing := {self.name(name) for name in names} - self._names.keys():
            raise CheckpointError(
                f"{self._folder} lacks {len(missing)} of the weights that its config asks for: {some_of(missing)}"
            )

    def matrix(self, name: str, part: torch.Size) -> Quantised | None:
        """The weight of a linear layer, of that shape, if it is stored in 8 bits and stays so. Raises CheckpointError."""
        if self._form is None or self.name(name) not in self._matrices or not self.keeps_blocks(name, self._form):
            return None
        stored = self._one(f"{name}.weight", self.shape(f"{name}.weight", part))
        rows, columns = self.ranges(f"{name}.weight")
        return self._matrix(stored, self._form, _all_if_none(rows, part[0]), _all_if_none(columns, part[1]))

    def read(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """What a plain weight is to hold. Raises CheckpointError."""
        *_, parent, own = name.split(".")
        if (layout := self._layouts.get(name.rpartition(".")[0])) is not None:
            return self._read_experts(name, layout, part)
        stored = self._one(name, self.shape(name, part.shape))
        rows, columns = self.ranges(name)
        if own == "bias" and parent in _SUMMED and not self.split.is_first:
            return torch.zeros_like(part)
        return self._read(stored, rows, columns, part.dtype)

    def read_head(self, name: str, part_VE: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the head, which is called so. Raises CheckpointError."""
        stored = self._one(name, (self._vocab_size, part_VE.shape[1]))
        return self._read(stored, self.split.vocabulary, None, part_VE.dtype)

    def _read_experts(self, name: str, layout: ExpertLayout, part: torch.Tensor) -> torch.Tensor:
        """What a weight of experts is to hold. Raises CheckpointError."""
        inner = self.split.expert_inner
        its = slice_of(name.rpartition(".")[2], layout, inner, self._expert_inner)
        if its is None:  # a bias of sums
            stored = self._one(name, part.shape)
            return self._read(stored, None, None, part.dtype) if self.split.is_first else torch.zeros_like(part)
        made_of = self._names[self.name(name)]
        if len(self._stored[made_of[0][0]].get_shape()) == part.dim():  # of all experts together
            together = self._stored[self._one(name, its.whole_shape(part.shape))]
            if part.dtype == torch.uint8 and together.get_dtype() != "U8":
                raise CheckpointError(f"{self._folder}: packed {self.name(name)} is of type {together.get_dtype()}, not U8")
            return its.of(together)
        if [len(matrices) for matrices in made_of] != [len(part)] * len(its.ranges):
            raise CheckpointError(
                f"{self._folder}: {self.name(name)} is of {len(part)} experts by the config, and made of "
                f"{sum(map(len, made_of))} matrices"
            )
        rows, columns = (inner, None) if its.axis == 1 else (None, inner)
        whole = its.whole_shape(part.shape)[1:]
        for stored in itertools.chain(*made_of):
            self._refuse_other_shape(stored, (whole[0] // len(made_of), whole[1]))
        experts = [torch.cat([self._read(m, rows, columns, part.dtype) for m in its]) for its in zip(*made_of, strict=True)]
        return torch.stack(experts)

    def _read(self, stored: str, rows: range | None, columns: range | None, dtype: torch.dtype) -> torch.Tensor:
        """Some rows, or some columns, of what is stored under that name."""
        slices: Any = self._stored[stored]
        part: torch.Tensor
        num_rows, *_ = shape = slices.get_shape()
        rows = _all_if_none(rows, num_rows)
        if self._form is None or stored.removesuffix(".weight") not in self._matrices:
            part = slices[rows.start : rows.stop] if columns is None else slices[:, columns.start : columns.stop]
            return part
        wanted = _all_if_none(columns, shape[1])
        start = block_start(self._form, wanted.start, shape[1])
        matrix = self._matrix(stored, self._form, rows, range(start, wanted.stop))
        return dequantise(matrix, dtype, backend="torch")[:, wanted.start - start :]

    def _matrix(self, stored: str, form: Form, rows: range, columns: range) -> Quantised:
        scale = self._stored[f"{stored.removesuffix('.weight')}.{form.scale}"]
        return part_of_matrix(self._stored[stored], scale, form, rows, columns)

    def _one(self, name: str, wanted: tuple[int, ...]) -> str:
        """Under which name the whole of a weight is stored, in that shape. Raises CheckpointError."""
        whole = self.name(name)
        stored = self._names[whole][0][0]
        if self._names[whole] != [[stored]]:
            raise CheckpointError(f"{self._folder}: {whole} is made of {sum(map(len, self._names[whole]))} weights, not one")
        self._refuse_other_shape(stored, wanted)
        return stored

    def _refuse_other_shape(self, stored: str, wanted: tuple[int, ...]) -> None:
        if (found := tuple(self._stored[stored].get_shape())) != tuple(wanted):
            raise CheckpointError(f"{self._folder}: {stored} is {found}, and {tuple(wanted)} by the config")


def _all_if_none(some: range | None, count: int) -> range:
    return range(count) if some is None else some


def _place_linears(module: PreTrainedModel, source: _Source, bits: Form | Scheme, device: torch.device) -> None:
    """Give a part, but for its head, the linear layers of 8 bits that it is to have."""
    layers = linears_but_head(module)
    for name, linear in layers.items():
        matrix: Quantised | None
        if isinstance(bits, Form):
            matrix = source.matrix(name, linear.weight.shape)
        else:
            matrix = quantise(source.read(f"{name}.weight", linear.weight).to(device, linear.weight.dtype), bits)
        if matrix is not None:
            weight_NE = matrix.weight_NE.to(device, copy=True).contiguous()  # what was read is the file, mapped
            replace_part(
                module,
                name,
                QuantisedLinear(replace(matrix, weight_NE=weight_NE, scale_NG=matrix.scale_NG.to(device)), linear.bias),
            )
    matrices = len(quantised_parts(module))
    log.info("weights of 8 bits, in this part", matrices=matrices, plain=len(layers) - matrices)


def _fill(module: PreTrainedModel, source: _Source, *, made_up: list[torch.Tensor]) -> None:
    """Read all weights that are plain and not made up."""
    embeddings: Any = module.get_input_embeddings()
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    done = {id(weight) for part in quantised_parts(module) for weight in (part.weight, part.weight_scale)}
    done |= {id(weight) for weight in made_up}
    wanted = {name: weight for name, weight in module.named_parameters() if id(weight) not in done}
    (of_embeddings,) = [name for name, weight in wanted.items() if weight is embeddings.weight] or [""]
    for name, weight in wanted.items():
        if weight is head.weight and weight is not embeddings.weight:
            own = weight[: len(source.split.vocabulary)]
            weight[len(own) :] = 0
            own.copy_(source.read_head(of_embeddings if is_tied(module) else name, own))
        else:
            weight.copy_(source.read(name, weight))
    for name, buffer in _stored_buffers(module).items():
        buffer.copy_(source.read(name, buffer))


def _stored_buffers(module: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint has beside parameters: what routers add to their scores, say."""
    made_anew = [re.compile(pattern) for pattern in module._keys_to_ignore_on_load_missing or ()]
    kept = module.state_dict().keys()
    return {
        name: buffer
        for name, buffer in module.named_buffers()
        if name in kept and not any(pattern.search(name) for pattern in made_anew)
    }


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

    base: Any = module.get_decoder()  # type: ignore[no-untyped-call]
    for name, part in base.named_modules():
        if name.rpartition(".")[2] in _SUMMED or are_experts(part):
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


def _split_head(module: PreTrainedModel, split: Split) -> None:
    """Let the head have this rank's rows: `[padded, E]`. Of a tied one they are a view of the embeddings, and no parameter,
    unless the last rank has fewer rows than the others."""
    whole: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    embeddings: Any = module.get_input_embeddings()
    head = nn.Linear(whole.in_features, split.padded, bias=False, device="meta")
    if whole.weight is embeddings.weight and len(split.vocabulary) == split.padded:
        del head.weight
        head.weight = embeddings.weight.data[split.vocabulary.start : split.vocabulary.stop]
    else:
        rows_NE = torch.empty((split.padded, whole.in_features), dtype=whole.weight.dtype, device=whole.weight.device)
        head.weight = nn.Parameter(rows_NE, requires_grad=False)
    module.set_output_embeddings(head)  # type: ignore[no-untyped-call]
