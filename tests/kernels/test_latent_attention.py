"""Latent KV, one row as key and value of a token, against dense float64 attention, in layouts made to be awkward."""

import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config

from instance.exact import refuse_inexact
from instance.load import random_model
from instance.warmup import warm_up
from kernels import decode_attention, latent_attention, paged_attention_torch
from kernels.decode_attention import DecodeConfig, RowReading
from kernels.kv_blocks import store_kv
from kernels.latent_attention import LatentDecode
from kernels.paged_attention import attention_scratch_bytes, plan_attention
from kernels.reference import attention_state
from kernels.segments import AttentionSizes, Scoring, Segment
from kvstore.format import KVFormat
from kvstore.storage import KVStorage
from tests.kernels.test_paged_attention import DEVICE, NAN, ON_GPU, Case, cases, check, check_state, mixed_case, union
from tests.support.compiling import compiled

HEADS = [(4, 1), (7, 1), (80, 1)]
"""80 are cut into two head tiles."""


@settings(max_examples=100)
@given(
    cases(24, 150, HEADS, [24, 48], 4, windows=True),
    st.sampled_from([1, 3000, 1 << 20]),
    st.sampled_from([5000, 1 << 20]),
    st.sampled_from([300, 1 << 20]),
)
def test_torch_backend_is_dense_attention(case: Case, view_bytes: int, gather_bytes: int, score_bytes: int) -> None:
    few = {"_VIEW_BYTES": view_bytes, "_GATHER_BYTES": gather_bytes, "_SCORE_BYTES": score_bytes}
    with mock.patch.multiple(paged_attention_torch, **few):
        check(replace(case, value_dim=case.head_dim - 8), "torch")


@settings(max_examples=100 if ON_GPU else 15)
@given(cases(70, 700, HEADS, [48], 4) if ON_GPU else cases(7, 70, HEADS, [48], 2))
def test_triton_backend_is_dense_attention(case: Case) -> None:
    check(replace(case, value_dim=32), "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 16])
def test_torch_backend_in_every_dtype(block_size: int, dtype: torch.dtype) -> None:
    check(replace(mixed_case((16, 1), block_size, 576, dtype, 7), value_dim=512), "torch")


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not ON_GPU, reason="the interpreter has no bfloat16")),
    ],
)
@pytest.mark.parametrize(("heads", "block_size"), [(16, 64), (128, 16)])
def test_triton_backend_of_deepseeks_shapes(heads: int, block_size: int, dtype: torch.dtype) -> None:
    """576 numbers a token; V2-Lite has 16 heads, V3 128."""
    size = 40 if ON_GPU else 3
    check(replace(mixed_case((heads, 1), block_size, 576, dtype, size), value_dim=512), "triton")


