"""One rank's part of mixtures of experts: of every expert some of the dims between gate and down.

    gate, up   of each expert the rows of these dims, whether the two lie one below the other or take turns
    down       its columns
    biases     of gate and up as their rows; of down the first part's alone, as what the parts add is summed

So all parts route alike, by whole routers, and run the experts that their rows go to each in part: as many numbers are read on
each of them, whichever experts are chosen. (Whole experts, dealt out to the parts, would leave one row's to few of them.)

A checkpoint has the matrices of experts one by one (`experts.7.gate_proj.weight`, `experts.7.w1.weight`) or all in one tensor,
which may be packed in blocks of 4 bits; which of its names make which weight is transformers' to say.

Shape suffixes: X experts, E hidden size, I dims between gate and down, N = 2 I.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from instance.errors import UnsupportedModel
from instance.layers import are_experts, gate_of
from instance.packed import PARTS, WEIGHTS
from kernels.experts import PACKED_BLOCK

_KNOWN = (MergeModulelist, Concatenate)
"""What transformers does with matrices of experts that is done here, too."""


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How a module of experts has its weights."""

    is_transposed: bool
    """`[X, in, out]`."""
    is_interleaved: bool
    """Gate and up take turns in the 2 I; else gate is the first half."""


@dataclass(frozen=True, slots=True)
class ExpertSlice:
    """Which of a whole weight a part has: of one axis these ranges, one after the other; of the others all."""

    axis: int
    ranges: tuple[range, ...]
    size: int
    """Of that axis, in the whole."""

    def whole_shape(self, part: Sequence[int]) -> tuple[int, ...]:
        """Of the weight of which this part has that shape."""
        return (*part[: self.axis], self.size, *part[self.axis + 1 :])

    def of(self, stored: Any) -> torch.Tensor:
        """That part of a weight of safetensors; no more of it is read."""
        before = (slice(None),) * self.axis
        pieces = [stored[(*before, slice(its.start, its.stop))] for its in self.ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)


def expert_layouts(module: PreTrainedModel) -> dict[str, ExpertLayout]:
    """Of all modules of experts in a model, by their names; not on `meta`. Raises UnsupportedModel for an unknown gate."""
    layouts = {}
    for name, part in module.named_modules():
        if are_experts(part):
            gate = gate_of(part)
            if gate is None:
                raise UnsupportedModel(f"{module.config.model_type}: the gate of {name} is of no known kind")
            layouts[name] = ExpertLayout(bool(getattr(part, "is_transposed", False)), gate.interleaved)
    return layouts


def slice_of(weight: str, layout: ExpertLayout, inner: range, size: int) -> ExpertSlice | None:
    """Which of a weight of experts, by the last part of its name, is that of the dims `inner` of `size`; None: all of it.

    Parts of packed weights begin and end with a block (`instance.part_config.refuse_torn_blocks`).
    """
    kind = next(kind for kind in WEIGHTS if weight.startswith(kind))
    if kind == "gate_up_proj":
        axis = 2 if layout.is_transposed and weight == kind else 1
        if layout.is_interleaved:
            return ExpertSlice(axis, (range(2 * inner.start, 2 * inner.stop),), 2 * size)
        return ExpertSlice(axis, (inner, range(size + inner.start, size + inner.stop)), 2 * size)
    if weight.endswith("_bias"):
        return None
    if weight in PARTS:
        return ExpertSlice(2, (range(inner.start // PACKED_BLOCK, inner.stop // PACKED_BLOCK),), size // PACKED_BLOCK)
    return ExpertSlice(1 if layout.is_transposed else 2, (inner,), size)


def stored_names(module: PreTrainedModel, names: Iterable[str]) -> dict[str, list[list[str]]]:
    """Of which tensors of a checkpoint that has these `names` each weight is made: mostly of one.

    Several are the matrices of experts, one after the other; lists of them (gate and up) are one below the other. A weight that
    transformers would make of what is stored in another way is left out.
    """
    transforms = get_model_conversion_mapping(module)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    order = {pattern: (place, one) for one in converters for place, pattern in enumerate(one.source_patterns)}
    found: dict[str, dict[int, list[str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        own, pattern = rename_source_key(name, renamings, converters)
        place = 0
        if pattern is not None:
            place, converter = order[pattern]
            if not all(isinstance(operation, _KNOWN) for operation in converter.operations):
                continue
        found.setdefault(own, {}).setdefault(place, []).append(name)
    return {own: [its[place] for place in sorted(its)] for own, its in found.items()}


def give_memory(module: nn.Module, device: torch.device) -> None:
    """Let packed experts, whose places are on `meta`, have memory: whatever is in it."""
    for part in module.modules():
        for name in PARTS & part._parameters.keys():
            weight: Any = getattr(part, name)
            part.register_parameter(name, nn.Parameter(torch.empty_like(weight, device=device), requires_grad=False))
