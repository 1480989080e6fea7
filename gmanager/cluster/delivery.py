"""What the client of a request is told, and from where on.

    follows    what comes is told at once
    is behind  it has attached just now, or its connection was full (`pause`): it is told from its next token on, once it can be
    is gone    the request is detached: its client may attach again, over another connection

Whoever hears it, the shell turns all tokens into text, once: so a stop string ends a request also while nobody listens. For who
was behind it begins anew, with the tokens that the client has (`Deliver.before`).
"""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gmanager.cluster.events import Deliver, Emit, Send
from gmanager.cluster.request import Ended, Request
from gmanager.wire.messages import FinishReason, Output, PromptLogprobs, PromptOutput, Refusal, RefusalReason, TokenLogprob
from gmanager.wire.peer import PeerId

MOST_AT_ONCE = 4096
"""Tokens: with all log-probabilities that can be asked for they are far below a frame's limit."""
TAKEN_OVER = "another connection has attached to the request"


@dataclass(slots=True)
class _Pause:
    """The connection to a client is full."""

    since: float
    owed: dict[str, int] = field(default_factory=dict)
    """Requests of it that have ended since, and from which token on it lacks them."""


class Delivery:
    """To all clients."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._paused: dict[PeerId, _Pause] = {}
        """Those to whom nothing is told, because they don't read."""

    def tell(
        self,
        request: Request,
        reason: FinishReason | None = None,
        error: str | None = None,
        refusal: RefusalReason | None = None,
    ) -> None:
        """What is new of a request; with a `reason` it is the last."""
        end = len(request.tokens)
        if end and not request.cell_number:  # it was restored, and nobody is there yet who could make text of its tokens
            if reason is not None:
                self._deliver(request, request.client, min(request.sent, end), None, reason, error, refusal, is_silent=True)
            request.is_followed = False
            return
        client = None if request.client in self._paused else request.client
        start = min(request.told, end)
        before: array[int] | None = None
        if client is None:
            request.is_followed = False
        elif not request.is_followed and (request.sent <= end or reason is not None):
            request.is_followed = True
            start, before = self._begin_anew(request, client, request.sent)
        if before is None and not request.has_text:
            before = request.tokens[:start]
        request.has_text = True
        peer = client if request.is_followed else None
        self._deliver(request, peer, start, before, reason, error, refusal)
        request.told = end
        if peer is not None:
            request.sent = end
        elif reason is not None and request.client in self._paused:
            self._paused[request.client].owed[request.id] = request.sent

    def tell_scores(self, request: Request, scores: PromptLogprobs) -> None:
        """Log-probabilities of some of its prompt; all come before its first token. Kept for who attaches at its beginning."""
        request.scores.append(scores)
        if request.client is not None and request.is_followed:
            self._emit(Send(request.client, PromptOutput(request_id=request.id, logprobs=scores)))

    def refuse(self, peer: PeerId, request_id: str, refusal: Refusal) -> None:
        """Answer what is no request."""
        self._emit(Send(peer, _last_words(request_id, 0, refusal.text, refusal.reason)))

    def attach(self, request: Request, peer: PeerId, from_index: int) -> None:
        """Tell this client of a request, from that token on; who held it till now hears that."""
        if request.client is not None and request.client != peer:
            self._emit(Send(request.client, _last_words(request.id, request.sent, TAKEN_OVER)))
        request.client, request.sent = peer, from_index
        request.is_followed, request.detached_at = False, None
        self.tell(request)

    def attach_ended(self, ended: Ended, peer: PeerId, from_index: int) -> None:
        """The same of one that has ended."""
        request = ended.request
        if peer in self._paused:
            self._paused[peer].owed[request.id] = from_index
            return
        start, before = self._begin_anew(request, peer, from_index)
        self._deliver(request, peer, start, before, ended.stats.finish_reason, ended.error, ended.refusal)

    def detach(self, request: Request, now: float) -> None:
        """Its client is gone."""
        request.client, request.is_followed, request.detached_at = None, False, now

    def pause(self, peer: PeerId, live: Iterable[Request], now: float) -> None:
        """The connection to this client is full: it is told no more. `live`: all requests."""
        if peer in self._paused:
            return
        self._paused[peer] = _Pause(now)
        for request in live:
            if request.client == peer:
                request.is_followed = False

    def paused_since(self, time: float) -> list[PeerId]:
        """Whose connection was full before that, and is."""
        return [peer for peer, pause in self._paused.items() if pause.since < time]

    def go_on(self, peer: PeerId, live: Iterable[Request], lacks: Mapping[str, int]) -> dict[str, int]:
        """It is empty again. `lacks`: what was told and did not get so far, and from which token on. Returns which requests of
        it have ended meanwhile, and from which token on it lacks them; none if it was not paused."""
        pause = self._paused.pop(peer, None)
        if pause is None:
            return {}
        owed, left = pause.owed, dict(lacks)
        for request in live:
            index = left.pop(request.id, request.sent)
            if request.client == peer:
                request.sent = min(request.sent, index)
                self.tell(request)
        return owed | {request_id: min(index, owed.get(request_id, index)) for request_id, index in left.items()}

    def forget(self, peer: PeerId) -> None:
        """It is no client any more."""
        self._paused.pop(peer, None)

    def _begin_anew(self, request: Request, peer: PeerId, from_index: int) -> "tuple[int, array[int]]":
        """With which token, and behind which; at the beginning with the log-probabilities of its prompt."""
        start = min(from_index, len(request.tokens))
        if not start:
            for scores in request.scores:
                self._emit(Send(peer, PromptOutput(request_id=request.id, logprobs=scores)))
        return start, request.tokens[:start]

    def _deliver(
        self,
        request: Request,
        peer: PeerId | None,
        start: int,
        before: "array[int] | None",
        reason: FinishReason | None,
        error: str | None,
        refusal: RefusalReason | None,
        *,
        is_silent: bool = False,
    ) -> None:
        """`is_silent`: without its tokens."""
        end = start if is_silent else len(request.tokens)
        while end - start > MOST_AT_ONCE:
            self._emit_tokens(request, peer, start, start + MOST_AT_ONCE, before)
            start, before = start + MOST_AT_ONCE, None
        self._emit_tokens(request, peer, start, end, before, reason, error, refusal)

    def _emit_tokens(
        self,
        request: Request,
        peer: PeerId | None,
        start: int,
        end: int,
        before: "array[int] | None",
        reason: FinishReason | None = None,
        error: str | None = None,
        refusal: RefusalReason | None = None,
    ) -> None:
        logprobs: list[TokenLogprob] | None = None if request.logprobs is None else request.logprobs[start:end]
        self._emit(
            Deliver(
                peer=peer,
                request=request.number,
                request_id=request.id,
                cell=request.cell_number,
                stop_strings=tuple(request.params.stop_strings),
                include_stop=request.params.include_stop_str_in_output,
                min_tokens=request.params.min_tokens,
                skip_special_tokens=request.params.skip_special_tokens,
                shown_special=frozenset(request.params.shown_special_tokens or ()),
                before=before,
                index=start,
                token_ids=request.tokens[start:end].tolist(),
                logprobs=logprobs,
                finish_reason=reason,
                error=error,
                refusal=refusal,
                retry_after_s=None if refusal is None else request.retry_after_s,
            )
        )


def _last_words(request_id: str, index: int, error: str, refusal: RefusalReason | None = None) -> Output:
    return Output(
        request_id=request_id, index=index, token_ids=[], text="", finish_reason="error", error=error, refusal=refusal
    )
