"""`distattn up`: everything that a service needs, on this machine."""

import asyncio
import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from gmanager.cli.assets import MODEL, FetchError, cache_dir, fetch
from gmanager.cli.process import ProcessEnded, ServiceError
from gmanager.cli.progress import shown_running
from gmanager.cli.service import Service, ServiceConfig
from gmanager.cli.starts import in_use, logs_of_this_start
from gmanager.cli.upkeep import keep_up
from gmanager.client import AsyncClient
from gmanager.cluster.policies import POLICIES
from gmanager.config import GManagerConfig
from gmanager.gateway.config import GatewayConfig, parse_address, parse_aliases, read_keys
from gmanager.wire.channel import check_address
from gmanager.wire.errors import AddressError
from gmanager.wire.scaling import RopeScaling, lengths, parse_scaling
from gmanager.wire.sizes import parse_disk, parse_size

CPU_KV_TOKENS = 8192
"""Of each instance, unless told otherwise: room for a few conversations, 0.7 GB with the default model."""
DEFAULT = "default"
"""What the small model is called that needs no hub."""
DEFAULT_NAME = "SmolLM2-135M-Instruct"
HUB_S = 10.0
"""For the hub to say whether it has a model."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NEEDED = {"torch": "serve", "transformers": "serve", "tokenizers": "serve", "fastapi": "http", "uvicorn": "http"}


class CannotStart(Exception):
    """Something is wrong before anything was started; the message is one sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What the user asked for."""

    model: str
    instances: int
    tp: int
    """GPUs, or on the CPU processes, of each stage."""
    pp: int
    """Stages of each."""
    pp_layers: str | None
    elastic_tp: str
    device: str
    http: str | None
    bind: str
    kv_tokens: int | None
    kv_memory: float | None
    max_context: int | None
    rope_scaling: str | None
    dtype: str
    kv_dtype: str
    quantize: str
    names: tuple[str, ...]
    prefix_cache: bool
    host_memory: str | None
    disk: str | None
    """Of each instance, below its pool."""
    check_cache: bool
    journal: Path | None
    policy: str
    roles: tuple[str, ...]
    slo_ttft_s: float | None
    slo_tpot_s: float | None
    api_key_file: Path | None
    allow_origins: tuple[str, ...]
    aliases: tuple[str, ...]
    """`ALIAS=NAME` each."""
    strict: bool
    trust_special_tokens: bool
    logs: Path | None


def bring_up(wanted: Wanted) -> int:
    """Start all, and serve until Ctrl-C. The exit code: 0 after Ctrl-C, 1 if a process ended, 2 if it can't be started."""
    console = Console(stderr=True, highlight=False)
    try:
        config = check(wanted)
    except CannotStart as error:
        console.print(f"distattn: {error}", markup=False, soft_wrap=True)
        return 2
    try:
        with in_use(config.logs):
            return asyncio.run(_serve(config, console))
    except ProcessEnded as error:
        console.print(f"distattn: {error}; all is stopped", markup=False, soft_wrap=True)
    except ServiceError as error:
        console.print(f"distattn: {error}", markup=False, soft_wrap=True)
    return 1


