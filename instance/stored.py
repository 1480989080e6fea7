"""Checkpoints whose weights are stored in 8 bits or less, in the forms in which they are published, read as they are.

    compressed-tensors   `weight` (e4m3 or int8) and `weight_scale`: one for all, one for each feature out, or blocks of them
    fp8                  `weight` (e4m3) and `weight_scale_inv`: one for each block of 128 x 128 (fine-grained: DeepSeek, Qwen);
                         without blocks `weight_scale`, one for all
    mxfp4                experts packed in blocks of 32 numbers of 4 bits (`instance.packed`): gpt-oss as it is shipped

A weight is what is stored times its scale in all of them, `weight_scale_inv` notwithstanding. What such a checkpoint says
of rows (that they be rounded to 8 bits, by a scale of each or by `input_scale`) is not done: `kernels.products` keeps rows in
their own type, which is nearer to what the model was. Weights for which there is no linear layer of ours (experts, what latent
attention takes apart) are dequantised as they are read. What a config says is refused or taken before weights are looked at.

Sources: the configs of compressed-tensors 0.12 (`QuantizationConfig`), of vLLM's `Fp8Config` and transformers'
`FineGrainedFP8Config`.

Shape suffixes: E features in, N features out, G groups of features in that share a scale.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gmanager.wire.logs import get_logger
from instance.checkpoint import CheckpointError, load_whole, some_of, stored_tensors, weight_files
from instance.errors import UnsupportedModel
from instance.packed import PARTS, can_be_packed, pack
from instance.quantised import QuantisedLinear, linears_of, replace_part
from kernels.experts import PACKED_BYTES
from kernels.products import TYPES, Kind, Quantised, dequantise

log = get_logger("instance")

_KINDS: dict[str, Kind] = {"F8_E4M3": "fp8", "I8": "int8"}
"""By the names that safetensors has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How a checkpoint's linear layers are stored."""

    method: str
    """As its config calls it."""
    kind: Kind
    scale: str
    """Name of a weight's scales."""
    block: tuple[int, int] | None
    """Features out and in that share a scale; None: those of a matrix, or of a feature out."""
    targets: tuple[str, ...]
    """Names of the layers, or `re:` and a pattern; `Linear`: all."""
    kept: tuple[str, ...]
    """Of those that are plain, likewise."""

    def is_of(self, name: str) -> bool:
        """Whether the config says that a linear layer is stored so."""
        return any(target == "Linear" or _names(target, name) for target in self.targets) and not any(
            _names(kept, name) for kept in self.kept
        )

    def group(self, num_in: int) -> int:
        """How many of so many features in share a scale."""
        return num_in if self.block is None else min(self.block[1], num_in)


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """That a checkpoint's experts are packed, and nothing else is stored otherwise than plain."""


def form_of(config: PretrainedConfig, name: str) -> Form | PackedExperts | None:
    """How the weights of the model `name` are stored; None: plain. Raises UnsupportedModel for a form that isn't read."""
    settings = settings_of(config)
    match settings.get("quant_method"):
        case None if not settings:
            return None
        case "mxfp4":
            return PackedExperts()
        case "compressed-tensors":
            return _of_compressed_tensors(settings, name)
        case "fp8":
            return _of_fp8(settings, name)
    raise _not_read(settings, name, "")


def settings_of(config: PretrainedConfig) -> dict[str, Any]:
    """What a config says of how weights are quantised; empty: they aren't."""
    given: Any = getattr(config, "quantization_config", None) or {}
    return dict(given if isinstance(given, Mapping) else given.to_dict())


def _of_compressed_tensors(settings: dict[str, Any], name: str) -> Form:
    groups = list(dict(settings.get("config_groups") or {}).values())
    weights = [dict(group.get("weights") or {}) for group in groups]
    if not groups or any(one != weights[0] for one in weights):
        raise _not_read(settings, name, f"{len(groups)} groups of layers")
    (first, *_) = weights
    strategy, bits, kind = first.get("strategy"), first.get("num_bits"), first.get("type")
    kinds: dict[Any, Kind] = {"float": "fp8", "int": "int8"}
    what = f"{bits} bits ({kind}), a scale for each {strategy}, {'' if first.get('symmetric', True) else 'not '}symmetric"
    formats = {settings.get("format")} | {group.get("format") for group in groups} - {None}
    is_dense = dict(settings.get("sparsity_config") or {}).get("format", "dense") == "dense"
    if (
        bits != 8
        or kind not in kinds
        or strategy not in ("tensor", "channel", "block", "group")
        or not first.get("symmetric", True)
        or not formats <= {"float-quantized", "int-quantized", "naive-quantized"}
        or not is_dense
    ):
        raise _not_read(settings, name, what if is_dense else f"{what}, sparse")
    block = None
    if strategy == "block":
        rows, columns = first.get("block_structure") or (0, 0)
        block = (int(rows), int(columns))
    elif strategy == "group":
        block = (1, int(first.get("group_size") or 0))
    if block is not None and min(block) < 1:
        raise _not_read(settings, name, f"{what}, blocks of {block[0]} x {block[1]}")
    return Form(
        method="compressed-tensors",
        kind=kinds[kind],
        scale="weight_scale",
        block=block,
        targets=tuple(dict.fromkeys(target for group in groups for target in group.get("targets") or ())),
        kept=tuple(settings.get("ignore") or ()),
    )


