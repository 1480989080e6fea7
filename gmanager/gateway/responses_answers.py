"""Answers of `/v1/responses`: items of output (thoughts, messages, calls), and the events that tell how they come to be."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gmanager.client import Chunk
from gmanager.gateway.answers import Choice, Json, TokenNames, Usage, Wanted, event
from gmanager.gateway.errors import ApiError
from gmanager.gateway.reply import ReplyForm, ReplyReader, Said, ThoughtDelta
from gmanager.gateway.responses import ResponsesRequest
from gmanager.gateway.tools import ArgumentsDelta, CallBegins, CallEnds, ContentDelta
from gmanager.text.tokenizer import Tokenizer

_Kind = Literal["reasoning", "message", "function_call"]
_Events = Iterator[tuple[str, Json]]
_PREFIXES: dict[_Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


@dataclass(slots=True)
class _Item:
    """One of the output."""

    kind: _Kind
    index: int
    id: str
    call_id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    status: str = "in_progress"

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def to_json(self) -> Json:
        found: Json = {"id": self.id, "type": self.kind, "status": self.status}
        is_begun = self.status != "in_progress"
        if self.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": self.text}] if is_begun else []
            return found | {"summary": [], "content": content}
        if self.kind == "message":
            return found | {"role": "assistant", "content": [self.part()] if is_begun else []}
        return found | {"call_id": self.call_id, "name": self.name, "arguments": self.text}

    def part(self) -> Json:
        """Of a message: its text."""
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}


class ResponsesForm:
    """One answer, whole or as events. It is for one use."""

    def __init__(self, body: ResponsesRequest, tokenizer: Tokenizer, model: str, reply: ReplyForm) -> None:
        """`model`: as the client calls it."""
        self._body = body
        self._model = model
        self._id = f"resp_{body.request_id or uuid.uuid4().hex}"
        self._drawn = uuid.uuid4().hex
        self._created = int(time.time())
        self._names = TokenNames(tokenizer, Wanted(logprobs=body.num_logprobs))
        self._reader = ReplyReader(reply)
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._pending: list[Json] = []
        """Log-probabilities of tokens whose text is still to come."""
        self._thought_tokens = 0
        self._finish_reason: str | None = None
        self._num_events = 0

    def request_id(self, choice: int) -> str:
        return f"{self._id}-{self._drawn[:8]}-{choice}"

    def whole(self, choices: Sequence[tuple[Choice, Sequence[Chunk]]], usage: Usage) -> Json:
        ((_, chunks),) = choices
        for chunk in chunks:
            for _ in self._take(chunk):
                pass
        return self._response(usage)

    def events(self, choice: Choice, chunk: Chunk, usage: Usage) -> bytes:
        opening = b""
        if self._num_events == 0:
            told = self._response(None)
            opening = b"".join(self._event(f"response.{name}", {"response": told}) for name in ("created", "in_progress"))
        return opening + b"".join(self._event(name, content) for name, content in self._take(chunk))

    def end(self, usage: Usage) -> bytes:
        response = self._response(usage)
        return self._event(f"response.{response['status']}", {"response": response})

    def failure(self, error: ApiError) -> bytes:
        said = {"code": "server_error", "message": error.detail}
        response = self._response(None) | {"status": "failed", "error": said}
        return self._event("response.failed", {"response": response})

    def _event(self, name: str, content: Json) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        return event({"type": name, "sequence_number": number} | content, name)

    # --- items ------------------------------------------------------------------------------------------------------------

    def _take(self, chunk: Chunk) -> _Events:
        """What a chunk adds to the output."""
        is_last = chunk.finish_reason is not None
        said = self._reader.push(chunk.text, final=is_last)
        self._pending += [self._names.entry(scored) for scored in chunk.logprobs or ()]
        if any(isinstance(event, ThoughtDelta) for event in said):
            self._thought_tokens += len(chunk.token_ids)
        for event_ in said:
            yield from self._add(event_)
        if is_last:
            self._finish_reason = chunk.finish_reason
            if not self._items:
                yield from self._begin("message")
            yield from self._close("incomplete" if chunk.finish_reason == "length" else "completed")

    def _add(self, said: Said) -> _Events:
        match said:
            case ThoughtDelta(text):
                self._pending.clear()
                yield from self._begin("reasoning")
                yield self._delta("response.reasoning_text.delta", text, content_index=0)
            case ContentDelta(text):
                yield from self._begin("message")
                logprobs, self._pending = self._pending, []
                assert self._open is not None
                self._open.logprobs += logprobs
                yield self._delta("response.output_text.delta", text, content_index=0, logprobs=logprobs)
            case CallBegins(_, call_id, name):
                self._pending.clear()
                yield from self._close("completed")
                yield from self._begin("function_call", call_id, name)
            case ArgumentsDelta(_, text):
                self._pending.clear()
                yield self._delta("response.function_call_arguments.delta", text)
            case CallEnds(_, is_complete):
                yield from self._close("completed" if is_complete else "incomplete")

    def _begin(self, kind: _Kind, call_id: str = "", name: str = "") -> _Events:
        """An item of this kind, unless one is open."""
        if self._open is not None and self._open.kind == kind:
            return
        yield from self._close("completed")
        self._open = _Item(kind, len(self._items), f"{_PREFIXES[kind]}_{uuid.uuid4().hex}", call_id, name)
        self._items.append(self._open)
        yield "response.output_item.added", {"output_index": self._open.index, "item": self._open.to_json()}
        if kind == "message":
            yield "response.content_part.added", self._place(content_index=0) | {"part": self._open.part()}
        elif kind == "reasoning":
            part = {"type": "reasoning_text", "text": ""}
            yield "response.content_part.added", self._place(content_index=0) | {"part": part}

    def _close(self, status: str) -> _Events:
        item = self._open
        if item is None:
            return
        item.status = status
        if item.kind == "message":
            place = self._place(content_index=0)
            yield "response.output_text.done", place | {"text": item.text, "logprobs": item.logprobs}
            yield "response.content_part.done", place | {"part": item.part()}
        elif item.kind == "reasoning":
            place = self._place(content_index=0)
            yield "response.reasoning_text.done", place | {"text": item.text}
            yield "response.content_part.done", place | {"part": {"type": "reasoning_text", "text": item.text}}
        else:
            yield "response.function_call_arguments.done", self._place() | {"name": item.name, "arguments": item.text}
        yield "response.output_item.done", {"output_index": item.index, "item": item.to_json()}
        self._open = None

    def _delta(self, name: str, text: str, **more: object) -> tuple[str, Json]:
        assert self._open is not None
        self._open.parts.append(text)
        return name, self._place() | more | {"delta": text}

    def _place(self, **more: object) -> Json:
        assert self._open is not None
        return {"item_id": self._open.id, "output_index": self._open.index} | more

    # --- around them ------------------------------------------------------------------------------------------------------

    def _response(self, usage: Usage | None) -> Json:
        body = self._body
        status = {None: "in_progress", "length": "incomplete"}.get(self._finish_reason, "completed")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._model,
            "output": [item.to_json() for item in self._items],
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "tools": [{"type": "function", "strict": None, "parameters": None} | tool.function for tool in body.tools],
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "text": {"format": {"type": "text"}} | body.text,
            "reasoning": {"effort": None, "summary": None} | body.reasoning,
            "truncation": "disabled",
            "previous_response_id": None,
            "background": False,
            "store": False,
            "service_tier": "default",
            "metadata": body.metadata or {},
            "user": body.user,
            "usage": None if usage is None else self._usage(usage),
        }

    def _usage(self, usage: Usage) -> Json:
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._thought_tokens},
            "total_tokens": usage.total_tokens,
        }
