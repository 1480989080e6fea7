#!/usr/bin/env python3
"""What a journal costs a gManager: its CPU time, the tokens that it delivers and when, with and without one in the same run.

Starts `python -m gmanager` without and with --journal, in turns, and plays an instance that generates for --streams requests at
--rate tokens a second in all, one token of each in a step; with --apart each token in a message of its own, evenly in time, as
of as many instances as there are streams. A client over ZeroMQ takes note of when each token comes. Figures of
a round: CPU seconds of the gManager's process, tokens delivered a second, p50 and p99 of the time from a token's step until its
client has it. What is told are the medians of the rounds, and of the ratios of two neighbouring ones.

Exit code 0, 1 if tokens were lost, 2 if something could not be started.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import uvloop
from _measure import facts, p99, show

from gmanager import AsyncClient, DistattnError, SamplingParams
from gmanager.wire import messages as m
from gmanager.wire.channel import ZmqTransport
from gmanager.wire.codec import Decoder

Say = Callable[[m.Message], None]

BLOCKS = 2**20
START_S = 30.0
TOKEN = 7


class TokensLost(Exception):
    """A stream has not all of its tokens."""


@dataclass
class PlayedInstance:
    """A cell of one: takes whatever comes, and generates a token of each request in each step."""

    address: str
    step_s: float
    is_apart: bool
    epoch: int = 0
    running: dict[int, tuple[int, int]] = field(default_factory=dict)
    """seq -> tokens generated, tokens wanted."""
    began: dict[int, list[float]] = field(default_factory=dict)
    """Number of a request -> when each of its tokens was generated."""
    numbers: dict[int, int] = field(default_factory=dict)
    turn: Iterator[int] = field(default_factory=count)

    async def run(self) -> None:
        decoder: Decoder[m.ToInstance] = Decoder(m.ToInstance)
        dialer = ZmqTransport().dial(self.address, decoder)
        spec = m.InstanceSpec(
            model="played",
            fingerprint="",
            tokenizer="",
            dtype="float32",
            layers="none",
            block_size=16,
            vocab_size=300,
            max_context=2**24,
            num_blocks=BLOCKS,
            chunk_tokens=512,
            decode_rows=4096,
            reach=8192,
            device="cpu",
            host="bench",
        )
        where = {"cell": "main", "cell_size": 1, "run_id": "bench", "rank": 0, "party_address": "tcp://127.0.0.1:1"}
        dialer.send(m.Register(protocol=m.PROTOCOL, spec=spec, **where))
        steps = asyncio.create_task(self._steps(dialer.send))
        try:
            while True:
                self._obey(await dialer.recv(), dialer.send)
        finally:
            steps.cancel()
            await dialer.close()

    def _obey(self, message: m.ToInstance, say: Say) -> None:
        match message:
            case m.Registered():
                assets = m.TextAssets(tokenizer_json=None, chat_template=None, special_tokens={}, eos_token_ids=[0])
                say(m.Text(assets=assets))
            case m.OpenStore(epoch=epoch):
                say(m.StoreOpened(epoch=epoch, address="tcp://127.0.0.1:1"))
            case m.JoinEpoch(epoch=epoch):
                self.epoch = epoch
                say(m.Joined(epoch=epoch))
            case m.Reserve(epoch=epoch, seq=seq, blocks=blocks):
                say(m.Granted(epoch=epoch, seq=seq, blocks=blocks, free_blocks=BLOCKS - blocks))
            case m.Admit(seq=seq, params=params, arrival=arrival):
                self.running[seq] = 0, params.max_tokens
                self.numbers[seq] = arrival
                self.began[arrival] = []
            case _:
                pass

    async def _steps(self, say: Say) -> None:
        due = time.monotonic()
        while True:
            due += self.step_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if self.epoch:
                turns = list(self.running)
                if self.is_apart and turns:
                    turns = [turns[next(self.turn) % len(turns)]]
                self._step(turns, say)

    def _step(self, turns: Sequence[int], say: Say) -> None:
        outputs, over, now = [], [], time.monotonic()
        for seq in turns:
            done, wanted = self.running[seq]
            reason = "length" if done + 1 == wanted else None
            outputs.append(m.SequenceOutput(seq=seq, index=done, token_ids=[TOKEN], finish_reason=reason))
            self.running[seq] = done + 1, wanted
            self.began[self.numbers[seq]].append(now)
            if reason is not None:
                over.append((seq, wanted))
        if outputs:
            say(m.Outputs(epoch=self.epoch, outputs=outputs))
        else:
            say(m.Ping())
        for seq, wanted in over:
            del self.running[seq]
            say(m.Beat(epoch=self.epoch, free_blocks=BLOCKS, held_tokens={seq: 0}, counters=m.Counters()))
            say(m.Released(epoch=self.epoch, seq=seq, generated=wanted))


@asynccontextmanager
async def gmanager(*flags: str) -> AsyncIterator[tuple[str, int]]:
    """A running one: its address and process id."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gmanager", "--bind", "tcp://127.0.0.1:*", "--log-level", "warning", *flags),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            line = (await process.stdout.readline()).decode()
        found = re.search(r"tcp://\S+", line)
        if found is None:
            raise DistattnError(f"the gManager did not start: {line}")
        yield found[0], process.pid
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def cpu_s(pid: int) -> float:
    """User and system time of a process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def stream(client: AsyncClient, tokens: int) -> list[float]:
    """When each token came."""
    came: list[float] = []
    async for chunk in client.generate([1, 2, 3], SamplingParams(max_tokens=tokens)):
        came += [time.monotonic()] * len(chunk.token_ids)
    if len(came) != tokens:
        raise TokensLost(f"{len(came)} tokens came of {tokens}")
    return came


async def measure(address: str, pid: int, streams: int, tokens: int) -> tuple[list[list[float]], float, float]:
    """When each token of each stream came; seconds, and CPU seconds of the process, that they took."""
    async with AsyncClient(address) as client:
        await stream(client, 2)  # the cell is ready
        before, began = cpu_s(pid), time.monotonic()
        came = await asyncio.gather(*(stream(client, tokens) for _ in range(streams)))
        return came, time.monotonic() - began, cpu_s(pid) - before


async def one_round(args: argparse.Namespace, *flags: str) -> dict[str, float]:
    tokens = max(2, round(args.seconds * args.rate / args.streams))
    step_s = (1 if args.apart else args.streams) / args.rate
    async with gmanager(*flags) as (address, pid):
        instance = PlayedInstance(address, step_s, args.apart)
        playing = asyncio.create_task(instance.run())
        measuring = asyncio.create_task(measure(address, pid, args.streams, tokens))
        try:
            await asyncio.wait([playing, measuring], return_when=asyncio.FIRST_COMPLETED)
            if playing.done():
                playing.result()
            streams, took, used = await measuring
        finally:
            playing.cancel()
            measuring.cancel()
            await asyncio.gather(playing, measuring, return_exceptions=True)
    steps = [instance.began[number] for number in sorted(instance.began)][1:]
    waits = [came - made for i, each in enumerate(streams) for came, made in zip(each, steps[i], strict=True)]
    return {
        "tokens_per_s": args.streams * tokens / took,
        "cpu_s": used,
        "cpu_share": used / took,
        "p50_ms": statistics.median(waits) * 1e3,
        "p99_ms": p99(waits) * 1e3,
    }


async def bench(args: argparse.Namespace, folder: Path) -> None:
    rows: list[dict[str, float]] = []
    for number in range(args.rounds):
        found: dict[str, dict[str, float]] = {}
        order = ["without", "with"] if number % 2 else ["with", "without"]
        for name in order:
            flags = [] if name == "without" else ["--journal", str(folder / f"journal{number}")]
            found[name] = await one_round(args, *flags)
        without, journal = found["without"], found["with"]
        rows.append(
            {f"{name}_{what}": value for name, figures in found.items() for what, value in figures.items()}
            | {
                "throughput_ratio": journal["tokens_per_s"] / without["tokens_per_s"],
                "added_cpu_share": journal["cpu_share"] - without["cpu_share"],
                "added_p50_ms": journal["p50_ms"] - without["p50_ms"],
                "added_p99_ms": journal["p99_ms"] - without["p99_ms"],
            }
        )
    medians = {what: statistics.median(row[what] for row in rows) for what in rows[0]}
    shown = {name: {what: medians[f"{name}_{what}"] for what in found[name]} for name in ("without", "with")}
    show([{"journal": name} | figures for name, figures in shown.items()], f"{args.streams} streams, {args.rate:g} tokens/s")
    print(
        f"with a journal: throughput x {medians['throughput_ratio']:.4f}, {medians['added_cpu_share']:.2%} more of a core, "
        f"latency +{medians['added_p50_ms']:.1f} ms (p50), +{medians['added_p99_ms']:.1f} ms (p99)"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps(facts() | {"load": vars(args) | {"out": None}, "rounds": rows, "medians": medians}, indent=1)
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--rate", type=float, default=2000, help="tokens a second of all streams together")
    parser.add_argument("--seconds", type=float, default=20, help="of each of the two halves of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--apart", action="store_true", help="each token in a message of its own")
    parser.add_argument("--out", type=Path, default=Path("bench_journal.json"))
    args = parser.parse_args()
    if min(args.streams, args.rate, args.seconds, args.rounds) <= 0:
        parser.error("--streams, --rate, --seconds and --rounds must be positive")
    return args


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        try:
            uvloop.run(bench(args, Path(folder)))
        except TokensLost as error:
            print(f"bench_journal.py: {error}", file=sys.stderr)
            return 1
        except (DistattnError, TimeoutError, OSError) as error:
            print(f"bench_journal.py: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
