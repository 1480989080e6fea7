"""What Triton's compiler says of kernels for a GPU that isn't here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def compiled(module: str, cache: Path) -> dict[str, Any]:
    """The JSON that a module prints which compiles kernels, in a process that doesn't interpret them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=Path(__file__).resolve().parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found
