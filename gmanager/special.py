"""Special tokens in what users wrote stay text.

A chat template writes special tokens (`<|im_end|>`) where a turn ends. A user who writes the same in a message must not end his
turn and speak as somebody else. So before a template runs, each special token in what it is given is replaced by a mark, a
character that stands nowhere else; what was rendered is then cut at the special tokens that the template itself wrote, and the
marks between them become the user's text again, to be encoded as text.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

_FIRST_MARK = 0xF0000
"""Private use: no text means anything by these characters."""
_END_MARK = 0x10FFFE


class Piece(NamedTuple):
    """A part of a rendered conversation."""

    text: str
    kind: Literal["special", "text", "any"]
    """One special token, of the template's own; text, whatever it looks like; or as the tokenizer reads it."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a template is given, with marks for special tokens."""

    value: Any
    marks: dict[str, str]
    """Mark -> the token that it stands for; empty if there was none."""

    def pieces(self, rendered: str, special: Sequence[str]) -> list[Piece]:
        """What was rendered, cut where the template wrote special tokens, if there was anything to hide."""
        if not self.marks:
            return [Piece(rendered, "any")]
        own = re.compile("(" + "|".join(map(re.escape, _longest_first(special))) + ")")
        parts = own.split(rendered)
        return [Piece(part, "special") if i % 2 else Piece(self._shown(part), "text") for i, part in enumerate(parts) if part]

    def _shown(self, text: str) -> str:
        for mark, token in self.marks.items():
            text = text.replace(mark, token)
        return text


def hide(value: Any, special: Sequence[str]) -> Hidden:
    """`value` (JSON) with a mark for each special token in any string of it, keys included."""
    texts = "\0".join(_texts(value))
    present = [token for token in _longest_first(special) if token and token in texts]
    if not present:
        return Hidden(value, {})
    taken = set(texts)
    free = (char for code in range(_FIRST_MARK, _END_MARK) if (char := chr(code)) not in taken)
    mark_of = {token: next(free) for token in present}
    pattern = re.compile("|".join(map(re.escape, present)))
    marked = _map(value, lambda text: pattern.sub(lambda found: mark_of[found[0]], text))
    return Hidden(marked, {mark: token for token, mark in mark_of.items()})


def _longest_first(special: Sequence[str]) -> list[str]:
    return sorted(special, key=lambda token: (-len(token), token))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _map(item, change) for name, item in value.items()}
    if isinstance(value, list):
        return [_map(item, change) for item in value]
    return value
