"""The torch backend of `kernels.paged_attention`: the twin of the Triton kernels, and what instances on CPU run.

A segment's tokens are cut into pieces that PyTorch's fused CPU kernel takes without copies, and merged by log-sum-exp, as
are those of all segments with the same rows:

    tokens  0 ........................ common ............. max(kv_lens)
            | prefix: every row sees it | remainder: masked |
            | a view per long run of    | one causal square, |
            | blocks, the rest gathered | or a float mask    |

    lse = log(exp(lse_a) + exp(lse_b))        out = out_a + (out_b - out_a) * sigmoid(lse_b - lse_a)

Rows that don't see a run from its beginning (a window) have a third part, before the others, with a mask of its own; if it
reaches the remainder there is no prefix, and one mask:

    tokens  min(starts) ... max(starts) .......... common ...... max(kv_lens)
            | begins: masked | every row sees it | remainder |

Shape suffixes: T rows, H query heads, K KV heads, G = H / K, D head dim, B blocks, P block size, S tokens of KV.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from kernels.kv_blocks import dequantised
from kernels.reference import attention_state
from kernels.segments import AttentionSizes, PagedAttention, Scoring, Segment, by_rows, uncovered_ranges

_State = tuple[torch.Tensor, torch.Tensor]
"""`out_THD`, `lse_TH`"""

_VIEW_BYTES = 1 << 20
"""Runs of consecutive blocks with at least so many bytes of K and V are attended as views, shorter ones gathered together.
Four times as many above `_FOLD_ROWS` rows, where the kernel loses more on short KV.

One core, fp32, 2048 tokens, views against gathered: 1 row, 9/3 heads x 64, runs of 0.4 MB 0.99 / 0.66 ms, 0.8 MB
0.72 / 0.69, 1.5 MB 0.57 / 1.01; 1 row, 32/8 x 128, 0.5 MB 6.1 / 4.3, 1 MB 4.2 / 4.4, 2 MB 3.4 / 4.6; 64 rows, 1 MB 43 / 39,
4 MB 38 / 39; 512 rows, 2 MB 290 / 247.
"""

_GATHER_BYTES = 64 << 20
"""Most that is gathered at once: a long shard in scattered blocks, or of 8 bits, must not be copied whole."""

_FOLD_ROWS = 16
"""Up to so many unmasked rows, the heads of a group become rows of one head, so that a tile of K is used by all of them.

