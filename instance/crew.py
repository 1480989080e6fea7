"""The ranks of an instance whose model is split between them: the first leads, the others run on their devices what it runs.

    the others                                the first
      | -- RankReady (tokens of a pool) ------> |   once its part is loaded
      | <-------------- UsePool (tokens) ------ |   the fewest of all; then all warm up
      | <-------------- JoinEpoch ------------- |   as the gManager has sent it
      | -- RankFormed ------------------------> |
      | <-------------- RunStep (plan) -------- |   each step, before it runs on the first
      | -- RankBroke -------------------------> |   if one fails there
      | <-------------- MoveBlocks ------------ |   their part of blocks that go to another instance, or come from one
      | -- RankMoved -------------------------> |
      | <-------------- LetGo ----------------- |   the epoch is over
      | -- RankEnded -------------------------> |   nothing writes to its pool any more

Only the first knows of sequences, blocks that are free, or the gManager. Scheduling is its alone, and block numbers mean the
same on all ranks: each has its heads' part of every block.
"""

import asyncio
import hashlib
import os
import secrets
import stat
from array import array
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from distattn.budget import TransferEnded
from distattn.layout import Layout, Reading
from gmanager.wire import messages as wire
from gmanager.wire.channel import Listener, PeerLost, Transport
from gmanager.wire.codec import Decoder
from gmanager.wire.errors import BadMessage
from gmanager.wire.messages.base import Message, Part
from gmanager.wire.peer import PeerId
from instance.cell import make_group
from instance.config import InstanceConfig
from instance.errors import InstanceError
from instance.plan import SampledRow, ScoredRows, StepPlan
from instance.split import Place
from instance.step import Lane
from instance.team import Team

dist: Any = torch.distributed  # its stubs lack FileStore

_ADDRESS = "first rank"


class RankReady(Message):
    """The rank's part of the model is loaded."""

    rank: int
    token: str
    """That the first has left where they meet."""
    tokens: int
    """Of the largest pool that fits beside it."""
    fingerprint: str
    """Of it."""


class RankFormed(Message):
    """The rank has met the others of the epoch."""

    epoch: int


class RankBroke(Message):
    """The rank can't go on with the epoch."""

    epoch: int
    reason: str


class RankEnded(Message):
    """Nothing writes to the rank's pool any more."""

    epoch: int


class RankMoved(Message):
    """The rank's end of a copy is over."""

    epoch: int
    move: int
    error: str | None


class UsePool(Message):
    """How large the pool is to be."""

    tokens: int


class LetGo(Message):
    """The epoch is over."""

    epoch: int


class MoveBlocks(Message):
    """Send the rank's part of these blocks to the same rank of another instance, or receive it; None: say that there is
    nothing to be copied."""

    epoch: int
    move: int
    peer: int
    """Rank of that instance in the epoch."""
    is_source: bool
    block_ids: bytes | None


class PackedReading(Part):
    """A `Reading`; its lists as int32, as this machine has them."""

    first_row: int
    num_rows: int
    block_ids: bytes
    kv_lens: bytes
    starts: bytes


class PackedLayout(Part):
    """A `Layout`, likewise."""

    num_rows: int
    own: list[PackedReading]
    dispatched_rows: bytes
    dispatched: dict[int, int]
    received: dict[int, int]
    others: list[PackedReading]


