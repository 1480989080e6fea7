"""From settings to an instance that is ready to register: model, tokenizer, pool."""

import hashlib
from dataclasses import dataclass, replace

import torch

from gmanager.wire.channel import Transport
from gmanager.wire.logs import get_logger
from gmanager.wire.messages import InstanceSpec, TextAssets
from instance.checkpoint import LOAD_ERRORS, CheckpointError, fetch_settings, locate, resolve_checkpoint
from instance.config import InstanceConfig
from instance.crew import Crew, Meeting
from instance.errors import UnsupportedModel
from instance.exact import refuse_inexact
from instance.host import host_of_this_process, visible_gpus
from instance.load import load_model, load_text_assets, refuse_by_config, refuse_unshared, refuse_unsplit
from instance.memory import TooLittleMemory, check_tiers, check_weights, loaded_bytes, measure, tiers_bytes
from instance.model import Model
from instance.needs import Needs, settle_format, settle_shape
from instance.plan import MAX_DECODE_ROWS
from instance.processors import check_parts
from instance.server import Instance
from instance.split import WHOLE
from instance.warmup import warm_up
from kvstore.storage import KVStorage
from kvstore.tier_storage import TierStorage, slot_bytes

log = get_logger("instance")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What takes long to load, and can serve any number of epochs."""

    model: Model
    assets: TextAssets
    meeting: Meeting | None = None
    """Of the ranks that share the model."""


def load(config: InstanceConfig) -> Loaded:
    """Find, load and check the model.

    Raises CheckpointError, UnsupportedModel by the name of what is not supported, TooLittleMemory if the GPU can't hold it, or
    the machine what is wanted below the pool, InstanceError if it has fewer processors than the config says.
    """
    check_tiers(config)
    device, place = device_of(config), config.place
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    quantize = None if config.quantize == "none" else config.quantize
    torch.set_num_threads(config.threads)  # this thread has its own; too many made the comparison take 9 s, not 0.7
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means IEEE
        torch.backends.cudnn.allow_tf32 = False
        torch.cuda.set_device(device)  # kernels run here already, in this thread
        check_parts(config.decode_processors, device)
    try:
        if locate(config.model) is None:  # weights that would be refused aren't fetched
            refuse_by_config(fetch_settings(config.model), config.max_context, config.rope_scaling, quantize)
        path = resolve_checkpoint(config.model, cache_dir=config.cache_dir)
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            check_weights(str(device), needed=loaded_bytes(path, dtype, quantize, place), free=free, total=total)
        if config.elastic_tp:
            refuse_unshared(path, f"--elastic-tp {config.elastic_tp}")
        if place != WHOLE:  # before the ranks meet: who comes late would wait for one that has ended
            refuse_unsplit(path, place, config.max_context, config.rope_scaling, quantize)
        meeting = None
        if config.meeting is not None:
            meeting = Meeting.of(config.meeting, place, device, config.host, config.step_timeout_s)
        team = None if meeting is None else meeting.team
        model = load_model(path, dtype, device, config.max_context, config.rope_scaling, quantize, team, place)
        assets = load_text_assets(path)
        if assets.tokenizer_json is None:
            log.warning("no tokenizer: only token ids are served", model=config.model)
    except (CheckpointError, UnsupportedModel, TooLittleMemory):
        raise
    except LOAD_ERRORS as error:
        raise CheckpointError(f"{config.model} can't be loaded: {type(error).__name__}: {error}") from error
    if config.kv_format == "plain":
        model.keep_heads()
    settle_shape(model, config.model, block_size=config.block_size, backend=config.backend)
    if config.reads_pool and model.shape.windows:
        raise UnsupportedModel(
            f"{config.model}: some of its layers see but a window, whose KV --host-memory, --disk and --check-cache don't know"
        )
    _verify(model, config)
    settle_format(model, config.model, config.kv_dtype, block_size=config.block_size, backend=config.backend)
    return Loaded(model, assets, meeting)


def _verify(model: Model, config: InstanceConfig) -> None:
    """Compare the model with transformers' own attention, and fuse its layers on a GPU if that agrees too.

    Raises UnsupportedModel.
    """
    found = _compare(model, config)
    log.info("agrees with transformers' own attention", difference=f"{found:.2g}")
    if model.shape.value_dim:
        log.info(
            "KV is latent", numbers=model.shape.head_dim, of_heads=2 * model.heads_shape.num_heads * model.heads_shape.head_dim
        )
    if model.rotary is not None:
        log.info("rotary frequencies of all texts", rotary=model.rotary, max_context=model.max_context)
    if config.backend != "triton" and not config.elastic_tp:
        return
    reason = model.fuse(config.backend)
    if reason is None:
        try:
            refuse_inexact(model, config.model, block_size=config.block_size, backend=config.backend)
        except UnsupportedModel as error:
            model.unfuse()
            reason = f"fused, {error}"
    if reason is not None and model.is_quantised:  # by kernels of ours in layers of transformers
        refuse_inexact(model, config.model, block_size=config.block_size, backend=config.backend)
    if config.elastic_tp and (model.fused is None or not model.fused.can_share):
        why = reason or "its weights are of 8 bits"
        raise UnsupportedModel(f"{config.model}: --elastic-tp {config.elastic_tp} can't split its layers: {why}")
    log.info("layers", run="fused" if reason is None else f"as transformers has them: {reason}")


def _compare(model: Model, config: InstanceConfig) -> float:
    """The difference from transformers' own attention; of latents only if that is small enough. Raises UnsupportedModel."""
    if model.shape.value_dim:
        try:
            return refuse_inexact(model, config.model, block_size=config.block_size, backend=config.backend)
        except UnsupportedModel as error:
            log.warning("KV of heads, not of latents", reason=str(error))
        model.keep_heads()
        settle_shape(model, config.model, block_size=config.block_size, backend=config.backend)
    return refuse_inexact(model, config.model, block_size=config.block_size, backend=config.backend)


