"""Answers of `/v1/messages`: Anthropic's messages, whole and as events.

A message is a list of blocks: thoughts, text and calls, in the order in which the model wrote them. A stream has one open at a
time:

    message_start (content_block_start content_block_delta* content_block_stop)* message_delta message_stop
"""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pydantic_core

from gmanager.client import Chunk
from gmanager.gateway.answers import Choice, Json, Usage, event
from gmanager.gateway.errors import ApiError, messages_error
from gmanager.gateway.reply import ReplyForm, ReplyReader, Said, ThoughtDelta
from gmanager.gateway.tools import ArgumentsDelta, CallBegins, CallEnds, ContentDelta

SIGNATURE = "unsigned"
"""Of thoughts. Clients drop those that have none, and nobody here reads it."""
INVALID = "INVALID_JSON"
"""Name of the only argument of a call whose arguments are no JSON: what the model wrote instead."""


@dataclass(slots=True)
class MessagesForm:
    """One answer."""

    model: str
    """As the client calls it."""
    reply: ReplyForm
    stops: Sequence[str] = ()
    """Stop strings. The text ends with the one that was found: which one it was can't be told otherwise."""
    given_id: str | None = None
    """By the client."""
    drawn_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _reader: ReplyReader = field(init=False)
    _blocks: "_Blocks" = field(init=False)
    _ending: Json = field(init=False)
    _held: str = field(default="", init=False)
    """A stop string that the text ends with, until it is known whether that was its end."""

    def __post_init__(self) -> None:
        self._reader = ReplyReader(self.reply)
        self._blocks = _Blocks()
        self._ending = _end(None)

    @property
    def name(self) -> str:
        return f"msg_{self.given_id or self.drawn_id}"

    def request_id(self, choice: int) -> str:
        drawn = "" if self.given_id is None else f"-{self.drawn_id[:8]}"
        return f"{self.name}{drawn}-{choice}"

    def whole(self, choices: Sequence[tuple[Choice, Sequence[Chunk]]], usage: Usage) -> Json:
        ((_, chunks),) = choices
        text, stop = self._before_stop("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason)
        said = self._reader.push(text, final=True)
        return self._message(_content(said), _end(self._reason(chunks[-1], stop), stop), usage)

    def events(self, choice: Choice, chunk: Chunk, usage: Usage) -> bytes:
        found: list[Json] = []
        if not choice.has_begun:
            choice.has_begun = True
            found.append({"type": "message_start", "message": self._message([], self._ending, usage)})
        text, stop = self._before_stop(chunk.text, chunk.finish_reason)
        ends = chunk.finish_reason is not None
        found += self._blocks.events(self._reader.push(text, final=ends))
        if ends:
            found += self._blocks.close()
            self._ending = _end(self._reason(chunk, stop), stop)
        return _written(found)

    def end(self, usage: Usage) -> bytes:
        last = {"type": "message_delta", "delta": self._ending, "usage": _usage(usage)}
        return _written([last, {"type": "message_stop"}])

    def failure(self, error: ApiError) -> bytes:
        return _written([messages_error(error)])

    def _before_stop(self, text: str, finish_reason: str | None) -> tuple[str, str | None]:
        """What has come of the text before the stop string that ended it, and that. Chunks never cut a stop string, as its
        beginning is held back until the rest has come; but that it has ended the text may be told only by a later chunk, an
        empty one."""
        text, self._held = self._held + text, ""
        stop = max((stop for stop in self.stops if text.endswith(stop)), key=len, default=None)
        if stop is None or finish_reason not in (None, "stop"):
            return text, None
        text = text[: -len(stop)]
        if finish_reason is None:
            self._held, stop = stop, None
        return text, stop

    def _reason(self, chunk: Chunk, stop: str | None) -> str:
        if chunk.finish_reason == "length":
            return "max_tokens"
        if stop is not None:
            return "stop_sequence"
        return "tool_use" if self._reader.num_calls else "end_turn"

    def _message(self, content: list[Json], end: Json, usage: Usage) -> Json:
        head = {"id": self.name, "type": "message", "role": "assistant", "model": self.model, "content": content}
        return head | end | {"usage": _usage(usage)}


class _Blocks:
    """Blocks of a stream: one open at a time."""

    def __init__(self) -> None:
        self._index = 0
        self._open: str | None = None
        """Its type."""

    def events(self, said: Iterable[Said]) -> Iterator[Json]:
        for new in said:
            match new:
                case ThoughtDelta(text):
                    yield from self._within({"type": "thinking", "thinking": "", "signature": ""})
                    yield self._delta({"type": "thinking_delta", "thinking": text})
                case ContentDelta(text):
                    yield from self._within({"type": "text", "text": ""})
                    yield self._delta({"type": "text_delta", "text": text})
                case CallBegins():
                    yield from self.close()
                    yield from self._within(_call(new))
                case ArgumentsDelta(_, text):
                    yield self._delta({"type": "input_json_delta", "partial_json": text})
                case CallEnds():
                    yield from self.close()

    def close(self) -> Iterator[Json]:
        """Of the one that is open, if there is one."""
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
        yield {"type": "content_block_stop", "index": self._index}
        self._open = None
        self._index += 1

    def _within(self, block: Json) -> Iterator[Json]:
        """A block of this type is open, or will be as this one."""
        if self._open != block["type"]:
            yield from self.close()
            self._open = block["type"]
            yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _content(said: Iterable[Said]) -> list[Json]:
    """Blocks of a whole answer: those that `_Blocks` would write."""
    blocks: list[Json] = []
    arguments = ""

    def last(kind: str, empty: Json) -> Json:
        if not blocks or blocks[-1]["type"] != kind:
            blocks.append({"type": kind} | empty)
        return blocks[-1]

    for new in said:
        match new:
            case ThoughtDelta(text):
                last("thinking", {"thinking": "", "signature": SIGNATURE})["thinking"] += text
            case ContentDelta(text):
                last("text", {"text": ""})["text"] += text
            case CallBegins():
                blocks.append(_call(new))
                arguments = ""
            case ArgumentsDelta(_, text):
                arguments += text
            case CallEnds():
                blocks[-1]["input"] = _input(arguments)
    return blocks


def _call(call: CallBegins) -> Json:
    return {"type": "tool_use", "id": call.id.replace("call_", "toolu_", 1), "name": call.name, "input": {}}


def _input(arguments: str) -> Json:
    """Arguments as far as they have come."""
    if not arguments:
        return {}
    try:
        found: Any = pydantic_core.from_json(arguments, allow_partial=True, allow_inf_nan=False)
    except ValueError:
        return {INVALID: arguments}
    return found if isinstance(found, dict) else {INVALID: arguments}


def _end(reason: str | None, stop: str | None = None) -> Json:
    return {"stop_reason": reason, "stop_sequence": stop}


def _usage(usage: Usage) -> Json:
    computed = usage.prompt_tokens - usage.cached_tokens
    counts = {"input_tokens": computed, "output_tokens": usage.completion_tokens}
    return counts | {"cache_creation_input_tokens": 0, "cache_read_input_tokens": usage.cached_tokens}


def _written(events: Iterable[Json]) -> bytes:
    """Each is named by its type."""
    return b"".join(event(content, content["type"]) for content in events)
