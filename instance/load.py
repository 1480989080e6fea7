"""Reading a checkpoint: what its config says first, then its weights, and its text."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from gmanager.wire.messages import TextAssets
from gmanager.wire.scaling import RopeScaling
from instance.calls import refuse_layer_types, refuse_state
from instance.checkpoint import CheckpointError, first_line, has_tokenizer, load_whole, stored_dtype
from instance.errors import UnsupportedModel
from instance.model import ATTENTION, Model, register_attention
from instance.parts import Bits, empty_part, has_dense_layers, load_part, place_part_by_config
from instance.quantised import quantise_linears, refuse_device
from instance.rotary import longest_text, scale_rotary
from instance.split import WHOLE, Place, stages_of
from instance.stored import Form, PackedExperts, form_of, load_stored, place_by_config
from instance.team import Team
from kernels.products import Scheme
from kvstore.sight import Sight


def load_model(
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    max_context: int | None = None,
    scaling: RopeScaling | None = None,
    quantize: Scheme | None = None,
    team: Team | None = None,
    place: Place = WHOLE,
) -> Model:
    """The causal language model of a resolved checkpoint directory; `dtype` None: the checkpoint's own. `quantize`: what its
    linear layers' weights become. `place`: of the rank whose part is loaded; `team`: of those that share its layers.

    What its config says is looked at before its weights are. Raises UnsupportedModel, CheckpointError if it lacks a weight, or
    OSError if it lacks a file.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    form = _take_form(config, str(path), quantize)
    sights = _sights_of_whole(config, place, max_context, scaling)
    max_context = _prepare(config, max_context, scaling)
    if place != WHOLE:
        place = _with_layers(config, place)
        bits = Bits(form if isinstance(form, Form) else quantize, packs_experts=isinstance(form, PackedExperts))
        with _refusing_old_style(str(path)):
            part = load_part(path, config, place, _type_of_rows(dtype, config, path), device, register_attention(), bits)
        refuse_device(part, device)
        return Model(part, max_context, scaling, team, place, sights)
    if form is not None:
        with _refusing_old_style(str(path)):
            module = load_stored(
                path, config, form, _type_of_rows(dtype, config, path), attn_implementation=register_attention()
            )
        return _settled(module, device, max_context, scaling, quantize)
    with _refusing_old_style(str(path)):
        module = load_whole(
            path,
            str(path),
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            attn_implementation=register_attention(),
            local_files_only=True,
        )
    return _settled(module, device, max_context, scaling, quantize)


def _type_of_rows(asked: torch.dtype | None, config: PretrainedConfig, path: Path) -> torch.dtype:
    """What is asked for; else what the config says, or the stored weights."""
    found: torch.dtype = asked or config.dtype or stored_dtype(path) or torch.bfloat16  # type: ignore[assignment]
    return found


def _with_layers(config: PretrainedConfig, place: Place) -> Place:
    """A rank's place with the layers of each stage counted. Raises UnsupportedModel if they don't fit the model."""
    if place.stages == 1:
        return place
    try:
        stages = stages_of(place, int(config.get_text_config().num_hidden_layers))
    except ValueError as error:
        raise UnsupportedModel(f"{config.model_type}: {error}") from error
    return replace(place, layers=tuple(map(len, stages)))


def _sights_of_whole(
    config: PretrainedConfig, place: Place, max_context: int | None, scaling: RopeScaling | None
) -> tuple[Sight, ...]:
    """What rows see in each layer of a model of which a stage is wanted; empty: all. `config`: as it was read."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    all_see_all = set(kinds) == {"full_attention"} if kinds else not getattr(text, "sliding_window", None)
    if place.stages == 1 or all_see_all:
        return ()
    whole = shaped_model(copy.deepcopy(config), config.model_type, torch.float32, max_context, scaling)
    return tuple(whole.shape.layer(index).sight for index in range(whole.num_layers))


def _settled(
    module: PreTrainedModel, device: torch.device, max_context: int | None, scaling: RopeScaling | None, quantize: Scheme | None
) -> Model:
    """With its weights on the device, quantised on their way there. Raises UnsupportedModel."""
    if quantize is not None:
        quantise_linears(module, quantize, device)
    refuse_device(module, device)
    module.to(device)  # type: ignore[arg-type]
    module.train(False)
    return Model(module, max_context, scaling)


def refuse_by_config(
    path: Path, max_context: int | None = None, scaling: RopeScaling | None = None, quantize: Scheme | None = None
) -> None:
    """What `load_model` would refuse of a directory before it looks at weights, which need not be there yet.

    Raises UnsupportedModel, or OSError or ValueError for what is no config.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    _prepare(config, max_context, scaling)
    _take_form(config, str(path), quantize)


def refuse_unshared(path: Path, flag: str) -> None:
    """What instances can't share (`instance.elastic_tp`), by a resolved checkpoint's config. Raises UnsupportedModel."""
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if not has_dense_layers(config, register_attention()):
        raise UnsupportedModel(
            f"{config.model_type}: {flag} splits layers that have the parts of Llama's or Gemma's and a dense MLP, and this "
            "model's have others"
        )


