"""What the Triton kernels of experts have in common: how they read weights, and what gate and up make together.

Shape suffixes: those of `kernels.experts_triton`.
"""

import torch
import triton
import triton.language as tl

from kernels.experts import Gate, Packed
from kernels.launch import has_dependent_launch


@triton.jit  # type: ignore[untyped-decorator]
def gate_up_columns(  # type: ignore[no-untyped-def]
    first, WIDTH: tl.constexpr, BLOCK_I: tl.constexpr, INTERLEAVED: tl.constexpr, HALVES: tl.constexpr
):  # fmt: skip
    """Columns of gate and up of features [first, first + BLOCK_I), and whether there are such: in turns, or gate's first."""
    at_N = tl.arange(0, 2 * BLOCK_I)
    if HALVES:
        feature_N, part_N = first + at_N % BLOCK_I, at_N // BLOCK_I
    else:
        feature_N, part_N = first + at_N // 2, at_N % 2
    if INTERLEAVED:
        column_N = 2 * first + at_N
        is_N = column_N < 2 * WIDTH  # the same as below, but the compiler sees that it holds for many side by side
    else:
        column_N = part_N * WIDTH + feature_N
        is_N = feature_N < WIDTH
    return column_N, is_N


@triton.jit  # type: ignore[untyped-decorator]
def gate_and_up(  # type: ignore[no-untyped-def]
    gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr, GELU: tl.constexpr
):  # fmt: skip
    """act(gate) (up + offset), each factor rounded; GELU by tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    full, full_up = gate.to(tl.float32), up.to(tl.float32)
    if LIMIT is not None:
        full = tl.minimum(full, LIMIT)
        full_up = tl.minimum(tl.maximum(full_up, -LIMIT), LIMIT)
    if GELU:
        active = full / (1 + tl.exp(-1.5957691216057308 * (full + 0.044715 * full * full * full)))
    else:
        active = full / (1 + tl.exp(-ALPHA * full))
    raised = (full_up + UP_OFFSET).to(gate.dtype)
    return (active.to(gate.dtype).to(tl.float32) * raised.to(tl.float32)).to(gate.dtype)


@triton.jit
def _power(exponent):  # type: ignore[no-untyped-def]
    """2^(exponent - 127) for bytes: as the exponent of fp32, or for 0 the subnormal."""
    bits = exponent.to(tl.uint32)
    return tl.where(bits == 0, 1 << 22, bits << 23).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _number(code):  # type: ignore[no-untyped-def]
    """What a code of e2m1 stands for: its bits as those of fp32, whose exponent is 126 more."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit  # type: ignore[untyped-decorator]
def packed_numbers(  # type: ignore[no-untyped-def]
    w_ptr_NB, scale_ptr_NG, is_N1, left, BYTES: tl.constexpr, WITH_ASM: tl.constexpr
):  # fmt: skip
    """Of packed weights, of which only the first `left` bytes of a row are there: what the low and the high bits of their bytes
    stand for `[N, BYTES]`, in fp32, and the scales of the blocks `[N, BYTES / 16]`.

    WITH_ASM: four bytes at a time as bf16, by their bits as those of bf16.
    """
    is_NB = is_N1 & (tl.arange(0, BYTES) < left)[None, :]
    is_NG = is_N1 & (tl.arange(0, BYTES // 16) * 16 < left)[None, :]
    byte_NB = tl.load(w_ptr_NB, mask=is_NB, other=0)
    scale_NG = _power(tl.load(scale_ptr_NG, mask=is_NG, other=0))
    if WITH_ASM:
        low_NB, high_NB = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 first, second, bits, unscaled;
            mov.b32 unscaled, 0x7E807E80;
            prmt.b32 first, $4, 0, 0x4140;
            prmt.b32 second, $4, 0, 0x4342;
            shl.b32 bits, first, 6;
            and.b32 bits, bits, 0x01C001C0;
            shl.b32 $0, first, 12;
            lop3.b32 $0, $0, 0x80008000, bits, 0xEA;
            mul.rn.bf16x2 $0, $0, unscaled;
            shl.b32 bits, second, 6;
            and.b32 bits, bits, 0x01C001C0;
            shl.b32 $1, second, 12;
            lop3.b32 $1, $1, 0x80008000, bits, 0xEA;
            mul.rn.bf16x2 $1, $1, unscaled;
            shl.b32 bits, first, 2;
            and.b32 bits, bits, 0x01C001C0;
            shl.b32 $2, first, 8;
            lop3.b32 $2, $2, 0x80008000, bits, 0xEA;
            mul.rn.bf16x2 $2, $2, unscaled;
            shl.b32 bits, second, 2;
            and.b32 bits, bits, 0x01C001C0;
            shl.b32 $3, second, 8;
            lop3.b32 $3, $3, 0x80008000, bits, 0xEA;
            mul.rn.bf16x2 $3, $3, unscaled;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [byte_NB.to(tl.int8, bitcast=True)],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
        low_NB, high_NB = low_NB.to(tl.float32), high_NB.to(tl.float32)
    else:
        code_NB = byte_NB.to(tl.uint32)
        low_NB, high_NB = _number(code_NB & 15), _number(code_NB >> 4)
    return low_NB, high_NB, scale_NG


@triton.jit  # type: ignore[untyped-decorator]
def unpacked(  # type: ignore[no-untyped-def]
    w_ptr_NB, scale_ptr_NG, is_N1, left, ROWS: tl.constexpr, BYTES: tl.constexpr, WITH_ASM: tl.constexpr
):  # fmt: skip
    """`packed_numbers` of ROWS rows, times their scales."""
    low_NB, high_NB, scale_NG = packed_numbers(w_ptr_NB, scale_ptr_NG, is_N1, left, BYTES, WITH_ASM)
    scale_NB = tl.reshape(tl.broadcast_to(scale_NG[:, :, None], (ROWS, BYTES // 16, 16)), (ROWS, BYTES))
    return low_NB * scale_NB, high_NB * scale_NB


def parts_of(weight: torch.Tensor | Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and scales; of plain weights twice the same."""
    return (weight, weight) if isinstance(weight, torch.Tensor) else (weight.blocks_XNGB, weight.scales_XNG)


def packing(weight: torch.Tensor | Packed) -> dict[str, object]:
    """Constants of kernels: whether weights are packed, and whether that can be undone by what Hopper has for it."""
    return {"PACKED": isinstance(weight, Packed), "WITH_ASM": has_dependent_launch(weight.device)}


def gate_constants(gate: Gate, weight_XNE: torch.Tensor | Packed) -> dict[str, object]:
    return {
        **packing(weight_XNE),
        "ALPHA": gate.alpha,
        "LIMIT": gate.limit,
        "UP_OFFSET": gate.up_offset,
        "GELU": gate.activation == "gelu_tanh",
        "INTERLEAVED": gate.interleaved,
        # side by side in memory lie features of one part, so that they must in a tile
        "HALVES": is_transposed(weight_XNE) and not gate.interleaved,
    }


def is_transposed(weight_XNK: torch.Tensor | Packed) -> bool:
    """Whether columns of the product lie side by side in memory, not what it sums over."""
    return weight_XNK.stride()[2] != 1
