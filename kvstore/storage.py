"""The tensors that hold KV: allocated once, never resized."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class KVStorage:
    """KV of one instance, `data_L2BPKD`: layers of a block, (K, V), blocks, block size, KV heads, head dim. Of latent KV
    `data_L1BPKD`, by the same name.

    A block has all of a model's layers, or those of one of several tables (`kvstore.run`): then several have the same place.
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
        places: Sequence[int] = (),
        parts: int = 2,
    ) -> None:
        """`num_layers`: of a block; `places`: where each of the model's layers is in one, if it doesn't have all. `parts` of a
        token in a layer: its keys and values, or 1, where KV is latent.

        Raises ValueError for a size below 1, MemoryError (with the sizes) if the device can't hold it.
        """
        shape = (num_layers, parts, num_blocks, block_size, num_kv_heads, head_dim)
        if min(shape) < 1:
            raise ValueError(f"every size of KV storage must be at least 1, got {shape}")
        self.block_bytes = num_layers * parts * block_size * num_kv_heads * head_dim * dtype.itemsize
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._places = tuple(places) or tuple(range(num_layers))
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

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self._places)

    def layer(self, layer: int) -> torch.Tensor:
        """`kv_2BPKD` of one layer, a view."""
        return self.data_L2BPKD[self._places[layer]]


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Copy there, and not on the stream of steps; None: where there is but one, on the CPU."""
    with torch.inference_mode():
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            yield
