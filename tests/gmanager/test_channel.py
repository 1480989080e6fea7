"""The transport seam: the same promises over ZeroMQ and in memory, and what only real sockets can get wrong."""

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
import zmq

from gmanager.wire import messages as m
from gmanager.wire.channel import PIPE_MESSAGES, Listener, PeerLost, QueueLimits, Transport, ZmqTransport
from gmanager.wire.codec import Decoder
from gmanager.wire.errors import AddressError, BadMessage, FrameTooLarge, PeerGone
from gmanager.wire.memory import MemoryTransport
from tests.support.processes import free_port

pytestmark = pytest.mark.asyncio

ANY = "tcp://127.0.0.1:*"
UP: Decoder[m.FromClient] = Decoder(m.FromClient)
DOWN: Decoder[m.ToClient] = Decoder(m.ToClient)


@pytest.fixture(params=["zmq", "memory"])
def transport(request: pytest.FixtureRequest) -> Transport:
    return ZmqTransport() if request.param == "zmq" else MemoryTransport()


@asynccontextmanager
async def closing(*ends: Any) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(20):
            yield
    finally:
        await asyncio.gather(*(end.close() for end in ends))


Raw = Callable[[int], "zmq.Socket[bytes]"]


@pytest.fixture
def raw() -> Iterator[Raw]:
    """Makes plain ZeroMQ sockets."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = []

    def make(kind: int) -> "zmq.Socket[bytes]":
        sockets.append(context.socket(kind))
        return sockets[-1]

    yield make
    for sock in sockets:
        sock.close(linger=0)
    context.term()


async def exchange(transport: Transport) -> None:
    listener = transport.listen(ANY, UP)
    dialers = [transport.dial(listener.address, DOWN) for _ in range(3)]
    async with closing(listener, *dialers):
        for number, dialer in enumerate(dialers):
            for call in range(100):
                dialer.send(m.GetStats(call=1000 * number + call))
        heard: dict[bytes, list[int]] = {}
        for _ in range(300):
            peer, message = await listener.recv()
            assert isinstance(message, m.GetStats)
            heard.setdefault(peer, []).append(message.call)
            listener.send(peer, m.Done(call=message.call))
        assert sorted(heard.values()) == [[1000 * n + c for c in range(100)] for n in range(3)]
        for number, dialer in enumerate(dialers):
            assert [await dialer.recv() for _ in range(100)] == [m.Done(call=1000 * number + c) for c in range(100)]


async def test_messages_arrive_in_order(transport: Transport) -> None:
    await exchange(transport)


@pytest.mark.parametrize("kind", [ZmqTransport, MemoryTransport])
async def test_uvloop(kind: Any) -> None:
    await asyncio.to_thread(uvloop.run, exchange(kind()))


async def test_dial_before_listen(transport: Transport) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    dialer = transport.dial(address, DOWN)
    dialer.send(m.Ping())
    await asyncio.sleep(0.05)
    listener = transport.listen(address, UP)
    async with closing(listener, dialer):
        assert (await listener.recv())[1] == m.Ping()


async def test_address_in_use(transport: Transport) -> None:
    listener = transport.listen(ANY, UP)
    async with closing(listener):
        with pytest.raises(AddressError, match=f"{listener.address.replace('*', '.')}: the port is in use"):
            transport.listen(listener.address, UP)


@pytest.mark.parametrize("address", ["", "bla", "tcp://127.0.0.1", "tcp://127.0.0.1:x", "tcp://127.0.0.1:99999", "tcp://a b:1"])
async def test_malformed_address(address: str) -> None:
    for make in (ZmqTransport().listen, ZmqTransport().dial):
        with pytest.raises(AddressError, match="tcp://"):
            make(address, UP)


async def test_address_of_another_machine() -> None:
    with pytest.raises(AddressError, match="can't listen at tcp://no-such-device:1"):
        ZmqTransport().listen("tcp://no-such-device:1", UP)


async def test_unknown_peer_is_lost_once_and_forgotten(transport: Transport) -> None:
    listener = transport.listen(ANY, UP)
    async with closing(listener):
        for _ in range(3):
            listener.send(b"nobody", m.Pong())
        assert await listener.recv() == (b"nobody", PeerLost("it is not connected"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(listener.recv(), 0.05)
        listener.forget(b"nobody")
        listener.send(b"nobody", m.Pong())
        assert await listener.recv() == (b"nobody", PeerLost("it is not connected"))
        listener.send(b"other", m.Pong())
        listener.forget(b"other")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(listener.recv(), 0.05)


async def test_peer_that_left_is_lost_after_what_it_sent(transport: Transport) -> None:
    """Nobody has to send to it, and nobody else is disturbed."""
    listener = transport.listen(ANY, UP)
    leaves, stays = transport.dial(listener.address, DOWN), transport.dial(listener.address, DOWN)
    async with closing(listener, leaves, stays):
        stays.send(m.Ping())
        other, _ = await listener.recv()
        for call in range(200):
            leaves.send(m.GetStats(call=call))
        closed = asyncio.create_task(leaves.close())
        peer, first = await listener.recv()
        heard = [first] + [(await listener.recv())[1] for _ in range(199)]
        assert heard == [m.GetStats(call=call) for call in range(200)]
        assert await listener.recv() == (peer, PeerLost("it closed the connection"))
        await closed
        listener.send(other, m.Pong())
        stays.send(m.Ping())
        assert await stays.recv() == m.Pong()
        assert await listener.recv() == (other, m.Ping())


async def test_a_loss_is_noticed_if_the_connection_is_taken_down_after_the_word_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroMQ tells of the end first: who asks at once whether the peer is there may hear that it is."""
    listener: Any = ZmqTransport().listen(ANY, UP)
    dialer = ZmqTransport().dial(listener.address, DOWN)
    async with closing(listener, dialer):
        dialer.send(m.Ping())
        peer, _ = await listener.recv()
        real, early = listener._send_frame, [True]
        monkeypatch.setattr(listener, "_send_frame", lambda to, frame: early.pop() if early else real(to, frame))
        await dialer.close()
        assert await asyncio.wait_for(listener.recv(), 5) == (peer, PeerLost("it closed the connection"))
        assert not early


