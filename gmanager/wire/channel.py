"""The transport seam: a `Listener` hears many peers, a `Dialer` talks to one, a `Transport` makes both.

`ZmqTransport` is the real one, `gmanager.wire.memory.MemoryTransport` the one for tests; both have this face.

Sending never waits. What the network doesn't take at once goes to the peer's own bounded queue, so one peer that
has stopped to read can neither block the others nor lose messages unnoticed: when its queue is full, or it can't be
reached, the peer is *lost*, and `recv` says so once. (A plain ROUTER lost 1,750 of 2,000 messages to a stopped reader
without a word; an awaited send hung when every pipe was full.) Whether a peer lives is for the lease above to say.
"""

import asyncio
import re
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import zmq
from zmq.utils.monitor import parse_monitor_message

from gmanager.wire.codec import Decoder, encode
from gmanager.wire.errors import AddressError, BadMessage, PeerGone
from gmanager.wire.messages import Message
from gmanager.wire.peer import PeerId

M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)

FLUSH_S = 1.0
"""Longest time that closing waits while nothing of what is still queued leaves."""
FLUSH_MOST_S = 10.0
"""Longest time that it waits at all."""

PIPE_MESSAGES = 64
"""ZeroMQ's own queue per peer and direction. It counts messages whatever their size, so it is kept short: a full one
of 64 MiB frames would hold 4 GiB. What is over goes to the peer's bounded queue here."""

_LOOK_AGAIN_S = (0.01, 0.1, 1.0)
"""After word that a connection was closed."""

_PROBE = b""
"""A frame that means nothing and is never delivered: to send it tells whether there is still somebody."""

_RETRY_FIRST_S = 0.002
_RETRY_MOST_S = 0.1
_MESSAGES_PER_TURN = 64


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait for one peer before it is taken for lost."""

    messages: int = 2**16
    """A stalled client of 64 requests at 200 tokens/s each gets 13,000 messages a second: about 5 s."""
    bytes: int = 256 * 2**20
    """Four frames of the longest kind."""


DEFAULT_LIMITS = QueueLimits()


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A peer that has closed its end, or ended, or can't be sent to any more: messages to it were dropped."""

    reason: str


class Listener(Protocol[M_co]):
    """A bound address and all who dial it."""

    @property
    def address(self) -> str:
        """Where it listens, with the port that was chosen if none was given."""

    async def recv(self) -> tuple[PeerId, M_co | BadMessage | PeerLost]:
        """The next message, garbage (as a BadMessage value) or loss of a peer. Safe to cancel.

        What a peer sent before it was lost is delivered first; after PeerLost nothing more comes from it until `forget`. Raises
        PeerGone when this end is closed.
        """

    def send(self, peer: PeerId, message: Message) -> None:
        """Queue a message. Never waits; a message to a lost peer, or after `close`, is dropped.

        Raises FrameTooLarge, and ValueError for values that have no place on the wire.
        """

    def send_all(self, peers: Sequence[PeerId], message: Message) -> None:
        """The same to each of them, packed once."""

    def forget(self, peer: PeerId) -> None:
        """Drop all state of a peer, and what is queued for it. If it speaks again it is a new peer."""

    def backlog(self, peer: PeerId) -> tuple[int, int]:
        """Messages and bytes that wait for a peer, beyond those that the network has taken."""

    async def close(self) -> None:
        """Send what is queued, for at most FLUSH_S, then close."""


class Dialer(Protocol[M_co]):
    """A connection to one Listener. It need not listen yet; the connection is never made anew once it was lost."""

    async def recv(self) -> M_co | BadMessage:
        """The next message, or garbage as a BadMessage value. Safe to cancel.

        Raises PeerGone when the other end closed, or takes no more messages, or this end is closed; what came
        before that is delivered first.
        """

    def send(self, message: Message) -> None:
        """Queue a message. Never waits; after the connection is lost, or `close`, it is dropped (recv tells).

        Raises FrameTooLarge, and ValueError for values that have no place on the wire.
        """

    async def close(self) -> None:
        """Send what is queued, for at most FLUSH_S, then close."""


class Transport(Protocol):
    """Makes Listeners and Dialers; both calls need a running event loop."""

    def listen(self, address: str, decoder: Decoder[M], *, limits: QueueLimits = DEFAULT_LIMITS) -> Listener[M]:
        """Bind. Raises AddressError."""

    def dial(self, address: str, decoder: Decoder[M], *, limits: QueueLimits = DEFAULT_LIMITS) -> Dialer[M]:
        """Connect, in the background. Raises AddressError if the address is malformed."""


@dataclass(slots=True)
class _Queue:
    frames: deque[bytes] = field(default_factory=deque)
    bytes: int = 0


