"""Rows from stage to stage by copies into each other's memory (CUDA IPC), where the ranks' GPUs reach it.

Each rank has places for the steps that come to it, which are used in turn, and words: of each step that has come, written by
who gives, and of each of its own that was taken, written by who takes. Streams wait for them, no kernel does
(`kernels.stream_words`): NCCL's, which hold processors until the other end is there, made products beside them take twice as
long.

A step has a word of its own among `WORDS`, so that what ends all waits (`abort`) is never overwritten for a step that doesn't
come any more: only its own word would let it go on, too.

Shape suffixes: P places, T rows, E hidden size.
"""

import torch

from distattn.exchange import Store
from distattn.ipc import share_memory
from instance.pipe import Pipe
from instance.split import Place
from kernels.stream_words import StreamWords, stream_of_its_own

PLACES = 2
WORDS = 64
"""More than the steps that are ever under way."""
_ARRIVED, _TAKEN, _ROWS = 0, 4 * WORDS, 8 * WORDS
"""Where the words and the places begin, in bytes."""
_FAR = 2**30
"""Ahead of any step that is waited for."""


class MemoryPipe(Pipe):
    """Of one lane."""

    def __init__(
        self, place: Place, *, store: Store, most_rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """All stages of the same part call this together, and meet once more before they use it. `most_rows`: of a step.

        Raises DriverError or another RuntimeError if memory can't be shared.
        """
        super().__init__(place, hidden_size=hidden_size, dtype=dtype, device=device)
        self._words = StreamWords()
        self._abort_stream = stream_of_its_own(device, "abort")
        self._most_rows = most_rows
        nbytes = _ROWS + PLACES * most_rows * hidden_size * dtype.itemsize
        self._memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self._others = share_memory(self._memory, store, "stages", rank=place.stage, size=place.stages)
        self._inbox_PTE = self._places(self._memory)
        self._next_PTE = self._places(self._others[self.next])
        self._given = self._taken = 0

    def take(self, num_rows: int) -> torch.Tensor:
        at, self._taken = self._taken % PLACES, self._taken + 1
        self._words.wait(_word(self._memory, _ARRIVED, self._taken), self._taken)
        rows_TE = self._inbox_PTE[at, :num_rows].clone()
        self._words.write(_word(self._others[self.before], _TAKEN, self._taken), self._taken)
        return rows_TE

    def give(self, rows_TE: torch.Tensor) -> None:
        if len(rows_TE) > self._most_rows:
            raise ValueError(f"{len(rows_TE)} rows go to the next stage, which has room for {self._most_rows}")
        at, self._given = self._given % PLACES, self._given + 1
        if (before := self._given - PLACES) > 0:
            self._words.wait(_word(self._memory, _TAKEN, before), before)
        self._next_PTE[at, : len(rows_TE)].copy_(rows_TE)
        self._words.write(_word(self._others[self.next], _ARRIVED, self._given), self._given)

    def abort(self) -> None:
        """End every wait, present and to come: the epoch is over, and what its steps still compute means nothing."""
        with torch.cuda.stream(self._abort_stream):
            for words, count in ((_ARRIVED, self._taken), (_TAKEN, self._given)):
                for word in range(WORDS):
                    self._words.write(_word(self._memory, words, word), count + _FAR)

    def _places(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[_ROWS:].view(self._dtype).view(PLACES, self._most_rows, self._size)


def _word(memory: torch.Tensor, words: int, step: int) -> int:
    """The address of a step's word."""
    return memory.data_ptr() + words + 4 * (step % WORDS)
