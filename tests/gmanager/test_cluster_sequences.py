"""The gManager's mind, once a cell is ready: sequences, homes, memory, and how all of it ends. As test_cluster.py."""

import logging

import msgspec
import pytest

from gmanager.cluster.cell import RETURN_GRACE_S
from gmanager.cluster.events import Action, DropText, Forget, PeerGarbled, PeerWasLost, Send, Stopped
from gmanager.wire import messages as m
from gmanager.wire.codec import Decoder, encode
from tests.gmanager.cluster_support import (
    CLIENT,
    HELLO,
    OTHER,
    Driver,
    admit,
    beat,
    call_failed,
    cancel,
    deliver,
    done,
    drop,
    dropped,
    failed,
    granted,
    move,
    outputs,
    peer,
    pong,
    register,
    regroup,
    request_stats,
    reserve,
    reserve_next,
    running,
    serving,
    submit,
)

# --- running requests


def test_abort_of_a_running_request() -> None:
    driver = serving(8, 8)
    running(driver, "r", spread=2, generated=1)
    answer = deliver(1, "r", 1, [], finish_reason="abort")
    assert driver.say(CLIENT, m.Abort(call=7, request_id="r")) == [answer, cancel(0, 1), done(7)]
    assert driver.say(CLIENT, m.Abort(call=8, request_id="r")) == [call_failed(8, "request 'r' has ended")]
    assert driver.say(peer(0), outputs(1, 1, [10])) == []
    assert not driver.cluster.is_idle
    assert driver.say(peer(0), m.Released(epoch=1, seq=1, generated=2)) == regroup(2, [0], [1])
    assert driver.cluster.is_idle
    assert request_stats(driver, "r").generated_tokens == 1


def scored(seq: int, start: int, count: int) -> m.Scored:
    packed = bytes(4 * count)
    return m.Scored(epoch=1, seq=seq, logprobs=m.PromptLogprobs(start=start, token_ids=packed, logprobs=packed, ranks=packed))


def told(of: m.Scored) -> Send:
    return Send(CLIENT, m.PromptOutput(request_id="r", logprobs=of.logprobs))


def test_no_token_goes_before_the_log_probabilities_of_its_prompt() -> None:
    """Instances speak on connections of their own: the home's tokens, and even its Released, may come first."""
    driver = serving(8, 8)
    running(driver, "r", 9, spread=2, prompt_logprobs=0)
    home, other = scored(1, 1, 5), scored(1, 6, 3)
    assert driver.say(peer(0), home) == [told(home)]
    assert driver.say(peer(0), outputs(1, 0, [10]), outputs(1, 1, [11], finish_reason="length")) == []
    assert driver.say(peer(0), m.Released(epoch=1, seq=1, generated=2)) == []
    assert driver.say(peer(1), scored(1, 6, 4)) == [], "more than there are"
    last = [deliver(1, "r", 0, [10, 11], finish_reason="length")]
    assert driver.say(peer(1), other) == [told(other), *last, *regroup(2, [0], [1])]
    assert driver.cluster.is_idle
    assert dropped(driver) == 1


def test_tokens_that_wait_for_log_probabilities_hold_nothing_up_after_an_abort() -> None:
    driver = serving(8, 8)
    running(driver, "r", 9, spread=2, prompt_logprobs=0)
    driver.say(peer(0), outputs(1, 0, [10]))
    answer = deliver(1, "r", 0, [], finish_reason="abort")
    assert driver.say(CLIENT, m.Abort(call=7, request_id="r")) == [answer, cancel(0, 1), done(7)]
    assert driver.say(peer(0), m.Released(epoch=1, seq=1, generated=1)) == regroup(2, [0], [1])
    assert driver.cluster.is_idle


def test_calls_for_requests_of_others_or_of_nobody() -> None:
    driver = serving(8, 8)
    driver.say(OTHER, HELLO)
    running(driver, "r")
    for who, name in ((CLIENT, "none"), (OTHER, "r")):
        answer = Send(who, m.CallFailed(call=1, reason=f"this client has no request {name!r}"))
        assert driver.say(who, m.Abort(call=1, request_id=name)) == [answer]
        assert driver.say(who, m.MoveHome(call=1, request_id=name, instance=1)) == [answer]
    assert driver.say(peer(0), outputs(1, 0, [10])) == [deliver(1, "r", 0, [10])]


