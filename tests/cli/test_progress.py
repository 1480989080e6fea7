"""What is shown of a start: one line that moves on a terminal, else a line for each new thing."""

import io
import re

from rich.console import Console

from gmanager.cli.progress import progress


def shown(*, is_terminal: bool) -> str:
    out = io.StringIO()
    with progress(Console(file=out, width=80, force_terminal=is_terminal)) as tell:
        for stage in ("load [m]", "load [m]", "warm up"):
            tell(stage)
    return out.getvalue()


def test_a_line_for_each_new_thing() -> None:
    assert shown(is_terminal=False) == "   0 s  load [m]\n   0 s  warm up\n"


def test_one_line_that_moves() -> None:
    text = shown(is_terminal=True)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "warm up 0 s" in drawn
    assert "\n" not in drawn.strip(), "it stays in its line"
