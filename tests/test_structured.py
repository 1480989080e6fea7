"""StructuredOutputsParams output through a whole service: every text is what was asked for, wherever it is computed."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gmanager import AsyncClient, RequestRefused, SamplingParams
from gmanager.wire.messages import StructuredOutputsParams
from tests.support.exactness import move_on
from tests.support.farm import Farm
from tests.support.service import Setup, serve
from tests.support.tiny import make_model

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 99}, "minItems": 2, "maxItems": 4},
        "is": {"type": "boolean"},
    },
    "required": ["colour", "sizes", "is"],
    "additionalProperties": False,
}
ASKED = {
    "json": StructuredOutputsParams(json=json.dumps(SCHEMA)),
    "regex": StructuredOutputsParams(regex=r"[a-f]{3}-[0-9]{2,5}"),
    "choice": StructuredOutputsParams(choice=["yes", "no", 'pe"rhaps']),
    "grammar": StructuredOutputsParams(grammar='start: "(" inner ")"\ninner: /[0-9]{1,3}/ | "(" inner ")"'),
}


def is_right(kind: str, text: str) -> bool:
    match kind:
        case "json":
            value = json.loads(text)
            sizes = value["sizes"]
            return (
                list(value) == ["colour", "sizes", "is"]
                and value["colour"] in ("red", "green")
                and 2 <= len(sizes) <= 4
                and all(1 <= size <= 99 for size in sizes)
                and isinstance(value["is"], bool)
            )
        case "regex":
            return re.fullmatch(r"[a-f]{3}-[0-9]{2,5}", text) is not None
        case "choice":
            return text in ("yes", "no", 'pe"rhaps')
    return re.fullmatch(r"\(+\d{1,3}\)+", text) is not None and text.count("(") == text.count(")")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model("llama", tmp_path_factory.mktemp("structured"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 93}))
    return path


def prompt(seed: int) -> list[int]:
    return [(i * i * 31 + i * 17 + seed * 101) % 256 for i in range(50)]


async def ask(client: AsyncClient, kind: str, seed: int, *, move: bool = False, **more: Any) -> str:
    """A whole text, which ended by itself."""
    params = SamplingParams(max_tokens=150, seed=seed, structured_outputs=ASKED[kind], **more)
    request_id = f"{kind}-{seed}-{move}"
    text, reason, moving = "", None, None
    async for chunk in client.generate(prompt(seed), params, request_id=request_id, spread="all" if move else 1):
        text, reason = text + chunk.text, chunk.finish_reason
        if move and moving is None:
            moving = asyncio.create_task(move_on(client, request_id))
    if moving is not None:
        await asyncio.gather(moving, return_exceptions=True)  # a text of three tokens may have ended first
    assert reason == "stop", text
    assert is_right(kind, text), text
    return text


async def test_every_form_at_once_and_the_same_over_two_instances(farm: Farm, llama: Path) -> None:
    async with serve(farm, 2, Setup(model=llama, chunk_tokens=16)) as service:
        cases = [(kind, seed) for kind in ASKED for seed in range(3)]
        together = await asyncio.gather(*(ask(service.client, kind, seed) for kind, seed in cases))
        assert len(set(together)) > len(ASKED)
        moved = [await ask(service.client, kind, seed, move=True) for kind, seed in cases]
        assert moved == together
        stats = await service.client.stats()
        assert stats.counters.home_moves >= 1


async def test_after_preemption_and_beside_penalties(farm: Farm, llama: Path) -> None:
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 20, "maxItems": 20}
    structured = StructuredOutputsParams(json=json.dumps(schema))
    params = SamplingParams(
        max_tokens=100, temperature=0, structured_outputs=structured, frequency_penalty=1.0, bad_words=["3"], min_tokens=100
    )

    async with serve(farm, 2, Setup(model=llama, kv_tokens=160, chunk_tokens=64)) as service:

        async def one(seed: int) -> str:
            return "".join([chunk.text async for chunk in service.client.generate(prompt(seed), params)])

        alone = [await one(seed) for seed in range(4)]
        assert all(len(json.loads(text)) == 20 and "3" not in text for text in alone)
        # so many that there is never room for all, however late one begins
        assert await asyncio.gather(*(one(seed) for _ in range(3) for seed in range(4))) == 3 * alone
        assert (await service.client.stats()).counters.preemptions >= 1


async def test_an_end_token_that_has_a_text_ends_nothing_before_its_time(farm: Farm, llama: Path) -> None:
    """Token 93, which ends this model's texts, is `~`: it would do in the middle, but what is whole then?"""
    pushed = {93: 100.0, 65: 90.0}  # to `~`, and else to `b`
    cases = {"a[^b]*b": "ab", "a~*": "a", "~": ""}
    async with serve(farm, 1, Setup(model=llama)) as service:
        for regex, want in cases.items():
            params = SamplingParams(
                max_tokens=20, temperature=0, logit_bias=pushed, structured_outputs=StructuredOutputsParams(regex=regex)
            )
            chunks = [chunk async for chunk in service.client.generate(prompt(0), params)]
            assert ("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason) == (want, "stop")


async def test_a_model_that_can_end_no_text_refuses(farm: Farm, tmp_path: Path) -> None:
    async with serve(farm, 1, Setup(model=make_model("llama", tmp_path))) as service:
        with pytest.raises(RequestRefused, match="this one has no end token"):
            await anext(service.client.generate([1, 2], SamplingParams(structured_outputs=ASKED["choice"])))


@pytest.mark.parametrize(
    ("structured", "sentence"),
    [
        (StructuredOutputsParams(json='{"type": "objec"}'), "json at #/type: Invalid type: objec"),
        (StructuredOutputsParams(json="{"), "the structure asked for can't be read: Expecting property name"),
        (StructuredOutputsParams(regex="a(b"), "regex: at 1.*unclosed group"),
        (StructuredOutputsParams(grammar='start: "a" | b'), 'grammar: at 1.*unknown name: "b"'),
    ],
)
async def test_what_makes_no_sense_is_refused_with_the_place(
    farm: Farm, llama: Path, structured: StructuredOutputsParams, sentence: str
) -> None:
    async with serve(farm, 1, Setup(model=llama)) as service:
        with pytest.raises(RequestRefused, match=re.compile(sentence, re.DOTALL)):
            await anext(service.client.generate([1, 2], SamplingParams(structured_outputs=structured)))
