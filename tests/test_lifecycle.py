"""Starting, serving, dying and ending: the real commands as real processes, on loopback only.

Instances are forked from a process that has imported torch (`Processes.instance`), but where torchrun is the point.
"""

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import pytest_asyncio
import torch
from filelock import FileLock

import instance.checkpoint
from gmanager import AsyncClient, RequestFailed, SamplingParams, Stats
from gmanager.config import GManagerConfig
from gmanager.server import Server
from gmanager.wire import messages as m
from gmanager.wire.channel import ZmqTransport
from gmanager.wire.codec import Decoder
from tests.support.exactness import ask, prompt
from tests.support.farm import DEVICE
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
    wakeups,
    workers,
)
from tests.support.service import at_rest
from tests.support.tiny import make_long_model, make_model

ENDLESS = SamplingParams(max_tokens=15_000, temperature=0, ignore_eos=True)
"""A minute of decoding: a request with these ends when something else ends it."""

LONG_PROMPT = 2000
IDLE_CORE_SHARE = 0.02
IDLE_WAKEUPS_PER_S = 20
"""Of one thread: less than one that looks for work every 50 ms."""

LOADED = "attention_scratch"
"""An instance says this when its model and pool are there; then it dials the gManager."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that takes long texts."""
    return make_long_model(tmp_path_factory.mktemp("models"))


def flags(address: str, model: Path, *more: str) -> list[str]:
    """Of an instance. A later flag overrides an earlier one."""
    settings = ["--gmanager", address, "--model", str(model), "--device", DEVICE, "--kv-tokens", "16384"]
    return [*settings, "--threads", "1", "--chunk-tokens", "64", "--block-size", "16", *more]


def two(started: Processes, address: str, model: Path, *more: str) -> list[Started]:
    """Instances of a cell of two."""
    return [started.instance(*flags(address, model, *more), rank=rank, world_size=2) for rank in range(2)]


async def answers(client: AsyncClient, model: Path) -> None:
    """A prompt spread over all instances, and a short one, are answered as transformers does."""
    ids = prompt(model, 40)
    name, _ = await asyncio.gather(ask(client, model, ids, spread="all"), ask(client, model, prompt(model, 5)))
    stats = await client.stats()
    spread = stats.requests[name].kv_tokens
    assert sorted(spread) == [i.rank for i in stats.instances] and all(spread.values())


async def run(client: AsyncClient, name: str, tokens: int = 3, *, spread: Literal["all", 1] = 1) -> int:
    """A request without an end of its own. Returns how many tokens came."""
    stream = client.generate(list(range(tokens)), ENDLESS, request_id=name, spread=spread)
    return sum([len(chunk.token_ids) async for chunk in stream])


async def until(client: AsyncClient, condition: Callable[[Stats], bool], within_s: float = 30) -> Stats:
    """Wait for what statistics tell."""
    async with asyncio.timeout(within_s):
        while not condition(stats := await client.stats()):
            await asyncio.sleep(0.005)
    return stats


async def until_decoding(client: AsyncClient, *names: str) -> None:
    await until(client, lambda s: all(name in s.requests and s.requests[name].generated_tokens > 0 for name in names))


async def told(running: Iterable[Awaitable[int]], why: str, within_s: float = ENDS_WITHIN_S) -> float:
    """All requests fail in time with this reason. Returns how long it took."""
    began = time.monotonic()
    async with asyncio.timeout(within_s):
        for request in running:
            with pytest.raises(RequestFailed, match=why):
                await request
    return time.monotonic() - began


@asynccontextmanager
async def here(config: GManagerConfig) -> AsyncIterator[Server]:
    """A gManager in this process, for settings that the command doesn't have."""
    server = Server(config)
    server.start()
    running = asyncio.create_task(server.run())
    try:
        yield server
        server.validate()
    finally:
        server.stop()
        await running


# --- torchrun


