"""JSON Schemas as clients write them, read as they mean them. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

_COMBINING = ("allOf", "not", "if", "dependentSchemas")
"""Beside these it takes more than a look at one object to say which properties it may have."""
_OPEN = ("additionalProperties", "patternProperties", "unevaluatedProperties")

FORMATS = frozenset(("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"))
"""Those that llguidance holds a string to; it refuses any other."""
_DATA = ("const", "enum", "default", "examples")
"""Keywords whose values are no schemas."""
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose values hold schemas by names of the client's own."""


def enforceable(schema: Any) -> Any:
    """The schema without `uniqueItems`, which no grammar can hold a text to, and without formats that aren't known: to JSON
    Schema a format is an annotation. Pydantic writes both by itself, for sets, paths, passwords and bytes."""
    if isinstance(schema, list):
        return [enforceable(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if (name == "uniqueItems" and isinstance(value, bool)) or (
            name == "format" and isinstance(value, str) and value not in FORMATS
        ):
            continue
        if name in _MAPS and isinstance(value, Mapping):
            found[name] = {key: enforceable(item) for key, item in value.items()}
        else:
            found[name] = value if name in _DATA else enforceable(value)
    return found


def closed(schema: Any) -> Any:
    """The schema with objects that hold no other properties than those it names, wherever it doesn't say so itself.

    To JSON Schema silence means that any may be added, and a model that is held to nothing but the schema goes on adding; what
    the client lists is what it wants (as XGrammar's strict mode has it). Every value of the result is one of `schema`, unless
    `oneOf` told its members apart by nothing but what they don't name. A schema that is put together of parts that must hold at
    once is left as it is.
    """
    nodes = list(_nodes(schema))
    if any(any(name in node for name in _COMBINING) or ("$ref" in node and "properties" in node) for node in nodes):
        return schema
    return _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = {name: _within(name, value) for name, value in schema.items()}
    named = schema.get("properties")
    if not isinstance(named, Mapping):
        for name in ("anyOf", "oneOf"):
            if isinstance(schema.get(name), list):
                found[name] = [_closed(item) for item in schema[name]]
        return found
    if any(name in schema for name in ("anyOf", "oneOf", *_OPEN)):
        return found
    required = schema.get("required", [])
    needed = set(required) if isinstance(required, list) and all(isinstance(name, str) for name in required) else {None}
    if needed <= named.keys() and schema.get("minProperties", 0) in range(len(named) + 1):
        found["additionalProperties"] = False
    return found


def _within(name: str, value: Any) -> Any:
    """A keyword's value, with the schemas in it closed."""
    if name in ("properties", "$defs", "definitions") and isinstance(value, Mapping):
        return {key: _closed(item) for key, item in value.items()}
    if name == "prefixItems" and isinstance(value, list):
        return [_closed(item) for item in value]
    if name in ("items", "additionalProperties"):
        return _closed(value)
    return value


def _nodes(schema: Any) -> Iterator[Mapping[str, Any]]:
    """All schemas in it, and perhaps objects that are none."""
    if isinstance(schema, Mapping):
        yield schema
        for name, value in schema.items():
            for item in value.values() if name == "properties" and isinstance(value, Mapping) else [value]:
                yield from _nodes(item)
    elif isinstance(schema, list):
        for item in schema:
            yield from _nodes(item)
