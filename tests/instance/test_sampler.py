"""Sampling is a function of (seed, position, logits), and its distribution is the one asked for."""

from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import generation

from gmanager.wire.messages import SequenceParams
from instance.plan import SampledRow
from instance.sampler import Sampler
from instance.sequence import History

CPU = torch.device("cpu")


def params(*, seed: int = 1, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, **more: Any) -> SequenceParams:
    more = {"stop_token_ids": [], "logprobs": None} | more
    return SequenceParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, **more)


def sample(logits_SV: torch.Tensor, params: Sequence[SequenceParams], positions: Sequence[int]) -> torch.Tensor:
    sampler = Sampler(logits_SV.shape[1], CPU, backend="torch", max_rows=len(params))
    rows = [SampledRow(i, i, position, p, 0) for i, (p, position) in enumerate(zip(params, positions, strict=True))]
    return sampler.sample(logits_SV, rows)


@settings(max_examples=30)
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


@settings(max_examples=30)
@given(st.integers(1, 5), st.sampled_from([1, 2, 97, 128, 130, 4096, 4099]), st.integers(1, 4), st.integers(0, 2**31))
def test_the_first_of_equals_is_the_best(num_rows: int, vocab: int, values: int, seed: int) -> None:
    logits_SV = torch.randint(values, (num_rows, vocab), generator=torch.Generator().manual_seed(seed)).bfloat16()
    got_S = sample(logits_SV, [params(temperature=0)] * num_rows, [0] * num_rows)
    assert got_S.tolist() == [row.index(max(row)) for row in logits_SV.tolist()]


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


# --- biases, penalties and the like: as transformers' own processors, and the same after a home move or a preemption ---

VOCAB = 40


class Told:
    """A sequence beside a sampler: what the scheduler would say of it."""

    def __init__(self, seq: int, prompt: list[int], params: SequenceParams) -> None:
        self.seq = seq
        self.prompt = prompt
        self.params = params
        self.generated: list[int] = []
        self.history = History.of(array("I", prompt), params)
        self.is_new_here = True

    def row(self) -> SampledRow:
        """With the newest token still under way, as it is while the device runs the step before."""
        known = self.generated if self.is_new_here else self.generated[:-1]
        self.is_new_here = False
        if self.history is not None:
            self.history.generated.extend(known[len(self.history.generated) - self.history.num_before :])
        return SampledRow(0, self.seq, len(self.prompt) + len(self.generated), self.params, len(self.generated), self.history)

    def moved(self) -> "Told":
        """As its new home has it."""
        new = Told(self.seq, self.prompt, self.params)
        new.generated = list(self.generated)
        return new

    def readmitted(self, seq: int) -> "Told":
        """As one that was preempted: all that was generated stands in the admitted tokens."""
        changed = {
            "num_generated": self.params.num_generated + len(self.generated),
            "min_tokens": max(0, self.params.min_tokens - len(self.generated)),
        }
        tokens = self.prompt + self.generated
        return Told(seq, tokens, msgspec.structs.replace(self.params, **changed))


def expected(logits_V: torch.Tensor, prompt: list[int], generated: list[int], params: SequenceParams) -> int:
    """With transformers' processors where it has one, in vLLM's order."""
    x = logits_V.double()[None].clone()
    for token, bias in params.logit_bias.items():
        x[0, token] += bias
    if len(generated) < params.min_tokens:
        x[0, params.stop_token_ids] = -torch.inf
    for word in params.bad_words:
        if word[:-1] == generated[len(generated) - len(word) + 1 :] and len(generated) >= len(word) - 1:
            x[0, word[-1]] = -torch.inf
    ids = torch.tensor([prompt + generated])
    x = generation.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, x)
    for token in set(generated):
        x[0, token] -= params.frequency_penalty * generated.count(token) + params.presence_penalty
    return int(x.argmax())


