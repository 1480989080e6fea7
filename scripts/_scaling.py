"""What was measured on so many GPUs, kept over runs in one file, and what follows from it: speed-up and efficiency.

A figure's speed-up is against the same figure on the fewest GPUs that have it: one, or as many as it takes to hold it.
Efficiency is the speed-up over the ratio of GPUs. Of a step in which nothing is shared each GPU has rows of its own, so that as
many times the work is done: its speed-up is that of rows per second, and its overhead what the step takes longer.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
from _measure import Row

LOWER = ("s", "ms")
"""Units of which less is better; of all others more is."""


class ScalingError(ValueError):
    """The file can't be used; the message says why."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One part on so many GPUs."""

    part: str
    gpus: int
    rows: list[Row]
    """As the benchmark that measured it wrote them."""
    seconds: float
    """How long it took; not the start of a cell, which its parts share."""
    date: str
    """UTC, ISO 8601."""
    hardware: str
    arguments: dict[str, str]
    """Of the run."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One number, beside the same on fewer GPUs. None: there is nothing to compare with."""

    what: str
    gpus: int
    value: float
    unit: str
    note: str = ""
    compares: bool = True
    """Whether it is the same task on any number of GPUs."""
    is_weak: bool = False
    """Whether each GPU has work of its own."""
    against: int | None = None
    """GPUs of the figure that it is compared with."""
    speed_up: float | None = None
    efficiency: float | None = None
    overhead: float | None = None


class Report(msgspec.Struct, kw_only=True):
    """bench_scaling.json."""

    schema: int = 1
    shape: str
    device: str
    versions: dict[str, str]
    """Of the newest run."""
    measured: list[Measured] = []
    figures: list[Figure] = []

    def add(self, measured: Measured) -> None:
        """In the place of what the same part gave on as many GPUs before."""
        self.measured = [m for m in self.measured if (m.part, m.gpus) != (measured.part, measured.gpus)]
        self.measured = sorted([*self.measured, measured], key=lambda m: (m.gpus, list(FIGURES).index(m.part)))
        self.figures = compared(figures_of(self.measured))


