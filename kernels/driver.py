"""CUDA's driver, for what torch has no words for."""

import functools
from typing import Any


class DriverError(RuntimeError):
    """The driver, or its Python binding, can't do what is asked; the message says why."""


@functools.cache
def driver() -> Any:
    """Its binding. Raises DriverError if there is none."""
    try:
        from cuda.bindings import driver as found  # type: ignore[import-not-found]  # torch for CUDA brings it
    except ImportError as error:
        raise DriverError(f"cuda-bindings is missing ({error})") from error
    return found


def call(name: str, *arguments: Any) -> Any:
    """What a function of it returns, in a list. Raises DriverError."""
    if not hasattr(driver(), name):
        raise DriverError(f"cuda-bindings has no {name}")
    code, *results = getattr(driver(), name)(*arguments)
    if code != driver().CUresult.CUDA_SUCCESS:
        raise DriverError(f"{name} failed with {code.name}")
    return results
