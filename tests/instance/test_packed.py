"""gpt-oss as it is shipped: experts packed in blocks of 4-bit numbers stay so, and compute what these stand for."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from instance.checkpoint import CheckpointError
from instance.errors import UnsupportedModel
from instance.exact import eager_logits, refuse_inexact
from instance.load import load_model
from instance.memory import loaded_bytes
from instance.quantised import quantised_parts
from instance.size import main
from tests.support.exactness import ask, prompt
from tests.support.farm import Farm, Setup
from tests.support.service import serve
from tests.support.tiny import make_model

CPU = torch.device("cpu")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
"""By exponent and mantissa; the highest of the four bits is the sign."""
BIAS, LARGEST = 127, 2
"""Of a scale, a power of two in eight bits; exponent of the largest number, 6 = 1.5 x 2^2."""
BLOCK = 32


def pack(weight_EIO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks along the inputs of `[experts, in, out]`, after the OCP's MX formats: bytes `[E, O, I/32, 16]` with the first
    number of each two in the low bits, scales `[E, O, I/32]`; and the numbers that they stand for, as the weight has them."""
    experts, inputs, outputs = weight_EIO.shape
    numbers = weight_EIO.double().transpose(1, 2).reshape(experts, outputs, inputs // BLOCK, BLOCK)
    exponents = numbers.abs().amax(-1).clamp_min(2.0**-100).log2().floor() - LARGEST
    scaled = numbers / 2.0 ** exponents[..., None]
    codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
    values = E2M1[codes] * scaled.sign() * 2.0 ** exponents[..., None]
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks, (exponents + BIAS).to(torch.uint8), values.reshape(experts, outputs, inputs).transpose(1, 2).contiguous()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_packed(tmp_path_factory.mktemp("models"))


def make_packed(folder: Path, **other: Any) -> tuple[Path, Path]:
    """A tiny gpt-oss with packed experts and no `dtype` in its config, and the same with plain ones. `other`: of its config."""
    packed, plain = (make_model("gpt-oss", folder / name, **other) for name in ("packed", "plain"))
    weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(packed / "model.safetensors").items()}
    in_blocks: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            in_blocks[name] = weight
            continue
        in_blocks[f"{name}_blocks"], in_blocks[f"{name}_scales"], values = pack(weight)
        weights[name] = values.to(torch.bfloat16)
        assert torch.equal(weights[name].double(), values)  # two digits, in bf16's exponents
    save_file(in_blocks, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    for path in (packed, plain):
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
        config.pop("dtype", None)
        if path is packed:
            config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
        (path / "config.json").write_text(json.dumps(config))
    return packed, plain


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_packed_experts_stay_so_and_answer_as_the_plain_ones(
    dtype: torch.dtype | None, shipped: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "instance")
    packed, plain = (load_model(path, dtype, CPU) for path in shipped)
    assert packed.module.dtype == (dtype or torch.bfloat16)
    theirs, ours = plain.module.state_dict(), packed.module.state_dict()
    assert {name for name in ours if name not in theirs} == {
        f"model.layers.{i}.mlp.experts.{name}_{part}"
        for i in range(2)
        for name in ("gate_up_proj", "down_proj")
        for part in ("blocks", "scales")
    }
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]) if name in theirs else weight.dtype == torch.uint8, name
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(3)).tolist()
    want = eager_logits(plain.module, ids, [0])
    got = eager_logits(packed.module, ids, [0])  # by transformers' own code, with plain weights
    assert float((got - want).norm() / want.norm()) < (1e-6 if dtype == torch.float32 else 1e-2)
    refuse_inexact(packed, "packed", block_size=16, backend="torch")  # by ours
    assert packed.fuse("torch") is None
    refuse_inexact(packed, "fused", block_size=16, backend="torch")
    (told,) = [vars(record) for record in caplog.records if record.name == "instance"]
    assert (told["model"], told["stored"], told["matrices"]) == (str(shipped[0]), "mxfp4", 4)
    assert packed.num_parameters() == plain.num_parameters()


