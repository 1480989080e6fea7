"""The gManager's mind: every event goes through `handle`, which returns what is to be done. No socket, clock or chance.

    peers ──> clients: requests wait here for a ready cell; then their text is tokenised and they join its queue
          └─> instances: a Cell is formed; once ready, its Sequences admit and run requests

A peer's first message says what it is. One that is done for (refused, of a cell that ended) is heard no more, and
forgotten after a while.
"""

import logging
from collections.abc import Collection, Iterable, Mapping

from gmanager.cluster import drains
from gmanager.cluster.cell import MAX_ATTEMPTS, RETURN_GRACE_S, SUSPEND_TIMEOUT_S, Cell, Member, malformed
from gmanager.cluster.events import (
    Action,
    ClientEmpty,
    ClientFull,
    DropText,
    Encode,
    Encoded,
    Event,
    Forget,
    JournalChanged,
    Log,
    PeerGarbled,
    PeerSaid,
    PeerWasLost,
    Restored,
    Send,
    StopFound,
    Stopped,
    TextLoaded,
    Ticked,
)
from gmanager.cluster.request import MoveCall, Request, content_of, text_bytes, wrong_with
from gmanager.cluster.requests import Requests
from gmanager.cluster.sequences import Sequences
from gmanager.cluster.stats import assemble
from gmanager.config import GManagerConfig
from gmanager.wire import messages as m
from gmanager.wire.peer import PeerId

EPOCHS_PER_TERM = 10**6
"""So the epochs of all gManagers that serve from one journal are different ones."""
SCANNED_AT_ONCE = 2**14
"""Token ids: to look through 4 million takes 88 ms, for which all others would wait."""
WRONG_TOKENS = "token ids must be in [0, 4294967296)"
STALL_S = 3.0
"""If ticks are further apart than this, it is we who were stopped: leases start anew."""


