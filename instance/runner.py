"""Runs the step plans of one lane on the device, in order, one ahead of the host."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from llguidance import LLTokenizer

from distattn.attention import DistAttention
from gmanager.wire.logs import get_logger
from gmanager.wire.messages import PromptLogprobs, TokenLogprob, pack_tokens
from instance.elastic_tp import FeedCosts
from instance.fused import Hidden
from instance.model import Model
from instance.plan import SampledRow, ScoredRows, StepPlan
from instance.sampler import Sampler
from instance.shared_feeds import SharedFeeds
from instance.team import Team
from kernels.upload import upload
from kvstore.storage import KVStorage

log = get_logger("instance")

if TYPE_CHECKING:  # they need Triton, which an instance on the CPU does without
    from distattn.peers import PeerMemory
    from instance.graphs import DecodeGraphs
    from instance.shared_memory import FeedMemory


@dataclass(slots=True)
class Traffic:
    """What this instance has sent to others."""

    rows_dispatched: int = 0
    """Query rows, counted once a step and receiver."""
    query_bytes: int = 0
    partial_bytes: int = 0

    def add(self, other: "Traffic") -> None:
        self.rows_dispatched += other.rows_dispatched
        self.query_bytes += other.query_bytes
        self.partial_bytes += other.partial_bytes


@dataclass(slots=True)
class Times:
    """Nanoseconds in which the device ran steps. The parts are known on the CPU only: a graph can't be divided by the host."""

    step_ns: int = 0
    attention_ns: int = 0
    """Of it: attention, less waiting."""
    exchange_ns: int = 0
    """Of it: waiting for rows of other instances."""

    def add(self, step: "Times") -> None:
        self.step_ns += step.step_ns
        self.attention_ns += step.attention_ns
        self.exchange_ns += step.exchange_ns


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Log-probability and rank of a token for each of A rows, and the N likeliest tokens."""

    logprobs_A: torch.Tensor
    ranks_A: torch.Tensor
    top_logprobs_AN: torch.Tensor
    top_ids_AN: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Samples:
    """Sampled tokens of a step, on their way to the host."""

    rows: Sequence[SampledRow]
    tokens_S: torch.Tensor
    logprobs: _Logprobs | None
    """Of the rows whose requests ask for them."""


@dataclass(frozen=True, slots=True)
class Results:
    """What a step brings, on its way to the host."""

    samples: _Samples | None = None
    scored: list[tuple[ScoredRows, _Logprobs]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step has brought, by sequence."""

    tokens: dict[int, TokenLogprob]
    scored: list[tuple[int, PromptLogprobs]]
    step_ns: int = 0
    """In which the device ran it."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that is queued on the device."""

    results: Results
    times: Times
    """On a GPU the events tell them."""
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None
    """On a GPU: when the step begins, and when it has run and its samples are here."""
    before: torch.cuda.Event | None = None
    """On a GPU: when the step before had, if this one may have begun earlier."""


