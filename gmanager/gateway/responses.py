"""Bodies of `/v1/responses`: OpenAI's newer form of a conversation, text only. Nothing is kept: a client sends all of it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import Field, PlainValidator, model_validator

from gmanager.gateway.conversation import Dialogue, Turn, read_content
from gmanager.gateway.fields import WHOLE, Stop, Wrong, others
from gmanager.gateway.reading import shown
from gmanager.gateway.sampling import NEUTRAL, StreamOptions, Talk
from gmanager.gateway.structure import ANY_OBJECT, Structure, of_schema
from gmanager.gateway.toolbox import Tool, Toolbox, choose, read_tool
from gmanager.wire.messages import MAX_LOGPROBS

_ROLES = ("user", "assistant", "system", "developer")
_FORMATS = {"text": ("type",), "json_object": ("type",), "json_schema": ("type", "name", "description", "schema", "strict")}
"""Types of `text.format`, and what each has."""
_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (
    _LOGPROBS,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)
"""What OpenAI knows; of all but the first there is nothing here."""

T = TypeVar("T")


def _input(value: Any) -> list[Turn]:
    if isinstance(value, str):
        return [Turn(role="user", content=value)]
    if not isinstance(value, list) or not value:
        raise Wrong(f"a string or a list of items is needed, got {shown(value)}")
    turns: list[dict[str, Any]] = []
    thoughts: str | None = None
    for at, item in enumerate(value):
        if not isinstance(item, dict):
            raise Wrong(f"an item is an object, got {shown(item)}", at)
        kind = item.get("type") or "message"
        if kind == "reasoning":
            thoughts = _thoughts(item, at)
            continue
        turn = _turn(item, kind, at)
        if thoughts is not None and turn["role"] == "assistant":
            turn["reasoning_content"] = thoughts
            thoughts = None
        if kind == "function_call" and turns and turns[-1]["role"] == "assistant":
            turns[-1].setdefault("tool_calls", []).extend(turn["tool_calls"])
        else:
            turns.append(turn)
    return [Turn.model_validate(turn) for turn in turns]


def _turn(item: dict[str, Any], kind: Any, at: int) -> dict[str, Any]:
    """An item as a message. Raises Wrong."""
    if kind == "message":
        if item.get("role") not in _ROLES:
            raise Wrong(f"the roles are {', '.join(_ROLES)}; got {shown(item.get('role'))}", at, "role")
        return {"role": item["role"], "content": _within((at, "content"), read_content, item.get("content"))}
    if kind == "function_call":
        call_id, name, arguments = (_text(item, field, at) for field in ("call_id", "name", "arguments"))
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        content = _within((at, "output"), read_content, item.get("output"))
        return {"role": "tool", "tool_call_id": _text(item, "call_id", at), "content": content}
    if kind == "item_reference":
        raise Wrong("nothing is kept here that could be referred to: send the item itself", at)
    raise Wrong(f"the types are message, function_call, function_call_output, reasoning; got {shown(kind)}", at, "type")


def _thoughts(item: dict[str, Any], at: int) -> str:
    """Of a reasoning item: what it says, or else its summary."""
    for name in ("content", "summary"):
        parts = item.get(name) or []
        if not isinstance(parts, list) or not all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
        ):
            raise Wrong(f"a list of parts with a text is needed, got {shown(parts)}", at, name)
        if parts:
            return "\n".join(part["text"] for part in parts)
    return ""


def _text(item: dict[str, Any], field: str, at: int) -> str:
    if not isinstance(item.get(field), str):
        raise Wrong(f"a string is needed, got {shown(item.get(field))}", at, field)
    text: str = item[field]
    return text


def _within(place: tuple[str | int, ...], read: Callable[[Any], T], value: Any) -> T:
    """Raises Wrong with the whole place."""
    try:
        return read(value)
    except Wrong as error:
        raise Wrong(str(error), *place, *error.place) from None


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
    bare = [{name: item for name, item in tool.items() if name != "type"} for tool in value]
    return [read_tool(tool, "tools", (at,)) for at, tool in enumerate(bare)]


def _tool_choice(value: Any) -> Any:
    if isinstance(value, dict):
        if value.get("type") != "function" or not isinstance(value.get("name"), str):
            raise Wrong('an object of type "function" with a name is needed')
        return value
    if value not in (None, "auto", "none", "required"):
        raise Wrong(f'"auto", "none", "required" or an object that names a function is needed, got {shown(value)}')
    return value


def _reasoning(value: Any) -> dict[str, Any]:
    return _with_setting(value, "effort")


def _text_settings(value: Any) -> dict[str, Any]:
    return _with_setting(value, "verbosity")


def _with_setting(value: Any, name: str) -> dict[str, Any]:
    """An object, in which `name` is what the template is told."""
    if not isinstance(value, dict | None):
        raise Wrong(f"an object is needed, got {shown(value)}")
    found = value or {}
    if not isinstance(found.get(name), str | None):
        raise Wrong(f"a string is needed, got {shown(found[name])}", name)
    return found


_Item = dict[str, Any]
_Reasoning = Annotated[dict[str, Any], PlainValidator(_reasoning, json_schema_input_type=_Item | None)]
_TextSettings = Annotated[dict[str, Any], PlainValidator(_text_settings, json_schema_input_type=_Item | None)]
_ItemsSchema = str | Annotated[list[_Item], Field(min_length=1)]


class ResponsesRequest(Talk):
    """`POST /v1/responses`."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL | {
        "previous_response_id": (None,),
        "conversation": (None,),
        "background": (None, False),
        "prompt": (None,),
        "truncation": (None, "disabled"),
        "context_management": (None, []),
    }

    input: Annotated[list[Turn], PlainValidator(_input, json_schema_input_type=_ItemsSchema)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    tools: Annotated[list[Tool], PlainValidator(_tools, json_schema_input_type=list[_Item] | None)] = Field(
        default_factory=list
    )
    tool_choice: Annotated[Any, PlainValidator(_tool_choice, json_schema_input_type=str | _Item | None)] = None
    parallel_tool_calls: bool | None = True
    text: _TextSettings = Field(default_factory=dict)
    reasoning: _Reasoning = Field(default_factory=dict)
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    stop: Stop = None
    chat_template_kwargs: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None

    metadata: dict[str, Any] | None = None
    user: str | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: Annotated[int, WHOLE] | None = None

    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    prompt: Any = None
    truncation: Any = None
    context_management: Any = None

    @model_validator(mode="after")
    def _check_response(self) -> Self:
        self.structure()
        self.toolbox()
        self.check_min_tokens("max_output_tokens", self.max_output_tokens)
        return self

    def unread(self) -> Iterator[str]:
        yield from super().unread()
        yield from others(self.tool_choice, ("type", "name"), "tool_choice")
        yield from others(self.reasoning, ("effort", "summary", "generate_summary"), "reasoning")
        yield from others(self.text, ("format", "verbosity"), "text")
        if (form := self.text.get("format")) is not None:
            yield from others(form, _FORMATS[form["type"]], "text.format")
        yield from (f"include.{name}" for name in self.include or () if name not in _INCLUDABLE)

    def toolbox(self) -> Toolbox:
        """Raises Wrong."""
        is_named = isinstance(self.tool_choice, dict)
        return choose(
            self.tools,
            "auto" if is_named else self.tool_choice or "auto",
            self.tool_choice["name"] if is_named else None,
            is_parallel=self.parallel_tool_calls is not False,
            field="tool_choice",
        )

    def dialogue(self) -> Dialogue:
        told = {"reasoning_effort": self.reasoning.get("effort"), "verbosity": self.text.get("verbosity")}
        names = {name: value for name, value in told.items() if value is not None}
        before = [] if self.instructions is None else [Turn(role="system", content=self.instructions)]
        return Dialogue(
            turns=[*before, *self.input],
            toolbox=self.toolbox(),
            names=names | (self.chat_template_kwargs or {}),
            field="input",
        )

    def structure(self) -> Structure | None:
        form = self.text.get("format")
        if form is None:
            return None
        kind = form.get("type") if isinstance(form, dict) else None
        if not isinstance(kind, str) or kind not in _FORMATS:
            of = f"type {shown(kind)}" if isinstance(form, dict) else shown(form)
            raise Wrong(f"an object of type {', '.join(_FORMATS)} is needed, got {of}", "text", "format")
        if kind == "text":
            return None
        return of_schema(ANY_OBJECT if kind == "json_object" else form.get("schema"), "text.format.schema")

    @property
    def most_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def stop_strings(self) -> list[str] | None:
        return self.stop

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs or _LOGPROBS in (self.include or ()):
            return self.top_logprobs or 0
        return None
