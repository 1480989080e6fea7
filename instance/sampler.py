"""From logits to tokens: a function of (seed, position, logits, tokens so far) and nothing else.

So a request that is preempted, resumed or re-homed goes on as if nothing had happened, whatever runs beside it. Randomness is
the Gumbel-max trick (argmax of logits / T + Gumbel noise samples from softmax(logits / T)) with noise from a counter-based
hash of (seed, position, token), as in Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

What is asked for is done in vLLM's order: biases, tokens that may not come (yet), penalties, grammars
(`instance.grammars`); then, where a row is not greedy,
temperature, min_p, top_k and top_p. How often a sequence has each token is counted on the device as tokens are sampled there
(`_States`), so that a step never waits for the tokens of the one before.

Shape suffixes: S rows, V tokens of the vocabulary, N slots, R some of the rows, B biased logits, W bad words, K their tokens.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from llguidance import LLTokenizer

from gmanager.wire.messages import MAX_BAD_WORD_TOKENS, SequenceParams
from instance.grammars import Grammars, Masks, mask
from instance.plan import SampledRow
from instance.sequence import History
from kernels.penalties import penalize
from kernels.upload import upload

_MASK = 0xFFFFFFFF

_LEAST_TEMPERATURE = 1e-5
"""Below it a row is greedy, as in vLLM: logits divided by less may overflow."""

_FIRST_SLOTS = 8
_BEST_PARTS = 64
"""At most, of which each has a best token first."""
_NEVER = -1e38
"""Added to the logit of a token that may not come. Not infinity: where a grammar leaves nothing else, it comes all the same."""
_NO_TOKEN = -2
_ANY_TOKEN = -1


def scratch_bytes(num_rows: int, vocab_size: int) -> int:
    """Most bytes that sampling that many rows takes: their logits in float32, adjusted, sorted, as probabilities and as noise,
    and how often their sequences have each token."""
    return num_rows * vocab_size * 11 * 4


class Sampler:
    """Chooses the tokens of one instance's sequences. To be used in one thread, step by step."""

    def __init__(self, vocab_size: int, device: torch.device, *, backend: str, max_rows: int) -> None:
        """`max_rows`: most that one step samples."""
        self._device = device
        self._backend = backend
        self._states = _States(vocab_size, device, max_rows)
        self._grammars: Grammars | None = None
        self._batch: _Batch | None = None

    def use_text(self, tokenizer: LLTokenizer) -> None:
        """From now on sequences may have grammars."""
        self._grammars = Grammars(tokenizer, self._states.counts_NV.shape[1], self._device)

    def remember(self, rows: Sequence[SampledRow], tokens_S: torch.Tensor) -> None:
        """What `sample` has just given, on its way to the host: the next masks depend on it."""
        if self._grammars is not None:
            self._grammars.remember(rows, tokens_S)

    def sample(self, logits_SV: torch.Tensor, rows: Sequence[SampledRow]) -> torch.Tensor:
        """One token id for each row `[S]`, int64. `logits_SV` stays as it is."""
        slots = self._states.slots_of(rows)
        key = [(row.seq, row.num_generated < row.params.min_tokens, slot) for row, slot in zip(rows, slots, strict=True)]
        batch = self._batch
        if batch is None or batch.key != key:  # mostly the sequences are those of the step before
            batch = self._batch = _Batch.of(key, rows, slots, logits_SV.shape[1], self._device)
        masks = None if self._grammars is None else self._grammars.masks(rows)
        if self._grammars is None and any(row.params.grammar is not None for row in rows):
            raise RuntimeError("a sequence has a grammar, and nothing is known of the model's tokens")
        logits_SV = self._adjust(logits_SV, batch, masks)
        tokens_S = _best(logits_SV)
        if batch.random is not None:
            self._choose(tokens_S, logits_SV, batch.random, rows)
        if batch.counted is not None:
            self._states.add(batch.counted, tokens_S)
        return tokens_S

    def _adjust(self, logits_SV: torch.Tensor, batch: "_Batch", masks: Masks | None) -> torch.Tensor:
        """Biases, penalties and grammars of those rows that ask for some; a copy, in float32, if any does."""
        if masks is None and not (batch.biases or batch.words or batch.counted):
            return logits_SV
        x_SV = logits_SV.to(torch.float32, copy=True)
        if batch.biases is not None:
            x_SV.index_put_((batch.biases.rows_B, batch.biases.tokens_B), batch.biases.values_B, accumulate=True)
        if batch.words is not None:
            words = batch.words
            recent_WK = self._states.recent_NK[words.slots_W, -words.before_WK.shape[1] :]
            comes_W = ((recent_WK == words.before_WK) | (words.before_WK == _ANY_TOKEN)).all(1)
            bans_W = torch.where(comes_W, _NEVER, 0.0)
            x_SV.index_put_((words.rows_W, words.last_W), bans_W, accumulate=True)
        if batch.counted is not None:
            counted = batch.counted
            penalize(x_SV, self._states.counts_NV, counted.slots_S, counted.factors_S3, backend=self._backend)
        if masks is not None:
            mask(x_SV, masks)
        return x_SV

    def _choose(self, tokens_S: torch.Tensor, logits_SV: torch.Tensor, random: "_Random", rows: Sequence[SampledRow]) -> None:
        scaled = logits_SV[random.rows_R].float() / random.temperature_R1
        if random.min_p_R1 is not None:
            least = scaled.amax(-1, keepdim=True) + random.min_p_R1.log()
            scaled = scaled.masked_fill(scaled < least, -math.inf)
        if random.top_k_R1 is not None:
            last = scaled.sort(-1, descending=True).values.gather(1, random.top_k_R1 - 1)
            scaled = scaled.masked_fill(scaled < last, -math.inf)
        if random.top_p_R1 is not None:
            scaled = _keep_top_p(scaled, random.top_p_R1)
        positions_R = upload([rows[i].position for i in random.rows], self._device)
        uniform = _uniform(random.seed_low_R, random.seed_high_R, positions_R, scaled.shape[-1])
        tokens_S[random.rows_R] = _best(scaled - torch.log(-torch.log(uniform)))


