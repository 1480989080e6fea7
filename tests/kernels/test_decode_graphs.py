"""Captured decode steps beside the same steps run eagerly.

Without a GPU the Triton code runs in its interpreter and a "graph" runs its function again into the same result: tables,
buckets, padding and routing of pending tokens are the real ones.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from msgspec import structs
from transformers import (
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MiniCPM3Config,
    MinistralConfig,
    OlmoeConfig,
    PretrainedConfig,
)

from distattn.attention import DistAttention
from distattn.exchange import Exchange
from distattn.layout import Layout, Reading
from instance import graphs
from instance.calibrate import Room, plans
from instance.elastic_tp import FeedShares
from instance.graphs import DecodeGraphs, Replay
from instance.load import load_model, random_model
from instance.mailboxes import Abort, mailbox
from instance.model import Model
from instance.plan import SampledRow, StepPlan
from instance.shared_memory import FeedMemory, counted
from instance.split import Place
from kvstore.format import KVFormat
from kvstore.storage import KVStorage
from tests.kernels.test_paged_attention import DEVICE
from tests.support.tiny import SIZES, make_model

BLOCK = 16
PARAMS: Any = None
"""How a row is sampled is not looked at."""


class Again:
    def __init__(self, forward: Callable[[], torch.Tensor | None]) -> None:
        self._forward = forward
        self.result = forward()

    def replay(self) -> None:
        with torch.inference_mode():
            new = self._forward()
            if self.result is not None and new is not None:
                self.result.copy_(new)


class Graphs(DecodeGraphs):
    def _record(self, forward: Callable[[], torch.Tensor | None]) -> tuple[Replay, torch.Tensor | None]:
        if DEVICE.type == "cuda":
            return super()._record(forward)
        again = Again(forward)
        return again, again.result


@pytest.fixture(autouse=True)
def own_stream() -> Iterator[None]:
    """Graphs are captured on a lane's own stream, never on the default one."""
    stream = torch.cuda.Stream(DEVICE) if DEVICE.type == "cuda" else None
    with nullcontext() if stream is None else torch.cuda.stream(stream):  # type: ignore[no-untyped-call]
        yield


def made(config: type[PretrainedConfig], *, norms: float = 1.0, **more: Any) -> Model:
    """A tiny model of random weights, fused if it can be; `norms`: what their weights are about."""
    model = random_model(config(**(SIZES | more)), torch.float32, DEVICE, seed=2)
    for name, parameter in model.module.named_parameters():
        parameter.data.normal_(norms if "norm" in name else 0.0, 0.2)
    model.fuse("triton")
    return model


@pytest.fixture(scope="module")
def model() -> Model:
    llama = made(LlamaConfig)
    assert llama.fused is not None
    return llama


@pytest.fixture(scope="module")
def windowed() -> Model:
    """Of two groups: windows in the first of its layers only."""
    ministral = made(MinistralConfig, head_dim=16, sliding_window=21, layer_types=["sliding_attention", "full_attention"])
    assert ministral.fused is not None
    return ministral


