"""What is shown of pip while the environment is made."""

from pathlib import Path

import _setup
import pytest


def pip_that(says: str, code: int, folder: Path) -> Path:
    """A Python whose pip says that."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\nprintf '{says}' >&2\nexit {code}\n")
    file.chmod(0o755)
    return file


def test_warnings_of_pip_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_setup, "PYTHON", pip_that("WARNING: running as root", 0, tmp_path))
    _setup._pip_install("torch==1")
    said = capfd.readouterr()
    assert said.err == ""
    assert said.out.strip() == "pip install torch==1 0 s"


@pytest.mark.parametrize(
    ("says", "shown"),
    [("WARNING: old\\nERROR: no such package\\n", "ERROR: no such package\n"), ("Killed\\n", "Killed\n")],
)
def test_errors_of_pip_are(
    says: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_setup, "PYTHON", pip_that(says, 3, tmp_path))
    with pytest.raises(SystemExit, match="3"):
        _setup._pip_install("torch==1")
    assert capfd.readouterr().err == shown
