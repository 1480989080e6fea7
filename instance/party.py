"""Who steps together now, and how their notices meet: rounds led by the party's lowest rank.

    member                      leader
      | -- Notice (step n) -->    |     waits for those of all members
      | <-- Round (all) ---------  |     or, if it knows of a newer party for any of them:
      | <-- Superseded ----------  |
      | <-- Wake ----------------  |     somebody has work, the others' notices are missing

A member that has sent its notice waits for the leader's answer and nothing else; the leader alone decides whether the round
completes. So a round completes for all of a party or for none, and parties change only between two rounds.

An instance is in a party of each lane. Both have the same members, but for the time that one takes longer to change; they meet
at one socket, and know nothing of each other.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gmanager.wire.channel import Dialer, Listener, PeerLost
from gmanager.wire.errors import BadMessage, PeerGone
from gmanager.wire.messages import Message
from instance.errors import PartyBroken, PartyTimeout
from instance.step import LANES, Grouping, Lane, Notice


class Round(Message):
    """All notices of a party's step."""

    epoch: int
    party: int
    step: int
    notices: list[Notice]


class Superseded(Message):
    """The party that a notice was for is over: go to this one."""

    epoch: int
    party: int
    next: Grouping


class Wake(Message):
    """Send your notice for this step: another member has work."""

    epoch: int
    party: int
    step: int


class Unreadable(Message):
    """What came from there can't be read: who sent it must not wait for an answer."""

    reason: str


PartyMessage = Notice | Round | Superseded | Wake | Unreadable


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where an instance meets the others of its epoch."""

    epoch: int
    rank: int
    addresses: Sequence[str]
    """Of the party socket of each rank."""
    listener: Listener[PartyMessage]
    """The own socket."""
    dial: Callable[[str], Dialer[PartyMessage]]
    """Connects to one of `addresses`."""
    timeout_s: float
    """Longest wait for the others' notices."""
    on_lost: Callable[[int, str], None]
    """Told of a rank whose connection has ended, and why."""


class Parties:
    """The parties of one instance, one in each lane, within one epoch."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._misdirected = 0
        self._parties = {lane: Party(seat) for lane in LANES}

    def __getitem__(self, lane: Lane) -> "Party":
        return self._parties[lane]

    @property
    def dropped(self) -> int:
        """Messages of another epoch, or not to be read."""
        return self._misdirected + sum(party.dropped for party in self._parties.values())

    def learn(self, groupings: Sequence[Grouping]) -> None:
        """Hear of parties, in all lanes."""
        for party in self._parties.values():
            party.learn(groupings)

    def wake(self) -> None:
        """There may be work in any lane."""
        for party in self._parties.values():
            party.woken.set()

    async def run(self) -> None:
        """Read the parties' sockets until cancelled. Raises what goes wrong with them."""
        seat, size = self._seat, len(self._seat.addresses)
        try:
            async with asyncio.TaskGroup() as tasks:
                for party in self._parties.values():
                    party.open(tasks)
                while True:
                    peer, message = await seat.listener.recv()
                    if isinstance(message, Notice) and message.epoch == seat.epoch and 0 <= message.rank < size:
                        self._parties[message.lane].hear(peer, message)
                    elif isinstance(message, PeerLost):
                        self._lose(peer, message.reason)
                    else:
                        self._misdirected += 1
                        if isinstance(message, BadMessage):
                            seat.listener.send(peer, Unreadable(reason=str(message)))
        finally:
            for party in self._parties.values():
                await party.close()

    def _lose(self, peer: bytes, reason: str) -> None:
        self._seat.listener.forget(peer)
        ranks = {rank for party in self._parties.values() if (rank := party.rank_of(peer)) is not None}
        for rank in sorted(ranks):
            self._seat.on_lost(rank, reason)


