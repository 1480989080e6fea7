#!/usr/bin/env python3
"""Mixtures of experts beside transformers' own grouped path (torch's grouped_mm), on one GPU and in one run.

Layers of the shapes of Qwen3-30B-A3B and gpt-oss-20b in bf16, random weights, rows and routing. `floor` is the bytes of the
experts that are hit over the bandwidth of a device copy of this run, what few rows can't be faster than; many rows are bound by
products instead: TFLOP/s, beside those of one 8192 x 8192 x 8192 product. All by replays of a CUDA graph, that of few rows with
several routings in turn, so that no weights are found in the L2 cache. Outputs are compared with the torch twin's before they
are timed. With --sweep other ways to launch the kernels, too.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import torch
from _measure import Row, copy_bandwidth, graph_ms, matmul_tflops, show, write_json
from triton.runtime.errors import OutOfResources

from kernels.expert_pairs_triton import PairConfig, down_config, gate_up_config, mix_pairs, uses_pairs
from kernels.expert_weights_triton import is_transposed
from kernels.experts import ExpertWeights, Gate, mix_experts, route
from kernels.experts_triton import GroupConfig, group_config, mix_groups

ROWS = (1, 8, 64, 512, 8192)
FEW_ROWS = 64
ROUTINGS = 8
"""Of few rows. The experts that one row of the smaller model hits weigh 75 MB."""
MOST_ERROR = 1e-2
"""Relative RMS between outputs in bf16; two right ones differ by about 3e-3."""


@dataclass(frozen=True, slots=True)
class Layer:
    """transformers' module, and its weights as ours."""

    module: torch.nn.Module
    weights: ExpertWeights
    top_k: int


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of a layer, and some routings of them: experts, and their weights."""

    layer: Layer
    x_TE: torch.Tensor
    routings: list[tuple[torch.Tensor, torch.Tensor]]

    @staticmethod
    def make(layer: Layer, rows: int) -> "Case":
        x_TE = torch.randn(rows, layer.weights.hidden_size, dtype=torch.bfloat16, device="cuda")
        logits_TX = (
            torch.randn(rows, layer.weights.num_experts, dtype=torch.bfloat16, device="cuda")
            for _ in range(ROUTINGS if rows <= FEW_ROWS else 1)
        )
        return Case(layer, x_TE, [route(x, layer.top_k, normalise=True, backend="triton") for x in logits_TX])

    @property
    def nbytes(self) -> float:
        """Of the experts that a routing hits, on average."""
        weights = self.layer.weights
        each = 2 * 3 * weights.hidden_size * weights.intermediate_size
        hit = [len(set(experts_TS.flatten().tolist())) for experts_TS, _ in self.routings]
        return each * sum(hit) / len(hit)

    @property
    def flops(self) -> int:
        return 2 * 3 * self.layer.weights.hidden_size * self.layer.weights.intermediate_size * self.routings[0][0].numel()


Mix = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From rows, experts and their weights."""


def qwen3() -> Layer:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)
    module = filled(Qwen3MoeExperts, config)
    return Layer(module, ExpertWeights(module.gate_up_proj.detach(), module.down_proj.detach(), Gate()), 8)


def gpt_oss() -> Layer:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=2880, intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4)
    module = filled(GptOssExperts, config)
    gate = Gate(alpha=module.alpha, limit=module.limit, up_offset=1.0, interleaved=True)
    weights = ExpertWeights(
        module.gate_up_proj.detach().transpose(1, 2),
        module.down_proj.detach().transpose(1, 2),
        gate,
        module.gate_up_proj_bias.detach(),
        module.down_proj_bias.detach(),
    )
    return Layer(module, weights, 4)


LAYERS = {"Qwen3-30B-A3B": qwen3, "gpt-oss-20b": gpt_oss}


def filled(part: Any, config: Any) -> Any:
    """A module of transformers with random weights."""
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = part(config).to(torch.bfloat16)
    module.to_empty(device="cuda")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return module


