"""What a request, its answer and a model's text are made of."""

import math
from typing import Literal, NamedTuple

from gmanager.wire.messages.base import Part, unpack_floats, unpack_tokens

MAX_STOP_STRINGS = 16
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_STRUCTURE_CHARS = 2**20
MAX_BAD_WORD_CHARS = 256
MAX_BAD_WORD_TOKENS = 64
"""Of each of `bad_words`, however it is written."""
MAX_LOGPROBS = 20
MOST_PRIORITY = 2**31
"""A request's priority is at least -this, and less than this."""

FinishReason = Literal["stop", "length", "abort", "error"]
RequestState = Literal["queued", "reserving", "prefill", "decode", "moving", "preempted", "finished"]
CellState = Literal["forming", "ready", "changing"]
Role = Literal["mixed", "prefill", "decode"]
"""What an instance is for, under a policy that tells them apart."""
RefusalReason = Literal["invalid", "too_long", "never", "model", "full", "not_ready", "unknown", "overloaded", "unreachable"]
"""Why a request never starts: it is wrong in itself; longer than the model takes; more KV than the cell will ever hold; for a
model that nobody serves; the queue is full; no cell is ready and it was not to wait for one. Unknown: there is no request of
that id to attach to. Overloaded: it would miss an objective now; unreachable: it would even if it were alone."""


class Refusal(NamedTuple):
    """A request that never starts, and why."""

    reason: RefusalReason
    text: str
    """With the numbers, for whoever asked."""
    retry_after_s: float | None = None
    """In so many seconds one like it is expected to be taken; None: that is not known."""


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
        logprobs, top_logprobs = (unpack_floats(data) for data in (self.logprobs, self.top_logprobs))
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


class TextAssets(Part):
    """All that the gManager needs to turn text into tokens and back."""

    tokenizer_json: str | None
    """None: the model came without one, and is served by token ids."""
    chat_template: str | None
    special_tokens: dict[str, str]
    """bos_token, eos_token, ... as the chat template names them."""
    eos_token_ids: list[int]
