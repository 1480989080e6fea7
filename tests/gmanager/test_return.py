"""A cell whose gManager was lost returns to the next: what is said in which order, and what becomes of tokens and KV.

As test_membership.py: blocks of 4 tokens, literal events in, literal actions out. Requests have the numbers that they had
before.
"""

from typing import Any

import msgspec
import pytest

from gmanager.cluster.cell import RETURN_GRACE_S
from gmanager.cluster.events import (
    Action,
    Deliver,
    DropText,
    Encoded,
    Forget,
    LoadText,
    PeerWasLost,
    Restored,
    Send,
    TextLoaded,
)
from gmanager.wire import messages as m
from tests.gmanager.cluster_support import (
    ASSETS,
    CLIENT,
    HELLO,
    Driver,
    Runs,
    beat,
    deliver,
    failed,
    outputs,
    peer,
    register,
    request_stats,
    running,
    sequence_params,
    serving,
    submit,
)

NEW = b"new"
EPOCH = 7
"""In which the gManager before was lost."""
WHY = "the gManager of cell 'main' was lost, and another has come"


def back(rank: int, size: int = 2, epoch: int = EPOCH, identity: int = 0, quorum: int = 2) -> m.Register:
    """A registration of who had that rank and id, in an epoch of so many. `identity`: of the gManager before."""
    former = m.Former(term=0, identity=identity, epoch=epoch, id=rank, size=size)
    return msgspec.structs.replace(register(rank=rank, cell_size=quorum), former=former)


def kept(free: int, shards: dict[int, tuple[int, Runs]], *unheard: m.Unheard, epoch: int = EPOCH) -> m.Kept:
    """`shards`: sequence -> number of its request, and runs."""
    parts = [m.KeptShard(seq=seq, runs=runs, request=request) for seq, (request, runs) in shards.items()]
    return m.Kept(epoch=epoch, free_blocks=free, shards=parts, unheard=list(unheard))


def suspend(rank: int) -> Send:
    return Send(peer(rank), m.Suspend(epoch=EPOCH, reason=WHY))


def waiting(*names: str, **more: Any) -> Driver:
    """A gManager that has requests and no cell: as restored ones to which their client has attached."""
    driver = Driver()
    driver.say(CLIENT, HELLO, *(submit(name, 10, **more) for name in names))
    for request in driver.cluster._requests.live():
        request.is_restored = True
    return driver


def returning(driver: Driver, *kept_by: m.Kept, identity: int = 0) -> list[Action]:
    """All members come back and end their epoch; what the last Kept brings about."""
    size = len(kept_by)
    for rank in range(size):
        driver.say(peer(rank), back(rank, size, identity=identity))
    driver.say(peer(0), m.Text(assets=ASSETS))
    told = driver.handle(TextLoaded(1, driver.now))
    texts = [action for action in told if isinstance(action, Deliver)]
    assert told == [*(suspend(rank) for rank in range(size)), *texts]
    assert all(text.peer is None for text in texts), "text of restored requests, which nobody has attached to"
    answers = [driver.say(peer(rank), message) for rank, message in enumerate(kept_by)]
    driver.free |= {peer(rank): message.free_blocks for rank, message in enumerate(kept_by)}
    return answers[-1]


def admits(actions: list[Action]) -> list[m.Admit]:
    return [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, m.Admit)]


