"""Paged attention of both backends against dense float64 attention, over layouts made to be awkward.

On a machine with a GPU everything runs there; without one, the torch backend on CPU and the Triton code in its interpreter.
"""

import math
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import PagedAttention, Segment, gather_kv, paged_attention_torch, store_kv
from kernels.kv_blocks import FP8, SCALE_TYPES, scales_of_block
from kernels.paged_attention import plan_attention
from kernels.paged_attention_tiles import TiledAttention
from kernels.reference import attention_state, compare
from kernels.segments import Scoring

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
BOUNDS = {  # of out: RMS and maximum error
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-6, 2e-5),
    torch.float16: (1e-3, 1e-2),
    torch.bfloat16: (8e-3, 6e-2),
}
LSE_BOUNDS = {  # PyTorch's CPU kernel approximates exp for 16-bit inputs: 6e-6 and 3e-5 were seen
    torch.float64: (1e-6, 2e-6),
    torch.float32: (2e-6, 2e-5),
    torch.float16: (2e-5, 1e-4),
    torch.bfloat16: (2e-5, 1e-4),
}
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    segments: list[Segment]
    num_rows: int
    block_size: int
    heads: tuple[int, int]
    head_dim: int
    num_blocks: int
    dtype: torch.dtype = torch.float32
    seed: int = 0
    soft_cap: float = 0.0
    value_dim: int = 0
    kv_dtype: torch.dtype | None = None


