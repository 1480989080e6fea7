"""A GPU's memory is shared out by arithmetic, and what doesn't fit is refused with the numbers."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distattn.shape import AttentionShape, PackedRows
from instance.load import load_model
from instance.memory import (
    MemoryBudget,
    NoAttention,
    TooLittleMemory,
    check_weights,
    checkpoint_bytes,
    run_step,
    size,
    tiers_bytes,
)
from instance.needs import KVNeeds
from tests.support.tiny import make_model

GIB = 2**30
TOKEN = 131_072
"""Bytes of a token's KV: 32 layers, 8 KV heads, head dim 128, bf16."""


def budget(
    *,
    total: int = 140 * GIB,
    fraction: float = 0.9,
    weights: int = 15 * GIB,
    other: int = 1 * GIB,
    activations: int = GIB // 2,
    attention: int = GIB // 4,
    sampling: int = GIB // 4,
    reserve: int = 2 * GIB,
) -> MemoryBudget:
    return MemoryBudget(
        device="cuda:1",
        total=total,
        fraction=fraction,
        weights=weights,
        other=other,
        activations=activations,
        attention=attention,
        sampling=sampling,
        reserve=reserve,
    )


def kv_of(token: int) -> KVNeeds:
    """Of tokens of so many bytes."""
    return KVNeeds(block_size=1, block=token, windows=[])


def test_the_pool_gets_what_nothing_else_takes() -> None:
    some = budget()
    assert some.limit == 126 * GIB
    assert some.taken == 19 * GIB
    assert some.pool == 107 * GIB
    assert some.num_blocks(64 * TOKEN) == 13_696  # 107 GiB / 8 MiB
    some.check(13_696 * 64, kv_of(TOKEN))


def test_a_part_of_a_block_is_none() -> None:
    block = 64 * TOKEN
    assert budget(other=GIB + 1).num_blocks(block) == 13_695
    assert budget(weights=122 * GIB - block).num_blocks(block) == 1


def test_the_log_says_where_all_of_it_went() -> None:
    assert budget(sampling=3 * 2**20).describe() == {
        "device": "cuda:1",
        "limit": "0.9 x 140.0 GiB = 126.0 GiB",
        "kv": "107.2 GiB",
        "rest": "weights 15.0 GiB, other use of the device 1.0 GiB, activations 512.0 MiB, attention 256.0 MiB, "
        "sampling 3.0 MiB, CUDA graphs and NCCL 2.0 GiB",
    }
    over = budget(fraction=1, weights=200 * GIB).describe()
    assert (over["limit"], over["kv"]) == ("140.0 GiB", "0.0 MiB")


def test_too_little_says_how_much_is_missing_and_for_what() -> None:
    with pytest.raises(TooLittleMemory) as told:
        budget(total=20 * GIB).num_blocks(64 * TOKEN)
    assert str(told.value) == (
        "--kv-memory: cuda:1 needs 19.0 GiB (weights 15.0 GiB, other use of the device 1.0 GiB, activations 512.0 MiB, "
        "attention 256.0 MiB, sampling 256.0 MiB, CUDA graphs and NCCL 2.0 GiB, one block of KV 8.0 MiB), "
        "short by 1.0 GiB of 0.9 x 20.0 GiB = 18.0 GiB"
    )
    whole = budget(fraction=1)
    assert whole.pool == 121 * GIB
    with pytest.raises(TooLittleMemory) as told:
        whole.check(1_000_000, kv_of(TOKEN))
    assert str(told.value) == (
        "--kv-tokens 1,000,000: cuda:1 needs 141.1 GiB (weights 15.0 GiB, other use of the device 1.0 GiB, "
        "activations 512.0 MiB, attention 256.0 MiB, sampling 256.0 MiB, CUDA graphs and NCCL 2.0 GiB, KV 122.1 GiB), "
        "short by 1.1 GiB of 140.0 GiB; at most 991,232 tokens fit (131,072 bytes each)"
    )
    with pytest.raises(TooLittleMemory, match="at most 0 tokens fit"):
        budget(fraction=1, weights=150 * GIB).check(1, kv_of(TOKEN))