def test_from_the_first_word_to_the_last() -> None:
    """10 prompt tokens lie 6 and 4; of 4 generated tokens the client has none, each was home for two."""
    driver = waiting("r")
    assert driver.say(peer(1), back(1)) == [Send(peer(1), m.Registered(lease_s=5.0, send_text=True))]
    assert driver.say(peer(1), m.Text(assets=ASSETS)) == [LoadText(1, ASSETS)]
    assert driver.handle(TextLoaded(1, 0.0)) == []
    assert driver.say(peer(0), back(0)) == [
        Send(peer(0), m.Registered(lease_s=5.0, send_text=False)),
        suspend(0),
        suspend(1),
    ]
    assert driver.cluster.stats().cells[0].state == "changing"
    late = m.Unheard(request=1, index=2, token_ids=[9, 9])
    early = m.Unheard(request=1, index=0, token_ids=[9, 9])
    assert driver.say(peer(0), kept(5, {41: (1, [[(0, 6), (10, 13)]])}, late)) == []
    assert driver.say(peer(1), kept(7, {41: (0, [[(6, 10)]])}, early)) == [
        deliver(1, "r", 0, [9, 9]),
        deliver(1, "r", 2, [9, 9]),
        Send(peer(0), m.OpenStore(epoch=EPOCH + 1)),
    ]
    joins = driver.say(peer(0), m.StoreOpened(epoch=EPOCH + 1, address="tcp://store:1"))
    told = [(a.peer, a.message.id, a.message.keep) for a in joins if isinstance(a, Send) and isinstance(a.message, m.JoinEpoch)]
    assert told == [(peer(0), 0, [41]), (peer(1), 1, [41])]
    driver.free |= {peer(0): 5, peer(1): 7}
    driver.say(peer(0), m.Joined(epoch=EPOCH + 1))
    (admit, _) = admits(driver.grant(driver.say(peer(1), m.Joined(epoch=EPOCH + 1))))
    assert admit == m.Admit(
        epoch=EPOCH + 1,
        seq=41,
        arrival=1,
        token_ids=m.pack_tokens([5] * 10 + [9] * 4),
        shares=[m.Share(rank=0, tokens=1)],
        params=sequence_params(12, generated=4),
        kept=[m.KeptPart(rank=0, runs=[[(0, 6), (10, 13)]]), m.KeptPart(rank=1, runs=[[(6, 10)]])],
    )
    # new sequences have numbers that none of those kept has
    again = driver.grant(driver.say(CLIENT, submit("new", 4)))
    assert {each.seq for each in admits(again)} == {42}


def test_what_was_delivered_is_not_delivered_again() -> None:
    """The instance doesn't know which of its last messages were taken in."""
    driver = waiting("r")
    both = [m.Unheard(request=1, index=0, token_ids=[9, 9]), m.Unheard(request=1, index=1, token_ids=[9, 9])]
    assert returning(driver, kept(5, {3: (1, [[(0, 12)]])}, *both))[:2] == [deliver(1, "r", 0, [9, 9]), deliver(1, "r", 2, [9])]


def test_a_new_request_of_the_same_number_is_another_one() -> None:
    """Without a journal, or with another one: what an instance has of the former first request is nobody's any more."""
    driver = Driver()
    driver.cluster.restore([restored(1)], 0.0)
    tokens = m.Unheard(request=1, index=0, token_ids=[9, 9])
    told = returning(driver, kept(5, {3: (1, [[(0, 12)]])}, tokens), identity=5)
    assert told == [Send(peer(0), m.OpenStore(epoch=EPOCH + 1))]
    assert (request_stats(driver, "r1").kv_tokens, request_stats(driver, "r1").generated_tokens) == ({}, 0)


def test_who_has_served_a_later_gmanager_of_another_journal_is_welcome() -> None:
    driver = Driver()
    later = msgspec.structs.replace(
        register(rank=0, cell_size=2), former=m.Former(term=2, identity=5, epoch=EPOCH, id=0, size=2)
    )
    assert driver.say(peer(0), later) == [Send(peer(0), m.Registered(lease_s=5.0, send_text=True))]


def test_one_that_returns_twice_is_one() -> None:
    """The other one is still waited for."""
    driver = waiting("r")
    driver.say(peer(0), back(0), m.Text(assets=ASSETS))
    driver.handle(TextLoaded(1, 0.0))
    driver.say(b"one", back(2, 3))
    driver.handle(PeerWasLost(b"one", "gone", 0.0))
    assert driver.say(b"again", back(2, 3))[1:] == []
    assert driver.say(peer(1), back(1, 3))[1:] == [suspend(0), suspend(1), Send(b"again", suspend(0).message)]


def test_what_does_not_follow_is_generated_again() -> None:
    driver = waiting("r")
    far = m.Unheard(request=1, index=3, token_ids=[9])
    actions = returning(driver, kept(5, {3: (1, [[(0, 12)]])}, far))
    assert actions == [Send(peer(0), m.OpenStore(epoch=EPOCH + 1))]
    assert request_stats(driver, "r").kv_tokens == {0: 9}


def test_a_request_that_ended_meanwhile() -> None:
    driver = waiting("r", "other")
    last = m.Unheard(request=1, index=0, token_ids=[9, 2], finish_reason="stop")
    assert returning(driver, kept(5, {3: (1, [[(0, 11)]]), 4: (2, [[(0, 10)]])}, last)) == [
        deliver(1, "r", 0, [9, 2], finish_reason="stop"),
        Send(peer(0), m.OpenStore(epoch=EPOCH + 1)),
    ]
    joins = driver.say(peer(0), m.StoreOpened(epoch=EPOCH + 1, address="tcp://store:1"))
    assert [a.message.keep for a in joins if isinstance(a, Send) and isinstance(a.message, m.JoinEpoch)] == [[4]]


