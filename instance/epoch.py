"""What an instance makes anew for each membership of its cell, and throws away with it.

    lasting      model, pool and what it holds (rManager), sockets, a GPU's divided processors
    of an epoch  process groups, memory that others write, CUDA graphs that name it, parties, scheduler, lanes

An epoch ends in this order: the lanes are cancelled; who waits inside a kernel for another GPU is let go; graphs are dropped
and then the groups aborted (the other order hung, two H200, NCCL 2.28); the threads that drive the device end. Then nothing
writes to the pool any more, and what is certain of it is known.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from llguidance import LLTokenizer

from distattn.attention import DistAttention
from distattn.exchange import Exchange, ExchangeError, Work
from distattn.transfer import StepBudget, Transfers
from gmanager.wire import messages as wire
from gmanager.wire.channel import Listener, Transport
from gmanager.wire.codec import Decoder
from gmanager.wire.logs import get_logger
from instance.calibrate import Room
from instance.cell import EpochGroup
from instance.config import GPU_GRAIN, InstanceConfig
from instance.copies import CHANNELS, Copies
from instance.errors import InstanceError, PartyBroken, PartyTimeout, StepTimeout
from instance.lane import Lanes
from instance.model import Model
from instance.party import Parties, PartyMessage, Seat
from instance.plan import MAX_DECODE_ROWS, MAX_SAMPLES, Pace
from instance.processors import Processors, sharing_of
from instance.rmanager import RManager
from instance.runner import Runner, Times, Traffic
from instance.scheduler import Scheduler
from instance.step import LANES, Lane
from instance.tiering import Tiering
from instance.unheard import Unheard
from kvstore.storage import KVStorage

if TYPE_CHECKING:  # it needs Triton, which an instance on the CPU does without
    from distattn.peers import PeerMemory

log = get_logger("instance")

BREAKS = (ExchangeError, PartyTimeout, PartyBroken, StepTimeout)
"""What another's end, or a lost link to it, looks like from here."""

TIER_STEPS = 16
"""A step of decodes may copy a part of what a whole chunk brings below the pool. 512 tokens on a GPU: 64 MiB of the 8B shape,
1.3 ms of a PCIe bus with 50 GB/s, by arithmetic."""