async def test_torchrun_serves_and_ends_when_asked(started: Processes, model: Path) -> None:
    """One torchrun for all: the loss of one instance restarts all. SIGTERM to torchrun ends them, and they leave in order; the
    gManager stays."""
    gmanager = started.gmanager("--spread", "all")
    address = await address_of(gmanager)
    torchrun = started.torchrun(*flags(address, model), nproc=2, launch=["--standalone", "--max-restarts", "1"])
    await until_ready(address)
    lost = workers(torchrun)
    async with client_of(address) as client:
        running = asyncio.create_task(run(client, "lost", 40, spread="all"))
        await until_decoding(client, "lost")
        os.kill(lost[1], signal.SIGKILL)
        await told([running], "^instance 1 of cell 'main' is lost: ")  # and not the other alone, which torchrun stops
        await until(client, lambda s: not s.cells)
    await until_ready(address, epoch=2)
    instances = workers(torchrun)
    assert not {*lost.values()} & {*instances.values()}, "all were started again"
    assert sorted(instances) == [0, 1]
    for pid in (gmanager.pid, *instances.values()):
        assert listening_addresses(pid) == {"127.0.0.1"}
    async with client_of(address) as client:
        await answers(client, model)
        said = [c.text async for c in client.chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=8, seed=1))]
        assert "".join(said)
        loaded = Path(f"/proc/{gmanager.pid}/maps").read_text()
        assert "tokenizers" in loaded, "it has turned text into tokens"
        assert "libtorch" not in loaded, "and that without torch"
        running = asyncio.create_task(run(client, "running", 40, spread="all"))
        await until_decoding(client, "running")
        torchrun.signal(signal.SIGTERM)
        await told([running], "instance [01] of cell 'main' left: (SIGTERM|asked to end, and not drained)")
        await torchrun.exit_code()
        assert not [pid for pid in instances.values() if is_alive(pid)]
        waiting = asyncio.create_task(run(client, "waiting"))
        await until(client, lambda s: "waiting" in s.requests)
        gmanager.signal(signal.SIGTERM)
        await told([waiting], "gManager is shutting down")
    assert await gmanager.exit_code() == 0


async def test_two_torchruns_form_one_cell_and_a_lost_instance_comes_again(started: Processes, model: Path) -> None:
    """One instance each. One of them is killed, and its torchrun starts it again; then two nodes of one torchrun job, which
    Ctrl-C ends."""
    gmanager = started.gmanager()
    address = await address_of(gmanager)
    launch = ["--standalone", "--max-restarts", "1", "--monitor-interval", "0.1"]
    torchruns = [started.torchrun(*flags(address, model, "--cell-size", "2"), nproc=1, launch=launch) for _ in range(2)]
    await until_ready(address)
    async with client_of(address) as client:
        await answers(client, model)
        names = ["spread", *(f"alone {i}" for i in range(3))]
        running = [asyncio.create_task(run(client, name, 40, spread="all" if name == "spread" else 1)) for name in names]
        await until_decoding(client, *names)
        assert {(await client.stats()).requests[name].home for name in names} == {0, 1}, "each instance has some"
        (killed,), (other,) = (workers(torchrun).values() for torchrun in torchruns)
        os.kill(killed, signal.SIGKILL)
        await until(client, lambda s: len(s.instances) == 1 and s.cells[0].state == "ready")
        await until(client, lambda s: len(s.instances) == 2 and s.cells[0].state == "ready", within_s=60)
        before = {name: stats.generated_tokens for name, stats in (await client.stats()).requests.items()}
        await until(client, lambda s: all(s.requests[name].generated_tokens > before[name] for name in names))
        assert is_alive(other)
        for request in running:
            request.cancel()
        await answers(client, model)
        for torchrun in torchruns:
            torchrun.signal(signal.SIGTERM)
        for torchrun in torchruns:
            await torchrun.exit_code()
        await until(client, lambda s: not s.cells)
        epoch = (await client.stats()).epoch

        meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
        nodes = [
            started.torchrun(*flags(address, model), nproc=1, launch=[*meet, "--rdzv-id", "7", "--local-addr", "127.0.0.1"])
            for _ in range(2)
        ]
        await until_ready(address, epoch=epoch + 1)
        await answers(client, model)
        pids = [pid for node in nodes for pid in workers(node).values()]
        running = [asyncio.create_task(run(client, "again", 40, spread="all"))]
        await until_decoding(client, "again")
        for node in nodes:
            node.interrupt()
        await told(running, "instance [01] of cell 'main' left: SIGINT")
        for node in nodes:
            await node.exit_code()
        assert len(pids) == 2 and not [pid for pid in pids if is_alive(pid)]
    assert gmanager.poll() is None


