"""What an instance knows of a sequence: as its home, or as one that takes part in its prefill."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from distattn.layout import Holding
from gmanager.wire.messages import SequenceParams, Share
from instance.step import Flip, Lane


def gaps_between(ranges: Iterable[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    """What of `[0, end)` is in none of the ranges, ascending."""
    gaps: list[tuple[int, int]] = []
    at = 0
    for start, stop in sorted(ranges):
        if at < start:
            gaps.append((at, start))
        at = max(at, stop)
    if at < end:
        gaps.append((at, end))
    return gaps


@dataclass(slots=True)
class Guest:
    """A prompt of which rows are yet to run: this instance takes part, the home included, or has kept some of its KV."""

    prompt: "array[int]"
    num_top: int | None = None
    """With the log-probability of each of its tokens: of so many likeliest ones. None: none is wanted."""


@dataclass(slots=True)
class History:
    """A sequence's tokens, where sampling depends on them (`SequenceParams.needs_history`). They are only ever added to."""

    prompt: "array[int]"
    """Each token of the prompt once; none unless repetitions are penalised."""
    generated: "array[int]"
    """In order, those of earlier admissions first; the one under way is not among them."""
    num_before: int
    """How many of `generated` are of earlier admissions."""

    @staticmethod
    def of(tokens: "array[int]", params: SequenceParams) -> "History | None":
        """Of a sequence that was admitted with these tokens; None where nothing depends on it."""
        if not params.needs_history:
            return None
        end = len(tokens) - params.num_generated
        prompt = sorted(set(tokens[:end])) if params.repetition_penalty != 1 else ()
        return History(array("I", prompt), tokens[end:], params.num_generated)


@dataclass(slots=True, kw_only=True)
class Home:
    """A sequence whose next rows are computed here.

    positions   0 .. prompt_tokens .. position
                |  KV in accepted steps  | next row

    positions   0 .. [position, end) .. [start, end) .. [start, prompt_tokens)       in prefill: KV that was kept lies between
                     |     gaps: in no step yet     |                           |
    """

    seq: int
    arrival: int
    params: SequenceParams
    prompt_tokens: int
    position: int
    """Of the next row: `[0, position)` are in accepted steps, or were kept."""
    gaps: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of its prompt that are in no accepted step, ascending."""
    shares: list[Share] = field(default_factory=list)
    """What each participant still has to prefill."""
    holdings: list[Holding] = field(default_factory=list)
    generated: int = 0
    """Tokens generated in accepted steps, those under way included."""
    committed: int = 0
    """Tokens generated, known here and output. `generated - committed` are still under way: at most one when a
    notice is made, two between `accept` and `commit`."""
    last_token: int | None = None
    """The newest committed one."""
    history: History | None = None
    finished: bool = False
    cancelled: bool = False
    move_to: int | None = None
    flip: Flip | None = None
    """Of a run of which a copy is complete, for its next step."""
    waited: int = 0
    """Steps of the prefill lane since it came, until its prompt is in them."""
    waits_for_block: bool = False
    """The gManager has been told that there is no room for its next row."""

    @property
    def in_prefill(self) -> bool:
        return bool(self.gaps)

    @property
    def lane(self) -> Lane:
        """Where its next step is."""
        return "decode" if self.committed else "prefill"

    @property
    def decodes_on(self) -> bool:
        """Whether rows follow those of its prompt, now or as soon as its first token is known."""
        return not (self.in_prefill or self.over) and self.generated < self.params.max_tokens

    @property
    def over(self) -> bool:
        return self.finished or self.cancelled

    def move_on(self, stop: int) -> None:
        """Rows up to there are in accepted steps."""
        self.gaps = [(max(start, stop), end) for start, end in self.gaps if end > stop]
        self.position = self.gaps[0][0] if self.gaps else stop

    def ranks(self) -> set[int]:
        """All instances that its next step concerns."""
        ranks = {share.rank for share in self.shares} | {holding.rank for holding in self.holdings}
        if self.flip is not None:
            ranks.add(self.flip.target)
        return ranks if self.move_to is None else ranks | {self.move_to}
