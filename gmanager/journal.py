"""The journal: what a gManager that follows this one has to know, in a SQLite file. It does I/O and decides nothing.

    append ──> batch ──> writer thread: one transaction for all that came meanwhile ──> committed, told

What a client is told waits for the commit that holds it. After kill -9 of the process nothing is missing that was committed.
A loss of power may take the last commits with it (SQLite's synchronous=NORMAL): then those tokens are generated again, and
come out the same, as a token is a function of seed, position and what is before it.

While the file can't be written (a full disk, an error of it), entries are kept, merged, and written together once it can be.
"""

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path

from gmanager.cluster.events import Entry, Restored
from gmanager.cluster.performance import Costs
from gmanager.journal_file import Batch, JournalFile
from gmanager.wire.errors import JournalError

COMMIT_S = 0.01
"""Least time from the beginning of one commit to that of the next: a commit takes some 0.2 ms of CPU, whatever it holds."""
RETRY_S = 3.0
"""After an error, until it is tried again."""
STALL_S = 5.0
"""A commit that takes longer counts as failed until it ends: a disk may hang."""


class Journal:
    """One gManager's: no other process can open the file meanwhile."""

    def __init__(self, path: Path, lock: FileIO, file: JournalFile) -> None:
        """Use `open`."""
        self.path = path
        self._lock = lock
        self._file = file
        self._wake = threading.Condition()
        self._batch = Batch()
        self._appended = 0
        self._committed = 0
        self._next_at = 0.0
        """Before that no commit begins."""
        self._began: float | None = None
        """When the commit that runs began."""
        self._failure: str | None = None
        self._error: Exception | None = None
        self._is_closing = False
        self._tell: Callable[[], object] = lambda: None
        self._writer: threading.Thread | None = None

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """Take the file, or make it, under the next term. Raises JournalError, and leaves it as it is: another process has it,
        it has a newer schema, it is no journal, it is damaged, it can't be reached."""
        lock = _lock(path)
        try:
            return cls(path, lock, JournalFile(path))
        except BaseException:
            lock.close()
            raise

    @property
    def term(self) -> int:
        """Of this gManager, from 1: each that has opened the file has a higher one than all before it."""
        return self._file.term

    @property
    def identity(self) -> int:
        """Of the file: no other journal has it."""
        return self._file.identity

    def restore(self) -> list[Restored]:
        """What the gManagers before took in, by number: all that has not ended, and the last that has. Before `start`. Raises
        JournalError."""
        if self._writer is not None:
            raise RuntimeError("a journal is read before it is written")
        return self._file.read()

    def costs(self) -> dict[str, Costs]:
        """What steps were found to take, by kind of cell. Before `start`. Raises JournalError."""
        if self._writer is not None:
            raise RuntimeError("a journal is read before it is written")
        return self._file.costs()

    def start(self, tell: Callable[[], object]) -> None:
        """Begin to write. `tell` is called by the writer's thread when `committed`, `failure` or `error` has changed."""
        self._tell = tell
        self._writer = threading.Thread(target=self._write, name="journal", daemon=True)
        self._writer.start()

    def append(self, *entries: Entry) -> int:
        """Have them written soon, in one commit; waits for none. The answer is the last one's place: it is written once
        `committed` has come to that. Raises ValueError for tokens that don't follow those before."""
        if entries:
            with self._wake:
                for entry in entries:
                    self._batch.add(entry)
                self._appended += len(entries)
                self._wake.notify()
        return self._appended

    def together(self) -> AbstractContextManager[object]:
        """What is appended within is in one commit."""
        return self._wake

    @property
    def appended(self) -> int:
        """The last entry's place."""
        return self._appended

    @property
    def committed(self) -> int:
        """All entries up to this place are in the file."""
        return self._committed

    @property
    def failure(self) -> str | None:
        """Why nothing can be written now; it is tried again."""
        if self._failure is not None:
            return self._failure
        began = self._began
        took = 0.0 if began is None else time.monotonic() - began
        return f"a commit has not ended for {took:.0f} s" if took > STALL_S else None

    @property
    def error(self) -> Exception | None:
        """Why nothing will be written any more: Fenced, or what should not have happened."""
        return self._error

    def close(self) -> None:
        """Write what is left, if that is possible, and let go of the file. It may take as long as a commit."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._writer is not None:
            self._writer.join()
        self._file.close()
        self._lock.close()

    # --- the writer's thread ------------------------------------------------------------------------------------------

    def _write(self) -> None:
        try:
            while self._wait():
                self._commit()
            if self._appended > self._committed:
                self._commit()
        except Exception as error:  # also what nobody expects: who waits for a commit must hear of it
            self._error = error
            self._tell()

    def _wait(self) -> bool:
        """Until something is to be written, or tried again. False: the journal closes."""
        with self._wake:
            if self._failure is not None:
                self._wake.wait_for(lambda: self._is_closing, RETRY_S)
            else:
                self._wake.wait_for(lambda: self._is_closing or self._appended > self._committed)
            if self._is_closing:
                return False
        time.sleep(max(0.0, self._next_at - time.monotonic()))
        return True

    def _commit(self) -> None:
        with self._wake:
            batch, self._batch = self._batch, Batch()
            place = self._appended
        self._began = time.monotonic()
        self._next_at = self._began + COMMIT_S
        try:
            if self._failure is not None:
                self._file.touch()
            if place > self._committed:
                self._file.write(batch)
                self._committed = place
                batch = Batch()
            if self._file.needs_tidying:
                self._file.tidy()
            self._failure = None
        except sqlite3.Error as error:
            with self._wake:
                batch.extend(self._batch)
                self._batch = batch
            self._failure = str(error)
        finally:
            self._began = None
        self._tell()


def _lock(path: Path) -> FileIO:
    """An open file whose lock says that the journal is in use, as long as this process lives. Raises JournalError."""
    if not path.parent.is_dir():
        raise JournalError(f"journal {path} can't be made: there is no directory {path.parent}")
    if path.is_dir():
        raise JournalError(f"journal {path} is a directory")
    beside = path.with_name(f"{path.name}.lock")
    try:
        lock = FileIO(os.open(beside, os.O_RDWR | os.O_CREAT, 0o600), "r+")
    except OSError as error:
        raise JournalError(f"journal {path} can't be locked: {beside}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
    except BlockingIOError as error:
        holder = lock.read(20).decode(errors="replace")
        lock.close()
        raise JournalError(f"journal {path} is in use by another gManager (process {holder or 'unknown'})") from error
    except OSError as error:
        lock.close()
        raise JournalError(f"journal {path} can't be locked: {beside}: {error.strerror}") from error
    return lock
