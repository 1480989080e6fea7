"""Bodies of requests, as OpenAI has them, with vLLM's names for what goes beyond.

A known field that would change the answer and isn't implemented is refused (`sampling.NEUTRAL`). One that isn't known is
ignored and named in the answer's headers (`Body.unread`), or refused by a strict gateway.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from gmanager.gateway.conversation import Conversation, Dialogue, Tools, Turn
from gmanager.gateway.fields import WHOLE, Body, Prompts, Tokens, Wrong
from gmanager.gateway.sampling import Generation, Talk
from gmanager.gateway.toolbox import Toolbox, unread_tools
from gmanager.wire.messages import MAX_LOGPROBS

_AtLeastOne = Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: Prompts
    add_special_tokens: bool | None = True
    max_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = 16
    """0, only with `echo`: the prompt alone. None: as many as there is room for."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    echo: bool | None = False
    suffix: Any = None
    prompt_embeds: Any = None

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise Wrong("must be at least 1, got 0 (0 is for echo)", "max_tokens")
        self.check_min_tokens("max_tokens", self.max_tokens)
        return self

    def text_fields(self) -> list[str]:
        return [*(name for name, prompt in self.prompts() if isinstance(prompt, str)), *super().text_fields()]

    def prompts(self) -> list[tuple[str, str | list[int]]]:
        """One or more, each with its name."""
        given: Any = self.prompt
        if isinstance(given, str) or not given or isinstance(given[0], int):
            return [("prompt", given)]
        return [(f"prompt.{at}", prompt) for at, prompt in enumerate(given)]


class ChatRequest(Generation, Conversation, Talk):
    """`POST /v1/chat/completions`."""

    max_tokens: _AtLeastOne = None
    max_completion_tokens: _AtLeastOne = None
    """Before `max_tokens`. Neither: as many as there is room for."""
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    echo: bool | None = False
    add_special_tokens: bool | None = False
    include_reasoning: bool | None = True

    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    chat_template: Any = None
    documents: Any = None
    thinking_token_budget: Any = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise Wrong(f"needs logprobs to be true, got {self.top_logprobs} without", "top_logprobs")
        for name in ("echo", "add_special_tokens"):
            if getattr(self, name):
                raise Wrong("only false is served for conversations, got true", name)
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        self.check_min_tokens(limit, self.most_tokens)
        return self

    def names(self) -> dict[str, Any]:
        own = {"reasoning_effort": self.reasoning_effort, "verbosity": self.verbosity}
        return {name: value for name, value in own.items() if value is not None} | super().names()

    def text_fields(self) -> list[str]:
        return ["messages"]

    @property
    def tells_thoughts(self) -> bool:
        return self.include_reasoning is not False

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Body):
    """`POST /tokenize`: a text, or a conversation."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    prompt: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = True
    """Of a text; a conversation has those of the chat template."""
    return_token_strs: bool | None = False
    tools: Tools = Field(default_factory=list)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise Wrong("give prompt or messages, one of them")
        return self

    def unread(self) -> Iterator[str]:
        yield from super().unread()
        yield from unread_tools(self.tools)

    def text_fields(self) -> list[str]:
        """Names of what only a tokenizer can read."""
        return ["messages" if self.prompt is None else "prompt"]

    def dialogue(self) -> Dialogue | None:
        """None: it is a text."""
        if self.messages is None:
            return None
        return Dialogue(
            turns=self.messages,
            toolbox=Toolbox(self.tools),
            names=self.chat_template_kwargs or {},
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final=self.continue_final_message is True,
        )


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    tokens: Tokens
