"""The language of the retrieval model: symbols, their codes, and haystacks in which every block has a key of its own.

    block      k1 k2 k3 k4  v1 v2 v3 v4  END  filler ...
    question   the haystack, k1 k2 k3 k4            answer     v1 v2 v3 v4  END

Every window of four symbols that a question or its answer ends with occurs once in the whole haystack, so the next symbol is
known, and only from that block.
"""

from dataclasses import dataclass

import numpy as np

KEY = 4
VALUE = 4
CODE_BITS = 10
VOCABULARY = 1 << CODE_BITS
BEGIN, END, FILLER = 0, 1, 2
FIRST_SYMBOL, SYMBOLS = 512, 512
"""Keys and values use the symbols `[512, 1024)`."""
USED = KEY + VALUE + 1
"""Tokens of a block before its filler."""


@dataclass(frozen=True, slots=True)
class Haystack:
    """Blocks of `block` tokens after one BEGIN that stands in the first block's place of filler: token 0 is BEGIN."""

    tokens: np.ndarray
    """int32 `[num_tokens]`."""
    keys: np.ndarray
    """`[blocks, KEY]`"""
    values: np.ndarray
    """`[blocks, VALUE]`"""
    block: int

    @property
    def num_keys(self) -> int:
        return len(self.keys)

    def question(self, index: int) -> list[int]:
        """What to append to the haystack."""
        return [int(t) for t in self.keys[index]]

    def answer(self, index: int) -> list[int]:
        """What must come out, END included."""
        return [*(int(t) for t in self.values[index]), END]

    def without(self, index: int) -> np.ndarray:
        """The tokens with one block turned to filler."""
        tokens = self.tokens.copy()
        tokens[1 + index * self.block :][: self.block] = FILLER
        return tokens


def make_haystack(num_tokens: int, *, block: int = 64, seed: int = 0) -> Haystack:
    """A haystack of exactly that many tokens, the last ones filler.

    Raises ValueError if not one block fits, or a block is too short for a key and a value.
    """
    if block < USED:
        raise ValueError(f"a block of {block} tokens is too short for a key, a value and an end: {USED}")
    count = (num_tokens - 1) // block
    if count < 1:
        raise ValueError(f"{num_tokens} tokens hold no block of {block} after the first token")
    rng = np.random.default_rng(seed)
    symbols = rng.integers(0, SYMBOLS, (count, KEY + VALUE))
    while len(again := _repeated(symbols)):
        symbols[again] = rng.integers(0, SYMBOLS, (len(again), KEY + VALUE))
    symbols += FIRST_SYMBOL
    blocks = np.full((count, block), FILLER, dtype=np.int32)
    blocks[:, : KEY + VALUE] = symbols
    blocks[:, KEY + VALUE] = END
    tokens = np.full(num_tokens, FILLER, dtype=np.int32)
    tokens[0] = BEGIN
    tokens[1 : 1 + count * block] = blocks.reshape(-1)
    return Haystack(tokens, symbols[:, :KEY], symbols[:, KEY:], block)


def _repeated(symbols: np.ndarray) -> np.ndarray:
    """Blocks of which a window of four symbols occurs elsewhere too: all but the first of each kind."""
    windows = [symbols[:, i : i + KEY] @ (SYMBOLS ** np.arange(KEY)) for i in range(VALUE + 1)]
    codes = np.concatenate(windows)
    _, first = np.unique(codes, return_index=True)
    is_repeated = np.ones(len(codes), dtype=bool)
    is_repeated[first] = False
    return np.unique(np.nonzero(is_repeated)[0] % len(symbols))
