"""A cell that serves and whose membership changes: what is said in which order, and what becomes of the requests.

As test_cluster.py: blocks of 4 tokens, literal events in, literal actions out. `peer(r)` had rank r in the first epoch, and has
id r all the time.
"""

from typing import Any

import msgspec
import pytest

from gmanager.cluster.cell import MAX_ATTEMPTS, SUSPEND_TIMEOUT_S, TORCHRUN_STOPS_S
from gmanager.cluster.events import Action, Deliver, DropText, Encoded, Forget, PeerWasLost, Send, StopFound
from gmanager.cluster.membership import NEWCOMERS_S
from gmanager.cluster.waiting import MAX_BREAKS
from gmanager.wire import messages as m
from tests.gmanager.cluster_support import (
    CLIENT,
    Driver,
    Runs,
    call_failed,
    deliver,
    done,
    dropped,
    failed,
    outputs,
    peer,
    pong,
    register,
    request_stats,
    running,
    sequence_params,
    serving,
    submit,
)

NEW = b"new"


def suspend(rank: int, reason: str, epoch: int = 1) -> Send:
    return Send(peer(rank), m.Suspend(epoch=epoch, reason=reason))


def open_store(who: bytes, epoch: int = 2) -> Send:
    return Send(who, m.OpenStore(epoch=epoch))


def gone(rank: int) -> str:
    return f"instance {rank} of cell 'main' is lost: gone"


def changed(driver: Driver, *left: tuple[int, dict[int, Runs]]) -> list[Action]:
    """Lose the last instance; each that is left has so many blocks free and kept that. What the last Joined brings about."""
    driver.lose(len(left))
    for rank, (free, shards) in enumerate(left):
        driver.keep(peer(rank), free, shards)
    return driver.join(2, *(peer(rank) for rank in range(len(left))))


def messages(actions: list[Action], kind: type[m.Message]) -> list[Any]:
    return [action.message for action in actions if isinstance(action, Send) and isinstance(action.message, kind)]


def beat(free: int, epoch: int = 2, held: dict[int, int] | None = None) -> m.Beat:
    return m.Beat(epoch=epoch, free_blocks=free, held_tokens=held or {}, counters=m.Counters())


# --- what is said in which order


def test_a_loss_from_the_first_word_to_the_last() -> None:
    """10 tokens lie 6 on instance 0 and 4 on instance 1, 3 more at home: of instance 1's all is left, its rank is another."""
    driver = serving(8, 8, 8)
    running(driver, "r", 10, spread=2, generated=4)
    assert driver.lose(2) == [suspend(0, gone(2)), suspend(1, gone(2))]
    assert driver.cluster.stats().cells[0].state == "changing"
    assert driver.keep(peer(1), 7, {1: [[(6, 10)]]}) == []
    assert driver.keep(peer(0), 5, {1: [[(0, 6), (10, 13)]]}) == [open_store(peer(0))]
    members = [
        m.MemberAddress(rank=rank, id=rank, party_address=f"tcp://127.0.0.1:{9000 + rank}", host="here") for rank in (0, 1)
    ]
    opened = m.StoreOpened(epoch=2, address="tcp://store:1")
    address = "tcp://store:1"
    joins = [m.JoinEpoch(epoch=2, id=r, rank=r, store_address=address, members=members, keep=[1], caches=True) for r in (0, 1)]
    assert driver.say(peer(0), opened) == [Send(peer(r), join) for r, join in enumerate(joins)]
    assert driver.say(peer(0), m.Joined(epoch=2)) == []
    stats = request_stats(driver, "r")
    assert (stats.state, stats.home, stats.kv_tokens) == ("queued", None, {0: 9, 1: 4})
    # one token is missing; it goes where most lies: 1 block, 1 spare, 1 for each run and one more
    assert driver.say(peer(1), m.Joined(epoch=2)) == [Send(peer(0), m.Reserve(epoch=2, seq=1, blocks=4))]
    regroup = m.Regroup(epoch=2, number=1, parties=[[0, 1]])
    admit = m.Admit(
        epoch=2,
        seq=1,
        arrival=1,
        token_ids=m.pack_tokens([5] * 10 + [9] * 4),
        shares=[m.Share(rank=0, tokens=1)],
        params=sequence_params(12, generated=4),
        kept=[m.KeptPart(rank=0, runs=[[(0, 6), (10, 13)]]), m.KeptPart(rank=1, runs=[[(6, 10)]])],
    )
    granted = m.Granted(epoch=2, seq=1, blocks=4, free_blocks=1)
    told = [Send(peer(rank), message) for message in (regroup, admit) for rank in (0, 1)]
    assert driver.say(peer(0), granted) == told
    output = m.Outputs(epoch=2, outputs=[m.SequenceOutput(seq=1, index=0, token_ids=[10])])
    assert driver.say(peer(0), output) == [deliver(1, "r", 4, [10])]
    assert request_stats(driver, "r").home_moves == 0


