"""Parts of models that are more than a decoder."""

from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from instance.load import load_model, refuse_unsplit
from instance.split import Place
from tests.support.tiny import SIZES

CPU = torch.device("cpu")
TEXT, TOWER = (
    "model.language_model.layers.{}.self_attn.q_proj.weight",
    "model.vision_tower.encoder.layers.1.self_attn.q_proj.weight",
)


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 that sees pictures, whose tower has layers and projections of the text's names."""
    path = tmp_path_factory.mktemp("pictured")
    text = SIZES | {"num_hidden_layers": 6, "head_dim": 16, "sliding_window": 23}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config=tower | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=299,
        boi_token_index=298,
        eoi_token_index=297,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("degree", ["tp", "pp"])
def test_only_the_text_of_a_model_that_sees_pictures_is_split(degree: str, pictured: Path) -> None:
    places = [Place(part=i, parts=2) if degree == "tp" else Place(stage=i, stages=2) for i in range(2)]
    whole = load_model(pictured, torch.float32, CPU).module
    for place in places:
        refuse_unsplit(pictured, place)
    parts = [load_model(pictured, torch.float32, CPU, place=place).module for place in places]
    for part in parts:
        assert torch.equal(part.get_parameter(TOWER), whole.get_parameter(TOWER))
    if degree == "tp":
        both = torch.cat([part.get_parameter(TEXT.format(5)) for part in parts])
        assert torch.equal(both, whole.get_parameter(TEXT.format(5)))
    else:
        assert torch.equal(parts[1].get_parameter(TEXT.format(2)), whole.get_parameter(TEXT.format(5)))
