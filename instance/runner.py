"""Runs step plans on the device, in order, one ahead of the host."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from distattn.attention import DistAttention
from gmanager.wire.messages import TokenLogprob
from instance.model import Model
from instance.sampler import sample
from instance.scheduler import SampledRow, StepPlan
from kernels.upload import upload


@dataclass(slots=True)
class Traffic:
    """Bytes this instance has sent to others."""

    query_bytes: int = 0
    partial_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Samples:
    """Sampled tokens of a step, on their way to the host."""

    rows: Sequence[SampledRow]
    tokens_S: torch.Tensor
    logprobs_S: torch.Tensor
    ranks_S: torch.Tensor
    top_logprobs_SN: torch.Tensor
    top_ids_SN: torch.Tensor


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that is queued on the device."""

    samples: _Samples | None
    done: torch.cuda.Event | None
    """On a GPU: when the step has run and its samples are here."""


class Runner:
    """The device's side of the loop: `launch` queues a plan, `result_of` waits for its tokens.

    One thread drives the device, so steps run in the order of their launch; on a GPU it only queues work, and a second
    thread waits for the event behind it.
    """

    def __init__(self, model: Model, attention: DistAttention, threads: int) -> None:
        self.traffic = Traffic()
        self._model = model
        self._attention = attention
        self._device = model.device
        self._driver = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="result")
        self._previous_tokens = torch.empty(0, dtype=torch.int64, device=self._device)
        # the number of threads and the current GPU are settings of the thread that calls
        self._driver.submit(torch.set_num_threads, threads).result()
        if self._device.type == "cuda":
            self._driver.submit(torch.cuda.set_device, self._device).result()
        model.context.attend = attention.run

    def launch(self, plan: StepPlan) -> asyncio.Future[Launched]:
        """Queue a plan behind those before it."""
        return asyncio.get_running_loop().run_in_executor(self._driver, self._run, plan)

    async def result_of(self, launched: asyncio.Future[Launched]) -> dict[int, TokenLogprob]:
        """The tokens of a launched plan by sequence, once the device has run it."""
        step = await launched
        if step.done is not None:
            await asyncio.get_running_loop().run_in_executor(self._waiter, step.done.synchronize)
        return {} if step.samples is None else _read(step.samples)

    def close(self) -> None:
        """Let go of the threads. A step that waits for a lost peer is not waited for."""
        self._model.context.attend = None
        pools: list[Executor] = [self._driver, self._waiter]
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, plan: StepPlan) -> Launched:
        samples = None if plan.is_idle else self._compute(plan)
        if samples is None:
            self._previous_tokens = self._previous_tokens[:0]
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self._device))
        return Launched(samples, done)

    def _compute(self, plan: StepPlan) -> _Samples | None:
        with torch.inference_mode():
            self._attention.plan(plan.layout, plan.slots_T)
            queries, partials = self._attention.bytes_sent(plan.layout, self._model.num_layers)
            self.traffic.query_bytes += queries
            self.traffic.partial_bytes += partials
            if not plan.token_ids_T:
                self._serve()
                return None
            logits_SV = self._model.forward(
                self._token_ids(plan), self._upload(plan.positions_T), self._upload([s.row for s in plan.sampled])
            )
            return self._sample(plan, logits_SV)

    def _serve(self) -> None:
        """Attend for others, with no rows of our own."""
        shape = self._attention.shape
        q_0HD = torch.empty((0, shape.num_heads, shape.head_dim), dtype=shape.dtype, device=self._device)
        kv_0KD = torch.empty((0, shape.num_kv_heads, shape.head_dim), dtype=shape.dtype, device=self._device)
        for layer in range(self._model.num_layers):
            self._attention.run(layer, q_0HD, kv_0KD, kv_0KD)

    def _token_ids(self, plan: StepPlan) -> torch.Tensor:
        """Token ids of the rows, those that the step before samples taken from the device."""
        token_ids_T = self._upload(plan.token_ids_T)
        if plan.pending:
            rows, samples = zip(*plan.pending, strict=True)
            token_ids_T[self._upload(rows)] = self._previous_tokens[self._upload(samples)]
        return token_ids_T

    def _sample(self, plan: StepPlan, logits_SV: torch.Tensor) -> _Samples | None:
        if not plan.sampled:
            return None
        tokens_S = sample(logits_SV, [s.params for s in plan.sampled], [s.position for s in plan.sampled])
        self._previous_tokens = tokens_S
        logprobs_SV = logits_SV.float().log_softmax(-1)
        logprobs_S = logprobs_SV.gather(1, tokens_S.unsqueeze(1)).squeeze(1)
        ranks_S = (logprobs_SV > logprobs_S.unsqueeze(1)).sum(-1) + 1
        most = min(max(s.params.logprobs or 0 for s in plan.sampled), logprobs_SV.shape[-1])
        top = logprobs_SV.topk(most, -1)
        results = [tokens_S, logprobs_S, ranks_S, top.values, top.indices]
        if self._device.type == "cuda":
            results = [result.to("cpu", non_blocking=True) for result in results]
        return _Samples(plan.sampled, *results)

    def _upload(self, values: Sequence[int]) -> torch.Tensor:
        return upload(values, self._device)


def _read(step: _Samples) -> dict[int, TokenLogprob]:
    tokens: dict[int, TokenLogprob] = {}
    for i, row in enumerate(step.rows):
        count = row.params.logprobs or 0
        tokens[row.seq] = TokenLogprob(
            token_id=int(step.tokens_S[i]),
            logprob=float(step.logprobs_S[i]),
            rank=int(step.ranks_S[i]),
            top_ids=step.top_ids_SN[i, :count].tolist(),
            top_logprobs=step.top_logprobs_SN[i, :count].tolist(),
        )
    return tokens
