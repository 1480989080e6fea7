"""Tables of numbers from the host to the device, without making the host wait."""

from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

_CODES = {torch.int32: "i", torch.int64: "q", torch.float32: "f"}
_HOST_BUFFERS = 3
"""One that the device reads, one that waits behind a running step, one to write into."""


def upload(values: Iterable[float], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """`values` as a tensor `[n]` of int32, int64 (both from integers) or float32 on `device`.

    To a GPU from pinned memory: the copy is ordered by the stream, and the caller goes on. Raises OverflowError for a value
    that the dtype can't hold.
    """
    copy: array[Any] = array(_CODES[dtype], values)
    if not copy:
        return torch.empty(0, dtype=dtype, device=device)
    host = torch.frombuffer(copy, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class FixedTables:
    """int32 tables at addresses that never change, so that a CUDA graph can read them; filled anew for each step.

    All tables lie in one buffer and travel in one copy, which the stream orders before the step that it is for. The host writes
    into rotating pinned buffers, so it may prepare a step while those before it still run.
    """

    def __init__(self, sizes: Mapping[str, int], device: torch.device) -> None:
        """`sizes`: entries of each table, in the order of the buffer. A copy ends with the last entry written."""
        self._slices: dict[str, slice] = {}
        total = 0
        for name, size in sizes.items():
            self._slices[name] = slice(total, total + size)
            total += size
        self._on_gpu = device.type == "cuda"
        self._device_tables = torch.zeros(total, dtype=torch.int32, device=device)
        self._hosts = [torch.zeros(total, dtype=torch.int32, pin_memory=self._on_gpu) for _ in range(_HOST_BUFFERS)]
        self._copied: list[torch.cuda.Event | None] = [None] * _HOST_BUFFERS
        self._current = 0
        self._used = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        """The table on the device."""
        return self._device_tables[self._slices[name]]

    def begin(self) -> None:
        """Start the tables of another step. Waits for the copy that last read this buffer, three steps ago."""
        self._current = (self._current + 1) % _HOST_BUFFERS
        self._used = 0
        copied = self._copied[self._current]
        if copied is not None:
            copied.synchronize()

    def write(self, name: str, values: "array[int]") -> None:
        """The first entries of a table; the others keep what they had. Raises ValueError if they are too many."""
        place = self._slices[name]
        stop = place.start + len(values)
        if stop > place.stop:
            raise ValueError(f"{len(values)} entries for table '{name}' of {place.stop - place.start}")
        if values:
            self._hosts[self._current].numpy()[place.start : stop] = np.frombuffer(values, dtype=np.int32)
            self._used = max(self._used, stop)

    def upload(self) -> None:
        """Send what was written since `begin`; work queued on the stream after it sees the new tables."""
        self._device_tables[: self._used].copy_(self._hosts[self._current][: self._used], non_blocking=True)
        if self._on_gpu:
            event = self._copied[self._current] or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[self._current] = event
