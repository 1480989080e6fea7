"""Anthropic's Messages API with its own package: nothing but `base_url` and `api_key` is changed."""

import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import anthropic
import httpx2 as httpx
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import Message
from pydantic import BaseModel

from gmanager.client import Chunk
from gmanager.gateway.answers import Choice, Prompt, Usage
from gmanager.gateway.errors import ApiError
from gmanager.gateway.messages import CountTokensRequest, MessagesRequest
from gmanager.gateway.messages_answers import INVALID, SIGNATURE, MessagesForm
from gmanager.gateway.reply import ReplyForm
from gmanager.gateway.sampling import IGNORED, NEUTRAL, Sampled
from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import serve
from tests.support.tiny import make_model

NAME, KEY, PATH = "tiny", "secret", "/v1/messages"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "http.md"
TURNS: Any = [{"role": "user", "content": "hello"}]
LETTERS: dict[str, Any] = {"temperature": 0, "logit_bias": {str(token): 30 for token in range(64, 90)}}
"""Answers in small letters; 70 is "g"."""
WEATHER: Any = {
    "name": "weather",
    "description": "Of a place.",
    "input_schema": {
        "type": "object",
        "properties": {"place": {"enum": ["Ulm", "Bonn"]}, "days": {"$ref": "#/$defs/Days"}},
        "required": ["place", "days"],
        "additionalProperties": False,
        "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 9}},
    },
    "cache_control": {"type": "ephemeral"},
}
TIME: Any = {"type": "custom", "name": "now", "input_schema": {"type": "object", "maxProperties": 0}}
THINKING = """{% for m in messages %}<{{ m.role }}>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% if enable_thinking is not false %}<think>
{% endif %}{% endif %}{# </think> #}"""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model("llama", tmp_path_factory.mktemp("ends"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 93}))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return path


@pytest.fixture
async def client(farm: Farm, llama: Path) -> AsyncIterator[AsyncAnthropic]:
    async with (
        serve(farm, 1, Setup(model=llama, served_model_name=NAME, kv_tokens=8192)) as service,
        gateway(service.server.address, api_keys=(KEY,), max_body_bytes=100_000) as url,
        AsyncAnthropic(base_url=url, api_key=KEY, max_retries=0) as client,
    ):
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def whole_prompt(message: Any) -> int:
    """Its tokens: those that were not cached are counted by themselves."""
    return int(message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0))


async def test_plain_answers(client: AsyncAnthropic) -> None:
    asked: Any = {"model": NAME, "messages": TURNS, "max_tokens": 9}
    answer = await client.messages.create(**asked, extra_body=LETTERS | {"ignore_eos": True})
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", NAME)
    assert answer.id.startswith("msg_")
    assert re.fullmatch("[a-z]{9}", text_of(answer)) and len(answer.content) == 1
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len("<user>hello\n<assistant>"), 9)
    assert (answer.usage.cache_read_input_tokens, answer.usage.cache_creation_input_tokens) == (0, 0)
    ended = await client.messages.create(**asked, extra_body={"logit_bias": {"93": 100}, "request_id": "mine"})
    assert (ended.content, ended.stop_reason, ended.id) == ([], "end_turn", "msg_mine")


async def test_streams_hold_what_whole_answers_do(client: AsyncAnthropic) -> None:
    asked: list[dict[str, Any]] = [
        {"extra_body": LETTERS},
        {"extra_body": LETTERS, "stop_sequences": ["e", "f", "g"]},
        *({"tools": [WEATHER, TIME], "tool_choice": {"type": "any"}, "extra_body": {"seed": seed}} for seed in range(3)),
        {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 15, "extra_body": {"seed": 1}},
    ]
    for fields in asked:
        fields = {"model": NAME, "messages": TURNS, "max_tokens": 200} | fields
        whole = await client.messages.create(**fields)
        async with client.messages.stream(**fields) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_message()
        assert comparable(final) == comparable(whole)
        assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(whole.content)


def comparable(message: Any) -> Any:
    found = message.model_dump(exclude={"id", "parsed_output"}, exclude_none=True)
    found["usage"]["input_tokens"] += found["usage"].pop("cache_read_input_tokens")  # who comes later finds more
    for block in found["content"]:
        block.pop("id", None)
        block.pop("parsed_output", None)
    return found


