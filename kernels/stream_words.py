"""Words in a GPU's memory that a stream waits for and writes without a kernel.

A kernel that waits holds a processor; a matrix product whose programs are as many as there are processors then takes twice as
long. The driver's memory operations wait in front of the stream instead. Source: CUDA driver API, "Stream Memory Operations".
"""

import functools
from typing import Any

import torch


class NoStreamWords(RuntimeError):
    """The driver, or its Python binding, has no such operations; the message says why."""


class StreamWords:
    """Of one process; for the current stream of whoever calls."""

    def __init__(self) -> None:
        """Raises NoStreamWords."""
        self._driver = _driver()

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
        _checked(operation, getattr(self._driver, operation)(stream, address, value & 0xFFFFFFFF, int(flag)))


@functools.cache
def stream_of_its_own(device: torch.device, name: str, priority: int = 0) -> torch.cuda.Stream:
    """The one of that name, for as long as the process lives.

    torch deals its streams out in turn, 32 of them: one of those may after a while be what it must not wait for. Raises
    NoStreamWords.
    """
    driver = _driver()
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).synchronize()  # the primary context is there from now on
        flag = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        (stream,) = _checked("cuStreamCreateWithPriority", driver.cuStreamCreateWithPriority(int(flag), priority))
    wrap: Any = torch.cuda.ExternalStream  # its constructor has no types
    made: torch.cuda.Stream = wrap(int(stream), device=device)
    return made


def _driver() -> Any:
    try:
        from cuda.bindings import driver  # type: ignore[import-not-found]  # torch for CUDA brings it
    except ImportError as error:
        raise NoStreamWords(f"cuda-bindings is missing ({error})") from error
    return driver


def _checked(operation: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    code, *rest = result
    if code != _driver().CUresult.CUDA_SUCCESS:
        raise NoStreamWords(f"{operation} failed with {code.name}")
    return tuple(rest)
