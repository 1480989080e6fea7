"""How many blocks a sequence takes where some of a model's layers see but a window or a chunk of it: pure integers.

Its tokens are in blocks of `block_size`, `length` of them. The layers that see all take as many. Each table of the others takes
no more than hold what its rows still see, `most[i]`, and blocks of all tables are of one size:

    taken(length) = length + sum over tables of min(length, most[i])
"""

from collections.abc import Sequence

ANCHOR_TOKENS = 1024
"""So many of the last tokens of a prompt may be others in one that begins alike, and that one can still go on where the two
part, though some layers see but a window (`kvstore.anchor`)."""


def anchor_tokens(chunk_tokens: int) -> int:
    """No more than a step's, for which there is room in each table."""
    return min(chunk_tokens, ANCHOR_TOKENS)


def taken(length: int, most: Sequence[int]) -> int:
    """Blocks that a sequence of so many blocks of tokens takes on one instance, at most. `most`: of each table behind the
    first."""
    return length + sum(min(length, bound) for bound in most)


def held(blocks: int, most: Sequence[int]) -> int:
    """The longest sequence, in blocks of tokens, that so many blocks hold: of all lengths the last with
    `taken(length, most) <= blocks`."""
    length, tables = 0, 1 + len(most)
    for bound in sorted(most):
        if (bound - length) * tables > blocks:
            break
        blocks -= (bound - length) * tables
        length, tables = bound, tables - 1
    return length + blocks // tables
