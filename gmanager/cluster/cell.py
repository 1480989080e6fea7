"""A cell's membership, from its first registration to its end.

    registering ──(cell_size registered)──> opening ──(StoreOpened)──> joining ──(all Joined, text loaded)──> ready
                                               ^                                                               │
                                               └──(all Kept)── suspending <──(an instance is lost, or comes)───┘
    returning ──(all are back, text loaded)────────────────────^

A cell is forming until it is ready for the first time: whoever leaves from `opening` on ends it then, and so does whoever
should have sent the text and didn't. From then on it serves, and changes: each change of membership is a new epoch, with new
ranks, to which those that are left bring the KV that they have kept. It is over when none is left.

A cell whose gManager is gone is `returning` to the next one, which knows it by the first of its members that registers. They
still step in the epoch in which they were left; when they are all back, or some have not come in time, that one is ended.
"""

import logging
from collections.abc import Collection, Sequence
from typing import Literal

from gmanager.cluster.chain import seed_of
from gmanager.cluster.events import Emit, LoadText, Log, Send
from gmanager.cluster.member import Member
from gmanager.cluster.performance import PerformanceModel
from gmanager.cluster.placement import why_never
from gmanager.cluster.policies import Policy
from gmanager.cluster.prefixes import Held, follow_of, is_shareable
from gmanager.cluster.registration import MAX_CELL_SIZE, MAX_KV_TOKENS, differing
from gmanager.wire import footprint
from gmanager.wire.codec import MAX_FRAME_BYTES
from gmanager.wire.errors import NO_TOKENIZER
from gmanager.wire.messages import (
    Beat,
    Counters,
    Former,
    JoinEpoch,
    Kept,
    MemberAddress,
    OpenStore,
    Refusal,
    Register,
    Registered,
    SamplingParams,
    Submit,
    Suspend,
    TextAssets,
    unpack_tokens,
)
from gmanager.wire.peer import PeerId

MAX_TOKENS = MAX_FRAME_BYTES // 4 - 2**18
"""Most tokens of a request, whatever the model takes: all of them must fit one Admit."""

SUSPEND_TIMEOUT_S = 10.0
"""Longest that an instance may take to end an epoch: the collectives that it waits in are aborted."""

MAX_ATTEMPTS = 8
"""Epochs that may be begun, and break before all have joined, until a cell is given up."""

LINK_GRACE_S = 1.0
"""A link may be lost since one of its ends left, or is dead: that is heard within this time, on the own link to it."""

RETURN_GRACE_S = 5.0
"""After the first of its members that a cell waits for the others, when its gManager was gone."""

TORCHRUN_STOPS_S = 60.0
"""Longest that the torchrun of a lost instance takes to stop its others: it looks every few seconds, and they have 30."""

Phase = Literal["registering", "returning", "opening", "joining", "ready", "suspending"]


