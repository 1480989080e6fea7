"""What `status` and `top` draw: pure functions of the statistics."""

from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

from gmanager.cli.watch import Segment, _marks, bar, colour, screen, segments
from gmanager.observed import Observed
from gmanager.wire.messages import CellStats, Counters, InstanceStats, RequestStats, Stats

NOTHING = Observed().observations()


def instance(rank: int, used: int, total: int = 1000, cell: str = "main") -> InstanceStats:
    return InstanceStats(
        cell=cell,
        rank=rank,
        total_tokens=total,
        used_tokens=used,
        free_tokens=total - used,
        lent_tokens=0,
        borrowed_tokens=0,
        counters=Counters(),
    )


def request(kv_tokens: dict[int, int], **more: object) -> RequestStats:
    fields: dict[str, object] = {"state": "decode", "cell": "main", "home": 0, "prompt_tokens": 5, "generated_tokens": 7}
    fields |= {"home_moves": 0, "preemptions": 0, "kv_tokens": kv_tokens} | more
    return RequestStats(**fields)  # type: ignore[arg-type]


def test_segments_are_the_live_requests_of_that_instance_and_the_rest() -> None:
    requests = {
        "a": request({0: 100, 1: 50}),
        "b": request({0: 300}),
        "elsewhere": request({1: 70}),
        "other cell": request({0: 70}, cell="b"),
        "over": request({0: 70}, state="finished"),
    }
    assert segments(instance(0, 512), requests) == [Segment("b", 300), Segment("a", 100), Segment(None, 112)]
    assert segments(instance(1, 120), requests) == [Segment("elsewhere", 70), Segment("a", 50)]


@given(st.lists(st.integers(0, 500), max_size=6), st.integers(0, 300), st.integers(8, 120))
def test_bars_are_as_long_as_they_should_be(parts: list[int], free: int, width: int) -> None:
    total = sum(parts) + free
    drawn = bar([Segment(str(i), tokens) for i, tokens in enumerate(parts)], total, width)
    assert len(drawn.plain) == width
    used = drawn.plain.count("\u2588")
    assert drawn.plain == "\u2588" * used + "\u2591" * (width - used)
    assert used == (-(-sum(parts) * width // total) if total else 0)


def test_what_an_instance_is_for_is_shown_where_it_was_said() -> None:
    shown = [
        replace(instance(0, 10), role="prefill", is_draining=True),
        replace(instance(1, 10), role="decode"),
        instance(2, 0),
    ]
    assert [_marks(its) for its in shown] == [["prefill", "drains"], ["decode"], []]


def test_a_request_keeps_its_colour() -> None:
    assert colour("a") == colour("a")
    drawn = bar([Segment("a", 500), Segment("b", 250)], 1000, 8)
    styles = [str(span.style) for span in drawn.spans]
    assert styles == [colour("a")] * 4 + [colour("b")] * 2 + ["dim"]


@pytest.mark.parametrize("rotary", ["", "longrope with the long factors, those of texts of 131,072 tokens"])
def test_screens_fit_their_terminal(rotary: str) -> None:
    cell = CellStats(
        name="main", epoch=1, state="ready", size=2, model="m" * 300, block_size=64, max_context=131072, total_tokens=1_751_296
    )
    cell = replace(cell, rotary=rotary)
    requests = {f"request-{i}" * 9: request({0: 123_456, 1: 654_321}, prompt_tokens=777_777) for i in range(60)}
    ranks = [instance(rank, 800_000, 875_648) for rank in (0, 1)]
    stats = Stats(
        epoch=1, cells=[cell], instances=ranks, requests=requests, counters=Counters(), observed=Observed().observations()
    )
    for width, height in ((80, 24), (160, 40)):
        console = Console(file=StringIO(), width=width, height=height, force_terminal=False)
        console.print(screen(stats, width, height=height))
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) <= width
        assert len(lines) <= height
        assert any("more" in line for line in lines)
        assert sum("\u2588" in line for line in lines) == 2


def test_a_service_without_instances() -> None:
    console = Console(file=StringIO(), width=80)
    console.print(screen(Stats(epoch=0, cells=[], instances=[], requests={}, counters=Counters(), observed=NOTHING), 80))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "no instance has registered yet" in text
    assert "no requests" in text


def test_chosen_rotary_frequencies_are_shown() -> None:
    cell = CellStats(
        name="main", epoch=1, state="ready", size=1, model="tiny", block_size=4, max_context=100, total_tokens=1000
    )
    for rotary in ("", "yarn:4"):
        cells = [replace(cell, rotary=rotary), replace(cell, name="other")]
        stats = Stats(epoch=1, cells=cells, instances=[], requests={}, counters=Counters(), observed=NOTHING)
        console = Console(file=StringIO(), width=160)
        console.print(screen(stats, 160))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("yarn:4" in text) == ("rotary" in text) == bool(rotary)


def test_what_lies_below_the_pools_is_shown() -> None:
    cell = CellStats(
        name="main", epoch=1, state="ready", size=1, model="tiny", block_size=4, max_context=100, total_tokens=1000
    )
    one = replace(instance(0, 100), cached_tokens=300, host_tokens=2000, disk_tokens=3000)
    stats = Stats(epoch=1, cells=[cell], instances=[one], requests={}, counters=Counters(), observed=NOTHING)
    console = Console(file=StringIO(), width=160)
    console.print(screen(stats, 160))
    assert "900 (300 cached, 2,000 in host memory, 3,000 on disk)" in console.file.getvalue()  # type: ignore[attr-defined]
