"""Types of fields that clients may write in several ways. Each is told apart by what it is, so that an error says what is
really wrong with it, and where, instead of all the ways in which it could have been written."""

from collections.abc import Container, Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from gmanager.gateway.reading import shown
from gmanager.wire.messages import MAX_BAD_WORDS, MAX_LOGIT_BIASES, MAX_STOP_STRINGS

TOKEN_END = 2**32
MAX_BIAS = 100


class Wrong(ValueError):
    """What is wrong with a value; `place`: where in it, or which field it is of a whole body."""

    def __init__(self, text: str, *place: str | int) -> None:
        super().__init__(text)
        self.place = place


class Body(BaseModel):
    """An object of a request. Fields that it doesn't know are kept apart (`model_extra`), not refused."""

    model_config = ConfigDict(extra="allow", strict=True)

    def unread(self) -> Iterator[str]:
        """Names of fields that mean nothing here, and of those within its objects. What a message, an item or a block holds is
        not looked at: answers come back with much that nobody needs."""
        yield from self.model_extra or ()
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Body):
                yield from (f"{name}.{inner}" for inner in value.unread())


def others(value: Any, known: Container[str], place: str) -> Iterator[str]:
    """Names in a plain object at `place` that aren't known there."""
    if isinstance(value, dict):
        yield from (f"{place}.{name}" for name in value if name not in known)


def _whole(value: Any) -> Any:
    """16.0 is an integer to JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def token_ids(value: list[Any], *place: str | int) -> list[int]:
    """Raises Wrong at the first that can't be one. Fast: there may be millions."""
    if set(map(type, value)) - {int}:
        at = next(i for i, token in enumerate(value) if type(token) is not int)
        raise Wrong(f"a token id is an integer, got {shown(value[at])}", *place, at)
    if value and not (min(value) >= 0 and max(value) < TOKEN_END):
        at = next(i for i, token in enumerate(value) if not 0 <= token < TOKEN_END)
        raise Wrong(f"token ids are in [0, {TOKEN_END}), got {shown(value[at])}", *place, at)
    return value


def _tokens(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise Wrong(f"a list of token ids is needed, got {shown(value)}")
    return token_ids(value)


def _stop_tokens(value: Any) -> list[int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) > 1024:
        raise Wrong(f"at most 1024 token ids are taken, got {len(value):,}")
    return _tokens(value)


def texts(value: list[Any], what: str) -> list[str]:
    for at, text in enumerate(value):
        if not isinstance(text, str):
            raise Wrong(f"{what} must be a string, got {shown(text)}", at)
        if not text:
            raise Wrong(f"{what} must not be empty", at)
    return value


def _stop(value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, str | list):
        raise Wrong(f"a string or a list of strings is needed, got {shown(value)}")
    if value == "":
        raise Wrong("a stop string must not be empty")
    if isinstance(value, list) and len(value) > MAX_STOP_STRINGS:
        raise Wrong(f"at most {MAX_STOP_STRINGS} stop strings are taken, got {len(value):,}")
    return texts([value] if isinstance(value, str) else value, "a stop string")


def _bad_words(value: Any) -> list[str] | None:
    if not value and value in (None, []):
        return None
    if not isinstance(value, list):
        raise Wrong(f"a list of strings is needed, got {shown(value)}")
    if len(value) > MAX_BAD_WORDS:
        raise Wrong(f"at most {MAX_BAD_WORDS} are taken, got {len(value):,}")
    return texts(value, "a bad word")


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None or value in ([], {}):
        return None
    if not isinstance(value, dict):
        raise Wrong(f"an object of token ids and biases is needed, got {shown(value)}")
    if len(value) > MAX_LOGIT_BIASES:
        raise Wrong(f"at most {MAX_LOGIT_BIASES} tokens are taken, got {len(value):,}")
    found: dict[int, float] = {}
    for name, bias in value.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10 and int(name) < TOKEN_END):
            raise Wrong(f"a token id is an integer in [0, {TOKEN_END}), got {shown(name)}", name[:40])
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise Wrong(f"a bias is a number in [-{MAX_BIAS}, {MAX_BIAS}], got {shown(bias)}", name)
        found[int(name)] = float(bias)
    return found


def _prompt(value: Any) -> str | list[Any]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise Wrong(f"a string, a list of token ids, or a list of those is needed, got {shown(value)}")
    if not value or isinstance(value[0], int | float):
        return token_ids(value)
    kind = type(value[0])
    if kind is not str and kind is not list:
        raise Wrong(f"a prompt is a string or a list of token ids, got {shown(value[0])}", 0)
    for at, prompt in enumerate(value):
        if type(prompt) is not kind:
            want = "strings" if kind is str else "lists of token ids"
            raise Wrong(f"prompts of one request are all of one kind, here {want}, got {shown(prompt)}", at)
        if kind is list:
            token_ids(list(prompt), at)
    return value


def _spread(value: Any) -> int | str | None:
    value = _whole(value)
    if value is None or value in ("auto", "all"):
        return value  # type: ignore[no-any-return]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise Wrong(f'a number in [1, {2**31}), "auto" or "all" is needed, got {shown(value)}')
    return value


_Id = Annotated[int, Field(ge=0, lt=TOKEN_END)]
_StopSchema = str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)] | None
_WordsSchema = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_BAD_WORDS)] | None
_BiasSchema = dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]] | None
_PromptSchema = str | list[_Id] | list[str] | list[list[_Id]]
_SpreadSchema = Annotated[int, Field(ge=1, lt=2**31)] | Literal["auto", "all"] | None

WHOLE = BeforeValidator(_whole)
Tokens = Annotated[list[int], PlainValidator(_tokens, json_schema_input_type=list[_Id])]
StopTokens = Annotated[list[int] | None, PlainValidator(_stop_tokens, json_schema_input_type=list[_Id] | None)]
Stop = Annotated[list[str] | None, PlainValidator(_stop, json_schema_input_type=_StopSchema)]
BadWords = Annotated[list[str] | None, PlainValidator(_bad_words, json_schema_input_type=_WordsSchema)]
LogitBias = Annotated[dict[int, float] | None, PlainValidator(_logit_bias, json_schema_input_type=_BiasSchema)]
Prompts = Annotated[str | list[Any], PlainValidator(_prompt, json_schema_input_type=_PromptSchema)]
Spread = Annotated[int | Literal["auto", "all"] | None, PlainValidator(_spread, json_schema_input_type=_SpreadSchema)]
