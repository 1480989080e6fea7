"""Where tokens lie in a text, when each may be a part of a character, or nothing of the text."""

import codecs
from dataclasses import dataclass, field


@dataclass(slots=True)
class Places:
    """Counts the characters that tokens complete, one token after the other."""

    offset: int = 0
    """Characters that are complete."""
    end: int = 0
    """Length of the text that the client has got."""
    _at_start: bool = True
    _decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def start(self, offset: int) -> None:
        """The next token begins a text of its own, at that place."""
        self.offset = self.end = offset

    def add(self, data: bytes, text: str) -> int:
        """Which character the next token begins in, or with. `data`: what it stands for; nothing if it is not in the text.
        `text`: what the first token begins, which may lack the space that decoders take off."""
        if not data:
            return self.offset
        if self._at_start:
            self._at_start = False
            if data.startswith(b" ") and text and not text.startswith(" "):
                data = data[1:]
        had_pending = self._has_pending()
        first = self._decoder.decode(data[:1])
        # what was pending is either continued by this byte, or it has become a character that stands for wrong bytes
        is_cut = had_pending and (len(first) == 2 or (len(first) == 1 and self._has_pending()))
        begins = self.offset + is_cut
        self.offset += len(first) + len(self._decoder.decode(data[1:]))
        return begins

    def _has_pending(self) -> bool:
        """Bytes wait for the rest of their character."""
        return bool(self._decoder.getstate()[0])
