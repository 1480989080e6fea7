"""Conversations as clients write them, and send the model's own answers back."""

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from gmanager.gateway.fields import Body, Wrong, others
from gmanager.gateway.habits import Habits
from gmanager.gateway.reading import shown
from gmanager.gateway.toolbox import Tool, Toolbox, choose, read_tool, unread_tools, without_roles
from gmanager.text.tokenizer import Tokenizer

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that are text, and where each has it."""

_MEDIA = {"image": "images aren't", "audio": "audio isn't", "video": "videos aren't", "file": "files aren't"}


def read_content(value: Any) -> str | list[Any] | None:
    """A message's content, as it is. Raises Wrong with the place in it."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise Wrong(f"a string, a list of parts or null is needed, got {shown(value)}")
    for at, part in enumerate(value):
        if not isinstance(part, str):
            _check_part(part, at)
    return value


def _check_part(part: Any, at: int) -> None:
    if not isinstance(part, dict):
        raise Wrong(f"a part is an object with a type, or a string, got {shown(part)}", at)
    if "type" not in part:
        raise Wrong("a part says its type, and this one has none", at)
    kind = part["type"]
    if isinstance(kind, str) and kind in TEXT_PARTS:
        if not isinstance(part.get(TEXT_PARTS[kind]), str):
            raise Wrong(f"a string is needed, got {shown(part.get(TEXT_PARTS[kind]))}", at, TEXT_PARTS[kind])
        return
    media = next((name for word, name in _MEDIA.items() if isinstance(kind, str) and word in kind), None)
    if media is not None:
        raise Wrong(f"{media} served, only text; this part is of type {shown(kind)}", at)
    raise Wrong(f"the types are {', '.join(TEXT_PARTS)}; got {shown(kind)}", at, "type")


def _audio(value: Any) -> None:
    if value is not None:
        raise Wrong("audio isn't served, only text")


