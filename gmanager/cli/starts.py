"""Where each start of `distattn up` keeps its logs: a folder of its own, of which the last few stay."""

import datetime
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEPT = 10
"""Starts whose logs stay, the present one among them."""
_NAME = re.compile(r"\d{4}-\d\d-\d\d-\d{6}-\d+")


def logs_of_this_start(folder: Path) -> Path:
    """A folder of its own in `folder`: no start writes over the logs of another. It is not made yet."""
    return folder / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S}-{os.getpid()}"


@contextmanager
def in_use(logs: Path) -> Iterator[None]:
    """Make the folder of a start, and delete those of old ones. None is deleted whose start is still in here."""
    logs.mkdir(parents=True, exist_ok=True)
    own = _locked(logs)
    try:
        if own is not None:  # else nobody else's lock would tell us anything either
            _prune(logs.parent)
        yield
    finally:
        if own is not None:
            os.close(own)


def _prune(folder: Path) -> None:
    starts = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink())
    for path in starts[:-KEPT]:
        lock = _locked(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A lock on a folder, until it is closed or this process ends; None if another has it, or there is no such lock here."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
