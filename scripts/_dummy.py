"""A model of random weights and a pool of random KV, to measure steps with."""

from typing import Any

import torch
from make_dummy_model import config_of

from instance.config import GPU_KV_MEMORY
from instance.layers import Mixture
from instance.load import random_model
from instance.memory import measure
from instance.model import Model
from instance.needs import Needs
from instance.warmup import warm_up
from kernels.products import Scheme
from kvstore.storage import KVStorage

BLOCK = 64
MAX_ROWS = 8192
"""Of a step."""
STD = 0.5
"""Of the KV that stands in for what a prefill would have written."""


def make_model(shape: str, device: torch.device, quantize: Scheme | None = None) -> Model:
    """Of a shape as `make_dummy_model.config_of` takes it: bf16, and fused if it can be, on a GPU; fp32 elsewhere.
    `quantize`: its linear layers' weights."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = random_model(config_of(shape), dtype, device, seed=0, quantize=quantize)
    if on_gpu and (reason := model.fuse("triton")) is not None:
        print(f"{shape}: layers run as transformers has them: {reason}")
    return model


def pool_tokens(model: Model, chunk_tokens: int, cell_size: int) -> int:
    """Tokens of KV that an instance with `--kv-memory 0.92` holds (`instance.start.size_pool`)."""
    needs = Needs.of(model, block_size=BLOCK, chunk_tokens=chunk_tokens, cell_size=cell_size, backend="triton")
    budget = measure(model, needs, fraction=GPU_KV_MEMORY)
    for name, value in budget.describe().items():
        print(f"{name}: {value}")
    return budget.num_blocks(BLOCK * model.token_bytes()) * BLOCK


def make_storage(model: Model, kv_tokens: int, num_blocks: int = 0) -> KVStorage:
    """A pool of random KV: `num_blocks`, or such that one sequence of so many tokens fits. Afterwards all is warm."""
    storage = model.make_storage(num_blocks or kv_tokens // BLOCK, BLOCK)
    for layer_2BPKD in storage.data_L2BPKD:
        for piece in torch.split(layer_2BPKD.view(-1), 1 << 28):
            piece.normal_(std=STD)
    warm_up(model, storage, "triton" if model.device.type == "cuda" else "torch", MAX_ROWS)
    return storage


def bytes_read(model: Model, rows: int = 1) -> float:
    """Weights that a step of so many rows reads: of the embeddings a row or a few, of experts those that the rows go to, each
    as likely as the others. Of models whose layers aren't fused all experts."""
    embeddings: Any = model.module.get_input_embeddings()
    is_tied = model.module.get_output_embeddings().weight is embeddings.weight  # type: ignore[no-untyped-call]
    read: float = model.weight_bytes() - (0 if is_tied else int(embeddings.weight.nbytes))
    for feed in () if model.fused is None else model.fused.feeds():
        if isinstance(feed, Mixture):
            experts = feed.experts
            not_hit = (1 - feed.top_k / experts.num_experts) ** rows
            read -= not_hit * (experts.gate_up_XNE.nbytes + experts.down_XEI.nbytes)
    return read


def bytes_seen(model: Model, tokens: int) -> int:
    """KV that a row reads which is to see so many tokens where its layers let it."""
    spans = (model.shape.layer(i).sight.span or tokens for i in range(model.num_layers))
    return model.layer_token_bytes() * sum(min(tokens, span) for span in spans)
