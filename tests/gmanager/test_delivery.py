"""Who is told what of a request: clients that attach, are lost, come back, and don't read.

As test_cluster.py: blocks of 4 tokens, literal events in, literal actions out.
"""

from array import array
from dataclasses import replace

import pytest

from gmanager.cluster.delivery import MOST_AT_ONCE, TAKEN_OVER
from gmanager.cluster.events import ClientEmpty, ClientFull, Forget, PeerWasLost, Send, StopFound
from gmanager.cluster.requests import KEEP_ENDED, KEEP_ENDED_BYTES
from gmanager.wire import messages as m
from tests.gmanager.cluster_support import (
    CLIENT,
    HELLO,
    OTHER,
    Driver,
    deliver,
    done,
    last_words,
    outputs,
    peer,
    refused,
    request_stats,
    running,
    serving,
    submit,
)


def attach(name: str, from_index: int) -> m.Attach:
    return m.Attach(request_id=name, from_index=from_index)


def lost(driver: Driver, who: bytes = CLIENT) -> None:
    assert driver.handle(PeerWasLost(who, "gone", driver.now))[-1] == Forget(who)


def unknown(name: str, who: bytes = CLIENT) -> Send:
    return last_words(name, f"no request {name!r} is known here (any more)", who, refusal="unknown")


# --- attaching


def test_a_lost_client_comes_back_and_goes_on() -> None:
    """Two tokens came to it; of those generated while it was gone and of those that follow none is left out."""
    driver = serving(8)
    running(driver, "r", generated=2)
    lost(driver)
    assert driver.say(peer(0), outputs(1, 2, [7, 8])) == [deliver(1, "r", 2, [7, 8], peer=None)]
    driver.say(OTHER, HELLO)
    assert driver.say(OTHER, attach("r", 2)) == [deliver(1, "r", 2, [7, 8], peer=OTHER, before=[9, 9])]
    assert driver.say(peer(0), outputs(1, 4, [6])) == [deliver(1, "r", 4, [6], peer=OTHER)]
    assert driver.say(OTHER, m.Abort(call=3, request_id="r"))[-1] == Send(OTHER, m.Done(call=3))


def test_to_attach_begins_a_text_anew_even_if_there_is_nothing_new() -> None:
    driver = serving(8)
    running(driver, "r", generated=2)
    lost(driver)
    driver.say(OTHER, HELLO)
    assert driver.say(OTHER, attach("r", 2)) == [deliver(1, "r", 2, [], peer=OTHER, before=[9, 9])]
    assert driver.say(peer(0), outputs(1, 2, [6])) == [deliver(1, "r", 2, [6], peer=OTHER)]


def test_one_that_has_more_than_there_is_waits_for_it() -> None:
    """So it may be after a journal has lost its last tokens with the power."""
    driver = serving(8)
    running(driver, "r", generated=2)
    lost(driver)
    driver.say(OTHER, HELLO)
    assert driver.say(OTHER, attach("r", 4)) == [deliver(1, "r", 2, [], peer=None)]
    assert driver.say(peer(0), outputs(1, 2, [6])) == [deliver(1, "r", 2, [6], peer=None)]
    assert driver.say(peer(0), outputs(1, 3, [6, 5])) == [deliver(1, "r", 4, [5], peer=OTHER, before=[9, 9, 6, 6])]


def test_the_same_request_again_attaches_to_the_first() -> None:
    driver = serving(8)
    running(driver, "r", generated=2)
    driver.say(OTHER, HELLO)
    takes_over = [last_words("r", TAKEN_OVER, index=2), deliver(1, "r", 0, [9, 9], peer=OTHER, before=[])]
    assert driver.say(OTHER, submit("r")) == takes_over
    assert len(driver.cluster.stats().requests) == 1
    # what the former holder says of it means nothing any more
    reason = "this client has no request 'r'"
    assert driver.say(CLIENT, m.Abort(call=1, request_id="r")) == [Send(CLIENT, m.CallFailed(call=1, reason=reason))]
    lost(driver)
    assert request_stats(driver, "r").finish_reason is None


