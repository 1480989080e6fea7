"""Time, threads and connections that move when a test says so, so that it can try any order of events and find it again.

PlayedLoop     an event loop whose clock stands still until it is set
PlayedThread   an executor whose jobs end when the test ends them
Network        `gmanager.wire.channel.Transport` with the real codec. `gmanager.wire.memory` hands a frame over at once, in
               the order of all that is sent; here each direction of each connection is a queue of its own
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol

from gmanager.wire.channel import DEFAULT_LIMITS, PeerLost, QueueLimits
from gmanager.wire.codec import Decoder, encode
from gmanager.wire.errors import BadMessage, PeerGone
from gmanager.wire.messages import Message
from gmanager.wire.peer import PeerId

GMANAGER = "tcp://127.0.0.1:5570"


class PlayedLoop(asyncio.SelectorEventLoop):
    """Nothing happens in it between two calls of `settle`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.errors: list[BaseException] = []
        """Of callbacks and of tasks that nobody waits for."""
        self._num_calls = 0
        self.set_exception_handler(self._note)

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> asyncio.Handle:
        self._num_calls += 1
        return super().call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Executor | None, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self.create_future()
        if isinstance(executor, PlayedThread):
            executor.take(Job(func, args, future, self.now))
        else:  # what takes no time here
            future.set_result(func(*args))
        return future

    def settle(self) -> None:
        """Run until nothing is left to do at this time."""
        self.run_until_complete(self._rest())
        if self.errors:
            raise self.errors[0]

    async def _rest(self) -> None:
        quiet = 0
        while quiet < 3:
            before = self._num_calls
            await asyncio.sleep(0)
            quiet = quiet + 1 if self._num_calls == before + 1 else 0  # the one that came back here

    def _note(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.errors.append(context.get("exception") or RuntimeError(context["message"]))

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self.create_task(work)

    def end(self) -> None:
        """Cancel all there is, and close."""

        async def cancel_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run_until_complete(cancel_all())
        self.close()


@dataclass(frozen=True, slots=True)
class Job:
    func: Callable[..., Any]
    args: tuple[Any, ...]
    future: asyncio.Future[Any]
    since: float

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """Nothing happens if nobody waits for it any more."""
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)
            self.future.exception()  # who waits hears of it; of a process that was killed nobody does