class Party:
    """The present party of one instance in one lane, within one epoch. It starts alone."""

    def __init__(self, seat: Seat) -> None:
        """`Parties` alone reads the seat's listener."""
        self.grouping = Grouping(number=0, members=[seat.rank])
        self.step = 0
        self.digest: list[int] = []
        self.woken = asyncio.Event()
        """Set when there is a reason to look for work."""
        self.dropped = 0
        """Answers of another epoch, or not to be read."""
        self._seat = seat
        self._rank = seat.rank
        self._called = False
        self._closed = False
        self._newest = {r: Grouping(number=0, members=[r]) for r in range(len(seat.addresses))}
        self._inbox: dict[tuple[int, int], dict[int, Notice]] = {}
        self._peers: dict[int, bytes] = {}
        self._dialers: dict[int, Dialer[PartyMessage]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._answer: asyncio.Future[Round | Superseded] | None = None

    @property
    def members(self) -> list[int]:
        return self.grouping.members

    @property
    def is_called(self) -> bool:
        """Whether the party waits for a notice from here, or there is a party to change to."""
        return self._called or self._newest[self._rank].number > self.grouping.number

    def learn(self, groupings: Iterable[Grouping]) -> None:
        """Hear of parties. Notices that wait here for one that is over are answered."""
        for grouping in groupings:
            for rank in grouping.members:
                if grouping.number > self._newest[rank].number:
                    self._newest[rank] = grouping
        for (number, step), notices in list(self._inbox.items()):
            for rank in list(notices):
                if self._newest[rank].number > number:
                    del notices[rank]
                    self._reply([rank], Superseded(epoch=self._seat.epoch, party=number, next=self._newest[rank]))
            if not notices:
                del self._inbox[number, step]
        self.woken.set()

    def news(self) -> list[Grouping]:
        """Newer parties of present members, for the leader to hear of."""
        newer = [self._newest[rank] for rank in self.members if self._newest[rank].number > self.grouping.number]
        return list({(g.number, tuple(g.members)): g for g in newer}.values())

    async def exchange(self, notice: Notice) -> list[Notice] | None:
        """Bring a notice to the present party; returns those of all members.

        None: the party changed instead, nothing was decided; propose again. Raises PartyTimeout when the others don't come.
        """
        self._called = False
        leader = self.members[0]
        self._answer = asyncio.get_running_loop().create_future()
        if leader == self._rank:
            self._take(notice)
            self._wake_missing()
        else:
            self._dialer(leader).send(notice)
        try:
            async with asyncio.timeout(self._seat.timeout_s):
                answer = await self._answer
        except TimeoutError:
            here = self._inbox.get((notice.party, notice.step), {})
            missing = [r for r in self.members if r not in here] if leader == self._rank else [leader]
            raise PartyTimeout(
                f"party {notice.party} waited {self._seat.timeout_s:.0f} s in step {notice.step} for ranks {missing}"
            ) from None
        finally:
            self._answer = None
        if isinstance(answer, Superseded):
            self._enter(answer.next)
            return None
        return answer.notices

    def advance(self, digest: list[int], *, rest: bool) -> None:
        """The step was derived. `rest`: it was empty, so wait to be woken; else the next round follows at once."""
        self.step += 1
        self.digest = digest
        self._called = self._called or (not rest and len(self.members) > 1)

    def open(self, tasks: asyncio.TaskGroup) -> None:
        """Exchange from now on; `tasks` read what leaders answer."""
        self._tasks = tasks

    def hear(self, peer: bytes, notice: Notice) -> None:
        """As leader, or who may become one: another member's notice has come."""
        self._peers[notice.rank] = peer
        self._take(notice)

    def rank_of(self, peer: bytes) -> int | None:
        """Whose notices come from there; None if none came."""
        return next((rank for rank, known in self._peers.items() if known == peer), None)

    async def close(self) -> None:
        """Hang up on all leaders."""
        self._closed = True
        for dialer in self._dialers.values():
            await dialer.close()

    def _enter(self, grouping: Grouping) -> None:
        self.learn([grouping])
        self.grouping = grouping
        self.step = 0
        self.digest = []
        # every member comes to a party's first round: a leader can only wake those it has heard
        self._called = len(grouping.members) > 1

    def _take(self, notice: Notice) -> None:
        """As leader: a notice has come, perhaps for a party or step that this instance has yet to reach."""
        self._inbox.setdefault((notice.party, notice.step), {})[notice.rank] = notice
        self.learn(notice.groupings)
        here = self._inbox.get((self.grouping.number, self.step), {})
        if notice.party != self.grouping.number:
            return
        if sorted(here) == self.members:
            del self._inbox[self.grouping.number, self.step]
            notices = [here[rank] for rank in self.members]
            self._reply(self.members, Round(epoch=self._seat.epoch, party=notice.party, step=notice.step, notices=notices))
        elif self._rank not in here:
            self._called = True

    def _reply(self, ranks: Sequence[int], answer: Round | Superseded) -> None:
        self._seat.listener.send_all([self._peers[rank] for rank in ranks if rank != self._rank], answer)
        if self._rank in ranks and self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    def _wake_missing(self) -> None:
        here = self._inbox.get((self.grouping.number, self.step), {})
        if self._rank in here:
            missing = [self._peers[rank] for rank in self.members if rank not in here and rank in self._peers]
            self._seat.listener.send_all(missing, Wake(epoch=self._seat.epoch, party=self.grouping.number, step=self.step))

    def _dialer(self, leader: int) -> Dialer[PartyMessage]:
        if leader not in self._dialers:
            if self._tasks is None:
                raise RuntimeError("a party exchanges only while it runs")
            self._dialers[leader] = self._seat.dial(self._seat.addresses[leader])
            self._tasks.create_task(self._follow(leader, self._dialers[leader]))
        return self._dialers[leader]

    async def _follow(self, leader: int, dialer: Dialer[PartyMessage]) -> None:
        """Read one leader's answers, until it is gone: then the gManager, which hears of it, ends the epoch.

        Raises PartyBroken if one of both can't read what the other sends.
        """
        while True:
            try:
                message = await dialer.recv()
            except PeerGone as gone:
                if not self._closed:
                    self._seat.on_lost(leader, str(gone))
                return
            if isinstance(message, BadMessage):
                raise PartyBroken(f"what rank {leader} sends can't be read: {message}")
            if isinstance(message, Unreadable):
                raise PartyBroken(f"rank {leader} can't read what this instance sends: {message.reason}")
            if not isinstance(message, Wake | Round | Superseded) or message.epoch != self._seat.epoch:
                self.dropped += 1
            elif message.party != self.grouping.number:
                continue  # of a party that this instance has left
            elif isinstance(message, Wake):
                if message.step > self.step or self._answer is None:  # else the notice is on its way
                    self._called = True
                    self.woken.set()
            elif self._answer is not None and not self._answer.done():
                self._answer.set_result(message)
