"""The default: as few instances as let all that is known to wait end soonest, and what moves is predicted to gain."""

from collections.abc import Iterator, Sequence

from gmanager.cluster.placement import RESERVE_BLOCKS
from gmanager.cluster.policies.base import Outlook, Policy, Relocation, SequenceView
from gmanager.cluster.policies.gain import best_of, copies_home, homes_among_holders, relative_gain


class Elastic(Policy):
    """Degree 1, unless more gain: a prompt as `placement.degree` says; then a home where another one that holds some of the KV
    has less to do, or all KV at home, where that is read faster than rows travel."""

    name = "elastic"
    relocates = True

    def improve(self, sequences: Sequence[SequenceView], outlook: Outlook) -> Relocation | None:
        return best_of(
            (relative_gain(sequence, relocation, outlook), relocation)
            for sequence in sequences
            for relocation in _options(sequence, outlook)
        )


def _options(sequence: SequenceView, outlook: Outlook) -> Iterator[Relocation]:
    yield from homes_among_holders(sequence, outlook, RESERVE_BLOCKS)
    yield from copies_home(sequence, outlook, RESERVE_BLOCKS, sequence.copyable)
