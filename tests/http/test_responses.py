"""OpenAI's newer form of a conversation, with the real `openai` package."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import ResponseFunctionToolCall
from pydantic import BaseModel, Field

from gmanager.client import Chunk
from gmanager.gateway.answers import Choice, Prompt, Usage
from gmanager.gateway.errors import ApiError
from gmanager.gateway.reply import ReplyForm
from gmanager.gateway.responses import ResponsesRequest
from gmanager.gateway.responses_answers import ResponsesForm
from gmanager.text.tokenizer import Tokenizer
from gmanager.wire.messages import TextAssets
from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import serve
from tests.support.tiny import make_model, make_tokenizer

PARAMETERS: Any = {
    "type": "object",
    "properties": {"place": {"enum": ["Ulm", "Bonn"]}},
    "required": ["place"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "weather", "description": "Of a place.", "parameters": PARAMETERS, "strict": True}


class Parcel(BaseModel):
    colour: Literal["red", "green"]
    sizes: list[int] = Field(min_length=1, max_length=2)


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


async def test_text_is_what_chat_answers(client: AsyncOpenAI) -> None:
    turns: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    chat = await client.chat.completions.create(model="tiny", messages=turns, temperature=0, max_tokens=9)
    parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]
    for given in ("hello", parts):
        answer = await client.responses.create(
            model="tiny", instructions="Be brief.", input=given, temperature=0, max_output_tokens=9, metadata={"a": "b"}
        )
        assert answer.output_text == chat.choices[0].message.content
        assert answer.status == "incomplete"
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.usage is not None
        assert chat.usage is not None
        assert answer.usage.input_tokens == chat.usage.prompt_tokens
        assert (answer.usage.output_tokens, answer.usage.total_tokens) == (9, chat.usage.total_tokens)
        assert (answer.metadata, answer.instructions) == ({"a": "b"}, "Be brief.")
    # what came back is sent back
    again: Any = [{"role": "user", "content": "hello"}, *answer.output, {"role": "user", "content": "and?"}]
    assert (await client.responses.create(model="tiny", input=again, max_output_tokens=2)).usage is not None


async def test_log_probabilities(client: AsyncOpenAI) -> None:
    asked: Any = {"model": "tiny", "input": "hello", "temperature": 0, "max_output_tokens": 5, "top_logprobs": 2}
    answer = await client.responses.create(**asked, include=["message.output_text.logprobs"])
    (message,) = answer.output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert [len(entry.top_logprobs) for entry in part.logprobs] == [2] * 5


async def test_a_loop_of_calls_and_results(client: AsyncOpenAI) -> None:
    items: Any = [{"role": "user", "content": "hello"}]
    named: Any = {"type": "function", "name": "weather"}
    for choice in ("required", named):
        answer = await client.responses.create(
            model="tiny", input=items, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_output_tokens=100,
            extra_body={"seed": 1},
        )  # fmt: skip
        assert answer.status == "completed"
        (call,) = answer.output
        assert isinstance(call, ResponseFunctionToolCall)
        assert call.name == "weather"
        assert re.fullmatch(r'\{"place": ?"(Ulm|Bonn)"\}', call.arguments)
        items += [call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": "warm"}]
    last = await client.responses.create(
        model="tiny", input=items, tools=[WEATHER], tool_choice="none", max_output_tokens=4, extra_body={"seed": 1}
    )
    assert [item.type for item in last.output] == ["message"]


async def test_what_openai_parses(client: AsyncOpenAI) -> None:
    for seed in range(3):
        answer = await client.responses.parse(
            model="tiny", input="hello", text_format=Parcel, max_output_tokens=400, extra_body={"seed": seed}
        )
        assert isinstance(answer.output_parsed, Parcel)
    free = await client.responses.create(
        model="tiny", input="hello", text={"format": {"type": "json_object"}}, max_output_tokens=300,
        extra_body={"logit_bias": {"92": 50}},
    )  # fmt: skip
    assert isinstance(json.loads(free.output_text), dict)


async def test_events_add_up_to_the_answer(client: AsyncOpenAI) -> None:
    cases: list[dict[str, Any]] = [
        {"max_output_tokens": 9},
        {"tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 100},
        {"text": {"format": {"type": "json_schema", "name": "p", "schema": PARAMETERS, "strict": True}}},
    ]
    for asked in cases:
        given: Any = {"model": "tiny", "input": "hello", "temperature": 0, **asked}
        whole = await client.responses.create(**given)
        async with client.responses.stream(**given) as stream:
            events: Any = [event async for event in stream]
        names, streamed = [event.type for event in events], events[-1].response
        assert streamed.output_text == whole.output_text
        whole.usage.input_tokens_details.cached_tokens = streamed.usage.input_tokens_details.cached_tokens  # it came later
        assert streamed.usage == whole.usage
        calls = [[(i.name, i.arguments) for i in a.output if i.type == "function_call"] for a in (whole, streamed)]
        assert calls[0] == calls[1]
        assert names[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
        assert names[-2:] == ["response.output_item.done", f"response.{whole.status}"]


@pytest.mark.parametrize(
    ("asked", "param", "sentence"),
    [
        ({"input": 3}, "input", "a string or a list of items is needed, got 3"),
        ({"input": []}, "input", "a list of items is needed, got a list of 0"),
        ({"input": ["a"]}, "input.0", "an item is an object"),
        ({"input": [{"role": "x", "content": ""}]}, "input.0.role", 'the roles are user, .* got "x"'),
        ({"input": [{"role": "user", "content": 3}]}, "input.0.content", "a string, a list of parts or null"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0",
            "images aren't served, only text",
        ),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input.0.name", "a string is needed, got null"),
        ({"input": [{"type": "function_call_output"}]}, "input.0.call_id", "a string is needed, got null"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input.0", "nothing is kept here"),
        ({"input": [{"type": "computer_call"}]}, "input.0.type", 'the types are message.* got "computer_call"'),
        ({"input": [{"type": "reasoning", "content": [{}]}]}, "input.0.content", "a list of parts with a text"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not implemented"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", 'only tools of type "function" are served'),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "a string of 1 to 256 characters"),
        ({"tool_choice": "required"}, "tool_choice", "a call needs tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", 'of type "function" with a name is needed'),
        ({"text": {"format": {"type": "xml"}}}, "text.format", 'got type "xml"'),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "a JSON Schema is needed, got null"),
        ({"text": {"format": {"type": {}}}}, "text.format", "got type an object"),
        ({"text": {"verbosity": {}}}, "text.verbosity", "a string is needed, got an object"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort", "a string is needed, got 5"),
        ({"reasoning": {"effort": [1]}}, "reasoning.effort", "a string is needed, got a list of 1"),
        ({"text": 3}, "text", "an object is needed, got 3"),
        ({"max_output_tokens": 3, "min_tokens": 4}, "min_tokens", r"at most max_output_tokens \(3\), got 4"),
        ({"max_output_tokens": 5000}, "input", "max_tokens of 5,?000"),
    ],
)
async def test_what_is_wrong_is_said(client: AsyncOpenAI, asked: dict[str, Any], param: str, sentence: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await client.responses.create(model="tiny", input="hello", extra_body=asked)
    assert raised.value.param == param, raised.value.message
    assert re.search(sentence, raised.value.message, re.DOTALL), raised.value.message


# --- without a service ------------------------------------------------------------------------------------------------


async def test_thoughts_are_items_before_the_answer() -> None:
    tokenizer = Tokenizer(
        TextAssets(
            tokenizer_json=make_tokenizer().backend_tokenizer.to_str(), chat_template=None, special_tokens={}, eos_token_ids=[]
        )
    )
    body = ResponsesRequest.model_validate({"model": "m", "input": "x"})
    texts = ["<thi", "nk>\nhm", "</think>\n", 'So.<tool_call>{"name": "f"', ', "arguments": {}}</tool_call>']
    chunks = [
        Chunk(index=i, token_ids=[1], text=text, logprobs=None, finish_reason="stop" if i == 4 else None)
        for i, text in enumerate(texts)
    ]
    choice, usage = Choice(0, Prompt([1], "")), Usage(1, 5)

    def form() -> ResponsesForm:
        return ResponsesForm(body, tokenizer, "m", ReplyForm(thinks=True, calls="hermes"))

    whole = form().whole([(choice, chunks)], usage)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    assert whole["output"][0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 1}
    streamed = form()
    events = b"".join([*(streamed.events(choice, chunk, usage) for chunk in chunks), streamed.end(usage)])
    told = [json.loads(line[6:]) for line in events.decode().splitlines() if line.startswith("data: ")]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))

    def shape(response: dict[str, Any]) -> list[dict[str, Any]]:
        return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]

    assert shape(told[-1]["response"]) == shape(whole)
    failing = form()
    failing.events(choice, chunks[0], usage)
    last = json.loads(failing.failure(ApiError(503, "gone")).decode().split("data: ")[1])
    assert (last["type"], last["response"]["status"], last["response"]["error"]["message"]) == (
        "response.failed",
        "failed",
        "gone",
    )
    await tokenizer.close()
