"""Tables of blocks for layers that see but a window or a chunk: what is trimmed, and what others can begin with."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.layout import read_run
from distattn.shape import groups_of
from gmanager.wire import footprint
from instance.needs import most_blocks
from instance.rmanager import RManager
from kvstore.ranges import whole_blocks
from kvstore.run import Run
from kvstore.sight import FULL, Sight

SIGHTS = st.one_of(
    st.builds(lambda n: Sight(window=n), st.integers(1, 12)), st.builds(lambda n: Sight(chunk=n), st.integers(1, 12))
)


@given(st.lists(st.integers(1, 50), max_size=8), st.integers(0, 2000))
def test_as_many_tokens_are_held_as_blocks_are_enough_for(most: list[int], blocks: int) -> None:
    length = footprint.held(blocks, most)
    assert footprint.taken(length, most) <= blocks < footprint.taken(length + 1, most)


@given(SIGHTS, st.integers(0, 60))
def test_a_sight_knows_the_first_row_that_sees_nothing_before(sight: Sight, position: int) -> None:
    rows = [row for row in range(200) if all(sight.first(later) >= position for later in range(row, 200))]
    assert sight.sees_from(position) == rows[0]


@pytest.mark.parametrize(
    ("sights", "tables", "layers"),
    [
        ([FULL] * 32, 1, 32),
        ([Sight(window=8)] * 32, 8, 4),
        ([Sight(chunk=8)] * 3, 3, 1),
        ([Sight(window=8)], 1, 1),
        ([Sight(window=8), Sight(window=4)] * 2, 2, 4),
        ([Sight(window=8), FULL] * 12, 2, 12),
        (([Sight(window=8)] * 5 + [FULL]) * 10 + [Sight(window=8)] * 2, 7, 10),  # the shape of Gemma 3 27B
        ([Sight(window=8)] * 31 + [FULL], 7, 6),  # no more tables than a step can bear
        ([FULL, FULL, Sight(window=8), Sight(chunk=8)], 3, 2),
    ],
)
def test_layers_are_put_in_tables_of_blocks_of_one_size(sights: list[Sight], tables: int, layers: int) -> None:
    groups = groups_of(tuple(sights))
    assert (len(groups.sights), groups.layers_of_block) == (tables, layers)
    assert [groups.sights[group] for group in groups.group_of] == sights
    places = list(zip(groups.group_of if groups.are_apart else [0] * len(sights), groups.place_of, strict=True))
    assert len(set(places)) == len(places), "no two layers lie in one place"


@given(
    st.lists(st.sampled_from([FULL, Sight(window=8), Sight(window=4), Sight(chunk=8)]), min_size=1, max_size=40),
    st.lists(st.integers(1, 39), max_size=4),
)
def test_stages_have_the_tables_of_the_whole(sights: list[Sight], cuts: list[int]) -> None:
    """Whichever layers each has, and with places for no more of them than it needs."""
    whole = groups_of(tuple(sights))
    ends = [0, *sorted({cut for cut in cuts if cut < len(sights)}), len(sights)]
    for start, stop in itertools.pairwise(ends):
        own = sights[start:stop]
        groups = groups_of(tuple(own), tuple(sights))
        assert (groups.sights, groups.windows) == (whole.sights, whole.windows)
        assert [groups.sights[group] for group in groups.group_of] == own
        places = list(zip(groups.group_of if groups.are_apart else [0] * len(own), groups.place_of, strict=True))
        assert len(set(places)) == len(places), "no two layers lie in one place"
        if groups.are_apart:
            fewest = max(-(-own.count(sight) // whole.sights.count(sight)) for sight in own)
            assert groups.layers_of_block == fewest


class Kept:
    """An rManager, and what lies in each block of which table: the tokens up to each position, as these make its KV."""

    def __init__(self, sights: list[Sight], size: int, chunk: int) -> None:
        self.sights, self.size, self.chunk = sights, size, chunk
        self.most = [most_blocks(sight, size, chunk) for sight in sights]
        self.rmanager = RManager(200, size, windows=sights, chunk_tokens=chunk)
        self.rmanager.caches = True
        self.written: dict[tuple[int, int], tuple[int, ...]] = {}
        """(table, slot) -> the tokens up to the one that lies there."""
        self.tokens: dict[int, tuple[int, ...]] = {}

    def write(self, seq: int, start: int, stop: int) -> None:
        """A step: what its rows see must be there."""
        self.rmanager.trim(seq, start)
        slots = [self.rmanager.append(seq, start, stop), *self.rmanager.shards.window_slots(seq, start, stop)]
        for table, its in enumerate(slots):
            for slot, position in zip(its, range(start, stop), strict=True):
                for other in range(len(slots)):
                    self.written.pop((other, slot), None)
                self.written[table, slot] = self.tokens[seq][: position + 1]
        for table, sight in enumerate([FULL, *self.sights]):
            seen: dict[int, set[tuple[int, ...]]] = {row: set() for row in range(start, stop)}
            for run in self.rmanager.shards[seq].runs:
                self.read(run, table, sight, start, stop, seen)
            for row, its_tokens in seen.items():
                assert its_tokens == {self.tokens[seq][: p + 1] for p in range(sight.first(row), row + 1)}
        for run in self.rmanager.shards[seq].runs:
            for window, most in zip(run.windows, self.most, strict=True):
                assert len(window.block_ids) <= most

    def read(self, run: Run, table: int, sight: Sight, start: int, stop: int, seen: dict[int, set[tuple[int, ...]]]) -> None:
        reading = read_run(run, 0, start, stop, sight, table)
        if reading is None:
            return
        slots = [block * self.size + i for block in reading.block_ids for i in range(self.size)]
        for row, (first, length) in enumerate(
            zip(reading.starts or [0] * reading.num_rows, reading.kv_lens, strict=True), start
        ):
            seen[row] |= {self.written[table, slot] for slot in slots[first:length]}

    def begin(self, seq: int, tokens: tuple[int, ...], done: int, branch: int = 0) -> bool:
        """Its prompt, of which so much is shared. `branch`: where others parted from it."""
        self.tokens[seq] = tokens
        length = -(-(len(tokens) - done) // self.size) + 2
        if not self.rmanager.reserve(seq, footprint.taken(length, self.most)):
            self.rmanager.drop(seq)
            return False
        self.rmanager.wake(seq, len(tokens) - 1, branch=branch)
        for start in range(done, len(tokens), self.chunk):
            self.write(seq, start, min(len(tokens), start + self.chunk))
        self.rmanager.end_prompt(seq)
        self.rmanager.publish(seq, len(tokens) - 1)
        return True

    def go_on(self, seq: int, tokens: tuple[int, ...]) -> None:
        for token in tokens:
            end = len(self.tokens[seq])
            if not self.rmanager.grant(seq, end):
                return
            self.tokens[seq] += (token,)
            self.write(seq, end, end + 1)


@settings(max_examples=200)
@given(st.data())
def test_who_begins_as_another_did_sees_what_that_one_saw(data: st.DataObject) -> None:
    sights = data.draw(st.lists(SIGHTS, min_size=1, max_size=2))
    kept = Kept(sights, data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([3, 8, 64])))
    texts = st.lists(st.integers(0, 1), min_size=1, max_size=30).map(tuple)
    live: list[int] = []
    for seq in range(1, data.draw(st.integers(2, 12))):
        known = [*live, *kept.rmanager.shards.cache]
        source = data.draw(st.sampled_from([0, *known]))
        done = 0
        tokens = data.draw(texts)
        if source:
            told = kept.rmanager.take_reusable() | {s: kept.rmanager._reusable(s) for s in known}
            common = data.draw(st.integers(0, len(kept.tokens[source])))
            tokens = kept.tokens[source][:common] + tokens
            runs = [run for its in told[source] if (run := whole_blocks(its, min(common, len(tokens) - 1), kept.size))]
            end = max((run[-1][1] for run in runs), default=0)
            follow = [*kept.rmanager.branches(source), (kept.rmanager.since(source), end)]
            may = bool(runs) and any(first <= end <= last for first, last in follow)
            assert kept.rmanager.share(seq, source, runs) == may
            done = end if may else 0
        if not kept.begin(seq, tokens, done, data.draw(st.integers(0, len(tokens)))):
            continue
        kept.go_on(seq, data.draw(texts))
        live.append(seq)
        kept.rmanager.validate()
        while len(live) > data.draw(st.integers(0, 3)):
            gone = live.pop(0)
            (kept.rmanager.retire if data.draw(st.booleans()) else kept.rmanager.free)(gone)
            kept.rmanager.validate()
    for seq in live:
        kept.rmanager.retire(seq)
    kept.rmanager.keep([])
    kept.rmanager.validate()
    assert kept.rmanager.shards.pool.num_free == 200


def test_what_all_rows_of_a_sequence_see_is_kept_and_no_more() -> None:
    """A prompt of 40 tokens and 30 more by a window of 8; the prompt's end can be begun with."""
    kept = Kept([Sight(window=8)], 2, 6)
    assert kept.begin(1, tuple(range(40)), 0)
    kept.go_on(1, tuple(range(30)))
    (run,) = kept.rmanager.shards[1].runs
    (window,) = run.windows
    assert (len(run.block_ids), window.first, window.stop) == (35, 29, 35)
    kept.rmanager.retire(1)
    assert kept.rmanager.take_reusable()[1] == [[(0, 38)]], "what was generated is of no use: the window between is gone"
    assert kept.rmanager.since(1) == 33
    assert not kept.rmanager.share(2, 1, [[(0, 32)]])
    assert kept.rmanager.share(2, 1, [[(0, 34)]])
    assert kept.begin(2, (*range(34), 7, 7, 7), 34)


