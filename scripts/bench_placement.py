#!/usr/bin/env python3
"""How long the gManager takes to decide where a prompt goes, in a cell of many instances where many requests run.

The real cluster is driven without a network: instances register and grant at once, requests are admitted until as many run as
asked. Then, for each of the rounds, one request ends and one comes, and what is timed is each call of `Cluster.handle`:

    submit     a request comes, is placed, and its blocks are asked for
    grant      the last grant of it: it is admitted, and parties are told
    shared     as submit, of one whose first 2,048 tokens many others have, on many instances
    beat       an instance tells of free blocks while others wait
    tick       a second has passed, while others wait: what runs may lie better elsewhere

Beside that: how many MB the gManager keeps of a cached sequence of 512K tokens, as long as it may be shared.

Exit code 0, or 1 if the longest median is above --most-ms.
"""

import argparse
import random
import statistics
import sys
import time
import tracemalloc
import zlib

from _measure import facts, show

from gmanager.cluster.chain import Chain, seed_of
from gmanager.cluster.cluster import Cluster
from gmanager.cluster.events import Action, Encode, Encoded, Event, PeerSaid, Send, SendAll, TextLoaded, Ticked
from gmanager.cluster.prefixes import Prefixes
from gmanager.config import GManagerConfig, PolicyName
from gmanager.wire import messages as m
from gmanager.wire.peer import PeerId

CLIENT: PeerId = b"client"
COMMON = 2048
"""Tokens with which all begin that share."""
SHARERS = 200
TICKS = 20
QUEUE = 20
"""Of 2M tokens each, for most of which there is no room."""
BLOCK_SIZE = 64
ASSETS = m.TextAssets(tokenizer_json="{}", chat_template=None, special_tokens={}, eos_token_ids=[2])


def spec(blocks: int) -> m.InstanceSpec:
    return m.InstanceSpec(
        model="model",
        fingerprint="f00d",
        tokenizer="beef",
        dtype="bfloat16",
        layers="fused",
        block_size=BLOCK_SIZE,
        vocab_size=128_000,
        max_context=2**21,
        num_blocks=blocks,
        chunk_tokens=8192,
        decode_rows=256,
        reach=32_768,
        device="cuda",
        host="here",
    )


class Driver:
    """A cluster whose instances grant all that they are asked for at once."""

    def __init__(self, instances: int, blocks: int, policy: str) -> None:
        self.cluster = Cluster(GManagerConfig(policy=policy))
        self.now = 0.0
        self.peers = [b"%d" % rank for rank in range(instances)]
        self.free = [blocks] * instances
        self.blocks = blocks
        self.reserved: dict[tuple[int, int], int] = {}
        self.homes: dict[str, tuple[int, int]] = {}
        """request -> its home and its sequence."""
        self.ms: dict[str, list[float]] = {kind: [] for kind in ("submit", "grant", "shared", "beat", "tick")}

    def form(self) -> None:
        for rank, peer in enumerate(self.peers):
            register = m.Register(
                protocol=m.PROTOCOL,
                cell="main",
                cell_size=len(self.peers),
                run_id="run",
                rank=rank,
                party_address=f"tcp://127.0.0.1:{rank + 1}",
                spec=spec(self.blocks),
            )
            self.say(peer, register)
        self.say(self.peers[0], m.Text(assets=ASSETS))
        self.cluster.handle(TextLoaded(cell=1, now=self.now))
        self.say(self.peers[0], m.StoreOpened(epoch=1, address="127.0.0.1:1"))
        for peer in self.peers:
            self.say(peer, m.Joined(epoch=1))
        self.say(CLIENT, m.Hello(protocol=m.PROTOCOL))

    def say(self, peer: PeerId, message: m.Message, kind: str | None = None) -> list[Action]:
        return self.handle(PeerSaid(peer, message, self.now, seed=1), kind)

    def handle(self, event: Event, kind: str | None = None) -> list[Action]:
        began = time.perf_counter()
        actions = self.cluster.handle(event)
        if kind is not None:
            self.ms[kind].append(1e3 * (time.perf_counter() - began))
        return actions

    def submit(self, name: str, tokens: int, spread: int | None, *, timed: bool = False) -> None:
        """Let it be admitted, prefilled and begin to decode, if there is room."""
        number = zlib.crc32(name.encode())  # no two begin alike, or one would wait for the other
        packed = m.pack_tokens([*(number >> shift & 0xFF for shift in (0, 8, 16, 24)), *[5] * tokens][:tokens])
        params = m.SamplingParams(max_tokens=1000, temperature=0)
        asked = m.Submit(request_id=name, params=params, token_ids=packed, spread=spread)
        self.follow(self.say(CLIENT, asked, "submit" if timed else None), name, timed=timed)

    def submit_shared(self, name: str, own: int, spread: int | None, *, timed: bool = False) -> None:
        """The same, of one that begins as all others submitted so, and has so many tokens of its own, at least a block. Its
        instances say what others can share there."""
        number = zlib.crc32(name.encode())
        tokens = [*range(COMMON), *(number >> shift & 0xFF for shift in (0, 8, 16, 24)), *[5] * own]
        params = m.SamplingParams(max_tokens=1000, temperature=0)
        asked = m.Submit(request_id=name, params=params, token_ids=m.pack_tokens(tokens), spread=spread)
        self.follow(self.say(CLIENT, asked, "shared" if timed else None), name)
        _, seq = self.homes[name]
        ranks = [rank for rank, of in self.reserved if of == seq]
        part = COMMON // len(ranks)
        for place, rank in enumerate(ranks):
            run = [(place * part, (place + 1) * part)]
            self.say(self.peers[rank], m.Cached(epoch=1, shards=[m.KeptShard(seq=seq, runs=[run])]))

    def follow(self, actions: list[Action], name: str, *, timed: bool = False) -> None:
        waiting = list(actions)
        while waiting:
            action = waiting.pop(0)
            if isinstance(action, Send) and isinstance(action.message, m.Reserve):
                rank, asked = self.peers.index(action.peer), action.message
                self.free[rank] -= asked.blocks
                self.reserved[rank, asked.seq] = asked.blocks
                answer = m.Granted(epoch=1, seq=asked.seq, blocks=asked.blocks, free_blocks=self.free[rank])
                waiting += self.say(action.peer, answer, "grant" if timed else None)
            elif isinstance(action, Send) and isinstance(action.message, m.ReserveNext):
                rank, seq = self.peers.index(action.peer), action.message.seq
                self.free[rank] -= 1
                self.reserved[rank, seq] = self.reserved.get((rank, seq), 0) + 1
                waiting += self.say(action.peer, m.Granted(epoch=1, seq=seq, blocks=1, free_blocks=self.free[rank]))
            elif isinstance(action, Send) and isinstance(action.message, m.MoveSequence):
                moved = m.HomeMoved(epoch=1, seq=action.message.seq, home=action.message.to)
                waiting += self.say(action.peer, moved)
            elif isinstance(action, Encode):  # a long prompt, which the shell looks through
                ids = action.submit.token_ids or b""
                waiting += self.handle(Encoded(action.request, self.now, token_ids=ids, highest=5))
            elif isinstance(action, SendAll) and isinstance(action.message, m.Admit):
                admit = action.message
                home = admit.shares[0].rank
                self.homes[name] = home, admit.seq
                output = m.SequenceOutput(seq=admit.seq, index=0, token_ids=[7])
                waiting += self.say(self.peers[home], m.Outputs(epoch=1, outputs=[output]))

    def end(self, name: str) -> list[Action]:
        """Its last token, and its blocks are free."""
        home, seq = self.homes.pop(name)
        last = m.SequenceOutput(seq=seq, index=1, token_ids=[2], finish_reason="stop")
        actions = self.say(self.peers[home], m.Outputs(epoch=1, outputs=[last]))
        actions += self.say(self.peers[home], m.Released(epoch=1, seq=seq, generated=2))
        for rank, of in [key for key in self.reserved if key[1] == seq]:
            self.free[rank] += self.reserved.pop((rank, of))
            actions += self.beat(rank)
        return actions

    def tick(self) -> None:
        """A second passes, in which all instances are heard."""
        self.now += 1.0
        for rank in range(len(self.peers)):
            self.beat(rank)
        self.follow(self.handle(Ticked(self.now), "tick"), "")

    def beat(self, rank: int, *, timed: bool = False) -> list[Action]:
        told = m.Beat(epoch=1, free_blocks=self.free[rank], held_tokens={}, counters=m.Counters())
        return self.say(self.peers[rank], told, "beat" if timed else None)


