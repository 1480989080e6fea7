"""The gManager's mind: every event goes through `handle`, which returns what is to be done. No socket, clock or chance.

    peers ──> clients: requests wait here for a ready cell; then their text is tokenised and they join its queue
          └─> instances: a Cell is formed; once ready, its Sequences admit and run requests

A peer's first message says what it is. One that is done for (refused, of a cell that ended) is heard no more, and
forgotten after a while.
"""

import logging
from collections.abc import Collection, Iterable

from gmanager.cluster import drains
from gmanager.cluster.cell import MAX_ATTEMPTS, RETURN_GRACE_S, SUSPEND_TIMEOUT_S, Cell, Member, malformed
from gmanager.cluster.cells import Cells
from gmanager.cluster.clients import Clients
from gmanager.cluster.events import (
    Action,
    ClientEmpty,
    ClientFull,
    DropText,
    Encoded,
    Event,
    Forget,
    JournalChanged,
    PeerGarbled,
    PeerSaid,
    PeerWasLost,
    Restored,
    StopFound,
    Stopped,
    TextLoaded,
    Ticked,
)
from gmanager.cluster.intake import Intake
from gmanager.cluster.parting import Parting
from gmanager.cluster.requests import Requests
from gmanager.cluster.sequences import Sequences
from gmanager.cluster.stats import assemble
from gmanager.cluster.turn import Turn
from gmanager.config import GManagerConfig
from gmanager.wire import messages as m
from gmanager.wire.peer import PeerId

EPOCHS_PER_TERM = 10**6
"""So the epochs of all gManagers that serve from one journal are different ones."""
WRONG_TOKENS = "token ids must be in [0, 4294967296)"
STALL_S = 3.0
"""If ticks are further apart than this, it is we who were stopped: leases start anew."""


