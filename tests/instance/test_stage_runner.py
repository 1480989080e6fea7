"""Steps that go through two stages, each a rank of its own in one process; between them rows travel by way of a queue."""

import asyncio
import queue
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from distattn.attention import DistAttention
from distattn.exchange import Exchange
from distattn.layout import Layout, read_run
from gmanager.wire.messages import SequenceParams
from instance.load import load_model
from instance.model import Model
from instance.pipe import ExchangePipe, Pipe
from instance.plan import MAX_SAMPLES, SampledRow, ScoredRows, StepPlan
from instance.runner import Launched, Runner, StepResult
from instance.split import Place
from instance.stage_runner import StageRunner
from kvstore.run import Run
from kvstore.sight import FULL
from tests.support.tiny import make_model, reference

CPU = torch.device("cpu")
BLOCK = 16
GREEDY = SequenceParams(max_tokens=9, temperature=0, top_k=0, top_p=1, seed=0, stop_token_ids=[], logprobs=0)


class Done:
    def __init__(self, end: Callable[[], None] = lambda: None) -> None:
        self._end = end

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        self._end()
        return True


class Way:
    """A process group of one rank; whoever sends never waits."""

    def __init__(self, rank: int, rows: "defaultdict[tuple[int, int], queue.Queue[torch.Tensor]]") -> None:
        self._rank = rank
        self._rows = rows
        self.sent = 0

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Done:
        self._rows[self._rank, dst].put(tensors[0].clone())
        self.sent += 1
        return Done()

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> Done:
        return Done(lambda: tensors[0].copy_(self._rows[src, self._rank].get(timeout=20)))  # type: ignore[func-returns-value]


def runner_of(model: Model, pipe: Pipe | None) -> Runner:
    exchange: Any = Exchange(None, CPU)  # type: ignore[arg-type]
    storage = model.make_storage(8, BLOCK)
    storage.data_L2BPKD.fill_(torch.nan)
    attention = DistAttention(storage, model.shape, exchange, backend="torch")
    if pipe is None:
        return Runner(model, attention, threads=1, max_samples=MAX_SAMPLES["prefill"])
    return StageRunner(model, attention, pipe=pipe, ends=None, threads=1, max_samples=MAX_SAMPLES["prefill"])