async def test_the_stop_sequence_that_was_found(client: AsyncAnthropic) -> None:
    asked: Any = {"model": NAME, "messages": TURNS, "max_tokens": 40}
    text = text_of(await client.messages.create(**asked, extra_body=LETTERS | {"ignore_eos": True}))
    stop = text[7:9]
    answer = await client.messages.create(**asked, stop_sequences=["no", stop, "0"], extra_body=LETTERS)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert text_of(answer) == text.partition(stop)[0]
    for stops, found in ((["ggg", "gg"], "gg"), (["xggg", "g", "gg"], "g")):
        answer = await client.messages.create(**asked, stop_sequences=stops, extra_body={"logit_bias": {"70": 100}})
        assert (answer.content, answer.stop_sequence) == ([], found)


async def test_a_loop_of_calls_and_results(client: AsyncAnthropic) -> None:
    turns: Any = list(TURNS)
    for choice in ("any", "tool"):
        name = {"name": "weather"} if choice == "tool" else {}
        asked: Any = {"type": choice, "disable_parallel_tool_use": True} | name
        answer = await client.messages.create(
            model=NAME, messages=turns, tools=[WEATHER], tool_choice=asked, max_tokens=200, extra_body={"seed": 1}
        )
        assert answer.stop_reason == "tool_use"
        (call,) = answer.content
        assert call.type == "tool_use" and call.name == "weather" and call.id.startswith("toolu_")
        assert call.input["place"] in ("Ulm", "Bonn") and call.input["days"] in range(1, 10)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "warm"}]}
        turns += [answer.to_param(), {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]}]
    last = await client.messages.create(
        model=NAME,
        messages=turns,
        tools=[WEATHER],
        tool_choice={"type": "none"},
        max_tokens=9,
        extra_body=LETTERS | {"ignore_eos": True},
    )
    assert [block.type for block in last.content] == ["text"]
    assert last.stop_reason == "max_tokens"


class Pick(BaseModel):
    a: bool


async def test_structured_answers(client: AsyncAnthropic) -> None:
    parsed = await client.messages.parse(model=NAME, messages=TURNS, max_tokens=60, output_format=Pick)
    assert isinstance(parsed.parsed_output, Pick)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "schema": schema}
    for fields in ({"output_config": {"format": form, "effort": "low"}}, {"output_format": form}):
        answer = await client.messages.create(model=NAME, messages=TURNS, max_tokens=60, extra_body=fields)
        assert json.loads(text_of(answer)) in ({"a": 1}, {"a": 2})
        assert answer.stop_reason == "end_turn"


