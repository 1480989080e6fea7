"""A model's linear layers with weights of 8 bits: made so at load (`--quantize`), or as a checkpoint has them.

What stays as it is: embeddings and norms, which are hardly read; routers, whose choice a rounding may turn; what latent
attention takes apart (`kv_b_proj`); and a head that is one with the embeddings. A head of its own is a fourteenth of an 8B
model, so it is read in 8 bits, too, but always as integers: 97.4 % of the default model's first choices are then the same,
of e4m3 89.2 % (2,000 tokens of an essay, all else in fp32).

Shape suffixes: E features in, N features out, G groups of features in that share a scale.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from instance.errors import UnsupportedModel
from instance.packed import plain_experts
from kernels.products import Matrix, Quantised, Scheme, product, quantise

KEPT = frozenset({"kv_b_proj", "gate", "router", "shared_expert_gate"})
"""Names of linear layers whose weights stay as they are."""
_HEAD_SCHEME: Scheme = "int8"
_FP8_CAPABILITY = (8, 9)
"""The first whose processors know e4m3."""


class QuantisedLinear(nn.Module):
    """As `nn.Linear`, with a weight of 8 bits and its scales."""

    def __init__(self, matrix: Quantised, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.group = matrix.group
        self.weight = nn.Parameter(matrix.weight_NE, requires_grad=False)
        self.weight_scale = nn.Parameter(matrix.scale_NG, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.backend = "torch"
        """Of `kernels.products`. torch multiplies with a plain matrix of the same weights, so that others can be compared."""

    @property
    def matrix(self) -> Quantised:
        """What it multiplies with."""
        return Quantised(self.weight.data, self.weight_scale.data, self.group)

    def become(self, matrix: Quantised) -> None:
        """The same weights from now on as a view of a larger matrix."""
        self.weight.data, self.weight_scale.data = matrix.weight_NE, matrix.scale_NG

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., E]` to `[..., N]`."""
        x_TE = x.reshape(-1, self.in_features)
        return product(x_TE, self.matrix, self.bias, backend=self.backend).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.weight.dtype}"


def is_linear(module: object) -> bool:
    """Whether a module is a linear layer of a kind that `matrix_of` reads, and no subclass."""
    return type(module) in (nn.Linear, QuantisedLinear)


def matrix_of(linear: Any) -> Matrix:
    """A linear layer's weight, as `kernels.layer_ops.linear` takes it."""
    return linear.matrix if isinstance(linear, QuantisedLinear) else linear.weight


def quantise_linears(module: PreTrainedModel, scheme: Scheme, device: torch.device) -> None:
    """Give a model's linear layers weights of 8 bits, on `device`, one after the other: what they were is freed.

    Raises UnsupportedModel if it has none.
    """
    found = linears_but_head(module)
    if not found:
        raise UnsupportedModel(
            f"{module.config.model_type}: it has no linear layers, so none that --quantize {scheme} could change"
        )
    for name, part in found.items():
        _quantise(module, name, part, scheme, device)
    quantise_head(module, device)


def quantise_head(module: PreTrainedModel, device: torch.device) -> None:
    """Likewise, unless it is one with the embeddings."""
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    for name, part in linears_of(module).items():
        if part is head and not is_tied(module):
            _quantise(module, name, part, _HEAD_SCHEME, device)


def _quantise(module: PreTrainedModel, name: str, part: nn.Linear, scheme: Scheme, device: torch.device) -> None:
    bias = None if part.bias is None else part.bias.data.to(device)
    replace_part(module, name, QuantisedLinear(quantise(part.weight.data.to(device), scheme), bias))
    part.weight.data = part.weight.data.new_empty(0)  # somebody may hold the module, but nobody the weight


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model whose weights may be of 8 bits, by their names."""
    return {
        name: part for name, part in module.named_modules() if type(part) is nn.Linear and name.rpartition(".")[2] not in KEPT
    }


def linears_but_head(module: PreTrainedModel) -> dict[str, nn.Linear]:
    """Likewise, without its head."""
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    return {name: part for name, part in linears_of(module).items() if part is not head}


def is_tied(module: PreTrainedModel) -> bool:
    """Whether its head is one with the embeddings."""
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    embeddings: Any = module.get_input_embeddings()
    return head.weight is embeddings.weight or module.config.get_text_config().tie_word_embeddings


def replace_part(module: nn.Module, name: str, part: nn.Module) -> None:
    """Put a part in the place of the one of that name."""
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, part)


def quantised_parts(module: nn.Module) -> list[QuantisedLinear]:
    """All of a model."""
    return [part for part in module.modules() if isinstance(part, QuantisedLinear)]


def most_weights(module: nn.Module) -> int:
    """Of the largest matrix that a model's parts of 8 bits may be merged into; 0: it has none."""
    largest = max((part.weight.numel() for part in quantised_parts(module)), default=0)
    return 2 * largest  # gate and up are one


def refuse_device(module: nn.Module, device: torch.device) -> None:
    """Raises UnsupportedModel for a GPU that doesn't know the type of a model's weights."""
    if device.type != "cuda" or not any(part.weight.dtype == torch.float8_e4m3fn for part in quantised_parts(module)):
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise UnsupportedModel(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and weights in fp8 "
            f"need {_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]}; --quantize int8 needs none"
        )


@contextmanager
def plain_products(module: nn.Module) -> Iterator[None]:
    """Let all parts multiply with plain matrices of their weights, by torch, and experts run as transformers has them: what
    kernels are compared with."""
    parts = quantised_parts(module)
    before = [part.backend for part in parts]
    for part in parts:
        part.backend = "torch"
    try:
        with plain_experts(module):
            yield
    finally:
        for part, backend in zip(parts, before, strict=True):
            part.backend = backend
