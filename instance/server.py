"""One instance: registers, and takes part in its cell's epochs, one after the other.

When the gManager is gone the instance goes on with what runs, and looks for one (`_find_gmanager`). What it generates meanwhile
it keeps (`instance.unheard`) for the answer to the Suspend with which the next gManager ends that epoch.
"""

import asyncio
import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeGuard

import torch

from distattn.exchange import ExchangeError
from gmanager.wire import messages as wire
from gmanager.wire.channel import Transport
from gmanager.wire.codec import Decoder
from gmanager.wire.errors import BadMessage, PeerGone
from gmanager.wire.logs import get_logger
from instance.cell import open_store
from instance.config import InstanceConfig
from instance.copies import Copies
from instance.crew import Crew
from instance.epoch import Epoch, Lasting, first_error
from instance.errors import EpochEnded, InstanceError, WasDrained
from instance.grammars import grammar_tokenizer
from instance.lane import Lanes
from instance.model import Model
from instance.party import PartyMessage
from instance.pool_told import newest_cached, told_of_cached, told_of_kept
from instance.processors import Processors
from instance.rmanager import RManager
from instance.step import Grouping
from instance.tiering import Store, Tiering
from instance.unheard import Unheard
from kvstore.storage import KVStorage
from kvstore.tiers import Tiers

log = get_logger("instance")

BEAT_S = 1.0

REDIAL_S = 0.2
"""Between two gManagers that hung up."""

MOST_CACHED = 2**12
"""Sequences of which one message says what is cached."""


