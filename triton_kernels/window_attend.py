"""``window_attend``: softmax attention of a block over a table of slots, computed tile by tile with an online softmax.

Exponentials are powers of two with ``log2(e) * scale`` folded in, and the running maximum is kept in those units
(Dao, FlashAttention-2, arXiv 2307.08691, section 3.1). A block of the grid holds a tile of queries of one head and
walks a contiguous range of tiles of keys, one of `kv_splits.kv_splits` such ranges; `merge_attention` joins them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from . import window_plan
from .configs import Config
from .kv_splits import kv_splits
from .launch import device_of, launch
from .merge_attention import merge_parts
from .slot_tables import compact
from .window_tile import SCALE_UP, attend_stretch, attend_tile, turned_query


@triton.jit(do_not_specialize=["length", "run", "splits", "table_width"])
def window_attend_kernel(
    q,  # (B, S, Hq, D)
    key,  # (B, slots, T, Hkv, D), or its descriptor [B, slots, Hkv, T, D]
    value,
    k_scale,  # (B, slots, T, Hkv)
    v_scale,
    pages,  # (B, N) contiguous: slots of a compact table, see slot_tables.py
    shifts,  # (B, N) contiguous: beside pages
    counts,  # (B,) contiguous: entries of the table, or slots of the run
    rope,  # (P, D / 2, 2)
    out,  # (splits, B, S, Hq, D) contiguous
    lse,  # (splits, B, Hq, S) contiguous
    length, group, run, splits, table_width,
    scale,  # |scale| * log2(e)
    q_sb, q_ss, q_sh, q_sd,
    p_sb, p_ss, p_st, p_sh, p_sd,
    ks_sb, ks_ss, ks_st, ks_sh,
    vs_sb, vs_ss, vs_st, vs_sh,
    rope_sp, rope_sd, rope_sc,
    T: tl.constexpr,  # tokens of a page
    D: tl.constexpr,
    TIME: tl.constexpr,  # temporal channels
    SIGN: tl.constexpr,  # of the scale: the running maximum needs a positive one
    TMA: tl.constexpr,
    TABLE: tl.constexpr,  # pages names the slots, else they are 0, 1, 2, ...
    COUNTED: tl.constexpr,  # counts holds the number of slots, else run does
    JOINED: tl.constexpr,  # the slots are one stretch of memory: a single page of all their tokens
    TURNED: tl.constexpr,  # keys count as moved in time by shifts
    QUANTISED: tl.constexpr,
    LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Queries run fastest, so that blocks that run together read the same head's keys.
    i_m, i_h, i_b, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2) // splits, tl.program_id(2) % splits
    heads, samples = tl.num_programs(1), tl.num_programs(2) // splits
    i_b, i_h = i_b.to(tl.int64), i_h.to(tl.int64)
    i_kv = i_h // group
    n_pages = run
    if COUNTED:
        n_pages = tl.load(counts + i_b).to(tl.int32)
    if TABLE:
        pages += i_b * table_width

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_q = (o_m < length)[:, None] & (o_d < D)[None, :]  # [BLOCK_M, BLOCK_D]
    p_q = q + i_b * q_sb + i_h * q_sh + o_m.to(tl.int64)[:, None] * q_ss  # [BLOCK_M, 1]

    # Offsets within a tile, the same for keys and values: [BLOCK_N, BLOCK_D]
    o_tile = tl.arange(0, BLOCK_N).to(tl.int64)[:, None] * p_st + o_d.to(tl.int64)[None, :] * p_sd
    if not TMA:
        key += i_b * p_sb + i_kv * p_sh
        value += i_b * p_sb + i_kv * p_sh
    if QUANTISED:
        k_scale += i_b * ks_sb + i_kv * ks_sh
        v_scale += i_b * vs_sb + i_kv * vs_sh
    kv = (
        key, value, k_scale, v_scale, o_tile, i_b.to(tl.int32), i_kv.to(tl.int32), scale,
        p_ss, p_st, ks_ss, ks_st, vs_ss, vs_st,
    )  # fmt: skip

    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # [BLOCK_M] running maximum
    b_l = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M] running sum
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # [BLOCK_M, BLOCK_D]
    TILES: tl.constexpr = (T + BLOCK_N - 1) // BLOCK_N
    if TURNED:
        each = tl.cdiv(n_pages, splits)
        first, last = i_s * each, tl.minimum(i_s * each + each, n_pages)
        shifts += i_b * table_width
        shift = tl.load(shifts + first, mask=first < last, other=0)
        # Compared with 0, here and below: Triton 3.9's interpreter takes no `block & scalar` as a mask.
        m_some = (m_q & (first < last)) != 0
        b_q = turned_query(p_q, m_some, q_sd, rope, shift, rope_sp, rope_sd, rope_sc, SIGN, TIME, BLOCK_D)
        for i_n in range(first, last):
            i_p = i_n
            if TABLE:
                i_p = tl.load(pages + i_n)
            for i_t in range(TILES):
                b_o, b_m, b_l = attend_tile(
                    b_q, b_o, b_m, b_l, kv, i_p, i_t * BLOCK_N, T, D, TMA, T % BLOCK_N != 0, False, QUANTISED,
                    BLOCK_N, BLOCK_D,
                )  # fmt: skip
            # Turned here for the next page, not above for this one: what a loop carries goes to shared memory for
            # the matrix products, what is computed beside them stays in registers, which then run out. For the same
            # reason the query is read again, by a mask that the compiler cannot move out of the loop.
            more = i_n + 1 < last
            m_some = (m_q & more) != 0
            shift = tl.load(shifts + i_n + 1, mask=more, other=0)
            b_q = turned_query(p_q, m_some, q_sd, rope, shift, rope_sp, rope_sd, rope_sc, SIGN, TIME, BLOCK_D)
    else:
        b_q = tl.load(p_q + o_d.to(tl.int64)[None, :] * q_sd, mask=m_q, other=0.0)  # [BLOCK_M, BLOCK_D]
        if SIGN != 1:
            b_q = (b_q * SIGN).to(b_q.dtype)
        tiles = n_pages * TILES
        if JOINED:
            tiles = tl.cdiv(n_pages * T, BLOCK_N)
        each = tl.cdiv(tiles, splits)
        first, last = i_s * each, tl.minimum(i_s * each + each, tiles)
        if JOINED:
            b_o, b_m, b_l = attend_stretch(
                b_q, b_o, b_m, b_l, kv, 0, first, last, n_pages * T, D, TMA, TMA, QUANTISED, BLOCK_N, BLOCK_D
            )
        else:
            for i_t in range(first, last):
                i_p = i_t // TILES
                row = (i_t - i_p * TILES) * BLOCK_N
                if TABLE:
                    i_p = tl.load(pages + i_p)
                b_o, b_m, b_l = attend_tile(
                    b_q, b_o, b_m, b_l, kv, i_p, row, T, D, TMA, T % BLOCK_N != 0, False, QUANTISED, BLOCK_N, BLOCK_D
                )

    # Nothing to attend to: output 0, log-sum-exp -inf.
    b_o = b_o / tl.where(b_l > 0, b_l, 1.0)[:, None]
    if QUANTISED:
        b_o = b_o / SCALE_UP
    part = i_s.to(tl.int64) * samples + i_b
    p_o = out + ((part * length + o_m.to(tl.int64)) * heads + i_h)[:, None] * D + o_d[None, :]
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_q)
    if LSE:
        b_lse = (b_m + tl.log2(b_l)) * 0.6931471805599453  # log(2)
        tl.store(lse + (part * heads + i_h) * length + o_m, b_lse, mask=o_m < length)


def window_attend(
    q: torch.Tensor,
    pool_layer: torch.Tensor,
    slots: torch.Tensor | None = None,
    run: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    shifts: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    rope_split: Sequence[int] | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a block over a table of slots, per sample; see ``torch.ops.longlive.window_attend``.

    Args:
        q: ``(B, S, Hq, D)`` float32, float16 or bfloat16, rotated.
        pool_layer: ``(2, B, slots, T, Hkv, D)`` in ``q``'s dtype, or int8.
        slots: ``(B, N)`` int64, -1 in any place for none; or
        run: the slots are ``0 .. run - 1``.
        scale: of the logits, ``D ** -0.5`` when None.
        return_lse: whether the log-sum-exp is wanted.
        shifts: ``(B, N)`` int64: the keys of ``slots[b, j]`` count as ``shifts[b, j]`` later in time.
        rope, rope_split: with shifts, rotary table ``(P, D // 2, 2)`` and real channels of (time, height, width).
        k_scale, v_scale: with int8 pages, ``(B, slots, T, Hkv)``.

    Returns:
        out ``(B, S, Hq, D)`` in ``q``'s dtype, contiguous; natural log-sum-exp ``(B, Hq, S)`` float32, or ``(0,)``.

    Raises:
        TypeError: ``q`` is float64.
        ValueError: heads of more than 256 channels.
        RuntimeError: bfloat16 in the interpreter; a block needs more shared memory than the device has.
    """
    pages = page_shifts = counts = None
    if slots is not None:
        pages, page_shifts, counts = compact(slots, shifts)
    most = (run or 0) if pages is None else pages.shape[1]
    return attend(
        q, pool_layer, most, pages, counts, scale, return_lse, page_shifts, rope, rope_split, k_scale, v_scale
    )  # fmt: skip