def powers(least: int, stop: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Random powers of two from 2^least up to 2^(stop - 1)."""
    return torch.ldexp(torch.ones(shape), torch.randint(least, stop, shape))


def blank(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """KV that nobody has written: NaN, and in int8, which has none, of which the scales are."""
    return torch.full(shape, 99 if dtype == torch.int8 else NAN).to(dtype)


def made_up_kv(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-127, 128, shape).to(dtype) if dtype == torch.int8 else torch.randn(shape).to(dtype)


class Scales:
    """Made up, far apart, of each block and head, or in int8 of each of their tokens; NaN of what is not seen."""

    def __init__(self, kv_2BPKD: torch.Tensor) -> None:
        parts, num_blocks, block_size, num_kv_heads, _ = kv_2BPKD.shape
        self._of_tokens = kv_2BPKD.dtype == torch.int8
        shape = (parts, num_blocks, num_kv_heads, scales_of_block(kv_2BPKD.dtype, block_size))
        made = powers(-10, -5, shape) if self._of_tokens else powers(-4, 1, shape)
        self._made_2BKX = made.to(SCALE_TYPES[kv_2BPKD.dtype])
        self.seen_2BKX = torch.full_like(self._made_2BKX, NAN)

    def times(self, kv_2SKD: torch.Tensor, block_S: torch.Tensor, offset_S: torch.Tensor) -> torch.Tensor:
        """What the numbers at these places stand for, which are seen then."""
        at_S = offset_S if self._of_tokens else torch.zeros_like(offset_S)
        made_2BXK, seen_2BXK = self._made_2BKX.transpose(2, 3), self.seen_2BKX.transpose(2, 3)
        seen_2BXK[:, block_S, at_S] = made_2BXK[:, block_S, at_S]
        return kv_2SKD.double() * made_2BXK[:, block_S, at_S].double().unsqueeze(-1)


def put(kv_2BPKD: torch.Tensor, block_S: torch.Tensor, offset_S: torch.Tensor, kv_2SKD: torch.Tensor) -> None:
    """Torch writes no numbers of 8 bits by an index."""
    if kv_2BPKD.dtype == FP8:
        kv_2BPKD, kv_2SKD = kv_2BPKD.view(torch.uint8), kv_2SKD.view(torch.uint8)
    kv_2BPKD[:, block_S, offset_S] = kv_2SKD


def keys_and_values(kv_2SKD: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64. Of latent KV the values are the beginning of the keys."""
    kv_2SKD = kv_2SKD.double()
    return (kv_2SKD[0], kv_2SKD[0, ..., :value_dim]) if value_dim else (kv_2SKD[0], kv_2SKD[1])


def visible_tokens(segment: Segment, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and offset of each token from the first to the last that any row of the segment sees."""
    token_S = torch.arange(min(segment.starts, default=0), max(segment.kv_lens))
    ids = torch.tensor(segment.block_ids, dtype=torch.int64)
    return ids[token_S // block_size], token_S % block_size


def check_state(out_THD: torch.Tensor, lse_TH: torch.Tensor, want_out: torch.Tensor, want_lse: torch.Tensor) -> None:
    for actual, want, (rms, most) in (
        (lse_TH, want_lse, LSE_BOUNDS[out_THD.dtype]),
        (out_THD, want_out, BOUNDS[out_THD.dtype]),
    ):
        compare(actual, want, rms=rms, max=most)


def union(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of two disjoint sets of tokens."""
    lse_TH = torch.logaddexp(a[1], b[1])
    weights = [(lse - lse_TH.clamp(min=-1e300)).exp().unsqueeze(-1) for lse in (a[1], b[1])]
    return a[0] * weights[0] + b[0] * weights[1], lse_TH


def check(case: Case, backend: str, tiles: TiledAttention | None = None) -> None:
    """Run a plan twice, as two layers would, over poisoned pools and outputs."""
    num_heads, num_kv_heads = case.heads
    plan = plan_attention(
        case.segments,
        case.num_rows,
        block_size=case.block_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        device=DEVICE,
        backend=backend,
        tiles=tiles,
        value_dim=case.value_dim,
        kv_dtype=case.kv_dtype,
    )
    parts, out_dim = (1, case.value_dim) if case.value_dim else (2, case.head_dim)
    torch.manual_seed(case.seed)
    scale = 1.3 / math.sqrt(case.head_dim)
    for _ in range(2):
        # a layer of a bigger pool, and q as a slice of fused q, k and v: neither is contiguous as a whole
        pool = (parts, case.num_blocks + 3, case.block_size, num_kv_heads, case.head_dim)
        stored = case.kv_dtype or case.dtype
        kv_2BPKD = blank(pool, stored)[:, :-3]
        scales = Scales(kv_2BPKD) if case.kv_dtype is not None else None
        q_THD = torch.randn(case.num_rows, num_heads + 2 * num_kv_heads, case.head_dim).to(case.dtype)[:, :num_heads]
        want_out = torch.zeros(case.num_rows, num_heads, out_dim, dtype=torch.float64)
        want_lse = torch.full((case.num_rows, num_heads), -torch.inf, dtype=torch.float64)
        for segment in case.segments:
            block, offset = visible_tokens(segment, case.block_size)
            kv_2SKD = made_up_kv((parts, len(block), num_kv_heads, case.head_dim), stored)
            put(kv_2BPKD, block, offset, kv_2SKD)
            if scales is not None:
                kv_2SKD = scales.times(kv_2SKD, block, offset)
            rows = slice(segment.first_row, segment.first_row + segment.num_rows)
            hidden = min(segment.starts, default=0)
            state = attention_state(
                q_THD[rows].double(),
                *keys_and_values(kv_2SKD, case.value_dim),
                scale,
                torch.tensor(segment.kv_lens) - hidden,
                starts_T=torch.tensor(segment.starts) - hidden if segment.starts else None,
                soft_cap=case.soft_cap,
            )
            want_out[rows], want_lse[rows] = union((want_out[rows], want_lse[rows]), state)
        out_THD = torch.full(want_out.shape, NAN, dtype=case.dtype, device=DEVICE)
        lse_TH = torch.full(want_lse.shape, NAN, device=DEVICE)
        plan.run(
            q_THD.to(DEVICE),
            kv_2BPKD.to(DEVICE),
            scale,
            out_THD=out_THD,
            lse_TH=lse_TH,
            soft_cap=case.soft_cap,
            scales_2BKX=None if scales is None else scales.seen_2BKX.to(DEVICE),
        )
        check_state(out_THD, lse_TH, want_out, want_lse)


def make_segment(
    first_row: int, lens: list[int], block_ids: list[int], block_size: int, starts: tuple[int, ...] = ()
) -> Segment:
    """Takes the blocks it needs off the end of `block_ids`."""
    needed = -(-max(lens) // block_size)
    ids = tuple(block_ids[len(block_ids) - needed :])
    del block_ids[len(block_ids) - needed :]
    return Segment(first_row, len(lens), ids, tuple(lens), starts)


@st.composite
def starts_of(draw: st.DrawFn, lens: list[int]) -> tuple[int, ...]:
    """Of rows with these kv_lens, that see a window, a chunk, or what begins anywhere."""
    kind = draw(st.sampled_from(["whole", "window", "chunk", "any"]))
    size = draw(st.sampled_from([1, 2, 5, 16, 17, 40, 100]))
    match kind:
        case "whole":
            return ()
        case "window":
            return tuple(max(0, n - size) for n in lens)
        case "chunk":
            return tuple(max(0, n - 1) // size * size for n in lens)
        case _:
            return tuple(draw(st.integers(0, n)) for n in lens)


@st.composite
def kv_lens(draw: st.DrawFn, max_rows: int, max_tokens: int) -> list[int]:
    rows = draw(st.integers(1, max_rows))
    base = draw(st.integers(0, max_tokens))
    kind = draw(st.sampled_from(["constant", "causal", "stairs", "empty", "any order"]))
    if kind == "constant":
        return [base] * rows
    if kind == "causal":
        return list(range(base + 1, base + 1 + rows))
    if kind == "stairs":
        steps = draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows))
        return [base + sum(steps[: i + 1]) for i in range(rows)]
    if kind == "empty":
        return [0] * rows
    return draw(st.lists(st.integers(0, max_tokens), min_size=rows, max_size=rows))


@st.composite
def cases(
    draw: st.DrawFn,
    max_rows: int,
    max_tokens: int,
    heads: list[tuple[int, int]],
    dims: list[int],
    max_segments: int,
    windows: bool = False,
) -> Case:
    block_size = draw(st.sampled_from([1, 16, 64]))
    row = draw(st.integers(0, 2))
    rows_of: list[tuple[int, list[int]]] = []
    for _ in range(draw(st.integers(0, max_segments))):
        lens = draw(kv_lens(max_rows, max_tokens))
        rows_of.append((row, lens))
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):  # other runs that the same rows see
            others = draw(kv_lens(max_rows, max_tokens))
            rows_of.append((row, (others * len(lens))[: len(lens)]))
        row += len(lens) + draw(st.integers(0, 2))
    num_blocks = sum(-(-max(lens) // block_size) for _, lens in rows_of) + draw(st.integers(1, 5))
    ids = list(range(num_blocks))
    layout = draw(st.sampled_from(["shuffled", "consecutive", "runs"]))
    rng = draw(st.randoms(use_true_random=False))
    if layout == "shuffled":
        rng.shuffle(ids)
    elif layout == "runs":
        runs = [ids[i : i + 3] for i in range(0, num_blocks, 3)]
        rng.shuffle(runs)
        ids = [block for run in runs for block in run]
    return Case(
        segments=[
            make_segment(first, lens, ids, block_size, draw(starts_of(lens)) if windows else ()) for first, lens in rows_of
        ],
        num_rows=row,
        block_size=block_size,
        heads=draw(st.sampled_from(heads)),
        head_dim=draw(st.sampled_from(dims)),
        num_blocks=num_blocks,
        seed=draw(st.integers(0, 2**31)),
        soft_cap=draw(st.sampled_from([0.0, 0.0, 2.0])) if windows else 0.0,
    )


@settings(max_examples=120)
@given(
    cases(24, 150, [(4, 2), (9, 3), (8, 8), (32, 8)], [16, 20, 64], 4),
    st.sampled_from([1, 3000, 1 << 20]),
    st.sampled_from([5000, 1 << 20]),
)
def test_torch_backend_is_dense_attention(case: Case, view_bytes: int, gather_bytes: int) -> None:
    with mock.patch.multiple(paged_attention_torch, _VIEW_BYTES=view_bytes, _GATHER_BYTES=gather_bytes):
        check(case, "torch")


@settings(max_examples=30)
@given(cases(12, 80, [(4, 2), (9, 3)], [16], 3))
def test_plain_twin_is_dense_attention(case: Case) -> None:
    with mock.patch.object(paged_attention_torch, "_attend_fused", paged_attention_torch._attend_plain):
        check(case, "torch")


@settings(max_examples=100 if ON_GPU else 12)
@given(
    cases(70, 700, [(4, 2), (9, 3), (8, 8), (32, 8)], [16, 64], 4)
    if ON_GPU
    else cases(7, 70, [(4, 2), (9, 3), (2, 2)], [16], 2)
)
def test_triton_backend_is_dense_attention(case: Case) -> None:
    check(case, "triton")


@settings(max_examples=120)
@given(
    cases(24, 150, [(4, 2), (9, 3), (8, 8)], [16, 20], 4, windows=True),
    st.sampled_from([1, 3000, 1 << 20]),
    st.sampled_from([5000, 1 << 20]),
    st.sampled_from([1, 7, 256]),
    st.sampled_from([300, 1 << 20]),
)
def test_windows_of_the_torch_backend(case: Case, view_bytes: int, gather_bytes: int, mask_rows: int, score_bytes: int) -> None:
    few = {"_VIEW_BYTES": view_bytes, "_GATHER_BYTES": gather_bytes, "_MASK_ROWS": mask_rows, "_SCORE_BYTES": score_bytes}
    with mock.patch.multiple(paged_attention_torch, **few):
        check(case, "torch")


@settings(max_examples=100 if ON_GPU else 25)
@given(
    cases(70, 700, [(4, 2), (9, 3), (8, 8), (32, 8)], [16, 64], 4, windows=True)
    if ON_GPU
    else cases(7, 90, [(4, 2), (9, 3), (2, 2)], [16], 2, windows=True)
)
def test_windows_of_the_triton_backend(case: Case) -> None:
    check(case, "triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("window", [9, 64, 300])
def test_a_window_over_a_long_run_is_split_and_merged(window: int, backend: str) -> None:
    """A chunk of rows far back, beside a row alone and one that sees all, of scattered blocks."""
    chunk = tuple(range(500, 540))
    lens = [chunk, (777,), (600,)]
    ids = torch.randperm(200, generator=torch.Generator().manual_seed(5)).tolist()
    starts = [tuple(n - window for n in chunk), (777 - window,), ()]
    segments = [
        make_segment(first, list(each), ids, 16, start) for first, each, start in zip((0, 41, 42), lens, starts, strict=True)
    ]
    check(Case(segments, 44, 16, (4, 2), 16, 200), backend)


def mixed_case(heads: tuple[int, int], block_size: int, head_dim: int, dtype: torch.dtype, size: int) -> Case:
    """A long decode row, a causal chunk of odd length after a prefix, short rows, an empty row, gaps; blocks shuffled. The
    decode row and the chunk see two runs each."""
    chunk = 2 * size + 5
    rows_of = [
        (1, [60 * size + 3]),
        (1, [size]),
        (2, [5 * size] * chunk),
        (2, list(range(3 * size + 2, 3 * size + 2 + chunk))),
        (4 + chunk, [0]),
        (5 + chunk, [7, 7, 7, 8, 9, 9]),
        (11 + chunk, [0, 0, 1, 2, 3]),
    ]
    num_blocks = sum(-(-max(lens) // block_size) for _, lens in rows_of) + 4
    ids = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(size)).tolist()
    segments = [make_segment(first, lens, ids, block_size) for first, lens in rows_of]
    return Case(segments, 18 + chunk, block_size, heads, head_dim, num_blocks, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "block_size"), [((4, 2), 16), ((9, 3), 64), ((8, 8), 1), ((32, 8), 16)])
def test_torch_backend_in_every_dtype(heads: tuple[int, int], block_size: int, dtype: torch.dtype) -> None:
    check(mixed_case(heads, block_size, 64, dtype, 59), "torch")


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(not ON_GPU, reason="no GPU: the interpreter multiplies bfloat16 as its bits"),
        ),
    ],
)
def test_triton_backend_splits_and_merges(dtype: torch.dtype) -> None:
    check(mixed_case((6, 2), 64, 16, dtype, 9), "triton")


@pytest.mark.skipif(not ON_GPU, reason="no GPU: the interpreter is too slow for these sizes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize(
    ("heads", "block_size"), [((4, 2), 16), ((9, 3), 64), ((8, 8), 128), ((32, 8), 64), ((64, 1), 64), ((12, 4), 1)]
)
def test_triton_backend_large(heads: tuple[int, int], block_size: int, head_dim: int, dtype: torch.dtype) -> None:
    check(mixed_case(heads, block_size, head_dim, dtype, 123), "triton")


@pytest.mark.skipif(not ON_GPU, reason="no GPU: offsets of more than 31 bits need 9 GB of KV")
def test_offsets_of_more_than_31_bits() -> None:
    num_blocks, block_size, num_kv_heads, head_dim = (1 << 15) + 40, 64, 8, 128
    shape = (2, num_blocks, block_size, num_kv_heads, head_dim)
    needed = 2 * math.prod(shape) + (1 << 30)
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed:,} bytes of GPU memory, {free:,} are free")
    kv_2BPKD = torch.full(shape, NAN, dtype=torch.bfloat16, device=DEVICE)
    ids = [num_blocks - 1 - i for i in range(38)]
    num_tokens = len(ids) * block_size - 9
    assert min(ids) * block_size * num_kv_heads * head_dim > 2**31
    new_2SKD = torch.randn(2, num_tokens, num_kv_heads, head_dim, device=DEVICE).bfloat16()
    slots = [ids[j // block_size] * block_size + j % block_size for j in range(num_tokens)]
    store_kv(*new_2SKD, kv_2BPKD, torch.tensor(slots, device=DEVICE), backend="triton")
    k_SKD, v_SKD = gather_kv(kv_2BPKD, torch.tensor(ids, device=DEVICE), num_tokens, backend="triton")
    assert torch.equal(k_SKD, new_2SKD[0])
    assert torch.equal(v_SKD, new_2SKD[1])

    q_THD = torch.randn(201, 32, head_dim, device=DEVICE).bfloat16()
    lens = tuple(range(num_tokens - 199, num_tokens + 1))
    segments = [Segment(0, 1, tuple(ids), (num_tokens,)), Segment(1, 200, tuple(ids), lens)]
    plan = plan_attention(
        segments,
        201,
        block_size=block_size,
        num_heads=32,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        device=DEVICE,
        backend="triton",
    )
    out_THD, lse_TH = torch.empty_like(q_THD), torch.empty(201, 32, device=DEVICE)
    plan.run(q_THD, kv_2BPKD, 0.1, out_THD=out_THD, lse_TH=lse_TH)
    want_out, want_lse = attention_state(
        q_THD.double(), *new_2SKD.double(), 0.1, torch.tensor([num_tokens, *lens], device=DEVICE)
    )
    check_state(out_THD, lse_TH, want_out, want_lse)


def test_reference_is_torchs_own_attention() -> None:
    q, k, v = (torch.randn(n, h, 8, dtype=torch.float64) for n, h in ((5, 6), (11, 3), (11, 3)))
    mask = torch.arange(11) < torch.tensor([3, 4, 11, 1, 2])[:, None]
    out, lse = attention_state(q, k, v, 0.3, mask.sum(1))
    want = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    compare(out, want.transpose(0, 1), rms=1e-13, max=1e-12)
    scores = torch.einsum("thd,shd->ths", q, k.repeat_interleave(2, 1)) * 0.3
    want_lse = (scores.exp() * mask[:, None]).sum(-1).log()
    compare(lse, want_lse, rms=1e-13, max=1e-12)


def plan_of(segments: list[Segment], **changed: object) -> PagedAttention:
    arguments = {
        "block_size": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "dtype": torch.float32,
        "device": DEVICE,
        "backend": "torch",
    }
    return plan_attention(segments, 10, **(arguments | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment(0, 2, (1,), (3,))], "1 kv_lens"),
        ([Segment(0, 0, (1,), ())], "0 kv_lens"),
        ([Segment(8, 3, (1,), (3, 3, 3))], r"rows \[8, 11\)"),
        ([Segment(0, 3, (1,), (3, 3, 3)), Segment(2, 1, (2,), (1,))], "rows below 3 are taken"),
        ([Segment(0, 3, (1,), (3, 3, 3)), Segment(0, 2, (2,), (1, 1))], "rows below 3 are taken"),
        ([Segment(0, 1, (1, 2), (33,))], "2 blocks of 16 hold 32"),
        ([Segment(0, 1, (1, 2), (-1,))], "sees -1"),
        ([Segment(0, 1, (1, -2), (3,))], "names block -2"),
        ([Segment(0, 2, (1,), (3, 4), (0,))], "1 starts from 0 on"),
        ([Segment(0, 2, (1,), (3, 4), (1, 5))], "2 starts from 1 on"),
        ([Segment(0, 2, (1,), (3, 4), (-1, 0))], "2 starts from -1 on"),
    ],
)
def test_contradictory_segments_are_refused(segments: list[Segment], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(segments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_heads": 5}, "a multiple of the KV heads"),
        ({"backend": "cuda"}, "'torch' or 'triton', got 'cuda'"),
        ({"backend": "triton", "dtype": torch.float64}, "got torch.float64"),
        ({"backend": "triton", "head_dim": 80}, "head_dim a power of two from 16 to 256"),
        ({"backend": "triton", "num_heads": 142}, "71 query heads per KV head"),
    ],
)
def test_unsupported_shapes_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of([], **changed)


