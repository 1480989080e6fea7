"""The settings of one instance: frozen, checked when built, complete before anything starts."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from gmanager.wire.channel import check_address
from gmanager.wire.errors import AddressError
from gmanager.wire.logs import Style
from gmanager.wire.messages import Role
from gmanager.wire.scaling import RopeScaling
from gmanager.wire.sizes import check_sharing
from instance.elastic_tp import ElasticTP
from instance.sharing import SPLITS
from instance.split import WHOLE, Place

DType = Literal["auto", "float32", "float16", "bfloat16"]
DTYPES: tuple[DType, ...] = ("auto", "float32", "float16", "bfloat16")

Quantize = Literal["none", "fp8", "int8", "int8-32"]
QUANTIZE: tuple[Quantize, ...] = ("none", "fp8", "int8", "int8-32")

KVFormatChoice = Literal["auto", "plain"]
KV_FORMATS: tuple[KVFormatChoice, ...] = ("auto", "plain")

KVDType = Literal["auto", "fp8", "int8"]
KV_DTYPES: tuple[KVDType, ...] = ("auto", "fp8", "int8")

GPU_BLOCK_SIZE = 64
CPU_BLOCK_SIZE = 16
GPU_CHUNK_TOKENS = 8192
"""One H200, 8B shape: 32K tokens take 1.22 s, with 16384 1.24 s."""
GPU_MIXED_CHUNK_TOKENS = 24576
"""What a step may cost while decodes run, in rows at the beginning of a prompt; further on these are fewer rows (`Pace`). Who
comes next waits for the step that runs and the one behind it: a second each at most up to a prefix of 128K (8B shape, H200)."""
GPU_GRAIN = 2048
"""Fewer rows than that cost a prompt more than they save those who wait."""
CPU_GRAIN = 64
"""Likewise, of slices that go through stages."""
CPU_CHUNK_TOKENS = 512
"""What a short request waits for, against what small matrix products cost. 4096 tokens of a 135M model on two instances of
one core each: 1.27 times transformers' time with 256, 1.18 with 512, 1.11 with 1024; a step of 512 takes about 1.5 s."""

