"""Triton versions of `kernels.experts`, called by them after validation.

Nothing here reads a tensor on the host, and grids follow from shapes alone, so all of it can be captured in a CUDA graph.

A *pair* is a row with one of its experts, numbered `row * S + s`. How rows get through the experts is chosen by their number:

    few rows    Each pair reads its expert's weights on its own (`kernels.expert_pairs_triton`).
    more rows   Pairs are grouped by expert into tiles of BLOCK_M, an expert's last one filled up with nothing, so weights are
                read once for a tile: by a product for gate, up and activation, then by one for down. Last comes the weighted
                sum of each row's pairs.

How tiles are made: `moe_align_block_size` of vLLM has the same layout, made here without atomics, so pairs keep their order.

Shape suffixes: T rows, S experts of a row, X experts, E hidden size, I intermediate size, N columns of a product (rows of its
weight), K what a product sums over, P pairs, M pairs of a tile, B bins (X and one for none), C chunks of pairs; in kernels,
tiles of them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.expert_pairs_triton import mix_pairs, uses_pairs
from kernels.expert_weights_triton import gate_and_up, gate_constants, gate_up_columns, parts_of, unpacked
from kernels.experts import MOST_ROWS, ExpertWeights, Gate, Packed
from kernels.launch import has_dependent_launch, let_next_start, wait_for_previous
from kernels.layer_ops_triton import added_to

_CHUNK_PAIRS = 4096
"""Pairs that a program counts or ranks at once."""

_COMBINED = 1024
"""Columns of a row that a program sums."""


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """How the products of pairs that are grouped by expert are cut."""

    block_m: int
    block_n: int
    """Columns of the weight, for gate and up those of both."""
    block_k: int
    group_m: int
    """Tiles of pairs side by side whose programs take one column tile after the other, all of them before the next tiles."""
    num_warps: int
    num_stages: int


def group_config(num_pairs: int, num_experts: int, num_summed: int, dtype: torch.dtype) -> GroupConfig:
    """How a product over `num_summed` numbers is cut where so many pairs are spread over so many experts.

    Few pairs an expert: the time is that of reading weights, so tiles of pairs are small and several of weights are under way.
    Many: tiles as large as registers allow, and those that share weights side by side.
    """
    each = num_pairs / num_experts
    if dtype == torch.float32:
        return GroupConfig(block_m=16 if each <= 16 else 64, block_n=64, block_k=32, group_m=4, num_warps=4, num_stages=2)
    if each <= 24:
        block_k = 128 if num_summed % 128 == 0 else 64
        block_m = 16 if each <= 10 else 32
        return GroupConfig(block_m, block_n=128, block_k=block_k, group_m=1, num_warps=4, num_stages=384 // block_k)
    if each <= 96:
        return GroupConfig(block_m=64, block_n=128, block_k=64, group_m=4, num_warps=4, num_stages=4)
    return GroupConfig(block_m=128, block_n=256, block_k=64, group_m=8, num_warps=8, num_stages=4)


@triton.jit
def _logit_of(key):  # type: ignore[no-untyped-def]
    """That `_route_kernel` orders by."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _route_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, experts_ptr, weights_ptr, stride_l,
    X: tl.constexpr, S: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, NORMALISE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The S largest logits of a row, the largest first, and exp(logit - largest) / (the sum of all, or of the S)."""
    row = tl.program_id(0).to(tl.int64)
    x_X = tl.arange(0, TILE)
    let_next_start(DEPENDENT)
    wait_for_previous(DEPENDENT)
    logit_X = tl.load(logits_ptr + row * stride_l + x_X, mask=x_X < X, other=0.0).to(tl.float32)
    # One integer to order by: the logit, made so that its bits compare as it does (-0 as 0), above the index from the end.
    # NaN is as good as any other, so that an index is always one of an expert.
    bits_X = tl.where(logit_X == 0, 0.0, logit_X).to(tl.int32, bitcast=True)
    bits_X = bits_X ^ ((bits_X >> 31) & 0x7FFFFFFF)
    nothing = tl.full((TILE,), -(1 << 63), tl.int64)
    key_X = tl.where(x_X < X, (bits_X.to(tl.int64) << 32) | (TILE - 1 - x_X).to(tl.int64), nothing)
    s_S = tl.arange(0, SLOTS)
    best_S = tl.topk(key_X, SLOTS)
    expert_S = TILE - 1 - (best_S & 0x7FFFFFFF).to(tl.int32)
    chosen_S = tl.where(s_S < S, _logit_of(best_S), float("-inf"))
    largest = _logit_of(tl.max(best_S, 0))
    part_S = tl.exp(chosen_S - largest)
    if NORMALISE:
        total = tl.sum(part_S, 0)
    else:
        total = tl.sum(tl.where(x_X < X, tl.exp(logit_X - largest), 0.0), 0)
    to_S = row * S + s_S
    tl.store(experts_ptr + to_S, expert_S, mask=s_S < S)
    tl.store(weights_ptr + to_S, part_S / total, mask=s_S < S)


def route(logits_TX: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.experts.route`."""
    num_rows, num_experts = logits_TX.shape
    experts_TS = torch.empty((num_rows, top_k), dtype=torch.int32, device=logits_TX.device)
    weights_TS = torch.empty((num_rows, top_k), dtype=torch.float32, device=logits_TX.device)
    dependent = has_dependent_launch(logits_TX.device)
    if num_rows:
        _route_kernel[(num_rows,)](
            logits_TX, experts_TS, weights_TS, logits_TX.stride(0),
            # two at least: `tl.topk` knows no one
            X=num_experts, S=top_k, TILE=max(2, triton.next_power_of_2(num_experts)),
            SLOTS=max(2, triton.next_power_of_2(top_k)), NORMALISE=normalise, DEPENDENT=dependent, num_warps=1,
            launch_pdl=dependent,
        )  # fmt: skip
    return experts_TS, weights_TS


