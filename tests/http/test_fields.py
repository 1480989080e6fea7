"""Fields as all kinds of clients write them: what each does, and what is said of one that is wrong."""

import json
import re
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessage

from gmanager.gateway.responses import ResponsesRequest
from gmanager.gateway.sampling import IGNORED, NEUTRAL, Generation, Sampled
from gmanager.gateway.schemas import ChatRequest, CompletionRequest
from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import serve
from tests.support.tiny import make_model

NAME = "tiny"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [71, 68, 75, 75, 78]
"""Of "hello". 70 is "g"."""
TURNS = [{"role": "user", "content": "hi"}]
ASKED: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": NAME, "prompt": "hello", "max_tokens": 6, "temperature": 0, "seed": 1},
    CHAT: {"model": NAME, "messages": TURNS, "max_tokens": 6, "temperature": 0, "seed": 1},
}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "http.md"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
async def http(farm: Farm, llama: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        serve(farm, 1, Setup(model=llama, served_model_name=NAME, other_names=("second",), kv_tokens=1024)) as service,
        gateway(service.server.address, aliases={"gpt-4o": NAME, "gone": "none"}) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as client,
    ):
        yield client


async def ask(http: httpx.AsyncClient, path: str, **fields: Any) -> Any:
    answer = await http.post(path, content=json.dumps(ASKED[path] | fields))
    assert answer.status_code == 200, (fields, answer.text)
    return answer.json()


async def refusal(http: httpx.AsyncClient, path: str, **fields: Any) -> tuple[str | None, str]:
    """`param` and message of a 400."""
    answer = await http.post(path, content=json.dumps(ASKED.get(path, {}) | fields))
    assert answer.status_code == 400, (fields, answer.text)
    error = answer.json()["error"]
    return error["param"], error["message"]


NOTHING: dict[str, list[Any]] = {
    **{name: [None, 0, 0.0] for name in ("presence_penalty", "frequency_penalty", "min_p", "min_tokens", "top_k")},
    **{name: [None, 1, 1.0] for name in ("repetition_penalty", "top_p", "n", "best_of", "length_penalty")},
    **{name: [None, []] for name in ("logit_bias", "bad_words", "stop", "stop_token_ids")},
    **{name: [None, False] for name in ("include_stop_str_in_output", "ignore_eos", "echo", "return_token_ids", "stream")},
    **{name: [None, True] for name in ("skip_special_tokens", "spaces_between_special_tokens")},
    **{name: list(values) for name, values in NEUTRAL.items() if name in Generation.model_fields},
    "priority": [None, 0, -7, 7.0],
    "cache_salt": ["salt"],
    "stream_options": [None, {"include_usage": True}],
    "max_tokens": [6.0],
}


