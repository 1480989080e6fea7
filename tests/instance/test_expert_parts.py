"""Mixtures of experts that ranks share: what the parts of an expert add up to, from all forms of checkpoints."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2MoeConfig

from instance.checkpoint import CheckpointError
from instance.errors import UnsupportedModel
from instance.load import load_model, refuse_unsplit
from instance.memory import loaded_bytes
from instance.split import Place
from tests.instance.test_packed import make_packed
from tests.instance.test_stored import FORMS, make_stored
from tests.support.tiny import CONFIGS, SIZES, make_model

CPU = torch.device("cpu")


def checkpoint(kind: str, folder: Path) -> Path:
    match kind:
        case "gpt-oss, packed":
            return make_packed(folder)[0]
        case "mixtral, fine-grained fp8":
            return make_stored(folder, CONFIGS["mixtral"], FORMS["fine-grained"])[0]
        case "mixtral, one expert":
            return make_model("mixtral", folder, num_local_experts=1, num_experts_per_tok=1)
    return make_model(kind, folder)


def experts_of(module: Any) -> list[Any]:
    return [layer.mlp.experts for layer in module.model.layers if hasattr(layer.mlp, "experts")]


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(
    "kind",
    [
        *("mixtral", "qwen3-moe", "gpt-oss", "deepseek"),
        *("mixtral, one expert", "gpt-oss, packed", "mixtral, fine-grained fp8"),
    ],
)
def test_the_parts_of_experts_add_up_to_the_whole(kind: str, parts: int, tmp_path: Path) -> None:
    """Matrices one by one or in one tensor, gate and up in turns or not, with biases, packed, of 8 bits. Sizes are foreseen."""
    path = checkpoint(kind, tmp_path)
    places = [Place(part=i, parts=parts) for i in range(parts)]
    whole, *split = (load_model(path, torch.float32, CPU, place=place) for place in (Place(), *places))
    seeded = torch.Generator().manual_seed(0)
    for experts, *its in zip(*(experts_of(model.module) for model in (whole, *split)), strict=True):
        rows, num_experts = 9, next(experts.parameters()).shape[0]
        x_TE = torch.randn(rows, whole.hidden_size, generator=seeded)
        experts_TS = torch.rand(rows, num_experts, generator=seeded).topk(min(2, num_experts)).indices
        weights_TS = torch.rand(experts_TS.shape, generator=seeded)
        with torch.inference_mode():
            want_TE = experts.forward(x_TE, experts_TS, weights_TS)
            got_TE = sum(part.forward(x_TE, experts_TS, weights_TS) for part in its)
        assert float((got_TE - want_TE).norm() / want_TE.norm()) < 1e-5
        sizes = [part.down_proj_blocks.shape[2] if "packed" in kind else part.down_proj.numel() for part in its]
        assert len(set(sizes)) <= 2
        assert sum(sizes) == (experts.down_proj_blocks.shape[2] if "packed" in kind else experts.down_proj.numel())
    for place, model in zip(places, split, strict=True):
        assert loaded_bytes(path, torch.float32, None, place) == model.weight_bytes()


@pytest.mark.parametrize("parts", [2, 3])
def test_shared_experts_are_split_and_routers_are_whole(parts: int, tmp_path: Path) -> None:
    """With what a router adds to its scores, which is no parameter."""
    path = make_model("deepseek", tmp_path, n_shared_experts=2)
    weights = load_file(path / "model.safetensors")
    added = "model.layers.1.mlp.gate.e_score_correction_bias"
    weights[added] = torch.arange(len(weights[added])) + 0.5
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    places = [Place(), *(Place(part=i, parts=parts) for i in range(parts))]
    whole, *split = (load_model(path, torch.float32, CPU, place=place).module.model.layers[1].mlp for place in places)
    x_TE = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want_TE = whole.shared_experts(x_TE)
        got_TE = sum(part.shared_experts(x_TE) for part in split)
    assert float((got_TE - want_TE).norm() / want_TE.norm()) < 1e-5
    for part in split:
        assert torch.equal(part.gate.weight, whole.gate.weight)
        assert torch.equal(part.gate.e_score_correction_bias, weights[added])


@pytest.mark.parametrize(("other", "number"), [({}, 3), ({"decoder_sparse_step": 2, "mlp_only_layers": []}, 2)])
def test_stages_have_the_experts_of_their_layers(other: dict[str, Any], number: int, tmp_path: Path) -> None:
    """Not in all layers, by number or by turns."""
    path = make_model("qwen3-moe", tmp_path, num_hidden_layers=4, **other)
    whole = load_model(path, torch.float32, CPU)
    stages = [load_model(path, torch.float32, CPU, place=Place(stage=i, stages=2, layers=(1, 3))) for i in range(2)]
    found = [experts for stage in stages for experts in experts_of(stage.module)]
    assert len(found) == number
    for got, want in zip(found, experts_of(whole.module), strict=True):
        assert torch.equal(got.gate_up_proj, want.gate_up_proj)
        assert torch.equal(got.down_proj, want.down_proj)


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    path = make_model("mixtral", tmp_path / "made")
    weights = load_file(path / "model.safetensors")
    lacks = {name: one for name, one in weights.items() if ".0.block_sparse_moe.experts.3.w2" not in name}
    save_file(lacks, path / "model.safetensors", metadata={"format": "pt"})
    sentence = "model.layers.0.mlp.experts.down_proj is of 4 experts by the config, and made of 3 matrices"
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        load_model(path, torch.float32, CPU, place=Place(part=1, parts=2))


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss"])
def test_experts_of_another_size_than_the_config_says_are_refused(kind: str, tmp_path: Path) -> None:
    path = make_model(kind, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"experts.* is \(.*\), and \(.*\) by the config"):
        load_model(path, torch.float32, CPU, place=Place(part=0, parts=2))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_parts_that_would_tear_blocks_of_packed_weights_are_refused(part: int, tmp_path: Path) -> None:
    """On all ranks, also where this one's are whole: part 0 would have 32 of the 64."""
    path = make_packed(tmp_path / "made", intermediate_size=64)[0]
    sentence = "gpt_oss: 64 inner dims of packed experts, in blocks of 32, can't be split between 3 ranks (--tp 3)"
    for split in (load_model, refuse_unsplit):
        with pytest.raises(UnsupportedModel, match=re.escape(sentence)):
            arguments: Any = (path, torch.float32, CPU) if split is load_model else (path,)
            split(*arguments, place=Place(part=part, parts=3))


