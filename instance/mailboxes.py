"""Mailboxes of processes of one host with a GPU each (`kernels.mailbox`)."""

from dataclasses import dataclass

import torch

from distattn.exchange import Store
from distattn.ipc import share_memory
from kernels.mailbox import Mailbox


@dataclass(frozen=True, slots=True)
class Abort:
    """Ends the waits of all mailboxes that have it."""

    word_1: torch.Tensor
    seen_1: torch.Tensor

    @staticmethod
    def of(device: torch.device) -> "Abort":
        return Abort(
            torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda"),
            torch.zeros(1, dtype=torch.int32, device=device),
        )

    def now(self) -> None:
        """End every wait, present and to come: the epoch is over, and what its steps still compute means nothing."""
        self.word_1.fill_(1)


def share_mailbox(inbox_NBTW: torch.Tensor, store: Store, name: str, *, part: int, counted: int, abort: Abort) -> Mailbox:
    """The mailbox of one of N, which have an inbox (zeros) of this shape each. `counted`: how many things it counts calls of.

    All call this together, and meet once more before they use it. Raises RuntimeError if memory can't be shared.
    """
    others = share_memory(inbox_NBTW, store, name, rank=part, size=len(inbox_NBTW))
    return mailbox(inbox_NBTW, others, part=part, counted=counted, abort=abort)


def mailbox(inbox_NBTW: torch.Tensor, others: dict[int, torch.Tensor], *, part: int, counted: int, abort: Abort) -> Mailbox:
    """Likewise, where the `others`' inboxes are mapped here."""
    starts = [others.get(rank, inbox_NBTW).data_ptr() for rank in range(len(inbox_NBTW))]
    away = [(start - inbox_NBTW.data_ptr()) // 8 + part * inbox_NBTW.stride(0) for start in starts]
    device = inbox_NBTW.device
    return Mailbox(
        part=part,
        inbox_NBTW=inbox_NBTW,
        away_N=torch.tensor(away, dtype=torch.int64, device=device),
        calls_T=torch.zeros(counted, dtype=torch.int32, device=device),
        abort_1=abort.word_1,
        aborted_1=abort.seen_1,
        others=tuple(others.values()),
    )
