"""What goes into the journal, when clients hear of it, and how another gManager goes on from there.

The first part drives a cluster by events (blocks of 4 tokens, literal actions); the second a gManager, with a scripted
instance. What kill -9 leaves is a copy of the file and its write-ahead log.
"""

import asyncio
import logging
import re
import shutil
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gmanager import AsyncClient, RequestRefused, SamplingParams
from gmanager import journal as journal_module
from gmanager.cluster.events import (
    Accepted,
    Encoded,
    Entry,
    Finished,
    Generated,
    JournalChanged,
    Restored,
    StopFound,
    Write,
)
from gmanager.cluster.requests import NUMBERS_OF_A_TERM
from gmanager.config import GManagerConfig
from gmanager.journal import Journal
from gmanager.server import Server
from gmanager.wire import messages as m
from gmanager.wire.errors import Fenced
from gmanager.wire.memory import MemoryTransport
from tests.gmanager.cluster_support import (
    CLIENT,
    HELLO,
    SEED,
    Driver,
    deliver,
    outputs,
    peer,
    refused,
    running,
    serving,
    submit,
)
from tests.gmanager.test_journal import limit_pages, state_of
from tests.gmanager.test_server import ANY, DEADLINE_S, Instance, Service, Stream, ids, joined, started
from tests.support.processes import processes

FIRST = NUMBERS_OF_A_TERM + 1
"""The first number of the first gManager of a journal."""


def writing(*blocks: int) -> Driver:
    """A ready cell, a client and a journal. Its epochs are counted as everywhere in these tests, from 1."""
    driver = Driver(term=1)
    driver.cluster._membership._epoch = 0
    driver.ready_cell(*blocks)
    driver.say(CLIENT, HELLO)
    return driver


def written(driver: Driver, *messages: m.Message, who: bytes = CLIENT) -> list[Entry]:
    return [a.entry for a in driver.say(who, *messages) if isinstance(a, Write)]


# --- what is written


def test_a_request_from_its_first_entry_to_its_last() -> None:
    driver = writing(8)
    asked = submit("r", 8)
    actions = driver.say(CLIENT, asked)
    assert [a for a in actions if isinstance(a, Write)] == [
        Write(Accepted(number=FIRST, submit=asked, seed=SEED, spread="auto")),
        Write(Encoded(FIRST, 0.0, asked.token_ids or b"", highest=5)),
    ]
    driver.grant(actions)
    assert driver.say(peer(0), outputs(1, 0, [7, 8])) == [
        Write(Generated(number=FIRST, index=0, token_ids=[7, 8])),
        deliver(FIRST, "r", 0, [7, 8]),
    ]
    assert driver.say(peer(0), outputs(1, 2, [9], finish_reason="length")) == [
        Write(Generated(number=FIRST, index=2, token_ids=[9])),
        Write(Finished(number=FIRST, finish_reason="length", generated=3)),
        deliver(FIRST, "r", 2, [9], finish_reason="length"),
    ]


def test_what_its_client_asked_for_is_written_with_the_tokens() -> None:
    driver = writing(8)
    scores = [m.TokenLogprob(token_id=7, logprob=-0.5, rank=1)]
    running(driver, "r", logprobs=0)
    running(driver, "q")
    assert written(driver, outputs(1, 0, [7], logprobs=scores), who=peer(0)) == [
        Generated(number=FIRST, index=0, token_ids=[7], logprobs=scores)
    ]
    assert written(driver, outputs(2, 0, [7], logprobs=scores), who=peer(0)) == [
        Generated(number=FIRST + 1, index=0, token_ids=[7])
    ]


def test_a_stop_string_has_the_last_word() -> None:
    driver = writing(8)
    running(driver, "r", generated=3)
    stopped = driver.handle(StopFound(FIRST, 2, driver.now))
    assert stopped[0] == Write(Finished(number=FIRST, finish_reason="stop", generated=2))
    running(driver, "q", generated=1)
    driver.say(peer(0), outputs(2, 1, [9, 9], finish_reason="length"))
    assert driver.handle(StopFound(FIRST + 1, 2, driver.now)) == [
        Write(Finished(number=FIRST + 1, finish_reason="stop", generated=2))
    ]


def test_how_a_request_fails_is_written() -> None:
    driver = writing(8)
    end = written(driver, submit("r", 2000))[-1]
    assert isinstance(end, Finished)
    assert (end.number, end.finish_reason, end.generated, end.refusal) == (FIRST, "error", 0, "too_long")
    assert end.error is not None
    assert "2,000" in end.error
    running(driver, "q")
    lost = [a.entry for a in driver.lose(0) if isinstance(a, Write)]
    assert [(e.number, e.finish_reason, e.generated) for e in lost if isinstance(e, Finished)] == [(FIRST + 1, "error", 0)]


