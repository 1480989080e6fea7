"""Which part of a model each rank of an instance has (tensor parallelism): pure integers.

    qkv, gate, up   rows, of some heads or inner dims          no exchange before them
    o, down         columns of the same                        what the parts add is summed after them
    head            rows, of some of the vocabulary            logits are gathered

So a layer takes two sums, and a part of the instance holds its heads' KV alone. KV heads are dealt out whole, with all query
heads that read them; where there are more parts than KV heads, several parts have the same one, and share its query heads.

Source: Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3).
"""

from dataclasses import dataclass

_GRAINS = (128, 64, 32, 16, 8)
"""Inner dims are dealt out by so many, where that leaves each part some: products of odd sizes are slow."""


@dataclass(frozen=True, slots=True)
class Place:
    """Of a rank within its instance."""

    part: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part {self.part} of {self.parts}")


WHOLE = Place()
"""One rank has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What one part has: each a range of the whole model's."""

    heads: range
    kv_heads: range
    inner: range
    """Dims between gate and down."""
    vocabulary: range
    """Fewer than the other parts', or none, where it doesn't divide: `padded` has as many for each."""
    padded: int
    """Rows of the head in each part."""
    is_first: bool
    """What stands but once, as biases of sums, is the first part's."""


def split_of(place: Place, *, heads: int, kv_heads: int, inner: int, vocabulary: int) -> Split:
    """What that part has of a model. Raises ValueError, with the numbers, if there are more parts than query heads or inner
    dims."""
    parts = place.parts
    if parts > min(heads, inner):
        raise ValueError(f"it has {heads} query heads and {inner} inner dims, which {parts} parts can't share")
    grain = next((grain for grain in _GRAINS if inner % grain == 0 and inner // grain >= parts), 1)
    shares = dealt(inner // grain, parts)[place.part]
    padded = -(-vocabulary // parts)
    first = min(place.part * padded, vocabulary)
    own, kv = _heads_of(place, heads, kv_heads)
    return Split(
        heads=own,
        kv_heads=kv,
        inner=range(shares.start * grain, shares.stop * grain),
        vocabulary=range(first, min(first + padded, vocabulary)),
        padded=padded,
        is_first=place.part == 0,
    )


def _heads_of(place: Place, heads: int, kv_heads: int) -> tuple[range, range]:
    """Query heads and KV heads."""
    group = heads // kv_heads
    if place.parts <= kv_heads:
        kv = dealt(kv_heads, place.parts)[place.part]
        return range(kv.start * group, kv.stop * group), kv
    for head, sharers in enumerate(dealt(place.parts, kv_heads)):  # several parts to one KV head
        if place.part in sharers:
            own = dealt(group, len(sharers))[place.part - sharers.start]
            return range(head * group + own.start, head * group + own.stop), range(head, head + 1)
    raise AssertionError("every part has a KV head")


def dealt(count: int, among: int) -> list[range]:
    """`count` things in order, as evenly as can be: the first have one more where they don't divide."""
    least, more = divmod(count, among)
    ends = [least * i + min(i, more) for i in range(among + 1)]
    return [range(ends[i], ends[i + 1]) for i in range(among)]
