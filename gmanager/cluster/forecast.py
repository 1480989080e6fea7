"""When a request would have its first token, how fast the others would follow, and whether that is good enough: pure.

    it is queued ──memory: others must end──> admitted ──work that goes before it, and its own──> first token

- **Work.** Among the prompts of an instance the short ones go first, but half of each step is a long one's (`instance.step`):
  so what is shorter goes before a prompt, and of what is longer at most as much as it has itself and the shorter have.
- **Memory.** By Little's law all that runs now is gone after the mean time that requests run; a part of it after that part of
  the time. What waits takes its turn first.
- **Refusals.** Who would miss an objective now is told when one like it would not; who would miss it even alone, what the best
  is. A queued request is never dropped: it was accepted.
- **Doubt.** Before `pace.LEAST` were measured, and for a prompt `BEYOND` times as large as any, only the cell's performance
  model knows something, of steps alone: who would need `DOUBT` times what it has is refused. Nor is one refused for ever
  because of what was: while a cell is idle what is expected is halved every `FRESH_S`, until one is taken and measured anew.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gmanager.cluster.cell import Cell
from gmanager.cluster.member import Member
from gmanager.cluster.pace import LEAST, Least, Margin, Mean, Measured, Predictor
from gmanager.cluster.placement import LONG_PROMPT, PARALLEL_EFFICIENCY, InstanceView, prompt_work
from gmanager.cluster.request import Request
from gmanager.cluster.requests import Requests
from gmanager.cluster.running import Running
from gmanager.cluster.sequence import Sequence as SequenceState
from gmanager.cluster.sequence import works_of
from gmanager.cluster.waiting import Waiting
from gmanager.wire.messages import Outputs, Refusal

BEYOND = 4
"""A prompt with so many times the work of any that was measured is none of which something is known."""
DOUBT = 2.0
"""By how much the performance model is believed to be wrong at most, of requests that it has seen none like."""
FRESH_S = 60.0
"""So long what was measured holds in an idle cell; then its half, for as long again, and so on."""
WINDOW = 16
"""Tokens of a sequence over which steps are timed: single messages come together now and then."""
RETRY_S = 1.0
"""Told where nothing better is known."""


@dataclass(slots=True)
class _Window:
    """Consecutive steps of one home, timed by one of its sequences."""

    seq: int
    since: float
    tokens: int = 0
    rows: int = 0
    """Sum over its messages."""
    messages: int = 0


@dataclass(frozen=True, slots=True)
class _Load:
    """What a request would find."""

    work: float
    """Till its first token, once it is admitted: at the instance that has most of it."""
    wait_s: float
    """For memory."""
    rows: int
    """That its home would decode, it included."""


class Forecast:
    """Of one cell, through all its epochs."""

    def __init__(self, cell: Cell, running: Running, waiting: Waiting, requests: Requests) -> None:
        self._cell = cell
        self._running = running
        self._waiting = waiting
        self._requests = requests
        self._measured = Measured()
        self.predictor: Predictor = self._measured
        self._late = Margin()
        self._slow = Margin()
        self._runs_s = Mean()
        """From admission to release."""
        self._num_measured = 0
        self._fastest = Least()
        """Seconds from admission to first token, by its own work: where nothing went before it, if that happens."""
        self._largest = 0.0
        """Own work of a request whose first token was timed."""
        self._fewest = 0.0
        """Rows of steps that were timed, in a window's mean; 0: none were."""
        self._windows: dict[int, _Window] = {}
        """By id of the home."""
        self._used_at = 0.0
        """When last something ran here."""

    # --- what requests took -------------------------------------------------------------------------------------------

    def on_admitted(self, sequence: SequenceState) -> None:
        """It is among those that run, since just now."""
        reach = self._cell.spec.reach
        own = works_of(sequence.shares, reach)
        others = self._running.backlogs(own, but=sequence)
        sequence.admitted_at = self._requests.now
        sequence.own_work, sequence.work = max(own.values()), work_until(own, others)
        sequence.first_expected_s = self.predictor.prefill_s(sequence.work)
        sequence.step_expected_s = self.predictor.decode_step_s(self._running.homes(sequence.home))

    def on_first(self, sequence: SequenceState) -> None:
        """Its first token has come."""
        took = self._requests.now - sequence.admitted_at
        self._late.hear(sequence.first_expected_s, took)
        self._measured.hear_prefill(sequence.work, took)
        self._num_measured += 1
        if sequence.own_work:
            self._fastest.hear(took / sequence.own_work)
        self._largest = max(self._largest, sequence.own_work)
        self._used_at = self._requests.now

    def on_outputs(self, member: Member, outputs: Outputs) -> None:
        """A home's: its steps are timed by one of its sequences, for WINDOW tokens of that. First tokens are no steps of it."""
        decoded = [output for output in outputs.outputs if output.index]
        if not decoded:
            return
        now, window = self._requests.now, self._windows.get(member.id)
        timed = None if window is None else self._running.get(window.seq)
        if window is None or timed is None or timed.home != member.rank:
            self._windows[member.id] = _Window(decoded[0].seq, now)
            return
        its = next((output for output in decoded if output.seq == window.seq), None)
        if its is None:
            return
        window.tokens += len(its.token_ids)
        window.rows += len(decoded)
        window.messages += 1
        if window.tokens >= WINDOW:
            rows = window.rows / window.messages
            self._measured.hear_steps(rows, (now - window.since) / window.tokens)
            self._fewest = min(self._fewest or rows, rows)
            self._windows[member.id] = _Window(its.seq, now)

    def on_released(self, sequence: SequenceState) -> None:
        """Its memory is free again."""
        request, now = sequence.request, self._requests.now
        self._runs_s.hear(now - sequence.admitted_at)
        if request.tpot_s is not None and not request.preemptions:
            self._slow.hear(sequence.step_expected_s, request.tpot_s)
        self._used_at = now

    # --- what is to be expected ---------------------------------------------------------------------------------------

    def refusal(self, request: Request, reserving: Request | None, shared: Callable[[], int]) -> Refusal | None:
        """Why a request that is about to be queued is not taken; None: it may meet its objectives, or nothing is known.
        `reserving`: who waits for instances' grants. `shared`: tokens of it that need not be computed."""
        if not (request.objectives and self._cell.is_ready):
            return None
        views = self._running.views()
        ahead = [*self._waiting.ahead_of(request), *([] if reserving is None else [reserving])]
        is_there = shared()
        load = self._load(request, ahead, views, is_there)
        return self._late_refusal(request, load, is_there) or self._slow_refusal(request, load, views)

    def _late_refusal(self, request: Request, load: _Load, shared: int) -> Refusal | None:
        wanted, alone = request.objectives.ttft_s, self._alone(request, shared)
        if wanted is None:
            return None
        what, size = f"objective TTFT {wanted:g} s", f"a prompt of {request.missing_tokens:,} tokens"
        size += f", {shared:,} of them there already," if shared else ""
        own_s, busy_s = self.predictor.prefill_s(alone), self.predictor.prefill_s(max(load.work, alone))
        is_known = self._num_measured >= LEAST and alone <= BEYOND * self._largest
        if own_s is None or busy_s is None or self._fastest.value is None or not is_known:
            steps_s = self._steps_s(request, shared)
            if steps_s <= DOUBT * wanted:
                return None
            return Refusal("unreachable", f"{what}: the steps of {size} take {_shown(steps_s)} alone here")
        trust = self._trust()
        best_s = trust * min(own_s, alone * self._fastest.value)  # crowds teach little of what one takes that is alone
        if best_s > wanted:
            return Refusal("unreachable", f"{what}: {size} takes {_shown(best_s)} alone here at best")
        waited_s = self._requests.now - request.arrived_at
        more_s = max(load.wait_s + own_s, busy_s) - own_s
        expected_s = waited_s + trust * (own_s + self._late.factor * more_s)
        if not more_s or expected_s <= wanted:
            return None
        retry_s = max(expected_s - waited_s - wanted, 0.0)  # one that comes again has not waited yet
        own = f"{_shown(trust * own_s)} of these its own"
        detail = f"{size} is expected to have its first token after {_shown(expected_s)}, {own}"
        return Refusal("overloaded", f"{what}: {detail}; try again in {_shown(retry_s)}", retry_s)

    def _slow_refusal(self, request: Request, load: _Load, views: Sequence[InstanceView]) -> Refusal | None:
        wanted, alone_s = request.objectives.tpot_s, self.predictor.decode_step_s(1)
        step_s = self.predictor.decode_step_s(load.rows)
        if wanted is None or request.max_tokens < 2:
            return None
        trust, what = self._trust(), f"objective TPOT {wanted:g} s"
        if alone_s is None or step_s is None:
            performance = self._cell.performance
            least_s = 0.0 if performance.is_guess else performance.costs.decode_step_s(1, request.num_tokens)
            if least_s <= DOUBT * wanted:
                return None
            return Refusal("unreachable", f"{what}: a step takes {_shown(least_s)} alone here")
        if trust * alone_s > wanted and self._fewest < 2:  # it may be less than a fit to many rows says
            return Refusal("unreachable", f"{what}: a token takes {_shown(trust * alone_s)} here at best")
        if trust * (alone_s + self._slow.factor * (step_s - alone_s)) <= wanted or load.rows == 1:
            return None
        fits = next((rows for rows in range(load.rows - 1, 0, -1) if (self.predictor.decode_step_s(rows) or 0) <= wanted), 0)
        homes = max(1, sum(view.homes for view in views))
        runs_s = self._runs_s.value
        retry_s = RETRY_S if runs_s is None else runs_s * min(1.0, (load.rows - fits) * len(views) / homes)
        detail = f"a token is expected to take {_shown(step_s)} beside {load.rows - 1} others"
        return Refusal("overloaded", f"{what}: {detail}; try again in {_shown(retry_s)}", retry_s)

    def _load(self, request: Request, ahead: Sequence[Request], views: Sequence[InstanceView], shared: int) -> _Load:
        """Who waits before it, as if spread over all instances; itself where it would lie now, or with the least before it."""
        reach = self._cell.spec.reach
        others = self._running.backlogs(range(len(views)))
        waiting = [prompt_work(other.missing_tokens, reach) for other in ahead]
        placement = self._waiting.placer(request)(views, None)
        if placement is None or shared:
            alone = self._alone(request, shared)
            before = _before(alone, range(len(views)), others, waiting, len(views))
            work = min(_until(alone, shorter, longer) for shorter, longer in before.values())
            homes = sum(view.homes for view in views) // len(views)
        else:
            work = work_until(works_of(placement.shares, reach), others, waiting, len(views))
            homes = next(view.homes for view in views if view.rank == placement.shares[0].rank)
        rows = min(homes + -(-len(ahead) // len(views)) + 1, max(1, *(view.max_homes for view in views)))
        fits = placement is not None and not ahead
        return _Load(work, 0.0 if fits else self._memory_s([*ahead, request], views, fits=placement is not None), rows)

    def _memory_s(self, queue: Sequence[Request], views: Sequence[InstanceView], *, fits: bool) -> float:
        """Until the last of them finds room, blocks and a place among the rows of a home. `fits`: it would now."""
        runs_s = self._runs_s.value
        if runs_s is None:
            return 0.0
        size = self._cell.spec.block_size
        free = sum(view.free_blocks for view in views)
        used = sum(view.total_blocks for view in views) - free
        homes = sum(view.homes for view in views)
        places = sum(view.max_homes for view in views) - homes
        lacks_blocks = sum(-(-request.num_tokens // size) + 1 for request in queue) - free
        lacks_places = max(len(queue) - places, 0 if fits else 1)  # of one, where there is room and it is divided badly
        return runs_s * max(0.0, lacks_blocks / max(1, used), lacks_places / max(1, homes))

    def _most(self, request: Request) -> int:
        """Instances that would prefill it."""
        spread, size = request.spread, max(1, self._cell.size)
        if spread == "auto":
            return size if request.missing_tokens >= LONG_PROMPT else 1
        return size if spread == "all" else min(spread, size)

    def _steps_s(self, request: Request, shared: int) -> float:
        """What the steps of its prefill take alone, by the cell's performance model; 0: that is a guess."""
        performance, tokens = self._cell.performance, request.missing_tokens
        if performance.is_guess:
            return 0.0
        there = min(shared, tokens - 1)
        chunk = self._cell.spec.chunk_tokens
        return performance.costs.prefill_s(tokens - there, there, self._most(request), chunk=chunk)

    def _alone(self, request: Request, shared: int) -> float:
        """The least work until its first token: alone, by as many instances as would prefill it, what it shares left out."""
        tokens, count = request.missing_tokens, self._most(request)
        work = prompt_work(tokens, self._cell.spec.reach) - prompt_work(min(shared, tokens - 1), self._cell.spec.reach)
        return work if count == 1 else work / (count * PARALLEL_EFFICIENCY)

    def _trust(self) -> float:
        """How much of what is expected is believed: all, unless the cell has been idle for long."""
        if len(self._running) or len(self._waiting):
            return 1.0
        idle_s = self._requests.now - self._used_at
        return float(0.5 ** (max(0.0, idle_s - FRESH_S) / FRESH_S))


def _shown(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def work_until(
    own: Mapping[int, float], others: Iterable[Mapping[int, int]], waiting: Sequence[float] = (), instances: int = 1
) -> float:
    """Work that is done before a prompt is computed, at the instance that has most of it. `own`, `others`: by rank. `waiting`:
    of prompts that will be spread evenly over so many instances."""
    before = _before(sum(own.values()), own, others, waiting, instances)
    return max((_until(work, *before[rank]) for rank, work in own.items()), default=0.0)


def _before(
    total: float, ranks: Iterable[int], others: Iterable[Mapping[int, int]], waiting: Sequence[float], instances: int
) -> dict[int, list[float]]:
    """rank -> work there of prompts that are no longer than one of so much, and of longer ones."""
    evenly = [sum(work for work in waiting if work <= total), sum(work for work in waiting if work > total)]
    before = {rank: [work / instances for work in evenly] for rank in ranks}
    for other in others:
        is_longer = sum(other.values()) > total
        for rank, work in other.items():
            if rank in before:
                before[rank][is_longer] += work
    return before


def _until(own: float, shorter: float, longer: float) -> float:
    return shorter + own + min(longer, shorter + own)