def _calls(value: Any) -> list[dict[str, Any]] | None:
    """`tool_calls` of an answer that comes back: what the template is to find in each must be there."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise Wrong(f"a list of calls or null is needed, got {shown(value)}")
    for at, call in enumerate(value):
        if not isinstance(call, dict):
            raise Wrong(f"a call is an object, got {shown(call)}", at)
        _check_called(call.get("function"), at, "function")
    return value


def _function_call(value: Any) -> dict[str, Any] | None:
    """What `tool_calls` was before there were tools: one function, without an id."""
    if value is not None:
        _check_called(value)
    return value  # type: ignore[no-any-return]


def _check_called(function: Any, *place: str | int) -> None:
    if not isinstance(function, dict):
        raise Wrong(f"an object with a name is needed, got {shown(function)}", *place)
    if not isinstance(function.get("name"), str):
        raise Wrong(f"a string is needed, got {shown(function.get('name'))}", *place, "name")
    if not isinstance(function.get("arguments"), str | dict | None):
        raise Wrong(f"a JSON string is needed, got {shown(function['arguments'])}", *place, "arguments")


_Part = dict[str, Any]
_Content = Annotated[str | list[Any] | None, PlainValidator(read_content, json_schema_input_type=str | list[_Part] | None)]
_Audio = Annotated[None, PlainValidator(_audio, json_schema_input_type=None)]
_FunctionCall = Annotated[_Part | None, PlainValidator(_function_call, json_schema_input_type=_Part | None)]
_ToolCalls = Annotated[list[_Part] | None, PlainValidator(_calls, json_schema_input_type=list[_Part] | None)]


class Turn(Body):
    """One message. What isn't named here is the template's to know, and goes to it as it came."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: _Content = None
    name: str | None = None
    tool_calls: _ToolCalls = None
    function_call: _FunctionCall = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    audio: _Audio = None

    def to_template(self, *, knows_developer: bool = True) -> dict[str, Any]:
        """As templates read messages: the content a text, a call's arguments an object. `developer` is `system` to a template
        that doesn't know it; a `function_call` is the tool call that it was called later, and a `function` its result."""
        found: dict[str, Any] = {"role": self.role, "content": self.text()}
        if self.role == "developer" and not knows_developer:
            found["role"] = "system"
        if self.tool_calls:
            found["tool_calls"] = [_read_arguments(call) for call in self.tool_calls]
        elif self.function_call:
            call = {"id": _id_of(self.function_call["name"]), "type": "function", "function": self.function_call}
            found["tool_calls"] = [_read_arguments(call)]
        if self.role == "function":
            found |= {"role": "tool", "tool_call_id": _id_of(self.name or "")}
        for name in ("name", "tool_call_id", "reasoning_content", "reasoning"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return {name: value for name, value in (self.model_extra or {}).items() if value is not None} | found

    def text(self) -> str:
        """All text of it: its own content, or if there is none, why the model refused."""
        if self.content is None:
            return self.refusal or ""
        if isinstance(self.content, str):
            return self.content
        return "".join(part if isinstance(part, str) else part[TEXT_PARTS[part["type"]]] for part in self.content)


def _id_of(name: str) -> str:
    """Of a call that has none: its result names the function."""
    return f"call_{name}"


def _tools(value: Any) -> list[Tool]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise Wrong(f"a list of tools is needed, got {shown(value)}")
    for at, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise Wrong(f"a tool is an object, got {shown(tool)}", at)
        if tool.get("type", "function") != "function":
            raise Wrong(f'only tools of type "function" are served, got {shown(tool["type"])}', at, "type")
    return [
        read_tool(tool.get("function"), "tools", (at, "function"), unread=others(tool, ("type", "function"), f"tools.{at}"))
        for at, tool in enumerate(value)
    ]


def _tool_choice(value: Any) -> Any:
    if isinstance(value, dict):
        function = value.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if value.get("type") != "function" or not isinstance(name, str):
            raise Wrong('an object of type "function" with function.name is needed')
        return value
    if value not in (None, "auto", "none", "required"):
        raise Wrong(f'"auto", "none", "required" or an object that names a function is needed, got {shown(value)}')
    return value


Tools = Annotated[list[Tool], PlainValidator(_tools, json_schema_input_type=list[_Part] | None)]
ToolChoice = Annotated[
    Any, PlainValidator(_tool_choice, json_schema_input_type=Literal["auto", "none", "required"] | _Part | None)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """What goes into the chat template, whichever route it came by."""

    turns: Sequence[Turn]
    toolbox: Toolbox = field(default_factory=Toolbox)
    names: Mapping[str, Any] = field(default_factory=dict)
    """What the template is told besides."""
    add_generation_prompt: bool = True
    continue_final: bool = False
    """The answer goes on with the last message."""
    field: str = "messages"
    """What the request calls it."""


class Conversation(Body):
    """A conversation as OpenAI's chat has it."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        self.toolbox()
        return self

    def toolbox(self) -> Toolbox:
        """Raises Wrong."""
        is_named = isinstance(self.tool_choice, dict)
        return choose(
            self.tools,
            "auto" if is_named else self.tool_choice or "auto",
            self.tool_choice["function"]["name"] if is_named else None,
            is_parallel=self.parallel_tool_calls is not False,
            field="tool_choice",
        )

    def unread(self) -> Iterator[str]:
        yield from super().unread()
        yield from unread_tools(self.tools)
        yield from others(self.tool_choice, ("type", "function"), "tool_choice")

    def names(self) -> dict[str, Any]:
        """What the template is told besides."""
        return dict(self.chat_template_kwargs or {})

    def dialogue(self) -> Dialogue:
        return Dialogue(
            turns=self.messages,
            toolbox=self.toolbox(),
            names=self.names(),
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final=self.continue_final_message is True,
        )


async def encode(tokenizer: Tokenizer, given: Dialogue, habits: Habits, *, trust_special: bool) -> "array[int]":
    """Token ids of a conversation: the one place where conversations meet the tokenizer. Raises TextError."""
    messages = [turn.to_template(knows_developer=habits.knows_developer) for turn in given.turns]
    names = dict(given.names)
    if habits.calls is None:
        messages = without_roles(messages, given.toolbox.usable)
    elif given.toolbox.usable:
        names["tools"] = [tool.to_template() for tool in given.toolbox.usable]
    return await tokenizer.encode_chat(
        messages,
        names=names,
        add_generation_prompt=given.add_generation_prompt,
        continue_final=given.continue_final,
        trust_special=trust_special,
    )


def _read_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (json.JSONDecodeError, RecursionError):
            return call  # the model's own words; the template may still write them
    return call | {"function": function | {"arguments": arguments}}
