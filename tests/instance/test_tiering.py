"""What is copied below the pool waits for its budget; what somebody waits for doesn't."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import torch

from distattn.budget import StepBudget
from gmanager.wire import messages as wire
from instance.rmanager import RManager
from instance.tiering import Tiering
from kvstore.tiers import Copying, Fault, Tier, Tiers

SIZE = 4


class Store:
    """Blocks are their own checksums."""

    def __init__(self) -> None:
        self.kinds: list[tuple[str, str]] = []
        self.wrong: set[int] = set()
        """Blocks of the pool that aren't what was written."""
        self.begun = 0
        """Calls of `copy`."""
        self.goes_on = threading.Event()
        """Cleared: it hangs."""
        self.goes_on.set()
        self.is_closed = False
        self.is_short = False
        """The device has no memory for checksums."""

    @property
    def slots(self) -> dict[Tier, int]:
        return {"host": 40}

    def copy(self, items: Sequence[Copying]) -> list[int | Fault]:
        self.begun += 1
        self.goes_on.wait()
        self.kinds += [(item.source.where, item.target.where) for item in items]
        return [self._copy(item) for item in items]

    def _copy(self, item: Copying) -> int | Fault:
        if item.source == item.target and self.is_short:
            return "no_memory"
        if item.source == item.target:
            return -1 if item.source.slot in self.wrong else item.source.slot
        return item.source.slot if item.checksum is None else item.checksum

    def close(self) -> None:
        self.is_closed = True


@asynccontextmanager
async def tiering(*, checks: bool = False) -> AsyncIterator[tuple[Tiering, RManager, Store, list[wire.Fetched]]]:
    store = Store()
    rmanager = RManager(20, SIZE, Tiers(store.slots))
    rmanager.caches = True
    made = Tiering(rmanager, store, block_bytes=2**25, device=torch.device("cpu"), checks=checks)
    heard: list[wire.Fetched] = []
    work = asyncio.create_task(made.run(heard.extend, lambda: 3))
    try:
        yield made, rmanager, store, heard
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await made.close()
        assert store.is_closed
    rmanager.validate()


def leave(rmanager: RManager, seq: int, blocks: int) -> None:
    """A sequence that is over."""
    assert rmanager.reserve(seq, blocks)
    rmanager.append(seq, 0, blocks * SIZE)
    rmanager.retire(seq)


async def until(tiers: Tiering, store: Store, copies: int) -> None:
    """So many blocks are copied, and that is known."""
    async with asyncio.timeout(5):
        while len(store.kinds) < copies or tiers.jobs.is_busy:
            await asyncio.sleep(0.001)


async def quiet(store: Store, copies: int) -> None:
    """Nothing more is copied, though the loop turns."""
    await asyncio.sleep(0.05)
    assert len(store.kinds) == copies


async def test_copies_wait_for_steps_and_go_on_when_none_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instance.tiering.PATIENCE_S", 60.0)
    async with tiering() as (tiers, rmanager, store, _):
        budget = StepBudget(SIZE, prompt_weight=2)
        budget.tell(0, is_busy=True)
        tiers.use(budget)
        tiers.resume()
        leave(rmanager, 1, 6)
        tiers.wake()
        await quiet(store, 0)
        assert tiers.jobs.batch == 2
        for steps, copies in ((1, 0), (2, 2), (3, 2), (4, 4)):  # a batch is two blocks
            budget.tell(steps, is_busy=True)
            tiers.wake()
            await until(tiers, store, copies)
            await quiet(store, copies)
        budget.tell(4, is_busy=False)
        tiers.wake()
        await until(tiers, store, 6)
        assert set(store.kinds) == {("pool", "host")}


async def test_a_fetch_does_not_wait_and_says_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instance.tiering.PATIENCE_S", 60.0)
    async with tiering() as (tiers, rmanager, store, heard):
        tiers.resume()
        leave(rmanager, 1, 6)
        tiers.wake()
        await until(tiers, store, 6)
        assert rmanager.reserve(2, 20)
        rmanager.free(2)
        assert rmanager.below(1) == [24]
        budget = StepBudget(1)
        budget.tell(0, is_busy=True)
        tiers.use(budget)
        leave(rmanager, 3, 4)
        tiers.fetch(wire.Fetch(epoch=3, fetch=7, source=1, end=17))
        tiers.fetch(wire.Fetch(epoch=3, fetch=8, source=99, end=17))
        async with asyncio.timeout(5):
            while len(heard) < 2:
                await asyncio.sleep(0.001)
        first, second = heard
        assert (first.epoch, first.fetch, first.blocks) == (3, 7, 4) and first.us > 0
        assert (second.fetch, second.blocks, second.us) == (8, 0, 0)
        assert store.kinds[6:] == [("host", "pool")] * 4
        assert rmanager.below(1) == [8]
        counters = tiers.counters()
        assert (counters.tier_bytes_up, counters.tier_tokens) == (4 * 2**25, 16)


