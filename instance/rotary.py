"""Rotary frequencies: scaled as the service is told, and never dependent on the longest place in a batch.

`dynamic` and `longrope` have one set of frequencies for texts up to the length that the model was trained on, and others beyond
it. KV that was written with one set doesn't fit queries with another, and a step holds rows of many texts. So all texts have
the frequencies of the longest that is served: short ones too, if that limit lies beyond that length.
"""

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gmanager.wire.scaling import RopeScaling, kind_of, lengths, rope_of, trained_length
from instance.errors import UnsupportedModel

_BATCH_DEPENDENT = frozenset({"dynamic", "longrope"})
_FIXED = "fixed"
"""A type that transformers doesn't know, and so leaves as it is."""

_READ = ("max_position_embeddings", "original_max_position_embeddings", "rope_parameters")
"""What of a config lengths and scaling depend on."""

# Of `rope_parameters`, what means something for one type of frequencies only.
_OF_ONE_TYPE = frozenset(
    {"rope_type", "type", "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    | {"short_factor", "long_factor", "low_freq_factor", "high_freq_factor"}
)
# ... and what of it follows from the factor.
_OF_THE_FACTOR = frozenset({"rope_type", "type", "factor", "attention_factor"})


def longest_text(config: PretrainedConfig, asked: int | None, scaling: RopeScaling | None = None) -> int | None:
    """Tokens served at most, of a model of that (text) config with that scaling in the place of its own; None if nobody says.

    Raises UnsupportedModel if more are asked for than it takes.
    """
    try:
        found = lengths(_read(config), scaling)
    except ValueError as error:
        raise UnsupportedModel(f"{config.model_type}: {error}") from error
    if found is None:
        return asked
    if asked is not None and asked > found.most:
        scaled = "" if scaling is None else f" with --rope-scaling {scaling}"
        raise UnsupportedModel(
            f"--max-context {asked:,} is more than the {found.most:,} tokens that {config.model_type} takes{scaled}"
        )
    return found.usual if asked is None else asked


def scale_rotary(config: PretrainedConfig, scaling: RopeScaling) -> None:
    """Write into a (text) config what transformers is to read for that scaling, in the place of the model's own.

    One of the same type keeps what else its config says of it. Raises UnsupportedModel.
    """
    facts = _read(config)
    rope = rope_of(facts)
    if not rope:
        raise UnsupportedModel(f"{config.model_type} has no rotary embedding that --rope-scaling {scaling} could scale")
    try:
        trained = trained_length(facts)
    except ValueError as error:
        raise UnsupportedModel(f"{config.model_type}: {error}") from error
    dropped = _OF_THE_FACTOR if kind_of(rope) == scaling.kind else _OF_ONE_TYPE
    scaled: dict[str, Any] = {key: value for key, value in rope.items() if key not in dropped}
    if scaling.kind == "none":
        scaled["rope_type"] = "default"
    else:
        scaled |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn" or "original_max_position_embeddings" in scaled:
        scaled["original_max_position_embeddings"] = trained
    if facts["original_max_position_embeddings"] is not None:
        config.original_max_position_embeddings = trained  # which some configs have beside it, and transformers reads first
    # to transformers, that of `dynamic` is the length from which frequencies change
    config.max_position_embeddings = trained if scaling.kind == "dynamic" else scaling.times(trained)
    config.rope_parameters = scaled


def refuse_unscaled(module: PreTrainedModel, scaling: RopeScaling) -> None:
    """Raises UnsupportedModel for layers that don't do what their config says of their frequencies."""
    wanted = "default" if scaling.kind == "none" else scaling.kind
    found = {str(part.rope_type) for part in module.modules() if hasattr(part, "rope_type")}
    if found != {wanted}:
        has = ", ".join(sorted(found)) or "none that transformers could scale"
        raise UnsupportedModel(
            f"{module.config.model_type}: with --rope-scaling {scaling} the rotary embedding of its layers is to be {wanted}, "
            f"and is {has}"
        )


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
    if name == "longrope":
        is_long = max_context > rope["original_max_position_embeddings"]
        return f"longrope with the {'long' if is_long else 'short'} factors, those of texts of {max_context:,} tokens"
    return f"dynamic:{rope['factor']:g} with the frequencies of texts of {max_context:,} tokens"


def _read(config: PretrainedConfig) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in _READ}
