"""The baseline: instances that share nothing, behind a queue that they share.

So do services that run one engine for each GPU behind a router; but here a request is bound to an instance only when that has
room, which is better than what a router knows when the request comes.
"""

from collections.abc import Iterable, Sequence

from gmanager.cluster.placement import Candidate, InstanceView, Placement, choose_victim, most_tokens
from gmanager.cluster.policies.base import Outlook, Policy, Prompt


class Static(Policy):
    """Each request inside one instance; one that fits none is refused."""

    name = "static"

    def most_tokens(self, total_blocks: Sequence[int], block_size: int) -> int:
        return max((most_tokens([blocks], block_size) for blocks in total_blocks), default=0)

    def place(self, prompt: Prompt, outlook: Outlook) -> Placement | None:
        placement = super().place(Prompt(missing=prompt.missing, kept=prompt.kept, spread=1), outlook)
        involved = set() if placement is None else {*placement.blocks, *prompt.kept}
        return placement if len(involved) == 1 else None

    def next_home(self, views: Sequence[InstanceView], home: int) -> int | None:
        return None

    def last_resort(self, views: Sequence[InstanceView], home: int) -> int | None:
        return None

    def victim(self, running: Iterable[Candidate], home: int) -> int | None:
        return choose_victim(candidate for candidate in running if candidate.home == home)
