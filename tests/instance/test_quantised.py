"""Models whose linear layers have weights of 8 bits answer as those with the plain weights that these stand for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, GPT2Config

from instance.errors import UnsupportedModel
from instance.exact import refuse_inexact
from instance.load import load_model, random_model
from instance.model import Model
from instance.quantised import QuantisedLinear, matrix_of, quantised_parts
from kernels.products import SCHEMES, Quantised, Scheme, dequantise, quantise
from tests.instance.test_fused import CPU, KNOWN, OTHERS, logits, make
from tests.support.exactness import ask, prompt
from tests.support.farm import Farm, Setup
from tests.support.service import serve
from tests.support.tiny import CONFIGS, SIZES, make_model

DENSE = ["llama", "llama, tied", "qwen2, biases", "qwen3, head norms", "gemma2, norms of what is added, capped logits"]


def make_both(kind: tuple[Any, dict[str, Any]], dtype: torch.dtype, quantize: Scheme) -> tuple[Model, Model]:
    """A quantised model, and one with the plain weights that its own stand for."""
    plain = make(kind, dtype)
    quantised = random_model(kind[0](**(SIZES | kind[1])), dtype, CPU, seed=1, quantize=quantize)
    for name, parameter in plain.module.named_parameters():
        path, _, own = name.rpartition(".")
        part: Any = quantised.module.get_submodule(path)
        if isinstance(part, QuantisedLinear) and own == "weight":
            part.become(quantise(parameter.data, "int8" if name == "lm_head.weight" else quantize))
            parameter.data = dequantise(part.matrix, dtype, backend="torch")
        else:
            getattr(part, own).data = parameter.data.clone()
    return quantised, plain


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("quantize", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DENSE)
def test_fused_or_not_they_compute_what_their_weights_stand_for(kind: str, dtype: torch.dtype, quantize: Scheme) -> None:
    model, plain = make_both(KNOWN[kind], dtype, quantize)
    want, print_before, bytes_before = logits(plain), model.fingerprint(), model.weight_bytes()
    assert model.is_quantised and not plain.is_quantised
    assert torch.equal(logits(model), want)
    refuse_inexact(model, kind, block_size=16, backend="torch")
    assert model.fuse("torch") is None
    assert distance(logits(model), want) < (1e-6 if dtype == torch.float32 else 0.03)
    refuse_inexact(model, kind, block_size=16, backend="torch")
    assert (model.fingerprint(), model.weight_bytes()) == (print_before, bytes_before) != (plain.fingerprint(), 0)
    attention = model.module.get_decoder().layers[0].self_attn
    assert attention.k_proj.weight.untyped_storage().data_ptr() == attention.q_proj.weight.untyped_storage().data_ptr()
    head = model.module.get_output_embeddings()
    if model.module.config.tie_word_embeddings:
        assert isinstance(matrix_of(head), torch.Tensor)
    else:
        assert isinstance(matrix_of(head), Quantised) and head.weight.dtype == torch.int8


def test_its_bytes_are_those_of_what_is_quantised_and_of_what_stays() -> None:
    kind = (KNOWN["llama"][0], {"attention_bias": True})
    model, plain = make_both(kind, torch.bfloat16, "fp8")
    parts = quantised_parts(model.module)
    assert len(parts) == 2 * 7 + 1
    saved = sum(part.weight.numel() - 4 * part.out_features for part in parts)
    assert model.weight_bytes() == plain.weight_bytes() - saved
    shaped = random_model(kind[0](**(SIZES | kind[1])), torch.bfloat16, torch.device("meta"), seed=0, quantize="fp8")
    assert shaped.weight_bytes() == model.weight_bytes()


@pytest.mark.parametrize("kind", ["granite, scaled residuals", "phi, other parts"])
def test_layers_that_stay_as_they_are_run_by_kernels_of_ours(kind: str) -> None:
    """By Triton, as on a GPU."""
    model, plain = make_both(OTHERS[kind], torch.float32, "fp8")
    assert model.fuse("triton") is not None
    assert {part.backend for part in quantised_parts(model.module)} == {"triton"}
    assert distance(logits(model), logits(plain)) < 1e-5
    assert model.rows_to_warm(300) == [1, 8, 16, 32, 64, 256, 257] and plain.rows_to_warm(300) == []


def test_fused_layers_run_by_kernels_of_ours() -> None:
    """By Triton, as on a GPU: steps of one row and of several, through a pool."""
    model, _ = make_both(KNOWN["llama"], torch.float32, "fp8")
    assert model.fuse("triton") is None and model.fused is not None
    refuse_inexact(model, "llama", block_size=16, backend="triton")


def test_a_weight_that_is_not_what_it_should_be_is_found() -> None:
    """By the comparison at load of layers that run fused: of a scale of one of the parts of a merged matrix."""
    model, _ = make_both(KNOWN["llama"], torch.float32, "fp8")
    assert model.fuse("torch") is None and model.fused is not None
    part = model.module.get_decoder().layers[1].self_attn.k_proj
    part.weight_scale = torch.nn.Parameter(part.weight_scale * 1.3, requires_grad=False)  # no view of what runs any more
    with pytest.raises(UnsupportedModel, match="would answer wrongly"):
        refuse_inexact(model, "llama", block_size=16, backend="torch")


@pytest.mark.parametrize("quantize", SCHEMES)
async def test_it_is_served_as_the_plain_weights_that_its_own_stand_for(quantize: Scheme, farm: Farm, tmp_path: Path) -> None:
    path, twin = make_model("llama", tmp_path / "plain"), make_model("llama", tmp_path / "twin")
    weights = load_file(twin / "model.safetensors")
    for name, part in load_model(path, torch.float32, CPU, quantize=quantize).module.named_modules():
        if isinstance(part, QuantisedLinear):
            weights[f"{name}.weight"] = dequantise(part.matrix, torch.float32, backend="torch")
    save_file(weights, twin / "model.safetensors", metadata={"format": "pt"})
    ids = prompt(twin, 100)
    async with serve(farm, 2, Setup(model=path, quantize=quantize, chunk_tokens=24)) as service:
        await ask(service.client, twin, ids, spread="all")


def test_latents_and_routers_keep_their_weights() -> None:
    config = CONFIGS["deepseek"]
    assert isinstance(config, DeepseekV3Config)
    model = random_model(config, torch.float32, CPU, seed=1, quantize="fp8")
    assert model.shape.value_dim  # still latent
    kept = {name.rpartition(".")[2] for name, part in model.module.named_modules() if type(part) is torch.nn.Linear}
    assert kept == {"kv_b_proj"}
    refuse_inexact(model, "deepseek", block_size=16, backend="torch")


def test_a_model_without_linear_layers_is_refused() -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=64)
    with pytest.raises(UnsupportedModel, match="gpt2: it has no linear layers, so none that --quantize fp8 could change"):
        random_model(config, torch.float32, CPU, seed=1, quantize="fp8")
