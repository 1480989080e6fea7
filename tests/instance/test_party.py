"""Parties over the in-memory transport: rounds complete for all members or for none."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gmanager.wire import messages as m
from gmanager.wire.codec import Decoder
from gmanager.wire.memory import MemoryTransport
from instance.errors import PartyBroken, PartyTimeout
from instance.party import Parties, Party, PartyMessage, Seat
from instance.step import Grouping, Lane, Notice, derive


def decoder() -> Decoder[PartyMessage]:
    return Decoder(PartyMessage)


TASKS: list[asyncio.Task[None]] = []
"""Those that run the parties of each instance of the present test."""
LOST: list[tuple[int, int, str]] = []
"""Who told of a lost link, of which rank, and why."""


@asynccontextmanager
async def parties(size: int, timeout_s: float = 5) -> AsyncIterator[list[Party]]:
    """The parties of one lane."""
    async with instances(size, timeout_s) as made:
        yield [each["decode"] for each in made]


@asynccontextmanager
async def instances(size: int, timeout_s: float = 5) -> AsyncIterator[list[Parties]]:
    transport = MemoryTransport()
    addresses = [f"party-{rank}" for rank in range(size)]
    made = [
        Parties(
            Seat(
                epoch=1,
                rank=rank,
                addresses=addresses,
                listener=transport.listen(addresses[rank], decoder()),
                dial=lambda address: transport.dial(address, decoder()),
                timeout_s=timeout_s,
                on_lost=lambda lost, reason, rank=rank: LOST.append((rank, lost, reason)),
            )
        )
        for rank in range(size)
    ]
    tasks = TASKS[:] = [asyncio.create_task(each.run()) for each in made]
    await asyncio.sleep(0)
    yield made
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def notice(party: Party, rank: int, lane: Lane = "decode", **fields: object) -> Notice:
    lists = ("ready", "decodes", "prefills", "released", "cancels", "handoffs", "last_tokens", "flips")
    return Notice(
        epoch=1,
        lane=lane,
        party=party.grouping.number,
        step=party.step,
        rank=rank,
        digest=party.digest,
        both_lanes=False,
        budget=1,
        paced_budget=1,
        reach=1,
        grain=1,
        groupings=party.news(),
        **({name: [] for name in lists} | fields),  # type: ignore[arg-type]
    )


async def step(party: Party, rank: int, lane: Lane = "decode", **fields: object) -> list[int] | None:
    """One exchange; returns the cancels of the derived step, which stand for any work here."""
    notices = await party.exchange(notice(party, rank, lane, **fields))
    if notices is None:
        return None
    derived = derive(notices)
    party.advance(derived.digest(), rest=derived.is_empty())
    return derived.cancels


async def test_alone_needs_nobody() -> None:
    async with parties(2) as made:
        assert await step(made[0], 0, cancels=[7]) == [7]
        assert made[0].step == 1
        assert not made[0].is_called


async def test_members_meet_in_the_new_party_and_derive_the_same() -> None:
    async with parties(3) as made:
        both = Grouping(number=4, members=[0, 2])
        made[0].learn([both])
        made[2].learn([both])
        assert made[0].is_called
        assert await step(made[0], 0) is None  # the party changed
        assert await step(made[2], 2) is None
        assert await asyncio.gather(step(made[0], 0, cancels=[1]), step(made[2], 2, cancels=[2])) == [[1, 2], [1, 2]]
        assert made[0].digest == made[2].digest != []


async def test_the_leader_wakes_who_rests() -> None:
    async with parties(2) as made:
        pair = Grouping(number=1, members=[0, 1])
        for rank, party in enumerate(made):
            party.learn([pair])
            assert await step(party, rank) is None
        await asyncio.gather(step(made[0], 0), step(made[1], 1))  # empty: both rest
        assert not made[0].is_called
        assert not made[1].is_called
        leads = asyncio.create_task(step(made[0], 0, cancels=[3]))
        async with asyncio.timeout(2):
            while not made[1].is_called:
                made[1].woken.clear()
                await made[1].woken.wait()
        assert await step(made[1], 1) == [3] == await leads
        follows = asyncio.create_task(step(made[1], 1, cancels=[4]))
        assert made[0].is_called  # the step was not empty
        assert await step(made[0], 0) == [4] == await follows


async def test_a_late_member_is_waited_for_and_named() -> None:
    async with parties(2, timeout_s=0.05) as made:
        made[0].learn([Grouping(number=1, members=[0, 1])])
        assert await step(made[0], 0) is None
        with pytest.raises(PartyTimeout, match=r"party 1 waited .* in step 0 for ranks \[1\]"):
            await step(made[0], 0)


async def test_a_round_that_was_overtaken_sends_all_on() -> None:
    async with parties(3) as made:
        made[0].learn([Grouping(number=1, members=[0, 1, 2])])
        made[1].learn([Grouping(number=1, members=[0, 1, 2])])
        assert await step(made[0], 0) is None
        assert await step(made[1], 1) is None
        waiting = [asyncio.create_task(step(made[r], r)) for r in (0, 1)]  # rank 2 has not heard of party 1
        await asyncio.sleep(0.01)
        apart = [Grouping(number=2, members=[0]), Grouping(number=2, members=[1, 2])]
        made[0].learn(apart)
        assert await asyncio.gather(*waiting) == [None, None]
        assert made[1].grouping == apart[1]
        made[2].learn(apart)
        assert await step(made[2], 2) is None
        assert await asyncio.gather(step(made[1], 1), step(made[2], 2, cancels=[9])) == [[9], [9]]


async def test_lanes_go_to_a_new_party_and_step_in_it_each_by_itself() -> None:
    """One socket, and notices of one lane while another is still in the old party."""
    async with instances(2) as made:
        for each in made:
            each.learn([Grouping(number=1, members=[0, 1])])
        decode = [each["decode"] for each in made]
        prefill = [each["prefill"] for each in made]
        assert [await step(party, rank) for rank, party in enumerate(decode)] == [None, None]
        for seq in (1, 2, 3):
            both = await asyncio.gather(*(step(party, rank, cancels=[seq + rank]) for rank, party in enumerate(decode)))
            assert both == [[seq, seq + 1]] * 2
        assert [party.grouping.number for party in prefill] == [0, 0]
        assert [await step(party, rank, "prefill") for rank, party in enumerate(prefill)] == [None, None]
        assert await asyncio.gather(*(step(p, rank, "prefill", cancels=[9]) for rank, p in enumerate(prefill))) == [[9], [9]]
        assert [party.step for party in (*decode, *prefill)] == [3, 3, 1, 1]


async def test_foreign_messages_are_dropped_and_counted() -> None:
    async with instances(2) as made:
        party = made[1]["decode"]
        stranger = party._seat.dial("party-0")
        stranger.send(notice(party, 1).__class__(**(_fields(notice(party, 1)) | {"epoch": 9})))
        stranger.send(notice(party, 77))
        async with asyncio.timeout(2):
            while made[0].dropped < 2:
                await asyncio.sleep(0)
        assert made[0].dropped == 2
        await stranger.close()


async def broken(task: asyncio.Task[None]) -> str:
    """What ends the parties of an instance."""
    async with asyncio.timeout(2):
        with pytest.raises(ExceptionGroup) as raised:
            await task
    (error,) = raised.value.exceptions
    assert isinstance(error, PartyBroken)
    return str(error)


@pytest.mark.parametrize("garbled", ["notice", "answer"])
async def test_what_can_not_be_read_ends_the_party_at_once(garbled: str) -> None:
    """It was counted as dropped, and the member waited for the rest of its time limit."""
    async with instances(2, timeout_s=600) as made:
        party = made[1]["decode"]
        for each in made:
            each.learn([Grouping(number=1, members=[0, 1])])
        for rank, each in enumerate(made):
            await step(each["decode"], rank)
        waits = asyncio.create_task(step(party, 1))
        await asyncio.sleep(0)
        if garbled == "notice":
            party._dialers[0].send(m.Pong())
            said = "rank 0 can't read what this instance sends: "
        else:
            leader = made[0]["decode"]
            async with asyncio.timeout(2):
                while 1 not in leader._peers:  # its notice is on the way
                    await asyncio.sleep(0)
            leader._seat.listener.send(leader._peers[1], m.Pong())
            said = "what rank 0 sends can't be read: "
        assert (await broken(TASKS[1])).startswith(said)
        waits.cancel()


@pytest.mark.parametrize("gone", [0, 1])
async def test_a_lost_link_is_told_by_who_has_it(gone: int) -> None:
    LOST.clear()
    async with instances(2) as made:
        for each in made:
            each.learn([Grouping(number=1, members=[0, 1])])
        await asyncio.gather(*(step(each["decode"], rank) for rank, each in enumerate(made)))
        rounds = [asyncio.create_task(step(each["decode"], rank)) for rank, each in enumerate(made)]
        await asyncio.gather(*rounds)
        TASKS[gone].cancel()
        await asyncio.wait([TASKS[gone]])
        await made[gone]["decode"]._seat.listener.close()
        async with asyncio.timeout(2):
            while not LOST:
                await asyncio.sleep(0.01)
    assert [(rank, lost) for rank, lost, _ in LOST if rank != gone] == [(1 - gone, gone)]


@pytest.mark.parametrize("seed", range(25))
async def test_random_regroupings_never_split_a_round(seed: int) -> None:
    """Members hear of parties at random times; whatever completes, completes for all members with the same notices."""
    rng = random.Random(seed)
    size = 4
    history: list[list[Grouping]] = []
    for number in range(1, 8):
        ranks = list(range(size))
        rng.shuffle(ranks)
        cut = rng.randint(1, size)
        groups = [sorted(ranks[:cut]), sorted(ranks[cut:])]
        history.append([Grouping(number=number, members=g) for g in groups if g])
    rounds: dict[tuple[int, int, tuple[int, ...]], dict[int, list[int] | None]] = {}

    async with parties(size) as made:

        async def live(rank: int) -> None:
            party = made[rank]
            done = asyncio.create_task(hear(rank))
            last = history[-1][0].number
            while not (party.grouping.number == last and party.step == 3):  # the same end for all members
                key = (party.grouping.number, party.step, tuple(party.members))
                cancels = await step(party, rank, cancels=[rank])
                if cancels is not None:
                    rounds.setdefault(key, {})[rank] = cancels
                await asyncio.sleep(rng.random() * 0.002)
            await done

        async def hear(rank: int) -> None:
            for groupings in history:
                await asyncio.sleep(rng.random() * 0.01)
                made[rank].learn(groupings)

        async with asyncio.timeout(20):
            await asyncio.gather(*(live(rank) for rank in range(size)))
    for (_, _, members), seen in rounds.items():
        assert sorted(seen) == list(members)
        assert all(cancels == list(members) for cancels in seen.values())


def _fields(notice: Notice) -> dict[str, object]:
    return {name: getattr(notice, name) for name in notice.__struct_fields__}
