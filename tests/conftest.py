"""Fixtures for all tests."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, and transformers does

from tests.support.farm import Farm

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background: what tests start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


settings.register_profile("here", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("here")


@pytest.fixture(scope="session")
def farm() -> Iterator[Farm]:
    """Worker processes that live as long as the test session."""
    workers = Farm()
    yield workers
    workers.close()
