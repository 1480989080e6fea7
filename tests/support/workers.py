"""A script of this folder as several processes that work together."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_workers(script: str, count: int, *arguments: object, timeout_s: float) -> list[str]:
    """What each of `count` has written; each is told its number, then `arguments`. All are killed in the end."""
    command = [sys.executable, str(ROOT / "tests" / "support" / script)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}:{os.environ.get('PYTHONPATH', '')}"}
    processes = [
        subprocess.Popen(
            [*command, str(number), *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in range(count)
    ]
    try:
        return [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
