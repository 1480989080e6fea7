"""An instance: what the gManager tells it, and what it says. As `instance.server` does, without sockets and a device."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from gmanager.wire import messages as m
from instance.plan import MAX_DECODE_ROWS, Pace
from instance.rmanager import RManager
from instance.scheduler import Scheduler
from instance.step import LANES, Grouping, Lane
from simulation.clock import Clock
from simulation.device import Device, Part, Processor
from simulation.parties import Parties, Seat
from simulation.times import Load, Profile

VOCABULARY = 1 << 31
MAX_CONTEXT = 1 << 40


class SimulationError(Exception):
    """Something came about that can't be simulated, or must not be."""


class Instance:
    """One that serves in one epoch and is never lost."""

    rank: int
    scheduler: Scheduler
    newest: Grouping

    def __init__(self, clock: Clock, profile: Profile, processor: Processor, tell: Callable[[m.Message], None]) -> None:
        """`tell`: sends a message to the gManager."""
        self.rmanager = RManager(profile.kv_tokens // profile.block_size, profile.block_size)
        self.device = Device(processor)
        self._clock = clock
        self._profile = profile
        self._tell = tell
        self._parties: Parties | None = None
        self._seats: dict[Lane, Seat] = {}
        self._epoch = 0
        self.num_steps = 0
        """That have run; one of decodes counts as many as it stands for."""
        self._samples: dict[Lane, deque[m.StepSample]] = {lane: deque(maxlen=m.MAX_STEP_SAMPLES // 2) for lane in LANES}
        """Of the newest steps, not told yet."""

    def register(self, cell: str, cell_size: int, number: int, role: m.Role) -> m.Register:
        """How it introduces itself."""
        profile = self._profile
        spec = m.InstanceSpec(
            model="simulated",
            fingerprint="simulated",
            tokenizer="simulated",
            dtype="bfloat16",
            layers="simulated",
            block_size=profile.block_size,
            vocab_size=VOCABULARY,
            max_context=MAX_CONTEXT,
            num_blocks=self.rmanager.shards.pool.num_blocks,
            chunk_tokens=profile.chunk_tokens,
            decode_rows=MAX_DECODE_ROWS,
            reach=profile.reach,
            device=profile.name,
            host="simulated",
        )
        return m.Register(
            protocol=m.PROTOCOL,
            cell=cell,
            cell_size=cell_size,
            run_id=f"{cell}/{number}",
            rank=0,
            party_address=f"simulated:{number}",
            spec=spec,
            wanted_id=number,
            role=role,
        )

    def join(self, epoch: int, rank: int, parties: Parties, *, caches: bool) -> None:
        """Step with the others of its cell from now on.

        `caches`: keep what sequences leave, for others that begin with the same tokens.
        """
        self.rmanager.caches = caches
        profile = self._profile
        pace = Pace(profile.chunk_tokens, profile.mixed_chunk_tokens)
        if profile.shrinks:
            pace = replace(pace, reach=profile.reach, grain=profile.grain)
        self.rank, self._epoch = rank, epoch
        self.scheduler = Scheduler(epoch=epoch, rank=rank, pace=pace, rmanager=self.rmanager, lay_out_as=parties.counting)
        self.newest = Grouping(number=0, members=[rank])
        self._parties = parties
        parties.copies.enter(rank)
        self._seats = {lane: parties.enter(self, rank, lane) for lane in LANES}

    def obey(self, message: m.Message) -> None:
        """One message of the gManager, once it serves. Raises SimulationError for what no instance here is ever told."""
        match message:
            case m.Reserve(seq=seq, source=source) if source and not self.rmanager.share(seq, source, message.shared):
                self._tell_of_cached()
                free = self.rmanager.free_blocks
                self._tell(m.NotGranted(epoch=self._epoch, seq=seq, free_blocks=free, lacks_source=True))
            case m.Reserve(seq=seq, blocks=blocks):
                is_granted = self.rmanager.reserve(seq, blocks)
                if not is_granted:
                    self.rmanager.drop(seq)  # what it would have shared
                self._answer_reserve(seq, blocks if is_granted else None)
            case m.ReserveNext(seq=seq):
                self._answer_reserve(seq, self.rmanager.reserve_next(seq))
            case m.Drop(seq=seq):
                self.rmanager.drop(seq)
                self._tell_of_freed()
            case m.Discard(seq=seq):
                self.rmanager.discard(seq)
                self._tell_of_freed()
            case m.Admit():
                self.scheduler.admit(message)
            case m.Regroup(number=number, parties=parties):
                mine = next(members for members in parties if self.rank in members)
                self.newest = Grouping(number=number, members=mine)
            case m.MoveSequence(seq=seq, to=to):
                self.scheduler.move(seq, to)
                self._cell.copies.note_left(seq, self.rank)
            case m.FlipRun():
                self.scheduler.flip(message)
            case m.Cancel(seq=seq):
                self.scheduler.cancel(seq)
            case m.OfferRun():
                self._tell(self._offer(message))
            case m.CopyRun():
                self._copy(message)
            case m.Pong():
                return
            case _:
                raise SimulationError(f"an instance was told {type(message).__name__}, which is not simulated: {message}")
        self._look()

    def beat(self) -> None:
        """Once a second, whatever there is to tell: after a release the gManager waits for the next one."""
        self._send_beat()

    def note_step(self, part: Part, load: Load) -> None:
        """A step has run."""
        self.num_steps += self._profile.decode_steps if part.lane == "decode" else 1
        if load.rows or load.served:
            other: Lane = "decode" if part.lane == "prefill" else "prefill"
            self._samples[part.lane].append(
                m.StepSample(
                    lane=int(part.lane == "decode"),
                    rows=load.rows,
                    attended=load.attended,
                    sent=load.sent,
                    served=load.served,
                    us=round(part.took_s * 1e6),
                    beside=self.device.working[other] is not None,
                )
            )

    def tell_progress(self) -> None:
        """A lane has moved on: tell the gManager, the other lane, and who copies."""
        self.tell_budget()
        self._tell_of_freed()
        self._tell_of_cached()  # before the Released of sequences that left it
        for message in self.scheduler.take_messages():
            self._tell(message)
        self.scheduler.forget_origins()
        self._look()

    def tell_budget(self) -> None:
        """A step has begun or ended: of what may be copied."""
        is_busy = any(seat.running is not None for seat in self._seats.values())
        self._cell.copies.tell(self.rank, self.num_steps, is_busy=is_busy)

    @property
    def used(self) -> float:
        """What part of its blocks is reserved, or holds KV that somebody uses."""
        return 1 - self.rmanager.free_blocks / self.rmanager.shards.pool.num_blocks

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other."""
        self.scheduler.validate()  # and the rManager

    @property
    def _cell(self) -> Parties:
        """Raises SimulationError before `join`."""
        if self._parties is None:
            raise SimulationError("an instance was told of sequences before it was of a cell")
        return self._parties

    def _look(self) -> None:
        if self._parties is not None:
            for seat in self._seats.values():
                self._parties.look(seat)

    def _answer_reserve(self, seq: int, added: int | None) -> None:
        """`added`: blocks that are the sequence's now; None: there is no room."""
        self._tell_of_cached()  # some may have had to make room
        free = self.rmanager.free_blocks
        if added is None:
            self._tell(m.NotGranted(epoch=self._epoch, seq=seq, free_blocks=free))
        else:
            self._tell(m.Granted(epoch=self._epoch, seq=seq, blocks=added, free_blocks=free))

    def _offer(self, asked: m.OfferRun) -> m.RunOffered:
        shard = self.rmanager.shard(asked.seq)
        ranges = list(shard.runs[0].ranges) if shard is not None and shard.runs else []
        return m.RunOffered(epoch=asked.epoch, move=asked.move, ranges=ranges)

    def _copy(self, asked: m.CopyRun) -> None:
        if asked.target != self.rank:
            return

        def arrive(took_s: float) -> None:
            self.rmanager.note_copy(asked.move, asked.ranges)
            self._tell(m.Copied(epoch=asked.epoch, move=asked.move, us=round(took_s * 1e6)))

        self._cell.copies.begin(asked, arrive)

    def _tell_of_freed(self) -> None:
        if self.rmanager.freed:
            self._send_beat()

    def _send_beat(self) -> None:
        samples = [sample for its in self._samples.values() for sample in its]
        for its in self._samples.values():
            its.clear()
        self._tell(
            m.Beat(
                epoch=self._epoch,
                free_blocks=self.rmanager.free_blocks,
                held_tokens=self.rmanager.take_changes(),
                counters=m.Counters(),
                cached_blocks=self.rmanager.cached_blocks,
                samples=samples,
            )
        )

    def _tell_of_cached(self) -> None:
        shards = [m.KeptShard(seq=seq, runs=runs) for seq, runs in self.rmanager.take_reusable().items()]
        if shards:
            self._tell(m.Cached(epoch=self._epoch, shards=shards))
