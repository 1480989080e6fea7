"""What the log of a process says of its state: pure functions of its text."""

import re
import signal

_FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)')
_ENDS = ("instance ends", "instance failed")
_WRONG_SETTINGS = re.compile(r"instance: (?:error: )?(.+)")
"""What an instance says before it has a log."""
_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
"""What torchrun says of the first instance that failed."""

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


def why_instances_ended(text: str) -> str | None:
    """One sentence, from the log that a torchrun and its instances share; None if nobody said anything of it.

    Who was killed could not say so; otherwise the first that spoke knows it best: what others say later is its echo.
    """
    lines = text.splitlines()
    own: str | None = None
    first_code: int | None = None
    rank = ""
    before = ""
    for line in lines:
        failed = _FAILED.search(line)
        if failed is not None and first_code is None:
            first_code, rank = int(failed[1]), failed[2]
        wrong = _WRONG_SETTINGS.fullmatch(line.strip())
        event = fields(line) if any(name in line for name in _ENDS) else {}
        if own is None and wrong is not None:
            own = wrong[1]
        elif own is None and event.get("event") in _ENDS:
            own = event.get("reason")
        if first_code is None and not line.startswith(("W", "E")) and any(char.isalnum() for char in line):
            before = line.strip()
    if first_code is not None and first_code < 0 and first_code != -signal.SIGTERM:
        return f"instance {rank} was killed by {signal.Signals(-first_code).name}"
    if own is not None:
        return f"an instance ended: {own}"
    if first_code is not None:
        return f"instance {rank} ended with exit code {first_code}: {before[:300]}"
    return None


def stage_of_instances(text: str, count: int) -> str:
    """What so many instances do that come up: the one that is furthest behind, which may have said nothing yet. One that
    converts a file has the others wait."""
    reached: dict[str, tuple[int, str]] = {}
    for line in text.splitlines():
        event = fields(line)
        if event.get("program") == "instance" and event.get("event") in _STAGES:
            reached[event.get("rank", "")] = _STAGES[event["event"]]
    converts = _STAGES["converting"]
    if converts in reached.values():
        return converts[1]
    return min(reached.values())[1] if len(reached) >= count else "start"


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