GPU_KV_MEMORY = 0.92
"""Part of a GPU's memory that may be used, unless told otherwise; what is beside it is for what was not foreseen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What torchrun says of this process. Nothing else of its environment is read, MASTER_* least of all."""

    rank: int
    """Among all processes of this torchrun, [0, world_size)."""
    local_rank: int
    """Among those on this machine: which GPU is ours, unless that is said."""
    world_size: int
    run_id: str
    """The same in all processes of one torchrun."""
    restarts: int = 0
    """How often this torchrun has started its processes before."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"RANK must be in [0, WORLD_SIZE), got {self.rank} of {self.world_size}")

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> "Launch":
        """Raises ValueError if the process was not started by torchrun."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")
        missing = [name for name in names if name not in environment]
        if missing:
            raise ValueError(
                f"start instances with torchrun (python -m torch.distributed.run ... -m instance): {', '.join(missing)} not set"
            )
        return Launch(
            rank=int(environment["RANK"]),
            local_rank=int(environment["LOCAL_RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            run_id=environment["TORCHELASTIC_RUN_ID"],
            restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )

    def split(self, parts: int, stages: int = 1, layers: tuple[int, ...] = ()) -> "tuple[Launch, Place]":
        """What it says of the instance that this process is a rank of, if so many share a model, and which of them it is.
        `layers`: of each stage; none: as even as can be.

        Raises ValueError if the processes can't be divided so.
        """
        for flag, degree in (("--tp", parts), ("--pp", stages)):
            if degree < 1:
                raise ValueError(f"{flag} must be at least 1, got {degree}")
        ranks = parts * stages
        if self.world_size % ranks:
            flags = f"--tp {parts}" if stages == 1 else f"--pp {stages}" if parts == 1 else f"--tp {parts} times --pp {stages}"
            raise ValueError(f"{flags} doesn't divide the {self.world_size} processes of this torchrun")
        launch = replace(self, rank=self.rank // ranks, world_size=self.world_size // ranks)
        stage, part = divmod(self.rank % ranks, parts)
        return launch, Place(part, parts, stage, stages, layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceConfig:
    """All that an instance is told."""

    gmanager: str
    """Address of the gManager, tcp://host:port."""
    model: str
    """A directory, a hub id or a GGUF file."""
    served_model_name: str | None = None
    """What requests call it; None: as `model` says."""
    other_names: tuple[str, ...] = ()
    """By which requests may ask for it, too."""
    kv_tokens: int | None = None
    """Tokens of KV, all layers, that this instance can hold; rounded down to blocks. Or `kv_memory`, never both."""
    kv_memory: float | None = None
    """CUDA: part of the device's memory that may be used in all, in (0, 1). What is left of it is the pool's; `instance.start`
    puts the tokens into a new config, because they are known only beside the loaded model."""
    launch: Launch
    device: Literal["cpu", "cuda"]
    gpu: int = 0
    """CUDA: index of the device, among those that this process sees."""
    dtype: DType = "auto"
    """auto: what the checkpoint says."""
    quantize: Quantize = "none"
    """What the weights of linear layers become at load; none: they stay as the checkpoint has them."""
    max_context: int | None = None
    """Tokens of the longest sequence served; None: as many as the model's config says."""
    rope_scaling: RopeScaling | None = None
    """Of the model's rotary frequencies; None: what its config says."""
    kv_format: KVFormatChoice = "auto"
    """auto: latents where the model's layers have some; plain: keys and values of all heads, to compare with."""
    kv_dtype: KVDType = "auto"
    """auto: KV is stored in the model's dtype; fp8: in e4m3, with a scale for each block and KV head; int8: with one for each
    token and KV head."""
    elastic_tp: ElasticTP = 0
    """Most rows of a decode step whose feeds the cell's instances share; auto: as they measure it."""
    block_size: int = CPU_BLOCK_SIZE
    """Tokens in a block."""
    chunk_tokens: int = CPU_CHUNK_TOKENS
    """Most prompt rows this instance runs in one step."""
    mixed_chunk_tokens: int = CPU_CHUNK_TOKENS
    """The same while anybody decodes, counted at the beginning of a prompt: rows cost more further on."""
    decode_processors: tuple[int, ...] = SPLITS
    """CUDA: how many of a GPU's processors decodes may have while prompts have the others, ascending."""
    threads: int = 1
    """CPU threads of the model."""
    copy_tokens: int = 16
    """Tokens of KV that are copied to or from this instance for each of its steps, while it steps (Infinite-LLM: 16 are free,
    32 cost 8.6 %). The two ends of a copy need not have the same."""
    host_memory: int = 0
    """Bytes of host memory for copies of cached blocks; 0: none."""
    disk: Path | None = None
    """Directory in which a file for such copies is made, without a name; None: there is none."""
    disk_bytes: int = 0
    """Of that file."""
    check_cache: bool = False
    """Whether cached blocks are compared with what was written before they are shared: all of their KV is read for that."""
    grace_s: float = 20
    """How long it may take to be emptied once it is asked to end; 0: it ends at once. Less than the 30 s after which torchrun
    kills what it has asked to end."""
    host: str = "127.0.0.1"
    """Where this instance's own sockets listen."""
    cell: str = "main"
    cell_size: int
    """Instances with which the cell begins."""
    id: int | None = None
    """Number in the cell that it would have, if that is free; None: the lowest that is."""
    role: Role = "mixed"
    """What it is for, where the gManager's policy tells instances apart."""
    place: Place = WHOLE
    """Of this rank among those that the instance's model is split between; all are of one machine."""
    meeting: Path | None = None
    """Where these find each other: a file that is to be, in a directory of this user's; None: there is one rank."""
    cache_dir: Path | None = None
    """Where converted checkpoints lie; None: the user's cache directory."""
    log_level: str = "info"
    log_format: Style = "console"
    connect_timeout_s: float = 120
    """How long to wait for a gManager that isn't there, or that was lost."""
    step_timeout_s: float = 600
    """Longest wait for other instances, or the device, inside a step; after it the epoch ends. An instance that died or
    was stopped is noticed within seconds by its lease: this is for what isn't, and longer than any honest step."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.quantize not in QUANTIZE:
            raise ValueError(f"--quantize must be one of {', '.join(QUANTIZE)}, got {self.quantize}")
        if self.kv_format not in KV_FORMATS:
            raise ValueError(f"--kv-format must be one of {', '.join(KV_FORMATS)}, got {self.kv_format}")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"--kv-dtype must be one of {', '.join(KV_DTYPES)}, got {self.kv_dtype}")
        for flag, value in (
            ("--block-size", self.block_size),
            ("--chunk-tokens", self.chunk_tokens),
            ("--mixed-chunk-tokens", self.mixed_chunk_tokens),
            ("--threads", self.threads),
            ("--copy-tokens", self.copy_tokens),
            ("--cell-size", self.cell_size),
        ):
            if value < 1:
                raise ValueError(f"{flag} must be at least 1, got {value}")
        for flag, number in (("--gpu", self.gpu), ("--id", self.id)):
            if number is not None and number < 0:
                raise ValueError(f"{flag} must not be negative, got {number}")
        if (self.place.ranks > 1) != (self.meeting is not None):
            raise ValueError(f"{self.place.ranks} ranks that share a model, and meet at {self.meeting}")
        if self.place.ranks > 1 and self.reads_pool:
            raise ValueError(f"--host-memory, --disk and --check-cache don't go with {self.place.flags} yet")
        if self.elastic_tp:
            check_sharing(self.elastic_tp, ranks=self.place.ranks, quantize=self.quantize)
        if self.host_memory < 0:
            raise ValueError(f"--host-memory must not be negative, got {self.host_memory}")
        if self.disk is not None and self.disk_bytes < 1:
            raise ValueError(f"--disk {self.disk}:{self.disk_bytes} has no room")
        if not self.grace_s >= 0:
            raise ValueError(f"--grace-s must not be negative, got {self.grace_s:g}")
        if not self.connect_timeout_s > 0:
            raise ValueError(f"--connect-timeout-s must be more than 0, got {self.connect_timeout_s:g}")
        if any(count < 8 or count % 8 for count in self.decode_processors):
            raise ValueError(f"--decode-processors must be multiples of 8, got {' '.join(map(str, self.decode_processors))}")
        if self.max_context is not None and self.max_context < 1:
            raise ValueError(f"--max-context must be at least 1, got {self.max_context}")
        self._check_pool()
        if "" in (self.served_model_name, *self.other_names):
            raise ValueError("--served-model-name must not be empty")
        if not self.cell:
            raise ValueError("--cell must not be empty")
        if self.host in ("0.0.0.0", "::", "*", ""):
            raise ValueError(f"--host {self.host!r} is no address that the other instances could dial")
        try:
            check_address(self.gmanager)
        except AddressError as error:
            raise ValueError(f"--gmanager: {error}") from error

    @property
    def backend(self) -> Literal["triton", "torch"]:
        """Which kernels run."""
        return "triton" if self.device == "cuda" else "torch"

    @property
    def reads_pool(self) -> bool:
        """Whether cached blocks are copied below the pool, or checked."""
        return self.host_memory > 0 or self.disk is not None or self.check_cache

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool. Raises RuntimeError while only `kv_memory` is known."""
        if self.kv_tokens is None:
            raise RuntimeError(f"the pool of --kv-memory {self.kv_memory} has not been sized yet")
        return self.kv_tokens // self.block_size

    def _check_pool(self) -> None:
        if self.kv_tokens is not None and self.kv_memory is not None:
            raise ValueError(f"give --kv-tokens or --kv-memory, not both (got {self.kv_tokens} and {self.kv_memory})")
        if self.kv_tokens is not None:
            if self.kv_tokens < self.block_size:
                raise ValueError(f"--kv-tokens {self.kv_tokens} is less than one block of {self.block_size} tokens")
        elif self.device == "cpu":
            got = "" if self.kv_memory is None else f" and takes no --kv-memory (got {self.kv_memory})"
            raise ValueError(f"an instance on the CPU needs --kv-tokens{got}")
        elif self.kv_memory is None:
            raise ValueError("--kv-tokens or --kv-memory is needed")
        elif not 0 < self.kv_memory < 1:
            raise ValueError(f"--kv-memory must be in (0, 1), got {self.kv_memory}")


def meeting_of(launch: Launch) -> Path:
    """Where the ranks of one instance, children of one torchrun, find each other."""
    parent = os.getppid()
    began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]  # process ids come again
    run = f"{launch.run_id}-{parent}-{began}-{launch.restarts}-{launch.rank}"
    return Path(tempfile.gettempdir()) / f"distattn-{os.getuid()}" / run


def role_of(text: str, rank: int, world_size: int) -> Role:
    """Of `--role`: one for all instances of this torchrun, or one for each by RANK, with commas between. Raises ValueError."""
    names = text.split(",")
    roles: dict[str, Role] = {role: role for role in get_args(Role)}
    if len(names) not in (1, world_size) or not set(names) <= set(roles):
        several = f", or {world_size} of them with commas between" if world_size > 1 else ""
        raise ValueError(f"--role must be one of {', '.join(roles)}{several}, got {text}")
    return roles[names[rank if len(names) > 1 else 0]]


def default_threads(cell_size: int) -> int:
    """The cores this process may use, shared as if all instances of the cell ran on them."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, cell_size))
