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


def sharing(*hosts: str, elastic_tp: str = "auto") -> Driver:
    """A ready cell with an instance on each of these hosts, and a client."""
    driver = Driver()
    for rank, host in enumerate(hosts):
        driver.say(peer(rank), register(rank=rank, cell_size=len(hosts), blocks=8, host=host, elastic_tp=elastic_tp))
    driver.say(peer(0), m.Text(assets=ASSETS), m.StoreOpened(epoch=1, address="tcp://store:1"))
    for rank in range(len(hosts)):
        driver.say(peer(rank), m.Joined(epoch=1))
        driver.free[peer(rank)] = 8
    driver.handle(TextLoaded(1, driver.now))
    driver.say(CLIENT, HELLO)
    return driver


def regroups(actions: Sequence[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, Send) and isinstance(action.message, m.Regroup)]


def test_all_meet_with_the_first_sequence_and_stay_together() -> None:
    driver = sharing("a", "a", "a")
    assert regroups(running(driver, "r", spread=1)) == regroup(1, [0, 1, 2])
    assert regroups(running(driver, "s", 10, spread=2)) == []
    for seq, home in ((1, 0), (2, 1)):
        assert regroups(driver.say(peer(home), m.Released(epoch=1, seq=seq, generated=0))) == []
    assert regroups(running(driver, "t", spread=1)) == []


@pytest.mark.parametrize(("hosts", "elastic_tp"), [(("a", "b"), "auto"), (("a", "a"), "")])
def test_instances_that_share_none_or_are_of_several_hosts_meet_over_sequences_alone(
    hosts: tuple[str, ...], elastic_tp: str
) -> None:
    driver = sharing(*hosts, elastic_tp=elastic_tp)
    assert regroups(running(driver, "r", spread=1)) == []
    assert regroups(running(driver, "s", 10, spread=2)) == regroup(1, [0, 1])


def test_who_is_left_meets_again_in_the_next_epoch() -> None:
    driver = sharing("a", "a", "a")
    running(driver, "r", spread=1)
    driver.lose(2)
    driver.keep(peer(1), 8)
    driver.keep(peer(0), 8)
    actions = driver.grant(driver.join(2, peer(0), peer(1)))
    (first, _) = regroups(actions)
    assert first == Send(peer(0), m.Regroup(epoch=2, number=1, parties=[[0, 1]]))
