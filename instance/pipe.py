"""The way of a step's rows through the stages of an instance: from each to the next, and from the last back to the first.

    stage 0  --rows_TE-->  stage 1  --rows_TE-->  ...  --rows_TE-->  last stage
       ^------------------------- back_RE -------------------------------'

What comes back are the rows whose logits are wanted, or one that says no more than that all stages have run the step: its KV
is written, everywhere. Both ways have a communicator of their own, so that the next step's rows don't wait for those that come
back. All ranks of one part run the same steps of a lane in the same order.

Shape suffixes: T rows of a step, R of them that come back, E hidden size.
"""

from collections import deque

import torch

from distattn.exchange import Exchange, Transfer
from instance.split import Place


class Pipe:
    """One rank's ends of it, in one lane."""

    def __init__(
        self, rows: Exchange, back: Exchange, place: Place, *, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`rows`, `back`: over the ranks of the same part, whose ranks are their stages."""
        self.place = place
        self._rows = rows
        self._back = back
        self._size = hidden_size
        self._dtype = dtype
        self._device = device
        self._under_way: deque[tuple[Transfer, torch.Tensor]] = deque()
        """With what is sent."""

    def receive(self, num_rows: int) -> torch.Tensor:
        """`[T, E]` of the stage before. Raises ExchangeError."""
        return self._take(self._rows, self.place.stage - 1, num_rows)

    def send(self, rows_TE: torch.Tensor) -> None:
        """To the next stage; from then on the rows are its. Raises ExchangeError."""
        self._give(self._rows, self.place.stage + 1, rows_TE)

    def take_back(self, num_rows: int) -> torch.Tensor:
        """`[R, E]` of the last stage. Raises ExchangeError."""
        return self._take(self._back, self.place.stages - 1, num_rows)

    def give_back(self, rows_RE: torch.Tensor) -> None:
        """To the first stage; from then on the rows are its. Raises ExchangeError."""
        self._give(self._back, 0, rows_RE)

    def token(self) -> torch.Tensor:
        """A row that only says that it comes."""
        return torch.zeros((1, self._size), dtype=self._dtype, device=self._device)

    def _take(self, exchange: Exchange, source: int, num_rows: int) -> torch.Tensor:
        rows = torch.empty((num_rows, self._size), dtype=self._dtype, device=self._device)
        exchange.start([], [(rows, {source: num_rows})]).wait()
        return rows

    def _give(self, exchange: Exchange, target: int, rows: torch.Tensor) -> None:
        """It may be taken while the next step runs, and no later: so a stage is never further ahead."""
        rows = rows.contiguous()
        self._under_way.append((exchange.start([(rows, {target: len(rows)})], []), rows))
        while len(self._under_way) > 1:
            transfer, _ = self._under_way[0]
            transfer.wait()
            self._under_way.popleft()
