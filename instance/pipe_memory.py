"""Rows from stage to stage by copies into each other's memory (CUDA IPC), where the ranks' GPUs reach it.

Each rank has places for the steps that come to it, which are used in turn, and two counts: of those that have come, written by
who gives, and of those of its own that were taken, written by who takes. Streams wait for them, no kernel does
(`kernels.stream_words`): NCCL's, which hold processors until the other end is there, made products beside them take twice as
long.

Shape suffixes: P places, T rows, E hidden size.
"""

from typing import Any

import torch

from distattn.exchange import Store
from distattn.ipc import share_memory
from instance.pipe import Pipe
from instance.split import Place
from kernels.stream_words import StreamWords

PLACES = 2
_ALIGNMENT = 256
_ARRIVED, _TAKEN = 0, 4
"""Where the counts lie, in bytes; the places begin at `_ALIGNMENT`."""
_ABORTED = 2**30
"""More than any count."""


class MemoryPipe(Pipe):
    """Of one lane."""

    def __init__(
        self, place: Place, *, store: Store, most_rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """All stages of the same part call this together, and meet once more before they use it. `most_rows`: of a step.

        Raises NoStreamWords or another RuntimeError if memory can't be shared.
        """
        super().__init__(place, hidden_size=hidden_size, dtype=dtype, device=device)
        self._words = StreamWords()
        self._most_rows = most_rows
        nbytes = _ALIGNMENT + PLACES * most_rows * hidden_size * dtype.itemsize
        self._memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self._others = share_memory(self._memory, store, "stages", rank=place.stage, size=place.stages)
        self._inbox_PTE = self._places(self._memory)
        self._next_PTE = self._places(self._others[self.next])
        self._given = self._taken = 0
        new: Any = torch.cuda.Stream  # its constructor has no types
        self._abort_stream: torch.cuda.Stream = new(device)

    def take(self, num_rows: int) -> torch.Tensor:
        at, self._taken = self._taken % PLACES, self._taken + 1
        self._words.wait(self._memory.data_ptr() + _ARRIVED, self._taken)
        rows_TE = self._inbox_PTE[at, :num_rows].clone()
        self._words.write(self._others[self.before].data_ptr() + _TAKEN, self._taken)
        return rows_TE

    def give(self, rows_TE: torch.Tensor) -> None:
        if len(rows_TE) > self._most_rows:
            raise ValueError(f"{len(rows_TE)} rows go to the next stage, which has room for {self._most_rows}")
        at, self._given = self._given % PLACES, self._given + 1
        if self._given > PLACES:
            self._words.wait(self._memory.data_ptr() + _TAKEN, self._given - PLACES)
        self._next_PTE[at, : len(rows_TE)].copy_(rows_TE)
        self._words.write(self._others[self.next].data_ptr() + _ARRIVED, self._given)

    def abort(self) -> None:
        """End every wait that there is: the epoch is over, and what its steps still compute means nothing. To be called again
        while anything waits: another stage may have told of a step after this."""
        with torch.cuda.stream(self._abort_stream):
            for count in (_ARRIVED, _TAKEN):
                self._words.write(self._memory.data_ptr() + count, _ABORTED)

    def _places(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[_ALIGNMENT:].view(self._dtype).view(PLACES, self._most_rows, self._size)
