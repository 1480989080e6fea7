"""The tensors that hold KV: allocated once, never resized."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class KVStorage:
    """KV of all layers of one instance, `data_L2BPKD`: layers, (K, V), blocks, block size, KV heads, head dim. Of latent KV
    `data_L1BPKD`, by the same name.

    Token-major inside a block, so that consecutive blocks are one strided view (`kernels.paged_attention`). The memory is
    not cleared: nothing may be read that no step has written.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        parts: int = 2,
    ) -> None:
        """`parts` of a token in a layer: its keys and values, or 1, where KV is latent. Raises ValueError for a size below 1,
        MemoryError (with the sizes) if the device can't hold it.
        """
        shape = (num_layers, parts, num_blocks, block_size, num_kv_heads, head_dim)
        if min(shape) < 1:
            raise ValueError(f"every size of KV storage must be at least 1, got {shape}")
        self.block_bytes = num_layers * parts * block_size * num_kv_heads * head_dim * dtype.itemsize
        self.num_blocks = num_blocks
        self.block_size = block_size
        try:
            self.data_L2BPKD = torch.empty(shape, dtype=dtype, device=device)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            needed = num_blocks * self.block_bytes
            raise MemoryError(
                f"{num_blocks:,} KV blocks of {self.block_bytes:,} bytes need {needed:,} bytes on {device}: {error}"
            ) from error

    @property
    def nbytes(self) -> int:
        return self.data_L2BPKD.untyped_storage().nbytes()

    def layer(self, layer: int) -> torch.Tensor:
        """`kv_2BPKD` of one layer, a view."""
        return self.data_L2BPKD[layer]


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Copy there, and not on the stream of steps; None: where there is but one, on the CPU."""
    with torch.inference_mode():
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            yield
