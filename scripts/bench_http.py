#!/usr/bin/env python3
"""What HTTP adds to the ZeroMQ client: TTFT and TPOT of many streams at once, both ways in one run; and how the gateway holds.

Starts a service of a tiny random model (or of --model), and a gateway. In a round N clients ask --each requests, one after the
other with a short pause before each, so that N streams run nearly all the time. Rounds alternate between the two doors: a
figure is the median over the requests of a round, a ratio that of two neighbouring rounds, and what is told is the median of
the ratios. Then --crowd streams at once, of which none may starve, and --requests short requests, during which the gateway's
memory should stand still.

Exit code 0, 1 if a stream failed, 2 if something could not be started.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import uvloop
from _measure import facts, show

from gmanager import AsyncClient, DistattnError, SamplingParams
from gmanager.cli.process import ServiceError
from gmanager.cli.service import ServiceConfig, running

SETTLED = 200
"""Short requests after which the gateway's memory is read first: it has imported and allocated what it will."""


@dataclass(frozen=True, slots=True)
class Stream:
    """What a client saw of one. Seconds from when all were sent."""

    first_s: float
    last_s: float
    tokens: int

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / (self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Load:
    streams: int
    prompt_tokens: int
    max_tokens: int
    each: int = 1
    """Requests of one client, one after the other."""
    think_s: float = 0
    """Longest pause of a client before a request; how long is drawn."""


Ask = Callable[[list[int], int], Awaitable[Stream]]
"""One stream: prompt and max_tokens."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench_http.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory, a hub id or a GGUF file (default: a tiny random one)")
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--each", type=int, default=6, help="requests of each stream in a round, one after the other")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--think", type=float, default=50, help="longest pause before a request, ms; 0: asks in step with the cell"
    )
    parser.add_argument("--rounds", type=int, default=7, help="pairs of rounds; the first is for warming up and not counted")
    parser.add_argument("--crowd", type=int, default=200, help="streams at once, of which none may starve")
    parser.add_argument("--requests", type=int, default=2000, help="short requests, for the gateway's memory")
    parser.add_argument("--out", type=Path, default=Path("results/bench_http.json"))
    given = parser.parse_args()
    if given.requests < SETTLED:
        parser.error(f"--requests must be at least {SETTLED}, after which memory has settled, got {given.requests}")
    return given


async def over_zeromq(client: AsyncClient, prompt: list[int], max_tokens: int) -> Stream:
    began, first, tokens = time.perf_counter(), 0.0, 0
    async for chunk in client.generate(prompt, SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)):
        if chunk.token_ids and not tokens:
            first = time.perf_counter() - began
        tokens += len(chunk.token_ids)
    return Stream(first, time.perf_counter() - began, tokens)


Answer = tuple[float, bytes]
"""When the first event came, and the end of the stream."""


class StreamFailed(Exception):
    """An answer that isn't what was asked for."""


class Connection(asyncio.Protocol):
    """A connection to the gateway that asks one thing at a time.

    What is to be measured is the gateway, not a client's parser: it only notes when bytes come, and keeps the last of them.
    """

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._first_at, self._head, self._end = 0.0, b"", b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's are no subclasses

    def data_received(self, data: bytes) -> None:
        if not self._first_at and b"data: " in data:
            self._first_at = time.perf_counter()
        self._head = self._head or data[:200]
        self._end = (self._end + data)[-1000:]
        if self._end.endswith(b"0\r\n\r\n") and self._answer is not None:  # of a chunked body
            self._answer.set_result((self._first_at, self._end))
            self._answer = None
        elif not self._head.startswith(b"HTTP/1.1 200"):
            self._fail(StreamFailed(f"the gateway answered {data.decode(errors='replace')}"))

    def connection_lost(self, reason: Exception | None) -> None:
        self._transport = None
        self._fail(reason or StreamFailed("the gateway has closed a connection"))

    def _fail(self, reason: Exception) -> None:
        if self._answer is not None:
            self._answer.set_exception(reason)
            self._answer = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    async def post(self, path: str, body: object) -> Answer:
        """Raises StreamFailed, OSError."""
        if self._transport is None:
            raise StreamFailed("the gateway has closed a connection")
        self._first_at, self._head, self._end = 0.0, b"", b""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answer = answer
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        self._transport.write(head.encode() + content)
        return await answer


class Connections:
    """As many as are used at once; each may be used again."""

    def __init__(self, url: str) -> None:
        self._host, _, self._port = url.removeprefix("http://").partition(":")
        self._idle: list[Connection] = []

    async def post(self, path: str, body: object) -> Answer:
        loop = asyncio.get_running_loop()
        self._idle = [connection for connection in self._idle if connection.is_open]  # it closes those idle for long
        if self._idle:
            connection = self._idle.pop()
        else:
            _, connection = await loop.create_connection(Connection, self._host, int(self._port))
        answer = await connection.post(path, body)
        self._idle.append(connection)
        return answer


async def over_http(connections: Connections, model: str, prompt: list[int], max_tokens: int) -> Stream:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    first_at, end = await connections.post("/v1/completions", body)
    last_at = time.perf_counter()
    usage = next(line for line in end.splitlines() if b'"usage":{' in line)
    tokens = json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"]
    return Stream(first_at - began, last_at - began, tokens)


async def at_once(ask: Ask, load: Load, seed: int) -> list[Stream]:
    """All streams, each request with a prompt of its own. Raises StreamFailed if one did not get all its tokens."""

    async def one(number: int) -> list[Stream]:
        draw = random.Random(f"{seed} {number}")
        if load.each > 1:
            await asyncio.sleep(draw.random())  # so that they don't all begin and end at once
        found = []
        for _ in range(load.each):
            # who asks the moment an answer ends is in step with the cell: a millisecond then costs a whole step, or nothing
            await asyncio.sleep(draw.random() * load.think_s)
            found.append(await ask([draw.randrange(256) for _ in range(load.prompt_tokens)], load.max_tokens))
        return found

    streams = [stream for streams in await asyncio.gather(*map(one, range(load.streams))) for stream in streams]
    short = [stream.tokens for stream in streams if stream.tokens != load.max_tokens]
    if short:
        raise StreamFailed(f"{len(short)} of {len(streams)} streams got {short[:5]} ... tokens instead of {load.max_tokens}")
    return streams


def medians(streams: Sequence[Stream]) -> tuple[float, float]:
    """TTFT and TPOT."""
    return statistics.median(s.first_s for s in streams), statistics.median(s.tpot_s for s in streams)


async def compare(zeromq: Ask, http: Ask, load: Load, rounds: int) -> list[dict[str, float]]:
    """One row for each pair of rounds but the first. The door that goes first takes turns."""
    rows = []
    for number in range(rounds + 1):
        found: dict[str, tuple[float, float]] = {}
        order = [("zeromq", zeromq), ("http", http)]
        for name, ask in order if number % 2 else reversed(order):
            found[name] = medians(await at_once(ask, load, seed=number))
        if number:
            rows.append(
                {f"{name}_{what}_ms": found[name][i] * 1e3 for i, what in enumerate(("ttft", "tpot")) for name in found}
                | {f"{what}_ratio": found["http"][i] / found["zeromq"][i] for i, what in enumerate(("ttft", "tpot"))}
            )
    return rows


async def crowd(ask: Ask, load: Load) -> dict[str, float]:
    """Whether somebody waits much longer than the others."""
    streams = await at_once(ask, load, seed=99)
    firsts, lasts = sorted(s.first_s for s in streams), sorted(s.last_s for s in streams)
    return {
        "streams": load.streams,
        "ttft_median_s": statistics.median(firsts),
        "ttft_worst_s": firsts[-1],
        "total_median_s": statistics.median(lasts),
        "total_worst_s": lasts[-1],
    }


async def memory(ask: Ask, pid: int, requests: int) -> dict[str, float]:
    """The gateway's resident memory after SETTLED short requests, and at the end."""
    sizes = []
    load = Load(streams=50, prompt_tokens=32, max_tokens=4)
    for done in range(load.streams, requests + 1, load.streams):
        await at_once(ask, load, seed=done)
        if done >= SETTLED:
            sizes.append(resident_mib(pid))
    return {"requests": requests, "settled_mib": sizes[0], "end_mib": sizes[-1], "most_mib": max(sizes)}


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


async def bench(args: argparse.Namespace, model: str, logs: Path) -> int:
    load = Load(args.streams, args.prompt_tokens, args.max_tokens, args.each, args.think / 1e3)
    each = args.prompt_tokens + args.max_tokens + 32
    config = ServiceConfig(
        model=model,
        instances=args.instances,
        kv_tokens=max(args.streams, args.crowd) * each // args.instances + 4096,
        device=args.device,
        logs=logs,
        http="127.0.0.1:0",
    )
    async with running(config) as service:
        assert service.gateway is not None and service.url is not None
        pid = service.gateway.pid
        connections = Connections(service.url)
        async with AsyncClient(service.address) as client:
            name = (await client.stats()).cells[0].model

            def zeromq(prompt: list[int], max_tokens: int) -> Awaitable[Stream]:
                return over_zeromq(client, prompt, max_tokens)

            def http(prompt: list[int], max_tokens: int) -> Awaitable[Stream]:
                return over_http(connections, name, prompt, max_tokens)

            rows = await compare(zeromq, http, load, args.rounds)
            ratios = {what: statistics.median(row[f"{what}_ratio"] for row in rows) for what in ("ttft", "tpot")}
            sizes = f"{load.each} x ({load.prompt_tokens} + {load.max_tokens} tokens)"
            show(rows, f"{load.streams} streams of {sizes}, medians over the requests")
            print(f"HTTP / ZeroMQ, median of {len(rows)} pairs: TTFT {ratios['ttft']:.3f}, TPOT {ratios['tpot']:.3f}")
            crowded = await crowd(http, Load(args.crowd, args.prompt_tokens, args.max_tokens))
            show([crowded], "streams at once over HTTP")
            held = await memory(http, pid, args.requests)
            show([held], "the gateway's resident memory")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = facts() | {"load": vars(args) | {"out": None}, "rounds": rows, "ratios": ratios, "crowd": crowded, "memory": held}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            from _tiny import make_model

            model = str(make_model("llama", Path(folder) / "tiny"))
        try:
            return uvloop.run(bench(args, model, Path(folder)))
        except (ServiceError, StreamFailed, DistattnError, TimeoutError, OSError) as error:
            print(f"bench_http.py: {error}", file=sys.stderr)
            return 1 if isinstance(error, StreamFailed) else 2


if __name__ == "__main__":
    sys.exit(main())
