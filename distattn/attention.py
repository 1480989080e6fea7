"""Distributed attention: plan per step, run per layer.

    store   this step's K and V go to local blocks, before any row of the step is attended
    dispatch query rows go to the other holders of their sequences ...
    attend  ... while own rows attend to local blocks; then the rows that came in do
    combine their partial states go back
    merge   by log-sum-exp: out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i)
    sinks   once, of what is merged: out = out sigmoid(lse - sink)

Layers fall into groups by what their rows see (`distattn.layout.Sight`); a step has a plan for each, and all use the same
buffers, one layer after the other.

Source: DistAttention (Infinite-LLM, section 4); the merge of partial softmaxes is FlashAttention's (section 3.1).
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from distattn.exchange import Exchange, Transfer
from distattn.layout import Layout, Reading
from distattn.shape import AttentionShape, PackedRows, attention_sizes
from kernels.kv_blocks import store_kv
from kernels.merge_state import MergePlan, apply_sinks, merge_states
from kernels.paged_attention import attention_scratch_bytes, plan_attention
from kernels.paged_attention_tiles import ROW_TILES, TOKEN_TILES, TiledAttention, uses_tiles
from kernels.paged_attention_tiles import scratch_bytes as tiles_scratch_bytes
from kernels.segments import PagedAttention, Segment
from kernels.upload import upload
from kvstore.storage import KVStorage

LAYERS_AHEAD = 4
"""That the host may queue before a GPU has run the first of them. A thread whose launches fill the driver's queue (1,024)
waits in the driver, and what other threads ask of the GPU waits with it: one in ten decode steps was held up for 12 to 26 ms,
P99 of decodes beside a prompt 42 ms; so it is 36 (one H200)."""


@dataclass(slots=True)
class LayerTimes:
    """Nanoseconds that layers have taken on the CPU. 0 on a GPU, where the host only queues them."""

    attention_ns: int = 0
    """Attention, less waiting."""
    exchange_ns: int = 0
    """Waiting for rows of other instances."""


@dataclass(frozen=True, slots=True)
class _Buffers:
    """That all layers of a step use in turn. S dispatched rows, M received rows, of the group that has most."""

    out_THD: torch.Tensor
    lse_TH: torch.Tensor
    send_q_SHD: torch.Tensor
    part_out_SHD: torch.Tensor
    part_lse_SH: torch.Tensor
    recv_q_MHD: torch.Tensor
    recv_out_MHD: torch.Tensor
    recv_lse_MH: torch.Tensor

    def of(self, layout: Layout) -> "_Buffers":
        """The parts that a group's rows take."""
        sent, received = len(layout.dispatched_rows), layout.num_received
        return _Buffers(
            self.out_THD,
            self.lse_TH,
            self.send_q_SHD[:sent],
            self.part_out_SHD[:sent],
            self.part_lse_SH[:sent],
            self.recv_q_MHD[:received],
            self.recv_out_MHD[:received],
            self.recv_lse_MH[:received],
        )


@dataclass(frozen=True, slots=True)
class _GroupPlan:
    """One step on this instance in the layers of one group. S dispatched rows."""

    layout: Layout
    slots_T: torch.Tensor
    own: PagedAttention
    send_rows_S: torch.Tensor
    merge: MergePlan
    others: PagedAttention
    buffers: _Buffers


@dataclass(frozen=True, slots=True)
class _Plan:
    """One step on this instance."""

    num_rows: int
    groups: list[_GroupPlan]


