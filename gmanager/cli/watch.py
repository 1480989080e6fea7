"""`distattn status` and `distattn top`: the service's state as tables and bars."""

import asyncio
import contextlib
import select
import sys
import termios
import time
import tty
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gmanager.client import AsyncClient
from gmanager.wire.messages import CellPerformance, Counters, InstanceStats, RequestStats, Stats

COLOURS = (
    "green",
    "yellow",
    "blue",
    "magenta",
    "cyan",
    "bright_red",
    "bright_green",
    "bright_yellow",
    "bright_blue",
    "bright_cyan",
)
CONNECT_S = 3.0
MAX_ROWS = 20
"""Requests that are listed; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of an instance's pool."""

    request: str | None
    """None: used by what is no live request any more, or by the last part of blocks."""
    tokens: int


def segments(instance: InstanceStats, requests: dict[str, RequestStats]) -> list[Segment]:
    """Who uses an instance's KV: live requests, most first, then the rest of what is used. Free tokens are left out."""
    held = [
        Segment(name, request.kv_tokens[instance.rank])
        for name, request in requests.items()
        if request.state != "finished" and request.cell == instance.cell and request.kv_tokens.get(instance.rank)
    ]
    held.sort(key=lambda segment: (-segment.tokens, segment.request or ""))
    rest = instance.used_tokens - sum(segment.tokens for segment in held)
    return [*held, *([Segment(None, rest)] if rest > 0 else [])]


def bar(parts: list[Segment], total: int, width: int) -> Text:
    """`width` characters for `total` tokens. What is used at all is seen: a part has a character if its cell begins in it."""
    text = Text()
    ends, end = [], 0
    for part in parts:
        end += part.tokens
        ends.append(end)
    used_cells = min(width, -(-end * width // total)) if total else 0
    place = 0
    for cell in range(used_cells):
        while place < len(parts) - 1 and ends[place] * width <= cell * total:
            place += 1
        text.append("\u2588", style=colour(parts[place].request))
    text.append("\u2591" * (width - used_cells), style="dim")
    return text


def colour(request: str | None) -> str:
    """The same for the same request, as long as it lives."""
    return "white" if request is None else COLOURS[zlib.crc32(request.encode()) % len(COLOURS)]


def show_status(address: str, *, as_json: bool) -> None:
    """Print it once. Raises DistattnError."""
    stats = asyncio.run(_stats(address))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(stats), indent=1).decode())
        return
    Console().print(screen(stats, Console().width))


async def _stats(address: str) -> Stats:
    async with AsyncClient(address, connect_timeout_s=CONNECT_S) as client:
        return await client.stats()


def drain_instance(address: str, instance: int, cell: str | None) -> None:
    """Wait until it has left. Raises DistattnError."""
    asyncio.run(_drain(address, instance, cell))
    print(f"instance {instance} has left")


async def _drain(address: str, instance: int, cell: str | None) -> None:
    async with AsyncClient(address, connect_timeout_s=CONNECT_S) as client:
        await client.drain(instance, cell)


