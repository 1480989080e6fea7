"""Special tokens in what users wrote stay text.

A chat template writes special tokens (`<|im_end|>`) where a turn ends. A user who writes the same in a message, or a half of it
where the other half comes from elsewhere, must not end his turn and speak as somebody else. So where any text that a template
is given has a part of a special token, the template runs twice: on what was given, which makes the prompt; and on the same with
breaks, digits drawn for this one call, inside of each such part. With # for a break:

    given      hi <|im_end|> x<          broken     hi <#|#im_end|#> x<#
    prompt     <|im_start|>user hi <|im_end|> x<<|im_end|>
    broken     <|im_start|>user hi <#|#im_end|#> x<#<|im_end|>

Digits pass through escapes and changes of case. The special tokens that are whole in what comes of the second run are the
template's own; all else in it, less the breaks, is text. Together they are the prompt again, unless the template looks for
special tokens in what it is given. Then they become the prompt, so that it finds none, if with other digits they are the same.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from gmanager.wire.errors import TextError

_BREAK_DIGITS = 16
_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))
_HEAD_CHARS = 8
"""Tokens that begin alike (`<|reserved_special_token_7|>`) are looked for together."""
_WORD = re.compile(r"[\w.-]+")
_NO_PIVOT = frozenset("<>[]{}()/\\'\"&")


class Piece(NamedTuple):
    """A part of a rendered conversation."""

    text: str
    kind: Literal["special", "text", "any"]
    """One special token, of the template's own; text, whatever it looks like; or as the tokenizer reads it."""


class Specials:
    """The special tokens of a tokenizer."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.all = [token for token in sorted(set(tokens), key=lambda token: (-len(token), token)) if token]
        self._heads: dict[str, list[str]] = {}
        for token in self.all:
            self._heads.setdefault(token[:_HEAD_CHARS], []).append(token)

    def found_in(self, text: str) -> list[str]:
        """Those that the text has, the longest first."""
        found = [token for head, tokens in self._heads.items() if head in text for token in tokens if token in text]
        return sorted(found, key=lambda token: (-len(token), token))

    def cut(self, text: str, brk: str = "") -> list[Piece]:
        """`text` cut at each special token that has no break inside of it, less the breaks."""
        found = self.found_in(text)
        if not found:
            return [Piece(text.replace(brk, "") if brk else text, "text")]
        # A token of one character has breaks on both sides: there is no inside.
        patterns = [re.escape(token) if len(token) > 1 or not brk else _single(token, brk) for token in found]
        parts = re.split("(" + "|".join(patterns) + ")", text)
        if brk:
            parts = [part.replace(brk, "") for part in parts]
        return [Piece(part, "special" if i % 2 else "text") for i, part in enumerate(parts) if part]


def keep_apart(render: Callable[[Any, Any], str], messages: Any, names: Any, specials: Specials) -> list[Piece]:
    """The conversation that `render` makes of messages and names (JSON), cut where the template wrote special tokens, or in one
    piece, if nothing else could be taken for one. Raises TextError if the template cuts breaks, and what `render` raises."""
    text = render(messages, names)
    present = specials.found_in(text)
    digits = _digits()
    for words in (True, False):
        breaker = _Breaker(present, digits[0], words=words)
        broken = breaker.broken(messages, names)
        if not breaker.num_breaks:
            return [Piece(text, "any")]
        try:
            pieces = specials.cut(render(*broken), digits[0])
        except TextError:  # the template raises what it doesn't recognize
            continue
        if _text(pieces) == text:
            return [Piece(text, "any")] if pieces == specials.cut(text) else pieces

    def without_looking(brk: str) -> list[Piece]:
        known = set(present)
        while True:
            broken = _Breaker(sorted(known), brk, words=True).broken(messages, names)
            pieces = specials.cut(render(*broken), brk)
            own = {piece.text for piece in pieces if piece.kind == "special"}
            if own <= known:
                return pieces
            known |= own  # written where no part of it could be seen so far

    for first, second in (digits, _chars(messages, names)):
        if (pieces := without_looking(first)) == without_looking(second):
            return pieces
    raise TextError("the chat template cuts parts of special tokens in the messages so that they can't be told from its own")


def _digits() -> tuple[str, str]:
    """Two breaks with no digit in common at any place: what is left of one differs from what is left of the other."""
    first = [secrets.randbelow(10) for _ in range(_BREAK_DIGITS)]
    second = [(digit + 1 + secrets.randbelow(9)) % 10 for digit in first]
    return "".join(map(str, first)), "".join(map(str, second))


def _chars(messages: Any, names: Any) -> tuple[str, str]:
    """Two breaks that can't be cut, for templates that count characters; escapes change them."""
    taken = {char for text in _texts([messages, names]) for char in text}
    free = [char for code in _PRIVATE_USE if (char := chr(code)) not in taken]
    if len(free) < 2:
        raise TextError("the messages have all characters of Unicode's private use, and one was needed")
    return free[0], free[1]


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _single(char: str, brk: str) -> str:
    return f"(?!(?<={brk}){re.escape(char)}{brk}){re.escape(char)}"


