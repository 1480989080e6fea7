"""Rows from stage to stage by copies into each other's memory (CUDA IPC), where the ranks' GPUs reach it.

Each rank has places for the steps that come to it, which are used in turn, and words: of each step that has come, written by
who gives. Streams wait for them, no kernel does (`kernels.stream_words`): NCCL's, which hold processors until the other end is
there, made products beside them take twice as long.

A stream waits only for what the other end has queued already, which its host says by a message. A call on the host may wait for
all that the device was given, as one does that loads a kernel when it is first used (CUDA programming guide, "Lazy Loading",
"Potential Hazards"); were that to wait for what another process is yet to queue, and that process for us, neither would go on.

A step has a word of its own among `WORDS`, so that what ends all waits (`abort`) is never overwritten for a step that doesn't
come any more: only its own word would let it go on, too.

Shape suffixes: P places, T rows, E hidden size.
"""

import torch

from distattn.exchange import Store
from distattn.ipc import share_memory
from instance.pipe import Pipe
from instance.pipelining import under_way
from instance.split import Place
from kernels.stream_words import StreamWords, stream_of_its_own

WORDS = 64
"""More than the steps that are ever under way."""
_ROWS = 4 * WORDS
"""Where the places begin, in bytes."""
_FAR = 2**30
"""Ahead of any step that is waited for."""


class MemoryPipe(Pipe):
    """Of one lane."""

    def __init__(
        self,
        place: Place,
        *,
        told: Pipe,
        store: Store,
        most_rows: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """All stages of the same part call this together, and meet once more before they use it.

        `told`: between the hosts. `most_rows`: of a step. Raises DriverError or another RuntimeError if memory can't be shared.
        """
        super().__init__(place, hidden_size=hidden_size, dtype=dtype, device=device)
        self._told = told
        self._words = StreamWords()
        self._abort_stream = stream_of_its_own(device, "abort")
        self._most_rows = most_rows
        # a lane's loop begins no step before that one is over which had the same place: all parts had taken its rows by then,
        # as the first stage's ranks end a step together
        self._num_places = under_way(place.stages)
        nbytes = _ROWS + self._num_places * most_rows * hidden_size * dtype.itemsize
        self._memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self._next_memory = share_memory(self._memory, store, "stages", rank=place.stage, size=place.stages)[self.next]
        self._inbox_PTE = self._places(self._memory)
        self._next_PTE = self._places(self._next_memory)
        self._given = self._taken = 0

    def take(self, num_rows: int) -> torch.Tensor:
        self._told.take(1)
        at, self._taken = self._taken % self._num_places, self._taken + 1
        self._words.wait(_word(self._memory, self._taken), self._taken)
        return self._inbox_PTE[at, :num_rows].clone()

    def give(self, rows_TE: torch.Tensor) -> None:
        if len(rows_TE) > self._most_rows:
            raise ValueError(f"{len(rows_TE)} rows go to the next stage, which has room for {self._most_rows}")
        at, self._given = self._given % self._num_places, self._given + 1
        self._next_PTE[at, : len(rows_TE)].copy_(rows_TE)
        self._words.write(_word(self._next_memory, self._given), self._given)
        self._told.give(self._told.token())

    def abort(self) -> None:
        """End every wait, present and to come: the epoch is over, and what its steps still compute means nothing."""
        with torch.cuda.stream(self._abort_stream):
            for word in range(WORDS):
                self._words.write(_word(self._memory, word), self._taken + _FAR)

    def _places(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[_ROWS:].view(self._dtype).view(self._num_places, self._most_rows, self._size)


def _word(memory: torch.Tensor, step: int) -> int:
    """The address of a step's word."""
    return memory.data_ptr() + 4 * (step % WORDS)