def test_requests_that_nobody_knows_leave_nothing() -> None:
    driver = Driver()
    unknown = m.Unheard(request=5, index=0, token_ids=[9])
    assert returning(driver, kept(5, {3: (5, [[(0, 11)]])}, unknown)) == [Send(peer(0), m.OpenStore(epoch=EPOCH + 1))]
    joins = driver.say(peer(0), m.StoreOpened(epoch=EPOCH + 1, address="tcp://store:1"))
    assert [a.message.keep for a in joins if isinstance(a, Send) and isinstance(a.message, m.JoinEpoch)] == [[]]


def test_a_prompt_that_is_not_scored_is_computed_anew() -> None:
    """Its log-probabilities went to a gManager that is gone."""
    driver = waiting("r", prompt_logprobs=0)
    tokens = m.Unheard(request=1, index=0, token_ids=[9])
    assert returning(driver, kept(5, {3: (1, [[(0, 10)]])}, tokens)) == [Send(peer(0), m.OpenStore(epoch=EPOCH + 1))]
    assert request_stats(driver, "r").kv_tokens == {}


def test_only_a_prompt_was_wanted() -> None:
    """The one token that ends its sequence is nobody's."""
    driver = waiting("r", max_tokens=0)
    last = m.Unheard(request=1, index=0, token_ids=[9], finish_reason="length")
    assert returning(driver, kept(5, {3: (1, [[(0, 10)]])}, last))[0] == deliver(1, "r", 0, [], finish_reason="length")


def test_who_does_not_come_back_is_not_waited_for() -> None:
    driver = waiting("r")
    driver.say(peer(0), back(0), m.Text(assets=ASSETS))
    assert driver.handle(TextLoaded(1, 0.0)) == []
    assert suspend(0) in driver.wait(int(RETURN_GRACE_S) + 1, peer(0), CLIENT)
    assert driver.say(peer(0), kept(5, {3: (1, [[(0, 6)]])})) == [Send(peer(0), m.OpenStore(epoch=EPOCH + 1))]
    assert request_stats(driver, "r").kv_tokens == {0: 6}
    # who comes too late comes as a new one
    reason = "cell 'main' has gone on without this instance"
    assert driver.say(peer(1), back(1)) == [Send(peer(1), m.Expelled(reason=reason))]
    assert driver.say(peer(1), register(rank=1, cell_size=2)) == [
        Send(peer(1), m.Registered(lease_s=5.0, send_text=False)),
    ]


def test_a_link_that_is_lost_while_others_return_is_no_reason_to_expel_anybody() -> None:
    """It is told by a rank of the epoch that is about to end, and those that are back have others: it was the third that had
    to go for the second, and with that gone there was no such rank at all."""
    driver = waiting("r")
    driver.say(peer(0), back(0, 3, quorum=3), m.Text(assets=ASSETS))
    driver.say(peer(2), back(2, 3, quorum=3))
    driver.say(peer(0), m.LinkLost(epoch=EPOCH, rank=1, reason="it is dead"))
    assert driver.wait(2, peer(0), peer(2), CLIENT) == []
    driver.handle(PeerWasLost(peer(2), "it is dead", driver.now))
    assert driver.wait(1, peer(0), CLIENT) == []


@pytest.mark.parametrize("who", ["a member", "a joiner"])
def test_one_that_dies_again_while_others_return(who: str) -> None:
    driver = waiting("r")
    driver.say(peer(0), back(0, 3 if who == "a member" else 2), m.Text(assets=ASSETS))
    driver.handle(TextLoaded(1, 0.0))
    if who == "a joiner":
        driver.say(b"fresh", register(rank=0, cell_size=2))
        driver.handle(PeerWasLost(b"fresh", "gone", 0.0))
        assert driver.say(peer(1), back(1))[1:] == [suspend(0), suspend(1)]
    else:
        driver.say(b"third", back(2, 3))
        actions = driver.handle(PeerWasLost(b"third", "gone", 0.0))
        assert actions[:-1] == []
        assert driver.say(peer(1), back(1, 3))[1:] == [suspend(0), suspend(1)]


