"""Bodies, headers and bytes that no client should send: each is refused in OpenAI's shape, and nothing but counters changes."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import msgspec
import pytest

from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import Service, at_rest, serve
from tests.support.tiny import make_model

NAME, KEY = "tiny", "secret"
GOOD = {"model": NAME, "prompt": "hello", "max_tokens": 8, "temperature": 0, "logprobs": 2}
POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
HUGE = "9" * 5000
ODD: list[Any] = [None, True, -1, 0, 1.5, 2**31, 2**64, -(2**70), 1e400, "", "x", "\ud800", "\0"]
ODD += [[], [[]], [None], {}, {"a": {}}, [-1], [2**32]]
"""Wrong for most fields, though not for all."""


@dataclass(frozen=True)
class Door:
    service: Service
    url: str
    client: httpx.AsyncClient

    async def good(self) -> Any:
        answer = await self.client.post("/v1/completions", json=GOOD)
        assert answer.status_code == 200
        return answer.json()["choices"]

    async def held(self) -> Any:
        """All of the statistics, once nothing runs, but counters and the requests that have ended."""
        await at_rest(self.service.client)
        stats = await self.service.client.stats()
        kv = [(i.used_tokens, i.free_tokens, i.lent_tokens, i.borrowed_tokens) for i in stats.instances]
        return stats.epoch, [msgspec.structs.replace(cell, performance=None) for cell in stats.cells], kv


@pytest.fixture
async def door(farm: Farm, tmp_path: Path) -> AsyncIterator[Door]:
    """After whatever a test does the same request gives the same, and nothing is held."""
    setup = Setup(model=make_model("llama", tmp_path / "model"), served_model_name=NAME)
    headers = {"authorization": f"Bearer {KEY}"}
    async with (
        serve(farm, 1, setup) as service,
        gateway(service.server.address, max_body_bytes=50_000, api_keys=(KEY,)) as url,
        httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as client,
    ):
        door = Door(service, url, client)
        before = await door.good(), await door.held()
        yield door
        assert (await door.good(), await door.held()) == before


def refused(response: httpx.Response, *statuses: int) -> str:
    """The message of an answer, which must be an error in OpenAI's shape."""
    assert response.status_code in statuses, response.text[:500]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
    message: str = error["message"]
    assert message and len(message) < 2000
    return message


@pytest.mark.parametrize("path", POSTS)
async def test_bodies_that_are_no_request(door: Door, path: str) -> None:
    bodies = [
        b"", b" ", b"{", b"}", b"null", b"[]", b"1", b'"x"', b"{}", b"\xff\xfe", b"\x00", b"{1: 2}", b"[" * 40_000,
        b'{"a":' * 9_000, b'{"model": "tiny", "model": NaN}', b'{"prompt": Infinity}', b'{"prompt": ' + HUGE.encode() + b"}",
        b'{"model": "tiny", "prompt": "\\ud800"}'[:-1], b"\xef\xbb\xbf{}", "{\u2028}".encode(), b'{"prompt": "\x01"}',
    ]  # fmt: skip
    for body in bodies:
        refused(await door.client.post(path, content=body), 400)
        refused(await door.client.post(path, content=body, headers={"content-type": "application/json"}), 400)
    refused(await door.client.post(path, content=b"x" * 50_001), 413)


@pytest.mark.parametrize("path", POSTS)
async def test_fields_that_are_odd(door: Door, path: str) -> None:
    """One field is wrong at a time, or several: answered, or refused with its name. Never a failure."""
    draw = random.Random(11)
    turns = [{"role": "user", "content": "hi"}]
    good = {
        "/v1/completions": GOOD | {"stop": "~", "n": 1, "seed": 1, "stream": False, "echo": True, "spread": 1},
        "/v1/chat/completions": {"model": NAME, "messages": turns, "max_tokens": 4, "top_p": 1, "top_k": 3, "logprobs": True},
        "/tokenize": {"model": NAME, "prompt": "hello"},
        "/detokenize": {"model": NAME, "tokens": [1]},
    }[path]
    fields = [*good, "stream_options", "logit_bias", "response_format", "\ud800", "messages", "prompt"]
    bodies = [good | {name: value} for name in fields for value in ODD]
    bodies += [good | {draw.choice(fields): draw.choice(ODD) for _ in range(3)} for _ in range(40)]
    if path == "/v1/chat/completions":
        bodies += [good | {"messages": [{"role": role, "content": content}]} for role in ODD for content in ODD[::3]]
    for body in bodies:
        response = await door.client.post(path, content=json.dumps(body).encode())
        if response.status_code != 200:
            refused(response, 400, 404, 422)


