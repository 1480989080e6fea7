"""What the products of experts take of a Hopper processor, by the compiler: no GPU, in a process that doesn't interpret.

Prints JSON: for each product of two models' experts, and each way through them, the bytes of shared memory and how many
programs are to share a processor; the bytes that all loads of 16 bytes in its code bring, and those of a tile of weights; the
pairs of a tile (1 where there is none) and the number of wgmma instructions.
"""

import json
from typing import Any
from unittest import mock

import torch
import triton
from triton.compiler import ASTSource

from kernels import expert_pairs_triton, experts_triton
from kernels.experts import ExpertWeights, Gate, Packed
from tests.support.compiled import HOPPER

GPT_OSS = Gate("silu", 1.702, 7.0, 1.0, True)
ROWS = (1, 8, 512, 8192)
WIDE_LOADS = ("ld.global.v4", "cp.async.cg.shared.global")
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8"}


class Compiled:
    """Stands for a kernel: compiles what would be launched, and notes what that takes."""

    def __init__(self, kernel: Any, found: list[dict[str, int]]) -> None:
        self._kernel = kernel
        self._found = found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *args: Any, num_warps: int = 4, num_stages: int = 3, launch_pdl: bool, **constants: Any) -> None:
        names = self._kernel.arg_names
        constants |= {"DEPENDENT": True} | ({"WITH_ASM": True} if "WITH_ASM" in constants else {})
        types = dict.fromkeys(constants, "constexpr")
        aligned = []
        for parameter, value in zip(self._kernel.params[: len(args)], args, strict=True):
            name, specialised = parameter.name, not parameter.do_not_specialize
            if isinstance(value, torch.Tensor):
                types[name] = POINTERS[value.dtype]
                aligned.append(name)
            elif value == 1 and specialised:
                types[name], constants[name] = "constexpr", 1
            else:
                types[name] = "i32"
                aligned += [name] if value % 16 == 0 and specialised else []
        source = ASTSource(
            self._kernel,
            types,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        compiled = triton.compile(source, target=HOPPER, options={"num_warps": num_warps, "num_stages": num_stages})
        if "BLOCK_K" not in constants:
            return
        code = compiled.asm["ptx"]
        block_m = constants.get("BLOCK_M", 1)
        columns = 2 * constants["BLOCK_I"] if "BLOCK_I" in constants else constants.get("SLOTS", 1) * constants["BLOCK_N"]
        self._found.append(
            {
                "shared": compiled.metadata.shared,
                "programs": 1 if block_m == 128 else 2,
                "wide_bytes": 16 * 32 * num_warps * sum(code.count(load) for load in WIDE_LOADS),
                "tile_bytes": columns * constants["BLOCK_K"] * 2 // (4 if constants.get("PACKED") else 1),
                "block_m": block_m,
                "wgmma": code.count("wgmma.mma_async"),
            }
        )


def weights(sizes: tuple[int, int, int], gate: Gate, *, transposed: bool, biased: bool) -> ExpertWeights:
    """Of `(X, E, I)`."""
    num_experts, hidden, width = sizes

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty((num_experts, *shape), dtype=torch.bfloat16, device="meta")

    gate_up, down = (
        (empty(hidden, 2 * width), empty(width, hidden)) if transposed else (empty(2 * width, hidden), empty(hidden, width))
    )
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    return ExpertWeights(gate_up, down, gate, *((empty(2 * width), empty(hidden)) if biased else ()))


def packed(sizes: tuple[int, int, int], gate: Gate) -> ExpertWeights:
    """Of `(X, E, I)`, with biases."""
    num_experts, hidden, width = sizes

    def part(columns: int, summed: int) -> Packed:
        blocks = torch.empty((num_experts, columns, summed // 32, 16), dtype=torch.uint8, device="meta")
        return Packed(blocks, torch.empty(blocks.shape[:3], dtype=torch.uint8, device="meta"))

    biases = (torch.empty((num_experts, columns), dtype=torch.bfloat16, device="meta") for columns in (2 * width, hidden))
    return ExpertWeights(part(2 * width, hidden), part(hidden, width), gate, *biases)


def main() -> None:
    models = {
        "Qwen3-30B-A3B": (8, weights((128, 2048, 768), Gate(), transposed=False, biased=False)),
        "gpt-oss-20b, packed": (4, packed((32, 2880, 2880), GPT_OSS)),
        "gpt-oss-20b": (4, weights((32, 2880, 2880), GPT_OSS, transposed=True, biased=True)),
    }
    found: list[dict[str, int]] = []
    products = {}
    pairs, groups = (
        mock.patch.multiple(
            module, **{name: Compiled(kernel, found) for name, kernel in vars(module).items() if name.endswith("_kernel")}
        )
        for module in (expert_pairs_triton, experts_triton)
    )
    with pairs, groups:
        for model, (top_k, of_model) in models.items():
            for rows in ROWS:
                found.clear()
                x_TE = torch.empty((rows, of_model.hidden_size), dtype=torch.bfloat16, device="meta")
                experts_TS = torch.empty((rows, top_k), dtype=torch.int32, device="meta")
                experts_triton.mix_experts(x_TE, experts_TS, experts_TS.float(), of_model, torch.empty_like(x_TE))
                products |= {
                    f"{model}, {rows} rows, {part}": one for part, one in zip(("gate and up", "down"), found, strict=True)
                }
    print(json.dumps(products))


if __name__ == "__main__":
    main()
