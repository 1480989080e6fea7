"""One stage of two; run by `tests/instance/test_pipe_memory.py`: STAGE FOLDER.

Steps of other numbers of rows go round, several under way. Who takes a step that isn't given yet waits by itself, its device
for nothing. Then stage 0 gives a step that its device doesn't come to: until that is ended stage 1's waits for it, and coming
late does no harm.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from distattn.exchange import Exchange
from instance.cell import make_group
from instance.pipe import ExchangePipe
from instance.pipe_memory import MemoryPipe
from instance.split import Place
from kernels.stream_words import StreamWords, stream_of_its_own

dist: Any = torch.distributed  # its stubs lack FileStore
COUNTS = (1, 7, 64, 3, 33, 64, 1, 2, 50, 8)
MOST = 64
UNDER_WAY = 3
HOST = torch.device("cpu")


def main(stage: int, folder: Path) -> None:
    device = torch.device("cuda", stage % torch.cuda.device_count())
    torch.cuda.set_device(device)
    store = dist.FileStore(str(folder / "store"), 2)
    store.set_timeout(timedelta(seconds=60))
    place = Place(stage=stage, stages=2)
    stores = (dist.PrefixStore(way, store) for way in ("there", "back"))
    ways = (Exchange(make_group(its, "127.0.0.1", stage, 2, HOST, 60), HOST) for its in stores)
    told = ExchangePipe(*ways, place, hidden_size=1, dtype=torch.uint8, device=HOST)
    pipe = MemoryPipe(place, told=told, store=store, most_rows=MOST, hidden_size=32, dtype=torch.bfloat16, device=device)
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
            time.sleep(1)
            pipe.give(pipe.token())
        else:
            with ThreadPoolExecutor(1) as other:
                taken = other.submit(_take_one, pipe, device)
                time.sleep(0.2)
                torch.cuda.synchronize(device)  # as a call may that another lane makes, for which stage 0 may wait
                assert not taken.done()
                taken.result()
        torch.cuda.synchronize(device)
        _meet(store, stage, "given late")
        _be_ended(pipe, store, stage, device)
    try:
        pipe.give(torch.zeros(MOST + 1, 32, dtype=torch.bfloat16, device=device))
    except ValueError as error:
        assert str(error) == "65 rows go to the next stage, which has room for 64"
        print("WENT ROUND", flush=True)
    _meet(store, stage, "over")


def _take_one(pipe: MemoryPipe, device: torch.device) -> None:
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        pipe.take(1)


def _be_ended(pipe: MemoryPipe, store: Any, stage: int, device: torch.device) -> None:
    words, word = StreamWords(), torch.zeros(1, dtype=torch.int32, device=device)
    late = stream_of_its_own(device, "late")
    torch.cuda.synchronize(device)
    if stage == 0:
        words.wait(word.data_ptr(), 1)  # its device is busy with something else
        pipe.give(pipe.token())
    else:
        pipe.take(1)
        nobody_came = torch.cuda.Event()
        nobody_came.record()
        time.sleep(0.1)
        assert not nobody_came.query()
    pipe.abort()
    if stage == 1:
        torch.cuda.synchronize(device)
    _meet(store, stage, "gave up")
    if stage == 0:
        with torch.cuda.stream(late):
            words.write(word.data_ptr(), 1)
    torch.cuda.synchronize(device)


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
