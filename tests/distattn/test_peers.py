"""Rows that travel one-sided inside CUDA graphs, between two real processes with a GPU each."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss", "minicpm3"])
def test_two_processes_answer_as_one_does(kind: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ROOT / "tests" / "support" / "peers_worker.py"
    done = subprocess.run(
        [*command, str(worker), kind], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False, env=_environment()
    )
    assert "EQUAL" in done.stdout, (done.stdout + done.stderr)[-4000:]


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