class Cluster:
    """Cells, clients and requests of one gManager."""

    def __init__(self, config: GManagerConfig, *, term: int = 0) -> None:
        """`term`: of the journal; 0: there is none."""
        self._config = config
        self._term = term
        self._out: list[Action] = []
        self._now = 0.0
        self._ticked_at: float | None = None
        self._epoch = term * EPOCHS_PER_TERM
        self._cells: dict[str, Cell] = {}
        self._sequences: dict[str, Sequences] = {}
        """Of the cells that serve or change, by name."""
        self._clients: dict[PeerId, float] = {}
        """When each was last heard."""
        self._members: dict[PeerId, tuple[Cell, Member]] = {}
        self._parting: dict[PeerId, float] = {}
        """Peers that are done for, and since when."""
        self._expelled: set[PeerId] = set()
        """Those of them that may register anew."""
        self._requests = Requests(self._out.append, clock=lambda: self._now, term=term)
        self._unbound: dict[int, tuple[Request, m.Submit]] = {}
        """Requests that wait for a cell that serves."""
        self._attaching: list[tuple[PeerId, m.Attach, float]] = []
        """What clients ask of requests that have ended, whose text nobody can make now; and since when."""
        self._unwritten: str | None = None
        """Why the journal can't be written."""
        self._num_dropped = 0
        self._num_preemptions = 0
        """Of cells that are over."""

    def restore(self, requests: Iterable[Restored], now: float) -> None:
        """Go on with the requests of the gManager before, in order of their numbers. Before any event. Raises ValueError."""
        self._now = now
        for restored in requests:
            request = self._requests.restore(restored)
            if request.is_live:
                if restored.encoded is None:
                    _look_through(request)
                self._unbound[request.number] = request, restored.submit

    def handle(self, event: Event) -> list[Action]:
        """Take one event in. The actions are to be done in this order."""
        self._now = event.now
        match event:
            case PeerSaid():
                self._on_message(event)
            case PeerGarbled(peer=peer, reason=reason):
                self._on_garbled(peer, reason)
            case PeerWasLost(peer=peer, reason=reason):
                self._on_lost(peer, reason)
                self._out.append(Forget(peer))
            case ClientFull(peer=peer):
                self._on_client_full(peer)
            case ClientEmpty(peer=peer, lacks=lacks):
                self._on_client_empty(peer, lacks)
            case TextLoaded(cell=number, error=error):
                self._on_text_loaded(number, error)
            case Encoded():
                self._on_encoded(event)
            case StopFound(request=number, generated=generated):
                self._on_stop_found(number, generated)
            case JournalChanged(failure=failure):
                self._unwritten = failure
            case Ticked():
                self._on_tick()
            case Stopped(reason=reason):
                self._on_stop(reason)
        for sequences in self._sequences.values():
            sequences.advance()
        for cell in list(self._cells.values()):
            if cell.is_ready and (member := self._sequences[cell.name].emptied()) is not None:
                self._let_go(cell, member)
        actions = self._out[:]
        self._out.clear()
        return actions

    # --- peers --------------------------------------------------------------------------------------------------------

    def _on_message(self, event: PeerSaid) -> None:
        peer, message = event.peer, event.message
        if peer in self._clients:
            self._clients[peer] = self._now
            self._on_client(event)
        elif peer in self._members:
            cell, member = self._members[peer]
            member.heard_at = self._now
            self._on_instance(cell, member, message)
        elif peer in self._parting and not (isinstance(message, m.Register) and peer in self._expelled):
            self._num_dropped += 1
        elif isinstance(message, m.Hello):
            self._on_hello(peer, message)
        elif isinstance(message, m.Register):
            self._on_register(peer, message)
        elif hasattr(message, "epoch"):
            self._num_dropped += 1
            self._expel(peer, "this instance is not registered here (any more)")
        else:
            # a client that was taken for gone, and goes on where it stood still, is to come again
            reason = f"the first message must be Hello or Register, not {_kind(message)}"
            self._part(peer, m.Refused(reason=reason, may_return=isinstance(message, m.FromClient)))

    def _on_garbled(self, peer: PeerId, reason: str) -> None:
        self._num_dropped += 1
        if peer in self._parting:
            return
        self._log(logging.WARNING, "unreadable message", reason=reason)
        if peer in self._members:
            _, member = self._members[peer]
            self._lose_member(peer, f"{member.name} sent what can't be read: {reason}")
        else:
            self._end_client(peer)
        self._part(peer, m.Refused(reason=f"can't read this: {reason}"))

    def _on_lost(self, peer: PeerId, reason: str) -> None:
        self._parting.pop(peer, None)
        self._expelled.discard(peer)
        if peer in self._members:
            _, member = self._members[peer]
            self._lose_member(peer, f"{member.name} is lost: {reason}")
        elif peer in self._clients:
            self._log(logging.INFO, "client lost", reason=reason)
            self._lose_client(peer)

    def _part(self, peer: PeerId, last_words: m.Message) -> None:
        self._parting[peer] = self._now
        self._out.append(Send(peer, last_words))

    def _expel(self, peer: PeerId, reason: str) -> None:
        """It may register anew."""
        self._expelled.add(peer)
        self._part(peer, m.Expelled(reason=reason))

    def _lose_client(self, peer: PeerId) -> None:
        """Its requests go on for a while: it may come back, and attach."""
        if not self._config.resume_s:
            self._end_client(peer)
            return
        self._forget_client(peer)
        for request in self._requests.live():
            if request.client == peer:
                self._requests.delivery.detach(request, self._now)

    def _end_client(self, peer: PeerId) -> None:
        """It is not to come back."""
        self._forget_client(peer)
        for request in self._requests.live():
            if request.client == peer:
                self._end(request, "abort")

    def _forget_client(self, peer: PeerId) -> None:
        drains.forget([member for _, member in self._members.values()], peer)
        self._clients.pop(peer, None)
        self._requests.delivery.forget(peer)

    def _on_client_full(self, peer: PeerId) -> None:
        if peer in self._clients:
            self._requests.delivery.pause(peer, self._requests.live(), self._now)

    def _on_client_empty(self, peer: PeerId, lacks: Mapping[str, int]) -> None:
        owed = self._requests.delivery.go_on(peer, self._requests.live(), lacks)
        for request_id, index in owed.items():
            self._attach(peer, request_id, index)

    # --- clients ------------------------------------------------------------------------------------------------------

    def _on_hello(self, peer: PeerId, hello: m.Hello) -> None:
        if hello.protocol != m.PROTOCOL:
            self._part(peer, m.Refused(reason=f"it speaks protocol {hello.protocol}, this gManager {m.PROTOCOL}"))
            return
        self._clients[peer] = self._now
        self._out.append(Send(peer, m.Welcome(lease_s=self._config.client_lease_s)))

    def _on_client(self, event: PeerSaid) -> None:
        peer = event.peer
        match event.message:
            case m.Submit() as submit:
                self._on_submit(peer, submit, event.seed)
            case m.Attach(request_id=request_id, from_index=index):
                self._attach(peer, request_id, index)
            case m.Abort(call=call, request_id=request_id):
                request = self._own_request(peer, call, request_id)
                if request is not None:
                    self._end(request, "abort")
                    self._out.append(Send(peer, m.Done(call=call)))
            case m.MoveHome(call=call, request_id=request_id, instance=instance):
                request = self._own_request(peer, call, request_id)
                if request is not None:
                    self._move_home(request, MoveCall(peer, call, instance))
            case m.Drain() as drain:
                self._on_drain(peer, drain)
            case m.GetStats(call=call):
                self._out.append(Send(peer, m.StatsReply(call=call, stats=self.stats())))
            case m.GetText(call=call, cell=name):
                self._out.append(Send(peer, self._text(call, name)))
            case m.Ping():
                self._out.append(Send(peer, m.Pong()))
            case m.Hello():
                self._out.append(Send(peer, m.Welcome(lease_s=self._config.client_lease_s)))
            case other:
                self._end_client(peer)
                self._part(peer, m.Refused(reason=f"a client doesn't send {_kind(other)}"))

    def _own_request(self, peer: PeerId, call: int, request_id: str) -> Request | None:
        """A live request of this client; if there is none, the call fails."""
        request = self._requests.by_id(request_id)
        if request is not None and request.client == peer:
            return request
        ended = request is None and self._requests.ended(request_id) is not None
        reason = f"request {request_id!r} has ended" if ended else f"this client has no request {request_id!r}"
        self._out.append(Send(peer, m.CallFailed(call=call, reason=reason)))
        return None

    def _on_submit(self, peer: PeerId, submit: m.Submit, seed: int) -> None:
        refusal = wrong_with(submit)
        if refusal is None and self._attach_same(peer, submit):
            return
        refusal = refusal or self._refusal(submit)
        if refusal is not None:
            self._requests.refuse(submit, peer, refusal)
            return
        spread = self._config.spread if submit.spread is None else submit.spread
        seed = seed if submit.params.seed is None else submit.params.seed
        request = self._requests.new(submit, peer, seed, spread)
        _look_through(request)
        self._unbound[request.number] = request, submit
        self._bind_waiting()

    def _attach_same(self, peer: PeerId, submit: m.Submit) -> bool:
        """Whether it is a request that there is already; then its client is told of that one."""
        known = self._requests.by_id(submit.request_id)
        if known is None:
            ended = self._requests.ended(submit.request_id)
            known = ended.request if ended is not None and ended.stats.finish_reason in ("stop", "length") else None
        if known is None or known.content != content_of(submit):
            return False
        self._attach(peer, submit.request_id, 0)
        return True

    def _attach(self, peer: PeerId, request_id: str, from_index: int, since: float | None = None) -> None:
        """Tell a client of a request from that token on. `since`: when it asked for that; None: now."""
        request, ended = self._requests.by_id(request_id), self._requests.ended(request_id)
        if request is not None:
            self._requests.delivery.attach(request, peer, from_index)
        elif ended is not None and self._has_text(ended.request):
            self._requests.delivery.attach_ended(ended, peer, from_index)
        elif ended is not None:
            asked_at = self._now if since is None else since
            self._attaching.append((peer, m.Attach(request_id=request_id, from_index=from_index), asked_at))
        else:
            self._refuse_unknown(peer, request_id)

    def _refuse_unknown(self, peer: PeerId, request_id: str) -> None:
        if peer in self._clients:
            text = f"no request {request_id[:100]!r} is known here (any more)"
            self._requests.delivery.refuse(peer, request_id, "unknown", text)

    def _has_text(self, request: Request) -> bool:
        """Whether the tokens of one that has ended can be turned into text. If its cell is over, another of its model can."""
        if request.tokens and self._cell_of(request) is None:
            formed = [cell for cell in _serving(request.model, self._cells.values()) if cell.is_formed]
            cell = next((cell for cell in formed if cell.name == request.cell), formed[0] if formed else None)
            request.cell_number = 0 if cell is None else cell.number
        return not request.tokens or bool(request.cell_number)

    def _refusal(self, submit: m.Submit) -> m.Refusal | None:
        """Why a request isn't taken in now."""
        if self._requests.by_id(submit.request_id) is not None:
            return m.Refusal("invalid", f"request id {submit.request_id!r} is in use by another request, which has not ended")
        if self._unwritten is not None:
            return m.Refusal("not_ready", f"no new requests are taken: the journal can't be written ({self._unwritten})")
        served = sorted({cell.spec.model for cell in self._cells.values()})
        if served and not _serving(submit.model, self._cells.values()):
            return m.Refusal("model", f"no model {(submit.model or '')[:100]!r} is served; there is {', '.join(served)}")
        if not submit.wait_for_cell and not self._ready_cells(submit):
            return m.Refusal("not_ready", "no instances are ready to serve")
        waiting = len(self._requests) - sum(sequences.num_running for sequences in self._sequences.values())
        if waiting >= self._config.max_queue:
            return m.Refusal("full", f"{waiting:,} requests are waiting, as many as may (max-queue)")
        size = len(submit.token_ids or b"") + text_bytes(submit)
        if self._requests.waiting_bytes and self._requests.waiting_bytes + size > self._config.max_queue_bytes:
            what = f"prompts of {self._requests.waiting_bytes:,} bytes are waiting, and this one has {size:,}"
            return m.Refusal("full", f"{what}: {self._config.max_queue_bytes:,} may wait together (max-queue-bytes)")
        return None

    def _ready_cells(self, submit: m.Submit) -> list[Cell]:
        return [cell for cell in _serving(submit.model, self._cells.values()) if cell.is_formed]

    def _text(self, call: int, name: str | None) -> m.TextReply | m.CallFailed:
        for cell in self._cells.values():
            if cell.is_formed and cell.assets is not None and name in (None, cell.name):
                return m.TextReply(call=call, assets=cell.assets)
        what = "no cell is ready" if name is None else f"no cell {name[:100]!r} is ready"
        return m.CallFailed(call=call, reason=what)

    def _on_drain(self, peer: PeerId, drain: m.Drain) -> None:
        """A client wants an instance to leave. Answered when it has."""
        found = drains.find(self._cells.values(), drain)
        reason = found if isinstance(found, str) else drains.why_not(*found)
        if isinstance(found, str) or reason is not None:
            self._out.append(Send(peer, m.CallFailed(call=drain.call, reason=reason or "")))
            return
        cell, member = found
        member.drain_calls.append((peer, drain.call))
        self._begin_drain(cell, member)

    def _begin_drain(self, cell: Cell, member: Member) -> None:
        if not member.is_draining:
            self._log(logging.INFO, "instance drains", cell=cell.name, instance=member.id)
            member.is_draining = True
            self._sequences[cell.name].resume()

    def _move_home(self, request: Request, call: MoveCall) -> None:
        sequences = self._sequences_of(request)
        if request.move_call is not None:
            reason = f"request {request.id!r} is being moved to instance {request.move_call.target}"
            self._out.append(Send(call.peer, m.CallFailed(call=call.call, reason=reason)))
        elif sequences is None:
            reason = f"request {request.id!r} has no home now: it waits for a cell"
            self._out.append(Send(call.peer, m.CallFailed(call=call.call, reason=reason)))
        else:
            sequences.move_home(request, call)

    # --- requests -----------------------------------------------------------------------------------------------------

    def _bind_waiting(self) -> None:
        """Give each request that waits for a ready cell to one."""
        if not self._sequences:
            return
        attaching, self._attaching = self._attaching, []
        for peer, message, since in attaching:
            if peer in self._clients:
                self._attach(peer, message.request_id, message.from_index, since)
        for request, submit in list(self._unbound.values()):
            ready = self._ready_cells(submit)
            if not ready:
                continue
            del self._unbound[request.number]
            cell = self._choose_cell(request, submit, ready)
            request.cell_number, request.cell = cell.number, cell.name
            if (refusal := cell.why_unreadable(submit)) is not None:
                self._refuse(request, refusal)
            elif request.submit is None:  # it was restored, with its tokens
                self._queue(request)
                if request.is_live:
                    self._requests.delivery.tell(request)
            elif request.prompt and not request.params.needs_text and request.prompt_tokens <= SCANNED_AT_ONCE:
                encoded = Encoded(request.number, self._now, request.prompt, highest=request.highest)
                self._requests.set_tokens(request, encoded)
                self._queue(request)
            else:
                self._requests.change(request, "encode")
                self._out.append(Encode(cell.number, request.number, submit))

    def _choose_cell(self, request: Request, submit: m.Submit, ready: list[Cell]) -> Cell:
        """Of those that can ever serve it, the one where fewest wait; then the one with most free memory."""
        if len(ready) == 1:
            return ready[0]

        def rank(cell: Cell) -> tuple[bool, int, int, str]:
            never = cell.why_unreadable(submit) is not None or (
                bool(request.prompt) and cell.why_never(request.prompt, request.highest, request.params) is not None
            )
            free = sum(member.free for member in cell.members) * cell.spec.block_size
            return never, self._sequences[cell.name].num_waiting, -free, cell.name

        return min(ready, key=rank)

    def _queue(self, request: Request) -> None:
        """Its cell and its tokens are known: refuse it, or let it wait for memory."""
        cell = self._cell_of(request)
        sequences = self._sequences_of(request)
        if cell is None or sequences is None:
            raise RuntimeError(f"request {request.number} is bound to cell {request.cell_number}, which is over")
        refusal = cell.why_never(request.prompt, request.highest, request.params)
        if refusal is not None and not (request.is_restored and refusal.reason == "never"):
            self._refuse(request, refusal)
        else:
            given = request.params.max_tokens
            request.max_tokens = cell.room(request.prompt_tokens) if given is None else given
            sequences.enqueue(request, request.waiting_since)

    def _on_encoded(self, event: Encoded) -> None:
        request = self._requests.by_number(event.request)
        if request is None or request.state != "encoding":
            return  # it has ended meanwhile
        if event.error is not None or not event.token_ids:
            self._refuse(request, m.Refusal(event.refusal, event.error or "the prompt is empty: it has no tokens"))
            return
        self._requests.set_tokens(request, event)
        self._queue(request)

    def _refuse(self, request: Request, refusal: m.Refusal) -> None:
        self._requests.finish(request, "error", error=refusal.text, refusal=refusal.reason)

    def _on_stop_found(self, number: int, generated: int) -> None:
        request = self._requests.by_number(number)
        if request is None:
            self._requests.correct(number, generated)
        else:
            self._requests.cut(request, generated)
            self._end(request, "stop")

    def _end(self, request: Request, reason: m.FinishReason, error: str | None = None) -> None:
        """End a request wherever it is, and release what it holds."""
        state = request.state
        self._requests.finish(request, reason, error=error)
        self._unbound.pop(request.number, None)
        sequences = self._sequences_of(request)
        if sequences is not None:
            sequences.withdraw(request, state)

    def _cell_of(self, request: Request) -> Cell | None:
        return next((cell for cell in self._cells.values() if cell.number == request.cell_number), None)

    def _sequences_of(self, request: Request) -> Sequences | None:
        cell = self._cell_of(request)
        return self._sequences.get(cell.name) if cell is not None else None

    # --- instances ----------------------------------------------------------------------------------------------------

    def _on_register(self, peer: PeerId, register: m.Register) -> None:
        cell = self._cells.get(register.cell)
        reason = malformed(register) or (cell.refusal(register) if cell is not None else None)
        if reason is not None:
            self._log(logging.WARNING, "instance refused", reason=reason)
            self._part(peer, m.Refused(reason=reason))
            return
        if register.former is not None and register.former.term > self._term:
            self._log(logging.ERROR, "instance has served a later gManager", term=register.former.term, own=self._term)
            self._parting[peer] = self._now  # what this one says would only mislead it
            return
        if register.former is not None and cell is not None and cell.phase not in ("registering", "returning"):
            self._expel(peer, f"cell '{cell.name}' has gone on without this instance")
            return
        if cell is None:
            self._epoch += 1
            cell = self._cells[register.cell] = Cell(self._epoch, register, self._out.append, term=self._term)
        if peer in self._expelled:  # it comes again
            self._expelled.discard(peer)
            del self._parting[peer]
        member = cell.add(peer, register, self._now, self._config.instance_lease_s)
        self._members[peer] = cell, member
        if cell.is_ready and cell.joiners:
            self._change(cell, f"{member.name} comes")
        self._end_return(cell)

    def _on_instance(self, cell: Cell, member: Member, message: m.Message) -> None:
        member.num_outputs += isinstance(message, m.Outputs)
        if isinstance(message, m.Ping):
            self._out.append(Send(member.peer, m.Pong(outputs=member.num_outputs)))
        elif isinstance(message, m.Leave):
            how, level = ("failed", logging.ERROR) if message.failed else ("left", logging.INFO)
            self._lose_member(member.peer, f"{member.name} {how}: {message.reason}", level)
            self._parting[member.peer] = self._now
        elif isinstance(message, m.Text):
            cell.set_text(member, message.assets)
        elif isinstance(message, m.AskDrain):
            reason = drains.why_not(cell, member)
            member.is_asking = reason is None
            if reason is not None:
                self._out.append(Send(member.peer, m.NotDrained(reason=reason)))
                return
            self._begin_drain(cell, member)
        elif getattr(message, "epoch", None) != cell.epoch:
            self._num_dropped += 1
        elif isinstance(message, m.StoreOpened):
            cell.set_store(member, message.address, self._wanted(cell))
        elif isinstance(message, m.Kept):
            if _have_wrong_tokens(message.unheard):
                self._on_garbled(member.peer, WRONG_TOKENS)
                return
            cell.set_kept(member, message)
            self._go_on(cell)
        elif isinstance(message, m.Joined):
            cell.set_joined(member)
            self._check_ready(cell)
        elif isinstance(message, m.LinkLost):
            cell.set_link_lost(member, message.rank, message.reason, self._now)
        elif isinstance(message, m.EpochBroken):
            if cell.phase != "suspending":
                self._on_broken(cell, member, message.reason)
        elif isinstance(message, m.Beat):
            is_news = cell.hear(member, message)
            if cell.is_ready:
                self._sequences[cell.name].on_beat(member, message, is_news)
            self._out.append(Send(member.peer, m.Pong(outputs=member.num_outputs)))
        elif cell.is_ready:
            self._on_running(self._sequences[cell.name], member, message)
        else:
            self._num_dropped += 1

    def _on_running(self, sequences: Sequences, member: Member, message: m.Message) -> None:
        match message:
            case m.Granted() as granted:
                sequences.on_granted(member, granted)
            case m.NotGranted(seq=seq, free_blocks=free_blocks):
                sequences.on_not_granted(member, seq, free_blocks)
            case m.Outputs(outputs=outputs) if _have_wrong_tokens(outputs):
                self._on_garbled(member.peer, WRONG_TOKENS)
            case m.Outputs() as outputs:
                sequences.on_outputs(member, outputs)
                sequences.settle(self._now)
            case m.Scored() as scored:
                sequences.on_scored(member, scored)
                sequences.settle(self._now)
            case m.NeedBlock(seq=seq):
                sequences.on_need_block(member, seq)
            case m.HomeMoved(seq=seq, home=home):
                sequences.on_home_moved(seq, home)
            case m.Released() as released:
                sequences.on_released(released, self._now)
            case m.RunOffered() | m.Copied() | m.RunMoved():
                sequences.on_move(member, message)
            case _:
                self._num_dropped += 1

    def _on_text_loaded(self, number: int, error: str | None) -> None:
        cell = next((cell for cell in self._cells.values() if cell.number == number), None)
        if cell is None:
            return
        if error is not None:
            self._fail(cell, f"the tokenizer of cell '{cell.name}' can't be used: {error}")
            return
        cell.set_text_loaded()
        self._end_return(cell)
        self._check_ready(cell)

    def _check_ready(self, cell: Cell) -> None:
        if not cell.is_ready:
            return
        if cell.name not in self._sequences:
            self._sequences[cell.name] = Sequences(cell, self._requests, self._out.append)
            self._bind_waiting()
        self._sequences[cell.name].resume()
        if cell.joiners:  # who came meanwhile
            self._change(cell, f"{cell.joiners[0].name} comes")

    # --- changes of membership ----------------------------------------------------------------------------------------

    def _change(self, cell: Cell, reason: str) -> None:
        """End the cell's epoch; another begins when all have said what they keep."""
        self._sequences[cell.name].suspend(self._now)
        cell.suspend(self._now, reason)

    def _go_on(self, cell: Cell) -> None:
        """Begin the next epoch if all is there for it."""
        if cell.is_suspended:
            if cell.was_left:
                self._reclaim(cell)
            self._epoch += 1
            cell.begin_epoch(self._epoch, self._now)
            self._sequences[cell.name].inherit()

    def _end_return(self, cell: Cell) -> None:
        """If all that its last gManager left of the cell is back, go on: with a change of membership like any other."""
        if cell.has_returned:
            self._epoch = max(self._epoch, cell.epoch)
            self._sequences[cell.name] = Sequences(cell, self._requests, self._out.append)
            cell.end_return(self._now)
            self._bind_waiting()
            self._go_on(cell)

    def _reclaim(self, cell: Cell) -> None:
        """What the members did while there was no gManager: tokens that nobody has, and KV of requests that are known here."""
        sequences = self._sequences[cell.name]
        for unheard in sorted((u for member in cell.members for u in member.unheard), key=lambda u: (u.request, u.index)):
            request = self._requests.by_number(unheard.request)
            if request is not None and request.is_restored and request.state == "queued" and request.cell_number == cell.number:
                sequences.take_unheard(request, unheard)
        sequences.reclaim(
            {request: seq for seq, request in sorted(item for member in cell.members for item in member.requests.items())}
        )

    def _wanted(self, cell: Cell) -> Collection[int]:
        """Sequences whose KV is to be kept in the cell's next epoch."""
        sequences = self._sequences.get(cell.name)
        return () if sequences is None else sequences.kept_seqs

    def _on_broken(self, cell: Cell, member: Member, reason: str) -> None:
        """A member can't step in its epoch: most often it is another's end that it tells of."""
        if cell.is_formed and cell.attempts < MAX_ATTEMPTS:
            self._change(cell, f"{member.name} can't go on: {reason}")
        else:
            self._fail(cell, f"{member.name} can't go on: {reason}")

    def _lose_member(self, peer: PeerId, reason: str, level: int = logging.ERROR) -> None:
        """`level`: of the log, if the cell is over with it: no error if it was asked to end."""
        cell, member = self._members.pop(peer)
        if not cell.can_lose(member):
            self._fail(cell, cell.loss or reason, lost=member, level=level)
            return
        self._log(logging.WARNING, "instance left", cell=cell.name, reason=reason)
        was_member = member in cell.members
        cell.remove(member)
        drains.answer(member, self._out.append, reason)
        if cell.is_formed:
            drains.call_off(cell, self._out.append)
        if not cell.everybody:
            del self._cells[cell.name]
            self._out.append(DropText(cell.number))
        elif cell.phase == "returning":
            self._end_return(cell)
        elif cell.is_formed and was_member:
            cell.loss = cell.loss or reason
            if cell.phase != "suspending":
                self._change(cell, reason)
            self._go_on(cell)

    def _let_go(self, cell: Cell, member: Member) -> None:
        """A member that was drained leaves; what it still has is computed again, as after a loss."""
        reason = f"{member.name} was drained"
        del self._members[member.peer]
        cell.remove(member)
        cell.loss = cell.loss or reason
        self._part(member.peer, m.Drained(reason=reason))
        drains.answer(member, self._out.append, None)
        self._change(cell, reason)
        self._go_on(cell)

    def _fail(self, cell: Cell, reason: str, lost: Member | None = None, level: int = logging.ERROR) -> None:
        """The cell is over, and with it every request bound to it."""
        self._log(level, "cell over", cell=cell.name, epoch=cell.epoch, reason=reason)
        for member in cell.everybody:
            drains.answer(member, self._out.append, reason)
        for member in cell.everybody:
            if member is not lost:
                del self._members[member.peer]
                self._part(member.peer, m.EndEpoch(epoch=cell.epoch, reason=reason))
        for request in self._requests.live():
            if request.cell_number == cell.number:
                self._requests.finish(request, "error", error=reason)
        sequences = self._sequences.pop(cell.name, None)
        if sequences is not None:
            self._num_preemptions += sequences.num_preemptions
            self._num_dropped += sequences.num_dropped
        del self._cells[cell.name]
        self._out.append(DropText(cell.number))

    # --- time ---------------------------------------------------------------------------------------------------------

    def _on_tick(self) -> None:
        now = self._now
        if self._ticked_at is not None and now - self._ticked_at > STALL_S:
            self._log(logging.WARNING, "gManager stood still", seconds=round(now - self._ticked_at, 1))
            self._clients = dict.fromkeys(self._clients, now)
            for _, member in self._members.values():
                member.heard_at = now
        self._ticked_at = now
        self._end_leases(now)
        for cell in list(self._cells.values()):
            self._look_after(cell)
        for waiting in [waiting for waiting in self._attaching if now - waiting[2] > self._config.resume_s]:
            self._attaching.remove(waiting)
            self._refuse_unknown(waiting[0], waiting[1].request_id)
        longest, stall = self._config.max_queue_wait_s, self._config.max_stall_s
        for request in self._requests.live():
            if request.detached_at is not None and now - request.detached_at > self._config.resume_s:
                self._end(request, "abort")
            elif request.is_running and now - request.progress_at > stall:
                where = f"instance {request.home} of cell '{request.cell}'"
                self._end(request, "error", f"{where} has not gone on with the request for {stall:g} s (max-stall)")
            elif request.is_waiting and now - request.waiting_since > longest:
                what = {"waiting": "a ready cell", "encoding": "the tokenizer"}.get(request.state, "free memory")
                self._end(request, "error", f"waited {longest:g} s for {what} (max-queue-wait)")

    def _look_after(self, cell: Cell) -> None:
        """What of a cell takes too long."""
        took, limit = self._now - cell.began_at, self._config.form_timeout_s
        if cell.phase == "returning" and took > RETURN_GRACE_S:
            cell.give_up_absent()
            self._end_return(cell)
        if cell.phase == "suspending" and took > SUSPEND_TIMEOUT_S:
            self._leave_behind(cell, cell.missing, f"did not end its epoch within {SUSPEND_TIMEOUT_S:g} s")
        elif cell.phase in ("opening", "joining") and took > limit:
            if cell.is_formed:
                self._leave_behind(cell, cell.missing, f"did not join within {limit:g} s")
                return
            missing = [member.rank for member in cell.members if not member.joined]
            what = f"instances {missing} have not joined" if missing else "its tokenizer is not loaded"
            self._fail(cell, f"cell '{cell.name}' was not ready within {limit:g} s: {what}")
        elif (broken := cell.broken_link(self._now)) is not None:
            member, reason = broken
            if cell.is_formed:
                self._end_membership(member, reason)
            else:
                self._fail(cell, reason)

    def _leave_behind(self, cell: Cell, members: Collection[Member], why: str) -> None:
        for member in members:
            if self._cells.get(cell.name) is cell:
                self._end_membership(member, f"{member.name} {why}")

    def _end_membership(self, member: Member, reason: str) -> None:
        """Go on without an instance that may still run, and may come again."""
        self._lose_member(member.peer, reason)
        self._expel(member.peer, reason)

    def _end_leases(self, now: float) -> None:
        for peer, heard_at in list(self._clients.items()):
            if now - heard_at > self._config.client_lease_s:
                self._log(logging.INFO, "client not heard", seconds=self._config.client_lease_s)
                self._lose_client(peer)
                self._out.append(Forget(peer))
        for peer in self._requests.delivery.paused_since(now - self._config.max_pause_s):
            self._log(logging.WARNING, "client does not read", seconds=self._config.max_pause_s)
            self._lose_client(peer)
            self._out.append(Forget(peer))
        for peer, (_, member) in list(self._members.items()):
            if peer in self._members and now - member.heard_at > self._config.instance_lease_s:
                self._end_membership(member, f"{member.name} was not heard for {self._config.instance_lease_s:g} s")
        for peer, since in list(self._parting.items()):
            if now - since > self._config.client_lease_s:
                del self._parting[peer]
                self._expelled.discard(peer)
                self._out.append(Forget(peer))

    def _on_stop(self, reason: str) -> None:
        if self._term:
            return  # the next gManager of the journal goes on with all of it, as if this one had been killed
        for request in self._requests.live():
            self._end(request, "error", reason)
        for cell in list(self._cells.values()):
            self._fail(cell, reason)

    # --- for others to see --------------------------------------------------------------------------------------------

    def stats(self) -> m.Stats:
        """The service's state now."""
        own = m.Counters(
            preemptions=self._num_preemptions + sum(s.num_preemptions for s in self._sequences.values()),
            dropped_messages=self._num_dropped + sum(s.num_dropped for s in self._sequences.values()),
        )
        requests = self._requests.stats()
        return assemble(self._cells.values(), self._sequences, requests, own, self._requests.observed.observations())

    @property
    def is_idle(self) -> bool:
        """Whether no request is live and no instance holds anything for one."""
        return not len(self._requests) and all(sequences.is_idle for sequences in self._sequences.values())

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other. Tests call it after every event."""
        self._requests.validate()
        for cell in self._cells.values():
            cell.validate()
            if cell.is_formed != (cell.name in self._sequences):
                raise RuntimeError(f"cell '{cell.name}' is {cell.phase}, its sequences don't know")
            for member in cell.everybody:
                if self._members.get(member.peer) != (cell, member):
                    raise RuntimeError(f"{member.name} is no known peer")
        if len(self._members) != sum(len(cell.everybody) for cell in self._cells.values()):
            raise RuntimeError("there are instances without a cell")
        roles = [*self._clients, *self._members, *self._parting]
        if len(set(roles)) != len(roles):
            raise RuntimeError("a peer has two roles")
        for sequences in self._sequences.values():
            sequences.validate()
        serving = [cell.number for cell in self._cells.values() if cell.is_formed]
        for request in self._requests.live():
            if (request.client is None) != (request.detached_at is not None):
                raise RuntimeError(f"request {request.number} has client {request.client!r}, detached {request.detached_at}")
            if request.client not in (None, *self._clients):
                raise RuntimeError(f"request {request.number} has no client")
            unbound = request.state == "waiting"
            if unbound != (request.number in self._unbound) or unbound == (request.cell_number in serving):
                raise RuntimeError(f"request {request.number} is {request.state}, bound to {request.cell_number}")
        if any(self._ready_cells(submit) for _, submit in self._unbound.values()):
            raise RuntimeError("a cell is ready and requests wait for one")

    def _log(self, level: int, event: str, **fields: object) -> None:
        self._out.append(Log(level, event, fields))


def _serving(model: str | None, cells: Collection[Cell]) -> list[Cell]:
    """Those that serve a model of that name; if there is none, those that have it as another name of theirs. None: all."""
    if model is None:
        return list(cells)
    named = [cell for cell in cells if cell.spec.model == model]
    return named or [cell for cell in cells if model in cell.spec.other_names]


def _look_through(request: Request) -> None:
    """For its highest token id, if that takes no time."""
    if request.prompt_tokens <= SCANNED_AT_ONCE:
        request.highest = max(m.unpack_tokens(request.prompt), default=0)


def _have_wrong_tokens(parts: Iterable[m.SequenceOutput | m.Unheard]) -> bool:
    return any(not 0 <= token < 2**32 for part in parts for token in part.token_ids)


def _kind(message: m.Message) -> str:
    return type(message).__name__
