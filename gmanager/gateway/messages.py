"""Conversations as Anthropic's Messages API has them: bodies of `/v1/messages` and `/v1/messages/count_tokens`."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from gmanager.gateway.conversation import Dialogue, Turn
from gmanager.gateway.fields import WHOLE, Body, Stop, Wrong, others
from gmanager.gateway.reading import shown
from gmanager.gateway.sampling import Talk
from gmanager.gateway.structure import Structure, of_schema
from gmanager.gateway.toolbox import Tool, Toolbox, choose, read_tool, unread_tools

Block = dict[str, Any]

_TYPES: dict[str, tuple[str, ...]] = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    "system": ("text",),
}
"""Types of blocks, by role."""
_STRINGS = {"text": ("text",), "tool_use": ("id", "name"), "tool_result": ("tool_use_id",), "thinking": ("thinking",)}
"""What must be in a block, by type."""
_MEDIA = {"image": "images", "document": "documents", "search_result": "search results", "container_upload": "files"}
_CHOICES: dict[str, Literal["auto", "none", "required"]] = {"auto": "auto", "any": "required", "none": "none", "tool": "auto"}
_KNOWN = {
    "tool_choice": ("type", "name", "disable_parallel_tool_use"),
    "thinking": ("type", "budget_tokens", "display"),
    "output_config": ("format", "effort"),
    "output_format": ("type", "schema"),
}
"""Names that mean something in these objects."""
_THINKING = ("enabled", "disabled", "adaptive", "between_tools")


@dataclass(frozen=True, slots=True)
class Message:
    """One message; a string is one block of text."""

    role: str
    blocks: Sequence[Block]


# --- reading: each takes what a client wrote, and raises Wrong with the place in it


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Wrong(f"a list of one message or more is needed, got {shown(value)}")
    messages = [_message(message, at) for at, message in enumerate(value)]
    if messages[-1].role == "assistant":
        _check_last(messages[-1].blocks, len(messages) - 1)
    return messages


def _message(value: Any, at: int) -> Message:
    if not isinstance(value, dict):
        raise Wrong(f"a message is an object with a role and content, got {shown(value)}", at)
    role = value.get("role")
    if not isinstance(role, str) or role not in _TYPES:
        raise Wrong(f'"user", "assistant" or "system" is needed, got {shown(role)}', at, "role")
    return Message(role, _blocks(value.get("content"), _TYPES[role], at, "content"))


def _check_last(blocks: Sequence[Block], at: int) -> None:
    """The answer goes on with an assistant's last message, so that must be something that can be gone on with."""
    for place, block in enumerate(blocks):
        if block["type"] == "tool_use":
            raise Wrong("its result is needed, in a message of the user after it", at, "content", place)
    if blocks and blocks[-1]["type"] != "text":
        raise Wrong("the answer goes on with the last message, so that must end in text", at, "content", len(blocks) - 1)


def _blocks(value: Any, types: Sequence[str], *place: str | int) -> list[Block]:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise Wrong(f"a string or a list of blocks is needed, got {shown(value)}", *place)
    for at, block in enumerate(value):
        _check_block(block, types, *place, at)
    return value


def _check_block(block: Any, types: Sequence[str], *place: str | int) -> None:
    if not isinstance(block, dict):
        raise Wrong(f"a block is an object with a type, got {shown(block)}", *place)
    if "type" not in block:
        raise Wrong("a block says its type, and this one has none", *place)
    kind = block["type"]
    if isinstance(kind, str) and kind in _MEDIA:
        raise Wrong(f"{_MEDIA[kind]} aren't served, only text; this block is of type {shown(kind)}", *place)
    if kind not in types:
        raise Wrong(f"the types here are {', '.join(types)}; got {shown(kind)}", *place, "type")
    for name in _STRINGS.get(kind, ()):
        if not isinstance(block.get(name), str):
            raise Wrong(f"a string is needed, got {shown(block.get(name))}", *place, name)
    if kind == "tool_use" and not isinstance(block.get("input"), dict | None):
        raise Wrong(f"an object is needed, got {shown(block['input'])}", *place, "input")
    if kind == "tool_result" and block.get("content") is not None:
        _blocks(block["content"], ("text",), *place, "content")


def _system(value: Any) -> str | None:
    return None if value is None else _joined(_blocks(value, ("text",)))


def _tools(value: Any) -> list[Tool]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise Wrong(f"a list of tools is needed, got {shown(value)}")
    return [_tool(tool, at) for at, tool in enumerate(value)]