class RunStep(Message):
    """A `StepPlan`, as far as ranks need it that sample nothing."""

    epoch: int
    lane: Lane
    processors: int
    token_ids: bytes
    positions: bytes
    pending: list[tuple[int, int]]
    sampled_rows: bytes
    scored: list[tuple[int, int]]
    """First row and number of rows."""
    slots: list[bytes]
    """int64."""
    layouts: list[PackedLayout]
    needs_logits: bool
    is_decode: bool
    samples_at: int

    @staticmethod
    def of(plan: StepPlan, *, epoch: int, lane: Lane, processors: int) -> "RunStep":
        """The message for a plan."""
        return RunStep(
            epoch=epoch,
            lane=lane,
            processors=processors,
            token_ids=_ints(plan.token_ids_T),
            positions=_ints(plan.positions_T),
            pending=plan.pending,
            sampled_rows=_ints([sampled.row for sampled in plan.sampled]),
            scored=[(rows.first_row, len(rows.token_ids)) for rows in plan.scored],
            slots=[array("q", slots).tobytes() for slots in plan.slots],
            layouts=[_packed(layout) for layout in plan.layouts],
            needs_logits=plan.needs_logits,
            is_decode=plan.is_decode,
            samples_at=plan.samples_at,
        )

    def plan(self) -> StepPlan:
        """What the rank runs: tokens are sampled, and scored, by the first alone."""
        nobody = wire.SequenceParams(max_tokens=1, temperature=0, top_k=0, top_p=1, seed=0, stop_token_ids=[], logprobs=None)
        slots, *other_slots = (list(array("q", its)) for its in self.slots)
        layout, *other_layouts = (_layout(its) for its in self.layouts)
        return StepPlan(
            token_ids_T=_list(self.token_ids),
            positions_T=_list(self.positions),
            pending=self.pending,
            sampled=[SampledRow(row, -1, 0, nobody, 0) for row in _list(self.sampled_rows)],
            scored=[ScoredRows(-1, first, 0, array("i", [0] * count), 0) for first, count in self.scored],
            slots_T=slots,
            layout=layout,
            other_layouts=other_layouts,
            other_slots=other_slots,
            needs_logits=self.needs_logits,
            is_decode=self.is_decode,
            samples_at=self.samples_at,
        )


ToFirst = RankReady | RankFormed | RankBroke | RankEnded | RankMoved
ToRank = UsePool | wire.JoinEpoch | RunStep | MoveBlocks | LetGo


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where an instance's ranks, all on one machine, find each other."""

    store: Any
    team: Team | None
    """For what those that have the same layers do together outside of epochs; None: each has layers of its own."""

    @staticmethod
    def of(path: Path, place: Place, device: torch.device, host: str, timeout_s: float) -> "Meeting":
        """All ranks call this at once, with the same `path` of a file that is to be.

        Raises InstanceError if that lies in another user's directory, RuntimeError if they don't come.
        """
        _make_private(path.parent)
        store = dist.FileStore(str(path), place.ranks)
        store.set_timeout(timedelta(seconds=timeout_s))
        if place.parts == 1:
            return Meeting(store, None)
        prefixed = dist.PrefixStore(f"team-{place.stage}", store)
        return Meeting(store, Team(make_group(prefixed, host, place.part, place.parts, device, timeout_s), place))

    def tell_address(self, address: str, token: str) -> None:
        """Of the first rank's socket, and what it wants to hear there."""
        self.store.set(_ADDRESS, f"{address} {token}".encode())

    def address(self) -> tuple[str, str]:
        """Waits for both. Raises RuntimeError if they aren't told in time."""
        told: bytes = self.store.get(_ADDRESS)
        address, token = told.decode().split()
        return address, token