class _Breaker:
    """Puts breaks into strings, where they have parts of special tokens that others may complete."""

    def __init__(self, tokens: Sequence[str], brk: str, *, words: bool) -> None:
        """`words`: also in words, which a template may look for, and which may be parts by chance."""
        self.num_breaks = 0
        self._tokens = tokens
        self._brk = brk
        self._words = words
        self._firsts = {token[0] for token in tokens}
        self._lasts = {token[-1] for token in tokens}
        # A part inside of a text has the token's first two characters, its last two, or, whatever a template takes out from
        # between, its pivot. The break comes after the first of each.
        # (Not seen: `<s>`, which has no pivot, where a template takes something out after its `<` and also after its `s`.)
        self._singles = {token for token in tokens if len(token) == 1}
        grams = {gram for token in tokens if len(token) > 1 for gram in (token[:2], token[-2:])}
        pivots = {pivot for token in tokens if (pivot := _pivot(token))}
        self._needles = sorted(self._singles | pivots | {gram for gram in grams if gram[0] not in self._singles | pivots})
        ends = [re.escape(needle[0]) + (f"(?={re.escape(needle[1])})" if needle[1:] else "") for needle in self._needles]
        self._inner = re.compile("|".join(ends))

    def broken(self, messages: Any, names: Any) -> tuple[Any, Any]:
        return self._map(messages), self._map(names, are_terms=True)

    def _map(self, value: Any, *, is_term: bool = False, are_terms: bool = False) -> Any:
        """`is_term`: a string that is the template's word more than a text (a role, a name, a setting), unless it is no word;
        `are_terms`: the strings in a dict are."""
        if isinstance(value, str):
            return self._text(value, words=self._words and not is_term)
        if isinstance(value, dict):
            return {
                self._text(name, words=False): self._map(item, is_term=are_terms or name == "role")
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self._map(item) for item in value]
        return value

    def _text(self, text: str, *, words: bool) -> str:
        places = sorted(self._places(text, words=words))
        self.num_breaks += len(places)
        return self._brk.join(text[start:end] for start, end in pairwise([0, *places, len(text)])) if places else text

    def _places(self, text: str, *, words: bool) -> set[int]:
        core = text.strip()
        if not core or not self._tokens:
            return set()
        if not words and _WORD.fullmatch(core) and not any(token in core for token in self._tokens):
            return set()
        places: set[int] = set()
        start = len(text) - len(text.lstrip())
        end = start + len(core)
        if any(core in token for token in self._tokens):
            places.add(start + 1)
        places |= {at for at in (end, len(text)) if text[at - 1] in self._firsts}
        places |= {at for at in (start, 0) if text[at] in self._lasts}
        if any(needle in text for needle in self._needles):
            for found in self._inner.finditer(text):
                places.add(found.end())
                if found[0] in self._singles:
                    places.add(found.start())
        return places


def _pivot(token: str) -> str:
    """A character of it that stands seldom in what a template looks for, `</think>` and the like."""
    return next((char for char in token[:-1] if not (char.isalnum() or char.isspace() or char in _NO_PIVOT)), "")


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
