"""Made-up steps before the first real one: nothing compiles or tunes once an instance has said that it is ready."""

from collections.abc import Sequence
from itertools import product

import torch

from distattn.shape import PackedRows
from instance.memory import run_step
from instance.model import Model
from instance.plan import MAX_DECODE_ROWS
from kernels.kv_blocks import store_kv
from kernels.merge_state import MergePlan, apply_sinks, merge_states
from kernels.paged_attention import plan_attention
from kernels.penalties import penalize
from kernels.segments import Segment
from kvstore.sight import FULL, Sight
from kvstore.storage import KVStorage

_CHUNK_ROWS = 64
_LONG_TOKENS = 4096
"""Long enough for one row's KV to be split into parts."""


def warm_up(model: Model, storage: KVStorage, backend: str, max_rows: int) -> None:
    """Run the model on rows that use every kernel: a row alone, and a row over split KV beside a chunk; a store, a merge.

    `max_rows`: of a step. The rows attend to block 0, again and again; nothing of it is kept, and block 0 is zero afterwards.
    """
    device = model.device
    try:
        with torch.inference_mode():
            for rows in model.rows_to_warm(max_rows):
                # the head's product has kernels for the number of rows, too, where its weights are of 8 bits
                run_step(model, rows, min(rows, MAX_DECODE_ROWS) if model.is_quantised else 1)
            # rows of texts that are shorter than a window see all, and kernels for that are others
            sights = [model.shape.sights, (FULL,) * len(model.shape.sights)] if set(model.shape.sights) != {FULL} else [(FULL,)]
            for (num_decodes, num_chunk_rows), seen in product(((1, 0), (1, _CHUNK_ROWS)), sights):
                model.context.attention = _MadeUpStep(model, storage, num_decodes, num_chunk_rows, seen, backend)
                rows_T = torch.zeros(num_decodes + num_chunk_rows, dtype=torch.int64, device=device)
                logits_SV = model.forward(rows_T, rows_T, rows_T[:1]).float()
                states_NV = torch.zeros_like(logits_SV, dtype=torch.int32)
                penalize(logits_SV, states_NV, rows_T[:1], torch.ones((1, 3), device=device), backend=backend)
    finally:
        model.context.attention = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # lanes have streams of their own, to which torch gives nothing that another has freed


class _MadeUpStep:
    """Attention of decode rows and a chunk to a long shard that is block 0 over and over; row 0 is merged with itself."""

    def __init__(
        self,
        model: Model,
        storage: KVStorage,
        num_decodes: int,
        num_chunk_rows: int,
        sights: Sequence[Sight],
        backend: str,
    ) -> None:
        """`sights`: how much of it rows see, for each group of layers."""
        self._shape = shape = model.shape
        self._storage = storage
        self._backend = backend
        num_rows = num_decodes + num_chunk_rows
        table = (0,) * -(-_LONG_TOKENS // storage.block_size)
        segments = [Segment(row, 1, table, (_LONG_TOKENS,)) for row in range(num_decodes)]
        if num_chunk_rows:
            segments.append(Segment(num_decodes, num_chunk_rows, table, (_LONG_TOKENS,) * num_chunk_rows))
        self._attentions = [
            plan_attention(
                [_seen(segment, sight) for segment in segments],
                num_rows,
                block_size=storage.block_size,
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                value_dim=shape.value_dim,
                dtype=shape.dtype,
                kv_dtype=storage.format.dtype,
                device=model.device,
                backend=backend,
            )
            for sight in sights
        ]
        self._merge = MergePlan.build([0], num_rows, device=model.device)
        self._slots_T = torch.full((num_rows,), -1, dtype=torch.int64, device=model.device)
        self._slots_T[0] = 0
        self._lse_TH = torch.empty((num_rows, shape.num_heads), dtype=torch.float32, device=model.device)

    def run(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        store_kv(
            k_TKD,
            None if self._shape.value_dim else v_TKD,
            self._cleared(layer),
            self._slots_T,
            scales_2BKX=self._storage.scales(layer),
            backend=self._backend,
        )
        return self._attend(layer, q_THD, sinks_H)

    def run_packed(self, layer: int, rows: PackedRows) -> torch.Tensor:
        return self._attend(layer, self._rotate_and_store(layer, rows), rows.sinks_H)

    def store_packed(self, layer: int, rows: PackedRows) -> None:
        self._rotate_and_store(layer, rows)

    def _rotate_and_store(self, layer: int, rows: PackedRows) -> torch.Tensor:
        kv_2BPKD, scales_2BKX = self._cleared(layer), self._storage.scales(layer)
        return rows.rotate_and_store(self._shape.num_heads, kv_2BPKD, self._slots_T, self._backend, scales_2BKX)

    def _attend(self, layer: int, q_THD: torch.Tensor, sinks_H: torch.Tensor | None) -> torch.Tensor:
        scoring, attention = self._shape.layer(layer).scoring, self._attentions[self._shape.group(layer)]
        out_THD = q_THD.new_empty((*q_THD.shape[:2], self._shape.out_dim))
        lse_TH, kv_2BPKD = self._lse_TH, self._storage.layer(layer)
        attention.run(
            q_THD,
            kv_2BPKD,
            scoring.scale,
            out_THD=out_THD,
            lse_TH=lse_TH,
            soft_cap=scoring.soft_cap,
            scales_2BKX=self._storage.scales(layer),
        )
        merge_states(out_THD, lse_TH, out_THD[:1].clone(), lse_TH[:1].clone(), self._merge, backend=self._backend)
        if sinks_H is not None:
            apply_sinks(out_THD, lse_TH, sinks_H, backend=self._backend)
        kv_2BPKD[:, 0] = 0
        return out_THD

    def _cleared(self, layer: int) -> torch.Tensor:
        kv_2BPKD, scales_2BKX = self._storage.layer(layer), self._storage.scales(layer)
        kv_2BPKD[:, 0] = 0
        if scales_2BKX is not None:  # of tokens that no row stores, too
            scales_2BKX[:, 0] = 1
        return kv_2BPKD


def _seen(segment: Segment, sight: Sight) -> Segment:
    """The segment where rows see less of it, or all: a start within the first block is enough for the kernels of windows."""
    if sight == FULL:
        return segment
    return Segment(segment.first_row, segment.num_rows, segment.block_ids, segment.kv_lens, (1,) * segment.num_rows)
