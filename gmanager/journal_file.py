"""The file of a journal: its tables, and what their rows mean. One thread at a time uses it.

    accepted, encoded, ended     a row for each request, written once
    log                          a row for each commit: all tokens that it brought, of all requests
    tokens                       a request's tokens in few large rows: the log is folded into it when it has grown
    costs                        a row for each kind of cell: how long its steps take

A commit adds a row behind the last of one table and so writes two or three pages, however many requests it is about; a row
for each request's tokens would be a page of its own for each of them.

The *term* counts the gManagers that have opened the file. Each transaction looks whether it is still its own.
"""

import sqlite3
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from gmanager.cluster.events import Accepted, Encoded, Entry, Finished, Generated, Measured, Restored
from gmanager.cluster.performance import Costs
from gmanager.wire.errors import Fenced, JournalError
from gmanager.wire.messages import Submit, TokenLogprob, pack_tokens, unpack_tokens

SCHEMA = 3
APPLICATION_ID = 0x64617474
""""datt": by which SQLite's files say whose they are."""

KEEP_ENDED = 1024
"""Finished requests that are kept."""
MAX_ENDED_BYTES = 256 * 2**20
"""Most that they take together, prompts included; the last one is kept whatever it takes."""
ENDED_SLACK = 64
"""So many more may be kept until they are deleted together."""
FOLD_BYTES = 4 * 2**20
"""Of the log."""
MAX_FREE_PAGES = 4096
"""Pages of 4 KiB that the file keeps for later; others are given back to the file system, VACUUM_PAGES with a commit."""
VACUUM_PAGES = 1024
MAX_KINDS = 64
"""Of cells whose costs are kept, those of the newest."""
CHECKPOINT_PAGES = 4096
"""Of the write-ahead log (16 MiB), before they are copied into the file: the only time that a commit waits for the disk."""

_COSTS = "CREATE TABLE costs (kind TEXT PRIMARY KEY, at REAL, costs BLOB) WITHOUT ROWID;"
_TABLES = f"""
CREATE TABLE meta (term INTEGER NOT NULL, identity INTEGER NOT NULL DEFAULT 0);
CREATE TABLE accepted (number INTEGER PRIMARY KEY, id TEXT, at REAL, seed INTEGER, spread, submit BLOB);
CREATE TABLE encoded (number INTEGER PRIMARY KEY, token_ids BLOB, highest INTEGER, bad_words BLOB, grammar TEXT);
CREATE TABLE ended (place INTEGER PRIMARY KEY, number INTEGER UNIQUE, generated INTEGER, reason TEXT, error TEXT, refusal TEXT);
CREATE TABLE log (place INTEGER PRIMARY KEY, entries BLOB);
CREATE TABLE tokens (number INTEGER, start INTEGER, token_ids BLOB, logprobs BLOB, PRIMARY KEY (number, start));
{_COSTS}
INSERT INTO meta (term) VALUES (0);
"""
_IDENTIFY = "UPDATE meta SET identity = random() & 0x7fffffffffffffff;"
_UPGRADES = [f"ALTER TABLE meta ADD COLUMN identity INTEGER NOT NULL DEFAULT 0; {_IDENTIFY}", _COSTS]
"""From each schema to the next, the first one's first."""

_SIZES = """
SELECT number, length(submit) + ifnull((SELECT length(token_ids) FROM encoded e WHERE e.number = a.number), 0)
    + ifnull((SELECT sum(length(token_ids) + ifnull(length(logprobs), 0)) FROM tokens t WHERE t.number = a.number), 0)
FROM accepted a
"""

LogEntry = tuple[int, int, bytes, bytes | None]
"""Number, index, packed token ids, packed log-probabilities."""

Logprob = tuple[int, float, int, list[int], list[float]]


