"""The ways in which clients say what a text must be, as one: OpenAI's `response_format`, vLLM's `structured_outputs` and its
older `guided_*` fields."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gmanager.gateway.fields import Wrong, others, texts
from gmanager.gateway.reading import shown
from gmanager.wire.messages import StructuredOutputsParams

FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
ANY_OBJECT = '{"type": "object"}'
_FORMATS = {"text": ("type",), "json_object": ("type", "schema"), "json_schema": ("type", "json_schema")}
"""Types of `response_format`, and what each has. A schema of `json_object` is llama.cpp's way."""
_NAMED_SCHEMA = ("name", "description", "schema", "strict")
_FORMS = ("json", "json_object", "regex", "choice", "grammar")
_WITHOUT_EFFECT = ("disable_any_whitespace", "disable_fallback", "disable_additional_properties")


@dataclass(frozen=True, slots=True)
class Structure:
    """What a text must be."""

    field: str
    """Where the request says so."""
    params: StructuredOutputsParams


def structure(given: dict[str, Any]) -> Structure | None:
    """Of the values of `FIELDS`; None if nothing is asked for. Raises Wrong with the field's name."""
    found = [*_of_format(given["response_format"]), *_of_structured(given["structured_outputs"])]
    guided = {form: given[f"guided_{form}"] for form in ("json", "regex", "choice", "grammar")}
    found += [(f"guided_{form}", form, value) for form, value in guided.items() if value is not None]
    if not found:
        return None
    place, form, value = found[0]
    if len(found) > 1:
        raise Wrong(f"a text has one structure; {place} asks for another", found[1][0])
    if form == "json":
        value = _schema(value, place)
    elif form == "choice":
        if not isinstance(value, list):
            raise Wrong(f"a list of texts is needed, got {shown(value)}", place)
        try:
            texts(value, "a choice")
        except Wrong as error:
            raise Wrong(str(error), place, *error.place) from None
    elif not isinstance(value, str):
        raise Wrong(f"a string is needed, got {shown(value)}", place)
    try:
        return Structure(place, StructuredOutputsParams(**{form: value}))
    except ValueError as error:
        raise Wrong(str(error).removeprefix(f"{form} "), place) from error


def unread_in_format(value: Any) -> Iterator[str]:
    """Names in a `response_format` that its type has nothing to do with."""
    if not isinstance(value, dict):
        return
    yield from others(value, _FORMATS[value["type"]], "response_format")
    if value["type"] == "json_schema":
        yield from others(value["json_schema"], _NAMED_SCHEMA, "response_format.json_schema")


def of_schema(value: Any, place: str) -> Structure:
    """A JSON Schema, as an object or as text. Raises Wrong at `place`."""
    try:
        return Structure(place, StructuredOutputsParams(json=_schema(value, place)))
    except Wrong:
        raise
    except ValueError as error:
        raise Wrong(str(error).removeprefix("json "), place) from error


def _of_format(value: Any) -> Iterator[tuple[str, str, Any]]:
    """Where it stands, which form it has, and what it is."""
    if value is None:
        return
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _FORMATS:
        of = f"type {shown(kind)}" if isinstance(value, dict) else shown(value)
        raise Wrong(f"an object of type {', '.join(_FORMATS)} is needed, got {of}", "response_format")
    if kind == "json_object":
        schema = value.get("schema")
        yield ("response_format", "json", ANY_OBJECT) if schema in (None, {}) else ("response_format.schema", "json", schema)
    elif kind == "json_schema":
        named = value.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        if schema is None:
            raise Wrong("an object with a schema is needed", "response_format.json_schema")
        yield "response_format.json_schema.schema", "json", schema


def _of_structured(value: Any) -> Iterator[tuple[str, str, Any]]:
    if value is None:
        return
    if not isinstance(value, dict):
        raise Wrong(f"an object is needed, got {shown(value)}", "structured_outputs")
    for name, item in value.items():
        if item is None or item is False or name in _WITHOUT_EFFECT:
            continue
        if name not in _FORMS:
            raise Wrong(f"not implemented; there are {', '.join(_FORMS)}", f"structured_outputs.{name[:40]}")
        if name == "json_object":
            yield "structured_outputs.json_object", "json", ANY_OBJECT
        else:
            yield f"structured_outputs.{name}", name, item


def _schema(value: Any, place: str) -> str:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise Wrong(f"a JSON Schema is needed, got {shown(value)}", place)
    return value