# --- ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_each_process_and_pending_requests_are_told(
    started: Processes, model: Path, number: signal.Signals
) -> None:
    gmanager = started.gmanager()
    address = await address_of(gmanager)
    instances = two(started, address, model)
    await until_ready(address)
    async with client_of(address) as client:
        running = [
            asyncio.create_task(run(client, "spread", 40, spread="all")),
            *(asyncio.create_task(run(client, f"alone {i}")) for i in range(2)),
        ]
        await until_decoding(client, "spread", "alone 0", "alone 1")
        began = time.monotonic()
        instances[0].signal(number)
        assert await instances[0].exit_code() == 0
        assert time.monotonic() - began < ENDS_WITHIN_S
        await until(client, lambda s: len(s.instances) == 1 and s.cells[0].state == "ready")
        running.append(asyncio.create_task(run(client, "last", 40, spread="all")))
        await until_decoding(client, "last")
        assert not any(request.done() for request in running), "what was on the one that left goes on on the other"
        began = time.monotonic()
        gmanager.signal(number)
        await told(running, "gManager is shutting down")
        assert await gmanager.exit_code() == 0
        assert await instances[1].exit_code() == 1
        await instances[1].says("the gManager ended the cell: gManager is shutting down")
        assert time.monotonic() - began < ENDS_WITHIN_S


async def test_all_that_are_asked_to_end_have_done_as_asked(started: Processes, model: Path) -> None:
    """Even if it hears first that another one, which was asked too, has left."""
    gmanager = started.gmanager()
    address = await address_of(gmanager)
    instances = two(started, address, model)
    await until_ready(address)
    async with client_of(address) as client:
        running = [asyncio.create_task(run(client, "spread", 40, spread="all"))]
        await until_decoding(client, "spread")
        for instance_ in instances:
            instance_.signal(signal.SIGTERM)
        await told(running, "instance [01] of cell 'main' left: (SIGTERM|asked to end, and not drained)")
    assert [await instance_.exit_code() for instance_ in instances] == [0, 0]


async def test_a_lost_gmanager_ends_its_instances_if_no_other_comes(started: Processes, model: Path) -> None:
    gmanager = started.gmanager()
    address = await address_of(gmanager)
    instances = two(started, address, model, "--connect-timeout-s", "2")
    await until_ready(address)
    gmanager.signal(signal.SIGKILL)
    for instance_ in instances:
        assert await instance_.exit_code() == 1
        await instance_.says("the gManager is gone .*, and none came within 2 s")


async def test_a_killed_instance_is_noticed_at_once_and_named(started: Processes, model: Path) -> None:
    """Its closed connection is word enough: nobody waits for its lease, and nobody else is blamed. It was the last."""
    async with here(GManagerConfig(bind="tcp://127.0.0.1:*", instance_lease_s=300)) as server:
        instance_ = started.instance(*flags(server.address, model))
        await until_ready(server.address)
        async with client_of(server.address) as client:
            running = asyncio.create_task(run(client, "r", 40, spread="all"))
            await until_decoding(client, "r")
            instance_.signal(signal.SIGKILL)
            await told([running], "instance 0 of cell 'main' is lost: it closed the connection")


async def test_an_instance_that_can_not_read_its_gmanager_says_so_and_ends(started: Processes, model: Path) -> None:
    """What was asked of it would never be done, and nobody would know."""
    listener = ZmqTransport().listen("tcp://127.0.0.1:*", Decoder[m.FromInstance](m.FromInstance))
    instance_ = started.instance(*flags(listener.address, model))
    async with asyncio.timeout(60):
        peer, greeting = await listener.recv()
        assert isinstance(greeting, m.Register)
        listener.send(peer, m.Registered(lease_s=300, send_text=False))
        listener.send(peer, m.Welcome(lease_s=5))  # for clients
        assert await instance_.exit_code() == 1
        while not isinstance(last := (await listener.recv())[1], m.Leave):
            continue
    await listener.close()
    assert last.failed and last.reason.startswith("what the gManager sends can't be read: ")
    assert last.reason in instance_.text


