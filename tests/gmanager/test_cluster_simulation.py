"""Random clients and instances against the real cluster: whatever happens, in whatever order messages arrive.

Each instance is a small model of what `instance/` does around the real account of its blocks (`RManager`): it grants and
refuses, prefills gap after gap, generates, moves homes, gives blocks back some time after Released, and keeps KV over the end
of an epoch. Each connection is in order; between connections there is none. In chaos instances are lost in every way there
is, and others come, at any time; clients are lost and attach over another connection, or don't read for a while; and the
gManager is killed, and another one goes on with what clients may have seen.
"""

import logging
import os
import random
import tempfile
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import msgspec
import pytest

from gmanager.cluster.cluster import Cluster
from gmanager.cluster.events import (
    Action,
    ClientEmpty,
    ClientFull,
    Deliver,
    Encode,
    Encoded,
    Event,
    Forget,
    LoadText,
    Log,
    PeerSaid,
    PeerWasLost,
    Restored,
    Send,
    StopFound,
    TextLoaded,
    Ticked,
    Write,
)
from gmanager.cluster.policies import POLICIES
from gmanager.config import GManagerConfig
from gmanager.journal_file import Batch, JournalFile
from gmanager.wire import messages as m
from instance.rmanager import RManager
from instance.unheard import Unheard
from tests.gmanager.cluster_support import ASSETS, one_by_one, register

BLOCK = 4
NEVER = 1e6

Key = tuple[int, int]
"""Epoch and sequence."""


@dataclass
class Running:
    """A sequence, as all its participants together know it."""

    admit: m.Admit
    prompt: int
    """Tokens of its prompt as it was admitted."""
    home: int
    participants: set[int]
    missing: list[int]
    """Positions of the prompt whose rows are yet to run, ascending."""
    shares: dict[int, int]
    """rank -> how many of them it still takes."""
    generated: int = 0
    cancelled: bool = False
    needy: bool = False
    move_to: int | None = None
    flip: m.FlipRun | None = None
    over: bool = False


@dataclass
class Instance:
    """One fake instance: its blocks, and its connection to the gManager."""

    number: int
    total: int
    rank: int = -1
    epoch: int = 0
    """0: none."""
    former: m.Former | None = None
    is_alone: bool = False
    """The gManager of its epoch is gone."""
    unheard: Unheard = field(default_factory=Unheard)
    requests: dict[int, int] = field(default_factory=dict)
    """seq -> request, of those whose home it was."""
    life: Literal["lives", "is silent", "is gone"] = "lives"
    admitted: set[int] = field(default_factory=set)
    party: tuple[int, list[int]] = (0, [])
    in_flight: list[tuple[int, int]] = field(default_factory=list)
    """(seq, position) that its last step wrote."""
    detached: list[int] = field(default_factory=list)
    """Moves of runs that steps which may still run here read."""
    to_cluster: deque[m.Message] = field(default_factory=deque)
    from_cluster: deque[m.Message] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.blocks = RManager(self.total, BLOCK)

    @property
    def peer(self) -> bytes:
        return b"i%d" % self.number

    @property
    def lives(self) -> bool:
        return self.life == "lives"

    def beat(self) -> None:
        """Only an epoch's instance beats; others ping."""
        if not self.epoch or self.is_alone:
            self.to_cluster.append(m.Ping())
            return
        held = self.blocks.take_changes()
        free = self.blocks.free_blocks
        self.to_cluster.append(m.Beat(epoch=self.epoch, free_blocks=free, held_tokens=held, counters=m.Counters()))

    def tell_of_freed(self) -> None:
        if self.blocks.freed:
            self.beat()

    def let_go(self) -> None:
        """All its steps have run."""
        for move in self.detached:
            self.blocks.let_go(move)
        self.detached.clear()
        self.tell_of_freed()


