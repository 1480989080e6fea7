"""What a relocation is predicted to gain: tokens per second of the instances that it concerns, before and after.

An instance's decode step takes what the cell's performance model says of its rows, the KV that they attend to there and the
rows that travel. Instances that share a sequence step together, so each counts with the slowest of those that the relocation
concerns.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from gmanager.cluster.performance import Costs
from gmanager.cluster.placement import RESERVE_BLOCKS, InstanceView
from gmanager.cluster.policies.base import NewHolder, NewHome, Outlook, Relocation, SequenceView

MIN_GAIN = 0.05
"""Of the throughput, below which nothing is copied: no prediction is better than that."""
HOMES_APART = 8
"""Rows that an instance has more than another for a home to go there: one home more or less gains little, and costs nothing but
a step; so this alone keeps homes from going to and fro."""


def best_of(options: Iterable[tuple[float, Relocation]]) -> Relocation | None:
    """The one with the largest gain, the first of equals; None: none gains enough."""
    best, most = None, 0.0
    for gain, relocation in options:
        if gain > most:
            best, most = relocation, gain
    return best


def concerned(sequence: SequenceView, relocation: Relocation) -> set[int]:
    """Ranks whose steps change."""
    return {sequence.home, relocation.to, *sequence.held}


def after(views: Mapping[int, InstanceView], sequence: SequenceView, relocation: Relocation) -> dict[int, InstanceView]:
    """The same instances once it is done."""
    new = dict(views)

    def change(rank: int, *, rows: int = 0, held: int = 0, sent: int = 0, served: int = 0) -> None:
        view = new[rank]
        new[rank] = replace(
            view, rows=view.rows + rows, held=view.held + held, sent=view.sent + sent, served=view.served + served
        )

    holders = {rank for rank, tokens in sequence.held.items() if tokens}
    if isinstance(relocation, NewHome):
        old, to = sequence.home, relocation.to
        change(old, rows=-1, sent=-len(holders - {old}), served=int(old in holders))
        change(to, rows=1, sent=len(holders - {to}), served=-int(to in holders))
    else:
        source, to, home = relocation.source, relocation.to, sequence.home
        tokens = sequence.held[source]
        change(source, held=-tokens, served=-1)
        change(to, held=tokens, served=int(to != home and to not in holders))
        change(home, sent=len(((holders - {source}) | {to}) - {home}) - len(holders - {home}))
    return new


def throughput(views: Mapping[int, InstanceView], costs: Costs, before: Mapping[int, InstanceView] | None = None) -> float:
    """Tokens per second of instances that step together.

    `before`: how they were. An exchange costs a step the same however many rows need it; of that each of these bears its part,
    so that it pays to bring one home of many that must all come before anything is won.
    """
    before = views if before is None else before

    def seconds(view: InstanceView) -> float:
        now, then = view.sent + view.served, before[view.rank].sent + before[view.rank].served
        exchange_s = costs.decode.exchange_s
        saved_s = exchange_s * (1 - now / then) if 0 < now < then else 0.0
        return costs.decode_step_s(view.rows, view.held, view.sent, view.served) - saved_s

    slowest = max(map(seconds, views.values()))
    return sum(view.rows for view in views.values()) / slowest if slowest > 0 else 0.0


def apart(views: Iterable[InstanceView], costs: Costs) -> float:
    """Tokens per second of instances each of which steps by itself: nothing travels."""
    each = (replace(view, sent=0, served=0) for view in views)
    return sum(view.rows / step_s(view, costs) for view in each if view.rows)


def together(views: Iterable[InstanceView], costs: Costs) -> float:
    """Tokens per second of instances that share a sequence: all step with the slowest, which is one that computes a prompt."""
    rows, slowest = 0, 0.0
    for view in views:
        rows, slowest = rows + view.rows, max(slowest, step_s(view, costs))
    return rows / slowest if rows else 0.0


def step_s(view: InstanceView, costs: Costs) -> float:
    """Of a decode step, beside a prompt if one runs there."""
    return costs.decode_step_s(view.rows, view.held, view.sent, view.served, beside=view.backlog > 0)


def tied(views: Sequence[InstanceView], home: int, shares: Mapping[int, int]) -> list[InstanceView]:
    """Of these instances, those that a new sequence lies on, as they are then: `shares`, rank -> tokens."""
    others = len(shares) - 1
    return [
        replace(
            views[rank],
            rows=views[rank].rows + (rank == home),
            held=views[rank].held + tokens,
            sent=views[rank].sent + (others if rank == home else 0),
            served=views[rank].served + (rank != home),
        )
        for rank, tokens in shares.items()
    ]


def relative_gain(sequence: SequenceView, relocation: Relocation, outlook: Outlook) -> float:
    """By which part the throughput of those that it concerns grows, less what a copy takes of the time that is left."""
    views = {rank: outlook.views[rank] for rank in sorted(concerned(sequence, relocation))}
    before = throughput(views, outlook.costs)
    then = throughput(after(views, sequence, relocation), outlook.costs, views)
    if before <= 0 or then <= 0:
        return 0.0
    gain = then / before - 1
    if isinstance(relocation, NewHome):
        return gain
    seconds_left = sequence.left * sum(view.rows for view in views.values()) / before
    gain -= outlook.costs.transfer_s(sequence.held[relocation.source]) / seconds_left
    return gain if gain >= MIN_GAIN else 0.0


def homes_among_holders(sequence: SequenceView, outlook: Outlook) -> list[NewHome]:
    """Homes that it could have without another holder, where some of its KV lies, and where much less decodes."""
    if not sequence.can_move:
        return []
    most = outlook.views[sequence.home].rows - HOMES_APART
    rooms = (outlook.views[rank] for rank in sorted(sequence.held) if outlook.views[rank].rows <= most)
    return [NewHome(sequence.seq, v.rank) for v in rooms if v.free_blocks >= RESERVE_BLOCKS and v.homes < v.max_homes]


def copies_home(sequence: SequenceView, outlook: Outlook, sources: Collection[int]) -> list[NewHolder]:
    """Runs of these ranks that its home has room for, and a block more for each of those that decode there."""
    home = outlook.views[sequence.home]
    free = home.free_blocks - home.homes - RESERVE_BLOCKS
    fits = (rank for rank in sorted(sources) if outlook.blocks_for(sequence.held.get(rank, 0)) <= free)
    return [NewHolder(sequence.seq, rank, sequence.home) for rank in fits if sequence.held.get(rank)]