def watch(address: str, interval_s: float) -> None:
    """Show it again and again, until q or Ctrl-C. Raises DistattnError."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_watch(address, interval_s))


async def _watch(address: str, interval_s: float) -> None:
    console = Console()
    before: tuple[float, Counters] | None = None
    async with AsyncClient(address, connect_timeout_s=CONNECT_S) as client:
        with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                stats = await client.stats()
                now = time.monotonic()
                rates = None if before is None else _rates(before[1], stats.counters, now - before[0])
                before = now, stats.counters
                live.update(screen(stats, console.width, rates=rates, height=console.height), refresh=True)
                deadline = now + interval_s
                while (left := deadline - time.monotonic()) > 0:
                    if "q" in pressed():
                        return
                    await asyncio.sleep(min(0.1, left))


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """What was typed since the last call, without waiting for Enter; nothing where standard input is no terminal."""
    if not sys.stdin.isatty():
        yield lambda: ""
        return
    terminal = sys.stdin.fileno()
    settings = termios.tcgetattr(terminal)

    def pressed() -> str:
        typed = ""
        while select.select([terminal], [], [], 0)[0]:
            typed += sys.stdin.read(1)
        return typed

    tty.setcbreak(terminal)
    try:
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, settings)


def _rates(old: Counters, new: Counters, seconds: float) -> dict[str, float]:
    return {name: max(0, getattr(new, name) - getattr(old, name)) / seconds for name in ("rows", "tokens_prefilled", "steps")}


def screen(stats: Stats, width: int, *, rates: dict[str, float] | None = None, height: int | None = None) -> RenderableType:
    """All of it, for a terminal of that size."""
    live = {name: request for name, request in stats.requests.items() if request.state != "finished"}
    rows = MAX_ROWS if height is None else max(1, height - len(stats.cells) - len(stats.instances) - 9)
    gap = Text("")
    parts: list[RenderableType] = [_headline(stats, live, rates)]
    if not stats.cells:
        parts.append(Text("no instance has registered yet", style="yellow"))
    else:
        parts += [gap, _cells(stats), gap, _instances(stats, live, width)]
    if live:
        parts += [gap, _requests(live, width, rows)]
    return Group(*parts)


def _headline(stats: Stats, live: dict[str, RequestStats], rates: dict[str, float] | None) -> Text:
    states = Counter(request.state for request in live.values())
    line = Text(", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no requests", style="bold")
    if rates is None:
        line.append(f"   since the start: {stats.counters.preemptions:,} preemptions, {stats.counters.home_moves:,} home moves")
    else:
        decoded = max(0, rates["rows"] - rates["tokens_prefilled"])
        line.append(
            f"   {decoded:,.0f} tokens/s generated, {rates['tokens_prefilled']:,.0f} prefilled, {rates['steps']:,.0f} steps/s"
        )
    return line


def _cells(stats: Stats) -> Table:
    numbers = [(name, "right") for name in ("instances", "epoch", "KV tokens", "context", "steps \u00b1")]
    chosen = any(cell.rotary for cell in stats.cells)
    table = _table("cell", "model", "state", *numbers, *(["rotary"] if chosen else []))
    for cell in stats.cells:
        state = Text(cell.state, style="green" if cell.state == "ready" else "yellow")
        values = (cell.size, cell.epoch, cell.total_tokens, cell.max_context)
        texts = [*(f"{value:,}" for value in values), _errors(cell.performance), *([cell.rotary] if chosen else [])]
        table.add_row(cell.name, cell.model, state, *texts)
    return table


def _errors(performance: CellPerformance | None) -> str:
    """By how much predictions of steps are off: of prompts, of decodes."""
    errors = [] if performance is None else [performance.prefill.error, performance.decode.error]
    return ", ".join("-" if error is None else f"{error:.0%}" for error in errors) or "-"


def _instances(stats: Stats, live: dict[str, RequestStats], width: int) -> Table:
    table = _table("instance", "KV", ("used", "right"), ("free", "right"), ("lent", "right"), ("borrowed", "right"))
    cached = {i: _cached(i) for i in stats.instances}
    length = max(8, width - 62 - max(map(len, cached.values()), default=0))
    for instance in stats.instances:
        table.add_row(
            " ".join([f"{instance.cell} {instance.rank}", *_marks(instance)]),
            bar(segments(instance, live), instance.total_tokens, length),
            f"{instance.used_tokens:,} ({100 * instance.used_tokens / max(1, instance.total_tokens):.0f} %)",
            f"{instance.free_tokens:,}{cached[instance]}",
            f"{instance.lent_tokens:,}",
            f"{instance.borrowed_tokens:,}",
        )
    return table


def _marks(instance: InstanceStats) -> list[str]:
    """What is not so of most instances."""
    return [*([] if instance.role == "mixed" else [instance.role]), *(["drains"] if instance.is_draining else [])]


def _cached(instance: InstanceStats) -> str:
    """What is kept of requests that are over, in the pool and below it."""
    kept = {"cached": instance.cached_tokens, "in host memory": instance.host_tokens, "on disk": instance.disk_tokens}
    parts = [f"{tokens:,} {name}" for name, tokens in kept.items() if tokens]
    return f" ({', '.join(parts)})" if parts else ""


def _requests(live: dict[str, RequestStats], width: int, most: int) -> Table:
    """Oldest first: the service lists them so."""
    table = _table("request", "state", ("home", "right"), ("prompt", "right"), ("generated", "right"), "KV on")
    room = max(12, width - 62)
    for name, request in list(live.items())[:most]:
        shown = name if len(name) <= room else name[: room - 1] + "\u2026"
        table.add_row(
            Text(shown, style=colour(name)),
            request.state,
            "-" if request.home is None else str(request.home),
            f"{request.prompt_tokens:,}",
            f"{request.generated_tokens:,}",
            " ".join(f"{rank}:{tokens:,}" for rank, tokens in sorted(request.kv_tokens.items())) or "-",
        )
    if len(live) > most:
        table.add_row(Text(f"and {len(live) - most:,} more", style="dim"))
    return table


def _table(*columns: str | tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        title, justify = column if isinstance(column, tuple) else (column, "left")
        table.add_column(title, justify="right" if justify == "right" else "left", no_wrap=True, overflow="ellipsis")
    return table
