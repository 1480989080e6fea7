"""What all backends of `kernels.paged_attention` have in common: which rows attend to what, and the face of a plan."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.kv_blocks import SCALE_TYPES, check_scales, has_token_scales


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive query rows that attend to one run of tokens. Rows that attend to several have a segment for each.

    rows   [first_row, first_row + num_rows)
    tokens |  block_ids[0]  |  block_ids[1]  | ... |  block_ids[n-1]  |
           0                P                2P    # token j: block_ids[j // P], offset j % P
           [starts[i], kv_lens[i]) is visible to row first_row + i; without starts, [0, kv_lens[i])
    """

    first_row: int
    num_rows: int
    block_ids: tuple[int, ...]
    kv_lens: tuple[int, ...]
    """Per row, in any order; 0: the row sees nothing. Fast when all are equal, or each is one more than the last."""
    starts: tuple[int, ...] = ()
    """Per row, at most its kv_len: tokens before it are hidden, and those that are hidden from all rows of a tile aren't read.
    Empty: every row sees the run from its beginning."""

    def part(self, begin: int, end: int) -> "Segment":
        """Of its rows, those from `begin` up to `end`, both counted from its first."""
        lens, starts = self.kv_lens[begin:end], self.starts[begin:end]
        return Segment(self.first_row + begin, len(lens), self.block_ids, lens, starts)


class TokenForm:
    """How a token is stored, by a head's dim and that of its value: 0 if tokens have keys and values of `head_dim`. Else KV is
    latent: a token is one key, whose first `value_dim` numbers are its value."""

    __slots__ = ()
    head_dim: int
    value_dim: int

    @property
    def out_dim(self) -> int:
        """Of a head's output."""
        return self.value_dim or self.head_dim

    @property
    def parts(self) -> int:
        """Of what is stored of a token: keys and values, or keys alone."""
        return 1 if self.value_dim else 2


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSizes(TokenForm):
    """What a plan is made for; `run` refuses tensors of other sizes."""

    num_rows: int
    block_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    value_dim: int = 0
    """0: tokens have keys and values of `head_dim`, the two parts of `kv`. Else latent KV of one part: the value of a token is
    the first `value_dim` numbers of its key."""
    kv_dtype: torch.dtype | None = None
    """Of `kv`; None: as `dtype`. What is of 8 bits has scales (`kernels.kv_blocks`)."""

    @property
    def has_scales(self) -> bool:
        """Whether KV is of 8 bits."""
        return self.kv_dtype in SCALE_TYPES

    @property
    def has_token_scales(self) -> bool:
        """Whether each token has scales of its own."""
        return has_token_scales(self.kv_dtype)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer scores a query and a key: s = scale q . k, or with a soft cap c > 0, s = c tanh(scale q . k / c)."""

    scale: float
    soft_cap: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for a scale that isn't positive, behind which kernels couldn't take the largest score, or for a cap
        that is negative."""
        if not self.scale > 0 or not self.soft_cap >= 0:
            raise ValueError(f"a scale must be positive and a soft cap not negative, got {self.scale} and {self.soft_cap}")