def _tool(value: Any, at: int) -> Tool:
    if not isinstance(value, dict):
        raise Wrong(f"a tool is an object, got {shown(value)}", at)
    if value.get("type") not in (None, "custom"):
        raise Wrong(f'only tools of type "custom" are served, got {shown(value["type"])}', at, "type")
    told = {name: value[name] for name in ("name", "description", "input_schema") if name in value}
    unread = others(value, (*told, "type", "cache_control"), f"tools.{at}")
    return read_tool(told, "tools", (at,), parameters="input_schema", unread=unread)


def _tool_choice(value: Any) -> Block | None:
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _CHOICES:
        got = f"type {shown(kind)}" if isinstance(value, dict) else shown(value)
        raise Wrong(f"an object of type {', '.join(_CHOICES)} is needed, got {got}")
    if kind == "tool" and not isinstance(value.get("name"), str):
        raise Wrong(f"a string is needed, got {shown(value.get('name'))}", "name")
    if not isinstance(value.get("disable_parallel_tool_use"), bool | None):
        raise Wrong(f"true or false is needed, got {shown(value['disable_parallel_tool_use'])}", "disable_parallel_tool_use")
    return value  # type: ignore[no-any-return]


def _thinking(value: Any) -> Block | None:
    if value is not None and (not isinstance(value, dict) or value.get("type") not in _THINKING):
        got = f"type {shown(value.get('type'))}" if isinstance(value, dict) else shown(value)
        raise Wrong(f"an object of type {', '.join(_THINKING)} is needed, got {got}")
    return value


def _format(value: Any, *place: str) -> Block | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("type") != "json_schema":
        got = f"type {shown(value.get('type'))}" if isinstance(value, dict) else shown(value)
        raise Wrong(f"an object of type json_schema is needed, got {got}", *place)
    if not isinstance(value.get("schema"), dict):
        raise Wrong(f"a JSON Schema is needed, got {shown(value.get('schema'))}", *place, "schema")
    return value


def _output_config(value: Any) -> Block | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise Wrong(f"an object is needed, got {shown(value)}")
    if not isinstance(value.get("effort"), str | None):
        raise Wrong(f"a string is needed, got {shown(value['effort'])}", "effort")
    _format(value.get("format"), "format")
    return value


def _context_edits(value: Any) -> Any:
    """Thoughts are the template's to drop or keep: edits of those that clear none ask for nothing."""
    edits = value.get("edits") if isinstance(value, dict) and value.keys() == {"edits"} else None
    if isinstance(edits, list) and all(
        isinstance(edit, dict) and str(edit.get("type")).startswith("clear_thinking_") and edit.get("keep") == "all"
        for edit in edits
    ):
        return None
    return value


