"""Triton versions of `kernels.products`, called by them after validation.

One row: as the plain product (`kernels.layer_ops_triton`), but that weights are converted in registers and what is summed is
scaled, at the end where a feature out has one scale. Few rows: tiles whose weights are converted on their way to the tensor
cores (of up to eight rows from registers, which only a first operand can come from), and where features out are too few to keep
all processors busy, features in are cut in parts whose sums are added by a second kernel. e4m3 and int8 are exact in fp16 and
bf16, and become so four at a time, by their bits, in fewer instructions than the processor's own conversions take:

    e4m3  moved to where bf16 has its bits, it is the number times 2^-120, as exponents are counted from 7 and from 127
    int8  its lower seven bits behind the exponent of 128 in bf16, less 128, or 256 if it is negative; with the sign turned, all
          eight behind that of 1,024 in fp16, less 1,152

Shape suffixes: T rows, E features in, N features out, G groups, S parts of features in; in kernels, tiles of them (M rows of a
tile).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.launch import has_dependent_launch, let_next_start, num_processors, wait_for_previous
from kernels.layer_ops_triton import GemvConfig, features, rows_of, store_sums
from kernels.products import Quantised


@dataclass(frozen=True, slots=True)
class ProductConfig:
    """How a product of few rows is cut."""

    block_m: int
    block_n: int
    block_e: int
    num_warps: int
    num_stages: int
    parts: int = 1
    """Of features in."""
    turned: bool = False
    """Whether weights are the first operand."""


@triton.jit  # type: ignore[untyped-decorator]
def _as_rows_are(w, dtype: tl.constexpr, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights in the type of rows; `PACKED`: to bf16, four at a time, int8 to fp16, too."""
    if PACKED and w.dtype == tl.int8 and dtype == tl.float16:
        made = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 from_0, base, number;
            mov.b32 base, 0x64806480;
            xor.b32 from_0, $2, 0x80808080;
            prmt.b32 number, from_0, 0x64646464, 0x4140;
            sub.rn.f16x2 $0, number, base;
            prmt.b32 number, from_0, 0x64646464, 0x4342;
            sub.rn.f16x2 $1, number, base;
            }
            """,
            "=&r,=r,r",
            [w],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    elif PACKED and w.dtype == tl.int8:
        made = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, number, base;
            prmt.b32 low, $2, 0, 0x4140;
            prmt.b32 high, $2, 0, 0x4342;
            lop3.b32 number, low, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 base, low, 0x00800080, 0x43004300, 0xEA;
            sub.rn.bf16x2 $0, number, base;
            lop3.b32 number, high, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 base, high, 0x00800080, 0x43004300, 0xEA;
            sub.rn.bf16x2 $1, number, base;
            }
            """,
            "=&r,=r,r",
            [w],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    elif PACKED:
        made = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, u, v, unscaled;
            mov.b32 unscaled, 0x7B807B80;
            prmt.b32 low, $2, 0, 0x1404;
            prmt.b32 high, $2, 0, 0x3424;
            shr.u32 u, low, 4;
            shr.u32 v, high, 4;
            and.b32 u, u, 0x07F007F0;
            and.b32 v, v, 0x07F007F0;
            lop3.b32 low, low, 0x80008000, u, 0xEA;
            lop3.b32 high, high, 0x80008000, v, 0xEA;
            mul.rn.bf16x2 $0, low, unscaled;
            mul.rn.bf16x2 $1, high, unscaled;
            }
            """,
            "=r,=r,r",
            [w.to(tl.int8, bitcast=True)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        made = w.to(dtype)
    return made


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
    return scale.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_scales(  # type: ignore[no-untyped-def]
    scale_ptr_N, is_N, begin, GROUPS: tl.constexpr, GROUP: tl.constexpr, TOGETHER: tl.constexpr, SUMS: tl.constexpr
):  # fmt: skip
    """Of what `_summed` makes of a tile; 1 where one scale is left for the end."""
    if GROUPS > 1:
        g_P = (begin + tl.arange(0, SUMS) * TOGETHER) // GROUP
        is_NP = is_N[:, None] & (g_P < GROUPS)[None, :]
        scale = tl.load(scale_ptr_N[:, None] + g_P[None, :], mask=is_NP, other=0.0).to(tl.float32)
    else:
        scale = 1.0
    return scale


@triton.jit  # type: ignore[untyped-decorator]
def _summed(  # type: ignore[no-untyped-def]
    w_NE, x_ptr_E, is_E, begin, WHOLE: tl.constexpr, TOGETHER: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """w[n, e] x[e] of a tile, as many summed as a thread has side by side: sums for each would take the registers of programs
    that could load more."""
    if PACKED and w_NE.dtype == tl.int8:
        full_NE = _as_rows_are(w_NE, tl.float16, True).to(tl.float32)
    else:
        full_NE = w_NE.to(tl.float32)
    full_NE *= features(x_ptr_E, is_E, begin, WHOLE)[None, :]
    return tl.sum(tl.reshape(full_NE, (w_NE.shape[0], w_NE.shape[1] // TOGETHER, TOGETHER)), 2)


@triton.jit  # type: ignore[untyped-decorator]
def _gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, stride_w, N, up_row,
    E: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    ACTIVATION: tl.constexpr, WITH_BIAS: tl.constexpr, WITH_RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
    PACKED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[n] = sum_e x[e] q[n, e] scale[n, e // GROUP] (+ bias[n]), added to the residual if there is one; or, with an
    activation, what it makes of that for gate and up."""
    LAST: tl.constexpr = E // BLOCK_E * BLOCK_E
    PER_THREAD: tl.constexpr = 16 if BLOCK_E >= 16 else BLOCK_E
    TOGETHER: tl.constexpr = GROUP if GROUP < PER_THREAD else PER_THREAD
    SUMS: tl.constexpr = BLOCK_E // TOGETHER
    row_N, is_N = rows_of(N, up_row, BLOCK_N, ACTIVATION is not None)
    e_E = tl.arange(0, BLOCK_E)
    x_ptr_E = x_ptr + e_E
    w_ptr_NE = weight_ptr + row_N[:, None] * stride_w + e_E[None, :]
    scale_ptr_N = scale_ptr + row_N * GROUPS
    # weights don't wait for the kernel before
    w_NE = tl.load(w_ptr_NE, mask=is_N[:, None] & (e_E < E)[None, :], other=0.0)
    scale_NP = _sum_scales(scale_ptr_N, is_N, 0, GROUPS, GROUP, TOGETHER, SUMS)
    scale_N = tl.load(scale_ptr_N, mask=is_N, other=0.0).to(tl.float32) if GROUPS == 1 else 1.0
    bias_N = tl.load(bias_ptr + row_N, mask=is_N, other=0.0).to(tl.float32) if WITH_BIAS else 0.0
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    residual_N = tl.load(residual_ptr + row_N, mask=is_N, other=0.0) if WITH_RESIDUAL else 0.0
    acc_NP = _summed(w_NE, x_ptr_E, e_E < E, 0, LAST > 0, TOGETHER, PACKED) * scale_NP
    for begin in tl.range(BLOCK_E, LAST, BLOCK_E, num_stages=STAGES):
        w_NE = tl.load(w_ptr_NE + begin, mask=is_N[:, None], other=0.0)
        scale_NP = _sum_scales(scale_ptr_N, is_N, begin, GROUPS, GROUP, TOGETHER, SUMS)
        acc_NP += _summed(w_NE, x_ptr_E, e_E < E, begin, True, TOGETHER, PACKED) * scale_NP
    if LAST > 0 and LAST < E:
        is_E = e_E < E - LAST
        w_NE = tl.load(w_ptr_NE + LAST, mask=is_N[:, None] & is_E[None, :], other=0.0)
        scale_NP = _sum_scales(scale_ptr_N, is_N, LAST, GROUPS, GROUP, TOGETHER, SUMS)
        acc_NP += _summed(w_NE, x_ptr_E, is_E, LAST, False, TOGETHER, PACKED) * scale_NP
    sum_N = tl.sum(acc_NP, 1) * scale_N + bias_N
    store_sums(out_ptr, sum_N, residual_N, N, BLOCK_N, ACTIVATION, WITH_RESIDUAL)