def _of_fp8(settings: dict[str, Any], name: str) -> Form:
    block = settings.get("weight_block_size")
    if settings.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn") or (
        block is not None and (len(block) != 2 or min(block) < 1)
    ):
        raise _not_read(settings, name, f"fmt {settings.get('fmt')}, blocks of {block}")
    kept = tuple(settings.get("modules_to_not_convert") or settings.get("ignored_layers") or ())
    return Form(
        method="fp8",
        kind="fp8",
        scale="weight_scale" if block is None else "weight_scale_inv",
        block=None if block is None else (int(block[0]), int(block[1])),
        targets=("Linear",),
        kept=(*kept, "lm_head"),
    )


def _not_read(settings: dict[str, Any], name: str, what: str) -> UnsupportedModel:
    form = settings.get("format") or settings.get("fmt")
    bits = settings.get("bits") or settings.get("num_bits")
    said = [f"quant_method {settings.get('quant_method')}", *([] if form is None else [f"format {form}"])]
    said += ([] if bits is None else [f"{bits} bits"]) + ([what] if what else [])
    return UnsupportedModel(
        f"{name}: its weights are stored in a form that isn't read: {', '.join(said)}; read are compressed-tensors of 8 bits, "
        "fp8 (e4m3) and mxfp4"
    )


