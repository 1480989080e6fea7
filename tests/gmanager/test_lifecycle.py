"""The table of a request's states, and the one function that changes them."""

from itertools import count
from typing import get_args

import pytest

from gmanager.cluster.lifecycle import RUNNING, TRANSITIONS, WAITING, Change, State
from gmanager.cluster.request import STORY, Request
from gmanager.cluster.requests import Requests
from gmanager.wire.messages import RequestState, SamplingParams, Submit

STATES = get_args(State)


def new() -> tuple[Requests, Request]:
    clock = count()
    requests = Requests([].append, clock=lambda: float(next(clock)))
    submit = Submit(request_id="r", params=SamplingParams(), text="x")
    return requests, requests.new(submit, b"client", seed=0, spread=1)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("change", get_args(Change))
def test_only_what_the_table_allows(change: Change, state: State) -> None:
    requests, request = new()
    request.state = state
    if state in TRANSITIONS[change].sources:
        requests.change(request, change)
        assert request.state == TRANSITIONS[change].target
    else:
        with pytest.raises(
            RuntimeError, match=f"request 1 is {state}, which '{change}' does not follow; its story: it just came"
        ):
            requests.change(request, change)
        assert request.state == state


def test_each_state_is_reached_and_left() -> None:
    assert {"waiting", *(row.target for row in TRANSITIONS.values())} == set(STATES)
    assert {*WAITING, *RUNNING, "finished"} == set(STATES)
    assert set(TRANSITIONS["end"].sources) == set(STATES) - {"finished"}, "every request can end, and once"
    assert set(get_args(Change)) == set(TRANSITIONS)


def test_the_error_tells_the_requests_story() -> None:
    requests, request = new()
    for change in ("encode", "enqueue", "reserve", "deny"):
        requests.change(request, change)
    story = "encode at .*encoding., enqueue at .*queued., reserve at .*reserving., deny at .*queued."
    with pytest.raises(RuntimeError, match=f"is queued, which 'admit' does not follow; its story: {story}"):
        requests.change(request, "admit")
    for _ in range(STORY):
        requests.change(request, "reserve")
        requests.change(request, "deny")
    assert len(request.story) == STORY


def test_users_see_what_it_waits_for_as_queued() -> None:
    _, request = new()
    shown = {}
    for request.state in STATES:
        shown[request.state] = request.shown_state
    assert set(shown.values()) <= set(get_args(RequestState))
    assert {state for state, seen in shown.items() if seen == "queued"} == {"waiting", "encoding", "queued"}
    request.state, request.preemptions = "queued", 1
    assert request.shown_state == "preempted"
