"""The event that is being handled: its time, and what is to be done because of it."""

from gmanager.cluster.events import Action, Log, Send
from gmanager.wire.messages import Message
from gmanager.wire.peer import PeerId


class Turn:
    """One after the other, for all parts of the cluster."""

    def __init__(self) -> None:
        self.now = 0.0
        self._actions: list[Action] = []

    def emit(self, action: Action) -> None:
        """This is to be done, after all that came before."""
        self._actions.append(action)

    def send(self, peer: PeerId, message: Message) -> None:
        self.emit(Send(peer, message))

    def log(self, level: int, event: str, **fields: object) -> None:
        self.emit(Log(level, event, fields))

    def end(self) -> list[Action]:
        """All that is to be done, in this order."""
        actions, self._actions = self._actions, []
        return actions
