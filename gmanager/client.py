"""The Python client: many requests at once over one connection. Imports neither torch nor transformers."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import msgspec

from gmanager.wire import messages as m
from gmanager.wire.channel import Dialer, Transport, ZmqTransport
from gmanager.wire.codec import Decoder
from gmanager.wire.errors import (
    BadMessage,
    CallFailed,
    DistattnError,
    PeerGone,
    ProtocolRefused,
    RequestFailed,
    RequestRefused,
    ServiceUnreachable,
)

S = TypeVar("S", bound=msgspec.Struct)

Spread = int | Literal["auto", "all"] | None

_Over = ServiceUnreachable | ProtocolRefused
"""Why a connection ended."""
_Answer = m.Done | m.CallFailed | m.StatsReply | m.TextReply | _Over

_DEFAULT_PARAMS = m.SamplingParams()
MOST_UNREAD = 1024
"""Outputs of a request that wait to be read; what comes beyond is dropped, and asked for again."""
_PINGS_PER_LEASE = 3
_REDIAL_S = 0.2
_UINT32_END = 2**32


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of a request."""

    index: int
    """Position of the first of `token_ids` among the request's generated tokens."""
    token_ids: list[int]
    text: str
    """What these tokens add to the text. A token may add nothing yet (half a character), and the last chunk may
    hold text without tokens."""
    logprobs: list[m.TokenLogprob] | None = None
    """One per token, if they were asked for."""
    prompt_logprobs: list[m.TokenLogprob] | None = None
    """Only on the first chunk, if they were asked for: one per prompt token but the first."""
    finish_reason: m.FinishReason | None = None
    """Only on the last chunk."""
    error: str | None = None
    """Why, if `finish_reason` is "error"."""


@dataclass(slots=True)
class _Stream:
    """A request that the gManager has not ended yet, as far as is known here."""

    first: m.Submit | m.Attach
    """With which it began. A Submit is said again as long as no token has come: if it has arrived, it attaches."""
    next_index: int
    """Of the first token that has not come."""
    outputs: "asyncio.Queue[m.Output | m.PromptOutput | _Over]" = field(default_factory=asyncio.Queue)
    is_behind: bool = False
    """More came than was read, and was dropped: when the rest is read, it is asked for again."""
    left: bool = False
    """Nobody iterates any more. It stays known until the gManager has ended it, so that its late outputs aren't taken
    for those of a new request with the same id."""

    @property
    def again(self) -> m.Submit | m.Attach:
        """What brings all that has not come."""
        if self.next_index == 0 and isinstance(self.first, m.Submit):
            return self.first
        return m.Attach(request_id=self.first.request_id, from_index=self.next_index)

    def put(self, output: m.Output) -> bool:
        """Take what has come, unless too much lies here unread, or it does not follow: then it was sent before it was asked for
        again. Returns whether it was taken."""
        if output.finish_reason == "error" and not output.token_ids:  # whatever else is lacking: it is over for this client
            self.outputs.put_nowait(output)
            return True
        if self.is_behind or output.index > self.next_index:
            return False
        if output.index < self.next_index and output.finish_reason is None:
            return False
        if self.outputs.qsize() >= MOST_UNREAD:
            self.is_behind = True
            return False
        self.next_index = max(self.next_index, output.index + len(output.token_ids))
        self.outputs.put_nowait(output)
        return True


