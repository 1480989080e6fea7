"""Memory that instances write for each other to share feeds and head of captured steps, and what such a step does through it
(`kernels.shared_rows`). By `instance.shared_feeds` steps that aren't captured do the same.

Shape suffixes: T own rows, R rows of all, E hidden size, V vocabulary, P this member's part of it, N members, B buffers,
W words.
"""

import math

import torch

from distattn.exchange import Store
from distattn.ipc import share_memory
from instance.layers import Dense
from instance.mailboxes import Abort, mailbox
from instance.split import dealt, inner_shares
from kernels.layer_ops import Norm, linear
from kernels.mailbox import Mailbox
from kernels.shared_rows import (
    Homes,
    collect_parts,
    num_pieces,
    spread_add_rms_norm,
    spread_rows,
    sum_parts,
    sum_parts_add_rms_norm,
)


class FeedMemory:
    """Of one of an epoch's members, for steps of one lane. Needs GPUs that reach each other's memory.

    For 64 rows of an 8B shape in bf16, by arithmetic: 1 MiB for each member twice, and 31 MiB for logits of all.
    """

    def __init__(self, *, there: Mailbox, back: Mailbox, logits: Mailbox, vocab_size: int, abort: Abort) -> None:
        """`there`: of rows on their way to all; `back`: of what comes back of them in layers, and `logits` in the end."""
        self.there, self.back, self.of_logits = there, back, logits
        self.part, self.parts = there.part, len(there.inbox_NBTW)
        self.most_rows = there.inbox_NBTW.shape[2]
        """Of all members in a step."""
        self.tokens = dealt(vocab_size, self.parts)
        """Whose logits each member computes."""
        ends = [0, *(its.stop for its in self.tokens)]
        self.starts = torch.tensor(ends, dtype=torch.int32, device=there.inbox_NBTW.device)
        self._abort = abort

    @staticmethod
    def inboxes(
        *, parts: int, rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """What each of so many members needs, `[N, B, R, W]` by name: parts of one piece of memory, which is shared at once.
        `rows`: most of all members."""
        numbers = {"there": hidden_size, "back": hidden_size, "logits": len(dealt(vocab_size, parts)[0])}
        words = {name: -(-count * dtype.itemsize // 4) for name, count in numbers.items()}
        shapes = {name: (parts, 1, rows, room + room % 2) for name, room in words.items()}  # two words in a store
        sizes = [math.prod(shape) for shape in shapes.values()]
        pieces = torch.split(torch.zeros(sum(sizes), dtype=torch.int64, device=device), sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}

    @staticmethod
    def share(inboxes: dict[str, torch.Tensor], store: Store, *, part: int, vocab_size: int) -> "FeedMemory":
        """All members call this together, and meet once more before they use it.

        Raises RuntimeError if memory can't be shared.
        """
        some = inboxes["there"]
        abort, others = Abort.of(some.device), share_memory(some, store, "feeds", rank=part, size=len(some))
        words = {rank: memory.view(torch.int64) for rank, memory in others.items()}
        mailboxes = {
            name: mailbox(
                inbox,
                {rank: its[inbox.storage_offset() :] for rank, its in words.items()},
                part=part,
                counted=counted(inbox),
                abort=abort,
            )
            for name, inbox in inboxes.items()
        }
        return FeedMemory(**mailboxes, vocab_size=vocab_size, abort=abort)

    def abort(self) -> None:
        """End every wait, present and to come: the epoch is over, and what its steps still compute means nothing."""
        self._abort.now()


def counted(inbox_NBTW: torch.Tensor) -> int:
    """What calls are counted of there: a row's pieces, which are one where all of it has one program."""
    return inbox_NBTW.shape[2] * num_pieces(inbox_NBTW.shape[3])


class CapturedFeeds:
    """What the layers of one captured step call (`instance.fused.FeedSharing`)."""

    def __init__(self, memory: FeedMemory, homes: Homes, num_own: int) -> None:
        """`num_own`: of the own rows with those that pad them, as many as `homes` has, or 0."""
        self._memory = memory
        self._homes = homes
        self._num_own = num_own

    def run(
        self, feed: Dense, x_TE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm, *, first: Norm | None
    ) -> torch.Tensor:
        """As `FeedSharing.run`."""
        memory = self._memory
        inner = inner_shares(feed.down.shape[1], memory.parts)[memory.part]
        all_RE = spread_add_rms_norm(x_TE, residual_TE, norm, self._homes, memory.there, first=first)
        return feed.run_dims(all_RE, inner, "triton")

    def sum(self, part_RE: torch.Tensor, /) -> torch.Tensor:
        """Of all parts of the own rows `[T, E]`, new."""
        return sum_parts(part_RE, self._num_own, self._homes, self._memory.back)

    def add_rms_norm(
        self, part_RE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm, /, *, first: Norm | None, backend: str
    ) -> torch.Tensor:
        """`kernels.layer_ops.add_rms_norm` of that, by Triton whatever the backend."""
        return sum_parts_add_rms_norm(part_RE, residual_TE, norm, self._homes, self._memory.back, first=first)

    def logits(self, head_NE: torch.Tensor, bias_N: torch.Tensor | None, h_TE: torch.Tensor) -> torch.Tensor:
        """Of the own rows `[T, V]`, new; anything in those that pad."""
        memory = self._memory
        tokens = memory.tokens[memory.part]
        mine = slice(tokens.start, tokens.stop)
        all_RE = spread_rows(h_TE, self._homes, memory.there)
        part_RP = linear(all_RE, head_NE[mine], None if bias_N is None else bias_N[mine], backend="triton")
        return collect_parts(part_RP, self._num_own, memory.starts, len(head_NE), self._homes, memory.of_logits)
