"""Partial attention of many rows by the library's dense kernel (cuDNN), over tiles of rows and tokens of fixed sizes.

cuDNN builds a plan for every shape it meets (46-400 ms), so only a short list of shapes ever reaches it, all built by
`TiledAttention.warm_up`. A segment whose rows all see the same tokens, or each one more than the last, is cut like this:

    tokens  0 ................. f                                 f: seen by every row
    rows 0  | tile | tile | rest | square \\ |                     tile: one call, no mask
         n  | tile | tile | tile | rest | square \\ |              square: one call, causal; it begins with the token of the
            |  left over: fewer rows than the smallest tile |             tile's first row, wherever that lies

Rest and left over go back to the caller as segments of whole blocks, for the page kernel, and so do tiles and squares that are
not worth a call (`LEAST_PAIRS`); their states are the start that the tiles merge into:

    lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

cuDNN gives 128 rows of a head to one processor, so few rows would leave most of a GPU idle: their tokens are cut into parts of
equal length, which go to cuDNN as a batch.

Rows that see several runs of tokens have such a segment for each: the states of all of them merge alike.

Where the blocks of a tile are consecutive, the pool itself is read through a strided view; else its blocks are gathered into
a buffer of the same strides, once for all rows. So are all blocks of KV of 8 bits, as the numbers that they stand for.

Sources: partial states are Flash-Decoding's and DistAttention's, the split by visibility cascade inference's (FlashInfer).

Shape suffixes: T rows, H query heads, K KV heads, D head dim, B blocks, P block size, S tokens, N blocks of a table, X parts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from kernels.kv_blocks import gather_kv_into
from kernels.segments import AttentionSizes, Segment
from kernels.upload import upload

State = tuple[torch.Tensor, torch.Tensor]
"""`out_THD`, `lse_TH` (natural log)"""

ROW_TILES = (8192, 4096, 2048, 1024, 512, 256, 128)
TOKEN_TILES = (65536, 32768, 16384, 8192, 4096, 2048, 1024)
LEAST_PAIRS = 1 << 21
"""Of rows and tokens in a call. On an H200 128 rows reach 579 TFLOP/s with 64K tokens, 412 with 16K and 183 with 4K, the page
kernel 250 to 300 with any; and what few rows cost the GPU, more calls would cost the host."""

_FULL_HEADS = 128
"""Heads of 128 rows that keep all processors of an H100 or H200 (132) busy. 128 rows of 32 heads against 64K tokens: 174
TFLOP/s in one part, 325 in two, 579 in four, 570 in eight; 256 rows: 348, 630, 622."""
_ROWS_PER_PROCESSOR = 128
_MAX_HEAD_DIM = 128
_DTYPES = (torch.float16, torch.bfloat16)
"""cuDNN attention takes no fp32."""


def uses_tiles(num_rows: int, num_tokens: int, dtype: torch.dtype, head_dim: int) -> bool:
    """The one rule for choosing between this file and the page kernel, for rows of one segment that see up to `num_tokens`.

    On an H200, bf16, 32/8 heads x 128, TFLOP/s of 2048 or 8192 rows against 128K tokens without a mask: cuDNN 620 in one call
    and 588-601 in tiles of 16K, 64K or 128K; FlashAttention-3 548, and kernels without Hopper's own instructions 351-357.
    Below the smallest tile there is nothing to give to cuDNN.
    """
    return (
        num_rows >= ROW_TILES[-1]
        and num_tokens >= TOKEN_TILES[-1]
        and dtype in _DTYPES
        and head_dim <= _MAX_HEAD_DIM
        and head_dim % 8 == 0
    )


def is_tileable(segment: Segment) -> bool:
    """Whether all rows see the run from its beginning: the same tokens, at least one, or each row one more than the last."""
    return not segment.starts and (0 < min(segment.kv_lens) == max(segment.kv_lens) or _is_causal(segment))


@dataclass(frozen=True, slots=True)
class TileJob:
    """One call: rows `[first_row, first_row + num_rows)` of the step, tokens `[first_token, first_token + num_tokens)` of
    the blocks of all segments, one after the other. Every row sees all of them, or if `is_causal` the i-th row (from 0) the
    first i + 1."""

    first_row: int
    num_rows: int
    first_token: int
    num_tokens: int
    is_causal: bool


def split_segment(
    segment: Segment,
    block_size: int,
    row_tiles: Sequence[int] = ROW_TILES,
    token_tiles: Sequence[int] = TOKEN_TILES,
    least_pairs: int = LEAST_PAIRS,
) -> tuple[list[TileJob], list[Segment]]:
    """The jobs, those of the same tokens side by side, and what is left: segments that begin with a block.

    Tile sizes are descending, those of tokens multiples of the block size. Every pair of a row and a token it sees is in
    exactly one job or left-over segment, and every row in at most one of the latter.

    Raises:
        ValueError: for a segment that isn't tileable.
    """
    if not is_tileable(segment):
        lens = segment.kv_lens
        raise ValueError(
            f"{segment.num_rows} rows that see {min(lens)} to {max(lens)} tokens: all must see the same, or each one more than "
            "the last"
        )
    is_causal = _is_causal(segment)
    jobs: list[TileJob] = []
    left_over: list[Segment] = []
    row = 0
    for num_rows in _cut(segment.num_rows, row_tiles):
        first_row = segment.first_row + row
        full = segment.kv_lens[row] - is_causal  # the square begins with the row's own token
        token = 0
        for num_tokens in _cut(full, [tokens for tokens in token_tiles if num_rows * tokens >= least_pairs]):
            jobs.append(TileJob(first_row, num_rows, token, num_tokens, is_causal=False))
            token += num_tokens
        has_square = is_causal and num_rows * num_rows >= least_pairs
        if has_square:
            jobs.append(TileJob(first_row, num_rows, full, num_rows, is_causal=True))
        lens = (full,) * num_rows if has_square else segment.kv_lens[row : row + num_rows]
        if token < lens[-1]:
            ids = segment.block_ids[token // block_size : -(-lens[-1] // block_size)]
            left_over.append(Segment(first_row, num_rows, ids, tuple(count - token for count in lens)))
        row += num_rows
    if row < segment.num_rows:
        left_over.append(Segment(segment.first_row + row, segment.num_rows - row, segment.block_ids, segment.kv_lens[row:]))
    jobs.sort(key=lambda job: (job.first_token, job.num_tokens, job.first_row))
    return jobs, left_over


@dataclass(frozen=True, slots=True)
class _Call:
    job: TileJob
    pool_token: int | None
    """Where the tokens lie, as block * block_size + offset, if that is one run; None: they are to be gathered."""
    is_last: bool
    """Of its rows."""


@dataclass(frozen=True, slots=True)
class TilePlan:
    """What `TiledAttention.run` does for segments of the same rows, on every layer."""

    left_over: tuple[Segment, ...]
    """For the caller: their states must stand in `out` and `lse` before `run`."""
    calls: tuple[_Call, ...]
    continued: frozenset[int]
    """First rows of the tiles whose state begins with a left-over segment's."""
    block_ids_N: torch.Tensor
    min_blocks: int
    """The highest block id, plus 1."""


