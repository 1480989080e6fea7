"""Writing new KV into blocks, and reading blocks into contiguous memory.

    store:  kv[0, slot // P, slot % P] = k[t]      kv[1, ...] = v[t]      slot = slots[t]; nothing where slot is -1
            (latent KV has one part, keys alone)
    gather: k[j - first] = kv[0, ids[j // P], j % P]       v[j - first] = kv[1, ...]      j in [first, first + num_tokens)

KV of 8 bits has scales, keys and values theirs. In int8 there is one for each token and KV head (X = P), in fp16:

    store:  kv[0, b, i] = round(k[t] / scales[0, b, i])    scales[0, b, i] = fp16(a / 127), a the largest |k[t]|
    gather: k[j - first] = kv[0, b, i] scales[0, b, i]

That scale lies between 2^-14 and 65504, where fp16 has all its bits (a token of numbers below 0.008 has fewer steps, what is
larger is cut off), and NaN is in it: int8 has none. It is 1 where all are zero.

In fp8 (e4m3: three bits of mantissa over 2^-9 .. 448) there is one for each block and KV head (X = 1), in fp32:

    store:  kv[0, b, i] = fp8(k[t] / scales[0, b]), at most 448 in size        gather: k[j - first] = kv[0, b, i] scales[0, b]
    open:   scales[0, b] = 2^(floor(log2 a) - 1)    a = the largest |k[t]| of all rows of the call that go to block b

A block is *opened* by the call that writes its offset 0: blocks are filled from there on (`kvstore.run`). Scales are powers of
two, so a number is stored alike whatever opened its block, unless it leaves the range: then the split of a prompt into steps
and over instances hardly shows. What opens a block lies in [2, 4): later tokens may be 112 times as large before they are cut
off, and of what is 128 times as small all three bits are kept. (SmolLM2-135M on text: values up to 30 times the token's at
offset 0, keys up to 11 times.)

Shape suffixes: T rows, S tokens, N blocks of a table, K KV heads, D head dim, B blocks, P block size, X scales of a block and
head.
"""

from collections.abc import Sequence

import torch

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0
"""The largest number of `FP8`."""

SCALE_SHIFT = 1
"""What opens a block has this exponent in it."""
LEAST_EXPONENT = -8
"""Of a scale in fp8, so that a block that almost nothing opens isn't lost to what follows: 1.75 is stored whole, and 1e-4."""

INT8_MOST = 127.0
"""The largest size of a number of KV in int8, ..."""
LEAST_SCALE, MOST_SCALE = 2.0**-14, 65504.0
"""... and what its scales lie between: the smallest number of fp16 that has all its bits, and the largest."""

SCALE_TYPES = {FP8: torch.float32, torch.int8: torch.float16}
"""Of KV that has scales, by the type of its numbers."""


def has_token_scales(dtype: torch.dtype | None) -> bool:
    """Whether each token of KV so stored has scales of its own."""
    return dtype == torch.int8


def scales_of_block(dtype: torch.dtype, block_size: int) -> int:
    """How many scales a block has for each head, keys or values: X; 0 of numbers without."""
    return 0 if dtype not in SCALE_TYPES else block_size if has_token_scales(dtype) else 1


