"""Messages to clients that wait for the commit of what they tell of."""

from collections import Counter, deque
from collections.abc import Iterator

from gmanager.wire.messages import Message
from gmanager.wire.peer import PeerId


class Held:
    """A queue of them, which keeps each client's in order."""

    def __init__(self) -> None:
        self._queue: deque[tuple[int, PeerId, Message]] = deque()
        self._counts: Counter[PeerId] = Counter()

    def count(self, peer: PeerId) -> int:
        """How many wait for this client."""
        return self._counts[peer]

    def put(self, place: int, peer: PeerId, message: Message) -> None:
        """`place`: of the last entry that must be committed before; it never falls."""
        self._queue.append((place, peer, message))
        self._counts[peer] += 1

    def pop(self, committed: int) -> Iterator[tuple[PeerId, Message]]:
        """Those that need not wait any more, in order."""
        while self._queue and self._queue[0][0] <= committed:
            _, peer, message = self._queue.popleft()
            self._counts[peer] -= 1
            if not self._counts[peer]:
                del self._counts[peer]
            yield peer, message

    def drop(self, peer: PeerId) -> None:
        """Nothing more is to be sent to this client."""
        if self._counts.pop(peer, 0):
            self._queue = deque(item for item in self._queue if item[1] != peer)
