"""`window_attend` of the dense engine: which pages a call attends to, as keys and values that dense attention takes.

A run of slots is attended to in place. Any other table costs a copy of its pages, and on CUDA a look at the table: one
host synchronisation. Pages that are shifted in time or stored in int8 are placed in a buffer first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import dense_backends, paged_attention
from .dense_backends import BackEnd
from .reference import lse_dtype

Slots = tuple[int, ...]


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
    """One dense call for all samples that attend to the same pages alike, else one call a sample."""
    no_lse = q.new_empty(0, dtype=lse_dtype(q.dtype))
    plain = shifts is None and k_scale is None
    if slots is not None and plain and paged_attention.obstacle(q, pool_layer) is None:
        out, lse = paged_attention.attend(q, pool_layer, slots, scale)
        return out, lse if return_lse else no_lse
    tables = _tables(slots, shifts, q.shape[0]) if slots is not None else [(tuple(range(run or 0)), ())] * q.shape[0]
    alike = all(table == tables[0] for table in tables)
    parts = []
    for part in [slice(None)] if alike else [slice(b, b + 1) for b in range(q.shape[0])]:
        table, by = tables[part.start or 0] if tables else ((), ())
        factors = [x if x is None else x[part] for x in (k_scale, v_scale)]
        if not table or q[part].numel() == 0:
            keys = values = None
        elif plain:
            keys, values = _pages(pool_layer[:, part], table)
        else:
            keys, values = _placed(q.dtype, pool_layer[:, part], table, by, rope, rope_split, *factors)
        parts.append(attend(q[part], keys, values, scale, return_lse))
    if len(parts) == 1:
        out, lse = parts[0]
    else:
        out, lse = (torch.cat(results) for results in zip(*parts, strict=True))
    return out, lse if return_lse else no_lse


def _tables(slots: torch.Tensor, shifts: torch.Tensor | None, samples: int) -> list[tuple[Slots, Slots]]:
    """Slots and shifts of each sample's pages, read from the device in one go."""
    both = torch.stack([slots, torch.zeros_like(slots) if shifts is None else shifts]).tolist()
    tables = []
    for row, by in zip(*both, strict=True):
        pages = [(slot, shift) for slot, shift in zip(row, by, strict=True) if slot >= 0]
        tables.append((tuple(slot for slot, _ in pages), () if shifts is None else tuple(shift for _, shift in pages)))
    return tables


def _pages(pool: torch.Tensor, table: Slots) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``(B, tokens, Hkv, D)`` of slots of ``(2, B, slots, T, Hkv, D)``: of a run in place."""
    if table == tuple(range(table[0], table[0] + len(table))):
        chosen = pool[:, :, table[0] : table[0] + len(table)]
    else:
        chosen = pool.index_select(2, torch.tensor(table, device=pool.device))
    keys, values = chosen.flatten(2, 3)
    return keys, values


def _placed(
    dtype: torch.dtype,
    pool: torch.Tensor,
    table: Slots,
    by: Slots,
    rope: torch.Tensor | None,
    rope_split: Sequence[int] | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``(B, tokens, Hkv, D)``, dequantised, keys turned by their page's shift.

    They are as exact as float32 where the attention is: on a CPU. On CUDA they get the queries' dtype, one rounding.
    """
    index = torch.tensor(table, device=pool.device)
    compute = lse_dtype(dtype)
    keys, values = pool.index_select(2, index).to(compute)  # (B, n, T, Hkv, D) each
    if k_scale is not None and v_scale is not None:
        keys = keys * k_scale.index_select(1, index).to(compute)[..., None]
        values = values * v_scale.index_select(1, index).to(compute)[..., None]
    if by and rope is not None and rope_split is not None:
        time = rope_split[0]
        shift = torch.tensor(by, device=pool.device)
        cosine, sine = rope[shift.abs(), : time // 2].to(compute)[:, None, None].unbind(-1)  # (n, 1, 1, time / 2)
        sine = sine * shift.sign()[:, None, None, None]
        even, odd = keys[..., :time].unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)
        keys = torch.cat([turned, keys[..., time:]], dim=-1)
    kept = compute if pool.device.type == "cpu" else dtype
    return keys.flatten(1, 2).to(kept), values.flatten(1, 2).to(kept)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    scale: float | None,
    return_lse: bool,
    back_end: BackEnd | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries ``(B, S, Hq, D)`` to keys and values ``(B, tokens, Hkv, D)``, None for none.

    Args:
        back_end: instead of the one that `dense_backends.select` finds best.

    Returns:
        out ``(B, S, Hq, D)`` contiguous, in q's dtype; lse ``(B, Hq, S)``, of shape ``(0,)`` when not asked for.
    """
    samples, length, heads, _ = q.shape
    dtype = lse_dtype(q.dtype)
    if keys is None or values is None:
        empty = torch.full((samples, heads, length), -math.inf, dtype=dtype, device=q.device)
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), empty if return_lse else empty.new_empty(0)
    across, summed = keys.transpose(1, 2), values.transpose(1, 2)  # (B, Hkv, tokens, D)
    # The queries of a group of heads attend to the same keys: they join along the sequence, keys are not repeated.
    queries = q.to(keys.dtype).unflatten(2, (keys.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if scale is not None and scale < 0:  # the kernels take the largest product for the largest logit
        queries, scale = -queries, -scale
    chosen = back_end or dense_backends.select(dense_backends.facts(queries, across, summed))
    if q.is_cuda and chosen is not dense_backends.MATH:
        queries, across, summed = (dense_backends.aligned(x) for x in (queries, across, summed))
    out, lse = chosen.attend(queries, across, summed, scale, return_lse)  # (B, Hkv, G * S, D), (B, Hkv, G * S)
    out = out.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).reshape(q.shape).to(q.dtype).contiguous()
    return out, q.new_empty(0, dtype=dtype) if lse is None else lse.reshape(samples, heads, length).to(dtype)
