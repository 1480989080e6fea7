"""What an instance tells the gManager of the sequences in its pool: what an epoch left of them, and what others can share."""

from collections.abc import Mapping

from gmanager.wire import messages as wire
from instance.rmanager import RManager
from kvstore.ranges import Ranges

MOST_CACHED_ENTRIES = 2**18
"""Of a message, as the codec counts them: what is told of cached sequences when an epoch ends. What is not told is freed."""
ENTRIES_OF_SHARD, ENTRIES_OF_RANGE = 14, 3
"""At most, keys and values."""


def told_of_kept(rmanager: RManager, kept: Mapping[int, list[Ranges]], requests: Mapping[int, int]) -> list[wire.KeptShard]:
    """Of sequences whose epoch is over, with these runs; `requests`: whose they are."""
    ends = rmanager.shared_ends()
    return [
        wire.KeptShard(seq=seq, runs=runs, request=requests[seq], shared_end=ends.get(seq, 0), since=rmanager.since(seq))
        for seq, runs in kept.items()
    ]


def newest_cached(rmanager: RManager) -> list[wire.KeptShard]:
    """Of cached sequences in order of their last use those that one message holds."""
    told: list[wire.KeptShard] = []
    room = MOST_CACHED_ENTRIES
    for seq, runs in reversed(list(rmanager.cached().items())):
        room -= ENTRIES_OF_SHARD + sum(2 + ENTRIES_OF_RANGE * len(run) for run in runs)
        if room < 0:
            break
        told.append(told_of_cached(rmanager, seq, runs))
    return told


def told_of_cached(rmanager: RManager, seq: int, runs: list[list[tuple[int, int]]]) -> wire.KeptShard:
    """What can be shared of a sequence."""
    since, branches = (rmanager.since(seq), rmanager.branches(seq)) if runs else (0, [])
    return wire.KeptShard(seq=seq, runs=runs, below=rmanager.below(seq), since=since, branches=branches)
