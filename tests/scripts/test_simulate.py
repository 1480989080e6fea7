"""The simulator: everything that decides is real, so what must hold of it must hold here; and the time that it adds up."""

import json
import math
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
import simulate as command
from _trace import Arrival, BlockArrival, TraceError
from _validation import Round, untimed
from bench_serve import Objectives, summarise
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation.cases import Case, Result, arrivals_of, at_rate, run, run_all
from simulation.clock import Clock
from simulation.copies import PASSED_TOKEN_S, Copies
from simulation.counting import Counting, attended_by
from simulation.device import Device, Group, Part, Processor, run_together
from simulation.instance import Instance, SimulationError
from simulation.search import Search, Tried, repeated
from simulation.service import Outcome, Service, Setting, prompt_of, simulate
from simulation.times import H200_8B, LaneTimes, Load, Profile, TimesError, read_stats, read_times, write_times
from simulation.validate import SHARED, Measured, Sweep, fit, level, scaled

from distattn.budget import PATIENCE_S
from distattn.layout import Layout, lay_out
from gmanager.cluster.cluster import Cluster
from gmanager.cluster.intake import SCANNED_AT_ONCE
from gmanager.config import GManagerConfig
from gmanager.wire import messages as m
from instance.sharing import Load as KvRead
from kvstore.run import Run

SMALL = Profile(
    name="small",
    source="made up",
    decode=LaneTimes(base=0.01, row=0.001, attended=1e-5, exchange=0.002, sent=1e-4),
    prefill=LaneTimes(least=0.01, row=0.001, attended=1e-5, exchange=0.002, sent=1e-4),
    decode_beside=2.0,
    prefill_beside=1.5,
    meet_s=5e-4,
    host_s=2e-4,
    link_s=1e-3,
    kv_tokens=64,
    block_size=4,
    chunk_tokens=16,
    mixed_chunk_tokens=8,
    reach=32,
)
"""Instances with little memory: homes move, and sequences are preempted."""


def at_once(*lengths: tuple[int, int]) -> list[Arrival]:
    return [Arrival(at_s=0, prompt_tokens=prompt, max_tokens=answer) for prompt, answer in lengths]


def simulated(trace: list[Arrival], **setting: Any) -> Outcome:
    """With small instances. All tokens must have come, in order."""
    outcome = simulate(Setting(**({"profile": SMALL, "instances": 3} | setting)), trace)
    for arrival, timing in zip(trace, outcome.timings, strict=True):
        assert timing.error is None
        assert len(timing.token_s) == arrival.max_tokens
        assert timing.token_s == sorted(timing.token_s)
        assert timing.due_s is not None and timing.token_s[0] > timing.due_s
    return outcome


# --- the service


def test_all_tokens_come_and_nothing_is_left() -> None:
    trace = [Arrival(at_s=0.1 * i, prompt_tokens=3 + 7 * i, max_tokens=1 + 5 * (i % 4)) for i in range(12)]
    service = Service(Setting(profile=SMALL, instances=3))
    outcome = service.run(trace)
    service.settle()
    assert [len(timing.token_s) for timing in outcome.timings] == [arrival.max_tokens for arrival in trace]
    assert all(timing.error is None for timing in outcome.timings)
    for instance in service.instances.values():
        assert len(instance.rmanager.shards) == 0
        assert instance.rmanager.free_blocks == SMALL.kv_tokens // SMALL.block_size
    assert service.cluster.is_idle
    assert 0 < outcome.mean_kv_use < 1


def test_books_that_don_t_agree_are_told() -> None:
    service = Service(Setting(profile=SMALL, instances=1))
    service.run(at_once((4, 2)))
    next(iter(service.instances.values())).rmanager.reserve(999, 1)
    with pytest.raises(SimulationError, match="instances still hold sequences"):
        service.settle()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_trace_ends_on_any_cell(data: st.DataObject) -> None:
    """Homes move, sequences are preempted, prompts wait: all tokens come all the same, and the books of all agree."""
    instances = data.draw(st.integers(1, 4))
    most = (SMALL.kv_tokens - SMALL.block_size) * instances
    sizes = st.tuples(st.integers(1, most - 20), st.integers(1, 20), st.floats(0, 0.5))
    trace = [
        Arrival(at_s=at_s, prompt_tokens=prompt, max_tokens=answer)
        for prompt, answer, at_s in data.draw(st.lists(sizes, min_size=1, max_size=12))
    ]
    policies = ["infinite", "loong", "elastic", "auto", "all", "2", "large"] + ["split"] * (instances > 1)
    policy = data.draw(st.sampled_from(policies))
    cores = data.draw(st.sampled_from([None, 1.5]))
    simulated(trace, instances=instances, policy=policy, profile=msgspec.structs.replace(SMALL, cores=cores))


