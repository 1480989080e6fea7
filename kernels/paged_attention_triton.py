"""The Triton backend of `kernels.paged_attention`.

Work is cut on the host into items: a tile of rows, all query heads of one KV head, and a part of the KV that the tile sees, in
sections that each lie in one segment. Heads of a group are packed with the rows into M, so one load of K and V serves the whole
group:

    m = row_in_tile * G + head_in_group            rows of a tile: BLOCK_M // G

A tile whose KV is one part writes its result. Where that would leave multiprocessors idle (a few rows against a long
shard), the KV is split, each part writes a partial state to scratch, and a second kernel merges them.

Offsets are 64 bit: a pool of a million tokens with 32 KV heads x 128 has more than 2^31 elements.

Sources: FlashAttention-2 (the loop), Flash-Decoding (the split), FlashInfer (work lists made by a plan).

Shape suffixes: T rows, H query heads, K KV heads, G = H / K, D head dim, B blocks, P block size; in kernels M rows of the
packed tile, N tokens of a KV tile, W work items, S their sections, R split rows, X parts in scratch; C columns of a table.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels import decode_attention, decode_bytes
from kernels.decode_attention import MAX_ROWS, DecodeAttention, DecodeTables, RowReading, soft_capped
from kernels.decode_bytes import BytesDecode
from kernels.kv_blocks import LEAST_SCALE, SCALE_TYPES
from kernels.launch import num_processors
from kernels.paged_attention_tiles import TiledAttention, TilePlan, is_tileable, uses_tiles
from kernels.segments import AttentionSizes, PagedAttention, Scoring, Segment, by_rows, uncovered_ranges
from kernels.upload import upload

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_GROUP = 64
_LEAST_BYTES_DIM = 32
"""Products are of half of them (`kernels.decode_bytes`), and of 16 at least."""
_MIN_PART_TILES = 4
"""A part of split KV is at least so many KV tiles long, so that the merge stays small beside it."""
_PROGRAMS_PER_PROCESSOR = 4
_MERGE_PARTS = 16
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)
WORK_COLUMNS = tl.constexpr(5)
SECTION_COLUMNS = tl.constexpr(6)
_SPLIT_COLUMNS = tl.constexpr(4)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_tiles(  # type: ignore[no-untyped-def]
    acc_MD,
    top_M,
    sum_M,
    q_MD,
    start_M,
    first,
    kv_len_M,
    k_ptr,
    v_ptr,
    table_ptr,
    begin,
    end,
    stride_b,
    stride_p,
    log2_scale,
    log2_cap,
    unit,
    k_scales_ptr,
    v_scales_ptr,
    stride_sb,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
):
    """Online softmax, base 2, over tokens [begin, end), begin a multiple of BLOCK_N; end too unless MASKED.

    s = q k^T scale log2(e)    new = max(top, max_n s)    p = 2^(s - new)
    sum = sum 2^(top - new) + sum_n p                     acc = acc 2^(top - new) + p v

    MASKED and WINDOWED: row m sees those from `start_M[m]` on, and nothing before `first` is read. SCALED: k and v are of 8
    bits, and acc is counted in `unit`s, as `kernels.decode_bytes` has them.
    """
    BY_TOKEN: tl.constexpr = TOKEN_SCALES or P % BLOCK_N != 0
    offset_N = tl.arange(0, BLOCK_N)
    dim_D = tl.arange(0, D)
    for start in range(begin, end, BLOCK_N):
        token_N = start + offset_N
        if P % BLOCK_N == 0:  # the tile lies in one block
            block = tl.load(table_ptr + start // P).to(tl.int64)
            row_N = block * stride_b + (start % P + offset_N) * stride_p
        else:
            block_N = tl.load(table_ptr + token_N // P, mask=token_N < end, other=0).to(tl.int64)
            row_N = block_N * stride_b + (token_N % P) * stride_p
        at_ND = row_N[:, None] + dim_D[None, :]
        if MASKED:  # memory outside of [first, end) may hold NaN, and 0 * NaN is NaN
            is_read_N = token_N < end
            if WINDOWED:
                is_read_N &= token_N >= first
            k_ND = tl.load(k_ptr + at_ND, mask=is_read_N[:, None], other=0.0)
            v_ND = tl.load(v_ptr + at_ND, mask=is_read_N[:, None], other=0.0)
        else:
            k_ND = tl.load(k_ptr + at_ND)
            v_ND = tl.load(v_ptr + at_ND)
        if SCALED:
            k_ND = k_ND.to(q_MD.dtype)
            v_ND = v_ND.to(q_MD.dtype)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * log2_scale
        if SCALED:
            if BY_TOKEN:
                has_scale_N = token_N < end
                if WINDOWED:  # blocks before are others' by now
                    has_scale_N &= token_N >= first
                if P % BLOCK_N == 0:
                    scale_N = block * stride_sb + token_N % P
                elif TOKEN_SCALES:
                    scale_N = block_N * stride_sb + token_N % P
                else:
                    scale_N = block_N * stride_sb
                score_MN *= tl.load(k_scales_ptr + scale_N, mask=has_scale_N, other=0.0).to(tl.float32)[None, :]
                v_scale_N = tl.load(v_scales_ptr + scale_N, mask=has_scale_N, other=0.0).to(tl.float32)
                # in fp16 p loses bits of values that are 10^4 times smaller than the tile's largest
                v_scale = tl.maximum(tl.max(v_scale_N, 0), _LEAST_SCALE)
            else:
                score_MN *= tl.load(k_scales_ptr + block * stride_sb)
                v_scale = tl.load(v_scales_ptr + block * stride_sb)
        if CAPPED:
            score_MN = soft_capped(score_MN, log2_cap)
        if MASKED:
            is_seen_MN = (token_N[None, :] < kv_len_M[:, None]) & (token_N < end)[None, :]
            if WINDOWED:
                is_seen_MN &= token_N[None, :] >= start_M[:, None]
            score_MN = tl.where(is_seen_MN, score_MN, -float("inf"))
        new_M = tl.maximum(top_M, tl.max(score_MN, 1))
        shift_M = tl.where(new_M == -float("inf"), 0.0, new_M)  # 2^(-inf - -inf) is NaN
        p_MN = tl.exp2(score_MN - shift_M[:, None])
        decay_M = tl.exp2(top_M - shift_M)
        sum_M = sum_M * decay_M + tl.sum(p_MN, 1)
        if SCALED:
            if BY_TOKEN:
                p_MN *= (v_scale_N / v_scale)[None, :]
            decay_M *= unit / v_scale
            unit = v_scale
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * decay_M[:, None], input_precision="ieee")
        top_M = new_M
    return acc_MD, top_M, sum_M, unit


# tables are slices of one buffer, and begin where they begin: each alignment would be compiled anew
@triton.jit(do_not_specialize_on_alignment=["work_ptr", "sections_ptr", "kv_lens_ptr", "starts_ptr", "tables_ptr"])  # type: ignore[untyped-decorator]
def _attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    kv_ptr,
    scales_ptr,
    out_ptr,
    lse_ptr,
    part_out_ptr,
    part_lse_ptr,
    work_ptr,
    sections_ptr,
    kv_lens_ptr,
    starts_ptr,
    tables_ptr,
    stride_qt,
    stride_qh,
    stride_2,
    stride_b,
    stride_p,
    stride_k,
    stride_s2,
    stride_sb,
    stride_sk,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    log2_scale,
    log2_cap,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
):
    """lse = log sum_j exp(s_j), out = sum_j exp(s_j - lse) v_j, s_j = scale q . k_j, over one work item's tokens.

    Grid: work items, KV heads. Of a section, all rows of the tile see tokens [begin, full_end), some [full_end, end); if
    WINDOWED some see [begin, full_begin), and all [full_begin, full_end).
    """
    item_ptr = work_ptr + tl.program_id(0) * WORK_COLUMNS
    kv_head = tl.program_id(1)
    first_row = tl.load(item_ptr)
    num_rows = tl.load(item_ptr + 1)
    first_section = tl.load(item_ptr + 2)
    num_sections = tl.load(item_ptr + 3)
    part = tl.load(item_ptr + 4)

    m_M = tl.arange(0, BLOCK_M)
    dim_D = tl.arange(0, D)
    is_row_M = m_M // G < num_rows
    row_M = (first_row + m_M // G).to(tl.int64)
    head_M = kv_head * G + m_M % G
    q_MD_ptr = q_ptr + (row_M * stride_qt + head_M * stride_qh)[:, None] + dim_D[None, :]
    q_MD = tl.load(q_MD_ptr, mask=is_row_M[:, None], other=0.0)
    k_ptr = kv_ptr + kv_head.to(tl.int64) * stride_k
    v_ptr = k_ptr + stride_2
    k_scales_ptr = scales_ptr
    v_scales_ptr = scales_ptr
    if SCALED:
        k_scales_ptr += kv_head * stride_sk
        v_scales_ptr += kv_head * stride_sk + stride_s2
    unit = 1.0

    acc_MD = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    top_M = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for section in range(num_sections):
        section_ptr = sections_ptr + (first_section + section) * SECTION_COLUMNS
        kv_len_M = tl.load(kv_lens_ptr + tl.load(section_ptr) + m_M // G, mask=is_row_M, other=0)
        table_ptr = tables_ptr + tl.load(section_ptr + 1)
        begin = tl.load(section_ptr + 2)
        full_end = tl.load(section_ptr + 3)
        end = tl.load(section_ptr + 4)
        start_M = kv_len_M
        first = 0
        if WINDOWED:
            start_M = tl.load(starts_ptr + tl.load(section_ptr) + m_M // G, mask=is_row_M, other=2147483647)
            first = tl.min(start_M, 0)
            full_begin = tl.load(section_ptr + 5)
            acc_MD, top_M, sum_M, unit = _attend_tiles(
                acc_MD, top_M, sum_M, q_MD, start_M, first, kv_len_M, k_ptr, v_ptr, table_ptr, begin, full_begin,
                stride_b, stride_p, log2_scale, log2_cap, unit, k_scales_ptr, v_scales_ptr, stride_sb,
                D, P, BLOCK_N, True, True, CAPPED, SCALED, TOKEN_SCALES,
            )  # fmt: skip
            begin = full_begin
        acc_MD, top_M, sum_M, unit = _attend_tiles(
            acc_MD, top_M, sum_M, q_MD, start_M, first, kv_len_M, k_ptr, v_ptr, table_ptr, begin, full_end,
            stride_b, stride_p, log2_scale, log2_cap, unit, k_scales_ptr, v_scales_ptr, stride_sb,
            D, P, BLOCK_N, False, WINDOWED, CAPPED, SCALED, TOKEN_SCALES,
        )  # fmt: skip
        acc_MD, top_M, sum_M, unit = _attend_tiles(
            acc_MD, top_M, sum_M, q_MD, start_M, first, kv_len_M, k_ptr, v_ptr, table_ptr, full_end, end,
            stride_b, stride_p, log2_scale, log2_cap, unit, k_scales_ptr, v_scales_ptr, stride_sb,
            D, P, BLOCK_N, True, WINDOWED, CAPPED, SCALED, TOKEN_SCALES,
        )  # fmt: skip

    divisor_M = tl.where(sum_M == 0.0, 1.0, sum_M)  # an empty state: 0 / 1, and -inf + log 1
    if SCALED:
        acc_MD *= unit
    acc_MD = acc_MD / divisor_M[:, None]
    lse_M = (top_M + tl.log2(divisor_M)) * 0.6931471805599453  # ln 2
    if part < 0:
        out_MD_ptr = out_ptr + (row_M * stride_ot + head_M * stride_oh)[:, None] + dim_D[None, :]
        tl.store(out_MD_ptr, acc_MD.to(out_ptr.dtype.element_ty), mask=is_row_M[:, None])
        tl.store(lse_ptr + row_M * stride_lt + head_M * stride_lh, lse_M, mask=is_row_M)
    else:
        part_M = (part.to(tl.int64) * K + kv_head) * BLOCK_M + m_M
        tl.store(part_out_ptr + part_M[:, None] * D + dim_D[None, :], acc_MD, mask=is_row_M[:, None])
        tl.store(part_lse_ptr + part_M, lse_M, mask=is_row_M)


@triton.jit(do_not_specialize_on_alignment=["split_ptr"])  # type: ignore[untyped-decorator]
def _merge_parts_kernel(  # type: ignore[no-untyped-def]
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    split_ptr,
    stride_ot,
    stride_oh,
    stride_lt,
    stride_lh,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """lse = log sum_x exp(lse_x), out = sum_x exp(lse_x - lse) out_x, over the parts of one row and head.

    Grid: split rows, query heads.
    """
    item_ptr = split_ptr + tl.program_id(0) * _SPLIT_COLUMNS
    head = tl.program_id(1)
    row = tl.load(item_ptr).to(tl.int64)
    row_in_tile = tl.load(item_ptr + 1)
    first_part = tl.load(item_ptr + 2).to(tl.int64)
    num_parts = tl.load(item_ptr + 3)
    dim_D = tl.arange(0, D)

    acc_D = tl.zeros((D,), dtype=tl.float32)
    top = -float("inf")
    total = 0.0
    for start in range(0, num_parts, BLOCK_X):
        x_X = start + tl.arange(0, BLOCK_X)
        at_X = ((first_part + x_X) * K + head // G) * BLOCK_M + row_in_tile * G + head % G
        lse_X = tl.load(part_lse_ptr + at_X, mask=x_X < num_parts, other=-float("inf"))
        out_XD = tl.load(part_out_ptr + at_X[:, None] * D + dim_D[None, :], mask=(x_X < num_parts)[:, None], other=0.0)
        new = tl.maximum(top, tl.max(lse_X, 0))
        shift = tl.where(new == -float("inf"), 0.0, new)  # exp(-inf - -inf) is NaN
        weight_X = tl.exp(lse_X - shift)
        decay = tl.exp(top - shift)
        acc_D = acc_D * decay + tl.sum(weight_X[:, None] * out_XD, 0)
        total = total * decay + tl.sum(weight_X, 0)
        top = new

    divisor = tl.where(total == 0.0, 1.0, total)  # an empty state: 0 / 1, and -inf + log 1
    acc_D = acc_D / divisor
    tl.store(out_ptr + row * stride_ot + head * stride_oh + dim_D, acc_D.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + row * stride_lt + head * stride_lh, top + tl.log(divisor))


@dataclass(frozen=True, slots=True)
class TileShape:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Launch:
    """Work items of spans, and the scratch for those whose KV is split."""

    shape: TileShape
    kv_lens: torch.Tensor
    """Of all segments, one after the other."""
    starts: torch.Tensor | None
    """The same of starts, if there are any."""
    tables: torch.Tensor
    """And their block tables."""
    work_WC: torch.Tensor
    """int32 per item: first row, rows, first section, sections, part (-1: writes the result)."""
    sections_SC: torch.Tensor
    """int32 per section: place in `kv_lens` and in the block tables, begin, full_end, end, full_begin."""
    split_RC: torch.Tensor
    """int32 per split row: row, row in its tile, first part, number of parts."""
    part_out_XKMD: torch.Tensor
    part_lse_XKM: torch.Tensor


def scratch_bytes(
    num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device, kv_dtype: torch.dtype | None = None
) -> int:
    """Most bytes of the parts of split KV: at most one for each program that fills the device, and the decode kernel's."""
    group: int = triton.next_power_of_2(num_heads // num_kv_heads)
    parts = parts_bytes(max(128, group), num_kv_heads, head_dim, device)
    most = decode_bytes.MOST_PROGRAMS if kv_dtype in SCALE_TYPES else decode_attention.MOST_PROGRAMS
    return parts + decode_attention.scratch_bytes(num_heads, num_kv_heads, head_dim, device, most)


def parts_bytes(block_m: int, num_kv_heads: int, out_dim: int, device: torch.device) -> int:
    """Most bytes of the parts that `plan_launch` cuts the KV of spans into."""
    programs = _programs(device) // num_kv_heads * num_kv_heads
    return programs * block_m * (out_dim + 1) * 4


class TritonPagedAttention(PagedAttention):
    """Single rows go to `kernels.decode_attention`, spans of many to `kernels.paged_attention_tiles` where there is one, and
    what is left to the kernel of this file."""

    def __init__(
        self, sizes: AttentionSizes, min_blocks: int, segments: Sequence[Segment], tiles: TiledAttention | None
    ) -> None:
        super().__init__(sizes, min_blocks)
        _refuse_unsupported(sizes)
        single: list[list[RowReading]] = []
        spans: list[Segment] = []
        self._tiles = tiles
        self._tiled: list[TilePlan] = []
        for runs in by_rows(segments):
            large = [] if tiles is None else [run for run in runs if _is_for_tiles(run, sizes)]
            if tiles is not None and large:
                plan = tiles.plan(large, [run for run in runs if run not in large])
                self._tiled.append(plan)
                spans += plan.left_over
            elif runs[0].num_rows > 1:
                spans += runs
            else:
                single.append([RowReading(run.first_row, run.block_ids, run.kv_lens[0], *run.starts) for run in runs])
        self._decode: list[tuple[DecodeAttention, DecodeTables]] = []
        if single:
            kernel = (BytesDecode if sizes.has_scales else DecodeAttention)(sizes)
            for at in range(0, len(single), MAX_ROWS):
                readings = [reading for row in single[at : at + MAX_ROWS] for reading in row]
                self._decode.append((kernel, kernel.upload_tables(readings)))
        self._chunk = plan_launch(_tile_shape(sizes), spans, sizes) if spans else None
        self._empty = uncovered_ranges(segments, sizes.num_rows)

    def _run(
        self,
        q_THD: torch.Tensor,
        kv_2BPKD: torch.Tensor,
        scales_2BKX: torch.Tensor | None,
        scoring: Scoring,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor,
    ) -> None:
        if scoring.soft_cap and self._tiled:
            raise ValueError("the library's dense kernel knows no soft cap: plan without tiles")
        for start, end in self._empty:
            out_THD[start:end] = 0
            lse_TH[start:end] = -torch.inf
        for kernel, tables in self._decode:
            kernel.run(q_THD, kv_2BPKD, scoring, tables, out_THD=out_THD, lse_TH=lse_TH, scales_2BKX=scales_2BKX)
        if self._chunk is not None:
            self._run_chunk(self._chunk, q_THD, kv_2BPKD, scales_2BKX, scoring, out_THD, lse_TH)
        if self._tiles is not None:
            for plan in self._tiled:
                self._tiles.run(plan, q_THD, kv_2BPKD, scoring.scale, out_THD=out_THD, lse_TH=lse_TH, scales_2BKX=scales_2BKX)

    def _run_chunk(
        self,
        launch: Launch,
        q_THD: torch.Tensor,
        kv_2BPKD: torch.Tensor,
        scales_2BKX: torch.Tensor | None,
        scoring: Scoring,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor,
    ) -> None:
        sizes, shape = self.sizes, launch.shape
        _attention_kernel[(launch.work_WC.shape[0], sizes.num_kv_heads)](
            q_THD,
            kv_2BPKD,
            scales_2BKX,
            out_THD,
            lse_TH,
            launch.part_out_XKMD,
            launch.part_lse_XKM,
            launch.work_WC,
            launch.sections_SC,
            launch.kv_lens,
            launch.kv_lens if launch.starts is None else launch.starts,
            launch.tables,
            *q_THD.stride()[:2],
            *kv_2BPKD.stride()[:4],
            *((0, 0, 0) if scales_2BKX is None else scales_2BKX.stride()[:3]),
            *out_THD.stride()[:2],
            *lse_TH.stride(),
            scoring.scale * math.log2(math.e),
            scoring.soft_cap * math.log2(math.e),
            K=sizes.num_kv_heads,
            G=sizes.group,
            D=sizes.head_dim,
            P=sizes.block_size,
            BLOCK_M=shape.block_m,
            BLOCK_N=shape.block_n,
            WINDOWED=launch.starts is not None,
            CAPPED=scoring.soft_cap > 0,
            SCALED=scales_2BKX is not None,
            TOKEN_SCALES=sizes.has_token_scales,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )
        merge_parts(launch, sizes, out_THD, lse_TH)


def merge_parts(launch: Launch, sizes: AttentionSizes, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> None:
    """The states of the rows whose KV is split, once all their parts are in scratch."""
    if not launch.split_RC.shape[0]:
        return
    _merge_parts_kernel[(launch.split_RC.shape[0], sizes.num_heads)](
        launch.part_out_XKMD,
        launch.part_lse_XKM,
        out_THD,
        lse_TH,
        launch.split_RC,
        *out_THD.stride()[:2],
        *lse_TH.stride(),
        K=sizes.num_kv_heads,
        G=sizes.group,
        D=sizes.out_dim,
        BLOCK_M=launch.shape.block_m,
        BLOCK_X=_MERGE_PARTS,
    )


def _is_for_tiles(segment: Segment, sizes: AttentionSizes) -> bool:
    most = max(segment.kv_lens)
    return uses_tiles(segment.num_rows, most, sizes.dtype, sizes.head_dim) and is_tileable(segment)


def _refuse_unsupported(sizes: AttentionSizes) -> None:
    dim = sizes.head_dim
    if sizes.dtype not in _DTYPES or not 16 <= dim <= 256 or dim & (dim - 1) or sizes.group > _MAX_GROUP:
        raise ValueError(
            f"the triton backend takes float32, float16 and bfloat16, head_dim a power of two from 16 to 256, and at most "
            f"{_MAX_GROUP} query heads per KV head; got {sizes.dtype}, head_dim {dim}, {sizes.group} query heads per KV head"
        )
    if sizes.has_scales and dim < _LEAST_BYTES_DIM:
        raise ValueError(f"of KV of 8 bits the triton backend takes head_dim from {_LEAST_BYTES_DIM} on, got {dim}")
    if sizes.device.type == "cpu" and isinstance(_attention_kernel, triton.JITFunction):
        raise ValueError(f"the triton backend needs a CUDA device, got {sizes.device}")


def _tile_shape(sizes: AttentionSizes) -> TileShape:
    """Tile sizes by dtype and head dim, for shared memory of 227 KB (Hopper): q tile + stages x (K tile + V tile)."""
    least = triton.next_power_of_2(sizes.group)
    if sizes.dtype == torch.float32:  # IEEE products run outside the tensor cores; larger tiles spilled registers
        if sizes.head_dim > 64:
            return TileShape(max(16, least), 32, 8, 2)
        return TileShape(max(32, least), 32, 4, 2)
    return TileShape(max(128, least), 64, 8, 3) if sizes.head_dim <= 128 else TileShape(max(64, least), 64, 8, 2)


@dataclass(frozen=True, slots=True)
class _Run:
    """What a tile of rows sees of one segment."""

    lens_start: int
    table_start: int
    low: int
    """All rows see tokens `[full_begin, low)`."""
    high: int
    """And some `[begin, high)`."""
    begin: int = 0
    full_begin: int = 0

    @property
    def tokens(self) -> int:
        return self.high - self.begin


def plan_launch(shape: TileShape, segments: Sequence[Segment], sizes: AttentionSizes) -> Launch:
    """Cut segments into tiles, and the KV of tiles into parts."""
    kv_lens, starts, tables = array("i"), array("i"), array("i")
    windowed = any(segment.starts for segment in segments)
    tile_rows = shape.block_m // sizes.group
    tiles: list[tuple[int, int, list[_Run]]] = []
    for group in by_rows(segments):
        places: list[tuple[int, int]] = []
        for segment in group:
            places.append((len(kv_lens), len(tables)))
            kv_lens.extend(segment.kv_lens)
            tables.extend(segment.block_ids)
            if windowed:
                starts.extend(segment.starts or [0] * segment.num_rows)
        for row in range(0, group[0].num_rows, tile_rows):
            parts_of = [segment.part(row, row + tile_rows) for segment in group]
            runs = [_run_of(part, at + row, table, shape.block_n) for (at, table), part in zip(places, parts_of, strict=True)]
            tiles.append((group[0].first_row + row, parts_of[0].num_rows, runs))
    total = sum(run.tokens for _, _, runs in tiles for run in runs)
    programs = _programs(sizes.device) // sizes.num_kv_heads
    work, sections, split = array("i"), array("i"), array("i")
    num_parts = 0
    for first_row, num_rows, runs in tiles:
        tokens = sum(run.tokens for run in runs)
        # in proportion to its length, and never more programs than fill the device once
        wanted = min(tokens * programs // max(total, 1), tokens // (_MIN_PART_TILES * shape.block_n))
        length = sum(_round_up(run.tokens, shape.block_n) for run in runs)
        parts = _cut(runs, _round_up(triton.cdiv(length, max(wanted, 1)), shape.block_n), shape.block_n)
        for i, part in enumerate(parts):
            first_section = len(sections) // SECTION_COLUMNS.value
            work.extend((first_row, num_rows, first_section, len(part), num_parts + i if len(parts) > 1 else -1))
            for section in part:
                sections.extend(section)
        if len(parts) > 1:
            for row in range(num_rows):
                split.extend((first_row + row, row, num_parts, len(parts)))
            num_parts += len(parts)
    table = upload(work + sections + split, sizes.device, torch.int32)
    lens_and_tables = upload(kv_lens + tables + starts, sizes.device, torch.int32)
    scratch = (num_parts, sizes.num_kv_heads, shape.block_m)
    return Launch(
        shape=shape,
        kv_lens=lens_and_tables[: len(kv_lens)],
        starts=lens_and_tables[len(kv_lens) + len(tables) :] if windowed else None,
        tables=lens_and_tables[len(kv_lens) : len(kv_lens) + len(tables)],
        work_WC=table[: len(work)].view(-1, WORK_COLUMNS.value),
        sections_SC=table[len(work) : len(work) + len(sections)].view(-1, SECTION_COLUMNS.value),
        split_RC=table[len(work) + len(sections) :].view(-1, _SPLIT_COLUMNS.value),
        part_out_XKMD=torch.empty((*scratch, sizes.out_dim), dtype=torch.float32, device=sizes.device),
        part_lse_XKM=torch.empty(scratch, dtype=torch.float32, device=sizes.device),
    )


def _run_of(part: Segment, lens_start: int, table_start: int, block_n: int) -> _Run:
    """What the rows of one tile see of a segment; it begins with a multiple of `block_n`."""
    low, high = min(part.kv_lens), max(part.kv_lens)
    if not part.starts:
        return _Run(lens_start, table_start, low, high)
    first = min(part.starts)
    begin = high if first == high else first // block_n * block_n  # at `high`: no row sees anything
    return _Run(lens_start, table_start, low, high, begin, _round_up(max(part.starts), block_n))


def _cut(runs: Sequence[_Run], length: int, block_n: int) -> list[list[tuple[int, int, int, int, int, int]]]:
    """The sections of each part, one part at least; `length`: most tokens in a part, each section rounded up to `block_n`."""
    parts: list[list[tuple[int, int, int, int, int, int]]] = [[]]
    room = length
    for run in runs:
        begin = run.begin
        while begin < run.high:
            if not room:
                parts.append([])
                room = length
            end = min(begin + room, run.high)
            full_begin = min(max(begin, run.full_begin), end)
            full_end = full_begin + max(0, min(run.low, end) - full_begin) // block_n * block_n
            parts[-1].append((run.lens_start, run.table_start, begin, full_end, end, full_begin))
            room -= _round_up(end - begin, block_n)
            begin = end
    return parts


def _programs(device: torch.device) -> int:
    """How many programs fill the device."""
    return _PROGRAMS_PER_PROCESSOR * num_processors(device)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
