"""What `simulate.py validate` compares itself with: a service on the CPU, of a random model whose steps are what counts."""

import asyncio
import contextlib
import io
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from _trace import Arrival
from bench_serve import Group, summarise
from simulation.times import LaneTimes, Profile
from simulation.validate import Measured, Replayed, Sweep, fit, level, replay_counted

from gmanager import AsyncClient
from gmanager.cli.service import BLOCK_SIZE, ServiceConfig, running

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 65536,
    "rope_theta": 500000.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Some 11M parameters: a row takes about a millisecond of a core, a chunk a few tenths of a second."""
CHUNK_TOKENS = 512
"""The instances' default on the CPU (`instance.config`)."""
TIMEOUT_S = 600.0


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """The trace once for real and once simulated."""

    real: Group
    simulated: Group
    profile: Profile
    """With the step times that were measured in it."""
    prefill_s: float
    """That the lanes' steps took in the service, all instances' together."""
    decode_s: float
    real_ttft_s: list[float | None]
    """Of each request of the trace."""
    simulated_ttft_s: list[float | None]


def make_model(folder: Path) -> Path:
    """A checkpoint of random weights; that of an earlier call, if it is there."""
    from make_dummy_model import write

    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        with contextlib.redirect_stderr(io.StringIO()):
            write(str(folder), folder, "float32")
    return folder


def reach() -> int:
    """As `instance.model.Model.reach` has it, of `CONFIG`."""
    hidden, layers, heads = CONFIG["hidden_size"], CONFIG["num_hidden_layers"], CONFIG["num_attention_heads"]
    kv = hidden * CONFIG["num_key_value_heads"] // heads
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * CONFIG["intermediate_size"] + 2 * hidden
    rest = layers * layer + hidden + CONFIG["vocab_size"] * hidden
    return int(2 * rest // (4 * hidden * layers))


def untimed(kv_tokens: int, others: float) -> Profile:
    """An instance whose step times are still to be measured, on this machine's cores."""
    return Profile(
        name="CPU, random model",
        source="measured by simulate.py validate",
        decode=LaneTimes(row=0.0, attended=0.0),
        prefill=LaneTimes(row=0.0, attended=0.0),
        cores=float(len(os.sched_getaffinity(0))),
        others=others,
        meet_s=1.0,
        host_s=1.0,
        link_s=1.0,
        kv_tokens=kv_tokens,
        block_size=BLOCK_SIZE["cpu"],
        chunk_tokens=CHUNK_TOKENS,
        mixed_chunk_tokens=CHUNK_TOKENS,
        reach=reach(),
        shrinks=False,
    )


async def validate(
    trace: Sequence[Arrival], *, instances: int, kv_tokens: int, rounds: int, folder: Path
) -> tuple[Measured, list[Round]]:
    """Sweep, replay and simulate. Raises ServiceError and DistattnError; SIGTERM ends it like an exception."""
    if (task := asyncio.current_task()) is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    config = ServiceConfig(
        model=str(await asyncio.to_thread(make_model, folder / "model")),
        instances=instances,
        kv_tokens=kv_tokens,
        threads=max(1, len(os.sched_getaffinity(0)) // instances),
        logs=folder / "logs",
    )
    vocab_size = CONFIG["vocab_size"]
    others = os.getloadavg()[0]  # of the last minute, in which nothing of this was running
    done: list[Round] = []
    async with running(config) as service, AsyncClient(service.address) as client:
        measured = await service.during(Sweep(client, instances, vocab_size).measure())
        for _ in range(rounds):
            replayed = await service.during(replay_counted(client, trace, vocab_size, TIMEOUT_S))
            done.append(await asyncio.to_thread(_simulated, trace, instances, untimed(kv_tokens, others), measured, replayed))
    return measured, done


def _simulated(trace: Sequence[Arrival], instances: int, base: Profile, measured: Measured, replayed: Replayed) -> Round:
    fitted = fit(base, measured, instances)
    profile, outcome = level(fitted, instances, trace, prefill_s=replayed.prefill_s, decode_s=replayed.decode_s)
    return Round(
        real=summarise(replayed.timings)[-1],
        simulated=summarise(outcome.timings)[-1],
        profile=profile,
        prefill_s=replayed.prefill_s,
        decode_s=replayed.decode_s,
        real_ttft_s=[timing.ttft_s for timing in replayed.timings],
        simulated_ttft_s=[timing.ttft_s for timing in outcome.timings],
    )