def store_kv(
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor | None,
    kv_2BPKD: torch.Tensor,
    slots_T: torch.Tensor,
    *,
    scales_2BKX: torch.Tensor | None = None,
    backend: str,
) -> None:
    """Write row t's key and value to slot `slots_T[t]` = block * block_size + offset (int64); -1 writes nothing (padding).

    `v_TKD` None: into latent KV, which has no values. `scales_2BKX`: of KV of 8 bits; those of what is stored are
    written, or in fp8 those of blocks that are opened.

    The slots but -1 are distinct and lie in the blocks of `kv`: they are not checked. Backend "torch" or "triton".

    Raises:
        ValueError: shapes or dtypes that don't fit, a last dimension that isn't contiguous, or an unknown backend.
    """
    news = [k_TKD] if v_TKD is None else [k_TKD, v_TKD]
    check_scales(kv_2BPKD, scales_2BKX)
    if any(new.shape != (*slots_T.shape, *kv_2BPKD.shape[3:]) for new in news) or len(news) != kv_2BPKD.shape[0]:
        shapes = ", v ".join(str(tuple(new.shape)) for new in news)
        raise ValueError(f"k {shapes}, kv {tuple(kv_2BPKD.shape)}, slots {tuple(slots_T.shape)} don't fit together")
    stored = kv_2BPKD.dtype if scales_2BKX is None else k_TKD.dtype
    if any(new.dtype != stored for new in news) or slots_T.dtype not in (torch.int32, torch.int64):
        dtypes = ", v ".join(str(new.dtype) for new in news)
        raise ValueError(f"k {dtypes}, kv {kv_2BPKD.dtype}, slots {slots_T.dtype}: int32 or int64, and one dtype")
    if any(x.stride(-1) != 1 for x in (*news, kv_2BPKD)):
        raise ValueError("the last dimension of k, v and kv must be contiguous")
    if not slots_T.numel():
        return
    match backend:
        case "torch":
            _store_kv_torch(news, kv_2BPKD, slots_T, scales_2BKX)
        case "triton" if scales_2BKX is not None:
            from kernels import kv_bytes_triton

            kv_bytes_triton.store_kv(k_TKD, v_TKD, kv_2BPKD, scales_2BKX, slots_T)
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
    out_2SKD: torch.Tensor,
    kv_2BPKD: torch.Tensor,
    block_ids_N: torch.Tensor,
    first_token: int,
    *,
    scales_2BKX: torch.Tensor | None = None,
    backend: str,
) -> None:
    """Fill `out` with the tokens `[first_token, first_token + S)` of the listed blocks (int32 or int64). No host work.

    `scales_2BKX`: of KV of 8 bits, which comes out as the numbers that it stands for, in the dtype of `out`. Keys and
    values of `out` must each be contiguous; between them there may be room, so the start of a larger buffer will do. The block
    ids are not checked.

    Raises:
        ValueError: more tokens than the blocks hold, other shapes, dtypes or strides than stated, or an unknown backend.
    """
    num_tokens, capacity = out_2SKD.shape[1], block_ids_N.numel() * kv_2BPKD.shape[2]
    if not 0 <= first_token <= first_token + num_tokens <= capacity:
        raise ValueError(
            f"tokens [{first_token}, {first_token + num_tokens}) asked of {block_ids_N.numel()} blocks that hold {capacity}"
        )
    check_scales(kv_2BPKD, scales_2BKX)
    fits = scales_2BKX is not None or out_2SKD.dtype == kv_2BPKD.dtype
    if out_2SKD.shape[0] != 2 or out_2SKD.shape[2:] != kv_2BPKD.shape[3:] or not fits:
        raise ValueError(
            f"out {tuple(out_2SKD.shape)} {out_2SKD.dtype} doesn't fit kv {tuple(kv_2BPKD.shape)} {kv_2BPKD.dtype}"
        )
    if kv_2BPKD.stride(-1) != 1 or not out_2SKD[0].is_contiguous():
        raise ValueError("the last dimension of kv, and keys and values of out, must be contiguous")
    if not num_tokens:
        return
    match backend:
        case "torch":
            _gather_kv_torch(out_2SKD, kv_2BPKD, block_ids_N, first_token, scales_2BKX)
        case "triton":
            from kernels import triton_ops

            triton_ops.gather_kv(out_2SKD, kv_2BPKD, block_ids_N, first_token, scales_2BKX)
        case _:
            raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")


def check_scales(kv_2BPKD: torch.Tensor, scales_2BKX: torch.Tensor | None) -> None:
    """Raises ValueError unless KV of 8 bits has its scales, and other KV none."""
    dtype = SCALE_TYPES.get(kv_2BPKD.dtype)
    if (dtype is not None) != (scales_2BKX is not None):
        raise ValueError(
            f"kv {kv_2BPKD.dtype} {'with' if scales_2BKX is not None else 'without'} scales: they are of "
            f"{' and '.join(map(str, SCALE_TYPES))}"
        )
    if scales_2BKX is None:
        return
    parts, num_blocks, block_size, num_kv_heads, _ = kv_2BPKD.shape
    wanted = (parts, num_blocks, num_kv_heads, scales_of_block(kv_2BPKD.dtype, block_size))
    if scales_2BKX.shape != wanted or scales_2BKX.dtype != dtype or not scales_2BKX[0].is_contiguous():
        raise ValueError(
            f"scales must be {wanted} {dtype}, each part contiguous, got {tuple(scales_2BKX.shape)} {scales_2BKX.dtype} with "
            f"strides {scales_2BKX.stride()}"
        )


def opening_scale(largest: torch.Tensor) -> torch.Tensor:
    """The scales (fp32) of blocks that are opened by numbers whose largest sizes (fp32) these are, infinities and NaN left out.

    1 where they are all zero: nothing is known of what follows.
    """
    exponent = (largest.view(torch.int32) >> 23) - 127 - SCALE_SHIFT  # of subnormal numbers too little, which is raised
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(min=LEAST_EXPONENT))
    return torch.where(largest == 0, 1.0, scale)


