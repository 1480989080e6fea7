"""Instances that share dense layers are one party, whatever they hold."""

from collections.abc import Sequence

import pytest

from gmanager.cluster.events import Action, TextLoaded
from gmanager.wire import messages as m
from tests.gmanager.cluster_support import (
    ASSETS,
    CLIENT,
    HELLO,
    Driver,
    Send,
    peer,
    register,
    regroup,
    running,
)

NEW = b"new"


def cell_of(*shares: bool) -> Driver:
    """A ready cell of instances of which these can share, and a client."""
    driver = Driver()
    for rank in range(len(shares)):
        driver.say(peer(rank), register(rank=rank, cell_size=len(shares), blocks=8, elastic_tp="auto"))
    driver.say(peer(0), m.Text(assets=ASSETS), m.StoreOpened(epoch=1, address="tcp://store:1"))
    for rank, its in enumerate(shares):
        driver.say(peer(rank), m.Joined(epoch=1, shares_feeds=its))
        driver.free[peer(rank)] = 8
    driver.handle(TextLoaded(1, driver.now))
    driver.say(CLIENT, HELLO)
    return driver


def regroups(actions: Sequence[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, Send) and isinstance(action.message, m.Regroup)]


def test_all_meet_with_the_first_sequence_and_stay_together() -> None:
    driver = cell_of(True, True, True)
    assert regroups(running(driver, "r", spread=1)) == regroup(1, [0, 1, 2])
    assert regroups(running(driver, "s", 10, spread=2)) == []
    for seq, home in ((1, 0), (2, 1)):
        assert regroups(driver.say(peer(home), m.Released(epoch=1, seq=seq, generated=0))) == []
    assert regroups(running(driver, "t", spread=1)) == []


def test_one_that_comes_belongs_to_it_in_the_next_epoch() -> None:
    driver = cell_of(True, True)
    running(driver, "r", spread=1)
    driver.come(NEW, elastic_tp="auto")
    driver.keep(peer(1), 8)
    driver.keep(peer(0), 8)
    driver.say(peer(0), m.StoreOpened(epoch=2, address="tcp://store:1"))
    for who in (peer(0), peer(1), NEW):
        actions = driver.say(who, m.Joined(epoch=2, shares_feeds=True))
    (first, *_) = regroups(driver.grant(actions))
    assert first == Send(peer(0), m.Regroup(epoch=2, number=1, parties=[[0, 1, 2]]))


@pytest.mark.parametrize("shares", [(False, False), (True, False), (False, True)])
def test_instances_that_cannot_all_share_meet_over_sequences_alone(shares: tuple[bool, bool]) -> None:
    """As on GPUs that don't reach each other's memory, or on several hosts, whatever they were told."""
    driver = cell_of(*shares)
    assert regroups(running(driver, "r", spread=1)) == []
    assert regroups(running(driver, "s", 10, spread=2)) == regroup(1, [0, 1])


def test_who_is_left_meets_again_in_the_next_epoch() -> None:
    driver = cell_of(True, True, True)
    running(driver, "r", spread=1)
    driver.lose(2)
    driver.keep(peer(1), 8)
    driver.keep(peer(0), 8)
    driver.say(peer(0), m.StoreOpened(epoch=2, address="tcp://store:1"), m.Joined(epoch=2, shares_feeds=True))
    actions = driver.grant(driver.say(peer(1), m.Joined(epoch=2, shares_feeds=True)))
    (first, _) = regroups(actions)
    assert first == Send(peer(0), m.Regroup(epoch=2, number=1, parties=[[0, 1]]))
