"""The gManager's mind: literal events in, literal lists of actions out, the books checked after every event.

Blocks have 4 tokens. `main` is a cell of epoch 1 unless a test says otherwise; its first admission is sequence 1.
"""

import math
from itertools import permutations
from typing import Any

import msgspec
import pytest

from gmanager.cluster.events import (
    Action,
    Deliver,
    DropText,
    Encode,
    Encoded,
    Forget,
    LoadText,
    PeerWasLost,
    Send,
    StopFound,
    TextLoaded,
)
from gmanager.cluster.intake import SCANNED_AT_ONCE
from gmanager.config import Spread
from gmanager.wire import messages as m
from tests.gmanager.cluster_support import (
    ASSETS,
    CHAIN_SEED,
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
    outputs,
    peer,
    pong,
    refused,
    register,
    regroup,
    request_stats,
    reserve,
    running,
    serving,
    submit,
)

# --- cells


def test_a_cell_forms() -> None:
    driver = Driver()
    one, two = register(rank=0, cell_size=2), register(rank=1, cell_size=2)
    members = [
        m.MemberAddress(rank=rank, id=rank, party_address=f"tcp://127.0.0.1:{9000 + rank}", host="here") for rank in (0, 1)
    ]
    assert driver.say(peer(0), one) == [Send(peer(0), m.Registered(lease_s=5.0, send_text=True))]
    assert driver.say(peer(1), m.StoreOpened(epoch=1, address="tcp://early:1")) == [
        Send(peer(1), m.Expelled(reason="this instance is not registered here (any more)"))
    ]
    driver.handle(PeerWasLost(peer(1), "it left", 0.0))
    assert driver.say(peer(1), two) == [
        Send(peer(1), m.Registered(lease_s=5.0, send_text=False)),
        Send(peer(0), m.OpenStore(epoch=1)),
    ]
    assert driver.say(peer(1), m.Text(assets=ASSETS)) == []  # it was not asked
    assert driver.say(peer(0), m.Text(assets=ASSETS)) == [LoadText(1, ASSETS)]
    assert driver.say(peer(0), m.Text(assets=ASSETS)) == []
    assert driver.say(peer(0), m.Joined(epoch=1)) == []  # nothing to join yet
    assert driver.say(peer(1), m.StoreOpened(epoch=1, address="tcp://not-asked:1")) == []
    assert driver.say(peer(0), m.StoreOpened(epoch=1, address="tcp://store:1")) == [
        Send(
            peer(rank),
            m.JoinEpoch(
                epoch=1, id=rank, rank=rank, store_address="tcp://store:1", members=members, calibrate=True, caches=True
            ),
        )
        for rank in (0, 1)
    ]
    assert driver.say(peer(0), m.StoreOpened(epoch=1, address="tcp://again:1")) == []
    (cell,) = driver.cluster.stats().cells
    assert (cell.name, cell.epoch, cell.state, cell.size, cell.total_tokens) == ("main", 1, "forming", 2, 64)


@pytest.mark.parametrize("order", list(permutations(["one joins", "the other joins", "text"])), ids=", ".join)
def test_ready_when_all_have_joined_and_the_text_is_loaded(order: tuple[str, ...]) -> None:
    driver = Driver()
    for rank in (0, 1):
        driver.say(peer(rank), register(rank=rank, cell_size=2))
    driver.say(peer(0), m.Text(assets=ASSETS), m.StoreOpened(epoch=1, address="tcp://store:1"))
    driver.say(CLIENT, HELLO, submit("r"))
    for last, what in zip((False, False, True), order, strict=True):
        if what == "text":
            actions = driver.handle(TextLoaded(1, driver.now))
        else:
            actions = driver.say(peer(0 if what == "one joins" else 1), m.Joined(epoch=1))
        assert actions == ([reserve(0, 1, 3)] if last else [])
        assert driver.cluster.stats().cells[0].state == ("ready" if last else "forming")


@pytest.mark.parametrize(
    ("registrations", "ranks"),
    [
        ([("run", 2), ("run", 0), ("run", 1)], [2, 0, 1]),
        ([("b", 1), ("a", 0), ("a", 1), ("b", 0)], [1, 2, 3, 0]),  # by run in order of its first registration
        ([("none", 1), ("none", 0), ("none", 0), ("none", 1)], [1, 0, 2, 3]),  # two torchruns without an id
    ],
)
def test_ranks(registrations: list[tuple[str, int]], ranks: list[int]) -> None:
    driver = Driver()
    size = len(registrations)
    actions: list[Action] = []
    for number, (run_id, rank) in enumerate(registrations):
        actions += driver.say(peer(number), register(rank=rank, cell_size=size, run_id=run_id))
    opener = peer(ranks.index(0))
    assert actions[-1] == Send(opener, m.OpenStore(epoch=1))
    joins = driver.say(opener, m.StoreOpened(epoch=1, address="tcp://store:1"))
    told = {a.peer: a.message.rank for a in joins if isinstance(a, Send) and isinstance(a.message, m.JoinEpoch)}
    assert [told[peer(number)] for number in range(size)] == ranks


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        ([1, 0], [1, 0]),  # one torchrun each: the order of registration is nobody's
        ([None, 0, None], [1, 0, 2]),
        ([2, 2, None], [2, 0, 1]),  # taken: the lowest that is free
        ([7, None], [7, 0]),
    ],
)
def test_instances_get_the_numbers_that_they_want(wanted: list[int | None], ids: list[int]) -> None:
    driver = Driver()
    for number, wants in enumerate(wanted):
        last = driver.say(peer(number), register(rank=0, cell_size=len(ids), run_id=f"run {number}", wanted_id=wants))
    opener = peer(ids.index(0))
    assert last[-1] == Send(opener, m.OpenStore(epoch=1))
    joins = driver.say(opener, m.StoreOpened(epoch=1, address="tcp://store:1"))
    told = {a.peer: a.message for a in joins if isinstance(a, Send) and isinstance(a.message, m.JoinEpoch)}
    assert [told[peer(number)].id for number in range(len(ids))] == ids
    assert [told[peer(number)].rank for number in range(len(ids))] == [sorted(ids).index(each) for each in ids]


