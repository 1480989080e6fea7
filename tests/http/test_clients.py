"""Clients that people use, against the default model with nothing but the address changed: each runs a loop of tool calls and
gets an answer by a JSON schema. What must be valid is held to it by grammars, however small the model is; what it says besides
is the same each time: all requests have a seed."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

from instance.checkpoint import resolve_checkpoint
from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import serve

CACHE = Path(__file__).resolve().parents[2] / ".cache"
NAME = "smol"
ASKED = "What is the weather in Ulm?"


class Weather(BaseModel):
    """The weather of a place."""

    place: Literal["Ulm", "Bonn"] = Field(description="where")
    days: Literal[1, 2, 3]


class Report(BaseModel):
    sky: Literal["clear", "grey"]
    is_warm: bool


SCHEMA: Any = Weather.model_json_schema()
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Of a place.", "parameters": SCHEMA}}
RESULT = "grey, 12 degrees"
SEED: Any = {"seed": 1}


@pytest.fixture(scope="session")
def model() -> Path:
    (file,) = (CACHE / "model").glob("*.gguf")
    return resolve_checkpoint(str(file), cache_dir=CACHE / "converted")


@pytest.fixture
async def url(farm: Farm, model: Path) -> AsyncIterator[str]:
    async with (
        serve(farm, 1, Setup(model=model, served_model_name=NAME, kv_tokens=4096, chunk_tokens=512)) as service,
        gateway(service.server.address) as url,
    ):
        yield url


@pytest.fixture(scope="session")
def clients() -> SimpleNamespace:
    """Those that take seconds to import: the gManager, which runs in this process, must not wait for that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or else it fetches one
        import langchain_core.messages as messages
        import langchain_openai
        import litellm
    return SimpleNamespace(messages=messages, langchain=langchain_openai, litellm=litellm)


async def test_openai(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        turns: Any = [{"role": "user", "content": ASKED}]
        answer = await client.chat.completions.create(
            model=NAME, messages=turns, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=80, **SEED
        )
        message = answer.choices[0].message
        (call,) = message.tool_calls or ()
        assert call.type == "function"
        Weather.model_validate_json(call.function.arguments)
        turns += [message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
        said = await client.chat.completions.create(model=NAME, messages=turns, tools=[TOOL], max_tokens=8, temperature=0)
        assert said.choices[0].message.content
        report = await client.chat.completions.parse(model=NAME, messages=turns, response_format=Report, max_tokens=40, **SEED)
        assert isinstance(report.choices[0].message.parsed, Report)
        parsed = await client.responses.parse(
            model=NAME, input=ASKED, text_format=Report, max_output_tokens=40, extra_body=SEED
        )
        assert isinstance(parsed.output_parsed, Report)


async def test_anthropic(url: str) -> None:
    async with AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
        tool: Any = {"name": "weather", "description": "Of a place.", "input_schema": SCHEMA}
        turns: Any = [{"role": "user", "content": ASKED}]
        asked: Any = {"model": NAME, "tools": [tool], "max_tokens": 80, "extra_body": SEED}
        answer = await client.messages.create(messages=turns, tool_choice={"type": "tool", "name": "weather"}, **asked)
        (call,) = answer.content
        assert call.type == "tool_use"
        assert answer.stop_reason == "tool_use"
        Weather.model_validate(call.input)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": RESULT}
        turns += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        said = await client.messages.create(messages=turns, tool_choice={"type": "none"}, **asked | {"max_tokens": 8})
        assert [block.type for block in said.content] == ["text"]
        report = await client.messages.parse(model=NAME, messages=turns, output_format=Report, max_tokens=40, extra_body=SEED)
        assert isinstance(report.parsed_output, Report)


async def test_langchain(clients: SimpleNamespace, url: str) -> None:
    chat = clients.langchain.ChatOpenAI(
        model=NAME, base_url=f"{url}/v1", api_key="none", max_retries=0, max_completion_tokens=80, **SEED
    )
    first = clients.messages.HumanMessage(ASKED)
    caller = chat.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False)
    asking = await caller.ainvoke([first])
    (call,) = asking.tool_calls
    Weather.model_validate(call["args"])
    turns = [first, asking, clients.messages.ToolMessage(RESULT, tool_call_id=call["id"])]
    assert (await chat.bind_tools([Weather], max_tokens=8).ainvoke(turns)).text
    first_piece, *pieces = [piece async for piece in caller.astream([first])]
    assert sum(pieces, start=first_piece).tool_calls
    for method in ("json_schema", "function_calling"):
        assert isinstance(await chat.with_structured_output(Report, method=method).ainvoke(ASKED), Report)


async def test_langchain_in_the_newer_form(clients: SimpleNamespace, url: str) -> None:
    chat = clients.langchain.ChatOpenAI(
        model=NAME,
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=0,
        max_tokens=80,
        use_responses_api=True,
        extra_body=SEED,
    )
    first = clients.messages.HumanMessage(ASKED)
    asking = await chat.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False).ainvoke([first])
    (call,) = asking.tool_calls
    turns = [first, asking, clients.messages.ToolMessage(RESULT, tool_call_id=call["id"])]
    assert isinstance(await chat.with_structured_output(Report).ainvoke(turns), Report)


async def test_litellm(clients: SimpleNamespace, url: str) -> None:
    litellm = clients.litellm
    asked: Any = {"model": f"openai/{NAME}", "api_base": f"{url}/v1", "api_key": "none", "max_tokens": 80, "num_retries": 0}
    through_messages = asked | {"model": f"anthropic/{NAME}", "api_base": url, "temperature": 0}  # it passes on no seed there
    asked |= SEED
    calling: Any = {"tools": [TOOL], "tool_choice": "required"}
    turns: Any = [{"role": "user", "content": ASKED}]
    # several calls would be as many as the model likes, and `max_tokens` might cut the last
    answer: Any = await litellm.acompletion(messages=turns, parallel_tool_calls=False, **calling, **asked)
    message = answer.choices[0].message
    for call in message.tool_calls:
        Weather.model_validate_json(call.function.arguments)
    turns.append(message.model_dump())
    turns += [{"role": "tool", "tool_call_id": call.id, "content": RESULT} for call in message.tool_calls]
    said: Any = await litellm.acompletion(messages=turns, tools=[TOOL], tool_choice="none", **asked | {"max_tokens": 8})
    assert said.choices[0].message.content
    report: Any = await litellm.acompletion(messages=turns, response_format=Report, **asked)
    Report.model_validate_json(report.choices[0].message.content)
    stream: Any = await litellm.acompletion(messages=turns[:1], stream=True, **calling, **asked)
    through: Any = await litellm.acompletion(messages=turns[:1], **calling, **through_messages)
    Weather.model_validate_json(through.choices[0].message.tool_calls[0].function.arguments)
    arguments = "".join([c.function.arguments or "" async for piece in stream for c in piece.choices[0].delta.tool_calls or ()])
    assert json.loads(arguments[: arguments.index("}") + 1])["place"] in ("Ulm", "Bonn")
    await litellm.close_litellm_async_clients()
