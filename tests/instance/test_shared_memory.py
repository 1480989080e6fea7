"""Split decode steps as graphs, between real processes: on a GPU each, on one for all, or in Triton's interpreter."""

from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, PretrainedConfig

from instance.load import random_model
from instance.shared_memory import FeedMemory, counted
from tests.support.tiny import SIZES
from tests.support.workers import run_workers

KINDS: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, {}),
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 9.0, "layer_types": ["full_attention"] * 2}),
}


@pytest.mark.parametrize(
    ("kind", "size", "hidden", "dtype"),
    [("llama", 2, 64, "float32"), ("llama", 2, 64, "float16"), ("gemma2", 3, 64, "float32"), ("llama", 2, 2048, "bfloat16")],
)
def test_split_steps_as_graphs_are_whole_ones_run_eagerly(
    kind: str, size: int, hidden: int, dtype: str, tmp_path: Path
) -> None:
    """One row takes the kernel for one row where matrices are wide (2,048 in bf16)."""
    if hidden > 64 and not torch.cuda.is_available():
        pytest.skip("takes too long in the interpreter")
    config, more = KINDS[kind]
    sizes = SIZES | {"hidden_size": hidden, "intermediate_size": 2 * hidden, "head_dim": 16}
    model = random_model(config(**(sizes | more)), torch.float32, torch.device("cpu"), seed=5)
    model.module.save_pretrained(tmp_path / "model")
    said = run_workers("shared_worker.py", size, size, tmp_path, dtype, timeout_s=240)
    assert all("EQUAL" in its for its in said), "\n".join(its[-3000:] for its in said)


def test_memory_for_what_an_8b_shape_sends() -> None:
    inboxes = FeedMemory.inboxes(
        parts=2, rows=64, hidden_size=4096, vocab_size=128_257, dtype=torch.bfloat16, device=torch.device("meta")
    )
    assert [tuple(its.shape) for its in inboxes.values()] == [(2, 1, 64, 2048), (2, 1, 64, 2048), (2, 1, 64, 32066)]
    assert counted(inboxes["logits"]) == 64 * 32