def test_what_is_seen_where_others_parted_is_kept_and_handed_on() -> None:
    kept = Kept([Sight(window=4)], 2, 4)
    assert kept.begin(1, tuple(range(40)), 0, branch=13)
    assert kept.rmanager.branches(1) == [(11, 13)]
    kept.rmanager.retire(1)
    assert not kept.rmanager.share(2, 1, [[(0, 10)]])
    assert not kept.rmanager.share(2, 1, [[(0, 14)]])
    assert kept.rmanager.share(2, 1, [[(0, 12)]])
    kept.rmanager.keep([])  # the first goes
    assert kept.begin(2, (*range(12), *[7] * 20), 12)
    kept.rmanager.retire(2)
    assert kept.rmanager.branches(2) == [(11, 12)]
    assert kept.rmanager.share(3, 2, [[(0, 12)]])
    assert kept.begin(3, (*range(12), *[8] * 20), 12)


def test_a_branch_for_which_there_is_no_room_is_not_kept() -> None:
    kept = Kept([Sight(window=4)], 2, 4)
    kept.tokens[1] = tuple(range(40))
    assert kept.rmanager.reserve(1, footprint.taken(22, kept.most))
    assert kept.rmanager.reserve(2, kept.rmanager.free_blocks)
    kept.rmanager.wake(1, 39, branch=12)
    for start in range(0, 40, 4):
        kept.write(1, start, start + 4)
    assert kept.rmanager.branches(1) == []
    kept.rmanager.validate()


