"""Peers that are done for: refused, or of a cell that ended or went on without them. They are heard no more, and forgotten
after a while."""

from collections.abc import Collection

from gmanager.cluster.events import Forget
from gmanager.cluster.turn import Turn
from gmanager.wire.messages import Expelled, Message, Refused
from gmanager.wire.peer import PeerId


class Parting:
    """All of them."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._since: dict[PeerId, float] = {}
        self._expelled: set[PeerId] = set()
        """Those of them that may register anew."""

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._since

    @property
    def peers(self) -> Collection[PeerId]:
        return self._since.keys()

    def may_register(self, peer: PeerId) -> bool:
        """Whether it was told that it may come again."""
        return peer in self._expelled

    def part(self, peer: PeerId, last_words: Message | None = None) -> None:
        """Hear it no more."""
        self._since[peer] = self._turn.now
        if last_words is not None:
            self._turn.send(peer, last_words)

    def refuse_unreadable(self, peer: PeerId, reason: str) -> None:
        """It said what is no message."""
        self.part(peer, Refused(reason=f"can't read this: {reason}"))

    def expel(self, peer: PeerId, reason: str) -> None:
        """The same, but it may register anew."""
        self._expelled.add(peer)
        self.part(peer, Expelled(reason=reason))

    def forget(self, peer: PeerId) -> None:
        """It is gone, or comes again."""
        self._since.pop(peer, None)
        self._expelled.discard(peer)

    def end_leases(self, lease_s: float) -> None:
        """Forget those that have had time to read their last words."""
        for peer in [peer for peer, since in self._since.items() if self._turn.now - since > lease_s]:
            self.forget(peer)
            self._turn.emit(Forget(peer))
