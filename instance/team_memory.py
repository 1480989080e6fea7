"""Memory that the ranks of an instance write for each other, and the sums that go through it (`kernels.team_rows`)."""

import torch

from distattn.exchange import Store
from instance.mailboxes import Abort, share_mailbox
from instance.split import Place
from kernels.layer_ops import Norm
from kernels.team_rows import BUFFERS, sum_add_rms_norm, sum_rows, take_first


class TeamMemory:
    """For rows of one width, in steps of one lane. Needs GPUs that reach each other's memory."""

    def __init__(self, *, store: Store, place: Place, rows: int, row_bytes: int, device: torch.device) -> None:
        """All ranks call this together, and meet once more before they use it. `rows`: most of a step.

        Raises RuntimeError if memory can't be shared.
        """
        inbox_NBTW = torch.zeros((place.parts, BUFFERS, rows, row_bytes // 4), dtype=torch.int64, device=device)
        self._abort = Abort.of(device)
        self._mailbox = share_mailbox(inbox_NBTW, store, "team", part=place.part, counted=rows, abort=self._abort)

    def fits(self, x: torch.Tensor) -> bool:
        """Whether there is room for these rows `[T, E]`."""
        return self._mailbox.fits(x)

    def sum(self, x_TE: torch.Tensor) -> None:
        """In place."""
        sum_rows(x_TE, self._mailbox)

    def add_rms_norm(self, x_TE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm, first: Norm | None) -> torch.Tensor:
        """`kernels.layer_ops.add_rms_norm` of the sum."""
        return sum_add_rms_norm(x_TE, residual_TE, norm, self._mailbox, first=first)

    def take_first(self, tokens_S: torch.Tensor) -> None:
        """In place of all others'."""
        take_first(tokens_S, self._mailbox)

    def abort(self) -> None:
        """End every wait, present and to come: the epoch is over, and what its steps still compute means nothing."""
        self._abort.now()
