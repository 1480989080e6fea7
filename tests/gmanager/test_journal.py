"""The journal's file, its writer, and what both do when a disk is full, a process was killed, another one has taken over."""

import hashlib
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gmanager import journal as journal_module
from gmanager import journal_file
from gmanager.cluster.events import Accepted, Encoded, Entry, Finished, Generated, Measured, Restored
from gmanager.cluster.performance import guess
from gmanager.journal import Journal
from gmanager.journal_file import MAX_KINDS, Batch, JournalFile
from gmanager.wire import messages as m
from gmanager.wire.errors import Fenced, JournalError

DEADLINE_S = 20.0
EVERYTHING = m.SamplingParams(
    max_tokens=9,
    logit_bias={3: 0.5},
    bad_words=["ü", "b"],
    structured_outputs=m.StructuredOutputsParams(json="{}"),
    seed=2**63 - 1,
    stop=["x", "y"],
    stop_token_ids=[2**32 - 1],
    logprobs=2,
)


def accepted(number: int, **more: Any) -> Accepted:
    content = {"token_ids": m.pack_tokens([1, 2, 3])} | more
    submit = m.Submit(request_id=f"r{number}", params=content.pop("params", m.SamplingParams()), **content)
    return Accepted(number=number, submit=submit, seed=number + 7, spread="auto")


def encoded(number: int, token_ids: bytes = m.pack_tokens([1, 2, 3])) -> Encoded:
    return Encoded(number, 0.0, token_ids=token_ids, highest=3)


def generated(number: int, index: int, *token_ids: int, scored: bool = False) -> Generated:
    scores = [m.TokenLogprob(token_id=t, logprob=-t / 3, rank=1, top_ids=[t, 9], top_logprobs=[-0.1, -1e9]) for t in token_ids]
    return Generated(number=number, index=index, token_ids=list(token_ids), logprobs=scores if scored else None)


def ended(number: int, count: int, reason: Any = "length", **more: Any) -> Finished:
    return Finished(number=number, finish_reason=reason, generated=count, **more)


def batch(*entries: Entry) -> Batch:
    made = Batch()
    for entry in entries:
        made.add(entry)
    return made


def plain(restored: list[Restored]) -> list[dict[str, Any]]:
    """To be compared."""
    kept: list[dict[str, Any]] = []
    for r in restored:
        known = None if r.encoded is None else (r.encoded.token_ids, list(r.encoded.bad_words), r.encoded.grammar)
        end = None
        if r.finish_reason is not None:
            end = ended(r.number, len(r.token_ids), r.finish_reason, error=r.error, refusal=r.refusal)
        kept.append(
            {
                "number": r.number,
                "submit": r.submit,
                "seed": r.seed,
                "spread": r.spread,
                "encoded": known,
                "tokens": list(r.token_ids),
                "logprobs": None if r.logprobs is None else list(r.logprobs),
                "ended": end,
            }
        )
    return kept


def state_of(path: Path) -> list[dict[str, Any]]:
    """What a gManager that opens it now would read."""
    file = JournalFile(path)
    try:
        return plain(file.read())
    finally:
        file.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def opened() -> Iterator[Callable[[Path], Journal]]:
    """Opens journals, and closes them at the end."""
    ours: list[Journal] = []

    def open_one(path: Path) -> Journal:
        ours.append(Journal.open(path))
        return ours[-1]

    yield open_one
    for one in ours:
        one.close()


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Hasty(sqlite3.Connection):
    """Never waits for the disk: that is most of the time of thousands of files."""

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        return super().execute("PRAGMA synchronous = OFF" if "synchronous" in sql else sql, *parameters)


def be_hasty(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Hasty))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    be_hasty(monkeypatch)


# --- what comes back


