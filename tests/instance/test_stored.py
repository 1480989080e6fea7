"""Checkpoints of 8 bits a weight, in each published form, answer as the plain weights that they stand for."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MixtralConfig

from instance.checkpoint import CheckpointError
from instance.errors import UnsupportedModel
from instance.exact import eager_logits, refuse_inexact
from instance.load import load_model, refuse_by_config
from instance.memory import loaded_bytes
from instance.quantised import QuantisedLinear, matrix_of, quantised_parts
from instance.size import main
from instance.split import Place
from kernels.products import Quantised, dequantise
from tests.support.exactness import ask, prompt
from tests.support.farm import Farm, Setup
from tests.support.service import serve
from tests.support.tiny import CONFIGS, make_tokenizer

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 192,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def compressed(kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **more}
    rows = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": rows}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


FORMS: dict[str, dict[str, Any]] = {
    "compressed-tensors, a scale each feature": compressed("float", "channel"),
    "compressed-tensors, one scale": compressed("float", "tensor"),
    "compressed-tensors, blocks": compressed("float", "block", block_structure=[128, 128]),
    "compressed-tensors, integers": compressed("int", "channel"),
    "compressed-tensors, groups of integers": compressed("int", "group", group_size=32),
    "fine-grained": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "fp8, one scale": {"quant_method": "fp8", "activation_scheme": "static"},
}


def store(weight_NE: torch.Tensor, settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What is stored of a weight, by the ends of its names, and the weight that this stands for."""
    num_out, num_in = weight_NE.shape
    first: dict[str, Any] = settings.get("config_groups", {}).get("group_0", {}).get("weights", {})
    is_whole = first.get("type") == "int"
    block = settings.get("weight_block_size") or first.get("block_structure")
    strategy = first.get("strategy", "block" if block else "tensor")
    rows, columns = (
        block or {"tensor": weight_NE.shape, "channel": (1, num_in), "group": (1, first.get("group_size"))}[strategy]
    )
    padded = torch.zeros(-(-num_out // rows) * rows, -(-num_in // columns) * columns)
    padded[:num_out, :num_in] = weight_NE
    tiles = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))  # blocks of rows, rows, blocks of columns, columns
    scale = tiles.abs().amax((1, 3)).clamp_min(1e-9) / (127 if is_whole else 448)
    if strategy == "channel":
        scale = scale.bfloat16().float()  # as most have it
    scaled = tiles / scale[:, None, :, None]
    numbers = scaled.round().clamp(-127, 127).to(torch.int8) if is_whole else scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    full = (numbers.float() * scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:num_out, :num_in]
    stored = numbers.float().flatten(2, 3).flatten(0, 1)[:num_out, :num_in].to(numbers.dtype).contiguous()
    name = "weight_scale_inv" if settings.get("weight_block_size") else "weight_scale"
    kept = scale.reshape(()) if strategy == "tensor" and first else scale.reshape(1) if strategy == "tensor" else scale
    parts = {"weight": stored, name: kept.bfloat16() if strategy == "channel" else kept}
    if settings.get("activation_scheme") == "static":
        parts["input_scale"] = torch.ones(1)
    return parts, full.contiguous()


