"""Rows from stage to stage through each other's memory, between two real processes."""

from pathlib import Path

import pytest
import torch

from tests.support.workers import run_workers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_go_round_and_waits_can_be_ended(tmp_path: Path) -> None:
    said = run_workers("pipe_worker.py", 2, tmp_path, timeout_s=100)
    assert all("WENT ROUND" in its for its in said), "\n".join(its[-3000:] for its in said)
