"""What a policy decides, and what it sees: numbers in, numbers out.

The cluster asks at four moments: a prompt is next in the queue (`place`), a home has no block left (`next_home`, `victim`), and
when nothing else is to be done (`improve`). Whatever is answered, instances alone grant their blocks, and the answer to a
prompt is the same: policies differ in when tokens come.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from gmanager.cluster.placement import (
    Candidate,
    InstanceView,
    Placement,
    choose_target,
    choose_victim,
    most_tokens,
    place,
    place_rest,
)
from gmanager.config import Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is next in the queue."""

    missing: int
    """Tokens whose rows are to be computed."""
    kept: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """rank -> (tokens, runs) that lie there already."""
    spread: Spread = "auto"
    """As its client, or the service's flag, asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A cell, as far as the gManager knows it."""

    views: Sequence[InstanceView]
    """By rank."""
    block_size: int
    reach: int
    """As `placement.prompt_work` has it."""
    waiting: Sequence[int] = ()
    """Tokens to be computed of those behind the next in the queue, if that is a long prompt, of the long ones among them."""


class Policy:
    """By memory and by the work that is known; nothing that is placed moves unless it must. Others decide otherwise in part."""

    name: ClassVar[str]

    def most_tokens(self, total_blocks: Sequence[int], block_size: int) -> int:
        """The longest sequence, prompt and generated, that instances with so many blocks each would ever be given."""
        return most_tokens(total_blocks, block_size)

    def place(self, prompt: Prompt, outlook: Outlook) -> Placement | None:
        """Where the next prompt's KV is born; None: it waits."""
        if not prompt.kept:
            return place(
                outlook.views,
                tokens=prompt.missing,
                block_size=outlook.block_size,
                spread=prompt.spread,
                waiting=outlook.waiting,
                reach=outlook.reach,
            )
        return place_rest(
            outlook.views,
            missing=prompt.missing,
            kept=prompt.kept,
            block_size=outlook.block_size,
            spread=prompt.spread,
            waiting=outlook.waiting,
            reach=outlook.reach,
        )

    def next_home(self, views: Sequence[InstanceView], home: int) -> int | None:
        """Where a sequence goes on whose home has no block left; None: nowhere, somebody makes room."""
        return choose_target(views, home=home)

    def last_resort(self, views: Sequence[InstanceView], home: int) -> int | None:
        """The same if there is nobody to preempt."""
        return choose_target(views, home=home, reserve=1)

    def victim(self, running: Sequence[Candidate], home: int) -> int | None:
        """Who is preempted for a sequence at this home; None: no other than itself."""
        return choose_victim(running)