def measure(name: str, rows: int, layer: Layer, copy: float, *, sweeps: bool) -> Row:
    case = Case.make(layer, rows)
    wants = [mix_experts(case.x_TE, *routing, layer.weights, backend="torch").float() for routing in case.routings]

    def ours(x_TE: torch.Tensor, experts_TS: torch.Tensor, weights_TS: torch.Tensor) -> torch.Tensor:
        return mix_experts(x_TE, experts_TS, weights_TS, layer.weights, backend="triton")

    def theirs(x_TE: torch.Tensor, experts_TS: torch.Tensor, weights_TS: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = layer.module(x_TE, experts_TS, weights_TS)
        return found

    logits_TX = torch.randn(rows, layer.weights.num_experts, dtype=torch.bfloat16, device="cuda")
    check(f"{name}, {rows} rows", case, ours, wants)
    check(f"{name}, {rows} rows, transformers", case, theirs, wants)
    ms, their_ms = mix_ms(case, ours), mix_ms(case, theirs)
    floor = case.nbytes / copy / 1e6
    for config, mix in swept(case) if sweeps else ():
        try:
            check(f"{name}, {rows} rows, {config}", case, mix, wants)
            print(f"{name}, {rows} rows: {1e3 * mix_ms(case, mix):.1f} us ({1e3 * ms:.1f}), {config}", flush=True)
        except OutOfResources as error:  # more shared memory or registers than a processor has
            print(f"{config}: {error}", file=sys.stderr)
    return {
        "layer": name, "rows": rows, "us": 1e3 * ms, "transformers us": 1e3 * their_ms, "transformers / ours": their_ms / ms,
        "floor us": 1e3 * floor, "ours / floor": ms / floor, "TFLOP/s": case.flops / ms / 1e9,
        "route us": 1e3 * graph_ms(lambda: route(logits_TX, layer.top_k, normalise=True, backend="triton")),
    }  # fmt: skip


def swept(case: Case) -> Iterator[tuple[object, Mix]]:
    """Other ways to launch the kernels of so many rows: of one product at a time, for the other as it is."""
    weights, pairs = case.layer.weights, case.routings[0][0].numel()

    def by(mix: Any, **configs: object) -> Mix:
        def run(x_TE: torch.Tensor, experts_TS: torch.Tensor, weights_TS: torch.Tensor) -> torch.Tensor:
            out_TE = torch.empty_like(x_TE)
            mix(x_TE, experts_TS, weights_TS, weights, out_TE, **configs)
            return out_TE

        return run

    if uses_pairs(len(case.x_TE)):
        slots = 1 << (case.layer.top_k - 1).bit_length()
        for block_k, tile, warps, stages in itertools.product(
            (64, 128, 256, 512, 1024), (4096, 8192, 16384), (4, 8), (1, 2, 3)
        ):
            narrow = PairConfig(max(1, tile // 2 // block_k), block_k, warps, stages)
            yield ("gate and up", narrow), by(mix_pairs, gate_up=narrow, down=down_config(weights, case.layer.top_k))
            for parts in (1, 3, 4, 5) if is_transposed(weights.down_XEI) else (0,):
                columns = max(1, tile // (1 if parts else slots) // block_k)
                narrow = PairConfig(columns, block_k, warps, stages, max(1, parts))
                yield ("down", narrow), by(mix_pairs, gate_up=gate_up_config(weights), down=narrow)
        return
    usual = [
        group_config(pairs, weights.num_experts, summed, torch.bfloat16)
        for summed in (weights.hidden_size, weights.intermediate_size)
    ]
    few = usual[0].block_m <= 32
    tiles = ((64, 128), (128, 64), (128, 128), (256, 64)) if few else ((128, 64), (256, 64))
    for block_m in (16, 32, 64) if few else (64, 128):
        for (block_n, block_k), warps, stages in itertools.product(tiles, (4, 8), (3, 4, 5)):
            config = GroupConfig(block_m, block_n, block_k, usual[0].group_m, warps, stages)
            yield ("both", config), by(mix_groups, gate_up=config, down=config)
    if len(case.x_TE) > FEW_ROWS:
        for group_m in (1, 4, 8, 16):
            both = [GroupConfig(c.block_m, c.block_n, c.block_k, group_m, c.num_warps, c.num_stages) for c in usual]
            yield both, by(mix_groups, gate_up=both[0], down=both[1])


def mix_ms(case: Case, mix: Mix) -> float:
    """Milliseconds of one call, over the routings in turn."""

    def once() -> None:
        for experts_TS, weights_TS in case.routings:
            mix(case.x_TE, experts_TS, weights_TS)

    few = len(case.routings) > 1
    return graph_ms(once, calls=1 if few else 3, replays=9 if few else 5) / len(case.routings)


def check(what: str, case: Case, mix: Mix, wants: list[torch.Tensor]) -> None:
    for (experts_TS, weights_TS), want in zip(case.routings, wants, strict=True):
        error = float((mix(case.x_TE, experts_TS, weights_TS).float() - want).norm() / want.norm())
        if not error <= MOST_ERROR:
            raise SystemExit(f"{what}: outputs differ by {error:.2e} (relative RMS)")


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_experts.json"))
    parser.add_argument("--only", choices=tuple(LAYERS), help="one of the layers")
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--sweep", action="store_true", help="other ways to launch the kernels, too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_experts: needs a GPU", file=sys.stderr)
        return 2
    report: Row = {"copy_GB/s": copy_bandwidth(), "matmul_TFLOP/s": matmul_tflops(), "experts": []}
    print(f"copy {report['copy_GB/s']:.0f} GB/s, 8192^3 product {report['matmul_TFLOP/s']:.0f} TFLOP/s", flush=True)
    for name, make in LAYERS.items():
        if args.only in (None, name):
            layer = make()
            for rows in args.rows:
                report["experts"].append(measure(name, rows, layer, report["copy_GB/s"], sweeps=args.sweep))
                write_json(args.out, report)
            del layer
            torch.cuda.empty_cache()
    show(report["experts"], "Mixtures of experts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
