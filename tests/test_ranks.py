"""Instances of several ranks (tensor parallel, or stages): how they start, lose one and end. Real processes, on loopback."""

import asyncio
import re
import secrets
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.farm import DEVICE, NUM_GPUS
from tests.support.processes import Processes, Started, address_of, client_of, is_alive, until_ready, workers
from tests.support.tiny import make_long_model, make_model
from tests.test_lifecycle import answers, flags, until
from tests.test_membership import Stream, text

pytestmark = pytest.mark.skipif(DEVICE == "cuda" and 1 < NUM_GPUS < 4, reason="needs four GPUs, or one for all")

NEW = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_long_model(tmp_path_factory.mktemp("models"))


def ranks(
    started: Processes, given: Sequence[str], *, instances: int, degree: int = 2, flag: str = "--tp"
) -> list[list[Started]]:
    """The ranks of each instance, as one torchrun would start them."""
    run, total = secrets.token_hex(4), instances * degree
    each = [started.instance(*given, flag, str(degree), rank=rank, world_size=total, run_id=run) for rank in range(total)]
    return [each[i : i + degree] for i in range(0, total, degree)]


@pytest.mark.parametrize("flag", ["--tp", "--pp"])
async def test_torchrun_starts_them_and_ends_them(started: Processes, model: Path, flag: str) -> None:
    gmanager = started.gmanager()
    address = await address_of(gmanager)
    torchrun = started.torchrun(*flags(address, model, flag, "2", "--grace-s", "0"), nproc=4, launch=["--standalone"])
    await until_ready(address)
    async with client_of(address) as client:
        (cell,) = (await client.stats()).cells
        assert (cell.size, cell.total_tokens) == (2, 2 * 16384)
        await answers(client, model)
    pids = list(workers(torchrun).values())
    assert len(pids) == 4
    torchrun.signal(signal.SIGTERM)
    await torchrun.exit_code()
    assert not [pid for pid in pids if is_alive(pid)]
    assert gmanager.poll() is None


@pytest.mark.parametrize("flag", ["--tp", "--pp"])
@pytest.mark.parametrize("lost", [0, 1])
async def test_an_instance_that_loses_a_rank_is_lost_and_the_others_go_on(
    started: Processes, model: Path, lost: int, flag: str
) -> None:
    """Its other rank ends by itself, and says why. A stream over both instances goes on, exactly, with the other two ranks."""
    ids, expected = text(model, 400, NEW)
    address = await address_of(started.gmanager())
    cell = ranks(started, flags(address, model), instances=2, flag=flag)
    await until_ready(address)
    async with client_of(address) as client:
        stream = Stream(client, "over both", ids, NEW, "all")
        await stream.reach(5)
        home = (await client.stats()).requests["over both"].home
        victim = cell[1 - (home or 0)]
        victim[lost].signal(signal.SIGKILL)
        await stream.is_right(expected)
        left = await until(client, lambda s: len(s.instances) == 1 and s.cells[0].state == "ready")
        assert left.epoch == 2
    other = victim[1 - lost]
    await other.says("the first rank is gone" if lost == 0 else "rank 1 of 2 is lost")
    assert await other.exit_code() == (0 if lost == 0 else 1)


