"""Structured output as clients ask for it, with the real `openai` package."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import serve
from tests.support.tiny import make_model

TURNS: Any = [{"role": "user", "content": "hello"}]


NESTED = {
    "type": "object",
    "properties": {"sizes": {"type": "array", "items": {"$ref": "#/$defs/size"}}},
    "$defs": {"size": {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "a(b"}]}},
}


class Parcel(BaseModel):
    colour: Literal["red", "green"]
    sizes: list[int] = Field(min_length=1, max_length=3)
    is_heavy: bool


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model("llama", tmp_path_factory.mktemp("ends"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 93}))
    return path


@pytest.fixture
async def client(farm: Farm, llama: Path) -> AsyncIterator[AsyncOpenAI]:
    async with (
        serve(farm, 1, Setup(model=llama)) as service,
        gateway(service.server.address) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_what_openai_parses(client: AsyncOpenAI, llama: Path) -> None:
    for seed in range(3):
        answer = await client.chat.completions.parse(
            model=str(llama), messages=TURNS, response_format=Parcel, seed=seed, max_tokens=400
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Parcel)


async def test_every_form_streamed_or_whole(client: AsyncOpenAI, llama: Path) -> None:
    digits = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": digits}}}, r'\{"a": ?[12]\}'),
        ({"response_format": {"type": "json_object", "schema": digits}}, r'\{"a": ?[12]\}'),
        ({"structured_outputs": {"json": digits}}, r'\{"a": ?[12]\}'),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"choice": ["left", "right"], "json": None}}, "left|right"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]'}}, "x[0-9]"),
        ({"guided_json": json.dumps(digits)}, r'\{"a": ?[12]\}'),
        ({"guided_regex": "c{2,4}"}, "c{2,4}"),
        ({"guided_choice": ["up"]}, "up"),
        ({"guided_grammar": 'start: "a" | "b"'}, "[ab]"),
    ]
    for asked, want in cases:
        for seed in range(2):
            given: Any = {"model": str(llama), "messages": TURNS, "seed": seed, "max_tokens": 60, "extra_body": asked}
            whole = (await client.chat.completions.create(**given)).choices[0].message.content
            assert whole is not None
            assert re.fullmatch(want, whole), asked
            stream = await client.chat.completions.create(**given, stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == whole
    prompted = await client.completions.create(
        model=str(llama), prompt="hello", max_tokens=60, extra_body={"guided_regex": "[xy]{5}"}
    )
    assert re.fullmatch("[xy]{5}", prompted.choices[0].text)


async def test_any_object(client: AsyncOpenAI, llama: Path) -> None:
    answer = await client.chat.completions.create(
        model=str(llama), messages=TURNS, response_format={"type": "json_object"}, max_tokens=300, logit_bias={"92": 50}
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@pytest.mark.parametrize(
    ("asked", "param", "sentence"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", 'an object of type .* is needed, got type "xml"'),
        ({"response_format": 3}, "response_format", "is needed, got 3"),
        ({"response_format": {"type": ["text"]}}, "response_format", "is needed, got type a list of 1"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "an object with a schema is needed"),
        ({"guided_regex": ["a"]}, "guided_regex", "a string is needed, got a list of 1"),
        ({"guided_choice": []}, "guided_choice", "guided_choice: is empty"),
        ({"guided_choice": ["a", 1]}, "guided_choice.1", "a choice must be a string, got 1"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice.1", "a choice must not be empty"),
        ({"guided_choice": "ab"}, "guided_choice", 'a list of texts is needed, got "ab"'),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "one structure; guided_regex asks for another"),
        ({"structured_outputs": {"xgrammar": "a"}}, "structured_outputs.xgrammar", "not implemented; there are json,"),
        ({"guided_regex": "a(b"}, "guided_regex", "guided_regex: at 1.*unclosed group"),
        ({"guided_json": {"type": "objec"}}, "guided_json.type", "400 - guided_json.type: Invalid type: objec"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": NESTED}}},
            "response_format.json_schema.schema.$defs.size.anyOf.1.pattern",
            r"400 - response_format.json_schema.schema.\$defs.size.anyOf.1.pattern: regex parse error",
        ),
        (
            {"structured_outputs": {"json": json.dumps(NESTED)}},
            "structured_outputs.json.$defs.size.anyOf.1.pattern",
            "regex parse",
        ),
        (
            {"guided_json": {"minimum": 2, "maximum": 1, "type": "integer"}},
            "guided_json",
            "400 - guided_json: Unsatis",
        ),
        (
            {"response_format": {"type": "json_object", "schema": {"type": "objec"}}},
            "response_format.schema.type",
            "400 - response_format.schema.type: Invalid type: objec",
        ),
        ({"guided_json": "{"}, "guided_json", "Expecting property name enclosed"),
        ({"guided_json": "[]"}, "guided_json", "can't be read"),
    ],
)
async def test_what_is_wrong_is_said(
    client: AsyncOpenAI, llama: Path, asked: dict[str, Any], param: str | None, sentence: str
) -> None:
    for asking in (
        client.chat.completions.create(model=str(llama), messages=TURNS, extra_body=asked),
        client.completions.create(model=str(llama), prompt="hello", extra_body=asked),
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            await asking
        assert raised.value.param == param
        assert re.search(sentence, raised.value.message, re.DOTALL)
