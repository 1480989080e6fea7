"""What the gManager is told when it starts."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Spread = int | Literal["auto", "all"]
"""Least number of instances that a prompt's KV is spread over; see `gmanager.cluster.placement.place`."""

PolicyName = Literal["elastic", "static", "infinite", "loong", "split"]
"""Who decides where KV is born and what moves; see `gmanager.cluster.policies`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GManagerConfig:
    """All that a gManager is told. Raises ValueError for a value that makes no sense."""

    bind: str = "tcp://127.0.0.1:5570"
    """Where it listens; port * takes a free one."""
    spread: Spread = "auto"
    """For requests that don't say it themselves."""
    policy: str = "elastic"
    """A `PolicyName`."""
    max_queue_wait_s: float = 600.0
    """Longest time that a request waits for a ready cell, or for memory, before it fails."""
    max_queue: int = 4096
    """Most requests that wait for a cell or for memory; what comes beyond is refused."""
    max_queue_bytes: int = 2**30
    """Most that waiting prompts take together, as text or as token ids of 4 bytes; what comes beyond is refused."""
    max_stall_s: float = 1800.0
    """A running request of which nothing is heard for so long, no token and no KV, fails."""
    instance_lease_s: float = 5.0
    """An instance that isn't heard for so long is taken for dead. They beat once a second."""
    client_lease_s: float = 10.0
    """A client that isn't heard for so long is taken for gone."""
    resume_s: float = 30.0
    """So long the requests of a client that is gone go on, for it to attach to them again. 0: they end at once."""
    max_pause_s: float = 30.0
    """A client that doesn't read is told no more; after so long it is taken for gone."""
    prefix_cache: bool = True
    """Whether instances keep KV that requests leave until they need the room, for others that begin with the same tokens."""
    journal: Path | None = None
    """The file in which requests and their tokens are kept, for the gManager that follows; None: none are."""
    slo_ttft_s: float | None = None
    """Seconds from a request's arrival to its first token that are wanted: one that would miss it is refused. None: any will
    do. A request may say its own."""
    slo_tpot_s: float | None = None
    """Seconds between tokens, in a request's mean, that are wanted; likewise."""
    form_timeout_s: float = 120.0
    """Longest time from a cell's last registration until it is ready: a process group forms in seconds, but compilers
    and slow file systems have taken a minute."""

    def __post_init__(self) -> None:
        if isinstance(self.spread, int):
            if self.spread < 1:
                raise ValueError(f"spread must be auto, all or at least 1, got {self.spread}")
        elif self.spread not in ("auto", "all"):
            raise ValueError(f"spread must be auto, all or a number, got {self.spread!r}")
        if self.policy not in get_args(PolicyName):
            raise ValueError(f"policy must be one of {', '.join(get_args(PolicyName))}, got {self.policy!r}")
        for name in ("max_queue", "max_queue_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_queue_wait_s", "max_stall_s", "instance_lease_s", "client_lease_s", "max_pause_s", "form_timeout_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        for name in ("slo_ttft_s", "slo_tpot_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not (math.isfinite(self.resume_s) and self.resume_s >= 0):
            raise ValueError(f"resume_s must be a number >= 0, got {self.resume_s}")
        if self.journal is not None and not self.resume_s:
            raise ValueError("with a journal resume_s must be more than 0: what is restored waits so long for its clients")


def parse_spread(text: str) -> Spread:
    """`auto`, `all` or a number. Raises ValueError."""
    if text == "auto":
        return "auto"
    if text == "all":
        return "all"
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"spread must be auto, all or a number, got {text!r}") from None
