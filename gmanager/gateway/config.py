"""What the gateway is told when it starts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gmanager.wire.codec import MAX_FRAME_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """All that a gateway is told. Raises ValueError for a value that makes no sense."""

    gmanager: str = "tcp://127.0.0.1:5570"
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Any of them opens every route but /health. None: all are open."""
    max_body_bytes: int = MAX_FRAME_BYTES
    max_concurrency: int = 1024
    """Most requests for tokens that are under way at once."""
    max_prompts: int = 256
    """Most prompts in one request."""
    max_n: int = 16
    """Most answers to one prompt."""
    allow_origins: tuple[str, ...] = ()
    """Whose pages may ask from a browser (CORS); "*": all."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Other names of models, and which one is meant."""
    strict: bool = False
    """Unknown fields are refused, not ignored."""
    trust_special_tokens: bool = False
    """Special tokens in messages are special, not text: who may write may end his turn and speak as anybody."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"the port must be in [0, 65536), got {self.port}")
        for name in ("max_body_bytes", "max_concurrency", "max_prompts", "max_n"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for origin in self.allow_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(f"an origin is * or SCHEME://HOST[:PORT], got {origin!r}")
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise ValueError("an API key is not empty, and of printable ASCII characters")


def read_keys(file: Path) -> list[str]:
    """API keys, one a line. Raises OSError, and ValueError if there is none: what was to be locked must not stand open."""
    keys = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not keys:
        raise ValueError(f"{file} holds no API key")
    return keys


def parse_aliases(texts: Iterable[str]) -> dict[str, str]:
    """`ALIAS=NAME` each. Raises ValueError."""
    aliases: dict[str, str] = {}
    for text in texts:
        alias, _, name = text.partition("=")
        if not alias or not name:
            raise ValueError(f"an alias is ALIAS=NAME, got {text!r}")
        if aliases.setdefault(alias, name) != name:
            raise ValueError(f"alias {alias!r} stands for {aliases[alias]!r} and for {name!r}")
    return aliases


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[V6]:PORT` or `:PORT`. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal():
        raise ValueError(f"an address is HOST:PORT, got {text!r}")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)