async def test_what_arrives_while_the_lost_are_looked_for_is_heard_of(transport: Transport) -> None:
    """Word of it may come just before somebody is asked whether he is there, and with that be gone from ZeroMQ's descriptor."""
    listener = transport.listen(ANY, UP)
    leaves, stays = transport.dial(listener.address, DOWN), transport.dial(listener.address, DOWN)
    async with closing(listener, leaves, stays):
        for dialer in (stays, leaves):
            dialer.send(m.Ping())
        heard = [await listener.recv() for _ in range(2)]
        await leaves.close()
        assert isinstance((await listener.recv())[1], PeerLost)

        def speak() -> None:
            stays.send(m.GetStats(call=1))
            time.sleep(0.2)  # till it is here

        receiving = asyncio.create_task(listener.recv())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(speak)
        time.sleep(1.1)  # all further looks are due at once: after it, and before the descriptor's turn
        peer, message = await asyncio.wait_for(receiving, 5)
        assert message == m.GetStats(call=1)
        assert peer in [peer for peer, _ in heard]


async def test_messages_that_lie_there_come_before_the_loss(transport: Transport) -> None:
    """Nobody has read them when the connection ends; after the loss the peer may come again."""
    listener = transport.listen(ANY, UP)
    dialer = transport.dial(listener.address, DOWN)
    async with closing(listener, dialer):
        dialer.send(m.Ping())
        peer, _ = await listener.recv()
        for call in range(40):
            dialer.send(m.GetStats(call=call))
        await dialer.close()
        await asyncio.sleep(0.1)
        assert [message.call for _, message in await hear(listener, 40)] == list(range(40))
        assert await listener.recv() == (peer, PeerLost("it closed the connection"))
        listener.send(peer, m.Pong())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(listener.recv(), 0.05)
        listener.forget(peer)
        listener.send(peer, m.Pong())
        assert await listener.recv() == (peer, PeerLost("it is not connected"))


async def test_wrong_direction_is_a_bad_message(transport: Transport) -> None:
    listener = transport.listen(ANY, UP)
    dialer = transport.dial(listener.address, DOWN)
    async with closing(listener, dialer):
        dialer.send(m.Pong())
        dialer.send(m.Ping())
        peer, message = await listener.recv()
        assert isinstance(message, BadMessage)
        assert (await listener.recv()) == (peer, m.Ping())
        listener.send(peer, m.Ping())
        listener.send(peer, m.Pong())
        assert isinstance(await dialer.recv(), BadMessage)
        assert await dialer.recv() == m.Pong()


async def test_too_large_to_send(transport: Transport) -> None:
    listener = transport.listen(ANY, Decoder[m.FromClient](m.FromClient, max_bytes=100))
    dialer = transport.dial(listener.address, Decoder[m.ToClient](m.ToClient, max_bytes=100))
    async with closing(listener, dialer):
        with pytest.raises(FrameTooLarge):
            dialer.send(m.Refused(reason="x" * 100))
        with pytest.raises(FrameTooLarge):
            listener.send(b"anybody", m.Refused(reason="x" * 100))


