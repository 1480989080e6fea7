"""`python -m gmanager.gateway` as a process, and the examples of docs/http.md against it."""

import asyncio
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.support.farm import Farm, Setup
from tests.support.gateway import gateway
from tests.support.service import serve
from tests.support.tiny import make_model

DOCS = Path(__file__).resolve().parents[2] / "docs"
NAME = "SmolLM2-135M-Instruct"


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A gateway and the URL that it prints."""
    command = [sys.executable, "-m", "gmanager.gateway", "--bind", "127.0.0.1:0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            yield child, line.split()[-1]
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_it_is_asked_to(number: signal.Signals) -> None:
    with process("--gmanager", "tcp://127.0.0.1:9") as (child, url):
        assert httpx.get(f"{url}/health").status_code == 503
        child.send_signal(number)
        assert child.wait(10) == 0


def test_keys_from_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n\ntwo\n")
    with process("--gmanager", "tcp://127.0.0.1:9", "--api-key-file", str(keys), "--api-key", "three") as (_, url):
        for key, status in (("one", 200), ("two", 200), ("three", 200), ("four", 401)):
            assert httpx.get(f"{url}/version", headers={"authorization": f"Bearer {key}"}).status_code == status
        assert httpx.get(f"{url}/version").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 503, "open, and nobody is ready"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bind", "8000"], "an address is HOST:PORT, got '8000'"),
        (["--bind", "127.0.0.1:70000"], "the port must be in [0, 65536), got 70000"),
        (["--gmanager", "nowhere"], "nowhere"),
        (["--api-key-file", "/none"], "No such file"),
        (["--api-key-file", "/dev/null"], "/dev/null holds no API key"),
        (["--max-n", "0"], "max-n must be at least 1, got 0"),
        (["--allow-origin", "page"], "an origin is * or SCHEME://HOST[:PORT], got 'page'"),
        (["--model-alias", "x"], "an alias is ALIAS=NAME, got 'x'"),
        (["--model-alias", "x=a", "--model-alias", "x=b"], "alias 'x' stands for 'a' and for 'b'"),
    ],
)
def test_wrong_settings(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "gmanager.gateway", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "gmanager.gateway", "--bind", bind]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2
    assert result.stderr == f"gateway: can't listen at {bind}: Address already in use\n"


async def test_the_examples_of_the_docs(farm: Farm, tmp_path: Path) -> None:
    """Each block of docs/http.md, and each of Python in the README, as it stands there but for the ports."""
    model = make_model("llama", tmp_path / "model")
    blocks = re.findall(r"```(python|sh)\n(.*?)```", (DOCS / "http.md").read_text(), re.DOTALL)
    assert {kind for kind, _ in blocks} == {"python", "sh"}
    blocks += re.findall(r"```(python)\n(.*?)```", (DOCS.parent / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    async with serve(farm, 1, Setup(model=model, served_model_name=NAME)) as service, gateway(service.server.address) as url:
        for kind, code in blocks:
            if kind == "sh" and shutil.which("curl") is None:
                continue
            code = code.replace("http://127.0.0.1:8000", url).replace("tcp://127.0.0.1:5570", service.server.address)
            command = [sys.executable, "-c", code] if kind == "python" else ["sh", "-euc", code]
            run = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
            out, errors = await asyncio.wait_for(run.communicate(), 60)
            assert run.returncode == 0, errors.decode()
            assert out.strip()
            assert b'"error"' not in out
