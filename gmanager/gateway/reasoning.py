"""What a model thinks before it answers, `<think>...</think>`, apart from the answer. Pure.

<think>hm, ...</think>The answer      the model opens its thoughts itself
hm, ...</think>The answer             the chat template has opened them, at the prompt's end
"""

from dataclasses import dataclass

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Split:
    """What a piece of text adds to both."""

    reasoning: str = ""
    content: str = ""


class ReasoningSplitter:
    """Divides generated text that comes in pieces. However it is cut, the joined results are the same.

    Reasoning comes first or not at all: once there is content, tags are content too. Without a closing tag all is
    reasoning. Nothing but the two tags is left out.
    """

    def __init__(self, *, opened: bool = False) -> None:
        """`opened`: the text begins inside the thoughts; a tag that opens them once more is left out as well."""
        self._opened = opened
        self._state = "start"
        self._held = ""
        self.has_begun = False
        """Thoughts have, be they empty."""

    def push(self, text: str, *, final: bool = False) -> Split:
        """Add text; `final`: no more will come. What may be the beginning of a tag is held back until that is sure."""
        text = self._held + text
        self._held = reasoning = ""
        if self._state == "start":
            begin = text.lstrip()
            if begin.startswith(OPEN):
                reasoning = text[: len(text) - len(begin)]
                text, self._state = begin[len(OPEN) :], "reasoning"
            elif OPEN.startswith(begin) and not final:
                self._held = text
                return Split()
            else:
                self._state = "reasoning" if self._opened else "content"
        if self._state == "content":
            return Split(content=text)
        self.has_begun = True
        thought, tag, answer = text.partition(CLOSE)
        if tag:
            self._state = "content"
        elif not final:
            held = next(n for n in range(len(CLOSE) - 1, -1, -1) if thought.endswith(CLOSE[:n]))
            thought, self._held = thought[: len(thought) - held], thought[len(thought) - held :]
        return Split(reasoning + thought, answer)


def is_opened(prompt: str) -> bool:
    """Whether the prompt ends inside the model's thoughts."""
    return prompt.rstrip().endswith(OPEN)
