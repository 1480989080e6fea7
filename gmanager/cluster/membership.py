"""Which instances are members of which cell: who comes, who leaves or is lost, and what becomes of the cell then.

A change of membership is the same whatever brought it about: the epoch ends (`_change`), all say what they keep, and the next
one begins (`go_on`). A cell that loses one while it forms, its last one, or the means to go on is over (`fail`).
"""

import logging
from collections.abc import Callable, Collection

from gmanager.cluster import drains
from gmanager.cluster.cell import MAX_ATTEMPTS, RETURN_GRACE_S, SUSPEND_TIMEOUT_S, Cell
from gmanager.cluster.cells import Cells
from gmanager.cluster.events import DropText
from gmanager.cluster.member import Member
from gmanager.cluster.parting import Parting
from gmanager.cluster.policies import POLICIES
from gmanager.cluster.registration import malformed
from gmanager.cluster.requests import Requests
from gmanager.cluster.sequences import Sequences
from gmanager.cluster.turn import Turn
from gmanager.config import GManagerConfig
from gmanager.wire.messages import Drained, EndEpoch, Refused, Register
from gmanager.wire.peer import PeerId

NEWCOMERS_ATTEMPTS = 2
"""Epochs that are begun with instances that have just come, until the others go on without them."""
NEWCOMERS_S = 60.0
"""Longest that those may take to meet the others, who serve nobody meanwhile."""

EPOCHS_PER_TERM = 10**6
"""So the epochs of all gManagers that serve from one journal are different ones."""


