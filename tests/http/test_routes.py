"""The routes that aren't OpenAI's, the limits, and what a gateway says when there is nobody to ask."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from gmanager.config import GManagerConfig
from gmanager.gateway import door
from gmanager.server import Server
from gmanager.text.tokenizer import Tokenizer
from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import Service, at_rest, serve
from tests.support.tiny import make_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
async def service(farm: Farm, llama: Path) -> AsyncIterator[Service]:
    async with serve(farm, 1, Setup(model=llama)) as service:
        yield service


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with gateway(service.server.address, max_body_bytes=20_000) as url, httpx.AsyncClient(base_url=url) as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which must have OpenAI's shape."""
    body = response.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


async def test_health_and_version(http: httpx.AsyncClient) -> None:
    assert (await http.get("/health")).json() == {"status": "ready"}
    assert list((await http.get("/version")).json()) == ["version"]


async def test_text_becomes_tokens_and_back(http: httpx.AsyncClient, llama: Path) -> None:
    text = "h\u00e9llo, \U0001f600"
    answer = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    ids = list(text.encode())
    assert answer["count"] == len(ids) == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    back = await http.post("/detokenize", json={"model": str(llama), "tokens": answer["tokens"]})
    assert back.json() == {"prompt": text}
    turns = [{"role": "user", "content": "hi"}]
    answer = (await http.post("/tokenize", json={"messages": turns})).json()
    back = await http.post("/detokenize", json={"tokens": answer["tokens"]})
    assert back.json() == {"prompt": "<user>hi\n<assistant>"}
    for wrong in ({}, {"prompt": "x", "messages": turns}):
        refused = await http.post("/tokenize", json=wrong)
        assert (refused.status_code, error_of(refused)["message"]) == (400, "give prompt or messages, one of them")
    assert (await http.post("/detokenize", json={"tokens": [2**32]})).status_code == 400


async def test_bodies_over_the_limit(http: httpx.AsyncClient, service: Service, llama: Path) -> None:
    body = json.dumps({"model": str(llama), "prompt": "x" * 30_000}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    whole = await http.post("/v1/completions", content=body)
    assert whole.status_code == 413
    assert error_of(whole)["message"] == f"the body has {len(body):,} bytes; at most 20,000 are taken"
    chunked = await http.post("/v1/completions", content=pieces())
    assert chunked.status_code == 413
    assert error_of(chunked)["message"] == "the body has over 20,000 bytes; at most 20,000 are taken"
    assert not (await service.client.stats()).requests


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("POST", "/health", 405), ("GET", "/nowhere", 404), ("GET", "/v1/models/none", 404)],
)
async def test_routes_that_are_none(method: str, path: str, status: int, http: httpx.AsyncClient) -> None:
    response = await http.request(method, path)
    assert response.status_code == status
    error_of(response)


async def test_bodies_that_are_none(http: httpx.AsyncClient) -> None:
    for body in (b"", b"{", b"[]", b"null", b'{"model": 1, "prompt": "x"}', b"\xff\xfe", b"[" * 10_000):
        response = await http.post("/v1/completions", content=body)
        assert response.status_code == 400, (body, response.text)
        error_of(response)


async def test_a_scrape_shows_the_cluster_and_the_gateway(http: httpx.AsyncClient, llama: Path) -> None:
    body = {"model": str(llama), "prompt": "hello", "max_tokens": 5, "ignore_eos": True}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert (await http.post("/v1/completions", json=body | {"prompt": [1] * 600})).status_code == 400
    await http.get("/nowhere")
    assert (await http.get(f"/v1/models/{llama}")).status_code == 200
    scrape = await http.get("/metrics")
    assert scrape.headers["content-type"].startswith("text/plain; version=")
    lines = set(scrape.text.splitlines())
    assert {
        'distattn:http_requests_total{path="/v1/completions",status="200"} 1.0',
        'distattn:http_requests_total{path="/v1/completions",status="400"} 1.0',
        'distattn:http_requests_total{path="other",status="404"} 1.0',
        'distattn:http_requests_total{path="/v1/models/{name:path}",status="200"} 1.0',
        "distattn:prompt_tokens_total 5.0",
        "distattn:generation_tokens_total 5.0",
        "distattn:time_to_first_token_seconds_count 1.0",
        'distattn:request_success_total{finished_reason="length"} 1.0',
        'distattn:requests_refused_total{reason="too_long"} 1.0',
        'distattn:kv_tokens{cell="main",kind="used",rank="0"} 0.0',
    } <= lines, scrape.text


