"""Every message between client, gManager and instances, as typed structs.

One direction a section. A struct is the whole contract: unknown fields are refused, and values that can be wrong on their
own (a NaN temperature, a negative count) are refused while it is built, on both sides of the wire.

Token ids travel as little-endian uint32 bytes (`pack_tokens`): 1.5 ms per million, against 30 ms as msgpack integers.

`seq` is the gManager's number for one admission of a request: a request that is preempted and admitted again gets a new one,
so that late messages of the old admission can't be taken for the new. Numbers grow with every admission.
`epoch` names the membership a message belongs to; a message of another epoch is dropped and counted.
"""

import math
import sys
from array import array
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Literal, NamedTuple, dataclass_transform

import msgspec

PROTOCOL = 1
"""Spoken version. A peer that speaks another is refused in its first message."""

MAX_STOP_STRINGS = 16
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_STRUCTURE_CHARS = 2**20
MAX_BAD_WORD_CHARS = 256
MAX_BAD_WORD_TOKENS = 64
"""Of each of `bad_words`, however it is written."""
MAX_LOGPROBS = 20

FinishReason = Literal["stop", "length", "abort", "error"]
RequestState = Literal["queued", "reserving", "prefill", "decode", "moving", "preempted", "finished"]
CellState = Literal["forming", "ready"]
RefusalReason = Literal["invalid", "too_long", "never", "model", "full", "not_ready"]
"""Why a request never starts: it is wrong in itself; longer than the model takes; more KV than the cell will ever hold; for a
model that nobody serves; the queue is full; no cell is ready and it was not to wait for one."""


class Refusal(NamedTuple):
    """A request that never starts, and why."""

    reason: RefusalReason
    text: str
    """With the numbers, for whoever asked."""


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Token ids as little-endian uint32 bytes. Raises ValueError for an id outside [0, 2**32)."""
    try:
        ids = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers in [0, 4294967296): {error}") from error
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def unpack_tokens(data: bytes) -> "array[int]":
    """The ids in `data`. Raises ValueError if its length is no multiple of 4."""
    if len(data) % 4:
        raise ValueError(f"packed token ids must be a multiple of 4 bytes long, got {len(data)}")
    ids = array("I")
    ids.frombytes(data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def _unpack_floats(data: bytes) -> "array[float]":
    values = array("f")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class _Strict(msgspec.StructMeta):
    """Makes every struct frozen, keyword-only and closed to unknown fields; subclasses need not say so again."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> "_Strict":
        strict = {"frozen": True, "kw_only": True, "forbid_unknown_fields": True}
        return super().__new__(mcs, name, bases, namespace, **(strict | options))


class Part(msgspec.Struct, metaclass=_Strict):
    """Base of what messages are made of."""


class Message(Part, tag_field="type"):
    """Base of all that travels; `type` on the wire is the class name."""


# --- what users see ---------------------------------------------------------------------------------------------------


class StructuredOutputsParams(Part):
    """What a text must be, in one of four forms. Raises ValueError unless exactly one is given."""

    json: str | None = None
    """A JSON Schema, as JSON: the text is a value of it."""
    regex: str | None = None
    """Of Rust's regex crate, matched to the whole text."""
    choice: list[str] | None = None
    """The text is one of these."""
    grammar: str | None = None
    """Lark's or GBNF's."""
    thoughts: Literal["possible", "begun"] | None = None
    """What may come before: `<think>...</think>`, which the prompt may have begun."""

    def __post_init__(self) -> None:
        forms = [name for name in self.__struct_fields__ if name != "thoughts"]
        given = [name for name in forms if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"one of {', '.join(forms)} must be given, got {', '.join(given) or 'none'}")
        value = getattr(self, given[0])
        if not value:
            raise ValueError(f"{given[0]} is empty")
        size = sum(map(len, value))
        if size > MAX_STRUCTURE_CHARS:
            raise ValueError(f"{given[0]} has at most {MAX_STRUCTURE_CHARS:,} characters, got {size:,}")


