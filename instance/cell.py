"""The process group of one epoch: opened from a TCPStore whose address the gManager passes on."""

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from distattn.exchange import Group

# torch's stubs lack what is made here: dist.TCPStore, and the options of both groups
dist: Any = torch.distributed


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


class EpochGroup:
    """One epoch's communicator between the instances of a cell: NCCL for CUDA, Gloo for CPU.

    The group objects are used directly, not through torch's default group: an instance may live through several epochs, and
    Gloo must listen on `host`, not on whatever the machine's name resolves to.
    """

    def __init__(
        self, *, store_address: str, host: str, epoch: int, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        """Waits for all members. Raises torch's DistError or RuntimeError if they don't come within `timeout_s`."""
        store_host, _, port = store_address.rpartition(":")
        timeout = timedelta(seconds=timeout_s)
        tcp = dist.TCPStore(store_host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
        store = dist.PrefixStore(f"epoch-{epoch}", tcp)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            self._group: Any = dist.ProcessGroupNCCL(store, rank, size, nccl)
        else:
            gloo = dist.ProcessGroupGloo._Options()
            gloo._timeout = timeout
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
            self._group = dist.ProcessGroupGloo(store, rank, size, gloo)
        # NCCL makes its communicator in the first collective, which all ranks must join; afterwards any two may exchange
        self._group.allreduce([torch.zeros(1, device=device)]).wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    @property
    def group(self) -> Group:
        group: Group = self._group
        return group

    def close(self) -> None:
        """Leave at once, without waiting for the others."""
        self._group.abort()