class Instance:
    """Serves one model from one pool of KV. `run` returns when `stop` was called and raises when something broke."""

    def __init__(
        self,
        config: InstanceConfig,
        model: Model,
        assets: wire.TextAssets,
        spec: wire.InstanceSpec,
        storage: KVStorage,
        transport: Transport,
        tiers: Store | None = None,
        crew: Crew | None = None,
    ) -> None:
        """Listens for its party, and begins to dial the gManager. `tiers`: below the pool. `crew`: of the other
        ranks, where the model is split between several. Needs a running loop. Raises AddressError."""
        to_instance: Decoder[wire.ToInstance] = Decoder(wire.ToInstance)
        party_decoder: Decoder[PartyMessage] = Decoder(PartyMessage)
        self._config = config
        self._assets = assets
        self._spec = spec
        self._listener = transport.listen(f"tcp://{config.host}:*", party_decoder)
        self._dial = partial(transport.dial, config.gmanager, to_instance)
        self._gmanager = self._dial()
        self._is_registered = False
        self._is_alone = False
        """The gManager that the epoch is of is gone."""
        self._term, self._identity = 0, 0
        """Of the gManager."""
        self._former: wire.Former | None = None
        """What to say of this instance to the next gManager."""
        self._unheard = Unheard()
        self._requests: dict[int, int] = {}
        """seq -> number of the request, of KV that was kept over the end of an epoch in which its home was here."""
        self._rmanager = RManager(
            storage.num_blocks,
            storage.block_size,
            None if tiers is None else Tiers(tiers.slots),
            model.shape.windows,
            config.chunk_tokens,
        )
        self._tiering: Tiering | None = None
        if tiers is not None:
            checks = config.check_cache
            self._tiering = Tiering(self._rmanager, tiers, storage.block_bytes, model.device, checks=checks)
        self._lasting = Lasting(
            config=config,
            model=model,
            tokenizer=grammar_tokenizer(assets, model.vocab_size),
            storage=storage,
            rmanager=self._rmanager,
            processors=Processors.of(model.device, config.decode_processors) if model.device.type == "cuda" else None,
            transport=transport,
            listener=self._listener,
            party_decoder=party_decoder,
            tiering=self._tiering,
            crew=crew,
        )
        self._crew = crew
        self._epoch: Epoch | None = None
        """None: there is none yet, or it has ended and the next has yet to begin."""
        self._change: asyncio.Task[None] | None = None
        """What forms and runs the present epoch, or ended the one before."""
        self._lease_s = 0.0
        self._silence: str | None = None
        """Why this instance waits for the gManager no longer."""
        self._patience = asyncio.timeout(None)
        """How long it waits for the next message: until `_beat` finds that none will come."""
        self._unanswered = 0
        """Beats since something was heard of the gManager: not time, which passes for a process that is stopped, too."""
        self._dropped = 0
        self._counted = wire.Counters()
        """In epochs that are over."""
        self._evicted_before = 0
        """Blocks, before this instance was registered."""
        self._stop_reason: asyncio.Future[str] | None = None
        self._is_leaving = False
        """It has asked to be emptied, and ends then."""
        self._store: object = None
        """Of the epoch, if it was opened here: it serves as long as it is kept."""

    def stop(self, reason: str) -> None:
        """End `run` soon; the gManager is told."""
        if self._stop_reason is not None and not self._stop_reason.done():
            self._stop_reason.set_result(reason)

    def leave(self, reason: str) -> None:
        """End `run` once the others have what is here, or the grace time is over; at once if nobody can see to that."""
        grace_s = self._config.grace_s
        if not grace_s or self._is_leaving or self._is_alone or not self._is_registered or self._former is None:
            self.stop(reason)
            return
        self._is_leaving = True
        log.info("asks to be drained", reason=reason, grace_s=grace_s)
        self._gmanager.send(wire.AskDrain())
        asyncio.get_running_loop().call_later(grace_s, self.stop, f"{reason}, and {grace_s:g} s have passed")

    async def run(self) -> None:
        """Serve. Raises InstanceError (or what broke), after telling the gManager."""
        self._stop_reason = asyncio.get_running_loop().create_future()
        failure: BaseException | None = None
        work = asyncio.create_task(self._serve())
        stopped: asyncio.Future[Any] = self._stop_reason
        try:
            await asyncio.wait([work, stopped], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                failure = work.exception()
        finally:
            if not isinstance(failure, EpochEnded | WasDrained):
                reason = str(failure or (self._stop_reason.done() and self._stop_reason.result()) or "cancelled")
                self._gmanager.send(wire.Leave(reason=reason, failed=failure is not None))
            work.cancel()
            if self._epoch is not None:
                await self._epoch.abandon()
            await asyncio.wait([work])
            if self._tiering is not None:
                await self._tiering.close()
            await self._gmanager.close()
            await self._listener.close()
            if self._crew is not None:
                await self._crew.close()
        if failure is not None:
            raise failure

    # --- control ------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        await self._register()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._beat())
                if self._crew is not None:
                    tasks.create_task(self._crew.watch())
                if self._tiering is not None:
                    tasks.create_task(self._tiering.run(self._on_copied, self._epoch_number))
                while True:
                    try:
                        async with asyncio.timeout(None) as self._patience:
                            message = await self._gmanager.recv()
                    except (PeerGone, TimeoutError) as gone:
                        await self._find_gmanager(self._silence or str(gone))
                        continue
                    self._unanswered = 0
                    if _is_forgotten(message):
                        await self._come_again(message.reason)
                    else:
                        self._obey(message, tasks)
        except* Exception as group:
            raise first_error(group) from None

    async def _register(self) -> None:
        """Greet the gManager; ZeroMQ delivers the greeting when there is one. Raises InstanceError."""
        config = self._config
        try:
            async with asyncio.timeout(config.connect_timeout_s):
                await self._greet()
        except PeerGone:
            raise InstanceError(f"the gManager at {config.gmanager} closed the connection") from None
        except TimeoutError:
            raise InstanceError(f"no gManager answered at {config.gmanager} within {config.connect_timeout_s:.0f} s") from None

    async def _find_gmanager(self, how: str) -> None:
        """The gManager is gone: go on without it until there is one. Raises InstanceError if none comes in time, or it doesn't
        want this instance."""
        config = self._config
        log.warning("gManager lost", reason=how)
        if self._is_leaving:
            raise InstanceError(f"the gManager is gone ({how}) that was to drain this instance")
        self._is_alone, self._is_registered, self._silence, self._unanswered = True, False, None, 0
        self._unheard.cut()
        before = self._gmanager  # stays open: one that stood still must not think us lost before it hears that we come again
        try:
            async with asyncio.timeout(config.connect_timeout_s):
                while not self._is_registered:
                    self._gmanager = self._dial()
                    try:
                        await self._greet()
                    except PeerGone as gone:
                        log.warning("gManager lost", reason=str(gone))
                        await self._gmanager.close()
                        await asyncio.sleep(REDIAL_S)
        except TimeoutError:
            what = f"the gManager is gone ({how}), and none came within {config.connect_timeout_s:.0f} s"
            raise InstanceError(what) from None
        finally:
            await before.close()

    async def _greet(self) -> None:
        """Raises PeerGone, and InstanceError if it refuses this instance."""
        config = self._config
        self._introduce()
        while _is_forgotten(answer := await self._gmanager.recv()) or isinstance(answer, wire.Pong):
            if _is_forgotten(answer) and self._former is not None:
                await self._forget_cell(answer.reason)
                self._introduce()
            # else what it said while it didn't know this instance
        if isinstance(answer, wire.Refused):
            raise InstanceError(f"the gManager refused this instance: {answer.reason}")
        if not isinstance(answer, wire.Registered):
            raise InstanceError(f"the gManager at {config.gmanager} answered the registration with {type(answer).__name__}")
        if answer.identity == self._identity and answer.term < self._term:
            raise PeerGone(f"it has term {answer.term}, and this instance has served a gManager of term {self._term}")
        self._term, self._identity, self._lease_s = answer.term, answer.identity, answer.lease_s
        self._is_registered, self._unanswered = True, 0
        if answer.send_text:
            self._gmanager.send(wire.Text(assets=self._assets))
        log.info("registered", gmanager=config.gmanager, cell=config.cell)

    def _introduce(self) -> None:
        config = self._config
        self._gmanager.send(
            wire.Register(
                protocol=wire.PROTOCOL,
                cell=config.cell,
                cell_size=config.cell_size,
                run_id=config.launch.run_id,
                rank=config.launch.rank,
                party_address=self._listener.address,
                spec=self._spec,
                wanted_id=config.id,
                former=self._former,
                role=config.role,
            )
        )

    async def _beat(self) -> None:
        """Say that we live, and notice when the gManager doesn't."""
        while True:
            await asyncio.sleep(BEAT_S)
            if not self._is_registered:
                continue
            if self._unanswered * BEAT_S > self._lease_s:
                self._silence = f"nothing was heard of it for {self._lease_s:.0f} s"
                self._patience.reschedule(asyncio.get_running_loop().time())
            else:
                self._unanswered += 1
                self._send_beat()

    def _send_beat(self) -> None:
        epoch = self._epoch
        if self._is_alone or epoch is None or epoch.lanes is None:
            self._gmanager.send(wire.Ping())
            return
        self._gmanager.send(
            wire.Beat(
                epoch=epoch.number,
                free_blocks=self._rmanager.free_blocks,
                held_tokens=self._rmanager.take_changes(),
                counters=wire.Counters.sum(self._counted, epoch.counters(), self._own_counters()),
                cached_blocks=self._rmanager.cached_blocks,
                samples=epoch.take_samples(),
                host_blocks=self._rmanager.shards.cache.tiers.num_copies("host"),
                disk_blocks=self._rmanager.shards.cache.tiers.num_copies("disk"),
            )
        )

    def _own_counters(self) -> wire.Counters:
        """Of what isn't counted by epoch."""
        own = wire.Counters(dropped_messages=self._dropped, blocks_evicted=self._rmanager.evicted_blocks - self._evicted_before)
        return own if self._tiering is None else wire.Counters.sum(own, self._tiering.counters())

    def _obey(self, message: wire.Message | BadMessage, tasks: asyncio.TaskGroup) -> None:
        """One message of the gManager. Raises InstanceError if it can't be read: what it asks for would never be done."""
        if isinstance(message, BadMessage):
            raise InstanceError(f"what the gManager sends can't be read: {message}")
        if isinstance(message, wire.Pong):
            self._unheard.hear(message.outputs)
        elif isinstance(message, wire.Registered):
            if message.send_text:  # who was asked before is gone
                self._gmanager.send(wire.Text(assets=self._assets))
        elif isinstance(message, wire.OpenStore):
            self._store, address = open_store(self._config.host, self._config.step_timeout_s)
            self._gmanager.send(wire.StoreOpened(epoch=message.epoch, address=address))
        elif isinstance(message, wire.JoinEpoch):
            size = len(message.members)
            self._former = wire.Former(term=self._term, identity=self._identity, epoch=message.epoch, id=message.id, size=size)
            self._is_alone = False
            self._unheard.forget_left()
            self._epoch = Epoch(self._lasting, message)
            self._change = tasks.create_task(self._join(message, self._epoch, before=self._change))
        elif isinstance(message, wire.Suspend):
            over, self._epoch = self._epoch, None
            if self._tiering is not None:
                self._tiering.pause()
            answer = self._gmanager.send  # not to another gManager than asks
            self._change = tasks.create_task(self._suspend(message, over, answer, before=self._change))
        elif isinstance(message, wire.Discard):
            self._rmanager.discard(message.seq)
            self._tell_of_freed()
        elif isinstance(message, wire.Drained):
            raise WasDrained(message.reason)
        elif isinstance(message, wire.NotDrained):
            self.stop(f"asked to end, and not drained: {message.reason}")
        elif isinstance(message, wire.EndEpoch):
            raise EpochEnded(f"the gManager ended the cell: {message.reason}")
        elif isinstance(message, wire.Refused):
            raise InstanceError(f"the gManager refused this instance: {message.reason}")
        elif self._epoch is None or self._epoch.lanes is None or getattr(message, "epoch", None) != self._epoch.number:
            self._dropped += 1
            log.warning("message dropped", message_type=type(message).__name__)
        elif isinstance(message, wire.OfferRun | wire.CopyRun):
            self._move_run(self._epoch, message, tasks)
        elif isinstance(message, wire.Reserve) and message.source:
            self._share(self._epoch, message, tasks)
        else:
            self._command(self._epoch.lanes, message)
            self._epoch.lanes.parties.wake()

    def _move_run(self, epoch: Epoch, message: wire.OfferRun | wire.CopyRun, tasks: asyncio.TaskGroup) -> None:
        if epoch.copies is None:
            raise InstanceError(f"{type(message).__name__} came, and this instance is alone in its cell")
        if isinstance(message, wire.OfferRun):
            self._tell(epoch.copies.offer(message))
        else:
            tasks.create_task(self._copy(epoch, epoch.copies, message))

    async def _copy(self, epoch: Epoch, copies: Copies, message: wire.CopyRun) -> None:
        """A part in a copy, which may fail alone. Only a kernel that can't be taken back ends the epoch (`Transfers`)."""
        if self._epoch is not epoch:
            return
        try:
            answer = await copies.copy(message)
        except ExchangeError as error:
            if self._epoch is epoch:
                self._on_broken(epoch.number, str(error))
            return
        if answer is not None and self._epoch is epoch:
            self._tell(answer)

    def _share(self, epoch: Epoch, asked: wire.Reserve, tasks: asyncio.TaskGroup) -> None:
        """Grant blocks of another sequence and others besides; first compare those with what was written, if that is known."""
        if not self._rmanager.share(asked.seq, asked.source, asked.shared, asked.row or None):
            self._lacks_source(asked)
            return
        sums = {} if self._tiering is None else self._tiering.known(self._rmanager.shares(asked.seq) or ())
        if self._tiering is None or not sums:
            self._reserve(asked)
        else:
            tasks.create_task(self._check(epoch, self._tiering, asked, sums))

    async def _check(self, epoch: Epoch, tiering: Tiering, asked: wire.Reserve, sums: Mapping[int, int]) -> None:
        is_right = await tiering.are_right(sums)
        if self._epoch is not epoch:
            return
        if self._rmanager.shares(asked.seq) is None:  # given up meanwhile
            self._answer_reserve(asked.epoch, asked.seq, 0)
        elif is_right:
            self._reserve(asked)
        else:
            self._rmanager.drop(asked.seq)
            self._lacks_source(asked)

    def _lacks_source(self, asked: wire.Reserve) -> None:
        self._tell_of_cached()
        free = self._rmanager.free_blocks
        self._gmanager.send(wire.NotGranted(epoch=asked.epoch, seq=asked.seq, free_blocks=free, lacks_source=True))

    def _reserve(self, asked: wire.Reserve) -> None:
        is_granted = self._rmanager.reserve(asked.seq, asked.blocks)
        if not is_granted:
            self._rmanager.drop(asked.seq)  # what it would have shared
        self._answer_reserve(asked.epoch, asked.seq, asked.blocks if is_granted else None)

    def _command(self, lanes: Lanes, message: wire.Message) -> None:
        scheduler = lanes.scheduler
        match message:
            case wire.Reserve():
                self._reserve(message)
            case wire.ReserveNext(seq=seq):
                self._answer_reserve(message.epoch, seq, self._rmanager.reserve_next(seq))
            case wire.Drop(seq=seq):
                self._rmanager.drop(seq)
                self._tell_of_freed()
            case wire.Fetch() if self._tiering is not None:
                self._tiering.fetch(message)
            case wire.Fetch(into_pool=True):
                self._tell(wire.Fetched(epoch=message.epoch, fetch=message.fetch, blocks=0, us=0))
            case wire.StopFetch():
                if self._tiering is not None:
                    self._tiering.stop_fetch(message)
            case wire.Admit():
                scheduler.admit(message)
            case wire.Regroup(number=number, parties=parties):
                lanes.parties.learn([Grouping(number=number, members=members) for members in parties])
            case wire.MoveSequence(seq=seq, to=to):
                scheduler.move(seq, to)
            case wire.FlipRun():
                scheduler.flip(message)
            case wire.Cancel(seq=seq):
                scheduler.cancel(seq)
            case _:
                self._dropped += 1

    def _answer_reserve(self, epoch: int, seq: int, added: int | None) -> None:
        """`added`: blocks that are the sequence's now; None: there is no room."""
        self._tell_of_cached()  # some may have had to make room
        free = self._rmanager.free_blocks
        if added is None:
            self._gmanager.send(wire.NotGranted(epoch=epoch, seq=seq, free_blocks=free))
        else:
            self._gmanager.send(wire.Granted(epoch=epoch, seq=seq, blocks=added, free_blocks=free))

    async def _come_again(self, reason: str) -> None:
        """The cell goes on without this instance, which stood still or was cut off: as a new one it may take part again.

        Raises InstanceError if the device doesn't let go, or nobody answers.
        """
        await self._forget_cell(reason)
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                await self._greet()
        except PeerGone as gone:
            await self._find_gmanager(str(gone))
            self._is_alone = False  # it has no epoch
        except TimeoutError:
            raise InstanceError(f"expelled ({reason}), and nobody answered the new registration") from None

    async def _forget_cell(self, reason: str) -> None:
        """Free all that was of the cell. Raises InstanceError if the device doesn't let go."""
        log.warning("expelled", reason=reason)
        if self._is_leaving:
            raise InstanceError(f"expelled while it was being drained: {reason}")
        self._is_registered, self._unanswered, self._former = False, 0, None
        over, self._epoch = self._epoch, None
        before, self._change = self._change, None
        if self._tiering is not None:
            self._tiering.pause()
        self._rmanager.settle(await self._end(over, before))
        self._rmanager.keep([])
        self._rmanager.take_changes()
        self._rmanager.take_reusable()
        self._evicted_before = self._rmanager.evicted_blocks
        if self._tiering is not None:
            self._tiering.jobs.forget_counts()
        self._is_alone, self._unheard, self._requests = False, Unheard(), {}
        self._counted = wire.Counters()  # the gManager has counted what it heard of us
        if self._is_leaving:
            raise InstanceError("asked to end while it was expelled")

    async def _end(self, epoch: Epoch | None, before: asyncio.Task[None] | None) -> list[tuple[int, int]]:
        """End an epoch and what forms, runs or ends it (`before`). Returns what `Epoch.end` does, and raises as it does."""
        self._store = None  # who waits for it in vain is let go
        uncertain = [] if epoch is None else await epoch.end()
        if before is not None:
            await asyncio.wait([before])
        if epoch is not None:
            self._counted = wire.Counters.sum(self._counted, epoch.counters())
        return uncertain

    async def _join(self, join: wire.JoinEpoch, epoch: Epoch, before: asyncio.Task[None] | None) -> None:
        """Form an epoch, and step in it until it breaks. `before`: the end of the one before.

        Raises what is this instance's own fault.
        """
        if before is not None:
            await asyncio.wait([before])
        self._rmanager.keep(join.keep)
        self._rmanager.caches = join.caches
        gc.unfreeze()  # the epoch before was frozen, too, and goes with all that it had on the device
        try:
            await epoch.form(partial(self._on_link_lost, join.epoch))
        except (RuntimeError, InstanceError) as error:
            if isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError):
                raise
            if self._epoch is epoch:
                self._on_broken(join.epoch, f"its process groups could not be formed: {error}")
            return
        gc.collect()
        gc.freeze()  # what was loaded stays: looking through it again and again delayed steps by tens of milliseconds
        if self._epoch is not epoch:
            return  # it has ended meanwhile
        self._tell(wire.Joined(epoch=join.epoch, shares_feeds=epoch.split_rule is not None))
        log.info("epoch joined", epoch=join.epoch, cell_rank=join.rank, instances=len(join.members))
        self._resume_tiers(join)
        reason = await epoch.run(partial(self._on_progress, epoch))
        if reason is not None:
            self._on_broken(join.epoch, reason)

    async def _suspend(
        self,
        suspend: wire.Suspend,
        epoch: Epoch | None,
        answer: Callable[[wire.Message], None],
        before: asyncio.Task[None] | None,
    ) -> None:
        """End an epoch, and say what of its KV is certain. `before`: what forms or runs it.

        Raises InstanceError if the device doesn't let go.
        """
        kept = self._rmanager.settle(await self._end(epoch, before))
        if epoch is not None:
            epoch.take_messages(self._unheard, are_sent=False)
            self._requests |= epoch.requests()
        self._requests = {seq: self._requests.get(seq, 0) for seq in kept}
        shards = told_of_kept(self._rmanager, kept, self._requests)
        free, unheard = self._rmanager.free_blocks, self._unheard.report() if self._is_alone else []
        cached = newest_cached(self._rmanager)
        answer(wire.Kept(epoch=suspend.epoch, free_blocks=free, shards=shards, cached=cached, unheard=unheard))
        log.info("epoch ended", epoch=suspend.epoch, reason=suspend.reason, kept_sequences=len(shards))

    def _resume_tiers(self, join: wire.JoinEpoch) -> None:
        if self._tiering is None:
            return
        if not join.caches:
            log.warning("host memory and disk are of no use: the gManager was started with --prefix-cache off")
        self._tell_of_cached()  # what came to its end meanwhile
        self._tiering.resume()

    def _epoch_number(self) -> int:
        return 0 if self._epoch is None else self._epoch.number

    def _on_copied(self, fetched: list[wire.Fetched]) -> None:
        """Something else is known of what lies in the pool and below it."""
        self._tell_of_cached()
        for message in fetched:
            self._tell(message)
        if fetched and self._epoch is not None and self._epoch.lanes is not None:
            self._epoch.lanes.parties.wake()  # what was read into, and is free, somebody may wait for

    def _on_broken(self, epoch: int, reason: str) -> None:
        """It can't go on; the gManager knows why, or will, and says what comes next."""
        log.warning("epoch broken", epoch=epoch, reason=reason)
        self._tell(wire.EpochBroken(epoch=epoch, reason=reason))

    def _on_link_lost(self, epoch: int, rank: int, reason: str) -> None:
        """The gManager decides what that means: it may know why already."""
        log.warning("link lost", to_rank=rank, reason=reason)
        self._tell(wire.LinkLost(epoch=epoch, rank=rank, reason=reason))

    def _on_progress(self, epoch: Epoch) -> None:
        """A lane has moved on: tell the gManager."""
        self._tell_of_freed()
        self._tell_of_cached()  # before the Released of sequences that left it
        for message in epoch.take_messages(self._unheard, are_sent=not self._is_alone):
            self._tell(message)
        if self._tiering is not None:
            self._tiering.wake()

    def _tell(self, message: wire.Message) -> None:
        """The gManager, of the epoch that it began."""
        if not self._is_alone:
            self._gmanager.send(message)

    def _tell_of_freed(self) -> None:
        if self._rmanager.freed and not self._is_alone:
            self._send_beat()  # somebody may wait for these blocks

    def _tell_of_cached(self) -> None:
        if self._is_alone or self._epoch is None or self._epoch.lanes is None:
            return  # with the end of the epoch all is told
        reusable = self._rmanager.take_reusable()
        shards = [told_of_cached(self._rmanager, seq, runs) for seq, runs in reusable.items()]
        for first in range(0, len(shards), MOST_CACHED):
            self._tell(wire.Cached(epoch=self._epoch.number, shards=shards[first : first + MOST_CACHED]))

    def validate(self) -> None:
        """The pool and the sequences agree. Raises RuntimeError otherwise."""
        self._rmanager.validate()
        if self._epoch is not None and self._epoch.lanes is not None:
            self._epoch.lanes.scheduler.validate()


def _is_forgotten(message: object) -> TypeGuard[wire.Expelled | wire.Refused]:
    """Whether the gManager doesn't know this instance (any more), which is to come as a new one. To a Ping of somebody whom it
    has forgotten it can't say so as to an instance: it may be a client's."""
    return isinstance(message, wire.Expelled) or (isinstance(message, wire.Refused) and message.may_return)
