"""Outputs that the gManager has not said to have: they are kept for the one that may come after it."""

from collections import deque
from collections.abc import Mapping
from itertools import chain

from gmanager.wire.messages import Outputs
from gmanager.wire.messages import Unheard as UnheardTokens

Origin = tuple[int, int]
"""Of a sequence: the number of its request, and how many tokens earlier admissions had generated."""


class Unheard:
    """What was sent and is not acknowledged; while there is no gManager, what there would be to send."""

    def __init__(self) -> None:
        self._sent: deque[tuple[int, list[UnheardTokens]]] = deque()
        """What each message had, by its number on the present connection."""
        self._number = 0
        self._left: list[UnheardTokens] = []
        """Of connections that are over, and of the time since."""

    def add(self, outputs: Outputs, origins: Mapping[int, Origin], *, is_sent: bool) -> None:
        """A message is sent, or would be if there were a gManager."""
        kept: list[UnheardTokens] = []
        for output in outputs.outputs:
            request, before = origins[output.seq]
            kept.append(
                UnheardTokens(
                    request=request,
                    index=before + output.index,
                    token_ids=output.token_ids,
                    logprobs=output.logprobs,
                    finish_reason=output.finish_reason,
                )
            )
        if is_sent:
            self._number += 1
            self._sent.append((self._number, kept))
        else:
            self._left += kept

    def hear(self, outputs: int) -> None:
        """The gManager has so many of the messages of this connection."""
        while self._sent and self._sent[0][0] <= outputs:
            self._sent.popleft()

    def cut(self) -> None:
        """The connection is over: the next one's messages are counted anew."""
        self._left = self.report()
        self._sent.clear()
        self._number = 0

    def report(self) -> list[UnheardTokens]:
        """All that is kept, in order."""
        return [*self._left, *chain.from_iterable(kept for _, kept in self._sent)]

    def forget_left(self) -> None:
        """A gManager has what connections before the present one left."""
        self._left = []
