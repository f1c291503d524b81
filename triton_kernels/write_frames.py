"""``write_frames``: norm, rotation and all writes of a block's queries, keys and values in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .configs import config
from .dtypes import refuse_float64
from .launch import device_of, launch
from .rotation import load_turn, rotate


@triton.jit
def load_row(p_x, s_x, o_t, o_c, m_t, H: tl.constexpr, D: tl.constexpr, BH: tl.constexpr):
    """All heads of some tokens, as a tuple of tiles of ``BH`` heads ``[BT, BH, BD]``."""
    b_row = ()
    for i in tl.static_range((H + BH - 1) // BH):
        o_h = i * BH + tl.arange(0, BH)[None, :, None]
        p = p_x + o_t.to(tl.int64) * s_x[0] + o_h.to(tl.int64) * s_x[1] + o_c.to(tl.int64) * s_x[2]
        b_row = b_row + (tl.load(p, m_t & (o_h < H) & (o_c < D), other=0.0),)  # noqa: RUF005  Triton takes no star
    return b_row


@triton.jit
def store_heads(p_x, s_x, b_x, i, o_t, o_c, m_t, H: tl.constexpr, D: tl.constexpr):
    """Tile ``i`` of a row, rounded to the buffer's dtype."""
    o_h = i * b_x.shape[1] + tl.arange(0, b_x.shape[1])[None, :, None]
    p = p_x + o_t.to(tl.int64) * s_x[0] + o_h.to(tl.int64) * s_x[1] + o_c.to(tl.int64) * s_x[2]
    tl.store(p, b_x.to(p_x.dtype.element_ty), m_t & (o_h < H) & (o_c < D))


@triton.jit
def inverse_rms(b_row, eps, WIDTH: tl.constexpr):
    """``1 / sqrt(mean(x ** 2) + eps)`` over rows of ``WIDTH`` numbers: ``[BT, 1, 1]`` float32."""
    b_square = b_row[0].to(tl.float32) * b_row[0].to(tl.float32)
    for i in tl.static_range(1, len(b_row)):
        b_square += b_row[i].to(tl.float32) * b_row[i].to(tl.float32)
    b_sum = tl.sum(tl.reshape(b_square, [b_square.shape[0], b_square.shape[1] * b_square.shape[2]]), 1)
    return tl.div_rn(1.0, tl.sqrt_rn(b_sum / WIDTH + eps))[:, None, None]


@triton.jit
def weigh(b_x, b_inverse, p_weight, s_weight, i, o_c, H: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr):
    """A tile in float32, normed and weighted if there are weights ``(H*D,)``."""
    b_x = b_x.to(tl.float32)
    if NORM:
        o_h = i * b_x.shape[1] + tl.arange(0, b_x.shape[1])[None, :, None]
        p = p_weight + (o_h * D + o_c).to(tl.int64) * s_weight + tl.zeros(b_x.shape, tl.int64)
        b_x = b_x * b_inverse * tl.load(p, (o_h < H) & (o_c < D), other=0.0).to(tl.float32)
    return b_x


