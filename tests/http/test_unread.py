"""Names within a request's objects that nobody reads are known as such, so that a gateway can tell of them."""

from typing import Any

import pytest

from gmanager.gateway.fields import Body
from gmanager.gateway.messages import CountTokensRequest, MessagesRequest
from gmanager.gateway.responses import ResponsesRequest
from gmanager.gateway.schemas import ChatRequest, CompletionRequest, TokenizeRequest

TURNS = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"unknown": {}}}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True, "told to the template": 1}
CHAT = {"model": "m", "messages": TURNS, "tools": [{"type": "function", "function": FUNCTION}]}
RESPONSES = {"model": "m", "input": "hi", "tools": [{"type": "function"} | FUNCTION]}
CLAUDE = {"name": "f", "description": "d", "input_schema": SCHEMA, "type": "custom", "cache_control": {"type": "ephemeral"}}
MESSAGES = {"model": "m", "max_tokens": 1, "messages": TURNS, "tools": [CLAUDE]}


def formatted(kind: str, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": kind} | more}


@pytest.mark.parametrize(
    ("kind", "body", "names"),
    [
        (ChatRequest, CHAT | {"tool_choice": {"type": "function", "function": {"name": "f"}}}, []),
        (ChatRequest, CHAT | formatted("json_schema", json_schema={"name": "n", "schema": SCHEMA, "strict": True}), []),
        (ChatRequest, CHAT | formatted("json_object", schema=SCHEMA), []),
        (ChatRequest, CHAT | formatted("text", json_schema={"x": 1}), ["response_format.json_schema"]),
        (ChatRequest, CHAT | formatted("json_object", json_schema={}), ["response_format.json_schema"]),
        (
            CompletionRequest,
            {"model": "m", "prompt": "p"} | formatted("json_schema", json_schema={"schema": SCHEMA, "x": 1}, strict=True),
            ["response_format.strict", "response_format.json_schema.x"],
        ),
        (ChatRequest, CHAT | {"tools": [{"function": FUNCTION}, {"function": FUNCTION, "strict": True}]}, ["tools.1.strict"]),
        (
            ChatRequest,
            CHAT | {"tool_choice": {"type": "function", "function": {"name": "f"}, "x": 1}},
            ["tool_choice.x"],
        ),
        (TokenizeRequest, {"messages": TURNS, "tools": [{"function": FUNCTION, "x": 1}]}, ["tools.0.x"]),
        (
            ResponsesRequest,
            RESPONSES
            | {
                "text": {"verbosity": "low", "format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}},
                "reasoning": {"effort": "low", "summary": "auto"},
                "include": ["reasoning.encrypted_content"],
                "tool_choice": {"type": "function", "name": "f"},
            },
            [],
        ),
        (
            ResponsesRequest,
            RESPONSES
            | {
                "text": {"a": 1, "format": {"type": "json_object", "schema": SCHEMA}},
                "reasoning": {"b": 1},
                "include": ["c"],
                "tool_choice": {"type": "function", "name": "f", "d": 1},
            },
            ["tool_choice.d", "reasoning.b", "text.a", "text.format.schema", "include.c"],
        ),
        (
            MessagesRequest,
            MESSAGES
            | {
                "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
                "thinking": {"type": "enabled", "budget_tokens": 9, "display": "omitted"},
                "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
            },
            [],
        ),
        (
            MessagesRequest,
            MESSAGES
            | {
                "tools": [CLAUDE | {"a": 1}],
                "tool_choice": {"type": "auto", "b": 1},
                "thinking": {"type": "adaptive", "c": 1},
                "output_config": {"d": 1, "format": {"type": "json_schema", "schema": SCHEMA, "e": 1}},
            },
            ["tools.0.a", "tool_choice.b", "thinking.c", "output_config.d", "output_config.format.e"],
        ),
        (
            MessagesRequest,
            MESSAGES | {"output_format": {"type": "json_schema", "schema": SCHEMA, "name": "n"}},
            ["output_format.name"],
        ),
        (CountTokensRequest, {"model": "m", "messages": TURNS, "tools": [CLAUDE | {"a": 1}], "b": 1}, ["b", "tools.0.a"]),
    ],
)
def test_what_nobody_reads_is_named(kind: type[Body], body: dict[str, Any], names: list[str]) -> None:
    assert list(kind.model_validate(body).unread()) == names
