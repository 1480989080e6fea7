"""A whole service in one process, without a device, a socket or a clock: everything that decides is the real thing.

    real    `Cluster` with its policy and delivery; on each instance `instance.server.Instance` and all that it steps with
            (epochs, lanes, parties, scheduler, derivation, handoffs, rManager, shards, copies, what is unheard); the codec
    played  clients; connections, time and threads (`tests.support.played`); devices (`tests.support.played_device`)

What happens next is chosen outside: `WholeCell.let` does some of all that can happen, in an order drawn from a seed. Clients
check each token against what follows its prompt where nothing goes wrong.
"""

import asyncio
import logging
import random
import re
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import patch

import torch

from distattn.transfer import PEER_TIMEOUT_S, CopyFailed
from gmanager.cluster.cluster import Cluster
from gmanager.cluster.events import (
    Action,
    Deliver,
    Encode,
    Encoded,
    Event,
    LoadText,
    Log,
    PeerSaid,
    PeerWasLost,
    Restored,
    Send,
    TextLoaded,
    Ticked,
    Write,
)
from gmanager.cluster.policies import POLICIES
from gmanager.config import GManagerConfig
from gmanager.journal_file import Batch, JournalFile
from gmanager.wire import footprint
from gmanager.wire import messages as m
from gmanager.wire.codec import Decoder, encode
from gmanager.wire.errors import BadMessage
from instance.config import InstanceConfig, Launch
from instance.errors import EpochEnded, WasDrained
from instance.needs import most_blocks
from instance.sequence import gaps_between
from instance.server import Instance
from instance.step import LANES
from kvstore.pool import BlockPool
from kvstore.sight import FULL, Sight
from kvstore.tiers import Tier
from tests.gmanager.cluster_support import one_by_one, register
from tests.support.played import GMANAGER, Connection, Network, PlayedLoop, PlayedThread, PlayedTransport, read
from tests.support.played_device import (
    EOS,
    VOCAB,
    Expected,
    Memory,
    PlayedEpoch,
    PlayedRunner,
    PlayedTiers,
    PoisoningPool,
    run_step,
)

BLOCK = 4
CHUNK = 8
BLOCK_BYTES = 2**24
"""So large that few are copied at once."""
SEED = 7
NEVER = 1e6
QUIET_S = 10
"""Longer than a lease, and than a cell waits for members that its last gManager left."""
ASSETS = m.TextAssets(tokenizer_json=None, chat_template=None, special_tokens={}, eos_token_ids=[EOS])
CONFIG = GManagerConfig(max_queue_wait_s=NEVER, max_stall_s=NEVER)

ENDINGS = re.compile(r"the gManager (at \S+ closed the connection|refused this instance: cell 'main' already has its )")
"""With which errors an instance may end that was not asked to: it came while a cell formed that has all its instances, or its
connection was cut before it was registered. Who starts it then starts it again."""

TO_GMANAGER: Decoder[Any] = Decoder(m.FromInstance | m.FromClient)
TO_CLIENT: Decoder[Any] = Decoder(m.ToClient)


Act = tuple[str, Callable[[random.Random], None]]
"""Something that can happen, and whose doing it is."""


@dataclass(eq=False)
class Process:
    """One instance."""

    number: int
    total: int
    """Blocks of its pool."""
    transport: PlayedTransport
    memory: Memory
    instance: Instance
    task: "asyncio.Task[None]"
    tiers: PlayedTiers | None = None
    is_dead: bool = False
    is_held: bool = False
    """It stands still: nothing reaches it, nothing comes from it, and its device waits."""

    @property
    def names(self) -> tuple[str, str]:
        """Of what it dials with, and where it listens."""
        return self.transport.owner, self.transport.address

    @property
    def pool(self) -> BlockPool:
        return self.instance._rmanager.shards.pool

    @property
    def held(self) -> list[int]:
        """Sequences of which blocks are here, those that are only cached left out."""
        return list(self.instance._rmanager.shards)


