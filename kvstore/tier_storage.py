"""The bytes below the pool: slots of whole blocks in host memory and in a file, and how they are copied.

A checksum is made of each block when it is copied from the pool, and of what lies in the pool once it has come back
(`kvstore.checksum`); who decides compares them. On a GPU the copies run on a stream of their own, through pinned memory.

The file is scratch of this process: it has no name once it is open, so nothing is left of it however the process ends. Each
slot begins with a header that says what should be in it, so that one that was torn or written by somebody else is seen as it
is read:

    slot   | distattn | key | checksum | bytes | KV of a block ... |      a multiple of 4096 bytes
"""

import os
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvstore.checksum import bytes_of, checksum_of
from kvstore.storage import KVStorage, on_stream
from kvstore.tiers import Copying, Fault, Place, Tier

PAGE = 4096
_HEADER = struct.Struct("<8sqqq")
_MAGIC = b"distattn"


class TierStorage:
    """What lies below one instance's pool. Used by one thread at a time."""

    def __init__(self, storage: KVStorage, *, host_slots: int = 0, disk_slots: int = 0, folder: Path | None = None) -> None:
        """`folder`: of the disk's file. Raises MemoryError and OSError if there is no room, with the numbers."""
        self.storage = storage
        self._device = storage.data_L2BPKD.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.host_SN = _host_buffer(host_slots, storage.block_bytes, self._device)
        self._staged_N = _host_buffer(1, storage.block_bytes, self._device)[0]
        """For blocks that go between the pool and the disk."""
        self.file = SlotFile(folder, disk_slots, storage.block_bytes) if disk_slots and folder is not None else None

    @property
    def slots(self) -> dict[Tier, int]:
        """Of each tier."""
        return {"host": self.host_SN.shape[0], "disk": 0 if self.file is None else self.file.num_slots}

    def copy(self, items: Sequence[Copying]) -> list[int | Fault]:
        """For each block the checksum of what came, or why nothing did."""
        with on_stream(self._stream):
            return [self._try(item) for item in items]

    def close(self) -> None:
        """Give the disk's room back, and let go of pinned memory. Nothing is copied any more."""
        if self.file is not None:
            self.file.close()
        if self._device.type == "cuda":
            for buffer in (self.host_SN, self._staged_N):
                if buffer.numel():
                    runtime: Any = torch.cuda
                    runtime.cudart().cudaHostUnregister(buffer.data_ptr())

    def _try(self, item: Copying) -> int | Fault:
        try:
            return self._copy(item)
        except torch.OutOfMemoryError:  # the model's steps take what they need; this can wait
            if self._stream is not None:
                self._stream.synchronize()
            return "no_memory"

    def _copy(self, item: Copying) -> int | Fault:
        if item.source == item.target:  # only looked at
            return checksum_of(self.storage.pack(item.source.slot))
        if item.source.where == "pool":
            return self._down(item)
        if item.target.where == "pool":
            return self._up(item)
        if item.target.where == "disk":
            return self._write(item, item.checksum or 0, self.host_SN[item.source.slot])
        is_read = self._file.read(item.source.slot, item.key, item.checksum or 0, self.host_SN[item.target.slot])
        return item.checksum or 0 if is_read else "unreadable"

    def _down(self, item: Copying) -> int | Fault:
        """From the pool. A checksum on a GPU is made there, before the block has crossed the bus."""
        target_N = self._host_place(item.target)
        if self._stream is None:
            self.storage.pack(item.source.slot, target_N)
            checksum = checksum_of(target_N)
        else:
            packed_N = self.storage.pack(item.source.slot)
            target_N.copy_(packed_N, non_blocking=True)
            checksum = checksum_of(packed_N)
            self._stream.synchronize()
        if item.target.where == "disk":
            return self._write(item, checksum, target_N)
        return checksum

    def _up(self, item: Copying) -> int | Fault:
        """Into the pool, and what lies there then."""
        source_N = self._host_place(item.source)
        if item.source.where == "disk" and not self._file.read(item.source.slot, item.key, item.checksum or 0, source_N):
            return "unreadable"
        here_N = source_N if self._stream is None else source_N.to(self._device, non_blocking=True)
        self.storage.unpack(item.target.slot, here_N)
        return checksum_of(self.storage.pack(item.target.slot))

    def _write(self, item: Copying, checksum: int, block_N: torch.Tensor) -> int | Fault:
        return checksum if self._file.write(item.target.slot, item.key, checksum, block_N) else "unwritable"

    def _host_place(self, place: Place) -> torch.Tensor:
        """Where a block lies in host memory, or passes through it."""
        return self.host_SN[place.slot] if place.where == "host" else self._staged_N

    @property
    def _file(self) -> "SlotFile":
        if self.file is None:
            raise RuntimeError("there is no tier on disk")
        return self.file


