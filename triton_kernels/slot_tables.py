"""Compacts tables of slots: the named ones first, in their order, and how many there are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import config
from .launch import device_of, launch


@triton.jit(do_not_specialize=["width"])
def slot_tables_kernel(
    slots,  # (B, N), -1 names none
    shifts,  # (B, N)
    pages,  # (B, N) contiguous
    page_shifts,  # (B, N) contiguous
    counts,  # (B,) contiguous
    width,
    slots_sb,
    slots_sn,
    shifts_sb,
    shifts_sn,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, width, BLOCK):
        o_n = start + tl.arange(0, BLOCK)  # [BLOCK]
        b_slot = tl.load(slots + i_b * slots_sb + o_n.to(tl.int64) * slots_sn, mask=o_n < width, other=-1)
        m_n = b_slot >= 0
        b_rank = tl.cumsum(m_n.to(tl.int32), 0)
        o_to = i_b * width + count + b_rank - 1
        tl.store(pages + o_to, b_slot.to(tl.int32), mask=m_n)
        if SHIFTED:
            b_shift = tl.load(shifts + i_b * shifts_sb + o_n.to(tl.int64) * shifts_sn, mask=m_n, other=0)
            tl.store(page_shifts + o_to, b_shift.to(tl.int32), mask=m_n)
        count += tl.max(b_rank, 0)
    tl.store(counts + i_b, count.to(tl.int64))


def compact(
    slots: torch.Tensor, shifts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Moves a table's entries together.

    Args:
        slots: ``(B, N)`` int64, -1 in any place for none.
        shifts: ``(B, N)`` int64, values that go with the entries.

    Returns:
        pages ``(B, N)`` int32: the slots that are not -1, in their order, then anything; shifts likewise, int32, or
        None; counts ``(B,)`` int64.
    """
    samples, width = slots.shape
    pages = torch.empty((samples, width), dtype=torch.int32, device=slots.device)
    page_shifts = None if shifts is None else torch.empty_like(pages)
    counts = torch.empty(samples, dtype=torch.int64, device=slots.device)
    row = config("slot_tables", device_of(slots).architecture)
    launch(
        slot_tables_kernel,
        (samples,),
        slots,
        shifts,
        pages,
        page_shifts,
        counts,
        width,
        *slots.stride(),
        *(shifts.stride() if shifts is not None else (0, 0)),
        SHIFTED=shifts is not None,
        **row.constants,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )
    return pages, page_shifts, counts