One core, fp32, 9/3 heads x 64, 2048 tokens, folded against not: 1 row 0.37 / 0.43 ms, 4 rows 0.39 / 0.60, 16 rows
1.24 / 1.35, 32 rows 2.35 / 2.34.
"""

_MASK_ROWS = 256
"""Rows of irregular kv_lens are attended so many at a time: bounds the mask, and lets each tile have a longer prefix."""

_SCORE_BYTES = 16 << 20
"""Of scores, where they are soft-capped, at a time: the fused kernel knows no cap."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens `[skip, skip + num_tokens)` of some blocks: consecutive ones from `first_block` on, or those of `gather_N`."""

    first_block: int
    gather_N: torch.Tensor | None
    skip: int
    num_tokens: int
    is_causal: bool = False
    kv_lens_T: torch.Tensor | None = None
    """Visible tokens of the piece per row; None: all."""
    starts_T: torch.Tensor | None = None
    """The first of them that is visible; None: 0."""
    mask_TS: torch.Tensor | None = None
    """Both as the fused kernel takes them: 0 or -inf in q's dtype."""

    def read(
        self, kv_2BPKD: torch.Tensor, scales_2BKX: torch.Tensor | None, sizes: AttentionSizes
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`k_K1SD`, `v_K1SD`: views where the blocks are consecutive, unless KV has scales: then q's dtype.

        One `as_strided` each: slicing, flattening and transposing cost 12 us more per piece and layer.
        """
        blocks, first, value_dim = kv_2BPKD, self.first_block, sizes.value_dim
        if scales_2BKX is not None:
            ids = self.gather_N
            used = slice(first, first + _cdiv(self.skip + self.num_tokens, sizes.block_size))
            stored, scales = (x[:, used] if ids is None else x.index_select(1, ids) for x in (kv_2BPKD, scales_2BKX))
            blocks, first = dequantised(stored, scales, sizes.dtype), 0
        elif self.gather_N is not None:
            blocks, first = kv_2BPKD.index_select(1, self.gather_N), 0
        stride_2, stride_b, stride_p, stride_k, _ = blocks.stride()
        size = (blocks.shape[3], 1, self.num_tokens, blocks.shape[4])
        stride = (stride_k, 0, stride_p, 1)
        offset = blocks.storage_offset() + first * stride_b + self.skip * stride_p
        keys = blocks.as_strided(size, stride, offset)
        if value_dim:
            return keys, blocks.as_strided((*size[:3], value_dim), stride, offset)
        return keys, blocks.as_strided(size, stride, offset + stride_2)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows `[first_row, last_row)` and the pieces of KV they see."""

    first_row: int
    last_row: int
    pieces: tuple[_Piece, ...]


def scratch_bytes(num_rows: int, num_heads: int, head_dim: int) -> int:
    """Most bytes beside the arguments: one gathering, and for all rows a query, two states and their merge in fp32.

    Where scores are soft-capped, four times `_SCORE_BYTES` and a piece's keys and values in fp32 come to that.
    """
    return _GATHER_BYTES + num_rows * num_heads * (6 * head_dim + 4) * 4


class TorchPagedAttention(PagedAttention):
    """On CPU the fused kernel, on other devices the plain twin `attention_state`."""

    def __init__(self, sizes: AttentionSizes, min_blocks: int, segments: Sequence[Segment]) -> None:
        super().__init__(sizes, min_blocks)
        self._tiles = [tile for runs in by_rows(segments) for tile in _tiles(runs, sizes)]
        self._empty = uncovered_ranges(segments, sizes.num_rows)
        self._attend = _attend_fused if sizes.device.type == "cpu" else _attend_plain

    def _run(
        self,
        q_THD: torch.Tensor,
        kv_2BPKD: torch.Tensor,
        scales_2BKX: torch.Tensor | None,
        scoring: Scoring,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor,
    ) -> None:
        attend = _attend_capped if scoring.soft_cap else self._attend
        if kv_2BPKD.stride(1) != kv_2BPKD.stride(2) * self.sizes.block_size:
            raise ValueError(f"consecutive blocks must be one run of tokens, kv has strides {kv_2BPKD.stride()}")
        for start, end in self._empty:
            out_THD[start:end] = 0
            lse_TH[start:end] = -torch.inf
        for tile in self._tiles:
            rows = slice(tile.first_row, tile.last_row)
            if not tile.pieces:
                out_THD[rows] = 0
                lse_TH[rows] = -torch.inf
                continue
            q_rows = q_THD[rows]
            parts = (attend(q_rows, *piece.read(kv_2BPKD, scales_2BKX, self.sizes), scoring, piece) for piece in tile.pieces)
            out_THD[rows], lse_TH[rows] = reduce(_merge, parts)


def _attend_fused(q_THD: torch.Tensor, k_K1SD: torch.Tensor, v_K1SD: torch.Tensor, scoring: Scoring, piece: _Piece) -> _State:
    """Partial state by PyTorch's CPU flash attention, which takes grouped heads as strides: no copy of K, V or large q."""
    num_rows, num_heads, head_dim = q_THD.shape
    num_kv_heads, value_dim = k_K1SD.shape[0], v_K1SD.shape[3]
    group = num_heads // num_kv_heads
    if value_dim < head_dim:  # the beginning of the keys, and the kernel takes no values narrower than these
        v_K1SD = k_K1SD
    q_TKGD = q_THD.view(num_rows, num_kv_heads, group, head_dim)
    folded = num_rows <= _FOLD_ROWS and piece.kv_lens_T is None and piece.starts_T is None
    if folded:
        q_batch = q_TKGD.transpose(0, 1).reshape(num_kv_heads, 1, num_rows * group, head_dim)
    else:
        q_batch = q_TKGD.permute(1, 2, 0, 3)
        k_K1SD, v_K1SD = k_K1SD.expand(-1, group, -1, -1), v_K1SD.expand(-1, group, -1, -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_batch, k_K1SD, v_K1SD, 0.0, piece.is_causal, attn_mask=piece.mask_TS, scale=scoring.scale
    )
    if folded:
        out_TKGD = out.view(num_kv_heads, num_rows, group, head_dim).transpose(0, 1)
        lse_TKG = lse.view(num_kv_heads, num_rows, group).transpose(0, 1)
    else:
        out_TKGD, lse_TKG = out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)
    lse_TH = lse_TKG.reshape(num_rows, num_heads)
    if piece.mask_TS is not None and piece.kv_lens_T is not None:
        # the kernel says lse = 0 for a row whose mask hides everything
        starts = 0 if piece.starts_T is None else piece.starts_T
        lse_TH = lse_TH.masked_fill((piece.kv_lens_T <= starts)[:, None], -torch.inf)
    return out_TKGD.reshape(num_rows, num_heads, head_dim)[..., :value_dim], lse_TH


