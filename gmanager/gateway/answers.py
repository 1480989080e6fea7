"""Tokens of the service as answers: whole ones, and events of streams.

Each route has its form (`Form`). OpenAI's two older ones differ in their choices alone: `Envelope`, with a `Shape` each.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from gmanager.client import Chunk
from gmanager.gateway.errors import ApiError
from gmanager.gateway.places import Places
from gmanager.text.tokenizer import Tokenizer
from gmanager.wire.messages import TokenLogprob

Json = dict[str, Any]


@dataclass(slots=True)
class Usage:
    """Tokens of a whole request: each prompt counts once, whatever n."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts, those that were not computed: of each prompt's first choice."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def to_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request."""

    token_ids: list[int]
    text: str
    """What `echo` repeats."""
    field: str = "prompt"
    """What the client calls it."""


@dataclass(slots=True)
class Choice:
    """One answer as far as it has come."""

    index: int
    prompt: Prompt
    places: Places = field(default_factory=Places)
    has_begun: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """What answers hold besides text."""

    logprobs: int | None = None
    """With so many of the likeliest tokens."""
    prompt_logprobs: int | None = None
    token_ids: bool = False
    tokens_as_ids: bool = False
    """Tokens are named `token_id:7`, not by their texts."""
    skip_special: bool = True
    """Special tokens have no text in the answer."""


class Form(Protocol):
    """How a route answers."""

    def request_id(self, choice: int) -> str:
        """Of one choice, for the service. No two are the same, even if clients give the same ids."""

    def whole(self, choices: Sequence[tuple[Choice, Sequence[Chunk]]], usage: Usage) -> Json:
        """The whole answer: each choice with all its chunks."""

    def events(self, choice: Choice, chunk: Chunk, usage: Usage) -> bytes:
        """A stream's events for a chunk, with those that come before a choice's first. `usage`: so far."""

    def end(self, usage: Usage) -> bytes:
        """A stream's last events, when all choices have ended."""

    def failure(self, error: ApiError) -> bytes:
        """A stream's last events, if it can't go on."""


class Shape(Protocol):
    """How one of OpenAI's two older routes answers."""

    kind: str
    stream_kind: str
    prefix: str

    def around(self, choice: Choice, chunk: Chunk) -> Json:
        """What a whole answer, and the first chunk of a stream, holds beside its choices; of a first choice and chunk."""

    def opening(self, choice: Choice) -> Json | None:
        """The chunk of a stream that comes before any token."""

    def delta(self, choice: Choice, chunk: Chunk) -> Json:
        """A choice of a stream's chunk."""

    def whole(self, choice: Choice, chunks: Sequence[Chunk]) -> Json:
        """A choice of a whole answer."""


@dataclass(slots=True)
class Envelope:
    """What stands around the choices of one answer."""

    shape: Shape
    model: str
    """As the client calls it."""
    given_id: str | None = None
    """By the client."""
    ends_with_usage: bool = False
    """A stream's last event tells it."""
    continues_usage: bool = False
    """All of them do."""
    drawn_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    _opened: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"{self.shape.prefix}-{self.given_id or self.drawn_id}"

    def request_id(self, choice: int) -> str:
        drawn = "" if self.given_id is None else f"-{self.drawn_id[:8]}"
        return f"{self.name}{drawn}-{choice}"

    def whole(self, choices: Sequence[tuple[Choice, Sequence[Chunk]]], usage: Usage) -> Json:
        first, first_chunks = choices[0]
        shapes = [self.shape.whole(choice, chunks) for choice, chunks in choices]
        found = self._head(self.shape.kind) | {"choices": shapes, "usage": usage.to_json()}
        return found | self.shape.around(first, first_chunks[0])

    def events(self, choice: Choice, chunk: Chunk, usage: Usage) -> bytes:
        so_far = usage if self.continues_usage else None
        opening = b""
        if choice.index not in self._opened:
            self._opened.add(choice.index)
            if (opens := self.shape.opening(choice)) is not None:
                around = {} if len(self._opened) > 1 else self.shape.around(choice, chunk)
                opening = event(self._chunk([opens], so_far) | around)
        return opening + event(self._chunk([self.shape.delta(choice, chunk)], so_far))

    def end(self, usage: Usage) -> bytes:
        return (event(self._chunk([], usage)) if self.ends_with_usage else b"") + b"data: [DONE]\n\n"

    def failure(self, error: ApiError) -> bytes:
        return event(error.body())

    def _chunk(self, choices: list[Json], usage: Usage | None) -> Json:
        told = {"usage": None if usage is None else usage.to_json()}
        return self._head(self.shape.stream_kind) | {"choices": choices} | told

    def _head(self, kind: str) -> Json:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}


def event(content: Json, name: str | None = None) -> bytes:
    """One server-sent event."""
    named = b"" if name is None else b"event: " + name.encode() + b"\n"
    return named + b"data: " + msgspec.json.encode(content) + b"\n\n"


