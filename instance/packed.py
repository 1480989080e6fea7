"""Experts whose weights stay as a checkpoint has them, packed in blocks of 4-bit numbers: gpt-oss as it is shipped.

A module of transformers keeps its class, its gate and its biases; in the place of each weight it has `*_blocks` and `*_scales`,
by the names and in the shapes of the checkpoint, and it runs by `kernels.experts`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kernels.experts import PACKED_BLOCK, PACKED_BYTES, Packed

WEIGHTS = ("gate_up_proj", "down_proj")
PARTS = frozenset(f"{name}_{part}" for name in WEIGHTS for part in ("blocks", "scales"))
"""Names of parameters."""


def can_be_packed(module: Any) -> bool:
    """Whether a module has experts' weights `[X, in, out]`, as those are that are published packed."""
    return all(isinstance(getattr(module, name, None), nn.Parameter) for name in WEIGHTS) and bool(
        getattr(module, "is_transposed", False)
    )


def pack(module: Any) -> None:
    """Give a module on `meta` the places of packed weights. Raises ValueError if features in aren't whole blocks."""
    module._is_hf_initialized = True  # transformers would make up plain weights
    for name in WEIGHTS:
        num_experts, num_in, num_out = getattr(module, name).shape
        blocks, rest = divmod(num_in, PACKED_BLOCK)
        if rest:
            raise ValueError(f"{num_in} features are no whole blocks of {PACKED_BLOCK}")
        delattr(module, name)
        for part, shape in (("blocks", (blocks, PACKED_BYTES)), ("scales", (blocks,))):
            empty = torch.empty((num_experts, num_out, *shape), dtype=torch.uint8, device="meta")
            module.register_parameter(f"{name}_{part}", nn.Parameter(empty, requires_grad=False))


def is_packed(module: object) -> bool:
    """Whether a module has packed weights."""
    return isinstance(module, nn.Module) and {name for name, _ in module.named_parameters(recurse=False)} >= PARTS


def packed_weight(module: Any, name: str) -> Packed:
    """One of the `WEIGHTS`."""
    return Packed(getattr(module, f"{name}_blocks").data, getattr(module, f"{name}_scales").data)


def run_plain(module: Any) -> Callable[..., Any]:
    """transformers' own `forward` of a module with packed weights, which has plain ones of the rows' type while it runs."""

    def forward(x_TE: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for name in WEIGHTS:
            setattr(module, name, packed_weight(module, name).dequantise(x_TE.dtype).transpose(1, 2))
        try:
            return type(module).forward(module, x_TE, *args, **kwargs)
        finally:
            for name in WEIGHTS:
                delattr(module, name)

    return forward


@contextmanager
def plain_experts(module: nn.Module) -> Iterator[None]:
    """Let all packed experts of a model run as transformers runs them: what kernels are compared with."""
    parts: list[Any] = [part for part in module.modules() if is_packed(part)]
    before = [vars(part).get("forward") for part in parts]
    for part in parts:
        part.forward = run_plain(part)
    try:
        yield
    finally:
        for part, forward in zip(parts, before, strict=True):
            if forward is None:
                del part.forward
            else:
                part.forward = forward
