"""What runs in one ready cell, from a place in its queue to its end: what begins next, tokens, home moves, preemption.

    waiting ──Reserve──> reservation ──all Granted: Regroup, Admit──> sequence ──Released──> gone
       ^                     │ NotGranted: Drop                          │
       └─────────────────────┴──── preempted; or the membership changes ─┘

- One reservation is in flight at a time, for an admission or a home move: two half-granted ones never wait for each
  other.
- `advance` is tried only when something has changed that could let it succeed; it never polls.
- A sequence that waits for a block goes before any admission, and a reservation for it before any preemption.
- After a preemption nothing is admitted until a sequence has ended: else the victim would take back what it gave.
- One that was preempted comes back to the instance where it gave way only if there is room for what it and those at home there
  generate next, or nobody is: else it would be preempted again as soon as one of them needs a block.
- KV of those that wait is given up before any that runs is preempted, and where nothing runs and the next has no room.
- When the membership changes, all that runs goes back to the queue with what is left of its KV (`suspend`, `inherit`), and
  is admitted again in the next epoch, where only what is missing is computed.
- The first sequence, the oldest of the highest priority, is preempted only if it is alone, no instance has a block, and so
  nobody else can make room; none is for one of a lower priority.
"""

from collections.abc import Collection, Mapping

from gmanager.cluster.admission import Admission
from gmanager.cluster.cell import Cell
from gmanager.cluster.events import Emit, Send
from gmanager.cluster.forecast import Forecast
from gmanager.cluster.homes import Homes
from gmanager.cluster.lifecycle import RUNNING, State
from gmanager.cluster.member import Member
from gmanager.cluster.moves import Moves
from gmanager.cluster.policies import NewHolder, NewHome
from gmanager.cluster.request import MoveCall, Request
from gmanager.cluster.requests import Requests
from gmanager.cluster.reservations import Reservation, Reservations
from gmanager.cluster.reuse import Reuses
from gmanager.cluster.running import Running
from gmanager.cluster.sequence import Sequence, told_of
from gmanager.cluster.unsettled import Unsettled
from gmanager.cluster.waiting import Waiting
from gmanager.wire.messages import (
    Beat,
    Cached,
    Cancel,
    Copied,
    Fetched,
    Granted,
    NotGranted,
    Outputs,
    Refusal,
    Released,
    RunMoved,
    RunOffered,
    Scored,
    SequenceOutput,
    TokenLogprob,
    Unheard,
)

LIFTED = 8
"""So many of the first that wait have what they begin with brought from disk to host memory meanwhile."""