async def test_prompts_are_those_of_the_template(client: AsyncAnthropic) -> None:
    """As tokens are bytes, counts are lengths."""
    use = {"type": "tool_use", "id": "t", "name": "now", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t"}
    thoughts = {"type": "thinking", "thinking": "hm", "signature": "s"}
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    prompts: list[tuple[Any, str]] = [
        (TURNS, "<user>hello\n<assistant>"),
        ([*TURNS, {"role": "user", "content": [{"type": "text", "text": "you"}]}], "<user>hello\nyou\n<assistant>"),
        ([*TURNS, {"role": "assistant", "content": "hel"}], "<user>hello\n<assistant>hel"),
        ([*TURNS, {"role": "assistant", "content": " \n"}], "<user>hello\n<assistant>"),
        ([*TURNS, {"role": "assistant", "content": []}, *TURNS], "<user>hello\n<assistant>\n<user>hello\n<assistant>"),
        ([{"role": "user", "content": []}], "<user>\n<assistant>"),
        (
            [
                *TURNS,
                {"role": "assistant", "content": [thoughts, {"type": "text", "text": "So"}, use]},
                {"role": "user", "content": [result | {"content": "3"}, result, {"type": "text", "text": "a"}]},
                {"role": "system", "content": [{"type": "text", "text": "b"}]},
            ],
            f"<user>hello\n<assistant>So\n{call}\n<user><tool_response>\n3\n</tool_response>\n<tool_response>\n\n"
            "</tool_response>\n<user>a\n<system>b\n<assistant>",
        ),
    ]
    for turns, prompt in prompts:
        counted = await client.messages.count_tokens(model=NAME, messages=turns)
        assert counted.input_tokens == len(prompt), turns
        system: Any = [
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": ""},
        ]
        counted = await client.messages.count_tokens(model=NAME, messages=turns, system=system)
        assert counted.input_tokens == len(f"<system>Be brief.\n\n{prompt}"), turns
    for text in ("hel", "hel \n"):
        prefilled: Any = [*TURNS, {"role": "assistant", "content": text}]
        answer = await client.messages.create(model=NAME, messages=prefilled, max_tokens=3, system="Be brief.")
        assert whole_prompt(answer) == len("<system>Be brief.\n<user>hello\n<assistant>hel")
    spaced: Any = [*TURNS, {"role": "assistant", "content": " hel"}]
    counted = await client.messages.count_tokens(model=NAME, messages=spaced)
    assert counted.input_tokens == len("<user>hello\n<assistant> hel")
    told = await client.messages.count_tokens(model=NAME, messages=TURNS, tools=[WEATHER])
    forbidden: Any = {"type": "none"}
    untold = await client.messages.count_tokens(model=NAME, messages=TURNS, tools=[WEATHER], tool_choice=forbidden)
    assert told.input_tokens > untold.input_tokens == len("<user>hello\n<assistant>")


async def test_fields_that_ask_for_nothing(client: AsyncAnthropic) -> None:
    """What Claude Code and others send beside."""
    edits = [{"type": "clear_thinking_20251015", "keep": "all"}]
    answer = await client.messages.with_raw_response.create(
        model=NAME,
        messages=TURNS,
        max_tokens=3,
        metadata={"user_id": "u"},
        service_tier="auto",
        thinking={"type": "enabled", "budget_tokens": 1024},
        extra_body={
            "context_management": {"edits": edits},
            "container": None,
            "mcp_servers": [],
            "cache_control": {"type": "ephemeral"},
            "poem": 1,
        },
        extra_headers={"anthropic-beta": "context-management-2025-06-27"},
        extra_query={"beta": "true"},
    )
    assert answer.headers["x-ignored-fields"] == "poem"


def block(**fields: Any) -> dict[str, Any]:
    return {"messages": [*TURNS, {"role": "user", "content": [{"type": "text", "text": "x"}, fields]}]}


def said(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*TURNS, {"role": "assistant", "content": blocks}]}


