"""Mixtures of experts of both backends against float64, and in fp32 against transformers' own modules."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from kernels.experts import ExpertWeights, Gate, Packed, mix_experts, route
from tests.kernels.test_layer_ops import CLOSE, DTYPES, near
from tests.kernels.test_paged_attention import DEVICE, NAN, ON_GPU
from tests.support.compiling import compiled

GPT_OSS = Gate(alpha=1.702, limit=0.7, up_offset=1.0, interleaved=True)  # a limit that small values reach, too
GATES = {"silu": Gate(), "gelu": Gate("gelu_tanh", limit=0.5), "gpt-oss": GPT_OSS, "turns": Gate(interleaved=True)}


def make_weights(
    sizes: tuple[int, int, int], gate: Gate, dtype: torch.dtype, *, transposed: bool, biased: bool
) -> ExpertWeights:
    """Of `(X, E, I)`."""
    num_experts, hidden, width = sizes

    def stored(columns: int, summed: int) -> torch.Tensor:
        shape = (num_experts, summed, columns) if transposed else (num_experts, columns, summed)
        weight = (torch.randn(shape, device=DEVICE) / math.sqrt(summed)).to(dtype)
        return weight.transpose(1, 2) if transposed else weight

    def bias(columns: int) -> torch.Tensor | None:
        return torch.randn(num_experts, columns, device=DEVICE).to(dtype) if biased else None

    return ExpertWeights(stored(2 * width, hidden), stored(hidden, width), gate, bias(2 * width), bias(hidden))


def make_routing(rows: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    experts_TS = torch.rand(rows, num_experts, device=DEVICE).topk(top_k).indices.int()
    return experts_TS, torch.rand(rows, top_k, device=DEVICE)


def mix64(x_TE: torch.Tensor, experts_TS: torch.Tensor, weights_TS: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """One row and expert after the other, in float64."""
    gate, out_TE = weights.gate, torch.zeros(x_TE.shape, dtype=torch.float64, device=x_TE.device)
    for row, s in itertools.product(*map(range, experts_TS.shape)):
        expert = int(experts_TS[row, s])
        gate_up_N = weights.gate_up_XNE[expert].double() @ x_TE[row].double()
        if weights.gate_up_bias_XN is not None:
            gate_up_N += weights.gate_up_bias_XN[expert].double()
        gate_I, up_I = (gate_up_N[::2], gate_up_N[1::2]) if gate.interleaved else gate_up_N.chunk(2)
        limit = gate.limit or math.inf
        gate_I, up_I = gate_I.clamp(max=limit), up_I.clamp(-limit, limit)
        if gate.activation == "silu":
            active_I = gate_I * torch.sigmoid(gate.alpha * gate_I)
        else:
            active_I = functional.gelu(gate_I, approximate="tanh")
        part_E = weights.down_XEI[expert].double() @ (active_I * (up_I + gate.up_offset))
        if weights.down_bias_XE is not None:
            part_E += weights.down_bias_XE[expert].double()
        out_TE[row] += weights_TS[row, s].double() * part_E
    return out_TE


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    ("rows", "num_experts", "top_k"), [(1, 8, 2), (5, 60, 6), (3, 128, 8), (2, 1, 1), (3, 8, 1), (4, 7, 7)]
)
def test_routes(rows: int, num_experts: int, top_k: int, normalise: bool, dtype: torch.dtype, backend: str) -> None:
    logits_TX = (3 * torch.randn(rows, num_experts, device=DEVICE)).to(dtype)
    experts_TS, weights_TS = route(logits_TX, top_k, normalise=normalise, backend=backend)
    assert experts_TS.dtype == torch.int32 and weights_TS.dtype == torch.float32
    order_TX = torch.sort(logits_TX, dim=-1, descending=True, stable=True).indices
    assert torch.equal(experts_TS.long(), order_TX[:, :top_k])
    want_TS = logits_TX.double().softmax(-1).gather(1, experts_TS.long())
    near(weights_TS, want_TS / want_TS.sum(-1, keepdim=True) if normalise else want_TS)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_routes_of_equal_and_of_odd_logits(backend: str) -> None:
    logits_TX = torch.tensor(
        [[1, 2, 2, 1, 2], [0.0, -0.0, 0.0, -0.0, -1], [-3, -1, -2, -1, -5], [-math.inf, 5, -math.inf, -7, -8]], device=DEVICE
    )
    experts_TS, weights_TS = route(logits_TX, 3, normalise=True, backend=backend)
    assert experts_TS.tolist() == [[1, 2, 4], [0, 1, 2], [1, 3, 2], [1, 3, 4]]
    assert weights_TS.sum(-1).tolist() == pytest.approx([1] * 4)
    # rows that pad a graph may hold anything; what they choose is read from, so it must be an expert
    experts_TS, weights_TS = route(torch.full((2, 5), NAN, device=DEVICE), 3, normalise=True, backend=backend)
    assert experts_TS.tolist() == [[0, 1, 2]] * 2
    assert weights_TS.isnan().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("gate", "biased"), [("silu", False), ("gelu", True), ("gpt-oss", True), ("turns", False)])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_mixes(rows: int, gate: str, biased: bool, transposed: bool, dtype: torch.dtype, backend: str) -> None:
    sizes, top_k = (5, 72, 40), 3
    weights = make_weights(sizes, GATES[gate], dtype, transposed=transposed, biased=biased)
    x_TE = torch.randn(rows, sizes[1], device=DEVICE).to(dtype)
    experts_TS, weights_TS = make_routing(rows, sizes[0], top_k)
    got_TE = mix_experts(x_TE, experts_TS, weights_TS, weights, backend=backend)
    near(got_TE, mix64(x_TE, experts_TS, weights_TS, weights))
    assert torch.equal(got_TE, mix_experts(x_TE, experts_TS, weights_TS, weights, backend=backend))
    residual_TE = torch.randn(rows, sizes[1], device=DEVICE).to(dtype)
    want_TE = residual_TE + got_TE  # rounded twice
    mixed_TE = mix_experts(x_TE, experts_TS, weights_TS, weights, residual_TE=residual_TE, backend=backend)
    assert mixed_TE is residual_TE and torch.equal(residual_TE, want_TE)


@pytest.mark.parametrize("width", [128, 129, 300, 500])
@pytest.mark.parametrize("biased", [False, True])
def test_down_of_transposed_weights_is_summed_in_parts(width: int, biased: bool) -> None:
    """One to four of them, the last of which may be short."""
    weights = make_weights((3, 72, width), GPT_OSS, torch.float16, transposed=True, biased=biased)
    x_TE = torch.randn(2, 72, device=DEVICE).half()
    experts_TS, weights_TS = make_routing(2, 3, 2)
    near(mix_experts(x_TE, experts_TS, weights_TS, weights, backend="triton"), mix64(x_TE, experts_TS, weights_TS, weights))


def make_packed(sizes: tuple[int, int, int], gate: Gate, dtype: torch.dtype) -> tuple[ExpertWeights, ExpertWeights]:
    """Of `(X, E, I)`, E and I whole blocks, with biases: packed, and as plain weights of the same values."""
    num_experts, hidden, width = sizes

    def packed(columns: int, summed: int) -> Packed:
        blocks = torch.randint(256, (num_experts, columns, summed // 32, 16), dtype=torch.uint8, device=DEVICE)
        scales = torch.randint(119, 123, blocks.shape[:3], dtype=torch.uint8, device=DEVICE)
        return Packed(blocks, scales)

    def bias(columns: int) -> torch.Tensor:
        return torch.randn(num_experts, columns, device=DEVICE).to(dtype)

    parts, biases = (packed(2 * width, hidden), packed(hidden, width)), (bias(2 * width), bias(hidden))
    gate_up, down = (part.dequantise(dtype) for part in parts)
    return ExpertWeights(*parts, gate, *biases), ExpertWeights(gate_up, down, gate, *biases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_numbers_are_those_of_the_format(dtype: torch.dtype) -> None:
    """All codes, and scales from the least to the largest that a weight may have in fp32."""
    codes = torch.arange(32, dtype=torch.uint8, device=DEVICE) % 16
    blocks = (codes[0::2] | codes[1::2] << 4).expand(1, 3, 1, 16).contiguous()
    scales = torch.tensor([0, 127, 251], dtype=torch.uint8, device=DEVICE).view(1, 3, 1)
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device=DEVICE)
    want = torch.cat((numbers, -numbers)).repeat(2) * 2.0 ** torch.tensor([[-127], [0], [124]], device=DEVICE).double()
    packed = Packed(blocks, scales)
    assert packed.shape == (1, 3, 32) and packed.nbytes == 3 * 17
    got = packed.dequantise(dtype)
    assert torch.equal(got[0].double(), want)
    assert torch.equal(packed.dequantise(dtype, 0), got[0])


@pytest.mark.parametrize("rows", [4, 32])
def test_all_codes_of_packed_weights(rows: int) -> None:
    """Whatever unpacks them: each expert has one byte in all of up, 1 in gate and down, and a row a number in one place."""
    codes = torch.arange(16, dtype=torch.uint8, device=DEVICE)
    bytes_X = torch.cat((codes | codes << 4, codes | (15 - codes) << 4))
    num_experts, hidden, width = len(bytes_X), 64, 32
    value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=DEVICE)
    value = torch.cat((value, -value))

    def ones(columns: int, summed: int) -> Packed:
        blocks = torch.full((num_experts, columns, summed // 32, 16), 0x22, dtype=torch.uint8, device=DEVICE)
        return Packed(blocks, torch.full(blocks.shape[:3], 127, dtype=torch.uint8, device=DEVICE))

    gate_up = ones(2 * width, hidden)
    gate_up.blocks_XNGB[:, width:] = bytes_X.view(-1, 1, 1, 1)
    weights = ExpertWeights(gate_up, ones(hidden, width), Gate())
    for place in (0, 63):
        x_TE = torch.zeros(rows, hidden, device=DEVICE)
        x_TE[:, place] = 32.0  # SiLU leaves it as it is
        for first in range(0, num_experts, rows):
            experts_T1 = first + torch.arange(rows, dtype=torch.int32, device=DEVICE).unsqueeze(1)
            got_TE = mix_experts(x_TE, experts_T1, torch.ones(rows, 1, device=DEVICE), weights, backend="triton")
            want_T1 = 32.0 * 32.0 * width * value[((bytes_X[experts_T1.long()] >> 4 * (place % 2)) & 15).long()]
            assert torch.equal(got_TE, want_T1.expand_as(got_TE))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["silu", "gpt-oss"])
@pytest.mark.parametrize("rows", [1, 3, 9, 40])
def test_mixes_packed_weights(rows: int, gate: str, dtype: torch.dtype, backend: str) -> None:
    sizes, top_k = (5, 96, 160), 3
    packed, plain = make_packed(sizes, GATES[gate], dtype)
    x_TE = torch.randn(rows, sizes[1], device=DEVICE).to(dtype) / 8
    experts_TS, weights_TS = make_routing(rows, sizes[0], top_k)
    got_TE = mix_experts(x_TE, experts_TS, weights_TS, packed, backend=backend)
    near(got_TE, mix64(x_TE, experts_TS, weights_TS, plain))
    assert torch.equal(got_TE, mix_experts(x_TE, experts_TS, weights_TS, packed, backend=backend))
    residual_TE = torch.randn(rows, sizes[1], device=DEVICE).to(dtype)
    want_TE = residual_TE + got_TE
    mix_experts(x_TE, experts_TS, weights_TS, packed, residual_TE=residual_TE, backend=backend)
    assert torch.equal(residual_TE, want_TE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ways_to_group_packed_weights(dtype: torch.dtype) -> None:
    from kernels import experts_triton

    sizes = (3, 96, 64)
    packed, plain = make_packed(sizes, GATES["gpt-oss"], dtype)
    x_TE = torch.randn(13, sizes[1], device=DEVICE).to(dtype) / 8
    experts_TS, weights_TS = make_routing(13, sizes[0], 2)
    want_TE = mix64(x_TE, experts_TS, weights_TS, plain)
    for config in {experts_triton.group_config(each * 8, 8, sizes[1], dtype) for each in (1, 5, 20, 60, 500)}:
        out_TE = torch.full_like(x_TE, NAN)
        experts_triton.mix_groups(x_TE, experts_TS, weights_TS, packed, out_TE, gate_up=config, down=config)
        near(out_TE, want_TE)


def test_packed_weights_that_do_not_fit_are_refused() -> None:
    packed, _ = make_packed((4, 32, 64), Gate(), torch.float32)
    gate_up, down = packed.gate_up_XNE, packed.down_XEI
    assert isinstance(gate_up, Packed) and isinstance(down, Packed) and packed.is_packed and packed.dtype == torch.float32
    assert ExpertWeights(gate_up, down, Gate()).dtype is None
    with pytest.raises(ValueError, match=r"packed weights \(4, 128, 1, 16\) .* scales \(4, 32, 2\)"):
        Packed(gate_up.blocks_XNGB, down.scales_XNG)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        Packed(gate_up.blocks_XNGB.to(torch.int8), gate_up.scales_XNG)
    with pytest.raises(ValueError, match=r"gate and up \(4, 128, 32\) packed .* down \(4, 32, 64\) torch\.float32"):
        ExpertWeights(gate_up, down.dequantise(torch.float32), Gate())
    experts_TS, weights_TS = make_routing(3, 4, 2)
    with pytest.raises(ValueError, match=r"rows \(3, 32\) torch\.float16 .* torch\.float32"):
        mix_experts(torch.zeros(3, 32, device=DEVICE).half(), experts_TS, weights_TS, packed, backend="torch")


@pytest.mark.parametrize("top_k", [1, 3])
def test_mixes_many_rows(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices, their pairs counted in chunks, several tiles of an expert, and some experts that nobody asks for."""
    monkeypatch.setattr("kernels.experts_triton.MOST_ROWS", 70)
    monkeypatch.setattr("kernels.experts_triton._CHUNK_PAIRS", 128)
    weights = make_weights((6, 24, 16), Gate(), torch.float32, transposed=False, biased=True)
    x_TE = torch.randn(101, 24, device=DEVICE)
    experts_TS = torch.rand(101, 4, device=DEVICE).topk(top_k).indices + 1  # int64; neither the first nor the last
    weights_TS = torch.rand(101, top_k, device=DEVICE)
    got_TE = mix_experts(x_TE, experts_TS, weights_TS, weights, backend="triton")
    near(got_TE, mix64(x_TE, experts_TS, weights_TS, weights))
    near(mix_experts(x_TE, experts_TS, weights_TS, weights, backend="torch"), got_TE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate", ["silu", "gpt-oss"])
def test_all_ways_to_group(gate: str, transposed: bool, dtype: torch.dtype) -> None:
    """Each size of tiles that some number of rows leads to, with rows that fill none of them."""
    from kernels import experts_triton

    sizes = (3, 48, 40)
    weights = make_weights(sizes, GATES[gate], dtype, transposed=transposed, biased=True)
    x_TE = torch.randn(13, sizes[1], device=DEVICE).to(dtype)
    experts_TS, weights_TS = make_routing(13, sizes[0], 2)
    want_TE = mix64(x_TE, experts_TS, weights_TS, weights)
    configs = {experts_triton.group_config(each * 8, 8, sizes[1], dtype) for each in (1, 5, 20, 60, 500)}
    assert len(configs) == (2 if dtype == torch.float32 else 4)
    for config in configs:
        out_TE = torch.full_like(x_TE, NAN)
        experts_triton.mix_groups(x_TE, experts_TS, weights_TS, weights, out_TE, gate_up=config, down=config)
        near(out_TE, want_TE)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_rows_and_strided_rows(backend: str) -> None:
    weights = make_weights((4, 32, 16), Gate(), torch.float32, transposed=False, biased=False)
    experts_TS, weights_TS = make_routing(6, 4, 2)
    wide_TE = torch.randn(6, 50, device=DEVICE)
    x_TE = wide_TE[:, :32]
    assert mix_experts(x_TE[:0], experts_TS[:0], weights_TS[:0], weights, backend=backend).shape == (0, 32)
    got_TE = mix_experts(x_TE, experts_TS, weights_TS, weights, backend=backend)
    near(got_TE, mix64(x_TE, experts_TS, weights_TS, weights))
    assert route(wide_TE[:0], 2, normalise=True, backend=backend)[0].shape == (0, 2)
    got_TS = route(x_TE, 2, normalise=True, backend=backend)
    assert all(map(torch.equal, got_TS, route(x_TE.contiguous(), 2, normalise=True, backend=backend)))


def theirs(kind: str) -> tuple[Any, Any, ExpertWeights, bool]:
    """transformers' router and experts in fp32 with random weights, these as ours, and whether weights are normalised."""
    from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter

    config: Any
    match kind:
        case "gpt-oss":
            config = GptOssConfig(hidden_size=48, intermediate_size=40, num_local_experts=6, num_experts_per_tok=3)
            parts = GptOssTopKRouter, GptOssExperts
        case "Mixtral":
            config = MixtralConfig(hidden_size=48, intermediate_size=40, num_local_experts=6, num_experts_per_tok=2)
            parts = MixtralTopKRouter, MixtralExperts
        case _:
            sizes = {"hidden_size": 48, "moe_intermediate_size": 40, "num_experts": 12, "num_experts_per_tok": 4}
            config = Qwen3MoeConfig(**sizes, norm_topk_prob=kind == "Qwen3-MoE, normalised")
            parts = Qwen3MoeTopKRouter, Qwen3MoeExperts
    config._experts_implementation = "eager"
    router, experts = (part(config).to(DEVICE) for part in parts)
    for parameter in (*router.parameters(), *experts.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    if kind == "gpt-oss":
        gate = Gate(alpha=experts.alpha, limit=experts.limit, up_offset=1.0, interleaved=True)
        biases = experts.gate_up_proj_bias.detach(), experts.down_proj_bias.detach()
        return router, experts, ExpertWeights(gate_up.transpose(1, 2), down.transpose(1, 2), gate, *biases), True
    return router, experts, ExpertWeights(gate_up, down, Gate()), kind != "Qwen3-MoE"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["Qwen3-MoE", "Qwen3-MoE, normalised", "Mixtral", "gpt-oss"])
@pytest.mark.parametrize("rows", [2, 11])
@torch.no_grad()
def test_says_what_transformers_says(rows: int, kind: str, backend: str) -> None:
    router, experts, weights, normalise = theirs(kind)
    x_TE = torch.randn(rows, 48, device=DEVICE)
    logits_TX, want_weights_TS, want_experts_TS = router(x_TE)
    experts_TS, weights_TS = route(logits_TX, router.top_k, normalise=normalise, backend=backend)
    assert torch.equal(experts_TS.long(), want_experts_TS)
    near(weights_TS, want_weights_TS)
    want_TE = experts(x_TE, want_experts_TS, want_weights_TS)
    got_TE = mix_experts(x_TE, experts_TS, weights_TS, weights, backend=backend)
    assert float((got_TE - want_TE).norm() / want_TE.norm()) < CLOSE[torch.float32]


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 40, 700])
def test_captured(rows: int, transposed: bool) -> None:
    """Graphs that are captured with one routing and replayed with another: what kernels read early must not be older."""
    weights = make_weights((16, 256, 500), Gate(), torch.bfloat16, transposed=transposed, biased=True)
    x_TE = torch.randn(rows, 256, device=DEVICE).bfloat16()
    logits_TX = torch.randn(rows, 16, device=DEVICE)

    def run() -> torch.Tensor:
        y_TE = x_TE
        for layer in range(4):
            experts_TS, weights_TS = route(logits_TX.roll(layer, 1), 4, normalise=True, backend="triton")
            y_TE = mix_experts(y_TE, experts_TS, weights_TS, weights, backend="triton")
        return y_TE

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got_TE = run()
    for _ in range(20):
        logits_TX.normal_()
        graph.replay()
        assert torch.equal(got_TE, run())


