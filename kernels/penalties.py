"""Logits of tokens that a sequence already has, made less (or more) likely.

For row s with the state n = states[slots[s]], its logits x and its factors (repetition r, presence p, frequency f):

    x[v] = x[v] / r if x[v] > 0 else x[v] * r      where n[v] != 0
    x[v] = x[v] - f * g[v] - p * (g[v] > 0)        g[v] = n[v] >> 1

`n[v]` counts a token's generations in steps of 2; its lowest bit says that the token stands in the prompt. Nothing changes in a
row whose slot is -1.

Sources: CTRL (Keskar et al. 2019, section 4.1) for repetition, OpenAI's API reference for the others, vLLM for their order.

Shape suffixes: S rows, V tokens of the vocabulary, N slots; 3 the factors r, p, f.
"""

import torch


def penalize(
    x_SV: torch.Tensor, states_NV: torch.Tensor, slots_S: torch.Tensor, factors_S3: torch.Tensor, *, backend: str
) -> None:
    """In place, of float32 logits. States are int32, slots int64. Backend "torch" or "triton".

    Raises:
        ValueError: shapes or dtypes that don't fit, rows that aren't contiguous, or an unknown backend.
    """
    rows, vocab = x_SV.shape
    if states_NV.shape[1] != vocab or slots_S.shape != (rows,) or factors_S3.shape != (rows, 3):
        raise ValueError(
            f"logits {tuple(x_SV.shape)}, states {tuple(states_NV.shape)}, slots {tuple(slots_S.shape)}, factors "
            f"{tuple(factors_S3.shape)} don't fit together"
        )
    if (x_SV.dtype, states_NV.dtype, slots_S.dtype, factors_S3.dtype) != (
        torch.float32,
        torch.int32,
        torch.int64,
        torch.float32,
    ):
        raise ValueError(
            f"logits {x_SV.dtype}, states {states_NV.dtype}, slots {slots_S.dtype}, factors {factors_S3.dtype}: they must be "
            "float32, int32, int64 and float32"
        )
    if not all(x.is_contiguous() for x in (x_SV, states_NV, slots_S, factors_S3)):
        raise ValueError("logits, states, slots and factors must be contiguous")
    if not rows:
        return
    match backend:
        case "torch":
            _penalize_torch(x_SV, states_NV, slots_S, factors_S3)
        case "triton":
            from kernels import triton_ops

            triton_ops.penalize(x_SV, states_NV, slots_S, factors_S3)
        case _:
            raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def _penalize_torch(x_SV: torch.Tensor, states_NV: torch.Tensor, slots_S: torch.Tensor, factors_S3: torch.Tensor) -> None:
    state_SV = torch.where(slots_S[:, None] >= 0, states_NV[slots_S.clamp(min=0)], 0)
    repetition_S1, presence_S1, frequency_S1 = (factors_S3[:, i : i + 1] for i in range(3))
    scaled_SV = torch.where(x_SV > 0, x_SV / repetition_S1, x_SV * repetition_S1)
    generated_SV = state_SV >> 1
    x_SV.copy_(torch.where(state_SV != 0, scaled_SV, x_SV))
    x_SV -= frequency_S1 * generated_SV
    x_SV -= presence_S1 * (generated_SV > 0)
