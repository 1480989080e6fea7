"""What is copied between this instance's pool and the tiers below it: in a thread of its own, beside the steps.

`kvstore.tier_jobs` says what is next; here it is done. Nothing that runs waits for it: a block that has to make room while it
is being copied down does so, and the copy is none. What goes down waits for its budget, as copies to other instances do; what
somebody waits for doesn't.

A copy that does not end, as a disk hangs, holds its thread, and may still write where it was to: so these places stay taken,
and the tiers are given up: what lies there is told as gone, and nobody waits for it again.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch

from distattn.budget import PATIENCE_S, StepBudget
from gmanager.wire import messages as wire
from gmanager.wire.logs import get_logger
from instance.rmanager import RManager
from kvstore.checks import Checks
from kvstore.tier_jobs import Job, TierJobs, as_it_is
from kvstore.tiers import Copying, Fault, Tier

log = get_logger("instance")

CHECK_TIMEOUT_S = 10.0
"""Longest that a request is held up while blocks that it shares are compared."""
HANG_S = 30.0
"""After which a job does not end: 64 MiB at 2 MB/s."""
CLOSE_TIMEOUT_S = 5.0
"""Longest that the end of an instance waits for a copy that is under way."""

BATCH_BYTES = 64 * 2**20
MOST_IN_BATCH = 16
"""Blocks that are copied in one go: the loop is asked once for all of them, and a fetch waits for no more that go down."""


class Store(Protocol):
    """Where the bytes are: `kvstore.tier_storage.TierStorage`, or a test's."""

    @property
    def slots(self) -> dict[Tier, int]:
        """Of each tier."""

    def copy(self, items: Sequence[Copying]) -> list[int | Fault]:
        """As `TierStorage.copy`."""

    def close(self) -> None:
        """As `TierStorage.close`."""


