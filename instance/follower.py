"""A rank of an instance that isn't its first: it holds its part of the model and of all KV, and runs what the first runs."""

import asyncio
from array import array
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial

from distattn.budget import StepBudget, TransferEnded
from distattn.exchange import ExchangeError
from distattn.transfer import CopyFailed, Transfers
from gmanager.wire import messages as wire
from gmanager.wire.channel import Dialer, Transport
from gmanager.wire.codec import Decoder
from gmanager.wire.errors import BadMessage, PeerGone
from gmanager.wire.logs import get_logger
from instance.config import InstanceConfig
from instance.copies import copying_thread
from instance.crew import LetGo, MoveBlocks, RankBroke, RankEnded, RankFormed, RankMoved, RankReady, RunStep, ToRank, UsePool
from instance.epoch import first_error
from instance.errors import InstanceError
from instance.model import Model
from instance.processors import Processors
from instance.rank_epoch import Equipment, RankEpoch
from instance.runner import Launched
from instance.start import Loaded, make_pool, sized
from instance.step import LANES

log = get_logger("instance")


class _Epoch(RankEpoch):
    """With this rank's end of block moves."""

    def __init__(self, equipment: Equipment, join: wire.JoinEpoch) -> None:
        super().__init__(equipment, join)
        self._budget = StepBudget(equipment.config.copy_tokens)
        self._copying = copying_thread(equipment.model.device)
        self._transfers: Transfers | None = None
        self._num_launched = self._num_run = 0
        """Steps."""

    async def form(self) -> None:
        """Meet the other ranks. Raises what torch raises if they don't come, and InstanceError after `abandon`."""
        if self.size > 1:
            self._transfers = await asyncio.get_running_loop().run_in_executor(self._thread, self._make_transfers, self._budget)
        for lane in LANES:
            await self.make_runner(lane)

    def launch(self, step: RunStep) -> "asyncio.Future[Launched] | None":
        """None: it isn't formed yet, or over."""
        if step.lane not in self.runners:
            return None
        launched = self.runners[step.lane].launch(step.plan(), step.processors)
        self._num_launched += 1
        launched.add_done_callback(self._has_run)
        self._budget.tell(self._num_run, is_busy=True)
        return launched

    async def move(self, asked: MoveBlocks) -> str | None:
        """What is wrong with the copy; None: nothing. Raises ExchangeError if the epoch can't go on, TransferEnded."""
        if self._transfers is None:
            return "the epoch has one member"
        ids = None if asked.block_ids is None else tuple(array("i", asked.block_ids))
        end = self._transfers.send if asked.is_source else self._transfers.receive
        try:
            return await asyncio.get_running_loop().run_in_executor(self._copying, end, asked.move, ids, asked.peer)
        except CopyFailed as failed:
            return str(failed)

    async def abandon(self) -> None:
        self._budget.end()
        self._copying.shutdown(wait=False, cancel_futures=True)
        await super().abandon()

    def _has_run(self, _step: "asyncio.Future[Launched]") -> None:
        self._num_run += 1
        self._budget.tell(self._num_run, is_busy=self._num_launched > self._num_run)

    def _threads(self) -> Sequence[Executor]:
        return [*super()._threads(), self._copying]


