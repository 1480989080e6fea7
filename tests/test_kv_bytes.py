"""KV of 8 bits over real processes: wherever it lies, a text goes on alike, and nearly as with KV in the model's own dtype.

Rows that are split otherwise are rounded otherwise in fp32, and a number that lies just between two of 8 bits may then become
the other. So log-probabilities are compared with one instance's by what such a number changes, and ids up to the first close
call.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest

from gmanager import AsyncClient, SamplingParams
from instance.config import KVDType
from tests.support.exactness import move_on, prompt
from tests.support.farm import Farm, Setup
from tests.support.service import serve
from tests.support.tiny import make_model, reference

NEW = 30
ROUNDED = 0.005
"""Of a log-probability: what a few numbers that are rounded to the other neighbour change."""
NEAR = 0.25
"""What 8 bits change of one, in these tiny models of random weights."""


@dataclass(frozen=True)
class Said:
    """A prompt's log-probabilities; and a greedy answer: tokens, theirs, and by how much each was ahead of the next best."""

    prompt: list[float]

    tokens: list[int]
    scores: list[float]
    margins: list[float]


async def say(client: AsyncClient, ids: list[int], *, spread: int | str | None = None, move: bool = False) -> Said:
    """`move`: the home moves on after seven tokens."""
    params = SamplingParams(max_tokens=NEW, temperature=0, logprobs=2, prompt_logprobs=0, ignore_eos=True)
    said = Said([], [], [], [])
    request = f"{len(ids)}-{spread}-{move}"
    async for chunk in client.generate(ids, params, spread=spread, request_id=request):  # type: ignore[arg-type]
        said.tokens.extend(chunk.token_ids)
        said.prompt.extend(score.logprob for score in chunk.prompt_logprobs or [])
        for score in chunk.logprobs or []:
            said.scores.append(score.logprob)
            said.margins.append(score.top_logprobs[0] - score.top_logprobs[1])
        if move and len(said.tokens) == 7:
            await move_on(client, request)
    return said


def compared(got: Said, want: Said) -> int:
    """How many tokens were, up to the first that is a close call: they must be the same."""
    assert max((abs(a - b) for a, b in zip(got.prompt, want.prompt, strict=True)), default=0) < ROUNDED
    for at, margin in enumerate(want.margins):
        if margin < 2 * ROUNDED:
            return at
        assert got.tokens[at] == want.tokens[at], f"token {at}, ahead by {margin}"
        assert abs(got.scores[at] - want.scores[at]) < ROUNDED
    return len(want.margins)


async def all_ways(farm: Farm, size: int, setup: Setup, prompts: list[list[int]]) -> list[Said]:
    """Each prompt over all instances; the last once more, from the cache; the first with a home that moves; all at once."""
    several = size > 1
    async with serve(farm, size, setup) as service:
        client = service.client
        (cell,) = (await client.stats()).cells
        assert cell.kv_dtype == setup.kv_dtype
        said = [await say(client, ids, spread="all") for ids in prompts]
        said.append(await say(client, prompts[-1]))
        said.append(await say(client, prompts[0], spread=1 if several else None, move=several))
        said += await asyncio.gather(*(say(client, ids, spread=size) for ids in prompts))
    return said


@pytest.mark.parametrize(
    ("kind", "kv_dtype"),
    [
        *(("llama", "fp8"), ("qwen3", "fp8"), ("gemma2", "fp8"), ("gpt-oss", "fp8"), ("deepseek", "fp8")),
        *(("llama", "int8"), ("gpt-oss", "int8"), ("deepseek", "int8")),
    ],
)
async def test_placement_hardly_shows(kind: str, kv_dtype: KVDType, farm: Farm, tmp_path: Path) -> None:
    """On one, two and three instances, in chunks and blocks of several sizes; and near transformers in fp32."""
    path = make_model(kind, tmp_path)
    prompts = [prompt(path, length, new=NEW, seed=i) for i, length in enumerate((1, 40, 130))]
    whole = await all_ways(farm, 1, Setup(model=path, kv_tokens=1024, kv_dtype=kv_dtype, chunk_tokens=256), prompts)
    for ids, said in zip(prompts, whole, strict=False):
        first = reference(path, tuple(ids), 1)
        assert said.tokens[0] == first.token_ids[0] or first.margin < NEAR
        assert abs(said.scores[0] - first.logprobs[0]) < NEAR
    for size, block, chunk in ((1, 16, 7), (2, 16, 24), (3, 4, 24)):
        setup = Setup(model=path, kv_tokens=1024, kv_dtype=kv_dtype, block_size=block, chunk_tokens=chunk)
        said_here = await all_ways(farm, size, setup, prompts)
        assert sum(compared(got, want) for got, want in zip(said_here, whole, strict=True)) > 8


@pytest.mark.parametrize(("tp", "pp", "size", "kv_dtype"), [(2, 1, 2, "fp8"), (1, 2, 2, "int8"), (2, 2, 1, "int8")])
async def test_ranks_and_stages_store_what_is_theirs(
    tp: int, pp: int, size: int, kv_dtype: KVDType, farm: Farm, tmp_path: Path
) -> None:
    """Each rank has the scales of its heads and layers: instances of several ranks answer as one process does."""
    path = make_model("llama", tmp_path)
    prompts = [prompt(path, length, new=NEW, seed=i) for i, length in enumerate((1, 40, 130))]
    farm.grow(size * tp * pp)
    whole = await all_ways(farm, 1, Setup(model=path, kv_tokens=1024, kv_dtype=kv_dtype, chunk_tokens=256), prompts)
    setup = Setup(model=path, kv_tokens=1024, kv_dtype=kv_dtype, chunk_tokens=24, tp=tp, pp=pp)
    said_here = await all_ways(farm, size, setup, prompts)
    assert sum(compared(got, want) for got, want in zip(said_here, whole, strict=True)) > 8