async def test_closed_listener_is_noticed_after_what_it_sent(transport: Transport) -> None:
    listener = transport.listen(ANY, UP)
    dialer = transport.dial(listener.address, DOWN)
    async with closing(listener, dialer):
        dialer.send(m.Ping())
        peer, _ = await listener.recv()
        for call in range(500):
            listener.send(peer, m.Done(call=call))
        await listener.close()
        assert [await dialer.recv() for _ in range(500)] == [m.Done(call=call) for call in range(500)]
        for _ in range(2):
            with pytest.raises(PeerGone, match="closed the connection"):
                await dialer.recv()
        dialer.send(m.Ping())
        with pytest.raises(PeerGone, match="this end"):
            await listener.recv()


async def test_close_wakes_a_waiting_reader(transport: Transport) -> None:
    listener = transport.listen(ANY, UP)
    dialer = transport.dial(listener.address, DOWN)
    waiting = [asyncio.create_task(end.recv()) for end in (listener, dialer)]
    await asyncio.sleep(0.05)
    await dialer.close()
    await listener.close()
    for task in waiting:
        with pytest.raises(PeerGone, match="this end"):
            await task
    await listener.close()


async def test_cancelled_recv_loses_nothing(transport: Transport) -> None:
    listener = transport.listen(ANY, UP)
    dialer = transport.dial(listener.address, DOWN)
    async with closing(listener, dialer):
        heard: list[Any] = []

        async def send() -> None:
            for call in range(300):
                dialer.send(m.GetStats(call=call))
                await asyncio.sleep(0.0005)

        sending = asyncio.create_task(send())
        while len(heard) < 300:
            task = asyncio.create_task(listener.recv())
            await asyncio.sleep(0.0007)
            task.cancel()
            try:
                heard.append((await task)[1])
            except asyncio.CancelledError:
                continue
        await sending
        assert heard == [m.GetStats(call=call) for call in range(300)]


async def hear(listener: Listener[Any], number: int) -> list[tuple[bytes, Any]]:
    return [await listener.recv() for _ in range(number)]


async def test_stopped_reader_is_lost_and_blocks_nobody(transport: Transport) -> None:
    """One of two clients never reads: the other gets every message, and the loss is told once, with the numbers."""
    listener = transport.listen(ANY, UP, limits=QueueLimits(messages=2000))
    stopped, reading = transport.dial(listener.address, DOWN), transport.dial(listener.address, DOWN)
    async with closing(listener, stopped, reading):
        stopped.send(m.Hello(protocol=1))
        reading.send(m.Hello(protocol=2))
        peers = {message.protocol: peer for peer, message in await hear(listener, 2)}
        text = "x" * 4000
        got: list[Any] = []
        for call in range(8000):
            listener.send(peers[1], m.CallFailed(call=call, reason=text))  # returns at once: it is no coroutine
            listener.send(peers[2], m.CallFailed(call=call, reason=text))
            if call - len(got) > 1000:  # it keeps up, with half a queue to spare
                got += await _collect(reading, 500)
        got += await _collect(reading, 8000 - len(got))
        assert [message.call for message in got] == list(range(8000))
        peer, news = await listener.recv()
        assert peer == peers[1]
        assert isinstance(news, PeerLost)
        assert "does not read" in news.reason
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(listener.recv(), 0.05)


async def _collect(dialer: Any, number: int) -> list[Any]:
    return [await dialer.recv() for _ in range(number)]


async def test_slow_reader_gets_everything(transport: Transport) -> None:
    """A reader that pauses for less than its queue holds misses nothing, whatever pipe was full in between."""
    listener = transport.listen(ANY, UP)
    dialer = transport.dial(listener.address, DOWN)
    async with closing(listener, dialer):
        dialer.send(m.Ping())
        peer, _ = await listener.recv()
        text = "x" * 4000
        for call in range(5000):
            listener.send(peer, m.CallFailed(call=call, reason=text))
        await asyncio.sleep(0.2)
        assert [message.call for message in await _collect(dialer, 5000)] == list(range(5000))


async def test_queue_is_bounded_in_bytes(transport: Transport) -> None:
    listener = transport.listen(ANY, UP, limits=QueueLimits(bytes=2_000_000))
    dialer = transport.dial(listener.address, DOWN)
    async with closing(listener, dialer):
        dialer.send(m.Ping())
        peer, _ = await listener.recv()
        text = "x" * 1_000_000
        for call in range(4 * PIPE_MESSAGES):
            listener.send(peer, m.CallFailed(call=call, reason=text))
        lost = await listener.recv()
        assert isinstance(lost[1], PeerLost)


async def test_dialer_to_a_stopped_listener_is_told(transport: Transport) -> None:
    listener = transport.listen(ANY, UP)
    dialer = transport.dial(listener.address, DOWN, limits=QueueLimits(messages=500))
    async with closing(listener, dialer):
        submit = m.Submit(request_id="r", params=m.SamplingParams(), text="x" * 20_000)
        for _ in range(2000):
            dialer.send(submit)
            await asyncio.sleep(0)
        with pytest.raises(PeerGone, match="does not read"):
            await dialer.recv()


