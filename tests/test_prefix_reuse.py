"""What one request has computed is attended to by others where it lies: real processes, beside transformers' own runs.

A pool's blocks are poisoned before they are written, so what is read that isn't there is seen.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from gmanager import AsyncClient, SamplingParams
from tests.support.exactness import NEW, check, clear_prompt
from tests.support.farm import Farm, Setup
from tests.support.service import Service, serve
from tests.support.tiny import make_model, reference

BLOCK = 16
DOC = [(i * i * 31 + i * 17) % 256 for i in range(400)]
OTHERS_MAY_BE_FAR = 16


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _near(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gManager runs in this process; documents of 400 tokens stand for long ones."""
    monkeypatch.setattr("gmanager.cluster.reuse.FAR_TOKENS", OTHERS_MAY_BE_FAR)


def question(path: Path, before: Sequence[int], length: int, seed: int) -> list[int]:
    """Something that is asked about what comes before."""
    return clear_prompt(
        path, lambda attempt: [*before, *((i * 23 + seed * 131 + attempt * 17) % 256 for i in range(length))], NEW
    )


@dataclass
class Answered:
    token_ids: list[int]
    cached_tokens: int
    computed: int
    """Prompt tokens that instances computed for it."""


async def ask(
    service: Service,
    path: Path,
    ids: list[int],
    *,
    spread: int | str | None = None,
    cache_salt: str | None = None,
    cached: int | None = None,
) -> Answered:
    """One after the other: the tokens are transformers' own, and instances have computed what was not cached. `cached`: how
    much that must be."""
    expected = reference(path, tuple(ids), NEW)
    client = service.client
    before = await prefilled(client)
    tokens: list[int] = []
    logprobs: list[float] = []
    told: set[int] = set()
    params = SamplingParams(max_tokens=NEW, temperature=0, logprobs=0, ignore_eos=True)
    async for chunk in client.generate(ids, params, spread=spread, cache_salt=cache_salt):  # type: ignore[arg-type]
        tokens += chunk.token_ids
        logprobs += [p.logprob for p in chunk.logprobs or []]
        told.add(chunk.cached_tokens)
    check(tokens, logprobs, expected)
    (found,) = told
    assert cached is None or found == cached
    async with asyncio.timeout(5):  # counters come with the instances' next beats
        while (computed := await prefilled(client) - before) < len(ids) - found:
            await asyncio.sleep(0.05)
    assert computed == len(ids) - found
    return Answered(tokens, found, computed)


async def prefilled(client: AsyncClient) -> int:
    return (await client.stats()).counters.tokens_prefilled


@pytest.mark.parametrize("spread", ["all", 1], ids=["computed by all", "computed by one"])
async def test_a_document_on_three_instances_is_prefilled_once(farm: Farm, llama: Path, spread: int | str) -> None:
    """What the first question left lies on three; whoever computes the second attends to all of it there."""
    first, second, third = (question(llama, DOC, 40 + i, i) for i in range(3))
    async with serve(farm, 3, Setup(model=llama, kv_tokens=1024, chunk_tokens=64)) as service:
        await ask(service, llama, first, spread="all", cached=0)
        async with asyncio.timeout(5):  # told with beats
            while sum(i.cached_tokens for i in (await service.client.stats()).instances) < len(DOC):
                await asyncio.sleep(0.05)
        assert all(i.cached_tokens for i in (await service.client.stats()).instances)
        answered = await ask(service, llama, second, spread=spread)
        assert len(DOC) - 4 * BLOCK < answered.cached_tokens <= len(DOC), "but for the last block of each run"
        again = await ask(service, llama, third, spread=spread)
        assert again.cached_tokens >= answered.cached_tokens
        stats = await service.client.stats()
        assert stats.counters.kv_bytes == stats.counters.blocks_copied == 0
        assert stats.observed.prefix_queries == len(first) + len(second) + len(third)
        assert stats.observed.prefix_hits == answered.cached_tokens + again.cached_tokens
        used = max(stats.requests.values(), key=lambda request: request.prompt_tokens).kv_tokens
        assert len(used) == 3


