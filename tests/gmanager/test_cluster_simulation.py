"""Random clients and instances against the real cluster: whatever happens, in whatever order messages arrive.

Each instance is a small model of what `instance/` does: a pool that grants and refuses, sequences that generate, homes
that move, blocks given back some time after Released. Each connection is in order; between connections there is none.
"""

import logging
import os
import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from gmanager.cluster.cluster import Cluster
from gmanager.cluster.events import (
    Action,
    Deliver,
    Encode,
    Encoded,
    Event,
    Forget,
    LoadText,
    Log,
    PeerSaid,
    PeerWasLost,
    Send,
    StopFound,
    TextLoaded,
    Ticked,
)
from gmanager.config import GManagerConfig
from gmanager.wire import messages as m
from tests.gmanager.cluster_support import ASSETS, one_by_one, register

BLOCK = 4


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


@dataclass
class Running:
    """A sequence, as all its participants together know it."""

    admit: m.Admit
    home: int
    held: dict[int, int]
    generated: int = 0
    cancelled: bool = False
    needy: bool = False
    move_to: int | None = None
    over: bool = False


@dataclass
class Instance:
    """One fake instance: its pool, and its connection to the gManager."""

    rank: int
    peer: bytes
    total: int
    pool: dict[int, int] = field(default_factory=dict)
    """seq -> blocks."""
    changed: dict[int, int] = field(default_factory=dict)
    to_cluster: deque[m.Message] = field(default_factory=deque)
    from_cluster: deque[m.Message] = field(default_factory=deque)
    party: tuple[int, list[int]] = (0, [])
    dead: bool = False

    @property
    def free(self) -> int:
        return self.total - sum(self.pool.values())


