"""Every exception that this package raises on purpose.

DistattnError
├── WireError                 between two processes
│   ├── BadMessage            bytes that are no message of the expected kind
│   ├── FrameTooLarge         a message that the other side would not take
│   ├── AddressError          an address that can't be bound or dialled
│   └── PeerGone              the other end left, or takes no more messages
├── RequestRefused            the request never started: wrong, never to be served, or not now
├── RequestFailed             the request was accepted and then failed
├── CallFailed                an abort, a home move or another call could not be done
├── ServiceUnreachable        nobody answers at the address, or no longer
├── ProtocolRefused           the gManager doesn't serve this client
├── JournalError              a journal can't be used: locked, of a newer schema, damaged, no journal at all
│   └── Fenced                another gManager has taken it over
└── TextError                 text can't be turned into tokens
    ├── StructureError        nor can what a text must be, into a grammar
    └── TextUnavailable       not now, and it isn't the text's fault
"""

from gmanager.wire.messages import RefusalReason

NO_TOKENIZER = "this model has no tokenizer: give token ids"
"""Why no text is taken by it."""


class DistattnError(Exception):
    """Root of all errors of this project."""


class WireError(DistattnError):
    """Something went wrong between two processes."""


class BadMessage(WireError):
    """Bytes that are no message of the expected kind. `reason` is short and never quotes the payload.

    Channels hand it out as a value (a bad peer is news, not the reader's failure); the codec raises it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class FrameTooLarge(WireError):
    """A message takes more bytes than a frame may have; it was not sent."""

    def __init__(self, kind: str, size: int, limit: int) -> None:
        super().__init__(f"{kind} takes {size:,} bytes on the wire; a message may take {limit:,}")
        self.size = size
        self.limit = limit


class AddressError(WireError):
    """An address can't be bound or dialled: in use, malformed, or not of this machine."""


class PeerGone(WireError):
    """The other end closed the connection, or has stopped to take messages."""


class RequestRefused(DistattnError):
    """The request never started: it was wrong, can never be served, or not now. `reason` says which; `retry_after_s`, if it is
    known, in how many seconds one like it is expected to be taken."""

    def __init__(self, text: str, reason: RefusalReason = "invalid", retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.reason = reason
        self.retry_after_s = retry_after_s


class RequestFailed(DistattnError):
    """The request was accepted and then failed; the tokens already delivered stand."""


class CallFailed(DistattnError):
    """A call other than a request (abort, move_home, stats) could not be done."""


class ServiceUnreachable(DistattnError):
    """Nobody answers at the address, or the gManager there has fallen silent."""


class ProtocolRefused(DistattnError):
    """The gManager doesn't serve this client: it speaks another protocol version, or takes the connection for over."""


class JournalError(DistattnError):
    """A journal can't be used: another process has it, its schema is newer, it is damaged, or no journal at all."""


class Fenced(JournalError):
    """Another gManager has taken the journal over: this one must say and write nothing more."""


class TextError(DistattnError):
    """Text can't be turned into tokens: no chat template, one that refuses the messages, or one over its limits."""


class StructureError(TextError):
    """What a text must be makes no sense. `reason`: without where. `place`: keys and indices that lead to what is wrong in a
    JSON Schema."""

    def __init__(self, where: str, reason: str, *place: str | int) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason
        self.place = place


class TextUnavailable(TextError):
    """What turns text into tokens has died or is ending: the same text may be taken later."""
