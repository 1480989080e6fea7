"""Which architectures of transformers are served exactly, and why others aren't: docs/models.md is this table."""

import functools
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from distattn.shape import AttentionShape
from instance.config import DType, InstanceConfig, Launch
from instance.errors import UnsupportedModel
from instance.exact import difference, eager_logits, paged_logits, refuse_inexact
from instance.latent import LatentHeads
from instance.load import load_model, random_model
from instance.model import Model
from instance.start import load
from kernels.segments import Scoring
from kvstore.sight import FULL, Sight
from tests.support.tiny import VOCAB, make_model

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
BLOCK, CHUNK, TOKENS, LAST = 16, 7, 40, 128

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LAST,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD: dict[str, Any] = {"head_dim": 16}
WINDOW: dict[str, Any] = {"sliding_window": 11}
SOME_WINDOWS: dict[str, Any] = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
MOE: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}

EXACT: dict[str, dict[str, Any]] = {
    "afmoe": HEAD | MOE | SOME_WINDOWS,
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": SOME_WINDOWS,
    "cohere2_moe": HEAD | MOE | SOME_WINDOWS,
    "cwm": HEAD | SOME_WINDOWS,
    "deepseek_v2": MOE | LATENT,
    "deepseek_v3": MOE | LATENT | {"first_k_dense_replace": 1},
    "dots1": MOE | SOME_WINDOWS,
    "ernie4_5": HEAD,
    "ernie4_5_moe": MOE | {"moe_k": 2},
    "exaone4": SOME_WINDOWS,
    "exaone_moe": HEAD | MOE | SOME_WINDOWS,
    "flex_olmo": MOE,
    "gemma": HEAD,
    "gemma2": HEAD | SOME_WINDOWS | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
    "gemma3_text": HEAD | SOME_WINDOWS,
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": HEAD | MOE,
    "glm4_moe_lite": MOE | LATENT,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": HEAD | MOE | SOME_WINDOWS | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "granitemoe": MOE,
    "granitemoe_swa": MOE | SOME_WINDOWS,
    "granitemoeshared": MOE | {"shared_intermediate_size": 32},
    "granite_swa": SOME_WINDOWS,
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "internlm3": HEAD,
    "llama": {},
    "llama4_text": HEAD
    | MOE
    | {
        "attention_chunk_size": 11,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "intermediate_size_mlp": 96,
        "floor_scale": 8,
    },
    "minicpm3": LATENT,
    "minimax_m2": HEAD | MOE,
    "ministral3": HEAD
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "llama_4_scaling_beta": 0.5,
        }
    },
    "ministral": HEAD | SOME_WINDOWS,
    "mistral": WINDOW,
    "mixtral": MOE | WINDOW,
    "nanochat": {},
    "nemotron": HEAD,
    "olmo": {},
    "olmo2": {},
    "olmo3": SOME_WINDOWS,
    "olmoe": MOE,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {},
    "phi3": WINDOW,
    "phimoe": MOE | WINDOW,
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": MOE | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": HEAD | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": HEAD | MOE | WINDOW | {"use_sliding_window": True},
    "seed_oss": HEAD,
    "smollm3": {},
    "solar_open": HEAD | MOE,
    "stablelm": {},
    "starcoder2": WINDOW,
    "vaultgemma": HEAD | SOME_WINDOWS | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
    "youtu": LATENT,
}

FUSED = {
    "cwm", "gemma", "gemma2", "gemma3_text", "gpt_oss", "internlm3", "llama", "ministral", "mistral", "mixtral", "qwen2",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3",
}  # fmt: skip
"""On a GPU; the check is the same here."""

