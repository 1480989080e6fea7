"""Who goes first: in the queue for memory, and when there is too little of it. Literal events, as test_cluster.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.cluster.events import Action, Send
from gmanager.cluster.request import PRIORITY_S
from gmanager.wire import messages as m
from tests.gmanager.cluster_support import CLIENT, Driver, beat, cancel, outputs, peer, running, serving, submit


def admitted(actions: list[Action]) -> list[int]:
    """Numbers of requests."""
    return [a.message.arrival for a in actions if isinstance(a, Send) and isinstance(a.message, m.Admit)]


def full(**config: object) -> Driver:
    """A cell whose only instance holds one request."""
    driver = serving(4, **config)
    running(driver, "runs", max_tokens=4)
    return driver


def served(driver: Driver, seq: int, count: int) -> list[int]:
    """Each request ends, and the next is admitted: in which order, by number."""
    order: list[int] = []
    for each in range(seq, seq + count):
        driver.free[peer(0)] = 4
        last = outputs(each, 0, [9], finish_reason="length", held=[])
        order += admitted(driver.grant(driver.say(peer(0), last, beat(4), m.Released(epoch=1, seq=each, generated=1))))
    return order


def ask(driver: Driver, priority: int) -> None:
    """For so much memory that there is room for one such request."""
    name = f"r{len(driver.cluster.stats().requests)}"
    assert admitted(driver.say(CLIENT, submit(name, 8, priority=priority, max_tokens=1))) == []


def test_the_queue_is_by_priority_and_arrival() -> None:
    driver = full()
    for priority in (0, 1, -1, 0, -1):
        ask(driver, priority)
    assert served(driver, 1, 5) == [4, 6, 2, 5, 3]


@pytest.mark.parametrize(("seconds", "order"), [(59, [3, 2]), (61, [2, 3])], ids=["not yet", "it has waited for a level"])
def test_who_waits_rises(seconds: int, order: list[int]) -> None:
    driver = full()
    ask(driver, 0)
    driver.wait(seconds, CLIENT, peer(0))
    ask(driver, -1)
    assert served(driver, 1, 2) == order


levels = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 90)), min_size=1, max_size=8)


@given(levels)
def test_nobody_starves(requests: list[tuple[int, int]]) -> None:
    """Who comes later goes first only within a minute for each level that it stands above."""
    driver = full(max_queue_wait_s=1e6)
    came = []
    for priority, seconds in requests:
        driver.now += seconds
        ask(driver, priority)
        came.append((driver.now, priority))
    order = [number - 2 for number in served(driver, 1, len(came))]
    assert sorted(order) == list(range(len(came)))
    for at, later in enumerate(order):
        for earlier in order[at + 1 :]:
            if earlier < later:
                (since, low), (at_s, high) = came[earlier], came[later]
                assert high < low
                assert at_s - since < PRIORITY_S * (low - high)


@pytest.mark.parametrize(("old", "young", "victim"), [(0, 0, 2), (0, 1, 2), (1, 0, 1)])
@pytest.mark.parametrize("needy", [0, 1])
def test_the_lower_priority_gives_way(old: int, young: int, victim: int, needy: int) -> None:
    """Whichever of the two needs a block, and whatever it takes to compute them again."""
    driver = serving(4, 4)
    running(driver, "old", generated=1, priority=old, max_tokens=4)
    running(driver, "young", generated=2, priority=young, max_tokens=4)
    assert driver.say(peer(needy), m.NeedBlock(epoch=1, seq=needy + 1)) == [cancel(victim - 1, victim)]
