"""Copies of cached blocks below the pool, in host memory and on disk: who has them and where they lie, pure integers.

    pool ──begin_down, end_down──> host ──begin_move, end_move──> disk ──drop──> lost
      ^                             │ ^                            │
      └─────begin_up, end_up────────┘ └────begin_move, end_move────┘

A *copy* has a key, a slot in one tier, and a checksum. It is there as long as a block of the pool holds the same (so that the
block may be evicted without a word), or a cached sequence has a block that lies nowhere else. Copies are exclusive: each is in
one tier. What is on its way keeps the slots that it is read from and written to until it is over, whatever becomes of it
meanwhile; and a block that is freed while it is being copied leaves nothing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

Tier = Literal["host", "disk"]
Fault = Literal["unreadable", "unwritable", "no_memory"]
"""Why bytes did not come to where they were to be copied: by their source, or their target, or as the device had no memory."""

TIERS: tuple[Tier, Tier] = ("host", "disk")
"""From the fastest to the slowest."""


@dataclass(frozen=True, slots=True)
class Place:
    """A block of the pool, or a slot of a tier."""

    where: Literal["pool", "host", "disk"]
    slot: int


@dataclass(frozen=True, slots=True)
class Copying:
    """One block's bytes on their way."""

    key: int
    source: Place
    target: Place
    checksum: int | None
    """What they must have; None: they are copied for the first time."""


@dataclass(slots=True)
class _Copy:
    tier: Tier
    slot: int
    checksum: int
    blocks: set[int] = field(default_factory=set)
    """Of the pool, that hold the same."""
    seqs: dict[int, None] = field(default_factory=dict)
    """Cached sequences that have a block which lies nowhere else (to their knowledge)."""