class Follower:
    """Does as the first rank says. `run` returns when that is gone."""

    def __init__(self, config: InstanceConfig, loaded: Loaded, first: Dialer[ToRank]) -> None:
        self._config = config
        self._loaded = loaded
        self._first = first
        self._equipment: Equipment | None = None
        self._epoch: _Epoch | None = None
        self._forming: asyncio.Task[None] | None = None
        self._over = 0
        """The newest epoch that was let go of."""
        self._fault: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Of this rank alone: an error that another epoch doesn't mend."""

    async def run(self) -> None:
        """Raises what breaks here and isn't of one epoch alone."""
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch())
                while True:
                    try:
                        said = await self._first.recv()
                    except PeerGone:
                        log.info("the first rank is gone")
                        break
                    await self._obey(said, tasks)
                watching.cancel()
                if self._forming is not None:
                    self._forming.cancel()
        except* Exception as group:
            raise first_error(group) from None
        finally:
            if self._epoch is not None:
                await self._epoch.abandon()
            await self._first.close()

    async def _obey(self, said: ToRank | BadMessage, tasks: asyncio.TaskGroup) -> None:
        match said:
            case BadMessage():
                raise InstanceError(f"what the first rank says can't be read: {said}")
            case UsePool():
                self._equipment = _equip(replace(self._config, kv_tokens=said.tokens), self._loaded.model)
            case wire.JoinEpoch() if self._equipment is not None and said.epoch > self._over:
                if self._epoch is not None:
                    raise InstanceError(f"epoch {said.epoch} begins, and epoch {self._epoch.number} was not let go of")
                self._epoch = _Epoch(self._equipment, said)
                self._forming = tasks.create_task(self._form(self._epoch))
            case RunStep():
                epoch = self._epoch
                if epoch is not None and epoch.number == said.epoch and (launched := epoch.launch(said)) is not None:
                    launched.add_done_callback(partial(self._launched, epoch))
            case MoveBlocks():
                if self._epoch is not None and self._epoch.number == said.epoch:
                    tasks.create_task(self._move(self._epoch, said))
            case LetGo():
                self._over = max(self._over, said.epoch)
                if self._epoch is not None and self._epoch.number == said.epoch:
                    over, self._epoch = self._epoch, None
                    await over.abandon()
                    if self._forming is not None:
                        await asyncio.wait([self._forming])
                    await over.let_go()
                self._first.send(RankEnded(epoch=said.epoch))
            case _:
                log.warning("out of turn", message_type=type(said).__name__)

    async def _form(self, epoch: _Epoch) -> None:
        try:
            await epoch.form()
        except (RuntimeError, InstanceError) as error:  # RuntimeError: torch's, of groups that don't come to be
            self._broke(epoch, error)
            return
        self._first.send(RankFormed(epoch=epoch.number))

    async def _watch(self) -> None:
        await self._fault

    async def _move(self, epoch: _Epoch, asked: MoveBlocks) -> None:
        if self._epoch is not epoch:
            return
        try:
            wrong = await epoch.move(asked)
        except TransferEnded:
            return
        except ExchangeError as error:
            self._broke(epoch, error)
            return
        self._first.send(RankMoved(epoch=asked.epoch, move=asked.move, error=wrong))

    def _launched(self, epoch: _Epoch, step: "asyncio.Future[Launched]") -> None:
        if step.cancelled() or (error := step.exception()) is None or self._epoch is not epoch:
            return
        if isinstance(error, ExchangeError):
            self._broke(epoch, error)
        elif not self._fault.done():
            self._fault.set_exception(error)

    def _broke(self, epoch: _Epoch, error: BaseException) -> None:
        """Unless it was let go of."""
        if self._epoch is epoch:
            self._first.send(RankBroke(epoch=epoch.number, reason=_reason(error)))


async def meet_first(config: InstanceConfig, loaded: Loaded, transport: Transport) -> Follower:
    """Find the first rank. Raises InstanceError if it can't be found, TooLittleMemory."""
    if loaded.meeting is None:
        raise ValueError("a model that is whole has one rank")
    config = sized(config, loaded.model)
    try:
        address, token = await asyncio.get_running_loop().run_in_executor(None, loaded.meeting.address)
    except RuntimeError as error:
        raise InstanceError(f"the first rank of the instance didn't come: {error}") from error
    decoder: Decoder[ToRank] = Decoder(ToRank)
    first = transport.dial(address, decoder)
    tokens, fingerprint = config.num_blocks * config.block_size, loaded.model.fingerprint()
    first.send(RankReady(rank=config.place.rank, token=token, tokens=tokens, fingerprint=fingerprint))
    return Follower(config, loaded, first)


def _equip(config: InstanceConfig, model: Model) -> Equipment:
    return Equipment(
        config=config,
        model=model,
        tokenizer=None,
        storage=make_pool(config, model),
        processors=Processors.of(model.device, config.decode_processors) if model.device.type == "cuda" else None,
    )


def _reason(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
