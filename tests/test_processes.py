"""Starting, dying and ending, with the real commands as real processes on loopback."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gmanager import AsyncClient, Chunk, RequestFailed, RequestRefused, SamplingParams
from tests.support.processes import (
    ENDS_WITHIN_S,
    Processes,
    Started,
    address_of,
    client_of,
    cpu_seconds,
    free_port,
    is_alive,
    listening_addresses,
    processes,
    until_ready,
    workers,
)
from tests.support.tiny import make_model

GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
async def started(tmp_path: Path) -> AsyncIterator[Processes]:
    async with processes(tmp_path) as ours:
        yield ours


def flags(address: str, model: Path, *more: str) -> list[str]:
    settings = ["--gmanager", address, "--model", str(model), "--device", "cpu", "--kv-tokens", "512"]
    return [*settings, "--threads", "1", "--chunk-tokens", "64", *more]


async def pair(started: Processes, model: Path, *more: str) -> tuple[Started, str, list[Started]]:
    """A gManager and a ready cell of two instances."""
    gmanager = started.gmanager(*more)
    address = await address_of(gmanager)
    instances = [started.instance(*flags(address, model), rank=rank, world_size=2) for rank in range(2)]
    await until_ready(address)
    return gmanager, address, instances


def prompt(tokens: int) -> list[int]:
    return [i % 256 for i in range(tokens)]


async def generate(client: AsyncClient, tokens: int = 40, params: SamplingParams = GREEDY) -> list[Chunk]:
    return [chunk async for chunk in client.generate(prompt(tokens), params, spread="all" if tokens > 16 else None)]


async def test_torchrun_serves_and_ends_when_asked(started: Processes, model: Path) -> None:
    """The README's commands; SIGTERM to torchrun ends its instances, which leave the cell in order."""
    gmanager = started.gmanager("--spread", "all")
    address = await address_of(gmanager)
    torchrun = started.torchrun(*flags(address, model), nproc=2, launch=["--standalone"])
    await until_ready(address)
    async with client_of(address) as client:
        chunks = [
            c async for c in client.generate("Once upon a time there was a fox", SamplingParams(max_tokens=8, temperature=0))
        ]
        assert sum(len(chunk.token_ids) for chunk in chunks) == 8
        (request,) = (await client.stats()).requests.values()
        assert len(request.kv_tokens) == 2
    instances = workers(torchrun)
    assert sorted(instances) == [0, 1]
    for pid in [gmanager.pid, *instances.values()]:
        assert listening_addresses(pid) <= {"127.0.0.1"}, "only loopback unless told otherwise"
    torchrun.signal(signal.SIGTERM)
    await torchrun.exit_code()
    assert not [pid for pid in instances.values() if is_alive(pid)]
    gmanager.signal(signal.SIGTERM)
    assert await gmanager.exit_code() == 0


@pytest.mark.parametrize("nodes", ["two torchruns", "--nnodes 2"])
async def test_two_torchruns_form_one_cell(started: Processes, model: Path, nodes: str) -> None:
    gmanager = started.gmanager()
    address = await address_of(gmanager)
    if nodes == "--nnodes 2":
        meet = [
            "--nnodes",
            "2",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"127.0.0.1:{free_port()}",
            "--local-addr",
            "127.0.0.1",
        ]
        launches, size = [[*meet, "--rdzv-id", "7"]] * 2, []
    else:
        launches, size = [["--standalone"]] * 2, ["--cell-size", "2"]
    for launch in launches:
        started.torchrun(*flags(address, model, *size), nproc=1, launch=launch)
    await until_ready(address)
    async with client_of(address) as client:
        assert len(await generate(client)) >= 1
        (request,) = (await client.stats()).requests.values()
        assert sorted(request.kv_tokens) == [0, 1]


