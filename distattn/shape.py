"""What attention layers look like, and the rows they are given."""

from dataclasses import dataclass

import torch

from kernels.layer_ops import rotate_and_store
from kernels.segments import AttentionSizes


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """What one attention layer looks like; the same in all layers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype


def attention_sizes(shape: AttentionShape, block_size: int, device: torch.device) -> AttentionSizes:
    """What kernels that serve any number of rows are made for."""
    return AttentionSizes(
        num_rows=0,
        block_size=block_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        device=device,
    )


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A layer's rows as its one projection makes them, before norm and rotary: `qkv_TE` is query heads, KV heads, KV heads."""

    qkv_TE: torch.Tensor
    cos_TD: torch.Tensor
    sin_TD: torch.Tensor
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None
    eps: float

    def rotate_and_store(self, num_heads: int, kv_2BPKD: torch.Tensor, slots_T: torch.Tensor, backend: str) -> torch.Tensor:
        """Queries `[T, H, D]`, ready to attend; keys and values go to their slots."""
        return rotate_and_store(
            self.qkv_TE,
            self.cos_TD,
            self.sin_TD,
            slots_T,
            kv_2BPKD,
            num_heads,
            q_norm=self.q_norm_D,
            k_norm=self.k_norm_D,
            eps=self.eps,
            backend=backend,
        )