def test_members_are_told_each_others_hosts() -> None:
    driver = Driver()
    driver.say(peer(0), register(rank=0, cell_size=2, host="a"))
    driver.say(peer(1), register(rank=1, cell_size=2, host="b"))
    joins = driver.say(peer(0), m.StoreOpened(epoch=1, address="tcp://store:1"))
    (members,) = {tuple(a.message.members) for a in joins if isinstance(a, Send) and isinstance(a.message, m.JoinEpoch)}
    assert [member.host for member in members] == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": "c0de"}, "its model is tiny (c0de), that of cell 'main' is tiny (f00d)"),
        ({"model": "big", "fingerprint": "c0de"}, "its model is big (c0de), that of cell 'main' is tiny (f00d)"),
        ({"rotary": "yarn:4", "fingerprint": "c0de"}, "its rotary scaling is yarn:4, that of cell 'main' is the model's own"),
        ({"rotary": "\n"}, "rotary frequencies are told with at most 200 printable characters, got 1"),
        ({"rotary": "y" * 201}, "rotary frequencies are told with at most 200 printable characters, got 201"),
        ({"kv_dtype": "fp8"}, "its dtype of KV is fp8, that of cell 'main' is the model's"),
        ({"kv_dtype": "f" * 21}, "a dtype of KV has at most 20 printable characters, got 21"),
        ({"elastic_tp": "4"}, "its --elastic-tp is 4, that of cell 'main' is off"),
        ({"elastic_tp": "4" * 17}, "--elastic-tp is told with at most 16 printable characters, got 17"),
        ({"tokenizer": "cafe"}, "its tokenizer is cafe, that of cell 'main' is beef"),
        ({"dtype": "float16"}, "its dtype is float16, that of cell 'main' is float32"),
        ({"block_size": 16}, "its block size is 16, that of cell 'main' is 4"),
        ({"layers": "as they are"}, "its way to run layers is as they are, that of cell 'main' is fused"),
        ({"chunk_tokens": 7}, "its chunk tokens is 7, that of cell 'main' is 64"),
        ({"vocab_size": 5001}, "its vocab size is 5001, that of cell 'main' is 5000"),
        ({"max_context": 10}, "its max context is 10, that of cell 'main' is 1000"),
        ({"device": "cuda:0"}, "its device is cuda:0, that of cell 'main' is cpu"),
        ({"cell_size": 3}, "its cell size is 3, that of cell 'main' is 2"),
        ({"protocol": 1}, "it speaks protocol 1, this gManager 4"),
        ({"cell": "\n"}, "a cell's name has 1 to 64 printable characters"),
        ({"cell_size": 0}, "cell size must be between 1 and 4096, got 0"),
        ({"rank": -1}, "RANK must not be negative, got -1"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"block_size": -4}, "block_size must be at least 1, got -4"),
    ],
    ids=str,
)
def test_refused_instances(changes: dict[str, Any], reason: str) -> None:
    """Each is told why, and is heard no more; the cell forms without it."""
    driver = Driver()
    driver.say(peer(0), register(rank=0, cell_size=2))
    in_spec = {name: changes[name] for name in changes if name in m.InstanceSpec.__struct_fields__}
    good = register(rank=1, cell_size=2)
    bad = msgspec.structs.replace(good, **{name: changes[name] for name in changes if name not in in_spec})
    bad = msgspec.structs.replace(bad, spec=msgspec.structs.replace(good.spec, **in_spec))
    assert driver.say(b"bad", bad) == [Send(b"bad", m.Refused(reason=reason))]
    assert driver.say(b"bad", good) == []
    assert dropped(driver) == 1
    assert driver.say(peer(1), good)[-1] == Send(peer(0), m.OpenStore(epoch=1))
    assert driver.wait(11, peer(0), peer(1)) == [Forget(b"bad")]


def test_a_complete_cell_takes_no_more_until_it_is_ready() -> None:
    driver = Driver()
    driver.say(peer(0), register(rank=0, cell_size=1))
    reason = "cell 'main' already has its 1 instances, and is forming"
    assert driver.say(b"late", register(rank=0, cell_size=1)) == [Send(b"late", m.Refused(reason=reason))]
    assert driver.say(b"late 2", register(rank=0, cell_size=1, cell="more"))[-1] == Send(b"late 2", m.OpenStore(epoch=2))
    driver.ready_cell(8, cell="third", epoch=3)
    assert driver.say(b"late 3", register(rank=0, cell_size=1, cell="third")) == [
        Send(b"late 3", m.Registered(lease_s=5.0, send_text=False)),
        Send(peer(0, 3), m.Suspend(epoch=3, reason="instance 1 of cell 'third' comes")),
    ]


