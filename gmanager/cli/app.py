"""The commands and their options; what they do stands in the files that they import, when they are called."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from gmanager.config import GManagerConfig, PolicyName
from gmanager.wire.messages import SamplingParams

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serves language models on prompts whose KV cache fits on no single machine.",
)

GManager = Annotated[
    str, typer.Option("--gmanager", envvar="DISTATTN_GMANAGER", help="address of the service", metavar="tcp://HOST:PORT")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="most tokens of an answer")]
Temperature = Annotated[float, typer.Option(min=0, help="0: always the likeliest token")]
Model = Annotated[str | None, typer.Option(help="which model, if several are served")]

ADDRESS = GManagerConfig().bind
POLICY = GManagerConfig().policy


@app.command()
def up(
    model: Annotated[str, typer.Argument(help="a directory, a hub id, a GGUF file, or 'default': a small one, fetched once")],
    instances: Annotated[int, typer.Option(min=1, help="how many pool their memory")] = 1,
    tp: Annotated[
        int,
        typer.Option(min=1, help="GPUs between which the model and the KV of an instance are split (on the CPU: processes)"),
    ] = 1,
    pp: Annotated[
        int, typer.Option(min=1, help="stages, of --tp GPUs each, between which the layers of an instance are split")
    ] = 1,
    pp_layers: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="layers of each stage, as 20,12 (as even as can be)")
    ] = None,
    elastic_tp: Annotated[
        str,
        typer.Option(
            metavar="ROWS", help="instances share a decode step's dense layers while it has at most so many rows; off, or auto"
        ),
    ] = "off",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if there are as many GPUs as that takes")] = "auto",
    http: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="where the OpenAI-compatible server listens")
    ] = "127.0.0.1:8000",
    no_http: Annotated[bool, typer.Option("--no-http", help="start none")] = False,
    bind: Annotated[str, typer.Option(metavar="tcp://HOST:PORT", help="where the gManager listens")] = ADDRESS,
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="tokens of KV of each instance (CPU: 8192)")] = None,
    kv_memory: Annotated[float | None, typer.Option(help="or, on GPUs: part of their memory to use (0.92)")] = None,
    max_context: Annotated[int | None, typer.Option(help="tokens of the longest sequence (as the model's config says)")] = None,
    rope_scaling: Annotated[
        str | None, typer.Option(metavar="KIND:F", help="rotary scaling, as yarn:4, or none (what the model's config says)")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's own; CPU: float32), float32, float16, bfloat16")] = "auto",
    kv_dtype: Annotated[
        str, typer.Option(help="how KV is stored: auto (as dtype), or fp8 or int8, half the bytes of 16 bits")
    ] = "auto",
    quantize: Annotated[str, typer.Option(help="weights of linear layers become 8 bits: none, fp8, int8 or int8-32")] = "none",
    names: Annotated[
        list[str] | None,
        typer.Option("--served-model-name", metavar="NAME", help="what requests call the model; may be given again: also that"),
    ] = None,
    prefix_cache: Annotated[
        Literal["on", "off"], typer.Option(help="keep KV that requests leave for others that begin with the same tokens")
    ] = "on",
    host_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="of each instance, for KV that requests leave, as 64G (none)")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(metavar="DIR:SIZE", help="of each instance, for what host memory has no room for (none)")
    ] = None,
    check_cache: Annotated[
        bool, typer.Option("--check-cache", help="compare KV that is shared with what was written: reads all of it")
    ] = False,
    journal: Annotated[
        Path | None, typer.Option(help="file that keeps requests and their tokens, for when the gManager is lost (none)")
    ] = None,
    policy: Annotated[str, typer.Option(help=f"where KV lies and what moves: {', '.join(get_args(PolicyName))}")] = POLICY,
    roles: Annotated[
        str | None, typer.Option(help="of each instance, with commas between: mixed, prefill or decode, for the policy split")
    ] = None,
    slo_ttft: Annotated[
        float | None, typer.Option(help="seconds to a first token: who would wait longer is refused (none)")
    ] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="seconds between tokens, in the mean: likewise (none)")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="keys of the HTTP server, one a line")] = None,
    allow_origins: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", metavar="ORIGIN", help="whose pages may ask from a browser; *: all; may be given again"),
    ] = None,
    aliases: Annotated[
        list[str] | None,
        typer.Option("--model-alias", metavar="ALIAS=NAME", help="another name at the HTTP server; may be given again"),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="refuse fields of HTTP requests that aren't known")] = False,
    trust_special_tokens: Annotated[
        bool, typer.Option("--trust-special-tokens", help="special tokens in HTTP messages are special, not text")
    ] = False,
    logs: Annotated[
        Path | None, typer.Option(help="where each start makes a folder of its logs (~/.cache/distattn/logs)")
    ] = None,
) -> None:
    """Start a service on this machine, and stop all of it on Ctrl-C."""
    from gmanager.cli.up import Wanted, bring_up

    wanted = Wanted(
        model=model,
        instances=instances,
        tp=tp,
        pp=pp,
        pp_layers=pp_layers,
        elastic_tp=elastic_tp,
        device=device,
        http=None if no_http else http,
        bind=bind,
        kv_tokens=kv_tokens,
        kv_memory=kv_memory,
        max_context=max_context,
        rope_scaling=rope_scaling,
        dtype=dtype,
        kv_dtype=kv_dtype,
        quantize=quantize,
        names=tuple(dict.fromkeys(names or ())),
        prefix_cache=prefix_cache == "on",
        host_memory=host_memory,
        disk=disk,
        check_cache=check_cache,
        journal=journal,
        policy=policy,
        roles=() if roles is None else tuple(roles.split(",")),
        slo_ttft_s=slo_ttft,
        slo_tpot_s=slo_tpot,
        api_key_file=api_key_file,
        allow_origins=tuple(allow_origins or ()),
        aliases=tuple(aliases or ()),
        strict=strict,
        trust_special_tokens=trust_special_tokens,
        logs=logs,
    )
    raise typer.Exit(bring_up(wanted))


@app.command()
def chat(
    gmanager: GManager = ADDRESS,
    system: Annotated[str | None, typer.Option(help="what the model is told before all")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    model: Model = None,
) -> None:
    """Talk with the model; the conversation is kept. Ctrl-C ends an answer, or at the prompt the command."""
    from gmanager.cli.talk import converse

    converse(gmanager, _params(max_tokens=max_tokens, temperature=temperature), system=system, model=model)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="the text to go on with; - reads it from standard input")],
    gmanager: GManager = ADDRESS,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="same seed, same answer")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="a text that ends the answer; may be given again")] = None,
    model: Model = None,
) -> None:
    """Go on with a text."""
    from gmanager.cli.talk import continue_text

    params = _params(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop or None)
    text = sys.stdin.read() if prompt == "-" else prompt
    continue_text(gmanager, text, params, model)


@app.command()
def status(
    gmanager: GManager = ADDRESS, as_json: Annotated[bool, typer.Option("--json", help="all of it, for programs")] = False
) -> None:
    """Show cells, instances, their KV and the requests."""
    from gmanager.cli.watch import show_status

    show_status(gmanager, as_json=as_json)


@app.command()
def top(
    gmanager: GManager = ADDRESS,
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 1.0,
) -> None:
    """The same, live: each instance's KV as a bar, coloured by request. q ends it."""
    from gmanager.cli.watch import watch

    watch(gmanager, interval)