def plan(ids: Sequence[int], start: int, *, samples_at: int = 0, pending: int | None = None, **more: Any) -> StepPlan:
    """Rows of one sequence from `start` on, the last of which is sampled if `samples`."""
    stop = start + len(ids)
    reading = read_run(Run.of(BLOCK, [(0, stop)], range(-(-stop // BLOCK))), 0, start, stop, FULL)
    assert reading is not None
    samples, scored = more.get("samples", False), more.get("scored", [])
    return StepPlan(
        token_ids_T=list(ids),
        positions_T=list(range(start, stop)),
        pending=[] if pending is None else [(0, pending)],
        sampled=[SampledRow(len(ids) - 1, 1, stop, GREEDY, 0)] if samples else [],
        scored=scored,
        slots_T=list(range(start, stop)),
        layout=Layout(len(ids), [reading], [], {}, {}, []),
        needs_logits=bool(samples or scored),
        samples_at=samples_at,
        is_decode=False,
    )


async def test_stages_run_ahead_and_say_what_the_whole_model_does(tmp_path: Path) -> None:
    path = make_model("llama", tmp_path, num_hidden_layers=3)
    ids = [(7 * i) % 256 for i in range(30)]
    kept = MAX_SAMPLES["prefill"]
    scored = [ScoredRows(1, 2, 23, array("i", ids[23:30]), 2)]
    chunks = [
        plan(ids[:10], 0),
        plan(ids[10:20], 10),
        plan(ids[20:], 20, samples=True, scored=scored, samples_at=0),
        plan([0], 30, pending=0, samples=True, samples_at=kept),
        plan([0], 31, pending=kept, samples=True, samples_at=0),
    ]
    rows: defaultdict[tuple[int, int], queue.Queue[torch.Tensor]] = defaultdict(queue.Queue)
    back: defaultdict[tuple[int, int], queue.Queue[torch.Tensor]] = defaultdict(queue.Queue)
    stages, ways = [], []
    for stage in range(2):
        place = Place(stage=stage, stages=2)
        ways.append(Way(stage, rows))
        ends: list[Any] = [Exchange(way, CPU, members="stage") for way in (ways[-1], Way(stage, back))]  # type: ignore[arg-type]
        model = load_model(path, None, CPU, place=place)
        pipe = ExchangePipe(*ends, place, hidden_size=64, dtype=torch.float32, device=CPU)
        stages.append(runner_of(model, pipe))
    whole = runner_of(load_model(path, None, CPU), None)
    first, second = stages
    try:
        launched: list[asyncio.Future[Launched]] = [first.launch(step) for step in chunks]
        deadline = time.monotonic() + 20
        while ways[0].sent < 3 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert ways[0].sent == 3, "three slices are through the first stage; the next row needs a token"
        assert not any(step.done() for step in launched)
        followed = [second.launch(step) for step in chunks]
        got: list[StepResult] = [await first.result_of(step) for step in launched]
        await asyncio.gather(*followed)
        want: list[StepResult] = []
        for step in chunks:
            at = [(row, 0) for row, _ in step.pending]
            alone = StepPlan(**{name: getattr(step, name) for name in StepPlan.__slots__} | {"pending": at, "samples_at": 0})
            want.append(await whole.result_of(whole.launch(alone)))
    finally:
        for runner in (*stages, whole):
            runner.close()
    tokens = [result.tokens[1].token_id for result in got if result.tokens]
    assert tokens == [result.tokens[1].token_id for result in want if result.tokens]
    assert tokens == reference(path, tuple(ids), 3).token_ids
    (ours,), (theirs,) = got[2].scored, want[2].scored
    assert (ours[0], ours[1].start, ours[1].ranks, ours[1].top_ids) == (
        theirs[0],
        theirs[1].start,
        theirs[1].ranks,
        theirs[1].top_ids,
    )


class Overwritten:
    """Graphs whose steps all leave their rows in the same memory."""

    def __init__(self) -> None:
        self._out_TE = torch.zeros(1, 64)

    def can_run(self, plan: StepPlan) -> bool:
        return True

    def run(self, plan: StepPlan, rows_TE: torch.Tensor | None) -> torch.Tensor:
        return self._out_TE.add_(1)


class Unhurried(Way):
    """Sends what is there when it is taken."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> Done:
        self._rows[self._rank, dst].put(tensors[0])
        return Done()


async def first_of_two(path: Path, way: type[Way]) -> tuple[Runner, Way, "queue.Queue[torch.Tensor]"]:
    """The first stage, by itself: two steps' rows have come back to it already. With what it sends."""
    rows: defaultdict[tuple[int, int], queue.Queue[torch.Tensor]] = defaultdict(queue.Queue)
    back: defaultdict[tuple[int, int], queue.Queue[torch.Tensor]] = defaultdict(queue.Queue)
    for _ in range(2):
        back[1, 0].put(torch.zeros(1, 64))
    place = Place(stage=0, stages=2)
    sender = way(0, rows)
    ends: list[Any] = [Exchange(its, CPU, members="stage") for its in (sender, way(0, back))]  # type: ignore[arg-type]
    pipe = ExchangePipe(*ends, place, hidden_size=64, dtype=torch.float32, device=CPU)
    return runner_of(load_model(path, None, CPU, place=place), pipe), sender, rows[0, 1]


async def test_what_a_graph_has_left_is_sent_as_it_was(tmp_path: Path) -> None:
    runner, _, sent = await first_of_two(make_model("llama", tmp_path), Unhurried)
    graphs: Any = Overwritten()
    runner.graphs[0] = graphs
    try:
        for step in [runner.launch(plan([7], at)) for at in range(2)]:
            await step
    finally:
        runner.close()
    assert [float(sent.get_nowait()[0, 0]) for _ in range(2)] == [1, 2]


async def test_behind_a_step_that_failed_none_is_sent_as_its(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, sender, _ = await first_of_two(make_model("llama", tmp_path), Way)
    monkeypatch.setattr(runner._model, "run_stage", mock.Mock(side_effect=[RuntimeError("out of luck"), torch.zeros(1, 64)]))
    try:
        for step in [runner.launch(plan([7], at)) for at in range(2)]:
            with pytest.raises(RuntimeError, match="out of luck"):
                await step
    finally:
        runner.close()
    assert sender.sent == 0
