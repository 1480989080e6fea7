"""What the log of a process says of its state: pure functions of its text."""

import re
import signal
from collections.abc import Sequence

_FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)')
_ENDS = ("instance ends", "instance failed")
_WRONG_SETTINGS = re.compile(r"instance: (?:error: )?(.+)")
"""What an instance says before it has a log."""
_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: ")
"""What torchrun says of an instance that failed."""
_ENDED_BY_OTHERS = "the gManager ended the cell: "
"""What an instance says that ends because of another."""

_STAGES = {
    "loading": (1, "load"),
    "converting": (2, "convert"),
    "KV pool": (3, "warm up"),
    "registered": (4, "form a cell"),
    "capturing CUDA graphs": (5, "capture CUDA graphs"),
    "epoch joined": (6, "form a cell"),
}
"""By the event that an instance begins it with."""


def fields(line: str) -> dict[str, str]:
    """Of an event as `gmanager.wire.logs` writes it; of another line nothing that matters."""
    return {name: _plain(value) for name, value in _FIELD.findall(line)}


def why_instance_ended(name: str, text: str) -> str | None:
    """One sentence, from the log that an instance and its torchrun share; None if nobody said anything of it.

    Who was killed could not say so; otherwise the instance knows it best. `name`: of the instance.
    """
    own: str | None = None
    code: int | None = None
    before = ""
    for line in text.splitlines():
        failed = _FAILED.search(line)
        if failed is not None and code is None:
            code = int(failed[1])
        wrong = _WRONG_SETTINGS.fullmatch(line.strip())
        event = fields(line) if any(end in line for end in _ENDS) else {}
        if own is None and wrong is not None:
            own = wrong[1]
        elif own is None and event.get("event") in _ENDS:
            own = event.get("reason")
        if code is None and not line.startswith(("W", "E")) and any(char.isalnum() for char in line):
            before = line.strip()
    if code is not None and code < 0 and code != -signal.SIGTERM:
        return f"{name} was killed by {signal.Signals(-code).name}"
    if own is not None:
        return f"{name} ended: {own}"
    if code is not None:
        return f"{name} ended with exit code {code}: {before[:300]}"
    return None


def is_echo(sentence: str) -> bool:
    """Whether an instance ended because of another."""
    return _ENDED_BY_OTHERS in sentence


def stage_of_instances(texts: Sequence[str]) -> str:
    """What instances do that come up, each with its log: the one that is furthest behind, which may have said nothing yet. One
    that converts a file has the others wait."""
    stages = [_stage(text) for text in texts]
    converts = _STAGES["converting"]
    return converts[1] if converts in stages else min(stages)[1]


def told_of_cells(line: str, size: int) -> str | None:
    """What a line of the gManager's log says of the membership of a cell that began with `size` instances; None: nothing."""
    event = fields(line)
    cell, reason = event.get("cell", ""), event.get("reason", "")
    match event.get("event"):
        case "instance comes":
            return f"instance {event.get('instance')} of cell '{cell}' comes"
        case "instance left" | "cell changes":
            return reason
        case "instance refused":
            return f"an instance was refused: {reason}"
        case "cell ready":
            return f"{event.get('instances')} of {size} instances serve, {int(event.get('kv_tokens', 0)):,} tokens of KV"
        case "cell over":
            return f"cell '{cell}' is over: {reason}"
        case _:
            return None


def _stage(text: str) -> tuple[int, str]:
    reached = (0, "start")
    for line in text.splitlines():
        event = fields(line)
        if event.get("program") == "instance" and event.get("event") in _STAGES:
            reached = _STAGES[event["event"]]
    return reached


def last_words(text: str) -> str | None:
    """The last error of a process, or else its last line; None if it said nothing."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if any(char.isalnum() for char in line)]
    errors = [event for line in lines if (event := fields(line)).get("level") == "error"]
    if errors:
        return ": ".join(errors[-1][name] for name in ("event", "reason") if errors[-1].get(name))
    return lines[-1][:300] if lines else None


def _plain(value: str) -> str:
    """Without quotes, in one line."""
    if value.startswith('"'):
        value = re.sub(r"\\(.)", r"\1", value[1:-1])
    return " ".join(re.sub(r"\\[nrt]", " ", value).split())
