"""Rows that instances share: each goes from its home to all others, and what they make of it comes back, one-sided.

    spread     home   residual +=    norm    push its rows to all others    all its rows, and theirs as they come
    sum        home   wait for the others' parts     x0 + x1 + ..    residual +=    norm
               other  push a part of each row to its home
    collect    home   wait for the others' parts     one beside the other
               other  push likewise

There is one program for each of the R rows of all, or several; two tables on the device say of a step which rank each row is at
home with, and which own row it is there, so one graph serves all distributions of rows. Words tell of which call they are
(`kernels.mailbox`). Of padding, whose home is -1, nothing travels and nothing is counted, so capturing a graph counts nothing.

One buffer for each of the three is enough, as between any two calls of the same kind a row goes there and back:

    spread            a home pushes a row again once it has all others' parts of the last, made of what they have read by then
    sum, or collect   another pushes its part of a row once it has the row of this spread, which the home pushed behind all
                      that it has waited for before

That holds for each row by itself, and so for an instance that has no rows, and for a row whose home is another from now on: its
words lie in other places. What is needed is that a sum or collect follows each spread, of the same rows. No push stands behind
a wait of the same call: all programs of a spread or a sum fit on a device at once; those of a collect don't, so pushing is a
kernel of its own there.

All parts are added in the order of ranks, in fp32: wherever a row is at home, it gets the same bits.

Source: NCCL's LL protocol (data and flag in one store); dispatch and combine of expert parallelism, with all as the experts.

Shape suffixes: R rows of all, T own rows, E elements of a row, N ranks, V elements of all parts, P of this rank's.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.launch import has_dependent_launch, let_next_start, wait_for_previous
from kernels.layer_ops import Norm
from kernels.mailbox import KINDS, Mailbox, added_and_normed, arrived, halves, push, whole, words_at

PIECE = 1024
"""Words of a row that a program of `collect_parts` has."""


@dataclass(frozen=True, slots=True)
class Homes:
    """Where the rows of a step are at home: int32 tables on the device, of which the second is this rank's alone."""

    ranks_R: torch.Tensor
    """-1: a row is padding."""
    own_R: torch.Tensor
    """Which own row each is; of those that aren't at home here, which padding row stands for it: all of them take turns."""


@triton.jit(do_not_specialize=["turns"])  # type: ignore[untyped-decorator]
def _spread_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, first_ptr, weight_ptr, all_ptr, ranks_ptr, own_ptr, inbox_ptr, away_ptr, calls_ptr, abort_ptr,
    aborted_ptr, stride_x, stride_r, most_rows, turns, first_eps, eps,
    E: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr, N: tl.constexpr, PART: tl.constexpr, KIND: tl.constexpr,
    PAIR: tl.constexpr, WITH_NORM: tl.constexpr, WITH_FIRST: tl.constexpr, FIRST_FROM_ONE: tl.constexpr, FROM_ONE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """all[row] = x[own row] at home, elsewhere what comes from there; 0 of padding. With a norm, residual[own row] += x, or its
    first norm, and the norm of that is what goes to all. One program for a row.
    """
    WORDS: tl.constexpr = E // 2 if PAIR else E
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, TILE)
    is_word = word < WORDS
    home = tl.load(ranks_ptr + row)
    own = tl.load(own_ptr + row).to(tl.int64)
    weight = words_at(weight_ptr, word, is_word) if WITH_NORM else word
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    call = tl.load(calls_ptr + row) + 1
    bits = tl.zeros((TILE,), dtype=tl.int32)
    if home == PART:
        bits = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + own * stride_x + word, mask=is_word, other=0)
        if WITH_NORM:
            residual_row_ptr = residual_ptr.to(tl.pointer_type(tl.int32)) + own * stride_r
            before = words_at(residual_row_ptr, word, is_word)
            first = words_at(first_ptr, word, is_word) if WITH_FIRST else word
            x_low, x_high = halves(bits, KIND, PAIR)
            x_low, x_high = added_and_normed(
                x_low, x_high, before, first, weight, residual_row_ptr, word, is_word, first_eps, eps, E, WITH_FIRST,
                FIRST_FROM_ONE, FROM_ONE, KIND, PAIR,
            )  # fmt: skip
            bits = whole(x_low, x_high, PAIR)
        for peer in tl.static_range(N):
            if peer != PART:
                away = tl.multiple_of(tl.load(away_ptr + peer), 2)  # two words in a store
                push(bits, call, inbox_ptr + away + row * ROOM, word, is_word)
    elif home >= 0:
        from_ptr = inbox_ptr + (home * most_rows + row) * ROOM
        bits = arrived(from_ptr, call, word, is_word, abort_ptr, aborted_ptr, turns)
    tl.store(all_ptr.to(tl.pointer_type(tl.int32)) + row * WORDS + word, bits, mask=is_word)
    tl.debug_barrier()  # all threads have read how many calls there were
    if home >= 0:
        tl.store(calls_ptr + row, call)