class Runner:
    """The device's side of a lane's loop: `launch` queues a plan, `result_of` waits for its tokens.

    One thread drives the device, so steps run in the order of their launch; on a GPU it only queues work, and a second
    thread waits for the event behind it.
    """

    def __init__(
        self,
        model: Model,
        attention: DistAttention,
        *,
        threads: int,
        max_samples: int,
        tokenizer: LLTokenizer | None = None,
        streams: "Mapping[int, torch.cuda.Stream] | None" = None,
        team: Team | None = None,
        feeds: SharedFeeds | None = None,
        tell: Callable[[StepPlan, int], None] | None = None,
    ) -> None:
        """`max_samples`: most tokens that one step samples. `tokenizer`: without it no sequence may have a grammar.

        `streams`: on a GPU, those that steps may run on, by the number of their processors. `team`: of the ranks that share the
        model, whose first samples. `feeds`: of steps that instances split, where none are captured. `tell`:
        what the others shall launch, too.
        """
        self.traffic = Traffic()
        self.times = Times()
        """Of the steps whose result was waited for."""
        self._model = model
        self._attention = attention
        self._device = model.device
        self._driver = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="result")
        self._streams = streams or {}
        self._stream: torch.cuda.Stream | None = None
        """Of the step before."""
        self.graphs: dict[int, DecodeGraphs] = {}
        """Captured steps, by the number of processors that they run on."""
        self.shared_graph_steps = 0
        """Steps that ran as a graph in which rows travelled."""
        self._max_samples = max_samples
        self._sampler = Sampler(model.vocab_size, self._device, backend=attention.backend, max_rows=max_samples)
        self._team = team
        self._feeds = feeds
        self._tell = tell
        self._previous_tokens = torch.zeros(max_samples, dtype=torch.int64, device=self._device)
        # the number of threads and the current GPU are settings of the thread that calls
        self._driver.submit(torch.set_num_threads, threads).result()
        if team is not None:
            self._driver.submit(setattr, model.context, "team", team).result()
        if self._device.type == "cuda":
            self._driver.submit(torch.cuda.set_device, self._device).result()
        if tokenizer is not None:
            self._sampler.use_text(tokenizer)

    def prepare_chunks(self, max_rows: int) -> None:
        """Build what steps with up to `max_rows` prompt rows need on a GPU: seconds, before the first launch."""
        self._driver.submit(self._use_tiles, max_rows).result()

    def capture(self, storage: KVStorage, peers: "PeerMemory | None", feeds: "FeedMemory | None" = None) -> None:
        """Capture decode steps on a GPU: seconds, before the first launch. `feeds`: of steps that instances split.

        A model whose layers run as transformers has them may do what no graph holds: then it runs eagerly, and the log says so.
        """
        from instance.graphs import DecodeGraphs

        def capture() -> None:
            for processors in self._streams:
                self._go_to(processors)
                self.graphs[processors] = DecodeGraphs(
                    self._model, storage, self._previous_tokens, peers, processors=processors, feeds=feeds
                )

        try:
            self._driver.submit(capture).result()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self._model.fused is not None:
                raise
            self.graphs.clear()
            first: BaseException = error
            while first.__context__ is not None:  # the end of a capture that failed raises an error of its own
                first = first.__context__
            log.warning("decode steps run without CUDA graphs", reason=f"{type(first).__name__}: {first}"[:200])

    def _use_tiles(self, max_rows: int) -> None:
        self._go_to(max(self._streams))
        with torch.inference_mode():
            self._attention.use_tiles(max_rows)
        torch.cuda.synchronize(self._device)

    def launch(self, plan: StepPlan, processors: int = 0) -> asyncio.Future[Launched]:
        """Queue a plan behind those before it. `processors`: on a GPU, of those that there are streams for."""
        if self._tell is not None:
            self._tell(plan, processors)
        return asyncio.get_running_loop().run_in_executor(self._driver, self._run, plan, processors)

    async def result_of(self, launched: asyncio.Future[Launched]) -> StepResult:
        """What a launched plan brings, once the device has run it."""
        step = await launched
        times = step.times
        if step.events is not None:
            began, done = step.events
            await asyncio.get_running_loop().run_in_executor(self._waiter, done.synchronize)
            elapsed_ms = began.elapsed_time(done)
            if step.before is not None:
                elapsed_ms = min(elapsed_ms, step.before.elapsed_time(done))
            times = Times(step_ns=round(elapsed_ms * 1e6))
        self.times.add(times)
        samples = step.results.samples
        tokens = {} if samples is None else _read(samples)
        return StepResult(tokens, [(rows.seq, _pack(rows, found)) for rows, found in step.results.scored], times.step_ns)

    @property
    def threads(self) -> tuple[Executor, ...]:
        """That drive the device: they have ended once nothing of a closed runner runs any more."""
        return self._driver, self._waiter

    def ends(self) -> "list[torch.cuda.Event]":
        """On a GPU: of all that was queued. To be called once the threads have ended."""
        return [stream.record_event() for stream in self._used_streams()]

    def _used_streams(self) -> "list[torch.cuda.Stream]":
        return [] if self._stream is None else [self._stream]  # each waits for the one before (`_go_to`)

    def close(self) -> None:
        """Let go of the threads and the graphs. A step that waits for a lost peer is not waited for."""
        for pool in self.threads:
            pool.shutdown(wait=False, cancel_futures=True)
        self.graphs.clear()

    def _run(self, plan: StepPlan, processors: int) -> Launched:
        if self._device.type == "cuda":
            self._go_to(processors)
            began = self._record()
            results = self._compute(plan, processors)
            return Launched(results, Times(), (began, self._record()))
        began_ns = time.perf_counter_ns()
        results = self._compute(plan, processors)
        layers = self._attention.take_times()
        waited_ns = layers.exchange_ns + (0 if self._feeds is None else self._feeds.take_waited_ns())
        times = Times(time.perf_counter_ns() - began_ns, layers.attention_ns, waited_ns)
        return Launched(results, times, None)

    def _go_to(self, processors: int) -> None:
        """Queue what follows on the stream with so many processors, behind all that the lane has queued before."""
        stream = self._streams[processors]
        if stream is not self._stream:
            if self._stream is not None:
                stream.wait_stream(self._stream)
            torch.cuda.set_stream(stream)
            self._stream = stream

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _compute(self, plan: StepPlan, processors: int) -> Results:
        if plan.is_idle:
            return Results()
        self._count(plan)
        with torch.inference_mode():
            graphs = self.graphs.get(processors)
            if graphs is not None and graphs.can_run(plan):
                logits_SV = graphs.run(plan)
                self.shared_graph_steps += plan.is_shared
                results = Results(None if logits_SV is None else self._sample(plan, logits_SV))
            else:
                results = self._run_eagerly(plan)
            if self._team is not None:
                self._agree(self._team, plan)
            return results

    def _count(self, plan: StepPlan) -> None:
        """What a step sends to other instances."""
        self.traffic.rows_dispatched += len(plan.layout.dispatched_rows)
        queries, partials = self._attention.bytes_sent(plan.layouts)
        self.traffic.query_bytes += queries
        self.traffic.partial_bytes += partials

    def _agree(self, team: Team, plan: StepPlan) -> None:
        """Take the first rank's samples; also where there are none: its step is over when all have written their KV."""
        team.agree(self._previous_tokens[plan.samples_at :][: self._max_samples])

    def _run_eagerly(self, plan: StepPlan) -> Results:
        self._attention.plan(plan.layouts, plan.slots)
        model = self._model
        model.context.sharing = self._shared_feeds(plan)
        if not plan.token_ids_T:
            if model.context.sharing is not None and model.fused is not None:
                model.fused.help(self._serve_layer)
            else:
                self._serve(model.num_layers - (model.fused is not None and not plan.needs_logits))
            return Results()
        model.context.attention = self._attention
        token_ids_T, positions_T = self._token_ids(plan), self._upload(plan.positions_T)
        if not plan.needs_logits:
            model.store(token_ids_T, positions_T)
            return Results()
        hidden = model.run(token_ids_T, positions_T)
        scored = self._score(plan.scored, hidden) if plan.scored else []
        if not plan.sampled:
            return Results(None, scored)
        return Results(self._sample(plan, model.logits(hidden, self._upload([s.row for s in plan.sampled]))), scored)

    def _shared_feeds(self, plan: StepPlan) -> SharedFeeds | None:
        """What a step is split by; None: it isn't.

        Raises RuntimeError for one that should have run as a graph: it does on the others, who would wait for this instance.
        """
        if plan.shares is None:
            return None
        if self._feeds is None:
            raise RuntimeError(f"a split step of {plan.shares.total} rows isn't captured")
        self._feeds.plan(plan.shares)
        return self._feeds

    def measure_feeds(self, ranks: range, rank: int) -> FeedCosts:
        """What steps that are split cost, before the first launch: all members of the epoch call this at once.

        Raises RuntimeError without feeds to share.
        """
        return self._driver.submit(self._measure_feeds, ranks, rank).result()

    def _measure_feeds(self, ranks: range, rank: int) -> FeedCosts:
        if self.graphs:
            processors = max(self.graphs)
            self._go_to(processors)
            with torch.inference_mode():
                return self.graphs[processors].measure_feeds(ranks, rank)
        if self._feeds is None:
            raise RuntimeError("no feeds are shared")
        return self._feeds.measure(ranks, rank)

    def _serve(self, num_layers: int) -> None:
        """Attend for others in the first layers, with no rows of our own."""
        for layer in range(num_layers):
            self._serve_layer(layer)

    def _serve_layer(self, layer: int) -> None:
        shape = self._attention.shape
        q_0HD = torch.empty((0, shape.num_heads, shape.head_dim), dtype=shape.dtype, device=self._device)
        kv_0KD = torch.empty((0, shape.num_kv_heads, shape.head_dim), dtype=shape.dtype, device=self._device)
        self._attention.run(layer, q_0HD, kv_0KD, kv_0KD)

    def _token_ids(self, plan: StepPlan) -> torch.Tensor:
        """Token ids of the rows, those that steps before sample taken from the device."""
        token_ids_T = self._upload(plan.token_ids_T)
        if plan.pending:
            rows, samples = zip(*plan.pending, strict=True)
            token_ids_T[self._upload(rows)] = self._previous_tokens[self._upload(samples)]
        return token_ids_T

    def _sample(self, plan: StepPlan, logits_SV: torch.Tensor) -> _Samples | None:
        """None: another rank samples."""
        if self._team is not None and self._team.place.part:
            return None
        tokens_S = self._sampler.sample(logits_SV, plan.sampled)
        self._previous_tokens[plan.samples_at :][: len(plan.sampled)] = tokens_S
        samples = _Samples(plan.sampled, self._to_host(tokens_S), self._logprobs(plan, logits_SV, tokens_S))
        self._sampler.remember(plan.sampled, samples.tokens_S)
        return samples

    def _logprobs(self, plan: StepPlan, logits_SV: torch.Tensor, tokens_S: torch.Tensor) -> _Logprobs | None:
        asked = [i for i, s in enumerate(plan.sampled) if s.params.logprobs is not None]
        if not asked:
            return None
        if len(asked) < len(plan.sampled):
            rows_A = self._upload(asked)
            logits_SV, tokens_S = logits_SV[rows_A], tokens_S[rows_A]
        num_top = max(plan.sampled[i].params.logprobs or 0 for i in asked)
        return self._all_to_host([self._logprobs_of(logits_SV, tokens_S, num_top)])

    def _score(self, scored: list[ScoredRows], hidden: Hidden) -> list[tuple[ScoredRows, _Logprobs]]:
        """Log-probabilities of prompt tokens, for as many rows at a time as a step may sample: all logits would take GBs."""
        found = []
        for rows in scored:
            parts = []
            for start in range(0, len(rows.token_ids), self._max_samples):
                token_ids = rows.token_ids[start : start + self._max_samples]
                first = rows.first_row + start
                logits_SV = self._model.logits(hidden, self._upload(range(first, first + len(token_ids))))
                parts.append(self._logprobs_of(logits_SV, self._upload(token_ids), rows.num_top))
            found.append((rows, self._all_to_host(parts)))
        return found

    def _logprobs_of(self, logits_AV: torch.Tensor, tokens_A: torch.Tensor, num_top: int) -> _Logprobs:
        logprobs_AV = logits_AV.float().log_softmax(-1)
        logprobs_A = logprobs_AV.gather(1, tokens_A.unsqueeze(1).long()).squeeze(1)
        ranks_A = (logprobs_AV > logprobs_A.unsqueeze(1)).sum(-1) + 1
        top = logprobs_AV.topk(min(num_top, logprobs_AV.shape[-1]), -1)
        return _Logprobs(logprobs_A, ranks_A, top.values, top.indices)

    def _all_to_host(self, parts: list[_Logprobs]) -> _Logprobs:
        """Joined on the device: on the host their bytes are not there yet."""
        return _Logprobs(*(self._to_host(torch.cat([getattr(part, name) for part in parts])) for name in _Logprobs.__slots__))

    def _to_host(self, result: torch.Tensor) -> torch.Tensor:
        """Queued, not waited for."""
        return result.to("cpu", non_blocking=True) if self._device.type == "cuda" else result

    def _upload(self, values: Sequence[int]) -> torch.Tensor:
        return upload(values, self._device)


