"""From notices to a step: pure, and the same on every member of a party.

A **notice** is what one instance tells its party about its next step. `derive` turns the notices of all members into the
**step**: which rows run where, who holds what, which sequences end, which change home, which runs change hands. It uses
counts, never token values, and nothing but its arguments.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from distattn.layout import Holding, Span, held_after
from gmanager.wire.messages import Message, Part, SequenceParams, Share, TokenLogprob
from instance.elastic_tp import SplitRule
from instance.pipelining import slice_rows

STRETCH = 4
"""How many times as long as it would alone a prompt may take before those that come later, and are shorter, stand back."""

MAX_PROMPTS = 64
"""Most prompts that have rows in one step: each may end in it, and its logits take memory."""

MAX_GAPS = 32
"""Most gaps of a prompt that have rows in one step: there may be hundreds, and notices name them."""

Lane = Literal["prefill", "decode"]
"""Which rows a step has: those of prompts, or those that follow them. An instance runs steps of both kinds at once."""

LANES: tuple[Lane, Lane] = ("prefill", "decode")

FAR = 1 << 60
"""A `Notice.reach` with which all rows cost the same."""


class StepMismatch(Exception):
    """Members of one party derived different steps, or speak of different ones: nothing they compute can be trusted."""


class Decode(Part, array_like=True):
    """One row of a sequence at its home: the token at `position`, which is attended to all before it."""

    seq: int
    position: int
    holdings: list[Holding] | None = None
    """Who holds what before this row; None: what they held after its last one, which all members of the party know."""


class Prefill(Part):
    """The rest of a prompt, ready to be cut into a chunk. Sent by its home, the first of `shares`."""

    seq: int
    arrival: int
    gaps: list[tuple[int, int]]
    """The first ranges `[start, end)` that are in no step yet, ascending: one, unless KV was kept from an epoch before."""
    shares: list[Share]
    """What each participant still has to take."""
    holdings: list[Holding]
    waited: int = 0
    """Steps with rows of the prefill lane since its party met."""
    scored: bool = False
    """Whether log-probabilities of its tokens are wanted."""
    later: int = 0
    """Rows in gaps after these."""

    @property
    def start(self) -> int:
        """Position of the next row."""
        return self.gaps[0][0]

    @property
    def rows(self) -> int:
        """All that are left."""
        return sum(end - start for start, end in self.gaps) + self.later

    def ends_at(self, stop: int) -> bool:
        """Whether rows up to there are all that are left."""
        return stop == self.gaps[-1][1] and not self.later


class Past(Part):
    """`instance.sequence.History` on its way: token ids, packed."""

    prompt: bytes
    generated: bytes
    num_before: int


class Handoff(Part):
    """The home gives a sequence to another instance: all that is needed to go on."""

    seq: int
    to: int
    arrival: int
    position: int
    """Of the next row."""
    prompt_tokens: int
    generated: int
    """Tokens generated, the one under way included."""
    last_token: int | None
    """None: it is still being computed when the notice goes out, and follows in the old home's next one (`LastToken`)."""
    params: SequenceParams
    holdings: list[Holding]
    past: Past | None = None


class LastToken(Part):
    """The token that a home computed last for a sequence it has handed off. The new home outputs it."""

    seq: int
    token: TokenLogprob


class Flip(Part):
    """A run of a sequence whose copy is complete: from this step on it is another instance's. Said by the home."""

    move: int
    seq: int
    source: int
    target: int
    start: int
    """Position of the run's first token."""


class Grouping(Part):
    """The newest party of an instance that somebody has heard of."""

    number: int
    members: list[int]


