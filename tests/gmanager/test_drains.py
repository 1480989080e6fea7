"""Instances that are drained, and runs that move: literal events and actions."""

from typing import Any

import pytest

from gmanager.cluster.events import Action, PeerWasLost, Send
from gmanager.wire import messages as m
from tests.gmanager.cluster_support import (
    CLIENT,
    HELLO,
    OTHER,
    Driver,
    beat,
    call_failed,
    cancel,
    deliver,
    done,
    drop,
    dropped,
    granted,
    move,
    outputs,
    peer,
    regroup,
    request_stats,
    reserve,
    reserve_next,
    running,
    serving,
    submit,
)

SUSPEND = "instance 0 of cell 'main' was drained"


def drain(instance: int, call: int = 7, cell: str | None = None) -> m.Drain:
    return m.Drain(call=call, instance=instance, cell=cell)


def to(rank: int, kind: type[m.Message], **fields: Any) -> Send:
    return Send(peer(rank), kind(epoch=1, **fields))


def left(actions: list[Action]) -> bool:
    """Whether the first instance is told that it has left, and its caller."""
    return Send(peer(0), m.Drained(reason=SUSPEND)) in actions


def offered(number: int, *ranges: tuple[int, int]) -> m.RunOffered:
    return m.RunOffered(epoch=1, move=number, ranges=list(ranges))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (drain(5), "there is no instance 5; cell 'main' has 0, 1"),
        (drain(0, cell="other"), "there is no cell 'other'"),
    ],
)
def test_an_unknown_instance_is_not_drained(call: m.Drain, reason: str) -> None:
    driver = serving(8, 8)
    assert driver.say(CLIENT, call) == [call_failed(7, reason)]


def test_the_last_one_is_not_drained() -> None:
    driver = serving(8)
    assert driver.say(CLIENT, drain(0)) == [call_failed(7, "instance 0 is the last of cell 'main'")]
    assert driver.say(peer(0), m.AskDrain()) == [Send(peer(0), m.NotDrained(reason="instance 0 is the last of cell 'main'"))]


def test_a_number_that_several_cells_have_needs_a_cell() -> None:
    driver = serving(8, 8)
    driver.ready_cell(8, 8, cell="b", epoch=2)
    reason = "cells main, b have an instance 0 each: name one"
    assert driver.say(CLIENT, drain(0)) == [call_failed(7, reason)]
    assert done(7) in driver.say(CLIENT, drain(0, cell="main"))


def test_an_idle_instance_leaves_at_once() -> None:
    driver = serving(8, 8)
    actions = driver.say(CLIENT, drain(0))
    assert left(actions)
    assert done(7) in actions
    assert Send(peer(1), m.Suspend(epoch=1, reason=SUSPEND)) in actions
    assert [i.rank for i in driver.cluster.stats().instances] == [1]


def test_it_gets_nothing_new_and_a_second_call_attaches() -> None:
    driver = serving(8, 8)
    running(driver, "r", 8)
    (home,) = [i.rank for i in driver.cluster.stats().instances if i.rank == request_stats(driver, "r").home]
    assert home == 0
    driver.say(OTHER, HELLO)
    assert driver.say(CLIENT, drain(0)) == [], "its prompt runs to its end"
    assert driver.say(OTHER, drain(0, call=3)) == []
    assert [i.is_draining for i in driver.cluster.stats().instances] == [True, False]
    why = "instance 1 is the last of cell 'main': the 1 others are being drained"
    assert driver.say(CLIENT, drain(1, call=8)) == [call_failed(8, why)]
    assert driver.say(CLIENT, submit("s", 4)) == [reserve(1, 2, 2)]
    driver.say(peer(1), granted(2, 2, 6))
    actions = driver.say(CLIENT, m.MoveHome(call=9, request_id="s", instance=0))
    assert actions == [call_failed(9, "instance 0 is being drained")]
    assert driver.say(peer(0), outputs(1, 0, [9])) == [deliver(1, "r", 0, [9]), reserve_next(1, 1)]


