"""What is started again when, and told: processes that are made up, a log that is written line by line, and no clock."""

import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from gmanager.cli.process import Process, ProcessEnded, stop_all
from gmanager.cli.service import Service
from gmanager.cli.upkeep import Upkeep, pause_after


class Made:
    """A process that ends when it is told to."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log
        log.touch()
        self.code: int | None = None
        self.started_at = 0.0
        self.starts = 1

    def why(self) -> str:
        return f"{self.name} was killed"

    def check(self) -> None:
        if self.code is not None:
            raise ProcessEnded(cast(Process, self))

    def restart(self) -> None:
        assert self.code is not None
        self.code = None
        self.starts += 1


class Place:
    def __init__(self, folder: Path) -> None:
        names = ("the gManager", "the gateway", "instance 0", "instance 1")
        self.made = {name: Made(name, folder / name) for name in names}
        self.said: list[str] = []
        gmanager, gateway, *instances = cast("list[Any]", list(self.made.values()))
        gmanager.log.write_text('event="cell ready" instances=2 kv_tokens=1\n')
        self.upkeep = Upkeep(Service(gmanager=gmanager, gateway=gateway, instances=instances), self.said.append)

    def look(self, now: float) -> list[str]:
        """What is said in one look."""
        self.said.clear()
        self.upkeep.look(now)
        return self.said

    def log(self, text: str) -> None:
        with self.made["the gManager"].log.open("a") as log:
            log.write(text)


@pytest.fixture
def place(tmp_path: Path) -> Any:
    place = Place(tmp_path)
    yield place
    place.upkeep.close()


def test_a_gmanager_that_keeps_a_journal_is_started_again(place: Place) -> None:
    place.made["the gManager"].code = -9
    with pytest.raises(ProcessEnded, match="the gManager was killed"):
        place.look(10)
    place.upkeep._service.keeps_journal = True
    (line,) = place.look(100)
    assert "the gManager was killed" in line
    assert line.endswith("it is started again")
    assert place.made["the gManager"].starts == 2


def test_pauses_grow_and_who_ran_long_is_started_at_once() -> None:
    assert pause_after(60, 0) == pause_after(61, 32) == 0
    pauses = [0.0]
    for _ in range(8):
        pauses.append(pause_after(59, pauses[-1]))
    assert pauses[1:] == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("name", ["the gateway", "instance 0", "instance 1"])
def test_who_ends_is_started_again_and_told_once(place: Place, name: str) -> None:
    assert place.look(0) == []
    made = place.made[name]
    made.code = -9
    assert place.look(100) == [f"{name} was killed (log: {made.log}); it is started again"]
    assert (made.starts, made.code) == (2, None)
    assert place.look(100.2) == []
    made.started_at, made.code = 100, 1
    assert place.look(110) == [f"{name} was killed (log: {made.log}); it is started again in 1 s"]
    assert (place.look(110.9), made.starts) == ([], 2)
    assert (place.look(111), made.starts) == ([], 3)
    made.started_at, made.code = 111, 1
    assert place.look(112)[0].endswith("it is started again in 2 s")
    assert [other.starts for other in place.made.values() if other is not made] == [1, 1, 1]


def test_who_was_asked_to_end_stays_ended(place: Place) -> None:
    place.made["instance 1"].code = 0
    assert place.look(5) == ["instance 1 has ended, as it was asked to; it is not started again"]
    assert place.look(500) == []
    assert place.made["instance 1"].starts == 1


def test_the_end_of_the_gmanager_ends_it(place: Place) -> None:
    place.made["the gManager"].code = -9
    with pytest.raises(ProcessEnded, match="the gManager was killed"):
        place.look(5)


def test_changes_of_a_cell_are_told_once_and_in_whole_lines(place: Place) -> None:
    lost = "reason=\"instance 1 of cell 'main' is lost: gone\""
    place.log(f'event="instance left" cell=main {lost}\nevent="cell changes" cell=main epoch=1 {lost}\nevent="cell rea')
    assert place.look(1) == ["instance 1 of cell 'main' is lost: gone"]
    place.log('dy" instances=1 kv_tokens=1024\n')
    assert place.look(2) == ["1 of 2 instances serve, 1,024 tokens of KV"]
    place.log('event="request admitted" request=x\n')
    assert place.look(3) == []


def test_all_are_asked_to_end_once(tmp_path: Path) -> None:
    """A second SIGTERM means: at once. One that takes its time to end after the first must not hear it."""
    program = (
        "import signal, time\n"
        "def asked(*_):\n"
        "    print('asked', flush=True)\n"
        "    global left\n"
        "    left = 0.5\n"
        "left = None\n"
        "signal.signal(signal.SIGTERM, asked)\n"
        "print('ready', flush=True)\n"
        "while left is None or left > 0:\n"
        "    time.sleep(0.05)\n"
        "    left = None if left is None else left - 0.05\n"
    )
    processes = [Process(f"p{i}", [sys.executable, "-c", program], tmp_path / f"{i}.log") for i in range(2)]
    while not all("ready" in process.text() for process in processes):
        time.sleep(0.02)
    stop_all(processes)
    assert [process.code for process in processes] == [0, 0]
    assert [process.text() for process in processes] == ["ready\nasked\n"] * 2
