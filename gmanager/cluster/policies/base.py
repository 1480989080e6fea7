"""What a policy decides, and what it sees: numbers in, numbers out.

The cluster asks when a prompt is next in the queue (`place`), when a home has no block left (`next_home`, `victim`), and, with
nothing else to do, about sequences that decode and of which something is new (`improve`). Whatever is answered, instances alone
grant their blocks, and the answer to a prompt is the same: policies differ in when tokens come.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from gmanager.cluster.performance import Costs
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
    waited_s: float = 0.0
    """Since it is the next."""
    is_shared: bool = False
    """What lies there is another's, and may be computed anew instead."""
    left: int = 1
    """Tokens that it may generate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceView:
    """A sequence that decodes."""

    seq: int
    home: int
    held: Mapping[int, int]
    """rank -> tokens of KV, of all that have some or will."""
    left: int
    """Tokens that it may still generate."""
    can_move: bool
    """Whether it may have another home now."""
    copyable: Collection[int] = ()
    """Ranks whose run may be copied to the home now, none of them the home."""
    growth: int = 0
    """Tokens that it generates next: `Sequence.growth`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A cell, as far as the gManager knows it."""

    views: Sequence[InstanceView]
    """By rank."""
    block_size: int
    chunk_tokens: int
    """Prompt rows of an instance's step."""
    reach: int
    """As `placement.prompt_work` has it."""
    costs: Costs
    waiting: Sequence[int] = ()
    """Tokens to be computed of those behind the next in the queue, if that is a long prompt, of the long ones among them."""
    num_waiting: int = 0
    """All that wait."""
    mean_tokens: int = 0
    """Of these, prompt and what was generated."""

    def blocks_for(self, tokens: int) -> int:
        """That so many tokens take, in one run."""
        return -(-tokens // self.block_size)

    def room_at(self, view: InstanceView) -> int:
        """Free blocks of an instance that are left once all is there that is known to come to those at home there. What comes
        of each may leave a block part full."""
        return view.free_blocks - self.blocks_for(view.coming) - view.homes


@dataclass(frozen=True, slots=True)
class NewHome:
    """A sequence goes on elsewhere; its KV stays."""

    seq: int
    to: int


@dataclass(frozen=True, slots=True)
class NewHolder:
    """A run of a sequence is copied, beside the steps, and is another instance's then."""

    seq: int
    source: int
    to: int


Relocation = NewHome | NewHolder


class Policy:
    """By memory and by the work that is known; nothing that is placed moves unless it must. Others decide otherwise in part."""

    name: ClassVar[str]
    relocates: ClassVar[bool] = False
    """Whether it has anything to `improve`."""
    waits_for_even: ClassVar[bool] = True
    """Whether a placement with uneven shares is put off while blocks become free."""

    def most_tokens(self, total_blocks: Sequence[int], block_size: int) -> int:
        """The longest sequence, prompt and generated, that instances with so many blocks each would ever be given."""
        return most_tokens(total_blocks, block_size)

    def place(self, prompt: Prompt, outlook: Outlook) -> Placement | None:
        """Where the next prompt's KV is born; None: it waits."""
        new = partial(place, tokens=prompt.missing)
        put = partial(place_rest, missing=prompt.missing, kept=prompt.kept) if prompt.kept else new
        return put(
            outlook.views,
            block_size=outlook.block_size,
            spread=prompt.spread,
            waiting=outlook.waiting,
            reach=outlook.reach,
        )

    def reaches_for(self, prompt: Prompt, placement: Placement, far: Mapping[int, int], outlook: Outlook) -> bool:
        """Whether a prompt that is placed so attends to what it shares on other instances, which compute nothing of it (`far`,
        rank -> tokens), rather than compute that again."""
        return True

    def next_home(self, views: Sequence[InstanceView], home: int) -> int | None:
        """Where a sequence goes on whose home has no block left; None: nowhere, somebody makes room."""
        return choose_target(views, home=home)

    def gives_way(self, wanting: Candidate, at_home: Sequence[Candidate], target: int, outlook: Outlook) -> int | None:
        """Who of a home's sequences is preempted rather than that who wants a block goes on at `target`; None: nobody.
        `at_home`: itself, and those that may give way to it."""
        return None

    def last_resort(self, views: Sequence[InstanceView], home: int) -> int | None:
        """The same if there is nobody to preempt."""
        return choose_target(views, home=home, reserve=1)

    def victim(self, running: Iterable[Candidate], home: int) -> int | None:
        """Who is preempted for a sequence at this home; None: no other than itself."""
        return choose_victim(running)

    def wrong_with(self, roles: Collection[str]) -> str | None:
        """What instances with these roles lack, so that all serve as if mixed; None: nothing."""
        named = sorted(set(roles) - {"mixed"})
        return f"policy {self.name} knows no roles, and these have some: {', '.join(named)}" if named else None

    def looks_at(self, outlook: Outlook) -> Collection[int]:
        """Ranks of homes of whose sequences it may find something to improve as time passes, beside those of all that lie on
        several instances."""
        return ()

    def improve(self, sequences: Sequence[SequenceView], outlook: Outlook) -> Relocation | None:
        """The one thing that is best moved now; None: nothing is, until something changes. Oldest sequences first."""
        return None
