"""What a scheduler keeps of the steps of a lane, and what it counts."""

from dataclasses import dataclass, field

from distattn.layout import Holding
from instance.sequence import Home
from instance.step import Flip, LastToken


@dataclass(slots=True)
class Accepted:
    """What a step that isn't known to have run leaves to be done."""

    released: list[int]
    """Sequences whose blocks are free, or cached, once it has."""
    unwritten: list[int] = field(default_factory=list)
    """Of these, those of whose prompts rows are in no step."""
    prompts: list[tuple[int, int]] = field(default_factory=list)
    """(seq, tokens) of prompts that are all written once it has."""
    homes: list[Home] = field(default_factory=list)
    """Of these, those that were here."""
    written: list[tuple[int, int]] = field(default_factory=list)
    """(seq, position) from which on it writes KV here; until it has run, that may not be there."""
    detached: list[int] = field(default_factory=list)
    """Moves of runs that were here: steps before this one read them."""
    flipped: list[Flip] = field(default_factory=list)
    """Of sequences whose home is here."""


@dataclass(slots=True)
class LaneSteps:
    """What concerns the steps of one lane."""

    cancels: dict[int, None] = field(default_factory=dict)
    """To be told to the party."""
    last_tokens: list[LastToken] = field(default_factory=list)
    previous_samples: dict[int, int] = field(default_factory=dict)
    """seq -> which token is its, of those that the newest plans sample: as many of them as there are stages."""
    number: int = 0
    """Of the next step."""
    last_steps: dict[int, int] = field(default_factory=dict)
    """seq -> number of the step in which it had its last row, where there are several stages."""
    accepted: list[Accepted] = field(default_factory=list)
    """Each that is not committed."""
    prompts: list[int] = field(default_factory=list)
    """Sequences whose prompts the last notice proposed."""
    known: dict[int, list[Holding]] = field(default_factory=dict)
    """In the decode lane: what the present party's last step with a row of a sequence left held of it."""


@dataclass(slots=True)
class Tally:
    """Counts for the statistics."""

    steps: int = 0
    rows: int = 0
    split_steps: int = 0
    """Whose feeds were split between members."""
    tokens_prefilled: int = 0
    tokens_generated: int = 0
    home_moves: int = 0
