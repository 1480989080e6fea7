"""Parties: the instances that share a sequence, directly or through others, step together.

Where instances share dense layers (`instance.elastic_tp`) all are one party, whatever lies where: an idle one helps the
others. As nobody needs that while nothing runs, they meet with the first sequence of an epoch.
"""

from collections.abc import Callable, Collection, Iterable

from gmanager.wire.messages import Regroup


class Parties:
    """The parties of one epoch. Every rank starts alone, in a party with number 0."""

    def __init__(self, epoch: int, size: int, standing: Callable[[], Collection[int]] = tuple) -> None:
        """`standing`: which ranks are together as soon as anything runs: known by then, and the same from then on."""
        self._standing = standing
        self._epoch = epoch
        self._size = size
        self._number = 0
        self._parties = [[rank] for rank in range(size)]
        self._of = list(range(size))
        """Lowest rank of each one's party."""

    def hold(self, ranks: Iterable[int]) -> bool:
        """Whether these are in one party, and those together that are to be."""
        return all(len({self._of[rank] for rank in its}) <= 1 for its in (ranks, self._standing()))

    def regroup(self, shared: Iterable[Iterable[int]]) -> tuple[list[int], Regroup] | None:
        """Make the parties fit these sets of participants. Returns whom to tell what, or None if nothing changes."""
        wanted = connected(self._size, [self._standing(), *shared])
        known = {tuple(party) for party in self._parties}
        new = [party for party in wanted if tuple(party) not in known]
        if not new:
            return None
        self._number += 1
        self._parties = wanted
        for party in new:
            for rank in party:
                self._of[rank] = party[0]
        ranks = sorted(rank for party in new for rank in party)
        return ranks, Regroup(epoch=self._epoch, number=self._number, parties=new)

    def validate(self, shared: Iterable[Iterable[int]]) -> None:
        """Raises RuntimeError unless the parties are those that these sets make."""
        wanted = connected(self._size, [self._standing() if self._number else (), *shared])
        if self._parties != wanted:
            raise RuntimeError(f"parties are {self._parties} and should be {wanted}")


def connected(size: int, shared: Iterable[Iterable[int]]) -> list[list[int]]:
    """Connected components of ranks 0 .. size-1, each ascending, in order of their lowest rank."""
    leader = list(range(size))

    def find(rank: int) -> int:
        while leader[rank] != rank:
            rank = leader[rank]
        return rank

    for ranks in shared:
        roots = sorted({find(rank) for rank in ranks})
        for root in roots[1:]:
            leader[root] = roots[0]
    parties: dict[int, list[int]] = {}
    for rank in range(size):
        parties.setdefault(find(rank), []).append(rank)
    return list(parties.values())
