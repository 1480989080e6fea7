"""Partial attention of single rows (decode) over paged KV, in tables that never move: a CUDA graph can hold it.

A row attends to the first `kv_len` tokens of each of its runs, which have block tables of their own; where layers have windows,
to those from `start` on. Work is counted in tiles
of BLOCK_N tokens of one run, numbered row by row; each slot takes as many that follow each other, and has a program for each KV
head:

    tiles | row 0 ........................ | row 1 ... | row 2 ............. | ...
    slots |   0    |   1    |   2    |   3    |   4    |   5    |   6    | ...

The programs of a slot read the same blocks at the same time, so that memory is read in whole pages. A row that lies in one
slot is written at once. The pieces of one that lies in several go to scratch (a slot has at most two: of a row that it ends or
passes through, and of one that it begins), and a second kernel merges them. Who has which tiles follows from their counts
alone, so the host only adds up `kv_len`s, and what is launched depends on nothing but the contents of the tables.

    s_j = scale * q . k_j        lse = log sum_j exp(s_j)        out = sum_j exp(s_j - lse) v_j

Sources: Flash-Decoding (the split), Stream-K (Osama et al. 2023, equal runs), FlashAttention-2 (online softmax).

Shape suffixes: R rows of the tables, T rows of q, H query heads, K KV heads, G = H / K, D head dim, B blocks, P block size; in
kernels M query heads of one KV head (padded), N tokens of a tile, X pieces.
"""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.decode_merge import MergeShape, PieceMerge
from kernels.decode_slots import part_of_row, part_of_run, store_state
from kernels.launch import has_dependent_launch, let_next_start, num_processors, wait_for_previous
from kernels.segments import AttentionSizes, Scoring
from kernels.upload import upload

MAX_ROWS = 2048


@dataclass(frozen=True, slots=True)
class RowReading:
    """Row `row` of q sees tokens `[start, kv_len)` of the run in `block_ids`. Readings of one row follow each other."""

    row: int
    block_ids: Sequence[int]
    kv_len: int
    start: int = 0


Written = dict[int, tuple[int, Sequence[int]]]
"""first block of what stands in a table of blocks -> where it begins, and all of it."""

_LEAST_SHARED = 4
"""Blocks that are worth a piece of their own, which takes two entries of the table."""


def _pieces(run: RowReading, block_size: int, written: Written) -> Iterator[tuple[RowReading, int | None]]:
    """A whole run, cut where it begins to differ from what is written; and where each piece stands already, if it does."""
    block_ids, kv_len = run.block_ids, run.kv_len
    while block_ids and (found := written.get(block_ids[0])) is not None:
        place, there = found
        common = _num_common(block_ids, there)
        if common < min(_LEAST_SHARED, len(block_ids)):
            break
        tokens = min(kv_len, common * block_size)
        yield RowReading(run.row, block_ids[:common], tokens), place
        block_ids, kv_len = block_ids[common:], kv_len - tokens
        if not kv_len:
            return
    yield RowReading(run.row, block_ids, kv_len), None


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading elements that are the same: a few comparisons of whole slices."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    same, differ = 0, most
    while differ - same > 1:
        middle = (same + differ) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            differ = middle
    return same