async def lead(config: InstanceConfig, loaded: Loaded, transport: Transport) -> Instance:
    """The instance, once the other ranks that share its model are ready. Raises as `make_instance`, and InstanceError if one of
    them is lost."""
    if loaded.meeting is None:
        return make_instance(config, loaded, transport)
    config = sized(config, loaded.model)
    crew = await Crew.muster(config, loaded.meeting, transport)
    return make_instance(replace(config, kv_tokens=crew.use_pool(config.kv_tokens)), loaded, transport, crew)


def make_instance(config: InstanceConfig, loaded: Loaded, transport: Transport, crew: Crew | None = None) -> Instance:
    """An instance with its pool; needs a running loop. `crew`: of the other ranks, who have pools of the config's size.

    Raises TooLittleMemory, and AddressError if `--host` can't be bound.
    """
    model = loaded.model
    if crew is None:
        config = sized(config, model)
    storage = make_pool(config, model)
    own = model.fingerprint()
    fingerprint = own if crew is None else crew.fingerprint(own)
    spec = _make_spec(config, loaded, fingerprint, storage.num_blocks, _needs(config, model).kv.windows)
    return Instance(config, model, loaded.assets, spec, storage, transport, make_tiers(config, storage), crew)


def sized(config: InstanceConfig, model: Model) -> InstanceConfig:
    """The config with as many tokens of KV as fit beside the model, if it doesn't say how many. Raises TooLittleMemory."""
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
    return size_pool(config, model, _needs(config, model))


def make_pool(config: InstanceConfig, model: Model) -> KVStorage:
    """The pool, with all kernels tried on it. `config`: sized. Raises TooLittleMemory."""
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
    needs = _needs(config, model)
    storage = _make_storage(config, model, needs)
    tokens = config.num_blocks * config.block_size
    log.info(
        "model loaded",
        model=config.model,
        device=str(model.device),
        kernels=config.backend,
        weights=_mib(needs.weights),
        attention_scratch=_mib(needs.attention),
        sampling_scratch=_mib(needs.sampling),
    )
    log.info(
        "KV pool",
        tokens=tokens,
        cell_tokens=tokens * config.cell_size,
        cell_size=config.cell_size,
        blocks=storage.num_blocks,
        block_bytes=storage.block_bytes,
        memory=_mib(storage.nbytes),
        dtype=str(storage.format.dtype).removeprefix("torch."),
    )
    warm_up(model, storage, config.backend, config.chunk_tokens)
    return storage