async def test_a_signal_ends_an_instance_that_loads(started: Processes, tmp_path: Path) -> None:
    """It waits for another process that converts the same file: no load is longer."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    cache = tmp_path / "cache"
    cache.mkdir()
    with FileLock(cache / f"model-{digest[:16]}-v{instance.checkpoint._VERSION}.lock"):
        address = f"tcp://127.0.0.1:{free_port()}"
        loads = [started.instance(*flags(address, file, "--cache-dir", str(cache))) for _ in range(2)]
        for process, number in zip(loads, (signal.SIGTERM, signal.SIGINT), strict=True):
            await process.says("event=loading ")
            process.signal(number)
            assert await process.exit_code() == 0
            assert f'event="asked to end while the model was being loaded" signal={number.name}' in process.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_an_instance_that_waits_for_a_gmanager(
    started: Processes, model: Path, number: signal.Signals
) -> None:
    waits = started.instance(*flags(f"tcp://127.0.0.1:{free_port()}", model))
    await waits.says(LOADED)
    waits.signal(number)
    assert await waits.exit_code() == 0


async def test_a_signal_ends_an_instance_that_waits_for_its_cell(started: Processes, model: Path) -> None:
    gmanager = started.gmanager()
    waits = started.instance(*flags(await address_of(gmanager), model), rank=0, world_size=2)
    await gmanager.says("registered=1 of=2")
    waits.signal(signal.SIGTERM)
    assert await waits.exit_code() == 0
    await gmanager.says("left: SIGTERM")
    assert gmanager.poll() is None


# --- starts


async def test_instances_wait_for_a_gmanager_that_comes_late(started: Processes, model: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    for instance_ in two(started, address, model):
        await instance_.says(LOADED)
    await address_of(started.gmanager(bind=address))
    await until_ready(address)
    async with client_of(address) as client:
        await answers(client, model)


async def test_requests_wait_for_a_cell_but_not_for_ever(started: Processes, model: Path) -> None:
    patient, impatient = started.gmanager("--max-queue-wait", "30"), started.gmanager("--max-queue-wait", "1")
    address = await address_of(patient)
    async with client_of(address) as client, client_of(await address_of(impatient)) as other:
        ids = prompt(model, 5)
        waiting = asyncio.create_task(ask(client, model, ids))
        began = time.monotonic()
        given_up = asyncio.create_task(run(other, "given up"))
        await until(client, lambda s: any(r.state == "queued" for r in s.requests.values()))
        await told([given_up], r"waited 1 s for a ready cell \(max-queue-wait\)")
        assert time.monotonic() - began >= 1
        assert not waiting.done()
        started.instance(*flags(address, model))
        async with asyncio.timeout(30):
            await waiting


async def test_a_wrong_start_ends_with_one_sentence(started: Processes, model: Path, tmp_path: Path) -> None:
    """Exit code 2, and no traceback."""
    (tmp_path / "empty").mkdir()
    gmanager = started.gmanager()
    address = await address_of(gmanager)

    def starts(*more: str) -> Started:
        return started.instance(*flags(address, model, *more))

    def manages(*more: str) -> Started:
        return started.python("gmanager", "-m", "gmanager", "--bind", "tcp://127.0.0.1:*", *more)

    cases = [
        (started.gmanager(bind=address), f"gmanager: can't listen at {address}: the port is in use"),
        (started.gmanager(bind="127.0.0.1"), "gmanager: an address looks like tcp://127.0.0.1:5570, got '127.0.0.1'"),
        (manages("--spread", "0"), "error: spread must be auto, all or at least 1, got 0"),
        (manages("--spread", "most"), "error: spread must be auto, all or a number, got 'most'"),
        (manages("--max-queue-wait", "nan"), "error: max_queue_wait_s must be a positive number, got nan"),
        (manages("--max-queue-wait", "-1"), "error: max_queue_wait_s must be a positive number, got -1.0"),
        (starts("--model", str(tmp_path / "none.gguf")), f"there is no file {tmp_path}/none.gguf"),
        (starts("--model", str(tmp_path / "none")), f"there is no directory or file {tmp_path}/none, and it is no hub id"),
        (starts("--model", str(tmp_path / "empty")), f"{tmp_path}/empty has no config.json"),
        (starts("--kv-tokens", "7"), "instance: --kv-tokens 7 is less than one block of 16 tokens"),
        (starts("--kv-tokens", "many"), "error: argument --kv-tokens: invalid int value: 'many'"),
        (
            starts("--kv-tokens", str(10**15)),
            r"--kv-tokens 1,000,000,000,000,000 needs [\d,.]+ MiB on cpu \(512 bytes a token\)",
        ),
        (starts("--block-size", "0"), "instance: --block-size must be at least 1, got 0"),
        (starts("--threads", "-1"), "instance: --threads must be at least 1, got -1"),
        (starts("--cell-size", "0"), "instance: --cell-size must be at least 1, got 0"),
        (starts("--dtype", "int4"), "error: argument --dtype: invalid choice: 'int4'"),
        (starts("--host", "0.0.0.0"), "instance: --host '0.0.0.0' is no address that the other instances could dial"),
        (starts("--host", "203.0.113.7"), "can't listen at tcp://203.0.113.7:"),
        (starts("--gmanager", "127.0.0.1:5570"), "instance: --gmanager: an address looks like tcp://127.0.0.1:5570, got"),
        (
            started.instance(*flags(address, model), run_id=None),
            "instance: start instances with torchrun .*ELASTIC_RUN_ID not set",
        ),
    ]
    if not torch.cuda.is_available():
        cases.append((starts("--device", "cuda"), "instance: LOCAL_RANK 0 finds no CUDA device: 0 are seen"))
    for process, sentence in cases:
        assert await process.exit_code(60) == 2, process.text
        last = process.text.splitlines()[-1]
        assert await process.says(sentence) and sentence.partition(":")[0][:10] in last, last
        assert "Traceback" not in process.text
    assert gmanager.poll() is None


async def test_instances_that_differ_are_refused_and_disturb_nobody(started: Processes, model: Path, tmp_path: Path) -> None:
    other = make_model("llama", tmp_path / "other", seed=1)
    text = make_model("llama", tmp_path / "text")
    for name in ("config.json", "model.safetensors"):
        (text / name).write_bytes((model / name).read_bytes())
    (text / "chat_template.jinja").write_text("{{ messages[0].content }}")
    gmanager = started.gmanager()
    address = await address_of(gmanager)
    started.instance(*flags(address, model), rank=0, world_size=2)
    await gmanager.says("registered=1 of=2")
    cases = [
        (["--model", str(other)], r"its model is \S+ \(\w+\), that of cell 'main' is \S+ \(\w+\)"),
        (["--model", str(text)], r"its tokenizer is \w+, that of cell 'main' is \w+"),
        (["--block-size", "64"], "its block size is 64, that of cell 'main' is 16"),
        (["--cell-size", "3"], "its cell size is 3, that of cell 'main' is 2"),
    ]
    refused = [started.instance(*flags(address, model, *more), rank=1, world_size=2) for more, _ in cases]
    for process, (_, reason) in zip(refused, cases, strict=True):
        assert await process.exit_code(60) == 1
        await process.says(f"the gManager refused this instance: {reason}")
    started.instance(*flags(address, model), rank=1, world_size=2)
    await until_ready(address)
    late = started.instance(*flags(address, model, "--model", str(other)), rank=1, world_size=2)
    assert await late.exit_code(60) == 1
    await late.says(r"its model is \S+ \(\w+\), that of cell 'main' is \S+ \(\w+\)")
    async with client_of(address) as client:
        assert (await client.stats()).epoch == 1, "nobody was disturbed"
        await answers(client, model)


# --- clients


async def test_clients_that_vanish_free_their_blocks(started: Processes, model: Path) -> None:
    """Killed, a client closes its connection without a word; stopped, it keeps it, and only its lease tells."""
    lease_s = 2.0
    async with here(GManagerConfig(bind="tcp://127.0.0.1:*", client_lease_s=lease_s, resume_s=0)) as server:
        two(started, server.address, model)
        await until_ready(server.address)
        code = f"""
