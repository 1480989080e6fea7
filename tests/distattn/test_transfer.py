"""Block moves between two real processes' groups, or threads: what arrives is what lay there, what doesn't is told, and nobody
waits for ever.

DISTATTN_TEST_DEVICE=cuda: the real ones between two GPUs, or two processes of one.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn import transfer
from distattn.budget import PATIENCE_S, StepBudget, TransferEnded
from distattn.exchange import Exchange, ExchangeError
from distattn.transfer import CopyFailed, Transfers
from instance.cell import EpochGroup, open_store
from instance.copies import CHANNELS
from kernels.kv_blocks import FP8
from kvstore.checksum import checksum_of
from kvstore.format import KVFormat
from kvstore.storage import KVStorage
from tests.support.farm import DEVICE, place
from tests.support.line import Line, LineGroup

CPU = torch.device("cpu")
BLOCKS, SIZE = 40, 16
SPAWN = multiprocessing.get_context("spawn")
TIMEOUT_S = 20.0
SHORT_S = 0.5
"""Of copies that are to fail."""


def device_of(rank: int) -> torch.device:
    return CPU if DEVICE == "cpu" else torch.device("cuda", place(rank)[0])


def storage_of(seed: int, device: torch.device = CPU, parts: int = 2, dtype: torch.dtype = torch.bfloat16) -> KVStorage:
    storage = KVStorage(
        num_layers=3,
        num_blocks=BLOCKS,
        block_size=SIZE,
        num_kv_heads=2,
        head_dim=8,
        format=KVFormat(dtype),
        device=device,
        parts=parts,
    )
    if storage.scales_L2BKX is not None:
        storage.scales_L2BKX.copy_(torch.rand(storage.scales_L2BKX.shape, generator=torch.Generator().manual_seed(seed)))
    shape = storage.data_L2BPKD.shape
    storage.data_L2BPKD.copy_(40 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3))
    if dtype.is_floating_point:
        storage.data_L2BPKD[:, :, ::7] = torch.nan  # what no step has written may be anything
    return storage


def bits(storage: KVStorage) -> torch.Tensor:
    return storage.data_L2BPKD.view(torch.int16).cpu()


def packed(storage: KVStorage) -> torch.Tensor:
    """All bytes of each block, with scales if there are some."""
    return torch.stack([storage.pack(block) for block in range(storage.num_blocks)])


class Groups:
    """One process's, as an epoch makes them, and one more that is a lane's."""

    def __init__(self, address: str, rank: int) -> None:
        self.device = device_of(rank)
        self._made: list[EpochGroup] = []
        self.lane = self._make(address, rank, "lane", self.device)
        self.words = self._make(address, rank, "words", CPU)
        free = self._free()
        self.blocks = self.words if self.device == CPU else self._make(address, rank, "blocks", self.device, CHANNELS)
        self.lane.barrier()
        self.taken = free - self._free()
        """Bytes of the GPU for `blocks`; twice that, where two processes share it."""

    def _free(self) -> int:
        """Of a GPU, in bytes, when the other process has come here, too."""
        self.lane.barrier()
        free = 0 if self.device == CPU else torch.cuda.mem_get_info(self.device)[0]
        self.lane.barrier()
        return free

    def _make(self, address: str, rank: int, name: str, device: torch.device, max_channels: int | None = None) -> EpochGroup:
        group = EpochGroup(
            store_address=address,
            host="127.0.0.1",
            name=name,
            rank=rank,
            size=2,
            device=device,
            timeout_s=TIMEOUT_S,
            max_channels=max_channels,
        )
        self._made.append(group)
        return group.meet()

    def transfers(self, storage: KVStorage, budget: StepBudget, timeout_s: float) -> Transfers:
        exchanges = Exchange(self.blocks.group, self.device), Exchange(self.words.group, CPU)
        return Transfers(storage, *exchanges, budget, timeout_s)

    def close(self) -> None:
        for group in reversed(self._made):
            group.close()


def target(address: str, pipe: Connection) -> None:
    """Another process: receives as it is told, and says what it has then."""
    os.environ.update(place(1)[1])
    groups = Groups(address, 1)
    storage = storage_of(2, groups.device)
    transfers = groups.transfers(storage, StepBudget(16), TIMEOUT_S)
    hasty = groups.transfers(storage, StepBudget(16), SHORT_S)
    while (told := pipe.recv()) is not None:
        word, move, ids = told
        wrong: str | None = None
        try:
            if word == "receive":
                wrong = transfers.receive(move, ids, 0)
            elif word == "receive in time":
                wrong = hasty.receive(move, ids, 0)
            elif word == "begin and stop":
                transfers._say(move, 0, 0)
                transfers._hear(move, 0, 0)
            else:
                groups.lane.barrier()
        except CopyFailed as failed:
            wrong = f"CopyFailed: {failed}"
        pipe.send((wrong, bits(storage).numpy().tolist()))
    groups.close()


@dataclass
class Peer:
    groups: Groups
    pipe: Connection

    def send(self, move: int, here: list[int] | None, timeout_s: float = TIMEOUT_S) -> Transfers:
        transfers = self.groups.transfers(storage_of(1, self.groups.device), StepBudget(16), timeout_s)
        transfers.send(move, here, 1)
        return transfers


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    """Our end of the groups of two processes, and a pipe to the other."""
    for name, value in place(0)[1].items():
        monkeypatch.setenv(name, value)
    store, address = open_store("127.0.0.1", TIMEOUT_S)
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(address, theirs), daemon=True)
    process.start()
    groups = Groups(address, 0)
    yield Peer(groups, ours)
    groups.close()
    ours.send(None)
    process.join(TIMEOUT_S)
    assert process.exitcode == 0
    del store


def test_blocks_arrive_as_they_were_and_nothing_else_changes(peer: Peer) -> None:
    here, there = [5, 0, 39, 7], [1, 2, 30, 7]
    peer.pipe.send(("receive", 1, there))
    transfers = peer.send(1, here)
    wrong, found = peer.pipe.recv()
    assert wrong is None
    expected = bits(storage_of(2))
    expected[:, :, there] = bits(storage_of(1))[:, :, here]
    assert torch.equal(torch.tensor(found, dtype=torch.int16), expected)
    assert (transfers.blocks_sent, transfers.bytes_sent) == (4, 4 * storage_of(1).block_bytes)


def test_what_arrives_otherwise_is_told(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source says that it has sent something else, and after that a copy is right again."""
    with monkeypatch.context() as patch:
        patch.setattr("distattn.transfer.checksum_of", lambda piece, before=0: checksum_of(piece, before) ^ 1)
        peer.pipe.send(("receive", 1, [1, 2]))
        peer.send(1, [3, 4])
    assert peer.pipe.recv()[0].startswith("the checksum of 2 blocks is ")
    peer.pipe.send(("receive", 2, [1, 2]))
    peer.send(2, [3, 4])
    assert peer.pipe.recv()[0] is None


