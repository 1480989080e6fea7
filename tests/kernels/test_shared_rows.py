"""Rows that "instances" share which are tensors of this process: the same code that writes to another GPU's memory.

One kernel after the other runs here, so each call is made twice: first by all with their waits aborted, for what they push, and
then by one after the other, for what they have of it.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instance.elastic_tp import FeedShares
from kernels.layer_ops import Norm, add_rms_norm
from kernels.mailbox import Mailbox
from kernels.shared_rows import (
    PIECE,
    Homes,
    collect_parts,
    num_pieces,
    spread_add_rms_norm,
    spread_rows,
    sum_parts,
    sum_parts_add_rms_norm,
)
from tests.kernels.test_paged_attention import DEVICE
from tests.support.compiling import compiled

ROWS = 8
"""Most of all."""
WIDTH = {torch.float32: 20, torch.bfloat16: 40}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""The interpreter rounds to bfloat16 towards zero."""


class Cell:
    """All members, and one of their mailboxes each."""

    def __init__(self, size: int, room: int) -> None:
        self.size = size
        shape = (size, 1, ROWS, room)
        inboxes = [torch.zeros(shape, dtype=torch.int64, device=DEVICE) for _ in range(size)]
        abort = torch.zeros(1, dtype=torch.int32)
        self.mailboxes = [
            Mailbox(
                part,
                inbox,
                torch.tensor([(its[part].data_ptr() - inbox.data_ptr()) // 8 for its in inboxes], device=DEVICE),
                torch.zeros(ROWS * num_pieces(room), dtype=torch.int32, device=DEVICE),
                abort.pin_memory() if DEVICE.type == "cuda" else abort,
                torch.zeros(1, dtype=torch.int32, device=DEVICE),
                turns=5,
            )
            for part, inbox in enumerate(inboxes)
        ]

    def all_call(self, call: Callable[[int, Mailbox], torch.Tensor]) -> list[torch.Tensor]:
        """What each member has of a call."""
        for part, mailbox in enumerate(self.mailboxes):
            calls = mailbox.calls_T.clone()
            mailbox.aborted_1.fill_(1)
            call(part, mailbox)
            mailbox.aborted_1.fill_(0)
            mailbox.calls_T.copy_(calls)
        return [call(part, mailbox) for part, mailbox in enumerate(self.mailboxes)]

    def spread(self, step: "Step", rows_RE: torch.Tensor) -> list[torch.Tensor]:
        return self.all_call(lambda part, mailbox: spread_rows(step.padded(rows_RE, part), step.homes[part], mailbox))

    def sum(self, step: "Step", parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.all_call(lambda part, mailbox: sum_parts(parts[part], step.own_room(part), step.homes[part], mailbox))

    def collect(self, step: "Step", parts: list[torch.Tensor], starts: torch.Tensor, width: int) -> list[torch.Tensor]:
        return self.all_call(
            lambda part, mailbox: collect_parts(parts[part], step.own_room(part), starts, width, step.homes[part], mailbox)
        )


class Step:
    """How the rows of one are dealt out."""

    def __init__(self, counts: tuple[int, ...], room: int) -> None:
        self.counts = counts
        self.room = room
        self.shares = [FeedShares(part, tuple(enumerate(counts))) for part in range(len(counts))]
        tables = [(its.homes(room), its.own_rows(room)) for its in self.shares]
        self.homes = [Homes(*(torch.tensor(table, dtype=torch.int32, device=DEVICE) for table in its)) for its in tables]

    def own_room(self, part: int) -> int:
        return self.room if self.counts[part] else 0

    def own(self, all_RE: torch.Tensor, part: int) -> torch.Tensor:
        """A member's own rows of all."""
        its = self.shares[part].range_of(part)
        return all_RE[its.start : its.stop]

    def padded(self, all_RE: torch.Tensor, part: int) -> torch.Tensor:
        """Likewise, as its layers have them: the rest means nothing."""
        rows_TE = torch.full((self.own_room(part), all_RE.shape[1]), torch.nan, dtype=all_RE.dtype, device=DEVICE)
        rows_TE[: self.counts[part]] = self.own(all_RE, part)
        return rows_TE


def steps(most: int = ROWS) -> st.SearchStrategy[list[tuple[int, ...]]]:
    """Some, one behind the other, of two or three members, not all of which need have rows."""
    counts = st.integers(0, 3)
    return st.sampled_from([2, 3]).flatmap(
        lambda size: st.lists(st.tuples(*[counts] * size).filter(lambda rows: 0 < sum(rows) <= most), min_size=1, max_size=4)
    )


def rows(count: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn((count, width), generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def room_for(counts: tuple[int, ...]) -> int:
    return next(bucket for bucket in (1, 2, 4, 8) if bucket >= sum(counts))


@settings(max_examples=12)  # of which each runs dozens of programs in the interpreter
@given(st.sampled_from([torch.float32, torch.bfloat16]), steps())
def test_rows_go_to_all_and_the_sum_of_what_they_make_of_them_comes_back(
    dtype: torch.dtype, dealt: list[tuple[int, ...]]
) -> None:
    """Step after step, of rows whose homes change."""
    size, width = len(dealt[0]), WIDTH[dtype]
    there, back = Cell(size, 24), Cell(size, 24)
    for number, counts in enumerate(dealt):
        step = Step(counts, room_for(counts))
        want_RE = rows(sum(counts), width, dtype, number)
        got = there.spread(step, want_RE)
        for all_RE in got:
            assert torch.equal(all_RE[: sum(counts)], want_RE)
            assert not all_RE[sum(counts) :].any()
        parts = [rows(step.room, width, dtype, 100 * number + part) for part in range(size)]
        for part_RE in parts:
            part_RE[sum(counts) :] = torch.nan
        want_RE = sum((part_RE.float() for part_RE in parts), torch.zeros((step.room, width), device=DEVICE)).to(dtype)
        got = back.sum(step, parts)
        for part, sum_TE in enumerate(got):
            assert sum_TE.shape == (step.own_room(part), width)
            limit = 0 if DEVICE.type == "cuda" else TOLERANCE[dtype]
            torch.testing.assert_close(sum_TE[: counts[part]], step.own(want_RE, part), rtol=limit, atol=limit)
            assert not sum_TE[counts[part] :].any()
    counted = [sum(number < sum(counts) for counts in dealt) for number in range(ROWS)]
    for mailbox in (*there.mailboxes, *back.mailboxes):
        assert mailbox.calls_T.tolist() == counted


@pytest.mark.parametrize("counts", [(3, 0), (1, 2), (0, 4), (2, 1, 1)])
@pytest.mark.parametrize("from_one", [False, True])
@pytest.mark.parametrize("with_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_and_norms_ride_along(dtype: torch.dtype, with_first: bool, from_one: bool, counts: tuple[int, ...]) -> None:
    width, size, step = WIDTH[dtype], len(counts), Step(counts, room_for(counts))
    weight_1E, first_1E = rows(1, width, dtype, 1), rows(1, width, dtype, 2)
    norm, first = Norm(weight_1E[0], 1e-5, from_one), Norm(first_1E[0], 1e-6, from_one) if with_first else None
    parts = [rows(step.room, width, dtype, 10 + part) for part in range(size)]
    before = [rows(step.own_room(part), width, dtype, 20 + part) for part in range(size)]
    residuals: dict[int, torch.Tensor] = {}

    def call(part: int, mailbox: Mailbox) -> torch.Tensor:
        residuals[part] = before[part].clone()
        return sum_parts_add_rms_norm(parts[part], residuals[part], norm, step.homes[part], mailbox, first=first)

    got = Cell(size, 20).all_call(call)
    summed_RE = sum((part_RE.float() for part_RE in parts), torch.zeros((step.room, width), device=DEVICE)).to(dtype)
    for part, count in enumerate(counts):
        want_residual_TE = before[part].clone()
        own_TE = step.own(summed_RE, part)
        want_TE = add_rms_norm(own_TE, want_residual_TE[:count], norm, first=first, backend="torch")
        torch.testing.assert_close(got[part][:count], want_TE, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(residuals[part], want_residual_TE, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert not got[part][count:].any()


@pytest.mark.parametrize("counts", [(3, 0), (1, 2), (0, 4), (2, 1, 1)])
@pytest.mark.parametrize("with_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_to_a_residual_and_normed_goes_to_all(
    dtype: torch.dtype, with_first: bool, counts: tuple[int, ...]
) -> None:
    width, step = WIDTH[dtype], Step(counts, room_for(counts))
    added_RE, before_RE = rows(step.room, width, dtype, 3), rows(step.room, width, dtype, 4)
    norm = Norm(rows(1, width, dtype, 1)[0], 1e-5)
    first = Norm(rows(1, width, dtype, 2)[0], 1e-6, True) if with_first else None
    residuals: dict[int, torch.Tensor] = {}

    def call(part: int, mailbox: Mailbox) -> torch.Tensor:
        residuals[part] = step.padded(before_RE, part)
        added_TE = step.padded(added_RE, part)
        return spread_add_rms_norm(added_TE, residuals[part], norm, step.homes[part], mailbox, first=first)

    got = Cell(len(counts), 20).all_call(call)
    total, after_RE = sum(counts), before_RE.clone()
    want_RE = add_rms_norm(added_RE[:total], after_RE[:total], norm, first=first, backend="torch")
    for part, count in enumerate(counts):
        torch.testing.assert_close(got[part][:total], want_RE, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert torch.equal(got[part], got[0])
        assert not got[part][total:].any()
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(residuals[part][:count], step.own(after_RE, part), rtol=limit, atol=limit)


@pytest.mark.parametrize("width", [97, 2 * PIECE + 12])
@pytest.mark.parametrize("dealt", [[(3, 0), (1, 2)], [(0, 1), (0, 4), (4, 0)], [(2, 1, 1), (0, 0, 1)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_uneven_width_come_to_lie_side_by_side(dtype: torch.dtype, dealt: list[tuple[int, ...]], width: int) -> None:
    size = len(dealt[0])
    cell = Cell(size, -(-width // 2))
    tokens = FeedShares(0, tuple(enumerate(dealt[0]))).vocabulary(width)
    starts = torch.tensor([0, *(its.stop for its in tokens)], dtype=torch.int32, device=DEVICE)
    for number, counts in enumerate(dealt):
        step = Step(counts, room_for(counts))
        want_RV = rows(step.room, width, dtype, number)
        parts = [want_RV[:, its.start : its.stop].contiguous() for its in tokens]
        for part_RP in parts:
            part_RP[sum(counts) :] = torch.nan
        got = cell.collect(step, parts, starts, width)
        for part, out_TV in enumerate(got):
            assert out_TV.shape == (step.own_room(part), width)
            assert torch.equal(out_TV[: counts[part]], step.own(want_RV, part))


@pytest.mark.parametrize("counts", [(2, 0), (0, 2)])
def test_an_abort_ends_a_wait_for_an_instance_that_never_comes(counts: tuple[int, ...]) -> None:
    step, cell = Step(counts, 2), Cell(2, 8)
    mailbox = cell.mailboxes[0]
    mailbox.abort_1.fill_(1)
    own_TE = step.padded(rows(2, 8, torch.float32, 0), 0)
    all_RE = spread_rows(own_TE, step.homes[0], mailbox)
    sum_parts(all_RE, len(own_TE), step.homes[0], mailbox)
    assert mailbox.calls_T.tolist()[:3] == [2, 2, 0]
    assert mailbox.aborted_1.item() == 1


def test_a_step_of_padding_alone_waits_for_nobody_and_counts_nothing() -> None:
    """Such as graphs are captured with."""
    mailbox = Cell(2, 24).mailboxes[1]
    ranks_R = torch.full((4,), -1, dtype=torch.int32, device=DEVICE)
    homes = Homes(ranks_R, torch.arange(4, dtype=torch.int32, device=DEVICE))
    nan_TE = torch.full((4, 20), torch.nan, device=DEVICE)
    starts = torch.tensor([0, 20, 40], dtype=torch.int32, device=DEVICE)
    assert not spread_rows(nan_TE, homes, mailbox).any()
    assert not sum_parts(nan_TE, 4, homes, mailbox).any()
    assert collect_parts(nan_TE, 4, starts, 40, homes, mailbox).shape == (4, 40)
    assert not mailbox.calls_T.any()
    assert not mailbox.inbox_NBTW.any()


Places = dict[tuple[str, int, int, int], tuple[int, bool]]
"""What lies in (inbox, of whom, from whom, row): of which call, and whether it was read."""


def a_members_kernels(part: int, dealt: list[tuple[int, ...]], places: Places, drawn: random.Random) -> Iterator[None]:
    """What it writes and reads, step after step, in any order within a kernel; it stops wherever another may go on."""
    calls = [0] * ROWS
    for counts in dealt:
        homes = FeedShares(part, tuple(enumerate(counts))).homes(sum(counts))
        others = [peer for peer in range(len(counts)) if peer != part]
        for inbox in ("spread", "sum"):
            pushes, waits = [], []
            for row, home in enumerate(homes):
                calls[row] += inbox == "spread"
                if (home == part) == (inbox == "spread"):
                    pushes += [(inbox, to, part, row) for to in (others if home == part else [home])]
                else:
                    waits += [(inbox, part, by, row) for by in (others if home == part else [home])]
            for place in drawn.sample(pushes, len(pushes)):
                yield
                assert places.get(place, (0, True))[1], f"{place} was written before it was read"
                places[place] = calls[place[3]], False
            for place in drawn.sample(waits, len(waits)):
                while places.get(place, (0, True))[0] != calls[place[3]]:
                    yield
                places[place] = calls[place[3]], True


@given(steps(), st.randoms(use_true_random=False))
def test_one_buffer_is_enough_however_fast_each_member_is(dealt: list[tuple[int, ...]], drawn: random.Random) -> None:
    places: Places = {}
    running = {part: a_members_kernels(part, dealt, places, drawn) for part in range(len(dealt[0]))}
    for _ in range(100_000):
        part = drawn.choice(list(running))
        for _ in range(drawn.choice([1, 30])):
            if next(running[part], running) is running:
                del running[part]
                break
        if not running:
            return
    raise AssertionError("the members wait for each other for ever")


def test_what_the_kernels_take_of_a_processor(tmp_path: Path) -> None:
    """By the compiler, for Hopper, rows of 8 KiB: 64 programs fit on the fewest processors of decodes; words go in pairs."""
    found: dict[str, dict[str, int]] = compiled("tests.support.compiled_rows", tmp_path)
    assert len(found) == 2 * 5  # types, kernels
    for name, taken in found.items():
        assert taken["stack"] == taken["local"] == 0, name
        assert 64 / (65536 // (256 * taken["reg"])) <= 24, name
        assert taken["wide"] > 0 or "collect" in name, name
