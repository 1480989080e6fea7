"""Schedulers of several instances through whole lives of sequences, two steps deep, with a made-up device."""

from collections.abc import Callable
from functools import partial

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.layout import HeldRun, Holding
from gmanager.wire.messages import FlipRun, SequenceParams, Share
from instance.step import STRETCH, Handoff, Lane, Step, StepMismatch, derive
from tests.instance.scheduler_support import WINDOWS, FakeCell, token_at


@settings(max_examples=100)
@given(st.data())
def test_lives_of_sequences(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 3))
    cell = FakeCell(
        size,
        blocks=60,
        block_size=data.draw(st.sampled_from([1, 4, 16])),
        chunk_tokens=data.draw(st.sampled_from([1, 7, 64])),
        attends=True,
        windows=data.draw(st.sampled_from(WINDOWS)),
        stages=data.draw(st.sampled_from([1, 1, 2, 3])),
    )
    in_any_order = data.draw(st.booleans())

    def go_on(most: int) -> None:
        for _ in range(most):
            if not in_any_order:
                cell.round()
            elif moves := cell.moves_on():
                data.draw(st.sampled_from(moves))()

    wanted: dict[int, tuple[int, int, int | None]] = {}
    cancelled: set[int] = set()
    for seq in range(1, data.draw(st.integers(1, 5)) + 1):
        ranks = data.draw(st.permutations(range(size)))[: data.draw(st.integers(1, size))]
        shares = [Share(rank=r, tokens=data.draw(st.integers(1, 8))) for r in ranks]
        length = sum(s.tokens for s in shares)
        max_tokens = data.draw(st.integers(1, 12))
        stop_at = data.draw(st.one_of(st.none(), st.integers(0, 11)))
        stop = [token_at(seq, length + stop_at)] if stop_at is not None else []
        if cell.admit(seq, shares, max_tokens, stop):
            wanted[seq] = (length, max_tokens, stop[0] if stop else None)
        go_on(data.draw(st.integers(0, 20 if in_any_order else 6)))
        live = [s for s in wanted if s not in cell.released]
        commands: list[Callable[[], None]] = []
        if live and data.draw(st.booleans()):
            moved, to = data.draw(st.sampled_from(live)), data.draw(st.integers(0, size - 1))
            commands.append(partial(cell.move, moved, to))
        for seq_ in live:
            source, target = data.draw(st.permutations(range(max(2, size))))[:2]
            if max(source, target) < size and data.draw(st.booleans()):
                cell.copy(seq_, source, target, data.draw(st.integers(0, 2)))
            if data.draw(st.booleans()):
                commands.append(partial(cell.flip, seq_))
        if live and data.draw(st.integers(0, 4)) == 0:
            gone = data.draw(st.sampled_from(live))
            cancelled.add(gone)
            commands.append(partial(cell.cancel, gone))
        for command in commands:
            if in_any_order or data.draw(st.booleans()):
                command()
            else:
                cell.round(command)
    if in_any_order:
        for _ in range(5000):
            if not (moves := cell.moves_on()):
                break
            moves[data.draw(st.integers(0, 3)) % len(moves)]()
    for seq in wanted:
        cell.flip(seq)
    cell.drain()
    for need in list(dict.fromkeys(cell.needs)):  # nobody moves them here: give up
        cancelled.add(need)
        for instance in cell.instances:
            instance.scheduler.cancel(need)
    cell.drain()
    for seq, (length, max_tokens, stop_token) in wanted.items():
        got = [cell.outputs[seq][i] for i in sorted(cell.outputs[seq])]
        assert sorted(cell.outputs[seq]) == list(range(len(got)))
        full = [token_at(seq, length + i) for i in range(max_tokens)]
        if stop_token in full:
            full = full[: full.index(stop_token) + 1]
        if seq in cell.finished:
            assert got == full
            assert cell.finished[seq] == ("stop" if full[-1] == stop_token else "length")
        else:
            assert seq in cancelled
            assert got == full[: len(got)]
        if seq in cell.released:
            assert cell.released[seq] == len(got)
    for instance in cell.instances:  # what a Drop from the gManager would give back: reserved for a move that never came
        for seq in wanted:
            if seq in cell.released:
                instance.rmanager.drop(seq)
    cell.drop_copies()
    assert set(cell.released) == set(wanted)
    cell.check_empty()