async def test_headers(door: Door) -> None:
    keys = [b"", b"Bearer", b"bearer wrong", b"Basic secret", b"secret", b"Bearer secretx", b"Bearer \xff\xfe"]
    keys += [b"Bearer " + b"k" * 4000, b"Bearer secret, Bearer secret"]
    async with httpx.AsyncClient(base_url=door.url) as stranger:
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nowhere", *POSTS):
            refused(await stranger.get(path), 401)
        for key in keys:
            for response in (
                await stranger.get("/v1/models", headers={b"authorization": key}),
                await stranger.post("/v1/completions", json=GOOD, headers={b"authorization": key}),
            ):
                message = refused(response, 401)
                assert KEY not in message
        assert (await stranger.get("/health")).status_code == 200
    for kind in (b"text/plain", b"multipart/form-data; boundary=x", b"application/json; charset=utf-16", b"\xff", b""):
        response = await door.client.post("/v1/completions", content=json.dumps(GOOD), headers={b"content-type": kind})
        if response.status_code != 200:
            refused(response, 400)
    for method in ("PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        refused(await door.client.request(method, "/v1/completions", json=GOOD), 405)
    paths = [
        "/v1",
        "/v1/completions/",
        "/v1/models/" + "x" * 5000,
        "/%00",
        "/..%2f..%2fetc",
        "/v1/models/%ff%fe",
        "//v1/models",
    ]
    for path in paths:
        response = await door.client.get(path, follow_redirects=False)
        assert refused(response, 404, 405)


async def test_bytes_that_are_no_http(door: Door) -> None:
    """What the HTTP parser itself refuses gets its 400, or the connection is closed; what never ends holds nothing."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\n"
    chunked = head + b"transfer-encoding: chunked\r\n\r\n"
    lengths = (b"-5", b"x", b"5\r\ncontent-length: 6", b"99999999999999999999", b"60000", b"9" * 5000)
    sends = [
        *(head + b"content-length: " + length + b"\r\n\r\n" for length in lengths),
        *(
            b"\x00" * 100,
            b"GET\r\n\r\n",
            b"BREW / HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ),
        *(head + b"bad header\r\n\r\n", head + b"x: " + b"y" * 200_000 + b"\r\n\r\n"),
        *(chunked + b"zz\r\n", chunked + b"f" * 18 + b"\r\n", chunked + b"ea61\r\n" + b"x" * 60_001 + b"\r\n0\r\n\r\n"),
    ]
    host, _, port = door.url.removeprefix("http://").partition(":")
    held_open = []
    for sent in sends:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        answer = await asyncio.wait_for(reader.read(12), 10)
        assert answer in (b"", b"HTTP/1.1 400", b"HTTP/1.1 413"), (sent[:80], answer)
        writer.close()
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: " + b"0" * 5000 + b"\r\n\r\n")
    assert await asyncio.wait_for(reader.read(12), 10) == b"HTTP/1.1 200"
    writer.close()
    for sent in (b"", b"POST /v1", head, head + b"content-length: 500\r\n\r\n{", chunked + b'5\r\n{"pro'):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        held_open.append(writer)
    await door.good()
    for writer in held_open:
        writer.close()
    pipelined = (head + b"content-length: 1\r\n\r\n{") * 20
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(pipelined + b"GET /nowhere HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\nconnection: close\r\n\r\n")
    answers = await asyncio.wait_for(reader.read(), 10)
    assert answers.count(b"HTTP/1.1 400") == 20 and answers.count(b"HTTP/1.1 404") == 1
    writer.close()
