"""The `distattn` command in real processes: it says what is wrong before it starts anything, and leaves nothing behind."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gmanager import AsyncClient, SamplingParams
from gmanager.cli.service import ServiceConfig
from gmanager.cli.up import roles_lack
from tests.support.processes import Processes, address_of, client_of, free_port, until_ready
from tests.support.service import at_rest
from tests.support.tiny import make_model
from tests.test_lifecycle import two, until
from tests.test_membership import streams_meanwhile, text

DISTATTN = [str(Path(sys.executable).with_name("distattn"))]
"""As the package has installed it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("models") / "tiny")


def run(*arguments: str, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    more = os.environ | environment
    return subprocess.run(
        [*DISTATTN, *arguments], input=given, capture_output=True, text=True, timeout=60, check=False, env=more
    )


class Up:
    """`distattn up`, and what it has printed so far."""

    def __init__(self, *arguments: str) -> None:
        self.child = subprocess.Popen([*DISTATTN, "up", *arguments], stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stderr is not None
        with self.child.stderr:
            for line in self.child.stderr:
                self.lines.append(line)

    def wait_for(self, text: str) -> str:
        """The line that holds it."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if text in line:
                    return line
            assert self.child.poll() is None, self.lines
            time.sleep(0.05)
        raise AssertionError(f"{text!r} was not said: {self.lines}")

    def end(self) -> list[str]:
        """Wait for its end; all that it has printed."""
        self.child.wait(60)
        self._reader.join(10)
        return self.lines

    def kill(self) -> None:
        self.child.kill()
        self.end()


@contextmanager
def up(model: Path, logs: Path, *more: str) -> Iterator[tuple[Up, str, str]]:
    """A service that is coming up, its gManager's address and its URL. Nothing of it may be left at the end."""
    address, url = f"tcp://127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    flags = ["--kv-tokens", "1024", "--bind", address, "--http", url, "--logs", str(logs)]
    started = Up(str(model), *flags, *more)
    try:
        yield started, address, f"http://{url}"
        started.end()
    finally:
        started.kill()
        left = processes_of(address)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not left


def logs_in(folder: Path, name: str) -> str:
    """The log of that name, of the one start that has logged there."""
    (start,) = folder.iterdir()
    return (start / name).read_text()


def processes_of(address: str) -> list[int]:
    """Whoever was told that address and still lives."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace")
        except (OSError, NotADirectoryError):
            continue
        if folder.name.isdigit() and address in words and " (" not in folder.name and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def gateways_of(address: str) -> list[int]:
    return [pid for pid in processes_of(address) if b"gmanager.gateway" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def gmanagers_of(address: str) -> list[int]:
    return [pid for pid in processes_of(address) if b"\0gmanager\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def instances_of(address: str) -> list[int]:
    """The instances themselves, without the torchrun that has the same words in its command."""
    return [
        pid
        for pid in processes_of(address)
        if b"\0-m\0instance\0" in (words := Path(f"/proc/{pid}/cmdline").read_bytes()) and b"instance.torchrun" not in words
    ]


def test_a_service_from_up_to_ctrl_c(model: Path, tmp_path: Path) -> None:
    names = ["--served-model-name", "tiny", "--served-model-name", "wee"]
    door = ["--allow-origin=https://a.b", "--allow-origin=*", "--model-alias=gpt-4o=tiny", "--strict", "--trust-special-tokens"]
    with up(model, tmp_path, "--instances", "2", *names, *door) as (started, address, url):
        started.wait_for(f"HTTP    {url}/v1")
        (gateway,) = gateways_of(address)
        assert Path(f"/proc/{gateway}/cmdline").read_bytes().decode().split("\0")[-len(door) - 1 : -1] == door
        assert " s: tiny or wee on 2 instances (cpu), " in started.wait_for("ready in ")
        before = [line for line in started.lines if re.match(" +[0-9]+ s  ", line)]
        assert before[0].endswith("s  starting the gManager\n")
        assert before[1].endswith("s  2 instances (cpu) start\n")
        assert len(before) == len(set(before))
        assert "it/s" not in logs_in(tmp_path, "instance-0.log"), "a bar of a library"
        asked = ["--gmanager", address, "--max-tokens", "5", "--temperature", "0"]
        answer = run("generate", "hello", *asked)
        assert (answer.returncode, answer.stderr) == (0, "")
        assert answer.stdout.startswith("hello")
        assert len(answer.stdout) > len("hello\n"), "and how it goes on"
        assert run("generate", "-", *asked, given="hello").stdout == answer.stdout
        talk = run("chat", *asked, "--system", "Be brief.", given="hello\n\nand now?\n")
        assert talk.returncode == 0, talk.stderr
        assert len(talk.stdout.splitlines()) >= 2
        for command in (["chat"], ["generate", "x"]):
            refused = run(*command, "--temperature", "inf", "--gmanager", address)
            assert refused.returncode == 2
            assert "temperature must be a finite number" in refused.stderr
            assert "Traceback" not in refused.stderr
        refused = run("generate", "x" * 2000, *asked)
        assert refused.returncode == 1
        assert refused.stderr.startswith("distattn: prompt of 2,000 + max_tokens of 5")
        other = run("generate", "x", *asked, "--model", "large")
        assert run("generate", "hello", *asked, "--model", "wee").stdout == answer.stdout
        assert other.stderr == "distattn: no model 'large' is served; there is tiny\n"

        shown = run("status", "--gmanager", address)
        assert re.search(r"main +tiny +ready +2 ", shown.stdout), shown.stdout
        assert all(len(line.rstrip()) <= 80 for line in shown.stdout.splitlines())
        stats = json.loads(run("status", "--json", "--gmanager", address).stdout)
        assert stats["cells"][0]["total_tokens"] == 2048
        started.child.send_signal(signal.SIGINT)
        assert started.end()[-1] == "stopping\n"
        assert started.child.returncode == 0
    for name in ("gmanager.log", "gateway.log", "instance-0.log", "instance-1.log"):
        log = logs_in(tmp_path, name)
        assert "Traceback" not in log
        assert "level=error" not in log
    assert 'event="cell over"' in logs_in(tmp_path, "gmanager.log")


def test_what_dies_comes_back_and_each_event_is_told(model: Path, tmp_path: Path) -> None:
    """kill -9 of an instance in mid-stream, of the gateway, and of a torchrun; then Ctrl-C."""
    ids, expected = text(model, 100, 300)
    with up(model, tmp_path, "--instances", "2") as (started, address, url):
        started.wait_for("Ctrl-C stops it")
        (victim,) = (pid for pid in instances_of(address) if b"\0--id=1\0" in Path(f"/proc/{pid}/cmdline").read_bytes())
        (survivor,) = (pid for pid in instances_of(address) if pid != victim)
        assert asyncio.run(stream(address, ids, 300, lambda: os.kill(victim, signal.SIGKILL))) == expected.token_ids
        line = started.wait_for("instance 1 was killed by SIGKILL")
        assert re.search(r" by SIGKILL \(log: \S+/instance-1.log\); it is started again( in 1 s)?\n$", line)
        started.wait_for("instance 1 of cell 'main' is lost: ")
        started.wait_for("1 of 2 instances serve, 1,024 tokens of KV")
        started.wait_for("instance 1 of cell 'main' comes\n")
        started.wait_for("2 of 2 instances serve, 2,048 tokens of KV")
        assert survivor in instances_of(address)
        assert asyncio.run(stream(address, ids, 300, lambda: None)) == expected.token_ids

        (gateway,) = gateways_of(address)
        os.kill(gateway, signal.SIGKILL)
        started.wait_for("the gateway was killed by SIGKILL (log: ")
        os.kill(parent_of(survivor), signal.SIGKILL)
        started.wait_for("the torchrun of instance 0 was killed by SIGKILL (log: ")
        deadline = time.monotonic() + 30
        while not answers_http(f"{url}/v1/models") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert answers_http(f"{url}/v1/models"), "at the same address"
        assert "loading" in logs_in(tmp_path, "instance-1.log").partition("registered")[2], "both starts are in its log"
        started.child.send_signal(signal.SIGINT)  # while instance 0 is coming back
        lines = started.end()
        assert lines[-1] == "stopping\n"
        assert started.child.returncode == 0
        happened = lines[lines.index(line) - 3 :]
        assert sum(" was killed by " in said for said in happened) == 3, "one line each"


def test_a_gmanager_with_a_journal_comes_back_under_a_stream(model: Path, tmp_path: Path) -> None:
    """kill -9 in mid-stream: the client's stream goes on, with the same instances. One line for each event; Ctrl-C ends all."""
    ids, expected = text(model, 100, 300)
    with up(model, tmp_path / "logs", "--instances", "2", "--journal", str(tmp_path / "journal")) as (started, address, url):
        started.wait_for("Ctrl-C stops it")
        before, instances = len(started.lines), instances_of(address)
        (victim,) = gmanagers_of(address)
        assert asyncio.run(stream(address, ids, 300, lambda: os.kill(victim, signal.SIGKILL))) == expected.token_ids
        started.wait_for("2 of 2 instances serve, 2,048 tokens of KV")
        line = started.wait_for("the gManager was killed by SIGKILL")
        assert re.search(r" by SIGKILL \(log: \S+/gmanager.log\); it is started again( in 1 s)?\n$", line)
        assert instances_of(address) == instances, "the same processes"
        assert gmanagers_of(address) != [victim]
        assert asyncio.run(stream(address, ids, 300, lambda: None)) == expected.token_ids
        assert answers_http(f"{url}/v1/models")
        started.child.send_signal(signal.SIGINT)
        lines = started.end()[before:]
        assert started.child.returncode == 0
        assert lines[:2] == [line, "the gManager of cell 'main' was lost, and another has come\n"]
        assert lines[-1] == "stopping\n"
        assert sum(" was killed by " in said for said in lines) == 1


async def stream(address: str, ids: list[int], new: int, meanwhile: Callable[[], None]) -> list[int]:
    """The tokens of a request over all instances; `meanwhile` is called when it has 20."""
    tokens: list[int] = []
    called = False
    async with AsyncClient(address) as client:
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        async for chunk in client.generate(ids, params, spread="all"):
            tokens += chunk.token_ids
            if len(tokens) >= 20 and not called:
                called = True
                meanwhile()
    return tokens


def answers_http(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_the_end_of_the_gmanager_is_told_in_one_line_and_all_is_stopped(model: Path, tmp_path: Path) -> None:
    with up(model, tmp_path) as (started, address, _):
        started.wait_for("Ctrl-C stops it")
        before = len(started.lines)
        (victim,) = gmanagers_of(address)
        os.kill(victim, signal.SIGKILL)
        (line,) = started.end()[before:]
        assert started.child.returncode == 1
        assert line.startswith("distattn: the gManager was killed by SIGKILL (log: ")
        assert line.endswith("; all is stopped\n")


@pytest.mark.parametrize(
    ("when", "number"),
    [("1 instance (cpu) start", signal.SIGINT), ("Ctrl-C stops it", signal.SIGHUP)],
    ids=["Ctrl-C while it starts", "its terminal is closed"],
)
def test_all_is_stopped_when_it_is_asked_to(when: str, number: signal.Signals, model: Path, tmp_path: Path) -> None:
    with up(model, tmp_path) as (started, _, _):
        started.wait_for(when)
        started.child.send_signal(number)
        assert started.end()[-1] == "stopping\n"
        assert started.child.returncode == 0


def test_an_instance_says_itself_why_it_can_not_start(model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    with up(broken, tmp_path / "logs", "--instances", "2") as (started, _, _):
        line = started.end()[-1]
        assert started.child.returncode == 1
    assert re.match(rf"distattn: instance [01] ended: {broken}/tokenizer.json can't be read: ", line)
    assert re.search(r"/instance-[01].log\); all is stopped\n$", line)
    assert "Traceback" not in logs_in(tmp_path / "logs", "instance-0.log") + logs_in(tmp_path / "logs", "instance-1.log")


def test_a_model_without_a_tokenizer_and_with_another_context(model: Path, tmp_path: Path) -> None:
    mute = shutil.copytree(model, tmp_path / "mute")
    for file in mute.glob("*token*"):
        file.unlink()
    with up(mute, tmp_path / "logs", "--no-http", "--rope-scaling", "yarn:3", "--max-context", "100") as (started, address, _):
        started.wait_for("text    none: the model has no tokenizer, prompts are token ids")
        asked = run("generate", "hello", "--gmanager", address)
        assert (asked.returncode, asked.stderr) == (1, "distattn: prompt: this model has no tokenizer: give token ids\n")
        asked = run("chat", "--gmanager", address, given="hello\n")
        assert (asked.returncode, asked.stderr) == (1, "distattn: messages: this model has no tokenizer: give token ids\n")
        (tmp_path / "hay.txt").write_text("Hay. " * 1000)
        (cell,) = json.loads(run("status", "--json", "--gmanager", address).stdout)["cells"]
        assert (cell["max_context"], cell["rotary"]) == (100, "yarn:3")
        asked = run("needle", "--gmanager", address, "--haystack", str(tmp_path), "--out", str(tmp_path / "out"))
        assert asked.returncode == 2
        assert "the model has no tokenizer" in asked.stderr
        started.child.send_signal(signal.SIGINT)


@pytest.mark.parametrize("flag", ["--tp", "--pp"])
def test_an_instance_of_two_ranks(model: Path, tmp_path: Path, flag: str) -> None:
    """It says the same as one of one rank does."""
    said = []
    for more in ((flag, "2"), ()):
        logs = tmp_path / f"logs {len(more)}"
        with up(model, logs, "--no-http", "--device", "cpu", *more) as (started, address, _):
            line = started.wait_for("ready in")
            assert ("on 1 instance of 2 ranks (cpu)" if more else "on 1 instance (cpu)") in line
            asked = run("generate", "hello there", "--temperature", "0", "--max-tokens", "12", "--gmanager", address)
            assert asked.returncode == 0, asked.stderr
            said.append(asked.stdout)
            started.child.send_signal(signal.SIGINT)
    assert said[0] == said[1] != ""


def test_a_second_start_leaves_the_logs_of_the_first(model: Path, tmp_path: Path) -> None:
    with up(model, tmp_path) as (first, address, _):
        first.wait_for("starting the gManager")
        with up(model, tmp_path) as (second, other, _):
            for started in (second, first):
                started.wait_for("1 instance (cpu)")
            logs = [file.read_text() for file in tmp_path.glob("*/gmanager.log")]
            assert sorted(logs) == sorted(f"gManager listens at {each}\n" for each in (address, other))
            second.child.send_signal(signal.SIGINT)
        first.child.send_signal(signal.SIGINT)


def test_nothing_outlives_it(model: Path, tmp_path: Path) -> None:
    with up(model, tmp_path) as (started, address, _):
        started.wait_for("Ctrl-C stops it")
        assert len(processes_of(address)) >= 5  # with itself and torchrun
        started.kill()
        deadline = time.monotonic() + 40  # torchrun gives its instances 30 s
        while processes_of(address) and time.monotonic() < deadline:
            time.sleep(0.1)


def test_what_is_wrong_is_said_before_anything_starts(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "empty").mkdir()
        weightless = shutil.copytree(model, tmp_path / "weightless")
        (weightless / "model.safetensors").unlink()
        cases = [
            ([str(model), "--http", f"127.0.0.1:{port}"], f"port {port} of 127.0.0.1 is in use: choose another with --http"),
            (
                [str(model), "--bind", f"tcp://127.0.0.1:{port}"],
                f"port {port} of 127.0.0.1 is in use: choose another with --bind",
            ),
            ([str(model), "--slo-ttft", "0"], "--slo-ttft must be a positive number of seconds, got 0"),
            ([str(model), "--tp", "64", "--device", "cuda"], "1 instances of 64 ranks need 64 GPUs; this machine has "),
            ([str(model), "--pp", "64", "--device", "cuda"], "1 instances of 64 ranks need 64 GPUs; this machine has "),
            ([str(model), "--pp", "2", "--pp-layers", "3"], "--pp-layers 3 are not the layers of 2 stages (--pp)"),
            ([str(model), "--pp", "2", "--pp-layers", "a,b"], "'a,b' are no numbers of layers with commas between, like 20,12"),
            ([str(model), "--elastic-tp", "on"], "--elastic-tp 'on' is neither off, nor auto, nor a number of rows"),
            (
                [str(model), "--elastic-tp", "auto", "--tp", "2"],
                "--elastic-tp auto is for instances that each have all weights: these are split between 2 ranks",
            ),
            ([str(model), "--slo-tpot", "inf"], "--slo-tpot must be a positive number of seconds, got inf"),
            ([str(model), "--bind", "here"], "an address looks like tcp://127.0.0.1:5570, got 'here'"),
            ([str(model), "--http", "127.0.0.1:70000"], "the port must be in [0, 65536), got 70000"),
            ([str(model), "--http", "8000"], "an address is HOST:PORT, got '8000'"),
            ([str(tmp_path / "empty")], f"{tmp_path / 'empty'} holds no config.json: it is no model"),
            ([str(tmp_path / "none.gguf")], f"there is no file {tmp_path / 'none.gguf'}"),
            (["/nowhere"], "/nowhere is no directory, no GGUF file, and no hub id like Qwen/Qwen3-0.6B"),
            ([str(weightless)], f"{weightless} holds no weights in safetensors"),
            ([str(model), "--host-memory", "lots"], "--host-memory: 'lots' is no size, like 64G"),
            (
                [str(model), "--device", "cpu", "--instances", "3", "--host-memory", "1024T"],
                "3 instances x --host-memory 1024T",
            ),
            ([str(model), "--device", "cpu", "--disk", f"{tmp_path}/no:1G"], "--disk: there is no directory"),
            ([str(model), "--device", "cpu", "--disk", f"{tmp_path}:9999T"], "1 instance x --disk"),
            (
                [str(model), "--device", "cpu", "--prefix-cache", "off", "--disk", f"{tmp_path}:1M"],
                "--host-memory and --disk keep what --prefix-cache",
            ),
            (["default", "--device", "cpu", "--kv-tokens", "8"], "--kv-tokens 8 is less than one block of 16 tokens"),
            (
                ["default", "--device", "cpu", "--kv-memory", "0.9"],
                "an instance on the CPU needs --kv-tokens and takes no --kv-m",
            ),
            ([str(model), "--kv-tokens", "64", "--kv-memory", "0.9"], "give --kv-tokens or --kv-memory, not both (got 64 and "),
            ([str(model), "--kv-dtype", "int4"], "--kv-dtype must be one of auto, fp8, int8, got int4"),
            ([str(model), "--dtype", "int3"], "--dtype must be one of auto, float32, float16, bfloat16, got int3"),
            ([str(model), "--quantize", "int4"], "--quantize must be one of none, fp8, int8, int8-32, got int4"),
            ([str(model), "--served-model-name", ""], "--served-model-name must not be empty"),
            ([str(model), "--served-model-name", "a", "--served-model-name", ""], "--served-model-name must not be empty"),
            ([str(model), "--max-context", "0"], "--max-context must be at least 1, got 0"),
            ([str(model), "--max-context", "513"], f"--max-context 513 is more than the 512 tokens that {model} takes"),
            ([str(model), "--rope-scaling", "ntk:2"], "--rope-scaling must be yarn:F, linear:F, dynamic:F or none, got "),
            ([str(model), "--rope-scaling", "yarn:1"], "--rope-scaling: the factor of yarn must be more than 1 and at most "),
            (
                [str(model), "--rope-scaling", "yarn:2", "--max-context", "129"],
                f"--max-context 129 is more than the 128 tokens that {model} takes with --rope-scaling yarn:2",
            ),
            ([str(model), "--device", "tpu"], "--device must be auto, cpu or cuda, got tpu"),
            ([str(model), "--device", "cuda", "--instances", "99"], "99 instances need as many GPUs; this machine has "),
            ([str(model), "--allow-origin", "a.b"], "an origin is * or SCHEME://HOST[:PORT], got 'a.b'"),
            ([str(model), "--model-alias", "gpt"], "an alias is ALIAS=NAME, got 'gpt'"),
            ([str(model), "--api-key-file", "/none"], "/none can't be read (--api-key-file): No such file or directory"),
            ([str(model), "--api-key-file", "/dev/null"], "/dev/null holds no API key"),
            (["models/nosuch"], "models/nosuch is no directory, not in the hub's cache, and the hub can't be asked: "),
        ]
        free = ["--bind", "tcp://127.0.0.1:*", "--http", "127.0.0.1:0"]
        for arguments, message in cases:
            logs = tmp_path / "logs"
            result = run("up", *free, *arguments, "--logs", str(logs), HF_HUB_OFFLINE="1")
            assert (result.returncode, result.stdout) == (2, ""), result.stderr
            assert result.stderr.startswith(f"distattn: {message}")
            assert len(result.stderr.splitlines()) == 1
            assert not logs.exists()


async def test_drain_empties_the_one_that_is_named_and_refuses_others(started: Processes, model: Path) -> None:
    """Under streams over all instances, which are right all the time."""
    ids, expected = text(model, 100, 300)
    address = await address_of(started.gmanager())
    instances = two(started, address, model)
    await until_ready(address)

    async def drain(*words: str) -> tuple[int, str, str]:
        done = await asyncio.to_thread(run, "drain", *words, "--gmanager", address)
        return done.returncode, done.stdout, done.stderr

    async with client_of(address) as client:
        async with streams_meanwhile(client, ids, expected):
            unknown = await drain("7")
            assert unknown == (1, "", "distattn: there is no instance 7; cell 'main' has 0, 1\n")
            assert await drain("1", "--cell", "other") == (1, "", "distattn: there is no cell 'other'\n")
            stats = await client.stats()
            assert (stats.epoch, [i.is_draining for i in stats.instances]) == (1, [False, False])
            assert await drain("1") == (0, "instance 1 has left\n", "")
            assert await instances[1].exit_code() == 0
            stats = await until(client, lambda s: [i.rank for i in s.instances] == [0] and s.cells[0].state == "ready")
            assert await drain("0") == (1, "", "distattn: instance 0 is the last of cell 'main'\n")
            again = await client.stats()
            assert (again.epoch, [i.is_draining for i in again.instances]) == (stats.epoch, [False])
        await at_rest(client)
    assert instances[0].poll() is None


@pytest.mark.parametrize("given", ["hello\n", ""])
def test_nobody_is_there(given: str) -> None:
    for command in (["status"], ["top"], ["generate", "x"], ["chat"]):
        result = run(*command, "--gmanager", "tcp://127.0.0.1:9", given=given)
        assert result.returncode == 1
        assert result.stderr == "distattn: nobody answers at tcp://127.0.0.1:9 within 3 s\n"


@pytest.mark.parametrize("given", ["hello\n", ""])
def test_nobody_is_ready(given: str) -> None:
    """A gManager without instances."""
    with subprocess.Popen(
        [sys.executable, "-m", "gmanager", "--bind", "tcp://127.0.0.1:*"], stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            address = child.stdout.readline().split()[-1]
            for command in (["generate", "x"], ["chat"]):
                result = run(*command, "--gmanager", address, given=given)
                assert (result.returncode, result.stdout) == (1, "")
                assert result.stderr == "distattn: no instances are ready to serve\n"
        finally:
            child.terminate()


def test_size_of_what_is_not_there(tmp_path: Path) -> None:
    result = run("size", "--context", "4K", str(tmp_path / "none"), "--cache-dir", str(tmp_path / "later"))
    assert result.returncode == 2
    assert "there is no directory or file" in result.stderr and "--cache-dir" not in result.stderr


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for command in ("up", "chat", "generate", "status", "top", "drain", "needle", "size"):
        assert re.search(rf"\b{command}\b", text)
        assert run(command, "--help").returncode == 0


@pytest.mark.parametrize(
    ("policy", "roles", "said"),
    [
        ("split", ("decode", "decode"), "policy split has no instance with --role prefill, or mixed: all do both"),
        ("split", (), "policy split has no instance with a --role: all do both"),
        ("split", ("prefill", "decode"), None),
        ("elastic", ("prefill", "decode"), "policy elastic knows no roles, and these have some: decode, prefill"),
        ("elastic", (), None),
    ],
)
def test_roles_that_mean_nothing_are_said_where_they_were_given(policy: str, roles: tuple[str, ...], said: str | None) -> None:
    config = ServiceConfig(model="x", instances=2, logs=Path(), policy=policy, roles=roles, kv_tokens=64)
    assert roles_lack(config) == said