def test_an_instance_comes() -> None:
    driver = serving(8)
    running(driver, "r", generated=1)
    assert driver.come(NEW, 20, cell_size=1) == [suspend(0, "instance 1 of cell 'main' comes")]
    assert driver.keep(peer(0), 5, {1: [[(0, 8)]]}) == [open_store(peer(0))]
    assert driver.cluster.stats().cells[0].size == 2
    joins = driver.say(peer(0), m.StoreOpened(epoch=2, address="tcp://store:1"))
    assert [a.peer for a in joins if isinstance(a, Send)] == [peer(0), NEW]
    assert [(join.rank, join.keep) for join in messages(joins, m.JoinEpoch)] == [(0, [1]), (1, [])]
    assert driver.say(NEW, m.Joined(epoch=2)) == []
    assert driver.say(peer(0), m.Joined(epoch=2)) == [Send(peer(0), m.Reserve(epoch=2, seq=1, blocks=4))]
    assert [i.rank for i in driver.cluster.stats().instances] == [0, 1]
    assert driver.cluster.stats().cells[0].total_tokens == 4 * 28


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": "c0de"}, "its model is tiny (c0de), that of cell 'main' is tiny (f00d)"),
        ({"layers": "as they are"}, "its way to run layers is as they are, that of cell 'main' is fused"),
    ],
    ids=["another model", "another mode"],
)
def test_one_that_comes_and_differs_changes_nothing(changes: dict[str, str], reason: str) -> None:
    driver = serving(8)
    running(driver, "r", generated=1)
    good = register(rank=0, cell_size=1)
    bad = msgspec.structs.replace(good, spec=msgspec.structs.replace(good.spec, **changes))
    assert driver.say(NEW, bad) == [Send(NEW, m.Refused(reason=reason))]
    assert driver.say(peer(0), outputs(1, 1, [7])) == [deliver(1, "r", 1, [7])]
    assert driver.cluster.stats().cells[0].state == "ready"


def test_ids_of_those_that_left_are_given_again() -> None:
    """The lowest that is free; ranks close up."""
    driver = serving(8, 8, 8)
    driver.lose(1)
    driver.come(NEW, cell_size=3)
    driver.come(b"newer", cell_size=3)
    for rank in (0, 2):
        driver.keep(peer(rank), 8)
    driver.join(2, peer(0), peer(2), NEW, b"newer")
    assert [i.rank for i in driver.cluster.stats().instances] == [0, 1, 2, 3]
    error = "there is no instance 7; cell 'main' has 0, 2, 1, 3"
    driver.say(CLIENT, submit("r"))
    assert driver.say(CLIENT, m.MoveHome(call=1, request_id="r", instance=7)) == [call_failed(1, error)]


def test_who_comes_while_a_change_is_under_way() -> None:
    """Before the next epoch is opened it takes part; after that it waits for one of its own."""
    driver = serving(8, 8)
    driver.lose(1)
    assert driver.come(NEW) == []
    assert driver.keep(peer(0), 8) == [open_store(peer(0))]
    assert driver.come(b"newer") == []
    assert driver.join(2, peer(0), NEW) == [
        Send(who, m.Suspend(epoch=2, reason="instance 2 of cell 'main' comes")) for who in (peer(0), NEW)
    ]
    driver.keep(peer(0), 8, epoch=2)
    assert driver.keep(NEW, 8, epoch=2) == [open_store(peer(0), 3)]
    driver.join(3, peer(0), NEW, b"newer")
    assert driver.cluster.stats().cells[0].state == "ready"


def test_who_came_and_goes_before_it_was_a_member() -> None:
    driver = serving(8, 8)
    driver.lose(1)
    driver.come(NEW)
    assert driver.handle(PeerWasLost(NEW, "gone", 0.0)) == [Forget(NEW)]
    assert driver.keep(peer(0), 8) == [open_store(peer(0))]
    driver.join(2, peer(0))
    assert driver.cluster.stats().cells[0].state == "ready"


def test_only_who_came_is_left() -> None:
    """The cell lives on in it, and so do the requests."""
    driver = serving(8)
    running(driver, "r", generated=3)
    driver.come(NEW, cell_size=1)
    assert driver.lose(0) == [open_store(NEW)]
    assert messages(driver.join(2, NEW), m.Reserve) == [m.Reserve(epoch=2, seq=2, blocks=4)]


def test_a_loss_while_the_others_end_their_epoch() -> None:
    driver = serving(8, 8, 8)
    driver.lose(2)
    driver.keep(peer(0), 8)
    assert driver.lose(1) == [open_store(peer(0))], "nobody else is waited for"
    driver.join(2, peer(0))
    assert driver.cluster.stats().cells[0].state == "ready"


@pytest.mark.parametrize("when", ["opening", "joining"])
@pytest.mark.parametrize("opener", [True, False], ids=["the opener", "another"])
def test_a_loss_while_the_next_epoch_begins(when: str, opener: bool) -> None:
    """It never was: all are suspended again, and what they kept they have still."""
    driver = serving(8, 8, 8)
    running(driver, "r", 8, generated=3)
    driver.lose(2)
    driver.keep(peer(1), 8)
    driver.keep(peer(0), 5, {1: [[(0, 10)]]})
    if when == "joining":
        driver.say(peer(0), m.StoreOpened(epoch=2, address="tcp://store:1"), m.Joined(epoch=2))
    lost, left = (0, 1) if opener else (1, 0)
    assert driver.lose(lost) == [suspend(left, gone(lost), epoch=2)]
    assert driver.say(peer(left), m.Joined(epoch=2)) == []
    assert driver.keep(peer(left), 5 if left == 0 else 8, {1: [[(0, 10)]]} if left == 0 else {}, epoch=2) == [
        open_store(peer(left), 3)
    ]
    (asked,) = messages(driver.join(3, peer(left)), m.Reserve)
    assert asked == m.Reserve(epoch=3, seq=1 if left == 0 else 2, blocks=4)


