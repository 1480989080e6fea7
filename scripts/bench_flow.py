#!/usr/bin/env python3
"""What a client that stops reading costs the others, and the gManager.

A real gManager, a scripted instance that generates for each of its requests at a steady rate, and --clients clients, each with
a connection of its own: all but one have one stream, and one has --requests, so that much is to wait for it. Rounds alternate:
in one that client reads too, in the next it never reads its socket. A round's rate is the median over the others; what is told
is the median of the ratios of neighbouring rounds, and the gManager's resident memory when a round's measurement begins and at
its end.

Exit code 0; 1 if the others got less than 95 % of their rate; 2 if something could not be started.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import zmq
import zmq.asyncio
from _measure import show, write_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gmanager import AsyncClient, DistattnError, SamplingParams
from gmanager.wire import messages as m
from gmanager.wire.channel import Dialer, ZmqTransport
from gmanager.wire.codec import Decoder, encode

BLOCKS = 2**20
CONTEXT = 10**6
START_S = 30.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench_flow.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--step-ms", type=float, default=20.0, help="the instance generates a token for each request so often")
    parser.add_argument("--tokens", type=int, default=1, help="of a request in each step")
    parser.add_argument("--requests", type=int, default=128, help="of the client that does not read")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each round that are measured")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of rounds")
    parser.add_argument("--out", type=Path, default=Path("results/bench_flow.json"))
    given = parser.parse_args()
    if given.clients < 2:
        parser.error(f"--clients must be at least 2, got {given.clients}")
    return given


def assets() -> m.TextAssets:
    """A token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<end>": 0} | {char: i for i, char in enumerate(alphabet, 1)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return m.TextAssets(tokenizer_json=backend.to_str(), chat_template=None, special_tokens={}, eos_token_ids=[0])


