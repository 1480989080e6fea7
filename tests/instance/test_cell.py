"""The communicator of an epoch: who waits in it is let go, and who can't be is known."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from distattn.exchange import Exchange
from instance.cell import EpochGroup, open_store

CPU = torch.device("cpu")


@contextmanager
def members(size: int) -> Iterator[tuple[ThreadPoolExecutor, list[EpochGroup]]]:
    """Of one epoch, who have yet to meet, with a thread for each."""
    store, address = open_store("127.0.0.1", 60)
    with ThreadPoolExecutor(size) as threads:
        groups = list(
            threads.map(
                lambda rank: EpochGroup(
                    store_address=address, host="127.0.0.1", name="test", rank=rank, size=size, device=CPU, timeout_s=60
                ),
                range(size),
            )
        )
        try:
            yield threads, groups
        finally:
            for group in groups:
                group.close()
    del store


def meet(threads: ThreadPoolExecutor, groups: list[EpochGroup]) -> None:
    for meeting in [threads.submit(member.meet) for member in groups]:
        meeting.result(30)


def row_of(group: EpochGroup, peer: int) -> None:
    """Wait for one."""
    group.group.recv([torch.empty(1)], peer, 0).wait()


def test_who_waits_for_a_member_that_does_not_come_is_let_go() -> None:
    """As when one stands still while an epoch forms, and the others are to form another."""
    with members(2) as (threads, [here, _]):
        waiting = threads.submit(here.meet)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        here.close()
        with pytest.raises(RuntimeError):
            waiting.result(5)


@pytest.mark.parametrize("there_says", [True, False])
def test_members_agree_on_what_all_of_them_can(there_says: bool) -> None:
    """As whether a step that they share is a CUDA graph: of one that is, on some of them alone, nobody would see the end."""
    with members(2) as (threads, groups):
        meet(threads, groups)
        answers = [threads.submit(group.all_say, says) for group, says in zip(groups, (True, there_says), strict=True)]
        assert [answer.result(30) for answer in answers] == [there_says] * 2


@pytest.mark.parametrize("lost", [0, 1])
def test_who_waits_for_one_member_is_let_go_when_another_is_lost(lost: int) -> None:
    """Of three: each of those that are left may wait for the other, and both are to form another epoch."""
    with members(3) as (threads, groups):
        meet(threads, groups)
        here = groups[2]
        groups[lost].close()
        with pytest.raises(RuntimeError):
            row_of(here, lost)
        waiting = threads.submit(row_of, here, 1 - lost)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        here.close()
        with pytest.raises(RuntimeError):
            waiting.result(5)


def test_a_send_that_nobody_takes_is_known() -> None:
    """One in the queue of a broken connection is told of no error by Gloo: the end of an epoch leaves it behind."""
    with members(2) as (threads, [here, there]):
        meet(threads, [here, there])
        rows = torch.arange(4_000_000.0)  # more than the connection's buffers take
        sender, receiver = Exchange(here.group, CPU), Exchange(there.group, CPU)
        under_way = threads.submit(lambda: sender.start(sends=[(rows, {1: len(rows)})], receives=[]).wait())
        deadline = time.monotonic() + 30
        while sender.sending is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert sender.sending is not None
        assert not under_way.done()
        taken = torch.empty_like(rows)
        receiver.start(sends=[], receives=[(taken, {0: len(rows)})]).wait()
        under_way.result(30)
        assert sender.sending is None
        assert receiver.sending is None
        assert torch.equal(taken, rows)