def _read(step: _Samples) -> dict[int, TokenLogprob]:
    """Tokens by sequence; log-probability and rank are 0 where nobody asked for them."""
    logprobs = step.logprobs
    asked = [row.seq for row in step.rows if row.params.logprobs is not None]
    index_of = {seq: a for a, seq in enumerate(asked)}
    tokens: dict[int, TokenLogprob] = {}
    for row, token_id in zip(step.rows, step.tokens_S.tolist(), strict=True):
        if logprobs is None or row.params.logprobs is None:
            tokens[row.seq] = TokenLogprob(token_id=token_id, logprob=0.0, rank=0)
            continue
        at, count = index_of[row.seq], row.params.logprobs
        tokens[row.seq] = TokenLogprob(
            token_id=token_id,
            logprob=float(logprobs.logprobs_A[at]),
            rank=int(logprobs.ranks_A[at]),
            top_ids=logprobs.top_ids_AN[at, :count].tolist(),
            top_logprobs=logprobs.top_logprobs_AN[at, :count].tolist(),
        )
    return tokens


def _pack(rows: ScoredRows, found: _Logprobs) -> PromptLogprobs:
    num_top = found.top_ids_AN.shape[1]
    return PromptLogprobs(
        start=rows.start,
        token_ids=pack_tokens(rows.token_ids),
        logprobs=found.logprobs_A.numpy().astype("<f4").tobytes(),
        ranks=found.ranks_A.numpy().astype("<u4").tobytes(),
        num_top=num_top,
        top_ids=found.top_ids_AN.numpy().astype("<u4").tobytes(),
        top_logprobs=found.top_logprobs_AN.numpy().astype("<f4").tobytes(),
    )