class Tiering:
    """One instance's, through all its epochs."""

    def __init__(
        self, rmanager: RManager, store: Store, block_bytes: int, device: torch.device, *, checks: bool = False
    ) -> None:
        """`checks`: compare cached blocks with what was written before they are shared."""
        self._store = store
        self._block_bytes = block_bytes
        self._block_size = rmanager.shards.block_size
        batch = max(1, min(MOST_IN_BATCH, BATCH_BYTES // block_bytes))
        self.jobs = TierJobs(rmanager.shards, batch, Checks(rmanager.shards.pool) if checks else None)
        self.thread: Executor = ThreadPoolExecutor(1, "tiers", _prepare_thread, (device,))
        self._budget: StepBudget | None = None
        self._woken = asyncio.Event()
        self._is_paused = True
        self._read_ns = 0
        """Of the present fetch."""
        self._hung: asyncio.Future[list[int | Fault]] | None = None
        """A job that does not end."""
        self._said: set[str] = set()
        """Kinds of trouble that the log has."""

    def wake(self) -> None:
        """There may be something to copy."""
        self._woken.set()

    def use(self, budget: StepBudget | None) -> None:
        """Of the epoch that begins."""
        self._budget = budget

    def pause(self) -> None:
        """The epoch is over, and nobody waits for what was asked for. What is being copied still comes to its end."""
        self._is_paused = True
        self._budget = None
        self._read_ns = 0
        self.jobs.forget_asked()

    def resume(self) -> None:
        """Another has begun."""
        self._is_paused = False
        self.wake()

    def fetch(self, asked: wire.Fetch) -> None:
        """As the gManager wants it."""
        if asked.into_pool:
            self.jobs.fetch(asked.fetch, asked.source, asked.end)
        else:
            self.jobs.lift(asked.source, asked.end)
        self.wake()

    def stop_fetch(self, asked: wire.StopFetch) -> None:
        """Likewise."""
        self.jobs.stop_fetch(asked.fetch)
        self.wake()

    def known(self, block_ids: Sequence[int]) -> dict[int, int]:
        """Of blocks that are about to be shared, those that can be compared, and with what."""
        return {} if self.jobs.checks is None else self.jobs.checks.known(block_ids)

    async def are_right(self, sums: Mapping[int, int]) -> bool:
        """Compare blocks of the pool with what they must be. Those that aren't that are lost; one that was freed meanwhile is
        somebody else's, and not judged. False, too, if that takes too long, or can't be done: then they are not known to be
        right."""
        checks = self.jobs.checks
        if self._hung is not None or checks is None:
            return False
        loop = asyncio.get_running_loop()
        with checks.watch(sums) as stay:
            looking = loop.run_in_executor(self.thread, self._store.copy, [as_it_is(block) for block in sums])
            await asyncio.wait([looking], timeout=CHECK_TIMEOUT_S)
        if not looking.done():
            looking.add_done_callback(_forget)
            log.warning("cached KV was not compared in time, and is computed again", blocks=len(sums))
            return False
        found = zip(sums, looking.result(), strict=True)
        others = {block: result for block, result in found if result != sums[block] and block in stay}
        for block, result in others.items():
            if result != "no_memory":
                self.jobs.lose_block(block)
        self._say_trouble()
        return not others

    async def run(self, on_change: Callable[[list[wire.Fetched]], None], epoch: Callable[[], int]) -> None:
        """Copy for ever. `on_change` hears whenever something else is known of what lies where, and which fetches are over."""
        loop = asyncio.get_running_loop()
        is_patient = True
        while True:
            job = self._next(is_patient=is_patient)
            if fetched := self._take_fetched(epoch()):
                on_change(fetched)
            if job is None:
                is_patient = await self._wait()
                continue
            is_patient = True
            began_ns = time.perf_counter_ns()
            copying = loop.run_in_executor(self.thread, self._store.copy, job.items)
            await asyncio.wait([copying], timeout=HANG_S)
            if not copying.done():
                await self._give_up(copying, lambda: on_change(self._take_fetched(epoch())))
            results = copying.result()
            if job.kind == "up":
                self._read_ns += time.perf_counter_ns() - began_ns
            self.jobs.end(results)
            self._say_trouble()
            on_change([])
            if job.kind == "down" and "no_memory" in results:
                await asyncio.sleep(PATIENCE_S)  # the steps that run may need less then

    async def _give_up(self, hung: asyncio.Future[list[int | Fault]], on_change: Callable[[], None]) -> None:
        """A job does not end. Comes back when it does."""
        log.warning("a copy below the pool does not end: nothing lies there any more", seconds=HANG_S)
        self._hung = hung
        self.jobs.turn_off()
        hung.add_done_callback(lambda _: self.wake())
        while not hung.done():
            self._woken.clear()
            self.jobs.refuse_asked()
            on_change()
            await self._woken.wait()
        self._hung = None

    def _next(self, *, is_patient: bool) -> Job | None:
        """What may be copied now: what somebody waits for, or what the budget allows."""
        if self._is_paused:
            return None
        if (job := self.jobs.next_asked()) is not None:
            return job
        if not self.jobs.has_more:
            return None
        budget = self._budget
        may = not is_patient or budget is None or budget.try_take(self.jobs.batch * self._block_size)
        return self.jobs.next() if may else None

    async def _wait(self) -> bool:
        """For a step, or something that was asked for. False: what goes down has waited for its budget long enough."""
        self._woken.clear()
        try:
            async with asyncio.timeout(PATIENCE_S if self.jobs.has_more and not self._is_paused else None):
                await self._woken.wait()
        except TimeoutError:
            return False
        return True

    def counters(self) -> wire.Counters:
        """What has been copied, and gone wrong."""
        counts = self.jobs.counts
        return wire.Counters(
            tier_bytes_down=counts.down * self._block_bytes,
            tier_bytes_up=counts.up * self._block_bytes,
            tier_tokens=counts.up * self._block_size,
            blocks_corrupt=counts.corrupt,
            slots_failed=counts.unwritable,
            copies_failed=counts.no_memory,
        )

    async def close(self) -> None:
        """Give memory and disk back, once what is being copied has come to its end. A disk that hangs is not waited for."""
        loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(1, "end")  # the process may end without it
        ending = loop.run_in_executor(pool, partial(self.thread.shutdown, cancel_futures=True))
        pool.shutdown(wait=False)
        await asyncio.wait([ending], timeout=CLOSE_TIMEOUT_S)
        if not ending.done():
            log.warning("left behind in a copy that does not end")
            return
        self._store.close()

    def _take_fetched(self, epoch: int) -> list[wire.Fetched]:
        fetched = self.jobs.take_fetched()
        read_us = self._read_ns // 1000
        if fetched:
            self._read_ns = 0
        # several that are over at once read little: only the first of them can have read anything
        return [
            wire.Fetched(epoch=epoch, fetch=each.number, blocks=each.blocks, us=0 if i else read_us)
            for i, each in enumerate(fetched)
        ]

    def _say_trouble(self) -> None:
        """Once for each kind; counters say how often."""
        counts = self.jobs.counts
        if counts.unwritable and "unwritable" not in self._said:
            self._said.add("unwritable")
            log.warning("slots below the pool can't be written, and are used no more", slots=counts.unwritable)
        if counts.no_memory and "no memory" not in self._said:
            self._said.add("no memory")
            log.warning("the device had no memory to copy KV below the pool or back", blocks=counts.no_memory)
        if counts.corrupt and "corrupt" not in self._said:
            self._said.add("corrupt")
            log.warning("cached KV is not what was written, and is computed again", blocks=counts.corrupt)


def _forget(looked: asyncio.Future[list[int | Fault]]) -> None:
    """Nobody waits for it: what went wrong with it is no news."""
    if not looked.cancelled():
        looked.exception()


def _prepare_thread(device: torch.device) -> None:
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
