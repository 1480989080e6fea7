"""Main loops of instances without their service: for measuring steps, and nothing else.

What runs is what `instance.server` runs: party, scheduler, derivation, runner. Sequences come from here, not from a gManager.
"""

import asyncio
import gc
import itertools
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from distattn.attention import DistAttention
from distattn.exchange import Exchange, Store
from distattn.layout import HeldRun, Holding
from distattn.peers import PeerMemory
from gmanager.wire.channel import ZmqTransport
from gmanager.wire.codec import Decoder
from gmanager.wire.footprint import taken
from gmanager.wire.messages import Admit, Message, Outputs, SequenceParams, Share, TextAssets, pack_tokens
from instance.cell import EpochGroup
from instance.config import GPU_GRAIN, GPU_MIXED_CHUNK_TOKENS
from instance.elastic_tp import MOST_GRAPH_ROWS, FeedCosts, SplitRule
from instance.grammars import grammar_tokenizer
from instance.lane import Lanes
from instance.model import Model
from instance.needs import most_blocks
from instance.party import Parties, PartyMessage, Seat
from instance.plan import MAX_DECODE_ROWS, MAX_SAMPLES, Pace
from instance.processors import Processors, sharing_of
from instance.rmanager import RManager
from instance.runner import Runner
from instance.scheduler import Scheduler
from instance.shared_memory import FeedMemory
from instance.sharing import SPLITS
from instance.step import LANES, Grouping, Handoff, Lane, Past, derive
from kvstore.storage import KVStorage

TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Cell:
    """The processes that take part: a torch store and a process group for each lane that they share."""

    rank: int
    size: int
    store: Store
    groups: Mapping[Lane, EpochGroup]
    _questions: Iterator[int] = field(default_factory=itertools.count)

    @staticmethod
    def meet(store_address: str, rank: int, size: int, device: torch.device) -> "Cell":
        """Waits for all members; `store_address` as `instance.cell.open_store` gives it."""
        groups = {
            lane: EpochGroup(
                store_address=store_address,
                host="127.0.0.1",
                name=f"epoch-1-{lane}",
                rank=rank,
                size=size,
                device=device,
                timeout_s=TIMEOUT_S,
            ).meet()
            for lane in LANES
        }
        return Cell(rank, size, groups["decode"].store, groups)

    def barrier(self) -> None:
        """Until all members have come here. Not while any steps run, which may exchange rows in the same group."""
        self.groups["decode"].barrier()

    def gather(self, value: float) -> list[float]:
        """What each member says, by rank: all call this, and wait for all. Steps may run meanwhile."""
        number = next(self._questions)
        self.store.set(f"said-{number}-{self.rank}", repr(value).encode())
        return [float(self.store.get(f"said-{number}-{rank}")) for rank in range(self.size)]


