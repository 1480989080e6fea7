"""Rows to holders and partial states back: ragged point-to-point over one process group.

All sizes are known from the step, so nothing is announced. Only members that share data take part.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch


class Work(Protocol):
    """What torch's process groups return."""

    def wait(self) -> bool: ...


class Group(Protocol):
    """The part of torch's `ProcessGroupNCCL` and `ProcessGroupGloo` that is used here."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Work: ...

    def _start_coalescing(self) -> None: ...

    def _end_coalescing(self) -> Work: ...


class Exchange:
    """Sends and receives slices of rows between the members of one epoch.

    On Gloo each message is a call of its own. On NCCL all of one exchange are grouped: a send and a receive that wait for each
    other must be one launch, and inside a group NCCL uses the epoch's communicator instead of one per pair.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._grouped = device.type == "cuda"

    def start(
        self,
        sends: Sequence[tuple[torch.Tensor, Mapping[int, int]]],
        receives: Sequence[tuple[torch.Tensor, Mapping[int, int]]],
    ) -> list[Work]:
        """Begin to move rows; each tensor comes with `rank -> rows`, which lie in it one rank after the other.

        The tensors (contiguous, rows first) must stay as they are until every returned `wait()` has come back. On a GPU `wait`
        makes the current stream wait, not the caller.
        """
        works: list[Work] = []
        if self._grouped:
            self._group._start_coalescing()
        for tensor, rows in receives:
            works += [self._group.recv([part], rank, 0) for rank, part in _parts(tensor, rows)]
        for tensor, rows in sends:
            works += [self._group.send([part], rank, 0) for rank, part in _parts(tensor, rows)]
        if self._grouped:
            return [self._group._end_coalescing()]
        return works


def _parts(tensor: torch.Tensor, rows: Mapping[int, int]) -> list[tuple[int, torch.Tensor]]:
    """`tensor` cut into the consecutive parts of each rank."""
    return list(zip(rows, torch.split(tensor, list(rows.values())), strict=True)) if rows else []
