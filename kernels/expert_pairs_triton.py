"""Experts of a few rows, in Triton: each pair of a row and one of its experts reads that expert's weights on its own.

A program takes some columns of one pair's gate and up products (GEMV) and the activation; then one takes some columns of a
row's down products, of all its experts at once, and writes their weighted sum. Where weights are stored transposed it takes
columns of one pair, over a part of what they sum, and another kernel adds them up: of one expert's columns many lie side by
side in memory, and few programs would have them all.

Shape suffixes: those of `kernels.experts_triton`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.expert_weights_triton import (
    gate_and_up,
    gate_constants,
    gate_up_columns,
    is_transposed,
    packed_numbers,
    packing,
    parts_of,
)
from kernels.experts import ExpertWeights
from kernels.launch import has_dependent_launch, let_next_start, wait_for_previous
from kernels.layer_ops_triton import added_to

_PAIRED_ROWS = 4
"""Up to so many rows a pair reads its expert's weights on its own."""

_COMBINED = 512
"""Columns of a row that a program sums."""


@dataclass(frozen=True, slots=True)
class PairConfig:
    """How the products of one pair (gate and up), or of one row's pairs (down), are cut."""

    block_n: int
    """Columns: of gate and up features, each of which has two columns."""
    block_k: int
    num_warps: int
    num_stages: int
    parts: int = 1
    """Of what down sums, where weights are stored transposed."""


def uses_pairs(num_rows: int) -> bool:
    """Whether rows take the path where each pair reads its expert's weights on its own."""
    return num_rows <= _PAIRED_ROWS


