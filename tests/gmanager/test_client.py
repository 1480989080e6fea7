"""AsyncClient against a gManager that does what each test scripts, over ZeroMQ and in memory."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import gmanager
from gmanager import (
    AsyncClient,
    CallFailed,
    ChatMessage,
    Chunk,
    FrameTooLarge,
    ProtocolRefused,
    RequestFailed,
    RequestRefused,
    SamplingParams,
    ServiceUnreachable,
    Stats,
)
from gmanager.observed import Observed
from gmanager.wire import messages as m
from gmanager.wire.channel import Listener, Transport, ZmqTransport
from gmanager.wire.codec import Decoder
from gmanager.wire.errors import AddressError, PeerGone
from gmanager.wire.memory import MemoryTransport

pytestmark = pytest.mark.asyncio

EMPTY_STATS = Stats(
    epoch=3, cells=[], instances=[], requests={}, counters=m.Counters(steps=7), observed=Observed().observations()
)
Answer = Callable[["Server", bytes, Any], None]


class Server:
    """Greets, answers pings, records what it hears, and leaves the rest to the test."""

    def __init__(self, listener: Listener[Any], lease_s: float, answer: Answer) -> None:
        self.listener = listener
        self.lease_s = lease_s
        self.answer = answer
        self.heard: list[Any] = []
        self.silent = False

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]

    async def run(self) -> None:
        while True:
            try:
                peer, message = await self.listener.recv()
            except PeerGone:
                return
            self.heard.append(message)
            if self.silent:
                continue
            if isinstance(message, m.Hello):
                self.listener.send(peer, m.Welcome(lease_s=self.lease_s))
            elif isinstance(message, m.Ping):
                self.listener.send(peer, m.Pong())
            else:
                self.answer(self, peer, message)

    async def until_heard(self, kind: type, number: int = 1) -> list[Any]:
        async with asyncio.timeout(5):
            while len(self.of(kind)) < number:
                await asyncio.sleep(0.005)
        return self.of(kind)


@pytest.fixture(params=["zmq", "memory"])
def transport(request: pytest.FixtureRequest) -> Transport:
    return ZmqTransport() if request.param == "zmq" else MemoryTransport()


@asynccontextmanager
async def serving(transport: Transport, answer: Answer, *, lease_s: float = 5.0) -> AsyncIterator[Server]:
    decoder: Decoder[m.FromClient] = Decoder(m.FromClient)
    server = Server(transport.listen("tcp://127.0.0.1:*", decoder), lease_s, answer)
    task = asyncio.create_task(server.run())
    try:
        async with asyncio.timeout(20):
            yield server
    finally:
        await server.listener.close()
        await task


@asynccontextmanager
async def connected(
    transport: Transport, answer: Answer, *, lease_s: float = 5.0, resume_s: float = 0
) -> AsyncIterator[tuple[Server, AsyncClient]]:
    async with (
        serving(transport, answer, lease_s=lease_s) as server,
        AsyncClient(server.listener.address, transport=transport, resume_s=resume_s) as client,
    ):
        yield server, client


def tokens(request_id: str, index: int, number: int = 1, **more: Any) -> m.Output:
    ids = list(range(index, index + number))
    return m.Output(request_id=request_id, index=index, token_ids=ids, text="".join(f"{i} " for i in ids), **more)


def complete(server: Server, peer: bytes, message: Any) -> None:
    """Answers every request with max_tokens tokens, one by one, and every call."""
    if isinstance(message, m.Submit):
        last = message.params.max_tokens - 1
        for index in range(last + 1):
            reason: Any = "length" if index == last else None
            server.listener.send(peer, tokens(message.request_id, index, finish_reason=reason))
    elif isinstance(message, m.GetStats):
        server.listener.send(peer, m.StatsReply(call=message.call, stats=EMPTY_STATS))
    elif isinstance(message, m.Abort | m.MoveHome):
        server.listener.send(peer, m.Done(call=message.call))


def start_only(server: Server, peer: bytes, message: Any) -> None:
    """Sends one token of each request and no more; an abort ends the request."""
    if isinstance(message, m.Submit):
        server.listener.send(peer, tokens(message.request_id, 0))
    elif isinstance(message, m.Abort):
        last = m.Output(request_id=message.request_id, index=1, token_ids=[], text="", finish_reason="abort")
        server.listener.send(peer, last)
        server.listener.send(peer, m.Done(call=message.call))
    elif isinstance(message, m.GetStats):
        server.listener.send(peer, m.StatsReply(call=message.call, stats=EMPTY_STATS))


def ignore(server: Server, peer: bytes, message: Any) -> None:
    pass


async def test_generate(transport: Transport) -> None:
    async with connected(transport, complete) as (server, client):
        params = SamplingParams(max_tokens=3, temperature=0, stop=["x"], logprobs=2)
        chunks = [chunk async for chunk in client.generate("hello", params, request_id="a", spread="all", priority=-2)]
        assert chunks == [
            Chunk(index=0, token_ids=[0], text="0 "),
            Chunk(index=1, token_ids=[1], text="1 "),
            Chunk(index=2, token_ids=[2], text="2 ", finish_reason="length"),
        ]
        (submit,) = server.of(m.Submit)
        assert submit == m.Submit(request_id="a", params=params, text="hello", spread="all", priority=-2)
        assert server.of(m.Hello) == [m.Hello(protocol=m.PROTOCOL)]


async def test_prompts_of_each_kind(transport: Transport) -> None:
    async with connected(transport, complete) as (server, client):
        one = SamplingParams(max_tokens=1)
        ids = [0, 1, 2**32 - 1]
        turns: list[ChatMessage | dict[str, str]] = [
            ChatMessage(role="user", content="hi"),
            {"role": "assistant", "content": "ho"},
        ]
        for stream in (client.generate(ids, one, spread=2), client.chat(turns, one, request_id="c")):
            assert [chunk.finish_reason async for chunk in stream] == ["length"]
        by_ids, by_chat = server.of(m.Submit)
        assert list(m.unpack_tokens(by_ids.token_ids)) == ids
        assert by_ids.spread == 2
        assert len(by_ids.request_id) == 32
        assert [(turn.role, turn.content) for turn in by_chat.messages] == [("user", "hi"), ("assistant", "ho")]


async def test_many_requests_and_calls_at_once(transport: Transport) -> None:
    async with connected(transport, complete) as (_, client):

        async def one(number: int) -> str:
            params = SamplingParams(max_tokens=number)
            return "".join([chunk.text async for chunk in client.generate("x", params)])

        texts, stats = await asyncio.gather(
            asyncio.gather(*(one(n) for n in range(1, 51))), asyncio.gather(*(client.stats() for _ in range(50)))
        )
        assert texts == ["".join(f"{i} " for i in range(n)) for n in range(1, 51)]
        assert stats == [EMPTY_STATS] * 50


@pytest.mark.parametrize("way", ["break", "aclose", "cancel", "gone"])
async def test_leaving_early_aborts(transport: Transport, way: str) -> None:
    async with connected(transport, start_only) as (server, client):
        stream = client.generate("x", request_id="r")
        if way == "break":
            del stream
            async for _ in client.generate("x", request_id="r"):
                break
        elif way == "aclose":
            await anext(stream)
            await stream.aclose()
        elif way == "gone":
            await anext(stream)
            del stream
        else:

            async def consume() -> None:
                async for _ in stream:
                    pass

            task = asyncio.create_task(consume())
            await server.until_heard(m.Submit)
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        (abort,) = await server.until_heard(m.Abort)
        assert abort.request_id == "r"
        # The id is free again once the gManager has ended the request: what it says then comes before this answer.
        await client.stats()
        again = client.generate("x", request_id="r")
        assert (await anext(again)).index == 0
        await again.aclose()


async def test_late_outputs_of_a_left_request_reach_nobody(transport: Transport) -> None:
    aborts = []

    def answer(server: Server, peer: bytes, message: Any) -> None:
        if isinstance(message, m.Submit):
            server.listener.send(peer, tokens("r", 0))
        elif isinstance(message, m.Abort):
            aborts.append((peer, message))
            server.listener.send(peer, tokens("r", 1))
        elif isinstance(message, m.GetStats):
            server.listener.send(peer, m.StatsReply(call=message.call, stats=EMPTY_STATS))

    async with connected(transport, answer) as (server, client):
        stream = client.generate("x", request_id="r")
        await anext(stream)
        await stream.aclose()
        await server.until_heard(m.Abort)
        with pytest.raises(RequestRefused, match="'r' is in use"):
            await anext(client.generate("x", request_id="r"))
        # A gManager that doesn't know the request any more frees the id as well.
        (peer, abort) = aborts[0]
        server.listener.send(peer, m.CallFailed(call=abort.call, reason="unknown"))
        await client.stats()  # its answer comes later
        assert (await anext(client.generate("x", request_id="r"))).index == 0


async def test_an_iterator_never_started_sends_nothing(transport: Transport) -> None:
    async with connected(transport, complete) as (server, client):
        await client.generate("x").aclose()
        await client.stats()
        assert not server.of(m.Submit)
        assert not server.of(m.Abort)


async def test_abort_move_home_and_failing_calls(transport: Transport) -> None:
    def answer(server: Server, peer: bytes, message: Any) -> None:
        if isinstance(message, m.MoveHome):
            server.listener.send(peer, m.CallFailed(call=message.call, reason="instance 1 has no room"))
        else:
            start_only(server, peer, message)

    async with connected(transport, answer) as (server, client):
        stream = client.generate("x", request_id="r")
        await anext(stream)
        with pytest.raises(CallFailed, match="instance 1 has no room"):
            await client.move_home("r", 1)
        assert server.of(m.MoveHome)[0].instance == 1
        await client.abort("r")
        assert [chunk.finish_reason async for chunk in stream] == ["abort"]


async def test_refused_and_failed_requests(transport: Transport) -> None:
    def answer(server: Server, peer: bytes, message: Any) -> None:
        empty: Any = {"token_ids": [], "text": "", "finish_reason": "error"}
        if message.request_id == "wrong":
            out = m.Output(request_id="wrong", index=0, error="the prompt is empty", refusal="invalid", **empty)
            server.listener.send(peer, out)
        else:
            server.listener.send(peer, tokens("fails", 0, 2))
            server.listener.send(peer, m.Output(request_id="fails", index=2, error="instance 1 died", **empty))

    async with connected(transport, answer) as (server, client):
        with pytest.raises(RequestRefused, match="the prompt is empty"):
            await anext(client.generate("", request_id="wrong"))
        chunks = []
        with pytest.raises(RequestFailed, match="instance 1 died"):
            async for chunk in client.generate("x", request_id="fails"):
                chunks.append(chunk)  # noqa: PERF401 - a comprehension would lose them when it raises
        assert [chunk.finish_reason for chunk in chunks] == [None, "error"]
        assert chunks[-1].error == "instance 1 died"
        assert not server.of(m.Abort)


async def test_duplicate_id_of_the_same_client(transport: Transport) -> None:
    async with connected(transport, start_only) as (server, client):
        first = client.generate("x", request_id="r")
        await anext(first)
        with pytest.raises(RequestRefused, match="'r' is in use"):
            await anext(client.generate("x", request_id="r"))
        assert len(server.of(m.Submit)) == 1
        await first.aclose()


@pytest.mark.parametrize(
    ("error", "words", "prompt", "more"),
    [
        (TypeError, "got bytes", b"x", {}),
        (TypeError, "got tuple", (1, 2), {}),
        (TypeError, r"prompt\[1\] is of type bool", [1, True], {}),
        (TypeError, r"prompt\[2\] is of type float", [1, 2, 3.0], {}),
        (ValueError, r"prompt\[1\] is -1", [1, -1], {}),
        (ValueError, r"prompt\[0\] is 4294967296", [2**32], {}),
        (ValueError, "Expected `str", "x", {"request_id": b"r"}),
        (ValueError, "1 to 256", "x", {"request_id": ""}),
        (ValueError, "spread", "x", {"spread": 0}),
        (ValueError, "spread", "x", {"spread": "some"}),
        (ValueError, "priority", "x", {"priority": 2**31}),
        (ValueError, "priority", "x", {"priority": 0.5}),
        (ValueError, "max_tokens", "x", {"params": SamplingParams(max_tokens=1.5)}),  # type: ignore[arg-type]
        (ValueError, "params", "x", {"params": None}),
    ],
)
async def test_wrong_arguments_raise_at_once(error: type[Exception], words: str, prompt: Any, more: Any) -> None:
    client = AsyncClient("tcp://127.0.0.1:1")
    with pytest.raises(error, match=words):
        client.generate(prompt, **more)


async def test_wrong_messages_raise_at_once() -> None:
    client = AsyncClient("tcp://127.0.0.1:1")
    for messages in ([{"role": "user"}], [{"role": "user", "content": "x", "name": "y"}], [1]):
        with pytest.raises(ValueError, match="Object|Expected"):
            client.chat(messages)  # type: ignore[arg-type]


async def test_what_cannot_be_sent_is_told_with_its_size(transport: Transport) -> None:
    async with connected(transport, complete) as (server, client):
        with pytest.raises(FrameTooLarge, match=r"Submit takes 70,000,\d\d\d bytes on the wire; a message may take 67,108,864"):
            await anext(client.generate("x" * 70_000_000))
        with pytest.raises(ValueError, match="surrogate"):
            await anext(client.generate("\ud800", request_id="r"))
        # Neither was sent, and neither keeps its id.
        assert len([c async for c in client.generate("x", SamplingParams(max_tokens=1), request_id="r")]) == 1
        assert len(server.of(m.Submit)) == 1


async def test_nobody_answers(transport: Transport) -> None:
    with pytest.raises(ServiceUnreachable, match=r"nobody answers at tcp://127.0.0.1:9 within 0.2 s"):
        async with AsyncClient("tcp://127.0.0.1:9", connect_timeout_s=0.2, transport=transport):
            pass


async def test_malformed_address() -> None:
    with pytest.raises(AddressError, match="localhost"):
        async with AsyncClient("localhost"):
            pass


async def test_refused_at_the_door(transport: Transport) -> None:
    listener = transport.listen("tcp://127.0.0.1:*", Decoder[m.FromClient](m.FromClient))

    async def refuse() -> None:
        peer, _ = await listener.recv()
        listener.send(peer, m.Refused(reason="protocol 1 is not spoken here"))

    task = asyncio.create_task(refuse())
    with pytest.raises(ProtocolRefused, match="protocol 1 is not spoken here"):
        async with AsyncClient(listener.address, transport=transport):
            pass
    await task
    await listener.close()


async def test_silence_fails_everything(transport: Transport) -> None:
    async with connected(transport, start_only, lease_s=0.3) as (server, client):
        stream = client.generate("x")
        await anext(stream)
        # Pings keep the connection up for longer than the lease.
        await server.until_heard(m.Ping, 7)
        server.silent = True
        stats = asyncio.create_task(client.stats())
        loop = asyncio.get_running_loop()
        start = loop.time()
        with pytest.raises(ServiceUnreachable, match="has not been heard for 0.3 s"):
            await anext(stream)
        assert 0.15 < loop.time() - start < 2
        with pytest.raises(ServiceUnreachable):
            await stats
        with pytest.raises(ServiceUnreachable):
            await client.stats()
        with pytest.raises(ServiceUnreachable):
            await anext(client.generate("x"))


async def test_gmanager_that_leaves_fails_everything_at_once(transport: Transport) -> None:
    async with connected(transport, start_only) as (server, client):
        stream = client.generate("x")
        await anext(stream)
        await server.listener.close()
        with pytest.raises(ServiceUnreachable, match="the gManager left"):
            await anext(stream)


async def test_refused_or_garbled_later(transport: Transport) -> None:
    def refuse(server: Server, peer: bytes, message: Any) -> None:
        server.listener.send(peer, m.Refused(reason="you were silent for too long"))

    def garble(server: Server, peer: bytes, message: Any) -> None:
        server.listener.send(peer, m.Ping())

    for answer, words in ((refuse, "silent for too long"), (garble, "can't read")):
        async with connected(transport, answer) as (_, client):
            with pytest.raises(ProtocolRefused, match=words):
                await anext(client.generate("x"))


async def test_closing_aborts_what_runs(transport: Transport) -> None:
    async with serving(transport, start_only) as server:
        async with AsyncClient(server.listener.address, transport=transport) as client:
            stream = client.generate("x", request_id="r")
            await anext(stream)
        assert [abort.request_id for abort in await server.until_heard(m.Abort)] == ["r"]
        with pytest.raises(ServiceUnreachable, match="the client was closed"):
            await anext(stream)
        with pytest.raises(ServiceUnreachable, match="the client was closed"):
            await client.stats()
        with pytest.raises(RuntimeError, match="entered once"):
            await client.__aenter__()


async def test_use_before_entering() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await AsyncClient("tcp://127.0.0.1:1").stats()
    with pytest.raises(RuntimeError, match="async with"):
        await anext(AsyncClient("tcp://127.0.0.1:1").generate("x"))


async def test_cancelled_call_leaves_no_trace(transport: Transport) -> None:
    async with connected(transport, ignore) as (server, client):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.stats(), 0.05)
        server.answer = complete
        assert await client.stats() == EMPTY_STATS
        assert not client._calls


async def test_import_is_light() -> None:
    code = (
        "import sys, gmanager; heavy = {'torch', 'transformers', 'numpy', 'tokenizers', 'jinja2'};"
        "print(sorted({name.split('.')[0] for name in sys.modules} & heavy))"
    )
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    out, _ = await child.communicate()
    assert (child.returncode, out.strip()) == (0, b"[]")


async def test_public_names() -> None:
    assert all(hasattr(gmanager, name) for name in gmanager.__all__)
    assert {"AsyncClient", "SamplingParams", "Chunk", "ChatMessage", "Stats"} <= set(gmanager.__all__)


# --- connections that are lost, and made anew


@asynccontextmanager
async def lost_and_found(
    transport: Transport, first: Answer, second: Answer, *, resume_s: float = 10
) -> AsyncIterator[tuple[AsyncClient, Callable[[], Any]]]:
    """A client, and what replaces its gManager by another one at the same address."""
    decoder: Decoder[m.FromClient] = Decoder(m.FromClient)

    def listen(address: str, answer: Answer) -> Server:
        # a context of its own, whose end waits until the address is free
        listening = ZmqTransport() if isinstance(transport, ZmqTransport) else transport
        return Server(listening.listen(address, decoder), 5.0, answer)

    server = listen("tcp://127.0.0.1:*", first)
    address = server.listener.address
    tasks = [asyncio.create_task(server.run())]
    servers = [server]

    async def replace() -> Server:
        await servers[-1].listener.close()
        servers.append(listen(address, second))
        tasks.append(asyncio.create_task(servers[-1].run()))
        return servers[-1]

    async with asyncio.timeout(20), AsyncClient(address, transport=transport, resume_s=resume_s) as client:
        yield client, replace
    await servers[-1].listener.close()
    await asyncio.gather(*tasks)


def three_of_six(server: Server, peer: bytes, message: Any) -> None:
    if isinstance(message, m.Submit):
        server.listener.send(peer, tokens(message.request_id, 0, 3))


def the_rest(server: Server, peer: bytes, message: Any) -> None:
    """Of six tokens."""
    if isinstance(message, m.Submit | m.Attach):
        start = message.from_index if isinstance(message, m.Attach) else 0
        server.listener.send(peer, tokens(message.request_id, start, 6 - start, finish_reason="length"))


async def rest_of(stream: Any) -> list[int]:
    return [token async for chunk in stream for token in chunk.token_ids]


async def test_streams_go_on_over_the_next_connection(transport: Transport) -> None:
    async with lost_and_found(transport, three_of_six, the_rest) as (client, replace):
        stream, other = client.generate("x", request_id="a"), client.generate("x", request_id="b")
        assert (await anext(stream)).token_ids == (await anext(other)).token_ids == [0, 1, 2]
        server = await replace()
        assert await rest_of(stream) == await rest_of(other) == [3, 4, 5]
        asked = {(message.request_id, message.from_index) for message in server.of(m.Attach)}
        assert asked == {("a", 3), ("b", 3)}
        assert client.is_connected


async def test_what_had_no_token_yet_is_submitted_again(transport: Transport) -> None:
    """Whether the first gManager had it is not known: with its id it is the same request."""
    async with lost_and_found(transport, lambda *_: None, the_rest) as (client, replace):
        reading = asyncio.create_task(rest_of(client.generate("x", request_id="a")))
        await asyncio.sleep(0.05)
        server = await replace()
        assert await reading == [0, 1, 2, 3, 4, 5]
        assert [submit.request_id for submit in server.of(m.Submit)] == ["a"]


async def test_a_request_that_is_lost_with_its_gmanager_fails(transport: Transport) -> None:
    def nothing_known(server: Server, peer: bytes, message: Any) -> None:
        if isinstance(message, m.Attach):
            words: dict[str, Any] = {"finish_reason": "error", "error": "no request 'a' is known", "refusal": "unknown"}
            server.listener.send(peer, tokens(message.request_id, 0, 0, **words))

    async with lost_and_found(transport, three_of_six, nothing_known) as (client, replace):
        stream = client.generate("x", request_id="a")
        await anext(stream)
        await replace()
        with pytest.raises(RequestFailed, match="it was accepted, and is lost: no request 'a' is known"):
            await anext(stream)


async def test_while_there_is_no_connection(transport: Transport) -> None:
    """What is begun fails, what is under way too, but for streams; one that is left is aborted at the next gManager."""
    async with lost_and_found(transport, three_of_six, the_rest) as (client, replace):
        stream, left = client.generate("x", request_id="a"), client.generate("x", request_id="b")
        await anext(stream)
        await anext(left)
        call = asyncio.create_task(client.stats())
        await asyncio.sleep(0.05)
        replacing = asyncio.create_task(replace())
        with pytest.raises(ServiceUnreachable, match="the gManager left"):
            await call
        assert not client.is_connected
        with pytest.raises(ServiceUnreachable, match="the gManager left"):
            await client.stats()
        with pytest.raises(ServiceUnreachable, match="the gManager left"):
            await anext(client.generate("x"))
        await left.aclose()
        server = await replacing
        assert await rest_of(stream) == [3, 4, 5]
        assert [abort.request_id for abort in await server.until_heard(m.Abort)] == ["b"]


async def test_who_was_taken_for_gone_comes_again(transport: Transport) -> None:
    """As a client that was stopped for longer than its lease, and goes on: it gave up, and its stream failed."""

    def answer(server: Server, peer: bytes, message: Any) -> None:
        if isinstance(message, m.Submit):
            server.listener.send(peer, tokens(message.request_id, 0, 3))
            server.listener.send(peer, m.Refused(reason="who are you", may_return=True))
        the_rest(server, peer, message if isinstance(message, m.Attach) else None)

    async with connected(transport, answer, resume_s=10) as (server, client):
        assert await rest_of(client.generate("x", request_id="a")) == [0, 1, 2, 3, 4, 5]
        assert server.of(m.Attach) == [m.Attach(request_id="a", from_index=3)]
    async with connected(transport, answer) as (_, client):
        stream = client.generate("x", request_id="a")
        await anext(stream)
        with pytest.raises(ServiceUnreachable, match="the gManager ended the connection: who are you"):
            await anext(stream)


async def test_no_other_gmanager_comes(transport: Transport) -> None:
    async with connected(transport, start_only, resume_s=0.5) as (server, client):
        stream = client.generate("x")
        await anext(stream)
        await server.listener.close()
        with pytest.raises(ServiceUnreachable, match="the gManager left"):
            await anext(stream)
        assert client.is_over


async def test_attach(transport: Transport) -> None:
    async with connected(transport, the_rest) as (server, client):
        stream = client.attach("r", 4)
        assert [(chunk.index, chunk.token_ids, chunk.finish_reason) async for chunk in stream] == [(4, [4, 5], "length")]
        assert server.of(m.Attach) == [m.Attach(request_id="r", from_index=4)]
        with pytest.raises(ValueError, match="from_index must not be negative, got -1"):
            client.attach("r", -1)


async def test_an_unread_stream_takes_little_and_loses_nothing(transport: Transport) -> None:
    """The others on the connection go on; what was dropped comes when the rest is read."""
    total = 3 * gmanager.client.MOST_UNREAD

    def answer(server: Server, peer: bytes, message: Any) -> None:
        if isinstance(message, m.Submit | m.Attach):
            start = message.from_index if isinstance(message, m.Attach) else 0
            for index in range(start, total if message.request_id == "unread" else 3):
                last = index == (total if message.request_id == "unread" else 3) - 1
                server.listener.send(peer, tokens(message.request_id, index, finish_reason="length" if last else None))

    async with connected(transport, answer) as (server, client):
        stream = client.generate("x", request_id="unread")
        await anext(stream)
        assert await rest_of(client.generate("x", request_id="other")) == [0, 1, 2]
        unread = client._streams["unread"].outputs
        assert unread.qsize() <= gmanager.client.MOST_UNREAD
        assert await rest_of(stream) == list(range(1, total))
        assert server.of(m.Attach)
        assert not client._streams