def test_room_that_another_leaves_is_used() -> None:
    """A home tells of a lack of room after the tokens of all rows before it, also when a step of the other lane ends meanwhile:
    the gManager takes tokens that come later for a sign that there is room, and the sequence waited for ever."""
    simulated(at_once((106, 20), (65, 1)), policy="infinite")


def test_the_small_cell_is_small_enough() -> None:
    """Else the test above would not see a home move, nor a preemption."""
    outcomes = [simulated(at_once(*[(30, 40)] * 5)), simulated(at_once((150, 20)), policy="all")]
    assert sum(outcome.home_moves for outcome in outcomes) > 0
    assert sum(outcome.preemptions for outcome in outcomes) > 0


def test_the_same_seed_gives_the_same_report() -> None:
    def results() -> list[Result]:
        arrivals = arrivals_of("mix:4", requests=30, seed=3)
        setting = Setting(profile=H200_8B, instances=4, grain=8)
        case = Case(setting=setting, trace="mix:4", rate=None, arrivals=arrivals, objectives=Objectives(ttft_s=1.0))
        return [msgspec.structs.replace(run(case), wall_s=0.0)]

    assert msgspec.json.encode(results()) == msgspec.json.encode(results())


def test_more_instances_never_make_a_queue_longer() -> None:
    trace = at_once(*[(40, 10)] * 24)
    ends = [simulated(trace, instances=count).ended_s for count in (1, 2, 4, 8)]
    assert ends == sorted(ends, reverse=True)
    assert ends[-1] < ends[0] / 4


def test_a_request_alone_takes_what_its_steps_take() -> None:
    (timing,) = simulated(at_once((10, 3)), instances=1).timings
    prefill = 10 * 0.001 + 55 * 1e-5
    # to the gManager, Reserve, Granted, Admit, the round, the step, the token to the gManager and on to the client
    assert timing.token_s[0] == pytest.approx(4 * 1e-3 + 2e-4 + prefill + 2 * 1e-3)
    decode = [0.01 + 0.001 + (10 + i) * 1e-5 for i in (1, 2)]
    assert timing.token_s[1] - timing.token_s[0] == pytest.approx(2e-4 + decode[0])
    assert timing.token_s[2] - timing.token_s[1] == pytest.approx(decode[1])


def test_members_of_a_party_share_a_prompt() -> None:
    """Three instances prefill one prompt: each a third of it, with rows that travel."""
    alone, shared = (simulated(at_once((48, 1)), policy=policy).timings[0].token_s[0] for policy in ("1", "all"))
    assert 0.4 < shared / alone < 0.7


def test_instances_that_share_nothing_refuse_what_is_too_long_for_one() -> None:
    long = at_once((70, 2), (10, 2))
    outcome = simulate(Setting(profile=SMALL, instances=3, policy="separate"), long)
    assert [timing.refused for timing in outcome.timings] == ["never", None]
    assert simulated(long).timings[0].token_s
    assert simulated(long, policy="large").timings[0].token_s


def test_who_waits_for_first_tokens_comes_after_them() -> None:
    late = Arrival(at_s=0.25, prompt_tokens=5, max_tokens=2, after_first_tokens=True)
    outcome = simulated([late, *at_once((20, 4), (30, 4))])
    assert outcome.timings[0].due_s == pytest.approx(max(t.token_s[0] for t in outcome.timings[1:]) + 0.25)


def test_what_has_not_ended_at_the_limit_is_told() -> None:
    outcome = simulate(Setting(profile=SMALL, instances=1, limit_s=0.5), at_once((10, 3), (10, 50)))
    assert [timing.error for timing in outcome.timings] == [None, "not finished after 0.505 s"]


def test_a_request_that_waits_too_long_fails_as_the_gmanager_says() -> None:
    outcome = simulate(Setting(profile=SMALL, instances=1, max_queue_wait_s=0.5), at_once(*[(40, 20)] * 6))
    assert outcome.timings[0].error is None
    assert "max-queue-wait" in (outcome.timings[5].error or "")


def test_prompts_that_begin_alike_share_what_was_computed() -> None:
    """By their hash ids, after the first has ended; without a cache each is computed whole."""
    first = BlockArrival(at_s=0, prompt_tokens=40, max_tokens=4, hash_ids=[1, 2, 3, 4, 5], block_tokens=8)
    again = msgspec.structs.replace(first, at_s=2.0, hash_ids=[1, 2, 3, 4, 6])
    cached, whole = (simulated([first, again], instances=1, prefix_cache=cache).timings[1] for cache in (True, False))
    assert cached.ttft_s is not None
    assert whole.ttft_s is not None
    assert whole.ttft_s - cached.ttft_s > 31 * 0.001  # the rows of four blocks of 8, but for a token or so


