"""Law 1: placement never changes the answer.

Real processes, real sockets, real Gloo; pools poisoned with NaN. Ids must equal transformers' own, and every logprob be within
5e-4 of it. The mutation test shows that these checks notice one block read wrongly.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest

from gmanager import AsyncClient, SamplingParams, TokenLogprob
from gmanager.wire.scaling import RopeScaling
from instance.config import KVFormatChoice
from tests.support.exactness import LOGPROB_TOLERANCE, MIXED_LENGTHS, Differs, ask, ask_mixed, move_on, prompt
from tests.support.farm import Farm, Mutation, Setup
from tests.support.service import Service, serve
from tests.support.tiny import CONFIGS, make_model, prompt_reference, reference


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def mixed(llama: Path) -> list[list[int]]:
    return [prompt(llama, length, seed=i) for i, length in enumerate(MIXED_LENGTHS)]


@pytest.fixture
async def cell(request: pytest.FixtureRequest, farm: Farm, llama: Path) -> AsyncIterator[Service]:
    size, chunk, block = request.param
    setup = Setup(model=llama, kv_tokens=2304 // size, block_size=block, chunk_tokens=chunk)
    async with serve(farm, size, setup) as service:
        yield service


MATRIX = [
    pytest.param((size, chunk, block), id=f"{size}-instances-chunk-{chunk}-block-{block}")
    for size in (1, 2, 3)
    for chunk in (1, 7, 64, 512)
    for block in (1, 16, 64)
]


@pytest.mark.parametrize("cell", MATRIX, indirect=True)
async def test_matrix(cell: Service, llama: Path, mixed: list[list[int]]) -> None:
    client = cell.client
    await ask(client, llama, prompt(llama, 200), spread="all")
    if cell.size > 1:
        await ask(client, llama, prompt(llama, 75, new=30), spread=1, new=30, move=True)
        (moved,) = [r for r in (await client.stats()).requests.values() if r.home_moves]
        left = [tokens for rank, tokens in moved.kv_tokens.items() if rank != moved.home]
        # tokens 64 to 105 share a block of 64: there it was moved in the middle of a block, however late the move came
        assert left
        assert cell.block_size != 64 or 64 < left[0] < 105
    await ask_mixed(client, llama, mixed)
    stats = await client.stats()
    assert stats.counters.kv_bytes == stats.counters.blocks_copied == 0


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"llama"}))
async def test_other_models(kind: str, farm: Farm, tmp_path: Path) -> None:
    """Qwen2 (bias), Qwen3 (q/k norm), Mistral, experts; and each kind of mask: windows in all layers, in some, chunks, with a
    soft cap, with sinks; and latents."""
    path = make_model(kind, tmp_path)
    async with serve(farm, 2, Setup(model=path, chunk_tokens=24)) as service:
        await ask(service.client, path, prompt(path, 120), spread="all")
        await ask(service.client, path, prompt(path, 50, new=20), spread=1, new=20, move=True)


@pytest.mark.parametrize(("size", "block"), [(1, 1), (3, 1), (3, 16)])
@pytest.mark.parametrize("kind", ["mistral-window", "gemma2", "gpt-oss", "llama4", "deepseek", "deepseek-v2"])
async def test_masks_in_small_chunks_over_several_instances(
    kind: str, size: int, block: int, farm: Farm, tmp_path: Path
) -> None:
    """Windows and chunks of 23 tokens, which begin within chunks, blocks and shards; and several requests side by side."""
    path = make_model(kind, tmp_path)
    prompts = [prompt(path, length, seed=i) for i, length in enumerate((22, 23, 24, 47, 90))]
    moving = prompt(path, 40, new=30)
    async with serve(farm, size, Setup(model=path, kv_tokens=768 // size, block_size=block, chunk_tokens=7)) as service:
        await ask_mixed(service.client, path, prompts)
        await ask(service.client, path, moving, spread=1 if size > 1 else None, new=30, move=size > 1)
        await ask(service.client, path, prompts[-1])  # its beginning is cached, wherever it lies


@pytest.mark.parametrize(("size", "block"), [(1, 16), (2, 16), (3, 1)])
@pytest.mark.parametrize("kind", ["deepseek", "deepseek-v2"])
@pytest.mark.parametrize("kv_format", ["auto", "plain"])
async def test_latents_and_plain_heads_say_the_same(
    kv_format: KVFormatChoice, kind: str, size: int, block: int, farm: Farm, tmp_path: Path
) -> None:
    """As transformers does: a prompt over all instances, a home that moves on, several requests side by side. What travels is
    the absorbed query, and a latent comes back."""
    path = make_model(kind, tmp_path)
    prompts = [prompt(path, length, seed=i) for i, length in enumerate((1, 24, 90, 63))]
    moving, long = prompt(path, 50, new=30), prompt(path, 150)
    setup = Setup(model=path, kv_tokens=1024 // size, block_size=block, chunk_tokens=24, kv_format=kv_format)
    async with serve(farm, size, setup) as service:
        await ask(service.client, path, long, spread="all")
        await ask(service.client, path, moving, spread=1 if size > 1 else None, new=30, move=size > 1)
        await ask_mixed(service.client, path, prompts)
        await ask(service.client, path, long)  # cached, wherever it lies
        async with asyncio.timeout(5):  # counters come with the instances' next beats
            while size > 1 and not (counters := (await service.client.stats()).counters).rows_dispatched:
                await asyncio.sleep(0.1)
    if size > 1:  # heads x (width in fp32, and an lse for each)
        query, state = (4 * 48 * 4, 4 * (32 * 4 + 4)) if kv_format == "auto" else (4 * 32 * 4, 4 * (32 * 4 + 4))
        assert counters.query_bytes % (2 * query) == counters.partial_bytes % (2 * state) == 0


@pytest.mark.parametrize(
    ("kind", "tp", "size"),
    [
        *(("llama", 2, 1), ("llama", 3, 1), ("llama", 2, 2), ("qwen2", 3, 2), ("gemma2", 2, 2), ("mistral-window", 2, 2)),
        *(("mixtral", 3, 1), ("qwen3-moe", 2, 2), ("gpt-oss", 2, 2), ("deepseek", 2, 2), ("deepseek-v2", 3, 1)),
        ("glm4-moe", 2, 1),
    ],
)
async def test_models_that_are_split_between_ranks(kind: str, tp: int, size: int, farm: Farm, tmp_path: Path) -> None:
    """Tensor parallel: heads that don't divide (4 query heads and 2 KV heads by 3), experts, and two instances that share a
    sequence, whose home moves on; as transformers has it in one piece."""
    path = make_model(kind, tmp_path)
    long, moving = prompt(path, 150), prompt(path, 50, new=30)
    prompts = [prompt(path, length, seed=i) for i, length in enumerate((1, 24, 90, 63))]
    async with serve(farm, size, Setup(model=path, kv_tokens=1024 // size, chunk_tokens=24, tp=tp)) as service:
        await ask(service.client, path, long, spread="all")
        await ask(service.client, path, moving, spread=1 if size > 1 else None, new=30, move=size > 1)
        await ask_mixed(service.client, path, prompts)
        await ask(service.client, path, long)  # cached, wherever it lies


@pytest.mark.parametrize(
    ("kind", "tp", "pp", "layers", "size"),
    [
        ("llama", 1, 2, (), 1),
        ("llama", 1, 3, (1, 3, 1), 1),
        ("llama", 2, 2, (), 1),
        ("llama", 1, 2, (4, 1), 2),
        ("qwen2", 3, 2, (), 1),
        ("mistral-window", 1, 2, (), 2),
        ("qwen3-moe", 2, 2, (), 1),
        ("gemma2", 1, 2, (), 2),
        ("gemma2", 1, 3, (1, 3, 1), 2),
        ("gpt-oss", 2, 2, (1, 4), 1),
        ("deepseek", 2, 2, (2, 3), 1),
    ],
)
async def test_models_whose_layers_are_split_into_stages(
    kind: str, tp: int, pp: int, layers: tuple[int, ...], size: int, farm: Farm, tmp_path: Path
) -> None:
    """Five layers: in stages alone, of several ranks each, and on two instances that share a sequence, whose home moves on."""
    path = make_model(kind, tmp_path, num_hidden_layers=5, tie_word_embeddings=kind == "qwen2")
    long, moving = prompt(path, 150), prompt(path, 50, new=30)
    prompts = [prompt(path, length, seed=i) for i, length in enumerate((1, 24, 90, 63))]
    setup = Setup(model=path, kv_tokens=1024 // size, chunk_tokens=24, tp=tp, pp=pp, pp_layers=layers)
    scored = SamplingParams(max_tokens=1, temperature=0, logprobs=0, prompt_logprobs=3, ignore_eos=True)
    async with serve(farm, size, setup) as service:
        (chunk,) = [chunk async for chunk in service.client.generate(long, scored, spread="all") if chunk.prompt_logprobs]
        check_prompt_logprobs(path, long, chunk.prompt_logprobs, 3)
        await ask(service.client, path, long, spread="all")
        await ask(service.client, path, moving, spread=1 if size > 1 else None, new=30, move=size > 1)
        await ask_mixed(service.client, path, prompts)
        await ask(service.client, path, long)  # cached, wherever it lies


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["yarn", "linear"])
async def test_texts_beyond_a_models_own_limit(kind: Literal["yarn", "linear"], size: int, farm: Farm, tmp_path: Path) -> None:
    """By --rope-scaling: as transformers has them with the same `rope_parameters` in the config."""
    short, told = make_model("qwen3", tmp_path / "short"), make_model("qwen3", tmp_path / "told")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    rope = config["rope_parameters"] | {"rope_type": kind, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 64} if kind == "yarn" else {}
    (told / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256, "rope_parameters": rope}))
    long, moving = prompt(told, 200), prompt(told, 60, new=30)
    setup = Setup(model=short, kv_tokens=512 // size, chunk_tokens=24, rope_scaling=RopeScaling(kind, 4))
    async with serve(farm, size, setup) as service:
        (cell,) = (await service.client.stats()).cells
        assert (cell.max_context, cell.rotary) == (256, f"{kind}:4")
        await ask(service.client, told, long, spread="all")
        await ask(service.client, told, moving, spread=1, new=30, move=size > 1)


async def test_a_prompt_larger_than_every_pool_and_a_generation_that_outgrows_its_home(farm: Farm, llama: Path) -> None:
    """KV on both instances by need; the home moves when its pool is full; nothing is copied and nothing computed twice."""
    new = 100
    ids = prompt(llama, 140, new=new)
    async with serve(farm, 2, Setup(model=llama, kv_tokens=(144, 128), chunk_tokens=32)) as service:
        await ask(service.client, llama, ids, new=new)
        stats = await service.client.stats()
        async with asyncio.timeout(5):  # counters come with the instances' next beats
            while stats.counters.tokens_prefilled < len(ids) or not stats.counters.home_moves:
                await asyncio.sleep(0.1)
                stats = await service.client.stats()
        (request,) = stats.requests.values()
        assert min(request.kv_tokens.values()) > 0
        assert len(request.kv_tokens) == 2
        assert request.home_moves >= 1
        assert stats.counters.home_moves == request.home_moves
        assert stats.counters.blocks_copied == 0
        assert stats.counters.kv_bytes == 0
        assert stats.counters.query_bytes > 0
        assert stats.counters.partial_bytes > 0
        assert stats.counters.tokens_prefilled == len(ids)


async def test_preempted_requests_go_on_as_if_nothing_had_happened(farm: Farm, llama: Path) -> None:
    """More generation than the cell holds at once: the younger ones are computed again, and nobody can tell."""
    prompts = [prompt(llama, 40, new=60, seed=i) for i in range(4)]
    async with serve(farm, 2, Setup(model=llama, kv_tokens=160, chunk_tokens=64)) as service:
        await asyncio.gather(*(ask(service.client, llama, ids, new=60) for ids in prompts))
        assert (await service.client.stats()).counters.preemptions >= 1


async def test_sampling_survives_preemption_and_moves(farm: Farm, llama: Path) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.95, seed=11, ignore_eos=True)

    async def tokens(client: AsyncClient, i: int, move: bool = False) -> list[int]:
        got: list[int] = []
        async for chunk in client.generate(prompt(llama, 40, seed=i), params, request_id=f"s{i}"):
            got += chunk.token_ids
            if move and len(got) == 7:
                await move_on(client, f"s{i}")
        return got

    async with serve(farm, 2, Setup(model=llama)) as service:
        alone = [await tokens(service.client, i) for i in range(4)]
    async with serve(farm, 2, Setup(model=llama)) as service:
        assert await asyncio.gather(*(tokens(service.client, i, move=True) for i in range(4))) == alone
    async with serve(farm, 2, Setup(model=llama, kv_tokens=128)) as service:
        assert await asyncio.gather(*(tokens(service.client, i) for i in range(4))) == alone
        assert (await service.client.stats()).counters.preemptions >= 1


async def test_sampling_in_stages_is_that_of_the_whole_model(farm: Farm, tmp_path: Path) -> None:
    """With penalties, which count the tokens so far; seven requests at once, in groups that follow each other."""
    path = make_model("llama", tmp_path, num_hidden_layers=4)
    said = []
    for pp in (1, 2):
        async with serve(farm, 1, Setup(model=path, kv_tokens=2048, chunk_tokens=32, pp=pp)) as service:

            async def tokens(client: AsyncClient, i: int) -> list[int]:
                params = SamplingParams(
                    max_tokens=20 + i, temperature=1.0, seed=i, frequency_penalty=0.5, repetition_penalty=1.2, ignore_eos=True
                )
                ids = prompt(path, 30 + 20 * i, seed=i)
                return [token async for chunk in client.generate(ids, params) for token in chunk.token_ids]

            said.append(await asyncio.gather(*(tokens(service.client, i) for i in range(7))))
    assert said[0] == said[1]


def check_prompt_logprobs(path: Path, ids: list[int], got: list[TokenLogprob] | None, num_top: int) -> None:
    """Each prompt token but the first: its log-probability, its rank, and the likeliest ones, as transformers has them."""
    assert got is not None
    assert [p.token_id for p in got] == ids[1:]
    for given, row in zip(got, prompt_reference(path, ids), strict=True):
        assert abs(given.logprob - float(row[given.token_id])) < LOGPROB_TOLERANCE
        assert abs(given.rank - int((row > row[given.token_id]).sum()) - 1) <= 1  # two may be closer than rounding
        assert given.top_logprobs == pytest.approx(row.topk(num_top).values.tolist(), abs=LOGPROB_TOLERANCE)
        assert given.top_logprobs == pytest.approx(row[given.top_ids].tolist(), abs=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("spread", [1, "all"])
@pytest.mark.parametrize("size", [1, 2])
async def test_prompt_logprobs(size: int, spread: Literal[1, "all"], farm: Farm, llama: Path) -> None:
    """Chunk by chunk, on whatever instances the rows run, beside requests that ask for none."""
    params = SamplingParams(max_tokens=4, temperature=0, logprobs=0, prompt_logprobs=3, ignore_eos=True)

    async def scored(client: AsyncClient, ids: list[int]) -> None:
        chunks = [chunk async for chunk in client.generate(ids, params, spread=spread)]
        if len(ids) > 1:
            check_prompt_logprobs(llama, ids, chunks[0].prompt_logprobs, 3)
        assert all(chunk.prompt_logprobs is None for chunk in chunks[1:])
        assert [t for chunk in chunks for t in chunk.token_ids] == reference(llama, tuple(ids), 4).token_ids

    lengths = (1, 2, 90, 25, 24)
    prompts = [prompt(llama, length, new=4, seed=i) for i, length in enumerate(lengths)]
    others = [prompt(llama, 70, seed=9)]
    async with serve(farm, size, Setup(model=llama, chunk_tokens=24)) as service:
        asked = [scored(service.client, ids) for ids in prompts]
        await asyncio.gather(*asked, *(ask(service.client, llama, ids, spread=spread) for ids in others))


@pytest.mark.parametrize("size", [1, 2])
async def test_a_prompt_of_all_tokens_that_the_model_takes(size: int, farm: Farm, llama: Path) -> None:
    """It is scored to its last token, in pools that hold it and not one block more."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=2, logprobs=0)
    ids = [7 * i % 256 for i in range(512)]
    async with serve(farm, size, Setup(model=llama, kv_tokens=512 // size + 16)) as service:
        (chunk,) = [chunk async for chunk in service.client.generate(ids, params, spread="all")]
        assert (chunk.token_ids, chunk.text, chunk.finish_reason) == ([], "", "length")
        check_prompt_logprobs(llama, ids, chunk.prompt_logprobs, 2)
        assert (await service.client.stats()).observed.generated_tokens == 0


async def test_prompt_logprobs_survive_preemption(farm: Farm, llama: Path) -> None:
    params = SamplingParams(max_tokens=60, temperature=0, prompt_logprobs=0, ignore_eos=True)

    async def scored(client: AsyncClient, ids: list[int]) -> None:
        chunks = [chunk async for chunk in client.generate(ids, params)]
        check_prompt_logprobs(llama, ids, chunks[0].prompt_logprobs, 0)
        assert all(chunk.prompt_logprobs is None for chunk in chunks[1:])

    prompts = [prompt(llama, 40, new=60, seed=i) for i in range(4)]
    async with serve(farm, 2, Setup(model=llama, kv_tokens=160, chunk_tokens=16)) as service:
        await asyncio.gather(*(scored(service.client, ids) for ids in prompts))
        assert (await service.client.stats()).counters.preemptions >= 1


async def test_aborted_while_its_prompt_is_scored(farm: Farm, llama: Path) -> None:
    """Nothing is left of it, wherever the abort meets it."""
    params = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=1, ignore_eos=True)
    ids = prompt(llama, 120, seed=1)
    async with serve(farm, 2, Setup(model=llama, chunk_tokens=8)) as service:
        for i in range(12):
            request = asyncio.create_task(anext(service.client.generate(ids, params, spread="all")))
            await asyncio.sleep(0.01 * i)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)


