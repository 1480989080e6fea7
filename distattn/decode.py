"""Distributed attention of a decode step at fixed addresses: what a CUDA graph captures once and replays.

The same step as `distattn.attention`, for rows that are all spans of their own: every table has its place and its room, and
what is launched depends on nothing but the room. Rows travel by `distattn.peers`, one-sided, inside the graph:

    rotate and store    push queries    attend to own shards    wait for queries    attend for others
    push their states   wait for states    merge

Layers of different groups (`distattn.layout.Sight`) have tables of their own for what differs: what is read, and what travels.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from distattn.layout import Layout, Reading
from distattn.peers import PeerMemory
from distattn.shape import AttentionShape, PackedRows, attention_sizes
from kernels import triton_ops
from kernels.decode_attention import DecodeAttention, DecodeTables, RowReading, Written
from kernels.decode_bytes import BytesDecode
from kernels.kv_blocks import store_kv
from kernels.latent_attention import LatentDecode
from kernels.merge_state import apply_sinks
from kernels.peer_rows import push_rows, wait_rows
from kernels.upload import FixedTables
from kvstore.sight import FULL
from kvstore.storage import KVStorage

_PIECES = 8
"""Of rows that share what they begin with, for which there is room in any case: two entries each."""


def decode_kernel(storage: KVStorage, shape: AttentionShape, processors: int | None = None) -> DecodeAttention:
    """The kernel that all `DecodeStep`s of a stream share. `processors`: of the stream, if not all of the device's."""
    of_heads = BytesDecode if storage.format.has_scales else DecodeAttention
    of_shape = LatentDecode if shape.value_dim else of_heads
    sizes = attention_sizes(shape, storage.block_size, storage.data_L2BPKD.device, storage.format.dtype)
    return of_shape(sizes, processors=processors)


@dataclass(frozen=True, slots=True)
class Served:
    """States of the rows that peers push, before they go back."""

    out_MHD: torch.Tensor
    lse_MH: torch.Tensor

    @staticmethod
    def of(peers: PeerMemory) -> "Served":
        return Served(torch.zeros_like(peers.outs_MHD), torch.zeros_like(peers.lses_MH))


@dataclass(frozen=True, slots=True)
class _Group:
    """The tables of one group of layers, on the device."""

    own: DecodeTables
    others: DecodeTables | None