asked = st.builds(
    lambda repetition, presence, frequency, bias, words, least, stops: params(
        temperature=0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
        bad_words=words,
        min_tokens=least,
        stop_token_ids=stops,
    ),
    st.sampled_from([1.0, 1.3, 0.8]),
    st.sampled_from([0.0, 1.5, -0.5]),
    st.sampled_from([0.0, 0.7, -0.2]),
    st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-3, 3), max_size=3),
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=4),
    st.integers(0, 6),
    st.lists(st.integers(0, 5), max_size=3),
)


@settings(max_examples=40)
@given(st.lists(asked, min_size=1, max_size=5), st.integers(0, 2**30), st.sampled_from(["stays", "moves", "is preempted"]))
def test_adjusted_as_transformers_does_wherever_it_goes_on(several: list[SequenceParams], seed: int, fate: str) -> None:
    """Many steps of several sequences on two instances with few slots; logits of few likely tokens, so that words recur."""
    random = torch.Generator().manual_seed(seed)
    samplers = [Sampler(VOCAB, CPU, backend="torch", max_rows=5) for _ in range(2)]
    at = [0] * len(several)
    told = [Told(i, torch.randint(0, VOCAB, (3,), generator=random).tolist(), p) for i, p in enumerate(several)]
    kept = [(t.prompt, t.params) for t in told]
    tokens: list[list[int]] = [[] for _ in told]
    for step in range(12):
        if fate != "stays" and step in (4, 9):
            for i in range(0, len(told), 2):
                if fate == "moves":
                    at[i], told[i] = 1 - at[i], told[i].moved()
                else:
                    told[i] = told[i].readmitted(100 * step + i)
        for number, sampler in enumerate(samplers):
            here = [i for i in range(len(told)) if at[i] == number]
            if not here:
                continue
            logits_SV = torch.randn((len(here), VOCAB), generator=random)
            logits_SV[:, :6] += 2
            before = logits_SV.clone()
            rows = [told[i].row() for i in here]
            found = sampler.sample(logits_SV, rows).tolist()
            assert torch.equal(before, logits_SV)
            for i, logits_V, token in zip(here, logits_SV, found, strict=True):
                assert token == expected(logits_V, kept[i][0], tokens[i], kept[i][1])
                tokens[i].append(token)
                told[i].generated.append(token)


def test_more_sequences_than_slots_take_turns() -> None:
    """Their counts are made anew from their histories."""
    sampler = Sampler(VOCAB, CPU, backend="torch", max_rows=2)
    penalised = params(temperature=0, presence_penalty=1.5)
    told = [Told(i, [1], penalised) for i in range(4)]
    logits_SV = torch.zeros((2, VOCAB))
    logits_SV[:, 7], logits_SV[:, 9] = 2, 1
    for turn in range(3):
        for pair in (told[:2], told[2:]):
            tokens = sampler.sample(logits_SV, [t.row() for t in pair]).tolist()
            assert tokens == [[7, 7], [9, 9], [7, 7]][turn]
            for t, token in zip(pair, tokens, strict=True):
                t.generated.append(token)
                assert t.history is not None
                t.history.generated.append(token)  # committed: others ran meanwhile


def test_a_count_that_nobody_can_know_is_refused() -> None:
    row = SampledRow(0, 3, 5, params(presence_penalty=1.0), 2, History(array("I"), array("I", [4]), 0))
    with pytest.raises(RuntimeError, match="sequence 3: 2 tokens to count, and 1 are known"):
        Sampler(VOCAB, CPU, backend="torch", max_rows=1).sample(torch.zeros((1, VOCAB)), [row])


def test_min_p_keeps_what_transformers_keeps() -> None:
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    count = 3000
    tokens = set(sample(logits_V.repeat(count, 1), [params(min_p=0.2)] * count, range(count)).tolist())
    kept = generation.MinPLogitsWarper(0.2)(torch.zeros((1, 1)), logits_V[None])[0]
    assert tokens == set((kept > -torch.inf).nonzero()[:, 0].tolist())
    assert len(tokens) > 1