async def test_what_can_not_be_split_is_said_before_weights_are_loaded(started: Processes, model: Path, tmp_path: Path) -> None:
    address = await address_of(started.gmanager())
    experts, chunks = (make_model(kind, tmp_path / kind) for kind in ("gpt-oss", "llama4"))
    (model_of_nothing := tmp_path / "nothing").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model_of_nothing / name).write_bytes((model / name).read_bytes())
    (model_of_nothing / "model.safetensors").write_bytes(b"no weights")
    cases: list[tuple[Path, int, str, str]] = [
        (model, 3, "--tp 2", "instance: --tp 2 doesn't divide the 3 processes of this torchrun"),
        (model, 2, "--tp 2 --pp 2", "instance: --tp 2 times --pp 2 doesn't divide the 2 processes of this torchrun"),
        (model, 1, "--pp 0", "instance: --pp must be at least 1, got 0"),
        (
            model,
            2,
            "--pp 2 --pp-layers 1,1,1",
            r"--pp-layers 1,1,1 are not the layers of 2 stages \(--pp\), at least one for each",
        ),
        (model, 2, "--pp 2 --check-cache", "--host-memory, --disk and --check-cache don't go with --pp 2 yet"),
        (
            model_of_nothing,
            5,
            "--tp 5",
            r"llama: it has 4 query heads and \d+ inner dims, which 5 parts can't share \(--tp 5\)",
        ),
        (chunks, 2, "--tp 2", "llama4_text: --tp 2 splits layers that have the parts of Llama's, Gemma's or DeepSeek's"),
        (model_of_nothing, 3, "--pp 3", r"llama: it has 2 layers, which 3 stages can't share \(--pp\)"),
        (model_of_nothing, 2, "--pp 2 --pp-layers 2,1", "llama: it has 2 layers, and --pp-layers 2,1 are 3"),
        (
            model_of_nothing,
            2,
            "--tp 2 --elastic-tp 4",
            "--elastic-tp 4 is for instances that each have all weights: these are split between 2 ranks",
        ),
        (model_of_nothing, 1, "--elastic-tp on", "--elastic-tp 'on' is neither off, nor auto, nor a number of rows"),
        (experts, 1, "--elastic-tp 4", "gpt_oss: --elastic-tp 4 splits layers that have the parts of Llama's or Gemma's"),
        (chunks, 2, "--pp 2", "llama4_text: --pp 2 splits layers that have the parts of Llama's, Gemma's or DeepSeek's"),
    ]
    for path, processes, given, sentence in cases:
        run = secrets.token_hex(4)
        each = [
            started.instance(*flags(address, path, *given.split()), rank=rank, world_size=processes, run_id=run)
            for rank in range(processes)
        ]
        for process in each:
            assert await process.exit_code(60) == 2, process.text
            assert re.search(sentence, process.text), process.text
            assert "Traceback" not in process.text


@pytest.mark.parametrize(("flag", "what"), [("--tp", "degree of tensor parallelism"), ("--pp", "number of pipeline stages")])
async def test_instances_of_a_cell_have_as_many_ranks(started: Processes, model: Path, flag: str, what: str) -> None:
    gmanager = started.gmanager()
    address = await address_of(gmanager)
    started.instance(*flags(address, model), rank=0, world_size=2)
    await gmanager.says("registered=1 of=2")
    (pair,) = ranks(started, flags(address, model, "--cell-size", "2"), instances=1, flag=flag)
    assert await pair[0].exit_code(60) == 1
    await pair[0].says(f"the gManager refused this instance: its {what} is 2, that of cell 'main' is 1")
    assert await pair[1].exit_code() == 0
    started.instance(*flags(address, model), rank=1, world_size=2)
    await until_ready(address)
    async with client_of(address) as client:
        await asyncio.wait_for(answers(client, model), 30)


@pytest.mark.parametrize("flag", ["--tp", "--pp"])
async def test_a_drain_moves_each_ranks_part(started: Processes, model: Path, flag: str) -> None:
    """Of two instances of two ranks one is emptied under four requests: no token differs, and nothing is computed again."""
    texts = [text(model, 160 + 40 * i, 300, i) for i in range(4)]
    address = await address_of(started.gmanager())
    cell = ranks(started, flags(address, model), instances=2, flag=flag)
    await until_ready(address)
    async with client_of(address) as client:
        streams = [Stream(client, f"s{i}", ids, 300, "all") for i, (ids, _) in enumerate(texts)]
        for stream in streams:
            await stream.reach(10)
        await client.drain(1)
        assert not any(stream.task.done() for stream in streams), "there is no load any more"
        for stream, (_, expected) in zip(streams, texts, strict=True):
            await stream.is_right(expected)
        stats = await until(client, lambda s: len(s.instances) == 1 and s.cells[0].state == "ready")
        assert stats.counters.blocks_copied > 0
        assert stats.counters.tokens_prefilled - sum(len(ids) for ids, _ in texts) <= 4 * len(texts)
    assert [await rank.exit_code() for rank in cell[1]] == [0, 0]
