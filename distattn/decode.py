"""Distributed attention of a decode step at fixed addresses: what a CUDA graph captures once and replays.

The same step as `distattn.attention`, for rows that are all spans of their own: every table has its place and its room, and
what is launched depends on nothing but the room. Rows travel by `distattn.peers`, one-sided, inside the graph:

    rotate and store    push queries    attend to own shards    wait for queries    attend for others
    push their states   wait for states    merge
"""

from array import array
from itertools import accumulate

import torch

from distattn.layout import Layout, Reading
from distattn.peers import PeerMemory
from distattn.shape import AttentionShape, PackedRows, attention_sizes
from kernels import triton_ops
from kernels.decode_attention import DecodeAttention, DecodeTables, RowReading
from kernels.peer_rows import push_rows, wait_rows
from kernels.upload import FixedTables
from kvstore.storage import KVStorage


def decode_kernel(storage: KVStorage, shape: AttentionShape, processors: int | None = None) -> DecodeAttention:
    """The kernel that all `DecodeStep`s of a stream share. `processors`: of the stream, if not all of the device's."""
    return DecodeAttention(attention_sizes(shape, storage.block_size, storage.data_L2BPKD.device), processors=processors)


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
    ) -> None:
        """`tables` has those of `table_sizes`; `kernel` may serve many of these, one after the other on one stream.

        Without `peers` the step is one that no other instance has a part in.
        """
        device = storage.data_L2BPKD.device
        self.num_rows = num_rows
        self._shape = shape
        self._storage = storage
        self._tables = tables
        self._kernel = kernel
        self._peers = peers
        self._own = DecodeTables(tables["own"], tables["blocks"])
        self._out_THD = torch.zeros((num_rows, shape.num_heads, shape.head_dim), dtype=shape.dtype, device=device)
        self._lse_TH = torch.zeros((num_rows, shape.num_heads), dtype=torch.float32, device=device)
        if peers is not None:
            self._others = DecodeTables(tables["others"], tables["blocks"])
            self._served_MHD = torch.zeros_like(peers.queries_MHD)
            self._served_MH = torch.zeros_like(peers.lses_MH)

    @staticmethod
    def table_sizes(storage: KVStorage, num_rows: int, peers: PeerMemory | None) -> dict[str, int]:
        """Of the tables that `plan` writes; blocks last, because a step rarely fills them."""
        sizes = {"slots": num_rows, "own": 4 * (num_rows + 1)}
        if peers is not None:
            most_sent, most_served = num_rows * (peers.size - 1), peers.queries_MHD.shape[0]
            sizes |= {
                "sends": 1 + 3 * most_sent,
                "expected_states": peers.size,
                "part_offsets": num_rows + 1,
                "part_index": most_sent,
                "others": 4 * (most_served + 1),
                "returns": 1 + 3 * most_served,
                "expected_queries": peers.size,
            }
        return sizes | {"blocks": 3 * storage.num_blocks}  # a run among several has two more entries than blocks

    def plan(self, layout: Layout, slots: list[int]) -> None:
        """Write the tables of a step; `slots[i]`: where own row i's K and V go.

        Raises ValueError for a step with spans of several rows, or with more rows than there is room for.
        """
        if any(r.num_rows != 1 for r in (*layout.own, *layout.others)):
            raise ValueError("a decode step has single rows only")
        write, kernel = self._tables.write, self._kernel
        write("slots", array("i", slots + [-1] * (self.num_rows - len(slots))))
        rows, blocks = kernel.tables(_all_rows(layout.own, self.num_rows), self.num_rows)
        write("own", rows)
        if self._peers is not None:
            self._plan_sends(self._peers, layout)
            served, served_blocks = kernel.tables(_served(self._peers, layout), len(self._served_MH), first_block=len(blocks))
            write("others", served)
            blocks += served_blocks
        write("blocks", blocks)

    def run_packed(self, layer: int, rows: PackedRows) -> torch.Tensor:
        """As `DistAttention.run_packed`."""
        kv_2BPKD = self._storage.layer(layer)
        return self._attend(rows.rotate_and_store(self._shape.num_heads, kv_2BPKD, self._tables["slots"], "triton"), kv_2BPKD)

    def store_packed(self, layer: int, rows: PackedRows) -> None:
        """As `DistAttention.store_packed`."""
        rows.rotate_and_store(self._shape.num_heads, self._storage.layer(layer), self._tables["slots"], "triton")

    def serve(self, layer: int) -> None:
        """Attend for others, with no rows of our own."""
        if self._peers is not None:
            self._serve(self._peers, self._storage.layer(layer))

    def _attend(self, q_THD: torch.Tensor, kv_2BPKD: torch.Tensor) -> torch.Tensor:
        tables, peers = self._tables, self._peers
        if peers is not None:
            push_rows(q_THD, None, tables["sends"], peers.query_inbox)
        self._kernel.run(q_THD, kv_2BPKD, self._shape.scale, self._own, out_THD=self._out_THD, lse_TH=self._lse_TH)
        if peers is not None:
            self._serve(peers, kv_2BPKD)
            wait_rows(peers.state_signals_N, tables["expected_states"], peers.abort_1)
            triton_ops.merge_states(
                self._out_THD, self._lse_TH, peers.outs_MHD, peers.lses_MH, tables["part_offsets"], tables["part_index"]
            )
        return self._out_THD

    def _serve(self, peers: PeerMemory, kv_2BPKD: torch.Tensor) -> None:
        wait_rows(peers.query_signals_N, self._tables["expected_queries"], peers.abort_1)
        self._kernel.run(
            peers.queries_MHD, kv_2BPKD, self._shape.scale, self._others, out_THD=self._served_MHD, lse_TH=self._served_MH
        )
        push_rows(self._served_MHD, self._served_MH, self._tables["returns"], peers.state_inbox)

    def _plan_sends(self, peers: PeerMemory, layout: Layout) -> None:
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
        write = self._tables.write
        write("sends", _columns(sends, self.num_rows * (peers.size - 1)))
        write("returns", _columns(returns, len(self._served_MH)))
        write("expected_states", array("i", [layout.dispatched.get(peer, 0) for peer in range(peers.size)]))
        write("expected_queries", array("i", [layout.received.get(peer, 0) for peer in range(peers.size)]))
        write("part_offsets", array("i", [0, *accumulate(len(p) for p in parts)]))
        write("part_index", array("i", [part for row in parts for part in row]))


def _all_rows(readings: list[Reading], num_rows: int) -> list[RowReading]:
    """Readings of each row: those that see nothing here, and those that pad the step, too."""
    rows: list[list[RowReading]] = [[] for _ in range(num_rows)]
    for r in readings:
        rows[r.first_row].append(RowReading(r.first_row, r.block_ids, r.kv_lens[0]))
    return [reading for row, its in enumerate(rows) for reading in its or (RowReading(row, (), 0),)]


def _served(peers: PeerMemory, layout: Layout) -> list[RowReading]:
    """What the rows that peers push read here."""
    places = [peers.place(peer, index) for peer, count in layout.received.items() for index in range(count)]
    return [RowReading(places[r.first_row], r.block_ids, r.kv_lens[0]) for r in layout.others]


def _columns(triples: list[tuple[int, int, int]], most: int) -> "array[int]":
    """The count, then each column with room for `most`."""
    table = array("i", [len(triples)])
    for column in range(3):
        table.extend([triple[column] for triple in triples] + [0] * (most - len(triples)))
    return table
