"""The default: as few instances as let all that is known to wait end soonest, and what moves is predicted to gain."""

from collections.abc import Iterator, Sequence

from gmanager.cluster.placement import LONG_PROMPT, Candidate, Placement, choose_victim
from gmanager.cluster.policies.base import Outlook, Policy, Prompt, Relocation, SequenceView
from gmanager.cluster.policies.gain import best_of, copies_home, homes_among_holders, relative_gain, travel_s

SLOWED = 0.25
"""By which part of a step an exchange may slow it down for a short prompt to be spread rather than wait. It is 0.19 on H200s
(8B shape), and 1.5 on CPUs with a tiny model, where waiting completes twice as many requests (simulated)."""
WAITS_S = 5.0
"""The longest that it waits for that: who decodes there may do so for hours, and nobody overtakes it."""


class Elastic(Policy):
    """Degree 1, unless more gain: a prompt as `placement.degree` says; then a home where another one that holds some of the KV
    has less to do, or all KV at home, where that is read faster than rows travel."""

    name = "elastic"
    relocates = True

    def place(self, prompt: Prompt, outlook: Outlook) -> Placement | None:
        """A prompt that is not long, and for which only several instances together have room, waits for one that has, where an
        exchange would slow down all that decodes there by much: those that share a sequence step together."""
        placement = super().place(prompt, outlook)
        if placement is None or len(placement.blocks) == 1 or prompt.kept or prompt.spread != "auto":
            return placement
        is_beside_others = any(outlook.views[rank].homes for rank in placement.blocks)
        if prompt.missing >= LONG_PROMPT or prompt.waited_s >= WAITS_S or not is_beside_others:
            return placement
        fits_one = outlook.blocks_for(prompt.missing) < max(view.total_blocks for view in outlook.views)
        rows = max(view.rows for view in outlook.views)
        step_s = outlook.costs.decode_step_s(max(1, rows), max(view.held for view in outlook.views))
        return None if fits_one and outlook.costs.decode.exchange_s > SLOWED * step_s else placement

    def gives_way(self, wanting: Candidate, at_home: Sequence[Candidate], target: int, outlook: Outlook) -> int | None:
        """The one that is cheapest to compute again, if that takes less than rows that travel until this one ends."""
        victim = choose_victim(at_home)
        if victim is None:
            return None
        tokens = next(candidate.tokens for candidate in at_home if candidate.seq == victim)
        again_s = outlook.costs.prefill_s(tokens, chunk=outlook.chunk_tokens)
        home, views = wanting.home, outlook.views
        return victim if again_s < travel_s(views[home], views[target], wanting.left, outlook.costs) else None

    def improve(self, sequences: Sequence[SequenceView], outlook: Outlook) -> Relocation | None:
        return best_of(
            (relative_gain(sequence, relocation, outlook), relocation)
            for sequence in sequences
            for relocation in _options(sequence, outlook)
        )


def _options(sequence: SequenceView, outlook: Outlook) -> Iterator[Relocation]:
    yield from homes_among_holders(sequence, outlook)
    yield from copies_home(sequence, outlook, sequence.copyable)
