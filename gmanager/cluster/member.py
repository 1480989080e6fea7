"""One member of a cell, as the gManager knows it."""

from dataclasses import dataclass, field

from gmanager.cluster.prefixes import Held
from gmanager.cluster.request import Runs
from gmanager.wire import footprint
from gmanager.wire.messages import Counters, InstanceSpec, Register, Unheard
from gmanager.wire.peer import PeerId


@dataclass(slots=True, eq=False)
class Member:
    """One instance, and what is known of its blocks."""

    peer: PeerId
    register: Register
    run: tuple[str, int]
    """Its torchrun: the run id, and how many instances of the same run id and rank came before (torchruns that were
    given no id are all called "none")."""
    heard_at: float
    id: int = -1
    """In the cell, as long as it is a member; -1 before the first epoch has begun."""
    rank: int = -1
    """In the epoch; -1 before it has begun."""
    joined: bool = False
    shares_feeds: bool = False
    """Whether it computes dense layers together with the others of the epoch that it joined last."""
    kept: dict[int, Runs] | None = None
    """seq -> what it has kept of the epoch before. None: it has not said yet."""
    shared_ends: dict[int, int] = field(default_factory=dict)
    """seq -> position before which it can't go on, as it shares blocks with others."""
    since: dict[int, int] = field(default_factory=dict)
    """seq -> the first row that can follow what it has kept."""
    cached: dict[int, Held] = field(default_factory=dict)
    """seq -> what it has kept of those that are over, while the membership changes."""
    cached_blocks: int = 0
    """Of the free ones, as last heard."""
    host_blocks: int = 0
    disk_blocks: int = 0
    """Copies of blocks in host memory and on disk, likewise."""
    free_blocks: int = 0
    """As last heard. Answers to Reserve are already in it."""
    outstanding: dict[int, int] = field(default_factory=dict)
    """seq -> blocks of Reserves that aren't answered."""
    is_freeing: bool = False
    """It held KV that nobody wants any more, and has not said since how many blocks are free."""
    counters: Counters = field(default_factory=Counters)
    num_outputs: int = 0
    """Messages Outputs that came of it."""
    requests: dict[int, int] = field(default_factory=dict)
    """seq -> number of the request, as it says of what it has kept."""
    unheard: list[Unheard] = field(default_factory=list)
    """What it generated while there was no gManager."""
    is_draining: bool = False
    """It gets nothing new, and leaves when what it has is elsewhere, or can't be."""
    is_asking: bool = False
    """It has asked for that itself, and waits for the answer."""
    drain_calls: list[tuple[PeerId, int]] = field(default_factory=list)
    """Clients' calls that are answered when it has left."""

    @property
    def spec(self) -> InstanceSpec:
        return self.register.spec

    @property
    def free(self) -> int:
        """Blocks that a new Reserve may count on."""
        return max(0, self.free_blocks - sum(self.outstanding.values())) if self.outstanding else self.free_blocks

    @property
    def room(self) -> int:
        """The longest new sequence for which `free` are enough, in blocks of tokens."""
        return footprint.held(self.free, self.spec.windows)

    @property
    def size(self) -> int:
        """The longest sequence that all its blocks hold, likewise."""
        return footprint.held(self.spec.num_blocks, self.spec.windows)

    @property
    def name(self) -> str:
        run = self.register.run_id[:64]
        which = self.id if self.id >= 0 else f"with RANK {self.register.rank} of run {run!r}"
        return f"instance {which} of cell '{self.register.cell}'"

    def hear_free(self, blocks: int) -> None:
        self.free_blocks = max(0, min(blocks, self.spec.num_blocks))