def test_a_short_sequence_can_be_gone_on_with_from_its_end() -> None:
    kept = Kept([Sight(window=50)], 2, 6)
    assert kept.begin(1, tuple(range(10)), 0)
    kept.go_on(1, tuple(range(10)))
    kept.rmanager.retire(1)
    assert kept.rmanager.take_reusable()[1] == [[(0, 20)]]
    assert kept.rmanager.since(1) == 0


def test_room_is_made_of_the_oldest_that_is_over_and_then_of_anchors() -> None:
    kept = Kept([Sight(window=4)], 1, 4)
    for seq in (1, 2):
        assert kept.begin(seq, tuple(range(seq, seq + 20)), 0)
        kept.go_on(seq, tuple(range(12)))
    kept.rmanager.retire(1)
    kept.rmanager.take_reusable()
    free = kept.rmanager.shards.pool.num_free
    assert kept.rmanager.reserve(3, free + 1)
    assert kept.rmanager.take_reusable() == {1: []}, "it goes as a whole"
    assert kept.rmanager.evicted_blocks == 1
    assert kept.rmanager.reserve(3, kept.rmanager.free_blocks)
    assert kept.rmanager.take_reusable() == {2: []}, "it goes on, and cannot be begun with any more"
    kept.rmanager.free(3)
    kept.go_on(2, (1, 2, 3))
    kept.rmanager.retire(2)
    kept.rmanager.validate()
    assert kept.rmanager.shards.pool.num_free == 200