def test_a_broken_epoch_of_which_nobody_is_lost() -> None:
    driver = serving(8, 8)
    running(driver, "r", generated=3)
    why = "instance 1 of cell 'main' can't go on: a step timed out"
    broken = m.EpochBroken(epoch=1, reason="a step timed out")
    assert driver.say(peer(1), broken) == [suspend(0, why), suspend(1, why)]
    assert driver.say(peer(0), broken) == [], "they suspend already"
    driver.keep(peer(0), 5, {1: [[(0, 10)]]})
    assert driver.keep(peer(1), 8) == [open_store(peer(0))]
    assert driver.say(peer(0), broken) == []
    assert dropped(driver) == 1, "it is of another epoch"
    assert messages(driver.join(2, peer(0), peer(1)), m.Reserve) == [m.Reserve(epoch=2, seq=1, blocks=4)]


def test_epochs_that_break_again_and_again_end_the_cell() -> None:
    driver = serving(8)
    running(driver, "r", generated=1)
    for epoch in range(1, MAX_ATTEMPTS + 2):
        actions = driver.say(peer(0), m.EpochBroken(epoch=epoch, reason="no group"))
        if epoch <= MAX_ATTEMPTS:
            assert actions == [suspend(0, "instance 0 of cell 'main' can't go on: no group", epoch)]
            driver.keep(peer(0), 8, epoch=epoch)
    why = "instance 0 of cell 'main' can't go on: no group"
    end = Send(peer(0), m.EndEpoch(epoch=MAX_ATTEMPTS + 1, reason=why))
    assert actions == [end, failed(1, "r", why, index=1), DropText(1)]


def test_attempts_are_counted_anew_once_a_cell_is_ready() -> None:
    driver = serving(8)
    for epoch in range(1, 3 * MAX_ATTEMPTS):
        driver.say(peer(0), m.EpochBroken(epoch=epoch, reason="no group"))
        driver.keep(peer(0), 8, epoch=epoch)
        driver.join(epoch + 1, peer(0))
        assert driver.cluster.stats().cells[0].state == "ready"


def test_a_request_that_epochs_break_on_is_given_up() -> None:
    """Nobody is lost, and no token of it comes: it may be what breaks them. One that gets on is not to blame."""
    driver = serving(16)
    running(driver, "bad", generated=1)
    running(driver, "good", generated=1)
    actions: list[Action] = []
    for epoch in range(1, MAX_BREAKS + 1):
        driver.say(peer(0), m.EpochBroken(epoch=epoch, reason="poison"))
        actions = driver.keep(peer(0), 16, epoch=epoch)
        reserves = driver.join(epoch + 1, peer(0))
        while messages(reserves, m.Reserve):
            reserves = driver.grant(reserves)
        good = next(r for r in driver.cluster._requests.live() if r.id == "good")
        output = m.SequenceOutput(seq=good.seq, index=0, token_ids=[9])
        driver.say(peer(0), m.Outputs(epoch=epoch + 1, outputs=[output]))
    why = "3 epochs of cell 'main' broke while the request ran; the last: instance 0 of cell 'main' can't go on: poison"
    assert [(a.request_id, a.error) for a in actions if isinstance(a, Deliver)] == [("bad", why)]
    assert [r.id for r in driver.cluster._requests.live()] == ["good"]


def test_who_does_not_end_its_epoch_in_time_is_left_behind() -> None:
    driver = serving(8, 8, 8)
    driver.lose(2)
    driver.keep(peer(0), 8)
    heard = (peer(0), peer(1), CLIENT)
    assert driver.wait(int(SUSPEND_TIMEOUT_S), *heard) == []
    why = f"instance 1 of cell 'main' did not end its epoch within {SUSPEND_TIMEOUT_S:g} s"
    assert driver.wait(1, *heard) == [open_store(peer(0)), Send(peer(1), m.Expelled(reason=why))]


def test_the_cell_is_over_when_nobody_ends_its_epoch() -> None:
    """The reason is what the change began with."""
    driver = serving(8, 8, 8)
    running(driver, "r", generated=1)
    driver.lose(2)
    actions = driver.wait(int(SUSPEND_TIMEOUT_S) + 1, peer(0), peer(1), CLIENT)
    assert [a.error for a in actions if isinstance(a, Deliver)] == [gone(2)]
    assert {a.peer for a in actions if isinstance(a, Send) and isinstance(a.message, m.Expelled)} == {peer(0), peer(1)}


@pytest.mark.parametrize("case", ["it stops the other", "much later", "it has come again", "another stops another"])
def test_who_is_stopped_by_a_torchrun_that_has_lost_another_is_not_to_blame(case: str) -> None:
    """The cell had gone on without that one; the error names it nevertheless, and first."""
    driver = serving(8, 8)
    driver.lose(1)
    driver.keep(peer(0), 8)
    driver.join(2, peer(0))
    own = "instance 0 of cell 'main' left: SIGTERM"
    expected = f"{gone(1)}; then {own}"
    last = peer(0)
    if case == "much later":
        driver.wait(int(TORCHRUN_STOPS_S) + 1, peer(0), CLIENT)
        expected = own
    elif case == "it has come again":
        driver.come(NEW)
        driver.keep(peer(0), 8, epoch=2)
        driver.join(3, peer(0), NEW)
        driver.say(NEW, m.Leave(reason="SIGTERM", failed=False))
        expected = "instance 1 of cell 'main' left: SIGTERM"  # nothing was lost since then
    elif case == "another stops another":
        driver.come(NEW, run_id="other")
        driver.keep(peer(0), 8, epoch=2)
        driver.join(3, peer(0), NEW)
        driver.say(peer(0), m.Leave(reason="SIGTERM", failed=False))
        driver.keep(NEW, 8, epoch=3)
        driver.join(4, NEW)
        last, expected = NEW, "instance 1 of cell 'main' left: SIGTERM"
    driver.say(CLIENT, submit("r"))
    actions = driver.say(last, m.Leave(reason="SIGTERM", failed=False))
    assert {a.error for a in actions if isinstance(a, Deliver)} == {expected}