@triton.jit(do_not_specialize=["tokens", "width"])
def write_frames_kernel(
    p_q,  # [B, n * T, HQ, D]
    p_k,  # [B, n * T, HK, D]
    p_v,  # [B, n * T, HK, D]
    p_pool,  # [2, B, slots, T, HK, D]
    p_staging,  # [B, rows, T, HK, D]
    p_out,  # [B, n * T, HQ, D]
    p_slots,  # [n]
    p_rows,  # [n]
    p_positions,  # [n]
    p_rope,  # [P, D / 2, 2]
    p_q_weight,  # [HQ * D] or None
    p_k_weight,  # [HK * D] or None
    s_q,
    s_k,
    s_v,
    s_pool,
    s_staging,
    s_out,
    s_tables,
    s_rope,
    s_weights,
    tokens,
    width,
    eps,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    NORM: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    i_f, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)[:, None, None]  # [BT, 1, 1]
    o_c = tl.arange(0, BD)[None, None, :]  # [1, 1, BD]
    m_t = o_t < tokens

    # Everything is loaded before anything is stored: no load may move over a store to a pointer that could alias it.
    i_first = i_f * tokens
    b_q = load_row(p_q + i_b * s_q[0] + i_first * s_q[1], s_q[1:], o_t, o_c, m_t, HQ, D, BH)
    b_k = load_row(p_k + i_b * s_k[0] + i_first * s_k[1], s_k[1:], o_t, o_c, m_t, HK, D, BH)
    b_v = load_row(p_v + i_b * s_v[0] + i_first * s_v[1], s_v[1:], o_t, o_c, m_t, HK, D, BH)
    i_slot = tl.load(p_slots + i_f * s_tables[0])
    i_row = tl.load(p_rows + i_f * s_tables[1])
    i_time = tl.load(p_positions + i_f * s_tables[2])
    o_t2 = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]  # [BT, 1]
    o_c2 = tl.arange(0, BD)[None, :]
    b_turn = load_turn(
        p_rope, s_rope, i_time, o_t2 // width, o_t2 % width, o_c2, (o_t2 < tokens) & (o_c2 < D), TIME, HEIGHT
    )[:, None, :]  # [BT, 1, BD]
    m_time = o_c < TIME
    m_still = o_c < tl.where(i_time == 0, TIME, 0)  # position 0 turns nothing, to the last bit

    b_inverse = inverse_rms(b_q, eps, HQ * D) if NORM else 1.0
    p_out += i_b * s_out[0] + i_first * s_out[1]
    for i in tl.static_range(len(b_q)):
        b_x = weigh(b_q[i], b_inverse, p_q_weight, s_weights[0], i, o_c, HQ, D, NORM)
        b_x = tl.where(m_still, b_x, rotate(b_x, b_turn))
        store_heads(p_out, s_out[1:], b_x, i, o_t, o_c, m_t, HQ, D)

    b_inverse = inverse_rms(b_k, eps, HK * D) if NORM else 1.0
    p_pool += i_b * s_pool[1] + i_slot * s_pool[2]
    p_staging += i_b * s_staging[0] + i_row * s_staging[1]
    m_slot = o_t < tl.where(i_slot >= 0, tokens, 0)
    m_row = o_t < tl.where(i_row >= 0, tokens, 0)
    for i in tl.static_range(len(b_k)):
        b_x = weigh(b_k[i], b_inverse, p_k_weight, s_weights[1], i, o_c, HK, D, NORM)
        b_turned = rotate(b_x, b_turn)
        store_heads(p_pool, s_pool[3:], tl.where(m_still, b_x, b_turned), i, o_t, o_c, m_slot, HK, D)
        store_heads(p_staging, s_staging[2:], tl.where(m_time, b_x, b_turned), i, o_t, o_c, m_row, HK, D)
        store_heads(p_pool + tl.cast(s_pool[0], tl.int64), s_pool[3:], b_v[i], i, o_t, o_c, m_slot, HK, D)


def write_frames(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pool_layer: torch.Tensor,
    staging: torch.Tensor,
    slots: torch.Tensor,
    staging_rows: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    rope_split: Sequence[int],
    grid: Sequence[int],
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Writes a block's placed keys, values and canonical keys; returns the rotated queries, contiguous.

    Shapes and dtypes as in ``torch.ops.longlive.write_frames``. RMSNorm as in arXiv 1910.07467, rotation as in RoFormer
    (arXiv 2104.09864), both in float32 and rounded once.
    """
    refuse_float64("q", q)
    samples, _, heads, head_dim = q.shape
    tokens, kv_heads = pool_layer.shape[3:5]
    device = device_of(q)
    row = config("write_frames", device.architecture)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    channels = max(2, triton.next_power_of_2(head_dim))
    num_warps, block_tokens, block_heads = _tile(
        heads, kv_heads, channels, q.element_size(), row.num_warps, row.constants["TILES"]
    )
    launch(
        write_frames_kernel,
        (triton.cdiv(tokens, block_tokens), slots.shape[0], samples),
        q,
        k,
        v,
        pool_layer,
        staging,
        out,
        slots,
        staging_rows,
        positions,
        rope,
        q_weight,
        k_weight,
        q.stride(),
        k.stride(),
        v.stride(),
        pool_layer.stride(),
        staging.stride(),
        out.stride(),
        (slots.stride(0), staging_rows.stride(0), positions.stride(0)),
        rope.stride(),
        (1, 1) if q_weight is None or k_weight is None else (q_weight.stride(0), k_weight.stride(0)),
        tokens,
        grid[1],
        eps,
        HQ=heads,
        HK=kv_heads,
        D=head_dim,
        TIME=rope_split[0],
        HEIGHT=rope_split[1],
        NORM=q_weight is not None,
        BT=block_tokens,
        BH=block_heads,
        BD=channels,
        num_warps=num_warps,
    )
    return out


@lru_cache
def _tile(heads: int, kv_heads: int, channels: int, itemsize: int, num_warps: int, most: int) -> tuple[int, int, int]:
    """Warps, tokens and heads of a tile that all threads load with one 16-byte access each.

    Heads are the power of two that leaves the fewest rows of the tiles empty. At most ``most`` tiles hold a token's q,
    k and v, because they wait in registers for each other; wider models get more warps.
    """
    while True:
        vectors = 32 * num_warps * 16 // itemsize
        limit = max(1, min(vectors // channels, triton.next_power_of_2(heads)))
        rows = {}  # of a token's tiles, by heads in a tile
        for tile in (1 << i for i in range(limit.bit_length())):
            tiles = triton.cdiv(heads, tile) + 2 * triton.cdiv(kv_heads, tile)
            if tiles <= most or (num_warps == 16 and tile == limit):
                rows[tile] = tiles * tile
        if rows:
            best = min(rows, key=lambda tile: (rows[tile], -tile))
            return num_warps, max(1, vectors // (best * channels)), best
        num_warps *= 2