class Tiers:
    """The slots below one pool."""

    def __init__(self, slots: Mapping[Tier, int] | None = None) -> None:
        """`slots`: of each tier; none: there is no such tier. Raises ValueError for a negative number."""
        self.num_slots: dict[Tier, int] = {tier: (slots or {}).get(tier, 0) for tier in TIERS}
        if min(self.num_slots.values()) < 0:
            raise ValueError(f"a tier can't have a negative number of slots, got {self.num_slots}")
        self._free: dict[Tier, list[int]] = {tier: list(reversed(range(count))) for tier, count in self.num_slots.items()}
        self._order: dict[Tier, dict[int, None]] = {tier: {} for tier in TIERS}
        """Keys of each tier, least recently used first."""
        self._copies: dict[int, _Copy] = {}
        self._key_of: dict[int, int] = {}
        """block -> key of its copy, complete or on its way."""
        self._arriving: dict[int, tuple[int | None, Tier, int]] = {}
        """key -> block that is being copied (None: it was freed meanwhile), and the slot that it is copied to."""
        self._moving: dict[int, tuple[Tier, int] | None] = {}
        """key that is being read -> the slot that it is copied to; None: a block of the pool."""
        self._left: dict[int, tuple[Tier, int]] = {}
        """key that is gone and still being read -> its slot."""
        self._retired: Counter[Tier] = Counter()
        """Slots that could not be written."""
        self._num_keys = 0
        self._is_shut = False

    @property
    def is_off(self) -> bool:
        """Whether there is no tier at all (any more)."""
        return self._is_shut or not any(self.num_slots.values())

    def shut(self) -> None:
        """Lose all copies, for good. Raises RuntimeError if a cached sequence has a block there alone."""
        for key in list(self._copies):
            if self.drop(key):
                raise RuntimeError(f"copy {key} is still held")
        self._is_shut = True

    @property
    def first(self) -> Tier:
        """Where copies go first."""
        return "host" if self.num_slots["host"] else "disk"

    def num_copies(self, tier: Tier) -> int:
        return len(self._order[tier])

    def num_free(self, tier: Tier) -> int:
        return len(self._free[tier])

    def copy_of(self, block: int) -> int | None:
        """Key of the copy of a block of the pool; None: there is no complete one."""
        key = self._key_of.get(block)
        return key if key in self._copies else None

    def has_copy(self, block: int) -> bool:
        """Whether there is one, or one is being made."""
        return block in self._key_of

    def tier_of(self, key: int) -> Tier:
        """Raises KeyError if there is no such copy."""
        return self._copies[key].tier

    def is_on(self, key: int, tier: Tier) -> bool:
        """False if there is no such copy any more."""
        return key in self._order[tier]

    # --- who has it ---------------------------------------------------------------------------------------------------

    def hold(self, key: int, seq: int) -> None:
        """A cached sequence has the block there alone. Raises KeyError if there is no such copy."""
        self._copies[key].seqs[seq] = None

    def holders(self, key: int) -> tuple[int, Iterable[int]]:
        """How many cached sequences have a block there alone, and which blocks of the pool hold the same. Raises KeyError if
        there is no such copy."""
        copy = self._copies[key]
        return len(copy.seqs), copy.blocks

    def release(self, key: int, seq: int) -> None:
        """It has it there no more."""
        copy = self._copies[key]
        copy.seqs.pop(seq, None)
        self._forget_unused(key, copy)

    def attach(self, key: int, block: int) -> None:
        """A block of the pool holds the same. Raises KeyError if there is no such copy."""
        self._copies[key].blocks.add(block)
        self._key_of[block] = key

    def on_free(self, block: int) -> None:
        """A block of the pool holds nothing any more."""
        key = self._key_of.pop(block, None)
        if key is None:
            return
        if key in self._arriving:
            _, tier, slot = self._arriving[key]
            self._arriving[key] = None, tier, slot
            return
        copy = self._copies[key]
        copy.blocks.discard(block)
        self._forget_unused(key, copy)

    def touch(self, keys: Iterable[int]) -> None:
        """They are of use: the last to make room, the first of them first."""
        for key in keys:
            order = self._order[self._copies[key].tier]
            del order[key]
            order[key] = None

    def oldest(self, tier: Tier, count: int) -> list[int]:
        """So many of the least recently used ones that aren't being read, or all."""
        return list(islice((key for key in self._order[tier] if key not in self._moving), count))

    def oldest_alone(self, tier: Tier, count: int) -> list[int]:
        """The same of those that no block of the pool holds."""
        alone = (key for key in self._order[tier] if key not in self._moving and not self._copies[key].blocks)
        return list(islice(alone, count))

    def block_of(self, key: int) -> int | None:
        """A block of the pool that holds the same; None: there is none. Raises KeyError if there is no such copy."""
        return min(self._copies[key].blocks, default=None)

    def drop(self, key: int) -> list[int]:
        """Lose a copy. Returns the sequences that had it there alone. Raises KeyError if there is no such copy."""
        copy = self._copies[key]
        for block in copy.blocks:
            del self._key_of[block]
        self._forget(key, copy)
        return list(copy.seqs)

    # --- what is on its way -------------------------------------------------------------------------------------------

    def begin_down(self, block: int) -> Copying:
        """Copy a block of the pool. Raises IndexError if the first tier has no free slot."""
        tier = self.first
        slot = self._free[tier].pop()
        self._num_keys += 1
        key = self._num_keys
        self._arriving[key] = block, tier, slot
        self._key_of[block] = key
        return Copying(key, Place("pool", block), Place(tier, slot), None)

    def end_down(self, copying: Copying, checksum: int | None, *, is_sound: bool = True) -> bool:
        """Whether there is a copy now. `checksum`: None: it is none; unless `is_sound`, as the slot could not be written, which
        is used no more then."""
        block, tier, slot = self._arriving.pop(copying.key)
        if block is not None and checksum is not None:
            self._copies[copying.key] = _Copy(tier, slot, checksum, {block})
            self._order[tier][copying.key] = None
            return True
        if block is not None:
            del self._key_of[block]
        self._give(tier, slot, is_sound=is_sound)
        return False

    def begin_move(self, key: int, tier: Tier) -> Copying:
        """Copy it to another tier. Raises IndexError if that has no free slot."""
        copy = self._copies[key]
        slot = self._free[tier].pop()
        self._moving[key] = tier, slot
        return Copying(key, Place(copy.tier, copy.slot), Place(tier, slot), copy.checksum)

    def end_move(self, copying: Copying, fault: Fault | None) -> None:
        """It is there, and not where it was; or, with a fault, as before. A slot that could not be written is used no more."""
        key = copying.key
        target = self._moving.pop(key)
        if target is None:
            raise RuntimeError(f"copy {key} was being read into the pool")
        tier, slot = target
        copy = self._copies.get(key)
        if copy is None or fault is not None:
            self._give(tier, slot, is_sound=fault != "unwritable")
            self._give_left(key)
            return
        del self._order[copy.tier][key]
        self._give(copy.tier, copy.slot)
        copy.tier, copy.slot = tier, slot
        self._order[tier][key] = None

    def begin_up(self, key: int, block: int) -> Copying:
        """Copy it into a block of the pool."""
        copy = self._copies[key]
        self._moving[key] = None
        return Copying(key, Place(copy.tier, copy.slot), Place("pool", block), copy.checksum)

    def end_up(self, copying: Copying) -> bool:
        """It is read. Whether the copy is still there."""
        del self._moving[copying.key]
        self._give_left(copying.key)
        return copying.key in self._copies

    # --- slots --------------------------------------------------------------------------------------------------------

    def _forget_unused(self, key: int, copy: _Copy) -> None:
        if not copy.blocks and not copy.seqs:
            self._forget(key, copy)

    def _forget(self, key: int, copy: _Copy) -> None:
        del self._copies[key], self._order[copy.tier][key]
        if key in self._moving:
            self._left[key] = copy.tier, copy.slot
        else:
            self._give(copy.tier, copy.slot)

    def _give_left(self, key: int) -> None:
        if (left := self._left.pop(key, None)) is not None:
            self._give(*left)

    def _give(self, tier: Tier, slot: int, *, is_sound: bool = True) -> None:
        if is_sound:
            self._free[tier].append(slot)
        else:
            self._retired[tier] += 1

    def validate(self, held: Mapping[int, set[int]] | None = None) -> None:
        """Each slot is free, or one copy's, or being written; and copies are held as said, if that is given (seq -> keys).
        Raises RuntimeError otherwise."""
        for tier in TIERS:
            slots = self._free[tier] + [copy.slot for copy in self._copies.values() if copy.tier == tier]
            slots += [slot for _, where, slot in self._arriving.values() if where == tier]
            slots += [target[1] for target in self._moving.values() if target is not None and target[0] == tier]
            slots += [slot for where, slot in self._left.values() if where == tier]
            if len(set(slots)) != len(slots) or len(slots) + self._retired[tier] != self.num_slots[tier]:
                raise RuntimeError(f"slots of {tier}: {sorted(slots)}, {self._retired[tier]} retired of {self.num_slots[tier]}")
            if self._order[tier].keys() != {key for key, copy in self._copies.items() if copy.tier == tier}:
                raise RuntimeError(f"{tier} has other copies than its order of use")
        for key, copy in self._copies.items():
            if not copy.blocks and not copy.seqs:
                raise RuntimeError(f"copy {key} is nobody's")
            if any(self._key_of.get(block) != key for block in copy.blocks):
                raise RuntimeError(f"copy {key} of blocks {copy.blocks} is not theirs")
        if held is not None:
            said = {(seq, key) for key, copy in self._copies.items() for seq in copy.seqs}
            if said != {(seq, key) for seq, keys in held.items() for key in keys}:
                raise RuntimeError(f"sequences hold {held}, known is {sorted(said)}")
