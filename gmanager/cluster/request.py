"""One request, and what is said of its tokens: what `gmanager.cluster.requests` keeps of each."""

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from gmanager.cluster.chain import Chain
from gmanager.cluster.lifecycle import RUNNING, WAITING, Change, State
from gmanager.cluster.objectives import NO_OBJECTIVES, Objectives
from gmanager.config import Spread
from gmanager.wire.messages import (
    FinishReason,
    PromptLogprobs,
    Refusal,
    RefusalReason,
    RequestState,
    RequestStats,
    SamplingParams,
    SequenceParams,
    Submit,
    TokenLogprob,
    pack_tokens,
)
from gmanager.wire.peer import PeerId

Runs = Sequence[Sequence[tuple[int, int]]]
"""What is kept of a sequence on one instance: for each run the ranges of its positions."""

PRIORITY_S = 60.0
"""What a level of priority is worth, in seconds of waiting. So none starves: who has waited for as many minutes as it stands
levels behind those that come goes before them."""

LEAST_LEFT = 256
"""Tokens that are expected of a request of which nobody has said how many it generates, and that has just begun."""

STORY = 32
"""Changes of state that are remembered of a request, for the error that one too many would be."""


@dataclass(slots=True)
class MoveCall:
    """A client waits for a home move."""

    peer: PeerId
    call: int
    target: int


