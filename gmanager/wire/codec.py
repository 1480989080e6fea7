"""Messages to bytes and back: msgpack for the form, msgspec for the types, one message per frame.

Nothing that arrives is executed or trusted: lengths are limited while unpacking, ext types are refused, and the
result must fit one struct of the expected union, with no field more or less. What doesn't is a BadMessage.
"""

import re
from typing import Any, Generic, NoReturn, TypeVar

import msgpack
import msgspec

from gmanager.wire.errors import BadMessage, FrameTooLarge
from gmanager.wire.messages import Message

MAX_FRAME_BYTES = 64 * 2**20
"""Longest frame. A prompt of 4M tokens takes 16 MB as ids; tokenizer.json of the largest vocabularies takes 35 MB."""

MAX_CONTAINER_ITEMS = 2**16
"""Most entries of one list or map: the longest ones list requests or sequences. Prompts travel as bytes."""

MAX_TOTAL_ITEMS = 2**20
"""Most list and map entries of a whole message. Without it 64 MiB of empty lists would become 4 GB of objects."""

MAX_REASON_CHARS = 200

M = TypeVar("M")

_PATH = re.compile(r" - at `(\$[\w.\[\]]{0,80})`$")


def encode(message: Message, *, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """The frame of `message`.

    Raises FrameTooLarge, and ValueError if a value has no place on the wire (an integer over 64 bits, a lone
    surrogate in a string).
    """
    kind = type(message).__name__
    try:
        frame: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)))
    except (OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"{kind} can't be sent: {error}") from error
    if len(frame) > max_bytes:
        raise FrameTooLarge(kind, len(frame), max_bytes)
    return frame


class Decoder(Generic[M]):
    """Reads frames that must each hold one message of a union of `Message` structs.

    The type argument can't be inferred from a union: write `decoder: Decoder[FromClient] = Decoder(FromClient)`.
    """

    def __init__(self, union: Any, *, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._union = union
        self._max_bytes = max_bytes

    @property
    def max_bytes(self) -> int:
        """Longest frame that is taken."""
        return self._max_bytes

    def decode(self, data: bytes) -> M:
        """The message in `data`. Raises BadMessage, and nothing else, whatever the bytes are."""
        if len(data) > self._max_bytes:
            raise BadMessage(f"frame of {len(data):,} bytes; at most {self._max_bytes:,} are taken")
        obj = _unpack(data)
        try:
            message: M = msgspec.convert(obj, type=self._union, strict=True, builtin_types=(bytes,))
        except msgspec.ValidationError as error:
            raise BadMessage(_without_payload(str(error))) from None
        except RecursionError:
            raise BadMessage("nested too deeply") from None
        return message


class _Budget:
    """Counts list and map entries while they are unpacked."""

    def __init__(self) -> None:
        self._left = MAX_TOTAL_ITEMS

    def spend(self, container: Any) -> Any:
        self._left -= 1 + len(container)
        if self._left < 0:
            raise BadMessage(f"more than {MAX_TOTAL_ITEMS:,} entries")
        return container


def _refuse_ext(code: int, data: bytes) -> NoReturn:
    raise BadMessage("ext type")


def _unpack(data: bytes) -> Any:
    # No list or map has more entries than the frame has bytes: a three-byte header can't make us allocate for 65,535.
    size = max(len(data), 1)
    items = min(MAX_CONTAINER_ITEMS, size)
    budget = _Budget()
    unpacker = msgpack.Unpacker(
        raw=False,
        use_list=True,
        strict_map_key=False,  # dict[int, int] fields exist
        ext_hook=_refuse_ext,  # max_ext_len alone lets an ext of no bytes pass
        list_hook=budget.spend,
        object_hook=budget.spend,
        max_buffer_size=size,
        max_str_len=size,
        max_bin_len=size,
        max_array_len=items,
        max_map_len=items,
        max_ext_len=0,
    )
    unpacker.feed(data)
    try:
        obj = unpacker.unpack()
    except BadMessage:
        raise
    except msgpack.OutOfData:
        raise BadMessage("frame ends in the middle of an object" if data else "empty frame") from None
    except (RecursionError, msgpack.StackError):
        raise BadMessage("nested too deeply") from None
    except UnicodeDecodeError:
        raise BadMessage("a string is not UTF-8") from None
    except TypeError:
        raise BadMessage("a map key is a list or a map") from None
    except (ValueError, msgpack.UnpackException) as error:
        # Left are limits ("65536 exceeds max_array_len(65535)") and malformed bytes (FormatError, without a text).
        raise BadMessage(str(error)[:MAX_REASON_CHARS] or "not msgpack") from None
    if unpacker.tell() != len(data):
        raise BadMessage(f"{len(data) - unpacker.tell():,} bytes after the message")
    return obj


def _without_payload(reason: str) -> str:
    """msgspec's words about a value of the wrong type or shape, less the names and values that the sender chose."""
    where = _PATH.search(reason)
    at = f" at {where[1]}" if where else ""
    if reason.startswith("Object contains unknown field"):
        return f"unknown field{at}"
    if reason.startswith(("Invalid value", "Invalid enum value")):
        return f"invalid value{at}"
    return reason[:MAX_REASON_CHARS]
