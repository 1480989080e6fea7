"""Outputs that the gManager has not said to have: they are kept for the one that may come after it."""

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import chain

import msgspec

from gmanager.wire.messages import Outputs
from gmanager.wire.messages import Unheard as UnheardTokens

Origin = tuple[int, int]
"""Of a sequence: the number of its request, and how many tokens earlier admissions had generated."""


MOST_ENTRIES = 2**19
"""Of one report, as the codec counts them: half of what a message may have. So many tokens take 32 MiB at most."""
MOST_TOGETHER = 2**14
"""Tokens of one piece: a list on the wire has 2**16 entries at most."""
ENTRIES_OF_PIECE, ENTRIES_OF_LOGPROB = 16, 12
"""At most, keys and values."""


def _follows(piece: UnheardTokens, tokens: UnheardTokens) -> bool:
    """Whether they can be one piece."""
    together = len(piece.token_ids) + len(tokens.token_ids)
    return piece.index + len(piece.token_ids) == tokens.index and together <= MOST_TOGETHER


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
        self._left = list(self._all())
        self._sent.clear()
        self._number = 0

    def report(self) -> list[UnheardTokens]:
        """What is kept, in order, in pieces of what follows each other: as much as one message can hold. The rest is generated
        again."""
        pieces: list[UnheardTokens] = []
        places: dict[int, int] = {}
        room = MOST_ENTRIES
        for tokens in self._all():
            room -= sum(ENTRIES_OF_LOGPROB + 2 * len(each.top_ids) for each in tokens.logprobs or ()) + len(tokens.token_ids)
            place = places.get(tokens.request)
            piece = None if place is None else pieces[place]
            if piece is None or not _follows(piece, tokens):
                room -= ENTRIES_OF_PIECE
                piece = None
            if room < 0:
                break
            if piece is None:
                logprobs = None if tokens.logprobs is None else list(tokens.logprobs)
                piece = msgspec.structs.replace(tokens, token_ids=list(tokens.token_ids), logprobs=logprobs)
                places[tokens.request] = len(pieces)
                pieces.append(piece)
            else:
                piece.token_ids.extend(tokens.token_ids)
                if piece.logprobs is not None:
                    piece.logprobs.extend(tokens.logprobs or ())
                if tokens.finish_reason is not None:
                    pieces[places[tokens.request]] = msgspec.structs.replace(piece, finish_reason=tokens.finish_reason)
        return pieces

    def _all(self) -> Iterator[UnheardTokens]:
        return chain(self._left, chain.from_iterable(kept for _, kept in self._sent))

    def forget_left(self) -> None:
        """A gManager has what connections before the present one left."""
        self._left = []
