"""What attention layers look like, and the rows they are given."""

from dataclasses import dataclass

import torch

from distattn.layout import FULL, Sight
from kernels.layer_ops import rotate_and_store
from kernels.segments import AttentionSizes, Scoring


@dataclass(frozen=True, slots=True)
class LayerView:
    """How the rows of one layer see and score tokens."""

    scoring: Scoring
    sight: Sight = FULL


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """What attention layers look like."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    layers: tuple[LayerView, ...] = ()
    """Each; empty: in all of them rows see all before them, by `scale`."""
    value_dim: int = 0
    """0: tokens have keys and values of `head_dim`. Else KV is latent: a token is one key, for all query heads, whose first
    `value_dim` numbers are its value. Such is what returns for a row, too: `instance.latent` makes heads' values of it."""

    @property
    def out_dim(self) -> int:
        """Of a head's output."""
        return self.value_dim or self.head_dim

    @property
    def parts(self) -> int:
        """Of what is stored of a token: keys and values, or keys alone."""
        return 1 if self.value_dim else 2

    @property
    def layer_token_bytes(self) -> int:
        """Of one token's KV in one layer."""
        return self.parts * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def query_bytes(self) -> int:
        """Of a row's query in one layer, as it travels."""
        return self.num_heads * self.head_dim * self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Of a row's partial state in one layer, as it travels: its output, and an lse in fp32 for each head."""
        return self.num_heads * (self.out_dim * self.dtype.itemsize + 4)

    def layer(self, index: int) -> LayerView:
        return self.layers[index] if self.layers else LayerView(Scoring(self.scale))

    @property
    def sights(self) -> tuple[Sight, ...]:
        """One of each group of layers, first that of the layers that see all, if there are any: its holders are all that a step
        may need."""
        found = dict.fromkeys(layer.sight for layer in self.layers) or {FULL: None}
        return tuple(sorted(found, key=lambda sight: sight != FULL))

    def group(self, index: int) -> int:
        """Which of the groups a layer belongs to."""
        return self.sights.index(self.layer(index).sight)

    def is_capped(self, group: int) -> bool:
        """Whether one of the group's layers caps its scores."""
        return any(layer.scoring.soft_cap and self.sights[group] == layer.sight for layer in self.layers)


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
        value_dim=shape.value_dim,
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
