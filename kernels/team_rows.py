"""Sums over the ranks that share a layer's products, one-sided: each writes its rows into the others' memory and adds up.

    rank 0    push x0 to 1    wait for x1    x0 + x1    residual +=    norm
    rank 1    push x1 to 0    wait for x0    x0 + x1    residual +=    norm

Rows go in words that tell of which call they are (`kernels.mailbox`). Each program has a row, and counts its calls. There are
two buffers: a rank writes into one again two calls later, when all have read it, because it has since had from each of them the
call between.

All ranks add in the same order, in fp32, and so get the same bits. What follows each sum, a residual and a norm, rides along.

Source: one-shot all-reduce by NCCL's LL protocol.

Shape suffixes: T rows, E elements of a row, N ranks, W words, S tokens.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import has_dependent_launch, let_next_start, wait_for_previous
from kernels.layer_ops import Norm
from kernels.mailbox import KINDS, Mailbox, added_and_normed, arrived, halves, push, whole, words_at

BUFFERS = 2


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, first_ptr, weight_ptr, out_ptr, inbox_ptr, away_ptr, calls_ptr, abort_ptr, aborted_ptr,
    stride_x, stride_r, stride_o, most_rows, turns, first_eps, eps,
    E: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr, N: tl.constexpr, PART: tl.constexpr, KIND: tl.constexpr,
    PAIR: tl.constexpr, WITH_NORM: tl.constexpr, WITH_FIRST: tl.constexpr, FIRST_FROM_ONE: tl.constexpr,
    FROM_ONE: tl.constexpr, TAKES_FIRST: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out = the sum of all ranks' x; with a norm, residual += that, or its first norm, and out is the norm of the residual.

    TAKES_FIRST: out is the first rank's x. One program for a row.
    """
    WORDS: tl.constexpr = E // 2 if PAIR else E
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, TILE)
    is_word = word < WORDS
    first = words_at(first_ptr, word, is_word) if WITH_FIRST else word
    weight = words_at(weight_ptr, word, is_word) if WITH_NORM else word
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    call = tl.load(calls_ptr + row) + 1
    mine = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + row * stride_x + word, mask=is_word, other=0)
    residual_row_ptr = residual_ptr.to(tl.pointer_type(tl.int32)) + row * stride_r
    before = words_at(residual_row_ptr, word, is_word) if WITH_NORM else word
    place = ((call & 1) * most_rows + row) * ROOM
    for peer in tl.static_range(N):
        if peer != PART:
            away = tl.multiple_of(tl.load(away_ptr + peer), 2)  # two words in a store
            push(mine, call, inbox_ptr + away + place, word, is_word)
    if TAKES_FIRST:
        out = mine
    else:
        sum_low = tl.zeros((TILE,), dtype=tl.float32)
        sum_high = tl.zeros((TILE,), dtype=tl.float32)
    for peer in tl.static_range(N):
        if peer == PART:
            bits = mine
        else:
            bits = arrived(inbox_ptr + peer * 2 * most_rows * ROOM + place, call, word, is_word, abort_ptr, aborted_ptr, turns)
        if TAKES_FIRST:
            if peer == 0:
                out = bits
        else:
            low, high = halves(bits, KIND, PAIR)
            sum_low += low.to(tl.float32)
            sum_high += high.to(tl.float32)
    if not TAKES_FIRST:
        x_low, x_high = sum_low.to(KIND), sum_high.to(KIND)
        if WITH_NORM:
            x_low, x_high = added_and_normed(
                x_low, x_high, before, first, weight, residual_row_ptr, word, is_word, first_eps, eps, E, WITH_FIRST,
                FIRST_FROM_ONE, FROM_ONE, KIND, PAIR,
            )  # fmt: skip
        out = whole(x_low, x_high, PAIR)
    tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + row * stride_o + word, out, mask=is_word)
    tl.store(calls_ptr + row, call)


def sum_rows(x_TE: torch.Tensor, mailbox: Mailbox) -> torch.Tensor:
    """The sum of all ranks' rows, rounded once, in place of them; returns it. All ranks call it at once, with what fits."""
    _launch(x_TE, mailbox, out_TE=x_TE)
    return x_TE


def sum_add_rms_norm(
    x_TE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm, mailbox: Mailbox, *, first: Norm | None = None
) -> torch.Tensor:
    """`kernels.layer_ops.add_rms_norm` of the sum of all ranks' rows; residuals are the same on all. As `sum_rows`."""
    out_TE = torch.empty_like(x_TE)
    _launch(x_TE, mailbox, out_TE=out_TE, residual_TE=residual_TE, norm=norm, first=first)
    return out_TE


def take_first(tokens_S: torch.Tensor, mailbox: Mailbox) -> None:
    """The first rank's tokens (int64), that fit as one row, in place of all others'. It ends when all ranks have come here."""
    row_1S = tokens_S.unsqueeze(0)
    _launch(row_1S, mailbox, out_TE=row_1S, takes_first=True)


def _launch(
    x_TE: torch.Tensor,
    mailbox: Mailbox,
    *,
    out_TE: torch.Tensor,
    residual_TE: torch.Tensor | None = None,
    norm: Norm | None = None,
    first: Norm | None = None,
    takes_first: bool = False,
) -> None:
    ranks, _, most_rows, room = mailbox.inbox_NBTW.shape
    residual = x_TE if residual_TE is None else residual_TE
    words = x_TE.shape[1] * x_TE.element_size() // 4
    tile: int = triton.next_power_of_2(words)
    pair = x_TE.element_size() == 2
    dependent = has_dependent_launch(x_TE.device)
    weights = [x_TE if its is None else its.weight_E for its in (first, norm)]
    _sum_kernel[(x_TE.shape[0],)](
        x_TE, residual, *weights, out_TE, mailbox.inbox_NBTW, mailbox.away_N, mailbox.calls_T, mailbox.abort_1,
        mailbox.aborted_1, *(rows.stride(0) * rows.element_size() // 4 for rows in (x_TE, residual, out_TE)), most_rows,
        mailbox.turns, 0.0 if first is None else first.eps, 0.0 if norm is None else norm.eps,
        E=words * 2 if pair else words, TILE=tile, ROOM=room, N=ranks, PART=mailbox.part,
        KIND=KINDS.get(x_TE.dtype, tl.float32), PAIR=pair, WITH_NORM=norm is not None, WITH_FIRST=first is not None,
        FIRST_FROM_ONE=first is not None and first.from_one, FROM_ONE=norm is not None and norm.from_one,
        TAKES_FIRST=takes_first, DEPENDENT=dependent,
        num_warps=min(8, max(1, tile // 256)), launch_pdl=dependent,
    )  # fmt: skip