@pytest.mark.parametrize("stuck", ["opening", "joining"])
def test_who_does_not_join_in_time_is_left_behind(stuck: str) -> None:
    driver = serving(8, 8, 8, form_timeout_s=5.0)
    driver.lose(2)
    driver.keep(peer(0), 8)
    driver.keep(peer(1), 8)
    slow, left = (0, 1) if stuck == "opening" else (1, 0)
    if stuck == "joining":
        driver.say(peer(0), m.StoreOpened(epoch=2, address="tcp://store:1"), m.Joined(epoch=2))
    heard = (peer(0), peer(1), CLIENT)
    assert driver.wait(5, *heard) == []
    why = f"instance {slow} of cell 'main' did not join within 5 s"
    assert driver.wait(1, *heard) == [suspend(left, why, 2), Send(peer(slow), m.Expelled(reason=why))]


def test_a_lost_link_to_who_answers_nobody_costs_it_its_membership() -> None:
    driver = serving(8, 8)
    driver.say(peer(0), m.LinkLost(epoch=1, rank=1, reason="closed"))
    why = "instance 0 of cell 'main' lost its link to instance 1: closed"
    assert driver.wait(1, peer(0), peer(1), CLIENT) == [suspend(0, why), Send(peer(1), m.Expelled(reason=why))]
    driver.say(peer(0), m.LinkLost(epoch=1, rank=0, reason="?"))
    assert driver.wait(2, peer(0), CLIENT) == []


# --- what becomes of the requests


def text(name: str) -> m.Submit:
    return m.Submit(request_id=name, params=m.SamplingParams(), text="hello")


def in_state(state: str) -> Driver:
    """A request "r" in that state, in a cell of three of which the last has nothing of it. Its home is instance 0."""
    driver = serving(8, 8, 4)
    if state == "encoding":
        driver.say(CLIENT, text("r"))
        return driver
    if state == "queued":
        running(driver, "first", 28, spread=1, max_tokens=4)
        running(driver, "second", 28, spread=1, max_tokens=4)
        driver.say(CLIENT, submit("r", 28, spread=1, max_tokens=4))
    elif state == "reserving":
        driver.say(CLIENT, submit("r", 8))
    else:
        running(driver, "r", 8, generated=0 if state == "prefill" else 3)
    if state == "moving":
        driver.say(CLIENT, m.MoveHome(call=5, request_id="r", instance=1))
    assert request_stats(driver, "r").state == ("queued" if state == "encoding" else state)
    return driver


@pytest.mark.parametrize("state", ["encoding", "queued", "reserving", "prefill", "decode", "moving"])
def test_a_request_goes_through_a_change_in_any_state(state: str) -> None:
    driver = in_state(state)
    actions = driver.lose(2)
    why = "request 'r' has no home now: the cell's membership changes"
    assert actions == [*([call_failed(5, why)] if state == "moving" else []), suspend(0, gone(2)), suspend(1, gone(2))]
    assert request_stats(driver, "r").state == "queued"
    number = 3 if state == "queued" else 1
    if state == "encoding":
        assert driver.handle(Encoded(1, driver.now, token_ids=m.pack_tokens([5] * 8))) == []
    ran = state in ("prefill", "decode", "moving")
    driver.keep(peer(0), 5 if ran else 8, {1: [[(0, 8)]]} if ran else {})
    driver.keep(peer(1), 8)
    asked = driver.join(2, peer(0), peer(1))
    if state == "queued":  # those before it begin anew
        driver.grant(driver.grant(asked))
        for seq, who in ((3, peer(0)), (4, peer(1))):
            output = m.SequenceOutput(seq=seq, index=0, token_ids=[9] * 4, finish_reason="length")
            driver.say(who, m.Outputs(epoch=2, outputs=[output]))
            driver.free[who] = 8
            asked = driver.say(who, beat(8), m.Released(epoch=2, seq=seq, generated=4))
            if messages(asked, m.Reserve):
                break
    (admit,) = messages(driver.grant(asked), m.Admit)
    assert admit.arrival == number
    kept_tokens = {part.rank: part.runs for part in admit.kept}
    assert kept_tokens == ({0: [[(0, 7 if state == "prefill" else 8)]]} if ran else {})