class Sequences:
    """Admission, placement and homes in a cell, through all its epochs. Pure: what is to be done is emitted."""

    def __init__(self, cell: Cell, requests: Requests, emit: Emit) -> None:
        self.num_preemptions = 0
        self._cell = cell
        self._requests = requests
        self._emit = emit
        self._waiting = Waiting(cell, requests, emit)
        self._running = Running(cell, emit)
        self._crowded = False
        self._changed = False
        self._moves = Moves(cell, self._running, emit)
        self._unsettled = Unsettled(cell)
        self._homes = Homes(cell, requests, self._running, self._waiting, emit, self._make_way)
        self._released: dict[int, Sequence] = {}
        """Those whose blocks are free, and whose last tokens may be on their way."""
        self._reuses = Reuses(cell, emit)
        self._reservations = Reservations(cell, self._running, self._homes, emit)
        self._admission = Admission(cell, requests, self._waiting, self._running, self._reuses, self._reservations, emit)
        self._forecast = Forecast(cell, self._running, self._waiting, requests)

    # --- requests -----------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_dropped(self) -> int:
        """Messages that meant nothing here."""
        return self._running.num_dropped

    @property
    def num_moves_failed(self) -> int:
        """Runs that were not what was sent, or never came."""
        return self._running.num_moves_failed

    def enqueue(self, request: Request, now: float) -> None:
        """Let a request wait for memory, behind all that precede it."""
        self._waiting.add(request, now, "enqueue")
        self._changed = True

    def refusal(self, request: Request) -> Refusal | None:
        """Why a request that is to be queued would miss its objectives; None: it may meet them."""
        return self._forecast.refusal(request, self._reservations.admitted, lambda: self._reuses.known(request))

    def withdraw(self, request: Request, was: State) -> None:
        """A request has ended otherwise than by its last token: release what it held in the state that it had."""
        self._reuses.forget(request.number)
        if was == "queued":
            self._waiting.withdraw(request)
            self._changed = True
        elif was == "reserving":
            self._give_up_reservation()
            self._waiting.discard(request)
        elif was in RUNNING:
            self._cancel(self._running[request.seq])

    def move_home(self, request: Request, call: MoveCall) -> None:
        """A client wants another home for a request. Answered when it has moved, or can't."""
        self._changed |= self._homes.wish(request, call)

    # --- changes of membership ----------------------------------------------------------------------------------------

    @property
    def kept_seqs(self) -> Collection[int]:
        """Whose KV waits on instances for an admission."""
        return self._waiting.kept_seqs

    def suspend(self, now: float) -> None:
        """The epoch is over: all that runs or was about to goes back to the queue. What of its KV is left `inherit` says."""
        self._waiting.suspend()
        if (request := self._reservations.admitted) is not None:
            self._waiting.take_back(request, request.seq if request.kept else 0, request.waiting_since)
        for sequence in self._running.all():
            if sequence.is_current:
                # whose prompt is not scored is computed anew: each of its rows is needed
                is_kept = sequence.request.state != "preempted" and not sequence.unscored
                taken_part = [self._cell.id_of(rank) for rank in sequence.participants]
                self._waiting.take_back(sequence.request, sequence.number if is_kept else 0, now, taken_part)
        self._reservations.suspend()
        self._moves = Moves(self._cell, self._running, self._emit)
        self._reuses.suspend()
        self._running.clear()
        self._unsettled.clear()
        self._homes.clear()
        self._released.clear()
        self._crowded = False
        self._changed = False

    def blame(self, lost: int) -> None:
        """Of what was interrupted, that in which the lost instance took part may be why it is lost."""
        self._waiting.blame(lost)

    def take_unheard(self, request: Request, unheard: Unheard) -> None:
        """Tokens of a waiting request that were generated while there was no gManager."""
        self._waiting.take_unheard(request, unheard)

    def reclaim(self, came_from: Mapping[int, int]) -> None:
        """KV that was kept for another gManager: request -> sequence as which it ran."""
        for member in self._cell.members:
            self._running.pass_number(max((*(member.kept or ()), *member.cached), default=0))
        self._waiting.reclaim(came_from)

    def inherit(self) -> None:
        """All members of the next epoch are known, and what they have kept (`Member.kept`)."""
        self._waiting.inherit()
        self._reuses.inherit()
        self._moves = Moves(self._cell, self._running, self._emit)
        self._running.clear()

    def look_again(self) -> None:
        """Time has passed: what runs may lie better elsewhere now, and who has waited for better, or for what is read, may wait
        no longer."""
        self._changed |= self._reuses.end_overdue(self._requests.now)
        if not self._cell.is_draining and self._cell.policy.relocates:
            homes = set(self._cell.policy.looks_at(self._waiting.outlook(self._running.views())))
            self._unsettled.look_again(self._running.shared)
            if homes:
                self._unsettled.look_again(sequence for sequence in self._running.all() if sequence.next_home in homes)
            self._changed |= bool(self._unsettled) or bool(self._waiting)

    def resume(self) -> None:
        """The cell steps (again)."""
        self._changed = True

    # --- what instances say -------------------------------------------------------------------------------------------

    def on_beat(self, member: Member, beat: Beat, is_news: bool) -> None:
        """`is_news`: the free blocks are others than before."""
        for number, tokens in beat.held_tokens.items():
            if (sequence := self._running.get(number)) is not None:
                held = max(0, min(tokens, member.spec.num_blocks * self._cell.spec.block_size))
                sequence.held[member.rank] = held
                self._running.touch(sequence)
                if sequence.is_current and sequence.request.held.get(member.id) != held:
                    sequence.request.held[member.id] = held
                    self._requests.hear(sequence.request)
        self._changed |= is_news or member.is_freeing
        member.is_freeing = False

    def on_granted(self, member: Member, granted: Granted) -> None:
        seq = granted.seq
        asked = member.outstanding.pop(seq, None)
        if asked is None:
            self._running.num_dropped += 1
            return
        blocks = max(0, min(granted.blocks, asked))
        member.hear_free(granted.free_blocks)
        if self._moves.is_reserving(seq):
            self._changed |= self._moves.on_granted(seq)
            return
        reservation = self._reservations.of(seq)
        if reservation is None:
            # It was given up, and a Drop is on its way.
            member.hear_free(granted.free_blocks + blocks)
            self._changed = True
        elif self._reservations.grant(reservation, member.rank, blocks):
            self._changed = True
            if reservation.placement is not None:
                self._forecast.on_admitted(self._admission.admit(reservation, reservation.placement))
            else:
                self._homes.begin(self._running[seq], member.rank)

    def on_not_granted(self, member: Member, refused: NotGranted) -> None:
        seq, free_blocks = refused.seq, refused.free_blocks
        blocks = member.outstanding.pop(seq, None)
        if blocks is None:
            self._running.num_dropped += 1
            return
        reservation = self._reservations.of(seq)
        reuse = None if reservation is None else reservation.reuse
        # Whatever it says, it has less than was asked: so the next try asks for less, and there is no endless loop.
        if refused.lacks_source and reuse is not None:
            self._reuses.contradict(member, reuse)
            member.hear_free(free_blocks)
        else:
            member.hear_free(min(free_blocks, blocks - 1))
        self._changed = True
        if self._moves.is_reserving(seq):
            self._moves.on_not_granted(seq)
            return
        if reservation is None:
            return
        self._give_up_reservation()
        request = reservation.request
        if reservation.placement is not None:
            self._waiting.add(request, request.waiting_since, "deny")
        elif (call := request.move_call) is not None and call.target == member.id:
            asked = f"{blocks} block{'s' * (blocks != 1)} asked"
            self._requests.fail_move(request, f"instance {member.id} has no room: {asked}, {max(0, free_blocks)} free")

    def on_cached(self, member: Member, cached: Cached) -> bool:
        """What of sequences others may share there now. False: that can't be."""
        waited = len(self._reuses.following.numbers)
        for shard in cached.shards:  # of one that runs they say it when its prompt is done, before its first token is here
            sequence = self._running.get(shard.seq)
            if sequence is not None and not sequence.received and member.rank in sequence.participants:
                sequence.end_prompt()
                self._running.touch(sequence)
        is_sound = self._reuses.hear(member, cached)
        self._changed |= len(self._reuses.following.numbers) < waited
        return is_sound

    def on_fetched(self, member: Member, fetched: Fetched) -> None:
        """It has read what was below its pool."""
        if self._reuses.reading.on_fetched(member, fetched, self._requests.now):
            self._changed = True
        else:
            self._running.num_dropped += 1

    def on_outputs(self, member: Member, outputs: Outputs) -> None:
        self._forecast.on_outputs(member, outputs)
        for output in outputs.outputs:
            sequence = self._running.get(output.seq)
            if sequence is None or output.index < sequence.received or output.index in sequence.early:
                self._running.num_dropped += 1
                continue
            if sequence.needs_block and member.rank == sequence.home:
                # A home tells of a lack of room after the tokens of all rows before it: blocks have become free.
                sequence.needs_block = False
                self._running.touch(sequence)
                self._changed = True
            if member.rank == sequence.home and not sequence.is_written:
                sequence.is_written = True
                self._unsettled.add([sequence])
                self._changed |= self._cell.is_draining or self._cell.policy.relocates
            sequence.early[output.index] = output
            self._take_outputs(sequence)

    def on_scored(self, member: Member, scored: Scored) -> None:
        """Log-probabilities of some of a prompt; with the last of them the outputs that waited go to the client."""
        sequence = self._running.get(scored.seq)
        if sequence is None or member.rank not in sequence.participants or len(scored.logprobs) > sequence.unscored:
            self._running.num_dropped += 1
            return
        sequence.unscored -= len(scored.logprobs)
        if sequence.is_current:
            self._requests.deliver_scores(sequence.request, scored.logprobs)
            if not sequence.unscored:
                sequence.request.is_scored = True
                self._take_outputs(sequence)

    def on_need_block(self, member: Member, seq: int) -> None:
        self._changed |= self._homes.on_need_block(member, seq)

    def on_home_moved(self, seq: int, home: int) -> None:
        self._changed |= self._homes.on_moved(seq, home)

    def on_move(self, member: Member, message: RunOffered | Copied | RunMoved) -> None:
        """What an instance says of the move of a run."""
        match message:
            case RunOffered():
                self._changed |= self._moves.on_offered(member, message)
            case Copied():
                self._changed |= self._moves.on_copied(member, message)
            case RunMoved():
                self._changed |= self._moves.on_moved(member, message)
                if (sequence := self._running.get(message.seq)) is not None:
                    self._unsettled.add([sequence])

    def on_released(self, released: Released, now: float) -> None:
        sequence = self._running.get(released.seq)
        if sequence is None:
            self._running.num_dropped += 1
            return
        sequence.ending = True
        sequence.released = released.generated
        self._running.touch(sequence)
        self._released[sequence.number] = sequence
        self._settle(sequence, now)

    def settle(self, now: float) -> None:
        """Let go of what is released and whose tokens are all here."""
        for sequence in list(self._released.values()):
            self._settle(sequence, now)

    # --- decisions ----------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Start what can start now, if anything has changed."""
        while self._changed and self._reservations.open is None and self._cell.is_ready:
            self._changed = False
            if self._cell.is_draining:
                everybody = self._running.in_order()
                if not any(self._try_move(sequence) for sequence in everybody):
                    self._moves.start(everybody)
                    self._try_admit()
            elif not any(self._try_move(sequence) for sequence in self._homes.restless()):
                self._try_admit()
                self._try_improve()
        if self._reuses.has_below and self._cell.is_ready:
            for request in self._waiting.first(LIFTED):
                if not request.was_lifted and not self._reuses.is_coming(request):
                    self._reuses.lift(request)

    def emptied(self) -> Member | None:
        """A member that is being drained and has nothing left, or nothing that could go elsewhere now."""
        if not (self._cell.is_ready and self._reservations.open is None and self._moves.is_idle and not self._changed):
            return None
        draining = (member for member in self._cell.members if member.is_draining and not member.outstanding)
        return next(filter(self._is_emptied, draining), None)

    def _is_emptied(self, member: Member) -> bool:
        its = [sequence for sequence in self._running.all() if member.rank in sequence.participants]
        # prompts run to their end, and who has just come to another home says a word from there first
        waits = [s for s in its if s.ending or s.moving_to is not None or not s.is_written]
        return not its or not (waits or self._running.blocks_come)

    def _try_move(self, sequence: Sequence) -> bool:
        """Whether a reservation for its next home was begun."""
        target = self._homes.next_of(sequence, self._moves)
        if target is not None:
            self._reserve_home(sequence, target)
        return target is not None

    def _try_improve(self) -> None:
        """Begin what the policy wants to be moved, if that can begin now."""
        while self._reservations.open is None and not self._running.lacks_blocks:
            found = self._unsettled.ask(self._moves, lambda: self._waiting.outlook(self._running.views()))
            match found:
                case None:
                    return
                case sequence, NewHome(to=target):
                    self._reserve_home(sequence, target)
                case sequence, NewHolder(source=source, to=target):
                    self._moves.begin(sequence, source, target)

    def _reserve_home(self, sequence: Sequence, target: int) -> None:
        self._requests.change(sequence.request, "move")
        if target not in sequence.asked:
            sequence.asked.append(target)
        blocks = {target: self._cell.taken(1)}
        self._reservations.begin(Reservation(sequence.number, blocks, sequence.request, None))

    def _try_admit(self) -> None:
        if not self._crowded and self._admission.begin():
            self._changed = True

    def _give_up_reservation(self) -> None:
        self._reservations.give_up()
        self._changed = True

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _take_outputs(self, sequence: Sequence) -> None:
        """All that is there without a gap goes to the client at once, but only after its prompt's log-probabilities."""
        if sequence.unscored and sequence.is_current:
            return
        came: list[int] = []
        came_logprobs: list[TokenLogprob] = []
        last: SequenceOutput | None = None
        is_first = not sequence.received
        while (output := sequence.early.pop(sequence.received, None)) is not None:
            came += output.token_ids
            came_logprobs += output.logprobs or ()
            if not sequence.received:
                sequence.end_prompt()
                self._running.touch(sequence)
            sequence.received += len(output.token_ids)
            last = output
        for index in [i for i in sequence.early if i <= sequence.received]:
            del sequence.early[index]  # overlaps what was taken: no instance of ours says this
            self._running.num_dropped += 1
        if last is None or not sequence.is_current:
            return
        if is_first:
            self._forecast.on_first(sequence)
        request = sequence.request
        token_ids, logprobs, reason = request.wanted_of(came, came_logprobs, last.finish_reason)
        if reason is None:
            if request.state == "prefill":
                self._requests.change(request, "generate")
            self._requests.deliver(request, token_ids, logprobs)
            return
        sequence.ending = True
        self._running.touch(sequence)
        self._give_up_move(sequence)
        if last.held is not None:
            request.held = {
                self._cell.id_of(share.rank): share.tokens for share in last.held if 0 <= share.rank < self._cell.size
            }
        self._requests.finish(request, reason, token_ids=token_ids, logprobs=logprobs)

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _cancel(self, sequence: Sequence) -> None:
        """Have it released. Whatever home it has: the instances pass a Cancel on."""
        self._give_up_move(sequence)
        if not sequence.ending:
            sequence.ending = True
            self._running.touch(sequence)
            home = self._cell.members[sequence.home].peer
            self._emit(Send(home, Cancel(epoch=self._cell.epoch, seq=sequence.number)))

    def _make_way(self, sequence: Sequence, crowded: bool) -> None:
        """It is preempted for another that lacks a block. `crowded`: there is none in the cell."""
        self._crowded |= crowded
        self._preempt(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._cancel(sequence)
        self.num_preemptions += 1
        request = sequence.request
        request.preemptions += 1
        request.gave_way_at = self._cell.id_of(sequence.home)
        self._requests.change(request, "preempt")
        self._requests.fail_move(request, f"request {request.id!r} was preempted: the cell is full")
        self._emit(told_of(sequence, "request preempted"))

    def _give_up_move(self, sequence: Sequence) -> None:
        if self._reservations.of(sequence.number) is not None:
            self._give_up_reservation()

    def _settle(self, sequence: Sequence, now: float) -> None:
        if not sequence.is_current:
            self._take_outputs(sequence)  # nobody waits for log-probabilities of its prompt any more
        if sequence.released is None or sequence.received < sequence.released:
            return
        self._give_up_move(sequence)
        self._moves.forget(sequence)
        self._moves.room_came()
        self._running.remove(sequence)
        self._released.pop(sequence.number, None)
        self._forecast.on_released(sequence)
        self._reuses.end(sequence.number, sequence.request)
        self._changed = True
        request = sequence.request
        if not sequence.is_current:
            self._crowded = False
        elif request.state == "preempted":
            request.home = None
            request.held = {}
            self._waiting.add(request, now, "release")
        else:
            self._crowded = False
            error = f"instance {self._cell.id_of(sequence.home)} of cell '{self._cell.name}' released the request unasked"
            self._requests.finish(request, "error", error=error)
        if not self._running:
            self._crowded = False

    # --- for others to see --------------------------------------------------------------------------------------------

    def lent_and_borrowed(self) -> tuple[list[int], list[int]]:
        """Per rank: tokens it holds for other homes, and tokens that others hold for its sequences."""
        return self._running.lent_and_borrowed()

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, runs or is being reserved or released."""
        busy = self._waiting or self._running or self._reservations.open or not self._moves.is_idle
        return not busy and not any(m.outstanding for m in self._cell.members)

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other."""
        self._running.validate()
        self._waiting.validate()
        self._reuses.validate()
        self._reuses.reading.validate(self._waiting.numbers)
        reserving = [] if self._reservations.open is None else [self._reservations.open.request.number]
        self._reuses.following.validate([*self._waiting.numbers, *reserving])
        self._reservations.validate()
        if self._reservations.open is None and self._changed and self._cell.is_ready:
            raise RuntimeError("something has changed and was not looked at")
