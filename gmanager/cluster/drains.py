"""Instances that are emptied and then leave: who is meant, whether that can be, and who waits for it."""

import logging
from collections.abc import Iterable

from gmanager.cluster.cell import Cell
from gmanager.cluster.events import Emit, Log, Send
from gmanager.cluster.member import Member
from gmanager.cluster.sequences import Sequences
from gmanager.wire.messages import CallFailed, Done, Drain, NotDrained
from gmanager.wire.peer import PeerId


def find(cells: Iterable[Cell], drain: Drain) -> tuple[Cell, Member] | str:
    """The instance that a client means, or why there is none."""
    named = [cell for cell in cells if drain.cell in (None, cell.name)]
    if drain.cell is not None and not named:
        return f"there is no cell {drain.cell[:100]!r}"
    found = [(cell, member) for cell in named for member in cell.everybody if member.id == drain.instance]
    if len(found) == 1:
        return found[0]
    if found:
        return f"cells {', '.join(cell.name for cell, _ in found)} have an instance {drain.instance} each: name one"
    there = [f"cell '{cell.name}' has {', '.join(str(m.id) for m in cell.everybody if m.id >= 0) or 'none'}" for cell in named]
    return f"there is no instance {drain.instance}; {'; '.join(there) or 'there is no cell'}"


def why_not(cell: Cell, member: Member) -> str | None:
    """Why an instance can't be drained; None if it can, or is being drained."""
    if not cell.is_formed:
        return f"cell '{cell.name}' is forming"
    if not member.is_draining and not [other for other in cell.everybody if other is not member and not other.is_draining]:
        leaving = len(cell.everybody) - 1
        others = f": the {leaving} others are being drained" if leaving else ""
        return f"instance {member.id} is the last of cell '{cell.name}'{others}"
    return None


def begin(cell: Cell, member: Member, sequences: Sequences, emit: Emit) -> None:
    """Empty an instance, if that hasn't begun."""
    if not member.is_draining:
        emit(Log(logging.INFO, "instance drains", {"cell": cell.name, "instance": member.id}))
        member.is_draining = True
        sequences.resume()


def answer(member: Member, emit: Emit, failure: str | None) -> None:
    """Tell who waits for it that the instance has left, or why it won't."""
    for peer, call in member.drain_calls:
        emit(Send(peer, Done(call=call) if failure is None else CallFailed(call=call, reason=failure)))
    member.drain_calls.clear()


def forget(members: Iterable[Member], client: PeerId) -> None:
    """A client waits for nothing any more."""
    for member in members:
        member.drain_calls = [(peer, call) for peer, call in member.drain_calls if peer != client]


def call_off(cell: Cell, emit: Emit) -> None:
    """If none would be left, those that are being drained stay; who has asked for it itself may end all the same."""
    if not all(member.is_draining for member in cell.everybody):
        return
    for member in cell.everybody:
        member.is_draining = False
        reason = f"instance {member.id} can't be drained any more: no other is left in cell '{cell.name}'"
        answer(member, emit, reason)
        if member.is_asking:
            emit(Send(member.peer, NotDrained(reason=reason)))
