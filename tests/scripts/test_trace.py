"""Traces in Mooncake's form: what make_trace writes, what is read of it, and the prompts that it stands for."""

import dataclasses
import hashlib
import json
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import make_trace as maker
import msgspec
import pytest
from _trace import Arrival, BlockArrival, TraceError, TraceLine, prompt_of, read_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from make_trace import MIXES, Burst, Settings, make_trace

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"timestamp": 27482, "input_length": 1025, "output_length": 52, "hash_ids": [46, 47, 2353]}


def write_lines(file: Path, *lines: object) -> str:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(file)


def blocks(trace: list[Arrival]) -> list[BlockArrival]:
    found = [arrival for arrival in trace if isinstance(arrival, BlockArrival)]
    assert len(found) == len(trace)
    return found


def shared(one: list[int], other: list[int]) -> int:
    """How long they are the same from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# --- reading


def test_lines_are_read_as_mooncake_means_them(tmp_path: Path) -> None:
    """The first two are those of Mooncake's own description."""
    first = {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [*range(46, 58), 2353, 2354]}
    second = {"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [*range(46, 58), 2366]}
    third = {"output_length": 1, "hash_ids": [7], "input_length": 512, "timestamp": 0.5}
    one, two, three = blocks(read_trace(write_lines(tmp_path / "t.jsonl", first, "", second, third)))
    assert (one.at_s, one.prompt_tokens, one.max_tokens, one.name) == (27.482, 6955, 52, "first")
    assert (two.at_s, two.prompt_tokens, two.max_tokens, two.name) == (30.535, 6472, 26, "again")
    assert (three.at_s, three.prompt_tokens, three.max_tokens, three.name) == (0.0005, 512, 1, "first")
    prompts = [prompt_of(arrival, 50_000, 0, i) for i, arrival in enumerate((one, two, three))]
    assert [len(prompt) for prompt in prompts] == [6955, 6472, 512]
    assert shared(prompts[0], prompts[1]) == 12 * 512
    assert shared(prompts[0], prompts[2]) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Input data was truncated"),
        ("[" * 100_000, "line 2: Expected `object`, got `array`"),
        ({**GOOD, "hash_ids": None}, "line 2: Expected `array`, got `null` - at `$.hash_ids`"),
        ({**GOOD, "hash_ids": [1, "2", 3]}, "line 2: Expected `int`, got `str` - at `$.hash_ids[1]`"),
        ({**GOOD, "hash_ids": [1]}, "line 2: 1 hash_ids of 512 tokens stand for 1 to 512 tokens; input_length is 1,025"),
        ({**GOOD, "hash_ids": []}, "line 2: 0 hash_ids of 512 tokens stand for 0 to 0 tokens; input_length is 1,025"),
        (
            {**GOOD, "input_length": 1024},
            "line 2: 3 hash_ids of 512 tokens stand for 1,025 to 1,536 tokens; input_length is 1,024",
        ),
        ({**GOOD, "input_length": 0}, "line 2: input_length and output_length must be at least 1, got 0 and 52"),
        ({**GOOD, "output_length": -1}, "line 2: input_length and output_length must be at least 1, got 1025 and -1"),
        ({**GOOD, "timestamp": -1}, "line 2: timestamp must be at least 0, got -1"),
        ({**GOOD, "timestamp": "soon"}, "line 2: Expected `int | float`, got `str` - at `$.timestamp`"),
        ({**GOOD, "session_id": "a"}, "line 2: Object contains unknown field `session_id`"),
        ({"timestamp": 0, "input_length": 5}, "line 2: Object missing required field `output_length`"),
        ({"at_s": 0, "prompt_tokens": 5, "max_tokens": 5}, "line 2: Object contains unknown field `at_s`"),
    ],
)
def test_a_bad_line_is_named(line: object, message: str, tmp_path: Path) -> None:
    trace = write_lines(tmp_path / "trace.jsonl", GOOD, line, GOOD)
    with pytest.raises(TraceError) as told:
        read_trace(trace)
    assert f"{tmp_path}/trace.jsonl, {message}" in str(told.value)


def test_the_first_line_says_which_form_the_file_has(tmp_path: Path) -> None:
    ours = {"at_s": 0, "prompt_tokens": 5, "max_tokens": 5}
    with pytest.raises(TraceError, match="line 2: Object contains unknown field `timestamp`"):
        read_trace(write_lines(tmp_path / "a", ours, GOOD))
    with pytest.raises(TraceError, match="line 1: Object missing required field `timestamp`"):
        read_trace(write_lines(tmp_path / "b", {"input_length": 5}))
    with pytest.raises(TraceError, match="line 1: "):
        read_trace(write_lines(tmp_path / "c", '{"timestamp": ' + "[" * 100_000))
    with pytest.raises(TraceError, match="line 1: Object contains unknown field `hash_ids`"):
        read_trace(write_lines(tmp_path / "d", {**ours, "name": "timestamp", "hash_ids": [1]}, ours))


