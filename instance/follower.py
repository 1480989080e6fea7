"""A rank of an instance that isn't its first: it holds its part of the model and of all KV, and runs what the first runs."""

import asyncio
from dataclasses import replace
from functools import partial

from gmanager.wire import messages as wire
from gmanager.wire.channel import Dialer, Transport
from gmanager.wire.codec import Decoder
from gmanager.wire.errors import BadMessage, PeerGone
from gmanager.wire.logs import get_logger
from instance.config import InstanceConfig
from instance.crew import LetGo, RankBroke, RankEnded, RankFormed, RankReady, RunStep, ToRank, UsePool
from instance.errors import InstanceError
from instance.model import Model
from instance.processors import Processors
from instance.rank_epoch import Equipment, RankEpoch
from instance.runner import Launched
from instance.start import Loaded, make_pool, sized
from instance.step import LANES

log = get_logger("instance")


class Follower:
    """Does as the first rank says. `run` returns when that is gone."""

    def __init__(self, config: InstanceConfig, loaded: Loaded, first: Dialer[ToRank]) -> None:
        self._config = config
        self._loaded = loaded
        self._first = first
        self._equipment: Equipment | None = None
        self._epoch: RankEpoch | None = None
        self._forming: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Raises what breaks here and isn't of one epoch alone."""
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    try:
                        said = await self._first.recv()
                    except PeerGone:
                        log.info("the first rank is gone")
                        break
                    await self._obey(said, tasks)
                if self._forming is not None:
                    self._forming.cancel()
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
            case wire.JoinEpoch() if self._equipment is not None:
                self._epoch = RankEpoch(self._equipment, said)
                self._forming = tasks.create_task(self._form(self._epoch))
            case RunStep():
                epoch = self._epoch
                if epoch is not None and epoch.number == said.epoch and said.lane in epoch.runners:
                    launched = epoch.runners[said.lane].launch(said.plan(), said.processors)
                    launched.add_done_callback(partial(self._launched, epoch))
            case LetGo() if self._epoch is not None and self._epoch.number == said.epoch:
                over, self._epoch = self._epoch, None
                await over.abandon()
                if self._forming is not None:
                    await asyncio.wait([self._forming])
                await over.let_go()
                self._first.send(RankEnded(epoch=said.epoch))
            case _:
                log.warning("out of turn", message=type(said).__name__)

    async def _form(self, epoch: RankEpoch) -> None:
        try:
            for lane in LANES:
                await epoch.make_runner(lane)
        except (RuntimeError, InstanceError) as error:  # RuntimeError: torch's, of groups that don't come to be
            if self._epoch is epoch:
                self._first.send(RankBroke(epoch=epoch.number, reason=_reason(error)))
            return
        self._first.send(RankFormed(epoch=epoch.number))

    def _launched(self, epoch: RankEpoch, step: "asyncio.Future[Launched]") -> None:
        if step.cancelled() or (error := step.exception()) is None or self._epoch is not epoch:
            return
        self._first.send(RankBroke(epoch=epoch.number, reason=_reason(error)))


async def follow(config: InstanceConfig, loaded: Loaded, transport: Transport) -> None:
    """Until the first rank is gone. Raises InstanceError if that can't be found, TooLittleMemory, and what breaks here."""
    if loaded.meeting is None:
        raise ValueError("a model that is whole has one rank")
    config = sized(config, loaded.model)
    try:
        address = await asyncio.get_running_loop().run_in_executor(None, loaded.meeting.address)
    except RuntimeError as error:
        raise InstanceError(f"the first rank of the instance didn't come: {error}") from error
    decoder: Decoder[ToRank] = Decoder(ToRank)
    first = transport.dial(address, decoder)
    first.send(RankReady(part=config.place.part, tokens=config.num_blocks * config.block_size))
    await Follower(config, loaded, first).run()


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