@pytest.mark.parametrize("when", ["opening", "joining"])
@pytest.mark.parametrize("how", ["loss", "broken", "link"])
def test_a_loss_while_the_cell_forms_ends_it(when: str, how: str) -> None:
    """Nobody has anything to lose yet, and who starts it sees why at once."""
    driver = Driver()
    for rank in (0, 1):
        driver.say(peer(rank), register(rank=rank, cell_size=2))
    if when == "joining":
        driver.say(peer(0), m.StoreOpened(epoch=1, address="tcp://store:1"))
    if how == "loss":
        reason = "instance 1 of cell 'main' is lost: gone"
        actions = driver.handle(PeerWasLost(peer(1), "gone", driver.now))
    elif how == "broken":
        reason = "instance 0 of cell 'main' can't go on: no group"
        actions = driver.say(peer(0), m.EpochBroken(epoch=1, reason="no group"))
    else:
        reason = "instance 0 of cell 'main' lost its link to instance 1: closed"
        driver.say(peer(0), m.LinkLost(epoch=1, rank=1, reason="closed"))
        actions = driver.wait(1, peer(0), peer(1))
    assert Send(peer(0), m.EndEpoch(epoch=1, reason=reason)) in actions
    assert DropText(1) in actions
    assert driver.cluster.stats().cells == []


def test_a_cell_goes_on_forming_without_an_instance_that_left_early() -> None:
    driver = Driver()
    driver.say(peer(0), register(rank=0, cell_size=2), m.Text(assets=ASSETS))
    assert driver.handle(PeerWasLost(peer(0), "gone", 0.0)) == [DropText(1), Forget(peer(0))]  # that was all of it
    driver.say(peer(0, 2), register(rank=0, cell_size=2), m.Text(assets=ASSETS))
    driver.say(peer(1, 2), register(rank=0, cell_size=3))
    driver.say(peer(2, 2), register(rank=1, cell_size=2))
    assert driver.cluster.stats().epoch == 2


@pytest.mark.parametrize("stuck", ["opening", "joining", "tokenizer"])
def test_a_cell_that_does_not_get_ready_in_time_ends(stuck: str) -> None:
    driver = Driver(form_timeout_s=5.0)
    driver.say(peer(0), register(rank=0, cell_size=2))
    driver.say(peer(1), register(rank=1, cell_size=2))
    reason = "cell 'main' was not ready within 5 s: "
    reason += {"opening": "instances [0, 1] have", "joining": "instances [1] have", "tokenizer": "its tokenizer is"}[stuck]
    reason += " not loaded" if stuck == "tokenizer" else " not joined"
    if stuck != "opening":
        driver.say(peer(0), m.StoreOpened(epoch=1, address="tcp://store:1"), m.Joined(epoch=1))
    if stuck == "tokenizer":
        driver.say(peer(1), m.Joined(epoch=1))
    assert driver.wait(5, peer(0), peer(1)) == []
    end = m.EndEpoch(epoch=1, reason=reason)
    assert driver.wait(1, peer(0), peer(1)) == [Send(peer(0), end), Send(peer(1), end), DropText(1)]


def test_a_tokenizer_that_can_not_be_used_ends_the_cell() -> None:
    driver = Driver()
    driver.say(peer(0), register(rank=0, cell_size=1), m.Text(assets=ASSETS))
    end = m.EndEpoch(epoch=1, reason="the tokenizer of cell 'main' can't be used: no JSON")
    assert driver.handle(TextLoaded(1, 0.0, "no JSON")) == [Send(peer(0), end), DropText(1)]
    assert driver.handle(TextLoaded(1, 0.0)) == []


# --- one request


def test_a_request_from_its_submit_to_its_release() -> None:
    """10 tokens in blocks of 4 on 2 instances: 6 at home, 4 on the other, and one spare block on each."""
    driver = serving(8, 8)
    assert driver.say(CLIENT, submit("r", 10, spread=2)) == [reserve(0, 1, 3), reserve(1, 1, 2)]
    assert driver.say(peer(1), granted(1, 2, 6)) == []
    assert driver.say(peer(0), granted(1, 3, 5)) == [*regroup(1, [0, 1]), *admit(1, 1, [5] * 10, {0: 6, 1: 4})]
    assert driver.say(peer(0), beat(5, {1: 6})) == [pong(0)]
    assert driver.say(peer(1), beat(6, {1: 4})) == [pong(1)]
    assert driver.say(peer(0), outputs(1, 0, [11])) == [deliver(1, "r", 0, [11])]
    assert driver.say(peer(0), outputs(1, 1, [12, 13])) == [deliver(1, "r", 1, [12, 13])]
    stats = driver.cluster.stats()
    assert stats.requests["r"] == m.RequestStats(
        state="decode",
        cell="main",
        home=0,
        kv_tokens={0: 6, 1: 4},
        prompt_tokens=10,
        generated_tokens=3,
        home_moves=0,
        preemptions=0,
    )
    assert [(i.used_tokens, i.free_tokens, i.lent_tokens, i.borrowed_tokens) for i in stats.instances] == [
        (12, 20, 0, 4),
        (8, 24, 4, 0),
    ]
    held = [m.Share(rank=0, tokens=9), m.Share(rank=1, tokens=4)]
    assert driver.say(peer(0), outputs(1, 3, [2], finish_reason="stop", held=held)) == [
        deliver(1, "r", 3, [2], finish_reason="stop")
    ]
    assert not driver.cluster.is_idle, "its blocks are not free yet"
    assert driver.say(peer(0), m.Released(epoch=1, seq=1, generated=4)) == regroup(2, [0], [1])
    assert driver.cluster.is_idle
    assert request_stats(driver, "r").kv_tokens == {0: 9, 1: 4}


