"""Sums between "ranks" that are tensors of this process: the same code that writes to another GPU's memory."""

import pytest
import torch

from kernels.layer_ops import Norm, add_rms_norm
from kernels.mailbox import Mailbox
from kernels.team_rows import BUFFERS, sum_add_rms_norm, sum_rows, take_first
from tests.kernels.test_paged_attention import DEVICE

ROOM = 48
"""Words of a row."""
ROWS = 5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""The interpreter rounds to bfloat16 towards zero."""


class Ranks:
    """One of `number`, and what the others would have pushed."""

    def __init__(self, part: int, number: int) -> None:
        self.part = part
        inboxes = [torch.zeros((number, BUFFERS, ROWS, ROOM), dtype=torch.int64, device=DEVICE) for _ in range(number)]
        away = [(inbox[part].data_ptr() - inboxes[part].data_ptr()) // 8 for inbox in inboxes]
        abort = torch.zeros(1, dtype=torch.int32)
        self.mailbox = Mailbox(
            part,
            inboxes[part],
            torch.tensor(away, device=DEVICE),
            torch.zeros(ROWS, dtype=torch.int32, device=DEVICE),
            abort.pin_memory() if DEVICE.type == "cuda" else abort,
            torch.zeros(1, dtype=torch.int32, device=DEVICE),
            turns=5,
        )
        self._inboxes = inboxes

    def push(self, rows_NTE: list[torch.Tensor]) -> None:
        """What the others do in the call that comes next."""
        for peer, rows_TE in enumerate(rows_NTE):
            if peer != self.part:
                bits_TW = rows_TE.contiguous().view(torch.int32).long() & 0xFFFFFFFF
                for row, its in enumerate(bits_TW):
                    call = int(self.mailbox.calls_T[row]) + 1
                    self.mailbox.inbox_NBTW[peer, call % BUFFERS, row, : len(its)] = its | (call << 32)

    def pushed(self, peer: int, call: int, row: int, like_E: torch.Tensor) -> torch.Tensor:
        """What this rank has left for another in a call; raises AssertionError for words of another call."""
        words_W = self._inboxes[peer][self.part, call % BUFFERS, row]
        words_W = words_W[: like_E.numel() * like_E.element_size() // 4]
        assert (words_W >> 32 == call).all()
        return (words_W & 0xFFFFFFFF).to(torch.int32).view(like_E.dtype)


def rows(number: int, count: int, width: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randn((count, width), generator=drawn).to(dtype).to(DEVICE) for _ in range(number)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("part", "number"), [(0, 2), (1, 2), (2, 3)])
def test_all_ranks_rows_are_added_in_one_order_call_after_call(part: int, number: int, dtype: torch.dtype) -> None:
    """Some calls with fewer rows: rows count by themselves."""
    ranks = Ranks(part, number)
    width = 40 if dtype == torch.float32 else 80
    seen = [0] * ROWS
    for turn, count in enumerate((5, 1, 3, 1, 5)):
        theirs = rows(number, count, width, dtype, turn)
        ranks.push(theirs)
        want = torch.zeros((count, width), device=DEVICE)
        for rank in theirs:
            want = want + rank.float()
        mine = theirs[part].clone()
        assert sum_rows(mine, ranks.mailbox) is mine
        limit = 0 if DEVICE.type == "cuda" else TOLERANCE[dtype]
        torch.testing.assert_close(mine, want.to(dtype), rtol=limit, atol=limit)
        for row in range(count):
            seen[row] += 1
            for peer in set(range(number)) - {part}:
                got = ranks.pushed(peer, seen[row], row, theirs[part][row])
                torch.testing.assert_close(got, theirs[part][row], rtol=0, atol=0)
    assert ranks.mailbox.calls_T.tolist() == seen


@pytest.mark.parametrize("from_one", [False, True])
@pytest.mark.parametrize("with_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_and_norms_ride_along(dtype: torch.dtype, with_first: bool, from_one: bool) -> None:
    ranks = Ranks(1, 2)
    width = 36
    theirs = rows(2, 3, width, dtype, 7)
    residual_TE, weights_TE, firsts_TE = rows(3, 3, width, dtype, 8)
    norm, first = Norm(weights_TE[0], 1e-5, from_one), Norm(firsts_TE[1], 1e-6, from_one) if with_first else None
    summed_TE = (theirs[0].float() + theirs[1].float()).to(dtype)
    want_residual_TE = residual_TE.clone()
    want_TE = add_rms_norm(summed_TE, want_residual_TE, norm, first=first, backend="torch")
    ranks.push(theirs)
    got_TE = sum_add_rms_norm(theirs[1], residual_TE, norm, ranks.mailbox, first=first)
    torch.testing.assert_close(got_TE, want_TE, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(residual_TE, want_residual_TE, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("part", [0, 1])
def test_tokens_are_the_first_ranks(part: int) -> None:
    ranks = Ranks(part, 2)
    theirs = [torch.tensor([[3, 2**40, -1]], device=DEVICE), torch.tensor([[5, 6, 7]], device=DEVICE)]
    ranks.push(theirs)
    tokens_S = theirs[part][0].clone()
    take_first(tokens_S, ranks.mailbox)
    assert tokens_S.tolist() == [3, 2**40, -1]


def test_an_abort_ends_a_wait_for_a_rank_that_never_comes() -> None:
    ranks = Ranks(0, 2)
    ranks.mailbox.abort_1.fill_(1)
    sum_rows(rows(1, 2, 8, torch.float32, 0)[0], ranks.mailbox)
    assert ranks.mailbox.calls_T.tolist() == [1, 1, 0, 0, 0]
    assert ranks.mailbox.aborted_1.item() == 1
    ranks.mailbox.abort_1.fill_(0)
    sum_rows(rows(1, 2, 8, torch.float32, 0)[0], ranks.mailbox)  # what has been seen here isn't asked of the host again
    assert ranks.mailbox.calls_T.tolist() == [2, 2, 0, 0, 0]


def test_what_fits() -> None:
    mailbox = Ranks(0, 2).mailbox
    f32, bf16 = torch.float32, torch.bfloat16
    for count, width, dtype in ((5, 48, f32), (1, 96, bf16), (1, 24, torch.int64)):
        assert mailbox.fits(torch.empty((count, width), dtype=dtype))
    for count, width, dtype in ((6, 48, f32), (1, 49, f32), (1, 98, bf16), (1, 95, bf16), (0, 8, f32)):
        assert not mailbox.fits(torch.empty((count, width), dtype=dtype))
    assert not mailbox.fits(torch.empty(48))
