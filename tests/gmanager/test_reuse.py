"""Requests that begin as others did: what they are told to share, and what becomes of that.

Blocks have 4 tokens. `doc` is a prompt of 12 tokens, whose first two blocks can be shared while its sequence runs: the row of
its last token is computed anew by whoever comes after it.
"""

from collections.abc import Sequence
from typing import Any

import pytest

from gmanager.cluster.chain import Chain
from gmanager.cluster.events import Action, Deliver, Encode, Encoded, Send
from gmanager.cluster.placement import InstanceView, Placement
from gmanager.cluster.reuse import FAR_TOKENS, _cost
from gmanager.wire import messages as m
from gmanager.wire.peer import PeerId
from tests.gmanager.cluster_support import (
    CLIENT,
    Driver,
    beat,
    drop,
    granted,
    kept,
    peer,
    request_stats,
    running,
    serving,
    submit,
)

Runs = list[list[tuple[int, int]]]
DOC = list(range(100, 112))


def cached(epoch: int = 1, **shards: Runs) -> m.Cached:
    """`s1`: of sequence 1."""
    return m.Cached(epoch=epoch, shards=[m.KeptShard(seq=int(name[1:]), runs=runs) for name, runs in shards.items()])


def sharing(rank: int, seq: int, blocks: int, source: int, runs: Runs) -> Send:
    return Send(peer(rank), m.Reserve(epoch=1, seq=seq, blocks=blocks, source=source, shared=runs))


def lacks(seq: int, free: int) -> m.NotGranted:
    return m.NotGranted(epoch=1, seq=seq, free_blocks=free, lacks_source=True)


def released(seq: int, generated: int) -> m.Released:
    return m.Released(epoch=1, seq=seq, generated=generated)


def ask(name: str, prompt: Sequence[int], **more: Any) -> m.Submit:
    return submit(name, prompt=list(prompt), **more)


def admits(actions: list[Action]) -> list[m.Admit]:
    return [action.message for action in actions if isinstance(action, Send) and isinstance(action.message, m.Admit)]


def finish(driver: Driver, seq: int, generated: int, rank: int = 0, runs: Runs | None = None) -> list[Action]:
    """Let a sequence end whose last token comes now, and leave `runs` at its home."""
    last = m.SequenceOutput(seq=seq, index=generated - 1, token_ids=[9], finish_reason="length")
    actions = driver.say(peer(rank), m.Outputs(epoch=1, outputs=[last]))
    if runs is not None:
        actions += driver.say(peer(rank), m.Cached(epoch=1, shards=[m.KeptShard(seq=seq, runs=runs)]))
    return actions + driver.say(peer(rank), released(seq, generated))


def with_doc(*blocks: int, generated: int = 3, runs: Runs | None = None, **config: Any) -> Driver:
    """A cell whose instance 0 has computed `doc` as sequence 1, and what followed it."""
    driver = serving(*blocks, **config)
    running(driver, "doc", prompt=DOC, max_tokens=generated, generated=generated - 1)
    actions = finish(driver, 1, generated, runs=[[(0, 12)]] if runs is None else runs)
    assert any(isinstance(action, Deliver) and action.finish_reason for action in actions)
    driver.say(peer(0), beat(blocks[0]))
    return driver


def test_a_document_asked_about_twice_is_computed_once() -> None:
    driver = with_doc(20)
    asked = driver.say(CLIENT, ask("again", [*DOC, 7, 8], max_tokens=2))
    assert asked == [sharing(0, 2, 4, 1, [[(0, 12)]])], "a block, a spare one, and two as gaps may open runs"
    (admit,) = admits(driver.say(peer(0), granted(2, 4, 14)))
    assert admit.kept == [m.KeptPart(rank=0, runs=[[(0, 12)]])]
    assert admit.shares == [m.Share(rank=0, tokens=2)]
    assert m.unpack_tokens(admit.token_ids).tolist() == [*DOC, 7, 8]
    assert request_stats(driver, "again").kv_tokens == {0: 12}
    observed = driver.cluster.stats().observed
    assert (observed.prefix_queries, observed.prefix_hits) == (12 + 14, 12)


def test_the_answer_is_part_of_the_next_turns_prompt() -> None:
    driver = with_doc(20, generated=7, runs=[[(0, 16)]])
    asked = driver.say(CLIENT, ask("turn", [*DOC, *[9] * 7, 5], max_tokens=2))
    assert asked == [sharing(0, 2, 4, 1, [[(0, 16)]])]