def test_who_is_left_in_the_middle_is_let_go(peer: Peer) -> None:
    """The epoch ends here while the budget holds the copy up: both threads come back."""
    budget = StepBudget(16)
    transfers = peer.groups.transfers(storage_of(1, peer.groups.device), budget, TIMEOUT_S)
    budget.tell(0, is_busy=True)
    with ThreadPoolExecutor(1) as thread:
        peer.pipe.send(("receive", 1, [1, 2, 3]))
        sending = thread.submit(transfers.send, 1, [3, 4, 5], 1)
        budget.tell(1, is_busy=True)
        wait_until(lambda: transfers.blocks_sent == 1)
        budget.end()
        with pytest.raises(TransferEnded):
            sending.result(10)
    peer.groups.close()
    assert peer.pipe.recv()[0].startswith("CopyFailed: the exchange with instance 0 broke")


def test_a_copy_whose_other_end_never_comes_fails_alone(peer: Peer) -> None:
    """Within the stated time, again and again, and the lane's group between the same two goes on."""
    for move in (1, 2):
        moment = time.monotonic()
        with pytest.raises(CopyFailed, match="the exchange with instance 1 broke"):
            peer.send(move, [3, 4], timeout_s=SHORT_S)
        assert time.monotonic() - moment < 5
    # mostly at once, as its connection is closed; but Gloo may lose what it should tell of that
    peer.pipe.send(("receive in time", 3, [1, 2]))
    moment = time.monotonic()
    assert peer.pipe.recv()[0].startswith("CopyFailed: the exchange with instance 0 broke")
    assert time.monotonic() - moment < 5
    peer.pipe.send(("lane", 0, []))
    peer.groups.lane.barrier()
    assert peer.pipe.recv()[0] is None