def test_all_that_a_request_is_made_of_comes_back(path: Path) -> None:
    asked = accepted(5, params=EVERYTHING, token_ids=None, text="é" * 10, spread=3, model="a")
    known = Encoded(5, 1.0, token_ids=m.pack_tokens([7, 8]), bad_words=[[1], [2, 3]], grammar="root ::= x", highest=8)
    end = ended(5, 3, "error", error="it broke", refusal="never")
    file = JournalFile(path)
    file.write(batch(asked, known, generated(5, 0, 4, 5, scored=True)))
    file.write(batch(generated(5, 2, 6, 2**32 - 1, scored=True), end))
    file.close()
    file = JournalFile(path)
    (found,) = file.read()
    file.close()
    assert found.submit == asked.submit
    assert (found.number, found.seed, found.spread) == (5, asked.seed, asked.spread)
    assert found.encoded is not None
    assert (found.encoded.request, found.encoded.token_ids, found.encoded.highest) == (5, known.token_ids, 8)
    assert (found.encoded.bad_words, found.encoded.grammar) == ([[1], [2, 3]], "root ::= x")
    assert list(found.token_ids) == [4, 5, 6]  # the last one does not count
    assert found.logprobs == generated(5, 0, 4, 5, 6, scored=True).logprobs
    assert (found.finish_reason, found.error, found.refusal) == ("error", "it broke", "never")


def test_a_prompt_that_came_as_token_ids_is_written_once(path: Path) -> None:
    prompt = m.pack_tokens(range(200_000))
    file = JournalFile(path)
    file.write(batch(accepted(1, token_ids=prompt)))
    file.write(batch(encoded(1, prompt)))  # it waited for a cell
    assert [r.encoded.token_ids for r in file.read() if r.encoded] == [prompt]
    file.close()
    assert len(prompt) < path.stat().st_size < 1.1 * len(prompt)


def test_terms_and_what_they_number_only_grow(path: Path, opened: Callable[[Path], Journal]) -> None:
    for term in (1, 2, 3):
        journal = opened(path)
        assert journal.term == term
        journal.close()


@dataclass
class Told:
    """What was said of a request, as the reader is to find it."""

    accepted: Accepted
    encoded: Encoded | None = None
    tokens: list[int] = field(default_factory=list)
    ended: Finished | None = None


class Interleavings(RuleBasedStateMachine):
    """Any entries of any requests, written or not when the file is opened again; a tiny log, and few that are kept."""

    @initialize()
    def begin(self) -> None:
        self.patch = pytest.MonkeyPatch()
        be_hasty(self.patch)
        self.patch.setattr(journal_file, "FOLD_BYTES", 200)
        self.patch.setattr(journal_file, "KEEP_ENDED", 3)
        self.patch.setattr(journal_file, "ENDED_SLACK", 1)
        self.folder = Path(tempfile.mkdtemp())
        self.file = JournalFile(self.folder / "journal")
        self.told: dict[int, Told] = {}
        self.written: dict[int, Told] = {}
        self.order: list[int] = []
        self.batch = Batch()
        self.numbers = 0

    def say(self, entry: Entry) -> None:
        self.batch.add(entry)

    @property
    def live(self) -> list[int]:
        return [number for number, told in self.told.items() if told.ended is None]

    @rule(is_text=st.booleans())
    def accept(self, is_text: bool) -> None:
        self.numbers += 1
        entry = accepted(self.numbers, **({"token_ids": None, "text": "a"} if is_text else {}))
        self.told[self.numbers] = Told(entry)
        self.say(entry)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def encode(self, data: st.DataObject) -> None:
        told = self.told[data.draw(st.sampled_from(self.live))]
        if told.encoded is None:
            told.encoded = encoded(told.accepted.number)
            self.say(told.encoded)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), ids=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9))
    def generate(self, data: st.DataObject, ids: list[int]) -> None:
        number = data.draw(st.sampled_from(self.live))
        told = self.told[number]
        self.say(generated(number, len(told.tokens), *ids, scored=number % 2 == 0))
        told.tokens = told.tokens + ids

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        told = self.told[data.draw(st.sampled_from(self.live))]
        told.ended = ended(told.accepted.number, len(told.tokens))
        self.order.append(told.accepted.number)
        self.say(told.ended)
        if told.tokens and data.draw(st.booleans()):
            told.ended = ended(told.accepted.number, data.draw(st.integers(0, len(told.tokens))), "stop")
            self.say(told.ended)

    @rule(fails=st.booleans())
    def commit(self, fails: bool) -> None:
        if fails:  # another one has come to the file: nothing is written, and it is told again with what comes
            term, self.file.term = self.file.term, 99
            with pytest.raises(Fenced):
                self.file.write(self.batch)
            self.file.term = term
            later, earlier = Batch(), self.batch
            earlier.extend(later)
            return
        self.file.write(self.batch)
        self.batch = Batch()
        self.written = {number: Told(t.accepted, t.encoded, t.tokens, t.ended) for number, t in self.told.items()}

    @rule()
    def tidy(self) -> None:
        self.file.tidy()
        over = [number for number in self.order if number in self.written and self.written[number].ended is not None][:-3]
        for number in over:
            del self.written[number], self.told[number]
        self.order = [number for number in self.order if number not in over]

    @rule()
    def reopen(self) -> None:
        """What wasn't committed is gone."""
        self.file.close()
        self.file = JournalFile(self.folder / "journal")
        self.batch = Batch()
        self.told = {number: Told(t.accepted, t.encoded, t.tokens, t.ended) for number, t in self.written.items()}
        self.order = [number for number in self.order if number in self.told and self.told[number].ended is not None]

    @invariant()
    def comes_back(self) -> None:
        if not hasattr(self, "file"):
            return
        found = plain(self.file.read())
        assert [r["number"] for r in found] == sorted(self.written)
        for r, (number, told) in zip(found, sorted(self.written.items()), strict=True):
            tokens = told.tokens if told.ended is None else told.tokens[: told.ended.generated]
            assert (r["submit"], r["tokens"], r["ended"]) == (told.accepted.submit, tokens, told.ended)
            assert r["logprobs"] == (generated(number, 0, *tokens, scored=number % 2 == 0).logprobs or None)
            assert (r["encoded"] is None) == (told.encoded is None)

    def teardown(self) -> None:
        if hasattr(self, "file"):
            self.file.close()
            self.patch.undo()
            shutil.rmtree(self.folder)