class SlotFile:
    """Slots of blocks in a file without a name."""

    def __init__(self, folder: Path, num_slots: int, block_bytes: int) -> None:
        """Raises OSError if the folder can't be written, or hasn't the room."""
        self.slot_bytes = slot_bytes(block_bytes)
        self.num_slots = num_slots
        self._block_bytes = block_bytes
        self._fd, path = tempfile.mkstemp(prefix=f"distattn-{os.getpid()}-", suffix=".kv", dir=folder)  # for its owner alone
        os.unlink(path)
        needed = num_slots * self.slot_bytes
        try:
            os.posix_fallocate(self._fd, 0, needed)
        except OSError as error:
            os.close(self._fd)
            raise OSError(
                error.errno, f"{needed:,} bytes ({num_slots:,} blocks) can't be had in {folder}: {error.strerror}"
            ) from error

    def write(self, slot: int, key: int, checksum: int, block: torch.Tensor) -> bool:
        """Whether a contiguous block in host memory is in the slot now."""
        header = _HEADER.pack(_MAGIC, key, checksum, self._block_bytes)
        try:
            written = os.pwritev(self._fd, [header, bytes_of(block).numpy().data], slot * self.slot_bytes)
        except OSError:
            return False
        return written == _HEADER.size + self._block_bytes

    def read(self, slot: int, key: int, checksum: int, block: torch.Tensor) -> bool:
        """Whether a contiguous block in host memory holds what the slot does now, and that was written as this key. False: it
        holds nothing of use."""
        header = bytearray(_HEADER.size)
        try:
            came = os.preadv(self._fd, [header, bytes_of(block).numpy().data], slot * self.slot_bytes)
        except OSError:
            return False
        wanted = _HEADER.pack(_MAGIC, key, checksum, self._block_bytes)
        return came == _HEADER.size + self._block_bytes and bytes(header) == wanted

    def spoil(self, slot: int, at: int, data: bytes) -> None:
        """Overwrite some bytes of a slot, as a broken disk would: for tests."""
        os.pwrite(self._fd, data, slot * self.slot_bytes + at)

    def cut(self, num_bytes: int) -> None:
        """Let the file end there: for tests."""
        os.ftruncate(self._fd, num_bytes)

    def close(self) -> None:
        """With that it is gone."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def slot_bytes(block_bytes: int) -> int:
    """Of the file, for a block and its header."""
    return -(-(_HEADER.size + block_bytes) // PAGE) * PAGE


def _host_buffer(slots: int, block_bytes: int, device: torch.device) -> torch.Tensor:
    """In host memory; for a GPU pinned. torch's own pinned memory would take a power of two. Raises MemoryError."""
    size = slots * block_bytes
    try:
        buffer = torch.empty((slots, block_bytes), dtype=torch.uint8)
    except RuntimeError as error:
        raise MemoryError(f"{size:,} bytes of host memory can't be had: {error}") from error
    if device.type == "cuda" and size:
        runtime: Any = torch.cuda
        if code := int(runtime.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)):
            raise MemoryError(f"{size:,} bytes of host memory can't be pinned: CUDA error {code}")
    return buffer