def refuse_unsplit(
    path: Path,
    place: Place,
    max_context: int | None = None,
    scaling: RopeScaling | None = None,
    quantize: Scheme | None = None,
) -> None:
    """What `load_model` would refuse of a rank's part of a resolved checkpoint, by its config. Raises UnsupportedModel."""
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    shaped_model(config, str(path), torch.float32, max_context, scaling, quantize, place)


def _take_form(config: PretrainedConfig, name: str, quantize: Scheme | None) -> Form | PackedExperts | None:
    """Take what a config says of how weights are stored out of it. Raises UnsupportedModel for what isn't read."""
    form = form_of(config, name)
    if form is None:
        return None
    if quantize is not None and isinstance(form, Form):
        raise UnsupportedModel(
            f"{name}: its weights are of 8 bits already ({form.method}, {form.kind}): leave out --quantize {quantize}"
        )
    del config.quantization_config
    return form


def shaped_model(
    config: PretrainedConfig,
    name: str,
    dtype: torch.dtype,
    max_context: int | None = None,
    scaling: RopeScaling | None = None,
    quantize: Scheme | None = None,
    place: Place = WHOLE,
) -> Model:
    """The model `name` of that config as `load_model` makes it, or a rank's part of it, on torch's meta device: without values,
    for sizes.

    Raises UnsupportedModel.
    """
    form = _take_form(config, name, quantize)
    config.dtype = dtype  # else what it says would be taken
    if place != WHOLE:
        place = _with_layers(config, place)
        sights = _sights_of_whole(config, place, max_context, scaling)
        max_context, nowhere = _prepare(config, max_context, scaling), torch.device("meta")
        part = empty_part(config, place, dtype, nowhere, register_attention())
        if form is not None:
            place_part_by_config(part, config, place, form)
        if quantize is not None:
            quantise_linears(part, quantize, nowhere)
        return Model(part, max_context, scaling, place=place, sights=sights)
    return random_model(config, dtype, torch.device("meta"), 0, max_context, scaling, quantize, form)


def random_model(
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    max_context: int | None = None,
    scaling: RopeScaling | None = None,
    quantize: Scheme | None = None,
    form: Form | PackedExperts | None = None,
) -> Model:
    """A model of that shape with random normal weights, the same for the same seed and kind of device: to measure with.

    `scaling` is written into `config`; `quantize` as `load_model`; `form`: on `meta`, of what its linear layers are stored in.
    Raises UnsupportedModel.
    """
    max_context = _prepare(config, max_context, scaling)
    default = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with device, _refusing_old_style(config.model_type):
            auto: Any = AutoModelForCausalLM  # its from_config has no types
            module = auto.from_config(config, attn_implementation=register_attention(), trust_remote_code=False)
    finally:
        torch.set_default_dtype(default)
    if form is not None:
        place_by_config(module, form)
    return _settled(module, device, max_context, scaling, quantize)


def _prepare(config: PretrainedConfig, max_context: int | None, scaling: RopeScaling | None) -> int | None:
    """Write the scaling into a model's config; how long texts are served then, None if nobody says.

    Raises UnsupportedModel for that, and for layers that the config says can't be served.
    """
    text = config.get_text_config()
    of_kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    refuse_state(text, is_stateful=getattr(of_kind, "_is_stateful", False))
    refuse_layer_types(text)
    longest = longest_text(text, max_context, scaling)
    if scaling is not None:
        scale_rotary(text, scaling)
    return longest


def load_text_assets(path: Path) -> TextAssets:
    """What the gManager needs to turn text into tokens of this model and back; without a tokenizer, only what ends a text.

    Raises UnsupportedModel if the tokenizer is not a fast one, CheckpointError if it can't be read.
    """
    eos = _eos_token_ids(path)
    if not has_tokenizer(path):
        return TextAssets(tokenizer_json=None, chat_template=None, special_tokens={}, eos_token_ids=sorted(eos))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of any kind: tokenizers raises plain ones
        raise CheckpointError(f"{_broken(path)} can't be read: {type(error).__name__}: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UnsupportedModel(f"the tokenizer of {path} has no tokenizer.json form")
    if tokenizer.eos_token_id is not None:
        eos.add(tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return TextAssets(
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        chat_template=template,
        special_tokens={name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        eos_token_ids=sorted(eos),
    )


def _broken(path: Path) -> Path:
    """Which file of a tokenizer is to blame: one that is no JSON, or else the one that holds most of it."""
    for file in sorted(path.glob("*token*.json")):
        try:
            json.loads(file.read_bytes())
        except ValueError:
            return file
    whole = path / "tokenizer.json"
    return whole if whole.exists() else path


def _eos_token_ids(path: Path) -> set[int]:
    """Of a directory's config and generation_config."""
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).get_text_config()
    sources = [config.eos_token_id]
    generation = path / "generation_config.json"
    if generation.exists():
        sources.append(json.loads(generation.read_text()).get("eos_token_id"))
    eos: set[int] = set()
    for source in sources:
        eos.update(source if isinstance(source, list) else [] if source is None else [source])
    return eos


@contextmanager
def _refusing_old_style(name: str) -> Iterator[None]:
    """Around the building of a model: those with a table of attention classes look for ours in it."""
    try:
        yield
    except KeyError as error:
        if error.args != (ATTENTION,):
            raise
        raise UnsupportedModel(f"{name}: its attention does not go through transformers' attention interface") from error
