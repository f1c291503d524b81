"""Parts of `window_attend`'s kernel: one tile of keys, a stretch of tiles, and the query turned for a moved page."""

from __future__ import annotations

import triton
import triton.language as tl

# Quantised values are scaled on the probabilities' side, where half precision would lose a small scale times a small
# probability: half of int8's range keeps the products about the size of dequantised values, and never makes one
# infinite whose page float16 could hold.
SCALE_UP = tl.constexpr(64.0)


@triton.jit
def load_rows(
    source, o_tile, i_b, i_p, i_h, row, rows, slot_stride, row_stride,
    D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows ``row ..`` of page ``i_p``: [BLOCK_N, BLOCK_D]. With ``MASKED``, rows from ``rows`` on are zero.

    A descriptor reads zeros past the page's end (and past the head's channels); the caller sees to it that this is
    the end that counts.
    """
    if TMA:
        b_x = source.load([i_b, i_p, i_h, row, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        p_x = source + tl.cast(i_p, tl.int64) * slot_stride + tl.cast(row, tl.int64) * row_stride + o_tile
        m_d = (tl.arange(0, BLOCK_D) < D)[None, :]
        if MASKED:
            b_x = tl.load(p_x, mask=(row + tl.arange(0, BLOCK_N) < rows)[:, None] & m_d, other=0)
        elif D == BLOCK_D:
            b_x = tl.load(p_x)
        else:
            b_x = tl.load(p_x, mask=m_d, other=0)
    return b_x


@triton.jit
def attend_tile(
    b_q, b_o, b_m, b_l, kv, i_p, row, rows,
    D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, CUT: tl.constexpr, QUANTISED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys ``row .. row + BLOCK_N - 1`` of page ``i_p``.

    ``MASKED``: keys from ``rows`` on do not count. ``CUT``: what the values hold there may be anything, NaN included,
    and has not been zeroed by loading.
    """
    key, value, k_scale, v_scale, o_tile, i_b, i_h, scale, p_ss, p_st, ks_ss, ks_st, vs_ss, vs_st = kv
    m_n = row + tl.arange(0, BLOCK_N) < rows  # [BLOCK_N]
    b_k = load_rows(key, o_tile, i_b, i_p, i_h, row, rows, p_ss, p_st, D, TMA, MASKED, BLOCK_N, BLOCK_D)
    b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if QUANTISED:
        o_n = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        b_ks = tl.load(k_scale + tl.cast(i_p, tl.int64) * ks_ss + o_n * ks_st, mask=m_n, other=0.0)
        b_vs = tl.load(v_scale + tl.cast(i_p, tl.int64) * vs_ss + o_n * vs_st, mask=m_n, other=0.0)
        b_s = b_s * (b_ks.to(tl.float32) * scale)[None, :]
        if MASKED:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_finite = tl.where(b_new == float("-inf"), 0.0, b_new)  # no key counted so far: exp2(-inf - 0) = 0
        b_p = tl.exp2(b_s - b_finite[:, None])  # [BLOCK_M, BLOCK_N]
    else:
        if MASKED:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
        b_finite = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s * scale - b_finite[:, None])
    b_alpha = tl.exp2(b_m - b_finite)  # [BLOCK_M]
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_v = load_rows(value, o_tile, i_b, i_p, i_h, row, rows, p_ss, p_st, D, TMA, MASKED, BLOCK_N, BLOCK_D)
    if CUT:
        b_v = tl.where(m_n[:, None], b_v, 0.0)  # 0 * NaN is NaN
    if QUANTISED:
        b_p = b_p * (b_vs.to(tl.float32) * SCALE_UP)[None, :]
    b_o = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_o * b_alpha[:, None], input_precision="ieee")
    return b_o, b_new, b_l


@triton.jit
def attend_stretch(
    b_q, b_o, b_m, b_l, kv, i_p, first, last, rows,
    D: tl.constexpr, TMA: tl.constexpr, CUT: tl.constexpr, QUANTISED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tiles ``first .. last - 1`` of a page of ``rows`` tokens: no mask but in the tile that the page ends in."""
    whole = rows // BLOCK_N
    for i_t in range(first, tl.minimum(last, whole)):
        b_o, b_m, b_l = attend_tile(
            b_q, b_o, b_m, b_l, kv, i_p, i_t * BLOCK_N, rows, D, TMA, False, False, QUANTISED, BLOCK_N, BLOCK_D
        )
    for i_t in tl.range(tl.maximum(first, whole), last, num_stages=1):  # one tile or none
        b_o, b_m, b_l = attend_tile(
            b_q, b_o, b_m, b_l, kv, i_p, i_t * BLOCK_N, rows, D, TMA, True, CUT, QUANTISED, BLOCK_N, BLOCK_D
        )
    return b_o, b_m, b_l


@triton.jit
def turned_query(
    q, m_q, q_sd, rope, shift, rope_sp, rope_sd, rope_sc,
    SIGN: tl.constexpr, TIME: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries turned back in time by ``shift``: [BLOCK_M, BLOCK_D].

    ``R(t_q) q . R(t_k + shift) k = R(t_q - shift) q . R(t_k) k``: a page of keys that moves by ``shift`` is as good as
    queries that move the other way, and they are fewer. Channels come in pairs (2i, 2i + 1); those from ``TIME`` on
    belong to height and width and stay.
    """
    o_d = tl.arange(0, BLOCK_D)
    o_pair = tl.arange(0, BLOCK_D // 2)
    b_q = tl.load(q + o_d.to(tl.int64)[None, :] * q_sd, mask=m_q, other=0.0)
    b_even, b_odd = tl.split(b_q.reshape(b_q.shape[0], BLOCK_D // 2, 2))  # [BLOCK_M, BLOCK_D // 2]
    p_rope = rope + tl.abs(shift).to(tl.int64) * rope_sp + o_pair.to(tl.int64) * rope_sd
    b_cos = tl.load(p_rope, mask=o_pair < TIME // 2, other=1.0).to(tl.float32)[None, :]  # [1, BLOCK_D // 2]
    b_sin = tl.load(p_rope + rope_sc, mask=o_pair < TIME // 2, other=0.0).to(tl.float32)[None, :]
    b_cos, b_sin = b_cos * SIGN, tl.where(shift >= 0, b_sin, -b_sin) * SIGN
    b_first = (b_even * b_cos + b_odd * b_sin).to(b_q.dtype)
    b_second = (b_odd * b_cos - b_even * b_sin).to(b_q.dtype)
    return tl.join(b_first, b_second).reshape(b_q.shape[0], BLOCK_D)
