"""The scaling benchmark: what follows from figures of several numbers of GPUs, and a dry run of four instances on the CPU."""

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_cell
import bench_scaling
import pytest
from _scaling import Figure, Measured, Report, ScalingError, draw, read, table, write

from tests.support.processes import children, is_alive
from tests.support.tiny import make_model

SCRIPT = Path(bench_scaling.__file__)


def report_of(*measured: Measured, shape: str = "tiny", device: str = "cuda") -> Report:
    report = Report(shape=shape, device=device, versions={})
    for one in measured:
        report.add(one)
    return report


def part(name: str, gpus: int, *rows: dict[str, Any], seconds: float = 1.0) -> Measured:
    return Measured(part=name, gpus=gpus, rows=list(rows), seconds=seconds, date="2026-11-30", hardware="none", arguments={})


def said(report: Report, what: str) -> dict[int, Figure]:
    return {figure.gpus: figure for figure in report.figures if figure.what == what}


# --- what follows


def test_a_figure_is_compared_with_the_fewest_gpus_that_have_it() -> None:
    report = report_of(
        part("prefill", 4, {"tokens": 1000, "s": 3.0}, {"tokens": 9000, "s": 50.0}),
        part("capacity", 4, {"tokens": 3900}),
        part("capacity", 1, {"tokens": 1000}),
        part("prefill", 1, {"tokens": 1000, "s": 9.0}, {"tokens": 9000, "room": 8000}),
        part("prefill", 2, {"tokens": 1000, "s": 5.0}, {"tokens": 9000, "s": 96.0}),
    )
    assert [(m.gpus, m.part) for m in report.measured] == [
        (1, "capacity"), (1, "prefill"), (2, "prefill"), (4, "capacity"), (4, "prefill"),
    ]  # fmt: skip
    capacity = said(report, "capacity")
    assert (capacity[1].against, capacity[1].speed_up) == (None, None)
    assert (capacity[4].against, capacity[4].speed_up, capacity[4].efficiency) == (1, 3.9, 3.9 / 4)
    short = said(report, "prefill of 1,000 tokens")
    assert [(short[n].against, short[n].speed_up) for n in (2, 4)] == [(1, 1.8), (1, 3.0)]
    assert short[4].efficiency == 0.75
    long = said(report, "prefill of 9,000 tokens")
    assert list(long) == [2, 4]
    assert (long[4].against, long[4].speed_up, long[4].efficiency) == (2, 1.92, 0.96)
    assert [figure.what for figure in report.figures][:2] == ["capacity", "capacity"]


def test_of_what_one_gpu_cannot_hold_the_attention_part_is_scaled() -> None:
    one = [
        {"tokens": 1000, "one GPU ms": 5.0, "attention ms": 1.0},
        {"tokens": 9000, "room": 8000},
        {"tokens": 8000, "one GPU ms": 12.0, "attention ms": 8.0, "largest": True},
    ]
    two = [
        {"tokens": 1000, "one GPU ms": 5.0, "all GPUs ms": 4.5, "attention ms": 0.5},
        {"tokens": 9000, "all GPUs ms": 9.0, "attention ms": 5.0},
        {"tokens": 16000, "all GPUs ms": 12.4, "attention ms": 8.4, "largest": True},
    ]
    report = report_of(part("tpot", 1, *one), part("tpot", 2, *two))
    scaled = said(report, "attention part of TPOT, 9,000 tokens")
    assert (scaled[1].value, scaled[1].note) == (9.0, "scaled from 8,000 tokens")
    assert (scaled[2].against, scaled[2].speed_up, scaled[2].efficiency) == (1, 1.8, 0.9)
    short = said(report, "attention part of TPOT, 1,000 tokens")
    assert (short[1].value, short[1].note, short[2].speed_up) == (1.0, "", 2.0)
    assert list(said(report, "TPOT, 9,000 tokens")) == [2]
    largest = said(report, "TPOT, the largest that fits")
    assert [(largest[n].value, largest[n].note, largest[n].speed_up) for n in (1, 2)] == [
        (12.0, "8,000 tokens", None), (12.4, "16,000 tokens", None),
    ]  # fmt: skip


def test_where_nothing_is_shared_what_a_step_takes_longer_is_overhead() -> None:
    rows = [{"rows": 64, "tokens": 4096, "one ms": ms, "all ms": ms, "ratio": 1.0} for ms in (10.0, 10.2)]
    report = report_of(part("overhead", 1, rows[0]), part("overhead", 4, rows[1]))
    figure = said(report, "step of 64 rows of 4,096 on each, nothing shared")[4]
    assert figure.overhead == pytest.approx(0.02)
    assert (figure.speed_up, figure.efficiency) == (pytest.approx(4 / 1.02), pytest.approx(1 / 1.02))


