"""Objectives: who is refused, with which words, when it is to come again, and what was met. Literal events, with a clock."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.__main__ import parse
from gmanager.cli.service import ServiceConfig, _gmanager
from gmanager.cluster.events import Action, Deliver, Encoded, Send, StopFound
from gmanager.cluster.forecast import FRESH_S
from gmanager.cluster.objectives import Objectives
from gmanager.cluster.pace import LEAST
from gmanager.wire import messages as m
from tests.gmanager.cluster_support import CLIENT, Driver, beat, outputs, peer, serving, submit

Step = tuple[str, Any]

MEASURED = 2 * LEAST
"""Requests from which a cell learns here."""


def admits(actions: list[Action]) -> list[m.Admit]:
    return [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, m.Admit)]


def refused(actions: list[Action]) -> Deliver | None:
    """The one action there is, if it is a refusal."""
    last = [a for a in actions if isinstance(a, Deliver) and a.refusal is not None]
    assert not last or actions == last
    return last[0] if last else None


class Cell:
    """One instance, driven as it would go on by itself: prompts take 0.1 s for each 8 tokens, one after the other."""

    def __init__(self, blocks: int = 40, **config: Any) -> None:
        self.driver = serving(blocks, **config)
        self.blocks = blocks
        self.count = 0

    def ask(self, tokens: int = 8, **more: Any) -> Deliver | int:
        """The refusal, or the number of the sequence; 0: it waits for memory."""
        self.count += 1
        actions = self.driver.say(CLIENT, submit(f"r{self.count}", tokens, **{"max_tokens": 1} | more))
        if (refusal := refused(actions)) is not None:
            return refusal
        admitted = admits(self.driver.grant(actions))
        return admitted[0].seq if admitted else 0

    def first(self, seq: int, seconds: float, more: int = 0) -> None:
        """Its first token comes after that time, and is the last one unless there are `more`."""
        self.driver.now += seconds
        end: dict[str, Any] = {} if more else {"finish_reason": "length", "held": []}
        self.driver.say(peer(0), outputs(seq, 0, [9], **end))
        if not more:
            self.release(seq, 1)

    def release(self, seq: int, generated: int) -> list[Action]:
        self.driver.free[peer(0)] = self.blocks
        released = m.Released(epoch=1, seq=seq, generated=generated)
        return self.driver.grant(self.driver.say(peer(0), beat(self.blocks), released))

    def learn(self, tokens: int = 8, seconds: float = 0.1) -> None:
        """One after the other, as many as are needed to know something."""
        for _ in range(MEASURED):
            seq = self.ask(tokens, slo_ttft_s=1e6)
            assert isinstance(seq, int)
            self.first(seq, seconds)

    @property
    def seen(self) -> m.Observations:
        return self.driver.cluster.stats().observed


def test_nothing_is_refused_of_which_nothing_is_known() -> None:
    cell = Cell(slo_ttft_s=0.01, slo_tpot_s=1e-6)
    assert all(isinstance(cell.ask(), int) for _ in range(9))


def test_before_anything_is_measured_steps_say_what_is_hopeless() -> None:
    """A prefill step takes 0.1 s here, a decode step 0.02 s, as calibration has found."""
    cell = Cell()
    performance = cell.driver.cluster._cells["main"].performance
    for lane, rows, attended, us in ((0, 8, 36, 100_000), (1, 1, 8, 20_000)):
        step = m.StepSample(lane=lane, rows=rows, attended=attended, sent=0, served=0, us=us, beside=False)
        performance.take(0, [step] * 9)
    performance.refit(1e6)
    hopeless = cell.ask(slo_ttft_s=0.04)
    assert isinstance(hopeless, Deliver)
    assert hopeless.refusal == "unreachable"
    assert hopeless.error == "objective TTFT 0.04 s: the steps of a prompt of 8 tokens take 0.1 s alone here"
    slow = cell.ask(slo_tpot_s=0.009, max_tokens=4)
    assert isinstance(slow, Deliver)
    assert (slow.refusal, slow.error) == ("unreachable", "objective TPOT 0.009 s: a step takes 0.02 s alone here")
    assert isinstance(cell.ask(slo_ttft_s=0.06, slo_tpot_s=0.011), int), "the model may be wrong by as much"


def test_a_prompt_larger_than_all_that_were_measured_is_tried() -> None:
    cell = Cell(slo_ttft_s=0.15)
    cell.learn()
    assert isinstance(cell.ask(16), Deliver)
    assert isinstance(cell.ask(40), int), "five times as much work"


def test_who_would_come_too_late_is_told_when_to_come_again() -> None:
    cell = Cell(slo_ttft_s=0.35)
    cell.learn()
    first, second, third = (cell.ask() for _ in range(3))
    assert (first, second, third) == (5, 6, 7)
    refusal = cell.ask()
    assert isinstance(refusal, Deliver)
    assert (refusal.refusal, refusal.token_ids) == ("overloaded", [])
    assert refusal.error == (
        "objective TTFT 0.35 s: a prompt of 8 tokens is expected to have its first token after 0.4 s, 0.1 s of these its own; "
        "try again in 0.05 s"
    )
    assert refusal.retry_after_s == pytest.approx(0.05, rel=0.05)
    cell.first(5, 0.1)
    assert cell.ask() == 8, "then there is time for one like it"
    assert isinstance(cell.ask(), Deliver)


def test_who_has_waited_for_its_tokens_is_later_than_one_that_comes_again() -> None:
    cell = Cell(slo_ttft_s=0.5)
    cell.learn()
    driver = cell.driver
    for name in ("a", "b", "c"):
        driver.grant(driver.say(CLIENT, submit(name, max_tokens=1)))
    driver.say(CLIENT, m.Submit(request_id="text", params=m.SamplingParams(), text="x" * 8))
    driver.now += 0.3
    (answer,) = driver.handle(Encoded(8, driver.now, token_ids=m.pack_tokens([5] * 8), highest=5))
    assert isinstance(answer, Deliver)
    assert answer.error is not None and "its first token after 0.7 s" in answer.error
    assert answer.retry_after_s == 0.0


def test_what_nobody_could_meet_is_said_with_the_best() -> None:
    cell = Cell(slo_ttft_s=150.0)
    cell.learn(seconds=100.0)
    refusal = cell.ask(24, slo_ttft_s=200)
    assert isinstance(refusal, Deliver)
    assert refusal.error == "objective TTFT 200 s: a prompt of 24 tokens takes 300 s alone here at best"
    cell = Cell(slo_ttft_s=0.15)
    cell.learn()
    refusal = cell.ask(24)
    assert isinstance(refusal, Deliver)
    assert (refusal.refusal, refusal.retry_after_s) == ("unreachable", None)
    assert refusal.error == "objective TTFT 0.15 s: a prompt of 24 tokens takes 0.3 s alone here at best"


def test_what_is_there_already_takes_no_time() -> None:
    """A long conversation goes on: only what was said since is computed."""
    cell = Cell(slo_ttft_s=0.3)
    cell.learn(40, seconds=0.5)
    text = list(range(100, 140))
    refusal = cell.ask(prompt=text)
    assert isinstance(refusal, Deliver) and refusal.refusal == "unreachable"
    seq = cell.ask(prompt=text, slo_ttft_s=10)
    assert isinstance(seq, int)
    cell.driver.say(peer(0), m.Cached(epoch=1, shards=[m.KeptShard(seq=seq, runs=[[(0, 40)]])]))
    cell.first(seq, 0.5)
    assert isinstance(cell.ask(prompt=[*text, 1, 2, 3]), int)
    refusal = cell.ask(prompt=[*text, *range(40)])
    assert isinstance(refusal, Deliver) and refusal.error is not None
    assert "a prompt of 80 tokens, 40 of them there already, takes" in refusal.error


def test_crowds_dont_teach_that_one_alone_is_too_slow() -> None:
    """All that were measured but the first had others before them, and took as long as they: that is no reason for ever."""
    cell = Cell(400)
    (alone,) = [cell.ask()]
    assert isinstance(alone, int)
    cell.first(alone, 0.1)
    for _ in range(20):
        crowd = [seq for _ in range(4) if isinstance(seq := cell.ask(), int)]
        for at, seq in enumerate(crowd):
            cell.first(seq, 0.0 if at else 0.4)
    assert isinstance(cell.ask(slo_ttft_s=0.2), int), "it may meet that, as nobody is there"
    refusal = cell.ask(slo_ttft_s=0.2)
    assert isinstance(refusal, Deliver)
    assert refusal.refusal == "overloaded", "not unreachable"


def test_a_requests_own_objectives_go_before_the_services() -> None:
    cell = Cell(slo_ttft_s=0.15)
    cell.learn()
    assert cell.ask(24, slo_ttft_s=1.0) == 5
    assert isinstance(cell.ask(8, slo_ttft_s=0.01), Deliver)
    assert Objectives(ttft_s=1.0).of(submit("r", slo_tpot_s=2.0)) == Objectives(ttft_s=1.0, tpot_s=2.0)


@pytest.mark.parametrize("own", [{}, {"slo_tpot_s": 100.0}], ids=["no objectives", "another one"])
def test_without_objectives_nothing_is_refused(own: dict[str, float]) -> None:
    cell = Cell(200)
    cell.learn()
    assert all(isinstance(cell.ask(**own), int) for _ in range(50))


def test_a_higher_priority_is_not_late_for_those_behind_it() -> None:
    """Who waits for memory: by then the first waits for one to end, and the second for another."""
    cell = Cell(4, slo_ttft_s=1.6)
    cell.learn(seconds=1.0)
    assert cell.ask() == 5
    assert cell.ask(slo_ttft_s=1e6) == 0, "it waits"
    assert isinstance(cell.ask(), Deliver)
    assert isinstance(cell.ask(priority=-1, slo_ttft_s=2.5), int)
    assert isinstance(cell.ask(priority=1, slo_ttft_s=2.5), Deliver)


def test_memory_that_must_become_free_first() -> None:
    cell = Cell(4)
    for _ in range(MEASURED):
        seq = cell.ask(max_tokens=2)
        assert isinstance(seq, int)
        cell.first(seq, 0.1, more=1)
        cell.driver.now += 3.9
        cell.driver.say(peer(0), outputs(seq, 1, [9], finish_reason="length", held=[]))
        cell.release(seq, 2)
    assert cell.ask(max_tokens=2) == 5
    refusal = cell.ask(slo_ttft_s=2.0)
    assert isinstance(refusal, Deliver)
    assert refusal.refusal == "overloaded"
    assert refusal.retry_after_s == pytest.approx(4 + 0.1 - 2, rel=0.01), "one must end"
    assert cell.ask(slo_ttft_s=5.0) == 0


def test_who_was_accepted_is_served_however_late() -> None:
    cell = Cell(4, slo_ttft_s=1.5, max_queue_wait_s=1e6)
    cell.learn(seconds=1.0)
    assert cell.ask() == 5
    assert cell.ask(slo_ttft_s=3.0) == 0
    cell.driver.wait(30, CLIENT, peer(0))
    cell.driver.say(peer(0), outputs(5, 0, [9], finish_reason="length", held=[]))
    assert [admit.seq for admit in admits(cell.release(5, 1))] == [6]
    cell.first(6, 1.0)
    assert (cell.seen.finished["length"], cell.seen.missed_ttft) == (MEASURED + 2, 2)


def test_nothing_is_refused_while_the_membership_changes() -> None:
    """What runs is not known then."""
    cell = Cell(slo_ttft_s=0.15)
    cell.learn()
    assert isinstance(cell.ask(24), Deliver)
    cell.driver.come(peer(1), cell_size=1)
    assert cell.ask(24) == 0, "it is queued"


def test_what_was_measured_long_ago_is_doubted() -> None:
    """A cell that was slow once, and refuses all since: one is let in now and then, and shows what it takes now."""
    cell = Cell(slo_ttft_s=0.5)
    cell.learn(seconds=1.0)
    assert isinstance(cell.ask(), Deliver)
    cell.driver.wait(int(FRESH_S), CLIENT, peer(0))
    assert isinstance(cell.ask(), Deliver)
    cell.driver.wait(int(FRESH_S) + 1, CLIENT, peer(0))
    assert cell.ask() == 5
    cell.first(5, 1.0)
    assert isinstance(cell.ask(), Deliver), "it is as slow as it was"


def decode(cell: Cell, seqs: list[int], start: int, count: int, step_s: float) -> None:
    for index in range(start, start + count):
        cell.driver.now += step_s
        new = [m.SequenceOutput(seq=seq, index=index, token_ids=[9]) for seq in seqs]
        cell.driver.say(peer(0), m.Outputs(epoch=1, outputs=new))


def test_tokens_that_would_come_too_slowly() -> None:
    cell = Cell(400)
    seqs: list[int] = []
    for rows in (1, 2, 3):
        seq = cell.ask(max_tokens=900)
        assert isinstance(seq, int)
        cell.first(seq, 0.1, more=1)
        seqs.append(seq)
        for each, index in zip(seqs, range(3), strict=False):
            assert each == index + 1
        base = {1: 1, 2: 101, 3: 201}[rows]
        if rows > 1:  # the new one has its first token, as the others have theirs; from here on all go together
            fresh = [m.SequenceOutput(seq=seq, index=i, token_ids=[9]) for i in range(1, base)]
            cell.driver.say(peer(0), *(m.Outputs(epoch=1, outputs=[one]) for one in fresh))
        decode(cell, seqs, base, 100, 0.01 * rows)
    assert isinstance(cell.ask(max_tokens=9, slo_tpot_s=0.045), int)
    refusal = cell.ask(max_tokens=9, slo_tpot_s=0.025)
    assert isinstance(refusal, Deliver)
    assert refusal.refusal == "overloaded"
    assert refusal.error is not None and refusal.error.startswith("objective TPOT 0.025 s: a token is expected to take 0.0")
    assert refusal.retry_after_s == 1.0, "none has ended, so nobody knows"
    never = cell.ask(max_tokens=9, slo_tpot_s=0.001)
    assert isinstance(never, Deliver)
    assert never.refusal == "unreachable"
    assert isinstance(cell.ask(max_tokens=1, slo_tpot_s=0.001), int), "of one token there is no time between"


def test_flags_of_the_gmanager_and_of_up() -> None:
    service = ServiceConfig(model="m", instances=1, kv_tokens=64, logs=Path(), slo_ttft_s=2.5, slo_tpot_s=0.05)
    config, _ = parse(_gmanager(service, "tcp://127.0.0.1:*")[3:])
    assert (config.slo_ttft_s, config.slo_tpot_s) == (2.5, 0.05)
    config, _ = parse([])
    assert (config.slo_ttft_s, config.slo_tpot_s) == (None, None)


# --- a refused request leaves no trace

asks = st.tuples(st.integers(1, 12), st.integers(-1, 1))
plays = st.lists(st.one_of(asks.map(lambda ask: ("ask", ask)), st.just(("end", None)), st.just(("refuse", None))), max_size=30)


def played(play: list[Step], *, with_refused: bool) -> list[m.Message]:
    """All that instances are told, with requests by their names."""
    cell = Cell(6)
    cell.learn()
    driver, sent, open_seqs = cell.driver, [], []
    names = iter(range(1000))

    def note(actions: list[Action]) -> None:
        granted = driver.grant(actions)
        for action in [*actions, *granted]:
            if isinstance(action, Send) and action.peer == peer(0):
                message = action.message
                if isinstance(message, m.Admit):
                    open_seqs.append(message.seq)
                    message = m.Admit(**{f: getattr(message, f) for f in m.Admit.__struct_fields__} | {"arrival": 0})
                sent.append(message)

    for what, detail in play:
        if what == "refuse":
            if with_refused:
                before = driver.cluster.stats()
                answer = cell.ask(8, slo_ttft_s=1e-6)
                assert isinstance(answer, Deliver)
                after = driver.cluster.stats()
                assert after.instances == before.instances
                assert after.observed.refused["unreachable"] == before.observed.refused["unreachable"] + 1
        elif what == "ask":
            tokens, priority = detail
            note(driver.say(CLIENT, submit(f"n{next(names)}", tokens, priority=priority, max_tokens=1)))
        elif open_seqs:
            seq = open_seqs.pop(0)
            driver.now += 0.25
            last = driver.say(peer(0), outputs(seq, 0, [9], finish_reason="length", held=[]))
            driver.free[peer(0)] = 6 if not open_seqs else driver.free[peer(0)]
            note([*last, *driver.say(peer(0), beat(driver.free[peer(0)]), m.Released(epoch=1, seq=seq, generated=1))])
    return sent


@given(plays)
def test_a_refused_request_leaves_no_trace(play: list[Step]) -> None:
    assert played(play, with_refused=True) == played(play, with_refused=False)


# --- goodput


def ended(driver: Driver, seq: int, ttft_s: float, tokens: int, tpot_s: float) -> None:
    driver.now += ttft_s
    for index in range(tokens):
        driver.now += tpot_s if index else 0
        end: dict[str, Any] = {"finish_reason": "length", "held": []} if index == tokens - 1 else {}
        driver.say(peer(0), outputs(seq, index, [9], **end))
    driver.say(peer(0), m.Released(epoch=1, seq=seq, generated=tokens))


def ask(driver: Driver, name: str, **more: Any) -> int:
    return admits(driver.grant(driver.say(CLIENT, submit(name, **more))))[0].seq


def counted(driver: Driver) -> tuple[int, int, int]:
    seen = driver.cluster.stats().observed
    return seen.met_slo, seen.missed_ttft, seen.missed_tpot


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "want"),
    [(1.0, 0.1, (1, 0, 0)), (1.1, 0.1, (0, 1, 0)), (1.0, 0.11, (0, 0, 1)), (2.0, 0.2, (0, 1, 1))],
)
def test_goodput(ttft_s: float, tpot_s: float, want: tuple[int, int, int]) -> None:
    driver = serving(40, slo_ttft_s=1.001, slo_tpot_s=0.1001)
    ended(driver, ask(driver, "r"), ttft_s, 5, tpot_s)
    assert counted(driver) == want


def test_goodput_is_of_what_was_served_with_objectives() -> None:
    driver = serving(40)
    ended(driver, ask(driver, "none"), 0.5, 2, 9.0)
    assert counted(driver) == (0, 0, 0)
    ended(driver, ask(driver, "one token", slo_tpot_s=1.0), 0.5, 1, 0.0)
    assert counted(driver) == (1, 0, 0)
    ask(driver, "aborted", slo_ttft_s=1.0)
    driver.say(CLIENT, m.Abort(call=1, request_id="aborted"))
    assert counted(driver) == (1, 0, 0)
    stopped = ask(driver, "stopped", slo_ttft_s=1.0)
    driver.say(peer(0), outputs(stopped, 0, [9, 9]))
    driver.handle(StopFound(4, 1, driver.now))
    assert counted(driver) == (2, 0, 0)


# --- what it is for


def overloaded(lengths: list[int], **config: Any) -> tuple[m.Observations, int]:
    """Requests come every 0.05 s for each 8 tokens of their mean length, and take 0.1 s: twice as many as can be served, the
    shortest first. What was seen, and how many were refused."""
    driver = serving(4000, **config)
    gap_s = 0.05 * sum(lengths) / 8 / len(lengths)
    waiting: list[tuple[int, int]] = []
    """Tokens and sequence of prompts."""
    due = [(gap_s * number, tokens) for number, tokens in enumerate(lengths)]
    under_way, done_at, num_refused = 0, 0.0, 0
    while due or waiting or under_way:
        if not under_way and waiting:
            tokens, under_way = min(waiting)
            waiting.remove((tokens, under_way))
            done_at = driver.now + 0.1 * tokens / 8
        if due and (not under_way or due[0][0] <= done_at):
            at, tokens = due.pop(0)
            driver.now = max(driver.now, at)
            actions = driver.say(CLIENT, submit(f"r{len(due)}", tokens, max_tokens=1))
            num_refused += refused(actions) is not None
            waiting += [(tokens, admit.seq) for admit in admits(driver.grant(actions))]
        elif under_way:
            driver.now = done_at
            driver.say(peer(0), outputs(under_way, 0, [9], finish_reason="length", held=[]))
            driver.free[peer(0)] = 4000 - 8 * len(waiting)
            driver.say(peer(0), beat(driver.free[peer(0)]), m.Released(epoch=1, seq=under_way, generated=1))
            under_way = 0
    return driver.cluster.stats().observed, num_refused


@pytest.mark.parametrize(("lengths", "times"), [([8] * 300, 7), ([8, 16, 24] * 100, 1)], ids=["of one length", "of several"])
def test_under_overload_some_are_in_time_rather_than_all_late(lengths: list[int], times: int) -> None:
    """No clock but the test's own. Where the shortest go first few are late, but those for ever."""
    without, none = overloaded(lengths)
    assert (none, without.finished["length"]) == (0, 300)
    in_time = sum(count for bound, count in zip(without.ttft_s.bounds, without.ttft_s.counts, strict=False) if bound <= 1)
    seen, num_refused = overloaded(lengths, slo_ttft_s=1.0)
    assert seen.met_slo + seen.missed_ttft == 300 - num_refused
    assert seen.met_slo > 0.9 * (300 - num_refused), "who is taken is in time"
    assert seen.met_slo >= times * in_time
