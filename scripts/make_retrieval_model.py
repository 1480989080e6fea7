#!/usr/bin/env python3
"""Write a checkpoint that finds needles exactly at any length up to 8M tokens: an integrity test, not a language model.

It is a Llama of two layers whose weights are constructed, not trained, for the language of `_retrieval.py`:

1. Layer 1 has four previous-token heads. Head d looks d tokens back and copies that token's code, so that every token knows
   the four before it. How far it looks is all that its queries and keys say: they are the same for all tokens but for the
   rotation of their position, turned back by d.
2. Layer 2 has a match-and-copy head. A token's query is its own code and those of the three before it, its key the codes of
   the four before it, its value its own code: it finds the one place where these four symbols were followed by a fifth, and
   says it.

So an answer depends on the KV of the key's block and on no other: if that is lost, mixed up or stands elsewhere, the answer is
wrong. Rotary frequencies are 10^(-24 i / 64): the pairs from 21 on turn less than 0.12 in 8M tokens, so codes live there; those
before tell neighbours apart, and any two places up to 8M. Codes are +1 and -1, sums of them small integers, so that bf16 is
exact enough: a mismatch of one bit costs 45 in the exponent.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _retrieval import BEGIN, CODE_BITS, END, FILLER, VOCABULARY, make_haystack

HIDDEN = 256
HEADS = 4
HEAD_DIM = 128
PAIRS = HEAD_DIM // 2
FAST_PAIRS = 21
"""Rotary pairs that positions use; the others hold codes."""
THETA = 1e24
MAX_POSITIONS = 8_388_608 + 4096
POSITION_GAIN = 32.0
"""Of queries and keys in layer 1: a neighbour of the right place is 50 behind in the exponent."""
CODE_GAIN = 16.0
"""Of queries and keys in layer 2: one wrong bit is 45 behind."""
OUTPUT_GAIN = 4.0

# Places in the residual stream: the token's own code, those of the four tokens before, the answer's, and ones that keep the
# mean square at 1/4 before each layer, so that a norm doubles every entry.
OWN, BEFORE, ANSWER = 0, CODE_BITS, 5 * CODE_BITS
ONES = 6 * CODE_BITS
NUM_ONES = HIDDEN // 4 - CODE_BITS
SPENT = 4 * CODE_BITS
"""Of the ones, those that layer 1 takes away when it writes four codes."""


def build(dtype: Any) -> Any:
    """The model. Weights are what the docstring of this file says; all that is not set is 0."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        rms_norm_eps=1e-12,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=FILLER,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config)
    weights = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in model.state_dict().items()}
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] += 1

    code_VC = (torch.arange(VOCABULARY)[:, None] >> torch.arange(CODE_BITS) & 1) * 2.0 - 1
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[:, OWN : OWN + CODE_BITS] = code_VC
    embeddings[:, ONES : ONES + NUM_ONES] = 1
    weights["lm_head.weight"][:, ANSWER : ANSWER + CODE_BITS] = code_VC

    half = 0.5  # undoes the doubling by the norm
    codes = torch.arange(CODE_BITS)
    frequencies = THETA ** (-torch.arange(FAST_PAIRS, dtype=torch.float64) / PAIRS)

    first = "model.layers.0.self_attn."
    query = weights[first + "q_proj.weight"].view(HEADS, HEAD_DIM, HIDDEN)
    for head in range(HEADS):
        turn = frequencies * (head + 1)
        query[head, :FAST_PAIRS, ONES] = half * POSITION_GAIN * turn.cos().float()
        query[head, PAIRS : PAIRS + FAST_PAIRS, ONES] = -half * POSITION_GAIN * turn.sin().float()
    weights[first + "k_proj.weight"][:FAST_PAIRS, ONES] = half * POSITION_GAIN
    weights[first + "v_proj.weight"][codes, OWN + codes] = half
    weights[first + "v_proj.weight"][CODE_BITS, ONES] = half
    out = weights[first + "o_proj.weight"].view(HIDDEN, HEADS, HEAD_DIM)
    for head in range(HEADS):
        place = BEFORE + head * CODE_BITS
        out[place + codes, head, codes] = 1
    spent = ONES + NUM_ONES - SPENT
    out[spent : spent + SPENT, 0, CODE_BITS] = -1

    second = "model.layers.1.self_attn."
    query = weights[second + "q_proj.weight"].view(HEADS, HEAD_DIM, HIDDEN)
    key = weights[second + "k_proj.weight"]
    for distance in range(HEADS):
        lanes = FAST_PAIRS + distance * CODE_BITS + codes
        query[0, lanes, distance * CODE_BITS + codes] = half * CODE_GAIN
        key[lanes, BEFORE + distance * CODE_BITS + codes] = half * CODE_GAIN
    weights[second + "v_proj.weight"][codes, OWN + codes] = half
    weights[second + "o_proj.weight"].view(HIDDEN, HEADS, HEAD_DIM)[ANSWER + codes, 0, codes] = OUTPUT_GAIN

    model.load_state_dict(weights)
    return model.to(dtype)


def write(folder: Path, dtype: Any) -> None:
    """The checkpoint with its tokenizer, whose words are `t0` to `t1023`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder.mkdir(parents=True, exist_ok=True)
    build(dtype).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token=f"t{FILLER}"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": f"t{BEGIN}",
        "eos_token": f"t{END}",
        "pad_token": f"t{FILLER}",
        "model_max_length": MAX_POSITIONS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def check(folder: Path, num_tokens: int, *, block: int, seed: int, questions: int | None = None) -> tuple[int, int]:
    """Ask transformers for every key of a haystack, or for that many of them: how many answers are right, of how many.

    The haystack is read once, in chunks; each question's rows then attend to what is cached of it, and to themselves.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
    haystack = make_haystack(num_tokens, block=block, seed=seed)
    cache = DynamicCache(config=model.config)
    right = 0
    asked: Sequence[int] = range(haystack.num_keys)
    if questions is not None and questions < haystack.num_keys:
        asked = sorted(np.random.default_rng(seed).choice(haystack.num_keys, questions, replace=False).tolist())
    with torch.inference_mode():
        for start in range(0, num_tokens, 1024):
            ids = torch.from_numpy(haystack.tokens[start : start + 1024].astype(np.int64))[None]
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for index in asked:
            want = haystack.answer(index)
            rows = torch.tensor([haystack.question(index) + want[:-1]])
            logits = model(rows, past_key_values=cache, use_cache=True).logits[0]
            cache.crop(num_tokens - cache.get_seq_length())
            # teacher-forced: a wrong token anywhere is a wrong answer, and a right answer is what greedy decoding says
            right += logits[-len(want) :].argmax(-1).tolist() == want
    return right, len(asked)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of the checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--check", type=int, nargs="*", default=[], metavar="TOKENS", help="ask transformers for all keys")
    parser.add_argument("--block", type=int, default=64, help="tokens of a block, for --check")
    parser.add_argument("--questions", type=int, help="ask for so many keys only")
    parser.add_argument("--seed", type=int, default=0, help="of the haystacks")
    args = parser.parse_args()
    try:
        for tokens in args.check:
            make_haystack(tokens, block=args.block, seed=args.seed)
    except ValueError as error:
        print(f"make_retrieval_model: {error}", file=sys.stderr)
        return 2

    import torch

    write(args.out, getattr(torch, args.dtype))
    failed = False
    for tokens in args.check:
        right, asked = check(args.out, tokens, block=args.block, seed=args.seed, questions=args.questions)
        print(f"{tokens:>9,} tokens: {right:,} of {asked:,} keys found", flush=True)
        failed |= right < asked
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
