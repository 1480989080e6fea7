"""What stands before all routes: keys, body size, and how many requests are under way. Plain ASGI."""

import asyncio
import hashlib
import hmac
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec

from gmanager.gateway.config import GatewayConfig
from gmanager.gateway.errors import ApiError, error_body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

Answers = Counter[tuple[str, int]]
"""How many there were, by path and status."""

BODY_SILENCE_S = 30.0
"""A body that is announced and doesn't come, or not on, is given up after so long: it holds a place among those under way."""

OPEN_PATHS = frozenset({"/", "/docs", "/health", "/ping"})


@dataclass(slots=True)
class Load:
    """What is under way."""

    in_flight: int = 0


class Door:
    """Lets requests in, or answers them with an error."""

    def __init__(self, app: App, config: GatewayConfig, paths: frozenset[str], answers: Answers, load: Load) -> None:
        """`paths`: those that `answers` counts by their names; whatever else is asked for is counted together, as "other"."""
        self._app = app
        self._config = config
        self._paths = paths
        self._answers = answers
        # of equal length, so that comparing tells nothing of a key's length either
        self._keys = [hashlib.sha256(key.encode()).digest() for key in config.api_keys]
        self._load = load

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        if scope["method"] == "HEAD":
            scope["method"], send = "GET", _without_body(send)
        send = self._counted(scope, send)
        headers: dict[bytes, bytes] = dict(scope["headers"])
        try:
            if scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
                self._check_key(headers)
            self._check_length(headers.get(b"content-length", b"0"))
            if self._load.in_flight >= self._config.max_concurrency and scope["method"] == "POST":
                text = f"{self._load.in_flight} requests are under way, as many as may (max-concurrency)"
                raise ApiError(429, text, code="max_concurrency")
        except ApiError as error:
            await answer(send, error, scope["path"])
            return
        is_counted = scope["method"] == "POST"
        self._load.in_flight += is_counted
        try:
            await self._app(scope, self._bounded(receive), send)
        finally:
            self._load.in_flight -= is_counted

    def _counted(self, scope: Scope, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # a path with a name in it is counted as its route, which is known once the request has got that far
                path = getattr(scope.get("route"), "path", scope["path"])
                self._answers[path if path in self._paths else "other", message["status"]] += 1
            await send(message)

        return counted

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if not self._keys:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = [key] if scheme.lower() == b"bearer" else []
        given += [headers[b"x-api-key"]] if b"x-api-key" in headers else []
        digests = [hashlib.sha256(key.strip()).digest() for key in given]
        # every key is compared, so that time doesn't tell which one came close
        matches = [hmac.compare_digest(digest, known) for digest in digests for known in self._keys]
        if not any(matches):
            text = "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY"
            raise ApiError(401, text, code="invalid_api_key")

    def _check_length(self, given: bytes) -> None:
        digits = given.lstrip(b"0")
        if not digits.isdigit():
            return
        if len(digits) > 20:  # int() takes no more than some thousands
            raise self._too_large(f"10^{len(digits) - 1} or more")
        if int(digits) > self._config.max_body_bytes:
            raise self._too_large(f"{int(digits):,}")

    def _too_large(self, size: str) -> ApiError:
        return ApiError(413, f"the body has {size} bytes; at most {self._config.max_body_bytes:,} are taken")

    def _bounded(self, receive: Receive) -> Receive:
        """A body that comes in pieces, without saying its length, is counted; one that stays away is not waited for."""
        size, is_whole = 0, False

        async def counted() -> Message:
            nonlocal size, is_whole
            if is_whole:
                return await receive()  # that the client has gone
            try:
                async with asyncio.timeout(BODY_SILENCE_S):
                    message = await receive()
            except TimeoutError:
                text = f"nothing of the body has come for {BODY_SILENCE_S:.0f} s, after {size:,} bytes"
                raise ApiError(408, text) from None
            is_whole = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self._config.max_body_bytes:
                raise self._too_large(f"over {self._config.max_body_bytes:,}")
            return message

        return counted


def _without_body(send: Send) -> Send:
    """HEAD is answered as GET is, less the body."""

    async def bare(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return bare


async def answer(send: Send, error: ApiError, path: str) -> None:
    """Send an error as the whole answer."""
    body = msgspec.json.encode(error_body(error, path))
    headers = {"content-type": "application/json", "content-length": str(len(body))} | dict(error.headers or {})
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status_code, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
