"""Tiled attention: what the cut covers, and that tiles and the page kernel together make dense attention.

Without a GPU PyTorch's CPU kernel stands for cuDNN, and the Triton kernels run in their interpreter.
"""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import groupby, pairwise
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import Segment, paged_attention_tiles, paged_attention_triton
from kernels.paged_attention import plan_attention
from kernels.paged_attention_tiles import TiledAttention, is_tileable, merge_parts, split_segment, uses_tiles
from kernels.reference import attention_state, compare
from kernels.segments import AttentionSizes
from tests.kernels.test_paged_attention import Case, union, visible_tokens
from tests.kernels.test_paged_attention import check as paged_check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
BACKENDS = ["torch", "triton"]
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.bfloat16]
BOUNDS = {torch.float32: (1e-6, 2e-5), torch.float16: (1e-3, 1e-2), torch.bfloat16: (8e-3, 6e-2)}  # of out: RMS, maximum
LSE_BOUNDS = {  # PyTorch's CPU kernel approximates exp for 16-bit inputs
    torch.float32: (2e-6, 2e-5),
    torch.float16: (5e-5, 1e-4),
    torch.bfloat16: (5e-5, 1e-4),
}
NAN = float("nan")


def make_sizes(
    block_size: int = 4, heads: tuple[int, int] = (4, 2), head_dim: int = 16, dtype: torch.dtype = DTYPES[-1]
) -> AttentionSizes:
    return AttentionSizes(
        num_rows=0,
        block_size=block_size,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        dtype=dtype,
        device=DEVICE,
    )


def kv_lens(num_rows: int, first: int, is_causal: bool) -> tuple[int, ...]:
    return tuple(range(first, first + num_rows)) if is_causal else (first,) * num_rows


