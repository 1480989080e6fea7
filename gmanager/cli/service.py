"""Start a gManager, a torchrun of instances and a gateway on this machine, wait until they serve, and stop them again."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Never, TypeVar

from gmanager.cli.said import last_words, stage_of_instances, why_instances_ended
from gmanager.client import AsyncClient
from gmanager.wire.errors import DistattnError

T = TypeVar("T")

STOP_S = 15.0
"""Between asking a process to end and killing it."""

_LEASH = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes a program that is asked to end when the process that started it is gone, however that came."""

NO_BARS = {"TQDM_DISABLE": "1"}
"""Environment in which libraries draw no progress bars of their own."""

BLOCK_SIZE = {"cpu": 16, "cuda": 64}
"""Tokens in a block of an instance, by its device; the instances' own default."""

DTYPES = ("auto", "float32", "float16", "bfloat16")

SLACK = 64
"""KV tokens beside the longest prompt: its answer, and a block or two."""


def pool_tokens(contexts: Sequence[int], instances: int) -> int:
    """KV tokens of each instance: 5/8 of the longest prompt and its answer on two, so that it fits on none of several."""
    longest = max(contexts) + SLACK
    if instances == 1:
        return longest + SLACK
    return -(-5 * longest // (4 * instances))


class ServiceError(Exception):
    """The service did not come up, or went down; the message says why."""


class ProcessEnded(ServiceError):
    """One of the processes is gone; the message is one line: what it said itself of the reason, and where its log is."""

    def __init__(self, process: "Process", code: int) -> None:
        super().__init__(f"{process.why(code)} (log: {process.log})")


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
    threads: int = 1
    spread: str = "auto"
    chunk_tokens: int | None = None
    cache_dir: Path | None = None
    logs: Path
    ready_timeout_s: float = 300
    bind: str = "tcp://127.0.0.1:*"
    """Of the gManager."""
    http: str | None = None
    """HOST:PORT of a gateway; None: none is started."""
    api_key_file: Path | None = None
    gateway_flags: tuple[str, ...] = ()
    """What the gateway is told besides."""
    served_model_name: str | None = None
    other_names: tuple[str, ...] = ()
    """By which requests may ask for the model, too."""
    max_context: int | None = None
    """Tokens of the longest sequence; None: as the model's config says."""

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
        if "" in (self.served_model_name, *self.other_names):
            raise ValueError("--served-model-name must not be empty")
        if self.max_context is not None and self.max_context < 1:
            raise ValueError(f"--max-context must be at least 1, got {self.max_context}")


@dataclass
class Service:
    """A running one."""

    address: str
    """Of the gManager."""
    url: str | None = None
    """Of the gateway."""
    processes: list["Process"] = field(default_factory=list)

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
            for process in self.processes:
                process.check()
            await asyncio.sleep(0.5)


class Process:
    """A child in a process group of its own, its output in a file. It does not outlive this process."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, explain: Callable[[str], str | None] = lambda text: None
    ) -> None:
        """`explain`: the reason of its end in a sentence, from its log, if that has it."""
        self.name = name
        self.log = log
        self._explain = explain
        leash = [sys.executable, "-ISc", _LEASH, str(os.getpid())]
        with log.open("wb") as out:
            self._child = subprocess.Popen(
                [*leash, *command],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | NO_BARS,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def check(self) -> None:
        """Raises ServiceError if it has ended."""
        code = self._child.poll()
        if code is not None:
            raise ProcessEnded(self, code)

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.text().splitlines()[-lines:])

    def why(self, code: int) -> str:
        """How it ended, with that exit code."""
        if code < 0:  # who is killed doesn't say why
            return f"{self.name} was killed by {signal.Signals(-code).name}"
        words = last_words(self.text())
        return self._explain(self.text()) or f"{self.name} ended with exit code {code}{f': {words}' if words else ''}"

    def stop(self) -> None:
        """Ask it to end, wait, and kill what is left of its group."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                print(f"{self.name} did not end within {STOP_S:.0f} s and is killed", file=sys.stderr)
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # nothing was left
        self._child.wait()


@asynccontextmanager
async def running(config: ServiceConfig, tell: Callable[[str], None] = lambda stage: None) -> AsyncIterator[Service]:
    """A service that is ready when entered, and gone when left. `tell` hears what is being waited for. Raises ServiceError."""
    config.logs.mkdir(parents=True, exist_ok=True)
    service = Service("")
    python = [sys.executable, "-m"]
    try:
        tell("starting the gManager")
        command = [*python, "gmanager", "--bind", config.bind, "--spread", config.spread]
        gmanager = Process("the gManager", command, config.logs / "gmanager.log")
        service.processes.append(gmanager)
        service.address = await _said(gmanager, "tcp://")
        if config.http is not None:
            command = [*python, "gmanager.gateway", "--gmanager", service.address, "--bind", config.http, *config.gateway_flags]
            keys = [] if config.api_key_file is None else ["--api-key-file", str(config.api_key_file)]
            gateway = Process("the gateway", [*command, *keys], config.logs / "gateway.log")
            service.processes.append(gateway)
            service.url = await _said(gateway, "http://")
        instances = Process(
            "the torchrun of the instances",
            _instances(config, service.address),
            config.logs / "instances.log",
            why_instances_ended,
        )
        service.processes.append(instances)
        await _ready(service, config, tell)
        yield service
    finally:
        for process in reversed(service.processes):
            process.stop()


def _instances(config: ServiceConfig, address: str) -> list[str]:
    torchrun = [sys.executable, "-m", "instance.torchrun", "--standalone", f"--nproc-per-node={config.instances}"]
    flags = {
        "--gmanager": address,
        "--model": config.model,
        "--kv-tokens": config.kv_tokens,
        "--kv-memory": config.kv_memory,
        "--device": config.device,
        "--dtype": config.dtype,
        "--threads": config.threads,
        "--chunk-tokens": config.chunk_tokens,
        "--cache-dir": config.cache_dir,
        "--max-context": config.max_context,
    }
    names = [f"--served-model-name={name}" for name in (config.served_model_name, *config.other_names) if name is not None]
    given = [f"{flag}={value}" for flag, value in flags.items() if value is not None]
    return [*torchrun, "-m", "instance", *given, *names]


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
    instances = service.processes[-1]
    async with AsyncClient(service.address) as client:
        while True:
            for process in service.processes:
                process.check()
            try:
                cells = (await client.stats()).cells
            except DistattnError as error:
                raise ServiceError(f"the gManager does not answer: {error}") from error
            if any(cell.state == "ready" for cell in cells):
                return
            stage = stage_of_instances(instances.text(), config.instances)
            tell(f"{what} {stage}{f' {config.model}' if stage in ('load', 'convert') else ''}")
            if time.monotonic() > deadline:
                raise ServiceError(f"not ready after {config.ready_timeout_s:.0f} s:\n{instances.tail()}")
            await asyncio.sleep(0.1)
