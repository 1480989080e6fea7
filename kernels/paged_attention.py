"""Partial attention over paged KV: plan once per step, run once per layer.

For each row t and query head h, over the tokens `[start, kv_len)` of the row's segment:

    s_j = scale * q . k_j        lse = log sum_j exp(s_j)        out = sum_j exp(s_j - lse) v_j

or, with a soft cap c, `s_j = c tanh(scale * q . k_j / c)`.

`(out, lse)` is a partial state: states over disjoint sets of tokens merge (`kernels.merge_state`). Empty set: `0, -inf`.

Sources: online softmax and the split over KV are FlashAttention-2's and Flash-Decoding's, block tables PagedAttention's,
plan and run FlashInfer's.

Shape suffixes: T rows, H query heads, K KV heads, G = H / K, D head dim, B blocks, P block size, S tokens of KV.
`kv_2BPKD` of one layer: (keys, values), blocks, tokens of a block, KV heads, head dim. Latent KV has one part, keys, whose
first numbers are the values, and one KV head for all query heads (DeepSeek's latent attention with absorbed projections).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kernels.kv_blocks import SCALE_TYPES
from kernels.segments import AttentionSizes, PagedAttention, Segment, validate

if TYPE_CHECKING:
    from kernels.paged_attention_tiles import TiledAttention


def plan_attention(
    segments: Sequence[Segment],
    num_rows: int,
    *,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    tiles: "TiledAttention | None" = None,
    value_dim: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> PagedAttention:
    """Validate the segments of one step and build its tables. Two have the same rows and disjoint tokens, or no row in common.

    `backend` is "torch" (any device and floating dtype) or "triton" (CUDA; fp32, fp16, bf16; head_dim a power of two
    from 16 to 256; at most 64 query heads per KV head; any block size). With `tiles` (triton) spans of many rows that see their
    runs from the beginning go to the library's dense kernel, which knows no soft cap.

    `value_dim` > 0: of latent KV. On triton that has one KV head, `value_dim` and the rest of `head_dim` are each a power of
    two from 16 to 512, rows see runs from their beginning, and there are no tiles and no soft cap.

    `kv_dtype`: how KV is stored, if not in `dtype`, which q and out have: of `kernels.kv_blocks.SCALE_TYPES`, with scales, on
    triton with a head_dim from 32 on, and latents not in int8.

    Raises:
        ValueError: a segment that contradicts itself or another, or a shape that the backend doesn't support.
    """
    if min(block_size, num_heads, num_kv_heads, head_dim) < 1 or num_heads % num_kv_heads or not 0 <= value_dim <= head_dim:
        raise ValueError(
            f"block size {block_size}, {num_heads} heads, {num_kv_heads} KV heads, head dim {head_dim}: all must be at "
            f"least 1 and the heads a multiple of the KV heads; values of {value_dim} numbers of a key"
        )
    if kv_dtype not in (None, dtype, *SCALE_TYPES):
        raise ValueError(
            f"KV is stored in {dtype}, as queries are, or in {' or '.join(map(str, SCALE_TYPES))}, not in {kv_dtype}"
        )
    sizes = AttentionSizes(
        num_rows=num_rows,
        block_size=block_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        value_dim=value_dim,
        kv_dtype=kv_dtype,
    )
    min_blocks = validate(segments, num_rows, block_size)
    match backend:
        case "torch":
            from kernels.paged_attention_torch import TorchPagedAttention

            return TorchPagedAttention(sizes, min_blocks, segments)
        case "triton" if value_dim:
            from kernels.latent_attention import TritonLatentAttention

            return TritonLatentAttention(sizes, min_blocks, segments)
        case "triton":
            from kernels.paged_attention_triton import TritonPagedAttention

            return TritonPagedAttention(sizes, min_blocks, segments, tiles)
    raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def attention_scratch_bytes(
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    backend: str,
    value_dim: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> int:
    """Most bytes that `run` takes beside its arguments for that many rows, whatever the segments."""
    match backend:
        case "torch":
            from kernels.paged_attention_torch import scratch_bytes as of_torch

            return of_torch(num_rows, num_heads, head_dim)
        case "triton" if value_dim:
            from kernels.latent_attention import scratch_bytes as of_latents

            return of_latents(num_heads, value_dim, device)
        case "triton":
            from kernels.paged_attention_triton import scratch_bytes as of_triton

            return of_triton(num_heads, num_kv_heads, head_dim, device, kv_dtype)
    raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")