def read(file: Path, fresh: Report) -> Report:
    """What a file holds, to go on with; `fresh` if there is none. Raises ScalingError if it is of other things."""
    if not file.exists():
        return fresh
    try:
        report = msgspec.json.decode(file.read_bytes(), type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ScalingError(f"{file}: {error}") from error
    if (report.schema, report.shape, report.device) != (fresh.schema, fresh.shape, fresh.device):
        raise ScalingError(
            f"{file} is of {report.shape} on {report.device}, schema {report.schema}; "
            f"this run is of {fresh.shape} on {fresh.device}, schema {fresh.schema}: give another --out"
        )
    report.versions = fresh.versions
    return report


def write(file: Path, report: Report) -> None:
    """Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


# --- figures of parts -------------------------------------------------------------------------------------------------


def _capacity(m: Measured) -> Iterator[Figure]:
    for row in m.rows:
        yield Figure(what="capacity", gpus=m.gpus, value=row["tokens"], unit="tokens")


def _prefill(m: Measured) -> Iterator[Figure]:
    for row in m.rows:
        if "s" in row:
            yield Figure(what=f"prefill of {row['tokens']:,} tokens", gpus=m.gpus, value=row["s"], unit="s")


def _tpot(m: Measured) -> Iterator[Figure]:
    for row in m.rows:
        if "attention ms" not in row:
            continue  # it doesn't fit
        value = row["all GPUs ms" if m.gpus > 1 else "one GPU ms"]
        at = f"{row['tokens']:,} tokens"
        if row.get("largest"):
            yield Figure(what="TPOT, the largest that fits", gpus=m.gpus, value=value, unit="ms", note=at, compares=False)
        else:
            yield Figure(what=f"TPOT, {at}", gpus=m.gpus, value=value, unit="ms")
            yield Figure(what=_attention(row["tokens"]), gpus=m.gpus, value=row["attention ms"], unit="ms")


def _overhead(m: Measured) -> Iterator[Figure]:
    for row in m.rows:
        what = f"step of {row['rows']} rows of {row['tokens']:,} on each, nothing shared"
        yield Figure(what=what, gpus=m.gpus, value=row["all ms"], unit="ms", is_weak=True)


def _trace(m: Measured) -> Iterator[Figure]:
    for row in m.rows:
        note = f"{row['failed']} of {row['requests']} requests failed" if row["failed"] else ""
        # of those that failed nothing was computed, or not all: no such rate is compared with others
        yield Figure(
            what=f"trace {row['trace']}", gpus=m.gpus, value=row["tokens/s"], unit="tokens/s", note=note, compares=not note
        )


def _needles(m: Measured) -> Iterator[Figure]:
    for row in m.rows:
        note = f"of {row['asked']} at {row['tokens']:,} tokens on {row['instances']} instances"
        yield Figure(what="needles found", gpus=m.gpus, value=row["right"], unit="needles", note=note, compares=False)


FIGURES: dict[str, Callable[[Measured], Iterator[Figure]]] = {
    "capacity": _capacity,
    "prefill": _prefill,
    "tpot": _tpot,
    "overhead": _overhead,
    "trace": _trace,
    "needles": _needles,
}
"""By part, in the order in which they are measured and shown."""


def _attention(tokens: int) -> str:
    return f"attention part of TPOT, {tokens:,} tokens"


def figures_of(measured: Sequence[Measured]) -> list[Figure]:
    """All figures by what they are of, then by GPUs.

    Where one GPU can't hold a sequence its attention part there is that of the longest that it held, times the ratio of tokens:
    a row reads every token once.
    """
    most_first = sorted(measured, key=lambda m: -m.gpus)  # who has all lengths, in their order
    found = [figure for part, of in FIGURES.items() for m in most_first if m.part == part for figure in of(m)]
    one = next((m for m in measured if (m.part, m.gpus) == ("tpot", 1)), None)
    held = [row for row in one.rows if "attention ms" in row] if one is not None else []
    if held:
        longest = max(held, key=lambda row: row["tokens"])
        theirs = {row["tokens"] for m in measured if m.part == "tpot" for row in m.rows if not row.get("largest")}
        for tokens in sorted(theirs):
            if not any((f.what, f.gpus) == (_attention(tokens), 1) for f in found):
                value = longest["attention ms"] * tokens / longest["tokens"]
                note = f"scaled from {longest['tokens']:,} tokens"
                found.append(Figure(what=_attention(tokens), gpus=1, value=value, unit="ms", note=note))
    order = list(dict.fromkeys(figure.what for figure in found))
    return sorted(found, key=lambda figure: (order.index(figure.what), figure.gpus))


def compared(figures: Sequence[Figure]) -> list[Figure]:
    """Each beside the one of the fewest GPUs."""
    bases: dict[str, Figure] = {}
    for figure in sorted(figures, key=lambda figure: figure.gpus):
        if figure.compares and figure.value > 0:
            bases.setdefault(figure.what, figure)
    return [_beside(bases.get(figure.what), figure) for figure in figures]


def _beside(base: Figure | None, figure: Figure) -> Figure:
    if base is None or base.gpus == figure.gpus or not (figure.compares and figure.value > 0):
        return figure
    ratio = figure.gpus / base.gpus
    gain = base.value / figure.value if figure.unit in LOWER else figure.value / base.value
    speed_up = gain * ratio if figure.is_weak else gain
    overhead = 1 / gain - 1 if figure.is_weak else None
    return msgspec.structs.replace(figure, against=base.gpus, speed_up=speed_up, efficiency=speed_up / ratio, overhead=overhead)


# --- showing ----------------------------------------------------------------------------------------------------------


def table(figures: Sequence[Figure]) -> list[Row]:
    """For `_measure.show`."""
    return [
        {
            "what": f.what, "GPUs": f.gpus, "value": f.value, "unit": f.unit, "over": f.against, "speed-up": f.speed_up,
            "efficiency": f.efficiency, "overhead": f.overhead, "note": f.note,
        }
        for f in figures
    ]  # fmt: skip


def draw(report: Report, file: Path) -> str | None:
    """Speed-up and efficiency over GPUs, a line for each figure that several numbers of GPUs have.

    Why there is no picture, if there is none: matplotlib isn't installed, or there is nothing to draw. Raises OSError.
    """
    figures = report.figures
    names = [name for name in dict.fromkeys(f.what for f in figures) if any(f.what == name and f.against for f in figures)]
    if not names:
        return "nothing was measured on several numbers of GPUs"
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    drawn, (ups, parts) = plt.subplots(1, 2, figsize=(15, 5), layout="constrained")
    most = max(f.gpus for f in figures)
    ups.plot([1, most], [1, most], color="black", linestyle=":", label="as many times as there are")
    for name in names:
        its = [f for f in figures if f.what == name and f.against is not None]
        base = its[0].against or 1
        gpus = [base, *(f.gpus for f in its)]
        ups.plot(gpus, [base, *(base * (f.speed_up or 0) for f in its)], marker="o", label=name)
        parts.plot(gpus, [1, *(f.efficiency for f in its)], marker="o")
    for panel, name in ((ups, "speed-up (what one can't hold: 2 at two)"), (parts, "efficiency")):
        panel.set_title(name)
        panel.set_xlabel("GPUs" if report.device == "cuda" else "instances on the CPU")
        panel.set_xticks(sorted({f.gpus for f in figures}))
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    drawn.legend(loc="outside right upper", fontsize="small")
    drawn.suptitle(f"{report.shape} on {report.device}")
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(file, dpi=120)
    plt.close(drawn)
    return None