def test_the_last_token_of_a_prompt_is_computed_anew() -> None:
    driver = with_doc(20)
    assert driver.say(CLIENT, ask("same", DOC, max_tokens=2)) == [sharing(0, 2, 4, 1, [[(0, 8)]])]
    (admit,) = admits(driver.say(peer(0), granted(2, 4, 15)))
    assert admit.shares == [m.Share(rank=0, tokens=4)]


def test_a_prompt_is_shared_while_its_sequence_runs() -> None:
    driver = serving(20)
    running(driver, "doc", prompt=DOC, max_tokens=5, generated=1)
    assert driver.say(CLIENT, ask("early", DOC)) == [Send(peer(0), m.Reserve(epoch=1, seq=2, blocks=4))], "nothing was told"
    driver.say(peer(0), granted(2, 4, 10))
    driver.say(peer(0), cached(s1=[[(0, 8)]]))
    assert driver.say(CLIENT, ask("late", DOC)) == [sharing(0, 3, 4, 1, [[(0, 8)]])]
    view = driver.cluster._cells.sequences["main"]._cell.members[0]
    assert view.outstanding == {3: 4}, "its blocks are in use already"


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": [*DOC[:3], 1, *DOC[4:]]},
        {"prompt": DOC[1:]},
        {"prompt": DOC[:4]},
        {"cache_salt": "mine"},
        {"prompt_logprobs": 1},
    ],
    ids=["another token", "shifted", "its first block is its last", "another salt", "all its rows are needed"],
)
def test_nothing_is_shared_with_what_is_not_the_same(other: dict[str, Any]) -> None:
    driver = with_doc(20)
    (asked,) = driver.say(CLIENT, ask("other", **({"prompt": DOC} | other)))
    assert isinstance(asked, Send) and isinstance(asked.message, m.Reserve) and not asked.message.source
    assert not asked.message.shared


def test_who_has_the_same_salt_shares() -> None:
    driver = serving(20)
    running(driver, "doc", prompt=DOC, max_tokens=2, generated=1, cache_salt="mine")
    finish(driver, 1, 2, runs=[[(0, 12)]])
    assert driver.say(CLIENT, ask("again", DOC, cache_salt="mine")) == [sharing(0, 2, 4, 1, [[(0, 8)]])]
    driver.say(peer(0), granted(2, 4, 15))
    assert driver.say(CLIENT, ask("without", DOC)) == [Send(peer(0), m.Reserve(epoch=1, seq=3, blocks=4))]


def test_without_the_cache_nothing_is_hashed_or_shared() -> None:
    driver = with_doc(20, prefix_cache=False)
    assert (
        driver.say(CLIENT, ask("again", DOC))
        == [
            Send(peer(0), m.Discard(epoch=1, seq=1)),
            Send(peer(0), m.Reserve(epoch=1, seq=2, blocks=4)),
        ][1:]
    )
    assert driver.cluster.stats().observed.prefix_queries == 0
    text = m.Submit(request_id="t", params=m.SamplingParams(), text="hello")
    assert driver.say(CLIENT, text) == [Encode(1, 3, text, None, 4)]


def test_a_long_prompt_is_hashed_by_the_shell() -> None:
    driver = with_doc(20)
    text = m.Submit(request_id="t", params=m.SamplingParams(), text="hello")
    (encode,) = driver.say(CLIENT, text)
    assert isinstance(encode, Encode) and encode.chain_seed is not None
    packed = m.pack_tokens([*DOC, 1])
    chain = Chain(encode.chain_seed, encode.block_size, packed)
    assert driver.handle(Encoded(2, 0.0, token_ids=packed, chain=chain)) == [sharing(0, 2, 4, 1, [[(0, 12)]])]


def test_what_is_not_there_any_more_is_computed() -> None:
    """It had to make room between what was told and what is asked."""
    driver = with_doc(20)
    assert driver.say(CLIENT, ask("again", DOC)) == [sharing(0, 2, 4, 1, [[(0, 8)]])]
    assert driver.say(peer(0), cached(s1=[[(0, 4)]]), lacks(2, 20)) == [sharing(0, 3, 5, 1, [[(0, 4)]])]
    assert driver.say(peer(0), lacks(3, 20)) == [Send(peer(0), m.Reserve(epoch=1, seq=4, blocks=4))]
    assert driver.say(peer(0), cached(s1=[[(0, 4)]])) == [Send(peer(0), m.Discard(epoch=1, seq=1))]