class World:
    def __init__(self, seed: int, *, sizes: list[int], chaos: bool, drains: bool = False) -> None:
        self.random = random.Random(seed)
        # a steady cell is not to lose whose messages are slow
        lease = GManagerConfig().instance_lease_s if chaos else NEVER
        self.config = GManagerConfig(
            policy=self.random.choice(sorted(POLICIES)),
            max_queue_wait_s=NEVER,
            max_stall_s=NEVER,
            instance_lease_s=lease,
            max_pause_s=NEVER,
            resume_s=5.0,
        )
        self.term = 1
        self.batch = Batch()
        """What goes into the journal next."""
        self.journal = b""
        """Its file."""
        self.cluster = Cluster(self.config, term=self.term)
        self.now = 0.0
        self.chaos = chaos
        self.drains = chaos or drains
        self.sizes = sizes
        self.refusing = self.random.choice([0.05, 0.3])
        """How often an instance has no room, though it seemed so."""
        self.instances: list[Instance] = []
        """All there ever were."""
        self.by_peer: dict[bytes, Instance] = {}
        self.epochs: dict[int, list[Instance]] = {}
        """By rank."""
        self.running: dict[Key, Running] = {}
        self.clients: dict[bytes, dict[str, list[Deliver]]] = {}
        self.gone: set[bytes] = set()
        self.late: deque[Event] = deque()
        self.stop: StopFound | None = None
        self.forgotten: set[bytes] = set()
        self.reserves = 0
        self.submitted: dict[str, m.Submit] = {}
        self.ended: dict[str, str] = {}
        """How requests ended, whoever heard it."""
        self.paused: set[bytes] = set()
        self.seen: Counter[str] = Counter()
        """What has happened, to know that it did."""
        self.cell_is_over = False
        """In the present event."""

    # --- the cluster's side

    def tell(self, event: Event) -> None:
        self.cell_is_over = False
        could_go_on = any(cell.is_formed and cell.size + len(cell.joiners) > 1 for cell in self.cluster._cells)
        for action in one_by_one(self.cluster.handle(event)):
            self.do(action)
        self.cluster.validate()
        if not isinstance(event, Ticked):  # with which the leases of several may end
            assert not (self.cell_is_over and could_go_on), f"{event} ended a cell that had others"
        if self.stop is not None:
            stop, self.stop = self.stop, None
            self.tell(stop)

    def do(self, action: Action) -> None:
        match action:
            case Write(entry=entry):
                self.batch.add(entry)
            case Send(peer=peer, message=m.Output() as output) if peer in self.clients:
                assert output.finish_reason == "error"
                assert output.refusal is not None, "nobody takes a request from another here"
                seen = self.clients[peer].setdefault(output.request_id, [])
                # the cell was over, and for a while there was none that could make text of the rest
                assert not seen or (output.refusal == "unknown" and self.chaos), f"refused after it has begun: {output}"
                self.seen["lost text"] += bool(seen)
                self.ended[output.request_id] = output.finish_reason
                seen.append(refused_as(peer, output))
            case Send(peer=peer, message=message):
                if peer in self.by_peer:
                    self.by_peer[peer].from_cluster.append(message)
                    self.reserves += isinstance(message, m.Reserve | m.ReserveNext)
            case Deliver():
                if action.finish_reason == "error":
                    was_told = self.ended.get(action.request_id) == "error"
                    assert action.refusal is not None or self.cell_is_over or was_told, action
                if action.peer is not None and action.peer in self.clients:
                    self.take(action)
                if action.finish_reason is not None:
                    self.ended[action.request_id] = action.finish_reason
                    self.seen[action.refusal or "not refused"] += 1
            case Encode():
                ids = m.pack_tokens([1] * len(action.submit.text or ""))
                self.late.append(Encoded(action.request, self.now, token_ids=ids))
            case LoadText(cell=number):
                self.late.append(TextLoaded(number, self.now))
            case Forget(peer=peer):
                self.forgotten.add(peer)
            case Log(level=level, event=event, fields=fields):
                assert "secret" not in f"{event} {fields}"
                assert level in (logging.INFO, logging.WARNING, logging.ERROR)
                self.seen[event] += 1
                self.cell_is_over |= event == "cell over"

    def take(self, new: Deliver) -> None:
        seen = self.clients[new.peer].setdefault(new.request_id, [])
        assert not any(old.finish_reason for old in seen), "something after the final answer"
        if self.stop is not None and self.stop.request == new.request:  # the shell has found the stop, and says so after these
            if new.finish_reason is None:
                return
            new = replace(new, index=self.stop.generated, token_ids=[])
        assert new.before is None or len(new.before) == new.index
        if new.before is not None and not new.token_ids and new.finish_reason is None:
            return  # only a text begins anew
        assert new.index == sum(len(old.token_ids) for old in seen), "a gap or an overlap"
        # A token's value says its position in the request: 1000 + index.
        assert new.token_ids == [1000 + new.index + i for i in range(len(new.token_ids))]
        seen.append(new)
        if (
            new.token_ids
            and not new.finish_reason
            and self.random.random() < 0.02
            and self.stop is None
            and not (self.drains and not self.chaos)
        ):
            self.stop = StopFound(new.request, new.index + len(new.token_ids), self.now)

    # --- instances

    @property
    def living(self) -> list[Instance]:
        return [instance for instance in self.instances if instance.lives]

    @property
    def cell_state(self) -> str | None:
        return next((cell.state for cell in self.cluster.stats().cells), None)

    def start(self, total: int) -> None:
        instance = Instance(len(self.instances), total)
        self.instances.append(instance)
        self.by_peer[instance.peer] = instance
        message = register(rank=instance.number, cell_size=len(self.sizes), blocks=total, block_size=BLOCK)
        message = msgspec.structs.replace(message, role=self.random.choice(get_args(m.Role)))
        self.tell(PeerSaid(instance.peer, message, self.now))

    def start_missing(self) -> None:
        """Whatever a new cell lacks."""
        if self.cell_state in (None, "forming"):
            for total in self.sizes[len(self.living) :]:
                self.start(total)

    def obey(self, instance: Instance, message: m.Message) -> None:
        say, account = instance.to_cluster.append, instance.blocks
        match message:
            case m.Registered(send_text=True):
                say(m.Text(assets=ASSETS))
            case m.OpenStore(epoch=epoch):
                say(m.StoreOpened(epoch=epoch, address="tcp://store"))
            case m.Pong(outputs=outputs):
                instance.unheard.hear(outputs)
            case m.JoinEpoch(epoch=epoch, rank=rank, members=members):
                ports = {register(rank=each.number, cell_size=1).party_address: each for each in self.instances}
                self.epochs[epoch] = [ports[member.party_address] for member in members]
                assert self.epochs[epoch][rank] is instance
                assert set(message.keep) <= set(account.shards), "it is to keep what it hasn't"
                account.keep(message.keep)
                instance.is_alone = False
                instance.former = m.Former(term=1, identity=0, epoch=epoch, id=message.id, size=len(members))
                instance.unheard.forget_left()
                instance.rank, instance.epoch, instance.party = rank, epoch, (0, [rank])
                broken = self.chaos and self.random.random() < 0.03
                say(m.EpochBroken(epoch=epoch, reason="no group") if broken else m.Joined(epoch=epoch))
            case m.Suspend(epoch=epoch):
                self.suspended(instance, epoch)
            case m.Discard(seq=seq):
                self.seen["discarded"] += seq in account.shards
                account.discard(seq)
                instance.tell_of_freed()
            case m.EndEpoch() | m.Refused() | m.Expelled():
                instance.life = "is gone"
            case m.Drained():
                self.seen["drained"] += 1
                self.seen["drained empty"] += not len(account.shards)
                instance.life = "is gone"
            case m.NotDrained():
                say(m.Leave(reason="SIGTERM", failed=False))
                instance.life = "is silent"
            case m.Registered():
                pass
            case _:
                assert getattr(message, "epoch", None) == instance.epoch, f"{message} reached epoch {instance.epoch}"
                self.command(instance, message)
        account.validate()

    def command(self, instance: Instance, message: m.Message) -> None:
        account = instance.blocks
        match message:
            case m.Reserve(seq=seq, blocks=count):
                has_room = self.random.random() > self.refusing and account.reserve(seq, count)
                self.answer(instance, seq, count if has_room else None)
            case m.ReserveNext(seq=seq):
                self.answer(instance, seq, account.reserve_next(seq) if self.random.random() > self.refusing else None)
            case m.Drop(seq=seq):
                running = self.running.get((instance.epoch, seq))
                if running is not None and not running.over and not self.held(instance, seq):
                    assert instance.rank not in running.shares or not running.missing, "a share was dropped"
                account.drop(seq)
                instance.tell_of_freed()
            case m.Regroup(number=number, parties=parties):
                assert number > instance.party[0]
                (party,) = [party for party in parties if instance.rank in party]
                instance.party = (number, party)
            case m.Admit():
                self.admitted(instance, message)
            case m.MoveSequence(seq=seq, to=to):
                assert to in instance.party[1]
                running = self.running.get((instance.epoch, seq))
                if running is not None and running.home == instance.rank:
                    running.move_to = to
            case m.OfferRun(epoch=epoch, move=move, seq=seq):
                held = account.ranges(seq)
                ranges = self.random.choice(held) if held else []
                instance.to_cluster.append(m.RunOffered(epoch=epoch, move=move, ranges=ranges))
            case m.CopyRun(epoch=epoch, move=move, target=target, ranges=ranges):
                if target == instance.rank:
                    error = "a bit has changed" if self.random.random() < self.refusing else None
                    if error is None:
                        account.note_copy(move, ranges)
                    instance.to_cluster.append(m.Copied(epoch=epoch, move=move, error=error))
            case m.FlipRun(seq=seq, target=target):
                assert target in instance.party[1], "a run goes to who is not in the party"
                running = self.running.get((instance.epoch, seq))
                if running is not None:
                    assert running.home == instance.rank
                    running.flip = message
            case m.Cancel(seq=seq):
                if (running := self.running.get((instance.epoch, seq))) is not None:
                    running.cancelled = True
            case _:
                raise AssertionError(message)

    def answer(self, instance: Instance, seq: int, added: int | None) -> None:
        """`added`: None if there is no room."""
        free, epoch = instance.blocks.free_blocks, instance.epoch
        if added is None:
            instance.to_cluster.append(m.NotGranted(epoch=epoch, seq=seq, free_blocks=free))
        else:
            instance.to_cluster.append(m.Granted(epoch=epoch, seq=seq, blocks=added, free_blocks=free))

    @staticmethod
    def held(instance: Instance, seq: int) -> int:
        shard = instance.blocks.shard(seq)
        return 0 if shard is None else shard.num_tokens

    def admitted(self, instance: Instance, admit: m.Admit) -> None:
        """What `Scheduler.admit` checks."""
        told = {part.rank: part.runs for part in admit.kept}
        shares = {share.rank: share.tokens for share in admit.shares}
        assert {*shares, *told} <= set(instance.party[1]), "admitted before its party was told"
        assert instance.rank in {*shares, *told}
        assert all(any(runs) for runs in told.values()), "a participant that keeps nothing"
        account, tokens = instance.blocks, len(admit.token_ids) // 4
        if account.shard(admit.seq) is None:
            return  # released before this came
        starts = [run[0][0] for run in told.get(instance.rank, [])]
        self.seen["left out"] += len(starts) < len(account.ranges(admit.seq))
        account.wake(admit.seq, tokens - 1, starts)
        assert told.get(instance.rank, []) == [list(run) for run in account.ranges(admit.seq)]
        instance.admitted.add(admit.seq)
        kept = [p for runs in told.values() for run in runs for start, end in run for p in range(start, end)]
        missing = sorted(set(range(tokens)) - set(kept))
        assert len(kept) + len(missing) == tokens, "kept twice, or beyond the prompt"
        assert missing[-1] == tokens - 1
        assert sum(shares.values()) == len(missing)
        self.seen["kept tokens"] += len(kept)
        self.seen["admitted again with gaps"] += bool(kept) and missing[0] < max(kept)
        if instance.rank == admit.shares[0].rank:
            key = admit.epoch, admit.seq
            self.running[key] = Running(admit, tokens, instance.rank, {*shares, *told}, missing, shares)

    def suspended(self, instance: Instance, epoch: int) -> None:
        """It steps no more. Its last step may or may not have run."""
        assert epoch >= instance.epoch  # a later one: others went on without it, then their gManager was lost
        lost = instance.in_flight if self.random.random() < 0.5 else []
        kept = instance.blocks.settle(lost)
        for (of, seq), running in self.running.items():
            if of == instance.epoch and running.home == instance.rank:
                instance.requests[seq] = running.admit.arrival
        instance.epoch, instance.in_flight = 0, []
        instance.detached.clear()
        instance.admitted.clear()
        instance.requests = {seq: instance.requests.get(seq, 0) for seq in kept}
        shards = [m.KeptShard(seq=seq, runs=runs, request=instance.requests[seq]) for seq, runs in kept.items()]
        unheard = instance.unheard.report() if instance.is_alone else []
        free = instance.blocks.free_blocks
        instance.to_cluster.append(m.Kept(epoch=epoch, free_blocks=free, shards=shards, unheard=unheard))

    def step(self, key: Key) -> None:
        """One step of a sequence: all that take part in it are there."""
        running, (epoch, seq) = self.running[key], key
        if self.random.random() < 0.5:
            for instance in self.living:
                instance.let_go()
        members = self.epochs[epoch]
        taking_part = [members[rank] for rank in running.participants]
        if running.over or not all(instance.lives and instance.epoch == epoch for instance in taking_part):
            return
        home = members[running.home]
        if running.cancelled or running.generated == running.admit.params.max_tokens:
            self.release(running, home, taking_part)
        elif running.flip is not None:
            self.change_hands(running, members)
        elif not all(seq in instance.admitted for instance in taking_part if instance.rank != running.move_to):
            return
        elif running.missing:
            self.prefill(running, members)
        elif running.move_to is not None:
            target, running.move_to = members[running.move_to], None
            if target is not home and target.lives and target.epoch == epoch and target.blocks.shard(seq) is not None:
                running.home, running.needy = target.rank, False
                running.participants.add(target.rank)
                target.admitted.add(seq)
                self.say(target, m.HomeMoved(epoch=epoch, seq=seq, home=target.rank))
        else:
            self.decode(running, home)

    def change_hands(self, running: Running, members: list[Instance]) -> None:
        """A run that was copied is another's from this step on."""
        flip, running.flip = running.flip, None
        assert flip is not None
        source, target, home = members[flip.source], members[flip.target], members[running.home]
        if not (source.lives and target.lives and source.epoch == target.epoch == flip.epoch):
            running.flip = flip  # the party never meets
            return
        found = source.blocks.shards.find_run(flip.seq, flip.start)
        assert found is not None
        ranges = list(found.ranges)
        source.blocks.detach(flip.move, flip.seq, flip.start)
        source.detached.append(flip.move)
        assert target.blocks.adopt(flip.move, flip.seq)
        assert ranges in target.blocks.ranges(flip.seq), "it has grown since it was copied"
        running.participants.add(target.rank)
        target.admitted.add(flip.seq)
        if not self.held(source, flip.seq):
            running.participants.discard(source.rank)
        home.to_cluster.append(m.RunMoved(epoch=flip.epoch, seq=flip.seq, move=flip.move))
        self.seen["runs moved"] += 1

    def release(self, running: Running, home: Instance, holders: list[Instance]) -> None:
        running.over = True
        seq, epoch = running.admit.seq, running.admit.epoch
        for instance in holders:
            instance.blocks.free(seq)
            instance.in_flight = [place for place in instance.in_flight if place[0] != seq]
        home.tell_of_freed()
        self.say(home, m.Released(epoch=epoch, seq=seq, generated=running.generated))

    def prefill(self, running: Running, members: list[Instance]) -> None:
        """Some rows, on somebody who still has a share. The last is the home's."""
        lefts = running.shares | {running.home: running.shares[running.home] - (len(running.missing) > 1)}
        rank = self.random.choice([rank for rank, left in lefts.items() if left])
        count = self.random.randint(1, min(lefts[rank], 9))
        positions, running.missing = running.missing[:count], running.missing[count:]
        running.shares[rank] -= count
        members[rank].in_flight = [(running.admit.seq, positions[0])]
        for position in positions:
            members[rank].blocks.append(running.admit.seq, position, position + 1)
        if not running.missing:
            self.put_out(running, members[running.home])

    def decode(self, running: Running, home: Instance) -> None:
        seq, position = running.admit.seq, running.prompt + running.generated - 1
        if not home.blocks.grant(seq, position):
            if not running.needy:
                running.needy = True
                self.say(home, m.NeedBlock(epoch=running.admit.epoch, seq=seq))
            return
        running.needy = False
        home.blocks.append(seq, position, position + 1)
        home.in_flight = [(seq, position)]
        self.put_out(running, home)

    def put_out(self, running: Running, home: Instance) -> None:
        """The row of its last token has run."""
        admit = running.admit
        ids = m.unpack_tokens(admit.token_ids)
        before = sum(token >= 1000 for token in ids)  # prompts are made of token 1
        last = running.generated + 1 == admit.params.max_tokens
        members = self.epochs[admit.epoch]
        held = [m.Share(rank=rank, tokens=self.held(members[rank], admit.seq)) for rank in sorted(running.participants)]
        output = m.SequenceOutput(
            seq=admit.seq,
            index=running.generated,
            token_ids=[1000 + before + running.generated],
            finish_reason="length" if last else None,
            held=held if last else None,
        )
        running.generated += 1
        outputs = m.Outputs(epoch=admit.epoch, outputs=[output])
        origins = {admit.seq: (admit.arrival, admit.params.num_generated)}
        home.unheard.add(outputs, origins, is_sent=not home.is_alone)
        self.say(home, outputs)

    @staticmethod
    def say(instance: Instance, message: m.Message) -> None:
        """To the gManager of its epoch, if there is still that."""
        if not instance.is_alone:
            instance.to_cluster.append(message)

    def deliver_some(self, everything: bool = False) -> bool:
        """Let messages of one connection through, in one direction."""
        pipes = [(i, i.to_cluster) for i in self.instances if i.life != "is gone" and i.to_cluster]
        pipes += [(i, i.from_cluster) for i in self.living if i.from_cluster]
        if self.late and (not pipes or self.random.random() < 0.3):
            self.tell(self.late.popleft())
            return True
        if not pipes:
            return False
        instance, queue = self.random.choice(pipes)
        for _ in range(len(queue) if everything else self.random.randint(1, len(queue))):
            if queue is instance.to_cluster:
                self.tell(PeerSaid(instance.peer, queue.popleft(), self.now))
            elif instance.lives:
                self.obey(instance, queue.popleft())
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
            target, number = self.random.choice(mine), self.random.randrange(len(self.sizes) + 1)
            self.tell(PeerSaid(peer, m.MoveHome(call=2, request_id=target, instance=number), self.now))
        elif act < 0.87:
            self.gone.add(peer)
            self.paused.discard(peer)
            self.tell(PeerWasLost(peer, "gone", self.now))
        elif act < 0.9:
            self.come_back(peer)
        elif act < 0.95:
            was_paused = peer in self.paused
            self.paused ^= {peer}
            self.tell(ClientEmpty(peer, self.now) if was_paused else ClientFull(peer, self.now))
        else:
            self.tell(PeerSaid(peer, m.GetStats(call=3), self.now))

    def submit(self, peer: bytes) -> None:
        request_id, priority = f"r{len(self.submitted)}", len(self.submitted) % 3 - 1
        total = sum(self.sizes) * BLOCK
        length = self.random.choice([1, 3, BLOCK, 7, self.random.randint(1, total)])
        params = m.SamplingParams(max_tokens=self.random.choice([None, 1, 2, 9, self.random.randint(1, total)]))
        spread = self.random.choice([None, "auto", "all", 1, 2, 9])
        if self.drains and not self.chaos:  # what runs long, on many
            length, spread = self.random.randint(10, 30), "all"
            params = m.SamplingParams(max_tokens=self.random.randint(40, 90))
        if self.random.random() < 0.3:
            submit = m.Submit(request_id=request_id, params=params, text="s" * length, spread=spread, priority=priority)
        else:
            ids = m.pack_tokens([1] * length)
            submit = m.Submit(request_id=request_id, params=params, token_ids=ids, spread=spread, priority=priority)
        if len(self.submitted) % 4 == 3:
            submit = msgspec.structs.replace(submit, slo_ttft_s=2.0, slo_tpot_s=1.0)
        self.submitted[request_id] = submit
        self.clients[peer][request_id] = []
        self.tell(PeerSaid(peer, submit, self.now, seed=7))

    def come_back(self, peer: bytes) -> None:
        """A client is lost, and dials again: it attaches to all that it has no end of."""
        new = b"c%d" % len(self.clients)
        mine = {name: seen for name, seen in self.clients[peer].items() if not (seen and seen[-1].finish_reason)}
        for name in mine:
            del self.clients[peer][name]
        self.tell(PeerWasLost(peer, "gone", self.now))
        self.gone.add(peer)
        self.paused.discard(peer)
        self.greet(new, mine)
        self.seen["comes back"] += bool(mine)

    def greet(self, peer: bytes, mine: dict[str, list[Deliver]]) -> None:
        """A connection that attaches to these."""
        self.clients[peer] = mine
        self.tell(PeerSaid(peer, m.Hello(protocol=m.PROTOCOL), self.now))
        for name, seen in mine.items():
            index = sum(len(new.token_ids) for new in seen)
            again: m.Submit | m.Attach = self.submitted[name] if not index else m.Attach(request_id=name, from_index=index)
            self.tell(PeerSaid(peer, again, self.now, seed=7))

    # --- losses

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

    def lose_gmanager(self) -> None:
        """Another one comes at once. Its journal has what clients may have seen; what was under way is lost."""
        self.seen["gManager lost"] += 1
        live = {request.number: request.tokens for request in self.cluster._requests.live()}
        self.term, restored = self.reopened()
        assert {each.number: array("I", each.token_ids) for each in restored if each.finish_reason is None} == live
        self.cluster = Cluster(self.config, term=self.term)
        self.cluster.restore(restored, self.now)
        self.late.clear()
        self.stop = None
        self.forgotten.clear()
        self.paused.clear()
        for peer in [peer for peer in self.clients if peer not in self.gone]:
            ended = {name: seen for name, seen in self.clients[peer].items() if seen and seen[-1].finish_reason}
            self.greet(peer, {name: seen for name, seen in self.clients[peer].items() if name not in ended})
            self.clients[peer] |= ended
        for instance in self.instances:
            if instance.life == "is silent":
                instance.life = "is gone"  # its connection is over
            if instance.lives:
                instance.to_cluster.clear()
                instance.from_cluster.clear()
                instance.is_alone = True
                instance.unheard.cut()
        for instance in self.random.sample(self.living, len(self.living)):
            fresh = register(rank=instance.number, cell_size=len(self.sizes), blocks=instance.total, block_size=BLOCK)
            self.tell(PeerSaid(instance.peer, msgspec.structs.replace(fresh, former=instance.former), self.now))
            for _ in range(self.random.randint(0, 3)):
                self.deliver_some()

    def lose_one(self) -> None:
        """In one of the ways there are; others may notice before the gManager does."""
        if not self.living:
            return
        victim = self.random.choice(self.living)
        how = self.random.choice(["lost", "leaves", "silent", "unreachable", "broken", "asks", "asks"])
        others = [i for i in self.living if i is not victim and i.epoch and i.epoch == victim.epoch]
        if how == "lost":
            victim.life = "is gone"
            self.tell(PeerWasLost(victim.peer, "killed", self.now))
        elif how == "leaves":
            victim.to_cluster.append(m.Leave(reason="SIGTERM", failed=self.random.random() < 0.5))
            victim.life = "is silent"
        elif how == "silent":
            victim.life = "is silent"
        elif how == "broken" and victim.epoch:
            victim.to_cluster.append(m.EpochBroken(epoch=victim.epoch, reason="a step timed out"))
        elif how == "asks":
            victim.to_cluster.append(m.AskDrain())
        if how not in ("broken", "asks"):
            for other in others:
                if self.random.random() < 0.5:
                    other.to_cluster.append(m.LinkLost(epoch=other.epoch, rank=victim.rank, reason="it is closed"))
        self.seen[how] += 1

    # --- the run

    def tick(self) -> None:
        self.now += 1.0
        for instance in self.living:
            instance.let_go()
            instance.beat()
        for peer in self.clients:
            if peer not in self.gone:
                self.tell(PeerSaid(peer, m.Ping(), self.now))
        self.tell(Ticked(self.now))

    def run(self, turns: int) -> None:
        for _ in range(turns):
            if not self.living:
                self.start_missing()
            act = self.random.random()
            if act < (0.05 if self.chaos else 0.02 if self.drains else 0.12):  # what waits has nothing to lose
                self.client_acts()
            elif act < (0.09 if self.chaos else 0.04 if self.drains else 0.2):
                self.tick()
            elif act < (0.5 if self.drains and not self.chaos else 0.55) and self.running:  # moves take many messages
                self.step(self.random.choice(list(self.running)))
            elif self.chaos and act > 0.9985:
                self.lose_gmanager()
            elif self.chaos and act > 0.995:
                if self.random.random() < (1 if self.cell_state == "ready" and len(self.living) > 1 else 0.3):
                    self.lose_one()
            elif self.drains and act > 0.994 and self.running and (clients := sorted(set(self.clients) - self.gone)):
                drain = m.Drain(call=4, instance=self.random.randrange(len(self.sizes) + 1))
                self.tell(PeerSaid(self.random.choice(clients), drain, self.now))
            elif self.drains and act > 0.987:
                if len(self.living) < len(self.sizes) * (2 if self.chaos else 1):
                    self.start(self.random.choice(self.sizes))
            else:
                self.deliver_some()
            for key in [key for key, running in self.running.items() if running.over]:
                del self.running[key]

    def drain(self) -> None:
        """No new requests: let everything come to its end, on instances that hold what there ever was room for."""
        for peer in list(self.paused):
            self.paused.discard(peer)
            self.tell(ClientEmpty(peer, self.now))
        large = 2 * sum(self.sizes) + 1
        for turn in range(2_000):
            self.start_missing()
            if turn >= 100 and self.drains and not any(instance.total == large for instance in self.living):
                self.start(large)  # again, if it could not be with the others
            while self.deliver_some(everything=True):
                pass
            if self.cluster.is_idle and not self.late and self.cell_state != "changing":  # it has a member that fell silent
                return
            for key in list(self.running):
                self.step(key)
            self.tick()
        live = {name: r.state for name, r in self.cluster.stats().requests.items() if r.finish_reason is None}
        raise AssertionError(f"never idle: {live}")


