"""The Triton backend of `kernels.paged_attention` for latent KV: DeepSeek's latent attention with absorbed projections.

A token is one row of C + R numbers, its latent and its rotated part, for all query heads. It is loaded once and used twice, as
key and as value:

    s_j = scale (q[:C] . c_j + q[C:] . r_j)        lse = log sum_j exp(s_j)        out = sum_j exp(s_j - lse) c_j

C + R is no power of two, so keys are two tiles and s two products. All query heads that see a row of latents are rows of one
product; more than `_MOST_HEADS` are cut into K head tiles, whose programs run side by side and read the same latents. Decode
rows have the tables and slots of `kernels.decode_attention`, spans the work items of `kernels.paged_attention_triton`.

Sources: FlashMLA and SGLang's grouped decode kernel (a latent as key and value), and those of the two files.

Shape suffixes: as there; C latent dim (that of values and of out), R rotated dim, K head tiles, G = H / K.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.decode_attention import MAX_ROWS, DecodeAttention, DecodeConfig, DecodeTables, RowReading
from kernels.decode_merge import MergeShape
from kernels.decode_slots import part_of_row, part_of_run, store_state
from kernels.launch import has_dependent_launch, num_processors, wait_for_previous
from kernels.paged_attention_triton import (
    SECTION_COLUMNS,
    WORK_COLUMNS,
    Launch,
    TileShape,
    merge_parts,
    parts_bytes,
    plan_launch,
)
from kernels.segments import AttentionSizes, PagedAttention, Scoring, Segment, by_rows, uncovered_ranges

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_HEADS = 64
"""Query heads of one program: a sum of 64 x 512 numbers in fp32 is half of a processor's registers."""