class Membership:
    """All instances, and the epochs of their cells."""

    def __init__(
        self,
        config: GManagerConfig,
        requests: Requests,
        cells: Cells,
        parting: Parting,
        turn: Turn,
        on_formed: Callable[[], None],
        *,
        term: int,
        identity: int,
    ) -> None:
        """`on_formed`: is called when requests can be bound to another cell. `term`: of the journal; 0: there is none.
        `identity`: of the journal, or of this gManager."""
        self._config = config
        self._requests = requests
        self._cells = cells
        self._parting = parting
        self._turn = turn
        self._on_formed = on_formed
        self._term = term
        self._identity = identity
        self._epoch = term * EPOCHS_PER_TERM
        self._members: dict[PeerId, tuple[Cell, Member]] = {}

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._members

    def __getitem__(self, peer: PeerId) -> tuple[Cell, Member]:
        """Its cell, and what is known of it."""
        return self._members[peer]

    @property
    def peers(self) -> Collection[PeerId]:
        return self._members.keys()

    # --- who comes ----------------------------------------------------------------------------------------------------

    def register(self, peer: PeerId, register: Register) -> None:
        """An instance comes, or comes again; it is refused if it can't be a member."""
        cell = self._cells.get(register.cell)
        if cell is not None and (before := cell.predecessor(register)) is not None:
            self._expect_back(before.peer, f"{before.name} comes again")
            cell = self._cells.get(register.cell)
        reason = malformed(register) or (cell.refusal(register) if cell is not None else None)
        if reason is not None:
            self._turn.log(logging.WARNING, "instance refused", reason=reason)
            self._parting.part(peer, Refused(reason=reason))
            return
        former = register.former
        if former is not None and former.identity == self._identity and former.term > self._term:
            self._turn.log(logging.ERROR, "instance has served a later gManager", term=former.term, own=self._term)
            self._parting.part(peer)  # what this one says would only mislead it
            return
        if former is not None and cell is not None and cell.phase not in ("registering", "returning"):
            self._parting.expel(peer, f"cell '{cell.name}' has gone on without this instance")
            return
        if cell is None:
            self._epoch += 1
            cell = Cell(
                self._epoch,
                register,
                self._turn.emit,
                POLICIES[self._config.policy](),
                term=self._term,
                identity=self._identity,
                caches=self._config.prefix_cache,
            )
            self._cells.add(cell)
        self._parting.forget(peer)  # it comes again, if it was expelled
        member = cell.add(peer, register, self._turn.now, self._config.instance_lease_s)
        self._members[peer] = cell, member
        if cell.is_ready and cell.joiners:
            self._change(cell, f"{member.name} comes")
        self._end_return(cell)

    # --- an epoch begins ----------------------------------------------------------------------------------------------

    def on_text_loaded(self, number: int, error: str | None) -> None:
        """The text assets of the cell of that number can be used, or not."""
        cell = self._cells.by_number(number)
        if cell is None:
            return
        if error is not None:
            self.fail(cell, f"the tokenizer of cell '{cell.name}' can't be used: {error}")
            return
        cell.set_text_loaded()
        self._end_return(cell)
        self.check_ready(cell)

    def check_ready(self, cell: Cell) -> None:
        """Let it run if it steps now."""
        if not cell.is_ready:
            return
        if cell.name not in self._cells.sequences:
            self._form(cell)
        self._cells.sequences[cell.name].resume()
        if cell.joiners:  # who came meanwhile
            self._change(cell, f"{cell.joiners[0].name} comes")

    def _form(self, cell: Cell) -> None:
        """From now on requests can be bound to it."""
        self._cells.form(cell, Sequences(cell, self._requests, self._turn.emit))
        self._on_formed()

    # --- a change -----------------------------------------------------------------------------------------------------

    def _change(self, cell: Cell, reason: str) -> None:
        """End the cell's epoch; another begins when all have said what they keep."""
        self._cells.sequences[cell.name].suspend(self._turn.now)
        cell.suspend(self._turn.now, reason)

    def go_on(self, cell: Cell) -> None:
        """Begin the next epoch if all is there for it."""
        if cell.is_suspended:
            if cell.was_left:
                self._reclaim(cell)
            self._epoch += 1
            cell.begin_epoch(self._epoch, self._turn.now)
            self._cells.sequences[cell.name].inherit()

    def _end_return(self, cell: Cell) -> None:
        """If all are back, go on: with a change of membership like any other."""
        if not cell.has_returned:
            return
        if not cell.everybody:
            self.fail(cell, f"{cell.loss}, and none of the cell came back within {RETURN_GRACE_S:g} s")
            return
        self._epoch = max(self._epoch, cell.epoch)
        cell.end_return(self._turn.now)
        if cell.name not in self._cells.sequences:  # another gManager's
            self._form(cell)
        self.go_on(cell)

    def _reclaim(self, cell: Cell) -> None:
        """What the members did while there was no gManager: tokens that nobody has, and KV of requests that are known here."""
        sequences = self._cells.sequences[cell.name]
        for unheard in sorted((u for member in cell.members for u in member.unheard), key=lambda u: (u.request, u.index)):
            request = self._requests.by_number(unheard.request)
            if request is not None and request.state == "queued" and request.cell_number == cell.number:
                sequences.take_unheard(request, unheard)
        sequences.reclaim(
            {request: seq for seq, request in sorted(item for member in cell.members for item in member.requests.items())}
        )

    def wanted(self, cell: Cell) -> Collection[int]:
        """Sequences whose KV is to be kept in the cell's next epoch."""
        sequences = self._cells.sequences.get(cell.name)
        return () if sequences is None else sequences.kept_seqs

    # --- who leaves ---------------------------------------------------------------------------------------------------

    def on_broken(self, cell: Cell, member: Member, reason: str) -> None:
        """A member can't step in its epoch: most often it is another's end that it tells of."""
        if cell.newcomers and cell.attempts >= NEWCOMERS_ATTEMPTS:
            self._refuse_newcomers(cell, f"{member.name} can't go on: {reason}")
        elif cell.is_formed and cell.attempts < MAX_ATTEMPTS:
            self._change(cell, f"{member.name} can't go on: {reason}")
        else:
            self.fail(cell, f"{member.name} can't go on: {reason}")

    def _refuse_newcomers(self, cell: Cell, reason: str) -> None:
        """Those that served before can't step with those that came since, and go on without them."""
        for member in cell.newcomers:
            self._turn.log(logging.ERROR, "instance refused", cell=cell.name, instance=member.id, reason=reason)
            del self._members[member.peer]
            self._remove(cell, member)
            drains.answer(member, self._turn.emit, reason)
            what = f"the others of cell '{cell.name}' can't step with it (does --host name an address that they reach?)"
            self._parting.part(member.peer, Refused(reason=f"{what}: {reason}"))
        cell.newcomers = []
        if not cell.members:
            self.fail(cell, reason)
            return
        if cell.phase != "suspending":
            cell.suspend(self._turn.now, reason)
        self.go_on(cell)

    def _expect_back(self, peer: PeerId, reason: str) -> None:
        """An instance has given its connection up, as it heard nothing of this gManager, or nothing is heard of it and it is
        the last: it goes on with what it has. So does the cell once it is here again."""
        cell, member = self._members[peer]
        if not cell.is_formed or member not in cell.members or cell.phase in ("opening", "joining"):
            self.lose(peer, reason)
            return
        del self._members[peer]
        if cell.is_ready:
            self._cells.sequences[cell.name].suspend(self._turn.now)
        cell.await_return(member, self._turn.now, reason)
        drains.answer(member, self._turn.emit, reason)
        self._parting.part(peer)

    def lose(self, peer: PeerId, reason: str, level: int = logging.ERROR) -> None:
        """An instance is gone, or done for. `level`: of the log, if the cell is over with it; no error if it was asked to."""
        cell, member = self._members.pop(peer)
        reason = cell.account(member, reason, self._turn.now, was_asked=level != logging.ERROR)
        if not cell.can_lose(member):
            self.fail(cell, cell.loss or reason, lost=member, level=level)
            return
        self._turn.log(logging.WARNING, "instance left", cell=cell.name, reason=reason)
        was_member = member in cell.members
        self._remove(cell, member)
        drains.answer(member, self._turn.emit, reason)
        if cell.is_formed:
            drains.call_off(cell, self._turn.emit)
        if cell.phase == "returning" and (cell.is_formed or cell.everybody):
            self._end_return(cell)
        elif not cell.everybody:
            self._cells.remove(cell)
            self._turn.emit(DropText(cell.number))
        elif cell.is_formed and was_member:
            cell.loss = cell.loss or reason
            if level == logging.ERROR:
                self._cells.sequences[cell.name].blame(member.id)
            if cell.phase != "suspending":
                cell.suspend(self._turn.now, reason)
            self.go_on(cell)

    def let_go(self) -> None:
        """Let those leave that were drained and are empty, one of each cell."""
        for cell in self._cells:
            if cell.is_ready and (member := self._cells.sequences[cell.name].emptied()) is not None:
                self._let_go(cell, member)

    def _let_go(self, cell: Cell, member: Member) -> None:
        """A member that was drained leaves; what it still has is computed again, as after a loss."""
        reason = f"{member.name} was drained"
        del self._members[member.peer]
        self._remove(cell, member)
        cell.loss = cell.loss or reason
        self._parting.part(member.peer, Drained(reason=reason))
        drains.answer(member, self._turn.emit, None)
        cell.suspend(self._turn.now, reason)
        self.go_on(cell)

    def _remove(self, cell: Cell, member: Member) -> None:
        """From its cell. What runs with it goes back to the queue first, as long as all know who takes part in what."""
        if cell.is_formed and member in cell.members and cell.phase not in ("suspending", "returning"):
            self._cells.sequences[cell.name].suspend(self._turn.now)
        cell.remove(member)

    def fail(self, cell: Cell, reason: str, lost: Member | None = None, level: int = logging.ERROR) -> None:
        """The cell is over, and with it every request bound to it."""
        self._turn.log(level, "cell over", cell=cell.name, epoch=cell.epoch, reason=reason)
        for member in cell.everybody:
            drains.answer(member, self._turn.emit, reason)
        for member in cell.everybody:
            if member is not lost:
                del self._members[member.peer]
                self._parting.part(member.peer, EndEpoch(epoch=cell.epoch, reason=reason))
        for request in self._requests.live():
            if request.cell_number == cell.number:
                self._requests.finish(request, "error", error=reason)
        self._cells.remove(cell)
        self._turn.emit(DropText(cell.number))

    # --- time ---------------------------------------------------------------------------------------------------------

    def renew_leases(self) -> None:
        """All were heard just now, as far as we know."""
        for _, member in self._members.values():
            member.heard_at = self._turn.now

    def end_leases(self) -> None:
        """Go on without those that are silent."""
        lease = self._config.instance_lease_s
        for peer, (cell, member) in list(self._members.items()):
            if peer not in self._members or self._turn.now - member.heard_at <= lease:
                continue
            reason = f"{member.name} was not heard for {lease:g} s"
            if cell.is_formed and cell.everybody == [member]:  # more likely it is us whom nobody reaches
                self._expect_back(peer, reason)
            else:
                self._end_membership(member, reason)

    def look_after(self) -> None:
        """Go on without those that keep their cell waiting."""
        for cell in self._cells:
            self._look_after(cell)

    def _look_after(self, cell: Cell) -> None:
        """What of a cell takes too long."""
        took, limit = self._turn.now - cell.began_at, self._config.form_timeout_s
        if cell.phase == "returning" and took > RETURN_GRACE_S:
            cell.give_up_absent()
            self._end_return(cell)
        if cell.phase == "suspending" and took > SUSPEND_TIMEOUT_S:
            self._leave_behind(cell, cell.missing, f"did not end its epoch within {SUSPEND_TIMEOUT_S:g} s")
        elif cell.phase in ("opening", "joining") and cell.newcomers and took > min(limit, NEWCOMERS_S):
            self._refuse_newcomers(cell, f"they did not meet within {min(limit, NEWCOMERS_S):g} s")
        elif cell.phase in ("opening", "joining") and took > limit:
            if cell.is_formed:
                self._leave_behind(cell, cell.missing, f"did not join within {limit:g} s")
                return
            missing = [member.rank for member in cell.members if not member.joined]
            what = f"instances {missing} have not joined" if missing else "its tokenizer is not loaded"
            self.fail(cell, f"cell '{cell.name}' was not ready within {limit:g} s: {what}")
        elif (broken := cell.broken_link(self._turn.now)) is not None:
            member, reason = broken
            if member in cell.newcomers:
                self._refuse_newcomers(cell, reason)
            elif cell.is_formed:
                self._end_membership(member, reason)
            else:
                self.fail(cell, reason)

    def _leave_behind(self, cell: Cell, members: Collection[Member], why: str) -> None:
        for member in members:
            if cell in self._cells:
                self._end_membership(member, f"{member.name} {why}")

    def _end_membership(self, member: Member, reason: str) -> None:
        """Go on without an instance that may still run, and may come again."""
        self.lose(member.peer, reason)
        self._parting.expel(member.peer, reason)

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other."""
        for cell in self._cells:
            cell.validate()
            if cell.is_formed != (cell.name in self._cells.sequences):
                raise RuntimeError(f"cell '{cell.name}' is {cell.phase}, its sequences don't know")
            for member in cell.everybody:
                if self._members.get(member.peer) != (cell, member):
                    raise RuntimeError(f"{member.name} is no known peer")
        if len(self._members) != sum(len(cell.everybody) for cell in self._cells):
            raise RuntimeError("there are instances without a cell")
