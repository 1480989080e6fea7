"""Layer ops of both backends against float64."""

import math

import pytest
import torch

from kernels.layer_ops import (
    ACTIVATIONS,
    Norm,
    add_rms_norm,
    gated,
    gated_product,
    linear,
    normed_linear,
    rms_norm,
    rotate_and_store,
)
from tests.kernels.test_paged_attention import DEVICE, NAN, ON_GPU

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=CLOSE[got.dtype], atol=CLOSE[got.dtype])


def norm64(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    x = x.double()
    return (norm.weight_E.double() + norm.from_one) * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("from_one", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (5, 100), (3, 1030)])
def test_norms(rows: int, width: int, from_one: bool, dtype: torch.dtype, backend: str) -> None:
    x, residual = (torch.randn(rows, width, device=DEVICE).to(dtype) for _ in range(2))
    norm, first = (Norm(torch.randn(width, device=DEVICE).to(dtype), eps, from_one) for eps in (1e-5, 1e-2))
    near(rms_norm(x, norm, backend=backend), norm64(x, norm))
    total = (x + residual).clone()
    near(add_rms_norm(x, residual, norm, backend=backend), norm64(total, norm))
    near(residual, total)
    total = norm64(x, first) + residual.double()
    got = add_rms_norm(x, residual, norm, first=first, backend=backend)
    near(residual, total)
    near(got, norm64(residual, norm))


def rotate64(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    width = cos.shape[1]
    part = x[..., :width].double()
    low, high = part.chunk(2, -1)
    turned = part * cos.double()[:, None] + torch.cat((-high, low), -1) * sin.double()[:, None]
    return torch.cat((turned, x[..., width:].double()), -1)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "dim", "rotated", "norms"), [((4, 2), 16, 16, ""), ((6, 2), 32, 32, "plain"), ((3, 1), 64, 24, "from one")]
)
def test_rotary_and_store(heads: tuple[int, int], dim: int, rotated: int, norms: str, dtype: torch.dtype, backend: str) -> None:
    rows, block = 5, 4
    qkv = torch.randn(rows, (heads[0] + 2 * heads[1]) * dim, device=DEVICE).to(dtype)
    cos, sin = (torch.randn(rows, rotated, device=DEVICE).to(dtype) for _ in range(2))
    slots = torch.tensor([7, -1, 0, 3, 8], dtype=torch.int32, device=DEVICE)
    kv = torch.full((2, 3, block, heads[1], dim), NAN, dtype=dtype, device=DEVICE)
    made = [Norm(torch.randn(dim, device=DEVICE).to(dtype), 1e-6, norms == "from one") for _ in range(2)]
    q_norm, k_norm = made if norms else (None, None)
    q = rotate_and_store(qkv, cos, sin, slots, kv, heads[0], q_norm=q_norm, k_norm=k_norm, backend=backend)
    parts = qkv.view(rows, -1, dim).split([heads[0], heads[1], heads[1]], 1)
    normed = [norm64(part, norm).to(dtype) if norms else part for part, norm in zip(parts[:2], made, strict=True)]
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
@pytest.mark.parametrize(
    ("rows", "width", "out"),
    [(1, 1024, 37), (1, 1472, 37), (1, 2880, 37), (1, 1024, 131), (1, 1472, 131), (1, 4096, 131), (2, 1024, 37), (7, 1024, 37)],
)
def test_products_and_what_rides_along(rows: int, width: int, out: int, dtype: torch.dtype, backend: str) -> None:
    x = torch.randn(rows, width, device=DEVICE).to(dtype)
    weight = (torch.randn(out, width, device=DEVICE) / math.sqrt(width)).to(dtype)
    bias = torch.randn(out, device=DEVICE).to(dtype)
    near(linear(x, weight, backend=backend), x.double() @ weight.double().T)
    near(linear(x, weight, bias, backend=backend), x.double() @ weight.double().T + bias.double())
    residual = torch.randn(rows, out, device=DEVICE).to(dtype)
    want = residual.double() + x.double() @ weight.double().T
    assert linear(x, weight, residual_TN=residual, backend=backend) is residual
    near(residual, want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("from_one", [False, True])
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 1024, 37), (1, 1472, 131), (1, 4096, 131), (1, 96, 9), (3, 1024, 37)])
def test_norms_ride_along(rows: int, width: int, out: int, from_one: bool, dtype: torch.dtype, backend: str) -> None:
    x = 3 * torch.randn(rows, width, device=DEVICE).to(dtype)
    norm = Norm(torch.randn(width, device=DEVICE).to(dtype), 1e-2, from_one)
    weight = (torch.randn(out, width, device=DEVICE) / math.sqrt(width)).to(dtype)
    bias, residual = torch.randn(out, device=DEVICE).to(dtype), torch.randn(rows, out, device=DEVICE).to(dtype)
    want = norm64(x, norm) @ weight.double().T
    near(linear(x, weight, norm=norm, backend=backend), want)
    before = x.clone()
    normed, got = normed_linear(x, norm, weight, bias, backend=backend)
    near(normed, norm64(x, norm))
    near(got, want + bias.double())
    assert torch.equal(x, before)
    want += residual.double()
    near(linear(x, weight, norm=norm, residual_TN=residual, backend=backend), want)
    with pytest.raises(ValueError, match=rf"rows \({rows}, {width}\) .* weight \({width - 1},\)"):
        linear(x, weight, norm=Norm(norm.weight_E[1:], 1e-2), backend=backend)


