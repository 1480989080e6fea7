"""What the kernels of latent KV take of a Hopper processor, by the compiler: no GPU, in a process that doesn't interpret.

Prints JSON: for each kernel the bytes of shared memory, how many programs are to share a processor, and the bytes of a tile.
"""

import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import latent_attention as latents
from kernels.segments import AttentionSizes

HOPPER = GPUTarget("cuda", 90, 32)
ALIGNED = ("q_ptr", "kv_ptr", "out_ptr", "stride_qt", "stride_qh", "stride_ot", "stride_oh", "stride_b", "stride_p")


def shared_bytes(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> int:
    """Compile a kernel whose other arguments are int32."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED if name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return int(triton.compile(source, target=HOPPER, options=options).metadata.shared)


def main() -> None:
    found = {}
    for heads in (16, 128):
        whole = AttentionSizes(
            num_rows=0,
            block_size=64,
            num_heads=heads,
            num_kv_heads=1,
            head_dim=576,
            dtype=torch.bfloat16,
            device=torch.device("meta"),
            value_dim=512,
        )
        sizes = latents._in_head_tiles(whole)
        constants = {"scales_ptr": None, "SCALED": False, "K": sizes.num_kv_heads, "G": sizes.group, "C": 512, "R": 64, "P": 64}
        floats = {"q_ptr": "*bf16", "kv_ptr": "*bf16", "out_ptr": "*bf16", "log2_scale": "fp32"}
        parts = ("lse_ptr", "piece_out_ptr", "piece_lse_ptr", "part_out_ptr", "part_lse_ptr")
        tables = ("rows_ptr", "blocks_ptr", "work_ptr", "sections_ptr", "kv_lens_ptr", "tables_ptr")
        types = floats | dict.fromkeys(parts, "*fp32") | dict.fromkeys(tables, "*i32")
        config, shape = latents._decode_config(sizes), latents._tile_shape(sizes)
        tile = f"bf16[{config.block_n},"
        shared = shared_bytes(
            latents._latent_decode_kernel,
            types | {"c_src": f"tensordesc<{tile}512]>", "r_src": f"tensordesc<{tile}64]>"},
            constants
            | {"BLOCK_M": triton.next_power_of_2(sizes.group), "BLOCK_N": config.block_n, "USE_TMA": True, "DEPENDENT": True},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.max_registers,
        )
        found[f"decode, {heads} heads"] = (shared, config.programs_per_processor, config.block_n * 576 * 2)
        shared = shared_bytes(
            latents._latent_kernel,
            types,
            constants | {"BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n},
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )
        found[f"spans, {heads} heads"] = (shared, 1, shape.block_n * 576 * 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
