"""Needle in a haystack: does the service find one sentence in a long text, wherever it stands?

The prompt is a chat message of exactly `context` tokens, template included: essays, a sentence with a secret number at `depth`
percent of them, and a question that does not contain the number. Works against any running service, with the tokenizer that it
serves.
"""

import importlib.metadata
import os
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from gmanager.client import AsyncClient
from gmanager.text.worker import ChatTemplate, encode_ids, load_backend
from gmanager.wire.errors import DistattnError
from gmanager.wire.messages import SamplingParams, TextAssets

NEEDLE = " The special magic number is {secret}."
QUESTION = "\n\nWhat is the special magic number?"
REPORT = "needle.json"
PICTURE = "needle.png"


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What transformers alone answers to the same tokens."""

    answer: str
    token_ids: list[int]
    found: bool


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    context: int
    depth: int
    prompt_tokens: int
    expected: str
    answer: str
    token_ids: list[int]
    found: bool
    score: float
    ttft_s: float
    total_s: float
    kv_tokens_by_instance: dict[int, int]
    home_moves: int
    reference: Reference | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """needle.json."""

    schema: int = 1
    versions: dict[str, str]
    hardware: dict[str, str]
    model: str
    config: dict[str, Any]
    results: list[Result]


ReferenceOf = Callable[["Sequence[Case]", "Sequence[Result]", Callable[[], None]], "list[Result]"]


@dataclass(frozen=True, slots=True)
class Case:
    context: int
    depth: int
    secret: str
    token_ids: list[int]


class PromptError(ValueError):
    """No such prompt can be made; the message has the numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is to be asked."""

    contexts: Sequence[int]
    """Prompt tokens, template included."""
    depths: Sequence[int]
    """Percent of the text before the needle."""
    max_tokens: int
    haystack: Path
    """Folder of .txt files."""
    out: Path
    """Where needle.json and needle.png go."""
    device: str = "as the service runs"
    reference: "ReferenceOf | None" = None
    """Asks somebody else the same: gives the results with those answers beside them."""


class Prompts:
    """Makes the prompts of one model and haystack."""

    def __init__(self, assets: TextAssets, haystack: str) -> None:
        """Raises PromptError if the model lacks a tokenizer or a chat template, TextError if one can't be used."""
        if assets.tokenizer_json is None:
            raise PromptError("the model has no tokenizer")
        if not assets.chat_template:
            raise PromptError("the model has no chat template")
        self._backend = load_backend(assets.tokenizer_json)
        self._text = haystack
        self._hay: list[int] = []
        mark = "\ue000"  # stands for the text; a private character, so no template has it
        template = ChatTemplate(assets.chat_template, assets.special_tokens)
        before, _, after = template.render([{"role": "user", "content": mark}]).decode().partition(mark)
        self._head = self._encode(before)
        self._tail = self._encode(QUESTION + after)

    def make(self, context: int, depth: int) -> Case:
        """The prompt of exactly `context` tokens with its needle at `depth` percent, after the end of a sentence."""
        secret = str(random.Random(f"{context} tokens, {depth} percent").randrange(10_000, 100_000))
        needle = self._encode(NEEDLE.format(secret=secret))
        room = context - len(self._head) - len(needle) - len(self._tail)
        if room < 0:
            raise PromptError(f"{context} tokens don't hold the template, the needle and the question: {-room} are missing")
        hay = self._haystack(room)
        at = self._sentence_end(hay, room * depth // 100)
        return Case(context, depth, secret, self._head + hay[:at] + needle + hay[at:] + self._tail)

    def _haystack(self, tokens: int) -> list[int]:
        if len(self._hay) < tokens:
            self._hay = self._encode(self._text[: tokens * 8])  # English has about 4 characters a token
        if len(self._hay) < tokens:
            raise PromptError(f"the haystack has {len(self._hay):,} tokens, {tokens:,} are needed")
        return self._hay[:tokens]

    def _sentence_end(self, hay: Sequence[int], at: int) -> int:
        """The nearest place at or after `at` that follows a full stop; `at` itself if none follows within 200 tokens."""
        for place in range(max(at, 1), min(at + 200, len(hay)) + 1):
            if self._backend.decode([hay[place - 1]]).rstrip().endswith((".", "!", "?")):
                return place
        return at

    def _encode(self, text: str) -> list[int]:
        return encode_ids(self._backend, text, add_special_tokens=False)


def read_haystack(folder: Path) -> str:
    """The texts of a folder, by name. Raises PromptError if there are none."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise PromptError(f"{folder} holds no .txt files")
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def score(secret: str, answer: str) -> float:
    """1 if the secret stands in the answer, else the largest part of its digits that some number there begins with."""
    if secret in answer:
        return 1.0
    numbers = re.findall(r"\d+", answer.replace(",", ""))
    return max((common_prefix(secret, number) / len(secret) for number in numbers), default=0.0)


def common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


async def ask(client: AsyncClient, case: Case, max_tokens: int) -> Result:
    """One needle. Raises the client's errors."""
    request_id = f"needle-{case.context}-{case.depth}-{time.time_ns()}"
    token_ids: list[int] = []
    answer = ""
    ttft = 0.0
    began = time.perf_counter()
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    async for chunk in client.generate(case.token_ids, params, request_id=request_id):
        ttft = ttft or time.perf_counter() - began
        token_ids += chunk.token_ids
        answer += chunk.text
    total = time.perf_counter() - began
    request = (await client.stats()).requests[request_id]
    return Result(
        context=case.context,
        depth=case.depth,
        prompt_tokens=len(case.token_ids),
        expected=case.secret,
        answer=answer,
        token_ids=token_ids,
        found=case.secret in answer,
        score=score(case.secret, answer),
        ttft_s=round(ttft, 4),
        total_s=round(total, 4),
        kv_tokens_by_instance=request.kv_tokens,
        home_moves=request.home_moves,
    )


async def run(
    address: str, cases: Sequence[Case], max_tokens: int, progress: Callable[[], None]
) -> tuple[list[Result], list[str]]:
    """All cases, one after the other: what was answered, and what failed."""
    results: list[Result] = []
    failures: list[str] = []
    async with AsyncClient(address) as client:
        for case in cases:
            try:
                results.append(await ask(client, case, max_tokens))
            except DistattnError as error:
                failures.append(f"{case.context} tokens, depth {case.depth} %: {error}")
            progress()
    return results, failures


def make_report(model: str, config: dict[str, Any], results: Sequence[Result], device: str) -> Report:
    packages = ("distattn", "torch", "transformers", "pyzmq", "msgpack", "msgspec")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # the benchmark needs none of them but the client's
    hardware = {"machine": platform.machine(), "processor": processor(), "cores": str(os.cpu_count()), "device": device}
    return Report(versions=versions, hardware=hardware, model=model, config=config, results=list(results))


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


def write(report: Report, out: Path) -> None:
    """needle.json and needle.png."""
    out.mkdir(parents=True, exist_ok=True)
    data = msgspec.json.encode(report)
    msgspec.json.decode(data, type=Report)  # what was written can be read
    (out / REPORT).write_bytes(msgspec.json.format(data, indent=1))
    draw(report.results, out / PICTURE)


def draw(results: Sequence[Result], file: Path) -> None:
    """Heat map: contexts across, depths down, the score as colour."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    contexts = sorted({r.context for r in results})
    depths = sorted({r.depth for r in results})
    scores = {(r.depth, r.context): r.score for r in results}
    grid = [[scores.get((depth, context), float("nan")) for context in contexts] for depth in depths]
    figure, axes = plt.subplots(figsize=(2.2 + 1.1 * len(contexts), 1.8 + 0.6 * len(depths)), layout="constrained")
    image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("depth of the needle")
    found = sum(r.found for r in results)
    axes.set_title(f"{found} of {len(results)} needles found")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            axes.text(x, y, "-" if value != value else f"{value:.2f}", ha="center", va="center")
    figure.colorbar(image, label="score")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def print_table(results: Sequence[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{sum(r.found for r in results)} of {len(results)} needles found")
    for name in ("context", "depth", "expected", "answer", "found", "TTFT s", "total s", "KV tokens by instance", "home moves"):
        table.add_column(name, justify="left" if name == "answer" else "right", overflow="fold")
    if any(r.reference for r in results):
        table.add_column("as transformers", justify="right")
    for r in results:
        cells = [
            f"{r.context:,}",
            f"{r.depth} %",
            r.expected,
            " ".join(r.answer.split())[:60],
            "yes" if r.found else "no",
            f"{r.ttft_s:.2f}",
            f"{r.total_s:.2f}",
            " + ".join(f"{tokens:,}" for _, tokens in sorted(r.kv_tokens_by_instance.items())),
            str(r.home_moves),
        ]
        if r.reference is not None:
            cells.append("same ids" if r.reference.token_ids == r.token_ids else "other ids")
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


async def benchmark(address: str, task: Task) -> int:
    """Run, compare, print and write. Returns the exit code: 1 if a request failed. Raises DistattnError, PromptError."""
    from rich.progress import Progress

    async with AsyncClient(address) as client:
        assets = await client.text_assets()
        model = (await client.stats()).cells[0].model
    prompts = Prompts(assets, read_haystack(task.haystack))
    cases = [prompts.make(context, depth) for context in task.contexts for depth in task.depths]
    with Progress() as bar:
        asking = bar.add_task("asking the service", total=len(cases))
        results, failures = await run(address, cases, task.max_tokens, lambda: bar.advance(asking))
        if task.reference is not None:
            comparing = bar.add_task("asking the reference", total=len(results))
            results = task.reference(cases, results, lambda: bar.advance(comparing))
    config = {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(task).items() if name != "reference"
    }
    write(make_report(model, config, results, task.device), task.out)
    print_table(results)
    print(f"written: {task.out / REPORT}, {task.out / PICTURE}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0
