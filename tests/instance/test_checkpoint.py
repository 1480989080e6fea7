"""A checkpoint's weights are all its own: what it lacks is not made up."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from instance.checkpoint import CheckpointError, convert_gguf
from instance.load import load_model
from tests.support.tiny import make_model

CPU = torch.device("cpu")


def change(path: Path, *, config: dict[str, Any] | None = None, drop: str = " ", add: dict[str, Any] | None = None) -> None:
    settings = path / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | (config or {})))
    weights = {name: weight for name, weight in load_file(path / "model.safetensors").items() if drop not in name}
    save_file(weights | (add or {}), path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"config": {"num_hidden_layers": 3}},
            r"lacks 9 of the weights .*: model\.layers\.2\.input_layernorm\.weight, .*, \.\.\.$",
        ),
        ({"drop": "lm_head"}, r"lacks 1 of the weights that its config asks for: lm_head\.weight$"),
        ({"drop": "embed_tokens"}, r"lacks 1 of .*: model\.embed_tokens\.weight$"),
        (
            {"config": {"vocab_size": 200}},
            r"has 2 weights of other shapes .*: lm_head\.weight \(\(300, 64\), not \(200, 64\)\), ",
        ),
    ],
)
def test_a_checkpoint_that_lacks_weights_is_refused_by_their_names(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    change(make_model("llama", tmp_path), **changed)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("stored", ["lm_head", "embed_tokens"])
def test_of_two_that_are_one_either_is_enough(stored: str, tmp_path: Path) -> None:
    change(make_model("llama", tmp_path), config={"tie_word_embeddings": True}, drop=stored)
    load_model(tmp_path, torch.float32, CPU)


def test_weights_that_nothing_reads_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(make_model("llama", tmp_path), add={f"mtp.{i}": torch.zeros(3) for i in range(5)})
    load_model(tmp_path, torch.float32, CPU)
    (told,) = [vars(record) for record in caplog.records if record.name == "instance"]
    assert (told["levelname"], told["weights"], told["first"]) == ("WARNING", 5, "mtp.0, mtp.1, mtp.2, ...")


def test_a_gguf_file_that_lacks_weights_is_not_converted(tmp_path: Path) -> None:
    file, cache = tmp_path / "model.gguf", tmp_path / "cache"
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_tensor("token_embd.weight", np.ones((64, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"model\.gguf lacks \d+ of the weights .*model\.layers\.0"):
        convert_gguf(file, cache)
    assert [path.name for path in cache.iterdir() if path.suffix not in (".lock", ".partial")] == []
