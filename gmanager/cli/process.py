"""A child process whose output is a file: started, watched, started again, and ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gmanager.cli.said import last_words

STOP_S = 15.0
"""Between asking a process to end and killing it."""

_LEASH = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes a program that is asked to end when the process that started it is gone, however that came."""

NO_BARS = {"TQDM_DISABLE": "1"}
"""Environment in which libraries draw no progress bars of their own."""


class ServiceError(Exception):
    """The service did not come up, or went down; the message says why."""


class ProcessEnded(ServiceError):
    """One of the processes is gone; the message is one line: what it said itself of the reason, and where its log is."""

    def __init__(self, process: "Process") -> None:
        super().__init__(f"{process.why()} (log: {process.log})")


class Process:
    """A child in a process group of its own, its output in a file. It does not outlive this process."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, explain: Callable[[str], str | None] = lambda text: None
    ) -> None:
        """Starts it. `explain`: the reason of its end in a sentence, from its log, if that has it."""
        self.name = name
        self.command = list(command)
        """Of the next start."""
        self.log = log
        self._explain = explain
        log.write_bytes(b"")
        self._spawn()

    def _spawn(self) -> None:
        # from the main thread alone: the leash is tied to the thread that holds it
        self._said_before = self.log.stat().st_size
        self.started_at = time.monotonic()
        leash = [sys.executable, "-ISc", _LEASH, str(os.getpid())]
        with self.log.open("ab") as out:
            self._child = subprocess.Popen(
                [*leash, *self.command],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | NO_BARS,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def code(self) -> int | None:
        """How it ended; negative: by that signal. None: it runs."""
        return self._child.poll()

    def check(self) -> None:
        """Raises ProcessEnded if it has ended."""
        if self.code is not None:
            raise ProcessEnded(self)

    def text(self) -> str:
        """What it has printed since it was started last."""
        with self.log.open("rb") as file:
            file.seek(self._said_before)
            return file.read().decode(errors="replace")

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.text().splitlines()[-lines:])

    def why(self) -> str:
        """How it ended, in a sentence. Raises RuntimeError while it runs."""
        code = self.code
        if code is None:
            raise RuntimeError(f"{self.name} runs")
        if code < 0:  # who is killed doesn't say why
            return f"{self.name} was killed by {signal.Signals(-code).name}"
        words = last_words(self.text())
        return self._explain(self.text()) or f"{self.name} ended with exit code {code}{f': {words}' if words else ''}"

    def restart(self) -> None:
        """Start it again, once it has ended; what it prints comes behind what it has printed."""
        self._end_group()
        self._spawn()

    def ask_to_end(self) -> None:
        if self.code is None:
            self._child.send_signal(signal.SIGTERM)

    def wait_or_kill(self) -> None:
        """Once it was asked to end: wait, and kill what is left of its group."""
        try:
            self._child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            print(f"{self.name} did not end within {STOP_S:.0f} s and is killed", file=sys.stderr)
        self._end_group()

    def _end_group(self) -> None:
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # nothing was left
        self._child.wait()


def stop_all(processes: Sequence[Process]) -> None:
    """Stop them together: each has its time while the others have theirs. Each is asked once: twice would mean at once."""
    for process in processes:
        process.ask_to_end()
    for process in processes:
        process.wait_or_kill()
