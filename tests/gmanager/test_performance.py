"""How long steps take: synthetic steps with known costs are fitted, and what is predicted of any steps makes sense."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.cluster.cells import kind_of
from gmanager.cluster.events import Action, Measured, Send, Ticked, Write
from gmanager.cluster.fitting import fit
from gmanager.cluster.performance import (
    MAX_FACTOR,
    MIN_NEW,
    NUM_RECENT,
    REFIT_S,
    Costs,
    PerformanceModel,
    StepCosts,
    guess,
)
from gmanager.wire import messages as m
from gmanager.wire.codec import Decoder, encode
from gmanager.wire.errors import BadMessage
from gmanager.wire.messages import MAX_STEP_SAMPLES, StepSample
from tests.gmanager.cluster_support import CLIENT, Driver, peer, register

REACH = 8192

SMALL = StepCosts(step_s=4e-3, row_s=300e-6, attended_s=50e-9, moved_s=100e-6, exchange_s=3e-3)
LARGE = StepCosts(step_s=0.2, row_s=5e-3, attended_s=2e-6, moved_s=2e-3, exchange_s=0.1)


def decode_step(draw: random.Random) -> StepSample:
    """One of any size; in half of them rows travel."""
    rows = draw.choice((1, 2, 5, 16, 40, 128))
    moved = draw.choice((0, 0, rows, 3 * rows))
    attended = (rows + moved) * draw.choice((50, 500, 5000, 50000))
    return StepSample(lane=1, rows=rows, attended=attended, sent=moved, served=0, us=1, beside=False)


def run(sample: StepSample, costs: StepCosts, draw: random.Random, *, noise: float = 0.03, slow: float = 1.0) -> StepSample:
    """The sample with the time that it takes."""
    moved = sample.sent + sample.served
    seconds = costs.predict(rows=sample.rows, attended=sample.attended, moved=moved) * slow
    if sample.beside:
        seconds *= costs.beside
    return StepSample(**{name: getattr(sample, name) for name in sample.__struct_fields__} | {"us": _us(seconds, draw, noise)})


def _us(seconds: float, draw: random.Random, noise: float) -> int:
    return max(1, round(seconds * 1e6 * draw.lognormvariate(0, noise)))


def feed(model: PerformanceModel, samples: list[StepSample], *, instance: int = 0, now: float = 0.0) -> float:
    """Beats with all of them, a tick after each. The time then."""
    for at in range(0, len(samples), MAX_STEP_SAMPLES):
        assert model.take(instance, samples[at : at + MAX_STEP_SAMPLES]) == 0
        model.refit(now)
        now += REFIT_S
    return now


@pytest.mark.parametrize("costs", [SMALL, LARGE])
def test_costs_are_found_though_a_fifth_of_the_steps_took_ten_times_as_long(costs: StepCosts) -> None:
    draw = random.Random(1)
    samples = [run(decode_step(draw), costs, draw) for _ in range(600)]
    held_up = [
        StepSample(**{name: getattr(s, name) for name in s.__struct_fields__} | {"us": s.us * (10 if i % 5 == 0 else 1)})
        for i, s in enumerate(samples)
    ]
    model = PerformanceModel(REACH)
    feed(model, held_up)
    found = model.costs.decode
    for got, want in zip(found.coefficients, costs.coefficients, strict=True):
        assert got == pytest.approx(want, rel=0.1), found


def test_the_error_is_that_of_predictions_and_falls() -> None:
    draw = random.Random(2)
    model = PerformanceModel(REACH)
    assert model.error("decode") is None
    now = feed(model, [run(decode_step(draw), LARGE, draw) for _ in range(2)])
    assert model.error("decode") is None, "a guess is no prediction"
    now = feed(model, [run(decode_step(draw), LARGE, draw) for _ in range(MAX_STEP_SAMPLES)], now=now)
    from_two = model.error("decode")
    assert from_two is not None
    assert from_two > 0.05
    feed(model, [run(decode_step(draw), LARGE, draw) for _ in range(400)], now=now)
    learnt = model.error("decode")
    assert learnt is not None
    assert learnt < 0.04
    assert (model.error("prefill"), model.num_samples("prefill"), model.num_samples("decode")) == (None, 0, 418)


def test_one_step_tells_how_fast_the_machine_is() -> None:
    model = PerformanceModel(REACH)
    step = StepSample(lane=1, rows=4, attended=4000, sent=0, served=0, us=1, beside=False)
    slow = guess(REACH).decode.predict(rows=4, attended=4000) * 7
    feed(model, [StepSample(**{name: getattr(step, name) for name in step.__struct_fields__} | {"us": round(slow * 1e6)})])
    before = guess(REACH).decode_step_s(50, 10**6, 20)
    assert model.costs.decode_step_s(50, 10**6, 20) == pytest.approx(7 * before, rel=0.01)


def test_what_rare_long_steps_taught_outlasts_many_short_ones() -> None:
    draw = random.Random(3)
    model = PerformanceModel(REACH)
    now = feed(model, [run(decode_step(draw), SMALL, draw) for _ in range(300)])
    short = StepSample(lane=1, rows=1, attended=30, sent=0, served=0, us=1, beside=False)
    feed(model, [run(short, SMALL, draw) for _ in range(4 * NUM_RECENT)], now=now)
    want = SMALL.predict(rows=128, attended=128 * 50000)
    assert model.costs.decode_step_s(128, 128 * 50000) == pytest.approx(want, rel=0.1)


def test_a_machine_that_becomes_slower_is_followed() -> None:
    draw = random.Random(4)
    model = PerformanceModel(REACH)
    now = feed(model, [run(decode_step(draw), SMALL, draw) for _ in range(300)])
    feed(model, [run(decode_step(draw), SMALL, draw, slow=2.0) for _ in range(3 * NUM_RECENT)], now=now)
    assert model.costs.decode_step_s(16, 16 * 5000) == pytest.approx(2 * SMALL.predict(rows=16, attended=16 * 5000), rel=0.1)


def test_steps_beside_the_other_lane_are_told_apart() -> None:
    draw = random.Random(5)
    costs = replace(SMALL, beside=2.5)
    steps = [decode_step(draw) for _ in range(500)]
    beside = [
        StepSample(**{name: getattr(s, name) for name in s.__struct_fields__} | {"beside": draw.random() < 0.7}) for s in steps
    ]
    model = PerformanceModel(REACH)
    feed(model, [run(s, costs, draw) for s in beside])
    alone_s = SMALL.predict(rows=16, attended=80000)
    assert model.costs.decode_step_s(16, 80000) == pytest.approx(alone_s, rel=0.1)
    assert model.costs.decode_step_s(16, 80000, beside=True) == pytest.approx(2.5 * alone_s, rel=0.1)


def test_an_instance_that_is_slower_than_the_others_has_a_factor() -> None:
    draw = random.Random(6)
    model, now = PerformanceModel(REACH), 0.0
    for _ in range(40):
        for instance, slow in ((0, 1.0), (1, 1.0), (2, 3.0)):
            samples = [run(decode_step(draw), SMALL, draw, slow=slow) for _ in range(MAX_STEP_SAMPLES)]
            now = feed(model, samples, instance=instance, now=now)
    assert model.factor(2) / model.factor(0) == pytest.approx(3, rel=0.1)
    model.forget(2)
    assert model.factor(2) == 1


def test_nothing_is_fitted_between_ticks_too_often_or_from_too_little() -> None:
    draw = random.Random(7)
    model = PerformanceModel(REACH)
    believed = model.costs
    assert not model.refit(0.0)

    def take(count: int) -> None:
        model.take(0, [run(decode_step(draw), LARGE, draw) for _ in range(count)])

    now = 100.0
    take(3)
    assert model.costs == believed
    assert model.refit(now)
    for before in (3, 6, 12, 24):  # twice as many each time
        now += REFIT_S
        take(before - 1)
        assert not model.refit(now)
        take(1)
        assert not model.refit(now - REFIT_S / 2)
        assert model.refit(now)
    now += REFIT_S
    take(MIN_NEW - 1)
    assert not model.refit(now)
    take(1)
    assert model.refit(now)


GOOD = {"lane": 0, "rows": 3, "attended": 9, "sent": 0, "served": 0, "us": 50, "beside": False}


@pytest.mark.parametrize(
    "wrong",
    [
        {"lane": 2},
        {"lane": -1},
        {"rows": -1},
        {"rows": 2**40},
        {"rows": 0},
        {"attended": -1},
        {"attended": 2**63},
        {"sent": -1},
        {"served": 2**40},
        {"us": 0},
        {"us": -5},
        {"us": 2**60},
    ],
)
def test_what_can_be_no_step_is_counted_and_not_taken(wrong: dict[str, int]) -> None:
    model = PerformanceModel(REACH)
    assert model.take(0, [StepSample(**GOOD | wrong), StepSample(**GOOD)]) == 1  # type: ignore[arg-type]
    assert model.num_samples("prefill") + model.num_samples("decode") == 1


def test_copies() -> None:
    model = PerformanceModel(REACH)
    assert model.costs.transfer_s(1000) == pytest.approx(0.01), "a guess"
    for tokens, us in ((1000, 4000), (500, 2000), (1000, 900_000), (0, 5), (7, 0), (7, -3), (7, 2**60)):
        model.take_copy(tokens, us)
    assert model.costs.transfer_s(1000) == pytest.approx(0.004)


def test_costs_that_were_kept_are_what_is_believed() -> None:
    draw = random.Random(8)
    model = PerformanceModel(REACH)
    assert model.is_guess
    kept = Costs(prefill=LARGE, decode=SMALL, copied_s=1e-5)
    model.restore(kept)
    assert (model.costs, model.is_guess) == (kept, False)
    model.take(0, [run(decode_step(draw), SMALL, draw)])
    error = model.error("decode")
    assert error is not None
    assert error < 0.1


def test_shared_prefill() -> None:
    """By hand: 1000 tokens behind 500, on 2 instances, 100 rows a step each."""
    costs = replace(guess(REACH), prefill=StepCosts(step_s=1.0, row_s=0.1, attended_s=1e-3, moved_s=1e-2, exchange_s=0.5))
    attended = (1000 * 500 + 1000 * 1001 / 2) / 2
    assert costs.prefill_s(1000, 500, 2, chunk=100) == pytest.approx(5 * 1.5 + 500 * 0.1 + attended * 1e-3 + 1000 * 1e-2)
    assert costs.prefill_s(1000, 500, chunk=100) == pytest.approx(10 * 1.0 + 1000 * 0.1 + 2 * attended * 1e-3)
    assert costs.prefill_s(0, 500, 2, chunk=100) == 0


@pytest.mark.parametrize("wrong", [{"row_s": -1e-9}, {"step_s": float("nan")}, {"moved_s": float("inf")}, {"beside": 0.5}])
def test_costs_that_cant_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="costs must be finite, at least 0"):
        replace(SMALL, **wrong)


counts = st.integers(min_value=0, max_value=2**20)
any_sample = st.builds(
    StepSample,
    lane=st.integers(0, 1),
    rows=counts,
    attended=st.integers(min_value=0, max_value=2**50),
    sent=counts,
    served=counts,
    us=st.integers(min_value=1, max_value=3600 * 10**6),
    beside=st.booleans(),
)


@given(st.lists(any_sample, max_size=60), st.integers(min_value=1, max_value=2**40))
def test_predictions_are_finite_never_negative_and_grow_with_what_is_to_be_done(samples: list[StepSample], reach: int) -> None:
    model, now = PerformanceModel(reach), 0.0
    for at in range(0, len(samples), 12):
        model.take(at % 3, samples[at : at + 12])
        now += REFIT_S
        model.refit(now)
    for lane in (model.costs.prefill, model.costs.decode):
        assert all(0 <= c < float("inf") for c in lane.coefficients)
        assert 1 <= lane.beside <= MAX_FACTOR
    sizes = (0, 1, 7, 100, 10**4, 10**6)
    assert_grows([model.costs.decode_step_s(rows, 1000) for rows in sizes])
    assert_grows([model.costs.decode_step_s(8, held) for held in sizes])
    assert_grows([model.costs.decode_step_s(8, 1000, moved, moved) for moved in sizes])
    assert_grows([model.costs.prefill_s(tokens, 100, chunk=512) for tokens in sizes])
    assert_grows([model.costs.prefill_s(tokens, 100, 4, chunk=512) for tokens in sizes])
    assert_grows([model.costs.prefill_s(500, prefix, 2, chunk=512) for prefix in sizes])
    assert_grows([model.costs.transfer_s(tokens) for tokens in sizes])


def assert_grows(seconds: list[float]) -> None:
    assert all(0 <= s < float("inf") for s in seconds)
    assert seconds == sorted(seconds)
    assert all(less <= more for less, more in pairwise(seconds)), seconds


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 10**6)), min_size=12, max_size=60),
    st.lists(st.floats(min_value=1e-6, max_value=1.0), min_size=3, max_size=3),
)
def test_a_fit_explains_steps_without_noise(steps: list[tuple[int, int]], costs: list[float]) -> None:
    """What is believed has been another machine, of ten times the speed."""
    costs = [costs[0], costs[1] / 100, costs[2] / 10**6]
    features = [(1.0, float(rows), float(attended)) for rows, attended in steps]
    times = [sum(c * f for c, f in zip(costs, row, strict=True)) for row in features]
    found = fit(features, times, [c / 10 for c in costs])
    for row, time in zip(features, times, strict=True):
        assert sum(c * f for c, f in zip(found, row, strict=True)) == pytest.approx(time, rel=0.02)


def test_no_measurements() -> None:
    with pytest.raises(ValueError, match="there is nothing to fit"):
        fit([], [], [1.0])


# --- in a cluster


def cell_stats(driver: Driver) -> m.CellStats:
    """What a client is told of the only cell, over the wire."""
    (answer,) = driver.say(CLIENT, m.GetStats(call=1))
    assert isinstance(answer, Send)
    reply = Decoder[m.ToClient](m.ToClient).decode(encode(answer.message))
    assert isinstance(reply, m.StatsReply)
    return reply.stats.cells[0]


def ready(driver: Driver) -> None:
    driver.ready_cell(8)
    driver.say(CLIENT, m.Hello(protocol=m.PROTOCOL))


def say_samples(driver: Driver, samples: list[StepSample]) -> None:
    for at in range(0, len(samples), MAX_STEP_SAMPLES):
        said = m.Beat(
            epoch=1, free_blocks=8, held_tokens={}, counters=m.Counters(), samples=samples[at : at + MAX_STEP_SAMPLES]
        )
        driver.say(peer(0), Decoder[m.FromInstance](m.FromInstance).decode(encode(said)))


def tick(driver: Driver, seconds: float) -> list[Measured]:
    """What is to be kept then."""
    driver.now += seconds
    actions = driver.handle(Ticked(driver.now))
    return [action.entry for action in actions if isinstance(action, Write) and isinstance(action.entry, Measured)]


def test_a_cell_shows_what_its_instances_say() -> None:
    draw, driver = random.Random(9), Driver()
    ready(driver)
    before = cell_stats(driver).performance
    assert before is not None
    assert (before.decode.samples, before.decode.error, before.decode.step_us) == (0, None, pytest.approx(10_000))
    say_samples(driver, [run(decode_step(draw), SMALL, draw) for _ in range(200)])
    tick(driver, 1)
    say_samples(driver, [run(decode_step(draw), SMALL, draw) for _ in range(9)])
    after = cell_stats(driver).performance
    assert after is not None
    assert after.decode.samples == 209
    assert after.decode.error == pytest.approx(0.02, abs=0.02)
    assert after.decode.row_us == pytest.approx(300, rel=0.1)
    assert after.decode.attended_ns == pytest.approx(50, rel=0.1)


def test_a_wrong_sample_is_dropped_and_counted() -> None:
    driver = Driver()
    ready(driver)
    say_samples(driver, [StepSample(**GOOD | {"us": -1}), StepSample(**GOOD)])  # type: ignore[arg-type]
    performance = cell_stats(driver).performance
    assert performance is not None
    assert performance.prefill.samples == 1
    assert driver.cluster.stats().counters.dropped_messages == 1


def test_a_beat_with_too_many_samples_is_no_beat() -> None:
    sample = StepSample(**GOOD)  # type: ignore[arg-type]
    beat = m.Beat(epoch=1, free_blocks=8, held_tokens={}, counters=m.Counters(), samples=[sample] * MAX_STEP_SAMPLES)
    beat.samples.append(sample)
    with pytest.raises(BadMessage, match="at most 16 samples of steps, got 17"):
        Decoder[m.FromInstance](m.FromInstance).decode(encode(beat))


def test_what_was_found_is_written_down_seldom_and_believed_after_a_restart() -> None:
    draw, driver = random.Random(10), Driver()
    ready(driver)
    kept: list[tuple[float, Measured]] = []
    for _ in range(60):
        say_samples(driver, [run(decode_step(draw), SMALL, draw) for _ in range(32)])
        kept += [(driver.now, measured) for measured in tick(driver, 1)]
    assert len(kept) >= 4
    assert all(later - sooner >= 10 for (sooner, _), (later, _) in pairwise(kept))
    _, last = kept[-1]

    again = Driver()
    again.cluster.restore_costs({last.kind: last.costs})
    ready(again)
    performance = cell_stats(again).performance
    assert performance is not None
    assert performance.decode.row_us == pytest.approx(300, rel=0.1)
    assert performance.decode.samples == 0


def test_steps_are_measured_beforehand_only_where_nothing_is_known() -> None:
    def calibrates(driver: Driver) -> bool:
        (asked,) = [a for a in form(driver) if isinstance(a, Send) and isinstance(a.message, m.JoinEpoch)]
        assert isinstance(asked.message, m.JoinEpoch)
        return asked.message.calibrate

    assert calibrates(Driver())
    known = Driver()
    known.cluster.restore_costs({kind_of(register(rank=0, cell_size=1).spec): guess(REACH)})
    assert not calibrates(known)
    other = Driver()
    other.cluster.restore_costs({kind_of(register(rank=0, cell_size=1, dtype="bfloat16").spec): guess(REACH)})
    assert calibrates(other)


def test_a_cell_that_serves_does_not_stop_to_measure() -> None:
    driver = Driver()
    driver.ready_cell(8, 8)
    driver.lose(1)
    driver.say(peer(0), m.Kept(epoch=1, free_blocks=8, shards=[]))
    (asked,) = driver.say(peer(0), m.StoreOpened(epoch=2, address="tcp://store:1"))
    assert isinstance(asked, Send)
    assert isinstance(asked.message, m.JoinEpoch)
    assert not asked.message.calibrate


def form(driver: Driver) -> list[Action]:
    """A cell of one instance, until it is to join."""
    driver.say(peer(0), register(rank=0, cell_size=1))
    return driver.say(peer(0), m.StoreOpened(epoch=1, address="tcp://store:1"))


@pytest.mark.parametrize("us", [1, 3600 * 10**6])
@pytest.mark.parametrize("reach", [1, 2**40])
def test_an_instance_that_has_gone_mad_is_fitted(us: int, reach: int) -> None:
    """Its numbers are within the limits and can't be, alone or beside good ones: no system of equations is singular."""
    model = PerformanceModel(reach)
    mad = [StepSample(lane=1, rows=2**20, attended=2**50 + i, sent=2**20, served=9, us=us, beside=False) for i in range(3)]
    good = [StepSample(lane=1, rows=i, attended=i, sent=0, served=0, us=900 + i, beside=False) for i in range(1, 9)]
    for now, samples in enumerate((mad, good, 4 * mad)):
        model.take(0, samples)
        assert model.refit(now * REFIT_S)
        assert 0 <= model.costs.decode_step_s(2**20, 2**50, 2**20) < float("inf")