def move_home(driver: Driver, call: int, to: int) -> list[Action]:
    return driver.say(CLIENT, m.MoveHome(call=call, request_id="r", instance=to))


def test_move_home() -> None:
    driver = serving(8, 8)
    running(driver, "r", generated=1)
    assert move_home(driver, 1, 0) == [done(1)]  # it is there
    assert move_home(driver, 2, 1) == [reserve_next(1, 1)]
    assert request_stats(driver, "r").state == "moving"
    assert move_home(driver, 3, 0) == [call_failed(3, "request 'r' is being moved to instance 1")]
    assert driver.say(peer(1), granted(1, 1, 7)) == [*regroup(1, [0, 1]), move(0, 1, 1)]
    assert driver.say(peer(0), m.HomeMoved(epoch=1, seq=1, home=7)) == []
    assert driver.say(peer(1), m.HomeMoved(epoch=1, seq=1, home=1)) == [done(2)]
    assert driver.say(peer(1), outputs(1, 1, [10], finish_reason="stop")) == [deliver(1, "r", 1, [10], finish_reason="stop")]
    assert driver.say(peer(1), m.Released(epoch=1, seq=1, generated=2)) == [drop(1, 1), *regroup(2, [0], [1])]
    stats = request_stats(driver, "r")
    assert (stats.home, stats.home_moves, dropped(driver)) == (1, 1, 1)


def test_home_moves_that_can_not_be() -> None:
    driver = serving(8, 8)
    running(driver, "r")
    for to in (2, -1, 2**40):
        assert move_home(driver, 1, to) == [call_failed(1, f"there is no instance {to}; cell 'main' has 0, 1")]
    assert move_home(driver, 2, 1) == [reserve_next(1, 1)]
    no = m.NotGranted(epoch=1, seq=1, free_blocks=0)
    assert driver.say(peer(1), no) == [call_failed(2, "instance 1 has no room: 1 block asked, 0 free")]
    assert request_stats(driver, "r").state == "prefill"
    assert driver.say(peer(0), outputs(1, 0, [10])) == [deliver(1, "r", 0, [10])]


@pytest.mark.parametrize("when", ["asked", "granted"])
def test_a_request_that_ends_while_it_moves(when: str) -> None:
    driver = serving(8, 8)
    running(driver, "r")
    move_home(driver, 1, 1)
    if when == "granted":
        driver.say(peer(1), granted(1, 1, 7))
    last = driver.say(peer(0), outputs(1, 0, [10], finish_reason="length"))
    answers = [deliver(1, "r", 0, [10], finish_reason="length"), call_failed(1, "request 'r' has ended (length)")]
    assert last == (answers if when == "granted" else [drop(1, 1), *answers])
    alone = regroup(2, [0], [1]) if when == "granted" else []
    assert driver.say(peer(0), m.Released(epoch=1, seq=1, generated=1)) == [drop(1, 1), *alone]


def test_a_request_that_its_instance_lets_go_of() -> None:
    driver = serving(8)
    running(driver, "r", generated=1)
    error = "instance 0 of cell 'main' released the request unasked"
    assert driver.say(peer(0), m.Released(epoch=1, seq=1, generated=1)) == [failed(1, "r", error, index=1)]
    assert driver.cluster.is_idle


# --- memory


def test_a_reservation_is_all_or_nothing() -> None:
    driver = serving(8, 8)
    assert driver.say(CLIENT, submit("r", 24, spread=2)) == [reserve(0, 1, 4), reserve(1, 1, 4)]
    assert driver.say(CLIENT, submit("next")) == [], "one at a time"
    assert driver.say(peer(0), granted(1, 4, 4)) == []
    no = m.NotGranted(epoch=1, seq=1, free_blocks=0)
    assert driver.say(peer(1), no) == [drop(0, 1)]  # given back at once; "next" is younger and waits behind it
    assert driver.say(peer(1), beat(4)) == [pong(1), reserve(0, 2, 4), reserve(1, 2, 4)]
    assert driver.say(peer(1), m.NotGranted(epoch=1, seq=2, free_blocks=9)) == [drop(0, 2)]
    assert driver.say(peer(0), granted(2, 4, 4)) == [reserve(0, 3, 5), reserve(1, 3, 3)], "it has at most 3: less than asked"
    assert driver.grant([reserve(1, 3, 3), reserve(0, 3, 5)])[2:4] == admit(3, 1, [5] * 24, {0: 16, 1: 8})