def moving(*, spread: int = 1) -> Driver:
    """A request of eight tokens on instance 0 that decodes; instance 0 drains, and its home has moved to instance 1."""
    driver = serving(9, 8)
    running(driver, "r", 8, generated=1, spread=spread)
    assert request_stats(driver, "r").home == 0
    assert driver.say(CLIENT, drain(0)) == [reserve_next(1, 1)]
    parties = [] if spread > 1 else regroup(1, [0, 1])
    assert driver.say(peer(1), granted(1, 1, 7)) == [*parties, move(0, 1, 1)]
    assert driver.say(peer(1), m.HomeMoved(epoch=1, seq=1, home=1)) == [], "what it holds may not be written yet"
    return driver


def copying() -> Driver:
    driver = moving()
    actions = driver.say(peer(1), outputs(1, 1, [9]))
    assert actions[-1] == to(0, m.OfferRun, move=2, seq=1)
    assert driver.say(peer(0), offered(2, (0, 9))) == [reserve(1, 2, 3)]
    copy = {"move": 2, "seq": 1, "source": 0, "target": 1, "ranges": [(0, 9)]}
    assert driver.say(peer(1), granted(2, 3, 4)) == [to(0, m.CopyRun, **copy), to(1, m.CopyRun, **copy)]
    return driver


def test_how_long_a_copy_took_is_learnt() -> None:
    driver = copying()
    driver.say(peer(1), m.Copied(epoch=1, move=2, us=4500))
    performance = driver.cluster.stats().cells[0].performance
    assert performance is not None
    assert performance.copied_us == pytest.approx(500), "of each of nine tokens"


def test_a_copy_that_failed_says_nothing_of_how_long_one_takes() -> None:
    driver = copying()
    driver.say(peer(1), m.Copied(epoch=1, move=2, us=4500, error="the checksum is wrong"))
    performance = driver.cluster.stats().cells[0].performance
    assert performance is not None
    assert performance.copied_us == pytest.approx(10), "the guess"


def test_a_sequence_leaves_home_first_and_then_run_by_run() -> None:
    driver = copying()
    assert driver.say(CLIENT, m.MoveHome(call=9, request_id="r", instance=1)) == [done(9)]
    flip = to(1, m.FlipRun, move=2, seq=1, source=0, target=1, start=0)
    assert driver.say(peer(1), m.Copied(epoch=1, move=2)) == [flip]
    assert driver.say(peer(1), m.RunMoved(epoch=1, seq=1, move=2)) == [to(0, m.OfferRun, move=3, seq=1)]
    actions = driver.say(peer(0), offered(3))
    assert actions[:3] == [drop(0, 1), *regroup(2, [0], [1])]
    assert left(actions)
    assert done(7) in actions
    assert dropped(driver) == 0


def test_a_copy_that_fails_is_tried_again_and_then_left() -> None:
    driver = copying()
    for number in (2, 3, 4):
        actions = driver.say(peer(1), m.Copied(epoch=1, move=number, error="the checksum is wrong"))
        assert actions[0] == drop(1, number)
        if number == 4:
            assert left(actions), "what is left is computed again"
            break
        assert actions[1:] == [to(0, m.OfferRun, move=number + 1, seq=1)]
        assert driver.say(peer(0), offered(number + 1, (0, 9))) == [reserve(1, number + 1, 3)]
        driver.say(peer(1), granted(number + 1, 3, 4))
    assert driver.cluster.stats().counters.moves_failed == 3


def test_a_copy_that_is_refused_changes_nothing() -> None:
    driver = moving()
    driver.say(peer(1), outputs(1, 1, [9]))
    assert driver.say(peer(0), offered(2, (0, 9))) == [reserve(1, 2, 3)]
    actions = driver.say(peer(1), m.NotGranted(epoch=1, seq=2, free_blocks=1))
    assert actions == [to(0, m.OfferRun, move=3, seq=1)]
    assert left(driver.say(peer(0), offered(3, (0, 9)))), "nobody has room for it"


def test_a_sequence_that_ends_while_it_is_copied_leaves_nothing() -> None:
    driver = copying()
    assert cancel(1, 1) in driver.say(CLIENT, m.Abort(call=9, request_id="r"))
    assert driver.say(peer(1), m.Released(epoch=1, seq=1, generated=2))[0] == drop(1, 1)
    actions = driver.say(peer(1), m.Copied(epoch=1, move=2))
    assert actions[0] == drop(1, 2)
    assert left(actions)


