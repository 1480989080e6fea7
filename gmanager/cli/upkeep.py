"""Keeps a service up: starts again what ends, and tells in one line of each event."""

import asyncio
import time
from collections.abc import Callable
from typing import Never

from gmanager.cli.process import Process
from gmanager.cli.said import told_of_cells
from gmanager.cli.service import Service

LOOK_S = 0.2
"""Between two looks."""
STEADY_S = 60.0
"""A program that ran for so long is started again at once; one that ended sooner, after a pause."""
FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0


def pause_after(lived_s: float, before_s: float) -> float:
    """Seconds until a program is started again that ran for `lived_s`, and had `before_s` of pause before that."""
    return 0.0 if lived_s >= STEADY_S else min(MAX_PAUSE_S, max(FIRST_PAUSE_S, 2 * before_s))


class Upkeep:
    """Looks after the processes of a service that has been ready. `look` again and again."""

    def __init__(self, service: Service, say: Callable[[str], None]) -> None:
        """`say`: hears one line for each event."""
        self._service = service
        self._say = say
        self._pauses: dict[str, float] = {}
        """By the process's name, seconds."""
        self._due: dict[str, float | None] = {}
        """When those that have ended are started again; None: not at all."""
        self._log = service.gmanager.log.open("rb")
        self._log.seek(0, 2)  # how it came up was told
        self._half = b""
        """A line that is still being written."""
        self._said: str | None = None
        """Last, of cells."""

    def close(self) -> None:
        self._log.close()

    def look(self, now: float) -> None:
        """Tell what has happened, and start what is due. Raises ProcessEnded if the gManager has ended and keeps no journal."""
        self._tell_of_cells()
        if not self._service.keeps_journal:
            self._service.gmanager.check()  # what it knew of requests is lost with it
        for process in self._service.processes:
            if process.code is not None:
                self._look_after(process, now)

    def _look_after(self, process: Process, now: float) -> None:
        """One that has ended."""
        if process.name not in self._due:
            if process.code == 0 and process is not self._service.gmanager:
                self._due[process.name] = None
                self._say(f"{process.name} has ended, as it was asked to; it is not started again")
                return
            pause = pause_after(now - process.started_at, self._pauses.get(process.name, 0.0))
            self._pauses[process.name], self._due[process.name] = pause, now + pause
            again = f"it is started again{f' in {pause:.0f} s' if pause else ''}"
            self._say(f"{process.why()} (log: {process.log}); {again}")
        due = self._due[process.name]
        if due is not None and now >= due:
            del self._due[process.name]
            process.restart()

    def _tell_of_cells(self) -> None:
        *lines, self._half = (self._half + self._log.read()).split(b"\n")
        for line in lines:
            said = told_of_cells(line.decode(errors="replace"), len(self._service.instances))
            if said is not None and said != self._said:  # a loss, and the change that it means, are one event
                self._say(said)
                self._said = said


async def keep_up(service: Service, say: Callable[[str], None]) -> Never:
    """Look after a service. Raises ProcessEnded when its gManager ends and keeps no journal."""
    upkeep = Upkeep(service, say)
    try:
        while True:
            upkeep.look(time.monotonic())
            await asyncio.sleep(LOOK_S)
    finally:
        upkeep.close()
