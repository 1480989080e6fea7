"""What a text must be, as a grammar of llguidance: compiled and checked here, matched where tokens are chosen."""

import functools
import json
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLTokenizer, grammar_from

from gmanager.json_schema import closed
from gmanager.wire.errors import TextError
from gmanager.wire.messages import StructuredOutputsParams, TextAssets

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_COMPACT: "JsonCompileOptions" = {"whitespace_flexible": False}
"""One form of white space, that of `json.dumps`: where any is allowed a small model may write nothing else for ever."""


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
    if not assets.eos_token_ids:
        raise TextError("structured output needs a model that can end a text: this one has no end token")
    if (reason := _unusable(assets.tokenizer_json, tuple(assets.eos_token_ids))) is not None:
        raise TextError(f"structured output needs a tokenizer that llguidance can read: {reason}")
    try:
        if structured.json is not None:
            what = "json"
            schema = json.dumps(closed(json.loads(structured.json)))
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_COMPACT)
        elif structured.regex is not None:
            what, grammar = "regex", LLMatcher.grammar_from_regex(structured.regex)
        elif structured.choice is not None:
            what, grammar = "choice", grammar_from("choice", json.dumps(structured.choice))
        else:
            what, grammar = "grammar", grammar_from("grammar", structured.grammar or "")
    except ValueError as error:
        raise TextError(f"the structure asked for can't be read: {error}") from error
    wrong = LLMatcher.validate_grammar(grammar)
    if wrong and not wrong.startswith("WARNING"):
        raise TextError(f"{what}: {wrong.strip()}")
    return grammar