def test_what_is_given_back_counts_at_once() -> None:
    driver = serving(8, 8)
    assert driver.say(CLIENT, submit("r", 24, spread=2)) == [reserve(0, 1, 4), reserve(1, 1, 4)]
    assert driver.say(peer(0), granted(1, 4, 4)) == []
    no = m.NotGranted(epoch=1, seq=1, free_blocks=3)
    assert driver.say(peer(1), no) == [drop(0, 1), reserve(0, 2, 5), reserve(1, 2, 3)]


def test_a_late_grant_makes_room_for_who_waits() -> None:
    driver = serving(8)
    driver.say(CLIENT, submit("gone", 24, max_tokens=1))
    assert driver.say(CLIENT, submit("next")) == []
    driver.say(CLIENT, m.Abort(call=1, request_id="gone"))
    assert driver.say(peer(0), granted(1, 7, 1)) == [reserve(0, 2, 3)], "a Drop of its 7 blocks is on its way"


def test_a_home_without_room_moves() -> None:
    driver = serving(4, 4)
    running(driver, "r", generated=8)
    need = m.NeedBlock(epoch=1, seq=1)
    assert driver.say(peer(0), need) == [reserve_next(1, 1)]
    assert driver.say(peer(0), need) == []
    assert driver.say(peer(1), granted(1, 1, 3)) == [*regroup(1, [0, 1]), move(0, 1, 1)]
    assert driver.say(peer(1), m.HomeMoved(epoch=1, seq=1, home=1)) == []
    assert driver.say(peer(0), need) == [], "it is not home any more"
    stats = driver.cluster.stats()
    assert (stats.requests["r"].home_moves, stats.counters.preemptions, dropped(driver)) == (1, 0, 1)


def test_a_refused_home_move_tries_another() -> None:
    driver = serving(4, 8, 6)
    running(driver, "first", 20)
    assert driver.free[peer(1)] == 2
    running(driver, "r", 12)
    assert driver.free[peer(2)] == 2
    assert driver.say(peer(2), m.NeedBlock(epoch=1, seq=2)) == [reserve_next(0, 2)]
    assert driver.say(peer(0), m.NotGranted(epoch=1, seq=2, free_blocks=0)) == [reserve_next(1, 2)]


def test_preemption_when_no_instance_has_room() -> None:
    """The younger one gives way, and goes on behind the tokens that its client has, once the older one has ended."""
    driver = serving(4, 4)
    running(driver, "old", generated=8)
    running(driver, "young", generated=2)
    assert driver.say(peer(0), m.NeedBlock(epoch=1, seq=1)) == [cancel(1, 2)]
    assert request_stats(driver, "young").state == "preempted"
    assert driver.say(peer(1), outputs(2, 2, [9])) == [deliver(2, "young", 2, [9])]  # it was under way
    assert driver.say(peer(1), beat(4, {2: 0})) == [pong(1), reserve_next(1, 1)]
    assert driver.say(peer(1), m.Released(epoch=1, seq=2, generated=3)) == []
    assert driver.say(peer(1), granted(1, 1, 3)) == [*regroup(1, [0, 1]), move(0, 1, 1)]
    assert driver.say(peer(1), m.HomeMoved(epoch=1, seq=1, home=1)) == [], "it must not take back what it gave"
    last = outputs(1, 8, [9] * 8, finish_reason="length")
    assert driver.say(peer(1), last) == [deliver(1, "old", 8, [9] * 8, finish_reason="length")]
    assert driver.say(peer(1), beat(4, {1: 0})) == [pong(1)]
    released = m.Released(epoch=1, seq=1, generated=16)
    assert driver.say(peer(1), released) == [drop(1, 1), *regroup(2, [0], [1]), reserve(1, 3, 4)]
    assert driver.say(peer(1), granted(3, 4, 0)) == admit(3, 2, [5] * 8 + [9] * 3, {1: 11}, max_tokens=13, generated=3)
    assert driver.say(peer(1), outputs(3, 0, [10])) == [deliver(2, "young", 3, [10])]
    stats = driver.cluster.stats()
    assert (stats.requests["young"].preemptions, stats.counters.preemptions) == (1, 1)


