"""Rows whose tokens several programs of a decode kernel have: their pieces, and how these become one.

    lse = log sum_x exp(lse_x)        out = sum_x exp(lse_x - lse) out_x

Who has which pieces follows from the tables (`kernels.decode_attention.DecodeTables`). Sinks may ride along:
out = out sigmoid(lse - sink), once a row is whole (`kernels.merge_state.apply_sinks`).

Shape suffixes: T rows of q, H query heads, K KV heads, G = H / K, D dims of out, R rows of the tables; X pieces, in kernels
those that are merged at a time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.launch import has_dependent_launch, let_next_start, wait_for_previous
from kernels.segments import AttentionSizes

_FEW_SLOTS = 64
"""In which a row may lie: where there are more, twice as many pieces are merged at a time, and the kernel starts early."""
_FEW_ROWS = 2
"""That lie in so many slots each, and have so few programs, that these take many pieces at a time."""
_MOST_MERGED, _MOST_OF_FEW = 64, 8
"""Rows that are merged at once, and likewise where most are missing: a program takes every so-manyth. One that finds nothing to
do isn't free: on an H200 8,192 of them, for the 256 rows that another may send here, took 10.5 us of each layer."""


@dataclass(frozen=True, slots=True)
class MergeShape:
    """How pieces are merged: so many at a time, so many of their dims in a program."""

    block_x: int
    block_d: int
    num_warps: int


