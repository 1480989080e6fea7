"""Words that GPUs write for each other, one-sided: what the kernels that exchange rows are made of.

A word of 8 bytes carries 4 bytes of a row and the number of the call, so a word that has come tells it by itself: nothing is
fenced, and no signal follows. A wait ends with an abort word in the host's memory, too: a rank that never comes must not hold
the GPU for ever.

Source: NCCL's LL protocol (data and flag in one store).

Shape suffixes: T rows, E elements of a row, N ranks, B buffers, W words.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.layer_ops_triton import scaled

_TURNS = 2**16
"""Looks at memory here, some 50 ms, between two at the abort word in the host's. With 256, two H200s, 64 rows that waited for a
millisecond took 20 more: all of their programs read the host's memory at once."""

KINDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""Of two elements in a word's 4 bytes."""


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Where ranks write for each other, for calls of one stream."""

    part: int
    """This rank."""
    inbox_NBTW: torch.Tensor
    """int64 `[N, B, T, W]`, here: from each rank. Zeros at first."""
    away_N: torch.Tensor
    """int64, even: how many words behind the inbox the rows from this rank begin at each of the others."""
    calls_T: torch.Tensor
    """int32: how often each row, or part of one, was exchanged. Zeros at first."""
    abort_1: torch.Tensor
    """int32 in the host's memory. Not 0: nobody waits any more, and what comes back means nothing."""
    aborted_1: torch.Tensor
    """int32: whether a program has seen that. 0 at first."""
    turns: int = _TURNS
    others: tuple[torch.Tensor, ...] = ()
    """Their inboxes, where they are mapped into this process: only as long as somebody has them."""

    def fits(self, x: torch.Tensor) -> bool:
        """Whether rows `[T, E]` can be exchanged: the same on all ranks."""
        most_rows, words = self.inbox_NBTW.shape[2:]
        row_bytes = x.shape[-1] * x.element_size()
        return x.dim() == 2 and 0 < x.shape[0] <= most_rows and row_bytes % 4 == 0 and row_bytes // 4 <= words


@triton.jit  # type: ignore[untyped-decorator]
def halves(bits, KIND: tl.constexpr, PAIR: tl.constexpr):  # type: ignore[no-untyped-def]
    """The elements of words of 4 bytes: two of 16 bits, or one and 0."""
    if PAIR:
        low = (bits & 0xFFFF).to(tl.int16).to(KIND, bitcast=True)
        high = ((bits >> 16) & 0xFFFF).to(tl.int16).to(KIND, bitcast=True)
    else:
        low = bits.to(tl.float32, bitcast=True)
        high = tl.zeros_like(low)
    return low, high


@triton.jit  # type: ignore[untyped-decorator]
def whole(low, high, PAIR: tl.constexpr):  # type: ignore[no-untyped-def]
    if PAIR:
        bits = (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        bits = low.to(tl.int32, bitcast=True)
    return bits


@triton.jit  # type: ignore[untyped-decorator]
def normed(  # type: ignore[no-untyped-def]
    low, high, weight, eps, E, FROM_ONE: tl.constexpr, KIND: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    """weight (x / sqrt(mean(x^2) + eps))"""
    weight_low, weight_high = halves(weight, KIND, PAIR)
    full_low, full_high = low.to(tl.float32), high.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(full_low * full_low + full_high * full_high, 0) / E + eps)
    return scaled(low, scale, weight_low, FROM_ONE), scaled(high, scale, weight_high, FROM_ONE)


@triton.jit
def push(bits, call, to_ptr, word, is_word):  # type: ignore[no-untyped-def]
    """Words that say of which call they are."""
    tl.store(to_ptr + word, (bits.to(tl.int64) & 0xFFFFFFFF) | (call.to(tl.int64) << 32), mask=is_word)


@triton.jit
def arrived(from_ptr, call, word, is_word, abort_ptr, aborted_ptr, turns):  # type: ignore[no-untyped-def]
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
def added_and_normed(  # type: ignore[no-untyped-def]
    low, high, before, first, weight, residual_ptr, word, is_word, first_eps, eps, E, WITH_FIRST: tl.constexpr,
    FIRST_FROM_ONE: tl.constexpr, FROM_ONE: tl.constexpr, KIND: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """residual += the elements, or their first norm; the norm of that. `residual_ptr`: int32, of the row.

    `before`: what lies there; `first`, `weight`: of the norms. All are words, which callers read before they wait
    for elements: each read takes most of a microsecond.
    """
    if WITH_FIRST:
        low, high = normed(low, high, first, first_eps, E, FIRST_FROM_ONE, KIND, PAIR)
    before_low, before_high = halves(before, KIND, PAIR)
    low = (before_low.to(tl.float32) + low.to(tl.float32)).to(KIND)
    high = (before_high.to(tl.float32) + high.to(tl.float32)).to(KIND)
    tl.store(residual_ptr + word, whole(low, high, PAIR), mask=is_word)
    return normed(low, high, weight, eps, E, FROM_ONE, KIND, PAIR)


@triton.jit
def words_at(ptr, word, is_word):  # type: ignore[no-untyped-def]
    """Elements as words of 4 bytes, from a place that is a multiple of these."""
    return tl.load(ptr.to(tl.pointer_type(tl.int32)) + word, mask=is_word, other=0)