def test_a_trace_of_which_requests_failed_is_not_compared() -> None:
    row = {"trace": "mix5", "requests": 9, "failed": 0, "tokens/s": 100.0}
    report = report_of(part("trace", 1, row), part("trace", 2, row | {"tokens/s": 190.0}))
    assert said(report, "trace mix5")[2].speed_up == 1.9
    report.add(part("trace", 1, row | {"failed": 2}))
    figures = said(report, "trace mix5")
    assert figures[1].note == "2 of 9 requests failed"
    assert (figures[1].against, figures[2].against) == (None, None)


def test_needles_are_told_with_their_context() -> None:
    row = {"tokens": 3_500_000, "asked": 5, "right": 4, "instances": 4}
    (figure,) = report_of(part("needles", 4, row)).figures
    assert (figure.value, figure.note) == (4, "of 5 at 3,500,000 tokens on 4 instances")


# --- files


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "new" / "scaling.json"
    fresh = report_of()
    assert read(file, fresh) is fresh
    write(file, report_of(part("capacity", 1, {"tokens": 10}), part("capacity", 2, {"tokens": 20})))
    report = read(file, Report(shape="tiny", device="cuda", versions={"torch": "3"}))
    assert report.versions == {"torch": "3"}
    report.add(part("capacity", 2, {"tokens": 19}, seconds=7.5))
    assert [(m.gpus, m.rows, m.seconds) for m in report.measured] == [(1, [{"tokens": 10}], 1.0), (2, [{"tokens": 19}], 7.5)]
    assert said(report, "capacity")[2].speed_up == 1.9
    write(file, report)
    assert read(file, report) == report


def test_a_file_of_other_things_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    write(file, report_of())
    with pytest.raises(ScalingError, match="is of tiny on cuda, schema 1; this run is of tiny on cpu, schema 1: give another"):
        read(file, report_of(device="cpu"))
    file.write_text("{")
    with pytest.raises(ScalingError, match="scaling.json: Input data was truncated"):
        read(file, report_of())


def test_a_picture_is_drawn_if_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(part("capacity", 1, {"tokens": 10}))
    assert draw(report, tmp_path / "a.png") == "nothing was measured on several numbers of GPUs"
    report.add(part("capacity", 4, {"tokens": 40}))
    report.add(part("needles", 4, {"tokens": 9, "asked": 5, "right": 5, "instances": 4}))
    assert draw(report, tmp_path / "b.png") is None
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert draw(report, tmp_path / "c.png") == "matplotlib is not installed"
    assert not (tmp_path / "a.png").exists() and not (tmp_path / "c.png").exists()
    assert [row["speed-up"] for row in table(report.figures)] == [None, 4.0, None]


