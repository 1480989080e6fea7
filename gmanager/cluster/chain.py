"""Names of prefixes: the hash of a block of tokens and of all before it, so that equal names mean equal beginnings.

    seed(model, dtype, salt) ──block 0──> digest ──block 1──> digest ──> ...      the last tokens may fill no block: the tail

A digest has 128 bits of BLAKE2b, so nobody can make two beginnings that have the same; and who doesn't know a salt can't ask
for what was computed under it.
"""

from hashlib import blake2b

DIGEST_BYTES = 16


def seed_of(*parts: str) -> bytes:
    """That all chains begin with whose tokens have the same KV, and may share it."""
    whole = blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        packed = part.encode(errors="surrogatepass")
        whole.update(len(packed).to_bytes(8, "little") + packed)
    return whole.digest()


class Chain:
    """The digests of a sequence's full blocks. It only grows."""

    __slots__ = ("_block_bytes", "_seed", "_tail", "digests")

    def __init__(self, seed: bytes, block_size: int, tokens: bytes = b"") -> None:
        """`tokens`: the first of them, packed."""
        self.digests = b""
        """Packed, `DIGEST_BYTES` each."""
        self._seed = seed
        self._block_bytes = 4 * block_size
        self._tail = b""
        self.extend(tokens)

    @property
    def num_blocks(self) -> int:
        """Full ones."""
        return len(self.digests) // DIGEST_BYTES

    @property
    def num_tokens(self) -> int:
        """Those that fill no block included."""
        return (self.num_blocks * self._block_bytes + len(self._tail)) // 4

    def extend(self, tokens: bytes) -> None:
        """Tokens that follow, packed."""
        size = self._block_bytes
        tokens = self._tail + tokens
        digest = self.digests[-DIGEST_BYTES:] or self._seed
        end = len(tokens) - len(tokens) % size
        news: list[bytes] = []
        for at in range(0, end, size):
            digest = blake2b(digest + tokens[at : at + size], digest_size=DIGEST_BYTES).digest()
            news.append(digest)
        self.digests += b"".join(news)
        self._tail = tokens[end:]

    def copy(self) -> "Chain":
        """Of the same tokens; what either is extended by is not the other's."""
        other = Chain(self._seed, self._block_bytes // 4)
        other.digests, other._tail = self.digests, self._tail
        return other


def num_common(one: bytes, other: bytes, at: int = 0) -> int:
    """Blocks with which digests and those of another, from byte `at` on, begin alike: names of longer beginnings differ from
    the first on that does."""
    same, differ = 0, min(len(one), len(other) - at) // DIGEST_BYTES + 1
    while differ - same > 1:
        middle = (same + differ) // 2
        start = (middle - 1) * DIGEST_BYTES
        if one[start : start + DIGEST_BYTES] == other[at + start : at + start + DIGEST_BYTES]:
            same = middle
        else:
            differ = middle
    return same