def _packed(x_TE: torch.Tensor) -> bool:
    """Whether four weights become bf16 at a time, by what Hopper has for it."""
    return has_dependent_launch(x_TE.device) and x_TE.dtype == torch.bfloat16


def _in_groups(block_e: int, matrix: Quantised) -> int:
    """A tile of no more features in that lies within a group, or has whole groups (`_scales`)."""
    if matrix.scale_NG.shape[1] == 1 or matrix.group.bit_count() == 1:
        return block_e
    return min(block_e, matrix.group & -matrix.group)


def gemv_config(matrix: Quantised) -> GemvConfig:
    """How a product of one row is cut.

    One H200, e4m3, with a norm before each, us with blocks of 8 x 1024 in four stages and a sum for each weight, and as here:
    6,144 x 4,096 9.02 and 8.11, 28,672 x 4,096 30.1 and 28.4, 4,096 x 4,096 6.64 and 5.97, 4,096 x 14,336 17.2 and 16.3. With
    eight warps the first two take 8.53 and 29.2, with blocks of 4 x 2048 in four the others 6.54 and 18.6; two and three tiles
    on their way at a time, by copies to shared memory or to registers, are no faster. int8 with a scale for 32, us of the last
    one with blocks of 8 x 2048 and of 4: 24.8 and 18.0.
    """
    num_out, num_in = matrix.shape
    block_e = _in_groups(min(2048, triton.next_power_of_2(num_in)), matrix)
    if num_out >= 6144 or matrix.scale_NG.shape[1] > 1:
        return GemvConfig(block_n=4, block_e=block_e, num_warps=4, num_stages=1)
    return GemvConfig(block_n=8, block_e=block_e, num_warps=8, num_stages=1)


