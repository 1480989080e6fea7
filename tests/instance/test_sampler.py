"""Sampling is a function of (seed, position, logits), and its distribution is the one asked for."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmanager.wire.messages import SequenceParams
from instance.sampler import sample


def params(*, seed: int = 1, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> SequenceParams:
    return SequenceParams(
        max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop_token_ids=[], logprobs=None
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**20), st.floats(0, 2), st.integers(1, 40))
def test_what_runs_beside_a_row_changes_nothing(seed: int, position: int, temperature: float, others: int) -> None:
    random = torch.Generator().manual_seed(others)
    logits_SV = torch.randn((others + 1, 64), generator=random)
    mine = params(seed=seed, temperature=temperature, top_k=20, top_p=0.9)
    alone = sample(logits_SV[-1:], [mine], [position])
    batch = sample(logits_SV, [params(seed=i, temperature=i % 2) for i in range(others)] + [mine], [*range(others), position])
    assert int(alone[0]) == int(batch[-1])


def test_temperature_zero_is_greedy() -> None:
    logits_SV = torch.randn((50, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits_SV, [params(temperature=0)] * 50, [0] * 50), logits_SV.argmax(-1))


def test_frequencies_are_the_softmax() -> None:
    logits_V = torch.randn(8, generator=torch.Generator().manual_seed(3))
    count = 40_000
    tokens = sample(logits_V.repeat(count, 1), [params(temperature=0.7)] * count, range(count))
    frequency = torch.bincount(tokens, minlength=8) / count
    assert (frequency - (logits_V / 0.7).softmax(-1)).abs().max() < 0.01


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits_V = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]).log()
    count = 2000
    rows = logits_V.repeat(count, 1)
    assert set(sample(rows, [params(top_k=2)] * count, range(count)).tolist()) == {0, 1}
    assert set(sample(rows, [params(top_p=0.85)] * count, range(count)).tolist()) == {0, 1, 2}
    assert set(sample(rows, [params(top_p=0.01)] * count, range(count)).tolist()) == {0}
    assert set(sample(rows, [params(top_k=99, top_p=1.0)] * count, range(count)).tolist()) == {0, 1, 2, 3, 4}


def test_noise_is_never_infinite_and_differs_by_seed() -> None:
    flat = torch.zeros((64, 50_000))
    by_seed = sample(flat, [params(seed=s) for s in range(64)], [7] * 64)
    by_position = sample(flat, [params(seed=5)] * 64, range(64))
    assert len(set(by_seed.tolist())) > 60
    assert len(set(by_position.tolist())) > 60