@settings(max_examples=200)
@given(
    num_rows=st.integers(1, 90),
    first_len=st.integers(1, 300),
    is_causal=st.booleans(),
    block_size=st.sampled_from([1, 4, 8]),
    row_tiles=st.sampled_from([(32, 16, 8), (16, 4), (5,), (100,)]),
    token_tiles=st.sampled_from([(64, 16, 8), (40, 8), (8,), (400,)]),
    least_pairs=st.sampled_from([1, 100, 400]),
    first_row=st.integers(0, 7),
)
def test_each_visible_token_is_in_one_job(
    num_rows: int,
    first_len: int,
    is_causal: bool,
    block_size: int,
    row_tiles: tuple[int, ...],
    token_tiles: tuple[int, ...],
    least_pairs: int,
    first_row: int,
) -> None:
    lens = kv_lens(num_rows, first_len, is_causal)
    ids = tuple(range(-(-lens[-1] // block_size)))
    segment = Segment(first_row, num_rows, ids, lens)
    jobs, left_over = split_segment(segment, block_size, row_tiles, token_tiles, least_pairs)

    times_TS = torch.zeros(num_rows, lens[-1], dtype=torch.int64)
    for job in jobs:
        seen = torch.ones(job.num_rows, job.num_tokens, dtype=torch.int64)
        row = job.first_row - first_row
        times_TS[row : row + job.num_rows, job.first_token : job.first_token + job.num_tokens] += (
            seen.tril() if job.is_causal else seen
        )
    times_T = torch.zeros(num_rows, dtype=torch.int64)
    for segment in left_over:
        token = segment.block_ids[0] * block_size  # the ids count up from 0
        assert len(segment.block_ids) * block_size >= max(segment.kv_lens) == max(segment.kv_lens[-1:])
        for i, num_tokens in enumerate(segment.kv_lens):
            row = segment.first_row - first_row + i
            times_TS[row, token : token + num_tokens] += 1
            times_T[row] += 1
    assert torch.equal(times_TS, (torch.arange(lens[-1]) < torch.tensor(lens)[:, None]).long())
    assert int(times_T.max()) <= 1
    shapes = {(job.num_rows, job.num_tokens, job.is_causal) for job in jobs}
    sizes = make_sizes(block_size)
    tiles = TiledAttention(sizes, backend="torch", row_tiles=row_tiles, token_tiles=token_tiles, least_pairs=least_pairs)
    assert shapes <= set(tiles.shapes())
    runs = [tokens for tokens, _ in groupby((job.first_token, job.num_tokens) for job in jobs)]
    assert len(runs) == len(set(runs)), "tokens of several row tiles would be gathered more than once"


def test_default_tiles() -> None:
    ids = tuple(range(3000))
    jobs, left_over = split_segment(Segment(0, 2048, ids, kv_lens(2048, 131072 + 101, True)), 64)
    assert [(job.num_rows, job.first_token, job.num_tokens, job.is_causal) for job in jobs] == [
        (2048, 0, 65536, False),
        (2048, 65536, 65536, False),
        (2048, 131172, 2048, True),
    ]
    assert left_over == [Segment(0, 2048, ids[2048:2050], (100,) * 2048)]
    assert len(TiledAttention(make_sizes(64, (2, 1)), backend="torch").shapes()) == 42


def test_default_tiles_of_few_rows() -> None:
    """Only long tiles are worth a call; the page kernel takes the rest, and the rows' own tokens with it."""
    ids, lens = tuple(range(2000)), kv_lens(200, 100_000, True)
    jobs, left_over = split_segment(Segment(0, 200, ids, lens), 64)
    assert [(job.num_rows, job.first_token, job.num_tokens, job.is_causal) for job in jobs] == [
        (128, 0, 65536, False),
        (128, 65536, 32768, False),
    ]
    assert left_over == [
        Segment(0, 128, ids[1536:1565], tuple(count - 98304 for count in lens[:128])),
        Segment(128, 72, ids, lens[128:]),
    ]


def layout(kind: str, num_blocks: int, rng: Random) -> list[int]:
    """Block ids: as they come, in no order, or one run that is broken in the middle."""
    ids = list(range(num_blocks))
    if kind == "shuffled":
        rng.shuffle(ids)
    if kind == "broken":
        middle = num_blocks // 2
        ids = ids[middle:] + ids[:middle]
    return ids


def check(
    tiles: TiledAttention,
    segment: Segment,
    num_rows: int,
    *,
    others: Sequence[Segment] = (),
    untiled: Sequence[Segment] = (),
    seed: int = 0,
    page_kernel: str = "torch",
) -> None:
    """As an instance does it, twice with other data over poisoned pools and outputs: left-over rows by the page kernel, then
    the tiles. All rows but the segment's must be left alone. `others` and `untiled`: of the same rows."""
    sizes = tiles.sizes
    torch.manual_seed(seed)
    scale = 1.3 / math.sqrt(sizes.head_dim)
    plan = tiles.plan([segment, *others], untiled)
    rest = plan_attention(
        plan.left_over,
        num_rows,
        block_size=sizes.block_size,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        dtype=sizes.dtype,
        device=DEVICE,
        backend=page_kernel,
    )
    runs = [segment, *others, *untiled]
    rows = slice(segment.first_row, segment.first_row + segment.num_rows)
    for fused in (True, False):
        shape = (2, max(max(run.block_ids) for run in runs) + 4, sizes.block_size, sizes.num_kv_heads, sizes.head_dim)
        kv_2BPKD = torch.full(shape, NAN, dtype=sizes.dtype)
        q_THD = torch.randn(num_rows, sizes.num_heads + 2, sizes.head_dim).to(sizes.dtype)[:, : sizes.num_heads]
        states = []
        for run in runs:
            block_S, offset_S = visible_tokens(run, sizes.block_size)
            kv_2SKD = torch.randn(2, len(block_S), *shape[3:]).to(sizes.dtype)
            kv_2BPKD[:, block_S, offset_S] = kv_2SKD
            states.append(attention_state(q_THD[rows].double(), *kv_2SKD.double(), scale, torch.tensor(run.kv_lens)))
        want = reduce(union, states)

        q_THD = q_THD.to(DEVICE) if fused else q_THD.contiguous().to(DEVICE)
        kv_2BPKD = kv_2BPKD.to(DEVICE)[:, :-3]
        out_THD = torch.full((num_rows, sizes.num_heads, sizes.head_dim), NAN, dtype=sizes.dtype, device=DEVICE)
        lse_TH = torch.full(out_THD.shape[:2], NAN, device=DEVICE)
        rest_out_THD, rest_lse_TH = out_THD.clone(), lse_TH.clone()
        rest.run(q_THD, kv_2BPKD, scale, out_THD=rest_out_THD, lse_TH=rest_lse_TH)
        for part in plan.left_over:
            at = slice(part.first_row, part.first_row + part.num_rows)
            out_THD[at], lse_TH[at] = rest_out_THD[at], rest_lse_TH[at]
        tiles.run(plan, q_THD, kv_2BPKD, scale, out_THD=out_THD, lse_TH=lse_TH)

        compare(out_THD[rows], want[0], rms=BOUNDS[sizes.dtype][0], max=BOUNDS[sizes.dtype][1])
        compare(lse_TH[rows], want[1], rms=LSE_BOUNDS[sizes.dtype][0], max=LSE_BOUNDS[sizes.dtype][1])
        out_THD[rows], lse_TH[rows] = NAN, NAN
        assert bool(out_THD.isnan().all()) and bool(lse_TH.isnan().all())


@settings(max_examples=60)
@given(
    num_rows=st.integers(1, 45),
    first_len=st.integers(1, 120),
    is_causal=st.booleans(),
    block_size=st.sampled_from([1, 4, 16]),
    heads=st.sampled_from([(4, 2), (9, 3), (8, 8)]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["consecutive", "shuffled", "broken"]),
    token_tiles=st.sampled_from([(64, 32, 16), (16,), (48, 16)]),
    rng=st.randoms(use_true_random=False),
)
def test_tiles_and_rest_are_dense_attention(
    num_rows: int,
    first_len: int,
    is_causal: bool,
    block_size: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    kind: str,
    token_tiles: tuple[int, ...],
    rng: Random,
) -> None:
    lens = kv_lens(num_rows, first_len, is_causal)
    ids = tuple(layout(kind, -(-lens[-1] // block_size), rng))
    sizes = make_sizes(block_size, heads, 16, dtype)
    tiles = TiledAttention(sizes, backend="torch", row_tiles=(16, 8, 4), token_tiles=token_tiles, least_pairs=1)
    check(tiles, Segment(3, num_rows, ids, lens), num_rows + 5, seed=rng.randrange(2**31))


@settings(max_examples=30)
@given(
    num_rows=st.integers(1, 45),
    first_lens=st.lists(st.integers(1, 120), min_size=2, max_size=3),
    untiled=st.booleans(),
    row_tiles=st.sampled_from([(16, 8, 4), (12, 5)]),
    rng=st.randoms(use_true_random=False),
)
def test_tiles_of_several_runs_are_dense_attention(
    num_rows: int, first_lens: list[int], untiled: bool, row_tiles: tuple[int, ...], rng: Random
) -> None:
    lens = [kv_lens(num_rows, n, i == 1) for i, n in enumerate(first_lens)]
    lens += [tuple(rng.randrange(9) for _ in range(num_rows))] if untiled else []
    blocks = [-(-max(each) // 4) for each in lens]
    ids = layout("shuffled", sum(blocks) + 1, rng)
    runs = [
        Segment(3, num_rows, tuple(ids.pop() for _ in range(count)) or (ids[0],), each)
        for count, each in zip(blocks, lens, strict=True)
    ]
    tiles = TiledAttention(
        make_sizes(dtype=DTYPES[0]), backend="torch", row_tiles=row_tiles, token_tiles=(64, 16), least_pairs=1
    )
    tiled = len(first_lens)
    check(tiles, runs[0], num_rows + 5, others=runs[1:tiled], untiled=runs[tiled:], seed=rng.randrange(2**31))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "is_causal"), [("consecutive", True), ("broken", True), ("shuffled", False)])
def test_with_triton(dtype: torch.dtype, kind: str, is_causal: bool) -> None:
    """Two row tiles and a row over; three sizes of token tiles, a rest; blocks of a size that isn't a power of two."""
    lens = kv_lens(13, 107, is_causal)
    ids = tuple(layout(kind, -(-lens[-1] // 6), Random(5)))
    sizes = make_sizes(6, (9, 3), 16, dtype)
    tiles = TiledAttention(sizes, backend="triton", row_tiles=(8, 4), token_tiles=(48, 24, 12), least_pairs=1)
    tiles.warm_up(torch.zeros(2, 1, 6, 3, 16, dtype=dtype, device=DEVICE))
    # the interpreter multiplies bfloat16 as its bits
    check(tiles, Segment(2, 13, ids, lens), 17, page_kernel="triton" if ON_GPU or dtype != torch.bfloat16 else "torch")


@pytest.mark.parametrize("windowed", [False, True])
def test_some_runs_in_tiles_and_some_by_the_page_kernel(windowed: bool) -> None:
    """Of two spans and a row, all of several runs; which are tiled depends on the run. Where rows see by a window, only those
    of which it hides nothing."""
    dtype = DTYPES[0]
    ids = layout("shuffled", 70, Random(3))
    rows_of = [(0, (9,)), (0, (17,)), (1, (37,) * 13), (1, kv_lens(13, 21, True)), (1, tuple(range(0, 26, 2)))]
    rows_of += [(15, (0, 3, 3, 4, 9)), (15, (12,) * 5)]
    segments = []
    for first, lens in rows_of:
        starts = tuple(max(0, n - 13) for n in lens) if windowed and lens[-1] > 20 else ()
        segments.append(Segment(first, len(lens), tuple(ids.pop() for _ in range(-(-max(lens) // 4))), lens, starts))
    assert [is_tileable(segment) for segment in segments[2:]] == [not windowed, not windowed, False, False, True]
    sizes = make_sizes(dtype=dtype)
    tiles = TiledAttention(sizes, backend="triton", row_tiles=(8, 4), token_tiles=(16, 8), least_pairs=1)
    case = Case(segments, 21, 4, (4, 2), 16, 70, dtype)
    with mock.patch.object(paged_attention_triton, "_is_for_tiles", lambda s, _: s.num_rows > 1 and is_tileable(s)):
        paged_check(case, "triton", tiles)


def test_gathers_only_what_is_scattered_and_that_once() -> None:
    sizes = make_sizes()
    tiles = TiledAttention(sizes, backend="torch", row_tiles=(8, 4), token_tiles=(16, 8), least_pairs=1)
    gathered: list[tuple[int, int]] = []
    gather = paged_attention_tiles.gather_kv_into

    def count(out_2SKD: torch.Tensor, kv: torch.Tensor, ids: torch.Tensor, first_token: int, **options: Any) -> None:
        gathered.append((first_token, out_2SKD.shape[1]))
        gather(out_2SKD, kv, ids, first_token, **options)

    with mock.patch.object(paged_attention_tiles, "gather_kv_into", count):
        check(tiles, Segment(0, 24, tuple(range(20)), (80,) * 24), 24)
        assert gathered == []
        # 80 tokens for three row tiles; those from 32 on lie in one run, those from 48 on in another
        ids = (19, 3, 5, 7, 2, 0, 1, 18, *range(9, 13), *range(4, 5), 6, 8, 13, *range(14, 18))
        check(tiles, Segment(0, 24, ids, (80,) * 24), 24)
        assert gathered == [(0, 16), (16, 16), (48, 16)] * 2


def test_warm_up_meets_every_shape_and_layout() -> None:
    """Whatever a run may hand to the library has been handed to it before: plans are kept by sizes and strides."""
    sizes = make_sizes()
    tiles = TiledAttention(sizes, backend="torch", row_tiles=(16, 4), token_tiles=(32, 8), least_pairs=1)
    seen: set[object] = set()
    attend = paged_attention_tiles.attend

    def note(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *how: int) -> tuple[torch.Tensor, ...]:
        seen.add((q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), how))
        return attend(q, k, v, scale, *how)

    with mock.patch.object(paged_attention_tiles, "attend", note):
        tiles.warm_up(torch.full((2, 2, 4, 2, 16), NAN, dtype=sizes.dtype, device=DEVICE))
        assert len(seen) == len(tiles.shapes()) == 6
        warm = seen.copy()
        for kind in ("consecutive", "shuffled"):
            check(tiles, Segment(1, 41, tuple(layout(kind, 33, Random(1))), kv_lens(41, 91, True)), 43)
        assert seen == warm


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [16, 20, 128])
@pytest.mark.parametrize("num_parts", [1, 2, 5])
@pytest.mark.parametrize("has_state", [True, False])
def test_merging_states(backend: str, head_dim: int, num_parts: int, has_state: bool) -> None:
    """Rows of other layouts and dtypes, into the state itself, too."""
    q, k, v = torch.randn(5, 3, head_dim), torch.randn(30, 3, head_dim), torch.randn(30, 3, head_dim)
    want = attention_state(q.double(), k.double(), v.double(), 0.4)
    ends = [0, *range(3, 3 + num_parts - 1 + has_state), 30]
    found = [attention_state(q, k[a:b], v[a:b], 0.4) for a, b in pairwise(ends)]
    first = (found[0][0].to(DEVICE), found[0][1].T.contiguous().T.to(DEVICE)) if has_state else None
    outs, lses = zip(*found[has_state:], strict=True)
    parts = torch.stack(outs).to(DEVICE), torch.stack([lse.T for lse in lses]).transpose(1, 2).to(DEVICE)
    result = torch.full((5, 7, head_dim), NAN, device=DEVICE)[:, 2:5], torch.full((5, 3), NAN, device=DEVICE)
    merge_parts(first, parts, result, backend=backend)
    compare(result[0], want[0], rms=3e-6, max=3e-5)
    compare(result[1], want[1], rms=3e-6, max=3e-5)
    if first is not None:
        merge_parts(first, parts, first, backend=backend)
        assert torch.equal(first[0], result[0]) and torch.equal(first[1], result[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_merging_states_far_apart(backend: str) -> None:
    """An empty state on either side, and on both; lse far apart."""
    values = torch.tensor([0.0, 0.0, 2.0, 3.0, 3.0], device=DEVICE)[:, None, None].expand(5, 2, 16)
    lses = torch.tensor([-torch.inf, -torch.inf, 1.5, -2e4, 2e4], device=DEVICE)[:, None].expand(5, 2)
    others = torch.tensor([0.0, 4.0, 0.0, 5.0, 5.0], device=DEVICE)[:, None, None].expand(5, 2, 16)
    other_lses = torch.tensor([-torch.inf, 0.5, -torch.inf, 2e4, -2e4], device=DEVICE)[:, None].expand(5, 2)
    out, lse = torch.full((5, 2, 16), NAN, dtype=torch.bfloat16, device=DEVICE), torch.full((5, 2), NAN, device=DEVICE)
    parts = torch.stack([others, values]), torch.stack([other_lses, lses])
    for state, those in (((values.bfloat16(), lses), (parts[0][:1], parts[1][:1])), (None, parts)):
        merge_parts(state, those, (out, lse), backend=backend)
        assert out[:, 1, -1].tolist() == [0, 4, 2, 5, 3]
        assert lse[:, 1].tolist() == [-math.inf, 0.5, 1.5, 2e4, 2e4]


def test_which_segments() -> None:
    assert is_tileable(Segment(0, 3, (0, 1), (5, 5, 5)))
    assert is_tileable(Segment(0, 3, (0, 1), (1, 2, 3)))
    for lens in [(0, 0, 0), (0, 1, 2), (3, 4, 4), (5, 4, 3), (5, 6, 5), (1, 3, 5)]:
        assert not is_tileable(Segment(0, 3, (0, 1), lens))
        with pytest.raises(ValueError, match="3 rows that see"):
            split_segment(Segment(0, 3, (0, 1), lens), 4)
    assert uses_tiles(128, 16384, torch.bfloat16, 128)
    assert uses_tiles(8192, 131072, torch.float16, 64)
    for rows, tokens, dtype, head_dim in [
        (127, 65536, torch.bfloat16, 128),
        (512, 1023, torch.bfloat16, 128),
        (512, 4096, torch.float32, 128),
        (512, 4096, torch.bfloat16, 256),
        (512, 4096, torch.bfloat16, 20),
    ]:
        assert not uses_tiles(rows, tokens, dtype, head_dim)


def test_scratch_grows_with_rows() -> None:
    tiles = TiledAttention(make_sizes(4, (4, 2), 16, torch.bfloat16), backend="torch", row_tiles=(8,), token_tiles=(32,))
    buffer = 2 * 32 * 2 * 16 * 2
    assert tiles.scratch_bytes(0) == buffer
    assert tiles.scratch_bytes(100) == buffer + 100 * 4 * (16 * 6 + 4) + 2 * (2 * 128 * 128) * (16 * 2 + 4)
    assert tiles.scratch_bytes(10_000) - tiles.scratch_bytes(9_999) == 4 * (16 * 6 + 4)


def test_misuse_is_refused() -> None:
    sizes = make_sizes()
    for row_tiles, token_tiles, message in [
        ((4, 8), (16,), "row tiles must be descending"),
        ((8, 8), (16,), "row tiles must be descending"),
        ((8,), (), "token tiles must be descending"),
        ((8,), (16, 6), r"\(16, 6\) must be multiples of the block size, 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            TiledAttention(sizes, backend="torch", row_tiles=row_tiles, token_tiles=token_tiles)
    tiles = TiledAttention(sizes, backend="torch", row_tiles=(8,), token_tiles=(16,), least_pairs=1)
    with pytest.raises(ValueError, match="rows see 17 tokens, 4 blocks from id 0 on hold 16"):
        tiles.plan([Segment(0, 8, (0, 1, 2, 3), (17,) * 8)])
    plan = tiles.plan([Segment(0, 8, (0, 1, 2, 3), (16,) * 8)])
    q_THD, lse_TH = torch.zeros(8, 4, 16, dtype=sizes.dtype, device=DEVICE), torch.zeros(8, 4, device=DEVICE)
    kv_2BPKD = torch.zeros(2, 4, 4, 2, 16, dtype=sizes.dtype, device=DEVICE)
    for q, kv, lse, message in [
        (q_THD, kv_2BPKD[:, :3], lse_TH, "names block 3, kv holds 3 blocks"),
        (q_THD[:7], kv_2BPKD, lse_TH[:7], "rows up to 8, q has 7"),
        (q_THD, kv_2BPKD, lse_TH[:, :2], r"got q \(8, 4, 16\)"),
        (q_THD.double(), kv_2BPKD, lse_TH, "torch.float64"),
        (q_THD, kv_2BPKD.transpose(2, 3).contiguous().transpose(2, 3), lse_TH, "must each be contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiles.run(plan, q, kv, 1.0, out_THD=torch.empty_like(q), lse_TH=lse)
    state = q_THD, lse_TH
    with pytest.raises(ValueError, match="states of"):
        merge_parts(state, (q_THD[None, :7], lse_TH[None, :7]), state, backend="torch")
    with pytest.raises(ValueError, match="got 'auto'"):
        merge_parts(state, (q_THD[None], lse_TH[None]), state, backend="auto")