TestInterleavings = Interleavings.TestCase


# --- a process that is killed


def small_pages(path: Path) -> None:
    """A new file of small pages: a transaction has fewer bytes to be cut at."""
    db = sqlite3.connect(path)
    db.executescript("PRAGMA page_size = 512; PRAGMA auto_vacuum = INCREMENTAL; CREATE TABLE t (a); DROP TABLE t;")
    db.close()


def wal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def cut_everywhere(path: Path, tmp_path: Path, before: int, allowed: list[Any], *, step: int = 1) -> set[int]:
    """Open a copy of the file with its write-ahead log cut at every length from `before` on: which of the states were found."""
    log, copy = wal_of(path).read_bytes(), tmp_path / "copy"
    found = set()
    for length in [*range(before, len(log), step), len(log)]:
        shutil.copyfile(path, copy)
        wal_of(copy).write_bytes(log[:length])
        state = state_of(copy)
        found.add(allowed.index(state))
        assert length < len(log) or state == allowed[-1]
        for left in tmp_path.glob("copy*"):
            left.unlink()
    return found


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("last", ["tokens", "all kinds"])
def test_a_file_cut_at_every_byte_of_its_last_transaction_is_recovered(path: Path, tmp_path: Path, last: str) -> None:
    small_pages(path)
    file = JournalFile(path)
    file.write(batch(accepted(1), encoded(1), accepted(2), generated(1, 0, 5, 6)))
    file.write(batch(encoded(2), generated(2, 0, 7, scored=True)))
    states = [plain(file.read())]
    before = wal_of(path).stat().st_size
    new = [generated(1, 2, *range(40)), generated(2, 1, 8, 9, scored=True)]
    file.write(batch(*new, *([ended(1, 41, "stop"), accepted(3), encoded(3)] if last == "all kinds" else [])))
    states.append(plain(file.read()))
    assert before < wal_of(path).stat().st_size < before + 8192
    assert cut_everywhere(path, tmp_path, before, states) == {0, 1}
    file.close()


@pytest.mark.usefixtures("hasty")
def test_a_file_cut_while_it_was_tidied_is_recovered(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "FOLD_BYTES", 10)
    monkeypatch.setattr(journal_file, "KEEP_ENDED", 1)
    small_pages(path)
    file = JournalFile(path)
    for number in (1, 2, 3):
        file.write(batch(accepted(number), encoded(number), generated(number, 0, *range(50))))
    file.write(batch(ended(1, 50), ended(2, 50)))
    states = [plain(file.read())]
    before = wal_of(path).stat().st_size
    file.tidy()
    states.append(states[0][1:])
    assert plain(file.read()) == states[1]
    assert cut_everywhere(path, tmp_path, before, states, step=7) == {0, 1}
    file.close()


