"""Block moves between two real processes' groups: what arrives is what lay there, and what doesn't is told."""

import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distattn.exchange import Exchange, ExchangeError
from distattn.transfer import StepBudget, TransferEnded, Transfers, checksum_of
from instance.cell import EpochGroup, open_store
from kvstore.storage import KVStorage

CPU = torch.device("cpu")
BLOCKS, SIZE = 40, 16
SPAWN = multiprocessing.get_context("spawn")


def storage_of(seed: int, dtype: torch.dtype = torch.bfloat16) -> KVStorage:
    storage = KVStorage(num_layers=3, num_blocks=BLOCKS, block_size=SIZE, num_kv_heads=2, head_dim=8, dtype=dtype, device=CPU)
    storage.data_L2BPKD.copy_(torch.randn(storage.data_L2BPKD.shape, generator=torch.Generator().manual_seed(seed)))
    storage.data_L2BPKD[:, :, ::7] = torch.nan  # what no step has written may be anything
    return storage


def group_of(address: str, rank: int) -> EpochGroup:
    return EpochGroup(store_address=address, host="127.0.0.1", name="transfer", rank=rank, size=2, device=CPU, timeout_s=20)


def target(address: str, pipe: Connection) -> None:
    """Another process: receives as it is told, and says what it has then."""
    group = group_of(address, 1)
    storage = storage_of(2)
    transfers = Transfers(storage, Exchange(group.group, CPU), StepBudget(16))
    while (ids := pipe.recv()) is not None:
        try:
            wrong: str | None = transfers.receive(ids, 0)
        except ExchangeError as error:
            wrong = f"ExchangeError: {error}"
        pipe.send((wrong, storage.data_L2BPKD.view(torch.int16).numpy().tolist()))
    group.close()


@pytest.fixture
def peer() -> Iterator[tuple[EpochGroup, Connection]]:
    """Our end of a group of two processes, and a pipe to the other."""
    store, address = open_store("127.0.0.1", 20)
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(address, theirs), daemon=True)
    process.start()
    group = group_of(address, 0)
    yield group, ours
    group.close()
    ours.send(None)
    process.join(20)
    assert process.exitcode == 0
    del store


def test_blocks_arrive_as_they_were_and_nothing_else_changes(peer: tuple[EpochGroup, Connection]) -> None:
    group, pipe = peer
    storage = storage_of(1)
    transfers = Transfers(storage, Exchange(group.group, CPU), StepBudget(16))
    here, there = [5, 0, 39, 7], [1, 2, 30, 7]
    pipe.send(there)
    transfers.send(here, 1)
    wrong, found = pipe.recv()
    assert wrong is None
    expected = storage_of(2).data_L2BPKD
    expected[:, :, there] = storage.data_L2BPKD[:, :, here]
    assert torch.equal(torch.tensor(found, dtype=torch.int16), expected.view(torch.int16))
    assert (transfers.blocks_sent, transfers.bytes_sent) == (4, 4 * storage.block_bytes)


def test_what_arrives_otherwise_is_told(peer: tuple[EpochGroup, Connection], monkeypatch: pytest.MonkeyPatch) -> None:
    """The source says that it has sent something else, and after that a copy is right again."""
    group, pipe = peer
    transfers = Transfers(storage_of(1), Exchange(group.group, CPU), StepBudget(16))
    with monkeypatch.context() as patch:
        patch.setattr("distattn.transfer.checksum_of", lambda piece, before=0: checksum_of(piece, before) ^ 1)
        pipe.send([1, 2])
        transfers.send([3, 4], 1)
    assert pipe.recv()[0].startswith("the checksum of 2 blocks is 0x")
    pipe.send([1, 2])
    transfers.send([3, 4], 1)
    assert pipe.recv()[0] is None


def test_who_is_left_in_the_middle_is_let_go(peer: tuple[EpochGroup, Connection]) -> None:
    """The epoch ends here while the budget holds the copy up: both threads come back."""
    group, pipe = peer
    budget = StepBudget(16)
    transfers = Transfers(storage_of(1), Exchange(group.group, CPU), budget)
    budget.tell(0, is_busy=True)
    with ThreadPoolExecutor(1) as thread:
        pipe.send([1, 2, 3])
        sending = thread.submit(transfers.send, [3, 4, 5], 1)
        budget.tell(1, is_busy=True)
        time.sleep(0.2)
        assert transfers.blocks_sent == 1
        budget.end()
        with pytest.raises(TransferEnded):
            sending.result(10)
    group.close()
    assert pipe.recv()[0].startswith("ExchangeError: the exchange with instance 0 broke")


def test_a_budget_is_kept_while_steps_run_and_not_otherwise() -> None:
    budget = StepBudget(16)
    budget.take(1000)
    budget.tell(5, is_busy=True)
    passed: list[int] = []

    def copy() -> None:
        for piece in range(3):
            budget.take(64)
            passed.append(piece)

    thread = threading.Thread(target=copy)
    thread.start()
    for steps in range(6, 15):
        before = len(passed)
        budget.tell(steps, is_busy=True)
        deadline = time.monotonic() + 0.05
        while len(passed) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(passed) <= (steps - 4) // 4 + 1
    budget.tell(15, is_busy=False)
    thread.join(10)
    assert passed == [0, 1, 2]
    with pytest.raises(ValueError, match="at least 1 token a step, got 0"):
        StepBudget(0)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_checksum_sees_what_changed(content: bytes, data: st.DataObject) -> None:
    piece = torch.tensor(list(content), dtype=torch.uint8)
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    other = piece.clone()
    other[at] ^= 1 << bit
    assert checksum_of(piece) == checksum_of(piece.clone())
    assert checksum_of(piece) != checksum_of(other)
    assert checksum_of(piece, checksum_of(other)) != checksum_of(other, checksum_of(piece))
