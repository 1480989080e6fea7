"""Requests from a client's Submit to its one final answer, wherever they are meanwhile (`gmanager.cluster.lifecycle`).

This file knows no instances: `gmanager.cluster.cluster` and `sequences` say when a request goes from one state to the next.
"""

import logging
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from gmanager.cluster.events import Action, Deliver, Encoded, Log, Restored, Send
from gmanager.cluster.lifecycle import RUNNING, TRANSITIONS, WAITING, Change, State
from gmanager.config import Spread
from gmanager.observed import Observed
from gmanager.wire.messages import (
    CallFailed,
    FinishReason,
    PromptLogprobs,
    PromptOutput,
    Refusal,
    RefusalReason,
    RequestState,
    RequestStats,
    SamplingParams,
    Submit,
    TokenLogprob,
    pack_tokens,
)
from gmanager.wire.peer import PeerId

NOBODY: PeerId = b""
"""The client of a request that was restored, and that no connection has attached to."""

KEEP_FINISHED = 1024
"""Finished requests whose statistics are kept."""

Emit = Callable[[Action], None]

Runs = Sequence[Sequence[tuple[int, int]]]
"""What is kept of a sequence on one instance: for each run the ranges of its positions."""

STORY = 32
"""Changes of state that are remembered of a request, for the error that one too many would be."""


@dataclass(slots=True)
class MoveCall:
    """A client waits for a home move."""

    peer: PeerId
    call: int
    target: int


@dataclass(slots=True, eq=False)
class Request:
    """One request. `tokens` are all that were generated, over all its admissions."""

    number: int
    """Age: lower is older. Also its name between cluster and shell."""
    id: str
    params: SamplingParams
    submit: Submit | None
    """What its tokens are to be made of, until they are known."""
    client: PeerId
    seed: int
    spread: Spread
    arrived_at: float
    waiting_since: float
    progress_at: float = 0.0
    """When something was last heard of it that was not known: a token, a change of state or of what is held of it."""
    prompt: bytes = b""
    """Packed token ids; empty until they are known."""
    highest: int = 0
    """Of its token ids; 0 until they have been looked through."""
    bad_words: list[list[int]] = field(default_factory=list)
    """Their tokens."""
    grammar: str | None = None
    """Compiled."""
    max_tokens: int = 0
    """Most tokens to generate, once prompt and cell are known; 0 if only the prompt is wanted."""
    cell_number: int = 0
    """Of the cell that serves it; 0 while there is none."""
    cell: str | None = None
    """The cell's name."""
    seq: int = 0
    """Its present admission, while it runs."""
    kept: dict[int, Runs] = field(default_factory=dict)
    """rank -> what is left there of its last admission's KV, while it waits after a change of membership."""
    state: State = "waiting"
    story: deque[tuple[float, Change, State]] = field(default_factory=lambda: deque(maxlen=STORY))
    """When it last changed, how, and to what."""
    is_scored: bool = False
    """Its client has the log-probabilities of its prompt, if it asked for them."""
    tokens: "array[int]" = field(default_factory=lambda: array("I"))
    home: int | None = None
    held: dict[int, int] = field(default_factory=dict)
    """Tokens of KV per rank, as last heard."""
    home_moves: int = 0
    preemptions: int = 0
    is_restored: bool = False
    """A gManager before this one took it in: it is not refused because its cell is smaller now."""
    was_interrupted: bool = False
    """It ran when the epoch ended, and the next has yet to begin."""
    breaks: int = 0
    """Epochs that broke while it ran, with nobody lost and no token of it come: it may be what breaks them."""
    move_call: MoveCall | None = None
    admitted_at: float | None = None
    """For the first time."""
    first_token_at: float | None = None
    last_token_at: float | None = None
    finish_reason: FinishReason | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    @property
    def is_waiting(self) -> bool:
        """Whether it has no KV yet, or no longer."""
        return self.state in WAITING

    @property
    def is_running(self) -> bool:
        """Whether it is a sequence of its cell, if only one that is being released."""
        return self.state in RUNNING

    @property
    def num_tokens(self) -> int:
        """Prompt and generated."""
        return self.prompt_tokens + len(self.tokens)

    @property
    def missing_tokens(self) -> int:
        """Those whose rows its next admission has to compute."""
        return self.num_tokens - sum(map(count_tokens, self.kept.values()))

    @property
    def num_bytes(self) -> int:
        """What it takes while it waits."""
        return len(self.prompt) + 4 * len(self.tokens) + (0 if self.submit is None else text_bytes(self.submit))

    @property
    def is_live(self) -> bool:
        return self.finish_reason is None

    def packed(self) -> bytes:
        """All its tokens so far: the prompt of its next admission."""
        return self.prompt + pack_tokens(self.tokens)

    def stats(self) -> RequestStats:
        return RequestStats(
            state=self.shown_state,
            cell=self.cell,
            home=self.home,
            kv_tokens={rank: tokens for rank, tokens in sorted(self.held.items()) if tokens},
            prompt_tokens=self.prompt_tokens,
            generated_tokens=len(self.tokens),
            home_moves=self.home_moves,
            preemptions=self.preemptions,
            finish_reason=self.finish_reason,
        )

    @property
    def shown_state(self) -> RequestState:
        """As users see it: whatever it waits for, it is queued."""
        match self.state:
            case "waiting" | "encoding":
                return "queued"
            case "queued" if self.preemptions:
                return "preempted"
            case state:
                return state


