"""The real commands as real processes, their output in files, and how to end them.

Importing torch and transformers costs a process five seconds. Where torchrun doesn't matter, `Processes.instance` therefore
forks from a process that has imported them and runs the `main` of `python -m instance` with the environment that torchrun
would set.
"""

import asyncio
import ipaddress
import itertools
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from gmanager import AsyncClient, ServiceUnreachable
from tests.support.farm import NUM_GPUS, place

ENDS_WITHIN_S = 10.0
"""The promise: this long after a signal, or the loss of a peer, a process has ended."""


@dataclass(frozen=True)
class Started:
    """A process and the file that it writes to."""

    name: str
    pid: int
    log: Path
    poll: Callable[[], int | None]
    """Its exit code; negative: the signal that ended it."""

    @property
    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the process and all its children at once."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGINT)

    async def exit_code(self, within_s: float = ENDS_WITHIN_S) -> int:
        """Wait for its end. Raises AssertionError with its output if it doesn't come."""
        deadline = time.monotonic() + within_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name} still runs after {within_s:g} s:\n{self.text[-3000:]}")
            await asyncio.sleep(0.02)
        return code

    async def says(self, pattern: str, within_s: float = 60) -> "re.Match[str]":
        """Wait for a line of its output."""
        deadline = time.monotonic() + within_s
        while (match := re.search(pattern, self.text, re.MULTILINE)) is None:
            code = self.poll()
            if code is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.name} (exit code {code}) never said {pattern!r}:\n{self.text[-3000:]}")
            await asyncio.sleep(0.02)
        return match


class Processes:
    """What one test has started; `end` ends all of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Started] = []

    def python(self, name: str, *arguments: str, environment: Mapping[str, str | None] | None = None) -> Started:
        """`python ARGUMENTS`. A value of None takes a name out of the environment."""
        env: dict[str, str | None] = {**os.environ, "TRITON_INTERPRET": None, "PYTHONUNBUFFERED": "1"}
        env |= environment or {}
        log = self._log(name)
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in env.items() if value is not None},
                cwd=self._folder,
                start_new_session=True,  # Ctrl-C is the test runner's
            )
        return self._keep(Started(name, process.pid, log, process.poll))

    def gmanager(self, *flags: str, bind: str = "tcp://127.0.0.1:*") -> Started:
        """`python -m gmanager`."""
        return self.python("gmanager", "-m", "gmanager", "--bind", bind, *flags)

    def torchrun(self, *flags: str, nproc: int, launch: Iterable[str] = ()) -> Started:
        """`torchrun --nproc-per-node N -m instance`; `launch` are torchrun's own flags."""
        return self.python(
            "torchrun",
            *("-m", "torch.distributed.run", "--nproc-per-node", str(nproc), *launch),
            *("-m", "instance", *flags),
        )

    def instance(self, *flags: str, rank: int = 0, world_size: int = 1, run_id: str | None = "fork") -> Started:
        """`python -m instance` as torchrun starts it (without a run id: as torchrun does not), less the time to import."""
        _preload()
        gpu, environment = place(len(self._started) if NUM_GPUS == 1 else rank)
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(gpu), "WORLD_SIZE": str(world_size)}
        if run_id is not None:
            environment["TORCHELASTIC_RUN_ID"] = run_id
        log = self._log("instance")
        process = _FORKSERVER.Process(target=_run_instance, args=(flags, environment, log), daemon=True)
        process.start()
        if process.pid is None:
            raise RuntimeError("the process did not start")
        return self._keep(Started(log.stem, process.pid, log, lambda: process.exitcode))

    async def end(self) -> None:
        """Ask all that still run to end, then insist. Only what was started here, and its children."""
        ours = [pid for started in self._started if started.poll() is None for pid in (started.pid, *children(started.pid))]
        for started in self._started:
            started.signal(signal.SIGTERM)
        deadline = time.monotonic() + ENDS_WITHIN_S
        while any(started.poll() is None for started in self._started) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        late = [started for started in self._started if started.poll() is None]
        for started in late:
            os.kill(started.pid, signal.SIGKILL)
        for pid in ours:
            if is_alive(pid):  # a worker whose torchrun was killed
                os.kill(pid, signal.SIGKILL)
        for started in late:
            await started.exit_code()
        if late:
            raise AssertionError("SIGTERM did not end " + ", ".join(f"{s.name}:\n{s.text[-2000:]}" for s in late))

    def _log(self, name: str) -> Path:
        return self._folder / f"{len(self._started)}-{name}.log"

    def _keep(self, started: Started) -> Started:
        self._started.append(started)
        return started