@dataclass(slots=True, eq=False)
class Request:
    """One request. `tokens` are all that were generated, over all its admissions."""

    number: int
    """Age: lower is older. Also its name between cluster and shell."""
    id: str
    params: SamplingParams
    submit: Submit | None
    """What its tokens are to be made of, until they are known."""
    client: PeerId | None
    """None: it is detached, since `detached_at`."""
    seed: int
    spread: Spread
    arrived_at: float
    waiting_since: float
    progress_at: float = 0.0
    """When something was last heard of it that was not known: a token, a change of state or of what is held of it."""
    prompt: bytes = b""
    """Packed token ids; empty until they are known."""
    priority: int = 0
    """Lower goes first."""
    objectives: Objectives = NO_OBJECTIVES
    retry_after_s: float | None = None
    """It is refused: when one like it is expected to be taken."""
    highest: int = 0
    """Of its token ids; 0 until they have been looked through."""
    cache_salt: str | None = None
    """It shares KV with those that have the same."""
    chain: Chain | None = None
    """Names of what its tokens begin with; those generated are added when they are asked for. None: it shares nothing."""
    cached_tokens: int = 0
    """Of its prompt, those whose KV was there when it was admitted for the first time."""
    num_reads: int = 0
    """Times that KV which it begins with was read for it from below the pools, since it waits."""
    was_lifted: bool = False
    """Instances were told that it waits for what they have on disk."""
    bad_words: list[list[int]] = field(default_factory=list)
    """Their tokens."""
    grammar: str | None = None
    """Compiled."""
    max_tokens: int = 0
    """Most tokens to generate, once prompt and cell are known; 0 if only the prompt is wanted."""
    cell_number: int = 0
    """Of the cell that serves it; 0 while there is none."""
    cell: str | None = None
    """The cell's name."""
    seq: int = 0
    """Its present admission, while it runs."""
    kept: dict[int, Runs] = field(default_factory=dict)
    """rank -> what is left there of its last admission's KV, while it waits after a change of membership."""
    state: State = "waiting"
    story: deque[tuple[float, Change, State]] = field(default_factory=lambda: deque(maxlen=STORY))
    """When it last changed, how, and to what."""
    is_scored: bool = False
    """Its client has the log-probabilities of its prompt, if it asked for them."""
    tokens: "array[int]" = field(default_factory=lambda: array("I"))
    logprobs: list[TokenLogprob] | None = None
    """Of each of `tokens`, if its client asked for them."""
    scores: list[PromptLogprobs] = field(default_factory=list)
    """Of its prompt, likewise."""
    told: int = 0
    """So many tokens have been turned into text."""
    has_text: bool = True
    """The shell has that text, or there is none; False: it is to begin anew behind the tokens that were told."""
    sent: int = 0
    """The next one that its client is to have."""
    is_followed: bool = True
    """Its client has all that was told."""
    detached_at: float | None = None
    model: str | None = None
    """As it was asked for."""
    content: int = 0
    """Of its Submit (`content_of`): another one with the same id is the same request."""
    home: int | None = None
    held: dict[int, int] = field(default_factory=dict)
    """Tokens of KV per rank, as last heard."""
    home_moves: int = 0
    preemptions: int = 0
    gave_way_at: int | None = None
    """Id of the instance at which it was at home when it was preempted, until it is admitted again."""
    is_restored: bool = False
    """A gManager before this one took it in: it is not refused because its cell is smaller now."""
    was_interrupted: bool = False
    """It ran when the epoch ended, and the next has yet to begin."""
    taken_part: frozenset[int] = frozenset()
    """Ids of those that computed it or held KV of it when it was interrupted."""
    breaks: int = 0
    """Epochs that broke while it ran, or with which one of those was lost, and no token of it come: it may be what breaks
    them."""
    cell_blocks: list[int] = field(default_factory=list)
    """Blocks of each instance of its cell when it was taken in there: it is not refused because fewer are left."""
    move_call: MoveCall | None = None
    admitted_at: float | None = None
    """For the first time."""
    first_token_at: float | None = None
    last_token_at: float | None = None
    finish_reason: FinishReason | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    @property
    def precedence(self) -> tuple[float, int]:
        """Its place in a queue: as if it had come `PRIORITY_S` later for each level, ties by age. It never changes, so no queue
        is sorted again; of equal priority it is age."""
        return self.arrived_at + PRIORITY_S * self.priority, self.number

    @property
    def is_waiting(self) -> bool:
        """Whether it has no KV yet, or no longer."""
        return self.state in WAITING

    @property
    def is_running(self) -> bool:
        """Whether it is a sequence of its cell, if only one that is being released."""
        return self.state in RUNNING

    @property
    def tpot_s(self) -> float | None:
        """Mean time between its tokens so far; None: there are fewer than two."""
        if self.first_token_at is None or self.last_token_at is None or len(self.tokens) < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (len(self.tokens) - 1)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated."""
        return self.prompt_tokens + len(self.tokens)

    @property
    def missing_tokens(self) -> int:
        """Those whose rows its next admission has to compute."""
        return self.num_tokens - sum(map(count_tokens, self.kept.values()))

    @property
    def left(self) -> int:
        """Tokens that it is expected to generate still, at least one: as many as it may, if its client said how many; else no
        more than it has, for it may be told to go on as long as there is room."""
        generated = len(self.tokens)
        most = self.max_tokens - generated
        return max(1, most if self.params.max_tokens is not None else min(most, max(LEAST_LEFT, generated)))

    @property
    def lacks_scores(self) -> bool:
        """Whether its whole prompt must be computed (again), for the log-probabilities of its tokens."""
        return self.params.prompt_logprobs is not None and not self.is_scored

    @property
    def num_bytes(self) -> int:
        """What it takes while it waits."""
        return len(self.prompt) + 4 * len(self.tokens) + (0 if self.submit is None else text_bytes(self.submit))

    @property
    def is_live(self) -> bool:
        return self.finish_reason is None

    def wanted_of(
        self, token_ids: list[int], logprobs: list[TokenLogprob] | None, reason: FinishReason | None
    ) -> tuple[list[int], list[TokenLogprob] | None, FinishReason | None]:
        """What its client wants of what instances generated for it."""
        if not self.max_tokens:  # only the prompt was wanted: the one token that ends a sequence is nobody's
            return [], None, reason and "length"
        return token_ids, None if self.params.logprobs is None else logprobs, reason

    def packed(self) -> bytes:
        """All its tokens so far: the prompt of its next admission."""
        return self.prompt + pack_tokens(self.tokens)

    def sequence_params(self, eos_token_ids: Sequence[int]) -> SequenceParams:
        """What instances are told of it, with its next admission. `eos_token_ids`: of its cell."""
        params = self.params
        eos = () if params.ignore_eos else eos_token_ids
        return SequenceParams(
            max_tokens=max(1, self.max_tokens - len(self.tokens)),
            temperature=params.temperature,
            top_k=max(0, params.top_k),
            top_p=params.top_p,
            seed=self.seed,
            stop_token_ids=sorted({*(params.stop_token_ids or ()), *eos}),
            logprobs=params.logprobs,
            prompt_logprobs=None if self.is_scored else params.prompt_logprobs,
            min_p=params.min_p,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            logit_bias=params.logit_bias or {},
            bad_words=self.bad_words,
            grammar=self.grammar,
            min_tokens=max(0, params.min_tokens - len(self.tokens)),
            num_generated=len(self.tokens),
        )

    def stats(self) -> RequestStats:
        return RequestStats(
            state=self.shown_state,
            cell=self.cell,
            home=self.home,
            kv_tokens={rank: tokens for rank, tokens in sorted(self.held.items()) if tokens},
            prompt_tokens=self.prompt_tokens,
            generated_tokens=len(self.tokens),
            home_moves=self.home_moves,
            preemptions=self.preemptions,
            finish_reason=self.finish_reason,
        )

    @property
    def shown_state(self) -> RequestState:
        """As users see it: whatever it waits for, it is queued."""
        match self.state:
            case "waiting" | "encoding":
                return "queued"
            case "queued" if self.preemptions:
                return "preempted"
            case state:
                return state


@dataclass(frozen=True, slots=True)
class Ended:
    """What is kept of a request that has ended, for a while."""

    request: Request
    """Without its prompt."""
    stats: RequestStats
    error: str | None = None
    refusal: RefusalReason | None = None

    @property
    def num_bytes(self) -> int:
        """About what it takes."""
        logprobs = self.request.logprobs or ()
        of_prompt = sum(len(scores) * (12 + 8 * scores.num_top) for scores in self.request.scores)
        return 4 * len(self.request.tokens) + sum(100 + 64 * len(each.top_ids) for each in logprobs) + of_prompt


def content_of(submit: Submit) -> int:
    """A hash of what is asked for, of this process alone; the id is no part of it."""
    asked = msgspec.structs.astuple(submit)[1:]
    return hash((msgspec.msgpack.encode([None if isinstance(part, bytes) else part for part in asked]), submit.token_ids))


def count_tokens(runs: Runs) -> int:
    """Of what is kept on one instance."""
    return sum(end - start for run in runs for start, end in run)


def cut(runs: Runs, end: int) -> Runs:
    """What of it lies before a position; instances come to the same (`kvstore.shard`)."""
    shorter = [[(start, min(stop, end)) for start, stop in run if start < end] for run in runs]
    return [run for run in shorter if run]


def held_once(parts: Mapping[int, Runs]) -> dict[int, Runs]:
    """What can be used of what each rank has: of a run that two of them have, which was on its way from one to the other when
    the epoch ended, the longer one, for the target may have written more behind it.

    Nothing, if something else is twice at one position, or is none: an instance is mad.
    """
    longest: dict[int, tuple[int, Sequence[tuple[int, int]]]] = {}
    runs = [(rank, run) for rank, its in parts.items() for run in its]
    for rank, run in sorted(runs, key=lambda found: -found[1][-1][1]):
        longer = longest.setdefault(run[0][0], (rank, run))
        if cut([longer[1]], run[-1][1]) != [run] or (longer[0] == rank and longer[1] is not run):
            return {}
    pieces = sorted(piece for _, run in longest.values() for piece in run)
    edges = [0, *(edge for piece in pieces for edge in piece)]
    if edges != sorted(edges):
        return {}
    chosen = {rank: [run for run in its if longest[run[0][0]][1] is run] for rank, its in parts.items()}
    return {rank: its for rank, its in chosen.items() if its}


def text_bytes(submit: Submit) -> int:
    """Of the text that a request brings."""
    return len(submit.text or "") + sum(len(message.content) for message in submit.messages or ())


def wrong_with(submit: Submit) -> Refusal | None:
    """What is wrong with a request whoever serves it."""
    if submit.token_ids is not None and len(submit.token_ids) % 4:
        return Refusal("invalid", f"token ids must be a multiple of 4 bytes long, got {len(submit.token_ids)}")
    if not (submit.token_ids or submit.text or submit.messages):
        return Refusal("invalid", "the prompt is empty")
    return None
