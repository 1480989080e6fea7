"""gpt-oss as it is shipped: experts packed in blocks of 4-bit numbers, which are plain weights once loaded."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from instance.checkpoint import CheckpointError
from instance.exact import eager_logits
from instance.memory import checkpoint_bytes
from instance.model import load_model
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
    """A tiny gpt-oss with packed experts and no `dtype` in its config, and the same with plain ones."""
    packed = make_model("gpt-oss", tmp_path_factory.mktemp("packed"))
    plain = make_model("gpt-oss", tmp_path_factory.mktemp("plain"))
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


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_packed_experts_are_the_plain_ones_once_loaded(
    dtype: torch.dtype | None, shipped: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "instance")
    packed, plain = (load_model(path, dtype, CPU) for path in shipped)
    assert packed.module.dtype == (dtype or torch.bfloat16)
    theirs = plain.module.state_dict()
    for name, weight in packed.module.state_dict().items():
        assert torch.equal(weight, theirs[name]), name
    assert packed.fingerprint() == plain.fingerprint()
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(3)).tolist()
    assert torch.equal(eager_logits(packed.module, ids, [0]), eager_logits(plain.module, ids, [0]))
    (told,) = [vars(record) for record in caplog.records if record.name == "instance"]
    to = "the type of the other weights" if dtype is None else str(dtype).removeprefix("torch.")
    assert (told["model"], told["stored"], told["to"]) == (str(shipped[0]), "mxfp4", to)


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
def test_its_memory_is_counted_as_that_of_plain_weights(dtype: torch.dtype | None, shipped: tuple[Path, Path]) -> None:
    packed, plain = (checkpoint_bytes(path, dtype) for path in shipped)
    if dtype is None:  # with the files' headers
        assert abs(packed - plain) < 16_384
        return
    assert packed == plain == sum(p.numel() for p in load_model(shipped[1], None, CPU).module.parameters()) * dtype.itemsize


def test_size_counts_what_an_instance_loads(shipped: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for path in shipped:
        assert main([str(path), "--device", "cpu", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out) | {"model": ""})
    assert answers[0] == answers[1]
    assert answers[0]["dtype"] == "bfloat16"
