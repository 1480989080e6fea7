"""What policies decide: by numbers alone, and in a cluster that is driven by events."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.cluster.events import Deliver
from gmanager.cluster.placement import Candidate, InstanceView
from gmanager.cluster.policies import POLICIES, Outlook, Prompt, Static
from gmanager.config import GManagerConfig, PolicyName
from tests.gmanager.cluster_support import CLIENT, request_stats, serving, submit
from tests.gmanager.test_placement import views


def outlook(free: list[int], *, total: int = 40, waiting: list[int] | None = None) -> Outlook:
    return Outlook(views=views(free, total), block_size=4, reach=8192, waiting=waiting or [])


def test_each_name_is_a_policy() -> None:
    assert set(POLICIES) == set(get_args(PolicyName))
    with pytest.raises(ValueError, match="policy must be one of elastic, static.*, got 'dynamic'"):
        GManagerConfig(policy="dynamic")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 300), st.sampled_from(["auto", "all", 3]))
def test_static_keeps_a_request_inside_one_instance(free: list[int], tokens: int, spread: object) -> None:
    placement = Static().place(Prompt(missing=tokens, spread=spread), outlook(free))  # type: ignore[arg-type]
    blocks = -(-tokens // 4) + 1
    if placement is None:
        assert max(free) < blocks
    else:
        (share,) = placement.shares
        assert share.tokens == tokens
        assert placement.blocks == {share.rank: blocks}
        assert free[share.rank] >= blocks


def test_static_preempts_at_the_home_that_has_no_room() -> None:
    running = [Candidate(1, 1, 90, 0), Candidate(2, 2, 10, 1), Candidate(3, 3, 50, 0), Candidate(4, 4, 70, 0)]
    assert Static().victim(running, 0) == 3
    assert Static().victim(running, 1) is None, "it is alone there: it goes itself"
    crowded = [InstanceView(rank=r, free_blocks=n, total_blocks=40, homes=1, max_homes=4) for r, n in enumerate((0, 30))]
    assert Static().next_home(crowded, 0) is None
    assert Static().last_resort(crowded, 0) is None


def test_static_refuses_what_no_instance_holds_alone() -> None:
    """8 blocks of 4 on each of two: 28 tokens in one with a block to spare, 56 in both."""
    for policy, most in (("static", 28), ("elastic", 56)):
        driver = serving(8, 8, policy=policy)
        driver.say(CLIENT, submit("fits", most - 4, max_tokens=4))
        assert request_stats(driver, "fits").state == "reserving"
        (refusal,) = driver.say(CLIENT, submit("too long", most - 3, max_tokens=4))
        assert isinstance(refusal, Deliver)
        assert refusal.refusal == "never"
        assert ("inside one instance, and the largest holds 28" in (refusal.error or "")) == (policy == "static")