def test_a_block_that_does_not_pass_ends_the_copy_and_on_a_gpu_the_epoch(peer: Peer) -> None:
    """Both have begun to move it, and one stops there. It is larger than what a group takes without the other end."""
    device = peer.groups.device
    large = KVStorage(
        num_layers=8, num_blocks=2, block_size=2**17, num_kv_heads=2, head_dim=8, format=KVFormat(torch.bfloat16), device=device
    )
    peer.pipe.send(("begin and stop", 1, []))
    failure, what = (CopyFailed, "the exchange with") if DEVICE == "cpu" else (ExchangeError, r"did not pass within 0\.5 s")
    moment = time.monotonic()
    with pytest.raises(failure, match=what):
        peer.groups.transfers(large, StepBudget(16), SHORT_S).send(1, [1], 1)
    assert time.monotonic() - moment < 5
    assert peer.pipe.recv()[0] is None


@pytest.mark.skipif(DEVICE == "cpu", reason="what a communicator takes of a GPU: DISTATTN_TEST_DEVICE=cuda")
def test_the_communicator_of_copies_takes_no_more_than_is_reserved(peer: Peer) -> None:
    from instance.memory import COPIES_BYTES  # it imports transformers, for which the other process would wait

    print(f"the communicator for copies took {peer.groups.taken:,} bytes")
    assert peer.groups.taken <= 2 * COPIES_BYTES


# --- two ends in threads ------------------------------------------------------------------------------------------------------


