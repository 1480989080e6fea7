#!/usr/bin/env python3
"""Partial attention over paged KV beside what others offer, on one GPU and in one run.

Decode: one row a sequence, pages of 64 tokens in random order, `(out, lse)` out. FlashInfer (if it is installed) by its
fastest backend, planned beforehand as ours is; cuDNN and flash through torch, on KV that lies contiguous. All in GB/s of KV
read, beside the bandwidth of a device copy. Prefill: a chunk's rows against a long prefix, TFLOP/s. K, V and q are random
normal; a case whose KV is smaller than four times the L2 cache rotates over several copies of it. Every output is compared
with the others' before it is timed.

With --kv-dtype fp8 or int8 our decode kernels over KV so stored, in GB/s of its bytes without scales, and how many times as
fast as ours in 16 bits.

Latent: the same of latent KV (DeepSeek: 512 + 64 numbers a token, one key for all heads, whose beginning is the value), beside
FlashInfer's MLA. With --sweep other ways to launch our kernel as well: blocks of tokens, warps, stages, programs a processor.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import torch
from _measure import Row, copy_bandwidth, graph_ms, matmul_tflops, show, write_json
from triton.runtime.errors import OutOfResources, PTXASError

from kernels.decode_attention import DecodeAttention, DecodeConfig, RowReading
from kernels.decode_bytes import BytesDecode
from kernels.kv_blocks import FP8, SCALE_TYPES, scales_of_block
from kernels.latent_attention import LatentDecode
from kernels.paged_attention import plan_attention
from kernels.paged_attention_tiles import TiledAttention
from kernels.segments import AttentionSizes, Scoring, Segment

PAGE = 64
HEAD_DIM = 128
HEADS = ((32, 8), (64, 8), (32, 32))
DECODES = {
    "1 x 128K": [131072],
    "1 x 1M": [1048576],
    "8 x 128K": [131072] * 8,
    "64 x 8K": [8192] * 64,
    "1 x 1M + 63 x 4K": [1048576] + [4096] * 63,
}
PREFILLS = ((2048, 131072), (8192, 131072))
LATENT, ROTATED = 512, 64
LATENT_HEADS = (16, 128)
"""Of DeepSeek-V2-Lite and V3."""
LATENT_DECODES = ("1 x 128K", "8 x 128K", "64 x 8K")
SWEEP = [
    DecodeConfig(block_n=block_n, num_warps=warps, num_stages=stages, programs_per_processor=programs, use_tma=use_tma)
    for block_n, stages, programs in ((32, 2, 2), (32, 3, 2), (32, 2, 1), (32, 4, 1), (64, 2, 1), (64, 3, 1), (16, 4, 3))
    for warps in (4, 8)
    for use_tma in (True, False)
]
BYTES_SWEEP = [
    DecodeConfig(block_n=64, num_warps=warps, num_stages=stages, programs_per_processor=programs, use_tma=use_tma)
    for warps, programs in ((2, 4), (2, 5), (2, 6), (2, 8), (4, 3), (4, 4), (1, 8))
    for stages, use_tma in ((2, True), (3, True), (3, False), (4, False))
]
BYTES_CASES = [
    *(((heads, name)) for heads in HEADS for name in ("8 x 128K", "1 x 128K", "64 x 8K")),
    *(((heads, 1), "8 x 128K") for heads in LATENT_HEADS),
]
"""Those of latents in fp8 alone."""
BYTES_SCALES = {FP8: 2.0, torch.int8: 2.0**-5}
"""Of numbers around 1."""
L2_CACHES = 4
MOST_ERROR = 1e-2
"""Relative RMS between outputs in bf16; two right ones differ by about 3e-3."""


@dataclass(frozen=True, slots=True)
class Case:
    """KV of some sequences in one paged pool, `copies` times over, and a row for each."""

    lens: list[int]
    heads: tuple[int, int]
    kv_2BPKD: list[torch.Tensor]
    block_ids: list[list[int]]
    q_THD: torch.Tensor
    value_dim: int = 0
    """Of latent KV: that is keys alone."""
    scales_2BKX: torch.Tensor | None = None
    """Of KV of 8 bits, of all copies."""

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q_THD.shape[2])

    @property
    def nbytes(self) -> int:
        kv_2BPKD = self.kv_2BPKD[0]
        return sum(self.lens) * kv_2BPKD.shape[0] * self.heads[1] * kv_2BPKD.shape[4] * kv_2BPKD.element_size()

    @staticmethod
    def make(
        lens: list[int], heads: tuple[int, int], rows: int | None = None, head_dim: int = HEAD_DIM, value_dim: int = 0
    ) -> "Case":
        parts = 1 if value_dim else 2
        blocks = [-(-n // PAGE) for n in lens]
        size = sum(blocks)
        each = parts * size * PAGE * heads[1] * head_dim * 2
        copies = 1 + L2_CACHES * torch.cuda.get_device_properties(0).L2_cache_size // each
        shape = (parts, size, PAGE, heads[1], head_dim)
        pools = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
        for pool in pools:
            for piece in torch.split(pool.view(-1), 1 << 28):
                piece.normal_()
        order = torch.randperm(size).tolist()
        ids = [[order.pop() for _ in range(count)] for count in blocks]
        q_THD = torch.randn(rows or len(lens), heads[0], head_dim, dtype=torch.bfloat16, device="cuda")
        return Case(lens, heads, pools, ids, q_THD, value_dim)

    def stored_in(self, dtype: torch.dtype) -> "Case":
        """The same, stored in 8 bits, in copies enough; and its numbers as these have them, in 16 bits, in place of its own."""
        first, scale = self.kv_2BPKD[0], BYTES_SCALES[dtype]
        parts, size, block_size, num_kv_heads, _ = first.shape
        shape = (parts, size, num_kv_heads, scales_of_block(dtype, block_size))
        scales_2BKX = torch.full(shape, scale, dtype=SCALE_TYPES[dtype], device="cuda")
        for pool in self.kv_2BPKD:
            for piece in torch.split(pool.view(-1), 1 << 28):
                piece.copy_((piece / scale).round().clamp(-127, 127) if dtype == torch.int8 else (piece / scale).to(FP8))
        copies = 1 + L2_CACHES * torch.cuda.get_device_properties(0).L2_cache_size // first.numel()
        pools = [first.to(dtype) for _ in range(copies)]
        for pool in self.kv_2BPKD:
            pool *= scale
        return replace(self, kv_2BPKD=pools, scales_2BKX=scales_2BKX)

    def results(self) -> "Result":
        """Of all rows, with nothing in them."""
        rows, heads, head_dim = self.q_THD.shape
        out_THD = self.q_THD.new_full((rows, heads, self.value_dim or head_dim), math.nan)
        return out_THD, torch.full((rows, heads), math.nan, device="cuda")


Result = tuple[torch.Tensor, torch.Tensor]
Attention = Callable[[torch.Tensor], Result]
"""From one copy of the KV to `(out, lse)`."""


def ours(case: Case, config: DecodeConfig | None = None) -> Attention:
    sizes = sizes_of(case)
    of_heads = BytesDecode if sizes.has_scales else DecodeAttention
    kernel = (LatentDecode if case.value_dim else of_heads)(sizes, config)
    readings = [RowReading(i, ids, n) for i, (ids, n) in enumerate(zip(case.block_ids, case.lens, strict=True))]
    tables = kernel.upload_tables(readings)
    out_THD, lse_TH = case.results()

    def run(kv_2BPKD: torch.Tensor) -> Result:
        kernel.run(
            case.q_THD,
            kv_2BPKD,
            Scoring(case.scale),
            tables,
            out_THD=out_THD,
            lse_TH=lse_TH,
            scales_2BKX=case.scales_2BKX,
        )
        return out_THD, lse_TH

    return run


def flashinfer(case: Case) -> Attention:
    import flashinfer

    workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    # tensor cores, FA2: of its backends the fastest in every case of this benchmark (FA3 reached 312 to 3626 GB/s)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")
    ends = [0]
    for ids in case.block_ids:
        ends.append(ends[-1] + len(ids))
    wrapper.plan(
        torch.tensor(ends, dtype=torch.int32),
        torch.tensor([i for ids in case.block_ids for i in ids], dtype=torch.int32, device="cuda"),
        torch.tensor([(n - 1) % PAGE + 1 for n in case.lens], dtype=torch.int32),
        *case.heads,
        HEAD_DIM,
        PAGE,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    out_THD = torch.empty_like(case.q_THD)
    lse_TH = torch.empty(case.q_THD.shape[:2], device="cuda")

    def run(kv_2BPKD: torch.Tensor) -> Result:
        wrapper.run(case.q_THD, (kv_2BPKD[0], kv_2BPKD[1]), out=out_THD, lse=lse_TH, return_lse=True)
        return out_THD, lse_TH  # its lse is base 2

    return run


def flashinfer_mla(case: Case) -> Attention:
    import flashinfer.mla

    workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace, backend="auto")
    ends = [0]
    for ids in case.block_ids:
        ends.append(ends[-1] + len(ids))
    wrapper.plan(
        torch.arange(len(case.lens) + 1, dtype=torch.int32, device="cuda"),
        torch.tensor(ends, dtype=torch.int32, device="cuda"),
        torch.tensor([i for ids in case.block_ids for i in ids], dtype=torch.int32, device="cuda"),
        torch.tensor(case.lens, dtype=torch.int32, device="cuda"),
        case.heads[0],
        LATENT,
        ROTATED,
        PAGE,
        False,
        case.scale,
        torch.bfloat16,
        torch.bfloat16,
    )
    q_THC, q_THR = (part.contiguous() for part in torch.split(case.q_THD, [LATENT, ROTATED], -1))
    out_THC, lse_TH = case.results()

    def run(kv_1BPKD: torch.Tensor) -> Result:
        c_BPC, r_BPR = torch.split(kv_1BPKD[0, :, :, 0], [LATENT, ROTATED], -1)
        wrapper.run(q_THC, q_THR, c_BPC, r_BPR, out=out_THC, lse=lse_TH, return_lse=True)
        return out_THC, lse_TH  # its lse is base 2

    return run


def torch_op(case: Case, name: str) -> Attention:
    """cuDNN or flash on contiguous KV of sequences of one length."""
    op: Any = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention")
    count, length = len(case.lens), case.lens[0]
    num_heads, num_kv_heads = case.heads
    q = case.q_THD.view(count, -1, num_heads, HEAD_DIM).transpose(1, 2)

    def run(kv_2BPKD: torch.Tensor) -> Result:
        k, v = (x.view(count, length, num_kv_heads, HEAD_DIM).transpose(1, 2) for x in kv_2BPKD)
        if name == "cudnn":
            out, lse = op(q, k, v, None, True, 0.0, False, False, scale=HEAD_DIM**-0.5)[:2]
        else:
            out, lse = op(q, k, v, 0.0, False, False, scale=HEAD_DIM**-0.5)[:2]
        return out.transpose(1, 2), lse

    return run


def decode(heads: tuple[int, int], name: str, lens: list[int], theirs: Sequence[str], copy: float) -> Row:
    case = Case.make(lens, heads)
    row: Row = {"heads": f"{heads[0]}/{heads[1]}", "case": name, "ours": 0.0}
    run = ours(case)
    row["ours"] = rate = bandwidth(case, run)
    out_THD, lse_TH = (x.float().clone() for x in run(case.kv_2BPKD[0]))
    if "flashinfer" in theirs:
        other = flashinfer(case)
        want_out, want_lse = other(case.kv_2BPKD[0])
        check(name, out_THD, want_out.float())
        check(f"{name}: lse", lse_TH, want_lse * math.log(2))
        row["FlashInfer"] = fastest = bandwidth(case, other)
        row["ours / FlashInfer"] = rate / fastest
    if len(set(lens)) == 1:
        for op in ("cudnn", "flash"):
            if op == "flash" and heads[0] != heads[1]:
                continue  # torch's flash op takes no grouped heads
            row[op] = bandwidth(case, torch_op(case, op))
    row["ours / copy"] = rate / copy
    return row


def latent_decode(heads: int, name: str, theirs: Sequence[str], copy: float, *, sweeps: bool) -> Row:
    case = Case.make(DECODES[name], (heads, 1), head_dim=LATENT + ROTATED, value_dim=LATENT)
    row: Row = {"heads": heads, "case": name, "ours": 0.0}
    run = ours(case)
    row["ours"] = rate = bandwidth(case, run)
    out_THC, lse_TH = (x.float().clone() for x in run(case.kv_2BPKD[0]))
    if "flashinfer" in theirs:
        other = flashinfer_mla(case)
        want_out, want_lse = other(case.kv_2BPKD[0])
        check(f"latent {name}", out_THC, want_out.float())
        check(f"latent {name}: lse", lse_TH, want_lse * math.log(2))
        row["FlashInfer"] = fastest = bandwidth(case, other)
        row["ours / FlashInfer"] = rate / fastest
    row["ours / copy"] = rate / copy
    for config in SWEEP if sweeps else ():
        try:
            run = ours(case, config)
            check(f"latent {name}, {config}", run(case.kv_2BPKD[0])[0].float(), out_THC)
            found = bandwidth(case, run)
        except (OutOfResources, PTXASError) as error:  # more shared memory or registers than a processor has
            print(f"{config}: {str(error)[:200]!r}", file=sys.stderr)
            continue
        print(f"{heads} heads, {name}: {found:.0f} GB/s, {config}")
    return row


def latent_prefill(heads: int, rows: int, tokens: int) -> Row:
    """Every row sees all tokens: so the decode kernel must say the same of the last."""
    case = Case.make([tokens], (heads, 1), rows, LATENT + ROTATED, LATENT)
    plan = plan_attention(
        [Segment(0, rows, tuple(case.block_ids[0]), (tokens,) * rows)],
        rows,
        block_size=PAGE,
        num_heads=heads,
        num_kv_heads=1,
        head_dim=LATENT + ROTATED,
        value_dim=LATENT,
        dtype=torch.bfloat16,
        device=torch.device("cuda", 0),
        backend="triton",
    )
    out_THC, lse_TH = case.results()
    kv_1BPKD = case.kv_2BPKD[0]
    found_ms = graph_ms(lambda: plan.run(case.q_THD, kv_1BPKD, case.scale, out_THD=out_THC, lse_TH=lse_TH), calls=1, replays=3)
    last = Case(case.lens, case.heads, case.kv_2BPKD, case.block_ids, case.q_THD[-1:], LATENT)
    check("latent prefill", out_THC[-1:].float(), ours(last)(kv_1BPKD)[0].float())
    flops = 2 * rows * tokens * heads * (2 * LATENT + ROTATED)
    plain = 2 * rows * tokens * heads * (192 + 128)
    return {
        "heads": heads,
        "rows": rows,
        "tokens": tokens,
        "ours": flops / found_ms / 1e9,
        "as plain heads count": plain / found_ms / 1e9,
    }


def prefill(heads: tuple[int, int], rows: int, tokens: int, *, consecutive: bool, with_tiles: bool) -> Row:
    case = Case.make([tokens], heads, rows)
    if consecutive:
        case.block_ids[0].sort()
    flops = 4 * rows * tokens * heads[0] * HEAD_DIM
    tiles = TiledAttention(sizes_of(case), backend="triton")
    tiles.warm_up(case.kv_2BPKD[0])
    plan = plan_attention(
        [Segment(0, rows, tuple(case.block_ids[0]), (tokens,) * rows)],
        rows,
        block_size=PAGE,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
        device=torch.device("cuda", 0),
        backend="triton",
        tiles=tiles if with_tiles else None,
    )
    out_THD = torch.full_like(case.q_THD, math.nan)
    lse_TH = torch.full(case.q_THD.shape[:2], math.nan, device="cuda")
    kv_2BPKD = case.kv_2BPKD[0]
    paged_ms = graph_ms(
        lambda: plan.run(case.q_THD, kv_2BPKD, HEAD_DIM**-0.5, out_THD=out_THD, lse_TH=lse_TH), calls=1, replays=5
    )
    flat_2BPKD = kv_2BPKD.index_select(1, torch.tensor(case.block_ids[0], device="cuda"))
    cudnn = torch_op(case, "cudnn")
    check("prefill", out_THD.float(), cudnn(flat_2BPKD)[0].flatten(0, 1).float())
    cudnn_ms = graph_ms(lambda: cudnn(flat_2BPKD), calls=1, replays=5)
    return {
        "heads": f"{heads[0]}/{heads[1]}",
        "rows": rows,
        "tokens": tokens,
        "blocks": "consecutive" if consecutive else "scattered",
        "kernel": "tiles" if with_tiles else "pages",
        "ours": flops / paged_ms / 1e9,
        "cuDNN, contiguous": flops / cudnn_ms / 1e9,
        "ours / cuDNN": cudnn_ms / paged_ms,
    }


def sizes_of(case: Case) -> AttentionSizes:
    return AttentionSizes(
        num_rows=0,
        block_size=PAGE,
        num_heads=case.heads[0],
        num_kv_heads=case.heads[1],
        head_dim=case.q_THD.shape[2],
        dtype=torch.bfloat16,
        device=torch.device("cuda", 0),
        value_dim=case.value_dim,
        kv_dtype=case.kv_2BPKD[0].dtype,
    )


def bytes_decode(heads: tuple[int, int], name: str, kv_dtype: str, copy: float, *, sweeps: bool) -> Row:
    """KV of 8 bits beside the same numbers in 16; latents where there is one KV head."""
    is_latent = heads[1] == 1
    case = Case.make(DECODES[name], heads, None, *((LATENT + ROTATED, LATENT) if is_latent else ()))
    stored = case.stored_in(FP8 if kv_dtype == "fp8" else torch.int8)
    plain, run = ours(case), ours(stored)
    want_out, want_lse = (x.float().clone() for x in plain(case.kv_2BPKD[0]))
    got_out, got_lse = (x.float().clone() for x in run(stored.kv_2BPKD[0]))
    check(f"{kv_dtype} {name}", got_out, want_out)
    check(f"{kv_dtype} {name}: lse", got_lse, want_lse)
    rates = bandwidth(case, plain), bandwidth(stored, run)
    for config in BYTES_SWEEP if sweeps and not is_latent else ():
        try:
            other = ours(stored, config)
            check(f"{kv_dtype} {name}, {config}", other(stored.kv_2BPKD[0])[0].float(), want_out)
            found = bandwidth(stored, other)
        except (OutOfResources, PTXASError) as error:  # more shared memory or registers than a processor has
            print(f"{config}: {str(error)[:200]!r}", file=sys.stderr)
            continue
        print(f"{heads[0]}/{heads[1]} heads, {name}: {found:.0f} GB/s, {config}")
    return {
        "heads": f"{heads[0]}/{heads[1]}",
        "case": name,
        "16 bits": rates[0],
        kv_dtype: rates[1],
        "times as fast": 2 * rates[1] / rates[0],
        f"{kv_dtype} / copy": rates[1] / copy,
    }


def bandwidth(case: Case, run: Attention) -> float:
    """GB/s of KV, over copies of the KV in turn."""
    copies = case.kv_2BPKD

    def once() -> None:
        for kv_2BPKD in copies:
            run(kv_2BPKD)

    return case.nbytes * len(copies) / graph_ms(once, calls=max(1, 8 // len(copies))) / 1e6


def check(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    error = float((got - want).norm() / want.norm())
    if not error <= MOST_ERROR:
        raise SystemExit(f"{what}: outputs differ by {error:.2e} (relative RMS)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_attention.json"))
    parser.add_argument("--only", choices=("decode", "prefill", "latent"), help="one part")
    parser.add_argument("--sweep", action="store_true", help="of latents or 8 bits: other ways to launch our kernel, too")
    parser.add_argument("--kv-dtype", default="auto", choices=("auto", "fp8", "int8"), help="our decode kernels over such KV")
    parser.add_argument("--without", nargs="*", default=[], choices=("flashinfer",), help="what not to compare with")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_attention: needs a GPU", file=sys.stderr)
        return 2
    theirs = [name for name in ("flashinfer",) if name not in args.without]
    report: Row = {"copy_GB/s": copy_bandwidth(), "matmul_TFLOP/s": matmul_tflops()}
    report |= {name: [] for name in ("decode_GB/s", "prefill_TFLOP/s", "latent_GB/s", "latent_prefill_TFLOP/s")}
    print(f"copy {report['copy_GB/s']:.0f} GB/s, 8192^3 product {report['matmul_TFLOP/s']:.0f} TFLOP/s")
    if args.kv_dtype != "auto":
        report = {"copy_GB/s": report["copy_GB/s"], "bytes_GB/s": []}
        for heads, name in BYTES_CASES:
            if heads[1] > 1 or args.kv_dtype == "fp8":
                row = bytes_decode(heads, name, args.kv_dtype, report["copy_GB/s"], sweeps=args.sweep)
                report["bytes_GB/s"].append(row)
                torch.cuda.empty_cache()
                write_json(args.out, report)
        show(report["bytes_GB/s"], f"Decode over KV in {args.kv_dtype}, GB/s of KV")
        return 0
    if args.only in (None, "decode"):
        for heads in HEADS:
            for name, lens in DECODES.items():
                report["decode_GB/s"].append(decode(heads, name, lens, theirs, report["copy_GB/s"]))
                torch.cuda.empty_cache()
                write_json(args.out, report)
        show(report["decode_GB/s"], "Decode, GB/s of KV")
    if args.only in (None, "prefill"):
        for rows, tokens in PREFILLS:
            for consecutive, with_tiles in ((True, True), (False, True), (False, False)):
                row = prefill(HEADS[0], rows, tokens, consecutive=consecutive, with_tiles=with_tiles)
                report["prefill_TFLOP/s"].append(row)
                write_json(args.out, report)
        show(report["prefill_TFLOP/s"], "Prefill, TFLOP/s")
    if args.only in (None, "latent"):
        for num_heads in LATENT_HEADS:
            for name in LATENT_DECODES:
                row = latent_decode(num_heads, name, theirs, report["copy_GB/s"], sweeps=args.sweep)
                report["latent_GB/s"].append(row)
                torch.cuda.empty_cache()
                write_json(args.out, report)
            report["latent_prefill_TFLOP/s"].append(latent_prefill(num_heads, 2048 * 16 // num_heads, 131072))
            write_json(args.out, report)
        show(report["latent_GB/s"], "Latent decode, GB/s of KV")
        show(report["latent_prefill_TFLOP/s"], "Latent prefill, TFLOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
