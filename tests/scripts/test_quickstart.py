"""The quickstart itself, with its own model and short prompts, in this Python."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import children, is_alive
from tests.support.tiny import make_model

ROOT = Path(__file__).resolve().parents[2]


def quickstart(*flags: str) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "scripts" / "quickstart"), "--no-install", *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | {"COLUMNS": "200"}
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--depths", "101"), "quickstart: error: --depths are percentages, got 101"),
        (("--contexts", "1024", "0"), "quickstart: error: --contexts must be at least 1, got 0"),
        (("--instances", "0"), "quickstart: error: --instances must be at least 1, got 0"),
        (("--model", "no/such/model.gguf"), "quickstart: there is no file no/such/model.gguf"),
    ],
)
def test_wrong_settings_end_at_once(flags: tuple[str, ...], message: str) -> None:
    run = quickstart(*flags)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 2
    assert said.splitlines()[-1] == message


def test_help_names_all_flags() -> None:
    run = quickstart("--help")
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    flags = "--instances --device --model --haystack --contexts --depths --out --fetch-only --no-install"
    assert all(flag in said for flag in flags.split())


def test_needles_are_asked_for_and_a_request_that_fails_is_told_and_counts(tmp_path: Path) -> None:
    """9000 tokens are more than the model takes; the other prompt lies on both instances, and its answer is transformers'."""
    flags = ["--contexts", "300", "9000", "--depths", "50", "--max-tokens", "8", "--reference", "transformers"]
    run = quickstart(*flags, "--out", str(tmp_path))
    said, errors = run.communicate(timeout=120)
    assert run.returncode == 1, errors
    assert re.search(r"failed: 9000 tokens, depth 50 %: .*9,000 .* 8 = 9,008 tokens; the model takes at most 8,192", errors)
    assert "1 of 1 needles found" in said or "0 of 1 needles found" in said
    (result,) = json.loads((tmp_path / "needle.json").read_text())["results"]
    assert result["prompt_tokens"] == 300
    assert sorted(result["kv_tokens_by_instance"]) == ["0", "1"]
    assert result["token_ids"] == result["reference"]["token_ids"]
    assert (tmp_path / "needle.png").stat().st_size > 1000


@pytest.mark.parametrize("script", ["quickstart", "bench_serve.py"])
def test_an_instance_says_itself_why_it_can_not_start(script: str, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    flags = ["--model", str(model), "--device", "cpu", "--out", str(tmp_path / "out")]
    flags += ["--no-install", "--haystack", str(tmp_path)] if script == "quickstart" else []
    command = [sys.executable, str(ROOT / "scripts" / script), *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    said = run.stderr.splitlines()[-1]
    assert re.match(rf"{script}: instance [01] ended: {model / 'tokenizer.json'} can't be read: ", said), run.stderr
    assert re.search(rf" \(log: {tmp_path / 'out'}/instance-[01].log\)$", said)
    assert "Traceback" not in run.stderr


def test_what_is_wrong_is_said_before_anything_starts(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    command = [sys.executable, str(ROOT / "scripts" / "bench_serve.py"), "--device", "cpu", "--model", str(model)]
    command += ["--kv-tokens", "8", "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == "bench_serve.py: --kv-tokens 8 is less than one block of 16 tokens"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_stops_what_it_started(number: signal.Signals, tmp_path: Path) -> None:
    run = quickstart("--contexts", "2048", "--depths", "50", "--out", str(tmp_path))
    log = tmp_path / "gmanager.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "admitted" in log.read_text()):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = children(run.pid)
    assert len(started) >= 5  # gManager, two torchruns, two instances
    run.send_signal(number)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "interrupted" in errors
    assert not [pid for pid in started if is_alive(pid)]
