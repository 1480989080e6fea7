"""Schemas read as clients mean them."""

import json
import re
from datetime import datetime
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher
from pydantic import AnyUrl, Base64Bytes, BaseModel, DirectoryPath, SecretStr

from gmanager.text.grammars import compile_grammar
from gmanager.text.json_schema import FORMATS, closed, enforceable
from gmanager.wire.messages import StructuredOutputsParams, TextAssets
from tests.support.tiny import make_tokenizer

A: Any = {"properties": {"a": {"type": "integer"}}}
CLOSED: Any = A | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "want"),
    [
        (A, CLOSED),
        ({"items": A, "$defs": {"x": A}}, {"items": CLOSED, "$defs": {"x": CLOSED}}),
        ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"properties": {"b": A, "allOf": A}}, {"properties": {"b": CLOSED, "allOf": CLOSED}, "additionalProperties": False}),
        ({"properties": {"properties": A}}, {"properties": {"properties": CLOSED}, "additionalProperties": False}),
        ({"additionalProperties": A}, {"additionalProperties": CLOSED}),
        ({"type": "object"}, {"type": "object"}),
        (True, True),
        ([], []),
    ],
)
def test_what_is_closed(schema: Any, want: Any) -> None:
    assert closed(schema) == want


@pytest.mark.parametrize(
    "schema",
    [
        A | {"additionalProperties": True},
        A | {"patternProperties": {"b": True}},
        A | {"required": ["b"]},
        A | {"required": "a"},
        A | {"minProperties": 2},
        A | {"anyOf": [{"properties": {"b": True}}, {"required": ["c"]}]},
        {"allOf": [A, {"properties": {"b": True}}]},
        {"$ref": "#/$defs/x", "properties": {"b": True}, "$defs": {"x": A}},
        {"properties": {"c": {"if": A, "then": {"required": ["b"]}}}},
    ],
)
def test_what_stays_open(schema: Any) -> None:
    assert closed(schema) == schema


@pytest.mark.parametrize(
    ("schema", "want"),
    [
        ({"type": "string", "format": "path"}, {"type": "string"}),
        ({"items": {"format": "binary"}, "uniqueItems": True}, {"items": {}}),
        ({"anyOf": [{"format": "byte"}, True]}, {"anyOf": [{}, True]}),
        ({"$defs": {"format": {"format": "regex"}}}, {"$defs": {"format": {}}}),
        ({"properties": {"format": {"const": {"format": "x"}}}}, {"properties": {"format": {"const": {"format": "x"}}}}),
        ({"format": 5, "uniqueItems": "x"}, {"format": 5, "uniqueItems": "x"}),
        ({"format": "date"}, {"format": "date"}),
    ],
)
def test_what_no_text_is_held_to_is_left_out(schema: Any, want: Any) -> None:
    assert enforceable(schema) == want


class Written(BaseModel):
    """What pydantic writes a format or a keyword of its own for."""

    file: Path
    folder: DirectoryPath
    secret: SecretStr
    data: bytes
    coded: Base64Bytes
    pattern: re.Pattern[str]
    tags: set[str]
    sizes: frozenset[int]
    network: IPv4Network
    when: datetime
    link: AnyUrl


def test_schemas_that_pydantic_writes_are_taken() -> None:
    assets = TextAssets(
        tokenizer_json=make_tokenizer().backend_tokenizer.to_str(), chat_template=None, special_tokens={}, eos_token_ids=[1]
    )
    compile_grammar(StructuredOutputsParams(json=json.dumps(Written.model_json_schema())), assets)


def test_the_formats_are_those_that_llguidance_holds_strings_to() -> None:
    asked = FORMATS | {"path", "password", "binary", "byte", "regex", "uri-reference", "json-pointer", "idn-email", "iri"}
    grammars = {form: LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "format": form})) for form in asked}
    assert {form for form, grammar in grammars.items() if not LLMatcher.validate_grammar(grammar)} == FORMATS


NAMES = st.sampled_from("abc")
SCHEMAS = st.recursive(
    st.sampled_from([{"type": "integer"}, {"type": "object"}, True, {"$ref": "#/$defs/x"}]),
    lambda inner: st.one_of(
        st.fixed_dictionaries(
            {"properties": st.dictionaries(NAMES, inner, max_size=2)},
            optional={
                "required": st.lists(NAMES, max_size=2, unique=True),
                "additionalProperties": inner,
                "minProperties": st.integers(0, 3),
                "anyOf": st.lists(inner, min_size=1, max_size=2),
            },
        ),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"allOf": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"items": inner}),
    ),
    max_leaves=6,
)
VALUES = st.recursive(
    st.integers(0, 1) | st.none(), lambda v: st.lists(v, max_size=2) | st.dictionaries(NAMES, v, max_size=3), max_leaves=6
)


@given(schema=SCHEMAS, definition=SCHEMAS, value=VALUES)
def test_every_value_of_the_closed_schema_is_one_of_the_schema(schema: Any, definition: Any, value: Any) -> None:
    whole = {"anyOf": [schema], "$defs": {"x": definition}}
    try:
        narrow = jsonschema_rs.validator_for(closed(whole))
        wide = jsonschema_rs.validator_for(whole)
    except ValueError:
        return  # a definition that is only itself
    if narrow.is_valid(value):
        assert wide.is_valid(value)
