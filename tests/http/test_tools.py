"""Tool calls and thoughts in generated text: what is found, in whatever pieces the text comes, and that nothing is lost."""

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count, pairwise
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmanager.gateway.reasoning import CLOSE, OPEN, ReasoningSplitter, Split, is_opened
from gmanager.gateway.reply import Reply
from gmanager.gateway.tools import (
    ArgumentsDelta,
    CallBegins,
    CallEnds,
    ContentDelta,
    Event,
    Format,
    ToolCall,
    ToolParser,
    detect_format,
    new_call_id,
)

FORMATS: tuple[Format, ...] = get_args(Format)


def ids() -> Callable[[], str]:
    numbers = count()
    return lambda: f"id{next(numbers)}"


def cut(text: str, cuts: Sequence[int]) -> list[str]:
    edges = [0, *sorted(min(at, len(text)) for at in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def events_of(form: Format, parts: Sequence[str], function: str | None = None) -> list[Event]:
    parser = ToolParser(form, ids(), function=function)
    *before, last = parts or [""]
    return [event for part in before for event in parser.push(part)] + parser.push(last, final=True)


def collect(events: Iterable[Event]) -> tuple[str, list[ToolCall]]:
    reply = Reply()
    for event in events:
        reply.add(event)
    return reply.content, reply.calls


def parsed(form: Format, text: str, function: str | None = None) -> tuple[str, list[tuple[str, str]]]:
    """Content, and each call's name and arguments; all of them complete."""
    content, calls = collect(events_of(form, [text], function))
    assert all(call.is_complete for call in calls)
    return content, [(call.name, call.arguments) for call in calls]


F = [("f", '{"a": [1, "}"]}')]


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        ("hermes", 'Hi.\n<tool_call>\n{"name": "f", "arguments": {"a": [1, "}"]}}\n</tool_call>', "Hi.", F),
        ("hermes", '<tool_call>{"arguments": {"a": [1, "}"]}, "name": "f"}</tool_call>\n', "", F),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name":"g","arguments":{}}</tool_call>', "", 2),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1, "}"]}} then', " then", F),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1, "}"]}, oops</tool_call>', ", oops</tool_call>", F),
        ("hermes", '<<tool_call>{"name": "f", "arguments": {"a": [1, "}"]}}</tool_call>', "<", F),
        ("hermes", '<tool_call>no<tool_call>{"name": "f", "arguments": {"a": [1, "}"]}}</tool_call>', "<tool_call>no", F),
        ("hermes", '<tool_call>{"name": "f", "arguments": "x"}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "f", "arg', None, []),
        ("llama3", '{"name": "f", "parameters": {"a": [1, "}"]}}', "", F),
        ("llama3", ' <|python_tag|>{"type": "function", "name": "f", "parameters": {"a": [1, "}"]}}\n', "", F),
        ("llama3", '{"name": "f", "parameters": {}}; {"name":"g","parameters":{}}', "", 2),
        ("llama3", '{"name": "f", "parameters": {"a": [1, "}"]}} is it; no', " is it; no", F),
        ("llama3", '{"name": "f", "parameters": {"a": [1, "}"]}}; {x', "; {x", F),
        ("llama3", '{"name": "Bob", "age": 3}', None, []),
        ("llama3", "<|python_tag|>print(1)", None, []),
        ("llama3", 'Sure: {"name": "f", "parameters": {}}', None, []),
        ("mistral", 'Ok[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1, "}"]}}]', "Ok", F),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "x"} , {"name":"g","arguments":{}}]', "", 2),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": [1, "}"]}', "", F),
        ("mistral", '[TOOL_CALLS]f{"a": [1, "}"]}', "", F),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]abc123[ARGS]{"a": [1, "}"]}', "", F),
        ("mistral", "[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}", "", 2),
        ("mistral", "[TOOL_CALLS]f[ARG]{}", None, []),
        ("mistral", "[TOOL_CALLS] I can't", None, []),
        ("json", '[{"name": "f", "parameters": {"a": [1, "}"]}}]', "", F),
        ("json", ' {"name": "f", "arguments": {"a": [1, "}"]}} ', "", F),
        ("json", '[{"name": "f"}]', None, []),
        ("json", "[1]", None, []),
    ],
)
def test_what_is_found(form: Format, text: str, content: str | None, calls: Any) -> None:
    """`content` None: all of it."""
    found, made = parsed(form, text)
    assert found == (text if content is None else content)
    assert [name for name, _ in made] == ["f", "g"] if calls == 2 else made == calls