def test_new_instances_take_part_after_it() -> None:
    """They came first; ids of those that were there stay."""
    driver = waiting("r")
    driver.say(b"fresh", register(rank=0, cell_size=2), m.Text(assets=ASSETS))
    driver.say(b"fresh too", register(rank=1, cell_size=3))  # refused: another cell size
    driver.handle(TextLoaded(1, 0.0))
    assert driver.say(peer(0), back(0, 1))[1:] == [suspend(0)]
    assert driver.say(peer(0), kept(5, {3: (1, [[(0, 6)]])})) == [Send(peer(0), m.OpenStore(epoch=EPOCH + 1))]
    joins = driver.say(peer(0), m.StoreOpened(epoch=EPOCH + 1, address="tcp://store:1"))
    told = [(a.peer, a.message.id, a.message.keep) for a in joins if isinstance(a, Send) and isinstance(a.message, m.JoinEpoch)]
    assert told == [(peer(0), 0, [3]), (b"fresh", 1, [])]


def test_members_of_two_epochs() -> None:
    """One had heard of the next epoch, one had not: both have KV, which is as good."""
    driver = waiting("r")
    driver.say(peer(0), back(0, epoch=EPOCH), m.Text(assets=ASSETS))
    driver.handle(TextLoaded(1, 0.0))
    assert driver.say(peer(1), back(1, epoch=EPOCH - 1))[1:] == [suspend(0), suspend(1)]


def test_the_text_is_asked_of_another_if_the_first_is_lost() -> None:
    driver = waiting("r")
    assert driver.say(peer(0), back(0, 3)) == [Send(peer(0), m.Registered(lease_s=5.0, send_text=True))]
    driver.say(peer(1), back(1, 3))
    again = Send(peer(1), m.Registered(lease_s=5.0, send_text=True))
    assert driver.handle(PeerWasLost(peer(0), "gone", 0.0))[:-1] == [again]
    driver.say(peer(1), m.Text(assets=ASSETS))
    driver.handle(TextLoaded(1, 0.0))
    assert driver.say(peer(2), back(2, 3))[1:] == [suspend(1), suspend(2)]


def test_who_has_served_a_later_gmanager_is_told_nothing() -> None:
    """A stale one could only mislead it."""
    driver = serving(8, 8)
    later = msgspec.structs.replace(
        register(rank=0, cell_size=2), former=m.Former(term=2, identity=0, epoch=EPOCH, id=0, size=2)
    )
    assert driver.say(b"late", later) == []


def test_a_returning_instance_meets_a_cell_that_has_formed() -> None:
    driver = serving(8, 8)
    assert driver.say(b"late", back(0)) == [
        Send(b"late", m.Expelled(reason="cell 'main' has gone on without this instance")),
    ]


def test_outputs_are_acknowledged() -> None:
    driver = serving(8)
    running(driver, "r", generated=1)
    driver.say(peer(0), outputs(1, 1, [9]), outputs(1, 2, [9]), m.Ping())
    assert driver.heard == {peer(0): 3}
    driver.say(peer(0), outputs(99, 0, [9]), m.Ping())  # of no sequence: it need not be kept either
    assert driver.heard == {peer(0): 4}


def restored(number: int, tokens: int = 0, prompt: int = 10, **more: Any) -> Restored:
    """A request of the gManager before, with so many tokens."""
    asked = submit(f"r{number}", prompt, **more)
    known = Encoded(number, 0.0, asked.token_ids or b"", highest=5)
    return Restored(number=number, submit=asked, seed=7, spread="auto", encoded=known, token_ids=[9] * tokens)


