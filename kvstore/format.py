"""How KV is stored: of which numbers, and with scales or without. A description; `kernels.kv_blocks` has the arithmetic."""

from dataclasses import dataclass

import torch

from kernels.kv_blocks import SCALE_TYPES, scales_of_block


@dataclass(frozen=True, slots=True)
class KVFormat:
    """Of one pool, and of all of a cell."""

    dtype: torch.dtype
    """Of a number as it is stored. Queries, outputs and partial states have the model's."""

    @property
    def has_scales(self) -> bool:
        """Whether each block has scales, for each layer, keys and values, and KV head: one, or one for each token."""
        return self.dtype in SCALE_TYPES

    @property
    def scale_bytes(self) -> int:
        """Of a scale, a multiple of which the numbers of a block must take; 1 where there is none."""
        return SCALE_TYPES[self.dtype].itemsize if self.has_scales else 1

    def block_bytes(self, *, num_layers: int, parts: int, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        """Of a block of so many tokens, with its scales. `parts` of a token in a layer: keys and values, or 1, where KV is
        latent."""
        heads = num_layers * parts * num_kv_heads
        scales = scales_of_block(self.dtype, block_size) * self.scale_bytes
        return heads * (block_size * head_dim * self.dtype.itemsize + scales)
