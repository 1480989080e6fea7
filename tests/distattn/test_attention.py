"""Distributed attention against float64, over random layouts, through real Gloo groups (one thread a rank)."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distattn.attention import DistAttention
from distattn.exchange import Exchange
from distattn.layout import HeldRun, Holding, Layout, Span, lay_out
from distattn.shape import AttentionShape, LayerView
from instance.cell import EpochGroup, open_store
from kernels.paged_attention import attention_scratch_bytes
from kernels.reference import compare
from kernels.segments import Scoring
from kvstore.format import KVFormat
from kvstore.shard import ShardTable
from kvstore.sight import FULL, Sight
from kvstore.storage import KVStorage

SIZE = 3
SHAPE = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.3, dtype=torch.float32)
LATENT = replace(SHAPE, num_kv_heads=1, value_dim=9)
MIXED = (Sight(window=1), FULL, Sight(window=6), Sight(chunk=5), Sight(window=40), FULL)
"""Layers of several groups, in no order."""
CPU = torch.device("cpu")


@dataclass
class Cell:
    groups: list[EpochGroup]
    threads: ThreadPoolExecutor


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    """Three ranks that live in threads, connected by Gloo over loopback."""
    store, address = open_store("127.0.0.1", 20)
    with ThreadPoolExecutor(SIZE) as threads:
        groups = list(
            threads.map(
                lambda rank: EpochGroup(
                    store_address=address, host="127.0.0.1", name="test", rank=rank, size=SIZE, device=CPU, timeout_s=20
                ).meet(),
                range(SIZE),
            )
        )
        yield Cell(groups, threads)
        for group in groups:
            group.close()
    del store


@dataclass
class Sequence:
    """One sequence of a scene: its keys and values, which rank holds each position, and in which order the past came."""

    keys_SKD: torch.Tensor
    values_SKD: torch.Tensor
    owner: list[int]
    past: list[int]
    spans: list[Span]


@st.composite
def scenes(draw: st.DrawFn) -> tuple[int, list[Sequence]]:
    """A block size and sequences: a random past over random ranks, and the step's spans on random ranks. Parts of the past may
    come late, as those that are computed again, or moved, do: then their holders have several runs."""
    seed = draw(st.integers(0, 2**31))
    random = torch.Generator().manual_seed(seed)
    sequences = []
    for seq in range(draw(st.integers(1, 4))):
        owner: list[int] = []
        parts: list[list[int]] = []
        for rank, length in draw(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 9)), max_size=6)):
            parts.append(list(range(len(owner), len(owner) + length)))
            owner += [rank] * length
        late = draw(st.sets(st.integers(0, 5)))
        order = [i for i in range(len(parts)) if i not in late] + draw(st.permutations(sorted(late & set(range(len(parts))))))
        past = [position for i in order for position in parts[i]]
        spans = []
        for rank, length in draw(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 5)), min_size=1, max_size=4)):
            spans.append(Span(seq, rank, len(owner), len(owner) + length))
            owner += [rank] * length
        shape = (len(owner), SHAPE.num_kv_heads, SHAPE.head_dim)
        sequences.append(
            Sequence(torch.randn(shape, generator=random), torch.randn(shape, generator=random), owner, past, spans)
        )
    return draw(st.sampled_from([1, 4, 16])), sequences


def dense(
    q_THD: torch.Tensor, sequence: Sequence, span: Span, sight: Sight = FULL, soft_cap: float = 0.0, sink: float | None = None
) -> torch.Tensor:
    """Causal attention of a span's rows over what they see of the whole sequence, in float64."""
    group = SHAPE.num_heads // sequence.keys_SKD.shape[1]
    k = sequence.keys_SKD.double().repeat_interleave(group, 1)[: span.stop]
    v = sequence.values_SKD.double().repeat_interleave(group, 1)[: span.stop]
    scores = torch.einsum("thd,shd->hts", q_THD.double(), k) * SHAPE.scale
    if soft_cap:
        scores = soft_cap * (scores / soft_cap).tanh()
    place_T, place_S = torch.arange(span.start, span.stop)[:, None], torch.arange(span.stop)
    hidden = place_S > place_T
    if sight.window:
        hidden |= place_S <= place_T - sight.window
    if sight.chunk:
        hidden |= place_S // sight.chunk != place_T // sight.chunk
    scores = scores.masked_fill(hidden, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, torch.full((*scores.shape[:2], 1), sink, dtype=scores.dtype)], -1)
    return torch.einsum("hts,shd->thd", scores.softmax(-1)[..., : span.stop], v)


