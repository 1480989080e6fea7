"""Words in a GPU's memory that a stream waits for and writes without a kernel.

A kernel that waits holds a processor; a matrix product whose programs are as many as there are processors then takes twice as
long. The driver's memory operations wait in front of the stream instead. Source: CUDA driver API, "Stream Memory Operations".
"""

import functools
from typing import Any

import torch

from kernels.driver import call, driver


class StreamWords:
    """Of one process; for the current stream of whoever calls."""

    def __init__(self) -> None:
        """Raises DriverError if the driver has no binding."""
        self._driver = driver()

    def wait(self, address: int, least: int) -> None:
        """Until the int32 there is `least` or more. It is compared by their difference, so a count may run over."""
        at_least = self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        self._call("cuStreamWaitValue32", address, least, at_least)

    def write(self, address: int, value: int) -> None:
        """An int32, perhaps into another GPU's memory, once all that the stream did before can be seen there."""
        in_order = self._driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
        self._call("cuStreamWriteValue32", address, value, in_order)

    def _call(self, operation: str, address: int, value: int, flag: Any) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        call(operation, stream, address, value & 0xFFFFFFFF, int(flag))


@functools.cache
def stream_of_its_own(device: torch.device, name: str, priority: int = 0) -> torch.cuda.Stream:
    """The one of that name, for as long as the process lives.

    torch deals its streams out in turn, 32 of them: one of those may after a while be what it must not wait for. Raises
    DriverError.
    """
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).synchronize()  # the primary context is there from now on
        flag = driver().CUstream_flags.CU_STREAM_NON_BLOCKING
        (stream,) = call("cuStreamCreateWithPriority", int(flag), priority)
    wrap: Any = torch.cuda.ExternalStream  # its constructor has no types
    made: torch.cuda.Stream = wrap(int(stream), device=device)
    return made
