"""The serving benchmark: traces, their replay against a real service, and the figures made of it."""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import bench_serve
import pytest
from _replay import Timing, replay
from _trace import TRACES, Arrival, TraceError, make_prompt, read_trace
from hypothesis import given
from hypothesis import strategies as st

from tests.support.farm import Farm, Setup
from tests.support.processes import children, is_alive
from tests.support.service import Service, serve
from tests.support.tiny import VOCAB, make_model

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    {"at_s": 0, "prompt_tokens": 5, "max_tokens": 3, "name": "short"},
    {"at_s": 0.05, "prompt_tokens": 17, "max_tokens": 4, "name": "short"},
    {"at_s": 0, "prompt_tokens": 1, "max_tokens": 1, "name": "short"},
    {"at_s": 0, "prompt_tokens": 150, "max_tokens": 6, "name": "long"},
    {"at_s": 0.01, "prompt_tokens": 97, "max_tokens": 5, "name": "long"},
    {"at_s": 0.02, "prompt_tokens": 200, "max_tokens": 2, "name": "late", "after_first_tokens": True},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
async def service(farm: Farm, model: Path) -> AsyncIterator[Service]:
    async with serve(farm, 2, Setup(model=model, kv_tokens=1024)) as running:
        yield running


def write_trace(file: Path, *lines: object) -> str:
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(file)


def arguments(trace: str, out: Path, **other: Any) -> argparse.Namespace:
    settings = {"trace": trace, "scale": 1.0, "seed": 1, "timeout": 60.0, "out": out, "vocab_size": None}
    settings |= {"slo_ttft": 30.0, "slo_tpot": None}
    return argparse.Namespace(**settings | other)


def bench(*flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "scripts" / "bench_serve.py"), *flags]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | {"COLUMNS": "200"}
    )


# --- traces


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Input data was truncated"),
        ("7", "line 2: Expected `object`, got `int`"),
        ({"at_s": 0, "prompt_tokens": 1}, "line 2: Object missing required field `max_tokens`"),
        ({**LINES[0], "at": 0}, "line 2: Object contains unknown field `at`"),
        ({**LINES[0], "at_s": "soon"}, "line 2: Expected `float`, got `str` - at `$.at_s`"),
        ({**LINES[0], "at_s": -1}, "line 2: at_s must be at least 0, got -1.0"),
        ({**LINES[0], "prompt_tokens": 0}, "line 2: prompt_tokens and max_tokens must be at least 1, got 0 and 3"),
        ({**LINES[0], "max_tokens": 1.5}, "line 2: Expected `int`, got `float`"),
    ],
)
def test_a_bad_line_is_named(line: object, message: str, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", LINES[0], line, LINES[1])
    with pytest.raises(TraceError) as told:
        read_trace(trace)
    assert f"trace.jsonl, {message}" in str(told.value)


def test_a_trace_without_a_beginning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="has no requests"):
        read_trace(write_trace(tmp_path / "a", "", "  "))
    with pytest.raises(TraceError, match="all requests wait for the first tokens of others"):
        read_trace(write_trace(tmp_path / "b", LINES[5]))
    with pytest.raises(TraceError, match="nor one of mixed, decode32, prefill-beside-decode"):
        read_trace(str(tmp_path / "none"))
    (tmp_path / "c").write_bytes(b'{"name": "\xff"}\n')
    with pytest.raises(TraceError, match="c, line 1: "):
        read_trace(str(tmp_path / "c"))


def test_built_in_traces_scale() -> None:
    sizes = {name: [(a.prompt_tokens, a.max_tokens) for a in read_trace(name)] for name in TRACES}
    assert sizes == {
        "mixed": [(1024, 128)] * 64 + [(131_072, 64)] * 4,
        "decode32": [(8192, 256)] * 32,
        "prefill-beside-decode": [(8192, 512)] * 32 + [(131_072, 1)],
    }
    small = read_trace("prefill-beside-decode", 0.001)
    assert [(a.prompt_tokens, a.max_tokens, a.after_first_tokens) for a in small[-2:]] == [(8, 2, False), (131, 1, True)]