@pytest.mark.parametrize("mutation", ["drop", "double", "shift"])
async def test_one_wrong_block_is_noticed(mutation: Mutation, farm: Farm, llama: Path) -> None:
    ids = prompt(llama, 200)
    async with serve(farm, 2, Setup(model=llama, mutate=mutation)) as service:
        with pytest.raises(Differs):
            await ask(service.client, llama, ids, spread="all")


@pytest.mark.parametrize(("kind", "size", "most"), [("llama", 2, 256), ("llama", 3, 1), ("llama", 2, "auto"), ("gemma2", 2, 2)])
async def test_dense_layers_that_instances_share(
    kind: str, size: int, most: int | Literal["auto"], farm: Farm, tmp_path: Path
) -> None:
    """Elastic tensor parallelism: of a sequence that lies on all, of one whose home moves on, of one that lies on one instance
    while the others are idle, and of so many that steps are split and whole in turn."""
    path = make_model(kind, tmp_path)
    long, moving, idle = prompt(path, 150), prompt(path, 50, new=30), prompt(path, 20, new=30)
    prompts = [prompt(path, length, seed=i) for i, length in enumerate((1, 24, 90, 63))]

    async def split_steps(client: AsyncClient) -> int:
        await asyncio.sleep(1.5)  # counters come with the instances' next beats
        return (await client.stats()).counters.split_steps

    async with serve(farm, size, Setup(model=path, kv_tokens=1536 // size, chunk_tokens=24, elastic_tp=most)) as service:
        await ask(service.client, path, long, spread="all")
        await ask(service.client, path, moving, spread=1, new=30, move=True)
        before = await split_steps(service.client)
        await ask(service.client, path, idle, spread=1, new=30)
        alone = await split_steps(service.client) - before
        await asyncio.gather(ask(service.client, path, moving, new=30), ask_mixed(service.client, path, prompts))
        stats = await service.client.stats()
    if most != "auto":
        assert before > 0
        assert alone >= size * 25  # all but the first row of a decode, whose party may meet later
    assert stats.counters.blocks_copied == stats.counters.kv_bytes == 0