@pytest.mark.parametrize("needy", [0, 1, 2])
@pytest.mark.parametrize(
    ("generated", "victim"), [((0, 1, 3), 1), ((0, 3, 1), 2), ((0, 1, 1), 2)], ids=["second", "third", "the youngest of equals"]
)
def test_the_oldest_is_never_preempted(needy: int, generated: tuple[int, int, int], victim: int) -> None:
    """But the one of the others that is cheapest to recompute, whoever needs a block."""
    driver = serving(4, 4, 4)
    for rank, tokens in enumerate(generated):
        running(driver, f"r{rank}", generated=tokens)
    assert driver.say(peer(needy), m.NeedBlock(epoch=1, seq=needy + 1)) == [cancel(victim, victim + 1)]


def test_nobody_is_preempted_while_blocks_are_about_to_be_free() -> None:
    driver = serving(4, 4, 4)
    for rank, tokens in enumerate((1, 1, 3)):
        running(driver, f"r{rank}", generated=tokens)
    driver.say(CLIENT, m.Abort(call=1, request_id="r2"))
    assert driver.say(peer(0), m.NeedBlock(epoch=1, seq=1)) == []
    assert driver.say(peer(2), beat(4, {3: 0})) == [pong(2), reserve_next(2, 1)]


@pytest.mark.parametrize("left", [1, 0])
def test_the_only_one_takes_the_last_block_before_it_starts_anew(left: int) -> None:
    driver = serving(4, 4)
    running(driver, "r", generated=3)
    assert driver.say(peer(1), beat(left)) == [pong(1)]
    assert driver.say(peer(0), m.NeedBlock(epoch=1, seq=1)) == [reserve_next(1, 1) if left else cancel(0, 1)]


# --- ends


def test_a_client_that_falls_silent_or_is_lost() -> None:
    """Its requests end and free what they hold; those of others go on."""
    for is_lost in (False, True):
        driver = serving(8, 8, resume_s=0)
        driver.say(OTHER, HELLO, submit("theirs"))
        driver.say(peer(0), granted(1, 3, 5))
        driver.say(CLIENT, submit("waits", 28), submit("r"))
        answers = [deliver(number, name, 0, [], finish_reason="abort") for number, name in ((2, "waits"), (3, "r"))]
        answers.insert(1, drop(1, 2))  # type: ignore[arg-type]
        if is_lost:
            gone = driver.handle(PeerWasLost(CLIENT, "it is not connected", driver.now))
        else:
            assert driver.wait(10, OTHER, peer(0), peer(1)) == []
            gone = driver.wait(1, OTHER, peer(0), peer(1))
        assert gone == [*answers, Forget(CLIENT)]
        reason = "the first message must be Hello or Register, not Ping"
        assert driver.say(CLIENT, m.Ping()) == [Send(CLIENT, m.Refused(reason=reason, may_return=True))]
        assert driver.say(peer(0), outputs(1, 0, [10])) == [deliver(1, "theirs", 0, [10], peer=OTHER)]


def test_leases_start_anew_when_the_gmanager_itself_stood_still() -> None:
    driver = serving(8, 8)
    running(driver, "r")
    assert driver.wait(1) == []
    driver.now += 60
    assert driver.wait(5) == []
    assert driver.say(peer(0), outputs(1, 0, [10])) == [deliver(1, "r", 0, [10])]
    assert ("gManager stood still", {"seconds": 61.0}) in [(line.event, line.fields) for line in driver.logs]


LOSSES = {
    "unreachable": "is lost: it does not read",
    "leaves": "left: SIGTERM",
    "fails": "failed: out of memory",
    "silent": "was not heard for 5 s",
    "garbles": "sent what can't be read: not msgpack",
}


def lose(driver: Driver, rank: int, how: str, *others: bytes) -> list[Action]:
    """Lose an instance of the first epoch; what of that its own last words are is left out."""
    who, why = peer(rank), LOSSES[how].partition(": ")[2]
    if how == "unreachable":
        actions = driver.handle(PeerWasLost(who, why, driver.now))
        last: Action = Forget(who)
    elif how in ("leaves", "fails"):
        return driver.say(who, m.Leave(reason=why, failed=how == "fails"))
    elif how == "silent":
        assert driver.wait(5, CLIENT, *others) == []
        actions = driver.wait(1, CLIENT, *others)
        last = Send(who, m.Expelled(reason=f"instance {rank} of cell 'main' {LOSSES[how]}"))
    else:
        actions = driver.handle(PeerGarbled(who, why, driver.now))
        last = Send(who, m.Refused(reason="can't read this: not msgpack"))
    assert actions.pop() == last
    return actions


