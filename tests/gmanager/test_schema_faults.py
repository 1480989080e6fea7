"""Where a schema is wrong."""

import json
from typing import Any

import pytest

from gmanager.text.grammars import compile_grammar
from gmanager.text.schema_faults import MAX_TRIALS, find_fault
from gmanager.wire.errors import StructureError
from gmanager.wire.messages import StructuredOutputsParams, TextAssets
from tests.support.tiny import make_tokenizer

ASSETS = TextAssets(
    tokenizer_json=make_tokenizer().backend_tokenizer.to_str(), chat_template=None, special_tokens={}, eos_token_ids=[1]
)


def within(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


WRONG = {"type": "strin"}
SHORT = {"type": "string", "minLength": 5, "maxLength": 2}
"""Nothing is so: no fault where it may be left out."""


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        (WRONG, ["type"]),
        (within(a=WRONG), ["properties", "a", "type"]),
        (within(ok={"type": "string"}, a={"type": "array", "items": WRONG}), ["properties", "a", "items", "type"]),
        (within(a=5), ["properties", "a"]),
        (within(a=within(b={"not": {}})), ["properties", "a", "properties", "b", "not"]),
        (within(a={"not": {}, "if": {}}), ["properties", "a"]),
        ({"prefixItems": [{"type": "string"}, WRONG]}, ["prefixItems", 1, "type"]),
        ({"type": "object", "additionalProperties": WRONG}, ["additionalProperties", "type"]),
        ({"type": "object", "patternProperties": {"a.b": WRONG}}, ["patternProperties", "a.b", "type"]),
        ({"anyOf": [{"type": "null"}, {"type": "string", "pattern": "a("}]}, ["anyOf", 1, "pattern"]),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, ["allOf"]),
        (within(a={"enum": []}) | {"required": ["a"]}, ["properties", "a", "enum"]),
        (within(b=SHORT, a=WRONG), ["properties", "a", "type"]),
        (within(b=SHORT, a=SHORT) | {"required": ["a"]}, ["properties", "a"]),
        (within(a={"$ref": "#/$defs/x"}) | {"$defs": {"y": WRONG, "x": {"format": "x"} | WRONG}}, ["$defs", "x", "type"]),
        (within(a={"$ref": "#/properties/b"}, b=WRONG), ["properties", "b", "type"]),
        (within(a={"$ref": "#/definitions/a~1%20b"}) | {"definitions": {"a/ b": WRONG}}, ["definitions", "a/ b", "type"]),
        (within(a={"$ref": "#/$defs/none"}), ["properties", "a", "$ref"]),
        (within(a={"$ref": "#"}, b=WRONG), ["properties", "b", "type"]),
        ({"$id": "http://a.b/c", "$ref": "#/$defs/x", "$defs": {"x": WRONG}}, ["$defs", "x", "type"]),
        (
            {"$ref": "#/$defs/n", "$defs": {"n": within(next={"$ref": "#/$defs/n"}, value=WRONG)}},
            ["$defs", "n", "properties", "value", "type"],
        ),
    ],
    ids=str,
)
def test_the_place_of_what_is_wrong(schema: dict[str, Any], place: list[str | int]) -> None:
    with pytest.raises(StructureError) as raised:
        compile_grammar(StructuredOutputsParams(json=json.dumps(schema)), ASSETS)
    assert list(raised.value.place) == place
    pointer = "#" + "".join(f"/{str(key).replace('/', '~1')}" for key in place)
    assert str(raised.value).startswith(f"json at {pointer}: ")


def test_it_is_looked_for_only_so_long() -> None:
    tried: list[str] = []

    def refuse(schema: str) -> str | None:
        tried.append(schema)
        return "wrong" if "strin" in schema else None

    many = within(**{f"p{i}": {"type": "null"} for i in range(2 * MAX_TRIALS)}, last=WRONG)
    fault = find_fault(json.dumps(many), "wrong", refuse)
    assert fault is not None
    assert fault.place == ()
    assert len(tried) == MAX_TRIALS
    tried.clear()
    huge = {"description": "x" * 2**20} | within(
        **{f"p{i}": {"$ref": "#/$defs/x", "title": "t"} for i in range(100)}, last=WRONG
    )
    find_fault(json.dumps(huge), "wrong", refuse)
    assert len(tried) < 10


@pytest.mark.parametrize("schema", ["[" * 5000 + "]" * 5000, '{"a": ' * 5000 + "1" + "}" * 5000, '{"\\ud800": 1}', "7"])
def test_schemas_that_are_none(schema: str) -> None:
    assert find_fault(schema, "wrong", lambda _: "wrong") is None or schema.startswith('{"\\u')


def test_loops() -> None:
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    fault = find_fault(json.dumps(loop), "wrong", lambda _: "wrong")
    assert fault is not None
