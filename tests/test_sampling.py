"""Penalties, biases and the like through a whole service, beside transformers' own processors: KV spread over three instances,
home moves, preemption. The tokens are the same, and log-probabilities stay those of the model's own logits."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from gmanager import RequestRefused, SamplingParams
from tests.support.exactness import LEAST_MARGIN, move_on
from tests.support.farm import Farm
from tests.support.service import Setup, serve
from tests.support.tiny import make_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("penalised"))


class _Adjusted(LogitsProcessor):  # type: ignore[misc]
    """What transformers has no processor for, in vLLM's terms."""

    def __init__(self, prompt: int, params: SamplingParams) -> None:
        self.prompt = prompt
        self.params = params
        self.least_margin = float("inf")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        generated = input_ids[0, self.prompt :].tolist()
        for token, bias in (self.params.logit_bias or {}).items():
            scores[0, token] += bias
        if len(generated) < self.params.min_tokens:
            scores[0, self.params.stop_token_ids] = -torch.inf
        processor = RepetitionPenaltyLogitsProcessor(self.params.repetition_penalty)
        scores = processor(input_ids, scores)
        for token in set(generated):
            scores[0, token] -= self.params.frequency_penalty * generated.count(token) + self.params.presence_penalty
        best = scores[0].topk(2).values
        self.least_margin = min(self.least_margin, float(best[0] - best[1]))
        return scores


def expected(path: Path, ids: list[int], params: SamplingParams) -> tuple[list[int], float]:
    """transformers' greedy tokens, and how close the closest call was."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adjusted = _Adjusted(len(ids), params)
    out = model.generate(
        torch.tensor([ids]),
        do_sample=False,
        max_new_tokens=params.max_tokens,
        eos_token_id=params.stop_token_ids or None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([adjusted]),
    )
    return out[0, len(ids) :].tolist(), adjusted.least_margin


PENALISED = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.8, "frequency_penalty": 0.4},
    {"repetition_penalty": 0.9, "frequency_penalty": -0.3, "logit_bias": {7: 1.5, 9: -2.0}},
]


def cases(path: Path, make: Callable[[int], list[int]], new: int = 24) -> list[tuple[list[int], SamplingParams, list[int]]]:
    """Prompts whose greedy continuation under these parameters is no close call; the last one is ended by a stop token."""
    found = []
    for given in PENALISED:
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, logprobs=0, **given)
        for attempt in range(40):
            ids = make(attempt)
            tokens, margin = expected(path, ids, params)
            if margin > LEAST_MARGIN:
                break
        else:
            raise AssertionError(f"40 prompts, and each has a margin of at most {LEAST_MARGIN}")
        found.append((ids, params, tokens))
    ids, params, tokens = found[1]
    early = {"stop_token_ids": [tokens[3], tokens[new // 2]], "min_tokens": 9}
    stopping = SamplingParams(
        max_tokens=new, temperature=0, ignore_eos=True, logprobs=0, presence_penalty=0.8, frequency_penalty=0.4, **early
    )
    found.append((ids, stopping, expected(path, ids, stopping)[0]))
    return found


def made(length: int) -> Callable[[int], list[int]]:
    return lambda attempt: [(i * i * 31 + i * 17 + attempt * 101 + length) % 256 for i in range(length)]


async def test_over_three_instances_and_home_moves(farm: Farm, llama: Path) -> None:
    asked = cases(llama, made(90))
    async with serve(farm, 3, Setup(model=llama, chunk_tokens=7)) as service:

        async def ask(i: int, ids: list[int], params: SamplingParams, tokens: list[int]) -> None:
            got: list[int] = []
            moving: asyncio.Task[None] | None = None
            async for chunk in service.client.generate(ids, params, request_id=f"r{i}", spread="all"):
                got += chunk.token_ids
                if len(got) >= 4 and moving is None:
                    moving = asyncio.create_task(move_on(service.client, f"r{i}"))
            assert got == tokens
            assert moving is not None
            await moving

        for i, case in enumerate(asked):  # alone: a home move needs time before the end
            await ask(i, *case)
        await asyncio.gather(*(ask(i, *case) for i, case in enumerate(asked, len(asked))))
        stats = await service.client.stats()
        assert stats.counters.home_moves >= len(asked)


async def test_after_preemption(farm: Farm, llama: Path) -> None:
    asked = cases(llama, made(40), new=60)
    async with serve(farm, 2, Setup(model=llama, kv_tokens=160, chunk_tokens=64)) as service:

        async def ask(ids: list[int], params: SamplingParams, tokens: list[int]) -> None:
            got = [t async for chunk in service.client.generate(ids, params) for t in chunk.token_ids]
            assert got == tokens

        await asyncio.gather(*(ask(*case) for case in asked))
        assert (await service.client.stats()).counters.preemptions >= 1


async def test_bad_words_never_come_and_what_is_out_of_range_is_refused(farm: Farm, llama: Path) -> None:
    ids = made(30)(0)
    async with serve(farm, 1, Setup(model=llama)) as service:
        plain = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        text = "".join([chunk.text async for chunk in service.client.generate(ids, plain)])
        word = next(char for char in text if char.isascii() and char.isalnum())
        params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, bad_words=[word])
        other = "".join([chunk.text async for chunk in service.client.generate(ids, params)])
        assert word in text
        assert word not in other
        for wrong, sentence in (
            ({"logit_bias": {300: 1.0}}, "token id 300 of logit_bias is out of range: the model has 300 tokens"),
            ({"stop_token_ids": [301]}, "token id 301 of stop_token_ids is out of range: the model has 300 tokens"),
            ({"bad_words": ["x" * 200]}, "each of bad_words has 1 to 64 tokens"),
        ):
            with pytest.raises(RequestRefused, match=sentence):
                await anext(service.client.generate(ids, SamplingParams(**wrong)))
