"""The oracle: every op of ``torch.ops.longlive`` in plain PyTorch, one function an op.

Written to be read and to be right, not to be fast. Everything is computed in float64 and rounded once, except
retrieval scores, whose definition is float32 accumulation (float64 when the embeddings are float64). Arguments are
those of the ops (see `longlive_rag_ops.ops`), unchecked; buffers the ops mutate are mutated here too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import chain

NO_FRAME = -1


def rotate(
    x: torch.Tensor, rope: torch.Tensor, rope_split: Sequence[int], grid: Sequence[int], positions: torch.Tensor
) -> torch.Tensor:
    """Rotates ``x`` by the 3-D rotary embedding: frame ``i`` at temporal position ``positions[i]``.

    Args:
        x: ``(B, n * h * w, H, D)``, frame-major, then row-major over the grid.
        rope: ``(P, D // 2, 2)`` cosine and sine, see `rotary.rotary_table`.
        rope_split: real channels of (time, height, width).
        grid: ``(h, w)`` tokens of a frame.
        positions: ``(n,)`` temporal positions.

    Returns:
        ``(B, n * h * w, H, D)`` in ``x``'s dtype.
    """
    height, width = grid
    time_pairs, height_pairs = rope_split[0] // 2, rope_split[1] // 2
    angles = rope.double()
    rows = torch.arange(height, device=x.device).repeat_interleave(width)
    columns = torch.arange(width, device=x.device).repeat(height)
    spatial = torch.cat(  # (h * w, pairs of height and width, 2)
        [
            angles[rows, time_pairs : time_pairs + height_pairs],
            angles[columns, time_pairs + height_pairs :],
        ],
        dim=1,
    )
    temporal = angles[positions.to(x.device), :time_pairs]  # (n, pairs of time, 2)
    frames, tokens = len(positions), height * width
    turn = torch.cat(
        [temporal[:, None].expand(-1, tokens, -1, -1), spatial[None].expand(frames, -1, -1, -1)], dim=2
    ).reshape(frames * tokens, 1, -1, 2)
    pairs = x.double().unflatten(-1, (-1, 2))
    cosine, sine = turn.unbind(-1)
    even, odd = pairs.unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMSNorm over the model width ``H * D`` (arXiv 1910.07467), left in float64; ``x`` itself without a weight."""
    if weight is None:
        return x
    wide = x.double().flatten(-2)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()
    return normed.unflatten(-1, x.shape[-2:])


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows scaled to unit length in float32 (float64 stays). A zero row stays zero, a non-finite one becomes NaN.

    Dividing by the largest entry first keeps the squares of very large and very small embeddings in range.
    """
    rows = (rows if rows.dtype == torch.float64 else rows.float()).contiguous()  # see row_scores
    largest = rows.abs().amax(-1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, 1.0)
    length = scaled.square().sum(-1, keepdim=True).sqrt()
    unit = scaled / torch.where(length > 0, length, 1.0)
    return torch.where(largest.isfinite(), unit, torch.nan)


def row_scores(query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Dot product of a unit query ``(E,)`` with unit rows ``(N, E)``: ``(N,)``.

    Each row is reduced on its own, so that equal rows score equal to the last bit wherever they are stored, and ties
    are real. A matrix product does not promise that, nor does a sum over rows that are not contiguous.
    """
    if rows.shape[0] == 1:  # a sum over one long row alone is divided among threads, and another one than beside others
        return row_scores(query, rows.expand(2, -1))[:1]
    return (rows * query).contiguous().sum(-1)


def topk_retrieve(
    query: torch.Tensor,
    index: torch.Tensor,
    index_ids: torch.Tensor,
    index_length: torch.Tensor,
    end_frame: torch.Tensor,
    k: int,
    first_frame: int = 0,
    recent_exclude: int = 0,
    exclude: torch.Tensor | None = None,
    normalized: bool = False,
    index_scale: torch.Tensor | None = None,
    min_score: float | None = None,
    diversity: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames most similar to the query: ids and cosines ``(B, k)``, best first, -1 and -inf past the last.

    With ``diversity`` ``d``, each choice is the frame with the largest ``(1 - d) cos(query, x) - d max_s cos(x, s)``
    over the frames ``s`` chosen before (maximal marginal relevance, Carbonell and Goldstein, SIGIR 1998).
    """
    samples = query.shape[0]
    score_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    ids = torch.full((samples, k), NO_FRAME, dtype=torch.int64, device=query.device)
    scores = torch.full((samples, k), -math.inf, dtype=score_dtype, device=query.device)
    length, end = int(index_length), int(end_frame) - recent_exclude
    for b in range(samples):
        rows, frames = index[b, :length].to(score_dtype), index_ids[b, :length]
        if index_scale is not None:
            rows = rows * index_scale[b, :length, None].to(score_dtype)
        rows = rows if normalized else unit_rows(rows)
        cosine = row_scores(unit_rows(query[b]), rows)
        allowed = (frames >= max(first_frame, 0)) & (frames < end) & cosine.isfinite()
        if exclude is not None:
            allowed &= ~torch.isin(frames, exclude[b])
        if min_score is not None:
            allowed &= cosine >= min_score
        redundancy = torch.zeros_like(cosine)  # largest cosine with a frame already chosen
        for rank in range(min(k, int(allowed.sum()))):
            value = cosine if diversity == 0 else (1 - diversity) * cosine - diversity * redundancy
            best = value[allowed].max()
            row = min((allowed & (value == best)).nonzero().flatten().tolist(), key=lambda row: int(frames[row]))
            ids[b, rank], scores[b, rank] = frames[row], cosine[row]
            allowed[row] = False
            if diversity > 0:
                shared = row_scores(rows[row], rows)
                redundancy = shared if rank == 0 else torch.maximum(redundancy, shared)
    return ids, scores


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
    """Writes a block's placed keys, values and canonical keys; returns the rotated queries ``(B, n*T, Hq, D)``."""
    frames = len(slots)
    k_normed = rms_norm(k, k_weight, eps)
    canonical = (
        rotate(k_normed, rope, rope_split, grid, torch.zeros_like(positions)).to(k.dtype).unflatten(1, (frames, -1))
    )
    placed = rotate(k_normed, rope, rope_split, grid, positions).to(k.dtype).unflatten(1, (frames, -1))
    values = v.unflatten(1, (frames, -1))
    for i, (slot, row) in enumerate(zip(slots.tolist(), staging_rows.tolist(), strict=True)):
        if slot >= 0:
            pool_layer[0, :, slot] = placed[:, i]
            pool_layer[1, :, slot] = values[:, i]
        if row >= 0:
            staging[:, row] = canonical[:, i]
    return rotate(rms_norm(q, q_weight, eps), rope, rope_split, grid, positions).to(q.dtype)


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
    """Places canonical pages in window slots: dequantises, rotates to a temporal position, copies."""
    keys = pool_layer[0] if k_pages is None else k_pages
    values = pool_layer[1] if k_pages is None else v_pages
    for b, (to, from_, at) in enumerate(zip(slots.tolist(), source.tolist(), positions.tolist(), strict=True)):
        for slot, page, position in zip(to, from_, at, strict=True):
            if slot < 0 or page < 0:
                continue
            key = _dequantise(keys[b, page], None if k_scale is None else k_scale[b, page])
            # At position 0 a copy: a product with 1 and 0 would make 0 of -0 and NaN of infinity.
            pool_layer[0, b, slot] = turn_in_time(key, rope, rope_split, position) if position else key
            if values is not None:
                pool_layer[1, b, slot] = _dequantise(values[b, page], None if v_scale is None else v_scale[b, page])


def _dequantise(page: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Page ``(T, H, D)`` times its scale per token and head ``(T, H)``."""
    return page.double() if scale is None else page.double() * scale.double()[..., None]


def turn_in_time(x: torch.Tensor, rope: torch.Tensor, rope_split: Sequence[int], position: int) -> torch.Tensor:
    """Turns the temporal channels of ``(..., D)`` by a position, which may be negative; the others stay."""
    time = rope_split[0]
    cosine, sine = rope[abs(position), : time // 2].double().unbind(-1)
    sine = sine if position >= 0 else -sine
    even, odd = x[..., :time].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., time:]], dim=-1)


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
    """Softmax attention over the pages in a table of slots: ``(B, S, Hq, D)`` and log-sum-exp ``(B, Hq, S)``.

    A page shifted by ``d`` in time is attended to by the query turned by ``-d``: ``R(-d) q . k = q . R(d) k``.
    """
    samples, length, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros_like(q)
    lse = torch.full((samples, heads, length), -math.inf, dtype=lse_dtype(q.dtype), device=q.device)
    for b in range(samples):
        table = range(run or 0) if slots is None else slots[b].tolist()
        shift = [0] * len(table) if shifts is None else shifts[b].tolist()
        pages = [(slot, by) for slot, by in zip(table, shift, strict=True) if slot >= 0]
        if not pages:
            continue  # nothing to attend to: output 0, log-sum-exp -inf
        group = heads // pool_layer.shape[4]
        parts = []
        for slot, by in pages:
            key = _dequantise(pool_layer[0, b, slot], None if k_scale is None else k_scale[b, slot])  # (T, Hkv, D)
            query = q[b].double()
            if rope is not None and rope_split is not None:
                query = turn_in_time(query, rope, rope_split, -by)
            parts.append(torch.einsum("shd,thd->hst", query, key.repeat_interleave(group, 1)) * scale)
        values = torch.cat(
            [_dequantise(pool_layer[1, b, slot], None if v_scale is None else v_scale[b, slot]) for slot, _ in pages]
        ).repeat_interleave(group, 1)  # (tokens, Hq, D)
        logits = torch.cat(parts, -1)
        total = logits.logsumexp(-1)  # (Hq, S)
        out[b] = torch.einsum("hst,thd->shd", (logits - total[..., None]).exp(), values).to(q.dtype)
        lse[b] = total.to(lse.dtype)
    return out, lse if return_lse else lse.new_empty(0)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Log-sum-exp is kept in float32, in float64 for float64 attention."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_attention(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins attention over disjoint sets of keys, part 0 first: ``(B, S, H, D)``, ``(B, H, S)``.

    ``lse = log sum_p exp(lse_p)`` and ``out = sum_p exp(lse_p - lse) out_p``; an empty part (lse -inf) adds nothing.
    """
    parts = lses.double()
    top = parts.amax(0)
    top = torch.where(top == -math.inf, 0.0, top)  # all parts empty: exp(-inf - 0) = 0, never exp(nan)
    total = torch.zeros_like(top)
    joined = torch.zeros_like(outs[0], dtype=torch.float64)
    for out, lse in zip(outs, parts, strict=True):
        weight = (lse - top).exp()
        total = total + weight
        spread = weight.transpose(1, 2)[..., None]  # (B, S, H, 1)
        joined = joined + torch.where(spread == 0, 0.0, spread * out.double())  # NaN stays NaN
    divisor = torch.where(total > 0, total, 1.0).transpose(1, 2)[..., None]
    return (joined / divisor).to(outs.dtype), (top + total.log()).to(lses.dtype)


def retrieve_attend(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Retrieval, placement, rotation and attention in one call; see `chain.retrieve_attend` for the sequence."""
    return chain.retrieve_attend(sys.modules[__name__], *args, **kwargs)
