"""The way of a step's rows through the stages of an instance: from each to the next, and from the last back to the first.

    stage 0  --rows_TE-->  stage 1  --rows_TE-->  ...  --rows_TE-->  last stage
       ^------------------------- rows_RE -------------------------------'

What comes back are the rows whose logits are wanted, or one that says no more than that all stages have run the step: its KV
is written, everywhere. All ranks of one part run the same steps of a lane in the same order, so a rank gives to one other, and
takes from one.

Shape suffixes: T rows of a step, R of them that come back, E hidden size.
"""

from abc import ABC, abstractmethod
from collections import deque

import torch

from distattn.exchange import Exchange, Transfer
from instance.split import Place


class Pipe(ABC):
    """One rank's ends of it, in one lane."""

    def __init__(self, place: Place, *, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.place = place
        self.before = (place.stage - 1) % place.stages
        self.next = (place.stage + 1) % place.stages
        self._size = hidden_size
        self._dtype = dtype
        self._device = device

    @abstractmethod
    def take(self, num_rows: int) -> torch.Tensor:
        """`[T, E]` of the stage before, or in the first `[R, E]` of the last. Raises ExchangeError."""

    @abstractmethod
    def give(self, rows_TE: torch.Tensor) -> None:
        """To the next stage, or from the last to the first. Raises ExchangeError."""

    def token(self) -> torch.Tensor:
        """A row that only says that it comes."""
        return torch.zeros((1, self._size), dtype=self._dtype, device=self._device)


class ExchangePipe(Pipe):
    """By messages of a process group: of rows, or of bytes with which hosts tell each other of rows (`instance.pipe_memory`).
    What goes on and what comes back have a communicator each, so that the next step's rows don't wait for those that come
    back."""

    def __init__(
        self, rows: Exchange, back: Exchange, place: Place, *, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`rows`, `back`: over the ranks of the same part, whose ranks are their stages."""
        super().__init__(place, hidden_size=hidden_size, dtype=dtype, device=device)
        self._taking = rows if place.stage else back
        self._giving = back if place.is_last else rows
        self._under_way: deque[tuple[Transfer, torch.Tensor]] = deque()
        """With what is sent."""

    def take(self, num_rows: int) -> torch.Tensor:
        rows = torch.empty((num_rows, self._size), dtype=self._dtype, device=self._device)
        self._taking.start([], [(rows, {self.before: num_rows})]).wait()
        return rows

    def give(self, rows_TE: torch.Tensor) -> None:
        """From then on the rows are its. They may be taken while the next step runs, and no later: so a stage is never further
        ahead."""
        rows = rows_TE.contiguous()
        self._under_way.append((self._giving.start([(rows, {self.next: len(rows)})], []), rows))
        while len(self._under_way) > 1:
            transfer, _ = self._under_way[0]
            transfer.wait()
            self._under_way.popleft()