class TiledAttention:
    """The tile sizes, and the one buffer that gathered tokens pass through. One instance serves all layers and steps, in the
    order of one stream.

    How a step uses it:

        plan = tiles.plan([segment])                   # once per step
        attend(plan.left_over, out, lse)               # each layer: the page kernel
        tiles.run(plan, q, kv, scale, out_THD=out, lse_TH=lse)
    """

    def __init__(
        self,
        sizes: AttentionSizes,
        *,
        backend: str,
        row_tiles: Sequence[int] = ROW_TILES,
        token_tiles: Sequence[int] = TOKEN_TILES,
        least_pairs: int = LEAST_PAIRS,
    ) -> None:
        """`sizes.num_rows` is not looked at. `backend` ("torch" or "triton") is that of gathering and merging: the attention is
        cuDNN's on CUDA, and PyTorch's CPU kernel, its twin, elsewhere.

        Raises:
            ValueError: tile sizes that aren't descending, or not multiples of the block size where they count tokens; on CUDA
                a dtype or head dim that cuDNN doesn't take.
        """
        for name, tiles in (("row", row_tiles), ("token", token_tiles)):
            if not tiles or tiles[-1] < 1 or list(tiles) != sorted(set(tiles), reverse=True):
                raise ValueError(f"{name} tiles must be descending and at least 1, got {tuple(tiles)}")
        if any(tokens % sizes.block_size for tokens in token_tiles):
            raise ValueError(f"token tiles {tuple(token_tiles)} must be multiples of the block size, {sizes.block_size}")
        if sizes.device.type == "cuda" and not uses_tiles(ROW_TILES[0], TOKEN_TILES[0], sizes.dtype, sizes.head_dim):
            raise ValueError(
                f"cuDNN attention takes float16 and bfloat16 and a head dim that is a multiple of 8 up to {_MAX_HEAD_DIM}, got "
                f"{sizes.dtype}, head_dim {sizes.head_dim}"
            )
        self.sizes = sizes
        self._backend = backend
        self._row_tiles = tuple(row_tiles)
        self._token_tiles = tuple(token_tiles)
        self._least_pairs = least_pairs
        tokens = max(row_tiles[0], token_tiles[0])
        shape = (2, tokens, sizes.num_kv_heads, sizes.head_dim)
        self._gathered_2SKD = torch.empty(shape, dtype=sizes.dtype, device=sizes.device)

    def shapes(self) -> list[tuple[int, int, bool]]:
        """Rows, tokens, and whether causal: all that the library's kernel is ever called with."""
        full = [(rows, tokens, False) for rows in self._row_tiles for tokens in self._token_tiles]
        squares = [(rows, rows, True) for rows in self._row_tiles]
        return [(rows, tokens, causal) for rows, tokens, causal in full + squares if rows * tokens >= self._least_pairs]

    def scratch_bytes(self, num_rows: int) -> int:
        """Most bytes that this object and a `run` for so many rows hold beside the arguments, the library's own left out."""
        return scratch_bytes(self.sizes, num_rows, self._row_tiles[0], self._token_tiles[0])

    def warm_up(self, kv_2BPKD: torch.Tensor, scales_2BKX: torch.Tensor | None = None) -> None:
        """Build every plan and kernel that `run` may need; reads one block of `kv`, a layer of the pool, and writes nothing.

        Must be called on the thread that will call `run`: PyTorch keeps cuDNN's plans per thread, by sizes and strides.
        """
        sizes = self.sizes
        shape = (self._row_tiles[0], sizes.num_heads, sizes.head_dim)
        q_THD = torch.zeros(shape, dtype=sizes.dtype, device=sizes.device)
        out_THD, lse_TH = torch.zeros_like(q_THD), torch.zeros(shape[:2], device=sizes.device)
        ids_N = upload([0] * (self._token_tiles[0] // sizes.block_size), sizes.device, torch.int32)
        self._gathered_2SKD.zero_()
        all_2SKD = self._gathered_2SKD[:, : self._token_tiles[0]]
        gather_kv_into(all_2SKD, kv_2BPKD, ids_N, 0, scales_2BKX=scales_2BKX, backend=self._backend)
        by_parts: dict[int, tuple[int, int]] = {}
        for num_rows, num_tokens, is_causal in self.shapes():
            k_SKD, v_SKD = self._gathered_2SKD[:, :num_tokens]
            num_parts = self._num_parts(num_rows, num_tokens, is_causal)
            attend(q_THD[:num_rows], k_SKD, v_SKD, 1.0, is_causal, num_parts)
            if not is_causal:
                by_parts[num_parts] = num_rows, num_tokens
        for rows, tokens in by_parts.values():
            ids = (0,) * (3 * tokens // sizes.block_size)
            # a state may be left over, the library's or the running one; a result the running state or the last
            for num_jobs in (1, 2, 3):
                jobs = [TileJob(0, rows, i * tokens, tokens, is_causal=False) for i in range(num_jobs)]
                for left_over in ([], [Segment(0, rows, ids, (1,) * rows)]):
                    plan = self._plan(ids, jobs, left_over)
                    self.run(plan, q_THD, kv_2BPKD, 1.0, out_THD=out_THD, lse_TH=lse_TH, scales_2BKX=scales_2BKX)

    def plan(self, segments: Sequence[Segment], others: Sequence[Segment] = ()) -> TilePlan:
        """Cut segments of the same rows and upload their block tables. `others`: of these rows too, to be left over whole.

        Raises:
            ValueError: for a segment that isn't tileable, sees more tokens than its blocks hold, or names a negative block.
        """
        block_ids: tuple[int, ...] = ()
        jobs: list[TileJob] = []
        left_over = [part for segment in others for part in _split_rows(segment, self._row_tiles)]
        for segment in segments:
            capacity = len(segment.block_ids) * self.sizes.block_size
            if max(segment.kv_lens) > capacity or min(segment.block_ids, default=0) < 0:
                raise ValueError(
                    f"rows see {max(segment.kv_lens)} tokens, {len(segment.block_ids)} blocks from id "
                    f"{min(segment.block_ids, default=0)} on hold {capacity}"
                )
            before = len(block_ids) * self.sizes.block_size
            its_jobs, rest = split_segment(
                segment, self.sizes.block_size, self._row_tiles, self._token_tiles, self._least_pairs
            )
            jobs += [replace(job, first_token=before + job.first_token) for job in its_jobs]
            left_over += rest
            block_ids += segment.block_ids
        return self._plan(block_ids, jobs, left_over)

    def _plan(self, block_ids: tuple[int, ...], jobs: list[TileJob], left_over: list[Segment]) -> TilePlan:
        last = {job.first_row: job for job in jobs}
        return TilePlan(
            left_over=tuple(left_over),
            calls=tuple(_Call(job, self._pool_token(block_ids, job), job is last[job.first_row]) for job in jobs),
            continued=frozenset(segment.first_row for segment in left_over) & last.keys(),
            block_ids_N=upload(block_ids, self.sizes.device, torch.int32),
            min_blocks=max(block_ids, default=-1) + 1,
        )

    def _pool_token(self, block_ids: tuple[int, ...], job: TileJob) -> int | None:
        if self.sizes.has_scales:
            return None
        block_size = self.sizes.block_size
        first, offset = divmod(job.first_token, block_size)
        ids = block_ids[first : -(-(job.first_token + job.num_tokens) // block_size)]
        if ids[-1] - ids[0] != len(ids) - 1 or ids != tuple(range(ids[0], ids[0] + len(ids))):
            return None
        return ids[0] * block_size + offset

    def run(
        self,
        plan: TilePlan,
        q_THD: torch.Tensor,
        kv_2BPKD: torch.Tensor,
        scale: float,
        *,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor,
        scales_2BKX: torch.Tensor | None = None,
    ) -> None:
        """Complete the states of the plan's rows in `out_THD` (q's dtype) and `lse_TH` (fp32, natural log).

        Those of `plan.left_over` must have been written there; what else the tiled rows hold is overwritten, and other rows are
        left alone. Sums of several tiles are kept in fp32, rounded once at the end. Only launches, apart from copying q if it
        isn't contiguous.

        Raises:
            ValueError: shapes, dtypes or strides other than those of the sizes, or too few blocks.
        """
        if not plan.calls:
            return
        self._check(plan, q_THD, kv_2BPKD, out_THD, lse_TH)
        begin = min(call.job.first_row for call in plan.calls)
        end = max(call.job.first_row + call.job.num_rows for call in plan.calls)
        q_rows_THD = q_THD[begin:end].contiguous()  # one layout, for one plan a shape
        states: dict[int, State] = {row: (out_THD[row:], lse_TH[row:]) for row in plan.continued}
        read: TileJob | None = None
        for call in plan.calls:
            job = call.job
            if read is None or (job.first_token, job.num_tokens) != (read.first_token, read.num_tokens):
                k_SKD, v_SKD = self._read(plan, call, kv_2BPKD, scales_2BKX)
                read = job
            first, num_rows = job.first_row, job.num_rows
            num_parts = self._num_parts(num_rows, job.num_tokens, job.is_causal)
            parts = attend(q_rows_THD[first - begin :][:num_rows], k_SKD, v_SKD, scale, job.is_causal, num_parts)
            result = out_THD[first : first + num_rows], lse_TH[first : first + num_rows]
            state = states.get(first)
            if state is None and num_parts == 1:
                states[first] = parts[0][0], parts[1][0]
                if call.is_last:
                    result[0].copy_(parts[0][0])
                    result[1].copy_(parts[1][0])
                continue
            if state is not None:
                state = state[0][:num_rows], state[1][:num_rows]
            to = result if call.is_last else _running(state or result)
            merge_parts(state, parts, to, backend=self._backend)
            states[first] = to

    def _num_parts(self, num_rows: int, num_tokens: int, is_causal: bool) -> int:
        """Of a tile's tokens: as many as it takes to keep a GPU busy, but none shorter than the shortest tile."""
        heads = self.sizes.num_heads * -(-num_rows // _ROWS_PER_PROCESSOR)
        parts = 1
        while not is_causal and heads * parts < _FULL_HEADS and num_tokens % (2 * parts * self._token_tiles[-1]) == 0:
            parts *= 2
        return parts

    def _read(
        self, plan: TilePlan, call: _Call, kv_2BPKD: torch.Tensor, scales_2BKX: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`k_SKD`, `v_SKD` of a job, with the same strides whether gathered or not."""
        job = call.job
        if call.pool_token is None:
            kv_2SKD = self._gathered_2SKD[:, : job.num_tokens]
            gather_kv_into(kv_2SKD, kv_2BPKD, plan.block_ids_N, job.first_token, scales_2BKX=scales_2BKX, backend=self._backend)
        else:
            kv_2SKD = kv_2BPKD.flatten(1, 2)[:, call.pool_token : call.pool_token + job.num_tokens]
        return kv_2SKD[0], kv_2SKD[1]

    def _check(
        self, plan: TilePlan, q_THD: torch.Tensor, kv_2BPKD: torch.Tensor, out_THD: torch.Tensor, lse_TH: torch.Tensor
    ) -> None:
        sizes = self.sizes
        state = (sizes.num_heads, sizes.head_dim)
        if q_THD.shape[1:] != state or out_THD.shape != q_THD.shape or lse_TH.shape != q_THD.shape[:2]:
            raise ValueError(
                f"rows must be (T, {state[0]}, {state[1]}), got q {tuple(q_THD.shape)}, out {tuple(out_THD.shape)}, lse "
                f"{tuple(lse_TH.shape)}"
            )
        stored = sizes.kv_dtype or sizes.dtype
        dtypes = (q_THD.dtype, out_THD.dtype, kv_2BPKD.dtype, lse_TH.dtype)
        if dtypes != (sizes.dtype, sizes.dtype, stored, torch.float32):
            raise ValueError(
                f"q and out must be {sizes.dtype}, kv {stored} and lse torch.float32, got {q_THD.dtype}, {out_THD.dtype}, "
                f"{kv_2BPKD.dtype}, {lse_TH.dtype}"
            )
        block = (sizes.block_size, sizes.num_kv_heads, sizes.head_dim)
        if kv_2BPKD.shape[2:] != block or not kv_2BPKD[0].is_contiguous() or out_THD.stride(-1) != 1:
            raise ValueError(
                f"keys and values must each be contiguous (B, {block}), and out's last dimension; got kv "
                f"{tuple(kv_2BPKD.shape)} with strides {kv_2BPKD.stride()}, out with {out_THD.stride()}"
            )
        if kv_2BPKD.shape[1] < plan.min_blocks:
            raise ValueError(f"the plan names block {plan.min_blocks - 1}, kv holds {kv_2BPKD.shape[1]} blocks")
        last_row = max(call.job.first_row + call.job.num_rows for call in plan.calls)
        if q_THD.shape[0] < last_row:
            raise ValueError(f"the plan covers rows up to {last_row}, q has {q_THD.shape[0]}")


def scratch_bytes(sizes: AttentionSizes, num_rows: int, row_tile: int = ROW_TILES[0], token_tile: int = TOKEN_TILES[0]) -> int:
    """See `TiledAttention.scratch_bytes`, for the largest tiles of rows and tokens.

    The buffer; a copy of q; the running state in fp32; and of one tile, two states as the library returns them. Few rows have
    one of each part, less than twice as many as keep the device busy.
    """
    states, itemsize = num_rows * sizes.num_heads, sizes.dtype.itemsize
    buffer = 2 * max(row_tile, token_tile) * sizes.num_kv_heads * sizes.head_dim * itemsize
    tile = max(min(num_rows, row_tile) * sizes.num_heads, 2 * _FULL_HEADS * _ROWS_PER_PROCESSOR if num_rows else 0)
    running = states * (sizes.head_dim * (itemsize + 4) + 4)
    return buffer + running + 2 * tile * (sizes.head_dim * itemsize + 4)


def attend(
    q_THD: torch.Tensor, k_SKD: torch.Tensor, v_SKD: torch.Tensor, scale: float, is_causal: bool, num_parts: int = 1
) -> State:
    """The partial states `[X, T, H, D]` and `[X, T, H]` of rows over each of X equal parts of the S tokens, side by side.

    Rows see all tokens of a part; or, if causal, which takes S = T and one part, row i the first i + 1. cuDNN on CUDA: `out` in
    q's dtype and of contiguous rows; heads stay grouped. PyTorch's CPU kernel elsewhere.
    """
    num_rows, num_heads, _ = q_THD.shape
    q = q_THD.transpose(0, 1).expand(num_parts, -1, -1, -1)
    k, v = (tensor.view(num_parts, -1, *tensor.shape[1:]).transpose(1, 2) for tensor in (k_SKD, v_SKD))
    if q.device.type == "cuda":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, is_causal=is_causal, scale=scale)
    else:
        group = num_heads // k_SKD.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    return out.transpose(1, 2), lse.reshape(num_parts, num_heads, num_rows).transpose(1, 2)


def merge_parts(state: State | None, parts: State, result: State, *, backend: str) -> None:
    """Write the union of a state, if there is one, and of X >= 1 parts `[X, T, H, D]`, `[X, T, H]`, all over disjoint tokens.

    `result` may be the state; all is computed in fp32. Each `out` has a dtype of its own, its last dimension contiguous.
    Backend "torch" or "triton".

    Raises:
        ValueError: for an unknown backend, or shapes that differ.
    """
    for other in (parts[0][0], parts[1][0]), state or result:
        if other[0].shape != result[0].shape or not other[1].shape == result[1].shape == result[0].shape[:2]:
            raise ValueError(f"states of {tuple(other[0].shape)}, {tuple(other[1].shape)} into {tuple(result[0].shape)}")
    match backend:
        case "torch":
            _merge_parts_torch(state, parts, result)
        case "triton":
            from kernels import triton_ops

            triton_ops.merge_parts(state, parts, result)
        case _:
            raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def _merge_parts_torch(state: State | None, parts: State, result: State) -> None:
    states = [(parts[0][x], parts[1][x]) for x in range(parts[0].shape[0])] + ([] if state is None else [state])
    lse_TH = torch.stack([lse for _, lse in states]).logsumexp(0)
    shift_TH1 = lse_TH.masked_fill(lse_TH == -torch.inf, 0.0).unsqueeze(-1)  # exp(-inf - -inf) is NaN
    out_THD = sum((out.float() * (lse.unsqueeze(-1) - shift_TH1).exp() for out, lse in states), torch.zeros(()))
    result[0].copy_(out_THD)
    result[1].copy_(lse_TH)


def _running(state: State) -> State:
    """Where the union of a state and a tile's goes: into the running state once there is one."""
    if state[0].dtype == torch.float32:
        return state
    return torch.empty_like(state[0], dtype=torch.float32, memory_format=torch.contiguous_format), torch.empty_like(state[1])


def _split_rows(segment: Segment, row_tiles: Sequence[int]) -> Iterator[Segment]:
    """As `split_segment` cuts rows: the tiles, and the rows that are left."""
    tiles = list(_cut(segment.num_rows, row_tiles))
    row = 0
    for num_rows in (*tiles, segment.num_rows - sum(tiles)):
        if num_rows:
            yield segment.part(row, row + num_rows)
        row += num_rows


def _is_causal(segment: Segment) -> bool:
    lens = segment.kv_lens
    return len(lens) > 1 and lens[0] > 0 and lens == tuple(range(lens[0], lens[0] + len(lens)))


def _cut(total: int, tiles: Sequence[int]) -> Iterator[int]:
    """Tiles that fit into `total` one after the other, the largest first."""
    for tile in tiles:
        while total >= tile:
            yield tile
            total -= tile
