"""Decode attention against dense float64 attention: tables by hand, programs that split rows anywhere, pages in any order."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import decode_attention, decode_merge
from kernels.decode_attention import _LEAST_SHARED, DecodeAttention, DecodeConfig, DecodeTables, RowReading, Written
from kernels.decode_bytes import BytesDecode
from kernels.launch import num_processors
from kernels.reference import attention_state, with_sinks
from kernels.segments import AttentionSizes, Scoring
from tests.kernels.test_paged_attention import DEVICE, NAN, ON_GPU, Scales, blank, check_state, made_up_kv, put, union

HEADS = [(4, 2), (9, 3), (2, 2), (7, 1)]


def check(
    lens: list[int] | list[list[int]],
    *,
    block_size: int,
    heads: tuple[int, int],
    config: DecodeConfig,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 16,
    padding: int = 0,
    seed: int = 0,
    window: int = 0,
    soft_cap: float = 0.0,
    kv_dtype: torch.dtype | None = None,
    mostly_empty: bool = False,
    sinks: bool = False,
) -> None:
    """Each row reads a run of its own, or several; the tables' order is not that of q. Twice, as two layers would.

    With a `window`, only the last so many tokens of each run, and what lies before them is NaN."""
    torch.manual_seed(seed)
    num_rows, scale = len(lens) + padding, 1.3 / math.sqrt(head_dim)
    sizes = AttentionSizes(
        num_rows=0,
        block_size=block_size,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        dtype=dtype,
        device=DEVICE,
        kv_dtype=kv_dtype,
    )
    kernel = (BytesDecode if sizes.has_scales else DecodeAttention)(sizes, config)
    order = torch.randperm(len(lens)).tolist()
    runs = [(row, n) for row, each in zip(order, lens, strict=True) for n in (each if isinstance(each, list) else [each])]
    blocks = [-(-n // block_size) for _, n in runs]
    ids = torch.randperm(sum(blocks) + 2).tolist()
    readings = [
        RowReading(row, [ids.pop() for _ in range(count)], n, max(0, n - window) if window else 0)
        for (row, n), count in zip(runs, blocks, strict=True)
    ]
    rows, block_table = kernel.tables(readings, num_rows, first_block=3, windowed=window > 0)
    tables = DecodeTables(
        torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        torch.tensor([-1, -1, -1, *block_table], dtype=torch.int32).to(DEVICE),
        window > 0,
        mostly_empty,
    )
    for _ in range(2):
        stored = kv_dtype or dtype
        kv_2BPKD = blank((2, sum(blocks) + 2, block_size, heads[1], head_dim), stored)
        scales = None if kv_dtype is None else Scales(kv_2BPKD)
        q_THD = torch.randn(num_rows, heads[0], head_dim).to(dtype)
        want_out = torch.zeros(num_rows, *q_THD.shape[1:], dtype=torch.float64)
        want_lse = torch.full(q_THD.shape[:2], -torch.inf, dtype=torch.float64)
        for reading in readings:
            token_S = torch.arange(reading.kv_len)
            kv_2SKD = made_up_kv((2, reading.kv_len, heads[1], head_dim), stored)
            place = torch.tensor(reading.block_ids, dtype=torch.int64)
            seen_S = token_S[reading.start :]
            put(kv_2BPKD, place[seen_S // block_size], seen_S % block_size, kv_2SKD[:, reading.start :])
            if scales is not None:
                shown_2SKD = scales.times(kv_2SKD[:, reading.start :], place[seen_S // block_size], seen_S % block_size)
                kv_2SKD = torch.cat((kv_2SKD[:, : reading.start].double(), shown_2SKD), 1)
            row = slice(reading.row, reading.row + 1)
            starts_1, lens_1 = torch.tensor([[reading.start], [reading.kv_len]])
            state = attention_state(q_THD[row].double(), *kv_2SKD.double(), scale, lens_1, starts_T=starts_1, soft_cap=soft_cap)
            want_out[row], want_lse[row] = union((want_out[row], want_lse[row]), state)
        out_THD = torch.full(q_THD.shape, NAN, dtype=dtype, device=DEVICE)
        lse_TH = torch.full(q_THD.shape[:2], NAN, device=DEVICE)
        sinks_H = 3 * torch.randn(heads[0]).to(dtype)
        kernel.run(
            q_THD.to(DEVICE),
            kv_2BPKD.to(DEVICE),
            Scoring(scale, soft_cap),
            tables,
            out_THD=out_THD,
            lse_TH=lse_TH,
            scales_2BKX=None if scales is None else scales.seen_2BKX.to(DEVICE),
            sinks_H=sinks_H.to(DEVICE) if sinks else None,
        )
        if sinks:
            want_out = with_sinks(want_out, want_lse, sinks_H.double())
        read = sorted(order)
        check_state(out_THD[read], lse_TH[read], want_out[read], want_lse[read])
        assert out_THD[len(lens) :].isnan().all()  # rows that the tables don't name are left alone


def config(block_n: int = 32, *, use_tma: bool = False) -> DecodeConfig:
    return DecodeConfig(block_n=block_n, num_warps=4, num_stages=2, programs_per_processor=2, use_tma=use_tma)


@settings(max_examples=60 if ON_GPU else 12)
@given(
    st.lists(st.integers(0, 400 if ON_GPU else 150), min_size=1, max_size=6),
    st.sampled_from([1, 16, 32, 64]),
    st.sampled_from(HEADS),
    st.integers(0, 3),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_rows_over_any_number_of_programs(
    lens: list[int], block_size: int, heads: tuple[int, int], padding: int, programs: int, sinks: bool, seed: int
) -> None:
    one_each = replace(config(), programs_per_processor=1)
    with mock.patch.object(decode_attention, "num_processors", return_value=programs):
        check(lens, block_size=block_size, heads=heads, config=one_each, padding=padding, sinks=sinks, seed=seed)


@pytest.mark.parametrize(("num_rows", "padding"), [(9, 0), (9, 20), (13, 3)])
@pytest.mark.parametrize("mostly_empty", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_more_rows_than_are_merged_at_once(num_rows: int, padding: int, mostly_empty: bool, sinks: bool) -> None:
    lens = [(37 * row) % 120 for row in range(num_rows)]
    with mock.patch.multiple(decode_merge, _MOST_MERGED=4, _MOST_OF_FEW=3):
        check(lens, block_size=16, heads=(4, 2), config=config(), padding=padding, mostly_empty=mostly_empty, sinks=sinks)


@settings(max_examples=60 if ON_GPU else 12)
@given(
    st.lists(st.lists(st.integers(0, 400 if ON_GPU else 100), min_size=1, max_size=4), min_size=1, max_size=4),
    st.sampled_from([1, 16, 32]),
    st.integers(0, 2),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_any_runs_over_any_number_of_programs(
    lens: list[list[int]], block_size: int, padding: int, programs: int, seed: int
) -> None:
    one_each = replace(config(), programs_per_processor=1)
    with mock.patch.object(decode_attention, "num_processors", return_value=programs):
        check(lens, block_size=block_size, heads=(4, 2), config=one_each, padding=padding, seed=seed)


@settings(max_examples=60 if ON_GPU else 12)
@given(
    st.lists(st.lists(st.integers(0, 400 if ON_GPU else 100), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(1, 90),
    st.sampled_from([1, 16, 32, 64, 128]),
    st.sampled_from([0.0, 1.5]),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_any_window_over_any_number_of_programs(
    lens: list[list[int]], window: int, block_size: int, soft_cap: float, programs: int, seed: int
) -> None:
    one_each = replace(config(), programs_per_processor=1)
    with mock.patch.object(decode_attention, "num_processors", return_value=programs):
        check(
            lens,
            block_size=block_size,
            heads=(4, 2),
            config=one_each,
            seed=seed,
            window=window,
            soft_cap=soft_cap,
            sinks=seed % 2 == 0,
        )


@pytest.mark.parametrize("programs", [100, 300])
def test_a_row_in_many_slots(programs: int) -> None:
    """Its pieces are merged 128 at a time: all of them at once, or in two turns."""
    config = DecodeConfig(block_n=16, num_warps=4, num_stages=2, programs_per_processor=1, use_tma=False)
    with mock.patch.object(decode_attention, "num_processors", return_value=programs):
        check([16 * 260], block_size=16, heads=(2, 1), config=config)


def test_a_start_in_tables_of_whole_runs_is_refused() -> None:
    sizes = AttentionSizes(
        num_rows=0, block_size=16, num_heads=2, num_kv_heads=2, head_dim=16, dtype=torch.float32, device=DEVICE
    )
    with pytest.raises(ValueError, match="row 3 sees runs from tokens"):
        DecodeAttention(sizes, config()).tables([RowReading(3, (0, 1), 20, 4)], 1)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not ON_GPU, reason="GPU"))]
)
@pytest.mark.parametrize(("block_size", "use_tma"), [(64, True), (128, True), (64, False), (16, False)])
@pytest.mark.parametrize("window", [0, 70])
def test_sixteen_bit_tiles_by_both_loads(block_size: int, use_tma: bool, dtype: torch.dtype, window: int) -> None:
    lens = [[1], [64], [0], [333, 20], [129]]
    check(
        lens,
        block_size=block_size,
        heads=(8, 2),
        config=config(64, use_tma=use_tma),
        dtype=dtype,
        head_dim=32,
        window=window,
    )


@pytest.mark.skipif(not ON_GPU, reason="no GPU: the interpreter is too slow for these sizes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("heads", [(32, 8), (64, 8), (8, 8), (7, 1)])
def test_the_configuration_of_every_supported_shape(
    heads: tuple[int, int], block_size: int, head_dim: int, dtype: torch.dtype
) -> None:
    sizes = AttentionSizes(
        num_rows=0,
        block_size=block_size,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        dtype=dtype,
        device=DEVICE,
    )
    lens = [[20000, 3000, 1], [1], [63], [64, 65], [65], [0], *([n] for n in range(1000, 1060))]
    chosen = decode_attention._default_config(sizes, num_processors(DEVICE))
    check(lens, block_size=block_size, heads=heads, config=chosen, dtype=dtype, head_dim=head_dim)


def test_tables_are_refused_when_rows_are_too_many() -> None:
    sizes = AttentionSizes(
        num_rows=0, block_size=16, num_heads=2, num_kv_heads=2, head_dim=16, dtype=torch.float32, device=DEVICE
    )
    kernel = DecodeAttention(sizes, config())
    with pytest.raises(ValueError, match="3 rows in tables of 2"):
        kernel.tables([RowReading(row, (), 0) for row in range(3)], 2)
    with pytest.raises(ValueError, match="at most 2048"):
        kernel.tables([], 2049)


def test_tiles_that_cross_pages_are_refused_for_tma() -> None:
    sizes = AttentionSizes(
        num_rows=0, block_size=32, num_heads=2, num_kv_heads=2, head_dim=16, dtype=torch.float16, device=DEVICE
    )
    with pytest.raises(ValueError, match="tiles of 64 tokens"):
        DecodeAttention(sizes, config(64, use_tma=True))


def sizes_of(block_size: int) -> AttentionSizes:
    return AttentionSizes(
        num_rows=0, block_size=block_size, num_heads=2, num_kv_heads=1, head_dim=16, dtype=torch.float32, device=DEVICE
    )


def read(rows: Sequence[int], table: Sequence[int], block_size: int) -> dict[int, list[tuple[int, int]]]:
    """row of q -> (block, tokens of it that are seen), as the kernel walks whole runs in the tables."""
    count = len(rows) // 4
    seen: dict[int, list[tuple[int, int]]] = {}
    for row, kv_len, begin in zip(rows[:count], rows[count : 2 * count], rows[2 * count : 3 * count], strict=True):
        runs = [(kv_len, begin)] if kv_len >= 0 else [(table[begin + 2 * i], table[begin + 2 * i + 1]) for i in range(-kv_len)]
        seen[row] = [
            (table[at + i], min(block_size, tokens - i * block_size))
            for tokens, at in runs
            for i in range(-(-tokens // block_size))
        ]
    return seen


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=9),
    st.integers(0, 9),
    st.sampled_from([1, 16]),
)
def test_rows_that_begin_alike_read_the_same_place(tree: list[tuple[int, int, int]], others: int, block_size: int) -> None:
    """Each row goes on from some blocks of one before it with blocks of its own, and has a run of its own beside."""
    runs: list[list[int]] = []
    blocks = iter(range(10_000))
    readings: list[RowReading] = []
    for row, (parent, common, more) in enumerate(tree):
        begins = runs[parent % len(runs)][:common] if runs else []
        runs.append([*begins, *islice(blocks, more)])
        tokens = max(0, len(runs[-1]) * block_size - block_size // 2)
        alone = list(islice(blocks, row % 3))
        readings += [RowReading(row, runs[-1], tokens), RowReading(row, alone, len(alone) * block_size)]
    kernel = DecodeAttention(sizes_of(block_size), config())
    written: Written = {}
    served = [reading for reading in readings if reading.row >= others]
    own = [reading for reading in readings if reading.row < others]
    one, first = kernel.tables(own, len(tree), written=written)
    two, second = kernel.tables(served, len(tree), first_block=len(first), written=written)
    seen = read(one, first + second, block_size) | read(two, first + second, block_size)
    assert {row: seen[row] for row in range(len(tree))} == {
        row: [
            (block, min(block_size, reading.kv_len - i * block_size))
            for reading in readings
            if reading.row == row
            for i, block in enumerate(reading.block_ids)
        ]
        for row in range(len(tree))
    }
    tiles = [rows[3 * len(rows) // 4 + len({r.row for r in those})] for rows, those in ((one, own), (two, served))]
    assert sum(tiles) >= sum(-(-reading.kv_len // 32) for reading in readings)
    distinct = len({block for reading in readings for block in reading.block_ids})
    pieces = 2 + min(len(tree), 40 // _LEAST_SHARED)
    assert len(first) + len(second) <= distinct + (2 * pieces + _LEAST_SHARED) * len(tree)


def test_many_rows_of_one_document_need_no_more_blocks_than_there_are() -> None:
    """Each listed all blocks that they share, and a table with room for three times the pool was too small for eight rows."""
    kernel = DecodeAttention(sizes_of(16), config())
    readings = [RowReading(row, [*range(20), 20 + row], 20 * 16 + 3) for row in range(8)]
    _, blocks = kernel.tables(readings, 8, written={})
    assert len(blocks) <= 21 + 7 * 5
    _, apart = kernel.tables(readings, 8)
    assert len(apart) == 8 * 21