EXPERTS_ALONE = {
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
    "glm4_moe_lite", "granitemoe", "granitemoe_swa", "granitemoeshared", "minimax_m2", "olmoe", "phimoe", "qwen2_moe",
    "solar_open",
}  # fmt: skip
"""Mixtures whose layers run as transformers has them, but for the experts: those run by `kernels.experts`."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({}, "bloom: its attention does not go through transformers' attention interface (it adds ALiBi biases)"),
    "codegen": (
        {"n_ctx": LAST, "rotary_dim": 8},
        "codegen: its attention does not go through transformers' attention interface",
    ),
    "deepseek_v32": (MOE, "deepseek_v32 has layers of type indexed_attention"),
    "diffllama": ({}, "diffllama: layer 0 calls attention 2 times"),
    "doge": ({}, "mask"),
    "falcon": ({}, "falcon: its attention does not go through transformers' attention interface"),
    "gemma4_text": (HEAD | WINDOW, "gemma4_text: its layers differ: 4 heads on 2 of 16 in layer 0, 4 heads on 2 of 512 in 1"),
    "gpt_neo": (
        {"num_layers": 2, "attention_types": [[["global"], 2]]},
        "gpt_neo: its attention does not go through transformers' attention interface",
    ),
    "gptj": ({"rotary_dim": 8}, "gptj: its attention does not go through transformers' attention interface"),
    "mamba": ({}, "mamba: 2 of its 2 layers keep a state"),
    "mimo_v2_flash": (
        HEAD | MOE | SOME_WINDOWS | {"v_head_dim": 8, "swa_head_dim": 16, "swa_v_head_dim": 8, "swa_num_attention_heads": 4},
        "mimo_v2_flash: its layers differ: 4 heads on 4 of 16, values of 8 in layer 0, 4 heads on 2 of 16, values of 8 in 1",
    ),
    "mpt": ({}, "mpt: its attention does not go through transformers' attention interface (it adds ALiBi biases)"),
    "rwkv": ({}, "rwkv: its layers keep a state from token to token (a recurrence)"),
    "xglm": ({}, "xglm: its attention does not go through transformers' attention interface"),
}


LINEAR_THEN_FULL: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
STATEFUL: dict[str, tuple[dict[str, Any], str]] = {
    "bamba": ({"attn_layer_indices": [1]}, "1 of its 2 layers keep a state from token to token (linear attention or a state"),
    "falcon_h1": (HEAD, "2 of its 2 layers keep a state from token to token (a state space beside attention)"),
    "granitemoehybrid": (
        MOE | LINEAR_THEN_FULL,
        "1 of its 2 layers keep a state from token to token (linear attention or a state space)",
    ),
    "jamba": (
        MOE | {"attn_layer_offset": 1, "attn_layer_period": 2},
        "1 of its 2 layers keep a state from token to token (linear attention or a state space)",
    ),
    "kimi_linear": (LINEAR_THEN_FULL, "1 of its 2 layers keep a state from token to token (linear attention or a state"),
    "lfm2": (
        {"layer_types": ["conv", "full_attention"]},
        "1 of its 2 layers keep a state from token to token (a convolution over tokens)",
    ),
    "lfm2_moe": (
        MOE | {"layer_types": ["conv", "full_attention"]},
        "1 of its 2 layers keep a state from token to token (a convolution over tokens)",
    ),
    "minimax": (MOE, "1 of its 2 layers keep a state from token to token (linear attention or a state space)"),
    "nemotron_h": ({}, " layers keep a state from token to token (linear attention or a state space)"),
    "olmo_hybrid": (LINEAR_THEN_FULL, "1 of its 2 layers keep a state from token to token (linear attention or a state"),
    "qwen3_5_moe_text": (
        HEAD | MOE | LINEAR_THEN_FULL,
        "1 of its 2 layers keep a state from token to token (linear attention or a state space)",
    ),
    "qwen3_5_text": (HEAD | LINEAR_THEN_FULL, "1 of its 2 layers keep a state from token to token (linear attention or a"),
    "qwen3_next": (HEAD | MOE | LINEAR_THEN_FULL, "1 of its 2 layers keep a state from token to token (linear attention or a"),
    "recurrent_gemma": ({}, "2 of its 2 layers keep a state from token to token (linear attention or a state space)"),
}
"""Linear attention, state spaces and convolutions beside attention."""


def make(kind: str, more: dict[str, Any], max_context: int | None = None, dtype: torch.dtype = torch.float32) -> Model:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    model = random_model(AutoConfig.for_model(kind, **(SIZES | more)), dtype, CPU, seed=1, max_context=max_context)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.module.named_parameters():  # as made, attention hardly shows, and a lost bias not at all
            weight.normal_(1.0 if "norm" in name and "bias" not in name else 0.0, 0.15, generator=generator)
    return model


def instance_of(model: str, max_context: int | None) -> InstanceConfig:
    return InstanceConfig(
        gmanager="tcp://127.0.0.1:5570",
        model=model,
        kv_tokens=64,
        launch=Launch(rank=0, local_rank=0, world_size=1, run_id="test"),
        device="cpu",
        cell_size=1,
        max_context=max_context,
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of an older transformers
@pytest.mark.parametrize("kind", EXACT)
def test_log_probabilities_over_a_paged_pool_are_transformers_own(kind: str) -> None:
    model = make(kind, EXACT[kind])
    texts = torch.randint(3, 97, (2, TOKENS), generator=torch.Generator().manual_seed(3)).tolist()
    first = [0, LAST - TOKENS]
    want = eager_logits(model.module, texts, first).log_softmax(-1)
    for block in (1, BLOCK):
        got = paged_logits(model, texts, first, [CHUNK] * TOKENS, block_size=block, backend="torch").log_softmax(-1)
        assert float((got - want).abs().max()) < 5e-4
    assert float((want[:, 1:] - want[:, :-1]).abs().max()) > 0.1  # a constant would agree with anything
    assert refuse_inexact(model, kind, block_size=BLOCK, backend="torch") < 1e-4
    assert (model.fuse("torch") is None) == (kind in FUSED)
    are_bound = ["forward" in vars(part) for name, part in model.module.named_modules() if name.endswith(".experts")]
    assert any(are_bound) == all([*are_bound, kind in EXPERTS_ALONE]) == (kind in EXPERTS_ALONE)
    assert difference(model, block_size=BLOCK, backend="torch") < 1e-4
    got = paged_logits(model, texts, first, [CHUNK] * TOKENS, block_size=BLOCK, backend="torch").log_softmax(-1)
    assert float((got - want).abs().max()) < 5e-4  # of experts that run by kernels of ours, too


LATENTS = [kind for kind, more in EXACT.items() if "kv_lora_rank" in more]
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("more", [{}, {"q_lora_rank": None}, {"rope_interleave": False}, {"attention_bias": True}, YARN])
@pytest.mark.parametrize("kind", LATENTS)
def test_latents_and_plain_heads_say_the_same(kind: str, more: dict[str, Any]) -> None:
    """As transformers, with each way to rotate and to scale."""
    model = make(kind, EXACT[kind] | ({"rope_parameters": more} if more is YARN else more))
    texts = torch.randint(3, 97, (2, TOKENS), generator=torch.Generator().manual_seed(3)).tolist()
    first = [0, LAST - TOKENS]
    want = eager_logits(model.module, texts, first).log_softmax(-1)
    latent, heads = model.shape, model.heads_shape
    assert (latent.num_kv_heads, latent.head_dim, latent.value_dim, latent.parts, latent.out_dim) == (1, 40, 32, 1, 32)
    assert (heads.num_kv_heads, heads.head_dim, heads.value_dim, heads.parts, heads.out_dim) == (4, 24, 0, 2, 24)
    assert latent.scale == heads.scale
    of_latents = model.fingerprint()
    for token_bytes in (2 * 40 * 4, 2 * 2 * 4 * 24 * 4):
        assert model.token_bytes() == token_bytes
        for block in (1, BLOCK):
            got = paged_logits(model, texts, first, [CHUNK] * TOKENS, block_size=block, backend="torch").log_softmax(-1)
            assert float((got - want).abs().max()) < 5e-4
        assert refuse_inexact(model, kind, block_size=BLOCK, backend="torch") < 1e-4
        model.keep_heads()
    assert model.fingerprint() != of_latents  # no cell has both
    assert torch.equal(eager_logits(model.module, texts, first).log_softmax(-1), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LATENTS)
def test_rounding_is_no_reason_to_refuse_latents(kind: str, dtype: torch.dtype) -> None:
    model = make(kind, EXACT[kind], dtype=dtype)
    assert model.shape.value_dim
    assert refuse_inexact(model, kind, block_size=BLOCK, backend="torch") > 0


@pytest.mark.parametrize("wrong", ["another part", "a bias", "a larger latent"])
def test_what_is_not_made_like_deepseeks_keeps_its_heads(wrong: str) -> None:
    module: Any = make("deepseek_v3", EXACT["deepseek_v3"]).module
    attention = module.model.layers[1].self_attn
    if wrong == "another part":
        attention.k_norm = torch.nn.Identity()
    elif wrong == "a bias":
        attention.kv_b_proj.bias = torch.nn.Parameter(torch.ones(128))
    else:
        module = make("deepseek_v3", EXACT["deepseek_v3"] | {"kv_lora_rank": 200}).module
    for layer in module.model.layers:  # as made: `make` has bound them
        vars(layer.self_attn.kv_b_proj).pop("forward", None)
        vars(layer.self_attn).pop("distattn_latents", None)
    model = Model(module)
    assert model.shape == model.heads_shape
    assert refuse_inexact(model, "deepseek_v3", block_size=BLOCK, backend="torch") < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_that_answer_otherwise_give_way_to_heads(dtype: DType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(instance_of(str(make_model("deepseek", tmp_path)), max_context=100), dtype=dtype)
    model = load(config).model
    assert model.shape.value_dim == 32
    assert load(replace(config, kv_format="plain")).model.shape == model.heads_shape
    values = LatentHeads.values
    monkeypatch.setattr(LatentHeads, "values", lambda heads, out_THC: values(heads, out_THC.flip(1)))
    assert load(config).model.shape == model.heads_shape


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_served_says_in_a_sentence_why(kind: str) -> None:
    more, sentence = REFUSED[kind]
    with pytest.raises(UnsupportedModel, match=re.escape(sentence)) as refusal:
        make(kind, more)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_state_is_refused_in_a_sentence_before_weights_are_loaded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    more, sentence = STATEFUL[kind]
    AutoConfig.for_model(kind, **(SIZES | more)).save_pretrained(tmp_path)
    monkeypatch.setattr("instance.load.load_whole", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UnsupportedModel, match=re.escape(sentence)) as refusal:
        load_model(tmp_path, None, CPU)
    assert str(refusal.value).startswith(f"{kind}: ")
    assert str(refusal.value).endswith("which is not implemented: of a sequence only KV can be kept, shared and moved")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "more", "max_context", "sentence"),
    [
        ("jamba", MOE, None, "keep a state"),
        ("llama", {}, 129, "--max-context 129 is more than the 128 tokens that llama takes"),
    ],
)
def test_weights_that_would_be_refused_are_not_fetched(
    kind: str,
    more: dict[str, Any],
    max_context: int | None,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model at the hub: here a stand-in for it, which has nothing but the config."""
    asked: list[list[str]] = []

    def snapshot_download(model: str, *, allow_patterns: list[str], **_: object) -> str:
        assert model == "org/name"
        asked.append(allow_patterns)
        AutoConfig.for_model(kind, **(SIZES | more)).save_pretrained(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UnsupportedModel, match=sentence):
        load(instance_of("org/name", max_context))
    assert asked == [["config.json"]]


