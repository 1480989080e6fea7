"""Writing new KV into blocks, and reading blocks into contiguous memory.

    store:  kv[0, slot // P, slot % P] = k[t]      kv[1, ...] = v[t]      slot = slots[t]; nothing where slot is -1
            (latent KV has one part, keys alone)
    gather: k[j - first] = kv[0, ids[j // P], j % P]       v[j - first] = kv[1, ...]      j in [first, first + num_tokens)

Shape suffixes: T rows, S tokens, N blocks of a table, K KV heads, D head dim, B blocks, P block size.
"""

from collections.abc import Sequence

import torch


def store_kv(
    k_TKD: torch.Tensor, v_TKD: torch.Tensor | None, kv_2BPKD: torch.Tensor, slots_T: torch.Tensor, *, backend: str
) -> None:
    """Write row t's key and value to slot `slots_T[t]` = block * block_size + offset (int64); -1 writes nothing (padding).

    `v_TKD` None: into latent KV, which has no values.

    The slots but -1 are distinct and lie in the blocks of `kv`: they are not checked. Backend "torch" or "triton".

    Raises:
        ValueError: shapes or dtypes that don't fit, a last dimension that isn't contiguous, or an unknown backend.
    """
    news = [k_TKD] if v_TKD is None else [k_TKD, v_TKD]
    if any(new.shape != (*slots_T.shape, *kv_2BPKD.shape[3:]) for new in news) or len(news) != kv_2BPKD.shape[0]:
        shapes = ", v ".join(str(tuple(new.shape)) for new in news)
        raise ValueError(f"k {shapes}, kv {tuple(kv_2BPKD.shape)}, slots {tuple(slots_T.shape)} don't fit together")
    if any(new.dtype != kv_2BPKD.dtype for new in news) or slots_T.dtype not in (torch.int32, torch.int64):
        dtypes = ", v ".join(str(new.dtype) for new in news)
        raise ValueError(f"k {dtypes}, kv {kv_2BPKD.dtype}, slots {slots_T.dtype}: int32 or int64, and one dtype")
    if any(x.stride(-1) != 1 for x in (*news, kv_2BPKD)):
        raise ValueError("the last dimension of k, v and kv must be contiguous")
    if not slots_T.numel():
        return
    match backend:
        case "torch":
            _store_kv_torch(news, kv_2BPKD, slots_T)
        case "triton":
            from kernels import triton_ops

            triton_ops.store_kv(k_TKD, v_TKD, kv_2BPKD, slots_T)
        case _:
            raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def gather_kv(
    kv_2BPKD: torch.Tensor, block_ids_N: torch.Tensor, num_tokens: int, *, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `num_tokens` tokens of the listed blocks (int32 or int64): new contiguous `k_SKD`, `v_SKD`.

    Raises:
        ValueError: fewer than no tokens or more than the blocks hold, a last dimension that isn't contiguous, or an unknown
            backend.
    """
    if num_tokens < 0:
        raise ValueError(f"{num_tokens} tokens asked")
    out_2SKD = kv_2BPKD.new_empty((2, num_tokens, *kv_2BPKD.shape[3:]))
    gather_kv_into(out_2SKD, kv_2BPKD, block_ids_N, 0, backend=backend)
    return out_2SKD[0], out_2SKD[1]


def gather_kv_into(
    out_2SKD: torch.Tensor, kv_2BPKD: torch.Tensor, block_ids_N: torch.Tensor, first_token: int, *, backend: str
) -> None:
    """Fill `out` with the tokens `[first_token, first_token + S)` of the listed blocks (int32 or int64). No host work.

    Keys and values of `out` must each be contiguous; between them there may be room, so the start of a larger buffer will do.
    The block ids are not checked.

    Raises:
        ValueError: more tokens than the blocks hold, other shapes, dtypes or strides than stated, or an unknown backend.
    """
    num_tokens, capacity = out_2SKD.shape[1], block_ids_N.numel() * kv_2BPKD.shape[2]
    if not 0 <= first_token <= first_token + num_tokens <= capacity:
        raise ValueError(
            f"tokens [{first_token}, {first_token + num_tokens}) asked of {block_ids_N.numel()} blocks that hold {capacity}"
        )
    if out_2SKD.shape[0] != 2 or out_2SKD.shape[2:] != kv_2BPKD.shape[3:] or out_2SKD.dtype != kv_2BPKD.dtype:
        raise ValueError(
            f"out {tuple(out_2SKD.shape)} {out_2SKD.dtype} doesn't fit kv {tuple(kv_2BPKD.shape)} {kv_2BPKD.dtype}"
        )
    if kv_2BPKD.stride(-1) != 1 or not out_2SKD[0].is_contiguous():
        raise ValueError("the last dimension of kv, and keys and values of out, must be contiguous")
    if not num_tokens:
        return
    match backend:
        case "torch":
            _gather_kv_torch(out_2SKD, kv_2BPKD, block_ids_N, first_token)
        case "triton":
            from kernels import triton_ops

            triton_ops.gather_kv(out_2SKD, kv_2BPKD, block_ids_N, first_token)
        case _:
            raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def _store_kv_torch(news: Sequence[torch.Tensor], kv_2BPKD: torch.Tensor, slots_T: torch.Tensor) -> None:
    """Waits for the device where there is one: the number of written rows decides a shape."""
    _, num_blocks, block_size, num_kv_heads, head_dim = kv_2BPKD.shape
    rows_N = (slots_T >= 0).nonzero().squeeze(1)
    slots_N = slots_T[rows_N].long()
    for new_TKD, blocks_BPKD in zip(news, kv_2BPKD, strict=True):
        # a view or an error: `reshape` might copy, and the write would be lost
        flat_SKD = blocks_BPKD.view(num_blocks * block_size, num_kv_heads, head_dim)
        flat_SKD.index_copy_(0, slots_N, new_TKD[rows_N])


def _gather_kv_torch(out_2SKD: torch.Tensor, kv_2BPKD: torch.Tensor, block_ids_N: torch.Tensor, first_token: int) -> None:
    num_tokens, block_size = out_2SKD.shape[1], kv_2BPKD.shape[2]
    first_block, skip = divmod(first_token, block_size)
    ids_N = block_ids_N[first_block : -(-(first_token + num_tokens) // block_size)]
    out_2SKD.copy_(kv_2BPKD.index_select(1, ids_N).flatten(1, 2)[:, skip : skip + num_tokens])
