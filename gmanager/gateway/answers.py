"""Tokens of the service as OpenAI's answers: whole ones, and chunks of streams.

The two kinds of answers differ in their choices alone; what is between is one shape (`Shape`) with two implementations.
"""

import codecs
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gmanager.client import Chunk
from gmanager.text import Tokenizer
from gmanager.wire.messages import TokenLogprob

Json = dict[str, Any]


@dataclass(slots=True)
class Usage:
    """Tokens of a whole request: each prompt counts once, whatever n."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def to_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
        }


@dataclass(slots=True)
class Choice:
    """One answer as far as it has come."""

    index: int
    prompt: "Prompt"
    offset: int = 0
    """Characters that tokens with log-probabilities have completed so far."""
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    """Of the bytes of these tokens: a character may be spread over several."""
    has_begun: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request."""

    token_ids: list[int]
    text: str
    """What `echo` repeats."""


class Shape(Protocol):
    """How one of the two routes answers."""

    kind: str
    stream_kind: str
    prefix: str

    def opening(self, choice: Choice) -> Json | None:
        """The chunk of a stream that comes before any token."""

    def delta(self, choice: Choice, chunk: Chunk) -> Json:
        """A choice of a stream's chunk."""

    def whole(self, choice: Choice, chunks: Sequence[Chunk]) -> Json:
        """A choice of a whole answer."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What stands around the choices of one answer."""

    shape: Shape
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return f"{self.shape.prefix}-{self.id}"

    def whole(self, choices: list[Json], usage: Usage) -> Json:
        return self._head(self.shape.kind) | {"choices": choices, "usage": usage.to_json()}

    def chunk(self, choices: list[Json], usage: Usage | None = None) -> Json:
        told = {"usage": None if usage is None else usage.to_json()}
        return self._head(self.shape.stream_kind) | {"choices": choices} | told

    def _head(self, kind: str) -> Json:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}


class CompletionShape:
    """`/v1/completions`."""

    kind = stream_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, tokenizer: Tokenizer, *, logprobs: int | None, echo: bool, drops_tokens: bool) -> None:
        """`drops_tokens`: only the prompt was asked for, and the one token that was generated is none of the answer."""
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._echo = echo
        self._drops_tokens = drops_tokens
        self._names: dict[int, str] = {}

    def opening(self, choice: Choice) -> Json | None:
        return None

    def delta(self, choice: Choice, chunk: Chunk) -> Json:
        is_first, choice.has_begun = not choice.has_begun, True
        text = "" if self._drops_tokens else chunk.text
        scored: list[TokenLogprob | None] = [] if self._drops_tokens else list(chunk.logprobs or ())
        token_ids = [] if self._drops_tokens else list(chunk.token_ids)
        if self._echo and is_first:
            text = choice.prompt.text + text
            scored = [None, *(chunk.prompt_logprobs or ()), *scored]
            token_ids = choice.prompt.token_ids + token_ids
        return self._choice(choice, text, token_ids, scored, self._reason(chunk))

    def whole(self, choice: Choice, chunks: Sequence[Chunk]) -> Json:
        text = "" if self._drops_tokens else "".join(chunk.text for chunk in chunks)
        scored: list[TokenLogprob | None] = []
        token_ids: list[int] = []
        if not self._drops_tokens:
            token_ids = [token for chunk in chunks for token in chunk.token_ids]
            scored = [token for chunk in chunks for token in chunk.logprobs or ()]
        if self._echo:
            text = choice.prompt.text + text
            scored = [None, *(chunks[0].prompt_logprobs or ()), *scored]
            token_ids = choice.prompt.token_ids + token_ids
        return self._choice(choice, text, token_ids, scored, self._reason(chunks[-1]))

    def _reason(self, chunk: Chunk) -> str | None:
        return "length" if self._drops_tokens and chunk.finish_reason else chunk.finish_reason

    def _choice(
        self, choice: Choice, text: str, token_ids: list[int], scored: Sequence[TokenLogprob | None], reason: str | None
    ) -> Json:
        logprobs = None if self._logprobs is None else self._table(choice, token_ids, scored)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _table(self, choice: Choice, token_ids: list[int], scored: Sequence[TokenLogprob | None]) -> Json:
        """`scored[i]` is of `token_ids[i]`; None of a prompt's first token, before which there is nothing."""
        names = [self._name(token) for token in token_ids]
        offsets = []
        for token in token_ids:
            offsets.append(choice.offset)
            choice.offset += len(choice.decoder.decode(self._tokenizer.bytes_of(token)))
        return {
            "tokens": names,
            "token_logprobs": [None if s is None else s.logprob for s in scored],
            "top_logprobs": [None if s is None else self._tops(s) for s in scored] if self._logprobs else None,
            "text_offset": offsets,
        }

    def _tops(self, scored: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the one that stands there."""
        tops = {self._name(i): p for i, p in zip(scored.top_ids, scored.top_logprobs, strict=True)}
        return tops | {self._name(scored.token_id): scored.logprob}

    def _name(self, token_id: int) -> str:
        """A token's text; one that is no whole character by its bytes, so that two never have one name."""
        name = self._names.get(token_id)
        if name is None:
            data = self._tokenizer.bytes_of(token_id)
            try:
                name = data.decode() or f"token_id:{token_id}"
            except UnicodeDecodeError:
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._names[token_id] = name
        return name


class ChatShape:
    """`/v1/chat/completions`."""

    kind = "chat.completion"
    stream_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, *, logprobs: int | None) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def opening(self, choice: Choice) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, choice: Choice, chunk: Chunk) -> Json:
        return {
            "index": choice.index,
            "delta": {"content": chunk.text} if chunk.text else {},
            "logprobs": self._table([chunk]),
            "finish_reason": chunk.finish_reason,
        }

    def whole(self, choice: Choice, chunks: Sequence[Chunk]) -> Json:
        message = {"role": "assistant", "content": "".join(chunk.text for chunk in chunks), "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._table(chunks),
            "finish_reason": chunks[-1].finish_reason,
        }

    def _table(self, chunks: Sequence[Chunk]) -> Json | None:
        if self._logprobs is None:
            return None
        content = []
        for scored in (token for chunk in chunks for token in chunk.logprobs or ()):
            tops = zip(scored.top_ids, scored.top_logprobs, strict=True)
            entry = self._entry(scored.token_id, scored.logprob)
            content.append(entry | {"top_logprobs": [self._entry(token, logprob) for token, logprob in tops]})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> Json:
        data = self._tokenizer.bytes_of(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}