class ZmqTransport:
    """ZeroMQ over TCP. The closing of its last socket waits, for FLUSH_S at most, until all bytes have left."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._open_sockets = 0

    def listen(self, address: str, decoder: Decoder[M], *, limits: QueueLimits = DEFAULT_LIMITS) -> Listener[M]:
        """Bind, for example tcp://127.0.0.1:5570, or tcp://127.0.0.1:* for a free port. Raises AddressError."""
        check_address(address)
        return _ZmqListener(self, address, decoder, limits)

    def dial(self, address: str, decoder: Decoder[M], *, limits: QueueLimits = DEFAULT_LIMITS) -> Dialer[M]:
        """Connect, in the background. Raises AddressError if the address is malformed."""
        check_address(address)
        return _ZmqDialer(self, address, decoder, limits)

    def _open(self, kind: int, max_bytes: int) -> "zmq.Socket[bytes]":
        if self._context is None:
            self._context = zmq.Context()
        sock = self._context.socket(kind)
        self._open_sockets += 1
        sock.setsockopt(zmq.SNDHWM, PIPE_MESSAGES)
        sock.setsockopt(zmq.RCVHWM, PIPE_MESSAGES)
        sock.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.IPV6, 0)
        return sock

    def _release(self) -> "zmq.Context[zmq.Socket[bytes]] | None":
        """One socket was closed; after the last one, the context to end (which waits for lingering bytes)."""
        self._open_sockets -= 1
        if self._open_sockets:
            return None
        context, self._context = self._context, None
        return context


