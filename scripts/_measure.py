"""How the GPU benchmarks measure: medians of device events around replayed CUDA graphs, and one JSON file for each run."""

import datetime
import importlib.metadata
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def graph_ms(work: Callable[[], object], *, calls: int = 10, replays: int = 7) -> float:
    """Milliseconds of one call of `work`: the median over replays of a CUDA graph that holds `calls` of them."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    graph.replay()
    torch.cuda.synchronize()
    return statistics.median(_event_ms(graph.replay) for _ in range(replays)) / calls


def event_ms(work: Callable[[], object], *, repeats: int = 5) -> float:
    """Milliseconds of one call of `work`, the median over repeats: for what takes so long that launches don't count."""
    work()
    torch.cuda.synchronize()
    return statistics.median(_event_ms(work) for _ in range(repeats))


def p99(values: Sequence[float]) -> float:
    """The value that 99 % of them don't exceed."""
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def copy_bandwidth() -> float:
    """GB/s of a device copy of 4 GiB, bytes read and written."""
    source = torch.empty(1 << 31, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / event_ms(lambda: target.copy_(source)) / 1e6


def matmul_tflops() -> float:
    """TFLOP/s of an 8192 x 8192 x 8192 product in bf16 of random values."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    b = torch.randn_like(a)
    return float(2 * 8192**3 / graph_ms(lambda: a @ b, calls=3) / 1e9)


def facts() -> Row:
    """Hardware, versions and date."""
    cudnn: Any = torch.backends.cudnn  # its functions have no types
    packages = ("distattn", "torch", "triton", "transformers", "flashinfer-python")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "devices": torch.cuda.device_count(),
        "versions": found,
        "cudnn": cudnn.version() if torch.cuda.is_available() else None,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write_json(path: Path, content: Row) -> None:
    """`facts` and the content, so far: called after every row, so that an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts() | content, indent=1) + "\n")


def show(rows: Sequence[Row], title: str) -> None:
    """A table of rows; a column for each key that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    print(f"\n{title}")
    for line in [columns, ["-" * width for width in widths], *cells]:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")


def _cell(value: object) -> str:
    if value is None:
        return ""
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1000
        else str(round(value) if isinstance(value, float) else value)
    )


def _event_ms(work: Callable[[], object]) -> float:
    event: Any = torch.cuda.Event  # its methods have no types
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
