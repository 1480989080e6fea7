"""Plain-torch attention, the twin of every attention kernel, and the one comparison that tests use.

Shape suffixes: T rows, S tokens of KV, H query heads, K KV heads, G = H / K query heads of one KV head, D head dim.
"""

from dataclasses import dataclass

import torch


def attention_state(
    q_THD: torch.Tensor,
    k_SKD: torch.Tensor,
    v_SKD: torch.Tensor,
    scale: float,
    kv_lens_T: torch.Tensor | None = None,
    *,
    starts_T: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each row over the tokens `[starts_T[t], kv_lens_T[t])` (from 0, up to S if None), as a partial state.

        s_j = scale * q . k_j        lse = log sum_j exp(s_j)        out = sum_j exp(s_j - lse) v_j

    With a soft cap c > 0, s_j = c tanh(scale * q . k_j / c).

    Computes in float64 if q is float64, else in fp32, whatever the device; needs T * H * S scores of memory. Values may be of
    another width than keys.

    Returns:
        `out_THD` in q's dtype and `lse_TH` (natural log) in the dtype of the computation. A row that sees nothing has
        `out = 0`, `lse = -inf`. A token that no row sees may
        be NaN.
    """
    num_rows, num_heads, head_dim = q_THD.shape
    num_tokens, num_kv_heads, _ = k_SKD.shape
    value_dim = v_SKD.shape[2]
    group = num_heads // num_kv_heads
    compute = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
    q_KMD = q_THD.to(compute).view(num_rows, num_kv_heads, group, head_dim).transpose(0, 1).flatten(1, 2)
    k_KDS = k_SKD.to(compute).permute(1, 2, 0)
    v_KSD = v_SKD.to(compute).transpose(0, 1)

    score_KTGS = (scale * (q_KMD @ k_KDS)).view(num_kv_heads, num_rows, group, num_tokens)
    if soft_cap:
        score_KTGS = soft_cap * (score_KTGS / soft_cap).tanh()
    if kv_lens_T is not None or starts_T is not None:
        token_S = torch.arange(num_tokens, device=q_THD.device)
        hidden_TS = token_S >= (num_tokens if kv_lens_T is None else kv_lens_T[:, None])
        if starts_T is not None:
            hidden_TS = hidden_TS | (token_S < starts_T[:, None])
        hidden_TS = hidden_TS.expand(num_rows, num_tokens)
        score_KTGS = score_KTGS.masked_fill(hidden_TS[:, None, :], -torch.inf)
        v_KSD = v_KSD.masked_fill(hidden_TS.all(dim=0)[:, None], 0.0)  # 0 * NaN is NaN
    lse_KTG = score_KTGS.logsumexp(dim=-1)
    shift_KTG = lse_KTG.masked_fill(lse_KTG == -torch.inf, 0.0)  # exp(-inf - -inf) is NaN
    weight_KTGS = (score_KTGS - shift_KTG[..., None]).exp()
    out_KTGD = (weight_KTGS.flatten(1, 2) @ v_KSD).view(num_kv_heads, num_rows, group, value_dim)
    out_THD = out_KTGD.transpose(0, 1).reshape(num_rows, num_heads, value_dim)
    return out_THD.to(q_THD.dtype), lse_KTG.transpose(0, 1).reshape(num_rows, num_heads)


def with_sinks(out_THD: torch.Tensor, lse_TH: torch.Tensor, sinks_H: torch.Tensor) -> torch.Tensor:
    """The output of rows whose softmax has one more logit for each head, which stands for no value.

        out exp(lse) / (exp(lse) + exp(sink))

    The twin of `kernels.merge_state.apply_sinks`, of whole states: in the dtype of `lse`.
    """
    weight_TH = lse_TH.exp() / (lse_TH.exp() + sinks_H.to(lse_TH.dtype).exp())
    return out_THD.to(lse_TH.dtype) * weight_TH.unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class Difference:
    """Absolute errors against the expected values."""

    max: float
    rms: float


def compare(actual: torch.Tensor, expected_f64: torch.Tensor, *, rms: float, max: float) -> Difference:
    """The errors of `actual`, of any dtype and device, against a float64 reference of the same shape.

    Infinities must stand at the same places with the same sign; they count as error 0.

    Raises:
        AssertionError: with the figures, if the maximum or the RMS error exceeds its bound, a shape differs, an infinity
            stands alone, or either side holds a NaN (also where both do).
        ValueError: if the reference is not float64.
    """
    if expected_f64.dtype != torch.float64:
        raise ValueError(f"the reference must be float64, got {expected_f64.dtype}")
    if actual.shape != expected_f64.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected_f64.shape)}")
    got, want = actual.detach().cpu().double(), expected_f64.detach().cpu()
    for name, tensor in (("actual", got), ("expected", want)):
        if bool(tensor.isnan().any()):
            raise AssertionError(f"{name} values hold {int(tensor.isnan().sum()):,} NaN of {tensor.numel():,}")
    infinite = got.isinf() | want.isinf()
    wrong = infinite & (got != want)
    if bool(wrong.any()):
        raise AssertionError(f"{int(wrong.sum()):,} of {wrong.numel():,} values are infinite on one side only")
    error = (got - want).masked_fill(infinite, 0.0)
    if not error.numel():
        return Difference(0.0, 0.0)
    found = Difference(float(error.abs().max()), float(error.square().mean().sqrt()))
    if found.max > max or found.rms > rms:
        where = tuple(int(i) for i in torch.unravel_index(error.abs().argmax(), error.shape))
        raise AssertionError(
            f"max error {found.max:.3e} (bound {max:.1e}) at {where}, RMS error {found.rms:.3e} (bound {rms:.1e})"
        )
    return found
