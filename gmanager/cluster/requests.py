"""Requests from a client's Submit to its one final answer, wherever they are meanwhile (`gmanager.cluster.lifecycle`).

This file knows no instances: `gmanager.cluster.cluster` and `sequences` say when a request goes from one state to the next.
"""

import logging
from collections.abc import Callable

import msgspec

from gmanager.cluster.delivery import Delivery
from gmanager.cluster.events import Accepted, Emit, Encoded, Entry, Finished, Generated, Log, Restored, Send, Write
from gmanager.cluster.lifecycle import TRANSITIONS, Change
from gmanager.cluster.objectives import NO_OBJECTIVES, Objectives
from gmanager.cluster.request import Ended, Request, content_of
from gmanager.config import Spread
from gmanager.observed import Observed
from gmanager.wire.messages import (
    CallFailed,
    FinishReason,
    PromptLogprobs,
    Refusal,
    RefusalReason,
    RequestStats,
    Submit,
    TokenLogprob,
)
from gmanager.wire.peer import PeerId

KEEP_ENDED = 1024
"""Ended requests that are kept, for statistics and for who attaches late."""
KEEP_ENDED_BYTES = 64 * 2**20
"""Most that their tokens and log-probabilities take together."""
NUMBERS_OF_A_TERM = 2**32
"""With a journal numbers begin anew behind a multiple of this, whichever a lost gManager gave in its last moments: instances
may hold tokens of a request that no journal knows."""