@triton.jit(do_not_specialize=["num_pairs"])  # type: ignore[untyped-decorator]
def _count_kernel(  # type: ignore[no-untyped-def]
    experts_ptr, counts_ptr, num_pairs, X: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    """counts[chunk, x] = how many pairs of the chunk are of expert x."""
    pair_P = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    expert_P = tl.load(experts_ptr + pair_P, mask=pair_P < num_pairs, other=X).to(tl.int32)
    tl.store(counts_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), tl.histogram(expert_P, BINS))


@triton.jit(do_not_specialize=["num_pairs", "num_chunks"])  # type: ignore[untyped-decorator]
def _group_kernel(  # type: ignore[no-untyped-def]
    experts_ptr, counts_ptr, pairs_ptr, tile_experts_ptr, num_tiles_ptr, num_pairs, num_chunks,
    X: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr,
    TILES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Where the pairs of a chunk that are of one expert lie: tiles of the experts before, pairs of the chunks before, rank.

    The first chunk's program also fills up its expert's last tile (with `num_pairs`, which is no pair) and says which expert
    its tiles are of; expert 0's how many there are.
    """
    x, chunk = tl.program_id(0), tl.program_id(1)
    pair_P = chunk * CHUNK + tl.arange(0, CHUNK)
    bin_B = tl.arange(0, BINS)
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    expert_P = tl.load(experts_ptr + pair_P, mask=pair_P < num_pairs, other=X).to(tl.int32)
    if CHUNKS == 1:
        count_B = tl.histogram(expert_P, BINS)
        before = 0
    else:
        chunk_C = tl.arange(0, CHUNKS)
        count_ptr_CB = counts_ptr + chunk_C[:, None] * BINS + bin_B[None, :]
        count_CB = tl.load(count_ptr_CB, mask=(chunk_C < num_chunks)[:, None], other=0)
        count_B = tl.sum(count_CB, 0)
        before = tl.sum(tl.where((chunk_C < chunk)[:, None] & (bin_B == x)[None, :], count_CB, 0))
    tiles_B = tl.where(bin_B < X, (count_B + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.sum(tl.where(bin_B < x, tiles_B, 0), 0)
    is_mine_P = expert_P == x
    rank_P = before + tl.cumsum(is_mine_P.to(tl.int32), 0) - 1
    tl.store(pairs_ptr + first * BLOCK_M + rank_P, pair_P, mask=is_mine_P)
    if chunk == 0:
        count = tl.sum(tl.where(bin_B == x, count_B, 0), 0)
        num_tiles = (count + BLOCK_M - 1) // BLOCK_M
        at_M = count + tl.arange(0, BLOCK_M)
        nothing_M = tl.zeros((BLOCK_M,), tl.int32) + num_pairs
        tl.store(pairs_ptr + first * BLOCK_M + at_M, nothing_M, mask=at_M < num_tiles * BLOCK_M)
        tile_T = tl.arange(0, TILES)
        tl.store(tile_experts_ptr + first + tile_T, tl.zeros((TILES,), tl.int32) + x, mask=tile_T < num_tiles)
        if x == 0:
            tl.store(num_tiles_ptr, tl.sum(tiles_B, 0))


@triton.jit(do_not_specialize=["num_pairs"])  # type: ignore[untyped-decorator]
def _group_product_kernel(  # type: ignore[no-untyped-def]
    x_ptr, pairs_ptr, tile_experts_ptr, num_tiles_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, num_pairs,
    stride_x, stride_wx, stride_wn, stride_wk, stride_b, SHARED_BY: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr, GELU: tl.constexpr,
    INTERLEAVED: tl.constexpr, HALVES: tl.constexpr, PACKED: tl.constexpr, WITH_ASM: tl.constexpr, WITH_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[pair, n] = sum_k x[pair // SHARED_BY, k] w[expert, n, k] (+ bias); with GATED act(gate) (up + offset) of such.

    N counts columns of the output. Programs go through the column tiles of GROUP_M tiles of pairs before those of the next.
    """
    BLOCK_O: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    COLUMN_TILES: tl.constexpr = (N + BLOCK_O - 1) // BLOCK_O
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    first_tile = tl.program_id(0) // (GROUP_M * COLUMN_TILES) * GROUP_M
    side_by_side = tl.minimum(tl.load(num_tiles_ptr) - first_tile, GROUP_M)
    if side_by_side <= 0:
        return
    within = tl.program_id(0) % (GROUP_M * COLUMN_TILES)
    column_tile = within // side_by_side
    if column_tile >= COLUMN_TILES:
        return
    tile = first_tile + within % side_by_side
    expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
    pair_M = tl.load(pairs_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    is_M = pair_M < num_pairs
    if GATED:
        column_N, is_N = gate_up_columns(column_tile * BLOCK_O, N, BLOCK_O, INTERLEAVED, HALVES)
    else:
        column_N = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_N = column_N < N
    k_K = tl.arange(0, BLOCK_K)
    x_ptr_MK = x_ptr + (pair_M // SHARED_BY).to(tl.int64)[:, None] * stride_x + k_K[None, :]
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if PACKED:
        BYTES: tl.constexpr = BLOCK_K // 2
        at_N1 = (expert * stride_wx + column_N.to(tl.int64) * stride_wn)[:, None]
        w_ptr_NB = weight_ptr + at_N1 + tl.arange(0, BYTES)[None, :]
        scale_ptr_NG = scale_ptr + at_N1 // 16 + tl.arange(0, BYTES // 16)[None, :]
        for begin in range(0, K, BLOCK_K):
            at = begin // 2
            low_NB, high_NB = unpacked(
                w_ptr_NB + at, scale_ptr_NG + at // 16, is_N[:, None], K // 2 - at, BLOCK_N, BYTES, WITH_ASM
            )
            w_NK = tl.reshape(tl.join(low_NB.to(dtype), high_NB.to(dtype)), (BLOCK_N, BLOCK_K))
            x_MK = tl.load(x_ptr_MK + begin, mask=is_M[:, None] & (begin + k_K < K)[None, :], other=0.0)
            acc_MN = tl.dot(x_MK, tl.trans(w_NK), acc_MN, input_precision="ieee")
    else:
        w_ptr_KN = weight_ptr + expert * stride_wx + (k_K[:, None] * stride_wk + column_N[None, :] * stride_wn)
        for begin in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                x_MK = tl.load(x_ptr_MK + begin, mask=is_M[:, None], other=0.0)
                w_KN = tl.load(w_ptr_KN + begin * stride_wk, mask=is_N[None, :], other=0.0)
            else:
                is_K = begin + k_K < K
                x_MK = tl.load(x_ptr_MK + begin, mask=is_M[:, None] & is_K[None, :], other=0.0)
                w_KN = tl.load(w_ptr_KN + begin * stride_wk, mask=is_K[:, None] & is_N[None, :], other=0.0)
            acc_MN = tl.dot(x_MK, w_KN, acc_MN, input_precision="ieee")
    out_MN = acc_MN.to(dtype)
    if WITH_BIAS:
        bias_N = tl.load(bias_ptr + expert * stride_b + column_N, mask=is_N, other=0.0)
        out_MN = (out_MN.to(tl.float32) + bias_N.to(tl.float32)[None, :]).to(dtype)
    if GATED:
        if HALVES:
            gate_MO, up_MO = tl.split(tl.permute(tl.reshape(out_MN, (BLOCK_M, 2, BLOCK_O)), (0, 2, 1)))
        else:
            gate_MO, up_MO = tl.split(tl.reshape(out_MN, (BLOCK_M, BLOCK_O, 2)))
        out_MO = gate_and_up(gate_MO, up_MO, ALPHA, LIMIT, UP_OFFSET, GELU)
    else:
        out_MO = out_MN
    o_O = column_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    out_ptr_MO = out_ptr + pair_M.to(tl.int64)[:, None] * N + o_O[None, :]
    tl.store(out_ptr_MO, out_MO, mask=is_M[:, None] & (o_O < N)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _combine_kernel(  # type: ignore[no-untyped-def]
    parts_ptr, weights_ptr, out_ptr, stride_o, S: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr, ADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[row, e] = sum_s weights[row, s] parts[row, s, e]. ADDED: the sum, rounded, to what is there."""
    row = tl.program_id(0).to(tl.int64)
    e_E = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_E = e_E < E
    out_E = tl.zeros((TILE,), tl.float32)
    let_next_start(DEPENDENT)
    wait_for_previous(DEPENDENT)
    residual_E = tl.load(out_ptr + row * stride_o + e_E, mask=is_E, other=0.0) if ADDED else 0.0
    for s in tl.static_range(S):
        part_E = tl.load(parts_ptr + (row * S + s) * E + e_E, mask=is_E, other=0.0)
        out_E += tl.load(weights_ptr + row * S + s).to(tl.float32) * part_E.to(tl.float32)
    tl.store(out_ptr + row * stride_o + e_E, added_to(residual_E, out_E, out_ptr.dtype.element_ty, ADDED), mask=is_E)


def mix_experts(
    x_TE: torch.Tensor,
    experts_TS: torch.Tensor,
    weights_TS: torch.Tensor,
    weights: ExpertWeights,
    residual_TE: torch.Tensor | None,
) -> torch.Tensor:
    """See `kernels.experts.mix_experts`."""
    out_TE = x_TE.new_empty(x_TE.shape) if residual_TE is None else residual_TE
    for begin in range(0, len(x_TE), MOST_ROWS):
        some = slice(begin, begin + MOST_ROWS)
        mix = mix_pairs if uses_pairs(len(x_TE)) else mix_groups
        mix(x_TE[some], experts_TS[some], weights_TS[some], weights, out_TE[some], added=residual_TE is not None)
    return out_TE


def mix_groups(
    x_TE: torch.Tensor,
    experts_TS: torch.Tensor,
    weights_TS: torch.Tensor,
    weights: ExpertWeights,
    out_TE: torch.Tensor,
    *,
    added: bool = False,
    gate_up: GroupConfig | None = None,
    down: GroupConfig | None = None,
) -> None:
    """`mix_experts` of any number of rows, grouped by expert, into `out_TE`, or added to it. The configs must have one
    `block_m`."""
    num_rows, top_k = experts_TS.shape
    num_pairs = num_rows * top_k
    hidden, width = weights.hidden_size, weights.intermediate_size
    gate_up = gate_up or group_config(num_pairs, weights.num_experts, hidden, x_TE.dtype)
    down = down or group_config(num_pairs, weights.num_experts, width, x_TE.dtype)
    if gate_up.block_m != down.block_m:
        raise ValueError(f"tiles of {gate_up.block_m} pairs for gate and up, of {down.block_m} for down")
    groups = _group(experts_TS, weights.num_experts, gate_up.block_m)
    h_PI = x_TE.new_empty((num_pairs, width))
    _product(x_TE, top_k, groups, weights.gate_up_XNE, weights.gate_up_bias_XN, weights.gate, h_PI, gate_up)
    parts_PE = x_TE.new_empty((num_pairs, hidden))
    _product(h_PI, 1, groups, weights.down_XEI, weights.down_bias_XE, None, parts_PE, down)
    dependent = has_dependent_launch(x_TE.device)
    tile = min(_COMBINED, triton.next_power_of_2(hidden))
    _combine_kernel[(num_rows, triton.cdiv(hidden, tile))](
        parts_PE, weights_TS, out_TE, out_TE.stride(0), S=top_k, E=hidden, TILE=tile, ADDED=added, DEPENDENT=dependent,
        launch_pdl=dependent,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Groups:
    """Pairs in tiles, each of one expert. `num_tiles_1` of them are used; what lies beyond isn't written."""

    pairs_tM: torch.Tensor
    tile_experts_t: torch.Tensor
    num_tiles_1: torch.Tensor


def _group(experts_TS: torch.Tensor, num_experts: int, block_m: int) -> _Groups:
    num_pairs, device = experts_TS.numel(), experts_TS.device
    # as many as there may be: each expert's last tile holds one pair at least
    most = min(num_pairs, (num_pairs + (block_m - 1) * min(num_pairs, num_experts)) // block_m)
    groups = _Groups(*(torch.empty(shape, dtype=torch.int32, device=device) for shape in ((most, block_m), (most,), (1,))))
    chunk, most_chunks, most_tiles = _grouping(num_pairs, block_m)
    chunks = triton.cdiv(num_pairs, chunk)
    bins = max(128, triton.next_power_of_2(num_experts + 1))
    dependent = has_dependent_launch(device)
    counts_CB = groups.num_tiles_1
    if chunks > 1:
        counts_CB = torch.empty((chunks, bins), dtype=torch.int32, device=device)
        _count_kernel[(chunks,)](
            experts_TS, counts_CB, num_pairs, X=num_experts, BINS=bins, CHUNK=chunk, DEPENDENT=dependent, launch_pdl=dependent,
        )  # fmt: skip
    _group_kernel[(num_experts, chunks)](
        experts_TS, counts_CB, groups.pairs_tM, groups.tile_experts_t, groups.num_tiles_1, num_pairs, chunks,
        X=num_experts, BINS=bins, CHUNK=chunk, CHUNKS=most_chunks, BLOCK_M=block_m, TILES=most_tiles,
        DEPENDENT=dependent, num_warps=8 if chunk >= 2048 else 4, launch_pdl=dependent,
    )  # fmt: skip
    return groups


def _grouping(num_pairs: int, block_m: int) -> tuple[int, int, int]:
    """Pairs of a chunk, and powers of two that are no less than the number of chunks and of an expert's tiles."""
    # a number a thread at least: where threads hold the same ones, histograms have counted them twice (Triton #7938)
    chunk = min(_CHUNK_PAIRS, max(128, triton.next_power_of_2(num_pairs)))
    chunks = triton.next_power_of_2(triton.cdiv(num_pairs, chunk))
    return chunk, chunks, triton.next_power_of_2(triton.cdiv(chunk * chunks, block_m))


def rows_of_each_kernel(most: int, top_k: int, weights: ExpertWeights) -> list[int]:
    """Up to `most` rows, for each way in which `mix_experts` compiles its kernels a number of rows that takes it."""
    num_experts, dtype = weights.num_experts, weights.dtype or torch.bfloat16
    found: dict[object, int] = {}
    for rows in range(1, min(most, MOST_ROWS) + 1):
        key: object = "pairs"
        if not uses_pairs(rows):
            configs = [
                group_config(rows * top_k, num_experts, summed, dtype)
                for summed in (weights.hidden_size, weights.intermediate_size)
            ]
            key = (*configs, _grouping(rows * top_k, configs[0].block_m))
        found.setdefault(key, rows)
    return list(found.values())


def _product(
    x: torch.Tensor,
    shared_by: int,
    groups: _Groups,
    weight_XNK: torch.Tensor | Packed,
    bias_XN: torch.Tensor | None,
    gate: Gate | None,
    out: torch.Tensor,
    config: GroupConfig,
) -> None:
    """Rows of `x` are those of `shared_by` pairs each, rows of `out` those of one."""
    num_pairs, columns = out.shape
    numbers, scales = parts_of(weight_XNK)
    dependent = has_dependent_launch(x.device)
    column_tiles = triton.cdiv(columns, config.block_n // (1 if gate is None else 2))
    # whole groups of tiles: where in its group a program is follows from its number alone
    tiles = triton.cdiv(len(groups.tile_experts_t), config.group_m) * config.group_m
    _group_product_kernel[(tiles * column_tiles,)](
        x, groups.pairs_tM, groups.tile_experts_t, groups.num_tiles_1, numbers, scales, numbers if bias_XN is None else bias_XN,
        out, num_pairs, x.stride(0), *weight_XNK.stride(), 0 if bias_XN is None else bias_XN.stride(0),
        SHARED_BY=shared_by, N=columns, K=weight_XNK.shape[2], GATED=gate is not None,
        **gate_constants(gate or Gate(), weight_XNK), WITH_BIAS=bias_XN is not None,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m, DEPENDENT=dependent,
        num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=dependent,
    )  # fmt: skip
