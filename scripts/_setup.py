"""Makes `.venv` and installs the project into it. Standard library only: it runs before anything is installed."""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CACHE = ROOT / ".cache"
EXTRAS = "serve,measure"


def ensure_venv(*, for_tests: bool = False) -> None:
    """Have the calling script run inside `.venv`, made or brought up to date; returns only there.

    What only the tests need (whole evaluation harnesses) is installed only for them.
    """
    if sys.version_info < (3, 11):
        sys.exit(f"Python 3.11 or 3.12 is needed, this is {sys.version.split()[0]}")
    if Path(sys.prefix) == VENV:
        return
    wanted = hashlib.sha256(
        b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")) + str(ROOT).encode()
    ).hexdigest()
    if not _is_installed(EXTRAS, wanted):
        print(f"installing into {VENV} (once; a few minutes)", flush=True)
        venv.create(VENV, with_pip=True, clear=True)
        # torch first and by its exact version: another package's looser range could bring another build
        _pip_install("torch==2.13.0")
        _pip_install("-e", f".[{EXTRAS}]")
        _stamp(EXTRAS).write_text(wanted)
    if for_tests and not _is_installed("dev", wanted):
        print(f"installing what the tests need into {VENV}", flush=True)
        _pip_install("-e", f".[{EXTRAS},dev]")
        _stamp("dev").write_text(wanted)
    os.execv(PYTHON, [str(PYTHON), *sys.argv])


def _stamp(extras: str) -> Path:
    """Tells what these extras were installed from."""
    return VENV / f"installed-{extras}"


def _is_installed(extras: str, wanted: str) -> bool:
    return _stamp(extras).exists() and _stamp(extras).read_text() == wanted


def _pip_install(*what: str) -> None:
    """Of what pip says only errors are shown, and only if it fails. Exits with its code then."""
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen([*pip, *what], cwd=ROOT, stdout=said, stderr=said)
        try:
            while (code := _wait(child, 1.0)) is None:
                if sys.stdout.isatty():
                    print(f"\r  pip install {what[-1]} {time.monotonic() - began:.0f} s", end="", flush=True)
        finally:
            child.kill()
        print(f"\r  pip install {what[-1]} {time.monotonic() - began:.0f} s", flush=True)
        if code:
            said.seek(0)
            lines = said.read().splitlines()
            print("\n".join([line for line in lines if line.startswith("ERROR")] or lines), file=sys.stderr)
            sys.exit(code)


def _wait(child: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """Its exit code, or None if it still runs after that time."""
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
