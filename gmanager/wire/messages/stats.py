"""What a gManager tells of its cells, instances and requests."""

from itertools import pairwise

from gmanager.wire.messages.base import Part
from gmanager.wire.messages.requests import CellState, FinishReason, RefusalReason, RequestState, Role


class Counters(Part):
    """What one instance has done since it started, or a sum of such."""

    steps: int = 0
    rows: int = 0
    rows_dispatched: int = 0
    """Query rows sent to other instances, counted once a step and receiver, not in each layer."""
    split_steps: int = 0
    """Decode steps whose dense layers were split between instances."""
    tokens_prefilled: int = 0
    tokens_generated: int = 0
    home_moves: int = 0
    preemptions: int = 0
    moves_failed: int = 0
    """Runs that were not what was sent, or never came: they stay where they are, and are copied anew."""
    blocks_copied: int = 0
    blocks_evicted: int = 0
    """Cached ones that had to make room."""
    tier_bytes_down: int = 0
    """Of cached KV, copied to host memory or disk."""
    tier_bytes_up: int = 0
    """And read again into the pool."""
    tier_tokens: int = 0
    """Whose KV was read again."""
    blocks_corrupt: int = 0
    """Cached ones that were not what was written, in the pool or below: they are computed again."""
    slots_failed: int = 0
    """Of host memory and disk, that could not be written and are used no more."""
    copies_failed: int = 0
    """Blocks that were not copied there or back, as the device had no memory for that."""
    query_bytes: int = 0
    partial_bytes: int = 0
    kv_bytes: int = 0
    step_us: int = 0
    """Time in which the device ran steps, the sum of both lanes'; integers of microseconds, because counters are summed and
    clamped as such."""
    decode_us: int = 0
    """Of it: the decode lane's."""
    exchange_us: int = 0
    """Of it: waiting for rows of other instances. Measured on the CPU only."""
    attention_us: int = 0
    """Of it: attention, less those waits. Measured on the CPU only: a captured graph can't be divided by the host."""
    notice_us: int = 0
    """Waiting for the notices of the party's others, mostly while the device runs the step before: no part of `step_us`."""
    dropped_messages: int = 0

    @staticmethod
    def sum(*counters: "Counters") -> "Counters":
        """Of each. No sum leaves what fits the wire, whatever an instance says."""
        sums = {name: sum(getattr(c, name) for c in counters) for name in Counters.__struct_fields__}
        return Counters(**{name: max(0, min(total, 2**63 - 1)) for name, total in sums.items()})


class InstanceStats(Part):
    cell: str
    rank: int
    total_tokens: int
    used_tokens: int
    """Tokens of the blocks in use, lent ones included: used + free = total."""
    free_tokens: int
    """Cached ones that nobody uses included."""
    lent_tokens: int
    """KV it holds of sequences whose home is another instance."""
    borrowed_tokens: int
    """KV that others hold of sequences whose home it is."""
    counters: Counters
    is_draining: bool = False
    """It gets nothing new, and leaves when what it holds is elsewhere."""
    slowness: float = 1.0
    """How many times longer its steps take than its cell's `performance` says."""
    cached_tokens: int = 0
    """Of the free ones, those whose KV is kept for requests that begin with them."""
    host_tokens: int = 0
    """Whose KV has a copy in host memory."""
    disk_tokens: int = 0
    """And on disk."""
    role: Role = "mixed"
    """What it was started for."""


class RequestStats(Part):
    state: RequestState
    cell: str | None
    """That serves it, once one does."""
    home: int | None
    kv_tokens: dict[int, int]
    """Tokens of KV per instance rank; of a finished request, when it ended."""
    prompt_tokens: int
    generated_tokens: int
    home_moves: int
    preemptions: int
    finish_reason: FinishReason | None = None


class LanePerformance(Part):
    """How long steps of a lane take, by what has been measured: the sum of these, each for what the step has of it."""

    step_us: float
    row_us: float
    """Of a row that runs through the model."""
    attended_ns: float
    """Of a token of KV that a row attends to."""
    moved_us: float
    """Of a row that is sent to another instance, or comes of one."""
    exchange_us: float
    """Of a step in which rows are."""
    beside: float
    """How many times longer all of it takes while the other lane runs, too."""
    samples: int
    """Steps that were heard of."""
    error: float | None
    """By which part of a step's time the newest predictions were off, each made before the step: the median. None: there is
    none yet."""


class CellPerformance(Part):
    """How long steps and copies of a cell take."""

    prefill: LanePerformance
    decode: LanePerformance
    copied_us: float
    """Of a token whose KV is copied from one instance to another."""


class CellStats(Part):
    name: str
    epoch: int
    state: CellState
    size: int
    model: str
    block_size: int
    max_context: int
    """Most tokens, prompt and generated, that the model takes."""
    total_tokens: int
    other_names: list[str] = []
    """By which the model may be asked for, too."""
    rotary: str = ""
    """What the service has chosen of its rotary frequencies, in words; empty: they are as the model has them."""
    kv_dtype: str = ""
    """How KV is stored; empty: in the model's dtype."""
    performance: CellPerformance | None = None


class Histogram(Part):
    """How many values fell into each range `(bounds[i-1], bounds[i]]`; the last range has no upper bound.

    Raises ValueError when built of parts that don't belong together.
    """

    bounds: list[float]
    counts: list[int]
    total: float
    """Sum of the values."""

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.bounds) + 1:
            raise ValueError(f"{len(self.bounds)} bounds have {len(self.bounds) + 1} counts, got {len(self.counts)}")
        if any(low >= high for low, high in pairwise(self.bounds)):
            raise ValueError(f"bounds must ascend, got {self.bounds}")
        if min(self.counts) < 0:
            raise ValueError(f"counts must not be negative, got {min(self.counts)}")

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)


class Observations(Part):
    """What the gManager has measured of requests since it started; times in seconds. A preempted request counts once."""

    queue_s: Histogram
    """From the client's Submit to the first admission."""
    ttft_s: Histogram
    """From the client's Submit to the first token."""
    tpot_s: Histogram
    """Of requests with two tokens or more, once ended: from the first to the last, by the number of tokens between."""
    e2e_s: Histogram
    """From the client's Submit to the final answer, whatever it was; refused requests are left out."""
    prompt_tokens: int
    """Of admitted requests."""
    generated_tokens: int
    """That clients were given."""
    finished: dict[FinishReason, int]
    refused: dict[RefusalReason, int]
    met_slo: int = 0
    """Requests with objectives that got all their tokens and met what they had: goodput, once divided by time."""
    missed_ttft: int = 0
    """Those that got all their tokens, and the first one too late."""
    missed_tpot: int = 0
    """Those that got them too slowly; one may have missed both."""
    prefix_queries: int = 0
    """Tokens of admitted prompts that could have been cached."""
    prefix_hits: int = 0
    """Of these, those that were, and so were not computed."""


class Stats(Part):
    epoch: int
    """The newest epoch of any cell."""
    cells: list[CellStats]
    instances: list[InstanceStats]
    requests: dict[str, RequestStats]
    """Live requests and the last finished ones."""
    counters: Counters
    """Sum over the cells' instances and the gManager's own."""
    observed: Observations