def gemv(
    x_1E: torch.Tensor,
    matrix: Quantised,
    bias_N: torch.Tensor | None,
    residual_1N: torch.Tensor | None,
    *,
    activation: str | None = None,
    config: GemvConfig | None = None,
) -> torch.Tensor:
    """See `kernels.products.product`; with an activation `kernels.layer_ops.gated_product`, with no bias or residual."""
    num_rows, num_in = matrix.shape
    num_out, up_row = (num_rows, 0) if activation is None else (num_rows // 2, num_rows // 2)
    config = config or gemv_config(matrix)
    dependent = has_dependent_launch(x_1E.device)
    out_1N = x_1E.new_empty((1, num_out)) if residual_1N is None else residual_1N
    _gemv_kernel[(triton.cdiv(num_rows, config.block_n),)](
        x_1E, matrix.weight_NE, matrix.scale_NG, x_1E if bias_N is None else bias_N, out_1N, out_1N,
        matrix.weight_NE.stride(0), num_out, up_row,
        E=num_in, GROUPS=matrix.scale_NG.shape[1], GROUP=matrix.group, BLOCK_N=config.block_n, BLOCK_E=config.block_e,
        ACTIVATION=activation, WITH_BIAS=bias_N is not None, WITH_RESIDUAL=residual_1N is not None, STAGES=config.num_stages,
        PACKED=_packed(x_1E), DEPENDENT=dependent, num_warps=config.num_warps, launch_pdl=dependent,
    )  # fmt: skip
    return out_1N


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _product_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, num_rows, stride_x, stride_w, stride_o, N,
    E: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, WITH_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, TURNED: tl.constexpr,
    PACKED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[t, n] = sum_e x[t, e] q[n, e] scale[n, e // GROUP] (+ bias[n]); of several parts each to an out [s, t, n] of its own,
    without what is left for the end. TURNED: weights are the first operand, which tensor cores take from registers."""
    part = tl.program_id(2)
    LENGTH: tl.constexpr = E // PARTS
    t_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    e_E = tl.arange(0, BLOCK_E)
    is_M, is_N = t_M < num_rows, n_N < N
    x_ptr_ME = x_ptr + t_M.to(tl.int64)[:, None] * stride_x + e_E[None, :]
    w_ptr_NE = weight_ptr + n_N.to(tl.int64)[:, None] * stride_w + e_E[None, :]
    scale_ptr_N = scale_ptr + n_N.to(tl.int64) * GROUPS
    let_next_start(DEPENDENT)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if TURNED else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in tl.range(part * LENGTH, part * LENGTH + LENGTH, BLOCK_E, num_stages=STAGES):
        if LENGTH % BLOCK_E == 0:
            x_ME = tl.load(x_ptr_ME + begin, mask=is_M[:, None], other=0.0)
            w_NE = tl.load(w_ptr_NE + begin, mask=is_N[:, None], other=0.0)
        else:
            is_E = begin + e_E < E
            x_ME = tl.load(x_ptr_ME + begin, mask=is_M[:, None] & is_E[None, :], other=0.0)
            w_NE = tl.load(w_ptr_NE + begin, mask=is_N[:, None] & is_E[None, :], other=0.0)
        w_NE = _as_rows_are(w_NE, x_ME.dtype, PACKED)
        IN_TILE: tl.constexpr = GROUPS > 1 and GROUP < BLOCK_E
        if IN_TILE:
            scale_NE = _scales(scale_ptr_N, is_N, begin, GROUPS, GROUP, BLOCK_N, BLOCK_E)
            if PACKED:
                w_NE *= scale_NE.to(x_ME.dtype)
            else:  # scales may be too small for fp16
                w_NE = (w_NE.to(tl.float32) * scale_NE).to(x_ME.dtype)
        if TURNED:
            sums = tl.dot(w_NE, tl.trans(x_ME), acc if GROUPS == 1 or IN_TILE else None, input_precision="ieee")
        else:
            sums = tl.dot(x_ME, tl.trans(w_NE), acc if GROUPS == 1 or IN_TILE else None, input_precision="ieee")
        if GROUPS == 1 or IN_TILE:
            acc = sums
        else:
            scale_N = tl.load(scale_ptr_N + begin // GROUP, mask=is_N, other=0.0).to(tl.float32)
            acc += sums * (scale_N[:, None] if TURNED else scale_N[None, :])
    acc_MN = tl.trans(acc) if TURNED else acc
    if PARTS == 1:
        acc_MN = _finished(acc_MN, scale_ptr_N, bias_ptr + n_N, is_N, GROUPS, WITH_BIAS)
    out_ptr_MN = out_ptr + (part * num_rows + t_M).to(tl.int64)[:, None] * stride_o + n_N[None, :]
    tl.store(out_ptr_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=is_M[:, None] & is_N[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _finished(  # type: ignore[no-untyped-def]
    acc_MN, scale_ptr_N, bias_ptr_N, is_N, GROUPS: tl.constexpr, WITH_BIAS: tl.constexpr
):  # fmt: skip
    """With the scale of each feature out, where there is one, and the bias."""
    if GROUPS == 1:
        acc_MN *= tl.load(scale_ptr_N, mask=is_N, other=0.0).to(tl.float32)[None, :]
    if WITH_BIAS:
        acc_MN += tl.load(bias_ptr_N, mask=is_N, other=0.0).to(tl.float32)[None, :]
    return acc_MN


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _add_parts_kernel(  # type: ignore[no-untyped-def]
    parts_ptr, scale_ptr, bias_ptr, out_ptr, num_rows, N,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, WITH_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program for a tile of a row: what `_product_kernel` leaves of each part."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_N = n_N < N
    row_M = tl.program_id(1).to(tl.int64) + tl.zeros((1,), dtype=tl.int64)
    let_next_start(DEPENDENT)
    wait_for_previous(DEPENDENT)
    sum_MN = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        sum_MN += tl.load(parts_ptr + (part * num_rows + row_M)[:, None] * N + n_N[None, :], mask=is_N[None, :], other=0.0)
    sum_MN = _finished(sum_MN, scale_ptr + n_N.to(tl.int64) * GROUPS, bias_ptr + n_N, is_N, GROUPS, WITH_BIAS)
    tl.store(out_ptr + row_M[:, None] * N + n_N[None, :], sum_MN.to(out_ptr.dtype.element_ty), mask=is_N[None, :])


def product_config(num_rows: int, matrix: Quantised, dtype: torch.dtype) -> ProductConfig:
    """How a product of 2 to 256 rows is cut: reading weights takes its time, so there are programs for all processors.

    One H200, bf16, us of 6,144 x 4,096, 4,096 x 4,096, 28,672 x 4,096 and 4,096 x 14,336 together, of 8, 16, 32 and 64 rows:
    e4m3 72, 86, 113 and 130, int8 with a scale for 32 83, 90, 114 and 164; the library's of bf16 122, 123, 125 and 131.
    """
    num_out, num_in = matrix.shape
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    if dtype == torch.float32:
        return ProductConfig(block_m, block_n=64, block_e=32, num_warps=4, num_stages=2)
    is_wide = num_out >= 128 * num_processors(matrix.device)
    if num_rows <= 8:
        block_m, block_n, block_e, num_stages = 8, 64, 128, 4
    elif matrix.group >= num_in:
        block_n, block_e, num_stages = 128, 128, 3
    elif matrix.group < 128:  # there are some in a tile, whose weights are scaled before they are multiplied
        block_n, block_e, num_stages = (128, 256, 3) if block_m < 64 else (64, 128, 3)
    else:
        block_n, block_e, num_stages = (128, 128, 3) if is_wide else (64, 64 if num_in <= 4096 else 128, 4)
    block_e = _in_groups(max(16, min(block_e, triton.next_power_of_2(num_in))), matrix)
    most = 1 if is_wide else 8 if num_in >= 8192 and num_rows <= 64 else 4
    parts = next(parts for parts in (8, 4, 2, 1) if parts <= most and (parts == 1 or num_in % (parts * block_e) == 0))
    return ProductConfig(block_m, block_n, block_e, num_warps=4, num_stages=num_stages, parts=parts, turned=num_rows <= 8)


def product(
    x_TE: torch.Tensor, matrix: Quantised, bias_N: torch.Tensor | None, *, config: ProductConfig | None = None
) -> torch.Tensor:
    """See `kernels.products.product`."""
    num_rows, (num_out, num_in) = len(x_TE), matrix.shape
    config = config or product_config(num_rows, matrix, x_TE.dtype)
    dependent = has_dependent_launch(x_TE.device)
    out_TN = x_TE.new_empty((num_rows, num_out))
    parts_TN = out_TN if config.parts == 1 else out_TN.new_empty((config.parts * num_rows, num_out), dtype=torch.float32)
    groups, bias = matrix.scale_NG.shape[1], x_TE if bias_N is None else bias_N
    _product_kernel[(triton.cdiv(num_out, config.block_n), triton.cdiv(num_rows, config.block_m), config.parts)](
        x_TE, matrix.weight_NE, matrix.scale_NG, bias, parts_TN, num_rows,
        x_TE.stride(0), matrix.weight_NE.stride(0), num_out, num_out,
        E=num_in, GROUPS=groups, GROUP=matrix.group, WITH_BIAS=bias_N is not None,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_E=config.block_e, PARTS=config.parts, STAGES=config.num_stages,
        TURNED=config.turned, PACKED=_packed(x_TE), DEPENDENT=dependent, num_warps=config.num_warps,
        # started while the kernels before still run, its programs would be spread unevenly over processors, and stay so: a step
        # of the 8B shape with e4m3 weights takes 4.30 ms of 8 rows and 6.34 of 16 then, and 3.26 and 3.94 without (one H200)
        launch_pdl=False,
    )  # fmt: skip
    if config.parts > 1:
        tile = min(1024, triton.next_power_of_2(num_out))
        _add_parts_kernel[(triton.cdiv(num_out, tile), num_rows)](
            parts_TN, matrix.scale_NG, bias, out_TN, num_rows, num_out,
            PARTS=config.parts, GROUPS=groups, WITH_BIAS=bias_N is not None, BLOCK_N=tile, DEPENDENT=dependent,
            launch_pdl=dependent,
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
        w_E *= tl.load(scale_ptr + n).to(tl.float32)
    else:
        w_E *= tl.load(scale_ptr + n * GROUPS + e_E // GROUP, mask=is_E, other=0.0).to(tl.float32)
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
