"""The parts of a decoder layer beside attention: norms, rotary with the KV store, activation, products.

    rms_norm          weight * (x / sqrt(mean(x^2) + eps)), rounded before the product
    rotate_and_store  out = x cos + rotate_half(x) sin for q and k; k and v go to their slots
    silu_mul          silu(gate) * up
    linear            x W^T (+ bias), and its sum into a residual

Formulas and rounding are those of transformers' Llama. With one row a product takes the time to read its weights, so it has a
kernel of its own, which the activation before and the sum after ride along with.

Shape suffixes: T rows, E features in, N features out, I intermediate size, D head dim, R <= D rotated dims, B blocks, P block
size, K KV heads.
"""

import torch
from torch.nn import functional

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def uses_gemv(num_rows: int, weight_NE: torch.Tensor, backend: str) -> bool:
    """Whether a product takes the kernel for one row.

    One H200, 8B shape, a decode step without its attention: 3.97 ms against 4.19 by torch's products; with a kernel for two
    rows 4.36 against 4.20.
    """
    fits = weight_NE.dtype in _SIXTEEN_BITS and weight_NE.shape[1] % 1024 == 0
    return fits and backend == "triton" and num_rows == 1


def rms_norm(x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float, *, backend: str) -> torch.Tensor:
    """The norm of each row, new. Raises ValueError for shapes that don't fit or an unknown backend."""
    _check_rows(x_TE, weight_E)
    match backend:
        case "torch":
            return _rms_norm_torch(x_TE, weight_E, eps)
        case "triton":
            from kernels import layer_ops_triton

            return layer_ops_triton.rms_norm(x_TE, None, weight_E, eps)
    raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def add_rms_norm(
    x_TE: torch.Tensor, residual_TE: torch.Tensor, weight_E: torch.Tensor, eps: float, *, backend: str
) -> torch.Tensor:
    """`residual += x` in place, rounded; the norm of the sum, new. Raises ValueError as `rms_norm`."""
    _check_rows(x_TE, weight_E)
    _check_rows(residual_TE, weight_E)
    match backend:
        case "torch":
            residual_TE += x_TE
            return _rms_norm_torch(residual_TE, weight_E, eps)
        case "triton":
            from kernels import layer_ops_triton

            return layer_ops_triton.rms_norm(x_TE, residual_TE, weight_E, eps)
    raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def rotate_and_store(
    qkv_TE: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    slots_T: torch.Tensor,
    kv_2BPKD: torch.Tensor,
    num_heads: int,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    backend: str,
) -> torch.Tensor:
    """Queries `[T, H, D]` after norm and rotary, new; keys (likewise) and values go to slots `block * P + offset`, -1 nowhere.

    `qkv_TE`: query heads, key heads, value heads, each D wide. `q_norm`, `k_norm` `[D]`: of each head, before rotary. Dims
    from R on are not rotated. Slots (int32 or int64) are not checked.

    Raises:
        ValueError: shapes or dtypes that don't fit, or an unknown backend.
    """
    num_rows, width = qkv_TE.shape
    num_kv_heads, head_dim = kv_2BPKD.shape[3:]
    if width != (num_heads + 2 * num_kv_heads) * head_dim or qkv_TE.dtype != kv_2BPKD.dtype or kv_2BPKD.stride(-1) != 1:
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
    match backend:
        case "torch":
            return _rotate_and_store_torch(qkv_TE, cos_TR, sin_TR, slots_T, kv_2BPKD, num_heads, q_norm, k_norm, eps)
        case "triton":
            from kernels import layer_ops_triton

            return layer_ops_triton.rotate_and_store(qkv_TE, cos_TR, sin_TR, slots_T, kv_2BPKD, num_heads, q_norm, k_norm, eps)
    raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def silu_mul(gate_up_T2I: torch.Tensor, *, backend: str) -> torch.Tensor:
    """`silu(gate) * up` `[T, I]`, new; gate is the first half. Raises ValueError for an odd width or an unknown backend."""
    if gate_up_T2I.shape[1] % 2:
        raise ValueError(f"gate and up must be of one width, together {gate_up_T2I.shape[1]}")
    match backend:
        case "torch":
            gate_TI, up_TI = gate_up_T2I.chunk(2, -1)
            return functional.silu(gate_TI) * up_TI
        case "triton":
            from kernels import layer_ops_triton

            return layer_ops_triton.silu_mul(gate_up_T2I)
    raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def linear(
    x_TE: torch.Tensor,
    weight_NE: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    *,
    residual_TN: torch.Tensor | None = None,
    backend: str,
) -> torch.Tensor:
    """`x weight^T (+ bias)`, new; or, with a residual, that sum in place of it. Rounded before the residual is added."""
    if uses_gemv(x_TE.shape[0], weight_NE, backend):
        from kernels import layer_ops_triton

        return layer_ops_triton.gemv(x_TE, weight_NE, bias_N, residual_TN)
    out_TN = functional.linear(x_TE, weight_NE, bias_N)
    return out_TN if residual_TN is None else residual_TN.add_(out_TN)


def silu_mul_linear(
    gate_up_T2I: torch.Tensor, weight_EI: torch.Tensor, residual_TE: torch.Tensor, *, backend: str
) -> torch.Tensor:
    """`residual += linear(silu_mul(gate_up))` in place, in one kernel where there is one row."""
    if uses_gemv(gate_up_T2I.shape[0], weight_EI, backend):
        from kernels import layer_ops_triton

        return layer_ops_triton.gemv(gate_up_T2I, weight_EI, None, residual_TE, with_silu=True)
    return linear(silu_mul(gate_up_T2I, backend=backend), weight_EI, residual_TN=residual_TE, backend=backend)


def _check_rows(x_TE: torch.Tensor, weight_E: torch.Tensor) -> None:
    if x_TE.dim() != 2 or x_TE.shape[1:] != weight_E.shape or x_TE.stride(1) != 1 or x_TE.dtype != weight_E.dtype:
        raise ValueError(
            f"rows {tuple(x_TE.shape)} {x_TE.dtype} with strides {x_TE.stride()}, weight {tuple(weight_E.shape)} "
            f"{weight_E.dtype}"
        )


def _rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    full = x.float() if x.dtype in _SIXTEEN_BITS else x
    return weight * (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate_and_store_torch(
    qkv_TE: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    slots_T: torch.Tensor,
    kv_2BPKD: torch.Tensor,
    num_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    from kernels.kv_blocks import store_kv

    num_kv_heads, head_dim = kv_2BPKD.shape[3:]
    parts_THD = qkv_TE.view(len(qkv_TE), -1, head_dim)
    q_THD, k_TKD, v_TKD = torch.split(parts_THD, [num_heads, num_kv_heads, num_kv_heads], 1)
    if q_norm is not None:
        q_THD = _rms_norm_torch(q_THD, q_norm, eps)
    if k_norm is not None:
        k_TKD = _rms_norm_torch(k_TKD, k_norm, eps)
    store_kv(_rotate_torch(k_TKD, cos_TR, sin_TR), v_TKD, kv_2BPKD, slots_T.long(), backend="torch")
    return _rotate_torch(q_THD, cos_TR, sin_TR)


def _rotate_torch(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    rotated = cos_TR.shape[1]
    full = x_THD[..., :rotated].float() if x_THD.dtype in _SIXTEEN_BITS else x_THD[..., :rotated]
    low, high = full.chunk(2, -1)
    turned = full * cos_TR.unsqueeze(1) + torch.cat((-high, low), -1) * sin_TR.unsqueeze(1)
    return torch.cat((turned.to(x_THD.dtype), x_THD[..., rotated:]), -1)
