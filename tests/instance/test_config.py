"""Settings are complete and checked before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from instance.__main__ import parse
from instance.checkpoint import CheckpointError, resolve_checkpoint
from instance.config import InstanceConfig, Launch
from instance.start import load
from tests.support.tiny import make_model

LAUNCH = Launch(rank=1, local_rank=1, world_size=2, run_id="x")
NEEDED = ["--gmanager", "tcp://127.0.0.1:5570", "--model", "m", "--kv-tokens", "100"]


def config(**other: Any) -> InstanceConfig:
    settings: dict[str, Any] = {
        "gmanager": "tcp://127.0.0.1:1",
        "model": "m",
        "kv_tokens": 64,
        "launch": LAUNCH,
        "device": "cpu",
        "cell_size": 2,
    }
    return InstanceConfig(**(settings | other))


def test_only_torchruns_names_are_read() -> None:
    environment = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "r", "MASTER_ADDR": "nowhere"}
    assert Launch.from_environment(environment) == Launch(rank=1, local_rank=0, world_size=3, run_id="r")
    with pytest.raises(ValueError, match="start instances with torchrun .* WORLD_SIZE, TORCHELASTIC_RUN_ID not set"):
        Launch.from_environment({"RANK": "1", "LOCAL_RANK": "0"})
    with pytest.raises(ValueError, match="got 3 of 3"):
        Launch.from_environment(environment | {"RANK": "3"})


def test_auto_is_resolved_once() -> None:
    parsed = parse([*NEEDED, "--device", "cpu"], LAUNCH)
    assert (parsed.block_size, parsed.chunk_tokens, parsed.cell_size, parsed.backend) == (16, 512, 2, "torch")
    assert parsed.num_blocks == 6  # 100 tokens, rounded down to blocks
    assert parsed.threads >= 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kv_tokens": 15}, "--kv-tokens 15 is less than one block of 16 tokens"),
        ({"block_size": 0}, "--block-size must be at least 1, got 0"),
        ({"chunk_tokens": -1}, "--chunk-tokens must be at least 1, got -1"),
        ({"threads": 0}, "--threads must be at least 1, got 0"),
        ({"cell_size": 0}, "--cell-size must be at least 1, got 0"),
        ({"dtype": "int8"}, "--dtype must be one of auto, float32, float16, bfloat16, got int8"),
        ({"host": "0.0.0.0"}, "--host '0.0.0.0' is no address that the other instances could dial"),
        ({"cell": ""}, "--cell must not be empty"),
        ({"gmanager": "127.0.0.1:5570"}, "--gmanager: an address looks like tcp://127.0.0.1:5570, got '127.0.0.1:5570'"),
    ],
)
def test_wrong_settings_are_refused_with_their_numbers(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**wrong)


def test_a_checkpoint_is_found_or_said_to_be_missing(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path / "llama")
    assert resolve_checkpoint(str(path)) == path
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "weights.bin").write_bytes(b"")
    for model, message in (
        (tmp_path / "none.gguf", "there is no file .*none.gguf"),
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "pickled", r"has no weights in safetensors; pytorch_model.bin can't be loaded"),
        (tmp_path / "weights.bin", "is neither a directory nor a .gguf file"),
        (tmp_path / "nowhere", r"there is no directory or file .*, and it is no hub id"),
    ):
        with pytest.raises(CheckpointError, match=message):
            resolve_checkpoint(str(model))


def test_a_hub_id_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network here: what can be shown is that the hub's own client is asked, and its answer is understood."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="'some-org/some-model' is no local path, and could not be had from the hub: "):
        resolve_checkpoint("some-org/some-model")


@pytest.mark.parametrize("damage", ["truncated", "other shapes", "no tokenizer", "no config"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    path = make_model("llama", tmp_path)
    weights = path / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "other shapes":
        weights.write_bytes((make_model("qwen2", tmp_path / "other") / "model.safetensors").read_bytes()[:100] + b"junk")
    elif damage == "no tokenizer":
        for file in path.glob("*token*"):
            file.unlink()
    else:
        (path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(CheckpointError, match="can't be loaded"):
        load(config(model=str(path)))
