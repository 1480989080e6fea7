"""The parts of a decoder layer beside attention: norms, rotary with the KV store, activation, products.

    rms_norm          weight * (x / sqrt(mean(x^2) + eps)), rounded before the product
    add_rms_norm      the same of residual + x, or of residual + norm(x)
    rotate_and_store  out = x cos + rotate_half(x) sin for q and k; k and v go to their slots
    gated             activation(gate) * up
    linear            x W^T (+ bias), or norm(x) W^T, and its sum into a residual; of weights of 8 bits `kernels.products`
    normed_linear     norm(x), and norm(x) W^T (+ bias)
    gated_product     activation(x Wg^T) * (x Wu^T)

Formulas and rounding are those of transformers' Llama, or of Gemma where that differs. With one row a product takes the time to
read its weights, so it has a kernel of its own, with which the norm before it and the sum or the activation after it ride
along. There what a norm makes is not rounded.

Shape suffixes: T rows, E features in, N features out, I intermediate size, D head dim, R <= D rotated dims, B blocks, P block
size, K KV heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from kernels.kv_blocks import check_scales, store_kv
from kernels.products import Matrix, Quantised, check_rows, product

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
"""Of gates, by the names that `gated` knows."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A root-mean-square norm with a weight."""

    weight_E: torch.Tensor
    eps: float
    from_one: bool = False
    """Whether weights are counted from 1, and the product with them is rounded once (Gemma)."""


def uses_gemv(num_rows: int, weight_NE: Matrix, backend: str) -> bool:
    """Whether a product takes the kernel for one row.

    One H200, 8B shape, a decode step without its attention: 3.97 ms against 4.19 by torch's products; with a kernel for two
    rows 4.36 against 4.20.
    """
    if isinstance(weight_NE, Quantised):
        return backend == "triton" and num_rows == 1
    fits = weight_NE.dtype in _SIXTEEN_BITS and weight_NE.shape[1] >= 1024 and weight_NE.shape[1] % 64 == 0
    return fits and backend == "triton" and num_rows == 1


def norm_rides_along(num_rows: int, weight_NE: Matrix, backend: str) -> bool:
    """Whether a product of a row's norm takes one kernel.

    One H200, bf16, a product before and what follows, us with a kernel for the norm and without: 5,120 x 2,048 10.6 and 9.7,
    6,144 x 4,096 20.1 and 20.1, 28,672 x 4,096 60.0 and 59.1. But whole steps of the 8B shape took 3.88 to 3.93 ms instead of
    3.84, where all products rode.
    """
    is_measured = isinstance(weight_NE, torch.Tensor) and weight_NE.shape[1] <= 3072 and weight_NE.shape[0] <= 8192
    return is_measured and uses_gemv(num_rows, weight_NE, backend)


def uses_gated_rows(num_rows: int, gate_up_2IE: torch.Tensor, dims: range, backend: str) -> bool:
    """Whether `gated_product` of few rows and of some of the dims takes one kernel.

    One H200, bf16, with a norm before, us by the library with what is gated behind it, and by one kernel, of 2, 16, 48 and 64
    rows: 7,168 of 14,336 dims and 4,096 features in 33.2 and 31.1, 34.0 and 32.3, 34.8 and 33.7, 38.6 and 34.0 (32 rows: 34.0
    and 34.4); 8,192 features in 60.5 and 58.5, 62.1 and 61.3, 63.0 and 62.4, 71.3 and 63.4. But 10,752 dims and 5,376 features
    in 60.6 and 77.1, 61.5 and 75.1. All 14,336 dims, one matrix to the library: 61.8 and 57.6 of 2 rows, of 8 to 32 the same,
    64.7 and 62.5 of 64.
    """
    fits = gate_up_2IE.dtype in _SIXTEEN_BITS and gate_up_2IE.shape[1] % 4096 == 0 and 0 < len(dims) < len(gate_up_2IE) // 2
    return fits and backend == "triton" and (2 <= num_rows <= 16 or 32 < num_rows <= 64)


