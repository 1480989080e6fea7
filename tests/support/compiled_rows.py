"""The kernels that exchange rows, compiled for a Hopper GPU that isn't here, in a process that doesn't interpret them.

Prints JSON: for each kernel and type the registers of a thread, the bytes that spill from them, and how many stores bring two
words at a time.
"""

import json
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

from kernels import shared_rows, team_rows
from tests.support.compiled import HOPPER
from tests.support.compiled_products import registers

POINTERS = {"inbox_ptr": "*i64", "away_ptr": "*i64", "first_eps": "fp32", "eps": "fp32"} | dict.fromkeys(
    ("calls_ptr", "abort_ptr", "aborted_ptr", "ranks_ptr", "own_ptr", "starts_ptr"), "*i32"
)
NORMS = {"WITH_NORM": True, "WITH_FIRST": True, "FIRST_FROM_ONE": True, "FROM_ONE": False}
WORDS = 2048
"""Of a row."""


def taken(kernel: Any, kind: str, constants: dict[str, Any], warps: int) -> dict[str, int]:
    """By a kernel, for rows of a type."""
    names = kernel.arg_names
    its = {
        "TILE": WORDS,
        "WORDS": WORDS,
        "ROOM": WORDS,
        "N": 2,
        "PART": 1,
        "DEPENDENT": True,
        "PAIR": kind == "bf16",
    } | constants
    its |= {"KIND": tl.bfloat16 if kind == "bf16" else tl.float32, "E": WORDS * (2 if kind == "bf16" else 1)}
    its = {name: value for name, value in its.items() if name in names}
    types = {name: POINTERS.get(name, f"*{kind}" if name.endswith("_ptr") else "i32") for name in names}
    signature = {name: "constexpr" if name in its else types[name] for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in its.items()}, aligned)
    code: Any = triton.compile(source, target=HOPPER, options={"num_warps": warps, "launch_pdl": True}).asm
    return registers(code["cubin"]) | {"wide": code["ptx"].count("st.global.v2.b64")}


def main() -> None:
    print(
        json.dumps(
            {
                f"{name}, {kind}": taken(kernel, kind, constants, warps)
                for kind in ("bf16", "fp32")
                for name, kernel, constants, warps in (
                    ("team", team_rows._sum_kernel, NORMS | {"TAKES_FIRST": False}, 8),
                    ("spread", shared_rows._spread_kernel, NORMS, 8),
                    ("sum", shared_rows._sum_kernel, NORMS | {"HAS_OWN": True}, 8),
                    ("push", shared_rows._push_part_kernel, {"WIDTH": 64128, "TILE": shared_rows.PIECE}, 4),
                    ("collect", shared_rows._collect_kernel, {"TILE": shared_rows.PIECE}, 4),
                )
            }
        )
    )


if __name__ == "__main__":
    main()