def test_what_ended_or_was_preempted_keeps_nothing() -> None:
    driver = serving(4, 4, 4)
    for name in ("old", "young", "done"):
        running(driver, name, generated=2)
    last = m.SequenceOutput(seq=3, index=2, token_ids=[9], finish_reason="length")
    driver.say(peer(2), m.Outputs(epoch=1, outputs=[last]))  # its Released has yet to come
    driver.say(peer(2), m.Released(epoch=1, seq=3, generated=3))
    driver.say(peer(2), m.Beat(epoch=1, free_blocks=0, held_tokens={}, counters=m.Counters()))
    driver.say(peer(0), m.NeedBlock(epoch=1, seq=1))
    assert request_stats(driver, "young").state == "preempted"
    driver.lose(2)
    assert request_stats(driver, "young").state == "preempted", "users see why it waits"
    driver.keep(peer(0), 1, {1: [[(0, 9)]]})
    driver.keep(peer(1), 1, {2: [[(0, 9)]], 3: [[(0, 2)]]})
    joins = driver.say(peer(0), m.StoreOpened(epoch=2, address="tcp://store:1"))
    assert [join.keep for join in messages(joins, m.JoinEpoch)] == [[1], []]
    assert request_stats(driver, "done").finish_reason == "length"


def test_tokens_that_wait_for_those_before_them_are_computed_again() -> None:
    driver = serving(8, 8)
    running(driver, "r", generated=1)
    driver.say(peer(0), outputs(1, 2, [12]))  # index 1 has not come
    driver.lose(1)
    driver.keep(peer(0), 5, {1: [[(0, 11)]]})
    (admit,) = messages(driver.grant(driver.join(2, peer(0))), m.Admit)
    assert list(m.unpack_tokens(admit.token_ids)) == [5] * 8 + [9]
    assert admit.kept == [m.KeptPart(rank=0, runs=[[(0, 8)]])]


def test_kept_kv_is_cut_before_the_last_token() -> None:
    """Its row is computed anew, for the token that follows. Who has nothing before it is no participant, and keeps nothing."""
    driver = serving(8, 8, 8)
    running(driver, "r", 8, spread=2, generated=1)
    driver.lose(2)
    driver.keep(peer(0), 5, {1: [[(0, 4), (9, 12)], [(4, 6), (8, 9)]]})
    driver.keep(peer(1), 6, {1: [[(8, 9)]]})
    joins = driver.say(peer(0), m.StoreOpened(epoch=2, address="tcp://store:1"))
    assert [join.keep for join in messages(joins, m.JoinEpoch)] == [[1], []]
    driver.say(peer(1), m.Joined(epoch=2))
    actions = driver.grant(driver.say(peer(0), m.Joined(epoch=2)))
    (admit,) = messages(actions, m.Admit)
    assert admit.kept == [m.KeptPart(rank=0, runs=[[(0, 4)], [(4, 6)]])]
    assert admit.shares == [m.Share(rank=0, tokens=3)]
    assert [a.peer for a in actions if isinstance(a, Send) and isinstance(a.message, m.Admit)] == [peer(0)]


def test_a_run_that_was_on_its_way_is_used_once() -> None:
    """The target had adopted it, and written behind it; the source had not given it up."""
    driver = serving(8, 8, 8)
    running(driver, "r", 8, spread=2, generated=3)
    actions = changed(driver, (8, {1: [[(4, 8)], [(0, 2)]]}), (8, {1: [[(0, 3)]]}))
    (admit, _) = messages(driver.grant(actions), m.Admit)
    assert admit.kept == [m.KeptPart(rank=0, runs=[[(4, 8)]]), m.KeptPart(rank=1, runs=[[(0, 3)]])]


@pytest.mark.parametrize(
    "shards",
    [[{1: [[(0, 5)]]}, {1: [[(4, 8)]]}], [{1: [[(-9, 5)]]}, {}], [{1: [[(5, 3)]]}, {}], [{1: [[(0, 5)], [(2, 3)]]}, {}]],
    ids=["twice", "no position", "backwards", "twice in one"],
)
def test_kv_that_can_not_be_is_not_used(shards: list[dict[int, Runs]]) -> None:
    driver = serving(8, 8, 8)
    running(driver, "r", 8, spread=2, generated=3)
    actions = changed(driver, (8, shards[0]), (8, shards[1]))
    (admit, _) = messages(driver.grant(actions), m.Admit)
    assert not admit.kept
    assert admit.seq == 2


def test_a_prompt_whose_log_probabilities_have_not_come_is_computed_anew() -> None:
    """Each of its rows is needed; once all have come it is as any other."""
    for count in (3, 7):
        driver = serving(8, 8)
        running(driver, "r", 8, prompt_logprobs=0)
        packed = bytes(4 * count)
        logprobs = m.PromptLogprobs(start=1, token_ids=packed, logprobs=packed, ranks=packed)
        driver.say(peer(0), m.Scored(epoch=1, seq=1, logprobs=logprobs))
        actions = changed(driver, (5, {1: [[(0, 8)]]}))
        (admit,) = messages(driver.grant(actions), m.Admit)
        assert admit.params.prompt_logprobs == (0 if count == 3 else None)
        assert bool(admit.kept) == (count == 7)