class Notice(Message):
    epoch: int
    lane: Lane
    party: int
    step: int
    rank: int
    digest: list[int]
    """Of the step before, field by field (`Step.digest`); empty in a party's first step."""
    both_lanes: bool
    """Whether its other lane has work meanwhile: beside decodes short chunks of prompts keep the wait of those short who come
    next; beside prompts decodes have a part of the processors (`SplitRule.stretch`)."""
    budget: int
    """Prompt rows it would run in a step while no member decodes."""
    paced_budget: int
    """The same while one does, counted at the beginning of a prompt: rows cost more further on."""
    reach: int
    """Tokens before a row at which it costs twice as much as the first row."""
    grain: int
    """Rows that cost it about as much as fewer: while a member decodes who gets the rest of a budget gets multiples of it."""
    ready: list[int]
    """Sequences of whose prefill it knows: it takes part, or holds some of their KV."""
    decodes: list[Decode]
    prefills: list[Prefill]
    released: list[int]
    """Its sequences that have ended: all members free what they hold of them."""
    cancels: list[int]
    """Commands to end a sequence, for whoever is its home now."""
    handoffs: list[Handoff]
    last_tokens: list[LastToken]
    flips: list[Flip]
    """What its decode rows in the same notice say is held is after these."""
    groupings: list[Grouping]
    """Parties that are to follow this one, for the leader to know (`instance.party`); no part of the step."""
    stages: int = 1
    """Of each of the cell's instances, through which steps go (`instance.pipelining`)."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What a party does next."""

    spans: list[Span]
    """In the order in which rows run."""
    holdings: dict[int, list[Holding]]
    """Of every sequence with a span: who holds what once the step has written its KV."""
    sampled: list[int]
    """Sequences whose last row of this step yields a token."""
    scored: list[int]
    """Sequences of whose prompt rows the log-probabilities are wanted."""
    released: list[int]
    cancels: list[int]
    handoffs: list[Handoff]
    last_tokens: list[LastToken]
    flips: list[Flip]
    """Before its rows run."""
    sharers: list[int] = []
    """Members between which the feeds of all rows are split, ascending; none: each computes its own rows."""

    def digest(self) -> list[int]:
        """A checksum for each field, in the order of `__struct_fields__`."""
        return [zlib.crc32(msgspec.msgpack.encode(getattr(self, field))) for field in self.__struct_fields__]

    def is_empty(self) -> bool:
        return not any(getattr(self, field) for field in self.__struct_fields__)


def derive(
    notices: Sequence[Notice], known: Mapping[int, list[Holding]] | None = None, split_rule: SplitRule | None = None
) -> Step:
    """The step that the notices of all members of a party ask for.

    `known`: what former steps of this party left held of sequences that decode, the same on all members: notices don't repeat
    it (`Scheduler.known`). `split_rule`: when decode rows' feeds are split between the members; None: never.

    Raises StepMismatch if they are not of one party and step, or if the steps before differed.
    """
    known = {} if known is None else known
    notices = sorted(notices, key=lambda notice: notice.rank)
    _check_same(notices)
    released = sorted({seq for notice in notices for seq in notice.released})
    spans: list[Span] = []
    sampled: list[int] = []
    scored: list[int] = []
    holdings: dict[int, list[Holding]] = {}
    for notice in notices:
        for row in notice.decodes:
            span = Span(row.seq, notice.rank, row.position, row.position + 1)
            spans.append(span)
            sampled.append(row.seq)
            before = known.get(row.seq) if row.holdings is None else row.holdings
            if before is None:
                raise StepMismatch(f"rank {notice.rank} doesn't say who holds what of sequence {row.seq}, and nobody did")
            holdings[row.seq] = held_after(before, [span])
    for prefill, chunk in _chunks(notices):
        spans += chunk
        holdings[prefill.seq] = held_after(prefill.holdings, chunk)
        if prefill.scored:
            scored.append(prefill.seq)
        if prefill.ends_at(chunk[-1].stop):
            sampled.append(prefill.seq)
    return Step(
        spans=spans,
        holdings=holdings,
        sampled=sampled,
        scored=scored,
        released=released,
        cancels=sorted({seq for notice in notices for seq in notice.cancels}),
        handoffs=[handoff for notice in notices for handoff in notice.handoffs],
        last_tokens=[token for notice in notices for token in notice.last_tokens],
        flips=[flip for notice in notices for flip in notice.flips],
        sharers=[] if split_rule is None else _sharers(split_rule, notices),
    )


def _sharers(rule: SplitRule, notices: Sequence[Notice]) -> list[int]:
    """Among whom the feeds of decode rows are split."""
    return rule.sharers(
        {notice.rank: len(notice.decodes) for notice in notices}, {notice.rank for notice in notices if notice.both_lanes}
    )