@pytest.mark.parametrize(
    ("tokens", "spread", "reserved", "shares"),
    [
        (20, "auto", {0: 6}, {0: 20}),
        (20, 1, {0: 6}, {0: 20}),
        (20, 2, {0: 4, 1: 3}, {0: 12, 1: 8}),
        (20, 3, {0: 3, 1: 3, 2: 2}, {0: 8, 1: 8, 2: 4}),
        (20, "all", {0: 3, 1: 3, 2: 2}, {0: 8, 1: 8, 2: 4}),
        (20, 99, {0: 3, 1: 3, 2: 2}, {0: 8, 1: 8, 2: 4}),
        (7, "all", {0: 2, 1: 2}, {0: 3, 1: 4}),  # no more participants than blocks
        (3, "all", {0: 2}, {0: 3}),
        (40, "auto", {0: 6, 1: 6}, {0: 20, 1: 20}),  # it doesn't fit on one
    ],
)
@pytest.mark.parametrize("said", ["by the request", "by the gManager"])
def test_spread(tokens: int, spread: Spread, reserved: dict[int, int], shares: dict[int, int], said: str) -> None:
    """Evenly to one block, over the least that memory needs and at least what was asked."""
    by_request = said == "by the request"
    driver = serving(8, 8, 8, spread="auto" if by_request else spread)
    asked = driver.say(CLIENT, submit("r", tokens, spread=spread if by_request else None))
    assert asked == [reserve(rank, 1, blocks) for rank, blocks in reserved.items()]
    party = regroup(1, sorted(shares)) if len(shares) > 1 else []
    assert driver.grant(asked) == [*party, *admit(1, 1, [5] * tokens, shares)]


def test_outputs_are_delivered_in_order_and_exactly_once() -> None:
    """Homes speak on different connections; what comes early waits for what precedes it."""
    driver = serving(8, 8)
    running(driver, "r", spread=2)
    driver.say(CLIENT, m.MoveHome(call=1, request_id="r", instance=1))
    driver.say(peer(1), granted(1, 1, 4))
    assert driver.say(peer(1), m.HomeMoved(epoch=1, seq=1, home=1)) == [done(1)]
    assert driver.say(peer(1), outputs(1, 2, [12])) == []
    assert driver.say(peer(1), outputs(1, 2, [12])) == []
    assert driver.say(peer(1), outputs(1, 3, [13], finish_reason="length")) == []
    assert driver.say(peer(1), m.Released(epoch=1, seq=1, generated=4)) == []
    assert driver.say(peer(0), outputs(1, 0, [10])) == [deliver(1, "r", 0, [10])]
    assert driver.say(peer(0), outputs(1, 0, [10])) == []
    assert driver.say(peer(0), outputs(1, 1, [11])) == [
        deliver(1, "r", 1, [11, 12, 13], finish_reason="length"),
        drop(1, 1),
        *regroup(2, [0], [1]),
    ]
    assert driver.say(peer(0), outputs(1, 1, [11])) == []
    assert dropped(driver) == 3
    assert driver.cluster.is_idle


def test_logprobs_come_to_who_asked_for_them() -> None:
    logprob = m.TokenLogprob(token_id=10, logprob=-0.5, rank=1)
    for asked, expected in ((0, [logprob]), (None, None)):
        driver = serving(8)
        running(driver, "r", logprobs=asked)
        assert driver.say(peer(0), outputs(1, 0, [10], logprobs=[logprob])) == [deliver(1, "r", 0, [10], logprobs=expected)]


def test_a_stop_string_ends_a_request() -> None:
    driver = serving(8)
    running(driver, "r", stop=["x"])
    stops: dict[str, Any] = {"stop_strings": ("x",)}
    assert driver.say(peer(0), outputs(1, 0, [10, 11, 12])) == [deliver(1, "r", 0, [10, 11, 12], **stops)]
    assert driver.handle(StopFound(1, 2, 0.0)) == [deliver(1, "r", 2, [], finish_reason="stop", **stops), cancel(0, 1)]
    assert driver.say(peer(0), outputs(1, 3, [13])) == []  # the row that was under way
    assert driver.say(peer(0), m.Released(epoch=1, seq=1, generated=4)) == []
    assert driver.handle(StopFound(1, 2, 0.0)) == []
    stats = request_stats(driver, "r")
    assert (stats.finish_reason, stats.generated_tokens) == ("stop", 2)


def test_texts_are_encoded_by_the_shell() -> None:
    driver = serving(8)
    said = m.Submit(request_id="r", params=m.SamplingParams(), text="hello")
    assert driver.say(CLIENT, said) == [Encode(1, 1, said, CHAIN_SEED, 4)]
    assert driver.handle(Encoded(1, 0.0, token_ids=m.pack_tokens([7, 8]))) == [reserve(0, 1, 2)]
    assert driver.handle(Encoded(1, 0.0, token_ids=m.pack_tokens([7, 8]))) == []
    assert driver.say(peer(0), granted(1, 2, 6)) == admit(1, 1, [7, 8], {0: 2})