def _names(pattern: str, name: str) -> bool:
    """Whether an entry of a config's list means the layer `name`: it, a part of its path, or by a pattern."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return f".{pattern}." in f".{name}."


class StoredLinear(nn.Module):
    """Where a linear layer's weight and scales are put while a model is loaded, by the names and in the shapes that they have
    in its checkpoint."""

    def __init__(self, linear: nn.Linear, form: Form, scale: torch.Tensor) -> None:
        """`scale`: of its shape and type, on `meta`."""
        super().__init__()
        self.form = form
        weight = torch.empty_like(linear.weight, dtype=TYPES[form.kind], device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter(form.scale, nn.Parameter(scale, requires_grad=False))
        self.bias = linear.bias

    def settled(self) -> QuantisedLinear:
        """What runs."""
        matrix = as_matrix(self.weight.data, self.get_parameter(self.form.scale).data, self.form)
        return QuantisedLinear(matrix, None if self.bias is None else self.bias.data)


def as_matrix(weight_NE: torch.Tensor, scale: torch.Tensor, form: Form) -> Quantised:
    """A weight with its scales as they are stored. Blocks of features out get a scale for each feature: with 128 x 128, 3 % of
    the weight's bytes, and parts of a merged matrix may end within one.

    Raises ValueError if there are more or fewer scales than the form has.
    """
    return Quantised(weight_NE, *_scales(scale, form, *weight_NE.shape))


def part_of_matrix(weight: Any, scale: Any, form: Form, rows: range, columns: range) -> Quantised:
    """Those features out and in of a stored matrix, of which no more is read. `weight` and `scale`: of safetensors.

    Columns must begin where a block does (`block_start`). Raises ValueError as `as_matrix`.
    """
    num_out, num_in = weight.get_shape()
    scale_NG, group = _scales(scale[...], form, num_out, num_in)
    groups = slice(columns.start // group, -(-columns.stop // group))
    part_NE = weight[rows.start : rows.stop, columns.start : columns.stop]
    return Quantised(part_NE, scale_NG[rows.start : rows.stop, groups].contiguous(), min(group, len(columns)))


def block_start(form: Form, column: int, num_in: int) -> int:
    """Where that block of `num_in` features in begins whose features share a scale with this one."""
    group = form.group(num_in)
    return column // group * group


def _scales(scale: torch.Tensor, form: Form, num_out: int, num_in: int) -> tuple[torch.Tensor, int]:
    """`[N, G]`, and how many features in share one. Raises ValueError if there are more or fewer than the form has."""
    full = scale.float()
    if form.block is not None:
        rows, columns = form.block
        if full.shape != (-(-num_out // rows), -(-num_in // columns)):
            raise ValueError(f"scales {tuple(scale.shape)} for weights {num_out} x {num_in} in blocks of {rows} x {columns}")
        return full.repeat_interleave(rows, 0)[:num_out].contiguous(), form.group(num_in)
    if full.numel() == 1:
        full = full.reshape(1, 1).expand(num_out, 1)
    elif full.shape not in ((num_out,), (num_out, 1)):
        raise ValueError(f"scales {tuple(scale.shape)} for weights {num_out} x {num_in}")
    return full.reshape(num_out, 1).contiguous(), form.group(num_in)


class _Dequantised:
    """A weight of a checkpoint that is read, and dequantised, when the loader asks for it."""

    def __init__(self, weight: Any, scale: Any, form: Form, dtype: torch.dtype) -> None:
        """`weight` and `scale`: of safetensors."""
        self._parts = weight, scale
        self._form = form
        self._dtype = dtype

    def __getitem__(self, _: object) -> torch.Tensor:
        weight, scale = (part[...] for part in self._parts)
        return dequantise(as_matrix(weight, scale, self._form), self._dtype, backend="torch")


def place_by_config(module: PreTrainedModel, form: Form | PackedExperts) -> None:
    """Give a model on `meta` the weights that it would have once a checkpoint of that form is loaded."""
    if isinstance(form, PackedExperts):
        pack_experts(module)
        return
    for name, linear in linears_of(module).items():
        if form.is_of(name):
            place_stored(module, name, linear, form)


def place_stored(module: nn.Module, name: str, linear: nn.Linear, form: Form) -> None:
    """Give that linear layer, on `meta`, the weight and scales that it has once such a checkpoint is loaded."""
    num_out, num_in = linear.weight.shape
    group = form.group(num_in)
    weight = torch.empty((num_out, num_in), dtype=TYPES[form.kind], device="meta")
    scale = torch.empty((num_out, -(-num_in // group)), dtype=torch.float32, device="meta")
    replace_part(module, name, QuantisedLinear(Quantised(weight, scale, group), linear.bias))


def load_stored(
    folder: Path, config: PretrainedConfig, form: Form | PackedExperts, dtype: torch.dtype, *, attn_implementation: str
) -> PreTrainedModel:
    """The causal language model of a directory that is stored in that form; what is plain becomes `dtype`.

    `config`: without what it says of that. Raises CheckpointError if weights lack their scales, or have others than the form
    says.
    """
    tensors = stored_tensors(folder)
    options = {"config": config, "dtype": dtype, "attn_implementation": attn_implementation}
    if isinstance(form, PackedExperts):
        return _load_packed(folder, tensors, options)
    plain_name = ".weight"
    bases = stored_matrices(folder, form, tensors)
    shaped = _shaped(config)
    places = {base: name for base in bases if (name := _place_of(shaped, base)) is not None}
    fit = linears_of(shaped)
    places = {base: name for base, name in places.items() if tuple(fit[name].weight.shape) == tensors[f"{base}{plain_name}"][1]}
    scales = {f"{base}.{form.scale}": base for base in bases}
    with ExitStack() as files:
        slices = slices_of(folder, files)
        state = {name: one for name, one in slices.items() if not name.endswith(".input_scale") and name not in scales}
        for base in bases:
            weight, scale = slices[f"{base}{plain_name}"], slices[f"{base}.{form.scale}"]
            if base in places:
                state[f"{base}.{form.scale}"] = scale
            else:
                state[f"{base}{plain_name}"] = _Dequantised(weight, scale, form, dtype)
        shapes = {places[base]: _empty(*tensors[f"{base}.{form.scale}"]) for base in places}

        def place(module: PreTrainedModel) -> None:
            for name, scale in shapes.items():
                linear: Any = module.get_submodule(name)
                replace_part(module, name, StoredLinear(linear, form, scale))

        module = load_whole(None, str(folder), auto=_placed(type(shaped), place), state_dict=state, **options)
    for name, part in list(module.named_modules()):
        if isinstance(part, StoredLinear):
            replace_part(module, name, part.settled())
    log.info(
        "weights of 8 bits",
        model=str(folder),
        stored=form.method,
        type=form.kind,
        matrices=len(places),
        dequantised=len(bases) - len(places),
    )
    return module


def stored_matrices(folder: Path, form: Form, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> set[str]:
    """Names of all matrices of 8 bits, without the `.weight` behind. `tensors`: as `stored_tensors` says.

    Raises CheckpointError for weights without scales, of another type than the config says, or whose scales don't fit.
    """
    bases = {name.removesuffix(".weight"): _KINDS[kind] for name, (kind, _) in tensors.items() if kind in _KINDS}
    if not bases:
        raise CheckpointError(f"{folder}: its config says {form.method}, and none of its weights is of 8 bits")
    if others := {f"{base}.weight" for base, kind in bases.items() if kind != form.kind}:
        raise CheckpointError(
            f"{folder} has {len(others)} weights that aren't {form.kind}, as its config says: {some_of(others)}"
        )
    if lone := {f"{base}.weight" for base in bases if f"{base}.{form.scale}" not in tensors}:
        raise CheckpointError(f"{folder} has {len(lone)} weights of 8 bits without {form.scale}: {some_of(lone)}")
    for base in bases:
        weight = torch.empty(tensors[f"{base}.weight"][1], dtype=TYPES[form.kind], device="meta")
        scale = _empty(*tensors[f"{base}.{form.scale}"])
        try:
            as_matrix(weight, scale, form)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {base} has {error}") from error
    return set(bases)


def _place_of(module: PreTrainedModel, base: str) -> str | None:
    """The name of the linear layer that has a stored weight: with or without the decoder's own name before it."""
    prefix = f"{module.base_model_prefix}."
    known = linears_of(module)
    return next((name for name in (base, f"{prefix}{base}", base.removeprefix(prefix)) if name in known), None)


