"""A decoder's layers with merged projections and fused kernels, for models that are made like Llama.

    qkv = norm(x) Wqkv    x += attention(rotary(qkv)) Wo    gate_up = norm(x) Wgu    x += (silu(gate) * up) Wd

transformers' modules keep their weights and names: those of q, k and v (and of gate and up) become views of one matrix, so
nothing is held twice. Whether a model is made like that is decided by the names of its parts and by what its layers compute.

Shape suffixes: T rows, S rows whose logits are wanted, E hidden size, D head dim, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from distattn.shape import AttentionShape, PackedRows
from kernels.layer_ops import add_rms_norm, linear, rms_norm, silu_mul, silu_mul_linear, uses_gemv

_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
MLP_ROWS = 4096
"""Of which gate, up and their product live at a time: half of what a step of 8192 rows would hold, and no product too small."""
_CHECK_IDS = (0, 1, 5, 77)
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of what a layer adds to its input, relative RMS. Another rounding gives a tenth of it; another formula, ten times as much."""


class PackedAttention(Protocol):
    """Attention of one layer's rows in the present step: the result is `[T, H, D]`."""

    def run_packed(self, layer: int, rows: PackedRows) -> torch.Tensor: ...

    def store_packed(self, layer: int, rows: PackedRows) -> None:
        """Keep the rows' keys and values, and attend to nothing."""


