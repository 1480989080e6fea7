"""Triton versions of `kernels.merge_state`, `kernels.kv_blocks`, `kernels.penalties` and of one merge, called by them after
validation.

Offsets are 64 bit: a pool of a million tokens with 32 KV heads x 128 has more than 2^31 elements.

Shape suffixes: T rows, S tokens, N blocks of a table, H query heads, K KV heads, D head dim, M parts, B blocks, P block
size; in kernels C is a tile of elements of one token (K * D), R of pairs of row and head, X of heads or of such pairs.
"""

import torch
import triton
import triton.language as tl

from kernels.kv_blocks import has_token_scales
from kernels.launch import has_dependent_launch, let_next_start, wait_for_previous

_TILE_HEADS = 8
_TILE_ELEMENTS = 1024
_GATHER_ELEMENTS = 4096
"""Of keys, and as many of values, per program: four 16-byte vectors of each a thread at 16 bits."""
_PAIR_ELEMENTS = 2048
_PENALTY_TOKENS = 4096


@triton.jit
def _add_state(acc_XD, top_X, sum_X, out_XD, lse_X):  # type: ignore[no-untyped-def]
    """`acc`, `top` and `sum` of a union of states with one more in it, kept relative to the largest lse so far, `top`."""
    new_X = tl.maximum(top_X, lse_X)
    shift_X = tl.where(new_X == -float("inf"), 0.0, new_X)  # exp(-inf - -inf) is NaN
    decay_X = tl.exp(top_X - shift_X)
    weight_X = tl.exp(lse_X - shift_X)
    acc_XD = acc_XD * decay_X[:, None] + out_XD * weight_X[:, None]
    return acc_XD, new_X, sum_X * decay_X + weight_X


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
    DEPENDENT: tl.constexpr,
):
    """lse = log sum_i exp(lse_i); out = sum_i exp(lse_i - lse) out_i, over the row itself and its parts.

    One program per row and tile of heads.
    """
    row = tl.program_id(0).to(tl.int64)
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
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
        acc_HD, top_H, sum_H = _add_state(acc_HD, top_H, sum_H, part_HD, lse_H)

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
    dependent = has_dependent_launch(out_THD.device)
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
        DEPENDENT=dependent,
        launch_pdl=dependent,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _sinks_kernel(  # type: ignore[no-untyped-def]
    out_ptr, lse_ptr, sinks_ptr, stride_ot, stride_oh, stride_lt, stride_lh,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out = out sigmoid(lse - sink). One program per row and tile of heads."""
    row = tl.program_id(0).to(tl.int64)
    head_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim_D = tl.arange(0, BLOCK_D)
    is_head_H = head_H < H
    is_HD = is_head_H[:, None] & (dim_D < D)[None, :]
    sink_H = tl.load(sinks_ptr + head_H, mask=is_head_H, other=0.0).to(tl.float32)
    let_next_start(DEPENDENT)
    wait_for_previous(DEPENDENT)
    lse_H = tl.load(lse_ptr + row * stride_lt + head_H * stride_lh, mask=is_head_H, other=0.0)
    out_HD_ptr = out_ptr + row * stride_ot + head_H[:, None] * stride_oh + dim_D[None, :]
    out_HD = tl.load(out_HD_ptr, mask=is_HD, other=0.0)
    scaled_HD = out_HD.to(tl.float32) * tl.sigmoid(lse_H - sink_H)[:, None]
    tl.store(out_HD_ptr, scaled_HD.to(out_HD.dtype), mask=is_HD)


def apply_sinks(out_THD: torch.Tensor, lse_TH: torch.Tensor, sinks_H: torch.Tensor) -> None:
    """See `kernels.merge_state.apply_sinks`."""
    num_rows, num_heads, head_dim = out_THD.shape
    if not num_rows:
        return
    dependent = has_dependent_launch(out_THD.device)
    _sinks_kernel[(num_rows, triton.cdiv(num_heads, _TILE_HEADS))](
        out_THD, lse_TH, sinks_H, *out_THD.stride()[:2], *lse_TH.stride(),
        H=num_heads, D=head_dim, BLOCK_H=_TILE_HEADS, BLOCK_D=triton.next_power_of_2(head_dim), DEPENDENT=dependent,
        launch_pdl=dependent,
    )  # fmt: skip


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
    WITH_VALUES: tl.constexpr,
):
    """kv[0, slot // P, slot % P] = k[t], and kv[1, ...] = v[t] if WITH_VALUES. One program per row and tile of its elements."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    element_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    head_C = element_C // D
    dim_C = element_C % D
    is_C = element_C < K * D
    to_C_ptr = kv_ptr + (slot // P) * stride_b + (slot % P) * stride_p + head_C * stride_k + dim_C
    tl.store(to_C_ptr, tl.load(k_ptr + row * stride_kt + head_C * stride_kk + dim_C, mask=is_C), mask=is_C)
    if WITH_VALUES:
        tl.store(to_C_ptr + stride_2, tl.load(v_ptr + row * stride_vt + head_C * stride_vk + dim_C, mask=is_C), mask=is_C)


def store_kv(k_TKD: torch.Tensor, v_TKD: torch.Tensor | None, kv_2BPKD: torch.Tensor, slots_T: torch.Tensor) -> None:
    """See `kernels.kv_blocks.store_kv`."""
    values_TKD = k_TKD if v_TKD is None else v_TKD
    num_rows, num_kv_heads, head_dim = k_TKD.shape
    _store_kernel[(num_rows, triton.cdiv(num_kv_heads * head_dim, _TILE_ELEMENTS))](
        k_TKD,
        values_TKD,
        kv_2BPKD,
        slots_T,
        *k_TKD.stride()[:2],
        *values_TKD.stride()[:2],
        *kv_2BPKD.stride()[:4],
        K=num_kv_heads,
        D=head_dim,
        P=kv_2BPKD.shape[2],
        BLOCK_C=_TILE_ELEMENTS,
        WITH_VALUES=v_TKD is not None,
    )


# Not specialized on what differs from call to call: each combination would be compiled anew, long after warm-up.
@triton.jit(do_not_specialize=["first_token", "num_tokens"], do_not_specialize_on_alignment=["block_ids_ptr"])  # type: ignore[untyped-decorator]
def _gather_kernel(  # type: ignore[no-untyped-def]
    kv_ptr,
    scales_ptr,
    block_ids_ptr,
    out_ptr,
    first_token,
    num_tokens,
    stride_2,
    stride_b,
    stride_p,
    stride_k,
    stride_s2,
    stride_sb,
    stride_sk,
    stride_o2,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SCALED_D: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
):
    """out[0, j - first] = kv[0, ids[j // P], j % P], out[1, ...] = kv[1, ...]; times its block's scale for each SCALED_D of a
    token's elements, if that isn't 0, or with TOKEN_SCALES its own.

    One program per BLOCK_S tokens and BLOCK_C elements of each, keys and values.
    """
    index_S = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    is_S = index_S < num_tokens
    token_S = first_token + index_S
    block_S = tl.load(block_ids_ptr + token_S // P, mask=is_S, other=0).to(tl.int64)
    element_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_SC = is_S[:, None] & (element_C < K * D)[None, :]
    from_S = block_S * stride_b + (token_S % P) * stride_p
    from_C = (element_C // D) * stride_k + element_C % D
    from_SC_ptr = kv_ptr + from_S[:, None] + from_C[None, :]
    to_SC_ptr = out_ptr + (index_S * (K * D))[:, None] + element_C[None, :]
    k_SC = tl.load(from_SC_ptr, mask=is_SC)
    v_SC = tl.load(from_SC_ptr + stride_2, mask=is_SC)  # both are on their way before the first store waits
    if SCALED_D:
        scale_S = block_S * stride_sb
        if TOKEN_SCALES:
            scale_S += token_S % P
        scale_SC_ptr = scales_ptr + scale_S[:, None] + (element_C // SCALED_D)[None, :] * stride_sk
        k_scale_SC = tl.load(scale_SC_ptr, mask=is_SC).to(tl.float32)
        v_scale_SC = tl.load(scale_SC_ptr + stride_s2, mask=is_SC).to(tl.float32)
        k_SC = (k_SC.to(tl.float32) * k_scale_SC).to(out_ptr.dtype.element_ty)
        v_SC = (v_SC.to(tl.float32) * v_scale_SC).to(out_ptr.dtype.element_ty)
    tl.store(to_SC_ptr, k_SC, mask=is_SC)
    tl.store(to_SC_ptr + stride_o2, v_SC, mask=is_SC)


def gather_kv(
    out_2SKD: torch.Tensor,
    kv_2BPKD: torch.Tensor,
    block_ids_N: torch.Tensor,
    first_token: int,
    scales_2BKX: torch.Tensor | None,
) -> None:
    """See `kernels.kv_blocks.gather_kv_into`."""
    _, num_tokens, num_kv_heads, head_dim = out_2SKD.shape
    scaled_dim = 0 if scales_2BKX is None else head_dim
    stride_2, stride_b, stride_p, stride_k, _ = kv_2BPKD.stride()
    if stride_k == head_dim:  # one run of elements per token: nothing for the compiler to prove
        num_kv_heads, head_dim = 1, num_kv_heads * head_dim
    elements = num_kv_heads * head_dim
    block_c = min(_TILE_ELEMENTS, triton.next_power_of_2(elements))
    block_s = _GATHER_ELEMENTS // block_c
    _gather_kernel[(triton.cdiv(num_tokens, block_s), triton.cdiv(elements, block_c))](
        kv_2BPKD,
        scales_2BKX,
        block_ids_N,
        out_2SKD,
        first_token,
        num_tokens,
        stride_2,
        stride_b,
        stride_p,
        stride_k,
        *((0, 0, 0) if scales_2BKX is None else scales_2BKX.stride()[:3]),
        out_2SKD.stride(0),
        K=num_kv_heads,
        D=head_dim,
        P=kv_2BPKD.shape[2],
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        SCALED_D=scaled_dim,
        TOKEN_SCALES=has_token_scales(kv_2BPKD.dtype),
    )


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "stride_slt",
        "stride_slh",
        "stride_plx",
        "stride_plt",
        "stride_plh",
        "stride_lt",
        "stride_lh",
        "num_states",
    ],
    do_not_specialize_on_alignment=["state_lse_ptr", "part_lse_ptr", "lse_ptr"],
)
def _merge_tile_kernel(  # type: ignore[no-untyped-def]
    state_out_ptr,
    state_lse_ptr,
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    num_states,
    stride_st,
    stride_sh,
    stride_slt,
    stride_slh,
    stride_px,
    stride_pt,
    stride_ph,
    stride_plx,
    stride_plt,
    stride_plh,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    X: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """lse = log sum_i exp(lse_i); out = sum_i exp(lse_i - lse) out_i, over the state, if there is one, and the parts.

    One program per BLOCK_R pairs of row and head. A pair is read and written by one program, so the result may be the state.
    """
    pair_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_R = pair_R // H
    head_R = pair_R % H
    dim_D = tl.arange(0, BLOCK_D)
    is_R = pair_R < num_states
    is_RD = is_R[:, None] & (dim_D < D)[None, :]

    if HAS_STATE:
        top_R = tl.load(state_lse_ptr + row_R * stride_slt + head_R * stride_slh, mask=is_R, other=-float("inf"))
        state_RD_ptr = state_out_ptr + (row_R * stride_st + head_R * stride_sh)[:, None] + dim_D[None, :]
        acc_RD = tl.load(state_RD_ptr, mask=is_RD, other=0.0).to(tl.float32)
        sum_R = tl.where(top_R == -float("inf"), 0.0, 1.0)
    else:
        top_R = tl.full((BLOCK_R,), -float("inf"), dtype=tl.float32)
        acc_RD = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
        sum_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
    part_lse_R_ptr = part_lse_ptr + row_R * stride_plt + head_R * stride_plh
    part_RD_ptr = part_out_ptr + (row_R * stride_pt + head_R * stride_ph)[:, None] + dim_D[None, :]
    for _ in tl.static_range(X):
        lse_R = tl.load(part_lse_R_ptr, mask=is_R, other=-float("inf"))
        part_RD = tl.load(part_RD_ptr, mask=is_RD, other=0.0).to(tl.float32)
        acc_RD, top_R, sum_R = _add_state(acc_RD, top_R, sum_R, part_RD, lse_R)
        part_lse_R_ptr += stride_plx
        part_RD_ptr += stride_px

    divisor_R = tl.where(sum_R == 0.0, 1.0, sum_R)  # all empty: 0 / 1, and -inf + log 1
    out_RD_ptr = out_ptr + (row_R * stride_ot + head_R * stride_oh)[:, None] + dim_D[None, :]
    tl.store(out_RD_ptr, (acc_RD / divisor_R[:, None]).to(out_ptr.dtype.element_ty), mask=is_RD)
    tl.store(lse_ptr + row_R * stride_lt + head_R * stride_lh, top_R + tl.log(divisor_R), mask=is_R)


def merge_parts(
    state: tuple[torch.Tensor, torch.Tensor] | None,
    parts: tuple[torch.Tensor, torch.Tensor],
    result: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """See `kernels.paged_attention_tiles.merge_parts`."""
    num_parts, num_rows, num_heads, head_dim = parts[0].shape
    block_d: int = triton.next_power_of_2(head_dim)
    block_r = max(1, _PAIR_ELEMENTS // block_d)
    before = result if state is None else state
    _merge_tile_kernel[(triton.cdiv(num_rows * num_heads, block_r),)](
        *before,
        *parts,
        *result,
        num_rows * num_heads,
        *before[0].stride()[:2],
        *before[1].stride(),
        *parts[0].stride()[:3],
        *parts[1].stride(),
        *result[0].stride()[:2],
        *result[1].stride(),
        X=num_parts,
        H=num_heads,
        D=head_dim,
        HAS_STATE=state is not None,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _penalize_kernel(x_ptr, states_ptr, slots_ptr, factors_ptr, num_tokens, BLOCK_V: tl.constexpr):  # type: ignore[no-untyped-def]
    """x = (x > 0 ? x / r : x * r where n != 0) - f * (n >> 1) - p * (n >> 1 > 0). One program per row and tile of tokens."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    repetition = tl.load(factors_ptr + row * 3)
    presence = tl.load(factors_ptr + row * 3 + 1)
    frequency = tl.load(factors_ptr + row * 3 + 2)
    token_V = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside_V = token_V < num_tokens
    state_V = tl.load(states_ptr + slot * num_tokens + token_V, mask=inside_V, other=0)
    x_ptrs = x_ptr + row * num_tokens + token_V
    x_V = tl.load(x_ptrs, mask=inside_V & (state_V != 0), other=0.0)
    x_V = tl.where(x_V > 0, x_V / repetition, x_V * repetition)
    generated_V = state_V >> 1
    x_V -= frequency * generated_V
    x_V -= tl.where(generated_V > 0, presence, 0.0)
    tl.store(x_ptrs, x_V, mask=inside_V & (state_V != 0))


def penalize(x_SV: torch.Tensor, states_NV: torch.Tensor, slots_S: torch.Tensor, factors_S3: torch.Tensor) -> None:
    """See `kernels.penalties.penalize`. Only logits of tokens that a sequence has are read and written."""
    rows, vocab = x_SV.shape
    grid = (rows, triton.cdiv(vocab, _PENALTY_TOKENS))
    _penalize_kernel[grid](x_SV, states_NV, slots_S, factors_S3, vocab, BLOCK_V=_PENALTY_TOKENS)