class SamplingParams(Part):
    """How to choose tokens; names, meanings and defaults are vLLM's.

    Raises ValueError (TypeError for a wrong type) with the offending value when built.
    """

    max_tokens: int | None = 16
    """Most tokens to generate. 0: the prompt is only computed, and scored if `prompt_logprobs` asks for it. None: as many as
    model and memory have room for."""
    temperature: float = 1.0
    """0 chooses the likeliest token (greedy)."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 or -1: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to this, in (0, 1]."""
    min_p: float = 0.0
    """Keep only tokens at least this many times as likely as the likeliest, in [0, 1]."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token that was generated, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit each time that it was generated, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """By which a positive logit is divided, and a negative one multiplied, if its token is in the prompt or was generated."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these tokens."""
    bad_words: list[str] | None = None
    """Texts that are never completed."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the text must be. Goes before `bad_words` and `min_tokens`, where nothing is left by them."""
    min_tokens: int = 0
    """Before so many are generated nothing ends the request: neither EOS, nor `stop_token_ids`, nor `stop`."""
    seed: int | None = None
    """Same seed, prompt and model: same tokens. None: one is drawn."""
    stop: str | list[str] | None = None
    """Strings that end the text; they are not part of it, unless asked for."""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    shown_special_tokens: list[int] | None = None
    """Special tokens that are part of the text even so: tags around what a model calls or thinks."""
    stop_token_ids: list[int] | None = None
    """Tokens that end the request, as EOS does."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """With each token: its log-probability and that of this many likeliest ones (0: only its own)."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ValueError(f"max_tokens must not be negative, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number >= 0, got {self.temperature}")
        if self.top_k < -1:
            raise ValueError(f"top_k must be -1, 0 (all) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} must be in [-2, 2], got {getattr(self, name)}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty must be a finite number > 0, got {self.repetition_penalty}")
        self._check_bias()
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise ValueError(f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), got {self.min_tokens}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise ValueError(f"{name} must be between 0 and {MAX_LOGPROBS}, got {count}")
        stops = self.stop_strings
        if len(stops) > MAX_STOP_STRINGS:
            raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings are taken, got {len(stops)}")
        if any(not s for s in stops):
            raise ValueError("a stop string must not be empty")
        if any(t < 0 for t in self.stop_token_ids or ()):
            raise ValueError(f"stop_token_ids must not be negative, got {min(self.stop_token_ids or ())}")

    def _check_bias(self) -> None:
        if len(self.logit_bias or ()) > MAX_LOGIT_BIASES:
            raise ValueError(f"logit_bias has at most {MAX_LOGIT_BIASES} tokens, got {len(self.logit_bias or ())}")
        for token, bias in (self.logit_bias or {}).items():
            if token < 0 or not math.isfinite(bias):
                raise ValueError(f"logit_bias adds finite numbers to token ids >= 0, got {token}: {bias}")
        if len(self.bad_words or ()) > MAX_BAD_WORDS:
            raise ValueError(f"at most {MAX_BAD_WORDS} bad_words are taken, got {len(self.bad_words or ())}")
        for word in self.bad_words or ():
            if not 1 <= len(word) <= MAX_BAD_WORD_CHARS:
                raise ValueError(f"each of bad_words has 1 to {MAX_BAD_WORD_CHARS} characters, got one of {len(word)}")

    @property
    def needs_text(self) -> bool:
        """Whether there is more than the prompt to be read before the request can run."""
        return bool(self.bad_words or self.structured_outputs)

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list, whichever way it was given."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class TokenLogprob(Part):
    """Natural log-probabilities at one position, of the model's logits before temperature."""

    token_id: int
    logprob: float
    rank: int
    """1: no token was likelier."""
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class PromptLogprobs(Part):
    """Log-probabilities of consecutive prompt tokens, each given all before it; packed, because a prompt may have millions.

    Raises ValueError when built of parts of different lengths.
    """

    start: int
    """Position of the first of them in the prompt, at least 1."""
    token_ids: bytes
    logprobs: bytes
    """Little-endian float32, natural logarithms."""
    ranks: bytes
    """Little-endian uint32. 1: no token was likelier."""
    num_top: int = 0
    """How many of the likeliest tokens come with each."""
    top_ids: bytes = b""
    top_logprobs: bytes = b""

    def __post_init__(self) -> None:
        lengths = [len(part) for part in (self.token_ids, self.logprobs, self.ranks)]
        tops = [len(part) for part in (self.top_ids, self.top_logprobs)]
        if self.start < 1 or not 0 <= self.num_top <= MAX_LOGPROBS:
            raise ValueError(f"start must be at least 1 and num_top at most {MAX_LOGPROBS}, got {self.start}, {self.num_top}")
        if lengths[0] % 4 or set(lengths) != {lengths[0]} or set(tops) != {lengths[0] * self.num_top}:
            raise ValueError(f"parts of {lengths} and {tops} bytes don't belong together with {self.num_top} likeliest tokens")

    def __len__(self) -> int:
        return len(self.token_ids) // 4

    def unpack(self) -> list[TokenLogprob]:
        """One for each token."""
        ids, ranks, top_ids = (unpack_tokens(data) for data in (self.token_ids, self.ranks, self.top_ids))
        logprobs, top_logprobs = (_unpack_floats(data) for data in (self.logprobs, self.top_logprobs))
        tops = [slice(i * self.num_top, (i + 1) * self.num_top) for i in range(len(ids))]
        return [
            TokenLogprob(
                token_id=token, logprob=logprob, rank=rank, top_ids=list(top_ids[top]), top_logprobs=list(top_logprobs[top])
            )
            for token, logprob, rank, top in zip(ids, logprobs, ranks, tops, strict=True)
        ]