@triton.jit  # type: ignore[untyped-decorator]
def _add_tile(  # type: ignore[no-untyped-def]
    acc_MC, top_M, sum_M, unit, q_MC, q_MR, c_NC, r_NR, is_seen_MN, scale, scale_N, log2_scale, MASKED: tl.constexpr,
    SCALED: tl.constexpr, IN_BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of online softmax, base 2, over a tile of latents.

    s = (q_c c^T + q_r r^T) scale log2(e)    new = max(top, max_n s)    p = 2^(s - new)
    sum = sum 2^(top - new) + sum_n p        acc = acc 2^(top - new) + p c

    SCALED: latents are in fp8, and acc in units (`kernels.decode_bytes`): their scale is `scale` if the tile lies IN_BLOCK,
    else that of each is in `scale_N`.
    """
    if SCALED:
        c_NC = c_NC.to(q_MC.dtype)
        r_NR = r_NR.to(q_MR.dtype)
    score_MN = tl.dot(q_MC, tl.trans(c_NC), input_precision="ieee")
    score_MN = tl.dot(q_MR, tl.trans(r_NR), score_MN, input_precision="ieee") * log2_scale
    if SCALED:
        if IN_BLOCK:
            score_MN *= scale
        else:
            score_MN *= scale_N[None, :]
            scale = tl.max(scale_N, 0)
    if MASKED:
        score_MN = tl.where(is_seen_MN, score_MN, -float("inf"))
    new_M = tl.maximum(top_M, tl.max(score_MN, 1))
    shift_M = tl.where(new_M == -float("inf"), 0.0, new_M)  # 2^(-inf - -inf) is NaN
    p_MN = tl.exp2(score_MN - shift_M[:, None])
    decay_M = tl.exp2(top_M - shift_M)
    sum_M = sum_M * decay_M + tl.sum(p_MN, 1)
    if SCALED:
        if not IN_BLOCK:
            p_MN *= (scale_N / scale)[None, :]
        decay_M *= unit / scale
        unit = scale
    acc_MC = tl.dot(p_MN.to(c_NC.dtype), c_NC, acc_MC * decay_M[:, None], input_precision="ieee")
    return acc_MC, new_M, sum_M, unit


@triton.jit  # type: ignore[untyped-decorator]
def _attend_tile(  # type: ignore[no-untyped-def]
    acc_MC, top_M, sum_M, unit, q_MC, q_MR, token, kv_len, block, scale, c_src, r_src, scales_ptr, table_ptr, stride_b,
    stride_p, stride_sb, log2_scale, C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """`_add_tile` of tokens [token, token + BLOCK_N) of a run, those from kv_len on masked."""
    scale_N = 1.0
    token_N = token + tl.arange(0, BLOCK_N)
    is_seen_N = token_N < kv_len
    if USE_TMA:
        place = block * P + token % P
        c_NC = c_src.load([place, 0])
        r_NR = r_src.load([place, 0])
    else:
        if P % BLOCK_N == 0:  # the tile lies in one block
            at_N = block.to(tl.int64) * stride_b + (token % P + tl.arange(0, BLOCK_N)) * stride_p
        else:
            block_N = tl.load(table_ptr + token_N // P, mask=is_seen_N, other=0).to(tl.int64)
            at_N = block_N * stride_b + (token_N % P) * stride_p
            if SCALED:
                scale_N = tl.load(scales_ptr + block_N * stride_sb, mask=is_seen_N, other=0.0)
        c_NC_ptr = c_src + at_N[:, None] + tl.arange(0, C)[None, :]
        r_NR_ptr = r_src + at_N[:, None] + tl.arange(0, R)[None, :]
        if MASKED:
            c_NC = tl.load(c_NC_ptr, mask=is_seen_N[:, None], other=0.0)
            r_NR = tl.load(r_NR_ptr, mask=is_seen_N[:, None], other=0.0)
        else:
            c_NC = tl.load(c_NC_ptr)
            r_NR = tl.load(r_NR_ptr)
    if MASKED:
        c_NC = tl.where(is_seen_N[:, None], c_NC, 0.0)  # memory that nobody wrote may hold NaN, and 0 * NaN is NaN
    return _add_tile(
        acc_MC, top_M, sum_M, unit, q_MC, q_MR, c_NC, r_NR, is_seen_N[None, :], scale, scale_N, log2_scale, MASKED, SCALED,
        P % BLOCK_N == 0,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _attend_run(  # type: ignore[no-untyped-def]
    acc_MC, top_M, sum_M, unit, q_MC, q_MR, first_tile, num_tiles, kv_len, c_src, r_src, scales_ptr, table_ptr, stride_b,
    stride_p, stride_sb, log2_scale, C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """`_attend_tile` over some tiles of one run, of which the last may be cut off by `kv_len`.

    The block of the next tile is looked up meanwhile: looked up where it is needed it takes one of the compiler's stages, and
    so a tile's buffer. SCALED: so is its scale, and the block of the tile behind it.
    """
    begin = first_tile * BLOCK_N
    end = begin + num_tiles * BLOCK_N
    full_end = tl.maximum(begin, tl.minimum(end, kv_len // BLOCK_N * BLOCK_N))
    if end > begin:
        block = tl.load(table_ptr + begin // P)
    else:
        block = 0
    scale = 1.0
    if SCALED:
        following = block
        if end > begin:
            following = tl.load(table_ptr + tl.minimum(begin + BLOCK_N, end - BLOCK_N) // P)
            scale = tl.load(scales_ptr + tl.cast(block, tl.int64) * stride_sb)
    for token in tl.range(begin, full_end, BLOCK_N):
        if SCALED:
            block_behind = tl.load(table_ptr + tl.minimum(token + 2 * BLOCK_N, end - BLOCK_N) // P)
            next_scale = tl.load(scales_ptr + tl.cast(following, tl.int64) * stride_sb)
        else:
            following = tl.load(table_ptr + tl.minimum(token + BLOCK_N, end - BLOCK_N) // P)
        acc_MC, top_M, sum_M, unit = _attend_tile(
            acc_MC, top_M, sum_M, unit, q_MC, q_MR, token, kv_len, block, scale, c_src, r_src, scales_ptr, table_ptr, stride_b,
            stride_p, stride_sb, log2_scale, C, R, P, BLOCK_N, USE_TMA, False, SCALED,
        )  # fmt: skip
        block = following
        if SCALED:
            following = block_behind
            scale = next_scale
    if full_end < end:
        acc_MC, top_M, sum_M, unit = _attend_tile(
            acc_MC, top_M, sum_M, unit, q_MC, q_MR, full_end, kv_len, block, scale, c_src, r_src, scales_ptr, table_ptr,
            stride_b, stride_p, stride_sb, log2_scale, C, R, P, BLOCK_N, USE_TMA, True, SCALED,
        )  # fmt: skip
    return acc_MC, top_M, sum_M, unit


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _latent_decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr, c_src, r_src, scales_ptr, out_ptr, lse_ptr, piece_out_ptr, piece_lse_ptr, rows_ptr, blocks_ptr, num_rows,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_lt, stride_lh, stride_b, stride_p, stride_sb, log2_scale,
    K: tl.constexpr, G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr, DEPENDENT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The states of a slot's tiles and one head tile, as `kernels.decode_attention._decode_kernel` makes them."""
    program = tl.program_id(0)
    head_tile = program % K
    slot = program // K
    tile_count = tl.load(rows_ptr + 3 * (num_rows + 1) + num_rows).to(tl.int64)
    slots = tl.minimum(tl.num_programs(0) // K, tile_count)
    if slot >= slots:
        wait_for_previous(DEPENDENT)
        return
    tile = slot * tile_count // slots
    last = (slot + 1) * tile_count // slots
    m_M = tl.arange(0, BLOCK_M)
    dim_C = tl.arange(0, C)
    dim_R = tl.arange(0, R)
    is_head_M = m_M < G
    head_M = head_tile * G + m_M
    wait_for_previous(DEPENDENT)
    while tile < last:
        row, kv_len, begin, tiles, first_tile, num_tiles = part_of_row(rows_ptr, num_rows, tile, last)
        table_ptr = blocks_ptr + begin
        q_M_ptr = q_ptr + row * stride_qt + head_M * stride_qh
        q_MC = tl.load(q_M_ptr[:, None] + dim_C[None, :], mask=is_head_M[:, None], other=0.0)
        q_MR = tl.load(q_M_ptr[:, None] + C + dim_R[None, :], mask=is_head_M[:, None], other=0.0)

        acc_MC = tl.zeros((BLOCK_M, C), dtype=tl.float32)
        top_M = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
        sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
        unit = 1.0
        if kv_len >= 0:
            acc_MC, top_M, sum_M, unit = _attend_run(
                acc_MC, top_M, sum_M, unit, q_MC, q_MR, first_tile, num_tiles, kv_len, c_src, r_src, scales_ptr, table_ptr,
                stride_b, stride_p, stride_sb, log2_scale, C, R, P, BLOCK_N, USE_TMA, SCALED,
            )  # fmt: skip
        else:
            skipped = first_tile  # of the run's tiles and those after it: not this slot's
            left = num_tiles
            for run in range(-kv_len):
                run_len, run_ptr, first, taken = part_of_run(table_ptr, blocks_ptr, run, skipped, left, BLOCK_N, False)
                skipped -= first
                left -= taken
                acc_MC, top_M, sum_M, unit = _attend_run(
                    acc_MC, top_M, sum_M, unit, q_MC, q_MR, first, taken, run_len, c_src, r_src, scales_ptr, run_ptr,
                    stride_b, stride_p, stride_sb, log2_scale, C, R, P, BLOCK_N, USE_TMA, SCALED,
                )  # fmt: skip

        if SCALED:
            acc_MC *= unit
        result_MC = acc_MC / sum_M[:, None]
        lse_M = (top_M + tl.log2(sum_M)) * 0.6931471805599453  # ln 2
        store_state(
            result_MC, lse_M, row, head_tile, num_tiles == tiles, first_tile == 0, out_ptr, lse_ptr, piece_out_ptr,
            piece_lse_ptr, stride_ot, stride_oh, stride_lt, stride_lh, program, G, C, BLOCK_M,
        )  # fmt: skip
        tile += num_tiles


@triton.jit  # type: ignore[untyped-decorator]
def _attend_tiles(  # type: ignore[no-untyped-def]
    acc_MC, top_M, sum_M, unit, q_MC, q_MR, kv_len_M, kv_ptr, scales_ptr, table_ptr, begin, end, stride_b, stride_p,
    stride_sb, log2_scale, C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """`_add_tile` over tokens [begin, end), begin a multiple of BLOCK_N; end too unless MASKED, where row m sees the first
    `kv_len_M[m]`."""
    offset_N = tl.arange(0, BLOCK_N)
    dim_C = tl.arange(0, C)
    dim_R = tl.arange(0, R)
    for start in range(begin, end, BLOCK_N):
        token_N = start + offset_N
        is_read_N = token_N < end
        scale = 1.0
        scale_N = 1.0
        if P % BLOCK_N == 0:  # the tile lies in one block
            block = tl.load(table_ptr + start // P).to(tl.int64)
            at_N = block * stride_b + (start % P + offset_N) * stride_p
            if SCALED:
                scale = tl.load(scales_ptr + block * stride_sb)
        else:
            block_N = tl.load(table_ptr + token_N // P, mask=is_read_N, other=0).to(tl.int64)
            at_N = block_N * stride_b + (token_N % P) * stride_p
            if SCALED:
                scale_N = tl.load(scales_ptr + block_N * stride_sb, mask=is_read_N, other=0.0)
        c_NC_ptr = kv_ptr + at_N[:, None] + dim_C[None, :]
        r_NR_ptr = kv_ptr + C + at_N[:, None] + dim_R[None, :]
        if MASKED:  # memory from `end` on may hold NaN, and 0 * NaN is NaN
            c_NC = tl.load(c_NC_ptr, mask=is_read_N[:, None], other=0.0)
            r_NR = tl.load(r_NR_ptr, mask=is_read_N[:, None], other=0.0)
        else:
            c_NC = tl.load(c_NC_ptr)
            r_NR = tl.load(r_NR_ptr)
        is_seen_MN = (token_N[None, :] < kv_len_M[:, None]) & is_read_N[None, :]
        acc_MC, top_M, sum_M, unit = _add_tile(
            acc_MC, top_M, sum_M, unit, q_MC, q_MR, c_NC, r_NR, is_seen_MN, scale, scale_N, log2_scale, MASKED, SCALED,
            P % BLOCK_N == 0,
        )  # fmt: skip
    return acc_MC, top_M, sum_M, unit


# tables are slices of one buffer, and begin where they begin: each alignment would be compiled anew
@triton.jit(do_not_specialize_on_alignment=["work_ptr", "sections_ptr", "kv_lens_ptr", "tables_ptr"])  # type: ignore[untyped-decorator]
def _latent_kernel(  # type: ignore[no-untyped-def]
    q_ptr, kv_ptr, scales_ptr, out_ptr, lse_ptr, part_out_ptr, part_lse_ptr, work_ptr, sections_ptr, kv_lens_ptr, tables_ptr,
    stride_qt, stride_qh, stride_b, stride_p, stride_sb, stride_ot, stride_oh, stride_lt, stride_lh, log2_scale,
    K: tl.constexpr, G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The state of one work item's tokens and one head tile, as `kernels.paged_attention_triton._attention_kernel` makes it.

    Grid: work items, head tiles. m = row_in_tile * G + head_in_tile.
    """
    item_ptr = work_ptr + tl.program_id(0) * WORK_COLUMNS
    head_tile = tl.program_id(1)
    first_row = tl.load(item_ptr)
    num_rows = tl.load(item_ptr + 1)
    first_section = tl.load(item_ptr + 2)
    num_sections = tl.load(item_ptr + 3)
    part = tl.load(item_ptr + 4)

    m_M = tl.arange(0, BLOCK_M)
    dim_C = tl.arange(0, C)
    dim_R = tl.arange(0, R)
    is_row_M = m_M // G < num_rows
    row_M = (first_row + m_M // G).to(tl.int64)
    head_M = head_tile * G + m_M % G
    q_M_ptr = q_ptr + row_M * stride_qt + head_M * stride_qh
    q_MC = tl.load(q_M_ptr[:, None] + dim_C[None, :], mask=is_row_M[:, None], other=0.0)
    q_MR = tl.load(q_M_ptr[:, None] + C + dim_R[None, :], mask=is_row_M[:, None], other=0.0)

    acc_MC = tl.zeros((BLOCK_M, C), dtype=tl.float32)
    top_M = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    unit = 1.0
    for section in range(num_sections):
        section_ptr = sections_ptr + (first_section + section) * SECTION_COLUMNS
        kv_len_M = tl.load(kv_lens_ptr + tl.load(section_ptr) + m_M // G, mask=is_row_M, other=0)
        table_ptr = tables_ptr + tl.load(section_ptr + 1)
        begin = tl.load(section_ptr + 2)
        full_end = tl.load(section_ptr + 3)
        end = tl.load(section_ptr + 4)
        acc_MC, top_M, sum_M, unit = _attend_tiles(
            acc_MC, top_M, sum_M, unit, q_MC, q_MR, kv_len_M, kv_ptr, scales_ptr, table_ptr, begin, full_end, stride_b,
            stride_p, stride_sb, log2_scale, C, R, P, BLOCK_N, False, SCALED,
        )  # fmt: skip
        acc_MC, top_M, sum_M, unit = _attend_tiles(
            acc_MC, top_M, sum_M, unit, q_MC, q_MR, kv_len_M, kv_ptr, scales_ptr, table_ptr, full_end, end, stride_b,
            stride_p, stride_sb, log2_scale, C, R, P, BLOCK_N, True, SCALED,
        )  # fmt: skip

    divisor_M = tl.where(sum_M == 0.0, 1.0, sum_M)  # an empty state: 0 / 1, and -inf + log 1
    if SCALED:
        acc_MC *= unit
    acc_MC = acc_MC / divisor_M[:, None]
    lse_M = (top_M + tl.log2(divisor_M)) * 0.6931471805599453  # ln 2
    if part < 0:
        out_MC_ptr = out_ptr + (row_M * stride_ot + head_M * stride_oh)[:, None] + dim_C[None, :]
        tl.store(out_MC_ptr, acc_MC.to(out_ptr.dtype.element_ty), mask=is_row_M[:, None])
        tl.store(lse_ptr + row_M * stride_lt + head_M * stride_lh, lse_M, mask=is_row_M)
    else:
        part_M = (part.to(tl.int64) * K + head_tile) * BLOCK_M + m_M
        tl.store(part_out_ptr + part_M[:, None] * C + dim_C[None, :], acc_MC, mask=is_row_M[:, None])
        tl.store(part_lse_ptr + part_M, lse_M, mask=is_row_M)


class LatentDecode(DecodeAttention):
    """`DecodeAttention` over latent KV: the same tables, slots and merge."""

    def __init__(self, sizes: AttentionSizes, config: DecodeConfig | None = None, processors: int | None = None) -> None:
        """`sizes`: one KV head, and a `value_dim`; else as there."""
        tiled = _in_head_tiles(sizes)
        # One H200, 64 rows of 8K: 185 us, 64 x 64 202. A row alone has a piece from every program, and takes more at a time.
        merge_shape = MergeShape(32, min(128, sizes.value_dim), 4)
        super().__init__(tiled, config or _decode_config(tiled), processors, merge_shape)

    def _launch(
        self,
        q_THD: torch.Tensor,
        kv_2BPKD: torch.Tensor,
        scales_2BKX: torch.Tensor | None,
        scoring: Scoring,
        tables: DecodeTables,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor,
    ) -> None:
        sizes, config = self.sizes, self.config
        dependent = has_dependent_launch(sizes.device)
        latent, rotated = sizes.value_dim, sizes.head_dim - sizes.value_dim
        kv_BPD = kv_2BPKD[0, :, :, 0]
        c_src, r_src = kv_BPD[..., :latent], kv_BPD[..., latent:]
        if config.use_tma:
            c_src, r_src = (
                TensorDescriptor.from_tensor(x.flatten(0, 1), [config.block_n, dim])
                for x, dim in ((c_src, latent), (r_src, rotated))
            )
        _latent_decode_kernel[(self._slots * sizes.num_kv_heads,)](
            q_THD, c_src, r_src, scales_2BKX, out_THD, lse_TH, self._pieces.out_XD, self._pieces.lse_X, tables.rows_4R1,
            tables.blocks_N, tables.rows_4R1.numel() // 4 - 1,
            *q_THD.stride()[:2], *out_THD.stride()[:2], *lse_TH.stride(), *kv_BPD.stride()[:2],
            0 if scales_2BKX is None else scales_2BKX.stride(1),
            scoring.scale * math.log2(math.e),
            K=sizes.num_kv_heads, G=sizes.group, C=latent, R=rotated, P=sizes.block_size, BLOCK_M=self._block_m,
            BLOCK_N=config.block_n, USE_TMA=config.use_tma, DEPENDENT=dependent, SCALED=scales_2BKX is not None,
            num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=dependent, maxnreg=config.max_registers,
        )  # fmt: skip


class TritonLatentAttention(PagedAttention):
    """Single rows by `LatentDecode`, spans of several by work items."""

    def __init__(self, sizes: AttentionSizes, min_blocks: int, segments: Sequence[Segment]) -> None:
        """Raises ValueError for a shape or segments that aren't supported."""
        super().__init__(sizes, min_blocks)
        _refuse_unsupported(sizes, segments)
        self._tiled = _in_head_tiles(sizes)
        single: list[list[RowReading]] = []
        spans: list[Segment] = []
        for runs in by_rows(segments):
            if runs[0].num_rows > 1:
                spans += runs
            else:
                single.append([RowReading(run.first_row, run.block_ids, run.kv_lens[0]) for run in runs])
        self._decode: list[tuple[LatentDecode, DecodeTables]] = []
        if single:
            kernel = LatentDecode(sizes)
            for at in range(0, len(single), MAX_ROWS):
                readings = [reading for row in single[at : at + MAX_ROWS] for reading in row]
                self._decode.append((kernel, kernel.upload_tables(readings)))
        self._chunk = plan_launch(_tile_shape(self._tiled), spans, self._tiled) if spans else None
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
        if scoring.soft_cap:
            raise ValueError("the kernels of latent KV know no soft cap")
        for start, end in self._empty:
            out_THD[start:end] = 0
            lse_TH[start:end] = -torch.inf
        for kernel, tables in self._decode:
            kernel.run(q_THD, kv_2BPKD, scoring, tables, out_THD=out_THD, lse_TH=lse_TH, scales_2BKX=scales_2BKX)
        if self._chunk is not None:
            self._run_chunk(self._chunk, q_THD, kv_2BPKD, scales_2BKX, scoring, out_THD, lse_TH)

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
        sizes, shape = self._tiled, launch.shape
        _latent_kernel[(launch.work_WC.shape[0], sizes.num_kv_heads)](
            q_THD, kv_2BPKD, scales_2BKX, out_THD, lse_TH, launch.part_out_XKMD, launch.part_lse_XKM,
            launch.work_WC, launch.sections_SC, launch.kv_lens, launch.tables, *q_THD.stride()[:2], *kv_2BPKD.stride()[1:3],
            0 if scales_2BKX is None else scales_2BKX.stride(1), *out_THD.stride()[:2], *lse_TH.stride(),
            scoring.scale * math.log2(math.e),
            K=sizes.num_kv_heads, G=sizes.group, C=sizes.value_dim, R=sizes.head_dim - sizes.value_dim, P=sizes.block_size,
            BLOCK_M=shape.block_m, BLOCK_N=shape.block_n, SCALED=scales_2BKX is not None,
            num_warps=shape.num_warps, num_stages=shape.num_stages,
        )  # fmt: skip
        merge_parts(launch, sizes, out_THD, lse_TH)


def scratch_bytes(num_heads: int, value_dim: int, device: torch.device) -> int:
    """Most bytes of the pieces of decode rows and of the parts of spans."""
    tiles = _head_tiles(num_heads)
    block_m = max(16, int(triton.next_power_of_2(num_heads // tiles)))
    programs = max(tiles, num_processors(device))
    return 2 * programs * block_m * (value_dim + 1) * 4 + parts_bytes(max(64, block_m), tiles, value_dim, device)


def _head_tiles(num_heads: int) -> int:
    """The fewest equal parts of the query heads that are not more than `_MOST_HEADS` each."""
    return next(tiles for tiles in range(1, num_heads + 1) if num_heads % tiles == 0 and num_heads // tiles <= _MOST_HEADS)


def _in_head_tiles(sizes: AttentionSizes) -> AttentionSizes:
    """As if each head tile had a KV head of its own: how many groups of query heads programs serve."""
    return replace(sizes, num_kv_heads=_head_tiles(sizes.num_heads))


def _refuse_unsupported(sizes: AttentionSizes, segments: Sequence[Segment]) -> None:
    latent, rotated = sizes.value_dim, sizes.head_dim - sizes.value_dim
    powers = all(16 <= dim <= 512 and not dim & (dim - 1) for dim in (latent, rotated))
    if sizes.dtype not in _DTYPES or not powers or sizes.num_kv_heads != 1:
        raise ValueError(
            "of latent KV the triton backend takes float32, float16 and bfloat16, one KV head, and a latent and a rotated part "
            f"that are powers of two from 16 to 512; got {sizes.dtype}, {sizes.num_kv_heads} KV heads, {latent} and {rotated}"
        )
    if sizes.has_token_scales:
        raise ValueError("the kernels of latent KV know no scales of tokens, which int8 has: fp8, or --kv-format plain")
    if any(segment.starts for segment in segments):
        raise ValueError("the kernels of latent KV read runs from their beginning")
    if sizes.device.type == "cpu" and isinstance(_latent_kernel, triton.JITFunction):
        raise ValueError(f"the triton backend needs a CUDA device, got {sizes.device}")


def _decode_config(sizes: AttentionSizes) -> DecodeConfig:
    """One H200, 512 + 64 numbers a token, GB/s of KV for 1 x 128K, 8 x 128K and 64 x 8K (`bench_attention.py --only latent
    --sweep`). 16 heads: tiles of 64, eight warps, one program a processor 2618, 3987 and 3014; tiles of 32, four warps, two
    programs 2417, 4069 and 2949; two stages 2220, 2867 and 2393. 128 heads, 1 x 128K, bound by products: tiles of 64, two
    stages 992, tiles of 32, four stages 872; four warps at most 590.
    """
    if sizes.dtype == torch.float32:  # IEEE products run outside the tensor cores
        return DecodeConfig(block_n=16, num_warps=8, num_stages=2, programs_per_processor=1, use_tma=False)
    return DecodeConfig(
        block_n=64,
        num_warps=8,
        num_stages=3 if sizes.group <= 16 else 2,
        programs_per_processor=1,
        use_tma=sizes.block_size % 64 == 0,
    )


def _tile_shape(sizes: AttentionSizes) -> TileShape:
    """Of spans: queries of 64 x 576 in 16 bits take 72 KB of shared memory, two tiles of 32 latents 72 more; by warp group
    products, nothing spilled (the compiler, sm_90). Not timed yet."""
    least = max(16, int(triton.next_power_of_2(sizes.group)))
    if sizes.dtype == torch.float32:
        return TileShape(least, 16, 8, 1)
    return TileShape(max(64, least), 32, 8, 2)