def test_refusals() -> None:
    weights = make_weights((4, 32, 16), Gate(), torch.float32, transposed=False, biased=True)
    x_TE = torch.randn(3, 32, device=DEVICE)
    experts_TS, weights_TS = make_routing(3, 4, 2)
    with pytest.raises(ValueError, match=r"activation must be .*'relu'"):
        Gate("relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha 2 is of SiLU"):
        Gate("gelu_tanh", alpha=2)
    with pytest.raises(ValueError, match=r"gate and up \(4, 16, 32\)"):
        ExpertWeights(weights.gate_up_XNE[:, :16], weights.down_XEI, Gate())
    with pytest.raises(ValueError, match=r"strides \(1024, 32, 2\)"):
        ExpertWeights(weights.gate_up_XNE, torch.randn(4, 32, 32, device=DEVICE)[:, :, ::2], Gate())
    with pytest.raises(ValueError, match=r"bias \(4, 31\)"):
        ExpertWeights(weights.gate_up_XNE, weights.down_XEI, Gate(), None, torch.zeros(4, 31, device=DEVICE))
    with pytest.raises(ValueError, match=r"rows \(3, 31\)"):
        mix_experts(x_TE[:, 1:], experts_TS, weights_TS, weights, backend="torch")
    with pytest.raises(ValueError, match=r"torch\.float16 with strides .* torch\.float32"):
        mix_experts(x_TE.half(), experts_TS, weights_TS, weights, backend="torch")
    with pytest.raises(ValueError, match=r"3 rows, experts \(2, 2\)"):
        mix_experts(x_TE, experts_TS[1:], weights_TS, weights, backend="torch")
    for residual_TE in (x_TE, x_TE[:2].clone(), x_TE.half()):
        with pytest.raises(ValueError, match=r"for a residual \(\d, 32\).* must not be the rows themselves"):
            mix_experts(x_TE, experts_TS, weights_TS, weights, residual_TE=residual_TE, backend="torch")
    with pytest.raises(ValueError, match=r"top 5 of logits \(3, 4\)"):
        route(torch.zeros(3, 4, device=DEVICE), 5, normalise=True, backend="torch")
    for refused in (
        lambda: mix_experts(x_TE, experts_TS, weights_TS, weights, backend="cuda"),
        lambda: route(x_TE, 2, normalise=True, backend="cuda"),
    ):
        with pytest.raises(ValueError, match=r"backend must be .*'cuda'"):
            refused()