def mb_of_cached(sequences: int = 10, tokens: int = 2**19) -> float:
    """Of each, of sequences that begin with nothing common."""
    index = Prefixes(BLOCK_SIZE)
    tracemalloc.start()
    for seq in range(sequences):
        index.add(seq, Chain(seed_of(str(seq)), BLOCK_SIZE, bytes(4 * tokens)))
        index.tell(seq, 0, [[(0, tokens)]])
        index.end(seq, b"")
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return taken / sequences / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=10_000, help="that run")
    parser.add_argument("--blocks", type=int, default=640, help="of each instance (%(default)d)")
    parser.add_argument("--spread-share", type=float, default=0.1, help="of them that lie on several instances (%(default)g)")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--policy", default=GManagerConfig().policy, help=f"one of {PolicyName}")
    parser.add_argument("--most-ms", type=float, default=10.0)
    args = parser.parse_args()
    rng = random.Random(0)
    driver = Driver(args.instances, args.blocks, args.policy)
    driver.form()

    def spread() -> int | None:
        return rng.randint(2, 8) if rng.random() < args.spread_share else None

    for number in range(args.requests):
        driver.submit(f"r{number}", rng.randint(64, 4096), spread())
    for number in range(args.rounds):
        driver.now += 0.01
        victim = rng.choice(list(driver.homes))
        driver.end(victim)
        driver.submit(f"n{number}", rng.randint(64, 4096), spread(), timed=True)
    for number in range(SHARERS):
        driver.submit_shared(f"s{number}", rng.randint(64, 1024), rng.choice((None, None, 2)))
        if number % 2:
            driver.end(f"s{number}")
    for number in range(args.rounds):
        driver.submit_shared(f"t{number}", rng.randint(64, 1024), None, timed=True)
    # a queue that waits for more than there is: each news is a reason to look again
    for number in range(QUEUE):
        driver.submit(f"w{number}", 2**21 - 1000, args.instances)
    for _ in range(args.rounds):
        rank = rng.randrange(args.instances)
        driver.free[rank] += rng.choice((-1, 1))
        driver.beat(rank, timed=True)
    for _ in range(TICKS):
        driver.tick()
    driver.cluster.validate()
    print(facts())
    rows = [
        {"event": kind, "count": len(ms), "p50_ms": statistics.median(ms), "p99_ms": statistics.quantiles(ms, n=100)[98]}
        for kind, ms in driver.ms.items()
    ]
    print(f"\n{mb_of_cached():.2f} MB for each cached sequence of 512K tokens")
    show(rows, f"{args.instances} instances, {len(driver.homes)} requests run, policy {args.policy}")
    return 0 if max(statistics.median(ms) for ms in driver.ms.values()) <= args.most_ms else 1


if __name__ == "__main__":
    sys.exit(main())
