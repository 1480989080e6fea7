"""What the first rank of an instance tells the others, and what it hears of them."""

import asyncio
from array import array

import pytest

from distattn.layout import Layout, Reading
from gmanager.wire.codec import Decoder, encode
from gmanager.wire.memory import MemoryTransport
from gmanager.wire.messages import JoinEpoch, MemberAddress, SequenceParams
from instance.crew import Crew, LetGo, RankBroke, RankEnded, RankFormed, RankReady, RunStep, ToFirst, ToRank, UsePool
from instance.errors import InstanceError
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


async def test_a_crew_forms_runs_and_ends() -> None:
    async with asyncio.timeout(5):
        transport = MemoryTransport()
        to_first: Decoder[ToFirst] = Decoder(ToFirst)
        to_rank: Decoder[ToRank] = Decoder(ToRank)
        listener = transport.listen("tcp://127.0.0.1:*", to_first)
        crew = Crew(listener, Place(0, 3))
        ranks = [transport.dial(listener.address, to_rank) for _ in range(2)]
        for part, rank in enumerate(ranks, 1):
            rank.send(RankReady(part=part, tokens=1000 * part))
            await crew._hear()
        watching = asyncio.create_task(crew.watch())
        assert crew.use_pool(1500) == 1000
        member = MemberAddress(rank=0, id=0, host="here", party_address="tcp://127.0.0.1:1")
        join = JoinEpoch(epoch=4, id=0, rank=0, store_address="127.0.0.1:2", members=[member])
        crew.form(join)
        crew.run(4, "prefill", PLAN, 0)
        for rank in ranks:
            assert await rank.recv() == UsePool(tokens=1000)
            assert await rank.recv() == join
            assert isinstance(await rank.recv(), RunStep)
        ranks[0].send(RankFormed(epoch=4))
        formed = asyncio.create_task(crew.have_formed(4))
        await asyncio.sleep(0.01)
        assert not formed.done()
        ranks[1].send(RankFormed(epoch=4))
        await formed
        ranks[1].send(RankBroke(epoch=4, reason="no"))
        assert await crew.broke == "rank 2 of 3: no"
        crew.end(4)
        for rank in ranks:
            assert await rank.recv() == LetGo(epoch=4)
            rank.send(RankEnded(epoch=4))
        await crew.have_ended(4)
        await ranks[0].close()
        with pytest.raises(InstanceError, match="rank 1 of 3 is lost: "):
            await watching
        await ranks[1].close()
        await crew.close()
