"""Sums over the ranks that share a layer's products, one-sided: each writes its rows into the others' memory and adds up.

    rank 0    push x0 to 1    wait for x1    x0 + x1    residual +=    norm
    rank 1    push x1 to 0    wait for x0    x0 + x1    residual +=    norm

A word of 8 bytes carries 4 bytes of a row and the number of the call, so a word that has come tells it by itself: nothing is
fenced, and no signal follows. Each program has a row, and counts its calls. There are two buffers: a rank writes into one again
two calls later, when all have read it, because it has since had from each of them the call between.

All ranks add in the same order, in fp32, and so get the same bits. What follows each sum, a residual and a norm, rides along.

Source: NCCL's LL protocol (data and flag in one store), one-shot all-reduce.

Shape suffixes: T rows, E elements of a row, N ranks, W words, S tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.launch import has_dependent_launch, let_next_start, wait_for_previous
from kernels.layer_ops import Norm
from kernels.layer_ops_triton import scaled

BUFFERS = 2
_TURNS = 2**16
"""Looks at memory here, some 50 ms, between two at the abort word in the host's. With 256, two H200s, 64 rows that waited for a
millisecond took 20 more: all of their programs read the host's memory at once."""

_KINDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Where ranks write for each other, for calls of one stream."""

    part: int
    """This rank."""
    inbox_NBTW: torch.Tensor
    """int64 `[N, BUFFERS, T, W]`, here: from each rank. Zeros at first."""
    away_N: torch.Tensor
    """int64, even: how many words behind the inbox the rows from this rank begin at each of the others."""
    calls_T: torch.Tensor
    """int32: how often each row was exchanged. Zeros at first."""
    abort_1: torch.Tensor
    """int32 in the host's memory. Not 0: nobody waits any more, and what comes back means nothing."""
    aborted_1: torch.Tensor
    """int32: whether a program has seen that. 0 at first."""
    turns: int = _TURNS

    def fits(self, x: torch.Tensor) -> bool:
        """Whether rows `[T, E]` can be exchanged: the same on all ranks."""
        most_rows, words = self.inbox_NBTW.shape[2:]
        row_bytes = x.shape[-1] * x.element_size()
        return x.dim() == 2 and 0 < x.shape[0] <= most_rows and row_bytes % 4 == 0 and row_bytes // 4 <= words


@triton.jit  # type: ignore[untyped-decorator]
def _halves(bits, KIND: tl.constexpr, PAIR: tl.constexpr):  # type: ignore[no-untyped-def]
    """The elements of words of 4 bytes: two of 16 bits, or one and 0."""
    if PAIR:
        low = (bits & 0xFFFF).to(tl.int16).to(KIND, bitcast=True)
        high = ((bits >> 16) & 0xFFFF).to(tl.int16).to(KIND, bitcast=True)
    else:
        low = bits.to(tl.float32, bitcast=True)
        high = tl.zeros_like(low)
    return low, high


