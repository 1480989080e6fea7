"""Start a gManager and a torchrun of instances on this machine, wait until they serve, and stop them again."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Never, TypeVar

from gmanager import AsyncClient, DistattnError

T = TypeVar("T")

STOP_S = 15.0
"""Between asking a process to end and killing it."""


SLACK = 64
"""KV tokens beside the longest prompt: its answer, and a block or two."""


def pool_tokens(contexts: Sequence[int], instances: int) -> int:
    """KV tokens of each instance: 5/8 of the longest prompt and its answer on two, so that it fits on none of several."""
    longest = max(contexts) + SLACK
    if instances == 1:
        return longest + SLACK
    return -(-5 * longest // (4 * instances))


class ServiceError(Exception):
    """The service did not come up, or went down; the message holds the end of the log."""


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


@dataclass
class Service:
    """A running one."""

    address: str
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
    """A child in a process group of its own, its output in a file."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as out:
            self._child = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def check(self) -> None:
        """Raises ServiceError if it has ended."""
        code = self._child.poll()
        if code is not None:
            raise ServiceError(f"{self.name} ended with exit code {code}:\n{self.tail()}")

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

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
async def running(config: ServiceConfig) -> AsyncIterator[Service]:
    """A service that is ready when entered, and gone when left. Raises ServiceError."""
    config.logs.mkdir(parents=True, exist_ok=True)
    service = Service("")
    try:
        log = config.logs / "gmanager.log"
        bind = ["--bind", "tcp://127.0.0.1:*", "--spread", config.spread]
        gmanager = Process("the gManager", [sys.executable, "-m", "gmanager", *bind], log)
        service.processes.append(gmanager)
        service.address = await _address(gmanager)
        service.processes.append(Process("torchrun", _instances(config, service.address), config.logs / "instances.log"))
        await _ready(service, config)
        yield service
    finally:
        for process in reversed(service.processes):
            process.stop()


def _instances(config: ServiceConfig, address: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.instances}"]
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
    }
    return [*torchrun, "-m", "instance", *(f"{flag}={value}" for flag, value in flags.items() if value is not None)]


async def _address(gmanager: Process) -> str:
    """The gManager chose a free port; its first line says which."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        gmanager.check()
        for word in gmanager.log.read_text(errors="replace").split():
            if word.startswith("tcp://127.0.0.1:") and word.rstrip(".,")[-1].isdigit():
                return word.rstrip(".,")
        await asyncio.sleep(0.05)
    raise ServiceError(f"the gManager did not say where it listens:\n{gmanager.tail()}")


async def _ready(service: Service, config: ServiceConfig) -> None:
    deadline = time.monotonic() + config.ready_timeout_s
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
            if time.monotonic() > deadline:
                raise ServiceError(f"not ready after {config.ready_timeout_s:.0f} s:\n{service.processes[-1].tail()}")
            await asyncio.sleep(0.1)