def dequantised(kv: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that blocks `[parts, N, P, K, D]` of 8 bits stand for, by their scales `[parts, N, K, X]`, rounded once."""
    of_tokens = scales.transpose(2, 3).unsqueeze(-1)
    if has_token_scales(kv.dtype):
        return kv.float().mul_(of_tokens.float()).to(dtype)
    return kv.to(dtype).mul_(of_tokens.to(dtype))  # powers of two


def token_scales(largest: torch.Tensor) -> torch.Tensor:
    """The scales (fp16) of tokens in int8 whose largest sizes (fp32) these are."""
    # by a tensor: a GPU divides by a number by multiplying with its reciprocal, which rounds otherwise
    scale = (largest / torch.full_like(largest, INT8_MOST)).clamp(LEAST_SCALE, MOST_SCALE).half()
    return torch.where(largest == 0, 1.0, scale)


def _store_kv_torch(
    news: Sequence[torch.Tensor], kv_2BPKD: torch.Tensor, slots_T: torch.Tensor, scales_2BKX: torch.Tensor | None
) -> None:
    """Waits for the device where there is one: the number of written rows decides a shape."""
    _, num_blocks, block_size, num_kv_heads, head_dim = kv_2BPKD.shape
    rows_N = (slots_T >= 0).nonzero().squeeze(1)
    slots_N = slots_T[rows_N].long()
    for part, (new_TKD, blocks_BPKD) in enumerate(zip(news, kv_2BPKD, strict=True)):
        new_NKD = new_TKD[rows_N]
        if scales_2BKX is not None:
            quantised = _in_int8 if has_token_scales(blocks_BPKD.dtype) else _in_fp8
            new_NKD = quantised(new_NKD, scales_2BKX[part], slots_N, block_size).view(torch.uint8)
            blocks_BPKD = blocks_BPKD.view(torch.uint8)  # torch copies no numbers in fp8 by an index
        # a view or an error: `reshape` might copy, and the write would be lost
        flat_SKD = blocks_BPKD.view(num_blocks * block_size, num_kv_heads, head_dim)
        flat_SKD.index_copy_(0, slots_N, new_NKD)


def _in_int8(new_NKD: torch.Tensor, scales_BKX: torch.Tensor, slots_N: torch.Tensor, block_size: int) -> torch.Tensor:
    """Numbers as they are stored at these slots, once their scales are written, in which NaN is: int8 has none."""
    full_NKD = new_NKD.float()
    scale_NK = token_scales(full_NKD.abs().amax(2))
    scales_BKX[slots_N // block_size, :, slots_N % block_size] = scale_NK
    scaled_NKD = full_NKD / scale_NK.float()[:, :, None]
    return scaled_NKD.nan_to_num(0.0, INT8_MOST, -INT8_MOST).round().clamp(-INT8_MOST, INT8_MOST).to(torch.int8)


def _in_fp8(new_NKD: torch.Tensor, scales_BKX: torch.Tensor, slots_N: torch.Tensor, block_size: int) -> torch.Tensor:
    """Numbers as they are stored at these slots, once the scales of the blocks that they open are written."""
    scales_BK = scales_BKX[:, :, 0]
    full_NKD = new_NKD.float()
    offsets_N = slots_N % block_size
    blocks_U, block_N = torch.unique(slots_N // block_size, return_inverse=True)
    if bool((offsets_N == 0).any()):
        size_NK = full_NKD.abs().masked_fill(~full_NKD.isfinite(), 0.0).amax(2)
        largest_UK = torch.zeros((len(blocks_U), size_NK.shape[1]), device=size_NK.device)
        largest_UK.scatter_reduce_(0, block_N[:, None].expand_as(size_NK), size_NK, "amax")
        opened_M = block_N[offsets_N == 0]
        scales_BK[blocks_U[opened_M]] = opening_scale(largest_UK[opened_M])
    scaled_NKD = full_NKD / scales_BK[blocks_U][block_N][:, :, None]
    return scaled_NKD.clamp(-FP8_MOST, FP8_MOST).to(FP8)


def _gather_kv_torch(
    out_2SKD: torch.Tensor,
    kv_2BPKD: torch.Tensor,
    block_ids_N: torch.Tensor,
    first_token: int,
    scales_2BKX: torch.Tensor | None,
) -> None:
    num_tokens, block_size = out_2SKD.shape[1], kv_2BPKD.shape[2]
    first_block, skip = divmod(first_token, block_size)
    ids_N = block_ids_N[first_block : -(-(first_token + num_tokens) // block_size)]
    blocks_2NPKD = kv_2BPKD.index_select(1, ids_N)
    if scales_2BKX is not None:
        blocks_2NPKD = dequantised(blocks_2NPKD, scales_2BKX.index_select(1, ids_N), out_2SKD.dtype)
    out_2SKD.copy_(blocks_2NPKD.flatten(1, 2)[:, skip : skip + num_tokens])