class _ZmqEnd(Generic[M]):
    """One socket on the running loop: no thread, no task, no polling.

    ZeroMQ's file descriptor is edge-triggered: it becomes readable when *something* may have changed, and any call on the
    socket may swallow that, a send as well. So after each call that could have, `_on_activity` asks the socket what it can do
    now; who waits for a message that nobody was told of would wait until the next one.
    """

    def __init__(self, transport: ZmqTransport, kind: int, decoder: Decoder[M], limits: QueueLimits) -> None:
        self._transport = transport
        self._decoder = decoder
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._queues: dict[PeerId, _Queue] = {}
        self._retry: asyncio.TimerHandle | None = None
        self._retry_s = _RETRY_FIRST_S
        self._received = 0
        self._closing = False
        self._shut = False
        self._sock = transport._open(kind, decoder.max_bytes)
        self._fd: int = self._sock.FD

    def _watch(self, events: int) -> None:
        """Hear of these events of the socket's connections (`_on_event`)."""
        self._monitor: zmq.Socket[bytes] = self._sock.get_monitor_socket(events)
        self._monitor_fd: int = self._monitor.FD

    def _start(self) -> None:
        self._loop.add_reader(self._fd, self._on_activity)
        self._loop.add_reader(self._monitor_fd, self._on_monitor)
        self._on_activity()
        self._on_monitor()

    def _on_monitor(self) -> None:
        while not self._shut:
            try:
                event: Any = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            self._on_event(event["event"])

    def _on_event(self, event: int) -> None:
        raise NotImplementedError

    def _on_activity(self) -> None:
        if self._queues and not self._shut:
            self._drain()
        if not self._shut and int(self._sock.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._wake.set()

    # --- receiving

    async def _next_parts(self) -> list[bytes] | None:
        """The next message's parts; None after a wake-up without one, or when the socket is shut."""
        if self._received >= _MESSAGES_PER_TURN:
            # ZeroMQ's thread may bring messages faster than we take them: let the other tasks run.
            self._received = 0
            await asyncio.sleep(0)
        if self._shut:
            return None
        parts = self._receive()
        if parts is None:
            self._received = 0
            self._wake.clear()
            await self._wake.wait()
        else:
            self._received += 1
        return parts

    def _receive(self) -> list[bytes] | None:
        try:
            return self._sock.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def _decoded(self, parts: list[bytes]) -> M | BadMessage:
        if len(parts) != 1:
            return BadMessage(f"a message of {len(parts)} frames instead of one")
        try:
            return self._decoder.decode(parts[0])
        except BadMessage as error:
            return error

    # --- sending

    def _send_frame(self, peer: PeerId, frame: bytes) -> bool:
        """Hand a frame to ZeroMQ; False if its pipe to that peer is full. Raises zmq.ZMQError if there is no such peer."""
        raise NotImplementedError

    def _on_lost(self, peer: PeerId, reason: str) -> None:
        raise NotImplementedError

    def _post(self, peer: PeerId, frame: bytes) -> None:
        queue = self._queues.get(peer)
        if queue is None:
            try:
                taken = self._send_frame(peer, frame)
            except zmq.ZMQError as error:
                self._lose(peer, error)
                return
            if not taken:
                self._queues[peer] = _Queue(deque([frame]), len(frame))
                self._retry_later()
            self._on_activity()
            return
        if len(queue.frames) >= self._limits.messages or queue.bytes + len(frame) > self._limits.bytes:
            del self._queues[peer]
            self._on_lost(
                peer,
                f"it does not read: {len(queue.frames):,} messages of {queue.bytes:,} bytes wait; "
                f"at most {self._limits.messages:,} and {self._limits.bytes:,} are kept",
            )
            return
        queue.frames.append(frame)
        queue.bytes += len(frame)

    def _drain(self) -> None:
        for peer, queue in list(self._queues.items()):
            try:
                while queue.frames and self._send_frame(peer, queue.frames[0]):
                    queue.bytes -= len(queue.frames.popleft())
                    self._retry_s = _RETRY_FIRST_S
            except zmq.ZMQError as error:
                self._lose(peer, error)
                continue
            if not queue.frames:
                del self._queues[peer]
        if self._queues:
            self._retry_later()

    def _retry_later(self) -> None:
        # ZeroMQ wakes us when a pipe has room again; the timer is for a wake-up that another call swallowed.
        if self._retry is None and not self._shut:
            self._retry = self._loop.call_later(self._retry_s, self._on_retry)
            self._retry_s = min(2 * self._retry_s, _RETRY_MOST_S)

    def _on_retry(self) -> None:
        self._retry = None
        self._on_activity()

    def _lose(self, peer: PeerId, error: zmq.ZMQError) -> None:
        self._queues.pop(peer, None)
        reason = "it is not connected" if error.errno == zmq.EHOSTUNREACH else f"{error.strerror}"
        self._on_lost(peer, reason)

    # --- closing

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        deadline = self._loop.time() + FLUSH_S
        most = self._loop.time() + FLUSH_MOST_S
        try:
            while self._queues and not self._shut and self._loop.time() < deadline:
                waiting = self._num_waiting()
                self._drain()
                if self._num_waiting() < waiting:
                    deadline = min(most, self._loop.time() + FLUSH_S)
                await asyncio.sleep(_RETRY_FIRST_S)
        finally:
            self._shut_down(linger_s=max(0.0, deadline - self._loop.time()))
            context = self._transport._release()
            if context is not None:
                await asyncio.to_thread(context.term)

    def _num_waiting(self) -> int:
        return sum(len(queue.frames) for queue in self._queues.values())

    def _shut_down(self, linger_s: float) -> None:
        if self._shut:
            return
        self._shut = True
        self._queues.clear()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._loop.remove_reader(self._fd)
        self._loop.remove_reader(self._monitor_fd)
        self._close_monitor()
        self._sock.close(linger=int(linger_s * 1000))
        self._wake.set()

    def _close_monitor(self) -> None:
        # disable_monitor doesn't close our end of it, and the context can't end while any socket is open.
        self._sock.disable_monitor()
        self._monitor.close(linger=0)


class _ZmqListener(_ZmqEnd[M]):
    def __init__(self, transport: ZmqTransport, address: str, decoder: Decoder[M], limits: QueueLimits) -> None:
        super().__init__(transport, zmq.ROUTER, decoder, limits)
        self._peers: set[PeerId] = set()
        """Who has spoken and is not lost."""
        self._lost: set[PeerId] = set()
        self._inbox: deque[tuple[PeerId, list[bytes] | PeerLost]] = deque()
        """What was taken from the socket to come before the loss of a peer, and that loss."""
        self._sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._watch(zmq.EVENT_DISCONNECTED)
        try:
            self._sock.bind(address)
        except zmq.ZMQError as error:
            self._close_monitor()
            self._sock.close(linger=0)
            context = transport._release()
            if context is not None:
                context.term()
            raise AddressError(f"can't listen at {address}: {_strerror(error)}") from error
        endpoint: Any = self._sock.getsockopt(zmq.LAST_ENDPOINT)
        self._address: str = endpoint.rstrip(b"\0").decode()
        self._start()

    @property
    def address(self) -> str:
        return self._address

    async def recv(self) -> tuple[PeerId, M | BadMessage | PeerLost]:
        while not self._closing:
            if self._inbox:
                peer, came = self._inbox.popleft()
                return peer, came if isinstance(came, PeerLost) else self._decoded(came)
            parts = await self._next_parts()
            if parts is not None and parts[0] not in self._lost:
                self._peers.add(parts[0])
                return parts[0], self._decoded(parts[1:])
        raise PeerGone("this end is closed")

    def send(self, peer: PeerId, message: Message) -> None:
        self.send_all((peer,), message)

    def send_all(self, peers: Sequence[PeerId], message: Message) -> None:
        if self._closing or self._lost.issuperset(peers):
            return
        frame = encode(message, max_bytes=self._decoder.max_bytes)
        for peer in peers:
            if peer not in self._lost:
                self._post(peer, frame)

    def backlog(self, peer: PeerId) -> tuple[int, int]:
        queue = self._queues.get(peer)
        return (0, 0) if queue is None else (len(queue.frames), queue.bytes)

    def forget(self, peer: PeerId) -> None:
        self._queues.pop(peer, None)
        self._peers.discard(peer)
        self._lost.discard(peer)
        self._inbox = deque(item for item in self._inbox if item[0] != peer)

    def _send_frame(self, peer: PeerId, frame: bytes) -> bool:
        try:
            self._sock.send_multipart((peer, frame), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _on_event(self, event: int) -> None:
        """Somebody closed a connection. ZeroMQ doesn't say who: whoever can't be sent to any more.

        It tells of it before it takes the connection down: so he is looked for a few times.
        """
        self._look_for_lost()
        for delay in _LOOK_AGAIN_S:
            self._loop.call_later(delay, self._look_for_lost)

    def _look_for_lost(self) -> None:
        if self._shut:
            return
        for peer in list(self._peers):
            try:
                self._send_frame(peer, _PROBE)
            except zmq.ZMQError:
                self._queues.pop(peer, None)
                self._on_lost(peer, "it closed the connection")
        self._on_activity()

    def _on_lost(self, peer: PeerId, reason: str) -> None:
        for _ in range(PIPE_MESSAGES * (1 + len(self._peers))):  # who is fast could go on for ever
            if (parts := self._receive()) is None:
                break
            if parts[0] not in self._lost:
                self._peers.add(parts[0])
                self._inbox.append((parts[0], parts[1:]))
        self._peers.discard(peer)
        self._lost.add(peer)
        self._inbox.append((peer, PeerLost(reason)))
        self._wake.set()


class _ZmqDialer(_ZmqEnd[M]):
    def __init__(self, transport: ZmqTransport, address: str, decoder: Decoder[M], limits: QueueLimits) -> None:
        super().__init__(transport, zmq.DEALER, decoder, limits)
        self._address = address
        self._connected = False
        self._gone: str | None = None
        self._inbox: deque[list[bytes]] = deque()
        # An id that starts with a zero byte is reserved for those that the ROUTER makes.
        self._sock.setsockopt(zmq.ROUTING_ID, b"D" + secrets.token_bytes(16))
        self._watch(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        try:
            self._sock.connect(address)
        except zmq.ZMQError as error:
            self._close_monitor()
            self._sock.close(linger=0)
            context = transport._release()
            if context is not None:
                context.term()
            raise AddressError(f"can't dial {address}: {_strerror(error)}") from error
        self._start()

    async def recv(self) -> M | BadMessage:
        while not self._closing:
            if self._inbox:
                return self._decoded(self._inbox.popleft())
            if self._gone is not None:
                raise PeerGone(self._gone)
            parts = await self._next_parts()
            if parts is not None and parts != [_PROBE]:
                return self._decoded(parts)
        raise PeerGone("this end is closed")

    def send(self, message: Message) -> None:
        if self._closing or self._shut:
            return
        self._post(b"", encode(message, max_bytes=self._decoder.max_bytes))

    def _send_frame(self, peer: PeerId, frame: bytes) -> bool:
        try:
            self._sock.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _on_event(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected = True
        elif self._connected:
            # ZeroMQ would dial again and go on as if nothing had been lost. What has arrived still counts.
            while (parts := self._receive()) is not None:
                if parts != [_PROBE]:
                    self._inbox.append(parts)
            self._end(f"{self._address} closed the connection")

    def _on_lost(self, peer: PeerId, reason: str) -> None:
        self._end(f"{self._address}: {reason}")

    def _end(self, reason: str) -> None:
        self._gone = reason
        self._shut_down(linger_s=0.0)

    def _shut_down(self, linger_s: float) -> None:
        # Nobody to send to: lingering would only delay the end.
        super()._shut_down(linger_s if self._connected else 0.0)


_TCP = re.compile(r"tcp://[^:/\s]+:(\*|\d{1,5})")


def check_address(address: str) -> None:
    # ZeroMQ takes 99999 for port 34463.
    match = _TCP.fullmatch(address)
    if match is None or (match[1] != "*" and int(match[1]) > 65535):
        raise AddressError(f"an address looks like tcp://127.0.0.1:5570, got {address!r}")


def _strerror(error: zmq.ZMQError) -> str:
    return "the port is in use" if error.errno == zmq.EADDRINUSE else str(error.strerror)
