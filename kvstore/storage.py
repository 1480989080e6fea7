"""The tensors that hold KV: allocated once, never resized."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from kernels.kv_blocks import SCALE_TYPES, scales_of_block
from kvstore.format import KVFormat


class KVStorage:
    """KV of one instance, `data_L2BPKD`: layers of a block, (K, V), blocks, block size, KV heads, head dim. Of latent KV
    `data_L1BPKD`, by the same name. KV of 8 bits has `scales_L2BKX` besides (X: of a block and head, `kernels.kv_blocks`).

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
        format: KVFormat,
        device: torch.device,
        places: Sequence[int] = (),
        parts: int = 2,
    ) -> None:
        """`num_layers`: of a block; `places`: where each of the model's layers is in one, if it doesn't have all. `parts` of a
        token in a layer: its keys and values, or 1, where KV is latent.

        Raises ValueError for a size below 1, or a block of 8 bits whose scales would be aligned to less than their size;
        MemoryError (with the sizes) if the device can't hold it.
        """
        shape = (num_layers, parts, num_blocks, block_size, num_kv_heads, head_dim)
        if min(shape) < 1:
            raise ValueError(f"every size of KV storage must be at least 1, got {shape}")
        self.format = format
        self.block_bytes = format.block_bytes(
            num_layers=num_layers, parts=parts, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        if self.block_bytes % format.scale_bytes:
            raise ValueError(
                f"blocks in {format.dtype} must be of a multiple of {format.scale_bytes} bytes, got {self.block_bytes}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._places = tuple(places) or tuple(range(num_layers))
        self.scales_L2BKX: torch.Tensor | None = None
        try:
            self.data_L2BPKD = torch.empty(shape, dtype=format.dtype, device=device)
            if format.has_scales:
                scales = (*shape[:3], num_kv_heads, scales_of_block(format.dtype, block_size))
                self.scales_L2BKX = torch.empty(scales, dtype=SCALE_TYPES[format.dtype], device=device)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            needed = num_blocks * self.block_bytes
            raise MemoryError(
                f"{num_blocks:,} KV blocks of {self.block_bytes:,} bytes need {needed:,} bytes on {device}: {error}"
            ) from error

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors())

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self._places)

    def layer(self, layer: int) -> torch.Tensor:
        """`kv_2BPKD` of one layer, a view."""
        return self.data_L2BPKD[self._places[layer]]

    def scales(self, layer: int) -> torch.Tensor | None:
        """`scales_2BKX` of one layer, a view; None: KV has none."""
        return None if self.scales_L2BKX is None else self.scales_L2BKX[self._places[layer]]

    def fill_(self, value: float) -> None:
        """Let all numbers and scales be `value`, whole numbers as near as they come to it: for tests and made-up steps.

        NaN, of which these have none, is in the scales then.
        """
        for tensor in self._tensors():
            tensor.fill_(value if tensor.is_floating_point() else _nearest(value, tensor.dtype))

    def pack(self, block: int, into_N: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of all bytes of a block (uint8), one after the other: numbers, then scales. `into_N`: where to; None: new."""
        if into_N is None:
            into_N = torch.empty(self.block_bytes, dtype=torch.uint8, device=self.data_L2BPKD.device)
        for place, packed in self._pieces(block, into_N):
            packed.copy_(place)
        return into_N

    def unpack(self, block: int, from_N: torch.Tensor) -> None:
        """Fill a block with what `pack` made of one, here or elsewhere."""
        for place, packed in self._pieces(block, from_N):
            place.copy_(packed)

    def _tensors(self) -> list[torch.Tensor]:
        return [self.data_L2BPKD] if self.scales_L2BKX is None else [self.data_L2BPKD, self.scales_L2BKX]

    def _pieces(self, block: int, packed_N: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A block's place in each tensor, and that of the same in its packed bytes."""
        at = 0
        for tensor in self._tensors():
            place = tensor[:, :, block]
            end = at + place.numel() * place.dtype.itemsize
            yield place, packed_N[at:end].view(place.dtype).view(place.shape)
            at = end


def _nearest(value: float, dtype: torch.dtype) -> int:
    """Of the whole numbers of a type; of NaN its largest."""
    limits = torch.iinfo(dtype)
    return limits.max if math.isnan(value) else round(min(max(value, limits.min), limits.max))


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Copy there, and not on the stream of steps; None: where there is but one, on the CPU."""
    with torch.inference_mode():
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            yield
