"""Bodies of requests as they come in: JSON, whatever a client calls it, with nothing in it that no text can hold."""

import json
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from gmanager.gateway.errors import ApiError

MAX_DEPTH = 500
"""Of lists and objects in each other."""

_JSON_TYPE = (b"content-type", b"application/json")
_MAY_BE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_PLACE_CHARS = 200

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRoute(APIRoute):
    """A route whose body is read as JSON without being called so: curl says it is a form, others say nothing."""

    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            headers = [(name, value) for name, value in request.scope["headers"] if name != _JSON_TYPE[0]]
            return await handler(_JsonRequest({**request.scope, "headers": [*headers, _JSON_TYPE]}, request.receive))

        return handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        return parse(await self.body())


def parse(data: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises ApiError with what is wrong, and where."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start:,}") from None
    if not text.strip():
        raise ApiError(400, "the body is empty: a JSON object is needed")
    try:
        value = json.loads(text.removeprefix("\ufeff"), parse_constant=_refuse_constant, parse_int=_integer)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno} (character {error.pos:,})"
        raise ApiError(400, f"the body is not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise ApiError(400, _too_deep()) from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {kind_of(value)}")
    if text.count("[") + text.count("{") > MAX_DEPTH or _MAY_BE_SURROGATE.search(text):
        _check(value)
    return value


def kind_of(value: Any) -> str:
    """What a value is to JSON."""
    if value is None:
        return "null"
    return "true" if value is True else "false" if value is False else _KINDS.get(type(value), "a value")


_KINDS: dict[type, str] = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}


def shown(value: Any) -> str:
    """A value as an error names it: what it is, and itself if it is short."""
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    if isinstance(value, dict) or value is None or isinstance(value, bool):
        return kind_of(value)
    if isinstance(value, str):
        return json.dumps(value) if len(value) <= 40 else f"a string of {len(value):,} characters"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length():,} bits"
    return str(value)


def _check(value: dict[str, Any]) -> None:
    """Refuse lone surrogates, which escapes can write and no encoding holds, in any key or string; and what is too deep."""
    stack: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while stack:
        place, found = stack.pop()
        if len(place) > MAX_DEPTH:
            raise ApiError(400, _too_deep())
        if isinstance(found, str):
            _check_text(found, place)
        elif isinstance(found, dict):
            for name in found:
                _check_text(name, (*place, name))
            stack += [((*place, name), item) for name, item in found.items()]
        elif isinstance(found, list):
            stack += [((*place, i), item) for i, item in enumerate(found) if isinstance(item, str | list | dict)]


def _check_text(text: str, place: tuple[str | int, ...]) -> None:
    found = _SURROGATE.search(text)
    if found is not None:
        param = "".join(_escaped(".".join(map(str, place))))[:_MAX_PLACE_CHARS]
        what = f"U+{ord(found[0]):04X} at character {found.start():,} is half of a surrogate pair"
        raise ApiError(400, f"{param}: {what}, which is no character", param=param)


def _escaped(text: str) -> Iterator[str]:
    return (f"\\u{ord(char):04x}" if _SURROGATE.match(char) else char for char in text)


def _too_deep() -> str:
    return f"the body has lists and objects more than {MAX_DEPTH} deep in each other"


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"the body is not JSON: {name} is no number there")


def _integer(digits: str) -> int | float:
    """Python reads no more than some thousand digits; a double has none of them left either."""
    return int(digits) if len(digits) <= 400 else float(digits)
