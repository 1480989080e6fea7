"""Layer ops of both backends against float64."""

import math

import pytest
import torch

from kernels.layer_ops import add_rms_norm, linear, rms_norm, rotate_and_store, silu_mul, silu_mul_linear
from tests.kernels.test_paged_attention import DEVICE, NAN, ON_GPU

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=CLOSE[got.dtype], atol=CLOSE[got.dtype])


def norm64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 100), (3, 1030)])
def test_norms(rows: int, width: int, dtype: torch.dtype, backend: str) -> None:
    x, residual = (torch.randn(rows, width, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(width, device=DEVICE).to(dtype)
    near(rms_norm(x, weight, 1e-5, backend=backend), norm64(x, weight, 1e-5))
    total = (x + residual).clone()
    near(add_rms_norm(x, residual, weight, 1e-5, backend=backend), norm64(total, weight, 1e-5))
    near(residual, total)


def rotate64(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    width = cos.shape[1]
    part = x[..., :width].double()
    low, high = part.chunk(2, -1)
    turned = part * cos.double()[:, None] + torch.cat((-high, low), -1) * sin.double()[:, None]
    return torch.cat((turned, x[..., width:].double()), -1)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "dim", "rotated", "norms"), [((4, 2), 16, 16, False), ((6, 2), 32, 32, True), ((3, 1), 64, 24, True)]
)
def test_rotary_and_store(
    heads: tuple[int, int], dim: int, rotated: int, norms: bool, dtype: torch.dtype, backend: str
) -> None:
    rows, block = 5, 4
    qkv = torch.randn(rows, (heads[0] + 2 * heads[1]) * dim, device=DEVICE).to(dtype)
    cos, sin = (torch.randn(rows, rotated, device=DEVICE).to(dtype) for _ in range(2))
    slots = torch.tensor([7, -1, 0, 3, 8], dtype=torch.int32, device=DEVICE)
    kv = torch.full((2, 3, block, heads[1], dim), NAN, dtype=dtype, device=DEVICE)
    weights = [torch.randn(dim, device=DEVICE).to(dtype) for _ in range(2)] if norms else [None, None]
    q = rotate_and_store(qkv, cos, sin, slots, kv, heads[0], q_norm=weights[0], k_norm=weights[1], eps=1e-6, backend=backend)
    parts = qkv.view(rows, -1, dim).split([heads[0], heads[1], heads[1]], 1)
    normed = [part if w is None else norm64(part, w, 1e-6).to(dtype) for part, w in zip(parts[:2], weights, strict=True)]
    near(q, rotate64(normed[0], cos, sin))
    k = rotate64(normed[1], cos, sin)
    flat = kv.view(2, -1, heads[1], dim)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            near(flat[0, slot], k[row])
            assert torch.equal(flat[1, slot], parts[2][row])
    untouched = [slot for slot in range(12) if slot not in slots.tolist()]
    assert flat[:, untouched].isnan().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_products_and_what_rides_along(rows: int, dtype: torch.dtype, backend: str) -> None:
    width, out, wide = 1024, 37, 2048
    x = torch.randn(rows, width, device=DEVICE).to(dtype)
    weight = (torch.randn(out, width, device=DEVICE) / math.sqrt(width)).to(dtype)
    bias = torch.randn(out, device=DEVICE).to(dtype)
    near(linear(x, weight, backend=backend), x.double() @ weight.double().T)
    near(linear(x, weight, bias, backend=backend), x.double() @ weight.double().T + bias.double())
    residual = torch.randn(rows, out, device=DEVICE).to(dtype)
    want = residual.double() + x.double() @ weight.double().T
    assert linear(x, weight, residual_TN=residual, backend=backend) is residual
    near(residual, want)

    gate_up = torch.randn(rows, 2 * wide, device=DEVICE).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    active = torch.nn.functional.silu(gate) * up
    near(silu_mul(gate_up, backend=backend), active)
    down = (torch.randn(out, wide, device=DEVICE) / math.sqrt(wide)).to(dtype)
    residual = torch.randn(rows, out, device=DEVICE).to(dtype)
    want = residual.double() + active @ down.double().T
    silu_mul_linear(gate_up, down, residual, backend=backend)
    near(residual, want)
