"""One stage of two; run by `tests/instance/test_pipe_memory.py`: STAGE FOLDER.

Steps of other numbers of rows go round, several under way; then both wait for two more until that is ended, though one of them
still comes to the first.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from instance.pipe_memory import MemoryPipe
from instance.split import Place

dist: Any = torch.distributed  # its stubs lack FileStore
COUNTS = (1, 7, 64, 3, 33, 64, 1, 2, 50, 8)
MOST = 64
UNDER_WAY = 3


def main(stage: int, folder: Path) -> None:
    device = torch.device("cuda", stage % torch.cuda.device_count())
    torch.cuda.set_device(device)
    store = dist.FileStore(str(folder / "store"), 2)
    store.set_timeout(timedelta(seconds=60))
    place = Place(stage=stage, stages=2)
    pipe = MemoryPipe(place, store=store, most_rows=MOST, hidden_size=32, dtype=torch.bfloat16, device=device)
    _meet(store, stage, "made")
    with torch.cuda.stream(torch.cuda.Stream(device)):
        if stage == 0:
            _send_round(pipe, device)
        else:
            for count in COUNTS * 20:
                pipe.give(pipe.take(count) + 1)
        torch.cuda.synchronize(device)
        _meet(store, stage, "went round")
        if stage == 0:
            torch.cuda._sleep(10**9)  # half a second
        pipe.take(1)
        pipe.take(1)
        nobody_came = torch.cuda.Event()
        nobody_came.record()
        time.sleep(0.1)
        assert not nobody_came.query()
        pipe.abort()
        _meet(store, stage, "gave up")
        if stage == 1:  # a step that the first one still waits for comes late; the other never does
            pipe.give(torch.zeros(1, 32, dtype=torch.bfloat16, device=device))
        torch.cuda.synchronize(device)
    try:
        pipe.give(torch.zeros(MOST + 1, 32, dtype=torch.bfloat16, device=device))
    except ValueError as error:
        assert str(error) == "65 rows go to the next stage, which has room for 64"
        print("WENT ROUND", flush=True)
    _meet(store, stage, "over")


def _send_round(pipe: MemoryPipe, device: torch.device) -> None:
    sent: list[torch.Tensor] = []
    differ = torch.zeros((), dtype=torch.bool, device=device)
    for number, count in enumerate(COUNTS * 20):
        rows = torch.full((count, 32), float(number % 100), dtype=torch.bfloat16, device=device)
        pipe.give(rows)
        sent.append(rows)
        if len(sent) == UNDER_WAY:
            first = sent.pop(0)
            differ |= (pipe.take(len(first)) != first + 1).any()
    for rows in sent:
        differ |= (pipe.take(len(rows)) != rows + 1).any()
    assert not differ.item()


def _meet(store: Any, stage: int, where: str) -> None:
    store.set(f"{where}-{stage}", b"here")
    store.get(f"{where}-{1 - stage}")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