def test_prompts_depend_on_seed_and_place_alone() -> None:
    one = make_prompt(1000, 300, 7, 3)
    assert one == make_prompt(1000, 300, 7, 3)
    assert len(one) == 1000 and set(one) <= set(range(300)) and len(set(one)) > 250
    assert one[:20] not in (make_prompt(20, 300, 7, 4), make_prompt(20, 300, 8, 3))


# --- figures


def timing(
    name: str, due_s: float, *token_s: float, prompt_tokens: int = 10, error: str | None = None, late: bool = False
) -> Timing:
    arrival = Arrival(at_s=0, prompt_tokens=prompt_tokens, max_tokens=9, name=name, after_first_tokens=late)
    return Timing(arrival=arrival, due_s=due_s, token_s=list(token_s), error=error)


def test_figures_of_a_known_run() -> None:
    groups = bench_serve.summarise(
        [
            timing("a", 1.0, 2.0, 2.5, 3.5),
            timing("a", 1.0, 4.0, 4.25, prompt_tokens=30),
            timing("b", 2.0, error="refused"),
            timing("late", 3.0, 4.0, late=True),
        ]
    )
    assert [g.name for g in groups] == ["a", "b", "late", "a/b beside late", "all"]
    a, b, late, beside, all_ = groups
    assert (a.count, a.failed, a.ttft_p50_s, a.itl_p50_s, a.request_p50_s, a.total_s) == (2, 0, 2.0, 0.5, 2.875, 3.25)
    # times between tokens of 0.5, 1.0 and 0.25; means of 0.75 and 0.25
    assert (a.itl_p99_s, a.tpot_p50_s, a.tpot_p99_s) == (pytest.approx(0.99), 0.5, pytest.approx(0.745))
    assert a.ttft_p99_s == pytest.approx(2.98)
    assert (a.prompt_tokens_per_s, a.output_tokens_per_s) == (40 / 3.25, 5 / 3.25)
    assert (b.count, b.failed, b.ttft_p50_s, b.itl_p50_s, b.total_s, b.output_tokens_per_s) == (1, 1, None, None, None, None)
    assert (late.ttft_p50_s, late.tpot_p50_s, late.itl_p50_s, late.request_p99_s) == (1.0, None, None, 1.0)
    # from 3.0 to 4.0: one gap ends, two tokens come
    assert (beside.count, beside.itl_p99_s, beside.ttft_p50_s, beside.total_s, beside.output_tokens_per_s) == (
        3,
        1.0,
        None,
        1.0,
        2,
    )
    assert (all_.count, all_.failed, all_.total_s) == (4, 1, 3.25)


def test_completed_requests_and_goodput_of_a_known_run() -> None:
    refused = timing("a", 1.0, error="RequestRefused: too long")
    refused.refused = "never"
    timings = [
        timing("a", 1.0, 2.0, 2.5, 3.5),  # TTFT 1, TPOT 0.75
        timing("a", 1.0, 4.0),  # TTFT 3; one token has no TPOT
        timing("a", 1.0, 1.5, 5.0, error="not finished after 4 s"),
        refused,
    ]

    def figures(**objectives: float) -> tuple[float | None, float | None]:
        (group,) = bench_serve.summarise(timings, bench_serve.Objectives(**objectives))
        assert (group.count, group.failed, group.refused, group.total_s) == (4, 2, 1, 4.0)
        return group.completed_per_s, group.goodput_per_s

    assert figures() == (2 / 4, None)
    assert figures(ttft_s=3.0) == (2 / 4, 2 / 4)
    assert figures(ttft_s=2.9) == (2 / 4, 1 / 4)
    assert figures(tpot_s=0.75) == (2 / 4, 2 / 4)
    assert figures(tpot_s=0.7) == (2 / 4, 1 / 4)
    assert figures(ttft_s=2.9, tpot_s=0.7) == (2 / 4, 0)
    (nothing,) = bench_serve.summarise([refused], bench_serve.Objectives(ttft_s=1))
    assert (nothing.refused, nothing.completed_per_s, nothing.goodput_per_s) == (1, None, None)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_are_ordered_and_within(values: list[float]) -> None:
    p50, p99 = bench_serve.percentile(values, 50), bench_serve.percentile(values, 99)
    assert p50 is not None and p99 is not None
    rounding = 1e-12 * max(values)
    assert min(values) - rounding <= p50 <= p99 + rounding <= max(values) + 2 * rounding
    assert p50 == pytest.approx(statistics.median(values))


