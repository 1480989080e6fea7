"""The transport seam inside one event loop, for tests: same face, same codec, same limits, no sockets.

Each `MemoryTransport` is a network of its own; an address is any string.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from gmanager.wire.channel import DEFAULT_LIMITS, Dialer, Listener, PeerLost, QueueLimits
from gmanager.wire.codec import Decoder, encode
from gmanager.wire.errors import AddressError, BadMessage, PeerGone
from gmanager.wire.messages import Message
from gmanager.wire.peer import PeerId

M = TypeVar("M")


class MemoryTransport:
    """Listeners and Dialers that find each other by address in this object."""

    def __init__(self) -> None:
        self._listeners: dict[str, _MemoryListener[Any]] = {}
        self._waiting: dict[str, list[_MemoryDialer[Any]]] = {}

    def listen(self, address: str, decoder: Decoder[M], *, limits: QueueLimits = DEFAULT_LIMITS) -> Listener[M]:
        """Take an address. Raises AddressError if it is taken."""
        if address in self._listeners:
            raise AddressError(f"can't listen at {address}: the port is in use")
        listener = _MemoryListener(self, address, decoder, limits)
        self._listeners[address] = listener
        for dialer in self._waiting.pop(address, []):
            dialer._attach(listener)
        return listener

    def dial(self, address: str, decoder: Decoder[M], *, limits: QueueLimits = DEFAULT_LIMITS) -> Dialer[M]:
        """Connect to an address; if nobody listens there, as soon as somebody does."""
        dialer = _MemoryDialer(self, address, decoder, limits)
        listener = self._listeners.get(address)
        if listener is None:
            self._waiting.setdefault(address, []).append(dialer)
        else:
            dialer._attach(listener)
        return dialer

    def _leave(self, address: str, end: Any) -> None:
        if self._listeners.get(address) is end:
            del self._listeners[address]
        if end in self._waiting.get(address, []):
            self._waiting[address].remove(end)


class _Pipe:
    """Frames on their way to one reader."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self.frames: deque[bytes] = deque()
        self.num_bytes = 0

    def put(self, frame: bytes) -> bool:
        """False: it is full."""
        if len(self.frames) >= self._limits.messages or self.num_bytes + len(frame) > self._limits.bytes:
            return False
        self.frames.append(frame)
        self.num_bytes += len(frame)
        return True

    def get(self) -> bytes:
        frame = self.frames.popleft()
        self.num_bytes -= len(frame)
        return frame


def _decoded(decoder: Decoder[M], frame: bytes) -> M | BadMessage:
    try:
        return decoder.decode(frame)
    except BadMessage as error:
        return error


class _MemoryListener(Generic[M]):
    def __init__(self, transport: MemoryTransport, address: str, decoder: Decoder[M], limits: QueueLimits) -> None:
        self._transport = transport
        self._address = address
        self._decoder = decoder
        self._limits = limits
        self._dialers: dict[PeerId, _MemoryDialer[Any]] = {}
        self._arrived: deque[tuple[PeerId, _Pipe | PeerLost]] = deque()
        self._lost: set[PeerId] = set()
        self._wake = asyncio.Event()
        self._closed = False

    @property
    def address(self) -> str:
        return self._address

    async def recv(self) -> tuple[PeerId, M | BadMessage | PeerLost]:
        while not self._closed:
            if self._arrived:
                peer, came = self._arrived.popleft()
                if isinstance(came, PeerLost):
                    return peer, came
                return peer, _decoded(self._decoder, came.get())
            self._wake.clear()
            await self._wake.wait()
        raise PeerGone("this end is closed")

    def send(self, peer: PeerId, message: Message) -> None:
        self.send_all((peer,), message)

    def send_all(self, peers: Sequence[PeerId], message: Message) -> None:
        if self._closed or self._lost.issuperset(peers):
            return
        frame = encode(message, max_bytes=self._decoder.max_bytes)
        for peer in peers:
            dialer = self._dialers.get(peer)
            if peer in self._lost:
                continue
            if dialer is None:
                self._lose(peer, "it is not connected")
            elif not dialer._deliver(frame, self._limits):
                self._lose(peer, "it does not read")

    def backlog(self, peer: PeerId) -> tuple[int, int]:
        dialer = self._dialers.get(peer)
        pipe = None if dialer is None else dialer._incoming
        return (0, 0) if pipe is None else (len(pipe.frames), pipe.num_bytes)

    def forget(self, peer: PeerId) -> None:
        self._lost.discard(peer)
        self._arrived = deque(item for item in self._arrived if item[0] != peer or not isinstance(item[1], PeerLost))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._transport._leave(self._address, self)
        for dialer in list(self._dialers.values()):
            dialer._end(f"{self._address} closed the connection")
        self._wake.set()

    def _join(self, peer: PeerId, dialer: "_MemoryDialer[Any]") -> None:
        self._dialers[peer] = dialer

    def _part(self, peer: PeerId) -> None:
        """A dialer has closed, or given up."""
        if self._dialers.pop(peer, None) is not None and peer not in self._lost:
            self._lose(peer, "it closed the connection")

    def _announce(self, peer: PeerId, pipe: _Pipe) -> None:
        """One more frame lies in a dialer's pipe."""
        if peer in self._lost:
            return
        self._arrived.append((peer, pipe))
        self._wake.set()

    def _lose(self, peer: PeerId, reason: str) -> None:
        self._lost.add(peer)
        self._arrived.append((peer, PeerLost(reason)))
        self._wake.set()


class _MemoryDialer(Generic[M]):
    def __init__(self, transport: MemoryTransport, address: str, decoder: Decoder[M], limits: QueueLimits) -> None:
        self._transport = transport
        self._address = address
        self._decoder = decoder
        self._peer_id: PeerId = b"D" + secrets.token_bytes(16)
        self._listener: _MemoryListener[Any] | None = None
        self._outgoing = _Pipe(limits)
        self._incoming: _Pipe | None = None
        self._gone: str | None = None
        self._closed = False
        self._wake = asyncio.Event()

    async def recv(self) -> M | BadMessage:
        while not self._closed:
            if self._incoming is not None and self._incoming.frames:
                return _decoded(self._decoder, self._incoming.get())
            if self._gone is not None:
                raise PeerGone(self._gone)
            self._wake.clear()
            await self._wake.wait()
        raise PeerGone("this end is closed")

    def send(self, message: Message) -> None:
        if self._closed or self._gone is not None:
            return
        if not self._outgoing.put(encode(message, max_bytes=self._decoder.max_bytes)):
            self._end(f"{self._address}: it does not read")
        elif self._listener is not None:
            self._listener._announce(self._peer_id, self._outgoing)

    async def close(self) -> None:
        self._closed = True
        self._transport._leave(self._address, self)
        if self._listener is not None:
            self._listener._part(self._peer_id)
        self._wake.set()

    def _attach(self, listener: _MemoryListener[Any]) -> None:
        self._listener = listener
        listener._join(self._peer_id, self)
        for _ in self._outgoing.frames:
            listener._announce(self._peer_id, self._outgoing)

    def _deliver(self, frame: bytes, limits: QueueLimits) -> bool:
        if self._incoming is None:
            self._incoming = _Pipe(limits)
        if not self._incoming.put(frame):
            return False
        self._wake.set()
        return True

    def _end(self, reason: str) -> None:
        self._gone = reason
        if self._listener is not None:
            self._listener._part(self._peer_id)
        self._wake.set()