def test_without_a_journal_nothing_is_written() -> None:
    driver = serving(8)
    assert written(driver, submit("r", 8)) == []
    assert [request.number for request in driver.cluster._requests.live()] == [1]


def restored(number: int, asked: m.Submit, *token_ids: int) -> Restored:
    known = Encoded(number, 0.0, token_ids=asked.token_ids or b"", highest=5)
    return Restored(number=number, submit=asked, seed=SEED, spread="auto", encoded=known, token_ids=token_ids)


def test_what_is_restored_is_not_written_again_and_later_numbers_are_later() -> None:
    driver = Driver(term=3)
    asked = submit("r", 8)
    driver.cluster.restore([restored(NUMBERS_OF_A_TERM + 5, asked)], 0.0)
    driver.cluster._membership._epoch = 0
    assert not [action for action in driver.ready_cell(8) if isinstance(action, Write)]
    assert written(driver, HELLO) == []
    entry, _ = written(driver, submit("new", 8))
    assert isinstance(entry, Accepted)
    assert entry.number == 3 * NUMBERS_OF_A_TERM + 1


def test_while_the_journal_cant_be_written_nothing_new_is_taken() -> None:
    driver = writing(8)
    running(driver, "r", generated=1)
    assert driver.handle(JournalChanged("database or disk is full", driver.now)) == []
    why = "no new requests are taken: the journal can't be written (database or disk is full)"
    assert driver.say(CLIENT, submit("new")) == refused("new", why, refusal="not_ready")
    assert driver.say(peer(0), outputs(1, 1, [6]))[-1] == deliver(FIRST, "r", 1, [6])
    # one that was taken in is no new one
    assert driver.say(CLIENT, submit("r"))[-1] == deliver(FIRST, "r", 0, [9, 6], before=[])
    assert driver.handle(JournalChanged(None, driver.now)) == []
    assert written(driver, submit("new"))


# --- a gManager with a journal


@asynccontextmanager
async def journalled(path: Path, transport: MemoryTransport, **config: Any) -> AsyncIterator[Service]:
    server = Server(GManagerConfig(bind=ANY, **config), transport=transport, journal=Journal.open(path))
    server.start()
    running_ = asyncio.create_task(server.run())
    try:
        async with asyncio.timeout(2 * DEADLINE_S):
            yield Service(server, transport)
    finally:
        server.stop()
        await running_


@pytest.fixture
def transport() -> MemoryTransport:
    return MemoryTransport()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def what_kill_leaves(path: Path) -> Path:
    copy = path.with_name("copy")
    for suffix in ("", "-wal"):
        shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
    return copy


@pytest.fixture
def blocked(path: Path) -> Any:
    """Lets nobody commit."""

    class Blocked:
        def __enter__(self) -> None:
            self.db = sqlite3.connect(path, isolation_level=None)
            self.db.execute("BEGIN IMMEDIATE")

        def __exit__(self, *_: object) -> None:
            self.db.close()

    return Blocked()


async def test_a_client_hears_only_what_is_written(path: Path, transport: MemoryTransport, blocked: Any) -> None:
    async with journalled(path, transport) as service, service.instance() as instance, service.client() as client:
        admit, stream = await started(instance, client, "hello", max_tokens=9)
        instance.generate(admit.seq, "ab")
        assert (await stream.next()).text == "ab"
        with blocked:
            instance.generate(admit.seq, "cd")
            later = asyncio.create_task(stream.next())
            await asyncio.sleep(0.3)
            assert not later.done()
            # what comes after what is held comes after it
            stats = asyncio.create_task(client.stats())
            await asyncio.sleep(0.1)
            assert not stats.done()
        assert (await later).text == "cd"
        await stats
        instance.generate(admit.seq, "e", "length")
        assert (await stream.rest())[-1].finish_reason == "length"
        await service.at_rest()
    (kept,) = state_of(path)
    assert kept["tokens"] == ids("abcde")
    assert kept["ended"] == Finished(number=FIRST, finish_reason="length", generated=5)


async def test_instances_are_answered_while_the_disk_hangs(path: Path, transport: MemoryTransport, blocked: Any) -> None:
    """What is not written they keep; that the gManager lives they hear all the same."""
    async with journalled(path, transport) as service, service.instance() as instance, service.client() as client:
        admit, stream = await started(instance, client, "hello", max_tokens=9)
        instance.generate(admit.seq, "a")
        assert (await stream.next()).text == "a"
        assert await _said(instance, 1)
        with blocked:
            instance.generate(admit.seq, "b")
            for _ in range(3):
                instance.say(m.Ping())
            assert not await _said(instance, 2, pongs=3)
        assert (await stream.next()).text == "b"
        instance.say(m.Ping())
        assert await _said(instance, 2)
        instance.generate(admit.seq, "c", "length")
        await stream.rest()


