"""What the first rank of an instance tells the others, and what it hears of them."""

import asyncio
from array import array
from typing import Any

import pytest

from distattn.budget import TransferEnded
from distattn.layout import Layout, Reading
from gmanager.wire.codec import Decoder, encode
from gmanager.wire.memory import MemoryTransport
from gmanager.wire.messages import CopyRun, JoinEpoch, MemberAddress, SequenceParams
from instance.crew import Crew, LetGo, RankBroke, RankEnded, RankFormed, RankMoved, RankReady, RunStep, ToFirst, ToRank, UsePool
from instance.errors import InstanceError
from instance.follower import Follower
from instance.plan import SampledRow, ScoredRows, StepPlan
from instance.split import Place

PARAMS = SequenceParams(max_tokens=9, temperature=1, top_k=3, top_p=0.5, seed=7, stop_token_ids=[2], logprobs=5)
LAYOUT = Layout(
    num_rows=3,
    own=[Reading(0, 2, (5, 6), (17, 18)), Reading(2, 1, (7,), (4,), (1,))],
    dispatched_rows=[0, 1, 1],
    dispatched={1: 2, 2: 1},
    received={2: 1},
    others=[Reading(0, 1, (9, 2**20), (31,))],
)
PLAN = StepPlan(
    token_ids_T=[1, 2, 128_255],
    positions_T=[16, 17, 2**21],
    pending=[(2, 0)],
    sampled=[SampledRow(2, 11, 4, PARAMS, 3)],
    scored=[ScoredRows(12, 0, 16, array("i", [4, 5]), 2)],
    slots_T=[80, 81, -1],
    layout=LAYOUT,
    other_layouts=[Layout(3, [], [], {}, {}, [])],
    other_slots=[[2**33, 1, 2]],
    needs_logits=True,
    is_decode=False,
)


def test_a_plan_arrives_as_it_was_but_for_what_the_first_does_alone() -> None:
    decoder: Decoder[ToRank] = Decoder(ToRank)
    said = decoder.decode(encode(RunStep.of(PLAN, epoch=3, lane="decode", processors=24)))
    assert isinstance(said, RunStep)
    assert (said.epoch, said.lane, said.processors) == (3, "decode", 24)
    plan = said.plan()
    for name in ("token_ids_T", "positions_T", "pending", "slots", "layouts", "needs_logits", "is_decode", "is_shared"):
        assert getattr(plan, name) == getattr(PLAN, name), name
    assert [sampled.row for sampled in plan.sampled] == [2]
    assert [(rows.first_row, len(rows.token_ids)) for rows in plan.scored] == [(0, 2)]


JOIN = JoinEpoch(
    epoch=4,
    id=0,
    rank=0,
    store_address="127.0.0.1:2",
    members=[MemberAddress(rank=0, id=0, host="here", party_address="tcp://127.0.0.1:1")],
)


