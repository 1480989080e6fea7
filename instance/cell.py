"""The process groups of one epoch, of each lane and of copies: opened from a TCPStore whose address the gManager passes on."""

import socket
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from distattn.exchange import Group, Store
from instance.team import TeamGroup

# torch's stubs lack what is made here: dist.TCPStore, and the options of both groups
dist: Any = torch.distributed

_NOBODYS_TAG = 1
"""Of a row that nobody sends; rows have tag 0."""


def open_store(host: str, timeout_s: float) -> tuple[object, str]:
    """A TCPStore on a free port of `host`, and its address `host:port`. Keep it until the epoch ends.

    Raises OSError if `host` is no address of this machine.
    """
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    listening = socket.create_server((host, 0), family=family)
    port = listening.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listening.detach(),  # left to itself it listens on all interfaces
    )
    return store, f"{host}:{port}"


def make_group(
    store: Any, host: str, rank: int, size: int, device: torch.device, timeout_s: float, max_channels: int | None = None
) -> Any:
    """NCCL for CUDA, Gloo for CPU; `max_channels` of NCCL's. Gloo listens on `host`, and meets all others here."""
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        if max_channels is not None:
            nccl.config.max_ctas = max_channels
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    gloo = dist.ProcessGroupGloo._Options()
    gloo._timeout = timeout
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(store, rank, size, gloo)


class EpochGroup:
    """A communicator between the instances of a cell, within one epoch: NCCL for CUDA, Gloo for CPU.

    The group objects are used directly, not through torch's default group: an instance may live through several epochs, and
    Gloo must listen on `host`, not on whatever the machine's name resolves to.
    """

    def __init__(
        self,
        *,
        store_address: str,
        host: str,
        name: str,
        rank: int,
        size: int,
        device: torch.device,
        timeout_s: float,
        max_channels: int | None = None,
    ) -> None:
        """All members make theirs of the same name, and then `meet`. `max_channels`: for NCCL, how many processors an exchange
        may hold, and how many sets of buffers there are.

        Raises torch's DistError or RuntimeError if the store can't be reached within `timeout_s`.
        """
        store_host, _, port = store_address.rpartition(":")
        timeout = timedelta(seconds=timeout_s)
        tcp = dist.TCPStore(store_host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
        self.store: Store = dist.PrefixStore(name, tcp)
        self._group = make_group(self.store, host, rank, size, device, timeout_s, max_channels)
        self._device, self._rank, self._size = device, rank, size

    def meet(self) -> "EpochGroup":
        """Wait for all members; `close`, in another thread, ends that. Returns itself.

        Raises RuntimeError if they don't come within `timeout_s`.
        """
        # NCCL makes its communicator in the first collective, which all ranks must join; afterwards any two may exchange
        self.barrier()
        if self._device.type == "cuda":
            self._connect(self._rank, self._size)
        return self

    def all_say(self, mine: bool, what: str = "says") -> bool:
        """Whether all members say so of one thing: each calls this once for it. Waits for them as `meet` does."""
        return all(said == b"yes" for said in self.hear_all(what, b"yes" if mine else b"no"))

    def hear_all(self, what: str, mine: bytes) -> list[bytes]:
        """What each member says of one thing, in the order of ranks: each calls this once for it. Waits as `meet` does."""
        self.store.set(f"{what}-{self._rank}", mine)
        self.barrier()
        return [self.store.get(f"{what}-{rank}") for rank in range(self._size)]

    def _connect(self, rank: int, size: int) -> None:
        """Exchange a row with every other member: NCCL connects two in their first exchange, which takes it half a second."""
        if size == 1:
            return  # what was begun and never ended would keep all that this thread asks of NCCL later from being launched
        row = torch.zeros(1, device=self._device)
        self._group._start_coalescing()
        for peer in range(size):
            if peer != rank:
                self._group.recv([torch.empty_like(row)], peer, 0)
                self._group.send([row], peer, 0)
        self._group._end_coalescing().wait()
        torch.cuda.synchronize(self._device)

    def barrier(self) -> None:
        """Until all members have come here."""
        self._group.allreduce([torch.zeros(1, device=self._device)]).wait()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @property
    def group(self) -> Group:
        group: Group = self._group
        return group

    @property
    def team_group(self) -> TeamGroup:
        group: TeamGroup = self._group
        return group

    def close(self) -> None:
        """Leave at once, without waiting for the others: whoever waits for a row, here or there, is let go with an error."""
        if self._device.type == "cpu":
            # Gloo's abort lets nobody go; but one wait that misses its deadline closes all of a process's connections. One for
            # a member that is gone fails at once, and closes nothing: so there is one for each.
            for peer in range(self._size):
                if peer != self._rank:
                    with suppress(RuntimeError):
                        self._group.recv([torch.empty(1)], peer, _NOBODYS_TAG).wait(timedelta(milliseconds=1))
        self._group.abort()
