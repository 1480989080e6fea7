"""What a model writes, told apart: thoughts, calls of tools, and what it says."""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from gmanager.gateway.habits import Habits
from gmanager.gateway.reasoning import CLOSE, OPEN, ReasoningSplitter
from gmanager.gateway.structure import Structure
from gmanager.gateway.toolbox import TEXT_FORMAT, Toolbox
from gmanager.gateway.tools import (
    ArgumentsDelta,
    CallBegins,
    CallEnds,
    ContentDelta,
    Event,
    Format,
    ToolCall,
    ToolParser,
)
from gmanager.wire.messages import StructuredOutputsParams

TAGS = (OPEN, CLOSE, "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
"""What thoughts and calls are told by. They may be special tokens."""


@dataclass(frozen=True, slots=True)
class ThoughtDelta:
    """More of what the model thinks."""

    text: str


Said = ThoughtDelta | Event


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """What is looked for in an answer. By default nothing: all of it is content."""

    thinks: bool = False
    is_opened: bool = False
    """It begins within thoughts."""
    tells_thoughts: bool = True
    calls: Format | None = None
    function: str | None = None
    """The whole text is the arguments of this one."""
    is_parallel: bool = True
    """Of several calls, all are told; else the first."""

    @property
    def is_plain(self) -> bool:
        return not self.thinks and self.calls is None

    def structured(self, params: StructuredOutputsParams) -> StructuredOutputsParams:
        """What the whole text must be, where this is what its answer must be."""
        thoughts: Literal["begun", "possible"] = "begun" if self.is_opened else "possible"
        return msgspec.structs.replace(params, thoughts=thoughts) if self.thinks else params


def reply_form(
    habits: Habits, toolbox: Toolbox, asked: Structure | None, *, is_opened: bool, tells_thoughts: bool = True
) -> ReplyForm:
    """How a model's answers are read. `asked`: the structure that the request says, of an answer that calls nothing."""
    calls: Format | None = None
    if toolbox.must_call or (toolbox.usable and asked is not None and asked.params.json is not None):
        calls = "json"
    elif toolbox.usable and asked is None:
        calls = habits.calls or TEXT_FORMAT
    return ReplyForm(
        thinks=habits.thinks,
        is_opened=is_opened,
        tells_thoughts=tells_thoughts,
        calls=calls,
        function=toolbox.named,
        is_parallel=toolbox.is_parallel,
    )


@dataclass(slots=True)
class Reply:
    """A whole answer."""

    content: str = ""
    thoughts: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, event: Said) -> None:
        match event:
            case ThoughtDelta(text):
                self.thoughts += text
            case ContentDelta(text):
                self.content += text
            case CallBegins(_, call_id, name):
                self.calls.append(ToolCall(call_id, name))
            case ArgumentsDelta(index, text):
                self.calls[index].arguments += text
            case CallEnds(index, is_complete):
                self.calls[index].is_complete = is_complete


class ReplyReader:
    """One answer, in pieces. However it is cut, what is found is the same."""

    def __init__(self, form: ReplyForm) -> None:
        self._form = form
        self._thoughts = ReasoningSplitter(opened=form.is_opened) if form.thinks else None
        self._tools = None if form.calls is None else ToolParser(form.calls, function=form.function)
        self._awaits_thought = self._awaits_answer = True
        self.num_calls = 0

    def push(self, text: str, *, final: bool) -> list[Said]:
        """What a piece of text adds; `final`: no more will come."""
        said: list[Said] = []
        if self._thoughts is not None:
            thought, text = self._trimmed(self._thoughts, text, final=final)
            if thought and self._form.tells_thoughts:
                said.append(ThoughtDelta(thought))
        if self._tools is None:
            return [*said, ContentDelta(text)] if text else said
        for event in self._tools.push(text, final=final):
            if isinstance(event, CallBegins):
                self.num_calls += 1
            if isinstance(event, ContentDelta) or self._form.is_parallel or event.index == 0:
                said.append(event)
        return said

    def _trimmed(self, splitter: ReasoningSplitter, text: str, *, final: bool) -> tuple[str, str]:
        """What comes to thoughts and to the answer, both without the white space that they begin with; an answer without
        thoughts is as it came."""
        split = splitter.push(text, final=final)
        thought, answer = split.reasoning, split.content
        if self._awaits_thought:
            thought = thought.lstrip()
            self._awaits_thought = not thought
        if self._awaits_answer and answer and splitter.has_begun:
            answer = answer.lstrip()
        self._awaits_answer = self._awaits_answer and not answer
        return thought, answer


def read(form: ReplyForm, text: str) -> Reply:
    """A whole answer's text."""
    reply = Reply()
    for event in ReplyReader(form).push(text, final=True):
        reply.add(event)
    return reply
