"""The main loops of an instance's lanes: notices, steps, results.

Each is two deep: while the device runs step n, the CPU proposes, exchanges, derives and queues step n+1; where a model's layers
are split into stages, it is deeper by those behind the first. The loops share a
`Scheduler`, which keeps their steps apart, and the device's processors; each has its own party, process group and runner.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from distattn.budget import StepBudget
from instance.calibrate import Room, calibrate
from instance.elastic_tp import SplitRule
from instance.errors import StepTimeout
from instance.party import Parties, Party
from instance.pipelining import under_way
from instance.plan import StepPlan
from instance.runner import Launched, Runner, StepResult, Times
from instance.samples import StepLog
from instance.scheduler import Scheduler
from instance.sharing import Load, Sharing
from instance.step import Lane, Notice, derive


class Lanes:
    """The loops of one instance, within one epoch."""

    def __init__(
        self,
        *,
        parties: Parties,
        scheduler: Scheduler,
        runners: Mapping[Lane, Runner],
        sharing: Sharing | None,
        budgets: Sequence[StepBudget],
        timeout_s: float,
        stages: int = 1,
        split_rule: SplitRule | None = None,
    ) -> None:
        """`sharing`: of a GPU's processors. `budgets`: of what is copied beside steps. `timeout_s`: longest that the device may
        take for a step. `stages`: that each goes through. `split_rule`: when the feeds of decodes are split between members."""
        self.parties = parties
        self.scheduler = scheduler
        self.log = StepLog()
        self._budgets = budgets
        self._sharing = sharing
        self._loops = {
            lane: LaneLoop(
                lane,
                parties[lane],
                scheduler,
                runner,
                self.log,
                self._processors,
                timeout_s,
                stages,
                split_rule if lane == "decode" else None,
            )
            for lane, runner in runners.items()
        }

    def __getitem__(self, lane: Lane) -> "LaneLoop":
        return self._loops[lane]

    def __iter__(self) -> "Iterator[LaneLoop]":
        return iter(self._loops.values())

    async def run(self, on_progress: Callable[[], None]) -> None:
        """Step for ever; `on_progress` is called when anything has changed.

        Raises, in a group, what breaks: StepTimeout, PartyTimeout, what the device or the other instances bring.
        """

        def progress() -> None:
            self.parties.wake()  # what a lane has done may be work for the other
            for budget in self._budgets:
                weights = {"prefill": budget.prompt_weight, "decode": 1}
                steps = sum(loop.steps_run * weights[loop.lane] for loop in self)
                budget.tell(steps, is_busy=any(loop.is_running for loop in self))
            on_progress()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.parties.run())
            for loop in self:
                tasks.create_task(loop.run(tasks, progress))

    async def calibrate(self, room: Room) -> None:
        """Run some made-up steps before the first real one. Raises what breaks."""
        await calibrate(room, lambda lane, plan: self[lane].try_out(plan), self.log.note)
        for loop in self:
            loop.runner.times = Times()

    def _processors(self, lane: Lane, notices: Sequence[Notice], plan: StepPlan) -> int:
        """Those that the lane's next step gets."""
        if self._sharing is None:
            return 0
        if lane == "decode":
            return self._sharing.for_decode(Load.of(plan.layout), prefill_is_busy=self["prefill"].is_running)
        # others' decodes may read here, too
        decodes = self["decode"].is_running or any(notice.both_lanes for notice in notices)
        return self._sharing.for_prefill(decodes_meanwhile=decodes)


@dataclass(slots=True)
class LaneLoop:
    """One lane of one instance, within one epoch."""

    lane: Lane
    party: Party
    scheduler: Scheduler
    runner: Runner
    _log: StepLog
    _processors: Callable[[Lane, Sequence[Notice], StepPlan], int]
    _timeout_s: float
    _stages: int = 1
    split_rule: SplitRule | None = None
    """Of all members' loops the same. To be changed while nothing runs only."""
    notice_ns: int = 0
    """How long it has waited for the notices of its party's others."""
    steps_run: int = 0
    """Steps whose results are known."""
    _running: deque[asyncio.Future[Launched]] = field(default_factory=deque)
    """The steps on the device, the oldest first."""
    _reading: asyncio.Task[StepResult] | None = None
    """Who waits for the oldest."""

    @property
    def is_running(self) -> bool:
        """Whether the result of a step is still to be taken."""
        return bool(self._running)

    @property
    def has_work(self) -> bool:
        """Whether there is a reason for another step."""
        return self.party.is_called or self.scheduler.has_work(self.lane, self.party.members)

    async def run(self, tasks: asyncio.TaskGroup, on_progress: Callable[[], None]) -> None:
        """Step for ever. Raises what breaks."""
        while True:
            if await self._turn(tasks):
                on_progress()
            elif not self._running:
                self.party.woken.clear()
                await self.party.woken.wait()

    async def try_out(self, plan: StepPlan) -> int:
        """Run a made-up step by itself. Nanoseconds in which the device ran it."""
        launched = self.runner.launch(plan, self._processors(self.lane, (), plan))
        return (await self._result_of(launched)).step_ns

    async def _turn(self, tasks: asyncio.TaskGroup) -> bool:
        """Launch the next step, if there is work, and take the result of one before that the stages have no more room for.
        False: there was nothing to do, or only something new to look at."""
        if self.has_work:
            launched = await self._launch()
            if launched is None:
                return True
            tasks.create_task(_fail_with(launched))
            self._running.append(launched)
            if len(self._running) < under_way(self._stages):
                return True
        elif not self._running or (len(self._running) < self._stages and not await self._oldest_is_over(tasks)):
            return False
        result = await (self._result_of(self._running[0]) if self._reading is None else self._reading)
        self._reading = None
        self._running.popleft()
        self._log.ended(self.lane, result.step_ns, time.perf_counter_ns())
        self.scheduler.commit(self.lane, result.tokens, result.scored)
        self.steps_run += 1
        return True

    async def _oldest_is_over(self, tasks: asyncio.TaskGroup) -> bool:
        """Wait for the oldest step's result, or until something is new: the first stage may have nothing to do."""
        self.party.woken.clear()
        if self._reading is None:
            self._reading = tasks.create_task(self._result_of(self._running[0]))
        woken = asyncio.create_task(self.party.woken.wait())
        try:
            await asyncio.wait((self._reading, woken), return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
        return self._reading.done()

    async def _launch(self) -> asyncio.Future[Launched] | None:
        """Queue the party's next step; None if the party changed instead."""
        party, scheduler = self.party, self.scheduler
        notice = scheduler.propose(
            self.lane,
            party.members,
            party=party.grouping.number,
            step=party.step,
            digest=party.digest,
            groupings=party.news(),
        )
        asked_ns = time.perf_counter_ns()
        notices = await party.exchange(notice)
        self.notice_ns += time.perf_counter_ns() - asked_ns
        if notices is None:
            return None
        step = derive(notices, scheduler.known(self.lane), self.split_rule)
        plan = scheduler.accept(self.lane, step)
        launched = self.runner.launch(plan, self._processors(self.lane, notices, plan))
        self._log.launched(self.lane, plan.layout)
        party.advance(step.digest(), rest=step.is_empty())
        return launched

    async def _result_of(self, running: asyncio.Future[Launched]) -> StepResult:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self.runner.result_of(running)
        except TimeoutError:
            raise StepTimeout(f"the device did not end a step within {self._timeout_s:.0f} s") from None


async def _fail_with(launched: asyncio.Future[Launched]) -> None:
    """A step that breaks is noticed at once, also while the loop waits for others to come to the next."""
    await launched
