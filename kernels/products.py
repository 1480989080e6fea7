"""Products with matrices of 8 bits a weight, which are read as they are: half the bytes of bf16.

    w[n, e] = q[n, e] scale[n, e // group]        product = x w^T (+ bias)

Rows stay in their own type, however many there are: what a row becomes does not depend on which others are computed with it,
and its only error is that of the weights. One row, and few, are multiplied by kernels that convert in registers; for many a
matrix of the rows' type is made first, which costs little beside so large a product.

Shape suffixes: T rows, E features in, N features out, R some of these, G groups of features in that share a scale, e
those of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional

Kind = Literal["fp8", "int8"]

TYPES: dict[Kind, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_LARGEST: dict[Kind, float] = {"fp8": 448.0, "int8": 127.0}

Scheme = Literal["fp8", "int8", "int8-32"]
SCHEMES: dict[Scheme, tuple[Kind, int | None]] = {"fp8": ("fp8", None), "int8": ("int8", None), "int8-32": ("int8", 32)}
"""What plain weights may become: numbers, and how many features in share a scale; None: all. Scales of some are in bf16, which
takes a sixteenth of what their weights take."""

_QUANTISED_ROWS = 4096
"""Of a matrix that are worked on at a time: in fp32 they take memory."""

TILED_ROWS = 256
"""Up to so many rows take a kernel that converts in registers. Beyond, writing and reading a matrix of 16 bits again is less
than what a library's product is faster; by arithmetic, not measured."""