def rms_norm(x_TE: torch.Tensor, norm: Norm, *, backend: str) -> torch.Tensor:
    """The norm of each row, new. Raises ValueError for shapes that don't fit or an unknown backend."""
    _check_rows(x_TE, norm.weight_E)
    match backend:
        case "torch":
            return _rms_norm_torch(x_TE, norm)
        case "triton":
            from kernels import layer_ops_triton

            return layer_ops_triton.rms_norm(x_TE, None, norm, None)
    raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def add_rms_norm(
    x_TE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm, *, first: Norm | None = None, backend: str
) -> torch.Tensor:
    """`residual += x` in place, rounded, or the norm `first` of x; the norm of the sum, new. Raises as `rms_norm`."""
    _check_rows(x_TE, norm.weight_E)
    _check_rows(residual_TE, norm.weight_E)
    match backend:
        case "torch":
            residual_TE += x_TE if first is None else _rms_norm_torch(x_TE, first)
            return _rms_norm_torch(residual_TE, norm)
        case "triton":
            from kernels import layer_ops_triton

            return layer_ops_triton.rms_norm(x_TE, residual_TE, norm, first)
    raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def rotate_and_store(
    qkv_TE: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    slots_T: torch.Tensor,
    kv_2BPKD: torch.Tensor,
    num_heads: int,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    scales_2BKX: torch.Tensor | None = None,
    backend: str,
) -> torch.Tensor:
    """Queries `[T, H, D]` after norm and rotary, new; keys (likewise) and values go to slots `block * P + offset`, -1 nowhere.

    `qkv_TE`: query heads, key heads, value heads, each D wide. `q_norm`, `k_norm`, alike but for their weights `[D]`: of each
    head, before rotary. Dims from R on are not rotated. Slots (int32 or int64) are not checked. `scales_2BKX`: of KV of 8
    bits, as `kernels.kv_blocks.store_kv` has them.

    Raises:
        ValueError: shapes or dtypes that don't fit, or an unknown backend.
    """
    num_rows, width = qkv_TE.shape
    num_kv_heads, head_dim = kv_2BPKD.shape[3:]
    check_scales(kv_2BPKD, scales_2BKX)
    fits = scales_2BKX is not None or qkv_TE.dtype == kv_2BPKD.dtype
    if width != (num_heads + 2 * num_kv_heads) * head_dim or not fits or kv_2BPKD.stride(-1) != 1:
        raise ValueError(
            f"rows of {width} {qkv_TE.dtype} for {num_heads} heads and kv {tuple(kv_2BPKD.shape)} {kv_2BPKD.dtype}, "
            f"strides {kv_2BPKD.stride()}"
        )
    if (
        cos_TR.shape != sin_TR.shape
        or cos_TR.shape[0] != num_rows
        or cos_TR.shape[1] > head_dim
        or slots_T.shape != (num_rows,)
    ):
        raise ValueError(
            f"{num_rows} rows of head dim {head_dim}, cos {tuple(cos_TR.shape)}, sin {tuple(sin_TR.shape)}, slots "
            f"{tuple(slots_T.shape)}"
        )
    if q_norm is not None and k_norm is not None and (q_norm.eps, q_norm.from_one) != (k_norm.eps, k_norm.from_one):
        raise ValueError(f"norms of queries and keys differ: eps {q_norm.eps} and {k_norm.eps}")
    match backend:
        case "torch":
            return _rotate_and_store_torch(qkv_TE, cos_TR, sin_TR, slots_T, kv_2BPKD, scales_2BKX, num_heads, q_norm, k_norm)
        case "triton":
            from kernels import layer_ops_triton

            return layer_ops_triton.rotate_and_store(
                qkv_TE, cos_TR, sin_TR, slots_T, kv_2BPKD, scales_2BKX, num_heads, q_norm, k_norm
            )
    raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def gated(gate_up_T2I: torch.Tensor, activation: str = "silu", *, backend: str) -> torch.Tensor:
    """`activation(gate) * up` `[T, I]`, new; gate is the first half. `activation`: of `ACTIVATIONS`.

    Raises ValueError for an odd width, an unknown activation or backend.
    """
    if gate_up_T2I.shape[1] % 2:
        raise ValueError(f"gate and up must be of one width, together {gate_up_T2I.shape[1]}")
    _check_activation(activation)
    match backend:
        case "torch":
            gate_TI, up_TI = gate_up_T2I.chunk(2, -1)
            return ACTIVATIONS[activation](gate_TI) * up_TI
        case "triton":
            from kernels import layer_ops_triton

            return layer_ops_triton.gated(gate_up_T2I, activation)
    raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def linear(
    x_TE: torch.Tensor,
    weight_NE: Matrix,
    bias_N: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual_TN: torch.Tensor | None = None,
    backend: str,
) -> torch.Tensor:
    """`x weight^T (+ bias)`, or that of the norm of x, new; or, with a residual, that sum in place of it. Rounded before the
    residual is added. Raises ValueError for rows that don't fit."""
    if norm is not None and not norm_rides_along(len(x_TE), weight_NE, backend):
        x_TE, norm = rms_norm(x_TE, norm, backend=backend), None
    if isinstance(weight_NE, Quantised):
        return product(x_TE, weight_NE, bias_N, residual_TN=residual_TN, backend=backend)
    if uses_gemv(x_TE.shape[0], weight_NE, backend):
        return _gemv(x_TE, weight_NE, bias_N, residual_TN, norm)
    out_TN = functional.linear(x_TE, weight_NE, bias_N)
    return out_TN if residual_TN is None else residual_TN.add_(out_TN)


