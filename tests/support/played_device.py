"""A device whose "model" says what its attention could see.

It has two layers. The first attends to (position, token) of each position, the second to what the first has made of each; both
add up a number for each that a row sees, modulo 2^61, as partial states of several holders are merged. The next token is a
hash of that sum: one position that is missing, there twice, stale, or of another sequence, in any row so far, makes another.
"""

import asyncio
import random
from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from distattn.budget import StepBudget, TransferEnded
from distattn.exchange import ExchangeError
from distattn.layout import Layout, Reading
from gmanager.wire import messages as m
from instance.copies import Copies
from instance.epoch import Epoch, Lasting
from instance.lane import Lanes
from instance.plan import SampledRow, StepPlan
from instance.runner import StepResult, Times, Traffic
from instance.step import Lane
from kvstore.pool import BlockPool
from kvstore.sight import FULL, Sight
from kvstore.tiers import Copying, Fault, Place, Tier
from tests.support.played import Job, PlayedThread

MODULUS = 2**61
EOS = 2
VOCAB = 4096
EOS_EVERY = 151


def first_layer(position: int, token: int) -> int:
    return hash((1, position, token)) % MODULUS


def second_layer(position: int, seen: int) -> int:
    return hash((2, position, seen)) % MODULUS


def choose(seen: int, seed: int, position: int, past: "array[int] | None") -> int:
    """The token at `position`. `past`: those generated before, where the choice depends on them."""
    number = hash((seen, seed, position, None if past is None else tuple(past))) % MODULUS
    return EOS if number % EOS_EVERY == 0 else EOS + 1 + number % (VOCAB - EOS - 1)


class Expected:
    """The tokens that follow a prompt, where nothing goes wrong."""

    def __init__(self, prompt: Sequence[int], seed: int, *, depends_on_past: bool, sight: Sight = FULL) -> None:
        """`sight`: what rows see in the second layer."""
        self._seed = seed
        self._sight = sight
        self._first = self._second = self._length = 0
        self._seconds: list[int] = []
        self._past = array("I") if depends_on_past else None
        self._tokens: list[int] = []
        for token in prompt:
            self._see(token)

    def tokens(self, count: int) -> list[int]:
        """The first `count`, or fewer if EOS comes before."""
        while len(self._tokens) < count and EOS not in self._tokens[-1:]:
            token = choose(self._second, self._seed, self._length, self._past)
            self._tokens.append(token)
            if self._past is not None:
                self._past.append(token)
            self._see(token)
        return self._tokens[:count]

    def _see(self, token: int) -> None:
        self._first = (self._first + first_layer(self._length, token)) % MODULUS
        self._seconds.append(second_layer(self._length, self._first))
        self._second = sum(self._seconds[self._sight.first(self._length) :]) % MODULUS
        self._length += 1


class Memory:
    """The KV of one instance: for each slot what each layer adds for it. What nobody has written, or what was freed, is
    poison."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._num_poisons = 0
        self.kv: list[list[int]] = [[0] * (num_blocks * block_size) for _ in range(2)]
        self.poison(range(num_blocks))

    def poison(self, block_ids: Iterable[int]) -> None:
        for block in block_ids:
            for slot in range(block * self.block_size, (block + 1) * self.block_size):
                self.spoil(slot)

    def spoil(self, slot: int) -> None:
        for layer in self.kv:
            self._num_poisons += 1
            layer[slot] = hash((3, self._num_poisons)) % MODULUS

    def copy_block(self, source: "Memory", block: int, to: int) -> None:
        size = self.block_size
        for mine, theirs in zip(self.kv, source.kv, strict=True):
            mine[to * size : (to + 1) * size] = theirs[block * size : (block + 1) * size]

    def read(self, layer: int, readings: Sequence[Reading], num_rows: int) -> list[int]:
        """What each row sees."""
        kv, size = self.kv[layer], self.block_size
        seen = [0] * num_rows
        for reading in readings:
            starts = reading.starts or (0,) * reading.num_rows
            for row, (start, count) in enumerate(zip(starts, reading.kv_lens, strict=True), reading.first_row):
                for at in range(start, count):
                    seen[row] += kv[reading.block_ids[at // size] * size + at % size]
        return seen


class PlayedTiers:
    """What lies below one instance's pool. Some of what is written goes wrong, by chance, and some of what is read."""

    def __init__(self, slots: Mapping[Tier, int], memory: Memory, chance: random.Random) -> None:
        self.slots = dict(slots)
        self.breaks = False
        """Whether anything goes wrong."""
        self._memory = memory
        self._chance = chance
        self._at: dict[Place, list[list[int]]] = {}

    def copy(self, items: Sequence[Copying]) -> list[int | Fault]:
        return [self._copy(item) for item in items]

    def close(self) -> None:
        self._at.clear()

    def _copy(self, item: Copying) -> int | Fault:
        size, kv = self._memory.block_size, self._memory.kv
        if item.source == item.target:
            at = item.source.slot * size
            return hash(tuple(tuple(layer[at : at + size]) for layer in kv))
        if item.source.where == "pool":
            at = item.source.slot * size
            block = [layer[at : at + size] for layer in kv]
        else:
            block = [list(layer) for layer in self._at[item.source]]
        written = hash(tuple(map(tuple, block)))
        if self.breaks and self._chance.random() < 0.1:
            wrong: list[Fault] = ["unwritable"] if item.source.where == "pool" else ["unreadable"]
            if self._chance.random() < 0.5:
                return wrong[0]
            block[0][0] ^= 1
        if item.target.where == "pool":
            at = item.target.slot * size
            for layer, values in zip(kv, block, strict=True):
                layer[at : at + size] = values
        else:
            self._at[item.target] = block
            return written if item.checksum is None else item.checksum
        return hash(tuple(map(tuple, block)))


