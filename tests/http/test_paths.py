"""Every way to ask for a route, and pages of other origins that ask."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import Service, at_rest, serve
from tests.support.tiny import make_model

NAME, KEY, PAGE = "tiny", "secret", "https://page.example"
BODY = {"model": NAME, "prompt": "hello", "max_tokens": 3}
GETS = ("/", "/docs", "/health", "/ping", "/load", "/metrics", "/version", "/openapi.json", "/v1/models", f"/v1/models/{NAME}")


@pytest.fixture
async def service(farm: Farm, tmp_path: Path) -> AsyncIterator[Service]:
    setup = Setup(model=make_model("llama", tmp_path / "model"), served_model_name=NAME)
    async with serve(farm, 1, setup) as service:
        yield service


async def test_head_and_slashes(service: Service) -> None:
    async with gateway(service.server.address) as url, httpx.AsyncClient(base_url=url) as client:
        for path in GETS:
            got = await client.get(path)
            head = await client.head(path)
            assert (got.status_code, head.status_code, head.content) == (200, 200, b""), path
            assert head.headers["content-type"] == got.headers["content-type"]
            assert int(head.headers["content-length"]) > 0
            assert (await client.get(f"{path}/")).status_code == 200
        for path in ("/v1/completions", "/v1/completions/"):
            assert (await client.post(path, json=BODY)).status_code == 200
            assert (await client.head(path)).status_code == 405
        assert (await client.head("/nowhere")).status_code == 404


async def test_what_the_gateway_says_of_itself(service: Service) -> None:
    async with gateway(service.server.address, max_concurrency=7) as url, httpx.AsyncClient(base_url=url) as client:
        routes = (await client.get("/")).json()["routes"]
        assert {"method": "POST", "path": "/v1/completions", "purpose": "Go on with one or more prompts."} in routes
        assert {"method": "POST", "path": "/v1/messages", "purpose": "Answer a conversation, as Anthropic has it."} in routes
        page = await client.get("/docs")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert all(route["path"] in page.text for route in routes)
        assert "//" not in page.text, "it fetches nothing"
        asked = BODY | {"max_tokens": 400, "ignore_eos": True, "stream": True}
        assert (await client.get("/load")).json() == {"server_load": 0, "max_concurrency": 7}
        async with client.stream("POST", "/v1/completions", json=asked):
            assert (await client.get("/load")).json() == {"server_load": 1, "max_concurrency": 7}
        await at_rest(service.client)
        async with asyncio.timeout(5):
            while (await client.get("/load")).json()["server_load"]:
                await asyncio.sleep(0.01)


async def test_pages_of_other_origins(service: Service) -> None:
    preflight = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with (
        gateway(service.server.address, allow_origins=(PAGE, "http://other"), api_keys=(KEY,), max_body_bytes=1000) as url,
        httpx.AsyncClient(base_url=url, headers={"origin": PAGE}) as client,
    ):
        asked = await client.options("/v1/completions", headers=preflight)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        key = {"authorization": f"Bearer {KEY}"}
        for answer, status in (
            (await client.post("/v1/completions", json=BODY, headers=key), 200),
            (await client.post("/v1/completions", json=BODY | {"stream": True}, headers=key), 200),
            (await client.post("/v1/completions", json=BODY), 401),
            (await client.post("/v1/completions", json={}, headers=key), 400),
            (await client.post("/v1/completions", content=b"x" * 1001, headers=key), 413),
            (await client.get("/nowhere", headers=key), 404),
        ):
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
            assert "x-ignored-fields" in answer.headers["access-control-expose-headers"]
        other = await client.get("/v1/models", headers=key | {"origin": "https://stranger"})
        assert "access-control-allow-origin" not in other.headers
        assert (await client.options("/v1/completions", headers=preflight | {"origin": "https://stranger"})).status_code == 400
        assert (await client.options("/v1/completions", headers={})).status_code == 405, "without a key"
    async with gateway(service.server.address, allow_origins=("*",)) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/health", headers={"origin": PAGE})).headers["access-control-allow-origin"] == "*"
    async with gateway(service.server.address) as url, httpx.AsyncClient(base_url=url) as client:
        assert "access-control-allow-origin" not in (await client.get("/health", headers={"origin": PAGE})).headers


async def test_a_strict_gateway(service: Service) -> None:
    async with gateway(service.server.address, strict=True) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        turns = [{"role": "user", "content": "x", "annotations": []}]
        assert (await client.post("/tokenize", json={"messages": turns})).status_code == 200
        form = {"response_format": {"type": "text", "schema": {}}}
        for extra, name in (
            (form, "response_format.schema"),
            ({"topk": 5}, "topk"),
            ({"stream_options": {"foo": 1}}, "stream_options.foo"),
        ):
            refused = await client.post("/v1/completions", json=BODY | extra)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == name
            assert refused.json()["error"]["message"] == f"{name}: no such field is known, and this gateway is strict"
