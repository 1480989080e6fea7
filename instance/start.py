"""From settings to an instance that is ready to register: model, tokenizer, pool."""

import hashlib
import logging
from dataclasses import dataclass

import torch
from filelock import Timeout
from safetensors import SafetensorError

from distattn.attention import DistAttention
from gmanager.wire.channel import Transport
from gmanager.wire.messages import InstanceSpec, TextAssets
from instance.checkpoint import CheckpointError, resolve_checkpoint
from instance.config import InstanceConfig
from instance.model import Model, UnsupportedModel, load_model, load_text_assets
from instance.sampler import scratch_bytes as sampler_scratch_bytes
from instance.scheduler import MAX_DECODE_ROWS
from instance.server import Instance
from instance.warmup import warm_up
from kernels.paged_attention import PagedAttention
from kvstore.storage import KVStorage

log = logging.getLogger("instance")

# What transformers, tokenizers, safetensors and torch raise for files that they can't take.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError, Timeout)


class PoolTooLarge(ValueError):
    """There is not enough memory for the pool; the message has the sizes."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What takes long to load, and can serve any number of epochs."""

    model: Model
    assets: TextAssets


def load(config: InstanceConfig) -> Loaded:
    """Find, load and check the model. Raises CheckpointError, or UnsupportedModel by the name of what is not supported."""
    device = device_of(config)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means IEEE
        torch.backends.cudnn.allow_tf32 = False
    try:
        path = resolve_checkpoint(config.model, cache_dir=config.cache_dir)
        model = load_model(path, None if config.dtype == "auto" else getattr(torch, config.dtype), device)
        assets = load_text_assets(path)
    except (CheckpointError, UnsupportedModel):
        raise
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"{config.model} can't be loaded: {type(error).__name__}: {error}") from error
    _refuse_shape(model, config)
    return Loaded(model, assets)


def make_instance(config: InstanceConfig, loaded: Loaded, transport: Transport) -> Instance:
    """An instance with its pool; needs a running loop. Raises PoolTooLarge, and AddressError if `--host` can't be bound."""
    model = loaded.model
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
    storage = _make_storage(config, model)
    rows = config.chunk_tokens + MAX_DECODE_ROWS
    attention = DistAttention.scratch_bytes(model.shape, rows, config.cell_size - 1, model.device, config.backend)
    log.info(
        "%s on %s (%s kernels): weights %s; KV %d blocks x %d bytes = %s (%d tokens); scratch of attention at most %s, "
        "of sampling at most %s",
        config.model,
        model.device,
        config.backend,
        _mib(model.weight_bytes()),
        storage.num_blocks,
        storage.block_bytes,
        _mib(storage.nbytes),
        storage.num_blocks * config.block_size,
        _mib(attention),
        _mib(sampler_scratch_bytes(MAX_DECODE_ROWS, model.vocab_size)),
    )
    warm_up(model, storage, config.backend)
    return Instance(config, model, loaded.assets, _make_spec(config, loaded), storage, transport)


def device_of(config: InstanceConfig) -> torch.device:
    """The device that this process drives."""
    return torch.device("cpu") if config.device == "cpu" else torch.device("cuda", config.launch.local_rank)


def _refuse_shape(model: Model, config: InstanceConfig) -> None:
    """Raises UnsupportedModel for an attention shape that the kernels don't support: before anybody waits for this one."""
    shape = model.shape
    try:
        PagedAttention.plan(
            [],
            0,
            block_size=config.block_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            device=model.device,
            backend=config.backend,
        )
    except ValueError as error:
        raise UnsupportedModel(f"{config.model}: {error}") from error


def _make_storage(config: InstanceConfig, model: Model) -> KVStorage:
    shape = model.shape
    try:
        return KVStorage(
            num_layers=model.num_layers,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            device=model.device,
        )
    except (MemoryError, RuntimeError) as error:  # torch's out of memory is a RuntimeError, on a GPU and on the CPU
        token = 2 * model.num_layers * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
        needed = config.num_blocks * config.block_size * token
        raise PoolTooLarge(
            f"--kv-tokens {config.kv_tokens:,} needs {_mib(needed)} on {model.device} ({token:,} bytes a token): {error}"
        ) from error


def _make_spec(config: InstanceConfig, loaded: Loaded) -> InstanceSpec:
    """What this instance tells the gManager of itself."""
    model = loaded.model
    return InstanceSpec(
        model=config.model,
        fingerprint=model.fingerprint(),
        tokenizer=hashlib.sha256(repr(loaded.assets).encode()).hexdigest(),
        dtype=str(model.shape.dtype).removeprefix("torch."),
        block_size=config.block_size,
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        num_blocks=config.num_blocks,
        chunk_tokens=config.chunk_tokens,
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