def test_a_sequence_that_ends_instead_of_a_flip_leaves_nothing() -> None:
    driver = copying()
    driver.say(peer(1), m.Copied(epoch=1, move=2))
    driver.say(CLIENT, m.Abort(call=9, request_id="r"))
    actions = driver.say(peer(1), m.Released(epoch=1, seq=1, generated=2))
    assert drop(1, 2) in actions
    assert left(actions)


def test_words_out_of_place_are_dropped() -> None:
    driver = copying()
    strays = [
        (1, offered(2, (0, 9))),
        (0, m.Copied(epoch=1, move=2)),
        (1, m.Copied(epoch=1, move=9)),
        (1, m.RunMoved(epoch=1, seq=1, move=2)),
    ]
    for rank, message in strays:
        assert driver.say(peer(rank), message) == []
    assert dropped(driver) == len(strays)


def test_who_waits_hears_that_it_was_lost() -> None:
    driver = copying()
    actions = driver.lose(0)
    assert call_failed(7, "instance 0 of cell 'main' is lost: gone") in actions


def test_a_drain_is_called_off_when_the_others_are_lost() -> None:
    driver = serving(9, 8)
    running(driver, "r", 8, generated=0)
    assert driver.say(peer(0), m.AskDrain()) == []
    driver.say(CLIENT, drain(0))
    reason = "instance 0 can't be drained any more: no other is left in cell 'main'"
    actions = driver.handle(PeerWasLost(peer(1), "gone", driver.now))
    assert call_failed(7, reason) in actions
    assert Send(peer(0), m.NotDrained(reason=reason)) in actions
    assert [i.is_draining for i in driver.cluster.stats().instances] == [False]


def test_a_service_that_is_told_to_end_ends_at_once() -> None:
    """SIGTERM to all instances: nobody waits for anybody."""
    driver = serving(9, 8)
    running(driver, "r", 8, generated=0)
    assert driver.say(peer(0), m.AskDrain()) == []
    why = "instance 1 is the last of cell 'main': the 1 others are being drained"
    assert driver.say(peer(1), m.AskDrain()) == [Send(peer(1), m.NotDrained(reason=why))]
    actions = driver.say(peer(1), m.Leave(reason="SIGTERM", failed=False))
    assert (
        Send(peer(0), m.NotDrained(reason="instance 0 can't be drained any more: no other is left in cell 'main'")) in actions
    )


def test_a_client_that_goes_waits_no_more_and_the_drain_goes_on() -> None:
    driver = copying()
    driver.handle(PeerWasLost(CLIENT, "gone", driver.now))
    assert driver.cluster.stats().instances[0].is_draining
    assert driver.say(peer(1), beat(4)) == [Send(peer(1), m.Pong())]


def test_runs_of_different_instances_are_copied_at_a_time_and_no_instance_has_two() -> None:
    driver = serving(20, 20, 20, 20)
    running(driver, "a", 8, generated=1, spread=2, max_tokens=4)
    running(driver, "b", 8, generated=1, spread=2, max_tokens=4)
    driver.say(peer(0), beat(18, {1: 4}))
    driver.say(peer(1), beat(18, {1: 4}))
    driver.say(peer(2), beat(18, {2: 4}))
    driver.say(peer(3), beat(18, {2: 4}))
    assert [sorted(request_stats(driver, name).kv_tokens) for name in ("a", "b")] == [[0, 1], [2, 3]]
    assert driver.say(CLIENT, drain(1)) == [to(1, m.OfferRun, move=3, seq=1)]
    assert driver.say(CLIENT, drain(3, call=8)) == [to(3, m.OfferRun, move=4, seq=2)]
    assert driver.say(peer(1), offered(3, (4, 8))) == [reserve(0, 3, 1)], "its home holds something already"
    assert driver.say(peer(3), offered(4, (4, 8))) == [reserve(2, 4, 1)]
    for number, source, target, seq in ((3, 1, 0, 1), (4, 3, 2, 2)):
        copy = {"move": number, "seq": seq, "source": source, "target": target, "ranges": [(4, 8)]}
        assert driver.say(peer(target), granted(number, 1, 10)) == [
            to(source, m.CopyRun, **copy),
            to(target, m.CopyRun, **copy),
        ]