def test_another_request_of_the_same_id_is_refused() -> None:
    driver = serving(8)
    running(driver, "r", generated=1)
    error = "request id 'r' is in use by another request, which has not ended"
    for other in (submit("r", 9), submit("r", temperature=0.0), submit("r", spread=1), submit("r", model="tiny")):
        assert driver.say(CLIENT, other) == refused("r", error)
    assert driver.say(peer(0), outputs(1, 1, [8])) == [deliver(1, "r", 1, [8])]


def test_who_ended_is_known_for_a_while() -> None:
    driver = serving(8)
    running(driver, "r", generated=1, max_tokens=3)
    driver.say(peer(0), outputs(1, 1, [7, 8], finish_reason="length"))
    last = deliver(1, "r", 0, [9, 7, 8], before=[], finish_reason="length")
    assert driver.say(CLIENT, submit("r", max_tokens=3)) == [last]
    assert driver.say(CLIENT, attach("r", 2)) == [deliver(1, "r", 2, [8], before=[9, 7], finish_reason="length")]
    assert driver.say(CLIENT, attach("r", 9)) == [deliver(1, "r", 3, [], before=[9, 7, 8], finish_reason="length")]
    assert driver.say(CLIENT, attach("other", 0)) == [unknown("other")]


def test_one_that_failed_or_was_aborted_runs_anew_when_it_is_submitted_again() -> None:
    driver = serving(8)
    running(driver, "r", generated=1)
    driver.say(CLIENT, m.Abort(call=1, request_id="r"))
    assert driver.say(CLIENT, attach("r", 0)) == [deliver(1, "r", 0, [9], before=[], finish_reason="abort")]
    driver.say(CLIENT, submit("r"))
    assert request_stats(driver, "r").state in ("queued", "reserving")
    assert driver.cluster._requests.ended("r") is None


def test_a_request_that_was_refused_may_come_again() -> None:
    driver = Driver()
    driver.say(CLIENT, HELLO)
    now = submit("r", wait_for_cell=False)
    error = "no instances are ready to serve"
    assert driver.say(CLIENT, now) == refused("r", error, refusal="not_ready")
    driver.ready_cell(8)
    assert isinstance(driver.say(CLIENT, now)[0].message, m.Reserve)  # type: ignore[union-attr]


def test_the_text_of_one_whose_cell_is_over_is_waited_for() -> None:
    driver = serving(8)
    running(driver, "r", generated=1, max_tokens=2)
    driver.say(peer(0), outputs(1, 1, [7], finish_reason="length"))
    driver.lose(0)
    assert driver.say(CLIENT, attach("r", 0)) == []
    assert driver.wait(30, CLIENT) == []
    assert driver.wait(1, CLIENT) == [unknown("r")]
    # but for another cell of its model
    driver.say(CLIENT, attach("r", 0))
    assert driver.ready_cell(8, epoch=2)[0] == deliver(1, "r", 0, [9, 7], before=[], cell=2, finish_reason="length")


def test_cells_of_other_models_and_their_requests_lengthen_no_wait_for_a_text() -> None:
    driver = serving(8)
    running(driver, "r", generated=1, max_tokens=2, model="tiny")
    driver.say(peer(0), outputs(1, 1, [7], finish_reason="length"))
    driver.lose(0)
    assert driver.say(CLIENT, attach("r", 0)) == []
    assert driver.wait(20, CLIENT) == []
    driver.ready_cell(8, cell="other", epoch=2, model="other")
    assert driver.wait(5, CLIENT, peer(0, 2)) == []
    driver.say(CLIENT, submit("of other", model="other"))
    assert driver.wait(5, CLIENT, peer(0, 2)) == []
    assert driver.wait(1, CLIENT, peer(0, 2)) == [unknown("r")]


