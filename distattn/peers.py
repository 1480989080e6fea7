"""Memory that the instances of one host write for each other: queries that arrive, and partial states that come back.

Every instance has a slot for each of its peers, ascending by rank, with room for `rows` rows:

    queries  | from peer 0 | from peer 1 | ...        pushed by the row's home
    states   | from peer 0 | from peer 1 | ...        (out, lse), pushed by the holder, in the place that the query had

A slot is written again only after its reader has answered: the home pushes the next layer's query after it has the state, the
holder the next state after it has that query. So one buffer and one signal for each pair is enough.
"""

import torch

from distattn.exchange import Store
from distattn.ipc import share_memory
from distattn.shape import AttentionShape
from kernels.peer_rows import Inbox

_ALIGNMENT = 256


class PeerMemory:
    """This instance's part, and the addresses of the others' (CUDA IPC). Needs GPUs that reach each other's memory."""

    def __init__(self, *, store: Store, rank: int, size: int, rows: int, shape: AttentionShape, device: torch.device) -> None:
        """All instances of the epoch call this together, and meet once more before any pushes. `rows`: most between two.

        Raises RuntimeError if memory can't be shared.
        """
        self.rank = rank
        self.size = size
        self.rows = rows
        num_rows = (size - 1) * rows
        row_bytes, out_bytes = (shape.num_heads * dim * shape.dtype.itemsize for dim in (shape.head_dim, shape.out_dim))
        self._starts: dict[str, int] = {}
        total = 0
        for name, nbytes in (
            ("queries", num_rows * row_bytes),
            ("outs", num_rows * out_bytes),
            ("lses", num_rows * shape.num_heads * 4),
            ("query_signals", size * 4),
            ("state_signals", size * 4),
        ):
            self._starts[name] = total
            total += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._memory = torch.zeros(total, dtype=torch.uint8, device=device)
        self._others = share_memory(self._memory, store, "peers", rank=rank, size=size)
        bases = [self._others.get(peer, self._memory).data_ptr() for peer in range(size)]

        heads = (num_rows, shape.num_heads)
        self.queries_MHD = self._view("queries", shape.dtype, (*heads, shape.head_dim))
        self.outs_MHD = self._view("outs", shape.dtype, (*heads, shape.out_dim))
        self.lses_MH = self._view("lses", torch.float32, heads)
        self.query_signals_N = self._view("query_signals", torch.int32, (size,))
        self.state_signals_N = self._view("state_signals", torch.int32, (size,))
        lse_bytes = shape.num_heads * 4
        self.query_inbox = self._inbox(bases, ("queries", row_bytes), None, "query_signals")
        self.state_inbox = self._inbox(bases, ("outs", out_bytes), ("lses", lse_bytes), "state_signals")
        self.abort_1 = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        """Not 0: nobody waits for a signal any more."""

    def place(self, peer: int, index: int) -> int:
        """The row, here, of the `index`-th row that goes to or comes from a peer."""
        return self._slot(self.rank, peer) * self.rows + index

    def abort(self) -> None:
        """End every wait, present and to come: the epoch is over, and what its steps still compute means nothing."""
        self.abort_1.fill_(1)

    def _slot(self, owner: int, peer: int) -> int:
        """Which of the slots of `owner` belongs to `peer`."""
        return peer if peer < owner else peer - 1

    def _view(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        start = self._starts[name]
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self._memory[start : start + nbytes].view(dtype).view(shape)

    def _inbox(self, bases: list[int], rows: tuple[str, int], lses: tuple[str, int] | None, signals: str) -> Inbox:
        """Where this instance pushes: its slot at each peer (at its own rank: nothing)."""

        def address(peer: int, part: tuple[str, int] | None) -> int:
            if part is None or peer == self.rank:
                return 0
            name, nbytes = part
            return bases[peer] + self._starts[name] + self._slot(peer, self.rank) * self.rows * nbytes

        table = [
            [address(peer, rows) for peer in range(self.size)],
            [address(peer, lses) for peer in range(self.size)],
            [bases[peer] + self._starts[signals] + 4 * self.rank for peer in range(self.size)],
        ]
        return Inbox(torch.tensor(table, dtype=torch.int64, device=self._memory.device))
