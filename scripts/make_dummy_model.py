#!/usr/bin/env python3
"""Write a checkpoint of random weights of a known shape, or of a config.json: to measure or try a service, not to talk with.

The tokenizer is byte-level, with a chat template; ids beyond the bytes read `<|300|>`, and no text becomes them. The last of
them ends a text, unless the config says what does: tools and JSON schemas need that, and `ignore_eos` does without. Weights are
drawn on a GPU if there is one: the same seed gives the same ones on the same kind of device. With --alike they are drawn for
one layer, and all others have the same: of a large shape that takes a part of the time.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

POSITIONS = 8_388_608
"""More than the models that the shapes are of: what is measured is how long a text can be, not what it says."""

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 8192,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": POSITIONS,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": POSITIONS,
        "rope_theta": 500000.0,
    },
    "llama-3.1-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": POSITIONS,
        "rope_theta": 500000.0,
    },
    "gemma-3-27b": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
        "vocab_size": 262208,
        "max_position_embeddings": POSITIONS,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "max_position_embeddings": POSITIONS,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": POSITIONS,
        "rope_theta": 1000000.0,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "vocab_size": 102400,
        "max_position_embeddings": POSITIONS,
    },
}
"""Without `model_type`: Llama's."""
BYTES = 256


def config_of(shape: str) -> Any:
    """Of a name in `SHAPES`, or a config.json or its directory. Raises OSError or ValueError if it is neither."""
    from transformers import AutoConfig

    if shape in SHAPES:
        nobody: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # models' own would be bytes
        settings: dict[str, Any] = {"model_type": "llama"} | SHAPES[shape] | nobody
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    if not Path(shape).exists():
        raise ValueError(f"{shape} is neither a file nor one of {', '.join(SHAPES)}")
    return AutoConfig.from_pretrained(shape, local_files_only=True)


def write(
    shape: str, folder: Path, dtype: str, seed: int = 0, *, alike: bool = False, form: Literal["plain", "fp8"] = "plain"
) -> None:
    """The checkpoint. `alike`: all layers have the same weights; then `form` says how linear layers are stored.

    Raises OSError or ValueError for a shape that can't be had, or a vocabulary too small for bytes.
    """
    import torch
    from _tiny import make_tokenizer
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = config_of(shape)
    vocabulary = config.get_text_config().vocab_size
    tokenizer = make_tokenizer(vocabulary)
    config.dtype = getattr(torch, dtype)
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # 8B: five minutes on CPUs
    if alike:
        from _alike import write_alike

        model = write_alike(config, folder, device=device, fp8=form == "fp8")
    else:
        auto: Any = AutoModelForCausalLM  # its from_config has no types
        with device:
            model = auto.from_config(config, dtype=config.dtype, trust_remote_code=False)
    if config.get_text_config().eos_token_id is None and vocabulary > BYTES:
        model.generation_config.eos_token_id = vocabulary - 1
    if alike:
        model.generation_config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", metavar="SHAPE_OR_CONFIG", help=f"{', '.join(SHAPES)}; or the path of a config.json")
    parser.add_argument("out", metavar="DIR", type=Path, help="directory of the checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alike", action="store_true", help="give all layers the same weights")
    parser.add_argument(
        "--form",
        choices=("plain", "fp8"),
        default="plain",
        help="with --alike: fp8 has linear layers in e4m3, as compressed-tensors stores them",
    )
    args = parser.parse_args()
    if args.form != "plain" and not args.alike:
        parser.error(f"--form {args.form} goes with --alike")
    try:
        write(args.shape, args.out, args.dtype, args.seed, alike=args.alike, form=args.form)
    except (OSError, ValueError) as error:
        print(f"make_dummy_model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
