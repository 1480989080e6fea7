"""An instance's end of block moves: what comes to nothing is answered, in time, and leaves nothing behind."""

import asyncio
import time
from collections.abc import Iterator, Sequence

import pytest
import torch

from distattn.budget import StepBudget
from distattn.exchange import Exchange
from distattn.transfer import Transfers
from gmanager.wire import messages as wire
from instance.copies import Copies
from instance.rmanager import RManager
from kvstore.format import KVFormat
from kvstore.storage import KVStorage
from tests.support.line import Line, LineGroup

CPU = torch.device("cpu")
BLOCKS, SIZE = 8, 16
SEQ, TOKENS = 5, 40
RUN = [(0, TOKENS)]
NUM_BLOCKS = 3


class End:
    """One of two instances."""

    def __init__(self, rank: int, words: Line, blocks: Line, timeout_s: float) -> None:
        self.storage = KVStorage(
            num_layers=2,
            num_blocks=BLOCKS,
            block_size=SIZE,
            num_kv_heads=1,
            head_dim=4,
            format=KVFormat(torch.float32),
            device=CPU,
        )
        self.storage.data_L2BPKD.normal_(generator=torch.Generator().manual_seed(rank))
        self.rmanager = RManager(BLOCKS, SIZE)
        budget = StepBudget(SIZE)
        exchanges = [Exchange(LineGroup(line, rank), CPU) for line in (blocks, words)]
        transfers = Transfers(self.storage, *exchanges, budget, timeout_s)
        self.copies = Copies(rank, self.rmanager, transfers, budget, CPU)

    def read(self, seq: int) -> torch.Tensor:
        shard = self.rmanager.shards[seq]
        return self.storage.data_L2BPKD[:, :, list(shard.runs[0].block_ids)]


class Pair:
    """Instance 0 has a sequence; instance 1 has room."""

    def __init__(self, timeout_s: float = 20) -> None:
        self.lines = Line(), Line()
        self.source, self.target = (End(rank, *self.lines, timeout_s) for rank in range(2))
        assert self.source.rmanager.reserve(SEQ, NUM_BLOCKS)
        self.source.rmanager.append(SEQ, 0, TOKENS)

    def offer(self, move: int) -> None:
        offered = self.source.copies.offer(wire.OfferRun(epoch=1, move=move, seq=SEQ))
        assert offered == wire.RunOffered(epoch=1, move=move, ranges=RUN)

    def reserve(self, move: int) -> None:
        assert self.target.rmanager.reserve(move, NUM_BLOCKS)

    def fails(self, move: int, reason: str) -> wire.Copied:
        return wire.Copied(epoch=1, move=move, error=reason)

    def is_as_before(self, move: int) -> bool:
        """Once the gManager has answered a failure with Drop."""
        self.target.rmanager.drop(move)
        for end in (self.source, self.target):
            end.rmanager.validate()
        free = self.source.rmanager.free_blocks, self.target.rmanager.free_blocks
        return free == (BLOCKS - NUM_BLOCKS, BLOCKS) and self.source.rmanager.ranges(SEQ) == [RUN]

    async def copy(self, move: int) -> tuple[wire.Copied | None, wire.Copied | None]:
        """Answers of source and target."""
        source, target = await asyncio.gather(self.source.copies.copy(asked(move)), self.target.copies.copy(asked(move)))
        return source, target

    def close(self) -> None:
        for line in self.lines:
            line.close()
        for end in (self.source, self.target):
            end.copies.close()


def asked(move: int) -> wire.CopyRun:
    return wire.CopyRun(epoch=1, move=move, seq=SEQ, source=0, target=1, ranges=RUN)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


@pytest.fixture
def hasty() -> Iterator[Pair]:
    """Who doesn't wait long."""
    made = Pair(timeout_s=0.3)
    yield made
    made.close()