class DecodeStep:
    """Attention of up to `num_rows` own rows, of what their party holds of them, and of the party's rows that are served here.

    T own rows, S sends, M rows that peers may push.
    """

    def __init__(
        self,
        storage: KVStorage,
        shape: AttentionShape,
        tables: FixedTables,
        num_rows: int,
        kernel: DecodeAttention,
        peers: PeerMemory | None = None,
        served: "Served | None" = None,
    ) -> None:
        """`tables` has those of `table_sizes`; `kernel` and `served` may be of many of these, one after the other on a stream.

        Without `peers` the step is one that no other instance has a part in.
        """
        device = storage.data_L2BPKD.device
        self.num_rows = num_rows
        self._shape = shape
        self._storage = storage
        self._tables = tables
        self._kernel = kernel
        self._peers = peers
        self._layers = [(shape.layer(i).scoring, shape.group(i)) for i in range(storage.num_layers)]
        self._groups = [
            _Group(
                DecodeTables(tables[_of("own", group)], tables["blocks"], sight != FULL),
                None
                if peers is None
                else DecodeTables(tables[_of("others", group)], tables["blocks"], sight != FULL, mostly_empty=True),
            )
            for group, sight in enumerate(shape.sights)
        ]
        self._out_THD = torch.zeros((num_rows, shape.num_heads, shape.out_dim), dtype=shape.dtype, device=device)
        self._lse_TH = torch.zeros((num_rows, shape.num_heads), dtype=torch.float32, device=device)
        if peers is not None:
            served = served or Served.of(peers)
            self._served_MHD, self._served_MH = served.out_MHD, served.lse_MH

    @staticmethod
    def table_sizes(storage: KVStorage, shape: AttentionShape, num_rows: int, peers: PeerMemory | None) -> dict[str, int]:
        """Of the tables that `plan` writes; blocks last, because a step rarely fills them."""
        sizes = {_of("slots", table): num_rows for table in range(1 + len(shape.windows))}
        blocks = 0
        for group, sight in enumerate(shape.sights):
            its = {"own": 4 * (num_rows + 1)}
            most_sent = most_served = 0
            if peers is not None:
                most_sent, most_served = num_rows * (peers.size - 1), peers.queries_MHD.shape[0]
                its |= {
                    "sends": 1 + 3 * most_sent,
                    "expected_states": peers.size,
                    "part_offsets": num_rows + 1,
                    "part_index": most_sent,
                    "others": 4 * (most_served + 1),
                    "returns": 1 + 3 * most_served,
                    "expected_queries": peers.size,
                }
            sizes |= {_of(name, group): size for name, size in its.items()}
            # a run among several has two more entries than blocks; where there are starts every run has one, of empty rows too
            all_rows = num_rows + most_served
            if sight == FULL:  # with no more than twice the pool, each for itself, or the pool and a few pieces of each row
                blocks += 3 * storage.num_blocks + _PIECES * 2 * all_rows
            else:  # rows that share a prefix list what they see of it each for itself
                seen = sight.span // storage.block_size + 2
                # tables of their own have no more than the pool together
                apart = bool(shape.windows) and group > 1
                blocks += (0 if apart else 4 * storage.num_blocks) + all_rows * (1 + min(seen, storage.num_blocks))
        return sizes | {"blocks": blocks}

    def plan(self, layouts: Sequence[Layout], slots: Sequence[list[int]]) -> None:
        """Write the tables of a step: a layout for each group of `shape.sights`. `slots[g][i]`: where own row i's K and V go in
        the layers of a group, or in all if there is but one list.

        Raises ValueError for a step with spans of several rows, or with more rows than there is room for.
        """
        if any(r.num_rows != 1 for layout in layouts for r in (*layout.own, *layout.others)):
            raise ValueError("a decode step has single rows only")
        write, kernel = self._tables.write, self._kernel
        for table in range(1 + len(self._shape.windows)):
            its = slots[table if len(slots) > 1 else 0]
            write(_of("slots", table), array("i", its + [-1] * (self.num_rows - len(its))))
        blocks = array("i")
        for group, (layout, tables) in enumerate(zip(layouts, self._groups, strict=True)):
            windowed = tables.own.windowed
            written: Written | None = None
            if not windowed and sum(len(r.block_ids) for r in (*layout.own, *layout.others)) > 2 * self._storage.num_blocks:
                written = {}  # rows share so much that there is no room for all of them apart; to look for it takes time
            rows, more = kernel.tables(
                _all_rows(layout.own, self.num_rows),
                self.num_rows,
                first_block=len(blocks),
                windowed=windowed,
                written=written,
            )
            write(_of("own", group), rows)
            blocks += more
            if self._peers is not None:
                self._plan_sends(self._peers, layout, group)
                served, more = kernel.tables(
                    _served(self._peers, layout),
                    len(self._served_MH),
                    first_block=len(blocks),
                    windowed=windowed,
                    written=written,
                )
                write(_of("others", group), served)
                blocks += more
        write("blocks", blocks)

    def run(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `DistAttention.run`."""
        if self._peers is not None:
            q_THD = q_THD.contiguous()  # as rows are pushed
        store_kv(
            k_TKD,
            None if self._shape.value_dim else v_TKD,
            self._storage.layer(layer),
            self._slots(layer),
            scales_2BKX=self._storage.scales(layer),
            backend="triton",
        )
        return self._attend(layer, q_THD, sinks_H)

    def run_packed(self, layer: int, rows: PackedRows) -> torch.Tensor:
        """As `DistAttention.run_packed`."""
        return self._attend(layer, self._rotate_and_store(layer, rows), rows.sinks_H)

    def store_packed(self, layer: int, rows: PackedRows) -> None:
        """As `DistAttention.store_packed`."""
        self._rotate_and_store(layer, rows)

    def _rotate_and_store(self, layer: int, rows: PackedRows) -> torch.Tensor:
        kv_2BPKD, scales_2BKX = self._storage.layer(layer), self._storage.scales(layer)
        return rows.rotate_and_store(self._shape.num_heads, kv_2BPKD, self._slots(layer), "triton", scales_2BKX)

    def _slots(self, layer: int) -> torch.Tensor:
        return self._tables[_of("slots", self._shape.table(self._layers[layer][1]))]

    def serve(self, layer: int) -> None:
        """Attend for others, with no rows of our own."""
        if self._peers is not None:
            self._serve(self._peers, layer)

    def _attend(self, layer: int, q_THD: torch.Tensor, sinks_H: torch.Tensor | None = None) -> torch.Tensor:
        tables, peers = self._tables, self._peers
        group = self._layers[layer][1]
        own = self._groups[group].own
        if peers is None:
            self._attend_local(layer, q_THD, own, self._out_THD, self._lse_TH, sinks_H)
            return self._out_THD
        push_rows(q_THD, None, tables[_of("sends", group)], peers.query_inbox)
        self._attend_local(layer, q_THD, own, self._out_THD, self._lse_TH)
        self._serve(peers, layer)
        wait_rows(peers.state_signals_N, tables[_of("expected_states", group)], peers.abort_1)
        triton_ops.merge_states(
            self._out_THD,
            self._lse_TH,
            peers.outs_MHD,
            peers.lses_MH,
            tables[_of("part_offsets", group)],
            tables[_of("part_index", group)],
        )
        if sinks_H is not None:
            apply_sinks(self._out_THD, self._lse_TH, sinks_H, backend="triton")
        return self._out_THD

    def _serve(self, peers: PeerMemory, layer: int) -> None:
        group = self._layers[layer][1]
        others = self._groups[group].others
        if others is None:
            raise RuntimeError("a step without peers serves nobody")
        wait_rows(peers.query_signals_N, self._tables[_of("expected_queries", group)], peers.abort_1)
        self._attend_local(layer, peers.queries_MHD, others, self._served_MHD, self._served_MH)
        push_rows(self._served_MHD, self._served_MH, self._tables[_of("returns", group)], peers.state_inbox)

    def _attend_local(
        self,
        layer: int,
        q_THD: torch.Tensor,
        tables: DecodeTables,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
    ) -> None:
        """Partial states of what lies here; with sinks, which whole rows have, their attention."""
        self._kernel.run(
            q_THD,
            self._storage.layer(layer),
            self._layers[layer][0],
            tables,
            out_THD=out_THD,
            lse_TH=lse_TH,
            scales_2BKX=self._storage.scales(layer),
            sinks_H=sinks_H,
        )

    def _plan_sends(self, peers: PeerMemory, layout: Layout, group: int) -> None:
        """Which query goes where and which place its state comes back to; where the states of served rows go."""
        sends: list[tuple[int, int, int]] = []
        parts: list[list[int]] = [[] for _ in range(self.num_rows)]
        rows = iter(layout.dispatched_rows)
        for peer, count in layout.dispatched.items():
            for index in range(count):
                row = next(rows)
                sends.append((row, peer, index))
                parts[row].append(peers.place(peer, index))
        returns = [(peers.place(peer, index), peer, index) for peer, count in layout.received.items() for index in range(count)]
        for name, values in {
            "sends": _columns(sends, self.num_rows * (peers.size - 1)),
            "returns": _columns(returns, len(self._served_MH)),
            "expected_states": array("i", [layout.dispatched.get(peer, 0) for peer in range(peers.size)]),
            "expected_queries": array("i", [layout.received.get(peer, 0) for peer in range(peers.size)]),
            "part_offsets": array("i", [0, *accumulate(len(p) for p in parts)]),
            "part_index": array("i", [part for row in parts for part in row]),
        }.items():
            self._tables.write(_of(name, group), values)


def _of(table: str, group: int) -> str:
    """The name of a group's table."""
    return f"{table} {group}"


def _all_rows(readings: list[Reading], num_rows: int) -> list[RowReading]:
    """Readings of each row: those that see nothing here, and those that pad the step, too."""
    rows: list[list[RowReading]] = [[] for _ in range(num_rows)]
    for r in readings:
        rows[r.first_row].append(RowReading(r.first_row, r.block_ids, r.kv_lens[0], *r.starts))
    return [reading for row, its in enumerate(rows) for reading in its or (RowReading(row, (), 0),)]


def _served(peers: PeerMemory, layout: Layout) -> list[RowReading]:
    """What the rows that peers push read here."""
    places = [peers.place(peer, index) for peer, count in layout.received.items() for index in range(count)]
    return [RowReading(places[r.first_row], r.block_ids, r.kv_lens[0], *r.starts) for r in layout.others]


def _columns(triples: list[tuple[int, int, int]], most: int) -> "array[int]":
    """The count, then each column with room for `most`."""
    table = array("i", [len(triples)])
    for column in range(3):
        table.extend([triple[column] for triple in triples] + [0] * (most - len(triples)))
    return table
