"""Tables of integers from the host to the device, without making the host wait."""

from array import array
from collections.abc import Iterable

import torch

_CODES = {torch.int32: "i", torch.int64: "q"}


def upload(values: Iterable[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """`values` as a tensor `[n]` of int32 or int64 on `device`.

    To a GPU from pinned memory: the copy is ordered by the stream, and the caller goes on. Raises OverflowError for a value
    that the dtype can't hold.
    """
    copy = array(_CODES[dtype], values)
    if not copy:
        return torch.empty(0, dtype=dtype, device=device)
    host = torch.frombuffer(copy, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
