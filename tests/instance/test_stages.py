"""A model's layers in stages: each is loaded alone, and rows that go through all of them are those of the whole model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import MiniCPM3Config, SmolLM3Config, SmolLM3ForCausalLM

from instance.errors import UnsupportedModel
from instance.fused import OwnRow
from instance.load import load_model, refuse_unsplit
from instance.memory import loaded_bytes
from instance.model import Model
from instance.split import Place
from kvstore.sight import FULL
from tests.support.tiny import SIZES, make_model

CPU = torch.device("cpu")
LAYERS = 5


def stages(path: Path, layers: tuple[int, ...]) -> list[Model]:
    return [
        load_model(path, None, CPU, place=Place(stage=stage, stages=len(layers), layers=layers)) for stage in range(len(layers))
    ]


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_rows_through_all_stages_are_those_of_the_model(kind: str, is_tied: bool, is_fused: bool, tmp_path: Path) -> None:
    if kind == "gemma2":  # rows are scaled where they enter
        path = make_model("gemma2", tmp_path, num_hidden_layers=LAYERS, layer_types=["full_attention"] * LAYERS)
    else:
        path = make_model(kind, tmp_path, num_hidden_layers=LAYERS, tie_word_embeddings=is_tied)
    whole, parts = load_model(path, None, CPU), stages(path, (2, 1, 2))
    assert [part.num_layers for part in parts] == [2, 1, 2]
    embeddings = whole.module.get_input_embeddings().weight.numel()
    for part in parts[1:]:
        assert part.num_parameters() < whole.num_parameters() - embeddings, "no stage but the first has the embeddings"
    head = parts[0].module.get_output_embeddings()
    assert (head.weight is parts[0].module.get_input_embeddings().weight) == (is_tied and kind != "gemma2")
    for part in parts:
        assert loaded_bytes(path, None, None, part.place) == part.weight_bytes()
    if is_fused:
        assert [model.fuse("torch") for model in (whole, *parts)] == [None] * 4
    for model in (whole, *parts):
        model.context.attention = OwnRow(model.shape, "torch")
    ids, places = torch.tensor([5, 77, 256, 3, 9]), torch.tensor([0, 5, 100, 7, 511])
    with torch.inference_mode():
        want = whole.forward(ids, places, torch.tensor([4, 1]))
        rows = None
        for part in parts:
            rows = part.run_stage(ids, places, rows)
        assert rows is not None
        got = parts[0].logits(parts[0].behind_stages(rows[torch.tensor([4, 1])]), torch.arange(2))
        assert (parts[2].run_stage(ids, places, rows, stores_only=True) is None) == is_fused
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_layers_that_see_differently_have_the_same_tables_in_all_stages(tmp_path: Path) -> None:
    """A window and all, in turns: the first stage and the last have but windows."""
    path = make_model("gemma2", tmp_path, num_hidden_layers=LAYERS)
    whole, its = load_model(path, None, CPU), stages(path, (1, 3, 1))
    assert {model.shape.sights for model in its} == {whole.shape.sights}
    assert [model.shape.layers_of_block(model.num_layers) for model in its] == [1, 2, 1]
    seen = [model.shape.layer(layer).sight for model in its for layer in range(model.num_layers)]
    assert seen == [whole.shape.layer(layer).sight for layer in range(LAYERS)]
    short = load_model(path, None, CPU, 20, place=Place(stage=2, stages=3, layers=(1, 3, 1)))
    assert short.shape.sights == (FULL,), "no text is longer than the window"


def test_what_a_config_says_of_layers_by_their_number_is_shifted(tmp_path: Path) -> None:
    """SmolLM3's layers without rotary: each fourth. Rows of the stages are those of the whole."""
    config = SmolLM3Config(**SIZES | {"num_hidden_layers": 6, "pad_token_id": 0})
    SmolLM3ForCausalLM(config).save_pretrained(tmp_path)
    whole, its = load_model(tmp_path, None, CPU), stages(tmp_path, (2, 4))
    layers = [layer for model in its for layer in model.module.get_decoder().layers]  # type: ignore[no-untyped-call]
    assert [layer.self_attn.use_rope for layer in layers] == [1, 1, 1, 0, 1, 1]
    assert [layer.self_attn.use_rope for layer in whole.module.get_decoder().layers] == [1, 1, 1, 0, 1, 1]  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("stage", [0, 1])
def test_layers_that_are_others_in_a_stage_are_refused(stage: int, tmp_path: Path) -> None:
    """MiniCPM3 scales what a layer adds by how many there are. All ranks say so."""
    latents = {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    MiniCPM3Config(**SIZES, **latents).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="layer 0 has another residual_scale in stage 0 than in the whole model"):
        refuse_unsplit(tmp_path, Place(stage=stage, stages=2))


def test_wrong_numbers_of_layers_are_refused_before_there_are_weights(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path, num_hidden_layers=LAYERS)
    (path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match="llama: it has 5 layers, and --pp-layers 2,2 are 4"):
        stages(path, (2, 2))
    with pytest.raises(UnsupportedModel, match=r"llama: it has 5 layers, which 6 stages can't share \(--pp\)"):
        load_model(path, None, CPU, place=Place(stages=6))


def test_what_a_stage_lacks_is_named_as_in_the_checkpoint(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path, num_hidden_layers=LAYERS)
    index = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(index | {"num_hidden_layers": 6}))
    with pytest.raises(ValueError, match=r"lacks 9 of the weights .*model\.layers\.5\."):
        stages(path, (3, 3))


def test_ranks_hold_a_tied_head_once(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path, num_hidden_layers=LAYERS, tie_word_embeddings=True)
    module = load_model(path, None, CPU, place=Place(part=1, parts=2)).module
    head, embeddings = module.get_output_embeddings().weight, module.get_input_embeddings().weight
    assert head.data_ptr() == embeddings[len(embeddings) // 2 :].data_ptr()
