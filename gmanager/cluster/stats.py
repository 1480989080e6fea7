"""The service's statistics, put together from what the instances said last."""

from collections.abc import Iterable, Mapping

from gmanager.cluster.cell import Cell
from gmanager.cluster.member import Member
from gmanager.cluster.performance import Lane, PerformanceModel
from gmanager.cluster.sequences import Sequences
from gmanager.wire import footprint
from gmanager.wire.messages import (
    CellPerformance,
    CellStats,
    Counters,
    InstanceStats,
    LanePerformance,
    Observations,
    RequestStats,
    Stats,
)


def assemble(
    cells: Iterable[Cell],
    sequences: Mapping[str, Sequences],
    requests: dict[str, RequestStats],
    own: Counters,
    observed: Observations,
) -> Stats:
    """`sequences`: of the ready cells, by name. `own`: the gManager's counters."""
    cells = sorted(cells, key=lambda cell: cell.name)
    instances = [stats for cell in cells if cell.name in sequences for stats in _instances(cell, sequences[cell.name])]
    return Stats(
        epoch=max((cell.epoch for cell in cells), default=0),
        cells=[_cell(cell) for cell in cells],
        instances=instances,
        requests=requests,
        counters=Counters.sum(own, *(stats.counters for stats in instances), *(cell.counted for cell in cells)),
        observed=observed,
    )


def _cell(cell: Cell) -> CellStats:
    return CellStats(
        name=cell.name,
        epoch=cell.epoch,
        state="ready" if cell.is_ready else "changing" if cell.is_formed else "forming",
        size=cell.size,
        model=cell.spec.model,
        block_size=cell.spec.block_size,
        max_context=cell.spec.max_context,
        total_tokens=cell.total_tokens,
        other_names=cell.spec.other_names,
        rotary=cell.spec.rotary,
        kv_dtype=cell.spec.kv_dtype,
        performance=_performance(cell.performance),
    )


def _performance(model: PerformanceModel) -> CellPerformance:
    return CellPerformance(prefill=_lane(model, "prefill"), decode=_lane(model, "decode"), copied_us=model.costs.copied_s * 1e6)


def _lane(model: PerformanceModel, lane: Lane) -> LanePerformance:
    costs = model.costs.prefill if lane == "prefill" else model.costs.decode
    return LanePerformance(
        step_us=costs.step_s * 1e6,
        row_us=costs.row_s * 1e6,
        attended_ns=costs.attended_s * 1e9,
        moved_us=costs.moved_s * 1e6,
        exchange_us=costs.exchange_s * 1e6,
        beside=costs.beside,
        samples=model.num_samples(lane),
        error=model.error(lane),
    )


def _instances(cell: Cell, sequences: Sequences) -> list[InstanceStats]:
    lent, borrowed = sequences.lent_and_borrowed()
    members = sorted(enumerate(cell.members), key=lambda ranked: ranked[1].id)
    return [_instance(cell, member, lent[rank], borrowed[rank]) for rank, member in members]


def _instance(cell: Cell, member: Member, lent: int, borrowed: int) -> InstanceStats:
    size, windows = cell.spec.block_size, cell.spec.windows
    total = member.size * size
    free = footprint.held(member.free_blocks, windows) * size
    return InstanceStats(
        cell=cell.name,
        rank=member.id,
        total_tokens=total,
        used_tokens=total - free,
        free_tokens=free,
        lent_tokens=lent,
        borrowed_tokens=borrowed,
        counters=member.counters,
        is_draining=member.is_draining,
        slowness=cell.performance.factor(member.id),
        cached_tokens=footprint.held(member.cached_blocks, windows) * size,
        host_tokens=min(member.host_blocks * size, 2**63 - 1),
        disk_tokens=min(member.disk_blocks * size, 2**63 - 1),
        role=member.register.role,
    )
