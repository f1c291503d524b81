"""The window's next state, and the block's plan, worked out on the device: `assignment.advance_window` as a kernel.

One program does all samples. A window is a few hundred integers, so what counts is one launch instead of dozens, and
that the host never waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .configs import config
from .launch import device_of, launch


class Plan(NamedTuple):
    """What a block needs to know of its window, all int64 on the device but for ``ok``.

    Attributes:
        state: ``(B, 4, W)``, see `assignment`: the block's state, fresh when it was advanced, else the one given.
        slots: ``(n,)``, window slots of the block's frames, the same in every sample.
        staging_rows: ``(n,)``, staging rows of their canonical keys.
        positions: ``(n,)``, their temporal positions.
        counts: ``(B,)``, occupied slots of each sample, the first ones.
        ok: ``(1,)`` int32, 0 when the state cannot be used; nothing may be placed by the plan then.
    """

    state: torch.Tensor
    slots: torch.Tensor
    staging_rows: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor
    ok: torch.Tensor


@triton.jit
def _window_slot(frame, sink, local):
    """`config.window_slot`; negative for a negative frame."""
    return tl.where(frame < sink, frame, sink + (frame - sink) % local)


@triton.jit
def _position(frame, newest, window, sink, top_k, RULE: tl.constexpr):
    """`config.temporal_position` of sink and local frames."""
    if RULE == "absolute":
        return frame
    if RULE == "before_window":
        oldest = tl.maximum(sink, newest + 1 - (window - sink - top_k))
        return tl.where(frame < sink, frame, tl.maximum(sink, tl.minimum(top_k, 1)) + frame - oldest)
    return tl.where((newest < window) | (frame < sink), frame, window - 1 - (newest - frame))


@triton.jit
def _before(mask):
    """How many are set before each element."""
    ones = mask.to(tl.int32)
    return tl.cumsum(ones, 0) - ones


@triton.jit
def _take(m_to, b_rank, m_from, b_from_rank, b_value):
    """For each target the value of the source of the same rank; -1 without one. Values are not negative."""
    m_pair = m_to[:, None] & m_from[None, :] & (b_rank[:, None] == b_from_rank[None, :])  # [targets, sources]
    return tl.max(tl.where(m_pair, b_value[None, :], -1), 1)


@triton.jit
def _assign_memory(b_old, b_chosen, top_k, BK: tl.constexpr):
    """Frames of the memory slots ``[BK]``, -1 in empty ones, and whether every chosen frame found a slot.

    Whoever stays keeps its slot, newcomers take the free ones in ascending order, and the last pages fill the holes.
    """
    o_k = tl.arange(0, BK)
    m_same = (b_old[:, None] == b_chosen[None, :]) & (b_chosen >= 0)[None, :]  # [slots, ranks]
    m_stay = tl.max(m_same.to(tl.int32), 1) > 0
    m_new = (b_chosen >= 0) & (tl.max(m_same.to(tl.int32), 0) == 0)
    m_free = (o_k < top_k) & (m_stay == 0)
    fits = tl.sum(m_new.to(tl.int32), 0) <= tl.sum(m_free.to(tl.int32), 0)
    b_taken = _take(m_free, _before(m_free), m_new, _before(m_new), b_chosen)
    b_frame = tl.where(m_stay, b_old, b_taken)
    # Only the first `count` slots stay in use: the last page moves into the first hole, the one before it into the
    # second, and so on.
    m_used = b_frame >= 0
    count = tl.sum(m_used.to(tl.int32), 0)
    m_hole = (m_used == 0) & (o_k < count)
    m_last = m_used & (o_k >= count)
    b_from_last = tl.sum(m_last.to(tl.int32), 0) - 1 - _before(m_last)
    b_moved = _take(m_hole, _before(m_hole), m_last, b_from_last, b_frame)
    return tl.where(o_k < count, tl.where(m_hole, b_moved, b_frame), -1), fits


@triton.jit
def _valid(b_frame, b_position, b_source, b_staged, window, pool_slots, staging_rows, positions):
    """`assignment.check_state`, an element a slot."""
    placed = (b_frame < 0) | ((b_position >= 0) & (b_position < positions))
    sourced = (b_source == -1) | ((b_source >= window) & (b_source < pool_slots))
    return placed & sourced & (b_staged >= -1) & (b_staged < staging_rows)


@triton.jit
def _every(m_x):
    return tl.min(m_x.to(tl.int32), 0) != 0


_SIZES = (
    *("samples", "frames", "window", "sink", "top_k", "staging_rows", "pool_slots", "positions", "pages", "count"),
    *("stride_sb", "stride_sr", "stride_sw", "stride_cb", "stride_ck", "stride_fb", "stride_ff"),
)


@triton.jit(do_not_specialize=_SIZES)
def assign_window_kernel(
    p_state,  # (B, 4, W) int64
    p_chosen,  # (B, K) int64
    p_frame_slot,  # (B, F) int64
    p_start,  # (1,) int64
    p_next,  # (B, 4, W) int64, contiguous
    p_plan,  # (3, n) int64, contiguous: slots, staging rows, positions
    p_counts,  # (B,) int64
    p_ok,  # (1,) int32
    samples,
    frames,
    window,
    sink,
    top_k,
    staging_rows,
    pool_slots,
    positions,
    pages,
    count,
    stride_sb,
    stride_sr,
    stride_sw,
    stride_cb,
    stride_ck,
    stride_fb,
    stride_ff,
    SELECT: tl.constexpr,
    RULE: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    start = tl.load(p_start)
    newest = start + frames - 1
    local = window - sink - top_k
    fixed = sink + local  # slots of the sink and local part
    o_n, o_w, o_k = tl.arange(0, BN), tl.arange(0, BW), tl.arange(0, BK)

    b_own = start + o_n  # [BN] the block's frames
    b_slot = _window_slot(b_own, sink, local)  # [BN]
    m_n = o_n < frames
    m_slot = m_n & (b_slot >= 0)
    b_at = _position(b_own, newest, window, sink, top_k, RULE)  # [BN]
    ok = start >= 0

    # Sink and local part after the step: the newest frame that belongs in each slot, -1 in slots not reached yet.
    b_ring = newest - (newest - sink + local - (o_w - sink)) % local  # [BW]
    b_kept = tl.where(o_w < sink, o_w, b_ring)
    b_first = tl.minimum(o_w, sink)
    b_kept = tl.where((o_w < fixed) & (newest >= b_first) & (b_kept >= b_first), b_kept, -1)
    b_kept_at = tl.where(b_kept >= 0, _position(b_kept, newest, window, sink, top_k, RULE), -1)  # [BW]

    for i_b in range(samples):
        b = tl.cast(i_b, tl.int64)
        p_old = p_state + b * stride_sb
        p_slot = p_old + b_slot * stride_sw
        held = _every((tl.load(p_slot, m_slot, other=-1) == b_own) | (m_n == 0))
        if b == 0:
            b_at = tl.where(held, tl.load(p_slot + stride_sr, m_slot, other=-1), b_at)

        p_row = p_old + o_w.to(tl.int64) * stride_sw
        m_w = o_w < window
        b_frame = tl.load(p_row, m_w, other=-1)  # [BW]
        b_position = tl.load(p_row + stride_sr, m_w, other=-1)
        b_source = tl.load(p_row + 2 * stride_sr, m_w, other=-1)
        b_staged = tl.load(p_row + 3 * stride_sr, m_w, other=-1)
        m_fine = _valid(b_frame, b_position, b_source, b_staged, window, pool_slots, staging_rows, positions)
        used = tl.sum((b_frame >= 0).to(tl.int32), 0)
        m_fine &= (b_frame >= 0) == (o_w < used)  # the slots in use are the first ones
        fine = held & _every(m_fine)

        if SELECT:
            # A state that holds the block already is left as it is, so that a call that failed can be made again.
            p_memory = p_old + (fixed + o_k).to(tl.int64) * stride_sw
            b_old = tl.load(p_memory, o_k < top_k, other=-1)  # [BK]
            p_rank = p_chosen + b * stride_cb + o_k.to(tl.int64) * stride_ck
            b_chosen = tl.load(p_rank, o_k < top_k, other=-1)
            b_memory, fits = _assign_memory(b_old, b_chosen, top_k, BK)  # [BK]
            b_memory_at = b_memory if RULE == "absolute" else tl.where(b_memory >= 0, 0, -1).to(tl.int64)
            m_arrives = (b_memory >= 0) & (b_memory != b_old)
            p_page = p_frame_slot + b * stride_fb + b_memory * stride_ff
            b_page = tl.load(p_page, m_arrives & (b_memory < pages), other=-1)

            m_before = (b_kept >= 0) & (b_kept < start)  # frames of earlier blocks, which must be there
            b_again = tl.where(m_before & (b_position != b_kept_at), b_kept % staging_rows, -1)
            m_there = ((m_before == 0) | (b_frame == b_kept)) & ((b_kept < 0) | (b_kept_at < positions))
            m_page = (m_arrives == 0) | ((b_page >= window) & (b_page < pool_slots))
            m_page &= (b_memory < 0) | (b_memory_at < positions)
            part = tl.sum((b_kept >= 0).to(tl.int32), 0)
            memory = tl.sum((b_memory >= 0).to(tl.int32), 0)
            whole = (memory == 0) | (part == fixed)  # memory pages follow a full local part
            fine = tl.where(held, fine, fits & whole & _every(m_there) & _every(m_page))
            used = tl.where(held, used, part + memory)

            p_new = p_next + b * 4 * window + o_w
            m_new = o_w < tl.where(held, window, fixed)
            tl.store(p_new, tl.where(held, b_frame, b_kept), m_new)
            tl.store(p_new + window, tl.where(held, b_position, b_kept_at), m_new)
            tl.store(p_new + 2 * window, tl.where(held, b_source, -1), m_new)
            tl.store(p_new + 3 * window, tl.where(held, b_staged, b_again), m_new)
            p_new = p_next + b * 4 * window + fixed + o_k
            m_new = o_k < tl.where(held, 0, top_k)
            tl.store(p_new, b_memory, m_new)
            tl.store(p_new + window, b_memory_at, m_new)
            tl.store(p_new + 2 * window, b_page, m_new)
            tl.store(p_new + 3 * window, tl.full([BK], -1, tl.int64), m_new)

        tl.store(p_counts + b, used.to(tl.int64))
        ok &= fine & ((count < 0) | (used == count))

    tl.store(p_plan + o_n, b_slot, m_n)
    tl.store(p_plan + frames + o_n, b_own % staging_rows, m_n)
    tl.store(p_plan + 2 * frames + o_n, b_at, m_n)
    tl.store(p_ok, ok.to(tl.int32))


def assign_window(
    window_state: torch.Tensor,
    chosen: torch.Tensor | None,
    frame_slot: torch.Tensor,
    start_frame: torch.Tensor,
    frames: int,
    *,
    sink: int,
    top_k: int,
    staging_rows: int,
    pool_slots: int,
    positions: int,
    position_rule: str = "slot",
    count: int | None = None,
) -> Plan:
    """The plan of the block of ``frames`` frames at ``start_frame``, without a host synchronisation.

    Args:
        window_state: ``(B, 4, W)`` int64, of the block before, or of the block itself; not changed.
        chosen: ``(B, K)`` int64, frames to retrieve, most similar first, -1 for none. Samples whose state holds the
            block already keep it. None: ``window_state`` is the block's state.
        frame_slot: ``(B, F)`` int64, pool slot of each frame's canonical page; -1 where it has none.
        start_frame: int64 with one element.
        staging_rows, pool_slots, positions: rows of the staging buffer, slots of the pool, rows of the rotary table.
        count: occupied slots in every sample, when the host knows.

    Returns:
        The plan; its ``ok`` is 0 wherever `assignment.advance_window`, `assignment.check_state` or
        `chain.retrieve_attend` would raise, and when the occupied slots are not the first ones.
    """
    samples, rows, window = window_state.shape
    state = window_state if chosen is None else window_state.new_empty(samples, rows, window)
    plan = window_state.new_empty(3, frames)
    counts = window_state.new_empty(samples)
    ok = torch.empty(1, dtype=torch.int32, device=window_state.device)
    blocks = [max(triton.next_power_of_2(size), 2) for size in (window, top_k, frames)]
    shape = "short" if blocks[0] <= 32 and blocks[1] <= 16 else "long"
    row = config("assign_window", device_of(window_state).architecture, shape)
    launch(
        assign_window_kernel,
        (1,),
        window_state,
        window_state if chosen is None else chosen,
        frame_slot,
        start_frame,
        state,
        plan,
        counts,
        ok,
        samples,
        frames,
        window,
        sink,
        top_k,
        staging_rows,
        pool_slots,
        positions,
        frame_slot.shape[1],
        -1 if count is None else count,
        *window_state.stride(),
        *((0, 0) if chosen is None else chosen.stride()),
        *frame_slot.stride(),
        SELECT=chosen is not None,
        RULE=position_rule,
        BW=blocks[0],
        BK=blocks[1],
        BN=blocks[2],
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )
    return Plan(state, *plan.unbind(), counts, ok)