@settings(max_examples=60 if ON_GPU else 15)
@given(
    st.lists(st.lists(st.integers(0, 400 if ON_GPU else 100), min_size=1, max_size=3), min_size=1, max_size=5),
    st.sampled_from([1, 16, 32, 64]),
    st.sampled_from([4, 7, 80]),
    st.booleans(),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_any_decode_rows_over_any_number_of_programs(
    lens: list[list[int]], block_size: int, heads: int, use_tma: bool, programs: int, seed: int
) -> None:
    """Each row reads one run or several; the tables' order is not that of q. By TMA where tiles lie in one block."""
    torch.manual_seed(seed)
    use_tma = use_tma and block_size % 16 == 0
    scale, dtype = 1.3 / math.sqrt(48), torch.float16 if use_tma else torch.float32
    sizes = AttentionSizes(
        num_rows=0,
        block_size=block_size,
        num_heads=heads,
        num_kv_heads=1,
        head_dim=48,
        dtype=dtype,
        device=DEVICE,
        value_dim=32,
    )
    config = DecodeConfig(block_n=16, num_warps=4, num_stages=2, programs_per_processor=1, use_tma=use_tma)
    with mock.patch.object(decode_attention, "num_processors", return_value=programs):
        kernel = LatentDecode(sizes, config)
    runs = [(row, n) for row, each in zip(torch.randperm(len(lens)).tolist(), lens, strict=True) for n in each]
    blocks = [-(-n // block_size) for _, n in runs]
    ids = torch.randperm(sum(blocks) + 2).tolist()
    readings = [RowReading(row, [ids.pop() for _ in range(count)], n) for (row, n), count in zip(runs, blocks, strict=True)]
    tables = kernel.upload_tables(readings)
    kv_1BPKD = torch.full((1, sum(blocks) + 2, block_size, 1, 48), NAN, dtype=dtype)
    q_THD = torch.randn(len(lens) + 1, heads, 48).to(dtype)
    want_out = torch.zeros(len(lens), heads, 32, dtype=torch.float64)
    want_lse = torch.full((len(lens), heads), -torch.inf, dtype=torch.float64)
    for reading in readings:
        token_S = torch.arange(reading.kv_len)
        k_S1D = torch.randn(reading.kv_len, 1, 48).to(dtype)
        kv_1BPKD[0, torch.tensor(reading.block_ids, dtype=torch.int64)[token_S // block_size], token_S % block_size] = k_S1D
        row = slice(reading.row, reading.row + 1)
        state = attention_state(q_THD[row].double(), k_S1D.double(), k_S1D[..., :32].double(), scale)
        want_out[row], want_lse[row] = union((want_out[row], want_lse[row]), state)
    out_THD = torch.full((len(lens) + 1, heads, 32), NAN, dtype=dtype, device=DEVICE)
    lse_TH = torch.full((len(lens) + 1, heads), NAN, device=DEVICE)
    kernel.run(q_THD.to(DEVICE), kv_1BPKD.to(DEVICE), Scoring(scale), tables, out_THD=out_THD, lse_TH=lse_TH)
    check_state(out_THD[:-1], lse_TH[:-1], want_out, want_lse)
    assert out_THD[-1].isnan().all()  # a row that the tables don't name is left alone


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_latents_are_stored_alone(backend: str) -> None:
    kv_1BPKD = torch.full((1, 3, 16, 1, 48), NAN, device=DEVICE)
    k_TKD, slots_T = torch.randn(3, 1, 48, device=DEVICE), torch.tensor([17, -1, 2], device=DEVICE)
    store_kv(k_TKD, None, kv_1BPKD, slots_T, backend=backend)
    flat_SKD = kv_1BPKD[0].flatten(0, 1)
    assert torch.equal(flat_SKD[[17, 2]], k_TKD[[0, 2]])
    assert int((~flat_SKD.isnan()).sum()) == 2 * 48
    with pytest.raises(ValueError, match="don't fit together"):
        store_kv(k_TKD, k_TKD, kv_1BPKD, slots_T, backend=backend)
    with pytest.raises(ValueError, match="don't fit together"):
        store_kv(k_TKD, None, kv_1BPKD.expand(2, -1, -1, -1, -1), slots_T, backend=backend)


def plan(
    segments: list[Segment], *, heads: tuple[int, int] = (4, 1), dims: tuple[int, int] = (48, 32), backend: str = "triton"
) -> object:
    return plan_attention(
        segments,
        2,
        block_size=16,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=dims[0],
        value_dim=dims[1],
        dtype=torch.float32,
        device=DEVICE,
        backend=backend,
    )


def test_what_the_kernels_do_not_take_is_refused() -> None:
    assert plan([])
    for heads, dims in (((4, 2), (48, 32)), ((4, 1), (40, 32)), ((4, 1), (48, 24)), ((4, 1), (32, 32))):
        with pytest.raises(ValueError, match="of latent KV the triton backend takes"):
            plan([], heads=heads, dims=dims)
    with pytest.raises(ValueError, match="from their beginning"):
        plan([Segment(0, 2, (0,), (3, 4), (1, 2))])
    with pytest.raises(ValueError, match="values of 49 numbers of a key"):
        plan([], dims=(48, 49), backend="torch")


def test_scratch_is_what_is_allocated() -> None:
    """Of decode rows exactly, of spans at most."""
    kernel = LatentDecode(
        AttentionSizes(
            num_rows=0,
            block_size=64,
            num_heads=16,
            num_kv_heads=1,
            head_dim=576,
            dtype=torch.float16,
            device=DEVICE,
            value_dim=512,
        )
    )
    pieces = kernel._pieces.out_XD.nbytes + kernel._pieces.lse_X.nbytes
    parts = latent_attention.parts_bytes(64, 1, 512, DEVICE)
    assert attention_scratch_bytes(9, 16, 1, 576, DEVICE, "triton", 512) == pieces + parts


def test_a_tiny_deepseek_by_these_kernels() -> None:
    """Steps of spans and of single rows, over an instance's kind of pool, as transformers' own attention; and made-up steps."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        "max_position_embeddings": 64,
    }
    ranks = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 2, "initializer_range": 0.1}
    model = random_model(DeepseekV3Config(**sizes, **ranks, **heads), torch.float32, DEVICE, seed=1)
    shape = model.shape
    assert (shape.head_dim, shape.value_dim) == (48, 32)
    assert refuse_inexact(model, "deepseek", block_size=16, backend="triton") < 1e-4
    storage = KVStorage(
        num_layers=2,
        num_blocks=2,
        block_size=16,
        num_kv_heads=1,
        head_dim=48,
        format=KVFormat(shape.dtype),
        device=DEVICE,
        parts=1,
    )
    storage.data_L2BPKD.fill_(NAN)
    with mock.patch.multiple("instance.warmup", _LONG_TOKENS=80, _CHUNK_ROWS=8):
        warm_up(model, storage, "triton", 8)
    assert torch.equal(storage.data_L2BPKD[:, :, 0], torch.zeros_like(storage.data_L2BPKD[:, :, 0]))
    assert storage.data_L2BPKD[:, :, 1].isnan().all()


def test_what_the_kernels_take_of_a_processor(tmp_path: Path) -> None:
    """By the compiler, for Hopper: two tiles are under way, and as many programs fit as are launched."""
    found: dict[str, tuple[int, int, int]] = compiled("tests.support.compiled", tmp_path)
    assert len(found) == 4
    for kernel, (shared, programs, tile) in found.items():
        assert programs * (shared + 1024) <= 228 * 1024, kernel
        assert shared >= 2 * tile, kernel
