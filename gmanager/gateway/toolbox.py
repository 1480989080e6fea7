"""Tools as clients define them: what a template is told of them, what an answer that must call one is, and how they are written
for a model whose template knows none. Pure.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gmanager.gateway.fields import Wrong
from gmanager.gateway.reading import shown
from gmanager.gateway.structure import Structure
from gmanager.gateway.tools import Format
from gmanager.wire.messages import StructuredOutputsParams

MAX_NAME_CHARS = 256
TEXT_FORMAT: Format = "hermes"
"""How a model is asked to call (`as_text`) if its template knows no tools: as most have seen it."""

Json = dict[str, Any]
_ANY_OBJECT: Json = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    field: str
    """Where the request has its parameters."""
    function: Json
    """As OpenAI's chat has it: `name`, and perhaps `description`, `parameters`, and more."""
    unread: Sequence[str] = ()
    """Names in the request beside it that nobody reads."""

    @property
    def schema(self) -> Json:
        """Of its arguments, which are always an object."""
        schema: Json = self.function.get("parameters") or _ANY_OBJECT
        return schema if "type" in schema or "$ref" in schema else schema | _ANY_OBJECT

    def to_template(self) -> Json:
        return {"type": "function", "function": self.function}


@dataclass(frozen=True, slots=True)
class Toolbox:
    """Tools of a request, and how they may be used."""

    tools: Sequence[Tool] = ()
    choice: Literal["auto", "none", "required"] = "auto"
    named: str | None = None
    """The one that must be called."""
    is_parallel: bool = True
    """More than one call may be in an answer."""

    @property
    def usable(self) -> Sequence[Tool]:
        """Those that the model is told of."""
        return () if self.choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        return self.named is not None or self.choice == "required"

    def structure(self, asked: Structure | None) -> Structure | None:
        """What the text must be. `asked`: what the request says besides, of an answer that calls nothing.

        Where a call is possible and JSON is asked for, the text is either a list of calls or that JSON.
        """
        if self.named is not None:
            tool = next(tool for tool in self.tools if tool.name == self.named)
            return Structure(tool.field, StructuredOutputsParams(json=_dumps(tool.schema)))
        if self.must_call:
            return Structure("tools", StructuredOutputsParams(json=_dumps(self._calls())))
        if asked is None or asked.params.json is None or not self.usable:
            return asked
        calls = self._calls()
        answer = json.loads(asked.params.json)
        definitions = calls.pop("$defs") | {"answer": _moved(answer, "#/$defs/answer")}
        either = {"anyOf": [calls, {"$ref": "#/$defs/answer"}], "$defs": definitions}
        return Structure(asked.field, StructuredOutputsParams(json=_dumps(either)))

    def _calls(self) -> Json:
        """The schema of a list of calls. Each tool's own is a definition of it, so that what it refers to is found there."""
        names = {f"tool{at}": tool for at, tool in enumerate(self.tools)}
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "parameters": {"$ref": f"#/$defs/{name}"}},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for name, tool in names.items()
        ]
        most = {} if self.is_parallel else {"maxItems": 1}
        definitions = {name: _moved(tool.schema, f"#/$defs/{name}") for name, tool in names.items()}
        return {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions} | most


def read_tool(
    function: Any, field: str, place: Sequence[str | int], *, parameters: str = "parameters", unread: Iterable[str] = ()
) -> Tool:
    """A function as a client has written it at `place` (of its field), which the request calls `field`. `parameters`: the name
    of the schema. Raises Wrong."""
    if not isinstance(function, dict):
        raise Wrong(f"an object with a name is needed, got {shown(function)}", *place)
    name = function.get("name")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_CHARS:
        raise Wrong(f"a string of 1 to {MAX_NAME_CHARS} characters is needed, got {shown(name)}", *place, "name")
    if not isinstance(function.get("description"), str | None):
        raise Wrong(f"a string is needed, got {shown(function['description'])}", *place, "description")
    schema = function.get(parameters)
    if not isinstance(schema, dict | None):
        raise Wrong(f"a JSON Schema is needed, got {shown(schema)}", *place, parameters)
    if schema is not None and schema.get("type", "object") != "object":
        raise Wrong(f"arguments are an object, got {shown(schema['type'])}", *place, parameters, "type")
    kept = {key: value for key, value in function.items() if value is not None and key != parameters}
    if schema is not None:
        kept["parameters"] = schema
    return Tool(name, ".".join(map(str, (field, *place, parameters))), kept, tuple(unread))


def unread_tools(tools: Iterable[Tool]) -> Iterator[str]:
    """Names in tools that nobody reads."""
    for tool in tools:
        yield from tool.unread


def choose(
    tools: Sequence[Tool], choice: Literal["auto", "none", "required"], named: str | None, *, is_parallel: bool, field: str
) -> Toolbox:
    """Raises Wrong, at `field`, for a choice that there is no tool for."""
    if named is not None and all(tool.name != named for tool in tools):
        there_are = f"there are {', '.join(tool.name for tool in tools)[:200]}" if tools else "there are no tools"
        raise Wrong(f"no tool is called {shown(named)}; {there_are}", field)
    if choice == "required" and not tools:
        raise Wrong("a call needs tools, and there are none", field)
    return Toolbox(tools, choice, named, is_parallel)


def as_text(tools: Sequence[Tool]) -> str:
    """For the system message of a model whose template knows no tools."""
    lines = "\n".join(json.dumps(tool.to_template(), ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou may call these functions. Each line between <tools> and </tools> is the signature of one:\n"
        f"<tools>\n{lines}\n</tools>\n\n"
        "To call a function, write a JSON object with its name and arguments between <tool_call> and </tool_call>:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
    )


def without_roles(messages: Sequence[Json], tools: Sequence[Tool]) -> list[Json]:
    """Messages, as templates read them, for one that knows no tools: all that is said of tools and calls as text of the roles
    that it knows."""
    found: list[Json] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if found and found[-1].get("is_response"):
                found[-1]["content"] += "\n" + text
            else:
                found.append({"role": "user", "content": text, "is_response": True})
        elif calls := message.get("tool_calls"):
            parts = [message["content"], *(f"<tool_call>\n{_as_written(call)}\n</tool_call>" for call in calls)]
            kept = {name: value for name, value in message.items() if name != "tool_calls"}
            found.append(kept | {"content": "\n".join(filter(None, parts))})
        else:
            found.append(dict(message))
    for message in found:
        message.pop("is_response", None)
    if tools and found and found[0]["role"] in ("system", "developer"):
        found[0]["content"] = "\n\n".join(filter(None, (found[0]["content"], as_text(tools))))
    elif tools:
        found.insert(0, {"role": "system", "content": as_text(tools)})
    return found


def _as_written(call: Json) -> str:
    function = call["function"]
    return _dumps({"name": function["name"], "arguments": function.get("arguments") or {}})


def _moved(schema: Any, to: str) -> Any:
    """A schema that stood at the root and now stands at `to`: what it refers to has moved with it."""
    if isinstance(schema, list):
        return [_moved(item, to) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: to + value[1:] if name == "$ref" and isinstance(value, str) and value.startswith("#") else _moved(value, to)
        for name, value in schema.items()
    }


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
