"""Tools as clients use them, with the real `openai` package: loops, every choice, streams, thoughts."""

import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from gmanager.gateway.habits import habits_of
from gmanager.gateway.reply import Reply, ReplyForm, ReplyReader, ThoughtDelta, read, reply_form
from gmanager.gateway.toolbox import Toolbox, read_tool, without_roles
from gmanager.gateway.tools import ContentDelta
from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import serve
from tests.support.tiny import make_model, make_tokenizer

TURNS: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a place.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Ulm", "Bonn"]}, "days": {"$ref": "#/$defs/Days"}},
            "required": ["place", "days"],
            "additionalProperties": False,
            "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "now"}}
ARGUMENTS = re.compile(r'\{"place": ?"(Ulm|Bonn)", ?"days": ?[1-9]\}')


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model("llama", tmp_path_factory.mktemp("ends"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 93}))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return path


@pytest.fixture
async def client(farm: Farm, llama: Path) -> AsyncIterator[AsyncOpenAI]:
    async with (
        serve(farm, 1, Setup(model=llama, served_model_name="tiny", kv_tokens=8192)) as service,
        gateway(service.server.address) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_a_loop_of_calls_and_results(client: AsyncOpenAI) -> None:
    """Messages go back as openai's own `model_dump` writes them."""
    turns: Any = list(TURNS)
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer = await client.chat.completions.create(
            model="tiny", messages=turns, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, seed=1, max_tokens=200
        )
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        assert message.content is None
        (call,) = message.tool_calls or ()
        assert call.type == "function" and call.function.name == "weather"
        assert ARGUMENTS.fullmatch(call.function.arguments)
        turns += [message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "warm"}]
    last = await client.chat.completions.create(
        model="tiny", messages=turns, tools=[WEATHER], tool_choice="none", max_tokens=9, extra_body={"ignore_eos": True}
    )
    assert last.choices[0].message.tool_calls is None
    assert last.choices[0].finish_reason == "length"


async def test_streams_hold_what_whole_answers_do(client: AsyncOpenAI) -> None:
    for seed in range(3):
        asked: Any = {"model": "tiny", "messages": TURNS, "tools": [WEATHER, TIME], "tool_choice": "required", "seed": seed}
        whole = (await client.chat.completions.create(**asked, max_tokens=100)).choices[0]
        stream = client.chat.completions.stream(**asked, max_tokens=100)
        async with stream as events:
            streamed = (await events.get_final_completion()).choices[0] if whole.finish_reason != "length" else None
        calls = [
            (call.function.name, call.function.arguments)
            for call in whole.message.tool_calls or ()
            if hasattr(call, "function")
        ]
        assert calls
        if streamed is None:
            continue
        assert streamed.finish_reason == whole.finish_reason == "tool_calls"
        assert [(c.function.name, c.function.arguments) for c in streamed.message.tool_calls or ()] == calls
        for name, arguments in calls:
            assert name == "now" or ARGUMENTS.fullmatch(arguments)


