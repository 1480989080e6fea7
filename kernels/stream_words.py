"""Words in a GPU's memory that a stream waits for and writes without a kernel.

A kernel that waits holds a processor; a matrix product whose programs are as many as there are processors then takes twice as
long. The driver's memory operations wait in front of the stream instead. Source: CUDA driver API, "Stream Memory Operations".
"""

from typing import Any

import torch


class NoStreamWords(RuntimeError):
    """The driver, or its Python binding, has no such operations; the message says why."""


class StreamWords:
    """Of one process; for the current stream of whoever calls."""

    def __init__(self) -> None:
        """Raises NoStreamWords."""
        try:
            from cuda.bindings import driver  # type: ignore[import-not-found]  # torch for CUDA brings it
        except ImportError as error:
            raise NoStreamWords(f"cuda-bindings is missing ({error})") from error
        self._driver: Any = driver

    def wait(self, address: int, least: int) -> None:
        """Until the int32 there is `least` or more. It is compared by their difference, so a count may run over."""
        at_least = self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        self._call(self._driver.cuStreamWaitValue32, address, least, at_least)

    def write(self, address: int, value: int) -> None:
        """An int32, perhaps into another GPU's memory, once all that the stream did before can be seen there."""
        in_order = self._driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
        self._call(self._driver.cuStreamWriteValue32, address, value, in_order)

    def _call(self, operation: Any, address: int, value: int, flag: Any) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        (code,) = operation(stream, address, value & 0xFFFFFFFF, int(flag))
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise NoStreamWords(f"{operation.__name__} failed with {code.name}")