class PoisoningPool(BlockPool):
    """Freed blocks hold what nobody may read."""

    def __init__(self, num_blocks: int, memory: Memory) -> None:
        super().__init__(num_blocks)
        self._memory = memory

    def free(self, block_ids: Iterable[int]) -> list[int]:
        freed = super().free(block_ids)
        self._memory.poison(freed)
        return freed

    def forget(self, block_ids: Iterable[int]) -> list[int]:
        freed = super().forget(block_ids)
        self._memory.poison(freed)
        return freed


@dataclass(slots=True)
class Queued:
    plan: StepPlan
    job: Job


class PlayedRunner:
    """A lane's steps on the device. One runs when the test runs it, with those of all members it exchanges rows with."""

    def __init__(self, rank: int, memory: Memory, chance: random.Random) -> None:
        self.rank = rank
        self.traffic, self.times = Traffic(), Times()
        self.threads = ()
        self.queue: deque[Queued] = deque()
        self.is_closed = False
        self._memory = memory
        self._chance = chance
        self._previous: list[int] = []
        self._tokens: list[int] = []

    def launch(self, plan: StepPlan, processors: int = 0) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepResult] = loop.create_future()
        self.queue.append(Queued(plan, Job(self.launch, (), future, loop.time())))
        return future

    async def result_of(self, launched: Any) -> StepResult:
        result: StepResult = await launched
        return result

    def ends(self) -> list[Any]:
        """A device that is made up runs nothing by itself."""
        return []

    def close(self) -> None:
        """A step that was under way may have written some of what it writes."""
        if self.is_closed:
            return
        self.is_closed = True
        for queued in self.queue:
            for slot in chain(*queued.plan.slots):
                if self._chance.random() < 0.5:
                    self._memory.spoil(slot)
            queued.job.future.cancel()
        self.queue.clear()

    def break_off(self) -> None:
        """Rows of another member don't come."""
        queued = self.queue.popleft()
        for slot in chain(*queued.plan.slots):
            self._memory.spoil(slot)
        queued.job.end(error=ExchangeError("another member closed the connection"))

    @property
    def partners(self) -> set[int]:
        """Ranks whose rows the next step needs."""
        layout = self.queue[0].plan.layout
        return {*layout.dispatched, *layout.received}

    def store_tokens(self) -> None:
        plan = self.queue[0].plan
        self._tokens = list(plan.token_ids_T)
        for row, i in plan.pending:
            self._tokens[row] = self._previous[i]
        for slot, position, token in zip(plan.slots_T, plan.positions_T, self._tokens, strict=True):
            self._memory.kv[0][slot] = first_layer(position, token)

    def store_seen(self, seen: Sequence[int]) -> None:
        plan = self.queue[0].plan
        for slot, position, sum_ in zip(plan.slots[-1], plan.positions_T, seen, strict=True):
            self._memory.kv[1][slot] = second_layer(position, sum_)

    def layout(self, layer: int) -> Layout:
        """Of the next step; the second layer may see less than the first."""
        return self.queue[0].plan.layouts[-layer]

    def serve(self, layer: int) -> list[int]:
        """What rows of others see here."""
        layout = self.layout(layer)
        return self._memory.read(layer, layout.others, layout.num_received)

    def attend(self, layer: int, served: Mapping[int, "tuple[PlayedRunner, list[int]]"]) -> list[int]:
        """What own rows see, here and at others. `served`: what each partner has read for others."""
        layout = self.layout(layer)
        seen = self._memory.read(layer, layout.own, layout.num_rows)
        at = 0
        for rank, count in layout.dispatched.items():
            partner, sums = served[rank]
            received = partner.layout(layer).received
            assert received.get(self.rank) == count, "one sends other rows than the other takes"
            first = sum(n for other, n in received.items() if other < self.rank)
            for row, sum_ in zip(layout.dispatched_rows[at : at + count], sums[first : first + count], strict=True):
                seen[row] += sum_
            at += count
        return [sum_ % MODULUS for sum_ in seen]

    def finish(self, seen: Sequence[int]) -> None:
        """The step has run."""
        queued = self.queue.popleft()
        tokens = [self._sample(row, seen[row.row]) for row in queued.plan.sampled]
        if not queued.plan.is_idle:  # the runner does nothing for one that is
            self._previous = tokens
        pairs = zip(queued.plan.sampled, tokens, strict=True)
        found = {row.seq: m.TokenLogprob(token_id=token, logprob=0.0, rank=0) for row, token in pairs}
        queued.job.end(StepResult(found, []))

    def _sample(self, row: SampledRow, seen: int) -> int:
        past: array[int] | None = None
        if (history := row.history) is not None:
            count = history.num_before + row.num_generated
            past = history.generated[:count]
            if len(past) < count:  # the one that was under way is the row's own
                past.append(self._tokens[row.row])
            assert len(past) == count, f"{len(past)} tokens before are known, {count} were generated"
        return choose(seen, row.params.seed, row.position, past)