def test_a_refusal_undoes_what_others_have_granted() -> None:
    driver = serving(20, 20)
    running(driver, "doc", prompt=DOC, spread=2, max_tokens=2, generated=1)
    finish(driver, 1, 2, runs=[[(0, 8)]])
    driver.say(peer(1), cached(s1=[[(8, 12)]]))
    asked = driver.say(CLIENT, ask("again", [*DOC, *range(8)], spread=2))
    assert asked == [sharing(0, 2, 4, 1, [[(0, 8)]]), sharing(1, 2, 4, 1, [[(8, 12)]])]
    driver.say(peer(0), granted(2, 4, 15))
    again = driver.say(peer(1), cached(s1=[]), lacks(2, 20))
    assert again == [drop(0, 2), sharing(0, 3, 4, 1, [[(0, 8)]]), Send(peer(1), m.Reserve(epoch=1, seq=3, blocks=4))]


def test_little_is_not_attended_to_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another instance would have to take part in each step for a block or two."""
    assert FAR_TOKENS > 4
    for far, shared in ((9, {0: [[(0, 8)]]}), (4, {0: [[(0, 8)]], 1: [[(8, 12)]]})):
        monkeypatch.setattr("gmanager.cluster.reuse.FAR_TOKENS", far)
        driver = serving(20, 20)
        running(driver, "doc", prompt=DOC, spread=2, max_tokens=2, generated=1)
        finish(driver, 1, 2, runs=[[(0, 8)]])
        driver.say(peer(1), cached(s1=[[(8, 12)]]))
        asked = driver.say(CLIENT, ask("again", [*DOC, 1], spread=1))
        found = {action.peer: action.message.shared for action in asked}  # type: ignore[union-attr]
        assert found == {peer(rank): runs for rank, runs in shared.items()}
        blocks = [action.message.blocks for action in asked]  # type: ignore[union-attr]
        assert blocks[1:] == [0] * (len(shared) - 1), "who computes nothing sets nothing aside"


def test_a_beginning_that_all_have_does_not_make_one_home_of_all() -> None:
    """It is worth 8 tokens, and a home that has one sequence more costs 32."""
    driver = with_doc(40, 40)
    homes: list[int] = []
    for i in range(6):
        (admit,) = admits(driver.grant(driver.say(CLIENT, ask(f"r{i}", DOC, max_tokens=8))))
        homes.append(admit.shares[0].rank)
    assert sorted(homes) == [0, 0, 0, 1, 1, 1]


def test_those_who_ask_about_one_document_have_their_homes_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attends to all of it; who computes the next tokens is another, however much of the document lies on the first."""
    monkeypatch.setattr("gmanager.cluster.reuse.FAR_TOKENS", 4)
    monkeypatch.setattr("gmanager.cluster.reuse.HOME_TOKENS", 1)
    driver = serving(100, 100, 100)
    running(driver, "doc", prompt=list(range(60)), spread=3, max_tokens=2, generated=1)
    finish(driver, 1, 2, runs=[[(0, 32)]])
    driver.say(peer(1), cached(s1=[[(32, 48)]]))
    driver.say(peer(2), cached(s1=[[(48, 56)]]))
    homes: list[int] = []
    for i in range(6):
        (admit, *_) = admits(driver.grant(driver.say(CLIENT, ask(f"r{i}", [*range(60), i], spread=1))))
        assert [part.rank for part in admit.kept] == [0, 1, 2]
        homes.append(admit.shares[0].rank)
    assert homes == [0, 1, 2, 0, 1, 2]


def test_blocks_that_are_pinned_are_counted_once() -> None:
    """11 blocks, 3 of them cached: two sequences can have these at once, who without them would need 5 each and a spare one."""
    driver = with_doc(11)
    assert driver.say(CLIENT, ask("a", [*DOC, 1], max_tokens=1)) == [sharing(0, 2, 4, 1, [[(0, 12)]])]
    member = driver.cluster._cells.sequences["main"]._cell.members[0]
    assert member.free == 4
    driver.say(peer(0), granted(2, 4, 4))
    assert driver.say(CLIENT, ask("b", [*DOC, 2], max_tokens=1)) == [sharing(0, 3, 4, 1, [[(0, 12)]])]
    assert member.free == 0
    driver.say(peer(0), granted(3, 4, 0))
    assert driver.say(CLIENT, ask("c", [*DOC, 3], max_tokens=1)) == []


def test_a_preempted_request_finds_its_own() -> None:
    driver = serving(8)
    running(driver, "old", 8, max_tokens=16, generated=1)
    running(driver, "young", prompt=DOC, max_tokens=16, generated=5)
    driver.say(peer(0), m.NeedBlock(epoch=1, seq=1))
    assert request_stats(driver, "young").state == "preempted"
    driver.say(peer(0), cached(s2=[[(0, 16)]]), released(2, 5), beat(4))
    again = finish(driver, 1, 2) + driver.say(peer(0), beat(8))
    assert sharing(0, 3, 4, 2, [[(0, 16)]]) in again
    (admit,) = admits(driver.say(peer(0), granted(3, 4, 1)))
    assert admit.shares == [m.Share(rank=0, tokens=1)]
    assert driver.cluster.stats().observed.prefix_hits == 0, "only a request's first admission counts"