class AsyncClient:
    """A connection to a gManager; an async context manager.

    `connect_timeout_s`: how long to wait for the gManager's first answer. `transport`: ZeroMQ unless given.
    `resume_s`: a connection that is lost is made anew within so long, and the iterators that are open go on where they were, if
    the gManager still has their requests (the same one for `--resume` seconds, another one if it reads a journal). Calls that
    are under way fail with ServiceUnreachable, and so does what is begun while there is no connection. When none is made in
    time, or with 0, all that is open fails so, too: make a new client.
    """

    def __init__(
        self,
        address: str,
        *,
        connect_timeout_s: float = 10.0,
        resume_s: float = 30.0,
        transport: Transport | None = None,
    ) -> None:
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._resume_s = resume_s
        self._transport: Transport = ZmqTransport() if transport is None else transport
        self._dialer: Dialer[m.ToClient] | None = None
        self._work: asyncio.Task[None] | None = None
        self._lost: ServiceUnreachable | None = None
        """Why there is no connection now, while another one is being made."""
        self._streams: dict[str, _Stream] = {}
        self._calls: dict[int, asyncio.Future[_Answer]] = {}
        self._last_call = 0
        self._silent_pings = 0
        self._over: _Over | None = None

    async def __aenter__(self) -> Self:
        """Connect. Raises AddressError, ServiceUnreachable if nobody answers, ProtocolRefused if it doesn't want us."""
        if self._dialer is not None:
            raise RuntimeError("an AsyncClient is entered once; make a new one")
        self._dialer, lease_s = await self._dial()
        self._work = asyncio.create_task(self._run(self._dialer, lease_s), name="distattn-client")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Abort what still runs and close."""
        dialer = self._connection()
        for request_id, stream in self._streams.items():
            if not stream.left:
                dialer.send(m.Abort(call=self._next_call(), request_id=request_id))
        self._fail(ServiceUnreachable("the client was closed"))
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait([self._work])
        await self._connection().close()

    @property
    def is_over(self) -> bool:
        """Whether there will be no connection any more."""
        return self._over is not None

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self._dialer is not None and self._over is None and self._lost is None

    def generate(
        self,
        prompt: str | list[int],
        params: m.SamplingParams = _DEFAULT_PARAMS,
        *,
        request_id: str | None = None,
        spread: Spread = None,
        model: str | None = None,
        wait_for_cell: bool = True,
        priority: int = 0,
        slo_ttft_s: float | None = None,
        slo_tpot_s: float | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Generate from text or token ids; the request starts with the first `__anext__`.

        `request_id`: unique among the service's requests; drawn if None. With one that it knows, and the same arguments, the
        tokens of that request come, from the first on. `spread`: least number of instances
        that the prompt's KV is spread over. `model`: by the name that it is served under; None: any. `wait_for_cell`: if no
        cell is ready, rather than being refused. `priority`: lower goes first, for memory; a level is worth a minute's waiting.
        `slo_ttft_s`, `slo_tpot_s`: seconds to the first token and between tokens that are wanted, instead of the service's own
        objectives: if they would be missed it is refused (`reason` "overloaded", with `retry_after_s`, or "unreachable").
        Leaving the iterator (break, aclose, cancel) aborts the request.

        Raises TypeError and ValueError at once for arguments of a wrong type. The iterator raises RequestRefused if
        the request is wrong, FrameTooLarge if the prompt is, RequestFailed (after a chunk with finish_reason "error")
        if it was accepted and then failed, ServiceUnreachable if the gManager is gone.
        """
        rest: dict[str, Any] = {"params": params, "spread": spread, "model": model, "wait_for_cell": wait_for_cell}
        rest |= {"priority": priority, "slo_ttft_s": slo_ttft_s, "slo_tpot_s": slo_tpot_s}
        if isinstance(prompt, str):
            return self._stream(_submit(request_id, text=prompt, **rest))
        if not isinstance(prompt, list):
            raise TypeError(f"a prompt is a str or a list of token ids, got {type(prompt).__name__}")
        return self._stream(_submit(request_id, token_ids=_packed(prompt), **rest))

    def chat(
        self,
        messages: Sequence[m.ChatMessage | Mapping[str, str]],
        params: m.SamplingParams = _DEFAULT_PARAMS,
        *,
        request_id: str | None = None,
        spread: Spread = None,
        model: str | None = None,
        wait_for_cell: bool = True,
        priority: int = 0,
        slo_ttft_s: float | None = None,
        slo_tpot_s: float | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Generate the answer to a conversation, put into the model's chat template. Otherwise as `generate`."""
        turns = [_checked(turn, m.ChatMessage) for turn in messages]
        rest: dict[str, Any] = {"params": params, "spread": spread, "model": model, "wait_for_cell": wait_for_cell}
        rest |= {"priority": priority, "slo_ttft_s": slo_ttft_s, "slo_tpot_s": slo_tpot_s}
        return self._stream(_submit(request_id, messages=turns, **rest))

    def attach(self, request_id: str, from_index: int = 0) -> AsyncGenerator[Chunk, None]:
        """Go on with a request that was begun before, from that token on: what it has generated, then what comes.

        Whoever held it till then is told no more (RequestFailed). Log-probabilities of the prompt come only with `from_index`
        0. Otherwise as `generate`: leaving the iterator aborts the request. It raises RequestRefused if the request is not
        known.
        """
        return self._stream(_checked(m.Attach(request_id=request_id, from_index=from_index), m.Attach))

    async def abort(self, request_id: str) -> None:
        """End one of this client's requests; its iterator ends with finish_reason "abort".

        Raises CallFailed if the gManager knows no such request, ServiceUnreachable.
        """
        await self._call(m.Abort(call=self._next_call(), request_id=request_id))

    async def move_home(self, request_id: str, instance: int) -> None:
        """Let another instance (its rank) compute a request's next tokens; returns when that one is its home.

        Raises CallFailed with the reason if it can't be, ServiceUnreachable.
        """
        await self._call(m.MoveHome(call=self._next_call(), request_id=request_id, instance=instance))

    async def drain(self, instance: int, cell: str | None = None) -> None:
        """Empty an instance (its number in its cell): what it holds moves to the others, or is computed again; returns when it
        has left. `cell`: needed if several cells have one of that number.

        Raises CallFailed with the reason if it can't be (an unknown instance, the last of its cell) or is lost meanwhile,
        ServiceUnreachable.
        """
        await self._call(m.Drain(call=self._next_call(), instance=instance, cell=cell))

    async def stats(self) -> m.Stats:
        """The service's state. Raises ServiceUnreachable."""
        answer = await self._call(m.GetStats(call=self._next_call()))
        if not isinstance(answer, m.StatsReply):
            raise CallFailed(f"the gManager answered {type(answer).__name__} instead of StatsReply")
        return answer.stats

    async def text_assets(self, cell: str | None = None) -> m.TextAssets:
        """Tokenizer and chat template of a ready cell (None: of any), for `gmanager.text.tokenizer.Tokenizer`.

        Raises CallFailed if no such cell is ready, ServiceUnreachable.
        """
        answer = await self._call(m.GetText(call=self._next_call(), cell=cell))
        if not isinstance(answer, m.TextReply):
            raise CallFailed(f"the gManager answered {type(answer).__name__} instead of TextReply")
        return answer.assets

    # --- connection

    async def _dial(self) -> tuple[Dialer[m.ToClient], float]:
        """A new connection and its lease. Raises as `__aenter__`."""
        decoder: Decoder[m.ToClient] = Decoder(m.ToClient)
        dialer = self._transport.dial(self._address, decoder)
        try:
            return dialer, await self._greet(dialer)
        except BaseException:
            await dialer.close()
            raise

    async def _greet(self, dialer: Dialer[m.ToClient]) -> float:
        dialer.send(m.Hello(protocol=m.PROTOCOL))
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                answer = await dialer.recv()
        except TimeoutError:
            raise ServiceUnreachable(f"nobody answers at {self._address} within {self._connect_timeout_s:g} s") from None
        except PeerGone as error:
            raise ServiceUnreachable(f"the gManager left: {error}") from None
        if isinstance(answer, m.Welcome):
            return answer.lease_s
        if isinstance(answer, m.Refused):
            raise ProtocolRefused(f"the gManager at {self._address} refused the connection: {answer.reason}")
        raise ProtocolRefused(f"what answers at {self._address} is no gManager that this client understands")

    def _connection(self) -> Dialer[m.ToClient]:
        if self._dialer is None:
            raise RuntimeError("use the client in `async with AsyncClient(...) as client:`")
        return self._dialer

    async def _run(self, dialer: Dialer[m.ToClient], lease_s: float) -> None:
        """One connection after the other, until none can be made."""
        try:
            await self._connections(dialer, lease_s)
        finally:  # whatever it was, nobody waits for ever
            self._fail(ServiceUnreachable("the connection was given up"))

    async def _connections(self, dialer: Dialer[m.ToClient], lease_s: float) -> None:
        while True:
            reading, pinging = (asyncio.create_task(work) for work in (self._read(dialer), self._ping(dialer, lease_s)))
            try:
                await asyncio.wait([reading, pinging], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (reading, pinging):
                    task.cancel()
                await asyncio.wait([reading, pinging])
            error = next(task.result() for task in (reading, pinging) if not task.cancelled())
            if isinstance(error, ProtocolRefused) or not self._resume_s:
                self._fail(error)
                return
            self._lost = error
            self._fail_calls(error)
            await dialer.close()
            try:
                dialer, lease_s = await self._dial_again()
            except (ServiceUnreachable, ProtocolRefused) as failure:
                self._fail(error if isinstance(failure, ServiceUnreachable) else failure)
                return
            self._dialer, self._lost = dialer, None
            self._resume(dialer)

    async def _dial_again(self) -> tuple[Dialer[m.ToClient], float]:
        """Raises ProtocolRefused, and ServiceUnreachable if it takes too long."""
        try:
            async with asyncio.timeout(self._resume_s):
                while True:
                    try:
                        return await self._dial()
                    except ServiceUnreachable:
                        await asyncio.sleep(_REDIAL_S)
        except TimeoutError:
            raise ServiceUnreachable(f"nobody answers at {self._address} within {self._resume_s:g} s") from None

    def _resume(self, dialer: Dialer[m.ToClient]) -> None:
        """Ask for all that has not come."""
        for request_id, stream in self._streams.items():
            if stream.left:
                dialer.send(m.Attach(request_id=request_id, from_index=stream.next_index))
                self._leave(request_id, stream)
            elif not stream.is_behind:
                dialer.send(stream.again)

    async def _read(self, dialer: Dialer[m.ToClient]) -> _Over:
        """Until the connection is over; returns why."""
        while True:
            try:
                message = await dialer.recv()
            except PeerGone as error:
                return ServiceUnreachable(f"the gManager left: {error}")
            self._silent_pings = 0
            if isinstance(message, BadMessage):
                # An output may be among what can't be read; going on could leave a hole in a text.
                return ProtocolRefused(f"{self._address} sent what this client can't read: {message.reason}")
            if isinstance(message, m.Refused):
                kind = ServiceUnreachable if message.may_return else ProtocolRefused
                return kind(f"the gManager ended the connection: {message.reason}")
            self._route(message)

    def _route(self, message: m.ToClient) -> None:
        if isinstance(message, m.PromptOutput):
            stream = self._streams.get(message.request_id)
            if stream is not None and not stream.left:
                stream.outputs.put_nowait(message)
        elif isinstance(message, m.Output):
            self._route_output(message)
        elif isinstance(message, m.OutputBatch):
            # first tokens first: somebody waits for the beginning of a text more than for its next word
            for output in sorted(message.outputs, key=lambda output: output.index > 0):
                self._route_output(output)
        elif isinstance(message, m.Done | m.CallFailed | m.StatsReply | m.TextReply):
            call = self._calls.pop(message.call, None)
            if call is not None and not call.done():
                call.set_result(message)

    def _route_output(self, output: m.Output) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return
        was_taken = stream.left or stream.put(output)
        if was_taken and output.finish_reason is not None:
            del self._streams[output.request_id]

    async def _ping(self, dialer: Dialer[m.ToClient], lease_s: float) -> _Over:
        """Until nothing was heard for the lease; returns that."""
        self._silent_pings = 0
        # Counts pings without an answer, not time: a program that was stopped for a while, or that blocked the event
        # loop, first reads what has come meanwhile.
        while self._silent_pings < _PINGS_PER_LEASE:
            dialer.send(m.Ping())
            self._silent_pings += 1
            await asyncio.sleep(lease_s / _PINGS_PER_LEASE)
        return ServiceUnreachable(f"the gManager at {self._address} has not been heard for {lease_s:g} s")

    def _fail(self, error: _Over) -> None:
        """The connection is over: so is all that depends on it. The first reason stands."""
        if self._over is not None:
            return
        self._over = error
        for stream in self._streams.values():
            stream.outputs.put_nowait(error)
        self._streams.clear()
        self._fail_calls(error)

    def _fail_calls(self, error: _Over) -> None:
        for call in self._calls.values():
            if not call.done():
                call.set_result(error)
        self._calls.clear()

    # --- requests and calls

    async def _stream(self, first: m.Submit | m.Attach) -> AsyncGenerator[Chunk, None]:
        dialer = self._usable()
        request_id = first.request_id
        if request_id in self._streams:
            raise RequestRefused(f"request id {request_id!r} is in use by this client", "invalid")
        dialer.send(first)
        from_index = first.from_index if isinstance(first, m.Attach) else 0
        stream = self._streams[request_id] = _Stream(first, from_index)
        scores: dict[int, m.TokenLogprob] = {}
        try:
            while True:
                if stream.is_behind and stream.outputs.empty():
                    stream.is_behind = False
                    if self._lost is None:
                        self._connection().send(stream.again)
                output = await stream.outputs.get()
                if isinstance(output, DistattnError):
                    raise _again(output)
                if isinstance(output, m.PromptOutput):
                    scores |= enumerate(output.logprobs.unpack(), output.logprobs.start)
                    continue
                if output.refusal == "unknown" and isinstance(first, m.Submit):
                    raise RequestFailed(f"it was accepted, and is lost: {output.error}")
                if output.refusal is not None:
                    text = output.error or "refused without a reason"
                    raise RequestRefused(text, output.refusal, output.retry_after_s)
                yield Chunk(
                    index=output.index,
                    token_ids=output.token_ids,
                    text=output.text,
                    logprobs=output.logprobs,
                    prompt_logprobs=[scores[position] for position in sorted(scores)] if scores else None,
                    finish_reason=output.finish_reason,
                    error=output.error,
                )
                scores.clear()
                if output.finish_reason == "error":
                    raise RequestFailed(output.error or "failed without a reason")
                if output.finish_reason is not None:
                    return
        finally:
            if self._streams.get(request_id) is stream:
                self._leave(request_id, stream)

    def _leave(self, request_id: str, stream: _Stream) -> None:
        """Abort a request that nobody iterates any more, without waiting for the answer."""
        stream.left = True
        if self._lost is not None:
            return  # `_resume` aborts it
        abort = m.Abort(call=self._next_call(), request_id=request_id)

        def on_answer(call: "asyncio.Future[_Answer]") -> None:
            # CallFailed: the gManager doesn't know it, so no last output will come to say that it has ended.
            if isinstance(call.result(), m.CallFailed) and self._streams.get(request_id) is stream:
                del self._streams[request_id]

        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(on_answer)
        self._calls[abort.call] = answer
        self._connection().send(abort)

    def _next_call(self) -> int:
        self._last_call += 1
        return self._last_call

    def _usable(self) -> Dialer[m.ToClient]:
        """The connection. Raises ServiceUnreachable if there is none now, ProtocolRefused if there will be none."""
        dialer = self._connection()
        if (error := self._over or self._lost) is not None:
            raise _again(error)
        return dialer

    async def _call(
        self, message: m.Abort | m.MoveHome | m.Drain | m.GetStats | m.GetText
    ) -> m.Done | m.StatsReply | m.TextReply:
        dialer = self._usable()
        _checked(message, type(message))
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._calls[message.call] = answer
        try:
            dialer.send(message)
            result = await answer
        finally:
            self._calls.pop(message.call, None)
        if isinstance(result, DistattnError):
            raise _again(result)
        if isinstance(result, m.CallFailed):
            raise CallFailed(result.reason)
        return result


def _again(error: _Over) -> _Over:
    """A new one for each that raises it: one exception raised in many tasks would collect all their tracebacks."""
    return type(error)(*error.args)


def _packed(prompt: list[int]) -> bytes:
    # bool is an int to Python, and True would become token 1.
    if set(map(type, prompt)) - {int}:
        at, token = next((i, t) for i, t in enumerate(prompt) if type(t) is not int)
        raise TypeError(f"token ids are ints; prompt[{at}] is of type {type(token).__name__}")
    if prompt and not (min(prompt) >= 0 and max(prompt) < _UINT32_END):
        at, token = next((i, t) for i, t in enumerate(prompt) if not 0 <= t < _UINT32_END)
        raise ValueError(f"token ids are in [0, {_UINT32_END}); prompt[{at}] is {token}")
    return m.pack_tokens(prompt)


def _submit(request_id: str | None, **fields: Any) -> m.Submit:
    return _checked(m.Submit(request_id=uuid.uuid4().hex if request_id is None else request_id, **fields), m.Submit)


def _checked(value: object, kind: type[S]) -> S:
    """`value` as the wire will see it: building a struct doesn't check types, msgspec.convert does. Raises ValueError."""
    return msgspec.convert(msgspec.to_builtins(value, builtin_types=(bytes,)), kind, strict=True, builtin_types=(bytes,))