def test_of_long_prompts_is_found_what_there_is_as_of_short_ones() -> None:
    """The gManager has those scanned beside its own work: that is the shell's, which is simulated."""
    tokens = 2 * SCANNED_AT_ONCE
    profile = msgspec.structs.replace(SMALL, kv_tokens=4 * tokens, chunk_tokens=tokens)
    first = BlockArrival(at_s=0, prompt_tokens=tokens, max_tokens=2, hash_ids=[1, 2], block_tokens=SCANNED_AT_ONCE)
    again = msgspec.structs.replace(first, at_s=1e5, hash_ids=[1, 3])
    outcome = simulated([first, again], instances=1, profile=profile, limit_s=1e6)
    assert (outcome.prefix_queries, outcome.prefix_hits) == (2 * tokens, SCANNED_AT_ONCE)


def test_what_was_found_of_prompts_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two prompts of 40 tokens the second begins with 32 of the first's; the table shows two fifths."""
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out"
    lines = [
        {"timestamp": at_ms, "input_length": 40, "output_length": 4, "hash_ids": [1, 2, 3, 4, last]}
        for at_ms, last in ((0, 5), (2000, 6))
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["run", "--trace", str(trace), "--instances", "1", "--policies", "static", "--block-tokens", "8"]
    report = command.run(command.parse([*words, "--out", str(out)]), SMALL)
    (cached,) = report.results
    assert (cached.prefix_queries, cached.prefix_hits) == (80, 32)
    assert "prefix %" in (told := capsys.readouterr().out)
    assert " 40.0 " in told
    (whole,) = command.run(command.parse([*words, "--no-prefix-cache", "--out", str(out)]), SMALL).results
    assert (whole.prefix_queries, whole.prefix_hits) == (0, 0)


@pytest.mark.parametrize("policy", ["static", "infinite", "loong", "split:1", "split:2", "elastic"])
def test_each_policy_serves(policy: str) -> None:
    outcome = simulated([Arrival(at_s=0.2 * i, prompt_tokens=20, max_tokens=8) for i in range(6)], policy=policy)
    assert (outcome.home_moves > 0) == policy.startswith("split")


# --- copies of KV


def copied(copies: Copies, tokens: int) -> list[float]:
    """Begin a copy from instance 0 to instance 1; the seconds that it took, once it is over."""
    took: list[float] = []
    asked = m.CopyRun(epoch=1, move=7, seq=1, source=0, target=1, ranges=[(0, tokens)], firsts=[])
    copies.begin(asked, took.append)
    return took


def two_ends(clock: Clock, copy_tokens: int = 2) -> Copies:
    copies = Copies(clock, msgspec.structs.replace(SMALL, copy_tokens=copy_tokens))
    for rank in (0, 1):
        copies.enter(rank)
    return copies


def test_idle_instances_copy_as_fast_as_words_and_blocks_pass() -> None:
    clock = Clock()
    took = copied(two_ends(clock), 30)
    run_out(clock)
    assert took == [pytest.approx(8 * (2 * SMALL.link_s + SMALL.block_size * PASSED_TOKEN_S))]


@pytest.mark.parametrize("busy", [[0], [1], [0, 1]])
def test_beside_steps_a_copy_takes_as_many_as_bring_its_tokens(busy: list[int]) -> None:
    """At either end 2 tokens a step: eight blocks of 4 tokens take 16 steps, of 0.1 s each."""
    clock = Clock()
    copies = two_ends(clock)

    def step(number: int) -> None:
        for rank in busy:
            copies.tell(rank, number, is_busy=True)
        if number < 30:
            clock.after(0.1, lambda: step(number + 1))

    step(0)
    took = copied(copies, 32)
    run_out(clock)
    # a source begins to save up for a block when it first waits for one: a step later than its target
    assert took == [pytest.approx((15 + len(busy)) * 0.1, abs=0.01)]


def test_a_block_waits_for_steps_no_longer_than_a_real_one() -> None:
    clock = Clock()
    copies = two_ends(clock)
    copies.tell(0, 0, is_busy=True)
    took = copied(copies, 12)
    run_out(clock)
    assert took == [pytest.approx(3 * PATIENCE_S, abs=0.01)]


def test_who_becomes_idle_copies_at_once() -> None:
    clock = Clock()
    copies = two_ends(clock)
    copies.tell(1, 0, is_busy=True)
    took = copied(copies, 12)
    clock.after(0.5, lambda: copies.tell(1, 1, is_busy=False))
    run_out(clock)
    assert took == [pytest.approx(0.5, abs=0.01)]


def test_coarse_decode_steps_bring_what_those_do_that_they_stand_for() -> None:
    fine = msgspec.structs.replace(SMALL, copy_tokens=4)
    coarse = fine.coarse(2)
    assert (coarse.copy_tokens, coarse.decode_steps) == (2, 2)
    clock = Clock()
    here = Instance(clock, coarse, Processor(clock, coarse), tell=lambda message: None)
    here.note_step(Part(here.device, "prefill", 0.1, Group()), Load(0, 0, 0, 0))
    assert here.num_steps == 1
    here.note_step(Part(here.device, "decode", 0.1, Group()), Load(0, 0, 0, 0))
    assert here.num_steps == 3


def test_kv_follows_its_sequence_at_the_pace_of_steps() -> None:
    """A prompt of 40 tokens has ten blocks of 4. With a token a step they follow after 40 steps of a decode or so, 11 ms at
    least; before, in 40 us. With so few tokens to come they don't follow at all."""

    def follows_s(copy_tokens: int, answer: int) -> list[float]:
        profile = msgspec.structs.replace(SMALL, copy_tokens=copy_tokens, kv_tokens=256)
        outcome = simulated(at_once((40, answer)), policy="split:1", instances=2, profile=profile)
        assert outcome.home_moves == 1
        return outcome.follows_s

    (slow_s,) = follows_s(1, answer=80)
    assert 36 * 0.011 < slow_s < 80 * 0.016
    (fast_s,) = follows_s(64, answer=80)
    assert fast_s < slow_s / 2
    assert not follows_s(1, answer=10)


# --- figures that were measured


def one_row(prompt_tokens: int, instances: int, policy: str = "auto") -> tuple[float, float]:
    """TTFT and time between tokens on H200s."""
    trace = at_once((prompt_tokens, 4))
    (timing,) = simulate(Setting(profile=H200_8B, instances=instances, policy=policy, grain=1), trace).timings
    assert timing.ttft_s is not None
    return timing.ttft_s, timing.token_s[3] - timing.token_s[2]


@pytest.mark.parametrize(
    ("prompt_tokens", "instances", "ttft_s", "tpot_ms"),
    [
        (1024, 1, None, 4.24),
        (32_768, 1, 1.16, 5.3),
        (131_072, 1, 10.06, 8.05),
        (131_072, 2, 5.52, None),
        (524_288, 2, 67.6, 12.6),
    ],
)
def test_steps_of_h200s_take_as_long_as_measured(
    prompt_tokens: int, instances: int, ttft_s: float | None, tpot_ms: float | None
) -> None:
    """docs/performance.md."""
    ttft, tpot = one_row(prompt_tokens, instances, "all")
    assert ttft_s is None or ttft == pytest.approx(ttft_s, rel=0.06)
    assert tpot_ms is None or tpot * 1e3 == pytest.approx(tpot_ms, rel=0.05)


@pytest.mark.parametrize(("rate", "near"), [(0.2, 0.06), (4.0, 0.2)])
def test_a_coarse_simulation_is_near_the_exact_one(rate: float, near: float) -> None:
    """Of prompts that are not spread: the number from which on they are is not told in units of the grain."""
    arrivals = at_rate(arrivals_of("mix:1", requests=80), rate)
    exact, coarse = (
        run(Case(setting=setting, trace="", rate=None, arrivals=arrivals, objectives=Objectives()))
        for setting in (Setting(profile=H200_8B, instances=2, grain=grain) for grain in (1, 8))
    )
    assert coarse.rounds < exact.rounds / 4
    for name in ("completed_per_s", "output_tokens_per_s", "ttft_p50_s", "tpot_p50_s", "itl_p50_s", "request_p50_s"):
        assert getattr(coarse.figures, name) == pytest.approx(getattr(exact.figures, name), rel=near), name


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 120), st.integers(1, 12)), min_size=1, max_size=8), st.sampled_from(["auto", "all"]))
def test_what_is_counted_is_what_is_laid_out(lengths: list[tuple[int, int]], policy: str) -> None:
    """In every step of every member: as `distattn.layout.lay_out` has it."""
    checked = 0

    class Compared(Counting):
        def __call__(self, *args: Any) -> Layout:
            nonlocal checked
            counted, laid_out = super().__call__(*args), lay_out(*args)
            assert counted.num_rows == laid_out.num_rows
            assert counted.dispatched == laid_out.dispatched
            assert counted.received == laid_out.received
            assert KvRead.of(counted).kv_tokens == KvRead.of(laid_out).kv_tokens
            checked += 1
            return counted

    with patch("simulation.parties.Counting", Compared):
        simulated(at_once(*lengths), policy=policy)
    assert checked