def test_a_restored_request_goes_on_where_it_was() -> None:
    """Its first two tokens are in the journal, the third was on its way."""
    driver = Driver()
    driver.cluster.restore([restored(4, tokens=2), restored(6)], 0.0)
    unheard = m.Unheard(request=4, index=1, token_ids=[9, 9])
    actions = returning(driver, kept(4, {30: (4, [[(0, 12)]]), 31: (6, [[(0, 8)]])}, unheard))
    opens = Send(peer(0), m.OpenStore(epoch=EPOCH + 1))
    assert actions == [deliver(4, "r4", 2, [9], peer=None), opens], "turned into text, heard by nobody"
    assert request_stats(driver, "r4").generated_tokens == 3
    assert request_stats(driver, "r4").kv_tokens == {0: 12}
    first, *_ = admits(driver.grant(driver.join(EPOCH + 1, peer(0))))
    assert (first.seq, first.arrival, len(first.token_ids) // 4, first.params.num_generated) == (30, 4, 13, 3)
    # numbers go on behind all there ever were
    driver.say(CLIENT, HELLO, submit("new"))
    assert request_stats(driver, "new").state == "queued"
    assert [request.number for request in driver.cluster._requests.live()] == [4, 6, 7]


def test_a_restored_request_is_computed_anew_by_instances_that_have_nothing_of_it() -> None:
    driver = Driver()
    driver.cluster.restore([restored(1, tokens=2)], 0.0)
    (admit,) = admits(driver.grant(driver.ready_cell(8)))
    assert (len(admit.token_ids) // 4, admit.kept, admit.params.num_generated) == (12, [], 2)


def test_a_restored_request_that_is_too_large_now_waits() -> None:
    """A new one would be refused."""
    driver = Driver()
    driver.cluster.restore([restored(1, prompt=60)], 0.0)
    driver.ready_cell(8)
    assert request_stats(driver, "r1").state == "queued"
    assert [i.message for i in driver.come(NEW, 20, cell_size=1) if isinstance(i, Send)]
    driver.keep(peer(0), 8)
    assert admits(driver.grant(driver.join(2, peer(0), NEW)))


def test_what_was_restored_is_not_made_text_of_again() -> None:
    """All of it was looked through for stop strings: the next token's text begins behind it."""
    driver = Driver()
    driver.cluster.restore([restored(1, tokens=5)], 0.0)
    made = [action for action in driver.ready_cell(8) if isinstance(action, Deliver)]
    assert made == [deliver(1, "r1", 5, [], peer=None, before=[9] * 5)]


def test_what_was_restored_and_never_read_is_looked_at_now() -> None:
    """It came when there was no cell, as to which tokens there are."""
    driver = Driver()
    wrong = submit("r1", prompt=[5, 999_999])
    driver.cluster.restore([Restored(number=1, submit=wrong, seed=7, spread="auto", encoded=None, token_ids=[])], 0.0)
    driver.ready_cell(8)
    assert request_stats(driver, "r1").finish_reason == "error"


def test_numbers_of_restored_requests_only_grow() -> None:
    driver = Driver()
    with pytest.raises(ValueError, match="request 3, 'r3', can't follow 3"):
        driver.cluster.restore([restored(3), restored(3)], 0.0)


# --- a gManager that stands still, or that nobody reaches


def again(rank: int) -> bytes:
    """An instance's next connection."""
    return peer(rank, 2)


def comes_again(driver: Driver, rank: int, size: int = 2) -> list[Action]:
    actions = driver.say(again(rank), back(rank, size, epoch=1, quorum=size))
    assert actions.pop(0) == Send(again(rank), m.Registered(lease_s=5.0, send_text=False))
    return actions


AGAIN = "instance 0 of cell 'main' comes again"
SILENT = "instance 0 of cell 'main' was not heard for 5 s"


def suspended(rank: int, reason: str = AGAIN) -> Send:
    return Send(again(rank), m.Suspend(epoch=1, reason=reason))


def test_instances_come_again_with_what_they_have() -> None:
    """None of their requests is the worse for it; tokens of the meantime are delivered."""
    driver = serving(8, 8)
    running(driver, "r", 10, spread=2, generated=2)
    assert comes_again(driver, 0) == [suspended(0), Send(peer(1), m.Suspend(epoch=1, reason=AGAIN))]
    unheard = m.Unheard(request=1, index=1, token_ids=[9, 7])
    first = kept(5, {1: (1, [[(0, 6), (10, 12)]])}, unheard, epoch=1)
    assert comes_again(driver, 1) == [suspended(0), suspended(1)], "the other is asked anew"
    assert driver.say(again(0), first) == []
    opens = Send(again(0), m.OpenStore(epoch=2))
    assert driver.say(again(1), kept(7, {1: (0, [[(6, 10)]])}, epoch=1)) == [deliver(1, "r", 2, [7]), opens]
    driver.free |= {again(0): 5, again(1): 7}
    (admit, _) = admits(driver.grant(driver.join(2, again(0), again(1))))
    assert (len(admit.token_ids) // 4, admit.params.num_generated) == (13, 3)
    assert admit.kept == [m.KeptPart(rank=0, runs=[[(0, 6), (10, 12)]]), m.KeptPart(rank=1, runs=[[(6, 10)]])]


def test_what_was_counted_of_it_is_not_counted_twice() -> None:
    driver = serving(8, 8)
    driver.say(peer(0), beat(8, tokens_prefilled=100))
    comes_again(driver, 0)
    comes_again(driver, 1)
    assert driver.cluster.stats().counters.tokens_prefilled == 100
    driver.say(again(0), kept(8, {}, epoch=1))
    driver.say(again(1), kept(8, {}, epoch=1))
    driver.join(2, again(0), again(1))
    told = m.Beat(epoch=2, free_blocks=8, held_tokens={}, counters=m.Counters(tokens_prefilled=110))
    driver.say(again(0), told)
    assert driver.cluster.stats().counters.tokens_prefilled == 110


def test_the_connection_before_counts_no_more() -> None:
    """Neither what comes over it nor its end."""
    driver = serving(8, 8)
    running(driver, "r", 10, spread=2, generated=2)
    comes_again(driver, 0)
    assert driver.say(peer(0), outputs(1, 2, [9])) == []
    assert driver.handle(PeerWasLost(peer(0), "it closed the connection", driver.now)) == [Forget(peer(0))]
    driver.say(again(0), kept(5, {1: (1, [[(0, 6), (10, 12)]])}, epoch=1))
    assert driver.say(peer(1), kept(7, {1: (0, [[(6, 10)]])}, epoch=1)) == [Send(again(0), m.OpenStore(epoch=2))]


def test_one_that_is_another_process_is_none_that_comes_again() -> None:
    """Of the same id, as a mistake might have it: the member stays."""
    driver = serving(8, 8)
    running(driver, "r", generated=1)
    other = msgspec.structs.replace(back(0, epoch=1), run_id="another")
    (expelled,) = driver.say(again(0), other)
    assert expelled == Send(again(0), m.Expelled(reason="cell 'main' has gone on without this instance"))
    assert driver.say(peer(0), outputs(1, 1, [9])) == [deliver(1, "r", 1, [9])]


def test_one_that_died_after_it_had_come_again_is_not_waited_for_twice() -> None:
    driver = serving(8)
    running(driver, "r", generated=1)
    assert driver.wait(6, CLIENT) == []
    assert comes_again(driver, 0, size=1) == [suspended(0, SILENT)]
    ended = driver.handle(PeerWasLost(again(0), "gone", driver.now))
    assert ended == [failed(1, "r", SILENT, index=1), DropText(1), Forget(again(0))]


def test_the_last_that_is_silent_may_come_again() -> None:
    """More likely it is the gManager that nobody reaches: instances go on, and dial anew a little later. New requests wait."""
    driver = serving(8)
    running(driver, "r", generated=1)
    assert driver.wait(6, CLIENT) == []
    assert driver.say(CLIENT, submit("later")) == []
    assert driver.say(peer(0), beat(8)) == [], "it is not heard any more over the old connection"
    assert comes_again(driver, 0, size=1) == [suspended(0, SILENT)]
    assert driver.say(again(0), kept(6, {1: (1, [[(0, 8)]])}, epoch=1)) == [Send(again(0), m.OpenStore(epoch=2))]


def test_if_none_comes_again_the_cell_is_over() -> None:
    driver = serving(8)
    running(driver, "r", generated=1)
    assert driver.wait(6, CLIENT) == []
    assert driver.say(CLIENT, submit("later")) == []
    error = f"{SILENT}, and none of the cell came back within {RETURN_GRACE_S:g} s"
    assert driver.wait(int(RETURN_GRACE_S) + 1, CLIENT) == [
        failed(1, "r", error, index=1),
        failed(2, "later", error),
        DropText(1),
    ]


def test_all_fall_silent_and_come_again() -> None:
    """The first is gone on without, until the last is silent too."""
    driver = serving(8, 8)
    running(driver, "r", 10, spread=2, generated=2)
    driver.wait(6, CLIENT)
    assert comes_again(driver, 0) == []
    assert comes_again(driver, 1) == [suspended(0, SILENT), suspended(1, SILENT)]
    driver.say(again(0), kept(5, {1: (1, [[(0, 6), (10, 11)]])}, epoch=1))
    assert driver.say(again(1), kept(7, {1: (0, [[(6, 10)]])}, epoch=1)) == [Send(again(0), m.OpenStore(epoch=2))]