def _empty(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Of a type that safetensors names, on `meta`."""
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E8M0": torch.float8_e8m0fnu}
    if kind not in types:
        raise CheckpointError(f"scales of type {kind} aren't read; {', '.join(types)} are")
    return torch.empty(shape, dtype=types[kind], device="meta")


def _load_packed(
    folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], options: Mapping[str, Any]
) -> PreTrainedModel:
    names = {name for name in tensors if name.endswith(tuple(PARTS))}
    wholes = {name.removesuffix("_blocks").removesuffix("_scales") for name in names}
    torn = set()
    for whole in wholes:
        blocks, scales = (tensors.get(f"{whole}_{part}", ("", ()))[1] for part in ("blocks", "scales"))
        if not blocks or blocks != (*scales, PACKED_BYTES):
            torn.add(whole)
    if torn:
        raise CheckpointError(f"{folder} has {len(torn)} packed weights whose blocks and scales don't match: {some_of(torn)}")
    if not names:
        raise CheckpointError(f"{folder}: its config says mxfp4, and none of its weights is packed")
    with ExitStack() as files:
        auto = _placed(type(_shaped(options["config"])), pack_experts)
        module = load_whole(None, str(folder), auto=auto, state_dict=slices_of(folder, files), **options)
    log.info("experts stay packed", model=str(folder), stored="mxfp4", matrices=len(wholes))
    return module


def pack_experts(module: PreTrainedModel) -> None:
    """Raises CheckpointError for a model without such experts as are published packed."""
    experts = [part for part in module.modules() if can_be_packed(part)]
    if not experts:
        raise CheckpointError(f"{module.config.model_type} has no experts whose weights could be packed, as its config says")
    try:
        for part in experts:
            pack(part)
    except ValueError as error:
        raise CheckpointError(f"{module.config.model_type}: its experts can't be packed: {error}") from error


def _shaped(config: PretrainedConfig) -> PreTrainedModel:
    """A model on `meta`."""
    auto: Any = AutoModelForCausalLM  # its from_config has no types
    with torch.device("meta"):
        module: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    return module


def slices_of(folder: Path, files: ExitStack) -> dict[str, Any]:
    """What weights are read from, by their names, while `files` are open."""
    slices: dict[str, Any] = {}
    for file in weight_files(folder):
        opened = files.enter_context(safe_open(file, framework="pt"))
        slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    return slices


def _placed(of: type[PreTrainedModel], place: Callable[[PreTrainedModel], None]) -> Any:
    """A model's class that has other places for weights from the beginning: transformers loads what a model has places for."""

    def init(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        of.__init__(self, config, *args, **kwargs)
        place(self)
        self.__class__ = of

    return type(of.__name__, (of,), {"__init__": init, "__module__": of.__module__})