class Cell:
    """The members of a cell, through all its epochs."""

    def __init__(
        self,
        epoch: int,
        first: Register,
        emit: Emit,
        policy: Policy,
        *,
        term: int = 0,
        identity: int = 0,
        caches: bool = False,
    ) -> None:
        """`term`, `identity`: of the gManager. `caches`: whether what sequences leave is kept for others."""
        self.name = first.cell
        self.policy = policy
        self.caches = caches
        self._term = term
        self._identity = identity
        self.number = epoch
        """Its own, whatever epoch it is in: that of its first one."""
        self.epoch = epoch
        self.quorum = first.cell_size
        """Instances with which it begins."""
        self.spec = first.spec
        self.phase: Phase = "registering"
        self.is_formed = False
        """Whether it has been ready once, so that requests are bound to it."""
        self.members: list[Member] = []
        """In order of registration; from `opening` on `members[r]` has rank r."""
        self.joiners: list[Member] = []
        """Registered since: members of the next epoch."""
        self.newcomers: list[Member] = []
        """Members that have not served with the others yet."""
        self.loss: str | None = None
        """Why the present change began, if an instance was lost."""
        self.counted = Counters()
        """What instances that are no members any more had done, as last heard."""
        self.performance = PerformanceModel(first.spec.reach)
        self.broke: str | None = None
        """How the last epoch ended, if nobody was lost with it and nobody came."""
        self.attempts = 0
        """Epochs that were begun since the cell was ready."""
        self.assets: TextAssets | None = None
        self.text_loaded = False
        self.text_source: Member | None = None
        self.began_at = 0.0
        self._lease_s = 0.0
        self.was_left = False
        """The epoch that is being ended is one that a gManager before had begun."""
        self._former_size = 0
        """Members of the epoch in which the gManager before was lost."""
        self._left_again: dict[int, None] = {}
        """Ids of these that were back and are gone."""
        self._awaited: list[Member] = []
        """Who comes again, over another connection."""
        self._broken: dict[int, tuple[float, str]] = {}
        """Ranks that another says it lost the link to: since when, and in which words."""
        self._lost_runs: dict[str, tuple[float, str]] = {}
        """Run id of a torchrun, while it has not come again: when its first instance was lost, and how."""
        self._emit = emit

    @property
    def is_ready(self) -> bool:
        """Whether its instances step."""
        return self.phase == "ready"

    @property
    def has_served(self) -> bool:
        """Under this gManager, or the one before."""
        return self.is_formed or self.phase == "returning"

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def everybody(self) -> list[Member]:
        """Members and those who are about to be."""
        return self.members + self.joiners

    @property
    def eos_token_ids(self) -> list[int]:
        return self.assets.eos_token_ids if self.assets is not None else []

    @property
    def total_tokens(self) -> int:
        return sum(member.size for member in self.members) * self.spec.block_size

    @property
    def is_draining(self) -> bool:
        """Whether a member is."""
        return any(member.is_draining for member in self.members)

    @property
    def lasting_blocks(self) -> list[int]:
        """Blocks of tokens of one sequence that each holds which isn't being drained, and is a member or about to be one
        again."""
        return [member.size for member in [*self.everybody, *self._awaited] if not member.is_draining]

    def taken(self, length: int) -> int:
        """Blocks that so many blocks of a sequence's tokens take on an instance."""
        return footprint.taken(length, self.spec.windows)

    @property
    def max_tokens(self) -> int:
        """Most tokens of a request, prompt and generated, whatever memory there is."""
        return min(self.spec.max_context, MAX_TOKENS)

    def id_of(self, rank: int) -> int:
        """Of a member: what the world outside the epoch knows it by."""
        return self.members[rank].id

    def helpers(self) -> list[int]:
        """Ranks that share dense layers, whatever they hold: all, if all have said that they can in this epoch; else none."""
        return [member.rank for member in self.members] if all(member.shares_feeds for member in self.members) else []

    def refusal(self, register: Register) -> str | None:
        """Why this instance can't be a member."""
        if not self.is_formed and self.phase not in ("registering", "returning"):
            return f"cell '{self.name}' already has its {self.quorum} instances, and is forming"
        if len(self.everybody) >= MAX_CELL_SIZE:
            return f"cell '{self.name}' has {len(self.everybody)} instances, as many as may be"
        if register.cell_size != self.quorum:
            return f"its cell size is {register.cell_size}, that of cell '{self.name}' is {self.quorum}"
        return differing(register.spec, self.spec, self.name)

    def why_unreadable(self, submit: Submit) -> Refusal | None:
        """Why what the request holds besides token ids can't be read here; None if it can, or there is nothing."""
        if self.assets is None or self.assets.tokenizer_json is not None or not submit.text_fields:
            return None
        return Refusal("invalid", f"{submit.text_fields[0]}: {NO_TOKENIZER}")

    def chain_seed(self, salt: str | None) -> bytes:
        """That names of prefixes begin with: what has the same may share KV."""
        return seed_of(self.spec.fingerprint, self.spec.number_types, salt or "")

    def room(self, prompt_tokens: int) -> int:
        """Most tokens that can be generated after a prompt of that length; 1 if there is no room, to be refused for that."""
        return max(1, min(self.max_tokens, self.most_held(self.lasting_blocks)) - prompt_tokens)

    def most_held(self, blocks: Sequence[int]) -> int:
        """Most tokens of one sequence that instances with so many blocks each hold."""
        return self.policy.most_tokens(blocks, self.spec.block_size)

    def why_never(
        self, prompt: bytes, highest: int, params: SamplingParams, blocks: Sequence[int] | None = None
    ) -> Refusal | None:
        """Why a request with this packed prompt can't be served here, even alone; None if it can. `highest`: of its ids.
        `blocks`: of each instance; None: of those that are here."""
        if highest >= self.spec.vocab_size:
            where = f"token id {highest} at position {unpack_tokens(prompt).index(highest)}"
            return Refusal("invalid", f"{where} is out of range: the model has {self.spec.vocab_size:,} tokens")
        named = {"stop_token_ids": params.stop_token_ids or [], "logit_bias": list(params.logit_bias or ())}
        for name, tokens in named.items():
            if (most := max(tokens, default=0)) >= self.spec.vocab_size:
                text = f"token id {most} of {name} is out of range: the model has {self.spec.vocab_size:,} tokens"
                return Refusal("invalid", text)
        total_blocks = self.lasting_blocks if blocks is None else blocks
        return why_never(
            prompt=len(prompt) // 4,
            max_tokens=params.max_tokens,
            max_context=self.max_tokens,
            most_held=self.most_held(total_blocks),
            cell=self.name,
            total_blocks=total_blocks,
            block_size=self.spec.block_size,
        )

    def add(self, peer: PeerId, register: Register, now: float, lease_s: float) -> Member:
        """Register an instance; with the last of the quorum the first epoch begins. Later ones join with the next."""
        self._lost_runs.pop(register.run_id, None)
        key = (register.run_id, register.rank)
        before = sum((m.register.run_id, m.register.rank) == key for m in self.everybody)
        self._lease_s = lease_s
        member = Member(peer, register, (register.run_id, before), now)
        send_text = self.text_source is None
        if send_text:
            self.text_source = member
        self._emit(Send(peer, self._registered(send_text=send_text)))
        if register.former is not None:
            self._take_back(member, register.former, now)
            return member
        if self.has_served:
            self._add_joiner(member)
            return member
        self.members.append(member)
        fields = {"cell": self.name, "rank": register.rank, "registered": len(self.members), "of": self.quorum}
        self._emit(Log(logging.INFO, "instance registered", fields))
        if len(self.members) == self.quorum:
            self._number()
            self._open(now)
        return member

    def account(self, member: Member, reason: str, now: float, *, was_asked: bool) -> str:
        """Why a member is gone, from `reason`, what is known of itself. A torchrun that loses one of its instances asks the
        others to end: with these the first is named, or else they would seem to be at fault."""
        run = member.register.run_id
        since, first = self._lost_runs.get(run, (now, reason))
        if now - since > TORCHRUN_STOPS_S:
            since, first = now, reason
        if was_asked:
            return reason if first == reason else f"{first}; then {reason}"
        self._lost_runs[run] = since, first
        return reason

    def predecessor(self, register: Register) -> Member | None:
        """The same instance, over a connection that it has given up."""
        former = register.former
        if former is None or (former.identity, former.epoch) != (self._identity, self.epoch):
            return None
        process = register.run_id, register.rank
        same = (m for m in self.members if (m.id, m.register.run_id, m.register.rank) == (former.id, *process))
        return next(same, None)

    def _registered(self, *, send_text: bool) -> Registered:
        return Registered(lease_s=self._lease_s, send_text=send_text, term=self._term, identity=self._identity)

    def await_return(self, member: Member, now: float, reason: str) -> None:
        """A member comes again, with what it has. Nothing is decided until it is here, as after the loss of a gManager: most
        often the others come again, too."""
        if self.phase != "returning":
            self.phase = "returning"
            self.began_at = now
            self._former_size = len(self.members)
            self._left_again.clear()
        self.members.remove(member)
        self._awaited.append(member)
        self._rank()
        self._broken.clear()  # by ranks that were others'; the epoch is ended in any case
        self.loss = self.loss or reason
        self._emit(Log(logging.WARNING, "instance is waited for", {"cell": self.name, "reason": reason}))

    @property
    def has_returned(self) -> bool:
        """Whether all are back, and their epoch can be ended: what they generated is text, too."""
        return self.phase == "returning" and self.text_loaded and len(self.members) + len(self._left_again) >= self._former_size

    def give_up_absent(self) -> None:
        """Wait no longer for members that have not come back."""
        self._former_size = len(self.members)

    def end_return(self, now: float) -> None:
        """End the epoch in which all were left."""
        reason = f"the gManager of cell '{self.name}' was lost, and another has come"
        if self.is_formed and self.loss is not None:
            reason = self.loss
        self.is_formed = self.was_left = True
        self.counted = Counters.sum(self.counted, *(member.counters for member in self._awaited))
        self._awaited.clear()
        self.suspend(now, reason)
        self.broke = None

    def suspend(self, now: float, reason: str) -> None:
        """Begin a change: all stop stepping, and say what they keep."""
        self.phase = "suspending"
        self.began_at = now
        self.broke = reason
        self._broken.clear()
        for member in self.members:
            member.kept = None
            member.cached = {}
            member.joined = False
            member.outstanding.clear()
            member.is_freeing = False
            self._emit(Send(member.peer, Suspend(epoch=self.epoch, reason=reason)))
        self._emit(Log(logging.INFO, "cell changes", {"cell": self.name, "epoch": self.epoch, "reason": reason}))

    def remove(self, member: Member) -> None:
        """It is no member any more, nor about to be one."""
        if self.phase == "returning" and member in self.members:
            self._left_again[member.id] = None
        (self.joiners if member in self.joiners else self.members).remove(member)
        if self.phase == "returning" and member is self.text_source and self.assets is None:
            self.text_source = self.everybody[0]  # the text of another is as good
            self._emit(Send(self.text_source.peer, self._registered(send_text=True)))
        self.counted = Counters.sum(self.counted, member.counters)
        self.performance.forget(member.id)
        if self.has_served:
            self._rank()

    def set_kept(self, member: Member, kept: Kept) -> None:
        """A member has ended the epoch."""
        if self.phase == "suspending":
            former = member.register.former
            is_ours = former is None or former.identity == self._identity
            member.kept = {shard.seq: shard.runs for shard in kept.shards if is_ours}
            member.shared_ends = {shard.seq: shard.shared_end for shard in kept.shards}
            member.since = {shard.seq: shard.since for shard in kept.shards}
            most = member.spec.num_blocks * self.spec.block_size
            sound = [shard for shard in kept.cached if is_ours and shard.runs and is_shareable(shard, most)]
            member.cached = {shard.seq: Held.of(shard.runs, shard.below, follow_of(shard)) for shard in sound}
            member.requests = {shard.seq: shard.request for shard in kept.shards if is_ours and shard.request}
            member.unheard = kept.unheard if is_ours else []
            member.is_freeing |= not is_ours
            member.hear_free(kept.free_blocks)

    @property
    def is_suspended(self) -> bool:
        """Whether all members have ended the epoch, and the next can begin."""
        return self.phase == "suspending" and all(member.kept is not None for member in self.members)

    def begin_epoch(self, epoch: int, now: float) -> None:
        """The next one, with all who are here."""
        self.epoch = epoch
        self.attempts += 1
        self.was_left = False
        if self.loss is not None or self.joiners:
            self.broke = None
        for joiner in self.joiners:
            joiner.free_blocks = joiner.spec.num_blocks
        self.newcomers = [member for member in self.newcomers if member in self.members] + self.joiners
        self.members += self.joiners
        self.joiners = []
        self._rank()
        self._open(now)

    def set_text(self, member: Member, assets: TextAssets) -> None:
        """The text assets came. Ignored but from who was asked."""
        if member is self.text_source and self.assets is None:
            self.assets = assets
            self._emit(LoadText(self.number, assets))

    def set_text_loaded(self) -> None:
        self.text_loaded = True
        self._check_ready()

    def set_store(self, member: Member, address: str, wanted: Collection[int]) -> None:
        """The epoch's store is open: all can join, and keep what they have of the sequences that are `wanted`."""
        if self.phase != "opening" or member.rank != 0:
            return
        self.phase = "joining"
        members = [
            MemberAddress(rank=m.rank, id=m.id, party_address=m.register.party_address, host=m.spec.host) for m in self.members
        ]
        for m in self.members:
            keep = [*(seq for seq in m.kept or () if seq in wanted), *m.cached]
            join = JoinEpoch(
                epoch=self.epoch,
                id=m.id,
                rank=m.rank,
                store_address=address,
                members=members,
                keep=keep,
                calibrate=self.performance.is_guess and not self.is_formed,  # else somebody may wait for tokens
                caches=self.caches,
            )
            self._emit(Send(m.peer, join))

    def set_joined(self, member: Member, *, shares_feeds: bool) -> None:
        if self.phase == "joining":
            member.joined, member.shares_feeds = True, shares_feeds
            self._check_ready()

    def set_link_lost(self, member: Member, rank: int, reason: str, now: float) -> None:
        """One member can't reach another, which may be about to say why. Between one that has served and one that has not, it
        is the latter that can't be with the others. Ignored while ranks aren't those of the epoch that is told of."""
        if self.phase in ("opening", "joining", "ready") and 0 <= rank < self.size and rank != member.rank:
            other = self.members[rank]
            blamed = member.rank if member in self.newcomers and other not in self.newcomers else rank
            self._broken.setdefault(blamed, (now, f"{member.name} lost its link to instance {other.id}: {reason}"))

    def broken_link(self, now: float) -> tuple[Member, str] | None:
        """Who can't be reached since LINK_GRACE_S, and hasn't said why; and what was said of it."""
        for rank, (since, reason) in self._broken.items():
            if now - since >= LINK_GRACE_S:
                return self.members[rank], reason
        return None

    def hear(self, member: Member, beat: Beat) -> bool:
        """A Beat came. Returns whether its free blocks are news."""
        before = member.free_blocks
        member.hear_free(beat.free_blocks)
        member.counters = beat.counters
        member.cached_blocks = max(0, min(beat.cached_blocks, member.free_blocks))
        member.host_blocks, member.disk_blocks = (max(0, min(n, MAX_KV_TOKENS)) for n in (beat.host_blocks, beat.disk_blocks))
        return member.free_blocks != before

    def can_lose(self, member: Member) -> bool:
        """Whether the cell can go on without this member."""
        if self.is_formed and self.phase == "returning":
            return True
        if self.has_served:
            return self.everybody != [member]
        return self.phase == "registering" and (self.assets is not None or member is not self.text_source)

    @property
    def missing(self) -> list[Member]:
        """Who keeps a change waiting."""
        if self.phase == "suspending":
            return [member for member in self.members if member.kept is None]
        return [member for member in self.members if not member.joined] if self.phase == "joining" else self.members[:1]

    def validate(self) -> None:
        """Raises RuntimeError if the membership contradicts itself."""
        if self.phase == "registering":
            if len(self.members) >= self.quorum:
                raise RuntimeError(f"cell '{self.name}' is complete and has no epoch")
            return
        if self.has_returned or self.is_suspended or (self.is_ready and self.joiners):
            raise RuntimeError(f"cell '{self.name}' is {self.phase}, and its next epoch could begin")
        if len({m.id for m in self.everybody}) < len(self.everybody):
            raise RuntimeError(f"ids of cell '{self.name}' are {[m.id for m in self.everybody]}")
        if [m.rank for m in self.members] != list(range(self.size)):
            raise RuntimeError(f"ranks of cell '{self.name}' are {[m.rank for m in self.members]}")
        for m in self.members:
            if not 0 <= m.free_blocks <= m.spec.num_blocks:
                raise RuntimeError(f"{m.name} has {m.free_blocks} of {m.spec.num_blocks} blocks free")

    def _add_joiner(self, member: Member) -> None:
        member.id = self._free_id(member.register.wanted_id)
        member.kept = {}
        self.joiners.append(member)
        self._emit(Log(logging.INFO, "instance comes", {"cell": self.name, "instance": member.id}))

    def _take_back(self, member: Member, former: Former, now: float) -> None:
        """It was a member when the gManager before was lost."""
        if self.phase == "registering":
            self.phase = "returning"
            self.epoch = former.epoch
            self.began_at = now
            fresh, self.members = self.members, []
            for other in fresh:
                self._add_joiner(other)
        member.id = self._free_id() if any(m.id == former.id for m in self.members) else former.id
        self._left_again.pop(member.id, None)
        for other in [other for other in self._awaited if other.id == member.id]:
            self._awaited.remove(other)
            member.counters = other.counters
        self.members.append(member)
        self.members.sort(key=lambda m: m.id)
        for joiner in self.joiners:
            if joiner.id == member.id:
                joiner.id = self._free_id()
        if former.epoch >= self.epoch:
            self.epoch, self._former_size = former.epoch, former.size
        self._rank()
        fields = {"cell": self.name, "instance": member.id, "epoch": former.epoch}
        self._emit(Log(logging.INFO, "instance is back", fields))

    def _free_id(self, wanted: int | None = None) -> int:
        """The wanted one, if no member has it, or the lowest such."""
        taken = {m.id for m in self.everybody}
        if wanted is not None and wanted not in taken:
            return wanted
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def _number(self) -> None:
        """Ids of the first epoch, and its ranks in their order: to each the one it wants, to the others those that are left, by
        torchrun in order of its first registration, then by RANK."""
        runs = list(dict.fromkeys(m.run for m in self.members))
        self.members.sort(key=lambda m: (runs.index(m.run), m.register.rank))
        for m in sorted(self.members, key=lambda m: m.register.wanted_id is None):
            m.id = self._free_id(m.register.wanted_id)
            m.free_blocks = m.spec.num_blocks
        self.members.sort(key=lambda m: m.id)
        self._rank()

    def _rank(self) -> None:
        for rank, member in enumerate(self.members):
            member.rank = rank

    def _open(self, now: float) -> None:
        self.phase = "opening"
        self.began_at = now
        for member in self.members:
            member.shares_feeds = False
        self._emit(Send(self.members[0].peer, OpenStore(epoch=self.epoch)))

    def _check_ready(self) -> None:
        if self.phase == "joining" and self.text_loaded and all(m.joined for m in self.members):
            self.phase = "ready"
            self.is_formed = True
            self.loss = None
            self.attempts = 0
            self.newcomers = []
            fields = {"cell": self.name, "epoch": self.epoch, "instances": self.size, "kv_tokens": self.total_tokens}
            self._emit(Log(logging.INFO, "cell ready", fields))
            wrong = self.policy.wrong_with([member.register.role for member in self.members])
            if wrong is not None:
                self._emit(Log(logging.WARNING, "roles mean nothing", {"cell": self.name, "reason": wrong}))
