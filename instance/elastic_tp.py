"""Whether a step's feeds and head are split between the instances that run it: pure, and the same on every member.

    whole   each instance computes its own rows                  and reads all weights
    split   each computes a part of what all rows become         and reads 1/n of them; rows travel there and back in each layer

All have all weights, so nothing is moved for either: a part is a view (`instance.shared_feeds`). Attention and its projections
stay with a row's home in both: for one row of an 8B model in bf16 feeds and head are 82 % of what is read, and each exchange
more that projections would take costs what halving them saves (docs/operate.md).

Source of the switch by load: shift parallelism (Hidayetoglu et al., arXiv 2509.16495), which keeps weights in two layouts.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import msgspec

from instance.split import dealt, inner_shares

MOST_SPLIT_ROWS = 256
"""Of a step that is split, of all members together."""
MOST_GRAPH_ROWS = 64
"""Likewise on GPUs, where such steps are captured: about as many as take no longer than one to compute (`instance.graphs`)."""

ElasticTP = int | Literal["auto"]
"""Most rows of a step that is split, 0: none is; or as what was measured says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedCosts:
    """Nanoseconds in a step, for the feeds of all layers and the head, and a factor. Never negative."""

    weights_ns: float
    """Of one instance to read all, whatever the rows."""
    row_ns: float
    """Of one instance for all of a row more."""
    trip_ns: float
    """For rows to travel to the other instances, and what they make of them back, however few."""
    trip_row_ns: float
    """For each row that travels, to each of the others."""
    stretch: float = 1.0
    """How many times as long weights and rows take an instance that computes prompts meanwhile."""

    @staticmethod
    def through(few_rows: tuple[int, float, float], many_rows: tuple[int, float, float], *, others: int) -> "FeedCosts":
        """The lines through what was measured with few and with many rows of each instance, with so many `others`: their
        number, what an instance took by itself, and what the trips took."""
        few, whole_ns, trip_ns = few_rows
        many, whole_many_ns, trip_many_ns = many_rows
        row_ns = max(0.0, (whole_many_ns - whole_ns) / (many - few))
        trip_row_ns = max(0.0, (trip_many_ns - trip_ns) / ((many - few) * (others + 1) * others))
        return FeedCosts(
            weights_ns=max(0.0, whole_ns - few * row_ns),
            row_ns=row_ns,
            trip_ns=max(0.0, trip_ns - few * (others + 1) * others * trip_row_ns),
            trip_row_ns=trip_row_ns,
        )

    @staticmethod
    def of_steps(few_rows: tuple[int, float, float], many_rows: tuple[int, float, float], *, others: int) -> "FeedCosts":
        """Likewise from the times of whole steps: what an instance took by itself, and what all took together.

        What isn't split in them counts as weights do, and what it takes beside its part of these as trips: the difference
        between whole and split steps is what it is, and nobody asks for more.
        """
        few, whole_ns, split_ns = few_rows
        many, whole_many_ns, split_many_ns = many_rows
        row_ns = max(0.0, (whole_many_ns - whole_ns) / (many - few))
        part_ns = max(0.0, whole_ns - few * row_ns) / (others + 1)
        trips = (split_ns - part_ns - few * row_ns, split_many_ns - part_ns - many * row_ns)
        return FeedCosts.through((few, whole_ns, trips[0]), (many, whole_many_ns, trips[1]), others=others)

    @staticmethod
    def agreed(all_: Sequence["FeedCosts"]) -> "FeedCosts":
        """Of all members' the largest of each: a step takes as long as the slowest. So all of them decide alike."""
        return FeedCosts(**{field.name: max(getattr(costs, field.name) for costs in all_) for field in fields(FeedCosts)})

    def whole(self, rows: int) -> float:
        """Of an instance that computes so many rows by itself."""
        return self.weights_ns + rows * self.row_ns if rows else 0.0

    def split(self, rows: int, members: int) -> float:
        """Of so many members that compute so many rows together."""
        return self.whole(rows) / members + self.trips(rows, members)

    def trips(self, rows: int, members: int) -> float:
        """What that takes beside each one's part of the whole."""
        return self.trip_ns + rows * (members - 1) * self.trip_row_ns


@dataclass(frozen=True, slots=True)
class SplitRule:
    """When steps are split. All members of an epoch have the same."""

    most_rows: int
    """Of all members together in a step that is split."""
    costs: FeedCosts | None = None
    """None: all up to `most_rows` are."""
    least_members: int = 2
    """Of the party that runs it: where steps are captured all of the epoch, as each has its part in the graph."""

    def sharers(self, rows: Mapping[int, int], with_prompts: Collection[int] = ()) -> list[int]:
        """Among whom a step of decode rows is split, of which each member has so many; ascending. Empty: it is not.

        It takes as long as the member for whom it takes longest. So an idle one that has prompts only helps where its part, at
        its pace, takes less time than the whole takes others.
        """
        total, members = sum(rows.values()), len(rows)
        if members < self.least_members or not 0 < total <= self.most_rows:
            return []
        if self.costs is not None:
            stretched = {rank: self.costs.stretch if rank in with_prompts else 1.0 for rank in rows}
            whole = max(stretched[rank] * self.costs.whole(count) for rank, count in rows.items())
            part = max(stretched.values()) * self.costs.whole(total) / members
            if part + self.costs.trips(total, members) >= whole:
                return []
        return sorted(rows)


@dataclass(frozen=True, slots=True)
class FeedShares:
    """How one step is split, as one member has it."""

    rank: int
    """Of that member."""
    rows: tuple[tuple[int, int], ...]
    """`(rank, rows)` of all members, ascending."""

    @property
    def part(self) -> int:
        """Which of the parts it computes."""
        return [rank for rank, _ in self.rows].index(self.rank)

    @property
    def parts(self) -> int:
        return len(self.rows)

    @property
    def total(self) -> int:
        """Rows of all."""
        return sum(count for _, count in self.rows)

    def range_of(self, rank: int) -> range:
        """Where a member's rows are among those of all."""
        start = sum(count for its, count in self.rows if its < rank)
        return range(start, start + dict(self.rows)[rank])

    def homes(self, room: int) -> list[int]:
        """Which of the parts each row of all is at home with, and -1 for each that pads them to `room`."""
        homes = [part for part, (_, count) in enumerate(self.rows) for _ in range(count)]
        return homes + [-1] * (room - len(homes))

    def own_rows(self, room: int) -> list[int]:
        """Which own row each row of all is, where the own rows are padded to `room` as all are; the others stand for padding.

        first = 2, count = 3:    3 4 | 0 1 2 | 5 6 7
        """
        own = self.range_of(self.rank)
        before, behind = range(len(own), own.stop), range(own.stop, room)
        return [*before, *range(len(own)), *behind]

    def inner(self, width: int) -> range:
        """The dims between gate and down that it computes."""
        return inner_shares(width, self.parts)[self.part]

    def vocabulary(self, size: int) -> list[range]:
        """The tokens whose logits each member computes, in the order of `rows`."""
        return dealt(size, self.parts)


def pack(costs: FeedCosts) -> bytes:
    """For other members to read."""
    return msgspec.json.encode(costs)


def unpack(told: bytes) -> FeedCosts:
    """What `pack` made. Raises msgspec.ValidationError for anything else."""
    return msgspec.json.decode(told, type=FeedCosts)
