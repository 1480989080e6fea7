"""What a GPU's memory goes to, and so how much is left for the pool: counted before the pool exists, allocated once.

total x fraction = weights + other use + activations + attention + sampling + reserve + KV
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distattn.shape import AttentionShape, PackedRows
from instance.checkpoint import read_config, tensor_shapes, weight_files
from instance.config import InstanceConfig
from instance.layers import expert_numbers
from instance.load import shaped_model
from instance.model import Model
from instance.needs import KVNeeds, Needs
from instance.quantised import most_weights
from instance.split import WHOLE, Place
from instance.stored import form_of
from kernels.experts import MOST_ROWS
from kernels.products import TILED_ROWS, Scheme

COPIES_BYTES = 384 * 2**20
"""For block moves: NCCL's buffers of their communicator, and one block on its way. By arithmetic, not measured:

    a channel, to one other member   4 MiB (simple) + 4.7 MiB (LL128) + 0.5 MiB (LL) = 9.2 MiB
    channels                         4, `instance.copies.CHANNELS`
    others                           1 in the ring of NCCL's own collectives, and each other member
    blocks                           3 of the 8B shape's 8 MiB, and 32 MiB for a checksum

so 4 x 9.2 x (1 + 7) + 56 = 350 MiB in a cell of eight, 130 in one of two. With the 32 channels that NCCL may take by itself the
buffers would be eight times as large."""

RESERVE_BYTES = 2 * 2**30 + COPIES_BYTES
"""For what comes after the pool and can't be asked for before: CUDA graphs (one memory pool and some MiB of nodes a graph),
NCCL's channel buffers (hundreds of MiB for each lane's communicator, and those of the epoch before may not be gone), matrix
products' work space, kernels' code, and the allocator's waste: 2 GiB, an allowance, not a measurement: 1.4 % of an H200. And
what block moves take, whose communicator is there in every cell of two or more, whether anything moves or not."""

TIERS_BLOCKS, LEAST_TIERS_BYTES = 16, 128 * 2**20
"""For copies to and from the tiers below the pool, where there are some: two blocks on their way and the words and places of a
checksum, eight bytes for each four, by arithmetic: 8 blocks, and as much again. No less than the 8B shape's, of 8 MiB each."""

OTHER_BYTES = 2**30
"""In use beside the weights when nobody else uses the GPU, predicted: CUDA's context, libraries, the weights' rounding. An
instance of the 8B shape on an H200 measured 1.0 GiB (docs/performance.md)."""

ALLOCATOR_WASTE = 1.2
"""Reserved by torch for each byte of activations that lives: what it rounds up, and can't join. The 8B shape on an H200 with
8,448 rows: 1.3 GiB, of it 1.03 by `activation_bytes`."""


def tiers_bytes(block_bytes: int) -> int:
    """What copies to and from tiers take of the GPU."""
    return max(LEAST_TIERS_BYTES, TIERS_BLOCKS * block_bytes)


def check_tiers(config: InstanceConfig) -> None:
    """Raises TooLittleMemory if the machine hasn't the host memory or the disk that is asked for. What several instances of a
    machine take together nobody adds up here: `distattn up` does."""
    if config.host_memory > (free := available_bytes()):
        raise TooLittleMemory(
            f"--host-memory {size(config.host_memory)} is more than the {size(free)} of host memory that are available"
        )
    if config.disk is None:
        return
    try:
        free = shutil.disk_usage(config.disk).free
    except OSError as error:
        raise TooLittleMemory(f"--disk {config.disk} can't be used: {error.strerror}") from error
    if config.disk_bytes > free:
        raise TooLittleMemory(
            f"--disk {config.disk}:{size(config.disk_bytes)} is more than the {size(free)} that are free there"
        )