@dataclass
class Asked:
    """A request, as its client knows it."""

    submit: m.Submit
    expected: Expected
    got: list[int] = field(default_factory=list)
    end: Deliver | None = None
    is_cancelled: bool = False

    def take(self, new: Deliver, *, may_fail: bool) -> None:
        """Exactly what comes next of what is expected, and one end."""
        assert self.end is None, f"{new} after {self.end}"
        assert new.before is None or list(new.before) == self.got
        assert new.index == len(self.got), f"tokens from {new.index} on, after {len(self.got)}"
        self.got += new.token_ids
        right = self.expected.tokens(len(self.got))
        wrong = [i for i, (a, b) in enumerate(zip(self.got, right, strict=False)) if a != b]
        assert self.got == right, f"{new.request_id}: tokens {wrong} of {len(self.got)} are wrong"
        if new.finish_reason is None:
            return
        self.end = new
        if new.finish_reason == "length":
            assert len(self.got) == self.submit.params.max_tokens
        elif new.finish_reason == "stop":
            assert self.got[-1] == EOS
        elif new.finish_reason == "abort":
            assert self.is_cancelled
        else:
            is_said = new.refusal == "never" or "epochs of cell 'main' broke while the request ran" in (new.error or "")
            assert is_said or may_fail, f"an error that nothing explains: {new.error}"