class InputMessage(Body):
    """What a message is to the OpenAPI document."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


_Messages = Annotated[
    list[Message], PlainValidator(_messages, json_schema_input_type=Annotated[list[InputMessage], Field(min_length=1)])
]
_System = Annotated[str | None, PlainValidator(_system, json_schema_input_type=str | list[Block] | None)]
_Tools = Annotated[list[Tool], PlainValidator(_tools, json_schema_input_type=list[Block] | None)]
_Object = Block | None
_ToolChoice = Annotated[_Object, PlainValidator(_tool_choice, json_schema_input_type=_Object)]
_Thinking = Annotated[_Object, PlainValidator(_thinking, json_schema_input_type=_Object)]
_OutputConfig = Annotated[_Object, PlainValidator(_output_config, json_schema_input_type=_Object)]
_OutputFormat = Annotated[_Object, PlainValidator(_format, json_schema_input_type=_Object)]


# --- bodies


class MessagesBody(Body):
    """What both routes take."""

    messages: _Messages
    system: _System = None
    tools: _Tools = Field(default_factory=list)
    tool_choice: _ToolChoice = None
    thinking: _Thinking = None
    output_config: _OutputConfig = None
    output_format: _OutputFormat = None
    """What `output_config.format` was called before."""

    cache_control: _Object = None
    speed: str | None = None

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        self.toolbox()
        return self

    def unread(self) -> Iterator[str]:
        yield from super().unread()
        yield from unread_tools(self.tools)
        for name, known in _KNOWN.items():
            yield from others(getattr(self, name), known, name)
        yield from others((self.output_config or {}).get("format"), _KNOWN["output_format"], "output_config.format")

    def toolbox(self) -> Toolbox:
        """Raises Wrong."""
        choice = self.tool_choice or {"type": "auto"}
        return choose(
            self.tools,
            _CHOICES[choice["type"]],
            choice["name"] if choice["type"] == "tool" else None,
            is_parallel=not choice.get("disable_parallel_tool_use"),
            field="tool_choice",
        )

    def dialogue(self) -> Dialogue:
        """With an assistant's last message to be continued, unless it is blank. White space at its end is not: most write
        that as part of the next token."""
        turns = list(_turns(self.messages))
        if self.system:
            turns.insert(0, Turn(role="system", content=self.system))
        if turns[-1].role == "assistant":
            last = turns.pop()
            if text := last.text().rstrip():
                turns.append(last.model_copy(update={"content": text}))
        return Dialogue(
            turns=turns,
            toolbox=self.toolbox(),
            names=self._names(),
            continue_final=bool(turns) and turns[-1].role == "assistant",
        )

    def _names(self) -> Block:
        """What the template is told besides."""
        found: Block = {}
        if self._thinking_type in ("enabled", "disabled"):
            found["enable_thinking"] = self._thinking_type == "enabled"
        effort = (self.output_config or {}).get("effort")
        return found if effort is None else found | {"reasoning_effort": effort}

    @property
    def _thinking_type(self) -> str | None:
        return (self.thinking or {}).get("type")


class MessagesRequest(MessagesBody, Talk):
    """`POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE]
    stop_sequences: Stop = None

    metadata: _Object = None
    service_tier: str | None = None
    inference_geo: str | None = None
    diagnostics: _Object = None

    container: Any = None
    mcp_servers: Any = None
    context_management: Annotated[Any, BeforeValidator(_context_edits)] = None

    @model_validator(mode="after")
    def _check_messages(self) -> Self:
        self.structure()
        self.check_min_tokens("max_tokens", self.max_tokens)
        return self

    def structure(self) -> Structure | None:
        given = {"output_config.format": (self.output_config or {}).get("format"), "output_format": self.output_format}
        found = [(name, form) for name, form in given.items() if form is not None]
        if not found:
            return None
        if len(found) > 1:
            raise Wrong(f"a text has one structure; {found[0][0]} asks for another", found[1][0])
        name, form = found[0]
        return of_schema(form["schema"], f"{name}.schema")

    @property
    def stop_strings(self) -> list[str] | None:
        return self.stop_sequences

    @property
    def shows_stop(self) -> bool:
        """So that the answer can say which one was found; it takes it out of the text."""
        return True

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def tells_thoughts(self) -> bool:
        return self._thinking_type != "disabled" and (self.thinking or {}).get("display") != "omitted"


class CountTokensRequest(MessagesBody):
    """`POST /v1/messages/count_tokens`."""

    model: Annotated[str, Field(max_length=1024)]

    def text_fields(self) -> list[str]:
        """Names of what only a tokenizer can read."""
        return ["messages"]


# --- messages as turns


def _turns(messages: Iterable[Message]) -> Iterator[Turn]:
    """Messages of one role in a row are one, as templates want it that know no others."""
    tool_names: dict[str, str] = {}
    for role, same in groupby(messages, key=lambda message: message.role):
        blocks = [block for message in same for block in message.blocks]
        if role == "assistant":
            tool_names |= {block["id"]: block["name"] for block in blocks if block["type"] == "tool_use"}
            yield _answer(blocks)
            continue
        for kind, run in groupby(blocks, key=lambda block: block["type"]):
            if kind == "text":
                yield Turn(role=role, content=_joined(run))
            else:
                yield from (_result(block, tool_names) for block in run)
        if not blocks:
            yield Turn(role=role, content="")


def _answer(blocks: Sequence[Block]) -> Turn:
    calls = [
        {
            "id": block["id"],
            "type": "function",
            "function": {"name": block["name"], "arguments": json.dumps(block.get("input") or {}, ensure_ascii=False)},
        }
        for block in blocks
        if block["type"] == "tool_use"
    ]
    thoughts = "".join(block["thinking"] for block in blocks if block["type"] == "thinking")
    return Turn(
        role="assistant",
        content="".join(block["text"] for block in blocks if block["type"] == "text"),
        tool_calls=calls or None,
        reasoning_content=thoughts or None,
    )


def _result(block: Block, tool_names: dict[str, str]) -> Turn:
    content = block.get("content")
    text = content if isinstance(content, str) else _joined(content or ())
    return Turn(role="tool", content=text, tool_call_id=block["tool_use_id"], name=tool_names.get(block["tool_use_id"]))


def _joined(blocks: Iterable[Block]) -> str:
    """Blocks that somebody else than the model wrote are texts of their own."""
    return "\n".join(block["text"] for block in blocks)
