"""Mixtures of experts of both backends against float64, and in fp32 against transformers' own modules."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from kernels.experts import ExpertWeights, Gate, mix_experts, route
from tests.kernels.test_layer_ops import CLOSE, DTYPES, near
from tests.kernels.test_paged_attention import DEVICE, NAN, ON_GPU

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
@pytest.mark.parametrize(("rows", "num_experts", "top_k"), [(1, 8, 2), (5, 60, 6), (3, 128, 8), (2, 1, 1), (4, 7, 7)])
def test_routes(rows: int, num_experts: int, top_k: int, normalise: bool, dtype: torch.dtype, backend: str) -> None:
    logits_TX = (3 * torch.randn(rows, num_experts, device=DEVICE)).to(dtype)
    experts_TS, weights_TS = route(logits_TX, top_k, normalise=normalise, backend=backend)
    assert experts_TS.dtype == torch.int32 and weights_TS.dtype == dtype
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
