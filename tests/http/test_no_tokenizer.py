"""A model that came without a tokenizer: token ids go in and come out, and whoever sends text hears why it can't be read."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from gmanager import RequestRefused, SamplingParams
from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import Service, serve
from tests.support.tiny import make_model, reference

PROMPT = [5, 6, 7, 8]
WHY = "this model has no tokenizer: give token ids"


@pytest.fixture(scope="session")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model("llama", tmp_path_factory.mktemp("mute"))
    for file in path.glob("*token*"):
        file.unlink()
    return path


@pytest.fixture
async def service(farm: Farm, mute: Path) -> AsyncIterator[Service]:
    async with serve(farm, 1, Setup(model=mute, served_model_name="tiny")) as service:
        yield service


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with gateway(service.server.address) as url, httpx.AsyncClient(base_url=url) as client:
        yield client


async def test_token_ids_through_the_client(service: Service, mute: Path) -> None:
    expected = reference(mute, tuple(PROMPT), 8).token_ids
    params = SamplingParams(max_tokens=8, temperature=0, stop_token_ids=expected[5:6], logprobs=1, prompt_logprobs=1)
    chunks = [chunk async for chunk in service.client.generate(PROMPT, params)]
    assert [token for chunk in chunks for token in chunk.token_ids] == expected[: expected.index(expected[5]) + 1]
    assert "".join(chunk.text for chunk in chunks) == ""
    assert len(chunks[0].prompt_logprobs or []) == len(PROMPT) - 1
    for given, field in (("hello", "prompt"), (PROMPT, "stop")):
        with pytest.raises(RequestRefused, match=f"^{field}: {WHY}$"):
            [chunk async for chunk in service.client.generate(given, SamplingParams(stop="x"))]
    with pytest.raises(RequestRefused, match=f"^messages: {WHY}$"):
        [chunk async for chunk in service.client.chat([{"role": "user", "content": "hello"}])]


async def test_token_ids_over_http(http: httpx.AsyncClient, mute: Path) -> None:
    expected = reference(mute, tuple(PROMPT), 4).token_ids
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "return_token_ids": True, "logprobs": 1}
    (choice,) = (await http.post("/v1/completions", json=asked)).json()["choices"]
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == ("", expected, "length")
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in expected]
    assert choice["logprobs"]["text_offset"] == [0] * 4
    assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top)
    whole = (await http.post("/v1/completions", json=asked | {"prompt": [PROMPT, PROMPT], "echo": True})).json()
    for choice in whole["choices"]:
        assert choice["text"] == ""
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in PROMPT + expected]
    async with http.stream("POST", "/v1/completions", json=asked | {"stream": True}) as stream:
        lines = [line async for line in stream.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {"prompt": "hello"}, "prompt"),
        ("/v1/completions", {"prompt": ["hello", "you"]}, "prompt.0"),
        ("/v1/completions", {"stop": ["x"]}, "stop"),
        ("/v1/completions", {"bad_words": ["x"]}, "bad_words"),
        ("/v1/completions", {"guided_regex": "x"}, "guided_regex"),
        ("/v1/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}, "messages"),
        ("/tokenize", {"prompt": "hello"}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "hello"}]}, "messages"),
    ],
)
async def test_text_is_refused_by_the_name_of_its_field(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], field: str
) -> None:
    prompt = {"prompt": PROMPT} if path == "/v1/completions" else {}
    answer = await http.post(path, json={"model": "tiny"} | prompt | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["message"], error["param"]) == (400, f"{field}: {WHY}", field)


async def test_tokens_without_text(http: httpx.AsyncClient) -> None:
    answer = await http.post("/detokenize", json={"tokens": PROMPT})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "tokens")
    assert error["message"] == "tokens: this model has no tokenizer, so that its tokens have no text"
