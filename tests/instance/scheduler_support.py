"""Schedulers of several instances with a made-up device, two steps deep.

The device "computes" token f(seq, position). It checks that every row is fed the token of its position, and that it reads all
that comes before it once, wherever that lies.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile

from gmanager.wire import footprint
from gmanager.wire.messages import (
    Admit,
    FlipRun,
    HomeMoved,
    KeptPart,
    NeedBlock,
    Outputs,
    Released,
    RunMoved,
    SequenceParams,
    Share,
    TokenLogprob,
    pack_tokens,
)
from instance.needs import most_blocks
from instance.plan import MAX_SAMPLES, Pace, StepPlan
from instance.rmanager import RManager
from instance.scheduler import Scheduler
from instance.step import LANES, Lane, Step, derive
from kvstore.run import Run
from kvstore.sight import FULL, Sight
from tests.distattn.layout_support import Token, read_by_rows

VOCAB = 50

WINDOWS: list[tuple[Sight, ...]] = [
    (),
    (),
    (Sight(window=1),),
    (Sight(window=3),),
    (Sight(window=6), Sight(window=6)),
    (Sight(chunk=4), Sight(window=9)),
]
"""What rows see by the tables behind the first."""

Runs = list[list[tuple[int, int]]]
"""The ranges of each run of a sequence at an instance."""


def token_at(seq: int, position: int) -> int:
    return (seq * 7919 + position * 104729) % VOCAB


def positions_of(runs: Runs) -> list[list[int]]:
    return [[p for start, end in run for p in range(start, end)] for run in runs]


@dataclass
class Launched:
    """A step on a device."""

    plan: StepPlan
    sampled: list[int]
    rows: list[Token]


@dataclass
class FakeInstance:
    rank: int
    rmanager: RManager
    scheduler: Scheduler
    running: dict[Lane, deque[Launched]] = field(default_factory=lambda: defaultdict(deque))
    previous: dict[Lane, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    """Place among the samples that are kept -> token."""
    kv: dict[int, Token] = field(default_factory=dict)
    """What has been written to each slot."""
    behind: list[dict[int, Token]] = field(default_factory=list)
    """Likewise in each table behind the first: a block has one of them."""
    certain: set[Token] = field(default_factory=set)
    """What steps that are known to have run have written in this epoch, and what was kept from those before."""


@dataclass(frozen=True)
class Copy:
    """Of a run, at its target."""

    move: int
    seq: int
    source: int
    target: int
    start: int
    tokens: list[Token]


@dataclass
class FakeParty:
    """Where all instances are in one lane."""

    digest: list[int] = field(default_factory=list)
    step: int = 0
    derived: Step | None = None
    """Which `waiting` have yet to accept."""
    waiting: list[FakeInstance] = field(default_factory=list)


class FakeCell:
    """All instances as one party in each lane, driven round by round, or in any order that devices allow (`moves_on`)."""

    def __init__(
        self,
        size: int,
        *,
        blocks: int,
        block_size: int,
        chunk_tokens: int,
        reach: int = 20,
        attends: bool = False,
        windows: Sequence[Sight] = (),
        stages: int = 1,
    ) -> None:
        """`attends`: whether it sees what each row reads, which takes time with long prompts. `windows`: what rows see by the
        tables behind the first. `stages`: that steps go through, so that as many and one more are under way."""
        self.epoch = 0
        self.stages = stages
        self.block_size = block_size
        self.attends = attends
        self.windows = tuple(windows)
        self.most = [most_blocks(sight, block_size, chunk_tokens) for sight in windows]
        self._pace = Pace(chunk_tokens, max(1, chunk_tokens // 4), reach, stages=stages)
        self._begin_epoch([RManager(blocks, block_size, windows=windows, chunk_tokens=chunk_tokens) for _ in range(size)])
        self.home: dict[int, int] = {}
        self.outputs: dict[int, dict[int, int]] = {}
        self.known_before: dict[int, int] = {}
        """How many of a sequence's outputs are of epochs before."""
        self.finished: dict[int, str] = {}
        self.released: dict[int, int] = {}
        self.needs: list[int] = []
        self.moves = 0
        self.copy_numbers = 1000
        self.copies: dict[int, Copy] = {}
        """By sequence: those that nobody has dropped, and that have not changed hands."""
        self.flips = 0

    def _begin_epoch(self, rmanagers: Sequence[RManager]) -> None:
        self.epoch += 1
        self.instances = []
        for rank, rmanager in enumerate(rmanagers):
            sights = (FULL, *self.windows)
            scheduler = Scheduler(epoch=self.epoch, rank=rank, pace=self._pace, rmanager=rmanager, sights=sights)
            self.instances.append(FakeInstance(rank, rmanager, scheduler, behind=[{} for _ in self.windows]))
        self.members = list(range(len(rmanagers)))
        self.copies = {}
        self.told: set[int] = set()
        """Moves that a home was told to flip."""
        self.moving: set[int] = set()
        """Sequences whose home was told to move, and has not."""
        self.written: set[int] = set()
        """Those whose present home has generated a token: what others hold of them grows no more, and is written."""
        self.parties: dict[Lane, FakeParty] = {lane: FakeParty() for lane in LANES}

    def lose(self, left: Sequence[FakeInstance], wanted: Sequence[int], *, are_heard: bool = True) -> list[dict[int, Runs]]:
        """The epoch ends wherever its steps are. The next has the instances `left`, in this order: what each keeps of the
        sequences that are `wanted`.

        `are_heard`: whether the gManager gets what they had to say.
        """
        all_kept: list[dict[int, Runs]] = []
        for instance in left:
            if are_heard:
                self.hear(instance)
            rmanager = instance.rmanager
            held = {seq: [[(seq, p) for p in run] for run in positions_of(rmanager.ranges(seq))] for seq in rmanager.shards}
            kept = rmanager.settle(instance.scheduler.uncertain())
            for seq, runs in held.items():  # a run ends before the first of its tokens that isn't certain
                if self.windows and seq not in kept:
                    continue  # its windows were cut before what is left of them
                heads = [[p for _, p in takewhile(instance.certain.__contains__, run)] for run in runs]
                stays = [head for head in heads if head]
                now = positions_of(kept.get(seq, []))
                assert now[: len(stays)] == stays
                detached = {(seq, p) for run in now[len(stays) :] for p in run}
                assert detached <= set(instance.kv.values())
            rmanager.keep(wanted)
            rmanager.validate()
            all_kept.append({seq: runs for seq, runs in kept.items() if seq in rmanager.shards})
        self._begin_epoch([instance.rmanager for instance in left])
        for old, new, kept in zip(left, self.instances, all_kept, strict=True):
            for seq, runs in kept.items():
                for run, positions in zip(new.rmanager.shards[seq].runs, positions_of(runs), strict=True):
                    slots = [block * self.block_size + i for block in run.block_ids for i in range(self.block_size)]
                    tokens = dict(zip(slots, ((seq, p) for p in positions), strict=False))
                    assert tokens.items() <= old.kv.items()
                    new.kv |= tokens  # all else is as good as poison
                    self._keep_behind(run, seq, positions, old, new)
            new.certain = set(new.kv.values())
        assert all(sorted(outputs) == list(range(len(outputs))) for outputs in self.outputs.values())
        self.known_before = {seq: len(outputs) for seq, outputs in self.outputs.items()}
        return all_kept

    def admit(
        self,
        seq: int,
        shares: list[Share],
        max_tokens: int,
        stop: list[int],
        kept: Sequence[KeptPart] = (),
        meanwhile: Callable[[], None] = lambda: None,
    ) -> bool:
        """As the gManager. `kept`: of its tokens, those that it has generated included. `meanwhile`: until the next instance
        hears of it, each time."""
        runs_at = {part.rank: len(part.runs) for part in kept}
        for share in shares:
            rm = self.instances[share.rank].rmanager
            length = -(-share.tokens // self.block_size) + runs_at.get(share.rank, 0) + 1
            if not rm.reserve(seq, footprint.taken(length, self.most)):
                for other in shares:
                    self.instances[other.rank].rmanager.drop(seq)
                return False
        length = sum(share.tokens for share in shares) + sum(b - a for part in kept for run in part.runs for a, b in run)
        admit = Admit(
            epoch=self.epoch,
            seq=seq,
            arrival=seq,
            token_ids=pack_tokens(token_at(seq, p) for p in range(length)),
            shares=shares,
            kept=list(kept),
            params=SequenceParams(
                max_tokens=max_tokens, temperature=0, top_k=0, top_p=1, seed=0, stop_token_ids=stop, logprobs=None
            ),
        )
        self.home[seq] = shares[0].rank
        self.outputs.setdefault(seq, {})
        for rank in dict.fromkeys([*(share.rank for share in shares), *runs_at]):
            self.instances[rank].scheduler.admit(admit)
            meanwhile()
        return True

    def round(self, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """One step everywhere in each lane, as `instance.server` does it. Returns whether there was anything to do.

        `meanwhile`: what the gManager says while the notices are out.
        """
        had_work = [self._round(lane, meanwhile) for lane in self.parties]
        return any(had_work)

    def _round(self, lane: Lane, meanwhile: Callable[[], None]) -> bool:
        if not any(i.scheduler.has_work(lane, self.members) for i in self.instances):
            for instance in self.instances:
                if instance.running[lane]:
                    self.commit(instance, lane)
            return any(i.running[lane] or i.scheduler.has_work(lane, self.members) for i in self.instances)
        self.derive(lane, meanwhile)
        for instance in self.instances:
            self.accept(instance, lane)
        for instance in self.instances:
            if len(instance.running[lane]) > self.stages:
                self.commit(instance, lane)
        return True

    def moves_on(self) -> list[Callable[[], None]]:
        """All that may happen next in any lane at any instance: notices meet, a step is accepted, or is known to have run. That
        one has run is known once all have accepted it: each waits for what the others compute."""
        found: list[Callable[[], None]] = []
        for lane, party in self.parties.items():
            are_free = not party.waiting and all(len(i.running[lane]) <= self.stages for i in self.instances)
            if are_free and any(i.scheduler.has_work(lane, self.members) for i in self.instances):
                found.append(partial(self.derive, lane))
            for instance in self.instances:
                num_running = len(instance.running[lane])
                if instance in party.waiting and num_running <= self.stages:
                    found.append(partial(self.accept, instance, lane))
                rests = not party.waiting and not instance.scheduler.has_work(lane, self.members)
                if num_running > self.stages or (num_running and rests):
                    found.append(partial(self.commit, instance, lane))
        return found

    def derive(self, lane: Lane, meanwhile: Callable[[], None] = lambda: None) -> None:
        party = self.parties[lane]
        notices = [
            i.scheduler.propose(lane, self.members, party=1, step=party.step, digest=party.digest, groupings=[])
            for i in self.instances
        ]
        meanwhile()
        for instance in self.instances:
            derived = derive(notices, instance.scheduler.known(lane))
            assert derived == (party.derived if instance.rank else derived), "all know the same"
            party.derived = derived
        party.digest = party.derived.digest()
        party.step += 1
        party.waiting = list(self.instances)

    def accept(self, instance: FakeInstance, lane: Lane) -> None:
        party = self.parties[lane]
        party.waiting.remove(instance)
        assert party.derived is not None
        self.run(instance, instance.scheduler.accept(lane, party.derived), party.derived, lane)
        if self.attends and not party.waiting:
            self.attend({i.rank: i.running[lane][-1] for i in self.instances})

    def run(self, instance: FakeInstance, plan: StepPlan, step: Step, lane: Lane) -> None:
        ids = list(plan.token_ids_T)
        for row, i in plan.pending:
            ids[row] = instance.previous[lane][i]
        rows = [(span.seq, p) for span in step.spans if span.rank == instance.rank for p in range(span.start, span.stop)]
        assert plan.positions_T == [position for _, position in rows]
        assert ids == [token_at(*row) for row in rows]
        assert len(ids) == len(plan.slots_T) == plan.layout.num_rows
        assert len(set(plan.slots_T)) == len(plan.slots_T)
        sampled = []
        for s in plan.sampled:
            assert rows[s.row] == (s.seq, s.position - 1)
            sampled.append(token_at(s.seq, s.position))
        kept = range(plan.samples_at, plan.samples_at + MAX_SAMPLES[lane])
        instance.previous[lane] = {at: token for at, token in instance.previous[lane].items() if at not in kept}
        instance.previous[lane] |= zip(kept, sampled, strict=False)
        assert plan.samples_at in range(0, self.stages * MAX_SAMPLES[lane], MAX_SAMPLES[lane])
        instance.running[lane].append(Launched(plan, sampled, rows))
        instance.certain.difference_update(rows)  # what was kept and then discarded, or cut

    def attend(self, launched: Mapping[int, Launched]) -> None:
        """A step runs on all devices: each row reads all tokens up to its own once."""
        for instance in self.instances:
            mine = launched[instance.rank]
            tables = [instance.kv, *instance.behind]
            for written, slots in zip(tables, mine.plan.slots, strict=True):
                for table in tables:
                    for slot in slots:
                        table.pop(slot, None)  # what a block had of another table is no more
                written |= zip(slots, mine.rows, strict=True)
        for group, sight in enumerate((FULL, *self.windows)):
            layouts = [launched[rank].plan.layouts[group] for rank in self.members]
            there = [instance.behind[group - 1] if group else instance.kv for instance in self.instances]
            for rank, rows in enumerate(read_by_rows(layouts, there, self.block_size)):
                seen = [(seq, range(sight.first(position), position + 1)) for seq, position in launched[rank].rows]
                assert rows == [Counter((seq, p) for p in positions) for seq, positions in seen]
        for instance in self.instances if self.windows else ():
            for seq in instance.rmanager.shards:
                for table, most in enumerate(self.most):
                    held = sum(len(run.windows[table].block_ids) for run in instance.rmanager.shards[seq].runs)
                    assert held <= most + len(instance.rmanager.shards[seq].runs) - 1

    def commit(self, instance: FakeInstance, lane: Lane) -> None:
        done = instance.running[lane].popleft()
        pairs = zip(done.plan.sampled, done.sampled, strict=True)
        instance.scheduler.commit(lane, {s.seq: TokenLogprob(token_id=t, logprob=0.0, rank=1) for s, t in pairs})
        instance.certain.update(done.rows)
        self.hear(instance)
        instance.scheduler.validate()

    def hear(self, instance: FakeInstance) -> None:
        """As the gManager: what an instance has to say."""
        for message in instance.scheduler.take_messages():
            match message:
                case Outputs(outputs=outputs):
                    for out in outputs:
                        index = self.known_before.get(out.seq, 0) + out.index
                        assert index not in self.outputs[out.seq]
                        self.outputs[out.seq][index] = out.token_ids[0]
                        if self.home.get(out.seq) == instance.rank:
                            self.written.add(out.seq)
                        if out.finish_reason:
                            assert out.seq not in self.finished
                            self.finished[out.seq] = out.finish_reason
                case HomeMoved(seq=seq, home=home):
                    assert home == instance.rank
                    self.home[seq] = home
                    self.moves += 1
                    self.moving.discard(seq)
                    self.written.discard(seq)
                case RunMoved(seq=seq, move=move):
                    assert self.copies.pop(seq).move == move
                    self.flips += 1
                case NeedBlock(seq=seq):
                    self.needs.append(seq)
                case Released(seq=seq, generated=generated):
                    assert seq not in self.released
                    self.released[seq] = generated

    def move(self, seq: int, to: int) -> None:
        """As the gManager: reserve at the target, then tell the home it knows of."""
        if seq in self.released or seq in self.copies or to == self.home[seq]:
            return
        if self.instances[to].rmanager.reserve_next(seq) is not None:
            self.moving.add(seq)
            self.instances[self.home[seq]].scheduler.move(seq, to)

    def copy(self, seq: int, source: int, target: int, which: int) -> None:
        """As the gManager and two instances: one of the runs of `source` is copied, if it is one that can be."""
        runs = self.instances[source].rmanager.ranges(seq)
        can_be = seq in self.written and seq not in self.moving and seq not in self.released and seq not in self.copies
        if not can_be or self.home[seq] == source or source == target or not runs:
            return
        run = self.instances[source].rmanager.shards[seq].runs[which % len(runs)]
        to = self.instances[target]
        self.copy_numbers += 1
        move = self.copy_numbers
        if not to.rmanager.reserve(move, len(run.all_blocks)):
            return
        tokens = [(seq, p) for start, end in run.ranges for p in range(start, end)]
        # the token of its home proves it, though the source may have yet to take the result of the step that wrote them
        assert set(tokens) <= set(self.instances[source].kv.values())
        slots = [block * self.block_size + i for block in to.rmanager.shards[move].block_ids for i in range(self.block_size)]
        to.kv |= dict(zip(slots[: len(run.block_ids) * self.block_size], tokens, strict=False))
        at = len(run.block_ids) * self.block_size
        for written, window in zip(to.behind, run.windows, strict=True):
            its = slots[at : at + len(window.block_ids) * self.block_size]
            written |= dict(zip(its, tokens[window.first * self.block_size :], strict=False))
            at += len(its)
        to.rmanager.note_copy(move, run.ranges, [window.first for window in run.windows])
        self.copies[seq] = Copy(move, seq, source, target, run.start, tokens)

    def _keep_behind(self, run: Run, seq: int, positions: Sequence[int], old: FakeInstance, new: FakeInstance) -> None:
        size = self.block_size
        for window, before, after in zip(run.windows, old.behind, new.behind, strict=True):
            slots = [block * size + i for block in window.block_ids for i in range(size)]
            tokens = dict(zip(slots, ((seq, p) for p in positions[window.first * size :]), strict=False))
            assert tokens.items() <= before.items()
            after |= tokens

    def flip(self, seq: int) -> None:
        """As the gManager: a copy is complete."""
        copy = self.copies.get(seq)
        if copy is not None and copy.move not in self.told:
            self.told.add(copy.move)
            self.instances[copy.target].certain.update(copy.tokens)
            told = FlipRun(epoch=self.epoch, move=copy.move, seq=seq, source=copy.source, target=copy.target, start=copy.start)
            self.instances[self.home[seq]].scheduler.flip(told)

    def drop_copies(self) -> None:
        """As the gManager: of sequences that have ended."""
        for seq, copy in list(self.copies.items()):
            if seq in self.released:
                self.instances[copy.target].rmanager.drop(copy.move)
                del self.copies[seq]

    def cancel(self, seq: int) -> None:
        """As the gManager: tell the home it knows of, which may have handed it on."""
        self.instances[self.home[seq]].scheduler.cancel(seq)

    def drain(self, most: int = 500) -> None:
        for party in self.parties.values():
            assert not party.waiting, "rounds begin when all have accepted the step before"
        for _ in range(most):
            if not self.round():
                return
        raise AssertionError("the cell never came to rest")

    def check_empty(self) -> None:
        for instance in self.instances:
            assert instance.rmanager.free_blocks == instance.rmanager.shards.pool.num_blocks
            assert not instance.scheduler.known("decode")
            instance.scheduler.validate()