@dataclass(frozen=True, slots=True)
class DecodeTables:
    """The tables of one set of rows, int32; on the host when built, and wherever they were copied to."""

    rows_4R1: torch.Tensor
    """Four tables of R + 1 each: row of q (-1: none), kv_len, begin in `blocks`, tiles of the rows before.

    A row that sees n > 1 runs has -n for kv_len, and in `blocks` begins with kv_len and begin of each of them. If `windowed`,
    the entry before the first block of each run is its start, less than a block.
    """
    blocks_N: torch.Tensor
    windowed: bool = False
    """Whether runs have starts."""
    mostly_empty: bool = False
    """Whether there is room for many more rows than there usually are."""


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the kernel is launched."""

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_processor: int
    use_tma: bool

    def programs(self, processors: int) -> int:
        """That fill so many processors."""
        return self.programs_per_processor * processors

    @property
    def max_registers(self) -> int:
        """Of a thread, so that all programs of a processor fit: 65,536 in a processor, at most 255 in a thread.

        Left to itself the compiler took 189 for tables of many rows, and a third program no longer fitted: on an H200 64 rows
        of 8K ran at 3474 GB/s, where few long rows ran at 4420. 168 cost it 8 bytes of stack.
        """
        return min(255, 65536 // (self.programs_per_processor * 32 * self.num_warps) // 8 * 8)


@triton.jit
def soft_capped(score_MN, log2_cap):  # type: ignore[no-untyped-def]
    """c tanh(s / c), of scores and a cap that are both times log2(e)."""
    return log2_cap * (2.0 * tl.sigmoid(2.0 * score_MN / log2_cap) - 1.0)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_tile(  # type: ignore[no-untyped-def]
    acc_MD, top_M, sum_M, q_MD, token, kv_start, kv_len, block, head, k_src, v_src, table_ptr, stride_b, stride_p, stride_k,
    log2_scale, log2_cap, D: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One step of online softmax, base 2, over tokens [token, token + BLOCK_N), those from kv_len on masked, and if WINDOWED
    those before kv_start; at least one is seen.

    s = q k^T scale log2(e)    new = max(top, max_n s)    p = 2^(s - new)
    sum = sum 2^(top - new) + sum_n p                     acc = acc 2^(top - new) + p v
    """
    offset_N = tl.arange(0, BLOCK_N)
    is_seen_N = token + offset_N < kv_len
    if WINDOWED:
        is_seen_N &= token + offset_N >= kv_start
    if USE_TMA:
        k_ND = k_src.load([block * P + token % P, head * D])
        v_ND = v_src.load([block * P + token % P, head * D])
    else:
        if P % BLOCK_N == 0:  # the tile lies in one block
            at_N = block.to(tl.int64) * stride_b + (token % P + offset_N) * stride_p
        else:
            token_N = token + offset_N
            block_N = tl.load(table_ptr + token_N // P, mask=is_seen_N, other=0).to(tl.int64)
            at_N = block_N * stride_b + (token_N % P) * stride_p
        at_ND = (at_N + head.to(tl.int64) * stride_k)[:, None] + tl.arange(0, D)[None, :]
        if MASKED:
            k_ND = tl.load(k_src + at_ND, mask=is_seen_N[:, None], other=0.0)
            v_ND = tl.load(v_src + at_ND, mask=is_seen_N[:, None], other=0.0)
        else:
            k_ND = tl.load(k_src + at_ND)
            v_ND = tl.load(v_src + at_ND)
    score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * log2_scale
    if CAPPED:
        score_MN = soft_capped(score_MN, log2_cap)
    if MASKED:
        score_MN = tl.where(is_seen_N[None, :], score_MN, -float("inf"))
        v_ND = tl.where(is_seen_N[:, None], v_ND, 0.0)  # memory that nobody wrote may hold NaN, and 0 * NaN is NaN
    new_M = tl.maximum(top_M, tl.max(score_MN, 1))
    p_MN = tl.exp2(score_MN - new_M[:, None])
    decay_M = tl.exp2(top_M - new_M)
    sum_M = sum_M * decay_M + tl.sum(p_MN, 1)
    acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * decay_M[:, None], input_precision="ieee")
    return acc_MD, new_M, sum_M


