"""Where a JSON Schema is wrong: llguidance says what, and this finds the smallest part that it refuses by itself."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

MAX_TRIALS = 256
"""Parts that are tried: each takes 0.2 ms, or 10 ms if it has 300 properties."""
MAX_CHARS = 2**22
"""Of all that is tried together."""

MAX_POINTER = 200

Place = tuple[str | int, ...]
Refusal = Callable[[str], str | None]
"""Why a schema is refused; None if it isn't."""

_ROOT = "#/$defs/root"
_NAMED = ("properties", "patternProperties")
_LISTED = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_SINGLE = ("items", "additionalProperties")
_UNSATISFIABLE = "Unsatisfiable schema"


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a schema, and where: the keys and indices that lead there."""

    place: Place
    reason: str

    @property
    def pointer(self) -> str:
        """As `$ref` would have it, cut if it is long."""
        whole = "#" + "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in self.place)
        return whole[:MAX_POINTER].encode(errors="replace").decode()


def find_fault(schema: str, reason: str, refusal: Refusal) -> Fault | None:
    """The smallest part of a refused schema that is the reason, as far as that is found in MAX_TRIALS; None: it isn't found."""
    try:
        root = json.loads(schema)
        if not isinstance(root, dict):
            return None
        root.pop("$id", None)  # its references would be to something by that name
        search = _Search(_moved(root), refusal)
        whole = Fault((), _plain(reason))
        return search.smallest(whole) if search.why(search.root) == whole.reason else None
    except (ValueError, RecursionError):
        return None


class _Search:
    """Tries parts of a schema, each with all that it may refer to."""

    def __init__(self, root: Any, refusal: Refusal) -> None:
        """`root`: its references are those of `_moved`."""
        self.root = root
        self._rest = json.dumps(root)
        self._refusal = refusal
        self._trials = MAX_TRIALS
        self._chars = MAX_CHARS

    @property
    def _trials_left(self) -> int:
        return self._trials if self._chars > 0 else 0

    def why(self, part: Any) -> str | None:
        """The reason why a part is refused."""
        text = json.dumps(part)
        rest = f', "root": {self._rest}' if '"$ref"' in text else ""
        whole = f'{{"$ref": "#/$defs/part", "$defs": {{"part": {text}{rest}}}}}'
        self._trials -= 1
        self._chars -= len(whole)
        reason = self._refusal(whole)
        return None if reason is None else _plain(reason)

    def smallest(self, fault: Fault) -> Fault:
        """Of the parts that are within one another, and of its keywords, if a single one makes the difference."""
        part, seen = self.root, {fault.place}
        while (found := self._cause(part, fault, seen)) is not None:
            part, fault = found
            seen.add(fault.place)
        if isinstance(part, dict) and len(part) <= self._trials_left:
            guilty = [key for key in part if self.why({k: v for k, v in part.items() if k != key}) != fault.reason]
            if len(guilty) == 1:
                return Fault((*fault.place, *guilty), fault.reason)
        return fault

    def _cause(self, part: Any, fault: Fault, seen: set[Place]) -> tuple[Any, Fault] | None:
        """The part of `part` that is the reason for its being refused."""
        first: tuple[Any, Fault] | None = None
        for place, inner in self._parts(part, fault.place):
            if not self._trials_left:
                break
            if place in seen or (reason := self.why(inner)) is None:
                continue
            found = inner, Fault(place, reason)
            if reason == fault.reason:
                return found
            # one that can't be met is no fault by itself: what needs it is refused, in other words
            if reason.startswith(_UNSATISFIABLE) and fault.reason.startswith(_UNSATISFIABLE):
                if f"'{place[-1]}'" in fault.reason:
                    return found
                first = first or found
        return first

    def _parts(self, part: Any, place: Place) -> Iterator[tuple[Place, Any]]:
        """Schemas that stand in one, and where."""
        if not isinstance(part, dict):
            return
        for keyword, given in part.items():
            if keyword in _NAMED and isinstance(given, dict):
                yield from (self._meant((*place, keyword, name), inner) for name, inner in given.items())
            elif keyword in _LISTED and isinstance(given, list):
                yield from (self._meant((*place, keyword, at), inner) for at, inner in enumerate(given))
            elif keyword in _SINGLE:
                yield self._meant((*place, keyword), given)
            elif keyword == "$ref":
                yield from self._target(given)

    def _meant(self, place: Place, part: Any) -> tuple[Place, Any]:
        """A part, or what it refers to, if it does nothing else: there it can be mended."""
        if isinstance(part, dict) and list(part) == ["$ref"]:
            return next(self._target(part["$ref"]), (place, part))
        return place, part

    def _target(self, ref: Any) -> Iterator[tuple[Place, Any]]:
        """What a reference names, if there is such a thing in the schema."""
        if not isinstance(ref, str) or not ref.startswith(_ROOT):
            return
        place: list[str | int] = []
        found = self.root
        for escaped in unquote(ref.removeprefix(_ROOT)).split("/")[1:]:
            key: str | int = escaped.replace("~1", "/").replace("~0", "~")
            try:
                if isinstance(found, list):
                    key = int(key)
                found = found[key]
            except (LookupError, TypeError, ValueError):
                return
            place.append(key)
        yield tuple(place), found


def _plain(reason: str) -> str:
    """As it would be said of the schema itself, without the part that llguidance names if it was referred to."""
    return reason.partition("\n  while processing ")[0].replace(_ROOT[1:], "")


def _moved(value: Any) -> Any:
    """A schema whose references to itself are references to `_ROOT`."""
    if isinstance(value, list):
        return [_moved(item) for item in value]
    if not isinstance(value, dict):
        return value
    moved = {name: _moved(item) for name, item in value.items()}
    ref = value.get("$ref")
    if isinstance(ref, str) and (ref == "#" or ref.startswith("#/")):
        moved["$ref"] = _ROOT + ref[1:]
    return moved
