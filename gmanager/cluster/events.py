"""What the cluster hears (past facts) and what it wants done (commands). No I/O here.

A request is named by its `number` between cluster and shell: a client may use an id again once its request has ended.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gmanager.cluster.chain import Chain
from gmanager.cluster.performance import Costs
from gmanager.config import Spread
from gmanager.wire.messages import FinishReason, Message, RefusalReason, Submit, TextAssets, TokenLogprob
from gmanager.wire.peer import PeerId

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerSaid:
    """A message came. `seed`: drawn by the shell, for a Submit without one."""

    peer: PeerId
    message: Message
    now: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PeerGarbled:
    """Something came that is no message."""

    peer: PeerId
    reason: str
    now: float


@dataclass(frozen=True, slots=True)
class PeerWasLost:
    """A peer can't be sent to any more."""

    peer: PeerId
    reason: str
    now: float


@dataclass(frozen=True, slots=True)
class ClientFull:
    """More waits for a client than it should."""

    peer: PeerId
    now: float


@dataclass(frozen=True, slots=True)
class ClientEmpty:
    """Nothing waits for that client any more."""

    peer: PeerId
    now: float
    lacks: Mapping[str, int] = field(default_factory=dict)
    """Requests of which something was not even queued for it, and from which token on."""


@dataclass(frozen=True, slots=True)
class TextLoaded:
    """A cell's text assets are ready to use, or can't be used."""

    cell: int
    now: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt was tokenised, or can't be."""

    request: int
    now: float
    token_ids: bytes = b""
    bad_words: Sequence[list[int]] = ()
    grammar: str | None = None
    highest: int = 0
    """Of its token ids."""
    error: str | None = None
    refusal: RefusalReason = "invalid"
    """What kind of error."""
    chain: Chain | None = None
    """Of its token ids, if it was asked for."""


@dataclass(frozen=True, slots=True)
class StopFound:
    """A stop string was found in a request's text: only its first `generated` tokens count."""

    request: int
    generated: int
    now: float


@dataclass(frozen=True, slots=True)
class JournalChanged:
    """The journal can't be written, for this reason; None: it can be (again), and nothing is missing in it."""

    failure: str | None
    now: float


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""

    now: float


@dataclass(frozen=True, slots=True)
class Stopped:
    """The gManager ends."""

    reason: str
    now: float


# --- what a gManager that follows this one has to know ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A request was taken in."""

    number: int
    submit: Submit
    seed: int
    spread: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """The next tokens of a request; `index`: position of the first among all that were generated for it."""

    number: int
    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] | None = None
    """One for each, if they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A request's one final answer. Said again, the last word counts: a stop string is found in the text, which comes later."""

    number: int
    finish_reason: FinishReason
    generated: int
    """How many tokens count."""
    error: str | None = None
    refusal: RefusalReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What steps and copies of a kind of cell take; the last word counts."""

    kind: str
    """`cells.kind_of`."""
    costs: Costs


Entry = Accepted | Encoded | Generated | Finished | Measured
"""Of the journal. Of a request: Accepted, Encoded once its tokens are known, Generated in order, Finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A request that a gManager before this one took in, as its journal has it."""

    number: int
    submit: Submit
    seed: int
    spread: Spread
    encoded: Encoded | None
    """What its text and its grammar mean to the model; None: that is not known yet."""
    token_ids: Sequence[int]
    """Those that its client may have: all that were generated and written."""
    logprobs: Sequence[TokenLogprob] | None = None
    """Of each of these, if its client asked for them."""
    finish_reason: FinishReason | None = None
    """It has ended so; kept for clients that have yet to hear of it."""
    error: str | None = None
    refusal: RefusalReason | None = None


Event = (
    PeerSaid
    | PeerGarbled
    | PeerWasLost
    | ClientFull
    | ClientEmpty
    | TextLoaded
    | Encoded
    | StopFound
    | JournalChanged
    | Ticked
    | Stopped
)

# --- actions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Write:
    """Put it in the journal, all of one event together: clients are told of it once it is there."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Send:
    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class SendAll:
    """The same to several instances; packed once, it may be a prompt of millions of tokens."""

    peers: tuple[PeerId, ...]
    message: Message


@dataclass(frozen=True, slots=True)
class Forget:
    """Nothing more is to be sent to this peer."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class LoadText:
    """Make a tokenizer for the cell of this number. Answered by TextLoaded."""

    cell: int
    assets: TextAssets


@dataclass(frozen=True, slots=True)
class DropText:
    """The cell of this number is over."""

    cell: int


@dataclass(frozen=True, slots=True)
class Encode:
    """Tokenise a request's text or messages and its `bad_words`, compile its grammar, look for its highest token id, hash its
    blocks: all that takes long. Answered by Encoded."""

    cell: int
    request: int
    submit: Submit
    chain_seed: bytes | None = None
    """That its chain begins with; None: none is wanted."""
    block_size: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Deliver:
    """New tokens of a request for its client: the shell adds the text. Exactly one, the last, has a `finish_reason`."""

    peer: PeerId | None
    """None: nobody hears it. It is turned into text all the same."""
    request: int
    request_id: str
    cell: int
    """Number of the one that generates; 0: none does."""
    stop_strings: tuple[str, ...]
    include_stop: bool = False
    """Whether a stop string is part of the text."""
    min_tokens: int = 0
    """In so many first tokens none is looked for."""
    skip_special_tokens: bool = True
    shown_special: frozenset[int] = frozenset()
    """These are not left out."""
    before: "array[int] | None" = None
    """Tokens that the client has: its text begins anew behind theirs. None: it goes on."""
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    refusal: RefusalReason | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """One line of the log. No field holds what a client wrote, but its request's id."""

    level: int
    event: str
    fields: Mapping[str, object]


Action = Write | Send | SendAll | Forget | LoadText | DropText | Encode | Deliver | Log

Emit = Callable[[Action], None]
