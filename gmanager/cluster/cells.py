"""All cells there are, what runs in those that serve or change, and which of them serves what."""

import hashlib
from collections.abc import Iterator, Mapping

import msgspec

from gmanager.cluster.cell import Cell
from gmanager.cluster.events import Measured
from gmanager.cluster.performance import Costs
from gmanager.cluster.request import Request
from gmanager.cluster.sequences import Sequences
from gmanager.wire.messages import Counters, InstanceSpec, TextAssets

KEEP_S = 10.0
"""Least time between two times that a cell's costs are written down."""


class Cells:
    """By name. Whose cell is formed has Sequences."""

    def __init__(self) -> None:
        self._cells: dict[str, Cell] = {}
        self._sequences: dict[str, Sequences] = {}
        self._counted = Counters()
        """Of cells that are over."""
        self._costs: dict[str, Costs] = {}
        """What cells of a kind were found to cost."""
        self._kept_at: dict[str, float] = {}

    def __iter__(self) -> Iterator[Cell]:
        """Over those that are there now, whatever becomes of them meanwhile."""
        return iter(list(self._cells.values()))

    def __getitem__(self, name: str) -> Cell:
        return self._cells[name]

    def __contains__(self, cell: Cell) -> bool:
        """Whether it isn't over."""
        return self._cells.get(cell.name) is cell

    def get(self, name: str) -> Cell | None:
        return self._cells.get(name)

    def add(self, cell: Cell) -> None:
        """Its first instance has come."""
        self._cells[cell.name] = cell
        costs = self._costs.get(kind_of(cell.spec))
        if costs is not None:
            cell.performance.restore(costs)

    def form(self, cell: Cell, sequences: Sequences) -> None:
        """It can take requests."""
        self._sequences[cell.name] = sequences

    def remove(self, cell: Cell) -> None:
        """It is over."""
        sequences = self._sequences.pop(cell.name, None)
        if sequences is not None:
            self._counted = Counters.sum(self._counted, _counters(sequences))
        if not cell.performance.is_guess:
            self._costs[kind_of(cell.spec)] = cell.performance.costs
        del self._cells[cell.name]

    # --- what runs in them --------------------------------------------------------------------------------------------

    @property
    def sequences(self) -> dict[str, Sequences]:
        """Of the cells that serve or change, by name."""
        return self._sequences

    def by_number(self, number: int) -> Cell | None:
        return next((cell for cell in self._cells.values() if cell.number == number), None)

    def of(self, request: Request) -> Cell | None:
        """The one to which a request is bound."""
        return self.by_number(request.cell_number)

    def sequences_of(self, request: Request) -> Sequences | None:
        cell = self.of(request)
        return self._sequences.get(cell.name) if cell is not None else None

    def counters(self) -> Counters:
        """What was counted of all there are and were."""
        return Counters.sum(self._counted, *map(_counters, self._sequences.values()))

    # --- how long their steps take ------------------------------------------------------------------------------------

    def restore_costs(self, costs: Mapping[str, Costs]) -> None:
        """What cells of a kind were found to cost before. Before the first cell is there."""
        self._costs |= costs

    def refit(self, now: float) -> Iterator[Measured]:
        """Look again how long steps take, where enough has been heard: what is to be written down of it."""
        for cell in self:
            kind = kind_of(cell.spec)
            if cell.performance.refit(now) and now - self._kept_at.get(kind, float("-inf")) >= KEEP_S:
                self._kept_at[kind] = now
                self._costs[kind] = cell.performance.costs
                yield Measured(kind=kind, costs=self._costs[kind])

    # --- what they serve ----------------------------------------------------------------------------------------------

    def serving(self, model: str | None) -> list[Cell]:
        """Those that serve a model of that name, or will; if there is none, those that have it as another name of theirs. None:
        all."""
        if model is None:
            return list(self)
        named = [cell for cell in self if cell.spec.model == model]
        return named or [cell for cell in self if model in cell.spec.other_names]

    def formed(self, model: str | None) -> list[Cell]:
        """Those of them to which requests can be bound."""
        return [cell for cell in self.serving(model) if cell.is_formed]

    def assets(self, name: str | None) -> TextAssets | None:
        """Of the cell of that name, or of any, if it is formed."""
        formed = (cell for cell in self if cell.is_formed and name in (None, cell.name))
        return next((cell.assets for cell in formed if cell.assets is not None), None)


def kind_of(spec: InstanceSpec) -> str:
    """The same for cells whose steps should take the same time: of one model, computed in one way on one kind of device."""
    return hashlib.sha256(msgspec.msgpack.encode((spec.fingerprint, spec.number_types, spec.layers, spec.device))).hexdigest()


def _counters(sequences: Sequences) -> Counters:
    return Counters(
        preemptions=sequences.num_preemptions,
        moves_failed=sequences.num_moves_failed,
        dropped_messages=sequences.num_dropped,
    )