def _best(x_SV: torch.Tensor) -> torch.Tensor:
    """`x.argmax(-1)`, the first of equals. In two steps: PyTorch's kernel has one block of threads for a row, and took an H200
    31 us for 128,256 tokens."""
    num_rows, width = x_SV.shape
    parts = _parts_of(width)
    best_SP, places_SP = x_SV.view(num_rows, parts, width // parts).max(-1)
    part_S1 = best_SP.argmax(-1, keepdim=True)
    tokens_S: torch.Tensor = (places_SP.gather(1, part_S1) + part_S1 * (width // parts)).squeeze(1)
    return tokens_S


@functools.cache
def _parts_of(width: int) -> int:
    """As many parts of one size as there may be."""
    return max(number for number in range(1, _BEST_PARTS + 1) if width % number == 0)


# --- what is the same in all steps that sample for the same sequences -------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Biases:
    rows_B: torch.Tensor
    tokens_B: torch.Tensor
    values_B: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Words:
    """Bad words: where the newest tokens are those of `before`, `last` may not come."""

    rows_W: torch.Tensor
    slots_W: torch.Tensor
    before_WK: torch.Tensor
    """Right-aligned."""
    last_W: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Counted:
    """Rows whose tokens are counted."""

    slots_S: torch.Tensor
    """-1: not counted."""
    factors_S3: torch.Tensor
    rows_R: torch.Tensor
    slots_R: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Random:
    """Rows that are not greedy. None: no row asks for it."""

    rows: list[int]
    rows_R: torch.Tensor
    temperature_R1: torch.Tensor
    min_p_R1: torch.Tensor | None
    top_k_R1: torch.Tensor | None
    top_p_R1: torch.Tensor | None
    seed_low_R: torch.Tensor
    seed_high_R: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Batch:
    key: list[tuple[int, bool, int]]
    biases: _Biases | None
    words: _Words | None
    counted: _Counted | None
    random: _Random | None

    @staticmethod
    def of(
        key: list[tuple[int, bool, int]],
        rows: Sequence[SampledRow],
        slots: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> "_Batch":
        return _Batch(
            key,
            biases=_biases(rows, device),
            words=_words(rows, slots, device),
            counted=_counted(rows, slots, device),
            random=_random(rows, vocab_size, device),
        )


def _biases(rows: Sequence[SampledRow], device: torch.device) -> _Biases | None:
    found: list[tuple[int, int, float]] = []
    for i, row in enumerate(rows):
        found += [(i, token, bias) for token, bias in row.params.logit_bias.items()]
        if row.num_generated < row.params.min_tokens:
            found += [(i, token, _NEVER) for token in row.params.stop_token_ids]
    if not found:
        return None
    at, tokens, values = zip(*found, strict=True)
    return _Biases(upload(at, device), upload(tokens, device), upload(values, device, torch.float32))


def _words(rows: Sequence[SampledRow], slots: Sequence[int], device: torch.device) -> _Words | None:
    found = [(i, slot, word) for i, (row, slot) in enumerate(zip(rows, slots, strict=True)) for word in row.params.bad_words]
    if not found:
        return None
    width = max(1, *(len(word) - 1 for _, _, word in found))
    before = [token for _, _, word in found for token in [_ANY_TOKEN] * (width - len(word) + 1) + word[:-1]]
    return _Words(
        rows_W=upload([i for i, _, _ in found], device),
        slots_W=upload([slot for _, slot, _ in found], device),
        before_WK=upload(before, device).view(len(found), width),
        last_W=upload([word[-1] for _, _, word in found], device),
    )


def _counted(rows: Sequence[SampledRow], slots: Sequence[int], device: torch.device) -> _Counted | None:
    counted = [i for i, slot in enumerate(slots) if slot >= 0]
    if not counted:
        return None
    factors = [
        factor
        for row in rows
        for factor in (row.params.repetition_penalty, row.params.presence_penalty, row.params.frequency_penalty)
    ]
    return _Counted(
        slots_S=upload(slots, device),
        factors_S3=upload(factors, device, torch.float32).view(len(rows), 3),
        rows_R=upload(counted, device),
        slots_R=upload([slots[i] for i in counted], device),
    )


def _random(rows: Sequence[SampledRow], vocab_size: int, device: torch.device) -> _Random | None:
    random = [i for i, row in enumerate(rows) if row.params.temperature >= _LEAST_TEMPERATURE]
    if not random:
        return None
    params: list[SequenceParams] = [rows[i].params for i in random]

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return upload(values, device, dtype).unsqueeze(1)

    return _Random(
        rows=random,
        rows_R=upload(random, device),
        temperature_R1=column([p.temperature for p in params]),
        min_p_R1=column([p.min_p for p in params]) if any(p.min_p for p in params) else None,
        top_k_R1=_top_k([p.top_k for p in params], vocab_size, device),
        # a row that keeps all must not lose its tail to the rounding of a sum over the vocabulary
        top_p_R1=column([p.top_p if p.top_p < 1 else math.inf for p in params]) if any(p.top_p < 1 for p in params) else None,
        seed_low_R=upload([p.seed & _MASK for p in params], device),
        seed_high_R=upload([p.seed >> 32 for p in params], device),
    )


def _top_k(values: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor | None:
    counts = [min(k, vocab_size) if k > 0 else vocab_size for k in values]
    return None if min(counts) == vocab_size else upload(counts, device).unsqueeze(1)


# --- how often sequences have each token ------------------------------------------------------------------------------


class _States:
    """Counts of the tokens of sequences that have a `History`, and their newest tokens: as many slots as a step has rows.

    A slot whose sequence was elsewhere meanwhile, or that went to another, is filled anew from the history on the host. A
    sequence of the step before always keeps its slot: one of its tokens is known here alone.
    """

    def __init__(self, vocab_size: int, device: torch.device, max_slots: int) -> None:
        self._device = device
        self._max_slots = max_slots
        self._known: dict[int, tuple[int, int]] = {}
        """seq -> its slot, and how many generated tokens are counted there; the one used longest ago first."""
        self.counts_NV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        """As `kernels.penalties` reads them."""
        self.recent_NK = torch.zeros((0, MAX_BAD_WORD_TOKENS), dtype=torch.int64, device=device)

    def slots_of(self, rows: Sequence[SampledRow]) -> list[int]:
        """Of each row's sequence, up to date; -1 where nothing is to be counted. Raises RuntimeError if tokens are unknown."""
        for row in rows:
            if row.seq in self._known:
                self._known[row.seq] = self._known.pop(row.seq)
        return [-1 if row.history is None else self._slot_of(row, row.history) for row in rows]

    def add(self, counted: _Counted, tokens_S: torch.Tensor) -> None:
        """Count what was sampled for the rows that `slots_of` was asked about last."""
        tokens_R = tokens_S[counted.rows_R]
        self.counts_NV[counted.slots_R, tokens_R] += 2
        recent_RK = self.recent_NK[counted.slots_R]
        self.recent_NK[counted.slots_R] = torch.cat([recent_RK[:, 1:], tokens_R[:, None]], 1)

    def _slot_of(self, row: SampledRow, history: History) -> int:
        num_generated = history.num_before + row.num_generated
        slot, num_counted = self._known.pop(row.seq, (None, 0))
        if slot is None or num_counted != num_generated:
            slot = self._take() if slot is None else slot
            self._fill_slot(slot, row.seq, history, num_generated)
        self._known[row.seq] = slot, num_generated + 1
        return slot

    def _take(self) -> int:
        """A slot: a new one while there may be more, else that of the sequence that was sampled longest ago."""
        used, size = len(self._known), len(self.counts_NV)
        if used == self._max_slots:
            slot, _ = self._known.pop(next(iter(self._known)))
            return slot
        if used == size:
            more = min(max(_FIRST_SLOTS, size), self._max_slots - size)
            self.counts_NV = torch.cat([self.counts_NV, self.counts_NV.new_zeros((more, self.counts_NV.shape[1]))])
            self.recent_NK = torch.cat([self.recent_NK, self.recent_NK.new_zeros((more, MAX_BAD_WORD_TOKENS))])
        taken = {slot for slot, _ in self._known.values()}
        return next(slot for slot in range(len(self.counts_NV)) if slot not in taken)

    def _fill_slot(self, slot: int, seq: int, history: History, num_generated: int) -> None:
        generated = history.generated[:num_generated]
        if len(generated) < num_generated:
            raise RuntimeError(f"sequence {seq}: {num_generated} tokens to count, and {len(generated)} are known")
        counts_V = self.counts_NV[slot].zero_()
        counts_V.index_fill_(0, upload(history.prompt, self._device), 1)
        counts_V.index_add_(0, upload(generated, self._device), counts_V.new_full((len(generated),), 2))
        recent = [_NO_TOKEN] * MAX_BAD_WORD_TOKENS + generated[-MAX_BAD_WORD_TOKENS:].tolist()
        self.recent_NK[slot] = upload(recent[-MAX_BAD_WORD_TOKENS:], self._device)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _keep_top_p(logits: torch.Tensor, top_p_R1: torch.Tensor) -> torch.Tensor:
    ordered, index = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    drop = probabilities.cumsum(-1) - probabilities >= top_p_R1
    drop[:, 0] = False  # the likeliest token always stays
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), -math.inf)


def _uniform(seed_low_R: torch.Tensor, seed_high_R: torch.Tensor, positions_R: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Numbers in (0, 1), one for each row and token."""
    key_R = _mix(seed_low_R ^ _mix(seed_high_R ^ _mix(positions_R)))
    token_V = torch.arange(vocab_size, device=key_R.device)
    bits = _mix(key_R.unsqueeze(1) ^ _mix(token_V + 0x9E3779B9).unsqueeze(0))
    return ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23  # 23 bits and a half: exact in float32, never 0 or 1


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit finalizer of MurmurHash3 on the low half of int64."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
