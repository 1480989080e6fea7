"""A gManager, its instances and a client: one trace from its first request to its last token."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

from _replay import Timing
from _trace import Arrival, BlockArrival

from gmanager.cluster.chain import Chain
from gmanager.cluster.cluster import Cluster
from gmanager.cluster.events import (
    Action,
    Deliver,
    Encode,
    Encoded,
    Event,
    LoadText,
    Log,
    PeerSaid,
    Send,
    SendAll,
    TextLoaded,
    Ticked,
    Write,
)
from gmanager.config import GManagerConfig, PolicyName, parse_spread
from gmanager.wire import messages as m
from gmanager.wire.peer import PeerId
from instance.step import LANES
from simulation.clock import Clock
from simulation.device import Processor
from simulation.instance import VOCABULARY, Instance, SimulationError
from simulation.parties import Parties
from simulation.times import Profile

TICK_S = 1.0
"""As the gManager's; instances beat as often."""
NEVER_S = 1e12
CLIENT = b"client"
ASSETS = m.TextAssets(tokenizer_json=None, chat_template=None, special_tokens={}, eos_token_ids=[])

DEFAULT_POLICY = GManagerConfig().policy
SEPARATE = "separate"
LARGE = "large"
"""Names of what one would have instead: instances that share nothing, and one whose devices share every step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What serves a trace. Raises ValueError for values that make no sense."""

    profile: Profile
    instances: int
    policy: str = DEFAULT_POLICY
    """The gManager's `--policy`, `split:N` with so many instances that prefill; or its `--spread` under the policy that is its
    default; `separate`; or `large`."""
    prefix_cache: bool = True
    """As the gManager's."""
    grain: int = 1
    """Tokens that a row stands for, and steps that a decode step stands for: 8 is some ten times as fast as 1."""
    max_queue_wait_s: float = 600.0
    """As the gManager's."""
    limit_s: float = 100_000.0
    """After so long what has not ended is given up."""

    def __post_init__(self) -> None:
        if self.instances < 1 or self.grain < 1:
            raise ValueError(f"there must be one instance at least, and a grain of 1, got {self.instances} and {self.grain}")
        self.config()
        self.roles()
        self.own_profile()

    def config(self) -> GManagerConfig:
        """Of the gManager. Raises ValueError for a policy that is not known."""
        name, _, _ = self.policy.partition(":")
        is_policy = name in get_args(PolicyName)
        try:
            spread = "auto" if is_policy or self.policy in (SEPARATE, LARGE) else parse_spread(self.policy)
        except ValueError:
            known = f"{', '.join(get_args(PolicyName))}, {SEPARATE}, {LARGE}, auto, all or a number of instances"
            raise ValueError(f"the policy must be {known}, got {self.policy!r}") from None
        return GManagerConfig(
            policy=name if is_policy else "static" if self.policy in (SEPARATE, LARGE) else DEFAULT_POLICY,
            spread=spread,
            prefix_cache=self.prefix_cache,
            max_queue_wait_s=self.max_queue_wait_s,
            max_queue_bytes=max(1, 2**30 // self.grain),
            client_lease_s=NEVER_S,
            instance_lease_s=NEVER_S,
            max_stall_s=NEVER_S,
        )

    def roles(self) -> list[m.Role]:
        """Of each instance. Raises ValueError for a split that leaves one kind without any."""
        name, _, count = self.policy.partition(":")
        if name != "split":
            if count:
                raise ValueError(f"only split says how many instances prefill, got {self.policy!r}")
            return ["mixed"] * self.instances
        prefill = int(count) if count.isdecimal() else max(1, self.instances // 2)
        if (count and not count.isdecimal()) or not 0 < prefill < self.instances:
            most = f"{self.instances - 1} of {self.instances}"
            raise ValueError(f"split:N has 1 to {most} instances prefill, got {self.policy!r}")
        return ["prefill" if number < prefill else "decode" for number in range(self.instances)]

    def own_profile(self) -> Profile:
        """Of each instance that is simulated."""
        profile = self.profile.whole(self.instances) if self.policy == LARGE else self.profile
        return profile if self.grain == 1 else profile.coarse(self.grain)

    def cells(self) -> list[int]:
        """Instances of each cell."""
        if self.policy == LARGE:
            return [1]
        return [1] * self.instances if self.policy == SEPARATE else [self.instances]


@dataclass(kw_only=True)
class Outcome:
    """What came of a trace."""

    timings: list[Timing]
    """In the trace's order; seconds are simulated."""
    kv_use: list[tuple[float, float]] = field(default_factory=list)
    """(second, part of all blocks that hold KV or are reserved), once a second while requests run."""
    preemptions: int = 0
    home_moves: int = 0
    rounds: int = 0
    """Steps of parties, in all lanes."""
    busy: float = 0.0
    """Part of the time that a device ran a step of either lane, on average; both at once count twice."""
    prefix_queries: int = 0
    """Prompt tokens that were looked for among what was kept."""
    prefix_hits: int = 0
    """Those that were found."""
    follows_s: list[float] = field(default_factory=list)
    """Of each run that was copied from what was its home: from when the home moved until the KV had followed."""
    prefill_s: float = 0.0
    """What the lanes' steps took on all instances together, waits for other instances' rows included."""
    decode_s: float = 0.0
    ended_s: float = 0.0
    """Simulated seconds until the last request had ended."""
    wall_s: float = 0.0
    """And how long that took to simulate."""

    @property
    def mean_kv_use(self) -> float:
        return sum(use for _, use in self.kv_use) / len(self.kv_use) if self.kv_use else 0.0


class Service:
    """One that is simulated. `run` takes a trace through it, once."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.clock = Clock()
        self._profile = profile = setting.own_profile()
        self.cluster = Cluster(setting.config())
        shared = None if profile.cores is None else Processor(self.clock, profile)
        self.instances: dict[PeerId, Instance] = {}
        self._parties: dict[int, Parties] = {}
        """epoch -> of that cell."""
        self._live: dict[str, tuple[int, Timing]] = {}
        """request id -> its place in the trace."""
        self._num_open = 0
        self._gate = 0
        """Requests that have yet to have their first token before those come that wait for it."""
        self._gated: list[Timing] = []
        self._is_formed = False
        roles = setting.roles()
        for cell, size in enumerate(setting.cells()):
            for number in range(size):
                peer = b"instance %d of cell %d" % (number, cell)
                tell = partial(self._from_instance, peer)
                self.instances[peer] = Instance(self.clock, profile, shared or Processor(self.clock, profile), tell)
                name = f"cell {cell}" if len(setting.cells()) > 1 else "main"
                register = self.instances[peer].register(name, size, number, roles[number])
                self._handle(PeerSaid(peer, register, 0.0))
        self._handle(PeerSaid(CLIENT, m.Hello(protocol=m.PROTOCOL), 0.0))
        while not self._is_ready():
            self.clock.step()
        self._is_formed = True

    def run(self, trace: Sequence[Arrival], is_vain: Callable[[Sequence[Timing], float], bool] | None = None) -> Outcome:
        """Until all requests have ended, or the limit. Raises SimulationError if the service does what it must not.

        `is_vain`: asked once a second, with the requests and the time, whether to give up.
        """
        began = time.perf_counter()
        start = self.clock.now
        timings = [Timing(arrival=arrival) for arrival in trace]
        outcome = Outcome(timings=timings)
        self._num_open = len(trace)
        self._gated = [timing for timing in timings if timing.arrival.after_first_tokens]
        self._gate = len(trace) - len(self._gated)
        for index, timing in enumerate(timings):
            if not timing.arrival.after_first_tokens:
                self._come(index, timing, start + timing.arrival.at_s)
        self._places = {id(timing): index for index, timing in enumerate(timings)}
        self._tick(outcome)
        asked_at = start
        while self._num_open and self.clock.now - start < self.setting.limit_s:
            self.clock.step()
            if is_vain is not None and self.clock.now - asked_at >= TICK_S:
                asked_at = self.clock.now
                if is_vain(timings, asked_at):
                    break
        outcome.ended_s = self.clock.now - start
        for timing in timings:
            if timing.error is None and len(timing.token_s) < timing.arrival.max_tokens:
                timing.error = f"not finished after {outcome.ended_s:.3f} s"
            timing.due_s = None if timing.due_s is None else timing.due_s - start
            timing.token_s = [at - start for at in timing.token_s]
        outcome.kv_use = [(at - start, use) for at, use in outcome.kv_use]
        stats = self.cluster.stats()
        outcome.preemptions = stats.counters.preemptions
        outcome.prefix_queries = stats.observed.prefix_queries * self.setting.grain
        outcome.prefix_hits = stats.observed.prefix_hits * self.setting.grain
        outcome.follows_s = [took for parties in self._parties.values() for took in parties.copies.follows_s]
        outcome.home_moves = sum(instance.scheduler.tally.home_moves for instance in self.instances.values())
        outcome.rounds = sum(parties.num_rounds for parties in self._parties.values())
        occupied = [instance.device.occupied_s for instance in self.instances.values()]
        outcome.prefill_s, outcome.decode_s = (sum(its[lane] for its in occupied) for lane in LANES)
        busy = sum(instance.device.busy_s for instance in self.instances.values())
        outcome.busy = busy / (len(self.instances) * outcome.ended_s) if outcome.ended_s else 0.0
        outcome.wall_s = time.perf_counter() - began
        return outcome

    def settle(self, seconds: float = 60.0) -> None:
        """After `run`: let what was released become free. Raises SimulationError if something is left of a request."""
        end = self.clock.now + seconds
        while self.clock.now < end and not self._is_idle():
            self.clock.step()
        self.validate()
        if not self._is_idle():
            left = {peer.decode(): len(instance.rmanager.shards) for peer, instance in self.instances.items()}
            raise SimulationError(f"all requests have ended, and instances still hold sequences: {left}")

    def validate(self) -> None:
        """Raises RuntimeError if the books of one contradict each other."""
        self.cluster.validate()
        for instance in self.instances.values():
            instance.validate()

    def _is_idle(self) -> bool:
        return self.cluster.is_idle and not any(len(instance.rmanager.shards) for instance in self.instances.values())

    def _is_ready(self) -> bool:
        cells = self.cluster.stats().cells
        return len(cells) == len(self.setting.cells()) and all(cell.state == "ready" for cell in cells)

    # --- time ---------------------------------------------------------------------------------------------------------

    def _tick(self, outcome: Outcome) -> None:
        outcome.kv_use.append((self.clock.now, sum(i.used for i in self.instances.values()) / len(self.instances)))
        for instance in self.instances.values():
            instance.beat()
        self._handle(Ticked(self.clock.now))
        self.clock.after(TICK_S, lambda: self._tick(outcome))

    # --- the client ---------------------------------------------------------------------------------------------------

    def _come(self, index: int, timing: Timing, due_s: float) -> None:
        timing.due_s = due_s
        self.clock.at(due_s + self._profile.link_s, lambda: self._submit(index, timing))

    def _submit(self, index: int, timing: Timing) -> None:
        arrival, grain = timing.arrival, self.setting.grain
        name = f"r{index}"
        self._live[name] = index, timing
        params = m.SamplingParams(max_tokens=coarse_answer(arrival.max_tokens, grain), temperature=0, ignore_eos=True)
        submit = m.Submit(request_id=name, params=params, token_ids=prompt_of(arrival, index, grain))
        self._handle(PeerSaid(CLIENT, submit, self.clock.now))

    def _take(self, deliver: Deliver) -> None:
        index, timing = self._live[deliver.request_id]
        now = self.clock.now + self._profile.link_s
        for _ in deliver.token_ids:
            if not timing.token_s:
                timing.token_s.append(now)
                self._open_gate(timing, now)
                continue
            count = min(self.setting.grain, timing.arrival.max_tokens - len(timing.token_s))
            last = timing.token_s[-1]
            timing.token_s += [last + (now - last) * (i + 1) / count for i in range(count)]
        if deliver.finish_reason is None:
            return
        if deliver.finish_reason != "length" or len(timing.token_s) != timing.arrival.max_tokens:
            said = deliver.error or deliver.finish_reason
            timing.error = f"{said} after {len(timing.token_s)} of {timing.arrival.max_tokens} tokens"
            timing.refused = deliver.refusal
        if not timing.token_s:
            self._open_gate(timing, now)
        del self._live[f"r{index}"]
        self._num_open -= 1

    def _open_gate(self, timing: Timing, now: float) -> None:
        """Those that wait for first tokens come once the last of these is there, or will never be."""
        if timing.arrival.after_first_tokens:
            return
        self._gate -= 1
        if not self._gate:
            for each in self._gated:
                self._come(self._places[id(each)], each, now + each.arrival.at_s)

    # --- the gManager's shell -----------------------------------------------------------------------------------------

    def _from_instance(self, peer: PeerId, message: m.Message) -> None:
        self.clock.after(self._profile.link_s, lambda: self._handle(PeerSaid(peer, message, self.clock.now)))

    def _handle(self, event: Event) -> None:
        for action in self.cluster.handle(event):
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case Send(peer=peer, message=message):
                self._send(peer, message)
            case SendAll(peers=peers, message=message):
                for peer in peers:
                    self._send(peer, message)
            case Deliver():
                self._take(action)
            case Encode(request=number, submit=submit, chain_seed=seed, block_size=block_size):
                ids = submit.token_ids or b""
                chain = None if seed is None else Chain(seed, block_size, ids)
                self._soon(Encoded(number, self.clock.now, token_ids=ids, highest=VOCABULARY - 1, chain=chain))
            case LoadText(cell=number):
                self._soon(TextLoaded(number, self.clock.now))
            case Log() | Write():  # there is no journal
                return
            case _:
                raise SimulationError(f"the gManager wants {type(action).__name__}, which is not simulated")

    def _soon(self, event: Event) -> None:
        self.clock.after(0.0, lambda: self._handle(event))

    def _send(self, peer: PeerId, message: m.Message) -> None:
        if peer == CLIENT:
            self._hear(message)
            return
        instance = self.instances[peer]
        act: Callable[[], None]
        match message:
            case m.Registered(send_text=True):
                act = partial(self._from_instance, peer, m.Text(assets=ASSETS))
            case m.Registered() | m.Pong():
                return
            case m.OpenStore(epoch=epoch):
                act = partial(self._from_instance, peer, m.StoreOpened(epoch=epoch, address="simulated"))
            case m.JoinEpoch():
                act = partial(self._join, peer, message)
            case _:
                act = partial(instance.obey, message)
        self.clock.after(self._profile.link_s, act)

    def _hear(self, message: m.Message) -> None:
        """What isn't tokens: a refusal at the door."""
        if isinstance(message, m.Output) and message.finish_reason is not None:
            _, timing = self._live.pop(message.request_id)
            timing.error, timing.refused = message.error or "", message.refusal
            self._num_open -= 1
            self._open_gate(timing, self.clock.now)
        elif not isinstance(message, m.Welcome):
            raise SimulationError(f"a client was told {type(message).__name__}, which is not simulated: {message}")

    def _join(self, peer: PeerId, join: m.JoinEpoch) -> None:
        if self._is_formed:
            raise SimulationError(f"the membership of a cell changed: {join}")
        if join.epoch not in self._parties:
            self._parties[join.epoch] = Parties(self.clock, self._profile)
        self.instances[peer].join(join.epoch, join.rank, self._parties[join.epoch], caches=join.caches)
        self._from_instance(peer, m.Joined(epoch=join.epoch))


def prompt_of(arrival: Arrival, index: int, grain: int = 1) -> bytes:
    """Its packed token ids: those of its blocks, the same for the same hash id; else of no other request."""
    if not isinstance(arrival, BlockArrival):
        return _tokens(VOCABULARY // 2 + index, -(-arrival.prompt_tokens // grain))
    parts: list[bytes] = []
    left = arrival.prompt_tokens
    done = 0
    for hash_id in arrival.hash_ids:
        size = min(left, arrival.block_tokens)
        left -= size
        end = -(-(arrival.prompt_tokens - left) // grain)  # of coarse tokens: blocks needn't be multiples of the grain
        parts.append(_tokens(hash_id % (VOCABULARY // 2), end - done))
        done = end
    return b"".join(parts)


def _tokens(token: int, count: int) -> bytes:
    return token.to_bytes(4, "little") * count


def coarse_answer(max_tokens: int, grain: int) -> int:
    """Tokens of an answer in units of `grain`: the first comes with the prompt and stands for itself."""
    return 1 + -(-(max_tokens - 1) // grain)


def simulate(
    setting: Setting, trace: Sequence[Arrival], is_vain: Callable[[Sequence[Timing], float], bool] | None = None
) -> Outcome:
    """Take a trace through a new service, and look at the books. Raises SimulationError, or RuntimeError for wrong books."""
    service = Service(setting)
    outcome = service.run(trace, is_vain)
    if not any("not finished after" in (timing.error or "") for timing in outcome.timings):
        service.settle()
    return outcome
