"""Cells whose models have layers that see but a window: a block of tokens takes several blocks, and not all KV can be gone on
with."""

from types import SimpleNamespace
from typing import Any

import pytest

from gmanager.cluster.chain import Chain
from gmanager.cluster.events import Send, SendAll
from gmanager.cluster.following import Following
from gmanager.cluster.prefixes import FAR, Prefixes, first_gap
from gmanager.cluster.registration import malformed
from gmanager.wire import messages as m
from tests.gmanager.cluster_support import CLIENT, HELLO, Driver, beat, granted, peer, register, reserve, running, submit

DOC = list(range(100, 112))
WINDOWS = [3, 3]
"""Two tables, of which a sequence takes no more than 3 blocks each."""


def serving(*blocks: int, **config: Any) -> Driver:
    driver = Driver(**config)
    driver.ready_cell(*blocks, windows=WINDOWS)
    driver.say(CLIENT, HELLO)
    return driver


def test_a_prompt_takes_blocks_in_each_table() -> None:
    driver = serving(20)
    assert driver.say(CLIENT, submit("a", 20, max_tokens=4)) == [reserve(0, 1, 6 + 3 + 3)]
    driver.say(peer(0), granted(1, 12, 8))
    assert driver.say(CLIENT, submit("b", 4, max_tokens=4)) == [reserve(0, 2, 2 + 2 + 2)]
    driver.say(peer(0), granted(2, 6, 2))
    assert driver.say(CLIENT, submit("c", 4, max_tokens=4)) == [], "2 blocks don't hold one of tokens"
    assert driver.say(peer(0), beat(6))[1:] == [reserve(0, 3, 6)]


def test_the_longest_sequence_is_what_the_blocks_of_all_tables_hold() -> None:
    """20 blocks: 3 of tokens take 9, 11 more take one each; one of them is spare."""
    driver = serving(20)
    (stats,) = driver.cluster.stats().instances
    assert (stats.total_tokens, stats.free_tokens) == (14 * 4, 14 * 4)
    refused = driver.say(CLIENT, submit("long", 48, max_tokens=5))
    assert "needs 53 tokens of KV; cell 'main' holds 56" in str(refused)
    assert driver.say(CLIENT, submit("fits", 48, max_tokens=4)) == [reserve(0, 1, 13 + 6)]


def test_members_of_a_cell_have_the_same_windows() -> None:
    driver = serving(20, 20)
    refused = driver.say(b"other", register(rank=0, cell_size=2, blocks=20))
    assert "its blocks in windows is [], that of cell 'main' is [3, 3]" in str(refused)


@pytest.mark.parametrize(("since", "held"), [(0, 12), (12, 12), (13, 0)])
def test_what_is_shared_must_have_all_that_rows_behind_it_see(since: int, held: int) -> None:
    driver = serving(60)
    running(driver, "doc", prompt=DOC, max_tokens=5, generated=1)
    driver.say(peer(0), m.Cached(epoch=1, shards=[m.KeptShard(seq=1, runs=[[(0, 12)]], since=since)]))
    (asked,) = driver.say(CLIENT, submit("again", prompt=[*DOC, 7, 8], max_tokens=2))
    assert isinstance(asked, Send)
    assert isinstance(asked.message, m.Reserve)
    assert asked.message.shared == ([[(0, held)]] if held else [])


