"""A model of random weights and a pool of random KV, to measure steps with."""

from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig

from instance.config import GPU_KV_MEMORY
from instance.memory import measure
from instance.model import Model, random_model
from instance.needs import Needs
from instance.warmup import warm_up
from kvstore.storage import KVStorage

LLAMA_3_1_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 2_097_152,
    "rope_theta": 500000.0,
}
BLOCK = 64
STD = 0.5
"""Of the KV that stands in for what a prefill would have written."""


def make_model(config: str | None, device: torch.device) -> Model:
    """The Llama-3.1-8B shape, or that of a directory's config.json; bf16 and fused on a GPU, fp32 elsewhere."""
    on_gpu = device.type == "cuda"
    settings = AutoConfig.from_pretrained(config) if config else LlamaConfig.from_dict(LLAMA_3_1_8B)
    model = random_model(settings, torch.bfloat16 if on_gpu else torch.float32, device, seed=0)
    if on_gpu:
        model.fuse("triton")
        if model.fused is None:
            raise SystemExit("this model's layers don't run fused: there is nothing to measure")
    return model


def pool_tokens(model: Model, chunk_tokens: int, cell_size: int) -> int:
    """Tokens of KV that an instance with `--kv-memory 0.92` holds (`instance.start.size_pool`)."""
    needs = Needs.of(model, block_size=BLOCK, chunk_tokens=chunk_tokens, cell_size=cell_size, backend="triton")
    budget = measure(model, needs, fraction=GPU_KV_MEMORY)
    for name, value in budget.describe().items():
        print(f"{name}: {value}")
    return budget.num_blocks(BLOCK * model.token_bytes()) * BLOCK


def make_storage(model: Model, kv_tokens: int) -> KVStorage:
    """A pool of random KV; afterwards all is warm."""
    shape = model.shape
    storage = KVStorage(
        num_layers=model.num_layers,
        num_blocks=kv_tokens // BLOCK,
        block_size=BLOCK,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        parts=shape.parts,
        dtype=shape.dtype,
        device=model.device,
    )
    for layer in range(model.num_layers):
        for piece in torch.split(storage.layer(layer).view(-1), 1 << 28):
            piece.normal_(std=STD)
    warm_up(model, storage, "triton" if model.device.type == "cuda" else "torch")
    return storage


def bytes_read(model: Model) -> int:
    """Weights that a step reads: of the embeddings it reads a row or a few."""
    embeddings: Any = model.module.get_input_embeddings()
    return model.weight_bytes() - int(embeddings.weight.nbytes)


def token_bytes(storage: KVStorage) -> int:
    """KV of one token, all layers."""
    return storage.block_bytes // storage.block_size