@pytest.mark.parametrize("how", ["abort", "stop"])
@pytest.mark.parametrize("when", ["suspending", "opening", "joining", "queued", "reserving"])
def test_a_request_that_ends_meanwhile(when: str, how: str) -> None:
    """What is left of it is discarded by who is told of it in the next epoch; while suspending nobody has to be told."""
    driver = serving(8, 8, 8)
    if when == "queued":  # behind one that is being reserved
        running(driver, "before", 8, spread=1)
    running(driver, "r", 8, spread=1, generated=3)
    seq, number, home = (2, 2, 1) if when == "queued" else (1, 1, 0)
    driver.lose(2)
    if when != "suspending":
        driver.keep(peer(1 - home), 8)
        driver.keep(peer(home), 5, {seq: [[(0, 10)]]})
    if when in ("joining", "queued", "reserving"):
        driver.say(peer(0), m.StoreOpened(epoch=2, address="tcp://store:1"))
    if when in ("queued", "reserving"):
        driver.say(peer(0), m.Joined(epoch=2))
        driver.say(peer(1), m.Joined(epoch=2))
    drop = [Send(peer(home), m.Drop(epoch=2, seq=seq))] if when == "reserving" else []
    discard = [] if when == "suspending" else [Send(peer(home), m.Discard(epoch=2, seq=seq))]
    if how == "abort":
        actions = driver.say(CLIENT, m.Abort(call=1, request_id="r"))
        assert actions == [deliver(number, "r", 3, [], finish_reason="abort"), *drop, *discard, done(1)]
    else:
        actions = driver.handle(StopFound(number, 2, driver.now))
        assert actions == [deliver(number, "r", 2, [], finish_reason="stop"), *drop, *discard]
    if when == "suspending":
        driver.keep(peer(1), 8)
        driver.keep(peer(0), 5, {1: [[(0, 10)]]})
    if when in ("suspending", "opening"):
        joins = driver.say(peer(0), m.StoreOpened(epoch=2, address="tcp://store:1"))
        assert [join.keep for join in messages(joins, m.JoinEpoch)] == [[], []]


def test_what_is_left_of_one_that_was_refused_waits_for_the_next_change() -> None:
    """Whoever isn't admitted before the next change keeps what it kept."""
    driver = serving(8, 8, 8)
    running(driver, "r", 8, generated=3)
    actions = changed(driver, (5, {1: [[(0, 10)]]}), (8, {}))
    assert messages(actions, m.Reserve) == [m.Reserve(epoch=2, seq=1, blocks=4)]
    driver.lose(1)
    driver.keep(peer(0), 5, {1: [[(0, 10)]]}, epoch=2)
    (admit,) = messages(driver.grant(driver.join(3, peer(0))), m.Admit)
    assert admit.kept == [m.KeptPart(rank=0, runs=[[(0, 10)]])]


def test_answers_to_a_reservation_that_was_given_up_are_not_the_next_ones() -> None:
    """A request that keeps KV keeps its number: it is asked for again when all have answered."""
    driver = serving(9, 9, 9)
    running(driver, "r", 20, spread=2, max_tokens=8)
    actions = changed(driver, (8, {1: [[(0, 4)]]}), (8, {1: [[(12, 16)]]}))
    asked = messages(actions, m.Reserve)
    assert [reserve.seq for reserve in asked] == [1, 1]
    refused = driver.say(peer(0), m.NotGranted(epoch=2, seq=1, free_blocks=8))
    assert refused == [Send(peer(1), m.Drop(epoch=2, seq=1))]
    again = driver.say(peer(1), m.Granted(epoch=2, seq=1, blocks=asked[1].blocks, free_blocks=8 - asked[1].blocks))
    assert [reserve.seq for reserve in messages(again, m.Reserve)] == [1, 1]


def test_a_request_too_large_for_what_is_left_waits_for_an_instance() -> None:
    """Those behind it that fit go before it; what is left of it lies there until an instance comes."""
    driver = serving(16, 16)
    running(driver, "large", 96, spread=2, generated=1)
    driver.say(CLIENT, submit("small", 8, max_tokens=1))
    assert messages(changed(driver, (4, {1: [[(0, 48)]]})), m.Reserve) == [m.Reserve(epoch=2, seq=3, blocks=3)]
    stats = request_stats(driver, "large")
    assert (stats.state, stats.kv_tokens) == ("queued", {0: 48})
    driver.come(NEW, 16)
    driver.keep(peer(0), 4, {1: [[(0, 48)]]}, epoch=2)
    asked = driver.join(3, peer(0), NEW)
    assert asked == [Send(NEW, m.Reserve(epoch=3, seq=1, blocks=14)), Send(peer(0), m.Reserve(epoch=3, seq=1, blocks=4))]
    (admit, _) = messages(driver.grant(asked), m.Admit)
    assert (admit.arrival, admit.kept) == (1, [m.KeptPart(rank=0, runs=[[(0, 48)]])])


def test_open_numbers_of_tokens_are_what_there_is_room_for() -> None:
    """Who said no number takes what is left, and more when more has come."""
    driver = serving(8, 8)
    (first,) = messages(driver.grant(driver.say(CLIENT, submit("r", 5, max_tokens=None))), m.Admit)
    assert first.params.max_tokens == 51
    driver.say(peer(0), outputs(1, 0, [9] * 2))
    actions = changed(driver, (5, {1: [[(0, 6)]]}))
    (second,) = messages(driver.grant(actions), m.Admit)
    assert second.params.max_tokens == 23 - 2


def test_waiting_is_counted_from_the_change_on() -> None:
    """What ran for an hour has not waited for an hour."""
    driver = serving(8, 8, max_queue_wait_s=5.0)
    running(driver, "r", generated=1)
    heard = (peer(0), peer(1), CLIENT)
    driver.wait(60, *heard)
    driver.lose(1)
    assert driver.wait(5, peer(0), CLIENT) == []
    (answer, *_) = driver.wait(1, peer(0), CLIENT)
    assert answer == failed(1, "r", "waited 5 s for free memory (max-queue-wait)", index=1)


# --- memory


