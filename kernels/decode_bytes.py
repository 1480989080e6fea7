"""`kernels.decode_attention` over KV of 8 bits (`kernels.kv_blocks`): the same tables, slots, pieces and merge.

At half the bytes of a number, half as many instructions may be spent on it. On Hopper products take 16 bits, numbers that
become them pass through registers, and what a product sums over must lie side by side in one. Tokens don't: the eight bits of a
value would be loaded one by one. So KV is read as pairs, numbers of 16 bits, of which the even and the odd dims are taken apart
behind the load, in registers (`split_pairs`); queries are taken apart before (unless keys stay whole: below), sums joined
after:

    s_j = q_even . k_even_j + q_odd . k_odd_j        acc_even = sum_j p_j v_even_j        acc_odd = sum_j p_j v_odd_j

Instructions of a processor for a tile of 64 tokens and 128 dims (the compiler, sm_90): KV in 16 bits 1404; in fp8 by four warps
3120 as products in bf16, 2344 in fp16, 1796 as pairs, and 1252 as pairs by two. There is time for 3,300, at 4.4 TB/s.

Numbers become fp16, of fp8 in one instruction for two, also where q is bf16: none is too large or too small for it. A query is
divided by the power of two of its largest number before, and p counted up to 2^15, so that neither leaves its range.

Keys in int8 stay whole numbers where q has 16 bits: what their product sums over lies side by side as it is stored, and tensor
cores take it. A query becomes a whole number of 16 bits for that, the largest of its head 32,512, and that two of 8:

    q = u (256 first + second)        s_j = u scale_j (256 first . k_j + second . k_j), exact but for q's rounding

which leaves 980 instructions a tile of the 1,294 with keys in fp16 (fp8 897; 255 registers, no stack).

Scales of keys are factors of scores. Those of values would be lost in p: sums are counted in units of a scale, in fp8 the last
block's, in int8 the largest of a tile's tokens, and pass from one to the next with their decay, by which they are multiplied in
any case.

Shape suffixes: as there; E the half of D.
"""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.decode_attention import DecodeAttention, DecodeConfig, DecodeTables, soft_capped
from kernels.decode_slots import part_of_row, part_of_run, store_state
from kernels.launch import has_dependent_launch, wait_for_previous
from kernels.segments import AttentionSizes, Scoring

_P_SHIFT = tl.constexpr(15.0)
"""p is counted up to 2^15: fp16 goes from 2^-24 to 2^16."""