@pytest.mark.parametrize("how", LOSSES)
def test_the_loss_of_the_last_instance_ends_its_cell(how: str) -> None:
    """Every request of it ends with the reason, wherever it is. A new cell of the same name can form and serves."""
    driver = serving(8)
    text = m.Submit(request_id="is encoded", params=m.SamplingParams(), text="hello")
    running(driver, "r", 20, generated=2, max_tokens=4)
    driver.say(CLIENT, text, submit("waits"))
    reason = f"instance 0 of cell 'main' {LOSSES[how]}"
    if how == "silent":  # it may come again
        assert driver.wait(6, CLIENT) == []
        reason += f", and none of the cell came back within {RETURN_GRACE_S:g} s"
        ended = driver.wait(int(RETURN_GRACE_S) + 1, CLIENT)
    else:
        ended = lose(driver, 0, how)
    assert ended == [
        failed(1, "r", reason, index=2),
        failed(2, "is encoded", reason),
        failed(3, "waits", reason),
        DropText(1),
    ]
    (over,) = [line for line in driver.logs if line.event == "cell over"]
    assert over.level == (logging.INFO if how == "leaves" else logging.ERROR)
    assert driver.cluster.is_idle and driver.cluster.stats().cells == []
    assert driver.say(CLIENT, submit("later")) == []
    assert driver.ready_cell(8, epoch=2) == [Send(peer(0, 2), m.Reserve(epoch=2, seq=1, blocks=3))]


@pytest.mark.parametrize("how", LOSSES)
def test_the_loss_of_one_of_several_changes_its_cell(how: str) -> None:
    """No request ends of it; only who waits for a home move is told."""
    driver = serving(8, 8)
    running(driver, "r", spread=2, generated=2)
    driver.say(CLIENT, m.MoveHome(call=5, request_id="r", instance=1), submit("waits"))
    assert lose(driver, 1, how, peer(0)) == [
        call_failed(5, "request 'r' has no home now: the cell's membership changes"),
        Send(peer(0), m.Suspend(epoch=1, reason=f"instance 1 of cell 'main' {LOSSES[how]}")),
    ]
    assert [cell.state for cell in driver.cluster.stats().cells] == ["changing"]
    assert [request_stats(driver, name).state for name in ("r", "waits")] == ["queued", "queued"]
    assert driver.say(peer(0), outputs(1, 2, [10])) == [], "it would be computed again"


MESSAGES: list[m.Message] = [
    m.StoreOpened(epoch=7, address="tcp://store:1"),
    m.Joined(epoch=7),
    m.Beat(epoch=7, free_blocks=0, held_tokens={1: 99}, counters=m.Counters(steps=1)),
    m.Granted(epoch=7, seq=2, blocks=3, free_blocks=0),
    m.NotGranted(epoch=7, seq=2, free_blocks=0),
    m.Outputs(epoch=7, outputs=[m.SequenceOutput(seq=1, index=0, token_ids=[66], finish_reason="stop")]),
    m.NeedBlock(epoch=7, seq=1),
    m.HomeMoved(epoch=7, seq=1, home=1),
    m.Released(epoch=7, seq=1, generated=0),
]


def test_messages_of_another_epoch_are_dropped_and_counted() -> None:
    driver = serving(8, 8)
    running(driver, "r", spread=2)
    driver.say(CLIENT, submit("reserving"))
    before = driver.cluster.stats()
    for number, message in enumerate(MESSAGES, 1):
        assert driver.say(peer(0), message) == []
        assert dropped(driver) == number
    after = msgspec.structs.replace(driver.cluster.stats(), counters=before.counters)
    assert after == before
    assert driver.say(peer(0), outputs(1, 0, [10])) == [deliver(1, "r", 0, [10])]
    stranger = [Send(b"stranger", m.Expelled(reason="this instance is not registered here (any more)"))]
    assert driver.say(b"stranger", MESSAGES[0]) == stranger
    assert [driver.say(b"stranger", message) for message in MESSAGES] == [[]] * len(MESSAGES)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (m.Hello(protocol=1), "it speaks protocol 1, this gManager 4"),
        (submit("r"), "the first message must be Hello or Register, not Submit"),
        (m.Leave(reason="x", failed=False), "the first message must be Hello or Register, not Leave"),
    ],
    ids=["protocol", "client", "instance"],
)
def test_first_messages_that_are_none(message: m.Message, reason: str) -> None:
    driver = serving(8)
    was_client = isinstance(message, m.Submit)  # of one that was forgotten: it may come again
    assert driver.say(OTHER, message) == [Send(OTHER, m.Refused(reason=reason, may_return=was_client))]
    assert driver.say(OTHER, HELLO, submit("r")) == []