def check(wanted: Wanted) -> ServiceConfig:
    """What is to be started. Raises CannotStart while nothing is."""
    for package, extra in _NEEDED.items():
        if importlib.util.find_spec(package) is None and (extra == "serve" or wanted.http is not None):
            raise CannotStart(f"{package} is not installed: pip install 'distattn[{extra}]'")
    if wanted.device not in ("auto", "cpu", "cuda"):
        raise CannotStart(f"--device must be auto, cpu or cuda, got {wanted.device}")
    gpus, ranks = count_gpus(), wanted.tp * wanted.pp
    device = wanted.device
    if device == "auto":
        device = "cuda" if gpus >= wanted.instances * ranks else "cpu"
    if device == "cuda" and gpus < wanted.instances * ranks:
        many = f"{wanted.instances} instances need as many GPUs"
        if ranks > 1:
            many = f"{wanted.instances} instances of {ranks} ranks need {wanted.instances * ranks} GPUs"
        raise CannotStart(f"{many}; this machine has {gpus}")
    try:
        GManagerConfig(bind=wanted.bind, policy=wanted.policy)
        for flag, seconds in (("--slo-ttft", wanted.slo_ttft_s), ("--slo-tpot", wanted.slo_tpot_s)):
            if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
                raise CannotStart(f"{flag} must be a positive number of seconds, got {seconds:g}")
        check_address(wanted.bind)
        host, _, port = wanted.bind.removeprefix("tcp://").rpartition(":")
        check_port(host, port, "--bind")
        if wanted.http is not None:
            name, number = parse_address(wanted.http)
            GatewayConfig(host=name, port=number)
            check_port(name, str(number), "--http")
            GatewayConfig(allow_origins=wanted.allow_origins, aliases=parse_aliases(wanted.aliases))
        if wanted.api_key_file is not None:
            GatewayConfig(api_keys=tuple(read_keys(wanted.api_key_file)))
    except (AddressError, ValueError) as error:
        raise CannotStart(str(error)) from error
    except OSError as error:
        raise CannotStart(f"{wanted.api_key_file} can't be read (--api-key-file): {error.strerror}") from error
    if wanted.journal is not None and not wanted.journal.expanduser().absolute().parent.is_dir():
        raise CannotStart(f"{wanted.journal} can't be made (--journal): there is no such directory")
    kv_tokens = wanted.kv_tokens
    if device == "cpu" and kv_tokens is None and wanted.kv_memory is None:
        kv_tokens = CPU_KV_TOKENS
    try:
        config = ServiceConfig(
            model=wanted.model,
            served_model_name=wanted.names[0] if wanted.names else None,
            other_names=wanted.names[1:],
            instances=wanted.instances,
            tp=wanted.tp,
            pp=wanted.pp,
            pp_layers=wanted.pp_layers,
            elastic_tp=wanted.elastic_tp,
            kv_tokens=kv_tokens,
            kv_memory=wanted.kv_memory,
            max_context=wanted.max_context,
            rope_scaling=None if wanted.rope_scaling is None else parse_scaling(wanted.rope_scaling),
            device=device,
            kv_dtype=wanted.kv_dtype,
            dtype="float32" if device == "cpu" and wanted.dtype == "auto" else wanted.dtype,
            quantize=wanted.quantize,
            threads=max(1, len(os.sched_getaffinity(0)) // (wanted.instances * ranks)),
            logs=logs_of_this_start(wanted.logs or cache_dir() / "logs"),
            ready_timeout_s=3600,
            bind=wanted.bind,
            policy=wanted.policy,
            roles=wanted.roles,
            http=wanted.http,
            prefix_cache=wanted.prefix_cache,
            host_memory=wanted.host_memory,
            disk=wanted.disk,
            check_cache=wanted.check_cache,
            journal=None if wanted.journal is None else wanted.journal.expanduser().absolute(),
            slo_ttft_s=wanted.slo_ttft_s,
            slo_tpot_s=wanted.slo_tpot_s,
            api_key_file=wanted.api_key_file,
            gateway_flags=_gateway_flags(wanted),
        )
    except ValueError as error:
        raise CannotStart(str(error)) from error
    _check_tiers(wanted)
    model, name = find_model(wanted.model)  # last: it may take long
    _check_context(model, wanted.max_context, config.rope_scaling)
    return replace(config, model=model, served_model_name=config.served_model_name or name)


def _gateway_flags(wanted: Wanted) -> tuple[str, ...]:
    return (
        *(f"--allow-origin={origin}" for origin in wanted.allow_origins),
        *(f"--model-alias={alias}" for alias in wanted.aliases),
        *(["--strict"] if wanted.strict else []),
        *(["--trust-special-tokens"] if wanted.trust_special_tokens else []),
    )


def _check_tiers(wanted: Wanted) -> None:
    """Raises CannotStart if all instances together want more below their pools than this machine has."""
    if not wanted.prefix_cache and (wanted.host_memory or wanted.disk):
        raise CannotStart("--host-memory and --disk keep what --prefix-cache off lets go: give one or the other")
    count = f"{wanted.instances} instance{'s' if wanted.instances > 1 else ''}"
    each = 0 if wanted.host_memory is None else parse_size(wanted.host_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted.instances * each > total:
        asked = f"{count} x --host-memory {wanted.host_memory} = {wanted.instances * each:,} bytes"
        raise CannotStart(f"{asked}; this machine has {total:,}")
    if wanted.disk is None:
        return
    folder, size = parse_disk(wanted.disk)
    if not folder.is_dir():
        raise CannotStart(f"--disk: there is no directory {folder}")
    free = shutil.disk_usage(folder).free
    if wanted.instances * size > free:
        asked = f"{count} x --disk {wanted.disk} = {wanted.instances * size:,} bytes"
        raise CannotStart(f"{asked}; there are {free:,} free")


def check_port(host: str, port: str, flag: str) -> None:
    """Raises CannotStart if it is taken, or the host isn't this machine's."""
    if port in ("*", "0"):
        return
    host = "0.0.0.0" if host == "*" else host.removeprefix("[").removesuffix("]")
    try:
        family, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = "is in use" if error.errno == 98 else f"can't be taken ({error.strerror})"
        raise CannotStart(f"port {port} of {host} {reason}: choose another with {flag}") from error


def find_model(given: str) -> tuple[str, str]:
    """What the instances are told, and what requests call it. Raises CannotStart if there is no such model."""
    if given == DEFAULT:
        try:
            return str(fetch(MODEL, cache_dir() / "model")[0]), DEFAULT_NAME
        except FetchError as error:
            raise CannotStart(f"the default model can't be fetched: {error}") from error
    path = Path(given).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CannotStart(f"{path} holds no config.json: it is no model")
        if not any(path.glob("*.safetensors")):
            raise CannotStart(f"{path} holds no weights in safetensors")
        return str(path.resolve()), path.resolve().name
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CannotStart(f"there is no file {path}")
        return str(path.resolve()), path.stem
    if path.exists() or given.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(given):
        raise CannotStart(f"{given} is no directory, no GGUF file, and no hub id like Qwen/Qwen3-0.6B")
    _check_hub(given)
    return given, given


def _check_context(model: str, asked: int | None, scaling: RopeScaling | None) -> None:
    """Raises CannotStart if a directory's config says that the model takes fewer tokens, or can't be scaled so. Of others its
    instances will know."""
    file = Path(model) / "config.json"
    if not file.is_file():
        return
    try:
        whole = json.loads(file.read_bytes())
        config = {**whole, **(whole.get("text_config") or {})}
        stated = isinstance(config.get("max_position_embeddings"), int)
    except (ValueError, TypeError, AttributeError):
        return  # it is no config, which the instances say better
    if not stated:
        return  # it is as transformers has it for this kind of model
    try:
        found = lengths(config, scaling)
    except ValueError as error:
        raise CannotStart(f"{model}: {error}") from error
    if found is not None and asked is not None and asked > found.most:
        scaled = "" if scaling is None else f" with --rope-scaling {scaling}"
        raise CannotStart(f"--max-context {asked:,} is more than the {found.most:,} tokens that {model} takes{scaled}")


def _check_hub(name: str) -> None:
    """Raises CannotStart if no model of that name is in the hub's cache, nor at the hub."""
    from huggingface_hub import HfApi, try_to_load_from_cache  # half a second, for those who need it
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=HUB_S)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CannotStart(f"{name} is no directory, and the hub has no model of that name") from error
    except Exception as error:  # among others those of the HTTP library, of which the hub's versions use different ones
        reason = str(error).strip().splitlines()[0]
        raise CannotStart(f"{name} is no directory, not in the hub's cache, and the hub can't be asked: {reason}") from error


def count_gpus() -> int:
    """NVIDIA GPUs of this machine, as far as CUDA_VISIBLE_DEVICES lets them be seen; torch is not asked."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    folder = Path("/proc/driver/nvidia/gpus")
    count = len(list(folder.iterdir())) if folder.is_dir() else 0
    return count if visible is None else min(count, len([part for part in visible.split(",") if part.strip()]))


async def _serve(config: ServiceConfig, console: Console) -> int:
    """Start, say where, and wait for Ctrl-C. Raises ServiceError."""
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup: a terminal that is closed is not to end it
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    serving = asyncio.create_task(_run(config, console))
    asked = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait([serving, asked], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        console.print("stopping")
        return 0
    finally:
        asked.cancel()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError, ServiceError):
            await serving


async def _run(config: ServiceConfig, console: Console) -> None:
    began = time.monotonic()
    async with shown_running(config, console) as service:
        async with AsyncClient(service.address) as client:
            tokens = sum(cell.total_tokens for cell in (await client.stats()).cells)
            reads_text = (await client.text_assets()).tokenizer_json is not None
        _announce(console, config, service, tokens, time.monotonic() - began, reads_text=reads_text)
        await keep_up(service, lambda line: console.print(line, markup=False, soft_wrap=True))


def roles_lack(config: ServiceConfig) -> str | None:
    """What the policy misses among the instances' roles, so that all serve as if mixed; None: nothing."""
    return POLICIES[config.policy]().wrong_with(config.roles or ("mixed",) * config.instances)


def _announce(
    console: Console, config: ServiceConfig, service: Service, tokens: int, seconds: float, *, reads_text: bool
) -> None:
    ranks = f" of {config.ranks} ranks" if config.ranks > 1 else ""
    where = f"{config.instances} instance{'s' if config.instances > 1 else ''}{ranks} ({config.device})"
    names = " or ".join([config.served_model_name or config.model, *config.other_names])
    lines = [
        f"ready in {seconds:.0f} s: {names} on {where}, {tokens:,} tokens of KV",
        *([f"  HTTP    {service.url}/v1"] if service.url else []),
        f"  client  {service.address}",
        *([] if reads_text else ["  text    none: the model has no tokenizer, prompts are token ids"]),
        *([] if (wrong := roles_lack(config)) is None else [f"  roles   {wrong}"]),
        f"  logs    {config.logs}",
        "Ctrl-C stops it. Elsewhere: distattn chat, status, top",
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