def test_other_blocks_are_told(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "t", {**GOOD, "input_length": 33})
    assert blocks(read_trace(file, block_tokens=16))[0].block_tokens == 16
    with pytest.raises(TraceError, match="3 hash_ids of 512 tokens"):
        read_trace(file)


def test_a_scaled_trace_shares_what_it_shared(tmp_path: Path) -> None:
    again = {**GOOD, "input_length": 1500, "hash_ids": [46, 47, 5]}
    longer = {**GOOD, "input_length": 2048, "hash_ids": [46, 47, 2353, 6]}
    file = write_lines(tmp_path / "t", GOOD, again, longer)
    small = blocks(read_trace(file, 1 / 32))
    assert [(a.prompt_tokens, a.max_tokens, a.block_tokens) for a in small] == [(33, 2, 16), (47, 2, 16), (64, 2, 16)]
    prompts = [prompt_of(arrival, 50_000, 3, i) for i, arrival in enumerate(small)]
    assert shared(prompts[0], prompts[1]) == 32
    assert shared(prompts[0], prompts[2]) == 33  # a last block is the beginning of the same one that is full


def test_prompts_depend_on_seed_and_hash_ids_alone() -> None:
    arrival = BlockArrival(at_s=0, prompt_tokens=40, max_tokens=1, hash_ids=[3, 4, 3], block_tokens=16)
    prompt = prompt_of(arrival, 300, 7, 0)
    assert prompt == prompt_of(msgspec.structs.replace(arrival, at_s=9.0), 300, 7, 5)
    assert len(prompt) == 40 and set(prompt) <= set(range(300))
    assert prompt[:8] == prompt[32:] and prompt[:16] != prompt[16:32]
    assert shared(prompt, prompt_of(arrival, 300, 8, 0)) < 3


# --- writing


small_settings = st.builds(
    Settings,
    mix=st.integers(3, 8),
    requests=st.integers(1, 40),
    rate=st.floats(0.01, 1000),
    seed=st.integers(),
    scale=st.floats(1e-4, 0.02),
    answer_scale=st.floats(0.001, 2),
    bursts=st.sampled_from([(), (Burst(0.5, 2, 8),), (Burst(3, 1, 0.1), Burst(0, 3, 4))]),
    turns=st.integers(1, 4),
    think_s=st.floats(0.01, 100),
    block_tokens=st.integers(1, 700),
)


@settings(max_examples=60, deadline=None)
@given(wanted=small_settings)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, wanted: Settings) -> None:
    lines = make_trace(wanted)
    file = tmp_path_factory.getbasetemp() / "written.jsonl"
    maker.write(lines, file)
    read = blocks(read_trace(str(file), block_tokens=wanted.block_tokens))
    assert len(read) == wanted.requests
    for line, arrival in zip(lines, read, strict=True):
        assert (line.timestamp / 1e3, line.input_length, line.output_length) == (
            arrival.at_s,
            arrival.prompt_tokens,
            arrival.max_tokens,
        )
        assert line.hash_ids == arrival.hash_ids
    assert [arrival.at_s for arrival in read] == sorted(arrival.at_s for arrival in read)
    # ids are numbered as they appear, and prompts share tokens where they share ids
    appeared = list(dict.fromkeys(i for line in lines for i in line.hash_ids))
    assert appeared == list(range(len(appeared)))
    for one, other in pairwise(read):
        common = shared(one.hash_ids, other.hash_ids)
        prompts = prompt_of(one, 1_000_000, 0, 0), prompt_of(other, 1_000_000, 0, 1)
        assert shared(*prompts) >= min(common * wanted.block_tokens, *map(len, prompts))
        if common == 0:
            assert shared(*prompts) < 2


def test_the_same_arguments_write_the_same_bytes() -> None:
    """This digest was written down once, so that another machine, or another Python, is compared with it."""
    wanted = Settings(mix=6, requests=200, rate=3.0, seed=5, scale=0.01, bursts=(Burst(10, 5, 4),), turns=3, block_tokens=64)
    text = b"\n".join(map(msgspec.json.encode, make_trace(wanted)))
    assert hashlib.sha256(text).hexdigest() == "4cf5f6a59d06c76edb8d891831b451905338f9f1b3e5a26754303719553b5ea6"
    assert make_trace(wanted) != make_trace(dataclasses.replace(wanted, seed=6))