def test_ended_requests_are_kept_within_bounds() -> None:
    driver = serving(8)
    requests = driver.cluster._requests
    for number in range(KEEP_ENDED + 1):
        driver.say(CLIENT, submit(f"r{number}", 900))  # refused: it never fits
    assert requests.ended("r0") is None
    assert requests.ended("r1") is not None
    large = requests.ended("r5")
    assert large is not None
    large.request.tokens.extend([1] * (KEEP_ENDED_BYTES // 4 + 1))
    requests._ended_bytes += KEEP_ENDED_BYTES + 4
    driver.say(CLIENT, submit("last", 900))
    assert requests.ended("r5") is None
    assert requests.ended("last") is not None


def test_log_probabilities_come_again() -> None:
    """Those of the prompt only for who begins at its beginning."""
    driver = serving(8)
    logprobs = [m.TokenLogprob(token_id=9, logprob=-1.0, rank=1)]
    running(driver, "r", 4, logprobs=0, prompt_logprobs=0)
    packed = m.pack_tokens([5] * 3)
    floats = m.pack_tokens([0] * 3)
    scores = m.PromptLogprobs(start=1, token_ids=packed, logprobs=floats, ranks=m.pack_tokens([1] * 3))
    driver.say(peer(0), m.Scored(epoch=1, seq=1, logprobs=scores))
    driver.say(peer(0), outputs(1, 0, [9], logprobs=logprobs))
    lost(driver)
    driver.say(OTHER, HELLO)
    assert driver.say(OTHER, attach("r", 0)) == [
        Send(OTHER, m.PromptOutput(request_id="r", logprobs=scores)),
        deliver(1, "r", 0, [9], peer=OTHER, before=[], logprobs=logprobs),
    ]
    assert driver.say(OTHER, attach("r", 1)) == [deliver(1, "r", 1, [], peer=OTHER, before=[9], logprobs=[])]


# --- clients that are gone


def test_nobody_comes_for_it() -> None:
    driver = serving(8, resume_s=5.0)
    running(driver, "r", generated=1)
    lost(driver)
    assert driver.wait(5, peer(0)) == []
    (last, cancel) = driver.wait(1, peer(0))
    assert last == deliver(1, "r", 1, [], peer=None, finish_reason="abort")
    assert cancel == Send(peer(0), m.Cancel(epoch=1, seq=1))


def test_who_is_told_by_itself_is_not_waited_for() -> None:
    """An Abort, or words that no client says."""
    driver = serving(8)
    running(driver, "r", generated=1)
    driver.say(CLIENT, m.Joined(epoch=1))
    assert request_stats(driver, "r").finish_reason == "abort"


def test_a_stop_string_is_found_while_nobody_listens() -> None:
    driver = serving(8)
    running(driver, "r", generated=1, stop=["x"])
    lost(driver)
    assert driver.say(peer(0), outputs(1, 1, [7, 8])) == [deliver(1, "r", 1, [7, 8], peer=None, stop_strings=("x",))]
    driver.handle(StopFound(1, 2, driver.now))
    driver.say(OTHER, HELLO)
    expected = deliver(1, "r", 1, [7], peer=OTHER, before=[9], stop_strings=("x",), finish_reason="stop")
    assert driver.say(OTHER, attach("r", 1)) == [expected]


# --- clients that don't read


def test_who_does_not_read_is_told_no_more_until_it_has() -> None:
    driver = serving(8)
    running(driver, "r", generated=2)
    assert driver.handle(ClientFull(CLIENT, driver.now)) == []
    assert driver.handle(ClientFull(CLIENT, driver.now)) == []
    assert driver.say(peer(0), outputs(1, 2, [7])) == [deliver(1, "r", 2, [7], peer=None)]
    assert driver.say(peer(0), outputs(1, 3, [8])) == [deliver(1, "r", 3, [8], peer=None)]
    assert driver.handle(ClientEmpty(CLIENT, driver.now)) == [deliver(1, "r", 2, [7, 8], before=[9, 9])]
    assert driver.say(peer(0), outputs(1, 4, [6])) == [deliver(1, "r", 4, [6])]


def test_what_ends_meanwhile_is_told_then() -> None:
    driver = serving(8)
    running(driver, "r", generated=1, max_tokens=2)
    driver.handle(ClientFull(CLIENT, driver.now))
    last = driver.say(peer(0), outputs(1, 1, [7], finish_reason="length"))
    assert last == [deliver(1, "r", 1, [7], peer=None, finish_reason="length")]
    assert driver.say(CLIENT, attach("r", 0)) == [], "not now"
    (again,) = driver.handle(ClientEmpty(CLIENT, driver.now))
    assert again == deliver(1, "r", 0, [9, 7], before=[], finish_reason="length")


def test_a_new_request_of_one_who_does_not_read() -> None:
    """It runs; its tokens come when they can."""
    driver = serving(8)
    driver.handle(ClientFull(CLIENT, driver.now))
    running(driver, "r")
    assert driver.say(peer(0), outputs(1, 0, [7])) == [deliver(1, "r", 0, [7], peer=None)]
    assert driver.handle(ClientEmpty(CLIENT, driver.now)) == [deliver(1, "r", 0, [7], before=[])]


def test_who_never_reads_is_dropped_and_can_come_back() -> None:
    driver = serving(8, max_pause_s=5.0)
    running(driver, "r", generated=1)
    driver.handle(ClientFull(CLIENT, driver.now))
    assert driver.wait(5, CLIENT, peer(0)) == []
    assert driver.wait(1, CLIENT, peer(0)) == [Forget(CLIENT)]
    assert driver.handle(ClientEmpty(CLIENT, driver.now)) == []
    reason = "the first message must be Hello or Register, not Ping"
    assert driver.say(CLIENT, m.Ping()) == [Send(CLIENT, m.Refused(reason=reason, may_return=True))]
    driver.say(OTHER, HELLO)
    assert driver.say(OTHER, attach("r", 1)) == [deliver(1, "r", 1, [], peer=OTHER, before=[9])]


def test_calls_are_answered_all_the_same() -> None:
    driver = serving(8)
    running(driver, "r", generated=1)
    driver.handle(ClientFull(CLIENT, driver.now))
    assert driver.say(CLIENT, m.Abort(call=1, request_id="r"))[-1] == done(1)


@pytest.mark.parametrize("index", [-1, -(2**40)])
def test_an_index_that_makes_no_sense_is_never_built(index: int) -> None:
    with pytest.raises(ValueError, match="from_index must not be negative"):
        attach("r", index)


def test_what_another_has_taken_over_meanwhile_stays_with_it() -> None:
    driver = serving(8)
    running(driver, "r", generated=2)
    driver.handle(ClientFull(CLIENT, driver.now))
    driver.say(OTHER, HELLO)
    driver.say(OTHER, attach("r", 2))
    assert driver.handle(ClientEmpty(CLIENT, driver.now, {"r": 1})) == []
    assert driver.say(peer(0), outputs(1, 2, [7])) == [deliver(1, "r", 2, [7], peer=OTHER)]


def test_a_stop_that_is_found_again_is_written_once() -> None:
    """Its text is made anew for who attaches late; the journal may have forgotten it."""
    driver = serving(8)
    driver.cluster._requests._term = 1
    running(driver, "r", generated=2, stop=["x"])
    driver.handle(StopFound(1, 2, driver.now))
    driver.say(CLIENT, attach("r", 0))
    assert driver.handle(StopFound(1, 2, driver.now)) == []


def test_much_comes_in_pieces() -> None:
    """One answer with all of it may not fit a frame."""
    driver = serving(8)
    running(driver, "r", generated=1)
    request = driver.cluster._requests.by_id("r")
    assert request is not None
    request.tokens.extend([7] * (2 * MOST_AT_ONCE))
    lost(driver)
    driver.say(OTHER, HELLO)
    pieces = driver.say(OTHER, attach("r", 1))
    first, second = (deliver(1, "r", 1 + i * MOST_AT_ONCE, [7] * MOST_AT_ONCE, peer=OTHER) for i in range(2))
    assert pieces == [replace(first, before=array("I", [9])), second]


def test_what_was_told_and_got_no_further_is_told_again() -> None:
    """The shell queues nothing for a client that is full, and says so when it is empty."""
    driver = serving(8, 8)
    running(driver, "a", generated=2)
    running(driver, "b", generated=1, max_tokens=3)
    driver.say(peer(1), outputs(2, 1, [7, 8], finish_reason="length"))
    driver.handle(ClientFull(CLIENT, driver.now))
    assert driver.handle(ClientEmpty(CLIENT, driver.now, {"a": 1, "b": 2})) == [
        deliver(1, "a", 1, [9], before=[9]),
        deliver(2, "b", 2, [8], before=[9, 7], finish_reason="length"),
    ]
