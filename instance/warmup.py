"""One made-up step before the first real one: nothing compiles or tunes once an instance has said that it is ready."""

import torch

from instance.model import Model
from kernels.kv_blocks import store_kv
from kernels.merge_state import MergePlan, merge_states
from kernels.paged_attention import PagedAttention, Segment
from kvstore.storage import KVStorage

_CHUNK_ROWS = 64
_LONG_TOKENS = 4096
"""Long enough for one row's KV to be split into parts."""


def warm_up(model: Model, storage: KVStorage, backend: str) -> None:
    """Run the model on rows that use every kernel: a decode over split KV, a chunk, a store and a merge.

    The rows attend to block 0, again and again; nothing of it is kept, and block 0 is zero afterwards.
    """
    shape, device = model.shape, model.device
    num_rows = 1 + _CHUNK_ROWS
    table = (0,) * -(-_LONG_TOKENS // storage.block_size)
    attention = PagedAttention.plan(
        [Segment(0, 1, table, (_LONG_TOKENS,)), Segment(1, _CHUNK_ROWS, table, (_LONG_TOKENS,) * _CHUNK_ROWS)],
        num_rows,
        block_size=storage.block_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        device=device,
        backend=backend,
    )
    merge = MergePlan.build([0], num_rows, device=device)
    slots_T = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
    slots_T[0] = 0
    lse_TH = torch.empty((num_rows, shape.num_heads), dtype=torch.float32, device=device)

    def attend(layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        kv_2BPKD = storage.layer(layer)
        kv_2BPKD[:, 0] = 0
        store_kv(k_TKD, v_TKD, kv_2BPKD, slots_T, backend=backend)
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        attention.run(q_THD, kv_2BPKD, shape.scale, out_THD=out_THD, lse_TH=lse_TH)
        merge_states(out_THD, lse_TH, out_THD[:1].clone(), lse_TH[:1].clone(), merge, backend=backend)
        kv_2BPKD[:, 0] = 0
        return out_THD

    model.context.attend = attend
    try:
        with torch.inference_mode():
            rows_T = torch.zeros(num_rows, dtype=torch.int64, device=device)
            model.forward(rows_T, rows_T, rows_T[:1])
    finally:
        model.context.attend = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