class PlayedThread(Executor):
    """Runs one job at a time. One that waits for another instance when it is shut down is let go with `let_go`."""

    def __init__(self, let_go: BaseException) -> None:
        self._let_go = let_go
        self._jobs: deque[Job] = deque()
        self.is_closed = False

    @property
    def job(self) -> Job | None:
        """The one that runs."""
        return self._jobs[0] if self._jobs else None

    def take(self, job: Job) -> None:
        if self.is_closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        self._jobs.append(job)

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """Of the job that runs."""
        self._jobs.popleft().end(result, error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.is_closed = True
        while self._jobs:
            self.end(error=self._let_go)


class End(Protocol):
    """Where connections arrive."""

    def arrive(self, connection: "Connection", frame: bytes | None) -> None:
        """`frame`: None if it is over."""


@dataclass(eq=False)
class Connection:
    """Frames on their way in both directions; None: its end, behind which nothing comes."""

    peer: PeerId
    """What the listener calls who has dialled."""
    address: str
    dialer: "PlayedDialer"
    up: deque[bytes | None] = field(default_factory=deque)
    """To the listener."""
    down: deque[bytes | None] = field(default_factory=deque)
    up_is_over: bool = False
    down_is_over: bool = False

    def put_up(self, frame: bytes | None) -> None:
        if not self.up_is_over:
            self.up.append(frame)
            self.up_is_over = frame is None

    def put_down(self, frame: bytes | None) -> None:
        if not self.down_is_over:
            self.down.append(frame)
            self.down_is_over = frame is None

    def cut(self) -> None:
        """Both ends hear of it, after what was sent before."""
        self.put_up(None)
        self.put_down(None)


class Network:
    """All connections. Each is delivered in order; which one is next is for the test to choose."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self._ends: dict[str, End] = {}
        self._num_dialled = 0

    def open(self, address: str, end: End) -> None:
        self._ends[address] = end

    def close(self, address: str) -> None:
        self._ends.pop(address, None)
        for connection in self.connections:
            if connection.address == address:
                connection.put_down(None)
                connection.up.clear()
                connection.up_is_over = True

    def dial(self, dialer: "PlayedDialer", address: str, owner: str) -> Connection:
        self._num_dialled += 1
        connection = Connection(f"{owner}/{self._num_dialled}".encode(), address, dialer)
        self.connections.append(connection)
        return connection

    def ready(self) -> list[tuple[Connection, deque[bytes | None]]]:
        """All directions in which something can be delivered."""
        self.connections = [c for c in self.connections if c.up or c.down or not (c.up_is_over and c.down_is_over)]
        ups = [(c, c.up) for c in self.connections if c.up and c.address in self._ends]
        return ups + [(c, c.down) for c in self.connections if c.down]

    def deliver(self, connection: Connection, queue: deque[bytes | None]) -> None:
        """The next of that direction."""
        frame = queue.popleft()
        if queue is connection.down:
            connection.dialer.arrive(frame)
        else:
            self._ends[connection.address].arrive(connection, frame)


class PlayedTransport:
    """What one process listens and dials with."""

    def __init__(self, network: Network, owner: str, address: str) -> None:
        """`address`: where it listens, whatever it asks for."""
        self._network = network
        self.owner = owner
        self.address = address
        self.process: Any = None
        """Whose it is."""
        self.is_dead = False

    def listen(self, address: str, decoder: Decoder[Any], *, limits: QueueLimits = DEFAULT_LIMITS) -> "PlayedListener":
        listener = PlayedListener(self, self._network, decoder)
        self._network.open(self.address, listener)
        return listener

    def dial(self, address: str, decoder: Decoder[Any], *, limits: QueueLimits = DEFAULT_LIMITS) -> "PlayedDialer":
        dialer = PlayedDialer(self, decoder)
        dialer.connection = self._network.dial(dialer, address, self.owner)
        return dialer

    def die(self, *, keeps_last: bool) -> None:
        """The process is killed. `keeps_last`: whether what it has sent still arrives."""
        for connection in self._network.connections:
            if connection.dialer.transport is self:
                if not keeps_last and not connection.up_is_over:
                    connection.up.clear()
                connection.put_up(None)
                connection.down.clear()
                connection.down_is_over = True
            elif connection.address == self.address and not keeps_last and not connection.down_is_over:
                connection.down.clear()
        self._network.close(self.address)
        self.is_dead = True


class PlayedListener:
    def __init__(self, transport: PlayedTransport, network: Network, decoder: Decoder[Any]) -> None:
        self._transport = transport
        self._network = network
        self._decoder = decoder
        self._connections: dict[PeerId, Connection] = {}
        self._arrived: deque[tuple[PeerId, bytes | PeerLost]] = deque()
        self._wake = asyncio.Event()
        self._is_closed = False

    @property
    def address(self) -> str:
        return self._transport.address

    def arrive(self, connection: Connection, frame: bytes | None) -> None:
        peer = connection.peer
        self._connections[peer] = connection
        if frame is None:
            connection.put_down(None)
        self._arrived.append((peer, PeerLost("it closed the connection") if frame is None else frame))
        self._wake.set()

    async def recv(self) -> tuple[PeerId, Any]:
        while not self._is_closed:
            if self._arrived:
                peer, came = self._arrived.popleft()
                return peer, came if isinstance(came, PeerLost) else read(self._decoder, came)
            self._wake.clear()
            await self._wake.wait()
        raise PeerGone("this end is closed")

    def send(self, peer: PeerId, message: Message) -> None:
        self.send_all((peer,), message)

    def send_all(self, peers: Sequence[PeerId], message: Message) -> None:
        frame = encode(message)
        for peer in peers:
            if not self._transport.is_dead and not self._is_closed:
                self._connections[peer].put_down(frame)

    def backlog(self, peer: PeerId) -> tuple[int, int]:
        return 0, 0

    def forget(self, peer: PeerId) -> None:
        """Its connection is over: nothing is kept of it."""

    async def close(self) -> None:
        if not self._transport.is_dead and not self._is_closed:
            self._network.close(self.address)
        self._is_closed = True
        self._wake.set()


class PlayedDialer:
    connection: Connection

    def __init__(self, transport: PlayedTransport, decoder: Decoder[Any]) -> None:
        self.transport = transport
        self._decoder = decoder
        self._arrived: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._is_gone = False
        self._is_closed = False

    def arrive(self, frame: bytes | None) -> None:
        if frame is None:
            self._is_gone = True
            self.connection.put_up(None)
        else:
            self._arrived.append(frame)
        self._wake.set()

    async def recv(self) -> Any:
        while not self._is_closed:
            if self._arrived:
                return read(self._decoder, self._arrived.popleft())
            if self._is_gone:
                raise PeerGone(f"{self.connection.address} closed the connection")
            self._wake.clear()
            await self._wake.wait()
        raise PeerGone("this end is closed")

    def send(self, message: Message) -> None:
        if not (self.transport.is_dead or self._is_closed or self._is_gone):
            self.connection.put_up(encode(message))

    async def close(self) -> None:
        if not self._is_closed and not self.transport.is_dead:
            self.connection.put_up(None)
            self.connection.down.clear()
            self.connection.down_is_over = True
        self._is_closed = True
        self._wake.set()


def read(decoder: Decoder[Any], frame: bytes) -> Any:
    """The message, or a BadMessage."""
    try:
        return decoder.decode(frame)
    except BadMessage as error:
        return error
