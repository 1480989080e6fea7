"""Triton versions of `kernels.products`, called by them after validation.

One row: as the plain product (`kernels.layer_ops_triton`), but that weights are converted in registers and what is summed is
scaled, at the end where a feature out has one scale. Few rows: tiles whose weights are converted on their way to the tensor
cores. e4m3 and int8 are exact in fp16 and bf16.

Shape suffixes: T rows, E features in, N features out, G groups; in kernels, tiles of them (M rows of a tile).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.launch import has_dependent_launch, let_next_start, num_processors, wait_for_previous
from kernels.layer_ops_triton import GemvConfig, add_tile
from kernels.products import Quantised


@dataclass(frozen=True, slots=True)
class ProductConfig:
    """How a product of few rows is cut."""

    block_m: int
    block_n: int
    block_e: int
    num_warps: int
    num_stages: int


@triton.jit  # type: ignore[untyped-decorator]
def _scales(  # type: ignore[no-untyped-def]
    scale_ptr_N, is_N, begin, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Of weights [n, begin + e]: `[BLOCK_N, BLOCK_E]`, or `[BLOCK_N, 1]` where a tile lies within a group."""
    if GROUP < BLOCK_E:
        g_G = begin // GROUP + tl.arange(0, BLOCK_E // GROUP)
        scale_NG = tl.load(scale_ptr_N[:, None] + g_G[None, :], mask=is_N[:, None] & (g_G < GROUPS)[None, :], other=0.0)
        scale = tl.reshape(tl.broadcast_to(scale_NG[:, :, None], (BLOCK_N, BLOCK_E // GROUP, GROUP)), (BLOCK_N, BLOCK_E))
    else:
        scale = tl.load(scale_ptr_N + begin // GROUP, mask=is_N, other=0.0)[:, None]
    return scale


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(  # type: ignore[no-untyped-def]
    w_NE, scale_ptr_N, is_N, begin, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Weights [n, begin + e] with their scales, or as they are where one scale is left for the end."""
    full_NE = w_NE.to(tl.float32)
    if GROUPS > 1:
        full_NE *= _scales(scale_ptr_N, is_N, begin, GROUPS, GROUP, BLOCK_N, BLOCK_E)
    return full_NE


@triton.jit  # type: ignore[untyped-decorator]
def _gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, stride_w, N,
    E: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    ACTIVATION: tl.constexpr, WITH_BIAS: tl.constexpr, WITH_RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[n] = sum_e f(x)[e] q[n, e] scale[n, e // GROUP] (+ bias[n]), added to the residual if there is one; f(x) is
    activation(gate) up, or x."""
    LAST: tl.constexpr = E // BLOCK_E * BLOCK_E
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_N = n_N < N
    e_E = tl.arange(0, BLOCK_E)
    x_ptr_E = x_ptr + e_E
    w_ptr_NE = weight_ptr + n_N.to(tl.int64)[:, None] * stride_w + e_E[None, :]
    scale_ptr_N = scale_ptr + n_N.to(tl.int64) * GROUPS
    # weights don't wait for the kernel before
    w_NE = tl.load(w_ptr_NE, mask=is_N[:, None] & (e_E < E)[None, :], other=0.0)
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    acc_NE = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
    w_NE = _scaled(w_NE, scale_ptr_N, is_N, 0, GROUPS, GROUP, BLOCK_N, BLOCK_E)
    acc_NE = add_tile(acc_NE, w_NE, x_ptr_E, e_E < E, 0, E, ACTIVATION, E >= BLOCK_E)
    for begin in tl.range(BLOCK_E, LAST, BLOCK_E, num_stages=STAGES):
        w_NE = tl.load(w_ptr_NE + begin, mask=is_N[:, None], other=0.0)
        w_NE = _scaled(w_NE, scale_ptr_N, is_N, begin, GROUPS, GROUP, BLOCK_N, BLOCK_E)
        acc_NE = add_tile(acc_NE, w_NE, x_ptr_E, e_E < E, begin, E, ACTIVATION, True)
    if LAST > 0 and LAST < E:
        is_E = e_E < E - LAST
        w_NE = tl.load(w_ptr_NE + LAST, mask=is_N[:, None] & is_E[None, :], other=0.0)
        w_NE = _scaled(w_NE, scale_ptr_N, is_N, LAST, GROUPS, GROUP, BLOCK_N, BLOCK_E)
        acc_NE = add_tile(acc_NE, w_NE, x_ptr_E, is_E, LAST, E, ACTIVATION, False)
    sum_N = tl.sum(acc_NE, 1)
    if GROUPS == 1:
        sum_N *= tl.load(scale_ptr_N, mask=is_N, other=0.0)
    if WITH_BIAS:
        sum_N += tl.load(bias_ptr + n_N, mask=is_N, other=0.0).to(tl.float32)
    out_N = sum_N.to(out_ptr.dtype.element_ty)
    if WITH_RESIDUAL:
        residual_N = tl.load(residual_ptr + n_N, mask=is_N, other=0.0)
        out_N = (out_N.to(tl.float32) + residual_N.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n_N, out_N, mask=is_N)


def gemv_config(matrix: Quantised) -> GemvConfig:
    """How a product of one row is cut: as many bytes under way as the plain product has, so twice the stages, or rows. By
    arithmetic, not measured."""
    block_e = min(1024, triton.next_power_of_2(matrix.shape[1]))
    return GemvConfig(block_n=8, block_e=block_e, num_warps=4, num_stages=4)


def gemv(
    x_1E: torch.Tensor,
    matrix: Quantised,
    bias_N: torch.Tensor | None,
    residual_1N: torch.Tensor | None,
    *,
    activation: str | None = None,
    config: GemvConfig | None = None,
) -> torch.Tensor:
    """See `kernels.products.product`; with an activation x is gate and up, `[1, 2 E]`."""
    num_out, num_in = matrix.shape
    config = config or gemv_config(matrix)
    dependent = has_dependent_launch(x_1E.device)
    out_1N = x_1E.new_empty((1, num_out)) if residual_1N is None else residual_1N
    _gemv_kernel[(triton.cdiv(num_out, config.block_n),)](
        x_1E, matrix.weight_NE, matrix.scale_NG, x_1E if bias_N is None else bias_N, out_1N, out_1N,
        matrix.weight_NE.stride(0), num_out,
        E=num_in, GROUPS=matrix.scale_NG.shape[1], GROUP=matrix.group, BLOCK_N=config.block_n, BLOCK_E=config.block_e,
        ACTIVATION=activation, WITH_BIAS=bias_N is not None, WITH_RESIDUAL=residual_1N is not None, STAGES=config.num_stages,
        DEPENDENT=dependent, num_warps=config.num_warps, launch_pdl=dependent,
    )  # fmt: skip
    return out_1N


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _product_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, num_rows, stride_x, stride_w, stride_o, N,
    E: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, WITH_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[t, n] = sum_e x[t, e] q[n, e] scale[n, e // GROUP] (+ bias[n])."""
    t_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    e_E = tl.arange(0, BLOCK_E)
    is_M, is_N = t_M < num_rows, n_N < N
    x_ptr_ME = x_ptr + t_M.to(tl.int64)[:, None] * stride_x + e_E[None, :]
    w_ptr_EN = weight_ptr + n_N.to(tl.int64)[None, :] * stride_w + e_E[:, None]
    scale_ptr_N = scale_ptr + n_N.to(tl.int64) * GROUPS
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in tl.range(0, E, BLOCK_E, num_stages=STAGES):
        if E % BLOCK_E == 0:
            x_ME = tl.load(x_ptr_ME + begin, mask=is_M[:, None], other=0.0)
            w_EN = tl.load(w_ptr_EN + begin, mask=is_N[None, :], other=0.0)
        else:
            is_E = begin + e_E < E
            x_ME = tl.load(x_ptr_ME + begin, mask=is_M[:, None] & is_E[None, :], other=0.0)
            w_EN = tl.load(w_ptr_EN + begin, mask=is_E[:, None] & is_N[None, :], other=0.0)
        if GROUPS == 1:
            acc_MN = tl.dot(x_ME, w_EN.to(x_ME.dtype), acc_MN, input_precision="ieee")
        elif GROUP < BLOCK_E:
            scale_NE = _scales(scale_ptr_N, is_N, begin, GROUPS, GROUP, BLOCK_N, BLOCK_E)
            scaled_EN = (w_EN.to(tl.float32) * tl.trans(scale_NE)).to(x_ME.dtype)
            acc_MN = tl.dot(x_ME, scaled_EN, acc_MN, input_precision="ieee")
        else:
            scale_N = tl.load(scale_ptr_N + begin // GROUP, mask=is_N, other=0.0)
            acc_MN += tl.dot(x_ME, w_EN.to(x_ME.dtype), input_precision="ieee") * scale_N[None, :]
    if GROUPS == 1:
        acc_MN *= tl.load(scale_ptr_N, mask=is_N, other=0.0)[None, :]
    if WITH_BIAS:
        acc_MN += tl.load(bias_ptr + n_N, mask=is_N, other=0.0).to(tl.float32)[None, :]
    out_ptr_MN = out_ptr + t_M.to(tl.int64)[:, None] * stride_o + n_N[None, :]
    tl.store(out_ptr_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=is_M[:, None] & is_N[None, :])


def product_config(num_rows: int, matrix: Quantised, dtype: torch.dtype) -> ProductConfig:
    """How a product of 2 to 256 rows is cut: reading weights takes its time, so there are programs for all processors, each
    with some 30 KiB of weights under way. By arithmetic, not measured."""
    num_out, num_in = matrix.shape
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    if dtype == torch.float32:
        return ProductConfig(block_m, block_n=64, block_e=32, num_warps=4, num_stages=2)
    processors = num_processors(matrix.device)
    block_n = next((size for size in (128, 64) if num_out >= size * processors), 32)
    # as many features as a group has at most, so that what a tile sums has one scale
    most = 128 if matrix.scale_NG.shape[1] > 1 or block_n > 32 else 256
    block_e = min(most, max(16, triton.next_power_of_2(min(num_in, matrix.group))))
    return ProductConfig(block_m, block_n, block_e, num_warps=4, num_stages=4)


def product(
    x_TE: torch.Tensor, matrix: Quantised, bias_N: torch.Tensor | None, *, config: ProductConfig | None = None
) -> torch.Tensor:
    """See `kernels.products.product`."""
    num_rows, (num_out, num_in) = len(x_TE), matrix.shape
    config = config or product_config(num_rows, matrix, x_TE.dtype)
    dependent = has_dependent_launch(x_TE.device)
    out_TN = x_TE.new_empty((num_rows, num_out))
    _product_kernel[(triton.cdiv(num_out, config.block_n), triton.cdiv(num_rows, config.block_m))](
        x_TE, matrix.weight_NE, matrix.scale_NG, x_TE if bias_N is None else bias_N, out_TN, num_rows,
        x_TE.stride(0), matrix.weight_NE.stride(0), out_TN.stride(0), num_out,
        E=num_in, GROUPS=matrix.scale_NG.shape[1], GROUP=matrix.group, WITH_BIAS=bias_N is not None,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_E=config.block_e, STAGES=config.num_stages,
        DEPENDENT=dependent, num_warps=config.num_warps, launch_pdl=dependent,
    )  # fmt: skip
    return out_TN


@triton.jit  # type: ignore[untyped-decorator]
def _dequantise_kernel(  # type: ignore[no-untyped-def]
    weight_ptr, scale_ptr, out_ptr, stride_w, E: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[n, e] = q[n, e] scale[n, e // GROUP]. One program for a tile of a feature out."""
    n = tl.program_id(0).to(tl.int64)
    e_E = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_E = e_E < E
    wait_for_previous(DEPENDENT)  # what it writes may have been read by who came before
    let_next_start(DEPENDENT)
    w_E = tl.load(weight_ptr + n * stride_w + e_E, mask=is_E, other=0.0).to(tl.float32)
    if GROUPS == 1:
        w_E *= tl.load(scale_ptr + n)
    else:
        w_E *= tl.load(scale_ptr + n * GROUPS + e_E // GROUP, mask=is_E, other=0.0)
    tl.store(out_ptr + n * E + e_E, w_E.to(out_ptr.dtype.element_ty), mask=is_E)


def dequantise(matrix: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """See `kernels.products.dequantise`."""
    num_out, num_in = matrix.shape
    out_NE = torch.empty((num_out, num_in), dtype=dtype, device=matrix.device)
    tile = min(2048, triton.next_power_of_2(num_in))
    dependent = has_dependent_launch(matrix.device)
    _dequantise_kernel[(num_out, triton.cdiv(num_in, tile))](
        matrix.weight_NE, matrix.scale_NG, out_NE, matrix.weight_NE.stride(0),
        E=num_in, GROUPS=matrix.scale_NG.shape[1], GROUP=matrix.group, TILE=tile, DEPENDENT=dependent, launch_pdl=dependent,
    )  # fmt: skip
    return out_NE
