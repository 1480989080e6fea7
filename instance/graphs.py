"""Decode steps as CUDA graphs: captured once for each bucket of rows, then only fed.

A step of decode rows (`StepPlan.is_decode`) is padded to the next bucket. Its tables lie at fixed addresses
(`kernels.upload.FixedTables`); padding rows write no KV and attend to nothing. With peers, each bucket has a second graph in
which rows travel (`distattn.decode`): all members of a party run theirs in the same step. A stage's graph leaves rows instead
of logits, and but in the first stage begins with rows.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from distattn.decode import DecodeStep, Served, decode_kernel
from distattn.layout import Layout
from distattn.peers import PeerMemory
from instance.model import Model
from instance.plan import MAX_DECODE_ROWS, StepPlan
from kernels.upload import FixedTables
from kvstore.storage import KVStorage

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, MAX_DECODE_ROWS)
"""Rows of the captured steps. Up to 64 rows reading the weights is what takes time, so a bucket's padding is nearly free."""


_NOTHING = StepPlan(
    token_ids_T=[],
    positions_T=[],
    pending=[],
    sampled=[],
    scored=[],
    slots_T=[],
    layout=Layout(num_rows=0, own=[], dispatched_rows=[], dispatched={}, received={}, others=[]),
    needs_logits=False,
    is_decode=True,
)


class Replay(Protocol):
    """What of a CUDA graph is used."""

    def replay(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Graph:
    tables: FixedTables
    attention: DecodeStep
    graph: Replay
    logits_rows_R: torch.Tensor
    """What the graph reads must live as long as it does."""
    out_R: torch.Tensor | None
    """Logits `[R, V]`, or a stage's rows `[R, E]`."""


class DecodeGraphs:
    """All captured steps of one stream. To be used in the thread, and on the stream, in which they were captured."""

    def __init__(
        self,
        model: Model,
        storage: KVStorage,
        previous_tokens: torch.Tensor,
        peers: PeerMemory | None,
        processors: int | None = None,
    ) -> None:
        """Captures every bucket, alone and with `peers`, on the current stream. `previous_tokens`: where each step leaves its
        samples for the next. `processors`: of the stream, if not all of the device's.

        Raises RuntimeError for a model that waits for the device within a step: no graph can hold that.
        """
        self._model = model
        self._shape = model.shape
        self._storage = storage
        self._device = storage.data_L2BPKD.device
        self._previous_tokens = previous_tokens
        self._peers = peers
        self._kernel = decode_kernel(storage, model.shape, processors)
        self._served = None if peers is None else Served.of(peers)
        self._rows_RE: torch.Tensor | None = None
        """Of the stage before."""
        if model.place.stage:
            self._rows_RE = torch.zeros(MAX_DECODE_ROWS, model.hidden_size, dtype=model.shape.dtype, device=self._device)
        self._out_R: torch.Tensor | None = None
        """Of the step that has run last: each graph with its own would take gigabytes for large vocabularies."""
        self._memory = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        for rows in sorted(BUCKETS, reverse=True):  # the largest first: the others fit in the memory it took
            self._capture(rows, None)
            if peers is not None:
                self._capture(rows, peers)
        if peers is not None:
            self._capture(0, peers)

    def can_run(self, plan: StepPlan) -> bool:
        """Whether the step is one of those captured."""
        return plan.is_decode and (self._peers is not None or not plan.is_shared)

    def run(self, plan: StepPlan, rows_TE: torch.Tensor | None = None) -> torch.Tensor | None:
        """Queue the step: logits `[T, V]` of its rows, if it has any, in memory that the next step overwrites.

        Of a stage: the rows `[T, E]` that go on, made of `rows_TE`, those of the stage before, but in the first.
        """
        num_rows = len(plan.token_ids_T)
        graph = self._graphs[_bucket(num_rows), plan.is_shared]
        _fill_tables(graph.tables, graph.attention, plan)
        if rows_TE is not None and self._rows_RE is not None:
            self._rows_RE[:num_rows] = rows_TE
        graph.graph.replay()
        return None if graph.out_R is None else graph.out_R[:num_rows]

    def graph(self, num_rows: int) -> Replay:
        """The graph that runs so many rows alone. To measure with: it runs the tables of its last step again."""
        return self._graphs[_bucket(num_rows), False].graph

    def _capture(self, num_rows: int, peers: PeerMemory | None) -> None:
        tables = FixedTables(
            {"token_ids": num_rows, "positions": num_rows, "sources": num_rows}
            | DecodeStep.table_sizes(self._storage, self._shape, num_rows, peers),
            self._device,
        )
        attention = DecodeStep(self._storage, self._shape, tables, num_rows, self._kernel, peers, self._served)
        logits_rows_R = torch.arange(num_rows, device=self._device)

        def forward() -> torch.Tensor | None:
            if not num_rows:
                for layer in range(self._model.num_layers):
                    attention.serve(layer)
                return None
            sources_T = tables["sources"]
            sampled_T = self._previous_tokens[sources_T.clamp(min=0)]
            token_ids_T = torch.where(sources_T >= 0, sampled_T, tables["token_ids"])
            self._model.context.attention = attention
            out_R = self._forward(token_ids_T, self._positions(tables["positions"]), logits_rows_R)
            if self._out_R is None:  # before the first capture, which is of the largest
                self._out_R = torch.empty_like(out_R)
            return self._out_R[:num_rows].copy_(out_R)

        with torch.inference_mode():
            nothing = replace(_NOTHING, other_layouts=[_NOTHING.layout] * (len(self._shape.sights) - 1))
            _fill_tables(tables, attention, nothing)
            forward()  # what is compiled or allocated once must not happen in the capture
            graph, out_R = self._record(forward)
        self._graphs[num_rows, peers is not None] = _Graph(tables, attention, graph, logits_rows_R, out_R)

    def _forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
        if self._model.place.stages == 1:
            return self._model.forward(token_ids_T, positions_T, rows_R)
        rows_TE = None if self._rows_RE is None else self._rows_RE[: len(positions_T)].clone()  # layers may write to them
        out_TE = self._model.run_stage(token_ids_T, positions_T, rows_TE)
        assert out_TE is not None  # it is None where keys and values are all that is wanted
        return out_TE

    def _positions(self, positions_T: torch.Tensor) -> torch.Tensor:
        """As the model's layers take them."""
        return positions_T if self._model.fused is not None else positions_T.long()

    def _record(self, forward: Callable[[], torch.Tensor | None]) -> tuple[Replay, torch.Tensor | None]:
        """`forward` as something that runs it again, and its result, which every run overwrites."""
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # other threads go on: NCCL's watchdog asks its events meanwhile
        stream = torch.cuda.current_stream(self._device)
        with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
            out_R = forward()
        return graph, out_R


def _bucket(num_rows: int) -> int:
    return next(rows for rows in (0, *BUCKETS) if rows >= num_rows)


def _fill_tables(tables: FixedTables, attention: DecodeStep, plan: StepPlan) -> None:
    """Write all tables of the step and send them; rows beyond its own are padding."""
    padding = [0] * (attention.num_rows - len(plan.token_ids_T))
    sources = array("i", [-1] * attention.num_rows)
    for row, sample in plan.pending:
        sources[row] = sample
    tables.begin()
    tables.write("token_ids", array("i", plan.token_ids_T + padding))
    tables.write("positions", array("i", plan.positions_T + padding))
    tables.write("sources", sources)
    attention.plan(plan.layouts, plan.slots)
    tables.upload()
