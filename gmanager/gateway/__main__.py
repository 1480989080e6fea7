"""`python -m gmanager.gateway`: the OpenAI-compatible HTTP server of one service."""

import argparse
import asyncio
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
import uvloop

from gmanager.gateway.app import make_app
from gmanager.gateway.backend import Backend
from gmanager.gateway.config import GatewayConfig, parse_address, parse_aliases, read_keys
from gmanager.wire import logs
from gmanager.wire.channel import check_address
from gmanager.wire.errors import AddressError

BAD_USAGE = 2
GRACE_S = 5
"""For streams that still run when the gateway is asked to end."""


def parse(arguments: list[str] | None = None) -> tuple[GatewayConfig, tuple[str, logs.Style]]:
    """The configuration, and the level and format of the log. Exits with BAD_USAGE and a reason if the arguments are wrong."""
    default = GatewayConfig()
    parser = argparse.ArgumentParser(prog="python -m gmanager.gateway", description=__doc__)
    parser.add_argument("--gmanager", default=default.gmanager, help="address of the gManager (%(default)s)")
    parser.add_argument(
        "--bind",
        default=f"{default.host}:{default.port}",
        metavar="HOST:PORT",
        help="where to listen; port 0: any (%(default)s)",
    )
    parser.add_argument("--api-key", action="append", default=[], help="a key that opens the door; may be given again")
    parser.add_argument("--api-key-file", type=Path, help="the same from a file, one a line")
    parser.add_argument("--max-body-bytes", type=int, default=default.max_body_bytes, help="(%(default)d)")
    parser.add_argument(
        "--max-concurrency", type=int, default=default.max_concurrency, help="most requests under way at once (%(default)d)"
    )
    parser.add_argument("--max-prompts", type=int, default=default.max_prompts, help="most prompts in a request (%(default)d)")
    parser.add_argument("--max-n", type=int, default=default.max_n, help="most answers to one prompt (%(default)d)")
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="whose pages may ask from a browser; *: all; may be given again",
    )
    parser.add_argument(
        "--model-alias",
        action="append",
        default=[],
        metavar="ALIAS=NAME",
        help="another name of a served model; may be given again",
    )
    parser.add_argument("--trust-special-tokens", action="store_true", help="special tokens in messages are special, not text")
    parser.add_argument("--strict", action="store_true", help="refuse fields that aren't known, instead of ignoring them")
    logs.add_flags(parser)
    given = parser.parse_args(arguments)
    try:
        check_address(given.gmanager)
        host, port = parse_address(given.bind)
        config = GatewayConfig(
            gmanager=given.gmanager,
            host=host,
            port=port,
            api_keys=(*given.api_key, *([] if given.api_key_file is None else read_keys(given.api_key_file))),
            max_body_bytes=given.max_body_bytes,
            max_concurrency=given.max_concurrency,
            max_prompts=given.max_prompts,
            max_n=given.max_n,
            allow_origins=tuple(given.allow_origin),
            aliases=parse_aliases(given.model_alias),
            strict=given.strict,
            trust_special_tokens=given.trust_special_tokens,
        )
    except (ValueError, AddressError, OSError) as error:
        parser.error(str(error))
    return config, (given.log_level, given.log_format)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 after SIGTERM or SIGINT, BAD_USAGE if the address can't be taken."""
    config, (log_level, log_format) = parse(arguments)
    logs.configure(log_level, log_format, program="gateway")
    try:
        listener = _listen(config.host, config.port)
    except OSError as error:
        print(f"gateway: can't listen at {config.host}:{config.port}: {error.strerror}", file=sys.stderr)
        return BAD_USAGE
    host, port = listener.getsockname()[:2]
    print(f"gateway listens at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    uvloop.run(serve(config, listener, access_log=log_level == "debug"))
    return 0


async def serve(config: GatewayConfig, listener: socket.socket, *, access_log: bool) -> None:
    """Serve until SIGTERM or SIGINT; streams that still run then have GRACE_S to end."""
    settings = uvicorn.Config(
        make_app(config, Backend(config.gmanager, aliases=config.aliases)),
        log_config=None,
        access_log=access_log,
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
    )
    server = _Server(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, server.stop)
    await server.serve(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn raises a signal again when it has ended: a gateway that was asked to end would seem to have died of it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """End soon; the second time, at once."""
        self.force_exit = self.should_exit
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    """Taken before anything else starts, so that a port in use is said at once."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # with the protocol named: asyncio turns Nagle's algorithm off (40 ms for an answer in two writes) only where it sees TCP
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener


if __name__ == "__main__":
    sys.exit(main())
