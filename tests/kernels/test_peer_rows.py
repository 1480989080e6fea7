"""Pushes and waits between "peers" that are tensors of this process: the same code that writes to another GPU's memory."""

import pytest
import torch

from kernels.peer_rows import Inbox, push_rows, wait_rows
from tests.kernels.test_paged_attention import DEVICE, NAN

ROOM = 6


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 8), (5, 16), (32, 128)])
def test_rows_arrive_where_the_table_says_and_are_counted(with_lse: bool, heads: int, head_dim: int) -> None:
    rows_THD = torch.randn(5, heads, head_dim, device=DEVICE)
    lse_TH = torch.randn(5, heads, device=DEVICE)
    boxes = [torch.full((ROOM, heads, head_dim), NAN, device=DEVICE) for _ in range(2)]
    lses = [torch.full((ROOM, heads), NAN, device=DEVICE) for _ in range(2)]
    signals = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    addresses = [
        [box.data_ptr() for box in boxes],
        [lse.data_ptr() for lse in lses],
        [signals.data_ptr(), signals.data_ptr() + 4],
    ]
    inbox = Inbox(torch.tensor(addresses, device=DEVICE))
    rows, peers, places = [0, 4, 4, 2, 9, 9], [1, 0, 1, 1, 9, 9], [2, 0, 5, 1, 9, 9]  # the last two are not to be looked at
    sends = torch.tensor([4, *rows, *peers, *places], dtype=torch.int32, device=DEVICE)
    push_rows(rows_THD, lse_TH if with_lse else None, sends, inbox)
    want = [torch.full_like(box, NAN) for box in boxes]
    want_lse = [torch.full_like(lse, NAN) for lse in lses]
    for row, peer, place in list(zip(rows, peers, places, strict=True))[:4]:
        want[peer][place] = rows_THD[row]
        if with_lse:
            want_lse[peer][place] = lse_TH[row]
    for got, expected in zip([*boxes, *lses], [*want, *want_lse], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert signals.tolist() == [1, 3]

    never_2 = torch.zeros(1, dtype=torch.int32)
    abort = never_2.pin_memory() if DEVICE.type == "cuda" else never_2
    wait_rows(signals, torch.tensor([1, 3], dtype=torch.int32, device=DEVICE), abort)
    assert signals.tolist() == [0, 0]


def test_an_abort_ends_a_wait_for_a_peer_that_never_comes() -> None:
    abort = torch.ones(1, dtype=torch.int32)
    abort = abort.pin_memory() if DEVICE.type == "cuda" else abort
    signals = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    wait_rows(signals, torch.tensor([0, 1], dtype=torch.int32, device=DEVICE), abort)
    assert signals.tolist() == [0, 0]
