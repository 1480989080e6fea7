"""How much memory a model takes, and how many instances hold a context: `python -m instance.size MODEL --context 1M --gpus 2`.

Nothing is loaded and no GPU is needed: the model is built on torch's meta device, which has shapes and no values, and what it
needs is counted as an instance counts it when it starts. Only activations and other use of the GPU, which an instance
measures, are predicted (`instance.memory.predict`).
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from gmanager.wire.scaling import RopeScaling, parse_scaling
from gmanager.wire.sizes import parse_disk, parse_layers, parse_size
from instance import config as settings
from instance.checkpoint import LOAD_ERRORS, CheckpointError, first_line, read_config
from instance.errors import UnsupportedModel
from instance.load import shaped_model
from instance.memory import TooLittleMemory, activation_bytes, predict, tiers_bytes
from instance.model import Model
from instance.needs import Needs, settle_format, settle_shape
from instance.split import Place
from kvstore.tier_storage import slot_bytes

GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20}


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked; numbers are checked when it is built."""

    model: str
    """A directory, a hub id or a GGUF file."""
    context: int | None = None
    """Tokens of one sequence; None: the model's most."""
    instances: int | None = None
    """Of the cell, each on a GPU of its own; None: as many as are needed."""
    device: Literal["cpu", "cuda"]
    gpu_bytes: int = 0
    """Of one GPU, in all."""
    kv_memory: float = settings.GPU_KV_MEMORY
    """Part of it that may be used."""
    kv_tokens: int | None = None
    """Of one instance; None: what the GPU has room for, or on the CPU what the context needs."""
    dtype: settings.DType = "auto"
    quantize: settings.Quantize = "none"
    """As an instance's."""
    max_context: int | None = None
    """Tokens of the longest sequence served; None: as the model's config says."""
    rope_scaling: RopeScaling | None = None
    """Of its rotary frequencies; None: what its config says."""
    kv_format: settings.KVFormatChoice = "auto"
    """As an instance's."""
    kv_dtype: settings.KVDType = "auto"
    """Likewise."""
    tp: int = 1
    """GPUs of each stage of an instance."""
    pp: int = 1
    """Its stages."""
    pp_layers: tuple[int, ...] = ()
    """Layers of each; none: as even as can be."""
    block_size: int
    chunk_tokens: int
    host_memory: int = 0
    disk_bytes: int = 0
    """Of one instance, below its pool."""
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        for flag, value in (
            ("--context", self.context),
            ("--gpus", self.instances),
            ("--tp", self.tp),
            ("--pp", self.pp),
            ("--max-context", self.max_context),
            ("--block-size", self.block_size),
            ("--chunk-tokens", self.chunk_tokens),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be at least 1, got {value}")
        if self.host_memory < 0 or self.disk_bytes < 0:
            raise ValueError(f"--host-memory and --disk must not be negative, got {self.host_memory} and {self.disk_bytes}")
        if self.kv_tokens is not None and self.kv_tokens < self.block_size:
            raise ValueError(f"--kv-tokens {self.kv_tokens} is less than one block of {self.block_size} tokens")
        if not 0 < self.kv_memory < 1:
            raise ValueError(f"--kv-memory must be in (0, 1), got {self.kv_memory}")

    @property
    def backend(self) -> Literal["triton", "torch"]:
        """Which kernels an instance would run."""
        return "triton" if self.device == "cuda" else "torch"

    @property
    def places(self) -> list[Place]:
        """Of the first rank of each stage, which has as much as the others or more."""
        return [Place(0, self.tp, stage, self.pp, self.pp_layers) for stage in range(self.pp)]


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceSize:
    """One instance of a cell, in bytes unless said otherwise."""

    parts: dict[str, int]
    """What is not KV, by name."""
    blocks: int
    """Of KV."""
    tokens: int
    """Of KV."""
    kv: int
    host_tokens: int
    disk_tokens: int
    """Whose KV has room below the pool, once requests have left it."""
    limit: int | None
    """What it may take of its GPU; None on the CPU, which isn't measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """All that is printed; bytes where nothing else is said."""

    model: str
    device: str
    dtype: str
    parameters: int
    weights: int
    kv_dtype: str
    """Of KV as it is stored."""
    kv_per_token: int
    kv_windows: int
    """Most that a sequence takes on an instance besides, in layers that see but a window or a chunk of it."""
    max_context: int
    """Tokens that the model takes."""
    context: int
    """Tokens of the sequence that is asked about."""
    instances: int
    tp: int
    """Ranks of each stage. All bytes are those of one rank: where there are several stages, of that with least room."""
    pp: int
    """Stages of each."""
    instance: InstanceSize
    cell_tokens: int
    """Of KV, in all instances."""
    longest: int
    """Tokens that one sequence can have when it is alone in the cell: less one spare block on each instance."""
    fits: bool
    """Whether the context does: in the cell, and in what the model takes."""
    fewest: int | None
    """Instances whose memory holds the context; None if no number does."""
    notes: list[str]
    """What was assumed."""


def answer(question: Question) -> Answer:
    """The arithmetic. Raises CheckpointError, UnsupportedModel, or TooLittleMemory for a GPU too small for an instance."""
    model = _tightest(question)
    context = model.max_context if question.context is None else question.context
    blocks = -(-context // question.block_size)
    if question.device == "cpu" and question.kv_tokens is None:
        each = -(-blocks // (question.instances or 1)) + 1
        question = replace(question, kv_tokens=each * question.block_size)
    fewest = fewest_instances(question, model, blocks)
    count = question.instances or fewest
    if count is None:
        one = instance_size(question, model, 1)
        raise TooLittleMemory(
            f"no number of such instances holds a context of {context:,} tokens: one alone has room for {one.tokens:,}, and "
            "each beside it takes some for the rows that they exchange"
        )
    one = instance_size(question, model, count)
    kv = _needs(question, model, count).kv
    longest = _longest(one, count, question.block_size)
    return Answer(
        model=question.model,
        device=question.device,
        dtype=str(model.shape.dtype).removeprefix("torch."),
        parameters=model.num_parameters(),
        weights=model.weight_bytes(),
        kv_dtype=str(model.kv_format.dtype).removeprefix("torch."),
        kv_per_token=-(-kv.block // kv.block_size),
        kv_windows=sum(kv.windows) * kv.block,
        max_context=model.max_context,
        context=context,
        instances=count,
        tp=question.tp,
        pp=question.pp,
        instance=one,
        cell_tokens=count * one.tokens,
        longest=longest,
        fits=context <= min(longest, model.max_context),
        fewest=fewest,
        notes=_notes(question),
    )


def instance_size(question: Question, model: Model, cell_size: int) -> InstanceSize:
    """One of `cell_size` instances. Raises TooLittleMemory if its GPU has no room for a block, or for the tokens asked for."""
    size = question.block_size
    needs = _needs(question, model, cell_size)
    asked = None if question.kv_tokens is None else question.kv_tokens // size * size
    if question.device == "cuda":
        fraction = question.kv_memory if asked is None else 1  # as `instance.start.size_pool`
        budget = predict(model, needs, device="a GPU", total=question.gpu_bytes, fraction=fraction)
        if question.host_memory or question.disk_bytes:
            budget = replace(budget, reserve=budget.reserve + tiers_bytes(needs.kv.block))
        if asked is not None:
            budget.check(asked, needs.kv)
        tokens = budget.most_tokens(needs.kv) if asked is None else asked
        parts, limit = budget.parts(), budget.limit
    else:
        if asked is None:
            raise ValueError("an instance on the CPU needs --kv-tokens")
        tokens, limit = asked, None
        parts = {
            "weights": needs.weights,
            "activations": activation_bytes(model, needs),
            "attention": needs.attention,
            "sampling": needs.sampling,
        }
    return InstanceSize(
        parts=parts,
        blocks=needs.kv.blocks(tokens),
        tokens=tokens,
        kv=needs.kv.bytes_of(tokens),
        host_tokens=question.host_memory // needs.kv.block * size,
        disk_tokens=question.disk_bytes // slot_bytes(needs.kv.block) * size,
        limit=limit,
    )


def _needs(question: Question, model: Model, cell_size: int) -> Needs:
    return Needs.of(
        model,
        block_size=question.block_size,
        chunk_tokens=question.chunk_tokens,
        cell_size=cell_size,
        backend=question.backend,
    )


def fewest_instances(question: Question, model: Model, blocks: int) -> int | None:
    """How many instances hold a sequence of that many blocks, each with a spare one; None if no number does.

    An instance's room shrinks as the cell grows, so that fewer than `blocks / room` are never enough, for any room seen on
    the way up. Raises TooLittleMemory if not even one alone has any.
    """
    count = 1
    while True:
        try:
            room = instance_size(question, model, count).tokens // question.block_size - 1
        except TooLittleMemory:
            if count == 1:
                raise
            return None
        if room < 1:
            return None
        least = -(-blocks // room)
        if least <= count:
            return count
        count = least


def show(found: Answer) -> str:
    """The answer as a table."""
    one = found.instance
    limit = "" if one.limit is None else f"   of {_gib(one.limit).strip()}"
    why = "alone in the cell" if found.longest < found.max_context else "the model's most"
    windows = f", and {_gib(found.kv_windows).strip()} for the windows of a sequence" if found.kv_windows else ""
    stored = "" if found.kv_dtype == found.dtype else f" in {found.kv_dtype}, with scales"
    where = f"on {'a GPU' if found.device == 'cuda' else 'the CPU'}"
    rows = [
        ("model", found.model),
        ("parameters", f"{found.parameters:,} in {found.dtype}, {_gib(found.weights).strip()}"),
        ("KV of a token", f"{found.kv_per_token:,} bytes{stored}{windows}"),
        ("", ""),
        (
            "one instance" if found.tp * found.pp == 1 else f"one of {found.tp * found.pp} ranks",
            f"{where}, {found.instances:,} in the cell",
        ),
        *((f"  {name}", _gib(part)) for name, part in one.parts.items()),
        ("  KV", f"{_gib(one.kv)}   {one.tokens:,} tokens, {one.blocks:,} blocks"),
        *_below(one),
        ("  in all", _gib(sum(one.parts.values()) + one.kv) + limit),
        ("", ""),
        ("KV of the cell", f"{found.cell_tokens:,} tokens"),
        ("longest sequence", f"{min(found.longest, found.max_context):,} tokens, {why}"),
        (f"{found.context:,} tokens", _verdict(found)),
    ]
    if found.context <= found.max_context:
        rows.append(("fewest instances", "no number holds them" if found.fewest is None else f"{found.fewest:,}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:{width}}  {value}".rstrip() for name, value in rows), "", *found.notes])


def _below(one: InstanceSize) -> list[tuple[str, str]]:
    """What has room below the pool: it holds no sequence that runs."""
    places = {"host memory": one.host_tokens, "disk": one.disk_tokens}
    return [(f"  cached, {name}", f"{tokens:13,} tokens") for name, tokens in places.items() if tokens]


def _verdict(found: Answer) -> str:
    """Whether the context fits, and if not, what is to be done about it where more instances are no help."""
    if found.context > found.max_context:
        return (
            f"do not fit: the model takes at most {found.max_context:,}, on any number of instances; ask for a shorter context"
        )
    return f"{'fit' if found.fits else 'do not fit'} in {_instances(found.instances)}"


def parse_count(text: str) -> int:
    """`128K`, `1M`, `1_000_000` or `1,000,000`; K and M are 2^10 and 2^20. Raises ArgumentTypeError."""
    match = re.fullmatch(r"(\d[\d_,]*)(\.\d+)?([KkMm]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, like 128K, 1M or 1_000_000")
    whole, part, unit = match.groups()
    count = Fraction(f"{re.sub('[_,]', '', whole)}{part or ''}") * _UNITS[unit.upper()]
    if count.denominator != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of tokens but {float(count):,}")
    return int(count)


def parse(arguments: Sequence[str]) -> tuple[Question, bool]:
    """The question, and whether JSON is wanted. What isn't said is resolved here, once.

    Raises ValueError for what makes no sense, SystemExit for what is no flag or no number.
    """
    parser = _Parser(
        "instance.size", description="The memory that a model and its KV take, and how many instances hold a context."
    )
    parser.add_argument("model", metavar="MODEL", help="a directory with config.json, a hub id or a GGUF file")
    parser.add_argument("--context", type=parse_count, help="tokens of one sequence, as 128K, 1M, 1_000_000 (the model's most)")
    parser.add_argument("--gpus", type=int, help="of the cell, one for each instance (as many as are needed)")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs between which an instance is split (%(default)s)")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="stages of --tp GPUs each, likewise (%(default)s)")
    parser.add_argument("--pp-layers", metavar="A,B,...", help="layers of each stage, as 20,12 (as even as can be)")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda if there is or is said one"
    )
    parser.add_argument("--gpu-memory", type=float, help="GiB of one GPU (of the one that is here; 139.8: an H200)")
    parser.add_argument(
        "--kv-memory", type=float, default=settings.GPU_KV_MEMORY, help="part of a GPU's memory that is used (%(default)s)"
    )
    parser.add_argument("--kv-tokens", type=parse_count, help="tokens of KV of one instance (what its GPU has room for)")
    parser.add_argument("--host-memory", default="0", metavar="SIZE", help="of one instance, for cached KV, as 64G (none)")
    parser.add_argument("--disk", metavar="DIR:SIZE", help="likewise, as /scratch:500G (none)")
    parser.add_argument("--dtype", default="auto", choices=settings.DTYPES)
    parser.add_argument(
        "--quantize", default="none", choices=settings.QUANTIZE, help="weights of linear layers: of 8 bits (%(default)s)"
    )
    parser.add_argument("--max-context", type=parse_count, help="tokens of the longest sequence served (as the config says)")
    parser.add_argument("--rope-scaling", metavar="KIND:F", help="rotary scaling, as yarn:4, or none (what the config says)")
    parser.add_argument("--kv-format", default="auto", choices=settings.KV_FORMATS, help="plain: of heads, not of latents")
    parser.add_argument("--kv-dtype", default="auto", choices=settings.KV_DTYPES, help="fp8, int8: half the bytes of 16 bits")
    parser.add_argument("--block-size", type=int, help="tokens in a block (64 on GPU, 16 on CPU)")
    parser.add_argument("--chunk-tokens", type=parse_count, help="most prompt rows in one step (8192 on GPU, 512 on CPU)")
    parser.add_argument("--cache-dir", type=Path, help="where converted checkpoints are kept")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    given = args.gpu_memory is not None
    if given and not 0 < args.gpu_memory < 2**20:
        raise ValueError(f"--gpu-memory must be the GiB of one GPU, got {args.gpu_memory:g}")
    if given and args.device == "cpu":
        raise ValueError(f"--gpu-memory {args.gpu_memory:g} says nothing of an instance on the CPU")
    on_gpu = given or torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    if on_gpu and not given and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: say --gpu-memory, the GiB of one (an H200 has 139.8)")
    question = Question(
        model=args.model,
        context=args.context,
        instances=None if args.gpus is None else _instances_on(args.gpus, args.tp, args.pp),
        tp=args.tp,
        pp=args.pp,
        pp_layers=() if args.pp_layers is None else parse_layers(args.pp_layers),
        device="cuda" if on_gpu else "cpu",
        gpu_bytes=int(args.gpu_memory * GIB) if given else torch.cuda.mem_get_info()[1] if on_gpu else 0,
        kv_memory=args.kv_memory,
        kv_tokens=args.kv_tokens,
        dtype=args.dtype,
        quantize=args.quantize,
        max_context=args.max_context,
        rope_scaling=None if args.rope_scaling is None else parse_scaling(args.rope_scaling),
        kv_format=args.kv_format,
        kv_dtype=args.kv_dtype,
        block_size=_given(args.block_size, settings.GPU_BLOCK_SIZE if on_gpu else settings.CPU_BLOCK_SIZE),
        chunk_tokens=_given(args.chunk_tokens, settings.GPU_CHUNK_TOKENS if on_gpu else settings.CPU_CHUNK_TOKENS),
        host_memory=parse_size(args.host_memory),
        disk_bytes=0 if args.disk is None else parse_disk(args.disk)[1],
        cache_dir=args.cache_dir,
    )
    return question, args.json


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        question, as_json = parse(sys.argv[1:] if arguments is None else arguments)
        found = answer(question)
    except ValueError as error:  # with CheckpointError, UnsupportedModel and TooLittleMemory
        print(f"instance.size: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(found), indent=2) if as_json else show(found))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """In one sentence, without the usage."""
        self.exit(2, f"instance.size: {message}\n")


def _tightest(question: Question) -> Model:
    """The part of the stage whose GPU has room for the fewest tokens; on the CPU, which isn't measured, of the largest.

    Raises as `_shape_of`, and TooLittleMemory if a stage has no room for any."""
    models = [_shape_of(question, place) for place in question.places]
    if question.pp == 1:
        return models[0]
    if question.device == "cpu":
        return max(models, key=lambda model: model.weight_bytes())
    return min(models, key=lambda model: instance_size(question, model, question.instances or 1).tokens)


def _shape_of(question: Question, place: Place) -> Model:
    """The part of the model without values. Raises CheckpointError, or UnsupportedModel as an instance would."""
    config = read_config(question.model, cache_dir=question.cache_dir)
    dtype: Any = config.dtype if question.dtype == "auto" else getattr(torch, question.dtype)
    if dtype is None:
        raise CheckpointError(f"the config of {question.model} doesn't say of which type its weights are: give --dtype")
    config.dtype = dtype
    try:
        quantize = None if question.quantize == "none" else question.quantize
        model = shaped_model(config, question.model, dtype, question.max_context, question.rope_scaling, quantize, place)
        if question.kv_format == "plain":
            model.keep_heads()
        settle_shape(model, question.model, block_size=question.block_size, backend=question.backend)
        settle_format(model, question.model, question.kv_dtype, block_size=question.block_size, backend=question.backend)
    except UnsupportedModel:
        raise
    except LOAD_ERRORS as error:
        raise CheckpointError(f"{question.model} can't be built: {type(error).__name__}: {first_line(error)}") from error
    return model


def _longest(one: InstanceSize, count: int, block_size: int) -> int:
    """Of a sequence alone in the cell (`gmanager.cluster.placement.why_never`)."""
    return count * (one.tokens - block_size)


def _notes(question: Question) -> list[str]:
    notes: list[str] = []
    if question.device == "cpu":
        notes.append(f"With --kv-tokens {question.kv_tokens} on each instance; what Python and torch take comes on top.")
        if question.instances is not None and not torch.cuda.is_available():
            notes.append("No GPU is seen here: for instances on GPUs, say --gpu-memory.")
        return notes
    used = f"--kv-memory {question.kv_memory:g} of " if question.kv_tokens is None else ""
    notes.append(
        f"Assumed: {used}a GPU of {question.gpu_bytes / GIB:.1f} GiB that nobody else uses, --chunk-tokens "
        f"{question.chunk_tokens}."
    )
    notes.append("Activations and other use of the device are predicted; an instance measures them when it starts.")
    return notes


def _instances_on(gpus: int, tp: int, pp: int) -> int:
    """Raises ValueError if instances of so many ranks can't share them evenly."""
    ranks = tp * pp
    if min(tp, pp) < 1 or gpus % ranks:
        raise ValueError(f"--gpus {gpus} are no multiple of --tp {tp}{'' if pp == 1 else f' times --pp {pp}'}")
    return gpus // ranks


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:9,.3f} GiB"


def _instances(count: int) -> str:
    return f"{count:,} instance{'s' if count != 1 else ''}"


if __name__ == "__main__":
    sys.exit(main())
