"""Requests that wait for a prompt which another computes just now, because they begin as it does: pure.

    queued ──wait──> the other's prompt is done: its instances say what can be shared ──> queued, and shares it
                                       │ it has ended without, or takes too long     ──> queued, and computes it

So a document that many ask about at once, or of which one asks for several answers, is computed once, not once for each.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from gmanager.cluster.chain import DIGEST_BYTES, Chain, num_common
from gmanager.cluster.reading import deadline
from gmanager.cluster.request import Request

LEAST_SAVED = 512
"""Tokens that one need not compute, to wait for them."""
LEAST_PART = 0.5
"""Of the other's prompt that is common to both: it tells what can be shared once all of it is done."""


@dataclass(slots=True)
class _Prompt:
    """One that is computed."""

    chain: Chain
    tokens: int
    untold: set[int]
    """ids of the instances that have not said yet what can be shared there."""


class Following:
    """Of one cell, through all its epochs."""

    def __init__(self, block_size: int, most_apart: int | None = None) -> None:
        """`most_apart`: so many tokens at a prompt's end may be others in one that begins alike; None: any number."""
        self._most_apart = most_apart
        self._block_size = block_size
        self._prompts: dict[int, _Prompt] = {}
        """By sequence."""
        self._by_first: dict[bytes, dict[int, None]] = {}
        """Digest of a first block -> those that begin with it, the oldest first."""
        self._waits: dict[int, tuple[int, float]] = {}
        """By number of the request: which sequence it waits for, and until when."""
        self._impatient: set[int] = set()
        """Those that have waited too long once."""

    @property
    def numbers(self) -> Collection[int]:
        """Of the requests that wait."""
        return self._waits.keys()

    # --- prompts ------------------------------------------------------------------------------------------------------

    def begin(self, seq: int, chain: Chain, tokens: int, computed: Iterable[tuple[int, int]]) -> None:
        """A prompt of so many tokens is going to be computed. `computed`: (id of an instance, tokens there)."""
        # what has no full block of it, with the last token left out, will say nothing
        untold = {number for number, its in computed if its > self._block_size}
        if untold and chain.num_blocks * self._block_size >= LEAST_SAVED:
            self._prompts[seq] = _Prompt(chain, tokens, untold)
            self._by_first.setdefault(_first(chain), {})[seq] = None

    def told(self, seq: int, number: int) -> None:
        """An instance has said what can be shared there: with the last of them nobody waits any longer."""
        prompt = self._prompts.get(seq)
        if prompt is not None:
            prompt.untold.discard(number)
            if not prompt.untold:
                self.end(seq)

    def end(self, seq: int) -> None:
        """There is no more to wait for."""
        prompt = self._prompts.pop(seq, None)
        if prompt is None:
            return
        first = _first(prompt.chain)
        same = self._by_first[first]
        del same[seq]
        if not same:
            del self._by_first[first]
        self._waits = {number: wait for number, wait in self._waits.items() if wait[0] != seq}

    # --- who waits ----------------------------------------------------------------------------------------------------

    def worth_waiting(self, request: Request, shared: int) -> tuple[int, int] | None:
        """Which sequence a request should wait for, and how long its prompt is; None: none. `shared`: tokens that are there."""
        chain = request.chain
        if chain is None or not chain.num_blocks or request.number in self._impatient:
            return None
        best: tuple[int, int, int] | None = None
        for seq in self._by_first.get(_first(chain), ()):
            prompt = self._prompts[seq]
            common = min(num_common(chain.digests, prompt.chain.digests) * self._block_size, request.num_tokens - 1)
            if self._most_apart is not None and prompt.tokens - common > self._most_apart:
                continue
            if common - shared >= LEAST_SAVED and common >= LEAST_PART * prompt.tokens and (best is None or common > best[0]):
                best = common, seq, prompt.tokens
        return None if best is None else (best[1], best[2])

    def wait(self, request: Request, seq: int, now: float, takes_s: float) -> None:
        """Let it wait for a prompt that should take so long."""
        self._waits[request.number] = seq, deadline(now, takes_s)

    def end_overdue(self, now: float) -> bool:
        """Whether some wait no longer."""
        overdue = [number for number, (_, until) in self._waits.items() if now > until]
        for number in overdue:
            del self._waits[number]
            self._impatient.add(number)
        return bool(overdue)

    def forget(self, number: int) -> None:
        """A request waits for nothing any more: it has ended, or is admitted."""
        self._waits.pop(number, None)
        self._impatient.discard(number)

    def suspend(self) -> None:
        """The epoch is over."""
        self._prompts.clear()
        self._by_first.clear()
        self._waits.clear()
        self._impatient.clear()

    def validate(self, queued: Iterable[int]) -> None:
        """Raises RuntimeError if one waits that isn't queued, or for a prompt that nobody computes."""
        waiting = set(queued)
        lost = [number for number, (seq, _) in self._waits.items() if number not in waiting or seq not in self._prompts]
        if lost or not self._impatient <= waiting:
            raise RuntimeError(f"requests {lost or self._impatient - waiting} wait for a prompt that nobody computes")
        found = sorted(seq for same in self._by_first.values() for seq in same)
        if found != sorted(self._prompts):
            raise RuntimeError(f"prompts {sorted(self._prompts)} are computed, found are {found}")


def _first(chain: Chain) -> bytes:
    """Digest of its first block."""
    return chain.digests[:DIGEST_BYTES]