async def test_values_that_ask_for_nothing_change_nothing(http: httpx.AsyncClient) -> None:
    for path in (COMPLETIONS, CHAT):
        want = (await ask(http, path))["choices"]
        for name, values in NOTHING.items():
            for value in values:
                assert (await ask(http, path, **{name: value}))["choices"] == want, (name, value)
    for name in ("functions", "modalities", "documents", "function_call"):
        for value in NEUTRAL[name]:
            assert (await ask(http, CHAT, **{name: value}))["choices"] == want
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low", "verbosity": "low"}
    extra |= {"add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False}
    assert (await ask(http, CHAT, **extra))["choices"] == want


async def test_fields_of_the_sampler(http: httpx.AsyncClient) -> None:
    for path in (COMPLETIONS, CHAT):
        first = (await ask(http, path, return_token_ids=True))["choices"][0]["token_ids"]
        biased = await ask(http, path, return_token_ids=True, logit_bias={"70": 100})
        assert biased["choices"][0]["token_ids"] == [70] * 6
        banned = await ask(http, path, return_token_ids=True, logit_bias={str(first[0]): -100.0})
        assert banned["choices"][0]["token_ids"][0] != first[0]
        once = await ask(http, path, return_token_ids=True, logit_bias={"70": 5, "71": 4.9}, repetition_penalty=1e5)
        assert once["choices"][0]["token_ids"].count(70) <= 2
        least = await ask(http, path, stop_token_ids=[70], logit_bias={"70": 100}, min_tokens=3)
        assert least["usage"]["completion_tokens"] == 4
    plain = await ask(http, COMPLETIONS, logit_bias={"70": 100}, stop="gg")
    kept = await ask(http, COMPLETIONS, logit_bias={"70": 100}, stop="gg", include_stop_str_in_output=True)
    assert (plain["choices"][0]["text"], kept["choices"][0]["text"]) == ("", "gg")
    never = await ask(http, COMPLETIONS, logit_bias={"70": 100}, bad_words=["gg"])
    assert "gg" not in never["choices"][0]["text"]


ECHOED: list[dict[str, Any]] = [
    ChatCompletionMessage(role="assistant", content="yes", annotations=[], refusal=None).model_dump(),
    {"role": "assistant", "content": "yes", "audio": None, "function_call": None, "tool_calls": None, "reasoning": "so"},
    {"role": "assistant", "content": "yes", "reasoning_content": "so", "tool_calls": [], "refusal": "no"},
    {"role": "assistant", "content": [{"type": "output_text", "text": "y", "annotations": []}, "es"]},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "yes"}]},
    {"role": "assistant", "content": None, "refusal": "yes"},
    {"role": "assistant", "content": [{"type": "text", "text": "yes", "cache_control": {"type": "ephemeral"}}]},
]


async def test_messages_come_back_as_they_were_sent(http: httpx.AsyncClient) -> None:
    plain = [*TURNS, {"role": "assistant", "content": "yes"}, *TURNS]
    want = (await http.post("/tokenize", json={"messages": plain})).json()
    for echoed in ECHOED:
        answer = await http.post("/tokenize", json={"messages": [*TURNS, echoed, *TURNS]})
        assert answer.json() == want, echoed
        assert "x-ignored-fields" not in answer.headers
        await ask(http, CHAT, messages=[*TURNS, echoed, *TURNS])
    system = (await http.post("/tokenize", json={"messages": [{"role": "system", "content": "x"}]})).json()
    assert (await http.post("/tokenize", json={"messages": [{"role": "developer", "content": "x"}]})).json() == system
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    tools = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    await ask(http, CHAT, messages=[*TURNS, *tools])
    legacy = [
        {"role": "assistant", "content": None, "function_call": call["function"]},
        {"role": "function", "content": "2", "name": "f"},
    ]
    want = (await http.post("/tokenize", json={"messages": [*TURNS, *tools]})).json()
    assert (await http.post("/tokenize", json={"messages": [*TURNS, *legacy]})).json() == want


async def test_openai_s_own_answer_is_taken_back(http: httpx.AsyncClient) -> None:
    async with AsyncOpenAI(base_url=f"{str(http.base_url).rstrip('/')}/v1", api_key="none", max_retries=0) as client:
        turns: Any = TURNS
        answer = await client.chat.completions.create(model=NAME, messages=turns, max_tokens=3)
        again = [*turns, answer.choices[0].message.model_dump(), *turns]
        assert await client.chat.completions.create(model=NAME, messages=again, max_tokens=3)


WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"stop": ["x"] * 17}, "stop", "at most 16 stop strings are taken, got 17"),
    ({"stop": ["x", 5]}, "stop.1", "a stop string must be a string, got 5"),
    ({"stop": ["x", ""]}, "stop.1", "a stop string must not be empty"),
    ({"stop": 5}, "stop", "a string or a list of strings is needed, got 5"),
    ({"stop_token_ids": [1, -2]}, "stop_token_ids.1", "token ids are in [0, 4294967296), got -2"),
    ({"stop_token_ids": [300]}, "stop_token_ids", "300 of stop_token_ids is out of range: the model has 300 tokens"),
    ({"logit_bias": {"300": 1}}, "logit_bias", "300 of logit_bias is out of range: the model has 300 tokens"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", 'a token id is an integer in [0, 4294967296), got "x"'),
    ({"logit_bias": {"7": 101}}, "logit_bias.7", "a bias is a number in [-100, 100], got 101"),
    ({"bad_words": ["x", None]}, "bad_words.1", "a bad word must be a string, got null"),
    ({"bad_words": "x"}, "bad_words", 'a list of strings is needed, got "x"'),
    ({"temperature": -1}, "temperature", "greater than or equal to 0, got -1"),
    ({"min_p": 1.5}, "min_p", "less than or equal to 1, got 1.5"),
    ({"n": True}, "n", "valid integer, got true"),
    ({"seed": 2**64}, "seed", f"less than {2**63}, got {2**64}"),
    ({"min_tokens": 7}, "min_tokens", "must be at most max_tokens (6), got 7"),
    ({"spread": "some"}, "spread", '"auto" or "all" is needed, got "some"'),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "must be -1 or at least 1, got 0"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "comes with whole answers only, got 1 with stream"),
    ({"response_format": {"type": "json_object", "schema": 5}}, "response_format.schema", "a JSON Schema is needed, got 5"),
    ({"best_of": 2}, "best_of", "not implemented, leave it out; got 2"),
    ({"user": "a \ud800 b"}, "user", "U+D800 at character 2 is half of a surrogate pair"),
    ({"\udfff": 1}, "\\udfff", "U+DFFF at character 0 is half of a surrogate pair"),
]
WRONG_PROMPTS: list[tuple[Any, str, str]] = [
    ([1, -1], "prompt.1", "token ids are in [0, 4294967296), got -1"),
    ([1, True], "prompt.1", "a token id is an integer, got true"),
    ([1, 2, 3, 2**64], "prompt.3", f"token ids are in [0, 4294967296), got {2**64}"),
    ([1, 2, 3, "x"], "prompt.3", 'a token id is an integer, got "x"'),
    ([[1], [2, None]], "prompt.1.1", "a token id is an integer, got null"),
    ([[1], "x"], "prompt.1", 'prompts of one request are all of one kind, here lists of token ids, got "x"'),
    (["x", [1]], "prompt.1", "all of one kind, here strings, got a list of 1"),
    ([1, 300], "prompt", "token id 300 at position 1 is out of range: the model has 300 tokens"),
    ([[1], [300]], "prompt.1", "token id 300 at position 0 is out of range: the model has 300 tokens"),
    ({"a": 1}, "prompt", "a string, a list of token ids, or a list of those is needed, got an object"),
    (None, "prompt", "is needed, got null"),
    ("a \ud800 b" + "x" * 70_000, "prompt", "U+D800 at character 2"),
    ("x" * 600, "prompt", "prompt of 600 + max_tokens of 6 = 606 tokens; the model takes at most 512"),
]
WRONG_TURNS: list[tuple[dict[str, Any], str, str]] = [
    ({"function_call": 5}, "messages.0.function_call", "an object with a name is needed, got 5"),
    ({"function_call": {"arguments": "{}"}}, "messages.0.function_call.name", "a string is needed, got null"),
    ({"function_call": {"name": "f", "arguments": []}}, "messages.0.function_call.arguments", "a JSON string is needed"),
]
WRONG_CONTENT: list[tuple[Any, str, str]] = [
    *(
        ([{"type": kind}], "messages.1.content.0", f'{media} aren\'t served, only text; this part is of type "{kind}"')
        for kind, media in (("image_url", "images"), ("input_image", "images"), ("file", "files"), ("video_url", "videos"))
    ),
    ([{"type": "input_audio"}], "messages.1.content.0", "audio isn't served, only text"),
    ([{"type": "text", "text": "x"}, {"type": "text"}], "messages.1.content.1.text", "a string is needed, got null"),
    ([{"type": "poem"}], "messages.1.content.0.type", 'the types are text, input_text, output_text, refusal; got "poem"'),
    ([{}], "messages.1.content.0", "a part says its type, and this one has none"),
    ([5], "messages.1.content.0", "a part is an object with a type, or a string, got 5"),
    (5, "messages.1.content", "a string, a list of parts or null is needed, got 5"),
    ("a \ud800 b", "messages.1.content", "U+D800 at character 2"),
    ([{"type": "text", "text": "\udc00"}], "messages.1.content.0.text", "U+DC00 at character 0"),
]


