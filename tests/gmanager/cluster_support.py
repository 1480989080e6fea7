"""What tests of the cluster share: instances' registrations, a cell made ready, and a cluster that is driven by events."""

from array import array
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from msgspec.structs import replace

from gmanager.cluster.chain import seed_of
from gmanager.cluster.cluster import Cluster
from gmanager.cluster.events import (
    Action,
    Deliver,
    Event,
    Forget,
    Log,
    PeerSaid,
    PeerWasLost,
    Send,
    SendAll,
    TextLoaded,
    Ticked,
)
from gmanager.config import GManagerConfig, Spread
from gmanager.wire import messages as m
from gmanager.wire.peer import PeerId

ASSETS = m.TextAssets(tokenizer_json="{}", chat_template=None, special_tokens={}, eos_token_ids=[2])
CLIENT = b"client"
OTHER = b"other client"
HELLO = m.Hello(protocol=m.PROTOCOL)
WELCOME = m.Welcome(lease_s=10.0)
Runs = list[list[tuple[int, int]]]
CHAIN_SEED = seed_of("f00d", "float32", "")
"""Of the model that instances register with here."""

SEED = 7
"""What the shell draws for each Submit without a seed."""
OF_SUBMIT = ("model", "wait_for_cell", "priority", "slo_ttft_s", "slo_tpot_s", "cache_salt")


def register(
    *,
    rank: int,
    cell_size: int,
    blocks: int = 8,
    block_size: int = 4,
    run_id: str = "run",
    cell: str = "main",
    wanted_id: int | None = None,
    **spec: object,
) -> m.Register:
    """A registration; `spec` overrides fields of the InstanceSpec."""
    fields: dict[str, object] = {
        "model": "tiny",
        "fingerprint": "f00d",
        "tokenizer": "beef",
        "dtype": "float32",
        "layers": "fused",
        "block_size": block_size,
        "vocab_size": 5000,
        "max_context": 1000,
        "num_blocks": blocks,
        "chunk_tokens": 64,
        "decode_rows": 256,
        "reach": 8192,
        "device": "cpu",
        "host": "here",
    }
    return m.Register(
        protocol=m.PROTOCOL,
        cell=cell,
        cell_size=cell_size,
        run_id=run_id,
        rank=rank,
        party_address=f"tcp://127.0.0.1:{9000 + rank}",
        spec=m.InstanceSpec(**(fields | spec)),  # type: ignore[arg-type]
        wanted_id=wanted_id,
    )


def peer(rank: int, epoch: int = 1) -> PeerId:
    """An instance of an epoch."""
    return b"instance-%d.%d" % (epoch, rank)


def one_by_one(actions: list[Action]) -> list[Action]:
    """The actions with what is sent to several sent to each."""
    sent = [[Send(to, a.message) for to in a.peers] if isinstance(a, SendAll) else [a] for a in actions]
    return [action for each in sent for action in each]


