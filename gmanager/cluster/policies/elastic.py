"""The default: as few instances as let all that is known to wait end soonest, and what moves is predicted to gain."""

from collections.abc import Iterator, Sequence

from gmanager.cluster.placement import RESERVE_BLOCKS, Candidate, choose_victim
from gmanager.cluster.policies.base import Outlook, Policy, Relocation, SequenceView
from gmanager.cluster.policies.gain import best_of, copies_home, homes_among_holders, relative_gain, travel_s


class Elastic(Policy):
    """Degree 1, unless more gain: a prompt as `placement.degree` says; then a home where another one that holds some of the KV
    has less to do, or all KV at home, where that is read faster than rows travel."""

    name = "elastic"
    relocates = True

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
    yield from homes_among_holders(sequence, outlook, RESERVE_BLOCKS)
    yield from copies_home(sequence, outlook, RESERVE_BLOCKS, sequence.copyable)