async def test_nothing_is_begun_between_epochs() -> None:
    async with tiering() as (tiers, rmanager, store, heard):
        leave(rmanager, 1, 2)
        tiers.wake()
        await quiet(store, 0)
        tiers.resume()
        await until(tiers, store, 2)
        tiers.pause()
        tiers.fetch(wire.Fetch(epoch=3, fetch=1, source=1, end=8))
        await quiet(store, 2)
        assert not heard


async def test_blocks_are_compared_with_what_was_written() -> None:
    async with tiering(checks=True) as (tiers, rmanager, store, _):
        tiers.resume()
        leave(rmanager, 1, 3)
        tiers.wake()
        await until(tiers, store, 6)
        blocks = rmanager.shards.cache.runs(1)[0].block_ids
        sums = tiers.known(blocks)
        assert sums == {block: block for block in blocks}
        assert await tiers.are_right(sums)
        store.is_short = True
        assert not await tiers.are_right(sums), "it isn't known"
        assert not tiers.counters().blocks_corrupt and 1 in rmanager.shards.cache
        store.is_short = False
        store.wrong = {blocks[1]}
        assert not await tiers.are_right(sums)
        assert tiers.counters().blocks_corrupt == 1
        assert rmanager.take_reusable() == {1: [[(0, 4)], [(8, 12)]]}
        tiers.jobs.forget_counts()
        assert tiers.counters() == wire.Counters()


async def test_blocks_that_are_given_back_while_they_are_compared_are_not_judged() -> None:
    async with tiering(checks=True) as (tiers, rmanager, store, _):
        tiers.resume()
        leave(rmanager, 1, 2)
        tiers.wake()
        await until(tiers, store, 4)
        assert rmanager.share(2, 1, [[(0, 8)]])
        sums = tiers.known(rmanager.shares(2) or ())
        assert len(sums) == 2
        tiers.pause()
        store.goes_on.clear()
        before = store.begun
        comparing = asyncio.create_task(tiers.are_right(sums))
        async with asyncio.timeout(5):
            while store.begun == before:
                await asyncio.sleep(0.001)
        rmanager.drop(2)
        rmanager.reserve(3, 20)
        rmanager.append(3, 0, 20 * SIZE)
        rmanager.retire(3)
        store.wrong = set(range(20))  # other tokens
        store.goes_on.set()
        assert await comparing
        assert not tiers.counters().blocks_corrupt
        assert rmanager.take_reusable() == {1: [[(0, 8)]], 3: [[(0, 20 * SIZE)]]}, "1 is below"


async def test_what_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with tiering(checks=True) as (tiers, rmanager, store, _):
        tiers.resume()
        leave(rmanager, 1, 1)
        tiers.wake()
        await until(tiers, store, 2)
        sums = tiers.known(rmanager.shards.cache.runs(1)[0].block_ids)
        store.goes_on.clear()
        monkeypatch.setattr("instance.tiering.CHECK_TIMEOUT_S", 0.05)
        monkeypatch.setattr("instance.tiering.CLOSE_TIMEOUT_S", 0.05)
        assert not await tiers.are_right(sums)
        assert not tiers.counters().blocks_corrupt, "it isn't known to be wrong, either"
        await tiers.close()
        assert not store.is_closed
        store.goes_on.set()


async def test_tiers_that_hang_are_given_up_and_nobody_waits_for_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with tiering(checks=True) as (tiers, rmanager, store, heard):
        tiers.resume()
        leave(rmanager, 1, 6)
        tiers.wake()
        await until(tiers, store, 12)
        assert rmanager.reserve(2, 20)
        rmanager.free(2)
        leave(rmanager, 3, 2)
        blocks = rmanager.shards.cache.runs(3)[0].block_ids
        tiers.wake()
        await until(tiers, store, 16)
        assert rmanager.below(1) == [24] and tiers.known(blocks)
        rmanager.take_reusable()
        store.goes_on.clear()
        monkeypatch.setattr("instance.tiering.HANG_S", 0.05)
        for number, source in ((7, 1), (8, 1), (9, 99)):
            tiers.fetch(wire.Fetch(epoch=3, fetch=number, source=source, end=24))
        async with asyncio.timeout(5):
            while len(heard) < 3:
                await asyncio.sleep(0.001)
        assert [(each.fetch, each.blocks) for each in heard] == [(7, 0), (8, 0), (9, 0)]
        assert rmanager.take_reusable() == {1: []}, "it is told as gone"
        tiers.fetch(wire.Fetch(epoch=3, fetch=10, source=3, end=24))
        async with asyncio.timeout(5):
            while len(heard) < 4:
                await asyncio.sleep(0.001)
        async with asyncio.timeout(5):
            assert not await tiers.are_right(tiers.known(blocks)), "not compared, and not waited for"
        taken = rmanager.free_blocks
        leave(rmanager, 4, 4)
        store.goes_on.set()
        async with asyncio.timeout(5):
            while rmanager.free_blocks == taken:
                await asyncio.sleep(0.001)
        rmanager.validate()
        assert await tiers.are_right(tiers.known(blocks)), "it goes on"
        assert rmanager.shards.cache.tiers.is_off and not tiers.counters().blocks_corrupt