class World:
    def __init__(self, seed: int, *, sizes: list[int], chaos: bool) -> None:
        self.random = random.Random(seed)
        self.cluster = Cluster(GManagerConfig(max_queue_wait_s=100_000.0))
        self.now = 0.0
        self.chaos = chaos
        self.sizes = sizes
        self.instances: list[Instance] = []
        self.by_peer: dict[bytes, Instance] = {}
        self.running: dict[int, Running] = {}
        self.epoch = 0
        self.starts = 0
        self.clients: dict[bytes, dict[str, list[Deliver]]] = {}
        self.gone: set[bytes] = set()
        self.late: deque[Event] = deque()
        self.stop: StopFound | None = None
        self.forgotten: set[bytes] = set()
        self.reserves = 0
        self.submitted: dict[str, m.Submit] = {}

    # --- the cluster's side

    def tell(self, event: Event) -> None:
        for action in one_by_one(self.cluster.handle(event)):
            self.do(action)
        self.cluster.validate()
        if self.stop is not None:
            stop, self.stop = self.stop, None
            self.tell(stop)

    def do(self, action: Action) -> None:
        match action:
            case Send(peer=peer, message=message):
                if peer in self.by_peer:
                    self.by_peer[peer].from_cluster.append(message)
                    self.reserves += isinstance(message, m.Reserve | m.ReserveNext)
            case Deliver():
                if action.peer in self.clients:
                    self.take(action)
            case Encode():
                ids = m.pack_tokens([1] * len(action.submit.text or ""))
                self.late.append(Encoded(action.request, self.now, token_ids=ids))
            case LoadText(cell=epoch):
                self.late.append(TextLoaded(epoch, self.now))
            case Forget(peer=peer):
                self.forgotten.add(peer)
            case Log(level=level, event=event, fields=fields):
                assert "secret" not in f"{event} {fields}"
                assert level in (logging.INFO, logging.WARNING, logging.ERROR)

    def take(self, new: Deliver) -> None:
        seen = self.clients[new.peer].setdefault(new.request_id, [])
        assert not any(old.finish_reason for old in seen), "something after the final answer"
        assert new.index == sum(len(old.token_ids) for old in seen), "a gap or an overlap"
        # A token's value says its position in the request: 1000 + index.
        assert new.token_ids == [1000 + new.index + i for i in range(len(new.token_ids))]
        seen.append(new)
        if new.token_ids and not new.finish_reason and self.random.random() < 0.02 and self.stop is None:
            self.stop = StopFound(new.request, new.index + len(new.token_ids), self.now)

    # --- instances

    def start_cell(self) -> None:
        self.starts += 1
        self.instances = [Instance(rank, b"i%d-%d" % (self.starts, rank), total) for rank, total in enumerate(self.sizes)]
        self.by_peer |= {instance.peer: instance for instance in self.instances}
        self.running = {}
        for instance in self.instances:
            message = register(rank=instance.rank, cell_size=len(self.sizes), blocks=instance.total, block_size=BLOCK)
            self.tell(PeerSaid(instance.peer, message, self.now))

    def obey(self, instance: Instance, message: m.Message) -> None:
        say = instance.to_cluster.append
        match message:
            case m.Registered(send_text=True):
                say(m.Text(assets=ASSETS))
            case m.OpenStore(epoch=epoch):
                say(m.StoreOpened(epoch=epoch, address="tcp://store"))
            case m.JoinEpoch(epoch=epoch, rank=rank):
                assert rank == instance.rank
                self.epoch = epoch
                instance.party = (0, [rank])
                say(m.Joined(epoch=epoch))
            case m.EndEpoch():
                instance.dead = True
            case m.Reserve(seq=seq, blocks=count):
                granted = count <= instance.free and self.random.random() > 0.05
                if granted:
                    instance.pool[seq] = instance.pool.get(seq, 0) + count
                    say(m.Granted(epoch=self.epoch, seq=seq, blocks=count, free_blocks=instance.free))
                else:
                    say(m.NotGranted(epoch=self.epoch, seq=seq, free_blocks=instance.free))
            case m.ReserveNext(seq=seq):
                held = self.running[seq].held.get(instance.rank, 0) if seq in self.running else 0
                count = 0 if held < instance.pool.get(seq, 0) * BLOCK else 1
                if count <= instance.free and self.random.random() > 0.05:
                    instance.pool[seq] = instance.pool.get(seq, 0) + count
                    say(m.Granted(epoch=self.epoch, seq=seq, blocks=count, free_blocks=instance.free))
                else:
                    say(m.NotGranted(epoch=self.epoch, seq=seq, free_blocks=instance.free))
            case m.Drop(seq=seq):
                running = self.running.get(seq)
                if running is None or running.over or not running.held.get(instance.rank):
                    assert running is None or running.over or instance.rank not in running.held, "a share was dropped"
                    instance.pool.pop(seq, None)
            case m.Regroup(number=number, parties=parties):
                assert number > instance.party[0]
                (party,) = [party for party in parties if instance.rank in party]
                instance.party = (number, party)
            case m.Admit():
                self.admitted(instance, message)
            case m.MoveSequence(seq=seq, to=to):
                assert to in instance.party[1]
                if seq in self.running and self.running[seq].home == instance.rank:
                    self.running[seq].move_to = to
            case m.Cancel(seq=seq):
                if seq in self.running:
                    self.running[seq].cancelled = True

    def admitted(self, instance: Instance, admit: m.Admit) -> None:
        ranks = [share.rank for share in admit.shares]
        assert set(ranks) <= set(instance.party[1]), "admitted before its party was told"
        assert instance.rank in ranks
        mine = next(share.tokens for share in admit.shares if share.rank == instance.rank)
        if admit.seq in self.running and self.running[admit.seq].over:
            return  # released before this came
        assert instance.pool[admit.seq] == blocks(mine) + 1
        if instance.rank == ranks[0]:
            assert sum(share.tokens for share in admit.shares) * 4 == len(admit.token_ids)
            held = {share.rank: share.tokens for share in admit.shares}
            self.running[admit.seq] = Running(admit, ranks[0], held)

    def step(self, seq: int) -> None:
        """One step of a sequence at its home."""
        running = self.running[seq]
        if running.over:
            return
        home = self.instances[running.home]
        say = home.to_cluster.append
        done = running.generated == running.admit.params.max_tokens
        if running.cancelled or done:
            running.over = True
            for instance in self.instances:
                if instance.rank in running.held and instance.pool.pop(seq, None) is not None:
                    instance.changed[seq] = 0
            self.beat(home)
            say(m.Released(epoch=self.epoch, seq=seq, generated=running.generated))
            return
        if running.move_to is not None:
            target, running.move_to = self.instances[running.move_to], None
            if target.rank != home.rank and seq in target.pool:
                running.home = target.rank
                running.held.setdefault(target.rank, 0)
                running.needy = False
                target.to_cluster.append(m.HomeMoved(epoch=self.epoch, seq=seq, home=target.rank))
            return
        if running.held[home.rank] == home.pool[seq] * BLOCK:
            if home.free == 0:
                if not running.needy:
                    running.needy = True
                    say(m.NeedBlock(epoch=self.epoch, seq=seq))
                return
            home.pool[seq] += 1
        running.needy = False
        running.held[home.rank] += 1
        home.changed[seq] = running.held[home.rank]
        running.generated += 1
        limit = running.admit.params.max_tokens
        before = len(running.admit.token_ids) // 4 - self.prompt_of(running)
        last = running.generated == limit
        output = m.SequenceOutput(
            seq=seq,
            index=running.generated - 1,
            token_ids=[1000 + before + running.generated - 1],
            finish_reason="length" if last else None,
            held=[m.Share(rank=r, tokens=t) for r, t in running.held.items()] if last else None,
        )
        say(m.Outputs(epoch=self.epoch, outputs=[output]))

    def prompt_of(self, running: Running) -> int:
        """Prompts are made of token 1, generated tokens are 1000 and more."""
        return sum(token < 1000 for token in m.unpack_tokens(running.admit.token_ids))

    def beat(self, instance: Instance) -> None:
        changed, instance.changed = instance.changed, {}
        beat = m.Beat(epoch=self.epoch, free_blocks=instance.free, held_tokens=changed, counters=m.Counters())
        instance.to_cluster.append(beat)

    def deliver_some(self, everything: bool = False) -> bool:
        """Let messages of one connection through, in one direction."""
        live = [i for i in self.instances if not i.dead]
        pipes = [(i, q) for i in live for q in (i.to_cluster, i.from_cluster) if q]
        if self.late and (not pipes or self.random.random() < 0.3):
            self.tell(self.late.popleft())
            return True
        if not pipes:
            return False
        instance, queue = self.random.choice(pipes)
        for _ in range(len(queue) if everything else self.random.randint(1, len(queue))):
            if instance.dead:
                break
            message = queue.popleft()
            if queue is instance.from_cluster:
                self.obey(instance, message)
            else:
                self.tell(PeerSaid(instance.peer, message, self.now))
        return True

    # --- clients

    def client_acts(self) -> None:
        peers = [peer for peer in self.clients if peer not in self.gone]
        act = self.random.random()
        if not peers or act < 0.02:
            peer = b"c%d" % len(self.clients)
            self.clients[peer] = {}
            self.tell(PeerSaid(peer, m.Hello(protocol=m.PROTOCOL), self.now))
            return
        peer = self.random.choice(peers)
        mine = list(self.clients[peer])
        if act < 0.6:
            self.submit(peer)
        elif act < 0.7 and self.submitted:
            target = self.random.choice(list(self.submitted))
            self.tell(PeerSaid(peer, m.Abort(call=1, request_id=target), self.now))
        elif act < 0.85 and mine:
            target, rank = self.random.choice(mine), self.random.randrange(len(self.sizes) + 1)
            self.tell(PeerSaid(peer, m.MoveHome(call=2, request_id=target, instance=rank), self.now))
        elif act < 0.87:
            self.gone.add(peer)
            self.tell(PeerWasLost(peer, "gone", self.now))
        else:
            self.tell(PeerSaid(peer, m.GetStats(call=3), self.now))

    def submit(self, peer: bytes) -> None:
        request_id = f"r{len(self.submitted)}"
        total = sum(self.sizes) * BLOCK
        length = self.random.choice([1, 3, BLOCK, 7, self.random.randint(1, total)])
        params = m.SamplingParams(max_tokens=self.random.choice([1, 2, 9, self.random.randint(1, total)]))
        spread = self.random.choice([None, "auto", "all", 1, 2, 9])
        if self.random.random() < 0.3:
            submit = m.Submit(request_id=request_id, params=params, text="s" * length, spread=spread)
        else:
            ids = m.pack_tokens([1] * length)
            submit = m.Submit(request_id=request_id, params=params, token_ids=ids, spread=spread)
        self.submitted[request_id] = submit
        self.clients[peer][request_id] = []
        self.tell(PeerSaid(peer, submit, self.now, seed=7))

    # --- the run

    def tick(self) -> None:
        self.now += 1.0
        for instance in self.instances:
            if not instance.dead and self.epoch and instance.party[1]:
                self.beat(instance)
            elif not instance.dead:
                instance.to_cluster.append(m.Ping())
        for peer in self.clients:
            if peer not in self.gone:
                self.tell(PeerSaid(peer, m.Ping(), self.now))
        self.tell(Ticked(self.now))

    def kill_one(self) -> None:
        victim = self.random.choice(self.instances)
        if not victim.dead:
            victim.dead = True
            self.tell(PeerWasLost(victim.peer, "killed", self.now))

    def run(self, turns: int) -> None:
        for _ in range(turns):
            if not self.instances or all(instance.dead for instance in self.instances):
                self.start_cell()
            act = self.random.random()
            if act < 0.12:
                self.client_acts()
            elif act < 0.2:
                self.tick()
            elif act < 0.55 and self.running:
                self.step(self.random.choice(list(self.running)))
            elif self.chaos and act > 0.998:
                self.kill_one()
            else:
                self.deliver_some()

    def drain(self) -> None:
        """No new requests: let everything come to its end."""
        for _ in range(2_000):
            if all(instance.dead for instance in self.instances):
                self.start_cell()
            while self.deliver_some(everything=True):
                pass
            if self.cluster.is_idle and not self.late:
                return
            for seq in list(self.running):
                self.step(seq)
            self.tick()
        live = {name: r.state for name, r in self.cluster.stats().requests.items() if r.finish_reason is None}
        raise AssertionError(f"never idle: {live}")


