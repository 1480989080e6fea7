"""What the gManager says to instances."""

from gmanager.wire.messages.base import Message, Part
from gmanager.wire.messages.client import Pong, Refused
from gmanager.wire.messages.from_instance import Share


class Registered(Message):
    lease_s: float
    send_text: bool
    """The cell has no text assets yet: send Text."""
    term: int = 0
    """Of the gManager: each that serves from one journal has a higher one than those before it. 0: it has no journal."""
    identity: int = 0
    """Of its journal, or of the gManager that has none: what requests are known by means something under that alone."""


class OpenStore(Message):
    """To the first-ranked instance of a new epoch: open a TCPStore and answer StoreOpened."""

    epoch: int


class MemberAddress(Part):
    """Where the others of an epoch find a member of it."""

    rank: int
    """Rank in the cell's epoch: 0 .. size-1."""
    id: int
    """In the cell, as long as it is a member."""
    party_address: str
    host: str
    """As its InstanceSpec says."""


class JoinEpoch(Message):
    epoch: int
    id: int
    """The instance's own, as long as it is a member of the cell."""
    rank: int
    store_address: str
    members: list[MemberAddress]
    keep: list[int] = []
    """Sequences whose KV from the epoch before is still wanted. Of all others the instance frees what it holds."""
    calibrate: bool = False
    """Nothing is known of how long steps take here, and nobody waits yet: measure some before Joined, for about a second."""
    caches: bool = False
    """Whether to keep what sequences leave, for others that begin with the same tokens."""


class Suspend(Message):
    """The epoch is over and another will follow: stop stepping, keep what is certain of the KV, answer Kept, and wait for a
    JoinEpoch."""

    epoch: int
    reason: str


class Expelled(Message):
    """The cell goes on without this instance, or never knew it: free all KV, and register anew."""

    reason: str


class EndEpoch(Message):
    """The cell is over: end."""

    epoch: int
    reason: str


class Reserve(Message):
    """Set blocks aside for a sequence, all or nothing. Answered by Granted or NotGranted."""

    epoch: int
    seq: int
    blocks: int
    """Besides those that it shares."""
    source: int = 0
    """A sequence, live or over, with blocks of which it is to begin; 0: there is none."""
    shared: list[list[tuple[int, int]]] = []
    """Positions of whole blocks, the first of each of these runs of the source."""
    row: int = 0
    """The first that the sequence computes, where layers have windows; 0: the one behind these."""


class ReserveNext(Message):
    """Make sure that there is room for one more token of a sequence, with a block if there is none. Answered as Reserve."""

    epoch: int
    seq: int


class Fetch(Message):
    """Bring up from below what a cached sequence has there before position `end`: into the pool, as far as there is room, and
    answer Fetched; or only from disk to host memory, for one that still waits for room, without an answer."""

    epoch: int
    fetch: int
    source: int
    end: int
    into_pool: bool = True


class StopFetch(Message):
    """Nobody waits any more for what a Fetch brings into the pool: read no further. It is answered all the same."""

    epoch: int
    fetch: int


class Discard(Message):
    """Free what was kept or cached of a sequence: it isn't wanted (any more)."""

    epoch: int
    seq: int


class KeptPart(Part):
    """What is left on an instance of a sequence that is admitted again, or lies there of another that a new one shares."""

    rank: int
    runs: list[list[tuple[int, int]]]
    """As in KeptShard. None of the admitted tokens' last: its row is computed anew."""


class OfferRun(Message):
    """Say what run of a sequence could be moved away. To an instance that is not its home. Answered by RunOffered."""

    epoch: int
    move: int
    seq: int


class CopyRun(Message):
    """To both: copy the run at these positions from `source` to the blocks that `target` has reserved as `move`. Answered by
    `target` with Copied."""

    epoch: int
    move: int
    seq: int
    source: int
    target: int
    ranges: list[tuple[int, int]]
    firsts: list[int] = []
    """As RunOffered has them; blocks are copied table by table."""


class FlipRun(Message):
    """To the home: with the sequence's next step the run of `source` from position `start` is `target`'s, which has its copy.
    Answered by RunMoved, or by Released if the sequence ends first."""

    epoch: int
    move: int
    seq: int
    source: int
    target: int
    start: int


class Drained(Message):
    """The instance is no member of the cell any more: end."""

    reason: str


class NotDrained(Message):
    """Answer to AskDrain: it will not be emptied; it may end all the same."""

    reason: str


class Drop(Message):
    """Give back what was reserved for a sequence, and what it shares, if it has not begun. Nothing happens if it has."""

    epoch: int
    seq: int


class SequenceParams(Part):
    max_tokens: int
    """Most tokens to generate in this admission, at least 1: a sequence ends with a token, for whose KV it needs no room."""
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop_token_ids: list[int]
    """EOS among them, unless ignored."""
    logprobs: int | None
    prompt_logprobs: int | None = None
    """In this admission."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    bad_words: list[list[int]] = []
    """Their tokens: the last of one is never chosen after the others of it were generated."""
    grammar: str | None = None
    """That the text must follow, in llguidance's form."""
    min_tokens: int = 0
    """Of this admission: before so many none of `stop_token_ids` is chosen."""
    num_generated: int = 0
    """How many of the last admitted tokens earlier admissions generated."""

    @property
    def needs_history(self) -> bool:
        """Whether what is chosen depends on which tokens came before."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0, 0, 1) or bool(self.bad_words) or self.grammar is not None


class Admit(Message):
    """Start a sequence whose blocks are reserved. To all participants; the home is the first share's instance."""

    epoch: int
    seq: int
    arrival: int
    """Age: lower is older. A re-admitted request keeps its number."""
    token_ids: bytes
    shares: list[Share]
    """Of what is to be computed: all tokens but those of which there is KV."""
    params: SequenceParams
    kept: list[KeptPart] = []
    branch: int = 0
    """Others began with the tokens before this position, and what they left can't be begun with there, for want of what is seen
    in windows: this sequence is to keep it. 0: there is no such."""


class Regroup(Message):
    """New parties. Each lists ranks in ascending order; an instance finds its own. Numbers only grow."""

    epoch: int
    number: int
    parties: list[list[int]]


class MoveSequence(Message):
    """To the home: hand the sequence to `to`, whose next block is reserved."""

    epoch: int
    seq: int
    to: int


class Cancel(Message):
    """To the home: release the sequence (its client left, or it is preempted). Answered by Released.

    One that has handed the sequence on since passes it on with its next notice.
    """

    epoch: int
    seq: int


ToInstance = (
    Registered
    | Refused
    | OpenStore
    | JoinEpoch
    | Suspend
    | Expelled
    | EndEpoch
    | Discard
    | Fetch
    | StopFetch
    | Reserve
    | ReserveNext
    | Drop
    | Admit
    | Regroup
    | MoveSequence
    | OfferRun
    | CopyRun
    | FlipRun
    | Cancel
    | Drained
    | NotDrained
    | Pong
)