class Cluster:
    """Cells, clients and requests of one gManager."""

    def __init__(self, config: GManagerConfig, *, term: int = 0) -> None:
        """`term`: of the journal; 0: there is none."""
        self._config = config
        self._term = term
        self._turn = turn = Turn()
        self._ticked_at: float | None = None
        self._epoch = term * EPOCHS_PER_TERM
        self._num_dropped = 0
        self._requests = Requests(turn.emit, clock=lambda: turn.now, term=term)
        self._cells = Cells()
        self._parting = Parting(turn)
        self._intake = Intake(config, self._requests, self._cells, turn)
        self._clients = Clients(config, self._requests, self._intake, self._cells, self._parting, turn)
        self._members: dict[PeerId, tuple[Cell, Member]] = {}

    def restore(self, requests: Iterable[Restored], now: float) -> None:
        """Go on with the requests of the gManager before, in order of their numbers. Before any event. Raises ValueError."""
        self._turn.now = now
        for restored in requests:
            self._intake.restore(restored)

    def handle(self, event: Event) -> list[Action]:
        """Take one event in. The actions are to be done in this order."""
        self._turn.now = event.now
        match event:
            case PeerSaid():
                self._on_message(event)
            case PeerGarbled(peer=peer, reason=reason):
                self._on_garbled(peer, reason)
            case PeerWasLost(peer=peer, reason=reason):
                self._on_lost(peer, reason)
                self._turn.emit(Forget(peer))
            case ClientFull(peer=peer):
                self._clients.on_full(peer)
            case ClientEmpty(peer=peer, lacks=lacks):
                self._clients.on_empty(peer, lacks)
            case TextLoaded(cell=number, error=error):
                self._on_text_loaded(number, error)
            case Encoded():
                self._intake.on_encoded(event)
            case StopFound(request=number, generated=generated):
                self._intake.on_stop_found(number, generated)
            case JournalChanged(failure=failure):
                self._intake.unwritten = failure
            case Ticked():
                self._on_tick()
            case Stopped(reason=reason):
                self._on_stop(reason)
        for sequences in self._cells.sequences.values():
            sequences.advance()
        for cell in self._cells:
            if cell.is_ready and (member := self._cells.sequences[cell.name].emptied()) is not None:
                self._let_go(cell, member)
        return self._turn.end()

    # --- peers --------------------------------------------------------------------------------------------------------

    def _on_message(self, event: PeerSaid) -> None:
        peer, message = event.peer, event.message
        if peer in self._clients:
            self._clients.hear(peer)
            if isinstance(message, m.GetStats):
                self._turn.send(peer, m.StatsReply(call=message.call, stats=self.stats()))
            else:
                self._clients.on_message(event)
        elif peer in self._members:
            cell, member = self._members[peer]
            member.heard_at = self._turn.now
            self._on_instance(cell, member, message)
        elif peer in self._parting and not (isinstance(message, m.Register) and self._parting.may_register(peer)):
            self._num_dropped += 1
        elif isinstance(message, m.Hello):
            self._clients.on_hello(peer, message)
        elif isinstance(message, m.Register):
            self._on_register(peer, message)
        elif hasattr(message, "epoch"):
            self._num_dropped += 1
            self._parting.expel(peer, "this instance is not registered here (any more)")
        else:
            # a client that was taken for gone, and goes on where it stood still, is to come again
            reason = f"the first message must be Hello or Register, not {type(message).__name__}"
            self._parting.part(peer, m.Refused(reason=reason, may_return=isinstance(message, m.FromClient)))

    def _on_garbled(self, peer: PeerId, reason: str) -> None:
        self._num_dropped += 1
        if peer in self._parting:
            return
        self._turn.log(logging.WARNING, "unreadable message", reason=reason)
        if peer in self._members:
            _, member = self._members[peer]
            self._lose_member(peer, f"{member.name} sent what can't be read: {reason}")
        else:
            self._clients.end(peer)
        self._parting.refuse_unreadable(peer, reason)

    def _on_lost(self, peer: PeerId, reason: str) -> None:
        self._parting.forget(peer)
        if peer in self._members:
            _, member = self._members[peer]
            self._lose_member(peer, f"{member.name} is lost: {reason}")
        elif peer in self._clients:
            self._turn.log(logging.INFO, "client lost", reason=reason)
            self._clients.lose(peer)

    # --- instances ----------------------------------------------------------------------------------------------------

    def _on_register(self, peer: PeerId, register: m.Register) -> None:
        cell = self._cells.get(register.cell)
        reason = malformed(register) or (cell.refusal(register) if cell is not None else None)
        if reason is not None:
            self._turn.log(logging.WARNING, "instance refused", reason=reason)
            self._parting.part(peer, m.Refused(reason=reason))
            return
        if register.former is not None and register.former.term > self._term:
            self._turn.log(logging.ERROR, "instance has served a later gManager", term=register.former.term, own=self._term)
            self._parting.part(peer)  # what this one says would only mislead it
            return
        if register.former is not None and cell is not None and cell.phase not in ("registering", "returning"):
            self._parting.expel(peer, f"cell '{cell.name}' has gone on without this instance")
            return
        if cell is None:
            self._epoch += 1
            cell = Cell(self._epoch, register, self._turn.emit, term=self._term)
            self._cells.add(cell)
        self._parting.forget(peer)  # it comes again, if it was expelled
        member = cell.add(peer, register, self._turn.now, self._config.instance_lease_s)
        self._members[peer] = cell, member
        if cell.is_ready and cell.joiners:
            self._change(cell, f"{member.name} comes")
        self._end_return(cell)

    def _on_instance(self, cell: Cell, member: Member, message: m.Message) -> None:
        member.num_outputs += isinstance(message, m.Outputs)
        if isinstance(message, m.Ping):
            self._turn.send(member.peer, m.Pong(outputs=member.num_outputs))
        elif isinstance(message, m.Leave):
            how, level = ("failed", logging.ERROR) if message.failed else ("left", logging.INFO)
            self._lose_member(member.peer, f"{member.name} {how}: {message.reason}", level)
            self._parting.part(member.peer)
        elif isinstance(message, m.Text):
            cell.set_text(member, message.assets)
        elif isinstance(message, m.AskDrain):
            reason = drains.why_not(cell, member)
            member.is_asking = reason is None
            if reason is not None:
                self._turn.send(member.peer, m.NotDrained(reason=reason))
                return
            drains.begin(cell, member, self._cells.sequences[cell.name], self._turn.emit)
        elif getattr(message, "epoch", None) != cell.epoch:
            self._num_dropped += 1
        elif isinstance(message, m.StoreOpened):
            cell.set_store(member, message.address, self._wanted(cell))
        elif isinstance(message, m.Kept):
            if _have_wrong_tokens(message.unheard):
                self._on_garbled(member.peer, WRONG_TOKENS)
                return
            cell.set_kept(member, message)
            self._go_on(cell)
        elif isinstance(message, m.Joined):
            cell.set_joined(member)
            self._check_ready(cell)
        elif isinstance(message, m.LinkLost):
            cell.set_link_lost(member, message.rank, message.reason, self._turn.now)
        elif isinstance(message, m.EpochBroken):
            if cell.phase != "suspending":
                self._on_broken(cell, member, message.reason)
        elif isinstance(message, m.Beat):
            is_news = cell.hear(member, message)
            if cell.is_ready:
                self._cells.sequences[cell.name].on_beat(member, message, is_news)
            self._turn.send(member.peer, m.Pong(outputs=member.num_outputs))
        elif cell.is_ready:
            self._on_running(self._cells.sequences[cell.name], member, message)
        else:
            self._num_dropped += 1

    def _on_running(self, sequences: Sequences, member: Member, message: m.Message) -> None:
        match message:
            case m.Granted() as granted:
                sequences.on_granted(member, granted)
            case m.NotGranted(seq=seq, free_blocks=free_blocks):
                sequences.on_not_granted(member, seq, free_blocks)
            case m.Outputs(outputs=outputs) if _have_wrong_tokens(outputs):
                self._on_garbled(member.peer, WRONG_TOKENS)
            case m.Outputs() as outputs:
                sequences.on_outputs(member, outputs)
                sequences.settle(self._turn.now)
            case m.Scored() as scored:
                sequences.on_scored(member, scored)
                sequences.settle(self._turn.now)
            case m.NeedBlock(seq=seq):
                sequences.on_need_block(member, seq)
            case m.HomeMoved(seq=seq, home=home):
                sequences.on_home_moved(seq, home)
            case m.Released() as released:
                sequences.on_released(released, self._turn.now)
            case m.RunOffered() | m.Copied() | m.RunMoved():
                sequences.on_move(member, message)
            case _:
                self._num_dropped += 1

    def _on_text_loaded(self, number: int, error: str | None) -> None:
        cell = self._cells.by_number(number)
        if cell is None:
            return
        if error is not None:
            self._fail(cell, f"the tokenizer of cell '{cell.name}' can't be used: {error}")
            return
        cell.set_text_loaded()
        self._end_return(cell)
        self._check_ready(cell)

    def _check_ready(self, cell: Cell) -> None:
        if not cell.is_ready:
            return
        if cell.name not in self._cells.sequences:
            self._form(cell)
        self._cells.sequences[cell.name].resume()
        if cell.joiners:  # who came meanwhile
            self._change(cell, f"{cell.joiners[0].name} comes")

    def _form(self, cell: Cell) -> None:
        """From now on requests are bound to it."""
        self._cells.form(cell, Sequences(cell, self._requests, self._turn.emit))
        self._clients.attach_waiting()
        self._intake.bind()

    # --- changes of membership ----------------------------------------------------------------------------------------

    def _change(self, cell: Cell, reason: str) -> None:
        """End the cell's epoch; another begins when all have said what they keep."""
        self._cells.sequences[cell.name].suspend(self._turn.now)
        cell.suspend(self._turn.now, reason)

    def _go_on(self, cell: Cell) -> None:
        """Begin the next epoch if all is there for it."""
        if cell.is_suspended:
            if cell.was_left:
                self._reclaim(cell)
            self._epoch += 1
            cell.begin_epoch(self._epoch, self._turn.now)
            self._cells.sequences[cell.name].inherit()

    def _end_return(self, cell: Cell) -> None:
        """If all that its last gManager left of the cell is back, go on: with a change of membership like any other."""
        if cell.has_returned:
            self._epoch = max(self._epoch, cell.epoch)
            cell.end_return(self._turn.now)
            self._form(cell)
            self._go_on(cell)

    def _reclaim(self, cell: Cell) -> None:
        """What the members did while there was no gManager: tokens that nobody has, and KV of requests that are known here."""
        sequences = self._cells.sequences[cell.name]
        for unheard in sorted((u for member in cell.members for u in member.unheard), key=lambda u: (u.request, u.index)):
            request = self._requests.by_number(unheard.request)
            if request is not None and request.is_restored and request.state == "queued" and request.cell_number == cell.number:
                sequences.take_unheard(request, unheard)
        sequences.reclaim(
            {request: seq for seq, request in sorted(item for member in cell.members for item in member.requests.items())}
        )

    def _wanted(self, cell: Cell) -> Collection[int]:
        """Sequences whose KV is to be kept in the cell's next epoch."""
        sequences = self._cells.sequences.get(cell.name)
        return () if sequences is None else sequences.kept_seqs

    def _on_broken(self, cell: Cell, member: Member, reason: str) -> None:
        """A member can't step in its epoch: most often it is another's end that it tells of."""
        if cell.is_formed and cell.attempts < MAX_ATTEMPTS:
            self._change(cell, f"{member.name} can't go on: {reason}")
        else:
            self._fail(cell, f"{member.name} can't go on: {reason}")

    def _lose_member(self, peer: PeerId, reason: str, level: int = logging.ERROR) -> None:
        """`level`: of the log, if the cell is over with it: no error if it was asked to end."""
        cell, member = self._members.pop(peer)
        if not cell.can_lose(member):
            self._fail(cell, cell.loss or reason, lost=member, level=level)
            return
        self._turn.log(logging.WARNING, "instance left", cell=cell.name, reason=reason)
        was_member = member in cell.members
        cell.remove(member)
        drains.answer(member, self._turn.emit, reason)
        if cell.is_formed:
            drains.call_off(cell, self._turn.emit)
        if not cell.everybody:
            self._cells.remove(cell)
            self._turn.emit(DropText(cell.number))
        elif cell.phase == "returning":
            self._end_return(cell)
        elif cell.is_formed and was_member:
            cell.loss = cell.loss or reason
            if cell.phase != "suspending":
                self._change(cell, reason)
            self._go_on(cell)

    def _let_go(self, cell: Cell, member: Member) -> None:
        """A member that was drained leaves; what it still has is computed again, as after a loss."""
        reason = f"{member.name} was drained"
        del self._members[member.peer]
        cell.remove(member)
        cell.loss = cell.loss or reason
        self._parting.part(member.peer, m.Drained(reason=reason))
        drains.answer(member, self._turn.emit, None)
        self._change(cell, reason)
        self._go_on(cell)

    def _fail(self, cell: Cell, reason: str, lost: Member | None = None, level: int = logging.ERROR) -> None:
        """The cell is over, and with it every request bound to it."""
        self._turn.log(level, "cell over", cell=cell.name, epoch=cell.epoch, reason=reason)
        for member in cell.everybody:
            drains.answer(member, self._turn.emit, reason)
        for member in cell.everybody:
            if member is not lost:
                del self._members[member.peer]
                self._parting.part(member.peer, m.EndEpoch(epoch=cell.epoch, reason=reason))
        for request in self._requests.live():
            if request.cell_number == cell.number:
                self._requests.finish(request, "error", error=reason)
        self._cells.remove(cell)
        self._turn.emit(DropText(cell.number))

    # --- time ---------------------------------------------------------------------------------------------------------

    def _on_tick(self) -> None:
        now = self._turn.now
        if self._ticked_at is not None and now - self._ticked_at > STALL_S:
            self._turn.log(logging.WARNING, "gManager stood still", seconds=round(now - self._ticked_at, 1))
            self._clients.renew_leases()
            for _, member in self._members.values():
                member.heard_at = now
        self._ticked_at = now
        self._end_leases(now)
        for cell in self._cells:
            self._look_after(cell)
        self._clients.end_attaching()
        self._intake.end_overdue()

    def _look_after(self, cell: Cell) -> None:
        """What of a cell takes too long."""
        took, limit = self._turn.now - cell.began_at, self._config.form_timeout_s
        if cell.phase == "returning" and took > RETURN_GRACE_S:
            cell.give_up_absent()
            self._end_return(cell)
        if cell.phase == "suspending" and took > SUSPEND_TIMEOUT_S:
            self._leave_behind(cell, cell.missing, f"did not end its epoch within {SUSPEND_TIMEOUT_S:g} s")
        elif cell.phase in ("opening", "joining") and took > limit:
            if cell.is_formed:
                self._leave_behind(cell, cell.missing, f"did not join within {limit:g} s")
                return
            missing = [member.rank for member in cell.members if not member.joined]
            what = f"instances {missing} have not joined" if missing else "its tokenizer is not loaded"
            self._fail(cell, f"cell '{cell.name}' was not ready within {limit:g} s: {what}")
        elif (broken := cell.broken_link(self._turn.now)) is not None:
            member, reason = broken
            if cell.is_formed:
                self._end_membership(member, reason)
            else:
                self._fail(cell, reason)

    def _leave_behind(self, cell: Cell, members: Collection[Member], why: str) -> None:
        for member in members:
            if cell in self._cells:
                self._end_membership(member, f"{member.name} {why}")

    def _end_membership(self, member: Member, reason: str) -> None:
        """Go on without an instance that may still run, and may come again."""
        self._lose_member(member.peer, reason)
        self._parting.expel(member.peer, reason)

    def _end_leases(self, now: float) -> None:
        self._clients.end_leases()
        for peer, (_, member) in list(self._members.items()):
            if peer in self._members and now - member.heard_at > self._config.instance_lease_s:
                self._end_membership(member, f"{member.name} was not heard for {self._config.instance_lease_s:g} s")
        self._parting.end_leases(self._config.client_lease_s)

    def _on_stop(self, reason: str) -> None:
        if self._term:
            return  # the next gManager of the journal goes on with all of it, as if this one had been killed
        for request in self._requests.live():
            self._intake.end(request, "error", reason)
        for cell in self._cells:
            self._fail(cell, reason)

    # --- for others to see --------------------------------------------------------------------------------------------

    def stats(self) -> m.Stats:
        """The service's state now."""
        own = m.Counters.sum(m.Counters(dropped_messages=self._num_dropped), self._cells.counters())
        requests = self._requests.stats()
        return assemble(self._cells, self._cells.sequences, requests, own, self._requests.observed.observations())

    @property
    def is_idle(self) -> bool:
        """Whether no request is live and no instance holds anything for one."""
        return not len(self._requests) and all(sequences.is_idle for sequences in self._cells.sequences.values())

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other. Tests call it after every event."""
        self._requests.validate()
        for cell in self._cells:
            cell.validate()
            if cell.is_formed != (cell.name in self._cells.sequences):
                raise RuntimeError(f"cell '{cell.name}' is {cell.phase}, its sequences don't know")
            for member in cell.everybody:
                if self._members.get(member.peer) != (cell, member):
                    raise RuntimeError(f"{member.name} is no known peer")
        if len(self._members) != sum(len(cell.everybody) for cell in self._cells):
            raise RuntimeError("there are instances without a cell")
        roles = [*self._clients.peers, *self._members, *self._parting.peers]
        if len(set(roles)) != len(roles):
            raise RuntimeError("a peer has two roles")
        for sequences in self._cells.sequences.values():
            sequences.validate()
        self._clients.validate()
        self._intake.validate()


def _have_wrong_tokens(parts: Iterable[m.SequenceOutput | m.Unheard]) -> bool:
    return any(not 0 <= token < 2**32 for part in parts for token in part.token_ids)
