"""What the layers of a model call attention with: what of it is done here, and what is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from distattn.shape import AttentionShape, LayerView
from instance.errors import UnsupportedModel
from kernels.segments import Scoring
from kvstore.sight import FULL, Sight

# What transformers passes to an attention function that is done here.
_DONE = frozenset({"softcap", "s_aux"})
# ... that changes nothing for us, with the values that don't.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "dropout": (0, 0.0),
    "is_causal": (True, None),
    "use_cache": (False,),
    "output_attentions": (False, None),
    "output_router_logits": (False,),
}
# ... and that is free to have any value: how rows are placed is the step's business.
_IGNORED = frozenset({"position_ids", "cache_position"})

# Types of layers that remember rows by something else than KV, or beside it.
_STATES = {
    "linear_attention": "linear attention or a state space",
    "mamba": "a state space",
    "hybrid": "a state space beside attention",
    "conv": "a convolution over tokens",
}
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@dataclass(frozen=True, slots=True)
class Call:
    """What a layer calls attention with."""

    shape: AttentionShape
    value_dim: int
    soft_cap: float
    has_sinks: bool
    window: int | None
    """What it says of one: the mask decides."""

    @property
    def heads(self) -> tuple[object, ...]:
        """What must be the same in all layers."""
        shape = self.shape
        return shape.num_heads, shape.num_kv_heads, shape.head_dim, self.value_dim, shape.dtype

    def __str__(self) -> str:
        shape = self.shape
        values = "" if self.value_dim == shape.head_dim else f", values of {self.value_dim}"
        return f"{shape.num_heads} heads on {shape.num_kv_heads} of {shape.head_dim}{values}"


def call_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, extra: Mapping[str, Any]
) -> Call:
    """Raises UnsupportedModel for values that the pool has no place for."""
    heads, dim = query.shape[1], query.shape[3]
    shape = AttentionShape(
        num_heads=heads,
        num_kv_heads=key.shape[1],
        head_dim=dim,
        scale=dim**-0.5 if scaling is None else scaling,
        dtype=query.dtype,
    )
    if value.shape[:3] != key.shape[:3] or value.shape[3] > dim or key.shape[3] != dim:
        raise UnsupportedModel(f"keys {tuple(key.shape)} and values {tuple(value.shape)} differ in shape")
    sinks = extra.get("s_aux")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise UnsupportedModel(
            f"the model's attention has sinks {tuple(sinks.shape)} for {heads} heads: one each is implemented"
        )
    return Call(shape, value.shape[3], float(extra.get("softcap") or 0.0), sinks is not None, extra.get("sliding_window"))


def whole_shape(calls: Sequence[Call], sights: Sequence[Sight]) -> AttentionShape:
    """Of all layers."""
    first = calls[0].shape
    layers = tuple(
        LayerView(Scoring(call.shape.scale, call.soft_cap), sight) for call, sight in zip(calls, sights, strict=True)
    )
    return first if set(layers) == {LayerView(Scoring(first.scale))} else replace(first, layers=layers)


def agreed_sights(calls: Sequence[Call], masked: Sequence[Sight | None], max_context: int | None) -> list[Sight]:
    """What rows see in each layer, of what its mask lets them (None: it has none).

    Raises UnsupportedModel where that is something else than the window that the layer speaks of.
    """
    for index, (call, sight) in enumerate(zip(calls, masked, strict=True)):
        if call.window is None or (max_context is not None and call.window >= max_context):
            continue
        if sight != Sight(window=call.window):
            by = "it has no mask" if sight is None else f"by its mask rows see by {sight}"
            raise UnsupportedModel(f"the model's attention needs sliding_window={call.window} in layer {index}, and {by}")
    return [sight or FULL for sight in masked]


def refuse_calls(module: PreTrainedModel, seen: Mapping[int, list[Call]], num_layers: int) -> None:
    """Raises UnsupportedModel unless each layer has called attention once, and all alike."""
    name = module.config.model_type
    if not seen:
        raise UnsupportedModel(not_through_the_interface(module))
    if sorted(seen) != list(range(num_layers)):
        raise UnsupportedModel(
            f"{name}: {len(seen)} of its {num_layers} layers have attention that goes through transformers' attention interface"
        )
    for layer, calls in sorted(seen.items()):
        if len(calls) != 1:
            raise UnsupportedModel(f"{name}: layer {layer} calls attention {len(calls)} times, and a pool has KV for one call")
        if calls[0].heads != seen[0][0].heads:
            raise UnsupportedModel(f"{name}: its layers differ: {seen[0][0]} in layer 0, {calls[0]} in {layer}")


def refuse_arguments(extra: Mapping[str, Any], mask: torch.Tensor | None) -> None:
    """Raises UnsupportedModel for whatever a layer passes that would be silently lost."""
    if mask is not None:
        raise UnsupportedModel("the model passes its own attention mask, which is not implemented")
    for name, value in extra.items():
        if value is None or name in _IGNORED | _DONE or any(value is ok or value == ok for ok in _HARMLESS.get(name, ())):
            continue
        if name == "sliding_window" and isinstance(value, int):
            continue
        shown = tuple(value.shape) if isinstance(value, torch.Tensor) else value
        raise UnsupportedModel(f"the model's attention needs {name}={shown}, which is not implemented")


def not_through_the_interface(module: PreTrainedModel) -> str:
    alibi = any("alibi" in part for part in dir(type(module.base_model)))
    return (
        f"{module.config.model_type}: its attention does not go through transformers' attention interface"
        f"{' (it adds ALiBi biases)' if alibi else ''}, so that it can't read a KV pool"
    )


def refuse_state(config: Any, *, is_stateful: bool) -> None:
    """Raises UnsupportedModel for layers of a (text) config that remember rows by something else than KV. `is_stateful`: what
    transformers says of the whole model, some of which don't tell their layers' types."""
    types = list(getattr(config, "layer_types", None) or ())
    found = [kind for kind in types if kind in _STATES]
    if not (found or is_stateful):
        return
    which = f"{len(found)} of its {len(types)} layers" if found else "its layers"
    what = ", ".join(_STATES[kind] for kind in sorted(set(found))) or "a recurrence"
    raise UnsupportedModel(
        f"{config.model_type}: {which} keep a state from token to token ({what}), which is not implemented: of a sequence only "
        "KV can be kept, shared and moved"
    )


def refuse_layer_types(config: Any) -> None:
    """Raises UnsupportedModel for layers of a kind that may stand only in a mask, which is never built."""
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if others:
        raise UnsupportedModel(f"{config.model_type} has layers of type {', '.join(others)}, which is not implemented")