async def moves(pair: Pair, move: int) -> None:
    """A run goes over as it should."""
    pair.offer(move)
    pair.reserve(move)
    expected = pair.source.read(SEQ)
    said, answer = await pair.copy(move)
    assert said is None
    assert isinstance(answer, wire.Copied)
    assert 0 < answer.us < 20_000_000
    assert answer == wire.Copied(epoch=1, move=move, us=answer.us)
    assert pair.target.rmanager.adopt(move, SEQ)
    assert pair.target.rmanager.ranges(SEQ) == [RUN]
    assert torch.equal(pair.target.read(SEQ), expected)


async def test_a_run_goes_over(pair: Pair) -> None:
    await moves(pair, 9)
    assert pair.source.copies.counters().blocks_copied == NUM_BLOCKS


async def test_a_target_whose_source_never_comes_says_so_in_time(hasty: Pair) -> None:
    hasty.reserve(9)
    moment = time.monotonic()
    answer = await hasty.target.copies.copy(asked(9))
    assert time.monotonic() - moment < 5
    assert answer == hasty.fails(9, "the exchange with instance 0 broke: Timed out waiting 0.3 s")
    assert not hasty.target.rmanager.adopt(9, SEQ)
    assert hasty.is_as_before(9)


async def test_a_source_whose_target_never_comes_goes_on(hasty: Pair) -> None:
    hasty.offer(9)
    moment = time.monotonic()
    assert await hasty.source.copies.copy(asked(9)) is None
    assert time.monotonic() - moment < 5
    assert hasty.is_as_before(9)


async def test_a_copy_that_was_never_offered_fails_and_the_next_is_right(pair: Pair) -> None:
    pair.offer(8)
    pair.reserve(9)
    assert await pair.copy(9) == (None, pair.fails(9, "instance 0 has no part in it"))
    assert pair.is_as_before(9)
    await moves(pair, 10)


async def test_a_copy_for_which_nothing_is_reserved_fails_and_the_next_is_right(pair: Pair) -> None:
    pair.offer(9)
    assert await pair.copy(9) == (None, pair.fails(9, "nothing is reserved for it here"))
    assert pair.is_as_before(9)
    await moves(pair, 10)


@pytest.mark.parametrize("waits_for", ["words", "budget"])
async def test_the_end_of_the_epoch_lets_go_of_who_copies(pair: Pair, waits_for: str) -> None:
    """For its other end, or for its budget: the answer would come too late for anybody."""
    if waits_for == "budget":
        pair.target.copies.budget.tell(0, is_busy=True)
    pair.reserve(9)
    copying = asyncio.create_task(pair.target.copies.copy(asked(9)))
    await asyncio.sleep(0.1)
    assert not copying.done()
    pair.close()
    async with asyncio.timeout(5):
        answer = await copying
    assert answer is None or answer.error is not None
    assert pair.is_as_before(9)


class OtherRanks:
    """In place of `instance.crew.Crew`: they take their time."""

    def __init__(self) -> None:
        self.moved: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    def receive_blocks(self, asked: wire.CopyRun, block_ids: Sequence[int] | None) -> "asyncio.Future[str | None]":
        return self.moved


@pytest.mark.parametrize(("reserves", "error"), [(True, None), (True, "no"), (False, None)])
async def test_no_answer_before_all_ranks_have_done_their_part(reserves: bool, error: str | None) -> None:
    """Whatever came of the first's: the blocks of a copy that failed are given to others, and a rank may still write there."""
    pair = Pair(timeout_s=5)
    ranks = OtherRanks()
    pair.target.copies._crew = ranks  # type: ignore[assignment]
    try:
        pair.offer(1)
        if reserves:
            pair.reserve(1)
        copying = asyncio.create_task(pair.copy(1))
        await asyncio.sleep(0.3)
        assert not copying.done()
        ranks.moved.set_result(error)
        _, answer = await asyncio.wait_for(copying, 10)
        assert answer is not None
        assert (answer.error is None) == (reserves and error is None)
    finally:
        pair.close()