@pytest.mark.parametrize("chaos", [False, True], ids=["steady", "chaos"])
@pytest.mark.parametrize("sizes", [[6], [5, 9], [4, 4, 4], [12, 3, 1, 7], [20, 20, 20]], ids=str)
@pytest.mark.parametrize("seed", range(int(os.environ.get("SIMS", "6"))))
def test_everything_ends_once_and_nothing_is_kept(seed: int, sizes: list[int], chaos: bool) -> None:
    world = World(seed, sizes=sizes, chaos=chaos)
    world.run(2500)
    world.drain()
    world.tick()
    while world.deliver_some(everything=True):
        pass
    for instance in world.living:
        assert not len(instance.blocks.shards), f"instance {instance.number} holds {list(instance.blocks.shards)}"
    for peer, requests in world.clients.items():
        for request_id, seen in requests.items():
            if peer not in world.gone:
                assert [bool(new.finish_reason) for new in seen].count(True) == 1, (request_id, seen)
                check_answer(world.submitted[request_id], seen)
    stats = world.cluster.stats()
    assert all(instance.used_tokens == 0 for instance in stats.instances)
    assert world.reserves < 200 * max(1, len(world.submitted))


def refused_as(peer: bytes, output: m.Output) -> Deliver:
    return Deliver(
        peer=peer,
        request=0,
        request_id=output.request_id,
        cell=0,
        stop_strings=(),
        index=0,
        token_ids=[],
        finish_reason=output.finish_reason,
        error=output.error,
        refusal=output.refusal,
    )


