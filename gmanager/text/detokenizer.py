"""Generated tokens to text, bit by bit, up to a stop string."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gmanager.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_PENDING_TOKENS = 16
"""A character has at most 4 bytes, so tokens that have not become text after so many are not text. Keeping the last 16,
of a byte or more each, is also context enough: how bytes decode depends on the 3 before them."""
_SLICE_TOKENS = 32
_HELD_CHARS = 3
_RECENT_TOKENS = 4 * _PENDING_TOKENS
"""What comes after so many tokens with a text doesn't depend on those before them, but for a stop string that has begun."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What pushed tokens add to a text."""

    text: str
    stopped: bool = False
    """A stop string was found: the text ends here, before it."""
    num_tokens: int = 0
    """How many of the pushed tokens belong to the request: all, or those up to the one that completed the stop string."""


class Detokenizer:
    """Turns one request's generated tokens into text, bit by bit, at a cost linear in their number.

    It never gives out half a character, nor text that may turn out to be the beginning of a stop string. However the
    tokens are cut into pushes, the texts joined are `Tokenizer.decode` of all tokens, or that up to a stop string.
    (Byte-fallback decoders turn a whole run of byte tokens into replacement characters if one byte in it is wrong, also
    backwards; what was given out before that byte came stays as it was.)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        shown_special: Collection[int] = frozenset(),
    ) -> None:
        """`include_stop`: the stop string is part of the text. `min_tokens`: it is not looked for in so many first tokens.
        `shown_special`: special tokens that are not skipped."""
        self._tokenizer = tokenizer
        self._include_stop = include_stop
        self._unwatched = min_tokens
        self._skips_special = skip_special_tokens
        self._shown_special = shown_special
        self._stops = [_StopString(stop) for stop in stop_strings]
        # self._window: tokens of the text before (context, for decoders that treat a first token differently), then
        # those whose text is not all given out. text of window: [0, _num_shown) is given out.
        self._window: list[int] = []
        self._num_context = 0
        self._num_shown = 0
        self._held = ""
        self._stopped = False

    def begin_behind(self, token_ids: Sequence[int]) -> None:
        """Before any `push`: these were pushed to another one, and none of them completed a stop string but perhaps the last.
        What is pushed now becomes the text that it would have become there, at a cost that doesn't grow with their number."""
        needed = _RECENT_TOKENS + max((len(stop.text.encode()) for stop in self._stops), default=0)
        count = needed  # each that is visible has a byte or more
        while count < len(token_ids) and len(self._visible(token_ids[-count:])) < needed:
            count *= 2
        recent = token_ids[-count:]
        self._unwatched -= len(token_ids) - len(recent)
        self.push(recent, final=False)

    def push(self, token_ids: Sequence[int], *, final: bool) -> TextDelta:
        """Add tokens; `final`: no more will come, give out what was held back. After a stop nothing more comes."""
        if self._stopped:
            return TextDelta("", stopped=True)
        # With stop strings one by one: how many tokens count must not depend on how they were pushed.
        size = 1 if self._stops else _SLICE_TOKENS
        texts: list[str] = []
        for start in range(0, len(token_ids), size):
            self._unwatched -= len(token_ids[start : start + size])
            texts.append(self._release(self._decode(token_ids[start : start + size])))
            if self._stopped:
                return TextDelta("".join(texts), stopped=True, num_tokens=start + size)
        if final:
            texts.append(self._release(self._flush()))
            if not self._stopped:
                texts.append(self._held)
                self._held = ""
        return TextDelta("".join(texts), stopped=self._stopped, num_tokens=len(token_ids))

    def _visible(self, token_ids: Sequence[int]) -> list[int]:
        return self._tokenizer.visible(token_ids, special=not self._skips_special, shown=self._shown_special)

    def _decode(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now."""
        new_tokens = self._visible(token_ids)
        if not new_tokens:
            return ""
        text = self._tokenizer.decode_visible(self._window + new_tokens)
        if text.endswith(_REPLACEMENT) and len(new_tokens) > 1:
            # Find where the last whole character ends.
            return "".join([self._decode([token]) for token in new_tokens])
        self._window += new_tokens
        complete = len(text.rstrip(_REPLACEMENT))
        if complete == len(text):
            new = text[self._num_shown :]
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
            self._num_shown = len(self._tokenizer.decode_visible(self._window))
            return new
        if len(self._window) - self._num_context > _PENDING_TOKENS:
            # Not the beginning of a character any more: bytes that are no UTF-8, or characters that never end
            # with a token. Only the last bytes can still change.
            complete = max(complete, len(text) - _HELD_CHARS)
            new = text[self._num_shown : complete]
            held = len(text) - max(complete, self._num_shown)
            self._window = self._window[-_PENDING_TOKENS:]
            self._num_context = 0
            self._num_shown = len(self._tokenizer.decode_visible(self._window)) - held
            return new
        new = text[self._num_shown : complete]
        self._num_shown = max(self._num_shown, complete)
        return new

    def _flush(self) -> str:
        text = self._tokenizer.decode_visible(self._window)[self._num_shown :]
        self._window, self._num_context, self._num_shown = [], 0, 0
        return text

    def _release(self, text: str) -> str:
        """What of the held text and `text` can't be part of a stop string any more."""
        if not self._stops or not text or self._unwatched >= 0:
            return text
        start = len(self._held)
        self._held += text
        for end, char in enumerate(text, start + 1):
            found = [len(stop.text) for stop in self._stops if stop.feed(char)]
            if found:
                self._stopped = True
                return self._held[: end if self._include_stop else end - max(found)]
        may_begin = max(stop.num_matched for stop in self._stops)
        cut = len(self._held) - may_begin
        out, self._held = self._held[:cut], self._held[cut:]
        return out


class _StopString:
    """Finds a string in a stream of characters (Knuth, Morris, Pratt: each is looked at once or twice)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        """How many characters at the stream's end are the beginning of the string."""
        # _fallback[n]: length of the longest proper beginning of text that also ends text[:n].
        self._fallback = [0] * (len(text) + 1)
        matched = 0
        for at in range(1, len(text)):
            while matched and text[at] != text[matched]:
                matched = self._fallback[matched]
            matched += text[at] == text[matched]
            self._fallback[at + 1] = matched

    def feed(self, char: str) -> bool:
        """Whether the string is complete with this character."""
        while self.num_matched and (self.num_matched == len(self.text) or char != self.text[self.num_matched]):
            self.num_matched = self._fallback[self.num_matched]
        self.num_matched += char == self.text[self.num_matched]
        return self.num_matched == len(self.text)
