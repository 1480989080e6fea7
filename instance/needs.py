"""What a model takes of its device by arithmetic alone: the same for a loaded model and for one on the meta device."""

from dataclasses import dataclass

from distattn.attention import DistAttention
from instance.model import Model, UnsupportedModel
from instance.sampler import scratch_bytes as sampler_scratch_bytes
from instance.scheduler import MAX_DECODE_ROWS, MAX_SAMPLES
from kernels.paged_attention import PagedAttention


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Of one instance, in bytes unless said otherwise. Activations aren't here: `instance.memory` measures or predicts them."""

    weights: int
    token: int
    """One token's KV in all layers."""
    rows: int
    """Of the largest step."""
    sampled: int
    """Rows of it whose logits are wanted."""
    attention: int
    """Scratch of that step's attention."""
    sampling: int
    """Scratch of its sampling."""

    @staticmethod
    def of(model: Model, *, chunk_tokens: int, cell_size: int, backend: str) -> "Needs":
        """The needs of one of `cell_size` instances. A model on `meta` is taken for one on a GPU if the backend is `triton`."""
        shape = model.shape
        rows = chunk_tokens + MAX_DECODE_ROWS
        return Needs(
            weights=model.weight_bytes(),
            token=2 * model.num_layers * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize,
            rows=rows,
            sampled=MAX_SAMPLES,
            attention=DistAttention.scratch_bytes(shape, rows, cell_size - 1, model.device, backend),
            sampling=sampler_scratch_bytes(MAX_SAMPLES, model.vocab_size),
        )


def refuse_shape(model: Model, name: str, *, block_size: int, backend: str) -> None:
    """Raises UnsupportedModel for an attention shape that the kernels don't support: before anybody waits for this one."""
    shape = model.shape
    try:
        PagedAttention.plan(
            [],
            0,
            block_size=block_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            device=model.device,
            backend=backend,
        )
    except ValueError as error:
        raise UnsupportedModel(f"{name}: {error}") from error