@triton.jit  # type: ignore[untyped-decorator]
def split_pairs(pair, dtype: tl.constexpr, WHOLE: tl.constexpr, WITH_ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of pairs of numbers in fp8, or if WHOLE in int8, the first of each, and the second, in another dtype. WITH_ASM: two pairs
    at a time.

    The bits of 128 more than a number of int8 are the last of fp16's 1152 more than it.
    """
    if WITH_ASM and WHOLE:
        first, second = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 raised, thousands, less;
                mov.b32 thousands, 0x64646464;
                mov.b32 less, 0x64806480;
                xor.b32 raised, $2, 0x80808080;
                prmt.b32 $0, raised, thousands, 0x4240;
                prmt.b32 $1, raised, thousands, 0x4341;
                sub.rn.f16x2 $0, $0, less;
                sub.rn.f16x2 $1, $1, less;
            }
            """,
            "=&r,=&r,r",
            [pair],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
        return first.to(dtype), second.to(dtype)
    if WHOLE:
        both = pair.to(tl.int32)
        return ((both << 24) >> 24).to(dtype), (both >> 8).to(dtype)
    if WITH_ASM:
        first, second = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 both;
                .reg .b16 low, high;
                prmt.b32 both, $2, 0, 0x3120;
                mov.b32 {low, high}, both;
                cvt.rn.f16x2.e4m3x2 $0, low;
                cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r",
            [pair],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
        return first.to(dtype), second.to(dtype)
    first = (pair & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    second = ((pair >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return first.to(dtype), second.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def split_query(even, odd, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of queries `[M, E]` by a power of two in another dtype, and that power of each."""
    even = even.to(tl.float32)
    odd = odd.to(tl.float32)
    largest_M = tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1))
    exponent_M = tl.minimum(tl.maximum(largest_M.to(tl.int32, bitcast=True) >> 23, 1), 253)
    unit_M = (exponent_M << 23).to(tl.float32, bitcast=True)
    inverse_M = ((254 - exponent_M) << 23).to(tl.float32, bitcast=True)
    return (even * inverse_M[:, None]).to(dtype), (odd * inverse_M[:, None]).to(dtype), unit_M


@triton.jit
def whole_query(q_MD):  # type: ignore[no-untyped-def]
    """Queries `[M, D]` as whole numbers of 16 bits, 256 first + second, both int8; and what one is of each: NaN if one of them
    is not finite."""
    q_MD = q_MD.to(tl.float32)
    unit_M = tl.maximum(tl.max(tl.abs(q_MD), 1), 1e-30) * (1.0 / 32512)
    whole_MD = tl.floor(q_MD * (1.0 / unit_M)[:, None] + 0.5).to(tl.int32)
    first_MD = (whole_MD + 128) >> 8
    return first_MD.to(tl.int8), (whole_MD - (first_MD << 8)).to(tl.int8), unit_M + 0.0 * tl.sum(q_MD, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_tile(  # type: ignore[no-untyped-def]
    even_ME, odd_ME, top_M, sum_M, unit, q_first, q_second, q_scale_M, token, kv_start, kv_len, block, k_scale, v_scale, head,
    k_src, v_src, scales_ptr, table_ptr, stride_b, stride_p, stride_k, stride_s2, stride_sb, log2_cap, E: tl.constexpr,
    P: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, TOKEN_SCALES: tl.constexpr, WITH_ASM: tl.constexpr,
):  # fmt: skip
    """One step of online softmax, base 2, over tokens [token, token + BLOCK_N), those from kv_len on masked, and if WINDOWED
    those before kv_start; at least one is seen.

    s = q k^T q_scale k_scale    new = max(top, max_n s)                    p = 2^(s - new + 15)
    sum = sum 2^(top - new) + sum_n p                acc = acc 2^(top - new) unit / new_unit + p v v_scale / new_unit

    q_first and q_second are the even and the odd dims of queries; if they are int8, `whole_query`'s, and k_src counts bytes.
    k_scale and v_scale are looked at if the tile lies in one block; with TOKEN_SCALES they are its tokens'. new_unit is the
    largest v_scale of what is seen, where a block has one just that.
    """
    BY_TOKEN: tl.constexpr = TOKEN_SCALES or P % BLOCK_N != 0
    WHOLE_KEYS: tl.constexpr = q_first.dtype == tl.int8
    PER_KEY: tl.constexpr = 2 if WHOLE_KEYS else 1
    P_TYPE: tl.constexpr = tl.float16 if WHOLE_KEYS else q_first.dtype
    offset_N = tl.arange(0, BLOCK_N)
    is_seen_N = token + offset_N < kv_len
    if WINDOWED:
        is_seen_N &= token + offset_N >= kv_start
    if USE_TMA:
        k_NE = k_src.load([block * P + token % P, head * (E * PER_KEY)])
        v_NE = v_src.load([block * P + token % P, head * E])
    else:
        if P % BLOCK_N == 0:  # the tile lies in one block
            at_N = block.to(tl.int64) * stride_b + (token % P + offset_N) * stride_p
        else:
            token_N = token + offset_N
            block_N = tl.load(table_ptr + token_N // P, mask=is_seen_N, other=0).to(tl.int64)
            at_N = block_N * stride_b + (token_N % P) * stride_p
            scale_N_ptr = scales_ptr + block_N * stride_sb
            if TOKEN_SCALES:
                scale_N_ptr += token_N % P
            k_scale = tl.load(scale_N_ptr, mask=is_seen_N, other=0.0).to(tl.float32)
            v_scale = tl.load(scale_N_ptr + stride_s2, mask=is_seen_N, other=0.0).to(tl.float32)
        at_N += head.to(tl.int64) * stride_k
        k_at_NE = (PER_KEY * at_N)[:, None] + tl.arange(0, E * PER_KEY)[None, :]
        v_at_NE = at_N[:, None] + tl.arange(0, E)[None, :]
        if MASKED:
            k_NE = tl.load(k_src + k_at_NE, mask=is_seen_N[:, None], other=0)
            v_NE = tl.load(v_src + v_at_NE, mask=is_seen_N[:, None], other=0)
        else:
            k_NE = tl.load(k_src + k_at_NE)
            v_NE = tl.load(v_src + v_at_NE)
    if MASKED:
        v_NE = tl.where(is_seen_N[:, None], v_NE, 0)  # memory that nobody wrote may hold NaN, and 0 * NaN is NaN
    v_even_NE, v_odd_NE = split_pairs(v_NE, P_TYPE, TOKEN_SCALES, WITH_ASM)
    if WHOLE_KEYS:
        k_DN = tl.trans(k_NE)
        score_MN = tl.dot(q_second, k_DN, tl.dot(q_first, k_DN, out_dtype=tl.int32) << 8, out_dtype=tl.int32).to(tl.float32)
    else:
        k_even_NE, k_odd_NE = split_pairs(k_NE, P_TYPE, TOKEN_SCALES, WITH_ASM)
        score_MN = tl.dot(q_first, tl.trans(k_even_NE), input_precision="ieee")
        score_MN = tl.dot(q_second, tl.trans(k_odd_NE), score_MN, input_precision="ieee")
    if BY_TOKEN:
        score_MN *= k_scale[None, :]
        if MASKED:  # as above
            v_scale = tl.where(is_seen_N, v_scale, 0.0)
        new_unit = tl.max(v_scale, 0)
    else:
        q_scale_M *= k_scale
        new_unit = v_scale
    if CAPPED:
        score_MN = soft_capped(score_MN * q_scale_M[:, None], log2_cap)
        q_scale_M = tl.full(q_scale_M.shape, 1.0, dtype=tl.float32)
    if MASKED:
        score_MN = tl.where(is_seen_N[None, :], score_MN, -float("inf"))
    new_M = tl.maximum(top_M, tl.max(score_MN, 1) * q_scale_M)  # a factor of all scores of a row is its largest's, too
    p_MN = tl.exp2(score_MN * q_scale_M[:, None] - (new_M - _P_SHIFT)[:, None])
    decay_M = tl.exp2(top_M - new_M)
    sum_M = sum_M * decay_M + tl.sum(p_MN, 1)
    if BY_TOKEN:
        p_MN *= (v_scale / new_unit)[None, :]
    decay_M *= unit / new_unit
    p_MN = p_MN.to(P_TYPE)
    even_ME = tl.dot(p_MN, v_even_NE, even_ME * decay_M[:, None], input_precision="ieee")
    odd_ME = tl.dot(p_MN, v_odd_NE, odd_ME * decay_M[:, None], input_precision="ieee")
    return even_ME, odd_ME, new_M, sum_M, new_unit


@triton.jit  # type: ignore[untyped-decorator]
def _scales_of(  # type: ignore[no-untyped-def]
    scales_ptr, block, token, stride_s2, stride_sb, P: tl.constexpr, BLOCK_N: tl.constexpr, TOKEN_SCALES: tl.constexpr
):  # fmt: skip
    """Of the keys and values of a tile that lies in one block: the block's, or each token's. Of another, nothing yet."""
    scale_ptr = scales_ptr + block.to(tl.int64) * stride_sb
    if P % BLOCK_N != 0:
        k_scale, v_scale = 1.0, 1.0
    elif TOKEN_SCALES:
        scale_ptr_N = scale_ptr + token % P + tl.arange(0, BLOCK_N)
        k_scale, v_scale = tl.load(scale_ptr_N).to(tl.float32), tl.load(scale_ptr_N + stride_s2).to(tl.float32)
    else:
        k_scale, v_scale = tl.load(scale_ptr), tl.load(scale_ptr + stride_s2)
    return k_scale, v_scale


@triton.jit  # type: ignore[untyped-decorator]
def _attend_run(  # type: ignore[no-untyped-def]
    even_ME, odd_ME, top_M, sum_M, unit, q_first, q_second, q_scale_M, first_tile, num_tiles, kv_len, head, k_src, v_src,
    scales_ptr, table_ptr, stride_b, stride_p, stride_k, stride_s2, stride_sb, log2_cap, E: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, TOKEN_SCALES: tl.constexpr,
    WITH_ASM: tl.constexpr,
):  # fmt: skip
    """`_attend_tile` over some tiles of one run, of which the last may be cut off by `kv_len`, and the first by its start.

    While a tile is worked on, the scales of the next and the block of the one behind it are on their way: looked up where they
    are needed they would hold up every tile.
    """
    begin = first_tile * BLOCK_N
    kv_start = 0
    if WINDOWED:  # its first tile is the one with the start
        kv_start = tl.load(table_ptr - 1)
        begin += kv_start // BLOCK_N * BLOCK_N
    end = begin + num_tiles * BLOCK_N
    if begin < end:
        last = end - BLOCK_N
        block = tl.load(table_ptr + begin // P)
        next_block = tl.load(table_ptr + tl.minimum(begin + BLOCK_N, last) // P)
        k_scale, v_scale = _scales_of(scales_ptr, block, begin, stride_s2, stride_sb, P, BLOCK_N, TOKEN_SCALES)
        if WINDOWED:  # noqa: SIM102  # the outer is decided when it is compiled
            if begin < kv_start:
                even_ME, odd_ME, top_M, sum_M, unit = _attend_tile(
                    even_ME, odd_ME, top_M, sum_M, unit, q_first, q_second, q_scale_M, begin, kv_start, kv_len, block,
                    k_scale, v_scale, head, k_src, v_src, scales_ptr, table_ptr, stride_b, stride_p, stride_k, stride_s2,
                    stride_sb, log2_cap, E, P, BLOCK_N, USE_TMA, True, WINDOWED, CAPPED, TOKEN_SCALES, WITH_ASM,
                )  # fmt: skip
                begin += BLOCK_N
                block = next_block
                next_block = tl.load(table_ptr + tl.minimum(begin + BLOCK_N, last) // P)
                k_scale, v_scale = _scales_of(scales_ptr, block, begin, stride_s2, stride_sb, P, BLOCK_N, TOKEN_SCALES)
        full_end = tl.maximum(begin, tl.minimum(end, kv_len // BLOCK_N * BLOCK_N))
        for token in tl.range(begin, full_end, BLOCK_N):
            block_behind = tl.load(table_ptr + tl.minimum(token + 2 * BLOCK_N, last) // P)
            next_k_scale, next_v_scale = _scales_of(
                scales_ptr, next_block, tl.minimum(token + BLOCK_N, last), stride_s2, stride_sb, P, BLOCK_N, TOKEN_SCALES
            )
            even_ME, odd_ME, top_M, sum_M, unit = _attend_tile(
                even_ME, odd_ME, top_M, sum_M, unit, q_first, q_second, q_scale_M, token, kv_start, kv_len, block, k_scale,
                v_scale, head, k_src, v_src, scales_ptr, table_ptr, stride_b, stride_p, stride_k, stride_s2, stride_sb,
                log2_cap, E, P, BLOCK_N, USE_TMA, False, WINDOWED, CAPPED, TOKEN_SCALES, WITH_ASM,
            )  # fmt: skip
            block = next_block
            next_block = block_behind
            k_scale = next_k_scale
            v_scale = next_v_scale
        if full_end < end:
            even_ME, odd_ME, top_M, sum_M, unit = _attend_tile(
                even_ME, odd_ME, top_M, sum_M, unit, q_first, q_second, q_scale_M, full_end, kv_start, kv_len, block, k_scale,
                v_scale, head, k_src, v_src, scales_ptr, table_ptr, stride_b, stride_p, stride_k, stride_s2, stride_sb,
                log2_cap, E, P, BLOCK_N, USE_TMA, True, WINDOWED, CAPPED, TOKEN_SCALES, WITH_ASM,
            )  # fmt: skip
    return even_ME, odd_ME, top_M, sum_M, unit


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _bytes_decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_src, v_src, scales_ptr, out_ptr, lse_ptr, piece_out_ptr, piece_lse_ptr, rows_ptr, blocks_ptr, num_rows,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_lt, stride_lh, stride_b, stride_p, stride_k, stride_s2, stride_sb,
    stride_sk, log2_scale, log2_cap, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr, DEPENDENT: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    TOKEN_SCALES: tl.constexpr, WITH_ASM: tl.constexpr,
):  # fmt: skip
    """The states of a slot's tiles and one KV head, as `kernels.decode_attention._decode_kernel` makes them.

    v_src, stride_b, stride_p and stride_k count pairs, as does k_src unless keys stay whole numbers.
    """
    E: tl.constexpr = D // 2
    program = tl.program_id(0)
    head = program % K
    slot = program // K
    tile_count = tl.load(rows_ptr + 3 * (num_rows + 1) + num_rows).to(tl.int64)
    slots = tl.minimum(tl.num_programs(0) // K, tile_count)
    if slot >= slots:
        wait_for_previous(DEPENDENT)
        return
    tile = slot * tile_count // slots
    last = (slot + 1) * tile_count // slots
    m_M = tl.arange(0, BLOCK_M)
    dim_E = 2 * tl.arange(0, E)
    scales_ptr += head * stride_sk
    wait_for_previous(DEPENDENT)
    while tile < last:
        row, kv_len, begin, tiles, first_tile, num_tiles = part_of_row(rows_ptr, num_rows, tile, last)
        table_ptr = blocks_ptr + begin
        head_M = head * G + m_M
        q_ptr_M1 = q_ptr + (row * stride_qt + head_M * stride_qh)[:, None]
        if TOKEN_SCALES and q_ptr.dtype.element_ty != tl.float32:
            q_MD = tl.load(q_ptr_M1 + tl.arange(0, D)[None, :], mask=(m_M < G)[:, None], other=0.0)
            q_first, q_second, q_scale_M = whole_query(q_MD)
        else:
            q_even_ME = tl.load(q_ptr_M1 + dim_E[None, :], mask=(m_M < G)[:, None], other=0.0)
            q_odd_ME = tl.load(q_ptr_M1 + (dim_E + 1)[None, :], mask=(m_M < G)[:, None], other=0.0)
            q_first, q_second, q_scale_M = split_query(
                q_even_ME, q_odd_ME, tl.float32 if q_ptr.dtype.element_ty == tl.float32 else tl.float16
            )
        q_scale_M *= log2_scale

        even_ME = tl.zeros((BLOCK_M, E), dtype=tl.float32)
        odd_ME = tl.zeros((BLOCK_M, E), dtype=tl.float32)
        top_M = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
        sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
        unit = 1.0
        if kv_len >= 0:
            even_ME, odd_ME, top_M, sum_M, unit = _attend_run(
                even_ME, odd_ME, top_M, sum_M, unit, q_first, q_second, q_scale_M, first_tile, num_tiles, kv_len, head, k_src,
                v_src, scales_ptr, table_ptr, stride_b, stride_p, stride_k, stride_s2, stride_sb, log2_cap,
                E, P, BLOCK_N, USE_TMA, WINDOWED, CAPPED, TOKEN_SCALES, WITH_ASM,
            )  # fmt: skip
        else:
            skipped = first_tile  # of the run's tiles and those after it: not this slot's
            left = num_tiles
            for run in range(-kv_len):
                run_len, run_ptr, first, taken = part_of_run(table_ptr, blocks_ptr, run, skipped, left, BLOCK_N, WINDOWED)
                skipped -= first
                left -= taken
                even_ME, odd_ME, top_M, sum_M, unit = _attend_run(
                    even_ME, odd_ME, top_M, sum_M, unit, q_first, q_second, q_scale_M, first, taken, run_len, head, k_src,
                    v_src, scales_ptr, run_ptr, stride_b, stride_p, stride_k, stride_s2, stride_sb, log2_cap,
                    E, P, BLOCK_N, USE_TMA, WINDOWED, CAPPED, TOKEN_SCALES, WITH_ASM,
                )  # fmt: skip

        result_MD = tl.interleave(even_ME, odd_ME) * (unit / sum_M)[:, None]
        lse_M = (top_M + (tl.log2(sum_M) - _P_SHIFT)) * 0.6931471805599453  # ln 2
        store_state(
            result_MD, lse_M, row, head, num_tiles == tiles, first_tile == 0, out_ptr, lse_ptr, piece_out_ptr, piece_lse_ptr,
            stride_ot, stride_oh, stride_lt, stride_lh, program, G, D, BLOCK_M,
        )  # fmt: skip
        tile += num_tiles


class BytesDecode(DecodeAttention):
    """`DecodeAttention` over KV of 8 bits: the same tables, slots and merge."""

    def __init__(self, sizes: AttentionSizes, config: DecodeConfig | None = None, processors: int | None = None) -> None:
        """As there."""
        super().__init__(sizes, config or _default_config(sizes), processors)

    def _launch(
        self,
        q_THD: torch.Tensor,
        kv_2BPKD: torch.Tensor,
        scales_2BKX: torch.Tensor | None,
        scoring: Scoring,
        tables: DecodeTables,
        out_THD: torch.Tensor,
        lse_TH: torch.Tensor,
    ) -> None:
        if scales_2BKX is None:
            raise ValueError("KV of 8 bits came without its scales")
        sizes, config = self.sizes, self.config
        pairs_2BPKE = kv_2BPKD.view(torch.int16)
        dependent = has_dependent_launch(sizes.device)
        whole_keys = sizes.has_token_scales and sizes.dtype != torch.float32
        k_src, v_src = kv_2BPKD[0] if whole_keys else pairs_2BPKE[0], pairs_2BPKE[1]
        if config.use_tma:
            k_src, v_src = (
                TensorDescriptor.from_tensor(x_BPKN.flatten(0, 1).flatten(1), [config.block_n, x_BPKN.shape[-1]])
                for x_BPKN in (k_src, v_src)
            )
        _bytes_decode_kernel[(self._slots * sizes.num_kv_heads,)](
            q_THD, k_src, v_src, scales_2BKX, out_THD, lse_TH, self._pieces.out_XD, self._pieces.lse_X, tables.rows_4R1,
            tables.blocks_N, tables.rows_4R1.numel() // 4 - 1,
            *q_THD.stride()[:2], *out_THD.stride()[:2], *lse_TH.stride(), *pairs_2BPKE.stride()[1:4], *scales_2BKX.stride()[:3],
            scoring.scale * math.log2(math.e), scoring.soft_cap * math.log2(math.e),
            K=sizes.num_kv_heads, G=sizes.group, D=sizes.head_dim, P=sizes.block_size, BLOCK_M=self._block_m,
            BLOCK_N=config.block_n, USE_TMA=config.use_tma, DEPENDENT=dependent, WINDOWED=tables.windowed,
            CAPPED=scoring.soft_cap > 0, TOKEN_SCALES=sizes.has_token_scales, WITH_ASM=sizes.device.type == "cuda",
            num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=dependent, maxnreg=config.max_registers,
        )  # fmt: skip


def _default_config(sizes: AttentionSizes) -> DecodeConfig:
    """Eight programs of one warp a processor, for as many bytes on their way as in 16 bits.

    One H200, 32/8 heads x 128, 8 x 128K and 64 x 8K, GB/s: int8 3913 and 3744, fp8 4150 and 3958. Of fp8, when it took
    4128 and 3948: seven programs 3967 and 3787, nine 2732 and 2606; tiles of 32 and twelve programs 3793 and 3612; two warps
    and six programs 3735 and 3578, four warps and four 3087. Without TMA 3685 and less.
    """
    if sizes.dtype == torch.float32:  # IEEE products run outside the tensor cores
        return DecodeConfig(block_n=32, num_warps=4, num_stages=2, programs_per_processor=2, use_tma=False)
    return DecodeConfig(
        block_n=64,
        num_warps=1,
        num_stages=2,
        programs_per_processor=8 if sizes.head_dim <= 128 else 2,
        use_tma=sizes.block_size % 64 == 0,
    )


MOST_PROGRAMS = DecodeConfig(block_n=64, num_warps=1, num_stages=2, programs_per_processor=8, use_tma=False)
