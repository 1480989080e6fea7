"""Memory of a GPU that other processes of the host may write to (CUDA IPC)."""

from typing import Any

import msgspec
import torch

from distattn.exchange import Store


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


def share_memory(memory: torch.Tensor, store: Store, name: str, *, rank: int, size: int) -> dict[int, torch.Tensor]:
    """The memory of the others, by rank, each mapped for our own device: only its address means anything.

    All call this together, with memory of their own, and meet once more before any writes to another's. Raises RuntimeError if
    the device can't reach it.
    """
    torch.cuda.synchronize(memory.device)  # what is queued for it has run when others open it
    store.set(f"{name}-{rank}", _export(memory))
    return {peer: _import(store.get(f"{name}-{peer}"), memory.device) for peer in range(size) if peer != rank}


def _export(memory: torch.Tensor) -> bytes:
    storage: Any = memory.untyped_storage()
    return msgspec.msgpack.encode(_Handle(*storage._share_cuda_()))


def _import(exported: bytes, device: torch.device) -> torch.Tensor:
    handle = msgspec.msgpack.decode(exported, type=_Handle)
    # the exporter has synchronised, so its event is not waited for
    ours = msgspec.structs.replace(handle, device=device.index, event_is_needed=False)
    storage_type: Any = torch.UntypedStorage
    storage = storage_type._new_shared_cuda(*msgspec.structs.astuple(ours))
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