# --- arguments


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "4", "0"], "--gpus must be at least 1, got 0"),
        (["--prefill", "0"], "--prefill must be at least 1, got 0"),
        (["--tpot", "-5"], "argument --tpot: must be at least 1, or largest, got -5"),
        (["--tpot", "most"], "argument --tpot: must be at least 1, or largest, got most"),
        (["--requests", "0"], "--requests must be at least 1, got 0"),
        (["--needle-tokens", "0"], "--needle-tokens must be at least 1, got 0"),
        (["--kv-tokens", "63"], "--kv-tokens must be at least a block of 64, got 63"),
        (["--scale", "0"], "--scale must be positive, got 0.0"),
        (["--timeout", "nan"], "--timeout must be positive, got nan"),
        (["--mix", "9"], "--mix must be 0 to 8, got 9"),
        (["--shape", "llama-9"], "--shape llama-9 is neither a file nor one of tiny, "),
        (["--parts", "speed"], "argument --parts: invalid choice: 'speed'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_scaling.parse(["--device", "cpu", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_more_gpus_than_there_are_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_scaling.parse(["--gpus", "2", "4096"])
    assert "--gpus 4096: found " in capsys.readouterr().err
    assert bench_scaling.parse(["--gpus", "4096", "--parts"]).parts == []  # what was measured elsewhere is compared anywhere


def test_sizes_depend_on_the_device() -> None:
    here, there = (bench_scaling.parse(["--parts", "--device", device]) for device in ("cpu", "cuda"))
    assert (here.shape, here.kv_tokens, here.scale) == ("tiny", 16384, 1 / 64)
    assert (there.shape, there.kv_tokens, there.scale) == ("llama-3.1-8b", None, 1.0)
    assert there.tpot == [131072, 1048576, 0]
    assert bench_scaling.parse(["--parts", "--device", "cpu", "--scale", "2", "--tpot", "7", "largest"]).tpot == [7, 0]


@pytest.mark.parametrize(
    ("size", "words", "message"),
    [
        (1, ["--only", "exchange"], "exchange needs two GPUs at least, this is 1"),
        (4, ["--kv-tokens", "9"], "--kv-tokens must be at least 64, got 9"),
        (4, ["--scale", "-1"], "--scale must be positive, got -1.0"),
        (4, ["--prefill", "0"], "--prefill must be at least 1, got 0"),
        (4, ["--device", "cpu"], "on the CPU it needs --kv-tokens"),
        (4096, ["--device", "cuda"], "4096 processes need as many GPUs, found "),
    ],
)
def test_a_cell_that_cannot_be_is_refused(
    size: int, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_cell.parse(size, words)
    assert message in capsys.readouterr().err
    assert "exchange" not in bench_cell.parse(1, ["--device", "cpu", "--kv-tokens", "64"]).only


# --- dry runs


def bench(out: Path, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--out", str(out), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(running: "subprocess.Popen[str]") -> tuple[int, str]:
    printed, errors = running.communicate(timeout=280)
    return running.returncode, printed + errors


def test_a_dry_run_of_one_and_four_instances(tmp_path: Path) -> None:
    """One instance holds 8,192 tokens, so the longer prompt is compared with nothing; --scale makes 64 tokens of 4,096."""
    out = tmp_path / "scaling.json"
    sizes = ["--prefill", "65536", "524288", "--tpot", "65536", "1048576", "largest"]
    flags = ["--gpus", "1", "4", "--kv-tokens", "16384", *sizes, "--parts", "capacity", "prefill", "tpot", "overhead"]
    code, told = ended(bench(out, *flags))
    assert code == 0, told
    assert all(f"{n} x cpu, {name}: " in told for n in (1, 4) for name in flags[-4:])
    report = read(out, report_of(device="cpu"))
    assert {(m.gpus, m.part) for m in report.measured} == {(n, name) for n in (1, 4) for name in flags[-4:]}
    assert said(report, "capacity")[4].speed_up == 4.0
    assert said(report, "prefill of 8,192 tokens")[4].against == 1
    assert list(said(report, "TPOT, 16,384 tokens")) == [4]
    assert said(report, "attention part of TPOT, 16,384 tokens")[1].note == "scaled from 16,192 tokens"
    assert said(report, "TPOT, the largest that fits")[4].note == "64,768 tokens"
    assert said(report, "step of 64 rows of 64 on each, nothing shared")[4].overhead is not None
    assert out.with_suffix(".png").exists()


def test_a_dry_run_of_a_trace(tmp_path: Path) -> None:
    """Through a service of four instances. The file that is there is gone on with."""
    out = tmp_path / "scaling.json"
    write(out, report_of(part("capacity", 1, {"tokens": 10}), device="cpu"))
    model = make_model("llama", tmp_path / "model")
    flags = ["--gpus", "4", "--parts", "trace", "--requests", "6", "--mix", "0", "--model", str(model)]
    code, told = ended(bench(out, *flags))
    assert code == 0, told
    first, trace = read(out, report_of(device="cpu")).measured
    assert (first.part, trace.part, trace.gpus) == ("capacity", "trace", 4)
    (row,) = trace.rows
    assert (row["requests"], row["failed"]) == (6, 0)
    assert row["tokens/s"] > 0


def test_a_dry_run_of_needles(tmp_path: Path) -> None:
    """Each of four instances has room for a little more than a fourth of the haystack."""
    out = tmp_path / "scaling.json"
    code, told = ended(bench(out, "--gpus", "4", "--parts", "needles", "--needle-tokens", "2048"))
    assert code == 0, told
    (needles,) = read(out, report_of(device="cpu")).measured
    (row,) = needles.rows
    assert (row["tokens"], row["asked"], row["right"], row["instances"]) == (8192, 5, 5, 4)


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    running = bench(
        tmp_path / "scaling.json", "--gpus", "2", "--parts", "needles", "--timeout", "25", "--needle-tokens", "200000"
    )
    started: set[int] = set()
    while running.poll() is None:
        started.update(children(running.pid))
        time.sleep(0.2)
    code, told = ended(running)
    assert code == 1, told
    assert "2 x cpu, needles: not finished after 25 s; see " in told
    assert len(started) >= 5  # the benchmark, a gManager, torchruns and instances
    assert not [pid for pid in started if is_alive(pid)]


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    """The pools are too small for 64 rows."""
    out = tmp_path / "scaling.json"
    flags = ["--gpus", "2", "--kv-tokens", "4096", "--prefill", "65536", "--parts", "overhead", "prefill"]
    code, told = ended(bench(out, *flags))
    assert code == 1, told
    assert "2 x cpu, prefill, overhead: exit code 1: bench_cell: apart: 120 tokens don't fit in 64 free ones" in told
    assert [m.part for m in read(out, report_of(device="cpu")).measured] == ["prefill"]


def test_interrupted_it_ends_what_it_started(tmp_path: Path) -> None:
    running = bench(tmp_path / "scaling.json", "--gpus", "2", "--parts", "capacity")
    started: set[int] = set()
    while len(started) < 3:  # torchrun and two members
        assert running.poll() is None, ended(running)
        started.update(children(running.pid))
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    code, told = ended(running)
    assert (code, told.splitlines()[-1]) == (130, "interrupted")
    assert not [pid for pid in started if is_alive(pid)]
