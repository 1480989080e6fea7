"""The gManager's mind: every event goes through `handle`, which returns what is to be done. No socket, clock or chance.

    peers ──> Clients ────> Intake: requests wait for a ready cell; then their text is tokenised and they join its queue
          └─> Instances ──> Membership: a Cell is formed; once ready, its Sequences admit and run requests

A peer's first message says what it is. One that is done for (refused, of a cell that ended) is heard no more, and
forgotten after a while.
"""

import logging
from collections.abc import Iterable, Mapping

from gmanager.cluster.cells import Cells
from gmanager.cluster.clients import Clients
from gmanager.cluster.events import (
    Action,
    ClientEmpty,
    ClientFull,
    Encoded,
    Event,
    Forget,
    JournalChanged,
    PeerGarbled,
    PeerSaid,
    PeerWasLost,
    Restored,
    StopFound,
    Stopped,
    TextLoaded,
    Ticked,
    Write,
)
from gmanager.cluster.instances import Instances
from gmanager.cluster.intake import Intake
from gmanager.cluster.membership import Membership
from gmanager.cluster.objectives import Objectives
from gmanager.cluster.parting import Parting
from gmanager.cluster.performance import Costs
from gmanager.cluster.requests import Requests
from gmanager.cluster.stats import assemble
from gmanager.cluster.turn import Turn
from gmanager.config import GManagerConfig
from gmanager.wire import messages as m
from gmanager.wire.peer import PeerId

STALL_S = 3.0
"""If ticks are further apart than this, it is we who were stopped: leases start anew."""


