"""Makes `.venv` and installs the project into it. Standard library only: it runs before anything is installed."""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CACHE = ROOT / ".cache"
EXTRAS = "serve,measure,dev"


def ensure_venv() -> None:
    """Have the calling script run inside `.venv`, made or brought up to date; returns only there."""
    if sys.version_info < (3, 11):
        sys.exit(f"Python 3.11 or 3.12 is needed, this is {sys.version.split()[0]}")
    if Path(sys.prefix) == VENV:
        return
    stamp = VENV / "installed"
    wanted = hashlib.sha256(
        b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")) + str(ROOT).encode()
    ).hexdigest()
    if not (stamp.exists() and stamp.read_text() == wanted):
        print(f"installing into {VENV} (once; a few minutes)", flush=True)
        venv.create(VENV, with_pip=True, clear=True)
        pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
        # torch first and by its exact version: another package's looser range could bring another build
        subprocess.run([*pip, "torch==2.13.0"], cwd=ROOT, check=True)
        subprocess.run([*pip, "-e", f".[{EXTRAS}]"], cwd=ROOT, check=True)
        stamp.write_text(wanted)
    os.execv(PYTHON, [str(PYTHON), *sys.argv])