class PagedAttention(ABC):
    """Attention of one step's rows: what makes it builds all tables, `run` only launches."""

    def __init__(self, sizes: AttentionSizes, min_blocks: int) -> None:
        """`min_blocks`: the highest block id that the plan reads, plus 1."""
        self.sizes = sizes
        self._min_blocks = min_blocks

    def run(
        self,
        q_THD: torch.Tensor,
        kv_2BPKD: torch.Tensor,
        scale: float,
        *,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor,
        soft_cap: float = 0.0,
        scales_2BKX: torch.Tensor | None = None,
    ) -> None:
        """Fill `out_THD` (q's dtype) and `lse_TH` (fp32, natural log) with the partial states of all rows.

        `soft_cap` c > 0 bounds scores: s becomes c tanh(s / c). `scales_2BKX`: of KV of 8 bits.

        Rows of no segment, and rows that see nothing, get `out = 0`, `lse = -inf`. KV that no row sees is never read into a
        result, so it may be NaN. The last dimension of q, kv and out must be contiguous.

        Raises:
            ValueError: shape, dtype or device are not those of the plan, or kv has too few blocks for it.
        """
        sizes = self.sizes
        heads = (sizes.num_rows, sizes.num_heads)
        block, stored = (sizes.block_size, sizes.num_kv_heads, sizes.head_dim), sizes.kv_dtype or sizes.dtype
        for name, tensor, dim in (("q", q_THD, sizes.head_dim), ("out", out_THD, sizes.out_dim)):
            rows = (*heads, dim)
            if tensor.shape != rows or tensor.dtype != sizes.dtype or tensor.stride(-1) != 1:
                raise ValueError(f"{name} must be {rows} {sizes.dtype}, got {_describe(tensor)}")
        if lse_TH.shape != heads or lse_TH.dtype != torch.float32:
            raise ValueError(f"lse must be {heads} torch.float32, got {_describe(lse_TH)}")
        if (
            (kv_2BPKD.shape[0], *kv_2BPKD.shape[2:]) != (sizes.parts, *block)
            or kv_2BPKD.dtype != stored
            or kv_2BPKD.stride(-1) != 1
        ):
            raise ValueError(f"kv must be ({sizes.parts}, blocks, {block}) {stored}, got {_describe(kv_2BPKD)}")
        check_scales(kv_2BPKD, scales_2BKX)
        if kv_2BPKD.shape[1] < self._min_blocks:
            raise ValueError(f"the plan reads block {self._min_blocks - 1}, kv holds {kv_2BPKD.shape[1]} blocks")
        if not q_THD.device.type == kv_2BPKD.device.type == sizes.device.type:
            raise ValueError(f"planned for {sizes.device}, got q on {q_THD.device}, kv on {kv_2BPKD.device}")
        if sizes.num_rows:
            self._run(q_THD, kv_2BPKD, scales_2BKX, Scoring(scale, soft_cap), out_THD, lse_TH)

    @abstractmethod
    def _run(
        self,
        q_THD: torch.Tensor,
        kv_2BPKD: torch.Tensor,
        scales_2BKX: torch.Tensor | None,
        scoring: Scoring,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor,
    ) -> None: ...


def by_rows(segments: Sequence[Segment]) -> list[list[Segment]]:
    """The segments of the same rows together, ascending."""
    groups: dict[int, list[Segment]] = {}
    for segment in sorted(segments, key=lambda s: s.first_row):
        groups.setdefault(segment.first_row, []).append(segment)
    return list(groups.values())


def uncovered_ranges(segments: Sequence[Segment], num_rows: int) -> list[tuple[int, int]]:
    """`[start, end)` of the rows that belong to no segment, ascending."""
    gaps = []
    at = 0
    for segment in sorted(segments, key=lambda s: s.first_row):
        if segment.first_row > at:
            gaps.append((at, segment.first_row))
        at = max(at, segment.first_row + segment.num_rows)
    return [*gaps, (at, num_rows)] if at < num_rows else gaps


def validate(segments: Sequence[Segment], num_rows: int, block_size: int) -> int:
    """The highest block id that is named, plus 1. Raises ValueError for segments that can't be."""
    begin = end = 0
    min_blocks = 0
    for s in sorted(segments, key=lambda s: s.first_row):
        rows = f"rows [{s.first_row}, {s.first_row + s.num_rows})"
        if s.num_rows < 1 or len(s.kv_lens) != s.num_rows:
            raise ValueError(f"segment of {rows} has {len(s.kv_lens)} kv_lens: there must be one per row, and a row")
        stop = s.first_row + s.num_rows
        if (s.first_row < end and (s.first_row, stop) != (begin, end)) or stop > num_rows:
            raise ValueError(f"segment of {rows}: rows below {end} are taken, and the step has {num_rows} rows")
        begin, end = s.first_row, stop
        capacity = len(s.block_ids) * block_size
        if min(s.kv_lens) < 0 or max(s.kv_lens) > capacity:
            raise ValueError(
                f"segment of {rows} sees {min(s.kv_lens)} to {max(s.kv_lens)} tokens; its {len(s.block_ids)} blocks of "
                f"{block_size} hold {capacity}"
            )
        if s.starts and (len(s.starts) != s.num_rows or any(not 0 <= a <= b for a, b in zip(s.starts, s.kv_lens, strict=True))):
            raise ValueError(
                f"segment of {rows} has {len(s.starts)} starts from {min(s.starts)} on: there must be one per row, and none "
                "above its kv_len"
            )
        if s.block_ids:
            if min(s.block_ids) < 0:
                raise ValueError(f"segment of {rows} names block {min(s.block_ids)}")
            min_blocks = max(min_blocks, max(s.block_ids) + 1)
    return min_blocks


def _describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
