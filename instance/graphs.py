"""Decode steps as CUDA graphs: captured once for each bucket of rows, then only fed.

A step of decode rows (`StepPlan.is_decode`) is padded to the next bucket. Its tables lie at fixed addresses
(`kernels.upload.FixedTables`); padding rows write no KV and attend to nothing. With peers, each bucket has a second graph in
which rows travel (`distattn.decode`): all members of a party run theirs in the same step. A stage's graph leaves rows instead
of logits, and but in the first stage begins with rows.

Steps whose feeds are split between instances (`instance.elastic_tp`) have more, of as many rows of all members as their memory
has room for: for each bucket of these one of members that have rows among them, and one of those that only help.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from msgspec import structs

from distattn.decode import DecodeStep, Served, decode_kernel
from distattn.layout import Layout
from distattn.peers import PeerMemory
from instance.elastic_tp import FeedCosts, FeedShares
from instance.model import Model
from instance.plan import MAX_DECODE_ROWS, StepPlan
from instance.shared_feeds import FEW_ROWS, MANY_ROWS, least_ns
from instance.shared_memory import CapturedFeeds, FeedMemory
from kernels.shared_rows import Homes
from kernels.upload import FixedTables
from kvstore.storage import KVStorage

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, MAX_DECODE_ROWS)
"""Rows of the captured steps. Up to 64 rows reading the weights is what takes time, so a bucket's padding is nearly free."""
_TURNS = 5
"""Of a step that is measured, one right behind the other: members don't begin the first at the same moment."""

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
class _Kind:
    """Of captured steps."""

    num_rows: int
    """Own ones."""
    with_peers: bool
    """Whether rows travel to attend, or others' may come here."""
    num_shared: int = 0
    """Rows of all members, whose feeds are split; 0: they aren't."""

    @staticmethod
    def of(plan: StepPlan) -> "_Kind":
        """The smallest that a step fits into. Raises StopIteration if none is large enough."""
        num_rows = len(plan.token_ids_T)
        if plan.shares is None:
            return _Kind(bucket(num_rows), plan.is_shared)
        num_shared = bucket(plan.shares.total)
        return _Kind(num_shared if num_rows else 0, plan.is_shared, num_shared)