@dataclass(slots=True)
class Tail:
    """Consecutive tokens of a request, from `start` on."""

    start: int
    token_ids: "array[int]"
    logprobs: list[TokenLogprob] | None = None

    def add(self, new: Generated) -> None:
        """Raises ValueError unless they follow."""
        if new.index != self.start + len(self.token_ids):
            raise ValueError(
                f"request {new.number} has {self.start + len(self.token_ids)} tokens, got some from {new.index} on"
            )
        self.token_ids.extend(new.token_ids)
        if new.logprobs is not None:
            self.logprobs = [] if self.logprobs is None else self.logprobs
            self.logprobs.extend(new.logprobs)


class Batch:
    """Entries of one transaction. Those of a request are merged, so that it takes no more than its tokens do."""

    def __init__(self) -> None:
        self.accepted: list[tuple[Accepted, float]] = []
        self.encoded: list[Encoded] = []
        self.ended: dict[int, Finished] = {}
        self.tails: dict[int, Tail] = {}
        self.measured: dict[str, Measured] = {}

    def add(self, entry: Entry) -> None:
        """Raises ValueError for tokens that don't follow those before."""
        if isinstance(entry, Generated):  # nearly all are
            tail = self.tails.get(entry.number)
            if tail is None:
                tail = self.tails[entry.number] = Tail(entry.index, array("I"))
            tail.add(entry)
        elif isinstance(entry, Accepted):
            self.accepted.append((entry, time.time()))
        elif isinstance(entry, Encoded):
            self.encoded.append(entry)
        elif isinstance(entry, Measured):
            self.measured[entry.kind] = entry
        else:
            self.ended[entry.number] = entry

    def extend(self, later: "Batch") -> None:
        """Take in what came after."""
        self.accepted += later.accepted
        self.encoded += later.encoded
        self.ended |= later.ended
        self.measured |= later.measured
        for number, tail in later.tails.items():
            self.add(Generated(number=number, index=tail.start, token_ids=tail.token_ids, logprobs=tail.logprobs))


@dataclass(slots=True)
class _Unfolded:
    """What the log has of a request."""

    start: int
    token_ids: bytearray = field(default_factory=bytearray)
    logprobs: list[bytes] = field(default_factory=list)

    def packed_logprobs(self) -> bytes | None:
        return msgspec.msgpack.encode(self.logprobs) if self.logprobs else None