class Crew:
    """The other ranks, as the first sees them."""

    def __init__(self, listener: Listener[ToFirst], place: Place, token: str, timeout_s: float) -> None:
        """`token`: by which ranks are known from others who speak to the listener. `timeout_s`: longest wait for them."""
        self.broke: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why a rank can't go on with the present epoch."""
        self._listener = listener
        self._place = place
        self._token = token
        self._timeout_s = timeout_s
        self._epoch = 0
        """The newest."""
        self._is_over = True
        """It has ended."""
        self._peers: dict[PeerId, int] = {}
        """Peer -> rank."""
        self._tokens: dict[int, int] = {}
        self._fingerprints: dict[int, str] = {}
        """By rank."""
        self._reached: dict[tuple[str, int], set[PeerId]] = {}
        """(what, epoch) -> who has said so."""
        self._news = asyncio.Event()
        self._moves: dict[int, tuple[list[str | None], asyncio.Future[str | None]]] = {}
        """Move -> what the ranks have said of their ends, and who waits for all of it."""

    @staticmethod
    async def muster(config: InstanceConfig, meeting: Meeting, transport: Transport) -> "Crew":
        """Wait until all ranks have loaded their parts. Raises InstanceError if they don't come, or one is lost."""
        decoder: Decoder[ToFirst] = Decoder(ToFirst)
        token = secrets.token_hex(16)
        crew = Crew(transport.listen("tcp://127.0.0.1:*", decoder), config.place, token, config.step_timeout_s)
        meeting.tell_address(crew._listener.address, token)
        try:
            async with asyncio.timeout(config.step_timeout_s):
                while len(crew._tokens) < config.place.ranks - 1:
                    await crew._hear()
        except TimeoutError:
            missing = sorted(set(range(1, config.place.ranks)) - crew._tokens.keys())
            raise InstanceError(f"ranks {missing} of {config.place.ranks} did not come") from None
        if config.meeting is not None:
            config.meeting.unlink(missing_ok=True)
        return crew

    def use_pool(self, tokens: int | None) -> int:
        """Let all have pools of as many tokens as fit on each; `tokens`: here. How many that are."""
        fewest = min([*self._tokens.values(), *([] if tokens is None else [tokens])])
        self._listener.send_all(list(self._peers), UsePool(tokens=fewest))
        return fewest

    def fingerprint(self, own: str) -> str:
        """Of the whole model; `own`: of the first rank's part."""
        parts = [own, *(self._fingerprints[rank] for rank in sorted(self._fingerprints))]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def form(self, join: wire.JoinEpoch) -> None:
        """Let all take part in an epoch."""
        self._epoch, self._is_over = join.epoch, False
        self.broke = asyncio.get_running_loop().create_future()
        self._listener.send_all(list(self._peers), join)

    async def have_formed(self, epoch: int) -> None:
        """Raises InstanceError if a rank can't, or the epoch ends meanwhile."""
        await self._until("formed", epoch)

    async def unless_broken(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it, but for as long as all ranks can go on. Raises InstanceError if one can't."""
        task = asyncio.create_task(work)
        try:
            waits: list[asyncio.Future[Any]] = [task, self.broke]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise InstanceError(self.broke.result())
            await task
        finally:
            task.cancel()

    def run(self, epoch: int, lane: Lane, plan: StepPlan, processors: int) -> None:
        """Queue a step on all."""
        step = RunStep.of(plan, epoch=epoch, lane=lane, processors=processors)
        self._listener.send_all(list(self._peers), step)

    def send_blocks(self, asked: wire.CopyRun, block_ids: Sequence[int] | None) -> None:
        """Let all send their part of a copy."""
        self._tell_move(asked, asked.target, block_ids, is_source=True)

    def receive_blocks(self, asked: wire.CopyRun, block_ids: Sequence[int] | None) -> "asyncio.Future[str | None]":
        """Let all receive their part of a copy. Once none of them writes any more: what is wrong with one of them; None:
        nothing. Raises TransferEnded when the epoch ends."""
        moved: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._moves[asked.move] = [], moved
        self._tell_move(asked, asked.source, block_ids, is_source=False)
        return moved

    def _tell_move(self, asked: wire.CopyRun, peer: int, block_ids: Sequence[int] | None, *, is_source: bool) -> None:
        packed = None if block_ids is None else _ints(block_ids)
        move = MoveBlocks(epoch=asked.epoch, move=asked.move, peer=peer, is_source=is_source, block_ids=packed)
        self._listener.send_all(list(self._peers), move)

    def end(self, epoch: int) -> None:
        """Let all stop, at once, if they were told of it."""
        if self._epoch != epoch or self._is_over:
            return
        self._is_over = True
        self._listener.send_all(list(self._peers), LetGo(epoch=epoch))
        for _, moved in self._moves.values():
            if not moved.done():
                moved.set_exception(TransferEnded("the epoch ended"))
        self._moves.clear()
        self._news.set()

    async def have_ended(self, epoch: int) -> None:
        """Nothing writes to any pool any more. Raises InstanceError if they don't let go in time."""
        if self._epoch == epoch:
            await self._until("ended", epoch)
            self._reached.clear()

    async def watch(self) -> None:
        """Hear what they say, for ever. Raises InstanceError if one is lost: then its part of all KV is."""
        while True:
            await self._hear()

    async def close(self) -> None:
        """The others end when they see that."""
        await self._listener.close()

    async def _until(self, what: str, epoch: int) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                while len(self._reached.get((what, epoch), ())) < len(self._peers):
                    if what == "formed" and self.broke.done():
                        raise InstanceError(self.broke.result())
                    if what == "formed" and (self._is_over or self._epoch != epoch):
                        raise InstanceError("the epoch ended while it was being formed")
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise InstanceError(f"the other ranks have not {what} epoch {epoch} within {self._timeout_s:g} s") from None

    async def _hear(self) -> None:
        peer, said = await self._listener.recv()
        if peer not in self._peers and not self._is_rank(said):
            return
        match said:
            case RankReady():
                self._peers[peer] = said.rank
                self._tokens[said.rank] = said.tokens
                self._fingerprints[said.rank] = said.fingerprint
            case RankFormed():
                self._reached.setdefault(("formed", said.epoch), set()).add(peer)
            case RankEnded():
                self._reached.setdefault(("ended", said.epoch), set()).add(peer)
            case RankMoved() if said.move in self._moves:
                errors, moved = self._moves[said.move]
                errors.append(said.error)
                if len(errors) == len(self._peers):
                    del self._moves[said.move]
                    moved.set_result(next((error for error in errors if error is not None), None))
            case RankBroke() if said.epoch == self._epoch and not self.broke.done():
                self.broke.set_result(f"rank {self._peers[peer]} of {self._place.ranks}: {said.reason}")
            case PeerLost():
                raise InstanceError(f"rank {self._peers[peer]} of {self._place.ranks} is lost: {said.reason}")
            case BadMessage():
                raise InstanceError(f"what rank {self._peers[peer]} of {self._place.ranks} says can't be read: {said}")
        self._news.set()

    def _is_rank(self, said: "ToFirst | BadMessage | PeerLost") -> bool:
        """Whether it is the first word of a rank that is still missing."""
        return (
            isinstance(said, RankReady)
            and secrets.compare_digest(said.token, self._token)
            and said.rank in range(1, self._place.ranks)
            and said.rank not in self._tokens
        )


def _make_private(folder: Path) -> None:
    """A directory that only this user can write to. Raises InstanceError if it is another's, or open to others."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InstanceError(f"{folder} is not this user's alone: the ranks of an instance can't meet there")


def _ints(values: Sequence[int]) -> bytes:
    return array("i", values).tobytes()


def _list(packed: bytes) -> list[int]:
    return list(array("i", packed))


def _packed(layout: Layout) -> PackedLayout:
    own, others = (
        [
            PackedReading(
                first_row=reading.first_row,
                num_rows=reading.num_rows,
                block_ids=_ints(reading.block_ids),
                kv_lens=_ints(reading.kv_lens),
                starts=_ints(reading.starts),
            )
            for reading in readings
        ]
        for readings in (layout.own, layout.others)
    )
    return PackedLayout(
        num_rows=layout.num_rows,
        own=own,
        dispatched_rows=_ints(layout.dispatched_rows),
        dispatched=layout.dispatched,
        received=layout.received,
        others=others,
    )


def _layout(packed: PackedLayout) -> Layout:
    own, others = (
        [
            Reading(its.first_row, its.num_rows, *(tuple(_list(part)) for part in (its.block_ids, its.kv_lens, its.starts)))
            for its in readings
        ]
        for readings in (packed.own, packed.others)
    )
    return Layout(packed.num_rows, own, _list(packed.dispatched_rows), packed.dispatched, packed.received, others)