class Requests:
    """All live requests, what is kept of the last finished ones, and what is counted of all."""

    def __init__(
        self, emit: Emit, clock: Callable[[], float], *, term: int = 0, objectives: Objectives = NO_OBJECTIVES
    ) -> None:
        """`term`: of the journal; 0: there is none, and nothing is to be written. `objectives`: of requests that have none of
        their own."""
        self.observed = Observed()
        self.waiting_bytes = 0
        """What the prompts of waiting requests take."""
        self.num_waiting = 0
        """How many these are."""
        self.delivery = Delivery(emit)
        self._emit = emit
        self._clock = clock
        self._term = term
        self._objectives = objectives
        self._numbers = 0
        self._live: dict[int, Request] = {}
        self._ids: dict[str, Request] = {}
        self._ended: dict[str, Ended] = {}
        self._ended_bytes = 0

    def __len__(self) -> int:
        return len(self._live)

    @property
    def now(self) -> float:
        return self._clock()

    def new(self, submit: Submit, client: PeerId, seed: int, spread: Spread) -> Request:
        """Take a request in. Its id must not be that of a live one; one that has ended is forgotten."""
        if submit.request_id in self._ids:
            raise ValueError(f"request id {submit.request_id!r} is in use")
        self._numbers = max(self._numbers, NUMBERS_OF_A_TERM * self._term) + 1
        now = self._clock()
        request = _request(self._numbers, submit, client, seed, spread, now)
        request.objectives = self._objectives.of(submit)
        self._keep_live(request)
        self._write(Accepted(number=request.number, submit=submit, seed=seed, spread=spread))
        return request

    def restore(self, restored: Restored) -> Request:
        """Take a request in that a gManager before this one had; what has ended is known, no more. Raises ValueError if its id
        is that of a live one, or its number is no later one's."""
        if restored.submit.request_id in self._ids or restored.number <= self._numbers:
            raise ValueError(f"request {restored.number}, {restored.submit.request_id!r}, can't follow {self._numbers}")
        self._numbers = restored.number
        now = self._clock()
        request = _request(restored.number, restored.submit, None, restored.seed, restored.spread, now)
        request.objectives = self._objectives.of(restored.submit)
        self.delivery.detach(request, now)
        request.tokens.extend(restored.token_ids)
        request.told, request.has_text = len(request.tokens), False
        if request.logprobs is not None:
            request.logprobs += restored.logprobs or ()
        request.is_restored = True
        request.is_scored = bool(restored.token_ids)
        if restored.finish_reason is not None:
            request.finish_reason, request.state, request.detached_at = restored.finish_reason, "finished", None
            self._keep_ended(Ended(request, request.stats(), restored.error, restored.refusal))
            return request
        self._keep_live(request)
        if restored.encoded is not None:
            self._set_tokens(request, restored.encoded)
        return request

    def set_tokens(self, request: Request, encoded: Encoded) -> None:
        """What its text means to the model is known; the text is not kept."""
        self._set_tokens(request, encoded)
        self._write(encoded)

    def _set_tokens(self, request: Request, encoded: Encoded) -> None:
        self.waiting_bytes -= request.num_bytes
        request.prompt, request.highest, request.submit = encoded.token_ids, encoded.highest, None
        request.chain = encoded.chain
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
        self.num_waiting += request.is_waiting - was_waiting
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

    def ended(self, request_id: str) -> Ended | None:
        """None: it lives, or nothing is known of it (any more)."""
        return self._ended.get(request_id)

    def refuse(self, submit: Submit, client: PeerId, refusal: Refusal) -> None:
        """Answer a Submit that is not taken in."""
        self._log_refused(submit.request_id, refusal.reason)
        self.observed.refused[refusal.reason] += 1
        self.delivery.refuse(client, submit.request_id, refusal)

    def admit(self, request: Request, cached_tokens: int) -> None:
        """It begins to run, or does so again. `cached_tokens`: of its tokens, those whose KV is shared."""
        self.change(request, "admit")
        if request.admitted_at is None:
            request.admitted_at = self._clock()
            self.observed.queue_s.add(request.admitted_at - request.arrived_at)
            self.observed.prompt_tokens += request.prompt_tokens
            request.cached_tokens = min(cached_tokens, request.prompt_tokens)
            if request.chain is not None:
                self.observed.prefix_queries += request.prompt_tokens
                self.observed.prefix_hits += request.cached_tokens

    def deliver(self, request: Request, token_ids: list[int], logprobs: list[TokenLogprob] | None) -> None:
        """New tokens, in order; more will come."""
        self._take(request, token_ids, logprobs)
        self.delivery.tell(request)

    def deliver_scores(self, request: Request, logprobs: PromptLogprobs) -> None:
        """Log-probabilities of some of its prompt."""
        self.delivery.tell_scores(request, logprobs)

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
        self._take(request, token_ids or [], logprobs)
        self._observe_end(request, reason, refusal)
        request.finish_reason = reason
        self.change(request, "end")
        generated = len(request.tokens)
        self._write(Finished(number=request.number, finish_reason=reason, generated=generated, error=error, refusal=refusal))
        self.delivery.tell(request, reason, error, refusal)
        self.fail_move(request, f"request {request.id!r} has ended ({reason})")
        self._log_end(request, reason, error, refusal)
        del self._live[request.number]
        del self._ids[request.id]
        self._keep_ended(Ended(request, request.stats(), error, refusal))

    def cut(self, request: Request, generated: int) -> None:
        """A stop string was found in its text: what comes after so many tokens never reaches its client."""
        num_bytes = request.num_bytes
        self.observed.generated_tokens -= len(request.tokens[generated:])
        _cut(request, generated)
        self.waiting_bytes += (request.num_bytes - num_bytes) * request.is_waiting

    def correct(self, number: int, generated: int) -> None:
        """A stop string was found in the text of a request that has just ended: that is why it ended."""
        for request_id, ended in reversed(self._ended.items()):
            reason = ended.stats.finish_reason
            if ended.request.number == number and reason is not None:
                if (reason, ended.stats.generated_tokens) == ("stop", generated):
                    return  # its text was made anew, for who attached late
                # nobody has seen these counts: the shell asks for this before it does anything else
                self.observed.finished[reason] -= 1
                self.observed.finished["stop"] += 1
                self.observed.generated_tokens -= ended.stats.generated_tokens - generated
                self._ended_bytes -= ended.num_bytes
                _cut(ended.request, generated)
                self._ended_bytes += ended.num_bytes
                stats = msgspec.structs.replace(ended.stats, finish_reason="stop", generated_tokens=generated)
                self._ended[request_id] = Ended(ended.request, stats)
                self._write(Finished(number=number, finish_reason="stop", generated=generated))
                return

    def fail_move(self, request: Request, reason: str) -> None:
        """Answer the client that waits for a home move, if one does."""
        if request.move_call is not None:
            call, request.move_call = request.move_call, None
            self._emit(Send(call.peer, CallFailed(call=call.call, reason=reason)))

    def stats(self) -> dict[str, RequestStats]:
        """Of the last ended requests and of all live ones."""
        ended = {request_id: ended.stats for request_id, ended in self._ended.items()}
        return ended | {request.id: request.stats() for request in self._live.values()}

    def validate(self) -> None:
        """Raises RuntimeError if the books don't agree."""
        if [request.number for request in self._ids.values()] != list(self._live):
            raise RuntimeError("live requests by id and by number differ")
        if self._ended_bytes != sum(ended.num_bytes for ended in self._ended.values()):
            raise RuntimeError(f"ended requests take {self._ended_bytes} bytes by count, and others by sum")
        waiting = [request.num_bytes for request in self._live.values() if request.is_waiting]
        if (self.num_waiting, self.waiting_bytes) != (len(waiting), sum(waiting)):
            counted = f"{self.num_waiting} with {self.waiting_bytes} were counted"
            raise RuntimeError(f"{len(waiting)} requests wait and take {sum(waiting)} bytes, {counted}")
        for request in self._live.values():
            if not request.is_live or request.state == "finished":
                raise RuntimeError(f"request {request.number} is kept as live and has finished")

    def _write(self, entry: Entry) -> None:
        if self._term:
            self._emit(Write(entry))

    def _keep_live(self, request: Request) -> None:
        self._live[request.number] = self._ids[request.id] = request
        self._forget_ended(request.id)
        self.waiting_bytes += request.num_bytes
        self.num_waiting += 1

    def _keep_ended(self, ended: Ended) -> None:
        ended.request.prompt = b""
        ended.request.chain = None
        self._forget_ended(ended.request.id)
        self._ended[ended.request.id] = ended
        self._ended_bytes += ended.num_bytes
        while len(self._ended) > KEEP_ENDED or (self._ended_bytes > KEEP_ENDED_BYTES and len(self._ended) > 1):
            self._forget_ended(next(iter(self._ended)))

    def _forget_ended(self, request_id: str) -> None:
        ended = self._ended.pop(request_id, None)
        if ended is not None:
            self._ended_bytes -= ended.num_bytes

    def _take(self, request: Request, token_ids: list[int], logprobs: list[TokenLogprob] | None) -> None:
        if request.logprobs is not None:
            request.logprobs += logprobs or ()
        if not token_ids:
            return
        scores = None if request.logprobs is None else logprobs
        self._write(Generated(number=request.number, index=len(request.tokens), token_ids=token_ids, logprobs=scores))
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
        now = self._clock()
        self.observed.finished[reason] += 1
        self.observed.e2e_s.add(now - request.arrived_at)
        if request.tpot_s is not None:
            self.observed.tpot_s.add(request.tpot_s)
        if request.objectives and reason in ("stop", "length"):
            first = now if request.first_token_at is None else request.first_token_at  # only its prompt was wanted
            late, slow = request.objectives.missed(first - request.arrived_at, request.tpot_s)
            self.observed.missed_ttft += late
            self.observed.missed_tpot += slow
            self.observed.met_slo += not (late or slow)

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


def _cut(request: Request, generated: int) -> None:
    del request.tokens[generated:]
    if request.logprobs is not None:
        del request.logprobs[generated:]


def _request(number: int, submit: Submit, client: PeerId | None, seed: int, spread: Spread, now: float) -> Request:
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
        logprobs=None if submit.params.logprobs is None else [],
        cache_salt=submit.cache_salt,
        model=submit.model,
        priority=submit.priority,
        content=content_of(submit),
    )
