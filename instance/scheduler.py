"""What this instance proposes, and what a derived step means for it: pure, one step ahead of the device.

The loop of `instance.server` calls, for step n:

    propose()       the notice, from what steps up to n-1 have been accepted
    accept(step n)  counts move on; the plan of what this instance runs
    commit(tokens of step n-1)   token values become known, ends are seen, blocks are freed

So `propose` uses counts, never the values of tokens that are under way. A sequence that turns out to have ended runs at most
one more row, whose token is thrown away.

An instance has two lanes of steps that know nothing of each other's steps: in one prompts run, in the other the rows that
follow them. A sequence passes from one to the other when its home has committed the step of its last prompt row. That row has
attended to all that others hold of the prompt, so by then all of it is written, everywhere.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from distattn.layout import HeldRun, Holding, Layout, Span, held_after_flip, lay_out, run_from
from gmanager.wire.messages import (
    Admit,
    FlipRun,
    HomeMoved,
    Message,
    NeedBlock,
    Outputs,
    PromptLogprobs,
    Released,
    RunMoved,
    Scored,
    SequenceOutput,
    Share,
    TokenLogprob,
    unpack_tokens,
)
from instance.elastic_tp import FeedShares
from instance.handoff import handoff_of, home_of
from instance.kept import check_kept, holdings_of
from instance.lane_steps import Accepted, LaneSteps, Tally
from instance.pipelining import deal
from instance.plan import MAX_DECODE_ROWS, MAX_SAMPLES, Pace, SampledRow, ScoredRows, StepPlan, is_decode
from instance.rmanager import RManager
from instance.sequence import Guest, History, Home
from instance.step import (
    LANES,
    MAX_GAPS,
    Decode,
    Flip,
    Grouping,
    Handoff,
    Lane,
    LastToken,
    Notice,
    Prefill,
    Step,
    StepMismatch,
)
from instance.unheard import Origin
from kvstore.sight import FULL, Sight


class Scheduler:
    """One instance's sequences within one epoch."""

    def __init__(
        self,
        *,
        epoch: int,
        rank: int,
        pace: Pace,
        rmanager: RManager,
        sights: Sequence[Sight] = (FULL,),
        lay_out_as: Callable[..., Layout] | None = None,
    ) -> None:
        """`sights`: what rows see in each group of the model's layers. `lay_out_as`: in place of `distattn.layout.lay_out`, for
        the simulator, which only counts."""
        self.epoch = epoch
        self.rank = rank
        self.tally = Tally()
        self._pace = pace
        self._rmanager = rmanager
        self._sights = tuple(sights)
        self._lay_out = lay_out if lay_out_as is None else lay_out_as
        self._homes: dict[int, Home] = {}
        self._guests: dict[int, Guest] = {}
        self._steps: dict[Lane, LaneSteps] = {lane: LaneSteps() for lane in LANES}
        self._departed: dict[int, None] = {}
        """Handed off while their last token was under way."""
        self._origins: dict[int, Origin] = {}
        """Of sequences whose home is here, or was when the last messages were taken."""
        self._lacking: dict[int, None] = {}
        """Sequences without room for their next row, of which the gManager is yet to hear."""
        self._scored: list[Message] = []
        self._outputs: list[SequenceOutput] = []
        self._messages: list[Message] = []

    # --- commands from the gManager -----------------------------------------------------------------------------------

    def admit(self, admit: Admit) -> None:
        """Start a sequence, with what an epoch before left of its KV, or such as begin as it does. Ignored if its blocks are
        gone, or about to be: it was cancelled before this arrived.

        Raises StepMismatch if something else is left here than is told, or the shares don't fill what is missing.
        """
        if not self._keeps(admit.seq):
            return
        prompt = unpack_tokens(admit.token_ids)
        starts = [runs[0][0] for part in admit.kept if part.rank == self.rank for runs in part.runs]
        self._rmanager.wake(admit.seq, len(prompt) - 1, starts, admit.branch)
        gaps = check_kept(admit, len(prompt), rank=self.rank, here=self._rmanager.ranges(admit.seq))
        self._guests[admit.seq] = Guest(prompt, admit.params.prompt_logprobs)
        if admit.shares[0].rank == self.rank:
            self._begin(
                Home(
                    seq=admit.seq,
                    arrival=admit.arrival,
                    params=admit.params,
                    prompt_tokens=len(prompt),
                    position=gaps[0][0],
                    gaps=gaps,
                    shares=list(admit.shares),
                    holdings=holdings_of(admit.kept),
                    history=History.of(prompt, admit.params),
                )
            )

    def cancel(self, seq: int) -> None:
        """End a sequence, whoever is its home now. Ignored if nothing is known of it here."""
        if seq in self._homes:
            self._homes[seq].cancelled = True
        elif self._keeps(seq):
            self._tell_of_cancel(seq)

    def move(self, seq: int, to: int) -> None:
        """Hand a sequence off once its prefill is over. Ignored if this is not its home."""
        if seq in self._homes and to != self.rank:
            self._homes[seq].move_to = to

    def flip(self, told: FlipRun) -> None:
        """Let a run whose copy is complete change hands with the sequence's next step. Ignored if the sequence has ended, or
        is not at home here.

        Raises StepMismatch if no such run is known.
        """
        home = self._homes.get(told.seq)
        if home is None or home.over:
            return
        if home.in_prefill or told.source == self.rank or run_from(home.holdings, told.source, told.start) is None:
            raise StepMismatch(
                f"sequence {told.seq}: rank {told.source} is to give its run from position {told.start} away; "
                f"known are {home.holdings}"
            )
        home.flip = Flip(move=told.move, seq=told.seq, source=told.source, target=told.target, start=told.start)

    # --- one step -----------------------------------------------------------------------------------------------------

    def has_work(self, lane: Lane, members: Sequence[int]) -> bool:
        """Whether a notice from here would ask for anything, in a party of these members."""
        steps = self._steps[lane]
        return bool(steps.cancels or steps.last_tokens) or any(
            home.over or home.in_prefill or (lane == "decode" and self._has_next(home))
            for home in self._homes.values()
            if home.lane == lane and home.ranks() <= set(members)
        )

    def propose(
        self,
        lane: Lane,
        members: Sequence[int],
        *,
        party: int,
        step: int,
        digest: list[int],
        groupings: list[Grouping],
    ) -> Notice:
        """What this instance wants of the lane's next step. Grants blocks, and tells the gManager once of each lack of one.

        May be asked again for the same step.
        """
        if step == 0:
            self._steps[lane].known.clear()  # not all members of a new party know it
        decodes: list[Decode] = []
        prefills: list[Prefill] = []
        released: list[int] = []
        handoffs: list[Handoff] = []
        flips: list[Flip] = []
        dealt = self._deal(members) if self._pace.stages > 1 else None
        for home in sorted(self._homes.values(), key=lambda home: (home.arrival, home.seq)):
            if home.lane != lane or not home.ranks() <= set(members):
                continue  # or its party has not met yet
            if home.over:
                released.append(home.seq)
            elif home.in_prefill:
                prefills.append(
                    Prefill(
                        seq=home.seq,
                        arrival=home.arrival,
                        gaps=home.gaps[:MAX_GAPS],
                        shares=home.shares,
                        holdings=home.holdings,
                        waited=home.waited,
                        scored=home.params.prompt_logprobs is not None,
                        later=sum(end - start for start, end in home.gaps[MAX_GAPS:]),
                    )
                )
            elif lane == "prefill":
                continue  # its first token is under way
            elif home.move_to is not None:
                if not self._awaits(home):
                    handoffs.append(handoff_of(home, home.move_to))
            elif dealt is None or home.seq in dealt:
                holdings = home.holdings
                if home.flip is not None:
                    flips.append(home.flip)
                    holdings = held_after_flip(holdings, home.flip.source, home.flip.target, home.flip.start)
                if len(decodes) < MAX_DECODE_ROWS and self._grant(home):
                    is_known = self._steps[lane].known.get(home.seq) == holdings
                    decodes.append(Decode(seq=home.seq, position=home.position, holdings=None if is_known else holdings))
        self._steps[lane].prompts = [prefill.seq for prefill in prefills]
        return Notice(
            epoch=self.epoch,
            lane=lane,
            party=party,
            step=step,
            rank=self.rank,
            digest=digest,
            both_lanes=self._has_other_work(lane),
            budget=self._pace.chunk_tokens,
            paced_budget=self._pace.mixed_chunk_tokens,
            reach=self._pace.reach,
            grain=self._pace.grain,
            stages=self._pace.stages,
            ready=[] if lane == "decode" else list(self._guests),
            decodes=decodes,
            prefills=prefills,
            released=released,
            cancels=sorted(self._steps[lane].cancels),
            handoffs=handoffs,
            last_tokens=list(self._steps[lane].last_tokens),
            flips=flips,
            groupings=groupings,
        )

    def _has_other_work(self, lane: Lane) -> bool:
        """Whether there is work for the other lane."""
        homes = self._homes.values()
        if lane == "prefill":
            return any(home.decodes_on for home in homes)
        return bool(self._guests) or any(home.lane == "prefill" for home in homes)

    def known(self, lane: Lane) -> Mapping[int, list[Holding]]:
        """What needs no saying in the lane's next step: for `derive`."""
        return self._steps[lane].known

    def accept(self, lane: Lane, step: Step) -> StepPlan:
        """Take the lane's next derived step as decided: move all counts on, and say what to run.

        Raises StepMismatch if the step contradicts what this instance holds.
        """
        steps = self._steps[lane]
        for seq in step.cancels:  # others may have come since the notice
            steps.cancels.pop(seq, None)
        steps.last_tokens.clear()
        arrived = {last.seq: last.token for last in step.last_tokens}
        for handoff in step.handoffs:
            self._hand_over(handoff, awaits_token=handoff.last_token is None and handoff.seq not in arrived)
        for seq, token in arrived.items():
            if (home := self._homes.get(seq)) is not None:
                self._take_token(home, token)
        for seq in step.cancels:
            if seq in self._homes:
                self._homes[seq].cancelled = True
        accepted = Accepted(released=step.released)
        for flip in step.flips:
            self._change_hands(flip, accepted)
        if lane == "decode":
            steps.known |= step.holdings
        for seq in step.released:
            if self._guests.pop(seq, None) is not None:
                accepted.unwritten.append(seq)
            steps.known.pop(seq, None)
            steps.last_steps.pop(seq, None)
            for other in self._steps.values():
                other.cancels.pop(seq, None)
            if (home := self._homes.pop(seq, None)) is not None:
                accepted.homes.append(home)
        steps.accepted.append(accepted)
        if lane == "prefill" and step.spans:
            for home in map(self._homes.get, steps.prompts):
                if home is not None:
                    home.waited += 1
        return self._plan(lane, step)

    def commit(
        self,
        lane: Lane,
        tokens: Mapping[int, TokenLogprob],
        scored: Sequence[tuple[int, PromptLogprobs]] = (),
    ) -> None:
        """The oldest accepted step of the lane has run: its tokens, and log-probabilities of prompts, by sequence."""
        self._scored += [Scored(epoch=self.epoch, seq=seq, logprobs=logprobs) for seq, logprobs in scored]
        for seq, token in tokens.items():
            if (home := self._homes.get(seq)) is not None:
                self._take_token(home, token)
            elif seq in self._departed:
                del self._departed[seq]
                self._steps[lane].last_tokens.append(LastToken(seq=seq, token=token))
        accepted = self._steps[lane].accepted.pop(0)
        for seq, num_tokens in accepted.prompts:
            self._rmanager.end_prompt(seq)
            self._rmanager.publish(seq, num_tokens - 1)  # who is admitted again computes the last row anew
        for seq in accepted.released:
            if seq in accepted.unwritten:
                self._rmanager.free(seq)
            else:
                self._rmanager.retire(seq)
        for move in accepted.detached:
            self._rmanager.let_go(move)
        self._messages += [RunMoved(epoch=self.epoch, seq=flip.seq, move=flip.move) for flip in accepted.flipped]
        self._messages += [Released(epoch=self.epoch, seq=home.seq, generated=home.committed) for home in accepted.homes]

    def uncertain(self) -> list[tuple[int, int]]:
        """(seq, position) from which on KV here may not be written: that of steps not known to have run. For
        `RManager.settle`, when the epoch is over."""
        return [place for steps in self._steps.values() for step in steps.accepted for place in step.written]

    @property
    def origins(self) -> Mapping[int, Origin]:
        """Of all sequences of which `take_messages` has outputs, and of those whose home is here."""
        return self._origins

    def take_messages(self) -> list[Message]:
        """What the gManager must hear since the last call: log-probabilities of prompts, outputs, then the rest."""
        outputs: list[Message] = [Outputs(epoch=self.epoch, outputs=self._outputs)] if self._outputs else []
        # a lack is told after the tokens of all rows before it: one that comes later means to the gManager that there is room
        for seq in list(self._lacking):
            home = self._homes.get(seq)
            if home is not None and home.waits_for_block and home.committed < home.generated and not home.over:
                continue
            del self._lacking[seq]
            if home is not None and home.waits_for_block:
                self._messages.append(NeedBlock(epoch=self.epoch, seq=seq))
        messages = self._scored + outputs + self._messages
        self._scored, self._outputs, self._messages = [], [], []
        return messages

    def forget_origins(self) -> None:
        """The messages that were taken have been read: only sequences that are at home here go on."""
        if len(self._origins) > len(self._homes):
            self._origins = {seq: origin for seq, origin in self._origins.items() if seq in self._homes}

    def validate(self) -> None:
        """Blocks add up, and with no sequence nothing is left. Raises RuntimeError otherwise."""
        self._rmanager.validate()
        told = [part for steps in self._steps.values() for part in (steps.cancels, steps.last_tokens)]
        known = [self._homes, self._guests, self._departed, *told]
        if not len(self._rmanager.shards) and any(known):
            raise RuntimeError(f"no sequence holds blocks, yet these are known: {known}")

    # --- the parts ----------------------------------------------------------------------------------------------------

    def _begin(self, home: Home) -> None:
        """A sequence's home is here from now on."""
        self._homes[home.seq] = home
        self._origins[home.seq] = home.arrival, home.params.num_generated

    def _keeps(self, seq: int) -> bool:
        """Whether blocks of it are here, and not only until the step that released them has run."""
        accepted = [step for steps in self._steps.values() for step in steps.accepted]
        return self._rmanager.shard(seq) is not None and not any(seq in step.released for step in accepted)

    def _tell_of_cancel(self, seq: int) -> None:
        """In all lanes: its home is in one of them, and may be on its way to the other, or to another instance."""
        for steps in self._steps.values():
            steps.cancels[seq] = None

    def _has_next(self, home: Home) -> bool:
        """Whether there is something to propose for it in the decode lane."""
        if self._awaits(home):
            return False
        return home.move_to is not None or home.flip is not None or self._can_decode(home)

    def _awaits(self, home: Home) -> bool:
        """Whether a token of it that is under way must be known before anything of it is proposed, where there are several
        stages: one may be, as with a single one, but its home moves on when none is. It would come some steps later."""
        return self._pace.stages > 1 and home.generated - home.committed > (home.move_to is None)

    def _deal(self, members: Sequence[int]) -> set[int]:
        """Sequences that may have a row, or a flip, in the decode lane's next step, where there are several stages."""
        steps, stages = self._steps["decode"], self._pace.stages
        homes = [home for home in self._homes.values() if home.lane == "decode" and not home.over and home.move_to is None]
        homes.sort(key=lambda home: (home.arrival, home.seq))
        ready = [home.seq for home in homes if home.ranks() <= set(members) and self._has_next(home)]
        total = sum(home.decodes_on for home in homes)
        return deal(ready, steps.last_steps, step=steps.number, stages=stages, total=max(1, total))

    def _can_decode(self, home: Home) -> bool:
        """Whether it has a row to propose, or a lack of room to tell of."""
        if home.generated >= home.params.max_tokens:
            return False
        return not home.waits_for_block or self._rmanager.has_room(home.seq, home.position)

    def _grant(self, home: Home) -> bool:
        """Room for its next row. The gManager hears once of each lack."""
        if home.generated >= home.params.max_tokens:
            return False
        if self._rmanager.grant(home.seq, home.position):
            home.waits_for_block = False
            return True
        if not home.waits_for_block:
            home.waits_for_block = True
            self._lacking[home.seq] = None
        return False

    def _take_token(self, home: Home, token: TokenLogprob) -> None:
        if home.finished:
            return  # the one row too many
        home.committed += 1
        self.tally.tokens_generated += 1
        home.last_token = token.token_id
        if home.history is not None:
            home.history.generated.append(token.token_id)
        reason: Literal["stop", "length"] | None = None
        if token.token_id in home.params.stop_token_ids:
            reason = "stop"
        elif home.committed == home.params.max_tokens:
            reason = "length"
        home.finished = reason is not None
        self._outputs.append(
            SequenceOutput(
                seq=home.seq,
                index=home.committed - 1,
                token_ids=[token.token_id],
                logprobs=None if home.params.logprobs is None else [token],
                finish_reason=reason,
                held=[Share(rank=h.rank, tokens=h.tokens) for h in home.holdings] if reason else None,
            )
        )

    def _change_hands(self, flip: Flip, accepted: Accepted) -> None:
        """A run is another instance's from this step on. What the party knew to be held is no more: the home says it again."""
        for steps in self._steps.values():
            steps.known.pop(flip.seq, None)
        if (home := self._homes.get(flip.seq)) is not None:
            home.holdings = held_after_flip(home.holdings, flip.source, flip.target, flip.start)
            home.flip = None
            accepted.flipped.append(flip)
        if flip.source == self.rank:
            self._rmanager.detach(flip.move, flip.seq, flip.start)
            accepted.detached.append(flip.move)
        if flip.target == self.rank and not self._rmanager.adopt(flip.move, flip.seq):
            raise StepMismatch(f"sequence {flip.seq}: rank {self.rank} is to take move {flip.move} over, and has no such copy")

    def _hand_over(self, handoff: Handoff, *, awaits_token: bool) -> None:
        old = self._homes.pop(handoff.seq, None)
        self._steps["decode"].last_steps.pop(handoff.seq, None)
        if old is not None:
            if awaits_token:
                self._departed[handoff.seq] = None
            if old.cancelled:
                self._tell_of_cancel(handoff.seq)
        if handoff.to != self.rank:
            return
        self._begin(home_of(handoff))
        self.tally.home_moves += 1
        self._messages.append(HomeMoved(epoch=self.epoch, seq=handoff.seq, home=self.rank))

    def _plan(self, lane: Lane, step: Step) -> StepPlan:
        token_ids: list[int] = []
        positions: list[int] = []
        pending: list[tuple[int, int]] = []
        slots: list[int] = []
        other_slots: list[list[int]] = [[] for _ in self._rmanager.shards.windows]
        sampled: list[SampledRow] = []
        scored: list[ScoredRows] = []
        spans_of: dict[int, list[Span]] = {}
        steps, stages = self._steps[lane], self._pace.stages
        previous = steps.previous_samples
        for span in step.spans:
            spans_of.setdefault(span.seq, []).append(span)
        if other_slots:
            for seq, spans in spans_of.items():
                if lane == "prefill" or not self._rmanager.in_prompt(seq):  # else steps of its prompt are under way here
                    self._rmanager.trim(seq, min(span.start for span in spans))
        ends = {seq: max(span.stop for span in spans_of[seq]) for seq in step.sampled}
        for span in step.spans:
            if span.rank != self.rank:
                continue
            guest = self._guests.get(span.seq)
            if guest is not None:
                if guest.num_top is not None and len(following := guest.prompt[span.start + 1 : span.stop + 1]):
                    scored.append(ScoredRows(span.seq, len(token_ids), span.start + 1, following, guest.num_top))
                token_ids += guest.prompt[span.start : span.stop]
                self.tally.tokens_prefilled += span.stop - span.start
            else:
                known = self._known_token(span, previous)
                if known is None:
                    pending.append((len(token_ids), previous[span.seq]))
                token_ids.append(known or 0)
            positions += range(span.start, span.stop)
            slots += self._rmanager.append(span.seq, span.start, span.stop)
            if other_slots:
                behind = self._rmanager.shards.window_slots(span.seq, span.start, span.stop)
                for table, its in zip(other_slots, behind, strict=True):
                    table += its
            self._steps[lane].accepted[-1].written.append((span.seq, span.start))
            if ends.get(span.seq) == span.stop:
                home = self._homes[span.seq]
                row = len(token_ids) - 1
                sampled.append(SampledRow(row, span.seq, span.stop, home.params, home.generated, home.history))
        samples_at = steps.number % stages * MAX_SAMPLES[lane]
        replaced = range(samples_at, samples_at + MAX_SAMPLES[lane])
        steps.previous_samples = {seq: at for seq, at in previous.items() if at not in replaced}
        steps.previous_samples |= {row.seq: samples_at + i for i, row in enumerate(sampled)}
        if stages > 1 and lane == "decode":
            steps.last_steps |= {row.seq: steps.number for row in sampled}
        steps.number += 1
        for seq in step.sampled:
            if (guest := self._guests.pop(seq, None)) is not None:
                self._steps[lane].accepted[-1].prompts.append((seq, len(guest.prompt)))
        self._move_on(step, spans_of)
        self._check_holdings(step)
        self.tally.steps += not step.is_empty()
        self.tally.split_steps += bool(step.sharers)
        self.tally.rows += len(token_ids)
        layouts = [
            self._lay_out(step.spans, step.holdings, self._rmanager.shards, self.rank, sight, group if other_slots else 0)
            for group, sight in enumerate(self._sights)
        ]
        return StepPlan(
            token_ids_T=token_ids,
            positions_T=positions,
            pending=pending,
            sampled=sampled,
            scored=scored,
            slots_T=slots,
            layout=layouts[0],
            other_layouts=layouts[1:],
            other_slots=other_slots,
            needs_logits=bool(step.sampled or step.scored),
            samples_at=samples_at,
            shares=self._shares(step),
            is_decode=is_decode(step),
        )

    def _shares(self, step: Step) -> FeedShares | None:
        """How the step's feeds are split."""
        if not step.sharers:
            return None
        rows = Counter(span.rank for span in step.spans)
        return FeedShares(self.rank, tuple((rank, rows[rank]) for rank in step.sharers))

    def _known_token(self, span: Span, previous: Mapping[int, int]) -> int | None:
        """The token of a decode row, or None while the step before computes it."""
        home = self._homes[span.seq]
        if span.start == home.prompt_tokens + home.committed - 1:
            return home.last_token
        if span.start != home.prompt_tokens + home.committed or span.seq not in previous:
            raise StepMismatch(
                f"sequence {span.seq}: row {span.start} was derived, but {home.committed} tokens after a prompt of "
                f"{home.prompt_tokens} are known"
            )
        return None

    def _move_on(self, step: Step, spans_of: Mapping[int, list[Span]]) -> None:
        """Counts of the homes here, after the step's spans."""
        for seq, holdings in step.holdings.items():
            home = self._homes.get(seq)
            if home is None:
                continue
            spans = spans_of[seq]
            taken = {share.rank: share.tokens for share in home.shares}
            for span in spans:
                if span.rank in taken:
                    taken[span.rank] -= span.stop - span.start
            home.move_on(max(span.stop for span in spans))
            home.shares = [Share(rank=r, tokens=t) for r, t in taken.items()] if home.in_prefill else []
            home.holdings = holdings
            home.generated += seq in step.sampled

    def _check_holdings(self, step: Step) -> None:
        for seq, holdings in step.holdings.items():
            named = [run for holding in holdings if holding.rank == self.rank for run in holding.runs]
            shard = self._rmanager.shard(seq)
            here = [] if shard is None else [HeldRun(run.start, run.end, run.num_tokens) for run in shard.runs]
            if here != named:
                raise StepMismatch(f"sequence {seq}: the step says rank {self.rank} holds {named}, it holds {here}")