class JournalFile:
    """Opened for writing, under the next term."""

    def __init__(self, path: Path) -> None:
        """Raises JournalError; then the file is as it was."""
        self._path = path
        self._unfolded: dict[int, _Unfolded] = {}
        self._log_bytes = 0
        self._sizes: dict[int, int] = {}
        """Of each request's rows, in bytes."""
        self._ended: dict[int, None] = {}
        """In the order in which they ended."""
        self._ended_bytes = 0
        self._has_free_pages = False
        self._prompts: dict[int, bytes | None] = {}
        """Token ids that requests came with, until those are known to be theirs: they are not written twice."""
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise JournalError(f"journal {path} can't be opened: {error}") from error
        try:
            with _explained(path):
                self._prepare()
                self.term = self._take_term()
                self.identity = self._identity()
                self._load()
        except BaseException:
            self._db.close()
            raise

    def read(self) -> list[Restored]:
        """All requests, those that have ended too, by number. Raises JournalError if what is there doesn't fit together."""
        with _explained(self._path):
            return list(self._read())

    def costs(self) -> dict[str, Costs]:
        """By kind of cell. Raises JournalError if what is there can't be."""
        with _explained(self._path):
            rows = self._db.execute("SELECT kind, costs FROM costs ORDER BY at").fetchall()
            return {kind: msgspec.msgpack.decode(packed, type=Costs) for kind, packed in rows}

    def write(self, batch: Batch) -> None:
        """All of it or nothing. Raises sqlite3.Error, and Fenced."""
        entries = [_log_entry(number, tail) for number, tail in batch.tails.items()]
        packed = msgspec.msgpack.encode(entries)
        accepted = [_accepted_row(entry, at) for entry, at in batch.accepted]
        prompts = self._prompts | {entry.number: entry.submit.token_ids for entry, _ in batch.accepted}
        encoded = [_encoded_row(entry, prompts.pop(entry.request, None)) for entry in batch.encoded]
        with self._transaction():
            self._db.executemany("INSERT INTO accepted VALUES (?, ?, ?, ?, ?, ?)", accepted)
            self._db.executemany("INSERT INTO encoded VALUES (?, ?, ?, ?, ?)", encoded)
            self._db.executemany(
                "INSERT OR REPLACE INTO ended (number, generated, reason, error, refusal) VALUES (?, ?, ?, ?, ?)",
                [(e.number, e.generated, e.finish_reason, e.error, e.refusal) for e in batch.ended.values()],
            )
            if entries:
                self._db.execute("INSERT INTO log (entries) VALUES (?)", (packed,))
            if batch.measured:
                self._write_costs(batch.measured.values())
        self._prompts = prompts
        for row in accepted:
            self._sizes[row[0]] = len(row[-1])
        for number, token_ids, *_ in encoded:
            self._sizes[number] += len(token_ids or b"")
        self._note(entries, len(packed))
        for number in batch.ended:
            self._note_end(number)
            prompts.pop(number, None)

    @property
    def needs_tidying(self) -> bool:
        """Whether there is work for `tidy`."""
        return (
            self._log_bytes > FOLD_BYTES
            or len(self._ended) > KEEP_ENDED + ENDED_SLACK
            or (self._ended_bytes > MAX_ENDED_BYTES and len(self._ended) > 1)
            or self._has_free_pages
        )

    def tidy(self) -> None:
        """Fold the log, delete what ended long ago, give back room. Raises sqlite3.Error, and Fenced."""
        over = self._too_many_ended()
        is_long = self._log_bytes > FOLD_BYTES
        with self._transaction():
            for number in over:
                for table in ("accepted", "encoded", "ended", "tokens"):
                    self._db.execute(f"DELETE FROM {table} WHERE number = ?", (number,))
            if is_long:
                rows = [
                    (
                        number,
                        tail.start,
                        bytes(tail.token_ids),
                        msgspec.msgpack.encode(tail.logprobs) if tail.logprobs else None,
                    )
                    for number, tail in self._unfolded.items()
                    if number not in over
                ]
                self._db.executemany("INSERT INTO tokens VALUES (?, ?, ?, ?)", rows)
                self._db.execute("DELETE FROM log")
            free = self._pragma("freelist_count")
            if free > MAX_FREE_PAGES:
                self._db.execute(f"PRAGMA incremental_vacuum({min(free - MAX_FREE_PAGES, VACUUM_PAGES)})").fetchall()
        self._has_free_pages = free - VACUUM_PAGES > MAX_FREE_PAGES
        for number in over:
            self._ended_bytes -= self._sizes.pop(number)
            del self._ended[number]
            self._unfolded.pop(number, None)
        if is_long:
            self._unfolded.clear()
            self._log_bytes = 0

    def touch(self) -> None:
        """Write nothing new, to see whether that is possible. Raises sqlite3.Error, and Fenced."""
        with self._transaction():
            self._db.execute("UPDATE meta SET term = term")

    def close(self) -> None:
        self._db.close()

    # --- opening ------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Look whose file it is, and make its tables if it is nobody's."""
        application, schema = self._pragma("application_id"), self._pragma("user_version")
        if application == APPLICATION_ID:
            if schema > SCHEMA:
                raise JournalError(f"journal {self._path} has schema {schema}, this gManager reads up to {SCHEMA}")
            if schema < SCHEMA:
                upgrade = " ".join(_UPGRADES[max(0, schema - 1) :])
                self._db.executescript(f"BEGIN EXCLUSIVE; {upgrade} PRAGMA user_version = {SCHEMA}; COMMIT;")
        elif application or schema or self._db.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
            raise JournalError(f"{self._path} is no journal but another program's database (application id {application:#x})")
        else:
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            script = f"{_TABLES} {_IDENTIFY} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA};"
            self._db.executescript(f"BEGIN EXCLUSIVE; {script} COMMIT;")
        if (mode := self._pragma("journal_mode = WAL")) != "wal":
            raise JournalError(f"journal {self._path} can't have a write-ahead log here (SQLite's journal_mode stays {mode!r})")
        self._pragma(f"wal_autocheckpoint = {CHECKPOINT_PAGES}")
        self._pragma(f"journal_size_limit = {4 * CHECKPOINT_PAGES * 4096}")

    def _take_term(self) -> int:
        """The next one. No loss of power may undo that: requests are numbered by it."""
        self._db.execute("PRAGMA synchronous = FULL")
        term: int = self._db.execute("UPDATE meta SET term = term + 1 RETURNING term").fetchall()[0][0]
        self._db.execute("PRAGMA synchronous = NORMAL")
        return term

    def _identity(self) -> int:
        """Of the file, for ever: no other has it."""
        (identity,) = self._db.execute("SELECT identity FROM meta").fetchone()
        return int(identity)

    def _load(self) -> None:
        self._sizes = dict(self._db.execute(_SIZES).fetchall())
        for (packed,) in self._db.execute("SELECT entries FROM log ORDER BY place"):
            self._note(msgspec.msgpack.decode(packed, type=list[LogEntry]), len(packed))
        for (number,) in self._db.execute("SELECT number FROM ended ORDER BY place"):
            self._note_end(number)

    def _read(self) -> Iterator[Restored]:
        encoded = {row[0]: row[1:] for row in self._db.execute("SELECT * FROM encoded")}
        columns = "number, reason, generated, error, refusal"
        ended = {
            row[0]: Finished(number=row[0], finish_reason=row[1], generated=row[2], error=row[3], refusal=row[4])
            for row in self._db.execute(f"SELECT {columns} FROM ended")
        }
        for number, seed, spread, packed in self._db.execute(
            "SELECT number, seed, spread, submit FROM accepted ORDER BY number"
        ):
            submit = msgspec.msgpack.decode(packed, type=Submit)
            token_ids, logprobs = self._tokens_of(number)
            end = ended.get(number)
            if end is not None:
                if end.generated > len(token_ids):
                    raise JournalError(
                        f"journal {self._path} is damaged: request {number} ended with {end.generated} tokens, it has "
                        f"{len(token_ids)}"
                    )
                del token_ids[end.generated :], logprobs[end.generated :]
            yield Restored(
                number=number,
                submit=submit,
                seed=seed,
                spread=spread,
                encoded=_encoded(number, submit, *encoded[number]) if number in encoded else None,
                token_ids=token_ids,
                logprobs=logprobs or None,
                finish_reason=None if end is None else end.finish_reason,
                error=None if end is None else end.error,
                refusal=None if end is None else end.refusal,
            )

    def _tokens_of(self, number: int) -> "tuple[array[int], list[TokenLogprob]]":
        token_ids, logprobs = array("I"), list[TokenLogprob]()
        rows: list[tuple[int, bytes, list[bytes]]] = [
            (start, ids, [] if scores is None else msgspec.msgpack.decode(scores, type=list[bytes]))
            for start, ids, scores in self._db.execute(
                "SELECT start, token_ids, logprobs FROM tokens WHERE number = ? ORDER BY start", (number,)
            )
        ]
        tail = self._unfolded.get(number)
        if tail is not None:
            rows.append((tail.start, bytes(tail.token_ids), tail.logprobs))
        for start, ids, scores in rows:
            if start != len(token_ids):
                raise JournalError(
                    f"journal {self._path} is damaged: of request {number} it has {len(token_ids)} tokens, and then some from "
                    f"{start} on"
                )
            token_ids.extend(unpack_tokens(ids))
            for part in scores:
                logprobs += _unpack_logprobs(part)
        return token_ids, logprobs

    # --- writing ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            (term,) = self._db.execute("SELECT term FROM meta").fetchone()
            if term != self.term:
                raise Fenced(f"journal {self._path} was taken over by another gManager (term {term}; this one has {self.term})")
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # some errors have ended it
                self._db.execute("ROLLBACK")
            raise

    def _write_costs(self, measured: Iterable[Measured]) -> None:
        now = time.time()
        rows = [(entry.kind, now, msgspec.msgpack.encode(entry.costs)) for entry in measured]
        self._db.executemany("INSERT OR REPLACE INTO costs VALUES (?, ?, ?)", rows)
        newest = f"SELECT kind FROM costs ORDER BY at DESC LIMIT {MAX_KINDS}"
        self._db.execute(f"DELETE FROM costs WHERE kind NOT IN ({newest})")

    def _note(self, entries: Sequence[LogEntry], size: int) -> None:
        """These are in the log."""
        if not entries:
            return
        self._log_bytes += size
        for number, index, token_ids, logprobs in entries:
            if number not in self._sizes:  # an old one, whose rows are gone
                continue
            tail = self._unfolded.get(number)
            if tail is None:
                tail = self._unfolded[number] = _Unfolded(index)
            if index != tail.start + len(tail.token_ids) // 4:
                raise JournalError(
                    f"journal {self._path} is damaged: tokens of request {number} from {index} on are out of order"
                )
            tail.token_ids += token_ids
            if logprobs is not None:
                tail.logprobs.append(logprobs)
            self._sizes[number] += len(token_ids) + len(logprobs or b"")

    def _note_end(self, number: int) -> None:
        if number not in self._ended and number in self._sizes:  # else its rows are gone
            self._ended[number] = None
            self._ended_bytes += self._sizes[number]

    def _too_many_ended(self) -> list[int]:
        """The oldest of them, down to what is kept."""
        count, size = len(self._ended), self._ended_bytes
        over = []
        for number in self._ended:
            if (count <= KEEP_ENDED and size <= MAX_ENDED_BYTES) or count == 1:
                break
            over.append(number)
            count, size = count - 1, size - self._sizes[number]
        return over

    def _pragma(self, words: str) -> Any:
        row = self._db.execute(f"PRAGMA {words}").fetchone()
        return None if row is None else row[0]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise JournalError(f"journal {path} can't be used: {error}") from error
    except sqlite3.DatabaseError as error:
        raise JournalError(f"{path} is no journal, or damaged: {error}") from error
    except (msgspec.MsgspecError, ValueError, KeyError) as error:
        raise JournalError(f"journal {path} is damaged: {error}") from error