def rows_of_each_kernel(most: int) -> list[int]:
    """Up to `most` rows, for each way in which `product` compiles its kernels a number of rows that takes it."""
    return [rows for rows in (1, 8, 16, 32, 64, TILED_ROWS, TILED_ROWS + 1) if rows <= most]


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A matrix of 8 bits a weight, with scales. Raises ValueError for shapes, types or strides that don't fit."""

    weight_NE: torch.Tensor
    """float8_e4m3fn or int8."""
    scale_NG: torch.Tensor
    """float32 or bfloat16."""
    group: int
    """Features in that share a scale, E if all do."""

    def __post_init__(self) -> None:
        weight, scale = self.weight_NE, self.scale_NG
        groups = -(-weight.shape[1] // max(1, self.group))
        if (
            weight.dtype not in TYPES.values()
            or scale.dtype not in (torch.float32, torch.bfloat16)
            or self.group < 1
            or scale.shape != (weight.shape[0], groups)
            or weight.stride(1) != 1
            or not scale.is_contiguous()
        ):
            raise ValueError(
                f"weights {tuple(weight.shape)} {weight.dtype} with strides {weight.stride()}, scales {tuple(scale.shape)} "
                f"{scale.dtype} of {self.group} features each"
            )

    @property
    def shape(self) -> torch.Size:
        """`(N, E)`, as of a plain matrix."""
        return self.weight_NE.shape

    @property
    def device(self) -> torch.device:
        return self.weight_NE.device

    @property
    def nbytes(self) -> int:
        """Of weights and scales."""
        return self.weight_NE.nbytes + self.scale_NG.nbytes

    def rows(self, start: int, stop: int) -> "Quantised":
        """`[start, stop)` of its features out: a view."""
        return replace(self, weight_NE=self.weight_NE[start:stop], scale_NG=self.scale_NG[start:stop])


Matrix = torch.Tensor | Quantised
"""`[N, E]`."""


def quantise(weight_NE: torch.Tensor, scheme: Scheme) -> Quantised:
    """A matrix with scales such that the largest weight of each is the largest number there is. Rounds to nearest. On `meta`
    too."""
    num_out, num_in = weight_NE.shape
    kind, group = SCHEMES[scheme]
    group = min(group or num_in, num_in)
    groups = -(-num_in // group)
    made_NE = torch.empty((num_out, num_in), dtype=TYPES[kind], device=weight_NE.device)
    scale_NG = weight_NE.new_empty((num_out, groups), dtype=torch.float32 if groups == 1 else torch.bfloat16)
    for start in range(0, num_out, _QUANTISED_ROWS):
        some = slice(start, start + _QUANTISED_ROWS)
        padded_RE = functional.pad(weight_NE[some].float(), (0, groups * group - num_in))
        full_RGe = padded_RE.reshape(-1, groups, group)
        scale_RG1 = (full_RGe.abs().amax(2, keepdim=True) / _LARGEST[kind]).to(scale_NG.dtype).float()
        scale_RG1 = torch.where(scale_RG1 > 0, scale_RG1, 1.0)  # of zeros
        scaled_RE = (full_RGe / scale_RG1).flatten(1)[:, :num_in].clamp(-_LARGEST[kind], _LARGEST[kind])
        made_NE[some] = (scaled_RE.round() if kind == "int8" else scaled_RE).to(TYPES[kind])
        scale_NG[some] = scale_RG1.squeeze(2)
    return Quantised(made_NE, scale_NG, group)


def stack(parts: Sequence[Quantised]) -> Quantised:
    """One matrix of them all, one below the other. Raises ValueError if they are of different kinds or groups."""
    first = parts[0]
    if any((part.weight_NE.dtype, part.group) != (first.weight_NE.dtype, first.group) for part in parts):
        raise ValueError("matrices of different types or groups can't be one")
    weight_NE = torch.cat([part.weight_NE.view(torch.uint8) for part in parts]).view(first.weight_NE.dtype)
    return Quantised(weight_NE, torch.cat([part.scale_NG for part in parts]), first.group)


def dequantise(matrix: Quantised, dtype: torch.dtype, *, backend: str) -> torch.Tensor:
    """The weights that a matrix stands for, `[N, E]`, rounded to `dtype`. Raises ValueError for an unknown backend."""
    match backend:
        case "torch":
            num_in = matrix.shape[1]
            if matrix.scale_NG.shape[1] == 1:
                scale_NE = matrix.scale_NG
            else:
                scale_NE = matrix.scale_NG.float().repeat_interleave(matrix.group, 1)[:, :num_in]
            return (matrix.weight_NE.float() * scale_NE).to(dtype)
        case "triton":
            from kernels import products_triton

            return products_triton.dequantise(matrix, dtype)
    raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def check_rows(x_TE: torch.Tensor, matrix: Matrix) -> None:
    """Raises ValueError unless rows can be multiplied with a matrix by kernels that look at no more than its shape."""
    if x_TE.dim() != 2 or x_TE.shape[1] != matrix.shape[1] or x_TE.stride(1) != 1:
        raise ValueError(f"rows {tuple(x_TE.shape)} with strides {x_TE.stride()} for weights {tuple(matrix.shape)}")
    if isinstance(matrix, torch.Tensor) and (matrix.dtype != x_TE.dtype or matrix.stride(1) != 1):
        raise ValueError(f"rows of {x_TE.dtype} for weights of {matrix.dtype} with strides {matrix.stride()}")


def product(
    x_TE: torch.Tensor,
    matrix: Quantised,
    bias_N: torch.Tensor | None = None,
    *,
    residual_TN: torch.Tensor | None = None,
    backend: str,
) -> torch.Tensor:
    """`x w^T (+ bias)`, new; or, with a residual, that sum in place of it. Rounded before the residual is added.

    Raises ValueError for rows that don't fit, or an unknown backend.
    """
    check_rows(x_TE, matrix)
    if backend == "triton" and 1 <= len(x_TE) <= TILED_ROWS:
        from kernels import products_triton

        if len(x_TE) == 1:
            return products_triton.gemv(x_TE, matrix, bias_N, residual_TN)
        out_TN = products_triton.product(x_TE, matrix, bias_N)
    else:
        out_TN = functional.linear(x_TE, dequantise(matrix, x_TE.dtype, backend=backend), bias_N)
    return out_TN if residual_TN is None else residual_TN.add_(out_TN)
