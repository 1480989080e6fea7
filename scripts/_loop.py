"""Main loops of instances without their service: for measuring steps, and nothing else.

What runs is what `instance.server` runs: party, scheduler, derivation, runner. Sequences come from here, not from a gManager.
"""

import asyncio
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from distattn.attention import DistAttention
from distattn.exchange import Exchange, Group, Store
from distattn.layout import Holding
from distattn.peers import PeerMemory
from gmanager.wire.channel import ZmqTransport
from gmanager.wire.codec import Decoder
from gmanager.wire.messages import Admit, Message, Outputs, SequenceParams, Share, TextAssets, pack_tokens
from instance.config import GPU_GRAIN, GPU_MIXED_CHUNK_TOKENS
from instance.model import Model
from instance.party import Party, PartyMessage
from instance.rmanager import RManager
from instance.runner import Launched, Runner
from instance.scheduler import MAX_DECODE_ROWS, MAX_SAMPLES, Pace, Scheduler
from instance.step import Grouping, Handoff, Past, derive
from kvstore.storage import KVStorage

TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Cell:
    """The processes that take part: a torch store and a process group (`instance.cell.EpochGroup`) that they share."""

    rank: int
    size: int
    store: Store
    group: Group


class Loop:
    """One instance's loop; alone, or in a cell of which all members call the same methods in the same order."""

    def __init__(
        self,
        model: Model,
        storage: KVStorage,
        *,
        chunk_tokens: int,
        mixed_chunk_tokens: int = GPU_MIXED_CHUNK_TOKENS,
        cell: Cell | None = None,
        assets: TextAssets | None = None,
    ) -> None:
        """`assets`: of a tokenizer, for sequences that follow a grammar."""
        on_gpu = model.device.type == "cuda"
        self.rank, size = (0, 1) if cell is None else (cell.rank, cell.size)
        self.storage = storage
        group = None if cell is None else cell.group
        attention = DistAttention(
            storage,
            model.shape,
            Exchange(group, model.device),  # type: ignore[arg-type]  # nobody to exchange with
            backend="triton" if on_gpu else "torch",
        )
        self.runner = Runner(model, attention, threads=torch.get_num_threads(), max_samples=MAX_SAMPLES, assets=assets)
        if on_gpu:
            peers = None
            if cell is not None:
                peers = PeerMemory(
                    store=cell.store,
                    rank=cell.rank,
                    size=size,
                    rows=MAX_DECODE_ROWS,
                    shape=model.shape,
                    device=model.device,
                )
            self.runner.prepare(storage, chunk_tokens, peers)
        self._rmanager = RManager(storage.num_blocks, storage.block_size)
        pace = Pace(chunk_tokens, min(chunk_tokens, mixed_chunk_tokens), model.reach(), GPU_GRAIN if on_gpu else 1)
        self._scheduler = Scheduler(epoch=1, rank=self.rank, pace=pace, rmanager=self._rmanager)
        self._running: asyncio.Future[Launched] | None = None
        self._seqs: dict[int, None] = {}
        self.tokens: dict[int, list[int]] = {}
        """What each sequence whose home is here has generated."""
        self._groupings = 0
        self._cell = cell
        self._events = asyncio.Runner()
        self._events.run(self._open(cell))

    @property
    def free_tokens(self) -> int:
        return self._rmanager.free_blocks * self.storage.block_size

    def join(self, members: Sequence[int]) -> None:
        """Step together with these from now on. All of the cell call this at once, each with its own party."""
        self._groupings += 1
        self._party.learn([Grouping(number=self._groupings, members=list(members))])
        self._events.run(self._settle())

    def place(self, seq: int, tokens: Sequence[int], max_tokens: int, *, token: int | None = None, **sampling: Any) -> None:
        """A sequence that has just been prefilled, whatever its KV holds: `tokens[r]` of it on rank r, in that order.

        The last rank that holds any is its home. `token`: its first generated one. `sampling`: what of its
        `SequenceParams` is not greedy and neutral.
        """
        ends = [sum(tokens[: rank + 1]) for rank in range(len(tokens))]
        holdings = [
            Holding(rank, end - count, count) for rank, (end, count) in enumerate(zip(ends, tokens, strict=True)) if count
        ]
        home = holdings[-1].rank
        for holding in holdings:
            if holding.rank == self.rank:
                self._reserve(seq, holding.tokens + (max_tokens if self.rank == home else 0))
                self._rmanager.append(seq, holding.first, holding.first + holding.tokens)
        params = msgspec.structs.replace(_params(max_tokens), **sampling)
        token = 1 + seq if token is None else token
        past = Past(prompt=b"", generated=pack_tokens([token]), num_before=0) if params.needs_history else None
        handoff = Handoff(
            seq=seq, to=home, arrival=seq, position=ends[-1], prompt_tokens=ends[-1], generated=1, last_token=token,
            params=params, holdings=holdings, past=past,
        )  # fmt: skip
        notice = self._scheduler.propose([], party=0, step=0, digest=[], groupings=[])
        self._scheduler.accept(derive([msgspec.structs.replace(notice, handoffs=[handoff])]))
        self._scheduler.commit({})
        self._seqs[seq] = None

    def admit(self, seq: int, prompt: "array[int]", shares: Sequence[int], max_tokens: int) -> None:
        """A prompt that is to be prefilled: `shares[r]` tokens of it by rank r. Rank 0 is its home."""
        if shares[self.rank]:
            self._reserve(seq, shares[self.rank] + max_tokens)
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

    def steps(self, most: int) -> list[float]:
        """Seconds at which each of up to `most` steps was known to have run, from the call on; ends when there is no work.

        In a party all members ask for the same number, and one of them must have work for so many.
        """
        return self._events.run(self._run(most))

    def drain(self) -> None:
        """End all that runs, and free it."""
        for seq in self._seqs:
            self._scheduler.cancel(seq)
        self._party.woken.set()
        while len(self._rmanager.shards) or self._running is not None:
            self.steps(1)
        self._seqs.clear()

    def close(self) -> None:
        self._events.run(self._shut())
        self._events.close()
        self.runner.close()

    async def _open(self, cell: Cell | None) -> None:
        transport = ZmqTransport()
        decoder: Decoder[PartyMessage] = Decoder(PartyMessage)
        self._listener = transport.listen("tcp://127.0.0.1:*", decoder)
        addresses = [self._listener.address]
        if cell is not None:
            store = cell.store
            store.set(f"party-{cell.rank}", self._listener.address.encode())
            addresses = [store.get(f"party-{rank}").decode() for rank in range(cell.size)]
        self._party = Party(
            epoch=1,
            rank=self.rank,
            addresses=addresses,
            listener=self._listener,
            dial=lambda address: transport.dial(address, decoder),
            timeout_s=TIMEOUT_S,
        )
        self._meeting = asyncio.create_task(self._party.run())

    async def _shut(self) -> None:
        self._meeting.cancel()
        await asyncio.gather(self._meeting, return_exceptions=True)
        await self._listener.close()

    async def _settle(self) -> None:
        """Go to the new party, and stay to answer until all have done so."""
        while self._party.grouping.number < self._groupings:
            await self._step()
        if self._cell is not None:
            self._cell.store.set(f"joined-{self._groupings}-{self.rank}", b"")
            names = [f"joined-{self._groupings}-{rank}" for rank in range(self._cell.size)]
            while not self._cell.store.check(names):
                await asyncio.sleep(0.002)

    async def _step(self) -> bool | None:
        """Launch the next step of the party, if there is one: False if there is no work, None if the party changed instead."""
        party, scheduler = self._party, self._scheduler
        self._launched: asyncio.Future[Launched] | None = None
        if not (party.is_called or scheduler.has_work(party.members)):
            return False
        notice = scheduler.propose(
            party.members, party=party.grouping.number, step=party.step, digest=party.digest, groupings=party.news()
        )
        notices = await party.exchange(notice)
        if notices is None:
            return None
        step = derive(notices)
        self._launched = self.runner.launch(scheduler.accept(step))
        party.advance(step.digest(), rest=step.is_empty())
        return True

    async def _run(self, most: int) -> list[float]:
        party, scheduler = self._party, self._scheduler
        ends: list[float] = []
        begin = time.perf_counter()
        while len(ends) < most:
            stepped = await self._step()
            if stepped is None:
                continue
            if not stepped and self._running is None:
                if len(party.members) == 1:
                    break
                party.woken.clear()
                await asyncio.wait_for(party.woken.wait(), TIMEOUT_S)
                continue
            launched = self._launched
            if self._running is not None:
                scheduler.commit((await self.runner.result_of(self._running)).tokens)
                self._collect(scheduler.take_messages())
                ends.append(time.perf_counter() - begin)
            self._running = launched
        return ends

    def _collect(self, messages: Sequence[Message]) -> None:
        for message in messages:
            for output in message.outputs if isinstance(message, Outputs) else ():
                self.tokens.setdefault(output.seq, []).extend(output.token_ids)

    def _reserve(self, seq: int, tokens: int) -> None:
        if not self._rmanager.reserve(seq, -(-tokens // self.storage.block_size) + 1):
            raise ValueError(f"{tokens} tokens don't fit in {self.free_tokens} free ones")


def _params(max_tokens: int) -> SequenceParams:
    return SequenceParams(max_tokens=max_tokens, temperature=0, top_k=0, top_p=1, seed=0, stop_token_ids=[], logprobs=None)