@triton.jit(do_not_specialize=["turns"])  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    part_ptr, residual_ptr, first_ptr, weight_ptr, out_ptr, ranks_ptr, own_ptr, inbox_ptr, away_ptr, calls_ptr, abort_ptr,
    aborted_ptr, stride_p, stride_r, most_rows, turns, first_eps, eps,
    E: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr, N: tl.constexpr, PART: tl.constexpr, KIND: tl.constexpr,
    PAIR: tl.constexpr, HAS_OWN: tl.constexpr, WITH_NORM: tl.constexpr, WITH_FIRST: tl.constexpr, FIRST_FROM_ONE: tl.constexpr,
    FROM_ONE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[own row] = the sum of all parts of a row; with a norm, residual[own row] += that, or its first norm, and out is the
    norm of the residual. 0 in place of rows that aren't at home here. One program for a row.
    """
    WORDS: tl.constexpr = E // 2 if PAIR else E
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, TILE)
    is_word = word < WORDS
    home = tl.load(ranks_ptr + row)
    own = tl.load(own_ptr + row).to(tl.int64)
    first = words_at(first_ptr, word, is_word) if WITH_FIRST else word
    weight = words_at(weight_ptr, word, is_word) if WITH_NORM else word
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    call = tl.load(calls_ptr + row) + 1
    mine = tl.load(part_ptr.to(tl.pointer_type(tl.int32)) + row * stride_p + word, mask=is_word, other=0)
    out = tl.zeros((TILE,), dtype=tl.int32)
    if home == PART:
        residual_row_ptr = residual_ptr.to(tl.pointer_type(tl.int32)) + own * stride_r
        before = words_at(residual_row_ptr, word, is_word) if WITH_NORM else word
        sum_low = tl.zeros((TILE,), dtype=tl.float32)
        sum_high = tl.zeros((TILE,), dtype=tl.float32)
        for peer in tl.static_range(N):
            if peer == PART:
                bits = mine
            else:
                from_ptr = inbox_ptr + (peer * most_rows + row) * ROOM
                bits = arrived(from_ptr, call, word, is_word, abort_ptr, aborted_ptr, turns)
            low, high = halves(bits, KIND, PAIR)
            sum_low += low.to(tl.float32)
            sum_high += high.to(tl.float32)
        x_low, x_high = sum_low.to(KIND), sum_high.to(KIND)
        if WITH_NORM:
            x_low, x_high = added_and_normed(
                x_low, x_high, before, first, weight, residual_row_ptr, word, is_word, first_eps, eps, E, WITH_FIRST,
                FIRST_FROM_ONE, FROM_ONE, KIND, PAIR,
            )  # fmt: skip
        out = whole(x_low, x_high, PAIR)
    elif home >= 0:
        away = tl.multiple_of(tl.load(away_ptr + home), 2)
        push(mine, call, inbox_ptr + away + row * ROOM, word, is_word)
    if HAS_OWN:
        tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + own * WORDS + word, out, mask=is_word)
    tl.debug_barrier()
    if home >= 0:
        tl.store(calls_ptr + row, call)


@triton.jit  # type: ignore[untyped-decorator]
def _own_part(part_ptr, word, width, PAIR: tl.constexpr):  # type: ignore[no-untyped-def]
    """The elements of words, by themselves: a part may have an odd number of them, and begin anywhere."""
    if PAIR:
        low = tl.load(part_ptr + 2 * word, mask=2 * word < width, other=0.0)
        high = tl.load(part_ptr + 2 * word + 1, mask=2 * word + 1 < width, other=0.0)
    else:
        low = tl.load(part_ptr + word, mask=word < width, other=0.0)
        high = tl.zeros_like(low)
    return low, high


@triton.jit(do_not_specialize=["num_pieces"])  # type: ignore[untyped-decorator]
def _push_part_kernel(  # type: ignore[no-untyped-def]
    part_ptr, ranks_ptr, inbox_ptr, away_ptr, calls_ptr, stride_p, num_pieces,
    WIDTH: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr, PART: tl.constexpr, PAIR: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Push a piece of a row's part to its home, if that is another. Nothing is counted: `_collect_kernel` does."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    word = piece * TILE + tl.arange(0, TILE)
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    home = tl.load(ranks_ptr + row)
    if (home >= 0) & (home != PART):
        call = tl.load(calls_ptr + row * num_pieces + piece) + 1
        low, high = _own_part(part_ptr + row * stride_p, word, WIDTH, PAIR)
        away = tl.multiple_of(tl.load(away_ptr + home), 2)
        WORDS: tl.constexpr = (WIDTH + 1) // 2 if PAIR else WIDTH
        push(whole(low, high, PAIR), call, inbox_ptr + away + row * ROOM, word, word < WORDS)


@triton.jit(do_not_specialize=["num_pieces", "turns"])  # type: ignore[untyped-decorator]
def _collect_kernel(  # type: ignore[no-untyped-def]
    part_ptr, out_ptr, starts_ptr, ranks_ptr, own_ptr, inbox_ptr, calls_ptr, abort_ptr, aborted_ptr, stride_p, stride_o,
    num_pieces, most_rows, turns,
    TILE: tl.constexpr, ROOM: tl.constexpr, N: tl.constexpr, PART: tl.constexpr, KIND: tl.constexpr, PAIR: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[own row] = all parts of a row that is at home here, one beside the other. One program for a piece of each of them."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    word = piece * TILE + tl.arange(0, TILE)
    home = tl.load(ranks_ptr + row)
    own = tl.load(own_ptr + row).to(tl.int64)
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    call = tl.load(calls_ptr + row * num_pieces + piece) + 1
    if home == PART:
        for peer in tl.static_range(N):
            start = tl.load(starts_ptr + peer)
            width = tl.load(starts_ptr + peer + 1) - start
            if peer == PART:
                low, high = _own_part(part_ptr + row * stride_p, word, width, PAIR)
            else:
                is_word = 2 * word < width if PAIR else word < width
                from_ptr = inbox_ptr + (peer * most_rows + row) * ROOM
                low, high = halves(arrived(from_ptr, call, word, is_word, abort_ptr, aborted_ptr, turns), KIND, PAIR)
            to_ptr = out_ptr + own * stride_o + start
            if PAIR:
                tl.store(to_ptr + 2 * word, low, mask=2 * word < width)
                tl.store(to_ptr + 2 * word + 1, high, mask=2 * word + 1 < width)
            else:
                tl.store(to_ptr + word, low, mask=word < width)
    tl.debug_barrier()
    if home >= 0:
        tl.store(calls_ptr + row * num_pieces + piece, call)


def spread_rows(x_TE: torch.Tensor, homes: Homes, mailbox: Mailbox) -> torch.Tensor:
    """The rows of all `[R, E]`, new; 0 of padding. `x`: T = R rows, of which the last pad, or none. All call it at once."""
    all_RE = x_TE.new_empty((homes.ranks_R.numel(), x_TE.shape[1]))
    _launch(_spread_kernel, x_TE, all_RE, homes, mailbox)
    return all_RE


def spread_add_rms_norm(
    x_TE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm, homes: Homes, mailbox: Mailbox, *, first: Norm | None = None
) -> torch.Tensor:
    """Likewise `kernels.layer_ops.add_rms_norm` of the rows; the residuals of those that pad stay as they are."""
    all_RE = x_TE.new_empty((homes.ranks_R.numel(), x_TE.shape[1]))
    _launch(_spread_kernel, x_TE, all_RE, homes, mailbox, residual_TE=residual_TE, norm=norm, first=first)
    return all_RE


def sum_parts(part_RE: torch.Tensor, num_own: int, homes: Homes, mailbox: Mailbox) -> torch.Tensor:
    """The sums `[T, E]` of all parts of the own rows, rounded once, new; 0 in rows that pad. `num_own`: T, which is R, or 0.

    All call it at once, once they have `spread_rows`.
    """
    out_TE = part_RE.new_empty((num_own, part_RE.shape[1]))
    _launch(_sum_kernel, part_RE, out_TE, homes, mailbox, HAS_OWN=num_own > 0)
    return out_TE


def sum_parts_add_rms_norm(
    part_RE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm, homes: Homes, mailbox: Mailbox, *, first: Norm | None = None
) -> torch.Tensor:
    """`kernels.layer_ops.add_rms_norm` of these sums; 0 in rows that pad, whose residual stays as it is. As `sum_parts`."""
    out_TE, has_own = torch.empty_like(residual_TE), len(residual_TE) > 0
    _launch(_sum_kernel, part_RE, out_TE, homes, mailbox, residual_TE=residual_TE, norm=norm, first=first, HAS_OWN=has_own)
    return out_TE


def collect_parts(
    part_RP: torch.Tensor, num_own: int, starts: torch.Tensor, width: int, homes: Homes, mailbox: Mailbox
) -> torch.Tensor:
    """All parts `[T, V]` of the own rows, one beside the other, new; in rows that pad lies anything.

    `starts`: int32 `[N + 1]`, where in V = `width` each rank's part begins, and the last ends. The mailbox counts for each row
    and each `PIECE` of its room. As `sum_parts`. All of these raise ValueError for rows that the mailbox has no room for.
    """
    num_rows = homes.ranks_R.numel()
    _refuse_unfit(part_RP, num_rows, mailbox)
    out_TV = part_RP.new_empty((num_own, width))
    ranks, _, most_rows, room = mailbox.inbox_NBTW.shape
    pair = part_RP.element_size() == 2
    pieces = num_pieces(room)
    dependent = has_dependent_launch(part_RP.device)
    _push_part_kernel[(num_rows, pieces)](
        part_RP, homes.ranks_R, mailbox.inbox_NBTW, mailbox.away_N, mailbox.calls_T, part_RP.stride(0), pieces,
        WIDTH=part_RP.shape[1], TILE=PIECE, ROOM=room, PART=mailbox.part, PAIR=pair, DEPENDENT=dependent, num_warps=4,
        launch_pdl=dependent,
    )  # fmt: skip
    _collect_kernel[(num_rows, pieces)](
        part_RP, out_TV, starts, homes.ranks_R, homes.own_R, mailbox.inbox_NBTW, mailbox.calls_T, mailbox.abort_1,
        mailbox.aborted_1, part_RP.stride(0), out_TV.stride(0), pieces, most_rows, mailbox.turns, TILE=PIECE, ROOM=room,
        N=ranks, PART=mailbox.part, KIND=KINDS.get(part_RP.dtype, tl.float32), PAIR=pair, DEPENDENT=dependent, num_warps=4,
        launch_pdl=dependent,
    )  # fmt: skip
    return out_TV


def _refuse_unfit(x: torch.Tensor, num_rows: int, mailbox: Mailbox) -> None:
    """Raises ValueError for rows that others have no room for: they would be written into what lies behind."""
    _, _, most_rows, room = mailbox.inbox_NBTW.shape
    words = -(-x.shape[1] * x.element_size() // 4)
    if num_rows > most_rows or words > room or mailbox.calls_T.numel() < num_rows or (len(x) and x.stride(1) != 1):
        raise ValueError(
            f"{num_rows} rows of {words} words, in mailboxes for {most_rows} of {room} that count {mailbox.calls_T.numel()}"
        )


def num_pieces(room: int) -> int:
    """Of a row with room for so many words."""
    pieces: int = triton.cdiv(room, PIECE)
    return pieces


def _launch(
    kernel: Any,
    x_TE: torch.Tensor,
    out_TE: torch.Tensor,
    homes: Homes,
    mailbox: Mailbox,
    *,
    residual_TE: torch.Tensor | None = None,
    norm: Norm | None = None,
    first: Norm | None = None,
    **constants: bool,
) -> None:
    """One of the two that rows have a program each in."""
    _refuse_unfit(x_TE, homes.ranks_R.numel(), mailbox)
    ranks, _, most_rows, room = mailbox.inbox_NBTW.shape
    residual = x_TE if residual_TE is None else residual_TE
    weights = [x_TE if its is None else its.weight_E for its in (first, norm)]
    width, size = x_TE.shape[1], x_TE.element_size()
    tile: int = triton.next_power_of_2(width * size // 4)
    dependent = has_dependent_launch(x_TE.device)
    kernel[(homes.ranks_R.numel(),)](
        x_TE, residual, *weights, out_TE, homes.ranks_R, homes.own_R, mailbox.inbox_NBTW, mailbox.away_N, mailbox.calls_T,
        mailbox.abort_1, mailbox.aborted_1, *(rows.stride(0) * size // 4 for rows in (x_TE, residual)), most_rows,
        mailbox.turns, 0.0 if first is None else first.eps, 0.0 if norm is None else norm.eps,
        E=width, TILE=tile, ROOM=room, N=ranks, PART=mailbox.part, KIND=KINDS.get(x_TE.dtype, tl.float32), PAIR=size == 2,
        WITH_NORM=norm is not None, WITH_FIRST=first is not None, FIRST_FROM_ONE=first is not None and first.from_one,
        FROM_ONE=norm is not None and norm.from_one, DEPENDENT=dependent, num_warps=min(8, max(1, tile // 256)),
        launch_pdl=dependent, **constants,
    )  # fmt: skip
