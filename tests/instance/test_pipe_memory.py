"""Rows from stage to stage through each other's memory, between two real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_go_round_and_waits_can_be_ended(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "support" / "pipe_worker.py")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    processes = [
        subprocess.Popen(
            [*command, str(stage), str(tmp_path)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for stage in range(2)
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("WENT ROUND" in its for its in said), "\n".join(its[-3000:] for its in said)