def _attend_plain(q_THD: torch.Tensor, k_K1SD: torch.Tensor, v_K1SD: torch.Tensor, scoring: Scoring, piece: _Piece) -> _State:
    k_SKD, v_SKD = k_K1SD.squeeze(1).transpose(0, 1), v_K1SD.squeeze(1).transpose(0, 1)
    return attention_state(
        q_THD, k_SKD, v_SKD, scoring.scale, piece.kv_lens_T, starts_T=piece.starts_T, soft_cap=scoring.soft_cap
    )


def _attend_capped(q_THD: torch.Tensor, k_K1SD: torch.Tensor, v_K1SD: torch.Tensor, scoring: Scoring, piece: _Piece) -> _State:
    """As `_attend_plain`, of few rows at a time."""
    row_bytes = q_THD.shape[1] * piece.num_tokens * max(4, q_THD.dtype.itemsize)
    step = max(1, _SCORE_BYTES // row_bytes)
    states = []
    for start in range(0, q_THD.shape[0], step):
        rows = slice(start, start + step)
        lens_T, starts_T = (None if n is None else n[rows] for n in (piece.kv_lens_T, piece.starts_T))
        part = replace(piece, kv_lens_T=lens_T, starts_T=starts_T, mask_TS=None)
        states.append(_attend_plain(q_THD[rows], k_K1SD, v_K1SD, scoring, part))
    if len(states) == 1:
        return states[0]
    return torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states])


def _merge(a: _State, b: _State) -> _State:
    """The union of two states, `out` in the dtype of `lse` (at least fp32): rounded to q's dtype once, at the end."""
    (out_a_THD, lse_a_TH), (out_b_THD, lse_b_TH) = a, b
    weight_TH1 = (lse_b_TH - lse_a_TH).sigmoid().nan_to_num(0.0).unsqueeze(-1)  # both empty: -inf - -inf
    out_THD = torch.lerp(out_a_THD.to(lse_a_TH.dtype), out_b_THD.to(lse_a_TH.dtype), weight_TH1)
    return out_THD, torch.logaddexp(lse_a_TH, lse_b_TH)


def _tiles(runs: Sequence[Segment], sizes: AttentionSizes) -> Iterator[_Tile]:
    """The rows of these segments, which are the same, in one tile if of each run all see the same or each sees one more, else
    in tiles of `_MASK_ROWS`."""
    first, num_rows = runs[0].first_row, runs[0].num_rows
    regular = all(not run.starts and (min(run.kv_lens) == max(run.kv_lens) or _rises_by_one(run.kv_lens)) for run in runs)
    step = num_rows if regular else _MASK_ROWS
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        pieces = (piece for run in runs for piece in _pieces(run if regular else run.part(start, stop), sizes))
        yield _Tile(first + start, first + stop, tuple(pieces))


def _pieces(run: Segment, sizes: AttentionSizes) -> Iterator[_Piece]:
    """What the rows of a tile see of a run: tokens whose beginning needs a mask, those that all see, then the remainder that
    needs a mask."""
    lens, starts = run.kv_lens, run.starts
    low, high = min(lens), max(lens)
    # the first token that a row sees, and the one from which on all do
    first, begin = (min(starts), max(starts)) if starts else (0, 0)
    if first >= high:
        return
    is_causal = low < high and _rises_by_one(lens)
    common = low - 1 if is_causal else low  # the causal square starts with the last token that row 0 sees
    if begin >= common and first < begin:
        yield _masked(run, first, high, sizes)
        return
    if first < begin:
        yield _masked(run, first, begin, sizes)
    yield from _prefix(run.block_ids, begin, common, len(lens), sizes)
    if low < high:
        yield _masked(run, max(begin, common), high, sizes, is_causal=is_causal and begin <= common)


