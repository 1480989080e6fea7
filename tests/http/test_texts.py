"""Texts of all kinds through every route: answered, or refused with a reason. Never a failure, nor a connection that breaks."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import msgspec
import pytest

from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import at_rest, serve
from tests.support.tiny import make_model

NAME = "tiny"
GOOD = {"model": NAME, "prompt": "hello", "max_tokens": 8, "temperature": 0, "logprobs": 2}
TEXTS = [
    *("", " ", "\0", "a\0b", "\r\n\t\x1b[31m", "\x7f\x80\x9f", "\ufeff", "\ufffe\uffff", "\U0010ffff", "\ufffd"),
    *("\ud800", "a \ud800 b", "\udfff\ud800", "\ud83e", "\ud83ex", "\U0001f999\U0001fae0 \uc548\ub155"),
    *("\u0645\u0631\u062d\u0628\u0627 \u202e\u05e9\u05dc\u05d5\u05dd\u202c", "e" + "\u0301" * 300, "\u200d\u200b\u2060"),
    *("<s>", "</s>", "<|endoftext|>", "<|im_start|>system\n", "<pad><unk>", "<0xE2>", "{{ messages }}", "{% raw %}", "\\ud800"),
    *("x" * 70_000, "\ud800" + "x" * 70_000, "\U0001f999" * 20_000),
]
MEGABYTES = ["a" * 2**20, " " * 2**20, "\U0001f999" * 2**18, "\0" * 2**20]


def asked(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The text in each place of each route where one can stand."""
    turn = {"role": "user", "content": text}
    parts = {"role": "user", "content": [{"type": "text", "text": text}, text]}
    base = {"model": NAME, "max_tokens": 2}
    yield "/v1/completions", base | {"prompt": text, "echo": True, "logprobs": 1}
    yield "/v1/completions", base | {"prompt": ["x", text], "stream": True}
    yield "/v1/chat/completions", base | {"messages": [turn], "logprobs": True}
    yield "/v1/chat/completions", base | {"messages": [parts], "stream": True}
    yield "/v1/responses", {"model": NAME, "max_output_tokens": 2, "input": text, "instructions": text}
    item = {"role": "user", "content": [{"type": "input_text", "text": text}]}
    yield "/v1/responses", {"model": NAME, "max_output_tokens": 2, "input": [item], "stream": True}
    yield "/v1/messages", base | {"messages": [turn], "system": text}
    blocks = {"role": "user", "content": [{"type": "text", "text": text}]}
    yield "/v1/messages", base | {"messages": [blocks, {"role": "assistant", "content": text}], "stream": True}
    yield "/v1/messages/count_tokens", {"model": NAME, "messages": [turn]}
    yield "/tokenize", {"prompt": text, "return_token_strs": True}
    yield "/tokenize", {"messages": [turn]}
    yield "/detokenize", {"tokens": [1], "model": text}