@given(st.lists(st.integers(0, 6), min_size=2, max_size=12), st.integers(0, 40), st.integers(1, 20))
def test_sums_of_what_rows_attend_to(cuts: list[int], start: int, rows: int) -> None:
    run, at = Run(4), 0
    run.block_ids = list(range(40))
    for i, length in enumerate(cuts):
        if length and i % 2:
            run.append(at, at + length)
        at += length
    assert attended_by(run, start, start + rows) == (sum(run.kv_lens(start, start + rows)) if run.ranges else 0)


# --- prompts


def test_prompts_begin_alike_where_their_hash_ids_do() -> None:
    blocks = {"at_s": 0.0, "max_tokens": 1, "block_tokens": 5}
    one, other, third = (
        BlockArrival(prompt_tokens=12, hash_ids=[7, 8, 9], **blocks),
        BlockArrival(prompt_tokens=11, hash_ids=[7, 8, 10], **blocks),
        BlockArrival(prompt_tokens=12, hash_ids=[6, 8, 9], **blocks),
    )
    ids = [list(m.unpack_tokens(prompt_of(arrival, i))) for i, arrival in enumerate((one, other, third))]
    assert [len(each) for each in ids] == [12, 11, 12]
    assert ids[0][:10] == ids[1][:10] and ids[0][10] != ids[1][10]
    assert ids[0][0] != ids[2][0] and ids[0][5:] == ids[2][5:]
    plain = [m.unpack_tokens(prompt_of(Arrival(at_s=0, prompt_tokens=4, max_tokens=1), i)) for i in (0, 1)]
    assert plain[0][0] != plain[1][0]


