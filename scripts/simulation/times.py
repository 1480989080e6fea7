"""How long a step takes, by what is to be done in it: coefficients that were measured, and their file.

A decode step reads the weights once and the KV that its rows attend to; a prefill step is as long as its operations, or as
reading the weights if there are few. Rows that travel add a round trip in each layer, and their bytes (docs/simulator.md says
where the numbers come from, and how far a step is from them).
"""

from pathlib import Path
from typing import Protocol

import msgspec

from gmanager.wire.messages import LanePerformance, Stats
from instance.step import Lane


class TimesError(ValueError):
    """A file of step times can't be used; the message says why."""


class Load(msgspec.Struct, frozen=True):
    """What an instance does in a step."""

    rows: int
    """Own ones."""
    attended: int
    """Sum over its rows, and those that it serves, of the tokens here that each attends to."""
    sent: int
    """Own rows to others, counted for each receiver."""
    served: int
    """Rows of others."""


class Times(Protocol):
    """Seconds that a step takes on an instance which does nothing else."""

    def decode_s(self, load: Load) -> float: ...

    def prefill_s(self, load: Load) -> float: ...


class LaneTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of one lane's steps. Raises ValueError if one is negative."""

    base: float = 0.0
    """Whatever the rows, if the instance has some of its own."""
    least: float = 0.0
    """Of `row` times rows, if these are few: prefill reads the weights all the same."""
    row: float
    attended: float
    """Of one row and one token that it attends to."""
    exchange: float = 0.0
    """Once, if rows travel."""
    sent: float = 0.0
    """Of a row that is sent, with its way back."""
    served: float = 0.0
    """Of a row that comes from another instance, beside what it attends to."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @classmethod
    def fitted(cls, lane: LanePerformance) -> "LaneTimes":
        """As a gManager's performance model has them: a row costs the same whichever way it travels."""
        moved = lane.moved_us / 1e6
        return cls(
            base=lane.step_us / 1e6,
            row=lane.row_us / 1e6,
            attended=lane.attended_ns / 1e9,
            exchange=lane.exchange_us / 1e6,
            sent=moved,
            served=moved,
        )

    def of(self, load: Load) -> float:
        took = self.attended * load.attended
        if load.rows:
            took += self.base + max(self.least, self.row * load.rows)
        if load.sent or load.served:
            took += self.exchange + self.sent * load.sent + self.served * load.served
        return took

    def scaled(self, *, fixed: float, row: float, attended: float) -> "LaneTimes":
        """Each kind of cost times a factor."""
        return msgspec.structs.replace(
            self,
            base=self.base * fixed,
            least=self.least * fixed,
            exchange=self.exchange * fixed,
            row=self.row * row,
            sent=self.sent * row,
            served=self.served * row,
            attended=self.attended * attended,
        )

    def shared(self, parts: int, wait_s: float, efficiency: float) -> "LaneTimes":
        """Of steps that so many devices share, who wait `wait_s` for each other in each."""
        share = 1 / (parts * efficiency)
        scaled = self.scaled(fixed=share, row=share, attended=share)
        return msgspec.structs.replace(scaled, base=scaled.base + wait_s)


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kind of instance: its steps, its memory and its pace. One file of `--times`. Raises ValueError for numbers that make
    no sense."""

    name: str
    source: str
    """Where the numbers come from."""
    decode: LaneTimes
    prefill: LaneTimes
    decode_beside: float = 1.0
    """How many times as long a decode step takes while the prefill lane of its instance has work."""
    prefill_beside: float = 1.0
    """And the other way round."""
    cores: float | None = None
    """So many steps run at full speed at once on the machine that all instances share; None: each has a device of its own."""
    others: float = 0.0
    """Other programs that take their share of these cores all the time."""
    meet_s: float
    """From the last notice of a party's members until all have the next step."""
    host_s: float
    """The same for an instance that steps alone."""
    link_s: float
    """From an instance or a client to the gManager or back."""
    reduce_s: float = 0.0
    """What two devices that share each step wait for each other in it."""
    share_efficiency: float = 1.0
    """Of their other work, how much sharing leaves."""
    kv_tokens: int
    """Of an instance."""
    block_size: int
    chunk_tokens: int
    mixed_chunk_tokens: int
    reach: int
    grain: int = 1
    """As `instance.plan.Pace` has these four."""
    copy_tokens: int = 16
    """Of KV, copied to or from an instance for each of its steps while it steps: `--copy-tokens`."""
    decode_steps: int = 1
    """That a decode step stands for, and tokens that a row stands for: more than one if it is `coarse`."""
    shrinks: bool = True
    """Whether chunks beside decodes are the smaller the longer the prefix: on a GPU, not on the CPU."""

    def __post_init__(self) -> None:
        counts = ("kv_tokens", "block_size", "chunk_tokens", "mixed_chunk_tokens", "reach", "grain")
        for name in (*counts, "copy_tokens", "decode_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("meet_s", "host_s", "link_s"):  # a round that takes no time could repeat for ever
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if min(self.decode_beside, self.prefill_beside) < 1 or (self.cores is not None and self.cores <= 0):
            raise ValueError("decode_beside and prefill_beside are at least 1, cores positive or null")
        if self.others < 0:
            raise ValueError(f"others must not be negative, got {self.others}")

    def decode_s(self, load: Load) -> float:
        return self.decode.of(load)

    def prefill_s(self, load: Load) -> float:
        return self.prefill.of(load)

    def step_s(self, lane: Lane, load: Load) -> float:
        return self.decode_s(load) if lane == "decode" else self.prefill_s(load)

    def beside(self, lane: Lane) -> float:
        """How many times as long a step takes while the other lane has work."""
        return self.decode_beside if lane == "decode" else self.prefill_beside

    def whole(self, parts: int) -> "Profile":
        """One large instance of so many devices: the sum of their memory, each step shared by all.

        Waits for each other grow with the logarithm of their number, which is kind to many devices on several hosts.
        """
        if parts == 1:
            return self
        wait_s = self.reduce_s * (parts - 1).bit_length()
        return msgspec.structs.replace(
            self,
            name=f"{self.name}, {parts} as one",
            decode=self.decode.shared(parts, wait_s, 1.0),
            prefill=self.prefill.shared(parts, wait_s, self.share_efficiency),
            kv_tokens=self.kv_tokens * parts,
        )

    def coarse(self, grain: int) -> "Profile":
        """The same instance told in units of `grain` tokens: a row stands for so many, and a decode step for so many steps.

        Raises ValueError if a block is no multiple of that.
        """
        if self.block_size % grain:
            raise ValueError(f"a block of {self.block_size} tokens is no multiple of {grain}")
        return msgspec.structs.replace(
            self,
            decode=self.decode.scaled(fixed=grain, row=grain, attended=grain**2),
            prefill=self.prefill.scaled(fixed=1, row=grain, attended=grain**2),
            kv_tokens=self.kv_tokens // grain,
            block_size=self.block_size // grain,
            chunk_tokens=-(-self.chunk_tokens // grain),
            mixed_chunk_tokens=-(-self.mixed_chunk_tokens // grain),
            reach=-(-self.reach // grain),
            grain=-(-self.grain // grain),
            copy_tokens=-(-self.copy_tokens // grain),
            decode_steps=self.decode_steps * grain,
        )


H200_8B = Profile(
    name="H200, 8B shape, bf16",
    source="docs/performance.md: steps of one GPU and of two (2026-11), 32K and 128K prefilled alone, lanes beside each other",
    decode=LaneTimes(base=4.19e-3, row=1.16e-5, attended=2.95e-8, exchange=8.0e-4, sent=1.4e-6),
    prefill=LaneTimes(least=4.19e-3, row=2.16e-5, attended=8.41e-10, exchange=1.3e-3, sent=8.0e-6),
    decode_beside=2.6,
    prefill_beside=1.37,
    meet_s=2.0e-4,
    host_s=1.0e-4,
    link_s=2.0e-4,
    reduce_s=1.05e-3,
    share_efficiency=0.93,
    kv_tokens=872_256,
    block_size=64,
    chunk_tokens=8192,
    mixed_chunk_tokens=24576,
    reach=28_625,
    grain=2048,
)


def read_times(file: Path) -> Profile:
    """Raises TimesError."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Profile)
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise TimesError(f"{file}: {error}") from error


def read_stats(file: Path, base: Profile) -> Profile:
    """`base` with the step times and the memory of the one cell that `distattn status --json` tells of. Raises TimesError.

    Pace and messages, which it doesn't tell, stay those of `base`.
    """
    try:
        cells = msgspec.json.decode(file.read_bytes(), type=Stats).cells
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise TimesError(f"{file}: {error}") from error
    known = [(cell, cell.performance) for cell in cells if cell.size and cell.performance is not None]
    if len(known) != 1:
        raise TimesError(f"{file} has {len(known)} cells whose step times are known, of {len(cells)}: there must be one")
    ((cell, performance),) = known
    lanes = {"prefill": performance.prefill, "decode": performance.decode}
    unheard = [name for name, lane in lanes.items() if not lane.samples]
    if unheard:
        raise TimesError(f"{file}: no {unheard[0]} step of cell {cell.name!r} has been heard of")
    told = ", ".join(
        f"{name}: {lane.samples:,} steps" + ("" if lane.error is None else f", {lane.error:.0%} off in the median")
        for name, lane in lanes.items()
    )
    try:
        return msgspec.structs.replace(
            base,
            name=f"{cell.model}, as fitted",
            source=f"a service's own performance model ({told}); the rest: {base.name}",
            prefill=LaneTimes.fitted(performance.prefill),
            decode=LaneTimes.fitted(performance.decode),
            prefill_beside=performance.prefill.beside,
            decode_beside=performance.decode.beside,
            kv_tokens=cell.total_tokens // cell.size,
            block_size=cell.block_size,
        )
    except ValueError as error:
        raise TimesError(f"{file}: {error}") from error


def write_times(profile: Profile, file: Path) -> None:
    """Raises OSError."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
