"""What a chat template tells of its model."""

from dataclasses import dataclass

from gmanager.gateway.reasoning import CLOSE
from gmanager.gateway.tools import Format, detect_format


@dataclass(frozen=True, slots=True)
class Habits:
    """How a model speaks."""

    knows_developer: bool
    """The template has a role of that name."""
    calls: Format | None
    """How it calls tools; None: not, or in a way that isn't known here."""
    thinks: bool
    """It may write thoughts before its answer."""


def habits_of(template: str | None) -> Habits:
    """Of the model that this chat template came with."""
    text = template or ""
    return Habits(knows_developer="developer" in text, calls=detect_format(text), thinks=CLOSE in text)