async def test_a_killed_instance_ends_its_cell_and_a_new_one_serves(started: Processes, model: Path) -> None:
    gmanager, address, instances = await pair(started, model)
    async with client_of(address) as client:
        running = [asyncio.create_task(generate(client, tokens, LONG)) for tokens in (40, 10, 10)]
        while not any(r.generated_tokens for r in (await client.stats()).requests.values()):
            await asyncio.sleep(0.01)
        instances[1].signal(signal.SIGKILL)
        began = time.monotonic()
        for task in running:
            with pytest.raises(RequestFailed, match="(instance 1 of cell 'main' is lost|the exchange with instance 1 broke)"):
                await task
        assert time.monotonic() - began < ENDS_WITHIN_S
        assert await instances[0].exit_code() == 1
        assert gmanager.poll() is None
        for rank in range(2):
            started.instance(*flags(address, model), rank=rank, world_size=2)
        await until_ready(address, epoch=2)
        assert sum(len(c.token_ids) for c in await generate(client)) == GREEDY.max_tokens


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_end_instances_and_pending_requests_are_told(
    started: Processes, model: Path, number: signal.Signals
) -> None:
    gmanager, address, instances = await pair(started, model)
    async with client_of(address) as client:
        running = asyncio.create_task(generate(client, 40, LONG))
        while not any(r.generated_tokens for r in (await client.stats()).requests.values()):
            await asyncio.sleep(0.01)
        instances[0].signal(number)
        assert await instances[0].exit_code() == 0
        with pytest.raises(RequestFailed, match=f"instance 0 of cell 'main' left: {number.name}"):
            await running
        assert await instances[1].exit_code() == 1
        waiting = asyncio.create_task(generate(client))
        while not any(r.state == "queued" for r in (await client.stats()).requests.values()):
            await asyncio.sleep(0.01)
        gmanager.signal(number)
        with pytest.raises(RequestFailed, match="shutting down"):
            await waiting
        assert await gmanager.exit_code() == 0


