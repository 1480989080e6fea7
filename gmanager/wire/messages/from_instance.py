"""What instances say to the gManager."""

from typing import Literal

from gmanager.wire.messages.base import Message, Part
from gmanager.wire.messages.requests import PromptLogprobs, Role, TextAssets, TokenLogprob
from gmanager.wire.messages.stats import Counters


class InstanceSpec(Part):
    """What must be equal in all instances of a cell, and what each one has."""

    model: str
    fingerprint: str
    """SHA-256 over the model's config and weights' names, shapes and a sample of their values."""
    tokenizer: str
    """SHA-256 of the text assets."""
    dtype: str
    layers: str
    """How they run, fused or as they are: rounding differs."""
    block_size: int
    vocab_size: int
    max_context: int
    num_blocks: int
    """May differ between instances."""
    chunk_tokens: int
    decode_rows: int
    """Most sequences that it decodes at once."""
    reach: int
    """Tokens at which attending to them costs a row as much as the rest of the model."""
    device: str
    host: str
    """The same in instances that can map each other's GPU memory."""
    other_names: list[str] = []
    """That requests may call the model by. A cell has those of its first instance."""
    windows: list[int] = []
    """For each table of blocks behind the first, of layers that see but a window or a chunk: the most blocks that one sequence
    takes on an instance (`gmanager.wire.footprint`)."""
    tp: int = 1
    """Ranks between which its model and each block of its KV are split."""
    pp: int = 1
    """Stages that its layers are split into."""
    pp_layers: list[int] = []
    """Of each stage, if there are several."""
    elastic_tp: str = ""
    """Most rows of a step whose dense layers the cell's instances share, or "auto"; empty: they never do."""
    rotary: str = ""
    """What the service has chosen of the model's rotary frequencies, in words; empty: they are as the model has them."""
    kv_dtype: str = ""
    """How KV is stored; empty: as `dtype`."""

    @property
    def number_types(self) -> str:
        """Those by which its KV differs from that of the same weights elsewhere."""
        return f"{self.dtype}, KV {self.kv_dtype}" if self.kv_dtype else self.dtype


class Former(Part):
    """What an instance was to a gManager that is gone. It has gone on without one."""

    term: int
    """Of that gManager."""
    identity: int
    """Likewise: to another one's, what this instance has means nothing."""
    epoch: int
    id: int
    size: int
    """Members of the epoch."""


class Register(Message):
    """An instance's first message."""

    protocol: int
    cell: str
    cell_size: int
    run_id: str
    rank: int
    """RANK within its torchrun."""
    party_address: str
    """Where its party socket listens."""
    spec: InstanceSpec
    wanted_id: int | None = None
    """The number in the cell that it would have, if that is free."""
    former: Former | None = None
    """None: it comes as a new one."""
    role: Role = "mixed"


class Text(Message):
    assets: TextAssets


class StoreOpened(Message):
    epoch: int
    address: str


class Joined(Message):
    epoch: int
    shares_feeds: bool = False
    """Whether the epoch's instances can compute dense layers together, and so are to be one party (`--elastic-tp`)."""


class Leave(Message):
    """The instance ends; with `failed`, because something broke."""

    reason: str
    failed: bool


class LinkLost(Message):
    """The instance's connection to another has ended."""

    epoch: int
    rank: int
    """Of the other."""
    reason: str


MAX_STEP_SAMPLES = 16
"""Most in one Beat."""


class StepSample(Part, array_like=True):
    """A step that an instance has run, for the model of how long steps take."""

    lane: int
    """0: prefill, 1: decode."""
    rows: int
    """Its own, that ran through the model."""
    attended: int
    """Tokens of KV that rows read here, the sum over all rows, those of others among them."""
    sent: int
    """Rows that went to others, once for each receiver."""
    served: int
    """Rows that came from others."""
    us: int
    """In which the device ran it."""
    beside: bool
    """Whether the other lane ran meanwhile."""


class Beat(Message):
    """Sent every second, and at once when blocks were freed: deltas since the last Beat.

    Raises ValueError when built with too many samples.
    """

    epoch: int
    free_blocks: int
    """Those that are cached, and that nobody uses, included."""
    held_tokens: dict[int, int]
    """seq -> tokens of KV it now has here, for those that changed; 0: all its blocks are free again, or cached."""
    counters: Counters
    cached_blocks: int = 0
    """Of the free ones, those that hold KV for whoever may want it."""
    samples: list[StepSample] = []
    """Of the steps that have run since the last Beat, the newest of each lane."""
    host_blocks: int = 0
    """Copies of blocks in host memory."""
    disk_blocks: int = 0
    """And on disk."""

    def __post_init__(self) -> None:
        if len(self.samples) > MAX_STEP_SAMPLES:
            raise ValueError(f"a Beat has at most {MAX_STEP_SAMPLES} samples of steps, got {len(self.samples)}")


