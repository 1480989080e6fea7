#!/usr/bin/env python3
"""Write a checkpoint of random weights of a known shape, or of a config.json: to measure or try a service, not to talk with.

The tokenizer is byte-level, with a chat template; ids beyond the bytes read `<|300|>`, and no text becomes them. The last of
them ends a text, unless the config says what does: tools and JSON schemas need that, and `ignore_eos` does without. Weights are
drawn on a GPU if there is one: the same seed gives the same ones on the same kind of device.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

POSITIONS = 2_097_152
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
}
BYTES = 256


def config_of(shape: str) -> Any:
    """Of a name in `SHAPES`, or a config.json or its directory. Raises OSError or ValueError if it is neither."""
    from transformers import AutoConfig, LlamaConfig

    if shape in SHAPES:
        nobody: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}  # Llama's own would be bytes
        return LlamaConfig.from_dict(SHAPES[shape] | nobody)
    if not Path(shape).exists():
        raise ValueError(f"{shape} is neither a file nor one of {', '.join(SHAPES)}")
    return AutoConfig.from_pretrained(shape, local_files_only=True)


def write(shape: str, folder: Path, dtype: str, seed: int = 0) -> None:
    """The checkpoint. Raises OSError or ValueError for a shape that can't be had, or a vocabulary too small for bytes."""
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
    auto: Any = AutoModelForCausalLM  # its from_config has no types
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # 8B: five minutes on CPUs
        model = auto.from_config(config, dtype=config.dtype, trust_remote_code=False)
    if config.get_text_config().eos_token_id is None and vocabulary > BYTES:
        model.generation_config.eos_token_id = vocabulary - 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", metavar="SHAPE_OR_CONFIG", help=f"{', '.join(SHAPES)}; or the path of a config.json")
    parser.add_argument("out", metavar="DIR", type=Path, help="directory of the checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        write(args.shape, args.out, args.dtype, args.seed)
    except (OSError, ValueError) as error:
        print(f"make_dummy_model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
