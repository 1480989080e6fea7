"""Clients: what they ask, and whether they listen."""

import logging
from collections.abc import Collection, Mapping

from gmanager.cluster import drains
from gmanager.cluster.cells import Cells
from gmanager.cluster.events import Forget, PeerSaid
from gmanager.cluster.intake import Intake
from gmanager.cluster.parting import Parting
from gmanager.cluster.request import MoveCall, Request, content_of, wrong_with
from gmanager.cluster.requests import Requests
from gmanager.cluster.turn import Turn
from gmanager.config import GManagerConfig
from gmanager.wire import messages as m
from gmanager.wire.peer import PeerId


class Clients:
    """All that have said Hello and are not gone."""

    def __init__(
        self, config: GManagerConfig, requests: Requests, intake: Intake, cells: Cells, parting: Parting, turn: Turn
    ) -> None:
        self._config = config
        self._requests = requests
        self._delivery = requests.delivery
        self._intake = intake
        self._cells = cells
        self._parting = parting
        self._turn = turn
        self._heard_at: dict[PeerId, float] = {}
        self._attaching: list[tuple[PeerId, m.Attach, float]] = []
        """What they ask of requests that have ended, whose text nobody can make now; and since when."""

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._heard_at

    @property
    def peers(self) -> Collection[PeerId]:
        return self._heard_at.keys()

    # --- who is there -------------------------------------------------------------------------------------------------

    def on_hello(self, peer: PeerId, hello: m.Hello) -> None:
        """A peer's first message."""
        if hello.protocol != m.PROTOCOL:
            reason = f"it speaks protocol {hello.protocol}, this gManager {m.PROTOCOL}"
            self._parting.part(peer, m.Refused(reason=reason))
            return
        self.hear(peer)
        self._turn.send(peer, m.Welcome(lease_s=self._config.client_lease_s))

    def hear(self, peer: PeerId) -> None:
        """It lives."""
        self._heard_at[peer] = self._turn.now

    def lose(self, peer: PeerId) -> None:
        """Its requests go on for a while: it may come back, and attach."""
        if not self._config.resume_s:
            self.end(peer)
            return
        self._forget(peer)
        for request in self._requests.live():
            if request.client == peer:
                self._delivery.detach(request, self._turn.now)

    def end(self, peer: PeerId) -> None:
        """It is not to come back."""
        self._forget(peer)
        for request in self._requests.live():
            if request.client == peer:
                self._intake.end(request, "abort")

    def _forget(self, peer: PeerId) -> None:
        drains.forget((member for cell in self._cells for member in cell.everybody), peer)
        self._heard_at.pop(peer, None)
        self._delivery.forget(peer)

    def on_full(self, peer: PeerId) -> None:
        """More waits for it than it should."""
        if peer in self:
            self._delivery.pause(peer, self._requests.live(), self._turn.now)

    def on_empty(self, peer: PeerId, lacks: Mapping[str, int]) -> None:
        """Nothing waits for it any more. `lacks`: what was told and did not get so far, and from which token on."""
        owed = self._delivery.go_on(peer, self._requests.live(), lacks)
        for request_id, index in owed.items():
            self._attach(peer, request_id, index)

    def renew_leases(self) -> None:
        """All were heard just now, as far as we know."""
        self._heard_at = dict.fromkeys(self._heard_at, self._turn.now)

    def end_leases(self) -> None:
        """Lose those that are silent, and those that don't read."""
        now, lease, longest = self._turn.now, self._config.client_lease_s, self._config.max_pause_s
        for peer in [peer for peer, heard_at in self._heard_at.items() if now - heard_at > lease]:
            self._turn.log(logging.INFO, "client not heard", seconds=lease)
            self.lose(peer)
            self._turn.emit(Forget(peer))
        for peer in self._delivery.paused_since(now - longest):
            self._turn.log(logging.WARNING, "client does not read", seconds=longest)
            self.lose(peer)
            self._turn.emit(Forget(peer))

    # --- what they ask ------------------------------------------------------------------------------------------------

    def on_message(self, event: PeerSaid) -> None:
        """One says something (but asks for no Stats)."""
        peer = event.peer
        match event.message:
            case m.Submit() as submit:
                self._on_submit(peer, submit, event.seed)
            case m.Attach(request_id=request_id, from_index=index):
                self._attach(peer, request_id, index)
            case m.Abort(call=call, request_id=request_id):
                request = self._own_request(peer, call, request_id)
                if request is not None:
                    self._intake.end(request, "abort")
                    self._turn.send(peer, m.Done(call=call))
            case m.MoveHome(call=call, request_id=request_id, instance=instance):
                request = self._own_request(peer, call, request_id)
                if request is not None:
                    self._move_home(request, MoveCall(peer, call, instance))
            case m.Drain() as drain:
                self._on_drain(peer, drain)
            case m.GetText(call=call, cell=name):
                self._turn.send(peer, self._text(call, name))
            case m.Ping():
                self._turn.send(peer, m.Pong())
            case m.Hello():
                self._turn.send(peer, m.Welcome(lease_s=self._config.client_lease_s))
            case other:
                self.end(peer)
                self._parting.part(peer, m.Refused(reason=f"a client doesn't send {type(other).__name__}"))

    def _own_request(self, peer: PeerId, call: int, request_id: str) -> Request | None:
        """A live request of this client; if there is none, the call fails."""
        request = self._requests.by_id(request_id)
        if request is not None and request.client == peer:
            return request
        ended = request is None and self._requests.ended(request_id) is not None
        reason = f"request {request_id!r} has ended" if ended else f"this client has no request {request_id!r}"
        self._turn.send(peer, m.CallFailed(call=call, reason=reason))
        return None

    def _on_submit(self, peer: PeerId, submit: m.Submit, seed: int) -> None:
        wrong = wrong_with(submit)
        if wrong is not None:
            self._requests.refuse(submit, peer, wrong)
        elif not self._attach_same(peer, submit):
            self._intake.submit(peer, submit, seed)

    def _move_home(self, request: Request, call: MoveCall) -> None:
        sequences = self._cells.sequences_of(request)
        if request.move_call is not None:
            reason = f"request {request.id!r} is being moved to instance {request.move_call.target}"
            self._turn.send(call.peer, m.CallFailed(call=call.call, reason=reason))
        elif sequences is None:
            reason = f"request {request.id!r} has no home now: it waits for a cell"
            self._turn.send(call.peer, m.CallFailed(call=call.call, reason=reason))
        else:
            sequences.move_home(request, call)

    def _on_drain(self, peer: PeerId, drain: m.Drain) -> None:
        """A client wants an instance to leave. Answered when it has."""
        found = drains.find(self._cells, drain)
        reason = found if isinstance(found, str) else drains.why_not(*found)
        if isinstance(found, str) or reason is not None:
            self._turn.send(peer, m.CallFailed(call=drain.call, reason=reason or ""))
            return
        cell, member = found
        member.drain_calls.append((peer, drain.call))
        drains.begin(cell, member, self._cells.sequences[cell.name], self._turn.emit)

    def _text(self, call: int, name: str | None) -> m.TextReply | m.CallFailed:
        assets = self._cells.assets(name)
        if assets is not None:
            return m.TextReply(call=call, assets=assets)
        what = "no cell is ready" if name is None else f"no cell {name[:100]!r} is ready"
        return m.CallFailed(call=call, reason=what)

    # --- attaching ----------------------------------------------------------------------------------------------------

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
            self._delivery.attach(request, peer, from_index)
        elif ended is not None and self._has_text(ended.request):
            self._delivery.attach_ended(ended, peer, from_index)
        elif ended is not None:
            asked_at = self._turn.now if since is None else since
            self._attaching.append((peer, m.Attach(request_id=request_id, from_index=from_index), asked_at))
        else:
            self._refuse_unknown(peer, request_id)

    def _has_text(self, request: Request) -> bool:
        """Whether the tokens of one that has ended can be turned into text. If its cell is over, another of its model can."""
        if request.tokens and self._cells.of(request) is None:
            formed = self._cells.formed(request.model)
            cell = next((cell for cell in formed if cell.name == request.cell), formed[0] if formed else None)
            request.cell_number = 0 if cell is None else cell.number
        return not request.tokens or bool(request.cell_number)

    def attach_waiting(self) -> None:
        """A cell has formed: it may be one that can make the text that is waited for."""
        attaching, self._attaching = self._attaching, []
        for peer, message, since in attaching:
            if peer in self:
                self._attach(peer, message.request_id, message.from_index, since)

    def end_attaching(self) -> None:
        """Tell those that wait too long for a text."""
        overdue = [waiting for waiting in self._attaching if self._turn.now - waiting[2] > self._config.resume_s]
        for waiting in overdue:
            self._attaching.remove(waiting)
            self._refuse_unknown(waiting[0], waiting[1].request_id)

    def _refuse_unknown(self, peer: PeerId, request_id: str) -> None:
        if peer in self:
            text = f"no request {request_id[:100]!r} is known here (any more)"
            self._delivery.refuse(peer, request_id, m.Refusal("unknown", text))

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other."""
        for request in self._requests.live():
            if (request.client is None) != (request.detached_at is not None):
                raise RuntimeError(f"request {request.number} has client {request.client!r}, detached {request.detached_at}")
            if request.client is not None and request.client not in self:
                raise RuntimeError(f"request {request.number} has no client")
