"""Rows to holders and partial states back: ragged point-to-point over one process group.

All sizes are known from the step, so nothing is announced. Only members that share data take part.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch


class Work(Protocol):
    """What torch's process groups return."""

    def wait(self, timeout: timedelta = ...) -> bool: ...


class Group(Protocol):
    """The part of torch's `ProcessGroupNCCL` and `ProcessGroupGloo` that is used here."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Work: ...

    def _start_coalescing(self) -> None: ...

    def _end_coalescing(self) -> Work: ...


class Store(Protocol):
    """The part of torch's stores that is used here."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str) -> bytes:
        """Waits for the key."""

    def check(self, keys: list[str]) -> bool:
        """Whether all are there."""


class ExchangeError(RuntimeError):
    """Another instance can't be reached any more; the message says which."""


class Transfer:
    """Rows under way."""

    def __init__(self, exchange: "Exchange", works: Sequence[tuple[str, Work, bool]]) -> None:
        """`works`: with whom, and whether it is a send."""
        self._exchange = exchange
        self._works = works

    def wait(self, timeout_s: float | None = None) -> None:
        """Until all rows are here and gone; on a GPU the current stream waits, not the caller. Raises ExchangeError.

        `timeout_s`: for Gloo, longest wait for a message; one that is longer closes the group's connections to all. None: as
        long as the group says.
        """
        try:
            for who, work, is_send in self._works:
                with _named(who):
                    self._exchange.sending = work if is_send else None
                    if timeout_s is None:
                        work.wait()
                    else:
                        work.wait(timedelta(seconds=timeout_s))
        finally:
            self._exchange.sending = None


class Exchange:
    """Sends and receives slices of rows between the members of one epoch.

    On Gloo each message is a call of its own. On NCCL all of one exchange are grouped: a send and a receive that wait for each
    other must be one launch, and inside a group NCCL uses the epoch's communicator instead of one per pair.
    """

    def __init__(
        self, group: Group, device: torch.device, ids: Sequence[int] | None = None, *, members: str = "instance"
    ) -> None:
        """`ids`: what the world outside the epoch knows the ranks by; None: by their numbers. `members`: what each of them is,
        for messages."""
        self._group = group
        self._ids = ids
        self._members = members
        self.sending: Work | None = None
        """What a thread waits for until it is sent. On Gloo one that was in the connection's queue when this broke is told of
        nothing (torch 2.13, seen in processes that had stood still): it waits for as long as the group says, then fails."""
        self._grouped = device.type == "cuda"

    def name_of(self, rank: int) -> str:
        """Of a member, for those who read of it."""
        return f"{self._members} {rank if self._ids is None else self._ids[rank]}"

    def start(
        self,
        sends: Sequence[tuple[torch.Tensor, Mapping[int, int]]],
        receives: Sequence[tuple[torch.Tensor, Mapping[int, int]]],
    ) -> Transfer:
        """Begin to move rows; each tensor comes with `rank -> rows`, which lie in it one rank after the other.

        The tensors (contiguous, rows first) must stay as they are until `wait` has come back. Raises ExchangeError.
        """
        works: list[tuple[str, Work, bool]] = []
        if self._grouped:
            self._group._start_coalescing()
        for pieces, move, is_send in ((receives, self._group.recv, False), (sends, self._group.send, True)):
            for tensor, rows in pieces:
                for rank, part in _parts(tensor, rows):
                    who = self.name_of(rank)
                    with _named(who):
                        works.append((who, move([part], rank, 0), is_send))
        if self._grouped:
            works = [(f"the other {self._members}s", self._group._end_coalescing(), False)]
        return Transfer(self, works)


@contextmanager
def _named(who: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ExchangeError(f"the exchange with {who} broke: {str(error).splitlines()[0][:200]}") from error


def _parts(tensor: torch.Tensor, rows: Mapping[int, int]) -> list[tuple[int, torch.Tensor]]:
    """`tensor` cut into the consecutive parts of each rank."""
    return list(zip(rows, torch.split(tensor, list(rows.values())), strict=True)) if rows else []
