"""Storing and gathering: exact copies, nothing else touched."""

import pytest
import torch

from kernels import gather_kv, store_kv
from kernels.kv_blocks import gather_kv_into

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("block_size", "num_kv_heads", "head_dim"), [(1, 2, 16), (16, 3, 20), (5, 9, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_tokens_come_back(backend: str, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    num_blocks, num_tokens = 60 // block_size + 2, 37
    pool = torch.full((2, 2, num_blocks, block_size, num_kv_heads, head_dim), float("nan"), dtype=dtype, device=DEVICE)
    kv_2BPKD = pool[1]  # one layer of two
    ids = torch.randperm(num_blocks, device=DEVICE)[: -(-num_tokens // block_size)]
    token = torch.arange(num_tokens, device=DEVICE)
    slots = ids[token // block_size] * block_size + token % block_size
    # k and v of fused projections, a padding row after every third token
    fused = torch.randn(num_tokens + 13, 2 * num_kv_heads, head_dim, device=DEVICE).to(dtype)
    rows = token + token // 3
    padded = torch.full((num_tokens + 13,), -1, device=DEVICE)
    padded[rows] = slots
    k_TKD, v_TKD = fused[:, :num_kv_heads], fused[:, num_kv_heads:]
    store_kv(k_TKD, v_TKD, kv_2BPKD, padded, backend=backend)

    k_SKD, v_SKD = gather_kv(kv_2BPKD, ids, num_tokens, backend=backend)
    assert k_SKD.is_contiguous()
    assert v_SKD.is_contiguous()
    assert torch.equal(k_SKD, k_TKD[rows])
    assert torch.equal(v_SKD, v_TKD[rows])
    assert int((~pool.isnan()).sum()) == 2 * num_tokens * num_kv_heads * head_dim


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("block_size", "num_kv_heads", "head_dim"), [(1, 2, 16), (16, 3, 20), (5, 9, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathers_any_tokens_into_the_start_of_a_buffer(
    backend: str, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    num_blocks = 90 // block_size + 2
    kv_2BPKD = torch.randn(2, num_blocks, block_size, num_kv_heads, head_dim, device=DEVICE).to(dtype)
    heads_first = kv_2BPKD.transpose(2, 3).contiguous().transpose(2, 3)  # a token's heads don't lie side by side
    ids = torch.randperm(num_blocks, device=DEVICE)[:-1].int()
    tokens_2SKD = kv_2BPKD[:, ids].flatten(1, 2)
    buffer_2SKD = torch.full((2, 83, num_kv_heads, head_dim), float("nan"), dtype=dtype, device=DEVICE)
    for kv, first_token, num_tokens in ((kv_2BPKD, 7, 71), (heads_first, 0, 3), (kv_2BPKD, 13, 1), (kv_2BPKD, 2, 0)):
        buffer_2SKD.fill_(float("nan"))
        gather_kv_into(buffer_2SKD[:, :num_tokens], kv, ids, first_token, backend=backend)
        assert torch.equal(buffer_2SKD[:, :num_tokens], tokens_2SKD[:, first_token : first_token + num_tokens])
        assert bool(buffer_2SKD[:, num_tokens:].isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_a_valid_amount(backend: str) -> None:
    kv_2BPKD = torch.full((2, 3, 4, 2, 16), float("nan"), device=DEVICE)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    store_kv(kv_2BPKD.new_empty(0, 2, 16), kv_2BPKD.new_empty(0, 2, 16), kv_2BPKD, none, backend=backend)
    store_kv(kv_2BPKD.new_ones(1, 2, 16), kv_2BPKD.new_ones(1, 2, 16), kv_2BPKD, none.new_tensor([-1]), backend=backend)
    k_SKD, v_SKD = gather_kv(kv_2BPKD, none, 0, backend=backend)
    assert k_SKD.shape == v_SKD.shape == (0, 2, 16)
    assert bool(kv_2BPKD.isnan().all())


def test_misuse_is_refused() -> None:
    kv_2BPKD, k_TKD = torch.zeros(2, 3, 4, 2, 16), torch.zeros(5, 2, 16)
    slots = torch.arange(5)
    with pytest.raises(ValueError, match="don't fit together"):
        store_kv(k_TKD, k_TKD[:, :1], kv_2BPKD, slots, backend="torch")
    with pytest.raises(ValueError, match=r"k torch.float16"):
        store_kv(k_TKD.half(), k_TKD, kv_2BPKD, slots, backend="torch")
    with pytest.raises(ValueError, match=r"slots torch.int16"):
        store_kv(k_TKD, k_TKD, kv_2BPKD, slots.short(), backend="torch")
    with pytest.raises(ValueError, match="contiguous"):
        store_kv(torch.zeros(5, 2, 32)[..., ::2], k_TKD, kv_2BPKD, slots, backend="torch")
    with pytest.raises(ValueError, match="got 'auto'"):
        store_kv(k_TKD, k_TKD, kv_2BPKD, slots, backend="auto")
    with pytest.raises(ValueError, match=r"tokens \[0, 9\) asked of 2 blocks that hold 8"):
        gather_kv(kv_2BPKD, slots[:2], 9, backend="torch")
    with pytest.raises(ValueError, match="got 'auto'"):
        gather_kv(kv_2BPKD, slots[:2], 8, backend="auto")
    with pytest.raises(ValueError, match="-1 tokens asked"):
        gather_kv(kv_2BPKD, slots[:2], -1, backend="torch")
    out_2SKD = torch.zeros(2, 5, 2, 16)
    with pytest.raises(ValueError, match=r"tokens \[4, 9\) asked"):
        gather_kv_into(out_2SKD, kv_2BPKD, slots[:2], 4, backend="torch")
    with pytest.raises(ValueError, match="doesn't fit kv"):
        gather_kv_into(out_2SKD.half(), kv_2BPKD, slots[:2], 0, backend="torch")
    with pytest.raises(ValueError, match="contiguous"):
        gather_kv_into(torch.zeros(2, 10, 2, 16)[:, ::2], kv_2BPKD, slots[:2], 0, backend="torch")