def test_which_cell_serves_a_request() -> None:
    """One that ever can; the one where fewest wait; then the one with most free memory."""
    driver = Driver()
    driver.ready_cell(4, cell="a", epoch=1)
    driver.ready_cell(19, cell="b", epoch=2)
    driver.say(CLIENT, HELLO)

    def at_b(seq: int, blocks: int) -> Send:
        return Send(peer(0, 2), m.Reserve(epoch=2, seq=seq, blocks=blocks))

    assert driver.say(CLIENT, submit("never fits a", 60, max_tokens=1)) == [at_b(1, 16)]
    assert driver.say(CLIENT, submit("a has 4 blocks, b 3", 8, max_tokens=1)) == [reserve(0, 1, 3)]
    assert driver.say(CLIENT, submit("b has 3 blocks, a 1", 7, max_tokens=1)) == []
    assert driver.say(CLIENT, submit("one waits for b, none for a", 4, max_tokens=1)) == []
    assert driver.say(peer(0, 2), m.Granted(epoch=2, seq=1, blocks=16, free_blocks=3))[1:] == [at_b(2, 3)]
    assert driver.say(peer(0), granted(1, 3, 1)) == admit(1, 2, [5] * 8, {0: 8}, max_tokens=1)
    assert driver.say(peer(0), beat(4)) == [pong(0), reserve(0, 2, 2)]


def test_text_goes_to_a_cell_that_can_read_it() -> None:
    driver = Driver()
    mute = msgspec.structs.replace(ASSETS, tokenizer_json=None)
    driver.ready_cell(19, cell="a", assets=mute)
    driver.ready_cell(4, cell="b", epoch=2)
    driver.say(CLIENT, HELLO)
    said = m.Submit(request_id="r", params=m.SamplingParams(), text="hello")
    assert driver.say(CLIENT, said) == [Encode(2, 1, said, CHAIN_SEED, 4)]
    assert driver.say(CLIENT, submit("tokens", 4, max_tokens=1)) == [reserve(0, 1, 2)]


# --- requests that can't be served


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"text": "hello"}, "prompt"),
        ({"messages": [m.ChatMessage(role="user", content="hello")]}, "messages"),
        ({"params": m.SamplingParams(stop="x")}, "stop"),
        ({"params": m.SamplingParams(bad_words=["x"])}, "bad_words"),
        ({"params": m.SamplingParams(structured_outputs=m.StructuredOutputsParams(regex="x"))}, "structured_outputs"),
    ],
)
def test_text_for_a_model_without_a_tokenizer(given: dict[str, Any], field: str) -> None:
    driver = Driver()
    driver.ready_cell(8, assets=msgspec.structs.replace(ASSETS, tokenizer_json=None))
    driver.say(CLIENT, HELLO)
    prompt = {} if "text" in given or "messages" in given else {"token_ids": m.pack_tokens([5])}
    (answer,) = driver.say(CLIENT, m.Submit(**({"request_id": "r", "params": m.SamplingParams()} | prompt | given)))
    assert isinstance(answer, Deliver)
    assert (answer.error, answer.refusal) == (f"{field}: this model has no tokenizer: give token ids", "invalid")
    assert driver.cluster.is_idle


@pytest.mark.parametrize(
    ("blocks", "given", "reason", "error"),
    [
        (
            [8, 8],
            submit("r", 900, max_tokens=101),
            "too_long",
            "prompt of 900 + max_tokens of 101 = 1,001 tokens; the model takes at most 1,000",
        ),
        (
            [8, 8],
            submit("r", 41, max_tokens=16),
            "never",
            "prompt of 41 + max_tokens of 16 = 57 tokens: needs 57 tokens of KV; cell 'main' holds 64 (2 instances x 32), "
            "less one spare block of 4 on each",
        ),
        (
            [8, 5],
            submit("r", 41, max_tokens=4),
            "never",
            "prompt of 41 + max_tokens of 4 = 45 tokens: needs 45 tokens of KV; cell 'main' holds 52 (2 instances: 32 + 20), "
            "less one spare block of 4 on each",
        ),
        ([8, 8], submit("r", 999, max_tokens=None), "never", None),
        ([8, 8], submit("r", 1000, max_tokens=None), "too_long", None),
        (
            [8, 8],
            submit("r", prompt=[1, 4999, 5000, 1]),
            "invalid",
            "token id 5000 at position 2 is out of range: the model has 5,000 tokens",
        ),
        (
            [8, 8],
            submit("r", prompt=[2**32 - 1]),
            "invalid",
            "token id 4294967295 at position 0 is out of range: the model has 5,000 tokens",
        ),
    ],
)
def test_requests_that_can_never_be_served(blocks: list[int], given: m.Submit, reason: str, error: str | None) -> None:
    driver = serving(*blocks)
    (answer,) = driver.say(CLIENT, given)
    assert isinstance(answer, Deliver)
    assert answer.error and error in (None, answer.error)
    assert [answer] == refused("r", answer.error, number=1, cell=1, refusal=reason)
    assert driver.cluster.is_idle
    assert driver.say(CLIENT, submit("r", 40, max_tokens=4)) != [], "the largest that fits, and the id is free again"


def test_a_prompt_alone_needs_no_room_beside_it() -> None:
    """The token that ends its sequence is nobody's, whatever it is."""
    driver = serving(500)
    running(driver, "r", 1000, max_tokens=0, logprobs=0)
    end = outputs(1, 0, [2], finish_reason="stop", logprobs=[m.TokenLogprob(token_id=2, logprob=-1.0, rank=1)])
    assert driver.say(peer(0), end) == [deliver(1, "r", 0, [], logprobs=[], finish_reason="length")]
    driver.say(peer(0), m.Released(epoch=1, seq=1, generated=1))
    assert driver.cluster.is_idle
    assert request_stats(driver, "r").generated_tokens == 0
    (answer,) = driver.say(CLIENT, submit("s", 1001, max_tokens=0))
    error = "prompt of 1,001 + max_tokens of 0 = 1,001 tokens; the model takes at most 1,000"
    assert [answer] == refused("s", error, number=2, cell=1, refusal="too_long")


