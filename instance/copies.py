"""Runs that are copied to or from this instance: one at a time, in a thread of their own, beside the steps of its lanes."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import torch

from distattn.budget import StepBudget, TransferEnded
from distattn.transfer import CopyFailed, Transfers
from gmanager.wire import messages as wire
from gmanager.wire.logs import get_logger
from instance.crew import Crew
from instance.rmanager import RManager

log = get_logger("instance")

CHANNELS = 4
"""Of NCCL's, for copies: the processors that a block on its way may take from the lanes, and a bound to the memory for NCCL's
buffers (`instance.memory`). NCCL takes up to 32 unless told otherwise."""


class Copies:
    """What the gManager asks of this instance's end of copies, within one epoch."""

    def __init__(
        self,
        rank: int,
        rmanager: RManager,
        transfers: Transfers,
        budget: StepBudget,
        device: torch.device,
        crew: Crew | None = None,
    ) -> None:
        """`crew`: of the ranks that have other parts of the blocks."""
        self._crew = crew
        self._rank = rank
        self._rmanager = rmanager
        self._transfers = transfers
        self.budget = budget
        self._offered: tuple[int, Sequence[int]] = -1, ()
        """The last move that was asked for, and the blocks of its run: a sequence that ends before it is copied takes them
        along, and what is copied then is nobody's any more."""
        self.thread: Executor = copying_thread(device)

    def offer(self, asked: wire.OfferRun) -> wire.RunOffered:
        """A run of a sequence; none of its positions if nothing of it is here."""
        shard = self._rmanager.shard(asked.seq)
        if shard is None or not shard.runs:
            return wire.RunOffered(epoch=asked.epoch, move=asked.move, ranges=[])
        run = shard.runs[0]
        self._offered = asked.move, tuple(run.all_blocks)
        firsts = [window.first for window in run.windows]
        return wire.RunOffered(epoch=asked.epoch, move=asked.move, ranges=list(run.ranges), firsts=firsts)

    async def copy(self, asked: wire.CopyRun) -> wire.Copied | None:
        """Do this instance's part. The target's answer; None: it is the source, or the epoch has ended.

        A copy whose other end doesn't come, or can't be reached, is answered as one that failed. Raises ExchangeError if the
        epoch can't go on.
        """
        loop = asyncio.get_running_loop()
        took_us = 0
        try:
            if asked.source == self._rank:
                move, block_ids = self._offered
                offered = block_ids if move == asked.move else None
                if self._crew is not None:
                    self._crew.send_blocks(asked, offered)
                await loop.run_in_executor(self.thread, self._transfers.send, asked.move, offered, asked.target)
                return None
            shard = self._rmanager.shard(asked.move)
            reserved = None if shard is None else tuple(shard.spare)
            began_ns = time.perf_counter_ns()
            others = None if self._crew is None else self._crew.receive_blocks(asked, reserved)
            try:
                wrong = await loop.run_in_executor(self.thread, self._transfers.receive, asked.move, reserved, asked.source)
            finally:
                if others is not None:  # whatever came of it here: before an answer nobody may write there any more
                    theirs = await others
            if others is not None:
                wrong = wrong or theirs
            took_us = (time.perf_counter_ns() - began_ns) // 1000
        except TransferEnded:
            return None
        except CopyFailed as failed:
            wrong = str(failed)
            log.warning("copy failed", move=asked.move, source=asked.source, target=asked.target, reason=wrong)
            if asked.source == self._rank:
                return None
        if wrong is None:
            self._rmanager.note_copy(asked.move, asked.ranges, asked.firsts)
        return wire.Copied(epoch=asked.epoch, move=asked.move, error=wrong, us=took_us)

    def counters(self) -> wire.Counters:
        """What was sent."""
        return wire.Counters(blocks_copied=self._transfers.blocks_sent, kv_bytes=self._transfers.bytes_sent)

    def close(self) -> None:
        """Let go of who waits. What waits for the other instance comes back when the process groups are closed."""
        self.budget.end()
        self.thread.shutdown(wait=False, cancel_futures=True)


def copying_thread(device: torch.device) -> ThreadPoolExecutor:
    """Where one end of copies lives."""
    return ThreadPoolExecutor(1, "copy", _prepare_thread, (device,))


def _prepare_thread(device: torch.device) -> None:
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread: else a stream that is left makes a context on the first GPU