import asyncio, sys
from gmanager import AsyncClient, SamplingParams

async def main():
    async with AsyncClient("{server.address}") as client:
        async def run(kind, spread):
            params = SamplingParams(max_tokens={ENDLESS.max_tokens}, ignore_eos=True)
            async for _ in client.generate([1] * 40, params, request_id=f"{{sys.argv[1]}} {{kind}}", spread=spread):
                pass
        await asyncio.gather(run("spread", "all"), run("alone", 1))

asyncio.run(main())
"""
        killed, stopped = (started.python("client", "-c", code, name) for name in ("killed", "stopped"))
        names = [f"{name} {kind}" for name in ("killed", "stopped") for kind in ("spread", "alone")]
        async with client_of(server.address) as client:
            await until_decoding(client, *names)
            bystander = asyncio.create_task(ask(client, model, prompt(model, 20), spread="all"))
            killed.signal(signal.SIGKILL)
            stopped.signal(signal.SIGSTOP)
            began = time.monotonic()
            try:
                gone = await until(client, lambda s: all(s.requests[name].state == "finished" for name in names))
            finally:
                stopped.signal(signal.SIGKILL)
            assert time.monotonic() - began < lease_s + 2  # a tick, and what the machine needs
            assert {gone.requests[name].finish_reason for name in names} == {"abort"}
            await bystander
            await at_rest(client)


# --- a cell that these tests share


@dataclass(frozen=True)
class Shared:
    address: str
    gmanager: Started
    instances: list[Started]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shared]:
    """A ready cell of two, with small chunks so that a prefill takes many steps."""
    async with processes(tmp_path_factory.mktemp("shared")) as started:
        gmanager = started.gmanager()
        address = await address_of(gmanager)
        instances = two(started, address, model, "--chunk-tokens", "8")
        await until_ready(address)
        yield Shared(address, gmanager, instances)


@pytest.fixture
async def client(shared: Shared) -> AsyncIterator[AsyncClient]:
    async with client_of(shared.address) as client:
        yield client
        await at_rest(client)


@pytest.mark.parametrize("spread", [1, "all"])
async def test_a_short_request_overtakes_a_long_prefill(client: AsyncClient, spread: Literal["all", 1]) -> None:
    first: list[str] = []

    async def first_token(name: str, tokens: int, spread: Literal["all", 1]) -> None:
        stream = client.generate(
            list(range(256)) * (tokens // 256) or [1] * tokens,
            request_id=f"{name} {spread}",
            spread=spread,
            cache_salt=f"{name} {spread}",
        )
        await anext(stream)
        first.append(name)
        await stream.aclose()

    long = f"long {spread}"
    prefill = asyncio.create_task(first_token("long", LONG_PROMPT, spread))
    await until(client, lambda s: long in s.requests and s.requests[long].state == "prefill")
    home = (await client.stats()).requests[long].home
    # one on each instance: one of them waits behind the long one's home
    await asyncio.gather(first_token("short", 3, 1), first_token("shorter", 2, 1))
    state = (await client.stats()).requests[long]
    assert state.state == "prefill" and home is not None, "the prompt is too short for this test"
    await prefill
    assert first[-1] == "long" and len(first) == 3


async def test_idle_processes_rest(shared: Shared, client: AsyncClient, model: Path) -> None:
    """Under 2 % of a core each, after work and with a client that is connected."""
    await answers(client, model)
    await at_rest(client)
    pids = {"gManager": shared.gmanager.pid} | {i.name: i.pid for i in shared.instances}
    for pid in pids.values():
        assert listening_addresses(pid) == {"127.0.0.1"}
    before, began = {name: cpu_seconds(pid) for name, pid in pids.items()}, time.monotonic()
    await asyncio.sleep(4)
    passed = time.monotonic() - began
    used = {name: (cpu_seconds(pid) - before[name]) / passed for name, pid in pids.items()}
    print("share of a core:", used)
    assert max(used.values()) < IDLE_CORE_SHARE, used


async def test_idle_processes_wait_and_do_not_poll(shared: Shared, client: AsyncClient, model: Path) -> None:
    """What polls wakes up again and again, and notices work only at its next look: nothing may, but for beats and leases."""
    await answers(client, model)
    await at_rest(client)
    pids = {"gManager": shared.gmanager.pid} | {i.name: i.pid for i in shared.instances}
    before, began = {name: wakeups(pid) for name, pid in pids.items()}, time.monotonic()
    await asyncio.sleep(3)
    passed = time.monotonic() - began
    rates = {
        f"{name} {thread}": (count - before[name].get(thread, 0)) / passed
        for name, pid in pids.items()
        for thread, count in wakeups(pid).items()
        if not thread.startswith("gloo_tcp_loop")  # Gloo's own: it looks every 10 ms whether it is to end
    }
    print("wake-ups a second:", rates)
    assert max(rates.values()) < IDLE_WAKEUPS_PER_S, rates
