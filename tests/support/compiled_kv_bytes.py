"""What the kernels of KV of 8 bits take of a Hopper processor, by the compiler: no GPU, in a process that doesn't interpret.

Prints JSON: for each kernel the bytes of shared memory, how many programs are to share a processor, and how many instructions
load single numbers from there.
"""

import json
import re
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from kernels import decode_bytes, kv_bytes_triton
from kernels.segments import AttentionSizes
from tests.support.compiled import HOPPER

ALIGNED = ("q_ptr", "out_ptr", "kv_ptr", "k_ptr", "v_ptr", "stride_qt", "stride_qh", "stride_ot", "stride_oh", "stride_b")


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """A kernel whose other arguments are int32."""
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED if name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=HOPPER, options=options)


def main() -> None:
    found = {}
    floats = ("lse_ptr", "piece_out_ptr", "piece_lse_ptr", "scales_ptr")
    types = {"q_ptr": "*bf16", "out_ptr": "*bf16", "log2_scale": "fp32", "log2_cap": "fp32"} | dict.fromkeys(floats, "*fp32")
    types |= dict.fromkeys(("rows_ptr", "blocks_ptr", "slots_ptr"), "*i32")
    for head_dim, windowed, stored in (
        (64, False, torch.float8_e4m3fn),
        (128, False, torch.float8_e4m3fn),
        (128, True, torch.float8_e4m3fn),
        (64, False, torch.int8),
        (128, False, torch.int8),
        (128, True, torch.int8),
    ):
        sizes = AttentionSizes(
            num_rows=0,
            block_size=64,
            num_heads=32,
            num_kv_heads=8,
            head_dim=head_dim,
            dtype=torch.bfloat16,
            device=torch.device("meta"),
            kv_dtype=stored,
        )
        config = decode_bytes._default_config(sizes)
        tile = f"tensordesc<i16[{config.block_n},{head_dim // 2}]>"
        key_tile = f"tensordesc<i8[{config.block_n},{head_dim}]>" if sizes.has_token_scales else tile
        constants = {"K": 8, "G": 4, "D": head_dim, "P": 64, "BLOCK_M": 16, "BLOCK_N": config.block_n, "USE_TMA": True}
        constants |= {"DEPENDENT": True, "WINDOWED": windowed, "CAPPED": windowed, "WITH_ASM": True}
        constants["TOKEN_SCALES"] = sizes.has_token_scales
        made = compiled(
            decode_bytes._bytes_decode_kernel,
            types | {"k_src": key_tile, "v_src": tile, "scales_ptr": "*fp16" if sizes.has_token_scales else "*fp32"},
            constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.max_registers,
        )
        by_bytes = len(re.findall(r"ld\.shared\.[bu]8", made.asm["ptx"]))
        found[f"decode, {stored}, {head_dim}, {windowed}"] = (made.metadata.shared, config.programs_per_processor, by_bytes)
    types |= {"k_ptr": "*bf16", "v_ptr": "*bf16", "kv_ptr": "*u8"}
    constants = {"K": 8, "D": 128, "P": 64, "BLOCK_T": 256, "BLOCK_R": 16, "TILE": 128, "BLOCK_C": 1024}
    constants |= {"WITH_VALUES": True, "DEPENDENT": True}
    for kernel in (kv_bytes_triton._open_kernel, kv_bytes_triton._store_kernel, kv_bytes_triton._store_few_kernel):
        made = compiled(kernel, types, constants)
        found[kernel.fn.__name__] = (made.metadata.shared, 1, 0)
    made = compiled(
        kv_bytes_triton._store_tokens_kernel, types | {"kv_ptr": "*i8", "scales_ptr": "*fp16"}, constants, num_warps=1
    )
    found["_store_tokens_kernel"] = (made.metadata.shared, 1, 0)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