def test_the_longest_context_is_the_configs_or_a_shorter_one_or_must_be_said() -> None:
    assert make("llama", {}).max_context == LAST
    assert make("llama", {}, max_context=100).max_context == 100
    with pytest.raises(UnsupportedModel, match="--max-context 129 is more than the 128 tokens"):
        make("llama", {}, max_context=129)
    config = AutoConfig.for_model("llama", **SIZES)
    vars(config)["max_position_embeddings"] = None
    with pytest.raises(UnsupportedModel, match="give --max-context"):
        random_model(config, torch.float32, CPU, seed=1)
    assert random_model(config, torch.float32, CPU, seed=1, max_context=1000).max_context == 1000


@pytest.mark.parametrize(
    "kind", [kind for kind, more in EXACT.items() if "sliding_window" in more or "attention_chunk_size" in more]
)
def test_what_rows_see_is_found_for_each_layer(kind: str) -> None:
    sights = make(kind, EXACT[kind]).shape.sights
    narrow = Sight(chunk=11) if kind == "llama4_text" else Sight(window=11)
    some = "layer_types" in EXACT[kind] or "max_window_layers" in EXACT[kind]
    assert sights == ((FULL, narrow) if some else (narrow, narrow)), "where all have windows each table has some of the layers"
    no_longer = make(kind, EXACT[kind], max_context=11)
    assert no_longer.shape.sights == (FULL,)
    assert refuse_inexact(no_longer, kind, block_size=60, backend="torch") < 1e-4


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "llama4_text"])
def test_what_rows_see_is_found_where_nothing_has_a_value(kind: str) -> None:
    """On the meta device, where sizes are asked for before anything is loaded."""
    config = AutoConfig.for_model(kind, **(SIZES | EXACT[kind]))
    meta = random_model(config, torch.float32, torch.device("meta"), seed=1)
    assert meta.shape == make(kind, EXACT[kind]).shape


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "llama4_text"])
@pytest.mark.parametrize("wrong", ["all", "wider", "narrower", "the other layer"])
def test_a_window_that_is_ignored_or_begins_elsewhere_is_refused(
    kind: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the comparison alone, whose texts are shorter than true windows are."""
    model = make(kind, EXACT[kind])
    shape_within = model.shape_within

    def mistaken(size: int) -> AttentionShape:
        layers = shape_within(size).layers
        by = {"wider": 1, "narrower": -1}.get(wrong, 0)
        sights = [Sight(*(n + by if n else 0 for n in (layer.sight.window, layer.sight.chunk))) for layer in layers]
        if wrong == "the other layer":
            sights = sights[::-1] if sights[::-1] != sights else [FULL, sights[1]]
        if wrong == "all":
            sights = [FULL] * len(layers)
        return replace(model.shape, layers=tuple(replace(layer, sight=s) for layer, s in zip(layers, sights, strict=True)))

    monkeypatch.setattr(model, "shape_within", mistaken)
    with pytest.raises(UnsupportedModel, match="would answer wrongly"):
        refuse_inexact(model, kind, block_size=BLOCK, backend="torch")


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2"])
def test_a_sink_or_a_cap_that_is_ignored_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(kind, EXACT[kind])
    monkeypatch.setattr("distattn.attention.apply_sinks", lambda *_, **__: None)
    shape_within = model.shape_within

    def uncapped(size: int) -> AttentionShape:
        shape = shape_within(size)
        layers = tuple(replace(layer, scoring=Scoring(layer.scoring.scale)) for layer in shape.layers)
        return replace(shape, layers=layers)

    monkeypatch.setattr(model, "shape_within", uncapped)
    with pytest.raises(UnsupportedModel, match="would answer wrongly"):
        refuse_inexact(model, kind, block_size=BLOCK, backend="torch")


def test_what_a_layer_says_of_its_window_must_be_what_its_mask_does() -> None:
    config = AutoConfig.for_model("ministral", **(SIZES | EXACT["ministral"]))
    module: Any = random_model(config, torch.float32, CPU, seed=1).module
    module.model.layers[0].self_attn.sliding_window = 12
    with pytest.raises(UnsupportedModel, match="needs sliding_window=12 in layer 0, and by its mask rows see by Sight"):
        Model(module)


def test_a_window_that_does_not_follow_its_config_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not be made small enough to compare."""
    model = make("ministral", EXACT["ministral"])
    monkeypatch.setattr("instance.exact.smaller", lambda *_: nullcontext())
    with pytest.raises(UnsupportedModel, match=r"rows of layer 0 see by Sight\(window=11.* not by Sight\(window=8"):
        refuse_inexact(model, "ministral", block_size=BLOCK, backend="torch")


def test_llama_4_scales_queries_by_their_place_in_the_text() -> None:
    """transformers' own does by their index in the rows of a call: the same for a text that is run whole."""
    more = EXACT["llama4_text"] | {"attn_scale": 1.0}
    model = make("llama4_text", more)
    config = AutoConfig.for_model("llama4_text", **(SIZES | more))
    untouched: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    untouched.load_state_dict(model.module.state_dict())
    text = torch.randint(3, 97, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        want = untouched(input_ids=text, use_cache=False).logits.log_softmax(-1)
    got = paged_logits(model, text.tolist(), [0], [CHUNK] * TOKENS, block_size=BLOCK, backend="torch").log_softmax(-1)
    assert float((got - want).abs().max()) < 5e-4


def test_llamas_parts_with_sinks_are_not_fused() -> None:
    """Fused layers pass none, and nothing in their parts' names shows them."""
    module: Any = make("llama", {}).module
    for layer in module.model.layers:
        layer.self_attn.forward = functools.partial(layer.self_attn.forward, s_aux=torch.full((4,), 0.5))
    assert Model(module).fuse("torch") == "they compute something else than Llama's or Gemma's"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "olmoe", "gpt2", "gemma2", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_rounding_is_no_reason_to_refuse(kind: str, dtype: torch.dtype) -> None:
    model = make(kind, EXACT[kind], dtype=dtype)
    assert refuse_inexact(model, kind, block_size=BLOCK, backend="torch") > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_answer_is_refused_with_the_figures(dtype: torch.dtype) -> None:
    """A scale that only transformers' own attention is told of stands for whatever is lost on the way to ours."""
    model = make("llama", {}, dtype=dtype)
    module: Any = model.module
    module.model.layers[1].self_attn.scaling *= 3
    with pytest.raises(UnsupportedModel, match=r"differ from those of transformers' own attention by \d.* explains"):
        refuse_inexact(model, "llama", block_size=BLOCK, backend="torch")


@pytest.mark.parametrize(
    ("kind", "dtype", "wrong_rows", "is_served"),
    [
        ("llama", torch.float32, 1, False),
        ("llama", torch.bfloat16, 1, False),
        ("mixtral", torch.float32, 1, False),
        ("mixtral", torch.bfloat16, 5, True),
        ("mixtral", torch.bfloat16, 7, False),
    ],
)
def test_only_where_rounding_may_choose_experts_may_rows_differ(
    kind: str, dtype: torch.dtype, wrong_rows: int, is_served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each text's last rows of 25."""

    def wrong(*arguments: Any) -> torch.Tensor:
        logits = eager_logits(*arguments).clone()  # one of inference mode can't be written
        logits[:, -wrong_rows:] = torch.randn(logits[:, -wrong_rows:].shape, generator=torch.Generator().manual_seed(4))
        return logits

    model = make(kind, EXACT[kind], dtype=dtype)
    monkeypatch.setattr("instance.exact.eager_logits", wrong)
    with nullcontext() if is_served else pytest.raises(UnsupportedModel, match="would answer wrongly"):
        refuse_inexact(model, kind, block_size=BLOCK, backend="torch")


def test_an_instance_compares_what_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = instance_of(str(make_model("llama", tmp_path)), max_context=100)
    assert load(config).model.max_context == 100
    monkeypatch.setattr("instance.exact.eager_logits", lambda *_: torch.rand(2, 25, VOCAB))
    with pytest.raises(UnsupportedModel, match="would answer wrongly"):
        load(config)


def test_the_comparison_alone_finds_a_second_attention_in_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """DiffLlama's second call overwrites the values of its first: nothing else shows it."""
    monkeypatch.setattr("instance.model.refuse_calls", lambda *_: None)
    assert difference(make("diffllama", {}), block_size=BLOCK, backend="torch") > 0.2


def test_what_the_docs_remark_of_single_settings() -> None:
    model = make("smollm3", EXACT["smollm3"] | {"no_rope_layers": [1, 0]})
    assert refuse_inexact(model, "smollm3", block_size=BLOCK, backend="torch") < 1e-4
    assert model.fuse("torch") is not None
    scaled_later = make("ministral3", EXACT["ministral3"], max_context=32)
    assert scaled_later.fuse("torch") is None


LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 32,
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "max_context", "tokens"),
    [(LONGROPE, None, 40), (LONGROPE, 33, 33), (LONGROPE, 32, 32), (DYNAMIC, None, 40)],
    ids=["longrope", "longrope-by-one", "longrope-short", "dynamic"],
)
def test_frequencies_are_those_of_the_longest_text(rope: dict[str, Any], max_context: int | None, tokens: int) -> None:
    """In every step, as transformers has them for a text of that length in one piece. Instances with other limits differ."""
    kind = "phi3" if rope is LONGROPE else "llama"
    more = {"rope_parameters": rope} | ({"original_max_position_embeddings": 32} if rope is LONGROPE else {})
    model = make(kind, more, max_context=max_context)
    config = AutoConfig.for_model(kind, **(SIZES | more))
    untouched: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    untouched.load_state_dict(model.module.state_dict())
    text = torch.randint(3, 97, (1, tokens), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        want = untouched(input_ids=text, use_cache=False).logits.log_softmax(-1)
    got = paged_logits(model, text.tolist(), [0], [CHUNK] * tokens, block_size=BLOCK, backend="torch").log_softmax(-1)
    assert float((got - want).abs().max()) < 5e-4
    assert refuse_inexact(model, kind, block_size=BLOCK, backend="torch") < 1e-4
    assert model.rotary is not None
    assert f"texts of {max_context or LAST} tokens" in model.rotary
    assert model.fingerprint() != make(kind, more, max_context=31).fingerprint()


def test_a_switch_of_training_is_no_reason_to_refuse() -> None:
    model = make("mixtral", EXACT["mixtral"] | {"output_router_logits": True})
    assert refuse_inexact(model, "mixtral", block_size=BLOCK, backend="torch") < 1e-4


def test_layers_that_ask_for_more_than_llamas_run_unfused() -> None:
    """Ministral 3 scales queries by their place, which positions near the first don't show."""
    model = make("ministral3", EXACT["ministral3"])
    assert model.fuse("torch") is not None
    assert model.fused is None


def test_the_docs_list_exactly_these() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    served, refused = (re.findall(r"^\| `([a-z0-9_]+)`", part, re.MULTILINE) for part in text.split("## Refused"))
    assert served == sorted(EXACT)
    assert set(re.findall(r"^\| `([a-z0-9_]+)` \|[^|]*\| fused \|", text, re.MULTILINE)) == FUSED
    assert refused == sorted(REFUSED | STATEFUL)