def test_the_largest_requests_that_fit() -> None:
    for blocks, tokens, max_tokens in (([8, 8], 40, 16), ([8, 5], 43, 1), ([500], 984, 16)):
        driver = serving(*blocks)
        running(driver, "r", tokens, max_tokens=max_tokens)


@pytest.mark.parametrize(("tokens", "room"), [(5, 51), (55, 1)])
def test_as_many_tokens_as_there_is_room_for(tokens: int, room: int) -> None:
    """Of two instances with 32 tokens each, two blocks of 4 are spare."""
    driver = serving(8, 8)
    actions = driver.grant(driver.say(CLIENT, submit("r", tokens, max_tokens=None)))
    admits = [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, m.Admit)]
    assert {admit.params.max_tokens for admit in admits} == {room}


def test_a_model_is_answered_by_who_serves_it() -> None:
    driver = Driver()
    driver.say(CLIENT, HELLO)
    assert driver.say(CLIENT, submit("early", 4, model="tiny")) == []
    driver.ready_cell(8)
    error = "no model 'large' is served; there is tiny"
    assert driver.say(CLIENT, submit("r", 4, model="large")) == refused("r", error, refusal="model")
    assert request_stats(driver, "early").state == "reserving"
    driver.say(peer(0, 2), register(rank=0, cell_size=1, cell="b", model="large"))
    assert driver.say(CLIENT, submit("r", 4, model="large")) == [], "it waits for the cell that forms"
    error = "no instances are ready to serve"
    now = submit("s", 4, model="large", wait_for_cell=False)
    assert driver.say(CLIENT, now) == refused("s", error, refusal="not_ready")
    assert driver.say(CLIENT, submit("t", 4, model="tiny", wait_for_cell=False)) == []


def test_a_model_with_several_names() -> None:
    """What a cell calls its model goes before another name of another's."""
    driver = Driver()
    driver.say(CLIENT, HELLO)
    driver.ready_cell(8, other_names=["small", "wee"])
    for name in ("wee", "small", "tiny"):
        (asked,) = driver.say(CLIENT, submit(name, 4, model=name, max_tokens=1))
        assert isinstance(asked, Send)
        assert asked.peer == peer(0)
        driver.say(CLIENT, m.Abort(call=1, request_id=name))
    assert driver.cluster.stats().cells[0].other_names == ["small", "wee"]
    driver.ready_cell(8, cell="b", epoch=2, model="wee")
    (asked,) = driver.say(CLIENT, submit("r", 4, model="wee", max_tokens=1))
    assert isinstance(asked, Send)
    assert asked.peer == peer(0, 2)


def test_a_full_queue_takes_no_more() -> None:
    driver = serving(8, max_queue=2)
    running(driver, "runs", 12)
    for name in ("a", "b"):
        driver.say(CLIENT, submit(name, 12))
    error = "2 requests are waiting, as many as may (max-queue)"
    assert driver.say(CLIENT, submit("c", 12)) == refused("c", error, refusal="full")
    driver.say(CLIENT, m.Abort(call=1, request_id="a"))
    driver.say(CLIENT, submit("c", 12))
    assert request_stats(driver, "c").state == "queued"


def test_an_instance_has_no_more_homes_than_it_decodes_at_once() -> None:
    """One too many would hold its memory and give one token: it waits, and takes the place of the first that ends."""
    driver = Driver()
    driver.ready_cell(40, 9, decode_rows=2)
    driver.say(CLIENT, HELLO)
    for name in ("a", "b"):
        running(driver, name, 8, generated=1)
    assert [request_stats(driver, name).home for name in "ab"] == [0, 0]
    running(driver, "c", 8, generated=1)
    assert request_stats(driver, "c").home == 1, "though 0 has more room"
    running(driver, "d", 8, generated=1)
    assert driver.grant(driver.say(CLIENT, submit("e", 8))) == []
    assert request_stats(driver, "e").state == "queued"
    moved = driver.say(CLIENT, m.MoveHome(call=9, request_id="c", instance=0))
    assert moved == [Send(CLIENT, m.CallFailed(call=9, reason="instance 0 decodes 2 sequences, as many as it can"))]
    driver.say(CLIENT, m.Abort(call=1, request_id="a"))
    driver.grant(driver.say(peer(0), m.Released(epoch=1, seq=1, generated=1)))
    assert request_stats(driver, "e").home == 0


def test_text_assets_are_those_of_a_ready_cell() -> None:
    driver = Driver()
    driver.say(CLIENT, HELLO)
    failed_call = m.CallFailed(call=1, reason="no cell is ready")
    assert driver.say(CLIENT, m.GetText(call=1)) == [Send(CLIENT, failed_call)]
    driver.ready_cell(8)
    for name in (None, "main"):
        reply = m.TextReply(call=2, assets=ASSETS)
        assert driver.say(CLIENT, m.GetText(call=2, cell=name)) == [Send(CLIENT, reply)]
    failed_call = m.CallFailed(call=3, reason="no cell 'other' is ready")
    assert driver.say(CLIENT, m.GetText(call=3, cell="other")) == [Send(CLIENT, failed_call)]


