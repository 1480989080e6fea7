"""Rotary types whose frequencies depend on the longest place in a batch: fixed once, by the longest text that is served.

`dynamic` and `longrope` have one set of frequencies for texts up to the length that the model was trained on, and others beyond
it. KV that was written with one set doesn't fit queries with another, and a step holds rows of many texts. So all texts have
the frequencies of the longest: short ones too, if the limit lies beyond that length.
"""

from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from instance.errors import UnsupportedModel

_BATCH_DEPENDENT = frozenset({"dynamic", "longrope"})
_FIXED = "fixed"
"""A type that transformers doesn't know, and so leaves as it is."""


def fix_rotary(module: PreTrainedModel, max_context: int | None) -> str | None:
    """Which frequencies all texts have, in words; None for a model whose don't depend on the batch.

    Raises UnsupportedModel where they can't be fixed: layers with types of their own, or no limit.
    """
    config: Any = module.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    is_one = "rope_type" in rope or "type" in rope
    kinds = [rope] if is_one else [kind for kind in rope.values() if isinstance(kind, dict)]
    names = {str(kind.get("rope_type", kind.get("type"))) for kind in kinds} & _BATCH_DEPENDENT
    if not names:
        return None
    (name, *_) = sorted(names)
    rotaries: list[Any] = [part for part in module.modules() if getattr(part, "rope_type", None) == name]
    if not is_one or not rotaries or max_context is None:
        raise UnsupportedModel(f"rotary type '{name}' changes its frequencies with the longest position in a batch")
    for rotary in rotaries:
        frequencies, rotary.attention_scaling = ROPE_INIT_FUNCTIONS[name](
            rotary.config, rotary.inv_freq.device, seq_len=max_context
        )
        rotary.register_buffer("inv_freq", frequencies, persistent=False)
        rotary.rope_type = _FIXED
    return f"rotary type '{name}' with the frequencies of texts of {max_context:,} tokens"