@dataclass(frozen=True, slots=True)
class _Graph:
    kind: _Kind
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
        feeds: FeedMemory | None = None,
    ) -> None:
        """Captures every bucket, alone and with `peers`, on the current stream. `previous_tokens`: where each step leaves its
        samples for the next. `processors`: of the stream, if not all of the device's. `feeds`: through which a fused model's
        are split.

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
        self._feeds = feeds
        self._graphs: dict[_Kind, _Graph] = {}
        ways = (False,) if peers is None else (False, True)
        for rows in sorted(BUCKETS, reverse=True):  # the largest first: the others fit in the memory it took
            for with_peers in ways:
                self._capture(_Kind(rows, with_peers))
                if feeds is not None and rows <= feeds.most_rows:
                    self._capture(_Kind(rows, with_peers, rows))
                    self._capture(_Kind(0, with_peers, rows))
        if peers is not None:
            self._capture(_Kind(0, True))

    def can_run(self, plan: StepPlan) -> bool:
        """Whether the step is one of those captured."""
        if not plan.is_decode or (plan.shares is not None and not self._can_share(plan.shares)):
            return False
        return self._peers is not None or not plan.is_shared

    def _can_share(self, shares: FeedShares) -> bool:
        """The same on all members: each has its part in the graphs, and none may be missing."""
        return self._feeds is not None and shares.parts == self._feeds.parts and shares.total <= self._feeds.most_rows

    def run(self, plan: StepPlan, rows_TE: torch.Tensor | None = None) -> torch.Tensor | None:
        """Queue the step: logits `[T, V]` of its rows, if it has any, in memory that the next step overwrites.

        Of a stage: the rows `[T, E]` that go on, made of `rows_TE`, those of the stage before, but in the first.
        """
        num_rows = len(plan.token_ids_T)
        graph = self._graphs[_Kind.of(plan)]
        _fill_tables(graph.kind, graph.tables, graph.attention, plan)
        if rows_TE is not None and self._rows_RE is not None:
            self._rows_RE[:num_rows] = rows_TE
        graph.graph.replay()
        return None if graph.out_R is None else graph.out_R[:num_rows]

    def graph(self, num_rows: int) -> Replay:
        """The graph that runs so many rows alone. To measure with: it runs the tables of its last step again."""
        return self._graphs[_Kind(bucket(num_rows), False)].graph

    def measure_feeds(self, ranks: range, rank: int) -> FeedCosts:
        """What split steps cost beside whole ones, of rows that see nothing: all members of the epoch, which have these ranks,
        call this at once, and each finds its own. Needs `feeds`."""
        assert self._feeds is not None
        found = []
        for rows in (FEW_ROWS, min(MANY_ROWS, self._feeds.most_rows // len(ranks))):
            blank = _made_up(rows, len(self._shape.sights))
            split = replace(blank, shares=FeedShares(rank, tuple((member, rows) for member in ranks)))
            whole_ns, split_ns = (self._least_ns(plan) for plan in (blank, split))
            found.append((rows, whole_ns, split_ns))
        return FeedCosts.of_steps(*found, others=len(ranks) - 1)

    def _least_ns(self, plan: StepPlan) -> float:
        """Of a step."""
        self.run(plan)
        graph = self._graphs[_Kind.of(plan)].graph

        def work() -> None:
            for _ in range(_TURNS):
                graph.replay()
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()

        return least_ns(work) / _TURNS

    def _capture(self, kind: _Kind) -> None:
        num_rows, peers = kind.num_rows, self._peers if kind.with_peers else None
        sizes = {"token_ids": num_rows, "positions": num_rows, "sources": num_rows}
        if kind.num_shared:
            sizes |= {"homes": kind.num_shared, "own rows": kind.num_shared}
        sizes |= DecodeStep.table_sizes(self._storage, self._shape, num_rows, peers)
        tables = FixedTables(sizes, self._device)
        feeds: CapturedFeeds | None = None
        if kind.num_shared and self._feeds is not None:
            feeds = CapturedFeeds(self._feeds, Homes(tables["homes"], tables["own rows"]), num_rows)
        attention = DecodeStep(self._storage, self._shape, tables, num_rows, self._kernel, peers, self._served)
        logits_rows_R = torch.arange(num_rows, device=self._device)

        def layers() -> torch.Tensor | None:
            if feeds is not None and not num_rows and self._model.fused is not None:
                self._model.fused.help(attention.serve)
                return None
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

        def forward() -> torch.Tensor | None:
            self._model.context.sharing = feeds
            try:
                return layers()
            finally:
                self._model.context.sharing = None

        with torch.inference_mode():
            _fill_tables(kind, tables, attention, _made_up(0, len(self._shape.sights)))
            forward()  # what is compiled or allocated once must not happen in the capture
            graph, out_R = self._record(forward)
        self._graphs[kind] = _Graph(kind, tables, attention, graph, logits_rows_R, out_R)

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


def bucket(num_rows: int) -> int:
    """Rows of the smallest captured step that has so many."""
    return next(rows for rows in (0, *BUCKETS) if rows >= num_rows)


def _made_up(num_rows: int, groups: int) -> StepPlan:
    """A step of so many rows that see nothing and write nothing."""
    layout = structs.replace(_NOTHING.layout, num_rows=num_rows)
    return replace(
        _NOTHING,
        token_ids_T=[0] * num_rows,
        positions_T=[0] * num_rows,
        slots_T=[-1] * num_rows,
        layout=layout,
        other_layouts=[layout] * (groups - 1),
    )


def _fill_tables(kind: _Kind, tables: FixedTables, attention: DecodeStep, plan: StepPlan) -> None:
    """Write all tables of the step and send them; rows beyond its own are padding, and where it isn't split, all that are."""
    padding = [0] * (attention.num_rows - len(plan.token_ids_T))
    sources = array("i", [-1] * attention.num_rows)
    for row, sample in plan.pending:
        sources[row] = sample
    tables.begin()
    tables.write("token_ids", array("i", plan.token_ids_T + padding))
    tables.write("positions", array("i", plan.positions_T + padding))
    tables.write("sources", sources)
    if kind.num_shared:
        shares = plan.shares or FeedShares(0, ((0, 0),))
        tables.write("homes", array("i", shares.homes(kind.num_shared)))
        tables.write("own rows", array("i", shares.own_rows(kind.num_shared)))
    attention.plan(plan.layouts, plan.slots)
    tables.upload()
