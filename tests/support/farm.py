"""Instances in real processes, started once and reconfigured: importing torch and transformers costs seconds, a cell 0.3 s.

A worker process runs one `Instance` at a time, with the same parts as `python -m instance`, and can be told to make a mistake
(`mutate`), which the exactness tests must then find.
"""

import asyncio
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from inspect import unwrap
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch

from gmanager.wire.logs import configure
from gmanager.wire.scaling import RopeScaling
from instance.config import InstanceConfig, KVDType, KVFormatChoice, Launch, Quantize

Mutation = Literal["drop", "double", "shift"]

DEVICE: Literal["cpu", "cuda"] = "cuda" if os.environ.get("DISTATTN_TEST_DEVICE") == "cuda" else "cpu"
"""Where instances run: DISTATTN_TEST_DEVICE=cuda takes as many GPUs as the case has instances, or one for all of them."""

NUM_GPUS = torch.cuda.device_count()


def place(number: int) -> tuple[int, dict[str, str]]:
    """GPU and environment of a test's instance.

    Where there is but one GPU, all share it. NCCL refuses that to ranks of one host, so each says that it is a host of its own.
    """
    if DEVICE == "cpu" or NUM_GPUS > 1:
        return number, {}
    return 0, {"NCCL_HOSTID": f"test-{number}", "NCCL_SOCKET_IFNAME": "lo"}


OVER = "the test is over"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How the instances of a cell are to be."""

    model: Path
    kv_tokens: int | tuple[int, ...] = 512
    """One number for all, or one for each."""
    block_size: int = 16
    chunk_tokens: int = 64
    mutate: Mutation | None = None
    device: Literal["cpu", "cuda"] = DEVICE
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Quantize = "none"
    served_model_name: str | None = None
    other_names: tuple[str, ...] = ()
    host_memory: int = 0
    disk: Path | None = None
    disk_bytes: int = 0
    check_cache: bool = False
    rope_scaling: RopeScaling | None = None
    kv_format: KVFormatChoice = "auto"
    kv_dtype: KVDType = "auto"
    tp: int = 1
    """Workers that share the layers of a stage."""
    pp: int = 1
    pp_layers: tuple[int, ...] = ()
    """Stages of an instance."""
    elastic_tp: int | Literal["auto"] = 0

    @property
    def ranks(self) -> int:
        """Workers of an instance."""
        return self.tp * self.pp


@dataclass
class Worker:
    process: BaseProcess
    pipe: Connection

    async def ask(self, *command: Any) -> Any:
        """Send a command and wait for its answer. Raises RuntimeError with the worker's error."""
        self.pipe.send(command)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(60):
            kind, value = await loop.run_in_executor(None, self.pipe.recv)
        if kind == "error":
            raise RuntimeError(value)
        return value


@dataclass
class Farm:
    """Worker processes; `close` ends them."""

    workers: list[Worker] = field(default_factory=list)

    def grow(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self.workers) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(len(self.workers), theirs), daemon=True)
            process.start()
            self.workers.append(Worker(process, ours))

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.join(10)

    @asynccontextmanager
    async def serve(self, size: int, setup: Setup, gmanager: str, *, rests: bool = True) -> AsyncIterator[None]:
        """A cell of `size` instances, registered at a gManager. At the end every pool must be empty and consistent.

        `rests`: False if the gManager will be gone by then.
        """
        self.grow(size * setup.ranks)
        workers = self.workers[: size * setup.ranks]
        with tempfile.TemporaryDirectory() as meetings:
            starts = (w.ask("serve", rank, size, setup, gmanager, Path(meetings)) for rank, w in enumerate(workers))
            await asyncio.gather(*starts)
        try:
            yield
            if rests:
                await asyncio.gather(*(w.ask("rest") for w in workers))
        finally:
            await asyncio.gather(*(w.ask("stop") for w in workers))


