"""`python -m gmanager`: the global manager of one service."""

import argparse
import asyncio
import signal
import sys
from functools import partial
from pathlib import Path
from typing import get_args

import uvloop

from gmanager.config import GManagerConfig, PolicyName, parse_spread
from gmanager.journal import Journal
from gmanager.server import Server
from gmanager.wire import logs
from gmanager.wire.errors import AddressError, Fenced, JournalError

BAD_USAGE = 2
FENCED = 1


def parse(arguments: list[str] | None = None) -> tuple[GManagerConfig, tuple[str, logs.Style]]:
    """The configuration, and the level and format of the log. Exits with BAD_USAGE and a reason if the arguments are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m gmanager",
        description="Global manager: membership, admission and placement of a distattn service, and its clients' door.",
    )
    default = GManagerConfig()
    add_seconds = partial(parser.add_argument, type=float, metavar="SECONDS")
    parser.add_argument("--bind", default=default.bind, help="address to listen at; port * takes a free one (%(default)s)")
    parser.add_argument(
        "--spread",
        default=str(default.spread),
        help="least number of instances a prompt's KV is spread over: auto, all or a number (%(default)s)",
    )
    parser.add_argument(
        "--policy",
        default=default.policy,
        help=f"who decides where KV lies and what moves: {', '.join(get_args(PolicyName))} (%(default)s)",
    )
    add_seconds(
        "--max-queue-wait",
        default=default.max_queue_wait_s,
        help="longest time that a request waits for a ready cell or for memory (%(default)g)",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=default.max_queue,
        metavar="REQUESTS",
        help="most requests that wait for a cell or for memory; more are refused (%(default)d)",
    )
    parser.add_argument(
        "--max-queue-bytes",
        type=int,
        default=default.max_queue_bytes,
        metavar="BYTES",
        help="most that the prompts of waiting requests take together; more are refused (%(default)d)",
    )
    add_seconds(
        "--max-stall",
        default=default.max_stall_s,
        help="a running request of which nothing is heard for so long fails (%(default)g)",
    )
    add_seconds(
        "--resume",
        default=default.resume_s,
        help="how long requests of a client that is gone go on, for it to attach again; 0: they end at once (%(default)g)",
    )
    add_seconds(
        "--max-pause",
        default=default.max_pause_s,
        help="a client that does not read for so long is taken for gone (%(default)g)",
    )
    add_seconds(
        "--slo-ttft",
        help="objective: longest time from a request's arrival to its first token; one that would miss it is refused (none)",
    )
    add_seconds(
        "--slo-tpot", help="objective: longest time between its tokens, in the mean; one that would miss it is refused (none)"
    )
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="file that keeps requests and their tokens, for a gManager that follows this one (none)",
    )
    logs.add_flags(parser)
    given = parser.parse_args(arguments)
    try:
        config = GManagerConfig(
            bind=given.bind,
            spread=parse_spread(given.spread),
            policy=given.policy,
            max_queue_wait_s=given.max_queue_wait,
            max_queue=given.max_queue,
            max_queue_bytes=given.max_queue_bytes,
            max_stall_s=given.max_stall,
            resume_s=given.resume,
            max_pause_s=given.max_pause,
            journal=given.journal,
            slo_ttft_s=given.slo_ttft,
            slo_tpot_s=given.slo_tpot,
        )
    except ValueError as error:
        parser.error(str(error))
    return config, (given.log_level, given.log_format)


async def serve(config: GManagerConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises AddressError, JournalError; Fenced is the one that comes late."""
    server = Server(config, journal=None if config.journal is None else Journal.open(config.journal))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    server.start()
    print(f"gManager listens at {server.address}", flush=True)
    await server.run()


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 after SIGTERM or SIGINT, BAD_USAGE if address or journal can't be taken, FENCED if another one has the
    journal."""
    config, (log_level, log_format) = parse(arguments)
    logs.configure(log_level, log_format, program="gmanager")
    try:
        uvloop.run(serve(config))
    except Fenced as error:
        print(f"gmanager: {error}", file=sys.stderr)
        return FENCED
    except (AddressError, JournalError) as error:
        print(f"gmanager: {error}", file=sys.stderr)
        return BAD_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