def test_a_process_that_is_killed_loses_nothing_that_was_committed(path: Path) -> None:
    code = f"""
import os, pathlib
from gmanager.journal import Journal
from tests.gmanager.test_journal import accepted, generated
journal = Journal.open(pathlib.Path({str(path)!r}))
told = lambda: os.write(1, b"%d\\n" % journal.committed)
journal.start(told)
journal.append(accepted(1))
for index in range(10**9):
    journal.append(generated(1, index, index))
"""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        process.kill()
        lines += process.stdout.readlines()
    committed = int([line for line in lines if line.endswith(b"\n")][-1])
    (found,) = state_of(path)
    assert found["tokens"] == list(range(len(found["tokens"])))
    assert len(found["tokens"]) >= committed - 1


# --- who may have it


def test_a_second_gmanager_is_refused(path: Path, opened: Callable[[Path], Journal]) -> None:
    first = opened(path)
    with pytest.raises(JournalError, match=rf"is in use by another gManager \(process {os.getpid()}\)"):
        Journal.open(path)
    code = f"from gmanager.journal import Journal; import pathlib; Journal.open(pathlib.Path({str(path)!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"is in use by another gManager (process {os.getpid()})" in other.stderr
    first.close()
    assert opened(path).term == 2


def test_a_stale_gmanager_is_fenced_by_its_term(path: Path, opened: Callable[[Path], Journal]) -> None:
    """Where a lock doesn't hold: another one has opened the file meanwhile."""
    stale = opened(path)
    stale.start(lambda: None)
    stale.append(accepted(1))
    until(lambda: stale.committed == 1)
    other = JournalFile(path)
    stale.append(generated(1, 0, 5))
    until(lambda: stale.error is not None)
    assert isinstance(stale.error, Fenced)
    assert str(stale.error) == f"journal {path} was taken over by another gManager (term 2; this one has 1)"
    assert stale.committed == 1
    other.write(batch(generated(1, 0, 6)))
    assert [r["tokens"] for r in plain(other.read())] == [[6]]
    other.close()


def test_a_stale_gmanager_tidies_nothing(path: Path) -> None:
    stale = JournalFile(path)
    other = JournalFile(path)
    with pytest.raises(Fenced):
        stale.tidy()
    with pytest.raises(Fenced):
        stale.touch()
    stale.close()
    other.close()


# --- what is no journal


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_of_the_first_schema_gets_an_identity_and_keeps_it(path: Path) -> None:
    JournalFile(path).close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("ALTER TABLE meta DROP COLUMN identity")
    db.execute("DROP TABLE costs")
    db.execute("PRAGMA user_version = 1")
    db.close()
    file = JournalFile(path)
    assert (file.term, file.identity > 0, file.costs()) == (2, True, {})
    file.close()
    again = JournalFile(path)
    assert (again.term, again.identity) == (3, file.identity)
    again.close()


def test_a_file_of_the_second_schema_gets_room_for_costs_and_keeps_its_identity(path: Path) -> None:
    before = JournalFile(path)
    before.close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("DROP TABLE costs")
    db.execute("PRAGMA user_version = 2")
    db.close()
    file = JournalFile(path)
    assert (file.term, file.identity, file.costs()) == (2, before.identity, {})
    file.write(batch_of(Measured(kind="k", costs=guess(100))))
    assert file.costs() == {"k": guess(100)}
    file.close()


# --- how long steps take


def batch_of(*entries: Entry) -> Batch:
    batch = Batch()
    for entry in entries:
        batch.add(entry)
    return batch


def test_costs_of_each_kind_of_cell_are_kept_the_last_word_of_each(path: Path) -> None:
    journal = Journal.open(path)
    assert journal.costs() == {}
    journal.start(lambda: None)
    journal.append(Measured(kind="a", costs=guess(1)), Measured(kind="b", costs=guess(2)), Measured(kind="a", costs=guess(3)))
    journal.close()
    journal = Journal.open(path)
    assert journal.costs() == {"a": guess(3), "b": guess(2)}
    journal.start(lambda: None)
    journal.append(Measured(kind="b", costs=guess(4)))
    journal.close()
    journal = Journal.open(path)
    assert journal.costs() == {"a": guess(3), "b": guess(4)}
    journal.close()


def test_costs_of_the_newest_kinds_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr("gmanager.journal_file.time.time", lambda: float(next(now)))
    file = JournalFile(path)
    for i in range(MAX_KINDS + 3):
        file.write(batch_of(Measured(kind=f"kind {i}", costs=guess(i + 1))))
    assert list(file.costs()) == [f"kind {i}" for i in range(3, MAX_KINDS + 3)]
    file.close()


