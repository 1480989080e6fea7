"""Schemas read as clients mean them."""

from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmanager.text.json_schema import closed

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