async def test_what_is_wrong_is_named(http: httpx.AsyncClient) -> None:
    for path in (COMPLETIONS, CHAT):
        for fields, param, text in WRONG:
            got = await refusal(http, path, **fields)
            assert got[0] == param and text in got[1], (fields, got)
    for prompt, param, text in WRONG_PROMPTS:
        got = await refusal(http, COMPLETIONS, prompt=prompt)
        assert got[0] == param and text in got[1], (prompt, got)
    for fields, param, text in WRONG_TURNS:
        got = await refusal(http, CHAT, messages=[{"role": "assistant"} | fields])
        assert got[0] == param and text in got[1], (fields, got)
    for content, param, text in WRONG_CONTENT:
        for path in (CHAT, "/tokenize"):
            got = await refusal(http, path, messages=[*TURNS, {"role": "user", "content": content}])
            assert got[0] == param and text in got[1], (content, got)
    assert (await refusal(http, COMPLETIONS, prompt="x" * 600, max_tokens=None)) == (
        "prompt",
        "prompt of 600 + at least one to generate = 601 tokens; the model takes at most 512",
    )
    assert (await refusal(http, "/detokenize", tokens=[1, "x"]))[0] == "tokens.1"
    assert (await refusal(http, CHAT, messages=[{"content": "x"}])) == ("messages.0.role", "messages.0.role: Field required")
    assert (await refusal(http, CHAT, max_completion_tokens=3, min_tokens=4))[1] == (
        "min_tokens: must be at most max_completion_tokens (3), got 4"
    )
    assert (await refusal(http, CHAT, echo=True))[0] == "echo"


async def test_bodies_that_are_no_json(http: httpx.AsyncClient) -> None:
    for body, text in (
        (b'{"a": 1,\n "b" 2}', "the body is not JSON: Expecting ':' delimiter at line 2, column 6 (character 14)"),
        (b"[1]", "the body must be a JSON object, got a list"),
        (b"", "the body is empty: a JSON object is needed"),
        (b"  ", "the body is empty: a JSON object is needed"),
        (b'{"a": NaN}', "the body is not JSON: NaN is no number there"),
        (b'{"a": "\xff"}', "the body is not UTF-8: byte 0xff at position 7"),
        (b'{"a": "\xed\xa0\x80"}', "the body is not UTF-8: byte 0xed at position 7"),
        (b'{"a": ' + b"[" * 600 + b"]" * 600 + b"}", "the body has lists and objects more than 500 deep in each other"),
    ):
        for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
            answer = await http.post(path, content=body)
            assert answer.status_code == 400
            assert answer.json()["error"] == {
                "message": text, "type": "invalid_request_error", "param": None, "code": None,
            }  # fmt: skip
    good = json.dumps(ASKED[COMPLETIONS]).encode()
    for kind in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        assert (await http.post(COMPLETIONS, content=good, headers=kind)).status_code == 200


async def test_unknown_fields_are_named(http: httpx.AsyncClient, farm: Farm, llama: Path) -> None:
    unknown = {"topk": 5, "b\u00e4d\r\nx: y": 1, "stream_options": {"foo": 1}}
    for path, asked in ASKED.items():
        for stream in (False, True):
            answer = await http.post(path, json=asked | unknown | {"stream": stream})
            assert answer.headers["x-ignored-fields"] == "topk, b?d??x??y, stream_options.foo"
        many = await http.post(path, json=asked | {f"{'x' * 100}{i}": i for i in range(100)})
        assert many.status_code == 200
        assert len(many.headers["x-ignored-fields"]) < 1200
        assert many.headers["x-ignored-fields"].endswith(", and 84 more")
        assert "x-ignored-fields" not in (await http.post(path, json=asked)).headers
    for path, body in (("/tokenize", {"prompt": "x", "y": 1}), ("/detokenize", {"tokens": [1], "y": 1})):
        assert (await http.post(path, json=body)).headers["x-ignored-fields"] == "y"