def test_what_the_kernels_take_of_a_processor(tmp_path: Path) -> None:
    """By the compiler, for Hopper: all fit, weights come 16 bytes at a time, and tiles of 64 rows and more meet in wgmma."""
    found: dict[str, dict[str, int]] = compiled("tests.support.compiled_experts", tmp_path)
    assert len(found) == 2 * 3 * 4  # products, shapes, ways through
    for product, taken in found.items():
        assert taken["programs"] * (taken["shared"] + 1024) <= 228 * 1024, product
        assert taken["wide_bytes"] >= taken["tile_bytes"], product
        assert (taken["wgmma"] > 0) == (taken["block_m"] >= 64), product


@pytest.mark.parametrize(
    ("num_experts", "top_k", "most", "transposed"), [(128, 8, 1600, False), (32, 4, 800, True), (8, 2, 4, False)]
)
def test_what_is_warmed_up_is_all_that_rows_compile(
    num_experts: int, top_k: int, most: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the constants that kernels are launched with: nothing may be compiled once an instance is ready."""
    from kernels import expert_pairs_triton, experts_triton

    launched: set[object] = set()

    class Noted:
        def __init__(self, kernel: str) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: object) -> Any:
            return lambda *_, **constants: launched.add((self._kernel, *constants.items()))

    modules = (experts_triton, expert_pairs_triton)
    kernels = [
        (module, name) for module in modules for name in vars(module) if name.startswith("_") and name.endswith("_kernel")
    ]
    assert len(kernels) >= 8
    for module, name in kernels:
        monkeypatch.setattr(module, name, Noted(name))
    weights = make_weights((num_experts, 64, 32), Gate(), torch.float16, transposed=transposed, biased=transposed)

    def mix(rows: int) -> None:
        experts_TS = torch.zeros((rows, top_k), dtype=torch.int32, device=DEVICE)
        x_TE, weights_TS = torch.empty(rows, 64, dtype=torch.float16, device=DEVICE), torch.empty(rows, top_k, device=DEVICE)
        mix_experts(x_TE, experts_TS, weights_TS, weights, backend="triton")

    chosen = experts_triton.rows_of_each_kernel(most, top_k, weights)
    assert max(chosen) <= most and len(chosen) < 20
    for rows in chosen:
        mix(rows)
    warm = frozenset(launched)
    for rows in range(1, most + 1):
        mix(rows)
    assert launched == warm