def test_the_youngest_gives_up_what_it_kept_when_nothing_runs_and_the_oldest_has_no_room() -> None:
    driver = serving(8, 8)
    for name in ("old", "young"):
        running(driver, name, 12, spread=1, generated=1)
    shards: dict[int, Runs] = {1: [[(0, 12)]], 2: [[(0, 12)]]}
    assert changed(driver, (2, shards)) == [Send(peer(0), m.Discard(epoch=2, seq=2))]
    assert [request_stats(driver, name).kv_tokens for name in ("old", "young")] == [{0: 12}, {}]
    assert driver.say(peer(0), beat(5)) == [pong(0), Send(peer(0), m.Reserve(epoch=2, seq=1, blocks=4))]


def test_the_oldest_gives_its_own_up_at_last() -> None:
    """The blocks that its gaps might take are more than there are: it is placed anew."""
    driver = serving(4, 4)
    running(driver, "r", 6, generated=1, max_tokens=6)
    assert changed(driver, (2, {1: [[(0, 6)]]})) == [Send(peer(0), m.Discard(epoch=2, seq=1))]
    assert driver.say(peer(0), beat(4)) == [pong(0), Send(peer(0), m.Reserve(epoch=2, seq=2, blocks=3))]


def test_nothing_is_given_up_while_blocks_are_about_to_be_free() -> None:
    """Those of a sequence that nobody wants go with the JoinEpoch: a Beat will say so."""
    driver = serving(8, 8)
    running(driver, "r", 8, generated=1)
    running(driver, "gone", 20, spread=1)
    driver.say(CLIENT, m.Abort(call=1, request_id="gone"))
    actions = changed(driver, (0, {1: [[(0, 8)]], 2: [[(0, 20)]]}))
    assert actions == []
    asked = driver.say(peer(0), beat(6))
    assert asked == [pong(0), Send(peer(0), m.Reserve(epoch=2, seq=1, blocks=4))]


def test_kept_kv_is_given_up_before_any_that_runs_is_preempted() -> None:
    driver = serving(8, 8)
    running(driver, "old", 8, generated=1)
    running(driver, "young", 12, generated=1)
    actions = changed(driver, (4, {1: [[(0, 8)]], 2: [[(0, 12)]]}))
    (admit,) = messages(driver.grant(actions), m.Admit)
    assert admit.seq == 1
    assert request_stats(driver, "young").state == "queued"
    assert driver.say(peer(0), m.NeedBlock(epoch=2, seq=1)) == [Send(peer(0), m.Discard(epoch=2, seq=2))]
    assert driver.cluster.stats().counters.preemptions == 0


# --- others


def test_who_can_not_join_is_told_why() -> None:
    driver = serving(8, 8)
    other = register(rank=0, cell_size=2, fingerprint="c0de")
    (answer,) = driver.say(NEW, other)
    assert answer == Send(NEW, m.Refused(reason="its model is tiny (c0de), that of cell 'main' is tiny (f00d)"))
    assert driver.cluster.stats().cells[0].state == "ready"


def test_a_change_takes_requests_in() -> None:
    driver = serving(8, 8)
    driver.lose(1)
    assert driver.say(CLIENT, submit("r", 4, wait_for_cell=False)) == []
    driver.keep(peer(0), 8)
    assert messages(driver.join(2, peer(0)), m.Reserve) == [m.Reserve(epoch=2, seq=1, blocks=2)]


def test_a_home_can_move_to_who_came() -> None:
    """It is called by its id, not by its rank."""
    driver = serving(8, 8, 8)
    driver.lose(0)
    driver.keep(peer(1), 8)
    driver.keep(peer(2), 8)
    driver.join(2, peer(1), peer(2))
    (admit,) = messages(driver.grant(driver.say(CLIENT, submit("r"))), m.Admit)
    assert admit.shares == [m.Share(rank=0, tokens=8)]
    assert request_stats(driver, "r").home == 1
    asked = driver.say(CLIENT, m.MoveHome(call=1, request_id="r", instance=2))
    assert asked == [Send(peer(2), m.ReserveNext(epoch=2, seq=1))]
    again = driver.say(CLIENT, m.MoveHome(call=2, request_id="r", instance=1))
    assert again == [call_failed(2, "request 'r' is being moved to instance 2")]
    moved = driver.grant(asked)
    assert moved[-1] == Send(peer(1), m.MoveSequence(epoch=2, seq=1, to=1))
    assert driver.say(peer(2), m.HomeMoved(epoch=2, seq=1, home=1)) == [done(1)]
    assert request_stats(driver, "r").home == 2


def test_one_without_max_tokens_that_has_outgrown_what_is_left_stops_nobody() -> None:
    """Its prompt would fit, with as many tokens as there is room for; what it has generated already doesn't."""
    driver = serving(8, 8)
    running(driver, "long", 20, generated=10, max_tokens=None, ignore_eos=True)
    driver.say(CLIENT, submit("short", 4, max_tokens=2))
    driver.lose(1)
    driver.keep(peer(0), 8)
    admits = messages(driver.grant(driver.join(2, peer(0))), m.Admit)
    assert [admit.arrival for admit in admits] == [2]
    assert request_stats(driver, "long").state == "queued"


# --- instances that come and can't be with the others


def coming() -> Driver:
    """A request runs on two, and a third comes: the epoch with it is about to be joined."""
    driver = serving(8, 8)
    running(driver, "r", 8, spread=2, generated=1)
    driver.come(NEW)
    keep_all(driver, 1)
    driver.say(peer(0), m.StoreOpened(epoch=2, address="tcp://store:1"))
    return driver


