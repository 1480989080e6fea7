"""Which tokens may come next where a text must follow a grammar: llguidance's matchers, one for each such sequence.

A mask depends on the values of all tokens before, also of the one that the step before has just sampled. So the step's layers
are queued first, and while the device runs them the host waits for that token, moves the matchers on and makes the masks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from gmanager.wire.logs import get_logger
from gmanager.wire.messages import TextAssets
from instance.plan import SampledRow

log = get_logger("instance")

_MAX_MATCHERS = 1024
"""Kept; one that went is made anew from the sequence's tokens."""


@dataclass(frozen=True, slots=True)
class Masks:
    """Tokens that may come."""

    rows_A: torch.Tensor
    allowed_AW: torch.Tensor
    """Bits, int32: token 32 w + b is bit b of word w."""


@dataclass(slots=True)
class _Matching:
    matcher: LLMatcher
    num_tokens: int
    """Generated tokens it has taken."""


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Tokens of the newest step, on their way to the host."""

    index_of: dict[int, int]
    tokens_S: torch.Tensor
    event: torch.cuda.Event | None


def grammar_tokenizer(assets: TextAssets, vocab_size: int) -> LLTokenizer | None:
    """What grammars need of the model: half a second of work. Of some it can't be had: the gManager, which tries the same,
    takes no request that has a grammar."""
    if assets.tokenizer_json is None:
        log.info("no structured output", reason="the model has no tokenizer")
        return None
    try:
        return LLTokenizer(assets.tokenizer_json, n_vocab=vocab_size, eos_token=assets.eos_token_ids)
    except ValueError as error:
        log.info("no structured output", reason=str(error))
        return None


class Grammars:
    """Matchers by sequence. To be used in the thread that samples."""

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._tokenizer = tokenizer
        self._executor = LLExecutor()
        is_end_V = np.zeros(32 * math.ceil(vocab_size / 32), np.bool_)
        is_end_V[tokenizer.eos_tokens] = True
        ends_W = np.packbits(is_end_V, bitorder="little").view("<i4")
        self._words_E = np.flatnonzero(ends_W)
        """Of a mask, those that have bits of tokens that end a text: these."""
        self._ends_E = ends_W[self._words_E]
        self._matching: dict[int, _Matching] = {}
        """The one used longest ago first."""
        self._sampled: _Sampled | None = None

    def masks(self, rows: Sequence[SampledRow]) -> Masks | None:
        """For those of the rows that follow a grammar; waits for the tokens of the step before, where they are needed."""
        asked = [(i, row) for i, row in enumerate(rows) if row.params.grammar is not None]
        if not asked:
            return None
        matchers = [(self._at(row), a) for a, (_, row) in enumerate(asked)]
        while len(self._matching) > max(_MAX_MATCHERS, len(asked)):
            del self._matching[next(iter(self._matching))]
        masks_AW = allocate_token_bitmask(len(asked), self._vocab_size)
        fill_next_token_bitmask_par(self._executor, matchers, masks_AW)
        self._forbid_early_ends(matchers, masks_AW)
        return Masks(self._upload(np.array([i for i, _ in asked])), self._upload(masks_AW))

    def remember(self, rows: Sequence[SampledRow], tokens_S: torch.Tensor) -> None:
        """What has just been sampled for these rows; `tokens_S` is on its way to the host."""
        index_of = {row.seq: i for i, row in enumerate(rows) if row.params.grammar is not None}
        event = None
        if index_of and self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._sampled = _Sampled(index_of, tokens_S, event)

    def _forbid_early_ends(self, matchers: Sequence[tuple[LLMatcher, int]], masks_AW: NDArray[np.int32]) -> None:
        """In place. A model's end token may be an ordinary one, whose text a grammar takes: within thoughts, say, or in a
        string. But that text would be over, and not what was asked for."""
        for matcher, a in matchers:
            if (masks_AW[a, self._words_E] & self._ends_E).any() and not matcher.is_accepting():
                rest_W = masks_AW[a].copy()
                rest_W[self._words_E] &= ~self._ends_E
                if rest_W.any():  # else the matcher has failed, or nothing but that token has such a text
                    masks_AW[a] = rest_W

    def _at(self, row: SampledRow) -> LLMatcher:
        """The sequence's matcher, after all tokens before this row's. Raises RuntimeError if they can't be known."""
        assert row.history is not None and row.params.grammar is not None
        num_tokens = row.history.num_before + row.num_generated
        matching = self._matching.pop(row.seq, None)
        if matching is None or matching.num_tokens not in (num_tokens, num_tokens - 1):
            matching = _Matching(LLMatcher(self._tokenizer, row.params.grammar, log_level=0), 0)
        self._matching[row.seq] = matching
        tokens = row.history.generated[matching.num_tokens : num_tokens].tolist()
        if matching.num_tokens + len(tokens) < num_tokens:
            tokens.append(self._under_way(row.seq))
        if matching.num_tokens + len(tokens) != num_tokens:
            raise RuntimeError(
                f"sequence {row.seq}: {num_tokens} tokens to match, and {matching.num_tokens + len(tokens)} are known"
            )
        matching.matcher.consume_tokens(tokens)  # one that came after the end is a row too many, which nobody gets
        matching.num_tokens = num_tokens
        return matching.matcher

    def _under_way(self, seq: int) -> int:
        """The token that the step before sampled."""
        if self._sampled is None or seq not in self._sampled.index_of:
            raise RuntimeError(f"sequence {seq}: the token before is not known here")
        if self._sampled.event is not None:
            self._sampled.event.synchronize()
        return int(self._sampled.tokens_S[self._sampled.index_of[seq]])

    def _upload(self, values: "np.ndarray[tuple[int, ...], np.dtype[np.signedinteger]]") -> torch.Tensor:
        host = torch.from_numpy(values)
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host


def mask(x_SV: torch.Tensor, masks: Masks) -> None:
    """Leave only what may come, in place."""
    token_V = torch.arange(x_SV.shape[1], device=x_SV.device)
    words_AV = masks.allowed_AW[:, token_V // 32]
    allowed_AV = (words_AV >> (token_V % 32).int()) & 1
    x_SV[masks.rows_A] = x_SV[masks.rows_A].masked_fill(allowed_AV == 0, -torch.inf)
