"""One instance: registers, joins an epoch, and runs the loops of its lanes until the epoch ends."""

import asyncio
import gc
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from distattn.attention import DistAttention
from distattn.exchange import Exchange
from gmanager.wire import messages as wire
from gmanager.wire.channel import Transport
from gmanager.wire.codec import Decoder
from gmanager.wire.errors import BadMessage, PeerGone
from gmanager.wire.logs import get_logger
from instance.cell import EpochGroup, open_store
from instance.config import GPU_GRAIN, InstanceConfig
from instance.errors import EpochEnded, InstanceError
from instance.lane import Lanes
from instance.model import Model
from instance.party import Parties, PartyMessage, Seat
from instance.processors import Processors, sharing_of
from instance.rmanager import RManager
from instance.runner import Runner, Times, Traffic
from instance.scheduler import MAX_DECODE_ROWS, MAX_SAMPLES, Pace, Scheduler
from instance.step import LANES, Grouping, Lane
from kvstore.storage import KVStorage

if TYPE_CHECKING:  # it needs Triton, which an instance on the CPU does without
    from distattn.peers import PeerMemory

log = get_logger("instance")

BEAT_S = 1.0


@dataclass(slots=True)
class _Epoch:
    """Everything that lives as long as one membership."""

    number: int
    lanes: Lanes

    def counters(self, dropped: int) -> wire.Counters:
        """What has been done in it. `dropped`: messages of the gManager that were not for it."""
        tally, traffic, times = self.lanes.scheduler.tally, Traffic(), Times()
        for loop in self.lanes:
            traffic.add(loop.runner.traffic)
            times.add(loop.runner.times)
        return wire.Counters(
            steps=tally.steps,
            rows=tally.rows,
            rows_dispatched=traffic.rows_dispatched,
            tokens_prefilled=tally.tokens_prefilled,
            tokens_generated=tally.tokens_generated,
            home_moves=tally.home_moves,
            query_bytes=traffic.query_bytes,
            partial_bytes=traffic.partial_bytes,
            step_us=times.step_ns // 1000,
            exchange_us=times.exchange_ns // 1000,
            attention_us=times.attention_ns // 1000,
            notice_us=sum(loop.notice_ns for loop in self.lanes) // 1000,
            dropped_messages=dropped + self.lanes.parties.dropped,
        )


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
    ) -> None:
        """Listens for its party, and begins to dial the gManager. Needs a running loop. Raises AddressError."""
        to_instance: Decoder[wire.ToInstance] = Decoder(wire.ToInstance)
        self._party_decoder: Decoder[PartyMessage] = Decoder(PartyMessage)
        self._config = config
        self._model = model
        self._assets = assets
        self._spec = spec
        self._storage = storage
        self._processors = Processors.of(model.device, config.decode_processors) if model.device.type == "cuda" else None
        self._transport = transport
        self._listener = transport.listen(f"tcp://{config.host}:*", self._party_decoder)
        self._gmanager = transport.dial(config.gmanager, to_instance)
        self._rmanager = RManager(storage.num_blocks, storage.block_size)
        self._epoch: _Epoch | None = None
        self._lease_s = 0.0
        self._heard = time.monotonic()
        self._dropped = 0
        self._stop_reason: asyncio.Future[str] | None = None
        self._cleanup = AsyncExitStack()
        self._store: object = None
        """Of the epoch, if it was opened here: it serves as long as it is kept."""
        self._joiner = ThreadPoolExecutor(1, thread_name_prefix="join")
        """Not the loop's own pool, whose end waits for a thread that waits for a lost peer."""

    def stop(self, reason: str) -> None:
        """End `run` soon; the gManager is told."""
        if self._stop_reason is not None and not self._stop_reason.done():
            self._stop_reason.set_result(reason)

    async def run(self) -> None:
        """Serve. Raises InstanceError (or what broke), after telling the gManager."""
        self._stop_reason = asyncio.get_running_loop().create_future()
        failure: BaseException | None = None
        self._cleanup.callback(self._joiner.shutdown, wait=False, cancel_futures=True)
        async with self._cleanup:
            work = asyncio.create_task(self._serve())
            stopped: asyncio.Future[Any] = self._stop_reason
            try:
                await asyncio.wait([work, stopped], return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    failure = work.exception()
            finally:
                if not isinstance(failure, EpochEnded):
                    reason = str(failure or (self._stop_reason.done() and self._stop_reason.result()) or "cancelled")
                    self._gmanager.send(wire.Leave(reason=reason, failed=failure is not None))
                work.cancel()
                await asyncio.wait([work])
                await self._gmanager.close()
                await self._listener.close()
        if failure is not None:
            raise failure

    # --- control ------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        await self._register()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._beat())
                while True:
                    self._obey(await self._gmanager.recv(), tasks)
        except* PeerGone:
            raise InstanceError("the gManager is gone") from None
        except* Exception as group:
            raise _first(group) from None

    async def _register(self) -> None:
        """Greet the gManager; ZeroMQ delivers the greeting when there is one."""
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
            )
        )
        try:
            async with asyncio.timeout(config.connect_timeout_s):
                answer = await self._gmanager.recv()
        except PeerGone:
            raise InstanceError(f"the gManager at {config.gmanager} closed the connection") from None
        except TimeoutError:
            raise InstanceError(f"no gManager answered at {config.gmanager} within {config.connect_timeout_s:.0f} s") from None
        if isinstance(answer, wire.Refused):
            raise InstanceError(f"the gManager refused this instance: {answer.reason}")
        if not isinstance(answer, wire.Registered):
            raise InstanceError(f"the gManager at {config.gmanager} answered the registration with {type(answer).__name__}")
        self._lease_s = answer.lease_s
        if answer.send_text:
            self._gmanager.send(wire.Text(assets=self._assets))
        log.info("registered", gmanager=config.gmanager, cell=config.cell)

    async def _beat(self) -> None:
        """Say that we live, and notice when the gManager doesn't."""
        self._heard = time.monotonic()
        while True:
            await asyncio.sleep(BEAT_S)
            if time.monotonic() - self._heard > self._lease_s:
                raise InstanceError(f"nothing heard from the gManager for {self._lease_s:.0f} s")
            self._send_beat()

    def _send_beat(self) -> None:
        epoch = self._epoch
        if epoch is None:
            self._gmanager.send(wire.Ping())
            return
        self._gmanager.send(
            wire.Beat(
                epoch=epoch.number,
                free_blocks=self._rmanager.free_blocks,
                held_tokens=self._rmanager.take_changes(),
                counters=epoch.counters(self._dropped),
            )
        )

    def _obey(self, message: wire.Message | BadMessage, tasks: asyncio.TaskGroup) -> None:
        """One message of the gManager. Raises InstanceError if it can't be read: what it asks for would never be done."""
        self._heard = time.monotonic()
        if isinstance(message, BadMessage):
            raise InstanceError(f"what the gManager sends can't be read: {message}")
        if isinstance(message, wire.Pong):
            return
        if isinstance(message, wire.OpenStore):
            self._store, address = open_store(self._config.host, self._config.step_timeout_s)
            self._gmanager.send(wire.StoreOpened(epoch=message.epoch, address=address))
        elif isinstance(message, wire.JoinEpoch):
            tasks.create_task(self._join(message, tasks))
        elif isinstance(message, wire.EndEpoch):
            raise EpochEnded(f"the gManager ended the cell: {message.reason}")
        elif isinstance(message, wire.Refused):
            raise InstanceError(f"the gManager refused this instance: {message.reason}")
        elif self._epoch is None or getattr(message, "epoch", None) != self._epoch.number:
            self._dropped += 1
            log.warning("message dropped", message_type=type(message).__name__)
        else:
            self._command(self._epoch, message)
            self._epoch.lanes.parties.wake()

    def _command(self, epoch: _Epoch, message: wire.Message) -> None:
        scheduler = epoch.lanes.scheduler
        match message:
            case wire.Reserve(seq=seq, blocks=blocks):
                self._answer_reserve(epoch.number, seq, blocks if self._rmanager.reserve(seq, blocks) else None)
            case wire.ReserveNext(seq=seq):
                self._answer_reserve(epoch.number, seq, self._rmanager.reserve_next(seq))
            case wire.Drop(seq=seq):
                self._rmanager.drop(seq)
                self._tell_of_freed()
            case wire.Admit():
                scheduler.admit(message)
            case wire.Regroup(number=number, parties=parties):
                epoch.lanes.parties.learn([Grouping(number=number, members=members) for members in parties])
            case wire.MoveSequence(seq=seq, to=to):
                scheduler.move(seq, to)
            case wire.Cancel(seq=seq):
                scheduler.cancel(seq)
            case _:
                self._dropped += 1

    def _answer_reserve(self, epoch: int, seq: int, added: int | None) -> None:
        """`added`: blocks that are the sequence's now; None: there is no room."""
        free = self._rmanager.free_blocks
        if added is None:
            self._gmanager.send(wire.NotGranted(epoch=epoch, seq=seq, free_blocks=free))
        else:
            self._gmanager.send(wire.Granted(epoch=epoch, seq=seq, blocks=added, free_blocks=free))

    async def _join(self, join: wire.JoinEpoch, tasks: asyncio.TaskGroup) -> None:
        """Form the epoch's process groups and start to step."""
        config, device = self._config, self._model.device
        loop = asyncio.get_running_loop()
        runners = {lane: await loop.run_in_executor(self._joiner, self._make_runner, join, lane) for lane in LANES}
        parties = Parties(
            Seat(
                epoch=join.epoch,
                rank=join.rank,
                addresses=[member.party_address for member in join.members],
                listener=self._listener,
                dial=lambda address: self._transport.dial(address, self._party_decoder),
                timeout_s=config.step_timeout_s,
                on_lost=partial(self._on_link_lost, join.epoch),
            )
        )
        pace = Pace(config.chunk_tokens, config.mixed_chunk_tokens)
        if device.type == "cuda":
            pace = replace(pace, reach=self._model.reach(), grain=GPU_GRAIN)
        scheduler = Scheduler(epoch=join.epoch, rank=join.rank, pace=pace, rmanager=self._rmanager)
        lanes = Lanes(
            parties=parties,
            scheduler=scheduler,
            runners=runners,
            sharing=None if self._processors is None else sharing_of(self._model, self._processors),
            timeout_s=config.step_timeout_s,
        )
        self._epoch = _Epoch(join.epoch, lanes)
        tasks.create_task(lanes.run(partial(self._on_progress, scheduler)))
        gc.collect()
        gc.freeze()  # what was loaded stays: looking through it again and again delayed steps by tens of milliseconds
        self._gmanager.send(wire.Joined(epoch=join.epoch))
        log.info("epoch joined", epoch=join.epoch, cell_rank=join.rank, instances=len(join.members))

    def _make_runner(self, join: wire.JoinEpoch, lane: Lane) -> Runner:
        """The device's side of a lane: all members of the epoch make theirs together."""
        config, device = self._config, self._model.device
        group = EpochGroup(
            store_address=join.store_address,
            host=config.host,
            name=f"epoch-{join.epoch}-{lane}",
            rank=join.rank,
            size=len(join.members),
            device=device,
            timeout_s=config.step_timeout_s,
        )
        self._cleanup.callback(group.close)
        attention = DistAttention(self._storage, self._model.shape, Exchange(group.group, device), backend=config.backend)
        runner = Runner(
            self._model,
            attention,
            threads=config.threads,
            max_samples=MAX_SAMPLES[lane],
            assets=self._assets,
            streams=None if self._processors is None else self._processors.streams[lane],
        )
        self._cleanup.callback(runner.close)
        if device.type == "cuda" and lane == "prefill":
            runner.prepare_chunks(config.chunk_tokens)
        elif device.type == "cuda":
            peers = self._share_memory(join, group)
            log.info("capturing CUDA graphs")
            runner.capture(self._storage, peers)
            log.info("decode rows travel", by="NVLink or PCIe, one-sided" if peers else "NCCL")
        return runner

    def _share_memory(self, join: wire.JoinEpoch, group: EpochGroup) -> "PeerMemory | None":
        """Memory that the members write for each other, where graphs can use it."""
        from distattn.peers import PeerMemory  # it needs Triton, which an instance on the CPU does without
        from kernels.decode_attention import MAX_ROWS

        most_served = (len(join.members) - 1) * MAX_DECODE_ROWS
        if not self._config.shares_host or self._model.fused is None or not 0 < most_served <= MAX_ROWS:
            return None
        peers = PeerMemory(
            store=group.store,
            rank=join.rank,
            size=len(join.members),
            rows=MAX_DECODE_ROWS,
            shape=self._model.shape,
            device=self._model.device,
        )
        self._cleanup.callback(peers.abort)
        group.barrier()  # nobody pushes into memory that its owner has yet to clear
        return peers

    def _on_link_lost(self, epoch: int, rank: int, reason: str) -> None:
        """The gManager decides what that means: it may know why already."""
        log.warning("link lost", to_rank=rank, reason=reason)
        self._gmanager.send(wire.LinkLost(epoch=epoch, rank=rank, reason=reason))

    def _on_progress(self, scheduler: Scheduler) -> None:
        """A lane has moved on: tell the gManager."""
        self._tell_of_freed()
        for message in scheduler.take_messages():
            self._gmanager.send(message)

    def _tell_of_freed(self) -> None:
        if self._rmanager.freed:
            self._send_beat()  # somebody may wait for these blocks

    def validate(self) -> None:
        """The pool and the sequences agree. Raises RuntimeError otherwise."""
        self._rmanager.shards.validate()
        if self._epoch is not None:
            self._epoch.lanes.scheduler.validate()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that started it: what tasks raise later is its echo."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