class Played:
    """A first rank with two others, on a network that is made up; `watching`: what it hears."""

    def __init__(self) -> None:
        transport = MemoryTransport()
        to_first: Decoder[ToFirst] = Decoder(ToFirst)
        to_rank: Decoder[ToRank] = Decoder(ToRank)
        listener = transport.listen("tcp://127.0.0.1:*", to_first)
        self.crew = Crew(listener, Place(0, 3), "secret", 5)
        self.ranks = [transport.dial(listener.address, to_rank) for _ in range(2)]
        self.stranger = transport.dial(listener.address, to_rank)

    async def __aenter__(self) -> "Played":
        for part, rank in enumerate(self.ranks, 1):
            rank.send(RankReady(rank=part, token="secret", tokens=1000 * part, fingerprint=""))
            await self.crew._hear()
        self.watching = asyncio.create_task(self.crew.watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.watching.cancel()
        for end in (*self.ranks, self.stranger, self.crew):
            await end.close()


async def test_a_crew_forms_runs_and_ends() -> None:
    async with asyncio.timeout(5), Played() as played:
        crew, ranks = played.crew, played.ranks
        assert crew.use_pool(1500) == 1000
        crew.form(JOIN)
        crew.run(4, "prefill", PLAN, 0)
        for rank in ranks:
            assert await rank.recv() == UsePool(tokens=1000)
            assert await rank.recv() == JOIN
            assert isinstance(await rank.recv(), RunStep)
        ranks[0].send(RankFormed(epoch=4))
        formed = asyncio.create_task(crew.have_formed(4))
        await asyncio.sleep(0.01)
        assert not formed.done()
        ranks[1].send(RankFormed(epoch=4))
        await formed
        ranks[1].send(RankBroke(epoch=3, reason="of another epoch"))
        ranks[1].send(RankBroke(epoch=4, reason="no"))
        assert await crew.broke == "rank 2 of 3: no"
        crew.end(4)
        for rank in ranks:
            assert await rank.recv() == LetGo(epoch=4)
            rank.send(RankEnded(epoch=4))
        await crew.have_ended(4)
        await ranks[0].close()
        with pytest.raises(InstanceError, match="rank 1 of 3 is lost: "):
            await played.watching


async def test_strangers_are_not_heard() -> None:
    async with asyncio.timeout(5), Played() as played:
        crew, stranger = played.crew, played.stranger
        stranger.send(RankReady(rank=1, token="guessed", tokens=1, fingerprint=""))
        stranger.send(RankBroke(epoch=4, reason="nonsense"))
        crew.form(JOIN)
        stranger.send(RankFormed(epoch=4))
        stranger.send(RankReady(rank=1, token="secret", tokens=1, fingerprint=""))  # that part is here
        await asyncio.sleep(0.01)
        assert not crew.broke.done() and not played.watching.done()
        assert crew.use_pool(5000) == 1000
        for rank in played.ranks:
            rank.send(RankFormed(epoch=4))
        await crew.have_formed(4)


async def test_nobody_waits_for_an_epoch_that_is_over() -> None:
    """It ends while ranks form, and while a copy is under way: neither `RankFormed` nor `RankMoved` will come."""
    async with asyncio.timeout(5), Played() as played:
        crew = played.crew
        crew.form(JOIN)
        formed = asyncio.create_task(crew.have_formed(4))
        asked = CopyRun(epoch=4, move=7, seq=1, source=1, target=0, ranges=[(0, 16)])
        moved = crew.receive_blocks(asked, (3,))
        await asyncio.sleep(0.01)
        crew.end(4)
        with pytest.raises(InstanceError, match="ended while it was being formed"):
            await formed
        with pytest.raises(TransferEnded):
            await moved
        for rank in played.ranks:
            rank.send(RankMoved(epoch=4, move=7, error=None))
            rank.send(RankEnded(epoch=4))
        await crew.have_ended(4)
        crew.end(5)  # nobody was told of it
        await crew.have_ended(5)
        assert not played.watching.done()


async def test_a_rank_lets_go_of_an_epoch_that_it_was_never_told_of() -> None:
    transport = MemoryTransport()
    to_first: Decoder[ToFirst] = Decoder(ToFirst)
    to_rank: Decoder[ToRank] = Decoder(ToRank)
    listener = transport.listen("tcp://127.0.0.1:*", to_first)
    unused: Any = None
    first = transport.dial(listener.address, to_rank)
    first.send(RankReady(rank=1, token="secret", tokens=1, fingerprint=""))
    peer, _ = await listener.recv()
    running = asyncio.create_task(Follower(unused, unused, first).run())
    async with asyncio.timeout(5):
        listener.send(peer, LetGo(epoch=4))
        assert await listener.recv() == (peer, RankEnded(epoch=4))
        listener.send(peer, JOIN)  # came too late
        listener.send(peer, LetGo(epoch=5))
        assert await listener.recv() == (peer, RankEnded(epoch=5))
        await listener.close()
        await running