LET_GO_S = 0.5
"""Between two looks who still waits."""
END_TIMEOUT_S = 8.0
"""Longest that the device may take to let go of a step that was aborted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lasting:
    """What an instance keeps through all epochs."""

    config: InstanceConfig
    model: Model
    tokenizer: LLTokenizer | None
    """For grammars."""
    storage: KVStorage
    rmanager: RManager
    processors: Processors | None
    """Of a GPU."""
    transport: Transport
    listener: Listener[PartyMessage]
    party_decoder: Decoder[PartyMessage]
    tiering: Tiering | None = None
    """Of what lies below the pool."""


class Epoch:
    """One membership: `form` it together with the other members, `run` it, `end` it."""

    def __init__(self, lasting: Lasting, join: wire.JoinEpoch) -> None:
        self.number = join.epoch
        self._lasting = lasting
        self._join = join
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="join")
        """Not the loop's own pool, whose end waits for a thread that waits for a lost peer."""
        self._made = ExitStack()
        """Undoes what was made, last first."""
        self._runners: dict[Lane, Runner] = {}
        self._lanes: Lanes | None = None
        self._copies: Copies | None = None
        self._exchanges: list[Exchange] = []
        self._running: asyncio.Task[None] | None = None
        self._is_over = False

    @property
    def lanes(self) -> Lanes | None:
        """None: it is still being formed."""
        return self._lanes

    @property
    def copies(self) -> Copies | None:
        """None: it is still being formed, or has one member."""
        return self._copies

    @property
    def size(self) -> int:
        """Members."""
        return len(self._join.members)

    async def form(self, on_link_lost: Callable[[int, str], None]) -> None:
        """Meet the other members. Raises what torch raises if they don't come, and InstanceError after `end`."""
        loop, lasting, join = asyncio.get_running_loop(), self._lasting, self._join
        if self.size > 1:  # first, so that its group is aborted last: when no graph is left, and nobody waits in a kernel
            self._copies = await loop.run_in_executor(self._thread, self._make_copies)
        for lane in LANES:
            self._runners[lane] = await loop.run_in_executor(self._thread, self._make_runner, lane)
        if self._is_over:
            raise InstanceError("the epoch ended while it was being formed")
        config = lasting.config
        parties = Parties(
            Seat(
                epoch=join.epoch,
                rank=join.rank,
                addresses=[member.party_address for member in join.members],
                listener=lasting.listener,
                dial=lambda address: lasting.transport.dial(address, lasting.party_decoder),
                timeout_s=config.step_timeout_s,
                on_lost=on_link_lost,
            )
        )
        pace = Pace(config.chunk_tokens, config.mixed_chunk_tokens)
        if lasting.model.device.type == "cuda":
            pace = replace(pace, reach=lasting.model.reach(), grain=GPU_GRAIN)
        self._lanes = Lanes(
            parties=parties,
            scheduler=Scheduler(
                epoch=join.epoch, rank=join.rank, pace=pace, rmanager=lasting.rmanager, sights=lasting.model.shape.sights
            ),
            runners=self._runners,
            sharing=None if lasting.processors is None else sharing_of(lasting.model, lasting.processors),
            budgets=self._budgets(),
            timeout_s=config.step_timeout_s,
        )
        if join.calibrate:
            await self._calibrate(self._lanes)

    async def run(self, on_progress: Callable[[], None]) -> str | None:
        """Step until the epoch breaks, and return why, if that may be another's doing; None after `end`.

        Raises what is this instance's own fault.
        """
        if self._lanes is None:
            raise RuntimeError("form the epoch first")
        self._running = asyncio.create_task(self._lanes.run(on_progress))
        await asyncio.wait([self._running])
        if self._is_over or self._running.cancelled():
            return None
        error = self._running.exception()
        first = first_error(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(first, BREAKS):
            return str(first)
        raise first or RuntimeError("lanes step for ever")

    async def end(self) -> list[tuple[int, int]]:
        """Stop stepping, at once. Returns (sequence, position) from which on KV may not have been written.

        Raises InstanceError if the device doesn't let go.
        """
        await self.abandon()
        threads = [self._thread, *(pool for runner in self._runners.values() for pool in runner.threads)]
        if self._copies is not None:
            threads.append(self._copies.thread)
        loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(len(threads), "end")  # the process may end without it
        ending = {loop.run_in_executor(pool, thread.shutdown) for thread in threads}
        pool.shutdown(wait=False)
        deadline = loop.time() + END_TIMEOUT_S
        stuck: list[Work] = []
        while ending:
            _, ending = await asyncio.wait(ending, timeout=LET_GO_S)
            sending = [exchange.sending for exchange in self._exchanges if exchange.sending is not None]
            if ending and self._lasting.model.device.type == "cpu" and len(ending) <= len(sending) and sending == stuck:
                # all connections are closed: such a thread can only come back with an error, and then writes nothing
                log.warning("left behind in a send that nobody takes", threads=len(ending))
                break
            if ending and loop.time() > deadline:
                raise InstanceError(f"the device did not let go of an aborted step within {END_TIMEOUT_S:g} s")
            stuck = sending
        return [] if self._lanes is None else self._lanes.scheduler.uncertain()

    async def abandon(self) -> None:
        """Stop stepping and let go of all that others may wait for; for the device nobody waits."""
        self._is_over = True
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)  # what it came to is nobody's concern any more
        self._made.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def take_messages(self, unheard: Unheard, *, are_sent: bool) -> list[wire.Message]:
        """What its scheduler has for the gManager. Outputs are added to `unheard`."""
        if self._lanes is None:
            return []
        scheduler = self._lanes.scheduler
        messages = scheduler.take_messages()
        for message in messages:
            if isinstance(message, wire.Outputs):
                unheard.add(message, scheduler.origins, is_sent=are_sent)
        scheduler.forget_origins()
        return messages

    def requests(self) -> dict[int, int]:
        """seq -> number of its request, of the sequences whose home is here."""
        origins = {} if self._lanes is None else self._lanes.scheduler.origins
        return {seq: request for seq, (request, _) in origins.items()}

    def counters(self) -> wire.Counters:
        """What has been done in it."""
        if self._lanes is None:
            return wire.Counters()
        tally, traffic, times = self._lanes.scheduler.tally, Traffic(), Times()
        for loop in self._lanes:
            traffic.add(loop.runner.traffic)
            times.add(loop.runner.times)
        lanes = wire.Counters(
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
            notice_us=sum(loop.notice_ns for loop in self._lanes) // 1000,
            dropped_messages=self._lanes.parties.dropped,
        )
        return lanes if self._copies is None else wire.Counters.sum(lanes, self._copies.counters())

    async def _calibrate(self, lanes: Lanes) -> None:
        """See how long steps take. Raises InstanceError after `end`."""
        config, storage = self._lasting.config, self._lasting.storage
        model = self._lasting.model
        room = Room(storage.num_blocks, storage.block_size, model.max_context, config.chunk_tokens, model.shape.sights)
        began = time.perf_counter()
        try:
            await lanes.calibrate(room)
        except asyncio.CancelledError:
            if self._is_over:  # its threads were ended
                raise InstanceError("the epoch ended while its steps were measured") from None
            raise
        log.info("steps measured", seconds=round(time.perf_counter() - began, 2))

    def take_samples(self) -> list[wire.StepSample]:
        """How long the newest steps took that weren't taken yet."""
        return [] if self._lanes is None else self._lanes.log.take()

    def _budgets(self) -> list[StepBudget]:
        """Of what is copied beside the steps: to other instances, and below the pool."""
        budgets = [] if self._copies is None else [self._copies.budget]
        if (tiering := self._lasting.tiering) is not None:
            # of prompts as much as they bring; decodes are not to be slower for it
            per_step = max(1, self._lasting.config.chunk_tokens // TIER_STEPS)
            budget = StepBudget(per_step, TIER_STEPS)
            tiering.use(budget)
            self._undo(budget.end)
            budgets.append(budget)
        return budgets

    def _undo(self, undo: Callable[[], None]) -> None:
        """With the epoch; at once if it is over already."""
        if self._is_over:
            undo()
            raise InstanceError("the epoch ended while it was being formed")
        self._made.callback(undo)

    def _make_group(self, name: str, device: torch.device, max_channels: int | None = None) -> EpochGroup:
        """Between all members, who make theirs of that name together."""
        config = self._lasting.config
        group = EpochGroup(
            store_address=self._join.store_address,
            host=config.host,
            name=f"epoch-{self.number}-{name}",
            rank=self._join.rank,
            size=self.size,
            device=device,
            timeout_s=config.step_timeout_s,
            max_channels=max_channels,
        )
        self._undo(group.close)  # before others are waited for: who ends the epoch meanwhile need not wait, too
        return group.meet()

    def _exchange(self, group: EpochGroup, device: torch.device) -> Exchange:
        exchange = Exchange(group.group, device, [member.id for member in self._join.members])
        self._exchanges.append(exchange)
        return exchange

    def _make_copies(self) -> Copies:
        """This instance's end of block moves.

        Its communicator is made now, though most epochs move nothing. NCCL makes one in a call that all members must join, and
        allocates memory on the device meanwhile, which may wait for the kernels that run there. Once lanes step, one of these
        may wait for a peer that can't launch its own before the same call is over: nobody would go on.
        """
        lasting, device = self._lasting, self._lasting.model.device
        words = self._make_group("words", torch.device("cpu"))
        blocks = words if device.type == "cpu" else self._make_group("blocks", device, CHANNELS)
        budget = StepBudget(lasting.config.copy_tokens)
        exchanges = self._exchange(blocks, device), self._exchange(words, torch.device("cpu"))
        transfers = Transfers(lasting.storage, *exchanges, budget)
        copies = Copies(self._join.rank, lasting.rmanager, transfers, budget, device)
        self._undo(copies.close)
        return copies

    def _make_runner(self, lane: Lane) -> Runner:
        """The device's side of a lane: all members of the epoch make theirs together."""
        lasting, config, device = self._lasting, self._lasting.config, self._lasting.model.device
        group = self._make_group(lane, device)
        attention = DistAttention(lasting.storage, lasting.model.shape, self._exchange(group, device), backend=config.backend)
        runner = Runner(
            lasting.model,
            attention,
            threads=config.threads,
            max_samples=MAX_SAMPLES[lane],
            tokenizer=lasting.tokenizer,
            streams=None if lasting.processors is None else lasting.processors.streams[lane],
        )
        self._undo(runner.close)
        if device.type == "cuda" and lane == "prefill":
            runner.prepare_chunks(config.chunk_tokens)
        elif device.type == "cuda":
            peers = self._share_memory(group)
            log.info("capturing CUDA graphs")
            runner.capture(lasting.storage, peers)
            if not group.all_say(bool(runner.graphs)):  # a shared step is a graph on all members, or on none
                runner.graphs.clear()
                peers = None
            log.info("decode rows travel", by="NVLink or PCIe, one-sided" if peers else "NCCL")
        return runner

    def _share_memory(self, group: EpochGroup) -> "PeerMemory | None":
        """Memory that the members write for each other, where graphs can use it."""
        from distattn.peers import PeerMemory  # it needs Triton, which an instance on the CPU does without
        from kernels.decode_attention import MAX_ROWS

        size, model = self.size, self._lasting.model
        most_served = (size - 1) * MAX_DECODE_ROWS
        if not share_host(self._join.members) or not 0 < most_served <= MAX_ROWS:
            return None
        peers = PeerMemory(
            store=group.store,
            rank=self._join.rank,
            size=size,
            rows=MAX_DECODE_ROWS,
            shape=model.shape,
            device=model.device,
        )
        self._undo(peers.abort)
        group.barrier()  # nobody pushes into memory that its owner has yet to clear
        return peers


def share_host(members: Sequence[wire.MemberAddress]) -> bool:
    """Whether all can map each other's GPU memory, and so push rows into it."""
    return len({member.host for member in members}) == 1


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that started it: what tasks raise later is its echo."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
