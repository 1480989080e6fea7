"""`distattn chat` and `distattn generate`: text to and from a terminal, or a pipe."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable

from gmanager.client import AsyncClient, Chunk
from gmanager.wire.errors import RequestRefused
from gmanager.wire.messages import ChatMessage, SamplingParams

CONNECT_S = 3.0
SHOWN_CHARS = 1000
"""Of the text that is gone on from: a book would only scroll by."""
Ask = Callable[[AsyncClient], AsyncGenerator[Chunk, None]]


def continue_text(address: str, text: str, params: SamplingParams, model: str | None) -> None:
    """Print a text and how it goes on. Raises DistattnError; Ctrl-C ends it."""
    try:
        asyncio.run(
            _print(address, lambda client: client.generate(text, params, model=model, wait_for_cell=False), before=shown(text))
        )
    except KeyboardInterrupt:
        print()


def converse(address: str, params: SamplingParams, *, system: str | None, model: str | None) -> None:
    """Turns from standard input, one a line, until it ends. Raises DistattnError; at a terminal a refused turn doesn't end it.

    Each turn has a connection of its own: while somebody thinks, nothing needs to be kept alive. One before all of them tells
    whether anybody is there to talk to.
    """
    try:
        asyncio.run(_greet(address))
    except KeyboardInterrupt:
        return
    turns = [] if system is None else [ChatMessage(role="system", content=system)]
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        turns.append(ChatMessage(role="user", content=line))
        try:
            answer = asyncio.run(_print(address, lambda client: client.chat(turns, params, model=model, wait_for_cell=False)))
        except KeyboardInterrupt:
            print(" (stopped)")
            turns.pop()  # as if it had not been asked
            continue
        except RequestRefused as error:
            if not sys.stdin.isatty():
                raise
            print(f"refused: {error}", file=sys.stderr)
            turns.pop()
            continue
        turns.append(ChatMessage(role="assistant", content=answer))


def _read_line() -> str | None:
    """None: there is no more."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print()
        return None


def shown(text: str) -> str:
    """What is shown of a text that is gone on from: all of it, or the end of a long one."""
    return text if len(text) <= SHOWN_CHARS else f"\u2026{text[-SHOWN_CHARS:]}"


async def _greet(address: str) -> None:
    async with AsyncClient(address, connect_timeout_s=CONNECT_S) as client:
        if all(cell.state == "forming" for cell in (await client.stats()).cells):
            raise RequestRefused("no instances are ready to serve", "not_ready")


async def _print(address: str, ask: Ask, before: str = "") -> str:
    """Print an answer as it comes, and return it; `before` it, once it comes. Raises DistattnError."""
    texts: list[str] = []
    async with AsyncClient(address, connect_timeout_s=CONNECT_S) as client:
        async for chunk in ask(client):
            print(end="" if texts else before)
            texts.append(chunk.text)
            print(chunk.text, end="", flush=True)
    print()
    return "".join(texts)
