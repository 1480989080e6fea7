"""Start one instance: `torchrun --nproc-per-node 1 -m instance --gmanager tcp://... --cell-size N --model ...`.

Exit codes: 0 when asked to end (SIGTERM, SIGINT, a drain), 1 when something broke or the cell ended, 2 for wrong settings.
"""

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import uvloop

from distattn.exchange import ExchangeError
from gmanager.wire import logs
from gmanager.wire.channel import ZmqTransport
from gmanager.wire.errors import AddressError
from gmanager.wire.scaling import parse_scaling
from gmanager.wire.sizes import parse_disk, parse_elastic, parse_layers, parse_size
from instance import config as settings
from instance.checkpoint import CheckpointError
from instance.config import InstanceConfig, Launch
from instance.errors import EpochEnded, InstanceError, UnsupportedModel, WasDrained
from instance.follower import Follower, meet_first
from instance.memory import TooLittleMemory
from instance.processors import queues_of_their_own
from instance.server import Instance
from instance.sharing import SPLITS
from instance.start import lead, load

T = TypeVar("T")

REPEATED_S = 1.0
"""A SIGTERM that soon after the first is the same one: torchrun sends it to its workers twice, milliseconds apart."""

_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2)."""

log = logs.get_logger("instance")


def parse(arguments: list[str], launch: Launch) -> InstanceConfig:
    """The settings; "auto" is resolved here, once. Raises ValueError for a wrong one, SystemExit for an unknown flag."""
    parser = argparse.ArgumentParser("instance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gmanager", required=True, help="tcp://host:port of the gManager")
    parser.add_argument("--model", required=True, help="a directory, a hub id or a GGUF file")
    parser.add_argument(
        "--served-model-name",
        action="extend",
        nargs="+",
        metavar="NAME",
        help="what requests call the model (as --model says); more are other names of it",
    )
    pool = parser.add_mutually_exclusive_group()
    pool.add_argument("--kv-tokens", type=int, help="tokens of KV this instance holds, its own and lent (needed on CPU)")
    pool.add_argument("--kv-memory", type=float, help=f"or, on GPU: fill this part of its memory ({settings.GPU_KV_MEMORY})")
    parser.add_argument("--dtype", default="auto", choices=settings.DTYPES)
    parser.add_argument(
        "--quantize",
        default="none",
        choices=settings.QUANTIZE,
        help="weights of linear layers become numbers of 8 bits at load, floating (fp8) or whole (int8) (%(default)s)",
    )
    parser.add_argument("--max-context", type=int, help="tokens of the longest sequence served (as the model's config says)")
    parser.add_argument(
        "--rope-scaling",
        metavar="KIND:F",
        help="rotary frequencies for texts F times as long: yarn:4, linear:2, dynamic:2; none (what the model's config says)",
    )
    parser.add_argument(
        "--kv-format",
        default="auto",
        choices=settings.KV_FORMATS,
        help="of a model with latent attention: latents, or with plain the keys and values of all its heads (%(default)s)",
    )
    parser.add_argument(
        "--kv-dtype",
        default="auto",
        choices=settings.KV_DTYPES,
        help="how KV is stored: in the model's dtype, or in fp8 or int8, half the bytes of 16 bits (%(default)s)",
    )
    parser.add_argument(
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="ranks of this torchrun, one GPU each, between which the model and the KV of an instance are split (%(default)s)",
    )
    parser.add_argument(
        "--pp",
        type=int,
        default=1,
        metavar="N",
        help="stages, of --tp ranks each, between which the model's layers are split (%(default)s)",
    )
    parser.add_argument(
        "--pp-layers", metavar="A,B,...", help="layers of each stage, as 20,12 where devices differ (as even as can be)"
    )
    parser.add_argument(
        "--elastic-tp",
        default="off",
        metavar="ROWS",
        help="let the instances of the cell share a decode step's dense layers while it has at most so many rows; auto: while "
        "that is faster, as they measure it (%(default)s)",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--gpu", type=int, help="index of its GPU, among those that are seen (LOCAL_RANK)")
    parser.add_argument("--block-size", type=int, help="tokens in a block (64 on GPU, 16 on CPU)")
    parser.add_argument("--chunk-tokens", type=int, help="most prompt rows in one step (8192 on GPU, 512 on CPU)")
    parser.add_argument(
        "--mixed-chunk-tokens",
        type=int,
        help="the same while decodes run, counted where a prompt begins (24576 on GPU, --chunk-tokens on CPU)",
    )
    parser.add_argument(
        "--decode-processors",
        type=int,
        nargs="*",
        default=SPLITS,
        metavar="N",
        help=f"GPU processors that decodes may have beside prompts ({' '.join(map(str, SPLITS))})",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (this machine's cores, shared by --cell-size)")
    parser.add_argument(
        "--copy-tokens",
        type=int,
        default=16,
        help="tokens of KV that are copied beside each step, when runs move to other instances",
    )
    parser.add_argument(
        "--host-memory",
        default="0",
        metavar="SIZE",
        help="host memory for KV that requests leave and the pool has no room for, as 64G (%(default)s: none)",
    )
    parser.add_argument(
        "--disk", metavar="DIR:SIZE", help="disk for what host memory has no room for, as /scratch:500G (none); scratch"
    )
    parser.add_argument(
        "--check-cache",
        action="store_true",
        help="compare cached KV with what was written, each time before it is shared: reads all of it",
    )
    parser.add_argument(
        "--grace-s",
        type=float,
        default=20,
        help="after SIGTERM: how long to wait until what is here has moved to others; 0: not at all",
    )
    parser.add_argument("--host", default="127.0.0.1", help="where this instance's own sockets listen")
    parser.add_argument("--cell", default="main", help="name of the cell to join")
    parser.add_argument("--cell-size", type=int, help="with how many instances the cell begins (WORLD_SIZE)")
    parser.add_argument(
        "--role",
        default="mixed",
        help="mixed, prefill or decode, for the gManager's policy 'split'; several instances of a torchrun: one for each, "
        "with commas between (%(default)s)",
    )
    parser.add_argument("--id", type=int, help="number in the cell that it gets if that is free (the lowest that is)")
    parser.add_argument(
        "--connect-timeout-s",
        type=float,
        default=120,
        help="how long to wait for a gManager, at first or when it is lost",
    )
    parser.add_argument("--cache-dir", type=Path, help="where converted checkpoints are kept")
    logs.add_flags(parser)
    args = parser.parse_args(arguments)
    gpu = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    launch, place = launch.split(args.tp, args.pp, () if args.pp_layers is None else parse_layers(args.pp_layers))
    if launch.local_rank < place.rank:
        raise ValueError(
            f"{place.flags}: the ranks of an instance are of one machine, and this torchrun has {launch.local_rank + 1} here"
        )
    for flag, given, number in (("--gpu", args.gpu, launch.local_rank - place.rank), ("--id", args.id, launch.rank)):
        if given is not None and number > 0:
            raise ValueError(f"{flag} {given} is one instance's, and this torchrun has several: start one torchrun for each")
    index = launch.local_rank if args.gpu is None else args.gpu + place.rank
    if gpu and torch.cuda.device_count() <= index:
        name = "LOCAL_RANK" if args.gpu is None else "--gpu"
        raise ValueError(f"{name} {index} finds no CUDA device: {torch.cuda.device_count()} are seen")
    cell_size = _given(args.cell_size, launch.world_size)
    chunk_tokens = _given(args.chunk_tokens, settings.GPU_CHUNK_TOKENS if gpu else settings.CPU_CHUNK_TOKENS)
    names = list(dict.fromkeys(args.served_model_name or ()))
    disk, disk_bytes = (None, 0) if args.disk is None else parse_disk(args.disk)
    return InstanceConfig(
        gmanager=args.gmanager,
        model=args.model,
        served_model_name=names[0] if names else None,
        other_names=tuple(names[1:]),
        kv_tokens=args.kv_tokens,
        kv_memory=_given(args.kv_memory, settings.GPU_KV_MEMORY) if gpu and args.kv_tokens is None else args.kv_memory,
        launch=launch,
        device="cuda" if gpu else "cpu",
        gpu=index if gpu else 0,
        dtype=args.dtype,
        quantize=args.quantize,
        max_context=args.max_context,
        rope_scaling=None if args.rope_scaling is None else parse_scaling(args.rope_scaling),
        kv_format=args.kv_format,
        kv_dtype=args.kv_dtype,
        elastic_tp=parse_elastic(args.elastic_tp),
        block_size=_given(args.block_size, settings.GPU_BLOCK_SIZE if gpu else settings.CPU_BLOCK_SIZE),
        chunk_tokens=chunk_tokens,
        mixed_chunk_tokens=_given(args.mixed_chunk_tokens, settings.GPU_MIXED_CHUNK_TOKENS if gpu else chunk_tokens),
        decode_processors=tuple(sorted(set(args.decode_processors))),
        threads=_given(args.threads, settings.default_threads(cell_size * place.ranks)),
        copy_tokens=args.copy_tokens,
        host_memory=parse_size(args.host_memory),
        disk=disk,
        disk_bytes=disk_bytes,
        check_cache=args.check_cache,
        grace_s=args.grace_s,
        host=args.host,
        cell=args.cell,
        cell_size=cell_size,
        id=args.id,
        role=settings.role_of(args.role, launch.rank, launch.world_size),
        place=place,
        meeting=None if place.ranks == 1 else settings.meeting_of(launch),
        cache_dir=args.cache_dir,
        connect_timeout_s=args.connect_timeout_s,
        log_level=args.log_level,
        log_format=args.log_format,
    )


async def serve(config: InstanceConfig) -> None:
    """Load the model and serve until a signal asks to end. Raises what broke."""
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[str] = loop.create_future()

    instance: Instance | None = None
    repeats_until = 0.0

    def on_signal(number: signal.Signals) -> None:
        """The first SIGTERM leaves time to be emptied; a second one, or Ctrl-C, doesn't."""
        nonlocal repeats_until
        is_first = not asked.done()
        if is_first:
            asked.set_result(number.name)
            repeats_until = loop.time() + REPEATED_S
        elif number == signal.SIGTERM and loop.time() < repeats_until:
            return
        if instance is not None:
            end = instance.leave if is_first and number == signal.SIGTERM else instance.stop
            end(number.name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    log.info("loading", model=config.model)
    # a pool of its own: a signal ends the process without waiting for what is being loaded
    loading = loop.run_in_executor(ThreadPoolExecutor(1, thread_name_prefix="load"), load, config)
    first: list[asyncio.Future[Any]] = [loading, asked]
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    if asked.done():
        log.info("asked to end while the model was being loaded", signal=asked.result())
        return
    loaded, transport = loading.result(), ZmqTransport()
    starting: asyncio.Task[Instance | Follower] = asyncio.create_task(
        meet_first(config, loaded, transport) if config.place.rank else lead(config, loaded, transport)
    )
    ready: list[asyncio.Future[Any]] = [starting, asked]
    await asyncio.wait(ready, return_when=asyncio.FIRST_COMPLETED)
    if asked.done():
        starting.cancel()
        log.info("asked to end before it was ready", signal=asked.result())
        return
    started = starting.result()
    if isinstance(started, Follower):
        await started.run()  # until the first rank ends, whatever signals come
        return
    instance = started
    try:
        await instance.run()
    except WasDrained as left:
        log.info("drained", reason=str(left))
    except (InstanceError, ExchangeError) as error:
        if not asked.done():
            raise
        log.info("asked to end", signal=asked.result(), meanwhile=str(error))  # others that were asked too may have left first


def main() -> int:
    queues_of_their_own()
    try:
        config = parse(sys.argv[1:], Launch.from_environment(os.environ))
    except ValueError as error:
        print(f"instance: {error}", file=sys.stderr)
        return 2
    logs.configure(config.log_level, config.log_format, program="instance", rank=_given(config.id, config.launch.rank))
    # torchrun gives each worker a session of its own: who kills torchrun's would leave them, and their GPUs' memory taken
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        uvloop.run(serve(config))
    except (CheckpointError, UnsupportedModel, TooLittleMemory, AddressError) as error:
        log.error("instance ends", reason=str(error))
        return 2
    except KeyboardInterrupt:  # before there was a handler
        return 0
    except EpochEnded as error:  # the gManager's log has what it was, and whether it was an error
        log.warning("instance ends", reason=str(error))
        return 1
    except InstanceError as error:
        log.error("instance ends", reason=str(error))
        return 1
    except Exception as error:
        log.exception("instance failed", reason=f"{type(error).__name__}: {error}")
        return 1
    return 0


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: a device thread that waits for a lost peer must not hold the process
    os._exit(code)
