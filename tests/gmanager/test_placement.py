"""Placement, limits, targets and victims: numbers in, numbers out."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.cluster.parties import connected
from gmanager.cluster.placement import (
    LEAST_SHARE,
    LONG_PROMPT,
    PARALLEL_EFFICIENCY,
    Candidate,
    InstanceView,
    choose_target,
    choose_victim,
    degree,
    most_tokens,
    place,
    place_rest,
    prompt_work,
    why_never,
)
from gmanager.config import GManagerConfig, Spread, parse_spread
from gmanager.wire.messages import Refusal
from kvstore.shard import Shard

frees = st.lists(st.integers(0, 40), min_size=1, max_size=6)
spreads = st.one_of(st.sampled_from(["auto", "all"]), st.integers(1, 8))


def views(free: list[int], total: int = 40, homes: list[int] | None = None) -> list[InstanceView]:
    return [
        InstanceView(rank=rank, free_blocks=blocks, total_blocks=total, homes=homes[rank] if homes else 0, max_homes=4)
        for rank, blocks in enumerate(free)
    ]


def shares(free: list[int], tokens: int, spread: Spread, block_size: int = 4) -> list[tuple[int, int]] | None:
    placement = place(views(free), tokens=tokens, block_size=block_size, spread=spread)
    return placement and [(share.rank, share.tokens) for share in placement.shares]


@given(frees, st.integers(1, 500), st.integers(1, 16), spreads)
def test_shares_sum_up_fit_and_are_even(free: list[int], tokens: int, block_size: int, spread: Spread) -> None:
    placement = place(views(free), tokens=tokens, block_size=block_size, spread=spread)
    num_blocks = -(-tokens // block_size)
    if placement is None:
        able = len(free) if spread == "all" else 1 if spread == "auto" else spread
        with_room = [blocks for blocks in free if blocks > 1]
        assert sum(blocks - 1 for blocks in with_room) < num_blocks or len(with_room) < min(able, num_blocks, len(free))
        return
    got = {share.rank: share.tokens for share in placement.shares}
    assert len(got) == len(placement.shares)
    assert sum(got.values()) == tokens
    for i, share in enumerate(placement.shares):
        assert share.tokens > 0
        assert i == 0 or share.tokens % block_size == 0
        assert placement.blocks[share.rank] == -(-share.tokens // block_size) + 1 <= free[share.rank]
    uncapped = [n for rank, n in got.items() if placement.blocks[rank] < free[rank]]
    if uncapped:
        assert max(got.values()) - min(uncapped) <= block_size
    home = placement.shares[0].rank
    assert free[home] == max(free)
    assert list(placement.blocks) == [share.rank for share in placement.shares]


@given(frees, st.integers(1, 500), spreads)
def test_no_fewer_participants_than_asked_and_no_more_than_needed(free: list[int], tokens: int, spread: Spread) -> None:
    got = shares(free, tokens, spread)
    if got is None:
        return
    num_blocks = -(-tokens // 4)
    asked = len(free) if spread == "all" else 1 if spread == "auto" else spread
    caps = sorted((blocks - 1 for blocks in free), reverse=True)
    needed = next(k for k in range(1, len(free) + 1) if sum(caps[:k]) >= num_blocks)
    assert len(got) == max(needed, min(asked, len(free), num_blocks))


def test_literal_placements() -> None:
    assert shares([10, 10], 10, "auto") == [(0, 10)]
    assert shares([9, 10], 10, "auto") == [(1, 10)]
    assert shares([10, 10], 10, 2) == [(0, 6), (1, 4)]
    assert shares([10, 10], 16, "all") == [(0, 8), (1, 8)]
    assert shares([10, 10, 10], 3, "all") == [(0, 3)]
    assert shares([10, 3], 40, "auto") == [(0, 32), (1, 8)]
    assert shares([10, 3], 41, "auto") == [(0, 33), (1, 8)]
    assert shares([10, 3], 45, "auto") is None
    assert shares([10, 1], 8, 2) is None, "a promise: wait until two have room"
    assert shares([1, 1], 1, "auto") is None


def test_the_home_is_where_fewest_homes_are_among_equals() -> None:
    placement = place(views([10, 10, 10], homes=[2, 1, 1]), tokens=8, block_size=4, spread="auto")
    assert placement is not None
    assert placement.shares[0].rank == 1


def test_the_home_can_decode_another() -> None:
    """Though others have more room; and a prompt waits where none can."""
    placement = place(views([10, 6, 3], homes=[4, 3, 4]), tokens=24, block_size=4, spread=2)
    assert placement is not None
    assert [(share.rank, share.tokens) for share in placement.shares] == [(1, 12), (0, 12)]
    assert place(views([10, 6, 3], homes=[4, 4, 4]), tokens=4, block_size=4, spread="auto") is None
    assert choose_target(views([9, 5, 3], homes=[0, 4, 3]), home=0) == 2


def test_long_prompts_are_spread_if_all_end_sooner() -> None:
    """By the formula: with two instances an even number runs one each; of an odd number one is spread."""
    idle = {1: [0, 0], 2: [0, 0]}
    assert [degree(131072, [131072] * behind, idle, 25_000) for behind in range(4)] == [2, 1, 2, 1]
    assert degree(131072, [100] * 50, idle, 25_000) == 2, "short prompts are no reason"
    assert degree(LONG_PROMPT - 1, [], idle, 25_000) == 1
    work = prompt_work(131072, 25_000)
    assert degree(131072, [], {1: [0, 2 * work], 2: [0, 2 * work]}, 25_000) == 1, "rather than wait for one that is busy"
    assert degree(131072, [], {1: [work, work], 2: [work, work]}, 25_000) == 2
    assert degree(131072, [131072], {2: [0, 0]}, 25_000) == 2, "there is no choice"
    assert prompt_work(25_000, 25_000) == 37_500


@given(st.lists(st.integers(LONG_PROMPT, 10**6), max_size=5), st.lists(st.floats(0, 1e8), min_size=1, max_size=5))
def test_no_other_degree_ends_sooner(waiting: list[int], backlogs: list[float]) -> None:
    """Played out: each of `count` instances is busy with a prompt as long as the others of it."""
    tokens, reach = 200_000, 25_000

    def last_end(count: int) -> float:
        busy = list(backlogs)
        for length in sorted([tokens, *waiting], reverse=True):
            first = sorted(range(len(busy)), key=lambda i: busy[i])[:count]
            seconds = prompt_work(length, reach) / (count * PARALLEL_EFFICIENCY if count > 1 else 1)
            end = max(busy[i] for i in first) + seconds
            for i in first:
                busy[i] = end
        return max(busy)

    chosen = degree(tokens, waiting, dict.fromkeys(range(1, len(backlogs) + 1), backlogs), reach)
    assert last_end(chosen) <= min(map(last_end, range(1, len(backlogs) + 1))) * (1 + 1e-9)


def test_a_long_prompt_takes_all_that_have_room() -> None:
    assert shares([5000, 5000, 1], LONG_PROMPT, "auto") == [(0, 4096), (1, 4096)]
    assert shares([5000, 5000, 1], LONG_PROMPT - 1, "auto") == [(0, LONG_PROMPT - 1)]


def test_auto_chooses_those_with_least_to_prefill() -> None:
    """Of those with room for an even share: the formula counts on them, so they are the ones that take part."""

    def chosen(free: list[int], backlogs: list[float], tokens: int) -> list[int]:
        seen = [replace(view, backlog=backlog) for view, backlog in zip(views(free), backlogs, strict=True)]
        placement = place(seen, tokens=tokens, block_size=4, spread="auto", reach=25_000)
        assert placement is not None
        return [share.rank for share in placement.shares]

    busy = 10 * prompt_work(20_000, 25_000)
    assert chosen([9000, 8000], [busy, 0], 400) == [1]
    assert chosen([9000, 8000], [LONG_PROMPT - 1, 0], 400) == [0], "as much as nothing"
    assert chosen([9000, 8000, 7000], [busy, 0, 0], 20_000) == [1, 2]
    assert chosen([9000, 8000, 50], [busy, 0, 0], 20_000) == [1], "the third is free to prefill, but has no room"
    assert chosen([9000, 3000, 3000], [busy, 0, 0], 20_000) == [1, 2], "neither has room for all of it"
    assert chosen([100, 80], [busy, 0], 500) == [0, 1], "there is room only in both"


def rest(
    free: list[int], missing: int, kept: dict[int, tuple[int, int]], spread: Spread = "auto", homes: list[int] | None = None
) -> tuple[list[tuple[int, int]], dict[int, int]] | None:
    placement = place_rest(views(free, homes=homes), missing=missing, kept=kept, block_size=4, spread=spread)
    return placement and ([(share.rank, share.tokens) for share in placement.shares], placement.blocks)


def test_the_rest_is_computed_where_most_lies() -> None:
    """With room for a run more, and for a part-filled block in each that there is; ranks beside it are not touched."""
    assert rest([10, 10], 1, {1: (20, 1)}) == ([(1, 1)], {1: 4})
    assert rest([40, 10, 10], 5, {1: (8, 1), 2: (9, 3)}) == ([(2, 5)], {2: 7})
    assert rest([10, 10], 5, {0: (8, 1), 1: (8, 1)}) == ([(0, 5)], {0: 5}), "of equals the lowest rank"
    assert rest([40, 40], 1, {1: (20, 1)}, spread="all") == ([(1, 1)], {1: 4}), "one block is not spread"
    assert rest([40, 40], 9, {1: (20, 1)}, spread=2) == ([(0, 5), (1, 4)], {0: 4, 1: 4})


def test_the_rest_goes_elsewhere_where_most_has_no_room() -> None:
    assert rest([10, 10, 3], 5, {2: (20, 1), 1: (8, 1)}) == ([(1, 5)], {1: 5}), "where less of it lies"
    assert rest([10, 3, 3], 5, {2: (20, 1), 1: (8, 1)}) == ([(0, 5)], {0: 4}), "where nothing does"
    assert rest([6, 5], 13, {0: (20, 1)}) == ([(0, 5), (1, 8)], {0: 5, 1: 4}), "some of it"
    assert rest([10, 10], 5, {0: (20, 1)}, homes=[4, 0]) == ([(1, 5)], {1: 4}), "it can't decode another"
    assert rest([3, 2], 1, {0: (20, 1)}) is None
    assert rest([10, 10], 5, {0: (20, 1)}, homes=[4, 4]) is None


def test_a_long_rest_is_spread_as_a_prompt() -> None:
    """What is short stays where most lies, however long the whole is."""
    kept = {0: (100_000, 1)}
    short, long = (rest([5000, 5000], missing, kept) for missing in (LONG_PROMPT - 1, LONG_PROMPT))
    assert short is not None and [rank for rank, _ in short[0]] == [0]
    assert long is not None and sorted(long[0]) == [(0, 4096), (1, 4096)]


@given(frees, st.integers(1, 200), st.data(), spreads)
def test_a_rest_fits_and_leaves_the_spare(free: list[int], missing: int, data: st.DataObject, spread: Spread) -> None:
    parts = st.tuples(st.integers(1, 99), st.integers(1, 3))
    kept = data.draw(st.dictionaries(st.integers(0, len(free) - 1), parts))
    placed = rest(free, missing, kept, spread)
    if placed is None:
        return
    shares, blocks = placed
    assert sum(tokens for _, tokens in shares) == missing
    for rank, tokens in shares:
        assert tokens > 0
        assert blocks[rank] == -(-tokens // 4) + 2 + kept.get(rank, (0, 0))[1] <= free[rank]


@given(st.lists(st.sampled_from(["here", "there", "missing", "missing, of another"]), min_size=1, max_size=60), st.data())
def test_the_blocks_of_a_rest_suffice(owners: list[str], data: st.DataObject) -> None:
    """However the runs came to be and wherever the gaps lie: each token finds its place, and the spare is left."""
    shard = Shard(4)
    shard.spare = list(range(1000))
    here = [position for position, owner in enumerate(owners) if owner == "here"]
    pieces = [here[i : i + 3] for i in range(0, len(here), 3)]
    for piece in data.draw(st.permutations(pieces)):
        for position in piece:
            shard.append(position, position + 1)
    shard.take_spare()
    mine = [position for position, owner in enumerate(owners) if owner == "missing"]
    if not mine:
        return
    placed = rest([100], len(mine), {0: (shard.num_tokens, len(shard.runs))} if here else {})
    assert placed is not None
    shard.spare = list(range(1000, 1000 + placed[1][0]))
    for position in mine:
        shard.append(position, position + 1)
    assert shard.spare, "the one into which generation grows"


def never(prompt: int, max_tokens: int, total_blocks: list[int]) -> Refusal | None:
    return why_never(
        prompt=prompt,
        max_tokens=max_tokens,
        max_context=2_000_000,
        most_held=most_tokens(total_blocks, 64),
        cell="main",
        total_blocks=total_blocks,
        block_size=64,
    )


def test_the_error_carries_the_arithmetic() -> None:
    assert never(1_048_560, 16, [3072] * 4) == Refusal(
        "never",
        "prompt of 1,048,560 + max_tokens of 16 = 1,048,576 tokens: needs 1,048,576 tokens of KV; "
        "cell 'main' holds 786,432 (4 instances x 196,608), less one spare block of 64 on each",
    )
    assert "cell 'main' holds 192 (2 instances: 64 + 128)" in str(never(200, 1, [1, 2]))
    assert never(1_999_999, 2, [100_000]) == Refusal(
        "too_long", "prompt of 1,999,999 + max_tokens of 2 = 2,000,001 tokens; the model takes at most 2,000,000"
    )
    assert never(64, 64, [3]) is None
    assert never(64, 65, [3]) is not None


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 200), st.integers(1, 200), spreads)
def test_what_can_ever_be_served_can_be_placed_in_an_empty_cell(
    totals: list[int], prompt: int, max_tokens: int, spread: Spread
) -> None:
    held = most_tokens(totals, 4)
    limits = {"max_context": 10_000, "most_held": held, "cell": "main", "total_blocks": totals, "block_size": 4}
    if why_never(prompt=prompt, max_tokens=max_tokens, **limits) is not None:  # type: ignore[arg-type]
        return
    empty = [InstanceView(rank=r, free_blocks=n, total_blocks=n, homes=0, max_homes=1) for r, n in enumerate(totals)]
    for tokens in (prompt, prompt + max_tokens - 1):
        assert place(empty, tokens=tokens, block_size=4, spread=spread) is not None


def test_targets() -> None:
    assert choose_target(views([0, 5, 9]), home=0) == 2
    assert choose_target(views([0, 5, 9]), home=2) == 1
    assert choose_target(views([0, 1, 1]), home=0) is None
    assert choose_target(views([0, 1, 1]), home=0, reserve=1) == 1
    assert choose_target(views([9, 3, 3], homes=[0, 2, 1]), home=0) == 2


def test_victims() -> None:
    assert choose_victim([]) is None
    assert choose_victim([Candidate(7, 1, 5, 0)]) is None
    assert choose_victim([Candidate(7, 1, 5, 0), Candidate(8, 2, 90, 0), Candidate(9, 3, 50, 0)]) == 9
    assert choose_victim([Candidate(9, 3, 50, 0), Candidate(8, 2, 50, 0), Candidate(7, 1, 5, 0)]) == 9
    assert choose_victim([Candidate(7, 1, 5, 0, 1), Candidate(8, 2, 3, 0), Candidate(9, 3, 50, 0)]) == 7, (
        "the oldest, of a lower level"
    )
    assert choose_victim([Candidate(7, 1, 5, 0, -1), Candidate(8, 2, 3, 0, 2), Candidate(9, 3, 90, 0, 2)]) == 8


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-2, 2)), min_size=2, max_size=8))
def test_nobody_gives_way_to_a_lower_priority(running: list[tuple[int, int]]) -> None:
    """Whichever of them is the one that needs room."""
    victim = choose_victim(Candidate(seq, seq, tokens, 0, priority) for seq, (tokens, priority) in enumerate(running))
    assert victim is not None
    assert running[victim][1] == max(priority for _, priority in running)
    first = min(range(len(running)), key=lambda seq: (running[seq][1], seq))
    assert victim != first, "one goes on to its end"


@given(st.integers(1, 7), st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=5))
def test_connected_components(size: int, shared: list[list[int]]) -> None:
    shared = [[rank % size for rank in ranks] for ranks in shared]
    parties = connected(size, shared)
    assert sorted(rank for party in parties for rank in party) == list(range(size))
    for ranks in shared:
        assert sum(bool(set(ranks) & set(party)) for party in parties) <= 1
    if not any(len(set(ranks)) > 1 for ranks in shared):
        assert all(len(party) == 1 for party in parties)


@pytest.mark.parametrize(
    "wrong",
    [
        {"spread": 0},
        {"max_queue_wait_s": -1.0},
        {"max_queue_wait_s": float("nan")},
        {"client_lease_s": 0.0},
        {"slo_ttft_s": 0.0},
        {"slo_tpot_s": float("inf")},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        GManagerConfig(**wrong)  # type: ignore[arg-type]


def test_spread_is_parsed() -> None:
    assert [parse_spread(text) for text in ("auto", "all", "3")] == ["auto", "all", 3]
    with pytest.raises(ValueError, match="'many'"):
        parse_spread("many")


def test_some_of_many_instances_are_kept_free_of_long_prompts() -> None:
    """Those with least to prefill; whoever has a short prompt finds them, and memory may want all the same."""
    many = [replace(view, max_homes=64) for view in views([200] * 16, total=200)]
    long = place(many, tokens=4 * LONG_PROMPT, block_size=64, spread="auto")
    assert long is not None
    assert len(long.shares) == 14
    shorter = place(many, tokens=LONG_PROMPT, block_size=64, spread="auto")
    assert shorter is not None
    assert [share.tokens for share in shorter.shares] == [LEAST_SHARE] * 4
    busy = [replace(view, backlog=10**6 if view.rank in long.blocks else 0) for view in many]
    second = place(busy, tokens=LONG_PROMPT, block_size=64, spread="auto")
    assert second is not None
    assert set(second.blocks) <= set(long.blocks), "the same ones"
    short = place(busy, tokens=64, block_size=64, spread="auto")
    assert short is not None
    assert short.shares[0].rank not in long.blocks
    huge = place(busy, tokens=64 * 16 * 199, block_size=64, spread="auto")
    assert huge is not None
    assert len(huge.shares) == 16
    few = place(many[:4], tokens=LONG_PROMPT, block_size=64, spread="auto")
    assert few is not None
    assert len(few.shares) == 4
