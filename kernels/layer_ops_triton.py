"""Triton versions of `kernels.layer_ops`, called by them after validation.

The product of one row (GEMV): a program takes BLOCK_N rows of W and walks along E, the products summed in fp32 in registers.
The sum after it rides along, that of gate and up with what they make together, and a norm before it: weights of the norm are
multiplied with on the way, squares are summed beside the products, and what a row is divided by divides the sums. (Where every
program normed the row before it began, a step took 4.08 ms instead of 3.97 with a kernel for the norm.)

Shape suffixes: T rows, E features in, N features out, I intermediate size, D head dim, R rotated dims, B blocks, P block
size, K KV heads; in kernels, tiles of them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels import kv_bytes_triton
from kernels.launch import has_dependent_launch, let_next_start, num_processors, wait_for_previous
from kernels.layer_ops import Norm

_ROTATED_HEADS = 8
"""Heads of a program. With one, 8192 rows of 48 heads took 476 us on an H200, ten times what the bytes need."""


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """How a product of one row is cut."""

    block_n: int
    block_e: int
    num_warps: int
    num_stages: int


@triton.jit  # type: ignore[untyped-decorator]
def scaled(x, scale, weight, FROM_ONE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x scale weight, rounded before the last product, or (FROM_ONE) x scale (1 + weight), rounded once."""
    if FROM_ONE:
        return (x.to(tl.float32) * scale * (1 + weight.to(tl.float32))).to(x.dtype)
    return (weight.to(tl.float32) * (x.to(tl.float32) * scale).to(x.dtype).to(tl.float32)).to(x.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def added_to(residual, x, dtype: tl.constexpr, ADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """x, rounded; ADDED: to what was there, and rounded once more."""
    rounded = x.to(dtype)
    if ADDED:
        rounded = (residual.to(tl.float32) + rounded.to(tl.float32)).to(dtype)
    return rounded


@triton.jit  # type: ignore[untyped-decorator]
def _norm_divisor(square_E, eps, E: tl.constexpr):  # type: ignore[no-untyped-def]
    """sqrt(mean(x^2) + eps), of squares that lie summed in some places."""
    return tl.sqrt(tl.sum(square_E, 0) / E + eps)


@triton.jit  # type: ignore[untyped-decorator]
def _normed(x_E, weight_E, eps, E: tl.constexpr, FROM_ONE: tl.constexpr):  # type: ignore[no-untyped-def]
    """weight (x / sqrt(mean(x^2) + eps))"""
    full_E = x_E.to(tl.float32)
    return scaled(x_E, 1 / _norm_divisor(full_E * full_E, eps, E), weight_E, FROM_ONE)


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, first_ptr, weight_ptr, out_ptr, stride_x, stride_r, stride_o, first_eps, eps,
    E: tl.constexpr, TILE: tl.constexpr, WITH_RESIDUAL: tl.constexpr, WITH_FIRST: tl.constexpr, FIRST_FROM_ONE: tl.constexpr,
    FROM_ONE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out = norm(x); with a residual, residual += x comes first, or its own norm, and the sum is what is normed. One row."""
    row = tl.program_id(0).to(tl.int64)
    at_E = tl.arange(0, TILE)
    is_E = at_E < E
    weight_E = tl.load(weight_ptr + at_E, mask=is_E, other=0.0)
    if WITH_FIRST:
        first_E = tl.load(first_ptr + at_E, mask=is_E, other=0.0)
    let_next_start(DEPENDENT)
    wait_for_previous(DEPENDENT)
    x_E = tl.load(x_ptr + row * stride_x + at_E, mask=is_E, other=0.0)
    if WITH_FIRST:
        x_E = _normed(x_E, first_E, first_eps, E, FIRST_FROM_ONE)
    if WITH_RESIDUAL:
        residual_E = tl.load(residual_ptr + row * stride_r + at_E, mask=is_E, other=0.0)
        x_E = added_to(residual_E, x_E, x_E.dtype, True)
        tl.store(residual_ptr + row * stride_r + at_E, x_E, mask=is_E)
    tl.store(out_ptr + row * stride_o + at_E, _normed(x_E, weight_E, eps, E, FROM_ONE), mask=is_E)


def rms_norm(x_TE: torch.Tensor, residual_TE: torch.Tensor | None, norm: Norm, first: Norm | None) -> torch.Tensor:
    """See `kernels.layer_ops.rms_norm` and `add_rms_norm`."""
    num_rows, width = x_TE.shape
    out_TE = x_TE.new_empty(x_TE.shape)
    residual = x_TE if residual_TE is None else residual_TE
    before = first or norm
    if num_rows:
        tile: int = triton.next_power_of_2(width)
        dependent = has_dependent_launch(x_TE.device)
        _rms_norm_kernel[(num_rows,)](
            x_TE, residual, before.weight_E, norm.weight_E, out_TE, x_TE.stride(0), residual.stride(0), out_TE.stride(0),
            before.eps, norm.eps, E=width, TILE=tile, WITH_RESIDUAL=residual_TE is not None, WITH_FIRST=first is not None,
            FIRST_FROM_ONE=before.from_one, FROM_ONE=norm.from_one, DEPENDENT=dependent,
            num_warps=min(8, max(1, tile // 512)), launch_pdl=dependent,
        )  # fmt: skip
    return out_TE


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_and_store_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, q_norm_ptr, k_norm_ptr, q_ptr, kv_ptr, eps,
    stride_t, stride_c, stride_s, stride_2, stride_b, stride_p, stride_k,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr,
    TILE: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, FROM_ONE: tl.constexpr, IN_ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program for some heads of a row: query heads, then key heads, then value heads. IN_ROWS: each row's slot is the row.

    out[d] = x[d] cos[d] + (d < R/2 ? -x[d + R/2] : x[d - R/2]) sin[d] for d < R, x[d] beyond; x normed before if asked.
    """
    row = tl.program_id(0).to(tl.int64)
    head_H = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_query_H = head_H < H
    is_key_H = (head_H >= H) & (head_H < H + K)
    is_value_H = (head_H >= H + K) & (head_H < H + 2 * K)
    d_D = tl.arange(0, TILE)
    half = R // 2
    partner_D = tl.where(d_D < half, d_D + half, d_D - half)
    is_turned_D = d_D < R
    is_HD = (head_H < H + 2 * K)[:, None] & (d_D < D)[None, :]
    is_turned_HD = is_HD & is_turned_D[None, :] & (head_H < H + K)[:, None]
    x_ptr_H1 = qkv_ptr + row * stride_t + head_H[:, None] * D
    let_next_start(DEPENDENT)
    wait_for_previous(DEPENDENT)
    x_HD = tl.load(x_ptr_H1 + d_D[None, :], mask=is_HD, other=0.0)
    other_HD = tl.load(x_ptr_H1 + partner_D[None, :], mask=is_turned_HD, other=0.0).to(tl.float32)
    full_HD = x_HD.to(tl.float32)
    if Q_NORM or K_NORM:
        scale_H1 = (1 / tl.sqrt(tl.sum(full_HD * full_HD, 1) / D + eps))[:, None]
        is_normed_H1 = ((is_query_H & Q_NORM) | (is_key_H & K_NORM))[:, None]
        q_weight_D = tl.load(q_norm_ptr + d_D, mask=d_D < D, other=0.0).to(tl.float32)
        k_weight_D = tl.load(k_norm_ptr + d_D, mask=d_D < D, other=0.0).to(tl.float32)
        q_other_D = tl.load(q_norm_ptr + partner_D, mask=is_turned_D, other=0.0).to(tl.float32)
        k_other_D = tl.load(k_norm_ptr + partner_D, mask=is_turned_D, other=0.0).to(tl.float32)
        weight_HD = tl.where(is_query_H[:, None], q_weight_D[None, :], k_weight_D[None, :])
        weight_other_HD = tl.where(is_query_H[:, None], q_other_D[None, :], k_other_D[None, :])
        normed_HD = scaled(x_HD, scale_H1, weight_HD, FROM_ONE).to(tl.float32)
        normed_other_HD = scaled(other_HD.to(x_HD.dtype), scale_H1, weight_other_HD, FROM_ONE).to(tl.float32)
        full_HD = tl.where(is_normed_H1, normed_HD, full_HD)
        other_HD = tl.where(is_normed_H1, normed_other_HD, other_HD)
    cos_D = tl.load(cos_ptr + row * stride_c + d_D, mask=is_turned_D, other=1.0).to(tl.float32)
    sin_D = tl.load(sin_ptr + row * stride_s + d_D, mask=is_turned_D, other=0.0).to(tl.float32)
    turned_HD = full_HD * cos_D[None, :] + tl.where((d_D < half)[None, :], -other_HD, other_HD) * sin_D[None, :]
    out_HD = tl.where(is_value_H[:, None], full_HD, turned_HD).to(x_HD.dtype)
    tl.store(q_ptr + (row * H + head_H[:, None]) * D + d_D[None, :], out_HD, mask=is_HD & is_query_H[:, None])
    if IN_ROWS:
        slot = row
    else:
        slot = tl.load(slots_ptr + row).to(tl.int64)
    to_ptr = kv_ptr + (slot // P) * stride_b + (slot % P) * stride_p
    key_ptr_HD = to_ptr + (head_H - H)[:, None] * stride_k + d_D[None, :]
    tl.store(key_ptr_HD, out_HD, mask=is_HD & is_key_H[:, None] & (slot >= 0))
    value_ptr_HD = to_ptr + stride_2 + (head_H - H - K)[:, None] * stride_k + d_D[None, :]
    tl.store(value_ptr_HD, out_HD, mask=is_HD & is_value_H[:, None] & (slot >= 0))


def rotate_and_store(
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
    """See `kernels.layer_ops.rotate_and_store`.

    KV of 8 bits passes through memory: in fp8 what a row's scale is depends on other rows, whose keys must be rotated first.
    """
    if scales_2BKX is not None:
        num_rows, (num_kv_heads, head_dim) = qkv_TE.shape[0], kv_2BPKD.shape[3:]
        new_2T1KD = qkv_TE.new_empty((2, num_rows, 1, num_kv_heads, head_dim))  # blocks of one token
        q_THD = _rotate_and_store(qkv_TE, cos_TR, sin_TR, None, new_2T1KD, num_heads, q_norm, k_norm)
        if num_rows:
            kv_bytes_triton.store_kv(new_2T1KD[0, :, 0], new_2T1KD[1, :, 0], kv_2BPKD, scales_2BKX, slots_T)
        return q_THD
    return _rotate_and_store(qkv_TE, cos_TR, sin_TR, slots_T, kv_2BPKD, num_heads, q_norm, k_norm)


def _rotate_and_store(
    qkv_TE: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    slots_T: torch.Tensor | None,
    kv_2BPKD: torch.Tensor,
    num_heads: int,
    q_norm: Norm | None,
    k_norm: Norm | None,
) -> torch.Tensor:
    """`slots_T` None: row t into slot t."""
    either = q_norm or k_norm
    num_rows = qkv_TE.shape[0]
    block_size, num_kv_heads, head_dim = kv_2BPKD.shape[2:]
    q_THD = qkv_TE.new_empty((num_rows, num_heads, head_dim))
    dependent = has_dependent_launch(qkv_TE.device)
    if num_rows:
        _rotate_and_store_kernel[(num_rows, triton.cdiv(num_heads + 2 * num_kv_heads, _ROTATED_HEADS))](
            qkv_TE, cos_TR, sin_TR, slots_T, qkv_TE if q_norm is None else q_norm.weight_E,
            qkv_TE if k_norm is None else k_norm.weight_E, q_THD, kv_2BPKD, 0.0 if either is None else either.eps,
            qkv_TE.stride(0), cos_TR.stride(0), sin_TR.stride(0), *kv_2BPKD.stride()[:4],
            H=num_heads, K=num_kv_heads, D=head_dim, R=cos_TR.shape[1], P=block_size, HEADS=_ROTATED_HEADS,
            TILE=triton.next_power_of_2(head_dim),
            Q_NORM=q_norm is not None, K_NORM=k_norm is not None, FROM_ONE=either is not None and either.from_one,
            IN_ROWS=slots_T is None, DEPENDENT=dependent, num_warps=4, launch_pdl=dependent,
        )  # fmt: skip
    return q_THD


@triton.jit  # type: ignore[untyped-decorator]
def activated(gate, up, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """activation(gate) up, as torch rounds it: after the activation, and after the product."""
    full = gate.to(tl.float32)
    if ACTIVATION == "silu":
        active = full / (1 + tl.exp(-full))
    elif ACTIVATION == "gelu":
        active = 0.5 * full * (1 + tl.erf(full * 0.7071067811865476))  # 1 / sqrt(2)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        inner = 0.7978845608028654 * (full + 0.044715 * full * full * full)  # sqrt(2 / pi)
        active = full / (1 + tl.exp(-2 * inner))  # 0.5 (1 + tanh(inner)) = 1 / (1 + exp(-2 inner))
    return (active.to(gate.dtype).to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _gated_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr, out_ptr, stride_g, stride_o, WIDTH: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out = activation(gate) up. One program for a tile of a row."""
    row = tl.program_id(0).to(tl.int64)
    at_I = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_I = at_I < WIDTH
    let_next_start(DEPENDENT)
    wait_for_previous(DEPENDENT)
    gate_I = tl.load(gate_up_ptr + row * stride_g + at_I, mask=is_I, other=0.0)
    up_I = tl.load(gate_up_ptr + row * stride_g + WIDTH + at_I, mask=is_I, other=0.0)
    tl.store(out_ptr + row * stride_o + at_I, activated(gate_I, up_I, ACTIVATION), mask=is_I)


def gated(gate_up_T2I: torch.Tensor, activation: str) -> torch.Tensor:
    """See `kernels.layer_ops.gated`."""
    num_rows, width = gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2
    out_TI = gate_up_T2I.new_empty((num_rows, width))
    if num_rows and width:
        tile = min(2048, triton.next_power_of_2(width))
        dependent = has_dependent_launch(gate_up_T2I.device)
        _gated_kernel[(num_rows, triton.cdiv(width, tile))](
            gate_up_T2I, out_TI, gate_up_T2I.stride(0), out_TI.stride(0),
            WIDTH=width, TILE=tile, ACTIVATION=activation, DEPENDENT=dependent, launch_pdl=dependent,
        )  # fmt: skip
    return out_TI


@triton.jit  # type: ignore[untyped-decorator]
def features(ptr_E, is_E, begin, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Features [begin, begin + BLOCK_E) of a row, of which only some are there unless WHOLE."""
    if WHOLE:
        x_E = tl.load(ptr_E + begin)
    else:
        x_E = tl.load(ptr_E + begin, mask=is_E, other=0.0)
    return x_E.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _features_to_norm(  # type: ignore[no-untyped-def]
    x_ptr_E, norm_ptr_E, is_E, begin, WHOLE: tl.constexpr, WITH_NORM: tl.constexpr, FROM_ONE: tl.constexpr
):  # fmt: skip
    """`features` and their squares. WITH_NORM: times the norm's weights, and still to be divided (`_norm_divisor`)."""
    x_E = features(x_ptr_E, is_E, begin, WHOLE)
    square_E = x_E * x_E
    if WITH_NORM:
        weight_E = features(norm_ptr_E, is_E, begin, WHOLE)
        x_E *= (1 + weight_E) if FROM_ONE else weight_E
    return x_E, square_E


@triton.jit  # type: ignore[untyped-decorator]
def rows_of(N, up_row, BLOCK_N: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rows of a weight that a program multiplies, and whether they are there: one for each of N features out, or if GATED
    two, its gate's and `up_row` rows behind that what is gated, in turns."""
    at_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATED:
        feature_N = at_N // 2
        row_N = feature_N + at_N % 2 * up_row
    else:
        feature_N = at_N
        row_N = at_N
    return row_N.to(tl.int64), feature_N < N


@triton.jit  # type: ignore[untyped-decorator]
def store_sums(  # type: ignore[no-untyped-def]
    out_ptr, sum_N, residual_N, N, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr, WITH_RESIDUAL: tl.constexpr
):  # fmt: skip
    """What the rows of `rows_of` came to, added to a residual if there is one; with an activation `activated(gate, up)`."""
    out_N = sum_N.to(out_ptr.dtype.element_ty)
    if ACTIVATION is not None:
        gate_I, up_I = tl.split(tl.reshape(out_N, (BLOCK_N // 2, 2)))
        i_I = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        tl.store(out_ptr + i_I, activated(gate_I, up_I, ACTIVATION), mask=i_I < N)
    else:
        n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(out_ptr + n_N, added_to(residual_N, out_N, out_N.dtype, WITH_RESIDUAL), mask=n_N < N)


@triton.jit  # type: ignore[untyped-decorator]
def _gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, normed_ptr, eps, stride_w, N, up_row,
    E: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, ACTIVATION: tl.constexpr,
    WITH_NORM: tl.constexpr, FROM_ONE: tl.constexpr, KEEP_NORMED: tl.constexpr, WITH_BIAS: tl.constexpr,
    WITH_RESIDUAL: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[n] = sum_e x[e] w[n, e] (+ bias[n]), added to the residual if there is one; or, with an activation, what it makes of
    that for gate and up. WITH_NORM: of the norm of x, which is kept by one more program if KEEP_NORMED."""
    LAST: tl.constexpr = E // BLOCK_E * BLOCK_E
    if KEEP_NORMED:  # noqa: SIM102  # the outer is decided when it is compiled
        if tl.program_id(0) == tl.num_programs(0) - 1:
            at_E = tl.arange(0, TILE)
            norm_E = tl.load(norm_ptr + at_E, mask=at_E < E, other=0.0)
            wait_for_previous(DEPENDENT)
            let_next_start(DEPENDENT)
            x_E = tl.load(x_ptr + at_E, mask=at_E < E, other=0.0)
            tl.store(normed_ptr + at_E, _normed(x_E, norm_E, eps, E, FROM_ONE), mask=at_E < E)
            return
    row_N, is_N = rows_of(N, up_row, BLOCK_N, ACTIVATION is not None)
    e_E = tl.arange(0, BLOCK_E)
    x_ptr_E = x_ptr + e_E
    norm_ptr_E = norm_ptr + e_E
    w_ptr_NE = weight_ptr + row_N[:, None] * stride_w + e_E[None, :]
    # weights don't wait for the kernel before
    if LAST > 0:
        w_NE = tl.load(w_ptr_NE, mask=is_N[:, None], other=0.0)
    else:
        w_NE = tl.load(w_ptr_NE, mask=is_N[:, None] & (e_E < E)[None, :], other=0.0)
    bias_N = tl.load(bias_ptr + row_N, mask=is_N, other=0.0).to(tl.float32) if WITH_BIAS else 0.0
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    residual_N = tl.load(residual_ptr + row_N, mask=is_N, other=0.0) if WITH_RESIDUAL else 0.0
    x_E, square_E = _features_to_norm(x_ptr_E, norm_ptr_E, e_E < E, 0, LAST > 0, WITH_NORM, FROM_ONE)
    acc_NE = w_NE.to(tl.float32) * x_E[None, :]
    for begin in tl.range(BLOCK_E, LAST, BLOCK_E, num_stages=STAGES):
        w_NE = tl.load(w_ptr_NE + begin, mask=is_N[:, None], other=0.0)
        x_E, more_E = _features_to_norm(x_ptr_E, norm_ptr_E, e_E < E, begin, True, WITH_NORM, FROM_ONE)
        acc_NE += w_NE.to(tl.float32) * x_E[None, :]
        if WITH_NORM:
            square_E += more_E
    if LAST > 0 and LAST < E:
        is_E = e_E < E - LAST
        w_NE = tl.load(w_ptr_NE + LAST, mask=is_N[:, None] & is_E[None, :], other=0.0)
        x_E, more_E = _features_to_norm(x_ptr_E, norm_ptr_E, is_E, LAST, False, WITH_NORM, FROM_ONE)
        acc_NE += w_NE.to(tl.float32) * x_E[None, :]
        if WITH_NORM:
            square_E += more_E
    sum_N = tl.sum(acc_NE, 1)
    if WITH_NORM:
        sum_N /= _norm_divisor(square_E, eps, E)
    sum_N += bias_N
    store_sums(out_ptr, sum_N, residual_N, N, BLOCK_N, ACTIVATION, WITH_RESIDUAL)


@triton.jit(do_not_specialize=["num_rows", "J"])  # type: ignore[untyped-decorator]
def _gated_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, out_ptr, num_rows, stride_x, stride_w, J, up_row,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[t, j] = activation(x[t] . w[j]) (x[t] . w[up_row + j]). One program for all rows and BLOCK_N / 2 features out."""
    HALF: tl.constexpr = BLOCK_N // 2
    row_N, is_N = rows_of(J, up_row, BLOCK_N, True)
    t_M, e_E = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    is_M = t_M < num_rows
    x_ptr_ME = x_ptr + t_M[:, None] * stride_x + e_E[None, :]
    w_ptr_EN = weight_ptr + row_N[None, :] * stride_w + e_E[:, None]
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in tl.range(0, E, BLOCK_E, num_stages=STAGES):
        x_ME = tl.load(x_ptr_ME + begin, mask=is_M[:, None], other=0.0)
        w_EN = tl.load(w_ptr_EN + begin, mask=is_N[None, :], other=0.0)
        acc_MN = tl.dot(x_ME, w_EN, acc_MN)
    gate_MJ, up_MJ = tl.split(tl.reshape(acc_MN.to(out_ptr.dtype.element_ty), (BLOCK_M, HALF, 2)))
    j_J = tl.program_id(0) * HALF + tl.arange(0, HALF)
    tl.store(
        out_ptr + t_M[:, None] * J + j_J[None, :], activated(gate_MJ, up_MJ, ACTIVATION),
        mask=is_M[:, None] & (j_J < J)[None, :],
    )  # fmt: skip


def gated_rows(h_TE: torch.Tensor, gate_up_2IE: torch.Tensor, activation: str, dims: range) -> torch.Tensor:
    """See `kernels.layer_ops.gated_product`, of rows and a weight that `kernels.layer_ops.uses_gated_rows` says yes to."""
    (num_rows, num_in), num_out = h_TE.shape, len(dims)
    block_m, block_n, block_e, stages = (16, 64, 64, 6) if num_rows <= 16 else (64, 64, 128, 3)
    dependent = has_dependent_launch(h_TE.device)
    out_TJ = h_TE.new_empty((num_rows, num_out))
    _gated_rows_kernel[(triton.cdiv(2 * num_out, block_n),)](
        h_TE, gate_up_2IE[dims.start :], out_TJ, num_rows, h_TE.stride(0), gate_up_2IE.stride(0), num_out,
        len(gate_up_2IE) // 2, E=num_in, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_E=block_e, ACTIVATION=activation,
        STAGES=stages, DEPENDENT=dependent, num_warps=4, launch_pdl=dependent,
    )  # fmt: skip
    return out_TJ


def gemv_config(num_rows: int, num_in: int, device: torch.device, *, normed: bool = False) -> GemvConfig:
    """How a product with so many rows of a weight is cut. `normed`: with which a norm rides along.

    One H200, bf16, with a norm before each, us by rows of the weight x features in, for blocks of 8 x 1024 (two stages) and as
    here: 2,048 x 4,096 8.5 and 6.1, 128 x 2,048 2.5 and 2.0, 32 x 2,880 3.1 and 2.3 (2 x 2048); 6,144 x 4,096 16.2 and 14.8,
    4,096 x 4,096 11.1 and 10.6, 28,672 x 4,096 56.5 and 55.3 (4 x 1024); 8,192 x 5,376 26.9 and 23.4, 43,008 x 5,376 112 and
    106, 5,376 x 21,504 71.9 and 59.6, 8,192 x 28,672 125 and 109 (4 x 2048); 5,120 x 2,880 10.3 and 9.7 (8 x 512). For
    5,120 x 2,048 and 4,096 x 14,336, 7.4 and 30.0, all others take longer.

    With norms that ride along, and a product before, cut as without them and as here: 5,120 x 2,048 11.5 and 9.7, 5,120 x 2,880
    18.2 and 14.6 (with two or four stages the same), 32 x 2,880 7.9 and 7.0.
    """
    if num_rows < 20 * num_processors(device):
        return GemvConfig(block_n=4 if normed else 2, block_e=2048, num_warps=4, num_stages=1)
    if normed and num_in < 4096:
        return (
            GemvConfig(8, 1024, num_warps=4, num_stages=1) if num_in % 1024 else GemvConfig(8, 512, num_warps=4, num_stages=2)
        )
    if num_in == 4096:
        return GemvConfig(block_n=4, block_e=1024, num_warps=4, num_stages=4)
    if num_in > 4096 and num_rows > 4096:
        return GemvConfig(block_n=4, block_e=2048, num_warps=4, num_stages=1)
    return GemvConfig(block_n=8, block_e=1024 if num_in % 1024 == 0 else 512, num_warps=4, num_stages=2)


def gemv(
    x_1E: torch.Tensor,
    weight_NE: torch.Tensor,
    bias_N: torch.Tensor | None,
    residual_1N: torch.Tensor | None,
    *,
    norm: Norm | None = None,
    normed_1E: torch.Tensor | None = None,
    activation: str | None = None,
    dims: range | None = None,
    config: GemvConfig | None = None,
) -> torch.Tensor:
    """See `kernels.layer_ops.linear`; with an activation `gated_product`, of `dims`, with no bias or residual. `normed_1E`:
    where the norm of x is kept, too."""
    num_out, up_row = weight_NE.shape[0], 0
    if activation is not None:
        up_row = num_out // 2
        dims = range(up_row) if dims is None else dims
        weight_NE, num_out = weight_NE[dims.start :], len(dims)
    num_rows, num_in = num_out if activation is None else 2 * num_out, weight_NE.shape[1]
    config = config or gemv_config(num_rows, num_in, x_1E.device, normed=norm is not None)
    dependent = has_dependent_launch(x_1E.device)
    out_1N = x_1E.new_empty((1, num_out)) if residual_1N is None else residual_1N
    _gemv_kernel[(triton.cdiv(num_rows, config.block_n) + (normed_1E is not None),)](
        x_1E, x_1E if norm is None else norm.weight_E, weight_NE, x_1E if bias_N is None else bias_N, out_1N, out_1N,
        out_1N if normed_1E is None else normed_1E, 0.0 if norm is None else norm.eps, weight_NE.stride(0), num_out, up_row,
        E=num_in, TILE=1 if normed_1E is None else triton.next_power_of_2(num_in), BLOCK_N=config.block_n,
        BLOCK_E=config.block_e, ACTIVATION=activation, WITH_NORM=norm is not None,
        FROM_ONE=norm is not None and norm.from_one, KEEP_NORMED=normed_1E is not None, WITH_BIAS=bias_N is not None,
        WITH_RESIDUAL=residual_1N is not None, STAGES=config.num_stages, DEPENDENT=dependent, num_warps=config.num_warps,
        launch_pdl=dependent,
    )  # fmt: skip
    return out_1N