def size_pool(config: InstanceConfig, model: Model, needs: Needs) -> InstanceConfig:
    """The config with the pool's tokens: `kv_memory` becomes what the GPU has left; given tokens are checked against that.

    The CPU's memory is not measured. Raises TooLittleMemory.
    """
    if model.device.type == "cpu":
        return config
    budget = measure(model, needs, fraction=1 if config.kv_memory is None else config.kv_memory)
    if config.reads_pool:
        budget = replace(budget, reserve=budget.reserve + tiers_bytes(needs.kv.block))
    log.info("GPU memory", **budget.describe())
    if config.kv_tokens is not None:
        budget.check(config.num_blocks * config.block_size, needs.kv)
        return config
    return replace(config, kv_memory=None, kv_tokens=budget.most_tokens(needs.kv))


def device_of(config: InstanceConfig) -> torch.device:
    """The device that this process drives."""
    return torch.device("cpu") if config.device == "cpu" else torch.device("cuda", config.gpu)


def _needs(config: InstanceConfig, model: Model) -> Needs:
    return Needs.of(
        model,
        block_size=config.block_size,
        chunk_tokens=config.chunk_tokens,
        cell_size=config.cell_size,
        backend=config.backend,
        splits=config.decode_processors,
    )


def _make_storage(config: InstanceConfig, model: Model, needs: Needs) -> KVStorage:
    try:
        return model.make_storage(needs.kv.blocks(config.num_blocks * config.block_size), config.block_size)
    except (MemoryError, RuntimeError) as error:  # torch's out of memory is a RuntimeError, on a GPU and on the CPU
        tokens = config.num_blocks * config.block_size
        needed = needs.kv.bytes_of(tokens)
        raise TooLittleMemory(
            f"--kv-tokens {tokens:,} needs {_mib(needed)} on {model.device} ({needed // tokens:,} bytes a token): {error}"
        ) from error


def make_tiers(config: InstanceConfig, storage: KVStorage) -> TierStorage | None:
    """What lies below the pool, or reads it to check it; None: nothing does. Raises TooLittleMemory."""
    if not config.reads_pool:
        return None
    host_slots = config.host_memory // storage.block_bytes
    disk_slots = config.disk_bytes // slot_bytes(storage.block_bytes)
    for flag, given, slots in (("--host-memory", config.host_memory, host_slots), ("--disk", config.disk_bytes, disk_slots)):
        if given and not slots:
            raise TooLittleMemory(f"{flag} {given:,} bytes don't hold one block of {storage.block_bytes:,} bytes")
    try:
        tiers = TierStorage(storage, host_slots=host_slots, disk_slots=disk_slots, folder=config.disk)
    except (MemoryError, OSError) as error:
        raise TooLittleMemory(f"below the pool: {error}") from error
    sizes = {"host_tokens": host_slots * config.block_size, "disk_tokens": disk_slots * config.block_size}
    log.info("below the pool", **sizes, block_bytes=storage.block_bytes, checks_pool=config.check_cache)
    return tiers


def _make_spec(config: InstanceConfig, loaded: Loaded, fingerprint: str, num_blocks: int, windows: list[int]) -> InstanceSpec:
    """What this instance tells the gManager of itself."""
    model = loaded.model
    return InstanceSpec(
        model=config.model if config.served_model_name is None else config.served_model_name,
        fingerprint=fingerprint,
        tokenizer=hashlib.sha256(repr(loaded.assets).encode()).hexdigest(),
        dtype=str(model.shape.dtype).removeprefix("torch."),
        layers="as transformers has them" if model.fused is None else "fused",
        rotary=model.rotary or "",
        kv_dtype="" if config.kv_dtype == "auto" else config.kv_dtype,
        block_size=config.block_size,
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        num_blocks=num_blocks,
        windows=windows,
        tp=config.place.parts,
        pp=model.place.stages,
        pp_layers=list(model.place.layers),
        elastic_tp=str(config.elastic_tp) if config.elastic_tp else "",
        chunk_tokens=config.chunk_tokens,
        decode_rows=MAX_DECODE_ROWS,
        reach=model.reach(),
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        host=host_of_this_process(visible_gpus() if model.device.type == "cuda" else []),
        other_names=list(config.other_names),
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