@pytest.mark.parametrize(("scale", "soft_cap"), [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (1.0, -2.0), (1.0, math.nan)])
def test_a_scale_that_is_not_positive_is_refused(scale: float, soft_cap: float) -> None:
    with pytest.raises(ValueError, match=f"a scale must be positive and a soft cap not negative, got {scale} and {soft_cap}"):
        Scoring(scale, soft_cap)


def test_run_refuses_other_tensors_than_planned() -> None:
    plan = plan_of([Segment(0, 1, (7,), (3,))])
    q_THD, lse_TH = torch.zeros(10, 4, 16, device=DEVICE), torch.zeros(10, 4, device=DEVICE)
    kv_2BPKD = torch.zeros(2, 8, 16, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="reads block 7, kv holds 7"):
        plan.run(q_THD, kv_2BPKD[:, :7], 1.0, out_THD=q_THD, lse_TH=lse_TH)
    with pytest.raises(ValueError, match=r"q must be \(10, 4, 16\)"):
        plan.run(q_THD[:9], kv_2BPKD, 1.0, out_THD=q_THD, lse_TH=lse_TH)
    with pytest.raises(ValueError, match="out must be"):
        plan.run(q_THD, kv_2BPKD, 1.0, out_THD=q_THD.half(), lse_TH=lse_TH)
    with pytest.raises(ValueError, match="lse must be"):
        plan.run(q_THD, kv_2BPKD, 1.0, out_THD=q_THD, lse_TH=lse_TH[:, :3])
    with pytest.raises(ValueError, match="one run of tokens"):
        plan.run(q_THD, kv_2BPKD.repeat_interleave(2, dim=1)[:, ::2], 1.0, out_THD=q_THD, lse_TH=lse_TH)
    with pytest.raises(ValueError, match="kv must be"):
        plan.run(q_THD, kv_2BPKD[:, :, :8], 1.0, out_THD=q_THD, lse_TH=lse_TH)
