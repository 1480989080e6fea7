"""One admission of a request: what `gmanager.cluster.sequences` keeps of it."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from gmanager.cluster.events import Log
from gmanager.cluster.placement import PARALLEL_EFFICIENCY, prompt_work
from gmanager.cluster.request import Request
from gmanager.wire.messages import SequenceOutput, Share

SOON = 256
"""Tokens that each sequence is counted with at its home beyond those that are there, if it may generate so many: till then what
others hold of it has followed, and some of those beside it have ended. One that finds its home full all the same moves on."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One admission of a request."""

    number: int
    request: Request
    home: int
    participants: list[int]
    """Ascending: whoever has blocks of it, or will as its next home."""
    shares: list[Share]
    """Who was to prefill how much."""
    asked: list[int] = field(default_factory=list)
    """Instances that were sent a Reserve for a move. When all is released they get a Drop: they may never have been home,
    or not have heard the Reserve before the release."""
    held: dict[int, int] = field(default_factory=dict)
    """rank -> tokens of KV, as last heard."""
    kept: dict[int, int] = field(default_factory=dict)
    """The same when it was admitted: what was left of its KV from an earlier epoch."""
    received: int = 0
    """Tokens of this admission that came, in order."""
    early: dict[int, SequenceOutput] = field(default_factory=dict)
    """index -> output that came before what precedes it (homes speak on different connections)."""
    unscored: int = 0
    """Prompt tokens whose log-probability was asked for and has not come: till then no output goes to the client."""
    released: int | None = None
    """Tokens that were output, once it is released. It is gone when they are all here."""
    ending: bool = False
    """It was cancelled, or has ended: Released will come."""
    needs_block: bool = False
    is_written: bool = False
    """A token has come of its present home: all KV that other instances hold of it is written, and grows no more."""
    moving_to: int | None = None
    """MoveSequence was sent, HomeMoved has not come."""
    admitted_at: float = 0.0
    own_work: float = 0.0
    """Of its prompt, as `prompt_work` counts, where there is most of it."""
    work: float = 0.0
    """Till its first token, with what goes before it, when it was admitted; likewise."""
    first_expected_s: float | None = None
    """From its admission to its first token, as it was expected then."""
    step_expected_s: float | None = None
    """Between tokens, likewise."""

    @property
    def is_current(self) -> bool:
        """Whether its request still runs in it."""
        return self.request.is_running and self.request.seq == self.number

    def backlog(self, reach: int) -> dict[int, int]:
        """rank -> what it has still to compute of the prompt, as `prompt_work` counts, by what is known to be held."""
        if self.received or self.ending:
            return {}
        done = {rank: tokens - self.kept.get(rank, 0) for rank, tokens in self.held.items()}
        return works_of(self.shares, reach, done)

    @property
    def left(self) -> int:
        """As its request's."""
        return self.request.left

    @property
    def next_home(self) -> int:
        """Where it decodes, or is about to."""
        return self.home if self.moving_to is None else self.moving_to

    @property
    def growth(self) -> int:
        """Tokens that it generates next, by what is known to be held."""
        return max(0, min(SOON, self.request.prompt_tokens + self.request.max_tokens - sum(self.held.values())))

    def coming(self) -> int:
        """Tokens of KV that its home is soon to have of it, beyond those that are there: what others hold, if that may follow,
        and what it generates next."""
        if self.ending:
            return 0
        follows = self.request.spread == "auto"  # else it lies as its client wants it
        return self.growth + follows * sum(tokens for rank, tokens in self.held.items() if rank != self.next_home)

    def decodes_over(self) -> dict[int, int] | None:
        """rank -> tokens there that each of its rows attends to, as last heard; None while its prompt runs."""
        if self.ending or not self.received:
            return None
        return {rank: tokens for rank, tokens in self.held.items() if tokens}

    def end_prompt(self) -> None:
        """Its first token is there, and so is all KV of its prompt, whatever was heard of that."""
        for share in self.shares:
            self.held[share.rank] = max(self.held.get(share.rank, 0), share.tokens + self.kept.get(share.rank, 0))

    def validate(self) -> None:
        """Raises RuntimeError if it contradicts itself."""
        name = f"sequence {self.number}"
        ranks = self.participants
        if ranks != sorted(set(ranks)) or self.home not in ranks:
            raise RuntimeError(f"{name}: home {self.home}, participants {ranks}")
        if any(index <= self.received for index in self.early) and not self.unscored:
            raise RuntimeError(f"{name}: outputs {sorted(self.early)} lie here, {self.received} were taken")
        if self.released is not None and self.received >= self.released:
            raise RuntimeError(f"{name} is released and still here")
        if self.is_current:
            state = self.request.state
            # Released may come before the last tokens do: an earlier home speaks on another connection.
            may_end = state == "preempted" or self.released is not None
            if self.ending and not may_end:
                raise RuntimeError(f"{name}: its request is {state}, ending: {self.ending}")
            if state == "preempted" and not self.ending:
                raise RuntimeError(f"{name}: its request is preempted and it was not cancelled")
        elif not self.ending:
            raise RuntimeError(f"{name}: nobody wants it and it was not cancelled")


def told_of(sequence: Sequence, event: str, **fields: object) -> Log:
    """A line of the log."""
    request = sequence.request
    return Log(logging.INFO, event, {"request": request.id, "number": request.number, "sequence": sequence.number} | fields)


def works_of(shares: Collection[Share], reach: int, done: Mapping[int, int] | None = None) -> dict[int, int]:
    """rank -> what it has to compute of a prompt that is shared so, as `prompt_work` counts. `done`: tokens of it by rank."""
    done = {} if done is None else done
    tokens = sum(share.tokens for share in shares)
    each = prompt_work(tokens, reach) / tokens / (PARALLEL_EFFICIENCY if len(shares) > 1 else 1)
    return {share.rank: round(each * max(0, share.tokens - done.get(share.rank, 0))) for share in shares}
