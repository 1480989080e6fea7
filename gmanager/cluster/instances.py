"""What instances say, and whom it concerns: the membership of their cell, or the sequences that run in it."""

import logging
from collections.abc import Iterable

from gmanager.cluster import drains
from gmanager.cluster.cells import Cells
from gmanager.cluster.member import Member
from gmanager.cluster.membership import Membership
from gmanager.cluster.parting import Parting
from gmanager.cluster.sequences import Sequences
from gmanager.cluster.turn import Turn
from gmanager.wire import messages as m
from gmanager.wire.peer import PeerId

WRONG_TOKENS = "token ids must be in [0, 4294967296)"
WRONG_RUNS = "runs must ascend, and fit an instance"


class Instances:
    """Those that have registered."""

    def __init__(self, membership: Membership, cells: Cells, parting: Parting, turn: Turn) -> None:
        self.num_dropped = 0
        """Messages that meant nothing here."""
        self._membership = membership
        self._cells = cells
        self._parting = parting
        self._turn = turn

    def on_garbled(self, peer: PeerId, reason: str) -> None:
        """One said what is no message, or can't be: it can't go on."""
        self.num_dropped += 1
        self._turn.log(logging.WARNING, "unreadable message", reason=reason)
        _, member = self._membership[peer]
        self._membership.lose(peer, f"{member.name} sent what can't be read: {reason}")
        self._parting.refuse_unreadable(peer, reason)

    def on_message(self, peer: PeerId, message: m.Message) -> None:
        """One says something."""
        cell, member = self._membership[peer]
        member.heard_at = self._turn.now
        member.num_outputs += isinstance(message, m.Outputs)
        if isinstance(message, m.Ping):
            self._turn.send(member.peer, m.Pong(outputs=member.num_outputs))
        elif isinstance(message, m.Leave):
            how, level = ("failed", logging.ERROR) if message.failed else ("left", logging.INFO)
            self._membership.lose(member.peer, f"{member.name} {how}: {message.reason}", level)
            self._parting.part(member.peer)
        elif isinstance(message, m.Text):
            cell.set_text(member, message.assets)
        elif isinstance(message, m.AskDrain):
            reason = drains.why_not(cell, member)
            member.is_asking = reason is None
            if reason is not None:
                self._turn.send(member.peer, m.NotDrained(reason=reason))
                return
            drains.begin(cell, member, self._cells.sequences[cell.name], self._turn.emit)
        elif getattr(message, "epoch", None) != cell.epoch:
            self.num_dropped += 1
        elif isinstance(message, m.StoreOpened):
            cell.set_store(member, message.address, self._membership.wanted(cell))
        elif isinstance(message, m.Kept):
            if _have_wrong_tokens(message.unheard):
                self.on_garbled(member.peer, WRONG_TOKENS)
                return
            cell.set_kept(member, message)
            self._membership.go_on(cell)
        elif isinstance(message, m.Joined):
            cell.set_joined(member, shares_feeds=message.shares_feeds)
            self._membership.check_ready(cell)
        elif isinstance(message, m.LinkLost):
            cell.set_link_lost(member, message.rank, message.reason, self._turn.now)
        elif isinstance(message, m.EpochBroken):
            if cell.phase != "suspending":
                self._membership.on_broken(cell, member, message.reason)
        elif isinstance(message, m.Beat):
            is_news = cell.hear(member, message)
            self.num_dropped += cell.performance.take(member.id, message.samples)
            if cell.is_ready:
                self._cells.sequences[cell.name].on_beat(member, message, is_news)
            self._turn.send(member.peer, m.Pong(outputs=member.num_outputs))
        elif cell.is_ready:
            self._on_running(self._cells.sequences[cell.name], member, message)
        else:
            self.num_dropped += 1

    def _on_running(self, sequences: Sequences, member: Member, message: m.Message) -> None:
        match message:
            case m.Granted() as granted:
                sequences.on_granted(member, granted)
            case m.NotGranted() as refused:
                sequences.on_not_granted(member, refused)
            case m.Cached() as cached:
                if not sequences.on_cached(member, cached):
                    self.on_garbled(member.peer, WRONG_RUNS)
            case m.Fetched() as fetched:
                sequences.on_fetched(member, fetched)
            case m.Outputs(outputs=outputs) if _have_wrong_tokens(outputs):
                self.on_garbled(member.peer, WRONG_TOKENS)
            case m.Outputs() as outputs:
                sequences.on_outputs(member, outputs)
                sequences.settle(self._turn.now)
            case m.Scored() as scored:
                sequences.on_scored(member, scored)
                sequences.settle(self._turn.now)
            case m.NeedBlock(seq=seq):
                sequences.on_need_block(member, seq)
            case m.HomeMoved(seq=seq, home=home):
                sequences.on_home_moved(seq, home)
            case m.Released() as released:
                sequences.on_released(released, self._turn.now)
            case m.RunOffered() | m.Copied() | m.RunMoved():
                sequences.on_move(member, message)
            case _:
                self.num_dropped += 1


def _have_wrong_tokens(parts: Iterable[m.SequenceOutput | m.Unheard]) -> bool:
    return any(not 0 <= token < 2**32 for part in parts for token in part.token_ids)