def _work(index: int, pipe: Connection) -> None:
    """Main of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test runner's; it closes the farm
    os.environ.update(place(index)[1])
    import uvloop

    configure("warning", "console", worker=index)  # with the reason why an epoch breaks
    uvloop.run(_obey(pipe))


async def _obey(pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    serving: _Serving | _Following | None = None
    while True:
        try:
            name, *arguments = await loop.run_in_executor(None, pipe.recv)
        except EOFError:
            os._exit(0)
        try:
            if name == "serve":
                serving = await _Serving.start(*arguments)
                pipe.send(("ok", None))
            elif name == "rest" and serving is not None:
                pipe.send(("ok", await serving.rest()))
            elif name == "spoil" and serving is not None:
                await serving.spoil(*arguments)
                pipe.send(("ok", None))
            elif name == "garble":
                _garble(*arguments)
                pipe.send(("ok", None))
            elif name == "stop" and serving is not None:
                pipe.send(("ok", await serving.end()))
        except Exception as error:
            pipe.send(("error", f"{type(error).__name__}: {error}"))


_loaded: dict[tuple[Any, ...], Any] = {}


class _Following:
    """A rank that isn't the first of its instance: it ends when that does."""

    def __init__(self, task: "asyncio.Task[None]") -> None:
        self._task = task

    async def rest(self) -> None:
        if self._task.done():
            await self._task

    async def spoil(self, where: str) -> None:
        raise NotImplementedError

    async def end(self) -> None:
        await asyncio.wait_for(self._task, 10)


async def _follow(follower: Any) -> None:
    """With a pool that holds NaN wherever nothing was written."""
    import instance.follower as room

    make_pool = room.make_pool

    def poisoned(*args: Any) -> Any:
        storage = make_pool(*args)
        storage.fill_(torch.nan)
        return storage

    room.make_pool = poisoned
    try:
        await follower.run()
    finally:
        room.make_pool = make_pool


class _Serving:
    def __init__(self, instance: Any, rmanager: Any, task: "asyncio.Task[None]", undo: Any) -> None:
        self._instance = instance
        self._rmanager = rmanager
        self._task = task
        self._undo = undo

    @staticmethod
    async def start(rank: int, size: int, setup: Setup, gmanager: str, meetings: Path) -> "_Serving | _Following":
        from gmanager.wire.channel import ZmqTransport
        from instance.crew import Meeting
        from instance.follower import meet_first
        from instance.start import device_of, lead, load

        of_all = Launch(rank=rank, local_rank=rank, world_size=size * setup.ranks, run_id="farm")
        launch, seat = of_all.split(setup.tp, setup.pp, setup.pp_layers)
        config = InstanceConfig(
            gmanager=gmanager,
            model=str(setup.model),
            served_model_name=setup.served_model_name,
            other_names=setup.other_names,
            kv_tokens=setup.kv_tokens if isinstance(setup.kv_tokens, int) else setup.kv_tokens[launch.rank],
            launch=launch,
            place=seat,
            meeting=meetings / f"load-{launch.rank}" if setup.ranks > 1 else None,
            device=setup.device,
            gpu=place(rank)[0],
            dtype=setup.dtype,
            quantize=setup.quantize,
            block_size=setup.block_size,
            chunk_tokens=setup.chunk_tokens,
            cell_size=size,
            host_memory=setup.host_memory,
            disk=setup.disk,
            disk_bytes=setup.disk_bytes,
            check_cache=setup.check_cache,
            rope_scaling=setup.rope_scaling,
            kv_format=setup.kv_format,
            kv_dtype=setup.kv_dtype,
            elastic_tp=setup.elastic_tp,
            threads=1,
            step_timeout_s=30,
        )
        form = setup.dtype, setup.quantize, setup.rope_scaling, setup.kv_format, setup.kv_dtype
        key = (setup.model, *form, bool(setup.elastic_tp), seat)
        if key not in _loaded:
            _loaded[key] = load(config)
        loaded = _loaded[key]
        if setup.ranks > 1:
            path = meetings / f"serve-{launch.rank}"
            loaded = replace(loaded, meeting=Meeting.of(path, seat, device_of(config), config.host, config.step_timeout_s))
        if seat.rank:
            return _Following(asyncio.create_task(_follow(await meet_first(config, loaded, ZmqTransport()))))
        instance = await lead(config, loaded, ZmqTransport())
        instance._lasting.storage.fill_(torch.nan)
        undo = _mutate(setup.mutate, setup.block_size) if setup.mutate and rank == 0 else None
        return _Serving(instance, instance._rmanager, asyncio.create_task(instance.run()), undo)

    async def rest(self) -> None:
        """Wait until the instance holds nothing, or was drained; raises if it has failed, or blocks were lost."""
        from instance.errors import WasDrained

        pool = self._rmanager.shards.pool
        deadline = time.monotonic() + 5
        while not self._task.done() and pool.num_free + pool.num_evictable != pool.num_blocks:  # a Drop may be on its way
            if time.monotonic() > deadline:
                raise RuntimeError(f"{pool.num_blocks - pool.num_free - pool.num_evictable} blocks are still held")
            await asyncio.sleep(0.01)
        if self._task.done():
            try:
                await self._task
            except WasDrained:
                return
        self._instance.validate()

    async def spoil(self, where: Literal["pool", "host", "disk"]) -> None:
        """Flip a bit in each cached block there, as broken memory or a broken disk would. In the pool: once all of them have
        checksums, which are made beside the steps."""
        tiers = self._instance._tiering._store
        if where == "pool":
            await self.rest()
            pool, data = self._rmanager.shards.pool, tiers.storage.data_L2BPKD
            cached = [block for block in range(pool.num_blocks) if pool.is_evictable(block)]
            async with asyncio.timeout(5):
                while len(self._instance._tiering.known(cached)) < len(cached):
                    await asyncio.sleep(0.01)
            data.view(torch.uint8)[0, 0, cached, 0, 0, 0] ^= 1
        elif where == "host":
            tiers.host_SN[:, 0] ^= 1
        else:
            for slot in range(tiers.file.num_slots):
                tiers.file.spoil(slot, 200, b"spoiled")

    async def end(self) -> None:
        """Stop the instance. Another one, or the gManager, may have been first, and so have ended the cell."""
        from instance.errors import EpochEnded, WasDrained

        self._instance.stop(OVER)
        try:
            await self._task
        except WasDrained:
            pass
        except EpochEnded as ended:
            if not any(reason in str(ended) for reason in (OVER, "gManager is shutting down")):
                raise
        finally:
            if self._undo is not None:
                self._undo()