class Instance:
    """A cell of one that grants all, and generates at a steady rate until it is told to end."""

    def __init__(self, address: str, step_s: float, tokens: int) -> None:
        decoder: Decoder[m.ToInstance] = Decoder(m.ToInstance)
        self._dialer: Dialer[m.ToInstance] = ZmqTransport().dial(address, decoder)
        self._step_s, self._tokens = step_s, tokens
        self._epoch = 0
        self._generated: dict[int, int] = {}
        self.ready = asyncio.Event()
        spec = m.InstanceSpec(
            model="scripted", fingerprint="", tokenizer="", dtype="float32", layers="fused", block_size=64, vocab_size=300,
            max_context=CONTEXT, num_blocks=BLOCKS, chunk_tokens=64, decode_rows=256, reach=8192, device="cpu", host="here",
        )  # fmt: skip
        register = m.Register(
            protocol=m.PROTOCOL, cell="main", cell_size=1, run_id="bench", rank=0, party_address="tcp://127.0.0.1:1", spec=spec
        )
        self._dialer.send(register)
        self._tasks = [asyncio.create_task(self._obey()), asyncio.create_task(self._run())]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._dialer.close()

    async def _run(self) -> None:
        next_at = beat_at = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= beat_at:
                beat_at = now + 1.0
                beat = m.Beat(epoch=self._epoch, free_blocks=BLOCKS // 2, held_tokens={}, counters=m.Counters())
                self._dialer.send(beat if self._epoch else m.Ping())
            outputs = []
            for seq, index in self._generated.items():
                outputs.append(m.SequenceOutput(seq=seq, index=index, token_ids=[66] * self._tokens))
                self._generated[seq] = index + self._tokens
            if outputs:
                self._dialer.send(m.Outputs(epoch=self._epoch, outputs=outputs))
            next_at = max(next_at + self._step_s, now)
            await asyncio.sleep(next_at - now)

    async def _obey(self) -> None:
        say = self._dialer.send
        while True:
            match await self._dialer.recv():
                case m.Registered():
                    say(m.Text(assets=assets()))
                case m.OpenStore(epoch=epoch):
                    say(m.StoreOpened(epoch=epoch, address="tcp://127.0.0.1:1"))
                case m.JoinEpoch(epoch=epoch):
                    self._epoch = epoch
                    say(m.Joined(epoch=epoch))
                    self.ready.set()
                case m.Reserve(epoch=epoch, seq=seq, blocks=blocks):
                    say(m.Granted(epoch=epoch, seq=seq, blocks=blocks, free_blocks=BLOCKS // 2))
                case m.Admit(seq=seq):
                    self._generated[seq] = 0
                case m.Cancel(seq=seq):
                    say(m.Released(epoch=self._epoch, seq=seq, generated=self._generated.pop(seq, 0)))


async def count(client: AsyncClient, number: int, counts: list[int]) -> None:
    params = SamplingParams(max_tokens=CONTEXT // 2, temperature=0, ignore_eos=True)
    async for chunk in client.generate([66, 67], params):
        counts[number] += len(chunk.token_ids)


async def submitted(context: zmq.asyncio.Context, address: str, requests: int) -> zmq.asyncio.Socket:
    """A client that has asked, and has room for little; reading is left to the caller."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.setsockopt(zmq.RCVBUF, 4096)
    socket.connect(address)
    await socket.send(encode(m.Hello(protocol=m.PROTOCOL)))
    params = SamplingParams(max_tokens=CONTEXT // 2, temperature=0, ignore_eos=True)
    prompt = m.pack_tokens([66, 67])
    for number in range(requests):
        await socket.send(encode(m.Submit(request_id=f"{os.getpid()}-{time.time()}-{number}", params=params, token_ids=prompt)))
    return socket


async def read(socket: zmq.asyncio.Socket) -> None:
    while True:
        await socket.recv()


async def one_round(args: argparse.Namespace, address: str, pid: int, *, with_stalled: bool) -> dict[str, Any]:
    counts = [0] * (args.clients - 1)
    clients = [AsyncClient(address) for _ in counts]
    context = zmq.asyncio.Context()
    socket = await submitted(context, address, args.requests)
    work: list[asyncio.Task[None]] = [] if with_stalled else [asyncio.create_task(read(socket))]
    entered: list[AsyncClient] = []
    try:
        for number, client in enumerate(clients):
            entered.append(await client.__aenter__())
            work.append(asyncio.create_task(count(client, number, counts)))
        await asyncio.sleep(2.0)  # all have begun
        before, rss, began = counts[:], rss_mib(pid), time.perf_counter()
        while (took := time.perf_counter() - began) < args.seconds:
            await asyncio.sleep(1.0)
            await socket.send(encode(m.Ping()))
        rates = [(now - then) / took for now, then in zip(counts, before, strict=True)]
        return {
            "stalled": int(with_stalled),
            "tokens/s, median": statistics.median(rates),
            "tokens/s, least": min(rates),
            "gManager MiB, first": rss,
            "gManager MiB, last": rss_mib(pid),
        }
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        for client in entered:
            await client.__aexit__(None, None, None)
        socket.close(linger=0)
        context.term()


def rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def measure(args: argparse.Namespace, address: str, pid: int) -> int:
    instance = Instance(address, args.step_ms / 1e3, args.tokens)
    try:
        async with asyncio.timeout(START_S):
            await instance.ready.wait()
        rows: list[dict[str, Any]] = []
        for _ in range(args.rounds):
            for with_stalled in (False, True):
                rows.append(await one_round(args, address, pid, with_stalled=with_stalled))
                write_json(args.out, {"rows": rows})
    finally:
        await instance.close()
    show(rows, f"{args.clients} clients, {args.tokens} tokens each {args.step_ms:g} ms")
    key = "tokens/s, median"
    ratio = statistics.median(slow[key] / plain[key] for plain, slow in zip(rows[::2], rows[1::2], strict=True))
    print(f"\nrate of the others beside one that does not read: {ratio:.1%} of theirs without")
    return 0 if ratio >= 0.95 else 1


def main() -> int:
    args = parse()
    # so that no request of a round goes on in the next
    command = [sys.executable, "-m", "gmanager", "--bind", "tcp://127.0.0.1:*", "--resume", "0"]
    gmanager = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert gmanager.stdout is not None
        for line in gmanager.stdout:
            if "tcp://" in line:
                break
        else:
            print("the gManager did not start", file=sys.stderr)
            return 2
        Thread(target=gmanager.stdout.read, daemon=True).start()  # a pipe that is full would stop it
        address = "tcp://" + line.partition("tcp://")[2].split()[0].strip("'\",")
        return asyncio.run(measure(args, address, gmanager.pid))
    except (DistattnError, TimeoutError) as error:
        print(f"the service failed: {error or 'no cell in time'}", file=sys.stderr)
        return 2
    finally:
        gmanager.terminate()
        gmanager.wait(10)


if __name__ == "__main__":
    sys.exit(main())
