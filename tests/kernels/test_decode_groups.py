"""Decode steps at fixed addresses whose rows travel, in layers of several groups: two "instances" in one process.

The peers' memory is this process's. One has all rows, the other serves them: at the moment at which the first would wait for
their states.
"""

from typing import Any

import pytest
import torch

from distattn import decode
from distattn.decode import DecodeStep, decode_kernel
from distattn.layout import HeldRun, Holding, Span, lay_out
from distattn.peers import PeerMemory
from distattn.shape import AttentionShape, LayerView
from kernels.peer_rows import Inbox
from kernels.reference import attention_state, compare
from kernels.segments import Scoring
from kernels.upload import FixedTables
from kvstore.format import KVFormat
from kvstore.shard import ShardTable
from kvstore.sight import FULL, Sight
from kvstore.storage import KVStorage
from tests.kernels.test_paged_attention import DEVICE

ROOM, BLOCK = 4, 4
SIGHTS = (Sight(window=4), FULL, Sight(chunk=16), Sight(window=20))
SHAPE = AttentionShape(
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    scale=0.3,
    dtype=torch.float32,
    layers=tuple(LayerView(Scoring(0.3, 2.0 * (i % 2)), sight) for i, sight in enumerate(SIGHTS)),
)
PARTS = [  # (seq, rank, start, stop), in the order in which they were written
    (0, 1, 0, 50),
    (0, 0, 50, 60),
    (1, 0, 0, 9),
    (1, 1, 9, 30),
    (1, 0, 30, 34),
    (2, 0, 0, 17),
]
SPANS = [Span(0, 0, 59, 60), Span(1, 0, 33, 34), Span(2, 0, 16, 17)]


class Memory(PeerMemory):
    """Of one of two, without another process."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size, self.rows = rank, 2, ROOM
        rows = (ROOM, SHAPE.num_heads)
        self.queries_MHD = torch.zeros((*rows, SHAPE.head_dim), device=DEVICE)
        self.outs_MHD, self.lses_MH = torch.zeros_like(self.queries_MHD), torch.zeros(rows, device=DEVICE)
        self.query_signals_N, self.state_signals_N = torch.zeros((2, 2), dtype=torch.int32, device=DEVICE)
        self.abort_1 = torch.zeros(1, dtype=torch.int32, pin_memory=DEVICE.type == "cuda")

    def meet(self, other: "Memory") -> None:
        def inbox(rows: str, lses: str | None, signals: str) -> Any:
            table = [[0, 0], [0, 0], [0, 0]]
            table[0][other.rank] = getattr(other, rows).data_ptr()
            table[1][other.rank] = getattr(other, lses).data_ptr() if lses else 0
            table[2][other.rank] = getattr(other, signals).data_ptr() + 4 * self.rank
            return Inbox(torch.tensor(table, device=DEVICE))

        self.query_inbox = inbox("queries_MHD", None, "query_signals_N")
        self.state_inbox = inbox("outs_MHD", "lses_MH", "state_signals_N")


def test_rows_see_what_is_theirs_in_each_group_wherever_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(4)
    ends = {seq: stop for seq, _, _, stop in PARTS}
    kv = {seq: torch.randn((2, end, 2, 16), generator=random) for seq, end in ends.items()}
    shards = [ShardTable(60, BLOCK) for _ in range(2)]
    storages = []
    for rank in range(2):
        storage = KVStorage(
            num_layers=len(SIGHTS),
            num_blocks=60,
            block_size=BLOCK,
            num_kv_heads=2,
            head_dim=16,
            format=KVFormat(torch.float32),
            device=DEVICE,
        )
        storage.data_L2BPKD.fill_(torch.nan)
        for seq, _, start, stop in [part for part in PARTS if part[1] == rank]:
            shards[rank].reserve(seq, 15)
            slots = torch.tensor(shards[rank].append(seq, start, stop))
            storage.data_L2BPKD[:, :, slots // BLOCK, slots % BLOCK] = kv[seq][:, start:stop].to(DEVICE)
        storages.append(storage)
    holdings = {
        seq: [
            Holding(rank, [HeldRun(run.start, run.end, run.num_tokens) for run in shards[rank][seq].runs])
            for rank in range(2)
            if seq in shards[rank]
        ]
        for seq in ends
    }
    layouts = [[lay_out(SPANS, holdings, shards[rank], rank, sight) for sight in SHAPE.sights] for rank in range(2)]
    assert [layout.dispatched for layout in layouts[0]] == [{1: 2}, {}, {1: 1}, {1: 2}]
    memories = [Memory(rank) for rank in range(2)]
    memories[0].meet(memories[1])
    memories[1].meet(memories[0])
    steps = []
    for rank, num_rows in enumerate((len(SPANS), 0)):
        tables = FixedTables(DecodeStep.table_sizes(storages[rank], SHAPE, num_rows, memories[rank]), DEVICE)
        step = DecodeStep(storages[rank], SHAPE, tables, num_rows, decode_kernel(storages[rank], SHAPE), memories[rank])
        tables.begin()
        step.plan(layouts[rank], [[-1] * num_rows])
        tables.upload()
        steps.append(step)

    wait_rows = decode.wait_rows

    def served_first(signals_N: torch.Tensor, expected_N: torch.Tensor, abort_1: torch.Tensor) -> None:
        if signals_N is memories[0].state_signals_N:
            steps[1].serve(layer)
        assert torch.equal(signals_N, expected_N)
        wait_rows(signals_N, expected_N, abort_1)

    monkeypatch.setattr(decode, "wait_rows", served_first)
    for _ in range(2):  # signals are as before
        for layer, view in enumerate(SHAPE.layers):
            q_THD = torch.randn((len(SPANS), 4, 16), generator=random)
            got = steps[0]._attend(layer, q_THD.to(DEVICE)).clone()
            for row, span in enumerate(SPANS):
                seen = slice(view.sight.first(span.start), span.stop)
                k_SKD, v_SKD = kv[span.seq].double()[:, seen]
                want, _ = attention_state(
                    q_THD[row : row + 1].double(), k_SKD, v_SKD, view.scoring.scale, soft_cap=view.scoring.soft_cap
                )
                compare(got[row : row + 1], want, rms=1e-6, max=2e-5)