def _garble(blocks: int) -> None:
    """Flip a bit in each of the next so many blocks that instances of this process copy to another, behind their checksum: as a
    bad cable or network card would."""
    from distattn.transfer import Rows, Transfers

    passes, left = unwrap(Transfers._pass), blocks

    @wraps(passes)
    def garbled(transfers: Transfers, sends: Rows, receives: Rows) -> None:
        nonlocal left
        if sends and left:
            left -= 1
            ((block, to),) = sends
            block = block.clone()
            block.view(-1)[3] ^= 0x40  # of an exponent: it would be seen in the answer
            sends = [(block, to)]
        passes(transfers, sends, receives)

    Transfers._pass = garbled if blocks else passes  # type: ignore[method-assign]


def _mutate(mutation: Mutation, block_size: int) -> Any:
    """Let this process read one wrong block in every reading of at least three blocks. Returns how to undo it."""
    import instance.scheduler as scheduler
    from distattn.layout import Layout, Reading, lay_out

    def wrong(reading: Reading) -> Reading:
        blocks, lens = list(reading.block_ids), reading.kv_lens
        if len(blocks) < 3:
            return reading
        if mutation == "drop":
            del blocks[1]
            lens = tuple(max(0, n - block_size) for n in lens)
        elif mutation == "double":
            blocks.insert(1, blocks[1])
            lens = tuple(n + block_size for n in lens)
        else:
            blocks[0], blocks[1] = blocks[1], blocks[2]
        return Reading(reading.first_row, reading.num_rows, tuple(blocks), lens, reading.starts)

    def mutated(*args: Any) -> Layout:
        layout = lay_out(*args)
        return Layout(
            layout.num_rows,
            [wrong(r) for r in layout.own],
            layout.dispatched_rows,
            layout.dispatched,
            layout.received,
            [wrong(r) for r in layout.others],
        )

    scheduler.lay_out = mutated

    def undo() -> None:
        scheduler.lay_out = lay_out

    return undo