class Driver:
    """A cluster and its clock. The books are checked after every event; log lines are kept apart from the actions."""

    def __init__(self, *, term: int = 0, **config: Any) -> None:
        self.cluster = Cluster(GManagerConfig(**config), term=term)
        self.now = 0.0
        self.logs: list[Log] = []
        self.free: dict[PeerId, int] = {}
        """Blocks that instances have left, for `grant`."""
        self.heard: dict[PeerId, int] = {}
        """How many messages Outputs the cluster says to have of each instance; its Pongs are shown without."""

    def handle(self, event: Event) -> list[Action]:
        """The actions that one event brings about."""
        actions = one_by_one(self.cluster.handle(event))
        self.cluster.validate()
        self.logs += [action for action in actions if isinstance(action, Log)]
        return [self._without_count(action) for action in actions if not isinstance(action, Log)]

    def _without_count(self, action: Action) -> Action:
        if not (isinstance(action, Send) and isinstance(action.message, m.Pong)):
            return action
        self.heard[action.peer] = action.message.outputs
        return Send(action.peer, m.Pong())

    def say(self, who: PeerId, *messages: m.Message) -> list[Action]:
        """A peer says something."""
        return [action for message in messages for action in self.handle(PeerSaid(who, message, self.now, seed=SEED))]

    def grant(self, actions: list[Action]) -> list[Action]:
        """Let instances grant each Reserve among the actions; returns what that brings about."""
        news: list[Action] = []
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, m.Reserve | m.ReserveNext):
                asked = action.message
                blocks = asked.blocks if isinstance(asked, m.Reserve) else 1
                self.free[action.peer] -= blocks
                left = self.free[action.peer]
                granted = m.Granted(epoch=asked.epoch, seq=asked.seq, blocks=blocks, free_blocks=left)
                news += self.say(action.peer, granted)
        return news

    def wait(self, seconds: int, *heard: PeerId) -> list[Action]:
        """Let time pass, second by second; these peers ping each time (their Pongs are left out)."""
        actions: list[Action] = []
        for _ in range(seconds):
            self.now += 1
            for who in heard:
                assert self.say(who, m.Ping()) == [Send(who, m.Pong())]
            actions += self.handle(Ticked(self.now))
        return actions

    def ready_cell(
        self,
        *blocks: int,
        cell: str = "main",
        epoch: int = 1,
        assets: m.TextAssets = ASSETS,
        roles: Sequence[m.Role] = (),
        **spec: object,
    ) -> list[Action]:
        """Register instances with pools of these sizes (block size 4) and go through to a ready cell. `roles`: of the first of
        them; the others are mixed.

        Returns what the last event, TextLoaded, brought about.
        """
        messages: list[tuple[int, m.Message]] = [
            (rank, replace(register(rank=rank, cell_size=len(blocks), blocks=size, cell=cell, **spec), role=role))
            for rank, (size, role) in enumerate(zip_longest(blocks, roles, fillvalue="mixed"))
        ]
        messages += [(0, m.Text(assets=assets)), (0, m.StoreOpened(epoch=epoch, address="tcp://127.0.0.1:7000"))]
        messages += [(rank, m.Joined(epoch=epoch)) for rank in range(len(blocks))]
        for rank, message in messages:
            self.say(peer(rank, epoch), message)
        self.free |= {peer(rank, epoch): size for rank, size in enumerate(blocks)}
        return self.handle(TextLoaded(epoch, self.now))

    def lose(self, rank: int) -> list[Action]:
        """An instance of the first epoch is gone: what that brings about, but for its Forget."""
        actions = self.handle(PeerWasLost(peer(rank), "gone", self.now))
        assert actions.pop() == Forget(peer(rank))
        return actions

    def come(self, who: PeerId, blocks: int = 8, **more: Any) -> list[Action]:
        """An instance registers with a cell that serves: what that brings about, but for its Registered."""
        actions = self.say(who, register(rank=0, cell_size=more.pop("cell_size", 2), blocks=blocks, **more))
        assert actions.pop(0) == Send(who, m.Registered(lease_s=5.0, send_text=False))
        self.free[who] = blocks
        return actions

    def keep(self, who: PeerId, free: int, shards: dict[int, Runs] | None = None, epoch: int = 1) -> list[Action]:
        """An instance has ended its epoch; `shards`: what it kept of which sequences."""
        self.free[who] = free
        return self.say(who, kept(free, shards, epoch))

    def join(self, epoch: int, *members: PeerId) -> list[Action]:
        """Go through an epoch's beginning; returns what the last Joined brings about."""
        self.say(members[0], m.StoreOpened(epoch=epoch, address="tcp://store:1"))
        return [action for who in members for action in self.say(who, m.Joined(epoch=epoch))]


# --- words


def serving(*blocks: int, **config: Any) -> Driver:
    """A ready cell with pools of these sizes, and a client."""
    driver = Driver(**config)
    driver.ready_cell(*blocks)
    assert driver.say(CLIENT, HELLO) == [Send(CLIENT, WELCOME)]
    return driver


def submit(
    name: str, tokens: int = 8, *, spread: Spread | None = None, prompt: list[int] | None = None, **more: Any
) -> m.Submit:
    """`more`: sampling parameters, and `OF_SUBMIT`."""
    packed = m.pack_tokens([5] * tokens if prompt is None else prompt)
    fields = {name: more.pop(name) for name in OF_SUBMIT if name in more}
    return m.Submit(request_id=name, params=m.SamplingParams(**more), token_ids=packed, spread=spread, **fields)


def running(driver: Driver, name: str, tokens: int = 8, generated: int = 0, **more: Any) -> list[Action]:
    """Let a request be admitted and generate; returns what its admission brought about."""
    admitted = driver.grant(driver.say(CLIENT, submit(name, tokens, **more)))
    admits = [a.message for a in admitted if isinstance(a, Send) and isinstance(a.message, m.Admit)]
    assert admits, admitted
    if generated:
        driver.say(peer(admits[0].shares[0].rank), outputs(admits[0].seq, 0, [9] * generated))
    return admitted


