"""Rows straight into the memory of other GPUs of this host: one-sided, with a signal, and nothing for the host to do.

    push: for each send (row, peer, place): peer's rows[place] = source[row], and its lse; then peer's signal += 1
    wait: until the signal of each peer has reached what is expected of it; then the signal is 0 again

The tables and the peers' addresses lie on the device, so both fit any CUDA graph. A signal follows its row (release and
acquire, system scope). A peer that never comes must not hold the GPU for ever: an abort word in host memory ends the wait.

Source: one-sided put with signal, as in NVSHMEM and PGAS; written in Triton because the destinations are data.

Shape suffixes: T rows, H query heads, D head dim, N peers, C most sends.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.launch import has_dependent_launch, let_next_start, wait_for_previous

_TILE = 2048


@dataclass(frozen=True, slots=True)
class Inbox:
    """Where the pushes of one kind go."""

    addresses_3N: torch.Tensor
    """int64 by peer: of its rows, of its lse (0: none), of its signal."""


@triton.jit(do_not_specialize=["most_sends", "num_peers"])  # type: ignore[untyped-decorator]
def _push_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, lse_ptr, sends_ptr, addresses_ptr, most_sends, num_peers, stride_t, stride_lt,
    ROW: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, WITH_LSE: tl.constexpr, TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program per send; those beyond the count in `sends[0]` have nothing to do."""
    send = tl.program_id(0)
    wait_for_previous(DEPENDENT)  # those with nothing to do, too: the next kernel may read what those before have written
    let_next_start(DEPENDENT)
    if send >= tl.load(sends_ptr):
        return
    row = tl.load(sends_ptr + 1 + send).to(tl.int64)
    peer = tl.load(sends_ptr + 1 + most_sends + send)
    place = tl.load(sends_ptr + 1 + 2 * most_sends + send).to(tl.int64)
    to_ptr = tl.load(addresses_ptr + peer).to(tl.pointer_type(rows_ptr.dtype.element_ty))
    for at in tl.static_range(0, ROW, TILE):
        element = at + tl.arange(0, TILE)
        value = tl.load(rows_ptr + row * stride_t + element, mask=element < ROW)
        tl.store(to_ptr + place * ROW + element, value, mask=element < ROW)
    if WITH_LSE:
        head = tl.arange(0, HEADS_PADDED)
        to_lse_ptr = tl.load(addresses_ptr + num_peers + peer).to(tl.pointer_type(tl.float32))
        lse = tl.load(lse_ptr + row * stride_lt + head, mask=head < HEADS)
        tl.store(to_lse_ptr + place * HEADS + head, lse, mask=head < HEADS)
    tl.debug_barrier()  # all threads have stored before one of them says so
    signal_ptr = tl.load(addresses_ptr + 2 * num_peers + peer).to(tl.pointer_type(tl.int32))
    tl.atomic_add(signal_ptr, 1, sem="release", scope="sys")


@triton.jit(do_not_specialize=["num_peers"])  # type: ignore[untyped-decorator]
def _wait_kernel(signals_ptr, expected_ptr, abort_ptr, num_peers, DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: until each signal is what is expected."""
    wait_for_previous(DEPENDENT)
    let_next_start(DEPENDENT)
    for peer in range(num_peers):
        expected = tl.load(expected_ptr + peer)
        if expected > 0:
            seen = tl.atomic_add(signals_ptr + peer, 0, sem="acquire", scope="sys")
            aborted = tl.load(abort_ptr, volatile=True)
            while (seen < expected) & (aborted == 0):
                seen = tl.atomic_add(signals_ptr + peer, 0, sem="acquire", scope="sys")
                aborted = tl.load(abort_ptr, volatile=True)
            # the peer's next push comes only after it has heard from us, so nothing is lost
            tl.store(signals_ptr + peer, 0)


def push_rows(rows_THD: torch.Tensor, lse_TH: torch.Tensor | None, sends: torch.Tensor, inbox: Inbox) -> None:
    """Push the rows that `sends` names: int32, the count, then rows, peers and places, each with room for C.

    `rows` (and fp32 `lse`) are contiguous within a row. Nothing is checked: the table's contents may change between launches of
    a graph.
    """
    heads, dim = rows_THD.shape[1:]
    most = (sends.numel() - 1) // 3
    lse = rows_THD if lse_TH is None else lse_TH
    dependent = has_dependent_launch(rows_THD.device)
    _push_kernel[(most,)](
        rows_THD,
        lse,
        sends,
        inbox.addresses_3N,
        most,
        inbox.addresses_3N.shape[1],
        rows_THD.stride(0),
        lse.stride(0),
        ROW=heads * dim,
        HEADS=heads,
        HEADS_PADDED=triton.next_power_of_2(heads),
        WITH_LSE=lse_TH is not None,
        TILE=_TILE,
        DEPENDENT=dependent,
        launch_pdl=dependent,
    )


def wait_rows(signals_N: torch.Tensor, expected_N: torch.Tensor, abort_1: torch.Tensor) -> None:
    """Hold the stream until every peer has pushed as many rows as expected (int32), or `abort` (host memory) is not 0."""
    dependent = has_dependent_launch(signals_N.device)
    _wait_kernel[(1,)](
        signals_N, expected_N, abort_1, signals_N.numel(), DEPENDENT=dependent, num_warps=1, launch_pdl=dependent
    )
