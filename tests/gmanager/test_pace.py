"""Lines, margins and means by what they are to find again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.cluster.forecast import work_until
from gmanager.cluster.pace import LEAST, Least, Line, Margin, Mean, Measured

positive = st.floats(1e-3, 1e3)


def line(*samples: tuple[float, float], is_flat: bool = False) -> Line:
    found = Line(memory=32, is_flat=is_flat)
    for x, y in samples:
        found.add(x, y)
    return found


def test_nothing_is_said_before_enough_was_measured() -> None:
    pace = Measured()
    for _ in range(LEAST - 1):
        pace.hear_prefill(100, 1)
        pace.hear_steps(4, 0.01)
    assert (pace.prefill_s(100), pace.decode_step_s(4)) == (None, None)
    pace.hear_prefill(100, 1)
    pace.hear_steps(4, 0.01)
    assert pace.prefill_s(100) == pytest.approx(1)
    assert pace.decode_step_s(4) == pytest.approx(0.01)


def test_what_equal_samples_dont_tell() -> None:
    """Of prompts twice the work takes twice the time; of steps twice the rows take no more."""
    assert line(*[(100, 2)] * 5).at(200) == pytest.approx(4)
    assert line(*[(8, 0.01)] * 5, is_flat=True).at(16) == pytest.approx(0.01)


@given(a=st.floats(0.01, 1), b=st.floats(0, 1), is_flat=st.booleans())
def test_a_line_is_found_again(a: float, b: float, is_flat: bool) -> None:
    found = line(*((x, a + b * x) for _ in range(20) for x in (1, 3, 10)), is_flat=is_flat)
    for x in (1, 2, 5, 10):
        assert found.at(x) == pytest.approx(a + b * x, rel=0.15)


@given(st.lists(st.tuples(positive, positive), min_size=LEAST, max_size=40), positive, positive, st.booleans())
def test_more_takes_no_less_and_never_nothing(samples: list[tuple[float, float]], x: float, more: float, is_flat: bool) -> None:
    found = line(*samples, is_flat=is_flat)
    first, second = found.at(x), found.at(x + more)
    assert first is not None and second is not None
    assert 0 < first <= second * (1 + 1e-9)


def test_one_stall_is_forgotten_and_a_change_learned() -> None:
    found = line(*[(100, 1)] * 20, (100, 500))
    assert found.at(100) < 1.2  # type: ignore[operator]
    for _ in range(100):
        found.add(100, 10)
    assert found.at(100) == pytest.approx(10, rel=0.05)


def test_margins() -> None:
    margin = Margin()
    margin.hear(None, 9)
    for _ in range(100):
        margin.hear(1, 0.5)
    assert margin.factor == 1, "what comes early does no harm"
    for _ in range(200):
        margin.hear(1, 1.5)
    assert margin.factor == pytest.approx(1.5, abs=0.01)
    for _ in range(200):
        margin.hear(1, 1000)
    assert margin.factor <= 3


def test_the_least_of_late() -> None:
    least = Least()
    assert least.value is None
    for value in (3, 1, 2):
        least.hear(value)
    assert least.value == pytest.approx(1, abs=0.01)
    for _ in range(2000):
        least.hear(2)
    assert least.value == pytest.approx(2, abs=0.01)


def test_means() -> None:
    mean = Mean()
    for _ in range(LEAST):
        assert mean.value is None
        mean.hear(2)
    assert mean.value == 2
    mean.hear(5)
    assert mean.value == 3


def test_work_until_a_first_token() -> None:
    """What is shorter goes before it; of what is longer as much as it has itself, and what goes before it."""
    assert work_until({0: 10}, []) == 10
    assert work_until({0: 10}, [{0: 4}, {0: 6}]) == 20
    assert work_until({0: 10}, [{0: 1000}]) == 20
    assert work_until({0: 10}, [{0: 1000}, {0: 4}]) == 28
    assert work_until({0: 10}, [{0: 12}, {0: 4}]) == 26
    assert work_until({0: 10, 1: 10}, [{1: 5}, {2: 100}]) == 15, "on two, where there is more"
    assert work_until({0: 10}, [{0: 9, 1: 100}, {0: 8, 1: 100}]) == 20, "long by all that it has"