class Cluster:
    """Cells, clients and requests of one gManager."""

    def __init__(self, config: GManagerConfig, *, term: int = 0, identity: int = 0) -> None:
        """`term`: of the journal; 0: there is none. `identity`: of the journal, or of this gManager; no other has it."""
        self._config = config
        self._term = term
        self._turn = turn = Turn()
        self._ticked_at: float | None = None
        self._num_dropped = 0
        objectives = Objectives(ttft_s=config.slo_ttft_s, tpot_s=config.slo_tpot_s)
        self._requests = Requests(turn.emit, clock=lambda: turn.now, term=term, objectives=objectives)
        self._cells = Cells()
        self._parting = Parting(turn)
        self._intake = Intake(config, self._requests, self._cells, turn)
        self._clients = Clients(config, self._requests, self._intake, self._cells, self._parting, turn)
        self._membership = Membership(
            config, self._requests, self._cells, self._parting, turn, self._on_formed, term=term, identity=identity
        )
        self._instances = Instances(self._membership, self._cells, self._parting, turn)

    def restore(self, requests: Iterable[Restored], now: float) -> None:
        """Go on with the requests of the gManager before, in order of their numbers. Before any event. Raises ValueError."""
        self._turn.now = now
        for restored in requests:
            self._intake.restore(restored)

    def restore_costs(self, costs: Mapping[str, Costs]) -> None:
        """Go on with what the gManager before knew of how long steps take. Before any event."""
        self._cells.restore_costs(costs)

    def handle(self, event: Event) -> list[Action]:
        """Take one event in. The actions are to be done in this order."""
        self._turn.now = event.now
        match event:
            case PeerSaid():
                self._on_message(event)
            case PeerGarbled(peer=peer, reason=reason):
                self._on_garbled(peer, reason)
            case PeerWasLost(peer=peer, reason=reason):
                self._on_lost(peer, reason)
                self._turn.emit(Forget(peer))
            case ClientFull(peer=peer):
                self._clients.on_full(peer)
            case ClientEmpty(peer=peer, lacks=lacks):
                self._clients.on_empty(peer, lacks)
            case TextLoaded(cell=number, error=error):
                self._membership.on_text_loaded(number, error)
            case Encoded():
                self._intake.on_encoded(event)
            case StopFound(request=number, generated=generated):
                self._intake.on_stop_found(number, generated)
            case JournalChanged(failure=failure):
                self._intake.unwritten = failure
            case Ticked():
                self._on_tick()
            case Stopped(reason=reason):
                self._on_stop(reason)
        for sequences in self._cells.sequences.values():
            sequences.advance()
        self._membership.let_go()
        return self._turn.end()

    # --- peers --------------------------------------------------------------------------------------------------------

    def _on_message(self, event: PeerSaid) -> None:
        peer, message = event.peer, event.message
        if peer in self._clients:
            self._clients.hear(peer)
            if isinstance(message, m.GetStats):
                self._turn.send(peer, m.StatsReply(call=message.call, stats=self.stats()))
            else:
                self._clients.on_message(event)
        elif peer in self._membership:
            self._instances.on_message(peer, message)
        elif peer in self._parting and not (isinstance(message, m.Register) and self._parting.may_register(peer)):
            self._num_dropped += 1
        elif isinstance(message, m.Hello):
            self._clients.on_hello(peer, message)
        elif isinstance(message, m.Register):
            self._membership.register(peer, message)
        elif hasattr(message, "epoch"):
            self._num_dropped += 1
            self._parting.expel(peer, "this instance is not registered here (any more)")
        else:
            # a client that was taken for gone, and goes on where it stood still, is to come again
            reason = f"the first message must be Hello or Register, not {type(message).__name__}"
            self._parting.part(peer, m.Refused(reason=reason, may_return=isinstance(message, m.FromClient)))

    def _on_garbled(self, peer: PeerId, reason: str) -> None:
        if peer in self._membership:
            self._instances.on_garbled(peer, reason)
            return
        self._num_dropped += 1
        if peer not in self._parting:
            self._turn.log(logging.WARNING, "unreadable message", reason=reason)
            self._clients.end(peer)
            self._parting.refuse_unreadable(peer, reason)

    def _on_lost(self, peer: PeerId, reason: str) -> None:
        self._parting.forget(peer)
        if peer in self._membership:
            _, member = self._membership[peer]
            self._membership.lose(peer, f"{member.name} is lost: {reason}")
        elif peer in self._clients:
            self._turn.log(logging.INFO, "client lost", reason=reason)
            self._clients.lose(peer)

    def _on_formed(self) -> None:
        """There is another cell that requests can be bound to."""
        self._clients.attach_waiting()
        self._intake.bind()

    # --- time ---------------------------------------------------------------------------------------------------------

    def _on_tick(self) -> None:
        now = self._turn.now
        if self._ticked_at is not None and now - self._ticked_at > STALL_S:
            self._turn.log(logging.WARNING, "gManager stood still", seconds=round(now - self._ticked_at, 1))
            self._clients.renew_leases()
            self._membership.renew_leases()
        self._ticked_at = now
        for sequences in self._cells.sequences.values():
            sequences.look_again()
        self._clients.end_leases()
        self._membership.end_leases()
        self._parting.end_leases(self._config.client_lease_s)
        self._membership.look_after()
        self._clients.end_attaching()
        self._intake.end_overdue()
        for measured in self._cells.refit(now):
            self._turn.emit(Write(measured))

    def _on_stop(self, reason: str) -> None:
        if self._term:
            return  # the next gManager of the journal goes on with all of it, as if this one had been killed
        for request in self._requests.live():
            self._intake.end(request, "error", reason)
        for cell in self._cells:
            self._membership.fail(cell, reason)

    # --- for others to see --------------------------------------------------------------------------------------------

    def stats(self) -> m.Stats:
        """The service's state now."""
        dropped = self._num_dropped + self._instances.num_dropped
        own = m.Counters.sum(m.Counters(dropped_messages=dropped), self._cells.counters())
        requests = self._requests.stats()
        return assemble(self._cells, self._cells.sequences, requests, own, self._requests.observed.observations())

    @property
    def is_idle(self) -> bool:
        """Whether no request is live and no instance holds anything for one."""
        return not len(self._requests) and all(sequences.is_idle for sequences in self._cells.sequences.values())

    def validate(self) -> None:
        """Raises RuntimeError if the books contradict each other. Tests call it after every event."""
        self._requests.validate()
        self._membership.validate()
        roles = [*self._clients.peers, *self._membership.peers, *self._parting.peers]
        if len(set(roles)) != len(roles):
            raise RuntimeError("a peer has two roles")
        for sequences in self._cells.sequences.values():
            sequences.validate()
        self._clients.validate()
        self._intake.validate()
