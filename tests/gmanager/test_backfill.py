"""Who may go before the next in the queue: only those that will have ended when that one finds room."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.cluster.backfill import PATIENCE_S, REFRESH_S, Ending, room_in
from gmanager.cluster.placement import InstanceView
from tests.gmanager.cluster_support import CLIENT, Driver, beat, outputs, peer, request_stats, running, serving, submit


@given(st.integers(0, 9), st.lists(st.tuples(st.integers(0, 100), st.integers(0, 9)), max_size=40), st.integers(1, 60))
def test_the_first_ending_with_which_there_is_room(free: int, ends: list[tuple[int, int]], wanted: int) -> None:
    """As found by looking at them one after the other; at the earliest the last one's where all are too few."""
    endings = [Ending(float(at), seq, 0, {0: blocks}) for seq, (at, blocks) in enumerate(sorted(ends))]
    view = InstanceView(rank=0, free_blocks=free, total_blocks=1000, homes=len(ends), max_homes=256)

    def fits(views: Sequence[InstanceView]) -> bool:
        return views[0].free_blocks >= wanted

    expected = 0.0
    room = free
    for ending in endings:
        if room >= wanted and expected:
            break
        room, expected = room + ending.blocks[0], ending.in_s
        if room >= wanted:
            break
    assert room_in(fits, [view], endings) == expected


def crowded() -> Driver:
    """20 blocks of 4, of which a sequence that generates 19 tokens more has 14; the next in the queue wants 11."""
    driver = serving(20)
    running(driver, "old", 52, generated=1, max_tokens=20)
    driver.say(peer(0), beat(6, {1: 52}))
    assert driver.say(CLIENT, submit("first", 40, max_tokens=4)) == []
    return driver


def states(driver: Driver, *names: str) -> list[str]:
    return [request_stats(driver, name).state for name in names]


def test_what_will_have_ended_goes_before_it() -> None:
    driver = crowded()
    driver.say(CLIENT, submit("long", 4, max_tokens=21))
    assert states(driver, "first", "long") == ["queued", "queued"], "it would still run when there is room"
    driver.say(CLIENT, submit("short", 4, max_tokens=4))
    assert states(driver, "first", "long", "short") == ["queued", "queued", "reserving"]


def test_who_goes_before_it_is_known_anew_when_what_runs_has_come_further() -> None:
    driver = crowded()
    driver.say(peer(0), outputs(1, 1, [9] * 17))
    driver.now += REFRESH_S
    driver.say(CLIENT, submit("short", 4, max_tokens=4))
    assert states(driver, "short") == ["queued"], "old has two tokens to go"


@pytest.mark.parametrize("waited_s", [0, PATIENCE_S])
def test_nobody_goes_before_it_for_ever(waited_s: float) -> None:
    driver = crowded()
    driver.now += waited_s
    driver.say(CLIENT, submit("short", 4, max_tokens=4))
    assert states(driver, "short") == ["queued" if waited_s else "reserving"]
