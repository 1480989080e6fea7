"""Start a gManager, a gateway and a torchrun for each instance on this machine, wait until they serve, and stop them again."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Never, TypeVar, get_args

from gmanager.cli.process import Process, ProcessEnded, ServiceError, stop_all
from gmanager.cli.said import is_echo, stage_of_instances, why_instance_ended
from gmanager.client import AsyncClient
from gmanager.wire.errors import DistattnError
from gmanager.wire.messages import Role
from gmanager.wire.scaling import RopeScaling
from gmanager.wire.sizes import check_layers, check_sharing, parse_disk, parse_elastic, parse_layers, parse_size

T = TypeVar("T")

BLOCK_SIZE = {"cpu": 16, "cuda": 64}
"""Tokens in a block of an instance, by its device; the instances' own default."""

ECHO_S = 2.0
"""Who is killed ends the others of its cell while that forms: its torchrun says so within that time."""

QUANTIZE = ("none", "fp8", "int8", "int8-32")
DTYPES = ("auto", "float32", "float16", "bfloat16")
KV_DTYPES = ("auto", "fp8", "int8")

SLACK = 64
"""KV tokens beside the longest prompt: its answer, and a block or two."""


def pool_tokens(contexts: Sequence[int], instances: int) -> int:
    """KV tokens of each instance: 5/8 of the longest prompt and its answer on two, so that it fits on none of several."""
    longest = max(contexts) + SLACK
    if instances == 1:
        return longest + SLACK
    return -(-5 * longest // (4 * instances))


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What to start."""

    model: str
    instances: int
    kv_tokens: int | None
    """Of each instance; None: on a GPU, what its memory holds."""
    kv_memory: float | None = None
    device: str = "cpu"
    dtype: str = "float32"
    quantize: str = "none"
    threads: int = 1
    spread: str = "auto"
    policy: str = "elastic"
    roles: tuple[str, ...] = ()
    """Of each instance; none: all are mixed."""
    chunk_tokens: int | None = None
    copy_tokens: int | None = None
    """KV that an instance copies beside a step; None: its own default."""
    host_memory: str | None = None
    """Of each instance, for cached KV that its pool has no room for, as 64G; None: none."""
    disk: str | None = None
    """Likewise, as DIR:SIZE."""
    check_cache: bool = False
    """Whether instances compare cached KV with what was written."""
    cache_dir: Path | None = None
    logs: Path
    ready_timeout_s: float = 300
    bind: str = "tcp://127.0.0.1:*"
    """Of the gManager."""
    http: str | None = None
    """HOST:PORT of a gateway; None: none is started."""
    prefix_cache: bool = True
    journal: Path | None = None
    """Of the gManager."""
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    """The gManager's objectives; None: it has none."""
    api_key_file: Path | None = None
    gateway_flags: tuple[str, ...] = ()
    """What the gateway is told besides."""
    served_model_name: str | None = None
    other_names: tuple[str, ...] = ()
    """By which requests may ask for the model, too."""
    max_context: int | None = None
    """Tokens of the longest sequence; None: as the model's config says."""
    rope_scaling: RopeScaling | None = None
    """Of its rotary frequencies; None: what its config says."""
    kv_dtype: str = "auto"
    """How KV is stored; auto: in the model's dtype."""
    tp: int = 1
    """Ranks, and GPUs, of each stage of an instance."""
    pp: int = 1
    """Stages of each instance."""
    pp_layers: str | None = None
    """Layers of each stage, with commas between; None: as even as can be."""
    elastic_tp: str = "off"
    """Most rows of a decode step whose dense layers the instances share; or auto, or off."""

    def __post_init__(self) -> None:
        """Raises ValueError for what an instance would refuse, before one is started."""
        if self.kv_tokens is not None:
            if self.kv_memory is not None:
                raise ValueError(f"give --kv-tokens or --kv-memory, not both (got {self.kv_tokens} and {self.kv_memory})")
            block = BLOCK_SIZE[self.device]
            if self.kv_tokens < block:
                raise ValueError(f"--kv-tokens {self.kv_tokens} is less than one block of {block} tokens")
        elif self.device == "cpu":
            got = "" if self.kv_memory is None else f" and takes no --kv-memory (got {self.kv_memory})"
            raise ValueError(f"an instance on the CPU needs --kv-tokens{got}")
        elif self.kv_memory is not None and not 0 < self.kv_memory < 1:
            raise ValueError(f"--kv-memory must be in (0, 1), got {self.kv_memory}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"--kv-dtype must be one of {', '.join(KV_DTYPES)}, got {self.kv_dtype}")
        if self.quantize not in QUANTIZE:
            raise ValueError(f"--quantize must be one of {', '.join(QUANTIZE)}, got {self.quantize}")
        if "" in (self.served_model_name, *self.other_names):
            raise ValueError("--served-model-name must not be empty")
        if self.roles and (len(self.roles) != self.instances or not set(self.roles) <= set(get_args(Role))):
            known = ", ".join(get_args(Role))
            raise ValueError(f"--roles must be {self.instances} of {known}, with commas between, got {','.join(self.roles)}")
        for flag, given, parse in (("--host-memory", self.host_memory, parse_size), ("--disk", self.disk, parse_disk)):
            if given is not None:
                try:
                    parse(given)
                except ValueError as error:
                    raise ValueError(f"{flag}: {error}") from error
        for flag, degree in (("--tp", self.tp), ("--pp", self.pp)):
            if degree < 1:
                raise ValueError(f"{flag} must be at least 1, got {degree}")
        if self.pp_layers is not None:
            check_layers(parse_layers(self.pp_layers), self.pp)
        if sharing := parse_elastic(self.elastic_tp):
            check_sharing(sharing, ranks=self.ranks, quantize=self.quantize)
        if self.max_context is not None and self.max_context < 1:
            raise ValueError(f"--max-context must be at least 1, got {self.max_context}")

    @property
    def ranks(self) -> int:
        """Processes, and GPUs, of each instance."""
        return self.tp * self.pp


@dataclass(kw_only=True)
class Service:
    """A running one."""

    gmanager: Process
    address: str = ""
    """Of the gManager."""
    gateway: Process | None = None
    url: str | None = None
    """Of the gateway."""
    instances: list[Process] = field(default_factory=list)
    """The torchrun of each, by its number in the cell."""
    keeps_journal: bool = False
    """Another gManager can go on with what this one knows."""

    @property
    def processes(self) -> list[Process]:
        """In the order in which they were started."""
        return [self.gmanager, *([] if self.gateway is None else [self.gateway]), *self.instances]

    async def check(self) -> None:
        """Raises ProcessEnded if a process has ended; if several have, by what the others ended."""
        ended = [process for process in self.processes if process.code is not None]
        if ended and all(is_echo(process.why()) for process in ended):
            await asyncio.sleep(ECHO_S)
            ended = [process for process in self.processes if process.code is not None]
        if ended:
            raise ProcessEnded(min(ended, key=lambda process: is_echo(process.why())))

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is given up if one of the processes ends. Raises ServiceError, and what `work` raises."""
        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
            return await working
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _watch(self) -> Never:
        while True:
            await self.check()
            await asyncio.sleep(0.5)

    def stop(self) -> None:
        """End all: the instances first, which tell the gManager that they leave. With a journal the gManager first, whose next
        one goes on with what runs: that instances leave would end it."""
        if self.keeps_journal:
            stop_all([self.gmanager])
        stop_all(self.instances)
        stop_all([] if self.gateway is None else [self.gateway])
        stop_all([self.gmanager])


@asynccontextmanager
async def running(config: ServiceConfig, tell: Callable[[str], None] = lambda stage: None) -> AsyncIterator[Service]:
    """A service that is ready when entered, and gone when left. `tell` hears what is being waited for. Raises ServiceError."""
    config.logs.mkdir(parents=True, exist_ok=True)
    tell("starting the gManager")
    gmanager = Process("the gManager", _gmanager(config, config.bind), config.logs / "gmanager.log")
    service = Service(gmanager=gmanager, keeps_journal=config.journal is not None)
    try:
        service.address = await _said(service.gmanager, "tcp://")
        service.gmanager.command = _gmanager(config, service.address)
        if config.http is not None:
            command = _gateway(config, service.address, config.http)
            service.gateway = Process("the gateway", command, config.logs / "gateway.log")
            service.url = await _said(service.gateway, "http://")
            service.gateway.command = _gateway(config, service.address, service.url.removeprefix("http://"))
        for number in range(config.instances):
            name = f"instance {number}"
            log = config.logs / f"instance-{number}.log"
            command = _instance(config, service.address, number)
            process = Process(f"the torchrun of {name}", command, log, partial(why_instance_ended, name))
            service.instances.append(process)
        await _ready(service, config, tell)
        yield service
    finally:
        service.stop()


def _gmanager(config: ServiceConfig, bind: str) -> list[str]:
    flags = {
        "--spread": config.spread,
        "--policy": config.policy,
        "--prefix-cache": "on" if config.prefix_cache else "off",
        "--journal": config.journal,
        "--slo-ttft": config.slo_ttft_s,
        "--slo-tpot": config.slo_tpot_s,
    }
    given = [f"{flag}={value}" for flag, value in flags.items() if value is not None]
    return [sys.executable, "-m", "gmanager", "--bind", bind, *given]


def _gateway(config: ServiceConfig, address: str, bind: str) -> list[str]:
    keys = [] if config.api_key_file is None else ["--api-key-file", str(config.api_key_file)]
    command = [sys.executable, "-m", "gmanager.gateway", "--gmanager", address, "--bind", bind]
    return [*command, *config.gateway_flags, *keys]


def _instance(config: ServiceConfig, address: str, number: int) -> list[str]:
    """A torchrun for each, so that the loss of one doesn't end the others. Who is lost is started again by `Upkeep`, which sees
    why it ended, and not by torchrun, which would start one with wrong settings again, too."""
    torchrun = [sys.executable, "-m", "instance.torchrun", "--standalone", f"--nproc-per-node={config.ranks}"]
    flags = {
        "--gmanager": address,
        "--model": config.model,
        "--cell-size": config.instances,
        "--id": number,
        "--gpu": number * config.ranks if config.device == "cuda" else None,
        "--kv-tokens": config.kv_tokens,
        "--kv-memory": config.kv_memory,
        "--device": config.device,
        "--dtype": config.dtype,
        "--kv-dtype": config.kv_dtype,
        "--quantize": None if config.quantize == "none" else config.quantize,
        "--threads": config.threads,
        "--chunk-tokens": config.chunk_tokens,
        "--copy-tokens": config.copy_tokens,
        "--host-memory": config.host_memory,
        "--disk": config.disk,
        "--cache-dir": config.cache_dir,
        "--max-context": config.max_context,
        "--rope-scaling": config.rope_scaling,
        "--tp": config.tp if config.tp > 1 else None,
        "--pp": config.pp if config.pp > 1 else None,
        "--pp-layers": config.pp_layers,
        "--elastic-tp": None if config.elastic_tp == "off" else config.elastic_tp,
        "--role": config.roles[number] if config.roles else None,
    }
    names = [f"--served-model-name={name}" for name in (config.served_model_name, *config.other_names) if name is not None]
    given = [f"{flag}={value}" for flag, value in flags.items() if value is not None]
    checks = ["--check-cache"] if config.check_cache else []
    return [*torchrun, "-m", "instance", *given, *checks, *names]


async def _said(process: Process, beginning: str) -> str:
    """The first word that begins so in what a process prints: it chose a free port, and says which."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        process.check()
        for line in process.text().splitlines(keepends=True):
            words = [word for word in line.split() if word.startswith(beginning)]
            if words and line.endswith("\n"):
                return words[0].rstrip(".,")
        await asyncio.sleep(0.05)
    raise ServiceError(f"{process.name} did not say where it listens:\n{process.tail()}")


async def _ready(service: Service, config: ServiceConfig, tell: Callable[[str], None]) -> None:
    deadline = time.monotonic() + config.ready_timeout_s
    what = f"{config.instances} instance{'s' if config.instances > 1 else ''} ({config.device})"
    async with AsyncClient(service.address) as client:
        while True:
            await service.check()
            try:
                cells = (await client.stats()).cells
            except DistattnError as error:
                raise ServiceError(f"the gManager does not answer: {error}") from error
            if any(cell.state == "ready" for cell in cells):
                return
            stage = stage_of_instances([instance.text() for instance in service.instances])
            tell(f"{what} {stage}{f' {config.model}' if stage in ('load', 'convert') else ''}")
            if time.monotonic() > deadline:
                tails = "\n".join(instance.tail() for instance in service.instances)
                raise ServiceError(f"not ready after {config.ready_timeout_s:.0f} s:\n{tails}")
            await asyncio.sleep(0.1)