def outputs(seq: int, index: int, token_ids: list[int], **more: Any) -> m.Outputs:
    return m.Outputs(epoch=1, outputs=[m.SequenceOutput(seq=seq, index=index, token_ids=token_ids, **more)])


def beat(free: int, held: dict[int, int] | None = None, **counters: int) -> m.Beat:
    return m.Beat(epoch=1, free_blocks=free, held_tokens=held or {}, counters=m.Counters(**counters))


def kept(free: int, shards: dict[int, Runs] | None = None, epoch: int = 1) -> m.Kept:
    return m.Kept(
        epoch=epoch, free_blocks=free, shards=[m.KeptShard(seq=seq, runs=runs) for seq, runs in (shards or {}).items()]
    )


def granted(seq: int, blocks: int, free: int) -> m.Granted:
    return m.Granted(epoch=1, seq=seq, blocks=blocks, free_blocks=free)


def reserve(rank: int, seq: int, blocks: int) -> Send:
    return Send(peer(rank), m.Reserve(epoch=1, seq=seq, blocks=blocks))


def reserve_next(rank: int, seq: int) -> Send:
    return Send(peer(rank), m.ReserveNext(epoch=1, seq=seq))


def drop(rank: int, seq: int) -> Send:
    return Send(peer(rank), m.Drop(epoch=1, seq=seq))


def cancel(rank: int, seq: int) -> Send:
    return Send(peer(rank), m.Cancel(epoch=1, seq=seq))


def move(rank: int, seq: int, to: int) -> Send:
    return Send(peer(rank), m.MoveSequence(epoch=1, seq=seq, to=to))


def regroup(number: int, *parties: list[int]) -> list[Action]:
    """To all who are in one of them."""
    message = m.Regroup(epoch=1, number=number, parties=list(parties))
    return [Send(peer(rank), message) for rank in sorted(rank for party in parties for rank in party)]


def sequence_params(max_tokens: int, generated: int = 0) -> m.SequenceParams:
    """What instances are told of a request with the default parameters."""
    return m.SequenceParams(
        max_tokens=max_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        seed=SEED,
        stop_token_ids=[2],
        logprobs=None,
        num_generated=generated,
    )


def admit(
    seq: int, arrival: int, ids: list[int], shares: dict[int, int], max_tokens: int = 16, generated: int = 0
) -> list[Action]:
    """To all participants; the home's share comes first."""
    params = sequence_params(max_tokens, generated)
    listed = [m.Share(rank=rank, tokens=tokens) for rank, tokens in shares.items()]
    packed = m.pack_tokens(ids)
    message = m.Admit(epoch=1, seq=seq, arrival=arrival, token_ids=packed, shares=listed, params=params)
    return [Send(peer(rank), message) for rank in sorted(shares)]


def deliver(number: int, name: str, index: int, token_ids: list[int], **more: Any) -> Deliver:
    fields: dict[str, Any] = {"peer": CLIENT, "cell": 1, "stop_strings": (), "logprobs": None} | more
    if fields.get("before") is not None:
        fields["before"] = array("I", fields["before"])
    return Deliver(request=number, request_id=name, index=index, token_ids=token_ids, **fields)


def failed(number: int, name: str, error: str, **more: Any) -> Deliver:
    return deliver(number, name, more.pop("index", 0), [], finish_reason="error", error=error, **more)


def refused(name: str, error: str, **more: Any) -> list[Action]:
    """At the door: it never got a number; with `number` it did."""
    if "number" in more:
        return [failed(more.pop("number"), name, error, **({"cell": 0, "refusal": "invalid"} | more))]
    return [last_words(name, error, more.get("peer", CLIENT), refusal=more.get("refusal", "invalid"))]


def last_words(name: str, error: str, who: PeerId = CLIENT, **more: Any) -> Send:
    """To a client, of a request that it has no part in."""
    fields = {"index": 0, "token_ids": [], "text": "", "finish_reason": "error"} | more
    return Send(who, m.Output(request_id=name, error=error, **fields))


def pong(rank: int) -> Send:
    return Send(peer(rank), m.Pong())


def done(call: int) -> Send:
    return Send(CLIENT, m.Done(call=call))


def call_failed(call: int, reason: str) -> Send:
    return Send(CLIENT, m.CallFailed(call=call, reason=reason))


def dropped(driver: Driver) -> int:
    return driver.cluster.stats().counters.dropped_messages


def request_stats(driver: Driver, name: str) -> m.RequestStats:
    return driver.cluster.stats().requests[name]
