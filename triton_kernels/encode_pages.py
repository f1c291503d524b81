"""Keys and values of a frame into quantised pages: scales, data and padding of all layers and samples in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import config
from .dtypes import refuse_float64
from .launch import device_of, launch
from .rotation import encode_e4m3, round_to_int


@triton.jit
def encode_rows(
    p_x,
    p_pages,
    p_scale,
    s_x,
    s_pages,
    s_scale,
    i_l,
    i_b,
    o_t,  # [BR, 1]
    o_h,
    o_c,  # [1, BD]
    m_r,
    m_c,
    TOP: tl.constexpr,
    LARGEST: tl.constexpr,
    FP8: tl.constexpr,
):
    """Rows of keys or of values: one float16 scale a row, and its channels in eight bits."""
    p = p_x + i_l * s_x[0] + i_b * s_x[1]
    p += o_t.to(tl.int64) * s_x[2] + o_h.to(tl.int64) * s_x[3] + o_c.to(tl.int64) * s_x[4]
    b_x = tl.load(p, m_r & m_c, other=0.0).to(tl.float32)  # [BR, BD]
    b_odd = tl.where(tl.abs(b_x) < float("inf"), 0, 1)  # NaN too; a maximum may pass over it
    b_odd = tl.max(b_odd, 1, keep_dims=True)  # [BR, 1]
    b_x = tl.where(b_odd == 0, b_x, 0.0)

    b_most = tl.max(tl.abs(b_x), 1, keep_dims=True)
    b_exact = tl.div_rn(b_most, tl.full(b_most.shape, TOP, tl.float32))
    b_exact = tl.minimum(tl.maximum(b_exact, 5.9604644775390625e-08), LARGEST)  # the first is 2**-24
    b_scale = b_exact.to(tl.float16)
    b_up = tl.where(b_scale.to(tl.float32) < b_exact, 1, 0).to(tl.int16)
    b_bits = b_scale.to(tl.int16, bitcast=True) + b_up  # the next float16, when rounded down
    b_scale = b_bits.to(tl.float16, bitcast=True).to(tl.float32)
    b_bits = tl.where(b_odd == 0, b_bits, 0x7E00).to(tl.int16)
    p = p_scale + i_l * s_scale[0] + i_b * s_scale[1]
    p += o_t.to(tl.int64) * s_scale[2] + o_h.to(tl.int64) * s_scale[3]
    tl.store(p, b_bits, m_r)

    b_units = tl.div_rn(b_x, tl.broadcast_to(b_scale, b_x.shape))
    b_units = tl.minimum(tl.maximum(b_units, -TOP), TOP)
    b_code = encode_e4m3(b_units) if FP8 else round_to_int(b_units)
    p = p_pages + i_l * s_pages[0] + i_b * s_pages[1]
    p += o_t.to(tl.int64) * s_pages[2] + o_h.to(tl.int64) * s_pages[3] + o_c.to(tl.int64) * s_pages[4]
    tl.store(p, b_code.to(p_pages.dtype.element_ty), m_r & m_c)


@triton.jit(do_not_specialize=["tokens", "pad"])
def encode_pages_kernel(
    p_k,  # [layers, B, T, H, D]
    p_v,
    p_k_pages,  # [layers, B, T, H, D]
    p_v_pages,
    p_k_scale,  # [layers, B, T, H], the bits of float16
    p_v_scale,
    p_padding,  # [layers, B, pad]
    s_k,
    s_v,
    s_k_pages,
    s_v_pages,
    s_k_scale,
    s_v_scale,
    s_padding,
    tokens,
    pad,
    H: tl.constexpr,
    D: tl.constexpr,
    TOP: tl.constexpr,
    LARGEST: tl.constexpr,
    FP8: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BP: tl.constexpr,
):
    i_b, i_l = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    # Tokens and heads are one axis of rows, so that no row of a tile is empty whatever the number of heads.
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)[:, None]
    o_c = tl.arange(0, BD)[None, :]
    m_r, m_c = o_r < tokens * H, o_c < D
    o_t, o_h = o_r // H, o_r % H
    encode_rows(
        p_k, p_k_pages, p_k_scale, s_k, s_k_pages, s_k_scale, i_l, i_b, o_t, o_h, o_c, m_r, m_c, TOP, LARGEST, FP8
    )
    encode_rows(
        p_v, p_v_pages, p_v_scale, s_v, s_v_pages, s_v_scale, i_l, i_b, o_t, o_h, o_c, m_r, m_c, TOP, LARGEST, FP8
    )
    if tl.program_id(0) == 0:
        o_p = tl.arange(0, BP)
        p = p_padding + i_l * s_padding[0] + i_b * s_padding[1] + o_p.to(tl.int64) * s_padding[2]
        tl.store(p, tl.zeros([BP], tl.uint8), o_p < pad)


def encode_pages(
    keys: torch.Tensor,
    values: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    padding: torch.Tensor,
    top: int,
    largest: float,
) -> None:
    """Writes quantised pages; shapes, dtypes and bytes as in `longlive_rag_ops.bank.quantise`.

    Args:
        top: the largest magnitude of an entry: 127, or 448 for fp8.
        largest: the largest scale.
    """
    refuse_float64("keys", keys)
    layers, samples, tokens, heads, head_dim = keys.shape
    row = config("encode_pages", device_of(keys).architecture)
    channels = triton.next_power_of_2(head_dim)
    rows = max(1, row.constants["BYTES"] // (keys.element_size() * channels))
    fp8 = k_pages.dtype == torch.float8_e4m3fn
    if fp8:  # bytes, because sm_80 and Triton's interpreter lack the type
        k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    launch(
        encode_pages_kernel,
        (triton.cdiv(tokens * heads, rows), samples, layers),
        keys,
        values,
        k_pages,
        v_pages,
        k_scale.view(torch.int16),
        v_scale.view(torch.int16),
        padding,
        keys.stride(),
        values.stride(),
        k_pages.stride(),
        v_pages.stride(),
        k_scale.stride(),
        v_scale.stride(),
        padding.stride(),
        tokens,
        padding.shape[2],
        H=heads,
        D=head_dim,
        TOP=float(top),
        LARGEST=largest,
        FP8=fp8,
        BR=rows,
        BD=channels,
        BP=triton.next_power_of_2(max(1, padding.shape[2])),
        num_warps=row.num_warps,
    )
