"""The ranks of one instance, to each other: what layers that are split between them need.

All call the same methods in the same order, each lane in a group of its own. On GPUs few rows go one-sided through memory that
the ranks write for each other; many, and all on the CPU, by NCCL or Gloo. Rows alone decide which: all ranks do the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from distattn.exchange import ExchangeError, Work
from instance.split import Place
from kernels.layer_ops import Norm, add_rms_norm

if TYPE_CHECKING:  # it needs Triton, which an instance on the CPU does without
    from instance.team_memory import TeamMemory


class TeamGroup(Protocol):
    """The part of torch's `ProcessGroupNCCL` and `ProcessGroupGloo` that is used here."""

    def allreduce(self, tensors: list[torch.Tensor]) -> Work: ...

    def allgather(self, outputs: list[list[torch.Tensor]], tensors: list[torch.Tensor]) -> Work: ...


class Team:
    """Sums and gathers. Every rank gets the same bits."""

    def __init__(self, group: TeamGroup, place: Place, memory: "TeamMemory | None" = None) -> None:
        """`memory`: for steps on a GPU that has it with all the others."""
        self.place = place
        self.group = group
        self._memory = memory

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Of all ranks' `x` (contiguous), in place; returns it. Raises ExchangeError."""
        if self._memory is not None and self._memory.fits(x):
            self._memory.sum(x)
        elif x.numel():
            with _named():
                self.group.allreduce([x]).wait()
        return x

    def add_rms_norm(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm, *, first: Norm | None, backend: str
    ) -> torch.Tensor:
        """`kernels.layer_ops.add_rms_norm` of the sum of all ranks' `x`, which is lost. Raises ExchangeError."""
        if self._memory is not None and self._memory.fits(x_TE):
            return self._memory.add_rms_norm(x_TE, residual_TE, norm, first)
        return add_rms_norm(self.sum(x_TE), residual_TE, norm, first=first, backend=backend)

    def gather(self, x_SN: torch.Tensor) -> torch.Tensor:
        """`[S, parts * N]`: what each rank has, one after the other. Raises ExchangeError."""
        parts = [torch.empty_like(x_SN) for _ in range(self.place.parts)]
        if x_SN.numel():
            with _named():
                self.group.allgather([parts], [x_SN.contiguous()]).wait()
        return torch.cat(parts, -1)

    def agree(self, tokens_S: torch.Tensor) -> None:
        """Take the first rank's tokens (int64), in place. It comes back when all ranks have come here. Raises ExchangeError."""
        if self._memory is not None and self._memory.fits(tokens_S.unsqueeze(0)):
            self._memory.take_first(tokens_S)
            return
        if self.place.part:
            tokens_S.zero_()
        self.sum(tokens_S)


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ExchangeError(f"the ranks of the instance lost each other: {_first_line(error)}") from error


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0][:200]
