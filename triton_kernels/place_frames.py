"""``place_frames``: canonical pages into window slots, dequantised and turned in time, at the speed of a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .configs import config
from .dtypes import refuse_float64
from .launch import device_of, launch
from .rotation import dequantise, load_turn, rotate

PLAIN, INT8, FP8 = 0, 1, 2  # how a page is stored
_STORED = {torch.int8: INT8, torch.float8_e4m3fn: FP8}


@triton.jit
def load_page(p_pages, s_pages, p_scale, s_scale, i_b, i_page, o_r, o_c, m_r, m_c, H: tl.constexpr, KIND: tl.constexpr):
    """Rows of a page ``[1, BR, BD]``: as stored when plain, float32 when dequantised."""
    o_t, o_h = o_r // H, o_r % H
    p = p_pages + i_b * s_pages[0] + i_page * s_pages[1]
    p += o_t.to(tl.int64) * s_pages[2] + o_h.to(tl.int64) * s_pages[3] + o_c.to(tl.int64) * s_pages[4]
    b_x = tl.load(p, m_r & m_c, other=0)
    if KIND != 0:
        p = p_scale + i_b * s_scale[0] + i_page * s_scale[1]
        p += o_t.to(tl.int64) * s_scale[2] + o_h.to(tl.int64) * s_scale[3]
        b_x = dequantise(b_x, tl.load(p, m_r, other=0.0), KIND == 2)
    return b_x


@triton.jit
def store_page(p_pool, s_pool, b_x, o_r, o_c, m_r, m_c, H: tl.constexpr):
    """Rows of a page, rounded to the pool's dtype; ``p_pool`` is the page."""
    o_t, o_h = o_r // H, o_r % H
    p = p_pool + o_t.to(tl.int64) * s_pool[3] + o_h.to(tl.int64) * s_pool[4] + o_c.to(tl.int64) * s_pool[5]
    tl.store(p, b_x.to(p_pool.dtype.element_ty), m_r & m_c)


@triton.jit(do_not_specialize=["tokens"])
def place_frames_kernel(
    p_pool,  # [2, B, slots, T, H, D]
    p_slots,  # [B, m]
    p_source,  # [B, m]
    p_positions,  # [B, m]
    p_rope,  # [P, D / 2, 2]
    p_k,  # [B, pages, T, H, D]
    p_v,  # like p_k, or None
    p_k_scale,  # [B, pages, T, H] or None
    p_v_scale,
    s_pool,
    s_slots,
    s_source,
    s_positions,
    s_rope,
    s_k,
    s_v,
    s_k_scale,
    s_v_scale,
    tokens,
    H: tl.constexpr,
    D: tl.constexpr,
    TIME: tl.constexpr,
    K_KIND: tl.constexpr,
    V_KIND: tl.constexpr,
    HAS_V: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    i_m, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_slot = tl.load(p_slots + i_b * s_slots[0] + i_m * s_slots[1])
    i_page = tl.load(p_source + i_b * s_source[0] + i_m * s_source[1])
    if (i_slot < 0) | (i_page < 0):
        return
    i_time = tl.load(p_positions + i_b * s_positions[0] + i_m * s_positions[1])

    # Tokens and heads are one axis of rows, so that no row of a tile is empty whatever the number of heads.
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)[None, :, None]  # [1, BR, 1]
    o_c = tl.arange(0, BD)[None, None, :]  # [1, 1, BD]
    m_r, m_c = o_r < tokens * H, o_c < D
    b_k = load_page(p_k, s_k, p_k_scale, s_k_scale, i_b, i_page, o_r, o_c, m_r, m_c, H, K_KIND)
    if HAS_V:
        b_v = load_page(p_v, s_v, p_v_scale, s_v_scale, i_b, i_page, o_r, o_c, m_r, m_c, H, V_KIND)
    o_c2 = tl.arange(0, BD)[None, :]  # [1, BD]
    b_turn = load_turn(p_rope, s_rope, i_time, 0, 0, o_c2, o_c2 < TIME, TIME, 0)[:, None, :]  # [1, 1, BD]
    b_turned = rotate(b_k.to(tl.float32), b_turn)
    if K_KIND == 0:
        b_turned = b_turned.to(b_k.dtype)  # selected after rounding: the channels that stay are never converted
    p_pool += i_b * s_pool[1] + i_slot * s_pool[2]
    b_k = tl.where(o_c < tl.where(i_time == 0, 0, TIME), b_turned, b_k)
    store_page(p_pool, s_pool, b_k, o_r, o_c, m_r, m_c, H)
    if HAS_V:
        store_page(p_pool + tl.cast(s_pool[0], tl.int64), s_pool, b_v, o_r, o_c, m_r, m_c, H)


def place_frames(
    pool_layer: torch.Tensor,
    slots: torch.Tensor,
    source: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    rope_split: Sequence[int],
    k_pages: torch.Tensor | None = None,
    v_pages: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Places canonical pages in window slots; shapes and dtypes as in ``torch.ops.longlive.place_frames``.

    Temporal channels turn to the new position (RoFormer, arXiv 2104.09864) in float32, rounded once. At position 0,
    and in all other channels, a plain page is copied bit for bit.
    """
    refuse_float64("pool_layer", pool_layer)
    if k_pages is None:
        k_pages, v_pages = pool_layer[0], pool_layer[1]
    samples, placed = slots.shape
    tokens, heads, head_dim = pool_layer.shape[3:]
    device = device_of(pool_layer)
    row = config("place_frames", device.architecture)
    channels = max(2, triton.next_power_of_2(head_dim))
    rows = max(1, row.constants["BYTES"] // (pool_layer.element_size() * channels))
    launch(
        place_frames_kernel,
        (triton.cdiv(tokens * heads, rows), placed, samples),
        pool_layer,
        slots,
        source,
        positions,
        rope,
        _bytes(k_pages),
        None if v_pages is None else _bytes(v_pages),
        k_scale,
        v_scale,
        pool_layer.stride(),
        slots.stride(),
        source.stride(),
        positions.stride(),
        rope.stride(),
        k_pages.stride(),
        None if v_pages is None else v_pages.stride(),
        None if k_scale is None else k_scale.stride(),
        None if v_scale is None else v_scale.stride(),
        tokens,
        H=heads,
        D=head_dim,
        TIME=rope_split[0],
        K_KIND=_STORED.get(k_pages.dtype, PLAIN),
        V_KIND=PLAIN if v_pages is None else _STORED.get(v_pages.dtype, PLAIN),
        HAS_V=v_pages is not None,
        BR=rows,
        BD=channels,
        num_warps=row.num_warps,
    )


def _bytes(pages: torch.Tensor) -> torch.Tensor:
    """Fp8 pages as the bytes that `rotation.decode_e4m3` takes."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages
