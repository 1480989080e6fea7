"""Mixtures of experts: which experts a row goes to, and the weighted sum of what these make of it.

    route         the top-k of softmax(logits), and their weights
    mix_experts   sum over s of weights[s] * down(act(gate(x)) * up(x)), each product by expert experts[s]

Rounding is that of transformers' experts (`transformers.integrations.moe`): products accumulate in fp32 and are rounded before
a bias is added, and again after; only the weighted sum is rounded once, at its end, whichever the order of experts.

Weights may be packed: blocks of 32 numbers of 4 bits (e2m1) with one scale each (e8m0), after the OCP's MX formats.

Shape suffixes: T rows, S experts of a row, X experts, E hidden size, I intermediate size, N = 2 I (of packed weights, and K:
features out and in), G blocks, B bytes of a block.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)

PACKED_BYTES = 16
"""Of a block of packed weights, ..."""
PACKED_BLOCK = 2 * PACKED_BYTES
"""... and the numbers that it holds."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By exponent and mantissa; the highest of four bits is the sign."""

MOST_ROWS = 8192
"""Of a slice: Triton works on more rows in slices, so that what lies between the products stays bounded."""


@dataclass(frozen=True, slots=True)
class Gate:
    """How gate and up meet: `act(gate) * (up + up_offset)`, both clamped before.

    gpt-oss: `Gate(alpha=1.702, limit=7.0, up_offset=1.0, interleaved=True)`.
    """

    activation: Literal["silu", "gelu_tanh"] = "silu"
    alpha: float = 1.0
    """Of SiLU: `x * sigmoid(alpha x)`."""
    limit: float | None = None
    """The most that gate may be, and that up may be either way."""
    up_offset: float = 0.0
    interleaved: bool = False
    """Whether gate and up take turns in the 2 I; else gate is the first half."""

    def __post_init__(self) -> None:
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation must be 'silu' or 'gelu_tanh', got {self.activation!r}")
        if self.activation != "silu" and self.alpha != 1:
            raise ValueError(f"alpha {self.alpha} is of SiLU, not of {self.activation!r}")

    def of(self, gate_up_RN: torch.Tensor) -> torch.Tensor:
        """What gate and up `[R, 2 I]` make together, `[R, I]`."""
        parts = (gate_up_RN[:, ::2], gate_up_RN[:, 1::2]) if self.interleaved else gate_up_RN.chunk(2, -1)
        full_RI, up_RI = parts[0].float(), parts[1]
        if self.limit is not None:
            full_RI, up_RI = full_RI.clamp(max=self.limit), up_RI.clamp(-self.limit, self.limit)
        if self.activation == "silu":
            active_RI = full_RI * torch.sigmoid(self.alpha * full_RI)
        else:
            active_RI = functional.gelu(full_RI, approximate="tanh")
        return active_RI.to(gate_up_RN.dtype) * (up_RI + self.up_offset)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Weights `[X, N, K]` in blocks along K, as gpt-oss is shipped. Raises ValueError for shapes, dtypes or strides that don't
    fit."""

    blocks_XNGB: torch.Tensor
    """uint8 `[X, N, K / 32, 16]`: the first number of each two in the low bits."""
    scales_XNG: torch.Tensor
    """uint8, the exponent of a power of two plus 127."""

    def __post_init__(self) -> None:
        blocks, scales = self.blocks_XNGB, self.scales_XNG
        if (
            blocks.shape != (*scales.shape, PACKED_BYTES)
            or scales.dim() != 3
            or not blocks.dtype == scales.dtype == torch.uint8
            or not (blocks.is_contiguous() and scales.is_contiguous())
        ):
            raise ValueError(
                f"packed weights {tuple(blocks.shape)} {blocks.dtype} with strides {blocks.stride()}, scales "
                f"{tuple(scales.shape)} {scales.dtype} with strides {scales.stride()}"
            )

    @property
    def shape(self) -> torch.Size:
        """`(X, N, K)`, as of plain weights."""
        num_experts, num_out, blocks = self.scales_XNG.shape
        return torch.Size((num_experts, num_out, PACKED_BLOCK * blocks))

    @property
    def device(self) -> torch.device:
        return self.blocks_XNGB.device

    @property
    def nbytes(self) -> int:
        """Of numbers and scales."""
        return self.blocks_XNGB.nbytes + self.scales_XNG.nbytes

    def stride(self) -> tuple[int, int, int]:
        """In bytes of `blocks_XNGB`; those of scales are 1/16 of the first two."""
        experts, columns, *_ = self.blocks_XNGB.stride()
        return experts, columns, 1

    def dequantise(self, dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        """The weights that they stand for, `[X, N, K]`, or one expert's `[N, K]`. Exact in bf16 and fp32."""
        whose = slice(None) if expert is None else slice(expert, expert + 1)
        blocks_XNGB, scales_XNG = self.blocks_XNGB[whose], self.scales_XNG[whose]
        numbers = torch.tensor([*_E2M1, *(-x for x in _E2M1)], device=self.device)
        codes = torch.stack((blocks_XNGB & 15, blocks_XNGB >> 4), -1)  # of a byte, the low one first
        full = torch.ldexp(numbers[codes.int()].flatten(-2), scales_XNG.int().unsqueeze(-1) - 127)
        weights_XNK = full.flatten(-2).to(dtype)
        return weights_XNK if expert is None else weights_XNK[0]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """Of all experts of a layer. Where they are stored transposed (`[X, E, 2I]`, `[X, I, E]`: gpt-oss) give a transposed view.

    Raises ValueError for shapes, dtypes or strides that don't fit.
    """

    gate_up_XNE: torch.Tensor | Packed
    down_XEI: torch.Tensor | Packed
    gate: Gate
    gate_up_bias_XN: torch.Tensor | None = None
    down_bias_XE: torch.Tensor | None = None

    def __post_init__(self) -> None:
        gate_up, down = self.gate_up_XNE, self.down_XEI
        num_experts, hidden, width = down.shape
        fits = gate_up.shape == (num_experts, 2 * width, hidden) and _type_of(gate_up) == _type_of(down)
        if not fits or any(1 not in weight.stride()[1:] for weight in (gate_up, down)):
            raise ValueError(
                f"gate and up {tuple(gate_up.shape)} {_type_of(gate_up)} with strides {gate_up.stride()}, down "
                f"{tuple(down.shape)} {_type_of(down)} with strides {down.stride()}"
            )
        for bias, weight in ((self.gate_up_bias_XN, gate_up), (self.down_bias_XE, down)):
            if bias is not None and (bias.shape != weight.shape[:2] or bias.dtype != self.dtype or bias.stride(1) != 1):
                raise ValueError(
                    f"bias {tuple(bias.shape)} {bias.dtype} with strides {bias.stride()} for weights {tuple(weight.shape)} "
                    f"{self.dtype}"
                )

    @property
    def dtype(self) -> torch.dtype | None:
        """That rows must have; None: packed weights without biases take any."""
        weight = self.down_XEI
        if isinstance(weight, torch.Tensor):
            return weight.dtype
        bias = self.gate_up_bias_XN if self.down_bias_XE is None else self.down_bias_XE
        return None if bias is None else bias.dtype

    @property
    def is_packed(self) -> bool:
        return isinstance(self.down_XEI, Packed)

    @property
    def num_experts(self) -> int:
        """X."""
        return self.down_XEI.shape[0]

    @property
    def hidden_size(self) -> int:
        """E."""
        return self.down_XEI.shape[1]

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.down_XEI.shape[2]


