"""``merge_attention``: joins attention over disjoint sets of keys by their log-sum-exp, part 0 first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import config
from .dtypes import refuse_float64
from .launch import device_of, launch


@triton.jit(do_not_specialize=["parts", "length"])
def merge_attention_kernel(
    outs,  # (P, B, S, H, D)
    lses,  # (P, B, H, S)
    out,  # (B, S, H, D) contiguous
    lse,  # (B, H, S) contiguous
    parts,
    length,
    outs_sp,
    outs_sb,
    outs_ss,
    outs_sh,
    outs_sd,
    lses_sp,
    lses_sb,
    lses_sh,
    lses_ss,
    D: tl.constexpr,
    LSE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    o_s = (i_s * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)  # [BLOCK_S]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_s = o_s < length
    m_o = m_s[:, None] & (o_d < D)[None, :]  # [BLOCK_S, BLOCK_D]
    p_lse = lses + i_b * lses_sb + i_h * lses_sh + o_s * lses_ss  # [BLOCK_S]
    p_o = outs + i_b * outs_sb + i_h * outs_sh + o_s[:, None] * outs_ss + o_d.to(tl.int64)[None, :] * outs_sd

    b_top = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for i_p in range(parts):
        b_top = tl.maximum(b_top, tl.load(p_lse + tl.cast(i_p, tl.int64) * lses_sp, mask=m_s, other=float("-inf")))
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)  # all parts empty: exp(-inf - 0) = 0, never exp(nan)

    b_total = tl.zeros([BLOCK_S], tl.float32)
    b_o = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)  # [BLOCK_S, BLOCK_D]
    for i_p in range(parts):
        b_lse = tl.load(p_lse + tl.cast(i_p, tl.int64) * lses_sp, mask=m_s, other=float("-inf"))
        b_weight = tl.exp(b_lse - b_top)
        b_total += b_weight
        # An empty part's output may be anything, NaN included, and is not even read.
        b_part = tl.load(p_o + tl.cast(i_p, tl.int64) * outs_sp, mask=m_o & (b_lse > float("-inf"))[:, None], other=0.0)
        b_o += b_weight[:, None] * b_part.to(tl.float32)

    b_o = b_o / tl.where(b_total == 0.0, 1.0, b_total)[:, None]
    o_row = (i_b * length + o_s) * heads + i_h
    tl.store(out + o_row[:, None] * D + o_d[None, :], b_o.to(out.dtype.element_ty), mask=m_o)
    if LSE:
        tl.store(lse + (i_b * heads + i_h) * length + o_s, b_top + tl.log(b_total), mask=m_s)


def merge_attention(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges parts in the given order, in float32; a part whose log-sum-exp is -inf adds nothing.

    Args:
        outs: ``(P, B, S, H, D)`` float32, float16 or bfloat16.
        lses: ``(P, B, H, S)`` float32, natural logarithms.

    Returns:
        out ``(B, S, H, D)`` in ``outs``' dtype, lse ``(B, H, S)`` float32; 0 and -inf where all parts are empty.

    Raises:
        TypeError: a tensor is float64.
    """
    refuse_float64("outs", outs)
    refuse_float64("lses", lses, "float32")
    return merge_parts(outs, lses, outs.dtype, True)


def merge_parts(
    outs: torch.Tensor, lses: torch.Tensor, dtype: torch.dtype, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge_attention` into another dtype; without ``return_lse`` the second result is empty."""
    parts, samples, length, heads, head_dim = outs.shape
    out = torch.empty((samples, length, heads, head_dim), dtype=dtype, device=outs.device)
    lse = torch.empty((samples, heads, length) if return_lse else (0,), dtype=torch.float32, device=outs.device)
    row = config("merge_attention", device_of(outs).architecture)
    block = row.constants["BLOCK_S"]
    launch(
        merge_attention_kernel,
        (triton.cdiv(length, block), heads, samples),
        outs,
        lses,
        out,
        lse,
        parts,
        length,
        *outs.stride(),
        *lses.stride(),
        D=head_dim,
        LSE=return_lse,
        BLOCK_S=block,
        BLOCK_D=triton.next_power_of_2(max(head_dim, 1)),
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )
    return out, lse