@pytest.mark.parametrize("number", range(9))
def test_a_mix_has_the_lengths_and_the_share_it_says(number: int) -> None:
    mix = MIXES[number]
    lines = make_trace(Settings(mix=number, requests=400))
    longs = [line.input_length for line in lines if line.input_length > mix.short[1]]
    shorts = [line.input_length for line in lines if line.input_length <= mix.short[1]]
    assert len(longs) == round(400 * mix.long_share)
    assert min(shorts) >= mix.short[0]
    assert all(mix.long[0] <= length <= mix.long[1] for length in longs)
    middle = (mix.short[0] * mix.short[1]) ** 0.5  # the median of log-uniform lengths
    assert middle / 1.5 < statistics.median(shorts) < middle * 1.5
    assert all(16 <= line.output_length <= 512 for line in lines)
    assert all(len(line.hash_ids) == -(-line.input_length // 512) for line in lines)


def test_long_requests_take_a_growing_share() -> None:
    assert [mix.long_share for mix in MIXES[:3]] == [0, 0, 0]
    shares = [mix.long_share for mix in MIXES[3:]]
    assert len(shares) == 6 and shares == sorted(set(shares)) and shares[0] > 0
    assert any(line.input_length > 100 for line in make_trace(Settings(mix=3, requests=5, scale=1 / 256)))  # one at least


def test_arrivals_are_poisson_and_bursts_multiply_them() -> None:
    lines = make_trace(Settings(mix=0, requests=4000, rate=10, bursts=(Burst(100, 50, 4),)))
    at = [line.timestamp / 1e3 for line in lines]
    before, during, after = (sum(a <= t < b for t in at) for a, b in ((0, 100), (100, 150), (150, 200)))
    assert abs(before - 1000) < 4 * 1000**0.5
    assert abs(during - 2000) < 4 * 2000**0.5
    assert abs(after - 500) < 4 * 500**0.5
    gaps = [b - a for a, b in pairwise(t for t in at if t < 100)]
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.15)
    assert statistics.stdev(gaps) == pytest.approx(0.1, rel=0.15)  # exponential: as far spread as they are long


def test_questions_about_a_document_begin_alike() -> None:
    lines = make_trace(Settings(mix=8, requests=100, turns=3, scale=0.01, think_s=2, block_tokens=64))
    groups: dict[int, list[TraceLine]] = {}
    for line in lines:
        groups.setdefault(line.hash_ids[0], []).append(line)
    asked = [group for group in groups.values() if len(group) > 1]
    assert len(asked) > 5 and max(map(len, asked)) == 3
    for group in asked:
        commons = [shared(one.hash_ids, other.hash_ids) for one, other in pairwise(group)]
        assert len(set(commons)) == 1
        for line in group:  # what is not shared is a question: 16 to 256 tokens, scaled
            assert 1 <= line.input_length - commons[0] * 64 <= 3
        assert [line.timestamp for line in group] == sorted(line.timestamp for line in group)
    assert sum(len(set(line.hash_ids)) for line in lines) == sum(len(line.hash_ids) for line in lines)


# --- the program


def run(*flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "scripts" / "make_trace.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_file_is_written_and_told(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    flags = ["--requests", "30", "--scale", "0.01", "--turns", "2", "--block-tokens", "16", "--burst", "5:5:3"]
    done = run("5", str(file), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("30 requests in ") and " of the blocks had come before" in done.stdout
    first = json.loads(file.read_text().splitlines()[0])
    assert list(first) == ["timestamp", "input_length", "output_length", "hash_ids"]
    assert len(read_trace(str(file), block_tokens=16)) == 30


def test_wrong_arguments_write_nothing(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    done = run("5", str(file), "--rate", "0")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "make_trace.py: error: --rate must be positive, got 0.0")
    done = run("5", str(file / "no"))
    assert done.returncode == 2 and done.stderr.startswith("make_trace.py: [Errno")
    assert not file.exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mix": 9}, "the mix must be 0 to 8, got 9"),
        ({"requests": 0}, "--requests must be at least 1, got 0"),
        ({"scale": float("nan")}, "--scale must be positive, got nan"),
        ({"answer_scale": -1.0}, "--answer-scale must be positive, got -1.0"),
        ({"mix": 1, "turns": 2}, "--turns 2 asks about long prompts, and mix 1 has none"),
        ({"bursts": (Burst(4, 2, 2), Burst(0, 5, 3))}, "the bursts at 0 s and 4 s overlap"),
    ],
)
def test_wrong_settings_are_told(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{"mix": 5} | wrong)


@pytest.mark.parametrize("text", ["", "1:2", "1:2:3:4", "a:b:c", "-1:2:3", "1:0:3", "1:2:0", "1:inf:2", "1:2:nan"])
def test_a_wrong_burst_is_told(text: str) -> None:
    with pytest.raises(ValueError):
        Burst.parse(text)
