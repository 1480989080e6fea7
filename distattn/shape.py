"""What attention layers look like, and the rows they are given."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from kernels.layer_ops import Norm, rotate_and_store
from kernels.segments import AttentionSizes, Scoring, TokenForm
from kvstore.sight import FULL, Sight


@dataclass(frozen=True, slots=True)
class LayerView:
    """How the rows of one layer see and score tokens."""

    scoring: Scoring
    sight: Sight = FULL


MOST_TABLES = 8
"""Of a model whose layers have tables of blocks of their own by what their rows see: a step has a plan for each."""


@dataclass(frozen=True, slots=True)
class Groups:
    """A model's layers by what their rows see, and where the KV of each lies in a block.

    Where all see all, a block has the tokens of all layers. Where some see all and others a window or a chunk, blocks have the
    layers of one group alone, as many as the first group has (in a stage, as its own layers need): then what a window's layers
    see no more is freed without the others, and all blocks are of one size, so that all are of one pool. A group with more
    layers has several tables. Where all see the same window or chunk, they have as many tables as there may be: only what the
    first has is kept, as where rows begin and end is counted by it. (Of several windows and no layer that sees all, a block has
    all layers.)
    """

    sights: tuple[Sight, ...]
    """Of each group; first that of the layers that see all, if there are any, or what all see: its holders are all that a step
    may need. As many with the same sight as there are tables for it."""
    group_of: tuple[int, ...]
    """Of each layer."""
    place_of: tuple[int, ...]
    """Of each layer: which of a block's."""
    are_apart: bool
    """Whether each group has a table of its own: otherwise all have the first."""

    @property
    def layers_of_block(self) -> int:
        return max(self.place_of) + 1

    @property
    def windows(self) -> tuple[Sight, ...]:
        """What rows see by the tables behind the first."""
        return self.sights[1:] if self.are_apart else ()


@cache
def groups_of(sights: tuple[Sight, ...], whole: tuple[Sight, ...] = ()) -> Groups:
    """Groups of layers of which each has one of these sights. `whole`: those of all layers of a model of which these are some:
    its stages have the same tables, and each puts as many layers into a block as its own need.

    Raises ValueError for sights that the whole hasn't.
    """
    distinct = sorted(dict.fromkeys(whole or sights), key=lambda sight: sight != FULL)
    are_apart = len(distinct) > 1 if distinct[0] == FULL else len(distinct) == 1 < len(whole or sights)
    if not are_apart:
        return Groups(tuple(distinct), tuple(map(distinct.index, sights)), tuple(range(len(sights))), are_apart=False)
    counts = Counter(sights)
    if whole:
        tables = groups_of(whole).sights
        size = max(-(-count // max(1, tables.count(sight))) for sight, count in counts.items())
    else:
        size = -(-len(sights) // MOST_TABLES)
        if counts[FULL]:
            size = max(counts[FULL], -(-(len(sights) - counts[FULL]) // (MOST_TABLES - len(distinct))))
        tables = tuple(sight for sight in distinct for _ in range(0, counts[sight], size))
    before = [sights[:layer].count(sight) for layer, sight in enumerate(sights)]
    return Groups(
        tables,
        tuple(tables.index(sight) + count // size for sight, count in zip(sights, before, strict=True)),
        tuple(count % size for count in before),
        are_apart=True,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape(TokenForm):
    """What attention layers look like."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    layers: tuple[LayerView, ...] = ()
    """Each; empty: in all of them rows see all before them, by `scale`."""
    whole: tuple[Sight, ...] = ()
    """Where these are a stage's layers: what rows see in each of the whole model's. Empty: they are all, or all see all."""
    value_dim: int = 0
    """0: tokens have keys and values of `head_dim`. Else KV is latent: a token is one key, for all query heads, whose first
    `value_dim` numbers are its value. Such is what returns for a row, too: `instance.latent` makes heads' values of it."""

    @property
    def layer_token_numbers(self) -> int:
        """That are stored of one token in one layer."""
        return self.parts * self.num_kv_heads * self.head_dim

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
    def groups(self) -> Groups | None:
        """None: there is but one, of all layers, whose rows see all before them."""
        return groups_of(tuple(layer.sight for layer in self.layers), self.whole) if self.layers else None

    @property
    def sights(self) -> tuple[Sight, ...]:
        """As `Groups` has them."""
        return (FULL,) if self.groups is None else self.groups.sights

    @property
    def windows(self) -> tuple[Sight, ...]:
        """Likewise."""
        return () if self.groups is None else self.groups.windows

    def group(self, index: int) -> int:
        """Which of the groups a layer belongs to."""
        return 0 if self.groups is None else self.groups.group_of[index]

    def table(self, group: int) -> int:
        """Which table of blocks a group has."""
        return group if self.windows else 0

    def places(self, num_layers: int) -> Sequence[int]:
        """Of each layer: where it is in a block."""
        return range(num_layers) if self.groups is None else self.groups.place_of

    def layers_of_block(self, num_layers: int) -> int:
        """Of a model's so many layers."""
        return num_layers if self.groups is None else self.groups.layers_of_block

    def is_capped(self, group: int) -> bool:
        """Whether one of the group's layers caps its scores."""
        return any(layer.scoring.soft_cap and self.sights[group] == layer.sight for layer in self.layers)


def attention_sizes(
    shape: AttentionShape, block_size: int, device: torch.device, kv_dtype: torch.dtype | None = None
) -> AttentionSizes:
    """What kernels that serve any number of rows are made for. `kv_dtype`: of what is stored, if not the shape's."""
    return AttentionSizes(
        num_rows=0,
        block_size=block_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        device=device,
        value_dim=shape.value_dim,
        kv_dtype=kv_dtype,
    )


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A layer's rows as its one projection makes them, before norm and rotary: `qkv_TE` is query heads, KV heads, KV heads."""

    qkv_TE: torch.Tensor
    cos_TD: torch.Tensor
    sin_TD: torch.Tensor
    q_norm: Norm | None
    k_norm: Norm | None
    sinks_H: torch.Tensor | None = None
    """One more logit for each query head, that stands for no value."""

    def rotate_and_store(
        self,
        num_heads: int,
        kv_2BPKD: torch.Tensor,
        slots_T: torch.Tensor,
        backend: str,
        scales_2BKX: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries `[T, H, D]`, ready to attend; keys and values go to their slots."""
        return rotate_and_store(
            self.qkv_TE,
            self.cos_TD,
            self.sin_TD,
            slots_T,
            kv_2BPKD,
            num_heads,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            scales_2BKX=scales_2BKX,
            backend=backend,
        )
