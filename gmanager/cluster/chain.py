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
        self.digests: list[bytes] = []
        self._seed = seed
        self._block_bytes = 4 * block_size
        self._tail = b""
        self.extend(tokens)

    @property
    def num_tokens(self) -> int:
        """Those that fill no block included."""
        return (len(self.digests) * self._block_bytes + len(self._tail)) // 4

    def extend(self, tokens: bytes) -> None:
        """Tokens that follow, packed."""
        size = self._block_bytes
        tokens = self._tail + tokens
        digest = self.digests[-1] if self.digests else self._seed
        end = len(tokens) - len(tokens) % size
        for at in range(0, end, size):
            digest = blake2b(digest + tokens[at : at + size], digest_size=DIGEST_BYTES).digest()
            self.digests.append(digest)
        self._tail = tokens[end:]

    def copy(self) -> "Chain":
        """Of the same tokens; what either is extended by is not the other's."""
        other = Chain(self._seed, self._block_bytes // 4)
        other.digests, other._tail = list(self.digests), self._tail
        return other
