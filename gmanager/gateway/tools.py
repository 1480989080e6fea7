"""Tool calls in what a model writes, as it writes them. Pure.

    hermes    text <tool_call>{"name": "f", "arguments": {...}}</tool_call> ..               Hermes, Qwen
    llama3    {"name": "f", "parameters": {...}}; ..      <|python_tag|> may come before it
    mistral   text [TOOL_CALLS][{"name": "f", "arguments": {...}}, ..]
              text [TOOL_CALLS]f[ARGS]{...}[TOOL_CALLS] ..
    json      [{"name": "f", "parameters": {...}}, ..]    forced; of one function that the client has named: its arguments

What is none of that is content: no text is lost, but for white space around calls. Tags are special tokens to some
tokenizers; the text must have been made with them (`skip_special_tokens=False`).

A parser is a generator that takes one character at a time, so what it finds can't depend on how the text was cut.
"""

import json
import secrets
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal

Format = Literal["hermes", "llama3", "mistral", "json"]


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments, as the model wrote them."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    index: int
    is_complete: bool
    """False: the text ended within the arguments."""


Event = ContentDelta | CallBegins | ArgumentsDelta | CallEnds


@dataclass(slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str = ""
    is_complete: bool = False


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def detect_format(chat_template: str | None) -> Format | None:
    """How a model with this template calls tools; None: not, or in a way that isn't known here."""
    template = chat_template or ""
    if "tools" not in template or "<function=" in template or "<arg_key>" in template:
        return None
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or '"parameters": dictionary' in template:
        return "llama3"
    return None


_Parser = Generator[None, str, None]
_Step = Generator[None, str, str]
"""Takes characters, "" at the text's end, and returns what it found."""
_SPACE = " \t\r\n"
_END = ""


class _NotACall(Exception):
    """What was read since `_begin` is no call."""


class ToolParser:
    """Content and tool calls of one answer."""

    def __init__(self, form: Format, make_id: Callable[[], str] = new_call_id, *, function: str | None = None) -> None:
        """`function`, with `json`: the text is the arguments of this one."""
        if function is not None and form != "json":
            raise ValueError(f"a named function's arguments come as json, not as {form}")
        self._make_id = make_id
        self._function = function
        self._events: list[Event] = []
        self._gathered: list[str] = []
        self._gathered_for: int | None = None
        self._num_calls = 0
        self._in_call = False
        """CallBegins is out, CallEnds is not."""
        self._raw: list[str] = []
        """What was read since `_begin`."""
        self._back: str | None = None
        """A character that was read and is to be read again."""
        self._space = ""
        """White space that is content only if content follows it."""
        parsers = {"hermes": self._hermes, "llama3": self._llama3, "mistral": self._mistral, "json": self._json}
        self._parser = parsers[form]()
        next(self._parser)

    def push(self, text: str, *, final: bool = False) -> list[Event]:
        """What a piece of text adds; `final`: no more will come. What may be a call is held back until that is sure."""
        for char in text:
            self._parser.send(char)
        if final:
            try:
                self._parser.send(_END)
            except StopIteration:
                if self._num_calls == 0:
                    self._gather(None, self._space)
        self._flush()
        events, self._events = self._events, []
        return events

    # --- formats: each reads to the text's end

    def _hermes(self) -> _Parser:
        while (yield from self._text_until("<tool_call>")):
            try:
                yield from self._spaces()
                yield from self._call_object(needs_arguments=False)
            except _NotACall:
                self._give_up()
                continue
            self._begin()
            yield from self._spaces()
            if not (yield from self._literal("</tool_call>")):
                self._give_up()

    def _mistral(self) -> _Parser:
        while (yield from self._text_until("[TOOL_CALLS]")):
            try:
                if (yield from self._peek_after_spaces()) == "[":
                    yield from self._call_array(needs_arguments=False)
                else:
                    yield from self._named_call()
            except _NotACall:
                self._give_up()

    def _llama3(self) -> _Parser:
        self._begin()
        try:
            if (yield from self._peek_after_spaces()) == "<" and not (yield from self._literal("<|python_tag|>")):
                raise _NotACall
            separator = ";"
            while separator == ";":
                yield from self._spaces()
                yield from self._call_object(needs_arguments=True)
                self._begin()
                yield from self._spaces()
                separator = yield from self._take()
            self._unread(separator)
        except _NotACall:
            pass
        self._give_up()
        yield from self._rest()

    def _json(self) -> _Parser:
        self._begin()
        try:
            first = yield from self._peek_after_spaces()
            if self._function is not None:
                if first != "{":
                    raise _NotACall
                self._start_call(self._function)
                yield from self._value(streamed=True)
                self._end_call(is_complete=True)
            elif first == "{":
                yield from self._call_object(needs_arguments=True)
            else:
                yield from self._call_array(needs_arguments=True)
        except _NotACall:
            self._give_up()
        yield from self._rest()

    # --- calls: they raise _NotACall where they find something else; what they have read then is in `_raw`

    def _call_array(self, *, needs_arguments: bool) -> _Parser:
        yield from self._expect("[")
        while True:
            yield from self._spaces()
            yield from self._call_object(needs_arguments=needs_arguments)
            self._begin()
            yield from self._spaces()
            if (yield from self._expect(",]")) == "]":
                return

    def _named_call(self) -> _Parser:
        """`name[ARGS]{...}`, with `[CALL_ID]...` between them or without `[ARGS]`."""
        name = ""
        name = yield from self._word()
        label = yield from self._label()
        if label == "[CALL_ID]":
            yield from self._word()
            label = yield from self._label()
        if not name or label == "[CALL_ID]" or (yield from self._peek_after_spaces()) != "{":
            raise _NotACall
        self._start_call(name)
        yield from self._value(streamed=True)
        self._end_call(is_complete=True)

    def _word(self) -> _Step:
        word = ""
        while (char := (yield from self._take())).isalnum() or (char and char in "_-.:/"):
            word += char
        self._unread(char)
        return word

    def _label(self) -> _Step:
        """`[ARGS]`, `[CALL_ID]` or, where no bracket opens, nothing."""
        label = ""
        while label not in ("[ARGS]", "[CALL_ID]"):
            char = yield from self._take()
            if not any(known.startswith(label + char) for known in ("[ARGS]", "[CALL_ID]")) or char == _END:
                self._unread(char)
                if label:
                    raise _NotACall
                break
            label += char
        return label

    def _call_object(self, *, needs_arguments: bool) -> _Parser:
        """`{"name": .., "arguments" or "parameters": {..}}`, in any order, with other fields or without."""
        name: str | None = None
        arguments: str | None = None
        yield from self._expect("{")
        while True:
            yield from self._spaces()
            if (yield from self._expect('"}')) == "}":
                break
            self._unread('"')
            key = _text_of((yield from self._value()))
            yield from self._spaces()
            yield from self._expect(":")
            first = yield from self._peek_after_spaces()
            if key in ("arguments", "parameters") and not self._in_call and arguments is None:
                if first != "{":
                    raise _NotACall
                if name is not None:
                    self._start_call(name)
                arguments = yield from self._value(streamed=name is not None)
            else:
                value = yield from self._value()
                if key == "name" and name is None:
                    name = _text_of(value)
                    if arguments is not None:
                        self._start_call(name)
                        self._arguments(arguments)
            yield from self._spaces()
            if (yield from self._expect(",}")) == "}":
                break
        if not self._in_call:
            if name is None or needs_arguments:
                raise _NotACall
            self._start_call(name)
            self._arguments("{}")
        self._end_call(is_complete=True)

    def _value(self, *, streamed: bool = False) -> _Step:
        """One JSON value, found by its quotes and brackets; `streamed`: it is the open call's arguments."""
        value: list[str] = []
        depth = 0
        in_string = escaped = False
        while True:
            char = yield from self._take()
            if char == _END:
                self._unread(char)
                if not streamed:
                    raise _NotACall
                self._end_call(is_complete=False)
                break
            if not in_string and depth == 0 and (char in ",}]" or (value and char in _SPACE)):
                self._unread(char)  # a number or a name ends before it
                break
            if streamed:
                self._arguments(char)
            else:
                value.append(char)
            if in_string:
                in_string = escaped or char != '"'
                escaped = char == "\\" and not escaped
            else:
                in_string = char == '"'
                depth += (char in "{[") - (char in "}]")
            if depth == 0 and not in_string and char in '"}]':
                break
        if streamed:
            self._begin()
        return "".join(value)

    # --- reading

    def _take(self) -> _Step:
        """The next character, "" at the end."""
        if self._back is not None:
            char, self._back = self._back, None
        else:
            char = yield
        self._raw.append(char)
        return char

    def _unread(self, char: str) -> None:
        self._raw.pop()
        self._back = char

    def _expect(self, chars: str) -> _Step:
        char = yield from self._expect_any()
        if char not in chars:
            self._unread(char)
            raise _NotACall
        return char

    def _expect_any(self) -> _Step:
        char = yield from self._take()
        if char == _END:
            self._unread(char)
            raise _NotACall
        return char

    def _spaces(self) -> _Parser:
        yield from self._peek_after_spaces()

    def _peek_after_spaces(self) -> _Step:
        while (char := (yield from self._take())) and char in _SPACE:
            pass
        self._unread(char)
        return char

    def _literal(self, tag: str) -> Generator[None, str, bool]:
        """Whether `tag` comes next; if not, what of it came is read. No tag begins within itself."""
        for expected in tag:
            if (char := (yield from self._take())) != expected:
                self._unread(char)
                return False
        return True

    def _text_until(self, tag: str) -> Generator[None, str, bool]:
        """Content up to a tag, after which `_raw` begins with the tag; False: there is none."""
        while True:
            self._begin()
            char = yield from self._take()
            if char == _END:
                return False
            if char != tag[0]:
                self._content(char)
                continue
            self._unread(char)
            if (yield from self._literal(tag)):
                return True
            self._content("".join(self._raw))

    def _rest(self) -> _Parser:
        while char := (yield from self._take()):
            self._content(char)

    # --- events

    def _begin(self) -> None:
        self._raw.clear()

    def _give_up(self) -> None:
        """What was read since `_begin` is content, or, in a call that has begun, what is wrong with it comes after it."""
        if self._in_call:
            self._end_call(is_complete=True)
        self._content("".join(self._raw))
        self._begin()

    def _start_call(self, name: str) -> None:
        self._space = ""
        self._put(CallBegins(self._num_calls, self._make_id(), name))
        self._num_calls += 1
        self._in_call = True
        self._begin()

    def _end_call(self, *, is_complete: bool) -> None:
        if self._in_call:
            self._put(CallEnds(self._num_calls - 1, is_complete))
            self._in_call = False

    def _content(self, text: str) -> None:
        body = text.rstrip(_SPACE)
        if body:
            self._gather(None, self._space + body)
            self._space = ""
        self._space += text[len(body) :]

    def _arguments(self, text: str) -> None:
        self._gather(self._num_calls - 1, text)

    def _gather(self, call: int | None, text: str) -> None:
        """More content, or arguments of a call; what comes in a row becomes one event."""
        if call != self._gathered_for:
            self._flush()
            self._gathered_for = call
        self._gathered.append(text)

    def _put(self, event: Event) -> None:
        self._flush()
        self._events.append(event)

    def _flush(self) -> None:
        text = "".join(self._gathered)
        self._gathered.clear()
        if text:
            of = self._gathered_for
            self._events.append(ContentDelta(text) if of is None else ArgumentsDelta(of, text))


def _text_of(value: str) -> str:
    """A JSON string's text; raises _NotACall if it is none."""
    try:
        text = json.loads(value, strict=False)
    except (ValueError, RecursionError):
        raise _NotACall from None
    if not isinstance(text, str) or any("\ud800" <= char <= "\udfff" for char in text):
        raise _NotACall
    return text