@app.command()
def drain(
    instance: Annotated[int, typer.Argument(help="its number, as status shows it")],
    gmanager: GManager = ADDRESS,
    cell: Annotated[str | None, typer.Option(help="needed if several cells have one of that number")] = None,
) -> None:
    """Empty an instance and let it end: what it holds moves to the others of its cell."""
    from gmanager.cli.watch import drain_instance

    drain_instance(gmanager, instance, cell)


@app.command()
def needle(
    gmanager: GManager = ADDRESS,
    contexts: Annotated[list[int] | None, typer.Option("--context", min=1, help="prompt tokens; may be given again")] = None,
    depths: Annotated[
        list[int] | None,
        typer.Option("--depth", min=0, max=100, help="percent of the text before the needle; likewise"),
    ] = None,
    haystack: Annotated[Path | None, typer.Option(help="folder of .txt files (Paul Graham's essays, fetched once)")] = None,
    max_tokens: MaxTokens = 24,
    out: Annotated[Path, typer.Option(help="folder of needle.json and needle.png")] = Path("results"),
) -> None:
    """Ask a running service for needles in a haystack."""
    from gmanager.cli.assets import HAYSTACK, FetchError, cache_dir, fetch
    from gmanager.cli.needle import PromptError, Task, benchmark

    try:
        folder = haystack or fetch(HAYSTACK, cache_dir() / "haystack")[0].parent
        task = Task(
            contexts=contexts or [1024, 2048, 4096],
            depths=depths or [10, 50, 90],
            max_tokens=max_tokens,
            haystack=folder,
            out=out,
        )
        raise typer.Exit(asyncio.run(benchmark(gmanager, task)))
    except (FetchError, PromptError) as error:
        raise typer.BadParameter(str(error)) from error


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def size(context: typer.Context) -> None:
    """The memory arithmetic: weights, KV per token, how many instances a context needs. Options: distattn size --help."""
    from gmanager.cli.up import DEFAULT, CannotStart, find_model

    for flag, word in zip(["", *context.args], context.args, strict=False):
        if word.startswith((".", "/", "~")) and flag not in ("--cache-dir", "--disk") and not Path(word).expanduser().exists():
            raise typer.BadParameter(f"there is no directory or file {word}")  # before torch, which takes seconds
    try:
        arguments = [find_model(word)[0] if word == DEFAULT else word for word in context.args]
    except CannotStart as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(subprocess.run([sys.executable, "-m", "instance.size", *arguments], check=False).returncode)


def _params(**given: Any) -> SamplingParams:
    """Raises typer.BadParameter."""
    try:
        return SamplingParams(**given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