@pytest.mark.parametrize("chaos", [False, True], ids=["steady", "deaths"])
@pytest.mark.parametrize("sizes", [[6], [5, 9], [4, 4, 4], [12, 3, 1, 7]], ids=str)
@pytest.mark.parametrize("seed", range(int(os.environ.get("SIMS", "6"))))
def test_everything_ends_once_and_nothing_is_kept(seed: int, sizes: list[int], chaos: bool) -> None:
    world = World(seed, sizes=sizes, chaos=chaos)
    world.run(2500)
    world.drain()
    world.tick()
    while world.deliver_some(everything=True):
        pass
    for instance in world.instances:
        assert instance.dead or not instance.pool, f"instance {instance.rank} holds {instance.pool}"
    for peer, requests in world.clients.items():
        for request_id, seen in requests.items():
            if peer not in world.gone:
                assert [bool(new.finish_reason) for new in seen].count(True) == 1, (request_id, seen)
                check_answer(world.submitted[request_id], seen)
    stats = world.cluster.stats()
    assert all(instance.used_tokens == 0 for instance in stats.instances)
    assert world.reserves < 200 * max(1, len(world.submitted))


def check_answer(submit: m.Submit, seen: list[Deliver]) -> None:
    tokens = sum(len(new.token_ids) for new in seen)
    if seen[-1].finish_reason == "length":
        assert tokens == submit.params.max_tokens
    assert bool(seen[-1].error) == (seen[-1].finish_reason == "error")


def test_the_simulation_reaches_what_it_is_for() -> None:
    preemptions = moves = 0
    for seed in range(6):
        world = World(seed, sizes=[5, 9], chaos=False)
        world.run(2500)
        world.drain()
        preemptions += world.cluster.stats().counters.preemptions
        moves += sum(request.home_moves for request in world.cluster.stats().requests.values())
    assert preemptions > 5
    assert moves > 20