class TokenNames:
    """Tokens as answers name them."""

    def __init__(self, tokenizer: Tokenizer, wanted: Wanted) -> None:
        self._tokenizer = tokenizer
        self._wanted = wanted
        self._names: dict[int, str] = {}

    def name(self, token_id: int) -> str:
        """A token's text; one that is no whole character by its bytes, so that two never have one name."""
        name = self._names.get(token_id)
        if name is None:
            data = self._tokenizer.bytes_of(token_id)
            try:
                name = (not self._wanted.tokens_as_ids and data.decode()) or f"token_id:{token_id}"
            except UnicodeDecodeError:
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._names[token_id] = name
        return name

    def text(self, token_id: int) -> str:
        return self._tokenizer.bytes_of(token_id).decode(errors="replace")

    def entry(self, scored: TokenLogprob) -> Json:
        """OpenAI's newer form, with the likeliest tokens."""
        tops = zip(scored.top_ids, scored.top_logprobs, strict=True)
        named = self._entry(scored.token_id, scored.logprob)
        return named | {"top_logprobs": [self._entry(token, logprob) for token, logprob in tops]}

    def _entry(self, token_id: int, logprob: float) -> Json:
        data = self._tokenizer.bytes_of(token_id)
        name = f"token_id:{token_id}" if self._wanted.tokens_as_ids else data.decode(errors="replace")
        return {"token": name, "logprob": logprob, "bytes": list(data)}

    def of_prompt(self, chunk: Chunk) -> list[Json | None]:
        """vLLM's form: for each position what could have stood there, by token id; nothing for the first."""
        most = self._wanted.prompt_logprobs or 0
        return [None, *(self._position(scored, most) for scored in chunk.prompt_logprobs or ())]

    def _position(self, scored: TokenLogprob, most: int) -> Json:
        entries = {scored.token_id: (scored.logprob, scored.rank)}
        for rank, (token, logprob) in enumerate(zip(scored.top_ids[:most], scored.top_logprobs[:most], strict=True), 1):
            entries.setdefault(token, (logprob, rank))
        return {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": self.text(token)}
            for token, (logprob, rank) in entries.items()
        }


class CompletionShape:
    """`/v1/completions`."""

    kind = stream_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, tokenizer: Tokenizer, wanted: Wanted, *, echo: bool, drops_tokens: bool) -> None:
        """`drops_tokens`: only the prompt was asked for, and the one token that was generated is none of the answer."""
        self._tokenizer = tokenizer
        self._tokens = TokenNames(tokenizer, wanted)
        self._wanted = wanted
        self._echo = echo
        self._drops_tokens = drops_tokens

    def around(self, choice: Choice, chunk: Chunk) -> Json:
        return {}

    def opening(self, choice: Choice) -> Json | None:
        return None

    def delta(self, choice: Choice, chunk: Chunk) -> Json:
        return self._choice(choice, [chunk])

    def whole(self, choice: Choice, chunks: Sequence[Chunk]) -> Json:
        return self._choice(choice, chunks)

    def _choice(self, choice: Choice, chunks: Sequence[Chunk]) -> Json:
        is_first, choice.has_begun = not choice.has_begun, True
        kept = [] if self._drops_tokens else chunks
        text = "".join(chunk.text for chunk in kept)
        token_ids = [token for chunk in kept for token in chunk.token_ids]
        ends = chunks[-1].finish_reason is not None
        reason = "length" if self._drops_tokens and ends else chunks[-1].finish_reason
        found: Json = {"index": choice.index, "text": text, "logprobs": None, "finish_reason": reason}
        scored: list[TokenLogprob | None] = [token for chunk in kept for token in chunk.logprobs or ()]
        repeated = choice.prompt if self._echo and is_first else None
        if repeated is not None:
            found["text"] = repeated.text + text
            scored = [None, *(chunks[0].prompt_logprobs or ()), *scored]
        if self._wanted.logprobs is not None:
            found["logprobs"] = self._table(choice, repeated, token_ids, text, scored, ends=ends)
        if self._wanted.token_ids:
            found["token_ids"] = token_ids
            if is_first:
                found["prompt_token_ids"] = choice.prompt.token_ids
        if self._wanted.prompt_logprobs is not None:
            found["prompt_logprobs"] = self._tokens.of_prompt(chunks[0])
        return found

    def _table(
        self,
        choice: Choice,
        repeated: Prompt | None,
        token_ids: list[int],
        text: str,
        scored: Sequence[TokenLogprob | None],
        *,
        ends: bool,
    ) -> Json:
        """`scored[i]` is of the i-th token, of the prompt if it is repeated and then of `token_ids`; None of a prompt's first,
        before which there is nothing."""
        offsets: list[int] = []
        if repeated is not None:
            at = Places()
            special = self._tokenizer.visible
            for token in repeated.token_ids:
                data = self._tokenizer.bytes_of(token)
                if not special([token]) and not repeated.text.startswith(data.decode(errors="replace"), at.offset):
                    data = b""  # the tokenizer's own, which the client didn't write
                offsets.append(at.add(data, repeated.text))
            offsets = [min(offset, len(repeated.text)) for offset in offsets]
            choice.places.start(len(repeated.text))
            token_ids_of_all = repeated.token_ids + token_ids
        else:
            token_ids_of_all = token_ids
        choice.places.end += len(text)
        for token in token_ids:
            is_silent = self._wanted.skip_special and not self._tokenizer.visible([token])
            offsets.append(choice.places.add(b"" if is_silent else self._tokenizer.bytes_of(token), text))
        if ends:  # tokens of a stop string are no part of the text
            offsets = [min(offset, choice.places.end) for offset in offsets]
        return {
            "tokens": [self._tokens.name(token) for token in token_ids_of_all],
            "token_logprobs": [None if s is None else s.logprob for s in scored],
            "top_logprobs": [None if s is None else self._tops(s) for s in scored] if self._wanted.logprobs else None,
            "text_offset": offsets,
        }

    def _tops(self, scored: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the one that stands there."""
        most = self._wanted.logprobs
        tops = zip(scored.top_ids[:most], scored.top_logprobs[:most], strict=True)
        return {self._tokens.name(i): p for i, p in tops} | {self._tokens.name(scored.token_id): scored.logprob}
