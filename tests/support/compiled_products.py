"""What products with weights of 8 bits take of a Hopper processor, by the compiler, in a process that doesn't interpret.

Prints JSON: for each product the bytes of shared memory, the bytes that spill from registers, the registers of a thread, and
whether weights are brought 16 bytes at a time.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.compiler import ASTSource

from kernels import products_triton
from kernels.products import TYPES, Quantised
from tests.support.compiled import HOPPER

POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float8_e4m3fn: "*fp8e4nv", torch.int8: "*i8"}
WIDE_LOADS = ("ld.global.v4", "ld.global.L1::evict_last.v4", "cp.async.cg.shared.global")


class Compiled:
    """Stands for a kernel: compiles what would be launched, and notes what that takes."""

    def __init__(self, kernel: Any, found: list[dict[str, Any]]) -> None:
        self._kernel = kernel
        self._found = found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *args: Any, num_warps: int = 4, launch_pdl: bool, **constants: Any) -> None:
        names = self._kernel.arg_names
        constants |= {"DEPENDENT": True}
        if "PACKED" in constants:
            constants["PACKED"] = True  # as a GPU has it for rows in bf16
        types = dict.fromkeys(constants, "constexpr")
        aligned = []
        for parameter, value in zip(self._kernel.params[: len(args)], args, strict=True):
            if isinstance(value, torch.Tensor):
                types[parameter.name] = POINTERS[value.dtype]
                aligned.append(parameter.name)
            else:
                types[parameter.name] = "i32"
                aligned += [parameter.name] if value % 16 == 0 and not parameter.do_not_specialize else []
        source = ASTSource(
            self._kernel,
            types,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        compiled = triton.compile(source, target=HOPPER, options={"num_warps": num_warps})
        code = compiled.asm["ptx"]
        self._found.append(
            {
                "shared": compiled.metadata.shared,
                "wide": sum(code.count(load) for load in WIDE_LOADS),
                "narrow": len(re.findall(r"cp\.async\.ca\.shared\.global|ld\.global(?!.*v[24])[\w.:]*\.b(?:8|16)\b", code)),
                **registers(compiled.asm["cubin"]),
            }
        )


def registers(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}


def main() -> None:
    found: list[dict[str, Any]] = []
    products = {}
    kernels = {name: Compiled(kernel, found) for name, kernel in vars(products_triton).items() if name.endswith("_kernel")}
    with mock.patch.multiple(products_triton, **kernels):
        for kind, dtype in TYPES.items():
            for group in (4096, 128, 32):
                matrix = Quantised(
                    torch.empty((6144, 4096), dtype=dtype, device="meta"),
                    torch.empty((6144, 4096 // group), dtype=torch.bfloat16 if group == 32 else torch.float32, device="meta"),
                    group,
                )
                for rows in (1, 8, 64, 256):
                    found.clear()
                    x_TE = torch.empty((rows, 4096), dtype=torch.bfloat16, device="meta")
                    if rows == 1:
                        products_triton.gemv(x_TE, matrix, None, None)
                    else:
                        products_triton.product(x_TE, matrix, None)
                    products[f"{kind}, groups of {group}, {rows} rows"] = found[0]
    print(json.dumps(products))


if __name__ == "__main__":
    main()
