"""The gManager with its sockets, tokenizer and clock: a scripted instance on one side, clients and strangers on the other.

The instance is no real one only because those have tests of their own; it grants whatever it is asked for and generates
what a test says, a byte of text per token.
"""

import asyncio
import math
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import msgpack
import msgspec
import pytest
import zmq
import zmq.asyncio
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from zmq.utils.monitor import recv_monitor_message

from gmanager import AsyncClient, Chunk, RequestFailed, RequestRefused, SamplingParams, ServiceUnreachable
from gmanager.config import GManagerConfig
from gmanager.server import Server
from gmanager.text.tokenizer import WORKER_CHARS, Tokenizer
from gmanager.wire import messages as m
from gmanager.wire.channel import Transport, ZmqTransport
from gmanager.wire.codec import MAX_FRAME_BYTES, Decoder, encode
from gmanager.wire.errors import AddressError, PeerGone
from gmanager.wire.memory import MemoryTransport
from tests.gmanager.cluster_support import HELLO, register
from tests.support.processes import address_of, children, processes

ANY = "tcp://127.0.0.1:*"
DEADLINE_S = 30.0
EOS = 0
BLOCKS = 2**20


def byte_level() -> Backend:
    """A token per byte, and <end>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({"<end>": EOS} | {char: i for i, char in enumerate(alphabet, 1)}, []))
    backend.add_special_tokens(["<end>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def assets(backend: Backend) -> m.TextAssets:
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}|{% endfor %}"
    return m.TextAssets(tokenizer_json=backend.to_str(), chat_template=template, special_tokens={}, eos_token_ids=[EOS])


BACKEND = byte_level()
ASSETS = assets(BACKEND)


def ids(text: str) -> list[int]:
    found: list[int] = BACKEND.encode(text).ids
    return found


# --- the three parties


class Instance:
    """A cell of one: forms it, grants, releases what is cancelled, and leaves the rest to the test."""

    def __init__(self, transport: Transport, address: str, text: m.TextAssets, cell: str) -> None:
        decoder: Decoder[m.ToInstance] = Decoder(m.ToInstance)
        self._dialer = transport.dial(address, decoder)
        self._text = text
        self._epoch = 0
        self._generated: dict[int, int] = {}
        self._outputs: list[m.SequenceOutput] = []
        self._tasks = [asyncio.create_task(self._obey()), asyncio.create_task(self._live())]
        self.admits: asyncio.Queue[m.Admit] = asyncio.Queue()
        self.cancels: asyncio.Queue[m.Cancel] = asyncio.Queue()
        self.pongs: asyncio.Queue[int] = asyncio.Queue()
        """How many of its outputs the gManager says it has."""
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.say(register(rank=0, cell_size=1, blocks=BLOCKS, cell=cell, vocab_size=300, max_context=100_000))

    def say(self, *messages: m.Message) -> None:
        for message in messages:
            self._dialer.send(message)

    def generate(
        self, seq: int, text: str | list[int], finish_reason: Literal["stop", "length"] | None = None, *, at_once: bool = True
    ) -> None:
        """One step's tokens; with a reason the last ones, and the sequence is released. Not at once: with the next ones."""
        tokens = ids(text) if isinstance(text, str) else text
        index = self._generated.get(seq, 0)
        self._generated[seq] = index + len(tokens)
        output = m.SequenceOutput(seq=seq, index=index, token_ids=tokens, finish_reason=finish_reason)
        self._outputs.append(output)
        if at_once:
            self.say(m.Outputs(epoch=self._epoch, outputs=self._outputs))
            self._outputs = []
        if finish_reason is not None:
            self._release(seq)

    async def admitted(self) -> m.Admit:
        async with asyncio.timeout(DEADLINE_S):
            return await self.admits.get()

    async def cancelled(self, seq: int) -> None:
        """Wait until the gManager wants this sequence released."""
        async with asyncio.timeout(DEADLINE_S):
            while (await self.cancels.get()).seq != seq:
                pass

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._dialer.close()

    def _release(self, seq: int) -> None:
        beat = m.Beat(epoch=self._epoch, free_blocks=BLOCKS, held_tokens={seq: 0}, counters=m.Counters())
        self.say(beat, m.Released(epoch=self._epoch, seq=seq, generated=self._generated.get(seq, 0)))

    async def _live(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self.say(m.Ping())

    async def _obey(self) -> None:
        while True:
            try:
                message = await self._dialer.recv()
            except PeerGone:
                return
            match message:
                case m.Registered():
                    self.say(m.Text(assets=self._text))
                case m.Pong(outputs=outputs):
                    self.pongs.put_nowait(outputs)
                case m.OpenStore(epoch=epoch):
                    self.say(m.StoreOpened(epoch=epoch, address="tcp://127.0.0.1:1"))
                case m.JoinEpoch(epoch=epoch):
                    self._epoch = epoch
                    self.say(m.Joined(epoch=epoch))
                case m.Reserve(epoch=epoch, seq=seq, blocks=blocks):
                    self.say(m.Granted(epoch=epoch, seq=seq, blocks=blocks, free_blocks=BLOCKS - blocks))
                case m.Admit() as admit:
                    self.admits.put_nowait(admit)
                case m.Cancel() as cancel:
                    self._release(cancel.seq)
                    self.cancels.put_nowait(cancel)
                case m.EndEpoch(reason=reason) | m.Refused(reason=reason):
                    self.ended.set_result(reason)


class Service:
    """A running gManager, and what tests connect to it."""

    def __init__(self, server: Server, transport: Transport) -> None:
        self.server = server
        self.transport = transport

    @asynccontextmanager
    async def instance(self, text: m.TextAssets = ASSETS, cell: str = "main") -> AsyncIterator[Instance]:
        instance = Instance(self.transport, self.server.address, text, cell)
        try:
            yield instance
        finally:
            await instance.close()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        async with AsyncClient(self.server.address, transport=self.transport) as client:
            yield client

    async def is_ready(self, cell: str) -> None:
        """Wait for a cell."""
        async with asyncio.timeout(DEADLINE_S), self.client() as client:
            while not any(stats.name == cell and stats.state == "ready" for stats in (await client.stats()).cells):
                await asyncio.sleep(0.005)

    async def has_dropped(self, number: int) -> None:
        """Wait until so many messages were dropped."""
        async with asyncio.timeout(DEADLINE_S):
            while self.server._cluster.stats().counters.dropped_messages != number:
                await asyncio.sleep(0.005)

    async def at_rest(self) -> None:
        """Wait until no request is live and nothing is held; then the books must agree."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.server.is_idle:
                await asyncio.sleep(0.005)
        self.server.validate()


@asynccontextmanager
async def serving(transport: Transport, **config: Any) -> AsyncIterator[Service]:
    server = Server(GManagerConfig(bind=ANY, **config), transport=transport)
    server.start()
    running = asyncio.create_task(server.run())
    try:
        async with asyncio.timeout(2 * DEADLINE_S):
            yield Service(server, transport)
    finally:
        server.stop()
        await running


@asynccontextmanager
async def a_cell(
    transport: Transport, text: m.TextAssets = ASSETS, **config: Any
) -> AsyncIterator[tuple[Service, Instance, AsyncClient]]:
    """A gManager, an instance and a client; all is at rest at the end, and no background task has failed."""
    async with serving(transport, **config) as service, service.instance(text) as instance, service.client() as client:
        yield service, instance, client
        await service.at_rest()


class Stranger:
    """A plain ZeroMQ socket, which says what it likes."""

    def __init__(self, dealer: zmq.asyncio.Socket) -> None:
        self.dealer = dealer
        self.monitor: Any = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    async def greet(self, submit: m.Submit | None = None) -> None:
        """Become a client."""
        await self.say(HELLO)
        await self.hear("Welcome")
        if submit is not None:
            await self.say(submit)

    async def say(self, *messages: m.Message) -> None:
        for message in messages:
            await self.dealer.send(encode(message))

    async def hear(self, kind: str) -> dict[str, Any]:
        """The next answer of a kind."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                frame = await self.dealer.recv()
                # an empty one is no answer: with it the other end looks whether this one is there
                answer: dict[str, Any] = msgpack.unpackb(frame, strict_map_key=False) if frame else {"type": None}
                if answer["type"] == kind:
                    return answer

    async def is_thrown_out(self) -> None:
        """Wait until the other end has closed the connection."""
        async with asyncio.timeout(DEADLINE_S):
            await recv_monitor_message(self.monitor)

    def close(self) -> None:
        """Vanish without a word."""
        if self.dealer.closed:
            return
        self.dealer.disable_monitor()
        self.monitor.close(linger=0)
        self.dealer.close(linger=0)


@asynccontextmanager
async def stranger(service: Service) -> AsyncIterator[Stranger]:
    context = zmq.asyncio.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.RECONNECT_IVL, -1)
    dealer.connect(service.server.address)
    speaker = Stranger(dealer)
    try:
        yield speaker
    finally:
        speaker.close()
        await asyncio.to_thread(context.term)


