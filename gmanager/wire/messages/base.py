"""What all messages have in common."""

import sys
from array import array
from collections.abc import Iterable
from typing import Any, dataclass_transform

import msgspec

PROTOCOL = 4
"""Spoken version. A peer that speaks another is refused in its first message."""


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Token ids as little-endian uint32 bytes. Raises ValueError for an id outside [0, 2**32)."""
    try:
        ids = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids must be integers in [0, 4294967296): {error}") from error
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def unpack_tokens(data: bytes) -> "array[int]":
    """The ids in `data`. Raises ValueError if its length is no multiple of 4."""
    if len(data) % 4:
        raise ValueError(f"packed token ids must be a multiple of 4 bytes long, got {len(data)}")
    ids = array("I")
    ids.frombytes(data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def unpack_floats(data: bytes) -> "array[float]":
    values = array("f")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class _Strict(msgspec.StructMeta):
    """Makes every struct frozen, keyword-only and closed to unknown fields; subclasses need not say so again."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> "_Strict":
        strict = {"frozen": True, "kw_only": True, "forbid_unknown_fields": True}
        return super().__new__(mcs, name, bases, namespace, **(strict | options))


class Part(msgspec.Struct, metaclass=_Strict):
    """Base of what messages are made of."""


class Message(Part, tag_field="type"):
    """Base of all that travels; `type` on the wire is the class name."""