def count_tokens(runs: Runs) -> int:
    """Of what is kept on one instance."""
    return sum(end - start for run in runs for start, end in run)


def cut(runs: Runs, end: int) -> Runs:
    """What of it lies before a position; instances come to the same (`kvstore.shard`)."""
    shorter = [[(start, min(stop, end)) for start, stop in run if start < end] for run in runs]
    return [run for run in shorter if run]


def are_apart(parts: Iterable[Runs]) -> bool:
    """Whether all of it are positions, and none is in two places: else an instance is mad, and none of it can be used."""
    pieces = sorted(piece for runs in parts for run in runs for piece in run)
    edges = [0, *(edge for piece in pieces for edge in piece)]
    return edges == sorted(edges)


class Requests:
    """All live requests, what is kept of the last finished ones, and what is counted of all."""

    def __init__(self, emit: Emit, clock: Callable[[], float]) -> None:
        self.observed = Observed()
        self.waiting_bytes = 0
        """What the prompts of waiting requests take."""
        self._emit = emit
        self._clock = clock
        self._numbers = 0
        self._live: dict[int, Request] = {}
        self._ids: dict[str, Request] = {}
        self._finished: dict[str, tuple[int, RequestStats]] = {}

    def __len__(self) -> int:
        return len(self._live)

    def new(self, submit: Submit, client: PeerId, seed: int, spread: Spread) -> Request:
        """Take a request in. Its id must not be that of a live one."""
        if submit.request_id in self._ids:
            raise ValueError(f"request id {submit.request_id!r} is in use")
        self._numbers += 1
        now = self._clock()
        request = _request(self._numbers, submit, client, seed, spread, now)
        self._live[request.number] = self._ids[request.id] = request
        self.waiting_bytes += request.num_bytes
        return request

    def restore(self, restored: Restored) -> Request:
        """Take a request in that a gManager before this one had. Raises ValueError if its id is that of a live one, or its
        number is no later one's."""
        if restored.submit.request_id in self._ids or restored.number <= self._numbers:
            raise ValueError(f"request {restored.number}, {restored.submit.request_id!r}, can't follow {self._numbers}")
        self._numbers = restored.number
        request = _request(restored.number, restored.submit, NOBODY, restored.seed, restored.spread, self._clock())
        request.tokens.extend(restored.token_ids)
        request.is_restored = True
        request.is_scored = bool(restored.token_ids)
        self._live[request.number] = self._ids[request.id] = request
        self.waiting_bytes += request.num_bytes
        if restored.encoded is not None:
            self.set_tokens(request, restored.encoded)
        return request

    def set_tokens(self, request: Request, encoded: Encoded) -> None:
        """What its text means to the model is known; the text is not kept."""
        self.waiting_bytes -= request.num_bytes
        request.prompt, request.highest, request.submit = encoded.token_ids, encoded.highest, None
        request.bad_words, request.grammar = list(encoded.bad_words), encoded.grammar
        self.waiting_bytes += request.num_bytes

    def change(self, request: Request, change: Change) -> None:
        """Take a request to its next state. Raises RuntimeError with its story if the one it has doesn't allow that."""
        transition = TRANSITIONS[change]
        if request.state not in transition.sources:
            story = ", ".join(f"{how} at {when:.3f} ({state})" for when, how, state in request.story) or "it just came"
            raise RuntimeError(
                f"request {request.number} is {request.state}, which {change!r} does not follow; its story: {story}"
            )
        was_waiting = request.is_waiting
        request.state = transition.target
        self.waiting_bytes += request.num_bytes * (request.is_waiting - was_waiting)
        request.progress_at = self._clock()
        request.story.append((request.progress_at, change, request.state))

    def hear(self, request: Request) -> None:
        """It goes on."""
        request.progress_at = self._clock()

    def live(self) -> list[Request]:
        """In order of arrival."""
        return list(self._live.values())

    def by_number(self, number: int) -> Request | None:
        return self._live.get(number)

    def by_id(self, request_id: str) -> Request | None:
        return self._ids.get(request_id)

    def has_finished(self, request_id: str) -> bool:
        return request_id in self._finished

    def refuse(self, submit: Submit, client: PeerId, refusal: Refusal) -> None:
        """Answer a Submit that is not taken in."""
        self._log_refused(submit.request_id, refusal.reason)
        self.observed.refused[refusal.reason] += 1
        nobody = _request(0, submit, client, 0, 1, 0.0)
        self._answer(nobody, [], None, "error", refusal.text, refusal.reason)

    def admit(self, request: Request) -> None:
        """It begins to run, or does so again."""
        self.change(request, "admit")
        if request.admitted_at is None:
            request.admitted_at = self._clock()
            self.observed.queue_s.add(request.admitted_at - request.arrived_at)
            self.observed.prompt_tokens += request.prompt_tokens

    def deliver(self, request: Request, token_ids: list[int], logprobs: list[TokenLogprob] | None) -> None:
        """New tokens, in order; more will come."""
        self._take(request, token_ids)
        self._answer(request, token_ids, logprobs, None, None, None)

    def deliver_scores(self, request: Request, logprobs: PromptLogprobs) -> None:
        """Log-probabilities of some of its prompt."""
        self._emit(Send(request.client, PromptOutput(request_id=request.id, logprobs=logprobs)))

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        error: str | None = None,
        refusal: RefusalReason | None = None,
        token_ids: list[int] | None = None,
        logprobs: list[TokenLogprob] | None = None,
    ) -> None:
        """Its one final answer. What it holds on instances is for the caller to release."""
        token_ids = token_ids or []
        self._take(request, token_ids)
        self._observe_end(request, reason, refusal)
        request.finish_reason = reason
        self.change(request, "end")
        self._answer(request, token_ids, logprobs, reason, error, refusal)
        self.fail_move(request, f"request {request.id!r} has ended ({reason})")
        self._log_end(request, reason, error, refusal)
        del self._live[request.number]
        del self._ids[request.id]
        self._finished.pop(request.id, None)
        self._finished[request.id] = (request.number, request.stats())
        if len(self._finished) > KEEP_FINISHED:
            del self._finished[next(iter(self._finished))]

    def cut(self, request: Request, generated: int) -> None:
        """A stop string was found in its text: what comes after so many tokens never reaches its client."""
        num_bytes = request.num_bytes
        self.observed.generated_tokens -= len(request.tokens[generated:])
        del request.tokens[generated:]
        self.waiting_bytes += (request.num_bytes - num_bytes) * request.is_waiting

    def correct(self, number: int, generated: int) -> None:
        """A stop string was found in the text of a request that has just ended: that is why it ended."""
        for request_id, (kept, stats) in reversed(self._finished.items()):
            if kept == number and stats.finish_reason is not None:
                # nobody has seen these counts: the shell asks for this before it does anything else
                self.observed.finished[stats.finish_reason] -= 1
                self.observed.finished["stop"] += 1
                self.observed.generated_tokens -= stats.generated_tokens - generated
                stats = msgspec.structs.replace(stats, finish_reason="stop", generated_tokens=generated)
                self._finished[request_id] = (number, stats)
                return

    def fail_move(self, request: Request, reason: str) -> None:
        """Answer the client that waits for a home move, if one does."""
        if request.move_call is not None:
            call, request.move_call = request.move_call, None
            self._emit(Send(call.peer, CallFailed(call=call.call, reason=reason)))

    def stats(self) -> dict[str, RequestStats]:
        """Of the last finished requests and of all live ones."""
        finished = {request_id: stats for request_id, (_, stats) in self._finished.items()}
        return finished | {request.id: request.stats() for request in self._live.values()}

    def validate(self) -> None:
        """Raises RuntimeError if the books don't agree."""
        if [request.number for request in self._ids.values()] != list(self._live):
            raise RuntimeError("live requests by id and by number differ")
        waiting_bytes = sum(request.num_bytes for request in self._live.values() if request.is_waiting)
        if self.waiting_bytes != waiting_bytes:
            raise RuntimeError(f"waiting requests take {waiting_bytes} bytes, {self.waiting_bytes} were counted")
        for request in self._live.values():
            if not request.is_live or request.state == "finished":
                raise RuntimeError(f"request {request.number} is kept as live and has finished")

    def _take(self, request: Request, token_ids: list[int]) -> None:
        if not token_ids:
            return
        now = self._clock()
        if request.first_token_at is None:
            request.first_token_at = now
            self.observed.ttft_s.add(now - request.arrived_at)
        request.last_token_at = request.progress_at = now
        request.breaks = 0
        request.tokens.extend(token_ids)
        self.waiting_bytes += 4 * len(token_ids) * request.is_waiting
        self.observed.generated_tokens += len(token_ids)

    def _observe_end(self, request: Request, reason: FinishReason, refusal: RefusalReason | None) -> None:
        if refusal is not None:
            self.observed.refused[refusal] += 1
            return
        self.observed.finished[reason] += 1
        self.observed.e2e_s.add(self._clock() - request.arrived_at)
        first, last = request.first_token_at, request.last_token_at
        if first is not None and last is not None and len(request.tokens) > 1:
            self.observed.tpot_s.add((last - first) / (len(request.tokens) - 1))

    def _log_end(self, request: Request, reason: FinishReason, error: str | None, refusal: RefusalReason | None) -> None:
        if refusal is not None:
            self._log_refused(request.id, refusal)
            return
        fields = {
            "request": request.id,
            "number": request.number,
            "finish_reason": reason,
            "prompt_tokens": request.prompt_tokens,
            "generated_tokens": len(request.tokens),
        }
        self._emit(Log(logging.INFO, "request finished", fields if error is None else fields | {"error": error}))

    def _log_refused(self, request_id: str, reason: RefusalReason) -> None:
        # not the text of it, which may quote what the client wrote: it has it
        self._emit(Log(logging.INFO, "request refused", {"request": request_id, "reason": reason}))

    def _answer(
        self,
        request: Request,
        token_ids: list[int],
        logprobs: list[TokenLogprob] | None,
        reason: FinishReason | None,
        error: str | None,
        refusal: RefusalReason | None,
    ) -> None:
        if request.client == NOBODY:
            return
        self._emit(
            Deliver(
                peer=request.client,
                request=request.number,
                request_id=request.id,
                cell=request.cell_number,
                stop_strings=tuple(request.params.stop_strings),
                include_stop=request.params.include_stop_str_in_output,
                min_tokens=request.params.min_tokens,
                skip_special_tokens=request.params.skip_special_tokens,
                shown_special=frozenset(request.params.shown_special_tokens or ()),
                index=len(request.tokens) - len(token_ids),
                token_ids=token_ids,
                logprobs=logprobs,
                finish_reason=reason,
                error=error,
                refusal=refusal,
            )
        )


def _request(number: int, submit: Submit, client: PeerId, seed: int, spread: Spread, now: float) -> Request:
    return Request(
        number,
        submit.request_id,
        submit.params,
        submit,
        client,
        seed,
        spread,
        arrived_at=now,
        waiting_since=now,
        progress_at=now,
        prompt=submit.token_ids or b"",
    )


def text_bytes(submit: Submit) -> int:
    """Of the text that a request brings."""
    return len(submit.text or "") + sum(len(message.content) for message in submit.messages or ())


def wrong_with(submit: Submit) -> Refusal | None:
    """What is wrong with a request whoever serves it."""
    if submit.token_ids is not None and len(submit.token_ids) % 4:
        return Refusal("invalid", f"token ids must be a multiple of 4 bytes long, got {len(submit.token_ids)}")
    if not (submit.token_ids or submit.text or submit.messages):
        return Refusal("invalid", "the prompt is empty")
    return None
