"""KV of 8 bits: what is stored, bit by bit the same by both backends, and all kernels that read it against dense attention."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import decode_attention
from kernels.decode_attention import DecodeConfig
from kernels.decode_bytes import BytesDecode
from kernels.kv_blocks import FP8, FP8_MOST, SCALE_TYPES, check_scales, gather_kv_into, scales_of_block, store_kv
from kernels.layer_ops import Norm, rotate_and_store
from kernels.paged_attention import plan_attention
from kernels.paged_attention_tiles import TiledAttention
from kernels.reference import compare
from kernels.segments import AttentionSizes, Segment
from tests.kernels import test_decode_attention, test_paged_attention
from tests.kernels.test_latent_attention import HEADS as LATENT_HEADS
from tests.kernels.test_paged_attention import DEVICE, NAN, ON_GPU, Case, blank, cases, mixed_case, powers
from tests.support.compiling import compiled

BACKENDS = ["torch", "triton"]
HEADS = [(4, 2), (9, 3), (7, 1)]
Pool = tuple[torch.Tensor, torch.Tensor]


def pool(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, parts: int = 2, dtype: torch.dtype = FP8) -> Pool:
    """KV and scales, of which nothing is written."""
    kv_2BPKD = blank((parts, num_blocks, block_size, num_kv_heads, head_dim), dtype).to(DEVICE)
    scales = (parts, num_blocks, num_kv_heads, scales_of_block(dtype, block_size))
    return kv_2BPKD, torch.full(scales, NAN, dtype=SCALE_TYPES[dtype], device=DEVICE)


def store(rows_2TKD: torch.Tensor, to: Pool, slots: Sequence[int], backend: str) -> None:
    rows_2TKD, slots_T = rows_2TKD.to(DEVICE), torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    values = rows_2TKD[1] if len(rows_2TKD) == 2 else None
    store_kv(rows_2TKD[0], values, to[0], slots_T, scales_2BKX=to[1], backend=backend)


def read(pool: Pool, ids: Sequence[int], num_tokens: int, backend: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out_2SKD = torch.full((2, num_tokens, *pool[0].shape[3:]), NAN, dtype=dtype, device=DEVICE)
    ids_N = torch.tensor(ids, device=DEVICE)
    gather_kv_into(out_2SKD, pool[0], ids_N, 0, scales_2BKX=pool[1], backend=backend)
    return out_2SKD.cpu()


def bits(pool: Pool) -> list[torch.Tensor]:
    return [pool[0].view(torch.uint8).cpu(), pool[1].view(torch.uint8).cpu()]


def slots_of(ids: Sequence[int], block_size: int, start: int, stop: int) -> list[int]:
    return [ids[i // block_size] * block_size + i % block_size for i in range(start, stop)]


@pytest.mark.parametrize("stored", [FP8, torch.int8])
@pytest.mark.parametrize("parts", [2, 1], ids=["keys and values", "latents"])
@settings(max_examples=80 if ON_GPU else 8)
@given(
    st.sampled_from([1, 4, 16]),
    st.sampled_from([(1, 48), (3, 16), (2, 20)]),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.float16]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_both_backends_store_the_same_bits(
    parts: int,
    stored: torch.dtype,
    block_size: int,
    head: tuple[int, int],
    steps: list[tuple[int, int, bool]],
    dtype: torch.dtype,
    are_many: bool,
    seed: int,
) -> None:
    """Steps of rows of two runs, in turn or one behind the other, with padding; the sizes of numbers far apart."""
    torch.manual_seed(seed)
    pools = [pool(24, block_size, *head, parts, stored) for _ in BACKENDS]
    ids = torch.randperm(24).tolist()
    tables = [ids[i::2] for i in range(2)]
    ends = [0, 0]
    for first, second, takes_turns in steps:
        stops = [min(end + count, 12 * block_size) for end, count in zip(ends, (first, second), strict=True)]
        own = [slots_of(table, block_size, *span) for table, span in zip(tables, zip(ends, stops, strict=True), strict=True)]
        slots = own[0] + own[1]
        if takes_turns:
            slots = [slot for pair in zip(*(x + [-1] * (9 - len(x)) for x in own), strict=True) for slot in pair]
        ends = stops
        size = powers(-14, 9, (parts, len(slots), 1, 1))
        rows_2TKD = (torch.randn(parts, len(slots), *head) * size).to(dtype)
        for kept, backend in zip(pools, BACKENDS, strict=True):
            few = 0 if are_many else 256
            with mock.patch("kernels.kv_bytes_triton._FEW_ROWS", few):
                store(rows_2TKD, kept, slots, backend)
    for a, b in zip(bits(pools[0]), bits(pools[1]), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=40)
@given(st.sampled_from([1, 4, 16]), st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 2**31))
def test_how_a_text_is_cut_does_not_show(block_size: int, cuts: list[int], seed: int) -> None:
    """Where nothing leaves the range: numbers of 16 sizes, whichever of them opens a block."""
    torch.manual_seed(seed)
    total = sum(cuts)
    rows_2TKD = (
        (torch.rand(2, total, 2, 16) + 1) * powers(-5, 3, (2, total, 2, 16)) * (torch.randint(0, 2, (2, total, 2, 16)) * 2 - 1)
    )
    ids = torch.randperm(-(-total // block_size)).tolist()
    whole, cut = (pool(len(ids), block_size, 2, 16) for _ in range(2))
    store(rows_2TKD, whole, slots_of(ids, block_size, 0, total), "torch")
    at = 0
    for count in cuts:
        store(rows_2TKD[:, at : at + count], cut, slots_of(ids, block_size, at, at + count), "torch")
        at += count
    got = [read(x, ids, total, "torch") for x in (whole, cut)]
    assert torch.equal(*got)
    assert float(((got[0] - rows_2TKD) / rows_2TKD).abs().max()) <= 2**-4  # three bits of mantissa, rounded


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_in_int8(backend: str) -> None:
    """Its scale, and what becomes of its numbers: nothing depends on who else is in the block."""
    smallest = 2.0**-14
    for row, scale, numbers in (
        ([127.0, -1.0, 0.5, 1.5], 1.0, [127, -1, 0, 2]),  # to even
        ([-254.0, 3.0, 0.0, 1.0], 2.0, [-127, 2, 0, 0]),
        ([0.0, 0.0, -0.0, 0.0], 1.0, [0, 0, 0, 0]),
        ([smallest, 0.0, -smallest, 0.0], smallest, [1, 0, -1, 0]),
        ([1e30, 65504.0, -1e30, 0.0], 65504.0, [127, 1, -127, 0]),
        ([math.inf, 65504.0, -math.inf, 0.0], 65504.0, [127, 1, -127, 0]),
        ([NAN, 1.0, 2.0, 3.0], NAN, [0, 0, 0, 0]),
    ):
        kept = pool(2, 4, 1, 16, dtype=torch.int8)
        store(torch.tensor(row).repeat(4).expand(2, 1, 1, 16), kept, [5], backend)
        assert kept[0][:, 1, 1, 0, :4].tolist() == [numbers] * 2
        got = kept[1][:, 1, 0, 1].tolist()
        assert got == [scale] * 2 or (math.isnan(scale) and all(map(math.isnan, got)))
        assert bool(kept[1].isnan().sum() == kept[1].numel() - (0 if math.isnan(scale) else 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_in_int8_are_within_half_a_step(backend: str) -> None:
    rows_2TKD = torch.randn(2, 30, 3, 32) * powers(-5, 8, (2, 30, 3, 1))
    kept = pool(8, 4, 3, 32, dtype=torch.int8)
    ids = [3, 1, 7, 0, 2, 5, 4, 6]
    store(rows_2TKD, kept, slots_of(ids, 4, 0, 30), backend)
    got = read(kept, ids, 30, backend)
    step_2TK1 = rows_2TKD.abs().amax(-1, keepdim=True) / 127
    assert float(((got - rows_2TKD).abs() / step_2TK1).max()) < 0.57  # a scale in fp16 is up to 1/2048 less, 127 times


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_opens_a_block(backend: str) -> None:
    """One row at a time: the scale, and what a later row of other sizes becomes."""
    for opening, scale in (
        ([1.0, 0.5], 0.5),
        ([3.9, -1.0], 1.0),
        ([-4.0, 0.0], 2.0),
        ([0.0, 0.0], 1.0),  # nothing is known of what follows
        ([1e-30, 0.0], 2.0**-8),
        ([NAN, 2.0], 1.0),
        ([math.inf, 8.0], 4.0),
        ([NAN, math.inf], 1.0),
        ([1e30, 1.0], 2.0**98),
    ):
        kept = pool(2, 4, 1, 16)
        row = torch.tensor(opening).repeat(8).expand(2, 1, 1, 16)
        store(row, kept, [4], backend)
        assert kept[1][:, 1].flatten().tolist() == [scale] * 2
        assert bool(kept[1][:, 0].isnan().all())
        limit = FP8_MOST * scale
        later = torch.tensor([0.0, limit, 2 * limit, -4 * limit]).repeat(4).expand(2, 1, 1, 16)
        store(later, kept, [5], backend)
        got = read(kept, [1], 2, "torch")
        assert got[:, 1, 0, :4].tolist() == [[0.0, limit, limit, -limit]] * 2
        assert got[0, 0, 0, 0].isnan() == math.isnan(opening[0])
        assert kept[1][:, 1].flatten().tolist() == [scale] * 2


@pytest.mark.parametrize("stored", [FP8, torch.int8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_numbers_come_back_in_other_dtypes(backend: str, stored: torch.dtype) -> None:
    kept = pool(8, 4, 3, 16, dtype=stored)
    rows_2TKD = torch.randn(2, 30, 3, 16)
    store(rows_2TKD, kept, slots_of([3, 1, 7, 0, 2, 5, 4, 6], 4, 0, 30), backend)
    want = read(kept, [3, 1, 7, 0, 2, 5, 4, 6], 30, "torch")
    assert float(((want - rows_2TKD) / rows_2TKD).abs().quantile(0.8)) < 2**-4
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(read(kept, [3, 1, 7, 0, 2, 5, 4, 6], 30, backend, dtype), want.to(dtype))


@pytest.mark.parametrize("stored", [FP8, torch.int8])
@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize("num_rows", [1, 37, 300])
def test_the_fused_store_is_rotary_and_a_store(num_rows: int, with_norms: bool, stored: torch.dtype) -> None:
    torch.manual_seed(num_rows)
    num_heads, num_kv_heads, head_dim, block_size = 4, 2, 16, 16
    qkv_TE = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, device=DEVICE)
    cos_TR, sin_TR = torch.rand(2, num_rows, 8, device=DEVICE)
    norm = Norm(torch.rand(head_dim, device=DEVICE), 1e-5) if with_norms else None
    ids = torch.randperm(20).tolist()
    slots_T = torch.tensor(slots_of(ids, block_size, 0, num_rows), device=DEVICE)
    pools = [pool(20, block_size, num_kv_heads, head_dim, dtype=stored) for _ in BACKENDS]
    queries = [
        rotate_and_store(
            qkv_TE, cos_TR, sin_TR, slots_T, kv, num_heads, q_norm=norm, k_norm=norm, scales_2BKX=scales, backend=backend
        )
        for (kv, scales), backend in zip(pools, BACKENDS, strict=True)
    ]
    compare(queries[1], queries[0].double(), rms=1e-6, max=1e-5)
    got, want = (read(kept, ids, num_rows, "torch") for kept in pools)
    assert torch.equal(got[1], want[1])
    differ = got[0] != want[0]  # where rounding before decides between two numbers
    assert float(differ.float().mean()) < 0.01
    nearest = want[0].abs().clamp(min=0.01) if stored == FP8 else 8 * want[0].abs().amax(-1, keepdim=True) / 127
    assert float(((got[0] - want[0]) / nearest).abs().max()) <= 2**-3 * 1.01


@pytest.mark.parametrize("stored", [FP8, torch.int8])
@settings(max_examples=100)
@given(cases(24, 150, HEADS, [16, 24], 4, windows=True), st.sampled_from([5000, 1 << 20]))
def test_torch_backend_is_dense_attention(stored: torch.dtype, case: Case, gather_bytes: int) -> None:
    with mock.patch("kernels.paged_attention_torch._GATHER_BYTES", gather_bytes):
        test_paged_attention.check(replace(case, kv_dtype=stored), "torch")


@pytest.mark.parametrize("stored", [FP8, torch.int8])
@settings(max_examples=100 if ON_GPU else 5)
@given(cases(70, 700, HEADS, [32, 64], 4, windows=True) if ON_GPU else cases(7, 70, HEADS, [32], 2, windows=True))
def test_triton_backend_is_dense_attention(stored: torch.dtype, case: Case) -> None:
    test_paged_attention.check(replace(case, kv_dtype=stored), "triton")


@pytest.mark.parametrize("stored", [FP8, torch.int8])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter takes NaN, unseen, for 480
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
def test_triton_backend_in_half_precision(block_size: int, soft_cap: float, stored: torch.dtype) -> None:
    case = mixed_case((8, 2), block_size, 64, torch.float16, 40 if ON_GPU else 4)
    test_paged_attention.check(replace(case, kv_dtype=stored, soft_cap=soft_cap), "triton")


@pytest.mark.parametrize(("backend", "stored"), [("torch", FP8), ("torch", torch.int8), ("triton", FP8)])
@settings(max_examples=60 if ON_GPU else 5)
@given(cases(24, 150, LATENT_HEADS, [48], 4) if ON_GPU else cases(7, 70, LATENT_HEADS, [48], 2))
def test_latents_are_dense_attention(backend: str, stored: torch.dtype, case: Case) -> None:
    test_paged_attention.check(replace(case, value_dim=32, kv_dtype=stored), backend)


@pytest.mark.parametrize("stored", [FP8, torch.int8])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter takes NaN, unseen, for 480
@settings(max_examples=60 if ON_GPU else 5)
@given(
    st.lists(st.lists(st.integers(0, 400 if ON_GPU else 60), min_size=1, max_size=2), min_size=1, max_size=3),
    st.sampled_from([1, 16, 32, 64]),
    st.sampled_from(HEADS),
    st.sampled_from([0, 0, 20, 70]),
    st.sampled_from([0.0, 2.0]),
    st.booleans(),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_any_decode_rows_over_any_number_of_programs(
    stored: torch.dtype,
    lens: list[list[int]],
    block_size: int,
    heads: tuple[int, int],
    window: int,
    soft_cap: float,
    use_tma: bool,
    programs: int,
    seed: int,
) -> None:
    """Rows of one run or several, with and without windows and caps; by TMA where tiles lie in one block."""
    use_tma = use_tma and block_size % 16 == 0
    config = DecodeConfig(block_n=16, num_warps=4, num_stages=2, programs_per_processor=1, use_tma=use_tma)
    with mock.patch.object(decode_attention, "num_processors", return_value=programs):
        test_decode_attention.check(
            lens,
            block_size=block_size,
            heads=heads,
            config=config,
            dtype=torch.float16 if use_tma else torch.float32,
            head_dim=32,
            seed=seed,
            window=window,
            soft_cap=soft_cap,
            kv_dtype=stored,
        )


@pytest.mark.parametrize("stored", [FP8, torch.int8])
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1e4])
def test_queries_of_any_size_stay_in_range(scale: float, stored: torch.dtype) -> None:
    """They become fp16, divided by the power of two of their largest number, or whole numbers: that of scores is none of their
    business."""
    q_1HD, attend = one_row(stored)
    results = []
    for factor in (1.0, scale):
        q = q_1HD * factor
        results.append(attend(q, 0.2 * float(q_1HD.abs().max()) / float(q.abs().max())))
    bound = 0.2 if scale < 1e-3 else 2e-2  # of so small numbers fp16 itself has few bits
    compare(results[1][0], results[0][0].double(), rms=bound, max=bound)
    compare(results[1][1], results[0][1].double(), rms=bound, max=bound)


@pytest.mark.parametrize("stored", [FP8, torch.int8])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about NaN
def test_a_query_that_is_not_finite_shows(value: float, stored: torch.dtype) -> None:
    q_1HD, attend = one_row(stored)
    q_1HD[0, 1, 5] = value
    out_1HD, lse_1H = attend(q_1HD, 0.2)
    assert out_1HD[0, 1].isnan().all() and lse_1H[0, 1].isnan()
    assert out_1HD[0, [0, 2, 3]].isfinite().all()


def one_row(stored: torch.dtype) -> tuple[torch.Tensor, Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]]:
    """Queries of a row in fp16, and what gives out and lse of them and a scale against 64 tokens."""
    torch.manual_seed(0)
    sizes = AttentionSizes(
        num_rows=0, block_size=16, num_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.float16, device=DEVICE, kv_dtype=stored
    )
    kernel = BytesDecode(sizes)
    kv, scales = pool(4, 16, 2, 32, dtype=stored)
    store(torch.randn(2, 64, 2, 32), (kv, scales), list(range(64)), "torch")
    tables = kernel.upload_tables([decode_attention.RowReading(0, [0, 1, 2, 3], 64)])

    def attend(q_1HD: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.empty(1, 4, 32, device=DEVICE).half(), torch.empty(1, 4, device=DEVICE)
        kernel.run(q_1HD, kv, decode_attention.Scoring(scale), tables, out_THD=out, lse_TH=lse, scales_2BKX=scales)
        return out, lse

    return torch.randn(1, 4, 32, device=DEVICE).half(), attend


@pytest.mark.parametrize("stored", [FP8, torch.int8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_gather_the_numbers(backend: str, stored: torch.dtype) -> None:
    """Consecutive blocks, too: the library's dense kernel takes no numbers of 8 bits."""
    torch.manual_seed(0)
    dtype = torch.float16
    sizes = AttentionSizes(
        num_rows=0, block_size=4, num_heads=4, num_kv_heads=2, head_dim=32, dtype=dtype, device=DEVICE, kv_dtype=stored
    )
    tiles = TiledAttention(sizes, backend=backend, row_tiles=(8, 4), token_tiles=(32, 16), least_pairs=1)
    kept = pool(20, 4, 2, 32, dtype=stored)
    store(torch.randn(2, 80, 2, 32), kept, list(range(80)), "torch")
    tiles.warm_up(*kept)
    q_THD = torch.randn(20, 4, 32, device=DEVICE).to(dtype)
    segment = Segment(0, 20, tuple(range(20)), tuple(range(61, 81)))
    plan = tiles.plan([segment])
    assert plan.calls
    assert all(call.pool_token is None for call in plan.calls)
    shape = {"block_size": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "dtype": dtype, "device": DEVICE}
    rest = plan_attention(plan.left_over, 20, **shape, kv_dtype=stored, backend=backend)  # type: ignore[arg-type]
    out_THD, lse_TH = torch.empty_like(q_THD), torch.empty(20, 4, device=DEVICE)
    rest.run(q_THD, kept[0], 0.2, out_THD=out_THD, lse_TH=lse_TH, scales_2BKX=kept[1])
    tiles.run(plan, q_THD, kept[0], 0.2, out_THD=out_THD, lse_TH=lse_TH, scales_2BKX=kept[1])
    want_THD, want_TH = torch.empty_like(q_THD), torch.empty(20, 4, device=DEVICE)
    whole = plan_attention([segment], 20, **shape, kv_dtype=stored, backend="torch")  # type: ignore[arg-type]
    whole.run(q_THD, kept[0], 0.2, out_THD=want_THD, lse_TH=want_TH, scales_2BKX=kept[1])
    compare(out_THD, want_THD.double(), rms=1e-3, max=1e-2)
    compare(lse_TH, want_TH.double(), rms=1e-4, max=1e-3)


