"""Device functions shared by the kernels: rotation of interleaved channel pairs, and the codes of quantised pages.

Every kernel that turns a key turns it here. That makes a key placed when its block is written, and the same key
placed later from its canonical page, equal to the last bit: `tl.fma` says where roundings are, so no compiler may
choose to contract one kernel's products in another way than the other kernel's.
"""

import triton
import triton.language as tl


@triton.jit
def load_turn(p_rope, s_rope, i_time, o_row, o_column, o_c, m_c, TIME: tl.constexpr, HEIGHT: tl.constexpr):
    """Cosines and sines of tokens, interleaved as the channels they turn, from a table ``(P, D/2, 2)``.

    Args:
        i_time: temporal position, a scalar or ``[BT, 1]``.
        o_row, o_column: place in the frame, ``[BT, 1]``.
        o_c: channels ``[1, BD]``.
        m_c: what to load, ``[BT, BD]`` or broadcast to it.
        TIME, HEIGHT: channels of time and of height.

    Returns:
        ``[BT, BD]`` float32: the cosine of pair ``i`` at ``2 i``, its sine at ``2 i + 1``.
    """
    o_p = tl.where(o_c < TIME, i_time, tl.where(o_c < TIME + HEIGHT, o_row, o_column)).to(tl.int64)
    o_pair = (o_c // 2).to(tl.int64)
    o_part = (o_c % 2).to(tl.int64)
    return tl.load(p_rope + o_p * s_rope[0] + o_pair * s_rope[1] + o_part * s_rope[2], m_c, other=0.0).to(tl.float32)


@triton.jit
def rotate(b_x, b_turn):
    """Rotates channel pairs ``(2 i, 2 i + 1)`` by cosines and sines interleaved like them.

    Args:
        b_x: ``[BT, BH, BD]`` float32.
        b_turn: ``[BT, 1, BD]`` or ``[1, 1, BD]`` float32, see `load_turn`.

    Returns:
        ``[BT, BH, BD]`` float32.
    """
    b_even, b_odd = _pairs(b_x)  # [BT, BH, BD/2]
    b_cosine, b_sine = _pairs(b_turn)
    b_cosine = tl.broadcast_to(b_cosine, b_even.shape)
    b_sine = tl.broadcast_to(b_sine, b_even.shape)
    b_turned_even = tl.fma(b_even, b_cosine, -(b_odd * b_sine))
    b_turned_odd = tl.fma(b_even, b_sine, b_odd * b_cosine)
    return tl.reshape(tl.join(b_turned_even, b_turned_odd), b_x.shape)


@triton.jit
def _pairs(b_x):
    return tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], b_x.shape[2] // 2, 2]))


@triton.jit
def decode_e4m3(b_x):
    """Bytes of float8 e4m3fn as float32, exactly; by shifts, because sm_80 and Triton's interpreter lack the type.

    The seven bits of exponent and mantissa, moved to the same places of a float16, are the value times 2**-8 (the
    exponents' biases are 7 and 15), subnormals too. The two patterns without a sign bit that are all ones are NaN.
    """
    b_bits = b_x.to(tl.uint16)
    b_half = (((b_bits & 0x80) << 8) | ((b_bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((b_bits & 0x7F) == 0x7F, float("nan"), b_half.to(tl.float32) * 256.0)


@triton.jit
def dequantise(b_x, b_scale, FP8: tl.constexpr):
    """A tile of an int8 page, or of the bytes of an fp8 one, times its scales: float32."""
    b_value = decode_e4m3(b_x) if FP8 else b_x.to(tl.float32)
    return b_value * b_scale.to(tl.float32)


@triton.jit
def round_to_int(b_x):
    """float32 of magnitude below 2**22 as the nearest int32, ties to even.

    1.5 * 2**23 has an ulp of 1: adding it rounds, and leaves the integer in the low bits.
    """
    return (b_x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def encode_e4m3(b_x):
    """float32 of magnitude up to 448 as bytes of float8 e4m3fn in int32, rounded to nearest, ties to even.

    The inverse of `decode_e4m3`, by shifts for the same reason. From 2**-6 on 20 bits of the mantissa are rounded off,
    a carry going to the exponent, whose bias changes by 120; below, the code is the number of steps of 2**-9.
    """
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_size = b_bits & 0x7FFFFFFF
    b_normal = ((b_size + 0x7FFFF + ((b_size >> 20) & 1)) >> 20) - (120 << 3)
    b_small = round_to_int(tl.abs(b_x) * 512.0)
    return tl.where(b_size < 0x3C800000, b_small, b_normal) | ((b_bits >> 24) & 0x80)
