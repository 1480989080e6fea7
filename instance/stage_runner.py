"""Runs the step plans of one lane on a rank that has some of the model's layers: several steps are in the stages at once.

    stage 0   layers of n | of n + 1 | of n + 2 ...        one thread
                            end of n | of n + 1 ...        another: last norm, head, samples
    stage 1                 layers of n | of n + 1 ...

The end of a step waits for the rows that the last stage sends back; layers of a step wait for nothing but the tokens that they
need of steps before. A wait is only ever for a step that came earlier, so none of them can be for each other.
"""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from instance.pipe import Pipe
from instance.plan import ScoredRows, StepPlan
from instance.runner import Launched, Results, Runner, Times
from instance.team import Team
from kernels.driver import DriverError
from kernels.stream_words import stream_of_its_own


class StageRunner(Runner):
    """As `Runner`, of one stage. Only in the first stage does a step end with its results."""

    def __init__(self, *args: Any, pipe: Pipe, ends: Team | None, **kwargs: Any) -> None:
        """`ends`: of the ranks of the first stage, if there are several, beside their team for layers."""
        super().__init__(*args, **kwargs)
        self._pipe = pipe
        self._ends = ends
        self._ender = ThreadPoolExecutor(1, thread_name_prefix="ends")
        self._writers: dict[int, Future[Launched]] = {}
        """The newest step whose samples are at a place among those that are kept."""
        self._ended_ns = 0
        self._ended: torch.cuda.Event | None = None
        """When the step before did, by the clock or on a GPU."""
        self._previous_tokens = torch.zeros(pipe.place.stages * self._max_samples, dtype=torch.int64, device=self._device)
        self._ender.submit(torch.set_num_threads, kwargs["threads"]).result()
        self._ender.submit(setattr, self._model.context, "team", ends).result()
        self._broken: BaseException | None = None
        """Of a step that wasn't run to its end: rows of the next would be taken for its rows."""
        self._end_stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._ender.submit(self._take_stream).result()

    def launch(self, plan: StepPlan, processors: int = 0) -> "asyncio.Future[Launched]":
        if self._tell is not None:
            self._tell(plan, processors)
        if self._pipe.place.stage:
            return asyncio.wrap_future(self._driver.submit(self._run_layers, plan, processors, set()))
        sources = {self._writers[at - at % self._max_samples] for _, at in plan.pending}
        layers = self._driver.submit(self._run_layers, plan, processors, sources)
        end = self._ender.submit(self._end, plan, layers)
        if plan.sampled:
            self._writers[plan.samples_at] = end
        return asyncio.wrap_future(end)

    @property
    def threads(self) -> tuple[Executor, ...]:
        return *super().threads, self._ender

    def _take_stream(self) -> None:
        """Ends are short, and whoever waits for tokens waits for them: they run on any processor, before other work."""
        torch.cuda.set_device(self._device)
        new: Any = torch.cuda.Stream  # its constructor has no types
        try:
            self._end_stream = stream_of_its_own(self._device, f"ends of {self._max_samples}", -1)
        except DriverError:
            self._end_stream = new(self._device, priority=-1)
        torch.cuda.set_stream(self._end_stream)

    def _used_streams(self) -> "list[torch.cuda.Stream]":
        return super()._used_streams() + ([] if self._end_stream is None else [self._end_stream])

    def _run_layers(self, plan: StepPlan, processors: int, sources: "set[Future[Launched]]") -> Launched:
        with self._unbroken():
            return self._queue_layers(plan, processors, sources)

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        """Once a step has failed none is run any more. Raises what it failed with."""
        if self._broken is not None:
            raise self._broken
        try:
            yield
        except BaseException as error:
            self._broken = error
            raise

    def _queue_layers(self, plan: StepPlan, processors: int, sources: "set[Future[Launched]]") -> Launched:
        if self._device.type == "cuda":
            self._go_to(processors)
        for source in sources:
            sampled = source.result()
            if sampled.events is not None:
                torch.cuda.current_stream(self._device).wait_event(sampled.events[1])
        began_ns = time.perf_counter_ns()
        events = (self._record(),) * 2 if self._device.type == "cuda" else None
        with torch.inference_mode():
            if not plan.is_idle:
                self._count(plan)
                self._run_stage(plan, processors)
        layers = self._attention.take_times()
        return Launched(Results(), Times(began_ns, layers.attention_ns, layers.exchange_ns), events)

    def _run_stage(self, plan: StepPlan, processors: int) -> None:
        """This rank's layers of a step; its rows go on."""
        pipe, place = self._pipe, self._pipe.place
        num_rows = len(plan.token_ids_T)
        graphs = self.graphs.get(processors)
        rows_TE = pipe.take(num_rows) if place.stage and num_rows else None
        if graphs is not None and graphs.can_run(plan):
            out_TE = graphs.run(plan, rows_TE)
            out_TE = None if out_TE is None else out_TE.clone()  # the next step overwrites it, sent or not
            self.shared_graph_steps += plan.is_shared
        else:
            out_TE = self._run_layers_eagerly(plan, rows_TE)
        if not num_rows and place.stage:  # who asked for our attention hasn't waited for the stages before
            pipe.take(1)
        if out_TE is not None and place.is_last:
            wanted = wanted_rows(plan)
            out_TE = out_TE[self._upload(wanted)] if wanted else None
        pipe.give(pipe.token() if out_TE is None else out_TE)

    def _run_layers_eagerly(self, plan: StepPlan, rows_TE: torch.Tensor | None) -> torch.Tensor | None:
        """None: no rows go on."""
        place, model = self._pipe.place, self._model
        stores_only = place.is_last and not plan.needs_logits
        self._attention.plan(plan.layouts, plan.slots)
        if not plan.token_ids_T:
            self._serve(model.num_layers - (model.fused is not None and stores_only))
            return None
        model.context.attention = self._attention
        token_ids_T = self._token_ids(plan) if place.stage == 0 else self._upload([])
        return model.run_stage(token_ids_T, self._upload(plan.positions_T), rows_TE, stores_only=stores_only)

    def _end(self, plan: StepPlan, running: "Future[Launched]") -> Launched:
        """Of a step, in the first stage."""
        layers = running.result()
        with self._unbroken(), torch.inference_mode():
            results = Results() if plan.is_idle else self._results(plan)
        # while several steps are in the stages, one takes what passes between two ends
        if layers.events is not None:
            done, before = self._record(), self._ended
            self._ended = done
            return Launched(results, Times(), (layers.events[0], done), before)
        now_ns, before_ns = time.perf_counter_ns(), self._ended_ns
        self._ended_ns = now_ns
        return Launched(results, replace(layers.times, step_ns=now_ns - max(layers.times.step_ns, before_ns)), None)

    def _results(self, plan: StepPlan) -> Results:
        """Once the rows are back: all ranks' KV is written then."""
        wanted = wanted_rows(plan)
        rows_RE = self._pipe.take(max(1, len(wanted)))
        results = Results()
        if wanted:
            hidden = self._model.behind_stages(rows_RE)
            scored = self._score(_come_back(plan), hidden)
            samples = None
            if plan.sampled:
                samples = self._sample(plan, self._model.logits(hidden, self._upload(range(len(plan.sampled)))))
            results = Results(samples, scored)
        if self._ends is not None:
            self._agree(self._ends, plan)
        return results


def wanted_rows(plan: StepPlan) -> list[int]:
    """Rows of a step that come back to the first stage, in the order in which they do: those sampled, then those scored."""
    rows = [sampled.row for sampled in plan.sampled]
    for scored in plan.scored:
        rows += range(scored.first_row, scored.first_row + len(scored.token_ids))
    return rows


def _come_back(plan: StepPlan) -> list[ScoredRows]:
    """What is scored, by the places of rows that have come back."""
    first, found = len(plan.sampled), []
    for scored in plan.scored:
        found.append(replace(scored, first_row=first))
        first += len(scored.token_ids)
    return found