def test_where_others_parted_what_is_seen_is_to_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The document is there, but not what a row behind it sees: who is to begin with it next can."""
    monkeypatch.setattr("gmanager.cluster.reuse.LEAST_BRANCH", 12)
    driver = serving(90)
    running(driver, "doc", prompt=[*DOC, *range(20)], max_tokens=5, generated=1)
    driver.say(peer(0), m.Cached(epoch=1, shards=[m.KeptShard(seq=1, runs=[[(0, 32)]], since=20)]))
    branches = []
    for seq, (name, told) in enumerate({"second": [(10, 12)], "third": [(10, 12)]}.items(), 2):
        actions = running(driver, name, prompt=[*DOC, *[seq] * 20], max_tokens=5, generated=1)
        (admit,) = [a.message for a in actions if isinstance(a, Send | SendAll) and isinstance(a.message, m.Admit)]
        branches.append((admit.branch, [part.runs for part in admit.kept]))
        shard = m.KeptShard(seq=seq, runs=[[(0, 32)]], since=20, branches=told)
        driver.say(peer(0), m.Cached(epoch=1, shards=[shard]))
    assert branches == [(12, []), (0, [[[(0, 12)]]])]


def test_what_has_a_gap_is_shared_before_it() -> None:
    """Instances have the document between them, but for a part that is gone, or ends within a block elsewhere."""
    chain = Chain(b"seed", 4, m.pack_tokens(DOC * 2))
    prefixes = Prefixes(4)
    for seq, parts in {
        1: {0: [(0, 8)], 1: [(12, 24)]},
        2: {0: [(0, 8)], 2: [(8, 24)]},
        3: {2: [(0, 4), (7, 24)], 3: [(4, 7)]},
    }.items():
        prefixes.add(seq, chain)
        for member, run in parts.items():
            assert prefixes.tell(seq, member, [run], follow=[(2, FAR)])
    found = {match.source: match for match in prefixes.find(chain, 24)}
    assert all(match.is_whole for match in found.values())
    assert found[1].parts == {0: [[(0, 8)]]}
    assert found[2].parts == {0: [[(0, 8)]], 2: [[(8, 24)]]}
    assert found[3].parts == {2: [[(0, 4)]]}, "without the gap 4 to 7 the rest is of no use"
    assert prefixes.tell(2, 0, [[(0, 8)]], follow=[(25, FAR)])
    assert [match.source for match in prefixes.find(chain, 24)] == [1, 3]


@pytest.mark.parametrize(("since", "seq", "length"), [(0, 1, 4), (13, 1, 4), (14, 2, 5)])
def test_what_is_left_of_a_sequence_is_gone_on_with_if_rows_see_all(since: int, seq: int, length: int) -> None:
    """12 tokens and two more, of which the last is computed anew: from position 13 on."""
    driver = serving(60, 60)
    running(driver, "doc", prompt=DOC, max_tokens=9, generated=2)
    driver.lose(1)
    shard = m.KeptShard(seq=1, runs=[[(0, 14)]], since=since)
    driver.say(peer(0), m.Kept(epoch=1, free_blocks=40, shards=[shard]))
    (asked,) = driver.join(2, peer(0))
    assert asked == Send(peer(0), m.Reserve(epoch=2, seq=seq, blocks=length + 3 + 3))


def test_a_gap_before_what_is_left_of_a_window_takes_all_with_it() -> None:
    driver = serving(60, 60)
    running(driver, "doc", prompt=DOC * 2, max_tokens=9, generated=2, spread=2)
    driver.lose(1)
    driver.say(peer(0), m.Kept(epoch=1, free_blocks=40, shards=[m.KeptShard(seq=1, runs=[[(0, 4), (8, 25)]], since=6)]))
    (asked,) = driver.join(2, peer(0))
    assert asked == Send(peer(0), m.Reserve(epoch=2, seq=2, blocks=8 + 6)), "26 tokens and a spare block: all is computed"


def test_the_blocks_of_a_run_that_moves_are_counted_in_each_table() -> None:
    driver = serving(60, 60)
    running(driver, "doc", prompt=DOC * 2, max_tokens=9, generated=2, spread=2)
    (asked,) = driver.say(CLIENT, m.Drain(call=1, instance=1))
    assert asked == Send(peer(1), m.OfferRun(epoch=1, move=2, seq=1))
    offered = m.RunOffered(epoch=1, move=2, ranges=[(4, 8), (16, 24)], firsts=[1, 3])
    assert driver.say(peer(1), offered) == [reserve(0, 2, 3 + 2 + 0)]
    asked, _ = driver.say(peer(0), granted(2, 5, 20))
    assert isinstance(asked, Send)
    assert isinstance(asked.message, m.CopyRun)
    assert asked.message.firsts == [1, 3]


def test_a_run_that_is_offered_with_other_tables_is_not_moved() -> None:
    driver = serving(60, 60)
    running(driver, "doc", prompt=DOC * 2, max_tokens=9, generated=2, spread=2)
    driver.say(CLIENT, m.Drain(call=1, instance=1))
    before = driver.cluster.stats().counters.dropped_messages
    answer = driver.say(peer(1), m.RunOffered(epoch=1, move=2, ranges=[(4, 8)], firsts=[2, 0]))
    assert not any(isinstance(action, Send) and isinstance(action.message, m.Reserve) for action in answer)
    assert driver.cluster.stats().counters.dropped_messages == before + 1


def test_gaps_are_found_over_all_instances() -> None:
    assert first_gap({}) == 0
    assert first_gap({0: [[(0, 4), (8, 12)]], 1: [[(4, 6)], [(6, 8)]]}) == 12
    assert first_gap({0: [[(1, 4)]]}) == 0


def test_what_is_seen_in_windows_is_counted_as_pinned() -> None:
    """Else a request that shares what is there would be refused and tried again for ever, in a cell with nothing else to do."""
    driver = serving(24)
    running(driver, "doc", prompt=DOC * 2, max_tokens=2, generated=1)
    driver.say(peer(0), m.Cached(epoch=1, shards=[m.KeptShard(seq=1, runs=[[(0, 24)]], since=20)]))
    assert driver.say(CLIENT, submit("again", prompt=[*DOC * 2, 7, 8], max_tokens=2)) == []
    assert driver.say(peer(0), beat(11))[1:] == [], "4 blocks in each of three tables, and 6 that hold what it sees of others"
    (asked,) = driver.say(peer(0), beat(18))[1:]
    assert isinstance(asked, Send)
    assert isinstance(asked.message, m.Reserve)
    assert (asked.message.blocks, asked.message.row) == (4 + 3 + 3, 24)


def test_nobody_waits_for_a_prompt_that_goes_on_too_long_behind_what_is_common() -> None:
    chain, other = (Chain(b"seed", 4, m.pack_tokens([*range(600), *[seq] * 40])) for seq in (1, 2))
    for most_apart, waits in ((None, True), (40, True), (39, False)):
        following = Following(4, most_apart)
        following.begin(1, chain, 640, [(0, 640)])
        request = SimpleNamespace(chain=other, number=2, num_tokens=640)
        assert (following.worth_waiting(request, 0) is not None) == waits  # type: ignore[arg-type]


def test_windows_that_can_not_be_are_refused() -> None:
    for windows in ([0], [-3], [1] * 65):
        told = malformed(register(rank=0, cell_size=1, blocks=20, windows=windows))
        assert told is not None
        assert told.startswith("there are at most 64 windows, of 1 block at least")