def run_step(runners: Sequence[PlayedRunner]) -> None:
    """The next step of members that exchange rows: all KV of a layer is written before any row is attended."""
    for runner in runners:
        runner.store_tokens()
    seen = _attend(runners, 0)
    for runner, sums in zip(runners, seen, strict=True):
        runner.store_seen(sums)
    seen = _attend(runners, 1)
    for runner, sums in zip(runners, seen, strict=True):
        runner.finish(sums)


def _attend(runners: Sequence[PlayedRunner], layer: int) -> list[list[int]]:
    served = {runner.rank: (runner, runner.serve(layer)) for runner in runners}
    return [runner.attend(layer, served) for runner in runners]


class PlayedTransfers:
    """Its two ends' jobs lie in their threads until `whole_cell` has copied block by block."""

    bytes_sent = blocks_sent = 0

    def send(self, move: int, block_ids: Sequence[int] | None, to: int) -> None:
        raise AssertionError("played")

    def receive(self, move: int, block_ids: Sequence[int] | None, source: int) -> str | None:
        raise AssertionError("played")


class PlayedEpoch(Epoch):
    """The real one, with a played device in place of runners, process groups and transfers."""

    def __init__(self, lasting: Lasting, join: m.JoinEpoch, process: int, memory: Memory, chance: random.Random) -> None:
        super().__init__(lasting, join)
        self.process = process
        self.rank = join.rank
        self.memory = memory
        self._chance = chance
        self.meeting = PlayedThread(RuntimeError("its groups were aborted"))
        self._thread = self.meeting  # type: ignore[assignment]
        self.played: dict[Lane, PlayedRunner] = {}
        self.num_copied = 0
        """Blocks of the copy that comes here."""
        self.copying: PlayedThread | None = None
        """Its end of copies."""

    def _make_copies(self) -> Copies:
        lasting = self._lasting
        copies = Copies(
            self.rank,
            lasting.rmanager,
            PlayedTransfers(),  # type: ignore[arg-type]
            StepBudget(lasting.config.copy_tokens),
            torch.device("cpu"),
        )
        copies.thread = self.copying = PlayedThread(TransferEnded("the epoch ended"))
        self._undo(copies.close)
        return copies

    async def _calibrate(self, lanes: Lanes) -> None:
        """Its steps take no time."""

    def _make_runner(self, lane: Lane) -> Any:
        runner = self.played[lane] = PlayedRunner(self.rank, self.memory, self._chance)
        self._undo(runner.close)
        return runner