def _shape_for_few(slots: int, out_dim: int) -> MergeShape:
    """Of rows that may lie in so many slots each: all pieces at a time, if they are no more than 128.

    One H200, a step of one row of Qwen3-30B-A3B's with 8K tokens, which lies in 99: 2.537 ms, 64 at a time 2.583.
    """
    block_x = 64 if slots <= _FEW_SLOTS else 128
    return MergeShape(block_x, min(8192 // block_x, out_dim), 4)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])  # type: ignore[untyped-decorator]
def _merge_kernel(  # type: ignore[no-untyped-def]
    out_ptr, lse_ptr, piece_out_ptr, piece_lse_ptr, sinks_ptr, rows_ptr, num_rows, num_slots,
    stride_ot, stride_oh, stride_lt, stride_lh,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
    WITH_SINKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """lse = log sum_x exp(lse_x), out = sum_x exp(lse_x - lse) out_x over the pieces x of some rows and one head. WITH_SINKS:
    out = out sigmoid(lse - sink), of whole rows, too.

    Grid: rows of the tables, or fewer, of which each takes every so-manyth; query heads; parts of BLOCK_D of the dims of out.
    Missing rows come last.
    """
    index = tl.program_id(0)
    head = tl.program_id(1)
    size = num_rows + 1
    dim_D = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    # the tables were there before any of the step's kernels
    tile_count = tl.load(rows_ptr + 3 * size + num_rows).to(tl.int64)
    slots = tl.minimum(num_slots, tile_count)
    row = tl.load(rows_ptr + index).to(tl.int64)
    before = tl.load(rows_ptr + 3 * size + index)
    after = tl.load(rows_ptr + 3 * size + index + 1)
    if WITH_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
    let_next_start(DEPENDENT)
    wait_for_previous(DEPENDENT)
    while row >= 0:
        out_D_ptr = out_ptr + row * stride_ot + head * stride_oh + dim_D
        lse_at_ptr = lse_ptr + row * stride_lt + head * stride_lh
        if before == after:
            tl.store(out_D_ptr, tl.zeros((BLOCK_D,), dtype=out_ptr.dtype.element_ty))
            tl.store(lse_at_ptr, -float("inf"))
        else:
            # the slot s with s * tile_count // slots <= t < (s + 1) * tile_count // slots has tile t
            first = ((before + 1) * slots - 1) // tile_count
            last = (after * slots - 1) // tile_count
            if first < last:
                m = head % G
                top = -float("inf")
                total = 0.0
                acc_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
                for at in range(first, last + 1, BLOCK_X):
                    slot_X = at + tl.arange(0, BLOCK_X)
                    is_X = slot_X <= last
                    # the first slot begins this row: its second piece; each other passes through or ends it: its first
                    piece_X = (2 * (slot_X * K + head // G) + (slot_X == first).to(tl.int64)) * BLOCK_M + m
                    lse_X = tl.load(piece_lse_ptr + piece_X, mask=is_X, other=-float("inf"))
                    out_XD = tl.load(piece_out_ptr + piece_X[:, None] * D + dim_D[None, :], mask=is_X[:, None], other=0.0)
                    new = tl.maximum(top, tl.max(lse_X, 0))
                    weight_X = tl.exp(lse_X - new)
                    decay = tl.exp(top - new)
                    total = total * decay + tl.sum(weight_X, 0)
                    acc_D = acc_D * decay + tl.sum(out_XD * weight_X[:, None], 0)
                    top = new
                out_D = acc_D / total
                lse = top + tl.log(total)
                if WITH_SINKS:
                    out_D *= tl.sigmoid(lse - sink)
                tl.store(out_D_ptr, out_D.to(out_ptr.dtype.element_ty))
                tl.store(lse_at_ptr, lse)
            elif WITH_SINKS:
                out_D = tl.load(out_D_ptr).to(tl.float32) * tl.sigmoid(tl.load(lse_at_ptr) - sink)
                tl.store(out_D_ptr, out_D.to(out_ptr.dtype.element_ty))
        index += tl.num_programs(0)
        is_row = index < num_rows
        row = tl.load(rows_ptr + index, mask=is_row, other=-1).to(tl.int64)
        before = tl.load(rows_ptr + 3 * size + index, mask=is_row, other=0)
        after = tl.load(rows_ptr + 3 * size + index + 1, mask=is_row, other=0)


class PieceMerge:
    """Scratch for the pieces of rows, and the kernel that merges them."""

    def __init__(self, sizes: AttentionSizes, slots: int, block_m: int, shape: MergeShape | None = None) -> None:
        """A slot's program for each KV head has two pieces, of `block_m` query heads. `shape`: where there are many rows."""
        self._sizes, self._slots, self._block_m = sizes, slots, block_m
        self._for_few, self._for_many = _shape_for_few(slots, sizes.out_dim), shape or MergeShape(16, sizes.out_dim, 1)
        self.starts_early = slots > _FEW_SLOTS
        """Whether the decode kernel of 16 bits lets this one start before the pieces are there: to have begun takes it as
        long as to merge them, where they may be many. One H200, steps of one row: Qwen3-30B-A3B 2.380 and 2.319 ms at 1K, 2.657
        and 2.643 at 8K. The 8B shape, with few slots, gains nothing: 3.869 and 3.867 at 1K, 7.651 and 7.681 at 128K."""
        pieces = 2 * slots * sizes.num_kv_heads * block_m
        self.out_XD = torch.empty((pieces, sizes.out_dim), dtype=torch.float32, device=sizes.device)
        self.lse_X = torch.empty(pieces, dtype=torch.float32, device=sizes.device)

    def run(
        self,
        rows_4R1: torch.Tensor,
        *,
        mostly_empty: bool,
        sinks_H: torch.Tensor | None,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor,
    ) -> None:
        """Make the rows of the tables whole whose pieces lie here, and of those without tokens `0, -inf`. With sinks, all."""
        sizes = self._sizes
        num_rows = rows_4R1.numel() // 4 - 1
        dependent = has_dependent_launch(sizes.device)
        shape = self._for_few if num_rows <= _FEW_ROWS else self._for_many
        at_once = min(num_rows, _MOST_OF_FEW if mostly_empty else _MOST_MERGED)
        _merge_kernel[(at_once, sizes.num_heads, sizes.out_dim // shape.block_d)](
            out_THD, lse_TH, self.out_XD, self.lse_X, sinks_H, rows_4R1, num_rows, self._slots,
            *out_THD.stride()[:2], *lse_TH.stride(),
            K=sizes.num_kv_heads, G=sizes.group, D=sizes.out_dim, BLOCK_M=self._block_m, BLOCK_X=shape.block_x,
            BLOCK_D=shape.block_d, WITH_SINKS=sinks_H is not None, DEPENDENT=dependent,
            num_warps=shape.num_warps, launch_pdl=dependent,
        )  # fmt: skip
