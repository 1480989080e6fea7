"""What a model takes of its device by arithmetic alone: the same for a loaded model and for one on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distattn.attention import DistAttention
from distattn.shape import AttentionShape
from gmanager.wire import footprint
from instance.config import KVDType
from instance.errors import UnsupportedModel
from instance.layers import MLP_ROWS, has_known_parts
from instance.model import Model
from instance.pipelining import under_way
from instance.plan import MAX_DECODE_ROWS, MAX_SAMPLES
from instance.rmanager import UNSURE_ROWS
from instance.sampler import scratch_bytes as sampler_scratch_bytes
from instance.sharing import SPLITS
from instance.step import LANES
from kernels.kv_blocks import FP8
from kernels.paged_attention import plan_attention
from kvstore.format import KVFormat
from kvstore.sight import Sight


@dataclass(frozen=True, kw_only=True, slots=True)
class KVNeeds:
    """Of KV."""

    block_size: int
    """Tokens."""
    block: int
    """Bytes of a block: of all layers, or of those of one table (`distattn.shape.Groups`)."""
    windows: list[int]
    """For each table behind the first: most blocks of one sequence."""

    def blocks(self, tokens: int) -> int:
        """That hold one sequence of so many tokens, which are whole blocks."""
        return footprint.taken(tokens // self.block_size, self.windows)

    def bytes_of(self, tokens: int) -> int:
        """Likewise."""
        return self.blocks(tokens) * self.block

    def tokens(self, blocks: int) -> int:
        """Of the longest sequence that so many blocks hold, in whole blocks."""
        return footprint.held(blocks, self.windows) * self.block_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Of one instance, in bytes unless said otherwise. Activations aren't here: `instance.memory` measures or predicts them."""

    weights: int
    kv: "KVNeeds"
    steps: list[tuple[int, int]]
    """The largest of each lane: its rows, and those of them whose logits are wanted."""
    mlp_rows: int
    """Of them whose MLP is computed at a time."""
    streams: int
    """That a lane's steps may run on. What torch frees on one it gives to none of the others."""
    attention: int
    """Scratch of these steps' attention."""
    sampling: int
    """Scratch of their sampling."""
    stage_rows: int = 0
    """Where there are several stages: places for rows that come from another, and those that run."""

    @staticmethod
    def of(
        model: Model, *, block_size: int, chunk_tokens: int, cell_size: int, backend: str, splits: Sequence[int] = SPLITS
    ) -> "Needs":
        """The needs of one of `cell_size` instances. A model on `meta` is taken for one on a GPU if the backend is `triton`.

        `splits`: processors that the decode lane may have on a GPU.
        """
        shape, stages = model.shape, model.place.stages
        rows = {"prefill": chunk_tokens, "decode": MAX_DECODE_ROWS}
        return Needs(
            weights=model.weight_bytes(),
            kv=KVNeeds(
                block_size=block_size,
                block=model.block_bytes(block_size),
                windows=[most_blocks(sight, block_size, chunk_tokens) for sight in shape.windows],
            ),
            steps=[(rows[lane], MAX_SAMPLES[lane]) for lane in LANES],
            mlp_rows=MLP_ROWS if backend == "triton" and has_known_parts(model.module) else chunk_tokens,
            streams=1 + len(splits) if backend == "triton" else 1,
            attention=sum(
                DistAttention.scratch_bytes(
                    shape,
                    rows[lane],
                    cell_size - 1,
                    model.device,
                    backend,
                    tiles=lane == "prefill",
                    kv_dtype=model.kv_format.dtype,
                )
                for lane in LANES
            ),
            sampling=sum(sampler_scratch_bytes(MAX_SAMPLES[lane], model.vocab_size) for lane in LANES),
            stage_rows=0 if stages == 1 else (under_way(stages) + 1) * sum(rows.values()) * model.row_bytes,
        )


def most_blocks(sight: Sight, block_size: int, chunk_tokens: int) -> int:
    """Of a table of layers whose rows see so much: what the rows of a step see, wherever in a block that begins."""
    return -(-(sight.span + max(chunk_tokens, UNSURE_ROWS + 1)) // block_size) + 1


def settle_shape(model: Model, name: str, *, block_size: int, backend: str) -> None:
    """Let a model keep heads whose latents the kernels don't support.

    Raises UnsupportedModel for an attention shape that they don't support: before anybody waits for this one.
    """
    if model.shape.value_dim and _unsupported(model.shape, model.device, block_size, backend):
        model.keep_heads()
    if reason := _unsupported(model.shape, model.device, block_size, backend):
        raise UnsupportedModel(f"{name}: {reason}")


KV_TYPES: dict[KVDType, torch.dtype] = {"fp8": FP8, "int8": torch.int8}
"""By what `--kv-dtype` calls them, but for the model's own."""


def settle_format(model: Model, name: str, kv_dtype: KVDType, *, block_size: int, backend: str) -> None:
    """How the model's KV is stored, once its shape is settled.

    Raises UnsupportedModel for a format that the device or the kernels don't support.
    """
    if kv_dtype == "auto":
        return
    dtype = KV_TYPES[kv_dtype]
    reason = _unsupported(model.shape, model.device, block_size, backend, dtype)
    if (
        dtype == FP8
        and backend == "triton"
        and model.device.type == "cuda"
        and (found := torch.cuda.get_device_capability(model.device)) < (8, 9)
    ):
        reason = f"it needs a GPU of compute capability 8.9 or more, {model.device} has {'.'.join(map(str, found))}"
    model.kv_format = KVFormat(dtype)
    if (size := model.block_bytes(block_size)) % model.kv_format.scale_bytes:
        reason = f"blocks must be of a multiple of {model.kv_format.scale_bytes} bytes, and are of {size:,}"
    if reason is not None:
        raise UnsupportedModel(f"{name}: --kv-dtype {kv_dtype}: {reason}")


def _unsupported(
    shape: AttentionShape, device: torch.device, block_size: int, backend: str, kv_dtype: torch.dtype | None = None
) -> str | None:
    """Why the kernels don't take a shape; None: they do."""
    try:
        plan_attention(
            [],
            0,
            block_size=block_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            value_dim=shape.value_dim,
            dtype=shape.dtype,
            kv_dtype=kv_dtype,
            device=device,
            backend=backend,
        )
    except ValueError as error:
        return str(error)
    return None
