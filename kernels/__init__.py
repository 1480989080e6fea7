"""Stateless tensor operations on paged KV: partial attention, merging of partial states, storing and gathering of blocks.

Nothing here knows of sequences, pools or instances. Triton is imported when an operation first uses that backend.
"""

import importlib.metadata

from kernels.kv_blocks import gather_kv, store_kv
from kernels.merge_state import MergePlan, merge_states
from kernels.paged_attention import attention_scratch_bytes, plan_attention
from kernels.segments import PagedAttention, Segment

__all__ = [
    "MergePlan",
    "PagedAttention",
    "Segment",
    "attention_scratch_bytes",
    "gather_kv",
    "merge_states",
    "plan_attention",
    "store_kv",
]


def _refuse_foreign_kernels() -> None:
    """Raises ImportError if Hugging Face's distribution `kernels`, which has our import name, is installed beside us."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"the distribution 'kernels' {version} (Hugging Face's) is installed and has the same import name as a package of "
        "distattn, so one of the two would silently be imported for the other: run `pip uninstall kernels` and reinstall "
        "distattn, or use a separate environment"
    )


_refuse_foreign_kernels()