FORM = {"type": "json_schema", "schema": {"type": "object"}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1, got 0"),
    ({"max_tokens": None}, "max_tokens: .* got null"),
    ({"messages": []}, "messages: a list of one message or more is needed, got a list of 0"),
    ({"messages": [3]}, "messages.0: a message is an object with a role and content, got 3"),
    (
        {"messages": [{"role": "tool", "content": "x"}]},
        'messages.0.role: "user", "assistant" or "system" is needed, got "tool"',
    ),
    ({"messages": [{"role": "user"}]}, "messages.0.content: a string or a list of blocks is needed, got null"),
    (block(), "messages.1.content.1: a block says its type, and this one has none"),
    (block(type="image"), 'messages.1.content.1: images aren\'t served, only text; this block is of type "image"'),
    (block(type="document"), "messages.1.content.1: documents aren't served, only text"),
    (block(type="tool_use"), 'messages.1.content.1.type: the types here are text, tool_result; got "tool_use"'),
    (block(type="text", text=3), "messages.1.content.1.text: a string is needed, got 3"),
    (block(type="tool_result"), "messages.1.content.1.tool_use_id: a string is needed, got null"),
    (
        block(type="tool_result", tool_use_id="t", content=[{"type": "image"}]),
        "messages.1.content.1.content.0: images aren't served",
    ),
    (said({"type": "tool_use", "id": "t"}), "messages.1.content.0.name: a string is needed, got null"),
    (
        said({"type": "tool_use", "id": "t", "name": "f", "input": "x"}),
        'messages.1.content.0.input: an object is needed, got "x"',
    ),
    (
        said({"type": "text", "text": "x"}, {"type": "tool_use", "id": "t", "name": "f", "input": {}}),
        "messages.1.content.1: its result is needed, in a message of the user after it",
    ),
    (said({"type": "thinking", "thinking": "x"}), "messages.1.content.0: the answer goes on with the last message"),
    ({"system": 3}, "system: a string or a list of blocks is needed, got 3"),
    ({"system": [{"type": "text"}]}, "system.0.text: a string is needed, got null"),
    ({"stop_sequences": ["x", ""]}, "stop_sequences.1: a stop string must not be empty"),
    ({"tools": 3}, "tools: a list of tools is needed, got 3"),
    ({"tools": [3]}, "tools.0: a tool is an object, got 3"),
    (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        'tools.0.type: only tools of type "custom" are served, got "web_search_20250305"',
    ),
    ({"tools": [{"name": ""}]}, 'tools.0.name: a string of 1 to 256 characters is needed, got ""'),
    ({"tools": [{"name": "f", "input_schema": 1}]}, "tools.0.input_schema: a JSON Schema is needed, got 1"),
    (
        {
            "tools": [TIME, {"name": "f", "input_schema": {"properties": {"a": {"type": "objec"}}}}],
            "tool_choice": {"type": "any"},
        },
        "tools.1.input_schema.properties.a.type: .*Invalid type: objec",
    ),
    ({"tool_choice": "any"}, 'tool_choice: an object of type auto, any, none, tool is needed, got "any"'),
    ({"tool_choice": {"type": "required"}}, 'tool_choice: an object of type .* got type "required"'),
    ({"tool_choice": {"type": "any"}}, "tool_choice: a call needs tools, and there are none"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name: a string is needed, got null"),
    (
        {"tools": [TIME], "tool_choice": {"type": "tool", "name": "g"}},
        'tool_choice: no tool is called "g"; there are now',
    ),
    ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}, "tool_choice.disable_parallel_tool_use: true or false"),
    ({"thinking": {"type": "on"}}, 'thinking: an object of type enabled, disabled, .* got type "on"'),
    ({"output_config": 3}, "output_config: an object is needed, got 3"),
    ({"output_config": {"effort": 3}}, "output_config.effort: a string is needed, got 3"),
    ({"output_config": {"format": {"type": "text"}}}, "output_config.format: an object of type json_schema is needed"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema: a JSON Schema is needed, got null"),
    (
        {"output_config": {"format": FORM}, "output_format": FORM},
        "output_format: a text has one structure; output_config.format",
    ),
    (
        {"output_format": {"type": "json_schema", "schema": {"type": "objec"}}},
        "output_format.schema.type: .*Invalid type: objec",
    ),
    ({"container": "c"}, 'container: not implemented, leave it out; got "c"'),
    ({"mcp_servers": [{}]}, "mcp_servers: not implemented, leave it out; got a list of 1"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management: not implemented"),
    ({"temperature": -1}, "temperature: Input should be greater than or equal to 0, got -1"),
    ({"min_tokens": 7}, r"min_tokens: must be at most max_tokens \(6\), got 7"),
    ({"max_tokens": 5000}, "messages: prompt of 23 . max_tokens of 5,000 = 5,023 tokens; the model takes at most 4,096"),
]


async def test_what_is_wrong_is_said(client: AsyncAnthropic) -> None:
    for stream in (False, True):
        for fields, sentence in WRONG:
            with pytest.raises(anthropic.BadRequestError) as raised:
                await client.messages.create(model=NAME, messages=TURNS, max_tokens=6, stream=stream, extra_body=fields)
            error = raised.value
            assert error.type == "invalid_request_error", fields
            assert re.match(sentence, error.api_message or "", re.DOTALL), (fields, error.api_message)
    image: Any = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(anthropic.BadRequestError, match=r"messages.0.content.0: images aren.*t served"):
        await client.messages.count_tokens(model=NAME, messages=image)


async def test_errors_are_of_anthropics_shape(client: AsyncAnthropic, farm: Farm, llama: Path) -> None:
    asked: Any = {"messages": TURNS, "max_tokens": 3}
    with pytest.raises(anthropic.NotFoundError) as missing:
        await client.messages.create(model="none", **asked)
    assert missing.value.type == "not_found_error"
    for stranger in (
        AsyncAnthropic(base_url=client.base_url, api_key="wrong", max_retries=0),
        AsyncAnthropic(base_url=client.base_url, auth_token="wrong", max_retries=0),
    ):
        with pytest.raises(anthropic.AuthenticationError, match="a valid API key is needed") as refused:
            await stranger.messages.create(model=NAME, **asked)
        assert refused.value.type == "authentication_error"
        await stranger.close()
    async with AsyncAnthropic(base_url=client.base_url, auth_token=KEY, max_retries=0) as bearer:
        assert (await bearer.messages.count_tokens(model=NAME, messages=TURNS)).input_tokens
    with pytest.raises(anthropic.APIStatusError, match="bytes; at most 100,000 are taken") as large:
        await client.messages.create(model=NAME, messages=[{"role": "user", "content": "x" * 200_000}], max_tokens=3)
    assert (large.value.status_code, large.value.body["error"]["type"]) == (413, "request_too_large")  # type: ignore[index]
    async with httpx.AsyncClient(base_url=str(client.base_url), headers={"x-api-key": KEY}) as http:
        assert (await http.get("/v1/models")).status_code == 200
        assert set((await http.get("/v1/models", headers={"x-api-key": "wrong"})).json()["error"]) > {"param"}
        for answer, status, kind in (
            (await http.get(PATH), 405, "invalid_request_error"),
            (await http.post(f"{PATH}/batches"), 404, "not_found_error"),
            (await http.post(f"{PATH}/", content=b"{"), 400, "invalid_request_error"),
            (await http.post(PATH, content=b""), 400, "invalid_request_error"),
        ):
            assert answer.status_code == status
            assert answer.json().keys() == {"type", "error"}
            assert answer.json()["error"].keys() == {"type", "message"}
            assert answer.json()["error"]["type"] == kind


async def test_thoughts_are_blocks_unless_they_are_disabled(farm: Farm, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "thinks")
    path = next(path for path in (model / "chat_template.jinja", model / "tokenizer_config.json") if path.exists())
    if path.suffix == ".jinja":
        path.write_text(THINKING)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": THINKING}))
    async with (
        serve(farm, 1, Setup(model=model, served_model_name=NAME)) as service,
        gateway(service.server.address) as url,
        AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        asked: Any = {"model": NAME, "messages": TURNS, "max_tokens": 9, "extra_body": LETTERS}
        answer = await client.messages.create(**asked)
        (thoughts,) = answer.content
        assert thoughts.type == "thinking" and re.fullmatch("[a-z]+", thoughts.thinking)
        assert thoughts.signature == SIGNATURE
        again = [*TURNS, answer.to_param(), *TURNS]
        assert await client.messages.create(**asked | {"messages": again})
        disabled = await client.messages.create(**asked, thinking={"type": "disabled"})
        assert [block.type for block in disabled.content] == ["text"]
        assert whole_prompt(disabled) == whole_prompt(answer) - len("<think>\n")
        assert (await client.messages.create(**asked, thinking={"type": "adaptive", "display": "omitted"})).content == []


# --- without a service ------------------------------------------------------------------------------------------------

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": ["b", 1]}}\n</tool_call>'
HERMES = ReplyForm(thinks=True, calls="hermes")
REPLIES: list[tuple[ReplyForm, str, str, str, list[dict[str, Any]], str]] = [
    (ReplyForm(), "Hello. END", "stop", "stop_sequence", [{"type": "text", "text": "Hello. "}], "END"),
    (ReplyForm(), "Hello. END", "length", "max_tokens", [{"type": "text", "text": "Hello. END"}], ""),
    (ReplyForm(), "Hello. 2END", "stop", "stop_sequence", [{"type": "text", "text": "Hello. "}], "2END"),
    (
        HERMES,
        f"<think>\nhm</think>\n\nSo.\n{CALL}\n{CALL} Well?",
        "stop",
        "tool_use",
        [
            {"type": "thinking", "thinking": "hm", "signature": SIGNATURE},
            {"type": "text", "text": "So."},
            {"type": "tool_use", "name": "f", "input": {"a": ["b", 1]}},
            {"type": "tool_use", "name": "f", "input": {"a": ["b", 1]}},
            {"type": "text", "text": " Well?"},
        ],
        "",
    ),
    (HERMES, CALL.partition(", 1")[0], "length", "max_tokens", [{"type": "tool_use", "name": "f", "input": {"a": ["b"]}}], ""),
    (HERMES, CALL.partition("[")[0], "length", "max_tokens", [{"type": "tool_use", "name": "f", "input": {}}], ""),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "stop", "tool_use", [{"type": "tool_use", "name": "f", "input": {}}], ""),
    (HERMES, "", "stop", "end_turn", [], ""),
]


def streamed(form: MessagesForm, chunks: Sequence[Chunk]) -> Iterator[bytes]:
    choice, usage = Choice(0, Prompt([1, 2], "")), Usage(prompt_tokens=2)
    for chunk in chunks:
        usage.completion_tokens += len(chunk.token_ids)
        yield form.events(choice, chunk, usage)
    yield form.end(usage)


async def read(data: bytes) -> Message:
    """What the package makes of a stream."""
    answer = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=data)
    transport = httpx.MockTransport(lambda _: answer)
    async with (
        AsyncAnthropic(api_key="none", http_client=httpx.AsyncClient(transport=transport)) as client,
        client.messages.stream(model=NAME, messages=TURNS, max_tokens=9) as stream,
    ):
        return await stream.get_final_message()