def test_a_named_functions_arguments() -> None:
    assert parsed("json", ' {"a": 1}\n', "f") == ("", [("f", '{"a": 1}')])
    assert parsed("json", "sorry", "f") == ("sorry", [])
    with pytest.raises(ValueError, match="as json"):
        ToolParser("hermes", function="f")


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolParser("hermes", ids())
    assert parser.push("Let me <tool") == [ContentDelta("Let me")]
    assert parser.push('_call>{"name": "f", "arguments": ') == []
    assert parser.push('{"a"') == [CallBegins(0, "id0", "f"), ArgumentsDelta(0, '{"a"')]
    assert parser.push(':  "\\"}') == [ArgumentsDelta(0, ':  "\\"}')]
    assert parser.push('"}') == [ArgumentsDelta(0, '"}')]
    assert parser.push("}") == [CallEnds(0, is_complete=True)]
    assert parser.push("</tool_call>\n", final=True) == []


def test_a_text_that_ends_within_arguments() -> None:
    for form, text in {"hermes": '<tool_call>{"name":"f","arguments":{"a": ', "mistral": '[TOOL_CALLS]f[ARGS]{"a": '}.items():
        assert collect(events_of(form, [text])) == ("", [ToolCall("id0", "f", '{"a": ', is_complete=False)])  # type: ignore[arg-type]


BITS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "f",
        "<",
        "[",
        "]",
        "{",
        "}",
        ";",
    ),
    *(",", ":", '"', "\\", " ", "\n", '"name"', '"arguments"', '"parameters"', '"name": "f", ', '"arguments": {', "12"),
    *('{"name": "f", "arguments": {"x": "<tool_call>"}}', '{"name": "g", "parameters": {}}', '"\\ud800"', "é"),
]
texts = st.lists(st.sampled_from(BITS) | st.text(max_size=3), max_size=14).map("".join)
cuts = st.lists(st.integers(0, 200), max_size=12)


@settings(max_examples=1500)
@given(st.sampled_from(FORMATS), texts, cuts, st.sampled_from([None, "f"]))
def test_any_pieces(form: Format, text: str, where: list[int], function: str | None) -> None:
    function = function if form == "json" else None
    whole = events_of(form, [text], function)
    content, calls = collect(whole)
    for parts in (cut(text, where), list(text)):
        assert collect(events_of(form, parts, function)) == (content, calls)
    if not calls:
        assert content == text
    # Every call begins and ends once, in order, and no two deltas of a kind follow each other.
    order = [event.index for event in whole if isinstance(event, CallBegins | CallEnds)]
    assert order == [i for i in range(len(calls)) for _ in range(2)]
    assert all(type(a) is not type(b) or isinstance(a, CallBegins) for a, b in pairwise(whole))
    # Content and arguments stand in the text in the order in which they come.
    at = 0
    for event in whole:
        made_up = isinstance(event, ArgumentsDelta) and event.text == "{}"
        if isinstance(event, ContentDelta | ArgumentsDelta) and not made_up and '"arguments"' not in text:
            at = text.index(event.text, at) + len(event.text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=6
)
some_calls = st.lists(
    st.tuples(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.dictionaries(st.text(), json_values, max_size=3)),
    min_size=1,
    max_size=3,
)


