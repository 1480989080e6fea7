"""Fixtures for all tests."""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, and transformers does

from tests.support.farm import Farm
from tests.support.processes import Processes, processes

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background: what tests start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


settings.register_profile("here", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("here")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws without a seed of its own is the same each time, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def farm() -> Iterator[Farm]:
    """Worker processes that live as long as the test session."""
    workers = Farm()
    yield workers
    workers.close()


@pytest.fixture
async def started(tmp_path: Path) -> AsyncIterator[Processes]:
    """What a test starts; all of it ends with the test."""
    async with processes(tmp_path) as ours:
        yield ours
