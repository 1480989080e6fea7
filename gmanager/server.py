"""The shell around the cluster: sockets, text and time. It decides nothing.

recv ──> event ──> Cluster.handle ──> actions ──> send, tokenise, detokenise ──> (events)

With a journal, what an event changes is written before clients hear of it: their messages are held until it is committed.
"""

import asyncio
import secrets
from array import array
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from gmanager.cluster.chain import Chain
from gmanager.cluster.cluster import Cluster
from gmanager.cluster.events import (
    Action,
    ClientEmpty,
    ClientFull,
    Deliver,
    DropText,
    Encode,
    Encoded,
    Event,
    Forget,
    JournalChanged,
    LoadText,
    Log,
    PeerGarbled,
    PeerSaid,
    PeerWasLost,
    Send,
    SendAll,
    StopFound,
    Stopped,
    TextLoaded,
    Ticked,
    Write,
)
from gmanager.config import GManagerConfig
from gmanager.held import Held
from gmanager.journal import Journal
from gmanager.text.detokenizer import Detokenizer
from gmanager.text.grammars import compile_grammar
from gmanager.text.tokenizer import Tokenizer
from gmanager.wire.channel import Listener, PeerLost, Transport, ZmqTransport
from gmanager.wire.codec import Decoder
from gmanager.wire.errors import BadMessage, FrameTooLarge, TextError, TextUnavailable
from gmanager.wire.logs import get_logger
from gmanager.wire.messages import (
    FromClient,
    FromInstance,
    Message,
    Output,
    OutputBatch,
    Pong,
    PromptOutput,
    RefusalReason,
    Submit,
    TextAssets,
    pack_tokens,
    unpack_tokens,
)
from gmanager.wire.peer import PeerId

log = get_logger("gmanager")

TICK_S = 1.0

FULL_MESSAGES, FULL_BYTES = 4096, 4 * 2**20
"""More of either may not wait for a client: it is told no more until all of it has left. What then grows is only the tokens of
its requests."""
LOOK_S = 0.05
"""Between two looks whether it has."""

MAX_BATCH = 256
"""Most outputs in one message: with all log-probabilities that can be asked for it is far below a frame's limit."""


@dataclass(slots=True)
class _RequestText:
    """The text of one request."""

    detokenizer: Detokenizer
    stopped_at: int | None = None
    """How many generated tokens count, once a stop string was found."""