@given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 16))
def test_coarse_prompts_are_as_long_as_their_tokens(tokens: int, block: int, grain: int) -> None:
    hash_ids = list(range(-(-tokens // block)))
    arrival = BlockArrival(at_s=0, prompt_tokens=tokens, max_tokens=1, hash_ids=hash_ids, block_tokens=block)
    assert len(prompt_of(arrival, 0, grain)) == 4 * -(-tokens // grain)


def test_rates_change_when_requests_come_and_nothing_else() -> None:
    slow = arrivals_of("mix:0", requests=20, seed=1)
    fast = at_rate(slow, 40.0)
    assert max(a.at_s for a in fast) == pytest.approx(0.5)
    assert [a.prompt_tokens for a in fast] == [a.prompt_tokens for a in slow]
    with pytest.raises(TraceError, match="at once"):
        at_rate(arrivals_of("decode32"), 2.0)


# --- devices


def device(clock: Clock, cores: float | None = None) -> Processor:
    return Processor(clock, msgspec.structs.replace(SMALL, cores=cores))


def launch(clock: Clock, *parts: Part) -> dict[int, float]:
    """Run parts together; place -> when each was over, once the clock has run out."""
    over: dict[int, float] = {}
    for i, part in enumerate(parts):
        part.group = parts[0].group

        def note(i: int = i) -> None:
            over[i] = clock.now

        part.on_over = note
    run_together(parts)
    return over


def run_out(clock: Clock) -> None:
    while True:
        try:
            clock.step()
        except IndexError:
            return


def test_steps_of_both_lanes_slow_each_other_down_while_both_run() -> None:
    clock = Clock()
    here = Device(device(clock))
    prefill = launch(clock, Part(here, "prefill", 1.5, Group()))
    decode = launch(clock, Part(here, "decode", 0.25, Group()))
    run_out(clock)
    assert decode[0] == pytest.approx(0.5)  # twice as long
    assert prefill[0] == pytest.approx(0.5 + 1.5 - 0.5 / 1.5)


def test_members_wait_for_who_has_earlier_steps_to_run_and_for_the_slowest() -> None:
    clock = Clock()
    devices = [Device(device(clock)), Device(device(clock))]
    launch(clock, Part(devices[0], "decode", 1.0, Group()))
    both = launch(clock, *(Part(each, "decode", work, Group()) for each, work in zip(devices, (0.2, 0.5), strict=True)))
    after = launch(clock, Part(devices[0], "decode", 0.1, Group()))
    run_out(clock)
    assert both == {0: pytest.approx(1.5), 1: pytest.approx(1.5)}
    assert after[0] == pytest.approx(1.6)


def test_instances_of_one_machine_share_its_cores() -> None:
    clock = Clock()
    shared = device(clock, cores=2.0)
    over = [launch(clock, Part(Device(shared), "prefill", work, Group())) for work in (1.0, 1.0, 2.0)]
    run_out(clock)
    assert over[0][0] == over[1][0] == pytest.approx(1.5)
    assert over[2][0] == pytest.approx(2.5)  # from then on alone


# --- step times


def test_who_has_no_rows_reads_no_weights() -> None:
    times = LaneTimes(base=1.0, row=0.1, attended=0.01, exchange=0.5, served=0.02)
    assert times.of(Load(0, 0, 0, 0)) == 0
    assert times.of(Load(0, 10, 0, 5)) == pytest.approx(0.1 + 0.5 + 0.1)
    assert times.of(Load(2, 10, 0, 0)) == pytest.approx(1.0 + 0.2 + 0.1)


def test_times_are_written_and_read(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    write_times(H200_8B, file)
    assert read_times(file) == H200_8B
    file.write_text(json.dumps(json.loads(file.read_text()) | {"host_s": 0}))
    with pytest.raises(TimesError, match="host_s must be positive, got 0"):
        read_times(file)
    file.write_text("{}")
    with pytest.raises(TimesError, match="missing required field"):
        read_times(file)


def test_times_come_back_from_what_a_service_fitted(tmp_path: Path) -> None:
    """Of steps that took what these times say: whoever simulates with what comes back sees nearly the same."""
    service = Service(Setting(profile=H200_8B, instances=2))
    file, times = tmp_path / "stats.json", tmp_path / "times.json"
    file.write_bytes(msgspec.json.encode(service.cluster.stats()))
    with pytest.raises(TimesError, match="no prefill step of cell 'main' has been heard of"):
        read_stats(file, SMALL)
    service.run(at_rate(arrivals_of("mix:3", requests=60), 4.0))
    file.write_bytes(msgspec.json.encode(service.cluster.stats()))
    command.write_profile(command.parse(["times", "--stats", str(file), "--out", str(times)]), SMALL)
    found = read_times(times)
    assert (found.kv_tokens, found.block_size) == (H200_8B.kv_tokens, H200_8B.block_size)
    assert (found.link_s, found.reach, found.chunk_tokens) == (SMALL.link_s, SMALL.reach, SMALL.chunk_tokens)
    assert "the rest: small" in found.source
    for load in (Load(1, 1024, 0, 0), Load(32, 32 * 4096, 0, 0), Load(1, 65536, 1, 0)):
        assert found.decode_s(load) == pytest.approx(H200_8B.decode_s(load), rel=0.02)
    for load in (Load(1024, 1024 * 512, 0, 0), Load(8192, 8192 * 4096, 0, 0)):
        assert found.prefill_s(load) == pytest.approx(H200_8B.prefill_s(load), rel=0.15)
    assert found.decode_beside == pytest.approx(H200_8B.decode_beside, rel=0.05)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "Input data was truncated"), ('{"epoch": 1}', "missing required field"), (None, "has 0 cells whose step times")],
)
def test_stats_without_times_are_refused(content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    if content is None:
        content = msgspec.json.encode(Cluster(GManagerConfig()).stats()).decode()
    file.write_text(content)
    with pytest.raises(TimesError, match=said):
        read_stats(file, H200_8B)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"policy": "best"}, "the policy must be .*, split, separate, large, auto, all or a number of instances, got 'best'"),
        ({"grain": 7}, "a block of 4 tokens is no multiple of 7"),
        ({"policy": "split:2"}, "split:N has 1 to 1 of 2 instances prefill, got 'split:2'"),
        ({"policy": "split:x"}, "split:N has 1 to 1 of 2 instances prefill"),
        ({"policy": "loong:1"}, "only split says how many instances prefill"),
        ({"instances": 0}, "there must be one instance at least"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Setting(**({"profile": SMALL, "instances": 2} | fields))


# --- the search


SLOW = msgspec.structs.replace(
    SMALL,
    decode=LaneTimes(base=0.2, row=0.05, attended=0.0),
    prefill=LaneTimes(row=0.02, attended=0.0),
    kv_tokens=1024,
    chunk_tokens=64,
    mixed_chunk_tokens=64,
)
"""A prompt of 32 tokens takes 0.64 s, a step of decodes 0.2 s and 0.05 s for each: differences are far above a tick."""


def searched(**fields: Any) -> Search:
    arrivals = [Arrival(at_s=0.1 * i, prompt_tokens=32, max_tokens=5) for i in range(1, 21)]
    defaults = {"setting": Setting(profile=SLOW, instances=4), "arrivals": arrivals, "ttft_s": 3.0, "tpot_s": 0.5}
    return Search(**(defaults | fields))


def test_the_best_split_is_the_best_of_all() -> None:
    search = searched()
    found = search.best()
    rates = [min(search.goodput("prefill", count), search.goodput("decode", 4 - count)) for count in range(1, 4)]
    assert found[0].prefill + found[0].decode == 4
    assert found[0].rate == max(rates)


def test_a_phase_holds_the_rate_that_it_is_said_to() -> None:
    told: list[Tried] = []
    search = searched(tell=told.append)
    rate = search.goodput("prefill", 2)
    assert 2.2 < rate < 3.5  # two instances do 2 / 0.64 a second
    held = [one for one in told if one.rate == rate]
    assert held
    assert held[0].attained >= 0.9
    assert any(one.attained < 0.9 and one.rate <= rate * 1.06 for one in told)
    assert search.fewest("prefill", rate) == 2
    assert search.fewest("prefill", 4 * rate) is None


FAST = msgspec.structs.replace(SLOW, prefill=LaneTimes(row=2e-4, attended=0.0))
"""A prompt of 32 tokens takes 6.4 ms: four instances do 625 a second."""


def test_a_rate_that_takes_more_requests_than_a_simulation_has_is_found() -> None:
    told: list[Tried] = []
    rate = searched(setting=Setting(profile=FAST, instances=4), ttft_s=0.3, most_requests=800, tell=told.append).goodput(
        "prefill", 4
    )
    assert 550 < rate < 900  # 20 times 0.3 s would be 3,750 requests; 800 come in 1.3 s, so somewhat more seem to hold
    assert len(told) <= 8  # the first guess is near


def test_a_rate_at_which_all_that_come_at_once_hold_has_no_end() -> None:
    """80 prompts take 0.13 s."""
    assert searched(setting=Setting(profile=FAST, instances=4), most_requests=80).goodput("prefill", 4) == math.inf
    with pytest.raises(ValueError, match="1 request at least, got 0"):
        searched(most_requests=0)


def test_split_is_simulated_token_by_token() -> None:
    """It compares prompts with decode steps: one that stood for eight made prompts of half the trace cheap."""
    args = command.parse(["run", "--grain", "8"])
    grains = {policy: command.setting_of(args, H200_8B, 4, policy).grain for policy in ("elastic", "split", "split:3")}
    assert grains == {"elastic": 8, "split": 1, "split:3": 1}


def test_a_trace_that_is_repeated_goes_on_with_other_prompts() -> None:
    one = BlockArrival(at_s=1.0, prompt_tokens=4, max_tokens=1, hash_ids=[0, 3], block_tokens=2)
    other = BlockArrival(at_s=2.0, prompt_tokens=4, max_tokens=1, hash_ids=[0, 1], block_tokens=2)
    more = repeated([one, other], 5)
    assert [arrival.at_s for arrival in more] == [1.0, 2.0, 4.0, 5.0, 7.0]
    ids = [arrival.hash_ids for arrival in more if isinstance(arrival, BlockArrival)]
    assert ids == [[0, 3], [0, 1], [4, 7], [4, 5], [8, 11]]


# --- beside a real service


def test_measurements_give_back_the_times_that_made_them() -> None:
    """Of a service that takes exactly what a profile says."""
    base = untimed(kv_tokens=4096, others=0.0)
    row, step, link_s, between = 5e-4, 0.02, 1e-3, 0.021
    pairs = SHARED**2 / (2 * base.reach)
    measured = Measured(
        round_trip=between + 6 * link_s,
        between=between,
        step=step,
        alone=between + 6 * link_s + 2 * step + row * (SHARED + pairs),
        shared_prefill=0.0,
        shared_between=between + 0.005,
    )
    profile = fit(base, measured, 3)
    assert profile.prefill.row == profile.decode.row == pytest.approx(row)
    assert profile.prefill.base == pytest.approx(step)
    assert profile.link_s == pytest.approx(link_s)
    assert profile.host_s == pytest.approx(between - step)
    assert profile.prefill.exchange == 0
    at_home = profile.decode.of(Load(1, SHARED // 3, 0, 0))
    assert profile.decode.exchange == pytest.approx(between + 0.005 - max(between, at_home))


async def test_no_prompt_of_a_sweep_is_asked_twice() -> None:
    """The second would be cached."""
    prompts: list[tuple[int, ...]] = []

    class Client:
        async def generate(self, prompt: list[int], params: Any, *, spread: Any) -> AsyncIterator[SimpleNamespace]:
            prompts.append(tuple(prompt))
            yield SimpleNamespace(token_ids=[1])

    sweep = Sweep(Client(), 3, 4096)  # type: ignore[arg-type]
    for lengths in ([(64, 1)] * 3, [(64, 1)] * 6, [(64, 1)], [(64, 1)]):
        await sweep._ask(lengths)
    assert len({prompt[:16] for prompt in prompts}) == len(prompts) == 11


@pytest.mark.parametrize(("factor", "slower"), [(1.0, 2.0), (1.4, 1.5)])
def test_steps_are_levelled_until_they_take_together_what_was_counted(factor: float, slower: float) -> None:
    """A service that is slower, and slows decodes down beside prompts, is found again from what its lanes' steps took."""
    times = LaneTimes(base=8e-3, row=3e-4, attended=1e-7)
    base = msgspec.structs.replace(
        untimed(kv_tokens=4096, others=0.0), decode=times, prefill=times, link_s=1e-3, host_s=1e-4, meet_s=2e-3, cores=2.0
    )
    trace = command.at_rate(arrivals_of("mix:2", requests=160, scale=0.04), 8)
    slow = msgspec.structs.replace(scaled(base, factor), decode_beside=slower)
    real = simulate(Setting(profile=slow, instances=3), trace)
    profile, outcome = level(base, 3, trace, prefill_s=real.prefill_s, decode_s=real.decode_s)
    assert outcome.prefill_s == pytest.approx(real.prefill_s, rel=0.02)
    assert outcome.decode_s == pytest.approx(real.decode_s, rel=0.02)
    assert profile.prefill.row / base.prefill.row == pytest.approx(factor, rel=0.05)
    assert profile.decode_beside == pytest.approx(slower, rel=0.15)


@pytest.mark.slow
def test_the_same_trace_for_real_and_simulated(tmp_path: Path) -> None:
    """Both sides answer all requests; how near they are is for a quiet machine to say (docs/simulator.md)."""
    flags = ("--requests", "20", "--rate", "5", "--rounds", "1", "--within", "100", "--instances", "2", "--out", str(tmp_path))
    done = simulate_py("validate", *flags)
    assert done.returncode == 0, done.stderr
    report = msgspec.json.decode((tmp_path / "simulate.json").read_bytes(), type=command.Report)
    (one,) = report.rounds
    assert one.real.count == one.simulated.count == 20
    assert one.real.failed == one.simulated.failed == 0
    assert one.prefill_s > 0
    assert one.decode_s > 0


def test_too_far_apart_is_said_by_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the service's side only the answer is made up."""
    trace = arrivals_of("mix:2", requests=160, scale=0.04)
    real = simulate(Setting(profile=SLOW, instances=3), trace[:5]).timings
    late = [msgspec.structs.replace(one, token_s=[2 * at for at in one.token_s]) for one in real]
    sides = [summarise(side)[-1] for side in (real, late)]
    one = Round(
        real=sides[0], simulated=sides[1], profile=SLOW, prefill_s=0.5, decode_s=0.5, real_ttft_s=[], simulated_ttft_s=[]
    )
    measured = Measured(round_trip=0, between=0, step=0, alone=0, shared_prefill=0, shared_between=0)

    async def compared(*_: Any, **__: Any) -> tuple[Measured, list[Round]]:
        return measured, [one]

    monkeypatch.setattr("_validation.validate", compared)
    monkeypatch.setattr("sys.argv", ["simulate.py", "validate", "--out", str(tmp_path)])
    assert command.main() == 1
    assert "TTFT s p50" in capsys.readouterr().err
    assert (tmp_path / "simulate.json").exists()
    monkeypatch.setattr("sys.argv", ["simulate.py", "validate", "--out", str(tmp_path), "--within", "5"])
    assert command.main() == 0


# --- the command


def simulate_py(*words: str) -> "subprocess.CompletedProcess[str]":
    script = Path(command.__file__)
    return subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=120, check=False)


def test_the_command_writes_a_report_and_a_picture(tmp_path: Path) -> None:
    flags = ("--requests", "20", "--rates", "1", "4", "--slo-ttft", "5", "--out", str(tmp_path), "--instances", "3")
    done = simulate_py("run", "--trace", "mix:3", *flags)
    assert done.returncode == 0, done.stderr
    report = msgspec.json.decode((tmp_path / "simulate.json").read_bytes(), type=command.Report)
    policies = command.POLICIES
    assert "elastic" in policies
    assert [(r.rate, r.policy) for r in report.results] == [(rate, policy) for rate in (1.0, 4.0) for policy in policies]
    assert all(result.figures.count == 20 and result.figures.goodput_per_s for result in report.results)
    assert (tmp_path / "simulate.png").read_bytes().startswith(b"\x89PNG")
    assert "goodput/s" in done.stdout


def test_a_bad_line_of_a_trace_is_told_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    good = {"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]}
    file.write_text(f"{json.dumps(good)}\n{json.dumps(good | {'hash_ids': [0]})}\n")
    done = simulate_py("run", "--trace", str(file), "--out", str(tmp_path))
    assert done.returncode == 2
    assert "line 2: 1 hash_ids of 512 tokens" in done.stderr
    assert not (tmp_path / "simulate.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--instances", "0"], "--instances must be at least 1, got 0"),
        (["--instances", "2000"], "--instances is at most 1024"),
        (["--rates", "-1"], "--rates must be positive, got -1"),
        (["--grain", "0"], "--grain must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_numbers_that_make_no_sense_end_the_command(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.parse(["run", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_jobs_run_beside_each_other_and_come_in_order() -> None:
    cases = [
        Case(
            setting=Setting(profile=SMALL, instances=n),
            trace=str(n),
            rate=None,
            arrivals=at_once((8, 4)),
            objectives=Objectives(),
        )
        for n in (1, 2, 3)
    ]
    assert [result.instances for result in run_all(cases, jobs=2)] == [1, 2, 3]


def test_it_starts_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, simulate; sys.exit('torch' in sys.modules)"],
        cwd=Path(command.__file__).parent,
        check=False,
    )
    assert done.returncode == 0