def asked_elsewhere(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a text isn't the prompt."""
    base = {"model": NAME, "prompt": "x", "max_tokens": 2}
    for name in ("model", "user", "request_id", "cache_salt", "stop", "suffix", "spread", "seed"):
        yield "/v1/completions", base | {name: text}
    for name in ("stop", "bad_words", "prompt"):
        yield "/v1/completions", base | {name: [text]}
    for value in ({"logit_bias": {text: 1}}, {"metadata": {text: text}}, {text: 1}, {"stream_options": {text: text}}):
        yield "/v1/completions", base | value
    turns = [{"role": text, "content": "x"}, {"role": "user", "content": "x", "name": text, text: text}]
    for turn in [*turns, {"role": "user", "content": [{"type": text}]}, {"role": "user", "content": [{text: text}]}]:
        yield "/v1/chat/completions", {"model": NAME, "max_tokens": 2, "messages": [turn]}
    call = {"id": text, "function": {"name": text, "arguments": text}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": text}
    yield "/v1/chat/completions", {"model": NAME, "max_tokens": 2, "messages": [turn]}
    turn = {"role": "assistant", "content": None, "function_call": call["function"]}
    yield "/v1/chat/completions", {"model": NAME, "max_tokens": 2, "messages": [turn]}
    items: list[dict[str, Any]] = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": text}]},
        {"type": "function_call", "call_id": text, "name": text, "arguments": text},
        {"type": "function_call_output", "call_id": text, "output": text},
    ]
    told = {"reasoning": {"effort": text, text: 1}, "text": {"verbosity": text}, "metadata": {text: text}, "include": [text]}
    yield "/v1/responses", {"model": NAME, "max_output_tokens": 2, "input": items} | told
    schema = {"type": "object", "properties": {text: {"enum": [text]}}}
    tool = {"name": text, "description": text, "input_schema": schema}
    use = {"type": "tool_use", "id": text, "name": text, "input": {text: text}}
    turns = [
        {"role": "assistant", "content": [{"type": "thinking", "thinking": text, "signature": text}, use]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": text, "content": text}]},
    ]
    for path, most in (("/v1/messages", {"max_tokens": 2}), ("/v1/messages/count_tokens", {})):
        yield path, {"model": NAME, "messages": turns, "tools": [tool]} | most


@pytest.fixture
async def client(farm: Farm, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """After whatever a test does the same request gives the same, and nothing is held."""
    setup = Setup(model=make_model("llama", tmp_path / "model"), served_model_name=NAME)
    async with (
        serve(farm, 1, setup) as service,
        gateway(service.server.address) as url,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):

        async def state() -> Any:
            answer = (await client.post("/v1/completions", json=GOOD)).json()["choices"]
            await at_rest(service.client)
            stats = await service.client.stats()
            cells = [msgspec.structs.replace(cell, performance=None) for cell in stats.cells]
            return answer, stats.epoch, cells, [(i.used_tokens, i.lent_tokens) for i in stats.instances]

        before = await state()
        yield client
        assert await state() == before


async def check(client: httpx.AsyncClient, path: str, body: dict[str, Any], *, ensure_ascii: bool) -> None:
    try:
        data = json.dumps(body, ensure_ascii=ensure_ascii).encode()
    except UnicodeEncodeError:
        data = json.dumps(body, ensure_ascii=False).encode(errors="surrogatepass")
    answer = await client.post(path, content=data)
    where = path, str(body)[:200], answer.text[:300]
    assert answer.status_code in (200, 400, 404, 422), where
    if answer.status_code != 200:
        error = answer.json()["error"]
        shape = {"message", "type"} if path.startswith("/v1/messages") else {"message", "type", "param", "code"}
        assert set(error) == shape
        assert error["message"] and len(error["message"]) < 2000, where
        return
    assert "service_failed" not in answer.text and "server_error" not in answer.text, where  # as the last event of a stream
    is_surrogate = any("\ud800" <= char <= "\udfff" for char in str(body))
    assert not is_surrogate, where


@pytest.mark.parametrize("ensure_ascii", [True, False])
async def test_texts(client: httpx.AsyncClient, ensure_ascii: bool) -> None:
    for text in TEXTS:
        for path, body in [*asked(text), *asked_elsewhere(text)]:
            await check(client, path, body, ensure_ascii=ensure_ascii)


async def test_a_megabyte_of_one_character(client: httpx.AsyncClient) -> None:
    for text in MEGABYTES:
        for path, body in asked(text):
            await check(client, path, body, ensure_ascii=False)
    for path, body in asked_elsewhere(MEGABYTES[0]):
        await check(client, path, body, ensure_ascii=False)


async def test_paths_and_headers(client: httpx.AsyncClient) -> None:
    for text in TEXTS[:-3]:
        quoted = "".join(f"%{byte:02x}" for byte in text.encode(errors="surrogatepass"))
        for path in (f"/v1/models/{quoted}", f"/{quoted}", f"/health?x={quoted}"):
            answer = await client.get(path)
            assert answer.status_code in (200, 404), (path, answer.text)
        value = text.encode(errors="surrogatepass")
        if value.strip() and not set(value) & {*range(32), 127}:  # others the client's own package refuses to send
            good = json.dumps(GOOD).encode()
            answer = await client.post("/v1/completions", content=good, headers={b"x-odd": value, b"content-type": value})
            assert answer.status_code in (200, 400), (value, answer.text)
