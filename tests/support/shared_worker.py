"""One of several instances that share feeds and head; run by `tests/instance/test_shared_memory.py`: RANK SIZE FOLDER DTYPE.

Split decode steps as graphs, beside the same rows' whole steps run eagerly: the logits must be equal. On a GPU for each, or
one for all, who take turns then; without one the graph is the function run again, in Triton's interpreter, and memory is a
file's. With a GPU for each, rows may travel to attend, too (`distattn.peers`), though they don't: those graphs are others.
"""

import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from distattn.peers import PeerMemory
from instance import graphs
from instance.elastic_tp import FeedShares
from instance.load import load_model
from instance.mailboxes import Abort, mailbox
from instance.model import Model
from instance.plan import StepPlan
from instance.shared_memory import FeedMemory, counted
from kvstore.storage import KVStorage
from tests.kernels import test_decode_graphs as single

BUCKETS = (1, 2, 4)
STEPS: list[dict[int, list[int]]] = [
    {0: [33]},
    {1: [33, 5]},
    {0: [100, 1], 1: [17]},
    {0: [4], 1: [16, 48]},
    {0: [5, 64, 31, 90]},
    {1: [2]},
]
"""Tokens that the rows of each rank see."""
TOLERANCE = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def main(rank: int, size: int, folder: Path, dtype: torch.dtype) -> None:
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    single.DEVICE = device
    torch.set_num_threads(1)
    if gpus:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    store: Any = torch.distributed.FileStore(str(folder / "store"), size)
    model = load_model(folder / "model", dtype, device)
    assert model.fuse("triton") is None
    memory = _memory(model, store, rank, size, folder)
    peers = None
    if gpus >= size:
        peers = PeerMemory(store=store, rank=rank, size=size, rows=256, shape=model.shape, device=device)
    _meet(store, "memory", rank, size)
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if gpus else nullcontext()
    turns = graphs._TURNS if gpus else 1
    with stream, mock.patch.multiple(graphs, BUCKETS=BUCKETS, _TURNS=turns):
        ours, theirs = (model.make_storage(30, single.BLOCK) for _ in range(2))
        for storage in (ours, theirs):
            storage.data_L2BPKD.copy_(torch.randn(storage.data_L2BPKD.shape, generator=torch.Generator().manual_seed(rank)))
        previous = torch.tensor([17, 41, 3, 88, 9, 60, 2, 5], device=device)
        captured = single.Graphs(model, ours, previous, peers, feeds=memory)
        _meet(store, "captured", rank, size)
        if size == 2 and dtype != torch.float16:  # of more members there is no room for two rows of each
            costs = captured.measure_feeds(range(size), rank)
            assert costs.whole(1) > 0
            print(
                f"one row each: whole {costs.whole(1) / 1e3:.1f} us, split {costs.split(2, 2) / 1e3:.1f} us; {costs}",
                flush=True,
            )
        for number, seen in enumerate(STEPS):
            shares = FeedShares(rank, tuple((its, len(seen.get(its, []))) for its in range(size)))
            plan = replace(single.step(seen.get(rank, []), [(0, 3)] if seen.get(rank) else []), shares=shares)
            assert captured.can_run(plan)
            got = captured.run(plan)
            _check(model, theirs, plan, previous, got, number)
    _meet(store, "end", rank, size)
    print("EQUAL", flush=True)


def _check(
    model: Model, storage: KVStorage, plan: StepPlan, previous: torch.Tensor, got: torch.Tensor | None, number: int
) -> None:
    """What a split step has brought, beside the whole one."""
    if not plan.token_ids_T:
        assert got is None
        return
    assert got is not None
    want = single.eagerly(model, storage, plan, previous)
    limit = TOLERANCE[model.shape.dtype]
    torch.testing.assert_close(got, want, rtol=limit, atol=limit, msg=lambda said: f"step {number}: {said}")


def _memory(model: Model, store: Any, rank: int, size: int, folder: Path) -> FeedMemory:
    """Between GPUs, or between processes without one."""
    assert model.fused is not None
    vocab_size = model.fused.num_logits
    inboxes = FeedMemory.inboxes(
        parts=size,
        rows=max(BUCKETS),
        hidden_size=model.hidden_size,
        vocab_size=vocab_size,
        dtype=model.shape.dtype,
        device=model.device,
    )
    if model.device.type == "cuda":
        return FeedMemory.share(inboxes, store, part=rank, vocab_size=vocab_size)
    abort, mailboxes = Abort.of(model.device), {}
    for name, inbox in inboxes.items():
        files = {
            its: torch.from_file(str(folder / f"{name}-{its}"), shared=True, size=inbox.numel(), dtype=torch.int64).view_as(
                inbox
            )
            for its in range(size)
        }
        mailboxes[name] = mailbox(files.pop(rank), files, part=rank, counted=counted(inbox), abort=abort)
    return FeedMemory(**mailboxes, vocab_size=vocab_size, abort=abort)


def _meet(store: Any, what: str, rank: int, size: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    store.set(f"{what}-{rank}", b"")
    store.wait([f"{what}-{its}" for its in range(size)], timedelta(seconds=120))


if __name__ == "__main__":
    began = time.perf_counter()
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), getattr(torch, sys.argv[4]))
    print(f"{time.perf_counter() - began:.1f} s", flush=True)
    sys.stdout.flush()
    os._exit(0)
