"""Answers of `/v1/chat/completions`."""

from collections.abc import Sequence

from gmanager.client import Chunk
from gmanager.gateway.answers import Choice, Json, TokenNames, Wanted
from gmanager.gateway.reply import Reply, ReplyForm, ReplyReader, Said, ThoughtDelta, read
from gmanager.gateway.tools import ArgumentsDelta, CallBegins, ContentDelta, ToolCall
from gmanager.text.tokenizer import Tokenizer


class ChatShape:
    """Choices that are messages."""

    kind = "chat.completion"
    stream_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, wanted: Wanted, reply: ReplyForm) -> None:
        self._reply = reply
        self._readers: dict[int, ReplyReader] = {}
        """Of choices that are streamed."""
        self._tokens = TokenNames(tokenizer, wanted)
        self._wanted = wanted

    def around(self, choice: Choice, chunk: Chunk) -> Json:
        found: Json = {}
        if self._wanted.token_ids:
            found["prompt_token_ids"] = choice.prompt.token_ids
        if self._wanted.prompt_logprobs is not None:
            found["prompt_logprobs"] = self._tokens.of_prompt(chunk)
        return found

    def opening(self, choice: Choice) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, choice: Choice, chunk: Chunk) -> Json:
        reader = self._readers.setdefault(choice.index, ReplyReader(self._reply))
        said = reader.push(chunk.text, final=chunk.finish_reason is not None)
        return {
            "index": choice.index,
            "delta": _delta(said),
            "logprobs": self._table([chunk]),
            "finish_reason": _reason(chunk, has_calls=reader.num_calls > 0),
        } | self._ids([chunk])

    def whole(self, choice: Choice, chunks: Sequence[Chunk]) -> Json:
        reply = read(self._reply, "".join(chunk.text for chunk in chunks))
        return {
            "index": choice.index,
            "message": _message(reply),
            "logprobs": self._table(chunks),
            "finish_reason": _reason(chunks[-1], has_calls=bool(reply.calls)),
        } | self._ids(chunks)

    def _ids(self, chunks: Sequence[Chunk]) -> Json:
        return {"token_ids": [token for chunk in chunks for token in chunk.token_ids]} if self._wanted.token_ids else {}

    def _table(self, chunks: Sequence[Chunk]) -> Json | None:
        if self._wanted.logprobs is None:
            return None
        content = [self._tokens.entry(scored) for chunk in chunks for scored in chunk.logprobs or ()]
        return {"content": content, "refusal": None}


def _message(reply: Reply) -> Json:
    message: Json = {"role": "assistant", "content": reply.content, "refusal": None}
    if reply.calls:
        message["content"] = reply.content or None
        message["tool_calls"] = [_call(call) for call in reply.calls]
    if reply.thoughts:
        message["reasoning_content"] = reply.thoughts
    return message


def _call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _delta(said: Sequence[Said]) -> Json:
    """One for all: clients take no two parts of one call from one delta."""
    delta: Json = {}
    calls: dict[int, Json] = {}
    for event in said:
        match event:
            case ContentDelta(text):
                delta["content"] = delta.get("content", "") + text
            case ThoughtDelta(text):
                delta["reasoning_content"] = delta.get("reasoning_content", "") + text
            case CallBegins(index, call_id, name):
                calls[index] = {"index": index} | _call(ToolCall(call_id, name))
            case ArgumentsDelta(index, text):
                calls.setdefault(index, {"index": index, "function": {"arguments": ""}})["function"]["arguments"] += text
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta


def _reason(chunk: Chunk, *, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and chunk.finish_reason == "stop" else chunk.finish_reason