def test_a_home_moves_in_the_middle_of_a_block_and_skips_one_step() -> None:
    cell = FakeCell(2, blocks=8, block_size=4, chunk_tokens=64)
    assert cell.admit(1, [Share(rank=0, tokens=6)], 8, [])
    for _ in range(3):
        cell.round()
    assert cell.instances[1].rmanager.reserve(1, 1)
    cell.instances[0].scheduler.move(1, 1)
    rows = []
    while cell.round():
        running = [i.running["decode"] for i in cell.instances]
        rows.append([steps[-1].plan.layout.num_rows if steps else 0 for steps in running])
    assert rows[:2] == [[0, 0], [0, 1]]
    assert cell.moves == 1
    assert [cell.outputs[1][i] for i in range(8)] == [token_at(1, 6 + i) for i in range(8)]
    cell.check_empty()


def test_a_run_changes_hands_while_rows_are_under_way() -> None:
    """Its blocks at the source are free only when the steps that read them have run; rows go on without a pause."""
    cell = FakeCell(3, blocks=8, block_size=4, chunk_tokens=64, attends=True)
    assert cell.admit(1, [Share(rank=0, tokens=6), Share(rank=1, tokens=6)], 12, [])
    for _ in range(4):
        cell.round()
    source, target = cell.instances[1].rmanager, cell.instances[2].rmanager
    cell.copy(1, 1, 2, 0)
    before = source.free_blocks
    cell.flip(1)
    cell.round()
    assert source.free_blocks == before, "the step before reads them"
    assert (source.ranges(1), [h.rank for h in cell.instances[0].scheduler.known("decode")[1]]) == ([], [0, 2])
    cell.round()
    assert source.free_blocks == 8
    assert sum(end - start for start, end in target.ranges(1)[0]) == 6
    assert cell.flips == 1
    rows = len(cell.outputs[1])
    cell.round()
    assert len(cell.outputs[1]) == rows + 1
    cell.drain()
    assert [cell.outputs[1][i] for i in range(12)] == [token_at(1, 12 + i) for i in range(12)]
    cell.check_empty()


def test_who_is_told_of_a_run_that_is_not_there_says_so() -> None:
    cell = FakeCell(2, blocks=8, block_size=4, chunk_tokens=64)
    assert cell.admit(1, [Share(rank=0, tokens=6)], 12, [])
    for _ in range(3):
        cell.round()
    scheduler = cell.instances[0].scheduler
    told = FlipRun(epoch=1, move=9, seq=1, source=1, target=0, start=0)
    with pytest.raises(StepMismatch, match="rank 1 is to give its run from position 0 away"):
        scheduler.flip(told)
    scheduler.flip(msgspec.structs.replace(told, seq=2))  # it has ended
    cell.drain()
    cell.check_empty()