class Server:
    """One gManager. `start`, then `run` until `stop`."""

    def __init__(self, config: GManagerConfig, *, transport: Transport | None = None, journal: Journal | None = None) -> None:
        """`journal`: is closed at the end."""
        self._config = config
        self._transport: Transport = ZmqTransport() if transport is None else transport
        self._journal = journal
        self._journal_failure: str | None = None
        """Why it can't be written: until it can, nothing is held for it."""
        self._journal_over: asyncio.Future[None] | None = None
        self._held = Held()
        self._heard: dict[PeerId, deque[tuple[int, int]]] = {}
        """Of each instance how many of its outputs were heard, and up to which entry that is in the journal: first what it was
        told, then what it will be."""
        if journal is None:
            self._cluster = Cluster(config, identity=secrets.randbits(63))
        else:
            self._cluster = Cluster(config, term=journal.term, identity=journal.identity)
        self._listener: Listener[FromClient | FromInstance] | None = None
        self._stopping = asyncio.Event()
        self._events: deque[Event] = deque()
        self._is_handling = False
        self._tokenizers: dict[int, Tokenizer] = {}
        self._loading: set[int] = set()
        self._texts: dict[int, _RequestText] = {}
        self._outbox: dict[PeerId, list[Output]] = {}
        """Of the events that are being handled."""
        self._full: dict[PeerId, dict[str, int]] = {}
        """Clients that are told no more for a while. Of each what was not queued: requests, and from which token on."""
        self._work: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._bound().address

    def start(self) -> None:
        """Take the address, and up what the journal has. Needs a running loop. Raises AddressError, JournalError."""
        loop = asyncio.get_running_loop()
        decoder: Decoder[FromClient | FromInstance] = Decoder(FromClient | FromInstance)
        self._journal_over = loop.create_future()
        if self._journal is not None:
            restored = self._journal.restore()
            self._cluster.restore_costs(self._journal.costs())
            self._cluster.restore(restored, self._now())
            live = sum(request.finish_reason is None for request in restored)
            log.info(
                "journal read", path=str(self._journal.path), term=self._journal.term, live=live, ended=len(restored) - live
            )
        self._listener = self._transport.listen(self._config.bind, decoder)
        if self._journal is not None:
            self._journal.start(partial(loop.call_soon_threadsafe, self._on_journal))

    def stop(self) -> None:
        """End `run` soon: whoever waits for something is told."""
        self._stopping.set()

    async def run(self) -> None:
        """Serve until `stop`. Raises Fenced if another gManager has taken the journal over."""
        listener = self._bound()
        tasks = [asyncio.create_task(self._receive(listener)), asyncio.create_task(self._tick())]
        stopping = asyncio.create_task(self._stopping.wait())
        ending: list[asyncio.Future[Any]] = [*tasks, stopping]
        if self._journal_over is not None:
            ending.append(self._journal_over)
        try:
            done, _ = await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in [*tasks, stopping, *self._work]:
                task.cancel()
            # A second error while telling everybody that we end must not hide the first.
            try:
                if self._journal is None or self._journal.error is None:
                    self._handle(Stopped("gManager is shutting down", self._now()))
            finally:
                await asyncio.gather(*tasks, stopping, *self._work, return_exceptions=True)
                await self._close_journal()
                await listener.close()

    async def _close_journal(self) -> None:
        if self._journal is not None:
            await asyncio.to_thread(self._journal.close)
            if self._journal.error is None:
                self._release(self._journal.appended)

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other."""
        self._cluster.validate()
        if self._cluster.is_idle and self._texts:
            raise RuntimeError(f"no request is live and texts of {sorted(self._texts)} are kept")

    @property
    def is_idle(self) -> bool:
        """Whether no request is live and no instance holds anything for one."""
        return self._cluster.is_idle

    # --- events -------------------------------------------------------------------------------------------------------

    async def _receive(self, listener: "Listener[FromClient | FromInstance]") -> None:
        while True:
            peer, message = await listener.recv()
            now = self._now()
            if isinstance(message, BadMessage):
                self._handle(PeerGarbled(peer, message.reason, now))
            elif isinstance(message, PeerLost):
                self._heard.pop(peer, None)
                self._handle(PeerWasLost(peer, message.reason, now))
            elif isinstance(message, Submit):
                self._handle(PeerSaid(peer, message, now, seed=secrets.randbits(63)))
            else:
                self._handle(PeerSaid(peer, message, now))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._on_journal()
            self._handle(Ticked(self._now()))

    def _on_journal(self) -> None:
        """It has written something, or can't, or can again; a disk that hangs says nothing, so it is asked, too."""
        journal, over = self._journal, self._journal_over
        if journal is None or over is None or over.done():
            return
        if journal.error is not None:
            over.set_exception(journal.error)
            return
        failure = journal.failure
        if (failure is None) != (self._journal_failure is None):
            if failure is not None:
                what = "journal can't be written: requests that run go on without it, new ones are refused"
                log.error(what, path=str(journal.path), reason=failure)
            else:
                log.info("journal is written again", path=str(journal.path))
            self._journal_failure = failure
            self._handle(JournalChanged(failure, self._now()))
        self._release(journal.committed if failure is None else journal.appended)

    def _release(self, committed: int) -> None:
        """Send what was held till now."""
        peers = []
        for peer, message in self._held.pop(committed):
            self._send([peer], message)
            peers.append(peer)
        for peer in dict.fromkeys(peers):
            self._look_at_backlog(peer)

    def _handle(self, event: Event) -> None:
        """One event and all that its actions bring about, in order."""
        self._events.append(event)
        if self._is_handling:
            return
        self._is_handling = True
        try:
            # What its text brings about is written with a token: so all that is read again has been looked through.
            with nullcontext() if self._journal is None else self._journal.together():
                while self._events:
                    self._handle_one(self._events.popleft())
        finally:
            self._is_handling = False

    def _handle_one(self, event: Event) -> None:
        actions = self._cluster.handle(event)
        if self._journal is not None:
            self._journal.append(*(action.entry for action in actions if isinstance(action, Write)))
        for action in actions:
            self._do(action)
        if not self._events:
            for peer in list(self._outbox):
                self._flush(peer)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _bound(self) -> "Listener[FromClient | FromInstance]":
        if self._listener is None:
            raise RuntimeError("start the server first")
        return self._listener

    # --- actions ------------------------------------------------------------------------------------------------------

    def _do(self, action: Action) -> None:
        match action:
            case Write():
                pass  # with all others of its event
            case Send(peer=peer, message=message):
                self._flush(peer)
                if self._held.count(peer):
                    self._hold(peer, message)
                elif isinstance(message, Pong):
                    self._send([peer], Pong(outputs=self._written(peer, message.outputs)))
                else:
                    self._send([peer], message)
                    if isinstance(message, PromptOutput):
                        self._look_at_backlog(peer)
            case SendAll(peers=peers, message=message):
                self._send(peers, message)
            case Deliver():
                self._deliver(action)
            case Log(level=level, event=event, fields=fields):
                log.log(level, event, **fields)
            case Forget(peer=peer):
                self._flush(peer)
                self._full.pop(peer, None)
                self._heard.pop(peer, None)
                self._held.drop(peer)
                self._bound().forget(peer)
            case Encode():
                self._start(self._encode(action, self._tokenizers[action.cell]))
            case LoadText(cell=cell, assets=assets):
                self._loading.add(cell)
                self._start(self._load_text(cell, assets))
            case DropText(cell=cell):
                self._loading.discard(cell)
                tokenizer = self._tokenizers.pop(cell, None)
                if tokenizer is not None:
                    self._start(tokenizer.close())

    def _send(self, peers: Sequence[PeerId], message: Message) -> None:
        try:
            self._bound().send_all(peers, message)
        except (FrameTooLarge, ValueError) as error:
            # What they were to hear can't be said; nothing that is said after that would make sense to them.
            log.error("peer given up", reason=str(error))
            for peer in peers:
                self._handle(PeerWasLost(peer, str(error), self._now()))

    def _flush(self, peer: PeerId) -> None:
        """Send what a client is to hear of its requests: that of one step in one message."""
        outputs = self._outbox.pop(peer, [])
        if not outputs:
            return
        message = outputs[0] if len(outputs) == 1 else OutputBatch(outputs=outputs)
        if self._is_behind or self._held.count(peer):
            self._hold(peer, message)
        else:
            self._send([peer], message)
            self._look_at_backlog(peer)

    def _written(self, peer: PeerId, outputs: int) -> int:
        """How many of an instance's outputs are in the journal, as far as is known: the others it keeps. It isn't kept waiting
        for a disk: what answers its beats is that this gManager lives."""
        journal = self._journal
        if journal is None or self._journal_failure is not None or not outputs:
            return outputs
        heard = self._heard.setdefault(peer, deque([(0, 0)]))
        heard.append((journal.appended, outputs))
        while len(heard) > 1 and heard[1][0] <= journal.committed:
            heard.popleft()
        return heard[0][1]

    @property
    def _is_behind(self) -> bool:
        """Whether something is to be written before more is said."""
        journal = self._journal
        return journal is not None and self._journal_failure is None and journal.committed < journal.appended

    def _hold(self, peer: PeerId, message: Message) -> None:
        """Send it once all is committed that was appended till now."""
        if self._journal is not None:
            self._held.put(self._journal.appended, peer, message)
            if self._held.count(peer) > FULL_MESSAGES:
                self._pause(peer)

    def _look_at_backlog(self, peer: PeerId) -> None:
        messages, size = self._bound().backlog(peer)
        if messages > FULL_MESSAGES or size > FULL_BYTES:
            self._pause(peer)

    def _pause(self, peer: PeerId) -> None:
        """Tell a client no more until all that waits for it has left."""
        if peer not in self._full:
            self._full[peer] = {}
            self._handle(ClientFull(peer, self._now()))
            self._start(self._until_empty(peer))

    async def _until_empty(self, peer: PeerId) -> None:
        while peer in self._full and (self._held.count(peer) or self._bound().backlog(peer) != (0, 0)):
            await asyncio.sleep(LOOK_S)
        if peer in self._full:
            self._handle(ClientEmpty(peer, self._now(), self._full.pop(peer)))

    def _deliver(self, new: Deliver) -> None:
        """Add the text, and find out whether it ends here.

        In the loop: 5 us a token, 8 with a stop string (tokenizer of 49K tokens), where a thread and back take 85.
        """
        token_ids, logprobs, reason, index = new.token_ids, new.logprobs, new.finish_reason, new.index
        text = ""
        state = self._text_of(new)
        if state is not None:
            delta = state.detokenizer.push(token_ids, final=reason is not None)
            text = delta.text
            if delta.stopped:
                token_ids = token_ids[: delta.num_tokens]
                logprobs = logprobs[: delta.num_tokens] if logprobs is not None else None
                if state.stopped_at is None:
                    state.stopped_at = index + delta.num_tokens
                    self._handle(StopFound(new.request, state.stopped_at, self._now()))
                index = min(index, state.stopped_at)
                reason = "stop" if reason == "length" else reason
        if new.peer is None or not (token_ids or text or reason):
            return
        if new.peer in self._full:
            self._full[new.peer].setdefault(new.request_id, index)
            return
        output = Output(
            request_id=new.request_id,
            index=index,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            error=new.error,
            refusal=new.refusal,
            retry_after_s=new.retry_after_s,
            cached_tokens=new.cached_tokens,
        )
        waiting = self._outbox.setdefault(new.peer, [])
        waiting.append(output)
        if len(waiting) == MAX_BATCH or len(token_ids) > MAX_BATCH:
            self._flush(new.peer)

    def _text_of(self, new: Deliver) -> _RequestText | None:
        """None: it has no text, no token of it was ever generated."""
        if new.finish_reason is not None:
            state = self._texts.pop(new.request, None)
        else:
            state = self._texts.get(new.request)
        if new.before is not None:
            state = None
        if state is None and (new.token_ids or new.before):
            detokenizer = Detokenizer(
                self._tokenizers[new.cell],
                new.stop_strings,
                include_stop=new.include_stop,
                min_tokens=new.min_tokens,
                skip_special_tokens=new.skip_special_tokens,
                shown_special=new.shown_special,
            )
            detokenizer.begin_behind(new.before or ())
            state = _RequestText(detokenizer)
            if new.finish_reason is None:
                self._texts[new.request] = state
        return state

    # --- work that takes long -----------------------------------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._on_work_done)

    def _on_work_done(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task failed", exc_info=error)

    async def _load_text(self, cell: int, assets: TextAssets) -> None:
        try:
            tokenizer = await asyncio.to_thread(Tokenizer, assets)
        except Exception as error:
            if not isinstance(error, TextError):
                log.exception("a tokenizer could not be loaded", cell=cell)
            self._handle(TextLoaded(cell, self._now(), str(error) or type(error).__name__))
            return
        if cell not in self._loading:  # the cell has ended meanwhile
            await tokenizer.close()
            return
        self._loading.discard(cell)
        self._tokenizers[cell] = tokenizer
        self._handle(TextLoaded(cell, self._now()))

    async def _encode(self, job: Encode, tokenizer: Tokenizer) -> None:
        submit = job.submit
        error: str | None = None
        refusal: RefusalReason = "invalid"
        ids = array("I")
        bad_words: list[list[int]] = []
        grammar: str | None = None
        highest = 0
        token_ids = b""
        chain: Chain | None = None
        try:
            bad_words = await tokenizer.encode_bad_words(submit.params.bad_words or ())
            if submit.params.structured_outputs is not None:
                grammar = await asyncio.to_thread(compile_grammar, submit.params.structured_outputs, tokenizer.assets)
            if submit.token_ids is not None:
                ids = unpack_tokens(submit.token_ids)
            elif submit.messages is not None:
                ids = await tokenizer.encode_chat(submit.messages)
            else:
                ids = await tokenizer.encode(submit.text or "")
            token_ids = pack_tokens(ids)
            highest = await asyncio.to_thread(lambda: max(ids, default=0))
            if job.chain_seed is not None:
                chain = await asyncio.to_thread(Chain, job.chain_seed, job.block_size, token_ids)
        except TextError as failure:
            error = str(failure)
            refusal = "not_ready" if isinstance(failure, TextUnavailable) else "invalid"
        except Exception as failure:
            log.exception("a request could not be encoded", number=job.request)
            error = f"the gManager failed to read the request: {type(failure).__name__}: {failure}"
            refusal = "not_ready"  # the request may be all right
        self._handle(Encoded(job.request, self._now(), token_ids, bad_words, grammar, highest, error, refusal, chain))
