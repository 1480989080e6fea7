"""Products with matrices of 8 bits a weight, of both backends against float64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.layer_ops import ACTIVATIONS, gated_product, linear, uses_gemv
from kernels.products import (
    SCHEMES,
    TILED_ROWS,
    TYPES,
    Kind,
    Quantised,
    Scheme,
    dequantise,
    product,
    quantise,
    rows_of_each_kernel,
    stack,
)
from tests.kernels.test_layer_ops import DTYPES, near
from tests.kernels.test_paged_attention import DEVICE
from tests.support.compiling import compiled


def make(num_out: int, num_in: int, kind: Kind, group: int = 0) -> Quantised:
    """Random; with a group, of scales that differ a lot."""
    made = quantise(torch.randn(num_out, num_in, device=DEVICE) / math.sqrt(num_in), kind)
    if not group:
        return made
    scale_NG = made.scale_NG * torch.rand(num_out, -(-num_in // group), device=DEVICE).add(0.1)
    return Quantised(made.weight_NE, scale_NG, group)


def weights64(matrix: Quantised) -> torch.Tensor:
    scale_NE = matrix.scale_NG.double().repeat_interleave(matrix.group, 1)[:, : matrix.shape[1]]
    return matrix.weight_NE.double() * scale_NE


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [300, 320, 20])
def test_quantised_weights_are_the_nearest_that_there_are(width: int, scheme: Scheme) -> None:
    weight_NE = torch.randn(7, width, device=DEVICE)
    weight_NE[2] = 0
    weight_NE[3] *= 1e-6
    weight_NE[4, :10] *= 1e3
    matrix = quantise(weight_NE, scheme)
    kind, group = SCHEMES[scheme]
    group = min(group or width, width)
    assert matrix.group == group and matrix.weight_NE.dtype == TYPES[kind]
    num_scales = math.ceil(width / group)
    assert matrix.nbytes == 7 * width + 7 * num_scales * (4 if num_scales == 1 else 2)
    got_NE = dequantise(matrix, torch.float32, backend="torch")
    assert torch.equal(got_NE[2], weight_NE[2])
    for got_Ne, want_Ne in zip(got_NE.split(group, 1), weight_NE.split(group, 1), strict=True):
        largest_N1 = want_Ne.abs().amax(1, keepdim=True)
        rounded = 2**-8 if num_scales > 1 else 1e-5  # scales
        torch.testing.assert_close(got_Ne.abs().amax(1, keepdim=True), largest_N1, rtol=rounded, atol=0)
        # of e4m3 half a step is 1/16 of a number at most, or 2^-10 of the least; of int8 half of 1/127 of the largest
        step = want_Ne.abs() / 16 + largest_N1 / 448 * 2**-10 if kind == "fp8" else largest_N1 / 254
        assert bool(((got_Ne - want_Ne).abs() <= step * (1.001 + rounded)).all())
    bf16 = dequantise(quantise(weight_NE.bfloat16(), scheme), torch.bfloat16, backend="torch")
    assert bf16.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("num_in", "group"), [(256, 0), (300, 128), (96, 32)])
def test_dequantises(num_in: int, group: int, kind: Kind, dtype: torch.dtype) -> None:
    matrix = make(5, num_in, kind, group)
    for backend in ("torch", "triton"):
        near(dequantise(matrix, dtype, backend=backend), weights64(matrix))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("group", [0, 128, 64])
@pytest.mark.parametrize(("rows", "num_in"), [(1, 1024), (1, 1472), (2, 256), (7, 300), (40, 192)])
def test_products(rows: int, num_in: int, group: int, kind: Kind, dtype: torch.dtype, backend: str) -> None:
    out = 37
    matrix = make(out, num_in, kind, group)
    x = torch.randn(rows, num_in, device=DEVICE).to(dtype)
    bias, residual = torch.randn(out, device=DEVICE).to(dtype), torch.randn(rows, out, device=DEVICE).to(dtype)
    want = x.double() @ weights64(matrix).T
    near(product(x, matrix, backend=backend), want)
    near(linear(x, matrix, bias, backend=backend), want + bias.double())
    summed = residual.double() + want
    assert linear(x, matrix, residual_TN=residual, backend=backend) is residual
    near(residual, summed)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("kind", "num_in", "group"), [("fp8", 1100, 0), ("int8", 1100, 128), ("fp8", 1024, 512), ("int8", 48, 0), ("fp8", 96, 32)]
)
@pytest.mark.parametrize(("rows", "activation"), [(1, "silu"), (1, "gelu"), (3, "gelu_tanh")])
def test_gate_and_up(rows: int, activation: str, kind: Kind, num_in: int, group: int, backend: str) -> None:
    matrix = make(2 * 37, num_in, kind, group)
    x = torch.randn(rows, num_in, device=DEVICE)
    gate, up = (x.double() @ weights64(matrix).T).chunk(2, -1)
    near(gated_product(x, matrix, activation, backend=backend), ACTIVATIONS[activation](gate) * up)
    with pytest.raises(ValueError, match="weights of 8 bits have no parts"):
        gated_product(x, matrix, activation, range(36), backend=backend)
    with pytest.raises(ValueError, match=rf"rows \({rows}, {num_in - 1}\) .* for weights \(74, {num_in}\)"):
        gated_product(x[:, 1:], matrix, activation, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("num_in", "group"), [(6144, 3072), (4608, 1536), (288, 96)])
def test_groups_need_not_be_powers_of_two(num_in: int, group: int, rows: int, dtype: torch.dtype) -> None:
    matrix = make(5, num_in, "fp8", group)
    matrix.scale_NG.mul_(torch.arange(1, 1 + matrix.scale_NG.shape[1], device=DEVICE))  # no two alike
    x = torch.randn(rows, num_in, device=DEVICE).to(dtype)
    near(product(x, matrix, backend="triton"), x.double() @ weights64(matrix).T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 8, 9, 40])
@pytest.mark.parametrize("num_in", [1024, 300])
def test_few_weights_share_a_scale_of_16_bits(num_in: int, rows: int, dtype: torch.dtype) -> None:
    matrix = quantise(torch.randn(70, num_in, device=DEVICE) * torch.logspace(-4, 0, 70, device=DEVICE)[:, None], "int8-32")
    assert matrix.scale_NG.dtype == torch.bfloat16
    x = torch.randn(rows, num_in, device=DEVICE).to(dtype)
    as_many_have_NE = dequantise(matrix, dtype, backend="torch").double()
    weight_NE = weights64(matrix) if rows == 1 else as_many_have_NE
    near(product(x, matrix, backend="triton"), x.double() @ weight_NE.T)


def test_many_rows_are_multiplied_with_the_same_weights() -> None:
    matrix = make(9, 48, "fp8")
    x = torch.randn(TILED_ROWS + 1, 48, device=DEVICE)
    many = product(x, matrix, backend="triton")
    near(many, x.double() @ weights64(matrix).T)
    near(product(x[:3], matrix, backend="triton"), many[:3].double())
    assert product(x[:0], matrix, backend="triton").shape == (0, 9)
    assert not uses_gemv(1, matrix, "torch") and not uses_gemv(2, matrix, "triton")


def test_parts_of_one_matrix_and_one_matrix_of_parts() -> None:
    parts = [make(n, 160, "fp8", 128) for n in (5, 3)]
    whole = stack(parts)
    near(dequantise(whole, torch.float32, backend="torch"), torch.cat([weights64(part) for part in parts]))
    view = whole.rows(5, 8)
    assert view.weight_NE.data_ptr() == whole.weight_NE[5].data_ptr()
    assert torch.equal(view.scale_NG, parts[1].scale_NG)
    with pytest.raises(ValueError, match="different types or groups"):
        stack([parts[0], make(3, 160, "int8", 128)])


def test_what_the_kernels_take_of_a_processor(tmp_path: Path) -> None:
    """By the compiler, for Hopper: nothing spills, and weights are brought 16 bytes at a time."""
    found: dict[str, dict[str, int]] = compiled("tests.support.compiled_products", tmp_path)
    assert len(found) == 2 * 3 * 4  # types, groups, rows
    for name, taken in found.items():
        assert taken["stack"] == taken["local"] == 0, name
        assert taken["wide"] > 0 and (taken["narrow"] == 0 or "groups of 4096" not in name), name  # but for their scales
        assert taken["shared"] + 1024 <= 228 * 1024 // (4 if "1 rows" in name else 1), name


@pytest.mark.parametrize("group", [0, 128])
def test_what_is_warmed_up_is_all_that_rows_compile(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the constants that kernels are launched with: nothing may be compiled once an instance is ready."""
    from kernels import products_triton

    launched: set[object] = set()

    class Noted:
        def __init__(self, kernel: str) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: object) -> Any:
            return lambda *_, **constants: launched.add((self._kernel, *constants.items()))

    for name in ("_gemv_kernel", "_product_kernel", "_add_parts_kernel", "_dequantise_kernel"):
        monkeypatch.setattr(products_triton, name, Noted(name))
    matrix = make(40, 8192, "fp8", group)
    for rows in rows_of_each_kernel(300):
        product(torch.zeros(rows, 8192, dtype=torch.float16, device=DEVICE), matrix, backend="triton")
    warm = frozenset(launched)
    for rows in range(1, 301):
        product(torch.zeros(rows, 8192, dtype=torch.float16, device=DEVICE), matrix, backend="triton")
    assert len(warm) == 9 and launched == warm


def test_what_does_not_fit_is_refused() -> None:
    matrix = make(5, 64, "fp8")
    for weight, scale, group in (
        (torch.zeros(5, 64), matrix.scale_NG, 64),
        (matrix.weight_NE, matrix.scale_NG, 32),
        (matrix.weight_NE, matrix.scale_NG.double(), 64),
        (matrix.weight_NE, matrix.scale_NG[:4], 64),
    ):
        with pytest.raises(ValueError, match="weights .* scales"):
            Quantised(weight, scale, group)
    with pytest.raises(ValueError, match=r"rows \(2, 63\) .* for weights \(5, 64\)"):
        product(torch.zeros(2, 63), matrix, backend="torch")
    with pytest.raises(ValueError, match="backend must be"):
        product(torch.zeros(2, 64), matrix, backend="cuda")
