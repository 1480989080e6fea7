"""What clients and the gManager say to each other."""

import math
from typing import Literal

from gmanager.wire.messages.base import Message
from gmanager.wire.messages.requests import (
    MOST_PRIORITY,
    ChatMessage,
    FinishReason,
    PromptLogprobs,
    RefusalReason,
    SamplingParams,
    TextAssets,
    TokenLogprob,
)
from gmanager.wire.messages.stats import Stats

MAX_SALT_CHARS = 256

# --- client -> gManager -----------------------------------------------------------------------------------------------


class Hello(Message):
    """A client's first message."""

    protocol: int


class Submit(Message):
    """A new request. Exactly one of `text`, `token_ids` and `messages` is given.

    The id of a request that lives, or has ended by its tokens not long ago, with the same content attaches to that one.
    """

    request_id: str
    params: SamplingParams
    text: str | None = None
    token_ids: bytes | None = None
    messages: list[ChatMessage] | None = None
    spread: int | Literal["auto", "all"] | None = None
    """Least number of instances to spread the prompt's KV over; None: the gManager's own setting."""
    model: str | None = None
    """The model that is to answer, by a name that cells serve it under; None: any."""
    wait_for_cell: bool = True
    """Whether to wait when no cell is ready; else it is refused."""
    priority: int = 0
    """Lower goes first, as in vLLM: in the queue for memory, and who keeps it when there is too little. A level is worth a
    minute's waiting."""
    slo_ttft_s: float | None = None
    """Seconds to the first token that it wants: if it would miss that, it is refused. None: the gManager's own setting."""
    slo_tpot_s: float | None = None
    """The same between tokens, in the mean."""
    cache_salt: str | None = None
    """It shares KV of tokens that it begins with only with requests that have the same: who has another can't even find out, by
    the time that its answer takes, whether there were such."""

    def __post_init__(self) -> None:
        given = [name for name in ("text", "token_ids", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of text, token_ids and messages must be given, got {given or 'none'}")
        if not 1 <= len(self.request_id) <= 256:
            raise ValueError(f"a request id has 1 to 256 characters, got {len(self.request_id)}")
        if self.cache_salt is not None and not 1 <= len(self.cache_salt) <= MAX_SALT_CHARS:
            raise ValueError(f"cache_salt has 1 to {MAX_SALT_CHARS} characters, got {len(self.cache_salt)}")
        if isinstance(self.spread, int) and self.spread < 1:
            raise ValueError(f"spread must be at least 1, got {self.spread}")
        if not -MOST_PRIORITY <= self.priority < MOST_PRIORITY:
            raise ValueError(f"priority must be in [-2**31, 2**31), got {self.priority}")
        for name in ("slo_ttft_s", "slo_tpot_s"):
            seconds = getattr(self, name)
            if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name} must be a positive number, got {seconds}")

    @property
    def text_fields(self) -> list[str]:
        """Which of what is given is text, that only a tokenizer can read."""
        prompt = {"prompt": self.text, "messages": self.messages}
        params = {name: getattr(self.params, name) for name in ("stop", "bad_words", "structured_outputs")}
        return [name for name, value in (prompt | params).items() if value]


class Attach(Message):
    """Tell this client of a request, from a token on: answered by its Outputs, or by one with a refusal. Who held it till then
    is told no more."""

    request_id: str
    from_index: int
    """Position of the first token to be told of among those generated."""

    def __post_init__(self) -> None:
        if self.from_index < 0:
            raise ValueError(f"from_index must not be negative, got {self.from_index}")


class Abort(Message):
    """End a request of this client. Answered by Done or CallFailed."""

    call: int
    request_id: str


class MoveHome(Message):
    """Let another instance compute the next tokens of a request. Answered by Done when moved, or CallFailed."""

    call: int
    request_id: str
    instance: int


class Drain(Message):
    """Empty an instance and let it leave its cell. Answered by Done when it has left, or CallFailed."""

    call: int
    instance: int
    cell: str | None = None
    """Needed if several cells have an instance of that number."""


class GetStats(Message):
    call: int


class GetText(Message):
    """For the text assets of a ready cell. Answered by TextReply, or CallFailed if there is none of that name."""

    call: int
    cell: str | None = None
    """None: of any."""


class Ping(Message):
    """Says that the sender lives. Answered by Pong."""


# --- gManager -> client -----------------------------------------------------------------------------------------------


class Welcome(Message):
    """Answer to Hello: be heard (any message) more often than every `lease_s` seconds, or be taken for gone."""

    lease_s: float


class Refused(Message):
    """The peer can't be served at all (wrong protocol, first message not a greeting, garbage); the connection is over."""

    reason: str
    may_return: bool = False
    """It was taken for gone and has not noticed: it may dial again, and attach to its requests."""


class Output(Message):
    """New tokens of a request. `index` is the position of the first among its generated tokens.

    The last one has a `finish_reason`. A request refused at the door gets one Output with `error` and index 0.
    """

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    refusal: RefusalReason | None = None
    """With `error`: the request never started."""
    retry_after_s: float | None = None
    """With a refusal: in so many seconds one like it is expected to be taken."""


class OutputBatch(Message):
    """Outputs of several requests of one client, in order: a message costs more than an output."""

    outputs: list[Output]


class PromptOutput(Message):
    """Log-probabilities of some of a request's prompt; all that were asked for come before its first Output, in any order.

    After a preemption some may come again.
    """

    request_id: str
    logprobs: PromptLogprobs


class Done(Message):
    call: int


class CallFailed(Message):
    call: int
    reason: str


class StatsReply(Message):
    call: int
    stats: Stats


class TextReply(Message):
    call: int
    assets: TextAssets


class Pong(Message):
    """Answer to Ping and Beat."""

    outputs: int = 0
    """To an instance: how many messages Outputs of it have been taken in, since it registered. It need not keep them longer."""


FromClient = Hello | Submit | Attach | Abort | MoveHome | Drain | GetStats | GetText | Ping
ToClient = Welcome | Refused | Output | OutputBatch | PromptOutput | Done | CallFailed | StatsReply | TextReply | Pong