def make_stored(folder: Path, config: Any, settings: dict[str, Any]) -> tuple[Path, Path]:
    """A tiny model stored so but for its plain linear layers, and the same with plain weights."""
    torch.manual_seed(1)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    stored, twin = folder / "stored", folder / "plain"
    for path in (stored, twin):
        model.save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    weights = load_file(twin / "model.safetensors")
    kept: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        base = name.removesuffix(".weight")
        is_plain = weight.dim() != 2 or "embed" in name or base.endswith(("lm_head", "gate"))
        if is_plain:
            kept[name] = weight
            continue
        parts, weights[name] = store(weight, settings)
        kept |= {f"{base}.{part}": one for part, one in parts.items()}
    save_file(kept, stored / "model.safetensors", metadata={"format": "pt"})
    save_file(weights, twin / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((stored / "config.json").read_text()) | {"quantization_config": settings}
    (stored / "config.json").write_text(json.dumps(told))
    return stored, twin


@pytest.mark.parametrize("form", FORMS)
def test_each_form_answers_as_the_weights_that_it_stands_for(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "instance")
    config = LlamaConfig(**SIZES, attention_bias=True)
    stored, plain = (load_model(path, torch.float32, CPU) for path in make_stored(tmp_path, config, FORMS[form]))
    parts = quantised_parts(stored.module)
    assert len(parts) == 2 * 7
    assert {part.weight.dtype for part in parts} == {torch.int8 if "integers" in form else torch.float8_e4m3fn}
    assert type(stored.module) is type(plain.module)
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(3)).tolist()
    want = eager_logits(plain.module, ids, [0])
    assert float((eager_logits(stored.module, ids, [0]) - want).norm() / want.norm()) < 1e-6
    refuse_inexact(stored, form, block_size=16, backend="torch")
    assert stored.fuse("torch") is None
    refuse_inexact(stored, form, block_size=16, backend="torch")
    (told,) = [vars(record) for record in caplog.records if record.name == "instance"]
    assert (told["matrices"], told["dequantised"]) == (14, 0)
    assert loaded_bytes(tmp_path / "stored", torch.float32, None) == stored.weight_bytes() < plain.weight_bytes() * 0.6
    assert main([str(tmp_path / "stored"), "--device", "cpu", "--dtype", "float32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == stored.weight_bytes()


@pytest.mark.parametrize("form", ["compressed-tensors, a scale each feature", "fine-grained"])
async def test_a_stored_checkpoint_is_served_as_its_plain_twin(form: str, farm: Farm, tmp_path: Path) -> None:
    stored, plain = make_stored(tmp_path, LlamaConfig(**SIZES), FORMS[form])
    ids = prompt(plain, 120)
    async with serve(farm, 2, Setup(model=stored, chunk_tokens=24)) as service:
        await ask(service.client, plain, ids, spread="all")


@pytest.mark.parametrize("kind", ["mixtral", "deepseek"])
def test_what_has_no_linear_layer_of_ours_is_dequantised(kind: str, tmp_path: Path) -> None:
    """Experts that are merged as they are loaded, and what latent attention takes apart."""
    config: Any = CONFIGS["deepseek"] if kind == "deepseek" else MixtralConfig(**SIZES, num_local_experts=4)
    assert isinstance(config, DeepseekV3Config | MixtralConfig)
    stored, plain = (load_model(path, torch.float32, CPU) for path in make_stored(tmp_path, config, FORMS["fine-grained"]))
    assert quantised_parts(stored.module)
    assert bool(stored.shape.value_dim) == (kind == "deepseek")
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(3)).tolist()
    want = eager_logits(plain.module, ids, [0])
    assert float((eager_logits(stored.module, ids, [0]) - want).norm() / want.norm()) < 1e-5
    refuse_inexact(stored, kind, block_size=16, backend="torch")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "packed": (
        {**compressed("int", "group", num_bits=4, group_size=128), "format": "pack-quantized"},
        r"quant_method compressed-tensors, format pack-quantized, 4 bits \(int\), a scale for each group, symmetric",
    ),
    "asymmetric": (compressed("int", "channel", symmetric=False), "format int-quantized, 8 bits .*, not symmetric"),
    "two groups": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": {"weights": {"num_bits": 8}}, "b": {"weights": {"num_bits": 4}}},
        },
        "quant_method compressed-tensors, 2 groups of layers",
    ),
    "sparse": ({**compressed("float", "channel"), "sparsity_config": {"format": "sparse-24-bitmask"}}, "symmetric, sparse"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, "quant_method awq, 4 bits; read are"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quant_method gptq, 4 bits; read are"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method bitsandbytes; read are"),
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, "quant_method fp8, format e5m2"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_form_is_refused_before_weights_are_looked_at(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, message = REFUSED[kind]
    told = LlamaConfig(**SIZES, dtype="bfloat16").to_dict() | {"quantization_config": settings, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(told))
    sentence = f"^{tmp_path}: its weights are stored in a form that isn't read: .*{message}"
    with pytest.raises(UnsupportedModel, match=sentence):
        refuse_by_config(tmp_path)
    with pytest.raises(UnsupportedModel, match=sentence):
        load_model(tmp_path, None, CPU)
    assert main([str(tmp_path), "--device", "cpu"]) == 2
    assert "its weights are stored in a form that isn't read: " in capsys.readouterr().err


def test_what_is_of_8_bits_is_not_quantised_again(tmp_path: Path) -> None:
    stored, _ = make_stored(tmp_path, LlamaConfig(**SIZES), FORMS["fine-grained"])
    for refuse in (lambda: refuse_by_config(stored, quantize="int8"), lambda: load_model(stored, None, CPU, quantize="int8")):
        with pytest.raises(UnsupportedModel, match=r"are of 8 bits already \(fp8, fp8\): leave out --quantize int8$"):
            refuse()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layers.1.mlp.up_proj.weight_scale_inv": None},
            r"has 1 weights of 8 bits without weight_scale_inv: model\.layers\.1",
        ),
        (
            {"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(2, 1)},
            r"q_proj has scales \(2, 1\) for weights 192 x 192",
        ),
        (
            {"model.layers.0.self_attn.q_proj.weight": torch.zeros(192, 192, dtype=torch.int8)},
            r"has 1 weights that aren't fp8, as",
        ),
        (
            {"model.layers.0.self_attn.q_proj.weight": None},
            r"lacks 1 of the weights .*: model\.layers\.0\.self_attn\.q_proj\.weight$",
        ),
        (
            {"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)},
            "scales of type I32 aren't read",
        ),
    ],
)
def test_what_lacks_a_part_is_refused(change: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    stored, _ = make_stored(tmp_path, LlamaConfig(**SIZES), FORMS["fine-grained"])
    file = stored / "model.safetensors"
    weights: dict[str, Any] = load_file(file) | change
    save_file({name: weight for name, weight in weights.items() if weight is not None}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_model(stored, None, CPU)


def test_a_config_that_says_so_of_plain_weights_is_refused(tmp_path: Path) -> None:
    _, plain = make_stored(tmp_path, LlamaConfig(**SIZES), FORMS["fine-grained"])
    settings = json.loads((plain / "config.json").read_text()) | {"quantization_config": FORMS["fine-grained"]}
    (plain / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="its config says fp8, and none of its weights is of 8 bits"):
        load_model(plain, None, CPU)
    assert AutoConfig.from_pretrained(plain).model_type == "llama"


ALONG = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "up_proj": 0, "o_proj": 1, "down_proj": 1}
"""On which side tensor parallelism splits each matrix."""


@pytest.mark.parametrize("form", [*FORMS, "int8", "fp8"])
@pytest.mark.parametrize("degree", ["tp", "pp"])
def test_parts_of_a_model_have_parts_of_its_weights_of_8_bits(form: str, degree: str, tmp_path: Path) -> None:
    """Two parts, put together, are the whole."""
    config = LlamaConfig(**SIZES, attention_bias=True)
    stored, plain = make_stored(tmp_path, config, FORMS.get(form, FORMS["fine-grained"]))
    path = stored if form in FORMS else plain
    quantize: Any = None if form in FORMS else form
    places = [Place(part=i, parts=2) if degree == "tp" else Place(stage=i, stages=2) for i in range(2)]
    parts = [load_model(path, torch.float32, CPU, quantize=quantize, place=place) for place in places]
    for name, weight in load_file(plain / "model.safetensors").items():
        base, _, kind = name.rpartition(".")
        side = ALONG.get(base.rpartition(".")[2])
        if kind != "weight" or side is None:
            continue
        if degree == "tp":
            matrices = [matrix_of(part.module.get_submodule(base)) for part in parts]
        else:
            stage = int(base.split(".")[2])
            matrices = [matrix_of(parts[stage].module.get_submodule(base.replace(f".{stage}.", ".0.")))]
        assert isinstance(matrices[0], Quantised) or side == 1
        both = [one if isinstance(one, torch.Tensor) else dequantise(one, torch.float32, backend="torch") for one in matrices]
        got = torch.cat(both, side)
        assert got.shape == weight.shape
        assert float((got.detach() - weight).norm() / weight.norm()) < (1e-6 if form in FORMS else 0.04)
    for place, part in zip(places, parts, strict=True):
        assert loaded_bytes(path, torch.float32, quantize, place) == part.weight_bytes()


def test_where_a_part_begins_within_a_block_the_matrix_is_dequantised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """192 and 160 features in are both split at 96, and 128 share a scale."""
    caplog.set_level(logging.INFO, "instance")
    path, _ = make_stored(tmp_path, LlamaConfig(**SIZES), FORMS["fine-grained"])
    for part in range(2):  # on all ranks alike: they warm up together
        load_model(path, torch.float32, CPU, place=Place(part=part, parts=2))
        told = vars(caplog.records[-1])
        assert (told["matrices"], told["plain"]) == (10, 4)


@pytest.mark.parametrize(
    ("form", "degree"), [("fine-grained", {"tp": 2}), ("compressed-tensors, integers", {"tp": 3, "pp": 2})]
)
async def test_ranks_that_share_a_stored_checkpoint_answer_as_its_plain_twin(
    form: str, degree: dict[str, int], farm: Farm, tmp_path: Path
) -> None:
    stored, plain = make_stored(tmp_path, LlamaConfig(**SIZES), FORMS[form])
    async with serve(farm, 1, Setup(model=stored, chunk_tokens=24, **degree)) as service:
        await ask(service.client, plain, prompt(plain, 120))


@pytest.mark.parametrize("is_tied", [False, True])
async def test_ranks_choose_scales_for_their_own_parts(is_tied: bool, farm: Farm, tmp_path: Path) -> None:
    """Two ranks and `--quantize` answer as the plain weights that both parts' stand for."""
    config = LlamaConfig(**SIZES | {"tie_word_embeddings": is_tied, "vocab_size": 301})  # one rank has less of the head
    _, plain = make_stored(tmp_path, config, FORMS["fine-grained"])
    twin = tmp_path / "twin"
    shutil.copytree(plain, twin)
    weights = load_file(twin / "model.safetensors")
    parts = [load_model(plain, torch.float32, CPU, quantize="int8", place=Place(part=i, parts=2)).module for i in range(2)]
    for name, its in parts[0].named_modules():
        if isinstance(its, QuantisedLinear):
            both = [dequantise(matrix_of(part.get_submodule(name)), torch.float32, backend="torch") for part in parts]  # type: ignore[arg-type]
            weights[f"{name}.weight"] = torch.cat(both, ALONG.get(name.rpartition(".")[2], 0))
    if not is_tied:
        weights["lm_head.weight"] = weights["lm_head.weight"][:301]  # without padding
    save_file(weights, twin / "model.safetensors", metadata={"format": "pt"})
    async with serve(farm, 1, Setup(model=plain, quantize="int8", chunk_tokens=24, tp=2)) as service:
        await ask(service.client, twin, prompt(twin, 120))


@pytest.mark.parametrize("degree", ["tp", "pp"])
@pytest.mark.parametrize("is_stored", [False, True])
def test_a_checkpoint_of_other_sizes_than_its_config_is_refused(is_stored: bool, degree: str, tmp_path: Path) -> None:
    """A part of what is larger would fit, and answer wrongly."""
    path = make_stored(tmp_path, LlamaConfig(**SIZES), FORMS["fine-grained"])[0 if is_stored else 1]
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"intermediate_size": 128}))
    place = Place(part=0, parts=2) if degree == "tp" else Place(stage=1, stages=2)
    with pytest.raises(
        CheckpointError, match=r"_proj.weight is \((160, 192|192, 160)\), and \((128, 192|192, 128)\) by the config"
    ):
        load_model(path, torch.float32, CPU, place=place)


def test_a_rank_may_have_nothing_of_a_small_vocabulary(tmp_path: Path) -> None:
    path = make_stored(tmp_path, LlamaConfig(**SIZES | {"vocab_size": 5, "num_key_value_heads": 6}), FORMS["fine-grained"])[0]
    head = load_model(path, torch.float32, CPU, place=Place(part=3, parts=4)).module.get_output_embeddings()
    assert head.weight.shape == (2, 192) and not head.weight.any()
