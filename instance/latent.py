"""Latent attention with absorbed projections: a token is stored as its latent; queries and outputs are made to fit it.

A layer of DeepSeek V2's kind makes keys and values of all heads from one latent c_j of each token, and adds to the keys one
rotated part r_j that is the same for all heads:

    k_hj = [W_UK_h c_j | r_j]        v_hj = W_UV_h c_j

so that scores and outputs can be had from latents alone, the two projections being the query's and the output's:

    q_h . k_hj = (W_UK_h^T q_nope_h) . c_j + q_rope_h . r_j        out_h = W_UV_h sum_j p_hj c_j

A token is one key [c_j | r_j] of one KV head, and its value is c_j. The query that travels to a holder is [W_UK_h^T q_nope_h |
q_rope_h], the state that returns is latent, and W_UV is applied once, at home, to what is merged.

transformers' modules stay as they are (norms, rotary, scale): only the projection from latents to heads (`kv_b_proj`) is
passed over within a step. It notes what it was given, and makes heads of zeros, of which attention reads the rotated part that
the module joins to them. Whether a model is like that is found by the names of its parts here, and by its logits
(`instance.exact`).

Source: DeepSeek-V2 (section 2.1 and appendix C).

Shape suffixes: T rows, H query heads, N and V dims of a head's unrotated key and its value, R rotated dim, C latent dim,
D = C + R.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from distattn.shape import AttentionShape
from instance.context import AttentionContext
from kvstore.sight import FULL

_PARTS = frozenset({"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"})
_QUERIES = (frozenset({"q_proj"}), frozenset({"q_a_proj", "q_a_layernorm", "q_b_proj"}))


@dataclass(frozen=True, slots=True)
class LatentDims:
    """Of a layer. N + R is its heads' key dim."""

    heads: int
    nope: int
    rotated: int
    value: int
    latent: int

    @staticmethod
    def of(attention: Any) -> "LatentDims | None":
        """Of a module with the parts of latent attention, and no others."""
        parts: dict[str, Any] = dict(attention.named_children())
        up = parts.get("kv_b_proj")
        if set(parts) not in [_PARTS | queries for queries in _QUERIES] or type(up) is not nn.Linear or up.bias is not None:
            return None
        names = ("num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        sizes = [getattr(attention, name, None) for name in names]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return None
        dims = LatentDims(*sizes)
        return dims if up.weight.shape == (dims.heads * (dims.nope + dims.value), dims.latent) else None


class LatentHeads:
    """One layer's way from rows of heads to latents and back, once it is bound to its module."""

    def __init__(self, attention: Any, dims: LatentDims, context: AttentionContext) -> None:
        """From now on the module makes no heads of latents within a step."""
        self.dims = dims
        self._context = context
        self._attention = attention
        attention.kv_b_proj.forward = _noting(attention.kv_b_proj.forward, dims, context)
        attention.distattn_latents = self

    def release(self) -> None:
        """The module is as it was."""
        del self._attention.kv_b_proj.forward, self._attention.distattn_latents

    def absorb(self, query_HTD: torch.Tensor, key_HTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`q_THD` over latents, and `k_T1D`: what is stored of the rows. Of the module's keys only what is rotated is read.

        Raises RuntimeError if the layer has projected nothing since the last call.
        """
        dims, latents_1TC = self.dims, self._context.latents_1TC
        if latents_1TC is None:
            raise RuntimeError("a layer called attention before it had made latents")
        self._context.latents_1TC = None
        nope_HTN, rotated_HTR = torch.split(query_HTD, [dims.nope, dims.rotated], -1)
        q_HTD = torch.cat((torch.bmm(nope_HTN, self._weights()[:, : dims.nope]), rotated_HTR), -1)
        k_TD = torch.cat((latents_1TC.view(-1, dims.latent), key_HTD[0, :, dims.nope :]), -1)
        return q_HTD.transpose(0, 1), k_TD.unsqueeze(1)

    def values(self, out_THC: torch.Tensor) -> torch.Tensor:
        """What heads put out, `[T, H, V]`."""
        return torch.bmm(out_THC.transpose(0, 1), self._weights()[:, self.dims.nope :].transpose(1, 2)).transpose(0, 1)

    def _weights(self) -> torch.Tensor:
        """`[H, N + V, C]`, W_UK above W_UV for each head: a view."""
        weight: torch.Tensor = self._attention.kv_b_proj.weight
        return weight.view(self.dims.heads, self.dims.nope + self.dims.value, self.dims.latent)


def bind_latents(
    module: nn.Module, shape: AttentionShape, context: AttentionContext, *, is_part: bool = False
) -> list[LatentHeads]:
    """Let all attention layers of a model attend to latents, if they can; empty: they can't, and nothing is changed.

    `shape`: of plain heads, without sinks. Layers with windows or soft caps stay plain: no model has them beside latents, and
    the kernels of latents know nothing of them. Neither is there anything to be had where a latent is as large as all heads.
    `is_part`: they are some of the heads that ranks share; then that isn't looked at, as all must come to the same.
    """
    attentions = [part for part in module.modules() if hasattr(part, "kv_b_proj") and hasattr(part, "layer_idx")]
    found = [LatentDims.of(attention) for attention in attentions]
    dims = found[0] if found else None
    if dims is None or set(found) != {dims}:
        return []
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    are_plain = all(layer.sight == FULL and not layer.scoring.soft_cap for layer in shape.layers)
    if heads != (dims.heads, dims.heads, dims.nope + dims.rotated) or not are_plain:
        return []
    if not is_part and latent_shape(shape, dims).layer_token_numbers >= shape.layer_token_numbers:
        return []
    return [LatentHeads(attention, dims, context) for attention in attentions]


def latent_shape(shape: AttentionShape, dims: LatentDims) -> AttentionShape:
    """Of layers that attend to latents; `shape`: of plain heads, with the same scale."""
    return replace(shape, num_kv_heads=1, head_dim=dims.latent + dims.rotated, value_dim=dims.latent)


def _noting(
    forward: Callable[[torch.Tensor], torch.Tensor], dims: LatentDims, context: AttentionContext
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A projection's `forward` that within a step only notes what it is given. Outside of steps, where transformers' own
    attention runs, all is as it was."""

    @functools.wraps(forward)
    def noting(latents_1TC: torch.Tensor) -> torch.Tensor:
        if context.attention is None:
            return forward(latents_1TC)
        context.latents_1TC = latents_1TC
        return latents_1TC.new_zeros(1).expand(*latents_1TC.shape[:-1], dims.heads * (dims.nope + dims.value))

    return noting
