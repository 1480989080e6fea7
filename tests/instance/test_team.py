"""Ranks that share a model, between real processes: by Gloo on the CPU, by NCCL on a GPU each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.support.tiny import SIZES
from tests.support.workers import run_workers


@pytest.mark.skipif(0 < torch.cuda.device_count() < 2, reason="needs two GPUs, or none")
@pytest.mark.parametrize(
    ("ranks", "hidden", "dtype", "experts"),
    [(2, 64, "float32", 0), (3, 64, "float32", 0), (2, 64, "float32", 4), (2, 2048, "bfloat16", 0), (2, 2048, "bfloat16", 4)],
)
def test_decode_steps_as_graphs_are_those_run_eagerly(
    ranks: int, hidden: int, dtype: str, experts: int, tmp_path: Path
) -> None:
    """One row takes the kernel for one row where matrices are wide (2,048 in bf16): nothing rides along with its product. Each
    expert has as many inner dims as an MLP."""
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    if hidden > 64 and not torch.cuda.is_available():
        pytest.skip("takes too long in the interpreter")
    sizes = SIZES | {"hidden_size": hidden, "intermediate_size": 2 * hidden, "head_dim": 16}
    if experts:
        model: Any = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=experts, num_experts_per_tok=2))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / "model")
    said = run_workers("team_worker.py", ranks, ranks, tmp_path, dtype, timeout_s=200)
    assert all("EQUAL" in its for its in said), "\n".join(its[-3000:] for its in said)
