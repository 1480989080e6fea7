"""Copying KV from one instance's blocks to another's, beside the steps of both.

Both walk the same blocks in the same order, and tell each other in *words*, from host to host, how far they are:

    source  gather block | hear "ready" | wait for budget | say "now"  | send
    target  wait for budget | say "ready"                 | hear "now" | receive | store block | read it again
            ... and behind all a checksum, which the target compares with that of what it has read again

So both begin to move a block within the time that a word takes. On a GPU that matters: what sends and what receives is a
kernel that holds processors until the other end's runs, too, and neither is launched before both ends have their budget.

A word that doesn't come within `PEER_TIMEOUT_S`, or says no, ends the copy (CopyFailed) and nothing else: words have a group
of their own, and Gloo takes a late one's connections away from copies alone.

Nothing here decides: who calls has made sure that no step writes what is copied, and that the target's blocks are nobody's.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distattn.budget import StepBudget
from distattn.exchange import Exchange, ExchangeError
from kvstore.checksum import checksum_of
from kvstore.storage import KVStorage, on_stream

PEER_TIMEOUT_S = 10.0
"""Longest that a copy waits for its other end. More than that one may wait for its budget, and more than the lease after which
an instance that stands still is expelled."""

_POLL_S = 2e-4
_NO = -1
"""For the number of a block: this end has no part in the copy."""


class CopyFailed(Exception):
    """A copy came to nothing, and that is all that has happened; the message says why."""


Rows = Sequence[tuple[torch.Tensor, Mapping[int, int]]]
"""As `Exchange.start` takes them."""


class Transfers:
    """One instance's end of copies, within one epoch. Blocks the calling thread, always the same one.

    Both ends raise CopyFailed if a copy comes to nothing, TransferEnded when the epoch ends, and ExchangeError if it has to
    end: that is on a GPU, when a block that both have begun to move doesn't pass.
    """

    def __init__(
        self,
        storage: KVStorage,
        exchange: Exchange,
        words: Exchange,
        budget: StepBudget,
        timeout_s: float = PEER_TIMEOUT_S,
    ) -> None:
        """`words`: over Gloo, with a group that only copies use. `timeout_s`: longest wait for the other end."""
        self._storage = storage
        self._exchange = exchange
        self._words = words
        self._budget = budget
        self._timeout_s = timeout_s
        self._device = storage.data_L2BPKD.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.bytes_sent = 0
        self.blocks_sent = 0

    def send(self, move: int, block_ids: Sequence[int] | None, to: int) -> None:
        """Copy these blocks to `to`, which receives as many; None: there is nothing to copy, tell it so."""
        if block_ids is None:
            self._hear(move, to, 0)
            self._say(move, to, _NO)
            raise CopyFailed("nothing was offered for it here")
        checksum = 0
        for index, block in enumerate(block_ids):
            with on_stream(self._stream):
                block_N = self._storage.pack(block)
                checksum = checksum_of(block_N, checksum)
                self._hear(move, to, index)
                self._budget.take(self._storage.block_size)
                self._say(move, to, index)
                self._pass([(block_N.unsqueeze(0), {to: 1})], [])
            self.blocks_sent += 1
            self.bytes_sent += self._storage.block_bytes
        self._say(move, to, checksum)

    def receive(self, move: int, block_ids: Sequence[int] | None, source: int) -> str | None:
        """Take what `source` sends into these blocks; None: they are not reserved, tell it so. Returns what is wrong with the
        copy; None: nothing."""
        if block_ids is None:
            self._say(move, source, _NO)
            raise CopyFailed("nothing is reserved for it here")
        checksum = 0
        for index, block in enumerate(block_ids):
            self._budget.take(self._storage.block_size)
            self._say(move, source, index)
            self._hear(move, source, index)
            with on_stream(self._stream):
                block_N = torch.empty(self._storage.block_bytes, dtype=torch.uint8, device=self._device)
                self._pass([], [(block_N.unsqueeze(0), {source: 1})])
                self._storage.unpack(block, block_N)
                checksum = checksum_of(self._storage.pack(block), checksum)
        sent = self._word_of(move, source)
        return None if sent == checksum else f"the checksum of {len(block_ids)} blocks is {checksum:#x}, sent was {sent:#x}"

    def _say(self, move: int, to: int, number: int) -> None:
        """A block's number, `_NO`, or the checksum."""
        self._wait_for([(torch.tensor([[move, number]]), {to: 1})], [])

    def _hear(self, move: int, peer: int, index: int) -> None:
        """That the other end has come to the block of this number."""
        number = self._word_of(move, peer)
        if number == _NO:
            raise CopyFailed(f"{self._words.name_of(peer)} has no part in it")
        if number != index:
            raise CopyFailed(f"{self._words.name_of(peer)} is at block {number}, this one at {index}")

    def _word_of(self, move: int, peer: int) -> int:
        word_12 = torch.empty((1, 2), dtype=torch.int64)
        self._wait_for([], [(word_12, {peer: 1})])
        told, number = word_12[0].tolist()
        if told != move:
            raise CopyFailed(f"{self._words.name_of(peer)} copies for move {told}, this one for {move}")
        return int(number)

    def _wait_for(self, sends: Rows, receives: Rows) -> None:
        try:
            self._words.start(sends, receives).wait(self._timeout_s)
        except ExchangeError as error:
            raise CopyFailed(str(error)) from error

    def _pass(self, sends: Rows, receives: Rows) -> None:
        """Move a block. The other end does the same at this moment: it has said so."""
        if self._stream is None:
            try:
                self._exchange.start(sends, receives).wait(self._timeout_s)
            except ExchangeError as error:
                raise CopyFailed(str(error)) from error
            return
        self._exchange.start(sends, receives).wait()
        passed: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        passed.record(self._stream)
        # An event's own wait has no deadline. Neither can the kernel be taken back alone: it ends when its communicator is
        # aborted, and an abort while graphs are alive hung (`instance.epoch`). So here, and only here, the epoch has to end.
        deadline = time.monotonic() + self._timeout_s
        while not passed.query():
            if time.monotonic() > deadline:
                (peer,) = {rank for _, rows in (*sends, *receives) for rank in rows}
                who = self._words.name_of(peer)
                what = f"a block of KV that is copied to or from {who} did not pass within {self._timeout_s:g} s"
                raise ExchangeError(what)
            time.sleep(_POLL_S)
