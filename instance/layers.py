"""What the layers of a decoder are made of, where they are of a form that `instance.fused` computes.

    x += norm?(attention(rotary(norm(x) Wqkv)) Wo)    x += norm?(feed(norm(x)))    feed: (f(gate) * up) Wd, or experts

That a layer has these parts is told by their names; what a norm, an activation or a router computes, by trying it.
transformers' modules keep their weights and names: those of q, k and v (and of gate and up) become views of one matrix, so
nothing is held twice.

Shape suffixes: T rows, E hidden size, D head dim, H query heads.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from instance.errors import UnsupportedModel
from instance.packed import PARTS, is_packed, packed_weight, run_plain
from instance.quantised import QuantisedLinear, is_linear, matrix_of
from kernels.experts import ExpertWeights, Gate, Packed, mix_experts, route
from kernels.layer_ops import ACTIVATIONS, Norm, gated_product, linear, normed_linear, rms_norm, uses_gemv
from kernels.products import Matrix, Quantised, stack

_LLAMA_NORMS = {"input_layernorm", "post_attention_layernorm"}
_GEMMA_NORMS = _LLAMA_NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_ROUTERS = ("gate", "router")
_EXPERT_WEIGHTS = {"gate_up_proj", "down_proj"}
_EXPERT_BIASES = {"gate_up_proj_bias", "down_proj_bias"}
MLP_ROWS = 4096
"""Of which gate, up and their product live at a time: half of what a step of 8192 rows would hold, and no product too small."""
_CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative, what rounding explains of a norm, an activation or a mixture. GELU and its approximation by tanh differ by 8e-5."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A gated MLP. Weights are `[out, in]`."""

    gate_up: Matrix
    down: Matrix
    activation: str

    def run(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor | None, backend: str, norm: Norm | None = None
    ) -> torch.Tensor | None:
        """What the rows `x`, or their norm, become, new; or None, if it was added to the residual on the way."""
        h_TE = x_TE if norm is None else rms_norm(x_TE, norm, backend=backend)
        if uses_gemv(len(h_TE), self.down, backend):  # the sum rides along with the product
            out_TE = self._run_part(h_TE, residual_TE, backend)
            return out_TE if residual_TE is None else None
        parts = [self._run_part(part_TE, None, backend) for part_TE in torch.split(h_TE, MLP_ROWS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run_part(self, h_TE: torch.Tensor, residual_TE: torch.Tensor | None, backend: str) -> torch.Tensor:
        active_TI = gated_product(h_TE, self.gate_up, self.activation, backend=backend)
        return linear(active_TI, self.down, residual_TN=residual_TE, backend=backend)

    def run_dims(self, h_TE: torch.Tensor, inner: range, backend: str) -> torch.Tensor:
        """What some of the dims between gate and down add to what the rows become, new: of all dims the sum is `run`'s.

        Weights aren't copied, and must not be of 8 bits: then it raises ValueError.
        """
        if isinstance(self.down, Quantised):
            raise ValueError("weights of 8 bits have no parts")
        active_TJ = gated_product(h_TE, self.gate_up, self.activation, inner, backend=backend)
        return linear(active_TJ, self.down[:, inner.start : inner.stop], backend=backend)

    def matrices(self) -> list[Matrix]:
        """That every row is multiplied with, `[out, in]`."""
        return [self.gate_up, self.down]


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of experts of which each row goes to `top_k`."""

    router_XE: torch.Tensor
    router_bias_X: torch.Tensor | None
    top_k: int
    normalise: bool
    experts: ExpertWeights

    def run(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor | None, backend: str, norm: Norm | None = None
    ) -> torch.Tensor | None:
        """As `Dense.run`."""
        if norm is None:
            h_TE, logits_TX = x_TE, linear(x_TE, self.router_XE, self.router_bias_X, backend=backend)
        else:
            h_TE, logits_TX = normed_linear(x_TE, norm, self.router_XE, self.router_bias_X, backend=backend)
        experts_TS, weights_TS = route(logits_TX, self.top_k, normalise=self.normalise, backend=backend)
        out_TE = mix_experts(h_TE, experts_TS, weights_TS, self.experts, residual_TE=residual_TE, backend=backend)
        return out_TE if residual_TE is None else None

    def matrices(self) -> list[Matrix]:
        """As `Dense.matrices`."""
        return [self.router_XE]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer's weights, `[out, in]`."""

    module: nn.Module
    rotary: str | None
    """Which rotary frequencies it has, where kinds of layers have their own."""
    input_norm: Norm
    qkv: Matrix
    qkv_bias: torch.Tensor | None
    q_norm: Norm | None
    k_norm: Norm | None
    sinks_H: torch.Tensor | None
    out: Matrix
    out_bias: torch.Tensor | None
    attention_norm: Norm | None
    """Of what attention adds."""
    feed_input_norm: Norm
    feed: Dense | Mixture
    feed_norm: Norm | None
    """Of what the feed adds."""


def has_known_parts(module: PreTrainedModel) -> bool:
    """Whether a decoder's layers have the parts of a `Layer`, and no others. Looks at no values."""
    return _layers_are(module, _has_known_parts)


def can_be_split(module: PreTrainedModel, has_latents: Callable[[nn.Module], bool]) -> bool:
    """Whether ranks can share a decoder's layers: they have the parts of a `Layer`, or attention of which it is said that it
    `has_latents`, or beside their experts some that all rows go to; their norms may be any. Looks at no values."""
    return _layers_are(module, lambda layer: _can_be_split(layer, has_latents))


def _layers_are(module: PreTrainedModel, fit: Callable[[nn.Module], bool]) -> bool:
    """Whether a decoder is made of embeddings, layers that fit, a norm and a head."""
    base: Any = module.get_decoder()  # type: ignore[no-untyped-call]
    head = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    layers = list(getattr(base, "layers", ()))
    return (
        bool(layers)
        and {name for name, _ in base.named_children()} == {"embed_tokens", "layers", "norm", "rotary_emb"}
        and isinstance(base.embed_tokens, nn.Embedding)
        and is_linear(head)
        and _eps(base.norm) is not None
        and all(fit(layer) for layer in layers)
    )


def has_dense_parts(module: PreTrainedModel) -> bool:
    """Likewise, and no mixtures of experts among them."""
    base: Any = module.get_decoder()  # type: ignore[no-untyped-call]
    return has_known_parts(module) and all(_is_dense(layer.mlp) for layer in base.layers)


def read_layers(module: PreTrainedModel) -> list[Layer] | None:
    """All layers of a decoder that `has_known_parts`, and merges their weights in place, one layer after the other.

    None if a norm, an activation or a router is of no known kind: then nothing is merged.
    """
    base: Any = module.get_decoder()  # type: ignore[no-untyped-call]
    layers: list[Any] = list(base.layers)
    norms: dict[nn.Module, Norm] = {}
    feeds: list[Mixture | str] = []
    for layer in layers:
        for part in _norms(layer):
            if (norm := norm_of(part)) is None:
                return None
            norms[part] = norm
        feed = _mixture(layer.mlp) if _is_mixture(layer.mlp) else _activation_of(layer.mlp.act_fn, layer.mlp)
        if feed is None:
            return None
        feeds.append(feed)
    kinds = _rotary_kinds(module, len(layers))
    return [_read(layer, kind, norms, feed) for layer, kind, feed in zip(layers, kinds, feeds, strict=True)]


def norm_of(module: nn.Module) -> Norm | None:
    """A module as a norm, by what it makes of a random row; None if that is something else."""
    eps = _eps(module)
    if eps is None:
        return None
    weight_E: torch.Tensor = module.weight  # type: ignore[assignment]
    seeded = torch.Generator().manual_seed(0)  # all instances of a cell must come to the same answer
    x_1E = torch.randn(1, len(weight_E), generator=seeded).to(weight_E.device, weight_E.dtype)
    with torch.inference_mode():
        want_1E = module(x_1E)
        for norm in (Norm(weight_E, eps, from_one) for from_one in (False, True)):
            if _close(rms_norm(x_1E, norm, backend="torch"), want_1E):
                return norm
    return None


def _has_known_parts(layer: nn.Module) -> bool:
    parts: dict[str, Any] = dict(layer.named_children())
    return (
        _is_between_norms(parts)
        and _is_known_attention(parts["self_attn"])
        and all(_eps(norm) is not None for norm in _norms(layer))
        and (_is_dense(parts["mlp"]) or _is_mixture(parts["mlp"]))
    )


def _can_be_split(layer: nn.Module, has_latents: Callable[[nn.Module], bool]) -> bool:
    parts: dict[str, Any] = dict(layer.named_children())
    return (
        _is_between_norms(parts)
        and (_is_known_attention(parts["self_attn"]) or has_latents(parts["self_attn"]))
        and (_is_dense(parts["mlp"]) or _is_mixture(parts["mlp"]) or _has_shared_experts(parts["mlp"]))
    )


def _is_between_norms(parts: Mapping[str, Any]) -> bool:
    """Whether a layer is of attention, an MLP and such norms as Llama's or Gemma's has."""
    return {"self_attn", "mlp"} <= set(parts) and set(parts) - {"self_attn", "mlp"} in (_LLAMA_NORMS, _GEMMA_NORMS)


def _is_known_attention(module: nn.Module) -> bool:
    attention: dict[str, Any] = dict(module.named_children())
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return (
        set(attention) in (_PROJECTIONS, _PROJECTIONS | _HEAD_NORMS)
        and own <= {"sinks"}
        and all(is_linear(attention[name]) for name in _PROJECTIONS)
        and _can_merge([attention[name] for name in ("q_proj", "k_proj", "v_proj")])
        and len({attention[name].bias is None for name in ("q_proj", "k_proj", "v_proj")}) == 1
        and len({_eps(attention[name]) for name in _HEAD_NORMS & set(attention)}) <= 1
        and all(_eps(attention[name]) is not None for name in _HEAD_NORMS & set(attention))
        and all(len(attention[name].weight) == getattr(module, "head_dim", 0) for name in _HEAD_NORMS & set(attention))
    )


def _is_dense(mlp: nn.Module) -> bool:
    parts: dict[str, Any] = dict(mlp.named_children())
    projections = _MLP_PARTS - {"act_fn"}
    return (
        set(parts) == _MLP_PARTS
        and all(is_linear(parts[n]) and parts[n].bias is None for n in projections)
        and _can_merge([parts["gate_proj"], parts["up_proj"]])
    )


def _can_merge(projections: list[Any]) -> bool:
    """Whether the weights of linear layers are of one kind, so that they can be one matrix."""
    return len({(type(p), p.weight.dtype, getattr(p, "group", 0)) for p in projections}) == 1


def _is_mixture(mlp: nn.Module) -> bool:
    parts: dict[str, Any] = dict(mlp.named_children())
    if set(parts) not in ({"experts", name} for name in _ROUTERS):
        return False
    router = _router(mlp)
    return (
        {name for name, _ in router.named_parameters()} in ({"weight"}, {"weight", "bias"})
        and isinstance(getattr(router, "top_k", None), int)
        and len(inspect.signature(router.forward).parameters) == 1
        and are_experts(parts["experts"])
    )


def _has_shared_experts(mlp: nn.Module) -> bool:
    """Whether an MLP has experts, and one made of those that all rows go to."""
    parts: dict[str, Any] = dict(mlp.named_children())
    return (
        set(parts) in ({"experts", "shared_experts", name} for name in _ROUTERS)
        and are_experts(parts["experts"])
        and _is_dense(parts["shared_experts"])
    )


def _router(mlp: nn.Module) -> Any:
    return next(part for name, part in mlp.named_children() if name in _ROUTERS)


def _norms(layer: Any) -> Iterator[nn.Module]:
    yield from (part for name, part in layer.named_children() if name in _GEMMA_NORMS)
    yield from (part for name, part in layer.self_attn.named_children() if name in _HEAD_NORMS)


def _eps(norm: nn.Module) -> float | None:
    """The epsilon of a module that has nothing but that and a weight; None for any other."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps if isinstance(eps, float) and {name for name, _ in norm.named_parameters()} == {"weight"} else None


def _activation_of(function: Any, mlp: nn.Module) -> str | None:
    """The name of an activation in `ACTIVATIONS`, by what it computes."""
    x_N = torch.linspace(-6, 6, 97, device=next(mlp.parameters()).device)
    return next((name for name, known in ACTIVATIONS.items() if _close(known(x_N), function(x_N))), None)


def _close(got: torch.Tensor, want: torch.Tensor) -> bool:
    limit = _CLOSE[got.dtype]
    return got.shape == want.shape and bool((got.float() - want.float()).norm() <= limit * want.float().norm())


def _rotary_kinds(module: PreTrainedModel, num_layers: int) -> list[str | None]:
    """For each layer which rotary frequencies it has, where kinds of layers have their own; None: all have the same."""
    base: Any = module.get_decoder()  # type: ignore[no-untyped-call]
    if "layer_type" not in inspect.signature(base.rotary_emb.forward).parameters:
        return [None] * num_layers
    return list(module.config.get_text_config().layer_types)


def _read(layer: Any, rotary: str | None, norms: Mapping[nn.Module, Norm], feed: Mixture | str) -> Layer:
    """`feed`: of a dense layer the name of its activation."""
    attention = layer.self_attn
    qkv, qkv_bias = _merge_rows([attention.q_proj, attention.k_proj, attention.v_proj])
    is_gemma = hasattr(layer, "pre_feedforward_layernorm")
    has_head_norms = hasattr(attention, "q_norm")
    return Layer(
        module=layer,
        rotary=rotary,
        input_norm=norms[layer.input_layernorm],
        qkv=qkv,
        qkv_bias=qkv_bias,
        q_norm=norms[attention.q_norm] if has_head_norms else None,
        k_norm=norms[attention.k_norm] if has_head_norms else None,
        sinks_H=getattr(attention, "sinks", None),
        out=matrix_of(attention.o_proj),
        out_bias=attention.o_proj.bias,
        attention_norm=norms[layer.post_attention_layernorm] if is_gemma else None,
        feed_input_norm=norms[layer.pre_feedforward_layernorm if is_gemma else layer.post_attention_layernorm],
        feed=_dense(layer.mlp, feed) if isinstance(feed, str) else feed,
        feed_norm=norms[layer.post_feedforward_layernorm] if is_gemma else None,
    )


def _dense(mlp: Any, activation: str) -> Dense:
    gate_up, _ = _merge_rows([mlp.gate_proj, mlp.up_proj])
    return Dense(gate_up, matrix_of(mlp.down_proj), activation)


def bind_experts(
    module: nn.Module, backend: str, summed: Callable[[torch.Tensor], torch.Tensor] = lambda x_TE: x_TE
) -> list[ExpertWeights]:
    """Let a model's experts run by `kernels.experts`, where they are of a known kind and compute the same: those that do.

    For layers that run as transformers has them: so they are faster, and never wait for the device. `summed`: what the parts of
    several ranks add up to; all of them call this at once, and come to the same.
    """
    bound = []
    for experts in module.modules():
        weights = _experts_of(experts) if are_experts(experts) else None
        if weights is not None and _mix_alike(experts, weights, backend, summed):
            experts.forward = _mixing(weights, backend)
            bound.append(weights)
    return bound


def bind_packed(module: PreTrainedModel) -> None:
    """Let a model's packed experts run by torch, until it is known what else can. On `meta`, where nothing has a value, all
    experts put out rows like those put in: transformers' own code takes bf16 alone there.

    Raises UnsupportedModel if the gate of packed experts is of no known kind: transformers' own code needs plain weights.
    """
    for experts in module.modules():
        if module.device.type == "meta":
            if are_experts(experts):
                experts.forward = lambda x_TE, *_: torch.empty_like(x_TE)
            continue
        if not is_packed(experts):
            continue
        weights = _experts_of(experts)
        if weights is None:
            raise UnsupportedModel(f"{module.config.model_type}: its packed experts have a gate of no known kind")
        experts.forward = _mixing(weights, "torch")


def expert_numbers(module: PreTrainedModel) -> int:
    """Most numbers of a row that lie between the products of its experts, where kernels of ours run them; 0: they run none."""
    parts: Iterator[Any] = module.modules()
    sizes = [sum(_weights_of(part)[1].shape[1:]) for part in parts if are_experts(part)]
    return experts_of_a_row(module) * max(sizes, default=0)


def experts_of_a_row(module: PreTrainedModel) -> int:
    """How many experts a row of a mixture goes to, as its config says."""
    return getattr(module.config.get_text_config(), "num_experts_per_tok", None) or 1


def _mixing(weights: ExpertWeights, backend: str) -> Callable[..., torch.Tensor]:
    def forward(x_TE: torch.Tensor, experts_TS: torch.Tensor, weights_TS: torch.Tensor) -> torch.Tensor:
        return mix_experts(x_TE.contiguous(), experts_TS.contiguous(), weights_TS.contiguous(), weights, backend=backend)

    return forward


def _mix_alike(experts: Any, weights: ExpertWeights, backend: str, summed: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether random rows become what a module's experts make of them."""
    device, dtype = weights.down_XEI.device, weights.dtype or torch.bfloat16
    seeded = torch.Generator().manual_seed(0)
    rows, top_k = 16, min(2, weights.num_experts)
    x_TE = torch.randn(rows, weights.hidden_size, generator=seeded).to(device, dtype)
    experts_TS = torch.rand(rows, weights.num_experts, generator=seeded).topk(top_k).indices.to(device)
    weights_TS = torch.rand(rows, top_k, generator=seeded).to(device, dtype)
    with torch.inference_mode():
        # what is summed behind the module, where ranks have parts of it, is summed behind ours, too
        theirs = run_plain(experts) if weights.is_packed else experts.forward
        want_TE = summed(theirs(x_TE, experts_TS, weights_TS).contiguous())
        return _close(summed(_mixing(weights, backend)(x_TE, experts_TS, weights_TS)), want_TE)


def are_experts(module: Any) -> bool:
    """Whether a module has the weights of experts that `ExpertWeights` are made of, and nothing else."""
    names = {name for name, _ in module.named_parameters()}
    return (
        names - _EXPERT_BIASES in (_EXPERT_WEIGHTS, PARTS)
        and names & _EXPERT_BIASES in (set(), _EXPERT_BIASES)
        and hasattr(module, "_apply_gate")
        and not getattr(module, "has_post_expert_norm", False)
    )


def _experts_of(experts: Any) -> ExpertWeights | None:
    """The weights of experts; None: their gate is of no known kind."""
    gate = gate_of(experts)
    if gate is None:
        return None
    gate_up, down = _weights_of(experts)
    biases = [getattr(experts, name, None) for name in ("gate_up_proj_bias", "down_proj_bias")]
    return ExpertWeights(gate_up, down, gate, *(None if b is None else b.detach() for b in biases))


def _weights_of(experts: Any) -> tuple[torch.Tensor | Packed, torch.Tensor | Packed]:
    """Of gate and up, and of down, `[X, out, in]`."""
    if is_packed(experts):
        return packed_weight(experts, "gate_up_proj"), packed_weight(experts, "down_proj")
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    if getattr(experts, "is_transposed", False):
        return gate_up.transpose(1, 2), down.transpose(1, 2)
    return gate_up, down


def _mixture(mlp: Any) -> Mixture | None:
    """An MLP that `_is_mixture`, whose gate and router are of a known kind by what they make of random rows; None: of none.

    What its experts compute is compared with the layer (`FusedDecoder.agrees`).
    """
    router = _router(mlp)
    weights, normalise = _experts_of(mlp.experts), _normalises(router)
    if weights is None or normalise is None:
        return None
    return Mixture(router.weight, getattr(router, "bias", None), router.top_k, normalise, weights)


def gate_of(experts: Any) -> Gate | None:
    """How experts' gate and up meet, by trying; None: in no known way."""
    alpha, limit = getattr(experts, "alpha", 1.0), getattr(experts, "limit", None)
    known = [Gate("silu"), Gate("gelu_tanh"), Gate(alpha=alpha, limit=limit, up_offset=1.0, interleaved=True)]
    seeded = torch.Generator().manual_seed(0)
    x_RN = (4 * torch.randn(5, 32, generator=seeded)).to(next(experts.parameters()).device)
    want_RI = experts._apply_gate(x_RN)
    return next((gate for gate in known if _close(gate.of(x_RN), want_RI)), None)


def _normalises(router: Any) -> bool | None:
    """Whether a router's weights are softmax over the chosen experts alone, by trying; None: they are something else."""
    seeded = torch.Generator().manual_seed(0)
    x_TE = torch.randn(9, router.weight.shape[1], generator=seeded).to(router.weight.device, router.weight.dtype)
    with torch.inference_mode():
        *_, want_TS, experts_TS = router(x_TE)
        logits_TX = torch.nn.functional.linear(x_TE, router.weight, getattr(router, "bias", None))
        for normalise in (True, False):
            ours_TS, weights_TS = route(logits_TX, router.top_k, normalise=normalise, backend="torch")
            chosen = [logits_TX.gather(1, its.long()) for its in (ours_TS, experts_TS)]  # of equals, either may be chosen
            if torch.equal(*chosen) and _close(weights_TS.to(logits_TX.dtype), want_TS):
                return normalise
    return None


def _merge_rows(projections: list[Any]) -> tuple[Matrix, torch.Tensor | None]:
    """One weight (and bias) of them all, one below the other; theirs become views of it."""
    weight: Matrix
    if projections[0].weight.is_cuda:
        torch.cuda.empty_cache()  # else a part of what the layer before left would be taken, and the rest be of no use
    if isinstance(projections[0], QuantisedLinear):
        weight = stack([p.matrix for p in projections])
    else:
        weight = torch.cat([p.weight.data for p in projections])
    bias = None if projections[0].bias is None else torch.cat([p.bias.data for p in projections])
    start = 0
    for p in projections:
        stop = start + p.out_features
        if isinstance(weight, torch.Tensor):
            p.weight.data = weight[start:stop]
        else:
            p.become(weight.rows(start, stop))
        if bias is not None:
            p.bias.data = bias[start:stop]
        start = stop
    return weight, bias
