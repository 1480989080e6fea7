"""schemathesis asks what the OpenAPI document allows, and what it doesn't: answers are those that the document names."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2 as httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gmanager.config import GManagerConfig
from gmanager.server import Server
from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import at_rest, serve
from tests.support.tiny import make_model

NAME = "tiny"
CONFORMS = [status_code_conformance, content_type_conformance, response_schema_conformance]


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """The document, less what would only be refused or only take long: what isn't implemented, another model, many tokens."""
    for schema in document["components"]["schemas"].values():
        fields = schema.get("properties", {})
        for name in [name for name, field in fields.items() if field.keys() <= {"title", "default"}]:
            del fields[name]  # known, and refused unless it asks for nothing
        if "model" in fields:
            fields["model"] = {"const": NAME}
        for name, most in (("max_tokens", 6), ("max_completion_tokens", 6), ("n", 2)):
            if name in fields:
                fields[name] = {"type": "integer", "minimum": 1, "maximum": most}
    return document


def attack(document: dict[str, Any], url: str, examples: int, *, ready: bool) -> dict[str, set[int]]:
    """The statuses that each operation answered with."""
    operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
    return {operation.label: attack_one(operation, url, examples, ready=ready) for operation in operations}


def attack_one(operation: APIOperation[Any, Any, Any, Any], url: str, examples: int, *, ready: bool) -> set[int]:
    modes = [operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]
    statuses: set[int] = set()

    @settings(max_examples=examples, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of(modes))
    def ask(case: Case) -> None:
        response = case.call(base_url=url)
        statuses.add(response.status_code)
        checks = CONFORMS if response.status_code == 503 and not ready else [*CONFORMS, not_a_server_error]
        case.validate_response(response, checks=checks)

    ask()
    return statuses


async def test_a_service_answers_as_its_document_says(farm: Farm, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    async with (
        serve(farm, 1, Setup(model=model, served_model_name=NAME)) as service,
        gateway(service.server.address) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        body = {"model": NAME, "prompt": "hello", "max_tokens": 8, "temperature": 0}
        before = (await client.post("/v1/completions", json=body)).json()["choices"]
        document = narrowed((await client.get("/openapi.json")).json())
        seen = await asyncio.to_thread(attack, document, url, 30, ready=True)
        for route in ("completions", "chat/completions", "responses", "messages", "messages/count_tokens"):
            assert {200, 400} <= seen[f"POST /v1/{route}"], route
        await at_rest(service.client)
        assert (await client.post("/v1/completions", json=body)).json()["choices"] == before


async def test_without_instances_it_is_unavailable_as_its_document_says() -> None:
    server = Server(GManagerConfig(bind="tcp://127.0.0.1:*"))
    server.start()
    running = asyncio.create_task(server.run())
    try:
        async with gateway(server.address) as url, httpx.AsyncClient(base_url=url) as client:
            document = narrowed((await client.get("/openapi.json")).json())
            seen = await asyncio.to_thread(attack, document, url, 5, ready=False)
            answered = [operation for operation, statuses in seen.items() if 200 in statuses]
            assert answered == ["GET /version", "GET /load", "GET /metrics"]
            for route in ("completions", "chat/completions", "responses", "messages"):
                assert 503 in seen[f"POST /v1/{route}"], route
    finally:
        server.stop()
        await running
