"""A cell on this machine whose instances a benchmark takes away and starts again."""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop
from _measure import facts

from gmanager import AsyncClient, DistattnError
from gmanager.cli.process import ServiceError
from gmanager.cli.service import BLOCK_SIZE, Service, ServiceConfig, running


def parser_of(description: str | None, *, prompt_tokens: int) -> argparse.ArgumentParser:
    """With the flags that `run_with_cell` reads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory, a GGUF file or a hub id")
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=prompt_tokens)
    parser.add_argument("--vocab-size", type=int, default=256, help="random ids below it make the prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-tokens", type=int, help="of each instance (twice --prompt-tokens)")
    parser.add_argument("--device", choices=tuple(BLOCK_SIZE), default="cpu")
    return parser


def run_with_cell(
    args: argparse.Namespace, measure: Callable[[Service, AsyncClient], Awaitable[bool]], *, copy_tokens: int | None = None
) -> int:
    """Measure at a service that is ready. The exit code: 0, 1 if that went wrong, 2 if the service did not come up."""

    async def within(logs: Path) -> bool:
        async with running(config_of(args, logs, copy_tokens=copy_tokens)) as service, AsyncClient(service.address) as client:
            return await measure(service, client)

    return run_within(within)


def config_of(args: argparse.Namespace, logs: Path, **more: Any) -> ServiceConfig:
    """Of a service as the flags say. `more`: other fields."""
    return ServiceConfig(
        model=args.model,
        instances=args.instances,
        kv_tokens=args.kv_tokens or 2 * args.prompt_tokens,
        device=args.device,
        dtype="float32" if args.device == "cpu" else "auto",
        threads=max(1, len(os.sched_getaffinity(0)) // args.instances),
        logs=logs,
        **more,
    )


def run_within(measure: Callable[[Path], Awaitable[bool]]) -> int:
    """Measure, with a folder for logs. The exit code: 0, 1 if that went wrong, 2 if a service did not come up."""
    name = Path(sys.argv[0]).stem

    async def within(logs: Path) -> bool:
        return await measure(logs)

    print(facts())
    with tempfile.TemporaryDirectory() as logs:
        try:
            return 0 if uvloop.run(within(Path(logs))) else 1
        except ServiceError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        except DistattnError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1


async def until_whole(client: AsyncClient, size: int) -> None:
    while [(cell.state, cell.size) for cell in (await client.stats()).cells] != [("ready", size)]:
        await asyncio.sleep(0.1)
