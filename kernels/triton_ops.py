"""Triton versions of `kernels.merge_state` and `kernels.kv_blocks`, called by them after validation.

Offsets are 64 bit: a pool of a million tokens with 32 KV heads x 128 has more than 2^31 elements.

Shape suffixes: T rows, S tokens, N blocks of a table, H query heads, K KV heads, D head dim, M parts, B blocks, P block
size; in kernels C is a tile of elements of one token (K * D).
"""

import torch
import triton
import triton.language as tl

_TILE_HEADS = 8
_TILE_ELEMENTS = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _merge_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    lse_ptr,
    parts_ptr,
    part_lse_ptr,
    row_offsets_ptr,
    part_index_ptr,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    stride_pm,
    stride_ph,
    stride_qm,
    stride_qh,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """lse = log sum_i exp(lse_i); out = sum_i exp(lse_i - lse) out_i, over the row itself and its parts.

    One program per row and tile of heads. The running sum is kept relative to the largest lse so far, `top`.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(row_offsets_ptr + row)
    last = tl.load(row_offsets_ptr + row + 1)
    if first == last:
        return
    head_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim_D = tl.arange(0, BLOCK_D)
    is_head_H = head_H < H
    is_HD = is_head_H[:, None] & (dim_D < D)[None, :]

    out_HD_ptr = out_ptr + row * stride_ot + head_H[:, None] * stride_oh + dim_D[None, :]
    lse_H_ptr = lse_ptr + row * stride_lt + head_H * stride_lh
    top_H = tl.load(lse_H_ptr, mask=is_head_H, other=-float("inf"))
    sum_H = tl.where(top_H == -float("inf"), 0.0, 1.0)
    acc_HD = tl.load(out_HD_ptr, mask=is_HD, other=0.0).to(tl.float32)

    for i in range(first, last):
        part = tl.load(part_index_ptr + i)
        lse_H = tl.load(part_lse_ptr + part * stride_qm + head_H * stride_qh, mask=is_head_H, other=-float("inf"))
        part_HD_ptr = parts_ptr + part * stride_pm + head_H[:, None] * stride_ph + dim_D[None, :]
        part_HD = tl.load(part_HD_ptr, mask=is_HD, other=0.0).to(tl.float32)
        new_H = tl.maximum(top_H, lse_H)
        shift_H = tl.where(new_H == -float("inf"), 0.0, new_H)  # exp(-inf - -inf) is NaN
        old_weight_H = tl.exp(top_H - shift_H)
        weight_H = tl.exp(lse_H - shift_H)
        acc_HD = acc_HD * old_weight_H[:, None] + part_HD * weight_H[:, None]
        sum_H = sum_H * old_weight_H + weight_H
        top_H = new_H

    divisor_H = tl.where(sum_H == 0.0, 1.0, sum_H)  # an empty state: 0 / 1, and -inf + log 1
    acc_HD = acc_HD / divisor_H[:, None]
    tl.store(out_HD_ptr, acc_HD.to(out_ptr.dtype.element_ty), mask=is_HD)
    tl.store(lse_H_ptr, top_H + tl.log(divisor_H), mask=is_head_H)


def merge_states(
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
    parts_MHD: torch.Tensor,
    part_lse_MH: torch.Tensor,
    row_offsets_T1: torch.Tensor,
    part_index_M: torch.Tensor,
) -> None:
    """See `kernels.merge_state.merge_states`."""
    num_rows, num_heads, head_dim = out_THD.shape
    _merge_kernel[(num_rows, triton.cdiv(num_heads, _TILE_HEADS))](
        out_THD,
        lse_TH,
        parts_MHD,
        part_lse_MH,
        row_offsets_T1,
        part_index_M,
        *out_THD.stride()[:2],
        *lse_TH.stride(),
        *parts_MHD.stride()[:2],
        *part_lse_MH.stride(),
        H=num_heads,
        D=head_dim,
        BLOCK_H=_TILE_HEADS,
        BLOCK_D=triton.next_power_of_2(head_dim),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _store_kernel(  # type: ignore[no-untyped-def]
    k_ptr,
    v_ptr,
    kv_ptr,
    slots_ptr,
    stride_kt,
    stride_kk,
    stride_vt,
    stride_vk,
    stride_2,
    stride_b,
    stride_p,
    stride_k,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """kv[0, slot // P, slot % P] = k[t], kv[1, ...] = v[t]. One program per row and tile of its elements."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    element_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    head_C = element_C // D
    dim_C = element_C % D
    is_C = element_C < K * D
    to_C_ptr = kv_ptr + (slot // P) * stride_b + (slot % P) * stride_p + head_C * stride_k + dim_C
    tl.store(to_C_ptr, tl.load(k_ptr + row * stride_kt + head_C * stride_kk + dim_C, mask=is_C), mask=is_C)
    tl.store(to_C_ptr + stride_2, tl.load(v_ptr + row * stride_vt + head_C * stride_vk + dim_C, mask=is_C), mask=is_C)


def store_kv(k_TKD: torch.Tensor, v_TKD: torch.Tensor, kv_2BPKD: torch.Tensor, slots_T: torch.Tensor) -> None:
    """See `kernels.kv_blocks.store_kv`."""
    num_rows, num_kv_heads, head_dim = k_TKD.shape
    _store_kernel[(num_rows, triton.cdiv(num_kv_heads * head_dim, _TILE_ELEMENTS))](
        k_TKD,
        v_TKD,
        kv_2BPKD,
        slots_T,
        *k_TKD.stride()[:2],
        *v_TKD.stride()[:2],
        *kv_2BPKD.stride()[:4],
        K=num_kv_heads,
        D=head_dim,
        P=kv_2BPKD.shape[2],
        BLOCK_C=_TILE_ELEMENTS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _gather_kernel(  # type: ignore[no-untyped-def]
    kv_ptr,
    block_ids_ptr,
    k_ptr,
    v_ptr,
    stride_2,
    stride_b,
    stride_p,
    stride_k,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """k[j] = kv[0, ids[j // P], j % P], v[j] = kv[1, ...]. One program per token and tile of its elements."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.load(block_ids_ptr + token // P).to(tl.int64)
    element_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_C = element_C < K * D
    from_C_ptr = kv_ptr + block * stride_b + (token % P) * stride_p + (element_C // D) * stride_k + element_C % D
    to_C = token * (K * D) + element_C
    tl.store(k_ptr + to_C, tl.load(from_C_ptr, mask=is_C), mask=is_C)
    tl.store(v_ptr + to_C, tl.load(from_C_ptr + stride_2, mask=is_C), mask=is_C)


def gather_kv(kv_2BPKD: torch.Tensor, block_ids_N: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.kv_blocks.gather_kv`."""
    _, _, block_size, num_kv_heads, head_dim = kv_2BPKD.shape
    k_SKD = kv_2BPKD.new_empty((num_tokens, num_kv_heads, head_dim))
    v_SKD = torch.empty_like(k_SKD)
    if num_tokens:
        _gather_kernel[(num_tokens, triton.cdiv(num_kv_heads * head_dim, _TILE_ELEMENTS))](
            kv_2BPKD,
            block_ids_N,
            k_SKD,
            v_SKD,
            *kv_2BPKD.stride()[:4],
            K=num_kv_heads,
            D=head_dim,
            P=block_size,
            BLOCK_C=_TILE_ELEMENTS,
        )
    return k_SKD, v_SKD