def gate_up_config(weights: ExpertWeights) -> PairConfig:
    """How gate and up of few rows are cut, so that 64 bytes or more lie side by side in memory.

    One H200, one row, bf16, routing, gate, up and down, us: gpt-oss-20b (transposed) 62.2, with 64 columns and eight warps
    72.4, 64 x 64 and four warps 68.1, two stages 82; the bytes take 47. Qwen3-30B-A3B 21.4, with four columns 24.1 (in two
    stages 23.6), with one of 2048 21.6; the bytes 18. gpt-oss-20b as it is shipped (packed) 39.3, with blocks of 16 x 512 41.3,
    of 4 x 1024 42.0; the bytes 12.
    """
    if weights.is_packed:
        block_k = min(1024, max(32, triton.next_power_of_2(weights.hidden_size)))
        return PairConfig(block_n=8192 // block_k, block_k=block_k, num_warps=4, num_stages=2)
    if is_transposed(weights.gate_up_XNE):
        return PairConfig(block_n=32, block_k=128, num_warps=4, num_stages=4)
    block_k = min(1024, triton.next_power_of_2(weights.hidden_size))
    return PairConfig(block_n=2048 // block_k, block_k=block_k, num_warps=4, num_stages=1)


def down_config(weights: ExpertWeights, top_k: int) -> PairConfig:
    """How down of few rows is cut: 8192 weights of a row's `top_k` experts in registers, of packed ones half as many; of
    transposed ones, of one pair.

    As above, gpt-oss-20b with another gate and up: four parts 61.6, three 72.4 (of 64 x 64), one 75; before there were parts,
    32 columns of all pairs at once, 82.
    """
    slots = triton.next_power_of_2(top_k)
    if weights.is_packed:
        block_k = min(512, max(32, triton.next_power_of_2(weights.intermediate_size)))
        return PairConfig(block_n=max(1, 4096 // (slots * block_k)), block_k=block_k, num_warps=4, num_stages=2)
    if is_transposed(weights.down_XEI):
        return PairConfig(block_n=64, block_k=128, num_warps=4, num_stages=2, parts=4)
    block_k = min(triton.next_power_of_2(weights.intermediate_size), 256)
    return PairConfig(block_n=max(1, 8192 // (slots * block_k)), block_k=block_k, num_warps=4, num_stages=1)


@triton.jit  # type: ignore[untyped-decorator]
def _pair_gate_up_kernel(  # type: ignore[no-untyped-def]
    x_ptr, experts_ptr, weight_ptr, scale_ptr, bias_ptr, h_ptr, stride_x, stride_wx, stride_wn, stride_wk, stride_b,
    S: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
    GELU: tl.constexpr, INTERLEAVED: tl.constexpr, HALVES: tl.constexpr, PACKED: tl.constexpr, WITH_ASM: tl.constexpr,
    WITH_BIAS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """h[pair, i] = act(sum_e x[row, e] w[gate i, e] (+ bias)) (sum_e x[row, e] w[up i, e] (+ bias) + offset)."""
    pair = tl.program_id(1)
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    column_N, is_N = gate_up_columns(tl.program_id(0) * BLOCK_I, WIDTH, BLOCK_I, INTERLEAVED, HALVES)
    k_K = tl.arange(0, BLOCK_K)
    x_ptr_K = x_ptr + (pair // S).to(tl.int64) * stride_x + k_K
    w_at_NK = column_N[:, None] * stride_wn + k_K[None, :] * stride_wk
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)  # not earlier: the next reads what is waited for here
    expert = tl.load(experts_ptr + pair).to(tl.int64)
    if PACKED:
        BYTES: tl.constexpr = BLOCK_K // 2
        at_N1 = (expert * stride_wx + column_N.to(tl.int64) * stride_wn)[:, None]
        w_ptr_NB = weight_ptr + at_N1 + tl.arange(0, BYTES)[None, :]
        scale_ptr_NG = scale_ptr + at_N1 // 16 + tl.arange(0, BYTES // 16)[None, :]
        acc_NG = tl.zeros((2 * BLOCK_I, BYTES // 16), dtype=tl.float32)
        for begin in tl.range(0, E, BLOCK_K, num_stages=STAGES):
            at = begin // 2
            low_NB, high_NB, scale_NG = packed_numbers(
                w_ptr_NB + at, scale_ptr_NG + at // 16, is_N[:, None], E // 2 - at, BYTES, WITH_ASM
            )
            x_K = tl.load(x_ptr_K + begin, mask=begin + k_K < E, other=0.0).to(tl.float32)
            low_B, high_B = tl.split(tl.reshape(x_K, (BYTES, 2)))
            product_NB = low_NB * low_B[None, :] + high_NB * high_B[None, :]
            acc_NG += tl.sum(tl.reshape(product_NB, (2 * BLOCK_I, BYTES // 16, 16)), 2) * scale_NG
        sum_N = tl.sum(acc_NG, 1).to(dtype)
    else:
        w_ptr_NK = weight_ptr + expert * stride_wx + w_at_NK
        acc_NK = tl.zeros((2 * BLOCK_I, BLOCK_K), dtype=tl.float32)
        for begin in tl.range(0, E, BLOCK_K, num_stages=STAGES):
            is_K = begin + k_K < E
            w_NK = tl.load(w_ptr_NK + begin * stride_wk, mask=is_N[:, None] & is_K[None, :], other=0.0)
            x_K = tl.load(x_ptr_K + begin, mask=is_K, other=0.0)
            acc_NK += w_NK.to(tl.float32) * x_K.to(tl.float32)[None, :]
        sum_N = tl.sum(acc_NK, 1).to(dtype)
    if WITH_BIAS:
        bias_N = tl.load(bias_ptr + expert * stride_b + column_N, mask=is_N, other=0.0)
        sum_N = (sum_N.to(tl.float32) + bias_N.to(tl.float32)).to(dtype)
    if HALVES:
        gate_I, up_I = tl.split(tl.trans(tl.reshape(sum_N, (2, BLOCK_I))))
    else:
        gate_I, up_I = tl.split(tl.reshape(sum_N, (BLOCK_I, 2)))
    i_I = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    h_I = gate_and_up(gate_I, up_I, ALPHA, LIMIT, UP_OFFSET, GELU)
    tl.store(h_ptr + pair.to(tl.int64) * WIDTH + i_I, h_I, mask=i_I < WIDTH)


@triton.jit  # type: ignore[untyped-decorator]
def _pair_down_kernel(  # type: ignore[no-untyped-def]
    h_ptr, experts_ptr, weights_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, stride_wx, stride_wn, stride_wk, stride_b,
    stride_o, S: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, PACKED: tl.constexpr,
    WITH_ASM: tl.constexpr, WITH_BIAS: tl.constexpr, ADDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[row, n] = sum_s weights[row, s] (sum_i h[row, s, i] w[expert s, n, i] (+ bias)), the inner sum rounded. ADDED: the
    sum, rounded, to what is there."""
    row = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_K = tl.arange(0, BLOCK_K)
    s_S = tl.arange(0, SLOTS)
    is_S, is_N = s_S < S, n_N < E
    is_SN1 = (is_S[:, None] & is_N[None, :])[:, :, None]
    # Experts don't wait: the kernel before has waited for who wrote them, and only then let this one start. But an L1 cache may
    # hold what was there earlier.
    expert_S = tl.load(experts_ptr + row * S + s_S, mask=is_S, other=0, cache_modifier=".cg").to(tl.int64)
    if PACKED:
        # one feature of one of the experts is a row of the tile
        BYTES: tl.constexpr = BLOCK_K // 2
        r_R = tl.arange(0, SLOTS * BLOCK_N)
        slot_R, column_R = r_R // BLOCK_N, tl.program_id(0) * BLOCK_N + r_R % BLOCK_N
        is_R = (slot_R < S) & (column_R < E)
        expert_R = tl.load(experts_ptr + row * S + slot_R, mask=is_R, other=0, cache_modifier=".cg").to(tl.int64)
        at_R1 = (expert_R * stride_wx + column_R.to(tl.int64) * stride_wn)[:, None]
        w_ptr_RB = weight_ptr + at_R1 + tl.arange(0, BYTES)[None, :]
        scale_ptr_RG = scale_ptr + at_R1 // 16 + tl.arange(0, BYTES // 16)[None, :]
        h_ptr_SK = h_ptr + ((row * S + s_S) * WIDTH)[:, None] + k_K[None, :]
        acc_RG = tl.zeros((SLOTS * BLOCK_N, BYTES // 16), dtype=tl.float32)
        wait_for_previous(DEPENDENT)
        let_next_start(DEPENDENT)
        for begin in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
            at = begin // 2
            low_RB, high_RB, scale_RG = packed_numbers(
                w_ptr_RB + at, scale_ptr_RG + at // 16, is_R[:, None], WIDTH // 2 - at, BYTES, WITH_ASM
            )
            is_K = begin + k_K < WIDTH
            h_SK = tl.load(h_ptr_SK + begin, mask=is_S[:, None] & is_K[None, :], other=0.0).to(tl.float32)
            low_SB, high_SB = tl.split(tl.reshape(h_SK, (SLOTS, BYTES, 2)))
            product_SNB = tl.reshape(low_RB, (SLOTS, BLOCK_N, BYTES)) * low_SB[:, None, :]
            product_SNB += tl.reshape(high_RB, (SLOTS, BLOCK_N, BYTES)) * high_SB[:, None, :]
            acc_RG += tl.sum(tl.reshape(product_SNB, (SLOTS * BLOCK_N, BYTES // 16, 16)), 2) * scale_RG
        part_SN = tl.reshape(tl.sum(acc_RG, 1), (SLOTS, BLOCK_N)).to(dtype)
    else:
        at_SNK = (n_N[:, None] * stride_wn + k_K[None, :] * stride_wk)[None, :, :]
        w_ptr_SNK = weight_ptr + (expert_S * stride_wx)[:, None, None] + at_SNK
        w_SNK = tl.load(w_ptr_SNK, mask=is_SN1 & (k_K < WIDTH)[None, None, :], other=0.0)  # nor do weights
        wait_for_previous(DEPENDENT)
        let_next_start(DEPENDENT)
        h_ptr_SK = h_ptr + ((row * S + s_S) * WIDTH)[:, None] + k_K[None, :]
        h_SK = tl.load(h_ptr_SK, mask=is_S[:, None] & (k_K < WIDTH)[None, :], other=0.0)
        acc_SNK = w_SNK.to(tl.float32) * h_SK.to(tl.float32)[:, None, :]
        for begin in tl.range(BLOCK_K, WIDTH, BLOCK_K, num_stages=STAGES):
            is_K = begin + k_K < WIDTH
            w_SNK = tl.load(w_ptr_SNK + begin * stride_wk, mask=is_SN1 & is_K[None, None, :], other=0.0)
            h_SK = tl.load(h_ptr_SK + begin, mask=is_S[:, None] & is_K[None, :], other=0.0)
            acc_SNK += w_SNK.to(tl.float32) * h_SK.to(tl.float32)[:, None, :]
        part_SN = tl.sum(acc_SNK, 2).to(dtype)
    if WITH_BIAS:
        bias_ptr_SN = bias_ptr + (expert_S * stride_b)[:, None] + n_N[None, :]
        bias_SN = tl.load(bias_ptr_SN, mask=is_S[:, None] & is_N[None, :], other=0.0)
        part_SN = (part_SN.to(tl.float32) + bias_SN.to(tl.float32)).to(dtype)
    weight_S = tl.load(weights_ptr + row * S + s_S, mask=is_S, other=0.0).to(tl.float32)
    out_N = tl.sum(part_SN.to(tl.float32) * weight_S[:, None], 0)
    # not earlier: beside weights on their way it cost a step of Qwen3-30B-A3B's 2 %
    residual_N = tl.load(out_ptr + row * stride_o + n_N, mask=is_N, other=0.0) if ADDED else 0.0
    tl.store(out_ptr + row * stride_o + n_N, added_to(residual_N, out_N, dtype, ADDED), mask=is_N)


@triton.jit  # type: ignore[untyped-decorator]
def _pair_part_kernel(  # type: ignore[no-untyped-def]
    h_ptr, experts_ptr, weight_ptr, parts_ptr, stride_wx, stride_wn, stride_wk,
    E: tl.constexpr, WIDTH: tl.constexpr, LENGTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """parts[part, pair, n] = sum_i h[pair, i] w[expert, n, i], over LENGTH of the i."""
    pair = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_K = tl.arange(0, BLOCK_K)
    is_N = n_N < E
    expert = tl.load(experts_ptr + pair, cache_modifier=".cg").to(tl.int64)  # early, as in `_pair_down_kernel`
    w_ptr_NK = weight_ptr + expert * stride_wx + n_N[:, None] * stride_wn + k_K[None, :] * stride_wk
    h_ptr_K = h_ptr + pair * WIDTH + k_K
    end = tl.minimum((part + 1) * LENGTH, WIDTH)
    acc_NK = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)  # not earlier: as in `_pair_gate_up_kernel`
    for begin in tl.range(part * LENGTH, end, BLOCK_K, num_stages=STAGES):
        is_K = begin + k_K < end
        w_NK = tl.load(w_ptr_NK + begin * stride_wk, mask=is_N[:, None] & is_K[None, :], other=0.0)
        h_K = tl.load(h_ptr_K + begin, mask=is_K, other=0.0)
        acc_NK += w_NK.to(tl.float32) * h_K.to(tl.float32)[None, :]
    tl.store(parts_ptr + (part * tl.num_programs(1) + pair) * E + n_N, tl.sum(acc_NK, 1), mask=is_N)


@triton.jit(do_not_specialize=["num_pairs"])  # type: ignore[untyped-decorator]
def _combine_parts_kernel(  # type: ignore[no-untyped-def]
    parts_ptr, experts_ptr, weights_ptr, bias_ptr, out_ptr, num_pairs, stride_b, stride_o,
    S: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr, WITH_BIAS: tl.constexpr, ADDED: tl.constexpr, SLOTS: tl.constexpr,
    TILE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[row, e] = sum_s weights[row, s] (sum_part parts[part, row, s, e] (+ bias[expert s, e])), the inner sum rounded.
    ADDED: the sum, rounded, to what is there."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    e_E = tl.program_id(1) * TILE + tl.arange(0, TILE)
    s_S = tl.arange(0, SLOTS)
    is_S, is_E = s_S < S, e_E < E
    is_SE = is_S[:, None] & is_E[None, :]
    # early, as experts in `_pair_down_kernel`
    weight_S = tl.load(weights_ptr + row * S + s_S, mask=is_S, other=0.0, cache_modifier=".cg").to(tl.float32)
    if WITH_BIAS:
        expert_S = tl.load(experts_ptr + row * S + s_S, mask=is_S, other=0, cache_modifier=".cg").to(tl.int64)
        bias_SE = tl.load(bias_ptr + expert_S[:, None] * stride_b + e_E[None, :], mask=is_SE, other=0.0).to(tl.float32)
    let_next_start(DEPENDENT)
    wait_for_previous(DEPENDENT)
    residual_E = tl.load(out_ptr + row * stride_o + e_E, mask=is_E, other=0.0) if ADDED else 0.0
    part_SE = tl.zeros((SLOTS, TILE), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        at_SE = (part * num_pairs + row * S + s_S)[:, None] * E + e_E[None, :]
        part_SE += tl.load(parts_ptr + at_SE, mask=is_SE, other=0.0).to(tl.float32)
    part_SE = part_SE.to(dtype).to(tl.float32)
    if WITH_BIAS:
        part_SE = (part_SE + bias_SE).to(dtype).to(tl.float32)
    out_E = tl.sum(part_SE * weight_S[:, None], 0)
    tl.store(out_ptr + row * stride_o + e_E, added_to(residual_E, out_E, dtype, ADDED), mask=is_E)


def _combine_parts(
    parts_SPE: torch.Tensor,
    experts_TS: torch.Tensor,
    weights_TS: torch.Tensor,
    bias_XE: torch.Tensor | None,
    out_TE: torch.Tensor,
    *,
    added: bool,
) -> None:
    """The weighted sum of what each row's pairs came to, once their parts are added up."""
    num_rows, top_k = experts_TS.shape
    hidden = out_TE.shape[1]
    tile = min(_COMBINED, triton.next_power_of_2(hidden))
    dependent = has_dependent_launch(out_TE.device)
    _combine_parts_kernel[(num_rows, triton.cdiv(hidden, tile))](
        parts_SPE, experts_TS, weights_TS, parts_SPE if bias_XE is None else bias_XE, out_TE, num_rows * top_k,
        0 if bias_XE is None else bias_XE.stride(0), out_TE.stride(0),
        S=top_k, E=hidden, PARTS=len(parts_SPE), WITH_BIAS=bias_XE is not None, ADDED=added,
        SLOTS=triton.next_power_of_2(top_k), TILE=tile, DEPENDENT=dependent, launch_pdl=dependent,
    )  # fmt: skip


def mix_pairs(
    x_TE: torch.Tensor,
    experts_TS: torch.Tensor,
    weights_TS: torch.Tensor,
    weights: ExpertWeights,
    out_TE: torch.Tensor,
    *,
    added: bool = False,
    gate_up: PairConfig | None = None,
    down: PairConfig | None = None,
) -> None:
    """`mix_experts` of few rows, into `out_TE`, or added to it."""
    num_rows, top_k = experts_TS.shape
    hidden, width = weights.hidden_size, weights.intermediate_size
    dependent = has_dependent_launch(x_TE.device)
    gate_up = gate_up or gate_up_config(weights)
    down = down or down_config(weights, top_k)
    weight, bias = weights.gate_up_XNE, weights.gate_up_bias_XN
    numbers, scales = parts_of(weight)
    h_PI = x_TE.new_empty((num_rows * top_k, width))
    _pair_gate_up_kernel[(triton.cdiv(width, gate_up.block_n), num_rows * top_k)](
        x_TE, experts_TS, numbers, scales, numbers if bias is None else bias, h_PI, x_TE.stride(0), *weight.stride(),
        0 if bias is None else bias.stride(0),
        S=top_k, E=hidden, WIDTH=width, **gate_constants(weights.gate, weight), WITH_BIAS=bias is not None,
        BLOCK_I=gate_up.block_n, BLOCK_K=gate_up.block_k, STAGES=gate_up.num_stages, DEPENDENT=dependent,
        num_warps=gate_up.num_warps, launch_pdl=dependent,
    )  # fmt: skip
    weight, bias = weights.down_XEI, weights.down_bias_XE
    numbers, scales = parts_of(weight)
    if is_transposed(weight):
        length = triton.cdiv(width, down.parts * down.block_k) * down.block_k
        parts_SPE = x_TE.new_empty((triton.cdiv(width, length), num_rows * top_k, hidden), dtype=torch.float32)
        _pair_part_kernel[(triton.cdiv(hidden, down.block_n), num_rows * top_k, len(parts_SPE))](
            h_PI, experts_TS, numbers, parts_SPE, *weight.stride(),
            E=hidden, WIDTH=width, LENGTH=length, BLOCK_N=down.block_n, BLOCK_K=down.block_k, STAGES=down.num_stages,
            DEPENDENT=dependent, num_warps=down.num_warps, launch_pdl=dependent,
        )  # fmt: skip
        _combine_parts(parts_SPE, experts_TS, weights_TS, bias, out_TE, added=added)
        return
    _pair_down_kernel[(triton.cdiv(hidden, down.block_n), num_rows)](
        h_PI, experts_TS, weights_TS, numbers, scales, numbers if bias is None else bias, out_TE, *weight.stride(),
        0 if bias is None else bias.stride(0), out_TE.stride(0),
        S=top_k, E=hidden, WIDTH=width, SLOTS=triton.next_power_of_2(top_k), **packing(weight),
        WITH_BIAS=bias is not None, ADDED=added, BLOCK_N=down.block_n, BLOCK_K=down.block_k, STAGES=down.num_stages,
        DEPENDENT=dependent, num_warps=down.num_warps, launch_pdl=dependent,
    )  # fmt: skip
