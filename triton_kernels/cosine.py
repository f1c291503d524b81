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
def load_piece(rows, vector, i_e, o_n, m_n, s_n, s_e, s_v, E: tl.constexpr, BE: tl.constexpr):
    """Entries ``i_e .. i_e + BE`` of rows ``[BN, BE]`` and of a vector ``[BE]`` in float32, 0 past the last."""
    o_e = i_e + tl.arange(0, BE)
    m_e = o_e < E
    o_e = o_e.to(tl.int64)
    b_x = tl.load(rows + o_n[:, None] * s_n + o_e[None, :] * s_e, m_n[:, None] & m_e[None, :], 0)  # [BN, BE]
    b_v = tl.load(vector + o_e * s_v, m_e, 0)  # [BE]
    return b_x.to(tl.float32), b_v.to(tl.float32)


@triton.jit
def scaled_sums(
    rows,
    vector,
    o_n,
    m_n,
    s_n,
    s_e,
    s_v,
    BN: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
    UNIT_VECTOR: tl.constexpr,
):
    """Dot products and sums of squares ``[BN]``, rows and vector scaled by powers of two; the vector's sum."""
    b_largest = tl.zeros([BN, BE], tl.float32)
    b_v_largest = tl.zeros([BE], tl.float32)
    for i_e in range(0, E, BE):
        b_x, b_v = load_piece(rows, vector, i_e, o_n, m_n, s_n, s_e, s_v, E, BE)
        b_largest = tl.maximum(b_largest, tl.abs(b_x))
        b_v_largest = tl.maximum(b_v_largest, tl.abs(b_v))
    b_scale = power_of_two_scale(tl.max(b_largest, 1))[:, None]  # [BN, 1]
    v_scale = power_of_two_scale(tl.max(b_v_largest, 0))
    b_dots = tl.zeros([BN, BE], tl.float32)
    b_squares = tl.zeros([BN, BE], tl.float32)
    b_v_squares = tl.zeros([BE], tl.float32)
    for i_e in range(0, E, BE):
        b_x, b_v = load_piece(rows, vector, i_e, o_n, m_n, s_n, s_e, s_v, E, BE)
        if not UNIT_ROWS:
            b_x = b_x * b_scale
        if not UNIT_VECTOR:
            b_v = b_v * v_scale
        b_dots = tl.fma(b_x, tl.broadcast_to(b_v[None, :], [BN, BE]), b_dots)
        b_squares = tl.fma(b_x, b_x, b_squares)
        b_v_squares = tl.fma(b_v, b_v, b_v_squares)
    return tl.sum(b_dots, 1), tl.sum(b_squares, 1), tl.sum(b_v_squares, 0)


@triton.jit
def row_cosines(
    rows,
    vector,
    o_n,
    m_n,
    s_n,
    s_e,
    s_v,
    BN: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
    UNIT_VECTOR: tl.constexpr,
):
    """Cosines ``[BN]`` in float32 of rows with a vector; what is said to have unit length is not divided by it.

    Not finite where the row or the vector is not; 0 where one of them is 0.
    """
    b_dots = tl.zeros([BN, BE], tl.float32)
    b_squares = tl.zeros([BN, BE], tl.float32)
    b_v_squares = tl.zeros([BE], tl.float32)
    for i_e in tl.static_range(0, E, BE):  # unrolled, so that all loads can be under way at once
        b_x, b_v = load_piece(rows, vector, i_e, o_n, m_n, s_n, s_e, s_v, E, BE)
        b_dots = tl.fma(b_x, tl.broadcast_to(b_v[None, :], [BN, BE]), b_dots)
        if not UNIT_ROWS:
            b_squares = tl.fma(b_x, b_x, b_squares)
        if not UNIT_VECTOR:
            b_v_squares = tl.fma(b_v, b_v, b_v_squares)
    b_dot, b_square = tl.sum(b_dots, 1), tl.sum(b_squares, 1)  # [BN]
    v_square = tl.sum(b_v_squares, 0)
    b_v_length = tl.full([BN], 1.0, tl.float32)  # of the vector, for each row
    if not UNIT_VECTOR:
        b_v_length = b_v_length * tl.sqrt_rn(v_square)

    # Squares that left the range of float32, or might have. A row's cosine must not depend on the rows beside it, so
    # only these rows take the scaled sums.
    m_rare = tl.zeros([BN], tl.int1)
    if not UNIT_ROWS:
        m_rare = m_rare | (((b_square >= 2.0**-60) & (b_square <= 2.0**60)) == 0)
    if not UNIT_VECTOR:
        m_rare = m_rare | (((v_square >= 2.0**-60) & (v_square <= 2.0**60)) == 0)
    m_rare = m_rare & m_n
    if tl.max(m_rare.to(tl.int32), 0) > 0:
        s_dot, s_square, s_v_square = scaled_sums(
            rows, vector, o_n, m_rare, s_n, s_e, s_v, BN, E, BE, UNIT_ROWS, UNIT_VECTOR
        )
        b_dot = tl.where(m_rare, s_dot, b_dot)
        b_square = tl.where(m_rare, s_square, b_square)
        if not UNIT_VECTOR:
            b_v_length = tl.where(m_rare, tl.sqrt_rn(s_v_square), b_v_length)
    b_length = b_v_length
    if not UNIT_ROWS:
        b_length = tl.sqrt_rn(b_square) * b_length
    return tl.div_rn(b_dot, tl.where(b_length == 0, 1.0, b_length))


@triton.jit
def apply_factors(
    b_cosine,
    b_factor,
    rows,
    o_n,
    m_n,
    s_n,
    s_e,
    BN: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
):
    """Cosines ``[BN]`` of int8 rows times their factors, from the cosines of the integers alone."""
    m_rare = m_n & ((tl.abs(b_factor) < 2.0**120) == 0)
    m_finite = tl.full([BN], 1, tl.int1)
    if tl.max(m_rare.to(tl.int32), 0) > 0:  # the product may be infinite or NaN
        b_largest = tl.zeros([BN, BE], tl.float32)
        for i_e in range(0, E, BE):
            b_x, _ = load_piece(rows, rows, i_e, o_n, m_rare, s_n, s_e, s_e, E, BE)
            b_largest = tl.maximum(b_largest, tl.abs(b_x))
        m_finite = (tl.max(b_largest, 1) * tl.abs(b_factor) < float("inf")) | (m_rare == 0)
    if not UNIT_ROWS:  # a common factor changes the length, not the direction, unless it is negative or 0
        b_factor = tl.where(b_factor > 0, 1.0, tl.where(b_factor < 0, -1.0, 0.0))
    return tl.where(m_finite, b_cosine * b_factor, float("nan"))


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
