"""One rank of two that decode together by `distattn.peers`; run by `tests/distattn/test_peers.py` under torchrun, with the kind
of model.

The same prompts are answered by each instance alone, and with their KV and their prefill on both: the tokens must be equal.
"""

import os
import sys
from array import array
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import torch
import torch.distributed
from _loop import Cell, Loop
from transformers import AutoConfig

from instance.cell import open_store
from instance.load import random_model
from instance.warmup import warm_up

PROMPTS = (300, 65, 7, 128, 1000)
NEW = 40
BLOCK = 64
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "pad_token_id": None,
}
WINDOWS: dict[str, Any] = {
    "sliding_window": 100,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LATENTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "q_lora_rank": 64,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": WINDOWS,
    "gpt_oss": WINDOWS | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "minicpm3": LATENTS,
}


def main() -> None:
    rank, kind = int(os.environ["RANK"]), sys.argv[1]
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    config = AutoConfig.for_model(kind, **(SIZES | KINDS[kind]))
    model = random_model(config, torch.float32, device, seed=3)
    for parameter in model.module.parameters():
        parameter.data.mul_(3)  # away from ties
    assert (model.fuse("triton") is None) == (kind != "minicpm3")
    storage = model.make_storage(400, BLOCK)
    warm_up(model, storage, "triton", 256)
    meeting = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    stores = []
    if rank == 0:
        store, address = open_store("127.0.0.1", 60)
        stores.append(store)
        meeting.set("address", address)
    cell = Cell.meet(meeting.get("address").decode(), rank, 2, device)
    loop = Loop(model, storage, chunk_tokens=256, cell=cell)
    prompts = [array("I", torch.randint(1000, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in PROMPTS]

    if rank == 0:
        for seq, prompt in enumerate(prompts):
            loop.admit(seq, prompt, [len(prompt), 0], NEW)
        loop.finish(*range(len(prompts)))
    cell.barrier()
    loop.join([0, 1])
    for seq, prompt in enumerate(prompts):
        away = len(prompt) // 2
        loop.admit(100 + seq, prompt, [len(prompt) - away, away], NEW)
    loop.finish(*(100 + seq for seq in range(len(prompts))))
    if rank == 0:
        for seq in range(len(prompts)):
            alone, shared = loop.tokens[seq], loop.tokens[100 + seq]
            assert len(alone) == NEW
            assert alone == shared, (seq, alone, shared)
        assert loop.runners["decode"].shared_graph_steps > NEW // 2, "the steps did not run as graphs"
        print("EQUAL", flush=True)
    cell.barrier()
    loop.close()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
