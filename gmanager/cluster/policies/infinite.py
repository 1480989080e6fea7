"""Infinite-LLM (Lin et al., arXiv 2401.02669): instances lend each other memory, so that more requests run at once.

Its words: a *debtor* is an instance with a small batch and no memory left, a *creditor* one with memory to spare. Its greedy
algorithm: take the debtor that gains most, move the KV that most raises the predicted sum of throughputs, until nothing gains.
There blocks leave a debtor while its requests stay. Here the home goes along, which costs nothing, and what was written
before follows as a copy: a row without the KV that it attends to would only travel.
"""

from collections.abc import Collection, Iterator, Sequence
from heapq import nlargest

from gmanager.cluster.placement import RESERVE_BLOCKS, InstanceView, Placement, share_out
from gmanager.cluster.policies.base import NewHome, Outlook, Policy, Prompt, Relocation, SequenceView
from gmanager.cluster.policies.gain import MIN_GAIN, best_of, copies_home

MOST_CREDITORS = 4
"""Those with most memory to spare, which are weighed: of a thousand that would take all of a decision's time."""


class Infinite(Policy):
    """Local memory first, and what doesn't fit from whoever has most; then from debtors to creditors."""

    name = "infinite"
    relocates = True
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

    def looks_at(self, outlook: Outlook) -> Collection[int]:
        """Debtors, while somebody waits and there is a creditor."""
        if not _creditors(outlook):
            return ()
        return [view.rank for view in outlook.views if _is_debtor(view, outlook)]

    def improve(self, sequences: Sequence[SequenceView], outlook: Outlook) -> Relocation | None:
        for sequence in sequences:  # what a home has left behind follows it
            free = outlook.views[sequence.home].free_blocks
            for copy in copies_home(sequence, outlook, sequence.copyable):
                if outlook.views[copy.source].free_blocks < free - outlook.blocks_for(sequence.held[copy.source]):
                    return copy
        creditors = _creditors(outlook)
        able = (s for s in sequences if s.can_move and creditors and _is_debtor(outlook.views[s.home], outlook))
        return best_of(
            (_gain(sequence, creditor, outlook), NewHome(sequence.seq, creditor.rank))
            for sequence in able
            for creditor in _that_fit(sequence, creditors, outlook)
        )


def _each(outlook: Outlook) -> int:
    """Blocks that one of those that wait takes."""
    return outlook.blocks_for(outlook.mean_tokens) + 1


def _is_debtor(view: InstanceView, outlook: Outlook) -> bool:
    """Whether memory is what keeps some of those that wait from it."""
    wanted = min(outlook.num_waiting, view.max_homes - view.rows)
    return view.homes > 0 and (view.free_blocks - RESERVE_BLOCKS) // _each(outlook) < wanted


def _creditors(outlook: Outlook) -> list[InstanceView]:
    """Those with most memory to spare, while somebody waits."""
    if not outlook.num_waiting or not outlook.mean_tokens:
        return []
    able = (v for v in outlook.views if v.free_blocks > RESERVE_BLOCKS and v.homes < v.max_homes)
    most = nlargest(MOST_CREDITORS, ((outlook.room_at(view), -view.rank) for view in able))
    return [outlook.views[-rank] for room, rank in most if room > RESERVE_BLOCKS]


def _that_fit(sequence: SequenceView, creditors: Sequence[InstanceView], outlook: Outlook) -> Iterator[InstanceView]:
    """Those with room for what of a sequence will follow its home, those with most first."""
    kv = sequence.held.get(sequence.home, 0), sequence.growth
    needed = sum(map(outlook.blocks_for, kv)) + RESERVE_BLOCKS
    for creditor in creditors:
        if outlook.room_at(creditor) < needed:
            return
        if creditor.rank != sequence.home:
            yield creditor


def _gain(sequence: SequenceView, creditor: InstanceView, outlook: Outlook) -> float:
    """Of the sum of both instances' throughputs, once those that wait have filled what is free then."""
    debtor, tokens = outlook.views[sequence.home], sequence.held.get(sequence.home, 0)
    blocks, each = outlook.blocks_for(tokens), _each(outlook)

    def filled(view: InstanceView, waiting: int, comes: int) -> tuple[float, int]:
        """Tokens per second, and how many of those that wait are running then. `comes`: 1: the sequence does; -1: it goes."""
        rows = view.rows + comes
        more = max(0, min(waiting, (view.free_blocks - comes * blocks - RESERVE_BLOCKS) // each, view.max_homes - rows))
        held = view.held + comes * tokens + more * outlook.mean_tokens
        seconds = outlook.costs.decode_step_s(rows + more, held, view.sent, view.served)
        return ((rows + more) / seconds if seconds else 0.0), more

    def both(comes: int) -> float:
        first, taken = filled(debtor, outlook.num_waiting, -comes)
        return first + filled(creditor, outlook.num_waiting - taken, comes)[0]

    before = both(0)
    gain = both(1) / before - 1 if before else 0.0
    return gain if gain >= MIN_GAIN else 0.0