@triton.jit  # type: ignore[untyped-decorator]
def _whole(low, high, PAIR: tl.constexpr):  # type: ignore[no-untyped-def]
    if PAIR:
        bits = (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        bits = low.to(tl.int32, bitcast=True)
    return bits


@triton.jit  # type: ignore[untyped-decorator]
def _normed(  # type: ignore[no-untyped-def]
    low, high, weight_ptr, word, is_word, eps, E, FROM_ONE: tl.constexpr, KIND: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    """weight (x / sqrt(mean(x^2) + eps))"""
    weight = tl.load(weight_ptr.to(tl.pointer_type(tl.int32)) + word, mask=is_word, other=0)
    weight_low, weight_high = _halves(weight, KIND, PAIR)
    full_low, full_high = low.to(tl.float32), high.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(full_low * full_low + full_high * full_high, 0) / E + eps)
    return scaled(low, scale, weight_low, FROM_ONE), scaled(high, scale, weight_high, FROM_ONE)


@triton.jit
def _push(bits, call, to_ptr, word, is_word):  # type: ignore[no-untyped-def]
    """Words that say of which call they are."""
    tl.store(to_ptr + word, (bits.to(tl.int64) & 0xFFFFFFFF) | (call.to(tl.int64) << 32), mask=is_word)


@triton.jit
def _arrived(from_ptr, call, word, is_word, abort_ptr, aborted_ptr, turns):  # type: ignore[no-untyped-def]
    """What a rank has pushed in this call, once all of it is here."""
    got = tl.load(from_ptr + word, mask=is_word, other=0, volatile=True)
    late = tl.sum((is_word & ((got >> 32).to(tl.int32) != call)).to(tl.int32), 0)
    turn = 0
    aborted = tl.load(aborted_ptr, volatile=True)
    while (late > 0) & (aborted == 0):
        got = tl.load(from_ptr + word, mask=is_word, other=0, volatile=True)
        late = tl.sum((is_word & ((got >> 32).to(tl.int32) != call)).to(tl.int32), 0)
        turn += 1
        if turn == turns:
            turn = 0
            aborted = tl.load(abort_ptr, volatile=True)
            tl.store(aborted_ptr, aborted)
    return got.to(tl.int32)


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
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    call = tl.load(calls_ptr + row) + 1
    mine = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + row * stride_x + word, mask=is_word, other=0)
    place = ((call & 1) * most_rows + row) * ROOM
    for peer in tl.static_range(N):
        if peer != PART:
            away = tl.multiple_of(tl.load(away_ptr + peer), 2)  # two words in a store
            _push(mine, call, inbox_ptr + away + place, word, is_word)
    if TAKES_FIRST:
        out = mine
    else:
        sum_low = tl.zeros((TILE,), dtype=tl.float32)
        sum_high = tl.zeros((TILE,), dtype=tl.float32)
    for peer in tl.static_range(N):
        if peer == PART:
            bits = mine
        else:
            bits = _arrived(inbox_ptr + peer * 2 * most_rows * ROOM + place, call, word, is_word, abort_ptr, aborted_ptr, turns)
        if TAKES_FIRST:
            if peer == 0:
                out = bits
        else:
            low, high = _halves(bits, KIND, PAIR)
            sum_low += low.to(tl.float32)
            sum_high += high.to(tl.float32)
    if not TAKES_FIRST:
        x_low, x_high = sum_low.to(KIND), sum_high.to(KIND)
        if WITH_NORM:
            if WITH_FIRST:
                x_low, x_high = _normed(x_low, x_high, first_ptr, word, is_word, first_eps, E, FIRST_FROM_ONE, KIND, PAIR)
            before_ptr = residual_ptr.to(tl.pointer_type(tl.int32)) + row * stride_r + word
            before_low, before_high = _halves(tl.load(before_ptr, mask=is_word, other=0), KIND, PAIR)
            x_low = (before_low.to(tl.float32) + x_low.to(tl.float32)).to(KIND)
            x_high = (before_high.to(tl.float32) + x_high.to(tl.float32)).to(KIND)
            tl.store(before_ptr, _whole(x_low, x_high, PAIR), mask=is_word)
            x_low, x_high = _normed(x_low, x_high, weight_ptr, word, is_word, eps, E, FROM_ONE, KIND, PAIR)
        out = _whole(x_low, x_high, PAIR)
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
        KIND=_KINDS.get(x_TE.dtype, tl.float32), PAIR=pair, WITH_NORM=norm is not None, WITH_FIRST=first is not None,
        FIRST_FROM_ONE=first is not None and first.from_one, FROM_ONE=norm is not None and norm.from_one,
        TAKES_FIRST=takes_first, DEPENDENT=dependent,
        num_warps=min(8, max(1, tile // 256)), launch_pdl=dependent,
    )  # fmt: skip