def test_moves_to_and_fro_take_one_block_on_each_instance() -> None:
    """A client can ask for as many as it likes: each took a block, used or not."""
    cell = FakeCell(2, blocks=8, block_size=4, chunk_tokens=64)
    assert cell.admit(1, [Share(rank=0, tokens=6)], 30, [])
    for _ in range(3):
        cell.round()
    for _ in range(10):
        cell.move(1, 1 - cell.home[1])
        for _ in range(3):
            cell.round()
    assert cell.moves == 10
    tokens = 6 + len(cell.outputs[1])
    held = 16 - sum(instance.rmanager.free_blocks for instance in cell.instances)
    assert held <= -(-tokens // 4) + 2
    cell.drain()
    cell.check_empty()


def test_a_cancel_that_comes_while_the_notices_are_out_is_carried_by_the_next() -> None:
    """To the old home, as HomeMoved is on its way: it was lost, and the sequence ran to its end."""
    cell = FakeCell(2, blocks=60, block_size=4, chunk_tokens=64)
    assert cell.admit(1, [Share(rank=0, tokens=6)], 100, [])
    for _ in range(3):
        cell.round()
    cell.move(1, 1)
    cell.round()
    cell.round(partial(cell.instances[0].scheduler.cancel, 1))
    cell.drain()
    assert cell.moves == 1
    assert len(cell.outputs[1]) < 10
    assert 1 in cell.released
    cell.check_empty()


def test_a_notice_tells_whether_the_other_lane_has_work() -> None:
    """A prompt's home and who has a share of it; then only the home, which decodes."""
    cell = FakeCell(2, blocks=20, block_size=4, chunk_tokens=8)

    def told(lane: Lane) -> list[bool]:
        asked = {"party": 0, "step": 0, "digest": [], "groupings": []}
        return [i.scheduler.propose(lane, [0, 1], **asked).both_lanes for i in cell.instances]

    assert told("decode") == told("prefill") == [False, False]
    assert cell.admit(1, [Share(rank=0, tokens=20), Share(rank=1, tokens=20)], 8, [])
    assert (told("decode"), told("prefill")) == ([True, True], [False, False])
    while not cell.outputs.get(1):
        cell.round()
    assert (told("decode"), told("prefill")) == ([False, False], [True, False])
    cell.drain()
    assert told("decode") == told("prefill") == [False, False]


def test_a_home_without_room_says_so_once_and_goes_on_when_there_is() -> None:
    cell = FakeCell(1, blocks=4, block_size=4, chunk_tokens=64)
    assert cell.admit(1, [Share(rank=0, tokens=4)], 12, [])
    assert cell.admit(2, [Share(rank=0, tokens=4)], 4, [])
    cell.drain()
    assert cell.needs == [1]
    assert cell.finished == {1: "length", 2: "length"}
    cell.check_empty()


def test_a_wrong_count_stops_the_instance() -> None:
    cell = FakeCell(1, blocks=4, block_size=4, chunk_tokens=64)
    assert cell.admit(1, [Share(rank=0, tokens=4)], 12, [])
    cell.round()
    cell.instances[0].rmanager.append(1, 90, 91)
    with pytest.raises((StepMismatch, ValueError)):
        cell.round()


def test_a_home_goes_on_with_the_run_that_ends_last() -> None:
    """Its first tokens came after the others, as those that are computed again do."""
    cell = FakeCell(1, blocks=5, block_size=4, chunk_tokens=64)
    (instance,) = cell.instances
    assert instance.rmanager.reserve(1, 3)
    instance.rmanager.append(1, 5, 8)
    instance.rmanager.append(1, 0, 5)
    params = SequenceParams(max_tokens=7, temperature=0, top_k=0, top_p=1, seed=0, stop_token_ids=[], logprobs=None)
    handoff = Handoff(
        seq=1, to=0, arrival=1, position=8, prompt_tokens=8, generated=1, last_token=token_at(1, 8), params=params,
        holdings=[Holding(0, [HeldRun(5, 8, 3), HeldRun(0, 5, 5)])],
    )  # fmt: skip
    notice = instance.scheduler.propose("decode", [0], party=1, step=0, digest=[], groupings=[])
    instance.scheduler.accept("decode", derive([msgspec.structs.replace(notice, handoffs=[handoff])]))
    instance.scheduler.commit("decode", {})
    cell.outputs[1] = {}
    lens = []
    while cell.round():
        if running := instance.running["decode"]:
            lens.append([reading.kv_lens for reading in running[-1].plan.layout.own])
        instance.scheduler.validate()
    assert lens[:3] == [[(4,), (5,)], [(5,), (5,)], [(6,), (5,)]]
    assert cell.outputs[1] == {i: token_at(1, 8 + i) for i in range(1, 7)}
    cell.check_empty()


def test_a_step_that_names_other_runs_is_refused() -> None:
    """As many tokens from the same position on, but in one run."""
    cell = FakeCell(1, blocks=4, block_size=4, chunk_tokens=64)
    (instance,) = cell.instances
    assert instance.rmanager.reserve(1, 3)
    instance.rmanager.append(1, 2, 4)
    instance.rmanager.append(1, 0, 2)
    step = Step(
        spans=[], holdings={1: [Holding(0, [HeldRun(0, 4, 4)])]}, sampled=[], scored=[], released=[], cancels=[], handoffs=[],
        last_tokens=[], flips=[],
    )  # fmt: skip
    with pytest.raises(
        StepMismatch, match=r"rank 0 holds \[HeldRun\(start=0, end=4, tokens=4\)\], it holds \[HeldRun\(start=2"
    ):
        instance.scheduler._check_holdings(step)


def test_a_short_prompt_has_its_token_within_two_chunks_of_a_long_one() -> None:
    """It comes while one chunk runs: it has rows in the next, and its token with that."""
    cell = FakeCell(2, blocks=600, block_size=16, chunk_tokens=512)
    assert cell.admit(1, [Share(rank=0, tokens=2048), Share(rank=1, tokens=2048)], 4, [])
    cell.round()
    cell.round()
    assert cell.admit(2, [Share(rank=1, tokens=40)], 4, [])
    cell.round()  # the step that has its rows is queued behind the one that runs
    assert not cell.outputs[2]
    cell.round()
    assert cell.outputs[2] == {0: token_at(2, 40)}
    assert cell.instances[0].scheduler.has_work("prefill", [0, 1]), "the long one goes on"
    assert cell.instances[1].scheduler.has_work("decode", [0, 1]), "beside it"
    cell.drain()
    assert cell.finished == {1: "length", 2: "length"}
    cell.check_empty()


class Stream:
    """Short prompts that keep coming: each instance of a cell has more of them at any time than fit in two steps."""

    def __init__(self, cell: FakeCell, tokens: int) -> None:
        self.cell = cell
        self.tokens = tokens
        self.rank_of: dict[int, int] = {}

    def rounds_until_first_token(self, seq: int, most: int) -> int:
        """So many pass until the first token of a sequence."""
        for rounds in range(most):
            if self.cell.outputs[seq]:
                return rounds
            for rank in self.cell.members:
                waiting = sum(where == rank and short not in self.cell.released for short, where in self.rank_of.items())
                for _ in range(8 - waiting):
                    short = 1000 + len(self.rank_of)
                    self.rank_of[short] = rank
                    assert self.cell.admit(short, [Share(rank=rank, tokens=self.tokens)], 1, [])
            self.cell.round()
        return most


@pytest.mark.parametrize("is_paced", [False, True])
@pytest.mark.parametrize("ranks", [[0], [1], [0, 1], [1, 0]])
def test_a_long_prompt_ends_in_time_whatever_short_ones_keep_coming(ranks: list[int], is_paced: bool) -> None:
    """They go before it until it is late; from then on it has half of each step."""
    chunk, length, reach = 64, 640, 1000
    cell = FakeCell(2, blocks=4000, block_size=16, chunk_tokens=chunk, reach=reach)
    if is_paced:
        assert cell.admit(1, [Share(rank=0, tokens=1)], 5000, [])
        for _ in range(4):
            cell.round()
    assert cell.admit(2, [Share(rank=rank, tokens=length // len(ranks)) for rank in ranks], 1, [])
    by_cost = length * (1 + length / (2 * reach)) / (chunk // 4) if is_paced else 0
    steps = -int(-max(by_cost, length / chunk) // len(ranks))
    rounds = Stream(cell, chunk // 2).rounds_until_first_token(2, (STRETCH + 3) * steps)
    assert STRETCH * steps <= rounds <= (STRETCH + 2) * steps + 4


def test_what_is_promised_at_one_instance_is_also_promised_at_the_other() -> None:
    """Each has a prompt that is late, and only the two together were promised anything: the second stood still."""
    cell = FakeCell(2, blocks=4000, block_size=16, chunk_tokens=64)
    stream = Stream(cell, 32)
    assert cell.admit(1, [Share(rank=0, tokens=5120)], 1, [])
    assert stream.rounds_until_first_token(1, STRETCH * 80) == STRETCH * 80, "it is late now"
    assert cell.admit(2, [Share(rank=1, tokens=640)], 1, [])
    assert stream.rounds_until_first_token(2, 200) <= (STRETCH + 2) * 10 + 4
    assert not cell.outputs[1]
