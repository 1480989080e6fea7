"""Triton versions of what `kernels.kv_blocks` does to store KV of 8 bits, called by it after validation.

In int8 each program has a row and a head. In fp8 a block's scale is chosen from all rows of a call that go to it, before any of
them is stored. Where there are few rows each program looks for those of its own row's block itself, so that one launch does;
where there are many, a launch before opens the blocks.

Shape suffixes: T rows, K KV heads, D head dim, B blocks, P block size; in kernels R is a tile of rows, C of elements of one
token (K * D).
"""

import torch
import triton
import triton.language as tl

from kernels.kv_blocks import FP8_MOST, INT8_MOST, LEAST_EXPONENT, LEAST_SCALE, MOST_SCALE, SCALE_SHIFT, has_token_scales
from kernels.launch import has_dependent_launch, let_next_start, wait_for_previous

_FEW_ROWS = 256
"""Up to so many rows are stored by one launch: more than a step of decodes has."""
_BLOCK_ROWS = 256
_TILE_ELEMENTS = 1024
_MOST = tl.constexpr(FP8_MOST)
_SHIFT = tl.constexpr(SCALE_SHIFT)
_LEAST = tl.constexpr(LEAST_EXPONENT + 127)
"""With the bias of fp32."""
_INT8_MOST = tl.constexpr(INT8_MOST)
_LEAST_SCALE, _MOST_SCALE = tl.constexpr(LEAST_SCALE), tl.constexpr(MOST_SCALE)
_ROUNDING = tl.constexpr(12582912.0)
"""1.5 x 2^23: numbers of fp32 that are so large are whole, so a small one that is added is rounded to even."""