async def _said(instance: Instance, outputs: int, pongs: int = 10) -> bool:
    """Whether one of so many answers says that so many outputs are written."""
    async with asyncio.timeout(DEADLINE_S):
        return outputs in [await instance.pongs.get() for _ in range(pongs)]


async def test_a_stop_string_that_began_before_the_kill_is_found_though_nobody_listens(
    path: Path, transport: MemoryTransport
) -> None:
    async with journalled(path, transport) as service, service.instance() as instance, service.client() as client:
        admit, stream = await started(instance, client, "hello", max_tokens=20, stop="yes")
        instance.generate(admit.seq, "aye")
        assert (await stream.next()).text == "a"
        (name,) = (await client.stats()).requests
        copy = what_kill_leaves(path)
        await stream.leave()
    async with journalled(copy, transport) as service, service.client() as client, service.instance() as instance:
        admit = await instance.admitted()
        instance.generate(admit.seq, "sir")
        await instance.cancelled(admit.seq)
        assert joined(await Stream(client.attach(name, 0)).rest()) == ("a", ids("ayes"), "stop")


async def test_another_gmanager_goes_on_where_one_was_killed(path: Path, transport: MemoryTransport) -> None:
    """Half a character is held back at the cut; one request is running, one has ended, one waits."""
    params = SamplingParams(max_tokens=20, stop="!")
    async with journalled(path, transport) as service, service.instance() as instance, service.client() as client:
        admit, stream = await started(instance, client, "hello", max_tokens=20, stop="!")
        one = admit.arrival
        instance.generate(admit.seq, ids("aé")[:-1])
        first = await stream.next()
        admit, other = await started(instance, client, "other", max_tokens=2)
        instance.generate(admit.seq, "xy", "length")
        assert joined(await other.rest()) == ("xy", ids("xy"), "length")
        running_id, ended_id = list((await client.stats()).requests)[::-1]
        copy = what_kill_leaves(path)
        await stream.leave()
    async with journalled(copy, transport) as service, service.client() as client:
        again = Stream(client.attach(running_id, len(first.token_ids)))
        before = Stream(client.attach(ended_id, 1))
        async with service.instance() as instance:
            admit = await instance.admitted()
            assert (admit.arrival, m.unpack_tokens(admit.token_ids).tolist()) == (one, ids("hello") + ids("aé")[:-1])
            assert joined(await before.rest()) == ("y", ids("y"), "length")
            instance.generate(admit.seq, ids("aé")[-1:] + ids("b!c"))
            rest = await again.rest()
            assert first.text + "".join(chunk.text for chunk in rest) == "aéb"
            assert first.token_ids + [t for chunk in rest for t in chunk.token_ids] == ids("aéb!")
            # its id and its content are still its own
            same = Stream(client.generate("hello", params, request_id=running_id))
            assert joined(await same.rest())[0] == "aéb"
            await service.at_rest()
    assert [(r["tokens"], r["ended"].finish_reason) for r in state_of(copy)] == [(ids("aéb!"), "stop"), (ids("xy"), "length")]


async def test_a_full_disk_stops_what_is_new_and_not_what_runs(
    path: Path, transport: MemoryTransport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.05)
    caplog.set_level(logging.INFO)
    async with journalled(path, transport) as service, service.instance() as instance, service.client() as client:
        journal = service.server._journal
        assert journal is not None
        admit, stream = await started(instance, client, "hello", max_tokens=9, min_tokens=2)
        instance.generate(admit.seq, "a")
        assert (await stream.next()).text == "a"
        limit_pages(journal, 1)
        large, another = await started(instance, client, "x" * 20_000, max_tokens=9)
        instance.generate(admit.seq, "b")  # it is delivered although it can't be written
        assert (await stream.next()).text == "b"
        why = r"no new requests are taken: the journal can't be written \(database or disk is full\)"
        with pytest.raises(RequestRefused, match=why) as refusal:
            await anext(client.generate("new", SamplingParams()))
        assert refusal.value.reason == "not_ready"
        instance.generate(admit.seq, "c", "length")
        assert (await stream.next()).finish_reason == "length"
        await asyncio.sleep(0.3)
        assert [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR and "journal" in r.getMessage()] != []
        limit_pages(journal, 10**6)
        async with asyncio.timeout(DEADLINE_S):
            while service.server._journal_failure is not None:
                await asyncio.sleep(0.01)
        admit, stream = await started(instance, client, "new", max_tokens=9)
        instance.generate(admit.seq, "d", "length")
        await stream.rest()
        instance.generate(large.seq, "e", "length")
        await another.rest()
        await service.at_rest()
    assert [(r["tokens"], r["ended"].finish_reason) for r in state_of(path)] == [
        (ids("abc"), "length"),
        (ids("e"), "length"),
        (ids("d"), "length"),
    ]