@pytest.mark.parametrize("is_ready", [False, True])
@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"token_ids": b""}, "the prompt is empty"),
        ({"text": ""}, "the prompt is empty"),
        ({"messages": []}, "the prompt is empty"),
        ({"token_ids": b"123"}, "token ids must be a multiple of 4 bytes long, got 3"),
    ],
    ids=str,
)
def test_prompts_that_are_none(is_ready: bool, given: dict[str, Any], error: str) -> None:
    driver = serving(8) if is_ready else Driver()
    driver.say(CLIENT, HELLO)
    assert driver.say(CLIENT, m.Submit(request_id="r", params=m.SamplingParams(), **given)) == refused("r", error)


@pytest.mark.parametrize(
    ("encoded", "error"),
    [
        ({}, "the prompt is empty: it has no tokens"),
        ({"error": "no template"}, "no template"),
        ({"error": "it died", "refusal": "not_ready"}, "it died"),
    ],
    ids=str,
)
def test_texts_that_give_no_tokens(encoded: dict[str, Any], error: str) -> None:
    driver = serving(8)
    driver.say(CLIENT, m.Submit(request_id="r", params=m.SamplingParams(), text="\u200b"))
    reason = encoded.get("refusal", "invalid")
    assert driver.handle(Encoded(1, 0.0, **encoded)) == refused("r", error, refusal=reason, number=1, cell=1)
    assert driver.logs[-1].fields == {"request": "r", "reason": reason}, "the error may quote the text"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (math.nan, math.inf, -0.1)],
        *[("top_p", value) for value in (math.nan, 0.0, -0.5, 1.1)],
        *[("max_tokens", -1), ("top_k", -2), ("seed", -1), ("logprobs", -1), ("stop_token_ids", [-1])],
    ],
)
def test_sampling_values_that_make_no_sense_are_never_built(name: str, value: Any) -> None:
    """No event can hold them: neither a caller nor the wire can make such a Submit."""
    with pytest.raises(ValueError, match=f"^{name} must .* got "):
        submit("r", **{name: value})
    as_sent = msgspec.to_builtins(submit("r"), builtin_types=(bytes,))
    as_sent["params"][name] = value
    with pytest.raises(msgspec.ValidationError, match=f"^{name} must .* got "):
        msgspec.convert(as_sent, m.Submit, builtin_types=(bytes,))


@pytest.mark.parametrize("is_ready", [False, True])
def test_an_id_is_taken_until_its_request_has_ended(is_ready: bool) -> None:
    driver = serving(8) if is_ready else Driver()
    driver.say(CLIENT, HELLO)
    driver.say(OTHER, HELLO)
    driver.say(CLIENT, submit("r"))
    error = "request id 'r' is in use by another request, which has not ended"
    assert driver.say(CLIENT, submit("r", 9)) == refused("r", error)
    assert driver.say(OTHER, submit("r", top_k=3)) == refused("r", error, peer=OTHER)
    driver.say(CLIENT, m.Abort(call=1, request_id="r"))
    again = driver.say(OTHER, submit("r"))
    assert again == ([reserve(0, 2, 3)] if is_ready else [])
    assert request_stats(driver, "r").state == ("reserving" if is_ready else "queued")


# --- waiting


def waits_in(place: str) -> tuple[Driver, list[Action]]:
    """A request "w" that waits; and what its end gives back."""
    if place == "for a cell":
        driver = Driver(max_queue_wait_s=5.0)
        driver.say(CLIENT, HELLO, submit("w"))
        return driver, []
    driver = serving(8, 8, max_queue_wait_s=5.0)
    if place == "for the tokenizer":
        driver.say(CLIENT, m.Submit(request_id="w", params=m.SamplingParams(), text="hello"))
        return driver, []
    if place == "for a grant":
        driver.say(CLIENT, submit("w", spread=2))
        driver.say(peer(1), granted(1, 2, 6))
        return driver, [drop(0, 1), drop(1, 1)]
    running(driver, "first", 40)
    assert driver.say(CLIENT, submit("w", 40)) == []
    return driver, []


PLACES = {
    "for a cell": "waited 5 s for a ready cell (max-queue-wait)",
    "for the tokenizer": "waited 5 s for the tokenizer (max-queue-wait)",
    "for a grant": "waited 5 s for free memory (max-queue-wait)",
    "for memory": "waited 5 s for free memory (max-queue-wait)",
}


@pytest.mark.parametrize("place", PLACES)
def test_nobody_waits_for_ever(place: str) -> None:
    driver, given_back = waits_in(place)
    instances = [] if place == "for a cell" else [peer(0), peer(1)]
    assert driver.wait(5, CLIENT, *instances) == []
    number, epoch = (2 if place == "for memory" else 1), (0 if place == "for a cell" else 1)
    answer = failed(number, "w", PLACES[place], cell=epoch)
    assert driver.wait(1, CLIENT, *instances) == [answer, *given_back]
    assert driver.wait(9, CLIENT, *instances) == []


@pytest.mark.parametrize("place", PLACES)
def test_who_waits_can_be_aborted_but_not_moved(place: str) -> None:
    driver, given_back = waits_in(place)
    state = {"for a cell": "it waits for a cell", "for a grant": "it is reserving"}.get(place, "it is queued")
    assert driver.say(CLIENT, m.MoveHome(call=1, request_id="w", instance=0)) == [
        call_failed(1, f"request 'w' has no home now: {state}")
    ]
    number, epoch = (2 if place == "for memory" else 1), (0 if place == "for a cell" else 1)
    answer = deliver(number, "w", 0, [], finish_reason="abort", cell=epoch)
    assert driver.say(CLIENT, m.Abort(call=2, request_id="w")) == [answer, *given_back, done(2)]
    if place == "for a grant":
        assert driver.say(peer(0), granted(1, 2, 6)) == []  # it came too late: the Drop behind its Reserve undoes it
        assert driver.say(CLIENT, submit("next", 28)) == [reserve(0, 2, 8)]
    assert driver.handle(Encoded(1, 0.0, token_ids=m.pack_tokens([1]))) == []


