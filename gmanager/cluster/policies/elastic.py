"""The default: as few instances as let all that is known to wait end soonest, and what moves is predicted to gain."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from gmanager.cluster.placement import Candidate, Placement, choose_victim
from gmanager.cluster.policies.base import NewHome, Outlook, Policy, Prompt, Relocation, SequenceView
from gmanager.cluster.policies.gain import (
    after,
    apart,
    best_of,
    copies_home,
    homes_among_holders,
    relative_gain,
    step_s,
    tied,
    together,
)

WAITS_S = 10.0
"""The longest that the next in the queue waits for one instance to have room: who decodes there may do so for hours."""

SOONER_S = 5.0
"""By which a prompt that nobody waits behind is to have its first token, to be spread at the cost of what decodes. With 1 s a
busy cell generated a tenth less (simulated, 8 H200s): till a spread sequence ends, all of it step as slowly as where a prompt
runs."""


class Elastic(Policy):
    """Degree 1, unless more gain: a prompt as `placement.degree` says, where all that decodes loses nothing by it; then a home
    where another one that holds some of the KV has less to do, or all KV at home, where that is read faster than rows travel.

    What a sequence costs that lies on several instances is counted as if no other tied them together: were it counted beside
    those that do, each would seem to cost nothing, and all would step together for ever.
    """

    name = "elastic"
    relocates = True

    def place(self, prompt: Prompt, outlook: Outlook) -> Placement | None:
        """While others wait, a prompt that one instance can hold is spread if those that it ties together generate more tokens
        a second then, itself included, than each for itself. If not it is computed by one, or waits for one to have room."""
        placement = super().place(prompt, outlook)
        is_kept = bool(prompt.kept) and not prompt.is_shared  # it lies there, whatever is gained
        if placement is None or len(placement.blocks) == 1 or is_kept or prompt.spread != "auto":
            return placement
        if self._gains(placement, outlook):
            return placement
        fewest = super().place(replace(prompt, spread=1), outlook)
        saves_s = self._prefill_s(prompt, 1, outlook) - self._prefill_s(prompt, len(placement.blocks), outlook)
        if fewest is not None and len(fewest.blocks) == 1 and outlook.num_waiting <= 1 and saves_s >= SOONER_S:
            return placement
        fits_one = outlook.blocks_for(prompt.missing) < max(view.total_blocks for view in outlook.views)
        is_late = prompt.waited_s >= WAITS_S
        return fewest if fewest is not None and (len(fewest.blocks) == 1 or not fits_one or is_late) else None

    @staticmethod
    def _prefill_s(prompt: Prompt, degree: int, outlook: Outlook) -> float:
        return outlook.costs.prefill_s(prompt.missing, degree=degree, chunk=outlook.chunk_tokens)

    @staticmethod
    def _gains(placement: Placement, outlook: Outlook) -> bool:
        shares = {share.rank: share.tokens for share in placement.shares}
        before = apart((outlook.views[rank] for rank in shares), outlook.costs)
        return together(tied(outlook.views, placement.shares[0].rank, shares), outlook.costs) > before

    def reaches_for(self, prompt: Prompt, placement: Placement, far: Mapping[int, int], outlook: Outlook) -> bool:
        """If fewer tokens are lost by stepping together with these till it ends than while its home computes what they hold.
        Counted as if no other sequence tied any of them together."""
        if prompt.spread != "auto":
            return True
        home, costs = placement.shares[0].rank, outlook.costs
        own, far = {share.rank: share.tokens for share in placement.shares}, dict(far)
        for rank, (tokens, _) in prompt.kept.items():
            if rank not in far:
                own[rank] = own.get(rank, 0) + tokens
        again = sum(far.values())
        views = [replace(v, sent=0, served=0) if v.rank in own or v.rank in far else v for v in outlook.views]
        near = tied(views, home, own | {home: own[home] + again})
        alone = together(near, costs)
        lost = alone + apart((views[rank] for rank in far), costs) - together(tied(views, home, own | far), costs)
        left_s = prompt.left * max(step_s(view, costs) for view in near)
        again_s = costs.prefill_s(again, degree=len(placement.shares), chunk=outlook.chunk_tokens)
        return lost * left_s < alone * again_s

    def gives_way(self, wanting: Candidate, at_home: Sequence[Candidate], target: int, outlook: Outlook) -> int | None:
        """The one that is cheapest to compute again, if fewer tokens are lost while that is computed than by stepping together
        with the next home until the one that wants to go there ends."""
        victim = choose_victim(at_home)
        if victim is None:
            return None
        tokens = next(candidate.tokens for candidate in at_home if candidate.seq == victim)
        costs, home = outlook.costs, outlook.views[wanting.home]
        views = {rank: outlook.views[rank] for rank in (wanting.home, target)}
        its = SequenceView(
            seq=wanting.seq, home=wanting.home, held={wanting.home: wanting.tokens}, left=wanting.left, can_move=True
        )
        moved = after(views, its, NewHome(wanting.seq, target))
        left_s = wanting.left * home.rows / apart((home,), costs) if home.rows else 0.0
        lost_together = (apart(views.values(), costs) - together(moved.values(), costs)) * left_s
        again_s = costs.prefill_s(tokens, chunk=outlook.chunk_tokens)
        return victim if again_s * apart((home,), costs) < lost_together else None

    def improve(self, sequences: Sequence[SequenceView], outlook: Outlook) -> Relocation | None:
        return best_of(
            (relative_gain(sequence, relocation, outlook), relocation)
            for sequence in sequences
            for relocation in _options(sequence, outlook)
        )


def _options(sequence: SequenceView, outlook: Outlook) -> Iterator[Relocation]:
    yield from homes_among_holders(sequence, outlook)
    yield from copies_home(sequence, outlook, sequence.copyable)