def check_answer(submit: m.Submit, seen: list[Deliver]) -> None:
    tokens = sum(len(new.token_ids) for new in seen)
    if seen[-1].finish_reason == "length" and submit.params.max_tokens is not None:
        assert tokens == submit.params.max_tokens
    assert bool(seen[-1].error) == (seen[-1].finish_reason == "error")


def test_the_simulation_reaches_what_it_is_for() -> None:
    preemptions = moves = refused = 0
    for seed in range(6):
        world = World(seed, sizes=[5, 9], chaos=False)
        world.run(2500)
        world.drain()
        preemptions += world.cluster.stats().counters.preemptions
        moves += sum(request.home_moves for request in world.cluster.stats().requests.values())
        refused += world.seen["overloaded"] + world.seen["unreachable"]
    assert preemptions > 5
    assert moves > 20
    assert refused > 5


def test_chaos_reaches_what_it_is_for() -> None:
    seen: Counter[str] = Counter()
    for seed in range(6):
        world = World(seed, sizes=[20, 20, 20], chaos=True)
        world.run(2500)
        world.drain()
        seen += world.seen
    assert seen["kept tokens"] > 100, seen
    assert seen["admitted again with gaps"] > 3, seen
    assert seen["discarded"] > 0, seen
    assert seen["cell changes"] > 20, seen
    assert seen["gManager lost"] > 3, seen
    assert seen["instance is back"] > 5, seen
    assert seen["comes back"] > 3, seen
    assert seen["lost text"] < 5, seen
    assert all(seen[how] for how in ("lost", "leaves", "silent", "unreachable", "broken", "asks")), seen
    assert seen["drained"] > 2, seen


def test_drains_reach_what_they_are_for() -> None:
    """Instances come and are drained, and none is lost."""
    seen: Counter[str] = Counter()
    for seed in range(4):
        world = World(seed, sizes=[20, 20, 20], chaos=False, drains=True)
        world.run(2500)
        world.drain()
        seen += world.seen
    assert seen["drained"] > 5, seen
    assert seen["drained empty"] > 3, seen
    assert seen["runs moved"] > 2, seen
