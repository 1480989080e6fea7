"""Requests that begin as one that is computed just now: they wait for it, and share it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.cluster.chain import Chain, num_common
from gmanager.wire import messages as m
from tests.gmanager.cluster_support import CLIENT, Driver, beat, outputs, peer, request_stats, reserve, running, serving
from tests.gmanager.test_reuse import ask, cached, released, sharing

DOC = [i % 251 for i in range(240)]
"""60 blocks."""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of some blocks stand for long ones."""
    monkeypatch.setattr("gmanager.cluster.following.LEAST_SAVED", 128)


def computing(*blocks: int) -> Driver:
    """A cell that computes DOC as sequence 1, at instance 0."""
    driver = serving(*blocks or (400,))
    running(driver, "doc", prompt=DOC, max_tokens=4)
    return driver


def states(driver: Driver, *names: str) -> list[str]:
    return [request_stats(driver, name).state for name in names]


def test_who_begins_with_what_is_computed_waits_and_shares_it() -> None:
    driver = computing()
    assert driver.say(CLIENT, ask("same", [*DOC, 7])) == []
    assert driver.say(CLIENT, ask("another", [5, 6])) == [reserve(0, 2, 2)], "it goes before"
    driver.grant([reserve(0, 2, 2)])
    assert driver.say(peer(0), outputs(1, 0, [9])) != []
    assert states(driver, "doc", "same") == ["decode", "queued"], "its instance has not said what can be shared"
    assert driver.say(peer(0), cached(s1=[[(0, 236)]])) == [sharing(0, 3, 5, 1, [[(0, 236)]])]


def test_all_instances_of_it_are_waited_for() -> None:
    driver = serving(200, 200)
    running(driver, "doc", prompt=DOC, max_tokens=4, spread="all")
    driver.say(CLIENT, ask("same", [*DOC, 7]))
    driver.say(peer(0), cached(s1=[[(0, 120)]]))
    assert states(driver, "same") == ["queued"]
    driver.say(peer(1), cached(s1=[[(120, 240)]]))
    assert states(driver, "same") == ["reserving"]


def test_who_would_wait_for_much_more_than_it_shares_does_not() -> None:
    driver = serving(400)
    running(driver, "long", prompt=[*DOC, *range(300)], max_tokens=4)
    driver.say(CLIENT, ask("other end", [*DOC, 7]))
    assert states(driver, "other end") == ["reserving"]


@pytest.mark.parametrize("common", [127, 132])
def test_a_short_beginning_is_not_waited_for(common: int) -> None:
    driver = serving(400)
    running(driver, "doc", prompt=DOC[:200], max_tokens=4)
    driver.say(CLIENT, ask("like it", [*DOC[:common], 250, 250]))
    assert states(driver, "like it") == ["queued" if common >= 128 else "reserving"]


def test_what_lies_there_already_counts() -> None:
    driver = computing()
    driver.say(peer(0), outputs(1, 0, [9]), cached(s1=[[(0, 240)]]))
    running(driver, "more", prompt=[*DOC, *range(100)], max_tokens=4)
    driver.say(CLIENT, ask("same", [*DOC, *range(100)]))
    assert states(driver, "same") == ["reserving"], "only 100 tokens more would be shared"


def test_one_that_ends_without_is_waited_for_no_longer() -> None:
    driver = computing()
    driver.say(CLIENT, ask("first", [*DOC, 7]))
    driver.say(CLIENT, ask("second", [*DOC, 8]))
    driver.say(CLIENT, m.Abort(call=1, request_id="doc"))
    driver.say(peer(0), released(1, 0))
    assert states(driver, "first") == ["reserving"]
    driver.grant([reserve(0, 2, 62)])
    assert states(driver, "first", "second") == ["prefill", "queued"], "the next waits for this one"


def test_nobody_waits_too_long() -> None:
    driver = computing()
    driver.say(CLIENT, ask("same", [*DOC, 7]))
    driver.wait(4, peer(0), CLIENT)
    assert states(driver, "same") == ["queued"]
    driver.wait(4, peer(0), CLIENT)
    assert states(driver, "same") == ["reserving"]


def test_one_that_is_cancelled_waits_for_nothing() -> None:
    driver = computing()
    driver.say(CLIENT, ask("same", [*DOC, 7]))
    driver.say(CLIENT, m.Abort(call=1, request_id="same"))
    driver.say(peer(0), outputs(1, 0, [9]), cached(s1=[[(0, 236)]]), beat(300))


def test_an_epoch_that_ends_lets_all_go() -> None:
    driver = computing(400, 400)
    driver.say(CLIENT, ask("same", [*DOC, 7]))
    driver.lose(1)
    assert driver.cluster._cells.sequences["main"]._reuses.waits == set()


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_common_beginnings(one: list[int], other: list[int]) -> None:
    chains = [Chain(b"", 1, m.pack_tokens(tokens)) for tokens in (one, other)]
    expected = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert num_common(chains[0].digests, chains[1].digests) == expected