def normed_linear(
    x_TE: torch.Tensor, norm: Norm, weight_NE: torch.Tensor, bias_N: torch.Tensor | None = None, *, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of each row `[T, E]`, and `linear` of it `[T, N]`, both new. Raises as `linear`."""
    if uses_gemv(len(x_TE), weight_NE, backend):
        h_TE = torch.empty_like(x_TE)
        return h_TE, _gemv(x_TE, weight_NE, bias_N, None, norm, h_TE)
    h_TE = rms_norm(x_TE, norm, backend=backend)
    return h_TE, linear(h_TE, weight_NE, bias_N, backend=backend)


def _gemv(
    x_1E: torch.Tensor,
    weight_NE: torch.Tensor,
    bias_N: torch.Tensor | None,
    residual_1N: torch.Tensor | None,
    norm: Norm | None,
    normed_1E: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear` of one row by its kernel, which looks at no types or strides. Raises ValueError for what doesn't fit."""
    from kernels import layer_ops_triton

    check_rows(x_1E, weight_NE)
    if norm is not None:
        _check_rows(x_1E, norm.weight_E)
    return layer_ops_triton.gemv(x_1E, weight_NE, bias_N, residual_1N, norm=norm, normed_1E=normed_1E)


def gated_product(
    h_TE: torch.Tensor, gate_up_2IE: Matrix, activation: str = "silu", dims: range | None = None, *, backend: str
) -> torch.Tensor:
    """`gated(linear(h, gate_up))` `[T, J]` of J of the dims between gate and down (by default all), new. Weights aren't copied.

    In one kernel where there is one row (`uses_gemv`), and of some of the dims where there are few.

    Raises:
        ValueError: rows that don't fit; dims that aren't there, or not all of weights of 8 bits; an unknown activation or
            backend.
    """
    _check_activation(activation)
    check_rows(h_TE, gate_up_2IE)
    inner = gate_up_2IE.shape[0] // 2
    dims = range(inner) if dims is None else dims
    if not 0 <= dims.start <= dims.stop <= inner:
        raise ValueError(f"dims {dims.start} to {dims.stop} of {inner}")
    if isinstance(gate_up_2IE, Quantised) and len(dims) < inner:
        raise ValueError("weights of 8 bits have no parts")
    if len(dims) and uses_gemv(len(h_TE), gate_up_2IE, backend):
        from kernels import layer_ops_triton, products_triton

        if isinstance(gate_up_2IE, Quantised):
            return products_triton.gemv(h_TE, gate_up_2IE, None, None, activation=activation)
        return layer_ops_triton.gemv(h_TE, gate_up_2IE, None, None, activation=activation, dims=dims)
    if not isinstance(gate_up_2IE, Quantised) and uses_gated_rows(len(h_TE), gate_up_2IE, dims, backend):
        from kernels import layer_ops_triton

        return layer_ops_triton.gated_rows(h_TE, gate_up_2IE, activation, dims)
    return gated(_gate_up(h_TE, gate_up_2IE, dims, backend), activation, backend=backend)


def _gate_up(h_TE: torch.Tensor, gate_up_2IE: Matrix, dims: range, backend: str) -> torch.Tensor:
    """`[T, 2 J]`, what `gated` takes."""
    inner = gate_up_2IE.shape[0] // 2
    if isinstance(gate_up_2IE, Quantised) or len(dims) == inner:
        return linear(h_TE, gate_up_2IE, backend=backend)
    parts_2JE = gate_up_2IE.view(2, inner, -1)[:, dims.start : dims.stop]
    if not h_TE.is_cuda:  # of 16 bits a product of several matrices would copy them
        return torch.cat([functional.linear(h_TE, part_JE) for part_JE in parts_2JE], -1)
    out_T2J = h_TE.new_empty((len(h_TE), 2, len(dims)))
    torch.bmm(h_TE.expand(2, -1, -1), parts_2JE.mT, out=out_T2J.transpose(0, 1))  # both in one kernel, and in their places
    return out_T2J.flatten(1)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _check_rows(x_TE: torch.Tensor, weight_E: torch.Tensor) -> None:
    if x_TE.dim() != 2 or x_TE.shape[1:] != weight_E.shape or x_TE.stride(1) != 1 or x_TE.dtype != weight_E.dtype:
        raise ValueError(
            f"rows {tuple(x_TE.shape)} {x_TE.dtype} with strides {x_TE.stride()}, weight {tuple(weight_E.shape)} "
            f"{weight_E.dtype}"
        )


def _rms_norm_torch(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    full = x.float() if x.dtype in _SIXTEEN_BITS else x
    normed = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + norm.eps)
    if norm.from_one:
        return (normed * (1 + norm.weight_E.to(full.dtype))).to(x.dtype)
    return norm.weight_E * normed.to(x.dtype)


def _rotate_and_store_torch(
    qkv_TE: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    slots_T: torch.Tensor,
    kv_2BPKD: torch.Tensor,
    scales_2BKX: torch.Tensor | None,
    num_heads: int,
    q_norm: Norm | None,
    k_norm: Norm | None,
) -> torch.Tensor:
    num_kv_heads, head_dim = kv_2BPKD.shape[3:]
    parts_THD = qkv_TE.view(len(qkv_TE), -1, head_dim)
    q_THD, k_TKD, v_TKD = torch.split(parts_THD, [num_heads, num_kv_heads, num_kv_heads], 1)
    if q_norm is not None:
        q_THD = _rms_norm_torch(q_THD, q_norm)
    if k_norm is not None:
        k_TKD = _rms_norm_torch(k_TKD, k_norm)
    rotated_TKD = _rotate_torch(k_TKD, cos_TR, sin_TR)
    store_kv(rotated_TKD, v_TKD, kv_2BPKD, slots_T.long(), scales_2BKX=scales_2BKX, backend="torch")
    return _rotate_torch(q_THD, cos_TR, sin_TR)


def _rotate_torch(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    rotated = cos_TR.shape[1]
    full = x_THD[..., :rotated].float() if x_THD.dtype in _SIXTEEN_BITS else x_THD[..., :rotated]
    low, high = full.chunk(2, -1)
    turned = full * cos_TR.unsqueeze(1) + torch.cat((-high, low), -1) * sin_TR.unsqueeze(1)
    return torch.cat((turned.to(x_THD.dtype), x_THD[..., rotated:]), -1)