async def test_prompt_logprobs_and_token_ids(http: httpx.AsyncClient) -> None:
    scored = await ask(http, COMPLETIONS, echo=True, logprobs=3, max_tokens=1)
    table = scored["choices"][0]["logprobs"]
    whole = await ask(http, COMPLETIONS, prompt_logprobs=2, return_token_ids=True)
    choice = whole["choices"][0]
    assert choice["prompt_token_ids"] == HELLO
    assert len(choice["token_ids"]) == 6
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == 5
    for at, token in enumerate(HELLO):
        if at:
            position = choice["prompt_logprobs"][at]
            own = position[str(token)]
            assert own["decoded_token"] == "hello"[at]
            assert own["logprob"] == table["token_logprobs"][at]
            assert [entry["rank"] for entry in position.values()][-2:] == [1, 2] or own["rank"] <= 2
            assert len(position) == (2 if own["rank"] <= 2 else 3)
    chat = await ask(http, CHAT, prompt_logprobs=0, return_token_ids=True)
    ids = (await http.post("/tokenize", json={"messages": TURNS})).json()["tokens"]
    assert chat["prompt_token_ids"] == ids
    assert [None if p is None else list(p) for p in chat["prompt_logprobs"]] == [None, *([str(t)] for t in ids[1:])]
    for path, want in ((COMPLETIONS, choice["token_ids"]), (CHAT, chat["choices"][0]["token_ids"])):
        chunks = await streamed(http, path, return_token_ids=True)
        assert [token for chunk in chunks for c in chunk["choices"] for token in c.get("token_ids", [])] == want
        first = chunks[0]["choices"][0] if path == COMPLETIONS else chunks[0]
        assert first["prompt_token_ids"] == (HELLO if path == COMPLETIONS else ids)
        assert sum("prompt_token_ids" in json.dumps(chunk) for chunk in chunks) == 1


async def streamed(http: httpx.AsyncClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    text = (await http.post(path, json=ASKED[path] | {"stream": True} | fields)).text
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event.startswith("data: {")]


async def test_usage_in_every_chunk(http: httpx.AsyncClient) -> None:
    for path in (COMPLETIONS, CHAT):
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = await streamed(http, path, stream_options=options, ignore_eos=True)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 6
        assert chunks[-1]["choices"] == []


async def test_names_and_prompts_that_are_cut(http: httpx.AsyncClient) -> None:
    for path, prefix in ((COMPLETIONS, "cmpl"), (CHAT, "chatcmpl")):
        for _ in range(2):
            assert (await ask(http, path, request_id="mine"))["id"] == f"{prefix}-mine"
    assert (await refusal(http, CHAT, request_id="x" * 129))[0] == "request_id"
    cut = await ask(http, COMPLETIONS, prompt="abcdef", truncate_prompt_tokens=2, echo=True, return_token_ids=True)
    assert cut["choices"][0]["prompt_token_ids"] == [68, 69]
    assert cut["choices"][0]["text"].startswith("ef")
    whole = await ask(http, COMPLETIONS, prompt="x" * 1000, truncate_prompt_tokens=-1, ignore_eos=True)
    assert whole["usage"]["prompt_tokens"] == 512 - 6
    assert (await ask(http, COMPLETIONS, prompt="x" * 1000, truncate_prompt_tokens=-1, max_tokens=None))["usage"][
        "prompt_tokens"
    ] == 511