class Ends:
    """Rank 0 copies to rank 1, each in a thread."""

    def __init__(
        self,
        *,
        budgets: tuple[int, int] = (16, 16),
        timeout_s: float = TIMEOUT_S,
        parts: int = 2,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.words, self.blocks = Line(), Line()
        self.storages = [storage_of(rank + 1, parts=parts, dtype=dtype) for rank in range(2)]
        self.budgets = [StepBudget(tokens) for tokens in budgets]
        self.transfers = [
            Transfers(
                self.storages[rank],
                Exchange(LineGroup(self.blocks, rank), CPU),
                Exchange(LineGroup(self.words, rank), CPU),
                self.budgets[rank],
                timeout_s,
            )
            for rank in range(2)
        ]
        self.threads = [ThreadPoolExecutor(1) for _ in range(2)]

    def send(self, move: int, ids: list[int] | None) -> Any:
        return self.threads[0].submit(self.transfers[0].send, move, ids, 1)

    def receive(self, move: int, ids: list[int] | None) -> Any:
        return self.threads[1].submit(self.transfers[1].receive, move, ids, 0)

    def close(self) -> None:
        for line in (self.words, self.blocks):
            line.close()
        for thread in self.threads:
            thread.shutdown()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("slow", [0, 1])
def test_neither_begins_to_move_a_block_before_both_may(ends: Ends, slow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU what waits for the other end would hold processors."""
    monkeypatch.setattr("distattn.budget.PATIENCE_S", 60)
    ends.budgets[slow].tell(0, is_busy=True)
    sending, receiving = ends.send(1, [3, 4]), ends.receive(1, [5, 6])
    for block in range(2):
        time.sleep(0.1)
        assert len(ends.blocks.begun) == 2 * block, f"a block began while instance {slow} had no budget for it"
        ends.budgets[slow].tell(block + 1, is_busy=True)
        wait_until(lambda both=2 * block + 2: len(ends.blocks.begun) == both)  # type: ignore[misc]
    assert receiving.result(10) is None
    sending.result(10)
    assert torch.equal(bits(ends.storages[1])[:, :, [5, 6]], bits(ends.storages[0])[:, :, [3, 4]])


def test_a_block_waits_no_longer_for_its_budget_than_is_stated(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps may take longer than any wait for a word."""
    monkeypatch.setattr("distattn.budget.PATIENCE_S", 0.05)
    for budget in ends.budgets:
        budget.tell(0, is_busy=True)
    sending, receiving = ends.send(1, [3, 4]), ends.receive(1, [5, 6])
    assert receiving.result(10) is None
    sending.result(10)
    assert PATIENCE_S < transfer.PEER_TIMEOUT_S


@pytest.mark.parametrize("who", ["source", "target", "both"])
def test_who_has_no_part_in_a_copy_says_so_and_the_next_is_right(ends: Ends, who: str) -> None:
    sending = ends.send(1, None if who != "target" else [3, 4])
    receiving = ends.receive(1, None if who != "source" else [5, 6])
    told = {
        "source": ("nothing was offered for it here", "instance 0 has no part in it"),
        "target": ("instance 1 has no part in it", "nothing is reserved for it here"),
        "both": ("instance 1 has no part in it", "nothing is reserved for it here"),
    }[who]
    for future, reason in zip((sending, receiving), told, strict=True):
        with pytest.raises(CopyFailed, match=reason):
            future.result(10)
    sending, receiving = ends.send(2, [3]), ends.receive(2, [5])
    assert receiving.result(10) is None
    sending.result(10)


def test_ends_of_two_moves_do_not_copy() -> None:
    ends = Ends(timeout_s=0.2)
    sending, receiving = ends.send(1, [3]), ends.receive(2, [5])
    with pytest.raises(CopyFailed, match="instance 1 copies for move 2, this one for 1"):
        sending.result(10)
    with pytest.raises(CopyFailed, match="the exchange with instance 0 broke: Timed out"):
        receiving.result(10)
    assert not ends.blocks.begun
    ends.close()


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_ends_with_any_budgets_and_steps_copy_all(data: st.DataObject) -> None:
    """Also if they differ: what is moved at once doesn't depend on them. Of keys and values, or of latents; with scales in
    8 bits."""
    budgets = data.draw(st.tuples(st.integers(1, 100), st.integers(1, 100)), "tokens a step")
    count = data.draw(st.integers(0, 6), "blocks")
    here = data.draw(st.permutations(range(BLOCKS)), "here")[:count]
    there = data.draw(st.permutations(range(BLOCKS)), "there")[:count]
    told = data.draw(st.lists(st.tuples(st.integers(0, 1), st.booleans()), max_size=20), "steps")
    dtype = data.draw(st.sampled_from([torch.bfloat16, FP8, torch.int8]), "dtype")
    ends = Ends(budgets=budgets, parts=data.draw(st.integers(1, 2), "parts"), dtype=dtype)
    before = packed(ends.storages[1])
    steps = [0, 0]
    sending, receiving = ends.send(1, here), ends.receive(1, there)
    for rank, is_busy in told:
        steps[rank] += 1
        ends.budgets[rank].tell(steps[rank], is_busy=is_busy)
    for budget, step in zip(ends.budgets, steps, strict=True):
        budget.tell(step, is_busy=False)
    assert receiving.result(10) is None
    sending.result(10)
    before[there] = packed(ends.storages[0])[here]
    assert torch.equal(packed(ends.storages[1]), before)
    ends.close()


def test_a_budget_is_kept_while_steps_run_and_not_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distattn.budget.PATIENCE_S", 60)
    budget = StepBudget(16)
    budget.take(1000)
    budget.tell(5, is_busy=True)
    passed: list[int] = []

    def copy() -> None:
        for block in range(3):
            budget.take(64)
            passed.append(block)

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


def test_who_does_not_wait_is_told_whether_it_may_copy() -> None:
    budget = StepBudget(16)
    assert budget.try_take(1000)
    budget.tell(1, is_busy=True)
    assert not budget.try_take(32)
    budget.tell(2, is_busy=True)
    assert budget.try_take(32)
    assert not budget.try_take(32)
    assert budget.try_take(32, is_patient=False)
    budget.end()
    assert budget.try_take(1000)


@given(
    st.integers(1, 40), st.integers(1, 8), st.integers(1, 100), st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30)
)
def test_no_more_is_saved_up_than_a_step_of_prompts_brings(
    per_step: int, weight: int, block: int, steps: list[tuple[bool, bool]]
) -> None:
    """`steps`: whether each is one of prompts, and whether as much as may be is copied beside it."""
    budget = StepBudget(per_step, weight)
    budget.tell(0, is_busy=True)
    assert not budget.try_take(block)
    told = copied = lost = 0
    marks = [0]
    """After each step: by how much more was copied than steps had brought."""
    for is_prompt, copies in steps:
        told += weight if is_prompt else 1
        budget.tell(told, is_busy=True)
        while copies and budget.try_take(block):
            copied += block
        if not copies:
            lost = told * per_step - copied  # at most
        assert told * per_step - copied < block + lost
        marks.append(copied - told * per_step)
    most = block + per_step * weight
    assert all(after - before <= most for i, before in enumerate(marks) for after in marks[i:])


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_checksum_sees_what_changed(content: bytes, data: st.DataObject) -> None:
    piece = torch.tensor(list(content), dtype=torch.uint8)
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    other = piece.clone()
    other[at] ^= 1 << bit
    assert checksum_of(piece) == checksum_of(piece.clone())
    assert checksum_of(piece) != checksum_of(other)
    assert checksum_of(piece, checksum_of(other)) != checksum_of(other, checksum_of(piece))
