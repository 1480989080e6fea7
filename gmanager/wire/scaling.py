"""Rotary scaling as flags have it (`yarn:4`), and how long texts a model takes with it: arithmetic on its config alone."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["yarn", "linear", "dynamic", "none"]

MAX_FACTOR = 1024
_TEXT = re.compile(r"([a-z0-9_]+)(?::(.+))?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """What is put in the place of a model's own scaling of its rotary frequencies. Raises ValueError for another factor."""

    kind: Kind
    factor: float = 1.0
    """By how much longer texts than the model was trained with, in (1, MAX_FACTOR]; 1 if nothing is scaled."""

    def __post_init__(self) -> None:
        if self.kind == "none":
            if self.factor != 1:
                raise ValueError(f"scaling none has no factor, got {self.factor:g}")
        elif not 1 < self.factor <= MAX_FACTOR:
            raise ValueError(f"the factor of {self.kind} must be more than 1 and at most {MAX_FACTOR}, got {self.factor:g}")

    def __str__(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind}:{self.factor:g}"

    def times(self, tokens: int) -> int:
        """How long texts are that are longer by the factor."""
        return math.floor(tokens * self.factor)


def parse_scaling(text: str) -> RopeScaling:
    """`yarn:4`, `linear:2`, `dynamic:2.5` or `none`. Raises ValueError."""
    match = _TEXT.fullmatch(text.strip())
    kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
    kind = None if match is None else kinds.get(match[1].lower())
    if match is None or kind is None:
        raise ValueError(f"--rope-scaling must be yarn:F, linear:F, dynamic:F or none, got {text!r}")
    if kind == "none" and match[2] is None:
        return RopeScaling("none")
    try:
        factor = float(match[2] or "")
    except ValueError:
        raise ValueError(f"--rope-scaling {kind} needs a factor, as {kind}:4, got {text!r}") from None
    try:
        return RopeScaling(kind, factor)
    except ValueError as error:
        raise ValueError(f"--rope-scaling: {error}") from error


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the texts that a model takes."""

    usual: int
    """Unless less or more is asked for."""
    most: int


def lengths(config: Mapping[str, Any], scaling: RopeScaling | None) -> Lengths | None:
    """By a model's config as it is stored, and the scaling in the place of its own; None if it doesn't say.

    `dynamic` has the frequencies that a model was trained with for texts as long as that, so that more must be asked for,
    either way. Raises ValueError for a scaling that can't be put there.
    """
    longest = _count(config.get("max_position_embeddings"))
    if longest is None:
        if scaling is not None:
            raise ValueError(f"--rope-scaling {scaling}: its config has no max_position_embeddings to scale")
        return None
    if scaling is not None:
        scaled = scaling.times(trained_length(config))
        return Lengths(scaled, scaled)
    rope = rope_of(config)
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or not 1 < factor <= MAX_FACTOR:
        return Lengths(longest, longest)
    if kind_of(rope) == "dynamic":
        return Lengths(longest, math.floor(longest * factor))
    if kind_of(rope) == "yarn":  # some configs state the length with it, some that before, which is also what none says
        longest = max(longest, math.floor((_original(config) or longest) * factor))
    return Lengths(longest, longest)


def trained_length(config: Mapping[str, Any]) -> int:
    """Of the texts that a model was trained with before its own scaling, if it has one.

    Raises ValueError if its config doesn't say, or has frequencies for each kind of its layers.
    """
    rope = rope_of(config)
    if any(isinstance(part, Mapping) for part in rope.values()):
        raise ValueError("--rope-scaling: its kinds of layers have rotary frequencies of their own, which can't be replaced")
    kind, longest = kind_of(rope), _count(config.get("max_position_embeddings"))
    original = _original(config)
    if kind in ("yarn", "llama3", "longrope", "su") and original is not None:
        return original
    if kind in ("default", "dynamic", "yarn", "llama3", "longrope", "su") and longest is not None:
        return longest
    raise ValueError(
        f"--rope-scaling: its config has rotary scaling '{kind}' and doesn't say what length the model was trained with before"
    )


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of rotary frequencies, under its present name or the old one."""
    found = config.get("rope_scaling") or config.get("rope_parameters")
    return found if isinstance(found, Mapping) else {}


def kind_of(rope: Mapping[str, Any]) -> str:
    """The type of frequencies, `default` if nothing is scaled."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _original(config: Mapping[str, Any]) -> int | None:
    """What a config says of the length before scaling."""
    return _count(config.get("original_max_position_embeddings")) or _count(
        rope_of(config).get("original_max_position_embeddings")
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