@pytest.mark.parametrize("tells", [True, False])
def test_who_is_not_reached_is_lost_unless_its_end_says_why(tells: bool) -> None:
    """What one instance hears of another's end may overtake that end's own words."""
    driver = serving(10, 10)
    running(driver, "r")
    lost = m.LinkLost(epoch=1, rank=1, reason="it closed the connection")
    assert driver.say(peer(0), lost, lost) == []
    if tells:
        actions = driver.say(peer(1), m.Leave(reason="SIGTERM", failed=False))
        reason = "instance 1 of cell 'main' left: SIGTERM"
    else:
        actions = driver.wait(1, peer(0), peer(1), CLIENT)
        reason = "instance 0 of cell 'main' lost its link to instance 1: it closed the connection"
    assert actions[0] == Send(peer(0), m.Suspend(epoch=1, reason=reason))
    assert (Send(peer(1), m.Expelled(reason=reason)) in actions) == (not tells), "it may still run"
    assert not [a for a in actions if isinstance(a, Deliver)], "its requests go on"


def test_a_link_to_nobody_is_nothing() -> None:
    driver = serving(10, 10)
    for rank in (0, 2, -1):
        driver.say(peer(0), m.LinkLost(epoch=1, rank=rank, reason="?"))
    assert driver.wait(3, peer(0), peer(1), CLIENT) == []


def test_prompts_that_wait_are_bounded_in_bytes() -> None:
    """However few they are; and one alone is never refused for that."""
    driver = Driver(max_queue_bytes=400)
    driver.say(CLIENT, HELLO)
    assert driver.say(CLIENT, submit("large", 150)) == []
    error = "prompts of 600 bytes are waiting, and this one has 4: 400 may wait together (max-queue-bytes)"
    assert driver.say(CLIENT, submit("more", 1)) == refused("more", error, refusal="full")
    driver.say(CLIENT, m.Abort(call=1, request_id="large"))
    assert driver.say(CLIENT, submit("half", 50), submit("other half", 50)) == []
    driver.ready_cell(200)  # one of them begins to be reserved; both still wait
    driver.say(CLIENT, m.Submit(request_id="text", params=m.SamplingParams(), text="x" * 100))
    assert "text" not in driver.cluster.stats().requests
    driver.grant([Send(peer(0), m.Reserve(epoch=1, seq=1, blocks=14))])
    driver.say(CLIENT, m.Submit(request_id="text", params=m.SamplingParams(), text="x" * 100))
    assert driver.cluster.stats().requests["text"].state == "queued"
    number = next(r.number for r in driver.cluster._requests.live() if r.id == "text")
    driver.handle(Encoded(number, driver.now, token_ids=m.pack_tokens([5] * 3)))
    assert driver.cluster._requests.waiting_bytes == 200 + 12, "its text is not kept beside its tokens"


@pytest.mark.parametrize("heard", ["nothing", "a token", "KV"])
def test_a_running_request_that_stands_still_fails(heard: str) -> None:
    driver = serving(10, max_stall_s=5)
    running(driver, "r", generated=1)
    driver.wait(4, peer(0), CLIENT)
    if heard == "a token":
        driver.say(peer(0), outputs(1, 1, [9]))
    elif heard == "KV":
        driver.say(peer(0), beat(7, {1: 9}))
    actions = driver.wait(3, peer(0), CLIENT)
    if heard != "nothing":
        assert actions == []
        actions = driver.wait(3, peer(0), CLIENT)
    error = "instance 0 of cell 'main' has not gone on with the request for 5 s (max-stall)"
    assert [a.error for a in actions if isinstance(a, Deliver)] == [error]
    assert Send(peer(0), m.Cancel(epoch=1, seq=1)) in actions


def test_long_prompts_are_looked_through_by_the_shell() -> None:
    """It takes too long for everybody else to wait: the highest token id comes with the answer."""
    driver = serving(8000)
    short, long = [5] * (SCANNED_AT_ONCE - 1) + [5000], [5] * SCANNED_AT_ONCE + [5000]
    error = "token id 5000 at position {} is out of range: the model has 5,000 tokens"
    at_once = driver.say(CLIENT, submit("short", prompt=short, max_tokens=1))
    assert at_once == refused("short", error.format(SCANNED_AT_ONCE - 1), number=1, cell=1)
    (asked,) = driver.say(CLIENT, submit("long", prompt=long, max_tokens=1))
    assert isinstance(asked, Encode)
    encoded = Encoded(2, 0.0, token_ids=m.pack_tokens(long), highest=5000)
    assert driver.handle(encoded) == refused("long", error.format(SCANNED_AT_ONCE), number=2, cell=1)


def test_a_prompt_goes_to_the_cell_that_has_its_tokens() -> None:
    """Though more wait there, or it has less memory."""
    driver = Driver()
    driver.ready_cell(50, cell="few", epoch=1, vocab_size=100)
    driver.ready_cell(5, cell="many", epoch=2)
    driver.say(CLIENT, HELLO)
    (asked,) = driver.say(CLIENT, submit("r", prompt=[5, 200], max_tokens=1))
    assert asked == Send(peer(0, 2), m.Reserve(epoch=2, seq=1, blocks=2))