def test_a_kernel_for_one_row_refuses_what_it_would_read_wrongly() -> None:
    x, weight = torch.zeros(1, 1024, device=DEVICE).half(), torch.zeros(1024, 8, device=DEVICE).half()
    with pytest.raises(ValueError, match=r"weights of torch.float16 with strides \(1, 8\)"):
        linear(x, weight.T, backend="triton")
    with pytest.raises(ValueError, match=r"rows \(1, 1023\) with strides \(1024, 1\) for weights \(8, 1024\)"):
        linear(x[:, 1:], weight.T.contiguous(), backend="triton")
    with pytest.raises(ValueError, match=r"rows of torch.float32 for weights of torch.float16"):
        linear(x.float(), weight.T.contiguous(), backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width", "wide"), [(0, 96, 5), (1, 1024, 37), (1, 1472, 67), (1, 96, 37), (3, 1024, 37)])
def test_gate_and_up(rows: int, width: int, wide: int, activation: str, dtype: torch.dtype, backend: str) -> None:
    x = torch.randn(rows, width, device=DEVICE).to(dtype)
    weight = (torch.randn(2 * wide, width, device=DEVICE) / math.sqrt(width)).to(dtype)
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    want = ACTIVATIONS[activation](gate) * up
    near(gated_product(x, weight, activation, backend=backend), want)
    near(gated(torch.cat((gate, up), -1).to(dtype), activation, backend=backend), want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width"),
    [(0, 1024), (1, 1024), (1, 96), (3, 1024), (2, 4096), (16, 4096), (17, 4096), (32, 4096), (33, 4096), (64, 4096)],
)
@pytest.mark.parametrize("dims", [range(37), range(37, 81), range(81, 100), range(100), range(5, 5)])
def test_gate_and_up_of_some_dims(dims: range, rows: int, width: int, dtype: torch.dtype, backend: str) -> None:
    x = torch.randn(rows, width + 16, device=DEVICE).to(dtype)[:, :width]  # rows that don't follow each other
    activation = "gelu" if rows == 2 else "silu"
    weight = (torch.randn(200, width, device=DEVICE) / math.sqrt(width)).to(dtype)
    got = gated_product(x, weight, activation, dims=dims, backend=backend)
    gate, up = ((x.double() @ weight[base:][list(dims)].double().T) for base in (0, 100))
    near(got, ACTIVATIONS[activation](gate) * up)
    with pytest.raises(ValueError, match="dims 90 to 101 of 100"):
        gated_product(x, weight, dims=range(90, 101), backend=backend)
    with pytest.raises(ValueError, match="activation must be one of silu"):
        gated_product(x, weight, "relu", dims=dims, backend=backend)


@pytest.mark.parametrize("width", [1024, 1472, 2880])
@pytest.mark.parametrize("block", [(2, 2048), (4, 1024), (4, 2048), (8, 512)])
def test_all_ways_to_cut_a_product(block: tuple[int, int], width: int) -> None:
    """Blocks wider than a row, too, and rows that fill none."""
    from kernels.layer_ops_triton import GemvConfig, gemv

    x = torch.randn(1, width, device=DEVICE).half()
    weight = (torch.randn(2 * 37, width, device=DEVICE) / math.sqrt(width)).half()
    residual, bias = torch.randn(1, 2 * 37, device=DEVICE).half(), torch.randn(2 * 37, device=DEVICE).half()
    want = x.double() @ weight.double().T
    config = GemvConfig(*block, num_warps=4, num_stages=2)
    near(gemv(x, weight, None, None, activation="silu", config=config), ACTIVATIONS["silu"](want[:, :37]) * want[:, 37:])
    want += residual.double() + bias.double()
    near(gemv(x, weight, bias, residual, config=config), want)