@pytest.fixture(params=["zmq", "memory"])
def transport(request: pytest.FixtureRequest) -> Transport:
    return ZmqTransport() if request.param == "zmq" else MemoryTransport()


@pytest.fixture(autouse=True)
def nothing_failed_unnoticed(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    assert not [record for record in caplog.records if record.exc_info or "background task failed" in record.message]


async def started(instance: Instance, client: AsyncClient, prompt: Any, **params: Any) -> tuple[m.Admit, "Stream"]:
    """A request that the instance has been told to run."""
    stream = Stream(client.generate(prompt, SamplingParams(**params)))
    return await instance.admitted(), stream


class Stream:
    """A request's chunks; it is begun at once, as an iterator is not."""

    def __init__(self, chunks: Any) -> None:
        self._chunks = chunks
        self._first: asyncio.Task[Chunk] | None = asyncio.create_task(anext(chunks))

    async def next(self) -> Chunk:
        async with asyncio.timeout(DEADLINE_S):
            first, self._first = self._first, None
            chunk: Chunk = await (anext(self._chunks) if first is None else first)
            return chunk

    async def rest(self) -> list[Chunk]:
        """All that are left, the last one included."""
        chunks = [await self.next()]
        while chunks[-1].finish_reason is None:
            chunks.append(await self.next())
        return chunks

    async def leave(self) -> None:
        await self._chunks.aclose()


def joined(chunks: list[Chunk]) -> tuple[str, list[int], str | None]:
    """Text, tokens and the reason why it ended; they must be without gaps."""
    tokens: list[int] = []
    for chunk in chunks:
        assert chunk.index == chunks[0].index + len(tokens)
        tokens += chunk.token_ids
    return "".join(chunk.text for chunk in chunks), tokens, chunks[-1].finish_reason


# --- clients that are cut off, or don't read


class Relay:
    """What lies between a client and its gManager, and can be cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []
        self._work: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def to(cls, address: str) -> AsyncIterator[tuple["Relay", str]]:
        relay = cls(int(address.rpartition(":")[2]))
        server = await asyncio.start_server(relay._join, "127.0.0.1", 0)
        try:
            yield relay, f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            relay.cut()
            await asyncio.gather(*relay._work, return_exceptions=True)

    def cut(self) -> None:
        """End all connections that there are."""
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, far_writer]
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._carry(source, sink))
            self._work.add(task)
            task.add_done_callback(self._work.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(2**16):
            sink.write(data)


async def test_a_connection_that_is_cut_three_times_in_mid_stream() -> None:
    """The gManager goes on; each token comes once, in order, and no half of a character is lost."""
    text = "déjà 東京 😀 vu " * 20
    steps = ids(text)
    transport = ZmqTransport()
    async with (
        a_cell(transport) as (service, instance, _),
        Relay.to(service.server.address) as (relay, address),
        AsyncClient(address, transport=transport) as client,
    ):
        admit, stream = await started(instance, client, "x", max_tokens=len(steps))
        chunks: list[Chunk] = []
        for number, token in enumerate(steps, 1):
            instance.generate(admit.seq, [token], "length" if number == len(steps) else None)
            if number % (len(steps) // 4) == 0:
                while sum(len(chunk.token_ids) for chunk in chunks) < number // 2:
                    chunks.append(await stream.next())
                relay.cut()
        chunks += await stream.rest()
        assert joined(chunks) == (text, steps, "length")


async def test_who_does_not_read_costs_little_and_slows_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for it is bounded, however much is generated; then it has everything, in order."""
    monkeypatch.setattr("gmanager.server.FULL_MESSAGES", 50)
    transport = MemoryTransport()
    async with a_cell(transport) as (service, instance, client):
        decoder: Decoder[m.ToClient] = Decoder(m.ToClient)
        idle = transport.dial(service.server.address, decoder)
        for message in (HELLO, m.Submit(request_id="unread", params=SamplingParams(max_tokens=1000), text="x")):
            idle.send(message)
        unread = await instance.admitted()
        admit, stream = await started(instance, client, "y", max_tokens=1000)
        chunks = []
        for number in range(1000):
            reason: Literal["length"] | None = "length" if number == 999 else None
            instance.generate(unread.seq, "a", reason)
            instance.generate(admit.seq, "b", reason)
            chunks.append(await stream.next())
            assert max(service.server._bound().backlog(peer)[0] for peer in service.server._full or [b""]) <= 52
        assert service.server._full
        assert joined(chunks) == ("b" * 1000, ids("b") * 1000, "length")
        heard: list[m.Output] = []
        async with asyncio.timeout(DEADLINE_S):
            while not (heard and heard[-1].finish_reason):
                message = await idle.recv()
                if isinstance(message, m.Output | m.OutputBatch):
                    heard += [message] if isinstance(message, m.Output) else message.outputs
        assert [token for output in heard for token in output.token_ids] == ids("a") * 1000
        assert "".join(output.text for output in heard) == "a" * 1000
        assert len(heard) < 100
        await idle.close()


# --- text


async def test_text_streams_as_it_is_generated(transport: Transport) -> None:
    async with a_cell(transport) as (_, instance, client):
        admit, stream = await started(instance, client, "hello é", max_tokens=9)
        assert m.unpack_tokens(admit.token_ids).tolist() == ids("hello é")
        assert (admit.params.max_tokens, admit.params.stop_token_ids) == (9, [EOS])
        instance.generate(admit.seq, "on")
        assert await stream.next() == Chunk(index=0, token_ids=ids("on"), text="on")
        first, second = ids("é")
        instance.generate(admit.seq, [first])
        assert await stream.next() == Chunk(index=2, token_ids=[first], text="")
        instance.generate(admit.seq, [second])
        assert await stream.next() == Chunk(index=3, token_ids=[second], text="é")
        instance.generate(admit.seq, [*ids("!"), EOS], "stop")
        assert await stream.next() == Chunk(index=4, token_ids=[*ids("!"), EOS], text="!", finish_reason="stop")


@pytest.mark.parametrize(
    ("steps", "last", "text", "counted"),
    [
        (["one E", "ND two"], None, "one ", "one END"),
        (["one END"], "length", "one ", "one END"),
        (["o", "n", "e", "EN", "EN", "D", "."], None, "oneEN", "oneENEND"),
        (["one", " EN"], "length", "one EN", "one EN"),  # it was held back for nothing
    ],
)
async def test_stop_strings(
    transport: Transport, steps: list[str], last: Literal["length"] | None, text: str, counted: str
) -> None:
    """The text ends before one, the tokens with it, and the instance is told to end."""
    stops = "END" in counted
    async with a_cell(transport) as (_, instance, client):
        admit, stream = await started(instance, client, "x", stop=["END", "never"], max_tokens=50)
        for number, step in enumerate(steps, 1):
            instance.generate(admit.seq, step, last if number == len(steps) else None)
        assert joined(await stream.rest()) == (text, ids(counted), "stop" if stops else "length")
        if last is None:
            await instance.cancelled(admit.seq)
        (stats,) = (await client.stats()).requests.values()
        assert (stats.finish_reason, stats.generated_tokens) == ("stop" if stops else "length", len(counted))


async def test_what_comes_behind_a_stop_string_in_the_same_message(transport: Transport) -> None:
    async with a_cell(transport) as (_, instance, client):
        admit, stream = await started(instance, client, "x", stop="END", max_tokens=50)
        instance.generate(admit.seq, "one END two", at_once=False)
        instance.generate(admit.seq, " three", "length")
        assert joined(await stream.rest()) == ("one ", ids("one END"), "stop")
        (stats,) = (await client.stats()).requests.values()
        assert (stats.finish_reason, stats.generated_tokens) == ("stop", len("one END"))


async def test_many_requests_at_once_keep_apart(transport: Transport) -> None:
    async with a_cell(transport) as (_, instance, client):
        runs = [await started(instance, client, f"{number}", max_tokens=50) for number in range(8)]
        for part in ("a", "bc", "d"):
            for admit, _ in reversed(runs):
                instance.generate(admit.seq, f"{part}{admit.seq}", "length" if part == "d" else None)
        for admit, stream in runs:
            text = "".join(f"{part}{admit.seq}" for part in ("a", "bc", "d"))
            assert joined(await stream.rest()) == (text, ids(text), "length")


@pytest.mark.parametrize("prompt", ["z", "z" * (WORKER_CHARS + 1)], ids=["short", "long"])
async def test_a_text_that_the_tokenizer_fails_at(prompt: str) -> None:
    """Vocabularies without a token for the unknown exist."""
    backend = Backend(models.WordLevel({"known": 1}))
    async with a_cell(MemoryTransport(), assets(backend)) as (_, instance, client):
        with pytest.raises(RequestRefused, match="the text can't be turned into tokens: Exception: WordLevel error"):
            await anext(client.generate(prompt))
        admit, stream = await started(instance, client, "known")
        instance.generate(admit.seq, [1], "length")
        assert joined(await stream.rest()) == ("known", [1], "length")


async def test_an_unexpected_fault_in_encoding_is_told_at_once(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was only logged, and its request waited for the rest of its time limit."""

    async def fail(self: Tokenizer, text: str) -> None:
        raise KeyError("merges")

    async with a_cell(transport) as (_, instance, client):
        with monkeypatch.context() as patch:
            patch.setattr(Tokenizer, "encode", fail)
            with pytest.raises(RequestRefused, match="the gManager failed to read the request: KeyError: 'merges'"):
                await anext(client.generate("some text"))
        admit, stream = await started(instance, client, "known")
        instance.generate(admit.seq, "ok", "length")
        assert joined(await stream.rest()) == ("ok", ids("ok"), "length")


async def test_an_unexpected_fault_in_loading_a_tokenizer_ends_the_cell(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Tokenizer, assets: m.TextAssets) -> None:
        raise KeyError("merges")

    monkeypatch.setattr(Tokenizer, "__init__", fail)
    async with serving(transport) as service, service.instance() as instance:
        reason = await asyncio.wait_for(instance.ended, DEADLINE_S)
        assert reason == "the tokenizer of cell 'main' can't be used: 'merges'"


async def test_a_tokenizer_that_can_not_be_read_ends_the_cell(transport: Transport) -> None:
    broken = msgspec.structs.replace(ASSETS, tokenizer_json="{")
    async with serving(transport) as service, service.client() as client:
        waits = Stream(client.generate("x"))
        async with service.instance(broken) as instance:
            reason = await asyncio.wait_for(instance.ended, DEADLINE_S)
            assert re.match("the tokenizer of cell 'main' can't be used: tokenizer.json can't be read", reason)
        async with service.instance() as instance:
            instance.generate((await instance.admitted()).seq, "ok", "length")
            assert joined(await waits.rest()) == ("ok", ids("ok"), "length")
        await service.at_rest()


# --- ends


async def test_leaving_a_request_ends_it_at_the_instance(transport: Transport) -> None:
    async with a_cell(transport) as (_, instance, client):
        admit, stream = await started(instance, client, "x")
        instance.generate(admit.seq, "a")
        await stream.next()
        await stream.leave()
        await instance.cancelled(admit.seq)


async def test_everybody_is_told_when_it_stops(transport: Transport) -> None:
    async with serving(transport) as service, service.instance() as instance, service.client() as client:
        admit, runs = await started(instance, client, "x")
        instance.generate(admit.seq, "a")
        await runs.next()
        service.server.stop()
        last = await runs.next()
        assert (last.finish_reason, last.error) == ("error", "gManager is shutting down")
        with pytest.raises(RequestFailed, match="gManager is shutting down"):
            await runs.next()
        assert await asyncio.wait_for(instance.ended, DEADLINE_S) == "gManager is shutting down"
        with pytest.raises(ServiceUnreachable):
            await client.stats()


async def test_an_instance_that_says_what_is_no_token_ends_only_its_cell(transport: Transport) -> None:
    async with serving(transport) as service, service.instance(cell="good") as good, service.client() as client:
        admit, bystander = await started(good, client, "x")
        async with service.instance(cell="mad") as mad:
            await service.is_ready("mad")
            wrong, stream = await started(mad, client, "x")  # it has most free memory
            mad.generate(wrong.seq, [-1])
            error = "instance 0 of cell 'mad' sent what can't be read: token ids must be in [0, 4294967296)"
            assert (await stream.next()).error == error
            assert "token ids must be in" in await asyncio.wait_for(mad.ended, DEADLINE_S)
        good.generate(admit.seq, "fine", "length")
        assert joined(await bystander.rest()) == ("fine", ids("fine"), "length")
        await service.at_rest()


# --- strangers


SUBMIT = m.Submit(request_id="theirs", params=SamplingParams(), token_ids=m.pack_tokens(ids("x")))


def frame(message: m.Message, **changes: Any) -> bytes:
    """A message with fields that it can't have."""
    packed: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)) | changes)
    return packed