def test_weights_are_refused_before_they_are_loaded() -> None:
    check_weights("cuda:0", needed=15 * GIB, free=15 * GIB, total=80 * GIB)
    with pytest.raises(TooLittleMemory) as told:
        check_weights("cuda:0", needed=15 * GIB, free=13 * GIB, total=80 * GIB)
    assert str(told.value) == (
        "cuda:0 needs 15.0 GiB for weights, short by 2.0 GiB: 13.0 GiB of its 80.0 GiB are free, the rest is in use"
    )


@given(
    total=st.integers(0, 2**40),
    fraction=st.floats(0.01, 1),
    parts=st.lists(st.integers(0, 2**38), min_size=6, max_size=6),
    block=st.integers(1, 2**26),
)
def test_blocks_fit_and_one_more_does_not(total: int, fraction: float, parts: list[int], block: int) -> None:
    names = ("weights", "other", "activations", "attention", "sampling", "reserve")
    some = budget(total=total, fraction=fraction, **dict(zip(names, parts, strict=True)))  # type: ignore[arg-type]
    assert some.pool + sum(parts) == some.limit <= total
    if some.pool < block:
        with pytest.raises(TooLittleMemory, match="short by"):
            some.num_blocks(block)
        with pytest.raises(TooLittleMemory, match="short by"):
            some.check(1, kv_of(block))
        return
    blocks = some.num_blocks(block)
    assert blocks * block <= some.pool < (blocks + 1) * block
    some.check(blocks, kv_of(block))
    with pytest.raises(TooLittleMemory, match=f"at most {blocks:,} tokens fit"):
        some.check(blocks + 1, kv_of(block))


def test_sizes_are_read_in_the_unit_that_fits() -> None:
    assert [size(n) for n in (0, 3 * 2**19, GIB - 2**20, GIB, 1500 * GIB)] == [
        "0.0 MiB",
        "1.5 MiB",
        "1,023.0 MiB",
        "1.0 GiB",
        "1,500.0 GiB",
    ]


def test_a_checkpoints_bytes_are_known_before_it_is_loaded(tmp_path: Path) -> None:
    path = make_model("qwen2", tmp_path)
    model = load_model(path, None, torch.device("cpu"))
    exact = model.weight_bytes()
    assert checkpoint_bytes(path, torch.float32) == exact
    assert checkpoint_bytes(path, torch.bfloat16) == exact // 2
    assert exact <= checkpoint_bytes(path, None) < exact + 16_384  # the files' headers


def test_a_step_runs_without_kv_and_leaves_nothing_behind(tmp_path: Path) -> None:
    model = load_model(make_model("llama", tmp_path), None, torch.device("cpu"))
    shapes: list[tuple[int, ...]] = []
    model.module.register_forward_hook(lambda module, inputs, out: shapes.append(tuple(out.logits.shape)))
    run_step(model, rows=123, sampled=5)
    assert shapes == [(1, 5, model.vocab_size)]
    assert model.context.attention is None


def test_no_attention_is_zeros_for_loose_and_packed_rows() -> None:
    shape = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, dtype=torch.bfloat16)
    nothing = NoAttention(shape)
    q_THD, kv_TKD = torch.randn(7, 4, 16, dtype=shape.dtype), torch.randn(7, 2, 16, dtype=shape.dtype)
    qkv_TE, cos_TD = torch.randn(7, 8 * 16, dtype=shape.dtype), torch.ones(7, 16)
    packed = PackedRows(qkv_TE=qkv_TE, cos_TD=cos_TD, sin_TD=cos_TD, q_norm=None, k_norm=None)
    for out_THD in (nothing.run(0, q_THD, kv_TKD, kv_TKD), nothing.run_packed(0, packed)):
        assert out_THD.shape == (7, 4, 16) and out_THD.dtype == shape.dtype and not out_THD.any()


def test_what_tiers_take_of_the_gpu_grows_with_blocks() -> None:
    """A block on its way, and of it a checksum: eight bytes for each four, for words, places and their products."""
    assert tiers_bytes(2**16) == tiers_bytes(8 * 2**20) == 128 * 2**20
    assert tiers_bytes(40 * 2**20) == 16 * 40 * 2**20