# --- only over ZeroMQ


async def test_garbage_from_raw_sockets(raw: Raw) -> None:
    listener = ZmqTransport().listen(ANY, Decoder[m.FromClient](m.FromClient, max_bytes=1000))
    async with closing(listener):
        dealer = raw(zmq.DEALER)
        dealer.connect(listener.address)
        dealer.send(b"\xff\xfe")
        dealer.send_multipart([b"one", b"two"])
        dealer.send_multipart([b"x"] * 1000)
        dealer.send(b"")
        request = raw(zmq.REQ)
        request.connect(listener.address)
        request.send(b"hello")
        news = await hear(listener, 5)
        assert all(isinstance(message, BadMessage) for _, message in news)
        reasons = sorted(message.reason for _, message in news)
        assert sum("frames instead of one" in reason for reason in reasons) == 3
        # An oversize frame ends that connection; HTTP passes for a peer of ZeroMQ's first protocol; nobody else is disturbed.
        dealer.send(b"x" * 1001)
        with socket.create_connection(("127.0.0.1", int(listener.address.rsplit(":", 1)[1]))) as http:
            http.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        good = raw(zmq.DEALER)
        good.connect(listener.address)
        good.send(b"\x81\xa4type\xa4Ping")
        while isinstance(message := (await listener.recv())[1], BadMessage | PeerLost):
            continue
        assert message == m.Ping()


async def test_garbage_to_a_dialer(raw: Raw) -> None:
    router = raw(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    dialer = ZmqTransport().dial(f"tcp://127.0.0.1:{port}", DOWN)
    async with closing(dialer):
        dialer.send(m.Ping())
        peer, _ = await asyncio.to_thread(router.recv_multipart)
        router.send_multipart([peer, b"a", b"b"])
        router.send_multipart([peer, b"\xc1"])
        assert [(await dialer.recv()).reason for _ in range(2)] == [  # type: ignore[union-attr]
            "a message of 2 frames instead of one",
            "not msgpack",
        ]


async def test_close_delivers_what_was_queued_even_as_the_last_socket() -> None:
    """After close returns the process may end: the bytes must have left it."""
    ours, theirs = ZmqTransport(), ZmqTransport()
    listener = ours.listen(ANY, UP)
    dialer = theirs.dial(listener.address, DOWN)
    async with closing(listener, dialer):
        dialer.send(m.Ping())
        peer, _ = await listener.recv()
        for call in range(20_000):
            listener.send(peer, m.Done(call=call))
        collected = asyncio.create_task(_collect(dialer, 20_000))
        await listener.close()
        assert [message.call for message in await collected] == list(range(20_000))


async def test_close_does_not_wait_for_ever() -> None:
    transport = ZmqTransport()
    listener = transport.listen(ANY, UP)
    dialer = ZmqTransport().dial(listener.address, DOWN)
    unanswered = transport.dial("tcp://127.0.0.1:1", DOWN)
    async with closing(dialer):
        unanswered.send(m.Ping())
        dialer.send(m.Ping())
        peer, _ = await listener.recv()
        for call in range(30_000):
            listener.send(peer, m.CallFailed(call=call, reason="x" * 4000))
        start = time.perf_counter()
        await asyncio.gather(listener.close(), unanswered.close())
        assert time.perf_counter() - start < 3


IDLE = """
import asyncio, resource, sys
from gmanager.wire import messages as m
from gmanager.wire.channel import ZmqTransport
from gmanager.wire.codec import Decoder

async def main() -> float:
    transport = ZmqTransport()
    listener = transport.listen("tcp://127.0.0.1:*", Decoder(m.FromClient))
    dialers = [transport.dial(listener.address, Decoder(m.ToClient)) for _ in range(10)]
    for dialer in dialers:
        dialer.send(m.Ping())
    for _ in dialers:
        await listener.recv()
    waiting = [asyncio.create_task(end.recv()) for end in (listener, *dialers)]
    await asyncio.sleep(0.2)
    before = resource.getrusage(resource.RUSAGE_SELF)
    await asyncio.sleep(2.0)
    after = resource.getrusage(resource.RUSAGE_SELF)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*(end.close() for end in (listener, *dialers)))
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)

print(asyncio.run(main()))
"""


async def test_idle_costs_nothing() -> None:
    """In a process of its own: threads and garbage of other tests would be counted as the sockets'."""
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", IDLE, stdout=asyncio.subprocess.PIPE)
    out, _ = await child.communicate()
    assert child.returncode == 0
    assert float(out) / 2.0 < 0.02  # of a core, for eleven sockets