def params(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(SamplingParams())
    return fields | changes


BAD: dict[str, tuple[list[bytes], str]] = {
    "garbage": ([b"\xc1\xff\xfe"], "can't read this: not msgpack"),
    "no frame": ([b""], "can't read this: empty frame"),
    "two frames": ([encode(HELLO), encode(HELLO)], "can't read this: a message of 2 frames instead of one"),
    "half a message": ([encode(HELLO)[:-1]], "can't read this: frame ends in the middle of an object"),
    "too deep": ([b"\x91" * 100_000 + b"\x90"], "can't read this: nested too deeply"),
    "too deep in maps": ([b"\x81\xa1x" * 100_000 + b"\x90"], "can't read this: nested too deeply"),
    "an ext type": ([msgpack.packb(msgpack.ExtType(1, b""))], "can't read this: ext type"),
    "unknown field": ([frame(HELLO, secret=1)], "can't read this: unknown field"),
    "unknown field inside": ([frame(SUBMIT, params=params(best_of=2))], "can't read this: unknown field at $.params"),
    "unknown message": ([msgpack.packb({"type": "Exec"})], "can't read this: invalid value at $.type"),
    "to an instance": ([encode(m.Cancel(epoch=1, seq=1))], "can't read this: invalid value at $.type"),
    "NaN": (
        [frame(SUBMIT, params=params(temperature=math.nan))],
        "can't read this: temperature must be a finite number >= 0, got nan - at `$.params`",
    ),
    "wrong protocol": ([encode(m.Hello(protocol=1))], "it speaks protocol 1, this gManager 4"),
    "an instance of another protocol": (
        [encode(msgspec.structs.replace(register(rank=0, cell_size=1), protocol=0))],
        "it speaks protocol 0, this gManager 4",
    ),
    "no greeting": ([encode(SUBMIT)], "the first message must be Hello or Register, not Submit"),
}


async def test_bad_messages_are_answered_and_disturb_nobody() -> None:
    """A request runs all the while, a token after each of them."""
    async with a_cell(ZmqTransport()) as (service, instance, client):
        admit, bystander = await started(instance, client, "x", max_tokens=99)
        dropped = 0
        for name, (frames, reason) in BAD.items():
            async with stranger(service) as speaker:
                await speaker.dealer.send_multipart(frames)
                assert (await speaker.hear("Refused"))["reason"] == reason, name
                await speaker.say(HELLO)
                dropped += reason.startswith("can't read this") + 1  # it is heard no more
                await service.has_dropped(dropped)
                instance.generate(admit.seq, ".")
                assert (await bystander.next()).text == ".", name
        instance.generate(admit.seq, "!", "length")
        assert (await bystander.next()).index == len(BAD)
        assert not instance.ended.done()


async def test_a_client_that_garbles_loses_its_requests() -> None:
    async with a_cell(ZmqTransport()) as (service, instance, _), stranger(service) as speaker:
        await speaker.greet(SUBMIT)
        admit = await instance.admitted()
        await speaker.dealer.send(b"\xc1")
        assert (await speaker.hear("Refused"))["reason"] == "can't read this: not msgpack"
        await instance.cancelled(admit.seq)


async def test_an_oversize_frame_ends_the_connection() -> None:
    """Before it is read. If it was a client's, its requests end with it."""
    async with a_cell(ZmqTransport(), client_lease_s=1000.0, resume_s=0) as (service, instance, client):
        admit, bystander = await started(instance, client, "x")
        async with stranger(service) as speaker:
            await speaker.greet(SUBMIT)
            theirs = await instance.admitted()
            await speaker.dealer.send(bytes(MAX_FRAME_BYTES + 1))
            await speaker.is_thrown_out()
            await instance.cancelled(theirs.seq)
        instance.generate(admit.seq, "!", "length")
        assert joined(await bystander.rest()) == ("!", ids("!"), "length")


@pytest.mark.parametrize("how", ["silent", "closed"])
async def test_a_client_that_vanishes_has_its_requests_aborted(how: str) -> None:
    """Nothing is generated that could show that it is gone: only its lease runs out."""
    async with serving(ZmqTransport(), client_lease_s=1.0, resume_s=0) as service, service.instance() as instance:
        async with stranger(service) as speaker:
            await speaker.greet(SUBMIT)
            admit = await instance.admitted()
            if how == "closed":
                speaker.close()
            await instance.cancelled(admit.seq)
        await service.at_rest()
        assert service.server._cluster.stats().requests["theirs"].finish_reason == "abort"


# --- the process


async def test_an_address_in_use(transport: Transport) -> None:
    async with serving(transport) as service:
        address = service.server.address
        with pytest.raises(AddressError, match=f"can't listen at {re.escape(address)}: the port is in use"):
            Server(GManagerConfig(bind=address), transport=transport).start()
        async with service.client() as client:
            assert (await client.stats()).cells == []


async def test_the_command_with_an_address_in_use(tmp_path: Path) -> None:
    async with serving(ZmqTransport()) as service, processes(tmp_path) as commands:
        address = service.server.address
        second = commands.gmanager(bind=address)
        assert await second.exit_code(DEADLINE_S) == 2
        assert second.text == f"gmanager: can't listen at {address}: the port is in use\n"


async def test_the_running_process_has_neither_torch_nor_triton_nor_transformers(tmp_path: Path) -> None:
    """`python -m gmanager` and its text worker, after texts and a chat: what is mapped, and all that was imported."""
    async with processes(tmp_path) as commands:
        # -X importtime writes the name of each module that is imported; multiprocessing hands it on to the worker.
        manager = commands.python("gmanager", "-X", "importtime", "-m", "gmanager", "--bind", ANY)
        address = await address_of(manager)
        async with AsyncClient(address) as client:
            instance = Instance(ZmqTransport(), address, ASSETS, "main")
            long = "z" * (WORKER_CHARS + 1)
            prompts: list[tuple[Any, str]] = [
                (client.generate("hi"), "hi"),
                (client.generate(long), long),
                (client.chat([m.ChatMessage(role="user", content="hi")]), "user: hi|"),
            ]
            for chunks, prompt in prompts:
                stream = Stream(chunks)
                admit = await instance.admitted()
                assert m.unpack_tokens(admit.token_ids).tolist() == ids(prompt)
                instance.generate(admit.seq, "ok", "length")
                assert joined(await stream.rest()) == ("ok", ids("ok"), "length")
            pids = [manager.pid, *children(manager.pid)]
            mapped = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]
            assert sum("tokenizers" in text for text in mapped) == 2, "the gManager and its worker"
            files = {line.rpartition("/")[2] for text in mapped for line in text.splitlines()}  # folders may be named anything
            assert not {name for name in files if "torch" in name or "triton" in name}
            manager.signal(signal.SIGTERM)
            assert await manager.exit_code() == 0
            await instance.close()
    imported = {name.partition(".")[0] for name in re.findall(r"^import time:.*\| +(\S+)$", manager.text, re.MULTILINE)}
    assert {"gmanager", "tokenizers", "jinja2", "uvloop"} <= imported
    assert not {"torch", "triton", "transformers"} & imported
