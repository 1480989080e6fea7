"""What one rank of an instance has of an epoch on its device: process groups, graphs, runners. The first rank's epoch is more
(`instance.epoch`); on the others of a split model (`instance.follower`) it is all there is."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from llguidance import LLTokenizer

from distattn.attention import DistAttention
from distattn.budget import StepBudget
from distattn.exchange import Exchange, Work
from distattn.transfer import Transfers
from gmanager.wire import messages as wire
from gmanager.wire.logs import get_logger
from instance.cell import EpochGroup
from instance.config import InstanceConfig
from instance.copies import CHANNELS
from instance.elastic_tp import MOST_GRAPH_ROWS, MOST_SPLIT_ROWS, FeedCosts, SplitRule, pack, unpack
from instance.errors import InstanceError
from instance.fused import FusedDecoder
from instance.model import Model
from instance.pipe import ExchangePipe, Pipe
from instance.plan import MAX_DECODE_ROWS, MAX_SAMPLES, StepPlan
from instance.processors import Processors, sharing_of
from instance.runner import Runner
from instance.shared_feeds import SharedFeeds
from instance.stage_runner import StageRunner
from instance.step import Lane
from instance.team import Team
from kvstore.storage import KVStorage

if TYPE_CHECKING:  # it needs Triton, which an instance on the CPU does without
    from distattn.peers import PeerMemory
    from instance.pipe_memory import MemoryPipe
    from instance.shared_memory import FeedMemory
    from instance.team_memory import TeamMemory

log = get_logger("instance")

LET_GO_S, LOOK_S = 0.5, 0.01
"""Between two looks who still waits, and whether the device has ended."""
END_TIMEOUT_S = 8.0
"""Longest that the device may take to let go of a step that was aborted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Equipment:
    """What a rank keeps through all epochs."""

    config: InstanceConfig
    model: Model
    """Or its part of it."""
    tokenizer: LLTokenizer | None
    """For grammars."""
    storage: KVStorage
    processors: Processors | None
    """Of a GPU."""