@asynccontextmanager
async def processes(folder: Path) -> AsyncIterator[Processes]:
    """For one test: nothing that it started outlives it."""
    started = Processes(folder)
    try:
        yield started
    finally:
        await started.end()


async def address_of(gmanager: Started) -> str:
    """Where a gManager listens."""
    return (await gmanager.says(r"^gManager listens at (\S+)$"))[1]


async def until_ready(address: str, *, epoch: int = 1, within_s: float = 60) -> None:
    """Wait for a ready cell of this epoch or a later one."""
    async with AsyncClient(address) as client, asyncio.timeout(within_s):
        while not any(c.state == "ready" and c.epoch >= epoch for c in (await client.stats()).cells):
            await asyncio.sleep(0.05)


@asynccontextmanager
async def client_of(address: str) -> AsyncIterator[AsyncClient]:
    """A client of a gManager that perhaps has yet to start."""
    deadline = time.monotonic() + 10
    while True:
        client = AsyncClient(address, connect_timeout_s=max(0.1, deadline - time.monotonic()))
        try:
            await client.__aenter__()
            break
        except ServiceUnreachable:
            if time.monotonic() > deadline:
                raise
    try:
        yield client
    finally:
        await client.__aexit__(None, None, None)


# --- what /proc knows


def is_alive(pid: int) -> bool:
    """Whether the process exists and has not ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def children(pid: int) -> list[int]:
    """Process ids of all that descend from `pid`."""
    found: list[int] = []
    try:
        tasks = list(Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:  # it has ended just now
        return []
    for task in tasks:
        try:
            direct = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in direct:
            found += [child, *children(child)]
    return found


def workers(torchrun: Started) -> dict[int, int]:
    """RANK -> pid of a torchrun's instances."""
    found: dict[int, int] = {}
    for pid in children(torchrun.pid):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(entry.removeprefix(b"RANK=")): pid for entry in environment if entry.startswith(b"RANK=")}
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wakeups(pid: int) -> dict[str, int]:
    """How often each thread of a process has waited for something, by its name and id."""
    counts = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        except FileNotFoundError:  # it ended
            continue
        counts[f"{status['Name']} {task.name}"] = int(status["voluntary_ctxt_switches"])
    return counts


def listening(pid: int) -> set[tuple[str, int]]:
    """IPv4 and IPv6 addresses and ports at which a process listens for TCP."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                words = bytes.fromhex(address)  # each of four bytes in the machine's order
                packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.add((str(ipaddress.ip_address(packed)), int(port, 16)))
    return found


def listening_addresses(pid: int) -> set[str]:
    """Addresses at which a process listens for TCP."""
    return {address for address, _ in listening(pid)}


def _ports() -> Iterator[int]:
    """Those below the ones that the system gives to whoever asks for any: nobody gets them by chance, nor does an end of a
    connection (who dials such a port again and again while nobody listens may be given the same, and so answer itself)."""
    most = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    least = most // 2
    start = random.Random(os.getpid()).randrange(least, most)  # other sessions of tests begin elsewhere
    yield from itertools.cycle([*range(start, most), *range(least, start)])


_PORTS = _ports()


def free_port() -> int:
    """A port that nobody uses; another one each time."""
    return next(port for port in _PORTS if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


# --- forked instances

_FORKSERVER = multiprocessing.get_context("forkserver")


def _preload() -> None:
    _FORKSERVER.set_forkserver_preload(["instance.__main__", "transformers.models.llama.modeling_llama"])


def _run_instance(flags: tuple[str, ...], environment: Mapping[str, str], log: Path) -> None:
    """Main of a forked process: what `python -m instance` does."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    sys.argv = ["instance", *flags]
    from tqdm import tqdm  # type: ignore[import-untyped]

    from instance.__main__ import main

    tqdm.set_lock(threading.RLock())  # the lock between processes that it makes otherwise would be left behind
    try:
        code = main()
    except SystemExit as end:  # argparse
        code = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
