"""The ranks of one instance, to each other: what layers that are split between them need.

All call the same methods in the same order, each lane in a group of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from distattn.exchange import ExchangeError, Work
from instance.split import Place


class TeamGroup(Protocol):
    """The part of torch's `ProcessGroupNCCL` and `ProcessGroupGloo` that is used here."""

    def allreduce(self, tensors: list[torch.Tensor]) -> Work: ...

    def allgather(self, outputs: list[list[torch.Tensor]], tensors: list[torch.Tensor]) -> Work: ...


class Team:
    """Sums and gathers. Every rank gets the same bits."""

    def __init__(self, group: TeamGroup, place: Place) -> None:
        self.place = place
        self._group = group

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Of all ranks' `x` (contiguous), in place; returns it. Raises ExchangeError."""
        if x.numel():
            with _named():
                self._group.allreduce([x]).wait()
        return x

    def gather(self, x_SN: torch.Tensor) -> torch.Tensor:
        """`[S, parts * N]`: what each rank has, one after the other. Raises ExchangeError."""
        parts = [torch.empty_like(x_SN) for _ in range(self.place.parts)]
        if x_SN.numel():
            with _named():
                self._group.allgather([parts], [x_SN.contiguous()]).wait()
        return torch.cat(parts, -1)

    def agree(self, tokens_S: torch.Tensor) -> None:
        """Take the first rank's tokens, in place. It comes back when all ranks have come here. Raises ExchangeError."""
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