class RankEpoch:
    """One membership, on one rank: make its runners together with the other members, `end` it."""

    def __init__(
        self,
        equipment: Equipment,
        join: wire.JoinEpoch,
        tell: Callable[[int, Lane, StepPlan, int], None] | None = None,
    ) -> None:
        """`tell`: the other ranks of an epoch's step, before it runs here."""
        self.number = join.epoch
        self.runners: dict[Lane, Runner] = {}
        self.split_rule: SplitRule | None = None
        """When the feeds of decodes are split between the members: the same on all, known with the decode lane's runner. None:
        never."""
        self._equipment = equipment
        self._join = join
        self._tell = tell
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="join")
        """Not the loop's own pool, whose end waits for a thread that waits for a lost peer."""
        self._made = ExitStack()
        """Undoes what was made, last first."""
        self._exchanges: list[Exchange] = []
        self._written: list[PeerMemory | FeedMemory] = []
        """What graphs write to, kept while the device may still run them, though they are let go of before."""
        self._is_over = False

    @property
    def size(self) -> int:
        """Members."""
        return len(self._join.members)

    async def make_runner(self, lane: Lane) -> None:
        """Meet the other members' ranks. Raises what torch raises if they don't come, and InstanceError after `end`."""
        self.runners[lane] = await asyncio.get_running_loop().run_in_executor(self._thread, self._make_runner, lane)
        if self._is_over:
            raise InstanceError("the epoch ended while it was being formed")

    async def abandon(self) -> None:
        """Let go of all that others may wait for; for the device nobody waits."""
        self._is_over = True
        self._made.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def let_go(self) -> None:
        """After `abandon`: until the device does nothing of the epoch any more. Raises InstanceError if it doesn't let go."""
        threads = self._threads()
        loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(len(threads), "end")  # the process may end without it
        ending = {loop.run_in_executor(pool, thread.shutdown) for thread in threads}
        pool.shutdown(wait=False)
        deadline = loop.time() + END_TIMEOUT_S
        stuck: list[Work] = []
        while ending:
            _, ending = await asyncio.wait(ending, timeout=LET_GO_S)
            sending = [exchange.sending for exchange in self._exchanges if exchange.sending is not None]
            if ending and len(ending) <= len(sending) and sending == stuck:
                # all connections are closed: such a thread can only come back with an error, and then writes nothing
                log.warning("left behind in a send that nobody takes", threads=len(ending))
                break
            if ending and loop.time() > deadline:
                raise InstanceError(f"the device did not let go of an aborted step within {END_TIMEOUT_S:g} s")
            stuck = sending
        ends = [event for runner in self.runners.values() for event in runner.ends()]
        # a rank that is asked for no results has waited for no step
        while not all(event.query() for event in ends):  # type: ignore[no-untyped-call]
            if loop.time() > deadline:
                raise InstanceError(f"the device did not end what it was given within {END_TIMEOUT_S:g} s")
            await asyncio.sleep(LOOK_S)

    def _threads(self) -> Sequence[Executor]:
        """That may still do something of it."""
        return [self._thread, *(pool for runner in self.runners.values() for pool in runner.threads)]

    def _undo(self, undo: Callable[[], None]) -> None:
        """With the epoch; at once if it is over already."""
        if self._is_over:
            undo()
            raise InstanceError("the epoch ended while it was being formed")
        self._made.callback(undo)

    def _make_group(
        self,
        name: str,
        device: torch.device,
        *,
        max_channels: int | None = None,
        rank: int | None = None,
        size: int | None = None,
    ) -> EpochGroup:
        """Between all who make theirs of that name together: the ranks of all members that have the same layers and part of
        them, or, where `rank` and `size` say so, others."""
        config = self._equipment.config
        group = EpochGroup(
            store_address=self._join.store_address,
            host=config.host,
            name=f"epoch-{self.number}-{name}" + (f"-of-rank-{config.place.rank}" if size is None else ""),
            rank=self._join.rank if rank is None else rank,
            size=self.size if size is None else size,
            device=device,
            timeout_s=config.step_timeout_s,
            max_channels=max_channels,
        )
        self._undo(group.close)  # before others are waited for: who ends the epoch meanwhile need not wait, too
        return group.meet()

    def _exchange(self, group: EpochGroup, device: torch.device) -> Exchange:
        """With the other members."""
        return self._kept(Exchange(group.group, device, [member.id for member in self._join.members]))

    def _kept(self, exchange: Exchange) -> Exchange:
        """It is asked in the end what is still being sent."""
        self._exchanges.append(exchange)
        return exchange

    def _make_transfers(self, budget: StepBudget) -> Transfers:
        """Copies to and from the ranks of other instances that have the same part of the model.

        Their communicator is made now, though most epochs move nothing. NCCL makes one in a call that all members must join,
        and allocates memory on the device meanwhile, which may wait for the kernels that run there. Once lanes step, one of
        these may wait for a peer that can't launch its own before the same call is over: nobody would go on.
        """
        device = self._equipment.model.device
        words = self._make_group("words", torch.device("cpu"))
        blocks = words if device.type == "cpu" else self._make_group("blocks", device, max_channels=CHANNELS)
        exchanges = self._exchange(blocks, device), self._exchange(words, torch.device("cpu"))
        return Transfers(self._equipment.storage, *exchanges, budget)

    def _make_runner(self, lane: Lane) -> Runner:
        """The device's side of a lane: all members of the epoch make theirs together."""
        equipment, config, device = self._equipment, self._equipment.config, self._equipment.model.device
        group = self._make_group(lane, device)
        exchange = self._exchange(group, device)
        attention = DistAttention(equipment.storage, equipment.model.shape, exchange, backend=config.backend)
        given: dict[str, Any] = {
            "threads": config.threads,
            "max_samples": MAX_SAMPLES[lane],
            "tokenizer": equipment.tokenizer,
            "streams": None if equipment.processors is None else equipment.processors.streams[lane],
            "team": self._make_team(lane, device),
            "feeds": self._shared_feeds(exchange) if lane == "decode" and device.type == "cpu" else None,
            "tell": None if self._tell is None else partial(self._tell, self.number, lane),
        }
        runner: Runner
        if config.place.stages == 1:
            runner = Runner(equipment.model, attention, **given)
        else:
            ends = self._make_team(f"{lane}-ends", device) if config.place.stage == 0 else None
            runner = StageRunner(equipment.model, attention, pipe=self._make_pipe(lane, device), ends=ends, **given)
        self._undo(runner.close)
        if given["feeds"] is not None:
            self.split_rule = self._agree_when(runner, group)
        if device.type == "cuda" and lane == "prefill":
            runner.prepare_chunks(config.chunk_tokens)
        elif device.type == "cuda":
            self._capture(runner, group)
        if lane == "decode" and config.elastic_tp and self.size > 1 and self.split_rule is None:
            log.warning(
                "--elastic-tp is of instances of one host, whose GPUs can write for each other: each computes its own rows"
            )
        return runner

    def _capture(self, runner: Runner, group: EpochGroup) -> None:
        """Decode steps, with what the members write for each other in them."""
        peers = self._share_memory(group)
        feeds = None if peers is None else self._share_feed_memory(group)  # rows of a split step may travel to attend, too
        log.info("capturing CUDA graphs")
        runner.capture(self._equipment.storage, peers, feeds)
        if not group.all_say(bool(runner.graphs)):  # a shared step is a graph on all members, or on none
            runner.graphs.clear()
            peers = feeds = None
        if feeds is not None:
            self.split_rule = self._agree_when(runner, group)
        log.info("decode rows travel", by="NVLink or PCIe, one-sided" if peers else "NCCL")

    def _fused_if_shared(self) -> FusedDecoder | None:
        """The layers, if the members are to share feeds; None: each computes its own."""
        equipment = self._equipment
        can = equipment.config.elastic_tp and self.size > 1 and share_host(self._join.members)
        return equipment.model.fused if can else None

    def _shared_feeds(self, exchange: Exchange) -> SharedFeeds | None:
        """Of the members, by messages; None: each computes its own."""
        fused = self._fused_if_shared()
        return None if fused is None else SharedFeeds(exchange, fused, self._equipment.config.backend)

    def _share_feed_memory(self, group: EpochGroup) -> "FeedMemory | None":
        """Of the members, for steps that are captured; None: each computes its own."""
        if (fused := self._fused_if_shared()) is None:
            return None
        from instance.graphs import bucket  # they need Triton, which an instance on the CPU does without
        from instance.shared_memory import FeedMemory

        model, told = self._equipment.model, self._equipment.config.elastic_tp
        inboxes = FeedMemory.inboxes(
            parts=self.size,
            rows=MOST_GRAPH_ROWS if told == "auto" else bucket(min(told, MOST_GRAPH_ROWS)),
            hidden_size=model.hidden_size,
            vocab_size=fused.num_logits,
            dtype=model.shape.dtype,
            device=model.device,
        )
        memory: FeedMemory | None = None
        try:
            memory = FeedMemory.share(inboxes, group.store, part=self._join.rank, vocab_size=fused.num_logits)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("the instances' GPUs don't reach each other's memory", reason=str(error).splitlines()[0][:200])
        else:
            self._written.append(memory)
            self._undo(memory.abort)
        return memory if group.all_say(memory is not None, "feeds are shared") else None

    def _agree_when(self, runner: Runner, group: EpochGroup) -> SplitRule:
        """When members share feeds: as they were told, or as all of them measured it; all of them, where steps are captured."""
        told, captured = self._equipment.config.elastic_tp, bool(runner.graphs)
        most = MOST_GRAPH_ROWS if captured else MOST_SPLIT_ROWS
        least_members = self.size if captured else 2
        if told != "auto":
            return SplitRule(min(told, most), least_members=least_members)
        processors = self._equipment.processors
        stretch = 1.0 if processors is None else sharing_of(self._equipment.model, processors).stretch
        own = replace(runner.measure_feeds(range(self.size), self._join.rank), stretch=stretch)
        costs = FeedCosts.agreed([unpack(its) for its in group.hear_all("costs", pack(own))])
        log.info("feeds measured", **{name: round(value, 1) for name, value in asdict(costs).items()})
        return SplitRule(most, costs, least_members)

    def _share_memory(self, group: EpochGroup) -> "PeerMemory | None":
        """Memory that the members write for each other, where graphs can use it."""
        from distattn.peers import PeerMemory  # it needs Triton, which an instance on the CPU does without
        from kernels.decode_attention import MAX_ROWS

        size, model = self.size, self._equipment.model
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
        self._written.append(peers)
        self._undo(peers.abort)
        group.barrier()  # nobody pushes into memory that its owner has yet to clear
        return peers

    def _make_team(self, name: str, device: torch.device) -> Team | None:
        """Of the ranks that share layers; None: they are whole."""
        place = self._equipment.config.place
        if place.parts == 1:
            return None
        group = self._make_group(f"{name}-of-{self._join.id}-stage-{place.stage}", device, rank=place.part, size=place.parts)
        memory = self._share_team_memory(group) if device.type == "cuda" and name == "decode" else None
        return Team(group.team_group, place, memory)

    def _share_team_memory(self, group: EpochGroup) -> "TeamMemory | None":
        """Through which the ranks sum decode rows; None: one of them can't reach another's."""
        from instance.team_memory import TeamMemory  # it needs Triton, which an instance on the CPU does without

        model = self._equipment.model
        memory: TeamMemory | None = None
        try:
            memory = TeamMemory(
                store=group.store,
                place=self._equipment.config.place,
                rows=MAX_DECODE_ROWS,
                row_bytes=model.row_bytes,
                device=model.device,
            )
            self._undo(memory.abort)
        except RuntimeError as error:
            log.warning("the ranks' GPUs don't reach each other's memory", reason=str(error).splitlines()[0][:200])
        if not group.all_say(memory is not None):
            memory = None
        log.info("ranks add decode rows", by="one-sided writes, where there is one" if memory else "NCCL")
        return memory

    def _make_pipe(self, lane: Lane, device: torch.device) -> Pipe:
        """Through the stages of this instance."""
        model = self._equipment.model
        if device.type == "cuda" and (pipe := self._share_places(lane)):
            return pipe
        return self._messages(lane, ("rows", "back"), model.hidden_size, model.shape.dtype, device)

    def _messages(
        self, lane: Lane, ways: tuple[str, str], width: int, dtype: torch.dtype, device: torch.device
    ) -> ExchangePipe:
        """Between the stages, by groups of these names: of rows so wide."""
        rows, back = (self._way(lane, name, device) for name in ways)
        return ExchangePipe(rows, back, self._equipment.config.place, hidden_size=width, dtype=dtype, device=device)

    def _way(self, lane: Lane, name: str, device: torch.device) -> Exchange:
        """Between the stages."""
        return self._kept(Exchange(self._group_of_stages(lane, name, device).group, device, members="stage"))

    def _group_of_stages(self, lane: Lane, name: str, device: torch.device) -> EpochGroup:
        """Of the ranks of this instance that have the same part."""
        place = self._equipment.config.place
        full = f"{lane}-{name}-of-{self._join.id}-part-{place.part}"
        return self._make_group(full, device, rank=place.stage, size=place.stages)

    def _share_places(self, lane: Lane) -> "MemoryPipe | None":
        """By which rows go from stage to stage; None: one of them can't reach another's memory."""
        from instance.pipe_memory import MemoryPipe  # it needs CUDA's driver

        model, config, host = self._equipment.model, self._equipment.config, torch.device("cpu")
        told = self._messages(lane, ("told", "told-back"), 1, torch.uint8, host)
        group = self._group_of_stages(lane, "places", host)
        pipe: MemoryPipe | None = None
        try:
            pipe = MemoryPipe(
                config.place,
                told=told,
                store=group.store,
                most_rows=config.chunk_tokens if lane == "prefill" else MAX_DECODE_ROWS,
                hidden_size=model.hidden_size,
                dtype=model.shape.dtype,
                device=model.device,
            )
            self._undo(pipe.abort)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("the stages' GPUs don't reach each other's memory", reason=str(error).splitlines()[0][:200])
        if not group.all_say(pipe is not None):
            pipe = None
        log.info("rows go from stage to stage", lane=lane, by="copies" if pipe else "NCCL")
        return pipe


def share_host(members: Sequence[wire.MemberAddress]) -> bool:
    """Whether all can map each other's GPU memory, and so push rows into it."""
    return len({member.host for member in members}) == 1