def split_chunk(start: int, end: int, caps: Sequence[int], final_caps: Sequence[int]) -> list[tuple[int, int, int]]:
    """The next chunk of `[start, end)`, a gap in a prompt's KV or the rest of one, as `(participant, start, stop)`, ascending.

    Each of k participants takes two spans, i and 2k-1-i of 2k, so that causal work is even (contiguous spans cost 19 % more
    for 4096 tokens on two instances, DESIGN), as many rows as the others unless `caps` says less. The last row of a prompt is
    participant 0's, the home's: in a chunk that doesn't end the prompt `caps` hold, in the one that does `final_caps`, so that
    the home can keep one token of its share for it.

        k = 2:   | 0 | 1 | 1 | 0 |
    """
    shares = _share_out(end - start, final_caps)
    if sum(shares) < end - start or not shares[0]:
        shares = _share_out(end - start, caps)
    fronts = [share // 2 for share in shares]
    order = list(enumerate(fronts)) + [(i, shares[i] - fronts[i]) for i in reversed(range(len(shares)))]
    spans: list[tuple[int, int, int]] = []
    for participant, rows in order:
        if rows and spans and spans[-1][0] == participant:
            spans[-1] = (participant, spans[-1][1], start + rows)
        elif rows:
            spans.append((participant, start, start + rows))
        start += rows
    return spans


def _share_out(total: int, caps: Sequence[int]) -> list[int]:
    """`total` (or all that fits) shared as evenly as `caps` allow; what doesn't divide goes to the first."""
    shares = [0] * len(caps)
    left = min(total, sum(caps))
    while left:
        open_ = [i for i, cap in enumerate(caps) if shares[i] < cap]
        each = max(1, left // len(open_))
        for i in open_:
            take = min(each, caps[i] - shares[i], left)
            shares[i] += take
            left -= take
    return shares


def _chunks(notices: Sequence[Notice]) -> Iterable[tuple[Prefill, list[Span]]]:
    """Share the members' prompt rows of this step among the prompts that wait.

    Those with the fewest tokens left go first, so that a short prompt doesn't wait for a long one. But at each member half of
    the budget is promised to the one with the least slack (`_slack`) of those that need it. The one with least of all has
    that half at each of its members: so none starves.
    """
    ready = {notice.rank: set(notice.ready) for notice in notices}
    waiting = [
        prefill
        for notice in notices
        for prefill in notice.prefills
        if all(prefill.seq in ready.get(rank, ()) for rank in _concerned(prefill))
    ]
    is_paced = any(notice.both_lanes for notice in notices)
    rooms = {notice.rank: _Room.of(notice, is_paced=is_paced) for notice in notices}
    by_slack = sorted(waiting, key=lambda p: (_slack(p, rooms), p.arrival, p.seq))
    for prefill in by_slack:
        for share in prefill.shares:
            if share.tokens:
                rooms[share.rank].promise_half(prefill, share.tokens)
    promised = {room.promised for room in rooms.values()}
    first = [prefill for prefill in by_slack if prefill.seq in promised][:MAX_PROMPTS]
    others = sorted((p for p in waiting if p.seq not in promised), key=_shortest)[: MAX_PROMPTS - len(first)]
    order = sorted(first + others, key=_shortest)
    last = {share.rank: prefill.seq for prefill in order for share in prefill.shares if share.tokens}
    by_rank = {notice.rank: notice for notice in notices}
    for prefill in order:
        most = _slice(prefill, by_rank)
        if chunk := _chunk(prefill, rooms, [rank for rank, seq in last.items() if seq == prefill.seq], most):
            yield prefill, chunk


@dataclass(slots=True)
class _Room:
    """What a member can still take of prompts in this step."""

    budget: int
    """What its rows may cost."""
    rows: int
    """Most of them, whatever they cost."""
    reach: int
    grain: int
    promised: int | None = None
    """The sequence to which half of both is promised."""
    kept: int = 0
    """Of `budget`, for that one."""
    kept_rows: int = 0

    @classmethod
    def of(cls, notice: Notice, *, is_paced: bool) -> "_Room":
        if is_paced:
            return cls(notice.paced_budget, notice.budget, notice.reach, notice.grain)
        return cls(notice.budget, notice.budget, FAR, 1)

    def promise_half(self, prefill: Prefill, tokens: int) -> None:
        """To the first that asks: as much as its `tokens` here need."""
        if self.promised is None:
            self.promised = prefill.seq
            self.kept = min((self.budget + 1) // 2, _cost(tokens, prefill.start, self.reach))
            self.kept_rows = min((self.rows + 1) // 2, tokens)

    def rows_for(self, seq: int, start: int, tokens: int, *, is_last: bool) -> int:
        """How many of a prompt's `tokens` fit, from position `start` on.

        `is_last`: nobody needs what it leaves, so they may be rounded to a grain.
        """
        is_promised = seq == self.promised
        grain = self.grain if is_promised or is_last else None
        affordable = _affordable(self.budget - (0 if is_promised else self.kept), start, self.reach, grain)
        return min(tokens, self.rows - (0 if is_promised else self.kept_rows), affordable)

    def fill(self, seq: int, start: int, rows: int) -> None:
        """So many of a prompt's rows run, from position `start` on; if it had a promise, that is kept."""
        self.budget -= _cost(rows, start, self.reach)
        self.rows -= rows
        if seq == self.promised:
            self.kept = self.kept_rows = 0


def _concerned(prefill: Prefill) -> Iterable[int]:
    """The instances that must know of a prefill before it goes on."""
    yield from (share.rank for share in prefill.shares if share.tokens)
    yield from (holding.rank for holding in prefill.holdings)


def _slice(prefill: Prefill, notices: Mapping[int, Notice]) -> int:
    """Most rows of a prompt in this step, on all instances, so that those of the next follow through the stages."""
    its = [notices[share.rank] for share in prefill.shares if share.tokens]
    return slice_rows(
        prefill.start,
        prefill.rows,
        stages=its[0].stages,
        most=sum(notice.budget for notice in its),
        reach=min(notice.reach for notice in its),
        grain=sum(notice.grain for notice in its),
    )


def _chunk(prefill: Prefill, rooms: Mapping[int, _Room], last_at: Sequence[int], most: int) -> list[Span]:
    """A prompt's next rows, gap after gap as far as there is room, and `most` in all. `last_at`: where none comes after it."""
    left = {share.rank: share.tokens for share in prefill.shares}
    ranks = list(left)
    home = ranks[0]
    chunk: list[Span] = []
    for start, end_of_gap in prefill.gaps:
        end = min(end_of_gap, start + most)
        room = [rooms[rank].rows_for(prefill.seq, start, left[rank], is_last=rank in last_at) for rank in ranks]
        caps = [min(room[0], left[home] - 1), *room[1:]] if len(room) > 1 else room
        spans = [
            Span(prefill.seq, ranks[i], first, stop)
            for i, first, stop in split_chunk(start, end, caps, room if prefill.ends_at(end) else caps)
        ]
        for rank in ranks:
            rows = sum(span.stop - span.start for span in spans if span.rank == rank)
            rooms[rank].fill(prefill.seq, start, rows)
            left[rank] -= rows
        chunk += spans
        most -= sum(span.stop - span.start for span in spans)
        if not spans or spans[-1].stop < end_of_gap or not most:
            break
    return chunk


def _shortest(prefill: Prefill) -> tuple[int, int, int]:
    return prefill.rows, prefill.arrival, prefill.seq


def _slack(prefill: Prefill, rooms: Mapping[int, _Room]) -> int:
    """Steps until a prompt is late: `STRETCH` times those it still needs, less those it has waited.

    So a short prompt goes before a long one, until the long one has waited for `STRETCH` times its own length: from then on
    none that comes goes before it. Source: least slack first, with a deadline in proportion to a job's length (stretch;
    Bender, Chakrabarti and Muthukrishnan, "Flow and stretch metrics", SODA 1998).
    """
    its = [rooms[share.rank] for share in prefill.shares if share.tokens]
    rows = prefill.rows
    near = min(room.reach for room in its)
    cost = rows * (2 * near + prefill.start + prefill.gaps[-1][1]) // (2 * near)
    by_cost = STRETCH * cost // sum(room.budget for room in its)
    by_rows = STRETCH * rows // sum(room.rows for room in its)
    return max(by_cost, by_rows) - prefill.waited


def _affordable(budget: int, start: int, reach: int, grain: int | None) -> int:
    """Rows from position `start` on that a budget pays for; if `grain` is given, to the nearest grain, and one at least, so
    that the prompt never stands still."""
    if budget <= 0:
        return 0
    rows = ((budget + 1) * reach - 1) // (reach + start)
    return rows if grain is None else max(1, (rows + grain // 2) // grain) * grain


def _cost(rows: int, start: int, reach: int) -> int:
    """Of a budget: a row after `reach` tokens costs two (Medha: chunks shrink as the prefix grows, so that decodes hold)."""
    return rows * (reach + start) // reach


def _check_same(notices: Sequence[Notice]) -> None:
    head = notices[0]
    for other in notices[1:]:
        for what in ("epoch", "lane", "party", "step"):
            if getattr(head, what) != getattr(other, what):
                raise StepMismatch(
                    f"rank {other.rank} is in {what} {getattr(other, what)}, rank {head.rank} in {getattr(head, what)}"
                )
        if head.digest != other.digest:
            fields = [
                name
                for name, ours, theirs in zip(Step.__struct_fields__, head.digest, other.digest, strict=False)
                if ours != theirs
            ]
            raise StepMismatch(
                f"ranks {head.rank} and {other.rank} derived different steps before step {head.step} of party "
                f"{head.party}: {', '.join(fields) or 'one has no digest'} differ"
            )
