"""Runs that are copied to or from this instance: one at a time, in a thread of their own, beside the steps of its lanes."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import torch

from distattn.exchange import ExchangeError
from distattn.transfer import StepBudget, TransferEnded, Transfers
from gmanager.wire import messages as wire
from instance.rmanager import RManager


class Copies:
    """What the gManager asks of this instance's end of copies, within one epoch."""

    def __init__(self, rank: int, rmanager: RManager, transfers: Transfers, budget: StepBudget, device: torch.device) -> None:
        self._rank = rank
        self._rmanager = rmanager
        self._transfers = transfers
        self.budget = budget
        self._offered: tuple[int, Sequence[int]] = -1, ()
        """The last move that was asked for, and the blocks of its run: a sequence that ends before it is copied takes them
        along, and what is copied then is nobody's any more."""
        self.thread: Executor = ThreadPoolExecutor(1, "copy", _prepare_thread, (device,))

    def offer(self, asked: wire.OfferRun) -> wire.RunOffered:
        """A run of a sequence; none of its positions if nothing of it is here."""
        shard = self._rmanager.shard(asked.seq)
        if shard is None or not shard.runs:
            return wire.RunOffered(epoch=asked.epoch, move=asked.move, ranges=[])
        run = shard.runs[0]
        self._offered = asked.move, tuple(run.block_ids)
        return wire.RunOffered(epoch=asked.epoch, move=asked.move, ranges=list(run.ranges))

    async def copy(self, asked: wire.CopyRun) -> wire.Copied | None:
        """Do this instance's part. The target's answer; None: it is the source, or the epoch has ended.

        Raises ExchangeError if the other can't be reached.
        """
        loop = asyncio.get_running_loop()
        try:
            if asked.source == self._rank:
                move, block_ids = self._offered
                if move != asked.move:
                    raise ExchangeError(f"move {asked.move} was never offered here, the last one was {move}")
                await loop.run_in_executor(self.thread, self._transfers.send, block_ids, asked.target)
                return None
            shard = self._rmanager.shard(asked.move)
            if shard is None:
                raise ExchangeError(f"nothing is reserved here for move {asked.move}")
            wrong = await loop.run_in_executor(self.thread, self._transfers.receive, tuple(shard.spare), asked.source)
        except TransferEnded:
            return None
        if wrong is None:
            self._rmanager.note_copy(asked.move, asked.ranges)
        return wire.Copied(epoch=asked.epoch, move=asked.move, error=wrong)

    def counters(self) -> wire.Counters:
        """What was sent."""
        return wire.Counters(blocks_copied=self._transfers.blocks_sent, kv_bytes=self._transfers.bytes_sent)

    def close(self) -> None:
        """Let go of who waits. What waits for the other instance comes back when the process group is closed."""
        self.budget.end()
        self.thread.shutdown(wait=False, cancel_futures=True)


def _prepare_thread(device: torch.device) -> None:
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread: else a stream that is left makes a context on the first GPU