def test_costs_that_cant_be_are_told(path: Path) -> None:
    file = JournalFile(path)
    file.write(batch_of(Measured(kind="k", costs=guess(100))))
    file.close()
    db = sqlite3.connect(path, isolation_level=None)
    (packed,) = db.execute("SELECT costs FROM costs").fetchone()
    wrong = msgspec.msgpack.decode(packed)
    wrong["decode"]["row_s"] = -1.0
    db.execute("UPDATE costs SET costs = ?", (msgspec.msgpack.encode(wrong),))
    db.close()
    file = JournalFile(path)
    with pytest.raises(JournalError, match="costs must be finite, at least 0"):
        file.costs()
    file.close()


def test_a_newer_schema_is_left_alone(path: Path) -> None:
    JournalFile(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 4")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    before = digest(path)
    with pytest.raises(JournalError, match=f"journal {path} has schema 4, this gManager reads up to 3"):
        Journal.open(path)
    assert digest(path) == before
    assert not wal_of(path).exists()


def another_program(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE t (a)")
    db.close()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.write_text("a diary\n" * 100), "is no journal, or damaged: file is not a database"),
        (another_program, r"is no journal but another program's database \(application id 0x0\)"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.parent.rmdir(), "can't be made: there is no directory"),
    ],
)
def test_what_is_no_journal_is_left_alone(tmp_path: Path, make: Callable[[Path], Any], why: str) -> None:
    path = tmp_path / "folder" / "journal"
    path.parent.mkdir()
    make(path)
    before = digest(path) if path.is_file() else None
    with pytest.raises(JournalError, match=why):
        Journal.open(path)
    assert before is None or digest(path) == before


def test_an_empty_file_is_a_new_journal(path: Path, opened: Callable[[Path], Journal]) -> None:
    path.touch()
    assert opened(path).restore() == []


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        ("INSERT INTO tokens VALUES (1, 5, x'01000000', NULL)", "of request 1 it has 0 tokens, and then some from 5 on"),
        ("UPDATE ended SET generated = 9", "request 1 ended with 9 tokens, it has 2"),
        ("UPDATE accepted SET submit = x'c1'", "is damaged"),
        ("DROP TABLE tokens", "no such table"),
    ],
)
def test_a_damaged_journal_is_refused(path: Path, harm: str, why: str) -> None:
    file = JournalFile(path)
    file.write(batch(accepted(1), generated(1, 0, 5, 6), ended(1, 2)))
    file.close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(harm)
    db.close()
    with pytest.raises(JournalError, match=why):
        state_of(path)


# --- the writer


def test_entries_that_come_together_are_committed_together(path: Path, opened: Callable[[Path], Journal]) -> None:
    journal = opened(path)
    commits: list[int] = []
    journal.append(accepted(1))
    for index in range(1000):
        journal.append(generated(1, index, index))
    assert (journal.appended, journal.committed) == (1001, 0)
    journal.start(lambda: commits.append(journal.committed))
    until(lambda: journal.committed == 1001)
    until(lambda: commits == [1001])
    journal.close()
    assert state_of(path)[0]["tokens"] == list(range(1000))


def test_closing_writes_what_is_left(path: Path) -> None:
    journal = Journal.open(path)
    journal.start(lambda: None)
    for number in range(1, 100):
        journal.append(accepted(number))
    journal.close()
    assert journal.committed == 99
    assert len(state_of(path)) == 99


def test_tokens_that_dont_follow_are_refused(path: Path, opened: Callable[[Path], Journal]) -> None:
    journal = opened(path)
    journal.append(accepted(1))
    journal.append(generated(1, 0, 5))
    with pytest.raises(ValueError, match="request 1 has 1 tokens, got some from 2 on"):
        journal.append(generated(1, 2, 6))


def test_what_nobody_expects_ends_the_writer_and_is_told(path: Path, opened: Callable[[Path], Journal]) -> None:
    journal = opened(path)
    told: list[Exception | None] = []
    journal.start(lambda: told.append(journal.error))
    journal.append(generated(77, 0, 5))  # a request that was never taken in
    journal.append(encoded(77))
    until(lambda: told != [])
    assert isinstance(told[-1], KeyError)


# --- a full disk