def test_nothing_new_depends_on_an_instance_that_is_drained() -> None:
    """What it has cached doesn't keep it, nor is it used while something else does."""
    driver = with_doc(20, 20)
    running(driver, "runs", 30, spread=2, max_tokens=4)
    driver.say(CLIENT, m.Drain(call=1, instance=0))
    assert driver.say(CLIENT, ask("again", DOC, max_tokens=1)) == [Send(peer(1), m.Reserve(epoch=1, seq=3, blocks=4))]

    driver = with_doc(20, 20)
    driver.say(CLIENT, m.Drain(call=1, instance=0))
    assert any(log.fields.get("reason") == "instance 0 of cell 'main' was drained" for log in driver.logs)


def test_cached_kv_outlasts_a_change_of_membership() -> None:
    driver = with_doc(20, 20)
    who: PeerId = b"new"
    driver.come(who, 20)
    told = m.Kept(
        epoch=1,
        free_blocks=20,
        shards=[],
        cached=[m.KeptShard(seq=1, runs=[[(0, 12)]]), m.KeptShard(seq=77, runs=[[(0, 4)]])],
    )
    driver.say(peer(0), told)
    driver.say(peer(1), kept(20))
    joins = driver.say(peer(0), m.StoreOpened(epoch=2, address="tcp://store:1"))
    keeps = [action.message.keep for action in joins if isinstance(action, Send)]  # type: ignore[union-attr]
    assert keeps == [[1], [], []], "77 is nobody's"
    for member in (peer(0), peer(1), who):
        driver.say(member, m.Joined(epoch=2))
    (asked,) = driver.say(CLIENT, ask("again", DOC))
    assert asked == Send(peer(0), m.Reserve(epoch=2, seq=2, blocks=4, source=1, shared=[[(0, 8)]]))


def test_what_a_lost_instance_had_is_known_no_more() -> None:
    driver = with_doc(20, 20)
    driver.lose(0)
    driver.say(peer(1), kept(20))
    driver.join(2, peer(1))
    (asked,) = driver.say(CLIENT, ask("again", DOC))
    assert asked == Send(peer(1), m.Reserve(epoch=2, seq=2, blocks=4))


def test_who_shares_can_not_go_on_from_within_what_it_shares() -> None:
    """A gManager that lacks the last tokens of a sequence has it computed anew: no block is cut that others read."""
    driver = serving(20, 20)
    running(driver, "doc", prompt=DOC, max_tokens=9, generated=2)
    driver.lose(1)
    shard = m.KeptShard(seq=1, runs=[[(0, 15)]], shared_end=14)
    driver.say(peer(0), m.Kept(epoch=1, free_blocks=16, shards=[shard]))
    (asked,) = driver.join(2, peer(0))
    assert asked == Send(peer(0), m.Reserve(epoch=2, seq=2, blocks=5)), "it knows 14 tokens, and would go on from 13"


def test_an_instance_that_says_what_can_not_be_is_lost() -> None:
    driver = with_doc(20, 20)
    driver.say(peer(0), cached(s1=[[(4, 0)]]))
    assert any("sent what can't be read: runs must ascend" in str(log.fields) for log in driver.logs)


def test_a_client_that_leaves_while_blocks_are_pinned() -> None:
    driver = with_doc(20)
    driver.say(CLIENT, ask("again", DOC))
    assert drop(0, 2) in driver.say(CLIENT, m.Abort(call=1, request_id="again"))
    driver.say(peer(0), granted(2, 4, 15), beat(20))
    assert driver.cluster.is_idle


def test_what_is_to_be_computed_before_a_prompt_counts_as_much_as_the_prompt() -> None:
    """A document lies where 3,000 tokens wait; elsewhere it is computed anew, unless it is longer than they."""
    there, elsewhere = Placement([m.Share(rank=0, tokens=10)], {0: 2}), Placement([m.Share(rank=1, tokens=2010)], {1: 34})
    for backlog, cheaper in ((3000, elsewhere), (1000, there)):
        views = [
            InstanceView(rank=rank, free_blocks=99, total_blocks=99, homes=0, max_homes=9, backlog=tokens)
            for rank, tokens in enumerate((backlog, 0))
        ]
        assert min((there, elsewhere), key=lambda its: _cost((its, None), views, 2010, 10**9)) is cheaper
