"""How programs of decode kernels walk `kernels.decode_attention.DecodeTables`, and where their states go. Device functions."""

import triton
import triton.language as tl


@triton.jit
def _row_of(ends_ptr, num_rows, tile):  # type: ignore[no-untyped-def]
    """The row that a tile belongs to: the first whose end lies beyond it, by bisection."""
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        is_before = tl.load(ends_ptr + middle) <= tile
        low = tl.where(is_before, middle + 1, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def part_of_row(rows_ptr, num_rows, tile, last):  # type: ignore[no-untyped-def]
    """Of the row that a slot's next tile belongs to, as the tables say: row of q, kv_len, begin in `blocks`, and how many tiles
    it has. And the slot's part of these: the first, and how many up to the slot's last."""
    size = num_rows + 1
    index = _row_of(rows_ptr + 3 * size + 1, num_rows, tile)
    tiles_before = tl.load(rows_ptr + 3 * size + index)
    tiles = tl.load(rows_ptr + 3 * size + index + 1) - tiles_before
    first_tile = (tile - tiles_before).to(tl.int32)
    num_tiles = tl.minimum((last - tile).to(tl.int32), tiles - first_tile)
    row = tl.load(rows_ptr + index).to(tl.int64)
    kv_len = tl.load(rows_ptr + size + index)
    begin = tl.load(rows_ptr + 2 * size + index)
    return row, kv_len, begin, tiles, first_tile, num_tiles


@triton.jit  # type: ignore[untyped-decorator]
def part_of_run(  # type: ignore[no-untyped-def]
    table_ptr, blocks_ptr, run, skipped, left, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr
):  # fmt: skip
    """Of one of the runs that a row sees: its tokens, its table, and the slot's part of its tiles: the first, and how many.

    `skipped`, of this run's tiles and those behind it, are others'; `left` are still the slot's.
    """
    run_len = tl.load(table_ptr + 2 * run)
    run_ptr = blocks_ptr + tl.load(table_ptr + 2 * run + 1)
    run_tiles = (run_len + BLOCK_N - 1) // BLOCK_N
    if WINDOWED:
        run_tiles -= tl.load(run_ptr - 1) // BLOCK_N
    first = tl.minimum(skipped, run_tiles)
    taken = tl.minimum(left, run_tiles - first)
    return run_len, run_ptr, first, taken


@triton.jit  # type: ignore[untyped-decorator]
def store_state(  # type: ignore[no-untyped-def]
    result_MD, lse_M, row, head, is_whole, is_first, out_ptr, lse_ptr, piece_out_ptr, piece_lse_ptr, stride_ot, stride_oh,
    stride_lt, stride_lh, program, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The state of a row and a KV head goes to its place if it is whole, else to one of the program's two pieces, whether it is
    the row's first."""
    m_M = tl.arange(0, BLOCK_M)
    dim_D = tl.arange(0, D)
    head_M = head * G + m_M
    if is_whole:
        out_ptr_MD = out_ptr + (row * stride_ot + head_M * stride_oh)[:, None] + dim_D[None, :]
        tl.store(out_ptr_MD, result_MD.to(out_ptr.dtype.element_ty), mask=(m_M < G)[:, None])
        tl.store(lse_ptr + row * stride_lt + head_M * stride_lh, lse_M, mask=m_M < G)
    else:
        piece_M = (2 * program + is_first.to(tl.int32)) * BLOCK_M + m_M
        tl.store(piece_out_ptr + piece_M[:, None] * D + dim_D[None, :], result_MD, mask=(m_M < G)[:, None])
        tl.store(piece_lse_ptr + piece_M, lse_M, mask=m_M < G)