class ChatMessage(Part):
    role: str
    content: str


class Counters(Part):
    """What one instance has done since it started, or a sum of such."""

    steps: int = 0
    rows: int = 0
    rows_dispatched: int = 0
    """Query rows sent to other instances, counted once a step and receiver, not in each layer."""
    tokens_prefilled: int = 0
    tokens_generated: int = 0
    home_moves: int = 0
    preemptions: int = 0
    blocks_copied: int = 0
    query_bytes: int = 0
    partial_bytes: int = 0
    kv_bytes: int = 0
    step_us: int = 0
    """Time in which the device ran steps, the sum of both lanes'; integers of microseconds, because counters are summed and
    clamped as such."""
    exchange_us: int = 0
    """Of it: waiting for rows of other instances. Measured on the CPU only."""
    attention_us: int = 0
    """Of it: attention, less those waits. Measured on the CPU only: a captured graph can't be divided by the host."""
    notice_us: int = 0
    """Waiting for the notices of the party's others, mostly while the device runs the step before: no part of `step_us`."""
    dropped_messages: int = 0


class InstanceStats(Part):
    cell: str
    rank: int
    total_tokens: int
    used_tokens: int
    """Tokens of the blocks in use, lent ones included: used + free = total."""
    free_tokens: int
    lent_tokens: int
    """KV it holds of sequences whose home is another instance."""
    borrowed_tokens: int
    """KV that others hold of sequences whose home it is."""
    counters: Counters


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


# --- client -> gManager -----------------------------------------------------------------------------------------------


class Hello(Message):
    """A client's first message."""

    protocol: int