async def test_blocks_however_the_text_is_cut() -> None:
    for reply, text, reason, stop_reason, content, stop in REPLIES:
        last = len(text) - len(stop)
        for at in [*range(0, last + 1, 3), len(text)]:
            form = MessagesForm(NAME, reply, ("END", "2END"))
            chunks = [Chunk(0, [1], text[:at]), Chunk(1, [2], text[at:], finish_reason=reason)]  # type: ignore[arg-type]
            message = await read(b"".join(streamed(form, chunks)))
            got = comparable(message)
            assert got.pop("content") == content, (text, at)
            assert (message.stop_reason, message.stop_sequence) == (stop_reason, stop or None)
            assert (message.usage.input_tokens, message.usage.output_tokens) == (2, 2)
            whole = MessagesForm(NAME, reply, ("END", "2END")).whole([(Choice(0, Prompt([1, 2], "")), chunks)], Usage(2, 2))
            assert comparable(Message.model_validate(whole)) == got | {"content": content}


def test_arguments_that_are_no_json_are_told_as_they_are() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": foo}}</tool_call>'
    chunks = [Chunk(0, [1], text, finish_reason="stop")]
    (call,) = MessagesForm(NAME, HERMES).whole([(Choice(0, Prompt([], "")), chunks)], Usage())["content"]
    assert call["input"] == {INVALID: '{"a": foo}'}


