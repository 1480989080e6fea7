"""Which part of a model each rank of an instance has (tensor and pipeline parallelism): pure integers.

    qkv, gate, up   rows, of some heads or inner dims          no exchange before them
    o, down         columns of the same                        what the parts add is summed after them
    experts         likewise, of every expert some dims        each part routes all rows alike
    head            rows, of some of the vocabulary            logits are gathered

So a layer takes two sums (three, where all rows go to some experts beside the others), and a part of the instance holds its
heads' KV alone. KV heads are dealt out whole, with all query heads that read them; where there are more parts than KV heads,
several parts have the same one, and share its query heads.

Layers are dealt out to stages, consecutive ones to each, and every stage is split into as many parts:

    stage 0   layers 0 ..     part 0, part 1, ...      embeddings, the last norm and the head, too
    stage 1   layers n ..     part 0, part 1, ...

Sources: Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3); GPipe (Huang et al., arXiv 1811.06965) for stages.
"""

from dataclasses import dataclass

from gmanager.wire.sizes import check_layers

_GRAINS = (128, 64, 32, 16, 8)
"""Inner dims are dealt out by so many, where that leaves each part some: products of odd sizes are slow."""


@dataclass(frozen=True, slots=True)
class Place:
    """Of a rank within its instance."""

    part: int = 0
    parts: int = 1
    """Of each stage."""
    stage: int = 0
    stages: int = 1
    layers: tuple[int, ...] = ()
    """How many each stage has; empty: as even as can be."""

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part {self.part} of {self.parts}")
        if not 0 <= self.stage < self.stages:
            raise ValueError(f"stage {self.stage} of {self.stages}")
        if self.layers:
            check_layers(self.layers, self.stages)

    @property
    def ranks(self) -> int:
        """Of the instance."""
        return self.parts * self.stages

    @property
    def rank(self) -> int:
        """Of this one among them: 0 leads."""
        return self.stage * self.parts + self.part

    @property
    def is_last(self) -> bool:
        """Whether it has the last layers."""
        return self.stage == self.stages - 1

    @property
    def flags(self) -> str:
        """What asked for it, for messages."""
        said = [f"--tp {self.parts}"] if self.parts > 1 else []
        return " ".join([*said, f"--pp {self.stages}"] if self.stages > 1 else said)


WHOLE = Place()
"""One rank has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What one part has: each a range of the whole model's."""

    heads: range
    kv_heads: range
    inner: range
    """Dims between gate and down."""
    expert_inner: range
    """Of each expert."""
    vocabulary: range
    """Fewer than the other parts', or none, where it doesn't divide: `padded` has as many for each."""
    padded: int
    """Rows of the head in each part."""
    is_first: bool
    """What stands but once, as biases of sums, is the first part's."""


def split_of(place: Place, *, heads: int, kv_heads: int, inner: int, vocabulary: int, expert_inner: int | None = None) -> Split:
    """What that part has of a model. `expert_inner`: dims between gate and down of an expert; None: as many as `inner`.

    Raises ValueError, with the numbers, if there are more parts than query heads or inner dims.
    """
    parts, of_expert = place.parts, inner if expert_inner is None else expert_inner
    if parts > min(heads, inner, of_expert):
        raise ValueError(f"it has {heads} query heads and {min(inner, of_expert)} inner dims, which {parts} parts can't share")
    padded = -(-vocabulary // parts)
    first = min(place.part * padded, vocabulary)
    own, kv = _heads_of(place, heads, kv_heads)
    return Split(
        heads=own,
        kv_heads=kv,
        inner=inner_shares(inner, parts)[place.part],
        expert_inner=inner_shares(of_expert, parts)[place.part],
        vocabulary=range(first, min(first + padded, vocabulary)),
        padded=padded,
        is_first=place.part == 0,
    )


def inner_shares(inner: int, parts: int) -> list[range]:
    """Which dims between gate and down each part has."""
    grain = next((grain for grain in _GRAINS if inner % grain == 0 and inner // grain >= parts), 1)
    return [range(its.start * grain, its.stop * grain) for its in dealt(inner // grain, parts)]


def stages_of(place: Place, num_layers: int) -> list[range]:
    """The layers of each stage. As the first has embeddings and head besides, the last ones have one more where they don't
    divide. Raises ValueError, with the numbers, if they don't fit."""
    counts = place.layers or tuple(len(hand) for hand in reversed(dealt(num_layers, place.stages)))
    if sum(counts) != num_layers:
        raise ValueError(f"it has {num_layers} layers, and --pp-layers {','.join(map(str, counts))} are {sum(counts)}")
    if min(counts) < 1:
        raise ValueError(f"it has {num_layers} layers, which {place.stages} stages can't share (--pp)")
    ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return [range(ends[i], ends[i + 1]) for i in range(len(counts))]


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
