"""Feeds and head of a decode step that several instances compute together, each with all weights (`instance.elastic_tp`).

    home      its rows to all others     a part of what all rows become     others' parts of its rows, and the sum
    helper    gets them                  likewise                           sends its part back

A part's weights are views of those that are there. What an instance adds is rounded as its rows are; the sum is in fp32, in the
order of ranks, so it doesn't depend on where a row is at home.

Shape suffixes: T own rows, R rows of all, E hidden size, N features that come back.
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from distattn.exchange import Exchange
from instance.elastic_tp import FeedCosts, FeedShares
from instance.fused import FusedDecoder
from instance.layers import Dense
from kernels.layer_ops import Norm, add_rms_norm, linear

FEW_ROWS, MANY_ROWS = 1, 16
"""Of each instance, in steps that are measured."""
REPEATS = 3
"""Of which the fastest counts."""


class SharedFeeds:
    """Of one lane's steps. All members of a step that is split call the same in the same order, once it is planned."""

    def __init__(self, exchange: Exchange, fused: FusedDecoder, backend: str) -> None:
        """`fused`: of a model whose feeds are all dense, with weights of 16 or 32 bits."""
        self._exchange = exchange
        self._fused = fused
        self._backend = backend
        self._shares = FeedShares(0, ((0, 0),))
        self._waited_ns = 0

    def plan(self, shares: FeedShares) -> None:
        """For the calls that follow."""
        self._shares = shares

    def run(
        self, feed: Dense, x_TE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm, *, first: Norm | None
    ) -> torch.Tensor:
        """As `FeedSharing.run`. Raises ExchangeError."""
        h_TE = add_rms_norm(x_TE, residual_TE, norm, first=first, backend=self._backend)
        return feed.run_dims(self._gather(h_TE), self._shares.inner(feed.down.shape[1]), self._backend)

    def sum(self, part_RE: torch.Tensor, /) -> torch.Tensor:
        """Of all parts of the own rows `[T, E]`, new; the others' parts are computed meanwhile. Raises ExchangeError."""
        parts = self._send_back(part_RE, [part_RE.shape[1]] * self._shares.parts)
        total_TE = parts[0].float()
        for part_TE in parts[1:]:
            total_TE = total_TE + part_TE
        return total_TE.to(part_RE.dtype)

    def add_rms_norm(
        self, part_RE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm, /, *, first: Norm | None, backend: str
    ) -> torch.Tensor:
        """`kernels.layer_ops.add_rms_norm` of that. Raises ExchangeError."""
        return add_rms_norm(self.sum(part_RE), residual_TE, norm, first=first, backend=backend)

    def logits(self, head_NE: torch.Tensor, bias_N: torch.Tensor | None, h_TE: torch.Tensor) -> torch.Tensor:
        """Of the own rows, `[T, N]`, new; of all tokens that the head knows. Raises ExchangeError."""
        tokens = self._shares.vocabulary(head_NE.shape[0])
        mine = slice(tokens[self._shares.part].start, tokens[self._shares.part].stop)
        bias = None if bias_N is None else bias_N[mine]
        part_RN = linear(self._gather(h_TE), head_NE[mine], bias, backend=self._backend)
        return torch.cat(self._send_back(part_RN, [len(its) for its in tokens]), -1)

    def take_waited_ns(self) -> int:
        """How long it has waited for rows since the last call."""
        waited, self._waited_ns = self._waited_ns, 0
        return waited

    @torch.inference_mode()
    def measure(self, ranks: range, rank: int) -> FeedCosts:
        """What steps cost: all members of the epoch, which have these ranks, call this at once, and each finds its own."""
        found = []
        for rows in (FEW_ROWS, MANY_ROWS):
            h_TE = self._fused.blank_rows(rows)
            self.plan(FeedShares(rank, tuple((member, rows) for member in ranks)))
            whole_ns, trips_ns = (least_ns(partial(work, h_TE)) for work in (self._fused.run_dense, self._make_trips))
            found.append((rows, whole_ns, trips_ns))
        self.take_waited_ns()
        return FeedCosts.through(*found, others=len(ranks) - 1)

    def _make_trips(self, h_TE: torch.Tensor) -> None:
        """As many as a step, with nothing computed in between."""
        for _ in range(self._fused.num_layers + 1):
            all_RE = self._gather(h_TE)
            self._send_back(all_RE, [all_RE.shape[1]] * self._shares.parts)

    def _gather(self, h_TE: torch.Tensor) -> torch.Tensor:
        """The rows of all, one member's after the other's."""
        shares = self._shares
        all_RE = h_TE.new_empty((shares.total, h_TE.shape[1]))
        own = shares.range_of(shares.rank)
        all_RE[own.start : own.stop] = h_TE
        others = [(rank, shares.range_of(rank)) for rank, _ in shares.rows if rank != shares.rank]
        self._exchange_rows(
            [(h_TE.contiguous(), rank) for rank, _ in others],
            [(all_RE[its.start : its.stop], rank) for rank, its in others],
        )
        return all_RE

    def _send_back(self, part_RN: torch.Tensor, widths: list[int]) -> list[torch.Tensor]:
        """What each member, in their order, has made of the own rows `[T, its width]`; theirs go to them meanwhile."""
        shares = self._shares
        mine = shares.range_of(shares.rank)
        parts = [
            part_RN[mine.start : mine.stop] if rank == shares.rank else part_RN.new_empty((len(mine), width))
            for (rank, _), width in zip(shares.rows, widths, strict=True)
        ]
        theirs = [(rank, shares.range_of(rank)) for rank, _ in shares.rows if rank != shares.rank]
        self._exchange_rows(
            [(part_RN[its.start : its.stop], rank) for rank, its in theirs],
            [(part, rank) for (rank, _), part in zip(shares.rows, parts, strict=True) if rank != shares.rank],
        )
        return parts

    def _exchange_rows(self, sends: list[tuple[torch.Tensor, int]], receives: list[tuple[torch.Tensor, int]]) -> None:
        began_ns = time.perf_counter_ns()
        ways = [[(rows, {rank: len(rows)}) for rows, rank in way if rows.numel()] for way in (sends, receives)]
        self._exchange.start(*ways).wait()
        self._waited_ns += time.perf_counter_ns() - began_ns


def least_ns(work: Callable[[], object]) -> float:
    """Of some runs, but for the first, in which memory is allocated."""
    took = []
    for _ in range(1 + REPEATS):
        began_ns = time.perf_counter_ns()
        work()
        took.append(time.perf_counter_ns() - began_ns)
    return float(min(took[1:]))
