"""Who steps with whom: the effect of `instance.party`, without its messages.

In each lane the members of a party come to its table when they are free for another step. Once all are there, and one of them
has work, they meet: each proposes, all derive the same step, each accepts its part. A member's loop is two deep as in
`instance.lane`: it comes back when the step before has run and is committed, while the device runs the new one.

What differs from the real thing: notices are made when the round is complete, not when each member comes, so they tell of what
was heard meanwhile; and `derive` runs once for all, on the first one's view of what is known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gmanager.wire.messages import TokenLogprob
from instance.plan import StepPlan
from instance.sharing import Load as Reading
from instance.step import Grouping, Lane, derive
from simulation.clock import Clock
from simulation.copies import Copies
from simulation.counting import Counting
from simulation.device import Group, Part, run_together
from simulation.times import Load, Profile

if TYPE_CHECKING:
    from simulation.instance import Instance

TOKEN = TokenLogprob(token_id=1, logprob=0.0, rank=0)
"""What every step samples: nothing depends on it."""


@dataclass(eq=False, slots=True)
class Launched:
    """A member's part in a step that is not committed."""

    part: Part
    load: Load
    sampled: list[int]
    """Sequences of which it yields a token."""


@dataclass(eq=False, slots=True)
class Seat:
    """One instance in one lane."""

    instance: "Instance"
    lane: Lane
    table: "Table"
    is_free: bool = True
    """For another step of the party."""
    running: Launched | None = None
    """Whose result it takes next."""
    behind: Launched | None = None


@dataclass(eq=False, slots=True)
class Table:
    """A party in one lane."""

    lane: Lane
    number: int
    members: list[int]
    step: int = 0
    is_called: bool = False
    """All come to the next round, whether they have work or not."""
    is_meeting: bool = False
    present: dict[int, Seat] = field(default_factory=dict)
    """rank -> who is at it and free."""