def test_a_run_that_was_cut_before_what_is_left_of_its_window_is_not_gone_on_with() -> None:
    """Its last step is not known to have run, and wrote where the tokens before had been."""
    kept = Kept([Sight(window=1)], 4, 8)
    kept.tokens[1] = tuple(range(80))
    assert kept.rmanager.reserve(1, footprint.taken(21, kept.most))
    kept.rmanager.wake(1, 79)
    for start in range(0, 48, 8):
        kept.write(1, start, start + 8)
    assert kept.rmanager.settle([(1, 32), (1, 40)]) == {}, "whoever holds what follows it can't use that either"
    kept.rmanager.validate()
    assert kept.rmanager.free_blocks == 200


def test_rows_may_fill_gaps_of_what_is_shared_while_nothing_of_it_is_gone() -> None:
    kept = Kept([Sight(window=6)], 4, 64)
    assert kept.begin(1, tuple(range(20)), 0)
    assert kept.rmanager.since(1) == 0
    assert kept.rmanager.share(2, 1, [[(0, 16)]])
    (run,) = kept.rmanager.shards[2].runs
    (window,) = run.windows
    assert (window.first, window.stop) == (0, 4), "not only what rows behind all of it see"


def test_runs_that_waste_more_in_windows_than_was_reserved_take_what_is_free() -> None:
    kept = Kept([Sight(window=8)], 4, 4)
    kept.tokens[1] = tuple(range(30))
    assert kept.rmanager.reserve(1, 5)
    kept.rmanager.wake(1, 29)
    for start, stop in ((0, 1), (5, 9), (1, 5), (9, 13)):  # the third opens another run
        kept.rmanager.append(1, start, stop)
    assert len(kept.rmanager.shards[1].runs) == 2
    kept.rmanager.validate()


def test_a_run_that_came_behind_the_anchor_is_none_of_it() -> None:
    """Its home has generated more than a window since it was asked about, and then took over what another held."""
    kept = Kept([Sight(window=4)], 2, 8)
    assert kept.begin(1, tuple(range(20)), 0)
    kept.go_on(1, tuple(range(12)))
    assert kept.rmanager.reserve(9, 3)
    kept.rmanager.note_copy(9, [(40, 44)], [1])
    assert kept.rmanager.adopt(9, 1)
    kept.rmanager.retire(1)
    assert kept.rmanager.take_reusable()[1] == [[(0, 18)]]
    assert not kept.rmanager.share(2, 1, [[(0, 18)], [(40, 44)]])
    assert kept.rmanager.share(2, 1, [[(0, 18)]])
    kept.rmanager.validate()


def test_what_ends_before_a_window_is_shared_with_a_row_that_comes_later() -> None:
    """Tokens 0 to 63 lie here, those that follow on another instance: nothing of a window is here."""
    kept = Kept([Sight(window=8)], 4, 16)
    kept.tokens[1] = tuple(range(128))
    assert kept.rmanager.reserve(1, footprint.taken(18, kept.most))
    kept.rmanager.wake(1, 127)
    for start in range(0, 64, 16):
        kept.write(1, start, start + 16)
    kept.rmanager.trim(1, 112)
    kept.rmanager.end_prompt(1)
    kept.rmanager.publish(1, 127)
    assert kept.rmanager.since(1) == 71
    assert not kept.rmanager.share(2, 1, [[(0, 64)]])
    assert kept.rmanager.share(2, 1, [[(0, 64)]], row=124)
    kept.rmanager.wake(2, 130)
    kept.rmanager.publish(2, 130)
    assert kept.rmanager.share(3, 2, [[(0, 64)]], row=124), "and so on"
    kept.rmanager.validate()