async def test_a_document_that_many_ask_about_at_once_is_computed_once(
    farm: Farm, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that come while the first is computed wait for it, and for nothing of each other."""
    monkeypatch.setattr("gmanager.cluster.following.LEAST_SAVED", 64)
    asked = [question(llama, DOC, 20 + i, i) for i in range(4)]
    expected = [reference(llama, tuple(ids), NEW) for ids in asked]
    params = SamplingParams(max_tokens=NEW, temperature=0, logprobs=0, ignore_eos=True)
    async with serve(farm, 2, Setup(model=llama, kv_tokens=4096, chunk_tokens=16)) as service:

        async def one(ids: list[int]) -> tuple[list[int], list[float], int]:
            chunks = [chunk async for chunk in service.client.generate(ids, params)]
            logprobs = [p.logprob for chunk in chunks for p in chunk.logprobs or []]
            return [token for chunk in chunks for token in chunk.token_ids], logprobs, chunks[-1].cached_tokens

        answers = await asyncio.gather(*map(one, asked))
        for (tokens, logprobs, _), right in zip(answers, expected, strict=True):
            check(tokens, logprobs, right)
        assert sorted(cached for _, _, cached in answers) == [0, *[len(DOC) - len(DOC) % BLOCK] * 3]


async def test_a_conversation_computes_what_was_said_since(farm: Farm, llama: Path) -> None:
    turn = question(llama, (), 105, 1)
    answer = reference(llama, tuple(turn), NEW).token_ids
    next_turn = question(llama, [*turn, *answer], 30, 2)
    async with serve(farm, 2, Setup(model=llama, kv_tokens=512)) as service:
        await ask(service, llama, turn, spread=1, cached=0)
        await ask(service, llama, turn, spread=1, cached=96)
        await ask(service, llama, next_turn, spread=1, cached=112)  # all but the last token has KV: 116 tokens


async def test_a_salt_and_log_probabilities_of_the_prompt_share_nothing(farm: Farm, llama: Path) -> None:
    ids = question(llama, DOC[:200], 9, 3)
    async with serve(farm, 2, Setup(model=llama, kv_tokens=1024)) as service:
        for salt, cached in ((None, 0), ("a", 0), ("b", 0), ("a", 208), (None, 208)):
            await ask(service, llama, ids, spread=1, cache_salt=salt, cached=cached)
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        scored = [chunk async for chunk in service.client.generate(ids, params)]
        assert len(scored[0].prompt_logprobs or []) == len(ids) - 1
        assert scored[-1].cached_tokens == 0


async def test_without_the_cache_all_is_computed_and_nothing_stays(farm: Farm, llama: Path) -> None:
    ids = question(llama, DOC[:100], 9, 4)
    async with serve(farm, 2, Setup(model=llama), prefix_cache=False) as service:
        for _ in range(2):
            await ask(service, llama, ids, cached=0)
        stats = await service.client.stats()
        assert [i.cached_tokens for i in stats.instances] == [0, 0]
        assert stats.observed.prefix_queries == 0


async def test_many_at_once_in_little_memory(farm: Farm, llama: Path) -> None:
    """Beginnings that come, go and are shared while they are computed, in pools that hold a fifth of all that is asked."""
    documents = [DOC[:150], DOC[:75] + DOC[200:290], DOC[300:340]]
    prompts = [question(llama, document, 5 + 3 * i, i) for i in range(6) for document in documents]
    async with serve(farm, 3, Setup(model=llama, kv_tokens=208, chunk_tokens=32)) as service:

        async def one(i: int, ids: list[int]) -> None:
            await asyncio.sleep(0.03 * i)
            expected = reference(llama, tuple(ids), NEW)
            params = SamplingParams(max_tokens=NEW, temperature=0, logprobs=0, ignore_eos=True)
            spread = ("all", 1, None)[i % 3]
            chunks = [chunk async for chunk in service.client.generate(ids, params, spread=spread)]  # type: ignore[arg-type]
            tokens = [token for chunk in chunks for token in chunk.token_ids]
            check(tokens, [p.logprob for chunk in chunks for p in chunk.logprobs or []], expected)

        async with asyncio.timeout(60):
            await asyncio.gather(*(one(i, ids) for i, ids in enumerate(prompts)))
        stats = await service.client.stats()
        assert stats.observed.prefix_hits > 0
        assert stats.counters.kv_bytes == 0