def route(logits_TX: torch.Tensor, top_k: int, *, normalise: bool, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each row `[T, top_k]` int32, the likeliest first, and their weights `[T, top_k]` in fp32.

    The weights are softmax over all experts, in fp32; with `normalise` divided by their sum (Mixtral, Qwen3-MoE), which is
    softmax over the chosen ones (gpt-oss). Of equal logits the lower index comes first; NaN counts as the largest.

    Raises:
        ValueError: `top_k` isn't 1 to X, rows that aren't contiguous, or an unknown backend.
    """
    if logits_TX.dim() != 2 or not 1 <= top_k <= logits_TX.shape[1] or logits_TX.stride(1) != 1:
        raise ValueError(f"top {top_k} of logits {tuple(logits_TX.shape)} with strides {logits_TX.stride()}")
    match backend:
        case "torch":
            return _route_torch(logits_TX, top_k, normalise)
        case "triton":
            from kernels import experts_triton

            return experts_triton.route(logits_TX, top_k, normalise)
    raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def mix_experts(
    x_TE: torch.Tensor,
    experts_TS: torch.Tensor,
    weights_TS: torch.Tensor,
    weights: ExpertWeights,
    *,
    residual_TE: torch.Tensor | None = None,
    backend: str,
) -> torch.Tensor:
    """The weighted sum of what the experts of each row make of it, `[T, E]`, new; or, with a residual, which must not be `x`,
    that sum in place of it. Rounded before the residual is added.

    The same numbers on every run: nothing is summed in an order that depends on timing. `experts_TS` (int32 or int64) is not
    checked: each must be in [0, X). With Triton nothing waits for the device, so that it can be captured in a CUDA graph.

    Raises:
        ValueError: shapes, dtypes or strides that don't fit, or an unknown backend.
    """
    is_of_type = weights.dtype in (x_TE.dtype, None)
    if residual_TE is not None and (
        residual_TE.shape != x_TE.shape
        or residual_TE.dtype != x_TE.dtype
        or residual_TE.stride(1) != 1
        or (len(x_TE) and residual_TE.data_ptr() == x_TE.data_ptr())
    ):
        raise ValueError(
            f"rows {tuple(x_TE.shape)} {x_TE.dtype} for a residual {tuple(residual_TE.shape)} {residual_TE.dtype} with strides "
            f"{residual_TE.stride()}, which must not be the rows themselves"
        )
    if x_TE.dim() != 2 or x_TE.shape[1] != weights.hidden_size or x_TE.stride(1) != 1 or not is_of_type:
        raise ValueError(
            f"rows {tuple(x_TE.shape)} {x_TE.dtype} with strides {x_TE.stride()} for experts of hidden size "
            f"{weights.hidden_size}, {weights.dtype}"
        )
    if (
        experts_TS.dtype not in (torch.int32, torch.int64)
        or experts_TS.dim() != 2
        or experts_TS.shape[0] != x_TE.shape[0]
        or weights_TS.shape != experts_TS.shape
        or not (experts_TS.is_contiguous() and weights_TS.is_contiguous())
    ):
        raise ValueError(
            f"{x_TE.shape[0]} rows, experts {tuple(experts_TS.shape)} {experts_TS.dtype} with strides {experts_TS.stride()}, "
            f"weights {tuple(weights_TS.shape)} with strides {weights_TS.stride()}"
        )
    match backend:
        case "torch":
            out_TE = _mix_experts_torch(x_TE, experts_TS, weights_TS, weights)
            return out_TE if residual_TE is None else residual_TE.add_(out_TE)
        case "triton":
            from kernels import experts_triton

            return experts_triton.mix_experts(x_TE, experts_TS, weights_TS, weights, residual_TE)
    raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def _type_of(weight: torch.Tensor | Packed) -> torch.dtype | str:
    return weight.dtype if isinstance(weight, torch.Tensor) else "packed"


def _plain(weight: torch.Tensor | Packed, expert: int, dtype: torch.dtype) -> torch.Tensor:
    return weight[expert] if isinstance(weight, torch.Tensor) else weight.dequantise(dtype, expert)


def _route_torch(logits_TX: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    full_TX = logits_TX.float()
    order_TX = torch.sort(full_TX, dim=-1, descending=True, stable=True).indices  # topk promises no order of equals
    experts_TS = order_TX[:, :top_k]
    weights_TS = full_TX.softmax(-1).gather(1, experts_TS)
    if normalise:
        weights_TS = full_TX.gather(1, experts_TS).softmax(-1)
    return experts_TS.int(), weights_TS


def _mix_experts_torch(
    x_TE: torch.Tensor, experts_TS: torch.Tensor, weights_TS: torch.Tensor, weights: ExpertWeights
) -> torch.Tensor:
    out_TE = torch.zeros(x_TE.shape, dtype=torch.float32, device=x_TE.device)
    for expert in sorted(set(experts_TS.flatten().tolist())):
        row_R, at_R = (experts_TS == expert).nonzero(as_tuple=True)
        gate_up_RN = functional.linear(x_TE[row_R], _plain(weights.gate_up_XNE, expert, x_TE.dtype))
        if weights.gate_up_bias_XN is not None:
            gate_up_RN += weights.gate_up_bias_XN[expert]
        part_RE = functional.linear(weights.gate.of(gate_up_RN), _plain(weights.down_XEI, expert, x_TE.dtype))
        if weights.down_bias_XE is not None:
            part_RE += weights.down_bias_XE[expert]
        out_TE.index_add_(0, row_R, part_RE.float() * weights_TS[row_R, at_R].float().unsqueeze(1))
    return out_TE.to(x_TE.dtype)
