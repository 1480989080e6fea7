"""Sizes, places and numbers as flags have them: `64G`, `/scratch:2T`, `20,12`."""

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

_UNITS = {unit: 2 ** (10 * power) for power, unit in enumerate(("", "K", "M", "G", "T"))}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes: `64G`, `1.5T`, `500M`; units are powers of 1024. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size, like 64G, 1.5T or 500M")
    return int(Fraction(match[1]) * _UNITS[match[2].upper()])


def parse_disk(text: str) -> tuple[Path, int]:
    """`DIR:SIZE`: where, and how many bytes of it. Raises ValueError."""
    folder, colon, size = text.rpartition(":")
    if not (colon and folder):
        raise ValueError(f"{text!r} is no directory and size, like /scratch:500G")
    return Path(folder).expanduser(), parse_size(size)


def check_layers(counts: Sequence[int], stages: int) -> None:
    """Raises ValueError unless each stage has a number of layers."""
    if len(counts) != stages or min(counts) < 1:
        said = ",".join(map(str, counts))
        raise ValueError(f"--pp-layers {said} are not the layers of {stages} stages (--pp), at least one for each")


def parse_layers(text: str) -> tuple[int, ...]:
    """Of each stage: `20,12`. Raises ValueError."""
    counts = text.split(",")
    if not all(count.isascii() and count.isdigit() for count in counts):
        raise ValueError(f"{text!r} are no numbers of layers with commas between, like 20,12")
    return tuple(map(int, counts))


def parse_elastic(text: str) -> int | Literal["auto"]:
    """Rows of a step that instances share, 0 for `off`, or `auto`. Raises ValueError."""
    if text == "auto":
        return "auto"
    if text != "off" and not (text.isascii() and text.isdigit()):
        raise ValueError(f"--elastic-tp {text!r} is neither off, nor auto, nor a number of rows")
    return 0 if text == "off" else int(text)


def check_sharing(most_rows: int | Literal["auto"], *, ranks: int, quantize: str) -> None:
    """Raises ValueError for instances that can't share dense layers. `ranks`: of each."""
    flag = f"--elastic-tp {most_rows}"
    if most_rows != "auto" and most_rows < 0:
        raise ValueError(f"{flag} is no number of rows")
    if ranks > 1:
        raise ValueError(f"{flag} is for instances that each have all weights: these are split between {ranks} ranks")
    if quantize != "none":
        raise ValueError(f"{flag} splits weights of 16 or 32 bits, and doesn't go with --quantize {quantize}")