def test_a_client_that_garbles_or_speaks_as_an_instance() -> None:
    for garbles in (True, False):
        driver = serving(8)
        running(driver, "r")
        if garbles:
            actions, reason = driver.handle(PeerGarbled(CLIENT, "ext type", 0.0)), "can't read this: ext type"
        else:
            actions, reason = driver.say(CLIENT, m.Joined(epoch=1)), "a client doesn't send Joined"
        answer = deliver(1, "r", 0, [], finish_reason="abort")
        assert actions == [answer, cancel(0, 1), Send(CLIENT, m.Refused(reason=reason))]


def test_everybody_is_told_when_the_gmanager_stops() -> None:
    driver = serving(8, 8)
    running(driver, "r", spread=2, generated=1)
    driver.say(CLIENT, submit("asked"), submit("waits"))
    driver.say(peer(5), register(rank=0, cell_size=2, cell="half"))
    why = "gManager is shutting down"
    assert driver.handle(Stopped(why, 0.0)) == [
        failed(1, "r", why, index=1),
        cancel(0, 1),
        failed(2, "asked", why),
        drop(1, 2),
        failed(3, "waits", why),
        *[Send(peer(rank), m.EndEpoch(epoch=1, reason=why)) for rank in (0, 1)],
        DropText(1),
        Send(peer(5), m.EndEpoch(epoch=2, reason=why)),
        DropText(2),
    ]
    assert driver.cluster.is_idle


def test_counters_are_summed() -> None:
    driver = serving(8, 8)
    driver.say(peer(0), beat(8, steps=3, rows=5))
    driver.say(peer(1), beat(8, steps=4, query_bytes=9))
    driver.handle(PeerGarbled(OTHER, "noise", 0.0))
    assert driver.cluster.stats().counters == m.Counters(steps=7, rows=5, query_bytes=9, dropped_messages=1)


def test_numbers_of_an_instance_that_has_gone_mad_reach_clients() -> None:
    """What each says fits the wire; so must what is made of it, or asking for statistics would end the client's connection."""
    driver = serving(8, 8)
    for name in ("r1", "r2", "r3"):
        running(driver, name, spread=2)
    for value in (2**64 - 1, -(2**63)):
        for rank in (0, 1):
            driver.say(peer(rank), beat(8, {1: value, 2: value, 3: value}, steps=value, kv_bytes=value))
        (answer,) = driver.say(CLIENT, m.GetStats(call=1))
        assert isinstance(answer, Send)
        assert Decoder[m.ToClient](m.ToClient).decode(encode(answer.message)) == answer.message
    most, one_more = register(rank=0, cell_size=1, cell="large", blocks=2**48), 2**48 + 1
    assert len(driver.say(peer(5), most)) == 2
    reason = "an instance has at most 1,125,899,906,842,624 tokens of KV, got 281,474,976,710,657 blocks of 4 tokens"
    more = register(rank=0, cell_size=1, cell="larger", blocks=one_more)
    assert driver.say(peer(6), more) == [Send(peer(6), m.Refused(reason=reason))]


@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_token_ids_that_are_none_are_an_instances_end(wrong: int) -> None:
    driver = serving(8)
    running(driver, "r", generated=1)
    reason = "can't read this: token ids must be in [0, 4294967296)"
    error = "instance 0 of cell 'main' sent what can't be read: token ids must be in [0, 4294967296)"
    assert driver.say(peer(0), outputs(1, 1, [5, wrong, 5])) == [
        failed(1, "r", error, index=1),
        DropText(1),
        Send(peer(0), m.Refused(reason=reason)),
    ]
