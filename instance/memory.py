"""What a GPU's memory goes to, and so how much is left for the pool: counted before the pool exists, allocated once.

total x fraction = weights + other use + activations + attention + sampling + reserve + KV
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from distattn.shape import AttentionShape, PackedRows
from instance.model import Model

RESERVE_BYTES = 2 * 2**30
"""For what comes after the pool and can't be asked for before: CUDA graphs (one memory pool and some MiB of nodes a graph),
NCCL's channel buffers (hundreds of MiB a communicator, and that of the epoch before may not be gone), matrix products' work
space, kernels' code, and the allocator's waste. An allowance, not a measurement: 1.4 % of an H200."""


class TooLittleMemory(ValueError):
    """The device can't hold what it was told to; the message says how much is missing, and for what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBudget:
    """One GPU's memory in bytes. What nothing else takes is the pool's."""

    device: str
    total: int
    fraction: float
    """Of `total`: what may be used at all, in (0, 1]."""
    weights: int
    other: int
    """In use and no weights: other processes, and this one's CUDA context."""
    activations: int
    """Of the largest step, without its attention and sampling."""
    attention: int
    """Scratch of a step's attention."""
    sampling: int
    """Scratch of a step's sampling."""
    reserve: int = RESERVE_BYTES

    @property
    def limit(self) -> int:
        """Bytes that may be used."""
        return int(self.total * self.fraction)

    @property
    def taken(self) -> int:
        """Bytes that are not the pool's."""
        return sum(self._parts().values())

    @property
    def pool(self) -> int:
        """Bytes left for KV; negative if there are none."""
        return self.limit - self.taken

    def num_blocks(self, block_bytes: int) -> int:
        """Most blocks that fit. Raises TooLittleMemory if not one does."""
        if self.pool < block_bytes:
            raise self._short({"one block of KV": block_bytes}, "--kv-memory")
        return self.pool // block_bytes

    def check(self, kv_tokens: int, token_bytes: int) -> None:
        """Raises TooLittleMemory if that many tokens of KV don't fit."""
        if kv_tokens * token_bytes > self.pool:
            fits = f"; at most {max(0, self.pool) // token_bytes:,} tokens fit ({token_bytes:,} bytes each)"
            raise self._short({"KV": kv_tokens * token_bytes}, f"--kv-tokens {kv_tokens:,}", fits)

    def describe(self) -> list[str]:
        """Lines for the log."""
        return [
            f"memory of {self.device}: {self._limit_text()}, of it {size(max(0, self.pool))} for KV",
            f"the rest: {_list_of(self._parts())}",
        ]

    def _parts(self) -> dict[str, int]:
        return {
            "weights": self.weights,
            "other use of the device": self.other,
            "activations": self.activations,
            "attention": self.attention,
            "sampling": self.sampling,
            "CUDA graphs and NCCL": self.reserve,
        }

    def _limit_text(self) -> str:
        if self.fraction == 1:
            return size(self.total)
        return f"{self.fraction:g} x {size(self.total)} = {size(self.limit)}"

    def _short(self, more: dict[str, int], flag: str, hint: str = "") -> TooLittleMemory:
        needed = self.taken + sum(more.values())
        return TooLittleMemory(
            f"{flag}: {self.device} needs {size(needed)} ({_list_of(self._parts() | more)}), "
            f"short by {size(needed - self.limit)} of {self._limit_text()}{hint}"
        )


def check_weights(device: str, *, needed: int, free: int, total: int) -> None:
    """Raises TooLittleMemory if weights of that many bytes don't fit in what is free; before minutes go into loading them."""
    if needed > free:
        raise TooLittleMemory(
            f"{device} needs {size(needed)} for weights, short by {size(needed - free)}: "
            f"{size(free)} of its {size(total)} are free, the rest is in use"
        )


def checkpoint_bytes(folder: Path, dtype: torch.dtype | None) -> int:
    """Bytes of the weights in `folder`'s safetensors files once they are loaded as `dtype` (None: as they are)."""
    files = sorted(folder.glob("model*.safetensors"))  # beside them some have consolidated.safetensors, the same again
    if dtype is None:
        return sum(file.stat().st_size for file in files)
    count = 0
    for file in files:
        with safe_open(file, framework="pt") as weights:
            count += sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in weights.keys())  # noqa: SIM118
    return count * dtype.itemsize


def measure(model: Model, *, fraction: float, rows: int, sampled: int, attention: int, sampling: int) -> MemoryBudget:
    """The budget of a CUDA device with the model loaded and no pool yet. Runs the model's largest step once.

    `rows`, `sampled`: of that step; `attention`, `sampling`: bytes of scratch that others have computed. Raises
    TooLittleMemory if not even that step fits.
    """
    device = model.device
    torch.cuda.empty_cache()  # what is only cached would count as in use
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        run_largest_step(model, rows, sampled)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise TooLittleMemory(
            f"{device} has {size(free)} of its {size(total)} free beside the model, too little for a step of {rows:,} rows: "
            f"{error}"
        ) from error
    # reserved, not allocated: what torch rounds up and splits is the device's loss too
    activations = torch.cuda.max_memory_reserved(device) - reserved
    torch.cuda.empty_cache()
    weights = model.weight_bytes()
    return MemoryBudget(
        device=str(device),
        total=total,
        fraction=fraction,
        weights=weights,
        other=max(0, total - free - weights),
        activations=activations,
        attention=attention,
        sampling=sampling,
    )


def run_largest_step(model: Model, rows: int, sampled: int) -> None:
    """Run the model on `rows` rows, logits for `sampled` of them, with an attention that returns zeros and needs no KV."""
    model.context.attention = NoAttention(model.shape)
    try:
        with torch.inference_mode():
            rows_T = torch.zeros(rows, dtype=torch.int64, device=model.device)
            model.forward(rows_T, rows_T, rows_T[:sampled])
    finally:
        model.context.attention = None


class NoAttention:
    """Zeros `[T, H, D]` for every row."""

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape

    def run(self, layer: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(q_THD, memory_format=torch.contiguous_format)

    def run_packed(self, layer: int, rows: PackedRows) -> torch.Tensor:
        return rows.qkv_TE.new_zeros(rows.qkv_TE.shape[0], self._shape.num_heads, self._shape.head_dim)

    def store_packed(self, layer: int, rows: PackedRows) -> None:
        """Nothing is kept."""


def size(num_bytes: int) -> str:
    """`12.3 GiB`, or MiB below one."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def _list_of(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in parts.items())