@pytest.mark.parametrize(("kind", "dtype"), [("deepseek", "bfloat16"), ("gpt-oss", "float16"), ("qwen3-moe", "float32")])
@pytest.mark.parametrize("degree", ["tp", "pp"])
def test_parts_have_the_types_of_the_whole(kind: str, dtype: str, degree: str, tmp_path: Path) -> None:
    """What a model wants in fp32 is that; and what is asked for goes before what the config says."""
    path, asked = make_model(kind, tmp_path, num_hidden_layers=2), getattr(torch, dtype)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    whole = load_model(path, asked, CPU).module
    place = Place(part=1, parts=2) if degree == "tp" else Place(stage=0, stages=2)
    part = load_model(path, asked, CPU, place=place).module
    types = {name: weight.dtype for name, weight in whole.state_dict().items()}
    assert {types[name] for name in types} == ({asked} if dtype == "float32" else {asked, torch.float32})
    for name, weight in part.state_dict().items():
        assert weight.dtype == types[name], name


def test_what_a_router_adds_is_of_the_checkpoint_and_other_buffers_are_not(tmp_path: Path) -> None:
    path = make_model("deepseek", tmp_path)
    weights = load_file(path / "model.safetensors")
    stored = weights | {"model.rotary_emb.inv_freq": torch.zeros(8)}
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    part: Any = load_model(path, torch.float32, CPU, place=Place(part=0, parts=2)).module
    assert part.model.rotary_emb.inv_freq.all()
    del weights["model.layers.1.mlp.gate.e_score_correction_bias"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of the weights .*: model.layers.1.mlp.gate.e_score_correction_bias"):
        load_model(path, torch.float32, CPU, place=Place(part=0, parts=2))


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_all_parts_have_latents_or_none_has(part: int, tmp_path: Path) -> None:
    """144 numbers of one head, which is all that a part has, would be more than its keys and values."""
    path = make_model("deepseek", tmp_path, kv_lora_rank=128)
    assert load_model(path, torch.float32, CPU).shape.value_dim == 128
    assert load_model(path, torch.float32, CPU, place=Place(part=part, parts=4)).shape.value_dim == 128


@pytest.mark.parametrize("stage", [0, 1])
def test_layers_that_another_stage_has_are_refused_on_all_ranks(stage: int, tmp_path: Path) -> None:
    """A shared expert with a gate, in the second half."""
    sizes = SIZES | {"num_hidden_layers": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    Qwen2MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0, 1]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="qwen2_moe: --pp 2 splits layers that have the parts of Llama's, Gemma's or"):
        refuse_unsplit(tmp_path, Place(stage=stage, stages=2))
