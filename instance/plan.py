"""What an instance runs in one step, as the scheduler has it and runners, samplers and graphs take it: plain data."""

from array import array
from collections import Counter
from dataclasses import dataclass, field

from distattn.layout import Layout
from gmanager.wire.messages import SequenceParams
from instance.elastic_tp import FeedShares
from instance.sequence import History
from instance.step import FAR, MAX_PROMPTS, Lane, Step

MAX_DECODE_ROWS = 256
"""Most decode rows an instance brings to one step; the oldest sequences go first."""

MAX_SAMPLES: dict[Lane, int] = {"prefill": MAX_PROMPTS, "decode": MAX_DECODE_ROWS}
"""Most tokens that an instance samples in one step."""


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row whose logits yield the token at `position`."""

    row: int
    seq: int
    position: int
    params: SequenceParams
    num_generated: int
    """Tokens generated before this one in this admission, the one under way included."""
    history: History | None = None
    """All of these but the one under way; None where the choice doesn't depend on them."""


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Consecutive rows of a prompt whose logits tell the log-probabilities of the tokens that follow them there."""

    seq: int
    first_row: int
    start: int
    """Position of the first of these tokens."""
    token_ids: "array[int]"
    num_top: int
    """How many of the likeliest tokens are wanted with each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What this instance runs in one step. T own rows."""

    token_ids_T: list[int]
    positions_T: list[int]
    pending: list[tuple[int, int]]
    """`(row, i)`: the row's token is the i-th of those sampled in this lane that are kept: see `samples_at`."""
    sampled: list[SampledRow]
    scored: list[ScoredRows]
    slots_T: list[int]
    """Where the rows' KV goes in the first table of blocks."""
    layout: Layout
    """In the model's first group of layers: that of those in which rows see all before them, if there are any."""
    other_layouts: list[Layout] = field(default_factory=list)
    """In its other groups."""
    other_slots: list[list[int]] = field(default_factory=list)
    """In the tables of these groups, if each has its own."""
    needs_logits: bool
    """Whether any member of the party does in this step: else nobody needs what the last layer attends to."""
    samples_at: int = 0
    """Where the samples go among those that are kept for steps to come: of the newest step, or of as many as the instance has
    stages."""
    shares: FeedShares | None = None
    """How the feeds of all members' rows are split between them; None: each computes its own."""
    is_decode: bool
    """Whether every row of every member is a span of its own that yields a token, and none has more than `MAX_DECODE_ROWS`."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to run: no own rows, and none to serve or to help with."""
        served = any(layout.num_received for layout in self.layouts)
        return not (self.layout.num_rows or served or self.shares is not None)

    @property
    def layouts(self) -> list[Layout]:
        """One for each group."""
        return [self.layout, *self.other_layouts]

    @property
    def slots(self) -> list[list[int]]:
        """One list for each table of blocks."""
        return [self.slots_T, *self.other_slots]

    @property
    def is_shared(self) -> bool:
        """Whether rows travel."""
        return any(layout.dispatched or layout.received for layout in self.layouts)


@dataclass(frozen=True, slots=True)
class Pace:
    """Prompt rows that an instance runs in one step."""

    chunk_tokens: int
    """While nobody decodes."""
    mixed_chunk_tokens: int
    """While somebody does, at the beginning of a prompt."""
    reach: int = FAR
    """Tokens at which attending to what came before costs a row as much as the rest of the model."""
    grain: int = 1
    """Rows that cost about as much as fewer."""
    stages: int = 1
    """Through which its steps go, one behind the other (`instance.pipelining`)."""


def is_decode(step: Step) -> bool:
    """Whether a step has decode rows alone: each is a span of its own that yields a token."""
    rows = Counter(span.rank for span in step.spans)
    return (
        len(step.sampled) == len(step.spans)
        and not step.scored
        and all(span.stop - span.start == 1 for span in step.spans)
        and max(rows.values(), default=0) <= MAX_DECODE_ROWS
    )