def _accepted_row(entry: Accepted, at: float) -> tuple[Any, ...]:
    packed = msgspec.msgpack.encode(entry.submit)
    return entry.number, entry.submit.request_id, at, entry.seed, entry.spread, packed


def _encoded_row(entry: Encoded, given: bytes | None) -> tuple[Any, ...]:
    token_ids = None if entry.token_ids == given else entry.token_ids
    return entry.request, token_ids, entry.highest, msgspec.msgpack.encode(entry.bad_words), entry.grammar


def _encoded(
    number: int, submit: Submit, token_ids: bytes | None, highest: int, bad_words: bytes, grammar: str | None
) -> Encoded:
    return Encoded(
        number,
        0.0,
        token_ids=(submit.token_ids or b"") if token_ids is None else token_ids,
        bad_words=msgspec.msgpack.decode(bad_words, type=list[list[int]]),
        grammar=grammar,
        highest=highest,
    )


def _log_entry(number: int, tail: Tail) -> LogEntry:
    logprobs = None if tail.logprobs is None else _pack_logprobs(tail.logprobs)
    return number, tail.start, pack_tokens(tail.token_ids), logprobs


def _pack_logprobs(logprobs: Sequence[TokenLogprob]) -> bytes:
    rows: list[Logprob] = [(p.token_id, p.logprob, p.rank, p.top_ids, p.top_logprobs) for p in logprobs]
    return msgspec.msgpack.encode(rows)


def _unpack_logprobs(packed: bytes) -> list[TokenLogprob]:
    return [
        TokenLogprob(token_id=token, logprob=logprob, rank=rank, top_ids=top_ids, top_logprobs=top_logprobs)
        for token, logprob, rank, top_ids, top_logprobs in msgspec.msgpack.decode(packed, type=list[Logprob])
    ]