class DistAttention:
    """Attention of one instance over its own storage and, through `exchange`, that of its party."""

    def __init__(self, storage: KVStorage, shape: AttentionShape, exchange: Exchange, *, backend: str) -> None:
        """`backend`: "torch" or "triton", of the kernels. Raises ValueError for a shape it doesn't support."""
        self.shape = shape
        self._storage = storage
        self._exchange = exchange
        self.backend = backend
        self._device = storage.data_L2BPKD.device
        self._clock_ns = time.perf_counter_ns if self._device.type == "cpu" else _no_clock
        self._times = LayerTimes()
        self._layers = [(shape.layer(i).scoring, shape.group(i)) for i in range(storage.num_layers)]
        self._plan: _Plan | None = None
        self._tiles: TiledAttention | None = None
        self._queued: deque[torch.cuda.Event] = deque()
        """One for each layer that may not have run yet, on a GPU."""
        self._attend([], 0, 0)

    @staticmethod
    def scratch_bytes(
        shape: AttentionShape,
        max_rows: int,
        num_peers: int,
        device: torch.device,
        backend: str,
        *,
        tiles: bool,
        kv_dtype: torch.dtype | None = None,
    ) -> int:
        """Most bytes that a step's buffers take: `max_rows` own rows, all dispatched to every peer, and as many from each.

        `tiles`: whether `use_tiles` is called. `kv_dtype`: of KV as it is stored, if not the shape's.
        """
        heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        kernels = sum(
            attention_scratch_bytes(rows, *heads, device, backend, shape.value_dim, kv_dtype)
            for rows in (max_rows, num_peers * max_rows)
        )
        if backend == "triton":  # whose plans have theirs for as long as the step runs
            kernels *= len(shape.sights)
        if tiles and backend == "triton" and _may_use_tiles(shape):
            kernels += tiles_scratch_bytes(attention_sizes(shape, 1, device), max(1, num_peers) * max_rows)
        state = shape.state_bytes
        return max_rows * (state + 2 * num_peers * (state + shape.query_bytes)) + kernels

    def use_tiles(self, max_rows: int) -> None:
        """Give spans of many rows to the library's dense kernel, where it takes this shape, and build all that needs.

        Takes seconds. To be called in the thread that runs the steps; `max_rows`: of a chunk.
        """
        shape = self.shape
        row_tiles = [rows for rows in ROW_TILES if rows <= max_rows]
        if not row_tiles or not _may_use_tiles(shape):
            return
        if TOKEN_TILES[-1] % self._storage.block_size:
            return  # a tile must begin where a block does
        sizes = attention_sizes(shape, self._storage.block_size, self._device, self._storage.format.dtype)
        self._tiles = TiledAttention(sizes, backend=self.backend, row_tiles=row_tiles)
        self._tiles.warm_up(self._storage.layer(0), self._storage.scales(0))

    def plan(self, layouts: Sequence[Layout], slots: Sequence[list[int]]) -> None:
        """Prepare all layers of a step: a layout for each group of `shape.sights`. `slots[g][i]`: where own row i's K and V go
        in the layers of a group, or in all if there is but one list."""
        if len(slots) not in (1, len(layouts)):
            raise ValueError(f"{len(slots)} lists of slots for {len(layouts)} groups of layers: one, or one for each")
        if len(layouts) != len(self.shape.sights) or len({layout.num_rows for layout in layouts}) != 1:
            rows = [layout.num_rows for layout in layouts]
            raise ValueError(
                f"layouts of {rows} rows for {len(self.shape.sights)} groups of layers: one each, of the same rows"
            )
        heads, device = self.shape.num_heads, self._device

        def queries_of(count: int) -> torch.Tensor:
            return torch.empty((count, heads, self.shape.head_dim), dtype=self.shape.dtype, device=device)

        def outs_of(count: int) -> torch.Tensor:
            return torch.empty((count, heads, self.shape.out_dim), dtype=self.shape.dtype, device=device)

        def lses_of(count: int) -> torch.Tensor:
            return torch.empty((count, heads), dtype=torch.float32, device=device)

        num_rows = layouts[0].num_rows
        num_sent = max(len(layout.dispatched_rows) for layout in layouts)
        num_received = max(layout.num_received for layout in layouts)
        buffers = _Buffers(
            out_THD=outs_of(num_rows),
            lse_TH=lses_of(num_rows),
            send_q_SHD=queries_of(num_sent),
            part_out_SHD=outs_of(num_sent),
            part_lse_SH=lses_of(num_sent),
            recv_q_MHD=queries_of(num_received),
            recv_out_MHD=outs_of(num_received),
            recv_lse_MH=lses_of(num_received),
        )
        slots_T = [upload(its, device) for its in slots]
        groups = [
            _GroupPlan(
                layout=layout,
                slots_T=slots_T[group if len(slots) > 1 else 0],
                own=self._attend(layout.own, num_rows, group),
                send_rows_S=upload(layout.dispatched_rows, device),
                merge=MergePlan.build(layout.dispatched_rows, num_rows, device=device),
                others=self._attend(layout.others, layout.num_received, group),
                buffers=buffers.of(layout),
            )
            for group, layout in enumerate(layouts)
        ]
        self._plan = _Plan(num_rows, groups)

    def run(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention output `[T, H, D]` of the planned step's own rows in one layer; serves the party's rows meanwhile.

        Where KV is latent `k_TKD` has one KV head and all that there is of a token: `v_TKD`, its beginning, isn't looked at.
        `sinks_H`: one more logit for each head, that stands for no value. The result is a buffer that the next layer writes.
        Raises RuntimeError if no step was planned or the rows are not those of the plan.
        """
        group = self._planned(layer, q_THD.shape[0])
        with self._attending():
            store_kv(
                k_TKD,
                None if self.shape.value_dim else v_TKD,
                self._storage.layer(layer),
                group.slots_T,
                scales_2BKX=self._storage.scales(layer),
                backend=self.backend,
            )
            return self._attend_rows(group, layer, q_THD, sinks_H)

    def run_packed(self, layer: int, rows: PackedRows) -> torch.Tensor:
        """As `run`, of rows that come packed."""
        group = self._planned(layer, rows.qkv_TE.shape[0])
        with self._attending():
            q_THD = self._rotate_and_store(group, layer, rows)
            return self._attend_rows(group, layer, q_THD, rows.sinks_H)

    def store_packed(self, layer: int, rows: PackedRows) -> None:
        """Keep the rows' keys and values, and attend to nothing: no member of the party may expect more of this layer."""
        group = self._planned(layer, rows.qkv_TE.shape[0])
        with self._attending():
            self._rotate_and_store(group, layer, rows)

    def _rotate_and_store(self, group: _GroupPlan, layer: int, rows: PackedRows) -> torch.Tensor:
        kv_2BPKD, scales_2BKX = self._storage.layer(layer), self._storage.scales(layer)
        return rows.rotate_and_store(self.shape.num_heads, kv_2BPKD, group.slots_T, self.backend, scales_2BKX)

    def _planned(self, layer: int, num_rows: int) -> _GroupPlan:
        """The step's plan for a layer, once the device is near enough."""
        if self._device.type == "cuda":
            done = self._queued.popleft() if len(self._queued) == LAYERS_AHEAD else _new_event()
            done.synchronize()
            done.record(torch.cuda.current_stream(self._device))
            self._queued.append(done)
        plan = self._plan
        if plan is None or num_rows != plan.num_rows:
            planned = "no step" if plan is None else f"{plan.num_rows} rows"
            raise RuntimeError(f"{num_rows} rows came, {planned} was planned")
        return plan.groups[self._layers[layer][1]]

    def _attend_rows(self, group: _GroupPlan, layer: int, q_THD: torch.Tensor, sinks_H: torch.Tensor | None) -> torch.Tensor:
        self._attend_group(group, layer, q_THD)
        to = group.buffers
        if sinks_H is not None:
            apply_sinks(to.out_THD, to.lse_TH, sinks_H, backend=self.backend)
        return to.out_THD

    def _attend_group(self, group: _GroupPlan, layer: int, q_THD: torch.Tensor) -> None:
        """Whole states of the own rows."""
        layout, to = group.layout, group.buffers
        alone = not (layout.dispatched or layout.received)
        if not alone:
            torch.index_select(q_THD, 0, group.send_rows_S, out=to.send_q_SHD)
            dispatch = self._exchange.start([(to.send_q_SHD, layout.dispatched)], [(to.recv_q_MHD, layout.received)])
        self._attend_local(group.own, layer, q_THD, to.out_THD, to.lse_TH)
        if alone:
            return
        self._wait(dispatch)
        self._attend_local(group.others, layer, to.recv_q_MHD, to.recv_out_MHD, to.recv_lse_MH)
        combine = self._exchange.start(
            [(to.recv_out_MHD, layout.received), (to.recv_lse_MH, layout.received)],
            [(to.part_out_SHD, layout.dispatched), (to.part_lse_SH, layout.dispatched)],
        )
        self._wait(combine)
        merge_states(to.out_THD, to.lse_TH, to.part_out_SHD, to.part_lse_SH, group.merge, backend=self.backend)

    def _attend_local(
        self, plan: PagedAttention, layer: int, q_THD: torch.Tensor, out_THD: torch.Tensor, lse_TH: torch.Tensor
    ) -> None:
        """Partial states of what lies here."""
        scoring = self._layers[layer][0]
        plan.run(
            q_THD,
            self._storage.layer(layer),
            scoring.scale,
            out_THD=out_THD,
            lse_TH=lse_TH,
            soft_cap=scoring.soft_cap,
            scales_2BKX=self._storage.scales(layer),
        )

    def take_times(self) -> LayerTimes:
        """What layers have taken since the last call."""
        times, self._times = self._times, LayerTimes()
        return times

    @contextmanager
    def _attending(self) -> Iterator[None]:
        began_ns, waited_ns = self._clock_ns(), self._times.exchange_ns
        yield
        self._times.attention_ns += self._clock_ns() - began_ns - (self._times.exchange_ns - waited_ns)

    def _wait(self, transfer: Transfer) -> None:
        began_ns = self._clock_ns()
        transfer.wait()
        self._times.exchange_ns += self._clock_ns() - began_ns

    def bytes_sent(self, layouts: Sequence[Layout]) -> tuple[int, int]:
        """Bytes of queries and of partial states that this instance sends in a step of these layouts, in all layers."""
        counts = Counter(group for _, group in self._layers)
        sent = sum(count * len(layouts[group].dispatched_rows) for group, count in counts.items())
        returned = sum(count * layouts[group].num_received for group, count in counts.items())
        return self.shape.query_bytes * sent, self.shape.state_bytes * returned

    def _attend(self, readings: list[Reading], num_rows: int, group: int) -> PagedAttention:
        return plan_attention(
            [Segment(r.first_row, r.num_rows, r.block_ids, r.kv_lens, r.starts) for r in readings],
            num_rows,
            block_size=self._storage.block_size,
            num_heads=self.shape.num_heads,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            dtype=self.shape.dtype,
            device=self._device,
            backend=self.backend,
            tiles=None if self.shape.is_capped(group) else self._tiles,
            value_dim=self.shape.value_dim,
            kv_dtype=self._storage.format.dtype,
        )


def _may_use_tiles(shape: AttentionShape) -> bool:
    """Whether the library's dense kernel takes the shape: it knows nothing of latents."""
    return not shape.value_dim and uses_tiles(ROW_TILES[0], TOKEN_TILES[0], shape.dtype, shape.head_dim)


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def _no_clock() -> int:
    return 0