async def test_a_disk_that_hangs_does_not_stop_what_runs(
    path: Path, transport: MemoryTransport, blocked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "STALL_S", 0.2)
    async with journalled(path, transport) as service, service.instance() as instance, service.client() as client:
        admit, stream = await started(instance, client, "hello", max_tokens=9)
        with blocked:
            instance.generate(admit.seq, "ab")
            assert (await stream.next()).text == "ab"
            with pytest.raises(RequestRefused, match="a commit has not ended for"):
                await anext(client.generate("new", SamplingParams()))
        instance.generate(admit.seq, "c", "length")
        assert (await stream.rest())[-1].finish_reason == "length"
        await service.at_rest()
    assert state_of(path)[0]["tokens"] == ids("abc")


async def test_a_gmanager_whose_journal_was_taken_over_says_no_more(path: Path, transport: MemoryTransport) -> None:
    server = Server(GManagerConfig(bind=ANY), transport=transport, journal=Journal.open(path))
    server.start()
    running_ = asyncio.create_task(server.run())
    service = Service(server, transport)
    async with service.instance() as instance, service.client() as client:
        admit, stream = await started(instance, client, "hello", max_tokens=9)
        instance.generate(admit.seq, "a")
        await stream.next()
        db = sqlite3.connect(path, isolation_level=None)
        db.execute("UPDATE meta SET term = 2")
        db.close()
        instance.generate(admit.seq, "b")
        with pytest.raises(Fenced, match=r"was taken over by another gManager \(term 2; this one has 1\)"):
            await running_
        assert not instance.ended.done()
        leaving = asyncio.create_task(stream.next())
        await asyncio.sleep(0.05)
        assert not leaving.done()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)


async def test_a_second_gmanager_on_the_same_journal_ends_at_once(tmp_path: Path) -> None:
    async with processes(tmp_path) as ours:
        first = ours.gmanager("--journal", "the.journal")
        await first.says("listens at")
        second = ours.gmanager("--journal", "the.journal")
        assert await second.exit_code() == 2
        assert f"journal the.journal is in use by another gManager (process {first.pid})" in second.text
        missing = ours.gmanager("--journal", "no/such/folder/journal")
        assert await missing.exit_code() == 2
        assert "there is no directory no/such/folder" in missing.text


async def test_a_gmanager_that_starts_on_a_full_disk_ends_at_once(tmp_path: Path) -> None:
    """With a new journal and with one that there is, which is left as it was."""
    code = (
        "import resource, sys\n"
        "from gmanager.__main__ import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    async with processes(tmp_path) as ours:
        for term in (1, 2):
            full = ours.python("gmanager", "-c", code, "--bind", ANY, "--journal", "the.journal")
            assert await full.exit_code(30) == 2
            assert re.fullmatch(r"gmanager: journal the.journal can't be used: .*disk.*\n", full.text)
            later = ours.gmanager("--journal", "the.journal")
            await later.says(f"journal read.* term={term} ")
            await later.says("listens at")
            later.signal(signal.SIGTERM)
            assert await later.exit_code() == 0


async def test_how_long_steps_take_is_known_to_the_next_gmanager(path: Path, transport: MemoryTransport) -> None:
    sample = m.StepSample(lane=1, rows=2, attended=50, sent=0, served=0, us=7000, beside=False)
    beat = m.Beat(epoch=1_000_001, free_blocks=0, held_tokens={}, counters=m.Counters(), samples=[sample] * 8)

    async def decode_of(client: AsyncClient) -> m.LanePerformance:
        performance = (await client.stats()).cells[0].performance
        assert performance is not None
        return performance.decode

    async with journalled(path, transport) as service, service.instance() as instance, service.client() as client:
        await service.is_ready("main")
        guessed = await decode_of(client)
        instance.say(beat)
        while (fitted := await decode_of(client)).step_us == guessed.step_us:  # with the next tick
            await asyncio.sleep(0.02)
    async with journalled(path, transport) as service, service.instance(), service.client() as client:
        await service.is_ready("main")
        known = await decode_of(client)
    assert (fitted.samples, known.samples) == (8, 0)
    assert known.step_us == fitted.step_us < guessed.step_us
