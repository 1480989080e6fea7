"""What README and docs tell to type is understood, and the tables of flags are complete."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer

import gmanager.__main__
import gmanager.gateway.__main__
import instance.__main__
from gmanager.cli.app import app
from instance.config import Launch

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = Launch(rank=0, local_rank=0, world_size=8, run_id="docs")
PROGRAMS: dict[str, Callable[[list[str]], object]] = {
    "python -m gmanager ": gmanager.__main__.parse,
    "python -m gmanager.gateway ": gmanager.gateway.__main__.parse,
    "-m instance ": lambda arguments: instance.__main__.parse(arguments, LAUNCH),
}


def typed() -> list[str]:
    """The lines of code blocks that are commands, without prompts and remarks."""
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "operate.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if kind in ("", "sh") for line in block.splitlines()]
    return [line.partition("$ ")[2] or line for line in lines]


def first_cell(row: str) -> str:
    return re.split(r"(?<!\\)\|", row)[1]


def test_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    found = dict.fromkeys([*PROGRAMS, "distattn "], 0)
    for line in typed():
        for program, parse in PROGRAMS.items():
            _, is_one, arguments = line.partition(program)
            if is_one:
                parse(shlex.split(arguments))
                found[program] += 1
        if line.startswith("distattn "):
            command = typer.main.get_command(app)
            name, *arguments = shlex.split(line, comments=True)[1:]
            command.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
            found["distattn "] += 1
    assert found == {"python -m gmanager ": 2, "python -m gmanager.gateway ": 1, "-m instance ": 5, "distattn ": 3}


@pytest.mark.parametrize(
    ("program", "file", "table"),
    [
        ("python -m gmanager ", "operate.md", "gManager"),
        ("python -m gmanager.gateway ", "http.md", ""),
        ("-m instance ", "operate.md", "instance"),
    ],
)
def test_tables_name_all_flags(program: str, file: str, table: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        PROGRAMS[program](["--help"])
    flags = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    section = (ROOT / "docs" / file).read_text().partition("## Flags\n")[2].partition("\n## ")[0]
    rows = section.partition(f"| {table} | |\n" if table else "\n")[2].partition("\n\n| ")[0]
    named = {
        flag for row in rows.splitlines() if row.startswith("|") for flag in re.findall(r"--[a-z][a-z-]+", first_cell(row))
    }
    assert flags - {"--log-level", "--log-format"} == named - {"--log-level", "--log-format"}


def test_the_table_of_up_names_all_its_options() -> None:
    command = typer.main.get_command(app).commands["up"]  # type: ignore[attr-defined]
    flags = {flag for option in command.params for flag in option.opts if flag.startswith("--")} - {"--help"}
    section = (ROOT / "docs" / "operate.md").read_text().partition("| `distattn up` | |\n")[2].partition("\n\n")[0]
    assert {flag for row in section.splitlines() for flag in re.findall(r"--[a-z][a-z-]+", first_cell(row))} == flags


def test_every_command_of_the_readme_exists() -> None:
    table = (ROOT / "README.md").read_text().partition("| `distattn` | |\n")[2].partition("\n\n")[0]
    named = [name.split()[0] for row in table.splitlines()[1:] for name in re.findall(r"`([^`]+)`", first_cell(row))]
    assert sorted(named) == sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