def limit_pages(journal: Journal, pages: int) -> None:
    journal._file._db.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_is_told_and_what_came_meanwhile_is_written_later(
    path: Path, opened: Callable[[Path], Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.05)
    journal = opened(path)
    tells: list[tuple[int, str | None]] = []
    limit_pages(journal, 20)
    journal.start(lambda: tells.append((journal.committed, journal.failure)))
    journal.append(accepted(1))
    until(lambda: journal.committed == 1)
    journal.append(accepted(2, token_ids=m.pack_tokens(range(100_000))))
    until(lambda: journal.failure is not None)
    assert journal.failure == "database or disk is full"
    for index in range(50):  # what runs goes on
        journal.append(generated(1, index, index))
    journal.append(encoded(1))
    journal.append(ended(1, 50))
    time.sleep(0.2)  # it is tried again in vain
    assert journal.committed == 1
    limit_pages(journal, 10**6)
    until(lambda: journal.committed == journal.appended)
    assert journal.failure is None
    assert tells[0] == (1, None)
    assert tells[1] == (1, "database or disk is full")
    journal.close()
    one, two = state_of(path)
    assert (one["tokens"], one["ended"]) == (list(range(50)), ended(1, 50))
    assert (two["number"], two["ended"]) == (2, None)


def test_a_file_system_that_takes_no_more_is_told(
    path: Path, opened: Callable[[Path], Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.05)
    journal = opened(path)
    journal.start(lambda: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        journal.append(accepted(1, token_ids=m.pack_tokens(range(100_000))))
        until(lambda: journal.failure is not None)
        assert journal.failure is not None
        assert "disk" in journal.failure
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    until(lambda: journal.committed == 1)
    until(lambda: journal.failure is None)


def test_a_disk_that_hangs_counts_as_failed(
    path: Path, opened: Callable[[Path], Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "STALL_S", 0.05)
    journal = opened(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    journal.start(lambda: None)
    journal.append(accepted(1))
    until(lambda: journal.failure is not None)
    assert journal.failure is not None
    assert journal.failure.startswith("a commit has not ended for")
    other.execute("ROLLBACK")
    until(lambda: journal.committed == 1)
    assert journal.failure is None
    other.close()


# --- how large it gets


def test_the_file_stays_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was served: what is kept of ended requests, the log, and some free pages."""
    monkeypatch.setattr(journal_file, "KEEP_ENDED", 20)
    monkeypatch.setattr(journal_file, "ENDED_SLACK", 5)
    monkeypatch.setattr(journal_file, "FOLD_BYTES", 20_000)
    monkeypatch.setattr(journal_file, "MAX_FREE_PAGES", 50)
    file = JournalFile(path)
    prompt = m.pack_tokens(range(2500))
    most = 0
    for number in range(1, 301):
        file.write(batch(accepted(number, token_ids=prompt), encoded(number, prompt)))
        for index in range(0, 200, 20):
            file.write(batch(generated(number, index, *range(20))))
            if file.needs_tidying:
                file.tidy()
        file.write(batch(ended(number, 200)))
        most = max(most, file._pragma("page_count") * 4096)
    assert most < 1.3 * (25 * len(prompt) + 2 * 20_000 + 50 * 4096)
    assert 20 <= len(file.read()) <= 26
    file.close()


def test_large_requests_are_kept_up_to_a_number_of_bytes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "MAX_ENDED_BYTES", 100_000)
    file = JournalFile(path)
    for number, tokens in ((1, 10_000), (2, 10_000), (3, 10_000), (4, 100_000)):
        file.write(batch(accepted(number, token_ids=m.pack_tokens(range(tokens))), ended(number, 0)))
        if file.needs_tidying:
            file.tidy()
        kept = [r.number for r in file.read()]
        assert kept == {1: [1], 2: [1, 2], 3: [2, 3], 4: [4]}[number]
    file.close()


def test_free_pages_are_given_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "MAX_ENDED_BYTES", 1)
    monkeypatch.setattr(journal_file, "MAX_FREE_PAGES", 16)
    monkeypatch.setattr(journal_file, "VACUUM_PAGES", 64)
    file = JournalFile(path)
    for number in (1, 2):
        file.write(batch(accepted(number, token_ids=m.pack_tokens(range(200_000))), ended(number, 0)))
    sizes = []
    while file.needs_tidying:
        file.tidy()
        sizes.append(file._pragma("page_count"))
    file.close()
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) > 2  # a little with each commit
    assert sizes[0] - sizes[-1] > 100
