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
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from distattn.budget import StepBudget
from distattn.exchange import ExchangeError
from gmanager.wire import messages as wire
from gmanager.wire.channel import Listener, Transport
from gmanager.wire.codec import Decoder
from gmanager.wire.logs import get_logger
from instance.calibrate import Room
from instance.config import CPU_GRAIN, GPU_GRAIN
from instance.copies import Copies
from instance.crew import Crew
from instance.errors import InstanceError, PartyBroken, PartyTimeout, StepTimeout
from instance.lane import Lanes
from instance.party import Parties, PartyMessage, Seat
from instance.plan import Pace
from instance.processors import sharing_of
from instance.rank_epoch import Equipment, RankEpoch
from instance.rmanager import RManager
from instance.runner import Times, Traffic
from instance.scheduler import Scheduler
from instance.step import LANES
from instance.tiering import Tiering
from instance.unheard import Unheard

log = get_logger("instance")

BREAKS = (ExchangeError, PartyTimeout, PartyBroken, StepTimeout)
"""What another's end, or a lost link to it, looks like from here."""

TIER_STEPS = 16
"""A step of decodes may copy a part of what a whole chunk brings below the pool. 512 tokens on a GPU: 64 MiB of the 8B shape,
1.3 ms of a PCIe bus with 50 GB/s, by arithmetic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lasting(Equipment):
    """What an instance keeps through all epochs."""

    rmanager: RManager
    transport: Transport
    listener: Listener[PartyMessage]
    party_decoder: Decoder[PartyMessage]
    tiering: Tiering | None = None
    """Of what lies below the pool."""
    crew: Crew | None = None
    """The other ranks, where the model is split between several."""


class Epoch(RankEpoch):
    """One membership: `form` it together with the other members, `run` it, `end` it."""

    def __init__(self, lasting: Lasting, join: wire.JoinEpoch) -> None:
        super().__init__(lasting, join, None if lasting.crew is None else lasting.crew.run)
        self._lasting = lasting
        self._lanes: Lanes | None = None
        self._copies: Copies | None = None
        self._running: asyncio.Task[None] | None = None

    @property
    def lanes(self) -> Lanes | None:
        """None: it is still being formed."""
        return self._lanes

    @property
    def copies(self) -> Copies | None:
        """None: it is still being formed, or has one member."""
        return self._copies

    async def form(self, on_link_lost: Callable[[int, str], None]) -> None:
        """Meet the other members. Raises what torch raises if they don't come, and InstanceError after `end`."""
        loop, lasting, join = asyncio.get_running_loop(), self._lasting, self._join
        if self._is_over:
            raise InstanceError("the epoch ended before it was formed")
        if lasting.crew is not None:
            lasting.crew.form(join)
        if self.size > 1:  # first, so that its group is aborted last: when no graph is left, and nobody waits in a kernel
            self._copies = await loop.run_in_executor(self._thread, self._make_copies)
        for lane in LANES:
            await self.make_runner(lane)
        if lasting.crew is not None:
            await lasting.crew.have_formed(self.number)
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
        elif config.place.stages > 1:
            pace = replace(pace, reach=lasting.model.reach(), grain=CPU_GRAIN)
        pace = replace(pace, stages=config.place.stages)
        self._lanes = Lanes(
            parties=parties,
            scheduler=Scheduler(
                epoch=join.epoch, rank=join.rank, pace=pace, rmanager=lasting.rmanager, sights=lasting.model.shape.sights
            ),
            runners=self.runners,
            sharing=None if lasting.processors is None else sharing_of(lasting.model, lasting.processors),
            budgets=self._budgets(),
            timeout_s=config.step_timeout_s,
            stages=config.place.stages,
            split_rule=self.split_rule,
        )
        if join.calibrate and lasting.crew is not None:
            await lasting.crew.unless_broken(self._calibrate(self._lanes))
        elif join.calibrate:
            await self._calibrate(self._lanes)

    async def run(self, on_progress: Callable[[], None]) -> str | None:
        """Step until the epoch breaks, and return why, if that may be another's doing; None after `end`.

        Raises what is this instance's own fault.
        """
        if self._lanes is None:
            raise RuntimeError("form the epoch first")
        self._running = asyncio.create_task(self._lanes.run(on_progress))
        ends: list[asyncio.Future[Any]] = [self._running]
        if self._lasting.crew is not None:
            ends.append(self._lasting.crew.broke)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not self._is_over and not self._running.done():
            return str(ends[-1].result())
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
        await self.let_go()
        if self._lasting.crew is not None:
            await self._lasting.crew.have_ended(self.number)
        return [] if self._lanes is None else self._lanes.scheduler.uncertain()

    async def abandon(self) -> None:
        """Stop stepping and let go of all that others may wait for; for the device nobody waits."""
        self._is_over = True
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)  # what it came to is nobody's concern any more
        if self._lasting.crew is not None:
            self._lasting.crew.end(self.number)
        await super().abandon()

    def _threads(self) -> Sequence[Executor]:
        return [*super()._threads(), *([] if self._copies is None else [self._copies.thread])]

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
            decode_us=self._lanes["decode"].runner.times.step_ns // 1000,
            exchange_us=times.exchange_ns // 1000,
            attention_us=times.attention_ns // 1000,
            split_steps=tally.split_steps,
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

    def _make_copies(self) -> Copies:
        """This instance's end of block moves."""
        lasting, budget = self._lasting, StepBudget(self._lasting.config.copy_tokens)
        transfers = self._make_transfers(budget)
        copies = Copies(self._join.rank, lasting.rmanager, transfers, budget, lasting.model.device, lasting.crew)
        self._undo(copies.close)
        return copies


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that started it: what tasks raise later is its echo."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
