"""When steps are split between instances, and that the parts of a feed are the whole."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distattn.exchange import Exchange
from distattn.layout import HeldRun, Holding
from gmanager.wire.sizes import check_sharing, parse_elastic
from instance.cell import EpochGroup, open_store
from instance.elastic_tp import MOST_SPLIT_ROWS, FeedCosts, FeedShares, SplitRule, pack, unpack
from instance.fused import FusedDecoder
from instance.layers import Dense
from instance.shared_feeds import SharedFeeds
from instance.step import Decode, StepMismatch, derive
from kernels.layer_ops import Norm, rms_norm
from tests.instance.test_fused import KNOWN, make
from tests.instance.test_step import notice

H200 = FeedCosts(weights_ns=2.96e6, row_ns=5e3, trip_ns=0.26e6, trip_row_ns=3e3)
"""An 8B shape in bf16, by arithmetic: feeds and head are 12.3 of 15 GB, read in 3.61 ms; 66 exchanges of 4 us, of 64 rows 7."""


@pytest.mark.parametrize(
    ("rows", "split"),
    [
        ([1, 0], True),
        ([0, 1], True),
        ([64, 0], True),
        ([8, 8], True),
        ([128, 128], True),
        ([1], False),
        ([0, 0], False),
        ([200, 57], False),  # more than may be
    ],
)
def test_steps_are_split_where_that_is_faster(rows: list[int], split: bool) -> None:
    rule = SplitRule(MOST_SPLIT_ROWS, H200)
    assert rule.sharers(dict(enumerate(rows))) == ([*range(len(rows))] if split else [])


def test_a_number_of_rows_decides_by_itself() -> None:
    rule = SplitRule(3)
    assert rule.sharers({4: 3, 2: 0}) == [2, 4]
    assert rule.sharers({4: 3, 2: 1}) == []
    assert SplitRule(0).sharers({0: 1, 1: 0}) == []


def test_rows_that_are_spread_already_need_no_help() -> None:
    costs = FeedCosts(weights_ns=100, row_ns=10, trip_ns=10, trip_row_ns=2)
    assert SplitRule(256, costs).sharers({0: 40, 1: 0}) == [0, 1]
    assert SplitRule(256, costs).sharers({0: 20, 1: 20}) == []
    assert SplitRule(256, costs).sharers({0: 1, 1: 1}) == [0, 1]


def test_an_idle_member_with_prompts_does_not_help_and_one_without_helps_the_more() -> None:
    rule = SplitRule(MOST_SPLIT_ROWS, replace(H200, stretch=2.9))
    assert rule.sharers({0: 1, 1: 0}, {1}) == []  # its half takes 1.45 times the whole
    assert rule.sharers({0: 1, 1: 0}, {0}) == [0, 1]
    assert rule.sharers({0: 1, 1: 0}, {0, 1}) == [0, 1]
    assert rule.sharers({0: 1, 1: 1}, {1}) == [0, 1]  # who has rows waits for these prompts in any case
    assert rule.sharers(dict.fromkeys(range(8), 0) | {0: 1}, {1}) == [*range(8)]  # its eighth doesn't
    slow = FeedCosts(weights_ns=100, row_ns=1, trip_ns=60, trip_row_ns=0, stretch=3)
    assert SplitRule(256, slow).sharers({0: 1, 1: 0}, {0}) == [0, 1]  # the trip is worth it now


def test_members_with_other_processors_decide_alike() -> None:
    agreed = FeedCosts.agreed([replace(H200, stretch=1.0), replace(H200, weights_ns=1, stretch=2.9)])
    assert agreed == replace(H200, stretch=2.9) == unpack(pack(agreed))


def test_a_step_knows_who_has_prompts() -> None:
    rule = SplitRule(MOST_SPLIT_ROWS, replace(H200, stretch=2.9))
    decodes = [Decode(seq=1, position=7, holdings=[Holding(0, [HeldRun(0, 7, 7)])])]
    for with_prompts, split in ((False, [0, 1]), (True, [])):
        notices = [notice(0, decodes=decodes), notice(1, both_lanes=with_prompts)]
        assert derive(notices, None, rule).sharers == split


def test_a_trip_that_costs_more_than_it_saves_is_not_made() -> None:
    slow = FeedCosts(weights_ns=100, row_ns=1, trip_ns=60, trip_row_ns=0)
    assert SplitRule(256, slow).sharers({0: 1, 1: 0}) == []
    assert SplitRule(256, slow).sharers({0: 200, 1: 0}) == [0, 1]


@given(
    costs=st.builds(FeedCosts, **{name: st.floats(0, 1e7) for name in ("weights_ns", "row_ns", "trip_ns", "trip_row_ns")}),
    others=st.integers(1, 7),
)
def test_costs_are_found_again_in_what_steps_took(costs: FeedCosts, others: int) -> None:
    def took(rows: int) -> tuple[int, float, float]:
        trips = costs.trip_ns + rows * (others + 1) * others * costs.trip_row_ns
        return rows, costs.weights_ns + rows * costs.row_ns, trips

    found = FeedCosts.through(took(1), took(16), others=others)
    for name in FeedCosts.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(costs, name), rel=1e-3, abs=5)
    assert unpack(pack(found)) == found


def test_noise_makes_no_cost_negative_and_all_agree_on_the_slowest() -> None:
    first = FeedCosts.through((1, 50, 9), (16, 40, 3), others=1)
    assert min(getattr(first, name) for name in FeedCosts.__slots__) >= 0
    second = FeedCosts(weights_ns=10, row_ns=7, trip_ns=1, trip_row_ns=2)
    assert FeedCosts.agreed([first, second]) == FeedCosts.agreed([second, first])
    assert FeedCosts.agreed([first, second]).row_ns == 7


def test_a_step_is_split_for_all_members_alike_and_who_differs_is_found() -> None:
    held = [Holding(0, [HeldRun(0, 5, 5)])]
    notices = [notice(0, lane="decode", decodes=[Decode(seq=1, position=5, holdings=held)]), notice(1, lane="decode")]
    step = derive(notices, None, SplitRule(1))
    assert step.sharers == [0, 1]
    assert derive(notices).sharers == []
    told = [notice(0, lane="decode", digest=step.digest()), notice(1, lane="decode", digest=derive(notices).digest())]
    with pytest.raises(StepMismatch, match="sharers"):
        derive(told)


def test_captured_steps_are_split_between_all_of_the_epoch_or_not_at_all() -> None:
    rule = SplitRule(64, least_members=3)
    assert rule.sharers({0: 1, 1: 0, 2: 0}) == [0, 1, 2]
    assert rule.sharers({0: 1, 2: 0}) == []


@given(st.integers(1, 7), st.floats(1, 1e7), st.floats(0, 1e5), st.floats(0, 1e6), st.floats(0, 1e4))
def test_costs_of_whole_and_split_steps_are_what_was_measured(
    others: int, weights_ns: float, row_ns: float, more_ns: float, more_row_ns: float
) -> None:
    members = others + 1
    measured = []
    for rows in (1, 8):
        whole_ns = weights_ns + rows * row_ns
        measured.append((rows, whole_ns, weights_ns / members + rows * row_ns + more_ns + rows * more_row_ns))
    costs = FeedCosts.of_steps(*measured, others=others)
    for rows, whole_ns, split_ns in measured:
        assert costs.whole(rows) == pytest.approx(whole_ns)
        assert costs.split(rows * members, members) == pytest.approx(split_ns, abs=1)


def test_shares_say_where_each_members_rows_are() -> None:
    shares = FeedShares(5, ((1, 2), (3, 0), (5, 4)))
    assert (shares.part, shares.parts, shares.total) == (2, 3, 6)
    assert [shares.range_of(rank) for rank in (1, 3, 5)] == [range(2), range(2, 2), range(2, 6)]
    assert shares.homes(8) == [0, 0, 2, 2, 2, 2, -1, -1]
    assert shares.inner(300) == range(200, 300)
    assert shares.vocabulary(10) == [range(4), range(4, 7), range(7, 10)]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 3), st.data())
def test_each_row_of_all_stands_for_one_own_or_padding_row(counts: list[int], more: int, data: st.DataObject) -> None:
    rank = data.draw(st.sampled_from(range(len(counts))))
    shares, room = FeedShares(rank, tuple(enumerate(counts))), sum(counts) + more
    own, homes = shares.own_rows(room), shares.homes(room)
    assert sorted(own) == list(range(room))
    assert [row for row, home in zip(own, homes, strict=True) if home == rank] == list(range(counts[rank]))


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_of_a_feed_add_up_to_it(parts: int) -> None:
    seeded = torch.Generator().manual_seed(0)
    gate_up, down = (torch.randn(shape, generator=seeded, dtype=torch.float64) for shape in ((80, 24), (24, 40)))
    feed, h_TE = Dense(gate_up, down, "silu"), torch.randn(7, 24, generator=seeded, dtype=torch.float64)
    shares = [FeedShares(rank, tuple((its, 0) for its in range(parts))).inner(40) for rank in range(parts)]
    added = sum(feed.run_dims(h_TE, inner, "torch") for inner in shares)
    torch.testing.assert_close(added, feed.run(h_TE, None, "torch"), rtol=1e-12, atol=1e-12)


def fused(kind: str) -> FusedDecoder:
    model = make(KNOWN[kind], torch.float32)
    assert model.fuse("torch") is None
    assert model.fused is not None
    return model.fused


@pytest.mark.parametrize("kind", ["llama", "gemma2, norms of what is added, capped logits"])
def test_dense_models_can_be_shared(kind: str) -> None:
    assert fused(kind).can_share


def test_experts_cannot() -> None:
    assert not fused("mixtral, weights in fp32").can_share


@pytest.mark.parametrize("rows", [(3, 0), (0, 2), (2, 1, 4), (1, 0, 0)])
def test_instances_make_of_their_rows_what_each_would_alone(rows: tuple[int, ...]) -> None:
    """Feeds and logits, by Gloo; with rows on all, and with instances that only help."""
    decoder = fused("llama")
    feed, head = decoder.feeds()[0], decoder.matrices()[-1]
    assert isinstance(feed, Dense)
    assert isinstance(head, torch.Tensor)
    size, (store, address) = len(rows), open_store("127.0.0.1", 20)
    seeded = torch.Generator().manual_seed(0)
    h_TEs = [torch.randn(count, head.shape[1], generator=seeded) for count in rows]
    norm = Norm(torch.randn(head.shape[1], generator=seeded), 1e-5)
    got: dict[int, tuple[torch.Tensor, ...]] = {}
    costs: dict[int, FeedCosts] = {}

    def member(rank: int) -> None:
        group = EpochGroup(
            store_address=address, host="127.0.0.1", name="t", rank=rank, size=size, device=torch.device("cpu"), timeout_s=20
        ).meet()
        feeds = SharedFeeds(Exchange(group.group, torch.device("cpu")), decoder, "torch")
        costs[rank] = FeedCosts.agreed([unpack(told) for told in group.hear_all("c", pack(feeds.measure(range(size), rank)))])
        feeds.plan(FeedShares(rank, tuple(enumerate(rows))))
        x_TE = h_TEs[rank].clone()
        got[rank] = feeds.sum(feeds.run(feed, h_TEs[rank], x_TE, norm, first=None)), x_TE, feeds.logits(head, None, h_TEs[rank])
        assert feeds.take_waited_ns() > 0

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store is not None
    for rank, h_TE in enumerate(h_TEs):
        want: Any = feed.run(rms_norm(2 * h_TE, norm, backend="torch"), None, "torch"), 2 * h_TE, h_TE @ head.T
        torch.testing.assert_close(got[rank], want, rtol=1e-4, atol=1e-5)
    assert len(set(costs.values())) == 1


@pytest.mark.parametrize(("text", "rows"), [("off", 0), ("0", 0), ("12", 12), ("auto", "auto")])
def test_the_flag_is_read(text: str, rows: int | str) -> None:
    assert parse_elastic(text) == rows


@pytest.mark.parametrize("text", ["on", "-1", "1.5", ""])
def test_what_it_cannot_be_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="is neither off, nor auto, nor a number of rows"):
        parse_elastic(text)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ranks": 2}, "--elastic-tp 4 is for instances that each have all weights: these are split between 2 ranks"),
        ({"quantize": "int8"}, "--elastic-tp 4 splits weights of 16 or 32 bits, and doesn't go with --quantize int8"),
    ],
)
def test_what_it_does_not_go_with_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_sharing(4, **({"ranks": 1, "quantize": "none"} | given))