def test_gpus_are_named_without_cuda(tmp_path: Path) -> None:
    for i, name in enumerate(("NVIDIA H200", "NVIDIA H200", "Other")):
        (tmp_path / f"0{i}").mkdir()
        (tmp_path / f"0{i}" / "information").write_text(f"Model: \t\t {name}\nIRQ: 1\n")
    assert bench_serve.gpus(tmp_path) == "2 x NVIDIA H200, 1 x Other"
    assert bench_serve.gpus(tmp_path / "none") == "none"


# --- against a service


async def test_a_trace_is_replayed_measured_and_written(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_trace(tmp_path / "trace.jsonl", *LINES)
    trace = read_trace(path)
    assert await bench_serve.measure(service.server.address, trace, arguments(path, tmp_path), "cpu") == 0
    report = json.loads((tmp_path / "bench_serve.json").read_text())
    fields = {"schema", "date", "versions", "hardware", "cell", "arguments", "groups", "counters", "requests"}
    assert set(report) == fields
    assert {"python", "torch", "transformers", "distattn", "triton"} <= set(report["versions"])
    assert report["hardware"]["device"] == "cpu"
    assert report["arguments"]["seed"] == 1
    assert report["cell"]["size"] == 2
    assert report["counters"]["tokens_prefilled"] == sum(a.prompt_tokens for a in trace)
    assert [len(r["token_s"]) for r in report["requests"]] == [a.max_tokens for a in trace]
    for request in report["requests"]:
        assert request["error"] is None
        assert request["due_s"] < request["token_s"][0]
        assert request["token_s"] == sorted(request["token_s"])
    first_tokens = [r["token_s"][0] for r in report["requests"][:5]]
    assert report["requests"][5]["due_s"] >= max(first_tokens) + 0.02
    assert [(g["name"], g["count"], g["failed"]) for g in report["groups"]] == [
        ("short", 3, 0),
        ("long", 2, 0),
        ("late", 1, 0),
        ("short/long beside late", 5, 0),
        ("all", 6, 0),
    ]
    assert all(value is not None for value in report["groups"][-1].values())
    said = capsys.readouterr().out
    assert "6 requests, 470 prompt tokens; 2 instances, 2,048 tokens of KV" in said
    assert all(word in said for word in ("TTFT", "TPOT", "ITL", "prompt tok/s", "short", "long", "late", "all"))


async def test_a_trace_in_mooncakes_form_is_replayed(service: Service, tmp_path: Path) -> None:
    """Two questions about one document, another prompt, and one that is refused; nothing meets the objective."""
    lines = [
        {"timestamp": 0, "input_length": 70, "output_length": 4, "hash_ids": [0, 1, 2, 3, 4]},
        {"timestamp": 30, "input_length": 75, "output_length": 3, "hash_ids": [0, 1, 2, 3, 5]},
        {"timestamp": 60, "input_length": 12, "output_length": 5, "hash_ids": [6]},
        {"timestamp": 60, "input_length": 511, "output_length": 9, "hash_ids": list(range(100, 132))},
    ]
    path = write_trace(tmp_path / "trace.jsonl", *lines)
    trace = read_trace(path, block_tokens=16)
    asked = arguments(path, tmp_path, slo_ttft=1e-6, slo_tpot=30.0)
    assert await bench_serve.measure(service.server.address, trace, asked, "cpu") == 1
    report = json.loads((tmp_path / "bench_serve.json").read_text())
    assert [len(r["token_s"]) for r in report["requests"]] == [4, 3, 5, 0]
    assert [r["refused"] for r in report["requests"]] == [None, None, None, "too_long"]
    assert [r["due_s"] for r in report["requests"]] == [0, 0.03, 0.06, 0.06]
    assert [r["arrival"]["hash_ids"] for r in report["requests"]] == [line["hash_ids"] for line in lines]
    first, again, all_ = report["groups"]
    assert [(g["name"], g["count"], g["failed"], g["refused"]) for g in (first, again, all_)] == [
        ("first", 3, 1, 1),
        ("again", 1, 0, 0),
        ("all", 4, 1, 1),
    ]
    assert all_["completed_per_s"] == pytest.approx(3 / all_["total_s"])
    assert all_["goodput_per_s"] == 0
    assert None not in (again["ttft_p99_s"], again["tpot_p50_s"], again["completed_per_s"])


async def test_a_request_that_fails_is_told_and_the_others_go_on(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the one whose first token others wait for."""
    path = write_trace(tmp_path / "t", {"at_s": 0, "prompt_tokens": 511, "max_tokens": 9}, LINES[0], LINES[5])
    assert await bench_serve.measure(service.server.address, read_trace(path), arguments(path, tmp_path), "cpu") == 1
    report = json.loads((tmp_path / "bench_serve.json").read_text())
    assert [r["error"] is None for r in report["requests"]] == [False, True, True]
    said = capsys.readouterr().err
    assert "failed: requests, 511 tokens: RequestRefused: " in said and "the model takes at most 512" in said


async def test_what_is_not_finished_in_time_is_aborted_and_told(service: Service) -> None:
    """The fixture checks that the service is at rest afterwards."""
    trace = [
        Arrival(at_s=0, prompt_tokens=20, max_tokens=2),
        Arrival(at_s=0, prompt_tokens=20, max_tokens=490),
        Arrival(at_s=30, prompt_tokens=20, max_tokens=2),
        Arrival(at_s=30, prompt_tokens=20, max_tokens=2, after_first_tokens=True),
    ]
    began = time.monotonic()
    timings = await replay(service.client, trace, VOCAB, timeout_s=0.4)
    assert time.monotonic() - began < 5
    assert [t.error for t in timings] == [None, *["not finished after 0.4 s"] * 3]
    assert 0 < len(timings[1].token_s) < 490
    assert timings[1].total_s is None and timings[1].ttft_s is not None
    assert not timings[2].token_s and timings[3].due_s is None


async def test_leaving_a_replay_aborts_its_requests(service: Service) -> None:
    trace = [Arrival(at_s=0, prompt_tokens=20, max_tokens=490)] * 3
    replaying = asyncio.create_task(replay(service.client, trace, VOCAB))
    while not any(r.generated_tokens for r in (await service.client.stats()).requests.values()):
        await asyncio.sleep(0.01)
    replaying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await replaying


async def test_a_model_that_is_not_here_needs_a_vocabulary() -> None:
    with pytest.raises(
        bench_serve.BenchError, match="/no/such/model, as the service calls it, is not to be found .* --vocab-size"
    ):
        bench_serve.vocabulary("/no/such/model")


def test_the_vocabulary_is_the_models(model: Path) -> None:
    assert bench_serve.vocabulary(str(model)) == VOCAB


# --- the program


def test_wrong_settings_end_at_once(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "bad.jsonl", LINES[0], "nonsense")
    cases = [
        (bench("--slo-ttft", "0"), "bench_serve.py: error: --slo-ttft must be positive, got 0.0"),
        (bench("--block-tokens", "0"), "bench_serve.py: error: --block-tokens must be at least 1, got 0"),
        (bench("--trace", trace), f"bench_serve.py: {trace}, line 2: JSON is malformed: "),
        (bench("--scale", "0"), "bench_serve.py: error: --scale must be positive, got 0.0"),
        (bench("--timeout", "nan"), "bench_serve.py: error: --timeout must be positive, got nan"),
        (bench("--instances", "0"), "bench_serve.py: error: --instances must be at least 1, got 0"),
        (bench("--gmanager", "127.0.0.1"), "bench_serve.py: an address looks like tcp://"),
    ]
    for run, message in cases:
        _, said = run.communicate(timeout=60)
        assert run.returncode == 2
        assert said.splitlines()[-1].startswith(message)


def test_interrupted_it_stops_the_service_that_it_started(model: Path, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", LINES[0], {"at_s": 300, "prompt_tokens": 9, "max_tokens": 9})
    run = bench("--trace", trace, "--model", str(model), "--vocab-size", str(VOCAB), "--out", str(tmp_path / "out"))
    log = tmp_path / "out" / "gmanager.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "admitted" in log.read_text()):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = children(run.pid)
    assert len(started) >= 5  # gManager, two torchruns, two instances
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert not [pid for pid in started if is_alive(pid)]