class Granted(Message):
    """`blocks` more blocks are this sequence's. Answer to Reserve and ReserveNext."""

    epoch: int
    seq: int
    blocks: int
    free_blocks: int


class NotGranted(Message):
    """Nothing was reserved: so many blocks aren't free. Answer to Reserve; not an error."""

    epoch: int
    seq: int
    free_blocks: int
    lacks_source: bool = False
    """Or what was to be shared isn't here (any more); a message Cached before this one says what is."""


class KeptShard(Part):
    """KV of a sequence that an instance has kept over the end of an epoch, or that can be shared: for each run, the ranges of
    its positions."""

    seq: int
    runs: list[list[tuple[int, int]]]
    request: int = 0
    """The number of the request that runs as this sequence, if its home is (or was last) here; 0: it isn't known here."""
    shared_end: int = 0
    """It can't go on from a position before this one: until there it shares blocks with others."""
    below: list[int] = []
    """Of each run so many of the last tokens lie below the pool, in host memory or on disk: a Fetch brings them up. None: all
    are in the pool."""
    since: int = 0
    """Rows before this one can't follow it: in layers that see but a window, some of what they see is gone."""
    branches: list[tuple[int, int]] = []
    """But for rows in these ranges, the last ones included."""


class Cached(Message):
    """Sent when something else can be shared of sequences here than before: a prompt is written, a sequence is over, or what it
    left had to make room."""

    epoch: int
    shards: list[KeptShard]
    """Whole blocks; no runs: nothing can be shared of it any more."""


class Fetched(Message):
    """Answer to a Fetch into the pool, behind a Cached that says what is there now."""

    epoch: int
    fetch: int
    blocks: int
    """That were read; what was in the pool for others doesn't count."""
    us: int
    """In which they were read."""


class Unheard(Part):
    """Tokens that were told to nobody, or to a gManager that is gone."""

    request: int
    """Its number."""
    index: int
    """Position of the first token among all that were generated for the request."""
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Kept(Message):
    """Answer to Suspend: all KV that is certain, which was written by steps that are known to have run."""

    epoch: int
    free_blocks: int
    shards: list[KeptShard]
    cached: list[KeptShard] = []
    """Of sequences that are over."""
    unheard: list[Unheard] = []
    """In order, if the instance went on without a gManager."""


class EpochBroken(Message):
    """The instance can't step any more, through no fault of its own that it knows of; it waits for a Suspend."""

    epoch: int
    reason: str


class Share(Part):
    """Tokens of a sequence's KV on one instance: to be born there (Admit), or lying there (SequenceOutput)."""

    rank: int
    tokens: int


class SequenceOutput(Part):
    seq: int
    index: int
    """Position of the first token among the tokens generated in this admission."""
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    held: list[Share] | None = None
    """With a finish_reason: where the KV lies at the end."""


class Outputs(Message):
    """What the homes on this instance generated in one step."""

    epoch: int
    outputs: list[SequenceOutput]


class Scored(Message):
    """Log-probabilities of prompt tokens whose rows ran on this instance, if they were asked for."""

    epoch: int
    seq: int
    logprobs: PromptLogprobs


class NeedBlock(Message):
    """The home can't grant a sequence's next block: it waits for a MoveSequence, a Cancel, or a block that frees here."""

    epoch: int
    seq: int


class HomeMoved(Message):
    """Sent by the new home, once it is that."""

    epoch: int
    seq: int
    home: int


class Released(Message):
    """Sent by the home: the step that released the sequence has completed; no later step of its party names it."""

    epoch: int
    seq: int
    generated: int
    """Tokens that were output in this admission, by all its homes."""


class RunOffered(Message):
    """Answer to OfferRun: a run of a sequence that no step writes to any more."""

    epoch: int
    move: int
    ranges: list[tuple[int, int]]
    """Its positions; none: nothing of the sequence is here."""
    firsts: list[int] = []
    """For each table of blocks behind the first: the first block of the run that is still there."""


class Copied(Message):
    """Sent by the target of a CopyRun: the copy is complete and its checksum is right, or why not."""

    epoch: int
    move: int
    error: str | None = None
    us: int = 0
    """How long it took, waiting for the other end included."""


class RunMoved(Message):
    """Sent by the home: the step in which a run changed hands has run."""

    epoch: int
    seq: int
    move: int


class AskDrain(Message):
    """An instance that is to end asks to be emptied first. Answered by Drained or NotDrained."""


FromInstance = (
    Register
    | Text
    | StoreOpened
    | Joined
    | Leave
    | LinkLost
    | EpochBroken
    | Kept
    | Beat
    | Cached
    | Fetched
    | Granted
    | NotGranted
    | Outputs
    | Scored
    | NeedBlock
    | HomeMoved
    | Released
    | RunOffered
    | Copied
    | RunMoved
    | AskDrain
)
