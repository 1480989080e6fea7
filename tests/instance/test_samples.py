"""Which steps the gManager hears of, what it is told of them, and made-up steps before the first real one."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.layout import Layout, Reading
from gmanager.wire.messages import MAX_STEP_SAMPLES, StepSample
from instance.calibrate import BUDGET_S, Room, calibrate, plans
from instance.plan import StepPlan
from instance.samples import StepLog
from instance.step import LANES, Lane

IDLE = Layout(num_rows=0, own=[], dispatched_rows=[], dispatched={}, received={}, others=[])
MS = 10**6


def alone(*kv_lens: int) -> Layout:
    """A step of rows that see so many tokens each."""
    own = [Reading(row, 1, (0,), (tokens,)) for row, tokens in enumerate(kv_lens)]
    return Layout(num_rows=len(own), own=own, dispatched_rows=[], dispatched={}, received={}, others=[])


def run(log: StepLog, lane: Lane, *layouts: Layout) -> None:
    for layout in layouts:
        log.launched(lane, layout)
        log.ended(lane, 2 * MS, 0)


def test_a_step_by_hand() -> None:
    """Three own rows, two of which go to two others each; four rows of others see one run here."""
    layout = Layout(
        num_rows=3,
        own=[Reading(0, 3, (1, 2), (5, 6, 7)), Reading(0, 1, (3,), (2,))],
        dispatched_rows=[0, 1, 0, 1],
        dispatched={1: 2, 2: 2},
        received={1: 1, 2: 3},
        others=[Reading(0, 4, (4,), (10, 10, 10, 10))],
    )
    log = StepLog()
    run(log, "prefill", layout)
    sample = StepSample(lane=0, rows=3, attended=5 + 6 + 7 + 2 + 40, sent=4, served=4, us=2000, beside=False)
    assert log.take() == [sample]
    assert log.take() == []


def test_the_newest_of_each_lane_fit_a_beat() -> None:
    log = StepLog()
    run(log, "decode", *(alone(tokens) for tokens in range(1, 101)))
    run(log, "prefill", *(alone(tokens, tokens) for tokens in range(1, 51)))
    samples = log.take()
    assert len(samples) == MAX_STEP_SAMPLES
    assert [s.attended for s in samples if s.lane == 1] == list(range(93, 101))
    assert [s.attended for s in samples if s.lane == 0] == list(range(86, 101, 2))


def test_what_a_step_waited_for_others_is_its_own() -> None:
    """The second is queued behind the first, which the device ran for 2 ms; the third after all had ended."""
    log = StepLog()
    log.launched("decode", alone(1))
    log.launched("decode", alone(2))
    log.ended("decode", 2 * MS, 50 * MS)
    log.ended("decode", 2 * MS, 57 * MS)
    log.launched("decode", alone(3))
    log.launched("decode", alone(4))
    log.ended("decode", 2 * MS, 90 * MS)
    log.ended("decode", 2 * MS, 91 * MS)
    assert [sample.us for sample in log.take()] == [2000, 7000, 2000, 2000]


def test_idle_steps_and_those_of_no_time_are_left_out() -> None:
    log = StepLog()
    run(log, "decode", IDLE, alone(3), IDLE)
    log.launched("decode", alone(4))
    log.ended("decode", 0, 0)  # a device that is made up
    assert [s.attended for s in log.take()] == [3]


def test_steps_that_run_side_by_side() -> None:
    """prefill   |-a-|    |--c--|  |-e-|
    decode         |b||i|  |-d-|        |f|      i is idle"""
    a, b, c, d, e, f = (alone(tokens) for tokens in range(1, 7))
    log = StepLog()
    log.launched("prefill", a)
    log.launched("decode", b)
    log.ended("prefill", MS, 0)
    log.launched("decode", IDLE)
    log.ended("decode", MS, 0)
    log.launched("prefill", c)
    log.ended("decode", MS, 0)
    log.launched("decode", d)
    log.launched("prefill", e)  # behind c
    log.ended("decode", MS, 0)
    log.ended("prefill", MS, 0)
    log.ended("prefill", MS, 0)
    run(log, "decode", f)
    told = {s.attended: s.beside for s in log.take()}
    assert told == {1: True, 2: True, 3: True, 4: True, 5: False, 6: False}


rooms = st.builds(
    Room,
    num_blocks=st.integers(1, 5000),
    block_size=st.sampled_from([1, 4, 16, 64]),
    max_context=st.integers(1, 10000),
    chunk_tokens=st.integers(1, 8192),
)


@given(rooms, st.sampled_from(LANES))
def test_made_up_steps_fit_what_there_is_and_write_nothing(room: Room, lane: Lane) -> None:
    made = list(plans(lane, room))
    assert 1 <= len(made) <= MAX_STEP_SAMPLES // 2, "as many as are told of"
    for plan in made:
        assert set(plan.slots_T) == {-1}
        assert len(plan.token_ids_T) == len(plan.positions_T) == len(plan.slots_T) == plan.layout.num_rows
        assert plan.layout.num_rows <= max(64, room.chunk_tokens)
        assert all(0 <= position < room.max_context for position in plan.positions_T)
        assert all(sample.seq < 0 for sample in plan.sampled)
        blocks = [block for reading in plan.layout.own for block in reading.block_ids]
        assert len(set(blocks)) == len(blocks)
        assert all(0 <= block < room.num_blocks for block in blocks)
        for reading in plan.layout.own:
            rows = range(reading.first_row, reading.first_row + reading.num_rows)
            assert list(reading.kv_lens) == [plan.positions_T[row] + 1 for row in rows]
            assert max(reading.kv_lens) <= len(reading.block_ids) * room.block_size
        assert plan.is_decode == (lane == "decode")
        if plan.is_decode:
            assert len(plan.sampled) == plan.layout.num_rows
            assert all(reading.num_rows == 1 for reading in plan.layout.own)


@pytest.mark.parametrize(("ns_per_row", "at_least", "at_most"), [(10, 8, 8), (BUDGET_S * 1e9 / 20, 1, 3)])
async def test_slow_devices_try_few_steps(ns_per_row: float, at_least: int, at_most: int) -> None:
    """Each runs twice, and the second time counts."""
    ran: list[tuple[Lane, Layout]] = []
    noted: list[tuple[Lane, Layout, int]] = []

    async def step(lane: Lane, plan: StepPlan) -> int:
        ran.append((lane, plan.layout))
        return round(ns_per_row * plan.layout.num_rows) + len(ran) % 2

    await calibrate(Room(5000, 16, 10000, 512), step, lambda *said: noted.append(said))
    assert [(lane, layout) for lane, layout, _ in noted] == ran[1::2] == ran[::2]
    assert all(ns % 2 == round(ns_per_row * layout.num_rows) % 2 for _, layout, ns in noted)
    for lane in LANES:
        assert at_least <= _count(noted, lane) <= at_most


def _count(noted: Sequence[tuple[Lane, Layout, int]], lane: Lane) -> int:
    return sum(its == lane for its, _, _ in noted)
