"""What a text must be: which texts the compiled grammars take."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from gmanager.text.grammars import compile_grammar
from gmanager.wire.errors import TextError
from gmanager.wire.messages import StructuredOutputsParams, TextAssets
from tests.support.tiny import make_tokenizer

SCHEMA = {"properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": [1]}}}, "required": ["a", "b"]}


def assets_with(*tags: AddedToken) -> TextAssets:
    backend = make_tokenizer().backend_tokenizer
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens(list(tags))
    return TextAssets(
        tokenizer_json=backend.to_str(), chat_template=None, special_tokens={}, eos_token_ids=[backend.token_to_id("<|end|>")]
    )


def takes(assets: TextAssets, text: str, **structured: Any) -> bool:
    grammar = compile_grammar(StructuredOutputsParams(**structured), assets)
    tokenizer = LLTokenizer(assets.tokenizer_json, n_vocab=300, eos_token=assets.eos_token_ids)
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    backend = make_tokenizer().backend_tokenizer.from_str(assets.tokenizer_json)
    ids = backend.encode(text, add_special_tokens=False).ids
    return all(matcher.consume_token(token) for token in ids) and matcher.is_accepting()


PLAIN = assets_with()


def test_json_is_written_as_json_dumps_does() -> None:
    value = {"a": 7, "b": [1, 1]}
    assert takes(PLAIN, json.dumps(value), json=json.dumps(SCHEMA))
    assert not takes(PLAIN, json.dumps(value, separators=(",", ":")), json=json.dumps(SCHEMA))
    assert not takes(PLAIN, json.dumps(value | {"c": 1}), json=json.dumps(SCHEMA)), "it names no other property"
    opened = json.dumps(SCHEMA | {"additionalProperties": True})
    assert takes(PLAIN, json.dumps(value | {"c": 1}), json=opened)


def test_what_cannot_be_read_is_refused() -> None:
    for schema in ("{", "[" * 100_000, '{"type": "objec"}'):
        with pytest.raises(TextError):
            compile_grammar(StructuredOutputsParams(json=schema), PLAIN)


@pytest.mark.parametrize(
    "assets",
    [
        PLAIN,
        assets_with(AddedToken("<think>", special=False), AddedToken("</think>", special=False)),
        assets_with(AddedToken("<think>", special=True), AddedToken("</think>", special=True)),
    ],
    ids=["text", "tokens", "special tokens"],
)
@pytest.mark.parametrize(
    ("structured", "answer", "other"),
    [
        ({"json": json.dumps(SCHEMA)}, '{"a": 1, "b": []}', '{"a": 1}'),
        ({"regex": "[0-9]{2}"}, "12", "123"),
        ({"choice": ["left", "right"]}, "left", "lef"),
        ({"grammar": 'start: "x" /[0-9]/'}, "x1", "y1"),
    ],
)
def test_thoughts_before_an_answer(assets: TextAssets, structured: dict[str, Any], answer: str, other: str) -> None:
    thought = f'hm {other} <b> {{"\n\n'
    for said in (answer, other):
        is_answer = said == answer
        assert takes(assets, said, **structured) == is_answer
        assert takes(assets, said, thoughts="possible", **structured) == is_answer
        assert takes(assets, f"<think>{thought}</think>\n\n{said}", thoughts="possible", **structured) == is_answer
        assert takes(assets, f"{thought}</think>{said}", thoughts="begun", **structured) == is_answer
        assert not takes(assets, f"<think>{thought}</think>{said}", **structured)
    assert not takes(assets, f"{thought}{answer}", thoughts="begun", **structured)