def test_in_layers_of_transformers_they_run_by_kernels_of_ours(shipped: tuple[Path, Path]) -> None:
    """By Triton, as on a GPU, where layers don't run fused."""
    packed = load_model(shipped[0], torch.float32, CPU)
    packed.module.config.attention_dropout = 0.0
    packed.fuse("triton")
    packed.unfuse()
    assert len(packed._experts) == 2 and all(weights.is_packed for weights in packed._experts)
    refuse_inexact(packed, "packed", block_size=16, backend="torch")


def test_what_a_kernel_would_compute_otherwise_is_found(shipped: tuple[Path, Path]) -> None:
    packed = load_model(shipped[0], torch.float32, CPU)
    experts = packed.module.get_decoder().layers[0].mlp.experts
    run = experts.forward
    experts.forward = lambda *args: 1.5 * run(*args)
    with pytest.raises(UnsupportedModel, match="would answer wrongly"):
        refuse_inexact(packed, "packed", block_size=16, backend="torch")


def test_the_other_layers_can_be_quantised_beside_them(shipped: tuple[Path, Path]) -> None:
    model = load_model(shipped[0], torch.float32, CPU, quantize="fp8")
    assert len(quantised_parts(model.module)) == 2 * 4 + 1
    assert model.fuse("torch") is None
    refuse_inexact(model, "both", block_size=16, backend="torch")


@pytest.mark.parametrize("size", [1, 2])
async def test_a_checkpoint_as_shipped_is_served_exactly(size: int, shipped: tuple[Path, Path], farm: Farm) -> None:
    packed, plain = shipped
    ids = prompt(plain, 120)
    async with serve(farm, size, Setup(model=packed, chunk_tokens=24)) as service:
        await ask(service.client, plain, ids, spread="all")


@pytest.mark.parametrize("dropped", ["1.mlp.experts.down_proj_scales", "0.mlp.experts.gate_up_proj_blocks"])
def test_what_lacks_a_part_of_its_experts_is_refused(dropped: str, shipped: tuple[Path, Path], tmp_path: Path) -> None:
    weights = {name: weight for name, weight in load_file(shipped[0] / "model.safetensors").items() if dropped not in name}
    (tmp_path / "config.json").write_text((shipped[0] / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sentence = f"has 1 packed weights whose blocks and scales don't match: model.layers.{dropped.rpartition('_')[0]}$"
    with pytest.raises(CheckpointError, match=sentence):
        load_model(tmp_path, None, CPU)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_its_memory_is_counted_as_it_is_loaded(dtype: torch.dtype | None, shipped: tuple[Path, Path]) -> None:
    packed, plain = (load_model(path, dtype, CPU) for path in shipped)
    assert loaded_bytes(shipped[0], dtype, None) == packed.weight_bytes() < plain.weight_bytes()
    in_experts = sum(p.numel() for name, p in plain.module.named_parameters() if name.endswith(("up_proj", "down_proj")))
    saved = in_experts * plain.module.dtype.itemsize - in_experts // 2 - in_experts // 32
    assert packed.weight_bytes() == plain.weight_bytes() - saved


def test_size_counts_what_an_instance_loads(shipped: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for path in shipped:
        assert main([str(path), "--device", "cpu", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    packed, plain = answers
    assert packed["weights"] == load_model(shipped[0], None, CPU).weight_bytes() < plain["weights"]
    for same in ("parameters", "kv_per_token", "dtype", "max_context"):
        assert packed[same] == plain[same]
    assert packed["dtype"] == "bfloat16"


def test_a_config_that_says_so_of_another_model_is_refused(shipped: tuple[Path, Path], tmp_path: Path) -> None:
    settings = {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "plain").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(shipped[1] / name, tmp_path / "plain")
    config = tmp_path / "plain" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(CheckpointError, match="its config says mxfp4, and none of its weights is packed"):
        load_model(tmp_path / "plain", None, CPU)
    llama = make_model("llama", tmp_path / "llama") / "config.json"
    llama.write_text(json.dumps(json.loads(llama.read_text()) | settings))
    assert main([str(tmp_path / "llama"), "--device", "cpu"]) == 2
