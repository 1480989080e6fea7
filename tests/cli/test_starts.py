"""Folders of logs: the last ten starts keep theirs, and whoever still runs."""

import subprocess
import sys
from pathlib import Path

from gmanager.cli.starts import KEPT, in_use, logs_of_this_start


def test_the_last_starts_stay_and_what_is_no_start(tmp_path: Path) -> None:
    for second in range(15):
        (tmp_path / f"2026-01-02-0304{second:02}-{99 - second}").mkdir()
        (tmp_path / f"2026-01-02-0304{second:02}-{99 - second}" / "gmanager.log").write_text("x")
    (tmp_path / "2020-mine").mkdir()
    (tmp_path / "2020-01-01-000000-1").write_text("a file")
    (tmp_path / "2019-01-01-000000-1").symlink_to(tmp_path / "2020-mine")
    oldest = tmp_path / "2026-01-02-030400-99"
    with in_use(oldest), in_use(logs_of_this_start(tmp_path)):
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left[:3] == ["2019-01-01-000000-1", "2020-01-01-000000-1", "2020-mine"]
    assert left[3] == oldest.name, "in use"
    assert left[4:-1] == [f"2026-01-02-0304{second:02}-{99 - second}" for second in range(6, 15)]
    assert len(left[4:]) == KEPT
    with in_use(logs_of_this_start(tmp_path)):
        assert not oldest.exists()


def test_a_start_that_was_killed_is_not_in_use(tmp_path: Path) -> None:
    old = tmp_path / "2000-01-01-000000-1"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib\nfrom gmanager.cli.starts import in_use\n"
            "with in_use(pathlib.Path(sys.argv[1])):\n print('in', flush=True)\n sys.stdin.read()",
            str(old),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    with holder:
        holder.stdout.readline()
        for second in range(KEPT):
            (tmp_path / f"2026-01-02-0304{second:02}-7").mkdir()
        with in_use(logs_of_this_start(tmp_path)):
            assert old.exists()
        holder.kill()
    with in_use(logs_of_this_start(tmp_path)):
        assert not old.exists()