@pytest.fixture(scope="module")
def sinks() -> Model:
    """Experts, sinks in each layer."""
    gpt_oss = made(
        GptOssConfig,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    assert gpt_oss.fused is not None
    return gpt_oss


@pytest.fixture(scope="module")
def other() -> Model:
    """Experts, and norms of all heads' queries and keys together: as transformers has them, but for the experts."""
    olmoe = made(OlmoeConfig, num_experts=4, num_experts_per_tok=2, pad_token_id=None, eos_token_id=None)
    assert olmoe.fused is None
    return olmoe


@pytest.fixture(scope="module")
def latents() -> Model:
    """Latent KV; as transformers has it."""
    minicpm = made(
        MiniCPM3Config,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    )
    assert minicpm.fused is None
    assert minicpm.shape.value_dim == 32
    return minicpm


@pytest.fixture(scope="module")
def gemma() -> Model:
    """Norms of what layers add, two kinds of rotary frequencies, capped logits; windows in one layer."""
    gemma = made(
        Gemma3TextConfig,
        norms=0.0,  # weights are counted from one
        head_dim=16,
        sliding_window=21,
        final_logit_softcapping=9.0,
        layer_types=["sliding_attention", "full_attention"],
    )
    assert gemma.fused is not None
    return gemma


def storage_of(model: Model, seed: int) -> KVStorage:
    storage = KVStorage(
        num_layers=2,
        num_blocks=30,
        block_size=BLOCK,
        num_kv_heads=model.shape.num_kv_heads,
        head_dim=model.shape.head_dim,
        parts=model.shape.parts,
        format=KVFormat(torch.float32),
        device=DEVICE,
    )
    storage.data_L2BPKD.copy_(torch.randn(storage.data_L2BPKD.shape, generator=torch.Generator().manual_seed(seed)))
    return storage


def step(kv_lens: list[int], pending: list[tuple[int, int]], before: dict[int, list[int]] | None = None) -> StepPlan:
    """Rows of sequences that hold `kv_lens` tokens once the step has written theirs, in blocks dealt out from the end.

    `before`: tokens that a row sees in other runs, too.
    """
    ids = list(range(30))
    readings, slots = [], []
    for row, kv_len in enumerate(kv_lens):
        for tokens in [*(before or {}).get(row, []), kv_len]:
            blocks = tuple(ids.pop() for _ in range(-(-tokens // BLOCK)))
            readings.append(Reading(row, 1, blocks, (tokens,)))
        slots.append(blocks[(kv_len - 1) // BLOCK] * BLOCK + (kv_len - 1) % BLOCK)
    rows = len(kv_lens)
    return StepPlan(
        token_ids_T=[0 if row in dict(pending) else 5 + row for row in range(rows)],
        positions_T=[kv_len - 1 for kv_len in kv_lens],
        pending=pending,
        sampled=[SampledRow(row, row, kv_lens[row], PARAMS, num_generated=0) for row in range(rows)],
        scored=[],
        slots_T=slots,
        layout=Layout(num_rows=rows, own=readings, dispatched_rows=[], dispatched={}, received={}, others=[]),
        needs_logits=True,
        is_decode=True,
    )


def eagerly(model: Model, storage: KVStorage, plan: StepPlan, previous: torch.Tensor) -> torch.Tensor:
    backend = "triton" if DEVICE.type == "cuda" else "torch"
    attention = DistAttention(storage, model.shape, Exchange(None, DEVICE), backend=backend)  # type: ignore[arg-type]
    attention.plan(plan.layouts, plan.slots)
    ids = torch.tensor(plan.token_ids_T, device=DEVICE)
    for row, sample in plan.pending:
        ids[row] = previous[sample]
    model.context.attention = attention
    rows = torch.arange(len(ids), device=DEVICE)
    with torch.inference_mode():
        return model.forward(ids, torch.tensor(plan.positions_T, device=DEVICE), rows)


def in_window(plan: StepPlan) -> StepPlan:
    """The step for the model with two groups, whose windows see the last 21 tokens of each run."""
    own = [structs.replace(reading, starts=(max(0, reading.kv_lens[0] - 21),)) for reading in plan.layout.own]
    return replace(plan, other_layouts=[structs.replace(plan.layout, own=own)])


@pytest.mark.parametrize("kind", ["model", "windowed", "gemma", "sinks", "latents", "other"])
def test_steps_of_any_size_are_those_run_eagerly(kind: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(kind)
    has_windows = kind in ("windowed", "gemma")
    assert len(model.shape.sights) == (2 if has_windows else 1)
    previous = torch.tensor([17, 41, 3, 88, 9, 60, 2, 5], device=DEVICE)
    ours, theirs = storage_of(model, 4), storage_of(model, 4)
    with mock.patch.object(graphs, "BUCKETS", (1, 2, 4)):
        captured = Graphs(model, ours, previous, None)
        # capturing wrote nothing; steps one after the other, larger and smaller, with stale tables behind what they write
        torch.testing.assert_close(ours.data_L2BPKD, theirs.data_L2BPKD, rtol=0, atol=0)
        steps: list[tuple[list[int], list[tuple[int, int]], dict[int, list[int]]]] = [
            ([33], [], {}),
            ([100, 1, 17], [(0, 2), (2, 7)], {}),
            ([16, 48], [(1, 0)], {1: [70, 5]}),
            ([5, 64, 31, 90], [(3, 1)], {0: [40], 2: [32]}),
            ([2], [(0, 4)], {}),
        ]
        for kv_lens, pending, before in steps:
            plan = step(kv_lens, pending, before)
            if has_windows:
                plan = in_window(plan)
            assert captured.can_run(plan)
            got = captured.run(plan)
            assert got is not None
            want = eagerly(model, theirs, plan, previous)
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
            torch.testing.assert_close(ours.data_L2BPKD, theirs.data_L2BPKD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_fused", [True, False])
def test_stages_hand_their_rows_on(is_fused: bool, tmp_path: Path) -> None:
    """Two layers in the first, one in the second; the second begins with rows, and its result is what the head is given."""
    path = make_model("llama", tmp_path, num_hidden_layers=3)
    whole = load_model(path, torch.float32, DEVICE)
    theirs = filled(whole.make_storage(30, BLOCK), range(3))
    previous = torch.tensor([17, 41, 3, 88, 9, 60, 2, 5], device=DEVICE)
    stages, captured = [], []
    with mock.patch.object(graphs, "BUCKETS", (1, 2, 4)), mock.patch.object(graphs, "MAX_DECODE_ROWS", 4):
        for stage, layers in enumerate((range(2), range(2, 3))):
            model = load_model(path, torch.float32, DEVICE, place=Place(stage=stage, stages=2, layers=(2, 1)))
            if is_fused:
                assert model.fuse("triton") is None
            stages.append(model)
            captured.append(Graphs(model, filled(model.make_storage(30, BLOCK), layers), previous, None))
        for kv_lens, pending in [([33], []), ([100, 1, 17], [(0, 2), (2, 7)]), ([16, 48], [(1, 0)]), ([2], [(0, 4)])]:
            plan = step(kv_lens, pending)
            rows_TE = captured[0].run(plan)
            assert rows_TE is not None
            rows_TE = captured[1].run(plan, rows_TE)
            assert rows_TE is not None
            with torch.inference_mode():
                got = stages[0].logits(stages[0].behind_stages(rows_TE), torch.arange(len(kv_lens), device=DEVICE))
            torch.testing.assert_close(got, eagerly(whole, theirs, plan, previous), rtol=2e-4, atol=2e-4)


def filled(storage: KVStorage, layers: range) -> KVStorage:
    """With what those layers of a model hold."""
    for at, layer in enumerate(layers):
        kv = storage.data_L2BPKD[at]
        kv.copy_(torch.randn(kv.shape, generator=torch.Generator().manual_seed(layer)))
    return storage


@pytest.mark.parametrize("kind", ["model", "windowed"])
def test_many_rows_may_share_what_they_begin_with(kind: str, request: pytest.FixtureRequest) -> None:
    """Eight rows see 20 blocks of 30 and one of their own: tables had room for three times the pool, rows for one each."""
    model: Model = request.getfixturevalue(kind)
    previous = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    ours, theirs = storage_of(model, 4), storage_of(model, 4)
    lens = [20 * BLOCK + 1 + row for row in range(8)]
    own = [Reading(row, 1, (*range(20), 20 + row), (kv_len,)) for row, kv_len in enumerate(lens)]
    alone = step([1] * 8, [])
    plan = replace(
        alone,
        positions_T=[kv_len - 1 for kv_len in lens],
        sampled=[SampledRow(row, row, kv_len, PARAMS, num_generated=0) for row, kv_len in enumerate(lens)],
        slots_T=[(20 + row) * BLOCK + row for row in range(8)],
        layout=structs.replace(alone.layout, own=own),
    )
    if kind == "windowed":
        plan = in_window(plan)
    with mock.patch.object(graphs, "BUCKETS", (8,)):
        got = Graphs(model, ours, previous, None).run(plan)
        assert got is not None
        torch.testing.assert_close(got, eagerly(model, theirs, plan, previous), rtol=2e-4, atol=2e-4)


def test_a_step_that_others_have_a_part_in_needs_peers(model: Model) -> None:
    previous = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    with mock.patch.object(graphs, "BUCKETS", (1,)):
        captured = Graphs(model, storage_of(model, 1), previous, None)
    alone = step([5], [])
    shared = StepPlan(
        token_ids_T=[1], positions_T=[4], pending=[], sampled=alone.sampled, scored=[], slots_T=alone.slots_T,
        layout=Layout(num_rows=1, own=alone.layout.own, dispatched_rows=[0], dispatched={1: 1}, received={}, others=[]),
        needs_logits=True, is_decode=True,
    )  # fmt: skip
    assert captured.can_run(alone)
    assert not captured.can_run(shared)


def test_a_split_step_needs_room_for_all_rows_and_all_members(model: Model) -> None:
    """What decides is the same on all members: whether they have rows of their own doesn't."""
    assert model.fused is not None
    vocab_size = model.fused.num_logits
    inboxes = FeedMemory.inboxes(
        parts=2, rows=2, hidden_size=model.hidden_size, vocab_size=vocab_size, dtype=torch.float32, device=DEVICE
    )
    abort = Abort.of(DEVICE)
    mailboxes = {n: mailbox(its, {}, part=0, counted=counted(its), abort=abort) for n, its in inboxes.items()}
    memory = FeedMemory(**mailboxes, vocab_size=vocab_size, abort=abort)
    previous = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    with mock.patch.multiple(graphs, BUCKETS=(1, 2, 4)):
        captured = Graphs(model, storage_of(model, 1), previous, None, feeds=memory)
        whole = Graphs(model, storage_of(model, 1), previous, None)
        assert model.context.sharing is None
        for count, rows, can_run in (
            (1, ((0, 1), (1, 1)), True),
            (0, ((0, 0), (1, 2)), True),
            (1, ((0, 1), (1, 2)), False),
            (1, ((0, 1), (1, 0), (2, 0)), False),
        ):
            plan = replace(step([5] * count, []), shares=FeedShares(0, rows))
            assert captured.can_run(plan) == can_run
            assert not whole.can_run(plan)
        assert captured.run(step([5] * 4, [])) is not None
    assert not any(its.inbox_NBTW.any() or its.calls_T.any() for its in mailboxes.values())


@pytest.mark.parametrize("kind", ["model", "windowed"])
def test_made_up_steps_run_as_real_ones_do_and_write_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    """`instance.calibrate`: those of decodes in graphs, in all of the pool; those of prompts eagerly."""
    model: Model = request.getfixturevalue(kind)
    storage, previous = storage_of(model, 4), torch.zeros(16, dtype=torch.int64, device=DEVICE)
    before = storage.data_L2BPKD.clone()
    room = Room(num_blocks=30, block_size=BLOCK, max_context=512, chunk_tokens=64, sights=model.shape.sights)
    decodes, chunks = list(plans("decode", room)), list(plans("prefill", room))
    assert [len(plan.token_ids_T) for plan in decodes] == [1, 1, 4, 4, 16]
    with mock.patch.object(graphs, "BUCKETS", (1, 4, 16)):
        captured = Graphs(model, storage, previous, None)
        for plan in decodes:
            assert captured.can_run(plan)
            got = captured.run(plan)
            assert got is not None
            torch.testing.assert_close(got, eagerly(model, storage, plan, previous), rtol=2e-4, atol=2e-4)
    assert max(len(plan.token_ids_T) for plan in chunks) == 64
    for plan in chunks:
        assert not captured.can_run(plan)
        assert eagerly(model, storage, plan, previous).isfinite().all()
    torch.testing.assert_close(storage.data_L2BPKD, before, rtol=0, atol=0)