def available_bytes() -> int:
    """Host memory that can be had without swapping, by the kernel and by what this process's control group may take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        raise RuntimeError("/proc/meminfo does not say how much memory is available")
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available  # no limit that is known here
    return available if limit == "max" else max(0, min(available, int(limit) - int(used)))


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
    """Of each lane's largest step, without its attention and sampling, on each stream that it may run on."""
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
        return sum(self.parts().values())

    @property
    def pool(self) -> int:
        """Bytes left for KV; negative if there are none."""
        return self.limit - self.taken

    def num_blocks(self, block_bytes: int) -> int:
        """Most blocks that fit. Raises TooLittleMemory if not one does."""
        if self.pool < block_bytes:
            raise self._short({"one block of KV": block_bytes}, "--kv-memory")
        return self.pool // block_bytes

    def most_tokens(self, needs: KVNeeds) -> int:
        """Of the longest sequence whose KV fits. Raises TooLittleMemory if not a block of tokens does, in all tables."""
        tokens = needs.tokens(self.num_blocks(needs.block))
        if not tokens:
            self.check(needs.block_size, needs)
        return tokens

    def check(self, kv_tokens: int, needs: KVNeeds) -> None:
        """Raises TooLittleMemory if that many tokens of KV, in whole blocks, don't fit."""
        needed = needs.bytes_of(kv_tokens)
        if needed > self.pool:
            most = needs.tokens(max(0, self.pool) // needs.block)
            fits = f"; at most {most:,} tokens fit ({needed // kv_tokens:,} bytes each)"
            raise self._short({"KV": needed}, f"--kv-tokens {kv_tokens:,}", fits)

    def describe(self) -> dict[str, str]:
        """Where all of it goes, for the log."""
        return {
            "device": self.device,
            "limit": self.limit_text(),
            "kv": size(max(0, self.pool)),
            "rest": _list_of(self.parts()),
        }

    def parts(self) -> dict[str, int]:
        """All that is not the pool's, by the names that messages use."""
        return {
            "weights": self.weights,
            "other use of the device": self.other,
            "activations": self.activations,
            "attention": self.attention,
            "sampling": self.sampling,
            "CUDA graphs and NCCL": self.reserve,
        }

    def limit_text(self) -> str:
        """`limit`, and what of."""
        if self.fraction == 1:
            return size(self.total)
        return f"{self.fraction:g} x {size(self.total)} = {size(self.limit)}"

    def _short(self, more: dict[str, int], flag: str, hint: str = "") -> TooLittleMemory:
        needed = self.taken + sum(more.values())
        return TooLittleMemory(
            f"{flag}: {self.device} needs {size(needed)} ({_list_of(self.parts() | more)}), "
            f"short by {size(needed - self.limit)} of {self.limit_text()}{hint}"
        )


def check_weights(device: str, *, needed: int, free: int, total: int) -> None:
    """Raises TooLittleMemory if weights of that many bytes don't fit in what is free; before minutes go into loading them."""
    if needed > free:
        raise TooLittleMemory(
            f"{device} needs {size(needed)} for weights, short by {size(needed - free)}: "
            f"{size(free)} of its {size(total)} are free, the rest is in use"
        )


def checkpoint_bytes(folder: Path, dtype: torch.dtype | None) -> int:
    """Bytes of the plain weights in `folder`'s safetensors files once they are loaded as `dtype` (None: as they are)."""
    if dtype is None:
        return sum(file.stat().st_size for file in weight_files(folder))
    return sum(torch.Size(shape).numel() for shape in tensor_shapes(folder).values()) * dtype.itemsize


def loaded_bytes(folder: Path, dtype: torch.dtype | None, quantize: Scheme | None, place: Place = WHOLE) -> int:
    """Bytes of a rank's part of the weights in `folder` once they are loaded as `dtype` (None: as they are) and quantised, or
    as they are stored in fewer bits. Raises UnsupportedModel for a form that isn't read, or a model that can't be split so."""
    config = read_config(str(folder))
    if place == WHOLE and quantize is None and form_of(config, str(folder)) is None:
        return checkpoint_bytes(folder, dtype)
    of_config: Any = config.dtype
    model = shaped_model(config, str(folder), dtype or of_config or torch.bfloat16, quantize=quantize, place=place)
    return model.weight_bytes()


def measure(model: Model, needs: Needs, *, fraction: float) -> MemoryBudget:
    """The budget of a CUDA device with the model loaded and no pool yet. Runs the model's largest steps once.

    Raises TooLittleMemory if not even those fit.
    """
    device = model.device
    torch.cuda.empty_cache()  # what is only cached would count as in use
    free, total = torch.cuda.mem_get_info(device)
    activations = 0
    for rows, sampled in needs.steps:
        reserved = torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            run_step(model, rows, sampled)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError as error:
            raise TooLittleMemory(
                f"{device} has {size(free)} of its {size(total)} free beside the model, too little for a step of "
                f"{rows:,} rows: {error}"
            ) from error
        # reserved, not allocated: what torch rounds up and splits is the device's loss too
        activations += needs.streams * (torch.cuda.max_memory_reserved(device) - reserved)
        torch.cuda.empty_cache()
    return MemoryBudget(
        device=str(device),
        total=total,
        fraction=fraction,
        weights=needs.weights,
        other=max(0, total - free - needs.weights),
        activations=activations + needs.stage_rows,
        attention=needs.attention,
        sampling=needs.sampling,
    )


def predict(model: Model, needs: Needs, *, device: str, total: int, fraction: float) -> MemoryBudget:
    """What `measure` would say on an empty GPU of that many bytes: for a model on `meta`, without a GPU."""
    return MemoryBudget(
        device=device,
        total=total,
        fraction=fraction,
        weights=needs.weights,
        other=OTHER_BYTES,
        activations=int((activation_bytes(model, needs) + needs.stage_rows) * ALLOCATOR_WASTE),
        attention=needs.attention,
        sampling=needs.sampling,
    )


def activation_bytes(model: Model, needs: Needs) -> int:
    """Most bytes that live at once in the largest steps of all lanes, on all streams, attention left out: by formula.

        in a layer      rows x (3 hidden + heads + (heads + 2 KV heads)) + MLP rows x 3 intermediate
        over latents    rows x (3 hidden + 2 heads + absorbed queries + those joined to what is rotated) + the same
        at the logits   rows x 2 hidden + sampled x (3 hidden + vocabulary)
        of 8 bits       the largest matrix, once more, where more rows than `TILED_ROWS` are multiplied with it

    The first is when `FusedDecoder` computes silu(gate) * up: what the layer before adds, the residual and its norm; what
    attention returned and the projections it was given (heads times head dim); gate, up and their product, of `MLP_ROWS` at a
    time, or of a row's experts what lies between their products, of `MOST_ROWS`. Where KV is latent, when attention begins:
    transformers' heads of queries and keys are there beside what is made of them. transformers' own layers hold up to a quarter
    less, and gate and up of all rows. The larger of both counts, times the bytes of an element.
    """
    shape, config = model.shape, model.module.config.get_text_config()
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden  # GPT-2 and its like don't say
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    if shape.value_dim:
        heads = shape.num_heads * (2 * model.heads_shape.head_dim + shape.value_dim + shape.head_dim)
    of_experts = expert_numbers(model.module)
    largest = most_weights(model.module)
    elements = 0
    for rows, sampled in needs.steps:
        fed = max(min(rows, needs.mlp_rows) * 3 * intermediate, min(rows, MOST_ROWS) * of_experts)
        layer = rows * (3 * hidden + heads) + fed + (largest if rows > TILED_ROWS else 0)
        logits = rows * 2 * hidden + sampled * (3 * hidden + model.vocab_size)
        elements += max(layer, logits)
    return int(needs.streams * elements * shape.dtype.itemsize)


def run_step(model: Model, rows: int, sampled: int) -> None:
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

    def run(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return q_THD.new_zeros((*q_THD.shape[:2], self._shape.out_dim))

    def run_packed(self, layer: int, rows: PackedRows) -> torch.Tensor:
        return rows.qkv_TE.new_zeros(rows.qkv_TE.shape[0], self._shape.num_heads, self._shape.head_dim)

    def store_packed(self, layer: int, rows: PackedRows) -> None:
        """Nothing is kept."""


def size(num_bytes: int) -> str:
    """`12.3 GiB`, or MiB below one."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def _list_of(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in parts.items())