class Loop:
    """The loops of one instance's lanes; alone, or in a cell of which all members call the same methods in the same order.

    They run while a method waits for them, and stand still meanwhile. What several hold is placed or admitted on all of them
    before any steps: they wait for each other (`Cell.gather`) in between.
    """

    def __init__(
        self,
        model: Model,
        storage: KVStorage,
        *,
        chunk_tokens: int,
        mixed_chunk_tokens: int = GPU_MIXED_CHUNK_TOKENS,
        decode_processors: Sequence[int] = SPLITS,
        cell: Cell | None = None,
        assets: TextAssets | None = None,
        shares_feeds: bool = False,
    ) -> None:
        """`assets`: of a tokenizer, for sequences that follow a grammar. `shares_feeds`: whether GPUs can (`split`)."""
        on_gpu = model.device.type == "cuda"
        self.rank, size = (0, 1) if cell is None else (cell.rank, cell.size)
        self.storage = storage
        processors = Processors.of(model.device, decode_processors) if on_gpu else None
        self._sharing = None if processors is None else sharing_of(model, processors)
        tokenizer = None if assets is None else grammar_tokenizer(assets, model.vocab_size)
        self.runners: dict[Lane, Runner] = {}
        for lane in LANES:
            group = None if cell is None else cell.groups[lane].group
            attention = DistAttention(
                storage,
                model.shape,
                Exchange(group, model.device),  # type: ignore[arg-type]  # nobody to exchange with
                backend="triton" if on_gpu else "torch",
            )
            self.runners[lane] = Runner(
                model,
                attention,
                threads=torch.get_num_threads(),
                max_samples=MAX_SAMPLES[lane],
                tokenizer=tokenizer,
                streams=None if processors is None else processors.streams[lane],
            )
        if on_gpu:
            peers = feeds = None
            if cell is not None and size > 1:
                peers = PeerMemory(
                    store=cell.store,
                    rank=cell.rank,
                    size=size,
                    rows=MAX_DECODE_ROWS,
                    shape=model.shape,
                    device=model.device,
                )
                if shares_feeds:
                    feeds = _share_feeds(model, cell)
                cell.barrier()  # nobody pushes into memory that its owner has yet to clear
            self.runners["prefill"].prepare_chunks(chunk_tokens)
            self.runners["decode"].capture(storage, peers, feeds)
        windows = model.shape.windows
        self._rmanager = RManager(storage.num_blocks, storage.block_size, windows=windows, chunk_tokens=chunk_tokens)
        self._window_blocks = [most_blocks(sight, storage.block_size, chunk_tokens) for sight in windows]
        pace = Pace(chunk_tokens, mixed_chunk_tokens, model.reach(), GPU_GRAIN if on_gpu else 1)
        self._scheduler = Scheduler(epoch=1, rank=self.rank, pace=pace, rmanager=self._rmanager, sights=model.shape.sights)
        self._seqs: dict[int, None] = {}
        self.tokens: dict[int, list[int]] = {}
        """What each sequence whose home is here has generated."""
        self._groupings = 0
        self._cell = cell
        self._ends: dict[Lane, list[float]] = {lane: [] for lane in LANES}
        """When the steps of each lane were known to have run."""
        self._changed = asyncio.Event()
        gc.collect()
        gc.freeze()  # as an instance does
        self._events = asyncio.Runner()
        self._events.run(self._open(cell))

    @property
    def free_tokens(self) -> int:
        return self._rmanager.free_blocks * self.storage.block_size

    def join(self, members: Sequence[int]) -> None:
        """Step together with these from now on. All of the cell call this at once, each with its own party."""
        self._groupings += 1
        self._parties.learn([Grouping(number=self._groupings, members=list(members))])
        self._events.run(self._settle())

    def split(self, rule: SplitRule | None) -> None:
        """When feeds are split from now on; None: never. All of the cell call this, while nothing runs."""
        self._lanes["decode"].split_rule = rule

    def measure_feeds(self) -> FeedCosts:
        """What this instance finds split steps to cost: all of the cell call this at once, while nothing runs."""
        assert self._cell is not None
        return self.runners["decode"].measure_feeds(range(self._cell.size), self.rank)

    def place(self, seq: int, tokens: Sequence[int], max_tokens: int, *, token: int | None = None, **sampling: Any) -> None:
        """A sequence that has just been prefilled, whatever its KV holds: `tokens[r]` of it on rank r, in that order.

        The last rank that holds any is its home. `token`: its first generated one. `sampling`: what of its
        `SequenceParams` is not greedy and neutral.
        """
        ends = [sum(tokens[: rank + 1]) for rank in range(len(tokens))]
        holdings = [
            Holding(rank, [HeldRun(end - count, end, count)])
            for rank, (end, count) in enumerate(zip(ends, tokens, strict=True))
            if count
        ]
        home = holdings[-1].rank
        for holding in holdings:
            if holding.rank == self.rank:
                self._reserve(seq, holding.tokens + (max_tokens if self.rank == home else 0), ())
                self._rmanager.append(seq, ends[self.rank] - holding.tokens, ends[self.rank])
                self._rmanager.trim(seq, ends[-1])
        params = msgspec.structs.replace(_params(max_tokens), **sampling)
        token = 1 + seq if token is None else token
        past = Past(prompt=b"", generated=pack_tokens([token]), num_before=0) if params.needs_history else None
        handoff = Handoff(
            seq=seq, to=home, arrival=seq, position=ends[-1], prompt_tokens=ends[-1], generated=1, last_token=token,
            params=params, holdings=holdings, past=past,
        )  # fmt: skip
        notice = self._scheduler.propose("decode", [], party=0, step=0, digest=[], groupings=[])
        self._scheduler.accept("decode", derive([msgspec.structs.replace(notice, handoffs=[handoff])]))
        self._scheduler.commit("decode", {})
        self._seqs[seq] = None

    def admit(self, seq: int, prompt: "array[int]", shares: Sequence[int], max_tokens: int) -> None:
        """A prompt that is to be prefilled: `shares[r]` tokens of it by rank r. Rank 0 is its home."""
        if shares[self.rank]:
            self._reserve(seq, shares[self.rank] + max_tokens, self._window_blocks)
            self._scheduler.admit(
                Admit(
                    epoch=1, seq=seq, arrival=seq, token_ids=pack_tokens(prompt), params=_params(max_tokens),
                    shares=[Share(rank=rank, tokens=count) for rank, count in enumerate(shares) if count],
                )
            )  # fmt: skip
            self._seqs[seq] = None

    def is_busy(self, seq: int) -> bool:
        """Whether a sequence still holds blocks here."""
        return self._rmanager.shard(seq) is not None

    def steps(self, most: int, lane: Lane = "decode") -> list[float]:
        """Seconds at which each of up to `most` steps of a lane was known to have run, from the call on; ends when there is no
        work. The other lane runs beside it.

        In a party all members ask for the same number, and one of them must have work for so many.
        """
        begin, before = time.perf_counter(), len(self._ends[lane])
        self._events.run(self._until(lambda: len(self._ends[lane]) >= before + most))
        return [end - begin for end in self._ends[lane][before:]]

    def finish(self, *seqs: int) -> dict[Lane, list[float]]:
        """Run until none of these holds blocks here: seconds at which the steps of each lane were known to have run."""
        begin, before = time.perf_counter(), {lane: len(ends) for lane, ends in self._ends.items()}
        self._events.run(self._until(lambda: not any(map(self.is_busy, seqs))))
        return {lane: [end - begin for end in ends[before[lane] :]] for lane, ends in self._ends.items()}

    def drain(self) -> None:
        """End all that runs, and free it."""
        for seq in self._seqs:
            self._scheduler.cancel(seq)
        self._parties.wake()
        self._events.run(self._until(lambda: not (len(self._rmanager.shards) or any(loop.is_running for loop in self._lanes))))
        self._seqs.clear()

    def close(self) -> None:
        self._events.run(self._shut())
        self._events.close()
        for runner in self.runners.values():
            runner.close()

    async def _open(self, cell: Cell | None) -> None:
        transport = ZmqTransport()
        decoder: Decoder[PartyMessage] = Decoder(PartyMessage)
        self._listener = transport.listen("tcp://127.0.0.1:*", decoder)
        addresses = [self._listener.address]
        if cell is not None:
            store = cell.store
            store.set(f"party-{cell.rank}", self._listener.address.encode())
            addresses = [store.get(f"party-{rank}").decode() for rank in range(cell.size)]
        self._parties = Parties(
            Seat(
                epoch=1,
                rank=self.rank,
                addresses=addresses,
                listener=self._listener,
                dial=lambda address: transport.dial(address, decoder),
                timeout_s=TIMEOUT_S,
                on_lost=lambda rank, reason: None,  # the members of a measurement end as they like
            )
        )
        self._lanes = Lanes(
            parties=self._parties,
            scheduler=self._scheduler,
            runners=self.runners,
            sharing=self._sharing,
            budgets=(),
            timeout_s=TIMEOUT_S,
        )
        self._work = asyncio.create_task(self._lanes.run(self._on_progress))
        await asyncio.sleep(0)  # until it listens

    async def _shut(self) -> None:
        self._work.cancel()
        await asyncio.gather(self._work, return_exceptions=True)
        await self._listener.close()

    async def _settle(self) -> None:
        """Go to the new party, and stay to answer until all have done so."""
        while any(self._parties[lane].grouping.number < self._groupings for lane in LANES):
            await asyncio.sleep(0.002)
        if self._cell is not None:
            self._cell.store.set(f"joined-{self._groupings}-{self.rank}", b"")
            names = [f"joined-{self._groupings}-{rank}" for rank in range(self._cell.size)]
            while not self._cell.store.check(names):
                await asyncio.sleep(0.002)

    async def _until(self, is_done: Callable[[], bool]) -> None:
        """Until then, or until there is no work and nobody else who may bring some. Raises what broke a lane."""
        self._parties.wake()
        while not (is_done() or self._rests()):
            self._changed.clear()
            changed = asyncio.create_task(self._changed.wait())
            await asyncio.wait([changed, self._work], return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            if self._work.done():
                self._work.result()

    def _rests(self) -> bool:
        return not any(loop.is_running or loop.has_work or len(loop.party.members) > 1 for loop in self._lanes)

    def _on_progress(self) -> None:
        now = time.perf_counter()
        for loop in self._lanes:
            ends = self._ends[loop.lane]
            ends.extend([now] * (loop.steps_run - len(ends)))
        self._collect(self._scheduler.take_messages())
        self._changed.set()

    def _collect(self, messages: Sequence[Message]) -> None:
        for message in messages:
            for output in message.outputs if isinstance(message, Outputs) else ():
                self.tokens.setdefault(output.seq, []).extend(output.token_ids)

    def _reserve(self, seq: int, tokens: int, most: Sequence[int]) -> None:
        """`most`: blocks of each table behind the first; what is needed of these beyond that is taken when it is."""
        blocks = -(-tokens // self.storage.block_size) + 1
        if not self._rmanager.reserve(seq, taken(blocks, most)):
            raise ValueError(f"{tokens} tokens don't fit in {self.free_tokens} free ones")


def _share_feeds(model: Model, cell: Cell) -> FeedMemory:
    """As an instance's epoch does it (`instance.rank_epoch`)."""
    assert model.fused is not None
    vocab_size = model.fused.num_logits
    inboxes = FeedMemory.inboxes(
        parts=cell.size,
        rows=MOST_GRAPH_ROWS,
        hidden_size=model.hidden_size,
        vocab_size=vocab_size,
        dtype=model.shape.dtype,
        device=model.device,
    )
    return FeedMemory.share(inboxes, cell.store, part=cell.rank, vocab_size=vocab_size)


def _params(max_tokens: int) -> SequenceParams:
    return SequenceParams(max_tokens=max_tokens, temperature=0, top_k=0, top_p=1, seed=0, stop_token_ids=[], logprobs=None)