class WholeCell:
    def __init__(
        self,
        sizes: list[int],
        seed: int = 0,
        tier_slots: Mapping[Tier, int] | None = None,
        sight: Sight = FULL,
    ) -> None:
        """`sizes`: blocks of the instances with which the cell begins. `seed`: of what aborted devices leave behind, of the
        policy and of roles. `tier_slots`: below the pool of each instance; None: there are none. `sight`: what
        rows see in the second layer."""
        self.tier_slots = dict(tier_slots or {})
        self.sight = sight
        self.windows = () if sight == FULL else (sight,)
        self.most = [most_blocks(window, BLOCK, CHUNK) for window in self.windows]
        self.checks_cache = seed % 3 == 1 and not self.windows
        self.loop = PlayedLoop()
        self.network = Network()
        self.network.open(GMANAGER, self)
        self.chance = random.Random(seed)
        self.config = replace(CONFIG, policy=self.chance.choice(sorted(POLICIES)))
        self.cluster = Cluster(self.config, term=1)
        self.batch = Batch()
        """What goes into the journal next."""
        self.journal = b""
        """Its file."""
        self.sizes = sizes
        self.processes: list[Process] = []
        self.epochs: dict[int, dict[int, PlayedEpoch]] = {}
        """number -> rank -> its end."""
        self.peers: dict[bytes, Connection] = {}
        self.clients = [b"client 0", b"client 1"]
        self.asked: dict[str, Asked] = {}
        self.late: deque[Event] = deque()
        self.num_calls = 0
        self.cell_is_over = False
        """In the present event."""
        self.seen: Counter[str] = Counter()
        """What has happened, to know that it did."""
        for peer in self.clients:
            self.hear(peer, m.Hello(protocol=m.PROTOCOL))
        self.start_missing()

    # --- the gManager's shell

    def arrive(self, connection: Connection, frame: bytes | None) -> None:
        """From an instance."""
        peer = connection.peer
        self.peers[peer] = connection
        if frame is None:
            del self.peers[peer]
            connection.put_down(None)
            self.tell(PeerWasLost(peer, "it closed the connection", self.loop.now))
            return
        message = read(TO_GMANAGER, frame)
        assert not isinstance(message, BadMessage), message
        self.seen[type(message).__name__] += 1
        if isinstance(message, m.Kept):
            self.seen["cached when an epoch ended"] += len(message.cached)
        self.seen["blocks fetched"] += message.blocks if isinstance(message, m.Fetched) else 0
        self.seen["lacks source"] += isinstance(message, m.NotGranted) and message.lacks_source
        self.tell(PeerSaid(peer, message, self.loop.now))

    def hear(self, client: bytes, message: m.Message) -> None:
        self.tell(PeerSaid(client, read(TO_GMANAGER, encode(message)), self.loop.now, seed=SEED))

    def tell(self, event: Event) -> None:
        self.cell_is_over = False
        could_go_on = any(cell.is_formed and cell.size + len(cell.joiners) > 1 for cell in self.cluster._cells)
        for action in one_by_one(self.cluster.handle(event)):
            self.do(action)
        self.cluster.validate()
        if not isinstance(event, Ticked):  # with which the leases of several may end
            assert not (self.cell_is_over and could_go_on), f"{event} ended a cell that had others"

    def do(self, action: Action) -> None:
        match action:
            case Write(entry=entry):
                self.batch.add(entry)
            case Send(peer=peer, message=message) if peer in self.clients:
                answer = read(TO_CLIENT, encode(message))
                self.seen[type(answer).__name__] += 1
                assert not isinstance(answer, m.Output | BadMessage), answer
            case Send(peer=peer, message=message):
                self.seen["Fetch"] += isinstance(message, m.Fetch)
                if isinstance(message, m.Reserve) and message.source:
                    self.seen["tokens to be shared"] += sum(end - start for run in message.shared for start, end in run)
                    self.seen["shared where nothing is computed"] += not message.blocks
                if isinstance(message, m.Admit):
                    kept = [piece for part in message.kept for run in part.runs for piece in run]
                    self.seen["kept tokens"] += sum(end - start for start, end in kept)
                    self.seen["admitted again with gaps"] += len(gaps_between(kept, len(message.token_ids) // 4)) > 1
                if peer in self.peers:
                    self.peers[peer].put_down(encode(message))
            case Deliver(request_id=request_id, peer=peer) if peer is not None:
                self.asked[request_id].take(action, may_fail=self.cell_is_over)
                if action.finish_reason is not None:
                    self.seen[f"ended: {action.finish_reason}"] += 1
            case Encode():
                ids = action.submit.token_ids or b""
                self.late.append(Encoded(action.request, self.loop.now, token_ids=ids, highest=VOCAB))
            case LoadText(cell=number):
                self.late.append(TextLoaded(number, self.loop.now))
            case Log(level=level, event=event):
                assert level in (logging.INFO, logging.WARNING, logging.ERROR)
                self.seen[event] += 1
                self.cell_is_over |= event == "cell over"

    def lose_gmanager(self) -> None:
        """It is killed, and another comes at once, which knows what the journal has: all that clients have."""
        self.seen["gManager lost"] += 1
        term, restored = self.reopened()
        self.cluster = Cluster(self.config, term=term)
        self.late.clear()
        self.peers.clear()
        for connection in self.network.connections:
            if connection.address == GMANAGER:
                connection.up.clear()
                connection.up_is_over = True
                connection.put_down(None)
        self.cluster.restore(restored, self.loop.now)
        for client in self.clients:
            self.hear(client, m.Hello(protocol=m.PROTOCOL))
        for name in self.open:
            asked = self.asked[name]
            again = m.Attach(request_id=name, from_index=len(asked.got)) if asked.got else asked.submit
            self.hear(self.client_of(name), again)
        self.settle()

    def reopened(self) -> tuple[int, list[Restored]]:
        """The journal's next term, and what it has."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "journal"
            if self.journal:
                path.write_bytes(self.journal)
            before = JournalFile(path)
            before.write(self.batch)
            before.close()
            self.batch = Batch()
            after = JournalFile(path)
            try:
                return after.term, after.read()
            finally:
                after.close()
                self.journal = path.read_bytes()

    # --- instances

    @property
    def living(self) -> list[Process]:
        return [process for process in self.processes if not process.is_dead]

    def start(self, total: int) -> None:
        number = len(self.processes)
        transport = PlayedTransport(self.network, f"instance {number}", f"tcp://127.0.0.1:{9000 + number}")
        config = InstanceConfig(
            gmanager=GMANAGER,
            model="played",
            kv_tokens=total * BLOCK,
            launch=Launch(rank=0, local_rank=0, world_size=1, run_id=str(number)),
            device="cpu",
            block_size=BLOCK,
            chunk_tokens=CHUNK,
            mixed_chunk_tokens=5,
            cell_size=len(self.sizes),
            check_cache=self.checks_cache,
            role=self.chance.choice(get_args(m.Role)),
        )
        total = footprint.taken(total, self.most)
        spec = register(rank=0, cell_size=1, blocks=total, block_size=BLOCK, chunk_tokens=CHUNK, windows=self.most).spec
        shape = SimpleNamespace(sights=(FULL, *self.windows), windows=self.windows)
        model: Any = SimpleNamespace(vocab_size=VOCAB, device=torch.device("cpu"), fused=None, shape=shape)
        storage: Any = SimpleNamespace(num_blocks=total, block_size=BLOCK, block_bytes=BLOCK_BYTES)
        memory = Memory(total, BLOCK)
        has_tiers = any(self.tier_slots.values()) or self.checks_cache
        tiers = PlayedTiers(self.tier_slots, memory, self.chance) if has_tiers else None

        async def begin() -> Instance:
            return Instance(config, model, ASSETS, spec, storage, transport, tiers)

        instance = self.loop.run_until_complete(begin())
        shards = instance._rmanager.shards
        pool = PoisoningPool(total, memory)
        pool.on_free = shards.pool.on_free  # of the tiers, and of who checks
        shards.pool = shards.cache._pool = pool
        if instance._tiering is not None:
            instance._tiering.thread = PlayedThread(RuntimeError("the instance ends"))
        process = Process(number, total, transport, memory, instance, self.loop.start(instance.run()), tiers)
        transport.process = process
        self.processes.append(process)
        self.settle()

    def start_missing(self) -> None:
        """Whatever a new cell lacks."""
        if not any(cell.is_formed for cell in self.cluster._cells):
            for total in self.sizes[len(self.living) :]:
                self.start(total)

    def spoil_cached(self, process: Process, which: int) -> None:
        """A bit flips in a cached block that nobody uses, and whose checksum is known."""
        tiering = process.instance._tiering
        pool = process.pool
        unused = [block for block in range(pool.num_blocks) if pool.is_evictable(block)]
        known = sorted(tiering.known(unused)) if tiering is not None else []
        if known:
            process.memory.kv[0][known[which % len(known)] * BLOCK] ^= 1
            self.seen["spoiled in a pool"] += 1

    def begin_epoch(self, lasting: Any, join: m.JoinEpoch) -> PlayedEpoch:
        """In place of `Epoch`, on an instance."""
        process: Process = lasting.transport.process
        epoch = PlayedEpoch(lasting, join, process.number, process.memory, self.chance)
        self.epochs.setdefault(join.epoch, {})[join.rank] = epoch
        self.seen["epochs"] += join.rank == 0
        return epoch

    def kill(self, process: Process, *, keeps_last: bool) -> None:
        """As kill -9. `keeps_last`: whether what it has sent still arrives."""
        process.is_dead = True
        process.transport.die(keeps_last=keeps_last)
        process.task.cancel()
        self.settle()

    def settle(self) -> None:
        """Let all processes do what they can without anything new. Raises what one ends with that it shouldn't."""
        self.loop.settle()
        for process in self.living:
            if not process.task.done():
                continue
            process.is_dead = True
            process.transport.die(keeps_last=True)
            error = process.task.exception()
            may_end = isinstance(error, EpochEnded | WasDrained) or process.instance._is_leaving
            if error is not None and not may_end and ENDINGS.match(str(error)) is None:
                raise error
            self.seen["left" if error is None else type(error).__name__] += 1

    # --- what can happen next

    def let(self, turns: int, seed: int) -> bool:
        """So many things happen, in an order drawn from the seed; some connections and devices are slow: they come last.

        Returns whether more can.
        """
        draw = random.Random(seed)
        is_slow: dict[str, bool] = {}
        for _ in range(turns):
            acts = list(self.acts())
            if not acts:
                return False
            for whose, _ in acts:
                if whose not in is_slow:
                    is_slow[whose] = draw.random() < 0.2
            able = [act for whose, act in acts if not is_slow[whose]] or [act for _, act in acts]
            able[draw.randrange(len(able))](draw)
            self.settle()
        return True

    def validate(self) -> None:
        """The books of each. The cluster's are looked at after each event."""
        for process in self.living:
            process.instance.validate()

    def acts(self) -> Iterator[Act]:
        """All that can happen now."""
        if self.late:
            yield "text", lambda _: self.tell(self.late.popleft())
        held = {name for process in self.living if process.is_held for name in process.names}
        for connection, queue in self.network.ready():
            if connection.dialer.transport.owner not in held and connection.address not in held:
                way = "up" if queue is connection.up else "down"
                yield f"{way} {connection.peer!r}", partial(self.pass_on, connection, queue)
        for number, members in list(self.epochs.items()):
            if all(epoch.meeting.is_closed for epoch in members.values()):
                del self.epochs[number]
            else:
                yield from self.acts_of_epoch(members)

    def acts_of_epoch(self, members: dict[int, PlayedEpoch]) -> Iterator[Act]:
        """Of devices and process groups."""
        alive = [epoch for epoch in members.values() if not epoch.meeting.is_closed]
        has_losses = len(alive) < len(members)
        waiting = [epoch for epoch in alive if epoch.meeting.job is not None]
        if len(waiting) == alive[0].size and not any(self.is_held(epoch) for epoch in waiting):
            yield "groups", lambda _: self.meet(waiting)
        runners = {lane: {r: each.played[lane] for r, each in members.items() if lane in each.played} for lane in LANES}
        for epoch in alive:
            if self.is_held(epoch):
                continue
            yield from self.acts_of_tiers(self.processes[epoch.process])
            if epoch in waiting and has_losses:
                yield "groups", lambda _, epoch=epoch: epoch.meeting.end(error=RuntimeError("another closed the connection"))
            for lane in LANES:
                runner = runners[lane].get(epoch.rank)
                if runner is None or not runner.queue:
                    continue
                group = self.group_of(runner, runners[lane])
                if group is None:
                    yield f"device {lane} {epoch.process}", lambda _, runner=runner: runner.break_off()
                elif group and group[0] is runner and not any(self.is_held(members[each.rank]) for each in group):
                    yield f"device {lane} {epoch.process}", lambda _, group=group: run_step(group)
            yield from self.acts_of_copy(epoch, members)

    def acts_of_tiers(self, process: Process) -> Iterator[Act]:
        """What is copied below a pool, or from there."""
        tiering, tiers = process.instance._tiering, process.tiers
        if tiering is None or tiers is None or process.is_dead:
            return
        thread: Any = tiering.thread
        if (job := thread.job) is not None:
            yield f"tiers {process.number}", lambda _: thread.end(tiers.copy(job.args[0]))

    def is_held(self, epoch: PlayedEpoch) -> bool:
        return self.processes[epoch.process].is_held

    def acts_of_copy(self, epoch: PlayedEpoch, members: dict[int, PlayedEpoch]) -> Iterator[Act]:
        """The next block of a copy to there; or its other end doesn't come."""
        thread = epoch.copying
        job = None if thread is None else thread.job
        if thread is None or job is None:
            return
        partner = members[job.args[2]]
        other = None if partner.copying is None else partner.copying.job
        is_lost = partner.meeting.is_closed
        if is_lost or (other is None and self.loop.now - job.since > PEER_TIMEOUT_S):
            yield "copies", lambda _: thread.end(error=CopyFailed("the other end does not come"))
        elif job.func.__name__ == "receive" and other is not None and other.args[2] == epoch.rank and not self.is_held(partner):
            yield "copies", lambda draw: self.copy_block(partner, epoch, draw)

    def pass_on(self, connection: Connection, queue: deque[bytes | None], draw: random.Random) -> None:
        """One frame, or all that are there."""
        for _ in range(len(queue) if draw.random() < 0.3 else 1):
            if queue:
                self.network.deliver(connection, queue)

    @staticmethod
    def meet(waiting: list[PlayedEpoch]) -> None:
        """All members make their groups together."""
        for epoch in waiting:
            job = epoch.meeting.job
            assert job is not None
            epoch.meeting.end(job.func(*job.args))

    @staticmethod
    def group_of(runner: PlayedRunner, runners: dict[int, PlayedRunner]) -> list[PlayedRunner] | None:
        """Who runs its next step together with it; none: not all are there yet. None: one will never be."""
        group = {runner.rank: runner}
        todo = [runner]
        while todo:
            for rank in sorted(todo.pop().partners - set(group)):
                partner = runners.get(rank)
                if partner is None or partner.is_closed:
                    return None
                if not partner.queue:
                    return []
                group[rank] = partner
                todo.append(partner)
        is_mutual = all(each.rank in group[rank].partners for each in group.values() for rank in each.partners)
        return [group[rank] for rank in sorted(group)] if is_mutual else []  # else a partner has an earlier step to run

    def copy_block(self, source: PlayedEpoch, target: PlayedEpoch, draw: random.Random) -> None:
        """Of a copy, of which both ends are there."""
        assert source.copying is not None and target.copying is not None
        sent, received = source.copying.job, target.copying.job
        assert sent is not None and received is not None and sent.func.__name__ == "send"
        blocks, into = sent.args[1], received.args[1]
        if sent.args[0] != received.args[0] or blocks is None or into is None:
            for each in (source, target):
                each.copying.end(error=CopyFailed("the other end has no part in it"))
            target.num_copied = 0
            return
        assert len(blocks) == len(into)
        done = target.num_copied
        if done < len(blocks):
            target.memory.copy_block(source.memory, blocks[done], into[done])
            target.num_copied += 1
            return
        target.num_copied = 0
        source.copying.end()
        target.copying.end("a bit has changed" if draw.random() < 0.15 else None)
        self.seen["copies"] += 1

    def pass_time(self, seconds: float) -> None:
        self.loop.now += seconds
        for client in self.clients:
            self.hear(client, m.Ping())
        self.tell(Ticked(self.loop.now))
        self.settle()

    # --- clients, and whoever else wants something

    def submit(self, length: int, max_tokens: int, spread: Any, *, depends_on_past: bool, begins: int = 0) -> None:
        """`begins`: with the text of an earlier request, most of it or all with the answer so far; 0: with none."""
        name = f"r{len(self.asked)}"
        draw = random.Random(name)
        prompt = [draw.randrange(EOS + 1, VOCAB) for _ in range(length)]
        if begins and self.asked:
            earlier = list(self.asked.values())[-1 - begins // 2 % len(self.asked)]
            known = m.unpack_tokens(earlier.submit.token_ids or b"").tolist() + (earlier.got if begins % 2 else [])
            prompt = (known + prompt)[: max(length, min(len(known), self.capacity // 2))]
        params = m.SamplingParams(max_tokens=max_tokens, presence_penalty=0.5 if depends_on_past else 0.0)
        salt = "its own" if begins % 7 == 6 else None
        tokens = m.pack_tokens(prompt)
        submit = m.Submit(request_id=name, params=params, token_ids=tokens, spread=spread, cache_salt=salt)
        self.asked[name] = Asked(submit, Expected(prompt, SEED, depends_on_past=depends_on_past, sight=self.sight))
        self.hear(self.client_of(name), submit)
        self.settle()

    def client_of(self, name: str) -> bytes:
        return self.clients[int(name[1:]) % len(self.clients)]

    def call(self, client: bytes, make: Callable[[int], m.Message]) -> None:
        self.num_calls += 1
        self.hear(client, make(self.num_calls))
        self.settle()

    @property
    def capacity(self) -> int:
        """Tokens of the longest request that the living can serve together."""
        return BLOCK * sum(footprint.held(process.total, self.most) - 1 for process in self.living)

    def member(self, n: int) -> int:
        """Number of one of the cell's instances; 7 is none."""
        ids = [instance.rank for instance in self.cluster.stats().instances]
        return ids[n % len(ids)] if ids and n != 7 else 99

    @property
    def open(self) -> list[str]:
        return [name for name, asked in self.asked.items() if asked.end is None]

    def cancel(self, name: str) -> None:
        self.asked[name].is_cancelled = True
        self.call(self.client_of(name), lambda call: m.Abort(call=call, request_id=name))

    def move_home(self, name: str, to: int) -> None:
        self.call(self.client_of(name), lambda call: m.MoveHome(call=call, request_id=name, instance=to))

    def drain(self, number: int) -> None:
        self.call(self.clients[0], lambda call: m.Drain(call=call, instance=number))

    def leave(self, process: Process) -> None:
        """As SIGTERM."""
        self.loop.call_soon(process.instance.leave, "SIGTERM")
        self.settle()

    # --- the end

    def rest(self) -> None:
        """Nothing new comes: all ends, on instances that have room, and nothing is left of it."""
        for process in self.processes:
            process.is_held = False
        for turn in range(400):
            if turn % 20 == 0:
                self.start_missing()
            if turn == 60:
                self.start(sum(self.sizes) + sum(process.total for process in self.processes))
            for _ in range(2000):
                if not self.let(50, turn):
                    break
            else:
                raise AssertionError("it never comes to rest")
            if not self.open and self.cluster.is_idle:
                break
            self.pass_time(1.0)
        else:
            raise AssertionError(f"never idle: {self.open}, {self.cluster.stats().requests}")
        for _ in range(QUIET_S):
            self.pass_time(1.0)
            while self.let(50, 0):
                pass
        assert all(asked.end is not None for asked in self.asked.values())
        for process in self.living:
            assert not process.held, f"instance {process.number} holds {process.held}"
            assert process.pool.num_free + process.pool.num_evictable == process.total
        self.validate()
        assert all(instance.used_tokens == 0 for instance in self.cluster.stats().instances)

    def close(self) -> None:
        for process in self.processes:
            process.transport.is_dead = True
        self.loop.end()


@contextmanager
def whole_cell(
    sizes: list[int], seed: int = 0, tier_slots: Mapping[Tier, int] | None = None, sight: Sight = FULL
) -> Iterator[WholeCell]:
    """A service that has begun to form a cell; its instances get what is played here in place of devices and clocks."""
    idle_gc = SimpleNamespace(collect=lambda: 0, freeze=lambda: None, unfreeze=lambda: None)
    began: list[WholeCell] = []
    with (
        patch("instance.server.Epoch", lambda lasting, join: began[0].begin_epoch(lasting, join)),
        patch("instance.server.open_store", lambda host, timeout_s: (None, "127.0.0.1:1")),
        patch("instance.server.gc", idle_gc),
        patch("gmanager.cluster.reuse.FAR_TOKENS", BLOCK),
        patch("gmanager.cluster.reuse.LEAST_BRANCH", BLOCK),
        patch("gmanager.cluster.following.LEAST_SAVED", BLOCK),
    ):
        cell = WholeCell(sizes, seed, tier_slots, sight)
        began.append(cell)
        try:
            yield cell
        finally:
            cell.close()
