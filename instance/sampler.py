"""From logits to tokens: a function of (seed, position, logits) and nothing else.

So a request that is preempted, resumed or re-homed goes on as if nothing had happened, whatever runs beside it. Randomness is
the Gumbel-max trick (argmax of logits / T + Gumbel noise samples from softmax(logits / T)) with noise from a counter-based
hash of (seed, position, token), as in Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from collections.abc import Sequence

import torch

from gmanager.wire.messages import SequenceParams

_MASK = 0xFFFFFFFF

_LEAST_TEMPERATURE = 1e-5
"""Below it a row is greedy, as in vLLM: logits divided by less may overflow."""


def scratch_bytes(num_rows: int, vocab_size: int) -> int:
    """Most bytes that sampling that many rows takes: their logits in float32, sorted, as probabilities and as noise."""
    return num_rows * vocab_size * 10 * 4


def sample(logits_SV: torch.Tensor, params: Sequence[SequenceParams], positions: Sequence[int]) -> torch.Tensor:
    """One token id for each row `[S]`, int64. `positions[i]`: of the token that row i yields."""
    tokens_S = logits_SV.argmax(-1)
    random = [i for i, p in enumerate(params) if p.temperature >= _LEAST_TEMPERATURE]
    if random:
        rows = torch.tensor(random, device=logits_SV.device)
        chosen = [params[i] for i in random]
        scaled = logits_SV[rows].float()
        scaled = scaled / _column([p.temperature for p in chosen], scaled)
        scaled = _keep_top_k(scaled, [p.top_k for p in chosen])
        scaled = _keep_top_p(scaled, [p.top_p for p in chosen])
        uniform = _uniform([p.seed for p in chosen], [positions[i] for i in random], scaled)
        tokens_S[rows] = (scaled - torch.log(-torch.log(uniform))).argmax(-1)
    return tokens_S


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _keep_top_k(logits: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    vocab = logits.shape[-1]
    counts = [min(k, vocab) if k > 0 else vocab for k in top_k]
    if min(counts) == vocab:
        return logits
    ordered = logits.sort(-1, descending=True).values
    last = ordered.gather(1, torch.tensor(counts, device=logits.device).unsqueeze(1) - 1)
    return logits.masked_fill(logits < last, -torch.inf)


def _keep_top_p(logits: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    if min(top_p) >= 1:
        return logits
    ordered, index = logits.sort(-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    # a row that keeps all must not lose its tail to the rounding of a sum over the vocabulary
    drop = before >= _column([p if p < 1 else float("inf") for p in top_p], logits)
    drop[:, 0] = False  # the likeliest token always stays
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), -torch.inf)


def _uniform(seeds: Sequence[int], positions: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), one for each row and token."""
    key = _mix(
        torch.tensor([s & _MASK for s in seeds]) ^ _mix(torch.tensor([s >> 32 for s in seeds]) ^ _mix(torch.tensor(positions)))
    ).to(like.device)
    token = torch.arange(like.shape[-1], device=like.device)
    bits = _mix(key.unsqueeze(1) ^ _mix(token + 0x9E3779B9).unsqueeze(0))
    return ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23  # 23 bits and a half: exact in float32, never 0 or 1


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit finalizer of MurmurHash3 on the low half of int64."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
