"""Parts of kernels that compare embeddings: cosines of rows with a vector, candidates, and sortable keys.

Equal rows must score equal to the last bit wherever they are stored, so that ties are real. Each row is therefore
reduced by itself in a fixed order, with multiplications and sums, never by a matrix product, and kernels that use
`row_cosines` are launched with ``enable_fp_fusion=False``: a compiler that joins a product and a sum into one
operation with one rounding need not choose the same pairs in every row.
"""

from __future__ import annotations

import triton
import triton.language as tl

EMPTY = tl.constexpr(-(2**63))  # key of no candidate, below every other
LARGEST_FRAME = tl.constexpr(2**31 - 1)


@triton.jit
def power_of_two_scale(b_largest):
    """``2**-e`` where ``2**e <= largest < 2**(e + 1)``, so that scaling is exact and squares stay in range."""
    b_exponent = b_largest.to(tl.int32, bitcast=True) >> 23  # biased by 127; 255 for infinity and NaN
    return (tl.maximum(254 - b_exponent, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_vector(vector, s_e, E: tl.constexpr, BE: tl.constexpr, UNIT: tl.constexpr):
    """A vector and its length: scaled by a power of two, or taken to have unit length."""
    o_e = tl.arange(0, BE)
    b_v = tl.load(vector + o_e.to(tl.int64) * s_e, o_e < E, 0).to(tl.float32)  # [BE]
    if UNIT:
        return b_v, 1.0
    b_v = b_v * power_of_two_scale(tl.max(tl.abs(b_v), 0))
    return b_v, tl.sqrt_rn(tl.sum(b_v * b_v, 0))


@triton.jit
def load_scales(scales, o_n, m_n, s_n):
    """Factors of an int8 index's rows; 1 where there are none."""
    if scales is None:
        return tl.full(o_n.shape, 1.0, tl.float32)
    return tl.load(scales + o_n * s_n, m_n, 0).to(tl.float32)  # [BN]


@triton.jit
def row_cosines(
    rows,
    b_scale,
    b_v,
    length,
    o_n,
    m_n,
    s_n,
    s_e,
    E: tl.constexpr,
    BE: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """Cosines ``[BN]`` in float32 of rows with a vector that `load_vector` gave.

    Not finite where the row or the vector is not; 0 where one of them is 0, never -0.
    """
    o_e = tl.arange(0, BE)
    m_x = m_n[:, None] & (o_e < E)[None, :]
    b_raw = tl.load(rows + o_n[:, None] * s_n + o_e.to(tl.int64)[None, :] * s_e, m_x, 0)  # [BN, BE]
    b_x = b_raw.to(tl.float32)
    QUANTISED: tl.constexpr = b_raw.dtype == tl.int8
    # Squares of float16 and int8 stay in range in float32 as they are.
    WIDE: tl.constexpr = (b_raw.dtype == tl.float32) or (b_raw.dtype == tl.bfloat16)
    if QUANTISED or (WIDE and not NORMALIZED):
        b_largest = tl.max(tl.abs(b_x), 1)  # [BN]
    if WIDE and not NORMALIZED:
        b_x = b_x * power_of_two_scale(b_largest)[:, None]
    b_dot = tl.sum(b_x * b_v[None, :], 1)  # [BN]
    b_length = tl.full(b_dot.shape, 1.0, tl.float32) * length
    if not NORMALIZED:
        b_length = tl.sqrt_rn(tl.sum(b_x * b_x, 1)) * length
    b_cosine = tl.div_rn(b_dot, tl.where(b_length == 0, 1.0, b_length))
    if QUANTISED:
        # A factor common to a row changes the length, not the direction, unless it is negative or 0.
        b_factor = b_scale
        if not NORMALIZED:
            b_factor = tl.where(b_scale > 0, 1.0, tl.where(b_scale < 0, -1.0, 0.0))
        m_finite = b_largest * tl.abs(b_scale) < float("inf")
        b_cosine = tl.where(m_finite, b_cosine * b_factor, float("nan"))
    return tl.where(b_cosine == 0, 0.0, b_cosine)


@triton.jit
def may_be_chosen(b_id, m_n, first_frame, end, exclude, s_x, X, BX: tl.constexpr):
    """Which frames lie between the bounds and are not excluded: ``[BN]`` bool."""
    m_n = m_n & (b_id >= first_frame) & (b_id < end)
    if exclude is not None:
        for i_x in range(0, X, BX):
            o_x = i_x + tl.arange(0, BX)
            b_x = tl.load(exclude + o_x.to(tl.int64) * s_x, o_x < X, -1)  # [BX]
            m_n = m_n & (tl.max((b_id[:, None] == b_x[None, :]).to(tl.int32), 1) == 0)
    return m_n


@triton.jit
def sort_key(b_score, b_id):
    """An int64 that orders finite scores, and frames of equal score from the oldest (largest key) to the newest."""
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_ordered = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return (b_ordered.to(tl.int64) << 32) | (LARGEST_FRAME - b_id)


@triton.jit
def key_frame(b_key):
    """The frame of a key, -1 of `EMPTY`."""
    return tl.where(b_key == EMPTY, -1, LARGEST_FRAME - (b_key & LARGEST_FRAME))


@triton.jit
def key_score(b_key):
    """The score of a key, -inf of `EMPTY`."""
    b_ordered = (b_key >> 32).to(tl.int32)
    b_bits = tl.where(b_ordered < 0, b_ordered ^ 0x7FFFFFFF, b_ordered)
    return tl.where(b_key == EMPTY, float("-inf"), b_bits.to(tl.float32, bitcast=True))