async def test_either_calls_or_the_json_that_was_asked_for(client: AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    kinds = set()
    for seed in range(12):
        answer = await client.chat.completions.create(
            model="tiny", messages=TURNS, tools=[WEATHER], response_format=form, seed=seed, temperature=3, max_tokens=200
        )
        message = answer.choices[0].message
        kinds.add(message.tool_calls is None)
        if message.tool_calls:
            assert message.content is None
        else:
            assert json.loads(message.content or "") in ({"a": 1}, {"a": 2})
    assert kinds == {True, False}


async def test_thoughts_come_before_calls_and_structures(farm: Farm, llama: Path, tmp_path: Path) -> None:
    """The model is pushed to end its thoughts, and still more to end its text; only the answer is held to the grammar."""
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template += "<think>\n{# </think> #}"
    tokenizer.save_pretrained(model)
    asked: Any = {"model": "tiny", "messages": TURNS, "max_tokens": 200, "logit_bias": {"257": 4, "93": 6}}
    thoughts = []
    async with (
        serve(farm, 1, Setup(model=model, served_model_name="tiny", kv_tokens=8192)) as service,
        gateway(service.server.address) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        for seed in range(3):
            called = await client.chat.completions.create(tools=[WEATHER], tool_choice="required", seed=seed, **asked)
            message: Any = called.choices[0].message
            thoughts.append(getattr(message, "reasoning_content", None))
            assert all(ARGUMENTS.fullmatch(call.function.arguments) for call in message.tool_calls)
            chosen = await client.chat.completions.create(seed=seed, extra_body={"guided_choice": ["left", "right"]}, **asked)
            assert chosen.choices[0].message.content in ("left", "right")
            assert chosen.choices[0].finish_reason == "stop"
        assert any(thoughts)
        hidden = await client.chat.completions.create(
            seed=3, extra_body={"guided_choice": ["left"], "include_reasoning": False}, **asked
        )
        assert hidden.choices[0].message.model_dump(exclude_unset=True) == {
            "role": "assistant", "content": "left", "refusal": None,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "param", "sentence"),
    [
        ({"tools": 3}, "tools", "a list of tools is needed, got 3"),
        ({"tools": [3]}, "tools.0", "a tool is an object, got 3"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", 'only tools of type "function" are served, got "web_search"'),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "an object with a name is needed, got null"),
        ({"tools": [{"function": {"name": ""}}]}, "tools.0.function.name", 'a string of 1 to 256 characters is needed, got ""'),
        ({"tools": [{"function": {"name": "f", "parameters": 1}}]}, "tools.0.function.parameters", "a JSON Schema is needed"),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools.0.function.parameters.type",
            'arguments are an object, got "array"',
        ),
        ({"tool_choice": "any"}, "tool_choice", '"auto", "none", "required" or an object .* got "any"'),
        ({"tool_choice": "required"}, "tool_choice", "a call needs tools, and there are none"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "with function.name is needed"),
        (
            {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            'no tool is called "g"; there are now',
        ),
        (
            {
                "tools": [TIME, {"function": {"name": "f", "parameters": {"properties": {"a": {"type": "objec"}}}}}],
                "tool_choice": "required",
            },
            "tools.1.function.parameters.properties.a.type",
            "400 - tools.1.function.parameters.properties.a.type: Invalid type: objec",
        ),
    ],
)
async def test_what_is_wrong_is_said(client: AsyncOpenAI, asked: dict[str, Any], param: str, sentence: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await client.chat.completions.create(model="tiny", messages=TURNS, extra_body=asked)
    assert raised.value.param == param
    assert re.search(sentence, raised.value.message, re.DOTALL), raised.value.message


# --- without a service ------------------------------------------------------------------------------------------------


def test_thoughts_are_told_apart_however_they_come() -> None:
    text = "<think>\nhm\n</think>\n\nSo <b>"
    form = ReplyForm(thinks=True)
    assert read(form, text) == Reply(content="So <b>", thoughts="hm\n")
    assert read(ReplyForm(thinks=True, is_opened=True), "hm</think> a") == Reply(content="a", thoughts="hm")
    assert read(form, " no thoughts") == Reply(content=" no thoughts")
    assert read(form, "<think>\n\n</think>\n\nx") == Reply(content="x")
    assert read(ReplyForm(thinks=True, tells_thoughts=False), text) == Reply(content="So <b>")
    for at in range(len(text) + 1):
        reader, reply = ReplyReader(form), Reply()
        for event in reader.push(text[:at], final=False) + reader.push(text[at:], final=True):
            reply.add(event)
        assert reply == read(form, text)


def test_calls_after_thoughts_and_only_the_first_if_they_may_not_be_several() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
    reply = read(ReplyForm(thinks=True, calls="hermes"), f"<think>x</think>\n{call}{call}")
    assert (reply.thoughts, reply.content) == ("x", "")
    assert [(c.name, c.arguments, c.is_complete) for c in reply.calls] == [("f", '{"a": 1}', True)] * 2
    first = read(ReplyForm(calls="hermes", is_parallel=False), call + call)
    assert [c.name for c in first.calls] == ["f"]
    reader = ReplyReader(ReplyForm(thinks=True, is_opened=True))
    assert reader.push("a</think>b", final=True) == [ThoughtDelta("a"), ContentDelta("b")]


def test_how_answers_are_read() -> None:
    qwen, plain = habits_of("{{ tools }} <tool_call> </think> developer"), habits_of("{{ messages }}")
    assert (qwen.calls, qwen.thinks, qwen.knows_developer) == ("hermes", True, True)
    assert (plain.calls, plain.thinks, plain.knows_developer) == (None, False, False)
    tools = [read_tool(TIME["function"], "tools", (0, "function"))]
    assert reply_form(qwen, Toolbox(), None, is_opened=False).calls is None
    assert reply_form(plain, Toolbox(tools), None, is_opened=False).calls == "hermes"
    assert reply_form(plain, Toolbox(tools, "none"), None, is_opened=False).is_plain
    forced = reply_form(qwen, Toolbox(tools, "auto", "now"), None, is_opened=True)
    assert (forced.calls, forced.function, forced.thinks) == ("json", "now", True)


def test_what_a_template_that_knows_no_tools_is_told() -> None:
    tools = [read_tool(TIME["function"], "tools", (0, "function"))]
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": {}}}
    given = [
        {"role": "user", "content": "when?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call, call]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
    ]
    system, user, assistant, results = without_roles(given, tools)
    assert system["role"] == "system" and '{"type": "function", "function": {"name": "now"}}' in system["content"]
    assert user == given[0]
    written = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert assistant == {"role": "assistant", "content": f"Let me see.\n{written}\n{written}"}
    assert results == {
        "role": "user",
        "content": "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>",
    }
    kept, _ = without_roles([{"role": "system", "content": "Be brief."}, TURNS[0]], tools)
    assert kept["content"].startswith("Be brief.\n\n# Tools")
    assert without_roles(TURNS, []) == TURNS