class Submit(Message):
    """A new request. Exactly one of `text`, `token_ids` and `messages` is given."""

    request_id: str
    params: SamplingParams
    text: str | None = None
    token_ids: bytes | None = None
    messages: list[ChatMessage] | None = None
    spread: int | Literal["auto", "all"] | None = None
    """Least number of instances to spread the prompt's KV over; None: the gManager's own setting."""
    model: str | None = None
    """The model that is to answer, by a name that cells serve it under; None: any."""
    wait_for_cell: bool = True
    """Whether to wait when no cell is ready; else it is refused."""

    def __post_init__(self) -> None:
        given = [name for name in ("text", "token_ids", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of text, token_ids and messages must be given, got {given or 'none'}")
        if not 1 <= len(self.request_id) <= 256:
            raise ValueError(f"a request id has 1 to 256 characters, got {len(self.request_id)}")
        if isinstance(self.spread, int) and self.spread < 1:
            raise ValueError(f"spread must be at least 1, got {self.spread}")

    @property
    def text_fields(self) -> list[str]:
        """Which of what is given is text, that only a tokenizer can read."""
        prompt = {"prompt": self.text, "messages": self.messages}
        params = {name: getattr(self.params, name) for name in ("stop", "bad_words", "structured_outputs")}
        return [name for name, value in (prompt | params).items() if value]


class Abort(Message):
    """End a request of this client. Answered by Done or CallFailed."""

    call: int
    request_id: str


class MoveHome(Message):
    """Let another instance compute the next tokens of a request. Answered by Done when moved, or CallFailed."""

    call: int
    request_id: str
    instance: int


class GetStats(Message):
    call: int


class GetText(Message):
    """For the text assets of a ready cell. Answered by TextReply, or CallFailed if there is none of that name."""

    call: int
    cell: str | None = None
    """None: of any."""


class Ping(Message):
    """Says that the sender lives. Answered by Pong."""


# --- gManager -> client -----------------------------------------------------------------------------------------------


class Welcome(Message):
    """Answer to Hello: be heard (any message) more often than every `lease_s` seconds, or be taken for gone."""

    lease_s: float


class Refused(Message):
    """The peer can't be served at all (wrong protocol, first message not a greeting, garbage); the connection is over."""

    reason: str


class Output(Message):
    """New tokens of a request. `index` is the position of the first among its generated tokens.

    The last one has a `finish_reason`. A request refused at the door gets one Output with `error` and index 0.
    """

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    refusal: RefusalReason | None = None
    """With `error`: the request never started."""


class OutputBatch(Message):
    """Outputs of several requests of one client, in order: a message costs more than an output."""

    outputs: list[Output]


class PromptOutput(Message):
    """Log-probabilities of some of a request's prompt; all that were asked for come before its first Output, in any order.

    After a preemption some may come again.
    """

    request_id: str
    logprobs: PromptLogprobs


class Done(Message):
    call: int


class CallFailed(Message):
    call: int
    reason: str


class StatsReply(Message):
    call: int
    stats: Stats


class TextReply(Message):
    call: int
    assets: "TextAssets"


class Pong(Message):
    """Answer to Ping and Beat."""


# --- instance -> gManager ---------------------------------------------------------------------------------------------


class InstanceSpec(Part):
    """What must be equal in all instances of a cell, and what each one has."""

    model: str
    fingerprint: str
    """SHA-256 over the model's config and weights' names, shapes and a sample of their values."""
    tokenizer: str
    """SHA-256 of the text assets."""
    dtype: str
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
    other_names: list[str] = []
    """That requests may call the model by. A cell has those of its first instance."""


class TextAssets(Part):
    """All that the gManager needs to turn text into tokens and back."""

    tokenizer_json: str | None
    """None: the model came without one, and is served by token ids."""
    chat_template: str | None
    special_tokens: dict[str, str]
    """bos_token, eos_token, ... as the chat template names them."""
    eos_token_ids: list[int]


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


class Text(Message):
    assets: TextAssets


class StoreOpened(Message):
    epoch: int
    address: str


class Joined(Message):
    epoch: int


class Leave(Message):
    """The instance ends; with `failed`, because something broke."""

    reason: str
    failed: bool


class Beat(Message):
    """Sent every second, and at once when blocks were freed: deltas since the last Beat."""

    epoch: int
    free_blocks: int
    held_tokens: dict[int, int]
    """seq -> tokens of KV it now has here, for those that changed; 0: all its blocks are free again."""
    counters: Counters


class Granted(Message):
    """`blocks` more blocks are this sequence's. Answer to Reserve."""

    epoch: int
    seq: int
    blocks: int
    free_blocks: int


class NotGranted(Message):
    """Nothing was reserved: so many blocks aren't free. Answer to Reserve; not an error."""

    epoch: int
    seq: int
    free_blocks: int


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


# --- gManager -> instance ---------------------------------------------------------------------------------------------


class Registered(Message):
    lease_s: float
    send_text: bool
    """The cell has no text assets yet: send Text."""


class OpenStore(Message):
    """To the first-ranked instance of a new epoch: open a TCPStore and answer StoreOpened."""

    epoch: int


class Member(Part):
    rank: int
    """Rank in the cell's epoch: 0 .. size-1."""
    party_address: str


class JoinEpoch(Message):
    epoch: int
    rank: int
    store_address: str
    members: list[Member]


class EndEpoch(Message):
    """The cell is over: end."""

    epoch: int
    reason: str


class Reserve(Message):
    """Set blocks aside for a sequence, all or nothing. Answered by Granted or NotGranted."""

    epoch: int
    seq: int
    blocks: int


class Drop(Message):
    """Give back what was reserved for a sequence that has no KV here. Nothing happens if it has."""

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
    params: SequenceParams


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


FromClient = Hello | Submit | Abort | MoveHome | GetStats | GetText | Ping
ToClient = Welcome | Refused | Output | OutputBatch | PromptOutput | Done | CallFailed | StatsReply | TextReply | Pong
FromInstance = (
    Register
    | Text
    | StoreOpened
    | Joined
    | Leave
    | Beat
    | Granted
    | NotGranted
    | Outputs
    | Scored
    | NeedBlock
    | HomeMoved
    | Released
)
ToInstance = (
    Registered | Refused | OpenStore | JoinEpoch | EndEpoch | Reserve | Drop | Admit | Regroup | MoveSequence | Cancel | Pong
)
