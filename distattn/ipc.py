"""Memory of a GPU that other processes of the host may write to (CUDA IPC)."""

from typing import Any

import msgspec
import torch


class _Handle(msgspec.Struct, frozen=True, array_like=True):
    """What torch says of memory that another process may open, in its order (`torch.multiprocessing` passes the same)."""

    device: int
    handle: bytes
    size: int
    offset: int
    ref_counter: bytes
    ref_counter_offset: int
    event: bytes
    event_is_needed: bool


def export_memory(memory: torch.Tensor) -> bytes:
    """What another process needs to open it. Whatever is queued for it must have run."""
    storage: Any = memory.untyped_storage()
    return msgspec.msgpack.encode(_Handle(*storage._share_cuda_()))


def import_memory(exported: bytes, device: torch.device) -> torch.Tensor:
    """Another process's memory, mapped for our own device: only its address means anything.

    Raises RuntimeError if the device can't reach it.
    """
    handle = msgspec.msgpack.decode(exported, type=_Handle)
    # the exporter has synchronised, so its event is not waited for
    ours = msgspec.structs.replace(handle, device=device.index, event_is_needed=False)
    storage_type: Any = torch.UntypedStorage
    storage = storage_type._new_shared_cuda(*msgspec.structs.astuple(ours))
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