def attend_run(
    q: torch.Tensor,
    pool_layer: torch.Tensor,
    counts: torch.Tensor,
    most: int,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to slots ``0 .. counts[b] - 1``, a run whose length only the device knows.

    Args:
        counts: ``(B,)`` int64.
        most: no count is greater.
    """
    return attend(q, pool_layer, most, None, counts.contiguous(), scale, return_lse)


def attend(
    q: torch.Tensor,
    pool_layer: torch.Tensor,
    most: int,
    pages: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    shifts: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    rope_split: Sequence[int] | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    splits: int | None = None,
    row: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to a compact table of slots ``pages``, or to a run when that is None.

    Args:
        most: slots in the run, where ``counts`` is None; else no count is greater.
        counts: ``(B,)`` int64, entries in use of each sample's table, or slots of its run.
        splits, row: ranges of keys and configuration; chosen by `kv_splits.kv_splits` and from the table when None.
    """
    window_plan.check_dtype(q)
    device = device_of(q)
    samples, length, heads, head_dim = q.shape
    tokens, kv_heads = pool_layer.shape[3:5]
    quantised, turned = k_scale is not None, shifts is not None
    # Quantised tiles are masked alike to the end: a second copy of their longer loop would run out of registers.
    joined = pages is None and not quantised and window_plan.is_joined(pool_layer)
    form = ("int8 " if quantised else "") + ("turned" if turned else "run" if joined else "pages")
    how = window_plan.reading(device, pool_layer, q.dtype)
    row = row or window_plan.row_of(device, q.dtype, head_dim, form, how)
    block_m, block_n, wide = row.constants["BLOCK_M"], row.constants["BLOCK_N"], window_plan.block_d(head_dim)
    planes: Sequence[Any] = (pool_layer[0], pool_layer[1])
    if how == "descriptors":
        planes = window_plan.descriptors(pool_layer, joined, block_n, wide)
    tiles_m = triton.cdiv(length, block_m)
    if splits is None:  # at tiles of one stretch, or of pages, or at whole pages
        in_page = triton.cdiv(tokens, block_n)
        steps = triton.cdiv(most * tokens, block_n) if joined else most if turned else most * in_page
        places = device.multiprocessors * row.constants["RESIDENT"]
        splits = kv_splits(tiles_m * heads * samples, steps, places, in_page * block_n if turned else block_n)
    dtype = q.dtype if splits == 1 else torch.float32
    parts = (splits,) if splits > 1 else ()
    out = torch.empty((*parts, samples, length, heads, head_dim), dtype=dtype, device=q.device)
    with_lse = return_lse or splits > 1
    lse_shape = (*parts, samples, heads, length) if with_lse else (0,)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    factor = head_dim**-0.5 if scale is None else scale
    sign = (factor > 0) - (factor < 0)
    try:
        launch(
            window_attend_kernel,
            (tiles_m, heads, samples * splits),
            q,
            *planes,
            *(k_scale, v_scale, pages, shifts, counts, rope, out, lse),
            *(length, heads // kv_heads, most, splits, most),
            abs(factor) * math.log2(math.e) if sign else 1.0,
            *q.stride(),
            *pool_layer.stride()[1:],
            *(k_scale.stride() if k_scale is not None else (0, 0, 0, 0)),
            *(v_scale.stride() if v_scale is not None else (0, 0, 0, 0)),
            *(rope.stride() if rope is not None else (0, 0, 0)),
            T=tokens,
            D=head_dim,
            TIME=rope_split[0] if rope_split is not None else 0,
            SIGN=sign,
            TMA=how == "descriptors",
            TABLE=pages is not None,
            COUNTED=counts is not None,
            JOINED=joined,
            TURNED=turned,
            QUANTISED=quantised,
            LSE=with_lse,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=wide,
            num_warps=row.num_warps,
            num_stages=row.num_stages,
            # No limit, but ptxas then stops spilling a few bytes of these to fit more blocks on an SM.
            maxnreg=255 if q.dtype == torch.float32 else None,
        )
    except OutOfResources as error:
        raise window_plan.too_much_shared(error.required, error.limit) from error
    return merge_parts(out, lse, q.dtype, return_lse) if splits > 1 else (out, lse)