def _masked(run: Segment, begin: int, end: int, sizes: AttentionSizes, *, is_causal: bool = False) -> _Piece:
    """Tokens `[begin, end)`, of which each row sees what it may. `is_causal`: row i (from 0) sees the first i + 1."""
    kv_lens_T = (torch.tensor(run.kv_lens, device=sizes.device) - begin).clamp(0, end - begin)
    starts_T = mask_TS = None
    if any(start > begin for start in run.starts):
        starts_T = (torch.tensor(run.starts, device=sizes.device) - begin).clamp(0, end - begin)
    if not is_causal:
        token_S = torch.arange(end - begin, device=sizes.device)
        hidden_TS = token_S >= kv_lens_T[:, None]
        if starts_T is not None:
            hidden_TS |= token_S < starts_T[:, None]
        mask_TS = torch.zeros(hidden_TS.shape, dtype=sizes.dtype, device=sizes.device)
        mask_TS.masked_fill_(hidden_TS, -torch.inf)
    first = begin // sizes.block_size
    ids = run.block_ids[first : _cdiv(end, sizes.block_size)]
    consecutive = ids == tuple(range(ids[0], ids[0] + len(ids)))
    return _Piece(
        first_block=ids[0],
        gather_N=None if consecutive else torch.tensor(ids, device=sizes.device),
        skip=begin - first * sizes.block_size,
        num_tokens=end - begin,
        is_causal=is_causal,
        kv_lens_T=kv_lens_T,
        starts_T=starts_T,
        mask_TS=mask_TS,
    )


def _prefix(block_ids: tuple[int, ...], begin: int, end: int, num_rows: int, sizes: AttentionSizes) -> Iterator[_Piece]:
    """Tokens `[begin, end)`. Without a mask their order is free: long runs as they are, then the rest gathered."""
    if begin >= end:
        return
    block_size = sizes.block_size
    # what is of 8 bits is there twice while it is read, in int8 in fp32 as well
    itemsize = sizes.dtype.itemsize + sizes.has_scales + 4 * (sizes.has_token_scales and sizes.dtype != torch.float32)
    block_bytes = sizes.parts * block_size * sizes.num_kv_heads * sizes.head_dim * itemsize
    view_bytes = _VIEW_BYTES if num_rows <= _FOLD_ROWS else 4 * _VIEW_BYTES
    used = block_ids[begin // block_size : _cdiv(end, block_size)]
    before = begin % block_size  # tokens that the first block has and that aren't wanted
    beyond = len(used) * block_size - before - (end - begin)  # and those of the last
    starts = [0, *(i for i in range(1, len(used)) if used[i] != used[i - 1] + 1)]
    scattered: list[int] = []
    skipped = missing = 0  # the same of `scattered`, in which the first and the last keep their places
    for start, stop in zip(starts, [*starts[1:], len(used)], strict=True):
        skip = before if start == 0 else 0
        left_out = beyond if stop == len(used) else 0
        if not sizes.has_scales and (len(starts) == 1 or (stop - start) * block_bytes >= view_bytes):
            yield _Piece(used[start], None, skip, (stop - start) * block_size - skip - left_out)
        else:
            scattered += used[start:stop]
            skipped += skip
            missing = left_out
    step = max(1, _GATHER_BYTES // block_bytes)
    for start in range(0, len(scattered), step):
        ids = scattered[start : start + step]
        skip = skipped if start == 0 else 0
        left_out = missing if start + step >= len(scattered) else 0
        ids_N = torch.tensor(ids, device=sizes.device)
        yield _Piece(ids[0], ids_N, skip, len(ids) * block_size - skip - left_out)


def _rises_by_one(lens: tuple[int, ...]) -> bool:
    """Whether the rows see n, n + 1, n + 2, ... tokens, n > 0: a causal chunk."""
    return lens[0] > 0 and lens == tuple(range(lens[0], lens[0] + len(lens)))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