def keep_all(driver: Driver, epoch: int) -> list[Action]:
    """The two end that epoch; what the last of them brings about."""
    driver.keep(peer(0), 6, {1: [[(0, 4)]]}, epoch)
    return driver.keep(peer(1), 6, {1: [[(4, 8)]]}, epoch)


def refusal(reason: str) -> Send:
    what = "the others of cell 'main' can't step with it (does --host name an address that they reach?)"
    return Send(NEW, m.Refused(reason=f"{what}: {reason}"))


def test_who_breaks_each_epoch_that_it_is_in_is_sent_away() -> None:
    """Once may be chance. The others go on with what they have."""
    driver = coming()
    broken = "its process groups could not be formed: connection refused"
    assert messages(driver.say(peer(0), m.EpochBroken(epoch=2, reason=broken)), m.Suspend)
    driver.keep(NEW, 8, epoch=2)
    assert keep_all(driver, 2) == [open_store(peer(0), 3)]
    driver.say(peer(0), m.StoreOpened(epoch=3, address="tcp://store:1"))
    reason = f"instance 0 of cell 'main' can't go on: {broken}"
    actions = driver.say(peer(0), m.EpochBroken(epoch=3, reason=broken))
    assert actions == [refusal(reason), suspend(0, reason, 3), suspend(1, reason, 3)]
    assert keep_all(driver, 3) == [open_store(peer(0), 4)]
    admits = messages(driver.grant(driver.join(4, peer(0), peer(1))), m.Admit)
    assert [part.runs for part in admits[0].kept] == [[[(0, 4)]], [[(4, 8)]]]
    assert len(driver.cluster.stats().instances) == 2


def test_who_does_not_meet_the_others_is_sent_away() -> None:
    driver = coming()
    actions = driver.wait(int(NEWCOMERS_S) + 1, peer(0), peer(1), NEW, CLIENT)
    reason = f"they did not meet within {NEWCOMERS_S:g} s"
    assert actions == [refusal(reason), suspend(0, reason, 2), suspend(1, reason, 2)]


def test_between_one_that_serves_and_one_that_has_just_come_the_latter_is_at_fault() -> None:
    driver = coming()
    driver.say(NEW, m.LinkLost(epoch=2, rank=0, reason="no route"))
    actions = driver.wait(2, peer(0), peer(1), CLIENT)
    reason = "instance 2 of cell 'main' lost its link to instance 0: no route"
    assert actions == [refusal(reason), suspend(0, reason, 2), suspend(1, reason, 2)]


def test_a_request_that_all_who_compute_it_die_of_is_given_up() -> None:
    """What runs beside it goes on."""
    driver = serving(8, 8, 8, 8, 8)
    running(driver, "bad", generated=1, spread=1)
    alive = [0, 1, 2, 3, 4]
    for turn in range(MAX_BREAKS):
        victim = request_stats(driver, "bad").home
        assert victim is not None
        driver.lose(victim)
        alive.remove(victim)
        for rank in alive:
            driver.keep(peer(rank), 8, {}, turn + 1)
        actions = driver.join(turn + 2, *map(peer, alive))
        while any(messages(actions, kind) for kind in (m.Reserve, m.ReserveNext)):
            actions = driver.grant(actions)
    ended = request_stats(driver, "bad")
    assert (ended.finish_reason, len(driver.cluster.stats().instances)) == ("error", 5 - MAX_BREAKS)


def test_a_token_clears_a_request_of_the_losses_before_it() -> None:
    driver = serving(8, 8, 8, 8, 8, 8)
    running(driver, "good", generated=1, spread=1, max_tokens=16)
    alive = [0, 1, 2, 3, 4, 5]
    for turn in range(MAX_BREAKS + 1):
        victim = request_stats(driver, "good").home
        assert victim is not None
        driver.lose(victim)
        alive.remove(victim)
        for rank in alive:
            driver.keep(peer(rank), 8, {}, turn + 1)
        actions = driver.join(turn + 2, *map(peer, alive))
        while any(messages(actions, kind) for kind in (m.Reserve, m.ReserveNext)):
            actions = driver.grant(actions)
        (admit,) = messages(actions, m.Admit)
        output = m.SequenceOutput(seq=admit.seq, index=0, token_ids=[9])
        home = peer(alive[admit.shares[0].rank])
        driver.say(home, m.Outputs(epoch=turn + 2, outputs=[output]))
    assert request_stats(driver, "good").generated_tokens == MAX_BREAKS + 2


def test_the_only_instance_is_replaced_and_new_requests_wait_for_the_next() -> None:
    driver = serving(8)
    driver.come(NEW, cell_size=1)
    driver.say(CLIENT, m.Drain(call=1, instance=0))
    driver.say(CLIENT, submit("r"))
    assert request_stats(driver, "r").state == "queued"


def test_a_text_that_is_encoded_while_an_instance_is_lost_waits_as_the_others_do() -> None:
    """It would have fitted when it came."""
    driver = serving(8, 8)
    text = m.Submit(request_id="text", params=m.SamplingParams(max_tokens=16), text="hello")
    driver.say(CLIENT, text)
    driver.lose(1)
    driver.handle(Encoded(1, driver.now, token_ids=m.pack_tokens([5] * 30), highest=5))
    assert request_stats(driver, "text").state == "queued"
    refused = driver.say(CLIENT, submit("new", 30, max_tokens=16))
    assert request_stats(driver, "new").finish_reason == "error", refused
