"""Infinite-LLM (Lin et al., arXiv 2401.02669): instances lend each other memory, so that more requests run at once.

Its words: a *debtor* is an instance with a small batch and no memory left, a *creditor* one with memory to spare. Its greedy
algorithm: take the debtor that gains most, move the KV that most raises the predicted sum of throughputs, until nothing gains.
There blocks leave a debtor while its requests stay. Here the home goes along, which costs nothing, and what was written
before follows as a copy: a row without the KV that it attends to would only travel.
"""

from collections.abc import Sequence
from dataclasses import replace

from gmanager.cluster.placement import RESERVE_BLOCKS, InstanceView, Placement, share_out
from gmanager.cluster.policies.base import NewHome, Outlook, Policy, Prompt, Relocation, SequenceView
from gmanager.cluster.policies.gain import MIN_GAIN, best_of, copies_home


class Infinite(Policy):
    """Local memory first, and what doesn't fit from whoever has most; then from debtors to creditors."""

    name = "infinite"
    relocates = True
    looks_at_all = True
    waits_for_even = False

    def place(self, prompt: Prompt, outlook: Outlook) -> Placement | None:
        if prompt.kept or prompt.spread != "auto":
            return super().place(prompt, outlook)
        blocks = outlook.blocks_for(prompt.missing)
        rooms = [view for view in outlook.views if view.free_blocks > 1]
        homes = [view for view in rooms if view.homes < view.max_homes]
        if not homes:
            return None
        home = min(homes, key=lambda v: (v.free_blocks <= blocks, v.homes, -v.free_blocks, v.rank))
        creditors = sorted((view for view in rooms if view is not home), key=lambda v: (-v.free_blocks, v.rank))
        taken: dict[int, int] = {}
        for view in (home, *creditors):
            if blocks:
                taken[view.rank] = min(blocks, view.free_blocks - 1)
                blocks -= taken[view.rank]
        return None if blocks else share_out(taken, prompt.missing, outlook.block_size)

    def improve(self, sequences: Sequence[SequenceView], outlook: Outlook) -> Relocation | None:
        for sequence in sequences:  # what a home has left behind follows it
            free = outlook.views[sequence.home].free_blocks
            for copy in copies_home(sequence, outlook, sequence.copyable):
                if outlook.views[copy.source].free_blocks < free - outlook.blocks_for(sequence.held[copy.source]):
                    return copy
        if not outlook.num_waiting or not outlook.mean_tokens:
            return None
        return best_of(
            (self._gain(sequence, creditor, outlook), NewHome(sequence.seq, creditor.rank))
            for sequence in sequences
            if sequence.can_move
            for creditor in outlook.views
            if creditor.rank != sequence.home and self._fits(sequence, creditor, outlook)
        )

    @staticmethod
    def _fits(sequence: SequenceView, creditor: InstanceView, outlook: Outlook) -> bool:
        kv = sequence.held.get(sequence.home, 0), sequence.growth
        needed = sum(map(outlook.blocks_for, kv)) + RESERVE_BLOCKS
        return outlook.room_at(creditor) >= needed and creditor.homes < creditor.max_homes

    @staticmethod
    def _gain(sequence: SequenceView, creditor: InstanceView, outlook: Outlook) -> float:
        """Of the sum of both instances' throughputs, once those that wait have filled what is free then."""
        debtor, tokens = outlook.views[sequence.home], sequence.held.get(sequence.home, 0)
        blocks, each = outlook.blocks_for(tokens), outlook.blocks_for(outlook.mean_tokens) + 1

        def filled(view: InstanceView, waiting: int) -> tuple[float, int]:
            """Tokens per second, and how many of those that wait are running then."""
            more = max(0, min(waiting, (view.free_blocks - RESERVE_BLOCKS) // each, view.max_homes - view.homes))
            rows = view.rows + more
            held = view.held + more * outlook.mean_tokens
            seconds = outlook.costs.decode_step_s(rows, held, view.sent, view.served)
            return (rows / seconds if seconds else 0.0), more

        def both(one: InstanceView, other: InstanceView) -> float:
            first, taken = filled(one, outlook.num_waiting)
            return first + filled(other, outlook.num_waiting - taken)[0]

        before = both(debtor, creditor)
        then = both(
            replace(debtor, free_blocks=debtor.free_blocks + blocks, rows=debtor.rows - 1, held=debtor.held - tokens),
            replace(creditor, free_blocks=creditor.free_blocks - blocks, rows=creditor.rows + 1, held=creditor.held + tokens),
        )
        gain = then / before - 1 if before else 0.0
        return gain if gain >= MIN_GAIN else 0.0
