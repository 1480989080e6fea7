"""Copying KV from one instance's blocks to another's, beside the steps of both.

Both walk the same blocks in the same order, so nothing is announced. A piece is as many blocks as the budget of a step holds,
one at least:

    source  gather piece | send         target  receive | store piece | read it again
            ... and behind all a checksum, which the target compares with that of what it has read again

The checksum is a CRC-32 of the bytes where they lie in host memory (zlib: above 1 GB/s a core). On a GPU that would bring all
of the KV to the host: there it is a sum over 32-bit words, each times its place, modulo 2^64. It is exact whatever the order
of addition, and unlike a plain sum it sees words that have changed places.

Nothing here decides: who calls has made sure that no step writes what is copied, and that the target's blocks are nobody's.
"""

import threading
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from distattn.exchange import Exchange
from kvstore.storage import KVStorage

T = TypeVar("T")

_PRIME = 0x9E3779B1


class TransferEnded(Exception):
    """The epoch ended while a copy was under way."""


class StepBudget:
    """How much may be copied beside steps: so many tokens of KV for each step that runs, all at once while none runs.

    Shared by the thread that copies (`take`) and the loop that steps (`tell`).
    """

    def __init__(self, tokens_per_step: int) -> None:
        """Raises ValueError unless it is positive."""
        if tokens_per_step < 1:
            raise ValueError(f"a budget must be at least 1 token a step, got {tokens_per_step}")
        self.tokens_per_step = tokens_per_step
        self._changed = threading.Condition()
        self._left = 0
        self._most = tokens_per_step
        """What may be saved up: enough for the piece that waits."""
        self._steps = 0
        self._is_busy = False
        self._is_over = False

    def tell(self, steps: int, *, is_busy: bool) -> None:
        """So many steps have run by now; `is_busy`: one is running."""
        with self._changed:
            self._left = min(self._most, self._left + (steps - self._steps) * self.tokens_per_step)
            self._steps, self._is_busy = steps, is_busy
            self._changed.notify_all()

    def take(self, tokens: int) -> None:
        """Wait until a piece of so many tokens may be copied. Raises TransferEnded after `end`."""
        with self._changed:
            self._most = max(tokens, self.tokens_per_step)
            self._changed.wait_for(lambda: self._is_over or not self._is_busy or self._left >= tokens)
            if self._is_over:
                raise TransferEnded("the epoch ended")
            self._left = max(0, self._left - tokens)

    def end(self) -> None:
        """Let go of who waits."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


class Transfers:
    """One instance's end of copies, within one epoch. Blocks the calling thread, always the same one."""

    def __init__(self, storage: KVStorage, exchange: Exchange, budget: StepBudget) -> None:
        self._data_L2BPKD = storage.data_L2BPKD
        self._block_size = storage.block_size
        self._block_bytes = storage.block_bytes
        self._exchange = exchange
        self._budget = budget
        self._device = storage.data_L2BPKD.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.bytes_sent = 0
        self.blocks_sent = 0

    def send(self, block_ids: Sequence[int], to: int) -> None:
        """Copy these blocks to `to`, which receives them. Raises ExchangeError, and TransferEnded when the epoch ends."""

        def move(ids_N: torch.Tensor, checksum: int) -> int:
            piece_L2NPKD = self._data_L2BPKD.index_select(2, ids_N)
            self._exchange.start([(_bytes_of(piece_L2NPKD), {to: 1})], []).wait()
            self.blocks_sent += ids_N.numel()
            self.bytes_sent += ids_N.numel() * self._block_bytes
            return checksum_of(piece_L2NPKD, checksum)

        checksum = self._each_piece(block_ids, move)
        self._run(lambda: self._exchange.start([(self._word(checksum), {to: 1})], []).wait())

    def receive(self, block_ids: Sequence[int], source: int) -> str | None:
        """Take what `source` sends into these blocks. Returns what is wrong with the copy; None: nothing. Raises as `send`."""

        def move(ids_N: torch.Tensor, checksum: int) -> int:
            shape = (*self._data_L2BPKD.shape[:2], ids_N.numel(), *self._data_L2BPKD.shape[3:])
            piece_L2NPKD = torch.empty(shape, dtype=self._data_L2BPKD.dtype, device=self._device)
            self._exchange.start([], [(_bytes_of(piece_L2NPKD), {source: 1})]).wait()
            self._data_L2BPKD.index_copy_(2, ids_N, piece_L2NPKD)
            return checksum_of(self._data_L2BPKD.index_select(2, ids_N), checksum)

        checksum = self._each_piece(block_ids, move)
        word = self._word(0)
        self._run(lambda: self._exchange.start([], [(word, {source: 1})]).wait())
        sent = int(word.item())
        return None if sent == checksum else f"the checksum of {len(block_ids)} blocks is {checksum:#x}, sent was {sent:#x}"

    def _each_piece(self, block_ids: Sequence[int], move: Callable[[torch.Tensor, int], int]) -> int:
        """The checksum after all of them."""
        count = max(1, self._budget.tokens_per_step // self._block_size)
        checksum = 0
        for first in range(0, len(block_ids), count):
            piece = block_ids[first : first + count]
            self._budget.take(len(piece) * self._block_size)
            ids_N = torch.tensor(piece, device=self._device)
            checksum = self._run(partial(move, ids_N, checksum))
        return checksum

    def _run(self, work: Callable[[], T]) -> T:
        """On a GPU on a stream of its own, and until it has run."""
        with torch.inference_mode():
            if self._stream is None:
                return work()
            with torch.cuda.stream(self._stream):
                result = work()
            self._stream.synchronize()
            return result

    def _word(self, value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int64, device=self._device)


def checksum_of(piece: torch.Tensor, before: int = 0) -> int:
    """Of a contiguous tensor's bytes and, by `before`, of the pieces before it."""
    flat = _bytes_of(piece).flatten()
    if piece.device.type == "cpu":
        return zlib.crc32(flat.numpy().data, before)
    padding = -flat.numel() % 4
    words = torch.nn.functional.pad(flat, (0, padding)).view(torch.int32).long()
    places = torch.arange(1, words.numel() + 1, device=piece.device)
    total = int((words * places).sum().item()) + before * _PRIME
    return (total + 2**63) % 2**64 - 2**63


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as one row of bytes, a view."""
    return tensor.view(-1).view(torch.uint8).unsqueeze(0)