async def test_a_stream_that_fails() -> None:
    form = MessagesForm(NAME, ReplyForm())
    data = next(streamed(form, [Chunk(0, [1], "a")])) + form.failure(ApiError(503, "gone", code="service_failed"))
    with pytest.raises(anthropic.APIStatusError) as raised:
        await read(data)
    assert raised.value.body == {"type": "error", "error": {"type": "api_error", "message": "gone"}}


def test_the_table_of_the_docs() -> None:
    """It names every field, and says of each what becomes of it."""
    text = DOCS.read_text()
    text = text[text.index("## Anthropic's messages") :]
    text = text[: text.index("\n## ", 1)]
    table: dict[str, str] = {}
    for names, kind in re.findall(r"^\| (`.*?`) \| (served|ignored|refused) \|", text, re.MULTILINE):
        table |= dict.fromkeys(re.findall(r"`(\w+)`", names), kind)
    ignored = IGNORED | {"service_tier", "metadata"}
    own = MessagesRequest.model_fields.keys() | CountTokensRequest.model_fields.keys()
    want = {name: "refused" if name in NEUTRAL else "ignored" if name in ignored else "served" for name in own}
    inherited = Sampled.model_fields.keys() - {"model", "temperature", "top_p", "top_k", "stream"}
    assert table == {name: kind for name, kind in want.items() if name not in inherited}