class Rank:
    """One instance's storage, filled with a scene's past; the rest of it is NaN."""

    def __init__(
        self, rank: int, cell: Cell, block_size: int, sequences: list[Sequence], shape: AttentionShape = SHAPE
    ) -> None:
        self.rank = rank
        num_layers = len(shape.layers) or 1
        self.sequences = sequences
        blocks = sum(-(-len(s.owner) // block_size) + 6 for s in sequences)
        self.shards = ShardTable(blocks, block_size)
        self.storage = KVStorage(
            num_layers=num_layers,
            num_blocks=blocks,
            block_size=block_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            parts=shape.parts,
            format=KVFormat(shape.dtype),
            device=CPU,
        )
        self.storage.data_L2BPKD.fill_(torch.nan)
        self.attention = DistAttention(self.storage, shape, Exchange(cell.groups[rank].group, CPU), backend="torch")
        self.spans = [span for s in sequences for span in s.spans]
        self.slots: list[int] = []
        for seq, sequence in enumerate(sequences):
            mine = sequence.owner.count(rank)
            if not mine:
                continue
            self.shards.reserve(seq, -(-mine // block_size) + 6)
            for position in sequence.past:
                if sequence.owner[position] == rank:
                    (slot,) = self.shards[seq].append(position, position + 1)
                    block, offset = divmod(slot, block_size)
                    for layer in range(num_layers):
                        of_token = (sequence.keys_SKD[position], sequence.values_SKD[position])
                        for part in range(shape.parts):
                            self.storage.layer(layer)[part, block, offset] = of_token[part]
        for span in self.spans:
            if span.rank == rank:
                self.slots += self.shards[span.seq].append(span.start, span.stop)
        self.shards.validate()

    def holdings(self) -> dict[int, Holding]:
        return {
            seq: Holding(self.rank, [HeldRun(run.start, run.end, run.num_tokens) for run in self.shards[seq].runs])
            for seq in range(len(self.sequences))
            if seq in self.shards
        }

    def run(self, layout: Layout, queries: dict[Span, torch.Tensor]) -> torch.Tensor:
        (out,) = self.run_layers([layout], queries, None)
        return out

    def run_layers(
        self, layouts: list[Layout], queries: dict[Span, torch.Tensor], sinks_H: torch.Tensor | None
    ) -> list[torch.Tensor]:
        own = [span for span in self.spans if span.rank == self.rank]
        none = torch.empty((0, self.attention.shape.num_kv_heads, SHAPE.head_dim))
        k = torch.cat([self.sequences[s.seq].keys_SKD[s.start : s.stop] for s in own] or [none])
        v = torch.cat([self.sequences[s.seq].values_SKD[s.start : s.stop] for s in own] or [none])
        q = torch.cat([queries[s] for s in own] or [torch.empty((0, SHAPE.num_heads, SHAPE.head_dim))])
        self.attention.plan(layouts, [self.slots])
        layers = range(self.storage.num_layers)
        return [self.attention.run(layer, q, k, v, sinks_H).clone() for layer in layers]


@settings(max_examples=90, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scenes(), st.booleans())
def test_any_layout_equals_dense_attention(cell: Cell, scene: tuple[int, list[Sequence]], is_latent: bool) -> None:
    """Of keys and values, and of latents, whose beginning is the value: then less returns for a row than it took along."""
    block_size, sequences = scene
    if is_latent:
        sequences = [replace(s, keys_SKD=s.keys_SKD[:, :1], values_SKD=s.keys_SKD[:, :1, :9]) for s in sequences]
    ranks = [Rank(r, cell, block_size, sequences, LATENT if is_latent else SHAPE) for r in range(SIZE)]
    holdings = {
        seq: [held for rank in ranks if (held := rank.holdings().get(seq)) is not None] for seq in range(len(sequences))
    }
    random = torch.Generator().manual_seed(1)
    queries = {
        span: torch.randn((span.stop - span.start, SHAPE.num_heads, SHAPE.head_dim), generator=random) * 3
        for span in ranks[0].spans
    }
    layouts = [lay_out(ranks[0].spans, holdings, rank.shards, rank.rank) for rank in ranks]
    for a in range(SIZE):
        for b in range(SIZE):
            assert layouts[a].dispatched.get(b, 0) == layouts[b].received.get(a, 0)
    outs = list(cell.threads.map(lambda rank: rank.run(layouts[rank.rank], queries), ranks))
    for rank, out in zip(ranks, outs, strict=True):
        own = [span for span in rank.spans if span.rank == rank.rank]
        expected = [dense(queries[span], sequences[span.seq], span) for span in own]
        if expected:
            compare(out, torch.cat(expected), rms=1e-5, max=1e-4)
        else:
            assert out.shape[0] == 0


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scenes(), st.permutations(MIXED), st.sampled_from([0.0, 1.5]), st.sampled_from([None, 0.5]))
def test_layers_of_several_groups_see_what_is_theirs(
    cell: Cell, scene: tuple[int, list[Sequence]], sights: list[Sight], soft_cap: float, sink: float | None
) -> None:
    """Some of them with another scale, and all with a cap, or with sinks, which count once however many holders there are."""
    block_size, sequences = scene
    layers = tuple(LayerView(Scoring(0.3 * (1 + i % 2), soft_cap), sight) for i, sight in enumerate(sights))
    shape = replace(SHAPE, layers=layers)
    assert shape.sights[0] == FULL
    assert sorted(map(repr, shape.sights)) == sorted({repr(sight) for sight in MIXED})
    ranks = [Rank(r, cell, block_size, sequences, shape) for r in range(SIZE)]
    holdings = {
        seq: [held for rank in ranks if (held := rank.holdings().get(seq)) is not None] for seq in range(len(sequences))
    }
    random = torch.Generator().manual_seed(1)
    queries = {
        span: torch.randn((span.stop - span.start, SHAPE.num_heads, SHAPE.head_dim), generator=random) * 3
        for span in ranks[0].spans
    }
    layouts = [[lay_out(ranks[0].spans, holdings, rank.shards, rank.rank, sight) for sight in shape.sights] for rank in ranks]
    sinks_H = None if sink is None else torch.full((SHAPE.num_heads,), sink)
    outs = list(cell.threads.map(lambda rank: rank.run_layers(layouts[rank.rank], queries, sinks_H), ranks))
    for rank, out in zip(ranks, outs, strict=True):
        own = [span for span in rank.spans if span.rank == rank.rank]
        for layer, got in zip(layers, out, strict=True):
            expected = [
                dense(queries[s] * (layer.scoring.scale / 0.3), sequences[s.seq], s, layer.sight, soft_cap, sink) for s in own
            ]
            if expected:
                compare(got, torch.cat(expected), rms=1e-5, max=1e-4)


def test_layouts_that_are_not_the_groups_are_refused(cell: Cell) -> None:
    storage = KVStorage(
        num_layers=2, num_blocks=1, block_size=4, num_kv_heads=2, head_dim=16, format=KVFormat(torch.float32), device=CPU
    )
    shape = replace(SHAPE, layers=(LayerView(Scoring(0.3)), LayerView(Scoring(0.3), Sight(window=4))))
    attention = DistAttention(storage, shape, Exchange(cell.groups[0].group, CPU), backend="torch")
    with pytest.raises(ValueError, match="for 2 groups of layers"):
        attention.plan([lay_out([], {}, ShardTable(1, 4), 0)], [[]])


def test_rows_that_were_not_planned_are_refused(cell: Cell) -> None:
    storage = KVStorage(
        num_layers=1, num_blocks=1, block_size=4, num_kv_heads=2, head_dim=16, format=KVFormat(torch.float32), device=CPU
    )
    attention = DistAttention(storage, SHAPE, Exchange(cell.groups[0].group, CPU), backend="torch")
    rows = torch.zeros((2, 4, 16)), torch.zeros((2, 2, 16)), torch.zeros((2, 2, 16))
    with pytest.raises(RuntimeError, match="2 rows came, no step was planned"):
        attention.run(0, *rows)
    attention.plan([lay_out([], {}, ShardTable(1, 4), 0)], [[]])
    with pytest.raises(RuntimeError, match="2 rows came, 0 rows was planned"):
        attention.run(0, *rows)


@pytest.mark.parametrize("shape", [SHAPE, LATENT], ids=["keys and values", "latents"])
def test_scratch_is_what_is_allocated(shape: AttentionShape, cell: Cell) -> None:
    """The buffers of the largest step: all own rows go to both peers, and as many come from each."""
    storage = KVStorage(
        num_layers=1, num_blocks=1, block_size=4, num_kv_heads=2, head_dim=16, format=KVFormat(torch.float32), device=CPU
    )
    attention = DistAttention(storage, shape, Exchange(cell.groups[0].group, CPU), backend="torch")
    rows, both = 10, {1: 10, 2: 10}
    attention.plan(
        [Layout(num_rows=rows, own=[], dispatched_rows=[*range(rows)] * 2, dispatched=both, received=both, others=[])],
        [[0] * rows],
    )
    plan = attention._plan
    assert plan is not None
    (group,) = plan.groups
    fields = [getattr(group.buffers, name) for name in group.buffers.__dataclass_fields__]
    buffers = sum(f.nbytes for f in fields if isinstance(f, torch.Tensor) and f.is_floating_point())
    kernels = sum(attention_scratch_bytes(n, 4, shape.num_kv_heads, 16, CPU, "torch") for n in (rows, 2 * rows))
    assert DistAttention.scratch_bytes(shape, rows, 2, CPU, "torch", tiles=True) == buffers + kernels
    layout = Layout(num_rows=3, own=[], dispatched_rows=[0, 2, 2], dispatched={1: 3}, received={2: 2}, others=[])
    assert attention.bytes_sent([layout]) == (3 * 4 * 16 * 4, 2 * 4 * (shape.out_dim * 4 + 4))