@triton.jit  # type: ignore[untyped-decorator]
def _attend_run(  # type: ignore[no-untyped-def]
    acc_MD, top_M, sum_M, q_MD, first_tile, num_tiles, kv_len, head, k_src, v_src, table_ptr, stride_b, stride_p, stride_k,
    log2_scale, log2_cap, D: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """`_attend_tile` over some tiles of one run, of which the last may be cut off by `kv_len`, and the first by its start."""
    begin = first_tile * BLOCK_N
    kv_start = 0
    if WINDOWED:  # its first tile is the one with the start
        kv_start = tl.load(table_ptr - 1)
        begin += kv_start // BLOCK_N * BLOCK_N
    end = begin + num_tiles * BLOCK_N
    if WINDOWED:  # noqa: SIM102  # the outer is decided when it is compiled
        if begin < tl.minimum(kv_start, end):
            block = tl.load(table_ptr + begin // P)
            acc_MD, top_M, sum_M = _attend_tile(
                acc_MD, top_M, sum_M, q_MD, begin, kv_start, kv_len, block, head, k_src, v_src, table_ptr, stride_b, stride_p,
                stride_k, log2_scale, log2_cap, D, P, BLOCK_N, USE_TMA, True, WINDOWED, CAPPED,
            )  # fmt: skip
            begin += BLOCK_N
    full_end = tl.maximum(begin, tl.minimum(end, kv_len // BLOCK_N * BLOCK_N))
    for token in tl.range(begin, full_end, BLOCK_N):
        block = tl.load(table_ptr + token // P)
        acc_MD, top_M, sum_M = _attend_tile(
            acc_MD, top_M, sum_M, q_MD, token, kv_start, kv_len, block, head, k_src, v_src, table_ptr, stride_b, stride_p,
            stride_k, log2_scale, log2_cap, D, P, BLOCK_N, USE_TMA, False, WINDOWED, CAPPED,
        )  # fmt: skip
    if full_end < end:
        block = tl.load(table_ptr + full_end // P)
        acc_MD, top_M, sum_M = _attend_tile(
            acc_MD, top_M, sum_M, q_MD, full_end, kv_start, kv_len, block, head, k_src, v_src, table_ptr, stride_b, stride_p,
            stride_k, log2_scale, log2_cap, D, P, BLOCK_N, USE_TMA, True, WINDOWED, CAPPED,
        )  # fmt: skip
    return acc_MD, top_M, sum_M


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_src, v_src, out_ptr, lse_ptr, piece_out_ptr, piece_lse_ptr, rows_ptr, blocks_ptr, num_rows,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_lt, stride_lh, stride_b, stride_p, stride_k, log2_scale,
    log2_cap, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr, DEPENDENT: tl.constexpr, MERGE_EARLY: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """lse = log sum_j exp(s_j), out = sum_j exp(s_j - lse) v_j, s_j = scale q . k_j, over this slot's tiles and one KV head."""
    program = tl.program_id(0)
    head = program % K
    slot = program // K
    tile_count = tl.load(rows_ptr + 3 * (num_rows + 1) + num_rows).to(tl.int64)
    slots = tl.minimum(tl.num_programs(0) // K, tile_count)
    if slot >= slots:  # it ends, by which the next may start, too
        wait_for_previous(DEPENDENT)
        return
    tile = slot * tile_count // slots
    last = (slot + 1) * tile_count // slots
    m_M = tl.arange(0, BLOCK_M)
    dim_D = tl.arange(0, D)
    # the tables were there before any of the step's kernels
    row, kv_len, begin, tiles, first_tile, num_tiles = part_of_row(rows_ptr, num_rows, tile, last)
    wait_for_previous(DEPENDENT)
    if MERGE_EARLY:
        let_next_start(DEPENDENT)
    while tile < last:
        table_ptr = blocks_ptr + begin
        head_M = head * G + m_M
        q_ptr_MD = q_ptr + (row * stride_qt + head_M * stride_qh)[:, None] + dim_D[None, :]
        q_MD = tl.load(q_ptr_MD, mask=(m_M < G)[:, None], other=0.0)

        acc_MD = tl.zeros((BLOCK_M, D), dtype=tl.float32)
        top_M = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
        sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
        if kv_len >= 0:
            acc_MD, top_M, sum_M = _attend_run(
                acc_MD, top_M, sum_M, q_MD, first_tile, num_tiles, kv_len, head, k_src, v_src, table_ptr, stride_b, stride_p,
                stride_k, log2_scale, log2_cap, D, P, BLOCK_N, USE_TMA, WINDOWED, CAPPED,
            )  # fmt: skip
        else:
            skipped = first_tile  # of the run's tiles and those after it: not this slot's
            left = num_tiles
            for run in range(-kv_len):
                run_len, run_ptr, first, taken = part_of_run(table_ptr, blocks_ptr, run, skipped, left, BLOCK_N, WINDOWED)
                skipped -= first
                left -= taken
                acc_MD, top_M, sum_M = _attend_run(
                    acc_MD, top_M, sum_M, q_MD, first, taken, run_len, head, k_src, v_src,
                    run_ptr, stride_b, stride_p, stride_k, log2_scale, log2_cap, D, P,
                    BLOCK_N, USE_TMA, WINDOWED, CAPPED,
                )  # fmt: skip

        result_MD = acc_MD / sum_M[:, None]
        lse_M = (top_M + tl.log2(sum_M)) * 0.6931471805599453  # ln 2
        store_state(
            result_MD, lse_M, row, head, num_tiles == tiles, first_tile == 0, out_ptr, lse_ptr, piece_out_ptr, piece_lse_ptr,
            stride_ot, stride_oh, stride_lt, stride_lh, program, G, D, BLOCK_M,
        )  # fmt: skip
        tile += num_tiles
        if tile < last:
            row, kv_len, begin, tiles, first_tile, num_tiles = part_of_row(rows_ptr, num_rows, tile, last)


class DecodeAttention:
    """The kernels and their scratch; any number of tables, layers and CUDA graphs may use one, in the order of one stream."""

    def __init__(
        self,
        sizes: AttentionSizes,
        config: DecodeConfig | None = None,
        processors: int | None = None,
        merge_shape: MergeShape | None = None,
    ) -> None:
        """`sizes.num_rows` is not looked at, and the caller has refused unsupported sizes. `processors`: those that it will run
        on, if not all of the device's. `merge_shape`: of pieces where there are many rows.

        Raises ValueError for tiles that TMA can't load: they must lie in one block.
        """
        self.sizes = sizes
        processors = processors or num_processors(sizes.device)
        self.config = config or _default_config(sizes, processors)
        if self.config.use_tma and sizes.block_size % self.config.block_n:
            raise ValueError(f"tiles of {self.config.block_n} tokens cross blocks of {sizes.block_size}: TMA can't load them")
        self._block_m = max(16, triton.next_power_of_2(sizes.group))
        self._slots = max(1, self.config.programs(processors) // sizes.num_kv_heads)
        self._pieces = PieceMerge(sizes, self._slots, self._block_m, merge_shape)

    def tables(
        self,
        readings: Sequence[RowReading],
        num_rows: int,
        *,
        first_block: int = 0,
        windowed: bool = False,
        written: "Written | None" = None,
    ) -> "tuple[array[int], array[int]]":
        """The contents of `DecodeTables` with room for `num_rows` rows, those that are missing reading nothing.

        `first_block`: where in `blocks_N` the second part will stand. `written`: what stands there before it, to which this is
        added: then rows that begin with the same blocks read them at the same place, so there are no more entries than blocks,
        and `2 * pieces` for each row. Not for `windowed` tables.

        Raises ValueError for readings of more rows than that or than `MAX_ROWS`, and for one that has a start in tables that
        aren't `windowed`.
        """
        rows, kv_lens, begins, tiles, blocks = array("i"), array("i"), array("i"), array("i", [0]), array("i")
        ahead, is_plain, block_n = int(windowed), not windowed and written is None, self.config.block_n
        for row, group in groupby(readings, key=attrgetter("row")):
            runs = list(group)
            if is_plain and len(runs) == 1 and not runs[0].start:  # as most rows are
                (run,) = runs
                rows.append(row)
                begins.append(first_block + len(blocks))
                kv_lens.append(run.kv_len)
                tiles.append(tiles[-1] + -(-run.kv_len // block_n))
                blocks.extend(run.block_ids)
                continue
            if windowed:
                runs = [self._trimmed(run) for run in runs]
            elif any(run.start for run in runs):
                raise ValueError(f"row {row} sees runs from tokens {[run.start for run in runs]} on, in tables of whole runs")
            places: list[int | None] = [None] * len(runs)
            if written is not None:
                pieces = [piece for run in runs for piece in _pieces(run, self.sizes.block_size, written)]
                runs, places = [run for run, _ in pieces], [place for _, place in pieces]
            rows.append(row)
            begin = first_block + len(blocks) + ahead
            if len(runs) == 1:
                kv_lens.append(runs[0].kv_len)
                begins.append(begin if places[0] is None else places[0])
                tiles.append(tiles[-1] + self._num_tiles(runs[0]))
            else:
                begins.append(begin - ahead)
                kv_lens.append(-len(runs))
                tiles.append(tiles[-1] + sum(self._num_tiles(run) for run in runs))
                begin += 2 * len(runs)
                for run, place in zip(runs, places, strict=True):
                    blocks.extend((run.kv_len, begin if place is None else place))
                    begin += 0 if place is not None else len(run.block_ids) + ahead
            for run, place in zip(runs, places, strict=True):
                if place is None:
                    if written is not None and run.block_ids:
                        written.setdefault(run.block_ids[0], (first_block + len(blocks), run.block_ids))
                    blocks.extend((run.start,) * ahead)
                    blocks.extend(run.block_ids)
        if not len(rows) <= num_rows <= MAX_ROWS:
            raise ValueError(f"{len(rows)} rows in tables of {num_rows}; at most {MAX_ROWS} are supported")
        missing = num_rows - len(rows)
        rows.extend([-1] * (missing + 1))
        kv_lens.extend([0] * (missing + 1))
        begins.extend([0] * (missing + 1))
        tiles.extend([tiles[-1]] * missing)
        return rows + kv_lens + begins + tiles, blocks

    def _trimmed(self, reading: RowReading) -> RowReading:
        """The same without the blocks before those of which the row sees something."""
        if not reading.start:
            return reading
        if reading.start >= reading.kv_len:
            return RowReading(reading.row, (), 0)
        hidden, start = divmod(reading.start, self.sizes.block_size)
        return RowReading(reading.row, reading.block_ids[hidden:], reading.kv_len - hidden * self.sizes.block_size, start)

    def _num_tiles(self, run: RowReading) -> int:
        return -(-run.kv_len // self.config.block_n) - run.start // self.config.block_n

    def upload_tables(self, readings: Sequence[RowReading]) -> DecodeTables:
        """Tables of just these readings, on the device."""
        windowed = any(reading.start for reading in readings)
        rows, blocks = self.tables(readings, len({reading.row for reading in readings}), windowed=windowed)
        table = upload(rows + blocks, self.sizes.device, torch.int32)
        return DecodeTables(table[: len(rows)], table[len(rows) :], windowed)

    def run(
        self,
        q_THD: torch.Tensor,
        kv_2BPKD: torch.Tensor,
        scoring: Scoring,
        tables: DecodeTables,
        *,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor,
        scales_2BKX: torch.Tensor | None = None,
        sinks_H: torch.Tensor | None = None,
    ) -> None:
        """Fill the rows of `out` and `lse` that the tables name; a row with no token gets `0, -inf`. Only launches.

        `scales_2BKX`: of KV of 8 bits. `sinks_H`: of rows that no others have a part of, as in
        `kernels.merge_state.apply_sinks`. Nothing is checked: the tables' contents may change between launches of a graph.
        """
        self._launch(q_THD, kv_2BPKD, scales_2BKX, scoring, tables, out_THD, lse_TH)
        self._pieces.run(tables.rows_4R1, mostly_empty=tables.mostly_empty, sinks_H=sinks_H, out_THD=out_THD, lse_TH=lse_TH)

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
        """The slots: rows that lie in one, and the pieces of the others. Scales are for who takes KV of 8 bits."""
        sizes, config = self.sizes, self.config
        num_rows = tables.rows_4R1.numel() // 4 - 1
        dependent = has_dependent_launch(sizes.device)
        if config.use_tma:
            shape = [config.block_n, sizes.head_dim]
            k_src, v_src = (TensorDescriptor.from_tensor(kv_BPKD.flatten(0, 1).flatten(1), shape) for kv_BPKD in kv_2BPKD)
        else:
            k_src, v_src = kv_2BPKD
        _decode_kernel[(self._slots * sizes.num_kv_heads,)](
            q_THD, k_src, v_src, out_THD, lse_TH, self._pieces.out_XD, self._pieces.lse_X, tables.rows_4R1, tables.blocks_N,
            num_rows, *q_THD.stride()[:2], *out_THD.stride()[:2], *lse_TH.stride(), *kv_2BPKD.stride()[1:4],
            scoring.scale * math.log2(math.e), scoring.soft_cap * math.log2(math.e),
            K=sizes.num_kv_heads, G=sizes.group, D=sizes.head_dim, P=sizes.block_size,
            BLOCK_M=self._block_m, BLOCK_N=config.block_n,
            USE_TMA=config.use_tma, DEPENDENT=dependent, MERGE_EARLY=self._pieces.starts_early, WINDOWED=tables.windowed,
            CAPPED=scoring.soft_cap > 0,
            num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=dependent, maxnreg=config.max_registers,
        )  # fmt: skip


def scratch_bytes(num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device, most: DecodeConfig) -> int:
    """Bytes that a `DecodeAttention` holds. `most`: that it is launched with."""
    block_m = max(16, int(triton.next_power_of_2(num_heads // num_kv_heads)))
    programs = max(num_kv_heads, most.programs(num_processors(device)))
    return 2 * programs * block_m * (head_dim + 1) * 4


def _default_config(sizes: AttentionSizes, processors: int) -> DecodeConfig:
    """On one H200, head dim 128, pages of 64, GB/s of KV for 8 x 128K and 64 x 8K with 32/8 heads: three programs a
    processor, two stages 4355 and 4261; two, three stages 4091 and 3964; one, six stages 4107 and 4035. TMA beside plain
    loads: 4362 and 4341, 4287 and 4240 (two warps).

    Few processors need more loads under way each: on 32 of them that reads 1238 GB/s, six programs of one warp 1865.
    """
    if sizes.dtype == torch.float32:  # IEEE products run outside the tensor cores
        return DecodeConfig(block_n=32, num_warps=4, num_stages=2, programs_per_processor=2, use_tma=False)
    is_part = 2 * processors <= num_processors(sizes.device) and sizes.head_dim <= 128
    return DecodeConfig(
        block_n=64,
        num_warps=1 if is_part else 4,
        num_stages=2,
        programs_per_processor=6 if is_part else 3 if sizes.head_dim <= 128 else 1,  # by shared memory
        use_tma=sizes.block_size % 64 == 0,
    )


MOST_PROGRAMS = DecodeConfig(block_n=64, num_warps=4, num_stages=2, programs_per_processor=3, use_tma=False)