class Parties:
    """Those of one cell, within its epoch."""

    def __init__(self, clock: Clock, profile: Profile) -> None:
        self.num_rounds = 0
        self.counting = Counting()
        self.copies = Copies(clock, profile)
        self._clock = clock
        self._profile = profile
        self._tables: dict[tuple[Lane, int, int], Table] = {}

    def enter(self, instance: "Instance", rank: int, lane: Lane) -> Seat:
        """Take part, alone to begin with."""
        table = Table(lane, 0, [rank])
        seat = Seat(instance, lane, table)
        table.present[rank] = seat
        return seat

    def look(self, seat: Seat) -> None:
        """Something has changed for it: perhaps it can go on."""
        if not seat.is_free:
            return
        self._change_party(seat)
        table = seat.table
        if table.is_meeting:
            return
        if not self._has_work(table):
            for each in list(table.present.values()):
                self._wait(each)
        elif len(table.present) == len(table.members):
            table.is_meeting = True
            latency = self._profile.meet_s if len(table.members) > 1 else self._profile.host_s
            self._clock.after(latency, lambda: self._meet(table))

    def _change_party(self, seat: Seat) -> None:
        """If it has heard of a newer one. A round that was to be is off then: the others go to parties of that number, too."""
        newest = seat.instance.newest
        if newest.number <= seat.table.number:
            return
        rank = seat.instance.rank
        seat.table.present.pop(rank, None)
        seat.table = self._table(seat.lane, newest)
        seat.table.present[rank] = seat

    def _table(self, lane: Lane, grouping: Grouping) -> Table:
        key = lane, grouping.number, grouping.members[0]
        if key not in self._tables:
            members = list(grouping.members)
            self._tables[key] = Table(lane, grouping.number, members, is_called=len(members) > 1)
        return self._tables[key]

    @staticmethod
    def _has_work(table: Table) -> bool:
        if table.is_called:
            return True
        return any(seat.instance.scheduler.has_work(table.lane, table.members) for seat in table.present.values())

    def _wait(self, seat: Seat) -> None:
        """There is no step to begin: take the result of the one that runs, if there is one."""
        if seat.running is None:
            return
        seat.is_free = False
        seat.table.present.pop(seat.instance.rank, None)
        self._await_result(seat)

    def _await_result(self, seat: Seat) -> None:
        running = seat.running
        if running is None or running.part.is_over:
            self._clock.after(0.0, lambda: self._take_result(seat))  # not before all parts of the step are accepted
        else:
            running.part.on_over = lambda: self._take_result(seat)

    def _take_result(self, seat: Seat) -> None:
        """Commit the step before, and come back for another."""
        over, seat.running, seat.behind = seat.running, seat.behind, None
        if over is not None:
            seat.instance.note_step(over.part, over.load)
            seat.instance.scheduler.commit(seat.lane, dict.fromkeys(over.sampled, TOKEN))
        seat.is_free = True
        seat.table.present[seat.instance.rank] = seat
        if over is not None:
            seat.instance.tell_progress()
        self.look(seat)

    def _meet(self, table: Table) -> None:
        """A round: all members' next step."""
        table.is_meeting = False
        seats = [table.present[rank] for rank in table.members if rank in table.present]
        superseded = [seat for seat in seats if seat.instance.newest.number > table.number]
        if superseded or len(seats) < len(table.members):
            for seat in superseded:
                self.look(seat)
            return
        notices = [
            seat.instance.scheduler.propose(
                table.lane, table.members, party=table.number, step=table.step, digest=[], groupings=[]
            )
            for seat in seats
        ]
        step = derive(notices, seats[0].instance.scheduler.known(table.lane))
        plans = [seat.instance.scheduler.accept(table.lane, step) for seat in seats]
        table.step += 1
        table.is_called = len(seats) > 1 and not step.is_empty()
        self.num_rounds += 1
        for seat, plan, launched in zip(seats, plans, self._launch(table, seats, plans), strict=True):
            launched.sampled += [row.seq for row in plan.sampled]
            seat.is_free = False
            if seat.running is None:
                seat.running = launched
                self._clock.after(0.0, _Return(self, seat))
            else:
                seat.behind = launched
                self._await_result(seat)
            seat.instance.tell_budget()
        table.present.clear()

    def _come_back(self, seat: Seat) -> None:
        """At once: no step before this one is under way."""
        seat.is_free = True
        seat.table.present[seat.instance.rank] = seat
        self.look(seat)

    def _launch(self, table: Table, seats: Sequence[Seat], plans: Sequence[StepPlan]) -> list[Launched]:
        partners = {
            rank: {*plan.layout.dispatched, *plan.layout.received} for rank, plan in zip(table.members, plans, strict=True)
        }
        launched: dict[int, Launched] = {}
        for rank, seat, plan in zip(table.members, seats, plans, strict=True):
            load = load_of(plan)
            work_s = self._profile.step_s(table.lane, load)
            launched[rank] = Launched(Part(seat.instance.device, table.lane, work_s, Group()), load, [])
        for ranks in _connected(partners):
            together = [launched[rank].part for rank in ranks]
            for part in together[1:]:
                part.group = together[0].group
            run_together(together)
        return [launched[rank] for rank in table.members]


@dataclass(frozen=True, slots=True)
class _Return:
    """To the table, for the second step of two."""

    parties: Parties
    seat: Seat

    def __call__(self) -> None:
        self.parties._come_back(self.seat)


def load_of(plan: StepPlan) -> Load:
    """What an instance does in a step."""
    layout = plan.layout
    return Load(layout.num_rows, Reading.of(layout).kv_tokens, sum(layout.dispatched.values()), layout.num_received)


def _connected(partners: Mapping[int, set[int]]) -> list[list[int]]:
    """Who exchanges rows with whom, directly or through others; ascending."""
    groups: list[list[int]] = []
    seen: set[int] = set()
    for rank in partners:
        if rank in seen:
            continue
        group, todo = {rank}, [rank]
        while todo:
            more = partners[todo.pop()] - group
            group |= more
            todo += sorted(more)
        seen |= group
        groups.append(sorted(group))
    return groups