async def test_a_prompt_that_fills_the_context_is_scored(http: httpx.AsyncClient) -> None:
    """As lm-eval asks for it, with nothing to be generated; and with one token more than the model takes."""
    asked: dict[str, Any] = {"echo": True, "max_tokens": 0, "logprobs": 1, "temperature": 0}
    for ids in ([7 * i % 256 for i in range(512)], [1], [1, 2]):
        for stream in (False, True):
            chunks = await streamed(http, COMPLETIONS, prompt=ids, **asked) if stream else []
            (answer,) = [chunk for chunk in chunks if chunk["choices"]] or [await ask(http, COMPLETIONS, prompt=ids, **asked)]
            (choice,) = answer["choices"]
            assert choice["finish_reason"] == "length"
            assert choice["logprobs"]["token_logprobs"][0] is None
            assert all(value < 0 for value in choice["logprobs"]["token_logprobs"][1:])
            assert len(choice["logprobs"]["tokens"]) == len(ids)
            if not stream:
                assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)}
    cut = await ask(http, COMPLETIONS, prompt=[1] * 600, truncate_prompt_tokens=-1, **asked)
    assert cut["usage"]["prompt_tokens"] == 512
    assert await refusal(http, COMPLETIONS, prompt=[1] * 513, **asked) == (
        "prompt",
        "prompt of 513 + max_tokens of 0 = 513 tokens; the model takes at most 512",
    )
    assert (await refusal(http, COMPLETIONS, min_tokens=1, **asked))[0] == "min_tokens"


async def test_offsets_are_places_in_the_text(http: httpx.AsyncClient) -> None:
    """Of an answer of wrong bytes: every token that is a character stands where its offset says."""
    prompt = "\U0001f999\U0001fae0 \uc548\ub155"
    for echo in (False, True):
        for seed in range(16, 22):
            fields = {"prompt": prompt, "temperature": 3, "max_tokens": 40, "logprobs": 1, "seed": seed}
            choice = (await ask(http, COMPLETIONS, echo=echo, ignore_eos=True, **fields))["choices"][0]
            table, text = choice["logprobs"], choice["text"]
            assert table["text_offset"] == sorted(table["text_offset"])
            for name, offset in zip(table["tokens"], table["text_offset"], strict=True):
                assert offset <= len(text)
                if len(name) == 1 and name.isascii():
                    assert text[offset] == name, (seed, name, offset)
            chunks = await streamed(http, COMPLETIONS, echo=echo, ignore_eos=True, **fields)
            offsets = [at for chunk in chunks for c in chunk["choices"] for at in c["logprobs"]["text_offset"]]
            assert offsets == table["text_offset"]


async def test_aliases(http: httpx.AsyncClient) -> None:
    models = {model["id"]: model["root"] for model in (await http.get("/v1/models")).json()["data"]}
    assert models == {NAME: NAME, "gpt-4o": NAME, "second": NAME}
    for name in models:
        assert (await ask(http, COMPLETIONS, model=name))["model"] == name
    assert (await http.get("/v1/models/gpt-4o")).json()["root"] == NAME
    assert (await http.post("/tokenize", json={"prompt": "x"})).status_code == 200, "there is but one model"
    assert (await http.post(CHAT, json=ASKED[CHAT] | {"model": "gone"})).status_code == 404


def kinds_in_docs(begin: str, end: str) -> dict[str, str]:
    """What the tables between say of each field."""
    text = DOCS.read_text()
    text = text[text.index(begin) : text.index(end)]
    table: dict[str, str] = {}
    for names, kind in re.findall(r"^\| (`.*?`) \| (served|ignored|refused) \|", text, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            assert name not in table or kind == table[name]
            table[name] = kind
    return table


def kinds(fields: Iterable[str], refused: Iterable[str]) -> dict[str, str]:
    return {name: "refused" if name in refused else "ignored" if name in IGNORED else "served" for name in fields}


def test_the_tables_of_the_docs() -> None:
    """They name every field of the routes, and say of each what becomes of it."""
    older = CompletionRequest.model_fields.keys() | ChatRequest.model_fields.keys()
    assert kinds_in_docs("### Fields", "A message has a `role`") == kinds(older, NEUTRAL)
    own = ResponsesRequest.model_fields.keys() - Sampled.model_fields.keys()
    assert kinds_in_docs("### Responses", "Those of both routes above") == kinds(own, ResponsesRequest.refused)
