"""What a text must be, as a grammar of llguidance: compiled and checked here, matched where tokens are chosen."""

import functools
import json
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLTokenizer, grammar_from

from gmanager.text.json_schema import closed, enforceable
from gmanager.text.schema_faults import find_fault
from gmanager.wire.errors import NO_TOKENIZER, StructureError, TextError
from gmanager.wire.messages import StructuredOutputsParams, TextAssets

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_AS_DUMPED: "JsonCompileOptions" = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
"""One form of white space, that of `json.dumps`: where any is allowed a small model may write nothing else for ever."""
_OPEN, _CLOSE = "<think>", "</think>"


@functools.lru_cache(maxsize=8)
def _unusable(tokenizer_json: str, eos_token_ids: tuple[int, ...]) -> str | None:
    """Why the instances, which make the same of it, can't match this model's tokens; None if they can."""
    try:
        LLTokenizer(tokenizer_json, eos_token=list(eos_token_ids))
    except ValueError as error:
        return str(error)
    return None


def compile_grammar(structured: StructuredOutputsParams, assets: TextAssets) -> str:
    """The grammar, in llguidance's own form. Raises TextError that says what is wrong, and where."""
    if assets.tokenizer_json is None:
        raise TextError(NO_TOKENIZER)
    if not assets.eos_token_ids:
        raise TextError("structured output needs a model that can end a text: this one has no end token")
    if (reason := _unusable(assets.tokenizer_json, tuple(assets.eos_token_ids))) is not None:
        raise TextError(f"structured output needs a tokenizer that llguidance can read: {reason}")
    schema: Any = None
    try:
        if structured.json is not None:
            what, schema = "json", enforceable(json.loads(structured.json))
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(closed(schema)), overrides=_AS_DUMPED)
        elif structured.regex is not None:
            what, grammar = "regex", LLMatcher.grammar_from_regex(structured.regex)
        elif structured.choice is not None:
            what, grammar = "choice", grammar_from("choice", json.dumps(structured.choice))
        else:
            what, grammar = "grammar", grammar_from("grammar", structured.grammar or "")
    except (ValueError, RecursionError) as error:
        raise TextError(f"the structure asked for can't be read: {error}") from error
    wrong = _refusal(grammar)
    if wrong is None:
        if structured.thoughts is None:
            return grammar
        return _after_thoughts(grammar, assets.tokenizer_json, are_begun=structured.thoughts == "begun")
    fault = None if structured.json is None else find_fault(json.dumps(schema), wrong, _schema_refusal)
    if fault is None or not fault.place:
        raise StructureError(what, wrong)
    raise StructureError(f"{what} at {fault.pointer}", fault.reason, *fault.place)


def _refusal(grammar: str) -> str | None:
    wrong = LLMatcher.validate_grammar(grammar).strip()
    return None if not wrong or wrong.startswith("WARNING") else wrong


def _schema_refusal(schema: str) -> str | None:
    return _refusal(LLMatcher.grammar_from_json_schema(schema, overrides=_AS_DUMPED))


def _after_thoughts(grammar: str, tokenizer_json: str, *, are_begun: bool) -> str:
    """The grammar of a text that begins with thoughts (`are_begun`: within them), or may."""
    opening, closing = (_tags(tokenizer_json).get(tag) for tag in (_OPEN, _CLOSE))
    if closing is None:
        thoughts, lines = "thoughts", [r"thoughts[lazy]: /(.|\n)*<\/think>/"]
    else:
        thoughts, lines = rf"/(.|\n)*/ <[{closing}]>", []
    begin = json.dumps(_OPEN) if opening is None else f"<[{opening}]>"
    before = rf"{thoughts} /[ \n]*/" if are_begun else rf"({begin} {thoughts} /[ \n]*/)?"
    parts = json.loads(grammar)["grammars"] if grammar.lstrip().startswith("{") else [{"lark_grammar": grammar}]
    whole = {"lark_grammar": "\n".join([f"start: {before} @answer", *lines])}
    return json.dumps({"grammars": [whole, parts[0] | {"name": "answer"}, *parts[1:]]})


@functools.lru_cache(maxsize=8)
def _tags(tokenizer_json: str) -> dict[str, int]:
    """Those of the thoughts' tags that are tokens of their own."""
    added = json.loads(tokenizer_json).get("added_tokens") or ()
    return {token["content"]: token["id"] for token in added if token["content"] in (_OPEN, _CLOSE)}
