"""The fields that requests for tokens have in common, with what they mean to the sampler."""

import abc
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from gmanager.gateway.conversation import Dialogue
from gmanager.gateway.fields import WHOLE, BadWords, Body, LogitBias, Spread, Stop, StopTokens, Wrong
from gmanager.gateway.reading import shown
from gmanager.gateway.structure import FIELDS, Structure, structure, unread_in_format
from gmanager.wire.messages import MAX_LOGPROBS, MOST_PRIORITY, SamplingParams

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # tools under their first names
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    # other ways to choose tokens
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "allowed_token_ids": (None,),
    "logits_processors": (None, []),
    "thinking_token_budget": (None,),
    # more than text, and other text
    "suffix": (None, ""),
    "prompt_embeds": (None,),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "chat_template": (None,),
    "documents": (None, []),
    # Anthropic's
    "container": (None,),
    "mcp_servers": (None, []),
    "context_management": (None, {}, {"edits": []}),
}
"""Fields that would change the answer and aren't implemented, with the values that ask for nothing. Others are refused."""

IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("cache_salt", "spaces_between_special_tokens", "max_tool_calls"),
        *("cache_control", "inference_geo", "speed", "diagnostics"),
    }
)
"""Fields that are taken, and change nothing."""

_Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None


class StreamOptions(Body):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    """The usage so far in every chunk."""
    include_obfuscation: bool | None = None
    """Taken, and nothing is ever added to a stream."""


class Sampled(Body):
    """What every request for tokens may say of how they are chosen."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL
    """Fields that aren't implemented, as `NEUTRAL`."""

    model: Annotated[str, Field(max_length=1024)]
    temperature: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = 0
    """0 or -1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = 1.0
    logit_bias: LogitBias = None
    bad_words: BadWords = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    stop_token_ids: StopTokens = None
    skip_special_tokens: bool | None = True
    min_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = 0
    ignore_eos: bool | None = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = None
    """Keep the last so many tokens of a prompt; -1: as many as the model takes beside those that are to be generated."""
    request_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Part of the answer's id."""
    stream: bool | None = False
    spread: Spread = None
    """distattn: least number of instances that the prompt's KV is spread over."""

    priority: Annotated[int, Field(ge=-MOST_PRIORITY, lt=MOST_PRIORITY), WHOLE] | None = 0
    """Lower goes first, as in vLLM."""
    slo_ttft: _Seconds = None
    """distattn: seconds to the first token that are wanted, instead of the service's own objective."""
    slo_tpot: _Seconds = None
    """distattn: seconds between tokens, likewise."""

    cache_salt: str | None = None
    spaces_between_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_implemented(self) -> Self:
        for name in type(self).model_fields:
            neutral = self.refused.get(name)
            given = getattr(self, name)
            if neutral is not None and not any(given == value for value in neutral):
                raise Wrong(f"not implemented, leave it out; got {shown(given)}", name)
        if self.truncate_prompt_tokens == 0:
            raise Wrong("must be -1 or at least 1, got 0", "truncate_prompt_tokens")
        return self

    @property
    def stop_strings(self) -> list[str] | None:
        return None

    @property
    def shows_stop(self) -> bool:
        """A stop string is part of the text."""
        return False

    def sampling(self, choice: int = 0, **others: Any) -> SamplingParams:
        """For one of `n` answers: with a seed of its own, so that answers differ, and the first is that of n = 1. `others`:
        fields of SamplingParams that the request says in its own way.

        Raises ValueError.
        """
        return SamplingParams(
            temperature=_or(self.temperature, 1.0),
            top_k=_or(self.top_k, 0),
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias=self.logit_bias,
            bad_words=self.bad_words,
            min_tokens=_or(self.min_tokens, 0),
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            stop=self.stop_strings or None,
            include_stop_str_in_output=self.shows_stop,
            skip_special_tokens=_or(self.skip_special_tokens, True),
            stop_token_ids=self.stop_token_ids,
            ignore_eos=bool(self.ignore_eos),
            **others,
        )

    def service(self) -> dict[str, Any]:
        """How the service is to treat it: arguments of `AsyncClient.generate`."""
        return {
            "spread": self.spread,
            "priority": _or(self.priority, 0),
            "slo_ttft_s": self.slo_ttft,
            "slo_tpot_s": self.slo_tpot,
        }

    def check_min_tokens(self, limit_name: str, limit: int | None) -> None:
        """Raises Wrong if the answer could not end."""
        least = self.min_tokens or 0
        if limit is not None and least > limit:
            raise Wrong(f"must be at most {limit_name} ({limit:,}), got {least:,}", "min_tokens")


class Talk(Sampled, abc.ABC):
    """What every request that is a conversation says, each route's in its own way."""

    @abc.abstractmethod
    def dialogue(self) -> Dialogue:
        """What goes into the chat template. Raises Wrong."""

    @abc.abstractmethod
    def structure(self) -> Structure | None:
        """What an answer that calls no tool must be. Raises Wrong."""

    @property
    @abc.abstractmethod
    def most_tokens(self) -> int | None:
        """Of the answer; None: as many as there is room for."""

    def text_fields(self) -> list[str]:
        """Names of what only a tokenizer can read."""
        return [self.dialogue().field]

    @property
    def tells_thoughts(self) -> bool:
        """What the model thinks is part of the answer."""
        return True


class Generation(Sampled):
    """What OpenAI's two older routes have in common."""

    n: Annotated[int, Field(ge=1), WHOLE] | None = 1
    stop: Stop = None
    include_stop_str_in_output: bool | None = False
    prompt_logprobs: _Logprobs = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    stream_options: StreamOptions | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    response_format: Any = None
    best_of: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    allowed_token_ids: Any = None
    logits_processors: Any = None

    @model_validator(mode="after")
    def _check_generation(self) -> Self:
        self.structure()
        if self.stream and self.prompt_logprobs is not None:
            raise Wrong(f"comes with whole answers only, got {self.prompt_logprobs} with stream", "prompt_logprobs")
        return self

    def structure(self) -> Structure | None:
        """What the text must be, if that is said. Raises Wrong."""
        return structure({name: getattr(self, name) for name in FIELDS})

    def unread(self) -> Iterator[str]:
        yield from super().unread()
        yield from unread_in_format(self.response_format)

    def text_fields(self) -> list[str]:
        """Names of what is given beside the prompt and only a tokenizer can read."""
        asked = self.structure()
        given = [name for name in ("stop", "bad_words") if getattr(self, name)]
        return given if asked is None else [*given, asked.field]

    @property
    def stop_strings(self) -> list[str] | None:
        return self.stop

    @property
    def shows_stop(self) -> bool:
        return bool(self.include_stop_str_in_output)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continues_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