async def test_instances_wait_for_a_gmanager_that_comes_late(started: Processes, model: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    instances = [started.instance(*flags(address, model), rank=rank, world_size=2) for rank in range(2)]
    for instance in instances:
        await instance.says("scratch of attention")  # loaded: it dials now
    gmanager = started.gmanager(bind=address)
    await address_of(gmanager)
    await until_ready(address)
    async with client_of(address) as client:
        assert await generate(client)
    gmanager.signal(signal.SIGKILL)
    for instance in instances:
        assert await instance.exit_code() == 1


async def test_a_signal_ends_an_instance_that_waits_for_a_gmanager(started: Processes, model: Path) -> None:
    instance = started.instance(*flags(f"tcp://127.0.0.1:{free_port()}", model))
    await instance.says("scratch of attention")
    instance.signal(signal.SIGTERM)
    assert await instance.exit_code() == 0


async def test_requests_wait_for_a_cell_but_not_for_ever(started: Processes, model: Path) -> None:
    gmanager = started.gmanager("--max-queue-wait", "30")
    address = await address_of(gmanager)
    async with client_of(address) as client:
        waiting = asyncio.create_task(generate(client))
        while not any(r.state == "queued" for r in (await client.stats()).requests.values()):
            await asyncio.sleep(0.01)
        started.instance(*flags(address, model))
        assert sum(len(c.token_ids) for c in await waiting) == GREEDY.max_tokens
    impatient = started.gmanager("--max-queue-wait", "0.5")
    async with client_of(await address_of(impatient)) as client:
        with pytest.raises(RequestFailed, match=r"waited 0.5 s for a ready cell \(max-queue-wait\)"):
            await generate(client)


async def test_wrong_starts_end_at_once_with_one_sentence(started: Processes, model: Path, tmp_path: Path) -> None:
    gmanager = started.gmanager()
    address = await address_of(gmanager)
    cases = [
        (started.gmanager(bind=address), "gmanager: .*in use"),
        (started.python("spread", "-m", "gmanager", "--spread", "0"), "spread must be auto, all or at least 1, got 0"),
        (started.instance(*flags(address, tmp_path / "none.gguf")), "there is no file .*none.gguf"),
        (started.instance(*flags(address, model, "--kv-tokens", "7")), "--kv-tokens 7 is less than one block of 16 tokens"),
        (started.instance(*flags("tcp://127.0.0.1", model)), "--gmanager: an address looks like"),
        (
            started.python(
                "alone", "-m", "instance", *flags(address, model), environment=dict.fromkeys(("RANK", "TORCHELASTIC_RUN_ID"))
            ),
            "start instances with torchrun",
        ),
    ]
    for process, message in cases:
        assert await process.exit_code(60) == 2
        await process.says(message)
        assert "Traceback" not in process.text


async def test_instances_that_differ_are_refused_and_disturb_nobody(started: Processes, model: Path, tmp_path: Path) -> None:
    other = make_model("llama", tmp_path / "other", seed=1)
    gmanager = started.gmanager()
    address = await address_of(gmanager)
    started.instance(*flags(address, model, "--cell-size", "2"), rank=0, world_size=2)
    await gmanager.says(r"registered \(1 of 2\)")
    for more, message in (
        (["--model", str(other)], r"its model is .* that of cell 'main' is"),
        (["--block-size", "64"], "its block size is 64, that of cell 'main' is 16"),
        (["--cell-size", "3"], "cell size"),
        (["--dtype", "float16"], "its dtype is float16, that of cell 'main' is float32"),
    ):
        refused = started.instance(*flags(address, model, *more), rank=1, world_size=2)
        assert await refused.exit_code(60) == 1
        await refused.says(message)
    started.instance(*flags(address, model), rank=1, world_size=2)
    await until_ready(address)
    late = started.instance(*flags(address, model), rank=0, world_size=2)
    assert await late.exit_code(60) == 1
    await late.says("already has its 2 instances")
    async with client_of(address) as client:
        assert await generate(client)


async def test_a_client_that_vanishes_frees_its_blocks(started: Processes, model: Path) -> None:
    """Killed without a word, in the middle of its request."""
    _, address, _ = await pair(started, model)
    code = f"""
import asyncio
from gmanager import AsyncClient, SamplingParams
async def main():
    async with AsyncClient("{address}") as client:
        async for chunk in client.generate([1, 2, 3], SamplingParams(max_tokens=450, ignore_eos=True), request_id="gone"):
            await asyncio.sleep(0)
asyncio.run(main())
"""
    vanishing = started.python("client", "-c", code)
    async with client_of(address) as client:
        async with asyncio.timeout(30):
            while "gone" not in (stats := await client.stats()).requests or not stats.requests["gone"].generated_tokens:
                await asyncio.sleep(0.01)
        vanishing.signal(signal.SIGKILL)
        async with asyncio.timeout(20):  # the lease is 10 s
            while (await client.stats()).requests["gone"].finish_reason is None or any(
                instance.used_tokens for instance in (await client.stats()).instances
            ):
                await asyncio.sleep(0.05)


async def test_a_short_request_overtakes_a_long_prefill(started: Processes, model: Path) -> None:
    gmanager = started.gmanager()
    address = await address_of(gmanager)
    started.instance(*flags(address, model, "--kv-tokens", "1024", "--chunk-tokens", "2"))
    await until_ready(address)
    async with client_of(address) as client:
        done: list[str] = []

        async def first_token(name: str, tokens: int) -> None:
            async for _ in client.generate(prompt(tokens), GREEDY):
                done.append(name)
                break

        long = asyncio.create_task(first_token("long", 500))
        while not any(request.state == "prefill" for request in (await client.stats()).requests.values()):
            await asyncio.sleep(0.001)
        await asyncio.gather(long, first_token("short", 3))
        assert done == ["short", "long"]


async def test_idle_processes_rest_and_wake_at_once(started: Processes, model: Path) -> None:
    """Under 2 % of a core each; and the first token of a short request comes in a fraction of a beat."""
    gmanager, address, instances = await pair(started, model)
    async with client_of(address) as client:
        await generate(client)
        await asyncio.sleep(1)
        pids = [gmanager.pid, *(instance.pid for instance in instances)]
        before, began = [cpu_seconds(pid) for pid in pids], time.monotonic()
        await asyncio.sleep(6)
        passed = time.monotonic() - began
        shares = [(cpu_seconds(pid) - used) / passed for pid, used in zip(pids, before, strict=True)]
        assert max(shares) < 0.02, shares


async def test_requests_that_can_never_be_served_are_refused(started: Processes, model: Path) -> None:
    _, address, _ = await pair(started, model)
    async with client_of(address) as client:
        with pytest.raises(
            RequestRefused, match=r"prompt of 500 \+ max_tokens of 400 = 900 tokens; the model takes at most 512"
        ):
            await generate(client, 500, LONG)


@pytest.mark.slow
async def test_a_request_to_an_idle_cell_starts_within_20_ms(started: Processes, model: Path) -> None:
    """Submit to first token, the step itself included. Slow: it says something only on a quiet machine."""
    address = await address_of(started.gmanager())
    started.instance(*flags(address, model))
    await until_ready(address)
    times = []
    async with client_of(address) as client:
        for _ in range(15):
            await asyncio.sleep(0.3)
            began = time.perf_counter()
            await anext(client.generate(prompt(10), SamplingParams(max_tokens=1)))
            times.append(time.perf_counter() - began)
    assert sorted(times)[7] < 0.020, times
