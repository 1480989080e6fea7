"""One rank of several that share a model; run by `tests/instance/test_team.py`: RANK RANKS FOLDER DTYPE.

FOLDER has the checkpoint, in `model`. Decode steps as graphs, on a GPU of each rank (without one the graph is the function run
again, in Triton's interpreter), beside the same steps run eagerly: the logits must be equal, and the same on all ranks.
"""

import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from instance import graphs
from instance.crew import Meeting
from instance.load import load_model
from instance.model import Model
from instance.plan import StepPlan
from instance.split import Place
from instance.team import Team
from kvstore.storage import KVStorage
from tests.kernels import test_decode_graphs as single

SEEN = ([33], [100, 1, 17], [16, 48], [5, 64, 31, 90], [151], [2])
LONGEST = [100, 90, 80, 70]
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2}


def main(rank: int, ranks: int, folder: Path, dtype: torch.dtype) -> None:
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    single.DEVICE = device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    meeting = Meeting.of(folder / "meeting", Place(rank, ranks), device, "127.0.0.1", 60)
    model = load_model(folder / "model", dtype, device, team=meeting.team, place=Place(rank, ranks))
    assert model.fuse("triton") is None
    if device.type == "cuda":
        model.context.team = _with_memory(meeting, model)
    stream = None if device.type == "cpu" else torch.cuda.stream(torch.cuda.Stream(device))
    with stream or nullcontext():
        ours, theirs = (_storage(model.make_storage(30, single.BLOCK)) for _ in range(2))
        previous = torch.tensor([17, 41, 3, 88, 9, 60, 2, 5], device=device)
        with mock.patch.object(graphs, "BUCKETS", (1, 2, 4)):
            captured = single.Graphs(model, ours, previous, None)
            # a step over what nobody wrote, as made-up ones are: whatever graphs and kernels keep is NaN then
            over_nothing = captured.run(replace(single.step(LONGEST, []), slots_T=[-1] * len(LONGEST)))
            assert over_nothing is not None and over_nothing.isnan().all()
            for number, kv_lens in enumerate(SEEN):
                plan = single.step(kv_lens, [(0, 3)])
                for storage in (ours, theirs):
                    _write_before(storage, plan, seed=100 * number + rank)
                got = captured.run(plan)
                assert got is not None
                want = single.eagerly(model, theirs, plan, previous)
                limit = TOLERANCE[dtype]
                torch.testing.assert_close(got, want, rtol=limit, atol=limit)
                first = want.clone()
                meeting.team.agree(first)
                torch.testing.assert_close(want, first, rtol=0, atol=0)
    print("EQUAL", flush=True)


def _with_memory(meeting: Meeting, model: Model) -> Team:
    """The team, which adds rows one-sided."""
    from instance.team_memory import TeamMemory

    place, store = meeting.team.place, torch.distributed.PrefixStore("memory", meeting.store)
    memory = TeamMemory(store=store, place=place, rows=4, row_bytes=model.row_bytes, device=model.device)
    meeting.team.agree(torch.zeros(1, dtype=torch.int64, device=model.device))  # nobody writes before all are there
    torch.cuda.synchronize(model.device)
    return Team(meeting.team.group, place, memory)


def _storage(storage: KVStorage) -> KVStorage:
    """Of which nothing was written."""
    storage.data_L2BPKD.fill_(torch.nan)
    return storage


def _write_before(storage: KVStorage, plan: StepPlan, seed: int) -> None:
    """What a step's rows see of other steps, each rank's own; NaN wherever they see nothing."""
    drawn = torch.Generator().manual_seed(seed)
    data = _storage(storage).data_L2BPKD
    for reading in plan.layout.own:
        for token in range(reading.kv_lens[0] - 1):
            block = reading.block_ids[token // single.BLOCK]
            place = data[:, :, block, token % single.BLOCK]
            place.copy_(torch.randn(place.shape, generator=drawn))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), getattr(torch, sys.argv[4]))
    sys.stdout.flush()
    os._exit(0)