@triton.jit
def _quantised(x, scale):  # type: ignore[no-untyped-def]
    """The bits, in fp8, of what stands for x by a scale: rounded to even, cut off where it is too large; NaN stays.

    By integers, and so the same in the interpreter, whose conversion loses the carry of 1.97 to 2. From 2^-6 on the bits of
    fp32 are cut to three of mantissa, the exponents' biases apart; below that fp8 counts in steps of 2^-9, as fp32 does from
    2^14 on.
    """
    full = x.to(tl.float32)
    size = tl.minimum(tl.abs(full / scale), _MOST)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # 16384.0
    value = tl.where(size < 0.015625, small, normal)  # 2^-6
    value = tl.where(full == full, value, 0x7F)
    return (value | ((full.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _opening_scale(largest):  # type: ignore[no-untyped-def]
    """2^(floor(log2 largest) - 1), no less than the least; 1 for zero."""
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - _SHIFT, _LEAST)
    return tl.where(largest == 0, 1.0, (exponent << 23).to(tl.float32, bitcast=True))


@triton.jit  # type: ignore[untyped-decorator]
def _rows_of(slots_ptr, num_rows, row, block, P: tl.constexpr, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first and the last row that go to a row's block, and whether one of them opens it."""
    first = row
    last = row
    opens = 0
    for start in range(0, num_rows, BLOCK_T):
        row_T = start + tl.arange(0, BLOCK_T)
        slot_T = tl.load(slots_ptr + row_T, mask=row_T < num_rows, other=-1).to(tl.int64)
        is_in_T = (slot_T >= 0) & (slot_T // P == block)
        first = tl.minimum(first, tl.min(tl.where(is_in_T, row_T, row), 0))
        last = tl.maximum(last, tl.max(tl.where(is_in_T, row_T, row), 0))
        opens = tl.maximum(opens, tl.max((is_in_T & (slot_T % P == 0)).to(tl.int32), 0))
    return first, last, opens


@triton.jit  # type: ignore[untyped-decorator]
def _largest(  # type: ignore[no-untyped-def]
    x_ptr, stride_t, slots_ptr, block, first, last, D: tl.constexpr, P: tl.constexpr, BLOCK_R: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The largest finite |x| of one head in the rows [first, last] that go to a block."""
    dim_D = tl.arange(0, TILE)
    largest = 0.0
    for start in range(first, last + 1, BLOCK_R):
        row_R = start + tl.arange(0, BLOCK_R)
        slot_R = tl.load(slots_ptr + row_R, mask=row_R <= last, other=-1).to(tl.int64)
        is_in_R = (slot_R >= 0) & (slot_R // P == block)
        x_RD_ptr = x_ptr + row_R.to(tl.int64)[:, None] * stride_t + dim_D[None, :]
        x_RD = tl.load(x_RD_ptr, mask=is_in_R[:, None] & (dim_D < D)[None, :], other=0.0).to(tl.float32)
        size_RD = tl.where(tl.abs(x_RD) < float("inf"), tl.abs(x_RD), 0.0)  # NaN compares as false
        largest = tl.maximum(largest, tl.max(tl.max(size_RD, 1), 0))
    return largest


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _open_kernel(  # type: ignore[no-untyped-def]
    k_ptr, v_ptr, scales_ptr, slots_ptr, num_rows, stride_kt, stride_kk, stride_vt, stride_vk, stride_s2, stride_sb,
    D: tl.constexpr, P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, TILE: tl.constexpr,
    WITH_VALUES: tl.constexpr,
):  # fmt: skip
    """scales[:, b] = 2^(floor(log2 a) - 1), a of all rows that go to b, if this row opens it. Grid: rows, KV heads."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if (slot < 0) | (slot % P != 0):
        return
    block = slot // P
    first, last, _ = _rows_of(slots_ptr, num_rows, row, block, P, BLOCK_T)
    scale_ptr = scales_ptr + block * stride_sb + head
    k_largest = _largest(k_ptr + head * stride_kk, stride_kt, slots_ptr, block, first, last, D, P, BLOCK_R, TILE)
    tl.store(scale_ptr, _opening_scale(k_largest))
    if WITH_VALUES:
        v_largest = _largest(v_ptr + head * stride_vk, stride_vt, slots_ptr, block, first, last, D, P, BLOCK_R, TILE)
        tl.store(scale_ptr + stride_s2, _opening_scale(v_largest))


@triton.jit  # type: ignore[untyped-decorator]
def _store_kernel(  # type: ignore[no-untyped-def]
    k_ptr, v_ptr, kv_ptr, scales_ptr, slots_ptr, stride_kt, stride_kk, stride_vt, stride_vk, stride_2, stride_b, stride_p,
    stride_k, stride_s2, stride_sb,
    K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, WITH_VALUES: tl.constexpr,
):  # fmt: skip
    """kv[0, slot // P, slot % P] = fp8(k[t] / scales[0, slot // P]), and so of v. One program per row and tile of elements."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    element_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    head_C = element_C // D
    dim_C = element_C % D
    is_C = element_C < K * D
    to_C_ptr = kv_ptr + (slot // P) * stride_b + (slot % P) * stride_p + head_C * stride_k + dim_C
    scale_C_ptr = scales_ptr + (slot // P) * stride_sb + head_C
    k_C = tl.load(k_ptr + row * stride_kt + head_C * stride_kk + dim_C, mask=is_C)
    tl.store(to_C_ptr, _quantised(k_C, tl.load(scale_C_ptr, mask=is_C, other=1.0)), mask=is_C)
    if WITH_VALUES:
        v_C = tl.load(v_ptr + row * stride_vt + head_C * stride_vk + dim_C, mask=is_C)
        tl.store(to_C_ptr + stride_2, _quantised(v_C, tl.load(scale_C_ptr + stride_s2, mask=is_C, other=1.0)), mask=is_C)


@triton.jit  # type: ignore[untyped-decorator]
def _store_one(  # type: ignore[no-untyped-def]
    x_ptr, stride_t, to_ptr, scale_ptr, slots_ptr, row, slot, first, last, opens, D: tl.constexpr, P: tl.constexpr,
    BLOCK_R: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One head of a row's keys or values, by a scale that is chosen here if its block is opened."""
    dim_D = tl.arange(0, TILE)
    x_D = tl.load(x_ptr + row.to(tl.int64) * stride_t + dim_D, mask=dim_D < D, other=0.0)
    if opens:
        scale = _opening_scale(_largest(x_ptr, stride_t, slots_ptr, slot // P, first, last, D, P, BLOCK_R, TILE))
        if slot % P == 0:
            tl.store(scale_ptr, scale)
    else:
        scale = tl.load(scale_ptr)
    tl.store(to_ptr + dim_D, _quantised(x_D, scale), mask=dim_D < D)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _store_few_kernel(  # type: ignore[no-untyped-def]
    k_ptr, v_ptr, kv_ptr, scales_ptr, slots_ptr, num_rows, stride_kt, stride_kk, stride_vt, stride_vk, stride_2, stride_b,
    stride_p, stride_k, stride_s2, stride_sb,
    D: tl.constexpr, P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, TILE: tl.constexpr,
    WITH_VALUES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Both kernels in one: every program of a block that is opened finds the same scale. Grid: rows, KV heads."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    block = slot // P
    first, last, opens = _rows_of(slots_ptr, num_rows, row, block, P, BLOCK_T)
    to_ptr = kv_ptr + block * stride_b + (slot % P) * stride_p + head * stride_k
    scale_ptr = scales_ptr + block * stride_sb + head
    k_head_ptr = k_ptr + head * stride_kk
    _store_one(k_head_ptr, stride_kt, to_ptr, scale_ptr, slots_ptr, row, slot, first, last, opens, D, P, BLOCK_R, TILE)
    if WITH_VALUES:
        v_head_ptr = v_ptr + head * stride_vk
        to_ptr += stride_2
        scale_ptr += stride_s2
        _store_one(v_head_ptr, stride_vt, to_ptr, scale_ptr, slots_ptr, row, slot, first, last, opens, D, P, BLOCK_R, TILE)


@triton.jit  # type: ignore[untyped-decorator]
def _store_token(x_ptr, to_ptr, scale_ptr, D: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x / scale in int8, and the scale: fp16(largest / 127); NaN in the scale if there is one in x."""
    dim_D = tl.arange(0, TILE)
    x_D = tl.load(x_ptr + dim_D, mask=dim_D < D, other=0.0).to(tl.float32)
    largest = tl.max(tl.where(x_D == x_D, tl.abs(x_D), 0.0), 0)
    scale = tl.minimum(tl.maximum(tl.div_rn(largest, _INT8_MOST), _LEAST_SCALE), _MOST_SCALE).to(tl.float16)
    scale = tl.where(largest == 0, 1.0, scale).to(tl.float16)
    has_nan = tl.max((x_D != x_D).to(tl.int32), 0)
    scale = tl.where(has_nan != 0, float("nan"), scale).to(tl.float16)
    tl.store(scale_ptr, scale)
    scaled_D = tl.div_rn(x_D, tl.zeros_like(x_D) + scale.to(tl.float32))
    scaled_D = tl.where(scaled_D == scaled_D, scaled_D, 0.0)
    scaled_D = tl.minimum(tl.maximum(scaled_D, -_INT8_MOST), _INT8_MOST)
    tl.store(to_ptr + dim_D, (scaled_D + _ROUNDING - _ROUNDING).to(tl.int8), mask=dim_D < D)


@triton.jit  # type: ignore[untyped-decorator]
def _store_tokens_kernel(  # type: ignore[no-untyped-def]
    k_ptr, v_ptr, kv_ptr, scales_ptr, slots_ptr, stride_kt, stride_kk, stride_vt, stride_vk, stride_2, stride_b, stride_p,
    stride_k, stride_s2, stride_sb, stride_sk,
    D: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr, WITH_VALUES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """kv[0, slot // P, slot % P] = int8(k[t] / scales[0, slot // P, slot % P]), and so of v. Grid: rows, KV heads."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    to_ptr = kv_ptr + (slot // P) * stride_b + (slot % P) * stride_p + head * stride_k
    scale_ptr = scales_ptr + (slot // P) * stride_sb + head * stride_sk + slot % P
    _store_token(k_ptr + row * stride_kt + head * stride_kk, to_ptr, scale_ptr, D, TILE)
    if WITH_VALUES:
        _store_token(v_ptr + row * stride_vt + head * stride_vk, to_ptr + stride_2, scale_ptr + stride_s2, D, TILE)


def store_kv(
    k_TKD: torch.Tensor, v_TKD: torch.Tensor | None, kv_2BPKD: torch.Tensor, scales_2BKX: torch.Tensor, slots_T: torch.Tensor
) -> None:
    """See `kernels.kv_blocks.store_kv`."""
    values_TKD = k_TKD if v_TKD is None else v_TKD
    num_rows, num_kv_heads, head_dim = k_TKD.shape
    block_size = kv_2BPKD.shape[2]
    rows = (*k_TKD.stride()[:2], *values_TKD.stride()[:2])
    tile: int = triton.next_power_of_2(head_dim)
    shape = {"D": head_dim, "P": block_size, "WITH_VALUES": v_TKD is not None}
    if has_token_scales(kv_2BPKD.dtype):
        dependent = has_dependent_launch(k_TKD.device)
        _store_tokens_kernel[(num_rows, num_kv_heads)](
            k_TKD, values_TKD, kv_2BPKD, scales_2BKX, slots_T, *rows, *kv_2BPKD.stride()[:4], *scales_2BKX.stride()[:3],
            **shape, TILE=tile, DEPENDENT=dependent, num_warps=1, launch_pdl=dependent,
        )  # fmt: skip
        return
    bits_2BPKD = kv_2BPKD.view(torch.uint8)
    opening = {"BLOCK_T": _BLOCK_ROWS, "BLOCK_R": max(1, 2048 // tile), "TILE": tile}
    if num_rows <= _FEW_ROWS:
        dependent = has_dependent_launch(k_TKD.device)
        _store_few_kernel[(num_rows, num_kv_heads)](
            k_TKD, values_TKD, bits_2BPKD, scales_2BKX, slots_T, num_rows, *rows, *bits_2BPKD.stride()[:4],
            *scales_2BKX.stride()[:2], **shape, **opening, DEPENDENT=dependent, launch_pdl=dependent,
        )  # fmt: skip
        return
    _open_kernel[(num_rows, num_kv_heads)](
        k_TKD, values_TKD, scales_2BKX, slots_T, num_rows, *rows, *scales_2BKX.stride()[:2], **shape, **opening
    )
    _store_kernel[(num_rows, triton.cdiv(num_kv_heads * head_dim, _TILE_ELEMENTS))](
        k_TKD, values_TKD, bits_2BPKD, scales_2BKX, slots_T, *rows, *bits_2BPKD.stride()[:4], *scales_2BKX.stride()[:2],
        K=num_kv_heads, BLOCK_C=_TILE_ELEMENTS, **shape,
    )  # fmt: skip