def written(form: Format, calls: list[tuple[str, dict[str, Any]]]) -> str:
    key = "arguments" if form in ("hermes", "mistral") else "parameters"
    made = [json.dumps({"name": name, key: arguments}, ensure_ascii=False) for name, arguments in calls]
    if form == "hermes":
        return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in made)
    if form == "llama3":
        return "; ".join(made)
    return ("[TOOL_CALLS]" if form == "mistral" else "") + "[" + ", ".join(made) + "]"


@settings(max_examples=300)
@given(st.sampled_from(FORMATS), some_calls, cuts)
def test_calls_come_back(form: Format, calls: list[tuple[str, dict[str, Any]]], where: list[int]) -> None:
    content, found = collect(events_of(form, cut(written(form, calls), where)))
    assert content == ""
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls


@pytest.mark.parametrize(
    ("form", "bit"),
    [
        ("hermes", "<tool_call>"),
        ("hermes", '<tool_call>{"a":['),
        ("mistral", "[TOOL_CALLS]["),
        ("llama3", '{"name":'),
        ("hermes", " "),
        ("json", "["),
        ("hermes", '<tool_call>{"name":"f"}'),
    ],
)
def test_cost_is_linear(form: Format, bit: str) -> None:
    text = bit * (300_000 // len(bit))
    start = time.perf_counter()
    events_of(form, [text])
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, None),
        ("{{ messages }}", None),
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}<tool_call><function={% endif %}", None),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral"),
        ("{% if tools %}<|python_tag|>{% endif %}", "llama3"),
    ],
)
def test_formats_of_templates(template: str | None, form: str | None) -> None:
    assert detect_format(template) == form


def test_ids() -> None:
    assert re.fullmatch(r"call_[0-9a-f]{24}", new_call_id())
    assert new_call_id() != new_call_id()


# --- thoughts


def split(parts: Sequence[str], *, opened: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened=opened)
    pieces = [splitter.push(part) for part in parts] + [splitter.push("", final=True)]
    return "".join(piece.reasoning for piece in pieces), "".join(piece.content for piece in pieces)


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>hm</think>yes", False, "hm", "yes"),
        ("\n<think>\nhm\n</think>\n\nyes </think>", False, "\n\nhm\n", "\n\nyes </think>"),
        ("hm</think>yes", True, "hm", "yes"),
        ("<think>hm</think>yes", True, "hm", "yes"),
        ("hm</thin", True, "hm</thin", ""),
        ("yes <think>no</think>", False, "", "yes <think>no</think>"),
        ("<thin", False, "", "<thin"),
        (" <thin", True, " <thin", ""),
        ("", True, "", ""),
    ],
)
def test_thoughts(text: str, opened: bool, reasoning: str, content: str) -> None:
    assert split([text], opened=opened) == split(list(text), opened=opened) == (reasoning, content)


think_texts = st.lists(st.sampled_from([OPEN, CLOSE, "<", "</", "think>", " ", "\n", "a"]), max_size=8).map("".join)


@settings(max_examples=800)
@given(think_texts, cuts, st.booleans())
def test_thoughts_in_any_pieces(text: str, where: list[int], opened: bool) -> None:
    reasoning, content = split([text], opened=opened)
    assert split(cut(text, where), opened=opened) == split(list(text), opened=opened) == (reasoning, content)
    # Nothing but the two tags is left out.
    tags = [(a, b) for a in ("", OPEN) for b in ("", CLOSE)]
    space = reasoning[: len(reasoning) - len(reasoning.lstrip())]
    assert any(text == space[:n] + a + reasoning[n:] + b + content for a, b in tags for n in range(len(space) + 1))


def test_thoughts_are_given_out_at_once() -> None:
    splitter = ReasoningSplitter()
    assert splitter.push("<thi") == Split()
    assert splitter.push("nk>so </") == Split("so ")
    assert splitter.push("b></think>x</") == Split("</b>", "x</")


def test_prompts_that_open_thoughts() -> None:
    assert is_opened("<|im_start|>assistant\n<think>\n")
    assert not is_opened("<think>\n\n</think>\n\n")