class LayerAttention(PackedAttention, Protocol):
    """The same for layers that run as transformers has them, too."""

    def run(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Weights of one layer, `[out, in]`."""

    module: nn.Module
    input_norm_E: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None
    out: torch.Tensor
    mlp_norm_E: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class Hidden:
    """Rows after the last layer."""

    x_TE: torch.Tensor
    pending_TE: torch.Tensor | None = None
    """To be added."""


class FusedDecoder:
    """The layers of one model, from token ids to logits of chosen rows."""

    def __init__(self, module: PreTrainedModel, backend: str, max_context: int) -> None:
        """Merges the weights in place, layer by layer. Only for a model that `is_like_llama`."""
        base: Any = module.get_decoder()  # type: ignore[no-untyped-call]
        self._module: Any = module
        self._embed: nn.Module = base.embed_tokens
        self._rotary: nn.Module = base.rotary_emb
        self._final_norm_E: torch.Tensor = base.norm.weight
        self._head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._eps: float = base.norm.variance_epsilon
        self._backend = backend
        # the last place, too: some models scale what stands far back
        self._check_positions = sorted({min(place, max_context - 1) for place in (0, 1, 5, max_context - 1)})
        self._layers = [_merge(layer) for layer in base.layers]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def matrices(self) -> list[torch.Tensor]:
        """All that a step multiplies with, `[out, in]`, in order."""
        layers = [matrix for layer in self._layers for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        return [*layers, self._head.weight]

    def run(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: PackedAttention) -> Hidden:
        """All layers."""
        hidden, _ = self._run_layers(self._layers, token_ids_T, positions_T, attention)
        return hidden

    def store(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: PackedAttention) -> None:
        """All layers, but of the last only what makes its keys and values."""
        *before, last = self._layers
        hidden, rotary = self._run_layers(before, token_ids_T, positions_T, attention)
        attention.store_packed(len(before), self._project(last, hidden.x_TE, hidden.pending_TE, rotary))

    def logits(self, hidden: Hidden, rows_S: torch.Tensor) -> torch.Tensor:
        """Logits `[S, V]` of the chosen rows."""
        x_SE = hidden.x_TE[rows_S]
        if hidden.pending_TE is not None:
            x_SE = x_SE + hidden.pending_TE[rows_S]
        h_SE = rms_norm(x_SE, self._final_norm_E, self._eps, backend=self._backend)
        return linear(h_SE, self._head.weight, self._head.bias, backend=self._backend)

    def agrees(self, attention: PackedAttention) -> bool:
        """Whether every layer adds to random rows what transformers' own layer adds, up to rounding.

        transformers' layers must be bound to `attention`: `OwnRow` shows a mistake in queries, keys and values alike.
        """
        weight = self._layers[0].qkv
        positions_T = torch.tensor(self._check_positions, device=weight.device)
        seeded = torch.Generator().manual_seed(0)  # all instances of a cell must come to the same answer
        x_TE = torch.randn(len(positions_T), weight.shape[1], generator=seeded).to(weight.device, weight.dtype)
        cos_TD, sin_TD = self._rotary_of(x_TE, positions_T)
        for index, layer in enumerate(self._layers):
            theirs: Any = layer.module(
                x_TE.unsqueeze(0),
                position_embeddings=(cos_TD.unsqueeze(0), sin_TD.unsqueeze(0)),
                position_ids=positions_T.unsqueeze(0),
                attention_mask=None,
            )
            want_TE = theirs[0].float() - x_TE.float()
            ours_TE = x_TE.clone()
            pending_TE = self._run_layer(index, layer, ours_TE, None, (cos_TD, sin_TD), attention)
            if not self._agree(ours_TE.float() - x_TE.float() + (0 if pending_TE is None else pending_TE.float()), want_TE):
                return False
        return True

    def ends_agree(self) -> bool:
        """Whether transformers too does nothing to embeddings, and nothing to logits after the last norm and the head."""
        base = self._module.get_decoder()
        ids_T = torch.tensor(_CHECK_IDS, device=self._head.weight.device) % len(self._head.weight)
        x_TE: torch.Tensor = self._embed(ids_T)
        layers, norm = base.layers, base.norm
        base.layers = nn.ModuleList()
        try:
            with_norm_TV = self._module(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0]
            base.norm = nn.Identity()  # which would hide another scale of the embeddings
            without_TV = self._module(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0]
        finally:
            base.layers, base.norm = layers, norm
        ours_TV = self.logits(Hidden(x_TE), torch.arange(len(ids_T), device=ids_T.device))
        return self._agree(ours_TV, with_norm_TV) and self._agree(self._head(x_TE), without_TV)

    def _agree(self, got: torch.Tensor, want: torch.Tensor) -> bool:
        return bool((got.float() - want.float()).norm() <= _TOLERANCE[self._head.weight.dtype] * want.float().norm())

    def _run_layers(
        self, layers: list[_Layer], token_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: PackedAttention
    ) -> tuple[Hidden, tuple[torch.Tensor, torch.Tensor]]:
        """The first layers, and the rows' rotary factors for more."""
        x_TE: torch.Tensor = self._embed(token_ids_T)
        rotary = self._rotary_of(x_TE, positions_T)
        pending_TE = None
        for index, layer in enumerate(layers):
            pending_TE = self._run_layer(index, layer, x_TE, pending_TE, rotary, attention)
        return Hidden(x_TE, pending_TE), rotary

    def _rotary_of(self, x_TE: torch.Tensor, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos_1TD, sin_1TD = self._rotary(x_TE, positions_T.unsqueeze(0))
        return cos_1TD[0], sin_1TD[0]

    def _run_layer(
        self,
        index: int,
        layer: _Layer,
        x_TE: torch.Tensor,
        pending_TE: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention: PackedAttention,
    ) -> torch.Tensor | None:
        """Adds the layer to `x_TE` in place, but for what it returns: the next norm adds that on its way."""
        eps, backend = self._eps, self._backend
        rows = self._project(layer, x_TE, pending_TE, rotary)
        out_TE = attention.run_packed(index, rows).view(len(x_TE), -1)
        if uses_gemv(len(x_TE), layer.gate_up, backend):  # activation and sums ride along with the products
            linear(out_TE, layer.out, residual_TN=x_TE, backend=backend)
            h_TE = rms_norm(x_TE, layer.mlp_norm_E, eps, backend=backend)
            silu_mul_linear(linear(h_TE, layer.gate_up, backend=backend), layer.down, x_TE, backend=backend)
            return None
        h_TE = add_rms_norm(linear(out_TE, layer.out, backend=backend), x_TE, layer.mlp_norm_E, eps, backend=backend)
        parts = [self._mlp(layer, part_TE) for part_TE in torch.split(h_TE, MLP_ROWS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mlp(self, layer: _Layer, h_TE: torch.Tensor) -> torch.Tensor:
        backend = self._backend
        return linear(silu_mul(linear(h_TE, layer.gate_up, backend=backend), backend=backend), layer.down, backend=backend)

    def _project(
        self,
        layer: _Layer,
        x_TE: torch.Tensor,
        pending_TE: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> PackedRows:
        """The layer's rows, before attention. Adds what is pending to `x_TE`."""
        eps, backend = self._eps, self._backend
        if pending_TE is None:
            h_TE = rms_norm(x_TE, layer.input_norm_E, eps, backend=backend)
        else:
            h_TE = add_rms_norm(pending_TE, x_TE, layer.input_norm_E, eps, backend=backend)
        qkv_TE = linear(h_TE, layer.qkv, layer.qkv_bias, backend=backend)
        return PackedRows(qkv_TE, *rotary, layer.q_norm_D, layer.k_norm_D, eps)


class OwnRow:
    """Attention of each row to itself alone, and not by softmax: the sum of its query, key and value."""

    def __init__(self, shape: AttentionShape, backend: str) -> None:
        self._shape = shape
        self._backend = backend

    def run(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return q_THD + (k_TKD + v_TKD).repeat_interleave(self._shape.num_heads // self._shape.num_kv_heads, 1)

    def run_packed(self, layer: int, rows: PackedRows) -> torch.Tensor:
        num_rows = rows.qkv_TE.shape[0]
        kv_21TKD = rows.qkv_TE.new_empty((2, 1, num_rows, self._shape.num_kv_heads, self._shape.head_dim))
        slots_T = torch.arange(num_rows, device=rows.qkv_TE.device)
        q_THD = rows.rotate_and_store(self._shape.num_heads, kv_21TKD, slots_T, self._backend)
        return self.run(layer, q_THD, kv_21TKD[0, 0], kv_21TKD[1, 0])

    def store_packed(self, layer: int, rows: PackedRows) -> None:
        """Nothing is kept."""


def is_like_llama(module: PreTrainedModel) -> bool:
    """Whether the decoder's layers have the parts that `FusedDecoder` computes with, and no others."""
    base: Any = module.get_decoder()  # type: ignore[no-untyped-call]
    head = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    layers = list(getattr(base, "layers", ()))
    return (
        bool(layers)
        and {name for name, _ in base.named_children()} == {"embed_tokens", "layers", "norm", "rotary_emb"}
        and type(base.embed_tokens) is nn.Embedding
        and type(head) is nn.Linear
        and _norm_eps(base.norm) is not None
        and all(_is_layer(layer, base.norm) for layer in layers)
    )


def _is_layer(layer: nn.Module, final_norm: nn.Module) -> bool:
    parts: dict[str, Any] = dict(layer.named_children())
    if set(parts) != _LAYER_PARTS:
        return False
    attention: dict[str, Any] = dict(parts["self_attn"].named_children())
    mlp: dict[str, Any] = dict(parts["mlp"].named_children())
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"]] + [attention[n] for n in _HEAD_NORMS & set(attention)]
    return (
        set(attention) in (_PROJECTIONS, _PROJECTIONS | _HEAD_NORMS)
        and set(mlp) == _MLP_PARTS
        and all(type(attention[name]) is nn.Linear for name in _PROJECTIONS)
        and all(type(mlp[name]) is nn.Linear and mlp[name].bias is None for name in ("gate_proj", "up_proj", "down_proj"))
        and attention["o_proj"].bias is None
        and len({attention[name].bias is None for name in ("q_proj", "k_proj", "v_proj")}) == 1
        and all(_norm_eps(norm) == _norm_eps(final_norm) for norm in norms)
    )


def _norm_eps(norm: nn.Module) -> float | None:
    """The epsilon of a root-mean-square norm with a weight; None for any other module."""
    eps = getattr(norm, "variance_epsilon", None)
    return eps if isinstance(eps, float) and {name for name, _ in norm.named_parameters()} == {"weight"} else None


def _merge(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _merge_rows([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up, _ = _merge_rows([mlp.gate_proj, mlp.up_proj])
    has_norms = hasattr(attention, "q_norm")
    return _Layer(
        module=layer,
        input_norm_E=layer.input_layernorm.weight,
        qkv=qkv,
        qkv_bias=qkv_bias,
        q_norm_D=attention.q_norm.weight if has_norms else None,
        k_norm_D=attention.k_norm.weight if has_norms else None,
        out=attention.o_proj.weight,
        mlp_norm_E=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        down=mlp.down_proj.weight,
    )


def _merge_rows(projections: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight (and bias) of them all, one below the other; theirs become views of it."""
    weight = torch.cat([p.weight.data for p in projections])
    bias = None if projections[0].bias is None else torch.cat([p.bias.data for p in projections])
    start = 0
    for p in projections:
        stop = start + p.out_features
        p.weight.data = weight[start:stop]
        if bias is not None:
            p.bias.data = bias[start:stop]
        start = stop
    return weight, bias
