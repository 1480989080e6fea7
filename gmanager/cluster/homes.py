"""Where the sequences of a cell go on: what clients, full homes and drains want, and the changes of home that come of it. Pure.

wish, NeedBlock, drain ──next_of──> a target ──Reserve, Granted──> begin: MoveSequence ──HomeMoved──> on_moved
                           │
                           └── no room: somebody makes way, and it is tried again
"""

from collections.abc import Callable

from gmanager.cluster.cell import Cell
from gmanager.cluster.events import Emit, Send
from gmanager.cluster.member import Member
from gmanager.cluster.moves import Moves
from gmanager.cluster.placement import Candidate, choose_target
from gmanager.cluster.request import MoveCall, Request
from gmanager.cluster.requests import Requests
from gmanager.cluster.running import Running, in_order
from gmanager.cluster.sequence import Sequence, told_of
from gmanager.cluster.waiting import Waiting
from gmanager.wire.messages import Done, MoveSequence


def candidate(sequence: Sequence) -> Candidate:
    """As somebody who may be preempted."""
    request = sequence.request
    return Candidate(sequence.number, request.number, request.num_tokens, sequence.home, request.priority, sequence.left)


class Homes:
    """Of one cell's sequences, through all its epochs."""

    def __init__(
        self,
        cell: Cell,
        requests: Requests,
        running: Running,
        waiting: Waiting,
        emit: Emit,
        make_way: Callable[[Sequence, bool], None],
    ) -> None:
        """`make_way`: preempt a sequence, because there is no block at all in the cell or because it is cheapest so."""
        self._cell = cell
        self._requests = requests
        self._running = running
        self._waiting = waiting
        self._emit = emit
        self._make_way = make_way
        self._restless: dict[int, Sequence] = {}
        """Those that may want another home."""

    def clear(self) -> None:
        """The epoch is over."""
        self._restless.clear()

    def _rank(self, number: int) -> int | None:
        """Of the member with this id, in the epoch; None if there is none."""
        return next((member.rank for member in self._cell.members if member.id == number), None)

    # --- who wants another --------------------------------------------------------------------------------------------

    def wish(self, request: Request, call: MoveCall) -> bool:
        """A client wants another home for a request. Answered when it has moved, or can't. Whether that is to be tried."""
        target = self._rank(call.target)
        sequence = self._running.get(request.seq) if request.is_running else None
        request.move_call = call
        if target is None:
            ids = ", ".join(str(member.id) for member in self._cell.members)
            self._requests.fail_move(request, f"there is no instance {call.target}; cell '{self._cell.name}' has {ids}")
        elif sequence is None or sequence.ending:
            self._requests.fail_move(request, f"request {request.id!r} has no home now: it is {request.shown_state}")
        elif sequence.moving_to is None and sequence.home == target:
            self._answer(sequence)
        else:
            self._restless[sequence.number] = sequence
            return True
        return False

    def on_need_block(self, member: Member, seq: int) -> bool:
        """A home has none left for a sequence's next token. Whether that is news."""
        sequence = self._running.get(seq)
        if sequence is None or sequence.ending:
            return False
        if member.rank != sequence.home:
            self._running.num_dropped += 1
            return False
        member.hear_free(0)
        sequence.needs_block = True
        self._running.touch(sequence)
        self._restless[sequence.number] = sequence
        return True

    def restless(self) -> list[Sequence]:
        """For want of a block, or because a client asked, while nobody is drained: the oldest first."""
        if self._restless:
            wishes = {n: s for n, s in self._restless.items() if s.needs_block or s.request.move_call is not None}
            self._restless = {n: s for n, s in wishes.items() if not s.ending and self._running.get(n) is s}
        return in_order(self._restless.values())

    # --- which --------------------------------------------------------------------------------------------------------

    def next_of(self, sequence: Sequence, moves: Moves) -> int | None:
        """Where it should go on, as things are now; None: where it is, till something changes."""
        call, members = sequence.request.move_call, self._cell.members
        if sequence.ending or sequence.moving_to is not None or moves.concerns(sequence):
            return None
        if call is not None:
            return self._called_for(sequence, call)
        if sequence.needs_block and not members[sequence.home].room:
            return self._with_room(sequence)
        if members[sequence.home].is_draining and sequence.is_written:
            return choose_target(self._running.views(), home=sequence.home, reserve=1)
        return None

    def _called_for(self, sequence: Sequence, call: MoveCall) -> int | None:
        target = self._rank(call.target)
        if target is None:
            return None
        homes, member = self._running.homes(target), self._cell.members[target]
        if member.is_draining:
            self._requests.fail_move(sequence.request, f"instance {call.target} is being drained")
        elif homes >= member.spec.decode_rows:
            reason = f"instance {call.target} decodes {homes} sequences, as many as it can"
            self._requests.fail_move(sequence.request, reason)
        else:
            return target
        return None

    def _with_room(self, sequence: Sequence) -> int | None:
        """Its home has no block left for it: another home, or None if somebody must make (or is making) room first."""
        views, policy, home = self._running.views(), self._cell.policy, sequence.home
        target = policy.next_home(views, home)
        if target is not None:
            own = [other for other in self._running.all() if home in other.participants]
            its = sequence.request.priority, sequence.request.number
            # none gives way to one of a lower priority; of whom most lies elsewhere, little would be free here
            after = [s for s in own if s.home == home and (s.request.priority, s.request.number) > its]
            at_home = [
                candidate(s) for s in (sequence, *after) if 2 * s.held.get(home, 0) >= s.request.num_tokens or s is sequence
            ]
            gives_way = policy.gives_way(candidate(sequence), at_home, target, self._waiting.outlook(views))
            if gives_way is None:
                return target
            blocks_come = self._cell.members[home].is_freeing or any(other.ending for other in own)
            if not blocks_come and not self._waiting.give_up_kept():
                self._make_way(self._running[gives_way], False)
            return None
        if self._running.blocks_come or self._waiting.give_up_kept():
            return None
        victim = policy.victim(map(candidate, self._running.all()), home)
        if victim is None:
            target = policy.last_resort(views, home)
        if target is None:
            self._make_way(sequence if victim is None else self._running[victim], True)
        return target

    # --- how it moves -------------------------------------------------------------------------------------------------

    def begin(self, sequence: Sequence, target: int) -> None:
        """There is room at its next home."""
        self._running.join(sequence, target)
        sequence.moving_to = target
        self._running.touch(sequence)
        home = self._cell.members[sequence.home].peer
        self._emit(Send(home, MoveSequence(epoch=self._cell.epoch, seq=sequence.number, to=target)))

    def on_moved(self, seq: int, home: int) -> bool:
        """It goes on there. Whether that can be."""
        sequence = self._running.get(seq)
        if sequence is None or home not in sequence.participants:
            self._running.num_dropped += 1
            return False
        sequence.home = home
        sequence.is_written = False
        sequence.moving_to = None
        sequence.needs_block = False
        self._running.touch(sequence)
        if sequence.is_current:
            sequence.request.home = self._cell.id_of(home)
            sequence.request.home_moves += 1
            self._emit(told_of(sequence, "home moved", home=self._cell.id_of(home)))
        if not sequence.ending:
            self.rest(sequence)
            # A call for another instance came while this move was under way: it is tried next.
            self._answer(sequence)
        return True

    def rest(self, sequence: Sequence) -> None:
        """Its move is over."""
        if sequence.is_current and sequence.request.state == "moving":
            self._requests.change(sequence.request, "rest" if sequence.received else "rest early")

    def _answer(self, sequence: Sequence) -> None:
        request = sequence.request
        call = request.move_call
        if call is not None and call.target == self._cell.id_of(sequence.home):
            request.move_call = None
            self._emit(Send(call.peer, Done(call=call.call)))