async def test_as_many_at_once_as_may(service: Service, llama: Path) -> None:
    async with gateway(service.server.address, max_concurrency=2) as url, httpx.AsyncClient(base_url=url) as client:
        body = {"model": str(llama), "prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body), client.stream("POST", "/v1/completions", json=body):
            refused = await client.post("/v1/completions", json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert error_of(refused)["message"] == "2 requests are under way, as many as may (max-concurrency)"
            assert error_of(refused)["code"] == "max_concurrency"
            assert (await client.get("/health")).status_code == 200
        await at_rest(service.client)
        assert (await client.post("/v1/completions", json=body | {"max_tokens": 2})).status_code == 200


async def test_a_body_that_stays_away_holds_no_place(service: Service, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "BODY_SILENCE_S", 0.3)
    async with gateway(service.server.address, max_concurrency=1) as url, httpx.AsyncClient(base_url=url) as client:
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{")
        answer = await asyncio.wait_for(reader.readuntil(b"}}"), 10)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"nothing of the body has come for 0 s, after 1 bytes" in answer
        body = {"model": str(llama), "prompt": "hello", "max_tokens": 2}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        writer.close()


async def test_a_client_that_leaves_is_not_encoded_for(
    http: httpx.AsyncClient, service: Service, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def encode(_: Tokenizer, text: str, **_more: Any) -> None:
        try:
            await asyncio.sleep(20)
            ended.set_result("encoded")
        except asyncio.CancelledError:
            ended.set_result("cancelled")
            raise

    monkeypatch.setattr(Tokenizer, "encode", encode)
    with pytest.raises(httpx.ReadTimeout):
        await http.post("/v1/completions", json={"model": str(llama), "prompt": "hello"}, timeout=0.5)
    assert await asyncio.wait_for(ended, 10) == "cancelled"


async def test_a_full_queue(farm: Farm, llama: Path) -> None:
    """The gManager's own limit, for requests of all gateways and clients."""
    async with (
        serve(farm, 1, Setup(model=llama, kv_tokens=128), max_queue=1) as service,
        gateway(service.server.address) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as client,
    ):
        body = {"model": str(llama), "prompt": "x" * 60, "max_tokens": 40, "ignore_eos": True}
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(8)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 1 <= len(refused) < 8
        for answer in refused:
            assert (answer.status_code, answer.headers["retry-after"], error_of(answer)["code"]) == (429, "1", "queue_full")


async def test_nobody_is_ready(llama: Path) -> None:
    """No cell, then no gManager."""
    server = Server(GManagerConfig(bind="tcp://127.0.0.1:*"))
    server.start()
    running = asyncio.create_task(server.run())
    async with gateway(server.address) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        body = {"model": str(llama), "prompt": "hello"}

        async def check(text: str) -> None:
            for answer in (
                await client.get("/health"),
                await client.get("/v1/models"),
                await client.post("/v1/completions", json=body),
                await client.post("/v1/completions", json=body | {"stream": True}),
                await client.post("/tokenize", json={"prompt": "x"}),
            ):
                assert (answer.status_code, error_of(answer)["code"]) == (503, "not_ready")
                assert text in error_of(answer)["message"]

        await check("no instances are ready to serve")
        server.stop()
        await running
        async with asyncio.timeout(15):
            while "does not answer" not in error_of(await client.get("/health"))["message"]:
                await asyncio.sleep(0.1)
        await check("does not answer")


async def test_a_gateway_outlives_its_gmanager(farm: Farm, llama: Path) -> None:
    """It connects again, to another gManager at the same address, and serves the cell that has formed there."""
    async with serve(farm, 1, Setup(model=llama)) as first:
        address = first.server.address
        context = gateway(address)
        url = await context.__aenter__()
    try:
        async with (
            httpx.AsyncClient(base_url=url, timeout=30) as client,
            serve(farm, 1, Setup(model=llama), bind=address),
        ):
            async with asyncio.timeout(20):
                while (await client.get("/health")).status_code != 200:
                    await asyncio.sleep(0.1)
            body = {"model": str(llama), "prompt": "hello", "max_tokens": 3}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
    finally:
        await context.__aexit__(None, None, None)
