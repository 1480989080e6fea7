"""`scripts/make_dummy_model.py`: a checkpoint in one command."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import make_dummy_model
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, Qwen3Config

from gmanager.text.grammars import compile_grammar
from gmanager.wire.messages import StructuredOutputsParams
from instance.exact import refuse_inexact
from instance.load import load_model, load_text_assets
from tests.support.tiny import SIZES

SCRIPT = Path(make_dummy_model.__file__)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shape_becomes_a_checkpoint_that_is_served(dtype: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "tiny", str(tmp_path), "--dtype", dtype]
    assert subprocess.run(command, check=True, capture_output=True).stderr == b"", "no bars"
    model = load_model(tmp_path, None, torch.device("cpu"))
    assert model.shape.dtype == getattr(torch, dtype)
    assert (model.num_layers, model.vocab_size, model.max_context) == (2, 300, 8192)
    refuse_inexact(model, "tiny", block_size=16, backend="torch")
    assets = load_text_assets(tmp_path)
    tokenizer = Tokenizer.from_str(assets.tokenizer_json)
    assert tokenizer.get_vocab_size() == 300
    assert assets.chat_template is not None
    assert assets.eos_token_ids == [299]
    compile_grammar(StructuredOutputsParams(json='{"type": "object"}'), assets)
    assert tokenizer.decode([72, 299]).endswith("<|299|>")
    assert tokenizer.encode("<|299|>").ids != [299]
    assert tokenizer.decode(tokenizer.encode("Zwölf Nadeln").ids) == "Zwölf Nadeln"


def test_a_config_becomes_one_too(tmp_path: Path) -> None:
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=400,
    )
    config.save_pretrained(tmp_path / "shape")
    make_dummy_model.write(str(tmp_path / "shape" / "config.json"), tmp_path / "made", "float32")
    model = load_model(tmp_path / "made", None, torch.device("cpu"))
    assert (model.module.config.model_type, model.vocab_size) == ("qwen3", 400)
    assert load_text_assets(tmp_path / "made").eos_token_ids == [399]


@pytest.mark.parametrize("form", ["plain", "fp8"])
def test_all_layers_may_be_alike(form: Literal["plain", "fp8"], tmp_path: Path) -> None:
    config = LlamaConfig(**(SIZES | {"num_hidden_layers": 12, "vocab_size": 300, "eos_token_id": None}))  # type: ignore[arg-type]
    config.save_pretrained(tmp_path / "shape")
    make_dummy_model.write(str(tmp_path / "shape"), tmp_path / "made", "float32", alike=True, form=form)
    model = load_model(tmp_path / "made", None, torch.device("cpu"))
    assert model.num_layers == 12
    weights = dict(model.module.named_parameters())
    first, last = (weights[f"model.layers.{layer}.mlp.down_proj.weight"].float() for layer in (0, 11))
    assert torch.equal(first, last) and bool((first != 0).any())
    assert (weights["model.layers.3.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn) == (form == "fp8")
    refuse_inexact(model, "made", block_size=16, backend="torch")
    assert load_text_assets(tmp_path / "made").eos_token_ids == [299]


def test_layers_of_several_kinds_can_not_be_alike(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gemma3_text: its layers can't be alike, they are of several kinds"):
        make_dummy_model.write("gemma-3-27b", tmp_path, "float32", alike=True)


def test_what_is_no_shape_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a file nor one of tiny, "):
        make_dummy_model.config_of("llama-9")
    Qwen3Config(vocab_size=200).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="200 tokens is too small"):
        make_dummy_model.write(str(tmp_path), tmp_path / "made", "float32")