def test_scales_must_fit() -> None:
    kv, scales = pool(3, 4, 2, 16)
    k_TKD, slots_T = torch.zeros(2, 2, 16, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"float8_e4m3fn without scales"):
        store_kv(k_TKD, k_TKD, kv, slots_T, backend="torch")
    with pytest.raises(ValueError, match=r"float32 with scales: they are of torch.float8_e4m3fn and torch.int8"):
        store_kv(k_TKD, k_TKD, kv.float(), slots_T, scales_2BKX=scales, backend="torch")
    for wrong in (scales[:, :2], scales.double(), scales[..., 0], scales.repeat_interleave(2, 2)[:, :, ::2]):
        with pytest.raises(ValueError, match=r"scales must be \(2, 3, 2, 1\) torch.float32"):
            check_scales(kv, wrong)
    with pytest.raises(ValueError, match=r"scales must be \(2, 3, 2, 4\) torch.float16"):
        check_scales(kv.view(torch.int8), scales)
    shape = {"block_size": 4, "num_heads": 2, "num_kv_heads": 2, "dtype": torch.float32, "device": DEVICE}
    with pytest.raises(ValueError, match=r"in torch.float32, as queries are, or in torch.float8_e4m3fn or torch.int8, not in"):
        plan_attention([], 0, **shape, head_dim=16, kv_dtype=torch.float16, backend="torch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of KV of 8 bits the triton backend takes head_dim from 32 on, got 16"):
        plan_attention([], 0, **shape, head_dim=16, kv_dtype=FP8, backend="triton")  # type: ignore[arg-type]
    latent = shape | {"num_kv_heads": 1, "head_dim": 48, "value_dim": 32}
    with pytest.raises(ValueError, match="the kernels of latent KV know no scales of tokens"):
        plan_attention([], 0, **latent, kv_dtype=torch.int8, backend="triton")  # type: ignore[arg-type]


def test_what_the_kernels_take_of_a_processor(tmp_path: Path) -> None:
    """Compiled for Hopper, where numbers are taken apart by other instructions than in the interpreter."""
    found = compiled("tests.support.compiled_kv_bytes", tmp_path)
    assert len(found) == 10
    for name, (shared, programs, loaded_by_bytes) in found.items():
        assert programs * (shared + 1024) <= 228 * 1024, name
        assert not loaded_by_bytes, name
